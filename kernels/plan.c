/*
 * plan.c: from a batch's page lists to balanced work items.
 *
 * Three steps: check and copy the batch; find, for each tile of query rows, the
 * pages of its list that it may see; deal these out to the multiprocessors.
 * Nothing is allocated, and the same batch gives the same items.
 *
 * Lists are cut into runs of pages in ascending order, so that a tile finds its
 * pages by bisection; a list in any order works, with more runs.
 */
#include "kernels/plan_internal.h"

#include "common/base/alloc.h"

#include <inttypes.h>
#include <string.h>

/* The last row of a page at POSITION_MAX, and a position less a window, fit in int32_t. */
#define POSITION_MAX (INT32_MAX - RK_PAGE_TOKENS)

/* Decode: a processor has at least so much cost, and begins a list with at least so much room; less
 * is slower than the merge that it asks for. */
#define DECODE_SHARE_MIN 4
#define DECODE_ROOM_MIN  3
/* Prefill, in tiles of 128 keys: start and end of an item; partial results of a part. */
#define PREFILL_ITEM_COST 1
#define PREFILL_PART_COST 2
/* The smallest items, with this share of all cost, even out what the others leave. */
#define PREFILL_TAIL_PERCENT 8

struct plan_scratch {
    uint32_t tiles_max;
    uint32_t num_tiles;
    struct plan_item *tiles; /* [tiles_max], each with all pages that it may see */
    uint32_t *keys;          /* [tiles_max], to sort by */
    uint32_t *order;         /* [tiles_max] */
    uint32_t *order_other;   /* [tiles_max] */
    uint32_t *parts;         /* [tiles_max], prefill */
    uint32_t *run_ends;      /* [refs_max], of the list in work */
    uint64_t *heap;          /* [processors], load << 16 | processor */
    int32_t *last;           /* [processors], its last item or -1 */
    uint64_t *pages;         /* [processors] */
    struct part {
        uint32_t processor;
        int32_t pages;
    } * split; /* [processors], decode: parts of the tile in work */
    int32_t num_slots;
    int32_t num_counters;
};

static struct plan_scratch *scratch_of(const struct kernels_plan *plan)
{
    return plan->scratch;
}

bool plan_scratch_create(struct kernels_plan *plan, uint32_t tiles_max)
{
    uint32_t processors = plan->device->processors;
    struct plan_scratch *s = rk_alloc_zero(1, sizeof(*s));
    plan->scratch = s;
    if (!s) {
        return false;
    }
    RK_ASSERT(processors > 0 && processors <= WORKSPACE_COUNTERS / SPLITS_PER_PROCESSOR);
    s->tiles_max = tiles_max;
    s->tiles = rk_alloc_zero(tiles_max, sizeof(*s->tiles));
    s->keys = rk_alloc_zero(tiles_max, sizeof(*s->keys));
    s->order = rk_alloc_zero(tiles_max, sizeof(*s->order));
    s->order_other = rk_alloc_zero(tiles_max, sizeof(*s->order_other));
    s->parts = rk_alloc_zero(tiles_max, sizeof(*s->parts));
    s->run_ends = rk_alloc_zero(plan->options.refs_max, sizeof(*s->run_ends));
    s->heap = rk_alloc_zero(processors, sizeof(*s->heap));
    s->last = rk_alloc_zero(processors, sizeof(*s->last));
    s->pages = rk_alloc_zero(processors, sizeof(*s->pages));
    s->split = rk_alloc_zero(processors, sizeof(*s->split));
    return s->tiles && s->keys && s->order && s->order_other && s->parts && s->run_ends &&
           s->heap && s->last && s->pages && s->split;
}

void plan_scratch_destroy(struct kernels_plan *plan)
{
    struct plan_scratch *s = plan->scratch;
    if (!s) {
        return;
    }
    rk_free(s->split);
    rk_free(s->pages);
    rk_free(s->last);
    rk_free(s->heap);
    rk_free(s->run_ends);
    rk_free(s->parts);
    rk_free(s->order_other);
    rk_free(s->order);
    rk_free(s->keys);
    rk_free(s->tiles);
    rk_free(s);
    plan->scratch = NULL;
}

void plan_clear(struct kernels_plan *plan)
{
    struct plan_item *items = plan_items(plan);
    for (uint32_t p = 0; p < plan->device->processors; p++) {
        items[p] = (struct plan_item){.next = -1};
    }
    plan->num_items = 0;
    plan->version = 0;
    plan->stats = (struct kernels_plan_stats){.items = 0};
}

/* ---- check and copy ---- */

