/*
 * Goal:   no message of redknot.v1.KvStore, however broken, makes a store read or write out of
 *         bounds, leak, or keep room that nobody owns.
 * Method: the input is a stream of messages, each behind its length in two bytes: the item of a
 *         put, its chunks, an empty one, and then a get of the same shard. They go through
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
                                     struct kvstore_name *ret_name, uint64_t *ret_bytes,
                                     uint32_t *ret_page_bytes)
{
    struct kvstore_put *put = NULL;
    struct kvstore_header header = {.kind = KVSTORE_SHARD};
    ProtobufCMessage *message = message_next(input, &redknot__v1__put_item__descriptor);
    if (!message) {
        return NULL;
    }
    if (message_header_read((const void *)message, &header, NULL) == RK_OK) {
        *ret_bytes = kvstore_header_bytes(&header, ret_page_bytes);
        if (kvstore_put_begin(store, &header, &put, NULL) == RK_OK) {
            *ret_name = (struct kvstore_name){.segment_id = header.segment_id,
                                              .generation = header.generation,
                                              .shard_index = header.shard_index};
        }
        if (put && header.kind == KVSTORE_VALUE) {
            *ret_name =
                (struct kvstore_name){.segment_id = rk_id_value(header.key, header.key_bytes)};
        }
    }
    protobuf_c_message_free_unpacked(message, NULL);
    return put;
}

/* What is to come of a put. */
struct rest {
    uint64_t bytes;
    uint32_t page_bytes;
};

static enum rk_status put_chunk(struct kvstore_put *put, struct rest *rest,
                                const Redknot__V1__PutRequest__Chunk *chunk)
{
    static uint8_t pages[ARENA_BYTES];
    uint64_t checksums[64];
    uint64_t bytes = chunk->n_checksums * (uint64_t)rest->page_bytes;
    bytes = bytes < rest->bytes ? bytes : rest->bytes;
    if (chunk->data.len > 0 || chunk->n_checksums > sizeof(checksums) / sizeof(checksums[0]) ||
        bytes > sizeof(pages)) {
        rest->bytes -= chunk->data.len < rest->bytes ? chunk->data.len : rest->bytes;
        return kvstore_put_write(put, chunk->data.data, chunk->data.len, chunk->checksums,
                                 chunk->n_checksums, NULL);
    }
    for (size_t i = 0; i < chunk->n_checksums; i++) {
        uint64_t begin = i * (uint64_t)rest->page_bytes;
        uint64_t left = bytes > begin ? bytes - begin : 0;
        checksums[i] = rk_hash_xxh3(pages, left < rest->page_bytes ? left : rest->page_bytes);
    }
    rest->bytes -= bytes;
    return kvstore_put_write(put, pages, bytes, checksums, chunk->n_checksums, NULL);
}

/* An empty message ends the chunks. */
static enum rk_status put_pages(struct kvstore_put *put, struct rest *rest, struct input *input)
{
    const uint8_t *bytes = NULL;
    size_t count = 0;
    while (input_next(input, &bytes, &count) && count > 0) {
        enum rk_status status = RK_ERR_INVALID;
        ProtobufCMessage *message =
            protobuf_c_message_unpack(&redknot__v1__put_request__descriptor, NULL, count, bytes);
        const Redknot__V1__PutRequest *request = (const void *)message;
        if (request && request->part_case == REDKNOT__V1__PUT_REQUEST__PART_CHUNK) {
            status = put_chunk(put, rest, request->chunk);
        }
        if (message) {
            protobuf_c_message_free_unpacked(message, NULL);
        }
        if (status != RK_OK) {
            return status;
        }
    }
    return kvstore_put_kind(put) == KVSTORE_VALUE ? kvstore_put_commit(put, NULL)
                                                  : kvstore_put_seal(put, NULL);
}

static void pages_inside(const struct kvstore_shard *shard, const struct message_get *get)
{
    static uint64_t offsets[4096];
    static uint64_t checksums[4096];
    uint64_t num_pages = sizeof(offsets) / sizeof(offsets[0]);
    if (kvstore_shard_extents(shard, get->extents, get->num_extents, offsets, checksums, &num_pages,
                              NULL) == RK_OK) {
        for (uint64_t i = 0; i < num_pages; i++) {
            RK_ASSERT(offsets[i] + kvstore_shard_page_length(shard, get->num_extents ? 0 : i) <=
                      ARENA_BYTES);
        }
    }
}

static void get(struct kvstore *store, struct input *input)
{
    struct message_get get;
    const struct kvstore_shard *shard = NULL;
    ProtobufCMessage *message = message_next(input, &redknot__v1__get_item__descriptor);
    if (!message) {
        return;
    }
    struct message_budget budget = message_budget_new();
    if (message_get_read((const void *)message, &budget, &get, NULL) == RK_OK) {
        const struct kvstore_name name = {
            .segment_id = get.id, .generation = get.generation, .shard_index = get.shard_index};
        enum rk_status status = get.value ? kvstore_pin_value(store, &get.id, &shard)
                                          : kvstore_pin(store, &name, &get.fingerprint, &shard);
        if (status == RK_OK) {
            pages_inside(shard, &get);
            kvstore_unpin(store, shard);
        }
    }
    rk_free(get.extents);
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
    struct rest rest = {.bytes = 0};
    struct kvstore_put *put = put_begin(store, &input, &name, &rest.bytes, &rest.page_bytes);
    if (put) {
        name.kind = kvstore_put_kind(put);
        bool value = name.kind == KVSTORE_VALUE;
        enum rk_status status = put_pages(put, &rest, &input);
        kvstore_put_destroy(put);
        if (status == RK_OK && !value) {
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
    RK_ASSERT(stats.used_bytes == 0 && stats.num_shards == 0 && stats.num_values == 0 &&
              stats.num_staged == 0 && stats.num_pins == 0);
    return 0;
}
