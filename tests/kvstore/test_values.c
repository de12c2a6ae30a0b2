/*
 * Goal:   a value is kept as a shard is: verified as it comes in, visible whole or not at all,
 *         evicted, pinned and scrubbed; it never changes, and is no shard to anybody.
 * Method: values written in pieces of odd sizes into a small store, beside shards.
 */
#include "tests/kvstore/shard_support.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/value.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define STORE_BYTES (64u * 4096u)

static int set_up(void **state)
{
    const struct kvstore_options options = {.dram_bytes = STORE_BYTES, .shards_max = 4};
    struct kvstore *store = NULL;
    assert_int_equal(kvstore_create(&options, &store, NULL), RK_OK);
    *state = store;
    return 0;
}

static int tear_down(void **state)
{
    struct kvstore_stats stats;
    kvstore_stats_get(*state, &stats);
    assert_int_equal(stats.num_pins, 0);
    kvstore_destroy(*state);
    return 0;
}

static uint8_t byte_of(unsigned key, uint64_t at)
{
    return (uint8_t)(at * 11 + at / 256 + key);
}

static struct kvstore_header value_header(unsigned *key, uint64_t bytes)
{
    return (struct kvstore_header){
        .kind = KVSTORE_VALUE, .key = key, .key_bytes = sizeof(*key), .value_bytes = bytes};
}

/* In pieces of `piece` bytes; bad_page (or -1) gets a wrong checksum. */
static enum rk_status value_write(struct kvstore_put *put, unsigned key, uint64_t bytes,
                                  size_t piece, int bad_page)
{
    uint8_t *data = rk_alloc(bytes);
    enum rk_status status = RK_OK;
    assert_non_null(data);
    for (uint64_t i = 0; i < bytes; i++) {
        data[i] = byte_of(key, i);
    }
    for (uint64_t at = 0; at < bytes && status == RK_OK; at += piece) {
        uint64_t checksums[8];
        size_t count = 0;
        uint64_t end = at + piece < bytes ? at + piece : bytes;
        for (uint64_t page = at / RK_VALUE_PAGE_BYTES; page < rk_value_pages(bytes); page++) {
            uint64_t begin = page * RK_VALUE_PAGE_BYTES;
            uint64_t left = bytes - begin;
            uint64_t length = left < RK_VALUE_PAGE_BYTES ? left : RK_VALUE_PAGE_BYTES;
            if (begin + length > at && begin + length <= end) {
                checksums[count++] = rk_hash_xxh3(data + begin, length) ^ ((int)page == bad_page);
            }
        }
        status = kvstore_put_write(put, data + at, end - at, checksums, count, NULL);
    }
    rk_free(data);
    return status;
}

static enum rk_status value_put(struct kvstore *store, unsigned key, uint64_t bytes, size_t piece)
{
    struct kvstore_header header = value_header(&key, bytes);
    struct kvstore_put *put = NULL;
    enum rk_status status = kvstore_put_begin(store, &header, &put, NULL);
    if (status == RK_OK) {
        status = value_write(put, key, bytes, piece, -1);
    }
    if (status == RK_OK) {
        status = kvstore_put_commit(put, NULL);
    }
    kvstore_put_destroy(put);
    return status;
}

static enum rk_status value_check(struct kvstore *store, unsigned key, uint64_t bytes)
{
    struct rk_id id = rk_id_value(&key, sizeof(key));
    const struct kvstore_shard *value = NULL;
    enum rk_status status = kvstore_pin_value(store, &id, &value);
    if (status != RK_OK) {
        return status;
    }
    assert_int_equal(kvstore_shard_bytes(value), bytes);
    uint64_t at = 0;
    for (uint64_t page = 0; page < kvstore_shard_pages(value); page++) {
        uint64_t offset = 0;
        uint64_t checksum = 0;
        size_t length = kvstore_shard_page_length(value, page);
        kvstore_shard_page(value, page, &offset, &checksum);
        const uint8_t *data = (const uint8_t *)kvstore_arena(store) + offset;
        assert_int_equal(rk_hash_xxh3(data, length), checksum);
        for (size_t i = 0; i < length; i++, at++) {
            assert_int_equal(data[i], byte_of(key, at));
        }
    }
    assert_int_equal(at, bytes);
    kvstore_unpin(store, value);
    return RK_OK;
}

static uint64_t used(struct kvstore *store)
{
    struct kvstore_stats stats;
    kvstore_stats_get(store, &stats);
    return stats.used_bytes;
}

static void pieces_of_any_size_make_a_value(void **state)
{
    static const uint64_t sizes[] = {1, 4095, 4096, 65535, 65536, 65537, 131072, 200001};
    static const size_t pieces[] = {1u << 20, 65536, 65535, 1000, 131072};
    struct kvstore *store = *state;
    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        for (unsigned j = 0; j < sizeof(pieces) / sizeof(pieces[0]); j++) {
            unsigned key = i * 100 + j;
            assert_int_equal(value_put(store, key, sizes[i], pieces[j]), RK_OK);
            assert_int_equal(value_check(store, key, sizes[i]), RK_OK);
        }
    }
}

