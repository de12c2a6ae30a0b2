/*
 * The reader's side of the shm path: pages are read where the store keeps them.
 *
 * A reply that comes after its get gave up is recognised by its request id and
 * its pin is given back, so a slow store does not cost the connection. A
 * connection that failed stays open while pages are out: closing it is what
 * releases their pins.
 */
#include "common/transport/shm_wire_internal.h"
#include "common/transport/transport_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SEALS_NEEDED (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE)

struct shm_client {
    int fd;
    bool broken; /* out of step with the store: no more requests */
    uint32_t request_id;
    const uint8_t *arena;
    uint64_t arena_bytes;
    uint8_t *in;
    size_t in_room;
    size_t in_bytes;
    uint8_t *request; /* grows to the largest request so far */
    size_t request_room;
};

static enum rk_status lost(struct shm_client *client, struct rk_error *error, const char *what)
{
    client->broken = true;
    return rk_error_set(error, RK_ERR_UNAVAILABLE, "the store's shared memory: %s", what);
}

/* RK_OK: ready. RK_MISS_DEADLINE. */
static enum rk_status wait_for(int fd, short events, int64_t deadline_ns)
{
    for (;;) {
        struct pollfd poll_fd = {.fd = fd, .events = events};
        int left_ms = rk_deadline_left_ms(deadline_ns);
        int ready = poll(&poll_fd, 1, left_ms);
        if (ready > 0) {
            return RK_OK; /* Also for an end or an error: the next call tells which. */
        }
        if (ready == 0 || left_ms == 0) {
            return RK_MISS_DEADLINE;
        }
    }
}

/* A request that was sent in part cannot be taken back, so a deadline breaks the connection. */
static enum rk_status send_all(struct shm_client *client, const void *data, size_t bytes,
                               int64_t deadline_ns, struct rk_error *error)
{
    size_t done = 0;
    while (done < bytes) {
        ssize_t sent = send(client->fd, (const uint8_t *)data + done, bytes - done, MSG_NOSIGNAL);
        if (sent >= 0) {
            done += (size_t)sent;
        } else if (errno == EAGAIN) {
            if (wait_for(client->fd, POLLOUT, deadline_ns) != RK_OK) {
                if (done > 0) {
                    client->broken = true;
                    return rk_error_set(error, RK_ERR_DEADLINE, "the store stopped in a request");
                }
                return RK_MISS_DEADLINE;
            }
        } else if (errno != EINTR) {
            return lost(client, error, strerror(errno));
        }
    }
    return RK_OK;
}

static bool in_reserve(struct shm_client *client, size_t bytes)
{
    if (bytes <= client->in_room) {
        return true;
    }
    uint8_t *in = rk_alloc_resize(client->in, bytes, 1);
    if (!in) {
        return false;
    }
    client->in = in;
    client->in_room = bytes;
    return true;
}

/* One whole frame at the start of client->in; consumed by frame_done. */
static enum rk_status frame_recv(struct shm_client *client, int64_t deadline_ns,
                                 struct shm_frame *ret_frame, struct rk_error *error)
{
    for (;;) {
        size_t needed = 0;
        enum rk_status status =
            shm_frame_parse(client->in, client->in_bytes, SHM_REPLY_BYTES_MAX, ret_frame, &needed);
        if (status == RK_OK) {
            return RK_OK;
        }
        if (status != RK_ERR_BUSY) {
            return lost(client, error, "a reply that is no frame");
        }
        if (!in_reserve(client, needed < 4096 ? 4096 : needed)) {
            client->broken = true;
            return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a reply");
        }
        ssize_t got =
            recv(client->fd, client->in + client->in_bytes, client->in_room - client->in_bytes, 0);
        if (got > 0) {
            client->in_bytes += (size_t)got;
        } else if (got == 0) {
            return lost(client, error, "the store closed the connection");
        } else if (errno == EAGAIN) {
            status = wait_for(client->fd, POLLIN, deadline_ns);
            if (status != RK_OK) {
                return status;
            }
        } else if (errno != EINTR) {
            return lost(client, error, strerror(errno));
        }
    }
}

static void frame_done(struct shm_client *client, const struct shm_frame *frame)
{
    client->in_bytes -= frame->bytes;
    memmove(client->in, client->in + frame->bytes, client->in_bytes);
}

static void pin_release(struct shm_client *client, uint64_t pin_id)
{
    struct __attribute__((packed)) {
        struct shm_frame_header header;
        struct shm_release body;
    } frame = {.body.pin_id = pin_id};
    if (client->broken) {
        return;
    }
    shm_header_fill(&frame.header, SHM_RELEASE, 0, sizeof(frame.body));
    /* A store so far behind that this does not fit has stopped: its pins end with the connection.
     */
    if (send_all(client, &frame, sizeof(frame), 0, NULL) != RK_OK) {
        client->broken = true;
    }
}

