#include "kvstore/message_internal.h"

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
