#include "client/redknot.h"
#include "client/fork_internal.h"
#include "client/redknot_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/origin.h"
#include "common/rpc/rpc.h"

#include <pthread.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>

#include "redknot/v1/coordinator.pb-c.h"

#define TIMEOUT_MS             600000
#define METADATA_TIMEOUT_MS    5000
#define CHANNELS_MAX           64
#define WORKERS_TRIED_MAX      8
#define WORKERS_LISTED_MAX     1024
#define FINGERPRINT_DIGITS_MIN 8
#define STATUS_SEGMENTS_MAX    100000
#define DROP_IDS_MAX           4096 /* in one call */

struct channel {
    char *address;
    struct rk_rpc_channel *rpc;
    uint32_t num_users;
    struct channel *next;
};

struct running {
    struct rk_rpc_stream *stream;
    struct running *next;
};

struct workers {
    char *addresses[WORKERS_TRIED_MAX];
    size_t count;
};

struct rk_client {
    char *coordinator;
    char *worker;
    char *model;
    int timeout_ms;
    int metadata_timeout_ms;
    pid_t maker;
    pthread_mutex_t lock; /* Guards what follows. */
    struct channel *channels;
    uint32_t num_channels;
    struct running *running;
    bool cancelled;
    struct workers known; /* for when the coordinator does not answer */
};

struct rk_id rk_id_from_message(ProtobufCBinaryData bytes)
{
    struct rk_id id = {.bytes = {0}};
    if (bytes.len == RK_ID_BYTES) {
        memcpy(id.bytes, bytes.data, RK_ID_BYTES);
    }
    return id;
}

enum rk_status rk_client_no_memory(struct rk_error *error, const char *what)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", what);
}

static void workers_clear(struct workers *workers)
{
    for (size_t i = 0; i < workers->count; i++) {
        rk_free(workers->addresses[i]);
    }
    workers->count = 0;
}

static bool workers_add(struct workers *workers, const char *address)
{
    char *copy = rk_alloc_string(address);
    if (copy) {
        workers->addresses[workers->count++] = copy;
    }
    return copy;
}

enum rk_status rk_client_create(const struct rk_client_options *options,
                                struct rk_client **ret_client, struct rk_error *error)
{
    if (!options->coordinator && !options->worker) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "a client needs the address of a coordinator or of a worker");
    }
    struct rk_client *client = rk_alloc_zero(1, sizeof(*client));
    if (!client) {
        return rk_client_no_memory(error, "making a client");
    }
    RK_ASSERT(pthread_mutex_init(&client->lock, NULL) == 0);
    client->maker = getpid();
    client->timeout_ms = options->timeout_ms > 0 ? options->timeout_ms : TIMEOUT_MS;
    client->metadata_timeout_ms =
        options->metadata_timeout_ms > 0 ? options->metadata_timeout_ms : METADATA_TIMEOUT_MS;
    if (options->coordinator) {
        client->coordinator = rk_alloc_string(options->coordinator);
    }
    if (options->worker) {
        client->worker = rk_alloc_string(options->worker);
    }
    if (options->model) {
        client->model = rk_alloc_string(options->model);
    }
    bool complete = (!options->coordinator || client->coordinator) &&
                    (!options->worker || client->worker) && (!options->model || client->model);
    for (size_t i = 0; i < options->num_workers_known && !options->model && i < WORKERS_TRIED_MAX;
         i++) {
        complete = complete && workers_add(&client->known, options->workers_known[i]);
    }
    if (!complete) {
        rk_client_destroy(client);
        return rk_client_no_memory(error, "making a client");
    }
    *ret_client = client;
    return RK_OK;
}

static void channel_destroy(struct channel *channel)
{
    if (channel) {
        rk_rpc_channel_destroy(channel->rpc);
        rk_free(channel->address);
        rk_free(channel);
    }
}

void rk_client_destroy(struct rk_client *client)
{
    if (!client || rk_is_copy(client->maker)) {
        return;
    }
    RK_ASSERT(!client->running);
    while (client->channels) {
        struct channel *next = client->channels->next;
        channel_destroy(client->channels);
        client->channels = next;
    }
    (void)pthread_mutex_destroy(&client->lock);
    rk_free(client->coordinator);
    rk_free(client->worker);
    rk_free(client->model);
    workers_clear(&client->known);
    rk_free(client);
}

