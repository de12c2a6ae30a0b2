#include "tests/kvstore/shard_support.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"

#include <string.h>

struct kvstore_header shard_header(uint32_t number, uint64_t generation, uint32_t num_tokens)
{
    return (struct kvstore_header){
        .segment_id = rk_id_sha256(&number, sizeof(number)),
        .fingerprint = rk_id_sha256("model", 5),
        .generation = generation,
        .num_shards = 1,
        .heads = {.layer_end = 2, .kv_head_end = 2},
        .layout = {.num_layers = 2, .num_kv_heads = 2, .head_dim = 16, .dtype = RK_DTYPE_BF16},
        .num_tokens = num_tokens,
        .label = "a label",
    };
}

struct kvstore_name shard_name(const struct kvstore_header *header)
{
    return (struct kvstore_name){.segment_id = header->segment_id,
                                 .generation = header->generation,
                                 .shard_index = header->shard_index};
}

uint64_t shard_pages(const struct kvstore_header *header)
{
    return (uint64_t)rk_head_range_heads(&header->heads) * rk_kv_pages(header->num_tokens);
}

uint64_t shard_page_fill(const struct kvstore_header *header, uint64_t page, void *ret_bytes)
{
    size_t bytes = rk_kv_page_bytes(&header->layout);
    uint64_t value = rk_id_hash(&header->segment_id) ^ (header->generation << 32) ^ page;
    uint8_t *out = ret_bytes;
    for (size_t at = 0; at < bytes; at += sizeof(value)) {
        value = value * UINT64_C(6364136223846793005) + 1442695040888963407u;
        memcpy(out + at, &value, sizeof(value));
    }
    return rk_hash_xxh3(ret_bytes, bytes);
}

enum rk_status shard_write(struct kvstore *store, const struct kvstore_header *header, size_t step)
{
    size_t page_bytes = rk_kv_page_bytes(&header->layout);
    uint64_t pages = shard_pages(header);
    struct kvstore_put *put = NULL;
    enum rk_status status = kvstore_put_begin(store, header, &put, NULL);
    uint8_t *bytes = rk_alloc(step * page_bytes);
    uint64_t *sums = rk_alloc(step * sizeof(*sums));
    if (status == RK_OK && (!bytes || !sums)) {
        status = RK_ERR_NO_MEMORY;
    }
    for (uint64_t page = 0; page < pages && status == RK_OK; page += step) {
        size_t count = pages - page < step ? pages - page : step;
        for (size_t i = 0; i < count; i++) {
            sums[i] = shard_page_fill(header, page + i, bytes + i * page_bytes);
        }
        status = kvstore_put_write(put, bytes, count * page_bytes, sums, count, NULL);
    }
    if (status == RK_OK) {
        status = kvstore_put_seal(put, NULL);
    }
    kvstore_put_destroy(put);
    rk_free(bytes);
    rk_free(sums);
    return status;
}

enum rk_status shard_put(struct kvstore *store, const struct kvstore_header *header)
{
    enum rk_status status = shard_write(store, header, 3);
    struct kvstore_name name = shard_name(header);
    return status == RK_OK ? kvstore_commit(store, &name, NULL) : status;
}

enum rk_status shard_read(struct kvstore *store, const struct kvstore_header *header)
{
    const struct kvstore_shard *shard = NULL;
    struct kvstore_name name = shard_name(header);
    enum rk_status status = kvstore_pin(store, &name, &header->fingerprint, &shard);
    if (status != RK_OK) {
        return status;
    }
    size_t page_bytes = kvstore_shard_page_bytes(shard);
    uint8_t *expected = rk_alloc(page_bytes);
    RK_ASSERT(expected && kvstore_shard_pages(shard) == shard_pages(header));
    for (uint64_t page = 0; page < kvstore_shard_pages(shard); page++) {
        uint64_t offset = 0;
        uint64_t checksum = 0;
        kvstore_shard_page(shard, page, &offset, &checksum);
        RK_ASSERT(shard_page_fill(header, page, expected) == checksum);
        const uint8_t *bytes = (const uint8_t *)kvstore_arena(store) + offset;
        RK_ASSERT(memcmp(bytes, expected, page_bytes) == 0);
    }
    rk_free(expected);
    kvstore_unpin(store, shard);
    return RK_OK;
}
