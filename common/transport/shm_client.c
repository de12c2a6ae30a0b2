/*
 * The client's side of the shm path: pages are read where the store keeps them,
 * and what is put is handed over in an outbox, memory of ours that the store
 * maps.
 *
 * A reply that comes after its get gave up is recognised by its request id and
 * its pin is given back, so a slow store does not cost the connection. A
 * connection that failed stays open while pages are out: closing it is what
 * releases their pins.
 */
#include "common/transport/descriptors_internal.h"
#include "common/transport/spin_internal.h"
#include "common/transport/transport_internal.h"
#include "common/transport/wire_internal.h"

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
#define OUTBOX_SLOTS 4u
#define SLOT_BYTES   (512u << 10)
#define SLOT_PARTS   1024u

struct shm_client {
    int fd;
    bool broken; /* out of step with the store: no more requests */
    struct spin spin;
    uint32_t request_id;
    const uint8_t *arena;
    uint64_t arena_bytes;
    const uint64_t *seals; /* behind the arena */
    uint64_t num_seals;
    uint8_t *in;
    size_t in_room;
    size_t in_bytes;
    struct wire_buffer request;
    /* Pins that were given back and that the store has not been told of, for its socket was full:
     * those of the frame that is on its way, and those behind it. */
    struct wire_buffer release;
    size_t release_begin;
    uint64_t *returned; /* room for all pins that may be ours */
    size_t returned_room;
    size_t num_returned;
    size_t pins_max; /* so many may be ours */
    uint8_t *outbox; /* NULL: nothing was put yet */
    uint32_t slots_sent;
    uint32_t slots_taken;
};

static enum rk_status lost(struct shm_client *client, struct rk_error *error, const char *what)
{
    client->broken = true;
    return rk_error_set(error, RK_ERR_UNAVAILABLE, "the store's shared memory: %s", what);
}

/* RK_OK: ready. RK_ERR_DEADLINE, RK_ERR_CANCELLED. */
static enum rk_status wait_for(struct shm_client *client, short events,
                               const struct rk_until *until)
{
    spin_begin(&client->spin);
    for (;;) {
        struct pollfd poll_fd = {.fd = client->fd, .events = events};
        int left_ms = rk_deadline_left_ms(rk_until_slice_ns(until));
        int ready = poll(&poll_fd, 1, left_ms > 0 && spin_again(&client->spin) ? 0 : left_ms);
        if (ready > 0) {
            spin_begin(&client->spin); /* It was not in vain. */
            return RK_OK;              /* Also for an end or an error: the next call tells which. */
        }
        enum rk_status over = rk_until_over(until);
        if (over != RK_OK) {
            return over;
        }
    }
}

