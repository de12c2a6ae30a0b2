/*
 * The store's end of the UCX path: one thread that accepts peers, checks what
 * they ask for, pins it and pushes the pages from the arena, and takes what
 * they put.
 *
 * A get ends with its last frame, with its reader's connection, or with its
 * deadline: then nothing more is pushed, and a reader that does not even take
 * what is under way is cut off, and its pins go with it. A put ends with its
 * results, its connection or its deadline, and then leaves nothing.
 */
#include "common/transport/ucx_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define FRAMES_MAX     4     /* of one get under way */
#define TIMEOUT_MS_MAX 60000 /* whatever a peer says */
#define DRAIN_MS       500   /* what is under way at a get's deadline has so long to leave */
#define SWEEP_MS       100   /* deadlines are looked at so often */
#define STOP_MS        1000

struct get;

/* A frame of pages that UCX reads. */
struct frame {
    struct get *get;
    bool busy;
    struct ucx_data header;
    ucp_dt_iov_t iov[UCX_PARTS_MAX];
};

struct connection {
    struct rk_ucx_server *server;
    ucp_ep_h endpoint; /* NULL: closed */
    bool greeted;
    bool dead; /* to be closed by the loop */
    uint32_t num_requests;
    struct connection *next;
};

/* Bytes of one item that lie side by side in the arena. */
struct run {
    uint64_t offset;
    uint64_t bytes;
    uint32_t page_bytes;
};

struct get {
    struct connection *connection;
    uint32_t request_id;
    void *pins[RK_TRANSPORT_ITEMS_MAX];
    size_t num_pins;
    struct run *runs;
    size_t num_runs;
    size_t runs_room;
    size_t run; /* the next bytes: of this run, */
    uint64_t run_done;
    uint64_t offset; /* of all of them */
    uint32_t in_flight;
    bool failed; /* nothing more is sent */
    int64_t deadline_ns;
    struct frame frames[FRAMES_MAX];
    struct get *next;
};

struct put {
    struct connection *connection;
    uint32_t request_id;
    struct rk_intake *intake;
    uint64_t offset;
    int64_t deadline_ns;
    struct put *next;
};

/* A short answer: hello, what was found, how a put went. */
struct answer {
    struct rk_ucx_server *server;
    union {
        struct ucx_hello hello;
        struct ucx_reply reply;
    } header;
    struct wire_buffer body;
};

struct rk_ucx_server {
    struct rk_ucx_server_options options;
    struct ucx_worker ucx;
    ucp_listener_h listener;
    int wake_fd;
    int port;
    atomic_bool stopping;
    bool running;
    pthread_t thread;
    struct connection *connections;
    uint32_t num_connections;
    struct get *gets;
    struct put *puts;
    uint32_t answers; /* under way */
    /* Of the request that is read. */
    struct rk_extent *extents;
    struct rk_get asked[RK_TRANSPORT_ITEMS_MAX];
    uint64_t *offsets;
    uint64_t *checksums;
};

/* ---- Connections ---- */

static void on_error(void *context, ucp_ep_h endpoint, ucs_status_t status)
{
    struct connection *connection = context;
    (void)endpoint;
    (void)status;
    connection->dead = true;
}

static void on_connection(ucp_conn_request_h request, void *context)
{
    struct rk_ucx_server *server = context;
    const struct ucx_api *api = server->ucx.api;
    struct connection *connection = NULL;
    if (server->num_connections < server->options.connections_max) {
        connection = rk_alloc_zero(1, sizeof(*connection));
    }
    if (!connection) {
        RK_LOG_WARN("ucx_connection_refused", "connections=%u", server->num_connections);
        (void)api->ucp_listener_reject(server->listener, request);
        return;
    }
    connection->server = server;
    ucp_ep_params_t params = {.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                                            UCP_EP_PARAM_FIELD_ERR_HANDLER,
                              .conn_request = request,
                              .err_mode = UCP_ERR_HANDLING_MODE_PEER,
                              .err_handler = {.cb = on_error, .arg = connection}};
    ucs_status_t result = api->ucp_ep_create(server->ucx.worker, &params, &connection->endpoint);
    if (result != UCS_OK) {
        RK_LOG_WARN("ucx_connection_failed", "reason=%q", api->ucs_status_string(result));
        rk_free(connection);
        return;
    }
    connection->next = server->connections;
    server->connections = connection;
    server->num_connections++;
}

