/*
 * Goal:   the coordinator's promises over real RPC: all or none, the newest
 *         generation wins, misses with their reasons, announcements replace,
 *         restarts are warm, bounds hold, garbage is refused.
 * Method: a coordinator in this process on a free port and a fresh directory;
 *         store nodes are test doubles that count calls and fail on demand.
 *         Nothing is timed: where time must pass, the test polls with a deadline.
 */
#include "tests/coordinator/fake_store.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/kv_layout.h"
#include "common/rpc/rpc.h"
#include "coordinator/coordinator.h"
#include "redknot/v1/coordinator.pb-c.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define CALL_MS 20000
#define WAIT_MS 20000

#define M(name) "/redknot.v1.Coordinator/" name

struct fixture {
    char directory[64];
    struct coordinator_options options;
    struct coordinator *coordinator;
    struct rk_rpc_channel *channel;
    struct fake_store stores[2];
    char last_error[512];
};

static uint8_t fingerprint[32] = {7};

static ProtobufCBinaryData bytes_of(const uint8_t *data)
{
    return (ProtobufCBinaryData){.len = 32, .data = (uint8_t *)(uintptr_t)data};
}

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

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    assert_non_null(f);
    (void)strcpy(f->directory, "/tmp/redknot-coordinator-XXXXXX");
    assert_non_null(mkdtemp(f->directory));
    f->options = (struct coordinator_options){
        .listen = "127.0.0.1:0",
        .data_dir = f->directory,
        .timeout_ms = 600000, /* Nobody goes down by being slow, as under a sanitizer. */
    };
    for (int i = 0; i < 2; i++) {
        fake_store_start(&f->stores[i]);
    }
    up(f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    char command[96];

    down(f);
    for (int i = 0; i < 2; i++) {
        fake_store_stop(&f->stores[i]);
    }
    (void)snprintf(command, sizeof(command), "rm -rf %s", f->directory);
    free(f);
    return system(command);
}

/* ---- Calls ---- */

static enum rk_status call(struct fixture *f, const char *path, const ProtobufCMessage *request,
                           const ProtobufCMessageDescriptor *type, ProtobufCMessage **ret_reply)
{
    struct rk_error error = {0};
    enum rk_status status =
        rk_rpc_unary(f->channel, path, request, type, CALL_MS, ret_reply, &error);

    (void)memcpy(f->last_error, error.text, sizeof(f->last_error));
    return status;
}

static const char *store_name(int i)
{
    return i == 0 ? "store-0" : "store-1";
}

static enum rk_status try_register(struct fixture *f, int i, uint64_t incarnation)
{
    Redknot__V1__NodeInfo info = REDKNOT__V1__NODE_INFO__INIT;
    Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    enum rk_status status;

    info.node_id = (char *)(uintptr_t)store_name(i);
    info.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;
    info.incarnation = incarnation;
    info.grpc_address = f->stores[i].address;
    info.capacity_bytes = (uint64_t)(i + 1) << 30;
    request.node = &info;
    status =
        call(f, M("RegisterNode"), &request.base, &redknot__v1__register_reply__descriptor, &reply);
    rk_rpc_message_free(reply);
    return status;
}

static void join(struct fixture *f, int i, uint64_t incarnation)
{
    assert_int_equal(try_register(f, i, incarnation), RK_OK);
}

/* removed may be NULL. Returns register_again. */
static bool heartbeat(struct fixture *f, int i, uint64_t incarnation, Redknot__V1__Shard *removed)
{
    Redknot__V1__HeartbeatRequest request = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    bool again;

    request.node_id = (char *)(uintptr_t)store_name(i);
    request.incarnation = incarnation;
    request.n_removed = removed != NULL;
    request.removed = &removed;
    assert_int_equal(
        call(f, M("Heartbeat"), &request.base, &redknot__v1__heartbeat_reply__descriptor, &reply),
        RK_OK);
    again = ((Redknot__V1__HeartbeatReply *)reply)->register_again;
    rk_rpc_message_free(reply);
    return again;
}

static enum rk_status place(struct fixture *f, uint8_t id, uint32_t num_tokens,
                            Redknot__V1__PlaceReply **ret_reply)
{
    uint8_t segment_id[32] = {id};
    uint32_t token_ids[64];
    Redknot__V1__KvLayout layout = REDKNOT__V1__KV_LAYOUT__INIT;
    Redknot__V1__PlaceRequest request = REDKNOT__V1__PLACE_REQUEST__INIT;

    layout.num_layers = 4;
    layout.num_kv_heads = 2;
    layout.head_dim = 8;
    layout.dtype = REDKNOT__V1__KV_LAYOUT__DTYPE__DTYPE_BF16;
    layout.page_tokens = RK_PAGE_TOKENS;
    for (uint32_t i = 0; i < 64; i++) {
        token_ids[i] = 1000u + id + i;
    }
    request.segment_id = bytes_of(segment_id);
    request.fingerprint = bytes_of(fingerprint);
    request.layout = &layout;
    request.num_tokens = num_tokens;
    request.n_token_ids = num_tokens < 64 ? num_tokens : 64;
    request.token_ids = token_ids;
    request.label = (char *)(uintptr_t) "a label";
    return call(f, M("Place"), &request.base, &redknot__v1__place_reply__descriptor,
                (ProtobufCMessage **)ret_reply);
}

