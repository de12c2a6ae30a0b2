/*
 * decode: attention of up to 16 (row, query head) pairs over a list of pages.
 *
 * Bound by memory: one persistent block per multiprocessor keeps a ring of
 * pages in flight. A producer warp copies whole pages by TMA, each of 4
 * consumer warps ("a team") takes 16 keys of every page with its own running
 * softmax; two teams take turns at pages. Warps merge through shared memory,
 * parts of a split list through the workspace, in the same launch.
 *
 * A page in shared memory: [half][128 rows][128 bytes], 64 rows of K, then 64
 * of V, 16-byte chunks swizzled by row (64-byte rows for 64 values of e4m3).
 *
 * Method: Flash-Decoding; split in the manner of Stream-K (arXiv 2301.03598).
 */
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

/* ---- producer ---- */

/* Queues the copies of an item, its positions and its queries to a slot. The whole warp. */
template <class SHAPE, int HEAD_DIM>
DEVICE_CALL void item_send(const struct decode_params *p, uint8_t *slot_memory, uint32_t full,
                           const struct plan_item &item, int32_t index, int32_t variant,
                           uint32_t lane)
{
    constexpr uint32_t CHUNKS = HEAD_DIM / 8; /* of 16 bytes, in a row of queries */
    struct item_slot *slot = (struct item_slot *)slot_memory;
    uint32_t queries = smem_address(slot + 1);

    if (lane < sizeof(struct plan_item) / 16) {
        copy_async_16(smem_address(&slot->item) + 16 * lane,
                      (const uint8_t *)(p->items + index) + 16 * lane);
    }
    if (lane < (uint32_t)item.tokens) {
        copy_async_4(smem_address(&slot->positions[lane]), p->positions + item.row + lane);
    }
    for (uint32_t i = lane; i < item.tokens * p->group * CHUNKS; i += 32) {
        uint32_t row = i / CHUNKS, chunk = i % CHUNKS;
        size_t query = ((size_t)variant * p->rows + item.row + row / p->group) * p->num_q_heads +
                       item.kv_head * p->group + row % p->group;

        copy_async_16(queries + row * SHAPE::QUERY_ROW + 16 * chunk,
                      p->q + query * HEAD_DIM + 8 * chunk);
    }
    barrier_arrive_copies(full);
    if (lane == 0) {
        slot->variant = variant;
        barrier_arrive(full);
    }
}

/* A page ref as a lane holds it. */
struct lane_ref {
    int2 page_variant;
    int2 where; /* position, positions */
    uint2 live;
};

/* Queues the copy of a page to a free stage. One lane. */
template <class SHAPE, bool E4M3>
DEVICE_CALL void page_send(const struct decode_params *p, const CUtensorMap *map, uint8_t *smem,
                           uint32_t stage, const struct lane_ref &ref)
{
    struct stage_info *info = (struct stage_info *)(smem + SHAPE::INFO) + stage;
    uint32_t base = smem_address(smem), full = base + SHAPE::FULL + stage * 8;

    info->live = (uint64_t)ref.live.y << 32 | ref.live.x;
    info->position = ref.where.x;
    info->positions = ref.where.y;
    info->variant = ref.page_variant.y;
    barrier_arrive_expect(full, SHAPE::PAGE_BYTES);
    tma_load_4d_once(base + stage * SHAPE::PAGE_BYTES, map, full, 0, 0, 0, ref.page_variant.x);
    if (E4M3) {
        copy_async_8(smem_address(&info->scale_k), p->scales + 2 * (size_t)ref.page_variant.x);
        barrier_arrive_copies(full);
    }
}

/* The same once the stage is free, by the lane that has the page; the stages move on. */
template <class SHAPE, bool E4M3>
DEVICE_CALL void page_send_in_turn(const struct decode_params *p, const CUtensorMap *map,
                                   uint8_t *smem, uint32_t *stage, uint32_t *parity,
                                   const struct lane_ref &ref, bool mine)
{
    if (mine) {
        barrier_wait(smem_address(smem) + SHAPE::EMPTY + *stage * 8, *parity);
        page_send<SHAPE, E4M3>(p, map, smem, *stage, ref);
    }
    __syncwarp();
    if (++*stage == SHAPE::STAGES) {
        *stage = 0;
        *parity ^= 1;
    }
}

template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void produce(const struct decode_params *p, const CUtensorMap *map, uint8_t *smem,
                         struct plan_item item, uint32_t lane)
{
    uint32_t base = smem_address(smem);
    uint32_t stage = 0, parity = 1; /* an unused stage counts as released */
    uint32_t slot = 0, slot_parity = 1;
    int32_t index = blockIdx.x;
    bool waited = false;

