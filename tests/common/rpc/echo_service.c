#include "tests/common/rpc/echo_service.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "redknot/v1/worker.pb-c.h"

#include <stdlib.h>
#include <string.h>

static enum rk_status echo_recv(struct rk_rpc_call *call, Redknot__V1__TokenizeRequest **ret)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__tokenize_request__descriptor, &message);
    if (status == RK_OK) {
        *ret = (Redknot__V1__TokenizeRequest *)message;
    }
    return status;
}

static enum rk_status echo_send(struct rk_rpc_call *call, uint32_t number)
{
    Redknot__V1__TokenizeReply reply = REDKNOT__V1__TOKENIZE_REPLY__INIT;
    uint32_t ids[1] = {number};
    reply.n_token_ids = 1;
    reply.token_ids = ids;
    return rk_rpc_call_send(call, &reply.base);
}

/* Replies with the length of text. */
static enum rk_status echo_unary(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    (void)context;
    (void)error;
    Redknot__V1__TokenizeRequest *request = NULL;
    enum rk_status status = echo_recv(call, &request);
    if (status != RK_OK) {
        return status;
    }
    uint32_t length = (uint32_t)strlen(request->text);
    rk_rpc_message_free(&request->base);
    return echo_send(call, length);
}

static enum rk_status echo_status(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    (void)context;
    Redknot__V1__TokenizeRequest *request = NULL;
    enum rk_status status = echo_recv(call, &request);
    if (status != RK_OK) {
        return status;
    }
    enum rk_status wanted = rk_status_from_name(request->text);
    (void)rk_error_set(error, wanted, "said %s \xc3\xa9 %% \n\xff", request->text);
    rk_rpc_message_free(&request->base);
    status = echo_send(call, 1); /* Also a reply before an error must do no harm. */
    return status == RK_OK ? wanted : status;
}

static enum rk_status echo_count(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    (void)error;
    struct echo_service *service = context;
    Redknot__V1__TokenizeRequest *request = NULL;
    enum rk_status status = echo_recv(call, &request);
    if (status != RK_OK) {
        return status;
    }
    uint32_t count = (uint32_t)strtoul(request->text, NULL, 10);
    rk_rpc_message_free(&request->base);
    for (uint32_t i = 0; i < count && status == RK_OK; i++) {
        status = echo_send(call, i);
    }
    if (status == RK_ERR_CANCELLED || status == RK_ERR_DEADLINE) {
        atomic_fetch_add(&service->cancelled, 1);
    }
    return status;
}

static enum rk_status echo_upload(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    (void)error;
    struct echo_service *service = context;
    uint32_t count = 0;
    bool whole = false;
    for (;;) {
        Redknot__V1__TokenizeRequest *request = NULL;
        enum rk_status status = echo_recv(call, &request);
        if (status == RK_ERR_NOT_FOUND) {
            if (!whole) {
                atomic_fetch_add(&service->truncated, 1);
            }
            return echo_send(call, count);
        }
        if (status != RK_OK) {
            atomic_fetch_add(&service->cancelled, 1);
            return status;
        }
        whole = strcmp(request->text, "last") == 0;
        rk_rpc_message_free(&request->base);
        count++;
    }
}

static enum rk_status echo_bidi(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    (void)context;
    (void)error;
    for (;;) {
        Redknot__V1__TokenizeRequest *request = NULL;
        enum rk_status status = echo_recv(call, &request);
        if (status != RK_OK) {
            return status == RK_ERR_NOT_FOUND ? RK_OK : status;
        }
        uint32_t length = (uint32_t)strlen(request->text);
        rk_rpc_message_free(&request->base);
        status = echo_send(call, length);
        if (status != RK_OK) {
            return status;
        }
    }
}

static enum rk_status echo_hang(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    (void)error;
    struct echo_service *service = context;
    atomic_fetch_add(&service->running, 1);
    while (!rk_rpc_call_cancelled(call)) {
        rk_clock_sleep_ms(1);
    }
    atomic_fetch_add(&service->cancelled, 1);
    atomic_fetch_sub(&service->running, 1);
    return RK_ERR_CANCELLED;
}

static enum rk_status echo_flood(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    static uint32_t ids[1 << 18];
    (void)error;
    struct echo_service *service = context;
    Redknot__V1__TokenizeReply reply = REDKNOT__V1__TOKENIZE_REPLY__INIT;
    reply.n_token_ids = sizeof(ids) / sizeof(ids[0]);
    reply.token_ids = ids;
    enum rk_status status = RK_OK;
    while (status == RK_OK) {
        status = rk_rpc_call_send(call, &reply.base);
    }
    atomic_fetch_add(&service->cancelled, 1);
    return status;
}

static enum rk_status echo_early(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    (void)error;
    struct echo_service *service = context;
    enum rk_status status = echo_send(call, 7);
    atomic_fetch_add(&service->running, 1);
    rk_rpc_call_end_early(call);
    while (!atomic_load(&service->go_on)) {
        rk_clock_sleep_ms(1);
    }
    if (rk_rpc_call_cancelled(call)) {
        atomic_fetch_add(&service->cancelled, 1);
    }
    atomic_fetch_sub(&service->running, 1);
    return status == RK_OK ? RK_ERR_INTERNAL : status; /* Ignored: the client has its status. */
}

struct big {
    struct echo_service *service;
    uint8_t header[16];
    uint8_t *payload;
};

static void big_release(void *context)
{
    struct big *big = context;
    atomic_fetch_add(&big->service->released, 1);
    rk_free(big->payload);
    rk_free(big);
}

/* TokenizeReply.token_ids is packed: field 1, wire type 2, the length, then one byte for each id.
 */
static enum rk_status echo_big(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    (void)error;
    Redknot__V1__TokenizeRequest *request = NULL;
    enum rk_status status = echo_recv(call, &request);
    if (status != RK_OK) {
        return status;
    }
    size_t bytes = strtoul(request->text, NULL, 10);
    rk_rpc_message_free(&request->base);
    struct big *big = rk_alloc_zero(1, sizeof(*big));
    big->service = context;
    big->payload = rk_alloc(bytes);
    memset(big->payload, ECHO_BIG_BYTE, bytes);
    size_t header_bytes = 0;
    big->header[header_bytes++] = 1 << 3 | 2;
    for (size_t left = bytes; left > 0 || header_bytes == 1; left >>= 7) {
        big->header[header_bytes++] = (uint8_t)((left & 0x7f) | (left > 0x7f ? 0x80 : 0));
    }
    struct rk_rpc_part parts[] = {{big->header, header_bytes}, {big->payload, bytes}};
    return rk_rpc_call_send_parts(call, parts, 2, big_release, big);
}

const struct rk_rpc_method echo_methods[] = {
    {.path = ECHO_UNARY, .handler = echo_unary},   {.path = ECHO_PLAIN, .handler = echo_unary},
    {.path = ECHO_STATUS, .handler = echo_status}, {.path = ECHO_COUNT, .handler = echo_count},
    {.path = ECHO_BIDI, .handler = echo_bidi},     {.path = ECHO_HANG, .handler = echo_hang},
    {.path = ECHO_UPLOAD, .handler = echo_upload}, {.path = ECHO_BIG, .handler = echo_big},
    {.path = ECHO_FLOOD, .handler = echo_flood},   {.path = ECHO_EARLY, .handler = echo_early},
};
const size_t echo_num_methods = sizeof(echo_methods) / sizeof(echo_methods[0]);
