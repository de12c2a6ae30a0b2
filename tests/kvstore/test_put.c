/*
 * Goal:   a shard is visible all or not at all, and only the newest generation.
 * Method: each way a put can end, beside what readers see and what room is left.
 */
#include "tests/kvstore/shard_support.h"

#include "common/base/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static int set_up(void **state)
{
    const struct kvstore_options options = {.dram_bytes = 256 * 4096, .shards_max = 4};
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

static uint64_t used(struct kvstore *store)
{
    struct kvstore_stats stats;
    kvstore_stats_get(store, &stats);
    return stats.used_bytes;
}

static void nothing_is_seen_before_commit(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header header = shard_header(1, 5, 200);
    struct kvstore_name name = shard_name(&header);
    assert_int_equal(kvstore_commit(store, &name, NULL), RK_ERR_NOT_FOUND);
    assert_int_equal(shard_write(store, &header, 5), RK_OK);
    assert_int_equal(shard_read(store, &header), RK_MISS_ABSENT);
    assert_int_equal(kvstore_commit(store, &name, NULL), RK_OK);
    assert_int_equal(kvstore_commit(store, &name, NULL), RK_OK); /* A repeated call. */
    assert_int_equal(shard_read(store, &header), RK_OK);
    assert_int_equal(kvstore_abort(store, &name), RK_ERR_NOT_FOUND);
    assert_int_equal(shard_write(store, &header, 5), RK_ERR_EXISTS);
}

static void a_bad_page_leaves_nothing(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header header = shard_header(1, 1, 64);
    struct kvstore_name name = shard_name(&header);
    struct kvstore_put *put = NULL;
    uint8_t page[4096];
    uint64_t sum = shard_page_fill(&header, 0, page);
    assert_int_equal(kvstore_put_begin(store, &header, &put, NULL), RK_OK);
    assert_int_equal(kvstore_put_write(put, page, sizeof(page), &sum, 1, NULL), RK_OK);
    page[17] ^= 0x40;
    assert_int_equal(kvstore_put_write(put, page, sizeof(page), &sum, 1, NULL), RK_ERR_CORRUPT);
    assert_int_equal(used(store), 0);
    assert_int_equal(kvstore_put_write(put, page, sizeof(page), &sum, 1, NULL), RK_ERR_CANCELLED);
    assert_int_equal(kvstore_put_seal(put, NULL), RK_ERR_CANCELLED);
    kvstore_put_destroy(put);
    assert_int_equal(kvstore_commit(store, &name, NULL), RK_ERR_NOT_FOUND);
    struct kvstore_stats stats;
    kvstore_stats_get(store, &stats);
    assert_int_equal(stats.checksum_failures, 1);
    assert_int_equal(stats.put_checksum_failures, 1);
}

static void wrong_counts_are_refused(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header header = shard_header(1, 1, 64);
    struct kvstore_put *put = NULL;
    static uint8_t pages[5 * 4096];
    uint64_t sums[5];
    for (size_t i = 0; i < 5; i++) {
        sums[i] = shard_page_fill(&header, i, pages + i * 4096);
    }
    const struct {
        size_t bytes;
        size_t num_pages;
    } wrong[] = {{5 * 4096, 5}, {4096, 2}, {4095, 1}, {0, 1}, {4096, SIZE_MAX / 4096 + 2}};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        assert_int_equal(kvstore_put_begin(store, &header, &put, NULL), RK_OK);
        assert_int_equal(
            kvstore_put_write(put, pages, wrong[i].bytes, sums, wrong[i].num_pages, NULL),
            RK_ERR_INVALID);
        kvstore_put_destroy(put);
        assert_int_equal(used(store), 0);
    }
    assert_int_equal(kvstore_put_begin(store, &header, &put, NULL), RK_OK);
    assert_int_equal(kvstore_put_write(put, pages, 4096, sums, 1, NULL), RK_OK);
    assert_int_equal(kvstore_put_seal(put, NULL), RK_ERR_INVALID); /* Three are missing. */
    kvstore_put_destroy(put);
    assert_int_equal(used(store), 0);
}

static void wrong_headers_are_refused(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_put *put = NULL;
    const struct kvstore_header good = shard_header(1, 1, 64);
    struct kvstore_header wrong[8];
    for (size_t i = 0; i < 8; i++) {
        wrong[i] = good;
    }
    wrong[0].generation = 0;
    wrong[1].num_tokens = 0;
    wrong[2].num_tokens = RK_SEGMENT_TOKENS_MAX + 1;
    wrong[3].heads.layer_end = 3;
    wrong[4].heads.kv_head_begin = 2;
    wrong[5].shard_index = 1;
    wrong[6].layout.dtype = (enum rk_dtype)9;
    wrong[7].num_token_ids = 3;
    for (size_t i = 0; i < 8; i++) {
        assert_int_equal(kvstore_put_begin(store, &wrong[i], &put, NULL), RK_ERR_INVALID);
    }
    assert_null(put);
}