    for (;;) {
        struct plan_item next = item;

        if (item.next >= 0) {
            next = item_load(p->items + item.next);
        }
        for (int32_t first = 0; first < max(item.pages, 1); first += 32) {
            int32_t pages = min(item.pages - first, 32);
            struct lane_ref ref = {};

            /* Lane i has page i. Plans are not written by the kernel before: no need to wait. */
            if ((int32_t)lane < pages) {
                const int2 *from = (const int2 *)(p->refs + item_ref(&item, first + lane));

                ref.page_variant = __ldg(from);
                ref.where = __ldg(from + 1);
                ref.live = __ldg((const uint2 *)(from + 2));
            }
            int32_t i = 0;

            if (!waited) {
                /* The first pages come to L2 while the kernel before ends; that may still write
                 * pages, but only what is loaded after the wait is used. More would take from the
                 * blocks that are behind. */
                i = min(pages, SHAPE::STAGES);
                if ((int32_t)lane < min(i, SHAPE::EARLY_PAGES)) {
                    l2_prefetch_once(p->pages + (size_t)ref.page_variant.x * SHAPE::PAGE_BYTES,
                                     SHAPE::PAGE_BYTES);
                }
                wait_previous_kernel();
                waited = true;
                if ((int32_t)lane < i) { /* All stages are free. */
                    page_send<SHAPE, E4M3>(p, map, smem, lane, ref);
                }
                __syncwarp();
                stage = i % SHAPE::STAGES;
                parity ^= i == SHAPE::STAGES;
            } else if (pages > 0) {
                page_send_in_turn<SHAPE, E4M3>(p, map, smem, &stage, &parity, ref, lane == 0);
                i = 1;
            }
            if (first == 0) { /* Behind the first page, which takes longer. */
                barrier_wait(base + SHAPE::ITEM_EMPTY + slot * 8, slot_parity);
                item_send<SHAPE, HEAD_DIM>(p, smem + SHAPE::ITEMS + slot * SHAPE::SLOT_BYTES,
                                           base + SHAPE::ITEM_FULL + slot * 8, item, index,
                                           __shfl_sync(~0u, ref.page_variant.y, 0), lane);
                if (++slot == ITEM_SLOTS) {
                    slot = 0;
                    slot_parity ^= 1;
                }
            }
#pragma unroll 1
            for (; i < pages; i++) {
                page_send_in_turn<SHAPE, E4M3>(p, map, smem, &stage, &parity, ref,
                                               (int32_t)lane == i);
            }
        }
        if (item.next < 0) {
            return;
        }
        index = item.next;
        item = next;
    }
}

/* ---- consumers ---- */

/* Running softmax of a warp, and its queries. Lane 4 * g + t has rows g and g + 8. */
template <int HEAD_DIM> struct warp_state {
    uint32_t q[HEAD_DIM / 16][4];
    float o[HEAD_DIM / 8][4]; /* in units of `unit` */
    float m[2];               /* of scores * scale * log2(e) */
    float l[2];               /* of this lane's keys */
    float unit;               /* scale of V, only e4m3 */
};

/* The rows of an item as one lane sees them. */
struct lane_rows {
    int32_t t[2];  /* position, -1 for a row that is not there: sees nothing */
    int32_t t_min; /* of all rows */
    int32_t t_max;
    int32_t window;
    int32_t sink;
};

/* q: rows g and g + 8 of the tile. What a row that is not there holds does not matter: nothing of
 * it is stored. */
template <int HEAD_DIM, bool E4M3>
DEVICE_CALL void queries_load(struct warp_state<HEAD_DIM> &state, const __nv_bfloat16 *const q[2],
                              uint32_t lane)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const __nv_bfloat16 *row = q[h] + (lane & 3) * (E4M3 ? 4 : 2);

#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            if (E4M3) {
                /* Four bytes of K in a row serve as both pairs of a lane; so do queries here. */
                uint2 pairs = *(const uint2 *)(row + 16 * k);

                state.q[k][h] = f16_from_bf16(pairs.x);
                state.q[k][2 + h] = f16_from_bf16(pairs.y);
            } else {
                state.q[k][h] = *(const uint32_t *)(row + 16 * k);
                state.q[k][2 + h] = *(const uint32_t *)(row + 16 * k + 8);
            }
        }
    }
}

/* Of the item's first variant, from its slot. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void queries_begin(struct warp_state<HEAD_DIM> &state, const struct item_slot *slot,
                               uint32_t lane)
{
    const uint8_t *first = (const uint8_t *)(slot + 1) + lane / 4 * SHAPE::QUERY_ROW;
    const __nv_bfloat16 *const q[2] = {(const __nv_bfloat16 *)first,
                                       (const __nv_bfloat16 *)(first + 8 * SHAPE::QUERY_ROW)};

    queries_load<HEAD_DIM, E4M3>(state, q, lane);
}

/* Of another variant, which few items have. */
template <int HEAD_DIM, bool E4M3>
DEVICE_CALL void queries_change(struct warp_state<HEAD_DIM> &state, const struct decode_params *p,
                                const struct plan_item &item, int32_t variant, uint32_t lane)
{
    const __nv_bfloat16 *q[2];

#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t i = lane / 4 + 8 * h, token = min(i / p->group, (uint32_t)item.tokens - 1);
        size_t row = (size_t)variant * p->rows + item.row + token;

        q[h] = p->q + (row * p->num_q_heads + item.kv_head * p->group + i % p->group) * HEAD_DIM;
    }
    queries_load<HEAD_DIM, E4M3>(state, q, lane);
}

