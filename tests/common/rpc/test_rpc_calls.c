/*
 * Goal:   every kind of call works, ends at its deadline, when either side
 *         cancels, and when the peer is not there; statuses survive the wire;
 *         parts are given back exactly once.
 * Method: a server with the echo service and a channel to it in one process.
 */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "redknot/v1/worker.pb-c.h"
#include "tests/common/rpc/echo_service.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LONG_MS         30000
#define SEND_TIMEOUT_MS 300

struct fixture {
    struct echo_service service;
    struct rk_rpc_server *server;
    struct rk_rpc_channel *channel;
};

static int setup(void **state)
{
    struct fixture *fixture = calloc(1, sizeof(*fixture));
    struct rk_rpc_server_options options = {
        .address = "127.0.0.1:0", .calls_max = 16, .send_timeout_ms = SEND_TIMEOUT_MS};
    struct rk_error error = {0};
    char address[64];
    assert_int_equal(rk_rpc_server_create(&options, &fixture->server, &error), RK_OK);
    assert_int_equal(rk_rpc_server_add_service(fixture->server, ECHO_SERVICE, echo_methods,
                                               echo_num_methods, &fixture->service),
                     RK_OK);
    assert_int_equal(rk_rpc_server_start(fixture->server), RK_OK);
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", rk_rpc_server_port(fixture->server));
    assert_int_equal(rk_rpc_channel_create(address, &fixture->channel, &error), RK_OK);
    *state = fixture;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *fixture = *state;
    rk_rpc_channel_destroy(fixture->channel);
    rk_rpc_server_destroy(fixture->server);
    free(fixture);
    return 0;
}

static enum rk_status ask(struct rk_rpc_channel *channel, const char *path, const char *text,
                          int timeout_ms, uint32_t *ret_number, struct rk_error *error)
{
    Redknot__V1__TokenizeRequest request = REDKNOT__V1__TOKENIZE_REQUEST__INIT;
    request.text = (char *)(uintptr_t)text;
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_unary(channel, path, &request.base, &redknot__v1__tokenize_reply__descriptor,
                     timeout_ms, &message, error);
    if (status == RK_OK) {
        Redknot__V1__TokenizeReply *reply = (Redknot__V1__TokenizeReply *)message;
        assert_int_equal(reply->n_token_ids, 1);
        *ret_number = reply->token_ids[0];
        rk_rpc_message_free(message);
    } else {
        assert_null(message);
    }
    return status;
}

static struct rk_rpc_stream *stream_open(struct fixture *fixture, const char *path, int timeout_ms)
{
    struct rk_rpc_stream *stream = NULL;
    assert_int_equal(rk_rpc_stream_open(fixture->channel, path, timeout_ms, &stream, NULL), RK_OK);
    return stream;
}

static enum rk_status stream_send(struct rk_rpc_stream *stream, const char *text)
{
    Redknot__V1__TokenizeRequest request = REDKNOT__V1__TOKENIZE_REQUEST__INIT;
    request.text = (char *)(uintptr_t)text;
    return rk_rpc_stream_send(stream, &request.base);
}

static enum rk_status stream_recv(struct rk_rpc_stream *stream, uint32_t *ret_number)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_stream_recv(stream, &redknot__v1__tokenize_reply__descriptor, &message);
    if (status == RK_OK) {
        *ret_number = ((Redknot__V1__TokenizeReply *)message)->token_ids[0];
        rk_rpc_message_free(message);
    }
    return status;
}

static void wait_for(atomic_int *value, int wanted)
{
    int64_t deadline = rk_deadline_in_ms(LONG_MS);
    while (atomic_load(value) != wanted && rk_deadline_left_ms(deadline) > 0) {
        rk_clock_sleep_ms(1);
    }
    assert_int_equal(atomic_load(value), wanted);
}

