/*
 * Keeps the coordinator informed: who we are, that we live, what we hold.
 *
 * One thread is unregistered (tries with back-off), announcing, or registered;
 * in the latter two it beats as it was told. A second one lives as long as an
 * announcement, which may take minutes: the store lives meanwhile. A coordinator
 * that restarted has another epoch or does not know us; then, and when our list
 * of removals overflowed, everything is announced again. Removals stay in
 * `pending` until a heartbeat with them was answered, and are not told during
 * an announcement: it may have listed them before, and would bring them back.
 */
#include "kvstore/service_internal.h"

#include "common/base/address.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/service.h"
#include "common/rpc/origin_message.h"
#include "kvstore/message_internal.h"
#include "redknot/v1/coordinator.pb-c.h"

#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CALL_TIMEOUT_MS     2000
#define ANNOUNCE_TIMEOUT_MS 3600000 /* of all of it, for a slow network; a dead one is noticed */
#define ANNOUNCE_DEAD_MS    10000   /* no heartbeat was answered for so long */
#define RETRY_MIN_MS        50
#define GONE_WAIT_MS        200
#define GONE_LEASE_NS       INT64_C(1000000000) /* below what a coordinator waits that was started */
#define RETRY_MAX_MS        500
#define HEARTBEAT_MIN_MS    20
#define HEARTBEAT_MAX_MS    60000
#define PENDING_MAX         (1u << 20)
#define REMOVED_MAX         4096u /* of one heartbeat */
#define REMOVED_TAKE        1024u
#define ENTRIES_MAX         256          /* of one announcement message */
#define TOKENS_MAX          (256u << 10) /* of one announcement message, or one entry */

enum registrar_state { UNREGISTERED, ANNOUNCING, REGISTERED };

struct registrar {
    struct registrar_options options;
    struct rk_rpc_channel *channel;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    bool locks_made;
    bool stopping;
    bool running;
    pthread_t thread;
    /* The announcement's, under the mutex. */
    bool announce_ended;
    struct rk_rpc_stream *stream; /* to cancel it */
    enum rk_status announced;
    struct rk_error announce_error;
    /* The thread's own; fixed while an announcement runs: epoch and mark. */
    enum registrar_state state;
    pthread_t announcer;
    uint64_t epoch;
    uint64_t mark;        /* of the coordinator, from before our shards are listed */
    uint64_t values_mark; /* the coordinator's last, for which values were given up */
    int heartbeat_ms;
    bool leased;   /* values are given and taken on a lease, once one was granted */
    int reachable; /* as last logged: -1 nothing yet, 0, 1 */
    int failures;  /* in a row */
    int64_t heard_ns;
    unsigned random_state;
    bool lost; /* the list of removals has a gap */
    struct kvstore_name *pending;
    size_t num_pending;
    size_t pending_capacity;
};

/* ---- Register ---- */

/* asked_ns: when the call was sent that was answered with this. */
static void lease_renew(struct registrar *registrar, int64_t asked_ns, uint32_t lease_ms)
{
    if (lease_ms != 0) {
        registrar->leased = true;
        kvstore_values_renew(registrar->options.store, asked_ns + (int64_t)lease_ms * 1000000);
    }
}

