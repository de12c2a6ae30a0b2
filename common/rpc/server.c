#include "common/rpc/server_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define ARMED_CALLS         4    /* new calls that gRPC may hand over before we look */
#define STREAMS_SPARE       1024 /* per connection, above calls_max: to be refused at once */
#define CALLS_MAX_DEFAULT   64
#define CALLS_MAX_LIMIT     65536
#define DEADLINE_DEFAULT_MS 600000
#define KEEPALIVE_MS        10000
#define HTTP2_PREFACE       "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#define RECV_IDLE_MS        30000
#define SINGLES_SHARE       4     /* a quarter more handlers than streams may take */
#define DRAIN_MS            200   /* for connections to close, once all calls are out */
#define STOP_REPORT_MS      10000 /* how often a stop that waits says so */

/* ---- New calls ---- */

static void server_arm(struct rk_rpc_server *server, struct rk_rpc_call *call)
{
    RPC_TSAN_RELEASE(&call->arrived);
    grpc_call_error failure =
        grpc_server_request_call(server->server, &call->call, &call->details, &call->metadata,
                                 server->loop.queue, server->loop.queue, &call->arrived);
    RK_ASSERT(failure == GRPC_CALL_OK);
}

static const struct rpc_method *server_find(const struct rk_rpc_server *server,
                                            const grpc_slice *path)
{
    for (size_t i = 0; i < server->num_methods; i++) {
        if (grpc_slice_str_cmp(*path, server->methods[i].path) == 0) {
            return &server->methods[i];
        }
    }
    return NULL;
}

static void call_run(struct rk_rpc_call *call)
{
    struct rk_rpc_server *server = call->server;
    struct rk_error error = {.status = RK_OK};
    enum rk_status status = call->method->handler(call, call->method->context, &error);

    /* Before the status leaves: a client that saw its call end may call again at once. */
    pthread_mutex_lock(&server->sync.mutex);
    server->active--;
    pthread_cond_broadcast(&server->sync.changed);
    pthread_mutex_unlock(&server->sync.mutex);
    rpc_call_end(call, status, error.text);
    rpc_call_unref(call);
}

static void *handler_main(void *context)
{
    struct rk_rpc_server *server = context;
    pthread_mutex_lock(&server->sync.mutex);
    for (;;) {
        while (!server->queue_head && !server->exiting) {
            server->idle++;
            pthread_cond_wait(&server->work, &server->sync.mutex);
            server->idle--;
        }
        struct rk_rpc_call *call = server->queue_head;
        if (!call) {
            break;
        }
        server->queue_head = call->next;
        server->queued--;
        pthread_mutex_unlock(&server->sync.mutex);
        call_run(call);
        pthread_mutex_lock(&server->sync.mutex);
    }
    pthread_mutex_unlock(&server->sync.mutex);
    return NULL;
}

/* Queues the call for a handler thread. False when there is no room for it. */
static bool server_queue(struct rk_rpc_server *server, struct rk_rpc_call *call)
{
    bool single = call->method->request_is_single && call->method->reply_is_single;
    uint32_t calls_max = single ? server->singles_max : server->calls_max;
    pthread_mutex_lock(&server->sync.mutex);
    bool room = server->active < calls_max;
    if (room && server->queued >= server->idle && server->num_threads < calls_max) {
        pthread_t *thread = &server->threads[server->num_threads];
        if (rpc_thread_create(thread, handler_main, server) == 0) {
            server->num_threads++;
        } else {
            room = server->num_threads > server->active; /* Else nobody is left to run it. */
        }
    }
    if (room) {
        server->active++;
        server->queued++;
        call->next = NULL;
        if (server->queue_head) {
            server->queue_tail->next = call;
        } else {
            server->queue_head = call;
        }
        server->queue_tail = call;
        pthread_cond_signal(&server->work);
    }
    pthread_mutex_unlock(&server->sync.mutex);
    return room;
}

static void call_end_unknown(struct rk_rpc_call *call)
{
    char text[256];
    char path[200];
    rpc_slice_to_text(&call->details.method, path, sizeof(path));
    (void)snprintf(text, sizeof(text), "no method %s on this server", path);
    rpc_call_end(call, RK_ERR_UNSUPPORTED, text);
    rpc_call_unref(call);
}

