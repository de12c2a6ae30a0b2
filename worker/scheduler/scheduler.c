/* The engine's thread: admission, turns, batched decode, and handing results over. */
#include "worker/scheduler/scheduler_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "worker/tokenizer/tokenizer.h"

#include <string.h>

static void cond_init_monotonic(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
}

static struct timespec timespec_of(int64_t deadline_ns)
{
    return (struct timespec){.tv_sec = deadline_ns / 1000000000,
                             .tv_nsec = deadline_ns % 1000000000};
}

/* ---- Engine's thread ---- */

/* With the mutex held. */
static void finish(struct scheduler_job *job, enum rk_status status, const struct rk_error *error)
{
    job->state = JOB_DONE;
    job->status = status;
    job->result.bad_segment = job->bad_segment;
    job->result.bad_page = job->bad_page;
    if (status != RK_OK && error) {
        memcpy(job->result.text, error->text, sizeof(job->result.text));
    }
    job->stalled = false;
    pthread_cond_broadcast(&job->changed);
}

/* With the mutex held. */
static void count(const struct scheduler *scheduler, struct scheduler_load *ret_load)
{
    *ret_load = (struct scheduler_load){.queued = scheduler->num_queued};
    for (const struct scheduler_job *job = scheduler->active; job; job = job->next) {
        if (job->state != JOB_DONE) { /* What is done keeps pages only, for its publishing. */
            ret_load->stalled += job->stalled;
            ret_load->active += !job->stalled;
        }
    }
}

/* With the mutex held. */
static void set_gauges(struct scheduler *scheduler)
{
    struct scheduler_load load;
    count(scheduler, &load);
    rk_metric_set(scheduler->gauges.active, load.active);
    rk_metric_set(scheduler->gauges.stalled, load.stalled);
    rk_metric_set(scheduler->gauges.pool_pages_used,
                  (double)engine_pool_pages_used(scheduler->engine));
}

static void make_gauges(struct scheduler *scheduler)
{
    struct scheduler_gauges *gauges = &scheduler->gauges;
    gauges->active =
        rk_metric_gauge("redknot_worker_requests_active", "Requests on the engine.", NULL);
    gauges->queued = rk_metric_gauge("redknot_worker_requests_queued", "Requests that wait.", NULL);
    gauges->stalled = rk_metric_gauge("redknot_worker_requests_stalled",
                                      "Requests whose readers take no rows.", NULL);
    gauges->pool_pages =
        rk_metric_gauge("redknot_worker_pool_pages", "Pages of the KV pool.", NULL);
    gauges->pool_pages_used =
        rk_metric_gauge("redknot_worker_pool_pages_used", "Pages of the KV pool in use.", NULL);
    rk_metric_set(gauges->pool_pages, (double)engine_pool_pages(scheduler->engine));
}

/* With the mutex held: end cancelled jobs, let go of released ones. */
static void reap(struct scheduler *scheduler)
{
    for (struct scheduler_job **link = &scheduler->active; *link;) {
        struct scheduler_job *job = *link;
        if (job->state != JOB_DONE && (job->cancelled || scheduler->stopping)) {
            finish(job, RK_ERR_CANCELLED, NULL);
        }
        if (job->state == JOB_DONE && job->released) {
            *link = job->next;
            scheduler->pages_reserved -= job->pages_reserved;
            *job->gone = true;
            job_destroy(job);
            pthread_cond_broadcast(&scheduler->gone);
        } else {
            link = &job->next;
        }
    }
}

/* With the mutex held: first come, first served, as far as places and pages reach. */
static void admit(struct scheduler *scheduler)
{
    while (scheduler->queue) {
        struct scheduler_job *job = scheduler->queue;
        struct scheduler_load load;
        count(scheduler, &load);
        bool fits =
            load.active < scheduler->options.jobs_active_max &&
            scheduler->pages_reserved + job->pages_reserved <= engine_pool_pages(scheduler->engine);
        if (!fits && !job->cancelled && !scheduler->stopping) {
            return;
        }
        scheduler->queue = job->next;
        if (!scheduler->queue) {
            scheduler->queue_tail = &scheduler->queue;
        }
        scheduler->num_queued--;
        rk_metric_add(scheduler->gauges.queued, -1);
        /* At the end, so that prefills take turns. A cancelled job only passes through. */
        struct scheduler_job **tail = &scheduler->active;
        while (*tail) {
            tail = &(*tail)->next;
        }
        *tail = job;
        job->next = NULL;
        scheduler->pages_reserved += job->pages_reserved;
        job->state = JOB_PREFILL;
        job->result.started_ns = rk_clock_ns();
        if (job->cancelled || scheduler->stopping) {
            finish(job, RK_ERR_CANCELLED, NULL);
        }
    }
}

