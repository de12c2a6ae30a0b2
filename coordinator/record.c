#include "coordinator/record.h"

#include "common/base/address.h"
#include "common/base/alloc.h"
#include "common/base/text.h"
#include "common/rpc/origin_message.h"
#include "coordinator/coordinator.h"

#include <string.h>

static void *allocate(void *context, size_t bytes)
{
    (void)context;
    return rk_alloc(bytes);
}

static void release(void *context, void *block)
{
    (void)context;
    rk_free(block);
}

static ProtobufCAllocator allocator = {.alloc = allocate, .free = release};

void record_key(char kind, const struct rk_id *id, uint8_t ret_key[RECORD_KEY_BYTES])
{
    ret_key[0] = (uint8_t)kind;
    ret_key[1] = '/';
    memcpy(ret_key + 2, id->bytes, RK_ID_BYTES);
}

ProtobufCMessage *record_unpack(const ProtobufCMessageDescriptor *type, const void *data,
                                size_t bytes)
{
    return protobuf_c_message_unpack(type, &allocator, bytes, data);
}

void *record_pack(const ProtobufCMessage *message, size_t *ret_bytes)
{
    size_t bytes = protobuf_c_message_get_packed_size(message);
    uint8_t *data = rk_alloc(bytes + 1); /* An empty message still has an address. */

    if (data != NULL) {
        *ret_bytes = protobuf_c_message_pack(message, data);
    }
    return data;
}

ProtobufCMessage *record_copy(const ProtobufCMessage *message,
                              const ProtobufCMessageDescriptor *type)
{
    size_t bytes = 0;
    void *data = record_pack(message, &bytes);
    ProtobufCMessage *copy = NULL;

    if (data != NULL) {
        copy = record_unpack(type, data, bytes);
    }
    rk_free(data);
    return copy;
}

void record_free(ProtobufCMessage *message)
{
    if (message != NULL) {
        protobuf_c_message_free_unpacked(message, &allocator);
    }
}

/* ---- Checked conversions ---- */

bool record_id(const ProtobufCBinaryData *bytes, struct rk_id *ret_id)
{
    if (bytes->len != RK_ID_BYTES) {
        return false;
    }
    memcpy(ret_id->bytes, bytes->data, RK_ID_BYTES);
    return true;
}

bool record_layout(const Redknot__V1__KvLayout *message, struct rk_kv_layout *ret_layout)
{
    if (message == NULL || message->page_tokens != RK_PAGE_TOKENS) {
        return false;
    }
    *ret_layout = (struct rk_kv_layout){
        .num_layers = message->num_layers,
        .num_kv_heads = message->num_kv_heads,
        .head_dim = message->head_dim,
        .dtype = (enum rk_dtype)message->dtype,
    };
    return rk_kv_layout_valid(ret_layout);
}

bool record_heads(const Redknot__V1__HeadRange *message, const struct rk_kv_layout *layout,
                  struct rk_head_range *ret_heads)
{
    if (message == NULL) {
        return false;
    }
    *ret_heads = (struct rk_head_range){
        .layer_begin = message->layer_begin,
        .layer_end = message->layer_end,
        .kv_head_begin = message->kv_head_begin,
        .kv_head_end = message->kv_head_end,
    };
    return rk_head_range_valid(ret_heads, layout);
}

static bool text_fits(const char *text, size_t bytes_max)
{
    return text == NULL || strnlen(text, bytes_max + 1) <= bytes_max;
}

enum rk_status record_check_node(const Redknot__V1__NodeInfo *info, struct rk_error *error)
{
    struct rk_id fingerprint;

