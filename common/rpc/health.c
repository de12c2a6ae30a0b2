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

int rpc_health_state(const struct rk_rpc_server *server, bool known)
{
    return !known ? UNKNOWN_SERVICE : server->serving ? SERVING : NOT_SERVING;
}

enum rk_status rpc_health_send(struct rk_rpc_call *call, int state)
{
    Grpc__Health__V1__HealthCheckResponse reply = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    reply.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)state;
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
    int state = rpc_health_state(server, true);
    pthread_mutex_unlock(&server->sync.mutex);
    return rpc_health_send(call, state);
}

/* The keeper sends the state, then each change of it, until the client goes or the server stops. */
static enum rk_status health_watch(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    bool known = false;
    (void)context;
    enum rk_status status = health_recv(call, &known);
    if (status == RK_OK && !rpc_keeper_watch(call, known)) {
        status = rk_error_set(error, RK_ERR_FULL, "as many watch this server's health as may");
    }
    return status;
}

enum rk_status rpc_health_add(struct rk_rpc_server *server)
{
    static const struct rk_rpc_method methods[] = {
        {.path = "/grpc.health.v1.Health/Check", .handler = health_check},
        {.path = "/grpc.health.v1.Health/Watch", .handler = health_watch},
    };
    const size_t num_methods = sizeof(methods) / sizeof(methods[0]);
    struct rpc_method *added = &server->methods[server->num_methods];
    enum rk_status status =
        rk_rpc_server_add_service(server, "grpc.health.v1.Health", methods, num_methods, server);
    for (size_t i = 0; status == RK_OK && i < num_methods; i++) {
        added[i].on_loop = true; /* They answer though all handlers are taken. */
        added[i].is_watch = methods[i].handler == health_watch;
    }
    return status;
}