static enum rk_status full(struct rk_error *error, const char *what, uint32_t is, uint32_t max)
{
    return rk_error_set(error, RK_ERR_FULL,
                        "kernels_plan_update: %" PRIu32 " %s, more than the plan's %" PRIu32, is,
                        what, max);
}

static enum rk_status check_shape(const struct kernels_plan *plan,
                                  const struct kernels_batch *batch, struct rk_error *error)
{
    const struct kernels_plan_options *o = &plan->options;
    if (batch->num_requests == 0 || batch->num_variants == 0) {
        return rk_error_set(error, RK_ERR_INVALID, "kernels_plan_update: the batch has no %s",
                            batch->num_requests == 0 ? "requests" : "variants");
    }
    if (batch->num_requests > o->requests_max) {
        return full(error, "requests", batch->num_requests, o->requests_max);
    }
    if (batch->num_refs > o->refs_max) {
        return full(error, "page refs", batch->num_refs, o->refs_max);
    }
    if (batch->num_explicit > o->explicit_max) {
        return full(error, "tables of explicit positions", batch->num_explicit, o->explicit_max);
    }
    const char *null = !batch->row_first                      ? "row_first"
                       : !batch->positions                    ? "positions"
                       : !batch->lists                        ? "lists"
                       : batch->num_refs != 0 && !batch->refs ? "refs"
                       : batch->num_explicit != 0 && !batch->explicit_positions
                           ? "explicit_positions"
                           : NULL;
    if (null) {
        return rk_error_set(error, RK_ERR_INVALID, "kernels_plan_update: %s is NULL", null);
    }
    return RK_OK;
}

static enum rk_status check_rows(struct kernels_plan *plan, const struct kernels_batch *batch,
                                 struct rk_error *error)
{
    const uint32_t *row_first = batch->row_first;
    if (row_first[0] != 0) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_plan_update: row_first[0] is %" PRIu32 ", not 0",
                            row_first[0]);
    }
    for (uint32_t r = 0; r < batch->num_requests; r++) {
        if (row_first[r + 1] < row_first[r]) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "kernels_plan_update: row_first of request %" PRIu32 " is %" PRIu32
                                ", above that of the next, %" PRIu32,
                                r, row_first[r], row_first[r + 1]);
        }
    }
    uint32_t rows = row_first[batch->num_requests];
    if (rows == 0) {
        return rk_error_set(error, RK_ERR_INVALID, "kernels_plan_update: the batch has no rows");
    }
    if (rows > plan->options.rows_max) {
        return full(error, "rows", rows, plan->options.rows_max);
    }
    for (uint32_t r = 0; r < batch->num_requests; r++) {
        int32_t least = 0;
        for (uint32_t row = row_first[r]; row < row_first[r + 1]; row++) {
            int32_t position = batch->positions[row];
            if (position < least || position > POSITION_MAX) {
                return rk_error_set(error, RK_ERR_INVALID,
                                    "kernels_plan_update: row %" PRIu32 " of request %" PRIu32
                                    " is at position %" PRId32
                                    "; positions ascend from 0 to at most %d",
                                    row, r, position, POSITION_MAX);
            }
            least = position;
        }
    }
    memcpy(plan->row_first, row_first, (batch->num_requests + (size_t)1) * sizeof(*row_first));
    plan->rows = rows;
    return RK_OK;
}

static enum rk_status check_explicit(struct kernels_plan *plan, const struct kernels_batch *batch,
                                     struct rk_error *error)
{
    int32_t(*to)[RK_PAGE_TOKENS] = plan_explicit(plan);
    for (uint32_t i = 0; i < batch->num_explicit; i++) {
        const int32_t *from = batch->explicit_positions[i];
        bool bad = from[0] < 0 || from[RK_PAGE_TOKENS - 1] > POSITION_MAX;
        for (uint32_t r = 1; r < RK_PAGE_TOKENS; r++) {
            bad |= from[r] < from[r - 1];
        }
        if (bad) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "kernels_plan_update: table %" PRIu32
                                " of explicit positions does not ascend from 0 to at most %d",
                                i, POSITION_MAX);
        }
        memcpy(to[i], from, sizeof(to[i]));
    }
    return RK_OK;
}

/* Highest values of what a ref names. */
struct ref_limits {
    uint32_t page;
    uint32_t variant;
    uint32_t table; /* UINT32_MAX: there is none */
};

/* Below INT32_MAX + 1 if value <= limit; both are int32_t, limit -1 or above. */
static inline uint32_t beyond(uint32_t value, uint32_t limit)
{
    return value | (limit - value);
}

