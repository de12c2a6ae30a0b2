/* Status. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/record.h"

#include <string.h>
#include <unistd.h>

#define STATUS_SEGMENTS     1000u
#define STATUS_SEGMENTS_MAX 100000u
#define STATUS_BYTES_MAX    ((size_t)16 << 20) /* of segments in one reply */

static enum rk_status out_of_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "the coordinator is out of memory");
}

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
    info->numeric_path = arena_string(arena, node->info->numeric_path);
    info->fingerprint.data = arena_alloc(arena, info->fingerprint.len, 1);
    if (info->node_id == NULL || info->grpc_address == NULL || info->host_id == NULL ||
        info->shm_socket == NULL || info->ucx_address == NULL || info->version == NULL ||
        info->model == NULL || info->metrics_address == NULL || info->numeric_path == NULL ||
        info->fingerprint.data == NULL) {
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

/* "away": it comes back with its node. "gone": only the tokens are left. "partial": shards of it
 * are still to be announced. */
static const char *segment_state(const struct coordinator *coordinator,
                                 const struct index_segment *segment, int64_t now_ns)
{
    if (segment->has_kv) {
        return index_segment_state(coordinator->index, segment, NULL, now_ns) == RK_OK ? "stored"
                                                                                       : "away";
    }
    for (uint32_t i = 0; i < segment->num_shards; i++) {
        enum location_state state = segment->locations[i].state;

        if (state == LOCATION_EVICTED || state == LOCATION_LOST) {
            return "gone";
        }
    }
    return "partial";
}

static const char *segment_kind(const struct index_segment *segment)
{
    if (!rk_origin_known(&segment->origin)) {
        return "";
    }
    return rk_origin_is_chain(&segment->origin) ? "chain" : "alone";
}

/* Under index_lock. */
static Redknot__V1__StatusReply__Segment *segment_message(const struct coordinator *coordinator,
                                                          struct arena *arena,
                                                          const struct index_segment *segment,
                                                          int64_t now_ns)
{
    Redknot__V1__StatusReply__Segment *message = arena_alloc(arena, 1, sizeof(*message));
    struct rk_id *ids = arena_alloc(arena, 2, sizeof(*ids));

    if (message == NULL || ids == NULL) {
        return NULL;
    }
    redknot__v1__status_reply__segment__init(message);
    ids[0] = segment->id;
    message->segment_id = record_put_id(&ids[0]);
    message->label = arena_string(arena, segment->label);
    message->num_tokens = segment->num_tokens;
    message->bytes = segment->has_kv ? index_segment_bytes(segment) : 0;
    message->committed = segment->has_kv;
    message->kind = (char *)(uintptr_t)segment_kind(segment);
    message->state = (char *)(uintptr_t)segment_state(coordinator, segment, now_ns);
    if (rk_origin_is_chain(&segment->origin)) {
        ids[1] = segment->origin.alone;
        message->alone_id = record_put_id(&ids[1]);
    }
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

/* Where a page of segments ended: the id, for the next one to be found at once, and its serial
 * number, for when it is gone by then. */
struct status_cursor {
    struct rk_id id;
    uint64_t serial;
};

/* Under index_lock. The first segment of the page; the table is in the order of serial numbers. */
static enum rk_status begin_page(struct coordinator *coordinator, const ProtobufCBinaryData *after,
                                 struct index_segment **ret_segment, struct rk_error *error)
{
    struct index_segment *segment = index_segments(coordinator->index);
    struct status_cursor cursor;

    if (after->len == 0) {
        *ret_segment = segment;
        return RK_OK;
    }
    if (after->len != sizeof(cursor)) {
        return rk_error_set(error, RK_ERR_INVALID, "after is no next_after of an earlier reply");
    }
    memcpy(&cursor, after->data, sizeof(cursor));
    struct index_segment *last = index_segment_find(coordinator->index, &cursor.id);
    if (last != NULL && last->serial == cursor.serial) {
        *ret_segment = last->hh.next;
        return RK_OK;
    }
    while (segment != NULL && segment->serial <= cursor.serial) {
        segment = segment->hh.next;
    }
    *ret_segment = segment;
    return RK_OK;
}

static bool end_page(struct arena *arena, const struct index_segment *last,
                     Redknot__V1__StatusReply *reply)
{
    struct status_cursor *cursor = arena_alloc(arena, 1, sizeof(*cursor));

    if (cursor == NULL) {
        return false;
    }
    *cursor = (struct status_cursor){.id = last->id, .serial = last->serial};
    reply->next_after =
        (ProtobufCBinaryData){.len = sizeof(*cursor), .data = (uint8_t *)(void *)cursor};
    return true;
}

/* Under index_lock. Ends where the reply is full or long enough. */
static enum rk_status fill_segments(struct coordinator *coordinator, struct arena *arena,
                                    const Redknot__V1__StatusRequest *request,
                                    Redknot__V1__StatusReply *reply, struct rk_error *error)
{
    uint64_t segments_max = request->segments_max == 0 ? STATUS_SEGMENTS : request->segments_max;
    const struct index_segment *last = NULL;
    struct index_segment *segment = NULL;
    int64_t now_ns = rk_clock_ns();
    size_t bytes = 0;
    enum rk_status status = begin_page(coordinator, &request->after, &segment, error);

    if (status != RK_OK) {
        return status;
    }
    segments_max = segments_max < STATUS_SEGMENTS_MAX ? segments_max : STATUS_SEGMENTS_MAX;
    segments_max = segments_max < reply->num_segments ? segments_max : reply->num_segments;
    reply->segments = arena_alloc(arena, segments_max, sizeof(*reply->segments));
    if (reply->segments == NULL) {
        return out_of_memory(error);
    }
    for (; segment != NULL && reply->n_segments < segments_max && bytes < STATUS_BYTES_MAX;
         segment = segment->hh.next) {
        last = segment;
        if (!segment->has_kv && !request->with_gone) {
            continue;
        }
        Redknot__V1__StatusReply__Segment *message =
            segment_message(coordinator, arena, segment, now_ns);
        if (message == NULL) {
            return out_of_memory(error);
        }
        reply->segments[reply->n_segments++] = message;
        bytes += protobuf_c_message_get_packed_size(&message->base);
    }
    if (segment != NULL && last != NULL && !end_page(arena, last, reply)) {
        return out_of_memory(error);
    }
    return RK_OK;
}

/* Under index_lock. */
static enum rk_status fill_status(struct coordinator *coordinator, struct arena *arena,
                                  const Redknot__V1__StatusRequest *request,
                                  Redknot__V1__StatusReply *reply, struct rk_error *error)
{
    struct index_node *nodes = index_nodes(coordinator->index);
    int64_t now_ns = rk_clock_ns();
    double factor_max = index_factor_max(coordinator->index, now_ns);

    reply->num_segments = index_num_segments(coordinator->index);
    reply->num_gone = index_num_without_kv(coordinator->index);
    if (request->after.len == 0) { /* Later pages are of segments only. */
        reply->nodes = arena_alloc(arena, HASH_COUNT(nodes), sizeof(*reply->nodes));
        if (reply->nodes == NULL) {
            return out_of_memory(error);
        }
        for (struct index_node *node = nodes; node != NULL; node = node->hh.next) {
            reply->nodes[reply->n_nodes] =
                node_message(coordinator, arena, node, factor_max, now_ns);
            if (reply->nodes[reply->n_nodes++] == NULL) {
                return out_of_memory(error);
            }
        }
    }
    return request->with_segments ? fill_segments(coordinator, arena, request, reply, error)
                                  : RK_OK;
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
    if (coordinator->options.cluster_id != NULL) {
        reply->cluster_id = (char *)(uintptr_t)coordinator->options.cluster_id;
    }
    reply->pid = (uint32_t)getpid();
    (void)pthread_mutex_lock(&coordinator->index_lock);
    status =
        fill_status(coordinator, arena, (const Redknot__V1__StatusRequest *)message, reply, error);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    *ret_reply = &reply->base;
    return status;
}
