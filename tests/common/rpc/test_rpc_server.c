/*
 * Goal:   a server starts or says why not, keeps its bounds, stops with calls
 *         under way, and is found again after it died.
 * Method: servers in this process; a peer in a process of its own where one has
 *         to die; every allocation of creation is failed in turn.
 */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "redknot/v1/worker.pb-c.h"
#include "tests/common/rpc/echo_service.h"

#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define LONG_MS 30000

static struct rk_rpc_server *server_start(struct echo_service *service, uint32_t calls_max,
                                          const char *address)
{
    struct rk_rpc_server_options options = {.address = address, .calls_max = calls_max};
    struct rk_rpc_server *server = NULL;
    struct rk_error error = {0};
    if (rk_rpc_server_create(&options, &server, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    assert_int_equal(
        rk_rpc_server_add_service(server, ECHO_SERVICE, echo_methods, echo_num_methods, service),
        RK_OK);
    assert_int_equal(rk_rpc_server_start(server), RK_OK);
    return server;
}

static struct rk_rpc_channel *channel_to(int port)
{
    char address[64];
    struct rk_rpc_channel *channel = NULL;
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", port);
    assert_int_equal(rk_rpc_channel_create(address, &channel, NULL), RK_OK);
    return channel;
}

static enum rk_status ask(struct rk_rpc_channel *channel, const char *path, int timeout_ms,
                          struct rk_error *error)
{
    Redknot__V1__TokenizeRequest request = REDKNOT__V1__TOKENIZE_REQUEST__INIT;
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_unary(channel, path, &request.base, &redknot__v1__tokenize_reply__descriptor,
                     timeout_ms, &message, error);
    rk_rpc_message_free(message);
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

static void port_in_use_is_named(void **state)
{
    (void)state;
    struct echo_service service = {0};
    struct rk_rpc_server *first = server_start(&service, 1, "127.0.0.1:0");
    char address[64];
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", rk_rpc_server_port(first));
    struct rk_rpc_server_options options = {.address = address};
    struct rk_rpc_server *second = NULL;
    struct rk_error error = {0};
    assert_int_equal(rk_rpc_server_create(&options, &second, &error), RK_ERR_IO);
    assert_null(second);
    assert_non_null(strstr(error.text, address));
    assert_non_null(strstr(error.text, "in use"));
    rk_rpc_server_destroy(first);
    /* Now it is free. */
    second = server_start(&service, 1, address);
    assert_int_equal(rk_rpc_server_port(second), strtol(strchr(address, ':') + 1, NULL, 10));
    rk_rpc_server_destroy(second);
}

static void wrong_addresses_are_named(void **state)
{
    (void)state;
    const char *addresses[] = {"nonsense",       "",     "127.0.0.1", "127.0.0.1:notaport",
                               "192.0.2.1:4000", "[::1", ":"};
    for (size_t i = 0; i < sizeof(addresses) / sizeof(addresses[0]); i++) {
        struct rk_rpc_server_options options = {.address = addresses[i]};
        struct rk_rpc_server *server = NULL;
        struct rk_error error = {0};
        enum rk_status status = rk_rpc_server_create(&options, &server, &error);
        if (status == RK_OK) {
            fail_msg("bound \"%s\" at port %d", addresses[i], rk_rpc_server_port(server));
        }
        assert_int_equal(status, RK_ERR_IO);
        assert_non_null(strstr(error.text, addresses[i]));
    }
}

static void creation_survives_each_failed_allocation(void **state)
{
    (void)state;
    enum rk_status status = RK_ERR_NO_MEMORY;
    struct rk_rpc_server_options options = {.address = "127.0.0.1:0", .calls_max = 2};
    int failures = 0;
    for (; status != RK_OK; failures++) {
        struct rk_rpc_server *server = NULL;
        rk_alloc_fail_after(failures);
        status = rk_rpc_server_create(&options, &server, NULL);
        if (status == RK_OK) {
            status = rk_rpc_server_start(server);
        }
        rk_alloc_fail_after(-1);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        rk_rpc_server_destroy(server);
    }
    assert_true(failures > 10);
}

static void calls_over_the_maximum_are_refused_at_once(void **state)
{
    (void)state;
    struct echo_service service = {0};
    struct rk_rpc_server *server = server_start(&service, 3, "127.0.0.1:0");
    struct rk_rpc_channel *channel = channel_to(rk_rpc_server_port(server));
    struct rk_rpc_stream *held[3];
    struct rk_error error = {0};
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 3; i++) {
            assert_int_equal(rk_rpc_stream_open(channel, ECHO_HANG, LONG_MS, &held[i], NULL),
                             RK_OK);
        }
        wait_for(&service.running, 3);
        for (int i = 0; i < 50; i++) {
            assert_int_equal(ask(channel, ECHO_UNARY, LONG_MS, &error), RK_ERR_FULL);
        }
        for (int i = 0; i < 3; i++) {
            rk_rpc_stream_destroy(held[i]);
        }
        wait_for(&service.running, 0);
    }
    rk_rpc_channel_destroy(channel);
    rk_rpc_server_destroy(server);
}

/* With one handler, a client that saw its call end can always make the next. */
static void a_finished_call_makes_room(void **state)
{
    (void)state;
    struct echo_service service = {0};
    struct rk_rpc_server *server = server_start(&service, 1, "127.0.0.1:0");
    struct rk_rpc_channel *channel = channel_to(rk_rpc_server_port(server));
    for (int i = 0; i < 500; i++) {
        assert_int_equal(ask(channel, ECHO_UNARY, LONG_MS, NULL), RK_OK);
    }
    rk_rpc_channel_destroy(channel);
    rk_rpc_server_destroy(server);
}

static void calls_without_deadline_get_the_default(void **state)
{
    (void)state;
    struct echo_service service = {0};
    struct rk_rpc_server_options options = {
        .address = "127.0.0.1:0", .calls_max = 2, .default_deadline_ms = 50};
    struct rk_rpc_server *server = NULL;
    assert_int_equal(rk_rpc_server_create(&options, &server, NULL), RK_OK);
    assert_int_equal(
        rk_rpc_server_add_service(server, ECHO_SERVICE, echo_methods, echo_num_methods, &service),
        RK_OK);
    assert_int_equal(rk_rpc_server_start(server), RK_OK);
    struct rk_rpc_channel *channel = channel_to(rk_rpc_server_port(server));
    /* One that brings its own keeps it: were it cut to 50 ms, it would end early. */
    struct rk_error error = {0};
    int64_t begin = rk_clock_ns();
    assert_int_equal(ask(channel, ECHO_HANG, 200, &error), RK_ERR_DEADLINE);
    assert_true(rk_clock_ns() - begin >= 190 * 1000000ll);
    rk_rpc_channel_destroy(channel);
    rk_rpc_server_destroy(server);
}

static void *stop_later(void *context)
{
    rk_rpc_server_stop(context, LONG_MS);
    return NULL;
}

static void stop_cancels_running_calls(void **state)
{
    (void)state;
    struct echo_service service = {0};
    struct rk_rpc_server *server = server_start(&service, 4, "127.0.0.1:0");
    int port = rk_rpc_server_port(server);
    struct rk_rpc_channel *channel = channel_to(port);
    struct rk_rpc_stream *streams[4];
    for (int i = 0; i < 4; i++) {
        assert_int_equal(rk_rpc_stream_open(channel, ECHO_HANG, LONG_MS, &streams[i], NULL), RK_OK);
    }
    wait_for(&service.running, 4);
    rk_rpc_server_stop(server, 20);
    assert_int_equal(atomic_load(&service.running), 0);
    assert_int_equal(atomic_load(&service.cancelled), 4);
    for (int i = 0; i < 4; i++) {
        assert_int_not_equal(rk_rpc_stream_finish(streams[i], NULL), RK_OK);
        rk_rpc_stream_destroy(streams[i]);
    }
    struct rk_error error = {0};
    assert_int_equal(ask(channel, ECHO_UNARY, LONG_MS, &error), RK_ERR_UNAVAILABLE);
    rk_rpc_server_stop(server, 20); /* Twice does no harm. */
    rk_rpc_server_destroy(server);
    rk_rpc_channel_destroy(channel);
}

/* With time to spare, a call under way ends well. */
static void stop_waits_for_running_calls(void **state)
{
    (void)state;
    struct echo_service service = {0};
    struct rk_rpc_server *server = server_start(&service, 4, "127.0.0.1:0");
    struct rk_rpc_channel *channel = channel_to(rk_rpc_server_port(server));
    struct rk_rpc_stream *stream = NULL;
    Redknot__V1__TokenizeRequest request = REDKNOT__V1__TOKENIZE_REQUEST__INIT;
    request.text = (char *)(uintptr_t) "last";
    assert_int_equal(rk_rpc_stream_open(channel, ECHO_BIDI, LONG_MS, &stream, NULL), RK_OK);
    struct ProtobufCMessage *message = NULL;
    assert_int_equal(rk_rpc_stream_send(stream, &request.base), RK_OK);
    assert_int_equal(rk_rpc_stream_recv(stream, &redknot__v1__tokenize_reply__descriptor, &message),
                     RK_OK);
    rk_rpc_message_free(message);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, stop_later, server), 0);
    rk_clock_sleep_ms(20);
    assert_int_equal(rk_rpc_stream_send(stream, &request.base), RK_OK);
    assert_int_equal(rk_rpc_stream_recv(stream, &redknot__v1__tokenize_reply__descriptor, &message),
                     RK_OK);
    rk_rpc_message_free(message);
    assert_int_equal(rk_rpc_stream_send_done(stream), RK_OK);
    assert_int_equal(rk_rpc_stream_finish(stream, NULL), RK_OK);
    rk_rpc_stream_destroy(stream);
    pthread_join(thread, NULL);
    rk_rpc_server_destroy(server);
    rk_rpc_channel_destroy(channel);
}

