/*
 * prefill: attention of many query rows over page lists, by wgmma and TMA.
 *
 * One block per multiprocessor walks its chain of items. Warpgroup 0 feeds:
 * warp 0 loads queries and keys ahead of their use, warp 3 values, warps 1 and
 * 2 zero rows of V that no query may see, so that no NaN in them meets a weight
 * of 0.
 * Warpgroups 1 and 2 compute 64 rows each (FlashAttention-3, arXiv 2407.08608:
 * scores of one tile overlap the products of the tile before, and the two
 * warpgroups take turns on the tensor cores).
 *
 * A tile is two pages, 128 keys. In shared memory a matrix of D columns is
 * D / 64 halves of [rows][128 bytes] in the 128-byte swizzle.
 */
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

static __device__ __forceinline__ int32_t ref_index(const struct plan_item &item, int32_t page)
{
    int32_t left = page;
#pragma unroll
    for (int i = 0; i < PLAN_RANGES; i++) {
        if (left < item.count[i]) {
            return item.first[i] + left;
        }
        left -= item.count[i];
    }
    return -1;
}

static __device__ __forceinline__ struct kernels_page_ref ref_at(const struct feed_buffer &buffer,
                                                                 int32_t page)
{
    return buffer.refs[page / FEED_REFS & 1][page % FEED_REFS];
}

/*
 * What the feeding warp reads of an item comes to shared memory ahead of its use: the next window
 * of refs while this one is fed, and all that begins the next item while this one is, in two steps,
 * for the addresses of the second come from the first.
 */
static __device__ __forceinline__ void item_ask(struct feed_buffer *to,
                                                const struct prefill_arguments &a, int32_t index,
                                                int lane)
{
    if (lane < (int)(sizeof(struct plan_item) / 16)) {
        copy_async_16(smem_address(&to->item) + 16 * lane,
                      (const uint8_t *)&a.items[index] + 16 * lane);
    }
}

/* Refs [32 window, 32 window + 32) of the item. */
static __device__ __forceinline__ void refs_ask(struct feed_buffer *to,
                                                const struct prefill_arguments &a, int32_t window,
                                                int lane)
{
    const int32_t page = FEED_REFS * window + lane;
    if (page < to->item.pages) {
        const struct kernels_page_ref *from = &a.refs[ref_index(to->item, page)];
        const uint32_t at = smem_address(&to->refs[window & 1][lane]);
#pragma unroll
        for (int i = 0; i < (int)sizeof(*from); i += 8) {
            copy_async_8(at + i, (const uint8_t *)from + i);
        }
    }
}

static __device__ __forceinline__ void asked_wait(void)
{
    copy_async_wait_all();
    __syncwarp();
}

static __device__ __forceinline__ void rows_ask(struct feed_buffer *to,
                                                const struct prefill_arguments &a, int lane)
{
    asked_wait();
#pragma unroll
    for (int i = 0; i < TILE_ROWS_PREFILL / 32; i++) {
        const int32_t token = lane + 32 * i;
        if (token < to->item.tokens) {
            copy_async_4(smem_address(&to->positions[token]), &a.positions[to->item.row + token]);
        }
    }
    refs_ask(to, a, 0, lane);
}

struct query_span {
    int32_t first; /* lowest and highest position of the tile's rows */
    int32_t last;
};

/* Fills one page's part of the meta; true if some row may not see some key. The whole warp. */
static __device__ __forceinline__ bool describe_page(struct tile_meta *meta, int p,
                                                     const struct prefill_arguments &a,
                                                     const struct plan_item &item,
                                                     const struct kernels_page_ref &ref,
                                                     const struct query_span &span, int lane)
{
    uint64_t v_live;
    int32_t sink_rows = item.sink - ref.position;
    int32_t low = ref.position; /* positions of its first and last row */
    int32_t high = ref.position + RK_PAGE_TOKENS - 1;
    if (ref.positions >= 0) {
        const int32_t *positions = a.explicit_positions[ref.positions];
        const int32_t first = positions[lane];
        const int32_t second = positions[lane + 32];
        meta->positions[p][lane] = first;
        meta->positions[p][lane + 32] = second;
        v_live = ref.live & ((uint64_t)__ballot_sync(~0u, second <= span.last) << 32 |
                             __ballot_sync(~0u, first <= span.last));
        low = __shfl_sync(~0u, first, 0);
        high = __shfl_sync(~0u, second, 31);
        sink_rows = __popc(__ballot_sync(~0u, first < item.sink)) +
                    __popc(__ballot_sync(~0u, second < item.sink));
    } else {
        v_live = ref.live & low_bits(span.last + 1 - ref.position);
    }
    const bool inside = high <= span.first &&
                        (item.window == 0 || low > span.last - item.window || high < item.sink);
    if (lane == 0) {
        meta->live[p] = ref.live;
        meta->v_live[p] = v_live;
        meta->position[p] = ref.position;
        meta->sink_rows[p] = sink_rows;
        meta->kind[p] = inside ? PAGE_LIVE : ref.positions >= 0 ? PAGE_EXPLICIT : PAGE_CONTIGUOUS;
    }
    return !inside || ref.live != ~(uint64_t)0;
}

