#include "worker/engine/engine_internal.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"
#include "common/base/tsan.h"

#include <stdatomic.h>

static void run_destroy(struct engine *engine, struct engine_run *run)
{
    if (run->own && run->pages) {
        for (size_t head = 0; head < engine_num_heads(engine); head++) {
            for (uint32_t page = 0; page < run->pages_taken; page++) {
                engine_page_pool_give(&engine->pool, run->pages[head * run->num_pages + page]);
            }
        }
    }
    rk_free(run->pages);
    rk_free(run->checksums);
    rk_free(run->verified);
    rk_free(run->replaced);
    rk_free(run->overlay_rows);
    memset(run, 0, sizeof(*run));
}

enum rk_status engine_sequence_create(struct engine *engine, struct engine_sequence **ret_sequence)
{
    struct engine_sequence *sequence = rk_alloc_zero(1, sizeof(*sequence));
    if (!sequence) {
        return RK_ERR_NO_MEMORY;
    }
    sequence->engine = engine;
    engine->num_sequences++;
    sequence->list_lengths =
        rk_alloc_zero(engine_num_heads(engine), sizeof(*sequence->list_lengths));
    if (!sequence->list_lengths) {
        engine_sequence_destroy(sequence);
        return RK_ERR_NO_MEMORY;
    }
    *ret_sequence = sequence;
    return RK_OK;
}

void engine_sequence_destroy(struct engine_sequence *sequence)
{
    if (!sequence) {
        return;
    }
    struct engine *engine = sequence->engine;
    struct engine_overlay *overlay = &sequence->overlay;
    for (uint32_t i = 0; i < sequence->num_runs; i++) {
        run_destroy(engine, &sequence->runs[i]);
    }
    for (size_t i = 0; i < overlay->pages_taken * engine_num_heads(engine); i++) {
        engine_page_pool_give(&engine->pool, overlay->pages[i]);
    }
    rk_free(overlay->pages);
    rk_free(overlay->positions);
    rk_free(sequence->runs);
    rk_free(sequence->lists);
    rk_free(sequence->list_lengths);
    engine->num_sequences--;
    rk_free(sequence);
}

/* Room for one more run. */
static enum rk_status reserve_run(struct engine_sequence *sequence)
{
    if (sequence->num_runs < sequence->runs_max) {
        return RK_OK;
    }
    uint32_t runs_max = sequence->runs_max ? 2 * sequence->runs_max : 4;
    struct engine_run *runs = rk_alloc_resize(sequence->runs, runs_max, sizeof(*runs));
    if (!runs) {
        return RK_ERR_NO_MEMORY;
    }
    sequence->runs = runs;
    sequence->runs_max = runs_max;
    return RK_OK;
}

/* Room in the lists for all pages. They are made anew before their next use, so that nothing is
 * copied; growing by halves keeps many short runs from costing quadratic time. */
static enum rk_status reserve_lists(struct engine_sequence *sequence, uint32_t pages)
{
    if (pages <= sequence->lists_max) {
        return RK_OK;
    }
    uint32_t lists_max = pages + sequence->lists_max / 2;
    struct kernels_page *lists =
        rk_alloc_zero(engine_num_heads(sequence->engine) * lists_max, sizeof(*lists));
    if (!lists) {
        return RK_ERR_NO_MEMORY;
    }
    rk_free(sequence->lists);
    sequence->lists = lists;
    sequence->lists_max = lists_max;
    sequence->lists_stale = true;
    return RK_OK;
}

static enum rk_status reserve_overlay(struct engine_sequence *sequence, uint32_t tokens)
{
    struct engine_overlay *overlay = &sequence->overlay;
    size_t num_heads = engine_num_heads(sequence->engine);
    uint32_t num_pages = rk_kv_pages(tokens);

    if (num_pages <= overlay->num_pages) {
        return RK_OK;
    }
    num_pages += overlay->num_pages / 2;
    void **pages = rk_alloc_resize(overlay->pages, num_pages, num_heads * sizeof(*pages));
    if (!pages) {
        return RK_ERR_NO_MEMORY;
    }
    overlay->pages = pages;
    int32_t *positions =
        rk_alloc_resize(overlay->positions, num_pages, RK_PAGE_TOKENS * sizeof(*positions));
    if (!positions) {
        return RK_ERR_NO_MEMORY;
    }
    overlay->positions = positions;
    overlay->num_pages = num_pages;
    sequence->lists_stale = true; /* They point at the positions. */
    return RK_OK;
}