/* A request that was sent in part cannot be taken back, so giving up breaks the connection. */
static enum rk_status send_all(struct shm_client *client, const void *data, size_t bytes,
                               const struct rk_until *until, struct rk_error *error)
{
    size_t done = 0;
    while (done < bytes) {
        ssize_t sent = send(client->fd, (const uint8_t *)data + done, bytes - done, MSG_NOSIGNAL);
        if (sent >= 0) {
            done += (size_t)sent;
        } else if (errno == EAGAIN) {
            enum rk_status status = wait_for(client, POLLOUT, until);
            if (status != RK_OK) {
                client->broken = client->broken || done > 0;
                return rk_error_set(error, status, "the store stopped in a request");
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
static enum rk_status frame_recv(struct shm_client *client, const struct rk_until *until,
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
            status = wait_for(client, POLLIN, until);
            if (status != RK_OK) {
                return rk_error_set(error, status, "the store did not answer in time");
            }
        } else if (errno != EINTR) {
            return lost(client, error, strerror(errno));
        }
    }
}

static void frame_done(struct shm_client *client, const struct shm_frame *frame)
{
    client->in_bytes -= frame->bytes;
    if (client->in_bytes > 0) {
        memmove(client->in, client->in + frame->bytes, client->in_bytes);
    }
}

/* ---- Pins that are given back ---- */

/* Before a get: whatever it pins can be given back later without asking for memory. */
static bool returns_reserve(struct shm_client *client, size_t more)
{
    size_t needed = client->pins_max + more;
    if (needed > client->returned_room) {
        size_t room = needed > 2 * client->returned_room ? needed : 2 * client->returned_room;
        uint64_t *returned = rk_alloc_resize(client->returned, room, sizeof(*returned));
        if (!returned) {
            return false;
        }
        client->returned = returned;
        client->returned_room = room;
    }
    client->pins_max = needed;
    return true;
}

/* The next frame with all of them; false: there are none, or no memory for it now. */
static bool release_make(struct shm_client *client)
{
    struct shm_frame_header header;
    size_t bytes = client->num_returned * sizeof(client->returned[0]);
    client->release.bytes = client->release_begin = 0;
    client->release.failed = false;
    if (bytes == 0) {
        return false;
    }
    shm_header_fill(&header, SHM_RELEASE, 0, bytes);
    (void)wire_append(&client->release, &header, sizeof(header));
    (void)wire_append(&client->release, client->returned, bytes);
    if (client->release.failed) {
        client->release.bytes = 0;
        return false;
    }
    client->pins_max -= client->num_returned;
    client->num_returned = 0;
    return true;
}

/* Without waiting. RK_ERR_BUSY: the socket takes no more for now. RK_ERR_UNAVAILABLE. */
static enum rk_status returns_flush(struct shm_client *client)
{
    for (;;) {
        while (client->release_begin < client->release.bytes) {
            ssize_t sent = send(client->fd, client->release.data + client->release_begin,
                                client->release.bytes - client->release_begin, MSG_NOSIGNAL);
            if (sent >= 0) {
                client->release_begin += (size_t)sent;
            } else if (errno == EAGAIN) {
                return RK_ERR_BUSY;
            } else if (errno != EINTR) {
                client->broken = true; /* The store is gone, and the pins with it. */
                return RK_ERR_UNAVAILABLE;
            }
        }
        if (!release_make(client)) {
            return RK_OK;
        }
    }
}

/* Before a request, which must not come into the middle of a frame: until all is out. */
static enum rk_status returns_send(struct shm_client *client, const struct rk_until *until,
                                   struct rk_error *error)
{
    for (;;) {
        enum rk_status status = returns_flush(client);
        if (status == RK_ERR_UNAVAILABLE) {
            return lost(client, error, "the store closed the connection");
        }
        if (status == RK_OK) {
            return RK_OK;
        }
        status = wait_for(client, POLLOUT, until);
        if (status != RK_OK) { /* What has not left yet leaves before the next request. */
            return rk_error_set(error, status, "the store did not take a request in time");
        }
    }
}

/* Never waits, never fails and never costs the connection: what the socket does not take now goes
 * with the next request. */
static void pins_release(struct shm_client *client, const uint64_t *pin_ids, size_t count)
{
    if (client->broken || count == 0) {
        return; /* They end with the connection. */
    }
    RK_ASSERT(count <= client->returned_room - client->num_returned);
    memcpy(client->returned + client->num_returned, pin_ids, count * sizeof(pin_ids[0]));
    client->num_returned += count;
    (void)returns_flush(client);
}

/* ---- Connect ---- */

static bool shm_reachable(const struct rk_transport_endpoint *endpoint)
{
    return endpoint->shm_socket && endpoint->shm_socket[0] != '\0' && endpoint->host_id &&
           endpoint->host_id[0] != '\0' && strcmp(endpoint->host_id, rk_host_id()) == 0;
}

static enum rk_status socket_connect(struct shm_client *client, const char *path,
                                     const struct rk_until *until, struct rk_error *error)
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
        if (rk_until_over(until) != RK_OK) {
            return rk_error_set(error, transport_silent(until), "%s does not accept in time", path);
        }
        rk_clock_sleep_ms(1);
    }
}

