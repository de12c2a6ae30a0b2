/*
 * Goal:   JSON is complete whatever bytes a text has, a terminal is told nothing it would obey, and
 *         a report says what of the reuse was exact and why an answer is approximate.
 * Method: texts that are no UTF-8, hold a NUL or an escape sequence; reports of each sort of
 * source.
 */
#include "client/cli/cli_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void json_keeps_every_byte(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t bytes;
        const char *shown;
        const char *hex; /* NULL: nothing was lost */
    } cases[] = {
        {"plain", 5, "plain", NULL},
        {"\xC3\xA9", 2, "\xC3\xA9", NULL},
        {"", 0, "", NULL},
        {"\x1B[31m", 5, "\x1B[31m", NULL}, /* JSON escapes it. */
        {"a\xFF", 2, "a\xEF\xBF\xBD", "61ff"},
        {"a\0b", 3,
         "a\xEF\xBF\xBD"
         "b",
         "610062"},
        {"\xC3", 1, "\xEF\xBF\xBD", "c3"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        json_t *object = json_object();
        cli_json_set_text(object, "label", cases[i].text, cases[i].bytes);
        assert_string_equal(json_string_value(json_object_get(object, "label")), cases[i].shown);
        const json_t *hex = json_object_get(object, "label_hex");
        assert_int_equal(hex != NULL, cases[i].hex != NULL);
        if (hex) {
            assert_string_equal(json_string_value(hex), cases[i].hex);
        }
        char *dumped = json_dumps(object, 0);
        assert_non_null(dumped);
        free(dumped);
        json_decref(object);
    }
}

static void terminals_obey_nothing(void **state)
{
    (void)state;
    static const char text[] = "a\x1B[2J\nb\t\xC2\x9B"
                               "c\x07\xFF";
    char written[128] = "";
    char shown[128];
    FILE *file = fmemopen(written, sizeof(written), "w");
    assert_non_null(file);
    assert_true(cli_write_text(file, text, sizeof(text) - 1));
    assert_int_equal(fclose(file), 0);
    assert_string_equal(written, "a\\x1b[2J\nb\t\\xc2\\x9bc\\x07\\xff");
    assert_null(strpbrk(cli_shown(text, shown, sizeof(shown)), "\x1B\n\t\x07"));
}

static struct rk_segment_report part(const char *source, uint32_t position, uint32_t reused)
{
    return (struct rk_segment_report){.source = source,
                                      .position = position,
                                      .num_tokens = 10,
                                      .tokens_reused = reused,
                                      .label = "l\xFF",
                                      .miss = "",
                                      .path = "shm",
                                      .tier = "dram"};
}

static struct rk_report report_of(struct rk_segment_report *segments, size_t count)
{
    struct rk_report report = {.level = "fast",
                               .worker = "w\x1B",
                               .finish_reason = "stop",
                               .request = "r",
                               .path = "shm",
                               .segments = segments,
                               .num_segments = count};
    for (size_t i = 0; i < count; i++) {
        report.tokens_reused += segments[i].tokens_reused;
    }
    return report;
}

/* What the lines for a person say. */
static void printed(const struct rk_report *report, char *text, size_t room)
{
    FILE *file = fmemopen(text, room, "w");
    assert_non_null(file);
    cli_report_print(file, report, true);
    assert_int_equal(fclose(file), 0);
}

static void reports_split_exact_from_approximate(void **state)
{
    (void)state;
    struct rk_segment_report segments[] = {part("chain", 0, 10), part("segment", 10, 6),
                                           part("compute_alone", 20, 0)};
    struct rk_report report = report_of(segments, 3);
    char text[4096];
    report.tokens_reused_exact = 10;
    report.approximate = true;
    assert_int_equal(cli_report_alone(&report), 2);
    printed(&report, text, sizeof(text));
    assert_non_null(strstr(text, "16 reused (10 exact from a chain, 6 approximate"));
    assert_non_null(strstr(text, "approximate: 2 of 3 segments"));
    assert_null(strchr(text, '\x1B'));
    cli_report_sources(&report, text, sizeof(text));
    assert_string_equal(text, "1 chain, 1 segment, 1 compute_alone");

    json_t *json = cli_report_json(&report);
    const json_t *row = json_array_get(json_object_get(json, "segments"), 0);
    assert_true(json_is_true(json_object_get(json, "approximate")));
    assert_string_equal(json_string_value(json_object_get(row, "label_hex")), "6cff");
    json_decref(json);
}

static void exact_reports_say_nothing_of_approximation(void **state)
{
    (void)state;
    /* Alone at position 0 is in place. */
    struct rk_segment_report segments[] = {part("segment", 0, 10), part("compute", 10, 0)};
    struct rk_report report = report_of(segments, 2);
    char text[4096];
    report.tokens_reused_exact = 10;
    assert_int_equal(cli_report_alone(&report), 0);
    printed(&report, text, sizeof(text));
    assert_null(strstr(text, "approximate"));
    assert_null(strstr(text, "not stored"));
    report.head_map = true;
    report.approximate = true;
    report.segments_stored = 1;
    report.segments_not_stored = 2;
    (void)snprintf(report.store_problem, sizeof(report.store_problem), "no room\x1B");
    printed(&report, text, sizeof(text));
    assert_non_null(strstr(text, "approximate: a head map"));
    assert_null(strstr(text, "computed alone"));
    assert_non_null(
        strstr(text, "not stored: 2 of the 3 segments that were computed: no room\\x1b"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(json_keeps_every_byte),
        cmocka_unit_test(terminals_obey_nothing),
        cmocka_unit_test(reports_split_exact_from_approximate),
        cmocka_unit_test(exact_reports_say_nothing_of_approximation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