static struct connection *connection_find(const struct rk_ucx_server *server,
                                          const ucp_am_recv_param_t *param)
{
    if (!(param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP)) {
        return NULL;
    }
    for (struct connection *at = server->connections; at; at = at->next) {
        if (at->endpoint == param->reply_ep) {
            return at->dead ? NULL : at;
        }
    }
    return NULL;
}

/* ---- Answers ---- */

static void answer_free(struct answer *answer)
{
    rk_free(answer->body.data);
    rk_free(answer);
}

static void on_answered(void *request, ucs_status_t status, void *context)
{
    struct answer *answer = context;
    const struct ucx_api *api = answer->server->ucx.api;
    (void)status; /* The connection's error handler hears of it. */
    answer->server->answers--;
    answer_free(answer);
    api->ucp_request_free(request);
}

/* Takes over the answer. */
static void answer_send(struct connection *connection, unsigned id, struct answer *answer,
                        size_t header_bytes)
{
    struct rk_ucx_server *server = connection->server;
    ucp_request_param_t params = {.op_attr_mask =
                                      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                      UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                  .flags = UCP_AM_SEND_FLAG_EAGER,
                                  .cb.send = on_answered,
                                  .user_data = answer,
                                  .memory_type = UCS_MEMORY_TYPE_HOST};
    if (answer->body.failed) {
        connection->dead = true;
        answer_free(answer);
        return;
    }
    answer->server = server;
    server->answers++;
    ucs_status_ptr_t request =
        server->ucx.api->ucp_am_send_nbx(connection->endpoint, id, &answer->header, header_bytes,
                                         answer->body.data, answer->body.bytes, &params);
    if (!UCS_PTR_IS_PTR(request)) {
        connection->dead = connection->dead || UCS_PTR_IS_ERR(request);
        server->answers--;
        answer_free(answer);
    }
}

static struct answer *reply_make(struct connection *connection, uint32_t request_id)
{
    struct answer *answer = rk_alloc_zero(1, sizeof(*answer));
    if (!answer) {
        connection->dead = true;
        return NULL;
    }
    answer->header.reply = (struct ucx_reply){UCX_MAGIC, request_id};
    return answer;
}

static void reply_send(struct connection *connection, unsigned id, struct answer *answer)
{
    answer_send(connection, id, answer, sizeof(answer->header.reply));
}

/* The same for each item that a request is about: gets of what was asked, or puts (NULL). */
static void refuse(struct connection *connection, unsigned id, uint32_t request_id,
                   const struct rk_get *gets, uint32_t count, enum rk_status status,
                   const char *text)
{
    struct answer *answer = reply_make(connection, request_id);
    if (!answer) {
        return;
    }
    wire_append_count(&answer->body, count);
    for (uint32_t i = 0; i < count; i++) {
        if (gets) {
            wire_failure_append(&answer->body, &gets[i], status, text);
        } else {
            wire_result_append(&answer->body, status, text);
        }
    }
    reply_send(connection, id, answer);
}

/* Whoever speaks otherwise than we do is cut off, with one line. */
static void protocol_error(struct connection *connection, const char *what)
{
    RK_LOG_WARN("ucx_protocol_error", "reason=%q", what);
    connection->dead = true;
}