void rk_client_cancel(struct rk_client *client)
{
    if (rk_is_copy(client->maker)) {
        return;
    }
    (void)pthread_mutex_lock(&client->lock);
    client->cancelled = true;
    for (struct running *at = client->running; at; at = at->next) {
        rk_rpc_stream_cancel(at->stream);
    }
    (void)pthread_mutex_unlock(&client->lock);
}

/* Takes the last channel that nobody uses out of a full list; the caller destroys it. */
static struct channel *channel_unlink_unused(struct rk_client *client)
{
    struct channel **unused = NULL;
    for (struct channel **at = &client->channels; *at; at = &(*at)->next) {
        if ((*at)->num_users == 0) {
            unused = at;
        }
    }
    if (!unused) {
        return NULL;
    }
    struct channel *channel = *unused;
    *unused = channel->next;
    client->num_channels--;
    return channel;
}

static enum rk_status channel_make(const char *address, struct channel **ret_channel,
                                   struct rk_error *error)
{
    struct channel *channel = rk_alloc_zero(1, sizeof(*channel));
    char *copy = rk_alloc_string(address);
    if (!channel || !copy) {
        rk_free(channel);
        rk_free(copy);
        return rk_client_no_memory(error, "connecting");
    }
    channel->address = copy;
    enum rk_status status = rk_rpc_channel_create(address, &channel->rpc, error);
    if (status != RK_OK) {
        channel_destroy(channel);
        return status;
    }
    *ret_channel = channel;
    return RK_OK;
}

static enum rk_status channel_acquire(struct rk_client *client, const char *address,
                                      struct channel **ret_channel, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    struct channel *old = NULL;
    (void)pthread_mutex_lock(&client->lock);
    struct channel *channel = client->channels;
    while (channel && strcmp(channel->address, address) != 0) {
        channel = channel->next;
    }
    if (!channel) {
        if (client->num_channels >= CHANNELS_MAX) {
            old = channel_unlink_unused(client);
        }
        if (client->num_channels >= CHANNELS_MAX) {
            status = rk_error_set(error, RK_ERR_FULL, "%d connections are in use", CHANNELS_MAX);
        } else {
            status = channel_make(address, &channel, error);
        }
        if (status == RK_OK) {
            channel->next = client->channels;
            client->channels = channel;
            client->num_channels++;
        }
    }
    if (status == RK_OK) {
        channel->num_users++;
        *ret_channel = channel;
    }
    (void)pthread_mutex_unlock(&client->lock);
    channel_destroy(old);
    return status;
}

static void channel_release(struct rk_client *client, struct channel *channel)
{
    (void)pthread_mutex_lock(&client->lock);
    channel->num_users--;
    (void)pthread_mutex_unlock(&client->lock);
}

/* Says who failed. Of a peer that is not there gRPC tells much; its last words are the cause. */
static void name_peer(const char *role, const char *address, struct rk_error *error)
{
    if (!error || error->status != RK_ERR_UNAVAILABLE || error->answered) {
        rk_error_prefix(error, "%s %s", role, address);
        return;
    }
    char text[sizeof(error->text)];
    memcpy(text, error->text, sizeof(text));
    const char *cause = strrchr(text, ':');
    (void)rk_error_set(error, RK_ERR_UNAVAILABLE, "%s %s does not answer%s", role, address,
                       cause ? cause : "");
}

/* ---- Calls to the coordinator ---- */

static enum rk_status ask_coordinator(struct rk_client *client, const char *path,
                                      const ProtobufCMessage *request,
                                      const ProtobufCMessageDescriptor *type,
                                      ProtobufCMessage **ret_reply, struct rk_error *error)
{
    if (rk_is_copy(client->maker)) {
        return rk_copy_refuse(error);
    }
    if (!client->coordinator) {
        return rk_error_set(error, RK_ERR_INVALID, "this client has no coordinator's address");
    }
    struct channel *channel = NULL;
    enum rk_status status = channel_acquire(client, client->coordinator, &channel, error);
    if (status != RK_OK) {
        return status;
    }
    status = rk_rpc_unary(channel->rpc, path, request, type, client->metadata_timeout_ms, ret_reply,
                          error);
    channel_release(client, channel);
    if (status != RK_OK) {
        name_peer("coordinator", client->coordinator, error);
    }
    return status;
}

/* What a status borrows its strings from. */
struct status_pages {
    Redknot__V1__StatusReply **replies;
    size_t count;
    size_t num_segments;
};

