#include "kernels/cpu/pages_reference.h"

#include "common/base/hash.h"
#include "kernels/cpu/cpu_internal.h"

#define HEAD_DIM_MAX 128

static void rotate(const uint16_t *x, const struct kernels_device_rope *rope, int64_t angle,
                   float *ret_y)
{
    uint32_t half = rope->head_dim / 2;
    size_t offset = (size_t)(angle < 0 ? -angle : angle) * half;
    for (uint32_t i = 0; i < half; i++) {
        float c = rope->cos[offset + i];
        float s = angle < 0 ? -rope->sin[offset + i] : rope->sin[offset + i];
        float a = f32_from_bf16(x[i]);
        float b = f32_from_bf16(x[i + half]);
        ret_y[i] = a * c - b * s;
        ret_y[i + half] = b * c + a * s;
    }
}

/* The source row of a run's row i, as f32: keys rotated, values as they are. */
static void source_row(const struct kernels_rope_append *call, const struct kernels_append_run *run,
                       int32_t i, bool keys, float *ret_x)
{
    uint32_t d = call->rope->head_dim;
    size_t row = (size_t)run->row + (size_t)i;
    size_t offset = (row * call->num_kv_heads + (size_t)run->kv_head) * d;
    if (keys) {
        rotate((const uint16_t *)call->k + offset, call->rope,
               (int64_t)call->positions[row] - run->base, ret_x);
        return;
    }
    for (uint32_t e = 0; e < d; e++) {
        ret_x[e] = f32_from_bf16(((const uint16_t *)call->v)[offset + e]);
    }
}

/* One half of a page, K or V: the run's rows, then zeros if it begins the page. */
static void append_bf16(const struct kernels_rope_append *call,
                        const struct kernels_append_run *run, bool keys, uint16_t *half)
{
    uint32_t d = call->rope->head_dim;
    float x[HEAD_DIM_MAX];
    for (int32_t i = 0; i < run->count; i++) {
        source_row(call, run, i, keys, x);
        for (uint32_t e = 0; e < d; e++) {
            half[(size_t)(run->page_row + i) * d + e] = bf16_from_f32(x[e]);
        }
    }
    if (run->page_row == 0) {
        size_t rest = (size_t)(RK_PAGE_TOKENS - run->count) * d;
        memset(half + (size_t)run->count * d, 0, rest * sizeof(*half));
    }
}

static uint8_t quantised(float x, float scale)
{
    return scale > 0 ? e4m3_from_f32(x / scale) : 0;
}

static void append_e4m3(const struct kernels_rope_append *call,
                        const struct kernels_append_run *run, bool keys, uint8_t *half,
                        float *scale)
{
    uint32_t d = call->rope->head_dim;
    size_t begin = (size_t)run->page_row * d;
    float x[HEAD_DIM_MAX];
    float max = 0;
    for (int32_t i = 0; i < run->count; i++) {
        source_row(call, run, i, keys, x);
        for (uint32_t e = 0; e < d; e++) {
            max = fmaxf(max, fabsf(x[e]));
        }
    }
    float needed = max / E4M3_MAX;
    if (run->page_row == 0) {
        *scale = needed;
        memset(half, 0, (size_t)RK_PAGE_TOKENS * d);
    } else if (needed > *scale) {
        for (size_t e = 0; e < begin; e++) {
            half[e] = quantised(e4m3_to_f32(half[e]) * *scale, needed);
        }
        *scale = needed;
    }
    for (int32_t i = 0; i < run->count; i++) {
        source_row(call, run, i, keys, x);
        for (uint32_t e = 0; e < d; e++) {
            half[begin + (size_t)i * d + e] = quantised(x[e], *scale);
        }
    }
}

enum rk_status pages_reference_rope_append(struct kernels_device *device,
                                           const struct kernels_rope_append *call,
                                           kernels_stream stream, struct rk_error *error)
{
    (void)device, (void)stream, (void)error;
    const struct kernels_pool *pool = call->pool;
    for (uint32_t i = 0; i < call->num_runs; i++) {
        const struct kernels_append_run *run = &call->runs[i];
        uint8_t *page = (uint8_t *)pool->pages + (size_t)run->page * pool->page_bytes;
        for (uint32_t part = 0; part < 2; part++) {
            uint8_t *half = page + part * (pool->page_bytes / 2);
            if (pool->options.format == KERNELS_PAGE_BF16) {
                append_bf16(call, run, part == 0, (uint16_t *)(void *)half);
            } else {
                append_e4m3(call, run, part == 0, half,
                            &pool->scales[(size_t)run->page * 2 + part]);
            }
        }
    }
    return RK_OK;
}

enum rk_status pages_reference_rope_queries(struct kernels_device *device,
                                            const struct kernels_rope_queries *call,
                                            kernels_stream stream, struct rk_error *error)
{
    (void)device, (void)stream, (void)error;
    uint32_t d = call->rope->head_dim;
    uint16_t *out = call->out;
    float y[HEAD_DIM_MAX] = {0};
    for (uint32_t v = 0; v < call->num_variants; v++) {
        for (uint32_t row = 0; row < call->rows; row++) {
            int64_t angle = (int64_t)call->positions[row] - call->bases[v];
            for (uint32_t h = 0; h < call->num_q_heads; h++) {
                size_t offset = ((size_t)row * call->num_q_heads + h) * d;
                rotate((const uint16_t *)call->q + offset, call->rope, angle, y);
                for (uint32_t e = 0; e < d; e++) {
                    *out++ = bf16_from_f32(y[e]);
                }
            }
        }
    }
    return RK_OK;
}

enum rk_status pages_reference_gather(struct kernels_device *device,
                                      const struct kernels_pool *pool, const int32_t *pages,
                                      uint32_t count, void *host, kernels_stream stream,
                                      struct rk_error *error)
{
    (void)device, (void)stream, (void)error;
    for (uint32_t i = 0; i < count; i++) {
        memcpy((uint8_t *)host + i * pool->page_bytes,
               (uint8_t *)pool->pages + (size_t)pages[i] * pool->page_bytes, pool->page_bytes);
    }
    return RK_OK;
}

enum rk_status pages_reference_scatter(struct kernels_device *device,
                                       const struct kernels_pool *pool, const int32_t *pages,
                                       uint32_t count, const void *host, kernels_stream stream,
                                       struct rk_error *error)
{
    (void)device, (void)stream, (void)error;
    for (uint32_t i = 0; i < count; i++) {
        memcpy((uint8_t *)pool->pages + (size_t)pages[i] * pool->page_bytes,
               (const uint8_t *)host + i * pool->page_bytes, pool->page_bytes);
    }
    return RK_OK;
}

enum rk_status pages_reference_checksum(struct kernels_device *device,
                                        const struct kernels_pool *pool, const int32_t *pages,
                                        uint32_t count, uint64_t *sums, kernels_stream stream,
                                        struct rk_error *error)
{
    (void)device, (void)stream, (void)error;
    for (uint32_t i = 0; i < count; i++) {
        sums[i] = rk_hash_xxh3((const uint8_t *)pool->pages + (size_t)pages[i] * pool->page_bytes,
                               pool->page_bytes);
    }
    return RK_OK;
}
