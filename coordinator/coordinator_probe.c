/*
 * The prober: asks each living store again and again whether it serves.
 *
 * One thread. Stores with a connection are asked side by side: sending to them
 * does not block, so a round of them takes no longer than one call may. The
 * others are asked after them, one at a time and for as long as one interval,
 * beginning anywhere: for each of them a connection may have to be waited for.
 * No lock is held during a call but to cancel it.
 */
#include "common/base/clock.h"
#include "common/base/descriptors.h"
#include "common/base/log.h"
#include "coordinator/coordinator_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define DESCRIPTORS_SPARE 4 /* a call may need some for its connection */

/* A copy of what is to be asked; the probe is under the prober's lock. */
struct probe_target {
    char *node_id;
    char *address;
    uint64_t incarnation;
    bool connected;
    bool begun;
    enum rk_status sent;
    struct rk_error why_not; /* it could not be created */
    struct peers_probe *probe;
};

/* ---- What a store's answers lead to ---- */

static bool probing(const struct coordinator *coordinator)
{
    return coordinator->options.probe_interval_ms != 0;
}

/* Under index_lock. NULL when it is gone or restarted. */
static struct index_node *find_node(struct coordinator *coordinator, const char *node_id,
                                    uint64_t incarnation)
{
    struct index_node *node = index_node_find(coordinator->index, node_id);

    return node != NULL && node->info->incarnation == incarnation ? node : NULL;
}

