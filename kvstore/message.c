#include "kvstore/message_internal.h"

#include "common/base/alloc.h"
#include "common/base/value.h"
#include "common/rpc/origin_message.h"

#include <string.h>

#define EXTENTS_MAX 65536u
#define PAGES_MAX   (1u << 20) /* of one get */

void shard_message_fill(struct shard_message *message, const struct kvstore_header *header,
                        const char *node_id)
{
    Redknot__V1__Shard *shard = &message->shard;
    redknot__v1__shard__init(shard);
    redknot__v1__head_range__init(&message->heads);
    redknot__v1__kv_layout__init(&message->layout);
    message->heads.layer_begin = header->heads.layer_begin;
    message->heads.layer_end = header->heads.layer_end;
    message->heads.kv_head_begin = header->heads.kv_head_begin;
    message->heads.kv_head_end = header->heads.kv_head_end;
    message->layout.num_layers = header->layout.num_layers;
    message->layout.num_kv_heads = header->layout.num_kv_heads;
    message->layout.head_dim = header->layout.head_dim;
    message->layout.dtype = (Redknot__V1__KvLayout__Dtype)header->layout.dtype;
    message->layout.page_tokens = RK_PAGE_TOKENS;
    shard->segment_id.data = (uint8_t *)header->segment_id.bytes;
    shard->segment_id.len = RK_ID_BYTES;
    shard->fingerprint.data = (uint8_t *)header->fingerprint.bytes;
    shard->fingerprint.len = RK_ID_BYTES;
    shard->generation = header->generation;
    shard->shard_index = header->shard_index;
    shard->num_shards = header->num_shards;
    shard->heads = &message->heads;
    shard->layout = &message->layout;
    shard->num_tokens = header->num_tokens;
    shard->node_id = (char *)node_id;
}

bool message_id_read(const ProtobufCBinaryData *bytes, struct rk_id *ret_id)
{
    if (bytes->len != RK_ID_BYTES) {
        return false;
    }
    memcpy(ret_id->bytes, bytes->data, RK_ID_BYTES);
    return true;
}

enum rk_status message_name_read(const ProtobufCBinaryData *segment_id, uint64_t generation,
                                 uint32_t shard_index, struct kvstore_name *ret_name,
                                 struct rk_error *error)
{
    *ret_name = (struct kvstore_name){.generation = generation, .shard_index = shard_index};
    if (!message_id_read(segment_id, &ret_name->segment_id)) {
        return rk_error_set(error, RK_ERR_INVALID, "a segment id has %d bytes, not %zu",
                            RK_ID_BYTES, segment_id->len);
    }
    return RK_OK;
}

static enum rk_status shard_header_read(const Redknot__V1__PutShard *wire,
                                        struct kvstore_header *ret_header, struct rk_error *error)
{
    const Redknot__V1__Shard *shard = wire->shard;
    if (!shard || !shard->layout || !shard->heads || shard->layout->page_tokens != RK_PAGE_TOKENS ||
        !message_id_read(&shard->segment_id, &ret_header->segment_id) ||
        !message_id_read(&shard->fingerprint, &ret_header->fingerprint)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "a put needs a shard with ids of %d bytes, heads, and a "
                            "layout of %d tokens a page",
                            RK_ID_BYTES, RK_PAGE_TOKENS);
    }
    ret_header->generation = shard->generation;
    ret_header->shard_index = shard->shard_index;
    ret_header->num_shards = shard->num_shards;
    ret_header->num_tokens = shard->num_tokens;
    ret_header->heads = (struct rk_head_range){.layer_begin = shard->heads->layer_begin,
                                               .layer_end = shard->heads->layer_end,
                                               .kv_head_begin = shard->heads->kv_head_begin,
                                               .kv_head_end = shard->heads->kv_head_end};
    ret_header->layout = (struct rk_kv_layout){.num_layers = shard->layout->num_layers,
                                               .num_kv_heads = shard->layout->num_kv_heads,
                                               .head_dim = shard->layout->head_dim,
                                               .dtype = (enum rk_dtype)shard->layout->dtype};
    if (wire->n_token_ids > RK_SEGMENT_TOKENS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "more token ids than a segment can have");
    }
    if (!rk_origin_message_read(wire->origin, &ret_header->origin)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "an origin has ids of %d bytes and a salt tag of %d", RK_ID_BYTES,
                            RK_SALT_TAG_BYTES);
    }
    ret_header->token_ids = (const int32_t *)wire->token_ids;
    ret_header->num_token_ids = (uint32_t)wire->n_token_ids;
    ret_header->label = wire->label;
    return RK_OK;
}

