/*
 * paged_reference: SegPagedAttention as its definition reads, in f64 and on
 * plain host memory. The CPU device runs it; tests of GPU kernels compare with
 * its doubles.
 *
 * Threads: OpenMP, over rows; results do not depend on how many.
 */
#ifndef KERNELS_CPU_PAGED_REFERENCE_H
#define KERNELS_CPU_PAGED_REFERENCE_H

#include "kernels/device.h"

/* Shapes as in device.h; all on the host. The batch is trusted. */
struct paged_reference {
    const struct kernels_batch *batch;
    uint32_t num_kv_heads;
    uint32_t group;
    uint32_t head_dim; /* at most 128 */
    enum kernels_page_format format;
    const void *pages;   /* of the pool */
    const float *scales; /* of the pool; NULL for bf16 */
    const uint16_t *q;   /* bf16 [num_variants][rows][num_q_heads][head_dim] */
    float scale;
};

/* Where to; any may be NULL. */
struct paged_reference_result {
    double *out;        /* [rows][num_q_heads][head_dim] */
    double *lse;        /* [rows][num_q_heads] */
    uint16_t *out_bf16; /* the same, rounded */
    float *lse_f32;
};

void paged_attention_reference(const struct paged_reference *call,
                               const struct paged_reference_result *result);

/* mass[i][r] of kernels_attention_mass(), [num_refs][64]; lse: [rows][num_q_heads]. */
void attention_mass_reference(const struct paged_reference *call, const float *lse, double *mass);

/* fp8 e4m3: 448 at most, no infinities, two NaN. */
double paged_reference_e4m3(uint8_t byte);

#endif
