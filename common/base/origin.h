/*
 * origin: what KV was computed from, so that who drops a segment drops all that stems from it.
 *
 * KV of a segment alone depends on that segment only; KV of a chain depends on all segments before
 * it, too, and its id (common/base/id.h) is a hash that does not say of which. The origin says so,
 * and tells tenants apart without telling their salts. It also names the arithmetic that computed
 * the KV (the worker's numeric path): only who does the same may take it for exact.
 *
 * Threads: pure.
 */
#ifndef RK_COMMON_BASE_ORIGIN_H
#define RK_COMMON_BASE_ORIGIN_H

#include "common/base/id.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RK_SALT_TAG_BYTES 16

struct rk_salt_tag {
    uint8_t bytes[RK_SALT_TAG_BYTES];
};

struct rk_origin {       /* zeroed: not known */
    struct rk_id alone;  /* id of the segment alone */
    struct rk_id parent; /* what it continues: a chain, the first segment, or, at position 0 and
                            under an id of its own path, that path; zero: it is the segment alone */
    struct rk_salt_tag salt_tag;
    struct rk_id numeric_path; /* the arithmetic that computed it; zero: not known */
};

/* The first bytes of SHA-256 over ("redknot.salt.v1", salt); also of no salt. */
struct rk_salt_tag rk_salt_tag(const void *salt, size_t salt_bytes);
bool rk_salt_tag_equal(const struct rk_salt_tag *a, const struct rk_salt_tag *b);
bool rk_origin_known(const struct rk_origin *origin);
/* Computed behind other segments. False when it is not known. */
bool rk_origin_is_chain(const struct rk_origin *origin);

#ifdef __cplusplus
}
#endif

#endif
