/*
 * Goal:   matrix products are right, and a row's result is the same bit by bit
 *         alone, beside any rows, and with any number of threads.
 * Method: the shapes of SmolLM2-135M and odd ones, each path of each mode;
 *         sampled elements against f64, then calls of many sizes from many
 *         starting rows against one call of 256 rows.
 */
#include "tests/kernels/kernels_support.h"
#include "tests/support/skip.h"

struct path {
    const char *name;
    enum kernels_mode mode;
    enum kernels_isa isa;
    double tolerance; /* of a sum over k, relative to sqrt(k) */
};

static const struct path paths[] = {
    {"f32, oneDNN", KERNELS_F32, KERNELS_ISA_REFERENCE, 1e-5},
    {"bf16, oneDNN", KERNELS_BF16, KERNELS_ISA_REFERENCE, 1e-5},
    {"bf16, widened", KERNELS_BF16, KERNELS_ISA_AVX512, 1e-5},
    {"bf16, pairs", KERNELS_BF16, KERNELS_ISA_AVX512_BF16, 1e-5},
};
#ifdef REDKNOT_SANITIZED
#define CALLS 8
#else
#define CALLS 24
#endif
#define NUM_PATHS (sizeof(paths) / sizeof(paths[0]))

static bool runs_here(const struct path *path)
{
    return kernels_isa_supported(path->isa) && kernels_mode_check(path->mode, NULL) == RK_OK;
}

static const uint32_t shapes[][2] = {
    {576, 576}, {192, 576}, {1536, 576}, {576, 1536}, {1, 1},    {1, 64},    {64, 1},
    {17, 33},   {100, 50},  {64, 64},    {128, 64},   {32, 128}, {259, 129}, {63, 577},
};
#define NUM_SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static void check_values(const struct path *path, const float *w, const float *x, const float *y,
                         uint32_t n, uint32_t k)
{
    for (uint32_t i = 0; i < 400; i++) {
        uint32_t row = support_below(KERNELS_ROWS_MAX);
        uint32_t column = support_below(n);
        double expected = 0;
        for (uint32_t j = 0; j < k; j++) {
            expected += (double)support_round(path->mode, x[(size_t)row * k + j]) *
                        (double)support_round(path->mode, w[(size_t)column * k + j]);
        }
        double difference = fabs(expected - (double)y[(size_t)row * n + column]);
        assert_true(difference <= path->tolerance * sqrt(k));
    }
}

static void check_rows(struct kernels *kernels, const struct kernels_matrix *matrix, const float *x,
                       const float *y, uint32_t n, uint32_t k, uint32_t calls)
{
    static const uint32_t counts[] = {1,  2,  3,  4,  5,  7,  8,   11,  12,  13,  15,  16,
                                      17, 31, 32, 33, 63, 64, 100, 127, 129, 200, 255, 256};
    float *again = support_reals((size_t)KERNELS_ROWS_MAX * n);
    for (uint32_t i = 0; i < calls; i++) {
        uint32_t rows = counts[support_below(sizeof(counts) / sizeof(counts[0]))];
        uint32_t first = support_below(KERNELS_ROWS_MAX - rows + 1);
        kernels_matmul(kernels, matrix, x + (size_t)first * k, rows, again);
        assert_memory_equal(again, y + (size_t)first * n, (size_t)rows * n * sizeof(float));
    }
    rk_free(again);
}

static void check_embedding(const struct path *path, const struct kernels_matrix *matrix,
                            const float *w, uint32_t n, uint32_t k)
{
    float *row = support_reals(k);
    for (uint32_t i = 0; i < 20; i++) {
        uint32_t r = i == 0 ? n - 1 : support_below(n);
        kernels_matrix_row(matrix, r, row);
        for (uint32_t j = 0; j < k; j++) {
            assert_true(row[j] == support_round(path->mode, w[(size_t)r * k + j]));
        }
    }
    rk_free(row);
}