static ucs_status_t on_hello(void *context, const void *header, size_t header_bytes, void *data,
                             size_t bytes, const ucp_am_recv_param_t *param)
{
    struct connection *connection = connection_find(context, param);
    struct ucx_hello hello;
    (void)data;
    if (!connection) {
        return UCS_OK;
    }
    if (header_bytes != sizeof(hello) || bytes != 0 || connection->greeted) {
        protocol_error(connection, "no hello");
        return UCS_OK;
    }
    memcpy(&hello, header, sizeof(hello));
    struct answer *answer = rk_alloc_zero(1, sizeof(*answer));
    if (!answer || hello.magic != UCX_MAGIC || hello.version != UCX_VERSION) {
        protocol_error(connection, "another magic or version");
        rk_free(answer);
        return UCS_OK;
    }
    connection->greeted = true;
    const struct wire_identity identity = wire_identity_make(
        connection->server->options.node_id, connection->server->options.incarnation);
    answer->header.hello = (struct ucx_hello){UCX_MAGIC, UCX_VERSION};
    (void)wire_append(&answer->body, &identity, sizeof(identity));
    answer_send(connection, UCX_HELLO, answer, sizeof(answer->header.hello));
    return UCS_OK;
}

/* The header of a request and whose it is; NULL: not to be answered. */
static struct connection *request_read(struct rk_ucx_server *server, const void *header,
                                       size_t header_bytes, const ucp_am_recv_param_t *param,
                                       struct ucx_request *ret_request)
{
    struct connection *connection = connection_find(server, param);
    if (!connection) {
        return NULL;
    }
    if (!connection->greeted || header_bytes != sizeof(*ret_request) ||
        (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)) {
        protocol_error(connection, "a request that is none");
        return NULL;
    }
    memcpy(ret_request, header, sizeof(*ret_request));
    if (ret_request->magic != UCX_MAGIC || ret_request->request_id == 0) {
        protocol_error(connection, "a request that is none");
        return NULL;
    }
    return connection;
}

static int64_t request_deadline(const struct ucx_request *request)
{
    return rk_deadline_in_ms(request->timeout_ms < TIMEOUT_MS_MAX ? request->timeout_ms
                                                                  : TIMEOUT_MS_MAX);
}

/* ---- Gets ---- */

static void get_free(struct get *get)
{
    struct rk_ucx_server *server = get->connection->server;
    for (size_t i = 0; i < get->num_pins; i++) {
        server->options.ops->unpin(server->options.context, get->pins[i]);
    }
    rk_free(get->runs);
    rk_free(get);
}

static void sent(struct get *get, ucs_status_t status)
{
    get->in_flight--;
    if (status != UCS_OK) {
        get->failed = true;
        get->connection->dead = true;
    }
}

static void on_frame_sent(void *request, ucs_status_t status, void *context)
{
    struct frame *frame = context;
    frame->busy = false;
    frame->get->connection->server->ucx.api->ucp_request_free(request);
    sent(frame->get, status);
}

/* Where the transport can write from afar: whether the next bytes are so many in one piece that the
 * handshake of a rendezvous is worth it. Then how many: whole pages. */
static size_t rendezvous_bytes(const struct get *get)
{
    const struct run *run = &get->runs[get->run];
    uint64_t left = run->bytes - get->run_done;
    if (!get->connection->server->options.rendezvous || left < UCX_RENDEZVOUS_BYTES ||
        run->page_bytes > UCX_RENDEZVOUS_BYTES || get->run_done % run->page_bytes != 0) {
        return 0;
    }
    uint64_t most = UCX_RENDEZVOUS_BYTES - UCX_RENDEZVOUS_BYTES % run->page_bytes;
    return left < most ? (size_t)left : (size_t)most;
}

static void run_advance(struct get *get, size_t bytes)
{
    get->run_done += bytes;
    if (get->run_done == get->runs[get->run].bytes) {
        get->run++;
        get->run_done = 0;
    }
}