/* Scores of 16 keys, s[n] keys 8 * n ..., not scaled. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void scores_compute(const struct warp_state<HEAD_DIM> &state, uint32_t keys,
                                float s[2][4])
{
    float odd[2][4] = {}; /* two chains of products, for latency */

#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[n][i] = 0;
        }
    }
    if (E4M3) {
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k += 2) {
            uint32_t b[4];

            ldmatrix_x4(b, keys ^ (k * 16));
#pragma unroll
            for (int n = 0; n < 2; n++) {
                multiply_f16(s[n], state.q[k], f16_from_e4m3(b[n]), f16_from_e4m3(b[n] >> 16));
                multiply_f16(odd[n], state.q[k + 1], f16_from_e4m3(b[2 + n]),
                             f16_from_e4m3(b[2 + n] >> 16));
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            uint32_t b[4];

            ldmatrix_x4(b, (keys ^ (k % 4 * 32)) + k / 4 * SHAPE::HALF_BYTES);
            multiply_bf16(k % 2 ? odd[0] : s[0], state.q[k], b[0], b[1]);
            multiply_bf16(k % 2 ? odd[1] : s[1], state.q[k], b[2], b[3]);
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[n][i] += odd[n][i];
        }
    }
}

/* o += p * V; bits of V that `keep` lacks count as zero. */
template <class SHAPE, int HEAD_DIM, bool E4M3, bool MASKED>
DEVICE_CALL void values_add(struct warp_state<HEAD_DIM> &state, uint32_t values,
                            const float s[2][4], const uint32_t keep[2])
{
    uint32_t a[4];

#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *pair = &s[i / 2][i % 2 * 2];

        a[i] = E4M3 ? pack_f16(pair[0], pair[1]) : pack_bf16(pair[0], pair[1]);
    }
    /* One load has 32 columns of e4m3, or 16 of bf16. */
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 16; n += E4M3 ? 2 : 1) {
        uint32_t b[4];

        if (E4M3) {
            ldmatrix_x4_trans(b, values ^ (n * 16));
        } else {
            ldmatrix_x4_trans(b, (values ^ (n % 4 * 32)) + n / 4 * SHAPE::HALF_BYTES);
        }
        if (MASKED) {
            b[0] &= keep[0];
            b[1] &= keep[1];
            b[2] &= keep[0];
            b[3] &= keep[1];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if constexpr (E4M3) {
                /* {d, d + 1} of a key, then of the next: d of both keys, then d + 1 of both. */
                uint32_t b0 = __byte_perm(b[2 * i], 0, 0x3120);
                uint32_t b1 = __byte_perm(b[2 * i + 1], 0, 0x3120);

                multiply_f16(state.o[2 * (n + i)], a, f16_from_e4m3(b0), f16_from_e4m3(b1));
                multiply_f16(state.o[2 * (n + i) + 1], a, f16_from_e4m3(b0 >> 16),
                             f16_from_e4m3(b1 >> 16));
            } else {
                multiply_bf16(state.o[2 * n + i], a, b[2 * i], b[2 * i + 1]);
            }
        }
    }
}

template <int HEAD_DIM>
DEVICE_CALL void output_scale(struct warp_state<HEAD_DIM> &state, float low, float high)
{
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        state.o[n][0] *= low;
        state.o[n][1] *= low;
        state.o[n][2] *= high;
        state.o[n][3] *= high;
    }
}

/* What is -inf stays so without a NaN: exp2(-inf - 0) = 0. */
DEVICE_CALL float exponent_base(float m)
{
    return m == -INFINITY ? 0.0f : m;
}

/* Turns scores into weights and moves m, l and o on to the new maximum. */
template <int HEAD_DIM>
DEVICE_CALL void softmax_step(struct warp_state<HEAD_DIM> &state, float s[2][4])
{
    float factor[2];
    bool moved = false;

#pragma unroll
    for (int h = 0; h < 2; h++) {
        float m = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
        float base;

        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        m = fmaxf(m, state.m[h]);
        moved |= m != state.m[h];
        base = exponent_base(m);
        factor[h] = exp2_approx(state.m[h] - base);
        state.m[h] = m;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            s[n][2 * h] = exp2_approx(s[n][2 * h] - base);
            s[n][2 * h + 1] = exp2_approx(s[n][2 * h + 1] - base);
        }
        state.l[h] = state.l[h] * factor[h] +
                     ((s[0][2 * h] + s[0][2 * h + 1]) + (s[1][2 * h] + s[1][2 * h + 1]));
    }
    if (__any_sync(~0u, moved)) {
        output_scale<HEAD_DIM>(state, factor[0], factor[1]);
    }
}

