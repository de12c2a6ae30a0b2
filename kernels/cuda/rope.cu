/*
 * rope: keys are rotated and appended to pages, queries rotated to each base
 * that pages stand at. Gives the same bits as kernels/cpu/pages_reference.c.
 */
#include "kernels/cuda/cuda_internal.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#define WARP       32
#define ALL_LANES  0xffffffffu
#define CHUNK      16 /* bytes of one access */
#define UNIT       8  /* bf16 elements of one access */
#define E4M3_LARGE 448.0f

/* ---- rotation ---- */

struct unit_f32 {
    float x[UNIT];
};

static __device__ struct unit_f32 unit_from_bf16(uint4 raw)
{
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    struct unit_f32 unit;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unit.x[2 * i] = __uint_as_float(words[i] << 16);
        unit.x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return unit;
}

static __device__ uint32_t pair_to_bf16(float low, float high)
{
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof(word));
    return word;
}

static __device__ uint4 unit_to_bf16(const struct unit_f32 *unit)
{
    const float *x = unit->x;
    return make_uint4(pair_to_bf16(x[0], x[1]), pair_to_bf16(x[2], x[3]), pair_to_bf16(x[4], x[5]),
                      pair_to_bf16(x[6], x[7]));
}

static __device__ struct unit_f32 unit_load(const float *from)
{
    float4 low = __ldg((const float4 *)from);
    float4 high = __ldg((const float4 *)from + 1);
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

/* Element i of `low` pairs with element i of `high`, half a row further on. Not contracted, so
 * that the reference gives the same bits. */
static __device__ void rotate(struct unit_f32 *low, struct unit_f32 *high, const float *cosines,
                              const float *sines, bool back)
{
    struct unit_f32 c = unit_load(cosines);
    struct unit_f32 s = unit_load(sines);
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
        float sine = back ? -s.x[i] : s.x[i];
        float a = low->x[i];
        float b = high->x[i];
        low->x[i] = __fsub_rn(__fmul_rn(a, c.x[i]), __fmul_rn(b, sine));
        high->x[i] = __fadd_rn(__fmul_rn(b, c.x[i]), __fmul_rn(a, sine));
    }
}

/* ---- rope_append ---- */

#define APPEND_THREADS 256

struct append_params {
    uint8_t *pages;
    float *scales;
    const float *cosines;
    const float *sines;
    const uint16_t *k;
    const uint16_t *v;
    const int32_t *positions;
    const struct kernels_append_run *runs;
    uint32_t num_kv_heads;
};

/* Work of a run, cut alike for K and V: one unit in the lower half of a row and its partner in the
 * upper half. */
template <int D>
static __device__ void source_units(const struct append_params *p,
                                    const struct kernels_append_run *run, uint32_t work, bool keys,
                                    uint4 *ret_low, uint4 *ret_high)
{
    const uint32_t pairs = D / 2 / UNIT;
    size_t row = (size_t)run->row + work / pairs;
    const uint16_t *x = keys ? p->k : p->v;
    const uint4 *source =
        (const uint4 *)(x + (row * p->num_kv_heads + run->kv_head) * D) + work % pairs;
    *ret_low = __ldg(source);
    *ret_high = __ldg(source + pairs);
}

template <int D>
static __device__ void source_values(const struct append_params *p,
                                     const struct kernels_append_run *run, uint32_t work, bool keys,
                                     struct unit_f32 *ret_low, struct unit_f32 *ret_high)
{
    const uint32_t pairs = D / 2 / UNIT;
    uint4 low;
    uint4 high;
    source_units<D>(p, run, work, keys, &low, &high);
    *ret_low = unit_from_bf16(low);
    *ret_high = unit_from_bf16(high);
    if (keys) {
        size_t angle = (size_t)(p->positions[run->row + work / pairs] - run->base);
        size_t offset = angle * (D / 2) + work % pairs * UNIT;
        rotate(ret_low, ret_high, p->cosines + offset, p->sines + offset, false);
    }
}

/* A run that begins a page zeroes the rows after it. */
static __device__ void zero_rest(uint8_t *half, uint32_t begin_bytes, uint32_t end_bytes)
{
    uint4 *chunks = (uint4 *)half;
    for (uint32_t i = begin_bytes / CHUNK + threadIdx.x; i < end_bytes / CHUNK;
         i += APPEND_THREADS) {
        chunks[i] = make_uint4(0, 0, 0, 0);
    }
}

