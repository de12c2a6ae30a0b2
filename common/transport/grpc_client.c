/*
 * The gRPC path: bytes are streamed. What arrives is copied once, from gRPC's
 * slices to where it belongs; what leaves is copied once into a message.
 */
#include "common/transport/grpc_wire_internal.h"
#include "common/transport/transport_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/rpc/rpc.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <string.h>

#define MESSAGE_BYTES (1u << 20) /* of data in one message of a put */
#define PARTS_MAX     256u

struct grpc_client {
    struct rk_rpc_channel *channel;
    struct arrival_buffers buffers;
    char *node_id; /* who must answer; "": whoever does */
    uint64_t incarnation;
};

static bool grpc_reachable(const struct rk_transport_endpoint *endpoint)
{
    return endpoint->grpc_address && endpoint->grpc_address[0] != '\0';
}

static void grpc_client_destroy(void *connection)
{
    struct grpc_client *client = connection;
    rk_rpc_channel_destroy(client->channel);
    arrival_buffers_destroy(&client->buffers);
    rk_free(client->node_id);
    rk_free(client);
}

/* A channel connects with its first call, so there is one: who is there, and is it the one that is
 * looked for? A process that is stopped has a port that takes connections. */
static enum rk_status greet(struct grpc_client *client, const struct rk_until *until,
                            struct rk_error *error)
{
    Redknot__V1__StoreStatusRequest request = REDKNOT__V1__STORE_STATUS_REQUEST__INIT;
    struct ProtobufCMessage *message = NULL;
    struct rk_error why = {.text = ""};
    enum rk_status status =
        rk_rpc_unary_until(client->channel, "/redknot.v1.KvStore/StoreStatus", &request.base,
                           &redknot__v1__store_status_reply__descriptor, until, &message, &why);
    if (status == RK_OK) {
        const Redknot__V1__StoreStatusReply *reply = (const Redknot__V1__StoreStatusReply *)message;
        status = transport_identity_check(client->node_id, client->incarnation, reply->node_id,
                                          reply->incarnation, error);
        rk_rpc_message_free(message);
        return status;
    }
    if (status != RK_ERR_UNAVAILABLE && status != RK_ERR_DEADLINE && status != RK_ERR_CANCELLED) {
        return RK_OK; /* It answers, if only that it is busy. */
    }
    return rk_error_set(error, status == RK_ERR_DEADLINE ? RK_ERR_UNAVAILABLE : status,
                        "the store does not answer over gRPC: %s", why.text);
}

static enum rk_status grpc_connect(const struct rk_transport_endpoint *endpoint,
                                   const struct rk_until *until, void **ret_connection,
                                   struct rk_error *error)
{
    struct grpc_client *client = rk_alloc_zero(1, sizeof(*client));
    if (!client) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a connection");
    }
    client->node_id = rk_alloc_string(endpoint->node_id ? endpoint->node_id : "");
    client->incarnation = endpoint->incarnation;
    enum rk_status status =
        client->node_id ? rk_rpc_channel_create(endpoint->grpc_address, &client->channel, error)
                        : rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a connection");
    if (status == RK_OK) {
        status = greet(client, until, error);
    }
    if (status != RK_OK) {
        grpc_client_destroy(client);
        return status;
    }
    *ret_connection = client;
    return RK_OK;
}

/* ---- Get: what is asked for ---- */

/* The messages of a request, which point to each other. */
struct get_messages {
    Redknot__V1__GetItem *items;
    Redknot__V1__GetItem **item_pointers;
    Redknot__V1__Extent *extents;
    Redknot__V1__Extent **extent_pointers;
};

static void messages_free(struct get_messages *messages)
{
    rk_free(messages->items);
    rk_free(messages->item_pointers);
    rk_free(messages->extents);
    rk_free(messages->extent_pointers);
}

static void item_fill(const struct rk_get *get, Redknot__V1__GetItem *item,
                      Redknot__V1__Extent *extents, Redknot__V1__Extent **pointers)
{
    redknot__v1__get_item__init(item);
    item->id = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)(uintptr_t)get->id.bytes};
    if (get->page_bytes == 0) {
        item->value = true;
        item->bytes_max = get->bytes_max;
        return;
    }
    item->fingerprint =
        (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)(uintptr_t)get->fingerprint.bytes};
    item->generation = get->generation;
    item->page_bytes = get->page_bytes;
    item->shard_index = get->shard_index;
    item->n_extents = get->num_extents;
    item->extents = pointers;
    for (size_t i = 0; i < get->num_extents; i++) {
        redknot__v1__extent__init(&extents[i]);
        extents[i].layer = get->extents[i].layer;
        extents[i].kv_head = get->extents[i].kv_head;
        extents[i].page_begin = get->extents[i].page_begin;
        extents[i].page_end = get->extents[i].page_end;
        pointers[i] = &extents[i];
    }
}