/* The answer to HELLO with the descriptor beside it. */
static enum rk_status hello_recv(struct shm_client *client,
                                 const struct rk_transport_endpoint *endpoint,
                                 const struct rk_until *until, int *ret_arena_fd,
                                 struct rk_error *error)
{
    uint8_t bytes[sizeof(struct shm_frame_header) + sizeof(struct shm_hello_reply)];
    union descriptors_room control;
    struct iovec part = {.iov_base = bytes, .iov_len = sizeof(bytes)};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes)};
    if (wait_for(client, POLLIN, until) != RK_OK) {
        return rk_error_set(error, transport_silent(until),
                            "the store's shared memory: the store does not answer in time");
    }
    ssize_t got = recvmsg(client->fd, &message, MSG_CMSG_CLOEXEC);
    if (got > 0 && !descriptors_take(&message, ret_arena_fd)) {
        return lost(client, error, "no descriptor of its memory, or more than one");
    }
    struct shm_frame frame;
    size_t needed = 0;
    enum rk_status status = RK_OK;
    /* So few bytes, sent at once, arrive at once. */
    if (got != (ssize_t)sizeof(bytes) || *ret_arena_fd < 0 ||
        shm_frame_parse(bytes, sizeof(bytes), sizeof(bytes), &frame, &needed) != RK_OK ||
        frame.header.type != SHM_HELLO_REPLY) {
        return lost(client, error, "the store refused the connection");
    }
    struct shm_hello_reply reply;
    memcpy(&reply, frame.body, sizeof(reply));
    client->arena_bytes = reply.arena_bytes;
    client->num_seals = reply.num_seals;
    status = wire_identity_check(&reply.identity, endpoint->node_id, endpoint->incarnation, error);
    client->broken = status != RK_OK;
    return status;
}

/* What is mapped: the arena and the seals behind it; 0: sizes that make no sense. */
static uint64_t mapped_bytes(const struct shm_client *client)
{
    bool good = client->arena_bytes > 0 && client->arena_bytes < INT64_MAX &&
                client->arena_bytes % sizeof(uint64_t) == 0 &&
                client->num_seals <= client->arena_bytes;
    return good ? client->arena_bytes + rk_seals_bytes(client->num_seals) : 0;
}

/* Only a file that can neither shrink nor be written by others is read in place. */
static enum rk_status arena_map(struct shm_client *client, int arena_fd, struct rk_error *error)
{
    struct stat info;
    int seals = fcntl(arena_fd, F_GET_SEALS);
    uint64_t bytes = mapped_bytes(client);
    if (fstat(arena_fd, &info) != 0 || bytes == 0 || (uint64_t)info.st_size != bytes || seals < 0 ||
        (seals & SEALS_NEEDED) != SEALS_NEEDED) {
        return lost(client, error, "its arena is not sealed as it must be");
    }
    void *arena = mmap(NULL, bytes, PROT_READ, MAP_SHARED, arena_fd, 0);
    if (arena == MAP_FAILED) {
        return lost(client, error, strerror(errno));
    }
    client->arena = arena;
    client->seals = (const uint64_t *)(const void *)(client->arena + client->arena_bytes);
    return RK_OK;
}

static void shm_destroy(void *connection)
{
    struct shm_client *client = connection;
    if (client->arena) {
        munmap((void *)client->arena, mapped_bytes(client));
    }
    if (client->outbox) {
        munmap(client->outbox, OUTBOX_SLOTS * SLOT_BYTES);
    }
    if (client->fd >= 0) {
        close(client->fd);
    }
    rk_free(client->in);
    rk_free(client->request.data);
    rk_free(client->release.data);
    rk_free(client->returned);
    rk_free(client);
}

static enum rk_status shm_connect(const struct rk_transport_endpoint *endpoint,
                                  const struct rk_until *until, void **ret_connection,
                                  struct rk_error *error)
{
    int arena_fd = -1;
    struct shm_frame_header hello;
    struct shm_client *client = rk_alloc_zero(1, sizeof(*client));
    if (!client) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a connection");
    }
    client->fd = -1;
    enum rk_status status = socket_connect(client, endpoint->shm_socket, until, error);
    if (status != RK_OK) {
        goto fail;
    }
    shm_header_fill(&hello, SHM_HELLO, 0, 0);
    status = send_all(client, &hello, sizeof(hello), until, error);
    if (status != RK_OK) {
        goto fail;
    }
    status = hello_recv(client, endpoint, until, &arena_fd, error);
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

/* Header and body, in client->request. */
static void request_begin(struct shm_client *client)
{
    client->request.bytes = 0;
    client->request.failed = false;
    (void)wire_append(&client->request, NULL, sizeof(struct shm_frame_header));
}

static enum rk_status request_send(struct shm_client *client, enum shm_frame_type type,
                                   const struct rk_until *until, struct rk_error *error)
{
    struct wire_buffer *request = &client->request;
    struct shm_frame_header header;
    if (request->failed) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a request");
    }
    enum rk_status status = returns_send(client, until, error);
    if (status != RK_OK) {
        return status;
    }
    shm_header_fill(&header, type, client->request_id, request->bytes - sizeof(header));
    memcpy(request->data, &header, sizeof(header));
    return send_all(client, request->data, request->bytes, until, error);
}