static uint64_t place_ok(struct fixture *f, uint8_t id)
{
    Redknot__V1__PlaceReply *reply = NULL;
    uint64_t generation;

    assert_int_equal(place(f, id, 10, &reply), RK_OK);
    assert_false(reply->already_committed);
    assert_true(reply->n_shards >= 1 && reply->n_stores >= 1);
    generation = reply->shards[0]->generation;
    rk_rpc_message_free(&reply->base);
    return generation;
}

static enum rk_status commit(struct fixture *f, uint8_t id, uint64_t generation)
{
    uint8_t segment_id[32] = {id};
    Redknot__V1__CommitRequest request = REDKNOT__V1__COMMIT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    enum rk_status status;

    request.segment_id = bytes_of(segment_id);
    request.generation = generation;
    status = call(f, M("Commit"), &request.base, &redknot__v1__commit_reply__descriptor, &reply);
    rk_rpc_message_free(reply);
    return status;
}

static uint64_t put(struct fixture *f, uint8_t id)
{
    uint64_t generation = place_ok(f, id);

    assert_int_equal(commit(f, id, generation), RK_OK);
    return generation;
}

static Redknot__V1__LocateReply *locate(struct fixture *f, uint8_t id, const uint8_t *model)
{
    uint8_t segment_id[32] = {id};
    ProtobufCBinaryData ids[1] = {bytes_of(segment_id)};
    Redknot__V1__LocateRequest request = REDKNOT__V1__LOCATE_REQUEST__INIT;
    Redknot__V1__LocateReply *reply = NULL;

    request.n_segment_ids = 1;
    request.segment_ids = ids;
    request.fingerprint = bytes_of(model);
    request.with_token_ids = true;
    assert_int_equal(call(f, M("Locate"), &request.base, &redknot__v1__locate_reply__descriptor,
                          (ProtobufCMessage **)&reply),
                     RK_OK);
    assert_int_equal(reply->n_locations, 1);
    return reply;
}

/* "" for a hit. tokens: whether the token ids must be told. */
static void expect(struct fixture *f, uint8_t id, const char *miss, bool tokens)
{
    Redknot__V1__LocateReply *reply = locate(f, id, fingerprint);
    const Redknot__V1__LocateReply__Location *location = reply->locations[0];

    assert_string_equal(location->miss, miss);
    assert_int_equal(location->n_shards != 0, miss[0] == '\0');
    assert_int_equal(location->n_token_ids, tokens ? 10 : 0);
    if (tokens) {
        assert_int_equal(location->token_ids[3], 1003 + id);
        assert_string_equal(location->label, "a label");
    }
    rk_rpc_message_free(&reply->base);
}

static uint64_t generation_of(struct fixture *f, uint8_t id)
{
    Redknot__V1__LocateReply *reply = locate(f, id, fingerprint);
    uint64_t generation;

    assert_int_equal(reply->locations[0]->n_shards, 1);
    generation = reply->locations[0]->shards[0]->generation;
    rk_rpc_message_free(&reply->base);
    return generation;
}

static uint32_t drop(struct fixture *f, uint8_t id)
{
    uint8_t segment_id[32] = {id};
    ProtobufCBinaryData ids[1] = {bytes_of(segment_id)};
    Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    uint32_t dropped;

    request.n_segment_ids = 1;
    request.segment_ids = ids;
    assert_int_equal(
        call(f, M("Drop"), &request.base, &redknot__v1__drop_reply__descriptor, &reply), RK_OK);
    dropped = ((Redknot__V1__DropReply *)reply)->dropped;
    rk_rpc_message_free(reply);
    return dropped;
}

/* A shard as a store would tell of it; free with free(). */
struct told {
    uint8_t id[32];
    Redknot__V1__HeadRange heads;
    Redknot__V1__KvLayout layout;
    Redknot__V1__Shard shard;
    Redknot__V1__AnnounceRequest__Entry entry;
};

static void tell(struct told *told, uint8_t id, uint64_t generation)
{
    memset(told, 0, sizeof(*told));
    told->id[0] = id;
    redknot__v1__head_range__init(&told->heads);
    told->heads.layer_end = 4;
    told->heads.kv_head_end = 2;
    redknot__v1__kv_layout__init(&told->layout);
    told->layout.num_layers = 4;
    told->layout.num_kv_heads = 2;
    told->layout.head_dim = 8;
    told->layout.dtype = REDKNOT__V1__KV_LAYOUT__DTYPE__DTYPE_BF16;
    told->layout.page_tokens = RK_PAGE_TOKENS;
    redknot__v1__shard__init(&told->shard);
    told->shard.segment_id = bytes_of(told->id);
    told->shard.fingerprint = bytes_of(fingerprint);
    told->shard.generation = generation;
    told->shard.num_shards = 1;
    told->shard.num_tokens = 10;
    told->shard.heads = &told->heads;
    told->shard.layout = &told->layout;
    redknot__v1__announce_request__entry__init(&told->entry);
    told->entry.shard = &told->shard;
}

