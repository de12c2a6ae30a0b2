#include "kvstore/service_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "kvstore/message_internal.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define CHUNK_BYTES      (1u << 20) /* of pages in one message, or one page */
#define VARINT_BYTES_MAX 10u

/* ---- Put ---- */

static enum rk_status put_begin(struct kvstore_service *service, struct rk_rpc_call *call,
                                struct kvstore_put **ret_put, struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    struct kvstore_header header = {0};
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__put_shard_request__descriptor, &message);
    if (status == RK_ERR_NOT_FOUND) {
        return rk_error_set(error, RK_ERR_INVALID, "no message was sent");
    }
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__PutShardRequest *request = (const Redknot__V1__PutShardRequest *)message;
    if (request->part_case == REDKNOT__V1__PUT_SHARD_REQUEST__PART_HEADER) {
        status = message_header_read(request->header, &header, error);
    } else {
        status = rk_error_set(error, RK_ERR_INVALID, "the first message must be the header");
    }
    if (status == RK_OK) {
        status = kvstore_put_begin(service->store, &header, ret_put, error);
    }
    rk_rpc_message_free(message);
    return status;
}

/* RK_ERR_NOT_FOUND: the last message was taken. */
static enum rk_status put_next(struct rk_rpc_call *call, struct kvstore_put *put,
                               struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__put_shard_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__PutShardRequest *request = (const Redknot__V1__PutShardRequest *)message;
    if (request->part_case == REDKNOT__V1__PUT_SHARD_REQUEST__PART_PAGES) {
        const Redknot__V1__PageChunk *chunk = request->pages;
        status = kvstore_put_pages(put, chunk->data.data, chunk->data.len, chunk->checksums,
                                   chunk->n_checksums, error);
    } else {
        status = rk_error_set(error, RK_ERR_INVALID, "after the header only pages can follow");
    }
    rk_rpc_message_free(message);
    /* A status of ours must not read as the end of the stream. */
    return status == RK_ERR_NOT_FOUND ? RK_ERR_INTERNAL : status;
}

static enum rk_status handle_put_shard(struct rk_rpc_call *call, void *context,
                                       struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct kvstore_put *put = NULL;
    double begin_s = rk_clock_s();
    enum rk_status status = put_begin(service, call, &put, error);
    while (status == RK_OK) {
        status = put_next(call, put, error);
    }
    if (status == RK_ERR_NOT_FOUND && put) {
        status = kvstore_put_seal(put, error);
    }
    if (status == RK_OK) {
        Redknot__V1__PutShardReply reply = REDKNOT__V1__PUT_SHARD_REPLY__INIT;
        reply.bytes = kvstore_put_bytes(put);
        status = rk_rpc_call_send(call, &reply.base);
        rk_metric_observe(service->put_seconds, rk_clock_s() - begin_s);
    }
    kvstore_put_destroy(put);
    return status;
}

/* ---- Commit, abort, drop ---- */

static enum rk_status handle_commit_shard(struct rk_rpc_call *call, void *context,
                                          struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct ProtobufCMessage *message = NULL;
    struct kvstore_name name;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__commit_shard_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__CommitShardRequest *request =
        (const Redknot__V1__CommitShardRequest *)message;
    status = message_name_read(&request->segment_id, request->generation, request->shard_index,
                               &name, error);
    rk_rpc_message_free(message);
    if (status == RK_OK) {
        status = kvstore_commit(service->store, &name, error);
    }
    if (status != RK_OK) {
        return status;
    }
    Redknot__V1__CommitShardReply reply = REDKNOT__V1__COMMIT_SHARD_REPLY__INIT;
    return rk_rpc_call_send(call, &reply.base);
}

