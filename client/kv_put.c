#include "client/kv_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <string.h>
#include <time.h>

#define ABORT_TIMEOUT_MS 2000
#define PUT_ATTEMPTS     3
#define PUT_PAUSE_MS     50 /* between them */
/* gRPC lets go of a message when the connection that carries it ends at the latest, and its
 * keepalive ends one whose peer is silent well before this. */
#define RELEASE_TIMEOUT_MS 120000

/* Counts the messages whose pages gRPC still reads, for they belong to the caller of put. */
struct in_flight {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t messages;
};

/* One message: its header bytes, and whom to tell when it is sent. */
struct message {
    struct in_flight *in_flight;
    struct rk_rpc_part parts[1 + RK_KV_CHUNK_PAGES_MAX];
    uint8_t header[RK_KV_CHUNK_HEADER_BYTES];
};

static void in_flight_init(struct in_flight *in_flight)
{
    memset(in_flight, 0, sizeof(*in_flight));
    pthread_condattr_t attributes;
    RK_ASSERT(pthread_condattr_init(&attributes) == 0);
    RK_ASSERT(pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC) == 0);
    RK_ASSERT(pthread_cond_init(&in_flight->changed, &attributes) == 0);
    (void)pthread_condattr_destroy(&attributes);
    RK_ASSERT(pthread_mutex_init(&in_flight->lock, NULL) == 0);
}

/* Returning earlier would let the caller free pages that gRPC still reads. */
static void in_flight_wait(struct in_flight *in_flight)
{
    int64_t deadline_ns = rk_deadline_in_ms(RELEASE_TIMEOUT_MS);
    struct timespec until = {.tv_sec = deadline_ns / 1000000000,
                             .tv_nsec = deadline_ns % 1000000000};
    (void)pthread_mutex_lock(&in_flight->lock);
    while (in_flight->messages > 0) {
        int rc = pthread_cond_timedwait(&in_flight->changed, &in_flight->lock, &until);
        RK_ASSERT(rc == 0 || in_flight->messages == 0);
    }
    (void)pthread_mutex_unlock(&in_flight->lock);
    (void)pthread_mutex_destroy(&in_flight->lock);
    (void)pthread_cond_destroy(&in_flight->changed);
}

static void message_released(void *context)
{
    struct message *message = context;
    struct in_flight *in_flight = message->in_flight;
    rk_free(message);
    (void)pthread_mutex_lock(&in_flight->lock);
    in_flight->messages--;
    (void)pthread_cond_signal(&in_flight->changed);
    (void)pthread_mutex_unlock(&in_flight->lock);
}

static enum rk_status send_chunk(struct rk_rpc_stream *stream, const void *const *pages,
                                 const uint64_t *checksums, size_t num_pages, size_t page_bytes,
                                 struct in_flight *in_flight)
{
    struct message *message = rk_alloc(sizeof(*message));
    if (!message) {
        return RK_ERR_NO_MEMORY;
    }
    message->in_flight = in_flight;
    message->parts[0].data = message->header;
    message->parts[0].bytes = rk_kv_chunk_header(checksums, num_pages, page_bytes, message->header);
    for (size_t i = 0; i < num_pages; i++) {
        message->parts[1 + i] = (struct rk_rpc_part){pages[i], page_bytes};
    }
    (void)pthread_mutex_lock(&in_flight->lock);
    in_flight->messages++;
    (void)pthread_mutex_unlock(&in_flight->lock);
    return rk_rpc_stream_send_parts(stream, message->parts, 1 + num_pages, message_released,
                                    message);
}

static enum rk_status send_header(struct rk_rpc_stream *stream, const struct rk_kv_put *put,
                                  Redknot__V1__Shard *shard)
{
    Redknot__V1__PutShardRequest request = REDKNOT__V1__PUT_SHARD_REQUEST__INIT;
    Redknot__V1__PutShardRequest__Header header = REDKNOT__V1__PUT_SHARD_REQUEST__HEADER__INIT;
    header.shard = shard;
    if (put->token_ids) {
        header.n_token_ids = put->num_tokens;
        header.token_ids = (uint32_t *)put->token_ids;
    }
    if (put->label) {
        header.label = (char *)put->label;
    }
    request.part_case = REDKNOT__V1__PUT_SHARD_REQUEST__PART_HEADER;
    request.header = &header;
    return rk_rpc_stream_send(stream, &request.base);
}

/* The shard's pages in the order layer, head, page: what lies together in put->pages shares
 * messages, so a shard of all heads is one run and not one per layer. */
