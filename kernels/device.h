/*
 * device: SegPagedAttention over one pool of pages, on a GPU or, as the
 * reference that defines correctness, on the CPU.
 *
 * A page list is all that a kernel knows: (page, positions, live mask, query
 * variant) per entry, and window and sink per list. Head classes, segments at
 * any position, overlays and holes differ only in their lists.
 *
 * Method: RedKnot (arXiv 2606.06256), head-aware pages and query relocation;
 * FlashAttention-3 (arXiv 2407.08608), the loop of the prefill kernel;
 * Flash-Decoding and Stream-K (arXiv 2301.03598), the split of long lists.
 *
 * Memory: every `void *` named "device" is an address that the device can use
 * (kernels_memory_create()); on the CPU device it is plain memory.
 * Threads: one call at a time per object. Calls that take a stream only queue
 * work on it: they neither allocate nor wait, and may be captured in a graph.
 * A NULL stream is the device's default stream. The CPU device works at once.
 * Errors: shapes and lists out of range are refused with RK_ERR_INVALID before
 * anything is queued; a GPU that cannot run the kernels with RK_ERR_UNSUPPORTED.
 */
#ifndef KERNELS_DEVICE_H
#define KERNELS_DEVICE_H

#include "common/base/kv_layout.h"
#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KERNELS_DEVICE_GROUP_MAX 16 /* query heads per KV head */

struct kernels_device;
struct kernels_pool;
struct kernels_plan;
struct kernels_workspace;
struct kernels_graph;
typedef void *kernels_stream; /* a CUstream on a GPU */

enum kernels_device_kind { KERNELS_DEVICE_CPU, KERNELS_DEVICE_CUDA };

/* ---- devices, memory, streams, graphs ---- */

/* ordinal: which GPU; 0 for the CPU. Refuses GPUs without the instructions of sm_90a. */
RK_MUST_CHECK enum rk_status kernels_device_create(enum kernels_device_kind kind, uint32_t ordinal,
                                                   struct kernels_device **ret_device,
                                                   struct rk_error *error);
void kernels_device_destroy(struct kernels_device *device); /* accepts NULL */
const char *kernels_device_name(const struct kernels_device *device);
/* Multiprocessors of a GPU; plans are made for this many. The CPU says 132, as an H100. */
uint32_t kernels_device_processors(const struct kernels_device *device);

enum kernels_memory_kind {
    KERNELS_MEMORY_DEVICE,
    KERNELS_MEMORY_PINNED, /* on the host, mapped for the device too, at the same address */
};
RK_MUST_CHECK enum rk_status kernels_memory_create(struct kernels_device *device,
                                                   enum kernels_memory_kind kind, size_t bytes,
                                                   void **ret_memory, struct rk_error *error);
void kernels_memory_destroy(struct kernels_device *device, enum kernels_memory_kind kind,
                            void *memory); /* accepts NULL */
/* Any direction; asynchronous if the host side is pinned. */
RK_MUST_CHECK enum rk_status kernels_copy(struct kernels_device *device, void *to, const void *from,
                                          size_t bytes, kernels_stream stream,
                                          struct rk_error *error);
RK_MUST_CHECK enum rk_status kernels_fill(struct kernels_device *device, void *to, uint8_t byte,
                                          size_t bytes, kernels_stream stream,
                                          struct rk_error *error);
RK_MUST_CHECK enum rk_status kernels_stream_create(struct kernels_device *device,
                                                   kernels_stream *ret_stream,
                                                   struct rk_error *error);
void kernels_stream_destroy(struct kernels_device *device, kernels_stream stream);
/* Waits until all that was queued is done, and says what went wrong with it. */
RK_MUST_CHECK enum rk_status kernels_stream_wait(struct kernels_device *device,
                                                 kernels_stream stream, struct rk_error *error);
