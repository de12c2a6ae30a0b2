#include "client/kv_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/rpc/origin_message.h"

#include <string.h>

#define ABORT_TIMEOUT_MS 2000
#define PUT_ATTEMPTS     3
#define PUT_PAUSE_MS     50 /* between them */

/* redknot.v1.PutItem, packed. The caller frees *ret_head. */
static enum rk_status head_pack(const struct rk_kv_put *put, Redknot__V1__Shard *shard,
                                uint8_t **ret_head, size_t *ret_bytes)
{
    Redknot__V1__PutItem item = REDKNOT__V1__PUT_ITEM__INIT;
    Redknot__V1__PutShard what = REDKNOT__V1__PUT_SHARD__INIT;
    Redknot__V1__Origin origin;
    what.shard = shard;
    if (put->token_ids) {
        what.n_token_ids = put->num_tokens;
        what.token_ids = (uint32_t *)put->token_ids;
    }
    if (put->label) {
        what.label = (char *)put->label;
    }
    if (rk_origin_known(&put->origin)) {
        rk_origin_message_fill(&put->origin, &origin);
        what.origin = &origin;
    }
    item.what_case = REDKNOT__V1__PUT_ITEM__WHAT_SHARD;
    item.shard = &what;
    size_t bytes = redknot__v1__put_item__get_packed_size(&item);
    uint8_t *head = rk_alloc(bytes);
    if (!head) {
        return RK_ERR_NO_MEMORY;
    }
    *ret_bytes = redknot__v1__put_item__pack(&item, head);
    *ret_head = head;
    return RK_OK;
}

/* The shard's pages in the order layer, head, page, and their checksums. Its two arrays are one
 * block, freed by the caller. */
static enum rk_status pages_list(const struct rk_kv_put *put, const struct rk_head_range *heads,
                                 struct rk_put *ret_put, void **ret_block)
{
    uint64_t pages_per_head = rk_kv_pages(put->num_tokens);
    uint64_t heads_each = heads->kv_head_end - heads->kv_head_begin;
    uint64_t count = rk_head_range_heads(heads) * pages_per_head;
    const void **pages = rk_alloc(count * (sizeof(*pages) + sizeof(uint64_t)));
    if (!pages) {
        return RK_ERR_NO_MEMORY;
    }
    uint64_t *checksums = (uint64_t *)(void *)(pages + count);
    uint64_t at = 0;
    for (uint32_t layer = heads->layer_begin; layer < heads->layer_end; layer++) {
        uint64_t row = (uint64_t)layer * put->layout.num_kv_heads + heads->kv_head_begin;
        uint64_t pages_each = heads_each * pages_per_head;
        memcpy(pages + at, put->pages + row * pages_per_head, pages_each * sizeof(*pages));
        memcpy(checksums + at, put->checksums + row * pages_per_head,
               pages_each * sizeof(*checksums));
        at += pages_each;
    }
    ret_put->pages = pages;
    ret_put->checksums = checksums;
    ret_put->num_pages = count;
    ret_put->page_bytes = (uint32_t)rk_kv_page_bytes(&put->layout);
    ret_put->bytes = count * ret_put->page_bytes;
    *ret_block = pages;
    return RK_OK;
}

static enum rk_status shard_write(struct rk_kv_client *client, struct rk_put *put,
                                  const struct rk_kv_endpoint *endpoint,
                                  const struct rk_until *until, struct rk_error *error)
{
    enum rk_status status = rk_kv_pool_put(client->pool, endpoint, put, 1, until, error);
    return status == RK_OK ? put->status : status;
}

static enum rk_status put_shard(struct rk_kv_client *client, const struct rk_kv_put *put,
                                Redknot__V1__Shard *shard, const Redknot__V1__StoreEndpoint *store,
                                const struct rk_until *until, struct rk_error *error)
{
    struct rk_kv_layout layout;
    struct rk_head_range heads;
    if (!store || !rk_kv_shard_shape(shard, &layout, &heads) ||
        !rk_kv_layout_equal(&layout, &put->layout) || shard->num_tokens != put->num_tokens) {
        return rk_error_set(error, RK_ERR_INTERNAL,
                            "the coordinator placed shard %u on %s with another shape",
                            shard->shard_index, shard->node_id);
    }
    struct rk_put item = {.num_pages = 0};
    struct rk_kv_endpoint endpoint = {.node_id = NULL};
    uint8_t *head = NULL;
    void *pages = NULL;
    enum rk_status status = head_pack(put, shard, &head, &item.head_bytes);
    if (status == RK_OK) {
        status = pages_list(put, &heads, &item, &pages);
    }
    if (status == RK_OK) {
        status = rk_kv_endpoint_copy(store, &endpoint);
    }
    if (status != RK_OK) {
        (void)rk_error_set(error, status, "no memory for a put");
    } else {
        item.head = head;
        status = shard_write(client, &item, &endpoint, until, error);
    }
    rk_kv_endpoint_clear(&endpoint);
    rk_free(head);
    rk_free(pages);
    if (status != RK_OK) {
        rk_error_prefix(error, "writing shard %u to store %s at %s", shard->shard_index,
                        store->node_id, store->grpc_address);
    }
    return status;
}

