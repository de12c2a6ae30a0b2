/*
 * prefill_internal: what the warps of the prefill kernel tell each other, and where
 * it stands in shared memory.
 */
#ifndef KERNELS_CUDA_PREFILL_INTERNAL_CUH
#define KERNELS_CUDA_PREFILL_INTERNAL_CUH

#include "kernels/cuda/cuda_internal.h"
#include "kernels/cuda/ptx.cuh"

#include <cuda_bf16.h>
#include <math_constants.h>

#define THREADS        384
#define CONSUMER_WARPS 8
#define TILE_KEYS      (2 * RK_PAGE_TOKENS)
#define LOG2E          1.4426950408889634f
/* More than stages of queries: an item's meta must outlive its queries, until its rows are out. */
#define QUERY_METAS 4

enum tile_flags {
    TILE_NEW_Q = 1,     /* meets the next stage of queries */
    TILE_LAST_OF_Q = 2, /* and this is the last tile that meets it */
    TILE_MASKED_0 = 4,  /* some row does not see some key of page 0 */
    TILE_MASKED_1 = 8,  /* of page 1 */
    TILE_LAST = 16,     /* of the item */
    TILE_END = 32,      /* last of the block */
};

/* What decides which rows of a page a query sees. */
enum page_kind {
    PAGE_LIVE,       /* the live mask alone: all queries of the tile see the same rows */
    PAGE_CONTIGUOUS, /* positions that follow on, too */
    PAGE_EXPLICIT,   /* listed positions, too */
};

/* What consumers must know of a tile. */
struct tile_meta {
    uint64_t live[2];
    uint64_t v_live[2]; /* rows that some query may see */
    int32_t position[2];
    int32_t kind[2];      /* enum page_kind */
    int32_t sink_rows[2]; /* the first so many, if more than none, are in the sink */
    int32_t page[2];
    int32_t count; /* of pages, 0..2 */
    uint32_t flags;
    int32_t window;
    int32_t pad;
    int32_t positions[2][RK_PAGE_TOKENS]; /* of explicit pages */
};

/* What consumers must know of a stage of queries. */
struct query_meta {
    struct plan_item item;
    int32_t positions[TILE_ROWS_PREFILL];
};

#define FEED_REFS 32

/* What the feeding warp must know of an item. */
struct feed_buffer {
    struct plan_item item;
    int32_t positions[TILE_ROWS_PREFILL];
    struct kernels_page_ref refs[2][FEED_REFS]; /* windows of the item's refs, in turns */
};

template <int D> struct prefill_shared {
    static constexpr int HALVES = D / 64;
    static constexpr int STAGES = D == 128 ? 2 : 4;
    static constexpr int METAS = 2 * STAGES;
    static constexpr uint32_t KV_BYTES = TILE_KEYS * D * 2;
    static constexpr uint32_t Q_BYTES = TILE_ROWS_PREFILL * D * 2;

    uint8_t q[2][Q_BYTES]; /* [warpgroup][half][64 rows][128] */
    uint8_t k[STAGES][KV_BYTES];
    uint8_t v[STAGES][KV_BYTES];
    struct query_meta query_metas[QUERY_METAS];
    struct feed_buffer feed_buffers[2]; /* of the item that is fed, and of the next */
    struct tile_meta tile_metas[METAS];
    uint64_t q_full[2], q_empty[2];
    uint64_t meta_full[METAS];
    uint64_t k_full[STAGES], k_empty[STAGES];
    uint64_t v_full[STAGES], v_clean[STAGES], v_empty[STAGES];
    uint32_t last_part[2]; /* by warpgroup: this block wrote the last part of a split list */
};

struct prefill_arguments {
    const struct plan_item *items;
    const struct kernels_page_ref *refs;
    const int32_t (*explicit_positions)[RK_PAGE_TOKENS];
    const int32_t *positions;
    __nv_bfloat16 *out;
    float *lse;
    float *slots;
    int32_t *counters;
    float scale_log2; /* scale * log2(e) */
    int32_t group;
    int32_t num_q_heads;
    int32_t rows; /* of the query buffer, for one variant */
};

#endif