static enum rk_status call_open(struct grpc_client *client, const struct rk_get *gets,
                                size_t num_gets, int timeout_ms, struct rk_rpc_stream **ret_stream,
                                struct rk_error *error)
{
    Redknot__V1__GetRequest request = REDKNOT__V1__GET_REQUEST__INIT;
    size_t num_extents = 0;
    for (size_t i = 0; i < num_gets; i++) {
        num_extents += gets[i].num_extents;
    }
    struct get_messages messages = {
        .items = rk_alloc_zero(num_gets, sizeof(*messages.items)),
        .item_pointers = rk_alloc_zero(num_gets, sizeof(Redknot__V1__GetItem *)),
        .extents = rk_alloc_zero(num_extents + 1, sizeof(*messages.extents)),
        .extent_pointers = rk_alloc_zero(num_extents + 1, sizeof(Redknot__V1__Extent *))};
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (messages.items && messages.item_pointers && messages.extents && messages.extent_pointers) {
        size_t at = 0;
        for (size_t i = 0; i < num_gets; i++) {
            item_fill(&gets[i], &messages.items[i], messages.extents + at,
                      messages.extent_pointers + at);
            messages.item_pointers[i] = &messages.items[i];
            at += gets[i].num_extents;
        }
        request.n_items = num_gets;
        request.items = messages.item_pointers;
        status = rk_rpc_stream_open_with(client->channel, "/redknot.v1.KvStore/Get", &request.base,
                                         timeout_ms, ret_stream, error);
    }
    messages_free(&messages);
    return status;
}

/* ---- Get: what comes ---- */

/* Is it about what was asked for? Its checksums would match its own bytes. */
static bool item_named(const Redknot__V1__GetReply__Item *item, const struct rk_get *get)
{
    return item->id.len == RK_ID_BYTES && memcmp(item->id.data, get->id.bytes, RK_ID_BYTES) == 0 &&
           (get->page_bytes == 0 || item->generation == get->generation);
}

static enum rk_status item_take(const Redknot__V1__GetReply__Item *item, const struct rk_get *get,
                                struct rk_pages *pages, struct rk_error *error)
{
    if (!item_named(item, get)) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE,
                            "the store's answer is not to what was asked");
    }
    pages->status = rk_status_from_name(item->status);
    if (pages->status != RK_OK) {
        bool first = error && error->text[0] == '\0';
        (void)rk_error_set(first ? error : NULL, pages->status, "%s", item->error);
        return RK_OK;
    }
    if (!wire_found_fits(get, item->bytes, item->page_bytes, item->n_checksums)) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE,
                            "the store's answer is not to what was asked");
    }
    pages->pages = rk_alloc_zero(item->n_checksums, sizeof(struct rk_page));
    if (!pages->pages) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %zu pages", item->n_checksums);
    }
    for (size_t i = 0; i < item->n_checksums; i++) {
        pages->pages[i].checksum = item->checksums[i];
    }
    pages->num_pages = item->n_checksums;
    pages->page_bytes = item->page_bytes;
    pages->bytes = item->bytes;
    pages->generation = item->generation;
    pages->tier = (enum rk_tier)item->tier;
    return RK_OK;
}

/* A get as its reply comes in. */
struct incoming {
    struct grpc_client *client;
    const struct rk_get *gets;
    size_t num_gets;
    struct rk_pages *pages;
    struct rk_error *error;
    struct wire_buffer found;
    struct grpc_reply_reader reader; /* of the message under way */
    bool begun;                      /* what was found is known */
    struct arrival arrival;
    enum rk_status status; /* why the rest is of no use */
};

