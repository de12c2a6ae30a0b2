#include "kvstore/service_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/service.h"
#include "kvstore/message_internal.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MESSAGE_BYTES       1048576u /* of data in one message of a get */
#define PARTS_MAX           256u
#define STATUS_SHARDS_MAX   65536u
#define STATUS_CURSOR_BYTES (RK_ID_BYTES + 4)
#define DROPS_MAX           4096u      /* beside the first, in one call */
#define GET_BYTES_MAX       (2u << 20) /* all extents and items that a get may have fit into it */
#define SMALL_BYTES_MAX     (64u << 10)
#define LIST_BYTES_MAX      (1u << 20) /* 4,096 names */

/* ---- Put ---- */

/* One item of a put, over any path. */
static enum rk_status item_begin(struct kvstore_service *service, const Redknot__V1__PutItem *item,
                                 void **ret_put, uint64_t *ret_bytes, uint32_t *ret_page_bytes,
                                 struct rk_error *error)
{
    struct kvstore_header header = {.kind = KVSTORE_SHARD};
    struct kvstore_put *put = NULL;
    enum rk_status status = message_header_read(item, &header, error);
    if (status != RK_OK) {
        return status;
    }
    *ret_bytes = kvstore_header_bytes(&header, ret_page_bytes);
    status = kvstore_put_begin(service->store, &header, &put, error);
    if (status == RK_OK) {
        *ret_put = put;
    }
    return status;
}

static enum rk_status path_put_begin(void *context, enum rk_path path, const void *head,
                                     size_t head_bytes, void **ret_put, uint64_t *ret_bytes,
                                     uint32_t *ret_page_bytes, struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_message_check_text(head, head_bytes, &redknot__v1__put_item__descriptor, error);
    if (status != RK_OK) {
        return status;
    }
    status = rk_rpc_message_unpack(head, head_bytes, &redknot__v1__put_item__descriptor, &message);
    if (status != RK_OK) {
        return rk_error_set(error, status, "what describes an item is no PutItem");
    }
    status = item_begin(service, (const Redknot__V1__PutItem *)message, ret_put, ret_bytes,
                        ret_page_bytes, error);
    rk_rpc_message_free(message);
    rk_metric_add(service->puts[path], 1);
    return status;
}

static enum rk_status path_put_write(void *context, void *put, const void *data, size_t bytes,
                                     const uint64_t *checksums, size_t num_checksums,
                                     struct rk_error *error)
{
    (void)context;
    return kvstore_put_write(put, data, bytes, checksums, num_checksums, error);
}

static enum rk_status path_put_end(void *context, void *put, struct rk_error *error)
{
    (void)context;
    /* A shard is one of several, which the coordinator makes visible together. */
    return kvstore_put_kind(put) == KVSTORE_VALUE ? kvstore_put_commit(put, error)
                                                  : kvstore_put_seal(put, error);
}

static void path_put_destroy(void *context, void *put)
{
    (void)context;
    kvstore_put_destroy(put);
}

/* The first message of a put. */
static enum rk_status items_recv(struct kvstore_service *service, struct rk_rpc_call *call,
                                 struct rk_intake **ret_intake, struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status = rk_rpc_call_recv(call, &redknot__v1__put_request__descriptor, &message);
    if (status == RK_ERR_NOT_FOUND) {
        return rk_error_set(error, RK_ERR_INVALID, "no message was sent");
    }
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__PutRequest *request = (const Redknot__V1__PutRequest *)message;
    bool items = request->part_case == REDKNOT__V1__PUT_REQUEST__PART_ITEMS;
    if (!items || request->items->n_items == 0 ||
        request->items->n_items > RK_TRANSPORT_ITEMS_MAX) {
        status = rk_error_set(error, RK_ERR_INVALID, "the first message must have 1 to %d items",
                              RK_TRANSPORT_ITEMS_MAX);
    } else {
        status = rk_intake_create(&kvstore_service_store_ops, service, request->items->n_items,
                                  ret_intake);
    }
    for (size_t i = 0; status == RK_OK && i < request->items->n_items; i++) {
        struct rk_error why = {.text = ""};
        uint64_t bytes = 0;
        uint32_t page_bytes = 0;
        void *put = NULL;
        enum rk_status begun =
            item_begin(service, request->items->items[i], &put, &bytes, &page_bytes, &why);
        rk_intake_add(*ret_intake, begun, why.text, put, bytes, page_bytes);
        rk_metric_add(service->puts[RK_PATH_GRPC], 1);
        if (bytes == 0) { /* Where the next item's bytes begin is not known. */
            status = rk_error_set(error, begun, "item %zu: %s", i, why.text);
        }
    }
    rk_rpc_message_free(message);
    return status;
}

