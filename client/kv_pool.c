#include "client/kv_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

/* Pages to release by the one who uses the connection now. */
struct deferred {
    struct deferred *next;
    size_t num_pages;
    struct rk_pages pages[];
};

/* Everything here is guarded by the pool's lock, but the transport, which belongs to the thread
 * that set busy. */
struct rk_kv_connection {
    struct rk_transport *transport;
    struct rk_kv_node *node;
    bool busy;
    bool broken;
    uint64_t num_holds; /* batches */
    uint64_t num_pins;  /* items of these batches that were found */
    uint64_t pins_max;  /* what the store was seen to bear; UINT64_MAX: no end was seen */
    struct deferred *deferred;
};

/* Keyed by (address, incarnation): a restarted store is another node. */
struct rk_kv_node {
    char *address;
    uint64_t incarnation;
    struct rk_kv_connection *connections[RK_KV_CONNECTIONS_MAX];
    uint32_t num_connections; /* counts those being connected, whose slot is still NULL */
    uint32_t num_users;       /* callers inside acquire, and questions beside the bytes */
    bool down;
    uint32_t failures;    /* in a row */
    int64_t retry_at_ns;  /* of the pool's clock */
    int64_t nearer_at_ns; /* when a nearer path is tried again; 0: there is none */
    uint32_t nearer_tries;
    struct rk_kv_node *next;
};

struct rk_kv_pool {
    pthread_mutex_t lock; /* Leaf: nothing else is locked under it, no call out is made. */
    pthread_cond_t changed;
    enum rk_path path;
    const struct rk_kv_pool_ops *ops;
    struct rk_kv_node *nodes; /* last used first */
    uint32_t num_nodes;
};

/* What a pool does with transports, outside of tests. */
static const struct rk_kv_pool_ops transport_ops = {
    .connect = rk_transport_connect_until,
    .path = rk_transport_path,
    .nearest = rk_transport_nearest,
    .get = rk_transport_get,
    .put = rk_transport_put,
    .release = rk_transport_release,
    .check = rk_transport_check,
    .destroy = rk_transport_destroy,
    .clock_ns = rk_clock_ns,
};

enum rk_status rk_kv_pool_create(const struct rk_kv_pool_options *options,
                                 struct rk_kv_pool **ret_pool)
{
    struct rk_kv_pool *pool = rk_alloc_zero(1, sizeof(*pool));
    if (!pool) {
        return RK_ERR_NO_MEMORY;
    }
    pool->path = options->path;
    pool->ops = options->ops ? options->ops : &transport_ops;
    pthread_condattr_t attributes;
    RK_ASSERT(pthread_condattr_init(&attributes) == 0);
    RK_ASSERT(pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC) == 0);
    RK_ASSERT(pthread_cond_init(&pool->changed, &attributes) == 0);
    (void)pthread_condattr_destroy(&attributes);
    RK_ASSERT(pthread_mutex_init(&pool->lock, NULL) == 0);
    *ret_pool = pool;
    return RK_OK;
}

static void connection_destroy(const struct rk_kv_pool *pool, struct rk_kv_connection *connection)
{
    if (!connection) {
        return;
    }
    RK_ASSERT(connection->num_holds == 0 && !connection->deferred);
    pool->ops->destroy(connection->transport);
    rk_free(connection);
}

static void node_destroy(const struct rk_kv_pool *pool, struct rk_kv_node *node)
{
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        connection_destroy(pool, node->connections[i]);
    }
    rk_free(node->address);
    rk_free(node);
}

void rk_kv_pool_destroy(struct rk_kv_pool *pool)
{
    if (!pool) {
        return;
    }
    while (pool->nodes) {
        struct rk_kv_node *next = pool->nodes->next;
        node_destroy(pool, pool->nodes);
        pool->nodes = next;
    }
    (void)pthread_mutex_destroy(&pool->lock);
    (void)pthread_cond_destroy(&pool->changed);
    rk_free(pool);
}

static bool node_idle(const struct rk_kv_node *node)
{
    if (node->num_users > 0) {
        return false;
    }
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        const struct rk_kv_connection *connection = node->connections[i];
        if (connection && (connection->busy || connection->num_holds > 0)) {
            return false;
        }
    }
    return true;
}

/* Takes out idle nodes that this address outlived, or the longest unused one when the table is
 * full. The caller destroys what is returned, without the lock. */
