/*
 * Goal:   the status table is whole and unambiguous; error texts are cut, never overrun.
 * Method: every row against every other, round trips by name, texts around the size of
 *         struct rk_error with a guard behind it.
 */
#include "common/base/status.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static void names_are_unique_and_come_back(void **state)
{
    (void)state;
    for (int i = 0; i < RK_STATUS_COUNT; i++) {
        enum rk_status status = (enum rk_status)i;
        assert_true(strlen(rk_status_name(status)) > 0);
        assert_true(strlen(rk_status_text(status)) > 0);
        assert_int_equal(rk_status_from_name(rk_status_name(status)), status);
        for (int j = 0; j < i; j++) {
            assert_string_not_equal(rk_status_name(status), rk_status_name((enum rk_status)j));
            assert_string_not_equal(rk_status_text(status), rk_status_text((enum rk_status)j));
        }
    }
    assert_int_equal(rk_status_from_name("FROM_A_LATER_VERSION"), RK_ERR_INTERNAL);
    assert_int_equal(rk_status_from_name(""), RK_ERR_INTERNAL);
    assert_int_equal(rk_status_from_name("ok"), RK_ERR_INTERNAL);
}

static void a_miss_is_what_its_name_says(void **state)
{
    (void)state;
    for (int i = 0; i < RK_STATUS_COUNT; i++) {
        enum rk_status status = (enum rk_status)i;
        bool named = strncmp(rk_status_name(status), "MISS_", 5) == 0;
        assert_int_equal(rk_status_is_miss(status), named);
        assert_int_equal(rk_status_remedy(status) == RK_REMEDY_COMPUTE, named);
    }
    assert_int_equal(RK_OK, 0);
    assert_int_equal(rk_status_remedy(RK_OK), RK_REMEDY_NONE);
    assert_int_equal(rk_status_remedy(RK_ERR_FULL), RK_REMEDY_RETRY);
    assert_int_equal(rk_status_remedy(RK_ERR_UNAVAILABLE), RK_REMEDY_ELSEWHERE);
    assert_int_equal(rk_status_remedy(RK_ERR_INVALID), RK_REMEDY_FIX_REQUEST);
}

static void numbers_outside_the_table_are_harmless(void **state)
{
    static const int outside[] = {-1, RK_STATUS_COUNT, 1 << 30};
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        volatile int number = outside[i];
        enum rk_status status = (enum rk_status)number;
        assert_string_equal(rk_status_name(status), "INTERNAL");
        assert_non_null(rk_status_text(status));
        assert_int_equal(rk_status_remedy(status), RK_REMEDY_GIVE_UP);
        assert_false(rk_status_is_miss(status));
    }
}

struct guarded {
    struct rk_error error;
    char guard[8];
};

static void long_texts_are_cut(void **state)
{
    char text[2000];
    struct guarded box;
    (void)state;
    for (size_t length = 500; length < 530; length++) {
        memset(&box, 'G', sizeof(box));
        memset(text, 'x', length);
        text[length] = '\0';
        assert_int_equal(rk_error_set(&box.error, RK_ERR_IO, "%s", text), RK_ERR_IO);
        assert_int_equal(box.error.status, RK_ERR_IO);
        size_t kept = length < sizeof(box.error.text) ? length : sizeof(box.error.text) - 1;
        assert_int_equal(strlen(box.error.text), kept);

        rk_error_prefix(&box.error, "store %d", 7);
        kept = kept + 9 < sizeof(box.error.text) ? kept + 9 : sizeof(box.error.text) - 1;
        assert_int_equal(strlen(box.error.text), kept);
        assert_memory_equal(box.error.text, "store 7: xxx", 12);
        assert_memory_equal(box.guard, "GGGGGGGG", 8);
    }
}

static void a_prefix_without_room_leaves_the_cause(void **state)
{
    char text[600];
    struct guarded box;
    (void)state;
    for (size_t length = 505; length < 520; length++) {
        memset(&box, 'G', sizeof(box));
        (void)rk_error_set(&box.error, RK_ERR_IO, "the cause");
        memset(text, 'p', length);
        text[length] = '\0';
        rk_error_prefix(&box.error, "%s", text);
        assert_true(strlen(box.error.text) < sizeof(box.error.text));
        assert_memory_equal(box.guard, "GGGGGGGG", 8);
        if (length >= sizeof(box.error.text)) {
            assert_string_equal(box.error.text, "the cause");
        }
    }
}

static void null_errors_are_accepted(void **state)
{
    (void)state;
    assert_int_equal(rk_error_set(NULL, RK_MISS_ABSENT, "%d", 1), RK_MISS_ABSENT);
    rk_error_prefix(NULL, "x");
}

static void an_assertion_says_where_and_aborts(void **state)
{
    char said[512] = "";
    int ends[2];
    int status = 0;
    (void)state;
    RK_ASSERT(1 + 1 == 2);
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)signal(SIGABRT, SIG_DFL);
        (void)dup2(ends[1], STDERR_FILENO);
        RK_ASSERT(1 + 1 == 3);
        _exit(0);
    }
    close(ends[1]);
    assert_true(read(ends[0], said, sizeof(said) - 1) > 0);
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    assert_non_null(strstr(said, "1 + 1 == 3"));
    assert_non_null(strstr(said, "test_status.c:"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_are_unique_and_come_back),
        cmocka_unit_test(a_miss_is_what_its_name_says),
        cmocka_unit_test(numbers_outside_the_table_are_harmless),
        cmocka_unit_test(long_texts_are_cut),
        cmocka_unit_test(a_prefix_without_room_leaves_the_cause),
        cmocka_unit_test(null_errors_are_accepted),
        cmocka_unit_test(an_assertion_says_where_and_aborts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
