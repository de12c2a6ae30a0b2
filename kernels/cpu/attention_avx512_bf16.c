/*
 * attention_avx512_bf16: products of bf16 pairs (vdpbf16ps).
 */
#include "kernels/cpu/vector_avx512.h"

#include <string.h>

#define ATTENTION      attention_avx512_bf16
#define OPERAND_PAIRS  1
#define V_EXP2(x)      exp2_short(x)
#define V_OPERANDS(p)  _mm512_loadu_ps(p)
#define V_BROADCAST(p) broadcast_pair(p)
#define V_ACCUMULATE(c, a, b)                                                                      \
    _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b))
#define V_STORE_BF16(p, v) _mm256_storeu_si256((__m256i *)(p), (__m256i)_mm512_cvtneps_pbh(v))

static inline vector broadcast_pair(const uint16_t *p)
{
    int32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}

/* Two rows of V -> pairs of one column each; `keep` has zeros for a row that is not live. */
static inline void pack_pairs(const uint16_t *even, const uint16_t *odd, uint32_t head_dim,
                              uint32_t keep, uint16_t *to)
{
    __m512i mask = _mm512_set1_epi32((int)keep);
    for (uint32_t i = 0; i < head_dim; i += LANES) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(even + i)));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(odd + i)));
        __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        _mm512_storeu_si512(to + (size_t)2 * i, _mm512_and_si512(pairs, mask));
    }
}

#include "kernels/cpu/attention_tile.h"
