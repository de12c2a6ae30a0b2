/*
 * The client's end of the UCX path. What is read is pushed by the store into
 * memory of the reader; what is put is pushed by us. Progress is made by the
 * caller's thread, inside its own calls only.
 */
#include "common/transport/transport_internal.h"
#include "common/transport/ucx_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <string.h>

#define KILL_MS         100
#define PUT_FRAMES_MAX  4 /* under way */
#define RECEIVES_MAX    8 /* of a get under way: twice as many as a store begins */
#define FRAME_PARTS_MAX UCX_PARTS_MAX

/* The request under way. */
struct request {
    uint32_t id; /* 0: none, so that late frames are ignored */
    bool replied;
    enum rk_status status; /* why it failed */
    struct rk_error *error;
    /* A get. */
    const struct rk_get *gets;
    struct rk_pages *pages;
    size_t num_gets;
    struct arrival arrival;
    uint32_t receiving; /* frames that UCX still writes into the reader's memory */
    /* A put. */
    struct rk_put *puts;
    size_t num_puts;
};

/* Pages that UCX writes where they belong. */
struct receive {
    struct ucx_client *client;
    bool busy;
    struct arrival_range range;
};

/* A frame of a put that UCX reads. */
struct put_frame {
    struct ucx_client *client;
    bool busy;
    struct wire_frame frame;
    struct iovec parts[FRAME_PARTS_MAX];
    ucp_dt_iov_t iov[FRAME_PARTS_MAX];
    struct __attribute__((packed)) {
        struct ucx_data data;
        uint64_t checksums[WIRE_FRAME_SUMS_MAX];
    } header;
};

struct ucx_client {
    struct ucx_worker ucx;
    ucp_ep_h endpoint;
    bool greeted;
    struct wire_identity identity; /* of the store */
    bool broken;
    char why[96];
    uint32_t sending; /* messages that UCX still reads */
    struct ucx_request header;
    struct wire_buffer body;
    uint32_t request_id;
    struct request request;
    struct receive receives[RECEIVES_MAX];
    struct arrival_buffers buffers;
    struct put_frame *put_frames; /* [PUT_FRAMES_MAX]; NULL: nothing was put yet */
};

static bool ucx_reachable(const struct rk_transport_endpoint *endpoint)
{
    return endpoint->ucx_address && endpoint->ucx_address[0] != '\0';
}

static void client_break(struct ucx_client *client, ucs_status_t why)
{
    if (!client->broken) {
        client->broken = true;
        (void)strncpy(client->why, client->ucx.api->ucs_status_string(why),
                      sizeof(client->why) - 1);
    }
}

static void on_error(void *context, ucp_ep_h endpoint, ucs_status_t status)
{
    (void)endpoint;
    client_break(context, status);
}

/* ---- Frames that arrive ---- */

static ucs_status_t on_hello(void *context, const void *header, size_t header_bytes, void *data,
                             size_t bytes, const ucp_am_recv_param_t *param)
{
    struct ucx_client *client = context;
    struct ucx_hello hello;
    if (header_bytes == sizeof(hello) && bytes == sizeof(client->identity) && !client->greeted &&
        !(param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)) {
        memcpy(&hello, header, sizeof(hello));
        memcpy(&client->identity, data, sizeof(client->identity));
        client->greeted = hello.magic == UCX_MAGIC && hello.version == UCX_VERSION;
    }
    return UCS_OK;
}

static void request_fail(struct request *request, enum rk_status status, const char *text)
{
    if (request->status == RK_OK) {
        request->status = rk_error_set(request->error, status, "%s", text);
    }
}

/* The request that a reply is for, if it is still waited for. */
static struct request *reply_take(struct ucx_client *client, const void *header,
                                  size_t header_bytes, const ucp_am_recv_param_t *param)
{
    struct request *request = &client->request;
    struct ucx_reply reply;
    if (header_bytes != sizeof(reply)) {
        return NULL;
    }
    memcpy(&reply, header, sizeof(reply));
    if (reply.magic != UCX_MAGIC || request->id == 0 || reply.request_id != request->id ||
        request->replied) {
        return NULL; /* Of a request that was given up. */
    }
    request->replied = true;
    if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) {
        request_fail(request, RK_ERR_UNAVAILABLE, "the store's reply is no reply");
        return NULL;
    }
    return request;
}

