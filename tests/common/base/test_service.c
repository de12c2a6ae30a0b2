/*
 * Goal:   sizes are read as people mean them or refused with a reason;
 *         signals end a daemon in order; names of nodes and incarnations are unique.
 * Method: tables of inputs; a child process that is signalled.
 */
#include "common/base/service.h"

#include "common/base/alloc.h"

#include <argp.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static void sizes_are_read(void **state)
{
    static const struct {
        const char *text;
        uint64_t bytes;
    } rows[] = {
        {"0", 0},
        {"4096", 4096},
        {"4096B", 4096},
        {"64KB", 64000},
        {"64kb", 64000},
        {"512MiB", 512 << 20},
        {"2GiB", UINT64_C(2) << 30},
        {"3TB", UINT64_C(3000000000000)},
        {"16777215TiB", UINT64_C(16777215) << 40},
        {"18446744073709551615", UINT64_MAX},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        uint64_t bytes = 1;
        assert_int_equal(rk_size_parse(rows[i].text, &bytes, NULL), RK_OK);
        assert_true(bytes == rows[i].bytes);
    }
}

static void wrong_sizes_are_refused_with_a_reason(void **state)
{
    static const struct {
        const char *text;
        const char *reason;
    } rows[] = {
        {"", "whole number"},
        {"MiB", "whole number"},
        {"-1", "whole number"},
        {"+1", "whole number"},
        {" 1", "whole number"},
        {"1.5GiB", "unknown unit '.5GiB'"},
        {"512M", "unknown unit 'M'"},
        {"1 GiB", "unknown unit ' GiB'"},
        {"1GiBs", "unknown unit 'GiBs'"},
        {"0x10", "unknown unit 'x10'"},
        {"18446744073709551616", "larger than"},
        {"16777216TiB", "larger than"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        uint64_t bytes = 77;
        struct rk_error error = {0};
        assert_int_equal(rk_size_parse(rows[i].text, &bytes, &error), RK_ERR_INVALID);
        assert_non_null(strstr(error.text, rows[i].reason));
        assert_true(bytes == 77);
    }
}

static void nodes_have_names_of_their_own(void **state)
{
    char *a = rk_service_node_id("kvstore");
    char *b = rk_service_node_id("kvstore");
    (void)state;
    assert_non_null(a);
    assert_non_null(b);
    assert_string_not_equal(a, b);
    assert_memory_equal(a, "kvstore-", 8);
    assert_int_equal(strlen(a), strlen(b));
    assert_int_equal(strspn(a, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-"),
                     strlen(a));
    assert_int_equal(strspn(strrchr(a, '-') + 1, "0123456789abcdef"), 8);
    rk_free(a);
    rk_free(b);
    rk_alloc_fail_after(0);
    assert_null(rk_service_node_id("kvstore"));
    rk_alloc_fail_after(-1);
}

static void incarnations_differ(void **state)
{
    uint64_t seen[64];
    (void)state;
    for (int i = 0; i < 64; i++) {
        seen[i] = rk_service_incarnation();
        assert_true(seen[i] != 0);
        for (int j = 0; j < i; j++) {
            assert_true(seen[i] != seen[j]);
        }
    }
}

/* What the child does after rk_service_init(); its exit status is the parent's evidence. */
static int in_child(int (*body)(void))
{
    int status = 0;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)alarm(30);
        rk_service_init();
        _exit(body());
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static int wait_for_term(void)
{
    (void)kill(getpid(), SIGTERM); /* Blocked: stays pending until the wait takes it. */
    return rk_service_wait() == SIGTERM ? 0 : 1;
}

static int wait_for_int(void)
{
    (void)kill(getpid(), SIGINT);
    return rk_service_wait() == SIGINT ? 0 : 1;
}

static int second_signal(void)
{
    (void)kill(getpid(), SIGTERM);
    (void)rk_service_wait();
    (void)kill(getpid(), SIGINT);
    return 0;
}

static int write_to_nobody(void)
{
    int ends[2];
    if (pipe(ends) != 0 || close(ends[0]) != 0) {
        return 1;
    }
    return write(ends[1], "x", 1) == -1 ? 0 : 1; /* Alive to see EPIPE. */
}

static int wrong_usage(void)
{
    char name[] = "program";
    char option[] = "--no-such-option";
    char *argv[] = {name, option, NULL};
    struct argp argp = {0};
    close(STDERR_FILENO);
    (void)argp_parse(&argp, 2, argv, 0, NULL, NULL); /* Exits. */
    return 0;
}

static void signals_end_a_daemon_in_order(void **state)
{
    (void)state;
    int status = in_child(wait_for_term);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    status = in_child(wait_for_int);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    status = in_child(second_signal);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGINT);
    status = in_child(write_to_nobody);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    status = in_child(wrong_usage);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 2);
}

static void a_cluster_has_a_plain_id(void **state)
{
    (void)state;
    static const char *const wrong[] = {
        "", "a b", "a\n", "../x",
        "12345678901234567890123456789012345678901234567890123456789012345"};
    struct rk_error error;
    assert_string_equal(rk_service_cluster(), "");
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        assert_int_equal(rk_service_cluster_set(wrong[i], &error), RK_ERR_INVALID);
        assert_non_null(strstr(error.text, "--cluster"));
    }
    assert_string_equal(rk_service_cluster(), "");
    assert_int_equal(rk_service_cluster_set("0a-B_9", &error), RK_OK);
    assert_string_equal(rk_service_cluster(), "0a-B_9");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_are_read),
        cmocka_unit_test(wrong_sizes_are_refused_with_a_reason),
        cmocka_unit_test(nodes_have_names_of_their_own),
        cmocka_unit_test(incarnations_differ),
        cmocka_unit_test(a_cluster_has_a_plain_id),
        cmocka_unit_test(signals_end_a_daemon_in_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