static struct rk_kv_node *nodes_unlink_stale(struct rk_kv_pool *pool, const char *address,
                                             uint64_t incarnation)
{
    struct rk_kv_node *stale = NULL;
    struct rk_kv_node **last_idle = NULL;
    for (struct rk_kv_node **at = &pool->nodes; *at;) {
        struct rk_kv_node *node = *at;
        if (!node_idle(node)) {
            at = &node->next;
        } else if (strcmp(node->address, address) == 0 && node->incarnation != incarnation) {
            *at = node->next;
            node->next = stale;
            stale = node;
            pool->num_nodes--;
            last_idle = NULL; /* It may have pointed into the node that left. */
        } else {
            last_idle = at;
            at = &node->next;
        }
    }
    if (!stale && pool->num_nodes >= RK_KV_NODES_MAX && last_idle) {
        stale = *last_idle;
        *last_idle = stale->next;
        stale->next = NULL;
        pool->num_nodes--;
    }
    return stale;
}

static void nodes_destroy(const struct rk_kv_pool *pool, struct rk_kv_node *nodes)
{
    while (nodes) {
        struct rk_kv_node *next = nodes->next;
        node_destroy(pool, nodes);
        nodes = next;
    }
}

static struct rk_kv_node *node_find(struct rk_kv_pool *pool, const struct rk_kv_endpoint *endpoint)
{
    for (struct rk_kv_node **at = &pool->nodes; *at; at = &(*at)->next) {
        struct rk_kv_node *node = *at;
        if (node->incarnation == endpoint->incarnation &&
            strcmp(node->address, endpoint->address) == 0) {
            *at = node->next;
            node->next = pool->nodes;
            pool->nodes = node;
            return node;
        }
    }
    return NULL;
}

static struct rk_kv_node *node_make(const struct rk_kv_endpoint *endpoint)
{
    struct rk_kv_node *node = rk_alloc_zero(1, sizeof(*node));
    char *address = rk_alloc_string(endpoint->address);
    if (!node || !address) {
        rk_free(node);
        rk_free(address);
        return NULL;
    }
    node->address = address;
    node->incarnation = endpoint->incarnation;
    return node;
}

/* Called with the lock, which is let go of while a node is made. */
static enum rk_status node_enter(struct rk_kv_pool *pool, const struct rk_kv_endpoint *endpoint,
                                 struct rk_kv_node **ret_node, struct rk_kv_node **ret_stale)
{
    *ret_stale = NULL;
    struct rk_kv_node *node = node_find(pool, endpoint);
    if (!node) {
        *ret_stale = nodes_unlink_stale(pool, endpoint->address, endpoint->incarnation);
        if (pool->num_nodes >= RK_KV_NODES_MAX) {
            return RK_ERR_FULL;
        }
        node = node_make(endpoint);
        if (!node) {
            return RK_ERR_NO_MEMORY;
        }
        node->next = pool->nodes;
        pool->nodes = node;
        pool->num_nodes++;
    }
    node->num_users++;
    *ret_node = node;
    return RK_OK;
}

static uint64_t random_below(uint64_t limit)
{
    uint64_t bits = 0;
    if (getrandom(&bits, sizeof(bits), GRND_NONBLOCK) < 0) {
        bits = (uint64_t)rk_clock_ns();
    }
    return bits % limit;
}

int rk_kv_backoff_ms(uint32_t failures)
{
    uint32_t doublings = failures < 8 ? failures : 8;
    int64_t longest = (int64_t)RK_KV_BACKOFF_MS << doublings;
    longest = longest < RK_KV_BACKOFF_MAX_MS ? longest : RK_KV_BACKOFF_MAX_MS;
    return (int)(longest / 2 + (int64_t)random_below((uint64_t)longest / 2 + 1));
}

static int64_t in_ms(const struct rk_kv_pool *pool, int64_t ms)
{
    return pool->ops->clock_ns() + ms * 1000000;
}

static void node_mark_down(struct rk_kv_pool *pool, struct rk_kv_node *node, enum rk_status status)
{
    int pause_ms = rk_kv_backoff_ms(node->failures);
    if (!node->down) {
        RK_LOG_WARN("store_down", "address=%s status=%s backoff_ms=%d", node->address,
                    rk_status_name(status), pause_ms);
    }
    node->down = true;
    node->failures++;
    node->retry_at_ns = in_ms(pool, pause_ms);
}

