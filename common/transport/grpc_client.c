/*
 * The gRPC path: pages are streamed into one page-aligned buffer of the reader.
 */
#include "common/transport/transport_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/rpc/rpc.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <string.h>

#define BUFFER_ALIGNMENT 4096

struct grpc_client {
    struct rk_rpc_channel *channel;
};

static bool grpc_reachable(const struct rk_transport_endpoint *endpoint)
{
    return endpoint->grpc_address && endpoint->grpc_address[0] != '\0';
}

static void grpc_client_destroy(void *connection)
{
    struct grpc_client *client = connection;
    rk_rpc_channel_destroy(client->channel);
    rk_free(client);
}

/* The channel connects with the first get: that one's deadline bounds it. */
static enum rk_status grpc_connect(const struct rk_transport_endpoint *endpoint,
                                   int64_t deadline_ns, void **ret_connection,
                                   struct rk_error *error)
{
    (void)deadline_ns;
    struct grpc_client *client = rk_alloc_zero(1, sizeof(*client));
    if (!client) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a connection");
    }
    enum rk_status status = rk_rpc_channel_create(endpoint->grpc_address, &client->channel, error);
    if (status != RK_OK) {
        grpc_client_destroy(client);
        return status;
    }
    *ret_connection = client;
    return RK_OK;
}

static enum rk_status request_send(struct rk_rpc_stream *stream, const struct rk_get *get)
{
    Redknot__V1__GetPagesRequest request = REDKNOT__V1__GET_PAGES_REQUEST__INIT;
    size_t count = get->num_extents;
    Redknot__V1__Extent *extents = rk_alloc_zero(count, sizeof(*extents));
    Redknot__V1__Extent **pointers = rk_alloc_zero(count, sizeof(*pointers));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (extents && pointers) {
        for (size_t i = 0; i < count; i++) {
            redknot__v1__extent__init(&extents[i]);
            extents[i].layer = get->extents[i].layer;
            extents[i].kv_head = get->extents[i].kv_head;
            extents[i].page_begin = get->extents[i].page_begin;
            extents[i].page_end = get->extents[i].page_end;
            pointers[i] = &extents[i];
        }
        request.segment_id.data = (uint8_t *)get->segment_id.bytes;
        request.segment_id.len = RK_ID_BYTES;
        request.fingerprint.data = (uint8_t *)get->fingerprint.bytes;
        request.fingerprint.len = RK_ID_BYTES;
        request.generation = get->generation;
        request.shard_index = get->shard_index;
        request.n_extents = count;
        request.extents = pointers;
        status = rk_rpc_stream_send(stream, &request.base);
    }
    rk_free(extents);
    rk_free(pointers);
    if (status == RK_OK) {
        status = rk_rpc_stream_send_done(stream);
    }
    return status;
}

struct arrival {
    uint8_t *buffer;
    uint64_t pages_done;
    bool header_seen;
    uint32_t page_bytes;
    struct rk_pages *pages;
};

static enum rk_status header_take(struct arrival *arrival,
                                  const Redknot__V1__GetPagesReply__Header *header,
                                  struct rk_error *error)
{
    if (header->page_bytes != arrival->page_bytes) {
        return RK_MISS_FINGERPRINT; /* Another layout: of no use to this reader. */
    }
    if (arrival->header_seen || header->num_pages != arrival->pages->num_pages) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE,
                            "the store answers with %u pages instead of %llu", header->num_pages,
                            (unsigned long long)arrival->pages->num_pages);
    }
    arrival->header_seen = true;
    arrival->pages->tier = (enum rk_tier)header->tier;
    return RK_OK;
}

