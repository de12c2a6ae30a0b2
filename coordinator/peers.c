#include "coordinator/peers.h"

#include "common/rpc/rpc.h"
#include "coordinator/health.pb-c.h"
#include "coordinator/record.h"
#include "coordinator/table_internal.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <pthread.h>
#include <string.h>

struct peer {
    char *address;
    struct rk_rpc_channel *channel;
    uint32_t users;
    UT_hash_handle hh;
};

struct peers {
    pthread_mutex_t lock;
    struct peer *table;
};

enum rk_status peers_create(struct peers **ret_peers)
{
    struct peers *peers = rk_alloc_zero(1, sizeof(*peers));

    if (peers == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    (void)pthread_mutex_init(&peers->lock, NULL);
    *ret_peers = peers;
    return RK_OK;
}

static void peer_free(struct peer *peer)
{
    rk_rpc_channel_destroy(peer->channel);
    rk_free(peer->address);
    rk_free(peer);
}

void peers_destroy(struct peers *peers)
{
    struct peer *peer;
    struct peer *next;

    if (peers == NULL) {
        return;
    }
    HASH_ITER (hh, peers->table, peer, next) {
        RK_ASSERT(peer->users == 0);
        HASH_DELETE(hh, peers->table, peer);
        peer_free(peer);
    }
    (void)pthread_mutex_destroy(&peers->lock);
    rk_free(peers);
}

/* Under the lock. */
static struct peer *take_idle(struct peers *peers)
{
    struct peer *peer;
    struct peer *next;

    HASH_ITER (hh, peers->table, peer, next) {
        if (peer->users == 0) {
            HASH_DELETE(hh, peers->table, peer);
            return peer;
        }
    }
    return NULL;
}

static enum rk_status peer_create(const char *address, struct peer **ret_peer,
                                  struct rk_error *error)
{
    struct peer *peer = rk_alloc_zero(1, sizeof(*peer));
    enum rk_status status = RK_ERR_NO_MEMORY;

    if (peer == NULL || (peer->address = rk_alloc_string(address)) == NULL) {
        (void)rk_error_set(error, status, "out of memory for a channel to %s", address);
        goto fail;
    }
    status = rk_rpc_channel_create(address, &peer->channel, error);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_peer = peer;
    return RK_OK;

fail:
    if (peer != NULL) {
        peer_free(peer);
    }
    return status;
}

static enum rk_status acquire(struct peers *peers, const char *address, struct peer **ret_peer,
                              struct rk_error *error)
{
    struct peer *idle = NULL;
    struct peer *peer = NULL;
    enum rk_status status = RK_OK;

    (void)pthread_mutex_lock(&peers->lock);
    HASH_FIND_STR(peers->table, address, peer);
    if (peer == NULL) {
        if (HASH_COUNT(peers->table) >= PEERS_MAX) {
            idle = take_idle(peers);
        }
        status = peer_create(address, &peer, error); /* Connects later, so it does not block. */
        if (status == RK_OK) {
            HASH_ADD_KEYPTR(hh, peers->table, peer->address, strlen(peer->address), peer);
            if (peer->hh.tbl == NULL) {
                peer_free(peer);
                status = rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a channel to %s",
                                      address);
            }
        }
    }
    if (status == RK_OK) {
        peer->users++;
        *ret_peer = peer;
    }
    (void)pthread_mutex_unlock(&peers->lock);
    if (idle != NULL) {
        peer_free(idle);
    }
    return status;
}

static void release(struct peers *peers, struct peer *peer)
{
    (void)pthread_mutex_lock(&peers->lock);
    peer->users--;
    (void)pthread_mutex_unlock(&peers->lock);
}

enum rk_status peers_call(struct peers *peers, enum peers_verb verb, const char *address,
                          const struct rk_id *id, uint64_t generation, uint32_t shard_index,
                          int timeout_ms, struct rk_error *error)
{
    Redknot__V1__CommitShardRequest commit = REDKNOT__V1__COMMIT_SHARD_REQUEST__INIT;
    Redknot__V1__AbortShardRequest abort = REDKNOT__V1__ABORT_SHARD_REQUEST__INIT;
    Redknot__V1__DropShardRequest drop = REDKNOT__V1__DROP_SHARD_REQUEST__INIT;
    const struct {
        const char *path;
        const ProtobufCMessage *request;
        const ProtobufCMessageDescriptor *reply;
    } calls[] = {
        [PEERS_COMMIT] = {"/redknot.v1.KvStore/CommitShard", &commit.base,
                          &redknot__v1__commit_shard_reply__descriptor},
        [PEERS_ABORT] = {"/redknot.v1.KvStore/AbortShard", &abort.base,
                         &redknot__v1__abort_shard_reply__descriptor},
        [PEERS_DROP] = {"/redknot.v1.KvStore/DropShard", &drop.base,
                        &redknot__v1__drop_shard_reply__descriptor},
    };
    struct peer *peer = NULL;
    ProtobufCMessage *reply = NULL;
    enum rk_status status = acquire(peers, address, &peer, error);

    if (status != RK_OK) {
        return status;
    }
    commit.segment_id = abort.segment_id = drop.segment_id = record_put_id(id);
    commit.generation = abort.generation = drop.generation = generation;
    commit.shard_index = abort.shard_index = drop.shard_index = shard_index;
    status = rk_rpc_unary(peer->channel, calls[verb].path, calls[verb].request, calls[verb].reply,
                          timeout_ms, &reply, error);
    if (status == RK_OK) {
        rk_rpc_message_free(reply);
    }
    release(peers, peer);
    return status;
}

