/*
 * kernels_support: random numbers and rotation tables for the tests of kernels.
 */
#ifndef TESTS_KERNELS_KERNELS_SUPPORT_H
#define TESTS_KERNELS_KERNELS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "common/base/alloc.h"
#include "kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t support_random_state;

/* REDKNOT_TEST_SEED repeats a run. */
__attribute__((unused)) static void support_seed(void)
{
    const char *given = getenv("REDKNOT_TEST_SEED");
    support_random_state =
        given ? strtoull(given, NULL, 10) : (uint64_t)time(NULL) * 2654435761u + 1;
    printf("seed %llu (REDKNOT_TEST_SEED)\n", (unsigned long long)support_random_state);
}

__attribute__((unused)) static uint32_t support_random(void)
{
    support_random_state = support_random_state * 6364136223846793005u + 1442695040888963407u;
    uint64_t x = support_random_state;
    return (uint32_t)((x >> 22 ^ x) >> (22 + (x >> 61)));
}

__attribute__((unused)) static uint32_t support_below(uint32_t limit)
{
    return support_random() % limit;
}

/* Uniform in [-1, 1). */
__attribute__((unused)) static float support_real(void)
{
    return (float)support_random() / 2147483648.0f - 1.0f;
}

__attribute__((unused)) static float *support_reals(size_t count)
{
    float *values = rk_alloc_aligned(64, count * sizeof(*values));
    assert_non_null(values);
    for (size_t i = 0; i < count; i++) {
        values[i] = support_real();
    }
    return values;
}

__attribute__((unused)) static uint16_t support_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__attribute__((unused)) static float support_from_bf16(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof(result));
    return result;
}

__attribute__((unused)) static float support_round(enum kernels_mode mode, float value)
{
    return mode == KERNELS_F32 ? value : support_from_bf16(support_to_bf16(value));
}

/* The caller frees cos and sin. */
__attribute__((unused)) static struct kernels_rope support_rope(uint32_t head_dim,
                                                                uint32_t positions_max)
{
    uint32_t half = head_dim / 2;
    float *cosines = rk_alloc_aligned(64, (size_t)positions_max * half * sizeof(float));
    float *sines = rk_alloc_aligned(64, (size_t)positions_max * half * sizeof(float));
    assert_non_null(cosines);
    assert_non_null(sines);
    for (uint32_t p = 0; p < positions_max; p++) {
        for (uint32_t i = 0; i < half; i++) {
            double angle = p * pow(10000.0, -2.0 * i / head_dim);
            cosines[(size_t)p * half + i] = (float)cos(angle);
            sines[(size_t)p * half + i] = (float)sin(angle);
        }
    }
    return (struct kernels_rope){
        .cos = cosines, .sin = sines, .positions_max = positions_max, .head_dim = head_dim};
}

__attribute__((unused)) static void support_rope_free(struct kernels_rope *rope)
{
    union {
        const float *in;
        void *out;
    } cosines = {.in = rope->cos}, sines = {.in = rope->sin};
    rk_free(cosines.out);
    rk_free(sines.out);
}

__attribute__((unused)) static struct kernels *support_kernels(enum kernels_mode mode,
                                                               enum kernels_isa isa,
                                                               uint32_t threads)
{
    struct kernels_options options = {.mode = mode, .isa = isa, .threads = threads};
    struct kernels *kernels = NULL;
    struct rk_error error = {.status = RK_OK};
    if (kernels_create(&options, &kernels, &error) != RK_OK) {
        print_error("kernels_create: %s\n", error.text);
    }
    assert_non_null(kernels);
    return kernels;
}

#endif
