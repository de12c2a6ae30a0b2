/*
 * dequant: blocks of a ggml tensor type to f32.
 *
 * The arithmetic is that of gguf-py: product and sum are rounded separately,
 * so this file is compiled without contraction to fused multiply-add.
 * Pure, any thread. The source needs no alignment.
 */
#ifndef WORKER_MODEL_DEQUANT_INTERNAL_H
#define WORKER_MODEL_DEQUANT_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct dequant {
    uint32_t type; /* of ggml */
    const char *name;
    uint32_t block_elements;
    uint32_t block_bytes;
    /* elements is a multiple of block_elements. */
    void (*row)(const uint8_t *restrict source, size_t elements, float *restrict out);
};

/* NULL: a type that we do not read. */
const struct dequant *dequant_find(uint32_t type);
/* No NaN, no infinity. */
bool dequant_finite(const float *values, size_t count);
/* The name of any ggml type, or "unknown". */
const char *dequant_type_name(uint32_t type);

#endif
