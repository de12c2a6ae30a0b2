/*
 * libredknot: the C API for applications.
 *
 * A client talks to workers, which compute and cache, and to the coordinator,
 * which knows them. Segments are immutable runs of tokens (a document, a system
 * prompt); a request lists segments in any order and a prompt, and says how
 * faithful the answer must be (its level).
 *
 *   struct rk_client_options options = {.coordinator = "127.0.0.1:7100"};
 *   rk_client_create(&options, &client, &error);
 *   rk_client_put_segment(client, &segment, NULL, 0, NULL, NULL, &put, &error);
 *   rk_client_generate(client, &request, on_token, context, &report, &error);
 *
 * Unless an address is given, a living worker is taken at random from the
 * coordinator's list; one that cannot be reached, or is full, before anything
 * came back from it is passed over for the next. Where workers serve several
 * models, one must be named: their answers, and their segments' ids, differ. While
 * the coordinator does not answer, the workers of its last answer are asked, or
 * else workers_known.
 *
 * A client serves the process that made it: in a child after fork() its calls
 * are refused with RK_ERR_INVALID and destroying it does nothing. The child cannot
 * make another one (RK_ERR_UNSUPPORTED): fork before the first client is made, or
 * start the child by exec.
 *
 * Threads: any thread may call, calls on one client run side by side. Callbacks
 * run on the calling thread. Every call ends by timeout_ms.
 * Errors: a status and, in error (which may be NULL), a sentence for a person.
 */
#ifndef CLIENT_REDKNOT_H
#define CLIENT_REDKNOT_H

#include "common/base/id.h"
#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_CLIENT_API __attribute__((visibility("default")))

struct rk_client;

struct rk_client_options {
    const char *coordinator; /* "127.0.0.1:7100"; NULL only when worker is given */
    const char *worker;      /* "127.0.0.1:7120": always this one; NULL: any living one */
    int timeout_ms;          /* of one call, 0: 600,000 */
    int metadata_timeout_ms; /* of status and drop, 0: 5,000 */
    /* Only workers of this model: its name, or 8 or more hex digits of its fingerprint; NULL: any,
     * as long as all serve the same. */
    const char *model;
    /* Addresses of workers, for a coordinator that has never answered; copied, may be NULL. Not
     * used with `model`, for nobody tells what they serve. */
    const char *const *workers_known;
    size_t num_workers_known;
};

/* Connects lazily. On RK_OK the caller owns *ret_client. */
RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_create(const struct rk_client_options *options,
                                                            struct rk_client **ret_client,
                                                            struct rk_error *error);
/* Accepts NULL. No call may be running. */
RK_CLIENT_API void rk_client_destroy(struct rk_client *client);
/* Running calls that compute end with RK_ERR_CANCELLED, and so do later ones. From any thread,
 * not from a signal handler. */
RK_CLIENT_API void rk_client_cancel(struct rk_client *client);

/* A run of tokens, given as one of text, token_ids or segment_id; the others are NULL. */
struct rk_segment_input {
    const char *text; /* UTF-8; special tokens in it are plain text */
    const int32_t *token_ids;
    size_t num_tokens;
    const struct rk_id *segment_id; /* of a stored segment */
    const char *label;              /* for people: a file name; or NULL */
};

/* Where a segment's KV came from. */
enum rk_segment_source {
    RK_SOURCE_OTHER = 0,         /* a name that this version does not know */
    RK_SOURCE_CHAIN = 1,         /* "chain": stored, computed behind just what is before it here */
    RK_SOURCE_SEGMENT = 2,       /* "segment": stored, computed alone */
    RK_SOURCE_COMPUTE = 3,       /* "compute": computed now, behind what is before it */
    RK_SOURCE_COMPUTE_ALONE = 4, /* "compute_alone": computed now, as if it were alone */
};

/* What happened to one segment. Strings belong to the report. */
struct rk_segment_report {
    struct rk_id segment_id;
    const char *label;
    uint32_t position; /* of its first token in the request */
    uint32_t num_tokens;
    uint32_t tokens_reused;
    uint32_t tokens_computed;
    const char *source; /* as the worker names it: that of the enumerator below */
    enum rk_segment_source source_kind;
    const char *miss; /* why it was not reused, such as "MISS_ABSENT"; "" if it was */
    uint64_t bytes_fetched;
    const char *path; /* "shm", "grpc", ... */
    const char *tier; /* "dram", "hbm", "nvme", "none" */
};

