/*
 * Goal:   good input is read as written, and every wrong input is refused with
 *         a message that names the file, the request and the key.
 * Method: a table of texts with what the message must contain.
 */
#include "client/cli/eval.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(reads_requests),
                                       cmocka_unit_test(names_what_is_wrong)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
