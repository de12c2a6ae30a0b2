#include "common/base/address.h"
#include "common/base/alloc.h"
#include "common/base/log.h"
#include "common/metrics/metrics.h"
#include "common/metrics/metrics_internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Scrapers are few; who opens more or dawdles must not cost the service anything. */
#define CONNECTIONS_MAX      16
#define CONNECTION_TIMEOUT_S 10

struct rk_metrics_server {
    struct MHD_Daemon *daemon;
    int listener; /* -1 once the daemon owns it */
    int port;
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

/* Answers at its first call, before any body: no answer here depends on one. */
static enum MHD_Result handle(void *closure, struct MHD_Connection *connection, const char *url,
                              const char *method, const char *version, const char *upload_data,
                              size_t *upload_bytes, void **request_state)
{
    static char ok[] = "ok\n";
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
    return metrics ? reply_metrics(connection) : reply_text(connection, MHD_HTTP_OK, ok);
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

/* A socket that listens on one resolved address; -1 with errno set when it cannot. */
static int listen_on(const struct addrinfo *info)
{
    int one = 1;
    int fd = socket(info->ai_family, info->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK,
                    info->ai_protocol);
    if (fd < 0) {
        return -1;
    }
    /* A daemon that restarts may take its port back at once; one that lives keeps it. */
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) == 0 &&
        bind(fd, info->ai_addr, info->ai_addrlen) == 0 && listen(fd, CONNECTIONS_MAX) == 0) {
        return fd;
    }
    int cause = errno;
    (void)close(fd);
    errno = cause;
    return -1;
}

static int port_of(int fd)
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } bound = {.v6 = {0}};
    socklen_t length = sizeof(bound);
    if (getsockname(fd, &bound.any, &length) != 0) {
        return 0;
    }
    return ntohs(bound.any.sa_family == AF_INET6 ? bound.v6.sin6_port : bound.v4.sin_port);
}

static enum rk_status listen_at(const char *text, int *ret_fd, struct rk_error *error)
{
    struct rk_address address;
    char port[8];
    struct addrinfo *info = NULL;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV | AI_PASSIVE};
    enum rk_status status = rk_address_parse(text, RK_ADDRESS_LISTEN, &address, error);

    if (status != RK_OK) {
        return status;
    }
    (void)snprintf(port, sizeof(port), "%u", address.port);
    int failed = getaddrinfo(address.host, port, &hints, &info);
    if (failed != 0) {
        return rk_error_set(error, RK_ERR_IO, "metrics: cannot resolve %s: %s", text,
                            gai_strerror(failed));
    }
    int fd = listen_on(info); /* A name of several addresses: the first, as the resolver orders. */
    int cause = errno;
    freeaddrinfo(info);
    if (fd < 0) {
        return rk_error_set(error, RK_ERR_IO, "metrics: cannot listen on %s: %s", text,
                            strerror(cause));
    }
    *ret_fd = fd;
    return RK_OK;
}

enum rk_status rk_metrics_server_start(const char *address, struct rk_metrics_server **ret_server,
                                       struct rk_error *error)
{
    enum rk_status status = RK_OK;
    struct rk_metrics_server *server = rk_alloc_zero(1, sizeof(*server));

    if (!server) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "metrics: out of memory");
    }
    server->listener = -1;
    status = listen_at(address, &server->listener, error);
    if (status != RK_OK) {
        goto fail;
    }
    server->port = port_of(server->listener);
    rk_metrics_process_register();
    /* The logger comes first: it takes effect for the options after it. */
    server->daemon = MHD_start_daemon(
        MHD_USE_AUTO_INTERNAL_THREAD | MHD_USE_ERROR_LOG, 0, NULL, NULL, handle, server,
        MHD_OPTION_EXTERNAL_LOGGER, log_library, NULL, MHD_OPTION_LISTEN_SOCKET, server->listener,
        MHD_OPTION_CONNECTION_LIMIT, (unsigned)CONNECTIONS_MAX, MHD_OPTION_CONNECTION_TIMEOUT,
        (unsigned)CONNECTION_TIMEOUT_S, MHD_OPTION_END);
    if (!server->daemon) {
        status = rk_error_set(error, RK_ERR_IO, "metrics: cannot start the HTTP thread for %s: %s",
                              address, strerror(errno));
        goto fail;
    }
    server->listener = -1;
    *ret_server = server;
    return RK_OK;

fail:
    rk_metrics_server_stop(server);
    return status;
}

int rk_metrics_server_port(const struct rk_metrics_server *server)
{
    return server->port;
}

void rk_metrics_server_stop(struct rk_metrics_server *server)
{
    if (!server) {
        return;
    }
    if (server->daemon) {
        MHD_stop_daemon(server->daemon);
    }
    if (server->listener >= 0) {
        (void)close(server->listener);
    }
    rk_free(server);
}