/* RK_ERR_NOT_FOUND: the last message was taken. */
static enum rk_status chunk_recv(struct rk_rpc_call *call, struct rk_intake *intake,
                                 struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status = rk_rpc_call_recv(call, &redknot__v1__put_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__PutRequest *request = (const Redknot__V1__PutRequest *)message;
    if (request->part_case != REDKNOT__V1__PUT_REQUEST__PART_CHUNK) {
        status = rk_error_set(error, RK_ERR_INVALID, "after the items only chunks can follow");
    } else {
        const Redknot__V1__PutRequest__Chunk *chunk = request->chunk;
        status = rk_intake_write(intake, chunk->data.data, chunk->data.len, chunk->checksums,
                                 chunk->n_checksums);
        if (status != RK_OK) {
            (void)rk_error_set(error, status,
                               "a chunk has more bytes than were announced, or another number of "
                               "checksums than of pages that end in it");
        }
    }
    rk_rpc_message_free(message);
    /* A status of ours must not read as the end of the stream. */
    return status == RK_ERR_NOT_FOUND ? RK_ERR_INTERNAL : status;
}

static enum rk_status results_send(struct kvstore_service *service, struct rk_rpc_call *call,
                                   const struct rk_intake *intake)
{
    size_t count = rk_intake_items(intake);
    Redknot__V1__PutReply reply = REDKNOT__V1__PUT_REPLY__INIT;
    Redknot__V1__PutReply__Result *results = rk_alloc_zero(count, sizeof(*results));
    Redknot__V1__PutReply__Result **pointers = rk_alloc_zero(count, sizeof(*pointers));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (results && pointers) {
        for (size_t i = 0; i < count; i++) {
            const char *text = NULL;
            enum rk_status result = rk_intake_result(intake, i, &text);
            redknot__v1__put_reply__result__init(&results[i]);
            results[i].status = (char *)(uintptr_t)rk_status_name(result);
            results[i].error = (char *)(uintptr_t)text;
            pointers[i] = &results[i];
        }
        reply.n_results = count;
        reply.results = pointers;
        reply.node_id = (char *)(uintptr_t)service->node_id;
        reply.incarnation = service->incarnation;
        status = rk_rpc_call_send(call, &reply.base);
    }
    rk_free(results);
    rk_free(pointers);
    return status;
}

static enum rk_status handle_put(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct rk_intake *intake = NULL;
    double begin_s = rk_clock_s();
    enum rk_status status = items_recv(service, call, &intake, error);
    while (status == RK_OK && !rk_intake_whole(intake)) {
        status = chunk_recv(call, intake, error);
    }
    if (status == RK_ERR_NOT_FOUND && intake) {
        status = rk_error_set(error, RK_ERR_INVALID, "fewer bytes came than were announced");
    }
    if (status == RK_OK) {
        rk_intake_end(intake);
        status = results_send(service, call, intake);
        rk_metric_observe(service->put_seconds, rk_clock_s() - begin_s);
    }
    rk_intake_destroy(intake);
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

static void shard_drop(struct kvstore_service *service, const struct kvstore_name *name)
{
    if (kvstore_drop(service->store, name) != RK_OK) {
        RK_LOG_DEBUG("drop_of_nothing", "generation=%llu", (unsigned long long)name->generation);
    }
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
    if (status == RK_OK && request->n_more > DROPS_MAX) {
        status = rk_error_set(error, RK_ERR_TOO_LONG, "%zu more shards to drop, at most %u",
                              request->n_more, DROPS_MAX);
    }
    if (status == RK_OK) {
        shard_drop(service, &name);
    }
    for (size_t i = 0; status == RK_OK && i < request->n_more; i++) {
        const Redknot__V1__DropShardRequest__Name *more = request->more[i];
        status =
            message_name_read(&more->segment_id, more->generation, more->shard_index, &name, error);
        if (status == RK_OK) {
            shard_drop(service, &name);
        }
    }
    rk_rpc_message_free(message);
    if (status != RK_OK) {
        return status;
    }
    Redknot__V1__DropShardReply reply = REDKNOT__V1__DROP_SHARD_REPLY__INIT;
    return rk_rpc_call_send(call, &reply.base);
}

/* ---- Get ---- */

/* The pins of a get, which end with the last message that gRPC lets go of. */
struct get_hold {
    struct kvstore *store;
    atomic_uint refs;
    size_t num_shards;
    const struct kvstore_shard *shards[RK_TRANSPORT_ITEMS_MAX];
};

static void hold_release(struct get_hold *hold)
{
    if (atomic_fetch_sub_explicit(&hold->refs, 1, memory_order_acq_rel) == 1) {
        for (size_t i = 0; i < hold->num_shards; i++) {
            kvstore_unpin(hold->store, hold->shards[i]);
        }
        rk_free(hold);
    }
}

/* One message under way: its protobuf header, then bytes where they lie. */
struct data_message {
    struct get_hold *hold;
    uint8_t *header; /* with room for the tag and the length of data */
    size_t header_bytes;
    size_t num_parts;
    size_t bytes;
    struct rk_rpc_part parts[1 + PARTS_MAX];
};

#define DATA_HEADER_BYTES 8

static void message_release(void *context)
{
    struct data_message *message = context;
    hold_release(message->hold);
    rk_free(message->header);
    rk_free(message);
}

/* found_bytes: room for what comes first. */
static struct data_message *message_make(struct get_hold *hold, size_t found_bytes)
{
    struct data_message *message = rk_alloc(sizeof(*message));
    uint8_t *header = rk_alloc(found_bytes + DATA_HEADER_BYTES);
    if (!message || !header) {
        rk_free(message);
        rk_free(header);
        return NULL;
    }
    message->hold = hold;
    message->header = header;
    message->header_bytes = found_bytes;
    message->num_parts = 0;
    message->bytes = 0;
    atomic_fetch_add_explicit(&hold->refs, 1, memory_order_relaxed);
    return message;
}

/* GetReply{found, data = 15}. Takes over the message. */
static enum rk_status message_send(struct rk_rpc_call *call, struct data_message *message,
                                   bool last)
{
    uint8_t *header = message->header;
    size_t at = message->header_bytes;
    if (message->bytes > 0) {
        size_t left = message->bytes;
        header[at++] = 15 << 3 | 2;
        for (; left >= 0x80; left >>= 7) {
            header[at++] = (uint8_t)(left | 0x80);
        }
        header[at++] = (uint8_t)left;
    }
    message->parts[0] = (struct rk_rpc_part){header, at};
    return last ? rk_rpc_call_send_last_parts(call, message->parts, 1 + message->num_parts,
                                              message_release, message)
                : rk_rpc_call_send_parts(call, message->parts, 1 + message->num_parts,
                                         message_release, message);
}

static void message_add(struct data_message *message, const uint8_t *data, size_t bytes)
{
    struct rk_rpc_part *last = &message->parts[message->num_parts];
    if (message->num_parts > 0 && (const uint8_t *)last->data + last->bytes == data) {
        last->bytes += bytes;
    } else {
        message->parts[++message->num_parts] = (struct rk_rpc_part){data, bytes};
    }
    message->bytes += bytes;
}

/* What one item of a get found. */
struct found_item {
    enum rk_status status;
    struct rk_error error;
    struct rk_found found; /* id and generation are set in any case */
    uint64_t *offsets;
    uint64_t *checksums;
};

/* The message with what was found, and room for data behind it. */
static struct data_message *found_pack(struct kvstore_service *service, struct get_hold *hold,
                                       const struct found_item *items, size_t count)
{
    Redknot__V1__GetReply reply = REDKNOT__V1__GET_REPLY__INIT;
    Redknot__V1__GetReply__Found found = REDKNOT__V1__GET_REPLY__FOUND__INIT;
    Redknot__V1__GetReply__Item *wire = rk_alloc_zero(count, sizeof(*wire));
    Redknot__V1__GetReply__Item **pointers = rk_alloc_zero(count, sizeof(*pointers));
    struct data_message *message = NULL;
    if (wire && pointers) {
        for (size_t i = 0; i < count; i++) {
            redknot__v1__get_reply__item__init(&wire[i]);
            wire[i].status = (char *)(uintptr_t)rk_status_name(items[i].status);
            wire[i].error = (char *)(uintptr_t)items[i].error.text;
            wire[i].tier = (Redknot__V1__Tier)items[i].found.tier;
            wire[i].page_bytes = items[i].found.page_bytes;
            wire[i].bytes = items[i].found.bytes;
            wire[i].n_checksums = items[i].found.num_pages;
            wire[i].checksums = items[i].checksums;
            wire[i].id =
                (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)(uintptr_t)items[i].found.id.bytes};
            wire[i].generation = items[i].found.generation;
            pointers[i] = &wire[i];
        }
        found.n_items = count;
        found.items = pointers;
        found.node_id = (char *)(uintptr_t)service->node_id;
        found.incarnation = service->incarnation;
        reply.found = &found;
        message = message_make(hold, redknot__v1__get_reply__get_packed_size(&reply));
        if (message) {
            (void)redknot__v1__get_reply__pack(&reply, message->header);
        }
    }
    rk_free(wire);
    rk_free(pointers);
    return message;
}

/* Sends what was found and all its bytes. */
static enum rk_status items_send(struct kvstore_service *service, struct rk_rpc_call *call,
                                 struct get_hold *hold, const struct found_item *items,
                                 size_t count)
{
    const uint8_t *arena = kvstore_arena(service->store);
    struct data_message *message = found_pack(service, hold, items, count);
    enum rk_status status = message ? RK_OK : RK_ERR_NO_MEMORY;
    for (size_t i = 0; i < count && status == RK_OK; i++) {
        const struct found_item *item = &items[i];
        uint64_t left = item->found.bytes;
        for (uint64_t page = 0; page < item->found.num_pages && status == RK_OK; page++) {
            uint64_t page_bytes = item->found.page_bytes;
            size_t length = left < page_bytes ? (size_t)left : (size_t)page_bytes;
            if (message->bytes >= MESSAGE_BYTES || message->num_parts == PARTS_MAX) {
                status = message_send(call, message, false);
                message = status == RK_OK ? message_make(hold, 0) : NULL;
                if (!message) {
                    return status == RK_OK ? RK_ERR_NO_MEMORY : status;
                }
            }
            message_add(message, arena + item->offsets[page], length);
            left -= length;
        }
    }
    return status == RK_OK ? message_send(call, message, true) : status;
}

/* Pins what is asked for. */
static enum rk_status pin(struct kvstore_service *service, const struct message_get *get,
                          const struct kvstore_shard **ret_shard, struct rk_error *error)
{
    const struct kvstore_shard *shard = NULL;
    struct kvstore_name name = {
        .segment_id = get->id, .generation = get->generation, .shard_index = get->shard_index};
    enum rk_status status = get->value
                                ? kvstore_pin_value(service->store, &get->id, &shard)
                                : kvstore_pin(service->store, &name, &get->fingerprint, &shard);
    if (status != RK_OK) {
        return status;
    }
    if (get->value && get->bytes_max > 0 && kvstore_shard_bytes(shard) > get->bytes_max) {
        status = rk_error_set(error, RK_ERR_TOO_LONG, "the value has %llu bytes, not %llu",
                              (unsigned long long)kvstore_shard_bytes(shard),
                              (unsigned long long)get->bytes_max);
    } else if (get->page_bytes > 0 && get->page_bytes != kvstore_shard_page_bytes(shard)) {
        status = RK_MISS_FINGERPRINT;
    }
    if (status != RK_OK) {
        kvstore_unpin(service->store, shard);
        return status;
    }
    *ret_shard = shard;
    return RK_OK;
}

/* Of what is pinned: its pages, at most pages_max. */
static enum rk_status find(const struct kvstore_shard *shard, const struct message_get *get,
                           uint64_t pages_max, uint64_t *offsets, uint64_t *checksums,
                           struct rk_found *ret_found, struct rk_error *error)
{
    uint64_t num_pages = pages_max;
    enum rk_status status = kvstore_shard_extents(shard, get->extents, get->num_extents, offsets,
                                                  checksums, &num_pages, error);
    if (status != RK_OK) {
        return status;
    }
    const struct kvstore_header *header = kvstore_shard_header(shard);
    uint64_t page_bytes = kvstore_shard_page_bytes(shard);
    RK_ASSERT(rk_id_equal(&header->segment_id, &get->id) &&
              (get->value ||
               (header->generation == get->generation && header->shard_index == get->shard_index)));
    *ret_found =
        (struct rk_found){.id = header->segment_id,
                          .generation = header->generation,
                          .num_pages = num_pages,
                          .page_bytes = (uint32_t)page_bytes,
                          .bytes = get->value ? kvstore_shard_bytes(shard) : num_pages * page_bytes,
                          .tier = RK_TIER_DRAM};
    ret_found->seal = kvstore_shard_seal(shard, &ret_found->seal_index);
    return RK_OK;
}

/* All pages of what is pinned, out of the budget. */
static enum rk_status whole_within(const struct kvstore_shard *shard, struct message_budget *budget,
                                   struct rk_error *error)
{
    if (kvstore_shard_pages(shard) > budget->pages) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "too many pages in one get");
    }
    budget->pages -= kvstore_shard_pages(shard);
    return RK_OK;
}

