#include "common/base/rendezvous.h"

#include "common/base/hash.h"

#include <math.h>
#include <string.h>

double rk_rendezvous_score(const struct rk_id *key, uint32_t index, const char *node_id,
                           double weight)
{
    uint8_t bytes[RK_ID_BYTES + 4 + RK_RENDEZVOUS_NODE_ID_BYTES];
    size_t node_bytes = strnlen(node_id, RK_RENDEZVOUS_NODE_ID_BYTES);
    double uniform;

    memcpy(bytes, key->bytes, RK_ID_BYTES);
    for (int i = 0; i < 4; i++) {
        bytes[RK_ID_BYTES + i] = (uint8_t)(index >> (8 * i));
    }
    memcpy(bytes + RK_ID_BYTES + 4, node_id, node_bytes);
    /* 53 bits, and the half keeps it off 0 and 1, where the logarithm has no use. */
    uniform = ((double)(rk_hash_xxh3(bytes, RK_ID_BYTES + 4 + node_bytes) >> 11) + 0.5) * 0x1p-53;
    return -weight / log(uniform);
}
