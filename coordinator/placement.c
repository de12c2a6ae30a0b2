#include "coordinator/placement.h"

#include "common/base/hash.h"
#include "common/base/status.h"

#include <math.h>
#include <string.h>

#define PLACEMENT_NODE_ID_BYTES 256

double placement_weight(uint64_t capacity_bytes, uint64_t used_bytes)
{
    uint64_t free_bytes = used_bytes < capacity_bytes ? capacity_bytes - used_bytes : 0;

    if (capacity_bytes == 0) {
        return 1.0;
    }
    return (double)free_bytes + (double)capacity_bytes / 16.0;
}

static double score(const struct rk_id *segment_id, uint32_t shard_index,
                    const struct placement_node *node)
{
    uint8_t key[RK_ID_BYTES + 4 + PLACEMENT_NODE_ID_BYTES];
    size_t node_bytes = strnlen(node->node_id, PLACEMENT_NODE_ID_BYTES);
    double uniform;

    memcpy(key, segment_id->bytes, RK_ID_BYTES);
    for (int i = 0; i < 4; i++) {
        key[RK_ID_BYTES + i] = (uint8_t)(shard_index >> (8 * i));
    }
    memcpy(key + RK_ID_BYTES + 4, node->node_id, node_bytes);
    /* 53 bits, and the half keeps it off 0 and 1, where the logarithm has no use. */
    uniform = ((double)(rk_hash_xxh3(key, RK_ID_BYTES + 4 + node_bytes) >> 11) + 0.5) * 0x1p-53;
    return -node->weight / log(uniform);
}

size_t placement_choose(const struct rk_id *segment_id, uint32_t shard_index,
                        const struct placement_node *nodes, size_t num_nodes)
{
    size_t best = 0;
    double best_score = 0.0;

    RK_ASSERT(num_nodes >= 1);
    for (size_t i = 0; i < num_nodes; i++) {
        double node_score = score(segment_id, shard_index, &nodes[i]);

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
