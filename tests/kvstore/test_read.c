/*
 * Goal:   extents by global indices give just their pages; damage is found.
 * Method: a shard of part of the heads, all its page numbers known; one flipped
 *         byte for the scrubber. A stress of readers, writers, eviction and the
 *         scrubber lets the sanitizers see every pair of paths together.
 */
#include "tests/kvstore/shard_support.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static int set_up(void **state)
{
    const struct kvstore_options options = {.dram_bytes = 256 * 4096};
    struct kvstore *store = NULL;
    assert_int_equal(kvstore_create(&options, &store, NULL), RK_OK);
    *state = store;
    return 0;
}

static int tear_down(void **state)
{
    kvstore_destroy(*state);
    return 0;
}

/* Layers 3 and 4, heads 2 and 3 of 8 x 6; 3 pages a head: head h of layer l begins at page
 * ((l - 3) * 2 + (h - 2)) * 3. */
static struct kvstore_header part_header(void)
{
    struct kvstore_header header = shard_header(1, 1, 150);
    header.layout.num_layers = 8;
    header.layout.num_kv_heads = 6;
    header.heads = (struct rk_head_range){
        .layer_begin = 3, .layer_end = 5, .kv_head_begin = 2, .kv_head_end = 4};
    return header;
}

static void extents_give_their_pages(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header header = part_header();
    struct kvstore_name name = shard_name(&header);
    const struct kvstore_shard *shard = NULL;
    uint64_t offsets[16];
    uint64_t sums[16];
    uint64_t num = 16;
    uint8_t page[4096];
    const struct rk_extent extents[] = {{4, 3, 1, 3}, {3, 2, 0, 1}, {4, 2, 2, 3}};
    const uint64_t expected[] = {10, 11, 0, 8};
    assert_int_equal(shard_put(store, &header), RK_OK);
    assert_int_equal(kvstore_pin(store, &name, NULL, &shard), RK_OK);
    assert_int_equal(kvstore_shard_extents(shard, extents, 3, offsets, sums, &num, NULL), RK_OK);
    assert_int_equal(num, 4);
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(sums[i], shard_page_fill(&header, expected[i], page));
        assert_memory_equal((const uint8_t *)kvstore_arena(store) + offsets[i], page, 4096);
    }
    num = 16;
    assert_int_equal(kvstore_shard_extents(shard, NULL, 0, offsets, sums, &num, NULL), RK_OK);
    assert_int_equal(num, 12);
    num = 3;
    assert_int_equal(kvstore_shard_extents(shard, extents, 3, offsets, sums, &num, NULL),
                     RK_ERR_TOO_LONG);
    num = 11;
    assert_int_equal(kvstore_shard_extents(shard, NULL, 0, offsets, sums, &num, NULL),
                     RK_ERR_TOO_LONG);
    kvstore_unpin(store, shard);
}

static void extents_outside_are_refused(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header header = part_header();
    struct kvstore_name name = shard_name(&header);
    const struct kvstore_shard *shard = NULL;
    uint64_t offsets[16];
    uint64_t sums[16];
    const struct rk_extent wrong[] = {
        {2, 2, 0, 1}, {5, 2, 0, 1}, {3, 1, 0, 1},          {3, 4, 0, 1},          {3, 2, 0, 4},
        {3, 2, 1, 1}, {3, 2, 2, 1}, {3, 2, 3, UINT32_MAX}, {UINT32_MAX, 2, 0, 1}, {0, 0, 0, 1},
    };
    assert_int_equal(shard_put(store, &header), RK_OK);
    assert_int_equal(kvstore_pin(store, &name, NULL, &shard), RK_OK);
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        uint64_t num = 16;
        assert_int_equal(kvstore_shard_extents(shard, &wrong[i], 1, offsets, sums, &num, NULL),
                         RK_ERR_INVALID);
    }
    kvstore_unpin(store, shard);
}

static void descriptions_carry_tokens_and_label(void **state)
{
    struct kvstore *store = *state;
    int32_t tokens[64];
    struct kvstore_header *copy = NULL;
    struct kvstore_name *names = NULL;
    size_t num_names = 0;
    struct kvstore_header header = shard_header(1, 9, 64);
    for (int i = 0; i < 64; i++) {
        tokens[i] = i * 3;
    }
    header.token_ids = tokens;
    header.num_token_ids = 64;
    assert_int_equal(shard_put(store, &header), RK_OK);
    assert_int_equal(kvstore_list(store, &names, &num_names), RK_OK);
    assert_int_equal(num_names, 1);
    assert_int_equal(kvstore_describe(store, &names[0], &copy), RK_OK);
    assert_string_equal(copy->label, "a label");
    assert_memory_equal(copy->token_ids, tokens, sizeof(tokens));
    names[0].generation = 8;
    rk_free(copy);
    assert_int_equal(kvstore_describe(store, &names[0], &copy), RK_ERR_NOT_FOUND);
    rk_free(names);
}

