/*
 * Goal:   time does not go back, deadlines count down and saturate.
 * Method: deadlines made by hand, so that nothing depends on how long a step takes.
 */
#include "common/base/clock.h"

#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static void time_does_not_go_back(void **state)
{
    int64_t last = rk_clock_ns();
    (void)state;
    assert_true(last > 0);
    for (int i = 0; i < 10000; i++) {
        int64_t now = rk_clock_ns();
        assert_true(now >= last);
        last = now;
    }
    double seconds = rk_clock_s();
    assert_true(seconds >= (double)last * 1e-9);
    assert_true((double)rk_clock_ns() * 1e-9 >= seconds);
}

static void deadlines_count_down(void **state)
{
    int64_t before = rk_clock_ns();
    int64_t deadline = rk_deadline_in_ms(5000);
    int64_t after = rk_clock_ns();
    (void)state;
    assert_true(deadline >= before + 5000 * INT64_C(1000000));
    assert_true(deadline <= after + 5000 * INT64_C(1000000));
    int left = rk_deadline_left_ms(deadline);
    assert_true(left >= 0 && left <= 5000);
}

static void passed_deadlines_leave_nothing(void **state)
{
    (void)state;
    assert_int_equal(rk_deadline_left_ms(0), 0);
    assert_int_equal(rk_deadline_left_ms(rk_clock_ns()), 0);
    assert_int_equal(rk_deadline_left_ms(rk_deadline_in_ms(-1)), 0);
    assert_int_equal(rk_deadline_left_ms(INT64_MIN / 2), 0);
}

static void far_deadlines_fit_poll(void **state)
{
    (void)state;
    assert_int_equal(rk_deadline_left_ms(RK_DEADLINE_NEVER), INT_MAX);
    assert_int_equal(rk_deadline_left_ms(RK_DEADLINE_NEVER - 1), INT_MAX);
    assert_int_equal(rk_deadline_left_ms(rk_deadline_in_ms((int64_t)INT_MAX * 10)), INT_MAX);
}

static void a_rest_is_rounded_up(void **state)
{
    (void)state;
    /* Zero would make a loop over poll spin; any rest is at least one. */
    for (int i = 0; i < 1000; i++) {
        int64_t deadline = rk_clock_ns() + 900000;
        int left = rk_deadline_left_ms(deadline);
        assert_true(left == 1 || (left == 0 && rk_clock_ns() >= deadline));
    }
}

static void sleep_lasts_at_least(void **state)
{
    int64_t before = rk_clock_ns();
    (void)state;
    rk_clock_sleep_ms(20);
    assert_true(rk_clock_ns() - before >= 20 * 1000000);
    rk_clock_sleep_ms(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(time_does_not_go_back),          cmocka_unit_test(deadlines_count_down),
        cmocka_unit_test(passed_deadlines_leave_nothing), cmocka_unit_test(far_deadlines_fit_poll),
        cmocka_unit_test(a_rest_is_rounded_up),           cmocka_unit_test(sleep_lasts_at_least),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
