/*
 * Goal:   good input is read as written, and every wrong input is refused with
 *         a message that names the file, the request and the key.
 * Method: a table of texts with what the message must contain.
 */
#include "client/cli/eval.h"
#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static void reads_requests(void **state)
{
    (void)state;
    static const char text[] =
        "{\"requests\": [{\"prefix\": [1, 2], \"segments\": [[3], [4, 5]], \"question\": [6],"
        " \"continuation\": [7, 8, 9]}, {\"segments\": [], \"question\": [1],"
        " \"continuation\": [2]}]}";
    struct eval_file file;
    struct rk_error error = {.status = RK_OK};
    assert_int_equal(eval_file_parse(text, strlen(text), "f", &file, &error), RK_OK);
    assert_int_equal(file.num_requests, 2);
    assert_int_equal(file.requests[0].num_segments, 3); /* The prefix is the first. */
    assert_int_equal(file.requests[0].segments[0].count, 2);
    assert_int_equal(file.requests[0].segments[2].ids[1], 5);
    assert_int_equal(file.requests[0].continuation.ids[2], 9);
    assert_int_equal(file.requests[1].num_segments, 0);
    eval_file_clear(&file);
}

#define REST "\"question\": [1], \"continuation\": [1]"

static void names_what_is_wrong(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        const char *contains;
    } cases[] = {
        {"{", "f.json: line 1"},
        {"[]", "\"requests\""},
        {"{\"requests\": []}", "\"requests\""},
        {"{\"requests\": [3]}", "request 0"},
        {"{\"requests\": [{" REST "}]}", "request 0: \"segments\": is missing"},
        {"{\"requests\": [{\"segments\": [[]], " REST "}]}", "request 0: \"segments\"[0]: has 0"},
        {"{\"requests\": [{\"segments\": [[1], 2], " REST "}]}", "\"segments\"[1]: must be a list"},
        {"{\"requests\": [{\"segments\": [[1, -1]], " REST "}]}", "\"segments\"[0]: token 1"},
        {"{\"requests\": [{\"segments\": [[1.5]], " REST "}]}", "\"segments\"[0]: token 0"},
        {"{\"requests\": [{\"segments\": [[4294967296]], " REST "}]}", "token 0"},
        {"{\"requests\": [{\"segments\": [], \"prefix\": \"x\", " REST "}]}",
         "\"prefix\": must be"},
        {"{\"requests\": [{\"segments\": [], " REST "}, {\"segments\": [], \"question\": []}]}",
         "request 1: \"question\": has 0"},
        {"{\"requests\": [{\"segments\": [{\"text\": \"\"}], " REST "}]}",
         "\"segments\"[0]: must be"},
        {"{\"requests\": [{\"segments\": [{\"txt\": \"a\"}], " REST "}]}",
         "\"segments\"[0]: must be"},
        {"{\"requests\": [{\"segments\": [{\"text\": \"a\", \"x\": 1}], " REST "}]}", "must be"},
        {"{\"requests\": [{\"segments\": [{\"text\": \"a\\u0000b\"}], " REST "}]}", "NUL"},
        {"{\"requests\": [{\"segments\": [], \"question\": [1]}]}",
         "request 0: \"continuation\": is missing"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct eval_file file;
        struct rk_error error = {.status = RK_OK};
        enum rk_status status =
            eval_file_parse(cases[i].text, strlen(cases[i].text), "f.json", &file, &error);
        assert_int_equal(status, RK_ERR_INVALID);
        if (!strstr(error.text, cases[i].contains)) {
            print_error("case %zu: \"%s\" lacks \"%s\"\n", i, error.text, cases[i].contains);
            fail();
        }
        assert_non_null(strstr(error.text, "f.json"));
    }
}

/* ---- Text, and the vocabulary ---- */

/* One token for each letter. */
static enum rk_status letters(void *context, const char *text, bool parse_special,
                              int32_t **ret_ids, size_t *ret_count, struct rk_error *error)
{
    size_t count = strcmp(text, "-") == 0 ? 0 : strlen(text);
    bool *any_special = context;
    if (strcmp(text, "fails") == 0) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "nobody is there");
    }
    *any_special = *any_special || parse_special;
    int32_t *ids = rk_alloc_zero(count + 1, sizeof(*ids));
    assert_non_null(ids);
    for (size_t i = 0; i < count; i++) {
        ids[i] = text[i] - 'a';
    }
    *ret_ids = ids;
    *ret_count = count;
    return RK_OK;
}

static void text_becomes_ids(void **state)
{
    (void)state;
    static const char text[] =
        "{\"requests\": [{\"prefix\": {\"text\": \"abc\", \"special\": true},"
        " \"segments\": [{\"text\": \"de\"}, [7]], \"question\": {\"text\": \"b\"},"
        " \"continuation\": {\"text\": \"fg\", \"special\": false}}]}";
    struct eval_file file;
    struct rk_error error = {.status = RK_OK};
    bool any_special = false;
    assert_int_equal(eval_file_parse(text, strlen(text), "f", &file, &error), RK_OK);
    assert_int_equal(eval_file_resolve(&file, letters, &any_special, 8, &error), RK_OK);
    assert_true(any_special);
    assert_int_equal(file.requests[0].num_segments, 3);
    assert_int_equal(file.requests[0].segments[0].count, 3);
    assert_int_equal(file.requests[0].segments[1].ids[1], 4);
    assert_int_equal(file.requests[0].segments[2].ids[0], 7);
    assert_int_equal(file.requests[0].question.ids[0], 1);
    assert_int_equal(file.requests[0].continuation.count, 2);
    eval_file_clear(&file);
}

static void what_cannot_be_computed_is_named(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        enum rk_status status;
        const char *contains;
    } cases[] = {
        /* The last token of a continuation is fed to nobody, so only this check sees it. */
        {"{\"requests\": [{\"segments\": [], \"question\": [1], \"continuation\": [1, 8]}]}",
         RK_ERR_INVALID, "request 0: \"continuation\": token 1 is 8, outside the vocabulary of 8"},
        {"{\"requests\": [{\"prefix\": [1], \"segments\": [[2], [9]], " REST "}]}", RK_ERR_INVALID,
         "\"segments\"[1]: token 0 is 9"},
        {"{\"requests\": [{\"prefix\": [9], \"segments\": [], " REST "}]}", RK_ERR_INVALID,
         "\"prefix\": token 0 is 9"},
        {"{\"requests\": [{\"segments\": [{\"text\": \"-\"}], " REST "}]}", RK_ERR_INVALID,
         "\"segments\"[0]: has 0"},
        {"{\"requests\": [{\"segments\": [{\"text\": \"fails\"}], " REST "}]}", RK_ERR_UNAVAILABLE,
         "f.json: request 0: \"segments\": nobody is there"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct eval_file file;
        struct rk_error error = {.status = RK_OK};
        bool any_special = false;
        assert_int_equal(
            eval_file_parse(cases[i].text, strlen(cases[i].text), "f.json", &file, &error), RK_OK);
        assert_int_equal(eval_file_resolve(&file, letters, &any_special, 8, &error),
                         cases[i].status);
        if (!strstr(error.text, cases[i].contains)) {
            fail_msg("case %zu: \"%s\" lacks \"%s\"", i, error.text, cases[i].contains);
        }
        eval_file_clear(&file);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_requests), cmocka_unit_test(names_what_is_wrong),
        cmocka_unit_test(text_becomes_ids), cmocka_unit_test(what_cannot_be_computed_is_named)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
