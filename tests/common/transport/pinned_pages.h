/*
 * Pages that a server of either path serves to a test, with a counting pin. Page p of layer 0,
 * head 0, generation 1 is page p; any other name is a miss.
 */
#ifndef TESTS_COMMON_TRANSPORT_PINNED_PAGES_H
#define TESTS_COMMON_TRANSPORT_PINNED_PAGES_H

#include "common/base/hash.h"
#include "common/transport/transport.h"

#include <stdatomic.h>

struct pinned_pages {
    uint8_t *bytes;
    uint32_t page_bytes;
    uint32_t num_pages;
    enum rk_path path; /* by which they must be asked for */
    atomic_int pins;
};

static inline enum rk_status pinned_pages_pin(void *context, enum rk_path path,
                                              const struct rk_get *get, uint64_t *ret_offsets,
                                              uint64_t *ret_checksums, uint64_t *num_pages,
                                              void **ret_pin, struct rk_error *error)
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
            RK_ASSERT(done < *num_pages);
            ret_offsets[done] = (uint64_t)page * pages->page_bytes;
            ret_checksums[done] = rk_hash_xxh3(pages->bytes + ret_offsets[done], pages->page_bytes);
        }
    }
    *num_pages = done;
    *ret_pin = pages;
    atomic_fetch_add(&pages->pins, 1);
    return RK_OK;
}

static inline void pinned_pages_unpin(void *context, void *pin)
{
    struct pinned_pages *pages = context;
    RK_ASSERT(pin == pages);
    RK_ASSERT(atomic_fetch_sub(&pages->pins, 1) > 0);
}

static const struct rk_transport_store_ops pinned_pages_ops = {.pin = pinned_pages_pin,
                                                               .unpin = pinned_pages_unpin};

#endif
