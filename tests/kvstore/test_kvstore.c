/*
 * Goal:   a store's life: creation, seals, room, eviction, what is remembered.
 * Method: a small arena of 4 KiB pages, so that each count can be said exactly.
 */
#include "tests/kvstore/shard_support.h"

#include "common/base/alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

/* 64 pages; a shard of 64 tokens has 4 pages. */
static const struct kvstore_options small = {.dram_bytes = 64 * 4096, .removed_max = 8};

static int set_up(void **state)
{
    struct kvstore *store = NULL;
    assert_int_equal(kvstore_create(&small, &store, NULL), RK_OK);
    *state = store;
    return 0;
}

static int tear_down(void **state)
{
    kvstore_destroy(*state);
    return 0;
}

static void create_survives_each_failed_allocation(void **state)
{
    (void)state;
    struct kvstore *store = NULL;
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    for (; status != RK_OK; failures++) {
        rk_alloc_fail_after(failures);
        status = kvstore_create(&small, &store, NULL);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        assert_int_equal(store != NULL, status == RK_OK);
    }
    rk_alloc_fail_after(-1);
    assert_true(failures > 3);
    kvstore_destroy(store);
}

static void put_survives_each_failed_allocation(void **state)
{
    struct kvstore *store = *state;
    int32_t tokens[100] = {0};
    struct kvstore_header header = shard_header(1, 1, 100);
    header.token_ids = tokens;
    header.num_token_ids = 100;
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    for (; status != RK_OK; failures++) {
        struct kvstore_stats stats;
        rk_alloc_fail_after(failures);
        status = shard_put(store, &header);
        rk_alloc_fail_after(-1);
        kvstore_stats_get(store, &stats);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        assert_int_equal(stats.used_bytes, status == RK_OK ? 8 * 4096 : 0);
        assert_int_equal(stats.num_staged, 0);
    }
    assert_true(failures > 8);
    assert_int_equal(shard_read(store, &header), RK_OK);
}

static void wrong_sizes_are_refused(void **state)
{
    (void)state;
    struct kvstore *store = NULL;
    struct rk_error error;
    struct kvstore_options options = {.dram_bytes = 5000};
    assert_int_equal(kvstore_create(&options, &store, &error), RK_ERR_INVALID);
    options.dram_bytes = 0;
    assert_int_equal(kvstore_create(&options, &store, &error), RK_ERR_INVALID);
    assert_null(store);
}

