/* What one job computes: segments alone first, then the rows of its plan in chunks. */
#include "worker/scheduler/scheduler_internal.h"

#include "common/base/alloc.h"

#include <string.h>

bool job_is_put(const struct scheduler_job *job)
{
    return job->request.plan == NULL;
}

static bool computed_alone(const struct scheduler_job *job, uint32_t segment)
{
    return job_is_put(job) || job->request.plan->runs[segment].source == RECOVERY_COMPUTE_ALONE;
}

/* The token at an absolute position: of a segment, or of the prompt. */
static int32_t token_at(const struct scheduler_request *request, uint32_t position)
{
    const struct recovery_plan *plan = request->plan;
    if (position >= plan->prompt_position) {
        return request->prompt[position - plan->prompt_position];
    }
    uint32_t low = 0;
    uint32_t high = plan->num_segments;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (plan->runs[middle].position <= position) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return request->segment_tokens[low][position - plan->runs[low].position];
}

/* Rows of the main sequence: the plan's positions, then the forced tokens but the last. */
static enum rk_status make_rows(struct scheduler_job *job)
{
    const struct scheduler_request *request = &job->request;
    const struct recovery_plan *plan = request->plan;
    uint32_t forced_rows = request->num_forced > 0 ? request->num_forced - 1 : 0;
    job->num_rows = plan->num_positions + forced_rows;
    job->rows = rk_alloc_zero(job->num_rows, sizeof(*job->rows));
    if (!job->rows) {
        return RK_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < plan->num_positions; i++) {
        job->rows[i].position = plan->positions[i];
        job->rows[i].token_id = token_at(request, plan->positions[i]);
    }
    job->rows[plan->num_positions - 1].want_logits = true;
    uint32_t behind = plan->prompt_position + plan->prompt_tokens;
    for (uint32_t i = 0; i < forced_rows; i++) {
        struct engine_row *row = &job->rows[plan->num_positions + i];
        row->token_id = request->forced[i];
        row->position = behind + i;
        row->want_logits = true;
    }
    job->last_token = -1;
    job->next_position = behind;
    return RK_OK;
}

/* Own tokens: what is computed in place or alone, overlays, the prompt and what follows it. Each
 * run begins a page of its own, hence a page more for each. */
static uint64_t pages_wanted(const struct scheduler_job *job)
{
    const struct scheduler_request *request = &job->request;
    const struct engine *engine = job->scheduler->engine;
    if (job_is_put(job)) {
        return engine_pages_needed(engine, request->segment_num_tokens[0]);
    }
    uint64_t pages = 0;
    uint32_t overlay = 0;
    for (uint32_t i = 0; i < request->plan->num_segments; i++) {
        const struct recovery_run *run = &request->plan->runs[i];
        if (run->source == RECOVERY_COMPUTE || run->source == RECOVERY_COMPUTE_ALONE) {
            pages += engine_pages_needed(engine, run->num_tokens);
        }
        if (run->source != RECOVERY_COMPUTE) {
            overlay += run->first_tokens;
        }
    }
    uint32_t ahead = request->num_forced + request->tokens_max;
    pages += engine_pages_needed(engine, overlay);
    return pages + engine_pages_needed(engine, request->num_prompt + ahead);
}

static enum rk_status reserve_memory(struct scheduler_job *job)
{
    const struct scheduler_request *request = &job->request;
    uint32_t segments = request->num_segments;
    job->alone = rk_alloc_zero(segments + 1, sizeof(*job->alone));
    job->run_of_segment = rk_alloc_zero(segments + 1, sizeof(*job->run_of_segment));
    job->tokens = rk_alloc_zero(request->tokens_max + 1, sizeof(*job->tokens));
    if (!job->alone || !job->run_of_segment || !job->tokens) {
        return RK_ERR_NO_MEMORY;
    }
    if (request->num_forced > 0) {
        job->ring = rk_alloc((size_t)JOB_ROWS_RING * job->scheduler->vocab_size * sizeof(float));
        if (!job->ring) {
            return RK_ERR_NO_MEMORY;
        }
    }
    return job_is_put(job) ? RK_OK : make_rows(job);
}

