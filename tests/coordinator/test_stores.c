/*
 * Goal:   ListStores names the stores that may be placed on, by capacity, and a store that has just
 *         come gets its share bit by bit.
 * Method: that of test_coordinator.c.
 */
#include "tests/coordinator/coordinator_fixture.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/kv_layout.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static enum rk_status list_try(struct fixture *f, Redknot__V1__ListStoresReply **ret_reply)
{
    Redknot__V1__ListStoresRequest request = REDKNOT__V1__LIST_STORES_REQUEST__INIT;

    return call(f, M("ListStores"), &request.base, &redknot__v1__list_stores_reply__descriptor,
                (ProtobufCMessage **)ret_reply);
}

/* When nobody beats, the coordinator takes that for a pause of its own, and gives no list for a
 * while. */
static Redknot__V1__ListStoresReply *list_stores(struct fixture *f)
{
    Redknot__V1__ListStoresReply *reply = NULL;
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    enum rk_status status = list_try(f, &reply);

    while (status == RK_ERR_UNAVAILABLE && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(20);
        status = list_try(f, &reply);
    }
    assert_int_equal(status, RK_OK);
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
    assert_int_equal(stores->n_absent, 2); /* Whoever must reach all of them cannot. */
    assert_string_equal(stores->absent[0]->state, "down");
    assert_true(stores->absent[0]->silent_ms == UINT64_MAX);
    assert_string_equal(stores->absent[0]->endpoint->grpc_address, f->stores[0].address);
    rk_rpc_message_free(&stores->base);
    (void)heartbeat(f, 1, 12, NULL);
    stores = list_stores(f);
    assert_int_equal(stores->n_absent, 1);
    assert_string_equal(stores->absent[0]->endpoint->node_id, store_name(0));
    rk_rpc_message_free(&stores->base);
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

/* The first store to report would be alone on the list, and what is put then where the others are
 * not asked. */
static void nobody_is_listed_before_all_have_reported(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__ListStoresReply *reply = NULL;
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);

    down(f);
    f->options.timeout_ms = 1000;
    up(f);
    join(f, 0, 11);
    join(f, 1, 12);
    down(f);
    up(f);
    assert_int_equal(list_try(f, &reply), RK_ERR_UNAVAILABLE);
    (void)heartbeat(f, 0, 11, NULL);
    assert_int_equal(list_try(f, &reply), RK_ERR_UNAVAILABLE);
    (void)heartbeat(f, 1, 12, NULL);
    assert_int_equal(list_try(f, &reply), RK_OK);
    assert_int_equal(reply->n_stores, 2);
    rk_rpc_message_free(&reply->base);
    down(f); /* And who does not come back is waited for no longer than a timeout. */
    up(f);
    while (list_try(f, &reply) != RK_OK) {
        assert_true(rk_deadline_left_ms(deadline_ns) > 0);
        (void)heartbeat(f, 0, 11, NULL);
        rk_clock_sleep_ms(50);
    }
    assert_int_equal(reply->n_stores, 1);
    rk_rpc_message_free(&reply->base);
}

/* Returns the mark of the reply. */
static uint64_t beat(struct fixture *f, int i, uint64_t incarnation, uint64_t said)
{
    Redknot__V1__HeartbeatRequest request = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    ProtobufCMessage *message = NULL;
    const Redknot__V1__HeartbeatReply *reply;
    uint64_t mark;

    request.node_id = (char *)(uintptr_t)store_name(i);
    request.incarnation = incarnation;
    request.values_mark = said;
    assert_int_equal(
        call(f, M("Heartbeat"), &request.base, &redknot__v1__heartbeat_reply__descriptor, &message),
        RK_OK);
    reply = (const Redknot__V1__HeartbeatReply *)message;
    mark = reply->values_mark;
    assert_int_equal(reply->values_lease_ms, mark != 0 ? 0 : f->options.values_lease_ms);
    rk_rpc_message_free(message);
    return mark;
}

/* Beats of store 0 alone go on meanwhile. */
static void wait_for_count(struct fixture *f, size_t wanted)
{
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    Redknot__V1__ListStoresReply *reply = NULL;
    size_t count = 0;

    while (count != wanted) {
        assert_true(rk_deadline_left_ms(deadline_ns) > 0);
        (void)beat(f, 0, 11, 0);
        if (list_try(f, &reply) == RK_OK) {
            count = reply->n_stores;
            rk_rpc_message_free(&reply->base);
        }
        rk_clock_sleep_ms(5);
    }
}

/* What clients went on without is not listed again by a later process of ours either, before it
 * has given its values up. */
static void who_was_left_out_is_known_after_a_restart(void **state)
{
    struct fixture *f = *state;
    uint64_t mark;

    down(f);
    f->options.values_lease_ms = 300;
    f->options.timeout_ms = 300;
    up(f);
    join(f, 0, 11);
    join(f, 1, 12);
    wait_for_count(f, 2);
    wait_for_count(f, 1);
    down(f);
    f->options.timeout_ms = 600000;
    f->options.values_lease_ms = 600000;
    up(f);
    mark = beat(f, 1, 12, 0);
    assert_true(mark != 0);
    wait_for_count(f, 1);
    assert_int_equal(beat(f, 1, 12, mark + 1), mark);
    assert_int_equal(beat(f, 1, 12, mark), 0);
    wait_for_count(f, 2);
    down(f);
    up(f);
    assert_int_equal(beat(f, 1, 12, 0), 0);
    wait_for_count(f, 2);
}

static void a_silent_store_is_listed_until_its_lease_is_over(void **state)
{
    struct fixture *f = *state;
    int64_t begin_ns;

    down(f);
    f->options.timeout_ms = 100;
    f->options.values_lease_ms = 1000;
    up(f);
    join(f, 0, 11);
    begin_ns = rk_clock_ns();
    join(f, 1, 12);
    wait_for_count(f, 2);
    wait_for_count(f, 1);
    assert_true(rk_clock_ns() - begin_ns >= 1000 * INT64_C(1000000));
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

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(stores_are_listed_by_capacity),
        TEST(a_new_store_starts_slowly),
        TEST(a_restart_of_ours_makes_nobody_new),
        TEST(nobody_is_listed_before_all_have_reported),
        TEST(who_was_left_out_is_known_after_a_restart),
        TEST(a_silent_store_is_listed_until_its_lease_is_over),
        TEST(a_share_grows_to_its_whole),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
