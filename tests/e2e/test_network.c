/*
 * Goal:   whatever the network does, a call ends by its deadline with the right bytes or a status
 *         that says why not, the client works again when the network does, and the store keeps
 *         nothing for whoever is gone.
 * Method: a real coordinator and store in one network namespace, clients in another one; the veth
 *         pair between them is cut, slowed and made to lose packets, the processes at its ends are
 *         stopped and killed. Each test runs in a process and a network of its own, over UCX and
 *         over gRPC. Needs root, iproute2 and iptables; skipped without.
 */
#include "client/values.h"
#include "tests/e2e/cluster.h"
#include "tests/e2e/network.h"
#include "tests/e2e/value_bytes.h"
#include "tests/support/skip.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define MIB            (UINT64_C(1) << 20)
#define BIG_BYTES      (64 * MIB)
#define WAIT_MS        20000
#define DEADLINE_MS    1500
#define OVERRUN_MAX_MS 1000 /* the machine may be busy; the figure is printed */
#define NUM_LOSSY      200

static struct {
    const char *path;
    struct network network;
    struct cluster cluster;
    struct rk_values *values;
    uint64_t seed;
} fixture;

/* ---- Calls that are measured ---- */

struct call {
    bool put;
    uint64_t name; /* key and content */
    uint64_t bytes;
    void *data; /* a put's value, a get's buffer */
    int deadline_ms;
    enum rk_status status; /* of the item, or why the call failed */
    int64_t took_ms;
    char text[512];
    pthread_t thread;
    atomic_bool ended;
};

static struct call call_of(bool put, uint64_t name, uint64_t bytes, int deadline_ms)
{
    struct call call = {
        .put = put, .name = name, .bytes = bytes, .deadline_ms = deadline_ms, .text = ""};
    call.data = rk_alloc(bytes);
    assert_non_null(call.data);
    if (put) {
        value_fill(name, call.data, bytes);
    }
    return call;
}

/* From any thread: asserts nothing. */
static void call_make(struct call *call)
{
    char text[32];
    struct rk_error error = {.text = ""};
    int length = snprintf(text, sizeof(text), "value/%llu", (unsigned long long)call->name);
    const struct rk_value_key key = {text, (size_t)length};
    struct rk_value_put put = {.key = key, .data = call->data, .bytes = call->bytes};
    struct rk_value_get get = {.key = key, .buffer = call->data, .buffer_bytes = call->bytes};
    int64_t begin_ns = rk_clock_ns();
    call->status = call->put ? rk_values_put(fixture.values, &put, 1, call->deadline_ms, &error)
                             : rk_values_get(fixture.values, &get, 1, call->deadline_ms, &error);
    call->took_ms = (rk_clock_ns() - begin_ns) / 1000000;
    if (call->status == RK_OK) {
        call->status = call->put ? put.status : get.status;
    }
    if (call->status == RK_OK && !call->put && get.bytes != call->bytes) {
        call->status = RK_ERR_CORRUPT;
    }
    (void)snprintf(call->text, sizeof(call->text), "%s", error.text);
}

static void *call_thread(void *context)
{
    struct call *call = context;
    call_make(call);
    atomic_store(&call->ended, true);
    return NULL;
}

static void call_print(const struct call *call, const char *when)
{
    print_message("%s: %s of %llu KiB %s: %lld of %d ms, %s%s%s\n", fixture.path,
                  call->put ? "put" : "get", (unsigned long long)call->bytes / 1024, when,
                  (long long)call->took_ms, call->deadline_ms, rk_status_name(call->status),
                  call->text[0] ? ": " : "", call->text);
}

static void call_in_time(const struct call *call, const char *when)
{
    int64_t over_ms = call->took_ms - call->deadline_ms;
    call_print(call, when);
    if (over_ms > OVERRUN_MAX_MS) {
        fail_msg("a call went on %lld ms behind its deadline", (long long)over_ms);
    }
}

