/*
 * id: names of segments, chains and models.
 *
 * Segment id:  SHA-256 over ("redknot.segment.v1", salt, fingerprint, token ids).
 * Chain id:    exact KV of a segment behind others: SHA-256 over
 *              ("redknot.chain.v1", chain id of the part before, segment id).
 *              A chain begins at the numeric path that computed it (the part
 *              before the first segment), so chains of workers whose bits may
 *              differ are different chains.
 * Value id:    SHA-256 over ("redknot.value.v1", key).
 * Every field is hashed with its length, little endian, so none can run into
 * the next. All pure, any thread.
 */
#ifndef RK_COMMON_BASE_ID_H
#define RK_COMMON_BASE_ID_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_ID_BYTES     32
#define RK_ID_HEX_BYTES 65 /* with the final NUL */

struct rk_id {
    uint8_t bytes[RK_ID_BYTES];
};

struct rk_id rk_id_segment(const void *salt, size_t salt_bytes, const struct rk_id *fingerprint,
                           const int32_t *token_ids, size_t num_tokens);
/* parent NULL: no path and no part before; the result is the segment's own id. */
struct rk_id rk_id_chain(const struct rk_id *parent, const struct rk_id *segment);
/* key_bytes at most RK_VALUE_KEY_BYTES_MAX (value.h). */
struct rk_id rk_id_value(const void *key, size_t key_bytes);
struct rk_id rk_id_sha256(const void *data, size_t bytes);

void rk_id_to_hex(const struct rk_id *id, char ret_hex[RK_ID_HEX_BYTES]);
/* Exactly 64 hex digits, either case. */
bool rk_id_from_hex(const char *hex, struct rk_id *ret_id);
bool rk_id_equal(const struct rk_id *a, const struct rk_id *b);
bool rk_id_is_zero(const struct rk_id *id);
/* For hash tables: ids are uniform already. */
uint64_t rk_id_hash(const struct rk_id *id);

#ifdef __cplusplus
}
#endif

#endif
