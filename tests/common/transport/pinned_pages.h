/*
 * A store for the tests of both paths, with counters. Page p of layer 0, head 0, generation 1 is
 * page p; any other name is a miss. What is put is kept in one place and checked as it comes.
 */
#ifndef TESTS_COMMON_TRANSPORT_PINNED_PAGES_H
#define TESTS_COMMON_TRANSPORT_PINNED_PAGES_H

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/transport/transport.h"

#include <stdatomic.h>
#include <string.h>

struct pinned_pages {
    uint8_t *bytes;
    uint32_t page_bytes;
    uint32_t num_pages;
    enum rk_path path; /* by which they must be asked for */
    atomic_int pins;
    /* It says that it found another item. */
    uint8_t id_flip;
    uint64_t generation_add;
    uint64_t sum_flip; /* damages the checksum of the last page that is read */
    atomic_int puts;   /* begun and not destroyed */
    atomic_int ended;  /* puts that came to their end */
    uint64_t put_sum;  /* of the bytes of the last one that ended */
};

/* A put's head: how long it is, and at what it fails. */
struct pinned_head {
    uint64_t bytes;
    uint32_t page_bytes;
    enum rk_status begin;
    enum rk_status end;
};

struct pinned_put {
    struct pinned_head head;
    uint64_t done;
    uint8_t *bytes;
};

static inline enum rk_status pinned_pages_pin(void *context, enum rk_path path,
                                              const struct rk_get *get, uint64_t pages_max,
                                              uint64_t *ret_offsets, uint64_t *ret_checksums,
                                              struct rk_found *ret_found, struct rk_error *error)
{
    struct pinned_pages *pages = context;
    uint64_t done = 0;
    RK_ASSERT(path == pages->path);
    if (get->generation != 1) {
        return RK_MISS_STALE_GENERATION;
    }
    if (get->page_bytes != pages->page_bytes) {
        return RK_MISS_FINGERPRINT;
    }
    for (size_t i = 0; i < get->num_extents; i++) {
        const struct rk_extent *extent = &get->extents[i];
        if (extent->layer != 0 || extent->page_end > pages->num_pages) {
            return rk_error_set(error, RK_ERR_INVALID, "extent %zu is outside", i);
        }
        for (uint32_t page = extent->page_begin; page < extent->page_end; page++, done++) {
            if (done == pages_max) {
                return rk_error_set(error, RK_ERR_TOO_LONG, "too many pages");
            }
            ret_offsets[done] = (uint64_t)page * pages->page_bytes;
            ret_checksums[done] = rk_hash_xxh3(pages->bytes + ret_offsets[done], pages->page_bytes);
        }
    }
    ret_checksums[done - 1] ^= pages->sum_flip;
    struct rk_id id = get->id;
    id.bytes[5] ^= pages->id_flip;
    *ret_found = (struct rk_found){.pin = pages,
                                   .id = id,
                                   .generation = get->generation + pages->generation_add,
                                   .num_pages = done,
                                   .page_bytes = pages->page_bytes,
                                   .bytes = done * pages->page_bytes,
                                   .tier = RK_TIER_DRAM};
    atomic_fetch_add(&pages->pins, 1);
    return RK_OK;
}

static inline void pinned_pages_unpin(void *context, void *pin)
{
    struct pinned_pages *pages = context;
    RK_ASSERT(pin == pages);
    RK_ASSERT(atomic_fetch_sub(&pages->pins, 1) > 0);
}

static inline enum rk_status pinned_pages_put_begin(void *context, enum rk_path path,
                                                    const void *head, size_t head_bytes,
                                                    void **ret_put, uint64_t *ret_bytes,
                                                    uint32_t *ret_page_bytes,
                                                    struct rk_error *error)
{
    struct pinned_pages *pages = context;
    struct pinned_head asked;
    RK_ASSERT(path == pages->path);
    if (head_bytes != sizeof(asked)) {
        return rk_error_set(error, RK_ERR_INVALID, "no head");
    }
    memcpy(&asked, head, sizeof(asked));
    *ret_bytes = asked.bytes;
    *ret_page_bytes = asked.page_bytes;
    if (asked.bytes == 0) {
        return rk_error_set(error, RK_ERR_INVALID, "nothing to put");
    }
    if (asked.begin != RK_OK) {
        return rk_error_set(error, asked.begin, "refused at its begin");
    }
    struct pinned_put *put = rk_alloc_zero(1, sizeof(*put));
    RK_ASSERT(put != NULL);
    put->head = asked;
    put->bytes = rk_alloc(asked.bytes);
    RK_ASSERT(put->bytes != NULL);
    atomic_fetch_add(&pages->puts, 1);
    *ret_put = put;
    return RK_OK;
}

static inline enum rk_status pinned_pages_put_write(void *context, void *handle, const void *data,
                                                    size_t bytes, const uint64_t *checksums,
                                                    size_t num_checksums, struct rk_error *error)
{
    struct pinned_put *put = handle;
    (void)context;
    RK_ASSERT(bytes <= put->head.bytes - put->done);
    memcpy(put->bytes + put->done, data, bytes);
    uint64_t page = put->done / put->head.page_bytes;
    put->done += bytes;
    for (size_t i = 0; i < num_checksums; i++, page++) {
        uint64_t begin = page * put->head.page_bytes;
        uint64_t left = put->head.bytes - begin;
        size_t length = left < put->head.page_bytes ? (size_t)left : put->head.page_bytes;
        RK_ASSERT(begin + length <= put->done);
        if (rk_hash_xxh3(put->bytes + begin, length) != checksums[i]) {
            return rk_error_set(error, RK_ERR_CORRUPT, "page %llu", (unsigned long long)page);
        }
    }
    return RK_OK;
}

static inline enum rk_status pinned_pages_put_end(void *context, void *handle,
                                                  struct rk_error *error)
{
    struct pinned_pages *pages = context;
    struct pinned_put *put = handle;
    RK_ASSERT(put->done == put->head.bytes);
    if (put->head.end != RK_OK) {
        return rk_error_set(error, put->head.end, "refused at its end");
    }
    pages->put_sum = rk_hash_xxh3(put->bytes, put->head.bytes);
    atomic_fetch_add(&pages->ended, 1);
    return RK_OK;
}

static inline void pinned_pages_put_destroy(void *context, void *handle)
{
    struct pinned_pages *pages = context;
    struct pinned_put *put = handle;
    rk_free(put->bytes);
    rk_free(put);
    RK_ASSERT(atomic_fetch_sub(&pages->puts, 1) > 0);
}

static const struct rk_transport_store_ops pinned_pages_ops = {.pin = pinned_pages_pin,
                                                               .unpin = pinned_pages_unpin,
                                                               .put_begin = pinned_pages_put_begin,
                                                               .put_write = pinned_pages_put_write,
                                                               .put_end = pinned_pages_put_end,
                                                               .put_destroy =
                                                                   pinned_pages_put_destroy};

#endif