static enum rk_status announce(struct fixture *f, int i, uint64_t incarnation, struct told *told,
                               size_t count, uint32_t *ret_accepted, size_t *ret_dropped)
{
    struct rk_rpc_stream *stream = NULL;
    Redknot__V1__AnnounceReply *reply = NULL;
    enum rk_status status;

    assert_int_equal(rk_rpc_stream_open(f->channel, M("Announce"), CALL_MS, &stream, NULL), RK_OK);
    for (size_t n = 0; n == 0 || n < count; n++) { /* One message per shard, one at least. */
        Redknot__V1__AnnounceRequest request = REDKNOT__V1__ANNOUNCE_REQUEST__INIT;
        Redknot__V1__AnnounceRequest__Entry *entry = count == 0 ? NULL : &told[n].entry;

        request.node_id = (char *)(uintptr_t)store_name(i);
        request.incarnation = incarnation;
        request.n_entries = count != 0;
        request.entries = &entry;
        if (rk_rpc_stream_send(stream, &request.base) != RK_OK) {
            break;
        }
    }
    (void)!rk_rpc_stream_send_done(stream);
    if (rk_rpc_stream_recv(stream, &redknot__v1__announce_reply__descriptor,
                           (ProtobufCMessage **)&reply) == RK_OK) {
        *ret_accepted = reply->accepted;
        *ret_dropped = reply->n_drop;
        rk_rpc_message_free(&reply->base);
    }
    status = rk_rpc_stream_finish(stream, NULL);
    rk_rpc_stream_destroy(stream);
    return status;
}

/* ---- Tests ---- */

static void put_locate_drop(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__PlaceReply *again = NULL;
    uint64_t generation;

    join(f, 0, 11);
    expect(f, 1, "MISS_ABSENT", false);
    generation = put(f, 1);
    expect(f, 1, "", true);
    assert_int_equal(commit(f, 1, generation), RK_OK); /* Its answer was lost: asked again. */
    assert_int_equal(atomic_load(&f->stores[0].commits), 1);
    assert_int_equal(place(f, 1, 10, &again), RK_OK);
    assert_true(again->already_committed);
    assert_int_equal(again->shards[0]->generation, generation);
    assert_int_equal(again->n_stores, 1);
    rk_rpc_message_free(&again->base);
    assert_int_equal(drop(f, 1), 1);
    assert_int_equal(drop(f, 1), 0);
    assert_int_equal(atomic_load(&f->stores[0].drops), 1);
    assert_true(atomic_load(&f->stores[0].last_dropped) == generation);
    expect(f, 1, "MISS_ABSENT", false);
}

static void no_store_is_unavailable(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__PlaceReply *reply = NULL;

    assert_int_equal(place(f, 1, 10, &reply), RK_ERR_UNAVAILABLE);
}

static void the_highest_generation_wins(void **state)
{
    struct fixture *f = *state;
    uint64_t first;
    uint64_t second;

    join(f, 0, 11);
    first = place_ok(f, 1);
    second = place_ok(f, 1);
    assert_true(second > first);
    assert_int_equal(commit(f, 1, second), RK_OK);
    /* The same content is there: the slower of two puts has what it wants, and leaves nothing. */
    int commits = atomic_load(&f->stores[0].commits);
    assert_int_equal(commit(f, 1, first), RK_OK);
    assert_int_equal(atomic_load(&f->stores[0].commits), commits);
    assert_int_equal(atomic_load(&f->stores[0].aborts), 1);
    assert_int_equal(commit(f, 1, first), RK_OK); /* As after a lost reply. */
    assert_int_equal(generation_of(f, 1), second);

    first = place_ok(f, 2);
    second = place_ok(f, 2);
    assert_int_equal(commit(f, 2, first), RK_OK);
    assert_int_equal(commit(f, 2, second), RK_OK);
    assert_true(atomic_load(&f->stores[0].last_dropped) == first);
}

/* Nothing of the older one may come up where a newer one was; it must be placed again. */
static void an_older_one_does_not_replace_what_is_gone(void **state)
{
    struct fixture *f = *state;
    uint64_t first;
    uint64_t second;

    join(f, 0, 11);
    first = place_ok(f, 1);
    second = place_ok(f, 1);
    assert_int_equal(commit(f, 1, second), RK_OK);
    join(f, 0, 12); /* A store that restarts comes back empty. */
    assert_int_equal(commit(f, 1, first), RK_MISS_STALE_GENERATION);
    assert_non_null(strstr(f->last_error, "place it again"));
    expect(f, 1, "MISS_NODE_DOWN", true);
    assert_true(put(f, 1) > second);
    expect(f, 1, "", true);
}

/* The store took the newer one; the coordinator does not know yet. */
static void a_store_that_has_a_newer_one_asks_to_place_again(void **state)
{
    struct fixture *f = *state;
    uint64_t first;

    join(f, 0, 11);
    first = place_ok(f, 1);
    atomic_store(&f->stores[0].fail_commit, RK_ERR_EXISTS);
    assert_int_equal(commit(f, 1, first), RK_MISS_STALE_GENERATION);
    atomic_store(&f->stores[0].fail_commit, RK_OK);
    expect(f, 1, "MISS_ABSENT", false);
    assert_true(put(f, 1) > first);
}

/* Each side restarts alone, then both, in either order: a put works at once. */
static void puts_go_on_after_any_restart(void **state)
{
    struct fixture *f = *state;
    uint64_t incarnation = 20;
    uint64_t last = 0;

    join(f, 0, incarnation);
    last = put(f, 1);
    for (const char *who = "s c sc cs "; *who != '\0'; who++) {
        uint64_t generation;

        if (*who == 's') {
            join(f, 0, ++incarnation);
        } else if (*who == 'c') {
            down(f);
            up(f);
            join(f, 0, incarnation); /* It is told to, at its next heartbeat. */
        } else {
            (void)drop(f, 1); /* What the store still has when it lived on. */
            generation = put(f, 1);
            assert_true(generation > last);
            last = generation;
            expect(f, 1, "", true);
        }
    }
}

