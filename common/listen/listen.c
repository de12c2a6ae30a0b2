#include "common/listen/listen_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/descriptors.h"
#include "common/base/health.h"
#include "common/base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#define PENDING_DEFAULT     256
#define CONNECTIONS_DEFAULT 4096
#define PREFACE_MS_DEFAULT  10000
#define PREFACE_BYTES_MAX   64
#define ACCEPT_BURST        64   /* then those that wait to be handed over have their turn */
#define PAUSE_MS            20   /* of a socket whose connection could not even be ended */
#define REOPEN_MS           200  /* between two tries to open a socket that failed */
#define ROUND_MS            1000 /* the thread looks around at least so often */
#define SWEEP_MS            20
#define PARTIAL_MS          10
#define BEAT_MS             5000
#define NANOSECONDS(ms)     ((int64_t)(ms)*1000000)

/* Accepted, and said nothing whole yet. */
struct pending {
    int fd;
    bool partial; /* some bytes are there, poll(2) would say so again at once */
    int64_t deadline_ns;
};

/* Handed over. Nobody tells when its owner closes it: then the descriptor is no more, or another.
 */
struct owned {
    int fd;
    ino_t inode;
};

enum trouble { TROUBLE_NONE, TROUBLE_DESCRIPTORS, TROUBLE_CONNECTIONS, TROUBLE_SOCKET };

static const char *const trouble_texts[] = {
    [TROUBLE_DESCRIPTORS] = "the process has no descriptors for more connections",
    [TROUBLE_CONNECTIONS] = "as many connections as there may be are open",
    [TROUBLE_SOCKET] = "the listening socket failed and cannot be opened again",
};

struct rk_listener {
    struct rk_listener_options options;
    char *address;
    size_t preface_bytes;
    int port;
    int wake; /* eventfd: stop */
    pthread_t thread;
    bool running;
    atomic_bool stopping;

    /* The thread's own. */
    struct listen_socket sockets[LISTEN_ADDRESSES_MAX];
    size_t num_sockets;
    int spare;
    struct pending *pending; /* the oldest first */
    uint32_t num_pending;
    struct owned *owned;
    uint32_t num_owned;
    int64_t sweep_ns;
    struct pollfd *polled; /* wake, sockets, pending */
    struct rk_log_limit limits[4];

    /* Written by the thread, read by who asks for health. */
    _Atomic int64_t beat_ns;
    _Atomic int trouble;
    struct rk_health_check health;
};

/* ---- Trouble ---- */

static bool listener_well(void *context, char ret_reason[RK_HEALTH_REASON_BYTES])
{
    struct rk_listener *listener = context;
    int64_t now_ns = rk_clock_ns();
    int trouble = atomic_load(&listener->trouble);
    const char *reason = NULL;
    if (now_ns - atomic_load(&listener->beat_ns) > NANOSECONDS(BEAT_MS)) {
        reason = "its thread does not run";
    } else if (trouble != TROUBLE_NONE) {
        reason = trouble_texts[trouble];
    }
    (void)snprintf(ret_reason, RK_HEALTH_REASON_BYTES, "no connections are taken at %s: %s",
                   listener->address, reason ? reason : "");
    return reason == NULL;
}

static void trouble_note(struct rk_listener *listener, enum trouble trouble, int cause)
{
    unsigned more = 0;
    atomic_store(&listener->trouble, (int)trouble);
    if (rk_log_allowed(&listener->limits[trouble], &more)) {
        RK_LOG_ERROR("connections_refused",
                     "listener=%s address=%q reason=%q cause=%q open=%u waiting=%u descriptors=%u "
                     "more=%u",
                     listener->options.name, listener->address, trouble_texts[trouble],
                     cause ? strerrordesc_np(cause) : "", listener->num_owned,
                     listener->num_pending, rk_descriptors_limit(), more);
    }
}

/* ---- Connections ---- */

static void pending_remove(struct rk_listener *listener, uint32_t index)
{
    listener->num_pending--;
    memmove(&listener->pending[index], &listener->pending[index + 1],
            (listener->num_pending - index) * sizeof(*listener->pending));
}

static void pending_end(struct rk_listener *listener, uint32_t index)
{
    (void)close(listener->pending[index].fd);
    pending_remove(listener, index);
}