/* Positions of a lane's keys: 8 * n + 2 * t + i of the warp's 16, at c[n][i]. */
DEVICE_CALL void key_positions(const struct decode_params *p, const struct stage_info &info,
                               uint32_t key, uint32_t lane, int32_t c[2][2])
{
    uint32_t row = key + 2 * (lane & 3);

#pragma unroll
    for (int n = 0; n < 2; n++) {
        if (info.positions >= 0) {
            int2 pair =
                __ldg((const int2 *)(p->explicit_positions +
                                     (size_t)info.positions * RK_PAGE_TOKENS + row + 8 * n));

            c[n][0] = pair.x;
            c[n][1] = pair.y;
        } else {
            c[n][0] = info.position + (int32_t)row + 8 * n;
            c[n][1] = c[n][0] + 1;
        }
    }
}

/* 16 keys of one page, from row `key` on. keys, values: where this lane's matrix rows begin. */
template <class SHAPE, int HEAD_DIM, bool E4M3, bool MASKED>
DEVICE_CALL void keys_attend(struct warp_state<HEAD_DIM> &state, const struct decode_params *p,
                             const struct lane_rows &rows, const struct stage_info &info,
                             uint32_t keys, uint32_t values, uint32_t key, uint32_t lane)
{
    float scale = E4M3 ? p->scale_log2 * info.scale_k : p->scale_log2;
    int32_t c[2][2];
    uint32_t keep[2] = {~0u, ~0u};
    float s[2][4];

    if (MASKED) {
        key_positions(p, info, key, lane, c);
    }
    scores_compute<SHAPE, HEAD_DIM, E4M3>(state, keys, s);
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[n][i] *= scale;
        }
    }
    if (MASKED) {
        uint32_t live = (uint32_t)(info.live >> key) >> (2 * (lane & 3));

#pragma unroll
        for (int n = 0; n < 2; n++) {
            keep[n] = 0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                bool alive = live >> (8 * n + i) & 1;

                if (alive && c[n][i] <= rows.t_max) {
                    keep[n] |= 0xffffu << (16 * i);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    bool visible = alive && c[n][i] <= rows.t[h] &&
                                   (rows.window == 0 || c[n][i] > rows.t[h] - rows.window ||
                                    c[n][i] < rows.sink);

                    s[n][2 * h + i] = visible ? s[n][2 * h + i] : -INFINITY;
                }
            }
        }
    }
    softmax_step<HEAD_DIM>(state, s);
    if (E4M3) {
        /* Weights times the scale of V must fit f16: relative to `unit`, which moves rarely. */
        float ratio = __fdividef(info.scale_v, state.unit);

        if (info.scale_v > 0 && !(ratio > 1.0f / 16 && ratio < 16)) {
            float factor = state.unit / info.scale_v;

            output_scale<HEAD_DIM>(state, factor, factor);
            state.unit = info.scale_v;
            ratio = 1;
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] *= ratio;
            }
        }
    }
    values_add<SHAPE, HEAD_DIM, E4M3, MASKED>(state, values, s, keep);
}

enum page_view { PAGE_UNSEEN, PAGE_MASKED, PAGE_WHOLE };

/* What the rows see of the 16 keys from `key` on; the same for all lanes. */
DEVICE_CALL enum page_view keys_view(const struct lane_rows &rows, const struct stage_info &info,
                                     uint32_t key)
{
    uint32_t live = (uint32_t)(info.live >> key) & 0xffff;
    int32_t first = info.position + (int32_t)key;
    int32_t last = first + WARP_KEYS - 1;

    if (live == 0) {
        return PAGE_UNSEEN;
    }
    if (info.positions >= 0) {
        return PAGE_MASKED;
    }
    if (first > rows.t_max ||
        (rows.window != 0 && last <= rows.t_min - rows.window && first >= rows.sink)) {
        return PAGE_UNSEEN;
    }
    if (live == 0xffff && last <= rows.t_min &&
        (rows.window == 0 || first > rows.t_max - rows.window || last < rows.sink)) {
        return PAGE_WHOLE;
    }
    return PAGE_MASKED;
}

/* ---- merging ---- */

/* Where a merged row goes. */
struct merge_target {
    float *slot;        /* or, if NULL, out and lse */
    __nv_bfloat16 *out; /* of row 0 of the tile */
    float *lse;         /* of row 0 of the tile, or NULL */
    uint32_t group;
    uint32_t num_q_heads;
};