static enum rk_status place(struct rk_kv_client *client, const struct rk_kv_put *put,
                            const struct rk_until *until, Redknot__V1__PlaceReply **ret_reply,
                            struct rk_error *error)
{
    Redknot__V1__PlaceRequest request = REDKNOT__V1__PLACE_REQUEST__INIT;
    Redknot__V1__KvLayout layout = REDKNOT__V1__KV_LAYOUT__INIT;
    Redknot__V1__Origin origin;
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
    if (rk_origin_known(&put->origin)) {
        rk_origin_message_fill(&put->origin, &origin);
        request.origin = &origin;
    }
    struct rk_until soon = rk_kv_metadata_until(client, until);
    enum rk_status status = rk_kv_coordinator_call(
        client, "/redknot.v1.Coordinator/Place", &request.base,
        &redknot__v1__place_reply__descriptor, &soon, (ProtobufCMessage **)ret_reply, error);
    if (status != RK_OK) {
        rk_error_prefix(error, "placing a segment at coordinator %s", client->address);
    }
    return status;
}

static enum rk_status commit(struct rk_kv_client *client, const struct rk_kv_put *put,
                             uint64_t generation, const struct rk_until *until,
                             struct rk_error *error)
{
    Redknot__V1__CommitRequest request = REDKNOT__V1__COMMIT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    request.segment_id = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)put->segment_id.bytes};
    request.generation = generation;
    enum rk_status status =
        rk_kv_coordinator_call(client, "/redknot.v1.Coordinator/Commit", &request.base,
                               &redknot__v1__commit_reply__descriptor, until, &reply, error);
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
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(ABORT_TIMEOUT_MS)};
    request.segment_id = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)put->segment_id.bytes};
    request.generation = generation;
    enum rk_status status =
        rk_kv_coordinator_call(client, "/redknot.v1.Coordinator/Abort", &request.base,
                               &redknot__v1__abort_reply__descriptor, &until, &reply, &why);
    rk_rpc_message_free(reply);
    if (status != RK_OK) {
        RK_LOG_WARN("abort_failed", "coordinator=%q reason=%q", client->address, why.text);
    }
}

static enum rk_status write_and_commit(struct rk_kv_client *client, const struct rk_kv_put *put,
                                       Redknot__V1__PlaceReply *placed,
                                       const struct rk_until *until, struct rk_error *error)
{
    for (size_t i = 0; i < placed->n_shards; i++) {
        Redknot__V1__Shard *shard = placed->shards[i];
        const Redknot__V1__StoreEndpoint *store =
            rk_kv_endpoint_find(placed->stores, placed->n_stores, shard->node_id);
        enum rk_status status = put_shard(client, put, shard, store, until, error);
        if (status != RK_OK) {
            return status;
        }
    }
    return commit(client, put, placed->shards[0]->generation, until, error);
}

static enum rk_status put_once(struct rk_kv_client *client, const struct rk_kv_put *put,
                               const struct rk_until *until, bool *ret_already, bool *ret_placed,
                               struct rk_error *error)
{
    Redknot__V1__PlaceReply *placed = NULL;
    *ret_placed = false;
    enum rk_status status = place(client, put, until, &placed, error);
    if (status != RK_OK) {
        return status;
    }
    *ret_placed = true;
    *ret_already = placed->already_committed;
    if (!*ret_already && placed->n_shards == 0) {
        status = rk_error_set(error, RK_ERR_INTERNAL, "the coordinator placed no shard");
    } else if (!*ret_already) {
        status = write_and_commit(client, put, placed, until, error);
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

enum rk_status rk_kv_put(struct rk_kv_client *client, const struct rk_kv_put *put,
                         const struct rk_until *until, bool *ret_already, struct rk_error *error)
{
    RK_ASSERT(rk_kv_layout_valid(&put->layout));
    if (rk_is_copy(client->maker)) {
        return rk_copy_refuse(error);
    }
    if (put->num_tokens == 0 || put->num_tokens > RK_SEGMENT_TOKENS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a segment has 1 to %u tokens, not %u",
                            RK_SEGMENT_TOKENS_MAX, put->num_tokens);
    }
    bool already = false;
    enum rk_status status = RK_OK;
    for (int i = 0; i < PUT_ATTEMPTS; i++) {
        bool placed = false;
        status = put_once(client, put, until, &already, &placed, error);
        if (!placed || !place_again_helps(status) ||
            rk_deadline_left_ms(until->deadline_ns) <= PUT_PAUSE_MS ||
            rk_until_over(until) != RK_OK) {
            break;
        }
        rk_clock_sleep_ms(PUT_PAUSE_MS);
    }
    if (status == RK_OK && ret_already) {
        *ret_already = already;
    }
    return status;
}
