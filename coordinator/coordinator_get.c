/* Locate, Drop, Status. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/record.h"

#include <string.h>

#define DROP_MS             2000
#define STATUS_SEGMENTS     1000u
#define STATUS_SEGMENTS_MAX 100000u

static enum rk_status out_of_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "the coordinator is out of memory");
}

/* All ids at once, so that a bad one changes nothing. */
static enum rk_status read_ids(struct arena *arena, const ProtobufCBinaryData *from, size_t count,
                               struct rk_id **ret_ids, struct rk_error *error)
{
    struct rk_id *ids;

    if (count > COORDINATOR_IDS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%zu segment ids in one call, at most %u",
                            count, COORDINATOR_IDS_MAX);
    }
    ids = arena_alloc(arena, count, sizeof(*ids));
    if (ids == NULL) {
        return out_of_memory(error);
    }
    for (size_t i = 0; i < count; i++) {
        if (!record_id(&from[i], &ids[i])) {
            return rk_error_set(error, RK_ERR_INVALID, "segment id %zu has %zu bytes instead of %d",
                                i, from[i].len, RK_ID_BYTES);
        }
    }
    *ret_ids = ids;
    return RK_OK;
}

/* ---- Locate ---- */

struct locate {
    struct coordinator *coordinator;
    struct arena *arena;
    const struct rk_id *fingerprint; /* NULL: any */
    Redknot__V1__LocateReply *reply;
    size_t stores_capacity;
    uint64_t visit;
    int64_t now_ns;
    bool *wants_tokens; /* [location] */
    uint64_t num_tokens;
};

static bool add_store(struct locate *locate, struct index_node *node)
{
    Redknot__V1__LocateReply *reply = locate->reply;

    if (node->visit == locate->visit) {
        return true;
    }
    node->visit = locate->visit;
    RK_ASSERT(reply->n_stores < locate->stores_capacity);
    reply->stores[reply->n_stores] = coordinator_endpoint_message(locate->arena, node);
    return reply->stores[reply->n_stores++] != NULL;
}

static enum rk_status fill_location(struct locate *locate, struct index_segment *segment,
                                    Redknot__V1__LocateReply__Location *location)
{
    location->shards = arena_alloc(locate->arena, segment->num_shards, sizeof(*location->shards));
    if (location->shards == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < segment->num_shards; i++) {
        location->shards[i] = coordinator_shard_message(locate->arena, segment, i);
        if (location->shards[i] == NULL || !add_store(locate, segment->locations[i].node)) {
            return RK_ERR_NO_MEMORY;
        }
        location->n_shards++;
    }
    return RK_OK;
}

