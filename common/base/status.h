/*
 * status: what a call can answer, and what to do about it.
 *
 * One X-macro is the only list. A miss (RK_MISS_*) is an answer, not an error:
 * it is never logged, and a worker turns it into computation.
 *
 * Threads: everything here is pure or writes only to the caller's object.
 */
#ifndef RK_COMMON_BASE_STATUS_H
#define RK_COMMON_BASE_STATUS_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus /* kernels/cuda */
extern "C" {
#endif

#define RK_MUST_CHECK      __attribute__((warn_unused_result))
#define RK_PRINTF(fmt, va) __attribute__((format(printf, fmt, va)))

/* What the caller can do. */
enum rk_remedy {
    RK_REMEDY_NONE,        /* it worked */
    RK_REMEDY_COMPUTE,     /* a miss: compute the tokens */
    RK_REMEDY_RETRY,       /* the same call may work in a moment */
    RK_REMEDY_ELSEWHERE,   /* another node may serve it */
    RK_REMEDY_FIX_REQUEST, /* the request is wrong and stays wrong */
    RK_REMEDY_GIVE_UP,     /* our own fault or the machine's */
};

/* X(enumerator, wire name, text, remedy) */
#define RK_STATUS_LIST(X)                                                                          \
    X(RK_OK, "OK", "success", NONE)                                                                \
    X(RK_MISS_ABSENT, "MISS_ABSENT", "never stored, or dropped", COMPUTE)                          \
    X(RK_MISS_EVICTED, "MISS_EVICTED", "evicted to make room", COMPUTE)                            \
    X(RK_MISS_STALE_GENERATION, "MISS_STALE_GENERATION", "stored again since it was located",      \
      COMPUTE)                                                                                     \
    X(RK_MISS_CHECKSUM, "MISS_CHECKSUM", "stored bytes do not match their checksum", COMPUTE)      \
    X(RK_MISS_NODE_DOWN, "MISS_NODE_DOWN", "the node that holds it does not answer", COMPUTE)      \
    X(RK_MISS_DEADLINE, "MISS_DEADLINE", "the fetch did not end in time", COMPUTE)                 \
    X(RK_MISS_TENANT, "MISS_TENANT", "stored by another tenant", COMPUTE)                          \
    X(RK_MISS_FINGERPRINT, "MISS_FINGERPRINT", "stored by another model or KV layout", COMPUTE)    \
    X(RK_MISS_NUMERIC_PATH, "MISS_NUMERIC_PATH", "computed by another arithmetic, not exact here", \
      COMPUTE)                                                                                     \
    X(RK_ERR_NO_MEMORY, "NO_MEMORY", "out of memory", RETRY)                                       \
    X(RK_ERR_FULL, "FULL", "a configured maximum is reached", RETRY)                               \
    X(RK_ERR_BUSY, "BUSY", "in use, try again", RETRY)                                             \
    X(RK_ERR_DEADLINE, "DEADLINE", "the deadline passed", RETRY)                                   \
    X(RK_ERR_UNAVAILABLE, "UNAVAILABLE", "the peer does not answer", ELSEWHERE)                    \
    X(RK_ERR_CANCELLED, "CANCELLED", "cancelled by the caller", NONE)                              \
    X(RK_ERR_INVALID, "INVALID", "the request is malformed", FIX_REQUEST)                          \
    X(RK_ERR_NOT_FOUND, "NOT_FOUND", "no such object", FIX_REQUEST)                                \
    X(RK_ERR_EXISTS, "EXISTS", "the object exists already", FIX_REQUEST)                           \
    X(RK_ERR_TOO_LONG, "TOO_LONG", "longer than the configured maximum", FIX_REQUEST)              \
    X(RK_ERR_UNSUPPORTED, "UNSUPPORTED", "not supported by this version", FIX_REQUEST)             \
    X(RK_ERR_CORRUPT, "CORRUPT", "the data is damaged", GIVE_UP)                                   \
    X(RK_ERR_IO, "IO", "input or output failed", GIVE_UP)                                          \
    X(RK_ERR_INTERNAL, "INTERNAL", "an error of RedKnot itself", GIVE_UP)

enum rk_status {
#define RK_STATUS_ENUM(name, wire, text, remedy) name,
    RK_STATUS_LIST(RK_STATUS_ENUM)
#undef RK_STATUS_ENUM
        RK_STATUS_COUNT
};

/* Wire name, such as "MISS_EVICTED". Never NULL. */
const char *rk_status_name(enum rk_status status);
/* One phrase for people. Never NULL. */
const char *rk_status_text(enum rk_status status);
enum rk_remedy rk_status_remedy(enum rk_status status);
bool rk_status_is_miss(enum rk_status status);
/* RK_ERR_INTERNAL for a name that this version does not know. */
enum rk_status rk_status_from_name(const char *name);

/*
 * What went wrong, for a person: what, where, why, what to do. Callers own it;
 * every function that takes one accepts NULL. Text is cut, never overrun.
 */
struct rk_error {
    enum rk_status status;
    char text[512];
    bool answered; /* a peer was reached and said this itself */
};

/* Fills error (if any) and returns status, so that "return rk_error_set(...)" reads well. */
enum rk_status rk_error_set(struct rk_error *error, enum rk_status status, const char *format, ...)
    RK_PRINTF(3, 4);

/* Puts "context: " before the text that is there. */
void rk_error_prefix(struct rk_error *error, const char *format, ...) RK_PRINTF(2, 3);

/* Prints expression and place, then aborts; also in release builds. For our own mistakes only. */
#define RK_ASSERT(expression)                                                                      \
    ((expression) ? (void)0 : rk_assert_failed(#expression, __FILE__, __LINE__))
__attribute__((noreturn)) void rk_assert_failed(const char *expression, const char *file, int line);

#ifdef __cplusplus
}
#endif

#endif
