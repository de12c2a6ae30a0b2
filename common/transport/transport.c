#include "common/transport/transport_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/transport/wire_internal.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Nearest first. */
static const struct transport_ops *const paths[] = {&transport_shm, &transport_ucx,
                                                    &transport_grpc};
#define NUM_PATHS (sizeof(paths) / sizeof(paths[0]))

struct rk_transport {
    const struct transport_ops *ops;
    void *connection;
};

const char *rk_path_name(enum rk_path path)
{
    for (size_t i = 0; i < NUM_PATHS; i++) {
        if (paths[i]->path == path) {
            return paths[i]->name;
        }
    }
    return "none";
}

static char host_id[64];
static pthread_once_t host_id_once = PTHREAD_ONCE_INIT;

static void host_id_read(void)
{
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (!file) {
        return;
    }
    if (fgets(host_id, sizeof(host_id), file)) {
        host_id[strcspn(host_id, "\n")] = '\0';
    }
    fclose(file);
}

const char *rk_host_id(void)
{
    pthread_once(&host_id_once, host_id_read);
    return host_id;
}

static enum rk_status connect_path(const struct transport_ops *ops,
                                   const struct rk_transport_endpoint *endpoint,
                                   const struct rk_until *until,
                                   struct rk_transport **ret_transport, struct rk_error *error)
{
    struct rk_transport *transport = rk_alloc_zero(1, sizeof(*transport));
    if (!transport) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a connection");
    }
    transport->ops = ops;
    enum rk_status status = ops->connect(endpoint, until, &transport->connection, error);
    if (status != RK_OK) {
        rk_free(transport);
        return status;
    }
    *ret_transport = transport;
    return RK_OK;
}

enum rk_status rk_transport_connect(const struct rk_transport_endpoint *endpoint, enum rk_path path,
                                    int timeout_ms, struct rk_transport **ret_transport,
                                    struct rk_error *error)
{
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(timeout_ms)};
    return rk_transport_connect_until(endpoint, path, &until, ret_transport, error);
}

enum rk_status rk_transport_connect_until(const struct rk_transport_endpoint *endpoint,
                                          enum rk_path path, const struct rk_until *until,
                                          struct rk_transport **ret_transport,
                                          struct rk_error *error)
{
    enum rk_status status = rk_error_set(error, RK_ERR_UNSUPPORTED, "the path \"%s\" is not served",
                                         rk_path_name(path));
    for (size_t i = 0; i < NUM_PATHS; i++) {
        const struct transport_ops *ops = paths[i];
        bool wanted = path == RK_PATH_NONE ? ops->reachable(endpoint) : path == ops->path;
        if (!wanted) {
            continue;
        }
        /* One that is silent must leave time for the others. */
        struct rk_until share = *until;
        if (path == RK_PATH_NONE && i + 1 < NUM_PATHS) {
            int left_ms = rk_deadline_left_ms(until->deadline_ns);
            share = rk_until_sooner(until, rk_deadline_in_ms(left_ms / 3));
        }
        status = connect_path(ops, endpoint, &share, ret_transport, error);
        if (status == RK_OK || status == RK_ERR_CANCELLED) {
            return status;
        }
    }
    return status;
}

enum rk_path rk_transport_path(const struct rk_transport *transport)
{
    return transport->ops->path;
}

enum rk_path rk_transport_nearest(const struct rk_transport_endpoint *endpoint)
{
    for (size_t i = 0; i < NUM_PATHS; i++) {
        if (paths[i]->reachable(endpoint)) {
            return paths[i]->path;
        }
    }
    return RK_PATH_NONE;
}

static bool get_sensible(const struct rk_get *get, uint64_t *pages)
{
    uint64_t mine = 0;
    if (get->page_bytes == 0) {
        return get->num_extents == 0 && get->bytes_max > 0;
    }
    bool good = get->num_extents > 0 && get->num_extents <= WIRE_EXTENTS_MAX &&
                wire_extents_pages(get->extents, get->num_extents, WIRE_PAGES_MAX - *pages, &mine);
    *pages += mine;
    return good;
}

static enum rk_status gets_check(const struct rk_get *gets, size_t num_gets, struct rk_error *error)
{
    uint64_t pages = 0;
    uint64_t extents = 0;
    if (num_gets == 0 || num_gets > RK_TRANSPORT_ITEMS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a batch has 1 to %d items, not %zu",
                            RK_TRANSPORT_ITEMS_MAX, num_gets);
    }
    for (size_t i = 0; i < num_gets; i++) {
        extents += gets[i].num_extents;
        if (!get_sensible(&gets[i], &pages) || extents > WIRE_EXTENTS_MAX) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "item %zu: a shard is read by 1 to %u extents, none of them "
                                "empty, with at most %u pages in a batch; a value has none and "
                                "a maximum of bytes",
                                i, WIRE_EXTENTS_MAX, WIRE_PAGES_MAX);
        }
    }
    return RK_OK;
}

