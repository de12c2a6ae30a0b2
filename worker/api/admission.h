/*
 * admission: how many requests may hold what others need: pages of stores,
 * which stay pinned until a request is over, and places on the engine.
 *
 * A request waits here, first come first served, before it asks anybody for
 * anything: what waits pins nothing. Inside are as many as the engine computes
 * and two more, so that the next one's pages are fetched while others compute.
 *
 * Threads: any thread. A waiting thread looks up every RK_UNTIL_SLICE_MS: for
 * its cancellation, and for readers that stall, whose places are free then.
 */
#ifndef WORKER_API_ADMISSION_H
#define WORKER_API_ADMISSION_H

#include "common/base/status.h"
#include "common/base/until.h"

#include <stdint.h>

struct admission;

struct admission_options {
    uint32_t places;      /* requests inside at once */
    uint32_t holds_max;   /* segments they may have fetched together; one request may exceed it */
    uint32_t waiting_max; /* requests that wait, here and in the engine's queue */
    /* Requests inside that have no need of their place now, and requests that wait elsewhere. */
    void (*load)(void *context, uint32_t *ret_stalled, uint32_t *ret_queued);
    void *context;
};

RK_MUST_CHECK enum rk_status admission_create(const struct admission_options *options,
                                              struct admission **ret_admission,
                                              struct rk_error *error);
void admission_destroy(struct admission *admission); /* nobody inside; accepts NULL */

/* RK_ERR_FULL: too many wait. RK_ERR_CANCELLED, RK_ERR_DEADLINE: as `until` says. */
RK_MUST_CHECK enum rk_status admission_enter(struct admission *admission, uint32_t holds,
                                             const struct rk_until *until, struct rk_error *error);
void admission_leave(struct admission *admission, uint32_t holds);
uint32_t admission_waiting(struct admission *admission);

#endif
