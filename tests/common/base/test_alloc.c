/*
 * Goal:   each way to the heap works, checks overflow, and can be made to fail.
 * Method: the injection is set to let n calls through, for every function.
 */
#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* The sanitizers end a process whose calloc() overflows, unless told to answer NULL. */
const char *__asan_default_options(void);
const char *__tsan_default_options(void);

const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1";
}

const char *__tsan_default_options(void)
{
    return "allocator_may_return_null=1";
}

enum { WAYS = 6 };

static void *allocate(int way)
{
    switch (way) {
    case 0:
        return rk_alloc(10);
    case 1:
        return rk_alloc_zero(2, 5);
    case 2:
        return rk_alloc_resize(NULL, 2, 5);
    case 3:
        return rk_alloc_string("text");
    case 4:
        return rk_alloc_format("%d", 5);
    default:
        return rk_alloc_aligned(64, 10);
    }
}

static void each_way_can_fail(void **state)
{
    (void)state;
    for (int way = 0; way < WAYS; way++) {
        for (int through = 0; through < 3; through++) {
            rk_alloc_fail_after(through);
            for (int call = 0; call < 5; call++) {
                void *block = allocate(way);
                assert_int_equal(block != NULL, call < through); /* and all after it */
                rk_free(block);
            }
        }
        rk_alloc_fail_after(-1);
        for (int call = 0; call < 5; call++) {
            void *block = allocate(way);
            assert_non_null(block);
            rk_free(block);
        }
    }
}

static void a_failed_resize_keeps_the_block(void **state)
{
    char *block = rk_alloc_string("kept");
    (void)state;
    rk_alloc_fail_after(0);
    assert_null(rk_alloc_resize(block, 100, 1));
    rk_alloc_fail_after(-1);
    assert_string_equal(block, "kept");
    assert_null(rk_alloc_resize(block, SIZE_MAX / 2, 4));
    assert_string_equal(block, "kept");
    block = rk_alloc_resize(block, 1000, 10);
    assert_non_null(block);
    assert_string_equal(block, "kept");
    rk_free(block);
}

static void overflow_is_refused(void **state)
{
    (void)state;
    volatile size_t huge = SIZE_MAX;
    assert_null(rk_alloc_zero(huge / 2 + 2, 2));
    assert_null(rk_alloc_resize(NULL, huge / 2 + 2, 2));
    assert_null(rk_alloc_aligned(64, huge - 5));
}

static void nothing_is_still_a_block(void **state)
{
    (void)state;
    void *blocks[] = {rk_alloc(0), rk_alloc_zero(0, 8), rk_alloc_zero(8, 0),
                      rk_alloc_resize(NULL, 0, 8), rk_alloc_aligned(64, 0)};
    for (size_t i = 0; i < sizeof(blocks) / sizeof(blocks[0]); i++) {
        assert_non_null(blocks[i]);
        rk_free(blocks[i]);
    }
    rk_free(NULL);
}

static void alignment_and_zeroes_hold(void **state)
{
    (void)state;
    for (size_t alignment = 8; alignment <= 65536; alignment *= 2) {
        char *block = rk_alloc_aligned(alignment, alignment + 1);
        assert_non_null(block);
        assert_int_equal((uintptr_t)block % alignment, 0);
        memset(block, 1, 2 * alignment); /* Rounded up: ASan would object otherwise. */
        rk_free(block);
    }
    unsigned char *zeroes = rk_alloc_zero(1000, 3);
    for (int i = 0; i < 3000; i++) {
        assert_int_equal(zeroes[i], 0);
    }
    rk_free(zeroes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_way_can_fail),
        cmocka_unit_test(a_failed_resize_keeps_the_block),
        cmocka_unit_test(overflow_is_refused),
        cmocka_unit_test(nothing_is_still_a_block),
        cmocka_unit_test(alignment_and_zeroes_hold),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
