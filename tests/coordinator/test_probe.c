/*
 * Goal:   a store that reports but does not answer is ejected: not placed on, not
 *         listed, its shards not located; it comes back by itself, slowly; probing
 *         it holds up nobody, the end of the coordinator included.
 * Method: a coordinator in this process, with heartbeats that never run out.
 *         Stores are test doubles that say they do not serve, a socket that takes
 *         connections and says nothing, and the real program, stopped by SIGSTOP.
 *         The test polls with a deadline for what must come.
 */
#include "tests/coordinator/fake_store.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/kv_layout.h"
#include "common/metrics/metrics.h"
#include "common/rpc/rpc.h"
#include "coordinator/coordinator.h"
#include "coordinator/metadata.h"
#include "coordinator/record.h"
#include "redknot/v1/coordinator.pb-c.h"

#include <netinet/in.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define CALL_MS  20000
#define WAIT_MS  30000
#define NEVER_MS 3600000

#define M(name) "/redknot.v1.Coordinator/" name

struct fixture {
    char directory[64];
    struct coordinator_options options;
    struct coordinator *coordinator;
    struct rk_rpc_channel *channel;
    struct fake_store stores[2];
    int listener;
    char listener_address[64];
    pid_t child;
};

static void up(struct fixture *f)
{
    struct rk_error error = {0};
    char address[64];

    assert_int_equal(coordinator_create(&f->options, &f->coordinator, &error), RK_OK);
    assert_int_equal(coordinator_start(f->coordinator), RK_OK);
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", coordinator_port(f->coordinator));
    assert_int_equal(rk_rpc_channel_create(address, &f->channel, &error), RK_OK);
}

static void down(struct fixture *f)
{
    rk_rpc_channel_destroy(f->channel);
    coordinator_destroy(f->coordinator);
    f->channel = NULL;
    f->coordinator = NULL;
}

