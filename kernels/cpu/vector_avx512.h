/*
 * vector_avx512: the names that attention_tile.h needs, for AVX-512 (F, BW, DQ, VL).
 */
#ifndef KERNELS_CPU_VECTOR_AVX512_H
#define KERNELS_CPU_VECTOR_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#define LANES        16
#define GROUP_COLS   4
#define UNROLL_LANES _Pragma("GCC unroll 16")

typedef __m512 vector;

#define V_LOAD(p)               _mm512_loadu_ps(p)
#define V_STORE(p, v)           _mm512_storeu_ps(p, v)
#define V_SET(x)                _mm512_set1_ps(x)
#define V_MUL(a, b)             _mm512_mul_ps(a, b)
#define V_ADD(a, b)             _mm512_add_ps(a, b)
#define V_SUB(a, b)             _mm512_sub_ps(a, b)
#define V_MAX(a, b)             _mm512_max_ps(a, b)
#define V_FMA(a, b, c)          _mm512_fmadd_ps(a, b, c)
#define V_SELECT(bits, a, b)    _mm512_mask_blend_ps((__mmask16)(bits), b, a)
#define V_SUM(v)                _mm512_reduce_add_ps(v)
#define V_MAX_OF(v)             _mm512_reduce_max_ps(v)
#define V_STORE_WORDS(p, words) _mm512_storeu_si512(p, _mm512_castps_si512(words))

/* 2^x within 2 ulp; 0 below the range. Polynomial of Cephes' exp2f. */
static inline vector exp2_exact(vector x)
{
    vector whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vector r = V_SUB(x, whole);
    vector p = V_SET(1.535336188319500e-4f);
    p = V_FMA(p, r, V_SET(1.339887440266574e-3f));
    p = V_FMA(p, r, V_SET(9.618437357674640e-3f));
    p = V_FMA(p, r, V_SET(5.550332471162809e-2f));
    p = V_FMA(p, r, V_SET(2.402264791363012e-1f));
    p = V_FMA(p, r, V_SET(6.931472028550421e-1f));
    p = V_FMA(p, r, V_SET(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* The same within 3e-6, far below a rounding to bf16, and 1 at 0; a minimax fit on [0, 1). */
static inline vector exp2_short(vector x)
{
    vector r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vector p = V_SET(0.0134266851f);
    p = V_FMA(p, r, V_SET(0.0522424728f));
    p = V_FMA(p, r, V_SET(0.241280205f));
    p = V_FMA(p, r, V_SET(0.693044845f));
    p = V_FMA(p, r, V_SET(1.0f));
    return _mm512_scalef_ps(p, x); /* p times 2^floor(x) */
}

static inline vector V_ROUND_BF16(vector v)
{
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

static inline void widen(vector words, float *even, float *odd)
{
    __m512i bits = _mm512_castps_si512(words);
    V_STORE(even, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    V_STORE(odd, _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000))));
}

/* Four rows -> by[j]: 128-bit lane l holds column 4 l + j of these rows. */
static inline void transpose_four(const uint32_t *in, size_t stride, __m512 by[4])
{
    __m512 r0 = _mm512_loadu_ps(in);
    __m512 r1 = _mm512_loadu_ps(in + stride);
    __m512 r2 = _mm512_loadu_ps(in + 2 * stride);
    __m512 r3 = _mm512_loadu_ps(in + 3 * stride);
    __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
    __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
    __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
    __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
    by[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    by[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    by[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    by[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}

static inline void transpose(const uint32_t *in, size_t stride, vector out[LANES])
{
    __m512 by[4][4];
    _Pragma("GCC unroll 4") for (size_t g = 0; g < 4; g++)
    {
        transpose_four(in + 4 * g * stride, stride, by[g]);
    }
    _Pragma("GCC unroll 4") for (size_t j = 0; j < 4; j++)
    {
        __m512 even01 = _mm512_shuffle_f32x4(by[0][j], by[1][j], 0x88);
        __m512 even23 = _mm512_shuffle_f32x4(by[2][j], by[3][j], 0x88);
        __m512 odd01 = _mm512_shuffle_f32x4(by[0][j], by[1][j], 0xdd);
        __m512 odd23 = _mm512_shuffle_f32x4(by[2][j], by[3][j], 0xdd);
        out[j] = _mm512_shuffle_f32x4(even01, even23, 0x88);
        out[4 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
        out[8 + j] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
        out[12 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
}

#endif