static void the_arena_is_sealed(void **state)
{
    struct kvstore *store = *state;
    int fd = kvstore_arena_fd(store);
    assert_int_equal(ftruncate(fd, 4096), -1);
    assert_int_equal(errno, EPERM);
    assert_int_equal(pwrite(fd, "x", 1, 0), -1);
    assert_ptr_equal(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
}

static void the_least_recently_used_goes_first(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header headers[17];
    for (uint32_t i = 0; i < 16; i++) {
        headers[i] = shard_header(i, 1, 64);
        assert_int_equal(shard_put(store, &headers[i]), RK_OK);
    }
    assert_int_equal(shard_read(store, &headers[0]), RK_OK); /* Now 1 is the oldest. */
    headers[16] = shard_header(16, 1, 64);
    assert_int_equal(shard_put(store, &headers[16]), RK_OK);
    assert_int_equal(shard_read(store, &headers[1]), RK_MISS_EVICTED);
    for (uint32_t i = 0; i < 17; i++) {
        assert_int_equal(shard_read(store, &headers[i]), i == 1 ? RK_MISS_EVICTED : RK_OK);
    }
    struct kvstore_header never = shard_header(99, 1, 64);
    assert_int_equal(shard_read(store, &never), RK_MISS_ABSENT);
}

static void what_is_pinned_stays(void **state)
{
    struct kvstore *store = *state;
    const struct kvstore_shard *pinned = NULL;
    struct kvstore_header keep = shard_header(0, 1, 64 * 8); /* 32 pages of 64 */
    struct kvstore_header large = shard_header(1, 1, 64 * 9);
    struct kvstore_name name = shard_name(&keep);
    struct kvstore_stats stats;
    assert_int_equal(shard_put(store, &keep), RK_OK);
    assert_int_equal(kvstore_pin(store, &name, NULL, &pinned), RK_OK);
    assert_int_equal(shard_put(store, &large), RK_ERR_FULL);
    kvstore_stats_get(store, &stats);
    assert_int_equal(stats.pinned_bytes, 32 * 4096);
    assert_int_equal(stats.num_shards, 1);

    /* Dropped while pinned: gone for new readers, its bytes stay for this one. */
    assert_int_equal(kvstore_drop(store, &name), RK_OK);
    assert_int_equal(shard_read(store, &keep), RK_MISS_ABSENT);
    assert_int_equal(shard_put(store, &large), RK_ERR_FULL);
    uint8_t expected[4096];
    uint64_t offset = 0;
    uint64_t checksum = 0;
    kvstore_shard_page(pinned, 31, &offset, &checksum);
    assert_int_equal(shard_page_fill(&keep, 31, expected), checksum);
    assert_memory_equal((const uint8_t *)kvstore_arena(store) + offset, expected, 4096);
    kvstore_unpin(store, pinned);
    assert_int_equal(shard_put(store, &large), RK_OK);
    kvstore_stats_get(store, &stats);
    assert_int_equal(stats.pinned_bytes, 0);
}

static void a_put_that_cannot_fit_evicts_nothing(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header held = shard_header(0, 1, 64);
    struct kvstore_header huge = shard_header(1, 1, 64 * 17);
    assert_int_equal(shard_put(store, &held), RK_OK);
    assert_int_equal(shard_put(store, &huge), RK_ERR_FULL);
    assert_int_equal(shard_read(store, &held), RK_OK);
}

static void shards_fit_into_fragments(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header headers[16];
    for (uint32_t i = 0; i < 16; i++) {
        headers[i] = shard_header(i, 1, 64);
        assert_int_equal(shard_put(store, &headers[i]), RK_OK);
    }
    for (uint32_t i = 0; i < 16; i += 2) {
        struct kvstore_name name = shard_name(&headers[i]);
        assert_int_equal(kvstore_drop(store, &name), RK_OK);
    }
    struct kvstore_header wide = shard_header(50, 1, 64 * 8); /* All the 8 holes of 4 pages. */
    assert_int_equal(shard_put(store, &wide), RK_OK);
    assert_int_equal(shard_read(store, &wide), RK_OK);
    for (uint32_t i = 1; i < 16; i += 2) {
        assert_int_equal(shard_read(store, &headers[i]), RK_OK);
    }
}

static void removals_are_told_and_a_gap_is_admitted(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_name names[16];
    bool lost = true;
    for (uint32_t i = 0; i < 3; i++) {
        struct kvstore_header header = shard_header(i, 7, 64);
        struct kvstore_name name = shard_name(&header);
        assert_int_equal(shard_put(store, &header), RK_OK);
        assert_int_equal(kvstore_drop(store, &name), RK_OK);
    }
    assert_int_equal(kvstore_removed_take(store, names, 2, &lost), 2);
    assert_false(lost);
    assert_int_equal(kvstore_removed_take(store, names, 16, &lost), 1);
    struct kvstore_header third = shard_header(2, 7, 64);
    assert_true(rk_id_equal(&names[0].segment_id, &third.segment_id));
    for (uint32_t i = 0; i < 10; i++) {
        struct kvstore_header header = shard_header(i, 8, 64);
        struct kvstore_name name = shard_name(&header);
        assert_int_equal(shard_put(store, &header), RK_OK);
        assert_int_equal(kvstore_drop(store, &name), RK_OK);
    }
    assert_int_equal(kvstore_removed_take(store, names, 16, &lost), 8);
    assert_true(lost);
    assert_int_equal(kvstore_removed_take(store, names, 16, &lost), 0);
    assert_false(lost);
}

int main(void)
{
#define WITH_STORE(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(create_survives_each_failed_allocation),
        cmocka_unit_test(wrong_sizes_are_refused),
        WITH_STORE(put_survives_each_failed_allocation),
        WITH_STORE(the_arena_is_sealed),
        WITH_STORE(the_least_recently_used_goes_first),
        WITH_STORE(what_is_pinned_stays),
        WITH_STORE(a_put_that_cannot_fit_evicts_nothing),
        WITH_STORE(shards_fit_into_fragments),
        WITH_STORE(removals_are_told_and_a_gap_is_admitted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
