/*
 * ListStores: the stores that may be placed on now, and those that may not.
 *
 * A value has no entry here: its key says on which of the listed stores it is. So whoever is left
 * out of a list that a client went on with misses what is dropped and put meanwhile, and its values
 * may be older than theirs. It is not listed again before it has given them up. A list without any
 * store lets nobody go on.
 *
 * Nor can it know that it was left out. So it serves values on a lease, which each answer to a sign
 * of life renews while it is fit to be listed, and until that is over it stays on the list though
 * nobody hears it: it may only be we who are not heard.
 */
#include "common/base/clock.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/placement.h"
#include "coordinator/record.h"

#include <stdio.h>

static enum rk_status out_of_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "the coordinator is out of memory");
}

static Redknot__V1__ListStoresReply__Store *store_message(struct arena *arena,
                                                          const struct index_node *node,
                                                          double weight)
{
    Redknot__V1__ListStoresReply__Store *store = arena_alloc(arena, 1, sizeof(*store));

    if (store == NULL) {
        return NULL;
    }
    redknot__v1__list_stores_reply__store__init(store);
    store->endpoint = coordinator_endpoint_message(arena, node);
    store->weight = weight;
    return store->endpoint == NULL ? NULL : store;
}

/* It is not usable now. */
static Redknot__V1__ListStoresReply__Absent *absent_message(const struct coordinator *coordinator,
                                                            struct arena *arena,
                                                            const struct index_node *node,
                                                            int64_t now_ns)
{
    Redknot__V1__ListStoresReply__Absent *absent = arena_alloc(arena, 1, sizeof(*absent));

    if (absent == NULL) {
        return NULL;
    }
    redknot__v1__list_stores_reply__absent__init(absent);
    absent->endpoint = coordinator_endpoint_message(arena, node);
    absent->state = (char *)(uintptr_t)index_node_state_name(
        index_node_state(coordinator->index, node, 1.0, now_ns));
    absent->silent_ms =
        node->heard_ns == 0 ? UINT64_MAX : (uint64_t)(now_ns - node->heard_ns) / 1000000;
    return absent->endpoint == NULL ? NULL : absent;
}

uint64_t coordinator_values_mark(struct coordinator *coordinator, struct index_node *node,
                                 uint64_t said)
{
    if (!node->values_old) {
        return 0;
    }
    if (node->values_mark != 0 && said == node->values_mark) {
        node->values_old = false;
        return 0;
    }
    if (node->values_mark == 0) { /* Never the same twice, also after a restart of ours. */
        node->values_mark = coordinator->epoch + ++coordinator->values_marks;
    }
    return node->values_mark;
}

void coordinator_values_given_up(struct coordinator *coordinator, const char *node_id)
{
    const struct index_node *node;
    bool old;

    (void)pthread_mutex_lock(&coordinator->write_lock);
    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = index_node_find(coordinator->index, node_id);
    old = node == NULL || node->values_old; /* It was left out again meanwhile. */
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (!old) {
        coordinator_forget_left_out(coordinator, node_id);
    }
    (void)pthread_mutex_unlock(&coordinator->write_lock);
}

uint32_t coordinator_values_lease(struct coordinator *coordinator, struct index_node *node,
                                  int64_t now_ns)
{
    uint32_t lease_ms = coordinator->options.values_lease_ms;

    if (node->values_old || !index_node_usable(coordinator->index, node, now_ns)) {
        return 0;
    }
    node->lease_ns = now_ns + (int64_t)lease_ms * 1000000;
    return lease_ms;
}

/* Whoever lives has reported within this time, and what was granted before is over. */
static int64_t settle_ms(const struct coordinator *coordinator)
{
    int64_t beats_ms = (int64_t)4 * coordinator->options.heartbeat_ms;
    int64_t least_ms = coordinator->options.values_lease_ms;

    beats_ms =
        beats_ms < coordinator->options.timeout_ms ? beats_ms : coordinator->options.timeout_ms;
    return beats_ms > least_ms ? beats_ms : least_ms;
}

void coordinator_awake(struct coordinator *coordinator, int64_t now_ns)
{
    if (now_ns - coordinator->awake_ns > settle_ms(coordinator) * 1000000 / 2) {
        coordinator->settled_before_ns = coordinator->awake_ns;
        coordinator->settling_ns = now_ns;
    }
    coordinator->awake_ns = now_ns;
}

/* After a restart or a pause of ours the first store to report would be alone on the list, and all
 * others out of date. So nobody gets a list before all have reported that may live, or had their
 * time to: clients go on with the one that they have. Under index_lock. */
static const struct index_node *awaited(struct coordinator *coordinator, int64_t now_ns)
{
    int64_t timeout_ns = (int64_t)coordinator->options.timeout_ms * 1000000;

    if (now_ns - coordinator->settling_ns > settle_ms(coordinator) * 1000000) {
        return NULL;
    }
    for (struct index_node *node = index_nodes(coordinator->index); node != NULL;
         node = node->hh.next) {
        bool store = node->info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;

        if (store && !node->liveness.ejected && node->heard_ns < coordinator->settling_ns &&
            (node->heard_ns == 0 || node->heard_ns + timeout_ns > coordinator->settled_before_ns)) {
            return node;
        }
    }
    return NULL;
}

/* Its weight; 0: it is not listed. */
static double weight_of(struct coordinator *coordinator, const struct index_node *node,
                        double factor_max, int64_t now_ns)
{
    double factor = index_node_factor(coordinator->index, node, now_ns);

    if (node->values_old ||
        (!index_node_usable(coordinator->index, node, now_ns) && now_ns > node->lease_ns)) {
        return 0.0;
    }
    /* As if empty: clients that hash keys over nodes agree over time only if weights rest. */
    return placement_weight(node->info->capacity_bytes, 0) * liveness_share(factor, factor_max);
}

