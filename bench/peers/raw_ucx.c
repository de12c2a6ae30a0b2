/*
 * Bare UCX: a value is one active message, eager or by rendezvous as UCX chooses, received into the
 * reader's buffer. Each value of a batch has a request of its own; all are sent before the first
 * reply is awaited. Both ends sleep when there is nothing to do, as a service must.
 *
 *   UCX_TLS=tcp UCX_NET_DEVICES=lo bench_raw_ucx serve PORT | agent PORT
 */
#include "bench/agent.h"
#include "bench/peers/support.h"

#include "common/base/alloc.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <ucp/api/ucp.h>

/*
 * A server has handlers for GET and PUT, an agent for VALUE and DONE. Each end has one for every id
 * from 0 on: UCX 1.13 does not survive gaps.
 */
enum { AM_GET = 0, AM_PUT = 1, AM_VALUE = 0, AM_DONE = 1 };

struct header {
    struct raw_request request;
    uint64_t index; /* in the batch */
};

struct ucx {
    ucp_context_h context;
    ucp_worker_h worker;
    ucp_ep_h endpoint;
    int efd;
    size_t pending; /* agent: values or confirmations still to come */
    uint8_t *buffer;
};

static void ucx_check(ucs_status_t status, const char *what)
{
    if (status != UCS_OK) {
        agent_fail("UCX: %s: %s", what, ucs_status_string(status));
    }
}

static void ucx_wait(struct ucx *ucx)
{
    if (ucp_worker_progress(ucx->worker) == 0 && ucp_worker_arm(ucx->worker) == UCS_OK) {
        struct pollfd event = {.fd = ucx->efd, .events = POLLIN};
        (void)poll(&event, 1, -1);
    }
}

/* ---- Messages ---- */

static void on_sent(void *request, ucs_status_t status, void *header)
{
    ucx_check(status, "send");
    rk_free(header);
    ucp_request_free(request);
}

static void message_send(struct ucx *ucx, unsigned id, const struct header *header,
                         const void *data, size_t bytes)
{
    struct header *copy = rk_alloc(sizeof(*copy)); /* Stays until the message has left. */
    if (!copy) {
        agent_fail("no memory");
    }
    *copy = *header;
    const ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                                                        UCP_OP_ATTR_FIELD_USER_DATA,
                                        .cb.send = on_sent,
                                        .user_data = copy};
    ucs_status_ptr_t sent =
        ucp_am_send_nbx(ucx->endpoint, id, copy, sizeof(*copy), data, bytes, &params);
    if (!UCS_PTR_IS_PTR(sent)) {
        ucx_check(UCS_PTR_STATUS(sent), "send");
        rk_free(copy);
    }
    /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): on_sent() frees it. */
}

/* What is to be done when all bytes of a message are in their place. */
struct arrival {
    struct ucx *ucx;
    struct header header;
};

static void put_done(const struct arrival *arrival)
{
    message_send(arrival->ucx, AM_DONE, &arrival->header, NULL, 0);
}

static void on_put_received(void *request, ucs_status_t status, size_t bytes, void *context)
{
    (void)bytes;
    ucx_check(status, "receive");
    put_done(context);
    rk_free(context);
    ucp_request_free(request);
}

static void on_value_received(void *request, ucs_status_t status, size_t bytes, void *context)
{
    struct ucx *ucx = context;
    (void)bytes;
    ucx_check(status, "receive");
    ucx->pending--;
    ucp_request_free(request);
}

/* UCS_OK: the data is in its place, and callback will not be called. */
static ucs_status_t message_receive(struct ucx *ucx, void *data, uint8_t *place, size_t bytes,
                                    const ucp_am_recv_param_t *param,
                                    ucp_am_recv_data_nbx_callback_t callback, void *context)
{
    if (!(param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)) {
        memcpy(place, data, bytes);
        return UCS_OK;
    }
    const ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                                                        UCP_OP_ATTR_FIELD_USER_DATA |
                                                        UCP_OP_ATTR_FLAG_NO_IMM_CMPL,
                                        .cb.recv_am = callback,
                                        .user_data = context};
    ucs_status_ptr_t request = ucp_am_recv_data_nbx(ucx->worker, data, place, bytes, &params);
    if (UCS_PTR_IS_ERR(request)) {
        ucx_check(UCS_PTR_STATUS(request), "receive");
    }
    return UCS_INPROGRESS;
}

static ucs_status_t on_get(void *context, const void *header, size_t header_bytes, void *data,
                           size_t bytes, const ucp_am_recv_param_t *param)
{
    struct header wanted;
    (void)header_bytes;
    (void)data;
    (void)bytes;
    (void)param;
    memcpy(&wanted, header, sizeof(wanted));
    message_send(context, AM_VALUE, &wanted, raw_place(&wanted.request), wanted.request.bytes);
    return UCS_OK;
}

static ucs_status_t on_put(void *context, const void *header, size_t header_bytes, void *data,
                           size_t bytes, const ucp_am_recv_param_t *param)
{
    struct arrival *arrival = rk_alloc(sizeof(*arrival));
    (void)header_bytes;
    if (!arrival) {
        agent_fail("no memory");
    }
    arrival->ucx = context;
    memcpy(&arrival->header, header, sizeof(arrival->header));
    ucs_status_t status = message_receive(context, data, raw_place(&arrival->header.request), bytes,
                                          param, on_put_received, arrival);
    if (status == UCS_OK) {
        put_done(arrival);
        rk_free(arrival);
    }
    return status;
}