/* Takes connections, by the kernel alone, and never says a word. */
static void listen_in_silence(struct fixture *f)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof(address);

    f->listener = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(f->listener >= 0);
    assert_int_equal(bind(f->listener, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(f->listener, 16), 0);
    assert_int_equal(getsockname(f->listener, (struct sockaddr *)&address, &bytes), 0);
    (void)snprintf(f->listener_address, sizeof(f->listener_address), "127.0.0.1:%d",
                   ntohs(address.sin_port));
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    assert_non_null(f);
    (void)strcpy(f->directory, "/tmp/redknot-probe-XXXXXX");
    assert_non_null(mkdtemp(f->directory));
    f->options = (struct coordinator_options){
        .listen = "127.0.0.1:0",
        .data_dir = f->directory,
        .timeout_ms = NEVER_MS,
        .values_lease_ms = 1, /* Over when a store is ejected. */
        .probe_interval_ms = 20,
        .probe_timeout_ms = 5000, /* Nobody fails by being slow, as under a sanitizer. */
    };
    for (int i = 0; i < 2; i++) {
        fake_store_start(&f->stores[i]);
    }
    listen_in_silence(f);
    up(f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    char command[96];

    if (f->child != 0) {
        (void)kill(f->child, SIGKILL);
        (void)waitpid(f->child, NULL, 0);
    }
    down(f);
    for (int i = 0; i < 2; i++) {
        fake_store_stop(&f->stores[i]);
    }
    (void)close(f->listener);
    (void)snprintf(command, sizeof(command), "rm -rf %s", f->directory);
    free(f);
    return system(command);
}

/* ---- Calls ---- */

static enum rk_status call(struct fixture *f, const char *path, const ProtobufCMessage *request,
                           const ProtobufCMessageDescriptor *type, ProtobufCMessage **ret_reply)
{
    return rk_rpc_unary(f->channel, path, request, type, CALL_MS, ret_reply, NULL);
}

static void join(struct fixture *f, const char *node_id, uint64_t incarnation, const char *address)
{
    Redknot__V1__NodeInfo info = REDKNOT__V1__NODE_INFO__INIT;
    Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;

    info.node_id = (char *)(uintptr_t)node_id;
    info.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;
    info.incarnation = incarnation;
    info.grpc_address = (char *)(uintptr_t)address;
    info.capacity_bytes = 1u << 30;
    request.node = &info;
    assert_int_equal(
        call(f, M("RegisterNode"), &request.base, &redknot__v1__register_reply__descriptor, &reply),
        RK_OK);
    rk_rpc_message_free(reply);
}

/* Its state; "" when there is no such node. */
static void node_state(struct fixture *f, const char *node_id, char ret_state[32])
{
    Redknot__V1__StatusRequest request = REDKNOT__V1__STATUS_REQUEST__INIT;
    Redknot__V1__StatusReply *reply = NULL;

    ret_state[0] = '\0';
    assert_int_equal(call(f, M("Status"), &request.base, &redknot__v1__status_reply__descriptor,
                          (ProtobufCMessage **)&reply),
                     RK_OK);
    for (size_t i = 0; i < reply->n_nodes; i++) {
        if (strcmp(reply->nodes[i]->info->node_id, node_id) == 0) {
            assert_true(reply->nodes[i]->alive); /* Heartbeats never run out here. */
            (void)snprintf(ret_state, 32, "%s", reply->nodes[i]->state);
        }
    }
    rk_rpc_message_free(&reply->base);
}

static void wait_for_state(struct fixture *f, const char *node_id, const char *wanted)
{
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    char found[32];

    node_state(f, node_id, found);
    while (strcmp(found, wanted) != 0 && rk_deadline_left_ms(deadline_ns) != 0) {
        rk_clock_sleep_ms(5);
        node_state(f, node_id, found);
    }
    assert_string_equal(found, wanted);
}

/* 0: not listed. */
static double listed_weight(struct fixture *f, const char *node_id)
{
    Redknot__V1__ListStoresRequest request = REDKNOT__V1__LIST_STORES_REQUEST__INIT;
    Redknot__V1__ListStoresReply *reply = NULL;
    double weight = 0;

    assert_int_equal(call(f, M("ListStores"), &request.base,
                          &redknot__v1__list_stores_reply__descriptor, (ProtobufCMessage **)&reply),
                     RK_OK);
    for (size_t i = 0; i < reply->n_stores; i++) {
        if (strcmp(reply->stores[i]->endpoint->node_id, node_id) == 0) {
            weight = reply->stores[i]->weight;
        }
    }
    rk_rpc_message_free(&reply->base);
    return weight;
}

/* Where it was placed; ret_generation may be NULL. */
static enum rk_status place(struct fixture *f, uint8_t id, char ret_node_id[32],
                            uint64_t *ret_generation)
{
    static uint8_t fingerprint[32] = {7};
    uint8_t segment_id[32] = {id};
    Redknot__V1__KvLayout layout = REDKNOT__V1__KV_LAYOUT__INIT;
    Redknot__V1__PlaceRequest request = REDKNOT__V1__PLACE_REQUEST__INIT;
    Redknot__V1__PlaceReply *reply = NULL;
    enum rk_status status;

    layout.num_layers = layout.num_kv_heads = layout.head_dim = 1;
    layout.dtype = REDKNOT__V1__KV_LAYOUT__DTYPE__DTYPE_F32;
    layout.page_tokens = RK_PAGE_TOKENS;
    request.segment_id = (ProtobufCBinaryData){32, segment_id};
    request.fingerprint = (ProtobufCBinaryData){32, fingerprint};
    request.layout = &layout;
    request.num_tokens = 1;
    status = call(f, M("Place"), &request.base, &redknot__v1__place_reply__descriptor,
                  (ProtobufCMessage **)&reply);
    if (status == RK_OK) {
        (void)snprintf(ret_node_id, 32, "%s", reply->shards[0]->node_id);
        if (ret_generation != NULL) {
            *ret_generation = reply->shards[0]->generation;
        }
        rk_rpc_message_free(&reply->base);
    }
    return status;
}

static enum rk_status commit(struct fixture *f, uint8_t id, uint64_t generation)
{
    uint8_t segment_id[32] = {id};
    Redknot__V1__CommitRequest request = REDKNOT__V1__COMMIT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    enum rk_status status;

    request.segment_id = (ProtobufCBinaryData){32, segment_id};
    request.generation = generation;
    status = call(f, M("Commit"), &request.base, &redknot__v1__commit_reply__descriptor, &reply);
    rk_rpc_message_free(reply);
    return status;
}

static void expect(struct fixture *f, uint8_t id, const char *miss)
{
    uint8_t segment_id[32] = {id};
    ProtobufCBinaryData ids[1] = {{32, segment_id}};
    Redknot__V1__LocateRequest request = REDKNOT__V1__LOCATE_REQUEST__INIT;
    Redknot__V1__LocateReply *reply = NULL;

    request.n_segment_ids = 1;
    request.segment_ids = ids;
    assert_int_equal(call(f, M("Locate"), &request.base, &redknot__v1__locate_reply__descriptor,
                          (ProtobufCMessage **)&reply),
                     RK_OK);
    assert_string_equal(reply->locations[0]->miss, miss);
    rk_rpc_message_free(&reply->base);
}

static double ejections(void)
{
    return rk_metric_value(rk_metric_counter("redknot_coordinator_ejections_total",
                                             "Stores that reported but did not answer.", NULL));
}

static double num_ejected(void)
{
    return rk_metric_value(rk_metric_gauge("redknot_coordinator_stores",
                                           "Store nodes known, by state.", "state=\"ejected\""));
}

static void wait_for_num_ejected(double wanted)
{
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);

    while (num_ejected() != wanted && rk_deadline_left_ms(deadline_ns) != 0) {
        rk_clock_sleep_ms(5);
    }
    assert_true(num_ejected() == wanted);
}

