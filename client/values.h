/*
 * values: opaque values by key, for engines that use RedKnot as the second
 * tier of their own cache. Part of libredknot.
 *
 * A value is 1 byte to 1 GiB under a key of 1 to 256 bytes, and never changes:
 * putting what is there already is a success and leaves it as it is; to store
 * something else, drop it first. A key belongs to the store that rendezvous
 * hashing gives it, so finding it costs no question to the coordinator, and a
 * get costs one round trip to that store for a whole batch; a put also asks the
 * other stores whether they hold the key. When the store is full the next one
 * takes its place, and readers look there too; one that does not answer is
 * replaced when the coordinator takes it off its list, some 2 s later, and gives
 * up its values before it is back. So no get answers a value that is older than
 * a drop or a put that went well before. What is read was verified against the
 * checksums that its writer made.
 *
 * Blocking calls, and the same as operations: submit_* returns at once, the
 * work is done by threads of the library, and completions are taken with
 * drain when the eventfd is readable.
 *
 * A client serves the process that made it. In a child after fork() its calls
 * are refused with RK_ERR_INVALID, releasing and destroying do nothing, and the
 * memory that views show may change at any time. gRPC does not survive a fork,
 * so the child cannot make a client either (RK_ERR_UNSUPPORTED): fork before the
 * first client is made, or start the child by exec (Python: "spawn").
 *
 * Threads: any. Every call and operation ends by its timeout.
 * Errors:  a call is RK_OK when it was carried out; each item has its own
 *          status. A miss is RK_MISS_*.
 */
#ifndef CLIENT_VALUES_H
#define CLIENT_VALUES_H

#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_VALUES_API __attribute__((visibility("default")))

struct rk_values;

struct rk_values_options {
    const char *coordinator; /* "127.0.0.1:7100" */
    const char *path;        /* "shm", "ucx", "grpc"; NULL or "auto": the nearest that works */
    int timeout_ms;          /* of what gives none, 0: 5,000 */
    uint32_t threads;        /* that carry out operations, 0: 4, at most 64 */
    uint32_t operations_max; /* submitted and not drained yet, 0: 1,024 */
};

/* Connects lazily. On RK_OK the caller owns *ret_values. */
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_create(const struct rk_values_options *options,
                                                            struct rk_values **ret_values,
                                                            struct rk_error *error);
/* Waits for running operations, forgets waiting ones. Accepts NULL. No view may be out. */
RK_VALUES_API void rk_values_destroy(struct rk_values *values);

struct rk_value_key {
    const void *data;
    size_t bytes;
};

/* ---- Blocking calls ---- */

struct rk_value_put {
    struct rk_value_key key;
    const void *data; /* borrowed until the call or operation ends, as all that these point to */
    uint64_t bytes;
    enum rk_status status; /* out */
    bool existed;          /* out: it was there already */
};
/* An item that did not stay, for those behind it needed its room, is RK_ERR_FULL. */
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_put(struct rk_values *values,
                                                         struct rk_value_put *puts, size_t num_puts,
                                                         int timeout_ms, struct rk_error *error);

struct rk_value_get {
    struct rk_value_key key;
    void *buffer;
    uint64_t buffer_bytes;
    uint64_t bytes;        /* out: of the value; 0 unless RK_OK */
    enum rk_status status; /* out: RK_OK, RK_MISS_*, RK_ERR_TOO_LONG */
};
/* Into the caller's buffers. */
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_get(struct rk_values *values,
                                                         struct rk_value_get *gets, size_t num_gets,
                                                         int timeout_ms, struct rk_error *error);

struct rk_value_part {
    const void *data;
    size_t bytes;
};
struct rk_value_view {
    enum rk_status status;
    const struct rk_value_part *parts; /* read-only, in order */
    size_t num_parts;
    uint64_t bytes;
};
struct rk_value_views {
    struct rk_value_view *views; /* [num_keys] */
    size_t num_views;
    const char *path; /* the farthest that served one: "shm", "ucx", "grpc"; "none" */
    void *hold;       /* of the library */
};
/* In place: over shared memory nothing is copied, and the store keeps the bytes until the views
 * are released. */
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_view(struct rk_values *values,
                                                          const struct rk_value_key *keys,
                                                          size_t num_keys, int timeout_ms,
                                                          struct rk_value_views *ret_views,
                                                          struct rk_error *error);
/* Whether all that was read of the views until now was what was put: RK_OK. RK_MISS_EVICTED,
 * RK_MISS_NODE_DOWN: some of it may not be, since the store gave the memory away or is gone; what
 * was made of it must not be used. Cheap; call it after the last use, before the result counts. */
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_view_check(const struct rk_values *values,
                                                                const struct rk_value_views *views);
RK_VALUES_API void rk_values_release(struct rk_values *values, struct rk_value_views *views);

/* Does not make a value younger. A store that does not answer counts as not having it. A key that
 * is none is RK_ERR_INVALID, after all others were answered; so with drop. */
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_exists(struct rk_values *values,
                                                            const struct rk_value_key *keys,
                                                            size_t num_keys, int timeout_ms,
                                                            bool *ret_exists,
                                                            struct rk_error *error);
/* On every store that has it. RK_ERR_UNAVAILABLE when one did not answer: it may still be there. */
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_drop(struct rk_values *values,
                                                          const struct rk_value_key *keys,
                                                          size_t num_keys, int timeout_ms,
                                                          bool *ret_dropped,
                                                          struct rk_error *error);

/* ---- Operations ---- */

/* Each returns at once; *ret_operation names it. The arrays are borrowed until its completion.
 * RK_ERR_FULL: operations_max are submitted and not drained; nothing was done. */
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_submit_put(struct rk_values *values,
                                                                struct rk_value_put *puts,
                                                                size_t num_puts, int timeout_ms,
                                                                uint64_t *ret_operation,
                                                                struct rk_error *error);
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_submit_get(struct rk_values *values,
                                                                struct rk_value_get *gets,
                                                                size_t num_gets, int timeout_ms,
                                                                uint64_t *ret_operation,
                                                                struct rk_error *error);
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_submit_exists(
    struct rk_values *values, const struct rk_value_key *keys, size_t num_keys, int timeout_ms,
    bool *ret_exists, uint64_t *ret_operation, struct rk_error *error);
RK_MUST_CHECK RK_VALUES_API enum rk_status rk_values_submit_drop(
    struct rk_values *values, const struct rk_value_key *keys, size_t num_keys, int timeout_ms,
    bool *ret_dropped, uint64_t *ret_operation, struct rk_error *error);

struct rk_value_completion {
    uint64_t operation;
    enum rk_status status; /* as of the blocking call */
    char text[256];        /* of the call's error, else of the first item that failed; or "" */
};
/* Readable while there are completions to drain. Belongs to values. */
RK_VALUES_API int rk_values_event_fd(const struct rk_values *values);
/* Takes up to completions_max, in the order in which they ended, which is any. Never blocks. */
RK_VALUES_API size_t rk_values_drain(struct rk_values *values,
                                     struct rk_value_completion *ret_completions,
                                     size_t completions_max);

#ifdef __cplusplus
}
#endif

#endif