static enum rk_status found_take(struct incoming *incoming)
{
    Redknot__V1__GetReply__Found *found = NULL;
    enum rk_status status = rk_rpc_message_unpack(incoming->found.data, incoming->found.bytes,
                                                  &redknot__v1__get_reply__found__descriptor,
                                                  (struct ProtobufCMessage **)&found);
    if (status != RK_OK || found->n_items != incoming->num_gets) {
        status = status == RK_ERR_NO_MEMORY ? status : RK_ERR_UNAVAILABLE;
        (void)rk_error_set(incoming->error, status, "the store answers another question");
    } else {
        status = transport_identity_check(incoming->client->node_id, incoming->client->incarnation,
                                          found->node_id, found->incarnation, incoming->error);
    }
    for (size_t i = 0; status == RK_OK && i < incoming->num_gets; i++) {
        status =
            item_take(found->items[i], &incoming->gets[i], &incoming->pages[i], incoming->error);
    }
    rk_rpc_message_free((struct ProtobufCMessage *)found);
    if (status == RK_OK) {
        status = arrival_begin(&incoming->arrival, &incoming->client->buffers, incoming->gets,
                               incoming->pages, incoming->num_gets, incoming->error);
    }
    incoming->begun = status == RK_OK;
    return status;
}

static void on_piece(void *context, const void *data, size_t bytes)
{
    struct incoming *incoming = context;
    const uint8_t *piece = data;
    while (bytes > 0 && incoming->status == RK_OK) {
        const uint8_t *part = NULL;
        size_t count = 0;
        bool good = grpc_reply_read(&incoming->reader, &piece, &bytes, &part, &count);
        if (good && incoming->reader.found_whole && !incoming->begun) {
            incoming->status = found_take(incoming);
        }
        if (incoming->status == RK_OK &&
            (!good ||
             (count > 0 && (!incoming->begun || !arrival_take(&incoming->arrival, part, count))))) {
            incoming->status = rk_error_set(incoming->error, RK_ERR_UNAVAILABLE,
                                            "the store sends what was not asked for");
        }
    }
}