/* Between begin and end, calls on the stream are recorded instead of run. */
RK_MUST_CHECK enum rk_status kernels_graph_begin(struct kernels_device *device,
                                                 kernels_stream stream, struct rk_error *error);
RK_MUST_CHECK enum rk_status kernels_graph_end(struct kernels_device *device, kernels_stream stream,
                                               struct kernels_graph **ret_graph,
                                               struct rk_error *error);
RK_MUST_CHECK enum rk_status kernels_graph_launch(struct kernels_graph *graph,
                                                  kernels_stream stream, struct rk_error *error);
void kernels_graph_destroy(struct kernels_graph *graph); /* accepts NULL */

/* ---- the pool ---- */

/* How K and V stand in a page. */
enum kernels_page_format {
    KERNELS_PAGE_BF16,
    /* fp8 e4m3; value = byte * scale; one scale for K and one for V of each page, kept beside the
     * pool. Decode only. */
    KERNELS_PAGE_E4M3,
};

struct kernels_pool_options {
    uint32_t head_dim; /* 64 or 128 */
    enum kernels_page_format format;
    uint32_t pages; /* 1 .. 2^24 */
};

/* One pool for all layers and heads of a model. Page = 64 tokens of one (request or segment,
 * layer, KV head): K[64][head_dim], then V[64][head_dim]. Zeroed. */
RK_MUST_CHECK enum rk_status kernels_pool_create(struct kernels_device *device,
                                                 const struct kernels_pool_options *options,
                                                 struct kernels_pool **ret_pool,
                                                 struct rk_error *error);
void kernels_pool_destroy(struct kernels_pool *pool); /* accepts NULL */
size_t kernels_pool_page_bytes(const struct kernels_pool *pool);
/* Device address of page 0; pages follow on. */
void *kernels_pool_pages(const struct kernels_pool *pool);
/* Device address of float [pages][2], scales of K and V; NULL for bf16. */
float *kernels_pool_scales(const struct kernels_pool *pool);

/* ---- page lists and plans ---- */

struct kernels_page_ref {
    int32_t page;      /* index into the pool */
    int32_t variant;   /* which rotated copy of the queries meets this page */
    int32_t position;  /* absolute position of row 0; rows follow on */
    int32_t positions; /* -1, or index into explicit_positions: then `position` is not used */
    uint64_t live;     /* bit r: row r may be seen at all */
};

/* Pages [first, first + count) of batch.refs. Visible to the query at t: a row that is live, at
 * position c <= t, and (window == 0 or c > t - window or c < sink). */
struct kernels_page_list {
    uint32_t first;
    uint32_t count;
    uint32_t window; /* tokens, 0: all */
    uint32_t sink;   /* tokens */
};

/* What one layer computes: requests with their query rows and the page lists of their KV heads.
 * Host memory, borrowed during kernels_plan_update(). */
struct kernels_batch {
    uint32_t num_requests;
    uint32_t num_variants;     /* rotated copies of the queries, >= 1 */
    const uint32_t *row_first; /* [num_requests + 1]: rows of request r of the query buffer */
    const int32_t *positions;  /* [rows], >= 0, ascending within a request */
    const struct kernels_page_list *lists; /* [num_requests][num_kv_heads]; count 0: sees nothing */
    const struct kernels_page_ref *refs;   /* [num_refs] */
    uint32_t num_refs;
    const int32_t (*explicit_positions)[RK_PAGE_TOKENS]; /* [num_explicit], ascending in a page */
    uint32_t num_explicit;
    /* Changed by the caller whenever lists, refs, explicit positions, the number of rows, or, for
     * prefill, positions change; a plan that has seen this version is left alone. 0: always new. */
    uint64_t version;
};

enum kernels_plan_kind {
    KERNELS_PLAN_PREFILL, /* tiles of up to 128 (row, query head) pairs */
    KERNELS_PLAN_DECODE,  /* tiles of up to 16 */
};

