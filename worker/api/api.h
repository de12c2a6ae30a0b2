/*
 * api: the worker's gRPC service (redknot.v1.Worker) and its place in the
 * cluster.
 *
 * Each call runs on its own handler thread: tokenise, locate, plan, fetch,
 * hand the arithmetic to the scheduler, stream the answer, publish what was
 * computed. A cache failure of any kind becomes computation.
 *
 * Threads: create and destroy from one thread; the service itself is
 * multi-threaded inside.
 */
#ifndef WORKER_API_API_H
#define WORKER_API_API_H

#include "client/kv_client.h"
#include "common/base/status.h"
#include "worker/recovery/head_map.h"
#include "worker/scheduler/scheduler.h"
#include "worker/tokenizer/tokenizer.h"

struct api;
struct rk_rpc_server;

/* What a request asks of the KV client, as in client/kv_client.h, so that tests can stand in. */
struct api_kv_ops {
    enum rk_status (*locate)(struct rk_kv_client *client, const struct rk_id *fingerprint,
                             const struct rk_id *ids, size_t num_ids, bool with_token_ids,
                             const struct rk_until *until, struct rk_kv_location *ret_locations,
                             struct rk_error *error);
    enum rk_status (*get)(struct rk_kv_client *client, const struct rk_id *fingerprint,
                          const struct rk_kv_layout *layout, const struct rk_kv_location *location,
                          const struct rk_extent *extents, size_t num_extents,
                          const struct rk_until *until, struct rk_kv_pages *ret_pages,
                          struct rk_error *error);
    enum rk_status (*check)(const struct rk_kv_client *client, const struct rk_kv_pages *pages);
    void (*release)(struct rk_kv_client *client, struct rk_kv_pages *pages);
    enum rk_status (*put)(struct rk_kv_client *client, const struct rk_kv_put *put,
                          const struct rk_until *until, bool *ret_already, struct rk_error *error);
    enum rk_status (*drop_copy)(struct rk_kv_client *client, const struct rk_kv_location *location,
                                const struct rk_extent *bad, const struct rk_until *until,
                                bool *ret_dropped, struct rk_error *error);
};

struct api_options {
    const char *node_id;
    const char *model_name;
    uint64_t incarnation;
    struct rk_id fingerprint;
    struct rk_id numeric_path;   /* of engine: engine_numeric_path() */
    const struct engine *engine; /* for its shape; its thread is the scheduler's */
    const char *mode;            /* "bf16" or "f32" */
    uint32_t threads;
    struct scheduler *scheduler;
    const struct tokenizer *tokenizer;
    const struct recovery_head_map *head_map; /* or NULL */
    struct rk_kv_client *kv;                  /* NULL: no cluster, everything is computed */
    const struct api_kv_ops *kv_ops;          /* NULL: the client's own */
    int fetch_timeout_ms;   /* 0: 2,000; so long a request waits for the cache, all
                             * its waits together; what has not come is a miss */
    int publish_timeout_ms; /* 0: 10,000; of all that one request stores */
    uint32_t requests_max;  /* 0: 8; computed side by side, as the scheduler's */
    uint32_t queue_max;     /* 0: 64; requests that may wait */
    uint32_t holds_max;     /* 0: 2,048; segments fetched by all requests together */
};

/* All pointers in options are borrowed until api_destroy. */
RK_MUST_CHECK enum rk_status api_create(const struct api_options *options, struct api **ret_api,
                                        struct rk_error *error);
RK_MUST_CHECK enum rk_status api_add_to_server(struct api *api, struct rk_rpc_server *server);
/* Ends what goes on behind answers, for a server that is about to stop. */
void api_stop(struct api *api);
void api_destroy(struct api *api); /* after the server has stopped; accepts NULL */

/* ---- Membership: tells the coordinator that this worker lives ---- */

struct api_membership;
struct api_membership_options {
    const char *coordinator;
    const char *node_id;
    uint64_t incarnation;
    const char *grpc_address; /* where clients reach this worker */
    const char *metrics_address;
    const char *model_name;
    struct rk_id fingerprint;
    struct rk_id numeric_path;
};
/* Strings are borrowed until stop. Registers in the background and again whenever the
 * coordinator has forgotten us. */
RK_MUST_CHECK enum rk_status api_membership_start(const struct api_membership_options *options,
                                                  struct api_membership **ret_membership,
                                                  struct rk_error *error);
void api_membership_stop(struct api_membership *membership); /* accepts NULL */

#endif
