#include "common/base/origin.h"

#include "common/base/hash.h"

#include <string.h>

struct rk_salt_tag rk_salt_tag(const void *salt, size_t salt_bytes)
{
    static const char domain[] = "redknot.salt.v1";
    uint64_t lengths[2] = {sizeof(domain) - 1, salt_bytes}; /* Fields as in id.c. */
    struct rk_sha256 *sha = rk_sha256_begin();
    struct rk_salt_tag tag;
    uint8_t digest[RK_ID_BYTES];
    rk_sha256_update(sha, &lengths[0], sizeof(lengths[0]));
    rk_sha256_update(sha, domain, sizeof(domain) - 1);
    rk_sha256_update(sha, &lengths[1], sizeof(lengths[1]));
    rk_sha256_update(sha, salt, salt_bytes);
    rk_sha256_end(sha, digest);
    memcpy(tag.bytes, digest, sizeof(tag.bytes));
    return tag;
}

bool rk_salt_tag_equal(const struct rk_salt_tag *a, const struct rk_salt_tag *b)
{
    return memcmp(a, b, sizeof(*a)) == 0;
}

bool rk_origin_known(const struct rk_origin *origin)
{
    return !rk_id_is_zero(&origin->alone);
}

bool rk_origin_is_chain(const struct rk_origin *origin)
{
    return rk_origin_known(origin) && !rk_id_is_zero(&origin->parent);
}
