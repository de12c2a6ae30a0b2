/*
 * pages_reference: what fills, moves and checks pages, in plain C.
 *
 * The ops of the CPU device; the kernels of kernels/cuda/pages.cu give the same
 * bits. Rotation is two f32 products and their sum, none of them contracted,
 * rounded once: to bf16, or to e4m3 after division by the page's scale.
 */
#ifndef KERNELS_CPU_PAGES_REFERENCE_H
#define KERNELS_CPU_PAGES_REFERENCE_H

#include "kernels/device_internal.h"

#include <math.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define E4M3_MAX 448.0f

static inline float e4m3_to_f32(uint8_t byte)
{
    int32_t exponent = byte >> 3 & 15;
    int32_t mantissa = byte & 7;
    float value;
    if ((byte & 0x7f) == 0x7f) {
        value = NAN;
    } else if (exponent == 0) {
        value = ldexpf((float)mantissa, -9);
    } else {
        value = ldexpf((float)(8 + mantissa), exponent - 10);
    }
    return byte & 0x80 ? -value : value;
}

/* Round to nearest even; what is above 448, infinity too, becomes 448; NaN stays NaN. */
static inline uint8_t e4m3_from_f32(float value)
{
    uint8_t sign = signbit(value) ? 0x80 : 0;
    float size = fabsf(value);
    if (isnan(value)) {
        return 0x7f;
    }
    if (size >= E4M3_MAX) {
        return sign | 0x7e;
    }
    if (size < 0x1p-6f) {
        /* In steps of 2^-9; 8 of them are the smallest normal number, and its byte is 8. */
        return sign | (uint8_t)lrintf(size * 0x1p9f);
    }
    uint32_t bits;
    memcpy(&bits, &size, sizeof(bits));
    bits += 0x7ffff + (bits >> 20 & 1);
    uint32_t byte = (bits >> 20) - ((127 - 7) << 3);
    return sign | (uint8_t)(byte > 0x7e ? 0x7e : byte);
}

enum rk_status pages_reference_rope_append(struct kernels_device *device,
                                           const struct kernels_rope_append *call,
                                           kernels_stream stream, struct rk_error *error);
enum rk_status pages_reference_rope_queries(struct kernels_device *device,
                                            const struct kernels_rope_queries *call,
                                            kernels_stream stream, struct rk_error *error);
enum rk_status pages_reference_gather(struct kernels_device *device,
                                      const struct kernels_pool *pool, const int32_t *pages,
                                      uint32_t count, void *host, kernels_stream stream,
                                      struct rk_error *error);
enum rk_status pages_reference_scatter(struct kernels_device *device,
                                       const struct kernels_pool *pool, const int32_t *pages,
                                       uint32_t count, const void *host, kernels_stream stream,
                                       struct rk_error *error);
enum rk_status pages_reference_checksum(struct kernels_device *device,
                                        const struct kernels_pool *pool, const int32_t *pages,
                                        uint32_t count, uint64_t *sums, kernels_stream stream,
                                        struct rk_error *error);

#ifdef __cplusplus
}
#endif

#endif
