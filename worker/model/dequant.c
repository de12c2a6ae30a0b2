#include "worker/model/dequant_internal.h"

#include <string.h>

#define BLOCK 32 /* elements of every quantised type that we read */

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* Without branches, so that the compiler can vectorise the loop around it. The multiplication
 * by 2^112 moves the exponent bias from 15 to 127 and normalises subnormal numbers on the way. */
static inline float half_to_float(uint16_t half)
{
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    float scaled = float_of(magnitude) * 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &scaled, sizeof(bits));
    uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u | magnitude : bits;
    return float_of(special | (uint32_t)(half & 0x8000) << 16);
}

static inline uint16_t load16(const uint8_t *source)
{
    uint16_t value;
    memcpy(&value, source, sizeof(value));
    return value;
}

static void row_f32(const uint8_t *restrict source, size_t elements, float *restrict out)
{
    memcpy(out, source, elements * sizeof(*out));
}

static void row_f16(const uint8_t *restrict source, size_t elements, float *restrict out)
{
    for (size_t i = 0; i < elements; i++) {
        out[i] = half_to_float(load16(source + 2 * i));
    }
}

static void row_bf16(const uint8_t *restrict source, size_t elements, float *restrict out)
{
    for (size_t i = 0; i < elements; i++) {
        out[i] = float_of((uint32_t)load16(source + 2 * i) << 16);
    }
}

/* f16 scale, 16 bytes: low nibbles are elements 0..15, high nibbles 16..31; value - 8. */
static void row_q4_0(const uint8_t *restrict source, size_t elements, float *restrict out)
{
    for (size_t b = 0; b < elements / BLOCK; b++, source += 18, out += BLOCK) {
        float scale = half_to_float(load16(source));
        for (int i = 0; i < BLOCK / 2; i++) {
            out[i] = scale * (float)((source[2 + i] & 15) - 8);
            out[i + BLOCK / 2] = scale * (float)((source[2 + i] >> 4) - 8);
        }
    }
}

/* f16 scale, f16 minimum, 16 bytes of nibbles. */
static void row_q4_1(const uint8_t *restrict source, size_t elements, float *restrict out)
{
    for (size_t b = 0; b < elements / BLOCK; b++, source += 20, out += BLOCK) {
        float scale = half_to_float(load16(source));
        float minimum = half_to_float(load16(source + 2));
        for (int i = 0; i < BLOCK / 2; i++) {
            out[i] = scale * (float)(source[4 + i] & 15) + minimum;
            out[i + BLOCK / 2] = scale * (float)(source[4 + i] >> 4) + minimum;
        }
    }
}

/* f16 scale, 32 signed bytes. */
static void row_q8_0(const uint8_t *restrict source, size_t elements, float *restrict out)
{
    for (size_t b = 0; b < elements / BLOCK; b++, source += 34, out += BLOCK) {
        float scale = half_to_float(load16(source));
        for (int i = 0; i < BLOCK; i++) {
            out[i] = scale * (float)(int8_t)source[2 + i];
        }
    }
}

const struct dequant *dequant_find(uint32_t type)
{
    static const struct dequant types[] = {
        {0, "F32", 1, 4, row_f32},        {1, "F16", 1, 2, row_f16},
        {2, "Q4_0", BLOCK, 18, row_q4_0}, {3, "Q4_1", BLOCK, 20, row_q4_1},
        {8, "Q8_0", BLOCK, 34, row_q8_0}, {30, "BF16", 1, 2, row_bf16},
    };
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        if (types[i].type == type) {
            return &types[i];
        }
    }
    return NULL;
}

bool dequant_finite(const float *values, size_t count)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof(bits));
        bad |= (bits & 0x7f800000u) == 0x7f800000u; /* an exponent of all ones */
    }
    return bad == 0;
}

const char *dequant_type_name(uint32_t type)
{
    static const char *const names[] = {
        [0] = "F32",     [1] = "F16",      [2] = "Q4_0",   [3] = "Q4_1",    [6] = "Q5_0",
        [7] = "Q5_1",    [8] = "Q8_0",     [9] = "Q8_1",   [10] = "Q2_K",   [11] = "Q3_K",
        [12] = "Q4_K",   [13] = "Q5_K",    [14] = "Q6_K",  [15] = "Q8_K",   [16] = "IQ2_XXS",
        [17] = "IQ2_XS", [18] = "IQ3_XXS", [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S",
        [22] = "IQ2_S",  [23] = "IQ4_XS",  [24] = "I8",    [25] = "I16",    [26] = "I32",
        [27] = "I64",    [28] = "F64",     [29] = "IQ1_M", [30] = "BF16",   [34] = "TQ1_0",
        [35] = "TQ2_0",  [39] = "MXFP4",
    };
    if (type >= sizeof(names) / sizeof(names[0]) || !names[type]) {
        return "unknown";
    }
    return names[type];
}
