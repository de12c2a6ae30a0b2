/*
 * Goal:   text is cut between UTF-8 sequences only, and nothing is held back
 *         that is no open sequence.
 * Method: every prefix of a text of 1 to 4 byte sequences, against a table of
 *         where its characters begin; then bytes that are no UTF-8.
 */
#include "client/redknot_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static void cuts_between_sequences(void **state)
{
    (void)state;
    static const char text[] = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z"; /* 1, 2, 3, 4, 1 bytes */
    static const size_t whole[] = {0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11};
    for (size_t count = 0; count < sizeof(text); count++) {
        assert_int_equal(rk_utf8_whole((const uint8_t *)text, count), whole[count]);
    }
}

static void passes_what_is_no_utf8(void **state)
{
    (void)state;
    assert_int_equal(rk_utf8_whole((const uint8_t *)"\x80\x80\x80\x80", 4), 4);
    assert_int_equal(rk_utf8_whole((const uint8_t *)"\xFF", 1), 1);
    assert_int_equal(rk_utf8_whole((const uint8_t *)"a\x80", 2), 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(cuts_between_sequences),
                                       cmocka_unit_test(passes_what_is_no_utf8)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