/* What one request cost. Filled by the library, given back with rk_report_clear. */
struct rk_report {
    const char *level;
    const char *worker; /* node id */
    const char *finish_reason;
    uint32_t prompt_tokens;
    uint32_t tokens_reused;
    uint32_t tokens_computed; /* of the prompt */
    uint32_t tokens_generated;
    uint64_t bytes_fetched;
    const char *path;
    double ttft_s; /* from the arrival at the worker to the first token */
    double queue_s;
    double fetch_s;
    double prefill_s;
    double total_s;
    double flops;                 /* of the prompt, computed */
    double flops_full;            /* of the prompt at full recomputation */
    bool head_map;                /* a head map limited what queries saw */
    bool approximate;             /* the answer may differ from that of level "full" */
    uint32_t tokens_reused_exact; /* of tokens_reused: KV of this very chain */
    uint32_t restarts;            /* how often it began again because pages were bad or lost */
    const char *request;          /* its name in the worker's log */
    /* Of generate: what became of the KV that it computed, as far as was known at its end. */
    uint32_t segments_stored;
    uint32_t segments_not_stored;
    char store_problem[256]; /* why, of the first that was not; "" */
    struct rk_segment_report *segments;
    size_t num_segments;
    void *owner; /* of the library */
};
RK_CLIENT_API void rk_report_clear(struct rk_report *report); /* accepts a zeroed one */

/* ---- Put ---- */

struct rk_put_result {
    struct rk_id segment_id;
    uint32_t num_tokens;
    uint64_t bytes;
    bool already_stored;
    double seconds;
};
typedef void (*rk_progress_callback)(void *context, uint32_t tokens_done, uint32_t tokens_total);

/* Computes the segment alone and stores it. salt: of the tenant, part of the segment's id.
 * progress may be NULL. */
RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_put_segment(
    struct rk_client *client, const struct rk_segment_input *segment, const void *salt,
    size_t salt_bytes, rk_progress_callback progress, void *context,
    struct rk_put_result *ret_result, struct rk_error *error);

/* ---- Generate ---- */

struct rk_generate_request {
    const struct rk_segment_input *segments;
    size_t num_segments;
    struct rk_segment_input prompt;
    const char *level;   /* "full", "exact", "fast"; NULL: "exact" */
    uint32_t max_tokens; /* 0: 128 */
    float temperature;   /* 0: greedy */
    float top_p;         /* 0 counts as 1 */
    uint64_t seed;
    const char *system; /* NULL: the model's own */
    bool raw;           /* no chat template */
    bool ignore_eos;
    bool no_publish; /* store nothing of what this request computes */
    const void *salt;
    size_t salt_bytes;
};
/* Tokens as they come; text holds whole UTF-8 sequences only and is not NUL-terminated. Either
 * count may be 0. Return false to cancel the call. */
typedef bool (*rk_token_callback)(void *context, const int32_t *token_ids, size_t num_tokens,
                                  const char *text, size_t text_bytes);

RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_generate(
    struct rk_client *client, const struct rk_generate_request *request, rk_token_callback on_token,
    void *context, struct rk_report *ret_report, struct rk_error *error);

/* ---- Score ---- */

struct rk_score_request {
    const struct rk_segment_input *segments;
    size_t num_segments;
    struct rk_segment_input prompt;
    struct rk_segment_input continuation;
    const char *level;
    const void *salt;
    size_t salt_bytes;
    bool chat;          /* the chat template around segments and prompt, as generate has it */
    const char *system; /* of the template; NULL: the model's own */
};
/* Row i: natural-log probabilities [vocab] of the token at position i of the continuation.
 * Borrowed during the call. Return false to cancel. */
typedef bool (*rk_row_callback)(void *context, uint32_t row, const float *logprobs, size_t vocab);

RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_score(struct rk_client *client,
                                                           const struct rk_score_request *request,
                                                           rk_row_callback on_row, void *context,
                                                           struct rk_report *ret_report,
                                                           struct rk_error *error);

/* ---- The cluster ---- */

enum rk_node_role { RK_NODE_OTHER = 0, RK_NODE_STORE = 1, RK_NODE_WORKER = 2 };

