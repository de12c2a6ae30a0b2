/*
 * transport: how pages move from a store node to a reader.
 *
 * One interface, several paths, chosen at connect by distance:
 *   shm   same host: the store's arena (a sealed memfd, passed over a Unix
 *         socket) is mapped read-only; pages are read in place, pinned by a
 *         count that the store drops when the reader's connection dies.
 *   ucx   other hosts: the store pushes pages over UCX active messages.
 *   grpc  anyone: a stream into a buffer of the reader.
 *
 * The only user of shared memory and of UCX. Checksums are carried, not verified: the
 * reader verifies where it uses the bytes (rk_page_verify).
 *
 * Client threads: a connection is used by one thread at a time.
 */
#ifndef RK_COMMON_TRANSPORT_TRANSPORT_H
#define RK_COMMON_TRANSPORT_TRANSPORT_H

#include "common/base/id.h"
#include "common/base/kv_layout.h"
#include "common/base/status.h"

/* Values are those of redknot.v1.Path and redknot.v1.Tier. */
enum rk_path { RK_PATH_NONE = 0, RK_PATH_SHM = 1, RK_PATH_GRPC = 2, RK_PATH_UCX = 3 };
enum rk_tier { RK_TIER_NONE = 0, RK_TIER_DRAM = 1, RK_TIER_HBM = 2, RK_TIER_NVME = 3 };
const char *rk_path_name(enum rk_path path); /* "shm", "grpc", ... */

/* Boot id of this machine (32 hex digits and dashes), or "" where it cannot be read. */
const char *rk_host_id(void);

/* ---- Reader ---- */

struct rk_transport;

struct rk_transport_endpoint {
    const char *grpc_address; /* required */
    const char *host_id;      /* "" when unknown */
    const char *shm_socket;   /* "" when not served */
    const char *ucx_address;  /* host:port, "" when not served */
};

struct rk_get {
    struct rk_id segment_id;
    struct rk_id fingerprint;
    uint64_t generation;
    uint32_t shard_index;
    uint32_t page_bytes;             /* what the reader expects; another size is MISS_FINGERPRINT */
    const struct rk_extent *extents; /* borrowed during the call */
    size_t num_extents;
    uint64_t pages_max; /* sum over extents */
    int64_t deadline_ns;
};

struct rk_page {
    const void *data;  /* page_bytes; read-only; borrowed until rk_transport_release */
    uint64_t checksum; /* XXH3-64 made by the writer */
};

struct rk_pages {
    struct rk_page *pages; /* in the order of the extents */
    uint64_t num_pages;
    enum rk_path path;
    enum rk_tier tier;
    uint64_t bytes;
    void *hold; /* of the transport */
};

/* path RK_PATH_NONE: the nearest that works (shm, else ucx, else grpc). Else that one or an
 * error. */
RK_MUST_CHECK enum rk_status rk_transport_connect(const struct rk_transport_endpoint *endpoint,
                                                  enum rk_path path, int timeout_ms,
                                                  struct rk_transport **ret_transport,
                                                  struct rk_error *error);
enum rk_path rk_transport_path(const struct rk_transport *transport);
/* A miss is a status RK_MISS_*; RK_ERR_UNAVAILABLE means: drop this connection. */
RK_MUST_CHECK enum rk_status rk_transport_get(struct rk_transport *transport,
                                              const struct rk_get *get, struct rk_pages *ret_pages,
                                              struct rk_error *error);
void rk_transport_release(struct rk_transport *transport, struct rk_pages *pages);
/* Outstanding pages must be released first. Accepts NULL. */
void rk_transport_destroy(struct rk_transport *transport);

bool rk_page_verify(const struct rk_page *page, size_t page_bytes);

/* ---- Store side ---- */

/* What a store does for a path. Called on the path's own thread; must be safe beside the store's
 * other callers. */
struct rk_transport_store_ops {
    /* Pins the pages and gives their byte offsets in the arena and checksums,
     * in the order of the extents. num_pages: in, room; out, written. */
    enum rk_status (*pin)(void *context, enum rk_path path, const struct rk_get *get,
                          uint64_t *ret_offsets, uint64_t *ret_checksums, uint64_t *num_pages,
                          void **ret_pin, struct rk_error *error);
    void (*unpin)(void *context, void *pin);
};

struct rk_shm_server;

struct rk_shm_server_options {
    const char *socket_path; /* made with mode 0600, replaced if stale, removed at stop */
    int arena_fd;            /* borrowed memfd, sealed against shrinking and future writes */
    uint64_t arena_bytes;
    uint32_t connections_max; /* 0: 256 */
    uint32_t pins_max;        /* per connection, 0: 4,096 */
    uint64_t pages_max;       /* per get, 0: 1 << 20 */
    const struct rk_transport_store_ops *ops;
    void *context;
};

RK_MUST_CHECK enum rk_status rk_shm_server_start(const struct rk_shm_server_options *options,
                                                 struct rk_shm_server **ret_server,
                                                 struct rk_error *error);
void rk_shm_server_stop(struct rk_shm_server *server); /* unpins all; accepts NULL */

struct rk_ucx_server;

struct rk_ucx_server_options {
    const char *listen;       /* host:port, port 0: any; borrowed until stop */
    const void *arena;        /* borrowed until stop */
    uint32_t connections_max; /* 0: 256 */
    uint32_t gets_max;        /* under way, per connection; 0: 64 */
    const struct rk_transport_store_ops *ops;
    void *context;
};

/* RK_ERR_UNSUPPORTED: this machine has no UCX. RK_ERR_UNAVAILABLE: the address cannot be used. */
RK_MUST_CHECK enum rk_status rk_ucx_server_start(const struct rk_ucx_server_options *options,
                                                 struct rk_ucx_server **ret_server,
                                                 struct rk_error *error);
int rk_ucx_server_port(const struct rk_ucx_server *server);
void rk_ucx_server_stop(struct rk_ucx_server *server); /* unpins all; accepts NULL */

#endif
