/*
 * Goal:   no message of redknot.v1.KvStore, however broken, makes a store read or write out of
 *         bounds, leak, or keep room that nobody owns.
 * Method: the input is a stream of messages, each behind its length in two bytes: the header of a
 *         put, its chunks of pages, an empty one, and then a get of the same shard. They go through
 * protobuf, the readers of message.c and a real store of 64 KiB, as in service.c; in the end the
 * store is emptied, and must be empty. A chunk without data stands for as many good pages as it has
 * checksums, for no fuzzer guesses those.
 */
#include "common/base/alloc.h"
#include "common/base/hash.h"
#include "kvstore/message_internal.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define ARENA_BYTES 65536

struct input {
    const uint8_t *data;
    size_t left;
};

static bool input_next(struct input *input, const uint8_t **ret_bytes, size_t *ret_count)
{
    if (input->left < 2) {
        return false;
    }
    size_t count = input->data[0] | (size_t)input->data[1] << 8;
    input->data += 2;
    input->left -= 2;
    count = count < input->left ? count : input->left;
    *ret_bytes = input->data;
    *ret_count = count;
    input->data += count;
    input->left -= count;
    return true;
}

static ProtobufCMessage *message_next(struct input *input, const ProtobufCMessageDescriptor *type)
{
    const uint8_t *bytes = NULL;
    size_t count = 0;
    return input_next(input, &bytes, &count) ? protobuf_c_message_unpack(type, NULL, count, bytes)
                                             : NULL;
}

static struct kvstore_put *put_begin(struct kvstore *store, struct input *input,
                                     struct kvstore_name *ret_name)
{
    struct kvstore_put *put = NULL;
    struct kvstore_header header = {0};
    ProtobufCMessage *message = message_next(input, &redknot__v1__put_shard_request__descriptor);
    if (!message) {
        return NULL;
    }
    const Redknot__V1__PutShardRequest *request = (const void *)message;
    if (request->part_case == REDKNOT__V1__PUT_SHARD_REQUEST__PART_HEADER &&
        message_header_read(request->header, &header, NULL) == RK_OK &&
        kvstore_put_begin(store, &header, &put, NULL) == RK_OK) {
        *ret_name = (struct kvstore_name){.segment_id = header.segment_id,
                                          .generation = header.generation,
                                          .shard_index = header.shard_index};
    }
    protobuf_c_message_free_unpacked(message, NULL);
    return put;
}

static enum rk_status put_chunk(struct kvstore_put *put, const Redknot__V1__PageChunk *chunk)
{
    static uint8_t pages[ARENA_BYTES];
    uint64_t checksums[ARENA_BYTES / KVSTORE_GRANULE_BYTES];
    size_t page_bytes = kvstore_put_page_bytes(put);
    if (chunk->data.len > 0 || chunk->n_checksums > sizeof(pages) / page_bytes) {
        return kvstore_put_pages(put, chunk->data.data, chunk->data.len, chunk->checksums,
                                 chunk->n_checksums, NULL);
    }
    for (size_t i = 0; i < chunk->n_checksums; i++) {
        checksums[i] = rk_hash_xxh3(pages + i * page_bytes, page_bytes);
    }
    return kvstore_put_pages(put, pages, chunk->n_checksums * page_bytes, checksums,
                             chunk->n_checksums, NULL);
}

/* An empty message ends the chunks. */
static enum rk_status put_pages(struct kvstore_put *put, struct input *input)
{
    const uint8_t *bytes = NULL;
    size_t count = 0;
    while (input_next(input, &bytes, &count) && count > 0) {
        enum rk_status status = RK_ERR_INVALID;
        ProtobufCMessage *message = protobuf_c_message_unpack(
            &redknot__v1__put_shard_request__descriptor, NULL, count, bytes);
        const Redknot__V1__PutShardRequest *request = (const void *)message;
        if (request && request->part_case == REDKNOT__V1__PUT_SHARD_REQUEST__PART_PAGES) {
            status = put_chunk(put, request->pages);
        }
        if (message) {
            protobuf_c_message_free_unpacked(message, NULL);
        }
        if (status != RK_OK) {
            return status;
        }
    }
    return kvstore_put_seal(put, NULL);
}

static void get(struct kvstore *store, struct input *input)
{
    static uint64_t offsets[4096];
    static uint64_t checksums[4096];
    struct kvstore_name name;
    struct rk_id fingerprint;
    const struct kvstore_shard *shard = NULL;
    struct rk_extent *extents = NULL;
    uint64_t num_pages = 0;
    ProtobufCMessage *message = message_next(input, &redknot__v1__get_pages_request__descriptor);
    if (!message) {
        return;
    }
    const Redknot__V1__GetPagesRequest *request = (const void *)message;
    if (message_name_read(&request->segment_id, request->generation, request->shard_index, &name,
                          NULL) == RK_OK &&
        message_id_read(&request->fingerprint, &fingerprint) &&
        message_extents_read(request, &extents, &num_pages, NULL) == RK_OK) {
        if (kvstore_pin(store, &name, &fingerprint, &shard) == RK_OK) {
            num_pages = sizeof(offsets) / sizeof(offsets[0]);
            if (kvstore_shard_extents(shard, extents, request->n_extents, offsets, checksums,
                                      &num_pages, NULL) == RK_OK) {
                for (uint64_t i = 0; i < num_pages; i++) {
                    RK_ASSERT(offsets[i] + kvstore_shard_page_bytes(shard) <= ARENA_BYTES);
                }
            }
            kvstore_unpin(store, shard);
        }
        rk_free(extents);
    }
    protobuf_c_message_free_unpacked(message, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct kvstore *store;
    struct input input = {data, size};
    struct kvstore_name name;
    struct kvstore_stats stats;
    if (!store) {
        struct kvstore_options options = {.dram_bytes = ARENA_BYTES, .shards_max = 4};
        RK_ASSERT(kvstore_create(&options, &store, NULL) == RK_OK);
    }
    struct kvstore_put *put = put_begin(store, &input, &name);
    if (put) {
        enum rk_status status = put_pages(put, &input);
        kvstore_put_destroy(put);
        if (status == RK_OK) {
            RK_ASSERT(kvstore_commit(store, &name, NULL) == RK_OK);
        }
        get(store, &input);
        if (status == RK_OK) {
            RK_ASSERT(kvstore_drop(store, &name) == RK_OK);
        }
    } else {
        get(store, &input);
    }
    kvstore_stats_get(store, &stats);
    RK_ASSERT(stats.used_bytes == 0 && stats.num_shards == 0 && stats.num_staged == 0 &&
              stats.num_pins == 0);
    return 0;
}