/* Pins one item and finds its pages; why not is in the item. */
static void item_find(struct kvstore_service *service, const Redknot__V1__GetItem *wire,
                      struct message_budget *budget, struct get_hold *hold, struct found_item *item)
{
    struct message_get get;
    const struct kvstore_shard *shard = NULL;
    item->status = message_get_read(wire, budget, &get, &item->error);
    item->found = (struct rk_found){.id = get.id, .generation = get.generation};
    if (item->status == RK_OK) {
        item->status = pin(service, &get, &shard, &item->error);
    }
    if (item->status == RK_OK && get.num_extents == 0) {
        item->status = whole_within(shard, budget, &item->error);
        if (item->status != RK_OK) {
            kvstore_unpin(service->store, shard);
        }
    }
    if (item->status == RK_OK) {
        uint64_t pages = get.num_extents > 0 ? get.num_pages : kvstore_shard_pages(shard);
        hold->shards[hold->num_shards++] = shard;
        item->offsets = rk_alloc(pages * sizeof(uint64_t));
        item->checksums = rk_alloc(pages * sizeof(uint64_t));
        item->status = item->offsets && item->checksums
                           ? find(shard, &get, pages, item->offsets, item->checksums, &item->found,
                                  &item->error)
                           : RK_ERR_NO_MEMORY;
    }
    rk_free(get.extents);
}