    if (info == NULL) {
        return rk_error_set(error, RK_ERR_INVALID, "the request names no node");
    }
    if (info->node_id[0] == '\0' || !text_fits(info->node_id, RECORD_NODE_ID_MAX)) {
        return rk_error_set(error, RK_ERR_INVALID, "a node id has 1 to %u bytes",
                            RECORD_NODE_ID_MAX);
    }
    if (info->incarnation == 0) {
        return rk_error_set(error, RK_ERR_INVALID, "node %s: the incarnation is 0", info->node_id);
    }
    if (info->role != REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE &&
        info->role != REDKNOT__V1__NODE_INFO__ROLE__ROLE_WORKER) {
        return rk_error_set(error, RK_ERR_INVALID, "node %s: role %d is neither store nor worker",
                            info->node_id, (int)info->role);
    }
    if (info->grpc_address[0] == '\0' && info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE) {
        return rk_error_set(error, RK_ERR_INVALID, "node %s: a store needs a grpc_address",
                            info->node_id);
    }
    if (info->capacity_bytes > RECORD_CAPACITY_MAX || info->used_bytes > RECORD_CAPACITY_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "node %s: no store has %llu bytes, %llu used",
                            info->node_id, (unsigned long long)info->capacity_bytes,
                            (unsigned long long)info->used_bytes);
    }
    if (!text_fits(info->grpc_address, RECORD_ADDRESS_MAX) ||
        !text_fits(info->host_id, RECORD_ADDRESS_MAX) ||
        !text_fits(info->shm_socket, RECORD_ADDRESS_MAX) ||
        !text_fits(info->ucx_address, RECORD_ADDRESS_MAX) ||
        !text_fits(info->version, RECORD_ADDRESS_MAX) ||
        !text_fits(info->model, RECORD_ADDRESS_MAX) ||
        !text_fits(info->metrics_address, RECORD_ADDRESS_MAX) ||
        !text_fits(info->numeric_path, RECORD_ADDRESS_MAX) ||
        (info->fingerprint.len != 0 && !record_id(&info->fingerprint, &fingerprint))) {
        return rk_error_set(error, RK_ERR_INVALID, "node %s: a field is too long", info->node_id);
    }
    return RK_OK;
}

enum rk_status record_check_node_text(const Redknot__V1__NodeInfo *info, struct rk_error *error)
{
    const struct {
        const char *what;
        const char *text;
        bool is_address;
    } fields[] = {
        {"node_id", info->node_id, false},
        {"grpc_address", info->grpc_address, true},
        {"ucx_address", info->ucx_address, true},
        {"metrics_address", info->metrics_address, true},
        {"host_id", info->host_id, false},
        {"shm_socket", info->shm_socket, false},
        {"version", info->version, false},
        {"model", info->model, false},
        {"numeric_path", info->numeric_path, false},
    };
    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
        enum rk_status status = rk_text_check_name(fields[i].what, fields[i].text,
                                                   strlen(fields[i].text), SIZE_MAX, error);
        if (status == RK_OK && fields[i].is_address && fields[i].text[0] != '\0') {
            status = rk_address_check(fields[i].text, RK_ADDRESS_CALL, error);
            if (status != RK_OK) {
                rk_error_prefix(error, "%s", fields[i].what);
            }
        }
        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}

enum rk_status record_check_announced(const Redknot__V1__AnnounceRequest__Entry *entry,
                                      struct index_announced *ret_announced, struct rk_error *error)
{
    const Redknot__V1__Shard *shard = entry->shard;
    struct index_announced announced = {0};

    if (shard == NULL || !record_id(&shard->segment_id, &announced.id) ||
        !record_id(&shard->fingerprint, &announced.fingerprint)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "an announced shard lacks a segment id or fingerprint of %d bytes",
                            RK_ID_BYTES);
    }
    if (!record_layout(shard->layout, &announced.layout) ||
        !record_heads(shard->heads, &announced.layout, &announced.heads)) {
        return rk_error_set(error, RK_ERR_INVALID, "an announced shard's layout is out of bounds");
    }
    if (shard->generation == 0 || shard->generation >= RECORD_GENERATION_MAX ||
        shard->num_shards == 0 || shard->num_shards > COORDINATOR_SHARDS_MAX ||
        shard->shard_index >= shard->num_shards) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "an announced shard's generation, index or count is out of bounds");
    }
    if (shard->num_tokens == 0 || shard->num_tokens > RK_SEGMENT_TOKENS_MAX ||
        (entry->n_token_ids != 0 && entry->n_token_ids != shard->num_tokens) ||
        !text_fits(entry->label, RECORD_LABEL_MAX)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "an announced shard's tokens or label are out of bounds");
    }
    announced.generation = shard->generation;
    announced.shard_index = shard->shard_index;
    announced.num_shards = shard->num_shards;
    announced.num_tokens = shard->num_tokens;
    announced.has_tokens = entry->n_token_ids != 0;
    if (!rk_origin_message_read(entry->origin, &announced.origin)) {
        return rk_error_set(error, RK_ERR_INVALID, "an announced shard's origin is malformed");
    }
    *ret_announced = announced;
    return RK_OK;
}