static ucs_status_t on_found(void *context, const void *header, size_t header_bytes, void *data,
                             size_t bytes, const ucp_am_recv_param_t *param)
{
    struct ucx_client *client = context;
    struct request *request = reply_take(client, header, header_bytes, param);
    struct wire_reader reader = {data, bytes};
    uint32_t count = 0;
    if (!request) {
        return UCS_OK;
    }
    if (!request->gets || !wire_take(&reader, &count, sizeof(count)) ||
        count != request->num_gets) {
        request_fail(request, RK_ERR_UNAVAILABLE, "the store answers another question");
        return UCS_OK;
    }
    enum rk_status status = RK_OK;
    for (uint32_t i = 0; status == RK_OK && i < count; i++) {
        struct wire_found found;
        const uint8_t *checksums = NULL;
        status = wire_found_parse(&reader, false, &request->gets[i], &request->pages[i], &found,
                                  &checksums, request->error);
    }
    if (status == RK_OK) {
        status = arrival_begin(&request->arrival, &client->buffers, request->gets, request->pages,
                               count, request->error);
    }
    request->status = status;
    if (status == RK_ERR_UNAVAILABLE) { /* Who mistakes one question will mistake the next. */
        client->broken = true;
        (void)strncpy(client->why, "the store answers another question", sizeof(client->why) - 1);
    }
    return UCS_OK;
}

static ucs_status_t on_results(void *context, const void *header, size_t header_bytes, void *data,
                               size_t bytes, const ucp_am_recv_param_t *param)
{
    struct request *request = reply_take(context, header, header_bytes, param);
    if (request) {
        request->status =
            wire_results_parse(data, bytes, request->puts, request->num_puts, request->error);
    }
    return UCS_OK;
}

static void on_received(void *handle, ucs_status_t status, size_t bytes, void *context)
{
    struct receive *receive = context;
    struct ucx_client *client = receive->client;
    (void)bytes;
    receive->busy = false;
    client->request.receiving--;
    if (status != UCS_OK) {
        client_break(client, status);
    } else {
        arrival_placed(&client->request.arrival, &receive->range);
    }
    client->ucx.api->ucp_request_free(handle);
}

/* Straight from the wire to where the bytes belong. */
static ucs_status_t receive_start(struct ucx_client *client, void *data, size_t bytes)
{
    struct request *request = &client->request;
    struct receive *receive = client->receives;
    while (receive < client->receives + RECEIVES_MAX && receive->busy) {
        receive++;
    }
    void *place = receive < client->receives + RECEIVES_MAX
                      ? arrival_reserve(&request->arrival, bytes, &receive->range)
                      : NULL;
    if (!place) {
        request_fail(request, RK_ERR_UNAVAILABLE, "the store sends what was not asked for");
        return UCS_OK;
    }
    ucp_request_param_t params = {.op_attr_mask =
                                      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                      UCP_OP_ATTR_FLAG_NO_IMM_CMPL | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                  .cb.recv_am = on_received,
                                  .user_data = receive,
                                  .memory_type = UCS_MEMORY_TYPE_HOST};
    receive->client = client;
    receive->busy = true;
    request->receiving++;
    ucs_status_ptr_t handle =
        client->ucx.api->ucp_am_recv_data_nbx(client->ucx.worker, data, place, bytes, &params);
    if (UCS_PTR_IS_ERR(handle)) {
        receive->busy = false;
        request->receiving--;
        client_break(client, UCS_PTR_STATUS(handle));
    }
    return UCS_INPROGRESS;
}

static ucs_status_t on_data(void *context, const void *header, size_t header_bytes, void *data,
                            size_t bytes, const ucp_am_recv_param_t *param)
{
    struct ucx_client *client = context;
    struct request *request = &client->request;
    struct ucx_data frame;
    if (header_bytes != sizeof(frame)) {
        return UCS_OK;
    }
    memcpy(&frame, header, sizeof(frame));
    if (frame.magic != UCX_MAGIC || request->id == 0 || frame.request_id != request->id ||
        !request->gets || !request->replied || request->status != RK_OK) {
        return UCS_OK;
    }
    if (frame.offset != request->arrival.done) {
        request_fail(request, RK_ERR_UNAVAILABLE, "the store sends what was not asked for");
    } else if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) {
        return receive_start(client, data, bytes);
    } else if (!arrival_take(&request->arrival, data, bytes)) {
        request_fail(request, RK_ERR_UNAVAILABLE, "the store sends what was not asked for");
    }
    return UCS_OK;
}