static enum rk_status node_is_down(const struct rk_kv_endpoint *endpoint, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_UNAVAILABLE, "store %s at %s did not answer a moment ago",
                        endpoint->node_id, endpoint->address);
}

/*
 * What a failure says of the store. It is down when it refuses, or stays silent for long; a caller
 * in a hurry, or one that lost interest, proves nothing, and neither does a process that has no
 * descriptor left: then no store could be reached. Such trouble of our own becomes
 * RK_ERR_NO_MEMORY.
 */
static bool proves_down(const struct rk_kv_pool *pool, enum rk_status *status, int64_t begin_ns,
                        const struct rk_until *until, struct rk_error *error)
{
    if (*status != RK_ERR_UNAVAILABLE && *status != RK_ERR_DEADLINE) {
        return false;
    }
    bool hurried = rk_until_over(until) != RK_OK &&
                   pool->ops->clock_ns() - begin_ns < RK_KV_HURRY_MS * INT64_C(1000000);
    if (*status == RK_ERR_UNAVAILABLE) {
        int probe = eventfd(0, EFD_CLOEXEC);
        if (probe < 0) {
            *status =
                rk_error_set(error, RK_ERR_NO_MEMORY,
                             "this process cannot open another connection: %s", strerror(errno));
            return false;
        }
        (void)close(probe);
    }
    return !hurried;
}

/* Takes a broken connection that nobody holds out of its node; the caller destroys it. */
static struct rk_kv_connection *connection_unlink(struct rk_kv_connection *connection)
{
    struct rk_kv_node *node = connection->node;
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        if (node->connections[i] == connection) {
            node->connections[i] = NULL;
            node->num_connections--;
            return connection;
        }
    }
    RK_ASSERT(!"a connection belongs to its node");
    return NULL;
}

/* With the lock: none is used again, so that the next try makes a fresh one. The idle ones leave
 * the node; the caller destroys them without the lock. */
static void node_break_connections(struct rk_kv_node *node,
                                   struct rk_kv_connection *ret_dead[RK_KV_CONNECTIONS_MAX])
{
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        struct rk_kv_connection *connection = node->connections[i];
        if (!connection) {
            continue;
        }
        connection->broken = true;
        if (!connection->busy && connection->num_holds == 0) {
            ret_dead[i] = connection_unlink(connection);
        }
    }
}

static struct rk_transport_endpoint transport_endpoint(const struct rk_kv_endpoint *endpoint)
{
    return (struct rk_transport_endpoint){.grpc_address = endpoint->address,
                                          .host_id = endpoint->host_id,
                                          .shm_socket = endpoint->shm_socket,
                                          .ucx_address = endpoint->ucx_address,
                                          .node_id = endpoint->node_id,
                                          .incarnation = endpoint->incarnation};
}

/* Small is near. */
static int nearness(enum rk_path path)
{
    return path == RK_PATH_SHM ? 0 : path == RK_PATH_UCX ? 1 : 2;
}

/* There is a nearer path to its store than the connection has. */
static bool farther(const struct rk_kv_pool *pool, const struct rk_kv_endpoint *endpoint,
                    const struct rk_kv_connection *connection)
{
    struct rk_transport_endpoint where = transport_endpoint(endpoint);
    return pool->path == RK_PATH_NONE &&
           nearness(pool->ops->nearest(&where)) < nearness(pool->ops->path(connection->transport));
}

static enum rk_status connect_new(struct rk_kv_pool *pool, struct rk_kv_node *node,
                                  const struct rk_kv_endpoint *endpoint,
                                  const struct rk_until *until,
                                  struct rk_kv_connection **ret_connection, struct rk_error *error)
{
    struct rk_kv_connection *connection = rk_alloc_zero(1, sizeof(*connection));
    if (!connection) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "connecting to a store: out of memory");
    }
    struct rk_transport_endpoint where = transport_endpoint(endpoint);
    struct rk_until soon = rk_until_sooner(until, rk_deadline_in_ms(RK_KV_CONNECT_TIMEOUT_MS));
    enum rk_status status =
        pool->ops->connect(&where, pool->path, &soon, &connection->transport, error);
    if (status != RK_OK) {
        rk_free(connection);
        return status;
    }
    connection->node = node;
    connection->busy = true;
    connection->pins_max = UINT64_MAX;
    *ret_connection = connection;
    return RK_OK;
}

