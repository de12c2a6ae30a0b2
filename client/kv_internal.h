/*
 * kv_internal: what the parts of the KV client share. Private to client/.
 *
 * kv_pool.c   connections to store nodes, bounded, and which nodes are down
 * kv_put.c    the two-phase put
 * kv_get.c    pages across shards
 * kv_client.c metadata: locate, drop
 */
#ifndef CLIENT_KV_INTERNAL_H
#define CLIENT_KV_INTERNAL_H

#include "client/fork_internal.h"
#include "client/kv_client.h"
#include "common/rpc/rpc.h"

#include <pthread.h>

#include "redknot/v1/coordinator.pb-c.h"
#include "redknot/v1/kvstore.pb-c.h"

#define RK_KV_TIMEOUT_MS         2000
#define RK_KV_CONNECT_TIMEOUT_MS 1000
#define RK_KV_BACKOFF_MS         500  /* at most so long a silent node is not asked again; */
#define RK_KV_BACKOFF_MAX_MS     5000 /* doubled with each failure up to this */
#define RK_KV_HURRY_MS           250  /* who waited for less knows nothing of a node */
#define RK_KV_NEARER_MS          1000 /* a nearer path is tried again after so long, doubled 6 times */
#define RK_KV_NEARER_TIMEOUT_MS  200
#define RK_KV_NODES_MAX          1024 /* store nodes known at once */
#define RK_KV_CONNECTIONS_MAX    32   /* per store node; a get needs one while it runs */
#define RK_KV_SHARDS_MAX         4096 /* of one segment, replicas included */
#define RK_KV_BATCH_IDS_MAX      4096 /* per Locate call; longer lists are split */

/* Where one store node serves; the strings belong to whoever holds the struct. */
struct rk_kv_endpoint {
    char *node_id;
    uint64_t incarnation;
    char *address;
    char *host_id;
    char *shm_socket;
    char *ucx_address;
};

struct rk_kv_shard {
    uint64_t generation;
    uint32_t shard_index;
    struct rk_head_range heads;
    struct rk_kv_layout layout;
    struct rk_kv_endpoint endpoint;
};

struct rk_kv_shards {
    struct rk_id fingerprint;
    uint32_t count;
    struct rk_kv_shard shards[];
};

/* ---- kv_pool.c ---- */

struct rk_kv_pool;
struct rk_kv_node;
struct rk_kv_connection; /* serves one batch at a time, may have many outstanding holds */

/* How a pool gets at transports and at the time; tests have their own. */
struct rk_kv_pool_ops {
    enum rk_status (*connect)(const struct rk_transport_endpoint *endpoint, enum rk_path path,
                              const struct rk_until *until, struct rk_transport **ret_transport,
                              struct rk_error *error);
    enum rk_path (*path)(const struct rk_transport *transport);
    enum rk_path (*nearest)(const struct rk_transport_endpoint *endpoint);
    enum rk_status (*get)(struct rk_transport *transport, const struct rk_get *gets,
                          size_t num_gets, const struct rk_until *until, struct rk_pages *ret_pages,
                          struct rk_error *error);
    enum rk_status (*put)(struct rk_transport *transport, struct rk_put *puts, size_t num_puts,
                          const struct rk_until *until, struct rk_error *error);
    void (*release)(struct rk_transport *transport, struct rk_pages *pages, size_t num_pages);
    enum rk_status (*check)(const struct rk_transport *transport, const struct rk_pages *pages);
    void (*destroy)(struct rk_transport *transport);
    int64_t (*clock_ns)(void); /* of back-off; waits go by the monotonic clock */
};

struct rk_kv_pool_options {
    enum rk_path path;                /* RK_PATH_NONE: the nearest */
    const struct rk_kv_pool_ops *ops; /* NULL: the transports' own */
};

RK_MUST_CHECK enum rk_status rk_kv_pool_create(const struct rk_kv_pool_options *options,
                                               struct rk_kv_pool **ret_pool);
void rk_kv_pool_destroy(struct rk_kv_pool *pool); /* accepts NULL */

/*
 * Gets a batch over a connection that nobody else uses meanwhile; new ones are made up to the
 * bound, then it waits. On RK_OK the pages are held on *ret_connection until rk_kv_pool_release.
 * RK_ERR_UNAVAILABLE at once while the node is in its back-off. A connection that was found broken,
 * or holds as many pages as its store bears, is replaced by another one.
 */