static void unary_call_gets_its_reply(void **state)
{
    struct fixture *fixture = *state;
    uint32_t number = 0;
    struct rk_error error = {0};
    assert_int_equal(ask(fixture->channel, ECHO_UNARY, "four", LONG_MS, &number, &error), RK_OK);
    assert_int_equal(number, 4);
    assert_int_equal(ask(fixture->channel, ECHO_PLAIN, "", LONG_MS, &number, &error), RK_OK);
    assert_int_equal(number, 0);
}

static void every_status_survives_the_wire(void **state)
{
    struct fixture *fixture = *state;
    for (int status = RK_OK + 1; status < RK_STATUS_COUNT; status++) {
        uint32_t number = 0;
        struct rk_error error = {0};
        const char *name = rk_status_name((enum rk_status)status);
        char text[128];
        assert_int_equal(ask(fixture->channel, ECHO_STATUS, name, LONG_MS, &number, &error),
                         status);
        assert_int_equal(error.status, status);
        (void)snprintf(text, sizeof(text), "said %s \xc3\xa9 %% ??", name);
        assert_string_equal(error.text, text);
    }
}

static void server_streams_until_its_end(void **state)
{
    struct fixture *fixture = *state;
    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_COUNT, LONG_MS);
    uint32_t number = 0;
    struct rk_error error = {0};
    assert_int_equal(stream_send(stream, "500"), RK_OK);
    assert_int_equal(rk_rpc_stream_send_done(stream), RK_OK);
    for (uint32_t i = 0; i < 500; i++) {
        assert_int_equal(stream_recv(stream, &number), RK_OK);
        assert_int_equal(number, i);
    }
    assert_int_equal(stream_recv(stream, &number), RK_ERR_NOT_FOUND);
    assert_int_equal(stream_recv(stream, &number), RK_ERR_NOT_FOUND);
    assert_int_equal(rk_rpc_stream_finish(stream, &error), RK_OK);
    rk_rpc_stream_destroy(stream);
}

static void client_streams_and_reads_one_reply(void **state)
{
    struct fixture *fixture = *state;
    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_UPLOAD, LONG_MS);
    uint32_t number = 0;
    for (int i = 0; i < 99; i++) {
        assert_int_equal(stream_send(stream, "more"), RK_OK);
    }
    assert_int_equal(stream_send(stream, "last"), RK_OK);
    assert_int_equal(rk_rpc_stream_send_done(stream), RK_OK);
    assert_int_equal(stream_recv(stream, &number), RK_OK);
    assert_int_equal(number, 100);
    assert_int_equal(rk_rpc_stream_finish(stream, NULL), RK_OK);
    rk_rpc_stream_destroy(stream);
}

static void both_sides_stream_in_turn(void **state)
{
    struct fixture *fixture = *state;
    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_BIDI, LONG_MS);
    uint32_t number = 0;
    for (int i = 0; i < 100; i++) {
        assert_int_equal(stream_send(stream, i % 2 ? "a" : "bcd"), RK_OK);
        assert_int_equal(stream_recv(stream, &number), RK_OK);
        assert_int_equal(number, i % 2 ? 1 : 3);
    }
    assert_int_equal(rk_rpc_stream_send_done(stream), RK_OK);
    assert_int_equal(rk_rpc_stream_finish(stream, NULL), RK_OK);
    rk_rpc_stream_destroy(stream);
}

static void calls_end_at_their_deadline(void **state)
{
    struct fixture *fixture = *state;
    uint32_t number = 0;
    struct rk_error error = {0};
    assert_int_equal(ask(fixture->channel, ECHO_HANG, "", 100, &number, &error), RK_ERR_DEADLINE);
    wait_for(&fixture->service.cancelled, 1);
    wait_for(&fixture->service.running, 0);

    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_HANG, 100);
    assert_int_equal(stream_recv(stream, &number), RK_ERR_NOT_FOUND);
    assert_int_equal(rk_rpc_stream_finish(stream, &error), RK_ERR_DEADLINE);
    rk_rpc_stream_destroy(stream);
    wait_for(&fixture->service.cancelled, 2);
}

static void *cancel_later(void *context)
{
    rk_clock_sleep_ms(20);
    rk_rpc_stream_cancel(context);
    return NULL;
}

