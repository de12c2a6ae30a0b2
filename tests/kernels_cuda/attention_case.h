/*
 * attention_case: random batches with their data, and what attention of them is.
 */
#ifndef TESTS_KERNELS_CUDA_ATTENTION_CASE_H
#define TESTS_KERNELS_CUDA_ATTENTION_CASE_H

#include "tests/kernels_cuda/support.h"

#define CASE_REQUESTS_MAX 4
#define CASE_KV_HEADS_MAX 3
#define CASE_ROWS_MAX     1200
#define CASE_REFS_MAX     2048
#define CASE_EXPLICIT_MAX 1024
#define CASE_VARIANTS_MAX 3
#define CASE_POOL_PAGES   2048
#define CASE_Q_MAX        ((size_t)6 << 20) /* elements of all variants */
#define CASE_OUT_MAX      CASE_Q_MAX

struct attention_case {
    enum kernels_plan_kind kind;
    enum kernels_page_format format;
    uint32_t head_dim;
    uint32_t num_kv_heads;
    uint32_t group;
    uint32_t num_requests;
    uint32_t num_variants;
    uint32_t rows;
    uint32_t row_first[CASE_REQUESTS_MAX + 1];
    int32_t positions[CASE_ROWS_MAX];
    struct kernels_page_list lists[CASE_REQUESTS_MAX * CASE_KV_HEADS_MAX];
    struct kernels_page_ref refs[CASE_REFS_MAX];
    uint32_t num_refs;
    int32_t explicit_positions[CASE_EXPLICIT_MAX][RK_PAGE_TOKENS];
    uint32_t num_explicit;
    float scale;
    float gain; /* of the queries: a large one makes few weights matter */

    /* Pages that the refs name, each once, and the rows of them that may not be NaN. */
    int32_t pages[CASE_REFS_MAX];
    uint64_t needed[CASE_REFS_MAX];
    uint32_t num_pages;
};

/* What a family asks of its cases. */
struct case_wish {
    bool bf16;    /* no e4m3 pages */
    bool decode;  /* no prefill */
    bool growing; /* pages in order from position 0, as decode has them; every list has some */
};

/* Device and host memory for one case at a time. */
struct attention_memory {
    const struct fixture *fixture;
    struct kernels_pool *pools[2][2]; /* [head_dim == 128][format]; pages not of the case: NaN */
    struct kernels_plan *plans[2][2][CASE_KV_HEADS_MAX + 1][KERNELS_DEVICE_GROUP_MAX + 1];
    struct kernels_workspace *workspace;
    float *scales; /* [CASE_POOL_PAGES][2], of the e4m3 pools */
    int32_t *permutation;
    int32_t *slots; /* of a page of the pool: its index in case.pages */
    uint16_t *reals;
    uint8_t *bytes;
    uint8_t *pages; /* pinned [CASE_REFS_MAX][32 KB]: pages of the case as uploaded */
    float *values;  /* [CASE_REFS_MAX][2 * 64 * 128]: and as numbers, before poisoning */
    uint16_t *q;    /* pinned */
    uint16_t *out;
    float *lse;
    int32_t *positions;
    float *mass;
    void *device_q;
    void *device_out;
    float *device_lse;
    int32_t *device_positions;
    float *device_mass;
    double *expected_out;
    double *expected_lse;
};

struct attention_memory *attention_memory_create(const struct fixture *fixture);
void attention_memory_destroy(struct attention_memory *memory);
struct kernels_pool *case_pool(const struct attention_memory *memory,
                               const struct attention_case *c);
struct kernels_plan *case_plan(struct attention_memory *memory, const struct attention_case *c);
struct kernels_batch case_batch(const struct attention_case *c, uint64_t version);

void case_generate(struct attention_memory *memory, const struct case_wish *wish,
                   struct attention_case *ret_case);
/* Queues the data of a case; what may not be read is NaN. */
void case_upload(struct attention_memory *memory, const struct attention_case *c);
/* Makes the case's pages NaN again. */
void case_withdraw(struct attention_memory *memory, const struct attention_case *c);

/* Fills expected_out and expected_lse. */
void case_expect(struct attention_memory *memory, const struct attention_case *c);
/* After case_expect(): expected[num_refs][64]. */
void case_expect_mass(const struct attention_memory *memory, const struct attention_case *c,
                      double *expected);
const char *case_text(const struct attention_case *c);

#endif