/* The sign bit: something is out of range. No branches: long lists spend their time here. */
static inline uint32_t ref_beyond(const struct kernels_page_ref *ref, struct ref_limits limits)
{
    bool contiguous = ref->positions == -1;
    uint32_t place = (uint32_t)(contiguous ? ref->position : ref->positions);
    uint32_t places = contiguous ? POSITION_MAX : limits.table;
    return beyond((uint32_t)ref->page, limits.page) |
           beyond((uint32_t)ref->variant, limits.variant) | beyond(place, places);
}

static enum rk_status ref_refuse(const struct kernels_pool *pool, const struct kernels_batch *batch,
                                 struct ref_limits limits, struct rk_error *error)
{
    uint32_t i = 0;
    while (ref_beyond(&batch->refs[i], limits) <= INT32_MAX) {
        i++;
    }
    const struct kernels_page_ref *ref = &batch->refs[i];
    if ((uint32_t)ref->page >= pool->options.pages) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_plan_update: ref %" PRIu32 " names page %" PRId32
                            " of a pool of %" PRIu32,
                            i, ref->page, pool->options.pages);
    }
    if ((uint32_t)ref->variant >= batch->num_variants) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_plan_update: ref %" PRIu32 " names query variant %" PRId32
                            " of %" PRIu32,
                            i, ref->variant, batch->num_variants);
    }
    if (ref->positions != -1) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_plan_update: ref %" PRIu32 " names table %" PRId32
                            " of explicit positions, of %" PRIu32,
                            i, ref->positions, batch->num_explicit);
    }
    return rk_error_set(error, RK_ERR_INVALID,
                        "kernels_plan_update: ref %" PRIu32 " is at position %" PRId32
                        ", not 0 to %d",
                        i, ref->position, POSITION_MAX);
}

/* Returns the sign bit of ref_beyond() of all; *ret_last is the highest page. */
static __attribute__((noinline)) uint32_t refs_copy(const struct kernels_page_ref *restrict from,
                                                    uint32_t count, struct ref_limits limits,
                                                    struct kernels_page_ref *restrict to,
                                                    int32_t *ret_last)
{
    uint32_t bad = 0;
    int32_t last = -1;
    for (uint32_t i = 0; i < count; i++) {
        bad |= ref_beyond(&from[i], limits);
        last = from[i].page > last ? from[i].page : last;
        to[i] = from[i];
    }
    *ret_last = last;
    return bad;
}

static enum rk_status check_refs(struct kernels_plan *plan, const struct kernels_pool *pool,
                                 const struct kernels_batch *batch, struct rk_error *error)
{
    struct ref_limits limits = {
        .page = pool->options.pages - 1,
        .variant = batch->num_variants > INT32_MAX ? INT32_MAX : batch->num_variants - 1,
        .table = batch->num_explicit - 1};
    int32_t last = -1;
    uint32_t bad = refs_copy(batch->refs, batch->num_refs, limits, plan_refs(plan), &last);
    plan->pages_end = (uint32_t)(last + 1);
    return bad <= INT32_MAX ? RK_OK : ref_refuse(pool, batch, limits, error);
}

static enum rk_status check_lists(struct kernels_plan *plan, const struct kernels_batch *batch,
                                  struct rk_error *error)
{
    uint32_t heads = plan->options.num_kv_heads;
    for (uint32_t i = 0; i < batch->num_requests * heads; i++) {
        const struct kernels_page_list *list = &batch->lists[i];
        if (list->count > batch->num_refs || list->first > batch->num_refs - list->count) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "kernels_plan_update: the list of request %" PRIu32
                                ", KV head %" PRIu32 " is refs %" PRIu32 " and %" PRIu32
                                " more, of %" PRIu32,
                                i / heads, i % heads, list->first, list->count, batch->num_refs);
        }
        plan->lists[i] = *list;
        /* All positions are in such a window, or in such a sink; items hold int32_t. */
        if (list->window > INT32_MAX || list->sink > INT32_MAX) {
            plan->lists[i].window = 0;
        }
        if (plan->lists[i].window == 0) {
            plan->lists[i].sink = 0;
        }
    }
    return RK_OK;
}

static enum rk_status check_batch(struct kernels_plan *plan, const struct kernels_pool *pool,
                                  const struct kernels_batch *batch, struct rk_error *error)
{
    enum rk_status status = check_shape(plan, batch, error);
    if (status == RK_OK) {
        status = check_rows(plan, batch, error);
    }
    if (status == RK_OK) {
        status = check_explicit(plan, batch, error);
    }
    if (status == RK_OK) {
        status = check_refs(plan, pool, batch, error);
    }
    if (status == RK_OK) {
        status = check_lists(plan, batch, error);
    }
    plan->num_requests = batch->num_requests;
    plan->num_variants = batch->num_variants;
    plan->num_refs = batch->num_refs;
    plan->num_explicit = batch->num_explicit;
    return status;
}