enum rk_status job_create(struct scheduler *scheduler, const struct scheduler_request *request,
                          struct scheduler_job **ret_job, struct rk_error *error)
{
    struct scheduler_job *job = rk_alloc_zero(1, sizeof(*job));
    if (!job) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a request");
    }
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&job->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    RK_ASSERT(request->num_replay == 0 || request->num_replay < request->tokens_max);
    job->scheduler = scheduler;
    job->request = *request;
    job->tokens_taken = request->num_replay;

    enum rk_status status = reserve_memory(job);
    if (status != RK_OK) {
        rk_error_set(error, status, "no memory for a request of %u tokens", job->num_rows);
        goto fail;
    }
    job->rows_total = job->num_rows;
    for (uint32_t i = 0; i < request->num_segments; i++) {
        job->rows_total += computed_alone(job, i) ? request->segment_num_tokens[i] : 0;
    }
    job->pages_reserved = pages_wanted(job);
    if (job->pages_reserved > engine_pool_pages(scheduler->engine)) {
        status = rk_error_set(error, RK_ERR_TOO_LONG,
                              "the request needs %llu pages of KV, the worker's pool has %llu; "
                              "shorten it or raise --pool-tokens",
                              (unsigned long long)job->pages_reserved,
                              (unsigned long long)engine_pool_pages(scheduler->engine));
        goto fail;
    }
    *ret_job = job;
    return RK_OK;

fail:
    job_destroy(job);
    return status;
}

void job_destroy(struct scheduler_job *job)
{
    if (!job) {
        return;
    }
    engine_sequence_destroy(job->main); /* Before those it borrows from. */
    for (uint32_t i = 0; job->alone && i < job->request.num_segments; i++) {
        engine_sequence_destroy(job->alone[i]);
    }
    rk_free(job->alone);
    rk_free(job->run_of_segment);
    rk_free(job->rows);
    rk_free(job->tokens);
    rk_free(job->ring);
    pthread_cond_destroy(&job->changed);
    rk_free(job);
}

/* Fetched pages come in the order of the extents; the engine wants [layer][kv_head][page]. */
static void spread_extents(const struct recovery_run *run, const struct rk_kv_pages *fetched,
                           const struct rk_kv_layout *layout, const void **pages,
                           uint64_t *checksums)
{
    uint32_t per_head = rk_kv_pages(run->num_tokens);
    uint64_t from = 0;
    for (size_t e = 0; e < run->num_extents; e++) {
        const struct rk_extent *extent = &run->extents[e];
        uint64_t head = (uint64_t)extent->layer * layout->num_kv_heads + extent->kv_head;
        for (uint32_t p = extent->page_begin; p < extent->page_end; p++, from++) {
            pages[head * per_head + p] = fetched->pages[from].data;
            checksums[head * per_head + p] = fetched->pages[from].checksum;
        }
    }
    RK_ASSERT(from == fetched->num_pages);
}

static enum rk_status add_borrowed(struct scheduler_job *job, uint32_t segment)
{
    const struct recovery_run *run = &job->request.plan->runs[segment];
    struct rk_kv_layout layout;
    engine_layout(job->scheduler->engine, &layout);
    uint64_t total = rk_kv_pages_total(&layout, run->num_tokens);
    const void **pages = rk_alloc_zero(total, sizeof(*pages));
    uint64_t *checksums = rk_alloc_zero(total, sizeof(*checksums));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (!pages || !checksums) {
        goto done;
    }
    bool alone = run->source == RECOVERY_COMPUTE_ALONE;
    if (alone) {
        engine_sequence_run_pages(job->alone[segment], 0, pages);
    } else {
        spread_extents(run, &job->request.fetched[segment], &layout, pages, checksums);
    }
    status = engine_sequence_add_borrowed(job->main, run->num_tokens, pages, checksums, !alone,
                                          &job->run_of_segment[segment]);
done:
    rk_free(pages);
    rk_free(checksums);
    return status;
}

static enum rk_status make_main(struct scheduler_job *job)
{
    const struct scheduler_request *request = &job->request;
    const struct recovery_plan *plan = request->plan;
    enum rk_status status = engine_sequence_create(job->scheduler->engine, &job->main);
    for (uint32_t i = 0; status == RK_OK && i < plan->num_segments; i++) {
        if (plan->runs[i].source == RECOVERY_COMPUTE) {
            status = engine_sequence_add_own(job->main, plan->runs[i].num_tokens,
                                             &job->run_of_segment[i]);
        } else {
            status = add_borrowed(job, i);
        }
    }
    if (status == RK_OK) {
        uint32_t ahead = request->num_forced + request->tokens_max;
        status = engine_sequence_add_own(job->main, request->num_prompt + ahead,
                                         &job->run_of_segment[plan->num_segments]);
    }
    return status;
}

