/*
 * Goal:   whole numbers are read as they are written, or refused with the bounds.
 * Method: tables of what passes and what does not; nothing is written on a refusal.
 */
#include "common/base/number.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static void numbers_are_read(void **state)
{
    static const struct {
        const char *text;
        uint64_t number;
    } rows[] = {
        {"0", 0},
        {"7", 7},
        {"007", 7},
        {"4294967296", UINT64_C(4294967296)},
        {"18446744073709551615", UINT64_MAX},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        uint64_t number = 99;
        assert_int_equal(rk_number_parse("--n", rows[i].text, 0, UINT64_MAX, &number, NULL), RK_OK);
        assert_true(number == rows[i].number);
    }
}

static void what_is_none_is_refused(void **state)
{
    static const char *const rows[] = {"",
                                       "-1",
                                       "+5",
                                       " 5",
                                       "5 ",
                                       "1.5",
                                       "1k",
                                       "0x5",
                                       "0",
                                       "11",
                                       "18446744073709551616",
                                       "99999999999999999999999"};
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        uint64_t number = 99;
        struct rk_error error = {.text = ""};
        assert_int_equal(rk_number_parse("--n", rows[i], 1, 10, &number, &error), RK_ERR_INVALID);
        assert_non_null(strstr(error.text, "--n: \""));
        assert_non_null(strstr(error.text, "from 1 to 10"));
        assert_true(number == 99);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(numbers_are_read),
        cmocka_unit_test(what_is_none_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
