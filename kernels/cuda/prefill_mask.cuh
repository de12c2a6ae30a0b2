/*
 * prefill_mask: scores of what a query may not see become -inf.
 */
#ifndef KERNELS_CUDA_PREFILL_MASK_CUH
#define KERNELS_CUDA_PREFILL_MASK_CUH

#include "kernels/cuda/prefill_internal.cuh"

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

#endif