/* A handler does not wait for a client that takes nothing until the call's deadline. */
static void a_client_that_takes_nothing_loses_its_call(void **state)
{
    struct fixture *fixture = *state;
    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_FLOOD, LONG_MS);
    struct rk_error error = {.text = ""};
    uint32_t number = 0;
    int64_t begin = rk_clock_ns();
    assert_int_equal(stream_send(stream, ""), RK_OK);
    wait_for(&fixture->service.cancelled, 1);
    assert_true(rk_clock_ns() - begin < LONG_MS / 2 * INT64_C(1000000)); /* Buffers fill first. */
    while (stream_recv(stream, &number) == RK_OK) {
    }
    assert_int_equal(rk_rpc_stream_finish(stream, &error), RK_ERR_DEADLINE);
    rk_rpc_stream_destroy(stream);
}

static void a_call_can_end_before_its_handler(void **state)
{
    struct fixture *fixture = *state;
    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_EARLY, LONG_MS);
    struct rk_error error = {.text = ""};
    uint32_t number = 0;
    assert_int_equal(stream_send(stream, ""), RK_OK);
    assert_int_equal(stream_recv(stream, &number), RK_OK);
    assert_int_equal(number, 7);
    assert_int_equal(stream_recv(stream, &number), RK_ERR_NOT_FOUND);
    assert_int_equal(rk_rpc_stream_finish(stream, &error), RK_OK);
    rk_rpc_stream_destroy(stream);
    assert_int_equal(atomic_load(&fixture->service.running), 1); /* and its handler works on */
    atomic_store(&fixture->service.go_on, 1);
    wait_for(&fixture->service.running, 0);
    assert_int_equal(atomic_load(&fixture->service.cancelled), 0);
}

static void client_cancels_from_another_thread(void **state)
{
    struct fixture *fixture = *state;
    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_HANG, LONG_MS);
    pthread_t thread;
    uint32_t number = 0;
    wait_for(&fixture->service.running, 1);
    assert_int_equal(pthread_create(&thread, NULL, cancel_later, stream), 0);
    assert_int_equal(stream_recv(stream, &number), RK_ERR_NOT_FOUND);
    pthread_join(thread, NULL);
    assert_int_equal(rk_rpc_stream_finish(stream, NULL), RK_ERR_CANCELLED);
    rk_rpc_stream_destroy(stream);
    wait_for(&fixture->service.running, 0);
}

static void finish_before_the_end_cancels(void **state)
{
    struct fixture *fixture = *state;
    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_COUNT, LONG_MS);
    uint32_t number = 0;
    assert_int_equal(stream_send(stream, "100000000"), RK_OK);
    assert_int_equal(rk_rpc_stream_send_done(stream), RK_OK);
    assert_int_equal(stream_recv(stream, &number), RK_OK);
    assert_int_equal(rk_rpc_stream_finish(stream, NULL), RK_ERR_CANCELLED);
    rk_rpc_stream_destroy(stream);
    wait_for(&fixture->service.cancelled, 1);

    /* And destroy alone does so, too. */
    stream = stream_open(fixture, ECHO_HANG, LONG_MS);
    wait_for(&fixture->service.running, 1);
    rk_rpc_stream_destroy(stream);
    wait_for(&fixture->service.running, 0);
}

/* A handler must never take a broken upload for a whole one. */
static void cancelled_upload_does_not_look_complete(void **state)
{
    struct fixture *fixture = *state;
    const int rounds = 200;
    for (int i = 0; i < rounds; i++) {
        struct rk_rpc_stream *stream = stream_open(fixture, ECHO_UPLOAD, LONG_MS);
        assert_int_equal(stream_send(stream, "more"), RK_OK);
        rk_rpc_stream_cancel(stream);
        rk_rpc_stream_destroy(stream);
    }
    /* The server may still be busy with them; when it answers, it has taken in all. */
    uint32_t number = 0;
    int64_t deadline = rk_deadline_in_ms(LONG_MS);
    enum rk_status status = RK_ERR_FULL;
    while (status == RK_ERR_FULL && rk_deadline_left_ms(deadline) > 0) {
        status = ask(fixture->channel, ECHO_UNARY, "x", LONG_MS, &number, NULL);
    }
    assert_int_equal(status, RK_OK);
    rk_rpc_server_stop(fixture->server, LONG_MS);
    assert_int_equal(atomic_load(&fixture->service.truncated), 0);
}