struct kernels_plan_options {
    enum kernels_plan_kind kind;
    uint32_t num_kv_heads; /* of one layer, on this device */
    uint32_t group;        /* query heads per KV head, 1..16 */
    uint32_t head_dim;     /* 64 or 128 */
    uint32_t rows_max;     /* query rows of a batch */
    uint32_t requests_max;
    uint32_t refs_max;
    uint32_t explicit_max;
};

/* A plan cuts a batch into work items, balanced over the multiprocessors. It belongs to a layer
 * (or to several whose lists are the same). Allocates host, pinned and device memory once. */
RK_MUST_CHECK enum rk_status kernels_plan_create(struct kernels_device *device,
                                                 const struct kernels_plan_options *options,
                                                 struct kernels_plan **ret_plan,
                                                 struct rk_error *error);
void kernels_plan_destroy(struct kernels_plan *plan); /* accepts NULL */

/*
 * Host arithmetic only. *ret_changed says whether anything was planned anew, which then needs
 * kernels_plan_upload(). A decode plan stays good while rows move on inside the pages that their
 * lists have (up to the last position of the last page): positions are read on the device.
 * RK_ERR_INVALID names the first wrong value; RK_ERR_FULL what exceeded the options. The plan is
 * then empty: attention with it is refused. Writes pinned memory that an upload queued before may
 * still read: wait for it first.
 */
RK_MUST_CHECK enum rk_status kernels_plan_update(struct kernels_plan *plan,
                                                 const struct kernels_pool *pool,
                                                 const struct kernels_batch *batch,
                                                 bool *ret_changed, struct rk_error *error);
/* One copy from pinned memory to fixed device addresses: what is used, or, when captured, the
 * whole capacity, so that a replay carries later updates too. */
RK_MUST_CHECK enum rk_status kernels_plan_upload(struct kernels_plan *plan, kernels_stream stream,
                                                 struct rk_error *error);

/* For logs, tests and benchmarks. */
struct kernels_plan_stats {
    uint32_t items;
    uint32_t splits;        /* items that are part of a split list */
    uint32_t processors;    /* that have work */
    uint64_t pages;         /* read by all items together */
    uint64_t pages_busiest; /* read by the busiest processor */
};
struct kernels_plan_stats kernels_plan_stats(const struct kernels_plan *plan);

/* ---- work on the device ---- */

/* Partial results of split lists. One per stream that runs attention at the same time. */
RK_MUST_CHECK enum rk_status kernels_workspace_create(struct kernels_device *device,
                                                      struct kernels_workspace **ret_workspace,
                                                      struct rk_error *error);
void kernels_workspace_destroy(struct kernels_workspace *workspace); /* accepts NULL */

struct kernels_paged_attention {
    struct kernels_plan *plan;
    const struct kernels_pool *pool;
    struct kernels_workspace *workspace;
    const void *q; /* device, bf16 [num_variants][rows][num_q_heads][head_dim], rotated */
    const int32_t *positions; /* device [rows], absolute */
    float scale;              /* above 0, usually 1 / sqrt(head_dim) */
    void *out;                /* device, bf16 [rows][num_q_heads][head_dim]; a row that sees
                                 nothing gives zeros */
    float *lse;               /* device [rows][num_q_heads], natural log of the sum of exponents,
                                 -inf where nothing is seen; or NULL */
};
/* Rows of pages that are not live, or lie after every query, may hold any bytes, NaN included. */
RK_MUST_CHECK enum rk_status kernels_paged_attention(struct kernels_device *device,
                                                     const struct kernels_paged_attention *call,
                                                     kernels_stream stream, struct rk_error *error);

/*
 * Attention mass of the rows' queries per token of the context, for token selection: for entry i
 * of batch.refs, mass[i][r] = sum over rows and over the query heads of the KV head of
 * softmax weight on row r of the page; 0 where nothing is seen. `call` as it ran
 * before, with its lse (not NULL; of all visible tokens); out is not used. bf16 pools.
 */
