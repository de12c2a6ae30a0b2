/*
 * matmul_avx512: bf16 products by f32 FMA. Intel's cores run vdpbf16ps at half
 * the rate of FMA; widening the weights in registers is twice as fast there, and
 * reads the same bytes.
 */
#include "kernels/cpu/cpu_internal.h"

#include <immintrin.h>

#define LANES     16
#define COLUMNS   64 /* of a block */
#define VECTORS   (COLUMNS / LANES)
#define ROWS_MANY 12 /* x 2 vectors: 24 accumulators */
#define ALWAYS    static inline __attribute__((always_inline))
#define UNROLL    _Pragma("GCC unroll 16")

#define MATMUL      matmul_avx512
#define MATMUL_NAME "avx512_widened_bf16"

typedef float operand; /* rounded to bf16 */

static void round_row(const struct kernels *kernels, const float *x, uint32_t k, operand *to)
{
    (void)kernels;
    for (uint32_t i = 0; i < k; i++) {
        to[i] = f32_from_bf16(bf16_from_f32(x[i]));
    }
}

ALWAYS void accumulate(uint32_t rows, uint32_t vectors, const operand *x, uint32_t k,
                       const uint16_t *weights, __m512 acc[ROWS_MANY][VECTORS])
{
    __m512i high = _mm512_set1_epi32((int)0xffff0000);
    __m512 first[VECTORS];
    __m512 second[VECTORS];
    UNROLL
    for (uint32_t c = 0; c < vectors; c++) {
        __m512i pairs = _mm512_loadu_si512(weights + (size_t)c * LANES * 2);
        first[c] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        second[c] = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
    }
    UNROLL
    for (uint32_t r = 0; r < rows; r++) {
        __m512 value = _mm512_set1_ps(x[(size_t)r * k]);
        UNROLL
        for (uint32_t c = 0; c < vectors; c++) {
            acc[r][c] = _mm512_fmadd_ps(value, first[c], acc[r][c]);
        }
        value = _mm512_set1_ps(x[(size_t)r * k + 1]);
        UNROLL
        for (uint32_t c = 0; c < vectors; c++) {
            acc[r][c] = _mm512_fmadd_ps(value, second[c], acc[r][c]);
        }
    }
}

#include "kernels/cpu/matmul_tile.h"
