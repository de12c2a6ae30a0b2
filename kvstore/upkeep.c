#include "kvstore/service_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>

#define TICK_MS 200

/* A counter of the store and what was published of it. */
struct published {
    struct rk_metric *metric;
    uint64_t value;
};

struct figures {
    struct rk_metric *capacity_bytes;
    struct rk_metric *used_bytes;
    struct rk_metric *pinned_bytes;
    struct rk_metric *shards;
    struct rk_metric *values;
    struct rk_metric *staged;
    struct published evictions;
    struct published put_bytes;
    struct published checksum_failures;
    struct published put_checksum_failures;
    struct published staged_collected;
    struct published scrubbed_bytes;
    struct published misses[RK_STATUS_COUNT];
};

struct upkeep {
    struct upkeep_options options;
    struct figures figures;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    bool stopping;
    pthread_t thread;
};

static void figures_create(struct figures *figures)
{
    figures->capacity_bytes =
        rk_metric_gauge("redknot_kvstore_capacity_bytes", "Size of the DRAM tier.", NULL);
    figures->used_bytes = rk_metric_gauge("redknot_kvstore_used_bytes",
                                          "Bytes taken by shards, staged ones too.", NULL);
    figures->pinned_bytes = rk_metric_gauge("redknot_kvstore_pinned_bytes",
                                            "Bytes of shards that are being read.", NULL);
    figures->shards = rk_metric_gauge("redknot_kvstore_shards", "Committed shards.", NULL);
    figures->values = rk_metric_gauge("redknot_kvstore_values", "Values held.", NULL);
    figures->staged =
        rk_metric_gauge("redknot_kvstore_staged", "Shards written and not yet committed.", NULL);
    figures->evictions.metric =
        rk_metric_counter("redknot_kvstore_evictions_total", "Shards evicted to make room.", NULL);
    figures->put_bytes.metric =
        rk_metric_counter("redknot_kvstore_put_bytes_total", "Bytes of pages accepted.", NULL);
    figures->checksum_failures.metric =
        rk_metric_counter("redknot_kvstore_checksum_failures_total",
                          "Pages whose bytes changed here: found by the scrubber.", NULL);
    figures->put_checksum_failures.metric =
        rk_metric_counter("redknot_kvstore_put_checksum_failures_total",
                          "Pages that came with a checksum which is not theirs.", NULL);
    figures->staged_collected.metric =
        rk_metric_counter("redknot_kvstore_staged_collected_total",
                          "Staged shards dropped because no commit came in time.", NULL);
    figures->scrubbed_bytes.metric = rk_metric_counter("redknot_kvstore_scrubbed_bytes_total",
                                                       "Bytes verified by the scrubber.", NULL);
    for (int status = 0; status < RK_STATUS_COUNT; status++) {
        if (rk_status_is_miss((enum rk_status)status)) {
            char labels[64];
            snprintf(labels, sizeof(labels), "reason=\"%s\"",
                     rk_status_name((enum rk_status)status));
            figures->misses[status].metric = rk_metric_counter(
                "redknot_kvstore_misses_total", "Reads that found nothing, by reason.", labels);
        }
    }
}

static void publish_counter(struct published *published, uint64_t value)
{
    rk_metric_add(published->metric, (double)(value - published->value));
    published->value = value;
}

static void publish(struct upkeep *upkeep)
{
    struct figures *figures = &upkeep->figures;
    struct kvstore_stats stats;
    kvstore_stats_get(upkeep->options.store, &stats);
    rk_metric_set(figures->capacity_bytes, (double)stats.capacity_bytes);
    rk_metric_set(figures->used_bytes, (double)stats.used_bytes);
    rk_metric_set(figures->pinned_bytes, (double)stats.pinned_bytes);
    rk_metric_set(figures->shards, (double)stats.num_shards);
    rk_metric_set(figures->values, (double)stats.num_values);
    rk_metric_set(figures->staged, (double)stats.num_staged);
    publish_counter(&figures->evictions, stats.evictions);
    publish_counter(&figures->put_bytes, stats.put_bytes);
    publish_counter(&figures->checksum_failures,
                    stats.checksum_failures - stats.put_checksum_failures);
    publish_counter(&figures->put_checksum_failures, stats.put_checksum_failures);
    publish_counter(&figures->staged_collected, stats.staged_collected);
    publish_counter(&figures->scrubbed_bytes, stats.scrubbed_bytes);
    for (int status = 0; status < RK_STATUS_COUNT; status++) {
        if (figures->misses[status].metric) {
            publish_counter(&figures->misses[status], stats.misses[status]);
        }
    }
}