static enum rk_status register_node(struct registrar *registrar, struct rk_error *error)
{
    const struct registrar_options *options = &registrar->options;
    struct kvstore_stats stats;
    struct ProtobufCMessage *message = NULL;
    Redknot__V1__NodeInfo node = REDKNOT__V1__NODE_INFO__INIT;
    Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
    kvstore_stats_get(options->store, &stats);
    node.node_id = (char *)options->node_id;
    node.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;
    node.incarnation = options->incarnation;
    node.grpc_address = (char *)options->grpc_address;
    node.host_id = (char *)rk_host_id();
    node.shm_socket = (char *)options->shm_socket;
    node.ucx_address = (char *)options->ucx_address;
    node.capacity_bytes = stats.capacity_bytes;
    node.used_bytes = stats.used_bytes;
    node.version = (char *)REDKNOT_VERSION;
    node.metrics_address = (char *)options->metrics_address;
    request.node = &node;
    request.holds_values = stats.num_values > 0;
    request.cluster_id = (char *)rk_service_cluster();
    int64_t asked_ns = rk_clock_ns();
    enum rk_status status =
        rk_rpc_unary(registrar->channel, "/redknot.v1.Coordinator/RegisterNode", &request.base,
                     &redknot__v1__register_reply__descriptor, CALL_TIMEOUT_MS, &message, error);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__RegisterReply *reply = (const Redknot__V1__RegisterReply *)message;
    uint32_t beat_ms = reply->heartbeat_ms;
    registrar->epoch = reply->epoch;
    registrar->mark = reply->mark;
    lease_renew(registrar, asked_ns, reply->values_lease_ms);
    registrar->heartbeat_ms = beat_ms < HEARTBEAT_MIN_MS   ? HEARTBEAT_MIN_MS
                              : beat_ms > HEARTBEAT_MAX_MS ? HEARTBEAT_MAX_MS
                                                           : (int)beat_ms;
    rk_rpc_message_free(message);
    return RK_OK;
}

/* ---- Announce ---- */

/* One message's entries, each with the header it borrows from. */
struct batch {
    struct kvstore_header *headers[ENTRIES_MAX];
    struct shard_message shards[ENTRIES_MAX];
    Redknot__V1__Origin origins[ENTRIES_MAX];
    Redknot__V1__AnnounceRequest__Entry entries[ENTRIES_MAX];
    Redknot__V1__AnnounceRequest__Entry *pointers[ENTRIES_MAX];
    size_t count;
    size_t tokens;
};

static void batch_add(struct batch *batch, struct kvstore_header *header, const char *node_id)
{
    size_t at = batch->count++;
    Redknot__V1__AnnounceRequest__Entry *entry = &batch->entries[at];
    batch->headers[at] = header;
    shard_message_fill(&batch->shards[at], header, node_id);
    redknot__v1__announce_request__entry__init(entry);
    entry->shard = &batch->shards[at].shard;
    entry->n_token_ids = header->num_token_ids;
    entry->token_ids = (uint32_t *)header->token_ids;
    entry->label = (char *)header->label;
    if (rk_origin_known(&header->origin)) {
        rk_origin_message_fill(&header->origin, &batch->origins[at]);
        entry->origin = &batch->origins[at];
    }
    batch->pointers[at] = entry;
    batch->tokens += header->num_token_ids;
}

static void batch_clear(struct batch *batch)
{
    for (size_t i = 0; i < batch->count; i++) {
        rk_free(batch->headers[i]);
    }
    batch->count = 0;
    batch->tokens = 0;
}

/* Also without entries: the message names the node. */
static enum rk_status batch_send(struct registrar *registrar, struct rk_rpc_stream *stream,
                                 struct batch *batch)
{
    Redknot__V1__AnnounceRequest request = REDKNOT__V1__ANNOUNCE_REQUEST__INIT;
    request.node_id = (char *)registrar->options.node_id;
    request.incarnation = registrar->options.incarnation;
    request.epoch = registrar->mark == 0 ? 0 : registrar->epoch; /* 0: an older coordinator */
    request.mark = registrar->mark;
    request.n_entries = batch->count;
    request.entries = batch->pointers;
    enum rk_status status = rk_rpc_stream_send(stream, &request.base);
    batch_clear(batch);
    return status;
}

static enum rk_status announce_shards(struct registrar *registrar, struct rk_rpc_stream *stream,
                                      struct batch *batch)
{
    struct kvstore *store = registrar->options.store;
    struct kvstore_name *names = NULL;
    size_t num_names = 0;
    enum rk_status status = kvstore_list(store, &names, &num_names);
    for (size_t i = 0; i < num_names && status == RK_OK; i++) {
        struct kvstore_header *header = NULL;
        enum rk_status found = kvstore_describe(store, &names[i], &header);
        if (found == RK_ERR_NOT_FOUND) {
            continue; /* Gone meanwhile; the next heartbeat says so. */
        }
        if (found != RK_OK) {
            status = found;
            break;
        }
        if (batch->count > 0 && batch->tokens + header->num_token_ids > TOKENS_MAX) {
            status = batch_send(registrar, stream, batch);
        }
        batch_add(batch, header, registrar->options.node_id);
        if (batch->count == ENTRIES_MAX && status == RK_OK) {
            status = batch_send(registrar, stream, batch);
        }
    }
    if (status == RK_OK) {
        status = batch_send(registrar, stream, batch);
    }
    rk_free(names);
    return status;
}