static enum rk_status send_pages(struct rk_rpc_stream *stream, const struct rk_kv_put *put,
                                 const struct rk_head_range *heads, struct in_flight *in_flight)
{
    size_t page_bytes = rk_kv_page_bytes(&put->layout);
    size_t chunk_pages = rk_kv_chunk_pages(page_bytes);
    uint64_t pages_per_head = rk_kv_pages(put->num_tokens);
    uint64_t heads_each = heads->kv_head_end - heads->kv_head_begin;
    bool whole = heads_each == put->layout.num_kv_heads;
    uint32_t layers_per_run = whole ? heads->layer_end - heads->layer_begin : 1;
    for (uint32_t layer = heads->layer_begin; layer < heads->layer_end; layer += layers_per_run) {
        uint64_t row = (uint64_t)layer * put->layout.num_kv_heads + heads->kv_head_begin;
        uint64_t begin = row * pages_per_head;
        uint64_t end = begin + layers_per_run * heads_each * pages_per_head;
        while (begin < end) {
            size_t count = end - begin < chunk_pages ? (size_t)(end - begin) : chunk_pages;
            enum rk_status status = send_chunk(stream, put->pages + begin, put->checksums + begin,
                                               count, page_bytes, in_flight);
            if (status != RK_OK) {
                return status;
            }
            begin += count;
        }
    }
    return RK_OK;
}

static enum rk_status put_stream(struct rk_rpc_stream *stream, const struct rk_kv_put *put,
                                 Redknot__V1__Shard *shard, const struct rk_head_range *heads,
                                 struct in_flight *in_flight)
{
    Redknot__V1__PutShardReply *reply = NULL;
    enum rk_status status = send_header(stream, put, shard);
    if (status == RK_OK) {
        status = send_pages(stream, put, heads, in_flight);
    }
    if (status == RK_OK) {
        status = rk_rpc_stream_send_done(stream);
    }
    if (status == RK_OK) {
        status = rk_rpc_stream_recv(stream, &redknot__v1__put_shard_reply__descriptor,
                                    (ProtobufCMessage **)&reply);
    }
    rk_rpc_message_free((ProtobufCMessage *)reply);
    return status;
}

static enum rk_status put_shard(const struct rk_kv_put *put, Redknot__V1__Shard *shard,
                                const Redknot__V1__StoreEndpoint *store, int64_t deadline_ns,
                                struct rk_error *error)
{
    struct rk_kv_layout layout;
    struct rk_head_range heads;
    if (!store || !rk_kv_shard_shape(shard, &layout, &heads) ||
        !rk_kv_layout_equal(&layout, &put->layout) || shard->num_tokens != put->num_tokens) {
        return rk_error_set(error, RK_ERR_INTERNAL,
                            "the coordinator placed shard %u on %s with another shape",
                            shard->shard_index, shard->node_id);
    }
    struct rk_rpc_channel *channel = NULL;
    struct rk_rpc_stream *stream = NULL;
    struct in_flight in_flight;
    in_flight_init(&in_flight);
    enum rk_status status = rk_rpc_channel_create(store->grpc_address, &channel, error);
    if (status == RK_OK) {
        status = rk_rpc_stream_open(channel, "/redknot.v1.KvStore/PutShard",
                                    rk_deadline_left_ms(deadline_ns), &stream, error);
    }
    if (status == RK_OK) {
        struct rk_error why = {.status = RK_OK};
        status = put_stream(stream, put, shard, &heads, &in_flight);
        /* When a send failed, the store's own status says why. */
        enum rk_status final = rk_rpc_stream_finish(stream, &why);
        if (final != RK_OK && (status == RK_OK || final != RK_ERR_CANCELLED)) {
            status = rk_error_set(error, final, "%s", why.text);
        } else if (status != RK_OK) {
            status = status == RK_ERR_NOT_FOUND ? RK_ERR_INTERNAL : status;
            (void)rk_error_set(error, status, "%s", rk_status_text(status));
        }
    }
    rk_rpc_stream_destroy(stream);
    rk_rpc_channel_destroy(channel);
    in_flight_wait(&in_flight);
    if (status != RK_OK) {
        rk_error_prefix(error, "writing shard %u to store %s at %s", shard->shard_index,
                        store->node_id, store->grpc_address);
    }
    return status;
}

static enum rk_status place(struct rk_kv_client *client, const struct rk_kv_put *put,
                            int timeout_ms, Redknot__V1__PlaceReply **ret_reply,
                            struct rk_error *error)
{
    Redknot__V1__PlaceRequest request = REDKNOT__V1__PLACE_REQUEST__INIT;
    Redknot__V1__KvLayout layout = REDKNOT__V1__KV_LAYOUT__INIT;
    layout.num_layers = put->layout.num_layers;
    layout.num_kv_heads = put->layout.num_kv_heads;
    layout.head_dim = put->layout.head_dim;
    layout.dtype = (Redknot__V1__KvLayout__Dtype)put->layout.dtype;
    layout.page_tokens = RK_PAGE_TOKENS;
    request.segment_id = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)put->segment_id.bytes};
    request.fingerprint = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)put->fingerprint.bytes};
    request.layout = &layout;
    request.num_tokens = put->num_tokens;
    if (put->token_ids) {
        request.n_token_ids = put->num_tokens;
        request.token_ids = (uint32_t *)put->token_ids;
    }
    if (put->label) {
        request.label = (char *)put->label;
    }
    enum rk_status status = rk_rpc_unary(client->coordinator, "/redknot.v1.Coordinator/Place",
                                         &request.base, &redknot__v1__place_reply__descriptor,
                                         timeout_ms, (ProtobufCMessage **)ret_reply, error);
    if (status != RK_OK) {
        rk_error_prefix(error, "placing a segment at coordinator %s", client->address);
    }
    return status;
}