static void owned_sweep(struct rk_listener *listener)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < listener->num_owned; i++) {
        struct stat info;
        struct owned *one = &listener->owned[i];
        if (fstat(one->fd, &info) == 0 && info.st_ino == one->inode && S_ISSOCK(info.st_mode)) {
            listener->owned[kept++] = *one;
        }
    }
    listener->num_owned = kept;
    listener->sweep_ns = rk_clock_ns();
}

/* Whether the next one would be taken again. */
static void trouble_review(struct rk_listener *listener)
{
    int trouble = atomic_load(&listener->trouble);
    bool over = trouble == TROUBLE_CONNECTIONS &&
                listener->num_owned + listener->num_pending < listener->options.connections_max;
    if (trouble == TROUBLE_DESCRIPTORS) {
        int fd = fcntl(listener->wake, F_DUPFD_CLOEXEC, 0);
        over = fd >= 0 && rk_descriptors_admit(fd, listener->options.of_reserve);
        if (fd >= 0) {
            (void)close(fd);
        }
    }
    if (over) {
        atomic_store(&listener->trouble, TROUBLE_NONE);
        RK_LOG_INFO("connections_taken_again", "listener=%s address=%q open=%u",
                    listener->options.name, listener->address, listener->num_owned);
    }
}

static bool connections_left(struct rk_listener *listener)
{
    uint32_t max = listener->options.connections_max;
    if (listener->num_owned + listener->num_pending >= max &&
        rk_clock_ns() - listener->sweep_ns >= NANOSECONDS(SWEEP_MS)) {
        owned_sweep(listener);
    }
    return listener->num_owned + listener->num_pending < max;
}

/* The same socket under the lowest number there is; a high one kept would hide how many are left.
 */
static int lower(int fd)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    (void)close(fd);
    return copy;
}

/* Room for one more, if need be that of the one that has been silent for longest. *fd is the fresh
 * connection's; it is closed if there is none. */
static bool room_make(struct rk_listener *listener, int *fd)
{
    bool admitted = rk_descriptors_admit(*fd, listener->options.of_reserve);
    enum trouble trouble = !admitted                     ? TROUBLE_DESCRIPTORS
                           : !connections_left(listener) ? TROUBLE_CONNECTIONS
                                                         : TROUBLE_NONE;
    bool pending_full = listener->num_pending == listener->options.pending_max;
    if (trouble == TROUBLE_NONE && !pending_full) {
        return true;
    }
    if (listener->num_pending > 0) {
        pending_end(listener, 0);
        *fd = admitted ? *fd : lower(*fd);
        admitted = *fd >= 0 && rk_descriptors_admit(*fd, listener->options.of_reserve);
        if (admitted) {
            return true;
        }
    }
    trouble_note(listener, trouble, 0);
    if (*fd >= 0) {
        (void)close(*fd);
    }
    return false;
}

/* One listening socket's connections, a burst of them. */
static void socket_accept(struct rk_listener *listener, struct listen_socket *from)
{
    enum rk_status status = RK_OK;
    for (int i = 0; i < ACCEPT_BURST && (status == RK_OK || status == RK_ERR_FULL); i++) {
        int fd = -1;
        status = rk_descriptors_accept(from->fd, &listener->spare, &fd);
        int cause = errno;
        if (status == RK_OK && room_make(listener, &fd)) {
            int bytes = (int)listener->preface_bytes;
            (void)setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof(bytes));
            listener->pending[listener->num_pending++] = (struct pending){
                .fd = fd, .deadline_ns = rk_deadline_in_ms(listener->options.preface_timeout_ms)};
        } else if (status == RK_ERR_FULL || status == RK_ERR_BUSY) {
            trouble_note(listener, TROUBLE_DESCRIPTORS, 0);
        } else if (status == RK_ERR_IO) {
            trouble_note(listener, TROUBLE_SOCKET, cause);
            (void)close(from->fd);
            from->fd = -1;
        }
    }
    if (status == RK_ERR_BUSY) {
        from->paused_until_ns = rk_deadline_in_ms(PAUSE_MS);
    }
}

static void socket_reopen(struct rk_listener *listener, struct listen_socket *failed)
{
    int cause = listen_socket_open(failed);
    if (cause == 0) {
        atomic_store(&listener->trouble, TROUBLE_NONE);
        RK_LOG_INFO("listening_again", "listener=%s address=%q", listener->options.name,
                    listener->address);
        return;
    }
    trouble_note(listener, TROUBLE_SOCKET, cause);
    failed->paused_until_ns = rk_deadline_in_ms(REOPEN_MS);
}

