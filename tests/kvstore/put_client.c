#include "tests/kvstore/put_client.h"

#include "common/base/alloc.h"
#include "kvstore/message_internal.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <stdio.h>
#include <string.h>

#define TIMEOUT_MS    20000
#define PAGES_A_CHUNK 5

static enum rk_status send_header(struct rk_rpc_stream *stream, const struct kvstore_header *header)
{
    struct shard_message shard;
    Redknot__V1__PutShard wire = REDKNOT__V1__PUT_SHARD__INIT;
    Redknot__V1__PutItem item = REDKNOT__V1__PUT_ITEM__INIT;
    Redknot__V1__PutItem *pointer = &item;
    Redknot__V1__PutRequest__Items items = REDKNOT__V1__PUT_REQUEST__ITEMS__INIT;
    Redknot__V1__PutRequest request = REDKNOT__V1__PUT_REQUEST__INIT;
    shard_message_fill(&shard, header, "");
    wire.shard = &shard.shard;
    wire.label = (char *)header->label;
    wire.n_token_ids = header->num_token_ids;
    wire.token_ids = (uint32_t *)header->token_ids;
    item.what_case = REDKNOT__V1__PUT_ITEM__WHAT_SHARD;
    item.shard = &wire;
    items.n_items = 1;
    items.items = &pointer;
    request.part_case = REDKNOT__V1__PUT_REQUEST__PART_ITEMS;
    request.items = &items;
    return rk_rpc_stream_send(stream, &request.base);
}

static enum rk_status send_pages(struct rk_rpc_stream *stream, const struct kvstore_header *header,
                                 int bad_page)
{
    size_t page_bytes = rk_kv_page_bytes(&header->layout);
    uint64_t pages = shard_pages(header);
    uint64_t sums[PAGES_A_CHUNK];
    uint8_t *bytes = rk_alloc(PAGES_A_CHUNK * page_bytes);
    enum rk_status status = RK_OK;
    for (uint64_t page = 0; page < pages && status == RK_OK; page += PAGES_A_CHUNK) {
        size_t count = pages - page < PAGES_A_CHUNK ? pages - page : PAGES_A_CHUNK;
        for (size_t i = 0; i < count; i++) {
            sums[i] = shard_page_fill(header, page + i, bytes + i * page_bytes);
            sums[i] += (int)(page + i) == bad_page;
        }
        Redknot__V1__PutRequest__Chunk chunk = REDKNOT__V1__PUT_REQUEST__CHUNK__INIT;
        Redknot__V1__PutRequest request = REDKNOT__V1__PUT_REQUEST__INIT;
        chunk.n_checksums = count;
        chunk.checksums = sums;
        chunk.data.data = bytes;
        chunk.data.len = count * page_bytes;
        request.part_case = REDKNOT__V1__PUT_REQUEST__PART_CHUNK;
        request.chunk = &chunk;
        status = rk_rpc_stream_send(stream, &request.base);
    }
    rk_free(bytes);
    return status;
}

enum rk_status client_put(struct rk_rpc_channel *channel, const struct kvstore_header *header,
                          int bad_page)
{
    struct rk_rpc_stream *stream = NULL;
    struct ProtobufCMessage *reply = NULL;
    enum rk_status status =
        rk_rpc_stream_open(channel, "/redknot.v1.KvStore/Put", TIMEOUT_MS, &stream, NULL);
    if (status != RK_OK) {
        return status;
    }
    bool sent = send_header(stream, header) == RK_OK &&
                send_pages(stream, header, bad_page) == RK_OK &&
                rk_rpc_stream_send_done(stream) == RK_OK;
    (void)sent; /* Whatever a send said: the call's own status is the answer. */
    enum rk_status item = RK_OK;
    if (rk_rpc_stream_recv(stream, &redknot__v1__put_reply__descriptor, &reply) == RK_OK) {
        const Redknot__V1__PutReply *results = (const Redknot__V1__PutReply *)reply;
        RK_ASSERT(results->n_results == 1);
        item = rk_status_from_name(results->results[0]->status);
    }
    rk_rpc_message_free(reply);
    status = rk_rpc_stream_finish(stream, NULL);
    rk_rpc_stream_destroy(stream);
    return status == RK_OK ? item : status;
}

enum rk_status client_end(struct rk_rpc_channel *channel, const char *method,
                          const struct kvstore_name *name)
{
    /* The three requests have the same fields. */
    Redknot__V1__CommitShardRequest request = REDKNOT__V1__COMMIT_SHARD_REQUEST__INIT;
    struct ProtobufCMessage *reply = NULL;
    char path[64];
    snprintf(path, sizeof(path), "/redknot.v1.KvStore/%s", method);
    request.segment_id.data = (uint8_t *)name->segment_id.bytes;
    request.segment_id.len = RK_ID_BYTES;
    request.generation = name->generation;
    request.shard_index = name->shard_index;
    enum rk_status status =
        rk_rpc_unary(channel, path, &request.base, &redknot__v1__commit_shard_reply__descriptor,
                     TIMEOUT_MS, &reply, NULL);
    rk_rpc_message_free(reply);
    return status;
}
