/* From an RPC call to a method and back. */
#include "common/base/clock.h"
#include "coordinator/coordinator_internal.h"

enum method {
    METHOD_REGISTER,
    METHOD_HEARTBEAT,
    METHOD_ANNOUNCE,
    METHOD_PLACE,
    METHOD_COMMIT,
    METHOD_ABORT,
    METHOD_LOCATE,
    METHOD_DROP,
    METHOD_STATUS,
    METHOD_LIST_STORES,
    METHOD_COUNT,
};

/* Filled once, before the server starts. */
static struct rk_metric *method_seconds[METHOD_COUNT];

static enum rk_status unary(struct rk_rpc_call *call, void *context, enum method method,
                            const ProtobufCMessageDescriptor *type, coordinator_method run,
                            struct rk_error *error)
{
    struct arena arena = {0};
    ProtobufCMessage *request = NULL;
    ProtobufCMessage *reply = NULL;
    double begin_s = rk_clock_s();
    enum rk_status status = rk_rpc_call_recv(call, type, &request);

    if (status != RK_OK) {
        return rk_error_set(error, status == RK_ERR_NOT_FOUND ? RK_ERR_INVALID : status,
                            "the call carries no readable %s", type->name);
    }
    status = run(context, &arena, request, &reply, error);
    if (status == RK_OK) {
        status = rk_rpc_call_send(call, reply);
    }
    arena_free(&arena);
    rk_rpc_message_free(request);
    rk_metric_observe(method_seconds[method], rk_clock_s() - begin_s);
    return status;
}

/* X(METHOD, name in C, name on the wire) */
/* What a request may have on the wire: names and numbers; 4,096 ids or shards; the token ids of a
 * segment, or of an announcement's message, as varints. */
#define SMALL_BYTES  (64u << 10)
#define LIST_BYTES   (1u << 20)
#define TOKENS_BYTES (24u << 20)

#define UNARY_LIST(X)                                                                              \
    X(REGISTER, register, "RegisterNode", SMALL_BYTES)                                             \
    X(HEARTBEAT, heartbeat, "Heartbeat", LIST_BYTES)                                               \
    X(PLACE, place, "Place", TOKENS_BYTES)                                                         \
    X(COMMIT, commit, "Commit", SMALL_BYTES)                                                       \
    X(ABORT, abort, "Abort", SMALL_BYTES)                                                          \
    X(LOCATE, locate, "Locate", LIST_BYTES)                                                        \
    X(DROP, drop, "Drop", LIST_BYTES)                                                              \
    X(STATUS, status, "Status", SMALL_BYTES)                                                       \
    X(LIST_STORES, list_stores, "ListStores", SMALL_BYTES)

#define UNARY_HANDLER(METHOD, name, word, bytes_max)                                               \
    static enum rk_status name##_handler(struct rk_rpc_call *call, void *context,                  \
                                         struct rk_error *error)                                   \
    {                                                                                              \
        return unary(call, context, METHOD_##METHOD, &redknot__v1__##name##_request__descriptor,   \
                     coordinator_##name, error);                                                   \
    }
UNARY_LIST(UNARY_HANDLER)
#undef UNARY_HANDLER

static enum rk_status announce_handler(struct rk_rpc_call *call, void *context,
                                       struct rk_error *error)
{
    double begin_s = rk_clock_s();
    enum rk_status status = coordinator_announce(call, context, error);

    rk_metric_observe(method_seconds[METHOD_ANNOUNCE], rk_clock_s() - begin_s);
    return status;
}

enum rk_status coordinator_add_service(struct coordinator *coordinator)
{
    static const struct {
        enum method method;
        const char *labels;
        struct rk_rpc_method rpc;
    } rows[] = {
#define UNARY_ROW(METHOD, name, word, bytes_max)                                                   \
    {METHOD_##METHOD,                                                                              \
     "method=\"" word "\"",                                                                        \
     {.path = "/redknot.v1.Coordinator/" word,                                                     \
      .handler = name##_handler,                                                                   \
      .request_bytes_max = (bytes_max)}},
        UNARY_LIST(UNARY_ROW)
#undef UNARY_ROW
            {METHOD_ANNOUNCE,
             "method=\"Announce\"",
             {.path = "/redknot.v1.Coordinator/Announce",
              .handler = announce_handler,
              .request_bytes_max = TOKENS_BYTES}},
    };
    struct rk_rpc_method methods[METHOD_COUNT];

    _Static_assert(sizeof(rows) / sizeof(rows[0]) == METHOD_COUNT, "one row per method");
    for (size_t i = 0; i < METHOD_COUNT; i++) {
        methods[i] = rows[i].rpc;
        method_seconds[rows[i].method] =
            rk_metric_histogram("redknot_coordinator_rpc_seconds", "Time in a handler.",
                                rows[i].labels, rk_metric_seconds, rk_metric_seconds_count);
    }
    return rk_rpc_server_add_service(coordinator->server, "redknot.v1.Coordinator", methods,
                                     METHOD_COUNT, coordinator);
}
