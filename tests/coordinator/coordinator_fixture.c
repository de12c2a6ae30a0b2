#include "tests/coordinator/coordinator_fixture.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/kv_layout.h"
#include "common/rpc/origin_message.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

const uint8_t coordinator_fingerprint[32] = {7};

ProtobufCBinaryData bytes_of(const uint8_t *data)
{
    return (ProtobufCBinaryData){.len = 32, .data = (uint8_t *)(uintptr_t)data};
}

void up(struct fixture *f)
{
    struct rk_error error = {0};
    char address[64];

    assert_int_equal(coordinator_create(&f->options, &f->coordinator, &error), RK_OK);
    assert_int_equal(coordinator_start(f->coordinator), RK_OK);
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", coordinator_port(f->coordinator));
    assert_int_equal(rk_rpc_channel_create(address, &f->channel, &error), RK_OK);
}

void down(struct fixture *f)
{
    rk_rpc_channel_destroy(f->channel);
    coordinator_destroy(f->coordinator);
    f->channel = NULL;
    f->coordinator = NULL;
}

int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    assert_non_null(f);
    (void)strcpy(f->directory, "/tmp/redknot-coordinator-XXXXXX");
    assert_non_null(mkdtemp(f->directory));
    f->options = (struct coordinator_options){
        .listen = "127.0.0.1:0",
        .data_dir = f->directory,
        .timeout_ms = 600000, /* Nobody goes down by being slow, as under a sanitizer. */
    };
    for (int i = 0; i < 2; i++) {
        fake_store_start(&f->stores[i]);
    }
    up(f);
    *state = f;
    return 0;
}

int teardown(void **state)
{
    struct fixture *f = *state;
    char command[96];

    down(f);
    for (int i = 0; i < 2; i++) {
        fake_store_stop(&f->stores[i]);
    }
    (void)snprintf(command, sizeof(command), "rm -rf %s", f->directory);
    free(f);
    return system(command);
}

/* ---- Calls ---- */

enum rk_status call(struct fixture *f, const char *path, const ProtobufCMessage *request,
                    const ProtobufCMessageDescriptor *type, ProtobufCMessage **ret_reply)
{
    struct rk_error error = {0};
    enum rk_status status =
        rk_rpc_unary(f->channel, path, request, type, CALL_MS, ret_reply, &error);

    (void)memcpy(f->last_error, error.text, sizeof(f->last_error));
    return status;
}

const char *store_name(int i)
{
    return i == 0 ? "store-0" : "store-1";
}

enum rk_status try_register(struct fixture *f, int i, uint64_t incarnation)
{
    Redknot__V1__NodeInfo info = REDKNOT__V1__NODE_INFO__INIT;
    Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    enum rk_status status;

    info.node_id = (char *)(uintptr_t)store_name(i);
    info.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;
    info.incarnation = incarnation;
    info.grpc_address = f->stores[i].address;
    info.capacity_bytes = (uint64_t)(i + 1) << 30;
    request.node = &info;
    status =
        call(f, M("RegisterNode"), &request.base, &redknot__v1__register_reply__descriptor, &reply);
    if (status == RK_OK) {
        f->epoch = ((Redknot__V1__RegisterReply *)reply)->epoch;
        f->mark = ((Redknot__V1__RegisterReply *)reply)->mark;
    }
    rk_rpc_message_free(reply);
    return status;
}

void join(struct fixture *f, int i, uint64_t incarnation)
{
    assert_int_equal(try_register(f, i, incarnation), RK_OK);
}

/* removed may be NULL. Returns register_again. */
bool heartbeat(struct fixture *f, int i, uint64_t incarnation, Redknot__V1__Shard *removed)
{
    Redknot__V1__HeartbeatRequest request = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    bool again;

    request.node_id = (char *)(uintptr_t)store_name(i);
    request.incarnation = incarnation;
    request.n_removed = removed != NULL;
    request.removed = &removed;
    assert_int_equal(
        call(f, M("Heartbeat"), &request.base, &redknot__v1__heartbeat_reply__descriptor, &reply),
        RK_OK);
    again = ((Redknot__V1__HeartbeatReply *)reply)->register_again;
    rk_rpc_message_free(reply);
    return again;
}

