/*
 * Goal:   an announcement is believed as far as it can be: what happens while it is under way wins
 *         over it, what nobody can have placed is refused, and what it leaves on disk is what it
 *         made known. It is a sign of life.
 * Method: a coordinator in this process; announcements by hand, message for message; the database
 *         is looked into, and damaged, while the coordinator is down.
 */
#include "tests/coordinator/coordinator_fixture.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "coordinator/metadata.h"
#include "coordinator/record.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define FAR UINT64_C(0x3fffffffffffdfff) /* a block under where the counter would end */

/* The store listed its shards, then one was committed, and only then the coordinator's handler
 * began: the list does not have it, and yet it is there. */
static void committed_after_the_list_was_taken(void **state)
{
    struct fixture *f = *state;
    uint32_t accepted = 0;
    size_t dropped = 0;

    join(f, 0, 11);
    (void)put(f, 1);
    join(f, 0, 11); /* The list is taken after this reply. */
    f->with_mark = true;
    (void)put(f, 2);
    assert_int_equal(announce(f, 0, 11, NULL, 0, &accepted, &dropped), RK_OK);
    expect(f, 1, "MISS_EVICTED", true);
    expect(f, 2, "", true);
}

static void marks_of_somebody_else_are_refused(void **state)
{
    struct fixture *f = *state;
    uint32_t accepted = 0;
    size_t dropped = 0;

    join(f, 0, 11);
    (void)put(f, 1);
    f->with_mark = true;
    f->mark += 1000;
    assert_int_equal(announce(f, 0, 11, NULL, 0, &accepted, &dropped), RK_ERR_INVALID);
    f->mark -= 1000;
    f->epoch--; /* Of the coordinator before this one. */
    assert_int_equal(announce(f, 0, 11, NULL, 0, &accepted, &dropped), RK_ERR_NOT_FOUND);
    expect(f, 1, "", true);
}

/* Whatever a peer announces: puts go on, and so does the next start. */
static void a_far_generation_is_refused(void **state)
{
    struct fixture *f = *state;
    struct told told[2];
    uint32_t accepted = 0;
    size_t dropped = 0;

    join(f, 0, 11);
    tell(&told[0], 1, FAR);
    tell(&told[1], 2, place_ok(f, 9) + 1000000);
    assert_int_equal(announce(f, 0, 11, told, 2, &accepted, &dropped), RK_OK);
    assert_int_equal(accepted, 1);
    assert_int_equal(dropped, 1);
    expect(f, 1, "MISS_ABSENT", false);
    expect(f, 2, "", false);
    for (int i = 0; i < 5000; i++) { /* More than a block of generations. */
        assert_true(place_ok(f, 3) < FAR);
    }
    down(f);
    up(f);
    join(f, 0, 11);
    (void)put(f, 3);
}

/* ---- The database ---- */

static struct metadata *open_database(struct fixture *f)
{
    struct metadata *metadata = NULL;

    assert_int_equal(metadata_rocksdb.open(f->directory, &metadata, NULL), RK_OK);
    return metadata;
}

static void write_message(struct metadata *metadata, const void *key, size_t key_bytes,
                          const ProtobufCMessage *message)
{
    struct metadata_change change = {.key = key, .key_bytes = key_bytes};
    void *data = record_pack(message, &change.value_bytes);

    change.value = data;
    assert_int_equal(metadata_rocksdb.write(metadata, &change, 1, true, NULL), RK_OK);
    rk_free(data);
}

/* Of a version that believed it: the counter, and a record that it led to. */
static void a_far_counter_on_disk_is_ignored(void **state)
{
    struct fixture *f = *state;
    Redknot__Coordinator__V1__CounterRecord counter =
        REDKNOT__COORDINATOR__V1__COUNTER_RECORD__INIT;
    Redknot__Coordinator__V1__TombstoneRecord tombstone =
        REDKNOT__COORDINATOR__V1__TOMBSTONE_RECORD__INIT;
    struct rk_id id = {.bytes = {2}};
    uint8_t key[RECORD_KEY_BYTES];
    uint64_t before;

    join(f, 0, 11);
    before = put(f, 1);
    down(f);
    struct metadata *metadata = open_database(f);
    counter.value = FAR + 4096;
    write_message(metadata, "m/generation", 12, &counter.base);
    tombstone.generation = FAR;
    record_key('d', &id, key);
    write_message(metadata, key, sizeof(key), &tombstone.base);
    metadata_rocksdb.close(metadata);
    up(f);
    join(f, 0, 11);
    uint64_t after = put(f, 2); /* Not refused as older than the tombstone. */
    assert_true(after > before && after < FAR);
    expect(f, 2, "", true);
}

struct count {
    int tokens;
    int marks;
};

static enum rk_status count_keys(const void *key, size_t key_bytes, const void *value,
                                 size_t value_bytes, void *context, struct rk_error *error)
{
    struct count *count = context;

    (void)key_bytes;
    (void)value;
    (void)value_bytes;
    (void)error;
    count->tokens += *(const char *)key == 't';
    count->marks += *(const char *)key == 'a';
    return RK_OK;
}

static struct count count_database(struct fixture *f)
{
    struct count count = {0};

    down(f);
    struct metadata *metadata = open_database(f);
    assert_int_equal(metadata_rocksdb.scan(metadata, "", 0, count_keys, &count, NULL), RK_OK);
    metadata_rocksdb.close(metadata);
    up(f);
    return count;
}

static void tell_tokens(struct told *told, uint32_t *token_ids)
{
    told->entry.n_token_ids = told->shard.num_tokens;
    told->entry.token_ids = token_ids;
    told->entry.label = (char *)(uintptr_t) "a label";
}