/* ---- Frames that leave ---- */

static void on_sent(void *handle, ucs_status_t status, void *context)
{
    struct ucx_client *client = context;
    client->sending--;
    if (status != UCS_OK) {
        client_break(client, status);
    }
    client->ucx.api->ucp_request_free(handle);
}

/* Header and data stay until it has left. */
static void send_frame(struct ucx_client *client, unsigned id, const void *header,
                       size_t header_bytes, const void *data, size_t bytes)
{
    ucp_request_param_t params = {.op_attr_mask =
                                      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                      UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                  .flags = UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER,
                                  .cb.send = on_sent,
                                  .user_data = client,
                                  .memory_type = UCS_MEMORY_TYPE_HOST};
    ucs_status_ptr_t handle = client->ucx.api->ucp_am_send_nbx(client->endpoint, id, header,
                                                               header_bytes, data, bytes, &params);
    if (UCS_PTR_IS_ERR(handle)) {
        client_break(client, UCS_PTR_STATUS(handle));
    } else if (handle) {
        client->sending++;
    }
}

/* ---- Connection ---- */

static bool outstanding(const struct ucx_client *client)
{
    return client->sending > 0 || client->request.receiving > 0;
}

/* Nothing of UCX touches our memory after this. */
static void client_kill(struct ucx_client *client)
{
    int64_t deadline_ns = rk_deadline_in_ms(KILL_MS);
    client->broken = true;
    if (client->endpoint) {
        ucx_endpoint_kill(&client->ucx, client->endpoint, deadline_ns);
        client->endpoint = NULL;
    }
    while (outstanding(client) && rk_deadline_left_ms(deadline_ns) > 0) {
        ucx_worker_wait(&client->ucx, -1, deadline_ns);
    }
    if (outstanding(client)) { /* It never calls back: without the worker it cannot write. */
        ucx_worker_destroy(&client->ucx);
        client->sending = 0;
        client->request.receiving = 0;
    }
}

static void ucx_client_destroy(void *connection)
{
    struct ucx_client *client = connection;
    if (client->ucx.worker) {
        client_kill(client);
    }
    ucx_worker_destroy(&client->ucx);
    arrival_buffers_destroy(&client->buffers);
    rk_free(client->body.data);
    rk_free(client->put_frames);
    rk_free(client);
}

static enum rk_status lost(const struct ucx_client *client, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_UNAVAILABLE, "the connection over UCX broke%s%s",
                        client->why[0] ? ": " : "", client->why);
}

static enum rk_status handlers_set(struct ucx_client *client, struct rk_error *error)
{
    static const struct {
        unsigned id;
        ucp_am_recv_callback_t handler;
    } handlers[] = {{UCX_HELLO, on_hello},
                    {UCX_FOUND, on_found},
                    {UCX_DATA, on_data},
                    {UCX_RESULTS, on_results}};
    enum rk_status status = RK_OK;
    for (size_t i = 0; status == RK_OK && i < sizeof(handlers) / sizeof(handlers[0]); i++) {
        status =
            ucx_worker_handle(&client->ucx, handlers[i].id, handlers[i].handler, client, error);
    }
    return status;
}

static enum rk_status endpoint_create(struct ucx_client *client, const struct ucx_address *address,
                                      struct rk_error *error)
{
    ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR |
                      UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER,
        .flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER,
        .err_handler = {.cb = on_error, .arg = client},
        .sockaddr = {.addr = (const struct sockaddr *)&address->storage,
                     .addrlen = address->bytes}};
    ucs_status_t result =
        client->ucx.api->ucp_ep_create(client->ucx.worker, &params, &client->endpoint);
    if (result != UCS_OK) {
        client_break(client, result);
        return lost(client, error);
    }
    return RK_OK;
}

static enum rk_status greet(struct ucx_client *client, const struct rk_transport_endpoint *endpoint,
                            const struct rk_until *until, struct rk_error *error)
{
    static const struct ucx_hello hello = {UCX_MAGIC, UCX_VERSION};
    send_frame(client, UCX_HELLO, &hello, sizeof(hello), NULL, 0);
    while (!client->greeted && !client->broken && rk_until_over(until) == RK_OK) {
        ucx_worker_wait(&client->ucx, -1, rk_until_slice_ns(until));
    }
    if (client->broken) {
        return lost(client, error);
    }
    if (!client->greeted) {
        return rk_error_set(error, transport_silent(until),
                            "the store does not answer over UCX in time");
    }
    return wire_identity_check(&client->identity, endpoint->node_id, endpoint->incarnation, error);
}