static void call_arrived(struct rpc_event *event, bool ok)
{
    struct rk_rpc_call *call = (struct rk_rpc_call *)event;
    struct rk_rpc_server *server = call->server;
    pthread_mutex_lock(&server->sync.mutex);
    server->armed--;
    bool arm = ok && !server->stopping;
    pthread_mutex_unlock(&server->sync.mutex);
    if (!ok) {
        rpc_call_unref(call); /* The server shuts down. */
        return;
    }
    /* Without memory for another one, this call's object is armed again when it ends. */
    struct rk_rpc_call *next = arm ? rpc_call_create(server) : NULL;
    if (next) {
        next->arrived.done = call_arrived;
        pthread_mutex_lock(&server->sync.mutex);
        server->live++;
        pthread_mutex_unlock(&server->sync.mutex);
        rpc_call_unref(next); /* reclaim arms it */
    }
    call->method = server_find(server, &call->details.method);
    bool known = call->method && call->method->known;
    if (known && rpc_keeper_wait_for_message(call)) {
        /* Whoever opens a call and says nothing takes no handler. */
        call->awaits_first = true;
        rpc_call_accept(call);
        return;
    }
    rpc_call_accept(call);
    if (known) {
        rpc_call_end(call, RK_ERR_FULL, "too many calls are open that have sent nothing");
        rpc_call_unref(call);
    } else if (call->method) {
        rpc_server_dispatch(server, call);
    } else {
        call_end_unknown(call);
    }
}

void rpc_server_dispatch(struct rk_rpc_server *server, struct rk_rpc_call *call)
{
    if (call->method->on_loop) {
        struct rk_error error = {.text = ""};
        enum rk_status status = RK_ERR_INVALID;
        if (call->received) { /* Else it would wait to learn why none came. */
            status = call->method->handler(call, call->method->context, &error);
        }
        if (status == RK_OK && call->method->is_watch) {
            return; /* The reference is the keeper's. */
        }
        rpc_call_end(call, status, error.text);
    } else if (server_queue(server, call)) {
        return; /* The reference is the handler's. */
    } else {
        rpc_call_end(call, RK_ERR_FULL, "the server runs as many calls as it may");
    }
    rpc_call_unref(call);
}

void rpc_server_reclaim(struct rk_rpc_server *server, struct rk_rpc_call *call)
{
    pthread_mutex_lock(&server->sync.mutex);
    bool arm = server->started && !server->stopping && server->armed < ARMED_CALLS;
    server->armed += arm ? 1 : 0;
    pthread_mutex_unlock(&server->sync.mutex);
    if (arm) {
        rpc_call_recycle(call);
        server_arm(server, call);
        return;
    }
    rpc_call_free(call);
    /* Last: whoever sees live at 0 destroys the server. */
    pthread_mutex_lock(&server->sync.mutex);
    server->live--;
    pthread_cond_broadcast(&server->sync.changed);
    pthread_mutex_unlock(&server->sync.mutex);
}

/* ---- Creation ---- */

static void server_shut(struct rpc_event *event, bool ok)
{
    (void)ok;
    struct rk_rpc_server *server =
        (struct rk_rpc_server *)((char *)event - offsetof(struct rk_rpc_server, shut));
    pthread_mutex_lock(&server->sync.mutex);
    server->shut_done = true;
    pthread_cond_broadcast(&server->sync.changed);
    pthread_mutex_unlock(&server->sync.mutex);
}

/* gRPC's own acceptor ends for good when the descriptors do: connections come from a listener of
 * ours, once they have sent HTTP/2's first bytes. */
static void server_connect(void *context, int fd, const struct sockaddr *peer, size_t peer_bytes)
{
    struct rk_rpc_server *server = context;
    unsigned unanswered_ms = KEEPALIVE_MS;
    (void)peer, (void)peer_bytes;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unanswered_ms, sizeof(unanswered_ms));
    grpc_server_add_channel_from_fd(server->server, fd, server->credentials);
}

static enum rk_status server_bind(struct rk_rpc_server *server,
                                  const struct rk_rpc_server_options *options,
                                  struct rk_error *error)
{
    const struct rpc_setting settings[] = {
        {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RK_RPC_MESSAGE_BYTES_MAX},
        {GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, RK_RPC_MESSAGE_BYTES_MAX},
        {GRPC_ARG_MAX_CONCURRENT_STREAMS, (int)server->calls_max + STREAMS_SPARE},
        /* A client that froze is noticed while a handler waits for it. */
        {GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS},
        {GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_MS},
        /* One that went away without a word keeps no connection, though it has no call. */
        {GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1},
        {GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0},
        {GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, KEEPALIVE_MS / 2},
    };
    grpc_arg args[sizeof(settings) / sizeof(settings[0])];
    rpc_settings_fill(settings, sizeof(settings) / sizeof(settings[0]), args);
    grpc_channel_args all = {.num_args = sizeof(args) / sizeof(args[0]), .args = args};
    server->server = grpc_server_create(&all, NULL);
    if (!server->server) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "cannot create a gRPC server");
    }
    grpc_server_register_completion_queue(server->server, server->loop.queue, NULL);
    server->credentials = grpc_insecure_server_credentials_create();
    struct rk_listener_options listener = {.name = "grpc",
                                           .address = options->address,
                                           .preface = HTTP2_PREFACE,
                                           .connections_max = options->connections_max,
                                           .bind_wait_ms = options->bind_wait_ms,
                                           .on_socket = server_connect,
                                           .context = server};
    enum rk_status status = rk_listener_create(&listener, &server->listener, error);
    if (status == RK_ERR_INVALID) {
        rk_error_prefix(error, "cannot listen on \"%s\"", options->address);
        status = RK_ERR_IO;
    }
    return status;
}