static void damage_a_page(struct upkeep *upkeep)
{
    struct kvstore_name name;
    uint64_t offset = 0;
    if (kvstore_fault_inject(upkeep->options.store, &name, &offset) != RK_OK) {
        RK_LOG_WARN("fault_not_injected", "reason=%q", "no shard is committed");
        return;
    }
    char hex[RK_ID_HEX_BYTES];
    rk_id_to_hex(&name.segment_id, hex);
    RK_LOG_WARN("fault_injected", "segment=%s shard=%u generation=%llu arena_offset=%llu", hex,
                name.shard_index, (unsigned long long)name.generation, (unsigned long long)offset);
}

/* The signals are blocked in all threads and taken here, so no handler is needed. */
static void inject_if_asked(struct upkeep *upkeep)
{
    sigset_t wanted;
    struct timespec no_wait = {0};
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGUSR1);
    sigaddset(&wanted, SIGUSR2);
    int signal_number =
        upkeep->options.fault_injection ? sigtimedwait(&wanted, NULL, &no_wait) : -1;
    if (signal_number == SIGUSR1) {
        damage_a_page(upkeep);
    } else if (signal_number == SIGUSR2 && upkeep->options.shm) {
        rk_shm_server_fault_unpin(upkeep->options.shm);
        RK_LOG_WARN("fault_injected", "what=%q", "pins given back that readers still use");
    }
}

/* False: stop. */
static bool wait_tick(struct upkeep *upkeep)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += TICK_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    int rc = 0;
    pthread_mutex_lock(&upkeep->mutex);
    while (!upkeep->stopping && rc == 0) {
        rc = pthread_cond_timedwait(&upkeep->wake, &upkeep->mutex, &until);
    }
    bool stopping = upkeep->stopping;
    pthread_mutex_unlock(&upkeep->mutex);
    return !stopping;
}

static void *upkeep_thread(void *context)
{
    struct upkeep *upkeep = context;
    uint64_t scrub_bytes = upkeep->options.scrub_rate * TICK_MS / 1000;
    do {
        inject_if_asked(upkeep);
        uint32_t collected = kvstore_collect(upkeep->options.store, rk_clock_ns());
        if (collected > 0) {
            RK_LOG_INFO("staged_collected", "shards=%u", collected);
        }
        if (scrub_bytes > 0) {
            kvstore_scrub(upkeep->options.store, scrub_bytes);
        }
        publish(upkeep);
    } while (wait_tick(upkeep));
    return NULL;
}

enum rk_status upkeep_start(const struct upkeep_options *options, struct upkeep **ret_upkeep,
                            struct rk_error *error)
{
    struct upkeep *upkeep = rk_alloc_zero(1, sizeof(*upkeep));
    if (!upkeep) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the upkeep thread");
    }
    upkeep->options = *options;
    figures_create(&upkeep->figures);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&upkeep->mutex, NULL);
    pthread_cond_init(&upkeep->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&upkeep->thread, NULL, upkeep_thread, upkeep) != 0) {
        pthread_cond_destroy(&upkeep->wake);
        pthread_mutex_destroy(&upkeep->mutex);
        rk_free(upkeep);
        return rk_error_set(error, RK_ERR_NO_MEMORY, "cannot start the upkeep thread");
    }
    *ret_upkeep = upkeep;
    return RK_OK;
}

void upkeep_stop(struct upkeep *upkeep)
{
    if (!upkeep) {
        return;
    }
    pthread_mutex_lock(&upkeep->mutex);
    upkeep->stopping = true;
    pthread_cond_signal(&upkeep->wake);
    pthread_mutex_unlock(&upkeep->mutex);
    pthread_join(upkeep->thread, NULL);
    pthread_cond_destroy(&upkeep->wake);
    pthread_mutex_destroy(&upkeep->mutex);
    rk_free(upkeep);
}