/* ---- the pages of a tile ---- */

struct list_view {
    const struct kernels_page_ref *refs;
    const int32_t (*explicit_positions)[RK_PAGE_TOKENS];
};

static int64_t page_low(const struct list_view *view, uint32_t i)
{
    const struct kernels_page_ref *ref = &view->refs[i];
    return ref->positions < 0 ? ref->position : view->explicit_positions[ref->positions][0];
}

static int64_t page_high(const struct list_view *view, uint32_t i)
{
    const struct kernels_page_ref *ref = &view->refs[i];
    return ref->positions < 0 ? (int64_t)ref->position + RK_PAGE_TOKENS - 1
                              : view->explicit_positions[ref->positions][RK_PAGE_TOKENS - 1];
}

/* First page of [begin, end) whose highest position is above `position`, or end. */
static uint32_t first_above(const struct list_view *view, uint32_t begin, uint32_t end,
                            int64_t position)
{
    while (begin < end) {
        uint32_t middle = begin + (end - begin) / 2;
        if (page_high(view, middle) > position) {
            end = middle;
        } else {
            begin = middle + 1;
        }
    }
    return begin;
}

/* First page of [begin, end) whose lowest position is `position` or above, or end. */
static uint32_t first_from(const struct list_view *view, uint32_t begin, uint32_t end,
                           int64_t position)
{
    while (begin < end) {
        uint32_t middle = begin + (end - begin) / 2;
        if (page_low(view, middle) >= position) {
            end = middle;
        } else {
            begin = middle + 1;
        }
    }
    return begin;
}

/* Ends of the runs, in which lowest and highest positions ascend. */
static uint32_t find_runs(const struct list_view *view, const struct kernels_page_list *list,
                          uint32_t *ret_ends)
{
    if (list->count == 0) {
        return 0;
    }
    uint32_t runs = 0;
    uint32_t end = list->first + list->count;
    int64_t low = page_low(view, list->first);
    int64_t high = page_high(view, list->first);
    for (uint32_t i = list->first + 1; i < end; i++) {
        int64_t next_low = page_low(view, i);
        int64_t next_high = page_high(view, i);
        if ((next_low < low) | (next_high < high)) {
            ret_ends[runs++] = i;
        }
        low = next_low;
        high = next_high;
    }
    ret_ends[runs++] = end;
    return runs;
}

/* Puts [first, end) after the ranges of the tile; closes the smallest gap if there is no room. */
static void range_add(const struct list_view *view, struct plan_item *tile, uint32_t *ranges,
                      uint32_t first, uint32_t end)
{
    while (first < end && view->refs[first].live == 0) {
        first++;
    }
    while (first < end && view->refs[end - 1].live == 0) {
        end--;
    }
    uint32_t n = *ranges;
    int32_t last_end = n > 0 ? tile->first[n - 1] + tile->count[n - 1] : -1;
    if (n > 0 && (int32_t)first < last_end) {
        first = (uint32_t)last_end;
    }
    if (first >= end) {
        return;
    }
    if ((int32_t)first == last_end) {
        tile->count[n - 1] += (int32_t)(end - first);
        return;
    }
    if (n == PLAN_RANGES) {
        uint32_t closed = PLAN_RANGES - 1; /* the gap after this range */
        int32_t smallest = (int32_t)first - last_end;
        for (uint32_t i = 0; i + 1 < PLAN_RANGES; i++) {
            int32_t gap = tile->first[i + 1] - tile->first[i] - tile->count[i];
            if (gap < smallest) {
                smallest = gap;
                closed = i;
            }
        }
        if (closed == PLAN_RANGES - 1) {
            tile->count[closed] = (int32_t)end - tile->first[closed];
            return;
        }
        tile->count[closed] =
            tile->first[closed + 1] + tile->count[closed + 1] - tile->first[closed];
        for (uint32_t i = closed + 1; i + 1 < PLAN_RANGES; i++) {
            tile->first[i] = tile->first[i + 1];
            tile->count[i] = tile->count[i + 1];
        }
        n--;
    }
    tile->first[n] = (int32_t)first;
    tile->count[n] = (int32_t)(end - first);
    *ranges = n + 1;
}

