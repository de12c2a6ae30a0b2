/*
 * Goal:   calls that are only held open (health's watchers, streams that say nothing) take no
 *         handler, are bounded, and end; streams leave handlers to calls without streams.
 * Method: a server with a handful of handlers and methods of the real descriptors, and a hundred
 *         clients of each sort.
 */
#include "common/base/clock.h"
#include "common/rpc/rpc.h"
#include "grpc/health/v1/health.pb-c.h"
#include "redknot/v1/worker.pb-c.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define LONG_MS     20000
#define IDLE_MS     300
#define CALLS       4
#define PUT         "/redknot.v1.KvStore/Put"
#define TOKENIZE    "/redknot.v1.Worker/Tokenize"
#define CHECK       "/grpc.health.v1.Health/Check"
#define WATCH       "/grpc.health.v1.Health/Watch"
#define SERVING     GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING

struct fixture {
    struct rk_rpc_server *server;
    struct rk_rpc_channel *channel;
    atomic_int running; /* streams with a handler */
    atomic_int ended;
    _Atomic int status; /* what the last one saw */
};

static enum rk_status upload(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct fixture *f = context;
    Redknot__V1__TokenizeReply reply = REDKNOT__V1__TOKENIZE_REPLY__INIT;
    enum rk_status status = RK_OK;
    (void)error;
    atomic_fetch_add(&f->running, 1);
    while (status == RK_OK) {
        struct ProtobufCMessage *message = NULL;
        status = rk_rpc_call_recv(call, &redknot__v1__tokenize_request__descriptor, &message);
        rk_rpc_message_free(message);
    }
    atomic_store(&f->status, (int)status);
    atomic_fetch_sub(&f->running, 1);
    atomic_fetch_add(&f->ended, 1);
    return status == RK_ERR_NOT_FOUND ? rk_rpc_call_send(call, &reply.base) : status;
}

static enum rk_status tokenize(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct ProtobufCMessage *message = NULL;
    Redknot__V1__TokenizeReply reply = REDKNOT__V1__TOKENIZE_REPLY__INIT;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__tokenize_request__descriptor, &message);
    (void)context, (void)error;
    rk_rpc_message_free(message);
    return status == RK_OK ? rk_rpc_call_send(call, &reply.base) : status;
}

static int set_up(void **state)
{
    static struct fixture fixture;
    static const struct rk_rpc_method stores[] = {{.path = PUT, .handler = upload}};
    static const struct rk_rpc_method workers[] = {{.path = TOKENIZE, .handler = tokenize}};
    struct fixture *f = &fixture;
    struct rk_rpc_server_options options = {
        .address = "127.0.0.1:0", .calls_max = CALLS, .recv_idle_ms = IDLE_MS};
    char address[64];
    memset(f, 0, sizeof(*f));
    assert_int_equal(rk_rpc_server_create(&options, &f->server, NULL), RK_OK);
    assert_int_equal(rk_rpc_server_add_service(f->server, "redknot.v1.KvStore", stores, 1, f),
                     RK_OK);
    assert_int_equal(rk_rpc_server_add_service(f->server, "redknot.v1.Worker", workers, 1, f),
                     RK_OK);
    assert_int_equal(rk_rpc_server_start(f->server), RK_OK);
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", rk_rpc_server_port(f->server));
    assert_int_equal(rk_rpc_channel_create(address, &f->channel, NULL), RK_OK);
    *state = f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;
    rk_rpc_channel_destroy(f->channel);
    rk_rpc_server_destroy(f->server);
    return 0;
}

static enum rk_status ask(struct fixture *f)
{
    Redknot__V1__TokenizeRequest request = REDKNOT__V1__TOKENIZE_REQUEST__INIT;
    struct ProtobufCMessage *reply = NULL;
    enum rk_status status =
        rk_rpc_unary(f->channel, TOKENIZE, &request.base, &redknot__v1__tokenize_reply__descriptor,
                     LONG_MS, &reply, NULL);
    rk_rpc_message_free(reply);
    return status;
}

static int health(struct fixture *f)
{
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    struct ProtobufCMessage *reply = NULL;
    assert_int_equal(rk_rpc_unary(f->channel, CHECK, &request.base,
                                  &grpc__health__v1__health_check_response__descriptor, LONG_MS,
                                  &reply, NULL),
                     RK_OK);
    int state = (int)((Grpc__Health__V1__HealthCheckResponse *)reply)->status;
    rk_rpc_message_free(reply);
    return state;
}

static struct rk_rpc_stream *watch(struct fixture *f)
{
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    struct rk_rpc_stream *stream = NULL;
    assert_int_equal(
        rk_rpc_stream_open_with(f->channel, WATCH, &request.base, LONG_MS, &stream, NULL), RK_OK);
    return stream;
}

/* -1: the call is over. */
static int watched(struct rk_rpc_stream *stream)
{
    struct ProtobufCMessage *reply = NULL;
    if (rk_rpc_stream_recv(stream, &grpc__health__v1__health_check_response__descriptor, &reply) !=
        RK_OK) {
        return -1;
    }
    int state = (int)((Grpc__Health__V1__HealthCheckResponse *)reply)->status;
    rk_rpc_message_free(reply);
    return state;
}

static struct rk_rpc_stream *put_open(struct fixture *f, bool speak)
{
    Redknot__V1__TokenizeRequest request = REDKNOT__V1__TOKENIZE_REQUEST__INIT;
    struct rk_rpc_stream *stream = NULL;
    assert_int_equal(rk_rpc_stream_open(f->channel, PUT, LONG_MS, &stream, NULL), RK_OK);
    if (speak) {
        assert_int_equal(rk_rpc_stream_send(stream, &request.base), RK_OK);
    }
    return stream;
}

