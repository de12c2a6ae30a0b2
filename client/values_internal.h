/*
 * values_internal: what the parts of the values client share.
 *
 * values_stores.c which stores there are, and whose a key is
 * values.c        the blocking calls
 * values_submit.c the same as operations
 */
#ifndef CLIENT_VALUES_INTERNAL_H
#define CLIENT_VALUES_INTERNAL_H

#include "client/kv_internal.h"
#include "client/values.h"

#include <stdatomic.h>

#define VALUES_TIMEOUT_MS     5000
#define VALUES_THREADS        4
#define VALUES_THREADS_MAX    64
#define VALUES_OPERATIONS_MAX 1024
#define VALUES_ITEMS_MAX      65536 /* of one call */
#define VALUES_LOOK_BACK_BYTES                                                                     \
    (8u << 20)                        /* a call that puts more sees whether all of it stayed       \
                                       */
#define VALUES_STORES_AGE_MS     1000 /* the list of stores is asked for so often */
#define VALUES_STORES_TIMEOUT_MS 1000
#define VALUES_STORES_IDLE_MS    5000 /* not asked for so long: the next call waits for it, */
#define VALUES_STORES_WAIT_MS    200  /* at most so long */
#define VALUES_RANKS             2    /* stores that a key may be on: its own, and the next */

/* ---- values_stores.c ---- */

/* One state of the cluster, shared by the calls that use it. */
struct store {
    struct rk_kv_endpoint endpoint;
    double weight;
};
struct store_set {
    atomic_uint refs;
    size_t count;
    struct store stores[];
};

/* A store's gRPC channel, for questions beside the bytes; kept until the client ends. */
struct store_channel {
    char *address;
    struct rk_rpc_channel *channel;
    struct store_channel *next;
};

/* A thread of its own asks again once a second while the list is used: a coordinator that is silent
 * costs no call to a store that is not. */
struct stores {
    pthread_mutex_t lock; /* Leaf. */
    pthread_cond_t due;
    pthread_t thread;
    bool running;
    bool stopping;
    bool wanted; /* the thread shall ask */
    struct rk_rpc_channel *coordinator;
    struct store_set *set; /* NULL: never known */
    int64_t asked_ns;      /* when it was last asked, with or without success */
    struct store_channel *channels;
    size_t num_channels; /* at most RK_KV_NODES_MAX */
};

RK_MUST_CHECK enum rk_status stores_create(const char *coordinator, struct stores *ret_stores,
                                           struct rk_error *error);
void stores_destroy(struct stores *stores);
/* The stores as they were a moment ago, or longer when the coordinator does not answer. At least
 * one, else RK_ERR_UNAVAILABLE. The caller gives it back. Waits only the first time, and for a
 * moment when nobody asked for long. */
RK_MUST_CHECK enum rk_status stores_get(struct stores *stores, int64_t deadline_ns,
                                        struct store_set **ret_set, struct rk_error *error);
/* Borrowed for the client's life. */
RK_MUST_CHECK enum rk_status stores_channel(struct stores *stores, const char *address,
                                            struct rk_rpc_channel **ret_channel,
                                            struct rk_error *error);
void store_set_give(struct store_set *set); /* accepts NULL */
/* The stores that a key may be on, best first; fewer ranks than asked when there are fewer
 * stores. Returns how many. */
size_t store_set_rank(const struct store_set *set, const struct rk_id *id,
                      uint32_t ret_ranks[VALUES_RANKS]);

/* ---- values.c ---- */

struct operations;

struct rk_values {
    struct stores stores;
    struct rk_kv_pool *pool;
    int timeout_ms;
    pid_t maker;
    struct operations *operations;
};

/* ---- values_submit.c ---- */

/* As pthread_create, with every signal blocked: an application's signals are its own threads'. */
int values_thread_start(pthread_t *ret_thread, void *(*body)(void *), void *context);
RK_MUST_CHECK enum rk_status operations_create(struct rk_values *values, uint32_t threads,
                                               uint32_t operations_max,
                                               struct operations **ret_operations,
                                               struct rk_error *error);
void operations_destroy(struct operations *operations); /* accepts NULL and half-built ones */

#endif