/* The pins of a reply that nobody waits for any more. */
static void late_release(struct shm_client *client, const struct shm_frame *frame)
{
    struct wire_reader reader = {frame->body, frame->header.body_bytes};
    uint64_t pin_ids[RK_TRANSPORT_ITEMS_MAX];
    uint32_t count = 0;
    uint32_t pins = 0;
    (void)wire_take(&reader, &count, sizeof(count));
    if (count > RK_TRANSPORT_ITEMS_MAX || count > client->pins_max) {
        client->broken = true; /* More than was ever asked for. */
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        struct wire_found found;
        if (!wire_take(&reader, &found, sizeof(found))) {
            break;
        }
        size_t rest = found.text_bytes ? found.text_bytes
                                       : (size_t)found.num_pages * sizeof(struct wire_page);
        if (rest > reader.left) {
            break;
        }
        reader.at += rest;
        reader.left -= rest;
        if (found.text_bytes == 0) {
            pin_ids[pins++] = found.pin_id;
        }
    }
    client->pins_max -= count - pins;
    pins_release(client, pin_ids, pins);
}

/* Where the store says whether the pages are still these. */
static enum rk_status seal_find(struct shm_client *client, const struct wire_found *found,
                                struct rk_pages *pages, struct rk_error *error)
{
    pages->in_place = true;
    if (client->num_seals == 0) {
        return RK_OK;
    }
    if (found->seal_index >= client->num_seals || found->seal == 0) {
        return lost(client, error, "a seal that is none");
    }
    pages->seal = &client->seals[found->seal_index];
    pages->seal_value = found->seal;
    return RK_OK;
}

/* Where the pages lie, or their copy in the reader's buffer; verified if that was asked. */
static enum rk_status pages_place(struct shm_client *client, const struct rk_get *get,
                                  const uint8_t *entries, struct rk_pages *pages,
                                  struct rk_error *error)
{
    uint8_t *buffer = get->buffer;
    for (uint64_t i = 0; i < pages->num_pages; i++) {
        struct wire_page wire;
        struct rk_page *page = &pages->pages[i];
        uint64_t left = pages->bytes - i * pages->page_bytes;
        size_t length = left < pages->page_bytes ? (size_t)left : pages->page_bytes;
        memcpy(&wire, entries + i * sizeof(wire), sizeof(wire));
        if (wire.offset > client->arena_bytes || length > client->arena_bytes - wire.offset) {
            return lost(client, error, "a page outside of its arena");
        }
        page->data = client->arena + wire.offset;
        if (buffer) {
            memcpy(buffer + i * pages->page_bytes, page->data, length);
            page->data = buffer + i * pages->page_bytes;
        }
        if (get->verify && !rk_page_verify(page, length)) {
            pages->status = RK_MISS_CHECKSUM;
            break;
        }
    }
    if (!rk_pages_sealed(pages)) {
        pages->status = RK_MISS_EVICTED; /* Also when that is why it does not match. */
    }
    if (buffer) { /* From here on it is the reader's own. */
        pages->in_place = false;
        pages->seal = NULL;
    }
    return RK_OK;
}

static enum rk_status found_read(struct shm_client *client, const struct shm_frame *frame,
                                 const struct rk_get *gets, size_t num_gets, struct rk_pages *pages,
                                 struct rk_error *error)
{
    struct wire_reader reader = {frame->body, frame->header.body_bytes};
    uint32_t count = 0;
    size_t pins = 0;
    if (!wire_take(&reader, &count, sizeof(count)) || count != num_gets) {
        return lost(client, error, "an answer to another question");
    }
    for (size_t i = 0; i < num_gets; i++) {
        struct wire_found found;
        const uint8_t *entries = NULL;
        enum rk_status status =
            wire_found_parse(&reader, true, &gets[i], &pages[i], &found, &entries, error);
        if (status == RK_OK && pages[i].status == RK_OK) {
            pages[i].hold = (void *)(uintptr_t)found.pin_id;
            pins++;
            status = seal_find(client, &found, &pages[i], error);
        }
        if (status == RK_OK && pages[i].status == RK_OK) {
            status = pages_place(client, &gets[i], entries, &pages[i], error);
        }
        if (status != RK_OK) {
            client->broken = true; /* Pins that were not read end with the connection. */
            return status;
        }
    }
    client->pins_max -= num_gets - pins;
    return RK_OK;
}