/* K or V of a tile: row 0 or RK_PAGE_TOKENS of its pages. One lane. */
template <int D>
static __device__ __forceinline__ void load_pages(uint8_t *to, const CUtensorMap *page_map,
                                                  uint32_t full, int32_t row, int32_t count,
                                                  const int32_t (&pages)[2])
{
#pragma unroll
    for (int p = 0; p < 2; p++) {
        if (p < count) {
#pragma unroll
            for (int h = 0; h < prefill_shared<D>::HALVES; h++) {
                tma_load_4d(smem_address(to) + h * 16384 + p * 8192, page_map, full, 0, row, h,
                            pages[p]);
            }
        }
    }
}

template <int D> static __device__ __forceinline__ uint32_t matrix_bytes(int32_t pages)
{
    return pages * RK_PAGE_TOKENS * D * 2;
}

/* Queries, keys and the meta of tiles. */
template <int D>
static __device__ void feed(struct prefill_shared<D> *shared, const struct prefill_arguments &a,
                            const CUtensorMap *q_map, const CUtensorMap *page_map, int lane)
{
    constexpr int HALVES = prefill_shared<D>::HALVES;
    constexpr int STAGES = prefill_shared<D>::STAGES;
    uint32_t tile = 0;  /* counts tiles */
    uint32_t query = 0; /* counts stages of queries */
    const int32_t per_half = (TILE_ROWS_PREFILL / 2) / a.group;

    int32_t index = blockIdx.x;
    int steps = 0; /* of the item to come: asked for 0 nothing, 1 the item, 2 all */
    for (uint32_t number = 0; index >= 0; number++) {
        struct feed_buffer *buffer = &shared->feed_buffers[number & 1];
        struct feed_buffer *ahead = &shared->feed_buffers[(number + 1) & 1];
        if (steps < 1) {
            item_ask(buffer, a, index, lane);
        }
        if (steps < 2) {
            rows_ask(buffer, a, lane);
        }
        asked_wait();
        const struct plan_item &item = buffer->item;
        index = item.next;
        struct query_span span = {INT32_MAX, -1};
#pragma unroll
        for (int i = 0; i < TILE_ROWS_PREFILL / 32; i++) {
            if (lane + 32 * i < item.tokens) {
                const int32_t position = buffer->positions[lane + 32 * i];
                span.first = min(span.first, position);
                span.last = max(span.last, position);
            }
        }
        span.first = __reduce_min_sync(~0u, span.first);
        span.last = __reduce_max_sync(~0u, span.last);
        steps = 0;
        int32_t asked = 0; /* windows of refs: the last that was asked for, and that is here */
        int32_t here = 0;
        bool new_query = true;
        int32_t page = 0;
        do {
            if (min(page + 2, item.pages - 1) / FEED_REFS > here) {
                asked_wait();
                here = asked;
            }
            if (page / FEED_REFS == asked && (asked + 1) * FEED_REFS < item.pages) {
                refs_ask(buffer, a, ++asked, lane);
            }
            const int32_t loads = min(2, item.pages - page); /* 0: an item without pages */
            const struct kernels_page_ref refs[2] = {ref_at(*buffer, page),
                                                     ref_at(*buffer, page + 1)};
            const bool pair = loads == 2 && refs[1].variant == refs[0].variant;
            const int32_t next = page + (pair ? 2 : 1);
            const bool last = next >= item.pages;
            const bool last_of_query = last || ref_at(*buffer, next).variant != refs[0].variant;

            if (new_query) {
                const uint32_t s = query & 1;
                barrier_wait(smem_address(&shared->q_empty[s]), ((query >> 1) & 1) ^ 1);
                struct query_meta *meta = &shared->query_metas[query % QUERY_METAS];
#pragma unroll
                for (int i = 0; i < TILE_ROWS_PREFILL / 32; i++) {
                    meta->positions[lane + 32 * i] = buffer->positions[lane + 32 * i];
                }
                if (lane < (int)(sizeof(struct plan_item) / 4)) {
                    ((int32_t *)&meta->item)[lane] = ((const int32_t *)&item)[lane];
                }
                __syncwarp();
                if (lane == 0) {
                    const uint32_t barrier = smem_address(&shared->q_full[s]);
                    if (loads == 0) {
                        barrier_arrive(barrier);
                    } else {
                        const int32_t row = refs[0].variant * a.rows + item.row;
                        barrier_arrive_expect(barrier, 2 * HALVES * 128 * a.group * per_half);
#pragma unroll
                        for (int i = 0; i < 2 * HALVES; i++) {
                            tma_load_3d(smem_address(shared->q[s]) + i * 8192, q_map, barrier,
                                        64 * (i % HALVES), item.kv_head * a.group,
                                        row + (i / HALVES) * per_half);
                        }
                    }
                }
                query++;
            }

            const int32_t count = min(loads, pair ? 2 : 1);
            const int32_t pages[2] = {refs[0].page, refs[1].page};
            const uint32_t s = tile % STAGES;
            const uint32_t full = smem_address(&shared->k_full[s]);
            barrier_wait(smem_address(&shared->k_empty[s]), ((tile / STAGES) & 1) ^ 1);
            if (lane == 0) {
                load_pages<D>(shared->k[s], page_map, full, 0, count, pages);
            }
            /* While they travel: */
            const uint32_t m = tile % prefill_shared<D>::METAS;
            struct tile_meta *meta = &shared->tile_metas[m];
            uint32_t masked = 0;
#pragma unroll
            for (int p = 0; p < 2; p++) {
                struct kernels_page_ref ref = refs[p];
                if (p >= count) { /* No page: dead rows, whatever lies in the stage. */
                    ref.live = 0;
                    ref.position = 0;
                    ref.positions = -1;
                }
                if (describe_page(meta, p, a, item, ref, span, lane)) {
                    masked |= p == 0 ? TILE_MASKED_0 : TILE_MASKED_1;
                }
            }
            if (lane == 0) {
                meta->window = item.window;
                meta->count = count;
                meta->page[0] = pages[0];
                meta->page[1] = pages[1];
                meta->flags = (new_query ? TILE_NEW_Q : 0) | (last_of_query ? TILE_LAST_OF_Q : 0) |
                              masked | (last ? TILE_LAST : 0) | (last && index < 0 ? TILE_END : 0);
            }
            __syncwarp();
            if (lane == 0) {
                barrier_arrive_expect(full, matrix_bytes<D>(count));
                barrier_arrive(smem_address(&shared->meta_full[m]));
            }
            if (index >= 0 && steps < 2) {
                if (steps++ == 0) {
                    item_ask(ahead, a, index, lane);
                } else {
                    rows_ask(ahead, a, lane);
                }
            }
            tile++;
            new_query = last_of_query;
            page = next;
        } while (page < item.pages);
    }
}

