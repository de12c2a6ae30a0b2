/*
 * Goal:   creation chooses paths that the CPU and the mode allow, and neither
 *         leaks nor half-succeeds when memory is out.
 * Method: all combinations of mode and path; each allocation failed in turn.
 */
#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "kernels/cpu/cpu_internal.h"
#include "tests/kernels/kernels_support.h"
#include "tests/support/skip.h"

static void creation_follows_cpu_and_mode(void **state)
{
    (void)state;
    for (int mode = KERNELS_F32; mode <= KERNELS_BF16; mode++) {
        for (int isa = KERNELS_ISA_AUTO; isa <= KERNELS_ISA_AMX; isa++) {
            struct kernels_options options = {
                .mode = (enum kernels_mode)mode, .isa = (enum kernels_isa)isa, .threads = 2};
            struct kernels *kernels = NULL;
            struct rk_error error = {.status = RK_OK};
            bool allowed = kernels_isa_supported(options.isa) &&
                           (mode == KERNELS_BF16 || isa < KERNELS_ISA_AVX512_BF16);
            enum rk_status status = kernels_create(&options, &kernels, &error);
            assert_int_equal(status, allowed ? RK_OK : RK_ERR_UNSUPPORTED);
            assert_int_equal(kernels != NULL, allowed);
            if (!allowed) { /* By name, and what there is instead. */
                static const char *const names[] = {"auto",   "reference",   "avx2",
                                                    "avx512", "avx512_bf16", "amx"};
                assert_non_null(strstr(error.text, names[isa]));
                assert_non_null(strstr(error.text, "has reference"));
            }
            if (allowed) {
                assert_int_equal(kernels_mode(kernels), mode);
                assert_int_equal(kernels_threads(kernels), 2);
                assert_string_not_equal(kernels_isa_name(kernels), "");
            }
            kernels_destroy(kernels);
        }
    }
    assert_true(kernels_isa_supported(KERNELS_ISA_REFERENCE));
    assert_false(kernels_isa_supported((enum kernels_isa)99));
}

static void no_threads_means_all_cores(void **state)
{
    (void)state;
    struct kernels *kernels = support_kernels(kernels_mode_default(), KERNELS_ISA_AUTO, 0);
    struct rk_limits limits;
    rk_limits_read(&limits);
    assert_int_equal(kernels_threads(kernels), limits.cpus);
    kernels_destroy(kernels);
}

static void empty_matrices_are_refused(void **state)
{
    (void)state;
    struct kernels *kernels = support_kernels(KERNELS_F32, KERNELS_ISA_AUTO, 1);
    struct kernels_matrix *matrix = NULL;
    float w = 1;
    assert_int_equal(kernels_matrix_create(kernels, &w, 0, 1, &matrix, NULL), RK_ERR_INVALID);
    assert_int_equal(kernels_matrix_create(kernels, &w, 1, 0, &matrix, NULL), RK_ERR_INVALID);
    assert_null(matrix);
    kernels_destroy(kernels);
}

static enum rk_status wrong_init(struct kernels_matrix *matrix, const float *w)
{
    (void)w;
    matrix->data = rk_alloc(1);
    return matrix->data ? RK_OK : RK_ERR_NO_MEMORY;
}

static float wrong_value;

static void wrong_run(struct kernels *kernels, const struct kernels_matrix *matrix, const float *x,
                      uint32_t rows, float *y)
{
    (void)kernels;
    for (uint32_t i = 0; i < rows * matrix->n; i++) {
        y[i] = 0;
        for (uint32_t k = 0; k < matrix->k; k++) {
            y[i] += x[i / matrix->n * matrix->k + k];
        }
        y[i] *= wrong_value;
    }
}

/* Products that a CPU gets wrong are seen at creation, as attention is. */
static void wrong_products_are_seen(void **state)
{
    static const struct matmul_ops wrong = {"wrong", wrong_init, wrong_run, NULL};
    (void)state;
    for (int isa = KERNELS_ISA_AVX512; isa <= KERNELS_ISA_AVX512_BF16; isa++) {
        if (!kernels_isa_supported((enum kernels_isa)isa)) {
            continue;
        }
        struct kernels *kernels = support_kernels(KERNELS_BF16, (enum kernels_isa)isa, 1);
        const struct matmul_ops *right = kernels->matmul_ops;
        assert_non_null(right);
        assert_true(products_self_check(kernels));
        kernels->matmul_ops = &wrong;
        wrong_value = 1;
        assert_false(products_self_check(kernels));
        wrong_value = NAN;
        assert_false(products_self_check(kernels));
        kernels->matmul_ops = right;
        kernels_destroy(kernels);
    }
}

static enum rk_status create_all(enum kernels_mode mode, const float *w)
{
    struct kernels_options options = {.mode = mode, .threads = 1};
    struct kernels *kernels = NULL;
    struct kernels_matrix *matrix = NULL;
    enum rk_status status = kernels_create(&options, &kernels, NULL);
    assert_int_equal(kernels != NULL, status == RK_OK);
    if (status == RK_OK) {
        status = kernels_matrix_create(kernels, w, 32, 32, &matrix, NULL);
        assert_int_equal(matrix != NULL, status == RK_OK);
    }
    kernels_matrix_destroy(matrix);
    kernels_destroy(kernels);
    return status;
}

static void creation_survives_each_failed_allocation(void **state)
{
    (void)state;
    float *w = support_reals((size_t)32 * 32);
    for (int mode = KERNELS_F32; mode <= KERNELS_BF16; mode++) {
        if (kernels_mode_check((enum kernels_mode)mode, NULL) != RK_OK) {
            test_left_out("creation in bf16", "this CPU multiplies no bf16");
            continue;
        }
        enum rk_status status = RK_ERR_NO_MEMORY;
        int failures = 0;
        for (; status != RK_OK; failures++) {
            rk_alloc_fail_after(failures);
            status = create_all((enum kernels_mode)mode, w);
            assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        }
        rk_alloc_fail_after(-1);
        assert_true(failures > 4); /* The injection did bite. */
    }
    rk_free(w);
}

/* The reference with one number in its output changed a little. */
static void slightly_wrong(struct kernels *kernels, const struct kernels_attention *attention)
{
    attention_reference(kernels, attention);
    attention->out[attention->rows * attention->group * attention->head_dim - 1] += 0.1f;
}

static void a_wrong_path_is_noticed(void **state)
{
    (void)state;
    struct kernels_options options = {
        .mode = kernels_mode_default(), .isa = KERNELS_ISA_AUTO, .threads = 1};
    struct kernels *kernels = NULL;
    assert_int_equal(kernels_create(&options, &kernels, NULL), RK_OK);
    assert_true(attention_self_check(kernels));
    kernels->attention = slightly_wrong;
    assert_false(attention_self_check(kernels));
    kernels_destroy(kernels);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(wrong_products_are_seen),
        cmocka_unit_test(creation_follows_cpu_and_mode),
        cmocka_unit_test(no_threads_means_all_cores),
        cmocka_unit_test(empty_matrices_are_refused),
        cmocka_unit_test(a_wrong_path_is_noticed),
        cmocka_unit_test(creation_survives_each_failed_allocation),
    };
    support_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