static void it_never_changes(void **state)
{
    struct kvstore *store = *state;
    unsigned key = 7;
    struct rk_id id = rk_id_value(&key, sizeof(key));
    struct kvstore_name any = {.kind = KVSTORE_VALUE, .segment_id = id};
    struct kvstore_header header = value_header(&key, 5000);
    struct kvstore_put *first = NULL;
    struct kvstore_put *second = NULL;
    assert_int_equal(kvstore_put_begin(store, &header, &first, NULL), RK_OK);
    assert_int_equal(kvstore_put_begin(store, &header, &second, NULL), RK_OK); /* Side by side. */
    assert_int_equal(value_write(first, key, 5000, 777, -1), RK_OK);
    assert_false(kvstore_has_value(store, &id)); /* Not before its end. */
    assert_int_equal(value_write(second, key, 5000, 5000, -1), RK_OK);
    assert_int_equal(kvstore_put_commit(second, NULL), RK_OK);
    assert_int_equal(kvstore_put_commit(first, NULL), RK_ERR_EXISTS);
    kvstore_put_destroy(first);
    kvstore_put_destroy(second);
    assert_int_equal(value_put(store, key, 9000, 9000), RK_ERR_EXISTS);
    assert_int_equal(value_check(store, key, 5000), RK_OK);
    assert_int_equal(kvstore_drop(store, &any), RK_OK);
    assert_int_equal(value_check(store, key, 5000), RK_MISS_ABSENT);
    assert_int_equal(used(store), 0);
    assert_int_equal(value_put(store, key, 9000, 9000), RK_OK);
    assert_int_equal(value_check(store, key, 9000), RK_OK);
}

static void wrong_values_leave_nothing(void **state)
{
    static uint8_t key[300];
    struct kvstore *store = *state;
    unsigned good = 1;
    struct kvstore_put *put = NULL;
    struct kvstore_header wrong[] = {
        {.kind = KVSTORE_VALUE, .key = key, .key_bytes = 0, .value_bytes = 1},
        {.kind = KVSTORE_VALUE, .key = key, .key_bytes = 257, .value_bytes = 1},
        {.kind = KVSTORE_VALUE, .key = key, .key_bytes = 256, .value_bytes = 0},
        {.kind = KVSTORE_VALUE, .key = key, .key_bytes = 1, .value_bytes = RK_VALUE_BYTES_MAX + 1}};
    struct kvstore_header large = value_header(&good, STORE_BYTES + 1);
    struct kvstore_header header = value_header(&good, 70000);
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        assert_int_equal(kvstore_put_begin(store, &wrong[i], &put, NULL), RK_ERR_INVALID);
    }
    assert_int_equal(kvstore_put_begin(store, &large, &put, NULL), RK_ERR_FULL);
    assert_int_equal(kvstore_put_begin(store, &header, &put, NULL), RK_OK);
    assert_int_equal(value_write(put, good, 70000, 1000, 0), RK_ERR_CORRUPT);
    kvstore_put_destroy(put);
    assert_int_equal(kvstore_put_begin(store, &header, &put, NULL), RK_OK);
    assert_int_equal(value_write(put, good, 60000, 60000, -1), RK_ERR_INVALID); /* No page ends. */
    kvstore_put_destroy(put);
    assert_int_equal(kvstore_put_begin(store, &header, &put, NULL), RK_OK);
    assert_int_equal(kvstore_put_commit(put, NULL), RK_ERR_INVALID); /* Nothing came. */
    kvstore_put_destroy(put);
    assert_int_equal(used(store), 0);
}

static void it_is_no_shard_to_anybody(void **state)
{
    struct kvstore *store = *state;
    unsigned key = 3;
    struct rk_id id = rk_id_value(&key, sizeof(key));
    struct kvstore_header shard = shard_header(1, 1, 64);
    struct kvstore_name name = shard_name(&shard);
    struct kvstore_name *names = NULL;
    struct kvstore_header *copy = NULL;
    const struct kvstore_shard *pinned = NULL;
    struct kvstore_stats stats;
    size_t count = 0;
    bool lost = false;
    assert_int_equal(value_put(store, key, 3000, 3000), RK_OK);
    assert_int_equal(shard_write(store, &shard, 5), RK_OK);
    assert_int_equal(kvstore_commit(store, &name, NULL), RK_OK);
    assert_int_equal(kvstore_list(store, &names, &count), RK_OK);
    assert_int_equal(count, 1);
    rk_free(names);
    struct kvstore_name as_shard = {.segment_id = id, .generation = 1};
    assert_int_equal(kvstore_pin(store, &as_shard, NULL, &pinned), RK_MISS_ABSENT);
    assert_int_equal(kvstore_describe(store, &as_shard, &copy), RK_ERR_NOT_FOUND);
    assert_int_equal(kvstore_pin_value(store, &shard.segment_id, &pinned), RK_MISS_ABSENT);
    assert_false(kvstore_has_value(store, &shard.segment_id));
    kvstore_stats_get(store, &stats);
    assert_int_equal(stats.num_shards, 1);
    assert_int_equal(stats.num_values, 1);
    struct kvstore_name any = {.kind = KVSTORE_VALUE, .segment_id = id};
    assert_int_equal(kvstore_drop(store, &any), RK_OK);
    assert_int_equal(kvstore_removed_take(store, &name, 1, &lost), 0); /* Nobody is told. */
}