/* ---- Tests ---- */

static void a_store_that_does_not_serve_is_ejected(void **state)
{
    struct fixture *f = *state;
    double ejections_before = ejections();
    uint64_t generation;
    char node_id[32];
    uint8_t id = 0;

    down(f);
    f->options.slow_start_ms = NEVER_MS;
    up(f);
    join(f, "store-0", 11, f->stores[0].address);
    join(f, "store-1", 12, f->stores[1].address);
    do { /* A segment on store 0. */
        assert_int_equal(place(f, ++id, node_id, &generation), RK_OK);
    } while (strcmp(node_id, "store-0") != 0);
    assert_int_equal(commit(f, id, generation), RK_OK);
    expect(f, id, "");
    rk_rpc_server_set_serving(f->stores[0].server, false);
    wait_for_state(f, "store-0", "ejected");
    wait_for_num_ejected(1);
    assert_true(ejections() == ejections_before + 1);
    expect(f, id, "MISS_NODE_DOWN");
    assert_true(listed_weight(f, "store-0") == 0);
    assert_true(listed_weight(f, "store-1") > 0);
    for (uint8_t i = 100; i < 120; i++) {
        assert_int_equal(place(f, i, node_id, NULL), RK_OK);
        assert_string_equal(node_id, "store-1");
    }
    rk_rpc_server_set_serving(f->stores[1].server, false);
    wait_for_state(f, "store-1", "ejected");
    assert_int_equal(place(f, 100, node_id, NULL), RK_ERR_UNAVAILABLE);
    rk_rpc_server_set_serving(f->stores[1].server, true);
    wait_for_state(f, "store-1", "up"); /* Nobody is warmer. */
    rk_rpc_server_set_serving(f->stores[0].server, true);
    wait_for_state(f, "store-0", "up");
    wait_for_num_ejected(0);
    expect(f, id, ""); /* It still has what it had. */
    assert_true(ejections() == ejections_before + 2);
}

