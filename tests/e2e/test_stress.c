/*
 * Goal:   readers, writers and evictions at once, over all paths, never show a wrong byte or a
 *         status that is no reason, and leave nothing behind.
 * Method: threads with clients of each path over one small store, for RK_STRESS_SECONDS (5). What
 *         a value is follows from its key, so that every byte that is read can be verified. There
 *         are several times more values than fit.
 */
#include "client/values.h"
#include "tests/e2e/cluster.h"
#include "tests/e2e/value_bytes.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#define MIB        (UINT64_C(1) << 20)
#define NUM_VALUES 300   /* about 200 MiB, of which 64 MiB fit */
#define TIMEOUT_MS 60000 /* a sanitizer on a busy machine */
#define VIEWS      3
#define BURST      40 /* values of 2 MiB that the evictor puts in a row */

enum work { READ, WRITE, EVICT, NUM_WORKS };
static const char *const works[] = {"reads", "writes", "evictor's"};
static const char *const paths[] = {"shm", "ucx", "grpc"};
#define NUM_PATHS   (sizeof(paths) / sizeof(paths[0]))
#define NUM_THREADS (sizeof(threads) / sizeof(threads[0]))

static struct thread {
    enum work work;
    pthread_t thread;
    uint64_t random;
    void *buffer; /* of 2 MiB */
    uint64_t statuses[RK_STATUS_COUNT];
    char wrong[600]; /* the first thing that must not be */
} threads[] = {{.work = READ},  {.work = READ},  {.work = READ}, {.work = READ},
               {.work = WRITE}, {.work = WRITE}, {.work = EVICT}};

static struct cluster cluster;
static struct rk_values *clients[NUM_PATHS];
static atomic_bool stopping;

/* ---- What a value is ---- */

/* Small ones and large ones alike. */
static uint64_t bytes_of(uint64_t name)
{
    uint64_t limit = (UINT64_C(2) << (value_word(name, 1) % 21)) + 1;
    return 1 + value_word(name, 2) % (limit < 2 * MIB ? limit : 2 * MIB);
}

struct name {
    char text[32];
    struct rk_value_key key;
};

static void name_set(struct name *name, uint64_t number)
{
    int length =
        snprintf(name->text, sizeof(name->text), "stress/%llu", (unsigned long long)number);
    name->key = (struct rk_value_key){name->text, (size_t)length};
}

/* ---- Threads: they note, and assert nothing ---- */

static void note(struct thread *thread, const char *what, const char *path, enum rk_status status,
                 const struct rk_error *error)
{
    thread->statuses[status]++;
    if (status != RK_OK && !rk_status_is_miss(status) && status != RK_ERR_FULL &&
        thread->wrong[0] == '\0') {
        (void)snprintf(thread->wrong, sizeof(thread->wrong), "%s over %s: %s: %.500s", what, path,
                       rk_status_name(status), error->text);
    }
}

static void verify(struct thread *thread, const char *path, uint64_t number, uint64_t offset,
                   const void *data, uint64_t bytes)
{
    uint64_t right = value_compare_at(number, offset, data, bytes);
    unsigned long long at = offset + right;
    if (right != bytes && thread->wrong[0] == '\0') {
        (void)snprintf(thread->wrong, sizeof(thread->wrong),
                       "value %llu over %s is wrong from byte %llu on", (unsigned long long)number,
                       path, at);
    }
}

static void size_check(struct thread *thread, const char *path, uint64_t number, uint64_t bytes)
{
    if (bytes != bytes_of(number) && thread->wrong[0] == '\0') {
        (void)snprintf(thread->wrong, sizeof(thread->wrong),
                       "value %llu over %s has %llu bytes, not %llu", (unsigned long long)number,
                       path, (unsigned long long)bytes, (unsigned long long)bytes_of(number));
    }
}

static void get(struct thread *thread, size_t path, uint64_t number)
{
    struct name name;
    struct rk_error error = {.text = ""};
    name_set(&name, number);
    struct rk_value_get get = {.key = name.key, .buffer = thread->buffer, .buffer_bytes = 2 * MIB};
    enum rk_status status = rk_values_get(clients[path], &get, 1, TIMEOUT_MS, &error);
    status = status == RK_OK ? get.status : status;
    note(thread, "get", paths[path], status, &error);
    if (status == RK_OK) {
        size_check(thread, paths[path], number, get.bytes);
        verify(thread, paths[path], number, 0, get.buffer, get.bytes);
    }
}

static void view(struct thread *thread, size_t path)
{
    struct name names[VIEWS];
    struct rk_value_key keys[VIEWS];
    uint64_t numbers[VIEWS];
    struct rk_value_views views = {.views = NULL};
    struct rk_error error = {.text = ""};
    for (size_t i = 0; i < VIEWS; i++) {
        numbers[i] = value_random(&thread->random, NUM_VALUES);
        name_set(&names[i], numbers[i]);
        keys[i] = names[i].key;
    }
    enum rk_status status = rk_values_view(clients[path], keys, VIEWS, TIMEOUT_MS, &views, &error);
    if (status != RK_OK) {
        note(thread, "view", paths[path], status, &error);
        return;
    }
    for (size_t i = 0; i < VIEWS; i++) {
        const struct rk_value_view *view = &views.views[i];
        uint64_t offset = 0;
        note(thread, "view", paths[path], view->status, &error);
        for (size_t part = 0; view->status == RK_OK && part < view->num_parts; part++) {
            verify(thread, paths[path], numbers[i], offset, view->parts[part].data,
                   view->parts[part].bytes);
            offset += view->parts[part].bytes;
        }
        if (view->status == RK_OK) {
            size_check(thread, paths[path], numbers[i], offset);
        }
    }
    rk_values_release(clients[path], &views);
}