static void drop_unwanted(struct registrar *registrar, const Redknot__V1__AnnounceReply *reply)
{
    size_t dropped = 0;
    for (size_t i = 0; i < reply->n_drop; i++) {
        const Redknot__V1__Shard *shard = reply->drop[i];
        struct kvstore_name name = {.generation = shard->generation,
                                    .shard_index = shard->shard_index};
        /* Generation 0 would mean "any", which a list of our own names cannot mean. */
        if (shard->segment_id.len == RK_ID_BYTES && shard->generation != 0) {
            memcpy(name.segment_id.bytes, shard->segment_id.data, RK_ID_BYTES);
            dropped += kvstore_drop(registrar->options.store, &name) == RK_OK;
        }
    }
    RK_LOG_INFO("announced", "accepted=%u dropped=%zu", reply->accepted, dropped);
}

/* From here on it can be cancelled, until it is NULL. */
static void stream_show(struct registrar *registrar, struct rk_rpc_stream *stream)
{
    pthread_mutex_lock(&registrar->mutex);
    registrar->stream = stream;
    if (stream && registrar->stopping) {
        rk_rpc_stream_cancel(stream);
    }
    pthread_mutex_unlock(&registrar->mutex);
}

static enum rk_status announce(struct registrar *registrar, struct rk_error *error)
{
    struct rk_rpc_stream *stream = NULL;
    struct ProtobufCMessage *message = NULL;
    struct batch *batch = rk_alloc_zero(1, sizeof(*batch));
    if (!batch) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory to announce");
    }
    enum rk_status status =
        rk_rpc_stream_open(registrar->channel, "/redknot.v1.Coordinator/Announce",
                           ANNOUNCE_TIMEOUT_MS, &stream, error);
    if (status == RK_OK) {
        stream_show(registrar, stream);
        status = announce_shards(registrar, stream, batch);
    }
    if (status == RK_OK) {
        status = rk_rpc_stream_send_done(stream);
    }
    if (status == RK_OK) {
        status = rk_rpc_stream_recv(stream, &redknot__v1__announce_reply__descriptor, &message);
    }
    if (stream) {
        enum rk_status finished = rk_rpc_stream_finish(stream, error);
        status = finished != RK_OK ? finished : status;
        stream_show(registrar, NULL);
    }
    if (status == RK_OK) {
        drop_unwanted(registrar, (const Redknot__V1__AnnounceReply *)message);
    }
    rk_rpc_message_free(message);
    rk_rpc_stream_destroy(stream);
    batch_clear(batch);
    rk_free(batch);
    return status;
}

static void *announcer_thread(void *context)
{
    struct registrar *registrar = context;
    struct rk_error error = {0};
    enum rk_status status = announce(registrar, &error);
    pthread_mutex_lock(&registrar->mutex);
    registrar->announced = status;
    registrar->announce_error = error;
    registrar->announce_ended = true;
    pthread_cond_signal(&registrar->wake);
    pthread_mutex_unlock(&registrar->mutex);
    return NULL;
}

static void announcement_cancel(struct registrar *registrar)
{
    pthread_mutex_lock(&registrar->mutex);
    if (registrar->stream) {
        rk_rpc_stream_cancel(registrar->stream);
    }
    pthread_mutex_unlock(&registrar->mutex);
}

/* False: it still runs. */
static bool announcement_ended(struct registrar *registrar, enum rk_status *ret_status,
                               struct rk_error *ret_error)
{
    pthread_mutex_lock(&registrar->mutex);
    bool ended = registrar->announce_ended;
    registrar->announce_ended = false;
    *ret_status = registrar->announced;
    *ret_error = registrar->announce_error;
    pthread_mutex_unlock(&registrar->mutex);
    if (ended) {
        pthread_join(registrar->announcer, NULL);
    }
    return ended;
}