/* With the mutex held. */
static void take_token(struct scheduler_job *job, int32_t token)
{
    const struct scheduler *scheduler = job->scheduler;
    if (job->num_tokens < job->request.num_replay) {
        token = job->request.replay[job->num_tokens];
    } else if (job->num_tokens == job->request.num_replay) {
        job->result.first_token_ns = rk_clock_ns();
    }
    job->last_token = token;
    job->tokens[job->num_tokens++] = token;
    job->result.num_tokens = job->num_tokens;
    bool end = !job->request.ignore_end && tokenizer_is_end(scheduler->options.tokenizer, token);
    if (end || job->num_tokens >= job->request.tokens_max) {
        job->result.ended = end;
        finish(job, RK_OK, NULL);
    }
    pthread_cond_broadcast(&job->changed);
}

/* Rows of logits of a scored continuation, as log-probabilities into the job's ring. */
static void give_rows(struct scheduler_job *job, uint32_t count)
{
    struct scheduler *scheduler = job->scheduler;
    size_t vocab = scheduler->vocab_size;
    for (uint32_t i = 0; i < count; i++) {
        float *slot = job->ring + (size_t)((job->ring_written + i) % JOB_ROWS_RING) * vocab;
        engine_log_softmax(scheduler->logits + i * vocab, scheduler->vocab_size, slot);
    }
    pthread_mutex_lock(&scheduler->mutex);
    if (job->ring_written == 0 && count > 0) {
        job->result.first_token_ns = rk_clock_ns();
        job->result.flops = job_flops(job);
    }
    job->ring_written += count;
    job->stalled = job->ring_written - job->ring_read == JOB_ROWS_RING;
    pthread_cond_broadcast(&job->changed);
    pthread_mutex_unlock(&scheduler->mutex);
}

static void prefill_ended(struct scheduler_job *job, uint32_t logits_rows)
{
    struct scheduler *scheduler = job->scheduler;
    bool scored = job->request.num_forced > 0;
    int32_t token = -1;
    if (!scored && logits_rows > 0) {
        token = engine_sample(&job->request.sampler, scheduler->logits, scheduler->vocab_size,
                              scheduler->sample_scratch);
    }
    pthread_mutex_lock(&scheduler->mutex);
    if (!scored) {
        job->result.flops = job_flops(job);
    }
    if (token >= 0) {
        job->state = JOB_DECODE;
        take_token(job, token);
    } else {
        finish(job, RK_OK, NULL);
    }
    pthread_mutex_unlock(&scheduler->mutex);
}

/* What a pass read may have been given to others meanwhile: then it is worth nothing, whatever it
 * came to, and a page that did not match its checksum was not bad. */
static enum rk_status check_pages(struct scheduler_job *job, struct rk_error *error)
{
    if (!job->request.pages_check || !job->main) {
        return RK_OK;
    }
    uint32_t segment = 0;
    enum rk_status status = job->request.pages_check(job->request.pages_context, &segment);
    if (status == RK_OK) {
        return RK_OK;
    }
    job->bad_segment = segment;
    return rk_error_set(error, status, "pages of segment %u were lost while they were in use: %s",
                        segment, rk_status_text(status));
}

/* A NaN spreads to all that follows: better no answer than an empty one that looks like one. */
static enum rk_status check_logits(const struct scheduler *scheduler, uint32_t first,
                                   uint32_t num_rows, struct rk_error *error)
{
    const float *logits = scheduler->logits + (size_t)first * scheduler->vocab_size;
    return engine_logits_finite(logits, (size_t)num_rows * scheduler->vocab_size)
               ? RK_OK
               : rk_error_set(error, RK_ERR_INTERNAL,
                              "the model gives no finite number for the next token; a worker with "
                              "--mode f32 may");
}