static enum rk_status chunk_take(struct arrival *arrival, const Redknot__V1__PageChunk *chunk,
                                 struct rk_error *error)
{
    uint64_t left = arrival->pages->num_pages - arrival->pages_done;
    uint64_t page_bytes = arrival->page_bytes;
    if (!arrival->header_seen || chunk->n_checksums > left ||
        chunk->data.len != chunk->n_checksums * page_bytes) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "the store's pages are out of order");
    }
    uint8_t *place = arrival->buffer + arrival->pages_done * page_bytes;
    if (chunk->data.len > 0) {
        memcpy(place, chunk->data.data, chunk->data.len);
    }
    for (size_t i = 0; i < chunk->n_checksums; i++) {
        arrival->pages->pages[arrival->pages_done++] =
            (struct rk_page){.data = place + i * page_bytes, .checksum = chunk->checksums[i]};
    }
    return RK_OK;
}

/* RK_ERR_NOT_FOUND: the server's last message was taken. */
static enum rk_status message_take(struct rk_rpc_stream *stream, struct arrival *arrival,
                                   struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_stream_recv(stream, &redknot__v1__get_pages_reply__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__GetPagesReply *reply = (const Redknot__V1__GetPagesReply *)message;
    switch (reply->part_case) {
    case REDKNOT__V1__GET_PAGES_REPLY__PART_HEADER:
        status = header_take(arrival, reply->header, error);
        break;
    case REDKNOT__V1__GET_PAGES_REPLY__PART_PAGES:
        status = chunk_take(arrival, reply->pages, error);
        break;
    default:
        break; /* A part of a later version. */
    }
    rk_rpc_message_free(message);
    return status;
}

static enum rk_status stream_pages(struct rk_rpc_stream *stream, const struct rk_get *get,
                                   struct arrival *arrival, struct rk_error *error)
{
    enum rk_status status = request_send(stream, get);
    while (status == RK_OK) {
        status = message_take(stream, arrival, error);
    }
    if (status == RK_MISS_FINGERPRINT || status == RK_ERR_UNAVAILABLE ||
        status == RK_ERR_NO_MEMORY) {
        rk_rpc_stream_cancel(stream);
        return status;
    }
    /* However the messages ended: the call's own status says why. */
    status = rk_rpc_stream_finish(stream, error);
    if (status == RK_OK && arrival->pages_done != arrival->pages->num_pages) {
        status = rk_error_set(error, RK_ERR_UNAVAILABLE, "the store sent too few pages");
    }
    return status;
}

static enum rk_status grpc_get(void *connection, const struct rk_get *get, uint64_t num_pages,
                               struct rk_pages *pages, struct rk_error *error)
{
    struct grpc_client *client = connection;
    struct rk_rpc_stream *stream = NULL;
    struct arrival arrival = {.page_bytes = get->page_bytes, .pages = pages};
    enum rk_status status = RK_ERR_NO_MEMORY;
    arrival.buffer = rk_alloc_aligned(BUFFER_ALIGNMENT, num_pages * get->page_bytes);
    if (!arrival.buffer) {
        return rk_error_set(error, status, "no memory for %llu pages",
                            (unsigned long long)num_pages);
    }
    status = rk_rpc_stream_open(client->channel, "/redknot.v1.KvStore/GetPages",
                                rk_deadline_left_ms(get->deadline_ns), &stream, error);
    if (status == RK_OK) {
        status = stream_pages(stream, get, &arrival, error);
    }
    rk_rpc_stream_destroy(stream);
    if (status != RK_OK) {
        rk_free(arrival.buffer);
        return status == RK_ERR_DEADLINE ? RK_MISS_DEADLINE : status;
    }
    pages->hold = arrival.buffer;
    return RK_OK;
}

static void grpc_release(void *connection, struct rk_pages *pages)
{
    (void)connection;
    rk_free(pages->hold);
}

const struct transport_ops transport_grpc = {
    .path = RK_PATH_GRPC,
    .name = "grpc",
    .reachable = grpc_reachable,
    .connect = grpc_connect,
    .get = grpc_get,
    .release = grpc_release,
    .destroy = grpc_client_destroy,
};
