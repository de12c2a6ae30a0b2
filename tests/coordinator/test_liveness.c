/*
 * Goal:   failures in a row eject, passes in a row readmit; a store that has
 *         just come gets a share that grows from an eighth to all of its own, and
 *         stores that came together share alike.
 * Method: the functions with times that the test makes up.
 */
#include "coordinator/liveness.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#define SECOND     INT64_C(1000000000)
#define SLOW_START (30 * SECOND)

static void the_factor_grows_linearly(void **state)
{
    struct liveness liveness = {0};
    int64_t came = 1000 * SECOND;

    (void)state;
    assert_true(liveness_factor(&liveness, SLOW_START, came) == 1.0); /* Warm. */
    liveness_came(&liveness, false, came);
    assert_true(liveness_factor(&liveness, SLOW_START, came) == 0.125);
    assert_true(fabs(liveness_factor(&liveness, SLOW_START, came + 15 * SECOND) - 0.5625) < 1e-12);
    assert_true(liveness_factor(&liveness, SLOW_START, came + 30 * SECOND - 1) < 1.0);
    assert_true(liveness_factor(&liveness, SLOW_START, came + 30 * SECOND) == 1.0);
    assert_true(liveness_factor(&liveness, 0, came) == 1.0); /* Off. */
    liveness_came(&liveness, false, came + 60 * SECOND);     /* Again. */
    assert_true(liveness_factor(&liveness, SLOW_START, came + 60 * SECOND) == 0.125);
}

static void what_holds_shards_is_not_new(void **state)
{
    struct liveness liveness = {0};

    (void)state;
    liveness_came(&liveness, true, SECOND);
    liveness_announced(&liveness);
    assert_true(liveness_factor(&liveness, SLOW_START, SECOND) == 1.0);
    liveness_came(&liveness, false, SECOND); /* Known, and back: that it holds shards is no news. */
    liveness_announced(&liveness);
    assert_true(liveness_factor(&liveness, SLOW_START, SECOND) == 0.125);
}

static void failures_in_a_row_eject(void **state)
{
    struct liveness liveness = {0};

    (void)state;
    for (int i = 0; i < 5; i++) { /* Not in a row. */
        assert_false(liveness_failed(&liveness, 3));
        assert_false(liveness_failed(&liveness, 3));
        if (i % 2 == 0) {
            assert_false(liveness_passed(&liveness, SECOND));
        } else {
            liveness_answered(&liveness);
        }
    }
    assert_false(liveness_failed(&liveness, 3));
    assert_false(liveness_failed(&liveness, 3));
    assert_false(liveness.ejected);
    assert_true(liveness_failed(&liveness, 3));
    assert_true(liveness.ejected);
    assert_false(liveness_failed(&liveness, 3)); /* Told once. */
}

static void two_probes_in_a_row_readmit(void **state)
{
    struct liveness liveness = {0};

    (void)state;
    assert_true(liveness_failed(&liveness, 1));
    assert_false(liveness_passed(&liveness, 50 * SECOND));
    assert_false(liveness_failed(&liveness, 1));
    assert_false(liveness_passed(&liveness, 51 * SECOND));
    liveness_answered(&liveness);
    assert_true(liveness.ejected);
    assert_true(liveness_passed(&liveness, 52 * SECOND));
    assert_false(liveness.ejected);
    assert_true(liveness_factor(&liveness, SLOW_START, 52 * SECOND) == 0.125);
    assert_true(liveness_failed(&liveness, 1));
}

static void shares_are_eighths_of_the_highest(void **state)
{
    (void)state;
    assert_true(liveness_share(1.0, 1.0) == 1.0);
    assert_true(liveness_share(0.125, 1.0) == 0.125);
    assert_true(liveness_share(0.125, 0.125) == 1.0); /* All alike. */
    assert_true(liveness_share(0.30, 0.32) == 1.0);   /* Almost. */
    assert_true(liveness_share(0.5, 1.0) == 0.5);
    assert_true(liveness_share(0.57, 1.0) == 0.625);
    assert_true(liveness_share(0.001, 1.0) == 0.125); /* Never nothing. */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(failures_in_a_row_eject),
        cmocka_unit_test(two_probes_in_a_row_readmit),
        cmocka_unit_test(the_factor_grows_linearly),
        cmocka_unit_test(what_holds_shards_is_not_new),
        cmocka_unit_test(shares_are_eighths_of_the_highest),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