/* Both are done when what they name is not there, so that callers may repeat them. */
static enum rk_status handle_abort_shard(struct rk_rpc_call *call, void *context,
                                         struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct ProtobufCMessage *message = NULL;
    struct kvstore_name name;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__abort_shard_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__AbortShardRequest *request = (const Redknot__V1__AbortShardRequest *)message;
    status = message_name_read(&request->segment_id, request->generation, request->shard_index,
                               &name, error);
    rk_rpc_message_free(message);
    if (status != RK_OK) {
        return status;
    }
    if (kvstore_abort(service->store, &name) != RK_OK) {
        RK_LOG_DEBUG("abort_of_nothing", "generation=%llu", (unsigned long long)name.generation);
    }
    Redknot__V1__AbortShardReply reply = REDKNOT__V1__ABORT_SHARD_REPLY__INIT;
    return rk_rpc_call_send(call, &reply.base);
}

static enum rk_status handle_drop_shard(struct rk_rpc_call *call, void *context,
                                        struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct ProtobufCMessage *message = NULL;
    struct kvstore_name name;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__drop_shard_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__DropShardRequest *request = (const Redknot__V1__DropShardRequest *)message;
    status = message_name_read(&request->segment_id, request->generation, request->shard_index,
                               &name, error);
    rk_rpc_message_free(message);
    if (status != RK_OK) {
        return status;
    }
    if (kvstore_drop(service->store, &name) != RK_OK) {
        RK_LOG_DEBUG("drop_of_nothing", "generation=%llu", (unsigned long long)name.generation);
    }
    Redknot__V1__DropShardReply reply = REDKNOT__V1__DROP_SHARD_REPLY__INIT;
    return rk_rpc_call_send(call, &reply.base);
}

/* ---- Get ---- */

/* A pin that ends with the last message gRPC lets go of. */
struct get_hold {
    struct kvstore *store;
    const struct kvstore_shard *shard;
    atomic_uint refs;
};

static void hold_release(struct get_hold *hold)
{
    if (atomic_fetch_sub_explicit(&hold->refs, 1, memory_order_acq_rel) == 1) {
        kvstore_unpin(hold->store, hold->shard);
        rk_free(hold);
    }
}

/* One message under way: its protobuf header, then pages where they lie. */
struct chunk {
    struct get_hold *hold;
    uint8_t *header;
    struct rk_rpc_part *parts;
    size_t num_parts;
};

static void chunk_release(void *context)
{
    struct chunk *chunk = context;
    hold_release(chunk->hold);
    rk_free(chunk->header);
    rk_free(chunk->parts);
    rk_free(chunk);
}

static size_t varint_put(uint8_t *out, uint64_t value)
{
    size_t bytes = 0;
    for (; value >= 0x80; value >>= 7) {
        out[bytes++] = (uint8_t)(value | 0x80);
    }
    out[bytes++] = (uint8_t)value;
    return bytes;
}

/*
 * GetPagesReply{pages = 2: PageChunk{checksums = 1 (packed fixed64), data = 15}}
 * up to where the data begins. Room: 3 tags and lengths, and the checksums.
 */
static size_t chunk_header_put(uint8_t *out, const uint64_t *checksums, size_t num_pages,
                               uint64_t data_bytes)
{
    uint8_t inner[2 + 2 * VARINT_BYTES_MAX];
    uint64_t sums_bytes = num_pages * sizeof(uint64_t);
    size_t sums_length = varint_put(inner, sums_bytes);
    size_t data_length = varint_put(inner, data_bytes);
    size_t at = 0;
    out[at++] = 2 << 3 | 2;
    at += varint_put(out + at, 1 + sums_length + sums_bytes + 1 + data_length + data_bytes);
    out[at++] = 1 << 3 | 2;
    at += varint_put(out + at, sums_bytes);
    memcpy(out + at, checksums, sums_bytes);
    at += sums_bytes;
    out[at++] = 15 << 3 | 2;
    at += varint_put(out + at, data_bytes);
    return at;
}