static void put(struct thread *thread, size_t path, uint64_t number, uint64_t bytes)
{
    struct name name;
    struct rk_error error = {.text = ""};
    name_set(&name, number);
    value_fill(number, thread->buffer, bytes);
    struct rk_value_put put = {.key = name.key, .data = thread->buffer, .bytes = bytes};
    enum rk_status status = rk_values_put(clients[path], &put, 1, TIMEOUT_MS, &error);
    note(thread, "put", paths[path], status == RK_OK ? put.status : status, &error);
}

static void drop(struct thread *thread, size_t path, uint64_t number)
{
    struct name name;
    struct rk_error error = {.text = ""};
    bool flag = false;
    name_set(&name, number);
    enum rk_status status =
        rk_values_exists(clients[path], &name.key, 1, TIMEOUT_MS, &flag, &error);
    note(thread, "exists", paths[path], status, &error);
    status = rk_values_drop(clients[path], &name.key, 1, TIMEOUT_MS, &flag, &error);
    note(thread, "drop", paths[path], status, &error);
}

/* Values of 2 MiB that nobody reads, until the others' must go; and drops some of those. */
static void evict(struct thread *thread, uint64_t turn)
{
    for (uint64_t i = 0; i < BURST && !atomic_load(&stopping); i++) {
        put(thread, (turn + i) % NUM_PATHS, UINT64_C(1000000) + turn * BURST + i, 2 * MIB);
        drop(thread, (turn + i) % NUM_PATHS, value_random(&thread->random, NUM_VALUES));
    }
    for (uint64_t i = 0; i < BURST; i += 2) {
        drop(thread, turn % NUM_PATHS, UINT64_C(1000000) + turn * BURST + i);
    }
}

static void *thread_run(void *context)
{
    struct thread *thread = context;
    for (uint64_t turn = 0; !atomic_load(&stopping); turn++) {
        size_t path = turn % NUM_PATHS;
        uint64_t number = value_random(&thread->random, NUM_VALUES);
        if (thread->work == READ && turn % 2 == 0) {
            get(thread, path, number);
        } else if (thread->work == READ) {
            view(thread, path);
        } else if (thread->work == WRITE) {
            put(thread, path, number, bytes_of(number));
        } else {
            evict(thread, turn);
            rk_clock_sleep_ms(100); /* The others get to fill it again. */
        }
    }
    return NULL;
}

/* ---- The test ---- */

static void threads_end(void)
{
    uint64_t good[NUM_WORKS] = {0};
    atomic_store(&stopping, true);
    for (size_t i = 0; i < NUM_THREADS; i++) {
        pthread_join(threads[i].thread, NULL);
        rk_free(threads[i].buffer);
        good[threads[i].work] += threads[i].statuses[RK_OK];
    }
    for (int status = 0; status < RK_STATUS_COUNT; status++) {
        uint64_t counts[NUM_WORKS] = {0};
        uint64_t all = 0;
        for (size_t i = 0; i < NUM_THREADS; i++) {
            counts[threads[i].work] += threads[i].statuses[status];
            all += threads[i].statuses[status];
        }
        for (int work = 0; all > 0 && work < NUM_WORKS; work++) {
            print_message("%s: %llu %s\n", works[work], (unsigned long long)counts[work],
                          rk_status_name((enum rk_status)status));
        }
    }
    for (size_t i = 0; i < NUM_THREADS; i++) {
        if (threads[i].wrong[0] != '\0') {
            fail_msg("%s", threads[i].wrong);
        }
    }
    assert_true(good[READ] > 0 && good[WRITE] > 0 && good[EVICT] > 0);
}

static void all_at_once(void **state)
{
    const char *seconds = getenv("RK_STRESS_SECONDS");
    const char *given = getenv("REDKNOT_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 10) : (uint64_t)rk_clock_ns();
    const struct cluster_options options = {.dram = "64MiB"};
    (void)state;
    print_message("seed %llu (REDKNOT_TEST_SEED)\n", (unsigned long long)seed);
    cluster_start(&cluster, &options);
    for (size_t i = 0; i < NUM_PATHS; i++) {
        const struct rk_values_options client = {.coordinator = cluster.coordinator_address,
                                                 .path = paths[i]};
        assert_int_equal(rk_values_create(&client, &clients[i], NULL), RK_OK);
    }
    for (size_t i = 0; i < NUM_THREADS; i++) {
        threads[i].random = seed + i * UINT64_C(1000000007);
        threads[i].buffer = rk_alloc(2 * MIB);
        assert_non_null(threads[i].buffer);
        assert_int_equal(pthread_create(&threads[i].thread, NULL, thread_run, &threads[i]), 0);
    }
    rk_clock_sleep_ms(1000 * (seconds ? strtol(seconds, NULL, 10) : 5));
    threads_end();
    print_message("evictions: %.0f\n",
                  cluster_metric(cluster.store_metrics, "redknot_kvstore_evictions_total "));
    assert_true(cluster_metric(cluster.store_metrics, "redknot_kvstore_evictions_total ") > 0);
    assert_true(cluster_metric(cluster.store_metrics, "redknot_kvstore_checksum_failures_total ") ==
                0);
    cluster_store_becomes_quiet(&cluster);
    for (size_t i = 0; i < NUM_PATHS; i++) {
        rk_values_destroy(clients[i]);
    }
    cluster_stop(&cluster);
}

int main(void)
{
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
    const struct CMUnitTest tests[] = {cmocka_unit_test(all_at_once)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