/*
 * A page is taken if it has a position <= last that is in the window of a query at `low`, or in
 * the sink. Decode has no right edge, so that rows may move on to the end of the list; a window's
 * left edge only moves right meanwhile, and leaves pages that are read and hidden.
 */
static void tile_pages(const struct list_view *view, const struct kernels_page_list *list,
                       const uint32_t *run_ends, uint32_t runs, int64_t low, int64_t last,
                       struct plan_item *tile)
{
    uint32_t ranges = 0;
    uint32_t begin = list->first;
    for (uint32_t i = 0; i < runs; i++) {
        uint32_t end = run_ends[i];
        uint32_t seen = last == INT64_MAX ? end : first_from(view, begin, end, last + 1);
        if (list->window == 0) {
            range_add(view, tile, &ranges, begin, seen);
        } else {
            uint32_t sink = list->sink == 0 ? begin : first_from(view, begin, seen, list->sink);
            uint32_t window = first_above(view, sink, seen, low - (int64_t)list->window);
            range_add(view, tile, &ranges, begin, sink);
            range_add(view, tile, &ranges, window, seen);
        }
        begin = end;
    }
    for (uint32_t i = 0; i < ranges; i++) {
        tile->pages += tile->count[i];
    }
}

static void list_tiles(struct kernels_plan *plan, const struct kernels_batch *batch,
                       const struct list_view *view, uint32_t request, uint32_t head)
{
    struct plan_scratch *s = scratch_of(plan);
    const struct kernels_page_list *list =
        &plan->lists[(size_t)request * plan->options.num_kv_heads + head];
    uint32_t size = tokens_per_tile(plan->options.kind, plan->options.group);
    uint32_t end = plan->row_first[request + 1];
    bool decode = plan->options.kind == KERNELS_PLAN_DECODE;
    uint32_t runs = 0;
    if (decode && list->window == 0 && list->count != 0) {
        s->run_ends[0] = list->first + list->count; /* All of it: order does not matter. */
        runs = 1;
    } else if (plan->row_first[request] < end) {
        runs = find_runs(view, list, s->run_ends);
    }
    for (uint32_t row = plan->row_first[request]; row < end; row += size) {
        uint32_t tokens = end - row < size ? end - row : size;
        RK_ASSERT(s->num_tiles < s->tiles_max);
        struct plan_item *tile = &s->tiles[s->num_tiles++];
        *tile = (struct plan_item){.next = -1,
                                   .row = (int32_t)row,
                                   .tokens = (int32_t)tokens,
                                   .kv_head = (int32_t)head,
                                   .window = (int32_t)list->window,
                                   .sink = (int32_t)list->sink,
                                   .num_splits = 1};
        tile_pages(view, list, s->run_ends, runs, batch->positions[row],
                   decode ? INT64_MAX : (int64_t)batch->positions[row + tokens - 1], tile);
    }
}

static void make_tiles(struct kernels_plan *plan, const struct kernels_batch *batch)
{
    const struct list_view view = {.refs = plan_refs(plan),
                                   .explicit_positions =
                                       (const int32_t(*)[RK_PAGE_TOKENS])plan_explicit(plan)};
    scratch_of(plan)->num_tiles = 0;
    for (uint32_t head = 0; head < plan->options.num_kv_heads; head++) {
        for (uint32_t request = 0; request < plan->num_requests; request++) {
            list_tiles(plan, batch, &view, request, head);
        }
    }
}

/* ---- items ---- */

/* The pages of a tile that are not dealt out yet. */
struct cursor {
    uint32_t range;
    int32_t used; /* of the range */
};

static void item_emit(struct kernels_plan *plan, const struct plan_item *tile, struct cursor *at,
                      int32_t pages, int32_t split, uint32_t processor)
{
    struct plan_scratch *s = scratch_of(plan);
    struct plan_item *items = plan_items(plan);
    uint32_t index = processor;
    if (s->last[processor] >= 0) {
        RK_ASSERT(plan->num_items < plan->items_max);
        index = plan->num_items++;
        items[s->last[processor]].next = (int32_t)index;
    } else {
        plan->stats.processors++;
    }
    s->last[processor] = (int32_t)index;
    s->pages[processor] += (uint32_t)pages;
    plan->stats.items++;
    plan->stats.splits += tile->num_splits > 1;

    struct plan_item *item = &items[index];
    *item = *tile;
    item->pages = pages;
    item->split = split;
    if (tile->num_splits == 1) {
        return;
    }
    memset(item->first, 0, sizeof(item->first));
    memset(item->count, 0, sizeof(item->count));
    for (uint32_t n = 0; pages > 0; n++) {
        int32_t left = tile->count[at->range] - at->used;
        int32_t take = left < pages ? left : pages;
        item->first[n] = tile->first[at->range] + at->used;
        item->count[n] = take;
        pages -= take;
        at->used += take;
        if (take == left) {
            at->range++;
            at->used = 0;
        }
    }
}

