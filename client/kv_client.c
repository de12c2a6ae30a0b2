#include "client/kv_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/rpc/origin_message.h"

#include <string.h>

enum rk_status rk_kv_client_create(const struct rk_kv_client_options *options,
                                   struct rk_kv_client **ret_client, struct rk_error *error)
{
    struct rk_kv_client *client = rk_alloc_zero(1, sizeof(*client));
    if (!client) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "making a KV client: out of memory");
    }
    client->timeout_ms = options->timeout_ms > 0 ? options->timeout_ms : RK_KV_TIMEOUT_MS;
    RK_ASSERT(pthread_mutex_init(&client->lock, NULL) == 0);
    client->maker = getpid();
    const struct rk_kv_pool_options pool = {.path = options->path};
    enum rk_status status = rk_kv_pool_create(&pool, &client->pool);
    if (status != RK_OK) {
        (void)rk_error_set(error, status, "making a KV client: %s", rk_status_text(status));
        goto fail;
    }
    client->address = rk_alloc_string(options->coordinator);
    if (!client->address) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "making a KV client: out of memory");
        goto fail;
    }
    status = rk_rpc_channel_create(options->coordinator, &client->coordinator, error);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_client = client;
    return RK_OK;

fail:
    rk_kv_client_destroy(client);
    return status;
}

void rk_kv_client_destroy(struct rk_kv_client *client)
{
    if (!client || rk_is_copy(client->maker)) {
        return;
    }
    rk_rpc_channel_destroy(client->coordinator);
    rk_kv_pool_destroy(client->pool);
    (void)pthread_mutex_destroy(&client->lock);
    rk_free(client->address);
    rk_free(client);
}

struct rk_until rk_kv_metadata_until(const struct rk_kv_client *client,
                                     const struct rk_until *until)
{
    return rk_until_sooner(until, rk_deadline_in_ms(client->timeout_ms));
}

/* False: the coordinator did not answer a moment ago. Who asks after that asks alone. */
static bool coordinator_may_ask(struct rk_kv_client *client)
{
    (void)pthread_mutex_lock(&client->lock);
    bool may = client->coordinator_failures == 0 || rk_clock_ns() >= client->coordinator_retry_ns;
    if (may && client->coordinator_failures > 0) {
        client->coordinator_retry_ns = rk_deadline_in_ms(client->timeout_ms);
    }
    (void)pthread_mutex_unlock(&client->lock);
    return may;
}

static void coordinator_asked(struct rk_kv_client *client, enum rk_status status, int64_t begin_ns,
                              const struct rk_error *why)
{
    bool late = rk_clock_ns() - begin_ns > RK_KV_HURRY_MS * INT64_C(1000000);
    (void)pthread_mutex_lock(&client->lock);
    /* "No store is alive" is an answer, and the next one may be another. */
    bool refused = status == RK_ERR_UNAVAILABLE && !why->answered;
    if (refused || (status == RK_ERR_DEADLINE && late)) {
        int64_t pause_ms = rk_kv_backoff_ms(client->coordinator_failures);
        if (client->coordinator_failures++ == 0) {
            RK_LOG_WARN("coordinator_down", "coordinator=%q status=%s reason=%q", client->address,
                        rk_status_name(status), why->text);
        }
        client->coordinator_retry_ns = rk_deadline_in_ms(pause_ms);
    } else if (status == RK_ERR_DEADLINE || status == RK_ERR_CANCELLED) {
        client->coordinator_retry_ns = 0; /* It learned nothing: the next one may ask. */
    } else {
        client->coordinator_failures = 0;
    }
    (void)pthread_mutex_unlock(&client->lock);
}

