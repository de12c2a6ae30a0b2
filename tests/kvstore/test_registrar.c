/*
 * Goal:   the coordinator learns what a store holds and loses, also after it
 *         was away, restarted or asks for everything again.
 * Method: a coordinator of a few lines in this process that writes down what it
 *         is told; the store and its registrar beside it.
 */
#include "kvstore/service_internal.h"
#include "tests/kvstore/shard_support.h"

#include "common/base/clock.h"
#include "common/base/log.h"
#include "redknot/v1/coordinator.pb-c.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define WAIT_MS 20000

static struct {
    pthread_mutex_t mutex;
    uint64_t epoch;
    int registers;
    int announces;
    int heartbeats;
    size_t entries; /* of the last announcement */
    size_t tokens;
    size_t removed;
    bool register_again;      /* answered once */
    struct kvstore_name drop; /* generation 0: nothing; answered once */
    int hold_beats;           /* an announcement is held up until so many heartbeats came */
    bool held;                /* one is */
    size_t removed_while_held;
    size_t origins;
} told = {.mutex = PTHREAD_MUTEX_INITIALIZER, .epoch = 1};

static enum rk_status handle_register(struct rk_rpc_call *call, void *context,
                                      struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    Redknot__V1__RegisterReply reply = REDKNOT__V1__REGISTER_REPLY__INIT;
    (void)context;
    (void)error;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__register_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__NodeInfo *node = ((Redknot__V1__RegisterRequest *)message)->node;
    RK_ASSERT(node && strcmp(node->node_id, "store-a") == 0 && node->incarnation == 77 &&
              strcmp(node->grpc_address, "127.0.0.1:9") == 0 && node->capacity_bytes > 0);
    rk_rpc_message_free(message);
    pthread_mutex_lock(&told.mutex);
    told.registers++;
    reply.epoch = told.epoch;
    reply.mark = 1000 + (uint64_t)told.registers;
    pthread_mutex_unlock(&told.mutex);
    reply.heartbeat_ms = 20;
    return rk_rpc_call_send(call, &reply.base);
}

/* As a slow network, or a slow coordinator, would: until enough heartbeats have come beside it. */
static void hold_up(void)
{
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    pthread_mutex_lock(&told.mutex);
    int until = told.heartbeats + told.hold_beats;
    told.held = told.hold_beats > 0;
    while (told.held && told.heartbeats < until && rk_deadline_left_ms(deadline_ns) > 0) {
        pthread_mutex_unlock(&told.mutex);
        rk_clock_sleep_ms(2);
        pthread_mutex_lock(&told.mutex);
    }
    told.held = false;
    told.hold_beats = 0;
    pthread_mutex_unlock(&told.mutex);
}

static enum rk_status handle_announce(struct rk_rpc_call *call, void *context,
                                      struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    size_t entries = 0;
    size_t tokens = 0;
    size_t origins = 0;
    enum rk_status status = RK_OK;
    (void)context;
    (void)error;
    while ((status = rk_rpc_call_recv(call, &redknot__v1__announce_request__descriptor,
                                      &message)) == RK_OK) {
        const Redknot__V1__AnnounceRequest *part = (const Redknot__V1__AnnounceRequest *)message;
        RK_ASSERT(strcmp(part->node_id, "store-a") == 0 && part->n_entries <= 256);
        pthread_mutex_lock(&told.mutex); /* The mark of the registration before it. */
        RK_ASSERT(part->epoch == told.epoch && part->mark == 1000 + (uint64_t)told.registers);
        pthread_mutex_unlock(&told.mutex);
        entries += part->n_entries;
        for (size_t i = 0; i < part->n_entries; i++) {
            const Redknot__V1__Shard *shard = part->entries[i]->shard;
            RK_ASSERT(shard && shard->heads && shard->layout && shard->layout->head_dim == 16);
            tokens += part->entries[i]->n_token_ids;
            origins += part->entries[i]->origin != NULL;
        }
        rk_rpc_message_free(message);
        hold_up();
    }
    if (status != RK_ERR_NOT_FOUND) {
        return status;
    }
    Redknot__V1__AnnounceReply reply = REDKNOT__V1__ANNOUNCE_REPLY__INIT;
    Redknot__V1__Shard shard = REDKNOT__V1__SHARD__INIT;
    Redknot__V1__Shard *drop = &shard;
    struct kvstore_name name;
    pthread_mutex_lock(&told.mutex);
    told.announces++;
    told.entries = entries;
    told.tokens = tokens;
    told.origins = origins;
    name = told.drop;
    told.drop.generation = 0;
    pthread_mutex_unlock(&told.mutex);
    if (name.generation != 0) {
        shard.segment_id.data = name.segment_id.bytes;
        shard.segment_id.len = RK_ID_BYTES;
        shard.generation = name.generation;
        reply.n_drop = 1;
        reply.drop = &drop;
    }
    return rk_rpc_call_send(call, &reply.base);
}

