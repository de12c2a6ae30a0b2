/* Place, Commit, Abort: the two-phase put. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/text.h"
#include "common/rpc/origin_message.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/placement.h"
#include "coordinator/record.h"

#include <inttypes.h>
#include <string.h>

#define UNDO_MS 2000

static enum rk_status out_of_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "the coordinator is out of memory");
}

/* ---- Place ---- */

/* What Place was asked for, checked. */
struct place_plan {
    const Redknot__V1__PlaceRequest *request;
    struct rk_origin origin;
    struct rk_id id;
    struct rk_id fingerprint;
    struct rk_kv_layout layout;
};

static enum rk_status check_place(const Redknot__V1__PlaceRequest *request,
                                  struct place_plan *ret_plan, struct rk_error *error)
{
    struct place_plan plan = {.request = request};

    if (!record_id(&request->segment_id, &plan.id) ||
        !record_id(&request->fingerprint, &plan.fingerprint)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "segment_id and fingerprint must have %d bytes each", RK_ID_BYTES);
    }
    if (!record_layout(request->layout, &plan.layout)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "the layout is missing or out of bounds; page_tokens must be %d",
                            RK_PAGE_TOKENS);
    }
    if (request->num_tokens == 0 || request->num_tokens > RK_SEGMENT_TOKENS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "num_tokens is %u, it must be 1 to %u",
                            request->num_tokens, RK_SEGMENT_TOKENS_MAX);
    }
    if (request->n_token_ids != 0 && request->n_token_ids != request->num_tokens) {
        return rk_error_set(error, RK_ERR_INVALID, "%zu token_ids for %u tokens",
                            request->n_token_ids, request->num_tokens);
    }
    enum rk_status status = rk_text_check_name("the label", request->label, strlen(request->label),
                                               RECORD_LABEL_MAX, error);
    if (status != RK_OK) {
        return status;
    }
    if (!rk_origin_message_read(request->origin, &plan.origin)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "an origin has ids of %d bytes and a salt tag of %d", RK_ID_BYTES,
                            RK_SALT_TAG_BYTES);
    }
    *ret_plan = plan;
    return RK_OK;
}

Redknot__V1__Shard *coordinator_shard_message(struct arena *arena,
                                              const struct index_segment *segment,
                                              uint32_t shard_index)
{
    const struct index_location *location = &segment->locations[shard_index];
    Redknot__V1__Shard *shard = arena_alloc(arena, 1, sizeof(*shard));
    struct rk_id *ids = arena_alloc(arena, 2, sizeof(*ids));

    if (shard == NULL || ids == NULL) {
        return NULL;
    }
    redknot__v1__shard__init(shard);
    ids[0] = segment->id;
    ids[1] = segment->fingerprint;
    shard->segment_id = record_put_id(&ids[0]);
    shard->fingerprint = record_put_id(&ids[1]);
    shard->generation = segment->generation;
    shard->shard_index = shard_index;
    shard->num_shards = segment->num_shards;
    shard->num_tokens = segment->num_tokens;
    shard->heads = arena_alloc(arena, 1, sizeof(*shard->heads));
    shard->layout = arena_alloc(arena, 1, sizeof(*shard->layout));
    shard->node_id = arena_string(arena, location->node == NULL ? "" : location->node->node_id);
    if (shard->heads == NULL || shard->layout == NULL || shard->node_id == NULL) {
        return NULL;
    }
    record_put_heads(&location->heads, shard->heads);
    record_put_layout(&segment->layout, shard->layout);
    return shard;
}

