#include "common/rpc/rpc_internal.h"

#include "common/base/clock.h"
#include "common/base/log.h"

#include <errno.h>
#include <grpc/support/log.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

/* gRPC 1.51 takes one event of all its sockets at a look. */
#define LOOKS 16

static void *loop_main(void *context)
{
    struct rpc_loop *loop = context;
    for (;;) {
        grpc_event event =
            grpc_completion_queue_next(loop->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) {
            return NULL;
        }
        if (event.type == GRPC_OP_COMPLETE) {
            struct rpc_event *tag = event.tag;
            RPC_TSAN_ACQUIRE(tag);
            tag->done(tag, event.success != 0);
        }
    }
}

int rpc_thread_create(pthread_t *ret_thread, void *(*body)(void *), void *context)
{
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failure = pthread_create(ret_thread, NULL, body, context);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failure;
}

/* gRPC tells every failure by a status as well, so its own lines are for our debugging. */
static void log_line(gpr_log_func_args *args)
{
    RK_LOG_DEBUG("grpc", "text=%q", args->message);
}

void rpc_library_start(void)
{
    if (getenv("GRPC_VERBOSITY") == NULL) { /* Set by whoever wants to see them all. */
        gpr_set_log_function(log_line);
    }
    rpc_fork_watch();
    /* gRPC starts threads of its own here; they inherit the mask. */
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    grpc_init();
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void rpc_loop_create(struct rpc_loop *loop)
{
    rpc_library_start();
    loop->queue = grpc_completion_queue_create_for_next(NULL);
    loop->running = false;
}

enum rk_status rpc_loop_start(struct rpc_loop *loop)
{
    if (rpc_thread_create(&loop->thread, loop_main, loop) != 0) {
        return RK_ERR_NO_MEMORY;
    }
    loop->running = true;
    return RK_OK;
}

void rpc_loop_run_until(struct rpc_loop *loop, const bool *flag)
{
    RK_ASSERT(!loop->running);
    while (!*flag) {
        grpc_event event =
            grpc_completion_queue_next(loop->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        RK_ASSERT(event.type == GRPC_OP_COMPLETE);
        struct rpc_event *tag = event.tag;
        RPC_TSAN_ACQUIRE(tag);
        tag->done(tag, event.success != 0);
    }
}

void rpc_loop_destroy(struct rpc_loop *loop)
{
    if (!loop->queue) {
        return;
    }
    grpc_completion_queue_shutdown(loop->queue);
    if (loop->running) {
        pthread_join(loop->thread, NULL);
        loop->running = false;
    } else {
        (void)loop_main(loop); /* Returns at the shutdown event. */
    }
    grpc_completion_queue_destroy(loop->queue);
    loop->queue = NULL;
    grpc_shutdown();
}

void rpc_settings_fill(const struct rpc_setting *settings, size_t num_settings, grpc_arg *ret_args)
{
    for (size_t i = 0; i < num_settings; i++) {
        ret_args[i] = (grpc_arg){.type = GRPC_ARG_INTEGER,
                                 .key = (char *)(uintptr_t)settings[i].key, /* only read */
                                 .value.integer = settings[i].value};
    }
}

void rpc_sync_init(struct rpc_sync *sync)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&sync->mutex, NULL);
    pthread_cond_init(&sync->changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

void rpc_sync_destroy(struct rpc_sync *sync)
{
    pthread_cond_destroy(&sync->changed);
    pthread_mutex_destroy(&sync->mutex);
}

bool rpc_sync_wait(struct rpc_sync *sync, int64_t deadline_ns)
{
    if (deadline_ns == RK_DEADLINE_NEVER) {
        pthread_cond_wait(&sync->changed, &sync->mutex);
        return true;
    }
    if (deadline_ns <= 0) {
        return false;
    }
    struct timespec until = {.tv_sec = deadline_ns / 1000000000,
                             .tv_nsec = deadline_ns % 1000000000};
    return pthread_cond_timedwait(&sync->changed, &sync->mutex, &until) != ETIMEDOUT;
}

void rpc_batch_init(struct rpc_batch *batch, struct rpc_sync *sync)
{
    *batch = (struct rpc_batch){.event.done = rpc_batch_done, .sync = sync, .ok = true};
}

void rpc_batch_done(struct rpc_event *event, bool ok)
{
    struct rpc_batch *batch = (struct rpc_batch *)event; /* its first member */
    struct rpc_sync *sync = batch->sync;
    /* Signals under the mutex: once it is released the waiter may free both. */
    pthread_mutex_lock(&sync->mutex);
    batch->ok = ok;
    batch->pending = false;
    pthread_cond_broadcast(&sync->changed);
    pthread_mutex_unlock(&sync->mutex);
}

void rpc_batch_start(struct rpc_batch *batch, grpc_call *call, const grpc_op *ops, size_t num_ops)
{
    RK_ASSERT(!batch->pending);
    batch->pending = true;
    batch->ok = false;
    RPC_TSAN_RELEASE(&batch->event);
    grpc_call_error failure = grpc_call_start_batch(call, ops, num_ops, &batch->event, NULL);
    RK_ASSERT(failure == GRPC_CALL_OK); /* Anything else is a wrong use of gRPC. */
}

void rpc_queue_look(grpc_completion_queue *queue)
{
    for (int i = 0; i < LOOKS; i++) {
        grpc_event event = grpc_completion_queue_pluck(queue, NULL, /* nothing has this tag */
                                                       gpr_inf_past(GPR_CLOCK_MONOTONIC), NULL);
        RK_ASSERT(event.type == GRPC_QUEUE_TIMEOUT);
    }
}

void rpc_queue_destroy(grpc_completion_queue *queue)
{
    grpc_completion_queue_shutdown(queue);
    (void)grpc_completion_queue_pluck(queue, NULL, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_completion_queue_destroy(queue);
}

/* The waiting thread does gRPC's work meanwhile. */
static bool batch_pluck(struct rpc_batch *batch, int64_t deadline_ns)
{
    while (batch->pending) {
        gpr_timespec until = deadline_ns == RK_DEADLINE_NEVER
                                 ? gpr_inf_future(GPR_CLOCK_MONOTONIC)
                                 : rpc_timespec_in_ms(rk_deadline_left_ms(deadline_ns));
        grpc_event event = grpc_completion_queue_pluck(batch->pluck, &batch->event, until, NULL);
        if (event.type != GRPC_OP_COMPLETE) {
            return false;
        }
        RPC_TSAN_ACQUIRE(&batch->event);
        batch->ok = event.success != 0;
        batch->pending = false;
    }
    return true;
}

bool rpc_batch_wait_until(struct rpc_batch *batch, int64_t deadline_ns)
{
    if (batch->pluck) {
        return batch_pluck(batch, deadline_ns);
    }
    bool in_time = true;
    pthread_mutex_lock(&batch->sync->mutex);
    while (batch->pending && in_time) {
        in_time = rpc_sync_wait(batch->sync, deadline_ns);
    }
    bool done = !batch->pending;
    pthread_mutex_unlock(&batch->sync->mutex);
    return done;
}

bool rpc_batch_wait(struct rpc_batch *batch, const struct rk_until *until)
{
    do {
        if (rpc_batch_wait_until(batch, rk_until_slice_ns(until))) {
            return true;
        }
    } while (rk_until_over(until) == RK_OK);
    return false;
}

void rpc_call_give_up(grpc_call *call, const struct rk_until *until)
{
    if (rk_until_over(until) == RK_ERR_CANCELLED) {
        (void)grpc_call_cancel(call, NULL);
    } else {
        (void)grpc_call_cancel_with_status(call, GRPC_STATUS_DEADLINE_EXCEEDED, "deadline exceeded",
                                           NULL);
    }
}

bool rpc_batch_finish(struct rpc_batch *batch, grpc_call *call, const struct rk_until *until)
{
    if (!rpc_batch_wait(batch, until)) {
        rpc_call_give_up(call, until);
        /* gRPC promises that every batch of a cancelled call ends. */
        (void)rpc_batch_wait_until(batch, RK_DEADLINE_NEVER);
    }
    return batch->ok;
}