enum said { SAID_NOTHING, SAID_PART, SAID_PREFACE, SAID_OTHER };

static enum said pending_look(const struct rk_listener *listener, const struct pending *pending)
{
    char bytes[PREFACE_BYTES_MAX];
    ssize_t got = recv(pending->fd, bytes, listener->preface_bytes, MSG_PEEK | MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        return SAID_NOTHING;
    }
    if (got <= 0) {
        return SAID_OTHER; /* It went away. */
    }
    if (listener->options.preface && memcmp(bytes, listener->options.preface, (size_t)got) != 0) {
        return SAID_OTHER;
    }
    return (size_t)got == listener->preface_bytes ? SAID_PREFACE : SAID_PART;
}

static void connection_hand_over(struct rk_listener *listener, int fd)
{
    struct stat info;
    struct sockaddr_storage peer = {0};
    socklen_t bytes = sizeof(peer);
    int one = 1;
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof(one));
    if (fstat(fd, &info) != 0 || getpeername(fd, (struct sockaddr *)&peer, &bytes) != 0) {
        (void)close(fd);
        return;
    }
    RK_ASSERT(listener->num_owned < listener->options.connections_max);
    listener->owned[listener->num_owned++] = (struct owned){.fd = fd, .inode = info.st_ino};
    listener->options.on_socket(listener->options.context, fd, (const struct sockaddr *)&peer,
                                bytes);
}

static void pending_step(struct rk_listener *listener)
{
    int64_t now_ns = rk_clock_ns();
    for (uint32_t i = 0; i < listener->num_pending;) {
        struct pending *one = &listener->pending[i];
        bool over = now_ns >= one->deadline_ns;
        enum said said = over ? SAID_OTHER : pending_look(listener, one);
        one->partial = said == SAID_PART;
        if (said == SAID_PREFACE) {
            int fd = one->fd;
            pending_remove(listener, i);
            connection_hand_over(listener, fd);
        } else if (said == SAID_OTHER) {
            pending_end(listener, i);
        } else {
            i++;
        }
    }
}

/* ---- The thread ---- */

/* Fills the poll set; returns how many there are and for how long to wait. */
static nfds_t poll_prepare(struct rk_listener *listener, int *ret_timeout_ms)
{
    int64_t until_ns = rk_deadline_in_ms(ROUND_MS);
    int64_t now_ns = rk_clock_ns();
    nfds_t count = 0;
    listener->polled[count++] = (struct pollfd){.fd = listener->wake, .events = POLLIN};
    for (size_t i = 0; i < listener->num_sockets; i++) {
        const struct listen_socket *one = &listener->sockets[i];
        bool paused = one->paused_until_ns > now_ns;
        if ((paused || one->fd < 0) && one->paused_until_ns < until_ns) {
            until_ns = one->paused_until_ns;
        }
        listener->polled[count++] = (struct pollfd){.fd = paused ? -1 : one->fd, .events = POLLIN};
    }
    for (uint32_t i = 0; i < listener->num_pending; i++) {
        const struct pending *one = &listener->pending[i];
        int64_t next_ns = one->partial ? now_ns + NANOSECONDS(PARTIAL_MS) : one->deadline_ns;
        until_ns = next_ns < until_ns ? next_ns : until_ns;
        listener->polled[count++] =
            (struct pollfd){.fd = one->partial ? -1 : one->fd, .events = POLLIN};
    }
    *ret_timeout_ms = rk_deadline_left_ms(until_ns);
    return count;
}

static void *listener_main(void *context)
{
    struct rk_listener *listener = context;
    while (!atomic_load(&listener->stopping)) {
        int timeout_ms = 0;
        nfds_t count = poll_prepare(listener, &timeout_ms);
        (void)poll(listener->polled, count, timeout_ms);
        int64_t now_ns = rk_clock_ns();
        atomic_store(&listener->beat_ns, now_ns);
        for (size_t i = 0; i < listener->num_sockets; i++) {
            struct listen_socket *one = &listener->sockets[i];
            if (one->fd < 0 && now_ns >= one->paused_until_ns) {
                socket_reopen(listener, one);
            } else if (one->fd >= 0 && listener->polled[1 + i].revents != 0) {
                socket_accept(listener, one);
            }
        }
        pending_step(listener);
        if (now_ns - listener->sweep_ns >= NANOSECONDS(ROUND_MS)) {
            owned_sweep(listener);
            trouble_review(listener);
        }
    }
    return NULL;
}