/* ---- Heartbeat ---- */

/* What the store removed since, behind what is not told yet. Over the bound the list has a gap. */
static void removed_take(struct registrar *registrar)
{
    size_t taken = REMOVED_TAKE;
    while (taken == REMOVED_TAKE) {
        bool lost = false;
        if (registrar->num_pending + REMOVED_TAKE > registrar->pending_capacity) {
            size_t capacity = registrar->pending_capacity * 2 + REMOVED_TAKE;
            struct kvstore_name *more = NULL;
            if (capacity <= PENDING_MAX) {
                more = rk_alloc_resize(registrar->pending, capacity, sizeof(*more));
            }
            if (!more) {
                registrar->num_pending = 0; /* The announcement that follows tells them. */
                registrar->lost = true;
                if (!registrar->pending) {
                    return;
                }
            } else {
                registrar->pending = more;
                registrar->pending_capacity = capacity;
            }
        }
        taken =
            kvstore_removed_take(registrar->options.store,
                                 registrar->pending + registrar->num_pending, REMOVED_TAKE, &lost);
        registrar->num_pending += taken;
        registrar->lost = registrar->lost || lost;
    }
}

/* Clients went on without us: what we hold may be older than what they put or dropped since. */
static void values_forget(struct registrar *registrar, uint64_t mark)
{
    if (mark != 0 && mark != registrar->values_mark) {
        uint64_t forgotten = kvstore_values_forget(registrar->options.store);
        registrar->values_mark = mark;
        RK_LOG_INFO("values_forgotten", "count=%llu reason=%q", (unsigned long long)forgotten,
                    "clients were told to go on without this store");
    }
}

/* count: of what is pending, told with it. */
static enum rk_status heartbeat_call(struct registrar *registrar, size_t count,
                                     bool *ret_register_again, struct rk_error *error)
{
    struct kvstore_stats stats;
    struct ProtobufCMessage *message = NULL;
    Redknot__V1__HeartbeatRequest request = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    Redknot__V1__Shard *removed = rk_alloc_zero(count, sizeof(*removed));
    Redknot__V1__Shard **pointers = rk_alloc_zero(count, sizeof(*pointers));
    int64_t asked_ns = rk_clock_ns();
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (removed && pointers) {
        for (size_t i = 0; i < count; i++) {
            redknot__v1__shard__init(&removed[i]);
            removed[i].segment_id.data = registrar->pending[i].segment_id.bytes;
            removed[i].segment_id.len = RK_ID_BYTES;
            removed[i].generation = registrar->pending[i].generation;
            removed[i].shard_index = registrar->pending[i].shard_index;
            removed[i].node_id = (char *)registrar->options.node_id;
            pointers[i] = &removed[i];
        }
        kvstore_stats_get(registrar->options.store, &stats);
        request.node_id = (char *)registrar->options.node_id;
        request.incarnation = registrar->options.incarnation;
        request.used_bytes = stats.used_bytes;
        request.values_mark = registrar->values_mark;
        request.n_removed = count;
        request.removed = pointers;
        status = rk_rpc_unary(registrar->channel, "/redknot.v1.Coordinator/Heartbeat",
                              &request.base, &redknot__v1__heartbeat_reply__descriptor,
                              CALL_TIMEOUT_MS, &message, error);
    }
    if (status == RK_OK) {
        const Redknot__V1__HeartbeatReply *reply = (const Redknot__V1__HeartbeatReply *)message;
        *ret_register_again = reply->register_again || reply->epoch != registrar->epoch;
        registrar->heard_ns = rk_clock_ns();
        values_forget(registrar, reply->values_mark);
        lease_renew(registrar, asked_ns, reply->values_lease_ms);
        if (count > 0) {
            registrar->num_pending -= count;
            memmove(registrar->pending, registrar->pending + count,
                    registrar->num_pending * sizeof(*registrar->pending));
        }
    }
    rk_rpc_message_free(message);
    rk_free(removed);
    rk_free(pointers);
    return status;
}

/* ---- The thread ---- */

