#include "common/transport/transport_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/transport/shm_wire_internal.h"

#include <fcntl.h>
#include <pthread.h>
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
                                   int64_t deadline_ns, struct rk_transport **ret_transport,
                                   struct rk_error *error)
{
    struct rk_transport *transport = rk_alloc_zero(1, sizeof(*transport));
    if (!transport) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a connection");
    }
    transport->ops = ops;
    enum rk_status status = ops->connect(endpoint, deadline_ns, &transport->connection, error);
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
    int64_t deadline_ns = rk_deadline_in_ms(timeout_ms);
    enum rk_status status = rk_error_set(error, RK_ERR_UNSUPPORTED, "the path \"%s\" is not served",
                                         rk_path_name(path));
    for (size_t i = 0; i < NUM_PATHS; i++) {
        const struct transport_ops *ops = paths[i];
        bool wanted = path == RK_PATH_NONE ? ops->reachable(endpoint) : path == ops->path;
        if (!wanted) {
            continue;
        }
        status = connect_path(ops, endpoint, deadline_ns, ret_transport, error);
        if (status == RK_OK) {
            return RK_OK;
        }
    }
    return status;
}

enum rk_path rk_transport_path(const struct rk_transport *transport)
{
    return transport->ops->path;
}

enum rk_status rk_transport_get(struct rk_transport *transport, const struct rk_get *get,
                                struct rk_pages *ret_pages, struct rk_error *error)
{
    uint64_t num_pages = 0;
    if (get->page_bytes == 0 || get->num_extents == 0 || get->num_extents > SHM_EXTENTS_MAX ||
        !shm_extents_pages(get->extents, get->num_extents, SHM_PAGES_MAX, &num_pages) ||
        num_pages > get->pages_max) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "a get needs 1 to %u extents, none of them empty, with at most %llu "
                            "pages",
                            SHM_EXTENTS_MAX, (unsigned long long)get->pages_max);
    }
    if (rk_deadline_left_ms(get->deadline_ns) == 0) {
        return RK_MISS_DEADLINE;
    }
    struct rk_pages pages = {
        .num_pages = num_pages, .path = transport->ops->path, .bytes = num_pages * get->page_bytes};
    pages.pages = rk_alloc_zero(num_pages, sizeof(*pages.pages));
    if (!pages.pages) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %llu pages",
                            (unsigned long long)num_pages);
    }
    enum rk_status status =
        transport->ops->get(transport->connection, get, num_pages, &pages, error);
    if (status != RK_OK) {
        rk_free(pages.pages);
        return status;
    }
    *ret_pages = pages;
    return RK_OK;
}

void rk_transport_release(struct rk_transport *transport, struct rk_pages *pages)
{
    if (!pages->pages) {
        return; /* Released before, or never filled. */
    }
    transport->ops->release(transport->connection, pages);
    rk_free(pages->pages);
    *pages = (struct rk_pages){0};
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