/* Everything that a new run of the sequence needs but its own arrays. */
static enum rk_status reserve(struct engine_sequence *sequence, uint32_t num_tokens, bool borrowed)
{
    uint32_t borrowed_tokens = sequence->borrowed_tokens + (borrowed ? num_tokens : 0);
    uint32_t pages = rk_kv_pages(num_tokens) + rk_kv_pages(borrowed_tokens);

    if (num_tokens == 0) {
        return RK_ERR_INVALID;
    }
    if (num_tokens > sequence->engine->context_tokens - sequence->num_tokens) {
        return RK_ERR_TOO_LONG;
    }
    for (uint32_t i = 0; i < sequence->num_runs; i++) {
        pages += sequence->runs[i].num_pages;
    }
    enum rk_status status = reserve_run(sequence);
    if (status == RK_OK) {
        status = reserve_overlay(sequence, borrowed_tokens);
    }
    return status == RK_OK ? reserve_lists(sequence, pages) : status;
}

static uint32_t append_run(struct engine_sequence *sequence, const struct engine_run *run)
{
    sequence->runs[sequence->num_runs] = *run;
    sequence->num_tokens += run->num_tokens;
    sequence->lists_stale = true;
    return sequence->num_runs++;
}

enum rk_status engine_sequence_add_own(struct engine_sequence *sequence, uint32_t num_tokens_max,
                                       uint32_t *ret_run)
{
    struct engine_run run = {.own = true,
                             .base = sequence->num_tokens,
                             .num_tokens = num_tokens_max,
                             .num_pages = rk_kv_pages(num_tokens_max)};
    enum rk_status status = reserve(sequence, num_tokens_max, false);
    if (status != RK_OK) {
        return status;
    }
    run.pages =
        rk_alloc_zero(engine_num_heads(sequence->engine) * run.num_pages, sizeof(*run.pages));
    if (!run.pages) {
        return RK_ERR_NO_MEMORY;
    }
    *ret_run = append_run(sequence, &run);
    return RK_OK;
}

enum rk_status engine_sequence_add_borrowed(struct engine_sequence *sequence, uint32_t num_tokens,
                                            const void *const *pages, const uint64_t *checksums,
                                            bool verify, uint32_t *ret_run)
{
    const struct engine *engine = sequence->engine;
    struct engine_run run = {.verify = verify,
                             .base = sequence->num_tokens,
                             .num_tokens = num_tokens,
                             .num_pages = rk_kv_pages(num_tokens)};
    size_t total = engine_num_heads(engine) * run.num_pages;
    enum rk_status status = reserve(sequence, num_tokens, true);
    if (status != RK_OK) {
        return status;
    }
    status = RK_ERR_NO_MEMORY;
    run.pages = rk_alloc(total * sizeof(*run.pages));
    run.replaced = rk_alloc_zero(run.num_pages, sizeof(*run.replaced));
    run.overlay_rows = rk_alloc(num_tokens * sizeof(*run.overlay_rows));
    if (!run.pages || !run.replaced || !run.overlay_rows) {
        goto fail;
    }
    memcpy(run.pages, pages, total * sizeof(*run.pages));
    memset(run.overlay_rows, -1, num_tokens * sizeof(*run.overlay_rows));
    if (verify) {
        run.checksums = rk_alloc(total * sizeof(*run.checksums));
        run.verified = rk_alloc_zero(engine->layout.num_layers, sizeof(*run.verified));
        if (!run.checksums || !run.verified) {
            goto fail;
        }
        memcpy(run.checksums, checksums, total * sizeof(*run.checksums));
    }
    sequence->borrowed_tokens += num_tokens;
    *ret_run = append_run(sequence, &run);
    return RK_OK;

fail:
    run_destroy(sequence->engine, &run);
    return status;
}

uint32_t engine_sequence_num_tokens(const struct engine_sequence *sequence)
{
    return sequence->num_tokens;
}

void engine_sequence_run_pages(const struct engine_sequence *sequence, uint32_t run,
                               const void **ret_pages)
{
    RK_ASSERT(run < sequence->num_runs);
    const struct engine_run *found = &sequence->runs[run];
    for (size_t i = 0; i < engine_num_heads(sequence->engine) * found->num_pages; i++) {
        ret_pages[i] = found->pages[i];
    }
}

