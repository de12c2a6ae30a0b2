/*
 * elementwise: the row operations, plain C that compilers vectorise.
 *
 * This file is built once per instruction set (see CMakeLists.txt), with
 * ELEMENTWISE_OPS naming the table. Sums keep 16 partial sums in a fixed order,
 * so that a row's result depends on nothing but the row.
 */
#include "kernels/cpu/cpu_internal.h"

#include <math.h>

#define LANES 16

static void rms_norm(const float *x, const float *weight, uint32_t width, float epsilon, float *y)
{
    float lanes[LANES] = {0};
    uint32_t whole = width - width % LANES;
    for (uint32_t i = 0; i < whole; i += LANES) {
        for (uint32_t j = 0; j < LANES; j++) {
            lanes[j] += x[i + j] * x[i + j];
        }
    }
    for (uint32_t i = whole; i < width; i++) {
        lanes[i - whole] += x[i] * x[i];
    }
    double sum = 0;
    for (uint32_t j = 0; j < LANES; j++) {
        sum += (double)lanes[j];
    }
    float factor = (float)(1.0 / sqrt(sum / width + (double)epsilon));
    for (uint32_t i = 0; i < width; i++) {
        y[i] = x[i] * factor * weight[i];
    }
}

/* exp within 2 ulp over the normal range; clamped to it outside, without branches. */
static inline float exp_f32(float x)
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    /* Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits. */
    float shifted = x * 1.44269504f + 12582912.0f;
    float whole = shifted - 12582912.0f;
    float r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof(power));
    return p * power;
}

static void silu_mul(float *restrict gate, const float *restrict up, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        float g = gate[i];
        gate[i] = g / (1.0f + exp_f32(-g)) * up[i];
    }
}

static void add(float *restrict x, const float *restrict y, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        x[i] += y[i];
    }
}

static void round_bf16(const float *restrict x, size_t count, uint16_t *restrict y)
{
    for (size_t i = 0; i < count; i++) {
        y[i] = bf16_from_f32(x[i]);
    }
}

static void rotate(const float *x, const float *cos, const float *sin, float sin_sign,
                   uint32_t head_dim, float *y)
{
    uint32_t half = head_dim / 2;
    for (uint32_t i = 0; i < half; i++) {
        float s = sin[i] * sin_sign;
        float a = x[i];
        float b = x[i + half];
        y[i] = a * cos[i] - b * s;
        y[i + half] = b * cos[i] + a * s;
    }
}

#define NAME(table)    NAME_OF(table)
#define NAME_OF(table) #table

const struct elementwise_ops ELEMENTWISE_OPS = {
    .name = &NAME(ELEMENTWISE_OPS)[sizeof("elementwise_") - 1],
    .rms_norm = rms_norm,
    .silu_mul = silu_mul,
    .add = add,
    .round_bf16 = round_bf16,
    .rotate = rotate,
};