enum rk_status message_header_read(const Redknot__V1__PutItem *wire,
                                   struct kvstore_header *ret_header, struct rk_error *error)
{
    if (wire->what_case == REDKNOT__V1__PUT_ITEM__WHAT_SHARD) {
        return shard_header_read(wire->shard, ret_header, error);
    }
    if (wire->what_case != REDKNOT__V1__PUT_ITEM__WHAT_VALUE) {
        return rk_error_set(error, RK_ERR_INVALID, "an item is neither a shard nor a value");
    }
    const Redknot__V1__PutValue *value = wire->value;
    if (value->key.len > UINT32_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a key of %zu bytes", value->key.len);
    }
    *ret_header = (struct kvstore_header){.kind = KVSTORE_VALUE,
                                          .key = value->key.data,
                                          .key_bytes = (uint32_t)value->key.len,
                                          .value_bytes = value->bytes};
    return RK_OK;
}

struct message_budget message_budget_new(void)
{
    return (struct message_budget){.extents = EXTENTS_MAX, .pages = PAGES_MAX};
}

static enum rk_status extents_read(const Redknot__V1__GetItem *wire, struct message_budget *budget,
                                   struct message_get *get, struct rk_error *error)
{
    if (wire->n_extents > budget->extents) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "more than %u extents in one get", EXTENTS_MAX);
    }
    get->extents = rk_alloc_zero(wire->n_extents, sizeof(*get->extents));
    if (!get->extents) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %zu extents", wire->n_extents);
    }
    get->num_extents = wire->n_extents;
    for (size_t i = 0; i < wire->n_extents; i++) {
        const Redknot__V1__Extent *extent = wire->extents[i];
        get->extents[i] = (struct rk_extent){.layer = extent->layer,
                                             .kv_head = extent->kv_head,
                                             .page_begin = extent->page_begin,
                                             .page_end = extent->page_end};
        get->num_pages +=
            extent->page_end > extent->page_begin ? extent->page_end - extent->page_begin : 0;
    }
    if (get->num_pages > budget->pages) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "more than %u pages in one get", PAGES_MAX);
    }
    budget->extents -= wire->n_extents;
    budget->pages -= get->num_pages;
    return RK_OK;
}

enum rk_status message_get_read(const Redknot__V1__GetItem *wire, struct message_budget *budget,
                                struct message_get *ret_get, struct rk_error *error)
{
    *ret_get = (struct message_get){.value = wire->value || wire->key.len > 0,
                                    .generation = wire->generation,
                                    .shard_index = wire->shard_index,
                                    .page_bytes = wire->page_bytes,
                                    .bytes_max = wire->bytes_max};
    if (wire->key.len > RK_VALUE_KEY_BYTES_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a key has at most %u bytes, not %zu",
                            RK_VALUE_KEY_BYTES_MAX, wire->key.len);
    }
    if (wire->key.len > 0) {
        ret_get->id = rk_id_value(wire->key.data, wire->key.len);
    } else if (!message_id_read(&wire->id, &ret_get->id)) {
        return rk_error_set(error, RK_ERR_INVALID, "an id has %d bytes, not %zu", RK_ID_BYTES,
                            wire->id.len);
    }
    if (ret_get->value) {
        return RK_OK;
    }
    if (!message_id_read(&wire->fingerprint, &ret_get->fingerprint)) {
        return rk_error_set(error, RK_ERR_INVALID, "a fingerprint has %d bytes", RK_ID_BYTES);
    }
    return wire->n_extents > 0 ? extents_read(wire, budget, ret_get, error) : RK_OK;
}
