/*
 * The table of read paths: a row per path. A path's own state begins where
 * its functions say; transport.c keeps what all share.
 */
#ifndef RK_COMMON_TRANSPORT_TRANSPORT_INTERNAL_H
#define RK_COMMON_TRANSPORT_TRANSPORT_INTERNAL_H

#include "common/transport/transport.h"

struct transport_ops {
    enum rk_path path;
    const char *name;
    /* False: no use to try, such as another host's shared memory. */
    bool (*reachable)(const struct rk_transport_endpoint *endpoint);
    enum rk_status (*connect)(const struct rk_transport_endpoint *endpoint, int64_t deadline_ns,
                              void **ret_connection, struct rk_error *error);
    /* num_pages: the sum over get's extents, checked. Pages' array is made by transport.c. */
    enum rk_status (*get)(void *connection, const struct rk_get *get, uint64_t num_pages,
                          struct rk_pages *pages, struct rk_error *error);
    void (*release)(void *connection, struct rk_pages *pages);
    void (*destroy)(void *connection);
};

extern const struct transport_ops transport_shm;
extern const struct transport_ops transport_ucx;
extern const struct transport_ops transport_grpc;

#endif
