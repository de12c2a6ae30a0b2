/*
 * Request and response over a plain TCP socket: what the kernel's loopback gives, the ceiling of
 * all that goes over TCP.
 *
 *   bench_raw_tcp serve PORT | agent PORT
 */
#include "bench/agent.h"
#include "bench/peers/support.h"

#include <sys/socket.h>
#include <unistd.h>

static void serve(int port)
{
    struct raw_request request;
    int listener = socket_listen(port);
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) {
        agent_fail("accept failed");
    }
    socket_no_delay(fd);
    while (socket_receive(fd, &request, sizeof(request))) {
        struct iovec values = {raw_place(&request), request.batch * request.bytes};
        if (request.put) {
            (void)socket_receive(fd, values.iov_base, values.iov_len);
            values = (struct iovec){&request.first, sizeof(request.first)};
        }
        socket_send(fd, &values, 1);
    }
}

static void get(void *context, uint64_t first, size_t batch, size_t bytes, uint8_t *buffer,
                const uint8_t **ret_values)
{
    int fd = *(int *)context;
    struct raw_request request = {first, batch, bytes, 0};
    struct iovec iov = {&request, sizeof(request)};
    (void)ret_values;
    socket_send(fd, &iov, 1);
    if (!socket_receive(fd, buffer, batch * bytes)) {
        agent_fail("the server is gone");
    }
}

static void put(void *context, uint64_t first, size_t batch, size_t bytes, const uint8_t *data)
{
    int fd = *(int *)context;
    uint64_t done = 0;
    struct raw_request request = {first, batch, bytes, 1};
    struct iovec iov[] = {{&request, sizeof(request)}, {(void *)(uintptr_t)data, batch * bytes}};
    socket_send(fd, iov, 2);
    if (!socket_receive(fd, &done, sizeof(done)) || done != first) {
        agent_fail("the server did not take a put");
    }
}

static int agent(int port)
{
    static const struct agent_peer peer = {.get = get, .put = put};
    int fd = socket_connect(port);
    int status = agent_run(&peer, &fd);
    (void)close(fd);
    return status;
}

int main(int argc, char **argv)
{
    return raw_main(argc, argv, serve, agent);
}
