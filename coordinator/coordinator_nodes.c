/* Register, Heartbeat, Announce. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/record.h"

#include <string.h>

#define HEARTBEAT_REMOVED_MAX 1000000u
#define ANNOUNCE_DROPS_MS     2000

static enum rk_status out_of_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "the coordinator is out of memory");
}

/* Ports are reused: a node that was started for another cluster found us at its coordinator's. */
static enum rk_status check_cluster(const struct coordinator *coordinator,
                                    const Redknot__V1__RegisterRequest *request,
                                    struct rk_error *error)
{
    const char *ours =
        coordinator->options.cluster_id != NULL ? coordinator->options.cluster_id : "";

    if (request->cluster_id[0] == '\0' || strcmp(request->cluster_id, ours) == 0) {
        return RK_OK;
    }
    return rk_error_set(error, RK_ERR_INVALID,
                        "node %s is of cluster %s, and this coordinator %s%s: give it the address "
                        "of its own",
                        request->node->node_id, request->cluster_id,
                        ours[0] != '\0' ? "of cluster " : "was started without --cluster", ours);
}

enum rk_status coordinator_register(struct coordinator *coordinator, struct arena *arena,
                                    const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                    struct rk_error *error)
{
    const Redknot__V1__NodeInfo *info = ((const Redknot__V1__RegisterRequest *)request)->node;
    Redknot__V1__RegisterReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    struct index_node *node = NULL;
    enum rk_status status = record_check_node(info, error);

    if (status == RK_OK) {
        status = record_check_node_text(info, error);
    }
    if (status == RK_OK) {
        status = check_cluster(coordinator, (const Redknot__V1__RegisterRequest *)request, error);
    }
    if (status != RK_OK) {
        return status;
    }
    if (reply == NULL) {
        return out_of_memory(error);
    }
    (void)pthread_mutex_lock(&coordinator->write_lock);
    /* On disk first: after a restart of ours, a heartbeat alone then brings it back. */
    if (info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE) {
        status = coordinator_save_node(coordinator, info, error);
    }
    if (status == RK_OK) {
        (void)pthread_mutex_lock(&coordinator->index_lock);
        status = index_node_register(coordinator->index, info, rk_clock_ns(), &node);
        (void)pthread_mutex_unlock(&coordinator->index_lock);
        if (status != RK_OK) {
            (void)rk_error_set(error, status, "no room for node %s: %s", info->node_id,
                               rk_status_text(status));
        }
    }
    if (status == RK_OK) {
        status = coordinator_flush(coordinator, false, error);
    }
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    if (status != RK_OK) {
        return status;
    }
    RK_LOG_INFO("node_registered", "node=%q role=%s incarnation=%016llx address=%q version=%q",
                info->node_id,
                info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE ? "store" : "worker",
                (unsigned long long)info->incarnation, info->grpc_address, info->version);
    redknot__v1__register_reply__init(reply);
    reply->epoch = coordinator->epoch;
    reply->heartbeat_ms = coordinator->options.heartbeat_ms;
    reply->timeout_ms = coordinator->options.timeout_ms;
    reply->version = (char *)(uintptr_t)REDKNOT_VERSION;
    *ret_reply = &reply->base;
    return RK_OK;
}

/* A store may evict a shard that it has committed before the put is published: the placed put
 * remembers it, for the index does not know that generation yet.
 * Under index_lock. True when something of what the database holds changed. */
static bool apply_removed(struct coordinator *coordinator, struct index_node *node,
                          const Redknot__V1__HeartbeatRequest *request)
{
    for (size_t i = 0; i < request->n_removed; i++) {
        const Redknot__V1__Shard *shard = request->removed[i];
        struct rk_id id;

        if (record_id(&shard->segment_id, &id)) {
            index_shard_removed(coordinator->index, node, &id, shard->generation,
                                shard->shard_index);
            placed_shard_removed(&coordinator->placed, &id, shard->generation, shard->shard_index,
                                 node->node_id, node->info->incarnation);
        }
    }
    return request->n_removed != 0;
}

enum rk_status coordinator_heartbeat(struct coordinator *coordinator, struct arena *arena,
                                     const ProtobufCMessage *message, ProtobufCMessage **ret_reply,
                                     struct rk_error *error)
{
    const Redknot__V1__HeartbeatRequest *request = (const Redknot__V1__HeartbeatRequest *)message;
    Redknot__V1__HeartbeatReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    struct index_node *node;
    bool changed = false;
    enum rk_status status = RK_OK;

