#include "worker/recovery/recovery.h"

#include "common/base/alloc.h"

#include <string.h>

#define NO_QUERY UINT32_MAX

static const struct recovery_level levels[] = {
    {.name = "full"},
    {.name = "exact", .reuse_chain = true},
    {.name = "fast",
     .reuse_chain = true,
     .reuse_segments = true,
     .first_tokens = 4,
     .head_map = true},
};

const struct recovery_level *recovery_level_find(const char *name)
{
    if (!name || name[0] == '\0') {
        name = "exact";
    }
    for (size_t i = 0; i < sizeof(levels) / sizeof(levels[0]); i++) {
        if (strcmp(name, levels[i].name) == 0) {
            return &levels[i];
        }
    }
    return NULL;
}

const char *recovery_level_names(void)
{
    return "full, exact, fast";
}

const char *recovery_source_name(enum recovery_source source)
{
    static const char *const names[] = {
        [RECOVERY_CHAIN] = "chain",
        [RECOVERY_SEGMENT] = "segment",
        [RECOVERY_COMPUTE_ALONE] = "compute_alone",
        [RECOVERY_COMPUTE] = "compute",
    };
    return names[source];
}

static bool source_is_fetched(enum recovery_source source)
{
    return source == RECOVERY_CHAIN || source == RECOVERY_SEGMENT;
}

static enum rk_status check_request(const struct recovery_segment *segments, uint32_t num_segments,
                                    uint32_t prompt_tokens, uint32_t tokens_ahead,
                                    struct rk_error *error)
{
    uint64_t total = (uint64_t)prompt_tokens + tokens_ahead;

    if (num_segments > RECOVERY_SEGMENTS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%u segments, at most %d are possible",
                            num_segments, RECOVERY_SEGMENTS_MAX);
    }
    for (uint32_t i = 0; i < num_segments; i++) {
        if (segments[i].num_tokens == 0) {
            return rk_error_set(error, RK_ERR_INVALID, "segment %u has no tokens", i);
        }
        if (segments[i].num_tokens > RK_SEGMENT_TOKENS_MAX) {
            return rk_error_set(error, RK_ERR_TOO_LONG, "segment %u has %u tokens, at most %u", i,
                                segments[i].num_tokens, RK_SEGMENT_TOKENS_MAX);
        }
        total += segments[i].num_tokens;
    }
    if (total > RECOVERY_TOKENS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%llu tokens in all, at most %u are possible",
                            (unsigned long long)total, RECOVERY_TOKENS_MAX);
    }
    return RK_OK;
}

/* Sources, places and recomputed first tokens of all runs. */
static void choose_sources(const struct recovery_segment *segments, struct recovery_plan *plan)
{
    const struct recovery_level *level = plan->level;
    bool chain = level->reuse_chain;
    uint32_t position = 0;

    for (uint32_t i = 0; i < plan->num_segments; i++) {
        const struct recovery_segment *segment = &segments[i];
        struct recovery_run *run = &plan->runs[i];

        run->position = position;
        run->num_tokens = segment->num_tokens;
        position += segment->num_tokens;
        if (chain && segment->in_chain) {
            run->source = RECOVERY_CHAIN;
            continue;
        }
        if (chain && i == 0 && segment->alone) {
            run->source = RECOVERY_SEGMENT; /* Alone at position 0 is a chain of one: exact. */
            continue;
        }
        chain = false;
        if (!level->reuse_segments) {
            run->source = RECOVERY_COMPUTE;
            continue;
        }
        run->source = segment->alone ? RECOVERY_SEGMENT : RECOVERY_COMPUTE_ALONE;
        if (run->position > 0) {
            run->first_tokens =
                level->first_tokens < run->num_tokens ? level->first_tokens : run->num_tokens;
        }
    }
    plan->prompt_position = position;
}

/* Tokens of a run that run through the layers of this request, from its start. */
static uint32_t run_computed(const struct recovery_run *run)
{
    return run->source == RECOVERY_COMPUTE ? run->num_tokens : run->first_tokens;
}

static enum rk_status fill_positions(struct recovery_plan *plan)
{
    uint32_t count = plan->prompt_tokens;
    uint32_t alone = 0;

    for (uint32_t i = 0; i < plan->num_segments; i++) {
        const struct recovery_run *run = &plan->runs[i];
        count += run_computed(run);
        if (source_is_fetched(run->source)) {
            plan->tokens_reused += run->num_tokens - run->first_tokens;
        } else if (run->source == RECOVERY_COMPUTE_ALONE) {
            alone += run->num_tokens;
        }
    }
    plan->positions = rk_alloc_zero(count, sizeof(*plan->positions));
    if (!plan->positions) {
        return RK_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < plan->num_segments; i++) {
        const struct recovery_run *run = &plan->runs[i];
        for (uint32_t token = 0; token < run_computed(run); token++) {
            plan->positions[plan->num_positions++] = run->position + token;
        }
    }
    for (uint32_t token = 0; token < plan->prompt_tokens; token++) {
        plan->positions[plan->num_positions++] = plan->prompt_position + token;
    }
    plan->tokens_computed = plan->num_positions + alone;
    return RK_OK;
}

/* Who may see a page: all that a head's window and sink have to be compared with. */
struct page_need {
    bool live;           /* some row of it is not computed again */
    uint32_t first_seen; /* absolute position of its first live row with a later query */
    uint32_t gap;        /* least distance from a live row to a later query */
};

/* Smallest query position at or behind a run's rows that are not computed again; those rows lie
 * between two computed blocks, so that it is the same for all of them. */
