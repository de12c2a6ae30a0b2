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
#include "kernels/cuda/prefill_feed.cuh"
#include "kernels/cuda/prefill_mask.cuh"

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