template <int HEAD_DIM>
DEVICE_CALL void row_store(const struct merge_target &to, uint32_t row, uint32_t column, float m,
                           float l, float4 o)
{
    if (to.slot != NULL) {
        __stcg((float4 *)(to.slot + 2 * TILE_ROWS_DECODE + row * HEAD_DIM + column), o);
        if (column == 0) {
            __stcg(to.slot + row, m);
            __stcg(to.slot + TILE_ROWS_DECODE + row, l);
        }
    } else {
        uint32_t head = row / to.group * to.num_q_heads + row % to.group;
        float inverse = l == 0 ? 0.0f : 1.0f / l;
        uint2 packed = make_uint2(pack_bf16(o.x * inverse, o.y * inverse),
                                  pack_bf16(o.z * inverse, o.w * inverse));

        *(uint2 *)(to.out + (size_t)head * HEAD_DIM + column) = packed;
        if (column == 0 && to.lse != NULL) {
            to.lse[head] = l == 0 ? -INFINITY : (m + log2f(l)) * LN_2;
        }
    }
}

DEVICE_CALL void add_scaled(float4 &o, float4 part, float factor)
{
    o.x += part.x * factor;
    o.y += part.y * factor;
    o.z += part.z * factor;
    o.w += part.w * factor;
}

/* Parts [0, count) of the workspace from `parts` on. Many loads in flight: this is all latency. */
template <class SHAPE, int HEAD_DIM>
DEVICE_CALL void parts_merge(const float *parts, int32_t count, uint32_t num_rows,
                             const struct merge_target &to, uint32_t thread)
{
    constexpr size_t SLOT = TILE_ROWS_DECODE * (HEAD_DIM + 2);

    for (uint32_t i = thread; i < num_rows * (HEAD_DIM / 4); i += CONSUMERS) {
        uint32_t row = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
        float m_all = -INFINITY, l_all = 0;
        float4 o_all = make_float4(0, 0, 0, 0);

        for (int32_t first = 0; first < count; first += MERGE_FAN_IN) {
            const float *part = parts + (size_t)first * SLOT;
            float m[MERGE_FAN_IN], l[MERGE_FAN_IN];
            float4 o[MERGE_FAN_IN];
            float m_new = m_all, factor;

#pragma unroll
            for (int s = 0; s < MERGE_FAN_IN; s++) {
                m[s] = -INFINITY;
                l[s] = 0;
                o[s] = make_float4(0, 0, 0, 0);
                if (first + s < count) {
                    const float *from = part + s * SLOT;

                    m[s] = __ldcg(from + row);
                    l[s] = __ldcg(from + TILE_ROWS_DECODE + row);
                    o[s] = __ldcg(
                        (const float4 *)(from + 2 * TILE_ROWS_DECODE + row * HEAD_DIM + column));
                }
            }
#pragma unroll
            for (int s = 0; s < MERGE_FAN_IN; s++) {
                m_new = fmaxf(m_new, m[s]);
            }
            factor = exp2_approx(m_all - exponent_base(m_new));
            m_all = m_new;
            l_all *= factor;
            o_all =
                make_float4(o_all.x * factor, o_all.y * factor, o_all.z * factor, o_all.w * factor);
#pragma unroll
            for (int s = 0; s < MERGE_FAN_IN; s++) {
                factor = exp2_approx(m[s] - exponent_base(m_new));
                l_all += l[s] * factor;
                add_scaled(o_all, o[s], factor);
            }
        }
        row_store<HEAD_DIM>(to, row, column, m_all, l_all, o_all);
    }
}

/* Rows 8 * h ... of a warp's state to its scratch. m and l of all warps follow their outputs. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void scratch_store(const struct warp_state<HEAD_DIM> &state, int h, float *scratch,
                               float *scratch_m, uint32_t lane)
{
    uint32_t g = lane / 4, t = lane % 4;
    float *row = scratch + g * SHAPE::SCRATCH_ROW;

#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        if (!E4M3) {
            *(float2 *)(row + 8 * n + 2 * t) =
                make_float2(state.o[n][2 * h], state.o[n][2 * h + 1]);
        } else if (n % 2 == 0) {
            /* Columns d and d + 1 stand in two blocks; see values_add(). */
            *(float4 *)(row + 8 * n + 4 * t) =
                make_float4(state.o[n][2 * h], state.o[n + 1][2 * h], state.o[n][2 * h + 1],
                            state.o[n + 1][2 * h + 1]);
        }
    }
    if (t == 0) {
        scratch_m[g] = state.m[h];
        scratch_m[PASS_ROWS + g] = state.l[h];
    }
}

