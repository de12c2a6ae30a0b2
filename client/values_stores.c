#include "client/values_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/rendezvous.h"

#include <string.h>

/* With the lock. */
static enum rk_status channel_add(struct stores *stores, const char *address,
                                  struct rk_rpc_channel **ret_channel, struct rk_error *error)
{
    if (stores->num_channels == RK_KV_NODES_MAX) {
        return rk_error_set(error, RK_ERR_FULL, "more than %d addresses of stores were met",
                            RK_KV_NODES_MAX);
    }
    struct store_channel *made = rk_alloc_zero(1, sizeof(*made));
    char *copy = rk_alloc_string(address);
    enum rk_status status =
        made && copy ? rk_rpc_channel_create(address, &made->channel, error) : RK_ERR_NO_MEMORY;
    if (status != RK_OK) {
        rk_free(made);
        rk_free(copy);
        return status;
    }
    made->address = copy;
    made->next = stores->channels;
    stores->channels = made;
    stores->num_channels++;
    *ret_channel = made->channel;
    return RK_OK;
}

enum rk_status stores_channel(struct stores *stores, const char *address,
                              struct rk_rpc_channel **ret_channel, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    (void)pthread_mutex_lock(&stores->lock);
    struct store_channel *at = stores->channels;
    while (at && strcmp(at->address, address) != 0) {
        at = at->next;
    }
    if (at) {
        *ret_channel = at->channel;
    } else {
        status = channel_add(stores, address, ret_channel, error);
    }
    (void)pthread_mutex_unlock(&stores->lock);
    return status;
}

void store_set_give(struct store_set *set)
{
    if (!set || atomic_fetch_sub_explicit(&set->refs, 1, memory_order_acq_rel) > 1) {
        return;
    }
    for (size_t i = 0; i < set->count; i++) {
        rk_kv_endpoint_clear(&set->stores[i].endpoint);
    }
    rk_free(set);
}

/* With the one reference of the caller. */
static enum rk_status set_make(const Redknot__V1__ListStoresReply *reply,
                               struct store_set **ret_set)
{
    struct store_set *set = rk_alloc_zero(1, sizeof(*set) + reply->n_stores * sizeof(struct store));
    if (!set) {
        return RK_ERR_NO_MEMORY;
    }
    atomic_init(&set->refs, 1);
    for (size_t i = 0; i < reply->n_stores; i++) {
        const Redknot__V1__ListStoresReply__Store *store = reply->stores[i];
        struct store *copy = &set->stores[set->count];
        if (!store->endpoint || !(store->weight > 0.0)) {
            continue;
        }
        if (rk_kv_endpoint_copy(store->endpoint, &copy->endpoint) != RK_OK) {
            store_set_give(set);
            return RK_ERR_NO_MEMORY;
        }
        copy->weight = store->weight;
        set->count++;
    }
    *ret_set = set;
    return RK_OK;
}

static enum rk_status ask(struct stores *stores, int timeout_ms, struct store_set **ret_set,
                          struct rk_error *error)
{
    Redknot__V1__ListStoresRequest request = REDKNOT__V1__LIST_STORES_REQUEST__INIT;
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_unary(stores->coordinator, "/redknot.v1.Coordinator/ListStores", &request.base,
                     &redknot__v1__list_stores_reply__descriptor, timeout_ms, &message, error);
    if (status != RK_OK) {
        rk_error_prefix(error, "asking the coordinator for its stores");
        return status;
    }
    status = set_make((const Redknot__V1__ListStoresReply *)message, ret_set);
    rk_rpc_message_free(message);
    return status;
}

static void keep(struct stores *stores, struct store_set *set)
{
    (void)pthread_mutex_lock(&stores->lock);
    struct store_set *old = stores->set;
    stores->set = set;
    (void)pthread_mutex_unlock(&stores->lock);
    store_set_give(old);
}

static void *stores_main(void *context)
{
    struct stores *stores = context;
    (void)pthread_mutex_lock(&stores->lock);
    while (!stores->stopping) {
        if (!stores->wanted) {
            (void)pthread_cond_wait(&stores->due, &stores->lock);
            continue;
        }
        (void)pthread_mutex_unlock(&stores->lock);
        struct store_set *fresh = NULL;
        if (ask(stores, VALUES_STORES_TIMEOUT_MS, &fresh, NULL) == RK_OK) {
            keep(stores, fresh);
        }
        (void)pthread_mutex_lock(&stores->lock);
        stores->wanted = false;
        stores->asked_ns = rk_clock_ns();
    }
    (void)pthread_mutex_unlock(&stores->lock);
    return NULL;
}

enum rk_status stores_create(const char *coordinator, struct stores *ret_stores,
                             struct rk_error *error)
{
    *ret_stores = (struct stores){.set = NULL};
    RK_ASSERT(pthread_mutex_init(&ret_stores->lock, NULL) == 0);
    RK_ASSERT(pthread_cond_init(&ret_stores->due, NULL) == 0);
    enum rk_status status = rk_rpc_channel_create(coordinator, &ret_stores->coordinator, error);
    if (status == RK_OK && values_thread_start(&ret_stores->thread, stores_main, ret_stores) != 0) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "cannot start a thread for values");
    }
    ret_stores->running = status == RK_OK;
    return status;
}