template <int D>
static __global__ void __launch_bounds__(APPEND_THREADS)
    append_bf16_kernel(const struct append_params p)
{
    const uint32_t pairs = D / 2 / UNIT;
    const uint32_t half_bytes = RK_PAGE_TOKENS * D * 2;
    const struct kernels_append_run run = p.runs[blockIdx.x];
    uint8_t *page = p.pages + (size_t)run.page * (2 * half_bytes);

    for (uint32_t work = threadIdx.x; work < run.count * pairs; work += APPEND_THREADS) {
        struct unit_f32 low;
        struct unit_f32 high;
        uint4 v_low;
        uint4 v_high;
        source_units<D>(&p, &run, work, false, &v_low, &v_high);
        source_values<D>(&p, &run, work, true, &low, &high);
        size_t row = (size_t)run.page_row + work / pairs;
        uint4 *k = (uint4 *)(page + row * (D * 2)) + work % pairs;
        uint4 *v = (uint4 *)(page + half_bytes + row * (D * 2)) + work % pairs;
        k[0] = unit_to_bf16(&low);
        k[pairs] = unit_to_bf16(&high);
        v[0] = v_low;
        v[pairs] = v_high;
    }
    if (run.page_row == 0) {
        zero_rest(page, run.count * (D * 2), half_bytes);
        zero_rest(page + half_bytes, run.count * (D * 2), half_bytes);
    }
}

static __device__ uint32_t quantised(float x, float scale)
{
    return scale > 0 ? __nv_cvt_float_to_fp8(__fdiv_rn(x, scale), __NV_SATFINITE, __NV_E4M3) : 0;
}

static __device__ float value_of(uint32_t byte)
{
    return __half2float(__half(__nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)byte, __NV_E4M3)));
}

static __device__ uint2 unit_quantised(const struct unit_f32 *unit, float scale)
{
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
        words[i / 4] |= quantised(unit->x[i], scale) << (8 * (i % 4));
    }
    return make_uint2(words[0], words[1]);
}

/* bytes: a multiple of 4. */
static __device__ void requantise(uint8_t *half, uint32_t bytes, float from, float to)
{
    uint32_t *words = (uint32_t *)half;
    for (uint32_t i = threadIdx.x; i < bytes / 4; i += APPEND_THREADS) {
        uint32_t old = words[i];
        uint32_t word = 0;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            word |= quantised(__fmul_rn(value_of(old >> (8 * b) & 0xff), from), to) << (8 * b);
        }
        words[i] = word;
    }
}

/* The largest of all threads' values, none of which is negative, for every thread. */
static __device__ float block_max(float value, float *shared)
{
    for (int step = WARP / 2; step > 0; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    }
    if (threadIdx.x % WARP == 0) {
        shared[threadIdx.x / WARP] = value;
    }
    __syncthreads();
    value = shared[threadIdx.x % (APPEND_THREADS / WARP)];
    for (int step = APPEND_THREADS / WARP / 2; step > 0; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    }
    return value;
}

/* K or V of one run. Sources are read and rotated twice: they are in the cache, and registers for
 * a whole page are not there. */
template <int D>
static __device__ void append_e4m3_half(const struct append_params *p,
                                        const struct kernels_append_run *run, bool keys,
                                        uint8_t *half, float *scale_slot, float *shared)
{
    const uint32_t pairs = D / 2 / UNIT;
    struct unit_f32 low;
    struct unit_f32 high;
    float before = *scale_slot;
    float max = 0;
    for (uint32_t work = threadIdx.x; work < run->count * pairs; work += APPEND_THREADS) {
        source_values<D>(p, run, work, keys, &low, &high);
#pragma unroll
        for (int i = 0; i < UNIT; i++) {
            max = fmaxf(max, fmaxf(fabsf(low.x[i]), fabsf(high.x[i])));
        }
    }
    /* Its barrier is also what keeps the new scale from being read as the one before. */
    float needed = __fdiv_rn(block_max(max, shared), E4M3_LARGE);
    float scale = before;
    if (run->page_row == 0) {
        scale = needed;
        zero_rest(half, run->count * D, RK_PAGE_TOKENS * D);
    } else if (needed > before) {
        scale = needed;
        requantise(half, run->page_row * D, before, needed);
    }
    if (threadIdx.x == 0) {
        *scale_slot = scale;
    }
    for (uint32_t work = threadIdx.x; work < run->count * pairs; work += APPEND_THREADS) {
        source_values<D>(p, run, work, keys, &low, &high);
        uint2 *row = (uint2 *)(half + (run->page_row + work / pairs) * D) + work % pairs;
        row[0] = unit_quantised(&low, scale);
        row[pairs] = unit_quantised(&high, scale);
    }
}

