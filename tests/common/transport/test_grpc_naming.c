/*
 * Goal:   over gRPC, too, a store that answers about another item, or that is another one than was
 *         looked for, is not believed, however good its checksums are; and connecting finds the
 *         nearest path that answers, in the time there is.
 * Method: a server of our own that answers as it is told to; sockets that take connections and say
 *         nothing, as those of a stopped process do.
 */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/value.h"
#include "common/rpc/rpc.h"
#include "redknot/v1/kvstore.pb-c.h"
#include "tests/common/transport/one_get.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cmocka.h>

#define WAIT_MS 20000

/* What the server says, which is one page of a value or of a shard. */
static struct {
    struct rk_id id;
    uint64_t generation;
    const char *status;
    const char *node_id;
    uint64_t incarnation;
    uint8_t page[4096];
} said;
static pthread_mutex_t said_lock = PTHREAD_MUTEX_INITIALIZER; /* calls run on other threads */

#define SAY(field, value)                                                                          \
    do {                                                                                           \
        (void)pthread_mutex_lock(&said_lock);                                                      \
        said.field = (value);                                                                      \
        (void)pthread_mutex_unlock(&said_lock);                                                    \
    } while (0)

static enum rk_status say(struct rk_rpc_call *call, const struct ProtobufCMessage *reply)
{
    enum rk_status status = rk_rpc_call_send(call, reply);
    (void)pthread_mutex_unlock(&said_lock);
    return status;
}

