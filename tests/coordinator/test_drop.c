/*
 * Goal:   what is dropped does not answer any more: not the segment, not the chains that it is
 *         part of, not what continues them, not a put that was under way, and not after a
 *         restart. What does not stem from it stays. Status tells kinds, states and pages.
 * Method: a coordinator in this process, puts with an origin as a worker tells it, ids of one byte.
 */
#include "tests/coordinator/coordinator_fixture.h"

#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* Documents and chains of them, by the bytes of their ids. */
enum { A = 1, B = 2, C = 3, AB = 12, ABC = 13, CB = 32 };

static struct rk_id id_of(uint8_t id)
{
    return (struct rk_id){.bytes = {id}};
}

/* alone 0: the id itself. parent 0: none. */
static void stems_from(struct fixture *f, uint8_t alone, uint8_t parent, const char *salt)
{
    f->origin = (struct rk_origin){.alone = id_of(alone),
                                   .parent = id_of(parent),
                                   .salt_tag = rk_salt_tag(salt, strlen(salt))};
}

static uint64_t put_from(struct fixture *f, uint8_t id, uint8_t alone, uint8_t parent,
                         const char *salt)
{
    stems_from(f, alone, parent, salt);
    return put(f, id);
}

/* As workers do: each document alone, [A, B, C] in a chain, and [C, B] in another. */
static void put_all(struct fixture *f)
{
    (void)put_from(f, A, A, 0, "");
    (void)put_from(f, B, B, 0, "");
    (void)put_from(f, C, C, 0, "");
    (void)put_from(f, AB, B, A, "");
    (void)put_from(f, ABC, C, AB, "");
    (void)put_from(f, CB, B, C, "");
}

/* Which of all are still located, as text: "1.3" means the first and the third. */
static void expect_left(struct fixture *f, const char *left)
{
    static const uint8_t all[] = {A, B, C, AB, ABC, CB};
    char found[sizeof(all) + 1] = "";

    for (size_t i = 0; i < sizeof(all); i++) {
        Redknot__V1__LocateReply *reply = locate(f, all[i], coordinator_fingerprint);

        found[i] = reply->locations[0]->miss[0] == '\0' ? (char)('1' + i) : '.';
        rk_rpc_message_free(&reply->base);
    }
    assert_string_equal(found, left);
}

static void chains_go_with_their_segments(void **state)
{
    struct fixture *f = *state;
    uint8_t segment_id[32] = {A};
    ProtobufCBinaryData ids[1] = {bytes_of(segment_id)};
    Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
    uint32_t dropped = 0;
    uint64_t chains = 0;

    join(f, 0, 11);
    put_all(f);
    expect_left(f, "123456");
    request.n_segment_ids = 1;
    request.segment_ids = ids;
    drop_request(f, &request, &dropped, &chains);
    expect_left(f, ".23..6"); /* AB continues A, ABC continues AB. */
    assert_int_equal(dropped, 1);
    assert_int_equal(chains, 2);
    assert_int_equal(atomic_load(&f->stores[0].drops), 3);
    drop_request(f, &request, &dropped, &chains);
    assert_int_equal(dropped, 0);
}

static void origins_outlive_a_restart(void **state)
{
    struct fixture *f = *state;

    join(f, 0, 11);
    put_all(f);
    down(f);
    up(f);
    (void)heartbeat(f, 0, 11, NULL);
    expect_left(f, "123456");
    assert_int_equal(drop(f, B), 1); /* Last in two chains, in the middle of the third. */
    expect_left(f, "1.3...");
    down(f);
    up(f);
    (void)heartbeat(f, 0, 11, NULL);
    expect_left(f, "1.3...");
}

static void a_chain_is_dropped_by_its_own_id(void **state)
{
    struct fixture *f = *state;

    join(f, 0, 11);
    put_all(f);
    assert_int_equal(drop(f, AB), 1);
    expect_left(f, "123..6");
}

/* Alone it is forgotten or was never stored; its chains are what answers. */
static void chains_of_an_unknown_segment_go_too(void **state)
{
    struct fixture *f = *state;

    join(f, 0, 11);
    (void)put_from(f, AB, B, A, "");
    (void)put_from(f, CB, B, C, "");
    assert_int_equal(drop(f, A), 1);
    expect_left(f, ".....6");
    assert_int_equal(drop(f, B), 1);
    expect_left(f, "......");
}