static void call_right(const struct call *call)
{
    if (call->status != RK_OK) {
        fail_msg("%s: %s", rk_status_name(call->status), call->text);
    }
    uint64_t right = value_compare(call->name, call->data, call->bytes);
    if (!call->put && right != call->bytes) {
        fail_msg("value %llu is wrong from byte %llu on", (unsigned long long)call->name,
                 (unsigned long long)right);
    }
}

/* One that has to work, in the time that there is. */
static void expect_right(bool put, uint64_t name, uint64_t bytes)
{
    struct call call = call_of(put, name, bytes, WAIT_MS);
    call_make(&call);
    call_right(&call);
    rk_free(call.data);
}

/* The same client works again, soon. Puts a value of this name first. */
static void expect_recovery(uint64_t name, uint64_t bytes)
{
    int64_t begin_ns = rk_clock_ns();
    for (int kind = 0; kind < 2; kind++) {
        struct call call = call_of(kind == 0, name, bytes, WAIT_MS);
        do {
            call_make(&call);
            rk_clock_sleep_ms(call.status == RK_OK ? 0 : 50);
        } while (call.status != RK_OK && rk_clock_ns() - begin_ns < WAIT_MS * INT64_C(1000000));
        call_right(&call);
        rk_free(call.data);
    }
    print_message("%s: works again after %lld ms\n", fixture.path,
                  (long long)(rk_clock_ns() - begin_ns) / 1000000);
}

static void expect_quiet_store(void)
{
    int64_t begin_ns = rk_clock_ns();
    cluster_store_becomes_quiet(&fixture.cluster);
    print_message("%s: no pin and nothing staged after %lld ms\n", fixture.path,
                  (long long)(rk_clock_ns() - begin_ns) / 1000000);
}

/* ---- The link is cut ---- */

static void cut_in_the_middle(enum network_cut cut, bool put)
{
    expect_right(true, 1, BIG_BYTES);
    expect_right(false, 1, BIG_BYTES);
    network_slow(&fixture.network, "400mbit", "256kb"); /* 1.4 s for the value */
    struct call call = call_of(put, put ? 2 : 1, BIG_BYTES, DEADLINE_MS);
    assert_int_equal(pthread_create(&call.thread, NULL, call_thread, &call), 0);
    rk_clock_sleep_ms(300);
    network_cut(&fixture.network, cut);
    bool early = atomic_load(&call.ended);
    pthread_join(call.thread, NULL);
    assert_false(early);
    assert_int_not_equal(call.status, RK_OK);
    call_in_time(&call, "when the link is cut");
    rk_free(call.data);
    for (int kind = 0; kind < 2; kind++) { /* And while it stays so. */
        struct call next = call_of(kind == 0, 3, MIB, 700);
        call_make(&next);
        assert_int_not_equal(next.status, RK_OK);
        call_in_time(&next, "over a link that is cut");
        rk_free(next.data);
    }
    network_mend(&fixture.network, cut);
    network_speed_up(&fixture.network);
    expect_recovery(3, MIB);
    expect_right(false, 1, BIG_BYTES);
    expect_right(true, 2, BIG_BYTES);
    expect_right(false, 2, BIG_BYTES);
    expect_quiet_store();
}

static void link_goes_down_in_a_get(void **state)
{
    (void)state;
    cut_in_the_middle(NETWORK_LINK_DOWN, false);
}

static void link_goes_down_in_a_put(void **state)
{
    (void)state;
    cut_in_the_middle(NETWORK_LINK_DOWN, true);
}

static void packets_vanish_in_a_get(void **state)
{
    (void)state;
    cut_in_the_middle(NETWORK_DROP, false);
}

static void packets_vanish_in_a_put(void **state)
{
    (void)state;
    cut_in_the_middle(NETWORK_DROP, true);
}

