/*
 * The store's side of the shm path: one thread, one poll(2) over all readers.
 *
 * A connection has at most one reply under way; until the reader has taken it,
 * nothing more is read from that connection, so a flood fills only the
 * reader's own socket buffer.
 *
 * A pin ends when its reader gives it back or is gone, never because of what
 * the reader said: it goes on reading what it has mapped, and nobody would tell
 * it that the room is another's by then. So only POLLHUP, the closing of the
 * reader's end by itself or by its death, closes a connection with its pins.
 * Whoever breaks the protocol is no longer read from and no longer answered
 * (its end sees the end of the stream), and keeps its pins until it closes.
 */
#include "common/transport/descriptors_internal.h"
#include "common/transport/spin_internal.h"
#include "common/transport/wire_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/descriptors.h"
#include "common/base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define ACCEPT_PAUSE_MS 20
#define IN_BYTES_FIRST  4096u
#define READS_A_TURN    16u /* then the other readers come first */
#define OUTBOX_MAX      (64u << 20)
#define IN_KEPT_MAX     (1u << 20) /* a larger request's memory is given back */

struct pin {
    uint64_t id; /* 0: free */
    void *pin;
};

struct connection {
    int fd; /* -1: free */
    bool greeted;
    bool quiet;          /* neither read from nor answered; only its pins are kept */
    bool fault_unpinned; /* it may release what it has not any more */
    uint8_t *in;
    size_t in_room;
    size_t in_bytes;
    struct wire_buffer out;
    size_t out_begin;
    struct pin *pins;
    uint32_t pins_room;
    uint32_t pins_used;
    int fd_received; /* beside the bytes, not used yet; -1: none */
    const uint8_t *outbox;
    uint64_t outbox_bytes;
    struct rk_intake *intake; /* the put under way */
    uint32_t put_id;
};

struct rk_shm_server {
    struct rk_shm_server_options options;
    char *socket_path;
    int listen_fd;
    int arena_fd; /* opened read-only */
    int wake_fd;
    int spare_fd;                   /* given up to end a connection when no descriptor is left */
    int64_t accept_paused_until_ns; /* not even that worked */
    struct rk_log_limit refusals;
    bool bound;
    bool running;
    pthread_t thread;
    struct connection *connections;
    struct pollfd *polls; /* wake, listen, then one per connection there is */
    struct connection **polled;
    atomic_bool fault_unpin; /* asked for by a test */
    sem_t fault_done;
    struct rk_extent *extents;
    struct rk_get gets[RK_TRANSPORT_ITEMS_MAX];
    uint64_t *offsets;
    uint64_t *checksums;
    uint32_t next_pin;
};

/* ---- Pins ---- */

static void pins_release(struct rk_shm_server *server, struct connection *connection)
{
    for (uint32_t i = 0; i < connection->pins_room; i++) {
        if (connection->pins[i].id != 0) {
            server->options.ops->unpin(server->options.context, connection->pins[i].pin);
        }
    }
    rk_free(connection->pins);
    connection->pins = NULL;
    connection->pins_room = 0;
    connection->pins_used = 0;
}

/* Room for one more pin; NULL when the connection has its maximum or memory is out. */
static struct pin *pin_slot(struct rk_shm_server *server, struct connection *connection)
{
    if (connection->pins_used == connection->pins_room) {
        uint32_t room = connection->pins_room ? connection->pins_room * 2 : 16;
        room = room < server->options.pins_max ? room : server->options.pins_max;
        if (room == connection->pins_room) {
            return NULL;
        }
        struct pin *pins = rk_alloc_resize(connection->pins, room, sizeof(*pins));
        if (!pins) {
            return NULL;
        }
        memset(pins + connection->pins_room, 0, (room - connection->pins_room) * sizeof(*pins));
        connection->pins = pins;
        connection->pins_room = room;
    }
    uint32_t slot = 0;
    while (connection->pins[slot].id != 0) {
        slot++;
    }
    return &connection->pins[slot];
}