static enum rk_status handle_heartbeat(struct rk_rpc_call *call, void *context,
                                       struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    Redknot__V1__HeartbeatReply reply = REDKNOT__V1__HEARTBEAT_REPLY__INIT;
    (void)context;
    (void)error;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__heartbeat_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    pthread_mutex_lock(&told.mutex);
    told.heartbeats++;
    told.removed += ((Redknot__V1__HeartbeatRequest *)message)->n_removed;
    told.removed_while_held +=
        told.held ? ((Redknot__V1__HeartbeatRequest *)message)->n_removed : 0;
    reply.epoch = told.epoch;
    reply.register_again = told.register_again;
    told.register_again = false;
    pthread_mutex_unlock(&told.mutex);
    rk_rpc_message_free(message);
    return rk_rpc_call_send(call, &reply.base);
}

static struct rk_rpc_server *coordinator_start(const char *address)
{
    static const struct rk_rpc_method methods[] = {
        {.path = "/redknot.v1.Coordinator/RegisterNode", .handler = handle_register},
        {.path = "/redknot.v1.Coordinator/Announce", .handler = handle_announce},
        {.path = "/redknot.v1.Coordinator/Heartbeat", .handler = handle_heartbeat},
    };
    const struct rk_rpc_server_options options = {.address = address};
    struct rk_rpc_server *server = NULL;
    struct rk_error error = {0};
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    while (rk_rpc_server_create(&options, &server, &error) != RK_OK) {
        assert_true(rk_deadline_left_ms(deadline_ns) > 0); /* The port may come free late. */
        rk_clock_sleep_ms(20);
    }
    assert_int_equal(rk_rpc_server_add_service(server, "redknot.v1.Coordinator", methods, 3, NULL),
                     RK_OK);
    assert_int_equal(rk_rpc_server_start(server), RK_OK);
    return server;
}

static int told_now(const int *field)
{
    pthread_mutex_lock(&told.mutex);
    int value = *field;
    pthread_mutex_unlock(&told.mutex);
    return value;
}

static void wait_above(const int *field, int value)
{
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    while (told_now(field) <= value && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(2);
    }
    assert_true(told_now(field) > value);
}

static void put_many(struct kvstore *store, uint32_t count)
{
    static int32_t tokens[64];
    for (uint32_t i = 0; i < count; i++) {
        struct kvstore_header header = shard_header(i, 1, 64);
        header.token_ids = tokens;
        header.num_token_ids = 64;
        if (i % 2 == 0) { /* As of a newer and of an older client. */
            header.origin.alone = header.segment_id;
        }
        assert_int_equal(shard_put(store, &header), RK_OK);
    }
}

