/*
 * Goal:   the coordinator's promises over real RPC: all or none, the newest
 *         generation wins, misses with their reasons, announcements replace,
 *         restarts are warm, bounds hold, garbage is refused.
 * Method: a coordinator in this process on a free port and a fresh directory;
 *         store nodes are test doubles that count calls and fail on demand.
 *         Nothing is timed: where time must pass, the test polls with a deadline.
 */
#include "tests/coordinator/coordinator_fixture.h"
#include "tests/coordinator/fake_store.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/kv_layout.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

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
        reply = locate(f, 1, coordinator_fingerprint);
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

/* Two processes with one id would take turns, and each turn lose what the other one holds. */
static void a_second_node_with_an_id_is_refused(void **state)
{
    struct fixture *f = *state;
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    char first[sizeof(f->stores[0].address)];

    join(f, 0, 11);
    (void)put(f, 1);
    memcpy(first, f->stores[0].address, sizeof(first));
    memcpy(f->stores[0].address, f->stores[1].address, sizeof(first));
    for (int i = 0; i < 3; i++) {
        assert_int_equal(try_register(f, 0, 12), RK_ERR_EXISTS);
        assert_non_null(strstr(f->last_error, first));
        assert_non_null(strstr(f->last_error, "--node-id"));
        assert_false(heartbeat(f, 0, 11, NULL));
    }
    expect(f, 1, "", true);
    /* At the same place it is the same one, started again; the one before does not come back. */
    memcpy(f->stores[0].address, first, sizeof(first));
    join(f, 0, 13);
    assert_int_equal(try_register(f, 0, 11), RK_ERR_EXISTS);
    assert_false(heartbeat(f, 0, 13, NULL));
    /* Anywhere, once the first one is silent. */
    down(f);
    f->options.timeout_ms = 200;
    up(f);
    (void)heartbeat(f, 0, 13, NULL);
    memcpy(f->stores[0].address, f->stores[1].address, sizeof(first));
    enum rk_status status = RK_ERR_EXISTS;
    while (status == RK_ERR_EXISTS && rk_deadline_left_ms(deadline_ns) != 0) {
        status = try_register(f, 0, 14);
    }
    assert_int_equal(status, RK_OK);
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

static enum rk_status register_of_cluster(struct fixture *f, const char *cluster_id)
{
    Redknot__V1__NodeInfo info = REDKNOT__V1__NODE_INFO__INIT;
    Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    enum rk_status status;

    info.node_id = (char *)(uintptr_t)store_name(0);
    info.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;
    info.incarnation = 11;
    info.grpc_address = f->stores[0].address;
    info.capacity_bytes = 1 << 30;
    request.node = &info;
    request.cluster_id = (char *)(uintptr_t)cluster_id;
    status =
        call(f, M("RegisterNode"), &request.base, &redknot__v1__register_reply__descriptor, &reply);
    rk_rpc_message_free(reply);
    return status;
}

/* Ports are reused: whoever finds another cluster's coordinator at its own's port is told so. */
static void a_node_of_another_cluster_is_refused(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__StatusRequest request = REDKNOT__V1__STATUS_REQUEST__INIT;
    ProtobufCMessage *message = NULL;
    const Redknot__V1__StatusReply *reply;

    assert_int_equal(register_of_cluster(f, ""), RK_OK);
    assert_int_equal(register_of_cluster(f, "another"), RK_ERR_INVALID);
    assert_non_null(strstr(f->last_error, "without --cluster"));
    down(f);
    f->options.cluster_id = "ours";
    up(f);
    assert_int_equal(register_of_cluster(f, "another"), RK_ERR_INVALID);
    assert_non_null(strstr(f->last_error, "store-0 is of cluster another"));
    assert_int_equal(register_of_cluster(f, "ours"), RK_OK);
    assert_int_equal(register_of_cluster(f, ""), RK_OK);
    assert_int_equal(
        call(f, M("Status"), &request.base, &redknot__v1__status_reply__descriptor, &message),
        RK_OK);
    reply = (const Redknot__V1__StatusReply *)message;
    assert_string_equal(reply->cluster_id, "ours");
    assert_int_equal(reply->pid, getpid());
    rk_rpc_message_free(message);
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

/* Node ids, addresses and labels come back in tables, logs and metrics. */
static void names_that_are_none_are_refused(void **state)
{
    static const struct {
        const char *node_id;
        const char *address;
        const char *reason;
    } nodes[] = {
        {"a\nb", "127.0.0.1:9", "node_id: byte 1 (0x0a) is a control character"},
        {"\x1b[31m", "127.0.0.1:9", "node_id: byte 0 (0x1b) is a control character"},
        {"a", "127.0.0.1:99999", "grpc_address: address '127.0.0.1:99999'"},
        {"a", "127.0.0.1:0", "from 1 to 65535"},
        {"a", "junk", "grpc_address: address 'junk': no port"},
    };
    static const char *const labels[] = {"a\nb", "\x1b]0;x\x07", "\xe2\x80\xaexe.pdf"};
    struct fixture *f = *state;
    ProtobufCMessage *reply = NULL;

    for (size_t i = 0; i < sizeof(nodes) / sizeof(nodes[0]); i++) {
        Redknot__V1__NodeInfo info = REDKNOT__V1__NODE_INFO__INIT;
        Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
        info.node_id = (char *)(uintptr_t)nodes[i].node_id;
        info.grpc_address = (char *)(uintptr_t)nodes[i].address;
        info.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;
        info.incarnation = 7;
        request.node = &info;
        assert_int_equal(call(f, M("RegisterNode"), &request.base,
                              &redknot__v1__register_reply__descriptor, &reply),
                         RK_ERR_INVALID);
        if (!strstr(f->last_error, nodes[i].reason)) {
            fail_msg("row %zu: %s", i, f->last_error);
        }
    }
    join(f, 0, 11);
    for (size_t i = 0; i < sizeof(labels) / sizeof(labels[0]); i++) {
        Redknot__V1__PlaceReply *placed = NULL;
        f->label = labels[i];
        assert_int_equal(place(f, 1, 10, &placed), RK_ERR_INVALID);
        assert_non_null(strstr(f->last_error, "the label: byte "));
    }
    f->label = NULL;
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

/* Numbers of a peer enter sums and weights. */
static void numbers_that_cannot_be_are_refused(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__NodeInfo info = REDKNOT__V1__NODE_INFO__INIT;
    Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
    Redknot__V1__HeartbeatRequest beat = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    Redknot__V1__StatusRequest ask = REDKNOT__V1__STATUS_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;

    info.node_id = (char *)(uintptr_t) "store-0";
    info.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;
    info.incarnation = 11;
    info.grpc_address = f->stores[0].address;
    info.capacity_bytes = UINT64_MAX;
    request.node = &info;
    assert_int_equal(
        call(f, M("RegisterNode"), &request.base, &redknot__v1__register_reply__descriptor, &reply),
        RK_ERR_INVALID);
    join(f, 0, 11);
    beat.node_id = info.node_id;
    beat.incarnation = 11;
    beat.used_bytes = UINT64_MAX;
    assert_int_equal(
        call(f, M("Heartbeat"), &beat.base, &redknot__v1__heartbeat_reply__descriptor, &reply),
        RK_OK);
    rk_rpc_message_free(reply);
    assert_int_equal(
        call(f, M("Status"), &ask.base, &redknot__v1__status_reply__descriptor, &reply), RK_OK);
    const Redknot__V1__NodeInfo *told = ((Redknot__V1__StatusReply *)reply)->nodes[0]->info;
    assert_true(told->used_bytes == told->capacity_bytes);
    rk_rpc_message_free(reply);
}

static void limit_files(rlim_t bytes)
{
    struct rlimit limit;

    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes == 0 ? limit.rlim_max : bytes;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

/* A limit on the size of files stands for it. Puts are refused and say why; what is known is
 * found, stores live and come; and with room everything goes on. */
static void a_full_disk_is_lived_with(void **state)
{
    struct fixture *f = *state;
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    enum rk_status status = RK_OK;
    uint64_t generation;

    (void)signal(SIGXFSZ, SIG_IGN);
    join(f, 0, 11);
    (void)put(f, 1);
    limit_files(1);
    generation = place_ok(f, 2);
    assert_int_not_equal(commit(f, 2, generation), RK_OK);
    assert_non_null(strstr(f->last_error, f->directory));
    generation = place_ok(f, 2);
    assert_int_not_equal(commit(f, 2, generation), RK_OK); /* And the process lives. */
    expect(f, 1, "", true);
    assert_false(heartbeat(f, 0, 11, NULL));
    join(f, 1, 12);
    limit_files(0);
    do {
        rk_clock_sleep_ms(50);
        generation = place_ok(f, 2);
        status = commit(f, 2, generation);
    } while (status != RK_OK && rk_deadline_left_ms(deadline_ns) != 0);
    expect(f, 2, "", true);
    rk_clock_sleep_ms(600); /* Two sweeps: what could not be saved is, by now. */
    down(f);
    up(f);
    join(f, 0, 11);
    join(f, 1, 12);
    expect(f, 1, "", true);
    expect(f, 2, "", true);
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
        TEST(a_second_node_with_an_id_is_refused),
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
        TEST(a_node_of_another_cluster_is_refused),
        TEST(garbage_is_refused),
        TEST(names_that_are_none_are_refused),
        TEST(status_tells_nodes_and_segments),
        TEST(numbers_that_cannot_be_are_refused),
        TEST(a_full_disk_is_lived_with),
        TEST(a_second_coordinator_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