static void a_newer_generation_supersedes(void **state)
{
    struct kvstore *store = *state;
    const struct kvstore_shard *old_pin = NULL;
    struct kvstore_header old = shard_header(1, 3, 64);
    struct kvstore_header fresh = shard_header(1, 4, 64);
    struct kvstore_name old_name = shard_name(&old);
    struct kvstore_name fresh_name = shard_name(&fresh);
    assert_int_equal(shard_write(store, &fresh, 1), RK_OK); /* Staged beside each other. */
    assert_int_equal(shard_put(store, &old), RK_OK);
    assert_int_equal(kvstore_pin(store, &old_name, NULL, &old_pin), RK_OK);
    assert_int_equal(kvstore_commit(store, &fresh_name, NULL), RK_OK);
    assert_int_equal(shard_read(store, &fresh), RK_OK);
    assert_int_equal(shard_read(store, &old), RK_MISS_STALE_GENERATION);
    assert_int_equal(used(store), 2 * 4 * 4096); /* The old one is being read. */
    kvstore_unpin(store, old_pin);
    assert_int_equal(used(store), 4 * 4096);
    assert_int_equal(shard_write(store, &old, 1), RK_ERR_EXISTS);
    assert_int_equal(kvstore_drop(store, &old_name), RK_ERR_NOT_FOUND);
    /* The coordinator hears of it: should it undo the fresh one, the old one is gone too. */
    struct kvstore_name told[2];
    bool lost = false;
    assert_int_equal(kvstore_removed_take(store, told, 2, &lost), 1);
    assert_int_equal(told[0].generation, old.generation);
    struct kvstore_header other = fresh;
    other.fingerprint.bytes[0] ^= 1;
    assert_int_equal(shard_read(store, &other), RK_MISS_FINGERPRINT);
}

static void an_older_commit_is_refused(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header old = shard_header(1, 3, 64);
    struct kvstore_header fresh = shard_header(1, 4, 64);
    struct kvstore_name old_name = shard_name(&old);
    assert_int_equal(shard_write(store, &old, 1), RK_OK);
    assert_int_equal(shard_put(store, &fresh), RK_OK);
    assert_int_equal(kvstore_commit(store, &old_name, NULL), RK_ERR_EXISTS);
    assert_int_equal(used(store), 4 * 4096);
    assert_int_equal(shard_read(store, &fresh), RK_OK);
}

static void the_abandoned_is_collected(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header sealed = shard_header(1, 1, 64);
    struct kvstore_header open = shard_header(2, 1, 64);
    struct kvstore_header held = shard_header(3, 1, 64);
    struct kvstore_put *put = NULL;
    int64_t later_ns = rk_clock_ns() + INT64_C(31) * 1000000000;
    assert_int_equal(shard_put(store, &held), RK_OK);
    assert_int_equal(shard_write(store, &sealed, 1), RK_OK);
    assert_int_equal(kvstore_put_begin(store, &open, &put, NULL), RK_OK);
    assert_int_equal(kvstore_collect(store, rk_clock_ns()), 0);
    assert_int_equal(kvstore_collect(store, later_ns), 2);
    assert_int_equal(used(store), 4 * 4096);
    uint8_t page[4096];
    uint64_t sum = shard_page_fill(&open, 0, page);
    assert_int_equal(kvstore_put_write(put, page, sizeof(page), &sum, 1, NULL), RK_ERR_CANCELLED);
    kvstore_put_destroy(put);
    assert_int_equal(shard_read(store, &held), RK_OK);
}

static void a_repeated_put_takes_the_place_of_the_first(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header header = shard_header(1, 1, 64);
    struct kvstore_put *put = NULL;
    struct kvstore_put *second = NULL;
    assert_int_equal(shard_write(store, &header, 2), RK_OK);
    assert_int_equal(shard_write(store, &header, 2), RK_OK);
    assert_int_equal(used(store), 4 * 4096);
    assert_int_equal(kvstore_put_begin(store, &header, &put, NULL), RK_OK);
    assert_int_equal(kvstore_put_begin(store, &header, &second, NULL), RK_ERR_BUSY);
    kvstore_put_destroy(put);
    assert_int_equal(used(store), 0);
}

static void the_number_of_shards_is_bounded(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header header;
    for (uint32_t i = 0; i < 4; i++) {
        header = shard_header(i, 1, 64);
        assert_int_equal(shard_write(store, &header, 4), RK_OK);
    }
    header = shard_header(4, 1, 64);
    assert_int_equal(shard_write(store, &header, 4), RK_ERR_FULL);
    struct kvstore_header first = shard_header(0, 1, 64);
    struct kvstore_name name = shard_name(&first);
    assert_int_equal(kvstore_commit(store, &name, NULL), RK_OK);
    assert_int_equal(shard_write(store, &header, 4), RK_OK); /* The committed one gave way. */
    assert_int_equal(shard_read(store, &first), RK_MISS_EVICTED);
}

int main(void)
{
#define WITH_STORE(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        WITH_STORE(nothing_is_seen_before_commit),
        WITH_STORE(a_bad_page_leaves_nothing),
        WITH_STORE(wrong_counts_are_refused),
        WITH_STORE(wrong_headers_are_refused),
        WITH_STORE(a_newer_generation_supersedes),
        WITH_STORE(an_older_commit_is_refused),
        WITH_STORE(the_abandoned_is_collected),
        WITH_STORE(a_repeated_put_takes_the_place_of_the_first),
        WITH_STORE(the_number_of_shards_is_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