/* The low half of an id is its slot plus one, so that finding it is no search. */
static bool pin_drop(struct rk_shm_server *server, struct connection *connection, uint64_t id)
{
    uint32_t slot = (uint32_t)id - 1;
    if (id == 0 || slot >= connection->pins_room || connection->pins[slot].id != id) {
        return false;
    }
    server->options.ops->unpin(server->options.context, connection->pins[slot].pin);
    connection->pins[slot] = (struct pin){0};
    connection->pins_used--;
    return true;
}

/* ---- Connections ---- */

static void close_if_open(int fd)
{
    if (fd >= 0) {
        close(fd);
    }
}

/* All that a reader's requests need; its pins stay. */
static void requests_end(struct connection *connection)
{
    close_if_open(connection->fd_received);
    connection->fd_received = -1;
    rk_intake_destroy(connection->intake);
    connection->intake = NULL;
    if (connection->outbox) {
        munmap((void *)(uintptr_t)connection->outbox, connection->outbox_bytes);
        connection->outbox = NULL;
    }
    rk_free(connection->in);
    connection->in = NULL;
    connection->in_room = connection->in_bytes = 0;
    rk_free(connection->out.data);
    connection->out = (struct wire_buffer){.bytes = 0};
    connection->out_begin = 0;
}

/* Its reader is gone, or the server ends. */
static void connection_close(struct rk_shm_server *server, struct connection *connection)
{
    requests_end(connection);
    close(connection->fd);
    pins_release(server, connection);
    *connection = (struct connection){.fd = -1, .fd_received = -1};
}

/* why NULL: it ended its side, which says nothing of what it still reads. Our own side stays open
 * then, for with both ended a closed peer and a living one look alike. */
static void connection_quiet(struct rk_shm_server *server, struct connection *connection,
                             const char *why)
{
    if (why) {
        RK_LOG_WARN("shm_reader_dropped", "reason=%q pins=%u", why, connection->pins_used);
    }
    if (connection->pins_used == 0) {
        connection_close(server, connection);
        return;
    }
    if (why) {
        (void)shutdown(connection->fd, SHUT_WR);
    }
    requests_end(connection);
    connection->quiet = true;
}

static bool peer_allowed(int fd)
{
    struct ucred peer;
    socklen_t bytes = sizeof(peer);
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 &&
           (peer.uid == geteuid() || peer.uid == 0);
}

/* A thousand a second may want in: one line in ten seconds tells of all. */
static void refusal_log(struct rk_shm_server *server, const char *reason)
{
    unsigned more = 0;
    if (rk_log_allowed(&server->refusals, &more)) {
        RK_LOG_WARN("shm_reader_refused", "reason=%q more=%u", reason, more);
    }
}

static void accept_reader(struct rk_shm_server *server)
{
    int fd = -1;
    enum rk_status status = rk_descriptors_accept(server->listen_fd, &server->spare_fd, &fd);
    if (status == RK_OK && !rk_descriptors_admit(fd, false)) {
        close(fd);
        status = RK_ERR_FULL;
    }
    if (status == RK_ERR_BUSY || status == RK_ERR_IO) { /* It would wake poll at once. */
        server->accept_paused_until_ns = rk_deadline_in_ms(ACCEPT_PAUSE_MS);
    }
    if (status != RK_OK) {
        if (status != RK_ERR_NOT_FOUND) {
            refusal_log(server, "the process has no descriptors for more connections");
        }
        return;
    }
    struct connection *connection = NULL;
    for (uint32_t i = 0; i < server->options.connections_max && !connection; i++) {
        if (server->connections[i].fd < 0) {
            connection = &server->connections[i];
        }
    }
    if (!connection || !peer_allowed(fd)) {
        refusal_log(server, connection ? "another user" : "too many connections");
        close(fd);
        return;
    }
    connection->fd = fd;
}

/* ---- Replies ---- */

/* RK_OK: all is sent, or the rest waits in the connection's buffer. */
static enum rk_status flush(struct connection *connection)
{
    struct wire_buffer *out = &connection->out;
    while (connection->out_begin < out->bytes) {
        ssize_t sent = send(connection->fd, out->data + connection->out_begin,
                            out->bytes - connection->out_begin, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0) {
            return errno == EAGAIN ? RK_OK : RK_ERR_UNAVAILABLE;
        }
        connection->out_begin += (size_t)sent;
    }
    connection->out_begin = 0;
    out->bytes = 0;
    return RK_OK;
}

