#include "common/rpc/server_internal.h"

#include "grpc/health/v1/health.pb-c.h"

#include <string.h>

#define UNKNOWN_SERVICE GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN
#define SERVING         GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING     GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING

/* "" is the server as a whole. */
static bool health_knows(const struct rk_rpc_server *server, const char *service)
{
    bool known = service[0] == '\0';
    for (size_t i = 0; i < server->num_services && !known; i++) {
        known = strcmp(server->services[i], service) == 0;
    }
    return known;
}

static enum rk_status health_send(struct rk_rpc_call *call, int serving_status)
{
    Grpc__Health__V1__HealthCheckResponse reply = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    reply.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)serving_status;
    return rk_rpc_call_send(call, &reply.base);
}

static enum rk_status health_recv(struct rk_rpc_call *call, bool *ret_known)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &grpc__health__v1__health_check_request__descriptor, &message);
    if (status == RK_OK) {
        const Grpc__Health__V1__HealthCheckRequest *request =
            (const Grpc__Health__V1__HealthCheckRequest *)message;
        *ret_known = health_knows(call->server, request->service);
        rk_rpc_message_free(message);
    }
    return status == RK_ERR_NOT_FOUND ? RK_ERR_INVALID : status;
}

static enum rk_status health_check(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct rk_rpc_server *server = context;
    bool known = false;
    enum rk_status status = health_recv(call, &known);
    if (status != RK_OK) {
        return status;
    }
    if (!known) {
        return rk_error_set(error, RK_ERR_NOT_FOUND, "no such service on this server");
    }
    pthread_mutex_lock(&server->sync.mutex);
    bool serving = server->serving;
    pthread_mutex_unlock(&server->sync.mutex);
    return health_send(call, serving ? SERVING : NOT_SERVING);
}

/* Sends the state, then each change of it, until the client goes or the server stops. */
static enum rk_status health_watch(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct rk_rpc_server *server = context;
    bool known = false;
    enum rk_status status = health_recv(call, &known);
    int sent = -1;
    while (status == RK_OK) {
        pthread_mutex_lock(&server->sync.mutex);
        int now = sent;
        while (now == sent && !server->stopping && !rk_rpc_call_cancelled(call)) {
            now = !known ? UNKNOWN_SERVICE : server->serving ? SERVING : NOT_SERVING;
            if (now == sent) {
                (void)rpc_sync_wait(&server->sync, call->deadline_ns);
            }
        }
        bool stopping = server->stopping;
        pthread_mutex_unlock(&server->sync.mutex);
        if (now != sent) {
            status = health_send(call, now);
            sent = now;
        } else if (stopping) {
            return rk_error_set(error, RK_ERR_UNAVAILABLE, "the server stops");
        } else {
            status = RK_ERR_CANCELLED;
        }
    }
    return status;
}

enum rk_status rpc_health_add(struct rk_rpc_server *server)
{
    static const struct rk_rpc_method methods[] = {
        {.path = "/grpc.health.v1.Health/Check", .handler = health_check},
        {.path = "/grpc.health.v1.Health/Watch", .handler = health_watch},
    };
    return rk_rpc_server_add_service(server, "grpc.health.v1.Health", methods,
                                     sizeof(methods) / sizeof(methods[0]), server);
}