void coordinator_store_answered(struct coordinator *coordinator, const char *node_id,
                                uint64_t incarnation)
{
    struct index_node *node;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = find_node(coordinator, node_id, incarnation);
    if (node != NULL) {
        liveness_answered(&node->liveness);
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
}

/* A process without descriptors or memory reaches nobody: that says nothing of the others. */
static bool short_ourselves(void)
{
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    bool is_short = fd < 0 || (uint32_t)fd + DESCRIPTORS_SPARE >= rk_descriptors_limit();

    if (fd >= 0) {
        (void)close(fd);
    }
    return is_short;
}

void coordinator_store_failed(struct coordinator *coordinator, const char *node_id,
                              uint64_t incarnation, const char *reason)
{
    struct index_node *node;
    bool ejected = false;

    if (!probing(coordinator)) { /* Nothing would ever readmit it. */
        return;
    }
    /* gRPC tells the cause of the last attempt until it makes another one. */
    if (short_ourselves() || strstr(reason, strerror(EMFILE)) != NULL ||
        strstr(reason, strerror(ENFILE)) != NULL) {
        RK_LOG_DEBUG("failure_not_counted", "node=%q reason=%q", node_id, reason);
        return;
    }
    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = find_node(coordinator, node_id, incarnation);
    if (node != NULL) {
        ejected = liveness_failed(&node->liveness, coordinator->options.probe_failures);
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (ejected) {
        rk_metric_add(coordinator->metrics.ejections, 1);
        RK_LOG_WARN("node_ejected", "node=%q failures=%u reason=%q", node_id,
                    coordinator->options.probe_failures, reason);
    }
}

static void store_passed(struct coordinator *coordinator, const struct probe_target *target)
{
    struct index_node *node;
    bool readmitted = false;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = find_node(coordinator, target->node_id, target->incarnation);
    if (node != NULL) {
        readmitted = liveness_passed(&node->liveness, rk_clock_ns());
        node->registered = node->registered && !readmitted; /* It shall announce what it has. */
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (readmitted) {
        RK_LOG_INFO("node_readmitted", "node=%q", target->node_id);
    }
}

static void note_connection(struct coordinator *coordinator, const struct probe_target *target)
{
    struct index_node *node;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = find_node(coordinator, target->node_id, target->incarnation);
    if (node != NULL) {
        node->liveness.connected = target->sent == RK_OK;
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
}

/* ---- One probe ---- */

static bool stopping(struct coordinator *coordinator)
{
    struct coordinator_prober *prober = &coordinator->prober;
    bool is_stopping;

    (void)pthread_mutex_lock(&prober->lock);
    is_stopping = prober->stopping;
    (void)pthread_mutex_unlock(&prober->lock);
    return is_stopping;
}

/* From here on a stop can cancel it. */
static void publish_probe(struct coordinator *coordinator, struct probe_target *target,
                          struct peers_probe *probe)
{
    struct coordinator_prober *prober = &coordinator->prober;

    (void)pthread_mutex_lock(&prober->lock);
    target->probe = probe;
    if (probe != NULL && prober->stopping) {
        peers_probe_cancel(probe);
    }
    (void)pthread_mutex_unlock(&prober->lock);
}

static void begin(struct coordinator *coordinator, struct probe_target *target)
{
    struct peers_probe *probe = NULL;

    target->begun = true;
    target->sent =
        peers_probe_create(coordinator->peers, target->address,
                           (int)coordinator->options.probe_timeout_ms, &probe, &target->why_not);
    if (target->sent == RK_OK) {
        publish_probe(coordinator, target, probe);
        target->sent = peers_probe_send(probe);
    }
    note_connection(coordinator, target);
}

/* late: we came too late to tell a store that did not answer from one that we did not hear. */
static void end(struct coordinator *coordinator, struct probe_target *target, bool late)
{
    struct peers_probe *probe = target->probe;
    struct rk_error error = {0};
    enum rk_status status;

    if (probe == NULL && target->sent == RK_ERR_NO_MEMORY) {
        return; /* Which is not the store's fault. */
    }
    if (probe == NULL) { /* Its address is none. */
        coordinator_store_failed(coordinator, target->node_id, target->incarnation,
                                 target->why_not.text);
        return;
    }
    status = peers_probe_result(probe, &error);
    publish_probe(coordinator, target, NULL);
    peers_probe_destroy(probe);
    if (stopping(coordinator) || (late && status == RK_ERR_DEADLINE)) {
        return;
    }
    if (status == RK_OK) {
        store_passed(coordinator, target);
    } else if (status == RK_ERR_NO_MEMORY && !error.answered) {
        RK_LOG_WARN("probe_not_made", "node=%q reason=%q", target->node_id, error.text); /* Ours. */
    } else if (status != RK_ERR_FULL) { /* Busy is not sick: it has said so. */
        coordinator_store_failed(coordinator, target->node_id, target->incarnation, error.text);
    }
}

/* ---- A round over all ---- */

/* Under index_lock. False when memory is out. */
static bool add_target(struct arena *arena, const struct index_node *node,
                       struct probe_target *target)
{
    target->node_id = arena_string(arena, node->node_id);
    target->address = arena_string(arena, node->info->grpc_address);
    target->incarnation = node->info->incarnation;
    target->connected = node->liveness.connected;
    return target->node_id != NULL && target->address != NULL;
}

static size_t find_targets(struct coordinator *coordinator, struct arena *arena,
                           struct probe_target **ret_targets)
{
    int64_t now_ns = rk_clock_ns();
    struct probe_target *targets;
    size_t count = 0;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    targets = arena_alloc(arena, HASH_COUNT(index_nodes(coordinator->index)), sizeof(*targets));
    for (struct index_node *node = index_nodes(coordinator->index); targets != NULL && node != NULL;
         node = node->hh.next) {
        if (node->info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE &&
            index_node_alive(coordinator->index, node, now_ns)) {
            if (!add_target(arena, node, &targets[count])) {
                break; /* The next round has them. */
            }
            count++;
        }
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    *ret_targets = targets;
    return count;
}

static void ask_side_by_side(struct coordinator *coordinator, struct probe_target *targets,
                             size_t count)
{
    int64_t late_ns = rk_deadline_in_ms(coordinator->options.probe_timeout_ms / 2);
    bool late;

    for (size_t i = 0; i < count; i++) {
        if (targets[i].connected) {
            begin(coordinator, &targets[i]);
        }
    }
    late = rk_deadline_left_ms(late_ns) == 0; /* One of the connections was gone. */
    for (size_t i = 0; i < count; i++) {
        if (targets[i].begun) {
            end(coordinator, &targets[i], late);
        }
    }
}

static void ask_one_by_one(struct coordinator *coordinator, struct probe_target *targets,
                           size_t count)
{
    int64_t deadline_ns = rk_deadline_in_ms(coordinator->options.probe_interval_ms);
    size_t first = count == 0 ? 0 : (size_t)rand_r(&coordinator->prober.random_state) % count;

    for (size_t i = 0; i < count && rk_deadline_left_ms(deadline_ns) != 0; i++) {
        struct probe_target *target = &targets[(first + i) % count];

        if (!target->begun && !stopping(coordinator)) {
            begin(coordinator, target);
            end(coordinator, target, false);
        }
    }
}

static void show_targets(struct coordinator *coordinator, struct probe_target *targets,
                         size_t count)
{
    struct coordinator_prober *prober = &coordinator->prober;

    (void)pthread_mutex_lock(&prober->lock);
    prober->targets = targets;
    prober->num_targets = count;
    (void)pthread_mutex_unlock(&prober->lock);
}

static void probe_all(struct coordinator *coordinator)
{
    struct probe_target *targets = NULL;
    struct arena arena = {0};
    size_t count = find_targets(coordinator, &arena, &targets);

    show_targets(coordinator, targets, count);
    ask_side_by_side(coordinator, targets, count);
    ask_one_by_one(coordinator, targets, count);
    show_targets(coordinator, NULL, 0);
    arena_free(&arena);
}

/* ---- The thread ---- */

/* False: stop. */
static bool wait_for_round(struct coordinator *coordinator)
{
    struct coordinator_prober *prober = &coordinator->prober;
    uint32_t percent = 75 + (uint32_t)rand_r(&prober->random_state) % 51;
    int64_t until_ns =
        rk_deadline_in_ms((int64_t)coordinator->options.probe_interval_ms * percent / 100);
    struct timespec until = {.tv_sec = until_ns / 1000000000, .tv_nsec = until_ns % 1000000000};
    bool is_stopping;
    int wait = 0;

    (void)pthread_mutex_lock(&prober->lock);
    while (!prober->stopping && wait != ETIMEDOUT) {
        wait = pthread_cond_timedwait(&prober->wake, &prober->lock, &until);
    }
    is_stopping = prober->stopping;
    (void)pthread_mutex_unlock(&prober->lock);
    return !is_stopping;
}

static void *prober_main(void *context)
{
    struct coordinator *coordinator = context;

    while (wait_for_round(coordinator)) {
        probe_all(coordinator);
    }
    return NULL;
}

void coordinator_prober_init(struct coordinator *coordinator)
{
    struct coordinator_prober *prober = &coordinator->prober;
    pthread_condattr_t attributes;

    (void)pthread_mutex_init(&prober->lock, NULL);
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&prober->wake, &attributes);
    (void)pthread_condattr_destroy(&attributes);
    /* Two coordinators must not ask in step. */
    prober->random_state = (unsigned)rk_clock_ns();
}

enum rk_status coordinator_prober_start(struct coordinator *coordinator)
{
    struct coordinator_prober *prober = &coordinator->prober;

    if (!probing(coordinator)) {
        return RK_OK;
    }
    if (pthread_create(&prober->thread, NULL, prober_main, coordinator) != 0) {
        return RK_ERR_NO_MEMORY;
    }
    prober->running = true;
    return RK_OK;
}

void coordinator_prober_stop(struct coordinator *coordinator)
{
    struct coordinator_prober *prober = &coordinator->prober;

    if (!prober->running) {
        return;
    }
    (void)pthread_mutex_lock(&prober->lock);
    prober->stopping = true;
    for (size_t i = 0; i < prober->num_targets; i++) {
        if (prober->targets[i].probe != NULL) {
            peers_probe_cancel(prober->targets[i].probe);
        }
    }
    (void)pthread_cond_signal(&prober->wake);
    (void)pthread_mutex_unlock(&prober->lock);
    (void)pthread_join(prober->thread, NULL);
    prober->running = false;
}

void coordinator_prober_destroy(struct coordinator *coordinator)
{
    RK_ASSERT(!coordinator->prober.running);
    (void)pthread_cond_destroy(&coordinator->prober.wake);
    (void)pthread_mutex_destroy(&coordinator->prober.lock);
}
