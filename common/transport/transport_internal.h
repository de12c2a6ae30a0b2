/*
 * The table of paths: a row per path. A path's own state begins where
 * its functions say; transport.c checks what all share.
 */
#ifndef RK_COMMON_TRANSPORT_TRANSPORT_INTERNAL_H
#define RK_COMMON_TRANSPORT_TRANSPORT_INTERNAL_H

#include "common/transport/transport.h"

struct transport_ops {
    enum rk_path path;
    const char *name;
    /* False: no use to try, such as another host's shared memory. */
    bool (*reachable)(const struct rk_transport_endpoint *endpoint);
    enum rk_status (*connect)(const struct rk_transport_endpoint *endpoint,
                              const struct rk_until *until, void **ret_connection,
                              struct rk_error *error);
    /* Fills the zeroed pages; what it leaves there with an error is released by transport.c. */
    enum rk_status (*get)(void *connection, const struct rk_get *gets, size_t num_gets,
                          const struct rk_until *until, struct rk_pages *pages,
                          struct rk_error *error);
    /* Of what has a hold; the pages' arrays are freed by transport.c. */
    void (*release)(void *connection, struct rk_pages *pages, size_t num_pages);
    enum rk_status (*put)(void *connection, struct rk_put *puts, size_t num_puts,
                          const struct rk_until *until, struct rk_error *error);
    void (*destroy)(void *connection);
    bool (*flush)(void *connection); /* NULL: nothing is ever left */
    /* NULL: its pages are copies. Any thread. */
    bool (*alive)(const void *connection);
};

/* A store that does not take a connection in time is as good as none: RK_ERR_UNAVAILABLE, unless
 * the caller gave up. */
static inline enum rk_status transport_silent(const struct rk_until *until)
{
    return rk_until_over(until) == RK_ERR_CANCELLED ? RK_ERR_CANCELLED : RK_ERR_UNAVAILABLE;
}

/* RK_ERR_UNAVAILABLE: another one than was looked for answers. Unknown ("" and 0) fits all. */
enum rk_status transport_identity_check(const char *wanted_id, uint64_t wanted_incarnation,
                                        const char *node_id, uint64_t incarnation,
                                        struct rk_error *error);

extern const struct transport_ops transport_shm;
extern const struct transport_ops transport_ucx;
extern const struct transport_ops transport_grpc;

/* ---- Bytes on their way into items' memory, in order (arrival.c) ---- */

/*
 * The bytes of all items that were found come back to back. Each item lies in its reader's buffer
 * or in one of the transport's (arrival_buffer_give takes it back). Pages are verified as they
 * become whole, if that was asked.
 */
struct arrival {
    const struct rk_get *gets;
    struct rk_pages *pages;
    size_t num_items;
    size_t item; /* whose bytes are next */
    uint64_t item_done;
    uint64_t done;
    uint64_t total; /* of all items that were found */
};

/* Of a path's own; kept between gets, for fresh memory must be cleared by the kernel first. */
struct arrival_buffers {
    struct arrival_buffer *spare;
};

/* Gives each found item its memory and its pages' places. RK_ERR_NO_MEMORY. */
enum rk_status arrival_begin(struct arrival *arrival, struct arrival_buffers *buffers,
                             const struct rk_get *gets, struct rk_pages *pages, size_t num_items,
                             struct rk_error *error);
/* False: more bytes than were announced. */
bool arrival_take(struct arrival *arrival, const void *data, size_t bytes);
/* The next bytes come by themselves, to the place that is returned; NULL: they are not whole pages
 * of one item. arrival_placed, with the same range, when they are there. */
struct arrival_range {
    size_t item;
    uint64_t page_begin;
    uint64_t page_end;
};
void *arrival_reserve(struct arrival *arrival, size_t bytes, struct arrival_range *ret_range);
void arrival_placed(struct arrival *arrival, const struct arrival_range *range);
void arrival_release(struct arrival_buffers *buffers, struct rk_pages *pages, size_t num_pages);
void arrival_buffers_destroy(struct arrival_buffers *buffers);

#endif
