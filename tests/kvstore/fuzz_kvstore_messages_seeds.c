/* Writes one good stream of messages into a folder, as a seed for fuzz_kvstore_messages. */
#include "kvstore/message_internal.h"
#include "tests/kvstore/shard_support.h"

#include <stdio.h>

static void message_write(FILE *file, const ProtobufCMessage *message)
{
    static uint8_t bytes[4096];
    RK_ASSERT(protobuf_c_message_get_packed_size(message) <= sizeof(bytes));
    size_t count = protobuf_c_message_pack(message, bytes);
    (void)fputc((int)(count & 0xff), file);
    (void)fputc((int)(count >> 8), file);
    RK_ASSERT(fwrite(bytes, 1, count, file) == count);
}

static void write_put(FILE *file, const struct kvstore_header *header)
{
    uint64_t checksums[64] = {0};
    struct shard_message message;
    Redknot__V1__PutShard shard = REDKNOT__V1__PUT_SHARD__INIT;
    Redknot__V1__PutItem item = REDKNOT__V1__PUT_ITEM__INIT;
    Redknot__V1__PutRequest__Chunk chunk = REDKNOT__V1__PUT_REQUEST__CHUNK__INIT;
    Redknot__V1__PutRequest request = REDKNOT__V1__PUT_REQUEST__INIT;

    shard_message_fill(&message, header, "store");
    shard.shard = &message.shard;
    item.what_case = REDKNOT__V1__PUT_ITEM__WHAT_SHARD;
    item.shard = &shard;
    message_write(file, &item.base);
    RK_ASSERT(shard_pages(header) <= sizeof(checksums) / sizeof(checksums[0]));
    chunk.checksums = checksums;
    chunk.n_checksums = shard_pages(header);
    request.part_case = REDKNOT__V1__PUT_REQUEST__PART_CHUNK;
    request.chunk = &chunk;
    message_write(file, &request.base);
    (void)fputc(0, file); /* The end of the put. */
    (void)fputc(0, file);
}

static void write_get(FILE *file, struct kvstore_header *header)
{
    Redknot__V1__GetItem request = REDKNOT__V1__GET_ITEM__INIT;
    Redknot__V1__Extent extent = REDKNOT__V1__EXTENT__INIT;
    Redknot__V1__Extent *extents[1] = {&extent};

    request.id = (ProtobufCBinaryData){RK_ID_BYTES, header->segment_id.bytes};
    request.fingerprint = (ProtobufCBinaryData){RK_ID_BYTES, header->fingerprint.bytes};
    request.generation = header->generation;
    request.shard_index = header->shard_index;
    extent.layer = 1;
    extent.kv_head = 1;
    extent.page_end = 1;
    request.extents = extents;
    request.n_extents = 1;
    message_write(file, &request.base);
}

static void write_value(FILE *file)
{
    uint8_t key[] = "key";
    uint64_t checksum = 0;
    Redknot__V1__PutValue value = REDKNOT__V1__PUT_VALUE__INIT;
    Redknot__V1__PutItem item = REDKNOT__V1__PUT_ITEM__INIT;
    Redknot__V1__PutRequest__Chunk chunk = REDKNOT__V1__PUT_REQUEST__CHUNK__INIT;
    Redknot__V1__PutRequest request = REDKNOT__V1__PUT_REQUEST__INIT;
    Redknot__V1__GetItem get = REDKNOT__V1__GET_ITEM__INIT;

    value.key = (ProtobufCBinaryData){3, key};
    value.bytes = 5000;
    item.what_case = REDKNOT__V1__PUT_ITEM__WHAT_VALUE;
    item.value = &value;
    message_write(file, &item.base);
    chunk.checksums = &checksum;
    chunk.n_checksums = 1;
    request.part_case = REDKNOT__V1__PUT_REQUEST__PART_CHUNK;
    request.chunk = &chunk;
    message_write(file, &request.base);
    (void)fputc(0, file);
    (void)fputc(0, file);
    get.key = value.key;
    message_write(file, &get.base);
}

static int seed_write(const char *folder, const char *name, struct kvstore_header *header)
{
    char path[4096];
    (void)snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (!file) {
        perror(path);
        return 1;
    }
    if (header) {
        write_put(file, header);
        write_get(file, header);
    } else {
        write_value(file);
    }
    return fclose(file) == 0 ? 0 : 1;
}

int main(int argc, char **argv)
{
    struct kvstore_header header = shard_header(1, 1, 70);
    if (argc != 2) {
        (void)fprintf(stderr, "usage: fuzz_kvstore_messages_seeds FOLDER\n");
        return 2;
    }
    return seed_write(argv[1], "shard", &header) || seed_write(argv[1], "value", NULL);
}