/* The next bytes into the frame. Returns the parts. */
static size_t frame_fill(struct get *get, struct frame *frame, size_t *ret_bytes,
                         bool *ret_rendezvous)
{
    const uint8_t *arena = get->connection->server->options.arena;
    size_t count = 0;
    size_t bytes = 0;
    size_t bytes_max = rendezvous_bytes(get);
    *ret_rendezvous = bytes_max > 0;
    bytes_max = bytes_max > 0 ? bytes_max : UCX_FRAME_BYTES;
    frame->header =
        (struct ucx_data){.magic = UCX_MAGIC, .request_id = get->request_id, .offset = get->offset};
    while (get->run < get->num_runs && bytes < bytes_max && count < UCX_PARTS_MAX &&
           (count == 0 || rendezvous_bytes(get) == 0)) {
        const struct run *run = &get->runs[get->run];
        uint64_t left = run->bytes - get->run_done;
        size_t room = bytes_max - bytes;
        size_t take = left < room ? (size_t)left : room;
        /* UCX only reads what it sends. */
        uint8_t *from = (uint8_t *)(uintptr_t)(arena + run->offset + get->run_done);
        frame->iov[count++] = (ucp_dt_iov_t){.buffer = from, .length = take};
        bytes += take;
        run_advance(get, take);
    }
    get->offset += bytes;
    *ret_bytes = bytes;
    return count;
}

static void frame_send(struct get *get, struct frame *frame)
{
    size_t bytes = 0;
    bool rendezvous = false;
    size_t count = frame_fill(get, frame, &bytes, &rendezvous);
    ucp_request_param_t params = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
        .flags = rendezvous ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER,
        .cb.send = on_frame_sent,
        .user_data = frame,
        .memory_type = UCS_MEMORY_TYPE_HOST};
    const void *data = frame->iov[0].buffer;
    if (count > 1) {
        params.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE;
        params.datatype = ucp_dt_make_iov();
        data = frame->iov;
        bytes = count;
    }
    get->in_flight++;
    ucs_status_ptr_t request = get->connection->server->ucx.api->ucp_am_send_nbx(
        get->connection->endpoint, UCX_DATA, &frame->header, sizeof(frame->header), data, bytes,
        &params);
    frame->busy = UCS_PTR_IS_PTR(request);
    if (!frame->busy) {
        sent(get, UCS_PTR_STATUS(request));
    }
}

static void get_push(struct get *get)
{
    for (size_t i = 0; i < FRAMES_MAX; i++) {
        struct frame *frame = &get->frames[i];
        while (!frame->busy && !get->failed && get->run < get->num_runs) {
            frame_send(get, frame);
        }
    }
}

static bool run_add(struct get *get, bool first, uint64_t offset, uint64_t bytes,
                    uint32_t page_bytes)
{
    struct run *last = get->num_runs > 0 && !first ? &get->runs[get->num_runs - 1] : NULL;
    if (last && last->offset + last->bytes == offset) {
        last->bytes += bytes;
        return true;
    }
    if (get->num_runs == get->runs_room) {
        size_t room = get->runs_room ? get->runs_room * 2 : 16;
        struct run *more = rk_alloc_resize(get->runs, room, sizeof(*more));
        if (!more) {
            return false;
        }
        get->runs = more;
        get->runs_room = room;
    }
    get->runs[get->num_runs++] = (struct run){offset, bytes, page_bytes};
    return true;
}

