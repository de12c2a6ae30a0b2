/*
 * attention_avx512: products in f32; bf16 pages are widened when they are packed.
 */
#include "kernels/cpu/vector_avx512.h"

#define ATTENTION             attention_avx512
#define OPERAND_PAIRS         0
#define V_EXP2(x)             exp2_exact(x)
#define V_OPERANDS(p)         _mm512_loadu_ps(p)
#define V_BROADCAST(p)        _mm512_set1_ps(*(p))
#define V_ACCUMULATE(c, a, b) _mm512_fmadd_ps(a, b, c)

#include "kernels/cpu/attention_tile.h"