/* Values; in a warp of its own, for their stages come free later than those of keys. */
template <int D>
static __device__ void feed_values(struct prefill_shared<D> *shared, const CUtensorMap *page_map,
                                   int lane)
{
    constexpr int STAGES = prefill_shared<D>::STAGES;
    constexpr int METAS = prefill_shared<D>::METAS;
    uint32_t flags;
    uint32_t tile = 0;
    do {
        const uint32_t s = tile % STAGES;
        const uint32_t m = tile % METAS;
        const uint32_t full = smem_address(&shared->v_full[s]);
        barrier_wait(smem_address(&shared->meta_full[m]), (tile / METAS) & 1);
        barrier_wait(smem_address(&shared->v_empty[s]), ((tile / STAGES) & 1) ^ 1);
        const struct tile_meta *meta = &shared->tile_metas[m];
        flags = meta->flags;
        if (lane == 0) {
            const int32_t pages[2] = {meta->page[0], meta->page[1]};
            barrier_arrive_expect(full, matrix_bytes<D>(meta->count));
            load_pages<D>(shared->v[s], page_map, full, RK_PAGE_TOKENS, meta->count, pages);
        }
        __syncwarp();
        tile++;
    } while (!(flags & TILE_END));
}

/* One warp for each page of a tile: zeroes rows of V that no query may see. */
template <int D> static __device__ void clean(struct prefill_shared<D> *shared, int page, int lane)
{
    constexpr int STAGES = prefill_shared<D>::STAGES;
    uint32_t tile = 0;
    uint32_t flags;

    do {
        const uint32_t s = tile % STAGES;
        const struct tile_meta *meta = &shared->tile_metas[tile % prefill_shared<D>::METAS];
        barrier_wait(smem_address(&shared->v_full[s]), (tile / STAGES) & 1);
        flags = meta->flags;
        uint64_t dead = ~meta->v_live[page];
        if (dead != 0) {
            while (dead != 0) { /* Two rows at a time, half a warp each. */
                int row = __ffsll((long long)dead) - 1;
                dead &= dead - 1;
                const int other = dead != 0 ? __ffsll((long long)dead) - 1 : row;
                dead &= dead - 1;
                row = lane < 16 ? row : other;
                const int chunk = lane & 15;
                if (chunk < D / 8) {
                    uint8_t *to = shared->v[s] + (chunk / 8) * 16384 +
                                  (page * RK_PAGE_TOKENS + row) * 128 + (chunk % 8) * 16;
                    *(uint4 *)to = make_uint4(0, 0, 0, 0);
                }
            }
            fence_async_proxy();
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(smem_address(&shared->v_clean[s]));
        }
        tile++;
    } while (!(flags & TILE_END));
}