static enum rk_status reply_recv(struct rk_rpc_stream *stream, struct incoming *incoming)
{
    while (!incoming->begun || incoming->arrival.done < incoming->arrival.total) {
        incoming->reader =
            (struct grpc_reply_reader){.found = &incoming->found, .found_whole = incoming->begun};
        enum rk_status status = rk_rpc_stream_recv_pieces(stream, on_piece, incoming);
        if (status == RK_OK) {
            status = incoming->status;
        }
        if (status == RK_OK && !grpc_reply_whole(&incoming->reader)) {
            status = rk_error_set(incoming->error, RK_ERR_UNAVAILABLE,
                                  "a message of the store is cut off");
        }
        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}

/* A status of our own, for which the call has to be given up. */
static bool ours(enum rk_status status)
{
    return status == RK_ERR_UNAVAILABLE || status == RK_ERR_NO_MEMORY;
}

static enum rk_status exchange(struct rk_rpc_stream *stream, struct incoming *incoming)
{
    enum rk_status status = reply_recv(stream, incoming);
    if (ours(status)) {
        rk_rpc_stream_cancel(stream);
        return status;
    }
    if (status == RK_OK) {
        return RK_OK; /* All bytes are here, whatever is said behind them. */
    }
    /* However the messages ended: the call's own status says why. */
    enum rk_status final = rk_rpc_stream_finish(stream, incoming->error);
    return final == RK_OK
               ? rk_error_set(incoming->error, RK_ERR_UNAVAILABLE, "the store sent too few bytes")
               : final;
}

/* A call that was cancelled for its caller ends in many ways; they all mean this. */
static enum rk_status given_up(enum rk_status status, const struct rk_until *until)
{
    return status != RK_OK && rk_until_over(until) == RK_ERR_CANCELLED ? RK_ERR_CANCELLED : status;
}

static enum rk_status grpc_get(void *connection, const struct rk_get *gets, size_t num_gets,
                               const struct rk_until *until, struct rk_pages *pages,
                               struct rk_error *error)
{
    struct grpc_client *client = connection;
    struct rk_rpc_stream *stream = NULL;
    struct incoming incoming = {
        .client = client, .gets = gets, .num_gets = num_gets, .pages = pages, .error = error};
    enum rk_status status =
        call_open(client, gets, num_gets, rk_deadline_left_ms(until->deadline_ns), &stream, error);
    if (status == RK_OK) {
        rk_rpc_stream_watch(stream, until);
        status = exchange(stream, &incoming);
    }
    rk_rpc_stream_destroy(stream);
    rk_free(incoming.found.data);
    return given_up(status, until);
}

static void grpc_release(void *connection, struct rk_pages *pages, size_t num_pages)
{
    struct grpc_client *client = connection;
    arrival_release(&client->buffers, pages, num_pages);
}

/* ---- Put ---- */

/* The message is a copy: gRPC may hold on to it after the put is over, when the socket takes no
 * more, and the pages are their owner's again by then. */
static enum rk_status chunk_send(struct rk_rpc_stream *stream, const struct wire_frame *frame)
{
    uint8_t *message = rk_alloc(GRPC_CHUNK_HEADER_BYTES + frame->bytes);
    if (!message) {
        return RK_ERR_NO_MEMORY;
    }
    size_t bytes = grpc_chunk_header(frame->checksums, frame->num_checksums, frame->bytes, message);
    for (size_t i = 0; i < frame->num_parts; i++) {
        memcpy(message + bytes, frame->parts[i].iov_base, frame->parts[i].iov_len);
        bytes += frame->parts[i].iov_len;
    }
    const struct rk_rpc_part part = {message, bytes};
    return rk_rpc_stream_send_parts(stream, &part, 1, rk_free, message);
}

static enum rk_status put_send(struct rk_rpc_stream *stream, const struct rk_put *puts,
                               size_t num_puts)
{
    struct wire_outflow outflow = {.puts = puts, .num_puts = num_puts};
    struct iovec parts[PARTS_MAX];
    struct wire_frame frame = {.parts = parts, .parts_max = PARTS_MAX};
    struct wire_buffer items = {.bytes = 0};
    grpc_items_append(&items, puts, num_puts);
    if (items.failed) {
        rk_free(items.data);
        return RK_ERR_NO_MEMORY;
    }
    const struct rk_rpc_part head = {items.data, items.bytes};
    enum rk_status status = rk_rpc_stream_send_parts(stream, &head, 1, rk_free, items.data);
    while (status == RK_OK && wire_outflow_next(&outflow, MESSAGE_BYTES, &frame)) {
        status = chunk_send(stream, &frame);
    }
    return status == RK_OK ? rk_rpc_stream_send_done(stream) : status;
}

static enum rk_status results_recv(const struct grpc_client *client, struct rk_rpc_stream *stream,
                                   struct rk_put *puts, size_t num_puts, struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_stream_recv(stream, &redknot__v1__put_reply__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__PutReply *reply = (const Redknot__V1__PutReply *)message;
    if (reply->n_results != num_puts) {
        status = rk_error_set(error, RK_ERR_UNAVAILABLE, "the store's answer to a put is none");
    } else {
        status = transport_identity_check(client->node_id, client->incarnation, reply->node_id,
                                          reply->incarnation, error);
    }
    for (size_t i = 0; status == RK_OK && i < num_puts; i++) {
        const Redknot__V1__PutReply__Result *result = reply->results[i];
        puts[i].status = rk_status_from_name(result->status);
        if (puts[i].status != RK_OK && error && error->text[0] == '\0') {
            (void)rk_error_set(error, puts[i].status, "%s", result->error);
        }
    }
    rk_rpc_message_free(message);
    return status;
}

static enum rk_status grpc_put(void *connection, struct rk_put *puts, size_t num_puts,
                               const struct rk_until *until, struct rk_error *error)
{
    struct grpc_client *client = connection;
    struct rk_rpc_stream *stream = NULL;
    enum rk_status status =
        rk_rpc_stream_open(client->channel, "/redknot.v1.KvStore/Put",
                           rk_deadline_left_ms(until->deadline_ns), &stream, error);
    if (status != RK_OK) {
        return status;
    }
    rk_rpc_stream_watch(stream, until);
    status = put_send(stream, puts, num_puts);
    bool answered = false;
    if (status == RK_OK) {
        status = results_recv(client, stream, puts, num_puts, error);
        answered = status == RK_OK;
    }
    struct rk_error why = {.text = ""};
    /* When a send failed, the store's own status says why. */
    enum rk_status final = rk_rpc_stream_finish(stream, &why);
    if (!answered && final != RK_OK && final != RK_ERR_CANCELLED) {
        status = rk_error_set(error, final, "%s", why.text);
    } else if (status == RK_ERR_NOT_FOUND) {
        status = rk_error_set(error, RK_ERR_UNAVAILABLE, "the store did not answer a put");
    }
    rk_rpc_stream_destroy(stream);
    return given_up(status, until);
}

const struct transport_ops transport_grpc = {
    .path = RK_PATH_GRPC,
    .name = "grpc",
    .reachable = grpc_reachable,
    .connect = grpc_connect,
    .get = grpc_get,
    .release = grpc_release,
    .put = grpc_put,
    .destroy = grpc_client_destroy,
};