/* Pins one item, says so in the answer, and notes where its bytes lie. Returns its pages. */
static uint64_t item_pin(struct get *get, const struct rk_get *asked, uint64_t pages_max,
                         struct answer *answer)
{
    struct rk_ucx_server *server = get->connection->server;
    struct rk_error error = {.text = ""};
    struct rk_found found = {.pin = NULL};
    enum rk_status status =
        server->options.ops->pin(server->options.context, RK_PATH_UCX, asked, pages_max,
                                 server->offsets, server->checksums, &found, &error);
    if (status != RK_OK) {
        wire_failure_append(&answer->body, asked, status, error.text);
        return 0;
    }
    get->pins[get->num_pins++] = found.pin;
    for (uint64_t i = 0; i < found.num_pages; i++) {
        uint64_t left = found.bytes - i * found.page_bytes;
        if (!run_add(get, i == 0, server->offsets[i],
                     left < found.page_bytes ? left : found.page_bytes, found.page_bytes)) {
            answer->body.failed = true; /* Which ends the connection. */
        }
    }
    wire_found_append(&answer->body, &found, 0, NULL, server->checksums);
    return found.num_pages;
}

static void get_begin(struct connection *connection, const struct ucx_request *request,
                      size_t count)
{
    struct rk_ucx_server *server = connection->server;
    uint64_t pages_left = WIRE_PAGES_MAX;
    if (connection->num_requests >= server->options.requests_max) {
        refuse(connection, UCX_FOUND, request->request_id, server->asked, (uint32_t)count,
               RK_ERR_FULL, "too many requests are under way on this connection");
        return;
    }
    struct get *get = rk_alloc_zero(1, sizeof(*get));
    struct answer *answer = reply_make(connection, request->request_id);
    if (!get || !answer) {
        connection->dead = true;
        rk_free(get);
        rk_free(answer);
        return;
    }
    get->connection = connection;
    get->request_id = request->request_id;
    get->deadline_ns = request_deadline(request);
    wire_append_count(&answer->body, (uint32_t)count);
    for (size_t i = 0; i < count; i++) {
        pages_left -= item_pin(get, &server->asked[i], pages_left, answer);
    }
    for (size_t i = 0; i < FRAMES_MAX; i++) {
        get->frames[i].get = get;
    }
    get->next = server->gets;
    server->gets = get;
    connection->num_requests++;
    reply_send(connection, UCX_FOUND, answer);
    if (!connection->dead) {
        get_push(get);
    }
}

static ucs_status_t on_get(void *context, const void *header, size_t header_bytes, void *data,
                           size_t bytes, const ucp_am_recv_param_t *param)
{
    struct rk_ucx_server *server = context;
    struct ucx_request request;
    size_t count = 0;
    struct connection *connection = request_read(server, header, header_bytes, param, &request);
    if (!connection) {
        return UCS_OK;
    }
    if (wire_gets_parse(data, bytes, server->extents, server->asked, &count) != RK_OK) {
        protocol_error(connection, "a get whose lengths disagree");
        return UCS_OK;
    }
    get_begin(connection, &request, count);
    return UCS_OK;
}

/* ---- Puts ---- */

static struct put *put_find(struct rk_ucx_server *server, const struct connection *connection,
                            uint32_t request_id)
{
    struct put *put = server->puts;
    while (put && (put->connection != connection || put->request_id != request_id)) {
        put = put->next;
    }
    return put;
}

static void put_remove(struct rk_ucx_server *server, struct put *put)
{
    struct put **at = &server->puts;
    while (*at != put) {
        at = &(*at)->next;
    }
    *at = put->next;
    put->connection->num_requests--;
    rk_intake_destroy(put->intake);
    rk_free(put);
}

/* Who reads the answer finds nothing of the put left. */
static void put_finish(struct rk_ucx_server *server, struct put *put)
{
    struct connection *connection = put->connection;
    struct answer *answer = reply_make(connection, put->request_id);
    rk_intake_end(put->intake);
    if (answer) {
        wire_append_count(&answer->body, (uint32_t)rk_intake_items(put->intake));
        for (size_t i = 0; i < rk_intake_items(put->intake); i++) {
            const char *text = NULL;
            enum rk_status status = rk_intake_result(put->intake, i, &text);
            wire_result_append(&answer->body, status, text);
        }
    }
    put_remove(server, put);
    if (answer) {
        reply_send(connection, UCX_RESULTS, answer);
    }
}

