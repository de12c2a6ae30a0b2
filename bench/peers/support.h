/*
 * What the peers in C share: blocking sockets on loopback, and the memory of the raw servers, which
 * move bytes as our service would but look nothing up. Whatever goes wrong ends the process.
 */
#ifndef BENCH_PEERS_SUPPORT_H
#define BENCH_PEERS_SUPPORT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define RAW_PLACE_BYTES_MAX (256u << 20)

/* A call of agent.h on its way to a raw server, as it lies in memory. */
struct raw_request {
    uint64_t first;
    uint64_t batch;
    uint64_t bytes;
    uint64_t put;
};

/*
 * Where its batch * bytes lie, at most RAW_PLACE_BYTES_MAX: a place of their own for values that
 * are read, a place in a ring of memory already touched for fresh ones.
 */
uint8_t *raw_place(const struct raw_request *request);

/* `PROGRAM serve PORT` or `PROGRAM agent PORT`; returns the exit status. */
int raw_main(int argc, char **argv, void (*serve)(int port), int (*agent)(int port));

int socket_connect(int port); /* to 127.0.0.1, without delay */
int socket_listen(int port);
void socket_no_delay(int fd);
/* Sends all; iov is used up. */
void socket_send(int fd, struct iovec *iov, size_t num_iov);
/* 0 if the other end closed before the first byte. */
int socket_receive(int fd, void *data, size_t bytes);

#endif