static void becomes(atomic_int *value, int wanted)
{
    int64_t deadline_ns = rk_deadline_in_ms(LONG_MS);
    while (atomic_load(value) != wanted && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(1);
    }
    assert_int_equal(atomic_load(value), wanted);
}

static void watchers_take_no_handler(void **state)
{
    enum { WATCHERS = 256 };
    static struct rk_rpc_stream *streams[WATCHERS];
    struct fixture *f = *state;
    for (int i = 0; i < WATCHERS; i++) {
        streams[i] = watch(f);
        assert_int_equal(watched(streams[i]), SERVING);
    }
    for (int i = 0; i < 20; i++) {
        assert_int_equal(ask(f), RK_OK);
        assert_int_equal(health(f), SERVING);
    }
    struct rk_rpc_stream *over = watch(f);
    assert_int_equal(watched(over), -1);
    assert_int_equal(rk_rpc_stream_finish(over, NULL), RK_ERR_FULL);
    rk_rpc_stream_destroy(over);
    rk_rpc_server_set_serving(f->server, false);
    assert_int_equal(health(f), NOT_SERVING);
    for (int i = 0; i < WATCHERS; i++) {
        assert_int_equal(watched(streams[i]), NOT_SERVING);
    }
    for (int i = 0; i < WATCHERS; i += 2) {
        rk_rpc_stream_destroy(streams[i]);
    }
    rk_rpc_server_set_serving(f->server, true);
    for (int i = 1; i < WATCHERS; i += 2) {
        assert_int_equal(watched(streams[i]), SERVING);
    }
    over = watch(f); /* There is room again. */
    assert_int_equal(watched(over), SERVING);
    rk_rpc_server_stop(f->server, 2000); /* Nobody holds it up. */
    assert_int_equal(watched(over), -1);
    assert_int_equal(rk_rpc_stream_finish(over, NULL), RK_ERR_UNAVAILABLE);
    rk_rpc_stream_destroy(over);
    for (int i = 1; i < WATCHERS; i += 2) {
        rk_rpc_stream_destroy(streams[i]);
    }
}

static void silent_streams_take_no_handler(void **state)
{
    enum { SILENT = 64 };
    struct rk_rpc_stream *streams[SILENT];
    struct fixture *f = *state;
    int64_t begin_ns = rk_clock_ns();
    for (int i = 0; i < SILENT; i++) {
        streams[i] = put_open(f, false);
    }
    for (int i = 0; i < CALLS; i++) {
        struct rk_rpc_stream *put = put_open(f, true);
        struct ProtobufCMessage *reply = NULL;
        assert_int_equal(rk_rpc_stream_send_done(put), RK_OK);
        assert_int_equal(rk_rpc_stream_recv(put, &redknot__v1__tokenize_reply__descriptor, &reply),
                         RK_OK);
        rk_rpc_message_free(reply);
        assert_int_equal(rk_rpc_stream_finish(put, NULL), RK_OK);
        rk_rpc_stream_destroy(put);
        assert_int_equal(ask(f), RK_OK);
    }
    assert_int_equal(atomic_load(&f->ended), CALLS);
    for (int i = 0; i < SILENT; i++) {
        struct ProtobufCMessage *reply = NULL;
        struct rk_error error = {.text = ""};
        assert_int_equal(
            rk_rpc_stream_recv(streams[i], &redknot__v1__tokenize_reply__descriptor, &reply),
            RK_ERR_NOT_FOUND);
        assert_int_equal(rk_rpc_stream_finish(streams[i], &error), RK_ERR_DEADLINE);
        assert_non_null(strstr(error.text, "no message came"));
        rk_rpc_stream_destroy(streams[i]);
    }
    assert_true(rk_clock_ns() - begin_ns < 3000 * INT64_C(1000000));
}

static void a_stream_that_stops_gives_its_handler_back(void **state)
{
    struct fixture *f = *state;
    struct rk_rpc_stream *put = put_open(f, true);
    struct rk_error error = {.text = ""};
    becomes(&f->running, 1);
    becomes(&f->ended, 1);
    assert_int_equal(atomic_load(&f->status), RK_ERR_DEADLINE);
    struct ProtobufCMessage *reply = NULL;
    assert_int_equal(rk_rpc_stream_recv(put, &redknot__v1__tokenize_reply__descriptor, &reply),
                     RK_ERR_NOT_FOUND);
    assert_int_equal(rk_rpc_stream_finish(put, &error), RK_ERR_DEADLINE);
    rk_rpc_stream_destroy(put);
}

static void streams_leave_handlers_to_others(void **state)
{
    struct rk_rpc_stream *streams[CALLS];
    struct fixture *f = *state;
    for (int i = 0; i < CALLS; i++) {
        streams[i] = put_open(f, true);
    }
    becomes(&f->running, CALLS);
    struct rk_rpc_stream *over = put_open(f, true);
    assert_int_equal(rk_rpc_stream_send_done(over), RK_OK);
    struct ProtobufCMessage *reply = NULL;
    assert_int_equal(rk_rpc_stream_recv(over, &redknot__v1__tokenize_reply__descriptor, &reply),
                     RK_ERR_NOT_FOUND);
    assert_int_equal(rk_rpc_stream_finish(over, NULL), RK_ERR_FULL);
    rk_rpc_stream_destroy(over);
    assert_int_equal(ask(f), RK_OK);
    assert_int_equal(health(f), SERVING);
    for (int i = 0; i < CALLS; i++) {
        rk_rpc_stream_destroy(streams[i]);
    }
    becomes(&f->running, 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(watchers_take_no_handler),
        TEST(silent_streams_take_no_handler),
        TEST(a_stream_that_stops_gives_its_handler_back),
        TEST(streams_leave_handlers_to_others),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