static enum rk_status get_items(struct kvstore_service *service, struct rk_rpc_call *call,
                                const Redknot__V1__GetRequest *request, struct rk_error *error)
{
    size_t count = request->n_items;
    if (count == 0 || count > RK_TRANSPORT_ITEMS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a get has 1 to %d items",
                            RK_TRANSPORT_ITEMS_MAX);
    }
    struct get_hold *hold = rk_alloc_zero(1, sizeof(*hold));
    struct found_item *items = rk_alloc_zero(count, sizeof(*items));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (hold && items) {
        rk_metric_add(service->gets[RK_PATH_GRPC], (double)count); /* Items, as on every path. */
        hold->store = service->store;
        atomic_init(&hold->refs, 1);
        struct message_budget budget = message_budget_new();
        for (size_t i = 0; i < count; i++) {
            item_find(service, request->items[i], &budget, hold, &items[i]);
        }
        status = items_send(service, call, hold, items, count);
        for (size_t i = 0; i < count; i++) {
            if (status == RK_OK) {
                rk_metric_add(service->read_bytes[RK_PATH_GRPC], (double)items[i].found.bytes);
            }
            rk_free(items[i].offsets);
            rk_free(items[i].checksums);
        }
        hold_release(hold);
        hold = NULL;
    }
    rk_free(hold);
    rk_free(items);
    return status;
}

