/*
 * placement: which store node gets a shard.
 *
 * Weighted rendezvous hashing (common/base/rendezvous.h) over segment id and
 * shard index: a node that leaves moves only its own share, and shares follow
 * the weights.
 *
 * Threads: pure.
 */
#ifndef RK_COORDINATOR_PLACEMENT_H
#define RK_COORDINATOR_PLACEMENT_H

#include "common/base/id.h"
#include "common/base/kv_layout.h"

struct placement_node {
    const char *node_id;
    double weight; /* > 0 */
};

/* Free room counts; a full node keeps a share, for it may evict. Capacity 0 (not said): 1. */
double placement_weight(uint64_t capacity_bytes, uint64_t used_bytes);
/* Index into nodes. num_nodes >= 1. Ties go to the smaller node id. */
size_t placement_choose(const struct rk_id *segment_id, uint32_t shard_index,
                        const struct placement_node *nodes, size_t num_nodes);
/* Never more shards than layers. */
uint32_t placement_num_shards(const struct rk_kv_layout *layout, uint32_t shards_per_segment);
/* Contiguous layers, all KV heads; the first shards are the larger ones by at most one layer. */
struct rk_head_range placement_heads(const struct rk_kv_layout *layout, uint32_t shard_index,
                                     uint32_t num_shards);

#endif