static void the_scrubber_drops_a_damaged_shard(void **state)
{
    struct kvstore *store = *state;
    struct kvstore_header bad = shard_header(1, 1, 64);
    struct kvstore_header good = shard_header(2, 1, 64);
    struct kvstore_name hit;
    struct kvstore_name names[4];
    struct kvstore_stats stats;
    uint64_t offset = 0;
    bool lost = false;
    assert_int_equal(kvstore_fault_inject(store, &hit, &offset), RK_ERR_NOT_FOUND);
    assert_int_equal(kvstore_scrub(store, 1 << 20), 0);
    assert_int_equal(shard_put(store, &bad), RK_OK);
    assert_int_equal(shard_put(store, &good), RK_OK);
    assert_int_equal(kvstore_scrub(store, 8 * 4096), 8 * 4096);
    kvstore_stats_get(store, &stats);
    assert_int_equal(stats.num_shards, 2);
    assert_int_equal(kvstore_fault_inject(store, &hit, &offset), RK_OK);
    assert_true(rk_id_equal(&hit.segment_id, &bad.segment_id));
    kvstore_scrub(store, 8 * 4096);
    kvstore_stats_get(store, &stats);
    assert_int_equal(stats.num_shards, 1);
    assert_int_equal(stats.checksum_failures, 1);
    assert_int_equal(shard_read(store, &bad), RK_MISS_ABSENT);
    assert_int_equal(shard_read(store, &good), RK_OK);
    assert_int_equal(kvstore_removed_take(store, names, 4, &lost), 1);
}

/* ---- Stress ---- */

#define STRESS_MS       2000
#define STRESS_SEGMENTS 40 /* up to 16 pages each: several times the arena */

struct stress {
    struct kvstore *store;
    atomic_bool stop;
    atomic_ulong reads;
    atomic_ulong writes;
};

static struct kvstore_header stress_header(unsigned number)
{
    return shard_header(number, 1, 64 * (1 + number % 4));
}

static void *stress_reader(void *context)
{
    struct stress *stress = context;
    unsigned random = (unsigned)(uintptr_t)&random;
    while (!atomic_load(&stress->stop)) {
        struct kvstore_header header = stress_header((unsigned)rand_r(&random) % STRESS_SEGMENTS);
        /* shard_read compares every byte while it holds the pin. */
        enum rk_status status = shard_read(stress->store, &header);
        RK_ASSERT(status == RK_OK || rk_status_is_miss(status));
        atomic_fetch_add(&stress->reads, status == RK_OK);
    }
    return NULL;
}

static void *stress_writer(void *context)
{
    struct stress *stress = context;
    unsigned random = (unsigned)(uintptr_t)&random;
    while (!atomic_load(&stress->stop)) {
        struct kvstore_header header = stress_header((unsigned)rand_r(&random) % STRESS_SEGMENTS);
        struct kvstore_name name = shard_name(&header);
        enum rk_status status = shard_put(stress->store, &header);
        RK_ASSERT(status == RK_OK || status == RK_ERR_EXISTS || status == RK_ERR_BUSY ||
                  status == RK_ERR_FULL || status == RK_ERR_CANCELLED ||
                  status == RK_ERR_NOT_FOUND);
        atomic_fetch_add(&stress->writes, status == RK_OK);
        if (rand_r(&random) % 8 == 0) {
            status = kvstore_drop(stress->store, &name);
            RK_ASSERT(status == RK_OK || status == RK_ERR_NOT_FOUND);
        }
    }
    return NULL;
}

static void readers_and_writers_agree(void **state)
{
    struct stress stress = {.store = *state};
    pthread_t threads[6];
    for (size_t i = 0; i < 6; i++) {
        void *(*entry)(void *) = i < 4 ? stress_reader : stress_writer;
        assert_int_equal(pthread_create(&threads[i], NULL, entry, &stress), 0);
    }
    int64_t end_ns = rk_deadline_in_ms(STRESS_MS);
    while (rk_deadline_left_ms(end_ns) > 0) {
        struct kvstore_name names[64];
        bool lost = false;
        kvstore_scrub(stress.store, 64 * 4096);
        kvstore_collect(stress.store, rk_clock_ns());
        kvstore_removed_take(stress.store, names, 64, &lost);
        rk_clock_sleep_ms(1);
    }
    atomic_store(&stress.stop, true);
    for (size_t i = 0; i < 6; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    }
    struct kvstore_stats stats;
    kvstore_stats_get(stress.store, &stats);
    print_message("%lu reads, %lu writes, %llu evictions\n", atomic_load(&stress.reads),
                  atomic_load(&stress.writes), (unsigned long long)stats.evictions);
    assert_true(atomic_load(&stress.reads) > 0 && atomic_load(&stress.writes) > 0);
    assert_true(stats.evictions > 0);
    assert_int_equal(stats.checksum_failures, 0);
    assert_int_equal(stats.num_pins, 0);
    assert_int_equal(stats.pinned_bytes, 0);
    assert_int_equal(stats.num_staged, 0);
}

int main(void)
{
#define WITH_STORE(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        WITH_STORE(extents_give_their_pages),
        WITH_STORE(extents_outside_are_refused),
        WITH_STORE(descriptions_carry_tokens_and_label),
        WITH_STORE(the_scrubber_drops_a_damaged_shard),
        WITH_STORE(readers_and_writers_agree),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