static void status_pages_free(struct status_pages *pages)
{
    for (size_t i = 0; pages && i < pages->count; i++) {
        rk_rpc_message_free(&pages->replies[i]->base);
    }
    if (pages) {
        rk_free(pages->replies);
    }
    rk_free(pages);
}

void rk_cluster_status_clear(struct rk_cluster_status *status)
{
    rk_free(status->nodes);
    rk_free(status->segments);
    status_pages_free(status->owner);
    memset(status, 0, sizeof(*status));
}

static struct rk_node_status node_from(const Redknot__V1__StatusReply__Node *node)
{
    static const Redknot__V1__NodeInfo empty = REDKNOT__V1__NODE_INFO__INIT;
    const Redknot__V1__NodeInfo *info = node->info ? node->info : &empty;
    enum rk_node_role role = RK_NODE_OTHER;
    if (info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE) {
        role = RK_NODE_STORE;
    } else if (info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_WORKER) {
        role = RK_NODE_WORKER;
    }
    /* A coordinator of an older version does not tell it. */
    const char *state = node->alive ? "up" : "down";
    if (node->state[0] != '\0') {
        state = node->state;
    }
    return (struct rk_node_status){.node_id = info->node_id,
                                   .role = role,
                                   .alive = node->alive,
                                   .address = info->grpc_address,
                                   .metrics_address = info->metrics_address,
                                   .model = info->model,
                                   .numeric_path = info->numeric_path,
                                   .version = info->version,
                                   .capacity_bytes = info->capacity_bytes,
                                   .used_bytes = info->used_bytes,
                                   .num_shards = node->num_shards,
                                   .heartbeat_age_ms = node->last_heartbeat_age_ms,
                                   .state = state,
                                   .fingerprint = rk_id_from_message(info->fingerprint)};
}

/* Takes over reply, also when memory is out. */
static enum rk_status status_pages_add(struct status_pages *pages, Redknot__V1__StatusReply *reply)
{
    Redknot__V1__StatusReply **more =
        rk_alloc_resize(pages->replies, pages->count + 1, sizeof(Redknot__V1__StatusReply *));
    if (!more) {
        rk_rpc_message_free(&reply->base);
        return RK_ERR_NO_MEMORY;
    }
    pages->replies = more;
    pages->replies[pages->count++] = reply;
    pages->num_segments += reply->n_segments;
    return RK_OK;
}

/* Page after page, until there are enough segments. */
static enum rk_status status_pages_read(struct rk_client *client,
                                        const struct rk_status_query *query,
                                        struct status_pages *pages, struct rk_error *error)
{
    Redknot__V1__StatusRequest request = REDKNOT__V1__STATUS_REQUEST__INIT;
    bool more = true;
    while (more) {
        Redknot__V1__StatusReply *reply = NULL;
        size_t left = query->segments_max - pages->num_segments;
        request.with_segments = query->segments_max > 0;
        request.segments_max = left < STATUS_SEGMENTS_MAX ? (uint32_t)left : STATUS_SEGMENTS_MAX;
        request.with_gone = query->with_gone;
        enum rk_status status = ask_coordinator(
            client, "/redknot.v1.Coordinator/Status", &request.base,
            &redknot__v1__status_reply__descriptor, (ProtobufCMessage **)&reply, error);
        if (status != RK_OK) {
            return status;
        }
        if (status_pages_add(pages, reply) != RK_OK) {
            return rk_client_no_memory(error, "reading the cluster's status");
        }
        request.after = reply->next_after;
        more = reply->next_after.len > 0 && pages->num_segments < query->segments_max;
    }
    return RK_OK;
}

static struct rk_segment_status segment_from(const Redknot__V1__StatusReply__Segment *segment)
{
    struct rk_segment_status result = {.segment_id = rk_id_from_message(segment->segment_id),
                                       .label = segment->label,
                                       .num_tokens = segment->num_tokens,
                                       .bytes = segment->bytes,
                                       .committed = segment->committed,
                                       .node_ids = (const char *const *)segment->node_ids,
                                       .num_node_ids = segment->n_node_ids,
                                       .kind = segment->kind,
                                       .state = segment->state};
    if (segment->alone_id.len == RK_ID_BYTES) {
        result.alone_id = rk_id_from_message(segment->alone_id);
    }
    if (segment->state[0] == '\0') { /* A coordinator of an older version does not tell it. */
        result.state = segment->committed ? "stored" : "gone";
    }
    return result;
}