/* Somebody on the store's own side of the link. */
static void expect_service_beside_the_store(void)
{
    int status = -1;
    int64_t begin_ns = rk_clock_ns();
    struct process peer = {.argv = {REDKNOT_BINARY_DIR "/tests/values_peer",
                                    fixture.cluster.coordinator_address, fixture.path, "once",
                                    "100000", NULL},
                           .netns = fixture.network.server_side};
    (void)snprintf(peer.log, sizeof(peer.log), "%s/peer.log", fixture.cluster.folder);
    process_start(&peer);
    assert_int_equal(waitpid(peer.pid, &status, 0), peer.pid);
    print_message("%s: beside the store, a put and a get: wait status %d after %lld ms\n",
                  fixture.path, status, (long long)(rk_clock_ns() - begin_ns) / 1000000);
    assert_int_equal(status, 0);
}

/* As many readers as the store has handlers are lost at once; the others do not notice. */
static void lost_readers_block_no_other(void **state)
{
    (void)state;
    enum { NUM_READERS = 64, NUM_CLIENTS = 2, TIMEOUT_MS = 3000 };
    static struct rk_value_get gets[NUM_READERS];
    struct rk_values *clients[NUM_CLIENTS];
    const struct rk_values_options options = {.coordinator = fixture.cluster.coordinator_address,
                                              .path = fixture.path,
                                              .threads = NUM_READERS / NUM_CLIENTS};
    uint64_t operation = 0;
    expect_right(true, 1, 16 * MIB);
    network_slow(&fixture.network, "400mbit", "256kb");
    for (size_t i = 0; i < NUM_CLIENTS; i++) {
        assert_int_equal(rk_values_create(&options, &clients[i], NULL), RK_OK);
    }
    for (size_t i = 0; i < NUM_READERS; i++) {
        gets[i] = (struct rk_value_get){
            .key = {"value/1", 7}, .buffer = rk_alloc(16 * MIB), .buffer_bytes = 16 * MIB};
        assert_non_null(gets[i].buffer);
        assert_int_equal(rk_values_submit_get(clients[i % NUM_CLIENTS], &gets[i], 1, TIMEOUT_MS,
                                              &operation, NULL),
                         RK_OK);
    }
    rk_clock_sleep_ms(1500);
    network_cut(&fixture.network, NETWORK_DROP);
    rk_clock_sleep_ms(TIMEOUT_MS); /* Their deadlines have passed. */
    expect_service_beside_the_store();
    network_mend(&fixture.network, NETWORK_DROP);
    network_speed_up(&fixture.network);
    for (size_t i = 0; i < NUM_CLIENTS; i++) {
        rk_values_destroy(clients[i]);
    }
    for (size_t i = 0; i < NUM_READERS; i++) {
        rk_free(gets[i].buffer);
    }
    expect_recovery(3, MIB);
    expect_quiet_store();
}

/* ---- The link is bad ---- */

static void slow_link_costs_time_alone(void **state)
{
    (void)state;
    expect_right(true, 1, MIB);
    expect_right(true, 2, 16 * MIB);
    network_slow(&fixture.network, "20mbit", "32kbit");
    struct call small = call_of(false, 1, MIB, WAIT_MS);
    call_make(&small);
    call_print(&small, "over 20 Mbit/s");
    call_right(&small);
    struct call big = call_of(false, 2, 16 * MIB, 500);
    call_make(&big);
    assert_true(big.status == RK_MISS_DEADLINE || big.status == RK_MISS_NODE_DOWN);
    call_in_time(&big, "over 20 Mbit/s");
    rk_free(small.data);
    rk_free(big.data);
    expect_recovery(3, MIB / 4); /* Late frames of the big one are nobody's. */
    network_speed_up(&fixture.network);
    expect_right(false, 2, 16 * MIB);
    expect_quiet_store();
}