/* The database is lost while the store lives on with what a former one handed out. */
static void a_lost_database_does_not_go_back(void **state)
{
    struct fixture *f = *state;
    struct told told;
    char command[96];
    uint32_t accepted = 0;
    size_t dropped = 0;
    uint64_t old = 0;

    join(f, 0, 11);
    old = put(f, 1);
    down(f);
    (void)snprintf(command, sizeof(command), "rm -rf %s/*", f->directory);
    assert_int_equal(system(command), 0);
    rk_clock_sleep_ms(1100); /* Generations of a new database begin with the time in seconds. */
    up(f);
    join(f, 0, 11);
    uint64_t fresh = place_ok(f, 1); /* Before it has announced. */
    assert_true(fresh > old);
    tell(&told, 1, old);
    assert_int_equal(announce(f, 0, 11, &told, 1, &accepted, &dropped), RK_OK);
    assert_int_equal(accepted, 1);
    assert_int_equal(commit(f, 1, fresh), RK_OK);
    assert_int_equal(generation_of(f, 1), fresh);
}

static void a_failing_store_undoes_the_commit(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__PlaceReply *reply = NULL;
    uint8_t id = 0;
    uint64_t generation = 0;
    int failing = -1;

    down(f);
    f->options.shards_per_segment = 4;
    up(f);
    join(f, 0, 11);
    join(f, 1, 12);
    while (failing < 0) { /* A segment whose last shard is elsewhere than its first. */
        assert_int_equal(place(f, ++id, 10, &reply), RK_OK);
        assert_int_equal(reply->n_shards, 4);
        if (strcmp(reply->shards[0]->node_id, reply->shards[3]->node_id) != 0) {
            failing = strcmp(reply->shards[3]->node_id, store_name(1)) == 0;
            generation = reply->shards[3]->generation;
        }
        rk_rpc_message_free(&reply->base);
    }
    atomic_store(&f->stores[failing].fail_commit, RK_ERR_NOT_FOUND);
    assert_int_equal(commit(f, id, generation), RK_ERR_NOT_FOUND);
    assert_non_null(strstr(f->last_error, store_name(failing)));
    assert_true(atomic_load(&f->stores[!failing].drops) >= 1);
    assert_true(atomic_load(&f->stores[failing].aborts) >= 1);
    expect(f, id, "MISS_ABSENT", false);
    atomic_store(&f->stores[failing].fail_commit, RK_OK);
    (void)put(f, id);
    expect(f, id, "", true);
}

static void a_dead_store_fails_the_commit_by_name(void **state)
{
    struct fixture *f = *state;
    uint64_t generation;

    down(f);
    f->options.store_deadline_ms = 300;
    up(f);
    join(f, 0, 11);
    generation = place_ok(f, 1);
    rk_rpc_server_stop(f->stores[0].server, 0);
    assert_int_not_equal(commit(f, 1, generation), RK_OK);
    assert_non_null(strstr(f->last_error, "store-0"));
    expect(f, 1, "MISS_ABSENT", false);
}

static void evicted_and_lost_keep_their_tokens(void **state)
{
    struct fixture *f = *state;
    struct told told;

    join(f, 0, 11);
    tell(&told, 1, put(f, 1));
    (void)put(f, 2);
    told.shard.generation--; /* Of an older one: no matter. */
    assert_false(heartbeat(f, 0, 11, &told.shard));
    expect(f, 1, "", true);
    told.shard.generation++;
    assert_false(heartbeat(f, 0, 11, &told.shard));
    expect(f, 1, "MISS_EVICTED", true);
    expect(f, 2, "", true);
    join(f, 0, 12); /* Another incarnation: its memory is gone. */
    expect(f, 2, "MISS_NODE_DOWN", true);
    expect(f, 1, "MISS_EVICTED", true);
    (void)put(f, 2);
    expect(f, 2, "", true);
}

static void a_silent_node_is_down_and_comes_back(void **state)
{
    struct fixture *f = *state;
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    Redknot__V1__LocateReply *reply = NULL;
    bool is_down = false;

    join(f, 0, 11);
    (void)put(f, 1);
    down(f);
    f->options.timeout_ms = 50;
    up(f);
    while (!is_down && rk_deadline_left_ms(deadline_ns) != 0) {
        reply = locate(f, 1, fingerprint);
        is_down = strcmp(reply->locations[0]->miss, "MISS_NODE_DOWN") == 0;
        rk_rpc_message_free(&reply->base);
    }
    assert_true(is_down);
    down(f);
    f->options.timeout_ms = 600000;
    up(f);
    (void)heartbeat(f, 0, 11, NULL);
    expect(f, 1, "", true);
}

/* Of store 0, incarnation 11. On a thread of that store. */
static void evict_at_once(void *context, uint64_t generation)
{
    struct fixture *f = context;
    struct told told;
    Redknot__V1__Shard *removed = &told.shard;
    Redknot__V1__HeartbeatRequest request = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;

    tell(&told, 1, generation);
    request.node_id = (char *)(uintptr_t)store_name(0);
    request.incarnation = 11;
    request.n_removed = 1;
    request.removed = &removed;
    RK_ASSERT(rk_rpc_unary(f->channel, M("Heartbeat"), &request.base,
                           &redknot__v1__heartbeat_reply__descriptor, CALL_MS, &reply,
                           NULL) == RK_OK);
    rk_rpc_message_free(reply);
}

/* The eviction is told before the put is visible: it must not be forgotten, or nobody would store
 * the segment again. */