/* A frame is a header, whose length is filled in at its end, and what is appended between. */
static size_t reply_begin(struct connection *connection)
{
    size_t at = connection->out.bytes;
    (void)wire_append(&connection->out, NULL, sizeof(struct shm_frame_header));
    return at;
}

static enum rk_status reply_end(struct connection *connection, enum shm_frame_type type,
                                uint32_t request_id, size_t at)
{
    struct shm_frame_header header;
    if (connection->out.failed) {
        return RK_ERR_NO_MEMORY;
    }
    shm_header_fill(&header, type, request_id, connection->out.bytes - at - sizeof(header));
    memcpy(connection->out.data + at, &header, sizeof(header));
    return RK_OK;
}

static enum rk_status reply_hello(struct rk_shm_server *server, struct connection *connection,
                                  uint32_t request_id)
{
    struct __attribute__((packed)) {
        struct shm_frame_header header;
        struct shm_hello_reply body;
    } reply = {.body = {.arena_bytes = server->options.arena_bytes,
                        .num_seals = server->options.num_seals,
                        .identity = wire_identity_make(server->options.node_id,
                                                       server->options.incarnation)}};
    shm_header_fill(&reply.header, SHM_HELLO_REPLY, request_id, sizeof(reply.body));

    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = &reply, .iov_len = sizeof(reply)};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes)};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(rights), &server->arena_fd, sizeof(int));
    /* The first bytes on a fresh socket: they fit or the peer is gone. */
    ssize_t sent = sendmsg(connection->fd, &message, MSG_NOSIGNAL);
    if (sent != (ssize_t)sizeof(reply)) {
        return RK_ERR_UNAVAILABLE;
    }
    connection->greeted = true;
    return RK_OK;
}

/* ---- Gets ---- */

/* Pins one item and says so in the reply. Returns the pages it has. */
static uint64_t item_pin(struct rk_shm_server *server, struct connection *connection,
                         const struct rk_get *get, uint64_t pages_max)
{
    struct rk_error error = {.text = ""};
    struct rk_found found = {.pin = NULL};
    struct pin *slot = pin_slot(server, connection);
    if (!slot) { /* An answer, however often: it asked for too much, and what it has it keeps. */
        wire_failure_append(&connection->out, get, RK_ERR_FULL,
                            "this connection holds its maximum of pins");
        return 0;
    }
    enum rk_status status =
        server->options.ops->pin(server->options.context, RK_PATH_SHM, get, pages_max,
                                 server->offsets, server->checksums, &found, &error);
    if (status != RK_OK) {
        wire_failure_append(&connection->out, get, status, error.text);
        return 0;
    }
    if (++server->next_pin == 0) {
        server->next_pin = 1;
    }
    uint64_t index = (uint64_t)(slot - connection->pins);
    *slot = (struct pin){.id = (uint64_t)server->next_pin << 32 | (index + 1), .pin = found.pin};
    connection->pins_used++;
    wire_found_append(&connection->out, &found, slot->id, server->offsets, server->checksums);
    return found.num_pages;
}

static enum rk_status handle_get(struct rk_shm_server *server, struct connection *connection,
                                 const struct shm_frame *frame, const char **ret_why)
{
    size_t count = 0;
    uint64_t pages_left = server->options.pages_max;
    if (wire_gets_parse(frame->body, frame->header.body_bytes, server->extents, server->gets,
                        &count) != RK_OK) {
        *ret_why = "a malformed or too large get";
        return RK_ERR_INVALID;
    }
    size_t at = reply_begin(connection);
    wire_append_count(&connection->out, (uint32_t)count);
    for (size_t i = 0; i < count; i++) {
        pages_left -= item_pin(server, connection, &server->gets[i], pages_left);
    }
    return reply_end(connection, SHM_FOUND, frame->header.request_id, at);
}

/* ---- Puts ---- */

