/*
 * decode_internal: what the warps of the decode kernel tell each other, and where it
 * stands in shared memory.
 */
#ifndef KERNELS_CUDA_DECODE_INTERNAL_CUH
#define KERNELS_CUDA_DECODE_INTERNAL_CUH

#include "kernels/cuda/cuda_internal.h"
#include "kernels/cuda/ptx.cuh"

#include <cuda_bf16.h>

#define WARP_KEYS   16
#define TEAM_WARPS  4 /* one page */
#define TEAMS       2 /* pages come faster than one team can take them */
#define CONSUMERS   (TEAMS * TEAM_WARPS * 32)
#define THREADS     (CONSUMERS + 32)
#define ITEM_SLOTS  3
#define PASS_ROWS   8 /* of a tile, merged at a time */
#define SMEM_MAX    (227 * 1024)
#define STAGES_MAX  24
#define EARLY_BYTES (64 * 1024) /* asked into L2 before the kernel before has ended */
#define LN_2        0.69314718055994530942f
#define LOG2_E      1.44269504088896340736f
#define DEVICE_CALL static __device__ __forceinline__

struct decode_params {
    const struct plan_item *items;
    const struct kernels_page_ref *refs;
    const int32_t *explicit_positions; /* [][64] */
    const uint8_t *pages;
    const float *scales;    /* [pages][2] */
    const __nv_bfloat16 *q; /* [variant][rows][num_q_heads][head_dim] */
    const int32_t *positions;
    __nv_bfloat16 *out;
    float *lse;
    float *slots;
    int32_t *counters;
    uint32_t rows;
    uint32_t num_q_heads;
    uint32_t group;
    float scale_log2; /* scale * log2(e) */
};

/* What consumers must know of the page in a stage. */
struct stage_info {
    uint64_t live;
    int32_t position;
    int32_t positions;
    int32_t variant;
    int32_t unused;
    float scale_k; /* both only of e4m3 */
    float scale_v;
};

/* What consumers must know of an item: it comes ahead of its pages, so that they need not wait for
 * memory between items. Then [16 rows][head_dim + 8] of queries of `variant`, bf16. */
struct item_slot {
    struct plan_item item;
    int32_t positions[TILE_ROWS_DECODE];
    int32_t variant; /* of the first page */
    int32_t pad[3];
};

template <int HEAD_DIM, bool E4M3> struct decode_shape {
    static constexpr int ROW_BYTES = HEAD_DIM * (E4M3 ? 1 : 2) < 128 ? 64 : 128;
    static constexpr int HALF_BYTES = 128 * ROW_BYTES;
    static constexpr int PAGE_BYTES = 2 * RK_PAGE_TOKENS * HEAD_DIM * (E4M3 ? 1 : 2);
    /* Padded, so that fragments go to and from the scratch without bank conflicts. */
    static constexpr int SCRATCH_ROW = HEAD_DIM + (E4M3 ? 16 : 8);
    static constexpr int SCRATCH_O = PASS_ROWS * SCRATCH_ROW; /* floats of a warp */
    static constexpr int SCRATCH_BYTES =
        TEAM_WARPS * (SCRATCH_O + 2 * PASS_ROWS) * (int)sizeof(float);
    /* The padding again keeps fragments off each other's banks. */
    static constexpr int QUERY_ROW = 2 * HEAD_DIM + 16;
    static constexpr int SLOT_BYTES = (int)sizeof(struct item_slot) + TILE_ROWS_DECODE * QUERY_ROW;
    static constexpr int ITEMS_BYTES = ITEM_SLOTS * (SLOT_BYTES + 16) + 16; /* and the flag */
    static constexpr int STAGE_BYTES = PAGE_BYTES + (int)sizeof(struct stage_info) + 16;
    static constexpr int STAGES_FIT = (SMEM_MAX - SCRATCH_BYTES - ITEMS_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = STAGES_FIT < STAGES_MAX ? STAGES_FIT : STAGES_MAX;
    static constexpr int EARLY_PAGES = EARLY_BYTES / PAGE_BYTES;

    /* Offsets in shared memory. */
    static constexpr int SCRATCH = STAGES * PAGE_BYTES;
    static constexpr int SCRATCH_M = SCRATCH + TEAM_WARPS * SCRATCH_O * (int)sizeof(float);
    static constexpr int ITEMS = SCRATCH + SCRATCH_BYTES;
    static constexpr int INFO = ITEMS + ITEM_SLOTS * SLOT_BYTES;
    static constexpr int FULL = INFO + STAGES * (int)sizeof(struct stage_info);
    static constexpr int EMPTY = FULL + STAGES * 8;
    static constexpr int ITEM_FULL = EMPTY + STAGES * 8;
    static constexpr int ITEM_EMPTY = ITEM_FULL + ITEM_SLOTS * 8;
    static constexpr int FLAG = ITEM_EMPTY + ITEM_SLOTS * 8;
    static constexpr int BYTES = FLAG + 16;
    static_assert(BYTES <= SMEM_MAX && STAGES >= TEAMS && SLOT_BYTES % 16 == 0, "shape");
};

DEVICE_CALL struct plan_item item_load(const struct plan_item *item)
{
    union {
        struct plan_item item;
        int4 words[sizeof(struct plan_item) / sizeof(int4)];
    } u;

#pragma unroll
    for (int i = 0; i < (int)(sizeof(struct plan_item) / sizeof(int4)); i++) {
        u.words[i] = __ldg((const int4 *)item + i);
    }
    return u.item;
}

/* Index in refs of a page of an item. */
DEVICE_CALL int32_t item_ref(const struct plan_item *item, int32_t page)
{
    int32_t ref = item->first[PLAN_RANGES - 1];
    bool found = false;

#pragma unroll
    for (int i = 0; i < PLAN_RANGES; i++) {
        if (!found && page < item->count[i]) {
            ref = item->first[i] + page;
            found = true;
        }
        page -= item->count[i];
    }
    return ref;
}

#endif