/* Numbers the partial results of a tile that is split. */
static void tile_split(const struct kernels_plan *plan, struct plan_item *tile, int32_t parts)
{
    struct plan_scratch *s = scratch_of(plan);
    tile->num_splits = parts;
    tile->slot = s->num_slots;
    tile->counter = s->num_counters;
    s->num_slots += parts;
    if (plan->options.kind == KERNELS_PLAN_PREFILL) {
        s->num_counters += 2;
    } else {
        int32_t groups = parts > MERGE_FAN_IN ? (parts + MERGE_FAN_IN - 1) / MERGE_FAN_IN : 0;
        s->num_slots += groups;
        s->num_counters += 1 + groups;
    }
}

/* order[0 .. n): the tiles by falling key, equal ones as they stand in order. */
static void sort_falling(struct plan_scratch *s, uint32_t n, uint32_t key_max)
{
    for (uint32_t shift = 0; shift == 0 || (shift < 32 && key_max >> shift != 0); shift += 8) {
        uint32_t at[257] = {0};
        for (uint32_t i = 0; i < n; i++) {
            at[256 - (s->keys[s->order[i]] >> shift & 0xff)]++;
        }
        for (uint32_t i = 1, sum = 0; i <= 256; i++) {
            uint32_t count = at[i];
            at[i] = sum;
            sum += count;
        }
        for (uint32_t i = 0; i < n; i++) {
            uint32_t tile = s->order[i];
            s->order_other[at[256 - (s->keys[tile] >> shift & 0xff)]++] = tile;
        }
        uint32_t *other = s->order;
        s->order = s->order_other;
        s->order_other = other;
    }
}

/*
 * Decode, Stream-K: all pages in one sequence, short lists first, cut into shares of one size, a
 * processor each. Cost: pages, and 1 for each item. The share is the least with which the
 * processors suffice; an even part of what is left would cut lists once more than need be, and
 * each cut is a partial result to merge.
 */

/* Deals in s->order; returns how many processors that takes. Makes items only if asked to. */
static uint32_t decode_deal(struct kernels_plan *plan, int64_t share, bool emit)
{
    struct plan_scratch *s = scratch_of(plan);
    uint32_t p = 0;
    int64_t room = share;
    for (uint32_t i = 0; i < s->num_tiles; i++) {
        struct plan_item *tile = &s->tiles[s->order[i]];
        int32_t pages = tile->pages;
        int32_t parts = 0;
        if (room < DECODE_ROOM_MIN) {
            p++;
            room = share;
        }
        for (;;) {
            const int32_t take = pages < room ? pages : (int32_t)room - 1;
            if (emit) {
                s->split[parts] = (struct part){.processor = p, .pages = take};
            }
            parts++;
            pages -= take;
            room -= take + 1;
            if (pages == 0) {
                break;
            }
            p++;
            room = share;
        }
        if (!emit) {
            continue;
        }
        if (parts > 1) {
            tile_split(plan, tile, parts);
        }
        struct cursor at = {.range = 0};
        for (int32_t part = 0; part < parts; part++) {
            item_emit(plan, tile, &at, s->split[part].pages, part, s->split[part].processor);
        }
    }
    return p + 1;
}

static void decode_schedule(struct kernels_plan *plan)
{
    struct plan_scratch *s = scratch_of(plan);
    const uint32_t processors = plan->device->processors;
    uint64_t cost = s->num_tiles;
    uint32_t key_max = 0;
    for (uint32_t i = 0; i < s->num_tiles; i++) {
        const uint32_t pages = (uint32_t)s->tiles[i].pages;
        key_max = pages > key_max ? pages : key_max;
        cost += pages;
    }
    for (uint32_t i = 0; i < s->num_tiles; i++) {
        s->order[i] = i;
        s->keys[i] = key_max - (uint32_t)s->tiles[i].pages;
    }
    sort_falling(s, s->num_tiles, key_max);
    RK_ASSERT(processors > 0);
    int64_t share = (int64_t)((cost + processors - 1) / processors);
    share = share < DECODE_SHARE_MIN ? DECODE_SHARE_MIN : share;
    while (decode_deal(plan, share, false) > processors) {
        share++;
    }
    (void)decode_deal(plan, share, true);
}

