/*
 * Goal:   with several stores no get answers a value that is older than a drop or a put that went
 *         well before: not when a store stops and goes on, not when one is started again, not when
 *         one joins and leaves. A batch says which of its items did not stay.
 * Method: a real coordinator and two stores as processes; values that say in which round they were
 *         put.
 */
#include "client/values.h"
#include "tests/e2e/cluster.h"
#include "tests/e2e/value_bytes.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

#include <cmocka.h>

#define WAIT_MS  5000
#define LONG_MS  20000
#define NUM_KEYS 24

static struct cluster cluster;
static struct rk_values *values;
static char texts[NUM_KEYS][32];
static struct rk_value_key keys[NUM_KEYS];

static void keys_name(const char *test)
{
    for (int i = 0; i < NUM_KEYS; i++) {
        int length = snprintf(texts[i], sizeof(texts[i]), "%s/%d", test, i);
        keys[i] = (struct rk_value_key){texts[i], (size_t)length};
    }
}

/* Until all keys were dropped, or put, whatever stops the cluster meanwhile. */
static void drop_all(void)
{
    bool dropped[NUM_KEYS];
    int64_t deadline_ns = rk_deadline_in_ms(LONG_MS);
    while (rk_values_drop(values, keys, NUM_KEYS, WAIT_MS, dropped, NULL) != RK_OK) {
        assert_true(rk_deadline_left_ms(deadline_ns) > 0);
        rk_clock_sleep_ms(100);
    }
}

/* How many were there already. */
static int put_all(const char *what)
{
    struct rk_value_put puts[NUM_KEYS];
    int64_t deadline_ns = rk_deadline_in_ms(LONG_MS);
    int existed = 0;
    for (int i = 0; i < NUM_KEYS; i++) {
        puts[i] = (struct rk_value_put){.key = keys[i], .data = what, .bytes = strlen(what)};
        do {
            assert_int_equal(rk_values_put(values, &puts[i], 1, WAIT_MS, NULL), RK_OK);
            if (puts[i].status != RK_OK) {
                rk_clock_sleep_ms(100);
            }
        } while (puts[i].status != RK_OK && rk_deadline_left_ms(deadline_ns) > 0);
        assert_int_equal(puts[i].status, RK_OK);
        existed += puts[i].existed;
    }
    return existed;
}

/* How many keys have this value; fails when one has another. */
static int count_all(const char *what)
{
    struct rk_value_get gets[NUM_KEYS];
    char got[NUM_KEYS][16];
    int count = 0;
    for (int i = 0; i < NUM_KEYS; i++) {
        gets[i] = (struct rk_value_get){.key = keys[i], .buffer = got[i], .buffer_bytes = 16};
    }
    if (rk_values_get(values, gets, NUM_KEYS, WAIT_MS, NULL) != RK_OK) {
        return 0; /* No store is listed at this moment. */
    }
    for (int i = 0; i < NUM_KEYS; i++) {
        if (gets[i].status == RK_OK) {
            assert_int_equal(gets[i].bytes, strlen(what));
            assert_memory_equal(got[i], what, gets[i].bytes);
            count++;
        }
    }
    return count;
}

/* All that is answered for so long is this, and at the end all of it is there. */
static void is_and_stays(const char *what, int64_t ms)
{
    int64_t deadline_ns = rk_deadline_in_ms(ms);
    while (rk_deadline_left_ms(deadline_ns) > 0) {
        (void)count_all(what);
        rk_clock_sleep_ms(20);
    }
    deadline_ns = rk_deadline_in_ms(LONG_MS);
    while (count_all(what) < NUM_KEYS) {
        assert_true(rk_deadline_left_ms(deadline_ns) > 0);
        rk_clock_sleep_ms(50);
    }
}

static void store_stop(struct process *store)
{
    assert_int_equal(kill(store->pid, SIGSTOP), 0);
    assert_int_equal(waitpid(store->pid, NULL, WUNTRACED), store->pid);
}

static void a_store_that_went_on_brings_nothing_back(void **state)
{
    struct process *stores[] = {&cluster.store, &cluster.more_stores[0]};
    (void)state;
    for (int i = 0; i < 2; i++) {
        keys_name(i == 0 ? "first" : "second");
        assert_int_equal(put_all("one"), 0);
        store_stop(stores[i]);
        drop_all();
        assert_int_equal(put_all("two"), 0);
        assert_int_equal(count_all("two"), NUM_KEYS);
        assert_int_equal(kill(stores[i]->pid, SIGCONT), 0);
        is_and_stays("two", 5000);
    }
}

static void a_store_that_joins_and_leaves_changes_nothing(void **state)
{
    (void)state;
    keys_name("join");
    process_kill(&cluster.more_stores[0], SIGKILL);
    assert_int_equal(put_all("one"), 0); /* Once the dead one is not listed any more. */
    process_start(&cluster.more_stores[0]);
    cluster_wait(&cluster, 2, 0);
    rk_clock_sleep_ms(2000); /* The list is a second old at most. */
    assert_int_equal(put_all("two"), NUM_KEYS);
    assert_int_equal(count_all("one"), NUM_KEYS);
    process_kill(&cluster.more_stores[0], SIGKILL);
    is_and_stays("one", 4000);
    process_start(&cluster.more_stores[0]);
    cluster_wait(&cluster, 2, 0);
    drop_all();
    assert_int_equal(put_all("three"), 0);
    process_kill(&cluster.more_stores[0], SIGKILL);
    int64_t deadline_ns = rk_deadline_in_ms(4000);
    while (rk_deadline_left_ms(deadline_ns) > 0) { /* Some are gone; none is an old one. */
        (void)count_all("three");
        rk_clock_sleep_ms(20);
    }
    process_start(&cluster.more_stores[0]);
    cluster_wait(&cluster, 2, 0);
}

