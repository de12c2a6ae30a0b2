/*
 * peers: calls to store nodes, one kept channel per address.
 *
 * Threads: any; its lock is a leaf and never held during a call.
 */
#ifndef RK_COORDINATOR_PEERS_H
#define RK_COORDINATOR_PEERS_H

#include "common/base/id.h"
#include "common/base/status.h"
#include "coordinator/index.h"

#include <stdint.h>

#define PEERS_MAX       4096u
#define PEERS_DROPS_MAX 4096u /* in one call */

enum peers_verb { PEERS_COMMIT, PEERS_ABORT, PEERS_DROP };

struct peers;

RK_MUST_CHECK enum rk_status peers_create(struct peers **ret_peers);
void peers_destroy(struct peers *peers); /* no call may run; accepts NULL */

/* KvStore.CommitShard, AbortShard or DropShard at address. */
RK_MUST_CHECK enum rk_status peers_call(struct peers *peers, enum peers_verb verb,
                                        const char *address, const struct rk_id *id,
                                        uint64_t generation, uint32_t shard_index, int timeout_ms,
                                        struct rk_error *error);

/* KvStore.DropShard of several of one store: those of drops[0..count), at drops[0].address. */
RK_MUST_CHECK enum rk_status peers_drop(struct peers *peers, const struct index_drop *drops,
                                        size_t count, int timeout_ms, struct rk_error *error);

/* ---- Probes: grpc.health.v1.Health/Check of KvStore at address ---- */

struct peers_probe; /* one call; belongs to one thread */

/* The time runs from here on. Does not block. */
RK_MUST_CHECK enum rk_status peers_probe_create(struct peers *peers, const char *address,
                                                int timeout_ms, struct peers_probe **ret_probe,
                                                struct rk_error *error);
/* Blocks only while there is no connection yet. */
RK_MUST_CHECK enum rk_status peers_probe_send(struct peers_probe *probe);
/* Once, also after a failed send, to learn why. RK_OK: it serves. */
RK_MUST_CHECK enum rk_status peers_probe_result(struct peers_probe *probe, struct rk_error *error);
void peers_probe_cancel(struct peers_probe *probe);  /* from any thread */
void peers_probe_destroy(struct peers_probe *probe); /* accepts NULL */

#endif