/* False: the heads make no sense. */
static bool put_items(struct rk_ucx_server *server, struct put *put, struct wire_reader *reader,
                      uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        struct rk_error error = {.text = ""};
        const uint8_t *head = NULL;
        uint32_t head_bytes = 0;
        uint64_t bytes = 0;
        uint32_t page_bytes = 0;
        void *handle = NULL;
        if (!wire_take_block(reader, &head, &head_bytes)) {
            return false;
        }
        enum rk_status status =
            server->options.ops->put_begin(server->options.context, RK_PATH_UCX, head, head_bytes,
                                           &handle, &bytes, &page_bytes, &error);
        rk_intake_add(put->intake, status, error.text, handle, bytes, page_bytes);
    }
    return reader->left == 0;
}

static void put_begin(struct connection *connection, const struct ucx_request *request,
                      struct wire_reader *reader, uint32_t count)
{
    struct rk_ucx_server *server = connection->server;
    if (connection->num_requests >= server->options.requests_max) {
        refuse(connection, UCX_RESULTS, request->request_id, NULL, count, RK_ERR_FULL,
               "too many requests are under way on this connection");
        return;
    }
    struct put *put = rk_alloc_zero(1, sizeof(*put));
    if (!put || rk_intake_create(server->options.ops, server->options.context, count,
                                 &put->intake) != RK_OK) {
        connection->dead = true;
        rk_free(put);
        return;
    }
    put->connection = connection;
    put->request_id = request->request_id;
    put->deadline_ns = request_deadline(request);
    put->next = server->puts;
    server->puts = put;
    connection->num_requests++;
    if (!put_items(server, put, reader, count)) {
        protocol_error(connection, "a put whose lengths disagree");
        put_remove(server, put);
    } else if (rk_intake_whole(put->intake)) {
        put_finish(server, put);
    }
}

static ucs_status_t on_put(void *context, const void *header, size_t header_bytes, void *data,
                           size_t bytes, const ucp_am_recv_param_t *param)
{
    struct rk_ucx_server *server = context;
    struct ucx_request request;
    struct wire_reader reader = {data, bytes};
    uint32_t count = 0;
    struct connection *connection = request_read(server, header, header_bytes, param, &request);
    if (!connection) {
        return UCS_OK;
    }
    if (!wire_take(&reader, &count, sizeof(count)) || count == 0 ||
        count > RK_TRANSPORT_ITEMS_MAX || put_find(server, connection, request.request_id)) {
        protocol_error(connection, "a put of nothing, or of too much");
        return UCS_OK;
    }
    put_begin(connection, &request, &reader, count);
    return UCS_OK;
}

static ucs_status_t on_put_data(void *context, const void *header, size_t header_bytes, void *data,
                                size_t bytes, const ucp_am_recv_param_t *param)
{
    struct rk_ucx_server *server = context;
    struct connection *connection = connection_find(server, param);
    struct wire_reader reader = {header, header_bytes};
    struct ucx_data frame;
    uint64_t checksums[WIRE_FRAME_SUMS_MAX];
    if (!connection) {
        return UCS_OK;
    }
    if (!wire_take(&reader, &frame, sizeof(frame)) || frame.magic != UCX_MAGIC ||
        frame.num_checksums > WIRE_FRAME_SUMS_MAX ||
        !wire_take(&reader, checksums, frame.num_checksums * sizeof(checksums[0])) ||
        reader.left > 0 || (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)) {
        protocol_error(connection, "bytes of a put that are none");
        return UCS_OK;
    }
    struct put *put = put_find(server, connection, frame.request_id);
    if (!put) {
        return UCS_OK; /* Of a put that ended before its bytes did. */
    }
    if (frame.offset != put->offset ||
        rk_intake_write(put->intake, data, bytes, checksums, frame.num_checksums) != RK_OK) {
        protocol_error(connection, "other bytes than the put announced");
        return UCS_OK;
    }
    put->offset += bytes;
    if (rk_intake_whole(put->intake)) {
        put_finish(server, put);
    }
    return UCS_OK;
}