enum rk_status rk_kv_coordinator_call(struct rk_kv_client *client, const char *path,
                                      const ProtobufCMessage *request,
                                      const ProtobufCMessageDescriptor *type,
                                      const struct rk_until *until, ProtobufCMessage **ret_reply,
                                      struct rk_error *error)
{
    if (!coordinator_may_ask(client)) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "it did not answer a moment ago");
    }
    int64_t begin_ns = rk_clock_ns();
    struct rk_error why = {.text = ""};
    enum rk_status status =
        rk_rpc_unary_until(client->coordinator, path, request, type, until, ret_reply, &why);
    coordinator_asked(client, status, begin_ns, &why);
    if (error && status != RK_OK) {
        *error = why;
    }
    return status;
}

void rk_kv_endpoint_clear(struct rk_kv_endpoint *endpoint)
{
    rk_free(endpoint->node_id);
    rk_free(endpoint->address);
    rk_free(endpoint->host_id);
    rk_free(endpoint->shm_socket);
    rk_free(endpoint->ucx_address);
    memset(endpoint, 0, sizeof(*endpoint));
}

enum rk_status rk_kv_endpoint_copy(const Redknot__V1__StoreEndpoint *from,
                                   struct rk_kv_endpoint *ret_endpoint)
{
    struct rk_kv_endpoint copy = {.incarnation = from->incarnation,
                                  .node_id = rk_alloc_string(from->node_id),
                                  .address = rk_alloc_string(from->grpc_address),
                                  .host_id = rk_alloc_string(from->host_id),
                                  .shm_socket = rk_alloc_string(from->shm_socket),
                                  .ucx_address = rk_alloc_string(from->ucx_address)};
    if (!copy.node_id || !copy.address || !copy.host_id || !copy.shm_socket || !copy.ucx_address) {
        rk_kv_endpoint_clear(&copy);
        return RK_ERR_NO_MEMORY;
    }
    *ret_endpoint = copy;
    return RK_OK;
}

const Redknot__V1__StoreEndpoint *rk_kv_endpoint_find(Redknot__V1__StoreEndpoint *const *stores,
                                                      size_t num_stores, const char *node_id)
{
    for (size_t i = 0; i < num_stores; i++) {
        if (strcmp(stores[i]->node_id, node_id) == 0) {
            return stores[i];
        }
    }
    return NULL;
}

bool rk_kv_shard_shape(const Redknot__V1__Shard *shard, struct rk_kv_layout *ret_layout,
                       struct rk_head_range *ret_heads)
{
    if (!shard->layout || !shard->heads || shard->layout->page_tokens != RK_PAGE_TOKENS) {
        return false;
    }
    struct rk_kv_layout layout = {.num_layers = shard->layout->num_layers,
                                  .num_kv_heads = shard->layout->num_kv_heads,
                                  .head_dim = shard->layout->head_dim,
                                  .dtype = (enum rk_dtype)shard->layout->dtype};
    struct rk_head_range heads = {.layer_begin = shard->heads->layer_begin,
                                  .layer_end = shard->heads->layer_end,
                                  .kv_head_begin = shard->heads->kv_head_begin,
                                  .kv_head_end = shard->heads->kv_head_end};
    if (!rk_kv_layout_valid(&layout) || !rk_head_range_valid(&heads, &layout)) {
        return false;
    }
    *ret_layout = layout;
    *ret_heads = heads;
    return true;
}

static void shards_free(struct rk_kv_shards *shards)
{
    if (!shards) {
        return;
    }
    for (uint32_t i = 0; i < shards->count; i++) {
        rk_kv_endpoint_clear(&shards->shards[i].endpoint);
    }
    rk_free(shards);
}

void rk_kv_locations_free(struct rk_kv_location *locations, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        rk_free(locations[i].token_ids);
        rk_free(locations[i].label);
        shards_free(locations[i].shards);
        memset(&locations[i], 0, sizeof(locations[i]));
    }
}

/* RK_MISS_NODE_DOWN when no store of the reply holds a shard, RK_MISS_ABSENT when the reply makes
 * no sense: both end in computing. */