/* Adds what scratch_store() of another warp left. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void scratch_add(struct warp_state<HEAD_DIM> &state, int h, const float *scratch,
                             const float *scratch_m, uint32_t lane)
{
    uint32_t g = lane / 4, t = lane % 4;
    const float *row = scratch + g * SHAPE::SCRATCH_ROW;
    float other = scratch_m[g];
    float m = fmaxf(state.m[h], other);
    float own = exp2_approx(state.m[h] - exponent_base(m));

    other = exp2_approx(other - exponent_base(m));
    state.m[h] = m;
    state.l[h] = state.l[h] * own + scratch_m[PASS_ROWS + g] * other;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        if (!E4M3) {
            float2 o = *(const float2 *)(row + 8 * n + 2 * t);

            state.o[n][2 * h] = state.o[n][2 * h] * own + o.x * other;
            state.o[n][2 * h + 1] = state.o[n][2 * h + 1] * own + o.y * other;
        } else if (n % 2 == 0) {
            float4 o = *(const float4 *)(row + 8 * n + 4 * t);

            state.o[n][2 * h] = state.o[n][2 * h] * own + o.x * other;
            state.o[n + 1][2 * h] = state.o[n + 1][2 * h] * own + o.y * other;
            state.o[n][2 * h + 1] = state.o[n][2 * h + 1] * own + o.z * other;
            state.o[n + 1][2 * h + 1] = state.o[n + 1][2 * h + 1] * own + o.w * other;
        }
    }
}

/* All warps' states to `to`. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void warps_merge(struct warp_state<HEAD_DIM> &state, uint8_t *smem, uint32_t num_rows,
                             const struct merge_target &to, uint32_t thread)
{
    uint32_t warp = thread / 32, lane = thread % 32;
    uint32_t member = warp % TEAM_WARPS, team = warp / TEAM_WARPS;
    float *all = (float *)(smem + SHAPE::SCRATCH), *all_m = (float *)(smem + SHAPE::SCRATCH_M);
    float *own = all + member * SHAPE::SCRATCH_O;
    float *own_m = all_m + member * 2 * PASS_ROWS;

#pragma unroll
    for (int h = 0; h < 2; h++) {
        state.l[h] += __shfl_xor_sync(~0u, state.l[h], 1);
        state.l[h] += __shfl_xor_sync(~0u, state.l[h], 2);
    }
    if (E4M3) {
        output_scale<HEAD_DIM>(state, state.unit, state.unit);
    }
#pragma unroll
    for (int h = 0; h < TILE_ROWS_DECODE / PASS_ROWS; h++) {
        uint32_t first = h * PASS_ROWS;

        if (first >= num_rows) {
            break;
        }
        named_sync(1, CONSUMERS); /* what was in the scratch has been read */
        /* Scratch of one team is enough: later teams hand on to the one before. */
#pragma unroll
        for (uint32_t from = TEAMS - 1; from > 0; from--) {
            if (team == from) {
                scratch_store<SHAPE, HEAD_DIM, E4M3>(state, h, own, own_m, lane);
            }
            named_sync(1, CONSUMERS);
            if (team == from - 1) {
                scratch_add<SHAPE, HEAD_DIM, E4M3>(state, h, own, own_m, lane);
                __syncwarp(); /* m and l of a row are read by four lanes and written by one */
            }
        }
        if (team == 0) {
            scratch_store<SHAPE, HEAD_DIM, E4M3>(state, h, own, own_m, lane);
        }
        named_sync(1, CONSUMERS);

        uint32_t rows = min(num_rows - first, PASS_ROWS);

        for (uint32_t i = thread; i < rows * (HEAD_DIM / 4); i += CONSUMERS) {
            uint32_t row = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
            float m = -INFINITY, l = 0;
            float4 o = make_float4(0, 0, 0, 0);

#pragma unroll
            for (int w = 0; w < TEAM_WARPS; w++) {
                m = fmaxf(m, all_m[w * 2 * PASS_ROWS + row]);
            }
#pragma unroll
            for (int w = 0; w < TEAM_WARPS; w++) {
                const float *from = all_m + w * 2 * PASS_ROWS + row;
                float factor = exp2_approx(from[0] - exponent_base(m));

                l += from[PASS_ROWS] * factor;
                add_scaled(o,
                           *(const float4 *)(all + w * SHAPE::SCRATCH_O + row * SHAPE::SCRATCH_ROW +
                                             column),
                           factor);
            }
            row_store<HEAD_DIM>(to, first + row, column, m, l, o);
        }
    }
}

/* Whether this block is the last of `count` to come here; then what the others wrote is visible. */
DEVICE_CALL bool block_last(int32_t *counter, int32_t count, int32_t *flag, uint32_t thread)
{
    named_sync(1, CONSUMERS);
    if (thread == 0) {
        bool last = add_acquire_release(counter, 1) == count - 1;

        if (last) {
            *counter = 0; /* for the next launch */
        }
        *flag = last;
    }
    named_sync(1, CONSUMERS);
    return *flag != 0;
}

