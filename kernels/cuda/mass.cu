/*
 * mass: how much attention each token of the context gets from the rows of a
 * plan, from scores and the sums that attention left in lse.
 */
#include "kernels/cuda/cuda_internal.h"
#include "kernels/cuda/ptx.cuh"

#define WARP      32
#define ALL_LANES 0xffffffffu
#define UNIT      8 /* bf16 elements of one access */

/*
 * The plan's items name every (tile of rows, page) once. A warp takes one page of an item, and the
 * item's rows 16 at a time: scores with m16n8k16, weights with the lse that attention left, sums
 * over the rows in registers. Tiles of a list add up in memory, in any order.
 *
 * Like attention, a CTA follows the chain of items of one processor, so that a captured call works
 * on what the latest upload brought.
 */
#define MASS_THREADS 128
#define MASS_SLICES  8 /* CTAs that share the pages of a processor's items */
#define LOG2_E       1.4426950408889634f

struct mass_params {
    const struct plan_item *items;
    const struct kernels_page_ref *refs;
    const int32_t (*explicit_positions)[RK_PAGE_TOKENS];
    const uint8_t *pages;
    const uint16_t *q;
    const int32_t *positions;
    const float *lse;
    float *mass;
    float scale_log2; /* scale * log2(e) */
    uint32_t rows;
    uint32_t num_q_heads;
    uint32_t group;
    uint32_t tile_halves; /* 2: prefill, of 64 pairs each; 1: decode, of 16 */
    uint32_t half_pairs;
    uint32_t half_tokens;
};

/* A (query row, query head) pair of a tile. */
struct mass_row {
    bool used;
    int32_t position;
    float lse_log2;
    size_t index; /* row * num_q_heads + head */
};

static __device__ struct mass_row row_of(const struct mass_params *p, const struct plan_item *item,
                                         uint32_t pair)
{
    uint32_t half = pair / p->half_pairs;
    uint32_t token = pair % p->half_pairs / p->group;
    uint32_t head = item->kv_head * p->group + pair % p->half_pairs % p->group;
    struct mass_row row = {};
    row.used = token < p->half_tokens;
    token += half * p->half_tokens;
    row.used = row.used && token < (uint32_t)item->tokens;
    if (row.used) {
        row.index = (size_t)(item->row + token) * p->num_q_heads + head;
        row.position = p->positions[item->row + token];
        row.lse_log2 = p->lse[row.index] * LOG2_E;
    }
    return row;
}

static __device__ bool mass_visible(const struct plan_item *item, int32_t t, int32_t c)
{
    return c <= t && (item->window == 0 || c > t - item->window || c < item->sink);
}

static __device__ float mass_weight(const struct mass_params *p, const struct plan_item *item,
                                    const struct mass_row *row, bool live, int32_t c, float score)
{
    bool seen = live && row->used && mass_visible(item, row->position, c);
    return seen ? exp2f(score * p->scale_log2 - row->lse_log2) : 0.0f;
}

/*
 * Sums over 16 pairs; lane (g, c) keeps those of page rows 8g + 2c and the next. In a fragment,
 * lane (g, c) has elements 2c, 2c + 1, 2c + 8, 2c + 9 of rows g (and g + 8) of both operands. Which
 * elements these are called is free as long as both operands agree: here they are 8c .. 8c + 7 of a
 * slab of 32, so that each lane loads 16 bytes for two steps.
 */
template <int D>
static __device__ void mass_rows(const struct mass_params *p, const struct plan_item *item,
                                 const struct kernels_page_ref *ref, uint32_t first_pair,
                                 float sums[2])
{
    const int slabs = D / 32;
    uint32_t lane = threadIdx.x % WARP;
    uint32_t g = lane / 4;
    uint32_t c = lane % 4;
    struct mass_row rows[2] = {row_of(p, item, first_pair + g),
                               row_of(p, item, first_pair + g + 8)};
    const uint16_t *q = p->q + (size_t)ref->variant * p->rows * p->num_q_heads * D + c * UNIT;
    const uint16_t *k = (const uint16_t *)(p->pages + (size_t)ref->page * (RK_PAGE_TOKENS * D * 4));
    const int32_t *at = ref->positions >= 0 ? p->explicit_positions[ref->positions] : NULL;

    uint4 a[slabs][2];
#pragma unroll
    for (int s = 0; s < slabs; s++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            a[s][i] = rows[i].used ? __ldg((const uint4 *)(q + rows[i].index * D + s * 32))
                                   : make_uint4(0, 0, 0, 0);
        }
    }
