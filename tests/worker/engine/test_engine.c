/*
 * Goal:   creation never leaks and never half-succeeds, and refuses options that
 *         cannot be met.
 * Method: a small random Llama; fail the first allocation, then the second, and
 *         so on, until creation gets through.
 */
#include "tests/worker/engine/tiny.h"

#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static void survives_failed_allocations(void **state)
{
    struct model *model = tiny_model(false);
    const struct engine_options options = {.mode = KERNELS_F32, .threads = 1};
    struct engine *engine = NULL;
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    (void)state;

    for (; status != RK_OK; failures++) {
        struct rk_error error = {0};
        rk_alloc_fail_after(failures);
        status = engine_create(model, &options, &engine, &error);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        assert_int_equal(engine != NULL, status == RK_OK);
        assert_int_equal(error.text[0] != '\0', status != RK_OK);
    }
    rk_alloc_fail_after(-1);
    assert_true(failures > 30);
    engine_destroy(engine);
    engine_destroy(NULL);
    model_close(model);
}

static void options_are_checked(void **state)
{
    struct model *model = tiny_model(true);
    const struct engine_options wide = {.mode = KERNELS_F32, .context_tokens = TINY_CONTEXT + 1};
    const struct engine_options endless = {.mode = KERNELS_F32, .pool_tokens = UINT64_MAX};
    const struct engine_options small = {
        .mode = KERNELS_BF16, .threads = 1, .context_tokens = 100, .pool_tokens = 65};
    struct engine *engine = NULL;
    struct rk_error error = {0};
    struct rk_kv_layout layout;
    (void)state;

    assert_int_equal(engine_create(model, &wide, &engine, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "1025"));
    assert_int_equal(engine_create(model, &endless, &engine, &error), RK_ERR_INVALID);
    assert_int_equal(engine_create(model, &small, &engine, &error), RK_OK);
    engine_layout(engine, &layout);
    const struct rk_kv_layout expected = {TINY_LAYERS, TINY_KV, TINY_DIM, RK_DTYPE_BF16};
    assert_true(rk_kv_layout_equal(&layout, &expected));
    assert_int_equal(engine_context_tokens(engine), 100);
    assert_int_equal(engine_vocab_size(engine), TINY_VOCAB);
    assert_int_equal(engine_pool_pages(engine), 2 * TINY_PAIRS);
    assert_int_equal(engine_pages_needed(engine, 64), TINY_PAIRS);
    assert_int_equal(engine_pages_needed(engine, 65), 2 * TINY_PAIRS);
    assert_non_null(engine_isa_name(engine));
    assert_true(engine_flops_full(engine, 0) == 0);
    engine_destroy(engine);
    model_close(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(survives_failed_allocations),
        cmocka_unit_test(options_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