template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void item_finish(struct warp_state<HEAD_DIM> &state, const struct decode_params *p,
                             const struct plan_item &item, uint8_t *smem, uint32_t thread)
{
    constexpr size_t SLOT = TILE_ROWS_DECODE * (HEAD_DIM + 2);
    size_t head = (size_t)item.row * p->num_q_heads + (size_t)item.kv_head * p->group;
    uint32_t num_rows = item.tokens * p->group;
    int32_t *flag = (int32_t *)(smem + SHAPE::FLAG);
    struct merge_target output = {NULL, p->out + head * HEAD_DIM,
                                  p->lse == NULL ? NULL : p->lse + head, p->group, p->num_q_heads};
    struct merge_target to = output;
    float *slots = p->slots + (size_t)item.slot * SLOT;
    int32_t *counters = p->counters + item.counter;
    int32_t count = item.num_splits;

    if (count > 1) {
        to.slot = slots + (size_t)item.split * SLOT;
    }
    warps_merge<SHAPE, HEAD_DIM, E4M3>(state, smem, num_rows, to, thread);
    if (count == 1) {
        return;
    }
    if (count > MERGE_FAN_IN) {
        int32_t group = item.split / MERGE_FAN_IN, first = group * MERGE_FAN_IN;
        int32_t parts = min(count - first, MERGE_FAN_IN);

        if (!block_last(counters + 1 + group, parts, flag, thread)) {
            return;
        }
        slots += (size_t)count * SLOT;
        to.slot = slots + (size_t)group * SLOT;
        parts_merge<SHAPE, HEAD_DIM>(p->slots + (size_t)(item.slot + first) * SLOT, parts, num_rows,
                                     to, thread);
        count = (count + MERGE_FAN_IN - 1) / MERGE_FAN_IN;
    }
    if (block_last(counters, count, flag, thread)) {
        parts_merge<SHAPE, HEAD_DIM>(slots, count, num_rows, output, thread);
    }
}

/* ---- the kernel ---- */

template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void consume(const struct decode_params *p, uint8_t *smem, uint32_t thread)
{
    uint32_t lane = thread % 32, g = lane / 4;
    uint32_t key = thread / 32 % TEAM_WARPS * WARP_KEYS, team = thread / 32 / TEAM_WARPS;
    uint32_t base = smem_address(smem);
    /* Rows of matrices for ldmatrix: lane 8 * j + r addresses row r of matrix j. Matrices are
     * ordered so that results are b0, b1 of two blocks; for K of bf16 blocks are keys. */
    uint32_t j = lane / 8, r = lane % 8;
    uint32_t swizzle = SHAPE::ROW_BYTES == 128 ? r : r / 2;
    uint32_t value_row = key + j % 2 * 8 + r, key_row = E4M3 ? value_row : key + j / 2 * 8 + r;
    uint32_t values =
        base + (RK_PAGE_TOKENS + value_row) * SHAPE::ROW_BYTES + ((j / 2 ^ swizzle) << 4);
    uint32_t keys = base + key_row * SHAPE::ROW_BYTES + (((E4M3 ? j / 2 : j % 2) ^ swizzle) << 4);
    uint32_t token[2] = {g / p->group, (g + 8) / p->group};
    uint32_t slot = 0, slot_parity = 0;
    uint32_t stage = team, parity = 0;
    uint32_t turn = 0; /* the team of the next page */
    struct warp_state<HEAD_DIM> state;

    for (;;) {
        const struct item_slot *in =
            (const struct item_slot *)(smem + SHAPE::ITEMS + slot * SHAPE::SLOT_BYTES);
        const struct plan_item &item = in->item;
        struct lane_rows rows;
        int32_t page = (int32_t)((team + TEAMS - turn) % TEAMS);
        int32_t variant, pages;

        barrier_wait(base + SHAPE::ITEM_FULL + slot * 8, slot_parity);
        variant = in->variant;
        pages = item.pages;
        rows.window = item.window;
        rows.sink = item.sink;
        rows.t_min = in->positions[0];
        rows.t_max = in->positions[item.tokens - 1];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            rows.t[h] = token[h] < (uint32_t)item.tokens ? in->positions[token[h]] : -1;
            state.m[h] = -INFINITY;
            state.l[h] = 0;
        }
        state.unit = 1;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                state.o[n][i] = 0;
            }
        }
        queries_begin<SHAPE, HEAD_DIM, E4M3>(state, in, lane);

        for (; page < pages; page += TEAMS) {
            uint32_t offset = stage * SHAPE::PAGE_BYTES;
            struct stage_info info;
            enum page_view view;

            barrier_wait(base + SHAPE::FULL + stage * 8, parity);
            info = ((const struct stage_info *)(smem + SHAPE::INFO))[stage];
            view = keys_view(rows, info, key);
            if (view != PAGE_UNSEEN && info.variant != variant) {
                variant = info.variant;
                queries_change<HEAD_DIM, E4M3>(state, p, item, variant, lane);
            }
            if (view == PAGE_WHOLE) {
                keys_attend<SHAPE, HEAD_DIM, E4M3, false>(state, p, rows, info, keys + offset,
                                                          values + offset, key, lane);
            } else if (view == PAGE_MASKED) {
                keys_attend<SHAPE, HEAD_DIM, E4M3, true>(state, p, rows, info, keys + offset,
                                                         values + offset, key, lane);
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive(base + SHAPE::EMPTY + stage * 8);
            }
            stage += TEAMS;
            if (stage >= SHAPE::STAGES) {
                stage -= SHAPE::STAGES;
                parity ^= 1;
            }
        }
        turn = (turn + (uint32_t)pages) % TEAMS;
        item_finish<SHAPE, HEAD_DIM, E4M3>(state, p, item, smem, thread);
        if (item.next < 0) {
            return;
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(base + SHAPE::ITEM_EMPTY + slot * 8);
        }
        if (++slot == ITEM_SLOTS) {
            slot = 0;
            slot_parity ^= 1;
        }
    }
}

