/*
 * space: free granules of the arena, as extents that coalesce when freed.
 *
 * Extents sit in bins by the power of two below their size. All memory is
 * taken at creation, so neither alloc nor free can fail for want of it.
 * Threads: none of its own; the store's mutex guards it.
 */
#ifndef RK_KVSTORE_SPACE_INTERNAL_H
#define RK_KVSTORE_SPACE_INTERNAL_H

#include "common/base/status.h"

#include <stdint.h>

struct space;

RK_MUST_CHECK enum rk_status space_create(uint32_t num_granules, struct space **ret_space);
void space_destroy(struct space *space); /* accepts NULL */

/*
 * Takes up to `want` contiguous granules, at least `min`. Gives all of `want`
 * whenever one extent has them. Returns how many, 0 when no extent has `min`.
 */
uint32_t space_alloc(struct space *space, uint32_t want, uint32_t min, uint32_t *ret_begin);
/* Gives back taken granules; any part of what alloc gave. */
void space_free(struct space *space, uint32_t begin, uint32_t count);
uint32_t space_free_granules(const struct space *space);

#endif