static uint32_t next_query(const struct recovery_plan *plan, uint32_t run_index,
                           uint32_t tokens_ahead)
{
    for (uint32_t i = run_index + 1; i < plan->num_segments; i++) {
        if (run_computed(&plan->runs[i]) > 0) {
            return plan->runs[i].position;
        }
    }
    return plan->prompt_tokens + tokens_ahead > 0 ? plan->prompt_position : NO_QUERY;
}

static void find_needs(const struct recovery_run *run, uint32_t query, struct page_need *needs)
{
    uint32_t num_pages = rk_kv_pages(run->num_tokens);

    for (uint32_t page = 0; page < num_pages; page++) {
        uint32_t begin = page * RK_PAGE_TOKENS;
        uint32_t end = page + 1 == num_pages ? run->num_tokens : begin + RK_PAGE_TOKENS;
        uint32_t live = begin < run->first_tokens ? run->first_tokens : begin;
        needs[page] = (struct page_need){live < end, NO_QUERY, NO_QUERY};
        if (live < end && query != NO_QUERY) {
            needs[page].first_seen = run->position + live;
            needs[page].gap = query - (run->position + end - 1);
        }
    }
}

static bool page_needed(const struct page_need *need, struct recovery_head head)
{
    if (!need->live) {
        return false;
    }
    return head.window == 0 || need->gap < head.window || need->first_seen < head.sink;
}

/* Contiguous page ranges of one (layer, KV head); NULL extents: only counts them. */
static size_t head_extents(const struct page_need *needs, uint32_t num_pages,
                           struct recovery_head head, struct rk_extent at,
                           struct rk_extent *extents, uint64_t *num_needed)
{
    size_t count = 0;

    for (uint32_t page = 0; page < num_pages; page++) {
        if (!page_needed(&needs[page], head)) {
            continue;
        }
        at.page_begin = page;
        while (page < num_pages && page_needed(&needs[page], head)) {
            page++;
        }
        at.page_end = page;
        *num_needed += at.page_end - at.page_begin;
        if (extents) {
            extents[count] = at;
        }
        count++;
    }
    return count;
}

static size_t run_extents(const struct recovery_plan *plan, const struct rk_kv_layout *layout,
                          const struct page_need *needs, uint32_t num_pages,
                          struct rk_extent *extents, uint64_t *ret_num_pages)
{
    size_t count = 0;

    *ret_num_pages = 0;
    for (uint32_t layer = 0; layer < layout->num_layers; layer++) {
        for (uint32_t kv_head = 0; kv_head < layout->num_kv_heads; kv_head++) {
            struct recovery_head head = {0, 0};
            struct rk_extent at = {.layer = layer, .kv_head = kv_head};
            if (plan->head_map) {
                head = recovery_head_map_get(plan->head_map, layer, kv_head);
            }
            count += head_extents(needs, num_pages, head, at, extents ? extents + count : NULL,
                                  ret_num_pages);
        }
    }
    return count;
}

static enum rk_status fill_extents(struct recovery_plan *plan, const struct rk_kv_layout *layout,
                                   uint32_t tokens_ahead)
{
    uint32_t pages_max = 0;
    struct page_need *needs = NULL;

    for (uint32_t i = 0; i < plan->num_segments; i++) {
        uint32_t num_pages = rk_kv_pages(plan->runs[i].num_tokens);
        pages_max = num_pages > pages_max ? num_pages : pages_max;
    }
    if (pages_max == 0) {
        return RK_OK; /* A prompt alone. */
    }
    needs = rk_alloc_zero(pages_max, sizeof(*needs));
    if (!needs) {
        return RK_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < plan->num_segments; i++) {
        struct recovery_run *run = &plan->runs[i];
        uint32_t num_pages = rk_kv_pages(run->num_tokens);
        if (!source_is_fetched(run->source)) {
            continue;
        }
        find_needs(run, next_query(plan, i, tokens_ahead), needs);
        run->num_extents = run_extents(plan, layout, needs, num_pages, NULL, &run->num_pages);
        run->extents = rk_alloc_zero(run->num_extents, sizeof(*run->extents));
        if (!run->extents) {
            rk_free(needs);
            return RK_ERR_NO_MEMORY;
        }
        (void)run_extents(plan, layout, needs, num_pages, run->extents, &run->num_pages);
    }
    rk_free(needs);
    return RK_OK;
}

enum rk_status recovery_plan_make(const struct recovery_level *level,
                                  const struct recovery_head_map *head_map,
                                  const struct rk_kv_layout *layout,
                                  const struct recovery_segment *segments, uint32_t num_segments,
                                  uint32_t prompt_tokens, uint32_t tokens_ahead,
                                  struct recovery_plan *ret_plan, struct rk_error *error)
{
    struct recovery_plan plan = {.level = level,
                                 .head_map = level->head_map ? head_map : NULL,
                                 .num_segments = num_segments,
                                 .prompt_tokens = prompt_tokens};
    enum rk_status status =
        check_request(segments, num_segments, prompt_tokens, tokens_ahead, error);
    if (status != RK_OK) {
        return status;
    }
    status = RK_ERR_NO_MEMORY;
    plan.runs = rk_alloc_zero(num_segments, sizeof(*plan.runs));
    if (!plan.runs) {
        goto fail;
    }
    choose_sources(segments, &plan);
    status = fill_positions(&plan);
    if (status != RK_OK) {
        goto fail;
    }
    status = fill_extents(&plan, layout, tokens_ahead);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_plan = plan;
    return RK_OK;

fail:
    recovery_plan_free(&plan);
    return rk_error_set(error, status, "no memory for a plan of %u segments", num_segments);
}

void recovery_plan_free(struct recovery_plan *plan)
{
    for (uint32_t i = 0; plan->runs && i < plan->num_segments; i++) {
        rk_free(plan->runs[i].extents);
    }
    rk_free(plan->runs);
    rk_free(plan->positions);
    memset(plan, 0, sizeof(*plan));
}