RK_MUST_CHECK enum rk_status rk_kv_pool_get(
    struct rk_kv_pool *pool, const struct rk_kv_endpoint *endpoint, const struct rk_get *gets,
    size_t num_gets, const struct rk_until *until, struct rk_pages *ret_pages,
    enum rk_path *ret_path, struct rk_kv_connection **ret_connection, struct rk_error *error);
/* The whole batch of one get. Never blocks on another caller's get: on a busy connection its user
 * does it on the way out. The pages' array may go right after the call. */
void rk_kv_pool_release(struct rk_kv_pool *pool, struct rk_kv_connection *connection,
                        struct rk_pages *pages, size_t num_pages);
/* As rk_transport_check. Takes no lock: a connection with a hold stays. */
RK_MUST_CHECK enum rk_status rk_kv_pool_check(const struct rk_kv_pool *pool,
                                              const struct rk_kv_connection *connection,
                                              const struct rk_pages *pages);
RK_MUST_CHECK enum rk_status rk_kv_pool_put(struct rk_kv_pool *pool,
                                            const struct rk_kv_endpoint *endpoint,
                                            struct rk_put *puts, size_t num_puts,
                                            const struct rk_until *until, struct rk_error *error);

/* A question to a store by other means than a transport, which minds the same back-off:
 * RK_ERR_UNAVAILABLE at once, or one ask_end after it, with what the question came to. */
struct rk_kv_ask {
    struct rk_kv_node *node;
    int64_t begin_ns;
    bool asks_again;
};
RK_MUST_CHECK enum rk_status rk_kv_pool_ask_begin(struct rk_kv_pool *pool,
                                                  const struct rk_kv_endpoint *endpoint,
                                                  struct rk_kv_ask *ret_ask,
                                                  struct rk_error *error);
/* Returns the status, or RK_ERR_NO_MEMORY when the trouble is our own. */
enum rk_status rk_kv_pool_ask_end(struct rk_kv_pool *pool, const struct rk_kv_ask *ask,
                                  enum rk_status status, const struct rk_until *until,
                                  struct rk_error *error);

/* Twice as long after each failure, and never the same for all clients, who would else come back
 * together. */
int rk_kv_backoff_ms(uint32_t failures);

/* ---- kv_get.c ---- */

/* The one place that makes misses of errors: what a reader that can compute is told of a store that
 * is down or late. */
enum rk_status rk_kv_as_miss(enum rk_status status);

/* ---- kv_client.c ---- */

struct rk_kv_client {
    struct rk_rpc_channel *coordinator;
    struct rk_kv_pool *pool;
    char *address;
    int timeout_ms;
    pid_t maker;
    pthread_mutex_t lock; /* Leaf; guards what follows. */
    uint32_t coordinator_failures;
    int64_t coordinator_retry_ns;
};

/* What a metadata call may take: until, and not longer than the client's own timeout. */
struct rk_until rk_kv_metadata_until(const struct rk_kv_client *client,
                                     const struct rk_until *until);
/* One call to the coordinator. All calls of a client share one back-off: RK_ERR_UNAVAILABLE at once
 * after one of them was not answered. */
RK_MUST_CHECK enum rk_status rk_kv_coordinator_call(struct rk_kv_client *client, const char *path,
                                                    const ProtobufCMessage *request,
                                                    const ProtobufCMessageDescriptor *type,
                                                    const struct rk_until *until,
                                                    ProtobufCMessage **ret_reply,
                                                    struct rk_error *error);
void rk_kv_endpoint_clear(struct rk_kv_endpoint *endpoint);
RK_MUST_CHECK enum rk_status rk_kv_endpoint_copy(const Redknot__V1__StoreEndpoint *from,
                                                 struct rk_kv_endpoint *ret_endpoint);
/* Borrowed from stores; NULL when no store has that id. */
const Redknot__V1__StoreEndpoint *rk_kv_endpoint_find(Redknot__V1__StoreEndpoint *const *stores,
                                                      size_t num_stores, const char *node_id);
/* What a Shard message says of its heads and layout; false when it makes no sense. */
bool rk_kv_shard_shape(const Redknot__V1__Shard *shard, struct rk_kv_layout *ret_layout,
                       struct rk_head_range *ret_heads);

#endif