/* Tokens are written while the announcement comes: they stay only with what it made known. */
static void tokens_stay_with_what_is_known(void **state)
{
    struct fixture *f = *state;
    struct told told[3];
    uint32_t token_ids[10];
    uint32_t accepted = 0;
    size_t dropped = 0;
    struct count count;

    for (uint32_t i = 0; i < 10; i++) {
        token_ids[i] = 1001 + i;
    }
    join(f, 0, 11);
    tell(&told[0], 1, 5);
    tell(&told[1], 2, 6);
    tell(&told[2], 3, 7);
    for (int i = 0; i < 3; i++) {
        tell_tokens(&told[i], token_ids);
    }
    told[2].shard.num_shards = 0; /* The last message makes all of it unbelievable. */
    assert_int_equal(announce(f, 0, 11, told, 3, &accepted, &dropped), RK_ERR_INVALID);
    expect(f, 1, "MISS_ABSENT", false);
    count = count_database(f);
    assert_int_equal(count.tokens, 0);
    assert_int_equal(count.marks, 0);
    told[2].shard.num_shards = 1;
    join(f, 0, 11);
    assert_int_equal(announce(f, 0, 11, told, 3, &accepted, &dropped), RK_OK);
    expect(f, 1, "", true);
    count = count_database(f);
    assert_int_equal(count.tokens, 3);
    assert_int_equal(count.marks, 0);
}

/* As if the process had died in the middle of an announcement. */
static void tokens_of_a_crash_are_collected(void **state)
{
    struct fixture *f = *state;
    struct rk_id id = {.bytes = {7}};
    uint8_t keys[2][RECORD_KEY_BYTES];
    struct metadata_change changes[2];
    struct count count;

    join(f, 0, 11);
    (void)put(f, 1);
    down(f);
    record_key('t', &id, keys[0]);
    record_key('a', &id, keys[1]);
    for (int i = 0; i < 2; i++) {
        changes[i] =
            (struct metadata_change){.key = keys[i], .key_bytes = RECORD_KEY_BYTES, .value = ""};
    }
    struct metadata *metadata = open_database(f);
    assert_int_equal(metadata_rocksdb.write(metadata, changes, 2, true, NULL), RK_OK);
    metadata_rocksdb.close(metadata);
    up(f);
    count = count_database(f);
    assert_int_equal(count.tokens, 1);
    assert_int_equal(count.marks, 0);
}

/* ---- What an entry may say ---- */

/* Located, and then found nowhere at each read: better not known, and gone from the store. */
static void shards_that_nobody_placed_are_refused(void **state)
{
    struct fixture *f = *state;
    struct told told[5];
    uint32_t accepted = 0;
    size_t dropped = 0;

    join(f, 0, 11);
    for (uint8_t i = 0; i < 5; i++) {
        tell(&told[i], (uint8_t)(i + 1), 5);
    }
    told[0].heads.layer_end = 3; /* One layer is nowhere. */
    told[1].heads.kv_head_begin = 1;
    told[2].shard.num_shards = 5; /* Of 4 layers. */
    told[2].heads.layer_end = 1;
    told[3].shard.num_tokens = 1u << 22;
    told[3].layout.head_dim = 16; /* 2 GiB; the store has one. */
    assert_int_equal(announce(f, 0, 11, told, 5, &accepted, &dropped), RK_OK);
    assert_int_equal(accepted, 1);
    assert_int_equal(dropped, 4);
    for (uint8_t i = 0; i < 4; i++) {
        expect(f, (uint8_t)(i + 1), "MISS_ABSENT", false);
    }
    expect(f, 5, "", false);
}

/* ---- Life ---- */

static bool is_alive(struct fixture *f)
{
    Redknot__V1__StatusRequest request = REDKNOT__V1__STATUS_REQUEST__INIT;
    Redknot__V1__StatusReply *reply = NULL;
    bool alive;

    assert_int_equal(call(f, M("Status"), &request.base, &redknot__v1__status_reply__descriptor,
                          (ProtobufCMessage **)&reply),
                     RK_OK);
    alive = reply->nodes[0]->alive;
    rk_rpc_message_free(&reply->base);
    return alive;
}

static void a_message_is_a_sign_of_life(void **state)
{
    struct fixture *f = *state;
    struct rk_rpc_stream *stream = NULL;
    Redknot__V1__AnnounceRequest request = REDKNOT__V1__ANNOUNCE_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;

    down(f);
    f->options.timeout_ms = 1000;
    up(f);
    join(f, 0, 11);
    request.node_id = (char *)(uintptr_t)store_name(0);
    request.incarnation = 11;
    assert_int_equal(rk_rpc_stream_open(f->channel, M("Announce"), CALL_MS, &stream, NULL), RK_OK);
    for (int i = 0; i < 20; i++) {
        assert_int_equal(rk_rpc_stream_send(stream, &request.base), RK_OK);
        rk_clock_sleep_ms(100);
        assert_true(is_alive(f));
    }
    assert_int_equal(rk_rpc_stream_send_done(stream), RK_OK);
    assert_int_equal(rk_rpc_stream_recv(stream, &redknot__v1__announce_reply__descriptor, &reply),
                     RK_OK);
    rk_rpc_message_free(reply);
    assert_int_equal(rk_rpc_stream_finish(stream, NULL), RK_OK);
    rk_rpc_stream_destroy(stream);
    assert_false(heartbeat(f, 0, 11, NULL)); /* Nothing is left to be announced. */
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(committed_after_the_list_was_taken),    TEST(marks_of_somebody_else_are_refused),
        TEST(a_far_generation_is_refused),           TEST(a_far_counter_on_disk_is_ignored),
        TEST(tokens_stay_with_what_is_known),        TEST(tokens_of_a_crash_are_collected),
        TEST(shards_that_nobody_placed_are_refused), TEST(a_message_is_a_sign_of_life),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
