/*
 * Goal:   each tensor type gives the values that its definition says, bit for bit.
 * Method: blocks written by hand with answers computed by hand, at an odd address; all 65,536
 *         half-precision numbers against ldexp.
 */
#include "worker/model/dequant_internal.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

/* One block behind an odd address: tensors need not be aligned. */
static void block(uint32_t type, const uint8_t *bytes, size_t count, float out[32])
{
    uint8_t odd[64];
    const struct dequant *dequant = dequant_find(type);
    assert_non_null(dequant);
    assert_int_equal(dequant->block_bytes, count);
    memcpy(odd + 1, bytes, count);
    dequant->row(odd + 1, 32, out);
}

static void q4_0(void **state)
{
    uint8_t bytes[18] = {0x00, 0x38}; /* 0.5 */
    float out[32];
    (void)state;
    for (int i = 0; i < 16; i++) {
        bytes[2 + i] = (uint8_t)(i | (15 - i) << 4);
    }
    block(2, bytes, sizeof(bytes), out);
    for (int i = 0; i < 16; i++) {
        assert_true(out[i] == 0.5f * (float)(i - 8));
        assert_true(out[16 + i] == 0.5f * (float)(7 - i));
    }
}

static void q4_1(void **state)
{
    uint8_t bytes[20] = {0x00, 0x40, 0x00, 0xbc}; /* 2 and -1 */
    float out[32];
    (void)state;
    for (int i = 0; i < 16; i++) {
        bytes[4 + i] = (uint8_t)(i | (15 - i) << 4);
    }
    block(3, bytes, sizeof(bytes), out);
    for (int i = 0; i < 16; i++) {
        assert_true(out[i] == 2.0f * (float)i - 1.0f);
        assert_true(out[16 + i] == 2.0f * (float)(15 - i) - 1.0f);
    }
}

static void q8_0(void **state)
{
    uint8_t bytes[34] = {0x00, 0x34}; /* 0.25 */
    float out[32];
    (void)state;
    for (int i = 0; i < 32; i++) {
        bytes[2 + i] = (uint8_t)(8 * i - 128);
    }
    block(8, bytes, sizeof(bytes), out);
    for (int i = 0; i < 32; i++) {
        assert_true(out[i] == 0.25f * (float)(8 * i - 128));
    }
}

static float half_by_definition(uint16_t half)
{
    int exponent = half >> 10 & 31;
    int fraction = half & 1023;
    double value = exponent == 31  ? (fraction ? (double)NAN : (double)INFINITY)
                   : exponent == 0 ? ldexp(fraction, -24)
                                   : ldexp(fraction + 1024, exponent - 25);
    return (float)(half & 0x8000 ? -value : value);
}

static void all_halves(void **state)
{
    static uint16_t halves[65536];
    static float out[65536];
    (void)state;
    for (int i = 0; i < 65536; i++) {
        halves[i] = (uint16_t)i;
    }
    dequant_find(1)->row((const uint8_t *)halves, 65536, out);
    for (int i = 0; i < 65536; i++) {
        float wanted = half_by_definition((uint16_t)i);
        assert_true(isnan(wanted)
                        ? isnan(out[i])
                        : out[i] == wanted && signbit(out[i]) == signbit(wanted)); /* -0, too. */
    }
}

static void bf16_and_f32(void **state)
{
    const uint16_t halves[2] = {0x3fc0, 0xc000};
    const float floats[2] = {-0.1f, 3e38f};
    float out[2];
    (void)state;
    dequant_find(30)->row((const uint8_t *)halves, 2, out);
    assert_true(out[0] == 1.5f && out[1] == -2.0f);
    dequant_find(0)->row((const uint8_t *)floats, 2, out);
    assert_memory_equal(out, floats, sizeof(floats));
}

static void other_types_have_only_names(void **state)
{
    (void)state;
    assert_null(dequant_find(14));
    assert_string_equal(dequant_type_name(14), "Q6_K");
    assert_string_equal(dequant_type_name(4), "unknown");
    assert_string_equal(dequant_type_name(UINT32_MAX), "unknown");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(q4_0),         cmocka_unit_test(q4_1),
        cmocka_unit_test(q8_0),         cmocka_unit_test(all_halves),
        cmocka_unit_test(bf16_and_f32), cmocka_unit_test(other_types_have_only_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