static enum rk_status shards_take(const Redknot__V1__LocateReply *reply,
                                  const Redknot__V1__LocateReply__Location *from,
                                  const struct rk_id *fingerprint, struct rk_kv_shards **ret_shards)
{
    if (from->n_shards == 0 || from->n_shards > RK_KV_SHARDS_MAX) {
        return RK_MISS_ABSENT;
    }
    struct rk_kv_shards *shards =
        rk_alloc_zero(1, sizeof(*shards) + from->n_shards * sizeof(shards->shards[0]));
    if (!shards) {
        return RK_ERR_NO_MEMORY;
    }
    shards->fingerprint = *fingerprint;
    enum rk_status status = RK_OK;
    for (size_t i = 0; i < from->n_shards; i++) {
        const Redknot__V1__Shard *shard = from->shards[i];
        struct rk_kv_shard *to = &shards->shards[shards->count];
        const Redknot__V1__StoreEndpoint *store =
            rk_kv_endpoint_find(reply->stores, reply->n_stores, shard->node_id);
        if (!rk_kv_shard_shape(shard, &to->layout, &to->heads) ||
            shard->num_tokens != from->shards[0]->num_tokens ||
            shard->num_tokens > RK_SEGMENT_TOKENS_MAX) {
            RK_LOG_WARN("locate_reply_malformed", "node=%q shard=%u", shard->node_id,
                        shard->shard_index);
            status = RK_MISS_ABSENT;
            goto fail;
        }
        if (!store) {
            status = RK_MISS_NODE_DOWN;
            goto fail;
        }
        status = rk_kv_endpoint_copy(store, &to->endpoint);
        if (status != RK_OK) {
            goto fail;
        }
        to->generation = shard->generation;
        to->shard_index = shard->shard_index;
        shards->count++;
    }
    *ret_shards = shards;
    return RK_OK;

fail:
    shards_free(shards);
    return status;
}

/* Fills all but segment_id; what it filled belongs to the location, also on failure. */
static enum rk_status location_take(const Redknot__V1__LocateReply *reply,
                                    const Redknot__V1__LocateReply__Location *from,
                                    const struct rk_id *fingerprint, bool with_token_ids,
                                    struct rk_kv_location *location)
{
    location->status = RK_OK;
    if (from->miss[0]) {
        enum rk_status miss = rk_status_from_name(from->miss);
        location->status = rk_status_is_miss(miss) ? miss : RK_MISS_ABSENT;
    } else {
        struct rk_kv_shards *shards = NULL;
        enum rk_status status = shards_take(reply, from, fingerprint, &shards);
        if (status == RK_ERR_NO_MEMORY) {
            return status;
        }
        location->status = status;
        location->shards = shards;
    }
    if (from->n_shards > 0 && from->shards[0]->num_tokens <= RK_SEGMENT_TOKENS_MAX) {
        location->num_tokens = from->shards[0]->num_tokens;
    }
    if (from->label[0]) {
        location->label = rk_alloc_string(from->label);
        if (!location->label) {
            return RK_ERR_NO_MEMORY;
        }
    }
    if (!rk_origin_message_read(from->origin, &location->origin)) {
        RK_LOG_WARN("locate_reply_malformed", "field=origin");
    }
    bool ids_fit = from->n_token_ids > 0 && from->n_token_ids <= RK_SEGMENT_TOKENS_MAX &&
                   (location->num_tokens == 0 || location->num_tokens == from->n_token_ids);
    if (!with_token_ids || !ids_fit) {
        return RK_OK;
    }
    location->token_ids = rk_alloc_zero(from->n_token_ids, sizeof(int32_t));
    if (!location->token_ids) {
        return RK_ERR_NO_MEMORY;
    }
    memcpy(location->token_ids, from->token_ids, from->n_token_ids * sizeof(int32_t));
    location->num_tokens = (uint32_t)from->n_token_ids;
    return RK_OK;
}

