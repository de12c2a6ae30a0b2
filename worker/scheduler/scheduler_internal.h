/*
 * scheduler: what scheduler.c (threads, queue) and job.c (what a job computes next) share.
 *
 * The engine's thread owns a job's sequences and cursor; everything under
 * "guarded" is read and written with the scheduler's mutex held.
 */
#ifndef WORKER_SCHEDULER_SCHEDULER_INTERNAL_H
#define WORKER_SCHEDULER_SCHEDULER_INTERNAL_H

#include "worker/scheduler/scheduler.h"

#include "common/metrics/metrics.h"

#include <pthread.h>

#define JOB_ROWS_RING    64 /* rows of log-probabilities waiting for the reader */
#define CHUNK_LOGITS_MAX 32 /* logits rows of one engine call */

enum job_state { JOB_QUEUED, JOB_PREFILL, JOB_DECODE, JOB_DONE };

struct scheduler_job {
    struct scheduler *scheduler;
    struct scheduler_request request;
    uint64_t pages_reserved;

    /* Engine's thread. */
    struct engine_sequence **alone; /* [num_segments]; NULL where not computed alone */
    struct engine_sequence *main;
    uint32_t alone_segment;  /* next segment that may be computed alone */
    uint32_t alone_row;      /* next row in it */
    struct engine_row *rows; /* of main: plan positions, then forced tokens */
    uint32_t num_rows;
    uint32_t next_row;
    uint32_t *run_of_segment; /* run index in main */
    int32_t last_token;
    uint32_t next_position;
    uint32_t bad_segment; /* after RK_MISS_* */
    struct rk_extent bad_page;

    /* Guarded. */
    enum job_state state;
    bool cancelled;
    bool released;
    bool *gone; /* of the thread that waits in release */
    enum rk_status status;
    struct scheduler_result result;
    uint32_t rows_done, rows_total, rows_reported;
    int32_t *tokens; /* [tokens_max] */
    uint32_t num_tokens, tokens_taken;
    float *ring; /* [JOB_ROWS_RING][vocab] */
    uint32_t ring_written, ring_read;
    bool stalled; /* no room in the ring: without a place until the reader has made some */
    pthread_cond_t changed;
    struct scheduler_job *next; /* queue, or list of active jobs */
};

/* Right after every turn of the engine; set with the mutex held. */
struct scheduler_gauges {
    struct rk_metric *active;
    struct rk_metric *queued;
    struct rk_metric *stalled;
    struct rk_metric *pool_pages;
    struct rk_metric *pool_pages_used;
};

struct scheduler {
    struct scheduler_options options;
    struct engine *engine;
    uint32_t vocab_size;
    float *logits; /* [max(CHUNK_LOGITS_MAX, jobs_active_max)][vocab] */
    void *sample_scratch;
    pthread_t thread;
    bool thread_started;
    struct scheduler_gauges gauges;

    pthread_mutex_t mutex;
    pthread_cond_t work; /* the engine's thread waits here */
    pthread_cond_t gone; /* a released job was let go */
    /* Guarded. */
    bool stopping;
    struct scheduler_job *queue, **queue_tail;
    uint32_t num_queued;
    struct scheduler_job *active; /* admitted and not let go, those that are done included */
    uint64_t pages_reserved;
};

/* ---- job.c: engine's thread unless it says otherwise ---- */

/* Any thread: allocates what the job needs and counts its pages. */
enum rk_status job_create(struct scheduler *scheduler, const struct scheduler_request *request,
                          struct scheduler_job **ret_job, struct rk_error *error);
void job_destroy(struct scheduler_job *job);
/* One chunk. *ret_logits_rows rows of scheduler->logits were written, for row index
 * *ret_first_row on of the rows that want logits. */
enum rk_status job_prefill_chunk(struct scheduler_job *job, uint32_t rows_max, uint32_t logits_max,
                                 uint32_t *ret_rows, uint32_t *ret_logits_rows,
                                 struct rk_error *error);
bool job_prefill_done(const struct scheduler_job *job);
bool job_is_put(const struct scheduler_job *job);
double job_flops(const struct scheduler_job *job);

#endif