/* Origins are what peers say. */
static void a_circle_ends(void **state)
{
    struct fixture *f = *state;

    join(f, 0, 11);
    (void)put_from(f, A, C, B, "");
    (void)put_from(f, B, C, A, "");
    (void)put_from(f, C, C, C, "");
    assert_int_equal(drop(f, A), 1);
    expect_left(f, "..3...");
    assert_int_equal(drop(f, C), 1);
    expect_left(f, "......");
}

static void a_store_tells_the_origin_again(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__Origin origin = REDKNOT__V1__ORIGIN__INIT;
    uint8_t tag[RK_SALT_TAG_BYTES] = {5};
    uint8_t alone[32] = {B};
    uint8_t parent[32] = {A};
    struct told told[2];
    uint32_t accepted = 0;
    size_t unwanted = 0;

    join(f, 0, 11);
    tell(&told[0], AB, 5);
    origin.alone_id = bytes_of(alone);
    origin.parent_chain_id = bytes_of(parent);
    origin.salt_tag = (ProtobufCBinaryData){.len = sizeof(tag), .data = tag};
    told[0].entry.origin = &origin;
    tell(&told[1], C, 6);
    assert_int_equal(announce(f, 0, 11, told, 2, &accepted, &unwanted), RK_OK);
    assert_int_equal(accepted, 2);
    expect_left(f, "..34..");
    (void)drop(f, A);
    expect_left(f, "..3...");
    origin.salt_tag.len = 3;
    assert_int_equal(announce(f, 0, 11, told, 2, &accepted, &unwanted), RK_ERR_INVALID);
}

/* Its segment was dropped while the store was away, and we lost our database before: nothing told
 * of the chains then. */
static void unknown_chains_of_a_dropped_segment_are_refused(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__Origin origins[3];
    uint8_t tag[RK_SALT_TAG_BYTES] = {5};
    uint8_t names[4][32] = {{A}, {B}, {C}, {AB}};
    struct told told[3];
    uint64_t generation;
    uint32_t accepted = 0;
    size_t unwanted = 0;

    join(f, 0, 11);
    generation = place_ok(f, 99);
    (void)put_from(f, A, A, 0, "");
    (void)drop(f, A);
    (void)put_from(f, A, A, 0, ""); /* What is put afterwards is as good as new. */
    tell(&told[0], ABC, generation);
    tell(&told[1], AB, generation);
    tell(&told[2], CB, generation);
    for (int i = 0; i < 3; i++) {
        redknot__v1__origin__init(&origins[i]);
        origins[i].salt_tag = (ProtobufCBinaryData){.len = sizeof(tag), .data = tag};
        told[i].entry.origin = &origins[i];
    }
    origins[0].alone_id = bytes_of(names[2]);
    origins[0].parent_chain_id = bytes_of(names[3]);
    origins[1].alone_id = bytes_of(names[1]);
    origins[1].parent_chain_id = bytes_of(names[0]);
    origins[2].alone_id = bytes_of(names[1]);
    origins[2].parent_chain_id = bytes_of(names[2]);
    assert_int_equal(announce(f, 1, 12, told, 3, &accepted, &unwanted), RK_ERR_NOT_FOUND);
    join(f, 1, 12);
    assert_int_equal(announce(f, 1, 12, told, 3, &accepted, &unwanted), RK_OK);
    assert_true(unwanted >= 1); /* AB; ABC, which came first, is dropped by a call. */
    expect_left(f, "1....6");
    (void)put_from(f, AB, B, A, "");
    expect_left(f, "1..4.6");
}

static void a_chain_under_way_is_not_committed(void **state)
{
    struct fixture *f = *state;
    uint64_t generation;
    uint64_t other;

    join(f, 0, 11);
    put_all(f);
    stems_from(f, C, AB, "");
    generation = place_ok(f, 99);
    stems_from(f, C, B, "");
    other = place_ok(f, 98);
    (void)drop(f, A);
    assert_int_equal(commit(f, 99, generation), RK_MISS_STALE_GENERATION);
    assert_int_equal(commit(f, 98, other), RK_OK);
}