static void lost_packets_cost_time_alone(void **state)
{
    (void)state;
    uint64_t random = fixture.seed;
    uint64_t sizes[NUM_LOSSY / 2];
    int64_t begin_ns = rk_clock_ns();
    expect_right(true, 1000, 1); /* Connects. */
    network_lose(&fixture.network, "0.05");
    for (uint64_t i = 0; i < NUM_LOSSY / 2; i++) {
        sizes[i] = 1 + value_random(&random, MIB / 4);
        expect_right(true, i, sizes[i]);
    }
    for (uint64_t i = 0; i < NUM_LOSSY / 2; i++) {
        expect_right(false, i, sizes[i]);
    }
    print_message("%s: %d calls with lost packets in %lld ms\n", fixture.path, NUM_LOSSY,
                  (long long)(rk_clock_ns() - begin_ns) / 1000000);
}

/* ---- Processes end and stop ---- */

/* A thread that goes on calling. */
struct caller {
    pthread_t thread;
    bool put;
    uint64_t name; /* of a get; a put's first one */
    uint64_t bytes;
    atomic_bool *stop;
    bool wrong; /* wrong bytes, or a status that is neither RK_OK nor a reason */
    enum rk_status wrong_status;
    int64_t longest_ms;
    uint64_t calls;
    char wrong_text[512];
    uint64_t good;
};

static bool acceptable(const struct call *call)
{
    if (call->status == RK_OK) {
        return call->put || value_compare(call->name, call->data, call->bytes) == call->bytes;
    }
    return rk_status_is_miss(call->status) || call->status == RK_ERR_UNAVAILABLE ||
           (call->put && call->status == RK_ERR_DEADLINE);
}

static void *caller_thread(void *context)
{
    struct caller *caller = context;
    struct call call = {.put = caller->put,
                        .name = caller->name,
                        .bytes = caller->bytes,
                        .deadline_ms = DEADLINE_MS,
                        .data = rk_alloc(caller->bytes)};
    while (call.data && !atomic_load(caller->stop)) {
        if (call.put) {
            call.name++;
            value_fill(call.name, call.data, call.bytes);
        } else {
            memset(call.data, 0xee, call.bytes);
        }
        call_make(&call);
        caller->calls++;
        caller->good += call.status == RK_OK;
        caller->longest_ms = call.took_ms > caller->longest_ms ? call.took_ms : caller->longest_ms;
        if (!acceptable(&call)) {
            caller->wrong = true;
            caller->wrong_status = call.status;
            (void)snprintf(caller->wrong_text, sizeof(caller->wrong_text), "%s", call.text);
        }
        rk_clock_sleep_ms(call.status == RK_OK ? 0 : 5);
    }
    rk_free(call.data);
    return NULL;
}

static void callers_start(struct caller *callers, size_t count, atomic_bool *stop)
{
    for (size_t i = 0; i < count; i++) {
        callers[i].stop = stop;
        assert_int_equal(pthread_create(&callers[i].thread, NULL, caller_thread, &callers[i]), 0);
    }
}

static void callers_end(struct caller *callers, size_t count, const char *when)
{
    atomic_store(callers[0].stop, true);
    for (size_t i = 0; i < count; i++) {
        pthread_join(callers[i].thread, NULL);
    }
    for (size_t i = 0; i < count; i++) {
        const struct caller *caller = &callers[i];
        print_message("%s: %ss %s: %llu, %llu of them RK_OK, the longest %lld of %d ms\n",
                      fixture.path, caller->put ? "put" : "get", when,
                      (unsigned long long)caller->calls, (unsigned long long)caller->good,
                      (long long)caller->longest_ms, DEADLINE_MS);
        if (caller->wrong) {
            fail_msg("wrong bytes or status: %s: %s", rk_status_name(caller->wrong_status),
                     caller->wrong_text);
        }
        assert_true(caller->good > 0);
        assert_true(caller->longest_ms <= DEADLINE_MS + OVERRUN_MAX_MS);
    }
}

