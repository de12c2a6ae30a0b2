/*
 * matmul_avx512_bf16: bf16 products by vdpbf16ps, for CPUs that run it at full
 * rate (AMD from Zen 4 on).
 */
#include "kernels/cpu/cpu_internal.h"

#include <immintrin.h>

#define LANES     16
#define COLUMNS   64 /* of a block */
#define VECTORS   (COLUMNS / LANES)
#define ROWS_MANY 12 /* x 2 vectors: 24 accumulators */
#define ALWAYS    static inline __attribute__((always_inline))
#define UNROLL    _Pragma("GCC unroll 16")

#define MATMUL      matmul_avx512_bf16
#define MATMUL_NAME "avx512_bf16"

typedef uint16_t operand;

static void round_row(const struct kernels *kernels, const float *x, uint32_t k, operand *to)
{
    kernels->ops->round_bf16(x, k, to);
}

ALWAYS void accumulate(uint32_t rows, uint32_t vectors, const operand *x, uint32_t k,
                       const uint16_t *weights, __m512 acc[ROWS_MANY][VECTORS])
{
    __m512i columns[VECTORS];
    UNROLL
    for (uint32_t c = 0; c < vectors; c++) {
        columns[c] = _mm512_loadu_si512(weights + (size_t)c * LANES * 2);
    }
    UNROLL
    for (uint32_t r = 0; r < rows; r++) {
        int32_t pair;
        memcpy(&pair, x + (size_t)r * k, sizeof(pair));
        __m512i value = _mm512_set1_epi32(pair);
        UNROLL
        for (uint32_t c = 0; c < vectors; c++) {
            acc[r][c] = _mm512_dpbf16_ps(acc[r][c], (__m512bh)value, (__m512bh)columns[c]);
        }
    }
}

#include "kernels/cpu/matmul_tile.h"