/* ---- The thread ---- */

/* Ended and overdue gets; pushes the others on. */
static void gets_sweep(struct rk_ucx_server *server)
{
    int64_t now_ns = rk_clock_ns();
    for (struct get **at = &server->gets; *at;) {
        struct get *get = *at;
        if (get->connection->dead) {
            get->failed = true;
        } else if (now_ns > get->deadline_ns && !get->failed) {
            get->failed = true; /* Its reader has given up, and may ask again. */
            get->deadline_ns = rk_deadline_in_ms(DRAIN_MS);
        } else if (now_ns > get->deadline_ns && get->in_flight > 0) {
            RK_LOG_WARN("ucx_reader_stuck", "frames=%u action=disconnect", get->in_flight);
            get->connection->dead = true;
        } else {
            get_push(get);
        }
        bool ended = get->failed || get->run == get->num_runs;
        if (ended && get->in_flight == 0) {
            *at = get->next;
            get->connection->num_requests--;
            get_free(get);
        } else {
            at = &get->next;
        }
    }
}

static void puts_sweep(struct rk_ucx_server *server)
{
    int64_t now_ns = rk_clock_ns();
    struct put *put = server->puts;
    while (put) {
        struct put *next = put->next;
        if (put->connection->dead || now_ns > put->deadline_ns) {
            put_remove(server, put);
        }
        put = next;
    }
}

static void connections_sweep(struct rk_ucx_server *server)
{
    for (struct connection **at = &server->connections; *at;) {
        struct connection *connection = *at;
        if (connection->dead && connection->endpoint) {
            ucp_ep_h endpoint = connection->endpoint;
            connection->endpoint = NULL;
            ucx_endpoint_kill(&server->ucx, endpoint, rk_deadline_in_ms(SWEEP_MS));
            at = &server->connections; /* Progress was made: others may have come. */
        } else if (!connection->endpoint && connection->num_requests == 0) {
            *at = connection->next;
            server->num_connections--;
            rk_free(connection);
        } else {
            at = &connection->next;
        }
    }
}

static void *server_thread(void *context)
{
    struct rk_ucx_server *server = context;
    while (!atomic_load_explicit(&server->stopping, memory_order_acquire)) {
        ucx_worker_wait(&server->ucx, server->wake_fd,
                        rk_deadline_in_ms(server->gets || server->puts ? SWEEP_MS : 10 * SWEEP_MS));
        gets_sweep(server);
        puts_sweep(server);
        connections_sweep(server);
    }
    int64_t deadline_ns = rk_deadline_in_ms(STOP_MS);
    server->ucx.api->ucp_listener_destroy(server->listener);
    server->listener = NULL;
    do {
        for (struct connection *at = server->connections; at; at = at->next) {
            at->dead = true;
        }
        gets_sweep(server);
        puts_sweep(server);
        connections_sweep(server);
        (void)server->ucx.api->ucp_worker_progress(server->ucx.worker);
    } while ((server->connections || server->answers > 0) && rk_deadline_left_ms(deadline_ns) > 0);
    return NULL;
}

/* ---- Life ---- */

