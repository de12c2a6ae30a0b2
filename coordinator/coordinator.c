#include "coordinator/coordinator.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/record.h"

#include <errno.h>
#include <stdio.h>
#include <time.h>

/* A commit to a store that is dying holds its handler for seconds; heartbeats must still pass. */
#define CALLS_MAX           256u
#define BIND_WAIT_MS        2000
#define SWEEP_MS            250
#define EXPIRED_EACH_SWEEP  256u
#define DEFAULT_DEADLINE_MS 30000u

static void set_defaults(const struct coordinator_options *options,
                         struct coordinator_options *ret_options)
{
    struct coordinator_options filled = *options;

    filled.heartbeat_ms = filled.heartbeat_ms != 0 ? filled.heartbeat_ms : 500;
    filled.timeout_ms = filled.timeout_ms != 0 ? filled.timeout_ms : 2000;
    filled.values_lease_ms = filled.values_lease_ms != 0 ? filled.values_lease_ms : 3000;
    filled.shards_per_segment = filled.shards_per_segment != 0 ? filled.shards_per_segment : 1;
    filled.segments_max = filled.segments_max != 0 ? filled.segments_max : 1000000;
    filled.placed_expire_ms = filled.placed_expire_ms != 0 ? filled.placed_expire_ms : 60000;
    filled.store_deadline_ms = filled.store_deadline_ms != 0 ? filled.store_deadline_ms : 5000;
    filled.probe_timeout_ms = filled.probe_timeout_ms != 0 ? filled.probe_timeout_ms : 500;
    filled.probe_failures = filled.probe_failures != 0 ? filled.probe_failures : 3;
    *ret_options = filled;
}

static void create_metrics(struct coordinator_metrics *metrics)
{
    static const char *const roles[2] = {"store", "worker"};

    metrics->hits = rk_metric_counter("redknot_coordinator_locate_hits_total",
                                      "Segments located with all shards on live nodes.", NULL);
    for (int i = 0; i < RK_STATUS_COUNT; i++) {
        if (rk_status_is_miss(i)) {
            char label[64];

            (void)snprintf(label, sizeof(label), "reason=\"%s\"", rk_status_name(i));
            metrics->misses[i] = rk_metric_counter("redknot_coordinator_locate_misses_total",
                                                   "Segments not located, by reason.", label);
        }
    }
    metrics->places = rk_metric_counter("redknot_coordinator_places_total",
                                        "Puts that were given a place.", NULL);
    metrics->commits =
        rk_metric_counter("redknot_coordinator_commits_total", "Puts made visible.", NULL);
    metrics->aborts = rk_metric_counter("redknot_coordinator_aborts_total",
                                        "Puts aborted by a client or a failed commit.", NULL);
    metrics->expired = rk_metric_counter("redknot_coordinator_expired_total",
                                         "Puts that were never committed.", NULL);
    metrics->segments = rk_metric_gauge("redknot_coordinator_segments",
                                        "Segments known, with or without KV.", NULL);
    metrics->placed =
        rk_metric_gauge("redknot_coordinator_placed", "Puts between Place and Commit.", NULL);
    metrics->kv_bytes = rk_metric_gauge("redknot_coordinator_kv_bytes",
                                        "KV of the segments that stores hold.", NULL);
    metrics->metadata_bytes = rk_metric_gauge("redknot_coordinator_metadata_bytes",
                                              "Size of the metadata database.", NULL);
    metrics->metadata_ratio = rk_metric_gauge("redknot_coordinator_metadata_ratio",
                                              "Bytes of metadata database per byte of KV.", NULL);
    for (int state = 0; state < NODE_STATE_COUNT; state++) {
        char label[64];

        (void)snprintf(label, sizeof(label), "state=\"%s\"",
                       index_node_state_name((enum node_state)state));
        metrics->stores[state] =
            rk_metric_gauge("redknot_coordinator_stores", "Store nodes known, by state.", label);
        for (int role = 0; role < 2; role++) {
            (void)snprintf(label, sizeof(label), "role=\"%s\",state=\"%s\"", roles[role],
                           index_node_state_name((enum node_state)state));
            metrics->nodes[role][state] = rk_metric_gauge(
                "redknot_coordinator_nodes", "Nodes known, in the words of status.", label);
        }
    }
    metrics->ejections = rk_metric_counter("redknot_coordinator_ejections_total",
                                           "Stores that reported but did not answer.", NULL);
}

static void init_locks(struct coordinator *coordinator)
{
    pthread_condattr_t attributes;

    (void)pthread_mutex_init(&coordinator->write_lock, NULL);
    (void)pthread_mutex_init(&coordinator->index_lock, NULL);
    (void)pthread_mutex_init(&coordinator->sweep_lock, NULL);
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(&coordinator->sweep_wake, &attributes);
    (void)pthread_condattr_destroy(&attributes);
}