RK_MUST_CHECK enum rk_status kernels_attention_mass(struct kernels_device *device,
                                                    const struct kernels_paged_attention *call,
                                                    float *mass, /* device [num_refs][64] */
                                                    kernels_stream stream, struct rk_error *error);

/* Rotation of a device, half-split convention (NeoX): element i pairs with i + head_dim / 2. */
struct kernels_device_rope {
    const float *cos; /* device [positions_max][head_dim / 2] */
    const float *sin;
    uint32_t positions_max;
    uint32_t head_dim;
};

/* Rows [row, row + count) of the source become rows [page_row, page_row + count) of a page. */
struct kernels_append_run {
    int32_t page;
    int32_t page_row; /* page_row + count <= 64 */
    int32_t count;
    int32_t row;
    int32_t kv_head;
    int32_t base; /* keys are rotated at positions[row] - base, in [0, positions_max) */
};

struct kernels_rope_append {
    const struct kernels_pool *pool;
    const struct kernels_device_rope *rope;
    uint32_t rows;
    uint32_t num_kv_heads;
    const void *k;            /* device, bf16 [rows][num_kv_heads][head_dim], not rotated */
    const void *v;            /* the same */
    const int32_t *positions; /* device [rows] */
    const struct kernels_append_run *runs; /* device [num_runs]; no two runs share a page */
    uint32_t num_runs;
};
/* Rotates keys and scatters K and V into pages; an e4m3 page whose scale is too small for new rows
 * is scaled anew, its rows before page_row included. A run at page_row 0 sets the scale and zeroes
 * the rest of the page. */
RK_MUST_CHECK enum rk_status kernels_rope_append(struct kernels_device *device,
                                                 const struct kernels_rope_append *call,
                                                 kernels_stream stream, struct rk_error *error);

/* out[v][row] = q[row] rotated at positions[row] - bases[v]: one copy of the queries for each base
 * that pages stand at (query relocation). |angle| < positions_max; negative angles turn back. */
struct kernels_rope_queries {
    const struct kernels_device_rope *rope;
    uint32_t rows;
    uint32_t num_q_heads;
    const void *q;            /* device, bf16 [rows][num_q_heads][head_dim], not rotated */
    const int32_t *positions; /* device [rows] */
    const int32_t *bases;     /* device [num_variants] */
    uint32_t num_variants;
    void *out; /* device, bf16 [num_variants][rows][num_q_heads][head_dim]; not q */
};
RK_MUST_CHECK enum rk_status kernels_rope_queries(struct kernels_device *device,
                                                  const struct kernels_rope_queries *call,
                                                  kernels_stream stream, struct rk_error *error);

/* host[i] = page pages[i] of the pool, or the other way round. host: pinned, [count][page_bytes];
 * pages: device or pinned [count]. At the rate of the bus. Scales do not travel. */
RK_MUST_CHECK enum rk_status kernels_pages_gather(struct kernels_device *device,
                                                  const struct kernels_pool *pool,
                                                  const int32_t *pages, uint32_t count, void *host,
                                                  kernels_stream stream, struct rk_error *error);
RK_MUST_CHECK enum rk_status kernels_pages_scatter(struct kernels_device *device,
                                                   const struct kernels_pool *pool,
                                                   const int32_t *pages, uint32_t count,
                                                   const void *host, kernels_stream stream,
                                                   struct rk_error *error);
/* XXH3-64 of each page (seed 0), as common/base/hash.h computes it. sums: device [count]. */
RK_MUST_CHECK enum rk_status kernels_pages_checksum(struct kernels_device *device,
                                                    const struct kernels_pool *pool,
                                                    const int32_t *pages, uint32_t count,
                                                    uint64_t *sums, kernels_stream stream,
                                                    struct rk_error *error);

#ifdef __cplusplus
}
#endif

#endif