/* One Locate call. RK_OK also when the coordinator does not answer. */
static enum rk_status locate_batch(struct rk_kv_client *client, const struct rk_id *fingerprint,
                                   const struct rk_id *ids, size_t num_ids, bool with_token_ids,
                                   const struct rk_until *until, struct rk_kv_location *locations,
                                   struct rk_error *error)
{
    Redknot__V1__LocateRequest request = REDKNOT__V1__LOCATE_REQUEST__INIT;
    Redknot__V1__LocateReply *reply = NULL;
    ProtobufCBinaryData *names = rk_alloc_zero(num_ids, sizeof(*names));
    if (!names) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "locating segments: out of memory");
    }
    for (size_t i = 0; i < num_ids; i++) {
        names[i] = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)ids[i].bytes};
    }
    request.n_segment_ids = num_ids;
    request.segment_ids = names;
    request.fingerprint = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)fingerprint->bytes};
    request.with_token_ids = with_token_ids;

    struct rk_error why = {.status = RK_OK};
    struct rk_until soon = rk_kv_metadata_until(client, until);
    enum rk_status status = rk_kv_coordinator_call(
        client, "/redknot.v1.Coordinator/Locate", &request.base,
        &redknot__v1__locate_reply__descriptor, &soon, (ProtobufCMessage **)&reply, &why);
    rk_free(names);
    if (status == RK_ERR_CANCELLED) {
        return rk_error_set(error, status, "locating segments: %s", why.text);
    }
    if (status != RK_OK || reply->n_locations != num_ids) {
        for (size_t i = 0; i < num_ids; i++) {
            locations[i].status = RK_MISS_NODE_DOWN;
        }
        rk_rpc_message_free((ProtobufCMessage *)reply);
        return RK_OK;
    }
    for (size_t i = 0; i < num_ids && status == RK_OK; i++) {
        status =
            location_take(reply, reply->locations[i], fingerprint, with_token_ids, &locations[i]);
    }
    rk_rpc_message_free(&reply->base);
    if (status != RK_OK) {
        return rk_error_set(error, status, "locating segments: %s", rk_status_text(status));
    }
    return RK_OK;
}

enum rk_status rk_kv_locate(struct rk_kv_client *client, const struct rk_id *fingerprint,
                            const struct rk_id *ids, size_t num_ids, bool with_token_ids,
                            const struct rk_until *until, struct rk_kv_location *ret_locations,
                            struct rk_error *error)
{
    if (rk_is_copy(client->maker)) {
        return rk_copy_refuse(error);
    }
    for (size_t i = 0; i < num_ids; i++) {
        ret_locations[i] =
            (struct rk_kv_location){.segment_id = ids[i], .status = RK_MISS_NODE_DOWN};
    }
    for (size_t begin = 0; begin < num_ids; begin += RK_KV_BATCH_IDS_MAX) {
        size_t count = num_ids - begin;
        if (count > RK_KV_BATCH_IDS_MAX) {
            count = RK_KV_BATCH_IDS_MAX;
        }
        enum rk_status status = locate_batch(client, fingerprint, ids + begin, count,
                                             with_token_ids, until, ret_locations + begin, error);
        if (status != RK_OK) {
            rk_kv_locations_free(ret_locations, num_ids);
            return status;
        }
    }
    return RK_OK;
}