/* Ends early when an announcement does. False: stop. */
static bool wait_ms(struct registrar *registrar, int ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += (ms % 1000) * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    int rc = 0;
    pthread_mutex_lock(&registrar->mutex);
    while (!registrar->stopping && !registrar->announce_ended && rc == 0) {
        rc = pthread_cond_timedwait(&registrar->wake, &registrar->mutex, &until);
    }
    bool stopping = registrar->stopping;
    pthread_mutex_unlock(&registrar->mutex);
    return !stopping;
}

/* Between half and all of the step, so that a cluster's stores do not call in unison. */
static int backoff_ms(struct registrar *registrar, int failures)
{
    int step_ms = RETRY_MAX_MS;
    if (failures < 4) {
        step_ms = RETRY_MIN_MS << failures;
    }
    return step_ms / 2 + rand_r(&registrar->random_state) % (step_ms / 2 + 1);
}

/* Nobody listens there: a coordinator that was killed leaves nobody out, and one that was started
 * again waits for us. One that is only silent may have. */
static bool coordinator_gone(const struct registrar *registrar)
{
    struct rk_address address;
    char port[8];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    struct addrinfo *found = NULL;
    if (rk_address_parse(registrar->options.coordinator, RK_ADDRESS_CALL, &address, NULL) !=
        RK_OK) {
        return false;
    }
    (void)snprintf(port, sizeof(port), "%u", address.port);
    if (getaddrinfo(address.host, port, &hints, &found) != 0) {
        return false;
    }
    bool gone = true;
    for (const struct addrinfo *at = found; at && gone; at = at->ai_next) {
        int fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        struct pollfd done = {.fd = fd, .events = POLLOUT};
        int why = fd < 0 ? errno : 0;
        if (fd >= 0 && connect(fd, at->ai_addr, at->ai_addrlen) != 0) {
            socklen_t bytes = sizeof(why);
            why = errno;
            if (why == EINPROGRESS && poll(&done, 1, GONE_WAIT_MS) > 0 &&
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &why, &bytes) != 0) {
                why = errno;
            }
        }
        if (fd >= 0) {
            (void)close(fd);
        }
        gone = why == ECONNREFUSED;
    }
    freeaddrinfo(found);
    return gone;
}

/* After a call that failed. */
static void values_keep(struct registrar *registrar, enum rk_status status)
{
    int64_t now_ns = rk_clock_ns();
    if (status == RK_ERR_UNAVAILABLE && registrar->leased && coordinator_gone(registrar)) {
        kvstore_values_extend(registrar->options.store, now_ns + GONE_LEASE_NS);
    }
}

/* One line when the coordinator is lost, one when it is back. */
static void log_change(struct registrar *registrar, enum rk_status status,
                       const struct rk_error *error)
{
    const char *address = registrar->options.coordinator;
    if (status == RK_OK && registrar->reachable != 1) {
        RK_LOG_INFO("registered", "coordinator=%s heartbeat_ms=%d", address,
                    registrar->heartbeat_ms);
    } else if (status != RK_OK && registrar->reachable != 0) {
        RK_LOG_WARN(error->answered ? "coordinator_refuses" : "coordinator_unreachable",
                    "coordinator=%s status=%s reason=%q", address, rk_status_name(status),
                    error->text);
    }
    registrar->reachable = status == RK_OK;
}

/* What failed is tried again, from the beginning; returns the delay. */
static int begin_again(struct registrar *registrar, enum rk_status status,
                       const struct rk_error *error)
{
    registrar->state = UNREGISTERED;
    if (status == RK_OK) {
        return 0; /* We were asked to. */
    }
    log_change(registrar, status, error);
    values_keep(registrar, status);
    return backoff_ms(registrar, registrar->failures++);
}

static int step_unregistered(struct registrar *registrar)
{
    struct rk_error error = {0};
    enum rk_status status = register_node(registrar, &error);
    if (status == RK_OK &&
        pthread_create(&registrar->announcer, NULL, announcer_thread, registrar) != 0) {
        status = rk_error_set(&error, RK_ERR_NO_MEMORY, "cannot start a thread to announce");
    }
    if (status != RK_OK) {
        return begin_again(registrar, status, &error);
    }
    registrar->state = ANNOUNCING;
    registrar->lost = false; /* The list is taken from now on. */
    registrar->heard_ns = rk_clock_ns();
    return registrar->heartbeat_ms;
}

