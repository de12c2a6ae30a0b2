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

struct api_options {
    const char *node_id;
    const char *model_name;
    uint64_t incarnation;
    struct rk_id fingerprint;
    const struct engine *engine; /* for its shape; its thread is the scheduler's */
    const char *mode;            /* "bf16" or "f32" */
    uint32_t threads;
    struct scheduler *scheduler;
    const struct tokenizer *tokenizer;
    const struct recovery_head_map *head_map; /* or NULL */
    struct rk_kv_client *kv;                  /* NULL: no cluster, everything is computed */
    int fetch_timeout_ms;                     /* 0: 2,000; a slower fetch is a miss */
    int publish_timeout_ms;                   /* 0: 10,000 */
};

/* All pointers in options are borrowed until api_destroy. */
RK_MUST_CHECK enum rk_status api_create(const struct api_options *options, struct api **ret_api,
                                        struct rk_error *error);
RK_MUST_CHECK enum rk_status api_add_to_server(struct api *api, struct rk_rpc_server *server);
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
};
/* Strings are borrowed until stop. Registers in the background and again whenever the
 * coordinator has forgotten us. */
RK_MUST_CHECK enum rk_status api_membership_start(const struct api_membership_options *options,
                                                  struct api_membership **ret_membership,
                                                  struct rk_error *error);
void api_membership_stop(struct api_membership *membership); /* accepts NULL */

#endif