static void unknown_method_is_unsupported(void **state)
{
    struct fixture *fixture = *state;
    uint32_t number = 0;
    struct rk_error error = {0};
    assert_int_equal(ask(fixture->channel, "/redknot.test.Echo/None", "", LONG_MS, &number, &error),
                     RK_ERR_UNSUPPORTED);
    assert_non_null(strstr(error.text, "/redknot.test.Echo/None"));
}

static void count_release(void *context)
{
    atomic_fetch_add((atomic_int *)context, 1);
}

static void garbage_is_invalid(void **state)
{
    struct fixture *fixture = *state;
    static const uint8_t garbage[] = {0x0a, 0xff, 0xff, 0xff};
    struct rk_rpc_part part = {garbage, sizeof(garbage)};
    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_UNARY, LONG_MS);
    atomic_int released = 0;
    uint32_t number = 0;
    assert_int_equal(rk_rpc_stream_send_parts(stream, &part, 1, count_release, &released), RK_OK);
    assert_int_equal(rk_rpc_stream_send_done(stream), RK_OK);
    assert_int_equal(stream_recv(stream, &number), RK_ERR_NOT_FOUND);
    assert_int_equal(rk_rpc_stream_finish(stream, NULL), RK_ERR_INVALID);
    rk_rpc_stream_destroy(stream);
    wait_for(&released, 1);
}

static void big_messages_travel_in_parts(void **state)
{
    struct fixture *fixture = *state;
    const size_t sizes[] = {0, 1, 127, 128, 65536, 16u << 20};
    Redknot__V1__TokenizeRequest request = REDKNOT__V1__TOKENIZE_REQUEST__INIT;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        char text[32];
        (void)snprintf(text, sizeof(text), "%zu", sizes[i]);
        request.text = text;
        struct ProtobufCMessage *message = NULL;
        struct rk_error error = {0};
        assert_int_equal(rk_rpc_unary(fixture->channel, ECHO_BIG, &request.base,
                                      &redknot__v1__tokenize_reply__descriptor, LONG_MS, &message,
                                      &error),
                         RK_OK);
        Redknot__V1__TokenizeReply *reply = (Redknot__V1__TokenizeReply *)message;
        assert_int_equal(reply->n_token_ids, sizes[i]);
        for (size_t k = 0; k < sizes[i]; k++) {
            if (reply->token_ids[k] != ECHO_BIG_BYTE) {
                fail_msg("byte %zu is %u", k, reply->token_ids[k]);
            }
        }
        rk_rpc_message_free(message);
        wait_for(&fixture->service.released, (int)i + 1);
    }
}

static void too_long_messages_are_refused_and_released(void **state)
{
    struct fixture *fixture = *state;
    static const uint8_t byte[1];
    /* The sum decides; none of it is read. */
    struct rk_rpc_part parts[] = {{byte, 1}, {byte, RK_RPC_MESSAGE_BYTES_MAX}};
    struct rk_rpc_part overflow[] = {{byte, SIZE_MAX}, {byte, 2}};
    struct rk_rpc_stream *stream = stream_open(fixture, ECHO_BIDI, LONG_MS);
    atomic_int released = 0;
    assert_int_equal(rk_rpc_stream_send_parts(stream, parts, 2, count_release, &released),
                     RK_ERR_TOO_LONG);
    assert_int_equal(rk_rpc_stream_send_parts(stream, overflow, 2, count_release, &released),
                     RK_ERR_TOO_LONG);
    assert_int_equal(atomic_load(&released), 2);
    rk_rpc_stream_destroy(stream);
}