static enum rk_status handle_outbox(struct connection *connection, const struct shm_frame *frame,
                                    const char **ret_why)
{
    struct shm_outbox outbox = {.bytes = 0};
    struct stat info;
    int fd = connection->fd_received;
    connection->fd_received = -1;
    if (frame->header.body_bytes == sizeof(outbox)) {
        memcpy(&outbox, frame->body, sizeof(outbox));
    }
    /* It must not shrink under our reads. */
    int seals = fd >= 0 ? fcntl(fd, F_GET_SEALS) : -1;
    bool good = seals >= 0 && (seals & F_SEAL_SHRINK) && fstat(fd, &info) == 0 &&
                outbox.bytes > 0 && outbox.bytes <= OUTBOX_MAX &&
                (uint64_t)info.st_size >= outbox.bytes && !connection->outbox;
    void *memory = good ? mmap(NULL, outbox.bytes, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    close_if_open(fd);
    if (memory == MAP_FAILED) {
        *ret_why = "an outbox that is none, or is not sealed";
        return RK_ERR_INVALID;
    }
    connection->outbox = memory;
    connection->outbox_bytes = outbox.bytes;
    return RK_OK;
}

static enum rk_status put_finish(struct connection *connection)
{
    struct rk_intake *intake = connection->intake;
    rk_intake_end(intake);
    size_t at = reply_begin(connection);
    wire_append_count(&connection->out, (uint32_t)rk_intake_items(intake));
    for (size_t i = 0; i < rk_intake_items(intake); i++) {
        const char *text = NULL;
        enum rk_status status = rk_intake_result(intake, i, &text);
        wire_result_append(&connection->out, status, text);
    }
    enum rk_status status = reply_end(connection, SHM_RESULTS, connection->put_id, at);
    rk_intake_destroy(intake);
    connection->intake = NULL;
    return status;
}

static enum rk_status handle_put(struct rk_shm_server *server, struct connection *connection,
                                 const struct shm_frame *frame, const char **ret_why)
{
    struct wire_reader reader = {frame->body, frame->header.body_bytes};
    const struct rk_transport_store_ops *ops = server->options.ops;
    uint32_t count = 0;
    *ret_why = "a malformed put";
    if (connection->intake || !connection->outbox || !wire_take(&reader, &count, sizeof(count)) ||
        count == 0 || count > RK_TRANSPORT_ITEMS_MAX) {
        return RK_ERR_INVALID;
    }
    enum rk_status status =
        rk_intake_create(ops, server->options.context, count, &connection->intake);
    if (status != RK_OK) {
        return status;
    }
    connection->put_id = frame->header.request_id;
    for (uint32_t i = 0; i < count; i++) {
        struct rk_error error = {.text = ""};
        const uint8_t *head = NULL;
        uint32_t head_bytes = 0;
        uint32_t page_bytes = 0;
        uint64_t bytes = 0;
        void *put = NULL;
        if (!wire_take_block(&reader, &head, &head_bytes)) {
            return RK_ERR_INVALID;
        }
        status = ops->put_begin(server->options.context, RK_PATH_SHM, head, head_bytes, &put,
                                &bytes, &page_bytes, &error);
        rk_intake_add(connection->intake, status, error.text, put, bytes, page_bytes);
    }
    if (reader.left > 0) {
        return RK_ERR_INVALID;
    }
    return rk_intake_whole(connection->intake) ? put_finish(connection) : RK_OK;
}

static enum rk_status handle_put_data(struct connection *connection, const struct shm_frame *frame,
                                      const char **ret_why)
{
    struct wire_reader reader = {frame->body, frame->header.body_bytes};
    struct shm_put_data data;
    uint64_t checksums[WIRE_FRAME_SUMS_MAX];
    if (!wire_take(&reader, &data, sizeof(data)) || data.num_checksums > WIRE_FRAME_SUMS_MAX ||
        !wire_take(&reader, checksums, data.num_checksums * sizeof(checksums[0])) ||
        reader.left > 0 || data.place > connection->outbox_bytes ||
        data.bytes > connection->outbox_bytes - data.place) {
        *ret_why = "bytes outside of the outbox";
        return RK_ERR_INVALID;
    }
    if (!connection->intake || frame->header.request_id != connection->put_id) {
        return RK_OK; /* Of a put that failed as a whole: its results are on their way. */
    }
    if (rk_intake_write(connection->intake, connection->outbox + data.place, data.bytes, checksums,
                        data.num_checksums) != RK_OK) {
        *ret_why = "other bytes than the put announced";
        return RK_ERR_INVALID;
    }
    enum rk_status status =
        reply_end(connection, SHM_TAKEN, frame->header.request_id, reply_begin(connection));
    return status == RK_OK && rk_intake_whole(connection->intake) ? put_finish(connection) : status;
}

/* ---- Frames ---- */

static enum rk_status handle_release(struct rk_shm_server *server, struct connection *connection,
                                     const struct shm_frame *frame, const char **ret_why)
{
    struct wire_reader reader = {frame->body, frame->header.body_bytes};
    uint64_t pin_id = 0;
    bool good = reader.left > 0;
    while (good && reader.left > 0) {
        good = wire_take(&reader, &pin_id, sizeof(pin_id)) &&
               (pin_drop(server, connection, pin_id) || connection->fault_unpinned);
    }
    if (!good) {
        *ret_why = "a release of what is not pinned";
        return RK_ERR_INVALID;
    }
    return RK_OK;
}

static enum rk_status handle_frame(struct rk_shm_server *server, struct connection *connection,
                                   const struct shm_frame *frame, const char **ret_why)
{
    if (connection->greeted != (frame->header.type != SHM_HELLO)) {
        *ret_why = "a frame out of order";
        return RK_ERR_INVALID;
    }
    switch (frame->header.type) {
    case SHM_HELLO:
        return reply_hello(server, connection, frame->header.request_id);
    case SHM_GET:
        return handle_get(server, connection, frame, ret_why);
    case SHM_OUTBOX:
        return handle_outbox(connection, frame, ret_why);
    case SHM_PUT:
        return handle_put(server, connection, frame, ret_why);
    case SHM_PUT_DATA:
        return handle_put_data(connection, frame, ret_why);
    case SHM_RELEASE:
        return handle_release(server, connection, frame, ret_why);
    default:
        *ret_why = "a frame that readers do not send";
        return RK_ERR_INVALID;
    }
}

/* Handles whole frames until one's reply does not fit the socket. */
static enum rk_status drain_frames(struct rk_shm_server *server, struct connection *connection,
                                   size_t *ret_needed, const char **ret_why)
{
    size_t at = 0;
    enum rk_status status = RK_OK;
    *ret_needed = sizeof(struct shm_frame_header);
    while (connection->out.bytes == 0 && status == RK_OK) {
        struct shm_frame frame;
        status = shm_frame_parse(connection->in + at, connection->in_bytes - at,
                                 SHM_REQUEST_BYTES_MAX, &frame, ret_needed);
        if (status == RK_OK) {
            status = handle_frame(server, connection, &frame, ret_why);
            at += frame.bytes;
            if (status == RK_OK && connection->out.bytes > 0) {
                status = flush(connection);
            }
        } else if (status == RK_ERR_INVALID) {
            *ret_why = "bytes that are no frame";
        }
    }
    if (status != RK_OK && status != RK_ERR_BUSY) {
        return status;
    }
    connection->in_bytes -= at;
    if (at > 0 && connection->in_bytes > 0) {
        memmove(connection->in, connection->in + at, connection->in_bytes);
    }
    if (connection->in_bytes == 0 && connection->fd_received >= 0) {
        *ret_why = "a descriptor beside a frame that takes none";
        return RK_ERR_INVALID;
    }
    if (connection->in_bytes == 0 && connection->in_room > IN_KEPT_MAX) {
        rk_free(connection->in);
        connection->in = NULL;
        connection->in_room = 0;
    }
    return RK_OK;
}

/* Keeps a descriptor that comes beside the bytes, for an OUTBOX. */
static enum rk_status recv_with_descriptor(struct connection *connection, const char **ret_why)
{
    union descriptors_room control;
    int fd = -1;
    struct iovec part = {.iov_base = connection->in + connection->in_bytes,
                         .iov_len = connection->in_room - connection->in_bytes};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes)};
    ssize_t got = recvmsg(connection->fd, &message, MSG_CMSG_CLOEXEC);
    if (got <= 0) {
        bool later = got < 0 && (errno == EAGAIN || errno == EINTR);
        return later ? RK_ERR_BUSY : RK_ERR_UNAVAILABLE;
    }
    connection->in_bytes += (size_t)got;
    if (!descriptors_take(&message, &fd)) {
        *ret_why = "more than one descriptor, or one too many for this process";
        return RK_ERR_INVALID;
    }
    if (fd >= 0 && connection->fd_received >= 0) {
        close(fd);
        *ret_why = "a descriptor before the one before it was used";
        return RK_ERR_INVALID;
    }
    connection->fd_received = fd >= 0 ? fd : connection->fd_received;
    return RK_OK;
}

