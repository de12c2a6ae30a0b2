#include "common/listen/listen_internal.h"

#include "common/base/address.h"
#include "common/base/clock.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define BACKLOG       1024
#define WAIT_SLICE_MS 100

static void port_set(struct sockaddr_storage *address, uint16_t port)
{
    if (address->ss_family == AF_INET6) {
        ((struct sockaddr_in6 *)address)->sin6_port = htons(port);
    } else {
        ((struct sockaddr_in *)address)->sin_port = htons(port);
    }
}

static uint16_t port_get(const struct sockaddr_storage *address)
{
    return ntohs(address->ss_family == AF_INET6 ? ((const struct sockaddr_in6 *)address)->sin6_port
                                                : ((const struct sockaddr_in *)address)->sin_port);
}

int listen_socket_open(struct listen_socket *socket_)
{
    int on = 1;
    int off = 0;
    int fd = socket(socket_->address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return errno;
    }
    /* A daemon that restarts may take its port back at once; one that lives keeps it. */
    bool set = setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) == 0;
    /* Sockets that are accepted inherit it. */
    set = set && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0;
    if (socket_->address.ss_family == AF_INET6) { /* [::] is all interfaces, of both sorts. */
        set = set && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off)) == 0;
    }
    socklen_t bytes = sizeof(socket_->address);
    if (!set || bind(fd, (const struct sockaddr *)&socket_->address, socket_->address_bytes) != 0 ||
        listen(fd, BACKLOG) != 0 ||
        getsockname(fd, (struct sockaddr *)&socket_->address, &bytes) != 0) {
        int cause = errno;
        (void)close(fd);
        return cause;
    }
    socket_->fd = fd;
    return 0;
}

static void sockets_close(struct listen_socket *sockets, size_t num_sockets)
{
    for (size_t i = 0; i < num_sockets; i++) {
        (void)close(sockets[i].fd);
    }
}

/* 0 once at least one address listens; those that this machine does not have are passed over. One
 * that is in use fails all: callers of the name would reach somebody else. */
static int bind_all(const struct addrinfo *found, uint16_t port, struct listen_socket *sockets,
                    size_t *ret_num_sockets)
{
    size_t num = 0;
    int cause = 0;
    for (const struct addrinfo *at = found; at && num < LISTEN_ADDRESSES_MAX; at = at->ai_next) {
        if (at->ai_family != AF_INET && at->ai_family != AF_INET6) {
            continue;
        }
        struct listen_socket *one = &sockets[num];
        *one = (struct listen_socket){.fd = -1, .address_bytes = at->ai_addrlen};
        memcpy(&one->address, at->ai_addr, at->ai_addrlen);
        port_set(&one->address, port);
        int failure = listen_socket_open(one);
        if (failure == 0) {
            port = port_get(&one->address); /* If any was asked for, the others take the same. */
            num++;
        } else if (failure == EADDRNOTAVAIL || failure == EAFNOSUPPORT) {
            cause = failure;
        } else {
            sockets_close(sockets, num);
            return failure;
        }
    }
    if (num == 0) {
        return cause ? cause : EADDRNOTAVAIL;
    }
    *ret_num_sockets = num;
    return 0;
}

enum rk_status listen_bind(const char *address, uint32_t wait_ms, struct listen_socket *ret_sockets,
                           size_t *ret_num_sockets, int *ret_port, struct rk_error *error)
{
    struct rk_address parsed;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV | AI_PASSIVE};
    struct addrinfo *found = NULL;
    char port[8];
    enum rk_status status = rk_address_parse(address, RK_ADDRESS_LISTEN, &parsed, error);
    if (status != RK_OK) {
        return status;
    }
    (void)snprintf(port, sizeof(port), "%u", parsed.port);
    int failed = getaddrinfo(parsed.host, port, &hints, &found);
    if (failed != 0) {
        return rk_error_set(error, RK_ERR_IO, "cannot resolve %s: %s", address,
                            gai_strerror(failed));
    }
    int64_t deadline_ns = rk_deadline_in_ms(wait_ms);
    int cause = bind_all(found, parsed.port, ret_sockets, ret_num_sockets);
    /* A predecessor that was killed gives up its memory first, then its port. */
    while (cause == EADDRINUSE && parsed.port != 0 && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(WAIT_SLICE_MS);
        cause = bind_all(found, parsed.port, ret_sockets, ret_num_sockets);
    }
    freeaddrinfo(found);
    if (cause != 0) {
        return rk_error_set(error, RK_ERR_IO, "cannot listen on %s: %s", address,
                            strerrordesc_np(cause));
    }
    *ret_port = port_get(&ret_sockets[0].address);
    return RK_OK;
}
