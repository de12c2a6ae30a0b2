/*
 * The store's end of the UCX path: one thread that accepts readers, checks what
 * they ask for, pins it and pushes the pages from the arena.
 *
 * A get ends with its last frame, with its reader's connection, or with its
 * deadline: then nothing more is pushed, and a reader that does not even take
 * what is under way is cut off, and its pins go with it.
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
#define IOV_MAX_PAGES  64    /* runs of pages in one frame */
#define TIMEOUT_MS_MAX 60000 /* whatever a reader says */
#define DRAIN_MS       500   /* what is under way at a get's deadline has so long to leave */
#define SWEEP_MS       100   /* deadlines are looked at so often */
#define STOP_MS        1000

struct get;

/* A frame of pages that UCX reads. */
struct frame {
    struct get *get;
    bool busy;
    struct ucx_pages header;
    ucp_dt_iov_t iov[IOV_MAX_PAGES];
};

struct connection {
    struct rk_ucx_server *server;
    ucp_ep_h endpoint; /* NULL: closed */
    bool greeted;
    bool dead; /* to be closed by the loop */
    uint32_t num_gets;
    struct connection *next;
};

struct get {
    struct connection *connection;
    void *pin;
    uint64_t *offsets;
    uint64_t *checksums;
    uint64_t num_pages;
    uint64_t next_page;
    uint32_t page_bytes;
    uint32_t in_flight; /* the reply and frames */
    bool failed;        /* nothing more is sent */
    int64_t deadline_ns;
    struct ucx_reply reply;
    struct frame frames[FRAMES_MAX];
    struct get *next;
};

