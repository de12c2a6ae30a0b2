#include "coordinator/placement.h"

#include "common/base/rendezvous.h"
#include "common/base/status.h"

#include <string.h>

double placement_weight(uint64_t capacity_bytes, uint64_t used_bytes)
{
    uint64_t free_bytes = used_bytes < capacity_bytes ? capacity_bytes - used_bytes : 0;

    if (capacity_bytes == 0) {
        return 1.0;
    }
    return (double)free_bytes + (double)capacity_bytes / 16.0;
}

size_t placement_choose(const struct rk_id *segment_id, uint32_t shard_index,
                        const struct placement_node *nodes, size_t num_nodes)
{
    size_t best = 0;
    double best_score = 0.0;

    RK_ASSERT(num_nodes >= 1);
    for (size_t i = 0; i < num_nodes; i++) {
        double node_score =
            rk_rendezvous_score(segment_id, shard_index, nodes[i].node_id, nodes[i].weight);

        if (i == 0 || node_score > best_score ||
            (node_score == best_score && strcmp(nodes[i].node_id, nodes[best].node_id) < 0)) {
            best = i;
            best_score = node_score;
        }
    }
    return best;
}

uint32_t placement_num_shards(const struct rk_kv_layout *layout, uint32_t shards_per_segment)
{
    return shards_per_segment < layout->num_layers ? shards_per_segment : layout->num_layers;
}

struct rk_head_range placement_heads(const struct rk_kv_layout *layout, uint32_t shard_index,
                                     uint32_t num_shards)
{
    uint32_t each = layout->num_layers / num_shards;
    uint32_t extra = layout->num_layers % num_shards;
    uint32_t begin = shard_index * each + (shard_index < extra ? shard_index : extra);

    return (struct rk_head_range){
        .layer_begin = begin,
        .layer_end = begin + each + (shard_index < extra ? 1 : 0),
        .kv_head_begin = 0,
        .kv_head_end = layout->num_kv_heads,
    };
}
