/* A small client of a store's gRPC service, for tests: puts shards, names them. */
#ifndef RK_TESTS_KVSTORE_PUT_CLIENT_H
#define RK_TESTS_KVSTORE_PUT_CLIENT_H

#include "common/rpc/rpc.h"
#include "tests/kvstore/shard_support.h"

/* Put of a shard with the bytes of shard_page_fill. bad_page: that page's checksum is wrong; -1:
 * none. */
enum rk_status client_put(struct rk_rpc_channel *channel, const struct kvstore_header *header,
                          int bad_page);
/* "CommitShard", "AbortShard" or "DropShard". */
enum rk_status client_end(struct rk_rpc_channel *channel, const char *method,
                          const struct kvstore_name *name);

#endif