static void by_label_and_by_tenant(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
    struct rk_salt_tag tag = rk_salt_tag("other", 5);
    uint32_t dropped = 0;
    uint64_t chains = 0;

    join(f, 0, 11);
    f->label = "secret.txt";
    (void)put_from(f, A, A, 0, "");
    f->label = NULL;
    (void)put_from(f, AB, B, A, "");
    (void)put_from(f, B, B, 0, "");
    (void)put_from(f, C, C, 0, "other");
    (void)put_from(f, CB, B, C, "other");
    request.label = (char *)(uintptr_t) "secret";
    drop_request(f, &request, &dropped, &chains);
    assert_int_equal(dropped, 0);
    request.label = (char *)(uintptr_t) "secret.txt";
    drop_request(f, &request, &dropped, &chains);
    expect_left(f, ".23..6");
    assert_int_equal(dropped, 1);
    assert_int_equal(chains, 1);
    request.label = (char *)(uintptr_t) "";
    request.salt_tag = (ProtobufCBinaryData){.len = sizeof(tag.bytes), .data = tag.bytes};
    drop_request(f, &request, &dropped, &chains);
    expect_left(f, ".2....");
    tag = rk_salt_tag(NULL, 0);
    drop_request(f, &request, &dropped, &chains);
    expect_left(f, "......");
}

/* Nothing comes back: not from a store that was away, not after a restart, not from a put that was
 * under way; and what is put afterwards stays. */
static void everything_at_once(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
    struct told told;
    uint64_t generation;
    uint64_t late;
    uint32_t count = 0;
    uint64_t chains = 0;
    size_t unwanted = 0;

    join(f, 0, 11);
    put_all(f);
    generation = generation_of(f, A);
    late = place_ok(f, 77);
    request.all = true;
    drop_request(f, &request, &count, &chains);
    assert_int_equal(count + chains, 6);
    expect_left(f, "......");
    assert_int_equal(commit(f, 77, late), RK_MISS_STALE_GENERATION);
    for (int i = 0; i < 2; i++) {
        tell(&told, 50, generation); /* Of an id that had no tombstone. */
        assert_int_equal(announce(f, 0, 11, &told, 1, &count, &unwanted), RK_OK);
        assert_int_equal(unwanted, 1);
        (void)put_from(f, A, A, 0, "");
        expect_left(f, "1.....");
        down(f);
        up(f);
        join(f, 0, 11);
    }
}

/* It lives, but did not hear of the drop. */
static void a_store_that_was_not_told_announces(void **state)
{
    struct fixture *f = *state;

    join(f, 0, 11);
    (void)put_from(f, A, A, 0, "");
    assert_false(heartbeat(f, 0, 11, NULL));
    fake_store_stop(&f->stores[0]);
    assert_int_equal(drop(f, A), 1);
    assert_true(heartbeat(f, 0, 11, NULL));
}

static void bad_tags_are_refused(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    uint8_t tag[3] = {0};

    request.salt_tag = (ProtobufCBinaryData){.len = sizeof(tag), .data = tag};
    assert_int_equal(
        call(f, M("Drop"), &request.base, &redknot__v1__drop_reply__descriptor, &reply),
        RK_ERR_INVALID);
}

/* A reader's word is of the copy that it read. */
static void one_copy_of_one_generation(void **state)
{
    struct fixture *f = *state;
    uint8_t segment_id[32] = {A};
    Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
    Redknot__V1__DropRequest__Copy copy = REDKNOT__V1__DROP_REQUEST__COPY__INIT;
    Redknot__V1__DropRequest__Copy *copies[1] = {&copy};
    uint32_t dropped = 0;
    uint64_t chains = 0;

    join(f, 0, 11);
    put_all(f);
    copy.segment_id = bytes_of(segment_id);
    copy.generation = generation_of(f, A) - 1;
    copy.node_id = (char *)(uintptr_t)store_name(0);
    request.n_copies = 1;
    request.copies = copies;
    drop_request(f, &request, &dropped, &chains); /* Read before it was stored again. */
    copy.generation++;
    copy.node_id = (char *)(uintptr_t)store_name(1);
    drop_request(f, &request, &dropped, &chains); /* Another node's copy. */
    expect_left(f, "123456");
    assert_int_equal(atomic_load(&f->stores[0].drops), 0);
    copy.node_id = (char *)(uintptr_t)store_name(0);
    drop_request(f, &request, &dropped, &chains);
    expect_left(f, ".23456");
    expect(f, A, "MISS_EVICTED", true);
    assert_int_equal(atomic_load(&f->stores[0].drops), 1);
    assert_true(atomic_load(&f->stores[0].last_dropped) == copy.generation);
    assert_true(put_from(f, A, A, 0, "") > copy.generation);
    expect_left(f, "123456");
}