double engine_sequence_flops(const struct engine_sequence *sequence)
{
    return sequence->flops;
}

uint32_t engine_sequence_bad_run(const struct engine_sequence *sequence)
{
    return sequence->bad_run;
}

struct rk_extent engine_sequence_bad_page(const struct engine_sequence *sequence)
{
    return sequence->bad_page;
}

/* ---- Rows of a call ---- */

static enum rk_status check_row(const struct engine_item *item, uint32_t i, struct rk_error *error)
{
    const struct engine *engine = item->sequence->engine;
    const struct engine_row *row = &item->rows[i];

    if (row->token_id < 0 || (uint32_t)row->token_id >= engine->config.vocab_size) {
        return rk_error_set(error, RK_ERR_INVALID, "token id %d is not in the vocabulary of %u",
                            row->token_id, engine->config.vocab_size);
    }
    if (row->position >= item->sequence->num_tokens) {
        return rk_error_set(error, RK_ERR_INVALID, "position %u is behind the sequence's %u",
                            row->position, item->sequence->num_tokens);
    }
    if (i > 0 && row->position <= item->rows[i - 1].position) {
        return rk_error_set(error, RK_ERR_INVALID, "position %u follows %u, must ascend",
                            row->position, item->rows[i - 1].position);
    }
    return RK_OK;
}

/* Rows [begin, end) of an item that lie in a run. */
static uint32_t rows_in_run(const struct engine_item *item, const struct engine_run *run,
                            uint32_t begin)
{
    uint32_t end = begin;
    while (end < item->num_rows && item->rows[end].position < run->base + run->num_tokens) {
        end++;
    }
    return end;
}

/* What an own run has filled after this call. Its rows must leave no gap: a row that nobody
 * computed would be seen as zeros. */
static enum rk_status plan_own(const struct engine_item *item, const struct engine_run *run,
                               uint32_t begin, uint32_t end, uint32_t *ret_filled,
                               struct rk_error *error)
{
    uint32_t filled = run->filled;

    for (uint32_t i = begin; i < end; i++) {
        uint32_t token = item->rows[i].position - run->base;
        if (token > filled) {
            return rk_error_set(error, RK_ERR_INVALID, "position %u comes before %u was computed",
                                item->rows[i].position, run->base + filled);
        }
        filled = token + 1 > filled ? token + 1 : filled;
    }
    *ret_filled = filled;
    return RK_OK;
}

enum rk_status engine_sequence_plan(const struct engine_item *item, uint64_t *ret_pages,
                                    struct rk_error *error)
{
    const struct engine_sequence *sequence = item->sequence;
    const struct engine_overlay *overlay = &sequence->overlay;
    uint32_t token_pages = 0;
    uint32_t overlay_rows = overlay->rows;
    uint32_t begin = 0;

    if (sequence->broken) {
        return rk_error_set(error, RK_MISS_CHECKSUM, "a borrowed page of run %u was bad",
                            sequence->bad_run);
    }
    for (uint32_t i = 0; i < item->num_rows; i++) {
        enum rk_status status = check_row(item, i, error);
        if (status != RK_OK) {
            return status;
        }
    }
    for (uint32_t r = 0; r < sequence->num_runs && begin < item->num_rows; r++) {
        const struct engine_run *run = &sequence->runs[r];
        uint32_t end = rows_in_run(item, run, begin);
        uint32_t filled = 0;
        if (run->own) {
            enum rk_status status = plan_own(item, run, begin, end, &filled, error);
            if (status != RK_OK) {
                return status;
            }
            if (filled < run->num_tokens && end < item->num_rows) {
                return rk_error_set(error, RK_ERR_INVALID,
                                    "position %u comes before %u was computed",
                                    item->rows[end].position, run->base + filled);
            }
            uint32_t pages = rk_kv_pages(filled);
            token_pages += pages > run->pages_taken ? pages - run->pages_taken : 0;
        } else {
            for (uint32_t i = begin; i < end; i++) {
                overlay_rows += run->overlay_rows[item->rows[i].position - run->base] < 0;
            }
        }
        begin = end;
    }
    uint32_t pages = rk_kv_pages(overlay_rows);
    token_pages += pages > overlay->pages_taken ? pages - overlay->pages_taken : 0;
    *ret_pages = token_pages * (uint64_t)engine_num_heads(sequence->engine);
    return RK_OK;
}