static enum rk_status read_some(struct connection *connection, size_t needed, const char **ret_why)
{
    size_t room = needed > IN_BYTES_FIRST ? needed : IN_BYTES_FIRST;
    if (room > connection->in_room) {
        uint8_t *in = rk_alloc_resize(connection->in, room, 1);
        if (!in) {
            return RK_ERR_NO_MEMORY;
        }
        connection->in = in;
        connection->in_room = room;
    }
    return recv_with_descriptor(connection, ret_why);
}

static void serve(struct rk_shm_server *server, struct connection *connection, short events)
{
    if (events & POLLHUP) {
        connection_close(server, connection);
        return;
    }
    const char *why = NULL;
    enum rk_status status = RK_OK;
    size_t needed = sizeof(struct shm_frame_header);
    if (events & POLLOUT) {
        status = flush(connection);
    }
    if (status == RK_OK && connection->out.bytes == 0) { /* What was read while one was sent. */
        status = drain_frames(server, connection, &needed, &why);
    }
    for (uint32_t i = 0; i < READS_A_TURN && status == RK_OK && connection->out.bytes == 0; i++) {
        status = read_some(connection, needed, &why);
        if (status == RK_OK) {
            status = drain_frames(server, connection, &needed, &why);
        }
    }
    if (status == RK_ERR_NO_MEMORY) {
        why = "out of memory";
    } else if (status != RK_ERR_INVALID) {
        why = NULL; /* It went, which is no fault; an earlier frame may have left words here. */
    }
    if (status != RK_OK && status != RK_ERR_BUSY) {
        connection_quiet(server, connection, why);
    }
}