enum rk_status rk_transport_get(struct rk_transport *transport, const struct rk_get *gets,
                                size_t num_gets, const struct rk_until *until,
                                struct rk_pages *ret_pages, struct rk_error *error)
{
    enum rk_status status = gets_check(gets, num_gets, error);
    if (status != RK_OK) {
        return status;
    }
    status = rk_until_over(until);
    if (status != RK_OK) {
        return rk_error_set(error, status, "no time was left for a get");
    }
    if (error) {
        error->text[0] = '\0'; /* The first item that fails sets it. */
    }
    memset(ret_pages, 0, num_gets * sizeof(*ret_pages));
    status = transport->ops->get(transport->connection, gets, num_gets, until, ret_pages, error);
    if (status != RK_OK) {
        rk_transport_release(transport, ret_pages, num_gets);
        return status;
    }
    for (size_t i = 0; i < num_gets; i++) {
        enum rk_status item = ret_pages[i].status;
        if (item != RK_OK) { /* Also pages that came and did not match. */
            rk_transport_release(transport, &ret_pages[i], 1);
            ret_pages[i].status = item;
        }
    }
    return RK_OK;
}

void rk_transport_release(struct rk_transport *transport, struct rk_pages *pages, size_t num_pages)
{
    transport->ops->release(transport->connection, pages, num_pages);
    for (size_t i = 0; i < num_pages; i++) {
        rk_free(pages[i].pages);
        pages[i] = (struct rk_pages){0};
    }
}

bool rk_pages_sealed(const struct rk_pages *pages)
{
    if (!pages->seal) {
        return true;
    }
    atomic_thread_fence(memory_order_acquire); /* Behind the reads of the bytes. */
    return __atomic_load_n(pages->seal, __ATOMIC_RELAXED) == pages->seal_value;
}

bool rk_transport_alive(const struct rk_transport *transport)
{
    return !transport->ops->alive || transport->ops->alive(transport->connection);
}

enum rk_status rk_transport_check(const struct rk_transport *transport,
                                  const struct rk_pages *pages)
{
    if (!pages->in_place) {
        return RK_OK;
    }
    if (!rk_pages_sealed(pages)) {
        return RK_MISS_EVICTED;
    }
    return rk_transport_alive(transport) ? RK_OK : RK_MISS_NODE_DOWN;
}

enum rk_status transport_identity_check(const char *wanted_id, uint64_t wanted_incarnation,
                                        const char *node_id, uint64_t incarnation,
                                        struct rk_error *error)
{
    bool id_known = wanted_id && wanted_id[0] != '\0' && node_id[0] != '\0';
    if (id_known && strcmp(wanted_id, node_id) != 0) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "this is %s, not %s", node_id, wanted_id);
    }
    if (wanted_incarnation != 0 && incarnation != 0 && wanted_incarnation != incarnation) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "this is %s, but started anew",
                            id_known ? node_id : "the store");
    }
    return RK_OK;
}

bool rk_transport_flush(struct rk_transport *transport)
{
    return !transport->ops->flush || transport->ops->flush(transport->connection);
}

static bool put_sensible(const struct rk_put *put)
{
    return put->bytes > 0 && put->page_bytes > 0 &&
           put->num_pages == (put->bytes + put->page_bytes - 1) / put->page_bytes;
}

enum rk_status rk_transport_put(struct rk_transport *transport, struct rk_put *puts,
                                size_t num_puts, const struct rk_until *until,
                                struct rk_error *error)
{
    size_t heads_bytes = sizeof(uint32_t);
    if (num_puts == 0 || num_puts > RK_TRANSPORT_ITEMS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a batch has 1 to %d items, not %zu",
                            RK_TRANSPORT_ITEMS_MAX, num_puts);
    }
    for (size_t i = 0; i < num_puts; i++) {
        RK_ASSERT(put_sensible(&puts[i]));
        heads_bytes += sizeof(uint32_t) + puts[i].head_bytes;
        puts[i].status = RK_ERR_UNAVAILABLE;
    }
    if (heads_bytes > WIRE_HEADS_BYTES_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "what describes a batch has at most %u bytes",
                            WIRE_HEADS_BYTES_MAX);
    }
    enum rk_status over = rk_until_over(until);
    if (over != RK_OK) {
        return rk_error_set(error, over, "no time was left for a put");
    }
    if (error) {
        error->text[0] = '\0';
    }
    return transport->ops->put(transport->connection, puts, num_puts, until, error);
}

void rk_transport_destroy(struct rk_transport *transport)
{
    if (!transport) {
        return;
    }
    transport->ops->destroy(transport->connection);
    rk_free(transport);
}

bool rk_page_verify(const struct rk_page *page, size_t page_bytes)
{
    return rk_hash_xxh3(page->data, page_bytes) == page->checksum;
}
