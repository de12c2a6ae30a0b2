#include "tests/coordinator/fake_store.h"

#include "common/rpc/rpc.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <stdio.h>
#include <string.h>

static enum rk_status commit(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct fake_store *store = context;
    Redknot__V1__CommitShardReply reply = REDKNOT__V1__COMMIT_SHARD_REPLY__INIT;
    ProtobufCMessage *request = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__commit_shard_request__descriptor, &request);
    void (*committed)(void *context, uint64_t generation) = atomic_load(&store->committed);
    uint64_t generation =
        status == RK_OK ? ((Redknot__V1__CommitShardRequest *)request)->generation : 0;

    rk_rpc_message_free(request);
    atomic_fetch_add(&store->commits, 1);
    if (status == RK_OK && committed != NULL) {
        committed(store->committed_context, generation);
    }
    if (status == RK_OK && atomic_load(&store->fail_commit) != RK_OK) {
        return rk_error_set(error, (enum rk_status)atomic_load(&store->fail_commit),
                            "told to fail");
    }
    return status == RK_OK ? rk_rpc_call_send(call, &reply.base) : status;
}

static enum rk_status abort_shard(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct fake_store *store = context;
    Redknot__V1__AbortShardReply reply = REDKNOT__V1__ABORT_SHARD_REPLY__INIT;
    ProtobufCMessage *request = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__abort_shard_request__descriptor, &request);

    (void)error;
    rk_rpc_message_free(request);
    atomic_fetch_add(&store->aborts, 1);
    return status == RK_OK ? rk_rpc_call_send(call, &reply.base) : status;
}

static enum rk_status drop(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct fake_store *store = context;
    Redknot__V1__DropShardReply reply = REDKNOT__V1__DROP_SHARD_REPLY__INIT;
    ProtobufCMessage *request = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__drop_shard_request__descriptor, &request);

    int count = 1;

    (void)error;
    if (status == RK_OK) {
        count += (int)((Redknot__V1__DropShardRequest *)request)->n_more;
        atomic_store(&store->last_dropped, ((Redknot__V1__DropShardRequest *)request)->generation);
    }
    rk_rpc_message_free(request);
    atomic_fetch_add(&store->drops, count);
    return status == RK_OK ? rk_rpc_call_send(call, &reply.base) : status;
}

void fake_store_start(struct fake_store *store)
{
    static const struct rk_rpc_method methods[] = {
        {.path = "/redknot.v1.KvStore/CommitShard", .handler = commit},
        {.path = "/redknot.v1.KvStore/AbortShard", .handler = abort_shard},
        {.path = "/redknot.v1.KvStore/DropShard", .handler = drop},
    };
    struct rk_rpc_server_options options = {.address = "127.0.0.1:0"};
    struct rk_error error = {0};

    memset(store, 0, sizeof(*store));
    RK_ASSERT(rk_rpc_server_create(&options, &store->server, &error) == RK_OK);
    RK_ASSERT(rk_rpc_server_add_service(store->server, "redknot.v1.KvStore", methods, 3, store) ==
              RK_OK);
    RK_ASSERT(rk_rpc_server_start(store->server) == RK_OK);
    (void)snprintf(store->address, sizeof(store->address), "127.0.0.1:%d",
                   rk_rpc_server_port(store->server));
}

void fake_store_stop(struct fake_store *store)
{
    rk_rpc_server_destroy(store->server);
    store->server = NULL;
}