static void unreachable_peer_is_named(void **state)
{
    (void)state;
    struct rk_rpc_channel *channel = NULL;
    struct rk_error error = {0};
    uint32_t number = 0;
    atomic_int released = 0;
    static const uint8_t byte[1] = {0};
    struct rk_rpc_part part = {byte, 1};
    assert_int_equal(rk_rpc_channel_create("127.0.0.1:1", &channel, &error), RK_OK);
    assert_int_equal(ask(channel, ECHO_UNARY, "x", LONG_MS, &number, &error), RK_ERR_UNAVAILABLE);
    assert_non_null(strstr(error.text, "127.0.0.1:1"));
    assert_non_null(strstr(error.text, "refused"));

    struct rk_rpc_stream *stream = NULL;
    assert_int_equal(rk_rpc_stream_open(channel, ECHO_UPLOAD, LONG_MS, &stream, &error), RK_OK);
    /* Sends before the failure is known may succeed; each part comes back all the same. */
    int sent = 0;
    enum rk_status status = RK_OK;
    while (status == RK_OK) {
        status = rk_rpc_stream_send_parts(stream, &part, 1, count_release, &released);
        sent++;
    }
    assert_int_equal(status, RK_ERR_UNAVAILABLE);
    assert_int_equal(rk_rpc_stream_finish(stream, &error), RK_ERR_UNAVAILABLE);
    rk_rpc_stream_destroy(stream);
    wait_for(&released, sent);
    rk_rpc_channel_destroy(channel);

    assert_int_equal(rk_rpc_channel_create("no port", &channel, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "no port"));
    /* 34463 in 16 bits, which is somebody else. */
    assert_int_equal(rk_rpc_channel_create("127.0.0.1:99999", &channel, &error), RK_ERR_INVALID);
    assert_int_equal(rk_rpc_channel_create("127.0.0.1:0", &channel, &error), RK_ERR_INVALID);
}

struct worker {
    pthread_t thread;
    struct fixture *fixture;
    int calls;
};

static void *worker_main(void *context)
{
    struct worker *worker = context;
    for (int i = 0; i < 200; i++) {
        uint32_t number = 0;
        char text[32];
        int length = snprintf(text, sizeof(text), "%*d", i % 30 + 1, 1);
        const char *path = i % 2 ? ECHO_UNARY : ECHO_PLAIN;
        if (ask(worker->fixture->channel, path, text, LONG_MS, &number, NULL) == RK_OK &&
            number == (uint32_t)length) {
            worker->calls++;
        }
    }
    return NULL;
}

static void threads_share_a_channel(void **state)
{
    struct worker workers[8];
    for (int i = 0; i < 8; i++) {
        workers[i] = (struct worker){.fixture = *state};
        assert_int_equal(pthread_create(&workers[i].thread, NULL, worker_main, &workers[i]), 0);
    }
    for (int i = 0; i < 8; i++) {
        pthread_join(workers[i].thread, NULL);
        assert_int_equal(workers[i].calls, 200);
    }
}

#define CALL_TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CALL_TEST(unary_call_gets_its_reply),
        CALL_TEST(every_status_survives_the_wire),
        CALL_TEST(server_streams_until_its_end),
        CALL_TEST(client_streams_and_reads_one_reply),
        CALL_TEST(both_sides_stream_in_turn),
        CALL_TEST(calls_end_at_their_deadline),
        CALL_TEST(a_client_that_takes_nothing_loses_its_call),
        CALL_TEST(a_call_can_end_before_its_handler),
        CALL_TEST(client_cancels_from_another_thread),
        CALL_TEST(finish_before_the_end_cancels),
        CALL_TEST(cancelled_upload_does_not_look_complete),
        CALL_TEST(unknown_method_is_unsupported),
        CALL_TEST(garbage_is_invalid),
        CALL_TEST(big_messages_travel_in_parts),
        CALL_TEST(too_long_messages_are_refused_and_released),
        cmocka_unit_test(unreachable_peer_is_named),
        CALL_TEST(threads_share_a_channel),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
