/*
 * server_internal: a server and its calls, for server.c, server_call.c and health.c.
 *
 * A call object is at all times in one of these places: armed (gRPC may hand it
 * a new call), waiting for a handler thread, with a handler, or only kept by
 * batches that have not ended. Its last reference arms it again or frees it.
 */
#ifndef RK_COMMON_RPC_SERVER_INTERNAL_H
#define RK_COMMON_RPC_SERVER_INTERNAL_H

#include "common/listen/listen.h"
#include "common/rpc/rpc_internal.h"

#define RPC_METHODS_MAX  256
#define RPC_SERVICES_MAX 32

struct rpc_method {
    const char *path;
    rk_rpc_handler handler;
    void *context;
    size_t request_bytes_max;
    bool reply_is_single; /* known to be no stream: the reply leaves together with the status */
};

struct rk_rpc_call {
    struct rpc_event arrived; /* first: its address is the call's */
    struct rk_rpc_server *server;
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array metadata;
    const struct rpc_method *method;
    int64_t deadline_ns;
    atomic_uint refs; /* the handler, and each batch under way */
    struct rpc_sync sync;
    struct rpc_batch opening; /* initial metadata on its own */
    struct rpc_batch sending;
    struct rpc_batch receiving;
    struct rpc_batch closing; /* ends when the client is gone, or with the call */
    struct rpc_batch ending;  /* the final status */
    int close_says_cancelled; /* written by gRPC */
    atomic_bool cancelled;
    bool opened;
    atomic_bool ended;          /* the final status is on its way */
    bool stalled;               /* the client took no message for too long */
    int64_t sent_ns;            /* when the message under way was given to gRPC */
    grpc_byte_buffer *held;     /* a single or last reply, waiting for the status */
    grpc_byte_buffer *received; /* by the batch under way, or not taken yet */
    bool recv_started;
    struct rpc_scratch scratch;
    struct rk_error refusal; /* of a request that was not taken */
    struct rk_rpc_call *next;
};

struct rk_rpc_server {
    struct rpc_loop loop;
    grpc_server *server;
    struct rpc_event shut; /* tag of gRPC's shutdown */
    grpc_server_credentials *credentials;
    struct rk_listener *listener;
    char *address;
    uint32_t calls_max;
    uint32_t default_deadline_ms;
    uint32_t send_timeout_ms;
    struct rpc_descriptors *descriptors;
    struct rpc_method methods[RPC_METHODS_MAX]; /* fixed once started */
    size_t num_methods;
    const char *services[RPC_SERVICES_MAX];
    size_t num_services;
    pthread_t *threads; /* calls_max of them */

    struct rpc_sync sync; /* for all below; changed: also when a client goes or serving changes */
    pthread_cond_t work;
    struct rk_rpc_call *queue_head;
    struct rk_rpc_call *queue_tail;
    uint32_t queued;
    uint32_t idle;
    uint32_t num_threads;
    uint32_t active; /* queued or with a handler */
    uint32_t armed;
    uint64_t live; /* call objects */
    bool serving;
    bool started;
    bool stopping;
    bool stopped;
    bool exiting;
    bool shut_done;
};

/* ---- server_call.c ---- */

/* NULL without memory. The call is not armed yet. */
struct rk_rpc_call *rpc_call_create(struct rk_rpc_server *server);
void rpc_call_free(struct rk_rpc_call *call);
/* Makes a finished call as new. */
void rpc_call_recycle(struct rk_rpc_call *call);
/* On arrival: takes the deadline and starts to watch for the client's going. */
void rpc_call_accept(struct rk_rpc_call *call);
/* Starts sending the final status; the call ends by itself after that. */
void rpc_call_end(struct rk_rpc_call *call, enum rk_status status, const char *text);
void rpc_call_unref(struct rk_rpc_call *call);

/* ---- server.c ---- */

/* Takes back a call whose last reference went. */
void rpc_server_reclaim(struct rk_rpc_server *server, struct rk_rpc_call *call);

/* ---- health.c, reflection.c ---- */

RK_MUST_CHECK enum rk_status rpc_health_add(struct rk_rpc_server *server);
RK_MUST_CHECK enum rk_status rpc_reflection_add(struct rk_rpc_server *server);

#endif
