/*
 * api: what session.c, session_run.c and publish.c (one request's way through the cache and the
 * engine, and what becomes of it) and service.c (the wire) share. A session belongs to its call's
 * thread.
 */
#ifndef WORKER_API_API_INTERNAL_H
#define WORKER_API_API_INTERNAL_H

#include "worker/api/api.h"

#include "common/metrics/metrics.h"
#include "worker/api/admission.h"

#include <stdatomic.h>

#define API_SALT_BYTES_MAX 64

enum api_call { API_PUT, API_GENERATE, API_SCORE, API_CALLS };

struct api_metrics {
    struct rk_metric *requests[API_CALLS];
    struct rk_metric *failures[API_CALLS];
    struct rk_metric *ttft;
    struct rk_metric *fetch;
    struct rk_metric *tokens_computed;
    struct rk_metric *tokens_reused;
    struct rk_metric *tokens_generated;
    struct rk_metric *bytes_fetched[4]; /* by enum rk_path */
    struct rk_metric *misses[RK_STATUS_COUNT];
    struct rk_metric *published;
    struct rk_metric *publish_failures;
    struct rk_metric *restarts[RK_STATUS_COUNT];
};

struct api {
    struct api_options options;
    const struct api_kv_ops *kv;
    struct rk_kv_layout layout;
    struct api_metrics metrics;
    struct admission *admission;
    atomic_bool stopping;
    _Atomic uint64_t num_requests; /* for their names */
};

struct session_segment {
    int32_t *token_ids;
    uint32_t num_tokens;
    struct rk_id id;
    struct rk_id chain_id;
    char *label;
    /* Where its KV is, and why it could not be used (RK_OK while it can). */
    struct rk_kv_location in_chain;
    struct rk_kv_location alone;
    enum rk_status miss;
    bool foreign; /* the first one only: alone, it was computed by another numeric path */
};

struct session {
    const struct api *api;
    struct session_segment *segments; /* [RECOVERY_SEGMENTS_MAX at most] */
    uint32_t num_segments, segments_room;
    uint8_t salt[API_SALT_BYTES_MAX];
    size_t salt_bytes;
    int32_t *prompt;
    uint32_t num_prompt;

    const struct recovery_level *level;
    struct recovery_plan plan;
    struct rk_kv_pages *fetched; /* [num_segments]; zeroed where nothing was fetched */
    const int32_t **segment_tokens;
    uint32_t *segment_num_tokens;
    struct scheduler_job *job;
    struct scheduler_result result;

    char name[32];         /* of the request, in reports and logs */
    struct rk_until until; /* the call's end */
    int64_t wait_left_ns;  /* for the cache, all its waits together */
    bool admitted;
    uint32_t holds; /* that it was admitted with */
    uint32_t restarts;
    int32_t *told; /* [tokens_max]: stays as it is when the request begins again */
    uint32_t num_told;
    uint32_t rows_told;

    uint32_t num_stored, num_not_stored; /* segments that it published, or could not */
    struct rk_error store_error;         /* the first reason */

    int64_t arrived_ns;
    int64_t started_ns;     /* of the first job, should there be several */
    int64_t first_token_ns; /* told */
    double fetch_s;
    uint64_t bytes_fetched;
    enum rk_path path; /* by which they came */
};

/* ---- session.c: what the request says, where its KV is, and the plan ---- */

/* until: of the call; its context is borrowed until destroy. */
enum rk_status session_create(struct api *api, const struct rk_until *until, const void *salt,
                              size_t salt_bytes, struct session **ret_session,
                              struct rk_error *error);
void session_destroy(struct session *session); /* releases the job and all pins; accepts NULL */

/* Takes over token_ids (freed also when the call fails). */
enum rk_status session_add_segment(struct session *session, int32_t *token_ids, size_t num_tokens,
                                   const char *label, struct rk_error *error);
/* By id: what the coordinator knows of it; one question for all ids of a request. Free the
 * locations with rk_kv_locations_free. */
enum rk_status session_locate_ids(struct session *session, const struct rk_id *ids, size_t num_ids,
                                  struct rk_kv_location *ret_locations, struct rk_error *error);
enum rk_status session_add_located(struct session *session, struct rk_kv_location *location,
                                   const char *label, struct rk_error *error);
uint32_t session_num_tokens(const struct session *session); /* segments and prompt */
/* Is the segment stored already? (put) */
bool session_segment_stored(struct session *session);

/* For session_run.c. */
enum rk_status session_reserve(struct session *session, uint32_t tokens_max,
                               struct rk_error *error);
enum rk_status session_locate_all(struct session *session, struct rk_error *error);
enum rk_status session_plan(struct session *session, uint32_t tokens_ahead, struct rk_error *error);
/* The location that a run's source reads from. */
struct rk_kv_location *session_source(struct session *session, uint32_t segment);
/* For waits for the cache: the time that is left for them, until session_waited. */
struct rk_until session_wait(const struct session *session);
void session_waited(struct session *session, int64_t begin_ns);

/* ---- session_run.c: fetch, compute, and begin again when pages are lost ---- */

/* What to do with the tokens once the prompt's KV is there. */
struct session_run {
    const int32_t *forced;
    uint32_t num_forced;
    uint32_t tokens_max;
    bool ignore_end;
    struct engine_sampler sampler;
    /* Called for PROGRESS, TOKENS and ROW events, each token and row once; another status than
     * RK_OK ends the run with it. */
    enum rk_status (*on_event)(void *context, const struct scheduler_event *event);
    void *context;
};
/* Waits for its turn, locates, plans, fetches and computes; a page that is bad or lost costs
 * another round with that segment computed. */
enum rk_status session_run(struct session *session, const struct session_run *run,
                           struct rk_error *error);
/* A segment alone, into the store. */
enum rk_status session_put(struct session *session, const struct session_run *run,
                           uint64_t *ret_bytes, struct rk_error *error);
/* Gives back what was fetched and makes room for another request; the job stays. */
void session_leave(struct session *session);

/* ---- publish.c ---- */

/* One segment that the job computed, under this id. */
enum rk_status session_store(struct session *session, uint32_t segment, const struct rk_id *id,
                             const struct rk_until *until, uint64_t *ret_bytes,
                             struct rk_error *error);
/* Stores what session_run computed in full; failures are counted and kept in the session. */
void session_publish(struct session *session, const struct rk_until *until);

#endif