/* Of a database that an older version wrote: who registers now is asked for an address. */
static void a_store_without_an_address_is_ejected(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__NodeInfo info = REDKNOT__V1__NODE_INFO__INIT;
    Redknot__V1__HeartbeatRequest request = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    struct metadata_change change = {.key = "n/store-9", .key_bytes = 9};
    struct metadata *metadata = NULL;
    ProtobufCMessage *reply = NULL;
    void *data;

    down(f);
    info.node_id = (char *)(uintptr_t) "store-9";
    info.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;
    info.incarnation = 11;
    info.grpc_address = (char *)(uintptr_t) "nowhere";
    data = record_pack(&info.base, &change.value_bytes);
    change.value = data;
    assert_int_equal(metadata_rocksdb.open(f->directory, &metadata, NULL), RK_OK);
    assert_int_equal(metadata_rocksdb.write(metadata, &change, 1, true, NULL), RK_OK);
    metadata_rocksdb.close(metadata);
    rk_free(data);
    up(f);
    request.node_id = info.node_id;
    request.incarnation = 11;
    assert_int_equal(
        call(f, M("Heartbeat"), &request.base, &redknot__v1__heartbeat_reply__descriptor, &reply),
        RK_OK);
    rk_rpc_message_free(reply);
    wait_for_state(f, "store-9", "ejected");
}

/* Our own need of descriptors is not the store's fault; with some again, the store's silence is. */
static void our_own_shortage_ejects_nobody(void **state)
{
    struct fixture *f = *state;
    struct rlimit limit;
    struct rlimit none;
    char found[32];
    int held[64];
    int num_held = 0;

    join(f, "store-0", 11, f->stores[0].address);
    wait_for_state(f, "store-0", "up");
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    none = limit;
    none.rlim_cur = (rlim_t)dup(0);
    (void)close((int)none.rlim_cur);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    fake_store_stop(&f->stores[0]); /* A new connection would be needed, to learn that. */
    for (int i = 0; i < 500; i++) { /* Dozens of probes. */
        while (num_held < 64 && (held[num_held] = dup(0)) >= 0) {
            num_held++; /* What the store gave back is taken, too. */
        }
        rk_clock_sleep_ms(2);
    }
    node_state(f, "store-0", found);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    while (num_held > 0) {
        (void)close(held[--num_held]);
    }
    assert_string_not_equal(found, "ejected");
    wait_for_state(f, "store-0", "ejected");
}

static void a_readmitted_store_starts_slowly(void **state)
{
    struct fixture *f = *state;

    down(f);
    f->options.slow_start_ms = 0; /* Both are warm: */
    up(f);
    join(f, "store-0", 11, f->stores[0].address);
    join(f, "store-1", 12, f->stores[1].address);
    down(f);
    f->options.slow_start_ms = NEVER_MS; /* a restart of ours makes nobody new. */
    up(f);
    join(f, "store-0", 11, f->stores[0].address);
    join(f, "store-1", 12, f->stores[1].address);
    assert_true(listed_weight(f, "store-0") == listed_weight(f, "store-1"));
    rk_rpc_server_set_serving(f->stores[0].server, false);
    wait_for_state(f, "store-0", "ejected");
    rk_rpc_server_set_serving(f->stores[0].server, true);
    wait_for_state(f, "store-0", "slow start");
    assert_true(8 * listed_weight(f, "store-0") == listed_weight(f, "store-1"));
    rk_rpc_server_set_serving(f->stores[0].server, false);
    wait_for_state(f, "store-0", "ejected");
    join(f, "store-0", 13, f->stores[0].address); /* Another process: what failed was the former. */
    assert_true(8 * listed_weight(f, "store-0") == listed_weight(f, "store-1"));
}

