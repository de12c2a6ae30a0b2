/*
 * fake_store: a store node for fault injection: it answers CommitShard,
 * AbortShard and DropShard, counts them, and fails when told to. It holds no KV.
 *
 * Threads: counters are atomic; the rest belongs to the test's thread.
 */
#ifndef RK_TESTS_COORDINATOR_FAKE_STORE_H
#define RK_TESTS_COORDINATOR_FAKE_STORE_H

#include "common/base/status.h"

#include <stdatomic.h>
#include <stdint.h>

struct fake_store {
    struct rk_rpc_server *server;
    char address[64];
    atomic_int fail_commit; /* an enum rk_status; RK_OK: none */
    /* Called on the server's thread once a shard is committed, before the answer; NULL: nothing.
     * Set the context first. */
    void (*_Atomic committed)(void *context, uint64_t generation);
    void *committed_context;
    atomic_int commits;
    atomic_int aborts;
    atomic_int drops;
    atomic_ullong last_dropped; /* generation */
};

void fake_store_start(struct fake_store *store);
void fake_store_stop(struct fake_store *store);

#endif