static enum rk_status ucx_connect(const struct rk_transport_endpoint *endpoint,
                                  const struct rk_until *until, void **ret_connection,
                                  struct rk_error *error)
{
    struct ucx_address address;
    if (!ucx_reachable(endpoint)) { /* Asked for all the same. */
        return rk_error_set(error, RK_ERR_UNAVAILABLE,
                            "the store serves no UCX: start it with --ucx auto");
    }
    struct ucx_client *client = rk_alloc_zero(1, sizeof(*client));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (!client) {
        return rk_error_set(error, status, "no memory for a connection");
    }
    status = ucx_address_resolve(endpoint->ucx_address, &address, error);
    if (status == RK_OK) {
        status = ucx_worker_create(&address, &client->ucx, error);
    }
    if (status == RK_OK) {
        status = handlers_set(client, error);
    }
    if (status == RK_OK) {
        status = endpoint_create(client, &address, error);
    }
    if (status == RK_OK) {
        status = greet(client, endpoint, until, error);
    }
    if (status != RK_OK) {
        ucx_client_destroy(client);
        return status;
    }
    *ret_connection = client;
    return RK_OK;
}

/* ---- Requests ---- */

/* False: the connection is of no use, or the last request has not even left. */
static bool request_begin(struct ucx_client *client, struct rk_error *error,
                          const struct rk_until *until)
{
    while (client->sending > 0 && !client->broken && rk_until_over(until) == RK_OK) {
        ucx_worker_wait(&client->ucx, -1,
                        rk_until_slice_ns(until)); /* The request of one given up. */
    }
    if (client->broken || client->sending > 0) {
        return false;
    }
    client->request_id = client->request_id == UINT32_MAX ? 1 : client->request_id + 1;
    client->request = (struct request){.id = client->request_id, .error = error};
    client->header = (struct ucx_request){UCX_MAGIC, client->request_id,
                                          (uint32_t)rk_deadline_left_ms(until->deadline_ns)};
    client->body.bytes = 0;
    client->body.failed = false;
    return true;
}

static enum rk_status request_send(struct ucx_client *client, unsigned id, struct rk_error *error)
{
    if (client->body.failed) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a request");
    }
    send_frame(client, id, &client->header, sizeof(client->header), client->body.data,
               client->body.bytes);
    return RK_OK;
}

/* Why a wait ended without what it was for. */
static enum rk_status given_up(const struct rk_until *until)
{
    enum rk_status over = rk_until_over(until);
    return over == RK_OK ? RK_ERR_DEADLINE : over;
}

/* Why a request that did not end ended. */
static enum rk_status request_lost(struct ucx_client *client, const struct rk_until *until,
                                   struct rk_error *error)
{
    return client->broken
               ? lost(client, error)
               : rk_error_set(error, given_up(until), "the store did not answer in time");
}

/* ---- Get ---- */

static bool get_done(const struct request *request)
{
    return request->receiving == 0 &&
           (request->status != RK_OK ||
            (request->replied && request->arrival.done == request->arrival.total));
}

static enum rk_status ucx_get(void *connection, const struct rk_get *gets, size_t num_gets,
                              const struct rk_until *until, struct rk_pages *pages,
                              struct rk_error *error)
{
    struct ucx_client *client = connection;
    struct request *request = &client->request;
    if (!request_begin(client, error, until)) {
        return request_lost(client, until, error);
    }
    request->gets = gets;
    request->num_gets = num_gets;
    request->pages = pages;
    wire_gets_append(&client->body, gets, num_gets);
    enum rk_status status = request_send(client, UCX_GET, error);
    while (status == RK_OK && !get_done(request) && !client->broken &&
           rk_until_over(until) == RK_OK) {
        ucx_worker_wait(&client->ucx, -1, rk_until_slice_ns(until));
    }
    request->id = 0;
    if (status == RK_OK && get_done(request)) {
        return request->status;
    }
    if (status == RK_OK) {
        status = request_lost(client, until, error);
    }
    if (request->receiving > 0) {
        client_kill(client); /* UCX must not write into what is another's by then. */
        status = rk_error_set(error, given_up(until), "the store stopped in a frame");
    }
    return status;
}