static enum rk_status shm_get(void *connection, const struct rk_get *gets, size_t num_gets,
                              const struct rk_until *until, struct rk_pages *pages,
                              struct rk_error *error)
{
    struct shm_client *client = connection;
    if (client->broken) {
        return lost(client, error, "the connection failed before");
    }
    client->request_id++;
    request_begin(client);
    wire_gets_append(&client->request, gets, num_gets);
    if (!returns_reserve(client, num_gets)) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a request");
    }
    enum rk_status status = request_send(client, SHM_GET, until, error);
    if (status != RK_OK) { /* It was not asked, or the connection is broken. */
        client->pins_max -= num_gets;
    }
    bool ours = false;
    while (status == RK_OK && !ours) {
        struct shm_frame frame;
        status = frame_recv(client, until, &frame, error);
        if (status != RK_OK) {
            break;
        }
        ours = frame.header.request_id == client->request_id;
        if (frame.header.type != SHM_FOUND) {
            status = lost(client, error, "a frame out of order");
        } else if (ours) {
            status = found_read(client, &frame, gets, num_gets, pages, error);
        } else {
            late_release(client, &frame);
        }
        frame_done(client, &frame);
    }
    return status;
}

/* Pins end with the connection, so what is pinned is so while the store has its end open. Another
 * thread may use the connection meanwhile: nothing is read from it. */
static bool shm_alive(const void *connection)
{
    const struct shm_client *client = connection;
    struct pollfd poll_fd = {.fd = client->fd, .events = POLLRDHUP};
    return poll(&poll_fd, 1, 0) <= 0 || (poll_fd.revents & (POLLRDHUP | POLLHUP | POLLERR)) == 0;
}

static void shm_release(void *connection, struct rk_pages *pages, size_t num_pages)
{
    uint64_t pin_ids[RK_TRANSPORT_ITEMS_MAX];
    uint32_t pins = 0;
    for (size_t i = 0; i < num_pages; i++) {
        if (pages[i].hold) {
            pin_ids[pins++] = (uint64_t)(uintptr_t)pages[i].hold;
            pages[i].hold = NULL;
        }
        if (pins == RK_TRANSPORT_ITEMS_MAX) {
            pins_release(connection, pin_ids, pins);
            pins = 0;
        }
    }
    pins_release(connection, pin_ids, pins);
}

static bool shm_flush(void *connection)
{
    struct shm_client *client = connection;
    return client->broken || returns_flush(client) != RK_ERR_BUSY;
}

/* ---- Put ---- */

static enum rk_status outbox_send(struct shm_client *client, int fd, const struct rk_until *until,
                                  struct rk_error *error)
{
    struct __attribute__((packed)) {
        struct shm_frame_header header;
        struct shm_outbox body;
    } frame = {.body.bytes = OUTBOX_SLOTS * SLOT_BYTES};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = &frame, .iov_len = sizeof(frame)};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof(control.bytes)};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    shm_header_fill(&frame.header, SHM_OUTBOX, 0, sizeof(frame.body));
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(rights), &fd, sizeof(int));
    enum rk_status status = returns_send(client, until, error);
    ssize_t sent = -1;
    while (status == RK_OK && sent < 0) { /* So few bytes are taken as a whole, or not. */
        sent = sendmsg(client->fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            status = wait_for(client, POLLOUT, until);
        } else if (sent != (ssize_t)sizeof(frame) && (sent >= 0 || errno != EINTR)) {
            status = lost(client, error, "the store does not take our outbox");
        }
    }
    return status;
}

