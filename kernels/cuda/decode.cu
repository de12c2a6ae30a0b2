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
#include "kernels/cuda/decode_feed.cuh"
#include "kernels/cuda/decode_merge.cuh"

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