/* A chunk of the next segment that is computed alone; *ret_rows 0: none is left. */
static enum rk_status alone_chunk(struct scheduler_job *job, uint32_t rows_max, uint32_t *ret_rows,
                                  struct rk_error *error)
{
    const struct scheduler_request *request = &job->request;
    uint32_t segment = job->alone_segment;
    while (segment < request->num_segments &&
           (!computed_alone(job, segment) ||
            (job->alone[segment] && job->alone_row == request->segment_num_tokens[segment]))) {
        segment++;
        job->alone_row = 0;
    }
    job->alone_segment = segment;
    *ret_rows = 0;
    if (segment == request->num_segments) {
        return RK_OK;
    }
    uint32_t num_tokens = request->segment_num_tokens[segment];
    if (!job->alone[segment]) {
        uint32_t run = 0;
        enum rk_status status =
            engine_sequence_create(job->scheduler->engine, &job->alone[segment]);
        if (status == RK_OK) {
            status = engine_sequence_add_own(job->alone[segment], num_tokens, &run);
        }
        if (status != RK_OK) {
            return rk_error_set(error, status, "segment of %u tokens: %s", num_tokens,
                                rk_status_text(status));
        }
    }
    struct engine_row rows[KERNELS_ROWS_MAX];
    uint32_t count =
        num_tokens - job->alone_row < rows_max ? num_tokens - job->alone_row : rows_max;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t position = job->alone_row + i;
        rows[i] = (struct engine_row){
            .token_id = request->segment_tokens[segment][position],
            .position = position,
        };
    }
    struct engine_item item = {.sequence = job->alone[segment], .rows = rows, .num_rows = count};
    enum rk_status status =
        engine_forward(job->scheduler->engine, &item, 1, false, job->scheduler->logits, error);
    if (status == RK_OK) {
        job->alone_row += count;
        *ret_rows = count;
    }
    return status;
}

static uint32_t segment_of_run(const struct scheduler_job *job, uint32_t run)
{
    for (uint32_t i = 0; i < job->request.num_segments; i++) {
        if (job->run_of_segment[i] == run) {
            return i;
        }
    }
    RK_ASSERT(!"only segments' pages are borrowed");
    return 0;
}

enum rk_status job_prefill_chunk(struct scheduler_job *job, uint32_t rows_max, uint32_t logits_max,
                                 uint32_t *ret_rows, uint32_t *ret_logits_rows,
                                 struct rk_error *error)
{
    uint32_t rows = 0;
    uint32_t wanted = 0;
    enum rk_status status = alone_chunk(job, rows_max, &rows, error);
    if (status == RK_OK && rows == 0 && !job_is_put(job)) {
        if (!job->main) {
            status = make_main(job);
            if (status != RK_OK) {
                return rk_error_set(error, status, "context of %u tokens: %s", job->next_position,
                                    rk_status_text(status));
            }
        }
        while (job->next_row + rows < job->num_rows && rows < rows_max) {
            bool want = job->rows[job->next_row + rows].want_logits;
            if (want && wanted == logits_max) {
                break;
            }
            wanted += want;
            rows++;
        }
        struct engine_item item = {.sequence = job->main,
                                   .rows = job->rows + job->next_row,
                                   .num_rows = rows,
                                   .head_map = job->request.plan->head_map};
        status =
            engine_forward(job->scheduler->engine, &item, 1, false, job->scheduler->logits, error);
        if (status == RK_MISS_CHECKSUM) {
            job->bad_segment = segment_of_run(job, engine_sequence_bad_run(job->main));
            job->bad_page = engine_sequence_bad_page(job->main);
        }
        job->next_row += status == RK_OK ? rows : 0;
    }
    if (status == RK_OK) {
        *ret_rows = rows;
        *ret_logits_rows = wanted;
    }
    return status;
}

bool job_prefill_done(const struct scheduler_job *job)
{
    const struct scheduler_request *request = &job->request;
    if (job_is_put(job)) {
        return job->alone[0] && job->alone_row == request->segment_num_tokens[0];
    }
    return job->main && job->next_row == job->num_rows;
}

double job_flops(const struct scheduler_job *job)
{
    double flops = job->main ? engine_sequence_flops(job->main) : 0;
    for (uint32_t i = 0; i < job->request.num_segments; i++) {
        flops += job->alone[i] ? engine_sequence_flops(job->alone[i]) : 0;
    }
    return flops;
}

void scheduler_job_pages(const struct scheduler_job *job, uint32_t segment, const void **ret_pages)
{
    if (job->alone[segment]) {
        engine_sequence_run_pages(job->alone[segment], 0, ret_pages);
    } else {
        engine_sequence_run_pages(job->main, job->run_of_segment[segment], ret_pages);
    }
}
