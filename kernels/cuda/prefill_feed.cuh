/*
 * prefill_feed: the warps that feed the prefill kernel. Items, queries, keys and
 * the meta of tiles by one, values by another; two zero what no query may see.
 */
#ifndef KERNELS_CUDA_PREFILL_FEED_CUH
#define KERNELS_CUDA_PREFILL_FEED_CUH

#include "kernels/cuda/prefill_internal.cuh"

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

/* Lowest and highest position of the item's rows. The whole warp. */
static __device__ __forceinline__ struct query_span rows_span(const struct feed_buffer &buffer,
                                                              int lane)
{
    struct query_span span = {INT32_MAX, -1};
#pragma unroll
    for (int i = 0; i < TILE_ROWS_PREFILL / 32; i++) {
        if (lane + 32 * i < buffer.item.tokens) {
            const int32_t position = buffer.positions[lane + 32 * i];
            span.first = min(span.first, position);
            span.last = max(span.last, position);
        }
    }
    span.first = __reduce_min_sync(~0u, span.first);
    span.last = __reduce_max_sync(~0u, span.last);
    return span;
}

/* The item's queries of a variant, -1: none, and their meta. The whole warp. */
template <int D>
static __device__ __forceinline__ void feed_queries(struct prefill_shared<D> *shared,
                                                    const struct prefill_arguments &a,
                                                    const CUtensorMap *q_map,
                                                    const struct feed_buffer &buffer,
                                                    int32_t variant, uint32_t query, int lane)
{
    constexpr int HALVES = prefill_shared<D>::HALVES;
    const struct plan_item &item = buffer.item;
    const uint32_t s = query & 1;
    const uint32_t full = smem_address(&shared->q_full[s]);
    const int32_t per_half = (TILE_ROWS_PREFILL / 2) / a.group;
    struct query_meta *meta = &shared->query_metas[query % QUERY_METAS];
    barrier_wait(smem_address(&shared->q_empty[s]), ((query >> 1) & 1) ^ 1);
#pragma unroll
    for (int i = 0; i < TILE_ROWS_PREFILL / 32; i++) {
        meta->positions[lane + 32 * i] = buffer.positions[lane + 32 * i];
    }
    if (lane < (int)(sizeof(struct plan_item) / 4)) {
        ((int32_t *)&meta->item)[lane] = ((const int32_t *)&item)[lane];
    }
    __syncwarp();
    if (lane != 0) {
        return;
    }
    if (variant < 0) {
        barrier_arrive(full);
        return;
    }
    barrier_arrive_expect(full, 2 * HALVES * 128 * a.group * per_half);
#pragma unroll
    for (int i = 0; i < 2 * HALVES; i++) {
        tma_load_3d(smem_address(shared->q[s]) + i * 8192, q_map, full, 64 * (i % HALVES),
                    item.kv_head * a.group, variant * a.rows + item.row + (i / HALVES) * per_half);
    }
}

/* Keys and the meta of a tile of `count` pages, flags without those of masks. The whole warp. */
template <int D>
static __device__ __forceinline__ void feed_keys(struct prefill_shared<D> *shared,
                                                 const struct prefill_arguments &a,
                                                 const CUtensorMap *page_map,
                                                 const struct plan_item &item,
                                                 const struct kernels_page_ref (&refs)[2],
                                                 int32_t count, const struct query_span &span,
                                                 uint32_t flags, uint32_t tile, int lane)
{
    constexpr int STAGES = prefill_shared<D>::STAGES;
    const uint32_t s = tile % STAGES;
    const uint32_t m = tile % prefill_shared<D>::METAS;
    const uint32_t full = smem_address(&shared->k_full[s]);
    const int32_t pages[2] = {refs[0].page, refs[1].page};
    barrier_wait(smem_address(&shared->k_empty[s]), ((tile / STAGES) & 1) ^ 1);
    if (lane == 0) {
        load_pages<D>(shared->k[s], page_map, full, 0, count, pages);
    }
    /* While they travel: */
    struct tile_meta *meta = &shared->tile_metas[m];
#pragma unroll
    for (int p = 0; p < 2; p++) {
        struct kernels_page_ref ref = refs[p];
        if (p >= count) { /* No page: dead rows, whatever lies in the stage. */
            ref.live = 0;
            ref.position = 0;
            ref.positions = -1;
        }
        if (describe_page(meta, p, a, item, ref, span, lane)) {
            flags |= p == 0 ? TILE_MASKED_0 : TILE_MASKED_1;
        }
    }
    if (lane == 0) {
        meta->window = item.window;
        meta->count = count;
        meta->page[0] = pages[0];
        meta->page[1] = pages[1];
        meta->flags = flags;
    }
    __syncwarp();
    if (lane == 0) {
        barrier_arrive_expect(full, matrix_bytes<D>(count));
        barrier_arrive(smem_address(&shared->meta_full[m]));
    }
}

/* Queries, keys and the meta of tiles. */
template <int D>
static __device__ void feed(struct prefill_shared<D> *shared, const struct prefill_arguments &a,
                            const CUtensorMap *q_map, const CUtensorMap *page_map, int lane)
{
    uint32_t tile = 0;  /* counts tiles */
    uint32_t query = 0; /* counts stages of queries */
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
        const struct query_span span = rows_span(*buffer, lane);
        index = item.next;
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
            const int32_t left = min(2, item.pages - page); /* 0: an item without pages */
            const struct kernels_page_ref refs[2] = {ref_at(*buffer, page),
                                                     ref_at(*buffer, page + 1)};
            const bool pair = left == 2 && refs[1].variant == refs[0].variant;
            const int32_t next = page + (pair ? 2 : 1);
            const bool last = next >= item.pages;
            const bool last_of_query = last || ref_at(*buffer, next).variant != refs[0].variant;
            if (new_query) {
                feed_queries<D>(shared, a, q_map, *buffer, left == 0 ? -1 : refs[0].variant,
                                query++, lane);
            }
            feed_keys<D>(shared, a, page_map, item, refs, min(left, pair ? 2 : 1), span,
                         (new_query ? TILE_NEW_Q : 0) | (last_of_query ? TILE_LAST_OF_Q : 0) |
                             (last ? TILE_LAST : 0) | (last && index < 0 ? TILE_END : 0),
                         tile++, lane);
            if (index >= 0 && steps < 2) {
                if (steps++ == 0) {
                    item_ask(ahead, a, index, lane);
                } else {
                    rows_ask(ahead, a, lane);
                }
            }
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

#endif