/* A short answer: hello, or why a get failed. */
struct answer {
    struct rk_ucx_server *server;
    union {
        struct ucx_hello hello;
        struct ucx_reply reply;
    } header;
    char text[SHM_ERROR_TEXT_MAX];
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
    uint32_t answers; /* under way */
    struct rk_extent *extents;
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

static void on_answered(void *request, ucs_status_t status, void *context)
{
    struct answer *answer = context;
    const struct ucx_api *api = answer->server->ucx.api;
    (void)status; /* The connection's error handler hears of it. */
    answer->server->answers--;
    rk_free(answer);
    api->ucp_request_free(request);
}

/* Takes over the answer. */
static void answer_send(struct connection *connection, unsigned id, struct answer *answer,
                        size_t header_bytes, size_t text_bytes)
{
    struct rk_ucx_server *server = connection->server;
    ucp_request_param_t params = {.op_attr_mask =
                                      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                      UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                  .flags = UCP_AM_SEND_FLAG_EAGER,
                                  .cb.send = on_answered,
                                  .user_data = answer,
                                  .memory_type = UCS_MEMORY_TYPE_HOST};
    answer->server = server;
    server->answers++;
    ucs_status_ptr_t request = server->ucx.api->ucp_am_send_nbx(
        connection->endpoint, id, &answer->header, header_bytes, answer->text, text_bytes, &params);
    if (!UCS_PTR_IS_PTR(request)) {
        connection->dead = connection->dead || UCS_PTR_IS_ERR(request);
        server->answers--;
        rk_free(answer);
    }
}

static void refuse(struct connection *connection, uint32_t request_id, enum rk_status status,
                   const char *text)
{
    struct answer *answer = rk_alloc_zero(1, sizeof(*answer));
    if (!answer) {
        connection->dead = true;
        return;
    }
    answer->header.reply =
        (struct ucx_reply){.magic = UCX_MAGIC, .request_id = request_id, .failed = 1};
    answer_send(connection, UCX_REPLY, answer, sizeof(answer->header.reply),
                shm_failure_format(status, text, answer->text));
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
    answer->header.hello = (struct ucx_hello){UCX_MAGIC, UCX_VERSION};
    answer_send(connection, UCX_HELLO, answer, sizeof(answer->header.hello), 0);
    return UCS_OK;
}

/* ---- Gets ---- */

static void get_free(struct get *get)
{
    struct rk_ucx_server *server = get->connection->server;
    if (get->pin) {
        server->options.ops->unpin(server->options.context, get->pin);
    }
    rk_free(get->offsets);
    rk_free(get->checksums);
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

static void on_reply_sent(void *request, ucs_status_t status, void *context)
{
    struct get *get = context;
    get->connection->server->ucx.api->ucp_request_free(request);
    sent(get, status);
}

static void on_frame_sent(void *request, ucs_status_t status, void *context)
{
    struct frame *frame = context;
    frame->busy = false;
    frame->get->connection->server->ucx.api->ucp_request_free(request);
    sent(frame->get, status);
}

/* True: UCX calls back. */
static bool send_started(struct get *get, ucs_status_ptr_t request)
{
    if (UCS_PTR_IS_ERR(request)) {
        sent(get, UCS_PTR_STATUS(request));
        return false;
    }
    if (!request) {
        sent(get, UCS_OK);
        return false;
    }
    return true;
}

static void reply_send(struct get *get, uint32_t request_id)
{
    ucp_request_param_t params = {.op_attr_mask =
                                      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                                      UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                  .flags = UCP_AM_SEND_FLAG_EAGER,
                                  .cb.send = on_reply_sent,
                                  .user_data = get,
                                  .memory_type = UCS_MEMORY_TYPE_HOST};
    get->reply = (struct ucx_reply){
        .magic = UCX_MAGIC, .request_id = request_id, .num_pages = (uint32_t)get->num_pages};
    get->in_flight++;
    (void)send_started(get,
                       get->connection->server->ucx.api->ucp_am_send_nbx(
                           get->connection->endpoint, UCX_REPLY, &get->reply, sizeof(get->reply),
                           get->checksums, get->num_pages * sizeof(uint64_t), &params));
}

/* Fills a frame with the next pages: runs that lie side by side are one entry. Returns the
 * entries. */
static size_t frame_fill(struct get *get, struct frame *frame)
{
    const uint8_t *arena = get->connection->server->options.arena;
    uint64_t pages_max = UCX_CHUNK_BYTES / get->page_bytes;
    size_t count = 0;
    pages_max = pages_max > 0 ? pages_max : 1;
    frame->header = (struct ucx_pages){.magic = UCX_MAGIC,
                                       .request_id = get->reply.request_id,
                                       .page_begin = (uint32_t)get->next_page};
    while (get->next_page < get->num_pages && frame->header.num_pages < pages_max) {
        /* UCX only reads what it sends. */
        uint8_t *page = (uint8_t *)(uintptr_t)(arena + get->offsets[get->next_page]);
        ucp_dt_iov_t *last = count > 0 ? &frame->iov[count - 1] : NULL;
        if (last && (uint8_t *)last->buffer + last->length == page) {
            last->length += get->page_bytes;
        } else if (count == IOV_MAX_PAGES) {
            break;
        } else {
            frame->iov[count++] = (ucp_dt_iov_t){.buffer = page, .length = get->page_bytes};
        }
        get->next_page++;
        frame->header.num_pages++;
    }
    return count;
}

static void frame_send(struct get *get, struct frame *frame)
{
    size_t count = frame_fill(get, frame);
    ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                                                  UCP_OP_ATTR_FIELD_USER_DATA |
                                                  UCP_OP_ATTR_FIELD_MEMORY_TYPE,
                                  .cb.send = on_frame_sent,
                                  .user_data = frame,
                                  .memory_type = UCS_MEMORY_TYPE_HOST};
    const void *data = frame->iov[0].buffer;
    size_t bytes = frame->iov[0].length;
    if (count > 1) {
        params.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE;
        params.datatype = ucp_dt_make_iov();
        data = frame->iov;
        bytes = count;
    }
    frame->busy = true;
    get->in_flight++;
    if (!send_started(get, get->connection->server->ucx.api->ucp_am_send_nbx(
                               get->connection->endpoint, UCX_PAGES, &frame->header,
                               sizeof(frame->header), data, bytes, &params))) {
        frame->busy = false;
    }
}

static void get_push(struct get *get)
{
    for (size_t i = 0; i < FRAMES_MAX; i++) {
        struct frame *frame = &get->frames[i];
        while (!frame->busy && !get->failed && get->next_page < get->num_pages) {
            frame_send(get, frame);
        }
    }
}

/* Pins what is asked for. The caller frees the get when it fails. */
static enum rk_status get_pin(struct rk_ucx_server *server, const struct rk_get *asked,
                              struct get *get, struct rk_error *error)
{
    get->page_bytes = asked->page_bytes;
    get->num_pages = asked->pages_max;
    get->offsets = rk_alloc_zero(asked->pages_max, sizeof(*get->offsets));
    get->checksums = rk_alloc_zero(asked->pages_max, sizeof(*get->checksums));
    if (!get->offsets || !get->checksums) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a get");
    }
    return server->options.ops->pin(server->options.context, RK_PATH_UCX, asked, get->offsets,
                                    get->checksums, &get->num_pages, &get->pin, error);
}