static enum rk_status handle_get(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct ProtobufCMessage *message = NULL;
    double begin_s = rk_clock_s();
    enum rk_status status = rk_rpc_call_recv(call, &redknot__v1__get_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    status = get_items(service, call, (const Redknot__V1__GetRequest *)message, error);
    rk_rpc_message_free(message);
    rk_metric_observe(service->get_seconds, rk_clock_s() - begin_s);
    return status;
}

/* ---- Values by id ---- */

typedef bool (*value_check)(struct kvstore *store, const struct rk_id *id);

static bool value_drop(struct kvstore *store, const struct rk_id *id)
{
    const struct kvstore_name name = {.kind = KVSTORE_VALUE, .segment_id = *id};
    return kvstore_has_value(store, id) && kvstore_drop(store, &name) == RK_OK;
}

/* The caller frees *ret_flags. */
static enum rk_status values_each(struct kvstore_service *service, const ProtobufCBinaryData *ids,
                                  size_t count, value_check check, protobuf_c_boolean **ret_flags,
                                  struct rk_error *error)
{
    protobuf_c_boolean *flags = rk_alloc_zero(count, sizeof(*flags));
    if (!flags) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %zu answers", count);
    }
    for (size_t i = 0; i < count; i++) {
        struct rk_id id;
        /* Nothing is stored under what is no id: the true answer, and the others get theirs. */
        flags[i] = message_id_read(&ids[i], &id) && check(service->store, &id);
    }
    *ret_flags = flags;
    return RK_OK;
}