static enum rk_status chunk_send(struct rk_rpc_call *call, struct get_hold *hold,
                                 const uint64_t *offsets, const uint64_t *checksums,
                                 size_t num_pages)
{
    const uint8_t *arena = kvstore_arena(hold->store);
    size_t page_bytes = kvstore_shard_page_bytes(hold->shard);
    struct chunk *chunk = rk_alloc_zero(1, sizeof(*chunk));
    if (!chunk) {
        return RK_ERR_NO_MEMORY;
    }
    chunk->hold = hold;
    atomic_fetch_add_explicit(&hold->refs, 1, memory_order_relaxed);
    chunk->header = rk_alloc(3 + 3 * VARINT_BYTES_MAX + num_pages * sizeof(uint64_t));
    chunk->parts = rk_alloc_zero(num_pages + 1, sizeof(*chunk->parts));
    if (!chunk->header || !chunk->parts) {
        chunk_release(chunk);
        return RK_ERR_NO_MEMORY;
    }
    chunk->parts[0].data = chunk->header;
    chunk->parts[0].bytes =
        chunk_header_put(chunk->header, checksums, num_pages, num_pages * page_bytes);
    chunk->num_parts = 1;
    for (size_t i = 0; i < num_pages; i++) {
        struct rk_rpc_part *last = &chunk->parts[chunk->num_parts - 1];
        const uint8_t *page = arena + offsets[i];
        if (i > 0 && (const uint8_t *)last->data + last->bytes == page) {
            last->bytes += page_bytes;
        } else {
            chunk->parts[chunk->num_parts++] =
                (struct rk_rpc_part){.data = page, .bytes = page_bytes};
        }
    }
    return rk_rpc_call_send_parts(call, chunk->parts, chunk->num_parts, chunk_release, chunk);
}

static enum rk_status pages_send(struct kvstore_service *service, struct rk_rpc_call *call,
                                 struct get_hold *hold, const uint64_t *offsets,
                                 const uint64_t *checksums, uint64_t num_pages)
{
    size_t page_bytes = kvstore_shard_page_bytes(hold->shard);
    uint64_t step = CHUNK_BYTES / page_bytes;
    step = step > 0 ? step : 1;
    Redknot__V1__GetPagesReply__Header header = REDKNOT__V1__GET_PAGES_REPLY__HEADER__INIT;
    Redknot__V1__GetPagesReply reply = REDKNOT__V1__GET_PAGES_REPLY__INIT;
    header.tier = REDKNOT__V1__TIER__TIER_DRAM;
    header.num_pages = (uint32_t)num_pages;
    header.page_bytes = (uint32_t)page_bytes;
    reply.part_case = REDKNOT__V1__GET_PAGES_REPLY__PART_HEADER;
    reply.header = &header;
    enum rk_status status = rk_rpc_call_send(call, &reply.base);
    for (uint64_t at = 0; at < num_pages && status == RK_OK; at += step) {
        uint64_t count = num_pages - at < step ? num_pages - at : step;
        status = chunk_send(call, hold, offsets + at, checksums + at, count);
        if (status == RK_OK) {
            rk_metric_add(service->read_bytes[RK_PATH_GRPC], (double)(count * page_bytes));
        }
    }
    return status;
}

/* With the pin taken: finds the pages and sends them. */
static enum rk_status get_send(struct kvstore_service *service, struct rk_rpc_call *call,
                               struct get_hold *hold, const Redknot__V1__GetPagesRequest *request,
                               struct rk_error *error)
{
    struct rk_extent *extents = NULL;
    uint64_t num_pages = 0;
    enum rk_status status = message_extents_read(request, &extents, &num_pages, error);
    if (status != RK_OK) {
        return status;
    }
    if (request->n_extents == 0) {
        num_pages = kvstore_shard_pages(hold->shard);
    }
    uint64_t *offsets = rk_alloc(num_pages * sizeof(*offsets));
    uint64_t *checksums = rk_alloc(num_pages * sizeof(*checksums));
    if (!offsets || !checksums) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %llu pages",
                              (unsigned long long)num_pages);
    } else {
        status = kvstore_shard_extents(hold->shard, extents, request->n_extents, offsets, checksums,
                                       &num_pages, error);
    }
    if (status == RK_OK) {
        status = pages_send(service, call, hold, offsets, checksums, num_pages);
    }
    rk_free(offsets);
    rk_free(checksums);
    rk_free(extents);
    return status;
}