/* ---- prefill ---- */

static uint32_t pairs_of(const struct plan_item *tile)
{
    return ((uint32_t)tile->pages + 1) / 2;
}

/* Pairs of pages of part `part`: near-equal, whole pairs. */
static uint32_t part_pairs(const struct plan_item *tile, uint32_t parts, uint32_t part)
{
    RK_ASSERT(parts > 0);
    uint32_t pairs = pairs_of(tile);
    return pairs / parts + (part < pairs % parts);
}

static uint32_t part_cost(const struct plan_item *tile, uint32_t parts, uint32_t part)
{
    return part_pairs(tile, parts, part) + PREFILL_ITEM_COST + (parts > 1 ? PREFILL_PART_COST : 0);
}

/*
 * Parts of tiles above half of a processor's mean load, each near `percent` of that load. False
 * if these are more than the workspace holds.
 */
static bool choose_parts(struct kernels_plan *plan, uint64_t total, uint32_t percent)
{
    struct plan_scratch *s = scratch_of(plan);
    uint64_t processors = plan->device->processors;
    uint64_t splits = 0;
    for (uint32_t i = 0; i < s->num_tiles; i++) {
        uint64_t cost = part_cost(&s->tiles[i], 1, 0);
        uint64_t parts = 1;
        if (percent != 0 && 2 * processors * cost > total) {
            uint64_t size = total * percent; /* of a part, times 100 times processors */
            parts = (cost * 100 * processors + size / 2) / size;
            parts = parts < 1 ? 1 : parts > pairs_of(&s->tiles[i]) ? pairs_of(&s->tiles[i]) : parts;
            parts = parts < 1 ? 1 : parts; /* A tile without pages. */
        }
        s->parts[i] = (uint32_t)parts;
        splits += parts > 1 ? parts : 0;
    }
    return splits <= SPLITS_PER_PROCESSOR * processors;
}

/* For L2: one KV head after the other, in each the longest first; then the tail, longest first. */
static void prefill_order(struct kernels_plan *plan, uint64_t total)
{
    struct plan_scratch *s = scratch_of(plan);
    uint32_t key_max = 0;
    for (uint32_t i = 0; i < s->num_tiles; i++) {
        s->order[i] = i;
        s->keys[i] = part_cost(&s->tiles[i], s->parts[i], 0);
        key_max = s->keys[i] > key_max ? s->keys[i] : key_max;
    }
    sort_falling(s, s->num_tiles, key_max);
    uint32_t tail = s->num_tiles;
    for (uint64_t cost = 0; tail > 0; tail--) {
        uint32_t tile = s->order[tail - 1];
        cost += (uint64_t)s->keys[tile] * s->parts[tile];
        if (cost * 100 > total * PREFILL_TAIL_PERCENT) {
            break;
        }
    }
    uint32_t at[RK_KV_HEADS_MAX + 1] = {0};
    for (uint32_t i = 0; i < tail; i++) {
        at[s->tiles[s->order[i]].kv_head + 1]++;
    }
    for (uint32_t head = 0; head < RK_KV_HEADS_MAX; head++) {
        at[head + 1] += at[head];
    }
    for (uint32_t i = 0; i < tail; i++) {
        s->order_other[at[s->tiles[s->order[i]].kv_head]++] = s->order[i];
    }
    memcpy(s->order, s->order_other, tail * sizeof(*s->order));
}

