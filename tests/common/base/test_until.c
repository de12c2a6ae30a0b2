/*
 * Goal:   a wait ends at the sooner of its deadlines, and within a slice of a cancellation.
 * Method: passed and far deadlines, with and without a question that says yes or no.
 */
#include "common/base/until.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define SECOND INT64_C(1000000000)

static bool flag(void *context)
{
    return *(bool *)context;
}

static void is_over_by_cancellation_before_deadline(void **state)
{
    (void)state;
    bool cancelled = false;
    struct rk_until until = {.deadline_ns = rk_clock_ns() + 60 * SECOND};
    assert_int_equal(rk_until_over(&until), RK_OK);
    until.cancelled = flag;
    until.context = &cancelled;
    assert_int_equal(rk_until_over(&until), RK_OK);
    until.deadline_ns = rk_clock_ns();
    assert_int_equal(rk_until_over(&until), RK_ERR_DEADLINE);
    cancelled = true;
    assert_int_equal(rk_until_over(&until), RK_ERR_CANCELLED);
}

static void waits_in_slices_only_if_it_can_be_cancelled(void **state)
{
    (void)state;
    bool cancelled = false;
    int64_t far = rk_clock_ns() + 60 * SECOND;
    struct rk_until until = {.deadline_ns = far};
    assert_int_equal(rk_until_slice_ns(&until), far);
    until.cancelled = flag;
    until.context = &cancelled;
    assert_true(rk_until_slice_ns(&until) < rk_clock_ns() + SECOND);
    until.deadline_ns = 1; /* Long over: the slice is not longer. */
    assert_int_equal(rk_until_slice_ns(&until), 1);
}

static void keeps_the_sooner_deadline_and_the_question(void **state)
{
    (void)state;
    bool cancelled = true;
    struct rk_until until = {.deadline_ns = 100, .cancelled = flag, .context = &cancelled};
    assert_int_equal(rk_until_sooner(&until, 50).deadline_ns, 50);
    assert_int_equal(rk_until_sooner(&until, 150).deadline_ns, 100);
    struct rk_until sooner = rk_until_sooner(&until, 50);
    assert_int_equal(rk_until_over(&sooner), RK_ERR_CANCELLED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(is_over_by_cancellation_before_deadline),
        cmocka_unit_test(waits_in_slices_only_if_it_can_be_cancelled),
        cmocka_unit_test(keeps_the_sooner_deadline_and_the_question),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
