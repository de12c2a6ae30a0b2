/*
 * scheduler: who runs on the engine, and when.
 *
 * The engine belongs to the scheduler's one thread, which does arithmetic
 * only. Callers do their own I/O (locate, fetch, publish) on their own threads
 * before and after. Each turn computes one chunk of one prefill (the jobs take
 * turns) and then one decode step of all decoding jobs together; row
 * independence makes a job's result the same whoever runs beside it.
 *
 * Bounded: jobs queued and active, rows of log-probabilities waiting for a
 * slow reader, and pool pages, which are reserved at admission so that a job
 * that started never runs out of them. A job whose reader takes no rows gives
 * up its place, not its pages, until the reader goes on.
 *
 * Pages that are borrowed may be lost while they are used: after each pass over
 * them the job's pages_check is asked, before anything of that pass is told.
 *
 * Threads: submit, wait, cancel and release from any thread; one job is waited
 * for by one thread.
 */
#ifndef WORKER_SCHEDULER_SCHEDULER_H
#define WORKER_SCHEDULER_SCHEDULER_H

#include "client/kv_client.h"
#include "worker/engine/engine.h"
#include "worker/recovery/recovery.h"

struct scheduler;
struct scheduler_job;
struct tokenizer;

struct scheduler_options {
    struct engine *engine;             /* owned by the scheduler's thread from start to stop */
    const struct tokenizer *tokenizer; /* borrowed: which tokens end a generation */
    uint32_t jobs_active_max;          /* 0: 8 */
    uint32_t jobs_queued_max;          /* 0: 64 */
};

RK_MUST_CHECK enum rk_status scheduler_start(const struct scheduler_options *options,
                                             struct scheduler **ret_scheduler,
                                             struct rk_error *error);
/* Ends all jobs as RK_ERR_CANCELLED; every job must have been released. Accepts NULL. */
void scheduler_stop(struct scheduler *scheduler);

struct scheduler_load {
    uint32_t active;  /* compute now */
    uint32_t queued;  /* wait for a place or for pages */
    uint32_t stalled; /* wait for their readers, without a place */
};
void scheduler_load(struct scheduler *scheduler, struct scheduler_load *ret_load);

/*
 * What to compute. Everything is borrowed until scheduler_job_release.
 * plan NULL: segment 0 is computed alone, and nothing else (a put).
 * forced: a given continuation is scored instead of generating one.
 * replay: tokens that an earlier job of this request has told already; they are computed again, one
 * by one as then, but stay what they were and are not told again.
 */
struct scheduler_request {
    const struct recovery_plan *plan;
    uint32_t num_segments;
    const int32_t *const *segment_tokens; /* [num_segments][their lengths] */
    const uint32_t *segment_num_tokens;   /* [num_segments] */
    const struct rk_kv_pages *fetched;    /* [num_segments], in the order of the run's extents */
    const int32_t *prompt;                /* at least one token, but for a put */
    uint32_t num_prompt;
    const int32_t *forced;
    uint32_t num_forced;
    uint32_t tokens_max; /* to generate */
    bool ignore_end;     /* go on behind an end token */
    struct engine_sampler sampler;
    const int32_t *replay; /* [num_replay], below tokens_max */
    uint32_t num_replay;
    /* Are the fetched pages still what they were? Else why not, and of which segment. Called by the
     * engine's thread after each pass over them: it must not block. NULL: they always are. */
    enum rk_status (*pages_check)(void *context, uint32_t *ret_segment);
    void *pages_context;
};

/* RK_ERR_FULL: the queue is full. RK_ERR_TOO_LONG: the pool can never hold it. */
RK_MUST_CHECK enum rk_status scheduler_job_submit(struct scheduler *scheduler,
                                                  const struct scheduler_request *request,
                                                  struct scheduler_job **ret_job,
                                                  struct rk_error *error);

enum scheduler_event_kind {
    SCHEDULER_PROGRESS, /* a chunk of a prefill is done */
    SCHEDULER_TOKENS,   /* tokens were generated */
    SCHEDULER_ROW,      /* one row of log-probabilities */
    SCHEDULER_DONE,     /* status tells how it ended */
};

struct scheduler_event {
    enum scheduler_event_kind kind;
    enum rk_status status;
    uint32_t rows_done, rows_total; /* PROGRESS: of the whole prefill */
    const int32_t *tokens;          /* TOKENS: borrowed until release */
    uint32_t num_tokens;
    uint32_t row;          /* ROW: index in the continuation */
    const float *logprobs; /* ROW: [vocab], borrowed until scheduler_job_row_done */
};

/* Next event. RK_ERR_DEADLINE: none came in time. The last is SCHEDULER_DONE, and stays. */
RK_MUST_CHECK enum rk_status scheduler_job_wait(struct scheduler_job *job, int64_t deadline_ns,
                                                struct scheduler_event *ret_event);
/* The reader is through with the row of the last event, and makes room for another. */
void scheduler_job_row_done(struct scheduler_job *job);
void scheduler_job_cancel(struct scheduler_job *job);
/* Waits until the engine has let go of the job, then frees it. Accepts NULL. */
void scheduler_job_release(struct scheduler_job *job);

/* After SCHEDULER_DONE, before release. */
struct scheduler_result {
    bool ended; /* by an end token; else by tokens_max */
    uint32_t num_tokens;
    uint32_t bad_segment;      /* with RK_MISS_*: whose pages were bad or are lost */
    struct rk_extent bad_page; /* with RK_MISS_CHECKSUM: that page of it */
    double flops;              /* of the prompt */
    int64_t started_ns;        /* left the queue */
    int64_t first_token_ns;
    char text[512]; /* of an error */
};
void scheduler_job_result(const struct scheduler_job *job, struct scheduler_result *ret_result);
/* Pages [layer][kv_head][page] of segment i that this job computed (sources COMPUTE and
 * COMPUTE_ALONE); borrowed until release. */
void scheduler_job_pages(const struct scheduler_job *job, uint32_t segment, const void **ret_pages);

#endif