static void get_begin(struct connection *connection, const struct ucx_get *header,
                      const struct rk_get *asked)
{
    struct rk_ucx_server *server = connection->server;
    struct rk_error error = {.text = ""};
    if (connection->num_gets >= server->options.gets_max) {
        refuse(connection, header->request_id, RK_ERR_FULL, "too many reads are under way");
        return;
    }
    struct get *get = rk_alloc_zero(1, sizeof(*get));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (get) {
        get->connection = connection;
        status = get_pin(server, asked, get, &error);
    }
    if (status != RK_OK) {
        refuse(connection, header->request_id, status,
               error.text[0] ? error.text : rk_status_text(status));
        if (get) {
            get_free(get);
        }
        return;
    }
    uint32_t timeout_ms = header->timeout_ms < TIMEOUT_MS_MAX ? header->timeout_ms : TIMEOUT_MS_MAX;
    get->deadline_ns = rk_deadline_in_ms(timeout_ms);
    for (size_t i = 0; i < FRAMES_MAX; i++) {
        get->frames[i].get = get;
    }
    get->next = server->gets;
    server->gets = get;
    connection->num_gets++;
    reply_send(get, header->request_id);
    get_push(get);
}

static ucs_status_t on_get(void *context, const void *header, size_t header_bytes, void *data,
                           size_t bytes, const ucp_am_recv_param_t *param)
{
    struct rk_ucx_server *server = context;
    struct connection *connection = connection_find(server, param);
    struct ucx_get wire;
    struct rk_get asked;
    if (!connection) {
        return UCS_OK;
    }
    if (!connection->greeted || header_bytes != sizeof(wire) ||
        (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)) {
        protocol_error(connection, "a get without a hello, or of another form");
        return UCS_OK;
    }
    memcpy(&wire, header, sizeof(wire));
    struct shm_frame frame = {.body = data, .bytes = bytes};
    frame.header.body_bytes = (uint32_t)bytes;
    if (wire.magic != UCX_MAGIC || wire.request_id == 0 || bytes > SHM_REQUEST_BYTES_MAX ||
        shm_get_parse(&frame, SHM_PAGES_MAX, server->extents, &asked) != RK_OK) {
        protocol_error(connection, "a get whose lengths disagree");
        return UCS_OK;
    }
    get_begin(connection, &wire, &asked);
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
            RK_LOG_WARN("ucx_reader_stuck", "pages_left=%llu action=disconnect",
                        (unsigned long long)(get->num_pages - get->next_page));
            get->connection->dead = true;
        } else {
            get_push(get);
        }
        bool ended = get->failed || get->next_page == get->num_pages;
        if (ended && get->in_flight == 0) {
            *at = get->next;
            get->connection->num_gets--;
            get_free(get);
        } else {
            at = &get->next;
        }
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
        } else if (!connection->endpoint && connection->num_gets == 0) {
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
                        rk_deadline_in_ms(server->gets ? SWEEP_MS : 10 * SWEEP_MS));
        gets_sweep(server);
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
    struct ucx_address address;
    enum rk_status status = ucx_address_resolve(server->options.listen, &address, error);
    server->extents = rk_alloc_zero(SHM_EXTENTS_MAX, sizeof(*server->extents));
    server->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (status == RK_OK && (!server->extents || server->wake_fd < 0)) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the UCX server");
    }
    if (status == RK_OK) {
        status = ucx_worker_create(&address, &server->ucx, error);
    }
    if (status == RK_OK) {
        status = ucx_worker_handle(&server->ucx, UCX_HELLO, on_hello, server, error);
    }
    if (status == RK_OK) {
        status = ucx_worker_handle(&server->ucx, UCX_GET, on_get, server, error);
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
    server->options.gets_max = options->gets_max > 0 ? options->gets_max : 64;
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
    rk_free(server);
}