static void store_is_killed_and_comes_back(void **state)
{
    (void)state;
    atomic_bool stop = false;
    struct caller readers[] = {{.name = 1, .bytes = 3 * MIB + 17}, {.name = 2, .bytes = 70000}};
    expect_right(true, 1, readers[0].bytes);
    expect_right(true, 2, readers[1].bytes);
    callers_start(readers, 2, &stop);
    for (int i = 0; i < 3; i++) {
        rk_clock_sleep_ms(300);
        process_kill(&fixture.cluster.store, SIGKILL);
        rk_clock_sleep_ms(i * 400);
        process_start(&fixture.cluster.store);
        cluster_wait(&fixture.cluster, 1, 0);
        expect_recovery(1, readers[0].bytes); /* It came back empty. */
        expect_recovery(2, readers[1].bytes);
    }
    callers_end(readers, 2, "from a store that is killed three times");
    expect_quiet_store();
}

static void killed_client_lets_go(void **state)
{
    static const char *const works[] = {"get", "put"};
    static const char *const gauges[] = {"redknot_kvstore_pinned_bytes ",
                                         "redknot_kvstore_staged "};
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct process peer = {.argv = {REDKNOT_BINARY_DIR "/tests/values_peer",
                                        fixture.cluster.coordinator_address, fixture.path, works[i],
                                        "67108864", NULL}};
        (void)snprintf(peer.log, sizeof(peer.log), "%s/peer.log", fixture.cluster.folder);
        network_slow(&fixture.network, "400mbit", "256kb");
        process_start(&peer);
        int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
        while (cluster_metric(fixture.cluster.store_metrics, gauges[i]) == 0) {
            assert_true(rk_deadline_left_ms(deadline_ns) > 0);
            rk_clock_sleep_ms(20);
        }
        process_kill(&peer, SIGKILL);
        network_speed_up(&fixture.network);
        expect_quiet_store();
    }
    expect_recovery(3, MIB);
}

static void stopped_store_costs_the_deadline(void **state)
{
    (void)state;
    enum { NUM_CALLERS = 4 };
    atomic_bool stop = false;
    struct caller callers[NUM_CALLERS] = {{.name = 1, .bytes = 8 * MIB},
                                          {.name = 2, .bytes = 100000},
                                          {.put = true, .name = 1000, .bytes = 8 * MIB},
                                          {.put = true, .name = 5000000, .bytes = 100000}};
    expect_right(true, 1, callers[0].bytes);
    expect_right(true, 2, callers[1].bytes);
    callers_start(callers, NUM_CALLERS, &stop);
    rk_clock_sleep_ms(500);
    assert_int_equal(kill(fixture.cluster.store.pid, SIGSTOP), 0);
    rk_clock_sleep_ms(2 * DEADLINE_MS);
    callers_end(callers, NUM_CALLERS, "when the store is stopped");
    assert_int_equal(kill(fixture.cluster.store.pid, SIGCONT), 0);
    expect_recovery(3, 8 * MIB);
    expect_quiet_store();
}

/* The list of stores is known: the coordinator is not needed for a while. */
static void stopped_coordinator_costs_nothing(void **state)
{
    (void)state;
    unsigned good = 0;
    expect_right(true, 1, MIB);
    assert_int_equal(kill(fixture.cluster.coordinator.pid, SIGSTOP), 0);
    rk_clock_sleep_ms(1200); /* The list is older than a client likes it to be. */
    for (int i = 0; i < 8; i++) {
        struct call call = call_of(false, 1, MIB, 700);
        call_make(&call);
        call_in_time(&call, "when the coordinator is stopped");
        good += call.status == RK_OK;
        rk_free(call.data);
        rk_clock_sleep_ms(100);
    }
    assert_int_equal(kill(fixture.cluster.coordinator.pid, SIGCONT), 0);
    expect_recovery(3, MIB);
    print_message("%s: %u of 8 gets worked without the coordinator\n", fixture.path, good);
    assert_int_equal(good, 8);
}

/* ---- Each test in a process and a network of its own ---- */

struct scene {
    const char *path;
    struct CMUnitTest test;
    struct network network;
};

static const char *missing;

