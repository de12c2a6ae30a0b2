/*
 * Goal:   UTF-8 is told from what is none, and cut between characters only; what may name something
 *         holds nothing that a terminal or a log obeys; what is shown is escaped, and valid in
 * JSON. Method: every code point, and one byte too many of each; every prefix of a text of 1 to 4
 * byte characters; tables of bad bytes; every byte and pair of bytes through each escape.
 */
#include "common/base/text.h"

#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static size_t encode(uint32_t c, size_t bytes, char *out)
{
    static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    if (bytes == 1) {
        out[0] = (char)c;
    } else {
        for (size_t i = bytes - 1; i > 0; i--) {
            out[i] = (char)(0x80 | (c & 0x3f));
            c >>= 6;
        }
        out[0] = (char)(lead[bytes] | c);
    }
    out[bytes] = '\0';
    return bytes;
}

static void utf8_is_exact(void **state)
{
    char p[8];
    (void)state;
    for (uint32_t c = 1; c < 0x200000; c++) {
        size_t bytes = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        bool valid = c <= 0x10ffff && !(c >= 0xd800 && c <= 0xdfff);
        encode(c, bytes, p);
        assert_int_equal(rk_utf8_character(p, 4), valid ? bytes : 0);
        if (bytes < 4) { /* One byte longer than it needs. */
            encode(c, bytes + 1, p);
            assert_int_equal(rk_utf8_character(p, 4), 0);
        }
    }
    assert_int_equal(rk_utf8_character("\x80", 4), 0);
    assert_int_equal(rk_utf8_character("\xe2\x82", 4), 0); /* cut by the NUL */
}

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

struct row {
    const char *text;
    size_t bytes;
    const char *reason; /* NULL: passes */
};

static void names_hold_nothing_that_a_terminal_obeys(void **state)
{
    static const struct row rows[] = {
        {"", 0, NULL},
        {"store-1", 7, NULL},
        {"caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 \\ \"", 17, NULL},
        {"a\0b", 3, "byte 1 (0x00) is a control character"},
        {"a\nb", 3, "byte 1 (0x0a) is a control character"},
        {"\x1b[31m", 5, "byte 0 (0x1b) is a control character"},
        {"ab\x7f", 3, "byte 2 (0x7f) is a control character"},
        {"\xc2\x9b"
         "1m",
         4, "byte 0 (0xc2) is a control character"}, /* CSI in one character */
        {"\xe2\x80\xae"
         "abc",
         6, "byte 0 (0xe2) is a control character"}, /* right to left */
        {"\xe2\x80\xa8", 3, "is a control character"},
        {"\xe2\x81\xa6", 3, "is a control character"},
        {"a\xff", 2, "byte 1 (0xff) is not UTF-8"},
        {"\xe2\x82", 2, "byte 0 (0xe2) is not UTF-8"},
        {"\xc0\x80", 2, "is not UTF-8"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct rk_error error = {0};
        enum rk_status status =
            rk_text_check_name("label", rows[i].text, rows[i].bytes, 64, &error);
        assert_int_equal(status, rows[i].reason ? RK_ERR_INVALID : RK_OK);
        if (rows[i].reason && !strstr(error.text, rows[i].reason)) {
            fail_msg("row %zu: %s", i, error.text);
        }
    }
    struct rk_error error = {0};
    assert_int_equal(rk_text_check_name("key", "abcd", 4, 3, &error), RK_ERR_TOO_LONG);
    assert_string_equal(error.text, "key: 4 bytes, at most 3 are allowed");
}

static void texts_hold_no_nul(void **state)
{
    (void)state;
    struct rk_error error = {0};
    assert_int_equal(rk_text_check("prompt", "a\n\x1b\t\xc3\xa9", 6, &error), RK_OK);
    assert_int_equal(rk_text_check("prompt", "a\0b", 3, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "prompt: byte 1 (0x00) is a NUL"));
    assert_int_equal(rk_text_check("prompt", "a\xff", 2, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "not UTF-8"));
}

static void escapes_are_as_they_should_look(void **state)
{
    static const struct {
        const char *text;
        size_t bytes;
        const char *escaped;
    } rows[] = {
        {"plain caf\xc3\xa9", 11, "plain caf\xc3\xa9"},
        {"a\nb\tc\rd\\e", 9, "a\\nb\\tc\\rd\\\\e"},
        {"\x1b[0m\0\xff", 6, "\\x1b[0m\\x00\\xff"},
        {"\xc2\x9b", 2, "\\xc2\\x9b"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        char *escaped = rk_text_escaped(rows[i].text, rows[i].bytes);
        assert_string_equal(escaped, rows[i].escaped);
        /* Cut anywhere, it is the longest beginning of whole units that fits. */
        for (size_t room = 1; room <= strlen(escaped) + 1; room++) {
            char cut[64];
            memset(cut, 'z', sizeof(cut));
            size_t length = rk_text_escape(rows[i].text, rows[i].bytes, cut, room);
            assert_int_equal(length, strlen(escaped));
            assert_true(strlen(cut) < room);
            assert_memory_equal(cut, escaped, strlen(cut));
            assert_true(rk_utf8_valid(cut, strlen(cut)));
        }
        rk_free(escaped);
    }
    rk_alloc_fail_after(0);
    assert_null(rk_text_escaped("a", 1));
    rk_alloc_fail_after(-1);
}

/* Whatever comes in, what comes out is a name, and different texts look different. */
static void every_pair_of_bytes_becomes_printable(void **state)
{
    (void)state;
    for (int first = 0; first < 256; first++) {
        for (int second = 0; second < 256; second++) {
            char text[2] = {(char)first, (char)second};
            char escaped[16];
            size_t length = rk_text_escape(text, 2, escaped, sizeof(escaped));
            assert_int_equal(rk_text_check_name("x", escaped, length, 16, NULL), RK_OK);
            char *json = rk_text_json(text, 2);
            assert_true(rk_utf8_valid(json, strlen(json)) && strlen(json) >= 1);
            rk_free(json);
        }
    }
}

static void json_keeps_what_is_valid(void **state)
{
    (void)state;
    char *json = rk_text_json("a\n\xc3\xa9\xff\0z", 7);
    assert_string_equal(json, "a\n\xc3\xa9\xef\xbf\xbd\xef\xbf\xbdz");
    rk_free(json);
    json = rk_text_json("", 0);
    assert_string_equal(json, "");
    rk_free(json);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(utf8_is_exact),
        cmocka_unit_test(cuts_between_sequences),
        cmocka_unit_test(passes_what_is_no_utf8),
        cmocka_unit_test(names_hold_nothing_that_a_terminal_obeys),
        cmocka_unit_test(texts_hold_no_nul),
        cmocka_unit_test(escapes_are_as_they_should_look),
        cmocka_unit_test(every_pair_of_bytes_becomes_printable),
        cmocka_unit_test(json_keeps_what_is_valid),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