static void evicted_before_it_is_published(void **state)
{
    struct fixture *f = *state;
    uint64_t generation;

    join(f, 0, 11);
    f->stores[0].committed_context = f;
    atomic_store(&f->stores[0].committed, evict_at_once);
    generation = put(f, 1);
    atomic_store(&f->stores[0].committed, NULL);
    expect(f, 1, "MISS_EVICTED", true);
    down(f);
    up(f);
    (void)heartbeat(f, 0, 11, NULL);
    expect(f, 1, "MISS_EVICTED", true); /* On disk, too. */
    assert_true(put(f, 1) > generation);
    expect(f, 1, "", true);
}

/* What was placed before a drop must not bring the segment back, whichever of the two is newer. */
static void a_put_from_before_the_drop_is_refused(void **state)
{
    struct fixture *f = *state;
    uint64_t generations[3];

    join(f, 0, 11);
    for (int i = 0; i < 3; i++) {
        generations[i] = place_ok(f, 1);
    }
    assert_int_equal(commit(f, 1, generations[1]), RK_OK);
    assert_int_equal(drop(f, 1), 1);
    int commits = atomic_load(&f->stores[0].commits);
    for (int i = 0; i < 3; i += 2) {
        int aborts = atomic_load(&f->stores[0].aborts);

        assert_int_equal(commit(f, 1, generations[i]), RK_MISS_STALE_GENERATION);
        assert_non_null(strstr(f->last_error, "dropped"));
        assert_int_equal(atomic_load(&f->stores[0].aborts), aborts + 1);
        expect(f, 1, "MISS_ABSENT", false);
    }
    assert_int_equal(atomic_load(&f->stores[0].commits), commits); /* The store was not asked. */
    assert_true(put(f, 1) > generations[2]);
    expect(f, 1, "", true);
}

/* On a thread of the store. */
static void drop_at_once(void *context, uint64_t generation)
{
    struct fixture *f = context;
    uint8_t segment_id[32] = {1};
    ProtobufCBinaryData ids[1] = {bytes_of(segment_id)};
    Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;

    (void)generation;
    request.n_segment_ids = 1;
    request.segment_ids = ids;
    RK_ASSERT(rk_rpc_unary(f->channel, M("Drop"), &request.base,
                           &redknot__v1__drop_reply__descriptor, CALL_MS, &reply, NULL) == RK_OK);
    rk_rpc_message_free(reply);
}

/* The drop comes when the store has committed already: the shard there is taken back, too. */
static void a_drop_during_the_commit_wins(void **state)
{
    struct fixture *f = *state;
    uint64_t first;
    uint64_t second;

    join(f, 0, 11);
    first = place_ok(f, 1);
    second = place_ok(f, 1);
    assert_int_equal(commit(f, 1, first), RK_OK);
    f->stores[0].committed_context = f;
    atomic_store(&f->stores[0].committed, drop_at_once);
    assert_int_equal(commit(f, 1, second), RK_MISS_STALE_GENERATION);
    atomic_store(&f->stores[0].committed, NULL);
    assert_true(atomic_load(&f->stores[0].last_dropped) == second);
    expect(f, 1, "MISS_ABSENT", false);
    down(f);
    up(f);
    expect(f, 1, "MISS_ABSENT", false);
}

static void another_model_is_a_miss(void **state)
{
    struct fixture *f = *state;
    uint8_t other[32] = {8};
    Redknot__V1__LocateReply *reply;

    join(f, 0, 11);
    (void)put(f, 1);
    reply = locate(f, 1, other);
    assert_string_equal(reply->locations[0]->miss, "MISS_FINGERPRINT");
    assert_int_equal(reply->locations[0]->n_shards, 0);
    rk_rpc_message_free(&reply->base);
}

static void a_restart_is_warm(void **state)
{
    struct fixture *f = *state;
    uint64_t epoch = coordinator_epoch(f->coordinator);
    uint64_t generation;
    uint32_t accepted = 0;
    size_t dropped = 9;
    struct told told;

    join(f, 0, 11);
    generation = put(f, 1);
    (void)put(f, 2);
    assert_int_equal(drop(f, 2), 1);
    down(f);
    up(f);
    assert_true(coordinator_epoch(f->coordinator) > epoch);
    expect(f, 1, "MISS_NODE_DOWN", true); /* Known, but nobody has spoken yet. */
    expect(f, 2, "MISS_ABSENT", false);
    assert_true(heartbeat(f, 0, 11, NULL)); /* Alive at once, and asked for its inventory. */
    expect(f, 1, "", true);
    join(f, 0, 11);
    assert_false(heartbeat(f, 0, 11, NULL));
    tell(&told, 1, generation);
    assert_int_equal(announce(f, 0, 11, &told, 1, &accepted, &dropped), RK_OK);
    assert_int_equal(accepted, 1);
    assert_int_equal(dropped, 0);
    expect(f, 1, "", true);
    assert_true(place_ok(f, 3) > generation + 1); /* Never one that was handed out. */
    assert_true(heartbeat(f, 0, 99, NULL));
}

