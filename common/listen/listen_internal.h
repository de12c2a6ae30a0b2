/* listen_internal: what bind.c makes and listen.c serves. */
#ifndef RK_COMMON_LISTEN_LISTEN_INTERNAL_H
#define RK_COMMON_LISTEN_LISTEN_INTERNAL_H

#include "common/listen/listen.h"

#include <sys/socket.h>

#define LISTEN_ADDRESSES_MAX 8

/* One of the addresses that a name stands for. */
struct listen_socket {
    int fd; /* -1: failed, to be opened again */
    struct sockaddr_storage address;
    socklen_t address_bytes;
    int64_t paused_until_ns; /* not asked for connections before */
};

/* Opens it (again) at its address. 0, or the errno. */
int listen_socket_open(struct listen_socket *socket);
/* All that the address stands for, on one port; waits up to wait_ms while it is in use. */
RK_MUST_CHECK enum rk_status listen_bind(const char *address, uint32_t wait_ms,
                                         struct listen_socket *ret_sockets, size_t *ret_num_sockets,
                                         int *ret_port, struct rk_error *error);

#endif