/* How many of a page's positions, which ascend, are below `limit`. */
static __device__ __forceinline__ int32_t positions_below(const int32_t *positions, int32_t limit)
{
    int32_t n = 0;
#pragma unroll
    for (int step = RK_PAGE_TOKENS / 2; step > 0; step /= 2) {
        n += positions[n + step - 1] < limit ? step : 0;
    }
    return n + (positions[n] < limit);
}

/* Bit r: row r of the page is visible to the query at t. The four lanes of a quad hold the same
 * two queries, and share the work on explicit positions. */
static __device__ __forceinline__ void page_visible(const struct tile_meta *meta, int p,
                                                    const int32_t (&t)[2], int quad_lane,
                                                    uint64_t (&seen)[2])
{
    const uint64_t live = meta->live[p];
    const int32_t window = meta->window;
    const int32_t position = meta->position[p];
    const uint64_t sink = low_bits(meta->sink_rows[p]);
    /* Rows at up to t, and rows that are out of the window: the first so many of the page. */
    int32_t past[2] = {t[0] + 1 - position, t[1] + 1 - position};
    int32_t out[2] = {past[0] - window, past[1] - window};
    if (meta->kind[p] == PAGE_EXPLICIT) {
        const int32_t own = quad_lane & 1 ? t[1] : t[0];
        const int32_t n =
            positions_below(meta->positions[p], own + 1 - (quad_lane & 2 ? window : 0));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            past[r] = __shfl_sync(~0u, n, r, 4);
            out[r] = __shfl_sync(~0u, n, 2 + r, 4);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        seen[r] = live & low_bits(past[r]);
        if (window != 0) {
            seen[r] &= ~low_bits(out[r]) | sink;
        }
    }
}

/* Scores of rows of page P that are not in seen[] become -inf; SAME: seen[0] is both queries'. */
template <int P, bool SAME>
static __device__ __forceinline__ void hide_rows(float (&s)[64], const uint64_t (&seen)[2],
                                                 int quad_lane)
{
    uint32_t words[2][2];
#pragma unroll
    for (int r = 0; r < (SAME ? 1 : 2); r++) {
        const uint64_t mine = seen[r] >> (2 * quad_lane);
        words[r][0] = (uint32_t)mine;
        words[r][1] = (uint32_t)(mine >> 32);
        /* Hidden from the compiler, which would share tests with the other branch and save them. */
        asm volatile("" : "+r"(words[r][0]), "+r"(words[r][1]));
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float *x = &s[4 * (8 * P + j)];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t word = words[SAME ? 0 : r][j / 4];
            x[2 * r] = word & (1u << (8 * (j % 4))) ? x[2 * r] : -CUDART_INF_F;
            x[2 * r + 1] = word & (2u << (8 * (j % 4))) ? x[2 * r + 1] : -CUDART_INF_F;
        }
    }
}

/* Queries of one warp are near each other: most pages at the edge of what a tile sees are seen by
 * all of a warp's or by none. */
template <int P>
static __device__ __forceinline__ void hide_page(float (&s)[64], const struct tile_meta *meta,
                                                 const int32_t (&t)[2], int quad_lane)
{
    const uint64_t live = meta->live[P];
    uint64_t seen[2] = {live, live};
    if (meta->kind[P] != PAGE_LIVE) {
        page_visible(meta, P, t, quad_lane, seen);
    }
    if (__all_sync(~0u, (seen[0] & seen[1]) == ~(uint64_t)0)) {
        return;
    }
    if (__all_sync(~0u, seen[0] == seen[1])) {
        hide_rows<P, true>(s, seen, quad_lane);
    } else {
        hide_rows<P, false>(s, seen, quad_lane);
    }
}

static __device__ __forceinline__ void hide_scores(float (&s)[64], const struct tile_meta *meta,
                                                   uint32_t flags, const int32_t (&t)[2],
                                                   int quad_lane)
{
    if (flags & TILE_MASKED_0) {
        hide_page<0>(s, meta, t, quad_lane);
    }
    if (flags & TILE_MASKED_1) {
        hide_page<1>(s, meta, t, quad_lane);
    }
}

/* State of the two rows of a thread. */
struct row_state {
    float max[2]; /* of raw scores: the highest, or up to 2^MAX_LAG times less in weight */
    float sum[2]; /* this thread's part */
};

/* Sums and outputs shrink to a new maximum only once it is worth it: weights are up to 2^MAX_LAG
 * then, as exact in bf16 and f32 as those up to 1. (FlashAttention-4's lazy rescaling.) */
#define MAX_LAG 8.0f

/* Scores become weights; alpha is what earlier sums and outputs shrink by. True if any row of the
 * warp has an alpha other than 1. */