enum rk_status peers_drop(struct peers *peers, const struct index_drop *drops, size_t count,
                          int timeout_ms, struct rk_error *error)
{
    Redknot__V1__DropShardRequest request = REDKNOT__V1__DROP_SHARD_REQUEST__INIT;
    Redknot__V1__DropShardRequest__Name *names = rk_alloc_zero(count, sizeof(*names));
    Redknot__V1__DropShardRequest__Name **pointers = rk_alloc_zero(count, sizeof(*pointers));
    ProtobufCMessage *reply = NULL;
    struct peer *peer = NULL;
    enum rk_status status = RK_ERR_NO_MEMORY;

    RK_ASSERT(count >= 1 && count <= PEERS_DROPS_MAX);
    if (names == NULL || pointers == NULL) {
        (void)rk_error_set(error, status, "out of memory to drop %zu shards", count);
        goto done;
    }
    request.segment_id = record_put_id(&drops[0].id);
    request.generation = drops[0].generation;
    request.shard_index = drops[0].shard_index;
    for (size_t i = 1; i < count; i++) {
        redknot__v1__drop_shard_request__name__init(&names[i]);
        names[i].segment_id = record_put_id(&drops[i].id);
        names[i].generation = drops[i].generation;
        names[i].shard_index = drops[i].shard_index;
        pointers[i - 1] = &names[i];
    }
    request.n_more = count - 1;
    request.more = pointers;
    status = acquire(peers, drops[0].address, &peer, error);
    if (status == RK_OK) {
        status =
            rk_rpc_unary(peer->channel, "/redknot.v1.KvStore/DropShard", &request.base,
                         &redknot__v1__drop_shard_reply__descriptor, timeout_ms, &reply, error);
        rk_rpc_message_free(reply);
        release(peers, peer);
    }

done:
    rk_free(names);
    rk_free(pointers);
    return status;
}

/* ---- Probes ---- */

struct peers_probe {
    struct peers *peers;
    struct peer *peer;
    struct rk_rpc_stream *stream;
};

enum rk_status peers_probe_create(struct peers *peers, const char *address, int timeout_ms,
                                  struct peers_probe **ret_probe, struct rk_error *error)
{
    struct peers_probe *probe = rk_alloc_zero(1, sizeof(*probe));
    enum rk_status status;

    if (probe == NULL) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a probe of %s", address);
    }
    probe->peers = peers;
    status = acquire(peers, address, &probe->peer, error);
    if (status == RK_OK) {
        status = rk_rpc_stream_open(probe->peer->channel, "/grpc.health.v1.Health/Check",
                                    timeout_ms, &probe->stream, error);
    }
    if (status != RK_OK) {
        goto fail;
    }
    *ret_probe = probe;
    return RK_OK;

fail:
    peers_probe_destroy(probe);
    return status;
}

enum rk_status peers_probe_send(struct peers_probe *probe)
{
    Redknot__Coordinator__V1__HealthCheckRequest request =
        REDKNOT__COORDINATOR__V1__HEALTH_CHECK_REQUEST__INIT;
    enum rk_status status;

    request.service = (char *)(uintptr_t) "redknot.v1.KvStore";
    status = rk_rpc_stream_send(probe->stream, &request.base);
    return status == RK_OK ? rk_rpc_stream_send_done(probe->stream) : status;
}

enum rk_status peers_probe_result(struct peers_probe *probe, struct rk_error *error)
{
    Redknot__Coordinator__V1__HealthCheckResponse *reply = NULL;
    bool serving = false;
    enum rk_status received = rk_rpc_stream_recv(
        probe->stream, &redknot__coordinator__v1__health_check_response__descriptor,
        (ProtobufCMessage **)&reply);
    enum rk_status status;

    if (received == RK_OK) {
        serving = reply->status ==
                  REDKNOT__COORDINATOR__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
        rk_rpc_message_free(&reply->base);
    }
    status = rk_rpc_stream_finish(probe->stream, error);
    if (status != RK_OK) {
        return status;
    }
    if (received != RK_OK) {
        return rk_error_set(error, RK_ERR_INVALID, "the answer to a health check is unreadable");
    }
    return serving ? RK_OK
                   : rk_error_set(error, RK_ERR_UNAVAILABLE, "it says that it does not serve");
}

void peers_probe_cancel(struct peers_probe *probe)
{
    rk_rpc_stream_cancel(probe->stream);
}

void peers_probe_destroy(struct peers_probe *probe)
{
    if (probe == NULL) {
        return;
    }
    rk_rpc_stream_destroy(probe->stream);
    if (probe->peer != NULL) {
        release(probe->peers, probe->peer);
    }
    rk_free(probe);
}
