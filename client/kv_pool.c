#include "client/kv_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <string.h>
#include <sys/random.h>
#include <time.h>

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
    struct node *node;
    bool busy;
    bool broken;
    uint64_t num_holds;
    struct deferred *deferred;
};

/* Keyed by (address, incarnation): a restarted store is another node. */
struct node {
    char *address;
    uint64_t incarnation;
    struct rk_kv_connection *connections[RK_KV_CONNECTIONS_MAX];
    uint32_t num_connections; /* counts those being connected, whose slot is still NULL */
    uint32_t num_users;       /* callers inside acquire */
    bool down;
    uint32_t failures; /* in a row */
    int64_t retry_at_ns;
    struct node *next;
};

struct rk_kv_pool {
    pthread_mutex_t lock; /* Leaf: nothing else is locked under it, no call out is made. */
    pthread_cond_t changed;
    enum rk_path path;
    struct node *nodes; /* last used first */
    uint32_t num_nodes;
};

enum rk_status rk_kv_pool_create(enum rk_path path, struct rk_kv_pool **ret_pool)
{
    struct rk_kv_pool *pool = rk_alloc_zero(1, sizeof(*pool));
    if (!pool) {
        return RK_ERR_NO_MEMORY;
    }
    pool->path = path;
    pthread_condattr_t attributes;
    RK_ASSERT(pthread_condattr_init(&attributes) == 0);
    RK_ASSERT(pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC) == 0);
    RK_ASSERT(pthread_cond_init(&pool->changed, &attributes) == 0);
    (void)pthread_condattr_destroy(&attributes);
    RK_ASSERT(pthread_mutex_init(&pool->lock, NULL) == 0);
    *ret_pool = pool;
    return RK_OK;
}

static void connection_destroy(struct rk_kv_connection *connection)
{
    if (!connection) {
        return;
    }
    RK_ASSERT(connection->num_holds == 0 && !connection->deferred);
    rk_transport_destroy(connection->transport);
    rk_free(connection);
}

static void node_destroy(struct node *node)
{
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        connection_destroy(node->connections[i]);
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
        struct node *next = pool->nodes->next;
        node_destroy(pool->nodes);
        pool->nodes = next;
    }
    (void)pthread_mutex_destroy(&pool->lock);
    (void)pthread_cond_destroy(&pool->changed);
    rk_free(pool);
}

