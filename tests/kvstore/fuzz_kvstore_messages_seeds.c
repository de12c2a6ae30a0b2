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
    Redknot__V1__PutShardRequest__Header first = REDKNOT__V1__PUT_SHARD_REQUEST__HEADER__INIT;
    Redknot__V1__PageChunk chunk = REDKNOT__V1__PAGE_CHUNK__INIT;
    Redknot__V1__PutShardRequest request = REDKNOT__V1__PUT_SHARD_REQUEST__INIT;

    shard_message_fill(&message, header, "store");
    first.shard = &message.shard;
    request.part_case = REDKNOT__V1__PUT_SHARD_REQUEST__PART_HEADER;
    request.header = &first;
    message_write(file, &request.base);
    RK_ASSERT(shard_pages(header) <= sizeof(checksums) / sizeof(checksums[0]));
    chunk.checksums = checksums;
    chunk.n_checksums = shard_pages(header);
    request.part_case = REDKNOT__V1__PUT_SHARD_REQUEST__PART_PAGES;
    request.pages = &chunk;
    message_write(file, &request.base);
    (void)fputc(0, file); /* The end of the put. */
    (void)fputc(0, file);
}

static void write_get(FILE *file, struct kvstore_header *header)
{
    Redknot__V1__GetPagesRequest request = REDKNOT__V1__GET_PAGES_REQUEST__INIT;
    Redknot__V1__Extent extent = REDKNOT__V1__EXTENT__INIT;
    Redknot__V1__Extent *extents[1] = {&extent};

    request.segment_id = (ProtobufCBinaryData){RK_ID_BYTES, header->segment_id.bytes};
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

int main(int argc, char **argv)
{
    char path[4096];
    struct kvstore_header header = shard_header(1, 1, 70);
    if (argc != 2) {
        (void)fprintf(stderr, "usage: fuzz_kvstore_messages_seeds FOLDER\n");
        return 2;
    }
    (void)snprintf(path, sizeof(path), "%s/put_get", argv[1]);
    FILE *file = fopen(path, "wb");
    if (!file) {
        perror(path);
        return 1;
    }
    write_put(file, &header);
    write_get(file, &header);
    return fclose(file) == 0 ? 0 : 1;
}
