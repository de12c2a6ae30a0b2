/*
 * Goal:   norms, activations, sums and the writing of K and V are right, and
 *         independent of the rows beside them and of threads.
 * Method: random rows against f64, then rows alone against the batch, bit by bit.
 */
#include "tests/kernels/kernels_support.h"

#define ROWS 37

static const uint32_t widths[] = {1, 15, 16, 17, 64, 576, 1536};

static void rms_norm_divides_by_the_root_mean_square(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(widths) / sizeof(widths[0]); i++) {
        uint32_t width = widths[i];
        struct kernels *kernels = support_kernels(KERNELS_F32, KERNELS_ISA_AUTO, 2);
        float *x = support_reals((size_t)ROWS * width);
        float *weight = support_reals(width);
        float *y = support_reals((size_t)ROWS * width);
        float *alone = support_reals(width);
        kernels_rms_norm(kernels, x, weight, ROWS, width, 1e-5f, y);
        for (uint32_t r = 0; r < ROWS; r++) {
            double sum = 0;
            for (uint32_t j = 0; j < width; j++) {
                sum += (double)x[r * width + j] * (double)x[r * width + j];
            }
            double rms = sqrt(sum / width + 1e-5);
            for (uint32_t j = 0; j < width; j++) {
                double expected = (double)x[r * width + j] / rms * (double)weight[j];
                assert_true(fabs((double)y[r * width + j] - expected) <=
                            1e-6 * (1 + fabs(expected)));
            }
            kernels_rms_norm(kernels, x + (size_t)r * width, weight, 1, width, 1e-5f, alone);
            assert_memory_equal(alone, y + (size_t)r * width, width * sizeof(float));
        }
        kernels_rms_norm(kernels, x, weight, ROWS, width, 1e-5f, x); /* In place. */
        assert_memory_equal(x, y, (size_t)ROWS * width * sizeof(float));
        rk_free(x);
        rk_free(weight);
        rk_free(y);
        rk_free(alone);
        kernels_destroy(kernels);
    }
}

static void silu_mul_gates(void **state)
{
    (void)state;
    struct kernels *kernels = support_kernels(KERNELS_BF16, KERNELS_ISA_AUTO, 2);
    for (size_t i = 0; i < sizeof(widths) / sizeof(widths[0]); i++) {
        uint32_t width = widths[i];
        float *gate = support_reals((size_t)ROWS * width);
        float *up = support_reals((size_t)ROWS * width);
        float *result = support_reals((size_t)ROWS * width);
        float *alone = support_reals(width);
        for (size_t j = 0; j < (size_t)ROWS * width; j++) {
            gate[j] *= j % 5 == 0 ? 200.0f : 8.0f; /* Far beyond the range of exp, too. */
        }
        memcpy(result, gate, (size_t)ROWS * width * sizeof(float));
        kernels_silu_mul(kernels, result, up, ROWS, width);
        for (size_t j = 0; j < (size_t)ROWS * width; j++) {
            double g = (double)gate[j];
            double expected = g / (1 + exp(-g)) * (double)up[j];
            assert_true(fabs((double)result[j] - expected) <= 1e-6 * (1 + fabs(expected)));
        }
        for (uint32_t r = 0; r < ROWS; r++) {
            memcpy(alone, gate + (size_t)r * width, width * sizeof(float));
            kernels_silu_mul(kernels, alone, up + (size_t)r * width, 1, width);
            assert_memory_equal(alone, result + (size_t)r * width, width * sizeof(float));
        }
        rk_free(gate);
        rk_free(up);
        rk_free(result);
        rk_free(alone);
    }
    kernels_destroy(kernels);
}

static void add_adds(void **state)
{
    (void)state;
    struct kernels *kernels = support_kernels(KERNELS_F32, KERNELS_ISA_AUTO, 1);
    float *x = support_reals(ROWS * 17);
    float *y = support_reals(ROWS * 17);
    float *sum = support_reals(ROWS * 17);
    memcpy(sum, x, ROWS * 17 * sizeof(float));
    kernels_add(kernels, sum, y, ROWS, 17);
    for (size_t i = 0; i < (size_t)ROWS * 17; i++) {
        assert_true(sum[i] == x[i] + y[i]);
    }
    rk_free(x);
    rk_free(y);
    rk_free(sum);
    kernels_destroy(kernels);
}

static float page_element(enum kernels_mode mode, const void *page, size_t index)
{
    return mode == KERNELS_F32 ? ((const float *)page)[index]
                               : support_from_bf16(((const uint16_t *)page)[index]);
}

static void check_kv_write(enum kernels_mode mode, uint32_t d)
{
    struct kernels *kernels = support_kernels(mode, KERNELS_ISA_AUTO, 2);
    struct kernels_rope rope = support_rope(d, 512);
    size_t elements = (size_t)2 * RK_PAGE_TOKENS * d;
    size_t stride = 3 * (size_t)d + 1; /* Other heads stand between. */
    float *k = support_reals(3 * stride);
    float *v = support_reals(3 * stride);
    void *page = rk_alloc_aligned(64, elements * sizeof(float));
    assert_non_null(page);
    memset(page, 0x11, elements * sizeof(float));
    float untouched = page_element(mode, page, 0);
    const struct kernels_page_slot slots[3] = {{page, 0, 300}, {page, 63, 0}, {page, 5, 511}};
    kernels_kv_write(kernels, &rope, k, v, stride, slots, 3);

    double tolerance = mode == KERNELS_F32 ? 1e-6 : 1.0 / 128;
    for (uint32_t s = 0; s < 3; s++) {
        for (uint32_t i = 0; i < d / 2; i++) {
            size_t turn = (size_t)slots[s].position * (d / 2) + i;
            double a = (double)k[s * stride + i];
            double b = (double)k[s * stride + i + d / 2];
            double low = a * (double)rope.cos[turn] - b * (double)rope.sin[turn];
            double high = b * (double)rope.cos[turn] + a * (double)rope.sin[turn];
            size_t at = (size_t)slots[s].row * d + i;
            assert_true(fabs((double)page_element(mode, page, at) - low) <= tolerance);
            assert_true(fabs((double)page_element(mode, page, at + d / 2) - high) <= tolerance);
        }
        for (uint32_t i = 0; i < d; i++) {
            size_t at = (size_t)(RK_PAGE_TOKENS + slots[s].row) * d + i;
            assert_true(page_element(mode, page, at) == support_round(mode, v[s * stride + i]));
        }
    }
    for (size_t row = 0; row < (size_t)2 * RK_PAGE_TOKENS; row++) {
        size_t r = row % RK_PAGE_TOKENS;
        if (r != 0 && r != 5 && r != 63) {
            assert_true(page_element(mode, page, row * d) == untouched);
        }
    }
    rk_free(k);
    rk_free(v);
    rk_free(page);
    support_rope_free(&rope);
    kernels_destroy(kernels);
}

static void kv_write_rotates_k_and_rounds(void **state)
{
    (void)state;
    for (uint32_t d = 16; d <= 128; d += 16) {
        check_kv_write(KERNELS_F32, d);
        check_kv_write(KERNELS_BF16, d);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rms_norm_divides_by_the_root_mean_square),
        cmocka_unit_test(silu_mul_gates),
        cmocka_unit_test(add_adds),
        cmocka_unit_test(kv_write_rotates_k_and_rounds),
    };
    support_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