static void an_announcement_replaces(void **state)
{
    struct fixture *f = *state;
    uint64_t generations[4];
    uint32_t accepted = 0;
    size_t dropped = 0;
    struct told told[4];

    join(f, 0, 11);
    for (uint8_t id = 1; id <= 3; id++) {
        generations[id] = put(f, id);
    }
    assert_int_equal(drop(f, 3), 1);
    tell(&told[0], 1, generations[1]);
    tell(&told[1], 3, generations[3]);           /* Dropped. */
    tell(&told[2], 4, generations[3] + 1000000); /* Unknown to us: adopted. */
    tell(&told[3], 5, 17);
    told[3].entry.label = (char *)(uintptr_t) "told";
    assert_int_equal(announce(f, 0, 11, told, 4, &accepted, &dropped), RK_OK);
    assert_int_equal(accepted, 3);
    assert_int_equal(dropped, 1);
    expect(f, 1, "", true);
    expect(f, 2, "MISS_EVICTED", true); /* Not told of any more. */
    expect(f, 3, "MISS_ABSENT", false);
    expect(f, 4, "", false);
    expect(f, 5, "", false);
    assert_true(place_ok(f, 6) > generations[3] + 1000000);
    (void)drop(f, 5);
    tell(&told[0], 1, generations[1] - 1); /* Superseded. */
    assert_int_equal(announce(f, 0, 11, told, 1, &accepted, &dropped), RK_OK);
    assert_int_equal(dropped, 1);
    assert_int_equal(announce(f, 0, 11, NULL, 0, &accepted, &dropped), RK_OK);
    expect(f, 4, "MISS_EVICTED", false);
    assert_int_equal(announce(f, 0, 99, NULL, 0, &accepted, &dropped), RK_ERR_NOT_FOUND);
}

static void a_bad_announcement_changes_nothing(void **state)
{
    struct fixture *f = *state;
    uint32_t accepted = 0;
    size_t dropped = 0;
    struct told told[2];

    join(f, 0, 11);
    (void)put(f, 1);
    tell(&told[0], 7, 5);
    tell(&told[1], 8, 5);
    told[1].shard.num_shards = 1u << 30;
    assert_int_equal(announce(f, 0, 11, told, 2, &accepted, &dropped), RK_ERR_INVALID);
    told[1].shard.num_shards = 1;
    told[1].layout.num_layers = UINT32_MAX;
    assert_int_equal(announce(f, 0, 11, told, 2, &accepted, &dropped), RK_ERR_INVALID);
    tell(&told[1], 8, UINT64_MAX);
    assert_int_equal(announce(f, 0, 11, told, 2, &accepted, &dropped), RK_ERR_INVALID);
    expect(f, 1, "", true);
    expect(f, 7, "MISS_ABSENT", false);
}

static void placed_expires(void **state)
{
    struct fixture *f = *state;
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    uint64_t generation;

    down(f);
    f->options.placed_expire_ms = 1;
    up(f);
    join(f, 0, 11);
    generation = place_ok(f, 1);
    while (atomic_load(&f->stores[0].aborts) == 0 && rk_deadline_left_ms(deadline_ns) != 0) {
        rk_clock_sleep_ms(5);
    }
    assert_int_equal(atomic_load(&f->stores[0].aborts), 1);
    assert_int_equal(commit(f, 1, generation), RK_ERR_NOT_FOUND);
}

static void abort_frees_the_place(void **state)
{
    struct fixture *f = *state;
    uint8_t segment_id[32] = {1};
    Redknot__V1__AbortRequest request = REDKNOT__V1__ABORT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;

    join(f, 0, 11);
    request.segment_id = bytes_of(segment_id);
    request.generation = place_ok(f, 1);
    for (int i = 0; i < 2; i++) { /* The second time there is nothing to do. */
        assert_int_equal(
            call(f, M("Abort"), &request.base, &redknot__v1__abort_reply__descriptor, &reply),
            RK_OK);
        rk_rpc_message_free(reply);
    }
    assert_int_equal(atomic_load(&f->stores[0].aborts), 1);
    assert_int_equal(atomic_load(&f->stores[0].drops), 0);
    assert_int_equal(commit(f, 1, request.generation), RK_ERR_NOT_FOUND);
}

static void segments_are_bounded(void **state)
{
    struct fixture *f = *state;
    struct told told;

    down(f);
    f->options.segments_max = 3;
    up(f);
    join(f, 0, 11);
    (void)put(f, 1);
    tell(&told, 2, put(f, 2));
    (void)put(f, 3);
    (void)heartbeat(f, 0, 11, &told.shard); /* 2 has no KV now: the first to go. */
    (void)put(f, 4);
    expect(f, 2, "MISS_ABSENT", false);
    expect(f, 3, "", true);
    expect(f, 4, "", true);
    expect(f, 1, "", true);
    (void)put(f, 5); /* All have KV: the longest unused goes, and its store is told. */
    expect(f, 3, "MISS_ABSENT", false);
    assert_int_equal(atomic_load(&f->stores[0].drops), 1);
    down(f);
    up(f);
    (void)heartbeat(f, 0, 11, NULL);
    expect(f, 3, "MISS_ABSENT", false);
    expect(f, 5, "", true);
}

