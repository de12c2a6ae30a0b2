/*
 * listen: TCP sockets that go on taking connections, whatever befalls.
 *
 * gRPC and libmicrohttpd take connections themselves until the first EMFILE, and then never again
 * or in a busy loop. Here one thread accepts for them and hands over sockets that have said
 * something:
 *
 * - A connection waits here until its first bytes are there and are those of the protocol; who says
 *   nothing, or something else, is ended after a while, or at once when room is short, the oldest
 *   first. So strangers cost the server nothing, and cannot keep others out.
 * - Connections are bounded in number, and leave the process its reserve of descriptors; one over
 *   that is ended at once: its client knows, and tries again.
 * - Each condition is logged when it begins and then every ten seconds, not at each connection.
 * - A listening socket that fails is opened again.
 *
 * Threads: create, start and destroy belong to one thread; on_socket runs on the listener's own.
 */
#ifndef RK_COMMON_LISTEN_LISTEN_H
#define RK_COMMON_LISTEN_LISTEN_H

#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sockaddr;
struct rk_listener;

struct rk_listener_options {
    const char *name;    /* "grpc": in logs and in the answer to who asks for health; kept */
    const char *address; /* host:port; port 0 picks one. A name: all its addresses */
    /* The first bytes of the protocol; NULL: any byte. Kept by pointer, up to 64 bytes. */
    const char *preface;
    uint32_t preface_timeout_ms; /* 0: 10,000 */
    uint32_t pending_max;        /* that said nothing yet; 0: 256 */
    uint32_t connections_max;    /* handed over and still open; 0: 4096 */
    bool of_reserve;             /* may use half of the process's reserve of descriptors */
    uint32_t bind_wait_ms;       /* how long to wait for a port that is in use; 0: not at all */
    /* Takes the socket (non-blocking, close-on-exec, TCP_NODELAY), also when it cannot use it. */
    void (*on_socket)(void *context, int fd, const struct sockaddr *peer, size_t peer_bytes);
    void *context;
};

/* Binds; connections wait in the kernel until start. RK_ERR_IO names the address and why (port in
 * use), RK_ERR_INVALID: it is none. */
RK_MUST_CHECK enum rk_status rk_listener_create(const struct rk_listener_options *options,
                                                struct rk_listener **ret_listener,
                                                struct rk_error *error);
int rk_listener_port(const struct rk_listener *listener);
RK_MUST_CHECK enum rk_status rk_listener_start(struct rk_listener *listener);
/* No connection is taken any more; those handed over stay. */
void rk_listener_stop(struct rk_listener *listener);
void rk_listener_destroy(struct rk_listener *listener); /* stops if needed; accepts NULL */

#endif
