/*
 * Goal:   a log call is one line, whatever text it carries; levels and printf
 *         conversions do what they say.
 * Method: a child process logs into a pipe; the parent reads what arrived.
 */
#include "common/base/log.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char captured[1 << 16];

/* What speak() writes to stderr. */
static const char *capture(void (*speak)(void))
{
    int ends[2];
    int status = 0;
    size_t used = 0;
    ssize_t got = 0;
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)dup2(ends[1], STDERR_FILENO);
        speak();
        _exit(0);
    }
    close(ends[1]);
    while ((got = read(ends[0], captured + used, sizeof(captured) - 1 - used)) > 0) {
        used += (size_t)got;
    }
    close(ends[0]);
    captured[used] = '\0';
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return captured;
}

static size_t lines_in(const char *text)
{
    size_t lines = 0;
    for (; *text; text++) {
        lines += *text == '\n';
    }
    return lines;
}

static void speak_plainly(void)
{
    rk_log_init("kvstore", RK_LOG_LEVEL_INFO);
    RK_LOG_WARN("store_unreachable", "node=%.*s address=%s reason=%q", 2, "n1x", "h:1", "no route");
}

static void the_form_of_a_line(void **state)
{
    const char *line = capture(speak_plainly);
    (void)state;
    assert_memory_equal(line, "ts=20", 5);
    assert_int_equal(strcspn(line, " "), strlen("ts=2026-01-02T03:04:05.678Z"));
    assert_string_equal(strchr(line, ' '),
                        " level=warn component=kvstore event=store_unreachable node=n1 "
                        "address=h:1 reason=\"no route\"\n");
}

static void speak_forgery(void)
{
    RK_LOG_ERROR("x", "reason=%q after=1",
                 "a\nts=2026-01-01T00:00:00.000Z level=info event=\"forged\"\\\r\x1b[2J\x7f");
    RK_LOG_ERROR("x", "reason=%q", (const char *)NULL);
}

static void quoted_text_cannot_forge_a_line(void **state)
{
    const char *text = capture(speak_forgery);
    (void)state;
    assert_int_equal(lines_in(text), 2);
    assert_non_null(strstr(text, "reason=\"a\\nts=2026-01-01T00:00:00.000Z level=info "
                                 "event=\\\"forged\\\"\\\\??[2J?\" after=1\n"));
    assert_non_null(strstr(text, "reason=\"(null)\"\n"));
}

static void speak_ids(void)
{
    RK_LOG_ERROR("x", "node=%s after=1", "store-1");
    RK_LOG_ERROR("x", "node=%s after=1", "a b=\"c\"");
    RK_LOG_ERROR("x", "node=%s after=1", "a\nts=2026 level=info event=forged");
    RK_LOG_ERROR("x", "node=%s quoted=%q",
                 "a\xc2\x9b"
                 "1m\xff",
                 "\xe2\x80\xae\xfe");
}

/* %s stands for ids and addresses, and a peer may have chosen them. */
static void a_word_that_is_none_is_quoted(void **state)
{
    const char *text = capture(speak_ids);
    (void)state;
    assert_int_equal(lines_in(text), 4);
    assert_non_null(strstr(text, "node=store-1 after=1\n"));
    assert_non_null(strstr(text, "node=\"a b=\\\"c\\\"\" after=1\n"));
    assert_non_null(strstr(text, "node=\"a\\nts=2026 level=info event=forged\" after=1\n"));
    assert_non_null(strstr(text, "node=\"a??1m?\" quoted=\"????\"\n"));
}

static void speak_every_byte(void)
{
    char text[2] = "";
    for (int c = 1; c < 256; c++) {
        text[0] = (char)c;
        RK_LOG_ERROR("x", "v=%q", text);
    }
}

/* Inside the quotes there is no bare quote, and nothing that a terminal obeys. */
static void every_byte_is_quoted(void **state)
{
    const char *text = capture(speak_every_byte);
    (void)state;
    assert_int_equal(lines_in(text), 255);
    for (const char *line = text; *line; line = strchr(line, '\n') + 1) {
        const char *p = strstr(line, "v=\"") + 3;
        for (; *p != '"'; p++) {
            assert_true((unsigned char)*p >= 0x20 && *p != 0x7f);
            p += *p == '\\';
        }
        assert_int_equal(p[1], '\n');
    }
}