static void take_own_page(struct engine_sequence *sequence, struct engine_run *run)
{
    struct engine *engine = sequence->engine;
    for (size_t head = 0; head < engine_num_heads(engine); head++) {
        run->pages[head * run->num_pages + run->pages_taken] = engine_page_pool_take(&engine->pool);
    }
    run->pages_taken++;
    sequence->lists_stale = true;
}

static struct engine_place place_own(struct engine_sequence *sequence, struct engine_run *run,
                                     uint32_t token)
{
    uint32_t page = token / RK_PAGE_TOKENS;
    while (run->pages_taken <= page) {
        take_own_page(sequence, run);
    }
    return (struct engine_place){&run->pages[page], run->num_pages, token % RK_PAGE_TOKENS, token};
}

static void take_overlay_page(struct engine_sequence *sequence)
{
    struct engine *engine = sequence->engine;
    struct engine_overlay *overlay = &sequence->overlay;
    size_t num_heads = engine_num_heads(engine);

    RK_ASSERT(overlay->pages_taken < overlay->num_pages);
    for (size_t head = 0; head < num_heads; head++) {
        overlay->pages[overlay->pages_taken * num_heads + head] =
            engine_page_pool_take(&engine->pool);
    }
    memset(overlay->positions + (size_t)overlay->pages_taken * RK_PAGE_TOKENS, 0,
           RK_PAGE_TOKENS * sizeof(*overlay->positions));
    overlay->pages_taken++;
}

static struct engine_place place_overlay(struct engine_sequence *sequence, struct engine_run *run,
                                         uint32_t token)
{
    struct engine_overlay *overlay = &sequence->overlay;
    uint32_t position = run->base + token;

    if (run->overlay_rows[token] < 0) {
        if (overlay->rows == overlay->pages_taken * RK_PAGE_TOKENS) {
            take_overlay_page(sequence);
        }
        run->overlay_rows[token] = (int32_t)overlay->rows;
        run->replaced[token / RK_PAGE_TOKENS] |= UINT64_C(1) << token % RK_PAGE_TOKENS;
        overlay->positions[overlay->rows] = (int32_t)position;
        overlay->rows++;
        sequence->lists_stale = true;
    }
    uint32_t row = (uint32_t)run->overlay_rows[token];
    return (struct engine_place){
        &overlay->pages[row / RK_PAGE_TOKENS * engine_num_heads(sequence->engine)], 1,
        row % RK_PAGE_TOKENS, position};
}

void engine_sequence_place(const struct engine_item *item, struct engine_place *places)
{
    struct engine_sequence *sequence = item->sequence;
    struct engine_run *run = sequence->runs;

    for (uint32_t i = 0; i < item->num_rows; i++) {
        uint32_t position = item->rows[i].position;
        while (position >= run->base + run->num_tokens) {
            run++;
        }
        places[i] = run->own ? place_own(sequence, run, position - run->base)
                             : place_overlay(sequence, run, position - run->base);
    }
}

void engine_sequence_filled(const struct engine_item *item)
{
    struct engine_run *run = item->sequence->runs;

    for (uint32_t i = 0; i < item->num_rows; i++) {
        uint32_t position = item->rows[i].position;
        while (position >= run->base + run->num_tokens) {
            run++;
        }
        if (run->own && position - run->base >= run->filled) {
            run->filled = position - run->base + 1;
        }
    }
}

/* ---- Lists ---- */

/* Rows [0, num) of a page. */
static uint64_t first_rows(uint32_t num)
{
    return num >= RK_PAGE_TOKENS ? UINT64_MAX : (UINT64_C(1) << num) - 1;
}

static uint32_t list_run(const struct engine_run *run, size_t head, struct kernels_page *list)
{
    uint32_t pages = run->own ? run->pages_taken : run->num_pages;
    uint32_t count = 0;

    for (uint32_t page = 0; page < pages; page++) {
        const void *data = run->pages[head * run->num_pages + page];
        uint64_t live = first_rows(run->num_tokens - page * RK_PAGE_TOKENS);
        if (!run->own) {
            live &= ~run->replaced[page];
        }
        /* Whether a page is listed depends on the run alone; rows of own pages that are not
         * written yet lie behind every query. */
        if (data && live) {
            list[count++] = (struct kernels_page){
                .data = data,
                .base = (int32_t)run->base,
                .position = (int32_t)(run->base + page * RK_PAGE_TOKENS),
                .live = live,
            };
        }
    }
    return count;
}

