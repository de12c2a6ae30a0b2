/* Register, Heartbeat. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/record.h"

#include <string.h>

#define HEARTBEAT_REMOVED_MAX 1000000u

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

/* A process that was started again is at the place of the one before it, and that one does not come
 * back. Anything else is a second node with the same id: they would take turns, and each turn lose
 * what the other one holds. Under index_lock. */
static enum rk_status check_id_free(struct coordinator *coordinator,
                                    const Redknot__V1__NodeInfo *info, struct rk_error *error)
{
    struct index_node *node = index_node_find(coordinator->index, info->node_id);
    const Redknot__V1__NodeInfo *first;
    int64_t now_ns = rk_clock_ns();
    bool same_place;

    if (node == NULL || node->info->incarnation == info->incarnation ||
        (!index_node_alive(coordinator->index, node, now_ns) && now_ns > node->lease_ns)) {
        return RK_OK;
    }
    first = node->info;
    same_place = first->role == info->role && strcmp(first->host_id, info->host_id) == 0 &&
                 strcmp(first->grpc_address, info->grpc_address) == 0;
    if (same_place && node->replaced != info->incarnation) {
        return RK_OK;
    }
    if (node->refused != info->incarnation) {
        node->refused = info->incarnation;
        RK_LOG_WARN("node_id_taken",
                    "node=%q living=%q incarnation=%016llx refused=%q refused_incarnation=%016llx",
                    info->node_id, first->grpc_address, (unsigned long long)first->incarnation,
                    info->grpc_address, (unsigned long long)info->incarnation);
    }
    return rk_error_set(error, RK_ERR_EXISTS,
                        "node id %s is taken by the one that lives at %s: give this one another "
                        "--node-id, or stop that one",
                        info->node_id, first->grpc_address);
}

enum rk_status coordinator_register(struct coordinator *coordinator, struct arena *arena,
                                    const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                    struct rk_error *error)
{
    const Redknot__V1__NodeInfo *info = ((const Redknot__V1__RegisterRequest *)request)->node;
    Redknot__V1__RegisterReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    struct index_node *node = NULL;
    uint64_t mark = 0;
    uint32_t lease_ms = 0;
    bool saved = true;
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
    (void)pthread_mutex_lock(&coordinator->index_lock);
    status = check_id_free(coordinator, info, error);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    /* On disk first: after a restart of ours, a heartbeat alone then brings it back. A disk that is
     * full keeps nobody out, and the sweeper saves it later. */
    if (status == RK_OK && info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE) {
        status = coordinator_save_node(coordinator, info, error);
        if (status != RK_OK && status != RK_ERR_NO_MEMORY) {
            RK_LOG_WARN("node_not_saved", "node=%q reason=%q", info->node_id,
                        error == NULL ? "" : error->text);
            status = RK_OK;
            saved = false;
        }
    }
    if (status == RK_OK) {
        (void)pthread_mutex_lock(&coordinator->index_lock);
        coordinator_awake(coordinator, rk_clock_ns());
        node = index_node_find(coordinator->index, info->node_id);
        bool same = node != NULL && node->info->incarnation == info->incarnation;
        status = index_node_register(coordinator->index, info, rk_clock_ns(), &node);
        mark = index_changes(coordinator->index);
        if (status == RK_OK) {
            node->unsaved = !saved;
        }
        if (status == RK_OK && !same) { /* Its values are of a time that we know nothing of. */
            node->values_old = ((const Redknot__V1__RegisterRequest *)request)->holds_values;
            node->values_unsaved = node->values_old;
            node->values_mark = 0;
            node->lease_ns = 0;
        }
        lease_ms = status == RK_OK ? coordinator_values_lease(coordinator, node, rk_clock_ns()) : 0;
        (void)pthread_mutex_unlock(&coordinator->index_lock);
        if (status != RK_OK) {
            (void)rk_error_set(error, status, "no room for node %s: %s", info->node_id,
                               rk_status_text(status));
        }
    }
    if (status == RK_OK) {
        coordinator_flush_later(coordinator);
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
    reply->mark = mark;
    reply->values_lease_ms = lease_ms;
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
    bool given_up = false;
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
    coordinator_awake(coordinator, rk_clock_ns());
    node = index_node_find(coordinator->index, request->node_id);
    if (node == NULL || node->info->incarnation != request->incarnation) {
        reply->register_again = true;
    } else {
        /* After a restart of ours it counts as alive at once, and is asked for its inventory:
         * evictions that it reported while we were away are in there. So is a node that was down
         * or ejected, for it did not hear of drops. */
        index_node_heard(coordinator->index, node, rk_clock_ns());
        reply->register_again = !node->registered;
        node->info->used_bytes = request->used_bytes < node->info->capacity_bytes
                                     ? request->used_bytes
                                     : node->info->capacity_bytes;
        changed = apply_removed(coordinator, node, request);
        given_up = node->values_old;
        reply->values_mark = coordinator_values_mark(coordinator, node, request->values_mark);
        given_up = given_up && !node->values_old;
        reply->values_lease_ms = coordinator_values_lease(coordinator, node, rk_clock_ns());
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (given_up) {
        coordinator_values_given_up(coordinator, request->node_id);
    }
    if (changed) {
        (void)pthread_mutex_lock(&coordinator->write_lock);
        coordinator_flush_later(coordinator); /* It was heard: it need not tell it again. */
        (void)pthread_mutex_unlock(&coordinator->write_lock);
    }
    *ret_reply = &reply->base;
    return status;
}