void stores_destroy(struct stores *stores)
{
    (void)pthread_mutex_lock(&stores->lock);
    stores->stopping = true;
    (void)pthread_cond_signal(&stores->due);
    (void)pthread_mutex_unlock(&stores->lock);
    if (stores->running) {
        (void)pthread_join(stores->thread, NULL);
    }
    while (stores->channels) {
        struct store_channel *next = stores->channels->next;
        rk_rpc_channel_destroy(stores->channels->channel);
        rk_free(stores->channels->address);
        rk_free(stores->channels);
        stores->channels = next;
    }
    rk_rpc_channel_destroy(stores->coordinator);
    store_set_give(stores->set);
    (void)pthread_mutex_destroy(&stores->lock);
    (void)pthread_cond_destroy(&stores->due);
}

static bool asked_within(const struct stores *stores, int64_t ms)
{
    return rk_clock_ns() - stores->asked_ns < ms * INT64_C(1000000);
}

/* What is known, with a reference; wakes the thread when that is old. *ret_idle: it is so old that
 * it is worth waiting for. */
static struct store_set *known(struct stores *stores, bool *ret_idle)
{
    (void)pthread_mutex_lock(&stores->lock);
    struct store_set *set = stores->set;
    if (set) {
        atomic_fetch_add_explicit(&set->refs, 1, memory_order_relaxed);
    }
    *ret_idle = !asked_within(stores, VALUES_STORES_IDLE_MS);
    if (*ret_idle) {
        stores->asked_ns = rk_clock_ns(); /* By this caller, not by all at once. */
    } else if (set && !stores->wanted && !asked_within(stores, VALUES_STORES_AGE_MS)) {
        stores->wanted = true;
        (void)pthread_cond_signal(&stores->due);
    }
    (void)pthread_mutex_unlock(&stores->lock);
    return set;
}

/* Asks in the caller's time. */
static enum rk_status ask_now(struct stores *stores, int64_t deadline_ns, int timeout_ms,
                              struct store_set **set, struct rk_error *error)
{
    struct store_set *fresh = NULL;
    int left_ms = rk_deadline_left_ms(deadline_ns);
    enum rk_status status = ask(stores, left_ms < timeout_ms ? left_ms : timeout_ms, &fresh, error);
    if (status == RK_OK) {
        store_set_give(*set);
        *set = fresh;
        atomic_fetch_add_explicit(&fresh->refs, 1, memory_order_relaxed);
        keep(stores, fresh);
    }
    return status;
}

enum rk_status stores_get(struct stores *stores, int64_t deadline_ns, struct store_set **ret_set,
                          struct rk_error *error)
{
    bool idle = false;
    struct store_set *set = known(stores, &idle);
    if (!set || set->count == 0) { /* Nothing to go on with. */
        enum rk_status status = ask_now(stores, deadline_ns, VALUES_STORES_TIMEOUT_MS, &set, error);
        if (status != RK_OK) {
            store_set_give(set);
            return status == RK_ERR_NO_MEMORY ? status : RK_ERR_UNAVAILABLE;
        }
    } else if (idle) {
        (void)!ask_now(stores, deadline_ns, VALUES_STORES_WAIT_MS, &set, NULL);
    }
    if (set->count == 0) {
        store_set_give(set);
        return rk_error_set(error, RK_ERR_UNAVAILABLE,
                            "no store serves: `redknot status` tells which are down");
    }
    *ret_set = set;
    return RK_OK;
}

/* Ties go to the smaller node id. */
static bool better(const struct store_set *set, double score, uint32_t store, double other_score,
                   uint32_t other)
{
    if (score != other_score) {
        return score > other_score;
    }
    return strcmp(set->stores[store].endpoint.node_id, set->stores[other].endpoint.node_id) < 0;
}

size_t store_set_rank(const struct store_set *set, const struct rk_id *id,
                      uint32_t ret_ranks[VALUES_RANKS])
{
    double scores[VALUES_RANKS];
    size_t count = 0;
    if (set->count == 1) {
        ret_ranks[0] = 0;
        return 1;
    }
    for (uint32_t i = 0; i < set->count; i++) {
        const struct store *store = &set->stores[i];
        double score = rk_rendezvous_score(id, 0, store->endpoint.node_id, store->weight);
        size_t at = count;
        while (at > 0 && better(set, score, i, scores[at - 1], ret_ranks[at - 1])) {
            at--;
        }
        if (at == VALUES_RANKS) {
            continue;
        }
        count += count < VALUES_RANKS;
        for (size_t j = count - 1; j > at; j--) {
            scores[j] = scores[j - 1];
            ret_ranks[j] = ret_ranks[j - 1];
        }
        scores[at] = score;
        ret_ranks[at] = i;
    }
    return count;
}
