/*
 * The reader's end of the UCX path: the store pushes pages into a buffer of the
 * reader. Progress is made by the caller's thread, inside its own calls only.
 */
#include "common/transport/transport_internal.h"
#include "common/transport/ucx_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <string.h>

#define BUFFER_ALIGNMENT 4096
#define SPARE_BYTES_MAX                                                                            \
    (64u << 20) /* a buffer kept for the next get: fresh memory costs faults                       \
                 */
#define KILL_MS 100

/* The get under way. */
struct arrival {
    uint32_t request_id; /* 0: none, so that late frames are ignored */
    uint8_t *buffer;
    uint64_t page_bytes;
    struct rk_pages *pages;
    uint64_t pages_done;
    uint32_t receiving; /* frames that UCX still writes into the buffer */
    bool replied;
    enum rk_status status;
    struct rk_error error;
};

struct buffer {
    size_t bytes;
    _Alignas(BUFFER_ALIGNMENT) uint8_t data[];
};

struct ucx_client {
    struct ucx_worker ucx;
    ucp_ep_h endpoint;
    bool greeted;
    bool broken;
    char why[96];
    bool sending; /* UCX still reads the request */
    uint8_t *request;
    size_t request_room;
    uint32_t request_id;
    struct arrival arrival;
    struct buffer *spare;
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
    (void)data;
    (void)bytes;
    (void)param;
    if (header_bytes == sizeof(hello)) {
        memcpy(&hello, header, sizeof(hello));
        client->greeted = hello.magic == UCX_MAGIC && hello.version == UCX_VERSION;
    }
    return UCS_OK;
}

static void fail(struct arrival *arrival, enum rk_status status, const char *text)
{
    if (arrival->status == RK_OK) {
        arrival->status = rk_error_set(&arrival->error, status, "%s", text);
    }
}

static ucs_status_t on_reply(void *context, const void *header, size_t header_bytes, void *data,
                             size_t bytes, const ucp_am_recv_param_t *param)
{
    struct ucx_client *client = context;
    struct arrival *arrival = &client->arrival;
    struct ucx_reply reply;
    if (header_bytes != sizeof(reply)) {
        return UCS_OK;
    }
    memcpy(&reply, header, sizeof(reply));
    if (reply.magic != UCX_MAGIC || arrival->request_id == 0 ||
        reply.request_id != arrival->request_id || arrival->replied) {
        return UCS_OK; /* Of a get that was given up. */
    }
    arrival->replied = true;
    if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) {
        fail(arrival, RK_ERR_UNAVAILABLE, "the store's reply is no reply");
    } else if (reply.failed) {
        arrival->status = shm_failure_parse(data, bytes, &arrival->error);
    } else if (reply.num_pages != arrival->pages->num_pages ||
               bytes != reply.num_pages * sizeof(uint64_t)) {
        fail(arrival, RK_ERR_UNAVAILABLE, "the store answers with another number of pages");
    } else {
        for (uint64_t i = 0; i < reply.num_pages; i++) {
            struct rk_page *page = &arrival->pages->pages[i];
            page->data = arrival->buffer + i * arrival->page_bytes;
            memcpy(&page->checksum, (const uint8_t *)data + i * sizeof(uint64_t), sizeof(uint64_t));
        }
    }
    return UCS_OK;
}

static void on_received(void *request, ucs_status_t status, size_t bytes, void *context)
{
    struct ucx_client *client = context;
    (void)bytes;
    client->arrival.receiving--;
    if (status != UCS_OK) {
        client_break(client, status);
    }
    client->ucx.api->ucp_request_free(request);
}

