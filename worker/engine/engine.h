/*
 * engine: the forward pass of a Llama-shaped model over per-(layer, KV head)
 * pages, and the pool those pages come from.
 *
 * A sequence is one request's view of the context: consecutive runs of tokens
 * from position 0 on. A run stands at its base P (the sum of the lengths before
 * it); its keys are rotated at their position inside the run, and queries are
 * relocated to it (kernels.h). A run is either
 *   own       its pages come from the pool and are filled by engine_forward, or
 *   borrowed  read-only pages of somebody else (a store's arena, another
 *             sequence); a row that is computed again inside it goes to an
 *             overlay page with explicit positions, rotated at its absolute
 *             position, and the stale row's live bit is cleared.
 * Cold and reused contexts are built from the same runs, so with row-independent
 * kernels the results are equal bit by bit.
 *
 * Threads: one owner thread. Nothing here blocks on anything but arithmetic.
 */
#ifndef WORKER_ENGINE_ENGINE_H
#define WORKER_ENGINE_ENGINE_H

#include "common/base/id.h"
#include "common/base/kv_layout.h"
#include "common/base/status.h"
#include "kernels/kernels.h"
#include "worker/model/model.h"

struct engine;
struct engine_sequence;
struct recovery_head_map; /* worker/recovery/head_map.h */

/* Rotation tables and pool are made for the context, so a model that claims millions of tokens
 * gets them only when asked. */
#define ENGINE_CONTEXT_DEFAULT_MAX 131072u

struct engine_options {
    enum kernels_mode mode; /* also the dtype of the pages: F32 or BF16 */
    enum kernels_isa isa;
    uint32_t threads;        /* 0: as many as this process may use */
    uint32_t context_tokens; /* 0: the model's, at most ENGINE_CONTEXT_DEFAULT_MAX; longest
                                position of a sequence */
    uint64_t pool_tokens; /* 0: twice the context, if half of the memory that the process may take
                             is enough for that; page pool, reserved at creation */
};

/* Converts the weights; the model may be closed after it. */
RK_MUST_CHECK enum rk_status engine_create(const struct model *model,
                                           const struct engine_options *options,
                                           struct engine **ret_engine, struct rk_error *error);
void engine_destroy(struct engine *engine); /* accepts NULL; no sequence may be left */

void engine_layout(const struct engine *engine, struct rk_kv_layout *ret_layout);
uint32_t engine_context_tokens(const struct engine *engine);
uint32_t engine_vocab_size(const struct engine *engine);
const char *engine_isa_name(const struct engine *engine);
/*
 * Which arithmetic this engine does, for people (engine_numeric_path_name) and to compare
 * (engine_numeric_path). Engines of one model with equal ids give equal bits: the id hashes what
 * the code is (attention path, products with the library's version and instruction set, compiler,
 * libc) and what it computes: the bits of a short forward pass, so that what no name tells, such as
 * a choice that depends on the number of threads, counts too. KV is exact only for its own path.
 *
 * Call engine_numeric_path on the owner's thread while no sequence exists; it computes some 80
 * tokens. RK_ERR_CORRUPT: the model's logits are not finite numbers. Allocates.
 */
const char *engine_numeric_path_name(const struct engine *engine);
RK_MUST_CHECK enum rk_status engine_numeric_path(struct engine *engine, struct rk_id *ret_id,
                                                 struct rk_error *error);
uint64_t engine_pool_pages(const struct engine *engine);
uint64_t engine_pool_pages_used(const struct engine *engine);
/* Pool pages that num_tokens own tokens take at most, over all layers and heads. */
uint64_t engine_pages_needed(const struct engine *engine, uint32_t num_tokens);
/* FLOPs of computing tokens [0, n) densely: 2 * weights + attention, output row excluded. */
double engine_flops_full(const struct engine *engine, uint32_t num_tokens);

RK_MUST_CHECK enum rk_status engine_sequence_create(struct engine *engine,
                                                    struct engine_sequence **ret_sequence);
/* Gives its pages back to the pool. Accepts NULL. */
void engine_sequence_destroy(struct engine_sequence *sequence);

/* Append a run of own pages, at most num_tokens_max tokens; the last run of a sequence may be
 * filled partly, all others are filled to the end. RK_ERR_TOO_LONG past the context. Pages are
 * taken from the pool as rows arrive (RK_ERR_FULL from engine_forward). */
RK_MUST_CHECK enum rk_status engine_sequence_add_own(struct engine_sequence *sequence,
                                                     uint32_t num_tokens_max, uint32_t *ret_run);
/* Append a run of borrowed pages. pages, checksums: [layer][kv_head][page], copied as arrays
 * (the page bytes are not); an entry with NULL data is not there (nothing may need to see it:
 * its rows are not live). verify: each layer's pages are checked against their checksums right
 * before their first use. */
RK_MUST_CHECK enum rk_status engine_sequence_add_borrowed(struct engine_sequence *sequence,
                                                          uint32_t num_tokens,
                                                          const void *const *pages,
                                                          const uint64_t *checksums, bool verify,
                                                          uint32_t *ret_run);
uint32_t engine_sequence_num_tokens(const struct engine_sequence *sequence); /* sum of the runs */
/* Pages of a run [layer][kv_head][page] into ret_pages (room for all), for publishing or lending.
 */
void engine_sequence_run_pages(const struct engine_sequence *sequence, uint32_t run,
                               const void **ret_pages);
/* FLOPs spent on this sequence so far. */
double engine_sequence_flops(const struct engine_sequence *sequence);
/* After RK_MISS_CHECKSUM: the run whose page was bad. */
uint32_t engine_sequence_bad_run(const struct engine_sequence *sequence);
/* And which page of it. */
struct rk_extent engine_sequence_bad_page(const struct engine_sequence *sequence);

struct engine_row {
    int32_t token_id;
    uint32_t position; /* absolute; in a run of the sequence */
    bool want_logits;
};

/* The rows of one sequence in a call: ascending positions. */
struct engine_item {
    struct engine_sequence *sequence;
    const struct engine_row *rows;
    uint32_t num_rows;
    const struct recovery_head_map *head_map; /* what these rows' queries see; NULL: everything */
};

/*
 * Compute rows of one or several sequences (together at most KERNELS_ROWS_MAX): their K and V go
 * to pages, and logits[i][vocab] (f32) is written for the i-th row that wants them, in order.
 * decode: see struct kernels_attention. A row sees every live row at or before its position,
 * those of this call included.
 * RK_ERR_INVALID: token id or position out of range. RK_ERR_FULL: the pool is empty, nothing was
 * computed. RK_MISS_CHECKSUM: a borrowed page was bad; the sequence is of no further use.
 */
RK_MUST_CHECK enum rk_status engine_forward(struct engine *engine, const struct engine_item *items,
                                            uint32_t num_items, bool decode, float *logits,
                                            struct rk_error *error);

/* ---- Sampling: worker/engine/sample.c ---- */

struct engine_sampler {
    float temperature; /* 0: greedy */
    float top_p;       /* in (0, 1] */
    uint64_t state;    /* seeded by the caller; advanced by each draw */
};
/* Greedy: lowest id among equals. */
int32_t engine_sample(struct engine_sampler *sampler, const float *logits, uint32_t vocab_size,
                      void *scratch /* vocab_size * 8 bytes */);
/* No NaN, no infinity: what neither a sample nor a probability can be made of. */
bool engine_logits_finite(const float *logits, size_t count);
/* out[i] = log softmax, computed in f64, rounded to f32. */
void engine_log_softmax(const float *logits, uint32_t vocab_size, float *out);

#endif