enum rk_status rk_rpc_server_create(const struct rk_rpc_server_options *options,
                                    struct rk_rpc_server **ret_server, struct rk_error *error)
{
    struct rk_rpc_server *server = rk_alloc_zero(1, sizeof(*server));
    if (!server) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for an rpc server");
    }
    enum rk_status status = RK_ERR_NO_MEMORY;
    rpc_sync_init(&server->sync);
    pthread_cond_init(&server->work, NULL);
    server->shut.done = server_shut;
    server->serving = true;
    server->calls_max = options->calls_max > 0 ? options->calls_max : CALLS_MAX_DEFAULT;
    server->default_deadline_ms =
        options->default_deadline_ms > 0 ? options->default_deadline_ms : DEADLINE_DEFAULT_MS;
    server->send_timeout_ms = options->send_timeout_ms;
    server->recv_idle_ms = options->recv_idle_ms > 0 ? options->recv_idle_ms : RECV_IDLE_MS;
    server->singles_max = server->calls_max + server->calls_max / SINGLES_SHARE;
    if (server->calls_max > CALLS_MAX_LIMIT) {
        status = rk_error_set(error, RK_ERR_INVALID, "calls_max is %u, at most %u is possible",
                              server->calls_max, (unsigned)CALLS_MAX_LIMIT);
        goto fail;
    }
    rpc_loop_create(&server->loop);
    server->address = rk_alloc_string(options->address);
    server->threads = rk_alloc_zero(server->singles_max, sizeof(*server->threads));
    if (!server->address || !server->threads) {
        (void)rk_error_set(error, status, "out of memory for %u handlers", server->calls_max);
        goto fail;
    }
    status = rpc_descriptors_create(&server->descriptors);
    if (status == RK_OK) {
        status = rpc_health_add(server);
    }
    if (status == RK_OK) {
        status = rpc_reflection_add(server);
    }
    if (status != RK_OK) {
        (void)rk_error_set(error, status, "cannot set up health and reflection: %s",
                           rk_status_text(status));
        goto fail;
    }
    status = server_bind(server, options, error);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_server = server;
    return RK_OK;

fail:
    rk_rpc_server_destroy(server);
    return status;
}

enum rk_status rk_rpc_server_add_service(struct rk_rpc_server *server, const char *service,
                                         const struct rk_rpc_method *methods, size_t num_methods,
                                         void *context)
{
    RK_ASSERT(!server->started);
    if (server->num_services == RPC_SERVICES_MAX ||
        num_methods > RPC_METHODS_MAX - server->num_methods) {
        return RK_ERR_FULL;
    }
    server->services[server->num_services++] = service;
    for (size_t i = 0; i < num_methods; i++) {
        char name[256];
        const struct rpc_symbol *symbol = NULL;
        /* "/service/Method" on the wire is "service.Method" in a descriptor. */
        int bytes = snprintf(name, sizeof(name), "%s", methods[i].path + 1);
        char *slash = strrchr(name, '/');
        if (slash && bytes > 0 && (size_t)bytes < sizeof(name)) {
            *slash = '.';
            symbol = rpc_descriptors_symbol(server->descriptors, name);
        }
        server->methods[server->num_methods++] =
            (struct rpc_method){.path = methods[i].path,
                                .handler = methods[i].handler,
                                .request_bytes_max = methods[i].request_bytes_max,
                                .context = context,
                                .known = symbol != NULL,
                                .request_is_single = symbol && symbol->request_is_single,
                                .reply_is_single = symbol && symbol->reply_is_single};
    }
    return RK_OK;
}

/* ---- Life ---- */