static ucs_status_t on_value(void *context, const void *header, size_t header_bytes, void *data,
                             size_t bytes, const ucp_am_recv_param_t *param)
{
    struct ucx *ucx = context;
    struct header got;
    (void)header_bytes;
    memcpy(&got, header, sizeof(got));
    ucs_status_t status = message_receive(ucx, data, ucx->buffer + got.index * bytes, bytes, param,
                                          on_value_received, ucx);
    ucx->pending -= status == UCS_OK;
    return status;
}

static ucs_status_t on_done(void *context, const void *header, size_t header_bytes, void *data,
                            size_t bytes, const ucp_am_recv_param_t *param)
{
    (void)header;
    (void)header_bytes;
    (void)data;
    (void)bytes;
    (void)param;
    ((struct ucx *)context)->pending--;
    return UCS_OK;
}

/* ---- Connecting ---- */

static void on_error(void *context, ucp_ep_h endpoint, ucs_status_t status)
{
    (void)context;
    (void)endpoint;
    agent_fail("UCX: the other end is gone: %s", ucs_status_string(status));
}

static void worker_create(struct ucx *ucx, ucp_am_recv_callback_t first,
                          ucp_am_recv_callback_t second)
{
    const ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES,
                                 .features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP};
    const ucp_worker_params_t worker = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                        .thread_mode = UCS_THREAD_MODE_SINGLE};
    const ucp_am_recv_callback_t handlers[] = {first, second};
    ucx_check(ucp_init(&params, NULL, &ucx->context), "context");
    ucx_check(ucp_worker_create(ucx->context, &worker, &ucx->worker), "worker");
    ucx_check(ucp_worker_get_efd(ucx->worker, &ucx->efd), "wake-up");
    for (unsigned id = 0; id < 2; id++) {
        const ucp_am_handler_param_t handler = {
            .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                          UCP_AM_HANDLER_PARAM_FIELD_ARG | UCP_AM_HANDLER_PARAM_FIELD_FLAGS,
            .id = id,
            .flags = UCP_AM_FLAG_WHOLE_MSG,
            .cb = handlers[id],
            .arg = ucx};
        ucx_check(ucp_worker_set_am_recv_handler(ucx->worker, &handler), "handler");
    }
}

static void endpoint_create(struct ucx *ucx, ucp_ep_params_t *params)
{
    params->field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params->err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params->err_handler.cb = on_error;
    ucx_check(ucp_ep_create(ucx->worker, params, &ucx->endpoint), "connect");
}

static void on_connection(ucp_conn_request_h request, void *context)
{
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST,
                              .conn_request = request};
    endpoint_create(context, &params);
}

static void serve(int port)
{
    struct ucx ucx = {.efd = -1};
    ucp_listener_h listener;
    const struct sockaddr_in address = {.sin_family = AF_INET,
                                        .sin_port = htons((uint16_t)port),
                                        .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const ucp_listener_params_t params = {
        .field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER,
        .sockaddr = {(const struct sockaddr *)&address, sizeof(address)},
        .conn_handler = {on_connection, &ucx}};
    worker_create(&ucx, on_get, on_put);
    ucx_check(ucp_listener_create(ucx.worker, &params, &listener), "listen");
    for (;;) { /* The driver ends it. */
        ucx_wait(&ucx);
    }
}

/* ---- The agent ---- */

static void batch_run(struct ucx *ucx, unsigned id, const struct raw_request *batch,
                      const uint8_t *data)
{
    ucx->pending = batch->batch;
    for (uint64_t i = 0; i < batch->batch; i++) {
        const struct header header = {{batch->first + i, 1, batch->bytes, batch->put}, i};
        message_send(ucx, id, &header, data ? data + i * batch->bytes : NULL,
                     data ? batch->bytes : 0);
    }
    while (ucx->pending > 0) {
        ucx_wait(ucx);
    }
}

static void get(void *context, uint64_t first, size_t batch, size_t bytes, uint8_t *buffer,
                const uint8_t **ret_values)
{
    struct ucx *ucx = context;
    const struct raw_request request = {first, batch, bytes, 0};
    (void)ret_values;
    ucx->buffer = buffer;
    batch_run(ucx, AM_GET, &request, NULL);
}

static void put(void *context, uint64_t first, size_t batch, size_t bytes, const uint8_t *data)
{
    const struct raw_request request = {first, batch, bytes, 1};
    batch_run(context, AM_PUT, &request, data);
}

static int agent(int port)
{
    static const struct agent_peer peer = {.get = get, .put = put};
    struct ucx ucx = {.efd = -1};
    const struct sockaddr_in address = {.sin_family = AF_INET,
                                        .sin_port = htons((uint16_t)port),
                                        .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR,
                              .flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER,
                              .sockaddr = {(const struct sockaddr *)&address, sizeof(address)}};
    worker_create(&ucx, on_value, on_done);
    endpoint_create(&ucx, &params);
    return agent_run(&peer, &ucx);
}

int main(int argc, char **argv)
{
    return raw_main(argc, argv, serve, agent);
}