template <int HEAD_DIM, bool E4M3>
static __global__ __launch_bounds__(THREADS, 1) void decode_kernel(
    const __grid_constant__ struct decode_params params, const __grid_constant__ CUtensorMap map)
{
    typedef struct decode_shape<HEAD_DIM, E4M3> SHAPE;
    extern __shared__ __align__(1024) uint8_t smem[];
    uint32_t base = smem_address(smem);
    struct plan_item item = item_load(params.items + blockIdx.x);

    if (item.tokens == 0) {
        return; /* Nothing for this block. */
    }
    if (threadIdx.x == CONSUMERS) {
        tma_prefetch_map(&map);
        for (int i = 0; i < SHAPE::STAGES; i++) {
            barrier_init(base + SHAPE::FULL + i * 8, E4M3 ? 2 : 1);
            barrier_init(base + SHAPE::EMPTY + i * 8, TEAM_WARPS);
        }
        for (int i = 0; i < ITEM_SLOTS; i++) {
            barrier_init(base + SHAPE::ITEM_FULL + i * 8, 32 + 1);
            barrier_init(base + SHAPE::ITEM_EMPTY + i * 8, CONSUMERS / 32);
        }
        barrier_init_fence();
        /* The next kernel has all its own waiting to do: it may come at any time. */
        allow_next_kernel();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        produce<SHAPE, HEAD_DIM, E4M3>(&params, &map, smem, item, threadIdx.x % 32);
    } else {
        consume<SHAPE, HEAD_DIM, E4M3>(&params, smem, threadIdx.x);
    }
}

template <int HEAD_DIM, bool E4M3>
static enum rk_status decode_launch(uint32_t processors, const struct decode_params *params,
                                    const CUtensorMap *page_map, cudaStream_t stream,
                                    struct rk_error *error)
{
    typedef struct decode_shape<HEAD_DIM, E4M3> SHAPE;
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};
    cudaError_t result;

    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(processors);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = SHAPE::BYTES;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    result = cudaFuncSetAttribute(decode_kernel<HEAD_DIM, E4M3>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, SHAPE::BYTES);
    if (result == cudaSuccess) {
        result = cudaLaunchKernelEx(&config, decode_kernel<HEAD_DIM, E4M3>, *params, *page_map);
    }
    return cuda_check(result, "launching the decode kernel", error);
}

enum rk_status cuda_decode(struct kernels_device *device,
                           const struct kernels_paged_attention *call, const CUtensorMap *page_map,
                           kernels_stream stream, struct rk_error *error)
{
    const struct kernels_plan *plan = call->plan;
    const uint8_t *block = plan->device_block;
    bool e4m3 = call->pool->options.format == KERNELS_PAGE_E4M3;
    cudaStream_t on = (cudaStream_t)stream;
    uint32_t processors = device->processors;
    struct decode_params params;

    params.items = (const struct plan_item *)(block + plan->sections.items);
    params.refs = (const struct kernels_page_ref *)(block + plan->sections.refs);
    params.explicit_positions = (const int32_t *)(block + plan->sections.explicit_positions);
    params.pages = (const uint8_t *)call->pool->pages;
    params.scales = call->pool->scales;
    params.q = (const __nv_bfloat16 *)call->q;
    params.positions = call->positions;
    params.out = (__nv_bfloat16 *)call->out;
    params.lse = call->lse;
    params.slots = call->workspace->slots;
    params.counters = call->workspace->counters;
    params.rows = plan->rows;
    params.num_q_heads = plan->options.num_kv_heads * plan->options.group;
    params.group = plan->options.group;
    params.scale_log2 = call->scale * LOG2_E;

    if (plan->options.head_dim == 128) {
        return e4m3 ? decode_launch<128, true>(processors, &params, page_map, on, error)
                    : decode_launch<128, false>(processors, &params, page_map, on, error);
    }
    return e4m3 ? decode_launch<64, true>(processors, &params, page_map, on, error)
                : decode_launch<64, false>(processors, &params, page_map, on, error);
}
