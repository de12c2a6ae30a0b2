/* An arena with a counting pin behind a UCX server, for test_ucx.c and its peer process. */
#ifndef TESTS_COMMON_TRANSPORT_UCX_ARENA_H
#define TESTS_COMMON_TRANSPORT_UCX_ARENA_H

#include "common/base/alloc.h"
#include "tests/common/transport/pinned_pages.h"

#define PAGE_BYTES  16384u
#define NUM_PAGES   1024u
#define CONNECTIONS 8

struct arena {
    struct pinned_pages pages;
    struct rk_ucx_server *server;
};

static inline enum rk_status arena_serve(struct arena *arena, bool rendezvous,
                                         struct rk_error *error)
{
    arena->pages.page_bytes = PAGE_BYTES;
    arena->pages.num_pages = NUM_PAGES;
    arena->pages.path = RK_PATH_UCX;
    arena->pages.bytes = rk_alloc(NUM_PAGES * PAGE_BYTES);
    RK_ASSERT(arena->pages.bytes != NULL);
    for (size_t i = 0; i < NUM_PAGES * PAGE_BYTES; i++) {
        arena->pages.bytes[i] = (uint8_t)(i * 31 + i / PAGE_BYTES);
    }
    const struct rk_ucx_server_options options = {.listen = "127.0.0.1:0",
                                                  .arena = arena->pages.bytes,
                                                  .connections_max = CONNECTIONS,
                                                  .rendezvous = rendezvous,
                                                  .node_id = "store-2",
                                                  .incarnation = 5,
                                                  .ops = &pinned_pages_ops,
                                                  .context = &arena->pages};
    return rk_ucx_server_start(&options, &arena->server, error);
}

#endif
