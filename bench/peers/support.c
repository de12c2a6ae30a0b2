#include "bench/peers/support.h"

#include "bench/agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define SIZES_MAX 16

static uint8_t *region_map(int flags)
{
    uint8_t *region = mmap(NULL, RAW_PLACE_BYTES_MAX, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
    if (region == MAP_FAILED) {
        agent_fail("no memory: %s", strerror(errno));
    }
    return region;
}

uint8_t *raw_place(const struct raw_request *request)
{
    static uint8_t *fresh;
    static struct {
        uint64_t bytes;
        uint8_t *region;
    } sizes[SIZES_MAX];
    uint64_t all = request->batch * request->bytes;
    uint64_t first = request->first & ~AGENT_FRESH;
    if (request->first != first) {
        fresh = fresh ? fresh : region_map(MAP_POPULATE);
        return fresh + first / request->batch % (RAW_PLACE_BYTES_MAX / all) * all;
    }
    for (size_t i = 0; i < SIZES_MAX; i++) {
        if (sizes[i].bytes == 0) {
            sizes[i].bytes = request->bytes;
            sizes[i].region = region_map(0);
        }
        if (sizes[i].bytes == request->bytes) {
            return sizes[i].region + first * request->bytes;
        }
    }
    agent_fail("more than %d sizes", SIZES_MAX);
}

int raw_main(int argc, char **argv, void (*serve)(int port), int (*agent)(int port))
{
    int port = argc == 3 ? (int)strtol(argv[2], NULL, 10) : 0;
    if (port > 0 && strcmp(argv[1], "serve") == 0) {
        serve(port);
        return 0;
    }
    if (port > 0 && strcmp(argv[1], "agent") == 0) {
        return agent(port);
    }
    (void)fprintf(stderr, "usage: %s serve|agent PORT\n", argv[0]);
    return 2;
}

static struct sockaddr_in loopback(int port)
{
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons((uint16_t)port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

void socket_no_delay(int fd)
{
    int on = 1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

int socket_connect(int port)
{
    struct sockaddr_in address = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        agent_fail("cannot connect to port %d: %s", port, strerror(errno));
    }
    socket_no_delay(fd);
    return fd;
}

int socket_listen(int port)
{
    struct sockaddr_in address = loopback(port);
    int on = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
        bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0 || listen(fd, 8) != 0) {
        agent_fail("cannot listen on port %d: %s", port, strerror(errno));
    }
    return fd;
}

void socket_send(int fd, struct iovec *iov, size_t num_iov)
{
    while (num_iov > 0) {
        const struct msghdr message = {.msg_iov = iov, .msg_iovlen = num_iov};
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            agent_fail("send: %s", strerror(errno));
        }
        size_t left = (size_t)sent;
        for (; num_iov > 0 && left >= iov->iov_len; iov++, num_iov--) {
            left -= iov->iov_len;
        }
        if (num_iov > 0) {
            iov->iov_base = (uint8_t *)iov->iov_base + left;
            iov->iov_len -= left;
        }
    }
}

int socket_receive(int fd, void *data, size_t bytes)
{
    size_t done = 0;
    while (done < bytes) {
        ssize_t got = recv(fd, (uint8_t *)data + done, bytes - done, 0);
        if (got == 0 && done == 0) {
            return 0;
        }
        if (got <= 0) {
            agent_fail("receive: %s", got == 0 ? "closed" : strerror(errno));
        }
        done += (size_t)got;
    }
    return 1;
}