/* Somebody stores a shard under the id that a value's key has: neither hides the other, whichever
 * comes first, and each goes alone. */
static void a_shard_under_its_id_is_another_thing(void **state)
{
    struct kvstore *store = *state;
    unsigned key = 9;
    struct kvstore_header shard = shard_header(1, UINT64_C(1) << 61, 60);
    shard.segment_id = rk_id_value(&key, sizeof(key));
    struct kvstore_name shard_is = shard_name(&shard);
    struct kvstore_name value_is = {.kind = KVSTORE_VALUE, .segment_id = shard.segment_id};
    for (int value_first = 0; value_first < 2; value_first++) {
        if (value_first) {
            assert_int_equal(value_put(store, key, 3000, 3000), RK_OK);
        }
        assert_int_equal(shard_put(store, &shard), RK_OK);
        if (!value_first) {
            assert_int_equal(value_put(store, key, 3000, 3000), RK_OK);
        }
        assert_int_equal(shard_read(store, &shard), RK_OK);
        assert_int_equal(value_check(store, key, 3000), RK_OK);
        assert_int_equal(value_put(store, key, 3000, 3000), RK_ERR_EXISTS);
        if (value_first) {
            assert_int_equal(kvstore_drop(store, &shard_is), RK_OK);
            assert_int_equal(value_check(store, key, 3000), RK_OK);
            assert_int_equal(kvstore_drop(store, &value_is), RK_OK);
        } else {
            assert_int_equal(kvstore_drop(store, &value_is), RK_OK);
            assert_int_equal(value_check(store, key, 3000), RK_MISS_ABSENT);
            assert_int_equal(shard_read(store, &shard), RK_OK);
            assert_int_equal(kvstore_drop(store, &shard_is), RK_OK);
        }
    }
}

static void it_makes_room_and_is_scrubbed(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_name damaged;
    uint64_t offset = 0;
    unsigned keys[] = {0, 1, 2};
    struct rk_id first = rk_id_value(&keys[0], sizeof(keys[0]));
    const struct kvstore_shard *pinned = NULL;
    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(value_put(store, keys[i], 100000, 100000), RK_OK);
    }
    assert_int_equal(kvstore_pin_value(store, &first, &pinned), RK_OK);
    assert_int_equal(value_put(store, keys[2], 100000, 100000), RK_OK);
    assert_int_equal(value_check(store, keys[1], 100000), RK_MISS_EVICTED); /* Not the pinned. */
    assert_int_equal(value_check(store, keys[0], 100000), RK_OK);
    kvstore_unpin(store, pinned);
    assert_int_equal(kvstore_fault_inject(store, &damaged, &offset), RK_OK);
    (void)kvstore_scrub(store, 2 * STORE_BYTES);
    bool gone[] = {value_check(store, keys[0], 100000) != RK_OK,
                   value_check(store, keys[2], 100000) != RK_OK};
    assert_int_equal(gone[0] + gone[1], 1);
}

/* It may have been left out of what clients use meanwhile, and has not heard of it yet. */
static void values_are_given_on_a_lease(void **state)
{
    struct kvstore *store = *state;
    assert_int_equal(value_put(store, 1, 5000, 5000), RK_OK); /* None is needed yet. */
    assert_true(kvstore_values_sure(store));
    kvstore_values_renew(store, rk_deadline_in_ms(600));
    assert_int_equal(value_check(store, 1, 5000), RK_OK);
    rk_clock_sleep_ms(700);
    assert_int_equal(value_check(store, 1, 5000), RK_MISS_NODE_DOWN);
    assert_int_equal(value_put(store, 2, 5000, 5000), RK_ERR_UNAVAILABLE);
    assert_false(kvstore_values_sure(store));
    kvstore_values_renew(store, rk_deadline_in_ms(60000)); /* What is in the sockets comes first. */
    assert_int_equal(value_check(store, 1, 5000), RK_MISS_NODE_DOWN);
    rk_clock_sleep_ms(1100);
    kvstore_values_renew(store, 1); /* An answer to a question from long ago. */
    assert_int_equal(value_check(store, 1, 5000), RK_MISS_NODE_DOWN);
    kvstore_values_renew(store, rk_deadline_in_ms(60000));
    assert_int_equal(value_check(store, 1, 5000), RK_OK);
    assert_int_equal(value_put(store, 2, 5000, 5000), RK_OK);
}

int main(void)
{
#define STORED(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
    const struct CMUnitTest tests[] = {STORED(pieces_of_any_size_make_a_value),
                                       STORED(it_never_changes),
                                       STORED(wrong_values_leave_nothing),
                                       STORED(it_is_no_shard_to_anybody),
                                       STORED(a_shard_under_its_id_is_another_thing),
                                       STORED(it_makes_room_and_is_scrubbed),
                                       STORED(values_are_given_on_a_lease)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