/* ---- Status ---- */

static Redknot__V1__StatusReply *status_of(struct fixture *f,
                                           const Redknot__V1__StatusRequest *request)
{
    Redknot__V1__StatusReply *reply = NULL;

    assert_int_equal(call(f, M("Status"), &request->base, &redknot__v1__status_reply__descriptor,
                          (ProtobufCMessage **)&reply),
                     RK_OK);
    return reply;
}

static void status_tells_kinds_and_leaves_ghosts_out(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__StatusRequest request = REDKNOT__V1__STATUS_REQUEST__INIT;
    Redknot__V1__StatusReply *reply;
    Redknot__V1__Shard removed = REDKNOT__V1__SHARD__INIT;
    uint8_t segment_id[32] = {C};

    join(f, 0, 11);
    (void)put_from(f, A, A, 0, "");
    (void)put_from(f, AB, B, A, "");
    removed.segment_id = bytes_of(segment_id);
    removed.generation = put_from(f, C, C, 0, "");
    f->origin = (struct rk_origin){0};
    (void)put(f, B); /* As of an older client. */
    (void)heartbeat(f, 0, 11, &removed);
    request.with_segments = true;
    reply = status_of(f, &request);
    assert_int_equal(reply->num_segments, 4);
    assert_int_equal(reply->num_gone, 1);
    assert_int_equal(reply->n_segments, 3);
    assert_int_equal(reply->next_after.len, 0);
    assert_string_equal(reply->segments[0]->kind, "alone");
    assert_string_equal(reply->segments[0]->state, "stored");
    assert_string_equal(reply->segments[1]->kind, "chain");
    assert_int_equal(reply->segments[1]->alone_id.data[0], B);
    assert_string_equal(reply->segments[2]->kind, "");
    rk_rpc_message_free(&reply->base);
    request.with_gone = true;
    reply = status_of(f, &request);
    assert_int_equal(reply->n_segments, 4);
    assert_string_equal(reply->segments[2]->state, "gone");
    rk_rpc_message_free(&reply->base);
}

/* Page by page, also when the segment where a page ended is gone by the next one. */
static void status_comes_in_pages(void **state)
{
    struct fixture *f = *state;
    Redknot__V1__StatusRequest request = REDKNOT__V1__STATUS_REQUEST__INIT;
    Redknot__V1__StatusReply *reply;
    uint8_t after[64];
    uint8_t expected = 1;

    join(f, 0, 11);
    for (uint8_t id = 1; id <= 7; id++) {
        (void)put(f, id);
    }
    request.with_segments = true;
    request.segments_max = 2;
    do {
        reply = status_of(f, &request);
        assert_int_equal(reply->n_nodes, expected == 1 ? 1 : 0);
        for (size_t i = 0; i < reply->n_segments; i++) {
            assert_int_equal(reply->segments[i]->segment_id.data[0], expected++);
        }
        request.after = (ProtobufCBinaryData){.len = reply->next_after.len, .data = after};
        assert_true(reply->next_after.len <= sizeof(after));
        if (reply->next_after.len != 0) {
            memcpy(after, reply->next_after.data, reply->next_after.len);
        }
        rk_rpc_message_free(&reply->base);
        if (expected == 5) {
            (void)drop(f, 4);
        }
    } while (request.after.len != 0);
    assert_int_equal(expected, 8);
    request.after = (ProtobufCBinaryData){.len = 5, .data = after};
    reply = NULL;
    assert_int_equal(call(f, M("Status"), &request.base, &redknot__v1__status_reply__descriptor,
                          (ProtobufCMessage **)&reply),
                     RK_ERR_INVALID);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(chains_go_with_their_segments),
        TEST(origins_outlive_a_restart),
        TEST(a_chain_is_dropped_by_its_own_id),
        TEST(chains_of_an_unknown_segment_go_too),
        TEST(a_circle_ends),
        TEST(a_store_tells_the_origin_again),
        TEST(unknown_chains_of_a_dropped_segment_are_refused),
        TEST(a_chain_under_way_is_not_committed),
        TEST(by_label_and_by_tenant),
        TEST(everything_at_once),
        TEST(a_store_that_was_not_told_announces),
        TEST(bad_tags_are_refused),
        TEST(one_copy_of_one_generation),
        TEST(status_tells_kinds_and_leaves_ghosts_out),
        TEST(status_comes_in_pages),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
