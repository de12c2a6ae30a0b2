#include "common/base/alloc.h"
#include "common/base/health.h"
#include "common/base/log.h"
#include "common/listen/listen.h"
#include "common/metrics/metrics.h"
#include "common/metrics/metrics_internal.h"

#include <errno.h>
#include <microhttpd.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

/* Scrapers are few; who opens more or dawdles must not cost the service anything. */
#define BIND_WAIT_MS         3000 /* A killed predecessor keeps its port for a moment. */
#define CONNECTIONS_MAX      16
#define CONNECTION_TIMEOUT_S 10

struct rk_metrics_server {
    struct MHD_Daemon *daemon;
    struct rk_listener *listener;
};

static enum MHD_Result reply(struct MHD_Connection *connection, unsigned status,
                             struct MHD_Response *response, const char *content_type)
{
    if (!response) {
        return MHD_NO; /* Out of memory: the connection is closed. */
    }
    enum MHD_Result result =
        MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, content_type);
    if (result == MHD_YES && status == MHD_HTTP_METHOD_NOT_ALLOWED) {
        result = MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
    }
    if (result == MHD_YES) {
        result = MHD_queue_response(connection, status, response);
    }
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result reply_text(struct MHD_Connection *connection, unsigned status, char *text)
{
    return reply(connection, status,
                 MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_PERSISTENT),
                 "text/plain; charset=utf-8");
}

static enum MHD_Result reply_metrics(struct MHD_Connection *connection)
{
    static char no_memory[] = "out of memory\n";
    char *text = rk_metrics_text();
    if (!text) {
        return reply_text(connection, MHD_HTTP_SERVICE_UNAVAILABLE, no_memory);
    }
    struct MHD_Response *response =
        MHD_create_response_from_buffer_with_free_callback(strlen(text), text, rk_free);
    if (!response) {
        rk_free(text);
    }
    return reply(connection, MHD_HTTP_OK, response, "text/plain; version=0.0.4; charset=utf-8");
}

static enum MHD_Result reply_health(struct MHD_Connection *connection)
{
    static char ok[] = "ok\n";
    char trouble[1024];
    if (rk_health_ask(trouble, sizeof(trouble))) {
        return reply_text(connection, MHD_HTTP_OK, ok);
    }
    return reply(connection, MHD_HTTP_SERVICE_UNAVAILABLE,
                 MHD_create_response_from_buffer(strlen(trouble), trouble, MHD_RESPMEM_MUST_COPY),
                 "text/plain; charset=utf-8");
}

/* Answers at its first call, before any body: no answer here depends on one. */
static enum MHD_Result handle(void *closure, struct MHD_Connection *connection, const char *url,
                              const char *method, const char *version, const char *upload_data,
                              size_t *upload_bytes, void **request_state)
{
    static char not_found[] = "not found: try /metrics or /healthz\n";
    static char not_allowed[] = "only GET and HEAD\n";
    (void)closure, (void)version, (void)upload_data, (void)upload_bytes, (void)request_state;

    bool metrics = strcmp(url, "/metrics") == 0;
    if (!metrics && strcmp(url, "/healthz") != 0) {
        return reply_text(connection, MHD_HTTP_NOT_FOUND, not_found);
    }
    if (strcmp(method, MHD_HTTP_METHOD_GET) != 0 && strcmp(method, MHD_HTTP_METHOD_HEAD) != 0) {
        return reply_text(connection, MHD_HTTP_METHOD_NOT_ALLOWED, not_allowed);
    }
    return metrics ? reply_metrics(connection) : reply_health(connection);
}

/* What libmicrohttpd would print is about single connections: a scraper that went away. */
__attribute__((format(printf, 2, 0))) static void log_library(void *closure, const char *format,
                                                              va_list args)
{
    char text[256];
    (void)closure;
    (void)vsnprintf(text, sizeof(text), format, args);
    RK_LOG_DEBUG("metrics_http", "text=%q", text);
}

static void take_socket(void *context, int fd, const struct sockaddr *peer, size_t peer_bytes)
{
    struct rk_metrics_server *server = context;
    (void)MHD_add_connection(server->daemon, fd, peer, (socklen_t)peer_bytes); /* closes it else */
}

enum rk_status rk_metrics_server_start(const char *address, struct rk_metrics_server **ret_server,
                                       struct rk_error *error)
{
    enum rk_status status = RK_OK;
    struct rk_metrics_server *server = rk_alloc_zero(1, sizeof(*server));

    if (!server) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "metrics: out of memory");
    }
    struct rk_listener_options options = {.name = "metrics",
                                          .address = address,
                                          .bind_wait_ms = BIND_WAIT_MS,
                                          .pending_max = CONNECTIONS_MAX,
                                          .connections_max = CONNECTIONS_MAX,
                                          .preface_timeout_ms = CONNECTION_TIMEOUT_S * 1000,
                                          .of_reserve = true,
                                          .on_socket = take_socket,
                                          .context = server};
    status = rk_listener_create(&options, &server->listener, error);
    if (status != RK_OK) {
        rk_error_prefix(error, "metrics");
        goto fail;
    }
    rk_metrics_process_register();
    /* The logger comes first: it takes effect for the options after it. */
    server->daemon = MHD_start_daemon(
        MHD_USE_AUTO_INTERNAL_THREAD | MHD_USE_NO_LISTEN_SOCKET | MHD_USE_ITC | MHD_USE_ERROR_LOG,
        0, NULL, NULL, handle, server, MHD_OPTION_EXTERNAL_LOGGER, log_library, NULL,
        MHD_OPTION_CONNECTION_LIMIT, (unsigned)CONNECTIONS_MAX, MHD_OPTION_CONNECTION_TIMEOUT,
        (unsigned)CONNECTION_TIMEOUT_S, MHD_OPTION_END);
    if (!server->daemon) {
        status = rk_error_set(error, RK_ERR_IO, "metrics: cannot start the HTTP thread for %s: %s",
                              address, strerror(errno));
        goto fail;
    }
    status = rk_listener_start(server->listener);
    if (status != RK_OK) {
        (void)rk_error_set(error, status, "metrics: no thread to listen on %s", address);
        goto fail;
    }
    *ret_server = server;
    return RK_OK;

fail:
    rk_metrics_server_stop(server);
    return status;
}

int rk_metrics_server_port(const struct rk_metrics_server *server)
{
    return rk_listener_port(server->listener);
}

void rk_metrics_server_stop(struct rk_metrics_server *server)
{
    if (!server) {
        return;
    }
    if (server->listener) {
        rk_listener_stop(server->listener);
    }
    if (server->daemon) {
        MHD_stop_daemon(server->daemon);
    }
    rk_listener_destroy(server->listener);
    rk_free(server);
}
