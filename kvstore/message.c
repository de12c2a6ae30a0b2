#include "kvstore/message_internal.h"

#include "common/base/alloc.h"

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

enum rk_status message_header_read(const Redknot__V1__PutShardRequest__Header *wire,
                                   struct kvstore_header *ret_header, struct rk_error *error)
{
    const Redknot__V1__Shard *shard = wire->shard;
    if (!shard || !shard->layout || !shard->heads || shard->layout->page_tokens != RK_PAGE_TOKENS ||
        !message_id_read(&shard->segment_id, &ret_header->segment_id) ||
        !message_id_read(&shard->fingerprint, &ret_header->fingerprint)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "the first message needs a shard with ids of %d bytes, heads, and a "
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
    ret_header->token_ids = (const int32_t *)wire->token_ids;
    ret_header->num_token_ids = (uint32_t)wire->n_token_ids;
    ret_header->label = wire->label;
    return RK_OK;
}

enum rk_status message_extents_read(const Redknot__V1__GetPagesRequest *request,
                                    struct rk_extent **ret_extents, uint64_t *ret_pages,
                                    struct rk_error *error)
{
    if (request->n_extents > EXTENTS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "more than %u extents in one get", EXTENTS_MAX);
    }
    struct rk_extent *extents = rk_alloc_zero(request->n_extents, sizeof(*extents));
    if (!extents) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %zu extents",
                            request->n_extents);
    }
    uint64_t pages = 0;
    for (size_t i = 0; i < request->n_extents; i++) {
        const Redknot__V1__Extent *wire = request->extents[i];
        extents[i] = (struct rk_extent){.layer = wire->layer,
                                        .kv_head = wire->kv_head,
                                        .page_begin = wire->page_begin,
                                        .page_end = wire->page_end};
        pages += wire->page_end > wire->page_begin ? wire->page_end - wire->page_begin : 0;
    }
    if (pages > PAGES_MAX) {
        rk_free(extents);
        return rk_error_set(error, RK_ERR_TOO_LONG, "more than %u pages in one get", PAGES_MAX);
    }
    *ret_extents = extents;
    *ret_pages = pages;
    return RK_OK;
}
