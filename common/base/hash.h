/*
 * hash: SHA-256 for names, XXH3-64 for page checksums.
 *
 * hash.c is the only user of libcrypto's digests and of libxxhash;
 * hash_standalone.c stands in for it where there is neither.
 * Threads: a digest belongs to one thread; the rest is pure.
 */
#ifndef RK_COMMON_BASE_HASH_H
#define RK_COMMON_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_SHA256_BYTES 32

struct rk_sha256;

/* Never NULL: aborts when libcrypto has no memory, for a name must not be wrong. */
struct rk_sha256 *rk_sha256_begin(void);
void rk_sha256_update(struct rk_sha256 *sha, const void *data, size_t bytes);
void rk_sha256_end(struct rk_sha256 *sha, uint8_t ret_digest[RK_SHA256_BYTES]); /* and frees it */

/* The digest of what lies in one piece. */
void rk_sha256_once(const void *data, size_t bytes, uint8_t ret_digest[RK_SHA256_BYTES]);

/* The checksum of a page: over all its bytes, seed 0. */
uint64_t rk_hash_xxh3(const void *data, size_t bytes);

#ifdef __cplusplus
}
#endif

#endif
