/* An arena with a counting pin behind a UCX server, for test_ucx.c and its peer process. */
#ifndef TESTS_COMMON_TRANSPORT_UCX_ARENA_H
#define TESTS_COMMON_TRANSPORT_UCX_ARENA_H

#include "common/transport/transport.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"

#include <stdatomic.h>

#define PAGE_BYTES  16384u
#define NUM_PAGES   1024u
#define CONNECTIONS 8

/* Page p of layer 0, head 0 is page p of the arena; any other name is a miss. */
struct arena {
    uint8_t *bytes;
    atomic_int pins;
    struct rk_ucx_server *server;
};

static inline enum rk_status arena_pin(void *context, enum rk_path path, const struct rk_get *get,
                                       uint64_t *ret_offsets, uint64_t *ret_checksums,
                                       uint64_t *num_pages, void **ret_pin, struct rk_error *error)
{
    struct arena *arena = context;
    uint64_t done = 0;
    RK_ASSERT(path == RK_PATH_UCX);
    if (get->generation != 1) {
        return RK_MISS_STALE_GENERATION;
    }
    if (get->page_bytes != PAGE_BYTES) {
        return RK_MISS_FINGERPRINT;
    }
    for (size_t i = 0; i < get->num_extents; i++) {
        if (get->extents[i].layer != 0 || get->extents[i].page_end > NUM_PAGES) {
            return rk_error_set(error, RK_ERR_INVALID, "extent %zu is outside", i);
        }
        for (uint32_t page = get->extents[i].page_begin; page < get->extents[i].page_end; page++) {
            RK_ASSERT(done < *num_pages);
            ret_offsets[done] = (uint64_t)page * PAGE_BYTES;
            ret_checksums[done] = rk_hash_xxh3(arena->bytes + ret_offsets[done], PAGE_BYTES);
            done++;
        }
    }
    *num_pages = done;
    *ret_pin = arena;
    atomic_fetch_add(&arena->pins, 1);
    return RK_OK;
}

static inline void arena_unpin(void *context, void *pin)
{
    struct arena *arena = context;
    RK_ASSERT(pin == arena);
    RK_ASSERT(atomic_fetch_sub(&arena->pins, 1) > 0);
}

static const struct rk_transport_store_ops arena_ops = {.pin = arena_pin, .unpin = arena_unpin};

static inline enum rk_status arena_serve(struct arena *arena, struct rk_error *error)
{
    arena->bytes = rk_alloc(NUM_PAGES * PAGE_BYTES);
    RK_ASSERT(arena->bytes != NULL);
    for (size_t i = 0; i < NUM_PAGES * PAGE_BYTES; i++) {
        arena->bytes[i] = (uint8_t)(i * 31 + i / PAGE_BYTES);
    }
    const struct rk_ucx_server_options options = {.listen = "127.0.0.1:0",
                                                  .arena = arena->bytes,
                                                  .connections_max = CONNECTIONS,
                                                  .ops = &arena_ops,
                                                  .context = arena};
    return rk_ucx_server_start(&options, &arena->server, error);
}

#endif