static enum rk_status handle_has_values(struct rk_rpc_call *call, void *context,
                                        struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__has_values_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__HasValuesRequest *request = (const Redknot__V1__HasValuesRequest *)message;
    Redknot__V1__HasValuesReply reply = REDKNOT__V1__HAS_VALUES_REPLY__INIT;
    struct kvstore_service *service = context;
    if (!kvstore_values_sure(
            service->store)) { /* "No" would let a second value under a key arise. */
        rk_rpc_message_free(message);
        return rk_error_set(
            error, RK_ERR_UNAVAILABLE,
            "the coordinator has not answered this store for a while, and clients may "
            "have gone on without it: try again in a moment");
    }
    status =
        values_each(context, request->ids, request->n_ids, kvstore_has_value, &reply.found, error);
    if (status == RK_OK) {
        reply.n_found = request->n_ids;
        status = rk_rpc_call_send(call, &reply.base);
    }
    rk_free(reply.found);
    rk_rpc_message_free(message);
    return status;
}

static enum rk_status handle_drop_values(struct rk_rpc_call *call, void *context,
                                         struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__drop_values_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__DropValuesRequest *request = (const Redknot__V1__DropValuesRequest *)message;
    Redknot__V1__DropValuesReply reply = REDKNOT__V1__DROP_VALUES_REPLY__INIT;
    status = values_each(context, request->ids, request->n_ids, value_drop, &reply.dropped, error);
    if (status == RK_OK) {
        reply.n_dropped = request->n_ids;
        status = rk_rpc_call_send(call, &reply.base);
    }
    rk_free(reply.dropped);
    rk_rpc_message_free(message);
    return status;
}

/* ---- Status ---- */

/* Where a page of names ends, as a client keeps it: in the order of names, so that it stands
 * whatever comes and goes. */
static void cursor_of(const struct kvstore_name *name, uint8_t ret_cursor[STATUS_CURSOR_BYTES])
{
    memcpy(ret_cursor, name->segment_id.bytes, RK_ID_BYTES);
    for (int i = 0; i < 4; i++) { /* Big endian: bytes compare as the number does. */
        ret_cursor[RK_ID_BYTES + i] = (uint8_t)(name->shard_index >> (24 - 8 * i));
    }
}

static int cursor_compare(const void *a, const void *b)
{
    uint8_t left[STATUS_CURSOR_BYTES];
    uint8_t right[STATUS_CURSOR_BYTES];
    cursor_of(a, left);
    cursor_of(b, right);
    return memcmp(left, right, sizeof(left));
}