enum rk_status rk_kv_drop(struct rk_kv_client *client, const struct rk_id *ids, size_t num_ids,
                          const struct rk_until *until, uint32_t *ret_dropped,
                          struct rk_error *error)
{
    uint32_t dropped = 0;
    if (rk_is_copy(client->maker)) {
        return rk_copy_refuse(error);
    }
    for (size_t begin = 0; begin < num_ids; begin += RK_KV_BATCH_IDS_MAX) {
        Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
        Redknot__V1__DropReply *reply = NULL;
        size_t count = num_ids - begin;
        if (count > RK_KV_BATCH_IDS_MAX) {
            count = RK_KV_BATCH_IDS_MAX;
        }
        ProtobufCBinaryData *names = rk_alloc_zero(count, sizeof(*names));
        if (!names) {
            return rk_error_set(error, RK_ERR_NO_MEMORY, "dropping segments: out of memory");
        }
        for (size_t i = 0; i < count; i++) {
            names[i] = (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)ids[begin + i].bytes};
        }
        request.n_segment_ids = count;
        request.segment_ids = names;
        struct rk_until soon = rk_kv_metadata_until(client, until);
        enum rk_status status = rk_kv_coordinator_call(
            client, "/redknot.v1.Coordinator/Drop", &request.base,
            &redknot__v1__drop_reply__descriptor, &soon, (ProtobufCMessage **)&reply, error);
        rk_free(names);
        if (status != RK_OK) {
            rk_error_prefix(error, "dropping segments at coordinator %s", client->address);
            return status;
        }
        dropped += reply->dropped;
        rk_rpc_message_free(&reply->base);
    }
    if (ret_dropped) {
        *ret_dropped = dropped;
    }
    return RK_OK;
}

static bool shard_holds(const struct rk_kv_shard *shard, const struct rk_extent *of)
{
    return of->layer >= shard->heads.layer_begin && of->layer < shard->heads.layer_end &&
           of->kv_head >= shard->heads.kv_head_begin && of->kv_head < shard->heads.kv_head_end;
}

const char *rk_kv_location_node(const struct rk_kv_location *location, const struct rk_extent *of)
{
    const struct rk_kv_shards *shards = location->shards;
    for (uint32_t i = 0; shards && i < shards->count; i++) {
        if (shard_holds(&shards->shards[i], of)) {
            return shards->shards[i].endpoint.node_id;
        }
    }
    return "";
}

enum rk_status rk_kv_drop_copy(struct rk_kv_client *client, const struct rk_kv_location *location,
                               const struct rk_extent *bad, const struct rk_until *until,
                               bool *ret_dropped, struct rk_error *error)
{
    const struct rk_kv_shards *shards = location->shards;
    size_t room = shards ? shards->count : 0;
    Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
    Redknot__V1__DropReply *reply = NULL;
    Redknot__V1__DropRequest__Copy *copies = rk_alloc_zero(room + 1, sizeof(*copies));
    Redknot__V1__DropRequest__Copy **pointers = rk_alloc_zero(room + 1, sizeof(*pointers));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (!copies || !pointers) {
        (void)rk_error_set(error, status, "dropping a bad copy: out of memory");
        goto done;
    }
    for (size_t i = 0; i < room; i++) {
        const struct rk_kv_shard *shard = &shards->shards[i];
        Redknot__V1__DropRequest__Copy *copy = &copies[request.n_copies];
        if (bad && !shard_holds(shard, bad)) {
            continue;
        }
        redknot__v1__drop_request__copy__init(copy);
        copy->segment_id =
            (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)location->segment_id.bytes};
        copy->generation = shard->generation;
        copy->node_id = shard->endpoint.node_id;
        pointers[request.n_copies++] = copy;
    }
    request.copies = pointers;
    struct rk_until soon = rk_kv_metadata_until(client, until);
    status = rk_rpc_unary_until(client->coordinator, "/redknot.v1.Coordinator/Drop", &request.base,
                                &redknot__v1__drop_reply__descriptor, &soon,
                                (ProtobufCMessage **)&reply, error);
    if (status != RK_OK) {
        rk_error_prefix(error, "dropping a bad copy at coordinator %s", client->address);
        goto done;
    }
    if (ret_dropped) {
        *ret_dropped = reply->copies > 0;
    }
    rk_rpc_message_free(&reply->base);

done:
    rk_free(copies);
    rk_free(pointers);
    return status;
}
