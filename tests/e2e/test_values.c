/*
 * Goal:   values come back as they were put, over every path, blocking and as operations; wrong
 *         input has a status for its item alone; a dead, stopped or full store costs a status in
 *         time, and nothing is left behind.
 * Method: a real coordinator and store as processes; the client in this one. The same tests run
 *         over each path.
 */
#include "client/values.h"
#include "tests/e2e/cluster.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include <cmocka.h>

#define WAIT_MS   20000
#define NUM_SIZES (sizeof(sizes) / sizeof(sizes[0]))

static const char *const paths[] = {"shm", "ucx", "grpc"};
static const uint64_t sizes[] = {1, 4096, 65535, 65536, 65537, 200000, 1048576, 5000001};

struct fixture {
    struct cluster cluster;
    struct rk_values *values;
    const char *path;
};

static struct fixture fixture;

static void client_open(const char *path, uint32_t operations_max)
{
    const struct rk_values_options options = {.coordinator = fixture.cluster.coordinator_address,
                                              .path = path,
                                              .operations_max = operations_max};
    struct rk_error error = {.text = ""};
    if (rk_values_create(&options, &fixture.values, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    fixture.path = path;
}

static int group_set_up(void **state)
{
    const struct cluster_options options = {.dram = "96MiB"};
    (void)state;
    cluster_start(&fixture.cluster, &options);
    return 0;
}

static int group_tear_down(void **state)
{
    (void)state;
    cluster_stop(&fixture.cluster);
    return 0;
}

static int set_up(void **state)
{
    client_open(*state, 0);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    rk_values_destroy(fixture.values);
    fixture.values = NULL;
    return 0;
}

/* Bytes of a value, the same for the same name. */
static uint8_t *bytes_of(unsigned name, uint64_t bytes)
{
    uint8_t *data = rk_alloc(bytes);
    assert_non_null(data);
    for (uint64_t i = 0; i < bytes; i++) {
        data[i] = (uint8_t)(i * 131 + i / 256 + name);
    }
    return data;
}

static char key_texts[256][64];

/* A key that no other test and path uses. */
static struct rk_value_key key_of(const char *test, unsigned name)
{
    char *text = key_texts[name % 256];
    int length = snprintf(text, sizeof(key_texts[0]), "%s/%s/%u", fixture.path, test, name);
    return (struct rk_value_key){text, (size_t)length};
}

static void put_sizes(const char *test, uint8_t *data[NUM_SIZES])
{
    struct rk_value_put puts[NUM_SIZES];
    struct rk_error error = {.text = ""};
    for (unsigned i = 0; i < NUM_SIZES; i++) {
        data[i] = bytes_of(i, sizes[i]);
        puts[i] = (struct rk_value_put){.key = key_of(test, i), .data = data[i], .bytes = sizes[i]};
    }
    assert_int_equal(rk_values_put(fixture.values, puts, NUM_SIZES, WAIT_MS, &error), RK_OK);
    for (unsigned i = 0; i < NUM_SIZES; i++) {
        if (puts[i].status != RK_OK || puts[i].existed) {
            fail_msg("size %llu: %s: %s", (unsigned long long)sizes[i],
                     rk_status_name(puts[i].status), error.text);
        }
    }
}

static void values_come_back(void **state)
{
    uint8_t *data[NUM_SIZES];
    struct rk_value_get gets[NUM_SIZES];
    struct rk_value_key keys[NUM_SIZES];
    struct rk_value_views views = {.views = NULL};
    struct rk_error error = {.text = ""};
    (void)state;
    put_sizes("back", data);
    for (unsigned i = 0; i < NUM_SIZES; i++) {
        keys[i] = key_of("back", i);
        gets[i] = (struct rk_value_get){
            .key = keys[i], .buffer = rk_alloc(sizes[i]), .buffer_bytes = sizes[i]};
    }
    assert_int_equal(rk_values_get(fixture.values, gets, NUM_SIZES, WAIT_MS, &error), RK_OK);
    for (unsigned i = 0; i < NUM_SIZES; i++) {
        assert_int_equal(gets[i].status, RK_OK);
        assert_int_equal(gets[i].bytes, sizes[i]);
        assert_memory_equal(gets[i].buffer, data[i], sizes[i]);
        rk_free(gets[i].buffer);
    }
    assert_int_equal(rk_values_view(fixture.values, keys, NUM_SIZES, WAIT_MS, &views, &error),
                     RK_OK);
    assert_string_equal(views.path, fixture.path);
    for (unsigned i = 0; i < NUM_SIZES; i++) {
        const struct rk_value_view *view = &views.views[i];
        uint64_t done = 0;
        assert_int_equal(view->status, RK_OK);
        assert_int_equal(view->bytes, sizes[i]);
        for (size_t part = 0; part < view->num_parts; part++) {
            assert_memory_equal(view->parts[part].data, data[i] + done, view->parts[part].bytes);
            done += view->parts[part].bytes;
        }
        assert_int_equal(done, sizes[i]);
        rk_free(data[i]);
    }
    rk_values_release(fixture.values, &views);
}

static void a_value_never_changes(void **state)
{
    struct rk_value_put put = {.key = key_of("never", 1), .data = "first", .bytes = 5};
    char got[16];
    struct rk_value_get get = {.key = put.key, .buffer = got, .buffer_bytes = sizeof(got)};
    bool flag = false;
    (void)state;
    assert_int_equal(rk_values_put(fixture.values, &put, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(put.status, RK_OK);
    assert_false(put.existed);
    put.data = "other one";
    put.bytes = 9;
    assert_int_equal(rk_values_put(fixture.values, &put, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(put.status, RK_OK);
    assert_true(put.existed);
    assert_int_equal(rk_values_get(fixture.values, &get, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(get.bytes, 5);
    assert_memory_equal(got, "first", 5);
    assert_int_equal(rk_values_drop(fixture.values, &put.key, 1, WAIT_MS, &flag, NULL), RK_OK);
    assert_true(flag);
    assert_int_equal(rk_values_exists(fixture.values, &put.key, 1, WAIT_MS, &flag, NULL), RK_OK);
    assert_false(flag);
    assert_int_equal(rk_values_get(fixture.values, &get, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(get.status, RK_MISS_ABSENT);
    assert_int_equal(rk_values_put(fixture.values, &put, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(rk_values_get(fixture.values, &get, 1, WAIT_MS, NULL), RK_OK);
    assert_memory_equal(got, "other one", 9);
}

static void wrong_items_hurt_no_other(void **state)
{
    static uint8_t long_key[257];
    static uint8_t value[100];
    uint8_t got[4][100];
    struct rk_error error = {.text = ""};
    struct rk_value_put puts[] = {
        {.key = key_of("wrong", 0), .data = value, .bytes = sizeof(value)},
        {.key = {long_key, sizeof(long_key)}, .data = value, .bytes = sizeof(value)},
        {.key = {long_key, 0}, .data = value, .bytes = sizeof(value)},
        {.key = key_of("wrong", 3), .data = value, .bytes = 0},
        {.key = key_of("wrong", 4), .data = value, .bytes = (UINT64_C(1) << 30) + 1},
        {.key = {long_key, 256}, .data = value, .bytes = sizeof(value)},
    };
    struct rk_value_get gets[] = {
        {.key = key_of("wrong", 0), .buffer = got[0], .buffer_bytes = 99},
        {.key = key_of("wrong", 0), .buffer = got[1], .buffer_bytes = 100},
        {.key = {long_key, sizeof(long_key)}, .buffer = got[2], .buffer_bytes = 100},
        {.key = {long_key, 256}, .buffer = got[3] + 1, .buffer_bytes = 99 + 1 - 1},
        {.key = key_of("wrong", 9), .buffer = got[3], .buffer_bytes = 100},
        {.key = key_of("wrong", 0), .buffer = NULL, .buffer_bytes = 100},
    };
    bool flag = false;
    (void)state;
    long_key[0] = (uint8_t)fixture.path[0]; /* Another key for each path. */
    assert_int_equal(rk_values_put(fixture.values, puts, 6, WAIT_MS, &error), RK_OK);
    assert_int_equal(puts[0].status, RK_OK);
    assert_int_equal(puts[1].status, RK_ERR_INVALID);
    assert_int_equal(puts[2].status, RK_ERR_INVALID);
    assert_int_equal(puts[3].status, RK_ERR_INVALID);
    assert_int_equal(puts[4].status, RK_ERR_INVALID);
    assert_int_equal(puts[5].status, RK_OK);
    assert_true(error.text[0] != '\0');
    assert_int_equal(rk_values_get(fixture.values, gets, 6, WAIT_MS, &error), RK_OK);
    assert_int_equal(gets[0].status, RK_ERR_TOO_LONG);
    assert_int_equal(gets[1].status, RK_OK);
    assert_int_equal(gets[2].status, RK_ERR_INVALID);
    assert_int_equal(gets[3].status, RK_ERR_TOO_LONG);
    assert_int_equal(gets[4].status, RK_MISS_ABSENT);
    assert_int_equal(gets[5].status, RK_ERR_INVALID);
    assert_int_equal(rk_values_get(fixture.values, gets, 0, WAIT_MS, &error), RK_ERR_INVALID);
    assert_int_equal(rk_values_exists(fixture.values, &gets[2].key, 1, WAIT_MS, &flag, &error),
                     RK_ERR_INVALID);
    /* A misaligned buffer is as good as any. */
    gets[3].buffer_bytes = 100;
    gets[3].buffer = (uint8_t *)got + 1;
    assert_int_equal(rk_values_get(fixture.values, &gets[3], 1, WAIT_MS, &error), RK_OK);
    assert_int_equal(gets[3].status, RK_OK);
}

#define NUM_OPERATIONS 32

static void operations_end_in_any_order(void **state)
{
    static uint8_t value[300000];
    static uint8_t got[NUM_OPERATIONS][sizeof(value)];
    static struct rk_value_put puts[NUM_OPERATIONS];
    static struct rk_value_get gets[NUM_OPERATIONS];
    static struct rk_value_key keys[NUM_OPERATIONS];
    static bool exists[NUM_OPERATIONS];
    uint64_t ids[NUM_OPERATIONS];
    (void)state;
    memset(value, 7, sizeof(value));
    for (int round = 0; round < 4; round++) {
        size_t open = NUM_OPERATIONS;
        for (unsigned i = 0; i < NUM_OPERATIONS; i++) {
            keys[i] = key_of("operation", i);
            puts[i] = (struct rk_value_put){
                .key = keys[i], .data = value, .bytes = sizeof(value) - i * 1000};
            gets[i] = (struct rk_value_get){
                .key = keys[i], .buffer = got[i], .buffer_bytes = sizeof(got[i])};
            enum rk_status status =
                round == 0
                    ? rk_values_submit_put(fixture.values, &puts[i], 1, WAIT_MS, &ids[i], NULL)
                : round == 1
                    ? rk_values_submit_get(fixture.values, &gets[i], 1, WAIT_MS, &ids[i], NULL)
                : round == 2 ? rk_values_submit_exists(fixture.values, &keys[i], 1, WAIT_MS,
                                                       &exists[i], &ids[i], NULL)
                             : rk_values_submit_drop(fixture.values, &keys[i], 1, WAIT_MS,
                                                     &exists[i], &ids[i], NULL);
            assert_int_equal(status, RK_OK);
        }
        while (open > 0) {
            struct rk_value_completion done[5];
            struct pollfd ready = {.fd = rk_values_event_fd(fixture.values), .events = POLLIN};
            assert_int_equal(poll(&ready, 1, WAIT_MS), 1);
            size_t count = rk_values_drain(fixture.values, done, 5);
            for (size_t i = 0; i < count; i++) {
                if (done[i].status != RK_OK) {
                    fail_msg("%s", done[i].text);
                }
                assert_in_range(done[i].operation, ids[0], ids[NUM_OPERATIONS - 1]);
            }
            open -= count;
        }
        for (unsigned i = 0; i < NUM_OPERATIONS; i++) {
            assert_int_equal(round == 0 ? puts[i].status : RK_OK, RK_OK);
            if (round == 1) {
                assert_int_equal(gets[i].status, RK_OK);
                assert_int_equal(gets[i].bytes, sizeof(value) - i * 1000);
                assert_memory_equal(got[i], value, gets[i].bytes);
            }
            assert_true(round < 2 || exists[i]);
        }
    }
    struct rk_value_completion none;
    assert_int_equal(rk_values_drain(fixture.values, &none, 1), 0);
}

static void operations_are_bounded(void **state)
{
    char got[16];
    struct rk_value_get get = {
        .key = key_of("bounded", 0), .buffer = got, .buffer_bytes = sizeof(got)};
    struct rk_value_get gets[3] = {get, get, get};
    struct rk_value_completion done[3];
    struct rk_error error = {.text = ""};
    uint64_t id = 0;
    size_t drained = 0;
    rk_values_destroy(fixture.values);
    client_open(*state, 2);
    assert_int_equal(rk_values_submit_get(fixture.values, &gets[0], 1, WAIT_MS, &id, &error),
                     RK_OK);
    assert_int_equal(rk_values_submit_get(fixture.values, &gets[1], 1, WAIT_MS, &id, &error),
                     RK_OK);
    assert_int_equal(rk_values_submit_get(fixture.values, &gets[2], 1, WAIT_MS, &id, &error),
                     RK_ERR_FULL);
    assert_non_null(strstr(error.text, "in flight"));
    while (drained < 2) {
        struct pollfd ready = {.fd = rk_values_event_fd(fixture.values), .events = POLLIN};
        assert_int_equal(poll(&ready, 1, WAIT_MS), 1);
        drained += rk_values_drain(fixture.values, done, 3);
    }
    assert_int_equal(rk_values_submit_get(fixture.values, &gets[2], 1, WAIT_MS, &id, &error),
                     RK_OK);
    /* Destroyed with one under way: it waits for it. */
}

static void what_does_not_fit_is_evicted_or_refused(void **state)
{
    uint64_t bytes = UINT64_C(30) << 20;
    uint8_t *data = bytes_of(9, bytes);
    struct rk_value_key keys[4];
    struct rk_value_views views = {.views = NULL};
    bool exists[4];
    (void)state;
    for (unsigned i = 0; i < 4; i++) {
        struct rk_value_put put = {.key = key_of("fit", i), .data = data, .bytes = bytes};
        keys[i] = put.key;
        assert_int_equal(rk_values_put(fixture.values, &put, 1, WAIT_MS, NULL), RK_OK);
        assert_int_equal(put.status, RK_OK);
    }
    assert_int_equal(rk_values_exists(fixture.values, keys, 4, WAIT_MS, exists, NULL), RK_OK);
    assert_false(exists[0]); /* The oldest made room. */
    assert_true(exists[1] && exists[2] && exists[3]);
    assert_int_equal(rk_values_view(fixture.values, keys, 4, WAIT_MS, &views, NULL), RK_OK);
    assert_int_equal(views.views[0].status, RK_MISS_EVICTED);
    if (strcmp(fixture.path, "shm") == 0) { /* All is pinned: nothing may go. */
        struct rk_value_put put = {.key = key_of("fit", 5), .data = data, .bytes = bytes};
        assert_int_equal(rk_values_put(fixture.values, &put, 1, WAIT_MS, NULL), RK_OK);
        assert_int_equal(put.status, RK_ERR_FULL);
    }
    rk_values_release(fixture.values, &views);
    assert_int_equal(rk_values_drop(fixture.values, keys, 4, WAIT_MS, exists, NULL), RK_OK);
    rk_free(data);
}

static void a_stopped_store_costs_the_deadline(void **state)
{
    uint8_t *data = bytes_of(3, 8u << 20);
    struct rk_value_put put = {.key = key_of("stopped", 0), .data = data, .bytes = 8u << 20};
    struct rk_value_put next = {.key = key_of("stopped", 1), .data = data, .bytes = 8u << 20};
    struct rk_value_get get = {
        .key = put.key, .buffer = rk_alloc(8u << 20), .buffer_bytes = 8u << 20};
    (void)state;
    assert_int_equal(rk_values_put(fixture.values, &put, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(put.status, RK_OK);
    assert_int_equal(kill(fixture.cluster.store.pid, SIGSTOP), 0);
    /* The signal takes its time, and over shared memory the store needs little. */
    assert_int_equal(waitpid(fixture.cluster.store.pid, NULL, WUNTRACED),
                     fixture.cluster.store.pid);
    int64_t begin_ns = rk_clock_ns();
    assert_int_equal(rk_values_get(fixture.values, &get, 1, 400, NULL), RK_OK);
    int64_t get_ms = (rk_clock_ns() - begin_ns) / 1000000;
    enum rk_status late = get.status;
    begin_ns = rk_clock_ns();
    assert_int_equal(rk_values_put(fixture.values, &next, 1, 400, NULL), RK_OK);
    int64_t put_ms = (rk_clock_ns() - begin_ns) / 1000000;
    assert_int_equal(kill(fixture.cluster.store.pid, SIGCONT), 0);
    if (late != RK_MISS_DEADLINE && late != RK_MISS_NODE_DOWN) {
        fail_msg("%s", rk_status_name(late));
    }
    assert_true(next.status != RK_OK);
    print_message("stopped store: get %lld ms, put %lld ms of 400\n", (long long)get_ms,
                  (long long)put_ms);
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS); /* The back-off passes. */
    do {
        assert_int_equal(rk_values_get(fixture.values, &get, 1, WAIT_MS, NULL), RK_OK);
        rk_clock_sleep_ms(get.status == RK_OK ? 0 : 50);
    } while (get.status != RK_OK && rk_deadline_left_ms(deadline_ns) > 0);
    assert_int_equal(get.status, RK_OK);
    assert_memory_equal(get.buffer, data, 8u << 20);
    rk_free(get.buffer);
    rk_free(data);
}

/* The last one of each path: the store is another one after it. */
static void a_killed_store_is_a_miss(void **state)
{
    char got[16];
    struct rk_value_put put = {.key = key_of("killed", 0), .data = "value", .bytes = 5};
    struct rk_value_get get = {.key = put.key, .buffer = got, .buffer_bytes = sizeof(got)};
    (void)state;
    assert_int_equal(rk_values_put(fixture.values, &put, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(put.status, RK_OK);
    process_kill(&fixture.cluster.store, SIGKILL);
    assert_int_equal(rk_values_get(fixture.values, &get, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(get.status, RK_MISS_NODE_DOWN);
    process_start(&fixture.cluster.store);
    cluster_wait(&fixture.cluster, 1, 0);
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    do { /* The list of stores is a second old at most. */
        assert_int_equal(rk_values_get(fixture.values, &get, 1, WAIT_MS, NULL), RK_OK);
        rk_clock_sleep_ms(20);
    } while (get.status == RK_MISS_NODE_DOWN && rk_deadline_left_ms(deadline_ns) > 0);
    assert_int_equal(get.status, RK_MISS_ABSENT);
    put.existed = true;
    assert_int_equal(rk_values_put(fixture.values, &put, 1, WAIT_MS, NULL), RK_OK);
    assert_int_equal(put.status, RK_OK);
    assert_false(put.existed);
}

int main(void)
{
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
#define OVER(path, test)                                                                           \
    cmocka_unit_test_prestate_setup_teardown(test, set_up, tear_down, (void *)(uintptr_t)(path))
#define ALL(path)                                                                                  \
    OVER(path, values_come_back), OVER(path, a_value_never_changes),                               \
        OVER(path, wrong_items_hurt_no_other), OVER(path, operations_end_in_any_order),            \
        OVER(path, operations_are_bounded), OVER(path, what_does_not_fit_is_evicted_or_refused),   \
        OVER(path, a_stopped_store_costs_the_deadline), OVER(path, a_killed_store_is_a_miss)
    const struct CMUnitTest tests[] = {ALL(paths[0]), ALL(paths[1]), ALL(paths[2])};
    return cmocka_run_group_tests(tests, group_set_up, group_tear_down);
}
