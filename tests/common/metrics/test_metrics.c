/*
 * Goal:   what is counted is shown, whole and in the format; no update is lost
 *         among threads; a registry without room refuses without harm.
 * Method: exact texts of small registrations, sums over racing threads, failed
 *         allocations in turn, and the registry filled to its maximum (last).
 */
#include "common/base/alloc.h"
#include "common/metrics/metrics.h"

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static void expect_in_text(const char *part, bool expected)
{
    char *text = rk_metrics_text();
    assert_non_null(text);
    if ((strstr(text, part) != NULL) != expected) {
        fail_msg("%s: %s\n--- in ---\n%s", expected ? "missing" : "unexpected", part, text);
    }
    rk_free(text);
}

static size_t occurrences(const char *part)
{
    size_t count = 0;
    char *text = rk_metrics_text();
    assert_non_null(text);
    for (const char *p = text; (p = strstr(p, part)) != NULL; p++) {
        count++;
    }
    rk_free(text);
    return count;
}

static void counter_and_gauge(void **state)
{
    struct rk_metric *counter = rk_metric_counter("test_reads_total", "Reads.", NULL);
    struct rk_metric *gauge = rk_metric_gauge("test_open", "Open\nthings, \\ too.", NULL);
    (void)state;
    rk_metric_add(counter, 1);
    rk_metric_add(counter, 2.5);
    rk_metric_add(counter, NAN);
    assert_true(rk_metric_value(counter) == 3.5);
    rk_metric_set(gauge, 7);
    rk_metric_add(gauge, -9);
    assert_true(rk_metric_value(gauge) == -2);
    expect_in_text("# HELP test_reads_total Reads.\n# TYPE test_reads_total counter\n"
                   "test_reads_total 3.5\n",
                   true);
    expect_in_text("# HELP test_open Open\\nthings, \\\\ too.\n# TYPE test_open gauge\n"
                   "test_open -2\n",
                   true);
}

static void labels_share_one_head(void **state)
{
    struct rk_metric *a = rk_metric_counter("test_misses_total", "Misses.", "reason=\"A\"");
    struct rk_metric *other = rk_metric_counter("test_between_total", "Between.", NULL);
    struct rk_metric *b = rk_metric_counter("test_misses_total", "Misses.", "reason=\"B\"");
    (void)state;
    (void)other;
    assert_ptr_not_equal(a, b);
    assert_ptr_equal(a, rk_metric_counter("test_misses_total", "Other words.", "reason=\"A\""));
    rk_metric_add(a, 1);
    rk_metric_add(b, 2);
    expect_in_text("# HELP test_misses_total Misses.\n# TYPE test_misses_total counter\n"
                   "test_misses_total{reason=\"A\"} 1\ntest_misses_total{reason=\"B\"} 2\n",
                   true);
    assert_int_equal(occurrences("# TYPE test_misses_total "), 1);
}

static void histogram(void **state)
{
    static const double bounds[] = {0.1, 1, 10};
    struct rk_metric *plain = rk_metric_histogram("test_wait_seconds", "Wait.", NULL, bounds, 3);
    struct rk_metric *labelled =
        rk_metric_histogram("test_wait_seconds", "Wait.", "path=\"shm\"", bounds, 3);
    (void)state;
    rk_metric_observe(plain, 0.1); /* A bound belongs to its bucket. */
    rk_metric_observe(plain, 0.5);
    rk_metric_observe(plain, 100);
    rk_metric_observe(labelled, NAN);
    assert_true(rk_metric_value(plain) == 3);
    expect_in_text("test_wait_seconds_bucket{le=\"0.1\"} 1\n"
                   "test_wait_seconds_bucket{le=\"1\"} 2\n"
                   "test_wait_seconds_bucket{le=\"10\"} 2\n"
                   "test_wait_seconds_bucket{le=\"+Inf\"} 3\n"
                   "test_wait_seconds_sum 100.6\n"
                   "test_wait_seconds_count 3\n",
                   true);
    expect_in_text("test_wait_seconds_bucket{path=\"shm\",le=\"10\"} 0\n"
                   "test_wait_seconds_bucket{path=\"shm\",le=\"+Inf\"} 1\n"
                   "test_wait_seconds_sum{path=\"shm\"} 0\n"
                   "test_wait_seconds_count{path=\"shm\"} 1\n",
                   true);
    for (size_t i = 1; i < rk_metric_seconds_count; i++) {
        assert_true(rk_metric_seconds[i - 1] < rk_metric_seconds[i]);
    }
    assert_non_null(rk_metric_histogram("test_seconds", "All bounds.", NULL, rk_metric_seconds,
                                        rk_metric_seconds_count));
}

static void label_values_are_escaped(void **state)
{
    char labels[64] = "";
    (void)state;
    assert_true(rk_metric_label_put(labels, sizeof(labels), "a", "x\"y\\z\n"));
    assert_true(rk_metric_label_put(labels, sizeof(labels), "b", "\xff\xc3\xa9"));
    assert_string_equal(labels, "a=\"x\\\"y\\\\z\\n\",b=\"?\xc3\xa9\"");
    rk_metric_set(rk_metric_gauge("test_forged", "Forged.", labels), 1);
    expect_in_text("test_forged{a=\"x\\\"y\\\\z\\n\",b=\"?\xc3\xa9\"} 1\n", true);

    /* Room for a="xxx" and its NUL, byte by byte: it fits exactly or leaves labels alone. */
    for (size_t bytes = 1; bytes < 12; bytes++) {
        char small[12] = "";
        small[bytes] = 'G'; /* a guard just behind the room */
        bool fits = rk_metric_label_put(small, bytes, "a", "xxx");
        assert_int_equal(fits, bytes >= 8);
        assert_string_equal(small, fits ? "a=\"xxx\"" : "");
        assert_int_equal(small[bytes], 'G');
    }
}

