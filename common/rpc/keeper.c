/*
 * What a server keeps without a thread for each: calls whose first message has not come, and
 * watchers of its health. One thread looks after all of them.
 */
#include "common/rpc/server_internal.h"

#include "common/base/clock.h"

#include <stdio.h>

#define ROUND_MS     500
#define WAITING_MAX  4096
#define WATCHERS_MAX 256

/* ---- Lists, under the server's mutex ---- */

static void list_add(struct rpc_call_list *list, struct rk_rpc_call *call)
{
    call->kept_before = list->last;
    call->kept_after = NULL;
    *(list->last ? &list->last->kept_after : &list->first) = call;
    list->last = call;
    list->count++;
    call->kept_in = list;
}

static void list_remove(struct rk_rpc_call *call)
{
    struct rpc_call_list *list = call->kept_in;
    *(call->kept_before ? &call->kept_before->kept_after : &list->first) = call->kept_after;
    *(call->kept_after ? &call->kept_after->kept_before : &list->last) = call->kept_before;
    list->count--;
    call->kept_in = NULL;
}

static bool keep(struct rk_rpc_call *call, struct rpc_call_list *list, uint32_t count_max)
{
    struct rk_rpc_server *server = call->server;
    pthread_mutex_lock(&server->sync.mutex);
    bool room = list->count < count_max;
    if (room) {
        call->kept_ns = rk_clock_ns();
        list_add(list, call);
    }
    pthread_mutex_unlock(&server->sync.mutex);
    return room;
}

bool rpc_keeper_wait_for_message(struct rk_rpc_call *call)
{
    return keep(call, &call->server->waiting, WAITING_MAX);
}

bool rpc_keeper_message_came(struct rk_rpc_call *call)
{
    struct rk_rpc_server *server = call->server;
    pthread_mutex_lock(&server->sync.mutex);
    bool was = call->kept_in == &server->waiting;
    if (was) {
        list_remove(call);
    }
    pthread_mutex_unlock(&server->sync.mutex);
    return was;
}

bool rpc_keeper_watch(struct rk_rpc_call *call, bool known)
{
    call->watched_sent = RPC_WATCH_NOTHING;
    call->watched_known = known;
    atomic_store(&call->watched_sending, false);
    bool room = keep(call, &call->server->watchers, WATCHERS_MAX);
    if (room) {
        rpc_keeper_wake(call->server);
    }
    return room;
}

void rpc_keeper_wake(struct rk_rpc_server *server)
{
    pthread_mutex_lock(&server->sync.mutex);
    pthread_cond_broadcast(&server->sync.changed);
    pthread_mutex_unlock(&server->sync.mutex);
}

/* ---- The thread ---- */

enum what { NOTHING, END_IDLE, END_GONE, END_STOPPING, SEND };

/* What a watcher needs now. Under the server's mutex. */
static enum what watcher_need(const struct rk_rpc_server *server, struct rk_rpc_call *call)
{
    int now = rpc_health_state(server, call->watched_known);
    if (rk_rpc_call_cancelled(call)) {
        return END_GONE;
    }
    if (atomic_load(&call->watched_sending)) {
        return NOTHING; /* A client that does not read is told the latest once it does. */
    }
    return call->watched_sent != now ? SEND : server->stopping ? END_STOPPING : NOTHING;
}

/* The next call that needs something; it is out of its list then, unless it is to be sent to. */
static struct rk_rpc_call *need_find(struct rk_rpc_server *server, enum what *ret_what)
{
    int64_t idle_ns = server->recv_idle_ms * INT64_C(1000000);
    struct rk_rpc_call *oldest = server->waiting.first;
    if (oldest && rk_clock_ns() - oldest->kept_ns >= idle_ns) {
        list_remove(oldest);
        *ret_what = END_IDLE;
        return oldest;
    }
    for (struct rk_rpc_call *call = server->watchers.first; call; call = call->kept_after) {
        *ret_what = watcher_need(server, call);
        if (*ret_what == NOTHING) {
            continue;
        }
        if (*ret_what == SEND) {
            call->watched_sent = rpc_health_state(server, call->watched_known);
            atomic_store(&call->watched_sending, true);
        } else {
            list_remove(call);
        }
        return call;
    }
    return NULL;
}

static void need_meet(struct rk_rpc_call *call, enum what what)
{
    char text[80] = "";
    enum rk_status status = RK_ERR_CANCELLED;
    if (what == SEND) {
        if (rpc_health_send(call, call->watched_sent) == RK_OK) {
            return;
        }
        atomic_store(&call->watched_sending, false); /* It is gone: found so in the next round. */
        return;
    }
    if (what == END_IDLE) {
        status = RK_ERR_DEADLINE;
        (void)snprintf(text, sizeof(text), "the call was opened, and no message came for %u s",
                       call->server->recv_idle_ms / 1000);
    } else if (what == END_STOPPING) {
        status = RK_ERR_UNAVAILABLE;
        (void)snprintf(text, sizeof(text), "the server stops");
    }
    if (atomic_load(&call->watched_sending)) {
        /* A message that nobody takes is under way; no status can follow it. */
        (void)grpc_call_cancel_with_status(call->call, GRPC_STATUS_CANCELLED, "gone", NULL);
    } else {
        rpc_call_end(call, status, text);
    }
    rpc_call_unref(call);
}

void *rpc_keeper_main(void *context)
{
    struct rk_rpc_server *server = context;
    pthread_mutex_lock(&server->sync.mutex);
    while (!server->exiting) {
        enum what what = NOTHING;
        struct rk_rpc_call *call = need_find(server, &what);
        if (!call) {
            (void)rpc_sync_wait(&server->sync, rk_deadline_in_ms(ROUND_MS));
            continue;
        }
        pthread_mutex_unlock(&server->sync.mutex);
        need_meet(call, what);
        pthread_mutex_lock(&server->sync.mutex);
    }
    pthread_mutex_unlock(&server->sync.mutex);
    return NULL;
}

void rpc_keeper_stop(struct rk_rpc_server *server)
{
    pthread_mutex_lock(&server->sync.mutex);
    server->exiting = true;
    pthread_cond_broadcast(&server->work);
    pthread_cond_broadcast(&server->sync.changed);
    pthread_mutex_unlock(&server->sync.mutex);
    pthread_join(server->keeper, NULL);
}