static __device__ __forceinline__ bool soften(float (&s)[64], struct row_state *state,
                                              float scale_log2, float (&alpha)[2])
{
    bool shrunk = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = state->max[r];
#pragma unroll
        for (int j = 0; j < 16; j++) {
            top = fmaxf(top, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const bool moves = (top - state->max[r]) * scale_log2 > MAX_LAG; /* Not if both -inf. */
        shrunk |= moves;
        top = moves ? top : state->max[r];
        const float shift = top == -CUDART_INF_F ? 0.0f : top * scale_log2;
        alpha[r] = moves ? exp2_approx(state->max[r] * scale_log2 - shift) : 1.0f;
        state->max[r] = top;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            float *x = &s[4 * j + 2 * r];
            x[0] = exp2_approx(fmaf(x[0], scale_log2, -shift));
            x[1] = exp2_approx(fmaf(x[1], scale_log2, -shift));
            sum += x[0] + x[1];
        }
        state->sum[r] = state->sum[r] * alpha[r] + sum;
    }
    return __any_sync(~0u, shrunk);
}

static __device__ __forceinline__ void weights_pack(const float (&s)[64], uint32_t (&p)[8][4])
{
#pragma unroll
    for (int k = 0; k < 8; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p[k][i] = pack_bf16(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
        }
    }
}

/* The same in all lanes, and known to the compiler to be. */
static __device__ __forceinline__ uint32_t uniform(uint32_t x)
{
    return __shfl_sync(~0u, x, 0);
}

template <int D>
static __device__ __forceinline__ void scores_issue(float (&s)[64], uint32_t q, uint32_t k)
{
    const uint64_t q_tile = wgmma_tile(uniform(q), 16, 1024);
    const uint64_t k_tile = wgmma_tile(uniform(k), 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; i++) { /* Addresses in units of 16 bytes. */
        wgmma_qk(s, q_tile + (i / 4) * 512 + (i % 4) * 2, k_tile + (i / 4) * 1024 + (i % 4) * 2,
                 i != 0);
    }
    wgmma_commit();
}

template <int D>
static __device__ __forceinline__ void products_issue(float (&o)[D / 2], uint32_t (&p)[8][4],
                                                      uint32_t v)
{
    const uint64_t v_tile = wgmma_tile(uniform(v), 16384, 1024);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < TILE_KEYS / 16; i++) {
        wgmma_pv(o, p[i], v_tile + i * 128);
    }
    wgmma_commit();
}

/* Warpgroups take turns: each may issue once the other has. */
static __device__ __forceinline__ void turn_wait(int wg)
{
    named_sync(1 + wg, 256);
}
static __device__ __forceinline__ void turn_pass(int wg)
{
    named_arrive(2 - wg, 256);
}

/* Lane c of a quad gives word b to lane b and gets word c of each: 16 bytes in a row. */
static __device__ __forceinline__ void quad_transpose(uint32_t (&x)[4], int quad_lane)
{
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = quad_lane & bit;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            if (b & bit) {
                continue;
            }
            const uint32_t sent = upper ? x[b] : x[b + bit];
            const uint32_t received = __shfl_xor_sync(~0u, sent, bit);
            x[b] = upper ? received : x[b];
            x[b + bit] = upper ? x[b + bit] : received;
        }
    }
}

template <int D>
static __device__ __forceinline__ void write_rows(int wg, const struct prefill_arguments &a,
                                                  const struct plan_item &item, float (&o)[D / 2],
                                                  const float (&max_log2)[2], const float (&sum)[2],
                                                  int thread)
{
    const int quad_lane = thread & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int32_t i = (thread / 32) * 16 + (thread & 31) / 4 + 8 * r;
        const int32_t per_half = (TILE_ROWS_PREFILL / 2) / a.group;
        const int32_t token = wg * per_half + i / a.group;
        const bool used = i < per_half * a.group && token < item.tokens;
        const int32_t row = item.row + token;
        const size_t at = (size_t)row * a.num_q_heads + item.kv_head * a.group + i % a.group;
        const float inverse = sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f;
        uint4 *out = (uint4 *)(a.out + at * D);
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            uint32_t x[4];
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const float *pair = &o[4 * (4 * j + b) + 2 * r];
                x[b] = pack_bf16(pair[0] * inverse, pair[1] * inverse);
            }
            quad_transpose(x, quad_lane);
            if (used) {
                out[4 * j + quad_lane] = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
        if (used && a.lse && quad_lane == 0) {
            a.lse[at] =
                sum[r] > 0.0f ? (max_log2[r] + log2f(sum[r])) * CUDART_LN2_F : -CUDART_INF_F;
        }
    }
}