/* ---- Connect ---- */

static bool shm_reachable(const struct rk_transport_endpoint *endpoint)
{
    return endpoint->shm_socket && endpoint->shm_socket[0] != '\0' && endpoint->host_id &&
           endpoint->host_id[0] != '\0' && strcmp(endpoint->host_id, rk_host_id()) == 0;
}

static enum rk_status socket_connect(struct shm_client *client, const char *path,
                                     int64_t deadline_ns, struct rk_error *error)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (!path || path[0] == '\0' || strlen(path) >= sizeof(address.sun_path)) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "the store serves no shared memory here");
    }
    memcpy(address.sun_path, path, strlen(path) + 1);
    client->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (client->fd < 0) {
        return lost(client, error, strerror(errno));
    }
    for (;;) {
        if (connect(client->fd, (struct sockaddr *)&address, sizeof(address)) == 0) {
            return RK_OK;
        }
        /* EAGAIN: the store's backlog is full; a Unix socket has no event for its end. */
        if (errno != EAGAIN && errno != EINTR) {
            return rk_error_set(error, RK_ERR_UNAVAILABLE, "cannot connect to %s: %s", path,
                                strerror(errno));
        }
        if (rk_deadline_left_ms(deadline_ns) == 0) {
            return rk_error_set(error, RK_ERR_UNAVAILABLE, "%s does not accept in time", path);
        }
        rk_clock_sleep_ms(1);
    }
}

/* The answer to HELLO with the descriptor beside it. */
static enum rk_status hello_recv(struct shm_client *client, int64_t deadline_ns, int *ret_arena_fd,
                                 struct rk_error *error)
{
    uint8_t bytes[sizeof(struct shm_frame_header) + sizeof(struct shm_hello_reply)];
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = bytes, .iov_len = sizeof(bytes)};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes)};
    if (wait_for(client->fd, POLLIN, deadline_ns) != RK_OK) {
        return lost(client, error, "the store does not answer in time");
    }
    ssize_t got = recvmsg(client->fd, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *rights = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS &&
        rights->cmsg_len == CMSG_LEN(sizeof(int))) {
        memcpy(ret_arena_fd, CMSG_DATA(rights), sizeof(int));
    }
    struct shm_frame frame;
    size_t needed = 0;
    /* So few bytes, sent at once, arrive at once. */
    if (got != (ssize_t)sizeof(bytes) || *ret_arena_fd < 0 ||
        shm_frame_parse(bytes, sizeof(bytes), sizeof(bytes), &frame, &needed) != RK_OK ||
        frame.header.type != SHM_HELLO_REPLY) {
        return lost(client, error, "the store refused the connection");
    }
    struct shm_hello_reply reply;
    memcpy(&reply, frame.body, sizeof(reply));
    client->arena_bytes = reply.arena_bytes;
    return RK_OK;
}

/* Only a file that can neither shrink nor be written by others is read in place. */
static enum rk_status arena_map(struct shm_client *client, int arena_fd, struct rk_error *error)
{
    struct stat info;
    int seals = fcntl(arena_fd, F_GET_SEALS);
    if (fstat(arena_fd, &info) != 0 || client->arena_bytes == 0 ||
        (uint64_t)info.st_size != client->arena_bytes || seals < 0 ||
        (seals & SEALS_NEEDED) != SEALS_NEEDED) {
        return lost(client, error, "its arena is not sealed as it must be");
    }
    void *arena = mmap(NULL, client->arena_bytes, PROT_READ, MAP_SHARED, arena_fd, 0);
    if (arena == MAP_FAILED) {
        return lost(client, error, strerror(errno));
    }
    client->arena = arena;
    return RK_OK;
}

static void shm_destroy(void *connection)
{
    struct shm_client *client = connection;
    if (client->arena) {
        munmap((void *)client->arena, client->arena_bytes);
    }
    if (client->fd >= 0) {
        close(client->fd);
    }
    rk_free(client->in);
    rk_free(client->request);
    rk_free(client);
}

static enum rk_status shm_connect(const struct rk_transport_endpoint *endpoint, int64_t deadline_ns,
                                  void **ret_connection, struct rk_error *error)
{
    int arena_fd = -1;
    struct shm_frame_header hello;
    struct shm_client *client = rk_alloc_zero(1, sizeof(*client));
    if (!client) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a connection");
    }
    client->fd = -1;
    enum rk_status status = socket_connect(client, endpoint->shm_socket, deadline_ns, error);
    if (status != RK_OK) {
        goto fail;
    }
    shm_header_fill(&hello, SHM_HELLO, 0, 0);
    status = send_all(client, &hello, sizeof(hello), deadline_ns, error);
    if (status != RK_OK) {
        goto fail;
    }
    status = hello_recv(client, deadline_ns, &arena_fd, error);
    if (status == RK_OK) {
        status = arena_map(client, arena_fd, error);
    }
    if (arena_fd >= 0) {
        close(arena_fd);
    }
    if (status != RK_OK) {
        goto fail;
    }
    *ret_connection = client;
    return RK_OK;

