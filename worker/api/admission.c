#include "worker/api/admission.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/metrics/metrics.h"

#include <pthread.h>

struct waiter {
    struct waiter *next;
};

struct admission {
    struct admission_options options;
    struct rk_metric *queued;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    /* Guarded. */
    struct waiter *first, **tail; /* on the stacks of the threads that wait */
    uint32_t num_waiting;
    uint32_t num_inside;
    uint64_t holds;
};

enum rk_status admission_create(const struct admission_options *options,
                                struct admission **ret_admission, struct rk_error *error)
{
    struct admission *admission = rk_alloc_zero(1, sizeof(*admission));
    if (!admission) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the admission of requests");
    }
    admission->options = *options;
    admission->tail = &admission->first;
    admission->queued =
        rk_metric_gauge("redknot_worker_requests_queued", "Requests that wait.", NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&admission->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&admission->mutex, NULL);
    *ret_admission = admission;
    return RK_OK;
}

void admission_destroy(struct admission *admission)
{
    if (admission) {
        RK_ASSERT(admission->num_inside == 0 && !admission->first);
        pthread_mutex_destroy(&admission->mutex);
        pthread_cond_destroy(&admission->changed);
        rk_free(admission);
    }
}

/* With the mutex held. */
static bool fits(const struct admission *admission, uint32_t holds, uint32_t stalled)
{
    uint32_t in_place = admission->num_inside > stalled ? admission->num_inside - stalled : 0;
    /* A request that is too big for all is let in alone: the stores have their own limits. */
    return in_place < admission->options.places &&
           (admission->holds == 0 || holds == 0 ||
            admission->holds + holds <= admission->options.holds_max);
}

/* With the mutex held. */
static void waiter_remove(struct admission *admission, struct waiter *self)
{
    struct waiter **link = &admission->first;
    while (*link != self) {
        RK_ASSERT(*link);
        link = &(*link)->next;
    }
    *link = self->next;
    if (!*link) {
        admission->tail = link;
    }
    admission->num_waiting--;
    rk_metric_add(admission->queued, -1);
    pthread_cond_broadcast(&admission->changed); /* Another one is first now. */
}

/* With the mutex held, which load() must not need. */
static enum rk_status wait_in_line(struct admission *admission, uint32_t holds,
                                   const struct rk_until *until)
{
    struct waiter self = {.next = NULL};
    *admission->tail = &self;
    admission->tail = &self.next;
    admission->num_waiting++;
    rk_metric_add(admission->queued, 1);
    enum rk_status status = RK_OK;
    for (;;) {
        uint32_t stalled = 0;
        uint32_t queued = 0;
        admission->options.load(admission->options.context, &stalled, &queued);
        if (admission->first == &self && fits(admission, holds, stalled)) {
            break;
        }
        status = rk_until_over(until);
        if (status != RK_OK) {
            break;
        }
        int64_t slice = rk_deadline_in_ms(RK_UNTIL_SLICE_MS);
        slice = slice < until->deadline_ns ? slice : until->deadline_ns;
        struct timespec end = {.tv_sec = slice / 1000000000, .tv_nsec = slice % 1000000000};
        pthread_cond_timedwait(&admission->changed, &admission->mutex, &end);
    }
    waiter_remove(admission, &self);
    return status;
}

enum rk_status admission_enter(struct admission *admission, uint32_t holds,
                               const struct rk_until *until, struct rk_error *error)
{
    uint32_t stalled = 0;
    uint32_t queued = 0;
    enum rk_status status = RK_OK;
    pthread_mutex_lock(&admission->mutex);
    admission->options.load(admission->options.context, &stalled, &queued);
    queued += admission->num_waiting;
    bool full = queued >= admission->options.waiting_max;
    if (admission->first || !fits(admission, holds, stalled)) {
        status = full ? RK_ERR_FULL : wait_in_line(admission, holds, until);
    }
    if (status == RK_OK) {
        admission->num_inside++;
        admission->holds += holds;
    }
    pthread_mutex_unlock(&admission->mutex);
    if (status == RK_ERR_FULL) {
        return rk_error_set(error, status,
                            "the worker's queue is full: %u requests wait already (--queue-max); "
                            "ask another worker, or this one later",
                            queued);
    }
    return status == RK_OK ? RK_OK
                           : rk_error_set(error, status, "while it waited for its turn: %s",
                                          rk_status_text(status));
}

void admission_leave(struct admission *admission, uint32_t holds)
{
    pthread_mutex_lock(&admission->mutex);
    admission->num_inside--;
    admission->holds -= holds;
    pthread_cond_broadcast(&admission->changed);
    pthread_mutex_unlock(&admission->mutex);
}

uint32_t admission_waiting(struct admission *admission)
{
    pthread_mutex_lock(&admission->mutex);
    uint32_t waiting = admission->num_waiting;
    pthread_mutex_unlock(&admission->mutex);
    return waiting;
}