template <int D>
static __global__ void __launch_bounds__(APPEND_THREADS)
    append_e4m3_kernel(const struct append_params p)
{
    __shared__ float shared[2][APPEND_THREADS / WARP];
    const uint32_t half_bytes = RK_PAGE_TOKENS * D;
    const struct kernels_append_run run = p.runs[blockIdx.x];
    uint8_t *page = p.pages + (size_t)run.page * (2 * half_bytes);
    float *scales = p.scales + (size_t)run.page * 2;
    append_e4m3_half<D>(&p, &run, true, page, scales, shared[0]);
    append_e4m3_half<D>(&p, &run, false, page + half_bytes, scales + 1, shared[1]);
}

enum rk_status cuda_rope_append(struct kernels_device *device,
                                const struct kernels_rope_append *call, kernels_stream stream,
                                struct rk_error *error)
{
    cuda_use(device);
    if (call->num_runs == 0) {
        return RK_OK;
    }
    struct append_params p = {};
    p.pages = (uint8_t *)call->pool->pages;
    p.scales = call->pool->scales;
    p.cosines = call->rope->cos;
    p.sines = call->rope->sin;
    p.k = (const uint16_t *)call->k;
    p.v = (const uint16_t *)call->v;
    p.positions = call->positions;
    p.runs = call->runs;
    p.num_kv_heads = call->num_kv_heads;
    bool bf16 = call->pool->options.format == KERNELS_PAGE_BF16;
    auto kernel = call->rope->head_dim == 64
                      ? (bf16 ? append_bf16_kernel<64> : append_e4m3_kernel<64>)
                      : (bf16 ? append_bf16_kernel<128> : append_e4m3_kernel<128>);
    kernel<<<call->num_runs, APPEND_THREADS, 0, (cudaStream_t)stream>>>(p);
    return cuda_check(cudaGetLastError(), "launching rope_append", error);
}

/* ---- rope_queries ---- */

#define QUERY_THREADS 256

struct query_params {
    const float *cosines;
    const float *sines;
    const uint16_t *q;
    const int32_t *positions;
    const int32_t *bases;
    uint16_t *out;
    uint32_t num_variants;
    uint32_t num_q_heads;
    uint64_t work; /* rows * num_q_heads * pairs of units in a row */
};

/* The copies of one query are made by blocks that differ in y only; q comes from the cache then. */
template <int D>
static __global__ void __launch_bounds__(QUERY_THREADS) queries_kernel(const struct query_params p)
{
    const uint32_t pairs = D / 2 / UNIT;
    uint64_t work = (uint64_t)blockIdx.x * QUERY_THREADS + threadIdx.x;
    if (work >= p.work) {
        return;
    }
    uint64_t head = work / pairs; /* row * num_q_heads + head */
    uint32_t pair = work % pairs;
    int32_t position = p.positions[head / p.num_q_heads];
    const uint4 *source = (const uint4 *)(p.q + head * D) + pair;
    uint4 raw_low = __ldg(source);
    uint4 raw_high = __ldg(source + pairs);
    for (uint32_t v = blockIdx.y; v < p.num_variants; v += gridDim.y) {
        int64_t angle = (int64_t)position - p.bases[v];
        size_t offset = (size_t)(angle < 0 ? -angle : angle) * (D / 2) + pair * UNIT;
        struct unit_f32 low = unit_from_bf16(raw_low);
        struct unit_f32 high = unit_from_bf16(raw_high);
        rotate(&low, &high, p.cosines + offset, p.sines + offset, angle < 0);
        uint4 *out = (uint4 *)(p.out + (v * (p.work / pairs) + head) * D) + pair;
        out[0] = unit_to_bf16(&low);
        out[pairs] = unit_to_bf16(&high);
    }
}

enum rk_status cuda_rope_queries(struct kernels_device *device,
                                 const struct kernels_rope_queries *call, kernels_stream stream,
                                 struct rk_error *error)
{
    cuda_use(device);
    uint32_t d = call->rope->head_dim;
    struct query_params p = {};
    p.cosines = call->rope->cos;
    p.sines = call->rope->sin;
    p.q = (const uint16_t *)call->q;
    p.positions = call->positions;
    p.bases = call->bases;
    p.out = (uint16_t *)call->out;
    p.num_variants = call->num_variants;
    p.num_q_heads = call->num_q_heads;
    p.work = (uint64_t)call->rows * call->num_q_heads * (d / 2 / UNIT);
    if (p.work == 0 || p.num_variants == 0) {
        return RK_OK;
    }
    dim3 grid((uint32_t)((p.work + QUERY_THREADS - 1) / QUERY_THREADS),
              p.num_variants < 1024 ? p.num_variants : 1024);
    auto kernel = d == 64 ? queries_kernel<64> : queries_kernel<128>;
    kernel<<<grid, QUERY_THREADS, 0, (cudaStream_t)stream>>>(p);
    return cuda_check(cudaGetLastError(), "launching rope_queries", error);
}
