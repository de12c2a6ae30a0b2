#include "common/base/id.h"

#include "common/base/hash.h"
#include "common/base/status.h"
#include "common/base/value.h"

#include <string.h>

static void hash_field(struct rk_sha256 *sha, const void *data, size_t bytes)
{
    uint64_t length = bytes; /* little endian: every machine that we build for is */
    rk_sha256_update(sha, &length, sizeof(length));
    rk_sha256_update(sha, data, bytes);
}

static struct rk_sha256 *begin(const char *domain)
{
    struct rk_sha256 *sha = rk_sha256_begin();
    hash_field(sha, domain, strlen(domain));
    return sha;
}

struct rk_id rk_id_segment(const void *salt, size_t salt_bytes, const struct rk_id *fingerprint,
                           const int32_t *token_ids, size_t num_tokens)
{
    struct rk_id id;
    struct rk_sha256 *sha = begin("redknot.segment.v1");
    hash_field(sha, salt, salt_bytes);
    hash_field(sha, fingerprint->bytes, RK_ID_BYTES);
    hash_field(sha, token_ids, num_tokens * sizeof(*token_ids));
    rk_sha256_end(sha, id.bytes);
    return id;
}

struct rk_id rk_id_chain(const struct rk_id *parent, const struct rk_id *segment)
{
    if (!parent) {
        return *segment;
    }
    struct rk_id id;
    struct rk_sha256 *sha = begin("redknot.chain.v1");
    hash_field(sha, parent->bytes, RK_ID_BYTES);
    hash_field(sha, segment->bytes, RK_ID_BYTES);
    rk_sha256_end(sha, id.bytes);
    return id;
}

/* The same fields in one piece, for values are many and their keys short. */
struct rk_id rk_id_value(const void *key, size_t key_bytes)
{
    static const char domain[] = "redknot.value.v1";
    uint8_t fields[2 * sizeof(uint64_t) + sizeof(domain) - 1 + RK_VALUE_KEY_BYTES_MAX];
    uint64_t lengths[] = {sizeof(domain) - 1, key_bytes};
    struct rk_id id;
    RK_ASSERT(key_bytes <= RK_VALUE_KEY_BYTES_MAX);
    uint8_t *at = fields;
    memcpy(at, &lengths[0], sizeof(uint64_t));
    at += sizeof(uint64_t);
    memcpy(at, domain, lengths[0]);
    at += lengths[0];
    memcpy(at, &lengths[1], sizeof(uint64_t));
    at += sizeof(uint64_t);
    memcpy(at, key, key_bytes);
    rk_sha256_once(fields, (size_t)(at - fields) + key_bytes, id.bytes);
    return id;
}

struct rk_id rk_id_sha256(const void *data, size_t bytes)
{
    struct rk_id id;
    rk_sha256_once(data, bytes, id.bytes);
    return id;
}

void rk_id_to_hex(const struct rk_id *id, char ret_hex[RK_ID_HEX_BYTES])
{
    static const char digits[] = "0123456789abcdef";
    for (int i = 0; i < RK_ID_BYTES; i++) {
        ret_hex[2 * i] = digits[id->bytes[i] >> 4];
        ret_hex[2 * i + 1] = digits[id->bytes[i] & 15];
    }
    ret_hex[2 * RK_ID_BYTES] = '\0';
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool rk_id_from_hex(const char *hex, struct rk_id *ret_id)
{
    struct rk_id id;
    if (strlen(hex) != (size_t)2 * RK_ID_BYTES) {
        return false;
    }
    for (int i = 0; i < RK_ID_BYTES; i++) {
        int high = hex_digit(hex[2 * i]);
        int low = hex_digit(hex[2 * i + 1]);
        if (high < 0 || low < 0) {
            return false;
        }
        id.bytes[i] = (uint8_t)(high << 4 | low);
    }
    *ret_id = id;
    return true;
}

bool rk_id_equal(const struct rk_id *a, const struct rk_id *b)
{
    return memcmp(a, b, sizeof(*a)) == 0;
}

bool rk_id_is_zero(const struct rk_id *id)
{
    static const struct rk_id zero;
    return rk_id_equal(id, &zero);
}

uint64_t rk_id_hash(const struct rk_id *id)
{
    uint64_t hash;
    memcpy(&hash, id->bytes, sizeof(hash));
    return hash;
}