enum rk_status rk_rpc_server_start(struct rk_rpc_server *server)
{
    RK_ASSERT(!server->started);
    struct rk_rpc_call *first[ARMED_CALLS] = {NULL};
    enum rk_status status = RK_OK;
    for (size_t i = 0; i < ARMED_CALLS && status == RK_OK; i++) {
        first[i] = rpc_call_create(server);
        status = first[i] ? RK_OK : RK_ERR_NO_MEMORY;
    }
    if (status == RK_OK && rpc_thread_create(&server->keeper, rpc_keeper_main, server) != 0) {
        status = RK_ERR_NO_MEMORY;
    }
    if (status == RK_OK) {
        status = rpc_loop_start(&server->loop);
        if (status != RK_OK) {
            rpc_keeper_stop(server);
        }
    }
    if (status != RK_OK) {
        for (size_t i = 0; i < ARMED_CALLS && first[i]; i++) {
            rpc_call_free(first[i]);
        }
        return status;
    }
    grpc_server_start(server->server);
    pthread_mutex_lock(&server->sync.mutex);
    server->started = true;
    server->live = ARMED_CALLS;
    pthread_mutex_unlock(&server->sync.mutex);
    for (size_t i = 0; i < ARMED_CALLS; i++) {
        first[i]->arrived.done = call_arrived;
        rpc_call_unref(first[i]); /* reclaim arms it */
    }
    return rk_listener_start(server->listener);
}

int rk_rpc_server_port(const struct rk_rpc_server *server)
{
    return rk_listener_port(server->listener);
}

void rk_rpc_server_set_serving(struct rk_rpc_server *server, bool serving)
{
    pthread_mutex_lock(&server->sync.mutex);
    server->serving = serving;
    pthread_cond_broadcast(&server->sync.changed);
    pthread_mutex_unlock(&server->sync.mutex);
}

/* Waits until all calls are out and gRPC has shut down, or until the deadline. */
static bool server_wait_out(struct rk_rpc_server *server, int64_t deadline_ns)
{
    bool in_time = true;
    bool drained = false;
    pthread_mutex_lock(&server->sync.mutex);
    while (!(server->shut_done && server->live == 0) && in_time) {
        if (server->live == 0 && !drained) {
            /* Only connections are left; a peer that sleeps does not hold us up. */
            drained = true;
            int64_t soon = rk_deadline_in_ms(DRAIN_MS);
            deadline_ns = soon < deadline_ns ? soon : deadline_ns;
        }
        in_time = rpc_sync_wait(&server->sync, deadline_ns);
    }
    bool out = server->shut_done && server->live == 0;
    pthread_mutex_unlock(&server->sync.mutex);
    return out;
}

void rk_rpc_server_stop(struct rk_rpc_server *server, int grace_ms)
{
    pthread_mutex_lock(&server->sync.mutex);
    bool first = server->started && !server->stopping;
    server->stopping = server->stopping || first;
    while (!first && server->stopping && !server->stopped) {
        pthread_cond_wait(&server->sync.changed, &server->sync.mutex); /* another thread stops it */
    }
    pthread_cond_broadcast(&server->sync.changed);
    pthread_mutex_unlock(&server->sync.mutex);
    if (!first) {
        return;
    }
    rk_listener_stop(server->listener); /* gRPC takes no socket once it shuts down. */
    RPC_TSAN_RELEASE(&server->shut);
    grpc_server_shutdown_and_notify(server->server, server->loop.queue, &server->shut);
    if (!server_wait_out(server, rk_deadline_in_ms(grace_ms))) {
        grpc_server_cancel_all_calls(server->server);
        while (!server_wait_out(server, rk_deadline_in_ms(STOP_REPORT_MS))) {
            RK_LOG_WARN("rpc_stop_waits", "address=%q reason=%q", server->address,
                        "handlers do not return although their calls are cancelled");
        }
    }
    rpc_keeper_stop(server);
    for (uint32_t i = 0; i < server->num_threads; i++) {
        pthread_join(server->threads[i], NULL);
    }
    pthread_mutex_lock(&server->sync.mutex);
    server->stopped = true;
    pthread_cond_broadcast(&server->sync.changed);
    pthread_mutex_unlock(&server->sync.mutex);
}

void rk_rpc_server_destroy(struct rk_rpc_server *server)
{
    if (!server) {
        return;
    }
    rk_rpc_server_stop(server, 0);
    if (server->server) {
        if (!server->started) {
            RPC_TSAN_RELEASE(&server->shut);
            grpc_server_shutdown_and_notify(server->server, server->loop.queue, &server->shut);
            rpc_loop_run_until(&server->loop, &server->shut_done);
        }
        grpc_server_destroy(server->server);
    }
    rk_listener_destroy(server->listener);
    if (server->credentials) {
        grpc_server_credentials_release(server->credentials);
    }
    rpc_loop_destroy(&server->loop);
    rpc_descriptors_destroy(server->descriptors);
    rk_free(server->threads);
    rk_free(server->address);
    pthread_cond_destroy(&server->work);
    rpc_sync_destroy(&server->sync);
    rk_free(server);
}