static enum rk_status build(struct coordinator *coordinator, struct rk_error *error)
{
    const struct coordinator_options *options = &coordinator->options;
    struct rk_rpc_server_options rpc = {
        .address = options->listen,
        .calls_max = CALLS_MAX,
        .default_deadline_ms = DEFAULT_DEADLINE_MS,
        .bind_wait_ms = BIND_WAIT_MS,
    };
    enum rk_status status =
        index_create(options->segments_max, (int64_t)options->timeout_ms * 1000000,
                     (int64_t)options->slow_start_ms * 1000000, &coordinator->index);

    if (status == RK_OK) {
        status = peers_create(&coordinator->peers);
    }
    if (status != RK_OK) {
        return rk_error_set(error, status, "out of memory at start");
    }
    /* The address before the database: a second coordinator started by mistake says so. */
    status = rk_rpc_server_create(&rpc, &coordinator->server, error);
    if (status == RK_OK) {
        status = coordinator->ops->open(options->data_dir, &coordinator->metadata, error);
    }
    if (status == RK_OK) {
        status = coordinator_load(coordinator, error);
    }
    if (status == RK_OK && coordinator_add_service(coordinator) != RK_OK) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory at start");
    }
    return status;
}

enum rk_status coordinator_create(const struct coordinator_options *options,
                                  struct coordinator **ret_coordinator, struct rk_error *error)
{
    struct coordinator *coordinator = NULL;
    enum rk_status status = RK_OK;

    if (options->shards_per_segment > COORDINATOR_SHARDS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "shards per segment: at most %u",
                            COORDINATOR_SHARDS_MAX);
    }
    coordinator = rk_alloc_zero(1, sizeof(*coordinator));
    if (coordinator == NULL) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory at start");
    }
    set_defaults(options, &coordinator->options);
    coordinator->ops = &metadata_rocksdb;
    coordinator->started_ns = rk_clock_ns();
    coordinator->awake_ns = coordinator->settling_ns = coordinator->started_ns;
    init_locks(coordinator);
    coordinator_prober_init(coordinator);
    create_metrics(&coordinator->metrics);
    status = build(coordinator, error);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_coordinator = coordinator;
    return RK_OK;

fail:
    coordinator_destroy(coordinator);
    return status;
}

/* ---- The sweeper: what time alone brings about ---- */

/* Nodes that came or went are told once. Under index_lock. */
static void watch_nodes(struct coordinator *coordinator)
{
    double counts[2][NODE_STATE_COUNT] = {{0}};
    int64_t now_ns = rk_clock_ns();
    double factor_max = index_factor_max(coordinator->index, now_ns);

    for (struct index_node *node = index_nodes(coordinator->index); node != NULL;
         node = node->hh.next) {
        bool worker = node->info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_WORKER;
        bool alive = index_node_alive(coordinator->index, node, now_ns);

        counts[worker][index_node_state(coordinator->index, node, factor_max, now_ns)]++;
        if (alive != node->was_alive) {
            node->was_alive = alive;
            rk_log(alive ? RK_LOG_LEVEL_INFO : RK_LOG_LEVEL_WARN, alive ? "node_up" : "node_down",
                   "node=%q role=%s shards=%llu", node->node_id, worker ? "worker" : "store",
                   (unsigned long long)node->num_locations);
        }
    }
    for (int role = 0; role < 2; role++) {
        for (int i = 0; i < NODE_STATE_COUNT; i++) {
            rk_metric_set(coordinator->metrics.nodes[role][i], counts[role][i]);
        }
    }
    for (int i = 0; i < NODE_STATE_COUNT; i++) {
        rk_metric_set(coordinator->metrics.stores[i], counts[0][i]);
    }
}

static void expire_placed(struct coordinator *coordinator)
{
    int64_t before_ns = rk_clock_ns() - (int64_t)coordinator->options.placed_expire_ms * 1000000;

    for (uint32_t i = 0; i < EXPIRED_EACH_SWEEP; i++) {
        struct placed *placed;

        (void)pthread_mutex_lock(&coordinator->index_lock);
        placed = placed_take_expired(&coordinator->placed, before_ns);
        (void)pthread_mutex_unlock(&coordinator->index_lock);
        if (placed == NULL) {
            return;
        }
        rk_metric_add(coordinator->metrics.expired, 1);
        coordinator_undo_placed(coordinator, placed, 0);
        placed_destroy(placed);
    }
}

/* Under index_lock: a copy of the next one; NULL: there is none, or memory is out. */
static Redknot__V1__NodeInfo *take_unsaved(struct coordinator *coordinator)
{
    for (struct index_node *node = index_nodes(coordinator->index); node != NULL;
         node = node->hh.next) {
        if (node->unsaved) {
            node->unsaved = false;
            return (Redknot__V1__NodeInfo *)record_copy(&node->info->base,
                                                        &redknot__v1__node_info__descriptor);
        }
    }
    return NULL;
}

/* Nodes that came while the disk was full. Without their records, what they hold would count as
 * lost after a restart. Under write_lock. */