static void ucx_release(void *connection, struct rk_pages *pages, size_t num_pages)
{
    struct ucx_client *client = connection;
    arrival_release(&client->buffers, pages, num_pages);
}

/* ---- Put ---- */

static void on_frame_sent(void *handle, ucs_status_t status, void *context)
{
    struct put_frame *frame = context;
    frame->busy = false;
    on_sent(handle, status, frame->client);
}

static void put_frame_send(struct ucx_client *client, struct put_frame *frame, uint64_t offset)
{
    const struct wire_frame *out = &frame->frame;
    ucp_request_param_t params = {.op_attr_mask =
                                      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                      UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                  .flags = UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER,
                                  .cb.send = on_frame_sent,
                                  .user_data = frame,
                                  .memory_type = UCS_MEMORY_TYPE_HOST};
    frame->client = client;
    frame->header.data =
        (struct ucx_data){UCX_MAGIC, client->request.id, offset, out->num_checksums};
    memcpy(frame->header.checksums, out->checksums, out->num_checksums * sizeof(uint64_t));
    size_t header_bytes = sizeof(frame->header.data) + out->num_checksums * sizeof(uint64_t);
    const void *data = frame->parts[0].iov_base;
    size_t bytes = out->bytes;
    if (out->num_parts > 1) {
        for (size_t i = 0; i < out->num_parts; i++) {
            frame->iov[i] = (ucp_dt_iov_t){frame->parts[i].iov_base, frame->parts[i].iov_len};
        }
        params.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE;
        params.datatype = ucp_dt_make_iov();
        data = frame->iov;
        bytes = out->num_parts;
    }
    ucs_status_ptr_t handle = client->ucx.api->ucp_am_send_nbx(
        client->endpoint, UCX_PUT_DATA, &frame->header, header_bytes, data, bytes, &params);
    if (UCS_PTR_IS_ERR(handle)) {
        client_break(client, UCS_PTR_STATUS(handle));
    } else if (handle) {
        frame->busy = true;
        client->sending++;
    }
}

/* Sends what frames there are room for. False: all is out. */
static bool put_push(struct ucx_client *client, struct wire_outflow *outflow)
{
    for (size_t i = 0; i < PUT_FRAMES_MAX; i++) {
        struct put_frame *frame = &client->put_frames[i];
        while (!frame->busy && !client->broken) {
            uint64_t offset = outflow->offset;
            frame->frame.parts = frame->parts;
            frame->frame.parts_max = FRAME_PARTS_MAX;
            if (!wire_outflow_next(outflow, UCX_FRAME_BYTES, &frame->frame)) {
                return false;
            }
            put_frame_send(client, frame, offset);
        }
    }
    return true;
}

static enum rk_status ucx_put(void *connection, struct rk_put *puts, size_t num_puts,
                              const struct rk_until *until, struct rk_error *error)
{
    struct ucx_client *client = connection;
    struct request *request = &client->request;
    struct wire_outflow outflow = {.puts = puts, .num_puts = num_puts};
    if (!client->put_frames) {
        client->put_frames = rk_alloc_zero(PUT_FRAMES_MAX, sizeof(*client->put_frames));
    }
    if (!client->put_frames) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a put");
    }
    if (!request_begin(client, error, until)) {
        return request_lost(client, until, error);
    }
    request->puts = puts;
    request->num_puts = num_puts;
    wire_heads_append(&client->body, puts, num_puts);
    enum rk_status status = request_send(client, UCX_PUT, error);
    bool more = status == RK_OK;
    while (status == RK_OK && !client->broken && rk_until_over(until) == RK_OK &&
           !(request->replied && client->sending == 0)) {
        more = more && !request->replied && put_push(client, &outflow);
        ucx_worker_wait(&client->ucx, -1, rk_until_slice_ns(until));
    }
    request->id = 0;
    if (status == RK_OK && request->replied && client->sending == 0) {
        return request->status;
    }
    if (status == RK_OK) {
        status = request_lost(client, until, error);
    }
    client_kill(client); /* It is in the middle of a put, and may still read the pages. */
    return status == RK_ERR_DEADLINE
               ? rk_error_set(error, status, "the store did not take a put in time")
               : status;
}

const struct transport_ops transport_ucx = {
    .path = RK_PATH_UCX,
    .name = "ucx",
    .reachable = ucx_reachable,
    .connect = ucx_connect,
    .get = ucx_get,
    .release = ucx_release,
    .put = ucx_put,
    .destroy = ucx_client_destroy,
};