static ucs_status_t on_pages(void *context, const void *header, size_t header_bytes, void *data,
                             size_t bytes, const ucp_am_recv_param_t *param)
{
    struct ucx_client *client = context;
    struct arrival *arrival = &client->arrival;
    struct ucx_pages frame;
    if (header_bytes != sizeof(frame)) {
        return UCS_OK;
    }
    memcpy(&frame, header, sizeof(frame));
    if (frame.magic != UCX_MAGIC || arrival->request_id == 0 ||
        frame.request_id != arrival->request_id || arrival->status != RK_OK) {
        return UCS_OK;
    }
    uint64_t num_pages = arrival->pages->num_pages;
    if (frame.page_begin > num_pages || frame.num_pages > num_pages - frame.page_begin ||
        frame.num_pages > num_pages - arrival->pages_done ||
        bytes != frame.num_pages * arrival->page_bytes) {
        fail(arrival, RK_ERR_UNAVAILABLE, "the store sends pages that were not asked for");
        return UCS_OK;
    }
    uint8_t *place = arrival->buffer + frame.page_begin * arrival->page_bytes;
    arrival->pages_done += frame.num_pages;
    if (!(param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)) {
        memcpy(place, data, bytes);
        return UCS_OK;
    }
    ucp_request_param_t receive = {.op_attr_mask =
                                       UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                       UCP_OP_ATTR_FLAG_NO_IMM_CMPL | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                   .cb.recv_am = on_received,
                                   .user_data = client,
                                   .memory_type = UCS_MEMORY_TYPE_HOST};
    arrival->receiving++;
    ucs_status_ptr_t request =
        client->ucx.api->ucp_am_recv_data_nbx(client->ucx.worker, data, place, bytes, &receive);
    if (UCS_PTR_IS_ERR(request)) {
        arrival->receiving--;
        client_break(client, UCS_PTR_STATUS(request));
    }
    return UCS_INPROGRESS;
}

/* ---- Frames that leave ---- */

static void on_sent(void *request, ucs_status_t status, void *context)
{
    struct ucx_client *client = context;
    client->sending = false;
    if (status != UCS_OK) {
        client_break(client, status);
    }
    client->ucx.api->ucp_request_free(request);
}

/* One at a time; header and data stay until it has left. */
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
    ucs_status_ptr_t request = client->ucx.api->ucp_am_send_nbx(client->endpoint, id, header,
                                                                header_bytes, data, bytes, &params);
    if (UCS_PTR_IS_ERR(request)) {
        client_break(client, UCS_PTR_STATUS(request));
    } else if (request) {
        client->sending = true;
    }
}

/* ---- Connection ---- */

/* Nothing of UCX touches our memory after this. */
static void client_kill(struct ucx_client *client)
{
    int64_t deadline_ns = rk_deadline_in_ms(KILL_MS);
    client->broken = true;
    if (client->endpoint) {
        ucx_endpoint_kill(&client->ucx, client->endpoint, deadline_ns);
        client->endpoint = NULL;
    }
    while ((client->sending || client->arrival.receiving > 0) &&
           rk_deadline_left_ms(deadline_ns) > 0) {
        ucx_worker_wait(&client->ucx, -1, deadline_ns);
    }
}

static void ucx_client_destroy(void *connection)
{
    struct ucx_client *client = connection;
    if (client->ucx.worker) {
        client_kill(client);
    }
    ucx_worker_destroy(&client->ucx);
    rk_free(client->request);
    rk_free(client->spare);
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
    } handlers[] = {{UCX_HELLO, on_hello}, {UCX_REPLY, on_reply}, {UCX_PAGES, on_pages}};
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

static enum rk_status greet(struct ucx_client *client, int64_t deadline_ns, struct rk_error *error)
{
    static const struct ucx_hello hello = {UCX_MAGIC, UCX_VERSION};
    send_frame(client, UCX_HELLO, &hello, sizeof(hello), NULL, 0);
    while (!client->greeted && !client->broken && rk_deadline_left_ms(deadline_ns) > 0) {
        ucx_worker_wait(&client->ucx, -1, deadline_ns);
    }
    if (client->broken) {
        return lost(client, error);
    }
    return client->greeted ? RK_OK
                           : rk_error_set(error, RK_ERR_UNAVAILABLE,
                                          "the store does not answer over UCX in time");
}

static enum rk_status ucx_connect(const struct rk_transport_endpoint *endpoint, int64_t deadline_ns,
                                  void **ret_connection, struct rk_error *error)
{
    struct ucx_address address;
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
        status = greet(client, deadline_ns, error);
    }
    if (status != RK_OK) {
        ucx_client_destroy(client);
        return status;
    }
    *ret_connection = client;
    return RK_OK;
}

/* ---- Get ---- */

static struct buffer *buffer_take(struct ucx_client *client, size_t bytes)
{
    struct buffer *buffer = client->spare;
    client->spare = NULL;
    if (buffer && buffer->bytes >= bytes) {
        return buffer;
    }
    rk_free(buffer);
    buffer = rk_alloc_aligned(BUFFER_ALIGNMENT, sizeof(*buffer) + bytes);
    if (buffer) {
        buffer->bytes = bytes;
    }
    return buffer;
}

