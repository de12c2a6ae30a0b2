/*
 * rendezvous: which node a key belongs to, the same for whoever asks.
 *
 * Weighted rendezvous hashing (Thaler and Ravishankar 1998; weights as in
 * Schindelhauer and Schomaker 2005): each node scores -weight / ln(u), u in
 * (0, 1) drawn from (key, index, node id); the highest wins, and ties go to the
 * smaller node id. So a node that leaves moves only its own share, and shares
 * follow the weights. Nobody needs to agree on more than the nodes and weights.
 *
 * Threads: pure.
 */
#ifndef RK_COMMON_BASE_RENDEZVOUS_H
#define RK_COMMON_BASE_RENDEZVOUS_H

#include "common/base/id.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_RENDEZVOUS_NODE_ID_BYTES 256 /* of a longer node id only so many count */

/* index tells apart what has one key: the shards of a segment, the replicas of a value.
 * weight > 0. The result is part of the placement: it must never change. */
double rk_rendezvous_score(const struct rk_id *key, uint32_t index, const char *node_id,
                           double weight);

#ifdef __cplusplus
}
#endif

#endif