/* With the lock. What was put off is done by the one who leaves. */
static void holds_end(struct rk_kv_connection *connection, uint64_t batches, uint64_t pins)
{
    RK_ASSERT(connection->num_holds >= batches && connection->num_pins >= pins);
    connection->num_holds -= batches;
    connection->num_pins -= pins;
}

static uint64_t pins_of(const struct rk_pages *pages, size_t num_pages)
{
    uint64_t pins = 0;
    for (size_t i = 0; i < num_pages; i++) {
        pins += pages[i].pages != NULL;
    }
    return pins;
}

/* Ends the use of a connection: does the releases left by others, and drops it when broken. */
static void connection_leave(struct rk_kv_pool *pool, struct rk_kv_connection *connection)
{
    struct rk_kv_connection *dead = NULL;
    (void)pthread_mutex_lock(&pool->lock);
    while (connection->deferred) {
        struct deferred *deferred = connection->deferred;
        uint64_t batches = 0;
        uint64_t pins = 0;
        connection->deferred = NULL;
        (void)pthread_mutex_unlock(&pool->lock);
        while (deferred) {
            struct deferred *next = deferred->next;
            pins += pins_of(deferred->pages, deferred->num_pages);
            pool->ops->release(connection->transport, deferred->pages, deferred->num_pages);
            rk_free(deferred);
            deferred = next;
            batches++;
        }
        (void)pthread_mutex_lock(&pool->lock);
        holds_end(connection, batches, pins);
    }
    connection->busy = false;
    if (connection->broken && connection->num_holds == 0) {
        dead = connection_unlink(connection);
    }
    (void)pthread_cond_broadcast(&pool->changed);
    (void)pthread_mutex_unlock(&pool->lock);
    connection_destroy(pool, dead);
}

static bool has_room(const struct rk_kv_connection *connection, size_t num_items)
{
    return connection->num_pins == 0 || (connection->num_pins <= connection->pins_max &&
                                         num_items <= connection->pins_max - connection->num_pins);
}

/* With the lock: an idle connection whose store bears so many pins more, or NULL. *ret_later: one
 * that is used now may come free. */
static struct rk_kv_connection *connection_idle(struct rk_kv_node *node, size_t num_items,
                                                bool *ret_later)
{
    uint32_t seen = 0;
    *ret_later = false;
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        struct rk_kv_connection *connection = node->connections[i];
        if (!connection) {
            continue;
        }
        seen++;
        if (!connection->busy && !connection->broken && has_room(connection, num_items)) {
            return connection;
        }
        *ret_later = *ret_later || connection->busy;
    }
    *ret_later = *ret_later || seen < node->num_connections; /* Some are being made. */
    return NULL;
}

/* What a caller wants to do with a connection. */
struct use {
    const struct rk_kv_endpoint *endpoint;
    const struct rk_until *until;
    size_t num_items;                    /* that may be pinned */
    bool want_fresh;                     /* one that lay idle was of no use */
    struct rk_kv_connection *connection; /* acquired */
    bool fresh;                          /* and made for this use */
    bool asks_again; /* the node is down, and the others wait for what we find */
    int64_t begin_ns;
};

/* With the lock, of one that num_connections counts already. */
static void connection_link(struct rk_kv_node *node, struct rk_kv_connection *connection)
{
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        if (!node->connections[i]) {
            node->connections[i] = connection;
            return;
        }
    }
    RK_ASSERT(!"num_connections bounds the slots");
}

/* With the lock; lets go of it while connecting. A node that was down stays so until it has
 * answered a request: over gRPC connecting is no sign of life. */
static enum rk_status connection_add(struct rk_kv_pool *pool, struct rk_kv_node *node,
                                     struct use *use, struct rk_error *error)
{
    use->fresh = true;
    use->asks_again = node->down;
    node->num_connections++;
    if (use->asks_again) { /* The others see it down meanwhile. */
        node->retry_at_ns = in_ms(pool, RK_KV_CONNECT_TIMEOUT_MS);
    }
    (void)pthread_mutex_unlock(&pool->lock);
    int64_t begin_ns = pool->ops->clock_ns();
    enum rk_status status =
        connect_new(pool, node, use->endpoint, use->until, &use->connection, error);
    bool down = proves_down(pool, &status, begin_ns, use->until, error);
    (void)pthread_mutex_lock(&pool->lock);