void record_put_layout(const struct rk_kv_layout *layout, Redknot__V1__KvLayout *ret_message)
{
    redknot__v1__kv_layout__init(ret_message);
    ret_message->num_layers = layout->num_layers;
    ret_message->num_kv_heads = layout->num_kv_heads;
    ret_message->head_dim = layout->head_dim;
    ret_message->dtype = (Redknot__V1__KvLayout__Dtype)layout->dtype;
    ret_message->page_tokens = RK_PAGE_TOKENS;
}

void record_put_heads(const struct rk_head_range *heads, Redknot__V1__HeadRange *ret_message)
{
    redknot__v1__head_range__init(ret_message);
    ret_message->layer_begin = heads->layer_begin;
    ret_message->layer_end = heads->layer_end;
    ret_message->kv_head_begin = heads->kv_head_begin;
    ret_message->kv_head_end = heads->kv_head_end;
}

ProtobufCBinaryData record_put_id(const struct rk_id *id)
{
    /* protobuf-c has no const; packing only reads. */
    return (ProtobufCBinaryData){.len = RK_ID_BYTES, .data = (uint8_t *)(uintptr_t)id->bytes};
}

/* ---- Segments in the database ---- */

struct location_messages {
    Redknot__Coordinator__V1__SegmentRecord__Location location;
    Redknot__V1__HeadRange heads;
};