    if (reply == NULL) {
        return out_of_memory(error);
    }
    if (request->n_removed > HEARTBEAT_REMOVED_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG,
                            "%zu removed shards in one heartbeat, at most %u", request->n_removed,
                            HEARTBEAT_REMOVED_MAX);
    }
    redknot__v1__heartbeat_reply__init(reply);
    reply->epoch = coordinator->epoch;
    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = index_node_find(coordinator->index, request->node_id);
    if (node == NULL || node->info->incarnation != request->incarnation) {
        reply->register_again = true;
    } else {
        /* After a restart of ours it counts as alive at once, and is asked for its inventory:
         * evictions that it reported while we were away are in there. So is a node that was down
         * or ejected, for it did not hear of drops. */
        index_node_heard(coordinator->index, node, rk_clock_ns());
        reply->register_again = !node->registered;
        node->info->used_bytes = request->used_bytes;
        changed = apply_removed(coordinator, node, request);
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (changed) {
        (void)pthread_mutex_lock(&coordinator->write_lock);
        status = coordinator_flush(coordinator, false, error);
        (void)pthread_mutex_unlock(&coordinator->write_lock);
    }
    *ret_reply = &reply->base;
    return status;
}

/* ---- Announce ---- */

/* The whole stream, kept until its end so that it takes effect at once. */
struct announcement {
    Redknot__V1__AnnounceRequest **messages;
    size_t num_messages;
    size_t messages_capacity;
    struct index_announced *shards;
    size_t num_shards;
    size_t shards_capacity;
};

static void announcement_free(struct announcement *announcement)
{
    for (size_t i = 0; i < announcement->num_messages; i++) {
        rk_rpc_message_free(&announcement->messages[i]->base);
    }
    rk_free(announcement->messages);
    rk_free(announcement->shards);
}

static bool reserve(void **array, size_t *capacity, size_t count, size_t bytes_each)
{
    size_t grown_capacity = *capacity == 0 ? 16 : *capacity;
    void *grown;

    while (grown_capacity < count) {
        grown_capacity *= 2;
    }
    if (*array != NULL && grown_capacity == *capacity) {
        return true;
    }
    grown = rk_alloc_resize(*array, grown_capacity, bytes_each);
    if (grown == NULL) {
        return false;
    }
    *array = grown;
    *capacity = grown_capacity;
    return true;
}

/* Takes message. */
static enum rk_status add_message(struct announcement *announcement,
                                  Redknot__V1__AnnounceRequest *message, size_t shards_max,
                                  struct rk_error *error)
{
    const Redknot__V1__AnnounceRequest *first;

    if (!reserve((void **)&announcement->messages, &announcement->messages_capacity,
                 announcement->num_messages + 1, sizeof(*announcement->messages))) {
        rk_rpc_message_free(&message->base);
        return out_of_memory(error);
    }
    announcement->messages[announcement->num_messages++] = message;
    first = announcement->messages[0];
    if (strcmp(first->node_id, message->node_id) != 0 ||
        first->incarnation != message->incarnation) {
        return rk_error_set(error, RK_ERR_INVALID, "one announcement names two nodes");
    }
    if (announcement->num_shards + message->n_entries > shards_max) {
        return rk_error_set(error, RK_ERR_TOO_LONG,
                            "node %s announces more than %zu shards; raise --segments-max",
                            first->node_id, shards_max);
    }
    if (!reserve((void **)&announcement->shards, &announcement->shards_capacity,
                 announcement->num_shards + message->n_entries, sizeof(*announcement->shards))) {
        return out_of_memory(error);
    }
    for (size_t i = 0; i < message->n_entries; i++) {
        enum rk_status status = record_check_announced(
            message->entries[i], &announcement->shards[announcement->num_shards], error);

        if (status != RK_OK) {
            return status;
        }
        announcement->num_shards++;
    }
    return RK_OK;
}

static enum rk_status receive(struct rk_rpc_call *call, struct coordinator *coordinator,
                              struct announcement *announcement, struct rk_error *error)
{
    size_t shards_max =
        (size_t)coordinator->options.segments_max * coordinator->options.shards_per_segment;

    for (;;) {
        ProtobufCMessage *message = NULL;
        enum rk_status status =
            rk_rpc_call_recv(call, &redknot__v1__announce_request__descriptor, &message);

        if (status == RK_ERR_NOT_FOUND) {
            return RK_OK;
        }
        if (status == RK_OK) {
            status = add_message(announcement, (Redknot__V1__AnnounceRequest *)message, shards_max,
                                 error);
        } else {
            (void)rk_error_set(error, status, "the announcement broke off: %s",
                               rk_status_text(status));
        }
        if (status != RK_OK) {
            return status;
        }
    }
}