enum rk_status rk_client_status_query(struct rk_client *client, const struct rk_status_query *query,
                                      struct rk_cluster_status *ret_status, struct rk_error *error)
{
    struct status_pages *pages = rk_alloc_zero(1, sizeof(*pages));
    if (!pages) {
        return rk_client_no_memory(error, "reading the cluster's status");
    }
    enum rk_status status = status_pages_read(client, query, pages, error);
    if (status != RK_OK) {
        status_pages_free(pages);
        return status;
    }
    const Redknot__V1__StatusReply *first = pages->replies[0];
    struct rk_cluster_status result = {.owner = pages,
                                       .num_nodes = first->n_nodes,
                                       .num_segments = first->num_segments,
                                       .num_gone = first->num_gone,
                                       .uptime_ms = first->uptime_ms,
                                       .version = first->version};
    result.nodes = rk_alloc_zero(first->n_nodes + 1, sizeof(*result.nodes));
    result.segments = rk_alloc_zero(pages->num_segments + 1, sizeof(*result.segments));
    if (!result.nodes || !result.segments) {
        rk_cluster_status_clear(&result);
        return rk_client_no_memory(error, "reading the cluster's status");
    }
    for (size_t i = 0; i < first->n_nodes; i++) {
        result.nodes[i] = node_from(first->nodes[i]);
    }
    for (size_t i = 0; i < pages->count; i++) {
        for (size_t j = 0; j < pages->replies[i]->n_segments; j++) {
            result.segments[result.num_segments_listed++] =
                segment_from(pages->replies[i]->segments[j]);
        }
    }
    *ret_status = result;
    return RK_OK;
}

enum rk_status rk_client_status(struct rk_client *client, uint32_t segments_max,
                                struct rk_cluster_status *ret_status, struct rk_error *error)
{
    struct rk_status_query query = {.segments_max = segments_max};
    return rk_client_status_query(client, &query, ret_status, error);
}

/* ---- Drop ---- */

static enum rk_status drop_call(struct rk_client *client, const Redknot__V1__DropRequest *request,
                                struct rk_drop_result *result, struct rk_error *error)
{
    Redknot__V1__DropReply *reply = NULL;
    enum rk_status status =
        ask_coordinator(client, "/redknot.v1.Coordinator/Drop", &request->base,
                        &redknot__v1__drop_reply__descriptor, (ProtobufCMessage **)&reply, error);
    if (status == RK_OK) {
        result->dropped += reply->dropped;
        result->chains += reply->chains;
        rk_rpc_message_free(&reply->base);
    }
    return status;
}

enum rk_status rk_client_drop_query(struct rk_client *client, const struct rk_drop_query *query,
                                    struct rk_drop_result *ret_result, struct rk_error *error)
{
    struct rk_drop_result result = {.dropped = 0};
    struct rk_salt_tag tag;
    size_t batch = query->num_ids < DROP_IDS_MAX ? query->num_ids : DROP_IDS_MAX;
    ProtobufCBinaryData *names = rk_alloc_zero(batch + 1, sizeof(*names));
    enum rk_status status = RK_OK;
    size_t begin = 0;
    if (!names) {
        return rk_client_no_memory(error, "dropping segments");
    }
    do { /* Once also without ids. */
        Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
        size_t count = query->num_ids - begin < batch ? query->num_ids - begin : batch;
        for (size_t i = 0; i < count; i++) {
            names[i] = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)query->ids[begin + i].bytes};
        }
        request.n_segment_ids = count;
        request.segment_ids = names;
        begin += count;
        if (begin == query->num_ids) { /* What takes longer comes with the last ids. */
            request.label = (char *)(query->label ? query->label : "");
            request.all = query->all;
            if (query->salt) {
                tag = rk_salt_tag(query->salt, query->salt_bytes);
                request.salt_tag = (ProtobufCBinaryData){sizeof(tag.bytes), tag.bytes};
            }
        }
        status = drop_call(client, &request, &result, error);
    } while (status == RK_OK && begin < query->num_ids);
    rk_free(names);
    if (status == RK_OK) {
        *ret_result = result;
    }
    return status;
}

enum rk_status rk_client_drop(struct rk_client *client, const struct rk_id *ids, size_t num_ids,
                              uint32_t *ret_dropped, struct rk_error *error)
{
    struct rk_drop_query query = {.ids = ids, .num_ids = num_ids};
    struct rk_drop_result result;
    enum rk_status status = rk_client_drop_query(client, &query, &result, error);
    if (status == RK_OK && ret_dropped) {
        *ret_dropped = (uint32_t)result.dropped;
    }
    return status;
}

