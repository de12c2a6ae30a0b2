#include "worker/engine/engine_internal.h"

#include "common/base/alloc.h"

#include <sys/mman.h>

enum rk_status engine_page_pool_create(struct engine_page_pool *pool, uint64_t num_pages,
                                       size_t page_bytes)
{
    size_t bytes = 0;
    enum rk_status status = RK_ERR_NO_MEMORY;

    RK_ASSERT(page_bytes % 64 == 0); /* Pages stay aligned as the arena is. */
    if (num_pages == 0 || num_pages >= UINT32_MAX ||
        __builtin_mul_overflow((size_t)num_pages, page_bytes, &bytes)) {
        return RK_ERR_INVALID;
    }
    pool->free = rk_alloc_zero((size_t)num_pages, sizeof(*pool->free));
    if (!pool->free) {
        goto fail;
    }
    /* Memory of the operating system is only spent on pages that were used once. */
    void *arena = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) {
        goto fail;
    }
    pool->arena = arena;
    pool->arena_bytes = bytes;
    pool->page_bytes = page_bytes;
    pool->num_pages = (uint32_t)num_pages;
    pool->num_free = (uint32_t)num_pages;
    for (uint32_t i = 0; i < pool->num_pages; i++) {
        pool->free[i] = pool->num_pages - 1 - i;
    }
    return RK_OK;

fail:
    engine_page_pool_destroy(pool);
    return status;
}

void engine_page_pool_destroy(struct engine_page_pool *pool)
{
    if (pool->arena) {
        (void)munmap(pool->arena, pool->arena_bytes);
    }
    rk_free(pool->free);
    memset(pool, 0, sizeof(*pool));
}

void *engine_page_pool_take(struct engine_page_pool *pool)
{
    RK_ASSERT(pool->num_free > 0);
    unsigned char *page = pool->arena + (size_t)pool->free[--pool->num_free] * pool->page_bytes;

    /* Rows that are never written are zero, so that the checksum of a part-filled page depends on
     * its tokens alone, and no bytes of another request are ever lent or published. */
    memset(page, 0, pool->page_bytes);
    return page;
}

void engine_page_pool_give(struct engine_page_pool *pool, void *page)
{
    size_t offset = (size_t)((unsigned char *)page - pool->arena);

    RK_ASSERT(offset < pool->arena_bytes && offset % pool->page_bytes == 0);
    RK_ASSERT(pool->num_free < pool->num_pages);
    pool->free[pool->num_free++] = (uint32_t)(offset / pool->page_bytes);
}