static enum rk_status get_pages(struct kvstore_service *service, struct rk_rpc_call *call,
                                const Redknot__V1__GetPagesRequest *request, struct rk_error *error)
{
    struct kvstore_name name;
    struct rk_id fingerprint;
    enum rk_status status = message_name_read(&request->segment_id, request->generation,
                                              request->shard_index, &name, error);
    if (status != RK_OK) {
        return status;
    }
    if (!message_id_read(&request->fingerprint, &fingerprint)) {
        return rk_error_set(error, RK_ERR_INVALID, "a fingerprint has %d bytes", RK_ID_BYTES);
    }
    struct get_hold *hold = rk_alloc_zero(1, sizeof(*hold));
    if (!hold) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a get");
    }
    hold->store = service->store;
    atomic_init(&hold->refs, 1);
    status = kvstore_pin(service->store, &name, &fingerprint, &hold->shard);
    if (status != RK_OK) {
        rk_free(hold);
        return status;
    }
    status = get_send(service, call, hold, request, error);
    hold_release(hold);
    return status;
}

static enum rk_status handle_get_pages(struct rk_rpc_call *call, void *context,
                                       struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct ProtobufCMessage *message = NULL;
    double begin_s = rk_clock_s();
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__get_pages_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    rk_metric_add(service->gets[RK_PATH_GRPC], 1);
    status = get_pages(service, call, (const Redknot__V1__GetPagesRequest *)message, error);
    rk_rpc_message_free(message);
    rk_metric_observe(service->get_seconds, rk_clock_s() - begin_s);
    return status;
}

/* ---- Status ---- */

/* As many shards as can be described; what goes meanwhile is left out. */
static enum rk_status status_shards(struct kvstore_service *service, struct rk_rpc_call *call,
                                    Redknot__V1__StoreStatusReply *reply)
{
    struct kvstore_name *names = NULL;
    size_t num_names = 0;
    enum rk_status status = kvstore_list(service->store, &names, &num_names);
    if (status != RK_OK) {
        return status;
    }
    struct kvstore_header **headers = rk_alloc_zero(num_names, sizeof(struct kvstore_header *));
    struct shard_message *shards = rk_alloc_zero(num_names, sizeof(*shards));
    Redknot__V1__Shard **pointers = rk_alloc_zero(num_names, sizeof(*pointers));
    size_t count = 0;
    status = headers && shards && pointers ? RK_OK : RK_ERR_NO_MEMORY;
    for (size_t i = 0; i < num_names && status == RK_OK; i++) {
        if (kvstore_describe(service->store, &names[i], &headers[count]) == RK_OK) {
            shard_message_fill(&shards[count], headers[count], service->node_id);
            pointers[count] = &shards[count].shard;
            count++;
        }
    }
    if (status == RK_OK) {
        reply->n_shards = count;
        reply->shards = pointers;
        status = rk_rpc_call_send(call, &reply->base);
    }
    for (size_t i = 0; i < count; i++) {
        rk_free(headers[i]);
    }
    rk_free(headers);
    rk_free(shards);
    rk_free(pointers);
    rk_free(names);
    return status;
}

static enum rk_status handle_store_status(struct rk_rpc_call *call, void *context,
                                          struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct ProtobufCMessage *message = NULL;
    struct kvstore_stats stats;
    (void)error;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__store_status_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    bool with_shards = ((const Redknot__V1__StoreStatusRequest *)message)->with_shards;
    rk_rpc_message_free(message);
    kvstore_stats_get(service->store, &stats);
    Redknot__V1__StoreStatusReply reply = REDKNOT__V1__STORE_STATUS_REPLY__INIT;
    reply.node_id = (char *)service->node_id;
    reply.incarnation = service->incarnation;
    reply.capacity_bytes = stats.capacity_bytes;
    reply.used_bytes = stats.used_bytes;
    reply.pinned_bytes = stats.pinned_bytes;
    reply.num_shards = stats.num_shards;
    reply.num_staged = stats.num_staged;
    reply.version = (char *)REDKNOT_VERSION;
    if (with_shards) {
        return status_shards(service, call, &reply);
    }
    return rk_rpc_call_send(call, &reply.base);
}

