/*
 * ucx_internal: what both ends of the UCX path share.
 *
 * libucp is loaded when the path is first used, not linked: programs that never
 * use it don't pay for it, a machine without it has one path less, and its
 * settings (no signal handlers, no memory hooks, no words on standard output)
 * can be made before it reads them.
 *
 * One worker, with a context of its own, for each client connection and for the
 * server. A context is held to the network device that reaches its peer, for
 * UCX would listen on all others too. Only tcp for now: over it UCX's one-sided
 * calls check nothing (a wild address crashes the target), so pages move in
 * active messages that the receiver validates.
 *
 * Frames: UCX_HELLO both ways, the store's with who it is (struct wire_identity) as its data.
 * UCX_GET with the items asked for is answered by UCX_FOUND, then UCX_DATA as often as needed: the
 * bytes of all that was found, back to back. UCX_PUT with the heads is followed by UCX_PUT_DATA in
 * the same way, without waiting, and answered by UCX_RESULTS. Bodies are those of wire_internal.h.
 * Every frame names its request, data frames their place in its stream of bytes.
 *
 * A data frame fits one of UCX's receive buffers (64 KiB over tcp), so that its
 * handler has the bytes in the cache, straight from the socket, and copies them
 * only once. Over tcp that beats rendezvous (3.9 to 3.3 GB/s at 1 MiB), which is
 * for transports that write from afar and protect memory.
 */
#ifndef RK_COMMON_TRANSPORT_UCX_INTERNAL_H
#define RK_COMMON_TRANSPORT_UCX_INTERNAL_H

#include "common/transport/spin_internal.h"
#include "common/transport/wire_internal.h"

#include <sys/socket.h>
#include <ucp/api/ucp.h>

#define UCX_MAGIC            0x58444e52u /* "RNDX" */
#define UCX_VERSION          3
#define UCX_FRAME_BYTES      (60u << 10)  /* of data in one frame */
#define UCX_RENDEZVOUS_BYTES (256u << 10) /* at least, and in one frame */
#define UCX_PARTS_MAX        64u          /* runs of bytes in one frame */

/* X(name): the functions of libucp and libucs that are used. */
#define UCX_FUNCTIONS(X)                                                                           \
    X(ucp_am_recv_data_nbx)                                                                        \
    X(ucp_am_send_nbx)                                                                             \
    X(ucp_cleanup)                                                                                 \
    X(ucp_config_modify)                                                                           \
    X(ucp_config_read)                                                                             \
    X(ucp_config_release)                                                                          \
    X(ucp_ep_close_nbx)                                                                            \
    X(ucp_ep_create)                                                                               \
    X(ucp_init_version)                                                                            \
    X(ucp_listener_create)                                                                         \
    X(ucp_listener_destroy)                                                                        \
    X(ucp_listener_query)                                                                          \
    X(ucp_listener_reject)                                                                         \
    X(ucp_request_check_status)                                                                    \
    X(ucp_request_free)                                                                            \
    X(ucp_worker_arm)                                                                              \
    X(ucp_worker_create)                                                                           \
    X(ucp_worker_destroy)                                                                          \
    X(ucp_worker_get_efd)                                                                          \
    X(ucp_worker_progress)                                                                         \
    X(ucp_worker_set_am_recv_handler)                                                              \
    X(ucs_status_string)

struct ucx_api {
#define UCX_MEMBER(name) __typeof__(&(name)) name;
    UCX_FUNCTIONS(UCX_MEMBER)
#undef UCX_MEMBER
};

/* Loads libucp once. RK_ERR_UNSUPPORTED: it is not there. Any thread. */
RK_MUST_CHECK enum rk_status ucx_api_get(const struct ucx_api **ret_api, struct rk_error *error);

struct ucx_address {
    struct sockaddr_storage storage;
    socklen_t bytes;
};
RK_MUST_CHECK enum rk_status ucx_address_resolve(const char *text, struct ucx_address *ret_address,
                                                 struct rk_error *error);

struct ucx_worker {
    const struct ucx_api *api;
    ucp_context_h context;
    ucp_worker_h worker;
    int efd;
    struct spin spin;
};

/* For a peer at, or a listener on, this address. Destroy accepts a zeroed one. */
RK_MUST_CHECK enum rk_status ucx_worker_create(const struct ucx_address *address,
                                               struct ucx_worker *ret_worker,
                                               struct rk_error *error);
void ucx_worker_destroy(struct ucx_worker *worker);
/* Whether transports other than tcp may be used: those that write from afar. */
bool ucx_one_sided(void);
RK_MUST_CHECK enum rk_status ucx_worker_handle(struct ucx_worker *worker, unsigned id,
                                               ucp_am_recv_callback_t handler, void *context,
                                               struct rk_error *error);
/* Makes progress; if there was none for a moment, sleeps until there can be some, wake_fd (or -1)
 * is readable or the deadline passes. */
void ucx_worker_wait(struct ucx_worker *worker, int wake_fd, int64_t deadline_ns);
/* Ends an endpoint at once: what is under way on it ends with an error in later progress. Waits
 * for the end, at most until the deadline. */
void ucx_endpoint_kill(struct ucx_worker *worker, ucp_ep_h endpoint, int64_t deadline_ns);

enum ucx_frame_id {
    UCX_HELLO = 1,
    UCX_GET = 2,
    UCX_FOUND = 3,
    UCX_DATA = 4,
    UCX_PUT = 5,
    UCX_PUT_DATA = 6,
    UCX_RESULTS = 7,
};

struct __attribute__((packed)) ucx_hello {
    uint32_t magic;
    uint32_t version;
};

/* Of GET and PUT. */
struct __attribute__((packed)) ucx_request {
    uint32_t magic;
    uint32_t request_id;
    uint32_t timeout_ms; /* who asks gives up after it */
};

/* Of FOUND and RESULTS. */
struct __attribute__((packed)) ucx_reply {
    uint32_t magic;
    uint32_t request_id;
};

/* Of DATA and PUT_DATA; with the latter so many checksums (u64) follow. */
struct __attribute__((packed)) ucx_data {
    uint32_t magic;
    uint32_t request_id;
    uint64_t offset;
    uint32_t num_checksums;
};

#endif