static enum rk_status handle_get(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    (void)context;
    (void)error;
    enum rk_status status = rk_rpc_call_recv(call, &redknot__v1__get_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    rk_rpc_message_free(message);
    (void)pthread_mutex_lock(&said_lock);
    Redknot__V1__GetReply reply = REDKNOT__V1__GET_REPLY__INIT;
    Redknot__V1__GetReply__Found found = REDKNOT__V1__GET_REPLY__FOUND__INIT;
    Redknot__V1__GetReply__Item item = REDKNOT__V1__GET_REPLY__ITEM__INIT;
    Redknot__V1__GetReply__Item *items = &item;
    uint64_t checksum = rk_hash_xxh3(said.page, sizeof(said.page));
    item.status = (char *)(uintptr_t)said.status;
    item.id = (ProtobufCBinaryData){RK_ID_BYTES, said.id.bytes};
    item.generation = said.generation;
    found.n_items = 1;
    found.items = &items;
    found.node_id = (char *)(uintptr_t)said.node_id;
    found.incarnation = said.incarnation;
    reply.found = &found;
    if (strcmp(said.status, "OK") == 0) {
        item.page_bytes = sizeof(said.page);
        item.bytes = sizeof(said.page);
        item.n_checksums = 1;
        item.checksums = &checksum;
        reply.data = (ProtobufCBinaryData){sizeof(said.page), said.page};
    }
    return say(call, &reply.base);
}

static enum rk_status handle_put(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status = RK_OK;
    (void)context;
    (void)error;
    while (status == RK_OK) {
        status = rk_rpc_call_recv(call, &redknot__v1__put_request__descriptor, &message);
        if (status == RK_OK) {
            rk_rpc_message_free(message);
        }
    }
    (void)pthread_mutex_lock(&said_lock);
    Redknot__V1__PutReply reply = REDKNOT__V1__PUT_REPLY__INIT;
    Redknot__V1__PutReply__Result result = REDKNOT__V1__PUT_REPLY__RESULT__INIT;
    Redknot__V1__PutReply__Result *results = &result;
    result.status = (char *)(uintptr_t) "OK";
    reply.n_results = 1;
    reply.results = &results;
    reply.node_id = (char *)(uintptr_t)said.node_id;
    reply.incarnation = said.incarnation;
    return say(call, &reply.base);
}

static enum rk_status handle_store_status(struct rk_rpc_call *call, void *context,
                                          struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    (void)context;
    (void)error;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__store_status_request__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    rk_rpc_message_free(message);
    (void)pthread_mutex_lock(&said_lock);
    Redknot__V1__StoreStatusReply reply = REDKNOT__V1__STORE_STATUS_REPLY__INIT;
    reply.node_id = (char *)(uintptr_t)said.node_id;
    reply.incarnation = said.incarnation;
    return say(call, &reply.base);
}

static struct rk_rpc_server *server;
static char address[64];

static int set_up(void **state)
{
    static const struct rk_rpc_method methods[] = {
        {.path = "/redknot.v1.KvStore/Get", .handler = handle_get},
        {.path = "/redknot.v1.KvStore/Put", .handler = handle_put},
        {.path = "/redknot.v1.KvStore/StoreStatus", .handler = handle_store_status}};
    const struct rk_rpc_server_options options = {.address = "127.0.0.1:0"};
    (void)state;
    assert_int_equal(rk_rpc_server_create(&options, &server, NULL), RK_OK);
    assert_int_equal(rk_rpc_server_add_service(server, "redknot.v1.KvStore", methods, 3, NULL),
                     RK_OK);
    assert_int_equal(rk_rpc_server_start(server), RK_OK);
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", rk_rpc_server_port(server));
    memset(said.page, 0x5a, sizeof(said.page));
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    rk_rpc_server_destroy(server);
    return 0;
}

static struct rk_transport *connected(const char *node_id, uint64_t incarnation)
{
    const struct rk_transport_endpoint endpoint = {
        .grpc_address = address, .node_id = node_id, .incarnation = incarnation};
    struct rk_transport *transport = NULL;
    struct rk_error error = {.text = ""};
    if (rk_transport_connect(&endpoint, RK_PATH_GRPC, WAIT_MS, &transport, &error) != RK_OK) {
        print_message("%s\n", error.text);
        return NULL;
    }
    return transport;
}

static const struct rk_extent one_page = {0, 0, 0, 1};

static enum rk_status ask(struct rk_transport *transport, const struct rk_id *id,
                          uint64_t generation, struct rk_error *error)
{
    struct rk_pages pages = {.status = RK_OK};
    struct rk_get get = {.id = *id, .bytes_max = sizeof(said.page), .verify = true};
    if (generation > 0) {
        get.generation = generation;
        get.page_bytes = sizeof(said.page);
        get.extents = &one_page;
        get.num_extents = 1;
    }
    enum rk_status status = get_one(transport, &get, WAIT_MS, &pages, error);
    if (status == RK_OK) {
        assert_memory_equal(pages.pages[0].data, said.page, sizeof(said.page));
        assert_int_equal(pages.generation, said.generation);
        assert_false(pages.in_place);
        rk_transport_release(transport, &pages, 1);
    }
    return status;
}

static void replies_name_what_they_answer(void **state)
{
    (void)state;
    const struct rk_id id = rk_id_sha256("a", 1);
    const struct rk_id other = rk_id_sha256("b", 1);
    SAY(node_id, "");
    SAY(incarnation, 0);
    struct rk_transport *transport = connected("", 0);
    SAY(status, "OK");
    SAY(id, id);
    SAY(generation, 3);
    assert_int_equal(ask(transport, &id, 3, NULL), RK_OK);
    assert_int_equal(ask(transport, &id, 0, NULL), RK_OK); /* A value: the store's generation. */
    assert_int_equal(ask(transport, &id, 2, NULL), RK_ERR_UNAVAILABLE);
    assert_int_equal(ask(transport, &other, 3, NULL), RK_ERR_UNAVAILABLE);
    assert_int_equal(ask(transport, &other, 0, NULL), RK_ERR_UNAVAILABLE);
    SAY(status, "MISS_ABSENT");
    assert_int_equal(ask(transport, &id, 3, NULL), RK_MISS_ABSENT);
    assert_int_equal(ask(transport, &other, 3, NULL), RK_ERR_UNAVAILABLE);
    rk_transport_destroy(transport);
}

/* A store that is exchanged while the channel is there. */
static void replies_name_who_answers(void **state)
{
    (void)state;
    const struct rk_id id = rk_id_sha256("a", 1);
    const void *pages[] = {said.page};
    struct rk_put put = {.head = "", /* a PutItem that says nothing */
                         .pages = pages,
                         .num_pages = 1,
                         .page_bytes = sizeof(said.page),
                         .bytes = sizeof(said.page)};
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(WAIT_MS)};
    struct rk_error error = {.text = ""};
    SAY(status, "OK");
    SAY(id, id);
    SAY(node_id, "store-1");
    SAY(incarnation, 5);
    struct rk_transport *transport = connected("store-1", 5);
    assert_non_null(transport);
    assert_int_equal(ask(transport, &id, 0, NULL), RK_OK);
    assert_int_equal(rk_transport_put(transport, &put, 1, &until, &error), RK_OK);
    assert_int_equal(put.status, RK_OK);
    SAY(node_id, "store-2");
    assert_int_equal(ask(transport, &id, 0, &error), RK_ERR_UNAVAILABLE);
    assert_string_equal(error.text, "this is store-2, not store-1");
    assert_int_equal(rk_transport_put(transport, &put, 1, &until, &error), RK_ERR_UNAVAILABLE);
    SAY(node_id, "store-1");
    SAY(incarnation, 6);
    assert_int_equal(ask(transport, &id, 0, &error), RK_ERR_UNAVAILABLE);
    assert_string_equal(error.text, "this is store-1, but started anew");
    rk_transport_destroy(transport);
}