/* This part of a split list goes to its slot; the last to arrive merges all parts into o. */
template <int D>
static __device__ __forceinline__ bool merge_parts(int wg, struct prefill_shared<D> *shared,
                                                   const struct prefill_arguments &a,
                                                   const struct plan_item &item, float (&o)[D / 2],
                                                   float (&max_log2)[2], float (&sum)[2],
                                                   int thread)
{
    constexpr size_t SLOT = (size_t)TILE_ROWS_PREFILL * (D + 2);
    const int quad_lane = thread & 3;
    const int first = wg * 64 + (thread / 32) * 16 + (thread & 31) / 4;
    float *slot = a.slots + (size_t)(item.slot + item.split) * SLOT;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first + 8 * r;
        if (quad_lane == 0) {
            slot[row] = max_log2[r];
            slot[TILE_ROWS_PREFILL + row] = sum[r];
        }
        float2 *to = (float2 *)(slot + 2 * TILE_ROWS_PREFILL + row * D);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            to[4 * j + quad_lane] = make_float2(o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
        }
    }
    __threadfence();
    named_sync(3 + wg, 128);
    if (thread == 0) {
        int32_t *counter = a.counters + item.counter + wg;
        const bool last = atomicAdd(counter, 1) == item.num_splits - 1;
        if (last) {
            *counter = 0;
        }
        __threadfence();
        shared->last_part[wg] = last;
    }
    named_sync(3 + wg, 128);
    if (!shared->last_part[wg]) {
        return false;
    }
    slot = a.slots + (size_t)item.slot * SLOT;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first + 8 * r;
        float top = -CUDART_INF_F;
        for (int32_t i = 0; i < item.num_splits; i++) {
            top = fmaxf(top, __ldcg(slot + i * SLOT + row));
        }
        max_log2[r] = top;
        sum[r] = 0.0f;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            o[4 * j + 2 * r] = 0.0f;
            o[4 * j + 2 * r + 1] = 0.0f;
        }
        if (top == -CUDART_INF_F) {
            continue;
        }
        for (int32_t i = 0; i < item.num_splits; i++) {
            const float *part = slot + i * SLOT;
            const float weight = exp2_approx(__ldcg(part + row) - top);
            const float2 *from = (const float2 *)(part + 2 * TILE_ROWS_PREFILL + row * D);
            sum[r] += weight * __ldcg(part + TILE_ROWS_PREFILL + row);
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                const float2 x = __ldcg(from + 4 * j + quad_lane);
                o[4 * j + 2 * r] += weight * x.x;
                o[4 * j + 2 * r + 1] += weight * x.y;
            }
        }
    }
    return true;
}

/* A finished item: its outputs, or its part of a split list. */
template <int D>
static __device__ __forceinline__ void finish(int wg, struct prefill_shared<D> *shared,
                                              const struct prefill_arguments &a,
                                              const struct query_meta &meta, float (&o)[D / 2],
                                              struct row_state state, int thread)
{
    const struct plan_item &item = meta.item;
    float max_log2[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        state.sum[r] += __shfl_xor_sync(~0u, state.sum[r], 1);
        state.sum[r] += __shfl_xor_sync(~0u, state.sum[r], 2);
        max_log2[r] = state.max[r] * a.scale_log2;
    }
    if (item.num_splits == 1 ||
        merge_parts<D>(wg, shared, a, item, o, max_log2, state.sum, thread)) {
        write_rows<D>(wg, a, item, o, max_log2, state.sum, thread);
    }
}

/* Positions of the thread's two rows, or -1. */
static __device__ __forceinline__ void rows_begin(int wg, const struct prefill_arguments &a,
                                                  const struct query_meta &meta, int32_t (&t)[2],
                                                  struct row_state *state, int thread)
{
    const int32_t per_half = (TILE_ROWS_PREFILL / 2) / a.group;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int32_t i = (thread / 32) * 16 + (thread & 31) / 4 + 8 * r;
        const int32_t token = wg * per_half + i / a.group;
        t[r] = i < per_half * a.group && token < meta.item.tokens ? meta.positions[token] : -1;
        state->max[r] = -CUDART_INF_F;
        state->sum[r] = 0.0f;
    }
}

/* Issues the scores of a tile and the products of the one before; the scores are there at the end.
 */
template <int D>
static __device__ __forceinline__ uint32_t step(int wg, struct prefill_shared<D> *shared,
                                                uint32_t tile, uint32_t *query, float (&s)[64],
                                                float (&o)[D / 2], uint32_t (&p)[8][4])
{
    constexpr int STAGES = prefill_shared<D>::STAGES;
    const uint32_t k = tile % STAGES;
    const uint32_t v = (tile - 1) % STAGES;
    const uint32_t v_parity = ((tile - 1) / STAGES) & 1;
    const uint32_t stage = *query & 1;
    barrier_wait(smem_address(&shared->k_full[k]), (tile / STAGES) & 1);
    const uint32_t flags = shared->tile_metas[tile % prefill_shared<D>::METAS].flags;
    if (flags & TILE_NEW_Q) {
        barrier_wait(smem_address(&shared->q_full[stage]), (*query >> 1) & 1);
    }
    turn_wait(wg);
    scores_issue<D>(s, smem_address(shared->q[stage]) + wg * 64 * D * 2,
                    smem_address(shared->k[k]));
    barrier_wait(smem_address(&shared->v_clean[v]), v_parity);
    products_issue<D>(o, p, smem_address(shared->v[v]));
    turn_pass(wg);
    wgmma_wait<1>();
    wgmma_landed(s);
    if ((threadIdx.x & 31) == 0) {
        barrier_arrive(smem_address(&shared->k_empty[k]));
        if (flags & TILE_LAST_OF_Q) {
            barrier_arrive(smem_address(&shared->q_empty[stage]));
        }
    }
    *query += (flags & TILE_LAST_OF_Q) ? 1 : 0;
    return flags;
}