enum rk_status place(struct fixture *f, uint8_t id, uint32_t num_tokens,
                     Redknot__V1__PlaceReply **ret_reply)
{
    uint8_t segment_id[32] = {id};
    uint32_t token_ids[64];
    Redknot__V1__KvLayout layout = REDKNOT__V1__KV_LAYOUT__INIT;
    Redknot__V1__PlaceRequest request = REDKNOT__V1__PLACE_REQUEST__INIT;
    Redknot__V1__Origin origin;

    layout.num_layers = 4;
    layout.num_kv_heads = 2;
    layout.head_dim = 8;
    layout.dtype = REDKNOT__V1__KV_LAYOUT__DTYPE__DTYPE_BF16;
    layout.page_tokens = RK_PAGE_TOKENS;
    for (uint32_t i = 0; i < 64; i++) {
        token_ids[i] = 1000u + id + i;
    }
    request.segment_id = bytes_of(segment_id);
    request.fingerprint = bytes_of(coordinator_fingerprint);
    request.layout = &layout;
    request.num_tokens = num_tokens;
    request.n_token_ids = num_tokens < 64 ? num_tokens : 64;
    request.token_ids = token_ids;
    request.label = (char *)(uintptr_t)(f->label == NULL ? "a label" : f->label);
    if (rk_origin_known(&f->origin)) {
        rk_origin_message_fill(&f->origin, &origin);
        request.origin = &origin;
    }
    return call(f, M("Place"), &request.base, &redknot__v1__place_reply__descriptor,
                (ProtobufCMessage **)ret_reply);
}

uint64_t place_ok(struct fixture *f, uint8_t id)
{
    Redknot__V1__PlaceReply *reply = NULL;
    uint64_t generation;

    assert_int_equal(place(f, id, 10, &reply), RK_OK);
    assert_false(reply->already_committed);
    assert_true(reply->n_shards >= 1 && reply->n_stores >= 1);
    generation = reply->shards[0]->generation;
    rk_rpc_message_free(&reply->base);
    return generation;
}

enum rk_status commit(struct fixture *f, uint8_t id, uint64_t generation)
{
    uint8_t segment_id[32] = {id};
    Redknot__V1__CommitRequest request = REDKNOT__V1__COMMIT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    enum rk_status status;

    request.segment_id = bytes_of(segment_id);
    request.generation = generation;
    status = call(f, M("Commit"), &request.base, &redknot__v1__commit_reply__descriptor, &reply);
    rk_rpc_message_free(reply);
    return status;
}

uint64_t put(struct fixture *f, uint8_t id)
{
    uint64_t generation = place_ok(f, id);

    assert_int_equal(commit(f, id, generation), RK_OK);
    return generation;
}

Redknot__V1__LocateReply *locate(struct fixture *f, uint8_t id, const uint8_t *model)
{
    uint8_t segment_id[32] = {id};
    ProtobufCBinaryData ids[1] = {bytes_of(segment_id)};
    Redknot__V1__LocateRequest request = REDKNOT__V1__LOCATE_REQUEST__INIT;
    Redknot__V1__LocateReply *reply = NULL;

    request.n_segment_ids = 1;
    request.segment_ids = ids;
    request.fingerprint = bytes_of(model);
    request.with_token_ids = true;
    assert_int_equal(call(f, M("Locate"), &request.base, &redknot__v1__locate_reply__descriptor,
                          (ProtobufCMessage **)&reply),
                     RK_OK);
    assert_int_equal(reply->n_locations, 1);
    return reply;
}

/* "" for a hit. tokens: whether the token ids must be told. */
void expect(struct fixture *f, uint8_t id, const char *miss, bool tokens)
{
    Redknot__V1__LocateReply *reply = locate(f, id, coordinator_fingerprint);
    const Redknot__V1__LocateReply__Location *location = reply->locations[0];

    assert_string_equal(location->miss, miss);
    assert_int_equal(location->n_shards != 0, miss[0] == '\0');
    assert_int_equal(location->n_token_ids, tokens ? 10 : 0);
    if (tokens) {
        assert_int_equal(location->token_ids[3], 1003 + id);
        assert_string_equal(location->label, "a label");
    }
    rk_rpc_message_free(&reply->base);
}