void engine_sequence_refresh(struct engine_sequence *sequence)
{
    const struct engine_overlay *overlay = &sequence->overlay;
    size_t num_heads = engine_num_heads(sequence->engine);

    if (!sequence->lists_stale) {
        return;
    }
    for (size_t head = 0; head < num_heads; head++) {
        struct kernels_page *list = sequence->lists + head * sequence->lists_max;
        uint32_t count = 0;
        for (uint32_t r = 0; r < sequence->num_runs; r++) {
            count += list_run(&sequence->runs[r], head, list + count);
        }
        for (uint32_t page = 0; page < overlay->pages_taken; page++) {
            list[count++] = (struct kernels_page){
                .data = overlay->pages[page * num_heads + head],
                .positions = overlay->positions + (size_t)page * RK_PAGE_TOKENS,
                .live = first_rows(overlay->rows - page * RK_PAGE_TOKENS),
            };
        }
        RK_ASSERT(count <= sequence->lists_max);
        sequence->list_lengths[head] = count;
    }
    sequence->lists_stale = false;
}

/* ---- Checksums ---- */

/* The pages of one layer of a run, checked by several threads. */
struct page_check {
    void *const *pages;
    const uint64_t *checksums;
    size_t page_bytes;
    int64_t count;
    _Atomic int64_t bad; /* lowest number of a bad page, or count */
};

static void check_page(struct page_check *check, int64_t i)
{
    RK_TSAN_ACQUIRE(check);
    const void *data = check->pages[i];
    if (data && rk_hash_xxh3(data, check->page_bytes) != check->checksums[i]) {
        int64_t bad = atomic_load_explicit(&check->bad, memory_order_relaxed);
        /* Relaxed: only the number counts, and the join orders it before its reader. */
        while (i < bad && !atomic_compare_exchange_weak_explicit(
                              &check->bad, &bad, i, memory_order_relaxed, memory_order_relaxed)) {
        }
    }
    RK_TSAN_RELEASE(check);
}

__attribute__((no_sanitize("thread"))) static void check_pages(struct page_check *check,
                                                               uint32_t threads)
{
    int64_t count = check->count;
    RK_TSAN_RELEASE(check);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        check_page(check, i);
    }
    RK_TSAN_ACQUIRE(check);
}

/* First page of a layer that does not match its checksum, or the number of pages. */
static int64_t first_bad_page(const struct engine *engine, const struct engine_run *run,
                              uint32_t layer)
{
    size_t count = (size_t)engine->layout.num_kv_heads * run->num_pages;
    struct page_check check = {.pages = run->pages + layer * count,
                               .checksums = run->checksums + layer * count,
                               .page_bytes = rk_kv_page_bytes(&engine->layout),
                               .count = (int64_t)count,
                               .bad = (int64_t)count};

    check_pages(&check, kernels_threads(engine->kernels));
    return atomic_load_explicit(&check.bad, memory_order_relaxed);
}

enum rk_status engine_sequence_verify(struct engine_sequence *sequence, uint32_t layer,
                                      struct rk_error *error)
{
    const struct engine *engine = sequence->engine;

    for (uint32_t r = 0; r < sequence->num_runs; r++) {
        struct engine_run *run = &sequence->runs[r];
        if (!run->verify || run->verified[layer]) {
            continue;
        }
        int64_t bad = first_bad_page(engine, run, layer);
        if (bad < (int64_t)engine->layout.num_kv_heads * run->num_pages) {
            uint32_t page = (uint32_t)(bad % run->num_pages);
            sequence->bad_run = r;
            sequence->bad_page = (struct rk_extent){.layer = layer,
                                                    .kv_head = (uint32_t)(bad / run->num_pages),
                                                    .page_begin = page,
                                                    .page_end = page + 1};
            sequence->broken = true;
            return rk_error_set(error, RK_MISS_CHECKSUM,
                                "run %u, layer %u, head %u, page %u does not match its checksum", r,
                                layer, (uint32_t)(bad / run->num_pages),
                                (uint32_t)(bad % run->num_pages));
        }
        run->verified[layer] = true;
    }
    return RK_OK;
}