fail:
    shm_destroy(client);
    return status;
}

/* ---- Get ---- */

static enum rk_status request_send(struct shm_client *client, const struct rk_get *get,
                                   struct rk_error *error)
{
    size_t extents_bytes = get->num_extents * sizeof(struct rk_extent);
    size_t body_bytes = sizeof(struct shm_get) + extents_bytes;
    size_t bytes = sizeof(struct shm_frame_header) + body_bytes;
    if (bytes > client->request_room) {
        uint8_t *request = rk_alloc_resize(client->request, bytes, 1);
        if (!request) {
            return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a request");
        }
        client->request = request;
        client->request_room = bytes;
    }
    struct shm_frame_header header;
    struct shm_get body;
    shm_get_fill(get, &body);
    shm_header_fill(&header, SHM_GET, ++client->request_id, body_bytes);
    memcpy(client->request, &header, sizeof(header));
    memcpy(client->request + sizeof(header), &body, sizeof(body));
    memcpy(client->request + sizeof(header) + sizeof(body), get->extents, extents_bytes);
    return send_all(client, client->request, bytes, get->deadline_ns, error);
}

static enum rk_status pages_read(struct shm_client *client, const struct shm_get_reply *reply,
                                 const uint8_t *wire, uint32_t page_bytes, struct rk_pages *pages,
                                 struct rk_error *error)
{
    for (uint64_t i = 0; i < pages->num_pages; i++) {
        struct shm_page page;
        memcpy(&page, wire + i * sizeof(page), sizeof(page));
        if (page.offset > client->arena_bytes || page_bytes > client->arena_bytes - page.offset) {
            return lost(client, error, "a page outside of its arena");
        }
        pages->pages[i] =
            (struct rk_page){.data = client->arena + page.offset, .checksum = page.checksum};
    }
    pages->hold = (void *)(uintptr_t)reply->pin_id;
    pages->tier = RK_TIER_DRAM;
    return RK_OK;
}

/* *ret_ours: the reply was that of the get under way. */
static enum rk_status reply_read(struct shm_client *client, const struct shm_frame *frame,
                                 const struct rk_get *get, struct rk_pages *pages, bool *ret_ours,
                                 struct rk_error *error)
{
    struct shm_get_reply reply;
    size_t rest = frame->header.body_bytes - sizeof(reply);
    if (frame->header.type != SHM_GET_REPLY || frame->header.body_bytes < sizeof(reply)) {
        return lost(client, error, "a frame out of order");
    }
    memcpy(&reply, frame->body, sizeof(reply));
    *ret_ours = frame->header.request_id == client->request_id;
    if (!*ret_ours) {
        if (!reply.failed) {
            pin_release(client, reply.pin_id);
        }
        return RK_OK;
    }
    if (reply.failed) {
        return shm_failure_parse(frame->body + sizeof(reply), rest, error);
    }
    if (reply.num_pages != pages->num_pages || rest != pages->num_pages * sizeof(struct shm_page)) {
        return lost(client, error, "another number of pages than asked for");
    }
    return pages_read(client, &reply, frame->body + sizeof(reply), get->page_bytes, pages, error);
}

static enum rk_status shm_get(void *connection, const struct rk_get *get, uint64_t num_pages,
                              struct rk_pages *pages, struct rk_error *error)
{
    struct shm_client *client = connection;
    (void)num_pages;
    if (client->broken) {
        return lost(client, error, "the connection failed before");
    }
    enum rk_status status = request_send(client, get, error);
    bool ours = false;
    while (status == RK_OK && !ours) {
        struct shm_frame frame;
        status = frame_recv(client, get->deadline_ns, &frame, error);
        if (status == RK_OK) {
            status = reply_read(client, &frame, get, pages, &ours, error);
            frame_done(client, &frame);
        }
    }
    return status;
}

static void shm_release(void *connection, struct rk_pages *pages)
{
    pin_release(connection, (uint64_t)(uintptr_t)pages->hold);
}

const struct transport_ops transport_shm = {
    .path = RK_PATH_SHM,
    .name = "shm",
    .reachable = shm_reachable,
    .connect = shm_connect,
    .get = shm_get,
    .release = shm_release,
    .destroy = shm_destroy,
};