#pragma unroll 2
    for (uint32_t n = 0; n < RK_PAGE_TOKENS / 8; n++) {
        float score[4] = {0, 0, 0, 0};
        const uint16_t *k_row = k + (n * 8 + g) * D + c * UNIT;
#pragma unroll
        for (int s = 0; s < slabs; s++) {
            uint4 b = *(const uint4 *)(k_row + s * 32);
            const uint32_t a_first[4] = {a[s][0].x, a[s][1].x, a[s][0].y, a[s][1].y};
            const uint32_t a_second[4] = {a[s][0].z, a[s][1].z, a[s][0].w, a[s][1].w};
            multiply_bf16(score, a_first, b.x, b.y);
            multiply_bf16(score, a_second, b.z, b.w);
        }
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t r = n * 8 + 2 * c + i;
            int32_t position = at ? at[r] : ref->position + (int32_t)r;
            bool live = ref->live >> r & 1;
            float sum = mass_weight(p, item, &rows[0], live, position, score[i]) +
                        mass_weight(p, item, &rows[1], live, position, score[2 + i]);
            for (int step = 4; step < WARP; step *= 2) {
                sum += __shfl_xor_sync(ALL_LANES, sum, step);
            }
            sums[i] += g == n ? sum : 0.0f;
        }
    }
}

template <int D>
static __device__ void mass_page(const struct mass_params *p, const struct plan_item *item,
                                 int32_t index)
{
    const struct kernels_page_ref ref = p->refs[index];
    float sums[2] = {0, 0};
    for (uint32_t pair = 0; pair < p->tile_halves * p->half_pairs; pair += 16) {
        mass_rows<D>(p, item, &ref, pair, sums);
    }
    float *mass = p->mass + (size_t)index * RK_PAGE_TOKENS + threadIdx.x % WARP * 2;
    atomicAdd(mass, sums[0]);
    atomicAdd(mass + 1, sums[1]);
}

template <int D>
static __global__ void __launch_bounds__(MASS_THREADS) mass_kernel(const struct mass_params p)
{
    const uint32_t warps = MASS_THREADS / WARP * MASS_SLICES;
    uint32_t turn = blockIdx.y * (MASS_THREADS / WARP) + threadIdx.x / WARP;
    for (int32_t i = (int32_t)blockIdx.x; i >= 0; i = p.items[i].next) {
        const struct plan_item *item = &p.items[i];
        if (item->tokens == 0) {
            continue;
        }
        for (int range = 0; range < PLAN_RANGES; range++) {
            for (int32_t j = 0; j < item->count[range]; j++) {
                if (turn == 0) {
                    mass_page<D>(&p, item, item->first[range] + j);
                }
                turn = turn == 0 ? warps - 1 : turn - 1;
            }
        }
    }
}

enum rk_status cuda_mass(struct kernels_device *device, const struct kernels_paged_attention *call,
                         float *mass, kernels_stream stream, struct rk_error *error)
{
    const struct kernels_plan *plan = call->plan;
    const struct kernels_plan_options *options = &plan->options;
    cuda_use(device);
    cudaError_t zeroed = cudaMemsetAsync(
        mass, 0, (size_t)plan->num_refs * RK_PAGE_TOKENS * sizeof(*mass), (cudaStream_t)stream);
    if (zeroed != cudaSuccess) {
        return cuda_check(zeroed, "zeroing the attention mass", error);
    }
    bool prefill = options->kind == KERNELS_PLAN_PREFILL;
    const uint8_t *block = plan->device_block;
    struct mass_params p = {};
    p.items = (const struct plan_item *)(block + plan->sections.items);
    p.refs = (const struct kernels_page_ref *)(block + plan->sections.refs);
    p.explicit_positions =
        (const int32_t(*)[RK_PAGE_TOKENS])(block + plan->sections.explicit_positions);
    p.pages = (const uint8_t *)call->pool->pages;
    p.q = (const uint16_t *)call->q;
    p.positions = call->positions;
    p.lse = call->lse;
    p.mass = mass;
    p.scale_log2 = call->scale * LOG2_E;
    p.rows = plan->rows;
    p.num_q_heads = options->num_kv_heads * options->group;
    p.group = options->group;
    p.tile_halves = prefill ? 2 : 1;
    p.half_pairs = prefill ? TILE_ROWS_PREFILL / 2 : TILE_ROWS_DECODE;
    p.half_tokens = prefill ? tokens_per_half(p.group) : tokens_per_tile(options->kind, p.group);
    dim3 grid(device->processors, MASS_SLICES);
    auto kernel = options->head_dim == 64 ? mass_kernel<64> : mass_kernel<128>;
    kernel<<<grid, MASS_THREADS, 0, (cudaStream_t)stream>>>(p);
    return cuda_check(cudaGetLastError(), "launching attention_mass", error);
}