static pid_t peer_start(const char *address, int *ret_port)
{
    char path[] = REDKNOT_BINARY_DIR "/tests/rpc_peer";
    char *argv[] = {path, (char *)(uintptr_t)address, NULL};
    int out[2];
    assert_int_equal(pipe(out), 0);
    int in[2];
    assert_int_equal(pipe2(in, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    posix_spawn_file_actions_addclose(&actions, out[0]);
    posix_spawn_file_actions_addclose(&actions, out[1]);
    pid_t pid = 0;
    assert_int_equal(posix_spawn(&pid, path, &actions, NULL, argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    (void)close(out[1]);
    (void)close(in[0]);
    FILE *lines = fdopen(out[0], "r");
    char line[32] = "";
    assert_non_null(fgets(line, sizeof(line), lines));
    (void)fclose(lines);
    *ret_port = (int)strtol(line, NULL, 10);
    assert_in_range(*ret_port, 1, UINT16_MAX);
    /* The write end of its stdin stays open until this process ends. */
    return pid;
}

static void count_release(void *context)
{
    atomic_fetch_add((atomic_int *)context, 1);
}

static void peer_killed_is_noticed_and_found_again(void **state)
{
    (void)state;
    int port = 0;
    pid_t pid = peer_start("127.0.0.1:0", &port);
    struct rk_rpc_channel *channel = channel_to(port);
    assert_int_equal(ask(channel, ECHO_UNARY, LONG_MS, NULL), RK_OK);

    /* One call that waits, one that sends until it cannot. */
    struct rk_rpc_stream *waiting = NULL;
    struct rk_rpc_stream *sending = NULL;
    assert_int_equal(rk_rpc_stream_open(channel, ECHO_HANG, LONG_MS, &waiting, NULL), RK_OK);
    assert_int_equal(rk_rpc_stream_open(channel, ECHO_HANG, LONG_MS, &sending, NULL), RK_OK);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    static const uint8_t payload[1 << 20];
    struct rk_rpc_part part = {payload, sizeof(payload)};
    atomic_int released = 0;
    int sent = 0;
    enum rk_status status = RK_OK;
    while (status == RK_OK) {
        status = rk_rpc_stream_send_parts(sending, &part, 1, count_release, &released);
        sent++;
    }
    assert_int_equal(status, RK_ERR_UNAVAILABLE);
    assert_int_equal(rk_rpc_stream_finish(sending, NULL), RK_ERR_UNAVAILABLE);
    assert_int_equal(rk_rpc_stream_finish(waiting, NULL), RK_ERR_UNAVAILABLE);
    rk_rpc_stream_destroy(sending);
    rk_rpc_stream_destroy(waiting);
    wait_for(&released, sent);
    assert_int_equal(ask(channel, ECHO_UNARY, LONG_MS, NULL), RK_ERR_UNAVAILABLE);

    char address[64];
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", port);
    pid = peer_start(address, &port);
    int64_t deadline = rk_deadline_in_ms(LONG_MS);
    do {
        rk_clock_sleep_ms(20);
        status = ask(channel, ECHO_UNARY, LONG_MS, NULL);
    } while (status == RK_ERR_UNAVAILABLE && rk_deadline_left_ms(deadline) > 0);
    assert_int_equal(status, RK_OK);
    rk_rpc_channel_destroy(channel);
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

/* A peer that was replaced while nobody called: the next call must not be sent to the dead. */
static void an_idle_channel_finds_a_restarted_peer(void **state)
{
    char address[64];
    int port = 0;
    (void)state;
    pid_t pid = peer_start("127.0.0.1:0", &port); /* Not here: our own server would poll for us. */
    struct rk_rpc_channel *channels[3];
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", port);
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < 3; i++) {
            channels[i] = channel_to(port);
            assert_int_equal(ask(channels[i], ECHO_UNARY, LONG_MS, NULL), RK_OK);
        }
        assert_int_equal(kill(pid, SIGKILL), 0);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        pid = peer_start(address, &port);
        rk_clock_sleep_ms(50); /* Idle, not in use a moment ago. */
        for (int i = 0; i < 3; i++) {
            assert_int_equal(ask(channels[i], ECHO_UNARY, LONG_MS, NULL), RK_OK);
            rk_rpc_channel_destroy(channels[i]);
        }
    }
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_null(getenv("GRPC_CLIENT_CHANNEL_BACKUP_POLL_INTERVAL_MS")); /* Not ours to write. */
}

/* Without a descriptor for the connection nothing is known of the peer. */
static void want_of_descriptors_is_no_word_about_the_peer(void **state)
{
    struct echo_service service = {0};
    struct rk_error error = {.text = ""};
    struct rlimit before;
    int held[64];
    int num = 0;
    (void)state;
    struct rk_rpc_server *server = server_start(&service, 2, "127.0.0.1:0");
    struct rk_rpc_channel *channel = channel_to(rk_rpc_server_port(server));
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    struct rlimit few = {.rlim_cur = 64, .rlim_max = before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    while (num < 64 && (held[num] = dup(STDERR_FILENO)) >= 0) {
        num++;
    }
    enum rk_status status = ask(channel, ECHO_UNARY, 2000, &error);
    while (num > 0) {
        close(held[--num]);
    }
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    if (status != RK_ERR_NO_MEMORY) {
        fail_msg("%s: %s", rk_status_name(status), error.text);
    }
    assert_false(error.answered);
    int64_t deadline_ns = rk_deadline_in_ms(5000);
    while (ask(channel, ECHO_UNARY, LONG_MS, NULL) != RK_OK &&
           rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(20);
    }
    assert_int_equal(ask(channel, ECHO_UNARY, LONG_MS, NULL), RK_OK);
    rk_rpc_channel_destroy(channel);
    rk_rpc_server_destroy(server);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(port_in_use_is_named),
        cmocka_unit_test(wrong_addresses_are_named),
        cmocka_unit_test(creation_survives_each_failed_allocation),
        cmocka_unit_test(calls_over_the_maximum_are_refused_at_once),
        cmocka_unit_test(a_finished_call_makes_room),
        cmocka_unit_test(calls_without_deadline_get_the_default),
        cmocka_unit_test(stop_cancels_running_calls),
        cmocka_unit_test(stop_waits_for_running_calls),
        cmocka_unit_test(peer_killed_is_noticed_and_found_again),
        cmocka_unit_test(an_idle_channel_finds_a_restarted_peer),
        cmocka_unit_test(want_of_descriptors_is_no_word_about_the_peer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