/* ---- Which path ---- */

static int silent_listen(int family, const void *to, socklen_t bytes)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, to, bytes), 0);
    assert_int_equal(listen(fd, 8), 0);
    return fd;
}

static void a_silent_nearer_path_leaves_time(void **state)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    char folder[64] = "/tmp/redknot-test-XXXXXX";
    struct rk_transport *transport = NULL;
    (void)state;
    SAY(node_id, "store-1");
    SAY(incarnation, 5);
    assert_non_null(mkdtemp(folder));
    (void)snprintf(to.sun_path, sizeof(to.sun_path), "%s/socket", folder);
    int fd = silent_listen(AF_UNIX, &to, sizeof(to));
    const struct rk_transport_endpoint endpoint = {.grpc_address = address,
                                                   .host_id = rk_host_id(),
                                                   .shm_socket = to.sun_path,
                                                   .node_id = "store-1",
                                                   .incarnation = 5};
    int64_t begin_ns = rk_clock_ns();
    assert_int_equal(rk_transport_connect(&endpoint, RK_PATH_NONE, 3000, &transport, NULL), RK_OK);
    assert_true(rk_clock_ns() - begin_ns < INT64_C(2000000000));
    assert_int_equal(rk_transport_path(transport), RK_PATH_GRPC);
    assert_int_equal(rk_transport_nearest(&endpoint), RK_PATH_SHM); /* To be tried again later. */
    rk_transport_destroy(transport);
    assert_int_equal(close(fd), 0);
    assert_int_equal(unlink(to.sun_path), 0);
    assert_int_equal(rmdir(folder), 0);
}

static void a_port_that_says_nothing_is_no_connection(void **state)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof(to);
    char where[32];
    struct rk_transport *transport = NULL;
    (void)state;
    int fd = silent_listen(AF_INET, &to, sizeof(to));
    assert_int_equal(getsockname(fd, (struct sockaddr *)&to, &bytes), 0);
    (void)snprintf(where, sizeof(where), "127.0.0.1:%d", ntohs(to.sin_port));
    const struct rk_transport_endpoint endpoint = {.grpc_address = where};
    assert_int_equal(rk_transport_connect(&endpoint, RK_PATH_NONE, 300, &transport, NULL),
                     RK_ERR_UNAVAILABLE);
    assert_null(transport);
    assert_int_equal(close(fd), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(replies_name_what_they_answer),
                                       cmocka_unit_test(replies_name_who_answers),
                                       cmocka_unit_test(a_silent_nearer_path_leaves_time),
                                       cmocka_unit_test(a_port_that_says_nothing_is_no_connection)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