/* The least loaded processor gets `cost` more; returns it, and its load. */
static uint32_t heap_take(uint64_t *heap, uint32_t n, uint64_t cost, uint64_t *ret_load)
{
    uint64_t top = heap[0] + (cost << 16);
    uint32_t i = 0;
    for (uint32_t child = 1; child < n; child = 2 * i + 1) {
        if (child + 1 < n && heap[child + 1] < heap[child]) {
            child++;
        }
        if (top <= heap[child]) {
            break;
        }
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = top;
    *ret_load = top >> 16;
    return top & 0xffff;
}

/* Deals in s->order; returns the highest load. Makes items only if asked to. */
static uint64_t prefill_deal(struct kernels_plan *plan, bool emit)
{
    struct plan_scratch *s = scratch_of(plan);
    uint32_t processors = plan->device->processors;
    uint64_t highest = 0;
    for (uint32_t p = 0; p < processors; p++) {
        s->heap[p] = p;
    }
    for (uint32_t i = 0; i < s->num_tiles; i++) {
        struct plan_item *tile = &s->tiles[s->order[i]];
        uint32_t parts = s->parts[s->order[i]];
        struct cursor at = {.range = 0};
        int32_t pages = tile->pages;
        if (emit && parts > 1) {
            tile_split(plan, tile, (int32_t)parts);
        }
        for (uint32_t part = 0; part < parts; part++) {
            uint64_t load = 0;
            uint32_t p = heap_take(s->heap, processors, part_cost(tile, parts, part), &load);
            highest = load > highest ? load : highest;
            if (emit) {
                int32_t take = (int32_t)(2 * part_pairs(tile, parts, part));
                take = take < pages ? take : pages;
                item_emit(plan, tile, &at, take, (int32_t)part, p);
                pages -= take;
            }
        }
    }
    return highest;
}

/* Splits as far as it makes the busiest processor less busy. */
static void prefill_schedule(struct kernels_plan *plan)
{
    static const uint32_t percents[] = {100, 50, 67, 33, 25}; /* of the mean load, for a part */
    struct plan_scratch *s = scratch_of(plan);
    uint64_t processors = plan->device->processors;
    uint64_t total = 0;
    uint64_t longest = 0;
    for (uint32_t i = 0; i < s->num_tiles; i++) {
        uint64_t cost = part_cost(&s->tiles[i], 1, 0);
        total += cost;
        longest = cost > longest ? cost : longest;
    }
    uint32_t best = 0;
    if (2 * processors * longest > total) {
        uint64_t least = UINT64_MAX;
        for (size_t i = 0; i <= sizeof(percents) / sizeof(percents[0]); i++) {
            uint32_t percent = i == 0 ? 0 : percents[i - 1];
            if (choose_parts(plan, total, percent)) {
                prefill_order(plan, total);
                uint64_t highest = prefill_deal(plan, false);
                if (highest < least) {
                    least = highest;
                    best = percent;
                }
            }
        }
    }
    RK_ASSERT(choose_parts(plan, total, best));
    prefill_order(plan, total);
    (void)prefill_deal(plan, true);
}

static void make_items(struct kernels_plan *plan)
{
    struct plan_scratch *s = scratch_of(plan);
    uint32_t processors = plan->device->processors;
    plan->num_items = processors;
    s->num_slots = 0;
    s->num_counters = 0;
    for (uint32_t p = 0; p < processors; p++) {
        s->last[p] = -1;
        s->pages[p] = 0;
    }
    if (plan->options.kind == KERNELS_PLAN_DECODE) {
        decode_schedule(plan);
    } else {
        prefill_schedule(plan);
    }
    size_t slots_max = (size_t)SPLITS_PER_PROCESSOR * processors *
                       slot_floats(KERNELS_PLAN_PREFILL, 128) /
                       slot_floats(plan->options.kind, plan->options.head_dim);
    RK_ASSERT((size_t)s->num_slots <= slots_max && s->num_counters <= WORKSPACE_COUNTERS);
    for (uint32_t p = 0; p < processors; p++) {
        plan->stats.pages += s->pages[p];
        plan->stats.pages_busiest =
            s->pages[p] > plan->stats.pages_busiest ? s->pages[p] : plan->stats.pages_busiest;
    }
}

/* Left alone if the caller says that nothing changed and what is quick to compare agrees. */
static bool plan_is_of(const struct kernels_plan *plan, const struct kernels_pool *pool,
                       const struct kernels_batch *batch)
{
    return batch->version != 0 && batch->version == plan->version &&
           batch->num_requests == plan->num_requests && batch->num_variants == plan->num_variants &&
           batch->num_refs == plan->num_refs && plan->pages_end <= pool->options.pages;
}

enum rk_status kernels_plan_update(struct kernels_plan *plan, const struct kernels_pool *pool,
                                   const struct kernels_batch *batch, bool *ret_changed,
                                   struct rk_error *error)
{
    if (!plan || !pool || !batch || !ret_changed) {
        return rk_error_set(error, RK_ERR_INVALID, "kernels_plan_update: %s is NULL",
                            !plan    ? "plan"
                            : !pool  ? "pool"
                            : !batch ? "batch"
                                     : "ret_changed");
    }
    if (plan_is_of(plan, pool, batch)) {
        *ret_changed = false;
        return RK_OK;
    }
    plan_clear(plan);
    if (pool->device != plan->device || pool->options.head_dim != plan->options.head_dim) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_plan_update: the pool is of another device or head_dim");
    }
    enum rk_status status = check_batch(plan, pool, batch, error);
    if (status != RK_OK) {
        return status;
    }
    make_tiles(plan, batch);
    make_items(plan);
    plan->version = batch->version;
    *ret_changed = true;
    return RK_OK;
}