/* Fills polls and polled with the connections there are. Returns how many. */
static uint32_t polls_fill(struct rk_shm_server *server)
{
    uint32_t count = 0;
    server->polls[0] = (struct pollfd){.fd = server->wake_fd, .events = POLLIN};
    bool paused = rk_clock_ns() < server->accept_paused_until_ns;
    server->polls[1] = (struct pollfd){.fd = paused ? -1 : server->listen_fd, .events = POLLIN};
    for (uint32_t i = 0; i < server->options.connections_max; i++) {
        struct connection *connection = &server->connections[i];
        if (connection->fd < 0) {
            continue;
        }
        server->polled[count] = connection;
        /* With a reply under way only its end matters; poll reports POLLHUP unasked. */
        short events = connection->out.bytes > 0 ? POLLOUT : POLLIN;
        server->polls[2 + count++] =
            (struct pollfd){.fd = connection->fd, .events = connection->quiet ? 0 : events};
    }
    return count;
}

static void fault_unpin(struct rk_shm_server *server)
{
    for (uint32_t i = 0; i < server->options.connections_max; i++) {
        server->connections[i].fault_unpinned = true;
        pins_release(server, &server->connections[i]);
    }
    RK_ASSERT(sem_post(&server->fault_done) == 0);
}

/* False: the server ends. */
static bool woken(struct rk_shm_server *server)
{
    uint64_t count = 0;
    if (!atomic_exchange(&server->fault_unpin, false)) {
        return false;
    }
    RK_ASSERT(read(server->wake_fd, &count, sizeof(count)) == sizeof(count));
    fault_unpin(server);
    return true;
}

