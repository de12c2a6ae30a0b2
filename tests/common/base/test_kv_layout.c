/*
 * Goal:   shapes are counted right, and within the limits nothing overflows.
 * Method: hand-computed shapes of known models, every limit from both sides, pages
 *         against a definition by counting.
 */
#include "common/base/kv_layout.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static const struct rk_kv_layout small = {
    .num_layers = 30, .num_kv_heads = 3, .head_dim = 64, .dtype = RK_DTYPE_BF16};

static void known_shapes(void **state)
{
    struct rk_kv_layout layout = small;
    (void)state;
    assert_int_equal(rk_kv_page_bytes(&layout), 16384); /* 2 x 64 x 64 x 2 */
    assert_int_equal(rk_kv_pages_total(&layout, 65), 30 * 3 * 2);
    layout.dtype = RK_DTYPE_F32;
    layout.head_dim = 128;
    assert_int_equal(rk_kv_page_bytes(&layout), 65536);
    assert_int_equal(rk_dtype_bytes(RK_DTYPE_F32), 4);
    assert_int_equal(rk_dtype_bytes(RK_DTYPE_BF16), 2);
}

static void pages_cover_their_tokens(void **state)
{
    (void)state;
    for (uint32_t tokens = 0; tokens < 1000; tokens++) {
        uint32_t pages = rk_kv_pages(tokens);
        assert_true(pages * RK_PAGE_TOKENS >= tokens);
        assert_true(pages == 0 ? tokens == 0 : (pages - 1) * RK_PAGE_TOKENS < tokens);
    }
    assert_int_equal(rk_kv_pages(UINT32_MAX), UINT32_MAX / RK_PAGE_TOKENS + 1); /* no wrap */
}

static void limits_keep_products_in_64_bits(void **state)
{
    struct rk_kv_layout most = {.num_layers = RK_LAYERS_MAX,
                                .num_kv_heads = RK_KV_HEADS_MAX,
                                .head_dim = RK_HEAD_DIM_MAX,
                                .dtype = RK_DTYPE_F32};
    uint64_t bytes = 0;
    (void)state;
    assert_true(rk_kv_layout_valid(&most));
    assert_true(rk_kv_pages_total(&most, RK_SEGMENT_TOKENS_MAX) == UINT64_C(1) << 34);
    assert_false(__builtin_mul_overflow(rk_kv_pages_total(&most, RK_SEGMENT_TOKENS_MAX),
                                        (uint64_t)rk_kv_page_bytes(&most), &bytes));
}

static void layouts_have_limits(void **state)
{
    (void)state;
    assert_true(rk_kv_layout_valid(&small));
    static const struct {
        size_t field;
        uint32_t max;
    } fields[] = {{offsetof(struct rk_kv_layout, num_layers), RK_LAYERS_MAX},
                  {offsetof(struct rk_kv_layout, num_kv_heads), RK_KV_HEADS_MAX},
                  {offsetof(struct rk_kv_layout, head_dim), RK_HEAD_DIM_MAX}};
    for (size_t i = 0; i < 3; i++) {
        struct rk_kv_layout layout = small;
        uint32_t *field = (uint32_t *)((char *)&layout + fields[i].field);
        *field = 0;
        assert_false(rk_kv_layout_valid(&layout));
        *field = 1;
        assert_true(rk_kv_layout_valid(&layout));
        *field = fields[i].max;
        assert_true(rk_kv_layout_valid(&layout));
        assert_false(rk_kv_layout_equal(&layout, &small));
        *field = fields[i].max + 1;
        assert_false(rk_kv_layout_valid(&layout));
        *field = UINT32_MAX;
        assert_false(rk_kv_layout_valid(&layout));
    }
    struct rk_kv_layout layout = small;
    assert_true(rk_kv_layout_equal(&layout, &small));
    layout.dtype = RK_DTYPE_F32;
    assert_true(rk_kv_layout_valid(&layout));
    assert_false(rk_kv_layout_equal(&layout, &small));
    volatile int foreign[] = {0, 3};
    for (int i = 0; i < 2; i++) {
        layout.dtype = (enum rk_dtype)foreign[i];
        assert_false(rk_kv_layout_valid(&layout));
    }
}

static void head_ranges(void **state)
{
    struct rk_head_range all = {0, 30, 0, 3};
    (void)state;
    assert_true(rk_head_range_valid(&all, &small));
    assert_int_equal(rk_head_range_heads(&all), 90);
    static const struct rk_head_range good[] = {{29, 30, 2, 3}, {0, 1, 0, 1}, {5, 7, 1, 3}};
    static const uint32_t heads[] = {1, 1, 4};
    for (size_t i = 0; i < 3; i++) {
        assert_true(rk_head_range_valid(&good[i], &small));
        assert_int_equal(rk_head_range_heads(&good[i]), heads[i]);
    }
    static const struct rk_head_range wrong[] = {{0, 0, 0, 3},  {5, 5, 0, 3},         {6, 5, 0, 3},
                                                 {0, 31, 0, 3}, {0, 30, 3, 3},        {0, 30, 2, 1},
                                                 {0, 30, 0, 4}, {0, UINT32_MAX, 0, 3}};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        assert_false(rk_head_range_valid(&wrong[i], &small));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_shapes),
        cmocka_unit_test(pages_cover_their_tokens),
        cmocka_unit_test(limits_keep_products_in_64_bits),
        cmocka_unit_test(layouts_have_limits),
        cmocka_unit_test(head_ranges),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