static void check_shape(const struct path *path, uint32_t n, uint32_t k, uint32_t calls)
{
    float *w = support_reals((size_t)n * k);
    float *x = support_reals((size_t)KERNELS_ROWS_MAX * k);
    float *y = support_reals((size_t)KERNELS_ROWS_MAX * n);
    for (uint32_t threads = 1; threads <= 2; threads++) {
        struct kernels *kernels = support_kernels(path->mode, path->isa, threads);
        struct kernels_matrix *matrix = NULL;
        struct rk_error error = {.status = RK_OK};
        enum rk_status status = kernels_matrix_create(kernels, w, n, k, &matrix, &error);
        if (status != RK_OK) {
            print_error("%s, %u x %u: %s\n", path->name, n, k, error.text);
        }
        assert_int_equal(status, RK_OK);
        assert_non_null(kernels_matrix_implementation(matrix, 1));
        if (threads == 1) {
            kernels_matmul(kernels, matrix, x, KERNELS_ROWS_MAX, y);
            check_values(path, w, x, y, n, k);
            check_embedding(path, matrix, w, n, k);
        }
        check_rows(kernels, matrix, x, y, n, k, calls);
        kernels_matrix_destroy(matrix);
        kernels_destroy(kernels);
    }
    rk_free(w);
    rk_free(x);
    rk_free(y);
}

static void rows_are_right_and_independent(void **state)
{
    (void)state;
    for (size_t p = 0; p < NUM_PATHS; p++) {
        if (!runs_here(&paths[p])) {
            test_left_out(paths[p].name, "this CPU has no such instructions");
            continue;
        }
        for (size_t s = 0; s < NUM_SHAPES; s++) {
            check_shape(&paths[p], shapes[s][0], shapes[s][1], CALLS);
        }
    }
}

static void the_output_of_a_large_vocabulary(void **state)
{
    (void)state;
#ifdef REDKNOT_SANITIZED
    uint32_t n = 1024;
#else
    uint32_t n = 49152;
#endif
    for (size_t p = 0; p < NUM_PATHS; p++) {
        if (runs_here(&paths[p])) {
            check_shape(&paths[p], n, 576, 10);
        }
    }
}

/* Several matrices of one shape, one of them all zeros, share primitives but not results. */
static void matrices_of_one_shape_do_not_mix(void **state)
{
    (void)state;
    for (size_t p = 0; p < NUM_PATHS; p++) {
        if (!runs_here(&paths[p])) {
            continue;
        }
        struct kernels *kernels = support_kernels(paths[p].mode, paths[p].isa, 1);
        struct kernels_matrix *zero = NULL;
        struct kernels_matrix *real = NULL;
        float *w = rk_alloc_zero(96 * 48, sizeof(*w));
        float *x = support_reals(5 * 48);
        float *y = support_reals(5 * 96);
        assert_int_equal(kernels_matrix_create(kernels, w, 96, 48, &zero, NULL), RK_OK);
        for (size_t i = 0; i < (size_t)96 * 48; i++) {
            w[i] = 1.0f;
        }
        assert_int_equal(kernels_matrix_create(kernels, w, 96, 48, &real, NULL), RK_OK);
        kernels_matmul(kernels, zero, x, 5, y);
        for (size_t i = 0; i < (size_t)5 * 96; i++) {
            assert_true(y[i] == 0);
        }
        kernels_matmul(kernels, real, x, 5, y);
        assert_true(y[0] != 0 && y[0] == y[95]);
        kernels_matrix_destroy(zero);
        kernels_matrix_destroy(real);
        kernels_destroy(kernels);
        rk_free(w);
        rk_free(x);
        rk_free(y);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_are_right_and_independent),
        cmocka_unit_test(the_output_of_a_large_vocabulary),
        cmocka_unit_test(matrices_of_one_shape_do_not_mix),
    };
    support_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
