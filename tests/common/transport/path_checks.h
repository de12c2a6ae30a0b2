/* What gets and puts must do over either path; the store is that of pinned_pages.h. */
#ifndef TESTS_COMMON_TRANSPORT_PATH_CHECKS_H
#define TESTS_COMMON_TRANSPORT_PATH_CHECKS_H

#include "tests/common/transport/one_get.h"
#include "tests/common/transport/pinned_pages.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#define PATH_WAIT_MS  20000
#define PUT_PAGES_MAX 4096u

/* ---- Gets ---- */

static inline struct rk_get path_get_of(const struct pinned_pages *store,
                                        const struct rk_extent *extents, size_t num_extents)
{
    return (struct rk_get){.generation = 1,
                           .page_bytes = store->page_bytes,
                           .extents = extents,
                           .num_extents = num_extents,
                           .verify = true};
}

static inline void a_batch_is_one_answer(struct rk_transport *reader, struct pinned_pages *store)
{
    const struct rk_extent some[] = {{0, 0, 5, 9}, {0, 0, 1, 2}};
    const struct rk_extent outside = {7, 0, 0, 1};
    size_t page_bytes = store->page_bytes;
    uint8_t *buffer = rk_alloc(5 * page_bytes + 1);
    struct rk_get gets[4];
    struct rk_pages pages[4];
    struct rk_error error = {.text = ""};
    assert_non_null(buffer);
    for (int i = 0; i < 4; i++) {
        gets[i] = path_get_of(store, some, 2);
    }
    gets[1].extents = &outside;
    gets[1].num_extents = 1;
    gets[2].buffer = buffer + 1; /* Misaligned, as buffers may be. */
    gets[3].generation = 9;
    assert_int_equal(
        rk_transport_get(reader, gets, 4,
                         &(struct rk_until){rk_deadline_in_ms(PATH_WAIT_MS), NULL, NULL}, pages,
                         &error),
        RK_OK);
    assert_int_equal(pages[0].status, RK_OK);
    assert_int_equal(pages[1].status, RK_ERR_INVALID);
    assert_int_equal(pages[2].status, RK_OK);
    assert_int_equal(pages[3].status, RK_MISS_STALE_GENERATION);
    assert_string_equal(error.text, "extent 0 is outside");
    for (int i = 0; i < 3; i += 2) {
        assert_int_equal(pages[i].num_pages, 5);
        assert_memory_equal(pages[i].pages[0].data, store->bytes + 5 * page_bytes, page_bytes);
        assert_memory_equal(pages[i].pages[4].data, store->bytes + page_bytes, page_bytes);
    }
    assert_ptr_equal(pages[2].pages[0].data, buffer + 1);
    rk_transport_release(reader, pages, 4);
    gets[0].page_bytes = 0; /* A value has no extents: our own mistake is refused here. */
    assert_int_equal(
        rk_transport_get(reader, gets, 1,
                         &(struct rk_until){rk_deadline_in_ms(PATH_WAIT_MS), NULL, NULL}, pages,
                         &error),
        RK_ERR_INVALID);
    assert_int_equal(
        rk_transport_get(reader, gets, RK_TRANSPORT_ITEMS_MAX + 1,
                         &(struct rk_until){rk_deadline_in_ms(PATH_WAIT_MS), NULL, NULL}, pages,
                         &error),
        RK_ERR_INVALID);
    rk_free(buffer);
}

static inline void damage_on_the_way_is_a_miss(struct rk_transport *reader,
                                               struct pinned_pages *store)
{
    const struct rk_extent all = {0, 0, 0, store->num_pages};
    struct rk_get get = path_get_of(store, &all, 1);
    struct rk_pages pages;
    assert_int_equal(get_one(reader, &get, PATH_WAIT_MS, &pages, NULL), RK_OK);
    rk_transport_release(reader, &pages, 1);
    store->sum_flip = 1; /* The last page's checksum is another one. */
    assert_int_equal(get_one(reader, &get, PATH_WAIT_MS, &pages, NULL), RK_MISS_CHECKSUM);
    assert_null(pages.pages);
    store->sum_flip = 0;
}

/* A store that answers about another item than was asked, its checksums all good, is not believed,
 * and its connection is not used again. */