static void *server_thread(void *context)
{
    struct rk_shm_server *server = context;
    struct spin spin = {.until_ns = 0};
    uint32_t count = polls_fill(server);
    for (;;) {
        bool paused = server->polls[1].fd < 0;
        int timeout_ms = paused ? ACCEPT_PAUSE_MS : -1;
        int ready = poll(server->polls, 2 + count, spin_again(&spin) ? 0 : timeout_ms);
        if (ready <= 0) {
            RK_ASSERT(ready == 0 || errno == EINTR || errno == ENOMEM);
            count = paused ? polls_fill(server) : count;
            continue;
        }
        spin_begin(&spin);
        if (server->polls[0].revents && !woken(server)) {
            return NULL;
        }
        for (uint32_t i = 0; i < count; i++) {
            if (server->polls[2 + i].revents) {
                serve(server, server->polled[i], server->polls[2 + i].revents);
            }
        }
        if (server->polls[1].revents) {
            accept_reader(server);
        }
        count = polls_fill(server);
    }
}

/* ---- Life ---- */

static enum rk_status address_fill(const char *path, struct sockaddr_un *ret_address,
                                   struct rk_error *error)
{
    *ret_address = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (path[0] == '\0' || strlen(path) >= sizeof(ret_address->sun_path)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "the socket path \"%s\" must have 1 to %zu bytes", path,
                            sizeof(ret_address->sun_path) - 1);
    }
    memcpy(ret_address->sun_path, path, strlen(path) + 1);
    return RK_OK;
}

/* Makes the last folder of the path if it is missing: for this user only. */
static enum rk_status folder_make(const char *socket_path, struct rk_error *error)
{
    char *folder = rk_alloc_string(socket_path);
    if (!folder) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a path");
    }
    enum rk_status status = RK_OK;
    char *slash = strrchr(folder, '/');
    if (slash && slash != folder) {
        *slash = '\0';
        if (mkdir(folder, 0700) != 0 && errno != EEXIST) {
            status = rk_error_set(error, RK_ERR_IO, "cannot make the folder %s: %s", folder,
                                  strerror(errno));
        }
    }
    rk_free(folder);
    return status;
}

/* A socket that nobody listens on is left over from a crash; anything else is kept. */
static enum rk_status stale_remove(const char *path, const struct sockaddr_un *address,
                                   struct rk_error *error)
{
    struct stat info;
    if (lstat(path, &info) != 0) {
        return RK_OK;
    }
    if (!S_ISSOCK(info.st_mode)) {
        return rk_error_set(error, RK_ERR_IO, "%s exists and is no socket", path);
    }
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool live = fd >= 0 && (connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 ||
                            errno == EAGAIN);
    if (fd >= 0) {
        close(fd);
    }
    if (live) {
        return rk_error_set(error, RK_ERR_EXISTS, "another process serves %s", path);
    }
    if (unlink(path) != 0 && errno != ENOENT) {
        return rk_error_set(error, RK_ERR_IO, "cannot remove the stale %s: %s", path,
                            strerror(errno));
    }
    return RK_OK;
}

static enum rk_status listen_start(struct rk_shm_server *server, struct rk_error *error)
{
    struct sockaddr_un address;
    enum rk_status status = address_fill(server->socket_path, &address, error);
    if (status == RK_OK) {
        status = folder_make(server->socket_path, error);
    }
    if (status == RK_OK) {
        status = stale_remove(server->socket_path, &address, error);
    }
    if (status != RK_OK) {
        return status;
    }
    server->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* The mode set before bind is that of the file, so there is no moment with another one. */
    if (server->listen_fd < 0 || fchmod(server->listen_fd, 0600) != 0 ||
        bind(server->listen_fd, (const struct sockaddr *)&address, sizeof(address)) != 0) {
        return rk_error_set(error, RK_ERR_IO, "cannot bind %s: %s", server->socket_path,
                            strerror(errno));
    }
    server->bound = true;
    if (listen(server->listen_fd, 64) != 0) {
        return rk_error_set(error, RK_ERR_IO, "cannot listen on %s: %s", server->socket_path,
                            strerror(errno));
    }
    return RK_OK;
}

