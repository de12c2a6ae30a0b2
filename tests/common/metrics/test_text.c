/*
 * Goal:   the pieces of the text format: numbers read back, escapes, names, labels, UTF-8.
 * Method: tables of inputs and expected outputs; random doubles must read back bit-equal.
 */
#include "common/base/alloc.h"
#include "common/metrics/text_internal.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

static void expect_number(double value, const char *expected)
{
    struct text text = {0};
    text_put_number(&text, value);
    char *taken = text_take(&text);
    assert_string_equal(taken, expected);
    rk_free(taken);
}

static void numbers_are_short_and_exact(void **state)
{
    (void)state;
    expect_number(0, "0");
    expect_number(1, "1");
    expect_number(0.1, "0.1");
    expect_number(0.00025, "0.00025");
    expect_number(123456789012345, "123456789012345");
    expect_number(INFINITY, "+Inf");
    expect_number(-INFINITY, "-Inf");
    expect_number(NAN, "NaN");

    unsigned seed = (unsigned)time(NULL);
    print_message("seed %u\n", seed);
    srandom(seed);
    for (int i = 0; i < 20000; i++) {
        double value = ldexp((double)random() * (double)random(), (int)(random() % 200) - 150);
        struct text text = {0};
        text_put_number(&text, value);
        char *taken = text_take(&text);
        assert_true(strtod(taken, NULL) == value);
        rk_free(taken);
    }
}

static void help_is_escaped(void **state)
{
    struct text text = {0};
    (void)state;
    text_put_help(&text, "a \\ b\nc \"d\"");
    char *taken = text_take(&text);
    assert_string_equal(taken, "a \\\\ b\\nc \"d\"");
    rk_free(taken);
}

static void text_grows_and_survives_lost_memory(void **state)
{
    struct text text = {0};
    (void)state;
    for (int i = 0; i < 10000; i++) {
        text_put(&text, "0123456789");
    }
    char *taken = text_take(&text);
    assert_int_equal(strlen(taken), 100000);
    rk_free(taken);

    rk_alloc_fail_after(1); /* The first block is had, the second is not. */
    for (int i = 0; i < 10000; i++) {
        text_put(&text, "0123456789");
    }
    rk_alloc_fail_after(-1);
    assert_null(text_take(&text));
    assert_int_equal(text.used, 0);
}

static void names_follow_prometheus(void **state)
{
    (void)state;
    assert_true(text_is_name("redknot_store_x_total", 21, true));
    assert_true(text_is_name("a:b", 3, true));
    assert_false(text_is_name("a:b", 3, false));
    assert_true(text_is_name("_a9", 3, false));
    assert_false(text_is_name("9a", 2, false));
    assert_false(text_is_name("", 0, true));
    assert_false(text_is_name("a-b", 3, true));
    assert_false(text_is_name("a b", 3, true));
}

static void labels_are_checked(void **state)
{
    (void)state;
    assert_true(text_is_labels("a=\"\""));
    assert_true(text_is_labels("a=\"x\",b=\"y\""));
    assert_true(text_is_labels("a=\"q\\\"q\\\\q\\n\""));
    assert_true(text_is_labels("a=\"\xc3\xa9,}\""));
    static const char *const wrong[] = {
        "",          "a",        "a=",         "a=x",        "a=\"x",
        "a=\"x\",",  "a=\"x\"b", "=\"x\"",     "1=\"x\"",    "a=\"x\ny\"",
        "a=\"\\t\"", "a=\"\\\"", "a=\"\xff\"", "a=\"\xc3\"", "a=\"x\"} 1\nb{"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        if (text_is_labels(wrong[i])) {
            fail_msg("taken for labels: %s", wrong[i]);
        }
    }
}

/* Encodes as UTF-8 would, also what it may not. */
int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(numbers_are_short_and_exact),
        cmocka_unit_test(help_is_escaped),
        cmocka_unit_test(text_grows_and_survives_lost_memory),
        cmocka_unit_test(names_follow_prometheus),
        cmocka_unit_test(labels_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
