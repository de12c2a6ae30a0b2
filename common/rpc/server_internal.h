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
    bool known;             /* what follows, and that a first message comes, is of its descriptor */
    bool request_is_single; /* no stream */
    bool reply_is_single;   /* no stream: the reply leaves together with the status */
    bool on_loop;           /* the handler does not block: it runs on the loop's thread */
    bool is_watch;          /* RK_OK of the handler: the keeper has the call now */
};

#define RPC_WATCH_NOTHING (-1) /* was sent to a watcher yet */

/* Calls that no handler has; see keeper.c. */
struct rpc_call_list {
    struct rk_rpc_call *first;
    struct rk_rpc_call *last;
    uint32_t count;
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
    bool awaits_first; /* of the loop's thread: its first message makes it a handler's */
    struct rpc_scratch scratch;
    struct rk_error refusal; /* of a request that was not taken */
    struct rk_rpc_call *next;

    /* While the keeper has it; under the server's mutex. */
    struct rpc_call_list *kept_in;
    struct rk_rpc_call *kept_before;
    struct rk_rpc_call *kept_after;
    int64_t kept_ns;
    int watched_sent;
    bool watched_known;
    atomic_bool watched_sending;
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
    uint32_t recv_idle_ms;
    uint32_t singles_max; /* handlers, calls_max among them, for calls without streams */
    struct rpc_descriptors *descriptors;
    struct rpc_method methods[RPC_METHODS_MAX]; /* fixed once started */
    size_t num_methods;
    const char *services[RPC_SERVICES_MAX];
    size_t num_services;
    pthread_t *threads; /* singles_max of them */
    pthread_t keeper;

    struct rpc_sync sync; /* for all below; changed: also when a client goes or serving changes */
    pthread_cond_t work;
    struct rk_rpc_call *queue_head;
    struct rk_rpc_call *queue_tail;
    uint32_t queued;
    uint32_t idle;
    uint32_t num_threads;
    uint32_t active; /* queued or with a handler */
    struct rpc_call_list waiting;
    struct rpc_call_list watchers;
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

/* The first message is there (or none will come): finds who handles the call. */
void rpc_server_dispatch(struct rk_rpc_server *server, struct rk_rpc_call *call);
/* Takes back a call whose last reference went. */
void rpc_server_reclaim(struct rk_rpc_server *server, struct rk_rpc_call *call);

/* ---- keeper.c: the reference that a call came with is the keeper's while it has it ---- */

void *rpc_keeper_main(void *context);
/* Lets the keeper and the handlers go; waits for the keeper. */
void rpc_keeper_stop(struct rk_rpc_server *server);
/* Whoever waits for the server's condition looks again. */
void rpc_keeper_wake(struct rk_rpc_server *server);
/* False: as many wait as may. */
bool rpc_keeper_wait_for_message(struct rk_rpc_call *call);
/* True: it waited, and the reference is the caller's again. */
bool rpc_keeper_message_came(struct rk_rpc_call *call);
/* Takes the reference on true; false: there are as many watchers as may be. */
bool rpc_keeper_watch(struct rk_rpc_call *call, bool known);

/* ---- health.c, reflection.c ---- */

/* What a watcher is told; under the server's mutex. */
int rpc_health_state(const struct rk_rpc_server *server, bool known);
RK_MUST_CHECK enum rk_status rpc_health_send(struct rk_rpc_call *call, int state);

RK_MUST_CHECK enum rk_status rpc_health_add(struct rk_rpc_server *server);
RK_MUST_CHECK enum rk_status rpc_reflection_add(struct rk_rpc_server *server);

#endif
