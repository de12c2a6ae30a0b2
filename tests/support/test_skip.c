/*
 * Goal:   what is skipped is never counted as passed, and a failure is never
 *         taken for a skip.
 * Method: compare the exit code before and after a skip, within cmocka and
 *         without; test_skipped.sh takes the same to ctest and to the summary.
 */
#include "tests/support/skip.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void nothing_skipped_is_passed(void **state)
{
    (void)state;
    assert_int_equal(test_exit_code(0), 0);
    assert_int_equal(test_exit_code(1), 1);
    assert_int_equal(test_exit_code(TEST_SKIP_CODE), 1);
}

static void programs_are_found(void **state)
{
    (void)state;
    assert_true(test_has_program("sh"));
    assert_false(test_has_program("no-such-program-anywhere"));
}

static void leaves(void **state)
{
    (void)state;
    test_skip("the skipping test", "it shows what a skip looks like");
    fail(); /* Not reached. */
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(nothing_skipped_is_passed),
                                       cmocka_unit_test(programs_are_found)};
    const struct CMUnitTest skipping[] = {cmocka_unit_test(leaves)};
    if (argc > 1 && strcmp(argv[1], "skip") == 0) {
        return test_exit_code(cmocka_run_group_tests(skipping, NULL, NULL));
    }
    return test_exit_code(cmocka_run_group_tests(tests, NULL, NULL));
}