static inline void another_answer_is_refused(struct rk_transport *reader,
                                             struct pinned_pages *store, bool generation)
{
    const struct rk_extent all = {0, 0, 0, store->num_pages};
    struct rk_get get = path_get_of(store, &all, 1);
    struct rk_pages pages;
    assert_int_equal(get_one(reader, &get, PATH_WAIT_MS, &pages, NULL), RK_OK);
    assert_int_equal(pages.generation, 1);
    rk_transport_release(reader, &pages, 1);
    store->id_flip = !generation;
    store->generation_add = generation;
    assert_int_equal(get_one(reader, &get, PATH_WAIT_MS, &pages, NULL), RK_ERR_UNAVAILABLE);
    store->id_flip = 0;
    store->generation_add = 0;
    assert_int_equal(get_one(reader, &get, PATH_WAIT_MS, &pages, NULL), RK_ERR_UNAVAILABLE);
}

/* Connects to where store-2, incarnation 5, serves, in the belief that it is somebody. */
static inline enum rk_status connect_to(struct rk_transport_endpoint endpoint, enum rk_path path,
                                        const char *node_id, uint64_t incarnation,
                                        struct rk_error *error)
{
    struct rk_transport *transport = NULL;
    endpoint.node_id = node_id;
    endpoint.incarnation = incarnation;
    enum rk_status status = rk_transport_connect(&endpoint, path, PATH_WAIT_MS, &transport, error);
    rk_transport_destroy(transport);
    return status;
}

static inline void another_store_is_refused(const struct rk_transport_endpoint *endpoint,
                                            enum rk_path path)
{
    struct rk_error error = {.text = ""};
    assert_int_equal(connect_to(*endpoint, path, NULL, 0, &error), RK_OK);
    assert_int_equal(connect_to(*endpoint, path, "store-2", 5, &error), RK_OK);
    assert_int_equal(connect_to(*endpoint, path, "store-2", 0, &error), RK_OK);
    assert_int_equal(connect_to(*endpoint, path, "", 5, &error), RK_OK);
    assert_int_equal(connect_to(*endpoint, path, "store-1", 5, &error), RK_ERR_UNAVAILABLE);
    assert_non_null(strstr(error.text, "this is store-2, not store-1"));
    assert_int_equal(connect_to(*endpoint, path, "store-2", 6, &error), RK_ERR_UNAVAILABLE);
    assert_non_null(strstr(error.text, "started anew"));
}

/* ---- Puts ---- */

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
        rk_transport_put(transport, puts, COUNT,
                         &(struct rk_until){rk_deadline_in_ms(PATH_WAIT_MS), NULL, NULL}, &error),
        RK_OK);
    for (unsigned i = 0; i < COUNT; i++) {
        assert_int_equal(puts[i].status, RK_OK);
    }
    assert_int_equal(atomic_load(&store->ended), before + COUNT);
    for (unsigned i = 0; i < COUNT; i++) {
        assert_int_equal(
            rk_transport_put(transport, &puts[i], 1,
                             &(struct rk_until){rk_deadline_in_ms(PATH_WAIT_MS), NULL, NULL},
                             &error),
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
    assert_int_equal(
        rk_transport_put(transport, puts, 5,
                         &(struct rk_until){rk_deadline_in_ms(PATH_WAIT_MS), NULL, NULL}, &error),
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
    assert_int_equal(
        rk_transport_put(transport, puts, 2,
                         &(struct rk_until){rk_deadline_in_ms(PATH_WAIT_MS), NULL, NULL}, &error),
        RK_OK);
    assert_true(puts[0].status != RK_OK && puts[1].status != RK_OK);
    items[0].head.bytes = 150000;
    assert_int_equal(
        rk_transport_put(transport, puts, 1,
                         &(struct rk_until){rk_deadline_in_ms(PATH_WAIT_MS), NULL, NULL}, &error),
        RK_OK);
    assert_int_equal(puts[0].status, RK_OK);
    for (unsigned i = 0; i < 5; i++) {
        rk_free(items[i].bytes);
    }
    assert_int_equal(atomic_load(&store->puts), 0);
}

#endif