static enum rk_status outbox_make(struct shm_client *client, const struct rk_until *until,
                                  struct rk_error *error)
{
    size_t bytes = OUTBOX_SLOTS * SLOT_BYTES;
    int fd = memfd_create("redknot-outbox", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    void *outbox = MAP_FAILED;
    if (fd >= 0 && ftruncate(fd, (off_t)bytes) == 0 &&
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0) {
        outbox = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (outbox == MAP_FAILED) {
        (void)rk_error_set(error, status, "no shared memory for what is put: %s", strerror(errno));
    } else {
        client->outbox = outbox;
        status = outbox_send(client, fd, until, error);
    }
    if (fd >= 0) {
        close(fd);
    }
    return status;
}

/* Takes frames until one slot more is free, or (results) the put is over. */
static enum rk_status put_wait(struct shm_client *client, struct rk_put *puts, size_t num_puts,
                               bool results, const struct rk_until *until, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    bool done = false;
    while (status == RK_OK && !done) {
        struct shm_frame frame;
        status = frame_recv(client, until, &frame, error);
        if (status != RK_OK) {
            break;
        }
        bool ours = frame.header.request_id == client->request_id;
        if (frame.header.type == SHM_FOUND && !ours) {
            late_release(client, &frame);
        } else if (frame.header.type == SHM_TAKEN && ours) {
            client->slots_taken++;
            done = !results;
        } else if (frame.header.type == SHM_RESULTS && ours && results) {
            status = wire_results_parse(frame.body, frame.header.body_bytes, puts, num_puts, error);
            done = true;
        } else {
            status = lost(client, error, "a frame out of order");
        }
        frame_done(client, &frame);
    }
    return status;
}

static enum rk_status slot_send(struct shm_client *client, const struct wire_frame *frame,
                                const struct rk_until *until, struct rk_error *error)
{
    uint64_t place = (uint64_t)(client->slots_sent % OUTBOX_SLOTS) * SLOT_BYTES;
    struct shm_put_data data = {
        .place = place, .bytes = (uint32_t)frame->bytes, .num_checksums = frame->num_checksums};
    uint8_t *to = client->outbox + place;
    for (size_t i = 0; i < frame->num_parts; i++) {
        memcpy(to, frame->parts[i].iov_base, frame->parts[i].iov_len);
        to += frame->parts[i].iov_len;
    }
    request_begin(client);
    (void)wire_append(&client->request, &data, sizeof(data));
    (void)wire_append(&client->request, frame->checksums,
                      frame->num_checksums * sizeof(frame->checksums[0]));
    client->slots_sent++;
    return request_send(client, SHM_PUT_DATA, until, error);
}

static enum rk_status put_send(struct shm_client *client, struct rk_put *puts, size_t num_puts,
                               const struct rk_until *until, struct wire_frame *frame,
                               struct rk_error *error)
{
    struct wire_outflow outflow = {.puts = puts, .num_puts = num_puts};
    client->request_id++;
    client->slots_sent = client->slots_taken = 0;
    request_begin(client);
    wire_heads_append(&client->request, puts, num_puts);
    enum rk_status status = request_send(client, SHM_PUT, until, error);
    while (status == RK_OK && wire_outflow_next(&outflow, SLOT_BYTES, frame)) {
        if (client->slots_sent - client->slots_taken == OUTBOX_SLOTS) {
            status = put_wait(client, puts, num_puts, false, until, error);
        }
        if (status == RK_OK) {
            status = slot_send(client, frame, until, error);
        }
    }
    return status == RK_OK ? put_wait(client, puts, num_puts, true, until, error) : status;
}

static enum rk_status shm_put(void *connection, struct rk_put *puts, size_t num_puts,
                              const struct rk_until *until, struct rk_error *error)
{
    struct shm_client *client = connection;
    if (client->broken) {
        return lost(client, error, "the connection failed before");
    }
    struct iovec parts[SLOT_PARTS];
    struct wire_frame *frame = rk_alloc(sizeof(*frame));
    enum rk_status status = RK_OK;
    if (!frame) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a put");
    }
    frame->parts = parts;
    frame->parts_max = SLOT_PARTS;
    if (!client->outbox) {
        status = outbox_make(client, until, error);
    }
    if (status == RK_OK) {
        status = put_send(client, puts, num_puts, until, frame, error);
    }
    rk_free(frame);
    if (status != RK_OK) {
        client->broken = true; /* The store is in the middle of it. */
    }
    return status == RK_ERR_DEADLINE
               ? rk_error_set(error, status, "the store did not take a put in time")
               : status;
}

const struct transport_ops transport_shm = {
    .path = RK_PATH_SHM,
    .name = "shm",
    .reachable = shm_reachable,
    .connect = shm_connect,
    .get = shm_get,
    .release = shm_release,
    .put = shm_put,
    .flush = shm_flush,
    .destroy = shm_destroy,
    .alive = shm_alive,
};