static void the_coordinator_is_kept_informed(void **state)
{
    (void)state;
    const struct kvstore_options store_options = {.dram_bytes = 4096 * 4096, .removed_max = 16};
    struct kvstore *store = NULL;
    struct registrar *registrar = NULL;
    struct kvstore_stats stats;
    char address[64];
    assert_int_equal(kvstore_create(&store_options, &store, NULL), RK_OK);
    put_many(store, 300); /* More than one message holds. */
    struct rk_rpc_server *coordinator = coordinator_start("127.0.0.1:0");
    snprintf(address, sizeof(address), "127.0.0.1:%d", rk_rpc_server_port(coordinator));
    const struct registrar_options options = {.store = store,
                                              .coordinator = address,
                                              .node_id = "store-a",
                                              .incarnation = 77,
                                              .grpc_address = "127.0.0.1:9",
                                              .shm_socket = "",
                                              .metrics_address = ""};
    assert_int_equal(registrar_start(&options, &registrar, NULL), RK_OK);
    wait_above(&told.heartbeats, 0);
    assert_int_equal(told.entries, 300);
    assert_int_equal(told.tokens, 300 * 64);
    assert_int_equal(told.origins, 150);

    /* A removal is told, once. */
    struct kvstore_header header = shard_header(5, 1, 64);
    struct kvstore_name name = shard_name(&header);
    assert_int_equal(kvstore_drop(store, &name), RK_OK);
    wait_above(&told.heartbeats, told_now(&told.heartbeats) + 2);
    assert_int_equal(told.removed, 1);

    /* More removals than the list remembers: everything is announced. */
    int announces = told_now(&told.announces);
    for (uint32_t i = 100; i < 160; i++) {
        header = shard_header(i, 1, 64);
        name = shard_name(&header);
        assert_int_equal(kvstore_drop(store, &name), RK_OK);
    }
    wait_above(&told.announces, announces);

    /* Asked to register again, and told to drop what is not wanted. */
    announces = told_now(&told.announces);
    header = shard_header(7, 1, 64);
    pthread_mutex_lock(&told.mutex);
    told.drop = shard_name(&header);
    told.register_again = true;
    pthread_mutex_unlock(&told.mutex);
    wait_above(&told.announces, announces);
    wait_above(&told.heartbeats, told_now(&told.heartbeats) + 1);
    assert_int_equal(shard_read(store, &header), RK_MISS_ABSENT);

    /* The coordinator dies and comes back as another incarnation on the same port. */
    announces = told_now(&told.announces);
    rk_rpc_server_stop(coordinator, 0);
    rk_rpc_server_destroy(coordinator);
    rk_clock_sleep_ms(100);
    told.epoch = 2;
    coordinator = coordinator_start(address);
    wait_above(&told.announces, announces);
    kvstore_stats_get(store, &stats);
    assert_int_equal(told.entries, stats.num_shards);

    registrar_stop(registrar);
    rk_rpc_server_destroy(coordinator);
    kvstore_destroy(store);
}

/* Heartbeats go on beside it, and what is removed meanwhile is told after it: it may have been
 * listed before. */