/* ---- Calls to workers ---- */

static bool is_model(const struct rk_node_status *node, const char *model)
{
    char hex[RK_ID_HEX_BYTES];
    size_t length = strlen(model);
    rk_id_to_hex(&node->fingerprint, hex);
    return strcmp(node->model, model) == 0 ||
           (length >= FINGERPRINT_DIGITS_MIN && length < sizeof(hex) &&
            strncasecmp(hex, model, length) == 0);
}

static enum rk_status no_worker(const struct rk_client *client, struct rk_error *error)
{
    if (client->model) {
        return rk_error_set(
            error, RK_ERR_NOT_FOUND,
            "coordinator %s knows no living worker that serves the model \"%.100s\"",
            client->coordinator, client->model);
    }
    return rk_error_set(error, RK_ERR_UNAVAILABLE, "coordinator %s knows no living worker",
                        client->coordinator);
}

/* Their answers differ, and so do the ids of their segments. */
static enum rk_status several_models(const struct rk_node_status *one,
                                     const struct rk_node_status *other, struct rk_error *error)
{
    char first[RK_ID_HEX_BYTES];
    char second[RK_ID_HEX_BYTES];
    rk_id_to_hex(&one->fingerprint, first);
    rk_id_to_hex(&other->fingerprint, second);
    return rk_error_set(error, RK_ERR_INVALID,
                        "workers serve several models: \"%.64s\" (fingerprint %.12s) at %s and "
                        "\"%.64s\" (%.12s) at %s; name the model, or a worker",
                        one->model, first, one->address, other->model, second, other->address);
}

/* All that may be asked, from a random one on: nodes of other kinds between them must not give the
 * one behind them a larger share. */
static enum rk_status workers_from_status(const struct rk_client *client,
                                          const struct rk_cluster_status *cluster,
                                          struct workers *workers, struct rk_error *error)
{
    const struct rk_node_status *nodes[WORKERS_LISTED_MAX];
    size_t count = 0;
    uint32_t start = 0;
    for (size_t i = 0; i < cluster->num_nodes && count < WORKERS_LISTED_MAX; i++) {
        const struct rk_node_status *node = &cluster->nodes[i];
        if (node->role != RK_NODE_WORKER || !node->alive || !node->address[0] ||
            (client->model && !is_model(node, client->model))) {
            continue;
        }
        if (count > 0 && !rk_id_equal(&node->fingerprint, &nodes[0]->fingerprint)) {
            return several_models(nodes[0], node, error);
        }
        nodes[count++] = node;
    }
    if (count == 0) {
        return no_worker(client, error);
    }
    if (getrandom(&start, sizeof(start), GRND_NONBLOCK) < 0) {
        start = (uint32_t)rk_clock_ns(); /* Good enough to spread load. */
    }
    for (size_t i = 0; i < count && workers->count < WORKERS_TRIED_MAX; i++) {
        if (!workers_add(workers, nodes[(start + i) % count]->address)) {
            return rk_client_no_memory(error, "choosing a worker");
        }
    }
    return RK_OK;
}

/* Without memory for it the old one stays, or a shorter one. */
static void known_set(struct rk_client *client, const struct workers *workers)
{
    (void)pthread_mutex_lock(&client->lock);
    workers_clear(&client->known);
    for (size_t i = 0; i < workers->count; i++) {
        (void)workers_add(&client->known, workers->addresses[i]);
    }
    (void)pthread_mutex_unlock(&client->lock);
}

static bool known_get(struct rk_client *client, struct workers *workers)
{
    (void)pthread_mutex_lock(&client->lock);
    for (size_t i = 0; i < client->known.count; i++) {
        (void)workers_add(workers, client->known.addresses[i]);
    }
    (void)pthread_mutex_unlock(&client->lock);
    return workers->count > 0;
}

/* Living workers in the order in which to try them. Cleared by the caller, also on failure. */
static enum rk_status workers_choose(struct rk_client *client, struct workers *workers,
                                     struct rk_error *error)
{
    if (client->worker) {
        return workers_add(workers, client->worker)
                   ? RK_OK
                   : rk_client_no_memory(error, "choosing a worker");
    }
    struct rk_cluster_status cluster;
    enum rk_status status = rk_client_status(client, 0, &cluster, error);
    if (status == RK_ERR_UNAVAILABLE || status == RK_ERR_DEADLINE) {
        /* A worker computes without the coordinator: that it is down costs reuse, not the answer.
         */
        return known_get(client, workers) ? RK_OK : status;
    }
    if (status != RK_OK) {
        return status;
    }
    status = workers_from_status(client, &cluster, workers, error);
    rk_cluster_status_clear(&cluster);
    if (status == RK_OK) {
        known_set(client, workers);
    }
    return status;
}