static bool node_idle(const struct node *node)
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
static struct node *nodes_unlink_stale(struct rk_kv_pool *pool, const char *address,
                                       uint64_t incarnation)
{
    struct node *stale = NULL;
    struct node **last_idle = NULL;
    for (struct node **at = &pool->nodes; *at;) {
        struct node *node = *at;
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

static void nodes_destroy(struct node *nodes)
{
    while (nodes) {
        struct node *next = nodes->next;
        node_destroy(nodes);
        nodes = next;
    }
}

static struct node *node_find(struct rk_kv_pool *pool, const struct rk_kv_endpoint *endpoint)
{
    for (struct node **at = &pool->nodes; *at; at = &(*at)->next) {
        struct node *node = *at;
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

static struct node *node_make(const struct rk_kv_endpoint *endpoint)
{
    struct node *node = rk_alloc_zero(1, sizeof(*node));
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
                                 struct node **ret_node, struct node **ret_stale)
{
    *ret_stale = NULL;
    struct node *node = node_find(pool, endpoint);
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

/* Twice as long after each failure, and never the same for all clients, who would else come back
 * together. */
static int backoff_ms(uint32_t failures)
{
    uint32_t doublings = failures < 8 ? failures : 8;
    int64_t longest = (int64_t)RK_KV_BACKOFF_MS << doublings;
    longest = longest < RK_KV_BACKOFF_MAX_MS ? longest : RK_KV_BACKOFF_MAX_MS;
    return (int)(longest / 2 + (int64_t)random_below((uint64_t)longest / 2 + 1));
}

static void node_mark_down(struct node *node, enum rk_status status)
{
    int pause_ms = backoff_ms(node->failures);
    if (!node->down) {
        RK_LOG_WARN("store_down", "address=%s status=%s backoff_ms=%d", node->address,
                    rk_status_name(status), pause_ms);
    }
    node->down = true;
    node->failures++;
    node->retry_at_ns = rk_deadline_in_ms(pause_ms);
}

/* Takes a broken connection that nobody holds out of its node; the caller destroys it. */
static struct rk_kv_connection *connection_unlink(struct rk_kv_connection *connection)
{
    struct node *node = connection->node;
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
static void node_break_connections(struct node *node,
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

static enum rk_status connect_new(struct rk_kv_pool *pool, struct node *node,
                                  const struct rk_kv_endpoint *endpoint,
                                  const struct rk_until *until,
                                  struct rk_kv_connection **ret_connection, struct rk_error *error)
{
    struct rk_kv_connection *connection = rk_alloc_zero(1, sizeof(*connection));
    if (!connection) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "connecting to a store: out of memory");
    }
    struct rk_transport_endpoint where = {.grpc_address = endpoint->address,
                                          .host_id = endpoint->host_id,
                                          .shm_socket = endpoint->shm_socket,
                                          .ucx_address = endpoint->ucx_address};
    struct rk_until soon = rk_until_sooner(until, rk_deadline_in_ms(RK_KV_CONNECT_TIMEOUT_MS));
    enum rk_status status =
        rk_transport_connect_until(&where, pool->path, &soon, &connection->transport, error);
    if (status != RK_OK) {
        rk_free(connection);
        return status;
    }
    connection->node = node;
    connection->busy = true;
    *ret_connection = connection;
    return RK_OK;
}

/* With the lock: an idle connection, or NULL. */
static struct rk_kv_connection *connection_idle(struct node *node)
{
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        struct rk_kv_connection *connection = node->connections[i];
        if (connection && !connection->busy && !connection->broken) {
            return connection;
        }
    }
    return NULL;
}

/* With the lock; lets go of it while connecting. */
static enum rk_status connection_add(struct rk_kv_pool *pool, struct node *node,
                                     const struct rk_kv_endpoint *endpoint,
                                     const struct rk_until *until,
                                     struct rk_kv_connection **ret_connection,
                                     struct rk_error *error)
{
    node->num_connections++;
    if (node->down) { /* The one who asks again; the others see it down meanwhile. */
        node->retry_at_ns = rk_deadline_in_ms(RK_KV_CONNECT_TIMEOUT_MS);
    }
    (void)pthread_mutex_unlock(&pool->lock);
    struct rk_kv_connection *connection = NULL;
    enum rk_status status = connect_new(pool, node, endpoint, until, &connection, error);
    (void)pthread_mutex_lock(&pool->lock);

    if (status != RK_OK) {
        node->num_connections--;
        if (status == RK_ERR_UNAVAILABLE || status == RK_ERR_DEADLINE) {
            node_mark_down(node, status);
        }
        (void)pthread_cond_broadcast(&pool->changed);
        return status;
    }
    node->down = false;
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        if (!node->connections[i]) {
            node->connections[i] = connection;
            *ret_connection = connection;
            return RK_OK;
        }
    }
    RK_ASSERT(!"num_connections bounds the slots");
    return RK_ERR_INTERNAL;
}

static enum rk_status acquire_locked(struct rk_kv_pool *pool, struct node *node,
                                     const struct rk_kv_endpoint *endpoint,
                                     const struct rk_until *until,
                                     struct rk_kv_connection **ret_connection,
                                     struct rk_error *error)
{
    for (;;) {
        if (node->down && rk_clock_ns() < node->retry_at_ns) {
            return rk_error_set(error, RK_ERR_UNAVAILABLE,
                                "store %s at %s did not answer a moment ago", endpoint->node_id,
                                endpoint->address);
        }
        struct rk_kv_connection *idle = node->down ? NULL : connection_idle(node);
        if (idle) {
            idle->busy = true;
            *ret_connection = idle;
            return RK_OK;
        }
        if (node->num_connections < RK_KV_CONNECTIONS_MAX) {
            return connection_add(pool, node, endpoint, until, ret_connection, error);
        }
        enum rk_status over = rk_until_over(until);
        if (over != RK_OK) {
            return rk_error_set(error, over, "all %d connections to store %s stayed in use",
                                RK_KV_CONNECTIONS_MAX, endpoint->node_id);
        }
        int64_t slice_ns = rk_until_slice_ns(until);
        struct timespec slice = {.tv_sec = slice_ns / 1000000000, .tv_nsec = slice_ns % 1000000000};
        (void)pthread_cond_timedwait(&pool->changed, &pool->lock, &slice);
    }
}

enum rk_status rk_kv_pool_acquire(struct rk_kv_pool *pool, const struct rk_kv_endpoint *endpoint,
                                  const struct rk_until *until,
                                  struct rk_kv_connection **ret_connection, struct rk_error *error)
{
    struct node *node = NULL;
    struct node *stale = NULL;
    (void)pthread_mutex_lock(&pool->lock);
    enum rk_status status = node_enter(pool, endpoint, &node, &stale);
    if (status == RK_OK) {
        status = acquire_locked(pool, node, endpoint, until, ret_connection, error);
        node->num_users--;
    } else {
        (void)rk_error_set(error, status, "cannot keep store %s in the table of %d nodes: %s",
                           endpoint->node_id, RK_KV_NODES_MAX, rk_status_text(status));
    }
    (void)pthread_mutex_unlock(&pool->lock);
    nodes_destroy(stale);
    return status;
}

/* Ends the use of a connection: does the releases left by others, and drops it when broken. */
static void connection_leave(struct rk_kv_pool *pool, struct rk_kv_connection *connection)
{
    struct rk_kv_connection *dead = NULL;
    (void)pthread_mutex_lock(&pool->lock);
    while (connection->deferred) {
        struct deferred *deferred = connection->deferred;
        connection->deferred = NULL;
        (void)pthread_mutex_unlock(&pool->lock);
        uint64_t done = 0;
        while (deferred) {
            struct deferred *next = deferred->next;
            rk_transport_release(connection->transport, deferred->pages, deferred->num_pages);
            rk_free(deferred);
            deferred = next;
            done++;
        }
        (void)pthread_mutex_lock(&pool->lock);
        connection->num_holds -= done;
    }
    connection->busy = false;
    if (connection->broken && connection->num_holds == 0) {
        dead = connection_unlink(connection);
    }
    (void)pthread_cond_broadcast(&pool->changed);
    (void)pthread_mutex_unlock(&pool->lock);
    connection_destroy(dead);
}

/* Ends a use of the connection by what it came to. */
static void use_end(struct rk_kv_pool *pool, struct rk_kv_connection *connection,
                    enum rk_status status, int64_t begin_ns, bool holds)
{
    bool silent = status == RK_ERR_UNAVAILABLE || status == RK_ERR_DEADLINE;
    /* A caller in a hurry does not prove that the node is down. */
    bool down = status == RK_ERR_UNAVAILABLE ||
                (silent && rk_clock_ns() - begin_ns > RK_KV_BACKOFF_MS / 2 * INT64_C(1000000));

    struct rk_kv_connection *dead[RK_KV_CONNECTIONS_MAX] = {NULL};
    (void)pthread_mutex_lock(&pool->lock);
    struct node *node = connection->node;
    if (holds) {
        connection->num_holds++;
    }
    connection->broken = connection->broken || silent;
    if (down) {
        node_mark_down(node, status);
        node_break_connections(node, dead);
    } else if (!silent) {
        node->failures = 0;
    }
    (void)pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < RK_KV_CONNECTIONS_MAX; i++) {
        connection_destroy(dead[i]);
    }
    connection_leave(pool, connection);
}

enum rk_status rk_kv_pool_get(struct rk_kv_pool *pool, struct rk_kv_connection *connection,
                              const struct rk_get *gets, size_t num_gets,
                              const struct rk_until *until, struct rk_pages *ret_pages,
                              enum rk_path *ret_path, struct rk_error *error)
{
    int64_t begin_ns = rk_clock_ns();
    *ret_path = rk_transport_path(connection->transport);
    enum rk_status status =
        rk_transport_get(connection->transport, gets, num_gets, until, ret_pages, error);
    use_end(pool, connection, status, begin_ns, status == RK_OK);
    return status;
}

enum rk_status rk_kv_pool_put(struct rk_kv_pool *pool, struct rk_kv_connection *connection,
                              struct rk_put *puts, size_t num_puts, const struct rk_until *until,
                              struct rk_error *error)
{
    int64_t begin_ns = rk_clock_ns();
    enum rk_status status = rk_transport_put(connection->transport, puts, num_puts, until, error);
    use_end(pool, connection, status, begin_ns, false);
    return status;
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

    rk_transport_release(connection->transport, pages, num_pages);
    (void)pthread_mutex_lock(&pool->lock);
    connection->num_holds--;
    (void)pthread_mutex_unlock(&pool->lock);
    connection_leave(pool, connection);
}