static enum rk_status tables_create(struct rk_shm_server *server, struct rk_error *error)
{
    uint32_t connections_max = server->options.connections_max;
    server->connections = rk_alloc_zero(connections_max, sizeof(*server->connections));
    server->polls = rk_alloc_zero(connections_max + 2, sizeof(*server->polls));
    server->polled = rk_alloc_zero(connections_max, sizeof(struct connection *));
    server->extents = rk_alloc(WIRE_EXTENTS_MAX * sizeof(*server->extents));
    server->offsets = rk_alloc_zero(server->options.pages_max, sizeof(uint64_t));
    server->checksums = rk_alloc_zero(server->options.pages_max, sizeof(uint64_t));
    if (!server->connections || !server->polls || !server->polled || !server->extents ||
        !server->offsets || !server->checksums) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the shm server");
    }
    for (uint32_t i = 0; i < connections_max; i++) {
        server->connections[i] = (struct connection){.fd = -1, .fd_received = -1};
    }
    return RK_OK;
}

static enum rk_status descriptors_open(struct rk_shm_server *server, struct rk_error *error)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", server->options.arena_fd);
    /* Readers get a descriptor that was never open for writing. */
    server->arena_fd = open(path, O_RDONLY | O_CLOEXEC);
    server->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->arena_fd < 0 || server->wake_fd < 0) {
        return rk_error_set(error, RK_ERR_IO, "cannot open the arena for readers: %s",
                            strerror(errno));
    }
    return RK_OK;
}

enum rk_status rk_shm_server_start(const struct rk_shm_server_options *options,
                                   struct rk_shm_server **ret_server, struct rk_error *error)
{
    struct rk_shm_server *server = rk_alloc_zero(1, sizeof(*server));
    if (!server) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the shm server");
    }
    server->options = *options;
    RK_ASSERT(sem_init(&server->fault_done, 0, 0) == 0);
    server->listen_fd = server->arena_fd = server->wake_fd = server->spare_fd = -1;
    struct rk_shm_server_options *set = &server->options;
    set->connections_max = set->connections_max ? set->connections_max : 256;
    set->pins_max = set->pins_max ? set->pins_max : 4096;
    set->pages_max =
        set->pages_max && set->pages_max < WIRE_PAGES_MAX ? set->pages_max : WIRE_PAGES_MAX;
    enum rk_status status = RK_ERR_NO_MEMORY;
    server->socket_path = rk_alloc_string(options->socket_path);
    if (!server->socket_path) {
        rk_error_set(error, status, "no memory for the shm server");
        goto fail;
    }
    status = tables_create(server, error);
    if (status != RK_OK) {
        goto fail;
    }
    status = descriptors_open(server, error);
    if (status != RK_OK) {
        goto fail;
    }
    status = listen_start(server, error);
    if (status != RK_OK) {
        goto fail;
    }
    if (pthread_create(&server->thread, NULL, server_thread, server) != 0) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "cannot start the shm thread");
        goto fail;
    }
    server->running = true;
    *ret_server = server;
    return RK_OK;

fail:
    rk_shm_server_stop(server);
    return status;
}

void rk_shm_server_stop(struct rk_shm_server *server)
{
    if (!server) {
        return;
    }
    if (server->running) {
        uint64_t one = 1;
        RK_ASSERT(write(server->wake_fd, &one, sizeof(one)) == sizeof(one));
        RK_ASSERT(pthread_join(server->thread, NULL) == 0);
        for (uint32_t i = 0; i < server->options.connections_max; i++) {
            if (server->connections[i].fd >= 0) {
                connection_close(server, &server->connections[i]);
            }
        }
    }
    (void)sem_destroy(&server->fault_done);
    if (server->bound) {
        RK_ASSERT(server->socket_path != NULL);
        unlink(server->socket_path);
    }
    close_if_open(server->listen_fd);
    close_if_open(server->arena_fd);
    close_if_open(server->wake_fd);
    close_if_open(server->spare_fd);
    rk_free(server->connections);
    rk_free(server->polls);
    rk_free(server->polled);
    rk_free(server->extents);
    rk_free(server->offsets);
    rk_free(server->checksums);
    rk_free(server->socket_path);
    rk_free(server);
}

void rk_shm_server_fault_unpin(struct rk_shm_server *server)
{
    uint64_t one = 1;
    atomic_store(&server->fault_unpin, true);
    RK_ASSERT(write(server->wake_fd, &one, sizeof(one)) == sizeof(one));
    while (sem_wait(&server->fault_done) != 0) {
        RK_ASSERT(errno == EINTR);
    }
}