/* ---- Life ---- */

static uint32_t or_default(uint32_t value, uint32_t by_default)
{
    return value > 0 ? value : by_default;
}

enum rk_status rk_listener_create(const struct rk_listener_options *options,
                                  struct rk_listener **ret_listener, struct rk_error *error)
{
    struct rk_listener *listener = rk_alloc_zero(1, sizeof(*listener));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (!listener) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a listener");
    }
    listener->options = *options;
    struct rk_listener_options *mine = &listener->options;
    mine->pending_max = or_default(mine->pending_max, PENDING_DEFAULT);
    mine->connections_max = or_default(mine->connections_max, CONNECTIONS_DEFAULT);
    mine->preface_timeout_ms = or_default(mine->preface_timeout_ms, PREFACE_MS_DEFAULT);
    listener->preface_bytes = mine->preface ? strlen(mine->preface) : 1;
    RK_ASSERT(listener->preface_bytes >= 1 && listener->preface_bytes <= PREFACE_BYTES_MAX);
    listener->health =
        (struct rk_health_check){.name = mine->name, .well = listener_well, .context = listener};
    listener->spare = -1;
    listener->wake = -1;
    listener->address = rk_alloc_string(options->address);
    listener->pending = rk_alloc_zero(mine->pending_max, sizeof(*listener->pending));
    listener->owned = rk_alloc_zero(mine->connections_max, sizeof(*listener->owned));
    listener->polled = rk_alloc_zero(1 + LISTEN_ADDRESSES_MAX + (size_t)mine->pending_max,
                                     sizeof(*listener->polled));
    if (!listener->address || !listener->pending || !listener->owned || !listener->polled) {
        (void)rk_error_set(error, status, "out of memory for a listener");
        goto fail;
    }
    status = listen_bind(options->address, options->bind_wait_ms, listener->sockets,
                         &listener->num_sockets, &listener->port, error);
    if (status != RK_OK) {
        goto fail;
    }
    listener->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (listener->wake < 0) {
        status = rk_error_set(error, RK_ERR_IO, "cannot listen on %s: %s", options->address,
                              strerrordesc_np(errno));
        goto fail;
    }
    *ret_listener = listener;
    return RK_OK;

fail:
    rk_listener_destroy(listener);
    return status;
}

int rk_listener_port(const struct rk_listener *listener)
{
    return listener->port;
}

enum rk_status rk_listener_start(struct rk_listener *listener)
{
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    atomic_store(&listener->beat_ns, rk_clock_ns());
    pthread_sigmask(SIG_SETMASK, &all, &before); /* Signals belong to the program's own threads. */
    int failure = pthread_create(&listener->thread, NULL, listener_main, listener);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failure != 0) {
        return RK_ERR_NO_MEMORY;
    }
    listener->running = true;
    rk_health_add(&listener->health);
    return RK_OK;
}

void rk_listener_stop(struct rk_listener *listener)
{
    uint64_t one = 1;
    rk_health_remove(&listener->health);
    if (listener->running) {
        atomic_store(&listener->stopping, true);
        ssize_t written = write(listener->wake, &one, sizeof(one));
        (void)written; /* It looks around once a second anyway. */
        pthread_join(listener->thread, NULL);
        listener->running = false;
    }
    for (size_t i = 0; i < listener->num_sockets; i++) {
        if (listener->sockets[i].fd >= 0) {
            (void)close(listener->sockets[i].fd);
        }
    }
    listener->num_sockets = 0;
    while (listener->num_pending > 0) {
        pending_end(listener, listener->num_pending - 1);
    }
}

void rk_listener_destroy(struct rk_listener *listener)
{
    if (!listener) {
        return;
    }
    rk_listener_stop(listener);
    if (listener->wake >= 0) {
        (void)close(listener->wake);
    }
    if (listener->spare >= 0) {
        (void)close(listener->spare);
    }
    rk_free(listener->polled);
    rk_free(listener->owned);
    rk_free(listener->pending);
    rk_free(listener->address);
    rk_free(listener);
}