static void buffer_give(struct ucx_client *client, struct buffer *buffer)
{
    if (!client->spare && buffer->bytes <= SPARE_BYTES_MAX) {
        client->spare = buffer;
    } else {
        rk_free(buffer);
    }
}

static enum rk_status request_send(struct ucx_client *client, const struct rk_get *get,
                                   struct rk_error *error)
{
    size_t extents_bytes = get->num_extents * sizeof(struct rk_extent);
    size_t bytes = sizeof(struct ucx_get) + sizeof(struct shm_get) + extents_bytes;
    if (client->request_room < bytes) {
        uint8_t *more = rk_alloc_resize(client->request, bytes, 1);
        if (!more) {
            return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a request");
        }
        client->request = more;
        client->request_room = bytes;
    }
    client->request_id = client->request_id == UINT32_MAX ? 1 : client->request_id + 1;
    struct ucx_get header = {UCX_MAGIC, client->request_id,
                             (uint32_t)rk_deadline_left_ms(get->deadline_ns)};
    uint8_t *body = client->request + sizeof(header);
    memcpy(client->request, &header, sizeof(header));
    struct shm_get asked;
    shm_get_fill(get, &asked);
    memcpy(body, &asked, sizeof(asked));
    memcpy(body + sizeof(asked), get->extents, extents_bytes);
    client->arrival.request_id = client->request_id;
    send_frame(client, UCX_GET, client->request, sizeof(header), body, bytes - sizeof(header));
    return RK_OK;
}

static bool arrived(const struct arrival *arrival)
{
    return arrival->receiving == 0 &&
           (arrival->status != RK_OK ||
            (arrival->replied && arrival->pages_done == arrival->pages->num_pages));
}

static enum rk_status ucx_get(void *connection, const struct rk_get *get, uint64_t num_pages,
                              struct rk_pages *pages, struct rk_error *error)
{
    struct ucx_client *client = connection;
    struct arrival *arrival = &client->arrival;
    while (client->sending && !client->broken && rk_deadline_left_ms(get->deadline_ns) > 0) {
        ucx_worker_wait(&client->ucx, -1, get->deadline_ns); /* The request of a get given up. */
    }
    if (client->broken || client->sending) {
        return lost(client, error);
    }
    struct buffer *buffer = buffer_take(client, num_pages * get->page_bytes);
    if (!buffer) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %llu pages",
                            (unsigned long long)num_pages);
    }
    *arrival =
        (struct arrival){.buffer = buffer->data, .page_bytes = get->page_bytes, .pages = pages};
    enum rk_status status = request_send(client, get, error);
    while (status == RK_OK && !arrived(arrival) && !client->broken &&
           rk_deadline_left_ms(get->deadline_ns) > 0) {
        ucx_worker_wait(&client->ucx, -1, get->deadline_ns);
    }
    bool done = status == RK_OK && arrived(arrival);
    arrival->request_id = 0;
    if (done && arrival->status == RK_OK) {
        pages->hold = buffer;
        pages->tier = RK_TIER_DRAM;
        return RK_OK;
    }
    bool late = !done && !client->broken;
    if (!done && arrival->receiving > 0) {
        client_kill(client); /* UCX must not write into what is freed. */
    }
    if (arrival->receiving == 0) {
        buffer_give(client, buffer);
    } /* Else it stays UCX's: leaked, rather than written to when it is another's. */
    if (status != RK_OK) {
        return status;
    }
    if (done) {
        return rk_error_set(error, arrival->status, "%s", arrival->error.text);
    }
    if (!late) {
        return lost(client, error);
    }
    /* Half of a frame may be on its way: such a connection is of no further use. */
    return client->broken ? rk_error_set(error, RK_ERR_DEADLINE, "the store stopped in a frame")
                          : RK_MISS_DEADLINE;
}

static void ucx_release(void *connection, struct rk_pages *pages)
{
    buffer_give(connection, pages->hold);
}

const struct transport_ops transport_ucx = {
    .path = RK_PATH_UCX,
    .name = "ucx",
    .reachable = ucx_reachable,
    .connect = ucx_connect,
    .get = ucx_get,
    .release = ucx_release,
    .destroy = ucx_client_destroy,
};