struct rk_node_status {
    const char *node_id;
    enum rk_node_role role;
    bool alive;
    const char *address;
    const char *metrics_address;
    const char *model;
    const char *numeric_path; /* of a worker: with equal ones "exact" shares; "": not told */
    const char *version;
    uint64_t capacity_bytes;
    uint64_t used_bytes;
    uint64_t num_shards;
    uint64_t heartbeat_age_ms;
    const char *state; /* "up", "down", "ejected": alive, yet it does not answer; "slow start" */
    struct rk_id fingerprint; /* of a worker's model and precision; else zeros */
};
struct rk_segment_status {
    struct rk_id segment_id;
    const char *label;
    uint32_t num_tokens;
    uint64_t bytes;
    bool committed;
    const char *const *node_ids;
    size_t num_node_ids;
    const char *kind;      /* "alone", "chain": computed behind others; "": not known */
    const char *state;     /* "stored"; "away": comes back with its node; "gone": only tokens */
    struct rk_id alone_id; /* of a chain: the segment that it ends with; else zero */
};
/* Strings belong to it. Given back with rk_cluster_status_clear. */
struct rk_cluster_status {
    struct rk_node_status *nodes;
    size_t num_nodes;
    struct rk_segment_status *segments; /* those listed */
    size_t num_segments_listed;
    uint64_t num_segments; /* that are known */
    uint64_t num_gone;     /* of these: only the tokens are left */
    uint64_t uptime_ms;
    const char *version;
    void *owner; /* of the library */
};

/* segments_max 0: no segments. */
RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_status(struct rk_client *client,
                                                            uint32_t segments_max,
                                                            struct rk_cluster_status *ret_status,
                                                            struct rk_error *error);
struct rk_status_query {
    uint32_t segments_max; /* 0: none */
    bool with_gone;        /* list also segments whose KV is gone */
};
RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_status_query(
    struct rk_client *client, const struct rk_status_query *query,
    struct rk_cluster_status *ret_status, struct rk_error *error);
RK_CLIENT_API void rk_cluster_status_clear(struct rk_cluster_status *status);

/* Address of a living worker, to be freed with rk_client_string_free: for calls that must meet the
 * same one. RK_ERR_UNAVAILABLE when none lives. */
RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_pick_worker(struct rk_client *client,
                                                                 char **ret_address,
                                                                 struct rk_error *error);
RK_CLIENT_API void rk_client_string_free(char *text);

/* What a worker is. Strings belong to it. Given back with rk_worker_status_clear. */
struct rk_worker_status {
    const char *node_id;
    const char *model;
    const char *mode;    /* "bf16", "f32" */
    const char *kernels; /* the attention path chosen at run time */
    const char *version;
    uint32_t context_tokens; /* that a request and its answer may have */
    uint32_t vocab_size;
    void *owner; /* of the library */
};
/* Of the worker that answers: give the client one to ask that one. */
RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_worker_status(
    struct rk_client *client, struct rk_worker_status *ret_status, struct rk_error *error);
RK_CLIENT_API void rk_worker_status_clear(struct rk_worker_status *status);

/* The token ids of a text, by a worker's model; to be freed with rk_client_tokens_free. Special
 * tokens in the text are plain text unless parse_special. */
RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_tokenize(struct rk_client *client,
                                                              const char *text, bool parse_special,
                                                              int32_t **ret_ids, size_t *ret_count,
                                                              struct rk_error *error);
RK_CLIENT_API void rk_client_tokens_free(int32_t *ids);

/*
 * Forgets segments, and with each the chains that it is part of: those that end with it, and
 * whatever continues one of these. A chain's id drops that chain and what continues it. Afterwards
 * nothing that was stored before answers under these names; it is computed when it is asked for.
 * ids may be of segments that are not known (any more).
 */
struct rk_drop_query {
    const struct rk_id *ids;
    size_t num_ids;
    const char *label; /* also all with just this label; NULL: none */
    const void *salt;  /* also all of this tenant; NULL: none; no bytes: of those without a salt */
    size_t salt_bytes;
    bool all;
};
struct rk_drop_result {
    uint64_t dropped; /* of those that were named */
    uint64_t chains;  /* with them */
};
RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_drop_query(struct rk_client *client,
                                                                const struct rk_drop_query *query,
                                                                struct rk_drop_result *ret_result,
                                                                struct rk_error *error);
/* The same for ids only. ret_dropped may be NULL. */
RK_MUST_CHECK RK_CLIENT_API enum rk_status rk_client_drop(struct rk_client *client,
                                                          const struct rk_id *ids, size_t num_ids,
                                                          uint32_t *ret_dropped,
                                                          struct rk_error *error);

#ifdef __cplusplus
}
#endif

#endif
