/*
 * Goal:   KL and top-1 are right, and exactly 0 for equal inputs.
 * Method: distributions whose KL is known by hand, then the corners:
 *         unnormalised inputs, zero probabilities, NaN.
 */
#include "client/cli/eval.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static void matches_hand_values(void **state)
{
    (void)state;
    const float p[] = {logf(0.5f), logf(0.25f), logf(0.25f)};
    const float q[] = {logf(0.25f), logf(0.5f), logf(0.25f)};
    /* 0.5 ln 2 - 0.25 ln 2 = 0.25 ln 2 */
    assert_true(fabs(eval_kl(p, q, 3) - 0.25 * log(2)) < 1e-7);
    assert_true(eval_kl(p, p, 3) == 0);
    assert_int_equal(eval_top1(p, 3), 0);
    assert_int_equal(eval_top1(q, 3), 1);
}

static void ignores_a_common_offset(void **state)
{
    (void)state;
    const float p[] = {-1, -2, -3, -4};
    const float q[] = {-1 + 8, -2 + 8, -3 + 8, -4 + 8};
    assert_true(fabs(eval_kl(p, q, 4)) < 1e-12);
}

static void treats_zero_probability(void **state)
{
    (void)state;
    const float p[] = {0, -INFINITY};
    const float q[] = {logf(0.5f), logf(0.5f)};
    assert_true(fabs(eval_kl(p, q, 2) - log(2)) < 1e-7); /* 0 log 0 = 0 */
    assert_true(isinf(eval_kl(q, p, 2)));
    const float bad[] = {0, NAN};
    assert_true(isnan(eval_kl(p, bad, 2)));
    const float none[] = {-INFINITY, -INFINITY};
    assert_true(isnan(eval_kl(none, p, 2)));
}

static void first_of_equals_wins(void **state)
{
    (void)state;
    const float p[] = {-3, -1, -1, -2};
    assert_int_equal(eval_top1(p, 4), 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_hand_values), cmocka_unit_test(ignores_a_common_offset),
        cmocka_unit_test(treats_zero_probability), cmocka_unit_test(first_of_equals_wins)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