/* ---- The other paths ---- */

static enum rk_status path_pin(void *context, enum rk_path path, const struct rk_get *get,
                               uint64_t *ret_offsets, uint64_t *ret_checksums, uint64_t *num_pages,
                               void **ret_pin, struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct kvstore_name name = {.segment_id = get->segment_id,
                                .generation = get->generation,
                                .shard_index = get->shard_index};
    const struct kvstore_shard *shard = NULL;
    rk_metric_add(service->gets[path], 1);
    enum rk_status status = kvstore_pin(service->store, &name, &get->fingerprint, &shard);
    if (status != RK_OK) {
        return status;
    }
    if (get->page_bytes != kvstore_shard_page_bytes(shard)) {
        status = RK_MISS_FINGERPRINT;
    } else {
        status = kvstore_shard_extents(shard, get->extents, get->num_extents, ret_offsets,
                                       ret_checksums, num_pages, error);
    }
    if (status != RK_OK) {
        kvstore_unpin(service->store, shard);
        return status;
    }
    rk_metric_add(service->read_bytes[path], (double)(*num_pages * get->page_bytes));
    *ret_pin = (void *)shard;
    return RK_OK;
}

static void path_unpin(void *context, void *pin)
{
    struct kvstore_service *service = context;
    kvstore_unpin(service->store, pin);
}

const struct rk_transport_store_ops kvstore_service_store_ops = {.pin = path_pin,
                                                                 .unpin = path_unpin};

/* ---- Set-up ---- */

static const struct rk_rpc_method methods[] = {
    {"/redknot.v1.KvStore/PutShard", handle_put_shard},
    {"/redknot.v1.KvStore/CommitShard", handle_commit_shard},
    {"/redknot.v1.KvStore/AbortShard", handle_abort_shard},
    {"/redknot.v1.KvStore/DropShard", handle_drop_shard},
    {"/redknot.v1.KvStore/GetPages", handle_get_pages},
    {"/redknot.v1.KvStore/StoreStatus", handle_store_status},
};

enum rk_status kvstore_service_attach(struct kvstore_service *service, struct rk_rpc_server *server)
{
    return rk_rpc_server_add_service(server, "redknot.v1.KvStore", methods,
                                     sizeof(methods) / sizeof(methods[0]), service);
}

void kvstore_service_init(struct kvstore_service *service, struct kvstore *store,
                          const char *node_id, uint64_t incarnation)
{
    static const enum rk_path paths[] = {RK_PATH_SHM, RK_PATH_UCX, RK_PATH_GRPC};
    *service = (struct kvstore_service){
        .store = store,
        .node_id = node_id,
        .incarnation = incarnation,
        .get_seconds =
            rk_metric_histogram("redknot_kvstore_get_seconds", "Time to serve a read over gRPC.",
                                NULL, rk_metric_seconds, rk_metric_seconds_count),
        .put_seconds =
            rk_metric_histogram("redknot_kvstore_put_seconds", "Time to receive a shard.", NULL,
                                rk_metric_seconds, rk_metric_seconds_count),
    };
    for (size_t i = 0; i < sizeof(paths) / sizeof(paths[0]); i++) {
        char label[32];
        (void)snprintf(label, sizeof(label), "path=\"%s\"", rk_path_name(paths[i]));
        service->read_bytes[paths[i]] = rk_metric_counter(
            "redknot_kvstore_read_bytes_total", "Bytes of pages handed to readers.", label);
        service->gets[paths[i]] =
            rk_metric_counter("redknot_kvstore_gets_total", "Reads asked for, by path.", label);
    }
}
