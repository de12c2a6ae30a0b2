/*
 * api: what session.c (one request's way through the cache and the engine) and
 * service.c (the wire) share. A session belongs to its call's thread.
 */
#ifndef WORKER_API_API_INTERNAL_H
#define WORKER_API_API_INTERNAL_H

#include "worker/api/api.h"

#include "common/metrics/metrics.h"

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
};

struct api {
    struct api_options options;
    struct rk_kv_layout layout;
    struct api_metrics metrics;
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

    int64_t arrived_ns;
    double fetch_s;
    uint64_t bytes_fetched;
};

enum rk_status session_create(const struct api *api, const void *salt, size_t salt_bytes,
                              struct session **ret_session, struct rk_error *error);
void session_destroy(struct session *session); /* releases the job and all pins; accepts NULL */

/* Takes over token_ids (freed also when the call fails). */
enum rk_status session_add_segment(struct session *session, int32_t *token_ids, size_t num_tokens,
                                   const char *label, struct rk_error *error);
/* By id: its tokens come from the coordinator. */
enum rk_status session_add_segment_id(struct session *session, const struct rk_id *id,
                                      const char *label, struct rk_error *error);
uint32_t session_num_tokens(const struct session *session); /* segments and prompt */
/* Is the segment stored already? (put) */
bool session_segment_stored(struct session *session);

/* What to do with the tokens once the prompt's KV is there. */
struct session_run {
    const int32_t *forced;
    uint32_t num_forced;
    uint32_t tokens_max;
    bool ignore_end;
    struct engine_sampler sampler;
    int64_t deadline_ns;
    /* Called for PROGRESS, TOKENS and ROW events; another status than RK_OK ends the run with it.
     */
    enum rk_status (*on_event)(void *context, const struct scheduler_event *event);
    bool (*cancelled)(void *context);
    void *context;
};
/* Locates, plans, fetches and computes; a bad page or a lost store costs another round with that
 * segment computed. */
enum rk_status session_run(struct session *session, const struct session_run *run,
                           struct rk_error *error);
/* A segment alone, into the store. */
enum rk_status session_put(struct session *session, const struct session_run *run,
                           uint64_t *ret_bytes, struct rk_error *error);
/* Stores what session_run computed in full; failures are counted, not reported. */
void session_publish(struct session *session);

#endif