Redknot__V1__StoreEndpoint *coordinator_endpoint_message(struct arena *arena,
                                                         const struct index_node *node)
{
    Redknot__V1__StoreEndpoint *endpoint = arena_alloc(arena, 1, sizeof(*endpoint));

    if (endpoint == NULL) {
        return NULL;
    }
    redknot__v1__store_endpoint__init(endpoint);
    endpoint->incarnation = node->info->incarnation;
    endpoint->node_id = arena_string(arena, node->node_id);
    endpoint->grpc_address = arena_string(arena, node->info->grpc_address);
    endpoint->host_id = arena_string(arena, node->info->host_id);
    endpoint->shm_socket = arena_string(arena, node->info->shm_socket);
    endpoint->ucx_address = arena_string(arena, node->info->ucx_address);
    if (endpoint->node_id == NULL || endpoint->grpc_address == NULL || endpoint->host_id == NULL ||
        endpoint->shm_socket == NULL || endpoint->ucx_address == NULL) {
        return NULL;
    }
    return endpoint;
}

/* Adds the endpoint unless the reply has one of that node already. */
static bool add_endpoint(struct arena *arena, Redknot__V1__PlaceReply *reply,
                         const struct index_node *node)
{
    for (size_t i = 0; i < reply->n_stores; i++) {
        if (strcmp(reply->stores[i]->node_id, node->node_id) == 0) {
            return true;
        }
    }
    reply->stores[reply->n_stores] = coordinator_endpoint_message(arena, node);
    return reply->stores[reply->n_stores++] != NULL;
}

static bool reserve_reply(struct arena *arena, Redknot__V1__PlaceReply *reply, uint32_t num_shards)
{
    reply->shards = arena_alloc(arena, num_shards, sizeof(*reply->shards));
    reply->stores = arena_alloc(arena, num_shards, sizeof(*reply->stores));
    return reply->shards != NULL && reply->stores != NULL;
}

/* Under index_lock. RK_ERR_NOT_FOUND: there is no live copy of just this. */
static enum rk_status find_committed(struct coordinator *coordinator, struct arena *arena,
                                     const struct place_plan *plan, Redknot__V1__PlaceReply *reply)
{
    struct index_segment *segment = index_segment_find(coordinator->index, &plan->id);

    if (segment == NULL || segment->num_tokens != plan->request->num_tokens ||
        !rk_kv_layout_equal(&segment->layout, &plan->layout) ||
        index_segment_state(coordinator->index, segment, &plan->fingerprint, rk_clock_ns()) !=
            RK_OK) {
        return RK_ERR_NOT_FOUND;
    }
    if (!reserve_reply(arena, reply, segment->num_shards)) {
        return RK_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < segment->num_shards; i++) {
        reply->shards[i] = coordinator_shard_message(arena, segment, i);
        if (reply->shards[i] == NULL || !add_endpoint(arena, reply, segment->locations[i].node)) {
            return RK_ERR_NO_MEMORY;
        }
        reply->n_shards++;
    }
    reply->already_committed = true;
    index_segment_touch(coordinator->index, segment);
    return RK_OK;
}

struct candidates {
    struct placement_node *rows; /* for placement_choose */
    struct index_node **nodes;
    size_t count;
    size_t num_too_small;
    size_t num_ejected;
};