static void garbage_is_refused(void **state)
{
    struct fixture *f = *state;
    static ProtobufCBinaryData ids[5000];
    uint8_t id[32] = {1};
    Redknot__V1__LocateRequest request = REDKNOT__V1__LOCATE_REQUEST__INIT;
    Redknot__V1__DropRequest drop_request = REDKNOT__V1__DROP_REQUEST__INIT;
    Redknot__V1__RegisterRequest empty = REDKNOT__V1__REGISTER_REQUEST__INIT;
    Redknot__V1__PlaceRequest nothing = REDKNOT__V1__PLACE_REQUEST__INIT;
    Redknot__V1__PlaceReply *placed = NULL;
    ProtobufCMessage *reply = NULL;

    for (size_t i = 0; i < 5000; i++) {
        ids[i] = bytes_of(id);
    }
    request.n_segment_ids = 5000;
    request.segment_ids = ids;
    assert_int_equal(
        call(f, M("Locate"), &request.base, &redknot__v1__locate_reply__descriptor, &reply),
        RK_ERR_TOO_LONG);
    request.n_segment_ids = 2;
    ids[1].len = 31;
    assert_int_equal(
        call(f, M("Locate"), &request.base, &redknot__v1__locate_reply__descriptor, &reply),
        RK_ERR_INVALID);
    drop_request.n_segment_ids = 2;
    drop_request.segment_ids = ids;
    assert_int_equal(
        call(f, M("Drop"), &drop_request.base, &redknot__v1__drop_reply__descriptor, &reply),
        RK_ERR_INVALID);
    assert_int_equal(
        call(f, M("RegisterNode"), &empty.base, &redknot__v1__register_reply__descriptor, &reply),
        RK_ERR_INVALID);
    assert_int_equal(try_register(f, 0, 0), RK_ERR_INVALID);
    assert_int_equal(
        call(f, M("Place"), &nothing.base, &redknot__v1__place_reply__descriptor, &reply),
        RK_ERR_INVALID);
    join(f, 0, 11);
    assert_int_equal(place(f, 1, 0, &placed), RK_ERR_INVALID);
    assert_int_equal(place(f, 1, 65, &placed), RK_ERR_INVALID); /* 64 ids for 65 tokens. */
    assert_int_equal(place(f, 1, RK_SEGMENT_TOKENS_MAX + 1, &placed), RK_ERR_INVALID);
    assert_int_equal(commit(f, 1, 12345), RK_ERR_NOT_FOUND);
    request.n_segment_ids = 0;
    assert_int_equal(
        call(f, M("Locate"), &request.base, &redknot__v1__locate_reply__descriptor, &reply), RK_OK);
    rk_rpc_message_free(reply);
}

static void status_tells_nodes_and_segments(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__StatusRequest request = REDKNOT__V1__STATUS_REQUEST__INIT;
    Redknot__V1__StatusReply *reply = NULL;

    join(f, 0, 11);
    join(f, 1, 12);
    for (uint8_t id = 1; id <= 5; id++) {
        (void)put(f, id);
    }
    request.with_segments = true;
    request.segments_max = 2;
    assert_int_equal(call(f, M("Status"), &request.base, &redknot__v1__status_reply__descriptor,
                          (ProtobufCMessage **)&reply),
                     RK_OK);
    assert_int_equal(reply->n_nodes, 2);
    assert_true(reply->nodes[0]->alive && reply->nodes[1]->alive);
    assert_int_equal(reply->nodes[0]->num_shards + reply->nodes[1]->num_shards, 5);
    assert_int_equal(reply->n_segments, 2);
    assert_int_equal(reply->num_segments, 5);
    assert_true(reply->segments[0]->committed);
    assert_int_equal(reply->segments[0]->bytes, 4 * 2 * 2 * 64 * 8 * 2);
    assert_int_equal(reply->segments[0]->n_node_ids, 1);
    rk_rpc_message_free(&reply->base);
}

static Redknot__V1__ListStoresReply *list_stores(struct fixture *f)
{
    Redknot__V1__ListStoresRequest request = REDKNOT__V1__LIST_STORES_REQUEST__INIT;
    Redknot__V1__ListStoresReply *reply = NULL;

    assert_int_equal(call(f, M("ListStores"), &request.base,
                          &redknot__v1__list_stores_reply__descriptor, (ProtobufCMessage **)&reply),
                     RK_OK);
    assert_true(reply->epoch == coordinator_epoch(f->coordinator));
    return reply;
}

/* 0 when the store is not listed. */
static double listed_weight(struct fixture *f, int i)
{
    Redknot__V1__ListStoresReply *reply = list_stores(f);
    double weight = 0;

    for (size_t n = 0; n < reply->n_stores; n++) {
        if (strcmp(reply->stores[n]->endpoint->node_id, store_name(i)) == 0) {
            weight = reply->stores[n]->weight;
            assert_string_equal(reply->stores[n]->endpoint->grpc_address, f->stores[i].address);
            assert_true(reply->stores[n]->endpoint->incarnation != 0);
        }
    }
    rk_rpc_message_free(&reply->base);
    return weight;
}

static void stores_are_listed_by_capacity(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__NodeInfo worker = REDKNOT__V1__NODE_INFO__INIT;
    Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
    Redknot__V1__HeartbeatRequest beat = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    Redknot__V1__ListStoresReply *stores = list_stores(f);
    ProtobufCMessage *reply = NULL;
    double weight;

    assert_int_equal(stores->n_stores, 0);
    rk_rpc_message_free(&stores->base);
    worker.node_id = (char *)(uintptr_t) "worker";
    worker.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_WORKER;
    worker.incarnation = 5;
    worker.grpc_address = (char *)(uintptr_t) "127.0.0.1:1";
    request.node = &worker;
    assert_int_equal(
        call(f, M("RegisterNode"), &request.base, &redknot__v1__register_reply__descriptor, &reply),
        RK_OK);
    rk_rpc_message_free(reply);
    join(f, 0, 11);
    join(f, 1, 12);
    stores = list_stores(f);
    assert_int_equal(stores->n_stores, 2); /* No worker. */
    rk_rpc_message_free(&stores->base);
    weight = listed_weight(f, 0);
    assert_true(weight > 0);
    assert_true(listed_weight(f, 1) == 2 * weight);
    /* What is used changes from call to call, and keys would move with it. */
    beat.node_id = (char *)(uintptr_t)store_name(0);
    beat.incarnation = 11;
    beat.used_bytes = 1u << 30;
    assert_int_equal(
        call(f, M("Heartbeat"), &beat.base, &redknot__v1__heartbeat_reply__descriptor, &reply),
        RK_OK);
    rk_rpc_message_free(reply);
    assert_true(listed_weight(f, 0) == weight);
    down(f); /* Known from disk, but nobody has spoken yet. */
    up(f);
    stores = list_stores(f);
    assert_int_equal(stores->n_stores, 0);
    rk_rpc_message_free(&stores->base);
    (void)heartbeat(f, 1, 12, NULL);
    assert_true(listed_weight(f, 0) == 0);
    assert_true(listed_weight(f, 1) == 2 * weight);
}