/* One chunk of one job that is not stalled. */
static void prefill_turn(struct scheduler_job *job, bool others_decode)
{
    struct scheduler *scheduler = job->scheduler;
    pthread_mutex_lock(&scheduler->mutex);
    uint32_t room = JOB_ROWS_RING - (job->ring_written - job->ring_read);
    pthread_mutex_unlock(&scheduler->mutex);
    uint32_t logits_max = room < CHUNK_LOGITS_MAX ? room : CHUNK_LOGITS_MAX;
    /* A smaller chunk when others wait for their next token. */
    uint32_t rows_max = others_decode ? KERNELS_ROWS_MAX / 2 : KERNELS_ROWS_MAX;
    uint32_t rows = 0;
    uint32_t logits_rows = 0;
    struct rk_error error = {.text = ""};
    enum rk_status status =
        job_prefill_chunk(job, rows_max, logits_max, &rows, &logits_rows, &error);
    enum rk_status lost = check_pages(job, &error);
    status = lost != RK_OK ? lost : status;
    if (status == RK_OK) {
        status = check_logits(scheduler, 0, logits_rows, &error);
    }
    if (status != RK_OK) {
        pthread_mutex_lock(&scheduler->mutex);
        finish(job, status, &error);
        pthread_mutex_unlock(&scheduler->mutex);
        return;
    }
    if (job->request.num_forced > 0) {
        give_rows(job, logits_rows);
    }
    pthread_mutex_lock(&scheduler->mutex);
    job->rows_done += rows;
    pthread_cond_broadcast(&job->changed);
    pthread_mutex_unlock(&scheduler->mutex);
    if (job_prefill_done(job)) {
        prefill_ended(job, logits_rows);
    }
}

/* One token for each decoding job, in one call. */
static void decode_turn(struct scheduler *scheduler, struct scheduler_job **jobs, uint32_t count)
{
    struct engine_item items[CHUNK_LOGITS_MAX] = {{.sequence = NULL}};
    struct engine_row rows[CHUNK_LOGITS_MAX];
    struct rk_error error = {.text = ""};
    for (uint32_t i = 0; i < count; i++) {
        struct scheduler_job *job = jobs[i];
        rows[i] = (struct engine_row){
            .token_id = job->last_token, .position = job->next_position++, .want_logits = true};
        items[i] = (struct engine_item){.sequence = job->main,
                                        .rows = &rows[i],
                                        .num_rows = 1,
                                        .head_map = job->request.plan->head_map};
    }
    enum rk_status status =
        engine_forward(scheduler->engine, items, count, true, scheduler->logits, &error);
    int32_t tokens[CHUNK_LOGITS_MAX];
    enum rk_status lost[CHUNK_LOGITS_MAX];
    struct rk_error why[CHUNK_LOGITS_MAX];
    for (uint32_t i = 0; i < count; i++) {
        lost[i] = check_pages(jobs[i], &why[i]);
        if (status == RK_OK && lost[i] == RK_OK) {
            lost[i] = check_logits(scheduler, i, 1, &why[i]);
        }
    }
    for (uint32_t i = 0; status == RK_OK && i < count; i++) {
        tokens[i] = engine_sample(&jobs[i]->request.sampler,
                                  scheduler->logits + (size_t)i * scheduler->vocab_size,
                                  scheduler->vocab_size, scheduler->sample_scratch);
    }
    pthread_mutex_lock(&scheduler->mutex);
    for (uint32_t i = 0; i < count; i++) {
        if (lost[i] != RK_OK) {
            finish(jobs[i], lost[i], &why[i]);
        } else if (status == RK_OK) {
            take_token(jobs[i], tokens[i]);
        } else {
            finish(jobs[i], status, &error);
        }
    }
    pthread_mutex_unlock(&scheduler->mutex);
}

/* With the mutex held: the first prefilling job whose reader keeps up, moved to the end of the list
 * for fairness. */
static struct scheduler_job *next_prefill(struct scheduler *scheduler)
{
    for (struct scheduler_job **link = &scheduler->active; *link; link = &(*link)->next) {
        struct scheduler_job *job = *link;
        if (job->state == JOB_PREFILL && !job->stalled) {
            struct scheduler_job **tail = link;
            *link = job->next;
            while (*tail) {
                tail = &(*tail)->next;
            }
            *tail = job;
            job->next = NULL;
            return job;
        }
    }
    return NULL;
}