static enum rk_status listener_create(struct rk_ucx_server *server, struct ucx_address *address,
                                      struct rk_error *error)
{
    ucp_listener_params_t params = {
        .field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER,
        .sockaddr = {.addr = (const struct sockaddr *)&address->storage, .addrlen = address->bytes},
        .conn_handler = {.cb = on_connection, .arg = server}};
    ucp_listener_attr_t attributes = {.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR};
    ucs_status_t result =
        server->ucx.api->ucp_listener_create(server->ucx.worker, &params, &server->listener);
    if (result == UCS_OK) {
        result = server->ucx.api->ucp_listener_query(server->listener, &attributes);
    }
    if (result != UCS_OK) {
        /* UCX calls a port that is taken a busy device. */
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "cannot listen on %s over UCX: %s",
                            server->options.listen,
                            result == UCS_ERR_BUSY ? "Address already in use"
                                                   : server->ucx.api->ucs_status_string(result));
    }
    uint16_t port = attributes.sockaddr.ss_family == AF_INET6
                        ? ((struct sockaddr_in6 *)(void *)&attributes.sockaddr)->sin6_port
                        : ((struct sockaddr_in *)(void *)&attributes.sockaddr)->sin_port;
    server->port = ntohs(port);
    return RK_OK;
}

static enum rk_status server_set_up(struct rk_ucx_server *server, struct rk_error *error)
{
    static const struct {
        unsigned id;
        ucp_am_recv_callback_t handler;
    } handlers[] = {
        {UCX_HELLO, on_hello}, {UCX_GET, on_get}, {UCX_PUT, on_put}, {UCX_PUT_DATA, on_put_data}};
    struct ucx_address address;
    enum rk_status status = ucx_address_resolve(server->options.listen, &address, error);
    server->extents = rk_alloc_zero(WIRE_EXTENTS_MAX, sizeof(*server->extents));
    server->offsets = rk_alloc_zero(WIRE_PAGES_MAX, sizeof(*server->offsets));
    server->checksums = rk_alloc_zero(WIRE_PAGES_MAX, sizeof(*server->checksums));
    server->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (status == RK_OK &&
        (!server->extents || !server->offsets || !server->checksums || server->wake_fd < 0)) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the UCX server");
    }
    if (status == RK_OK) {
        status = ucx_worker_create(&address, &server->ucx, error);
    }
    for (size_t i = 0; status == RK_OK && i < sizeof(handlers) / sizeof(handlers[0]); i++) {
        status =
            ucx_worker_handle(&server->ucx, handlers[i].id, handlers[i].handler, server, error);
    }
    return status == RK_OK ? listener_create(server, &address, error) : status;
}

enum rk_status rk_ucx_server_start(const struct rk_ucx_server_options *options,
                                   struct rk_ucx_server **ret_server, struct rk_error *error)
{
    struct rk_ucx_server *server = rk_alloc_zero(1, sizeof(*server));
    if (!server) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the UCX server");
    }
    server->options = *options;
    server->options.connections_max = options->connections_max > 0 ? options->connections_max : 256;
    server->options.requests_max = options->requests_max > 0 ? options->requests_max : 64;
    server->options.rendezvous = options->rendezvous || ucx_one_sided();
    server->wake_fd = -1;
    enum rk_status status = server_set_up(server, error);
    if (status == RK_OK && pthread_create(&server->thread, NULL, server_thread, server) != 0) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "cannot start the UCX server's thread");
    }
    if (status != RK_OK) {
        rk_ucx_server_stop(server);
        return status;
    }
    server->running = true;
    *ret_server = server;
    return RK_OK;
}

int rk_ucx_server_port(const struct rk_ucx_server *server)
{
    return server->port;
}

void rk_ucx_server_stop(struct rk_ucx_server *server)
{
    static const uint64_t one = 1;
    if (!server) {
        return;
    }
    if (server->running) {
        atomic_store_explicit(&server->stopping, true, memory_order_release);
        (void)!write(server->wake_fd, &one, sizeof(one));
        (void)pthread_join(server->thread, NULL);
    }
    if (server->listener) {
        server->ucx.api->ucp_listener_destroy(server->listener);
    }
    ucx_worker_destroy(&server->ucx);
    if (server->wake_fd >= 0) {
        (void)close(server->wake_fd);
    }
    rk_free(server->extents);
    rk_free(server->offsets);
    rk_free(server->checksums);
    rk_free(server);
}