    if (status == RK_OK) {
        connection_link(node, use->connection);
        if (farther(pool, use->endpoint, use->connection) && node->nearer_at_ns == 0) {
            node->nearer_at_ns = in_ms(pool, RK_KV_NEARER_MS);
        }
        return RK_OK;
    }
    node->num_connections--;
    if (down) {
        node_mark_down(pool, node, status);
    } else if (use->asks_again) { /* It learned nothing: the next one may ask. */
        node->retry_at_ns = 0;
    }
    (void)pthread_cond_broadcast(&pool->changed);
    return status;
}

/*
 * With the lock, which it lets go of. A connection that fell back to a farther path, since the
 * store paused for a moment or the nearer one failed once, does not stay there for good: now and
 * then its user tries for a nearer one, briefly, and leaves the old one.
 */
static void connection_nearer(struct rk_kv_pool *pool, struct rk_kv_node *node, struct use *use)
{
    struct rk_kv_connection *old = use->connection;
    struct rk_kv_connection *made = NULL;
    struct rk_until soon = rk_until_sooner(use->until, rk_deadline_in_ms(RK_KV_NEARER_TIMEOUT_MS));
    int64_t pause_ms = (int64_t)RK_KV_NEARER_MS
                       << (node->nearer_tries < 6 ? node->nearer_tries : 6);
    node->nearer_tries++;
    node->nearer_at_ns = in_ms(pool, pause_ms);
    node->num_connections++;
    (void)pthread_mutex_unlock(&pool->lock);
    enum rk_status status = connect_new(pool, node, use->endpoint, &soon, &made, NULL);
    if (status == RK_OK &&
        nearness(pool->ops->path(made->transport)) >= nearness(pool->ops->path(old->transport))) {
        connection_destroy(pool, made);
        status = RK_ERR_UNAVAILABLE;
    }
    (void)pthread_mutex_lock(&pool->lock);
    if (status != RK_OK) {
        node->num_connections--;
        return;
    }
    connection_link(node, made);
    node->nearer_tries = 0;
    if (!farther(pool, use->endpoint, made)) {
        node->nearer_at_ns = 0;
    }
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) { /* Each goes when nobody holds it. */
        struct rk_kv_connection *other = node->connections[i];
        if (other && nearness(pool->ops->path(other->transport)) >
                         nearness(pool->ops->path(made->transport))) {
            other->broken = true;
        }
    }
    use->connection = made;
    use->fresh = true;
    (void)pthread_mutex_unlock(&pool->lock);
    connection_leave(pool, old);
    (void)pthread_mutex_lock(&pool->lock);
}

static enum rk_status acquire_locked(struct rk_kv_pool *pool, struct rk_kv_node *node,
                                     struct use *use, struct rk_error *error)
{
    for (;;) {
        enum rk_status over = rk_until_over(use->until);
        if (over != RK_OK) {
            return rk_error_set(error, over, "no connection to store %s came free in time",
                                use->endpoint->node_id);
        }
        if (node->down && pool->ops->clock_ns() < node->retry_at_ns) {
            return node_is_down(use->endpoint, error);
        }
        bool later = false;
        bool room = node->num_connections < RK_KV_CONNECTIONS_MAX;
        struct rk_kv_connection *idle = room && (node->down || use->want_fresh)
                                            ? NULL
                                            : connection_idle(node, use->num_items, &later);
        if (idle) {
            idle->busy = true;
            use->connection = idle;
            if (room && node->nearer_at_ns > 0 && pool->ops->clock_ns() >= node->nearer_at_ns &&
                farther(pool, use->endpoint, idle)) {
                connection_nearer(pool, node, use);
            }
            return RK_OK;
        }
        if (room) {
            return connection_add(pool, node, use, error);
        }
        if (!later) {
            return rk_error_set(error, RK_ERR_FULL,
                                "all %d connections to store %s hold as much as it bears",
                                RK_KV_CONNECTIONS_MAX, use->endpoint->node_id);
        }
        int64_t slice_ns = rk_until_slice_ns(use->until);
        struct timespec slice = {.tv_sec = slice_ns / 1000000000, .tv_nsec = slice_ns % 1000000000};
        (void)pthread_cond_timedwait(&pool->changed, &pool->lock, &slice);
    }
}

/* A connection that nobody else uses; new ones up to the bound, then waits. RK_ERR_UNAVAILABLE at
 * once while the node is in its back-off. */
