/*
 * until: how long a caller waits for an answer, and whether it still wants one.
 *
 * A deadline is absolute and belongs to the request: whoever does a part of the
 * work gets the request's own `until`, or a copy with an earlier deadline, and
 * never a new timeout. Waits are cut into slices, so that a cancellation ends
 * them within RK_UNTIL_SLICE_MS although it wakes nobody.
 *
 * Threads: `cancelled` is called by the thread that waits.
 */
#ifndef RK_COMMON_BASE_UNTIL_H
#define RK_COMMON_BASE_UNTIL_H

#include "common/base/clock.h"
#include "common/base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_UNTIL_SLICE_MS 50

struct rk_until {
    int64_t deadline_ns;              /* monotonic; a passed one means "do not wait" */
    bool (*cancelled)(void *context); /* NULL: never; cheap */
    void *context;
};

/* RK_OK: go on waiting. RK_ERR_CANCELLED, else RK_ERR_DEADLINE. */
enum rk_status rk_until_over(const struct rk_until *until);
/* Where the next slice of a wait ends: the deadline itself when that cannot be cancelled. */
int64_t rk_until_slice_ns(const struct rk_until *until);
/* The same question with an earlier end: the sooner of both deadlines. */
struct rk_until rk_until_sooner(const struct rk_until *until, int64_t deadline_ns);

#ifdef __cplusplus
}
#endif

#endif
