/* Locate. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/rpc/origin_message.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/record.h"

#include <string.h>

#define LOCATE_SHARDS_MAX 262144u /* of one reply, which has to fit into a message */

static enum rk_status out_of_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "the coordinator is out of memory");
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
    size_t num_shards;
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
    locate->num_shards += segment->num_shards;
    if (locate->num_shards > LOCATE_SHARDS_MAX) {
        return RK_ERR_TOO_LONG;
    }
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

static bool fill_origin(struct arena *arena, const struct index_segment *segment,
                        Redknot__V1__LocateReply__Location *location)
{
    struct rk_origin *copy;

    if (!rk_origin_known(&segment->origin)) {
        return true;
    }
    copy = arena_alloc(arena, 1, sizeof(*copy));
    location->origin = arena_alloc(arena, 1, sizeof(*location->origin));
    if (copy == NULL || location->origin == NULL) {
        return false;
    }
    *copy = segment->origin;
    rk_origin_message_fill(copy, location->origin);
    return true;
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
        if (location->label == NULL || !fill_origin(locate->arena, segment, location)) {
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
    if (status == RK_ERR_TOO_LONG) {
        return rk_error_set(error, status,
                            "the reply would carry more than %u shards; ask for fewer segments at "
                            "a time",
                            LOCATE_SHARDS_MAX);
    }
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
    enum rk_status status = coordinator_read_ids(arena, request->segment_ids, count, &ids, error);

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
