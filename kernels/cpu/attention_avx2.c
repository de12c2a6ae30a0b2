/*
 * attention_avx2: products in f32; bf16 pages are widened when they are packed.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define ATTENTION     attention_avx2
#define OPERAND_PAIRS 0
#define LANES         8
#define GROUP_COLS    2
#define UNROLL_LANES  _Pragma("GCC unroll 8")

typedef __m256 vector;

#define V_LOAD(p)             _mm256_loadu_ps(p)
#define V_STORE(p, v)         _mm256_storeu_ps(p, v)
#define V_SET(x)              _mm256_set1_ps(x)
#define V_MUL(a, b)           _mm256_mul_ps(a, b)
#define V_ADD(a, b)           _mm256_add_ps(a, b)
#define V_SUB(a, b)           _mm256_sub_ps(a, b)
#define V_MAX(a, b)           _mm256_max_ps(a, b)
#define V_FMA(a, b, c)        _mm256_fmadd_ps(a, b, c)
#define V_OPERANDS(p)         _mm256_loadu_ps(p)
#define V_BROADCAST(p)        _mm256_set1_ps(*(p))
#define V_ACCUMULATE(c, a, b) _mm256_fmadd_ps(a, b, c)

static inline vector V_SELECT(uint64_t bits, vector a, vector b)
{
    __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i mask = _mm256_and_si256(_mm256_set1_epi32((int)(bits & 0xff)), lanes);
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(mask, lanes)));
}

static inline float V_SUM(vector v)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

static inline float V_MAX_OF(vector v)
{
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

/* 2^x within 2 ulp; 2^-126 stands for all below. Polynomial of Cephes' exp2f. */
static inline vector V_EXP2(vector x)
{
    x = V_MAX(x, V_SET(-126.0f));
    vector whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vector r = V_SUB(x, whole);
    vector p = V_SET(1.535336188319500e-4f);
    p = V_FMA(p, r, V_SET(1.339887440266574e-3f));
    p = V_FMA(p, r, V_SET(9.618437357674640e-3f));
    p = V_FMA(p, r, V_SET(5.550332471162809e-2f));
    p = V_FMA(p, r, V_SET(2.402264791363012e-1f));
    p = V_FMA(p, r, V_SET(6.931472028550421e-1f));
    p = V_FMA(p, r, V_SET(1.0f));
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return V_MUL(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

static inline vector V_ROUND_BF16(vector v)
{
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000)));
}

static inline void widen(vector words, float *even, float *odd)
{
    __m256i bits = _mm256_castps_si256(words);
    V_STORE(even, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    V_STORE(odd, _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000))));
}

/* Four rows -> by[j]: 128-bit lane l holds column 4 l + j of these rows. */
static inline void transpose_four(const uint32_t *in, size_t stride, __m256 by[4])
{
    __m256 r0 = _mm256_loadu_ps((const float *)in);
    __m256 r1 = _mm256_loadu_ps((const float *)(in + stride));
    __m256 r2 = _mm256_loadu_ps((const float *)(in + 2 * stride));
    __m256 r3 = _mm256_loadu_ps((const float *)(in + 3 * stride));
    __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
    __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
    __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
    __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
    by[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    by[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    by[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    by[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
}

static inline void transpose(const uint32_t *in, size_t stride, vector out[LANES])
{
    __m256 by[2][4];
    transpose_four(in, stride, by[0]);
    transpose_four(in + 4 * stride, stride, by[1]);
    _Pragma("GCC unroll 4") for (size_t j = 0; j < 4; j++)
    {
        out[j] = _mm256_permute2f128_ps(by[0][j], by[1][j], 0x20);
        out[4 + j] = _mm256_permute2f128_ps(by[0][j], by[1][j], 0x31);
    }
}

#include "kernels/cpu/attention_tile.h"
