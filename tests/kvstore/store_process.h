/*
 * A redknot-kvstore process of 16 MiB that strangers talk to, and what a good
 * client can say of it afterwards. Failures abort the test.
 */
#ifndef TESTS_KVSTORE_STORE_PROCESS_H
#define TESTS_KVSTORE_STORE_PROCESS_H

#include "common/rpc/rpc.h"
#include "common/transport/transport.h"

#include <sys/types.h>

#define STORE_BYTES        (16u << 20)
#define STORE_WAIT_MS      20000
#define STORE_SHARD_TOKENS (64 * 16) /* 16 pages of 4 KiB a head, 2 x 2 heads */

struct store {
    pid_t pid;
    bool told; /* it had its SIGTERM already: a second one would not wait */
    char folder[64];
    char log[96];
    char address[64];
    char ucx[64];
    struct rk_rpc_channel *channel;
    uint64_t used_bytes; /* with the good value and the shard alone */
    uint64_t num_values;
    uint64_t peak_bytes; /* of resident memory, then */
};

/* With the value "good" and shard 1 of shard_support.h, generation 1, in it. */
void store_start(struct store *store);
/* SIGTERM if it had none, and asserts that it ends with 0. */
void store_stop(struct store *store);

/* Nothing is pinned or staged any more, the room is what it was, and a new client of this path
 * gets the good value and can put, get and drop another one. */
void store_still_good(const struct store *store, enum rk_path path);

/* How far its resident memory has ever grown above what it was at the start. */
uint64_t store_growth_bytes(const struct store *store);
int store_descriptors(const struct store *store);

/* A PutItem of a value. Returns its length. */
size_t store_head_pack(const char *key, uint64_t bytes, uint8_t ret_head[512]);

#endif