static enum rk_status commit(struct rk_kv_client *client, const struct rk_kv_put *put,
                             uint64_t generation, int timeout_ms, struct rk_error *error)
{
    Redknot__V1__CommitRequest request = REDKNOT__V1__COMMIT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    request.segment_id = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)put->segment_id.bytes};
    request.generation = generation;
    enum rk_status status =
        rk_rpc_unary(client->coordinator, "/redknot.v1.Coordinator/Commit", &request.base,
                     &redknot__v1__commit_reply__descriptor, timeout_ms, &reply, error);
    rk_rpc_message_free(reply);
    if (status != RK_OK) {
        rk_error_prefix(error, "committing a segment at coordinator %s", client->address);
    }
    return status;
}

/* Best effort: an abandoned write is collected anyway. */
static void abort_put(struct rk_kv_client *client, const struct rk_kv_put *put, uint64_t generation)
{
    Redknot__V1__AbortRequest request = REDKNOT__V1__ABORT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    struct rk_error why = {.status = RK_OK};
    request.segment_id = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)put->segment_id.bytes};
    request.generation = generation;
    enum rk_status status =
        rk_rpc_unary(client->coordinator, "/redknot.v1.Coordinator/Abort", &request.base,
                     &redknot__v1__abort_reply__descriptor, ABORT_TIMEOUT_MS, &reply, &why);
    rk_rpc_message_free(reply);
    if (status != RK_OK) {
        RK_LOG_WARN("abort_failed", "coordinator=%q reason=%q", client->address, why.text);
    }
}

static enum rk_status write_and_commit(struct rk_kv_client *client, const struct rk_kv_put *put,
                                       Redknot__V1__PlaceReply *placed, int64_t deadline_ns,
                                       struct rk_error *error)
{
    for (size_t i = 0; i < placed->n_shards; i++) {
        Redknot__V1__Shard *shard = placed->shards[i];
        const Redknot__V1__StoreEndpoint *store =
            rk_kv_endpoint_find(placed->stores, placed->n_stores, shard->node_id);
        enum rk_status status = put_shard(put, shard, store, deadline_ns, error);
        if (status != RK_OK) {
            return status;
        }
    }
    return commit(client, put, placed->shards[0]->generation, rk_deadline_left_ms(deadline_ns),
                  error);
}

static enum rk_status put_once(struct rk_kv_client *client, const struct rk_kv_put *put,
                               int64_t deadline_ns, bool *ret_already, bool *ret_placed,
                               struct rk_error *error)
{
    int left_ms = rk_deadline_left_ms(deadline_ns);
    Redknot__V1__PlaceReply *placed = NULL;
    *ret_placed = false;
    enum rk_status status = place(
        client, put, left_ms < client->timeout_ms ? left_ms : client->timeout_ms, &placed, error);
    if (status != RK_OK) {
        return status;
    }
    *ret_placed = true;
    *ret_already = placed->already_committed;
    if (!*ret_already && placed->n_shards == 0) {
        status = rk_error_set(error, RK_ERR_INTERNAL, "the coordinator placed no shard");
    } else if (!*ret_already) {
        status = write_and_commit(client, put, placed, deadline_ns, error);
        if (status != RK_OK) {
            abort_put(client, put, placed->shards[0]->generation);
        }
    }
    rk_rpc_message_free(&placed->base);
    return status;
}

/* Somebody else stored the same in the meantime, or a node restarted under the put: what was
 * placed is void, and a new place settles it. */
static bool place_again_helps(enum rk_status status)
{
    return status == RK_ERR_EXISTS || status == RK_MISS_STALE_GENERATION ||
           status == RK_ERR_NOT_FOUND || status == RK_ERR_UNAVAILABLE;
}

enum rk_status rk_kv_put(struct rk_kv_client *client, const struct rk_kv_put *put, int timeout_ms,
                         bool *ret_already, struct rk_error *error)
{
    RK_ASSERT(rk_kv_layout_valid(&put->layout));
    if (put->num_tokens == 0 || put->num_tokens > RK_SEGMENT_TOKENS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a segment has 1 to %u tokens, not %u",
                            RK_SEGMENT_TOKENS_MAX, put->num_tokens);
    }
    int64_t deadline_ns = rk_deadline_in_ms(timeout_ms > 0 ? timeout_ms : client->timeout_ms);
    bool already = false;
    enum rk_status status = RK_OK;
    for (int i = 0; i < PUT_ATTEMPTS; i++) {
        bool placed = false;
        status = put_once(client, put, deadline_ns, &already, &placed, error);
        if (!placed || !place_again_helps(status) ||
            rk_deadline_left_ms(deadline_ns) <= PUT_PAUSE_MS) {
            break;
        }
        rk_clock_sleep_ms(PUT_PAUSE_MS);
    }
    if (status == RK_OK && ret_already) {
        *ret_already = already;
    }
    return status;
}