enum rk_status record_encode_spec(const struct segment_spec *spec, void **ret_data,
                                  size_t *ret_bytes)
{
    Redknot__Coordinator__V1__SegmentRecord record = REDKNOT__COORDINATOR__V1__SEGMENT_RECORD__INIT;
    Redknot__V1__KvLayout layout;
    Redknot__V1__Origin origin;
    struct location_messages *messages = rk_alloc_zero(spec->num_shards, sizeof(*messages));
    Redknot__Coordinator__V1__SegmentRecord__Location **locations =
        rk_alloc_zero(spec->num_shards, sizeof(*locations));
    void *data = NULL;

    if (messages != NULL && locations != NULL) {
        for (uint32_t i = 0; i < spec->num_shards; i++) {
            const struct segment_location_spec *from = &spec->locations[i];
            Redknot__Coordinator__V1__SegmentRecord__Location *to = &messages[i].location;

            redknot__coordinator__v1__segment_record__location__init(to);
            record_put_heads(&from->heads, &messages[i].heads);
            to->node_id = (char *)(uintptr_t)(from->node_id == NULL ? "" : from->node_id);
            to->incarnation = from->incarnation;
            to->heads = &messages[i].heads;
            to->state = (Redknot__Coordinator__V1__SegmentRecord__Location__State)from->state;
            locations[i] = to;
        }
        record_put_layout(&spec->layout, &layout);
        record.segment_id = record_put_id(&spec->id);
        record.fingerprint = record_put_id(&spec->fingerprint);
        record.generation = spec->generation;
        record.layout = &layout;
        record.num_tokens = spec->num_tokens;
        record.label = (char *)(uintptr_t)(spec->label == NULL ? "" : spec->label);
        record.has_tokens = spec->has_tokens;
        if (rk_origin_known(&spec->origin)) {
            rk_origin_message_fill(&spec->origin, &origin);
            record.origin = &origin;
        }
        record.n_locations = spec->num_shards;
        record.locations = locations;
        data = record_pack(&record.base, ret_bytes);
    }
    rk_free(locations);
    rk_free(messages);
    if (data == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    *ret_data = data;
    return RK_OK;
}

enum rk_status record_encode_segment(const struct index_segment *segment, void **ret_data,
                                     size_t *ret_bytes)
{
    struct segment_location_spec *locations =
        rk_alloc_zero(segment->num_shards, sizeof(*locations));
    struct segment_spec spec = {
        .id = segment->id,
        .fingerprint = segment->fingerprint,
        .layout = segment->layout,
        .generation = segment->generation,
        .num_tokens = segment->num_tokens,
        .num_shards = segment->num_shards,
        .label = segment->label,
        .origin = segment->origin,
        .has_tokens = segment->has_tokens,
        .locations = locations,
    };
    enum rk_status status;

    if (locations == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < segment->num_shards; i++) {
        const struct index_location *from = &segment->locations[i];

        locations[i] = (struct segment_location_spec){
            .node_id = from->node == NULL ? NULL : from->node->node_id,
            .incarnation = from->incarnation,
            .heads = from->heads,
            .state = from->state,
        };
    }
    status = record_encode_spec(&spec, ret_data, ret_bytes);
    rk_free(locations);
    return status;
}

static bool decode_location(const Redknot__Coordinator__V1__SegmentRecord__Location *from,
                            const struct rk_kv_layout *layout, struct segment_location_spec *to)
{
    if (from->state < 0 || (int)from->state > LOCATION_LOST ||
        !record_heads(from->heads, layout, &to->heads)) {
        return false;
    }
    to->node_id = from->node_id;
    to->incarnation = from->incarnation;
    to->state = (enum location_state)from->state;
    return to->state != LOCATION_PRESENT ||
           (from->node_id[0] != '\0' && text_fits(from->node_id, RECORD_NODE_ID_MAX));
}

enum rk_status record_decode_segment(const void *data, size_t bytes,
                                     struct record_segment *ret_segment)
{
    struct record_segment segment = {0};
    struct segment_spec *spec = &segment.spec;
    Redknot__Coordinator__V1__SegmentRecord *message;
    enum rk_status status = RK_ERR_CORRUPT;

    message = (Redknot__Coordinator__V1__SegmentRecord *)record_unpack(
        &redknot__coordinator__v1__segment_record__descriptor, data, bytes);
    segment.message = message;
    if (message == NULL || !record_id(&message->segment_id, &spec->id) ||
        !record_id(&message->fingerprint, &spec->fingerprint) ||
        !record_layout(message->layout, &spec->layout) || message->generation == 0 ||
        message->generation >= RECORD_GENERATION_MAX || message->num_tokens == 0 ||
        message->num_tokens > RK_SEGMENT_TOKENS_MAX || message->n_locations == 0 ||
        message->n_locations > COORDINATOR_SHARDS_MAX ||
        !text_fits(message->label, RECORD_LABEL_MAX) ||
        !rk_origin_message_read(message->origin, &spec->origin)) {
        goto fail;
    }
    segment.locations = rk_alloc_zero(message->n_locations, sizeof(*segment.locations));
    if (segment.locations == NULL) {
        status = RK_ERR_NO_MEMORY;
        goto fail;
    }
    for (size_t i = 0; i < message->n_locations; i++) {
        if (!decode_location(message->locations[i], &spec->layout, &segment.locations[i])) {
            goto fail;
        }
    }
    spec->generation = message->generation;
    spec->num_tokens = message->num_tokens;
    spec->num_shards = (uint32_t)message->n_locations;
    spec->label = message->label;
    spec->has_tokens = message->has_tokens;
    spec->locations = segment.locations;
    *ret_segment = segment;
    return RK_OK;

fail:
    record_segment_free(&segment);
    return status;
}

void record_segment_free(struct record_segment *segment)
{
    rk_free(segment->locations);
    record_free(segment->message == NULL ? NULL : &segment->message->base);
    *segment = (struct record_segment){0};
}