static enum rk_status acquire(struct rk_kv_pool *pool, struct use *use, struct rk_error *error)
{
    struct rk_kv_node *node = NULL;
    struct rk_kv_node *stale = NULL;
    use->fresh = false;
    use->asks_again = false;
    (void)pthread_mutex_lock(&pool->lock);
    enum rk_status status = node_enter(pool, use->endpoint, &node, &stale);
    if (status == RK_OK) {
        status = acquire_locked(pool, node, use, error);
        node->num_users--;
    } else {
        (void)rk_error_set(error, status, "cannot keep store %s in the table of %d nodes: %s",
                           use->endpoint->node_id, RK_KV_NODES_MAX, rk_status_text(status));
    }
    (void)pthread_mutex_unlock(&pool->lock);
    nodes_destroy(pool, stale);
    use->begin_ns = pool->ops->clock_ns();
    return status;
}

/*
 * Ends a use of the connection by what it came to. True: it is worth another try, for a connection
 * that lay idle may have broken long ago, by our own doing too, and says nothing of the store.
 */
static bool use_end(struct rk_kv_pool *pool, struct use *use, enum rk_status *status, bool breaks,
                    uint64_t holds, uint64_t pins, struct rk_error *error)
{
    struct rk_kv_connection *connection = use->connection;
    struct rk_kv_connection *dead[RK_KV_CONNECTIONS_MAX] = {NULL};
    bool again = *status == RK_ERR_UNAVAILABLE && !use->fresh && !use->want_fresh;
    bool down = !again && proves_down(pool, status, use->begin_ns, use->until, error);
    (void)pthread_mutex_lock(&pool->lock);
    struct rk_kv_node *node = connection->node;
    connection->num_holds += holds;
    connection->num_pins += pins;
    connection->broken = connection->broken || breaks;
    if (down) {
        node_mark_down(pool, node, *status);
        node_break_connections(node, dead);
    } else if (*status == RK_OK) {
        node->down = false;
        node->failures = 0;
    } else if (use->asks_again) {
        node->retry_at_ns = 0;
    }
    (void)pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        connection_destroy(pool, dead[i]);
    }
    connection_leave(pool, connection);
    return again;
}

static bool silent(enum rk_status status)
{
    return status == RK_ERR_UNAVAILABLE || status == RK_ERR_DEADLINE;
}

/* The store refuses more pins on this connection: it is known from now on, and another one may do.
 * False: it holds nothing else, so this is not why. */
static bool pins_learn(struct rk_kv_pool *pool, struct rk_kv_connection *connection,
                       const struct rk_pages *pages, size_t num_pages)
{
    bool refused = false;
    uint64_t pins = pins_of(pages, num_pages);
    for (size_t i = 0; i < num_pages; i++) {
        refused = refused || pages[i].status == RK_ERR_FULL;
    }
    if (!refused) {
        return false;
    }
    (void)pthread_mutex_lock(&pool->lock);
    bool others = connection->num_pins > 0;
    if (others && connection->num_pins + pins < connection->pins_max) {
        connection->pins_max = connection->num_pins + pins;
    }
    (void)pthread_mutex_unlock(&pool->lock);
    return others;
}

enum rk_status rk_kv_pool_get(struct rk_kv_pool *pool, const struct rk_kv_endpoint *endpoint,
                              const struct rk_get *gets, size_t num_gets,
                              const struct rk_until *until, struct rk_pages *ret_pages,
                              enum rk_path *ret_path, struct rk_kv_connection **ret_connection,
                              struct rk_error *error)
{
    struct use use = {.endpoint = endpoint, .until = until, .num_items = num_gets};
    for (;;) {
        enum rk_status status = acquire(pool, &use, error);
        if (status != RK_OK) {
            return status;
        }
        struct rk_kv_connection *connection = use.connection;
        enum rk_path path = pool->ops->path(connection->transport);
        status = pool->ops->get(connection->transport, gets, num_gets, until, ret_pages, error);
        bool full = status == RK_OK && pins_learn(pool, connection, ret_pages, num_gets);
        if (full) {
            pool->ops->release(connection->transport, ret_pages, num_gets);
        }
        bool holds = status == RK_OK && !full;
        bool again = use_end(pool, &use, &status, silent(status), holds,
                             holds ? pins_of(ret_pages, num_gets) : 0, error);
        if (full || again) {
            use.want_fresh = again;
            continue;
        }
        if (status == RK_OK) {
            *ret_path = path;
            *ret_connection = connection;
        }
        return status;
    }
}