/* It has no connection, and waiting for one must not cost the others their turn. */
static void silence_is_a_failure(void **state)
{
    struct fixture *f = *state;
    char found[32];

    down(f);
    f->options.probe_timeout_ms = 200;
    up(f);
    join(f, "silent", 11, f->listener_address);
    join(f, "store-0", 12, f->stores[0].address);
    wait_for_state(f, "silent", "ejected");
    rk_rpc_server_set_serving(f->stores[0].server, false);
    wait_for_state(f, "store-0", "ejected");
    rk_rpc_server_set_serving(f->stores[0].server, true);
    wait_for_state(f, "store-0", "up");
    node_state(f, "silent", found);
    assert_string_equal(found, "ejected");
}

static void start_store(struct fixture *f)
{
    char coordinator[64];
    char *arguments[] = {(char *)(uintptr_t) "redknot-kvstore",
                         (char *)(uintptr_t) "--coordinator",
                         coordinator,
                         (char *)(uintptr_t) "--node-id",
                         (char *)(uintptr_t) "real",
                         (char *)(uintptr_t) "--listen",
                         (char *)(uintptr_t) "127.0.0.1:0",
                         (char *)(uintptr_t) "--dram",
                         (char *)(uintptr_t) "16MiB",
                         (char *)(uintptr_t) "--metrics=",
                         (char *)(uintptr_t) "--ucx=",
                         (char *)(uintptr_t) "--shm-socket=",
                         NULL};

    (void)snprintf(coordinator, sizeof(coordinator), "127.0.0.1:%d",
                   coordinator_port(f->coordinator));
    assert_int_equal(posix_spawn(&f->child, REDKNOT_BINARY_DIR "/bin/redknot-kvstore", NULL, NULL,
                                 arguments, environ),
                     0);
    wait_for_state(f, "real", "up");
}

/* register_again of the reply. */
static bool heartbeat(struct fixture *f, const char *node_id, uint64_t incarnation)
{
    Redknot__V1__HeartbeatRequest request = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    Redknot__V1__HeartbeatReply *reply = NULL;
    bool again;

    request.node_id = (char *)(uintptr_t)node_id;
    request.incarnation = incarnation;
    assert_int_equal(call(f, M("Heartbeat"), &request.base,
                          &redknot__v1__heartbeat_reply__descriptor, (ProtobufCMessage **)&reply),
                     RK_OK);
    again = reply->register_again;
    rk_rpc_message_free(&reply->base);
    return again;
}

/* What was dropped in the meantime it still has. */
static void who_comes_back_announces_again(void **state)
{
    struct fixture *f = *state;

    join(f, "store-0", 11, f->stores[0].address);
    assert_false(heartbeat(f, "store-0", 11));
    rk_rpc_server_set_serving(f->stores[0].server, false);
    wait_for_state(f, "store-0", "ejected");
    assert_false(heartbeat(f, "store-0", 11));
    rk_rpc_server_set_serving(f->stores[0].server, true);
    wait_for_state(f, "store-0", "up");
    assert_true(heartbeat(f, "store-0", 11));
    join(f, "store-0", 11, f->stores[0].address);
    assert_false(heartbeat(f, "store-0", 11));

    down(f);
    f->options.timeout_ms = 20;
    f->options.heartbeat_ms = 10;
    up(f);
    join(f, "store-0", 11, f->stores[0].address);
    rk_clock_sleep_ms(50); /* Down, and back. */
    assert_true(heartbeat(f, "store-0", 11));
}

/* Its connection stands, and the kernel takes what is sent on it. */
static void a_stopped_process_is_ejected(void **state)
{
    struct fixture *f = *state;

    down(f);
    f->options.probe_timeout_ms = 300;
    up(f);
    start_store(f);
    rk_clock_sleep_ms(100); /* A few good probes, so that the prober has its connection. */
    assert_int_equal(kill(f->child, SIGSTOP), 0);
    wait_for_state(f, "real", "ejected");
    assert_true(listed_weight(f, "real") == 0);
    assert_int_equal(kill(f->child, SIGCONT), 0);
    wait_for_state(f, "real", "up");
    assert_true(listed_weight(f, "real") > 0);
}