static void a_long_announcement_is_no_silence(void **state)
{
    (void)state;
    const struct kvstore_options store_options = {.dram_bytes = 4096 * 4096};
    struct kvstore *store = NULL;
    struct registrar *registrar = NULL;
    char address[64];
    assert_int_equal(kvstore_create(&store_options, &store, NULL), RK_OK);
    put_many(store, 10);
    struct rk_rpc_server *coordinator = coordinator_start("127.0.0.1:0");
    snprintf(address, sizeof(address), "127.0.0.1:%d", rk_rpc_server_port(coordinator));
    const struct registrar_options options = {.store = store,
                                              .coordinator = address,
                                              .node_id = "store-a",
                                              .incarnation = 77,
                                              .grpc_address = "127.0.0.1:9",
                                              .shm_socket = "",
                                              .metrics_address = ""};
    pthread_mutex_lock(&told.mutex);
    told.hold_beats = 10;
    told.removed = 0;
    told.removed_while_held = 0;
    int announces = told.announces;
    int registers = told.registers;
    int heartbeats = told.heartbeats;
    pthread_mutex_unlock(&told.mutex);
    assert_int_equal(registrar_start(&options, &registrar, NULL), RK_OK);
    wait_above(&told.heartbeats, heartbeats + 2); /* It is under way. */
    struct kvstore_header header = shard_header(5, 1, 64);
    struct kvstore_name name = shard_name(&header);
    assert_int_equal(kvstore_drop(store, &name), RK_OK);
    wait_above(&told.announces, announces);
    wait_above(&told.heartbeats, told_now(&told.heartbeats) + 3);
    pthread_mutex_lock(&told.mutex);
    assert_int_equal(told.announces, announces + 1);
    assert_int_equal(told.registers, registers + 1);
    assert_int_equal(told.removed_while_held, 0);
    assert_int_equal(told.removed, 1);
    pthread_mutex_unlock(&told.mutex);
    registrar_stop(registrar);
    rk_rpc_server_destroy(coordinator);
    kvstore_destroy(store);
}

/* A stop does not wait for an announcement that nobody takes. */
static void an_announcement_ends_with_the_registrar(void **state)
{
    (void)state;
    const struct kvstore_options store_options = {.dram_bytes = 16 * 4096};
    struct kvstore *store = NULL;
    struct registrar *registrar = NULL;
    char address[64];
    assert_int_equal(kvstore_create(&store_options, &store, NULL), RK_OK);
    struct rk_rpc_server *coordinator = coordinator_start("127.0.0.1:0");
    snprintf(address, sizeof(address), "127.0.0.1:%d", rk_rpc_server_port(coordinator));
    const struct registrar_options options = {.store = store,
                                              .coordinator = address,
                                              .node_id = "store-a",
                                              .incarnation = 77,
                                              .grpc_address = "127.0.0.1:9",
                                              .shm_socket = "",
                                              .metrics_address = ""};
    pthread_mutex_lock(&told.mutex);
    told.hold_beats = 1000000;
    int heartbeats = told.heartbeats;
    pthread_mutex_unlock(&told.mutex);
    assert_int_equal(registrar_start(&options, &registrar, NULL), RK_OK);
    wait_above(&told.heartbeats, heartbeats + 2);
    int64_t begin_ns = rk_clock_ns();
    registrar_stop(registrar);
    assert_true(rk_clock_ns() - begin_ns < 5 * INT64_C(1000000000));
    pthread_mutex_lock(&told.mutex);
    told.held = false;
    pthread_mutex_unlock(&told.mutex);
    rk_rpc_server_destroy(coordinator);
    kvstore_destroy(store);
}

static void a_silent_coordinator_does_not_hold_up_the_end(void **state)
{
    (void)state;
    const struct kvstore_options store_options = {.dram_bytes = 16 * 4096};
    struct kvstore *store = NULL;
    struct registrar *registrar = NULL;
    const struct registrar_options options = {.coordinator = "127.0.0.1:1",
                                              .node_id = "store-a",
                                              .incarnation = 77,
                                              .grpc_address = "127.0.0.1:9",
                                              .shm_socket = "",
                                              .metrics_address = ""};
    struct registrar_options with_store = options;
    assert_int_equal(kvstore_create(&store_options, &store, NULL), RK_OK);
    with_store.store = store;
    assert_int_equal(registrar_start(&with_store, &registrar, NULL), RK_OK);
    rk_clock_sleep_ms(50);
    registrar_stop(registrar);
    kvstore_destroy(store);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_coordinator_is_kept_informed),
        cmocka_unit_test(a_long_announcement_is_no_silence),
        cmocka_unit_test(an_announcement_ends_with_the_registrar),
        cmocka_unit_test(a_silent_coordinator_does_not_hold_up_the_end),
    };
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