/* The coordinator may ask to register again meanwhile: this announcement is the answer, or breaks
 * off because it restarted. */
static int step_announcing(struct registrar *registrar)
{
    struct rk_error error = {0};
    enum rk_status status = RK_OK;
    bool again = false;
    if (announcement_ended(registrar, &status, &error)) {
        if (status != RK_OK) {
            return begin_again(registrar, status, &error);
        }
        log_change(registrar, status, &error);
        registrar->failures = 0;
        registrar->state = REGISTERED;
        return 0;
    }
    removed_take(registrar);
    status = heartbeat_call(registrar, 0, &again, &error);
    if (status != RK_OK) {
        log_change(registrar, status, &error);
        values_keep(registrar, status);
        if (rk_clock_ns() - registrar->heard_ns > ANNOUNCE_DEAD_MS * INT64_C(1000000)) {
            announcement_cancel(registrar);
        }
    }
    return registrar->heartbeat_ms;
}

static int step_registered(struct registrar *registrar)
{
    struct rk_error error = {0};
    bool again = false;
    removed_take(registrar);
    if (registrar->lost) {
        return begin_again(registrar, RK_OK, NULL); /* Only the whole inventory is the truth. */
    }
    size_t count = registrar->num_pending < REMOVED_MAX ? registrar->num_pending : REMOVED_MAX;
    enum rk_status status = heartbeat_call(registrar, count, &again, &error);
    log_change(registrar, status, &error);
    if (status != RK_OK) {
        values_keep(registrar, status);
        return backoff_ms(registrar, registrar->failures++);
    }
    registrar->failures = 0;
    if (again) {
        return begin_again(registrar, RK_OK, NULL);
    }
    return registrar->num_pending > 0 ? 0 : registrar->heartbeat_ms;
}

static void *registrar_thread(void *context)
{
    struct registrar *registrar = context;
    int delay_ms = 0;
    while (wait_ms(registrar, delay_ms)) {
        switch (registrar->state) {
        case UNREGISTERED:
            delay_ms = step_unregistered(registrar);
            break;
        case ANNOUNCING:
            delay_ms = step_announcing(registrar);
            break;
        case REGISTERED:
            delay_ms = step_registered(registrar);
            break;
        }
    }
    if (registrar->state == ANNOUNCING) {
        announcement_cancel(registrar);
        pthread_join(registrar->announcer, NULL);
    }
    return NULL;
}

enum rk_status registrar_start(const struct registrar_options *options,
                               struct registrar **ret_registrar, struct rk_error *error)
{
    struct registrar *registrar = rk_alloc_zero(1, sizeof(*registrar));
    if (!registrar) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the registrar");
    }
    registrar->options = *options;
    registrar->reachable = -1;
    registrar->random_state = (unsigned)options->incarnation;
    enum rk_status status = rk_rpc_channel_create(options->coordinator, &registrar->channel, error);
    if (status != RK_OK) {
        goto fail;
    }
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&registrar->mutex, NULL);
    pthread_cond_init(&registrar->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    registrar->locks_made = true;
    if (pthread_create(&registrar->thread, NULL, registrar_thread, registrar) != 0) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "cannot start the registrar");
        goto fail;
    }
    registrar->running = true;
    *ret_registrar = registrar;
    return RK_OK;

fail:
    registrar_stop(registrar);
    return status;
}

void registrar_stop(struct registrar *registrar)
{
    if (!registrar) {
        return;
    }
    if (registrar->running) {
        pthread_mutex_lock(&registrar->mutex);
        registrar->stopping = true;
        pthread_cond_signal(&registrar->wake);
        pthread_mutex_unlock(&registrar->mutex);
        pthread_join(registrar->thread, NULL);
    }
    if (registrar->locks_made) {
        pthread_cond_destroy(&registrar->wake);
        pthread_mutex_destroy(&registrar->mutex);
    }
    rk_rpc_channel_destroy(registrar->channel);
    rk_free(registrar->pending);
    rk_free(registrar);
}