static void a_batch_says_what_did_not_stay(void **state)
{
    enum { COUNT = 160, BYTES = 1 << 20 };
    static struct rk_value_put puts[COUNT];
    static struct rk_value_key names[COUNT];
    static char name[COUNT][16];
    static bool exists[COUNT];
    uint8_t *data = rk_alloc_zero(1, BYTES);
    struct rk_error error = {.text = ""};
    int stayed = 0;
    (void)state;
    assert_non_null(data);
    for (int i = 0; i < COUNT; i++) {
        names[i] =
            (struct rk_value_key){name[i], (size_t)snprintf(name[i], sizeof(name[i]), "big/%d", i)};
        puts[i] = (struct rk_value_put){.key = names[i], .data = data, .bytes = BYTES};
    }
    assert_int_equal(rk_values_put(values, puts, COUNT, LONG_MS, &error), RK_OK);
    assert_int_equal(rk_values_exists(values, names, COUNT, WAIT_MS, exists, NULL), RK_OK);
    for (int i = 0; i < COUNT; i++) {
        assert_true(puts[i].status == RK_OK || puts[i].status == RK_ERR_FULL);
        assert_int_equal(puts[i].status == RK_OK, exists[i]);
        stayed += exists[i];
    }
    assert_in_range(stayed, 32, COUNT - 32); /* Two stores of 64 MiB. */
    assert_true(error.text[0] != '\0');
    rk_free(data);
}

/* More views than one connection may pin, and then so many new values that all else is evicted. */
static void views_beyond_one_connection_stay_whole(void **state)
{
    enum { VIEWS = 5000, BYTES = 4096, BATCH = 250, MORE = 24000 };
    static char name[VIEWS][16];
    static struct rk_value_key names[VIEWS];
    static struct rk_value_views views[VIEWS / BATCH];
    static uint8_t data[BYTES];
    (void)state;
    for (unsigned i = 0; i < VIEWS + MORE; i++) {
        char text[16];
        struct rk_value_put put = {
            .key = {text, (size_t)snprintf(text, sizeof(text), "view/%u", i)},
            .data = data,
            .bytes = BYTES};
        value_fill(i, data, BYTES);
        assert_int_equal(rk_values_put(values, &put, 1, WAIT_MS, NULL), RK_OK);
        assert_int_equal(put.status, RK_OK);
        if (i >= VIEWS) {
            continue;
        }
        memcpy(name[i], text, sizeof(text));
        names[i] = (struct rk_value_key){name[i], put.key.bytes};
        if (i % BATCH == BATCH - 1) {
            assert_int_equal(rk_values_view(values, &names[i + 1 - BATCH], BATCH, WAIT_MS,
                                            &views[i / BATCH], NULL),
                             RK_OK);
        }
    }
    for (unsigned i = 0; i < VIEWS; i++) {
        const struct rk_value_view *view = &views[i / BATCH].views[i % BATCH];
        assert_int_equal(view->status, RK_OK);
        assert_int_equal(value_compare(i, view->parts[0].data, BYTES), BYTES);
    }
    for (unsigned i = 0; i < VIEWS / BATCH; i++) {
        assert_int_equal(rk_values_view_check(values, &views[i]), RK_OK);
    }
    /* A store that is gone vouches for nothing. */
    process_kill(&cluster.store, SIGKILL);
    unsigned lost = 0;
    for (unsigned i = 0; i < VIEWS / BATCH; i++) {
        lost += rk_values_view_check(values, &views[i]) == RK_MISS_NODE_DOWN;
        rk_values_release(values, &views[i]);
    }
    assert_int_equal(lost, VIEWS / BATCH);
    process_start(&cluster.store);
    cluster_wait(&cluster, 2, 0);
}

static void a_key_that_is_none_hurts_no_other(void **state)
{
    static char long_key[257];
    struct rk_value_put put = {.key = {"good", 4}, .data = "value", .bytes = 5};
    const struct rk_value_key three[] = {{"good", 4}, {long_key, sizeof(long_key)}, {"none", 4}};
    struct rk_error error = {.text = ""};
    bool flags[3] = {false, true, true};
    (void)state;
    assert_int_equal(rk_values_put(values, &put, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(put.status, RK_OK);
    assert_int_equal(rk_values_exists(values, three, 3, WAIT_MS, flags, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "item 1"));
    assert_true(flags[0] && !flags[1] && !flags[2]);
    assert_int_equal(rk_values_drop(values, three, 3, WAIT_MS, flags, &error), RK_ERR_INVALID);
    assert_true(flags[0] && !flags[1] && !flags[2]);
    assert_int_equal(rk_values_exists(values, three, 1, WAIT_MS, flags, &error), RK_OK);
    assert_false(flags[0]);
}

static int group_set_up(void **state)
{
    const struct cluster_options options = {.dram = "64MiB", .num_stores = 2};
    struct rk_error error = {.text = ""};
    (void)state;
    cluster_start(&cluster, &options);
    const struct rk_values_options of_client = {.coordinator = cluster.coordinator_address};
    if (rk_values_create(&of_client, &values, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    return 0;
}

static int group_tear_down(void **state)
{
    (void)state;
    rk_values_destroy(values);
    cluster_stop(&cluster);
    return 0;
}

int main(void)
{
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_key_that_is_none_hurts_no_other),
        cmocka_unit_test(a_store_that_went_on_brings_nothing_back),
        cmocka_unit_test(a_store_that_joins_and_leaves_changes_nothing),
        cmocka_unit_test(a_batch_says_what_did_not_stay),
        cmocka_unit_test(views_beyond_one_connection_stay_whole),
    };
    return cmocka_run_group_tests(tests, group_set_up, group_tear_down);
}