/* Under index_lock. */
static enum rk_status locate_one(struct locate *locate, const struct rk_id *id, size_t i,
                                 bool with_token_ids)
{
    struct coordinator *coordinator = locate->coordinator;
    Redknot__V1__LocateReply__Location *location = arena_alloc(locate->arena, 1, sizeof(*location));
    struct index_segment *segment = index_segment_find(coordinator->index, id);
    enum rk_status state = RK_MISS_ABSENT;

    if (location == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    redknot__v1__locate_reply__location__init(location);
    locate->reply->locations[i] = location;
    if (segment != NULL) {
        state =
            index_segment_state(coordinator->index, segment, locate->fingerprint, locate->now_ns);
        location->label = arena_string(locate->arena, segment->label);
        if (location->label == NULL) {
            return RK_ERR_NO_MEMORY;
        }
        if (with_token_ids && segment->has_tokens) {
            locate->wants_tokens[i] = true;
            locate->num_tokens += segment->num_tokens;
        }
        index_segment_touch(coordinator->index, segment);
    }
    if (state == RK_OK) {
        rk_metric_add(coordinator->metrics.hits, 1);
        return fill_location(locate, segment, location);
    }
    rk_metric_add(coordinator->metrics.misses[state], 1);
    location->miss = (char *)(uintptr_t)rk_status_name(state);
    return RK_OK;
}

static enum rk_status locate_all(struct locate *locate, const struct rk_id *ids, size_t count,
                                 bool with_token_ids, struct rk_error *error)
{
    struct coordinator *coordinator = locate->coordinator;
    enum rk_status status = RK_OK;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    locate->now_ns = rk_clock_ns();
    locate->visit = index_next_visit(coordinator->index);
    locate->stores_capacity = HASH_COUNT(index_nodes(coordinator->index));
    locate->reply->stores =
        arena_alloc(locate->arena, locate->stores_capacity, sizeof(*locate->reply->stores));
    if (locate->reply->stores == NULL) {
        status = RK_ERR_NO_MEMORY;
    }
    for (size_t i = 0; status == RK_OK && i < count; i++) {
        status = locate_one(locate, &ids[i], i, with_token_ids);
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    return status == RK_OK ? RK_OK : out_of_memory(error);
}

/* From the database, without locks: they do not change but by being dropped. */
static enum rk_status add_tokens(struct locate *locate, const struct rk_id *ids, size_t count,
                                 struct rk_error *error)
{
    if (locate->num_tokens > COORDINATOR_REPLY_TOKENS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG,
                            "the reply would carry %llu token ids, at most %u; ask for fewer "
                            "segments at a time",
                            (unsigned long long)locate->num_tokens, COORDINATOR_REPLY_TOKENS_MAX);
    }
    for (size_t i = 0; i < count; i++) {
        Redknot__V1__LocateReply__Location *location = locate->reply->locations[i];
        enum rk_status status;

        if (!locate->wants_tokens[i]) {
            continue;
        }
        status = coordinator_read_tokens(locate->coordinator, locate->arena, &ids[i],
                                         &location->token_ids, &location->n_token_ids, error);
        if (status != RK_OK && status != RK_ERR_NOT_FOUND) {
            return status;
        }
    }
    return RK_OK;
}

enum rk_status coordinator_locate(struct coordinator *coordinator, struct arena *arena,
                                  const ProtobufCMessage *message, ProtobufCMessage **ret_reply,
                                  struct rk_error *error)
{
    const Redknot__V1__LocateRequest *request = (const Redknot__V1__LocateRequest *)message;
    Redknot__V1__LocateReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    struct locate locate = {.coordinator = coordinator, .arena = arena, .reply = reply};
    size_t count = request->n_segment_ids;
    struct rk_id fingerprint;
    struct rk_id *ids = NULL;
    enum rk_status status = read_ids(arena, request->segment_ids, count, &ids, error);

    if (status != RK_OK) {
        return status;
    }
    if (request->fingerprint.len != 0) {
        if (!record_id(&request->fingerprint, &fingerprint)) {
            return rk_error_set(error, RK_ERR_INVALID, "the fingerprint must have %d bytes",
                                RK_ID_BYTES);
        }
        locate.fingerprint = &fingerprint;
    }
    locate.wants_tokens = arena_alloc(arena, count, sizeof(*locate.wants_tokens));
    if (reply == NULL || locate.wants_tokens == NULL) {
        return out_of_memory(error);
    }
    redknot__v1__locate_reply__init(reply);
    reply->epoch = coordinator->epoch;
    reply->locations = arena_alloc(arena, count, sizeof(*reply->locations));
    reply->n_locations = count;
    if (reply->locations == NULL) {
        return out_of_memory(error);
    }
    status = locate_all(&locate, ids, count, request->with_token_ids, error);
    if (status == RK_OK) {
        status = add_tokens(&locate, ids, count, error);
    }
    *ret_reply = &reply->base;
    return status;
}

/* ---- Drop ---- */

void coordinator_send_drops(struct coordinator *coordinator, const struct index_drops *drops,
                            int timeout_ms)
{
    int64_t deadline_ns = rk_deadline_in_ms(timeout_ms);

    for (size_t i = 0; i < drops->count; i++) {
        const struct index_drop *drop = &drops->items[i];

        if (drop->address != NULL) { /* What is not reached is told at its next Announce. */
            coordinator_tell_store(coordinator, PEERS_DROP, drop->address, &drop->id,
                                   drop->generation, drop->shard_index, deadline_ns);
        }
    }
}

enum rk_status coordinator_drop(struct coordinator *coordinator, struct arena *arena,
                                const ProtobufCMessage *message, ProtobufCMessage **ret_reply,
                                struct rk_error *error)
{
    const Redknot__V1__DropRequest *request = (const Redknot__V1__DropRequest *)message;
    Redknot__V1__DropReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    struct index_drops drops = {0};
    struct rk_id *ids = NULL;
    enum rk_status status =
        read_ids(arena, request->segment_ids, request->n_segment_ids, &ids, error);

    if (status != RK_OK) {
        return status;
    }
    if (reply == NULL) {
        return out_of_memory(error);
    }
    redknot__v1__drop_reply__init(reply);
    *ret_reply = &reply->base;
    (void)pthread_mutex_lock(&coordinator->write_lock);
    (void)pthread_mutex_lock(&coordinator->index_lock);
    for (size_t i = 0; status == RK_OK && i < request->n_segment_ids; i++) {
        struct index_segment *segment = index_segment_find(coordinator->index, &ids[i]);

        if (segment != NULL) {
            /* Also what is placed now, but not yet committed, is not wanted any more. */
            status = index_segment_drop(coordinator->index, segment,
                                        coordinator->generation_next - 1, rk_clock_ns(), &drops);
            reply->dropped += status == RK_OK ? 1 : 0;
        }
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (status != RK_OK) {
        (void)out_of_memory(error);
    } else {
        status = coordinator_flush(coordinator, true, error);
    }
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    coordinator_send_drops(coordinator, &drops, DROP_MS);
    index_drops_free(&drops);
    return status;
}

/* ---- Status ---- */

static Redknot__V1__StatusReply__Node *node_message(struct coordinator *coordinator,
                                                    struct arena *arena,
                                                    const struct index_node *node,
                                                    double factor_max, int64_t now_ns)
{
    Redknot__V1__StatusReply__Node *message = arena_alloc(arena, 1, sizeof(*message));
    Redknot__V1__NodeInfo *info = arena_alloc(arena, 1, sizeof(*info));

    if (message == NULL || info == NULL) {
        return NULL;
    }
    *info = *node->info;
    info->base.n_unknown_fields = 0;
    info->base.unknown_fields = NULL;
    info->node_id = arena_string(arena, node->info->node_id);
    info->grpc_address = arena_string(arena, node->info->grpc_address);
    info->host_id = arena_string(arena, node->info->host_id);
    info->shm_socket = arena_string(arena, node->info->shm_socket);
    info->ucx_address = arena_string(arena, node->info->ucx_address);
    info->version = arena_string(arena, node->info->version);
    info->model = arena_string(arena, node->info->model);
    info->metrics_address = arena_string(arena, node->info->metrics_address);
    info->fingerprint.data = arena_alloc(arena, info->fingerprint.len, 1);
    if (info->node_id == NULL || info->grpc_address == NULL || info->host_id == NULL ||
        info->shm_socket == NULL || info->ucx_address == NULL || info->version == NULL ||
        info->model == NULL || info->metrics_address == NULL || info->fingerprint.data == NULL) {
        return NULL;
    }
    if (info->fingerprint.len != 0) {
        memcpy(info->fingerprint.data, node->info->fingerprint.data, info->fingerprint.len);
    }
    redknot__v1__status_reply__node__init(message);
    message->info = info;
    message->alive = index_node_alive(coordinator->index, node, now_ns);
    message->state = (char *)(uintptr_t)index_node_state_name(
        index_node_state(coordinator->index, node, factor_max, now_ns));
    message->num_shards = node->num_locations;
    message->last_heartbeat_age_ms =
        node->heard_ns == 0 ? UINT64_MAX : (uint64_t)(now_ns - node->heard_ns) / 1000000;
    return message;
}

static Redknot__V1__StatusReply__Segment *segment_message(struct arena *arena,
                                                          const struct index_segment *segment)
{
    Redknot__V1__StatusReply__Segment *message = arena_alloc(arena, 1, sizeof(*message));
    struct rk_id *id = arena_alloc(arena, 1, sizeof(*id));

    if (message == NULL || id == NULL) {
        return NULL;
    }
    redknot__v1__status_reply__segment__init(message);
    *id = segment->id;
    message->segment_id = record_put_id(id);
    message->label = arena_string(arena, segment->label);
    message->num_tokens = segment->num_tokens;
    message->bytes = segment->has_kv ? index_segment_bytes(segment) : 0;
    message->committed = segment->has_kv;
    message->node_ids = arena_alloc(arena, segment->num_shards, sizeof(*message->node_ids));
    if (message->label == NULL || message->node_ids == NULL) {
        return NULL;
    }
    for (uint32_t i = 0; i < segment->num_shards; i++) {
        const struct index_node *node = segment->locations[i].node;

        if (node != NULL) {
            message->node_ids[message->n_node_ids] = arena_string(arena, node->node_id);
            if (message->node_ids[message->n_node_ids++] == NULL) {
                return NULL;
            }
        }
    }
    return message;
}

/* Under index_lock. */
static enum rk_status fill_status(struct coordinator *coordinator, struct arena *arena,
                                  const Redknot__V1__StatusRequest *request,
                                  Redknot__V1__StatusReply *reply)
{
    struct index_node *nodes = index_nodes(coordinator->index);
    uint64_t segments_max = request->segments_max == 0 ? STATUS_SEGMENTS : request->segments_max;
    int64_t now_ns = rk_clock_ns();
    double factor_max = index_factor_max(coordinator->index, now_ns);

    reply->num_segments = index_num_segments(coordinator->index);
    segments_max = segments_max < STATUS_SEGMENTS_MAX ? segments_max : STATUS_SEGMENTS_MAX;
    segments_max = segments_max < reply->num_segments ? segments_max : reply->num_segments;
    if (!request->with_segments) {
        segments_max = 0;
    }
    reply->nodes = arena_alloc(arena, HASH_COUNT(nodes), sizeof(*reply->nodes));
    reply->segments = arena_alloc(arena, segments_max, sizeof(*reply->segments));
    if (reply->nodes == NULL || reply->segments == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    for (struct index_node *node = nodes; node != NULL; node = node->hh.next) {
        reply->nodes[reply->n_nodes] = node_message(coordinator, arena, node, factor_max, now_ns);
        if (reply->nodes[reply->n_nodes++] == NULL) {
            return RK_ERR_NO_MEMORY;
        }
    }
    for (struct index_segment *segment = index_segments(coordinator->index);
         segment != NULL && reply->n_segments < segments_max; segment = segment->hh.next) {
        reply->segments[reply->n_segments] = segment_message(arena, segment);
        if (reply->segments[reply->n_segments++] == NULL) {
            return RK_ERR_NO_MEMORY;
        }
    }
    return RK_OK;
}

enum rk_status coordinator_status(struct coordinator *coordinator, struct arena *arena,
                                  const ProtobufCMessage *message, ProtobufCMessage **ret_reply,
                                  struct rk_error *error)
{
    Redknot__V1__StatusReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    enum rk_status status;

    if (reply == NULL) {
        return out_of_memory(error);
    }
    redknot__v1__status_reply__init(reply);
    reply->epoch = coordinator->epoch;
    reply->uptime_ms = (uint64_t)(rk_clock_ns() - coordinator->started_ns) / 1000000;
    reply->version = (char *)(uintptr_t)REDKNOT_VERSION;
    (void)pthread_mutex_lock(&coordinator->index_lock);
    status = fill_status(coordinator, arena, (const Redknot__V1__StatusRequest *)message, reply);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    *ret_reply = &reply->base;
    return status == RK_OK ? RK_OK : out_of_memory(error);
}