/* A store is told of by an announcement that holds one shard, id. */
static void announce_one(struct fixture *f, int i, uint64_t incarnation, uint8_t id)
{
    struct told told;
    uint32_t accepted = 0;
    size_t dropped = 0;

    tell(&told, id, 17);
    assert_int_equal(announce(f, i, incarnation, &told, 1, &accepted, &dropped), RK_OK);
    assert_int_equal(accepted, 1);
}

static void a_new_store_starts_slowly(void **state)
{
    struct fixture *f = *state;
    int placed[2] = {0, 0};
    double weight;

    down(f);
    f->options.slow_start_ms = 600000;
    up(f);
    join(f, 0, 11);
    weight = listed_weight(f, 0);
    join(f, 1, 12);
    /* All are new: they share alike. They came within a moment, so their factors are as good as
     * equal, and so are their shares. */
    assert_true(listed_weight(f, 0) == weight);
    assert_true(listed_weight(f, 1) == 2 * weight);
    announce_one(f, 0, 11, 201); /* It holds something: it was not new, we forgot it. */
    assert_true(listed_weight(f, 0) == weight);
    assert_true(listed_weight(f, 1) == 2 * weight / 8);
    for (uint8_t id = 1; id <= 200; id++) { /* 1 against 2/8 for store 1: 40 of them, +- 6. */
        Redknot__V1__PlaceReply *reply = NULL;

        assert_int_equal(place(f, id, 10, &reply), RK_OK);
        placed[strcmp(reply->shards[0]->node_id, store_name(1)) == 0]++;
        rk_rpc_message_free(&reply->base);
    }
    assert_true(placed[1] > 12 && placed[1] < 68);
    join(f, 0, 21); /* Another incarnation is new, and nothing is left that is not. */
    assert_true(listed_weight(f, 0) == weight);
    assert_true(listed_weight(f, 1) == 2 * weight);
}

static void a_restart_of_ours_makes_nobody_new(void **state)
{
    struct fixture *f = *state;
    double weight;

    down(f);
    f->options.slow_start_ms = 600000;
    up(f);
    join(f, 0, 11);
    join(f, 1, 12);
    weight = listed_weight(f, 0);
    down(f);
    up(f);
    (void)heartbeat(f, 0, 11, NULL);
    join(f, 0, 11);
    join(f, 1, 13); /* This one is. */
    assert_true(listed_weight(f, 0) == weight);
    assert_true(listed_weight(f, 1) == 2 * weight / 8);
}

static void a_share_grows_to_its_whole(void **state)
{
    struct fixture *f = *state;
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    double last = 0;
    double weight = 0;

    down(f);
    f->options.slow_start_ms = 500;
    up(f);
    join(f, 0, 11);
    announce_one(f, 0, 11, 201);
    join(f, 1, 12);
    while (weight < 2 * listed_weight(f, 0) && rk_deadline_left_ms(deadline_ns) != 0) {
        weight = listed_weight(f, 1);
        assert_true(weight >= last);
        last = weight;
    }
    assert_true(weight == 2 * listed_weight(f, 0));
}

static void a_second_coordinator_is_refused(void **state)
{
    struct fixture *f = *state;
    struct coordinator *second = NULL;
    struct rk_error error = {0};

    assert_int_equal(coordinator_create(&f->options, &second, &error), RK_ERR_BUSY);
    assert_null(second);
    assert_non_null(strstr(error.text, f->directory));
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(put_locate_drop),
        TEST(no_store_is_unavailable),
        TEST(the_highest_generation_wins),
        TEST(an_older_one_does_not_replace_what_is_gone),
        TEST(a_store_that_has_a_newer_one_asks_to_place_again),
        TEST(puts_go_on_after_any_restart),
        TEST(a_lost_database_does_not_go_back),
        TEST(a_failing_store_undoes_the_commit),
        TEST(a_dead_store_fails_the_commit_by_name),
        TEST(evicted_and_lost_keep_their_tokens),
        TEST(a_silent_node_is_down_and_comes_back),
        TEST(evicted_before_it_is_published),
        TEST(a_put_from_before_the_drop_is_refused),
        TEST(a_drop_during_the_commit_wins),
        TEST(another_model_is_a_miss),
        TEST(a_restart_is_warm),
        TEST(an_announcement_replaces),
        TEST(a_bad_announcement_changes_nothing),
        TEST(placed_expires),
        TEST(abort_frees_the_place),
        TEST(segments_are_bounded),
        TEST(garbage_is_refused),
        TEST(status_tells_nodes_and_segments),
        TEST(stores_are_listed_by_capacity),
        TEST(a_new_store_starts_slowly),
        TEST(a_restart_of_ours_makes_nobody_new),
        TEST(a_share_grows_to_its_whole),
        TEST(a_second_coordinator_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