#define THREADS 4
#define UPDATES 20000

struct shared {
    struct rk_metric *counter;
    struct rk_metric *histogram;
};

static void *update(void *argument)
{
    struct shared *shared = argument;
    for (int i = 0; i < UPDATES; i++) {
        rk_metric_add(shared->counter, 0.5);
        rk_metric_observe(shared->histogram, 1);
        if (i % 5000 == 0) {
            char *text = rk_metrics_text();
            (void)rk_metric_counter("test_raced_total", "Raced.", NULL);
            rk_free(text);
        }
    }
    return NULL;
}

static void no_update_is_lost_among_threads(void **state)
{
    static const double bounds[] = {1};
    pthread_t threads[THREADS];
    struct shared shared = {
        .counter = rk_metric_counter("test_halves_total", "Halves.", NULL),
        .histogram = rk_metric_histogram("test_ones", "Ones.", NULL, bounds, 1),
    };
    (void)state;
    for (int i = 0; i < THREADS; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, update, &shared), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    }
    assert_true(rk_metric_value(shared.counter) == THREADS * UPDATES * 0.5);
    assert_true(rk_metric_value(shared.histogram) == THREADS * UPDATES);
    expect_in_text("test_ones_sum 80000\n", true);
}

/* The child's end: killed by the assertion's abort. */
static bool aborts(void (*mistake)(void))
{
    int status = 0;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)signal(SIGABRT, SIG_DFL); /* cmocka's handler would go on with the tests */
        (void)!freopen("/dev/null", "w", stderr);
        mistake();
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

static void wrong_name(void)
{
    (void)rk_metric_counter("test-total", "Wrong.", NULL);
}

static void wrong_labels(void)
{
    (void)rk_metric_counter("test_labels_total", "Wrong.", "a=b");
}

static void two_kinds(void)
{
    (void)rk_metric_gauge("test_reads_total", "A counter already.", NULL);
}

static void counter_down(void)
{
    rk_metric_add(rk_metric_counter("test_reads_total", "Reads.", NULL), -1);
}

static void own_mistakes_abort(void **state)
{
    (void)state;
    assert_true(aborts(wrong_name));
    assert_true(aborts(wrong_labels));
    assert_true(aborts(two_kinds));
    assert_true(aborts(counter_down));
}

static void without_memory_updates_go_nowhere(void **state)
{
    static const double bounds[] = {1, 2};
    char *text = NULL;
    int failures = 0;
    (void)state;
    for (;; failures++) {
        rk_alloc_fail_after(failures);
        struct rk_metric *metric =
            rk_metric_histogram("test_scarce", "Scarce.", "a=\"b\"", bounds, 2);
        rk_alloc_fail_after(-1);
        assert_non_null(metric);
        rk_metric_observe(metric, 1.5);
        text = rk_metrics_text();
        bool shown = strstr(text, "test_scarce_count{a=\"b\"} 1\n") != NULL;
        rk_free(text);
        if (shown) {
            break;
        }
    }
    assert_int_equal(failures, 6); /* metric, buckets, labels, family, its name, its help */
    expect_in_text("redknot_metrics_refused_total 6\n", true);

    rk_alloc_fail_after(0);
    text = rk_metrics_text();
    rk_alloc_fail_after(-1);
    assert_null(text);
}

/* Last: it fills the registry. */
static void over_the_maximum_updates_go_nowhere(void **state)
{
    char labels[64];
    struct rk_metric *known = rk_metric_counter("test_reads_total", "Reads.", NULL);
    struct rk_metric *metric = NULL;
    (void)state;
    for (int i = 0; i < RK_METRICS_MAX + 10; i++) {
        (void)snprintf(labels, sizeof(labels), "i=\"%d\"", i);
        metric = rk_metric_gauge("test_many", "Many.", labels);
        assert_non_null(metric);
        rk_metric_set(metric, 1);
    }
    assert_true(rk_metric_value(metric) == 1);
    expect_in_text("test_many{i=\"1000\"} 1\n", true);
    expect_in_text(labels, false);
    expect_in_text("redknot_metrics_refused_total 6\n", false);
    assert_ptr_equal(known, rk_metric_counter("test_reads_total", "Reads.", NULL));
    assert_ptr_not_equal(metric, rk_metric_counter("test_more_total", "More.", NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(counter_and_gauge),
        cmocka_unit_test(labels_share_one_head),
        cmocka_unit_test(histogram),
        cmocka_unit_test(label_values_are_escaped),
        cmocka_unit_test(no_update_is_lost_among_threads),
        cmocka_unit_test(own_mistakes_abort),
        cmocka_unit_test(without_memory_updates_go_nowhere),
        cmocka_unit_test(over_the_maximum_updates_go_nowhere),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