/* The first name behind after; num_names: none. */
static size_t page_begin(const struct kvstore_name *names, size_t num_names,
                         const ProtobufCBinaryData *after)
{
    size_t low = 0;
    size_t high = after->len == 0 ? 0 : num_names;
    while (low < high) {
        uint8_t cursor[STATUS_CURSOR_BYTES];
        size_t middle = low + (high - low) / 2;
        cursor_of(&names[middle], cursor);
        if (memcmp(cursor, after->data, sizeof(cursor)) <= 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* One page of what it holds. What goes meanwhile is left out. */
struct status_page {
    struct kvstore_header *headers; /* without text and tokens */
    struct shard_message *shards;
    Redknot__V1__Shard **pointers;
    size_t count;
    uint8_t cursor[STATUS_CURSOR_BYTES];
};

static enum rk_status status_page_fill(struct kvstore_service *service,
                                       const struct kvstore_name *names, size_t count,
                                       struct status_page *page)
{
    page->headers = rk_alloc_zero(count + 1, sizeof(*page->headers));
    page->shards = rk_alloc_zero(count + 1, sizeof(*page->shards));
    page->pointers = rk_alloc_zero(count + 1, sizeof(*page->pointers));
    if (!page->headers || !page->shards || !page->pointers) {
        return RK_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < count; i++) {
        struct kvstore_header *header = NULL;
        if (kvstore_describe(service->store, &names[i], &header) == RK_OK) {
            page->headers[page->count] = *header; /* Its tokens would be gigabytes in all. */
            rk_free(header);
            shard_message_fill(&page->shards[page->count], &page->headers[page->count],
                               service->node_id);
            page->pointers[page->count] = &page->shards[page->count].shard;
            page->count++;
        }
    }
    return RK_OK;
}

static enum rk_status status_shards(struct kvstore_service *service, struct rk_rpc_call *call,
                                    const Redknot__V1__StoreStatusRequest *request,
                                    Redknot__V1__StoreStatusReply *reply, struct rk_error *error)
{
    struct status_page page = {.count = 0};
    struct kvstore_name *names = NULL;
    size_t num_names = 0;
    if (request->after.len != 0 && request->after.len != STATUS_CURSOR_BYTES) {
        return rk_error_set(error, RK_ERR_INVALID, "after is no next_after of an earlier reply");
    }
    enum rk_status status = kvstore_list(service->store, &names, &num_names);
    if (status != RK_OK) {
        return status;
    }
    qsort(names, num_names, sizeof(*names), cursor_compare);
    size_t begin = page_begin(names, num_names, &request->after);
    size_t count = num_names - begin;
    size_t count_max = request->shards_max;
    if (count_max == 0 || count_max > STATUS_SHARDS_MAX) {
        count_max = STATUS_SHARDS_MAX;
    }
    if (count > count_max) {
        count = count_max;
        cursor_of(&names[begin + count - 1], page.cursor);
        reply->next_after = (ProtobufCBinaryData){sizeof(page.cursor), page.cursor};
    }
    status = status_page_fill(service, names + begin, count, &page);
    if (status == RK_OK) {
        reply->n_shards = page.count;
        reply->shards = page.pointers;
        status = rk_rpc_call_send(call, &reply->base);
    }
    reply->next_after = (ProtobufCBinaryData){0}; /* It lay in the page. */
    reply->n_shards = 0;
    reply->shards = NULL;
    rk_free(page.headers);
    rk_free(page.shards);
    rk_free(page.pointers);
    rk_free(names);
    return status;
}

static enum rk_status handle_store_status(struct rk_rpc_call *call, void *context,
                                          struct rk_error *error)
{
    struct kvstore_service *service = context;
    struct ProtobufCMessage *message = NULL;
    struct kvstore_stats stats;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__store_status_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__StoreStatusRequest *request =
        (const Redknot__V1__StoreStatusRequest *)message;
    kvstore_stats_get(service->store, &stats);
    Redknot__V1__StoreStatusReply reply = REDKNOT__V1__STORE_STATUS_REPLY__INIT;
    reply.node_id = (char *)service->node_id;
    reply.incarnation = service->incarnation;
    reply.capacity_bytes = stats.capacity_bytes;
    reply.used_bytes = stats.used_bytes;
    reply.pinned_bytes = stats.pinned_bytes;
    reply.num_shards = stats.num_shards;
    reply.num_values = stats.num_values;
    reply.num_staged = stats.num_staged;
    reply.version = (char *)REDKNOT_VERSION;
    reply.cluster_id = (char *)rk_service_cluster();
    reply.pid = (uint32_t)getpid();
    status = request->with_shards ? status_shards(service, call, request, &reply, error)
                                  : rk_rpc_call_send(call, &reply.base);
    rk_rpc_message_free(message);
    return status;
}

/* ---- The other paths ---- */

static enum rk_status path_pin(void *context, enum rk_path path, const struct rk_get *get,
                               uint64_t pages_max, uint64_t *ret_offsets, uint64_t *ret_checksums,
                               struct rk_found *ret_found, struct rk_error *error)
{
    struct kvstore_service *service = context;
    const struct kvstore_shard *shard = NULL;
    const struct message_get wanted = {.value = get->page_bytes == 0,
                                       .id = get->id,
                                       .fingerprint = get->fingerprint,
                                       .generation = get->generation,
                                       .shard_index = get->shard_index,
                                       .page_bytes = get->page_bytes,
                                       .bytes_max = get->bytes_max,
                                       .extents = (struct rk_extent *)(uintptr_t)get->extents,
                                       .num_extents = get->num_extents};
    rk_metric_add(service->gets[path], 1);
    enum rk_status status = pin(service, &wanted, &shard, error);
    if (status != RK_OK) {
        return status;
    }
    status = find(shard, &wanted, pages_max, ret_offsets, ret_checksums, ret_found, error);
    if (status != RK_OK) {
        kvstore_unpin(service->store, shard);
        return status;
    }
    rk_metric_add(service->read_bytes[path], (double)ret_found->bytes);
    ret_found->pin = (void *)(uintptr_t)shard;
    return RK_OK;
}

static void path_unpin(void *context, void *pin)
{
    struct kvstore_service *service = context;
    kvstore_unpin(service->store, pin);
}

const struct rk_transport_store_ops kvstore_service_store_ops = {.pin = path_pin,
                                                                 .unpin = path_unpin,
                                                                 .put_begin = path_put_begin,
                                                                 .put_write = path_put_write,
                                                                 .put_end = path_put_end,
                                                                 .put_destroy = path_put_destroy};

/* ---- Set-up ---- */

static const struct rk_rpc_method methods[] = {
    {.path = "/redknot.v1.KvStore/Put", .handler = handle_put},
    {.path = "/redknot.v1.KvStore/CommitShard",
     .handler = handle_commit_shard,
     .request_bytes_max = SMALL_BYTES_MAX},
    {.path = "/redknot.v1.KvStore/AbortShard",
     .handler = handle_abort_shard,
     .request_bytes_max = SMALL_BYTES_MAX},
    {.path = "/redknot.v1.KvStore/DropShard",
     .handler = handle_drop_shard,
     .request_bytes_max = LIST_BYTES_MAX},
    {.path = "/redknot.v1.KvStore/Get", .handler = handle_get, .request_bytes_max = GET_BYTES_MAX},
    {.path = "/redknot.v1.KvStore/HasValues",
     .handler = handle_has_values,
     .request_bytes_max = LIST_BYTES_MAX},
    {.path = "/redknot.v1.KvStore/DropValues",
     .handler = handle_drop_values,
     .request_bytes_max = LIST_BYTES_MAX},
    {.path = "/redknot.v1.KvStore/StoreStatus",
     .handler = handle_store_status,
     .request_bytes_max = SMALL_BYTES_MAX},
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
            rk_metric_histogram("redknot_kvstore_put_seconds", "Time to receive a put over gRPC.",
                                NULL, rk_metric_seconds, rk_metric_seconds_count),
    };
    for (size_t i = 0; i < sizeof(paths) / sizeof(paths[0]); i++) {
        char label[32];
        (void)snprintf(label, sizeof(label), "path=\"%s\"", rk_path_name(paths[i]));
        service->read_bytes[paths[i]] = rk_metric_counter(
            "redknot_kvstore_read_bytes_total", "Bytes of pages handed to readers.", label);
        service->gets[paths[i]] =
            rk_metric_counter("redknot_kvstore_gets_total", "Reads asked for, by path.", label);
        service->puts[paths[i]] =
            rk_metric_counter("redknot_kvstore_puts_total", "Items put, by path.", label);
    }
}