static void *engine_thread(void *context)
{
    struct scheduler *scheduler = context;
    struct scheduler_job *decoding[CHUNK_LOGITS_MAX];
    pthread_mutex_lock(&scheduler->mutex);
    for (;;) {
        reap(scheduler);
        admit(scheduler);
        if (scheduler->stopping && !scheduler->active && !scheduler->queue) {
            break;
        }
        struct scheduler_job *prefill = next_prefill(scheduler);
        uint32_t num_decoding = 0;
        for (struct scheduler_job *job = scheduler->active; job; job = job->next) {
            if (job->state == JOB_DECODE) {
                decoding[num_decoding++] = job;
            }
        }
        set_gauges(scheduler);
        if (!prefill && num_decoding == 0) { /* Whatever changes that signals. */
            pthread_cond_wait(&scheduler->work, &scheduler->mutex);
            continue;
        }
        pthread_mutex_unlock(&scheduler->mutex);
        if (prefill) {
            prefill_turn(prefill, num_decoding > 0);
        }
        if (num_decoding > 0) {
            decode_turn(scheduler, decoding, num_decoding);
        }
        pthread_mutex_lock(&scheduler->mutex);
    }
    set_gauges(scheduler);
    pthread_mutex_unlock(&scheduler->mutex);
    return NULL;
}

/* ---- Any thread ---- */

enum rk_status scheduler_start(const struct scheduler_options *options,
                               struct scheduler **ret_scheduler, struct rk_error *error)
{
    struct scheduler *scheduler = rk_alloc_zero(1, sizeof(*scheduler));
    if (!scheduler) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the scheduler");
    }
    scheduler->options = *options;
    if (scheduler->options.jobs_active_max == 0) {
        scheduler->options.jobs_active_max = 8;
    }
    if (scheduler->options.jobs_active_max > CHUNK_LOGITS_MAX) {
        scheduler->options.jobs_active_max = CHUNK_LOGITS_MAX;
    }
    if (scheduler->options.jobs_queued_max == 0) {
        scheduler->options.jobs_queued_max = 64;
    }
    scheduler->engine = options->engine;
    scheduler->vocab_size = engine_vocab_size(options->engine);
    scheduler->queue_tail = &scheduler->queue;
    make_gauges(scheduler);
    pthread_mutex_init(&scheduler->mutex, NULL);
    cond_init_monotonic(&scheduler->work);
    cond_init_monotonic(&scheduler->gone);
    scheduler->logits = rk_alloc((size_t)CHUNK_LOGITS_MAX * scheduler->vocab_size * sizeof(float));
    scheduler->sample_scratch = rk_alloc((size_t)scheduler->vocab_size * 8);
    if (!scheduler->logits || !scheduler->sample_scratch) {
        scheduler_stop(scheduler);
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the scheduler");
    }
    if (pthread_create(&scheduler->thread, NULL, engine_thread, scheduler) != 0) {
        scheduler_stop(scheduler);
        return rk_error_set(error, RK_ERR_NO_MEMORY, "cannot start the engine's thread");
    }
    scheduler->thread_started = true;
    *ret_scheduler = scheduler;
    return RK_OK;
}

void scheduler_stop(struct scheduler *scheduler)
{
    if (!scheduler) {
        return;
    }
    if (scheduler->thread_started) {
        pthread_mutex_lock(&scheduler->mutex);
        scheduler->stopping = true;
        pthread_cond_signal(&scheduler->work);
        pthread_mutex_unlock(&scheduler->mutex);
        pthread_join(scheduler->thread, NULL);
    }
    rk_free(scheduler->logits);
    rk_free(scheduler->sample_scratch);
    pthread_cond_destroy(&scheduler->work);
    pthread_cond_destroy(&scheduler->gone);
    pthread_mutex_destroy(&scheduler->mutex);
    rk_free(scheduler);
}

void scheduler_load(struct scheduler *scheduler, struct scheduler_load *ret_load)
{
    pthread_mutex_lock(&scheduler->mutex);
    count(scheduler, ret_load);
    pthread_mutex_unlock(&scheduler->mutex);
}