/* The products of the tile before are there. */
template <int D>
static __device__ __forceinline__ void step_end(struct prefill_shared<D> *shared, uint32_t tile,
                                                float (&o)[D / 2])
{
    wgmma_wait<0>();
    wgmma_landed(o);
    if ((threadIdx.x & 31) == 0) {
        barrier_arrive(smem_address(&shared->v_empty[(tile - 1) % prefill_shared<D>::STAGES]));
    }
}

/*
 * All items of a block are one stream of tiles: the scores of an item's first tile overlap the
 * products of the last tile of the item before.
 */
template <int D>
static __device__ void compute(struct prefill_shared<D> *shared, const struct prefill_arguments &a,
                               int wg)
{
    constexpr int STAGES = prefill_shared<D>::STAGES;
    constexpr int METAS = prefill_shared<D>::METAS;
    const int thread = threadIdx.x & 127;
    const int lane = thread & 31;
    uint32_t query = 0;
    struct row_state state;
    int32_t t[2];
    float s[64];
    float o[D / 2];
    uint32_t p[8][4];
    float alpha[2];
    uint32_t flags;

    if (wg == 1) {
        turn_pass(1); /* Warpgroup 0 begins. */
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) {
        o[i] = 0.0f;
    }
    {
        const struct tile_meta *meta = &shared->tile_metas[0];
        barrier_wait(smem_address(&shared->k_full[0]), 0);
        barrier_wait(smem_address(&shared->q_full[0]), 0);
        flags = meta->flags;
        rows_begin(wg, a, shared->query_metas[0], t, &state, thread);
        turn_wait(wg);
        scores_issue<D>(s, smem_address(shared->q[0]) + wg * 64 * D * 2,
                        smem_address(shared->k[0]));
        turn_pass(wg);
        wgmma_wait<0>();
        wgmma_landed(s);
        if (lane == 0) {
            barrier_arrive(smem_address(&shared->k_empty[0]));
            if (flags & TILE_LAST_OF_Q) {
                barrier_arrive(smem_address(&shared->q_empty[0]));
            }
        }
        query += (flags & TILE_LAST_OF_Q) ? 1 : 0;
        hide_scores(s, meta, flags, t, lane & 3);
        (void)soften(s, &state, a.scale_log2, alpha);
        weights_pack(s, p);
    }
    uint32_t tile = 1;
    for (;;) {
        for (; !(flags & TILE_LAST); tile++) {
            flags = step<D>(wg, shared, tile, &query, s, o, p);
            hide_scores(s, &shared->tile_metas[tile % METAS], flags, t, lane & 3);
            const bool shrunk = soften(s, &state, a.scale_log2, alpha);
            step_end<D>(shared, tile, o);
            if (shrunk) {
#pragma unroll
                for (int i = 0; i < D / 2; i++) {
                    o[i] *= alpha[(i / 2) & 1];
                }
            }
            weights_pack(s, p);
        }
        if (flags & TILE_END) {
            break;
        }
        const struct query_meta *finished = &shared->query_metas[(query - 1) % QUERY_METAS];
        const struct query_meta *begun = &shared->query_metas[query % QUERY_METAS];
        flags = step<D>(wg, shared, tile, &query, s, o, p);
        const struct row_state before = state;
        rows_begin(wg, a, *begun, t, &state, thread);
        hide_scores(s, &shared->tile_metas[tile % METAS], flags, t, lane & 3);
        (void)soften(s, &state, a.scale_log2, alpha);
        step_end<D>(shared, tile, o);
        tile++;
        finish<D>(wg, shared, a, *finished, o, before, thread);
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            o[i] = 0.0f;
        }
        weights_pack(s, p);
    }
    const uint32_t v = (tile - 1) % STAGES;
    const uint32_t v_parity = ((tile - 1) / STAGES) & 1;
    barrier_wait(smem_address(&shared->v_clean[v]), v_parity);
    products_issue<D>(o, p, smem_address(shared->v[v]));
    wgmma_wait<0>();
    wgmma_landed(o);
    finish<D>(wg, shared, a, shared->query_metas[(query - 1) % QUERY_METAS], o, state, thread);
}

