/* A thread that keeps this worker known to the coordinator: register, then heartbeats. */
#include "worker/api/api.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/service.h"
#include "common/rpc/rpc.h"
#include "redknot/v1/coordinator.pb-c.h"

#include <pthread.h>

#define CALL_TIMEOUT_MS     1000
#define RETRY_MS            250
#define HEARTBEAT_MS_MAX    5000
#define NUMERIC_PATH_DIGITS 16 /* enough to compare */

struct api_membership {
    struct api_membership_options options;
    struct rk_rpc_channel *channel;
    pthread_t thread;
    bool thread_started;
    pthread_mutex_t mutex;
    pthread_cond_t stop;
    bool stopping; /* guarded */
};

static bool is_stopping(void *context)
{
    struct api_membership *membership = context;
    pthread_mutex_lock(&membership->mutex);
    bool stopping = membership->stopping;
    pthread_mutex_unlock(&membership->mutex);
    return stopping;
}

/* A stop ends the call: a coordinator that is silent must not hold up the worker's end. */
static struct rk_until call_until(struct api_membership *membership)
{
    return (struct rk_until){.deadline_ns = rk_deadline_in_ms(CALL_TIMEOUT_MS),
                             .cancelled = is_stopping,
                             .context = membership};
}

/* False: stop was asked for. */
static bool wait_ms(struct api_membership *membership, int64_t ms)
{
    int64_t deadline = rk_deadline_in_ms(ms);
    struct timespec until = {.tv_sec = deadline / 1000000000, .tv_nsec = deadline % 1000000000};
    pthread_mutex_lock(&membership->mutex);
    while (!membership->stopping && rk_clock_ns() < deadline) {
        pthread_cond_timedwait(&membership->stop, &membership->mutex, &until);
    }
    bool go_on = !membership->stopping;
    pthread_mutex_unlock(&membership->mutex);
    return go_on;
}

static enum rk_status join_cluster(struct api_membership *membership, uint32_t *ret_heartbeat_ms,
                                   struct rk_error *error)
{
    const struct api_membership_options *options = &membership->options;
    Redknot__V1__NodeInfo node = REDKNOT__V1__NODE_INFO__INIT;
    node.node_id = (char *)options->node_id;
    node.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_WORKER;
    node.incarnation = options->incarnation;
    node.grpc_address = (char *)options->grpc_address;
    node.host_id = (char *)rk_host_id();
    node.version = (char *)REDKNOT_VERSION;
    node.model = (char *)options->model_name;
    char path[RK_ID_HEX_BYTES];
    rk_id_to_hex(&options->numeric_path, path);
    path[NUMERIC_PATH_DIGITS] = '\0';
    node.numeric_path = path;
    node.metrics_address = (char *)options->metrics_address;
    node.fingerprint.data = (uint8_t *)options->fingerprint.bytes;
    node.fingerprint.len = sizeof(options->fingerprint.bytes);
    Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
    request.node = &node;
    request.cluster_id = (char *)rk_service_cluster();
    struct ProtobufCMessage *message = NULL;
    struct rk_until until = call_until(membership);
    enum rk_status status = rk_rpc_unary_until(
        membership->channel, "/redknot.v1.Coordinator/RegisterNode", &request.base,
        &redknot__v1__register_reply__descriptor, &until, &message, error);
    if (status == RK_OK) {
        uint32_t heartbeat_ms = ((const Redknot__V1__RegisterReply *)(void *)message)->heartbeat_ms;
        *ret_heartbeat_ms =
            heartbeat_ms > 0 && heartbeat_ms < HEARTBEAT_MS_MAX ? heartbeat_ms : HEARTBEAT_MS_MAX;
        rk_rpc_message_free(message);
    }
    return status;
}

/* RK_ERR_NOT_FOUND: the coordinator does not know us (any more). */
static enum rk_status heartbeat(struct api_membership *membership, struct rk_error *error)
{
    Redknot__V1__HeartbeatRequest request = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    request.node_id = (char *)membership->options.node_id;
    request.incarnation = membership->options.incarnation;
    struct ProtobufCMessage *message = NULL;
    struct rk_until until = call_until(membership);
    enum rk_status status =
        rk_rpc_unary_until(membership->channel, "/redknot.v1.Coordinator/Heartbeat", &request.base,
                           &redknot__v1__heartbeat_reply__descriptor, &until, &message, error);
    if (status == RK_OK) {
        if (((const Redknot__V1__HeartbeatReply *)(void *)message)->register_again) {
            status = RK_ERR_NOT_FOUND;
        }
        rk_rpc_message_free(message);
    }
    return status;
}

static void *membership_thread(void *context)
{
    struct api_membership *membership = context;
    bool joined = false;
    bool told = false; /* An outage is logged once, not with each try. */
    uint32_t wait = 0;
    uint32_t heartbeat_ms = RETRY_MS;
    while (wait_ms(membership, wait)) {
        struct rk_error error = {.text = ""};
        enum rk_status status = joined ? heartbeat(membership, &error)
                                       : join_cluster(membership, &heartbeat_ms, &error);
        wait = status == RK_OK ? heartbeat_ms : RETRY_MS;
        if (status == RK_OK && !joined) {
            RK_LOG_INFO("joined", "coordinator=%s", membership->options.coordinator);
            joined = true;
            told = false;
        } else if (status == RK_ERR_NOT_FOUND && joined) {
            joined = false;
            wait = 0;
        } else if (status != RK_OK && status != RK_ERR_CANCELLED && !told) {
            RK_LOG_WARN("coordinator_unreachable", "coordinator=%s action=retry reason=%q",
                        membership->options.coordinator, error.text);
            told = true;
        } else if (status == RK_OK) {
            told = false;
        }
    }
    return NULL;
}

enum rk_status api_membership_start(const struct api_membership_options *options,
                                    struct api_membership **ret_membership, struct rk_error *error)
{
    struct api_membership *membership = rk_alloc_zero(1, sizeof(*membership));
    if (!membership) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the membership");
    }
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&membership->stop, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&membership->mutex, NULL);
    membership->options = *options;
    enum rk_status status =
        rk_rpc_channel_create(options->coordinator, &membership->channel, error);
    if (status != RK_OK) {
        goto fail;
    }
    if (pthread_create(&membership->thread, NULL, membership_thread, membership) != 0) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "cannot start the membership's thread");
        goto fail;
    }
    membership->thread_started = true;
    *ret_membership = membership;
    return RK_OK;

fail:
    api_membership_stop(membership);
    return status;
}

void api_membership_stop(struct api_membership *membership)
{
    if (!membership) {
        return;
    }
    if (membership->thread_started) {
        pthread_mutex_lock(&membership->mutex);
        membership->stopping = true;
        pthread_cond_signal(&membership->stop);
        pthread_mutex_unlock(&membership->mutex);
        pthread_join(membership->thread, NULL);
    }
    rk_rpc_channel_destroy(membership->channel);
    pthread_cond_destroy(&membership->stop);
    pthread_mutex_destroy(&membership->mutex);
    rk_free(membership);
}