static void save_nodes(struct coordinator *coordinator)
{
    enum rk_status status = RK_OK;

    while (status == RK_OK) {
        Redknot__V1__NodeInfo *info;
        struct index_node *node;

        (void)pthread_mutex_lock(&coordinator->index_lock);
        info = take_unsaved(coordinator);
        (void)pthread_mutex_unlock(&coordinator->index_lock);
        if (info == NULL) {
            return;
        }
        status = coordinator_save_node(coordinator, info, NULL);
        if (status != RK_OK) {
            (void)pthread_mutex_lock(&coordinator->index_lock);
            node = index_node_find(coordinator->index, info->node_id);
            if (node != NULL) {
                node->unsaved = true;
            }
            (void)pthread_mutex_unlock(&coordinator->index_lock);
        }
        record_free(&info->base);
    }
}

static void sweep(struct coordinator *coordinator)
{
    struct coordinator_metrics *metrics = &coordinator->metrics;
    double metadata_bytes = (double)coordinator->ops->bytes(coordinator->metadata);
    struct rk_error error = {0};
    enum rk_status status;
    double kv_bytes;

    expire_placed(coordinator);
    (void)pthread_mutex_lock(&coordinator->index_lock);
    watch_nodes(coordinator);
    kv_bytes = (double)index_kv_bytes(coordinator->index);
    rk_metric_set(metrics->segments, (double)index_num_segments(coordinator->index));
    rk_metric_set(metrics->placed, HASH_COUNT(coordinator->placed.by_generation));
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    rk_metric_set(metrics->kv_bytes, kv_bytes);
    rk_metric_set(metrics->metadata_bytes, metadata_bytes);
    rk_metric_set(metrics->metadata_ratio, kv_bytes > 0 ? metadata_bytes / kv_bytes : 0);
    (void)pthread_mutex_lock(&coordinator->write_lock);
    (void)coordinator->ops->tend(coordinator->metadata);
    save_nodes(coordinator);
    /* Usually nothing: each call flushes its own. What a full disk refused is tried again. */
    status = coordinator_flush(coordinator, false, &error);
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    if (status != RK_OK && !coordinator->behind) {
        RK_LOG_ERROR("metadata_behind", "reason=%q", error.text); /* Once, until it works again. */
    }
    coordinator->behind = status != RK_OK;
}

static void *sweeper(void *context)
{
    struct coordinator *coordinator = context;
    bool stopping = false;

    while (!stopping) {
        struct timespec until;
        int wait = 0;

        sweep(coordinator);
        (void)clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += SWEEP_MS * 1000000L;
        until.tv_sec += until.tv_nsec / 1000000000L;
        until.tv_nsec %= 1000000000L;
        (void)pthread_mutex_lock(&coordinator->sweep_lock);
        while (!coordinator->stopping && wait != ETIMEDOUT) {
            wait =
                pthread_cond_timedwait(&coordinator->sweep_wake, &coordinator->sweep_lock, &until);
        }
        stopping = coordinator->stopping;
        (void)pthread_mutex_unlock(&coordinator->sweep_lock);
    }
    return NULL;
}

enum rk_status coordinator_start(struct coordinator *coordinator)
{
    enum rk_status status;

    if (pthread_create(&coordinator->sweeper, NULL, sweeper, coordinator) != 0) {
        return RK_ERR_NO_MEMORY;
    }
    coordinator->sweeping = true;
    status = coordinator_prober_start(coordinator);
    if (status != RK_OK) {
        return status;
    }
    status = rk_rpc_server_start(coordinator->server);
    coordinator->serving = status == RK_OK;
    return status;
}

int coordinator_port(const struct coordinator *coordinator)
{
    return rk_rpc_server_port(coordinator->server);
}

uint64_t coordinator_epoch(const struct coordinator *coordinator)
{
    return coordinator->epoch;
}

void coordinator_stop(struct coordinator *coordinator, int grace_ms)
{
    coordinator_prober_stop(coordinator);
    if (coordinator->serving) {
        rk_rpc_server_stop(coordinator->server, grace_ms);
        coordinator->serving = false;
    }
    if (coordinator->sweeping) {
        (void)pthread_mutex_lock(&coordinator->sweep_lock);
        coordinator->stopping = true;
        (void)pthread_cond_signal(&coordinator->sweep_wake);
        (void)pthread_mutex_unlock(&coordinator->sweep_lock);
        (void)pthread_join(coordinator->sweeper, NULL);
        coordinator->sweeping = false;
    }
}

void coordinator_destroy(struct coordinator *coordinator)
{
    if (coordinator == NULL) {
        return;
    }
    coordinator_stop(coordinator, 0);
    rk_rpc_server_destroy(coordinator->server);
    peers_destroy(coordinator->peers);
    placed_clear(&coordinator->placed);
    index_destroy(coordinator->index);
    coordinator->ops->close(coordinator->metadata);
    coordinator_prober_destroy(coordinator);
    (void)pthread_cond_destroy(&coordinator->sweep_wake);
    (void)pthread_mutex_destroy(&coordinator->sweep_lock);
    (void)pthread_mutex_destroy(&coordinator->index_lock);
    (void)pthread_mutex_destroy(&coordinator->write_lock);
    rk_free(coordinator);
}