enum rk_status rk_client_pick_worker(struct rk_client *client, char **ret_address,
                                     struct rk_error *error)
{
    struct workers workers = {.count = 0};
    enum rk_status status = workers_choose(client, &workers, error);
    if (status == RK_OK) {
        *ret_address = workers.addresses[0];
        workers.addresses[0] = NULL;
    }
    workers_clear(&workers);
    return status;
}

void rk_client_string_free(char *text)
{
    rk_free(text);
}

static bool running_add(struct rk_client *client, struct running *running)
{
    (void)pthread_mutex_lock(&client->lock);
    bool cancelled = client->cancelled;
    running->next = client->running;
    client->running = running;
    (void)pthread_mutex_unlock(&client->lock);
    return !cancelled;
}

static void running_remove(struct rk_client *client, struct running *running)
{
    (void)pthread_mutex_lock(&client->lock);
    struct running **at = &client->running;
    while (*at != running) {
        at = &(*at)->next;
    }
    *at = running->next;
    (void)pthread_mutex_unlock(&client->lock);
}

static enum rk_status stream_run(struct rk_rpc_stream *stream, const struct rk_client_call *call,
                                 bool *ret_received, struct rk_error *error)
{
    enum rk_status status = rk_rpc_stream_send(stream, call->request);
    if (status == RK_OK) {
        status = rk_rpc_stream_send_done(stream);
    }
    while (status == RK_OK) {
        ProtobufCMessage *message = NULL;
        status = rk_rpc_stream_recv(stream, call->reply_type, &message);
        if (status == RK_ERR_NOT_FOUND) { /* The last reply was there. */
            return rk_rpc_stream_finish(stream, error);
        }
        if (status == RK_OK) {
            *ret_received = true;
            status = call->handler(call->context, &message, error);
            rk_rpc_message_free(message);
            if (status != RK_OK) { /* Ours, not the call's: it has its own text. */
                rk_rpc_stream_cancel(stream);
                struct rk_error ended = {.status = RK_OK};
                enum rk_status last = rk_rpc_stream_finish(stream, &ended);
                RK_LOG_DEBUG("call_dropped", "status=%s", rk_status_name(last));
                return status;
            }
        }
    }
    struct rk_error why = {.status = RK_OK};
    enum rk_status final = rk_rpc_stream_finish(stream, &why);
    if (final != RK_OK) {
        return rk_error_set(error, final, "%s", why.text);
    }
    return rk_error_set(error, status, "%s", rk_status_text(status));
}

static enum rk_status call_worker(struct rk_client *client, const char *address,
                                  const struct rk_client_call *call, bool *ret_received,
                                  struct rk_error *error)
{
    struct channel *channel = NULL;
    struct running running = {.stream = NULL};
    enum rk_status status = channel_acquire(client, address, &channel, error);
    if (status != RK_OK) {
        return status;
    }
    status =
        rk_rpc_stream_open(channel->rpc, call->path, client->timeout_ms, &running.stream, error);
    if (status == RK_OK) {
        if (!running_add(client, &running)) {
            rk_rpc_stream_cancel(running.stream);
        }
        status = stream_run(running.stream, call, ret_received, error);
        running_remove(client, &running);
        rk_rpc_stream_destroy(running.stream);
    }
    channel_release(client, channel);
    if (status != RK_OK) {
        name_peer("worker", address, error);
    }
    return status;
}

/* At the workers in turn until one has answered something. */
enum rk_status rk_client_call_worker(struct rk_client *client, const struct rk_client_call *call,
                                     struct rk_error *error)
{
    struct workers workers = {.count = 0};
    if (rk_is_copy(client->maker)) {
        return rk_copy_refuse(error);
    }
    enum rk_status status = workers_choose(client, &workers, error);
    bool received = false;
    bool next = status == RK_OK;
    for (size_t i = 0; i < workers.count && next; i++) {
        status = call_worker(client, workers.addresses[i], call, &received, error);
        next = (status == RK_ERR_UNAVAILABLE || status == RK_ERR_FULL) && !received;
    }
    workers_clear(&workers);
    return status;
}
