/*
 * rk_hash_xxh3() of hash.c with the code of xxhash.h in it, for what is linked without libraries:
 * libxxhash.a lacks the functions that choose by CPU. In no other target.
 */
#define XXH_INLINE_ALL
#include "common/base/hash.h"

#include <xxhash.h>

uint64_t rk_hash_xxh3(const void *data, size_t bytes)
{
    return XXH3_64bits(data, bytes);
}
