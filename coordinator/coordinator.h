/*
 * coordinator: who is alive, where each shard lives, and who may write one.
 *
 * Serves redknot.v1.Coordinator. It keeps an index in memory and a copy of what
 * must outlive it in a metadata database; it never holds a byte of KV. Store
 * nodes own their inventory: what is lost here comes back with their Announce.
 *
 * Threads: create, start, stop and destroy belong to one thread; the handlers
 * run on threads of the RPC server.
 * Errors:  creation says in one sentence what is wrong and what to do about it
 *          (address in use, database locked, damaged or foreign, disk full).
 */
#ifndef RK_COORDINATOR_COORDINATOR_H
#define RK_COORDINATOR_COORDINATOR_H

#include "common/base/status.h"

#include <stdint.h>

#define COORDINATOR_SHARDS_MAX 256u /* shards of one segment */

struct coordinator;

struct coordinator_options {
    const char *listen;       /* "127.0.0.1:7100"; port 0 picks a free one */
    const char *data_dir;     /* created with mode 0700 */
    const char *cluster_id;   /* nodes of another one are refused; NULL: none; must outlive it */
    uint32_t heartbeat_ms;    /* how often nodes call, 0: 500 */
    uint32_t timeout_ms;      /* silent for longer: down, 0: 2,000 */
    uint32_t values_lease_ms; /* so long a store serves values unheard, and is listed, 0: 3,000 */
    uint32_t shards_per_segment; /* contiguous layer ranges, 0: 1 */
    uint32_t segments_max;       /* segments known, with or without KV, 0: 1,000,000 */
    uint32_t placed_expire_ms;   /* placed but never committed, 0: 60,000 */
    uint32_t store_deadline_ms;  /* for one call to a store node, 0: 5,000 */
    uint32_t probe_interval_ms; /* between health checks of a store, +-25 %; 0: none, no ejection */
    uint32_t probe_timeout_ms;  /* for one of them, 0: 500 */
    uint32_t probe_failures;    /* in a row eject a store, 0: 3 */
    uint32_t slow_start_ms;     /* until a store that came has its full share, 0: at once */
};

/* Opens the database, loads it and binds the address. Serves nothing yet. */
RK_MUST_CHECK enum rk_status coordinator_create(const struct coordinator_options *options,
                                                struct coordinator **ret_coordinator,
                                                struct rk_error *error);
RK_MUST_CHECK enum rk_status coordinator_start(struct coordinator *coordinator);
int coordinator_port(const struct coordinator *coordinator);
uint64_t coordinator_epoch(const struct coordinator *coordinator);
/* Lets running calls end for grace_ms. */
void coordinator_stop(struct coordinator *coordinator, int grace_ms);
/* Stops if needed. Accepts NULL and half-built ones. */
void coordinator_destroy(struct coordinator *coordinator);

#endif