enum rk_status rk_kv_pool_put(struct rk_kv_pool *pool, const struct rk_kv_endpoint *endpoint,
                              struct rk_put *puts, size_t num_puts, const struct rk_until *until,
                              struct rk_error *error)
{
    struct use use = {.endpoint = endpoint, .until = until};
    for (;;) {
        enum rk_status status = acquire(pool, &use, error);
        if (status != RK_OK) {
            return status;
        }
        status = pool->ops->put(use.connection->transport, puts, num_puts, until, error);
        bool given_up = silent(status) || status == RK_ERR_CANCELLED || status == RK_ERR_NO_MEMORY;
        if (!use_end(pool, &use, &status, given_up, 0, 0, error)) {
            return status;
        }
        use.want_fresh = true;
    }
}

enum rk_status rk_kv_pool_check(const struct rk_kv_pool *pool,
                                const struct rk_kv_connection *connection,
                                const struct rk_pages *pages)
{
    return pool->ops->check(connection->transport, pages);
}

void rk_kv_pool_release(struct rk_kv_pool *pool, struct rk_kv_connection *connection,
                        struct rk_pages *pages, size_t num_pages)
{
    struct deferred *later = rk_alloc_zero(1, sizeof(*later) + num_pages * sizeof(later->pages[0]));
    (void)pthread_mutex_lock(&pool->lock);
    if (connection->busy && later) {
        memcpy(later->pages, pages, num_pages * sizeof(*pages));
        later->num_pages = num_pages;
        later->next = connection->deferred;
        connection->deferred = later;
        (void)pthread_mutex_unlock(&pool->lock);
        memset(pages, 0, num_pages * sizeof(*pages));
        return;
    }
    while (connection->busy) { /* No memory to defer it: its user leaves by its deadline. */
        (void)pthread_cond_wait(&pool->changed, &pool->lock);
    }
    connection->busy = true;
    (void)pthread_mutex_unlock(&pool->lock);
    rk_free(later);

    uint64_t pins = pins_of(pages, num_pages);
    pool->ops->release(connection->transport, pages, num_pages);
    (void)pthread_mutex_lock(&pool->lock);
    holds_end(connection, 1, pins);
    (void)pthread_mutex_unlock(&pool->lock);
    connection_leave(pool, connection);
}

/* ---- Questions to a store beside the bytes ---- */

enum rk_status rk_kv_pool_ask_begin(struct rk_kv_pool *pool, const struct rk_kv_endpoint *endpoint,
                                    struct rk_kv_ask *ret_ask, struct rk_error *error)
{
    struct rk_kv_node *node = NULL;
    struct rk_kv_node *stale = NULL;
    (void)pthread_mutex_lock(&pool->lock);
    enum rk_status status = node_enter(pool, endpoint, &node, &stale);
    if (status == RK_OK && node->down && pool->ops->clock_ns() < node->retry_at_ns) {
        node->num_users--;
        status = node_is_down(endpoint, error);
    } else if (status == RK_OK) {
        bool asks_again = node->down;
        if (asks_again) {
            node->retry_at_ns = in_ms(pool, RK_KV_CONNECT_TIMEOUT_MS);
        }
        *ret_ask = (struct rk_kv_ask){node, pool->ops->clock_ns(), asks_again};
    } else {
        (void)rk_error_set(error, status, "cannot keep store %s in the table of %d nodes: %s",
                           endpoint->node_id, RK_KV_NODES_MAX, rk_status_text(status));
    }
    (void)pthread_mutex_unlock(&pool->lock);
    nodes_destroy(pool, stale);
    return status;
}

enum rk_status rk_kv_pool_ask_end(struct rk_kv_pool *pool, const struct rk_kv_ask *ask,
                                  enum rk_status status, const struct rk_until *until,
                                  struct rk_error *error)
{
    struct rk_kv_connection *dead[RK_KV_CONNECTIONS_MAX] = {NULL};
    bool down = proves_down(pool, &status, ask->begin_ns, until, error);
    (void)pthread_mutex_lock(&pool->lock);
    struct rk_kv_node *node = ask->node;
    node->num_users--;
    if (down) {
        node_mark_down(pool, node, status);
        node_break_connections(node, dead);
    } else if (!silent(status) && status != RK_ERR_CANCELLED && status != RK_ERR_NO_MEMORY) {
        node->down = false;
        node->failures = 0;
    } else if (ask->asks_again) {
        node->retry_at_ns = 0;
    }
    (void)pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        connection_destroy(pool, dead[i]);
    }
    return status;
}