template <int D>
static __global__ void __launch_bounds__(THREADS, 1)
    prefill_kernel(const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap page_map,
                   const __grid_constant__ struct prefill_arguments a)
{
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    struct prefill_shared<D> *shared = (struct prefill_shared<D> *)shared_bytes;
    const int lane = threadIdx.x & 31;

    if (a.items[blockIdx.x].tokens == 0) {
        return; /* Nothing for this block. */
    }
    if (threadIdx.x == 0) {
        tma_prefetch_map(&q_map);
        tma_prefetch_map(&page_map);
        for (int i = 0; i < 2; i++) {
            barrier_init(smem_address(&shared->q_full[i]), 1);
            barrier_init(smem_address(&shared->q_empty[i]), CONSUMER_WARPS);
        }
        for (int i = 0; i < prefill_shared<D>::METAS; i++) {
            barrier_init(smem_address(&shared->meta_full[i]), 1);
        }
        for (int i = 0; i < prefill_shared<D>::STAGES; i++) {
            barrier_init(smem_address(&shared->k_full[i]), 1);
            barrier_init(smem_address(&shared->k_empty[i]), CONSUMER_WARPS);
            barrier_init(smem_address(&shared->v_full[i]), 1);
            barrier_init(smem_address(&shared->v_clean[i]), 2);
            barrier_init(smem_address(&shared->v_empty[i]), CONSUMER_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    wait_previous_kernel();

    if (threadIdx.x < 128) {
        registers_decrease<56>();
        if (threadIdx.x < 32) {
            feed<D>(shared, a, &q_map, &page_map, lane);
        } else if (threadIdx.x < 96) {
            clean<D>(shared, threadIdx.x / 32 - 1, lane);
        } else {
            feed_values<D>(shared, &page_map, lane);
        }
    } else {
        registers_increase<224>();
        compute<D>(shared, a, (int)uniform(threadIdx.x / 128) - 1);
    }
}

template <int D>
static enum rk_status launch(struct kernels_device *device, const CUtensorMap *q_map,
                             const CUtensorMap *page_map, const struct prefill_arguments *a,
                             cudaStream_t stream, struct rk_error *error)
{
    cudaError_t failed =
        cudaFuncSetAttribute(prefill_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)sizeof(struct prefill_shared<D>));
    if (failed == cudaSuccess) {
        cudaLaunchAttribute early = {};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(device->processors);
        config.blockDim = dim3(THREADS);
        config.dynamicSmemBytes = sizeof(struct prefill_shared<D>);
        config.stream = stream;
        config.attrs = &early;
        config.numAttrs = 1;
        failed = cudaLaunchKernelEx(&config, prefill_kernel<D>, *q_map, *page_map, *a);
    }
    return cuda_check(failed, "launching the prefill kernel", error);
}

enum rk_status cuda_prefill(struct kernels_device *device,
                            const struct kernels_paged_attention *call, const CUtensorMap *page_map,
                            kernels_stream stream, struct rk_error *error)
{
    const struct kernels_plan *plan = call->plan;
    const uint32_t group = plan->options.group;
    const uint32_t head_dim = plan->options.head_dim;
    struct prefill_arguments a = {};
    a.items = (const struct plan_item *)(plan->device_block + plan->sections.items);
    a.refs = (const struct kernels_page_ref *)(plan->device_block + plan->sections.refs);
    a.explicit_positions =
        (const int32_t(*)[RK_PAGE_TOKENS])(plan->device_block + plan->sections.explicit_positions);
    a.positions = call->positions;
    a.out = (__nv_bfloat16 *)call->out;
    a.lse = call->lse;
    a.slots = call->workspace->slots;
    a.counters = call->workspace->counters;
    a.scale_log2 = call->scale * LOG2E;
    a.group = (int32_t)group;
    a.num_q_heads = (int32_t)(plan->options.num_kv_heads * group);
    a.rows = (int32_t)plan->rows;

    /* Queries: {head_dim, query head, row of every variant}; a box is half a tile. */
    CUtensorMap q_map;
    const uint64_t extent[3] = {head_dim, (uint64_t)a.num_q_heads,
                                (uint64_t)plan->rows * plan->num_variants};
    const uint64_t stride[2] = {2 * head_dim, (uint64_t)2 * head_dim * a.num_q_heads};
    const uint32_t box[3] = {64, group, tokens_per_half(group)};
    enum rk_status status = cuda_tensor_map(&q_map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, call->q,
                                            extent, stride, box, CU_TENSOR_MAP_SWIZZLE_128B, error);
    if (status != RK_OK) {
        return status;
    }
    if (head_dim == 128) {
        return launch<128>(device, &q_map, page_map, &a, (cudaStream_t)stream, error);
    }
    return launch<64>(device, &q_map, page_map, &a, (cudaStream_t)stream, error);
}