uint64_t generation_of(struct fixture *f, uint8_t id)
{
    Redknot__V1__LocateReply *reply = locate(f, id, coordinator_fingerprint);
    uint64_t generation;

    assert_int_equal(reply->locations[0]->n_shards, 1);
    generation = reply->locations[0]->shards[0]->generation;
    rk_rpc_message_free(&reply->base);
    return generation;
}

void drop_request(struct fixture *f, const Redknot__V1__DropRequest *request, uint32_t *ret_dropped,
                  uint64_t *ret_chains)
{
    ProtobufCMessage *reply = NULL;

    assert_int_equal(
        call(f, M("Drop"), &request->base, &redknot__v1__drop_reply__descriptor, &reply), RK_OK);
    *ret_dropped = ((Redknot__V1__DropReply *)reply)->dropped;
    *ret_chains = ((Redknot__V1__DropReply *)reply)->chains;
    rk_rpc_message_free(reply);
}

uint32_t drop(struct fixture *f, uint8_t id)
{
    uint8_t segment_id[32] = {id};
    ProtobufCBinaryData ids[1] = {bytes_of(segment_id)};
    Redknot__V1__DropRequest request = REDKNOT__V1__DROP_REQUEST__INIT;
    uint64_t chains = 0;
    uint32_t dropped = 0;

    request.n_segment_ids = 1;
    request.segment_ids = ids;
    drop_request(f, &request, &dropped, &chains);
    return dropped;
}

void tell(struct told *told, uint8_t id, uint64_t generation)
{
    memset(told, 0, sizeof(*told));
    told->id[0] = id;
    redknot__v1__head_range__init(&told->heads);
    told->heads.layer_end = 4;
    told->heads.kv_head_end = 2;
    redknot__v1__kv_layout__init(&told->layout);
    told->layout.num_layers = 4;
    told->layout.num_kv_heads = 2;
    told->layout.head_dim = 8;
    told->layout.dtype = REDKNOT__V1__KV_LAYOUT__DTYPE__DTYPE_BF16;
    told->layout.page_tokens = RK_PAGE_TOKENS;
    redknot__v1__shard__init(&told->shard);
    told->shard.segment_id = bytes_of(told->id);
    told->shard.fingerprint = bytes_of(coordinator_fingerprint);
    told->shard.generation = generation;
    told->shard.num_shards = 1;
    told->shard.num_tokens = 10;
    told->shard.heads = &told->heads;
    told->shard.layout = &told->layout;
    redknot__v1__announce_request__entry__init(&told->entry);
    told->entry.shard = &told->shard;
}

enum rk_status announce(struct fixture *f, int i, uint64_t incarnation, struct told *told,
                        size_t count, uint32_t *ret_accepted, size_t *ret_dropped)
{
    struct rk_rpc_stream *stream = NULL;
    Redknot__V1__AnnounceReply *reply = NULL;
    enum rk_status status;

    assert_int_equal(rk_rpc_stream_open(f->channel, M("Announce"), CALL_MS, &stream, NULL), RK_OK);
    for (size_t n = 0; n == 0 || n < count; n++) { /* One message per shard, one at least. */
        Redknot__V1__AnnounceRequest request = REDKNOT__V1__ANNOUNCE_REQUEST__INIT;
        Redknot__V1__AnnounceRequest__Entry *entry = count == 0 ? NULL : &told[n].entry;

        request.node_id = (char *)(uintptr_t)store_name(i);
        request.incarnation = incarnation;
        request.epoch = f->with_mark ? f->epoch : 0;
        request.mark = f->with_mark ? f->mark : 0;
        request.n_entries = count != 0;
        request.entries = &entry;
        if (rk_rpc_stream_send(stream, &request.base) != RK_OK) {
            break;
        }
    }
    (void)!rk_rpc_stream_send_done(stream);
    if (rk_rpc_stream_recv(stream, &redknot__v1__announce_reply__descriptor,
                           (ProtobufCMessage **)&reply) == RK_OK) {
        *ret_accepted = reply->accepted;
        *ret_dropped = reply->n_drop;
        rk_rpc_message_free(&reply->base);
    }
    status = rk_rpc_stream_finish(stream, NULL);
    rk_rpc_stream_destroy(stream);
    return status;
}