static int inner_set_up(void **state)
{
    static char ucx[32];
    const char *store_args[] = {"--ucx", ucx, "--scrub-rate", "0", NULL};
    const struct cluster_options options = {.dram = "256MiB",
                                            .host = fixture.network.server_host,
                                            .netns = fixture.network.server_side,
                                            .store_args = store_args};
    const struct rk_values_options client = {.coordinator = fixture.cluster.coordinator_address,
                                             .path = fixture.path};
    (void)state;
    /* The same port for each incarnation, below all that the cluster takes. */
    (void)snprintf(ucx, sizeof(ucx), "%s:14999", fixture.network.server_host);
    cluster_start(&fixture.cluster, &options);
    assert_int_equal(rk_values_create(&client, &fixture.values, NULL), RK_OK);
    return 0;
}

static int inner_tear_down(void **state)
{
    (void)state;
    rk_values_destroy(fixture.values);
    cluster_stop(&fixture.cluster);
    return 0;
}

static int outer_set_up(void **state)
{
    struct scene *scene = *state;
    if (!missing) {
        network_make(&scene->network);
    }
    return 0;
}

static int outer_tear_down(void **state)
{
    struct scene *scene = *state;
    network_remove(&scene->network);
    return 0;
}

static void play(struct scene *scene)
{
    const struct CMUnitTest tests[] = {scene->test};
    char name[128];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    fixture.path = scene->path;
    fixture.network = scene->network;
    if (!network_enter(scene->network.client_side)) {
        perror("entering a network namespace");
        _exit(1);
    }
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
    cmocka_set_test_filter(NULL); /* It was for the outer ones. */
    (void)snprintf(name, sizeof(name), "%s over %s", scene->test.name, scene->path);
    int failed = cmocka_run_group_tests_name(name, tests, NULL, NULL);
    (void)fflush(NULL);
    _exit(failed);
}

static void scene_test(void **state)
{
    struct scene *scene = *state;
    int status = 0;
    if (missing) {
        char reason[160];
        (void)snprintf(reason, sizeof(reason), "networks cannot be made here without %s", missing);
        test_skip("all tests across a network that fails", reason);
    }
    (void)fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        play(scene);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv)
{
    const char *given = getenv("REDKNOT_TEST_SEED");
    fixture.seed = given ? strtoull(given, NULL, 10) : (uint64_t)rk_clock_ns();
    print_message("seed %llu (REDKNOT_TEST_SEED)\n", (unsigned long long)fixture.seed);
    missing = network_missing();
    static const char *const paths[] = {"ucx", "grpc"};
#define INSIDE(test) cmocka_unit_test_setup_teardown(test, inner_set_up, inner_tear_down)
    const struct CMUnitTest inner[] = {
        INSIDE(link_goes_down_in_a_get),
        INSIDE(link_goes_down_in_a_put),
        INSIDE(packets_vanish_in_a_get),
        INSIDE(packets_vanish_in_a_put),
        INSIDE(lost_readers_block_no_other),
        INSIDE(slow_link_costs_time_alone),
        INSIDE(lost_packets_cost_time_alone),
        INSIDE(store_is_killed_and_comes_back),
        INSIDE(killed_client_lets_go),
        INSIDE(stopped_store_costs_the_deadline),
        INSIDE(stopped_coordinator_costs_nothing),
    };
    enum { NUM_SCENES = 2 * sizeof(inner) / sizeof(inner[0]) };
    static struct scene scenes[NUM_SCENES];
    static struct CMUnitTest tests[NUM_SCENES];
    static char names[NUM_SCENES][96];
    for (size_t i = 0; i < NUM_SCENES; i++) {
        scenes[i].path = paths[i % 2];
        scenes[i].test = inner[i / 2];
        (void)snprintf(names[i], sizeof(names[i]), "%s/%s", scenes[i].path, scenes[i].test.name);
        tests[i] =
            (struct CMUnitTest){names[i], scene_test, outer_set_up, outer_tear_down, &scenes[i]};
    }
    if (argc > 1) {
        cmocka_set_test_filter(argv[1]); /* Such as "ucx/slow*". */
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    network_done();
    return test_exit_code(failed);
}