/* Puts a segment whose commit the store answers so. */
static void commit_as(struct fixture *f, enum rk_status answer)
{
    uint64_t generation;
    char node_id[32];

    atomic_store(&f->stores[0].fail_commit, answer);
    assert_int_equal(place(f, 1, node_id, &generation), RK_OK);
    assert_int_equal(commit(f, 1, generation), answer);
}

static void failed_commits_eject(void **state)
{
    static const enum rk_status answers[] = {
        RK_ERR_UNAVAILABLE, RK_ERR_DEADLINE, RK_ERR_NOT_FOUND, /* An answer is an answer. */
        RK_ERR_UNAVAILABLE, RK_ERR_DEADLINE, RK_ERR_UNAVAILABLE,
    };
    struct fixture *f = *state;
    char node_id[32];
    char found[32];

    down(f);
    f->options.probe_interval_ms = NEVER_MS; /* On, but none comes. */
    f->options.probe_timeout_ms = 1000;
    up(f);
    join(f, "store-0", 11, f->stores[0].address);
    for (size_t i = 0; i < sizeof(answers) / sizeof(answers[0]); i++) {
        node_state(f, "store-0", found);
        assert_string_equal(found, "up");
        commit_as(f, answers[i]);
    }
    node_state(f, "store-0", found);
    assert_string_equal(found, "ejected");
    assert_int_equal(place(f, 1, node_id, NULL), RK_ERR_UNAVAILABLE);
}

/* A commit that had less time than a probe has says nothing of its store. */
static void a_commit_without_time_is_no_failure(void **state)
{
    struct fixture *f = *state;
    char found[32];

    down(f);
    f->options.probe_interval_ms = NEVER_MS;
    f->options.store_deadline_ms = 4000; /* Less than the timeout of a probe. */
    up(f);
    join(f, "store-0", 11, f->stores[0].address);
    for (int i = 0; i < 5; i++) {
        commit_as(f, RK_ERR_DEADLINE);
    }
    node_state(f, "store-0", found);
    assert_string_equal(found, "up");
}

static void without_probes_nobody_is_ejected(void **state)
{
    struct fixture *f = *state;
    char found[32];

    down(f);
    f->options.probe_interval_ms = 0;
    up(f);
    join(f, "store-0", 11, f->stores[0].address);
    for (int i = 0; i < 5; i++) {
        commit_as(f, RK_ERR_UNAVAILABLE);
    }
    node_state(f, "store-0", found);
    assert_string_equal(found, "up");
}

static void a_stop_waits_for_no_probe(void **state)
{
    struct fixture *f = *state;
    int64_t begin_ns;
    int connection;

    down(f);
    f->options.probe_timeout_ms = NEVER_MS;
    f->options.probe_interval_ms = 1;
    up(f);
    join(f, "silent", 11, f->listener_address);
    connection = accept(f->listener, NULL, NULL); /* The probe has begun. */
    assert_true(connection >= 0);
    begin_ns = rk_clock_ns();
    coordinator_stop(f->coordinator, 0);
    assert_true(rk_clock_ns() - begin_ns < INT64_C(20000000000)); /* Far less than its timeout. */
    (void)close(connection);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(a_store_that_does_not_serve_is_ejected),
        TEST(a_store_without_an_address_is_ejected),
        TEST(our_own_shortage_ejects_nobody),
        TEST(a_readmitted_store_starts_slowly),
        TEST(silence_is_a_failure),
        TEST(who_comes_back_announces_again),
        TEST(a_stopped_process_is_ejected),
        TEST(failed_commits_eject),
        TEST(a_commit_without_time_is_no_failure),
        TEST(without_probes_nobody_is_ejected),
        TEST(a_stop_waits_for_no_probe),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