/* A shard whose put is between Place and Commit is wanted, but not yet visible: it goes to the
 * front, out of the range that the index sees. Under index_lock. Returns how many. */
static size_t set_placed_aside(struct coordinator *coordinator, struct announcement *announcement)
{
    size_t num_aside = 0;

    for (size_t i = 0; i < announcement->num_shards; i++) {
        struct index_announced *shard = &announcement->shards[i];

        if (placed_find(&coordinator->placed, &shard->id, shard->entry->shard->generation) !=
            NULL) {
            struct index_announced aside = *shard;

            *shard = announcement->shards[num_aside];
            announcement->shards[num_aside++] = aside;
        }
    }
    return num_aside;
}

static enum rk_status apply(struct coordinator *coordinator, struct announcement *announcement,
                            uint64_t since, struct index_drops *drops, struct rk_error *error)
{
    const Redknot__V1__AnnounceRequest *first = announcement->messages[0];
    struct index_node *node;
    enum rk_status status = RK_OK;
    uint64_t generation = 0;
    size_t num_aside;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = index_node_find(coordinator->index, first->node_id);
    if (node == NULL || node->info->incarnation != first->incarnation) {
        status = rk_error_set(error, RK_ERR_NOT_FOUND,
                              "node %s is not registered with this incarnation; Register first",
                              first->node_id);
    } else {
        num_aside = set_placed_aside(coordinator, announcement);
        status = index_announce(coordinator->index, node, announcement->shards + num_aside,
                                announcement->num_shards - num_aside, since, rk_clock_ns(), drops);
        if (status != RK_OK) {
            (void)out_of_memory(error);
        } else if (announcement->num_shards != 0) {
            liveness_announced(&node->liveness);
        }
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    for (size_t i = 0; status == RK_OK && i < announcement->num_shards; i++) {
        const struct index_announced *shard = &announcement->shards[i];

        if (shard->entry->shard->generation > generation) {
            generation = shard->entry->shard->generation;
        }
        if (shard->adopted && shard->entry->n_token_ids != 0) {
            status = coordinator_save_tokens(coordinator, &shard->id, shard->entry->token_ids,
                                             shard->entry->n_token_ids, error);
        }
    }
    if (status == RK_OK) {
        status = coordinator_skip_generation(coordinator, generation, error);
    }
    return status != RK_OK ? status : coordinator_flush(coordinator, false, error);
}

static enum rk_status reply_announce(struct rk_rpc_call *call,
                                     const struct announcement *announcement,
                                     struct rk_error *error)
{
    Redknot__V1__AnnounceReply reply = REDKNOT__V1__ANNOUNCE_REPLY__INIT;
    enum rk_status status;

    reply.drop = rk_alloc_zero(announcement->num_shards + 1, sizeof(*reply.drop));
    if (reply.drop == NULL) {
        return out_of_memory(error);
    }
    for (size_t i = 0; i < announcement->num_shards; i++) {
        if (announcement->shards[i].unwanted) {
            reply.drop[reply.n_drop++] = announcement->shards[i].entry->shard;
        } else {
            reply.accepted++;
        }
    }
    if (announcement->num_messages != 0) {
        RK_LOG_INFO("node_announced", "node=%q accepted=%u drop=%zu",
                    announcement->messages[0]->node_id, reply.accepted, reply.n_drop);
    }
    status = rk_rpc_call_send(call, &reply.base);
    rk_free(reply.drop);
    return status;
}

enum rk_status coordinator_announce(struct rk_rpc_call *call, struct coordinator *coordinator,
                                    struct rk_error *error)
{
    struct announcement announcement = {0};
    struct index_drops drops = {0};
    enum rk_status status;
    uint64_t since;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    since = index_changes(coordinator->index);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    status = receive(call, coordinator, &announcement, error);
    /* A stream without a message names no node: nothing is announced and nothing changes. */
    if (status == RK_OK && announcement.num_messages != 0) {
        (void)pthread_mutex_lock(&coordinator->write_lock);
        status = apply(coordinator, &announcement, since, &drops, error);
        (void)pthread_mutex_unlock(&coordinator->write_lock);
    }
    if (status == RK_OK) {
        status = reply_announce(call, &announcement, error);
    }
    coordinator_send_drops(coordinator, &drops, ANNOUNCE_DROPS_MS);
    index_drops_free(&drops);
    announcement_free(&announcement);
    return status;
}
