/*
 * peers: calls to store nodes, one kept channel per address.
 *
 * Threads: any; its lock is a leaf and never held during a call.
 */
#ifndef RK_COORDINATOR_PEERS_H
#define RK_COORDINATOR_PEERS_H

#include "common/base/id.h"
#include "common/base/status.h"

#include <stdint.h>

#define PEERS_MAX 4096u

enum peers_verb { PEERS_COMMIT, PEERS_ABORT, PEERS_DROP };

struct peers;

RK_MUST_CHECK enum rk_status peers_create(struct peers **ret_peers);
void peers_destroy(struct peers *peers); /* no call may run; accepts NULL */

/* KvStore.CommitShard, AbortShard or DropShard at address. */
RK_MUST_CHECK enum rk_status peers_call(struct peers *peers, enum peers_verb verb,
                                        const char *address, const struct rk_id *id,
                                        uint64_t generation, uint32_t shard_index, int timeout_ms,
                                        struct rk_error *error);

#endif