/* Under index_lock: live stores that could ever hold such a shard. */
static enum rk_status find_candidates(struct coordinator *coordinator, struct arena *arena,
                                      uint64_t shard_bytes, struct candidates *ret_candidates)
{
    struct index_node *first = index_nodes(coordinator->index);
    size_t num_nodes = HASH_COUNT(first);
    int64_t now_ns = rk_clock_ns();
    struct candidates candidates = {
        .rows = arena_alloc(arena, num_nodes, sizeof(*candidates.rows)),
        .nodes = arena_alloc(arena, num_nodes, sizeof(struct index_node *)),
    };

    if (candidates.rows == NULL || candidates.nodes == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    for (struct index_node *node = first; node != NULL; node = node->hh.next) {
        const Redknot__V1__NodeInfo *info = node->info;

        if (!index_node_usable(coordinator->index, node, now_ns)) {
            candidates.num_ejected +=
                index_node_alive(coordinator->index, node, now_ns) && node->liveness.ejected;
            continue;
        }
        if (info->capacity_bytes != 0 && info->capacity_bytes < shard_bytes) {
            candidates.num_too_small++;
            continue;
        }
        candidates.nodes[candidates.count] = node;
        candidates.rows[candidates.count++] = (struct placement_node){
            .node_id = node->node_id,
            .weight = placement_weight(info->capacity_bytes, info->used_bytes) *
                      index_node_factor(coordinator->index, node, now_ns),
        };
    }
    *ret_candidates = candidates;
    return RK_OK;
}

static enum rk_status fill_shard(struct arena *arena, const struct placed *placed, uint32_t i,
                                 const struct index_node *node, Redknot__V1__PlaceReply *reply)
{
    Redknot__V1__Shard *shard = arena_alloc(arena, 1, sizeof(*shard));

    if (shard == NULL || !add_endpoint(arena, reply, node)) {
        return RK_ERR_NO_MEMORY;
    }
    redknot__v1__shard__init(shard);
    shard->generation = placed->generation;
    shard->shard_index = i;
    shard->num_shards = placed->num_shards;
    shard->num_tokens = placed->num_tokens;
    shard->heads = arena_alloc(arena, 1, sizeof(*shard->heads));
    shard->layout = arena_alloc(arena, 1, sizeof(*shard->layout));
    shard->node_id = arena_string(arena, node->node_id);
    if (shard->heads == NULL || shard->layout == NULL || shard->node_id == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    record_put_heads(&placed->shards[i].heads, shard->heads);
    record_put_layout(&placed->layout, shard->layout);
    reply->shards[reply->n_shards++] = shard;
    return RK_OK;
}

/* Under index_lock. */
static enum rk_status choose_nodes(struct arena *arena, const struct candidates *candidates,
                                   struct placed *placed, Redknot__V1__PlaceReply *reply)
{
    for (uint32_t i = 0; i < placed->num_shards; i++) {
        size_t chosen = placement_choose(&placed->id, i, candidates->rows, candidates->count);
        const struct index_node *node = candidates->nodes[chosen];
        struct placed_shard *shard = &placed->shards[i];
        enum rk_status status;

        shard->heads = placement_heads(&placed->layout, i, placed->num_shards);
        shard->incarnation = node->info->incarnation;
        shard->node_id = rk_alloc_string(node->node_id);
        shard->address = rk_alloc_string(node->info->grpc_address);
        if (shard->node_id == NULL || shard->address == NULL) {
            return RK_ERR_NO_MEMORY;
        }
        status = fill_shard(arena, placed, i, node, reply);
        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}

/* Under index_lock. On RK_OK the table owns placed. */
static enum rk_status place_new(struct coordinator *coordinator, struct arena *arena,
                                struct placed *placed, Redknot__V1__PlaceReply *reply,
                                struct rk_error *error)
{
    uint64_t pages = rk_kv_pages_total(&placed->layout, placed->num_tokens);
    uint64_t bytes = pages * rk_kv_page_bytes(&placed->layout) / placed->num_shards;
    struct candidates candidates = {0};
    enum rk_status status = find_candidates(coordinator, arena, bytes, &candidates);

    if (status == RK_OK && candidates.count == 0) {
        if (candidates.num_too_small != 0) {
            return rk_error_set(error, RK_ERR_TOO_LONG,
                                "a shard of %" PRIu64
                                " bytes fits in none of the %zu stores: start "
                                "one with --dram %" PRIu64 "MiB or more, use shorter segments, or "
                                "a coordinator with more --shards-per-segment",
                                bytes, candidates.num_too_small, (bytes >> 20) + 1);
        }
        if (candidates.num_ejected != 0) {
            return rk_error_set(error, RK_ERR_UNAVAILABLE,
                                "all %zu living store nodes are ejected, for they do not answer; "
                                "the coordinator's log has the reasons",
                                candidates.num_ejected);
        }
        return rk_error_set(error, RK_ERR_UNAVAILABLE,
                            "no store node is alive; start redknot-kvstore");
    }
    if (status == RK_OK && !reserve_reply(arena, reply, placed->num_shards)) {
        status = RK_ERR_NO_MEMORY;
    }
    if (status == RK_OK) {
        status = choose_nodes(arena, &candidates, placed, reply);
    }
    if (status == RK_OK) {
        placed->placed_ns = rk_clock_ns();
        status = placed_add(&coordinator->placed, placed);
    }
    if (status == RK_ERR_FULL) {
        return rk_error_set(error, status, "too many puts are under way; try again");
    }
    return status == RK_OK ? RK_OK : out_of_memory(error);
}

enum rk_status coordinator_place(struct coordinator *coordinator, struct arena *arena,
                                 const ProtobufCMessage *message, ProtobufCMessage **ret_reply,
                                 struct rk_error *error)
{
    const Redknot__V1__PlaceRequest *request = (const Redknot__V1__PlaceRequest *)message;
    Redknot__V1__PlaceReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    struct placed *placed = NULL;
    struct place_plan plan;
    uint64_t generation = 0;
    enum rk_status status = check_place(request, &plan, error);

    if (status != RK_OK) {
        return status;
    }
    if (reply == NULL) {
        return out_of_memory(error);
    }
    redknot__v1__place_reply__init(reply);
    *ret_reply = &reply->base;
    (void)pthread_mutex_lock(&coordinator->index_lock);
    status = find_committed(coordinator, arena, &plan, reply);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (status != RK_ERR_NOT_FOUND) {
        return status == RK_OK ? RK_OK : out_of_memory(error);
    }
    (void)pthread_mutex_lock(&coordinator->write_lock);
    status = coordinator_next_generation(coordinator, &generation, error);
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    if (status != RK_OK) {
        return status;
    }
    placed =
        placed_create(placement_num_shards(&plan.layout, coordinator->options.shards_per_segment),
                      request->token_ids, (uint32_t)request->n_token_ids, request->label);
    if (placed == NULL) {
        return out_of_memory(error);
    }
    placed->id = plan.id;
    placed->fingerprint = plan.fingerprint;
    placed->layout = plan.layout;
    placed->generation = generation;
    placed->num_tokens = request->num_tokens;
    placed->origin = plan.origin;
    (void)pthread_mutex_lock(&coordinator->index_lock);
    status = place_new(coordinator, arena, placed, reply, error);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (status != RK_OK) {
        placed_destroy(placed);
        return status;
    }
    for (size_t i = 0; i < reply->n_shards; i++) {
        reply->shards[i]->segment_id = request->segment_id; /* Lives until the reply is sent. */
        reply->shards[i]->fingerprint = request->fingerprint;
    }
    rk_metric_add(coordinator->metrics.places, 1);
    return RK_OK;
}

/* ---- Commit ---- */

static enum rk_status check_id(const ProtobufCBinaryData *bytes, struct rk_id *ret_id,
                               struct rk_error *error)
{
    if (!record_id(bytes, ret_id)) {
        return rk_error_set(error, RK_ERR_INVALID, "segment_id must have %d bytes", RK_ID_BYTES);
    }
    return RK_OK;
}

/* An id names its content, so whoever comes second with it has what he wants if the first one's
 * copy can be read. Under index_lock. */
static enum rk_status superseded(struct coordinator *coordinator,
                                 const struct index_segment *segment, struct rk_error *error)
{
    enum rk_status state =
        index_segment_state(coordinator->index, segment, &segment->fingerprint, rk_clock_ns());

    return state == RK_OK ? RK_OK
                          : rk_error_set(error, RK_MISS_STALE_GENERATION,
                                         "a newer generation of this segment was committed and is "
                                         "gone (%s); place it again",
                                         rk_status_name(state));
}

/* Why there is no such put. Under index_lock. RK_OK: it was committed before. */
static enum rk_status explain_missing(struct coordinator *coordinator, const struct rk_id *id,
                                      uint64_t generation, struct rk_error *error)
{
    const struct index_segment *segment = index_segment_find(coordinator->index, id);

    if (segment != NULL && segment->generation == generation) {
        return RK_OK;
    }
    if (segment != NULL && segment->generation > generation) {
        return superseded(coordinator, segment, error);
    }
    return rk_error_set(error, RK_ERR_NOT_FOUND,
                        "no such put: never placed, aborted, or expired; place it again");
}

/* Marks the put as ours. *ret_placed NULL with RK_OK: it was committed before. */
static enum rk_status begin_commit(struct coordinator *coordinator, const struct rk_id *id,
                                   uint64_t generation, struct placed **ret_placed,
                                   struct rk_error *error)
{
    enum rk_status status = RK_OK;
    struct placed *placed;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    placed = placed_find(&coordinator->placed, id, generation);
    if (placed == NULL) {
        status = explain_missing(coordinator, id, generation, error);
    } else if (placed->committing) {
        placed = NULL;
        status = rk_error_set(error, RK_ERR_BUSY, "this put is being committed already");
    } else {
        placed->committing = true;
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    *ret_placed = placed;
    return status;
}

/* What a commit says of its store. Less time than a probe has proves nothing. */
static void note_answer(struct coordinator *coordinator, const struct placed_shard *shard,
                        enum rk_status status, int left_ms, const struct rk_error *error)
{
    bool late = status == RK_ERR_DEADLINE;

    if (status == RK_ERR_UNAVAILABLE ||
        (late && (uint32_t)left_ms >= coordinator->options.probe_timeout_ms)) {
        coordinator_store_failed(coordinator, shard->node_id, shard->incarnation,
                                 error == NULL ? "" : error->text);
    } else if (status == RK_OK || (!late && error != NULL && error->answered)) {
        coordinator_store_answered(coordinator, shard->node_id, shard->incarnation);
    }
}

static enum rk_status commit_on_stores(struct coordinator *coordinator, const struct placed *placed,
                                       uint32_t *ret_tried, struct rk_error *error)
{
    int64_t deadline_ns = rk_deadline_in_ms(coordinator->options.store_deadline_ms);

    for (uint32_t i = 0; i < placed->num_shards; i++) {
        const struct placed_shard *shard = &placed->shards[i];
        int left_ms = rk_deadline_left_ms(deadline_ns);
        enum rk_status status;

        *ret_tried = i + 1;
        status = left_ms == 0 ? rk_error_set(error, RK_ERR_DEADLINE, "no time was left")
                              : peers_call(coordinator->peers, PEERS_COMMIT, shard->address,
                                           &placed->id, placed->generation, i, left_ms, error);

        note_answer(coordinator, shard, status, left_ms, error);
        if (status != RK_OK) {
            rk_error_prefix(error, "store node %s (%s) did not commit shard %u", shard->node_id,
                            shard->address, i);
            /* A newer generation came to it first: its commit is about to be published. */
            return status == RK_ERR_EXISTS ? RK_MISS_STALE_GENERATION : status;
        }
    }
    return RK_OK;
}

void coordinator_tell_store(struct coordinator *coordinator, enum peers_verb verb,
                            const char *address, const struct rk_id *id, uint64_t generation,
                            uint32_t shard_index, int64_t deadline_ns)
{
    struct rk_error error = {0};
    int left_ms = rk_deadline_left_ms(deadline_ns);
    enum rk_status status = RK_ERR_DEADLINE;

    if (left_ms != 0) {
        status = peers_call(coordinator->peers, verb, address, id, generation, shard_index, left_ms,
                            &error);
    }
    if (status !=
        RK_OK) { /* It collects what is staged by itself, and hears the rest at Announce. */
        RK_LOG_DEBUG("store_not_told", "address=%q generation=%" PRIu64 " reason=%q", address,
                     generation, error.text);
    }
}

void coordinator_undo_placed(struct coordinator *coordinator, const struct placed *placed,
                             uint32_t num_tried)
{
    int64_t deadline_ns = rk_deadline_in_ms(UNDO_MS);

    for (uint32_t i = 0; i < placed->num_shards; i++) {
        const char *address = placed->shards[i].address;

        /* The last one tried may have committed without our hearing of it: both. */
        if (i + 1 >= num_tried) {
            coordinator_tell_store(coordinator, PEERS_ABORT, address, &placed->id,
                                   placed->generation, i, deadline_ns);
        }
        if (i < num_tried) {
            coordinator_tell_store(coordinator, PEERS_DROP, address, &placed->id,
                                   placed->generation, i, deadline_ns);
        }
    }
}

/* Under write_lock: is it still the newest, not dropped, and are its stores what they were?
 * *ret_superseded with RK_OK: a newer one can be read, so this one is not wanted any more. */
static enum rk_status check_still_good(struct coordinator *coordinator, const struct placed *placed,
                                       bool *ret_superseded, struct rk_error *error)
{
    const struct index_segment *segment;
    enum rk_status status = RK_OK;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    segment = index_segment_find(coordinator->index, &placed->id);
    *ret_superseded = segment != NULL && segment->generation > placed->generation;
    if (placed->unwanted ||
        placed->generation <=
            index_unwanted_kin(coordinator->index, &placed->id, &placed->origin)) {
        *ret_superseded = false;
        status = rk_error_set(error, RK_MISS_STALE_GENERATION,
                              "this segment was dropped after the put was placed; place it again");
    } else if (*ret_superseded) {
        status = superseded(coordinator, segment, error);
    }
    for (uint32_t i = 0; status == RK_OK && !*ret_superseded && i < placed->num_shards; i++) {
        const struct index_node *node =
            index_node_find(coordinator->index, placed->shards[i].node_id);

        if (node == NULL || node->info->incarnation != placed->shards[i].incarnation) {
            status = rk_error_set(error, RK_ERR_UNAVAILABLE,
                                  "store node %s restarted and lost shard %u; place it again",
                                  placed->shards[i].node_id, i);
        }
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    return status;
}

/* Puts the segment into the index. What its stores removed since they committed it is evicted:
 * only the index lock keeps a heartbeat from coming in between. Under write_lock. */
static enum rk_status show(struct coordinator *coordinator, const struct placed *placed,
                           const struct segment_spec *spec, struct segment_location_spec *locations,
                           struct index_drops *drops)
{
    bool as_saved = true;
    enum rk_status status;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    for (uint32_t i = 0; i < placed->num_shards; i++) {
        if (placed->shards[i].removed) {
            locations[i].state = LOCATION_EVICTED;
            as_saved = false;
        }
    }
    status = index_segment_put(coordinator->index, spec, rk_clock_ns(), drops);
    if (status != RK_OK || !as_saved) {
        /* The record on disk says more than is true: write it anew, or take it back. */
        index_journal_add(coordinator->index, 's', &placed->id);
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    return status;
}

/* Durable, then visible. */
static enum rk_status publish(struct coordinator *coordinator, const struct placed *placed,
                              struct index_drops *drops, bool *ret_superseded,
                              struct rk_error *error)
{
    struct segment_location_spec *locations = rk_alloc_zero(placed->num_shards, sizeof(*locations));
    struct segment_spec spec = {
        .id = placed->id,
        .fingerprint = placed->fingerprint,
        .layout = placed->layout,
        .generation = placed->generation,
        .num_tokens = placed->num_tokens,
        .num_shards = placed->num_shards,
        .label = placed->label,
        .origin = placed->origin,
        .has_tokens = placed->num_token_ids != 0,
        .locations = locations,
    };
    enum rk_status status;

    if (locations == NULL) {
        return out_of_memory(error);
    }
    for (uint32_t i = 0; i < placed->num_shards; i++) {
        locations[i] = (struct segment_location_spec){
            .node_id = placed->shards[i].node_id,
            .incarnation = placed->shards[i].incarnation,
            .heads = placed->shards[i].heads,
            .state = LOCATION_PRESENT,
        };
    }
    (void)pthread_mutex_lock(&coordinator->write_lock);
    status = check_still_good(coordinator, placed, ret_superseded, error);
    if (status == RK_OK && !*ret_superseded) {
        status = coordinator_save_commit(coordinator, &spec, placed->token_ids, error);
    }
    if (status == RK_OK && !*ret_superseded) {
        status = show(coordinator, placed, &spec, locations, drops);
        if (status != RK_OK) {
            (void)out_of_memory(error);
        }
        if (coordinator_flush(coordinator, false, NULL) != RK_OK) {
            RK_LOG_WARN("metadata_behind", "reason=%q", "the next sweep writes it again");
        }
    }
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    rk_free(locations);
    return status;
}

enum rk_status coordinator_commit(struct coordinator *coordinator, struct arena *arena,
                                  const ProtobufCMessage *message, ProtobufCMessage **ret_reply,
                                  struct rk_error *error)
{
    const Redknot__V1__CommitRequest *request = (const Redknot__V1__CommitRequest *)message;
    Redknot__V1__CommitReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    struct index_drops drops = {0};
    struct placed *placed = NULL;
    struct rk_id id;
    uint32_t num_tried = 0;
    bool unwanted = false;
    enum rk_status status = check_id(&request->segment_id, &id, error);

    if (status == RK_OK && reply == NULL) {
        status = out_of_memory(error);
    }
    if (status == RK_OK) {
        redknot__v1__commit_reply__init(reply);
        *ret_reply = &reply->base;
        status = begin_commit(coordinator, &id, request->generation, &placed, error);
    }
    if (status != RK_OK || placed == NULL) {
        return status;
    }
    /* Spares the stores a vain commit. */
    status = check_still_good(coordinator, placed, &unwanted, error);
    if (status == RK_OK && !unwanted) {
        status = commit_on_stores(coordinator, placed, &num_tried, error);
    }
    if (status == RK_OK && !unwanted) {
        status = publish(coordinator, placed, &drops, &unwanted, error);
    }
    (void)pthread_mutex_lock(&coordinator->index_lock);
    placed_take(&coordinator->placed, placed);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (status == RK_OK && unwanted) {
        rk_metric_add(coordinator->metrics.aborts, 1);
        coordinator_undo_placed(coordinator, placed, num_tried);
    } else if (status == RK_OK) {
        rk_metric_add(coordinator->metrics.commits, 1);
        coordinator_send_drops(coordinator, &drops, UNDO_MS);
    } else {
        rk_metric_add(coordinator->metrics.aborts, 1);
        coordinator_undo_placed(coordinator, placed, num_tried);
        RK_LOG_WARN("commit_failed", "generation=%" PRIu64 " status=%s reason=%q",
                    request->generation, rk_status_name(status), error == NULL ? "" : error->text);
    }
    index_drops_free(&drops);
    placed_destroy(placed);
    return status;
}

enum rk_status coordinator_abort(struct coordinator *coordinator, struct arena *arena,
                                 const ProtobufCMessage *message, ProtobufCMessage **ret_reply,
                                 struct rk_error *error)
{
    const Redknot__V1__AbortRequest *request = (const Redknot__V1__AbortRequest *)message;
    Redknot__V1__AbortReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    struct placed *placed;
    struct rk_id id;
    enum rk_status status = check_id(&request->segment_id, &id, error);

    if (status != RK_OK) {
        return status;
    }
    if (reply == NULL) {
        return out_of_memory(error);
    }
    (void)pthread_mutex_lock(&coordinator->index_lock);
    placed = placed_find(&coordinator->placed, &id, request->generation);
    if (placed != NULL && placed->committing) {
        placed = NULL;
        status = rk_error_set(error, RK_ERR_BUSY, "this put is being committed");
    } else if (placed != NULL) {
        placed_take(&coordinator->placed, placed);
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (placed != NULL) { /* None: it expired or was aborted before, which is what was asked. */
        rk_metric_add(coordinator->metrics.aborts, 1);
        coordinator_undo_placed(coordinator, placed, 0);
        placed_destroy(placed);
    }
    redknot__v1__abort_reply__init(reply);
    *ret_reply = &reply->base;
    return status;
}
