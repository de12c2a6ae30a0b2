/* What a put over either path must do; the store is that of pinned_pages.h. */
#ifndef TESTS_COMMON_TRANSPORT_PUT_CHECKS_H
#define TESTS_COMMON_TRANSPORT_PUT_CHECKS_H

#include "tests/common/transport/pinned_pages.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#define PUT_WAIT_MS   20000
#define PUT_PAGES_MAX 4096u

/* One item of a put, its pages in memory that nothing else lies beside. */
struct put_item {
    struct pinned_head head;
    uint8_t *bytes;
    const void *pages[PUT_PAGES_MAX];
};

static inline void put_item_make(struct put_item *item, uint64_t bytes, uint32_t page_bytes,
                                 unsigned seed, struct rk_put *ret_put)
{
    uint64_t num_pages = (bytes + page_bytes - 1) / page_bytes;
    assert_true(num_pages <= PUT_PAGES_MAX);
    *item = (struct put_item){.head = {.bytes = bytes, .page_bytes = page_bytes}};
    item->bytes = rk_alloc(bytes);
    assert_non_null(item->bytes);
    for (uint64_t i = 0; i < bytes; i++) {
        item->bytes[i] = (uint8_t)(i * 7 + i / 300 + seed);
    }
    for (uint64_t i = 0; i < num_pages; i++) {
        item->pages[i] = item->bytes + i * page_bytes;
    }
    *ret_put = (struct rk_put){.head = &item->head,
                               .head_bytes = sizeof(item->head),
                               .pages = item->pages,
                               .num_pages = num_pages,
                               .page_bytes = page_bytes,
                               .bytes = bytes};
}

/* Sizes about the frames' ends, many small ones and a large one, all at once and one by one. */
static inline void puts_arrive_whole(struct rk_transport *transport, struct pinned_pages *store)
{
    static const uint64_t sizes[] = {1,      4096,   65535,  65536,   65537,
                                     131072, 131073, 524289, 3000001, 70};
    enum { COUNT = sizeof(sizes) / sizeof(sizes[0]) };
    static struct put_item items[COUNT];
    struct rk_put puts[COUNT];
    struct rk_error error = {.text = ""};
    for (unsigned i = 0; i < COUNT; i++) {
        put_item_make(&items[i], sizes[i], i % 2 ? 65536 : 5000, i, &puts[i]);
    }
    int before = atomic_load(&store->ended);
    assert_int_equal(
        rk_transport_put(transport, puts, COUNT, rk_deadline_in_ms(PUT_WAIT_MS), &error), RK_OK);
    for (unsigned i = 0; i < COUNT; i++) {
        assert_int_equal(puts[i].status, RK_OK);
    }
    assert_int_equal(atomic_load(&store->ended), before + COUNT);
    for (unsigned i = 0; i < COUNT; i++) {
        assert_int_equal(
            rk_transport_put(transport, &puts[i], 1, rk_deadline_in_ms(PUT_WAIT_MS), &error),
            RK_OK);
        assert_int_equal(puts[i].status, RK_OK);
        assert_int_equal(store->put_sum, rk_hash_xxh3(items[i].bytes, sizes[i]));
        rk_free(items[i].bytes);
    }
    assert_int_equal(atomic_load(&store->puts), 0);
}

static inline void a_failed_item_hurts_no_other(struct rk_transport *transport,
                                                struct pinned_pages *store)
{
    static struct put_item items[5];
    struct rk_put puts[5];
    uint64_t checksums[3];
    struct rk_error error = {.text = ""};
    for (unsigned i = 0; i < 5; i++) {
        put_item_make(&items[i], 150000, 65536, i, &puts[i]);
    }
    items[1].head.begin = RK_ERR_FULL;
    items[2].head.end = RK_ERR_EXISTS;
    for (unsigned i = 0; i < 3; i++) { /* Of which the middle one is wrong. */
        checksums[i] =
            rk_hash_xxh3(items[3].pages[i], i < 2 ? 65536 : 150000 - 2 * 65536) ^ (i == 1);
    }
    puts[3].checksums = checksums;
    int before = atomic_load(&store->ended);
    assert_int_equal(rk_transport_put(transport, puts, 5, rk_deadline_in_ms(PUT_WAIT_MS), &error),
                     RK_OK);
    assert_int_equal(puts[0].status, RK_OK);
    assert_int_equal(puts[1].status, RK_ERR_FULL);
    assert_int_equal(puts[2].status, RK_ERR_EXISTS);
    assert_int_equal(puts[3].status, RK_ERR_CORRUPT);
    assert_int_equal(puts[4].status, RK_OK);
    assert_string_equal(error.text, "refused at its begin");
    assert_int_equal(atomic_load(&store->ended), before + 2);
    assert_int_equal(atomic_load(&store->puts), 0);
    /* Where the next item's bytes begin is not known: the whole put fails, the connection stays. */
    items[0].head.bytes = 0;
    assert_int_equal(rk_transport_put(transport, puts, 2, rk_deadline_in_ms(PUT_WAIT_MS), &error),
                     RK_OK);
    assert_true(puts[0].status != RK_OK && puts[1].status != RK_OK);
    items[0].head.bytes = 150000;
    assert_int_equal(rk_transport_put(transport, puts, 1, rk_deadline_in_ms(PUT_WAIT_MS), &error),
                     RK_OK);
    assert_int_equal(puts[0].status, RK_OK);
    for (unsigned i = 0; i < 5; i++) {
        rk_free(items[i].bytes);
    }
    assert_int_equal(atomic_load(&store->puts), 0);
}

#endif