enum rk_status scheduler_job_submit(struct scheduler *scheduler,
                                    const struct scheduler_request *request,
                                    struct scheduler_job **ret_job, struct rk_error *error)
{
    struct scheduler_job *job = NULL;
    enum rk_status status = job_create(scheduler, request, &job, error);
    if (status != RK_OK) {
        return status;
    }
    pthread_mutex_lock(&scheduler->mutex);
    bool full = scheduler->num_queued >= scheduler->options.jobs_queued_max;
    bool stopping = scheduler->stopping;
    if (!full && !stopping) {
        *scheduler->queue_tail = job;
        scheduler->queue_tail = &job->next;
        scheduler->num_queued++;
        rk_metric_add(scheduler->gauges.queued, 1);
        pthread_cond_signal(&scheduler->work);
    }
    pthread_mutex_unlock(&scheduler->mutex);
    if (full || stopping) {
        job_destroy(job);
        return stopping ? rk_error_set(error, RK_ERR_UNAVAILABLE, "the worker is stopping")
                        : rk_error_set(error, RK_ERR_FULL,
                                       "the queue is full: %u requests wait already (--queue-max); "
                                       "ask another worker, or this one later",
                                       scheduler->options.jobs_queued_max);
    }
    *ret_job = job;
    return RK_OK;
}

/* With the mutex held: is there something to tell? */
static bool next_event(struct scheduler_job *job, struct scheduler_event *event)
{
    struct scheduler *scheduler = job->scheduler;
    *event = (struct scheduler_event){
        .status = RK_OK, .rows_done = job->rows_done, .rows_total = job->rows_total};
    if (job->ring_read < job->ring_written) {
        event->kind = SCHEDULER_ROW;
        event->row = job->ring_read;
        event->logprobs =
            job->ring + (size_t)(job->ring_read % JOB_ROWS_RING) * scheduler->vocab_size;
        return true;
    }
    if (job->tokens_taken < job->num_tokens) {
        event->kind = SCHEDULER_TOKENS;
        event->tokens = job->tokens + job->tokens_taken;
        event->num_tokens = job->num_tokens - job->tokens_taken;
        job->tokens_taken = job->num_tokens;
        return true;
    }
    if (job->state == JOB_DONE) {
        event->kind = SCHEDULER_DONE;
        event->status = job->status;
        return true;
    }
    if (job->rows_reported < job->rows_done) {
        job->rows_reported = job->rows_done;
        event->kind = SCHEDULER_PROGRESS;
        return true;
    }
    return false;
}

enum rk_status scheduler_job_wait(struct scheduler_job *job, int64_t deadline_ns,
                                  struct scheduler_event *ret_event)
{
    struct scheduler *scheduler = job->scheduler;
    enum rk_status status = RK_OK;
    struct timespec until = timespec_of(deadline_ns);
    pthread_mutex_lock(&scheduler->mutex);
    while (!next_event(job, ret_event)) {
        if (rk_clock_ns() >= deadline_ns) {
            status = RK_ERR_DEADLINE;
            break;
        }
        pthread_cond_timedwait(&job->changed, &scheduler->mutex, &until);
    }
    pthread_mutex_unlock(&scheduler->mutex);
    return status;
}

void scheduler_job_row_done(struct scheduler_job *job)
{
    pthread_mutex_lock(&job->scheduler->mutex);
    job->ring_read++;
    if (job->stalled && job->ring_written - job->ring_read <= JOB_ROWS_RING - CHUNK_LOGITS_MAX) {
        job->stalled = false; /* Not for a row at a time: a pass costs much the same. */
        pthread_cond_signal(&job->scheduler->work);
    }
    pthread_mutex_unlock(&job->scheduler->mutex);
}

void scheduler_job_cancel(struct scheduler_job *job)
{
    pthread_mutex_lock(&job->scheduler->mutex);
    job->cancelled = true;
    pthread_cond_signal(&job->scheduler->work);
    pthread_mutex_unlock(&job->scheduler->mutex);
}

void scheduler_job_release(struct scheduler_job *job)
{
    if (!job) {
        return;
    }
    struct scheduler *scheduler = job->scheduler;
    pthread_mutex_lock(&scheduler->mutex);
    job->cancelled = true;
    job->released = true;
    pthread_cond_signal(&scheduler->work);
    /* The job's memory is the engine's to free; all that it borrowed must stay until then. */
    bool gone = false;
    job->gone = &gone;
    while (!gone) {
        pthread_cond_wait(&scheduler->gone, &scheduler->mutex);
    }
    pthread_mutex_unlock(&scheduler->mutex);
}

void scheduler_job_result(const struct scheduler_job *job, struct scheduler_result *ret_result)
{
    pthread_mutex_lock(&job->scheduler->mutex);
    *ret_result = job->result;
    pthread_mutex_unlock(&job->scheduler->mutex);
}