static void speak_too_long(void)
{
    static char text[5000];
    memset(text, 'y', sizeof(text) - 1);
    RK_LOG_ERROR("x", "a=%q b=1", text);
    RK_LOG_ERROR("x", "a=%s b=%d c=%q", text, 12345, text);
    memset(text, '"', sizeof(text) - 1);
    for (int cut = 0; cut < 8; cut++) { /* Each offset of an escape at the end of the room. */
        RK_LOG_ERROR(&"xxxxxxxx"[cut], "a=%q", text);
    }
}

static void long_lines_are_cut_and_end(void **state)
{
    const char *text = capture(speak_too_long);
    (void)state;
    assert_int_equal(lines_in(text), 10);
    size_t length = strcspn(text, "\n") + 1;
    assert_int_equal(length, 2048);
}

static void speak_numbers(void)
{
    RK_LOG_ERROR("x", "%d %5d|%-4d|%05u %x %lu %lld %zu %ju %c %.2f %g %e %p %%", -5, 42, 7, 13u,
                 255u, 4294967296ul, -9000000000ll, (size_t)8589934592, (uintmax_t)7, 'k', 3.14159,
                 0.5, 1000.0, (void *)0x10);
}

static void conversions_are_those_of_printf(void **state)
{
    char expected[256];
    (void)state;
    (void)snprintf(expected, sizeof(expected),
                   "event=x %d %5d|%-4d|%05u %x %lu %lld %zu %ju %c %.2f %g %e %p %%\n", -5, 42, 7,
                   13u, 255u, 4294967296ul, -9000000000ll, (size_t)8589934592, (uintmax_t)7, 'k',
                   3.14159, 0.5, 1000.0, (void *)0x10);
    assert_non_null(strstr(capture(speak_numbers), expected));
}

static void speak_each_level(void)
{
    for (int least = RK_LOG_LEVEL_DEBUG; least <= RK_LOG_LEVEL_ERROR; least++) {
        rk_log_init("c", (enum rk_log_level)least);
        RK_LOG_DEBUG("e", "least=%d", least);
        RK_LOG_INFO("e", "least=%d", least);
        RK_LOG_WARN("e", "least=%d", least);
        RK_LOG_ERROR("e", "least=%d", least);
    }
}

static void levels_below_are_silent(void **state)
{
    const char *text = capture(speak_each_level);
    (void)state;
    assert_int_equal(lines_in(text), 4 + 3 + 2 + 1);
    assert_non_null(strstr(text, "level=debug component=c event=e least=0\n"));
    assert_null(strstr(text, "level=debug component=c event=e least=1\n"));
    assert_null(strstr(text, "level=warn component=c event=e least=3\n"));
    assert_non_null(strstr(text, "level=error component=c event=e least=3\n"));
}

static void level_words(void **state)
{
    enum rk_log_level level = RK_LOG_LEVEL_ERROR;
    (void)state;
    assert_true(rk_log_level_parse("debug", &level));
    assert_int_equal(level, RK_LOG_LEVEL_DEBUG);
    assert_true(rk_log_level_parse("WARN", &level));
    assert_int_equal(level, RK_LOG_LEVEL_WARN);
    assert_false(rk_log_level_parse("loud", &level));
    assert_false(rk_log_level_parse("", &level));
    assert_int_equal(level, RK_LOG_LEVEL_WARN);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_form_of_a_line),
        cmocka_unit_test(quoted_text_cannot_forge_a_line),
        cmocka_unit_test(a_word_that_is_none_is_quoted),
        cmocka_unit_test(every_byte_is_quoted),
        cmocka_unit_test(long_lines_are_cut_and_end),
        cmocka_unit_test(conversions_are_those_of_printf),
        cmocka_unit_test(levels_below_are_silent),
        cmocka_unit_test(level_words),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