/* Under index_lock: those left out of the list that is about to be given are out of date from then
 * on. The disk has to know first. */
static void mark_left_out(struct coordinator *coordinator, int64_t now_ns)
{
    double factor_max = index_factor_max(coordinator->index, now_ns);
    size_t num_listed = 0;

    for (struct index_node *node = index_nodes(coordinator->index); node != NULL;
         node = node->hh.next) {
        num_listed += node->info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE &&
                      weight_of(coordinator, node, factor_max, now_ns) > 0.0;
    }
    for (struct index_node *node = index_nodes(coordinator->index); num_listed != 0 && node != NULL;
         node = node->hh.next) {
        if (node->info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE && !node->values_old &&
            !(weight_of(coordinator, node, factor_max, now_ns) > 0.0)) {
            node->values_old = true;
            node->values_unsaved = true;
            node->values_mark = 0;
        }
    }
}

/* Under index_lock. NULL: the disk knows of all. */
static struct index_node *unsaved(struct coordinator *coordinator)
{
    for (struct index_node *node = index_nodes(coordinator->index); node != NULL;
         node = node->hh.next) {
        if (node->values_unsaved) {
            return node;
        }
    }
    return NULL;
}

/* Who is left out, so that it is not listed unasked by a later process of ours. */
static enum rk_status save_left_out(struct coordinator *coordinator, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    bool more = true;

    (void)pthread_mutex_lock(&coordinator->write_lock);
    while (status == RK_OK && more) {
        char node_id[RECORD_NODE_ID_MAX + 1] = "";
        uint64_t incarnation = 0;
        struct index_node *node;

        (void)pthread_mutex_lock(&coordinator->index_lock);
        node = unsaved(coordinator);
        more = node != NULL;
        if (more) {
            (void)snprintf(node_id, sizeof(node_id), "%s", node->node_id);
            incarnation = node->info->incarnation;
        }
        (void)pthread_mutex_unlock(&coordinator->index_lock);
        if (more) {
            status = coordinator_save_left_out(coordinator, node_id, incarnation, error);
        }
        (void)pthread_mutex_lock(&coordinator->index_lock);
        node = index_node_find(coordinator->index, node_id);
        if (status == RK_OK && node != NULL && node->info->incarnation == incarnation) {
            node->values_unsaved = false;
        }
        (void)pthread_mutex_unlock(&coordinator->index_lock);
    }
    if (status != RK_OK) {
        rk_error_prefix(error, "noting who is left out of the list of stores");
    }
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    return status;
}

/* Under index_lock. */
static enum rk_status fill_stores(struct coordinator *coordinator, struct arena *arena,
                                  Redknot__V1__ListStoresReply *reply, int64_t now_ns)
{
    struct index_node *first = index_nodes(coordinator->index);
    double factor_max = index_factor_max(coordinator->index, now_ns);

    reply->stores = arena_alloc(arena, HASH_COUNT(first), sizeof(*reply->stores));
    reply->absent = arena_alloc(arena, HASH_COUNT(first), sizeof(*reply->absent));
    if (reply->stores == NULL || reply->absent == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    for (struct index_node *node = first; node != NULL; node = node->hh.next) {
        double weight = weight_of(coordinator, node, factor_max, now_ns);

        if (node->info->role != REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE) {
            continue;
        }
        if (!(weight > 0.0)) {
            reply->absent[reply->n_absent] = absent_message(coordinator, arena, node, now_ns);
            if (reply->absent[reply->n_absent++] == NULL) {
                return RK_ERR_NO_MEMORY;
            }
            continue;
        }
        reply->stores[reply->n_stores] = store_message(arena, node, weight);
        if (reply->stores[reply->n_stores++] == NULL) {
            return RK_ERR_NO_MEMORY;
        }
    }
    return RK_OK;
}

/* *ret_again: first the disk must know who is left out. */
static enum rk_status try_list(struct coordinator *coordinator, struct arena *arena,
                               Redknot__V1__ListStoresReply *reply, bool *ret_again,
                               struct rk_error *error)
{
    int64_t now_ns = rk_clock_ns();
    const struct index_node *late;
    enum rk_status status = RK_OK;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    coordinator_awake(coordinator, now_ns);
    late = awaited(coordinator, now_ns);
    if (late == NULL) {
        mark_left_out(coordinator, now_ns);
    }
    *ret_again = late == NULL && unsaved(coordinator) != NULL;
    if (late != NULL) {
        status = rk_error_set(error, RK_ERR_UNAVAILABLE,
                              "the coordinator has just begun to hear its stores, and waits up to "
                              "%lld ms for %s: try again then",
                              (long long)settle_ms(coordinator), late->node_id);
    } else if (!*ret_again && fill_stores(coordinator, arena, reply, now_ns) != RK_OK) {
        status = out_of_memory(error);
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    return status;
}

enum rk_status coordinator_list_stores(struct coordinator *coordinator, struct arena *arena,
                                       const ProtobufCMessage *message,
                                       ProtobufCMessage **ret_reply, struct rk_error *error)
{
    Redknot__V1__ListStoresReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    enum rk_status status = RK_OK;
    bool again = true;

    (void)message; /* It asks for nothing in particular. */
    if (reply == NULL) {
        return out_of_memory(error);
    }
    redknot__v1__list_stores_reply__init(reply);
    reply->epoch = coordinator->epoch;
    while (status == RK_OK && again) {
        status = try_list(coordinator, arena, reply, &again, error);
        if (again) {
            status = save_left_out(coordinator, error);
        }
    }
    *ret_reply = &reply->base;
    return status;
}
