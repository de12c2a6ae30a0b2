#include "kvstore/space_internal.h"

#include "common/base/alloc.h"

#include <stdbool.h>

#define SPACE_NONE UINT32_MAX
#define SPACE_BINS 32

/*
 * tag[g] of the first and the last granule of a free extent is its size; all
 * other tags are 0 or stale inside free extents. A taken granule has tag 0, so
 * the neighbours of a freed run tell at once whether they are free.
 */
struct space {
    uint32_t num_granules;
    uint32_t free_granules;
    uint32_t bins_used; /* bit b: bins[b] is not empty */
    uint32_t bins[SPACE_BINS];
    uint32_t *tag;
    uint32_t *next;
    uint32_t *prev;
};

static uint32_t bin_of(uint32_t count)
{
    return 31u - (uint32_t)__builtin_clz(count);
}

static void link_extent(struct space *space, uint32_t begin, uint32_t count)
{
    uint32_t bin = bin_of(count);
    uint32_t head = space->bins[bin];
    space->tag[begin] = count;
    space->tag[begin + count - 1] = count;
    space->prev[begin] = SPACE_NONE;
    space->next[begin] = head;
    if (head != SPACE_NONE) {
        space->prev[head] = begin;
    }
    space->bins[bin] = begin;
    space->bins_used |= 1u << bin;
}

static void unlink_extent(struct space *space, uint32_t begin)
{
    uint32_t count = space->tag[begin];
    uint32_t bin = bin_of(count);
    uint32_t next = space->next[begin];
    uint32_t prev = space->prev[begin];
    if (next != SPACE_NONE) {
        space->prev[next] = prev;
    }
    if (prev != SPACE_NONE) {
        space->next[prev] = next;
    } else {
        space->bins[bin] = next;
        if (next == SPACE_NONE) {
            space->bins_used &= ~(1u << bin);
        }
    }
    space->tag[begin] = 0;
    space->tag[begin + count - 1] = 0;
}

enum rk_status space_create(uint32_t num_granules, struct space **ret_space)
{
    struct space *space = rk_alloc_zero(1, sizeof(*space));
    if (!space) {
        return RK_ERR_NO_MEMORY;
    }
    space->num_granules = num_granules;
    space->free_granules = num_granules;
    for (uint32_t bin = 0; bin < SPACE_BINS; bin++) {
        space->bins[bin] = SPACE_NONE;
    }
    space->tag = rk_alloc_zero(num_granules, sizeof(uint32_t));
    space->next = rk_alloc_zero(num_granules, sizeof(uint32_t));
    space->prev = rk_alloc_zero(num_granules, sizeof(uint32_t));
    if (!space->tag || !space->next || !space->prev) {
        space_destroy(space);
        return RK_ERR_NO_MEMORY;
    }
    if (num_granules > 0) {
        link_extent(space, 0, num_granules);
    }
    *ret_space = space;
    return RK_OK;
}

void space_destroy(struct space *space)
{
    if (!space) {
        return;
    }
    rk_free(space->tag);
    rk_free(space->next);
    rk_free(space->prev);
    rk_free(space);
}

/* The first extent of a bin with at least `want` granules; else its largest, if any. */
static uint32_t search_bin(const struct space *space, uint32_t bin, uint32_t want)
{
    uint32_t best = SPACE_NONE;
    for (uint32_t at = space->bins[bin]; at != SPACE_NONE; at = space->next[at]) {
        if (space->tag[at] >= want) {
            return at;
        }
        if (best == SPACE_NONE || space->tag[at] > space->tag[best]) {
            best = at;
        }
    }
    return best;
}

/* An extent that has `want`, or the largest there is, or SPACE_NONE. */
static uint32_t search(const struct space *space, uint32_t want)
{
    uint32_t bin = bin_of(want);
    /* Anything in a bin above is large enough, so its head will do. */
    uint32_t above = bin >= 31 ? 0 : space->bins_used & ~((2u << bin) - 1);
    if (space->bins_used & (1u << bin)) {
        uint32_t at = search_bin(space, bin, want);
        if (space->tag[at] >= want || !above) {
            return at;
        }
    }
    if (above) {
        return space->bins[__builtin_ctz(above)];
    }
    return space->bins_used ? search_bin(space, bin_of(space->bins_used), want) : SPACE_NONE;
}

uint32_t space_alloc(struct space *space, uint32_t want, uint32_t min, uint32_t *ret_begin)
{
    RK_ASSERT(min > 0 && min <= want);
    uint32_t begin = search(space, want);
    if (begin == SPACE_NONE || space->tag[begin] < min) {
        return 0;
    }
    uint32_t count = space->tag[begin];
    unlink_extent(space, begin);
    uint32_t taken = count < want ? count : want;
    if (taken < count) {
        link_extent(space, begin + taken, count - taken);
    }
    space->free_granules -= taken;
    *ret_begin = begin;
    return taken;
}

void space_free(struct space *space, uint32_t begin, uint32_t count)
{
    RK_ASSERT(count > 0 && begin < space->num_granules && count <= space->num_granules - begin);
    RK_ASSERT(space->tag[begin] == 0 && space->tag[begin + count - 1] == 0);
    space->free_granules += count;
    if (begin > 0 && space->tag[begin - 1] != 0) {
        uint32_t before = space->tag[begin - 1];
        begin -= before;
        count += before;
        unlink_extent(space, begin);
    }
    uint32_t end = begin + count;
    if (end < space->num_granules && space->tag[end] != 0) {
        count += space->tag[end];
        unlink_extent(space, end);
    }
    link_extent(space, begin, count);
}

uint32_t space_free_granules(const struct space *space)
{
    return space->free_granules;
}
