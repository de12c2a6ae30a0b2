/*
 * Goal:   the descriptor limit costs a daemon nothing lasting: flooded with more connections than
 * it may have, it serves within 5 s of their end, and says in between that it takes none; with too
 * few descriptors or too little memory to start, one line says so at once. Method: coordinator,
 * store and worker under limits that cannot be raised; a process of its own opens the connections,
 * silent ones and ones that speak HTTP/2; a clock.
 */
#include "tests/e2e/cluster.h"

#include "common/base/clock.h"
#include "common/base/descriptors.h"
#include "common/rpc/rpc.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define FLOOD        1100
#define SERVED_IN_MS 5000

/* ---- The process that floods: it has descriptors ---- */

struct order {
    char address[32]; /* "" ends it */
    bool speak;       /* HTTP/2's preface and an empty SETTINGS frame */
};

static int orders[2]; /* written by the test */
static int answers[2];
static pid_t flooder;

static int dial(const char *text)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port =
                                      htons((uint16_t)strtoul(strrchr(text, ':') + 1, NULL, 10))};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (const struct sockaddr *)&address, sizeof(address)) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static void flood_main(void)
{
    static const char hello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0";
    static int fds[FLOOD];
    struct order order;
    while (read(orders[0], &order, sizeof(order)) == sizeof(order) && order.address[0]) {
        for (int i = 0; i < FLOOD; i++) {
            fds[i] = dial(order.address);
            if (fds[i] >= 0 && order.speak) {
                (void)send(fds[i], hello, sizeof(hello), MSG_NOSIGNAL); /* NUL: last of SETTINGS */
            }
        }
        char byte = 0;
        if (write(answers[1], &byte, 1) != 1 || read(orders[0], &order, sizeof(order)) <= 0) {
            _exit(1);
        }
        for (int i = 0; i < FLOOD; i++) {
            close(fds[i]);
        }
        if (write(answers[1], &byte, 1) != 1) {
            _exit(1);
        }
    }
    _exit(0);
}

static void tell(const char *address, bool speak)
{
    struct order order = {.speak = speak};
    char byte = 0;
    (void)snprintf(order.address, sizeof(order.address), "%s", address);
    assert_int_equal(write(orders[1], &order, sizeof(order)), sizeof(order));
    assert_int_equal(read(answers[0], &byte, 1), 1);
}

static int flooder_start(void **state)
{
    (void)state;
    rk_descriptors_raise();
    assert_int_equal(pipe(orders), 0);
    assert_int_equal(pipe(answers), 0);
    flooder = fork();
    assert_true(flooder >= 0);
    if (flooder == 0) {
        close(orders[1]);
        flood_main();
    }
    return 0;
}

static int flooder_stop(void **state)
{
    (void)state;
    close(orders[1]);
    return waitpid(flooder, NULL, 0) == flooder ? 0 : -1;
}

/* ---- Serving ---- */

/* The first line of what /healthz answers says 200 or 503. */
static int health_of(const char *address)
{
    static const char request[] = "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    char reply[64] = "";
    int fd = dial(address);
    if (fd < 0) {
        return 0;
    }
    (void)send(fd, request, sizeof(request) - 1, MSG_NOSIGNAL);
    ssize_t bytes = recv(fd, reply, sizeof(reply) - 1, MSG_WAITALL);
    close(fd);
    return bytes > 12 ? (int)strtol(reply + 9, NULL, 10) : 0;
}

/* The listener's thread takes what waits in the kernel, and looks around once a second. */
static void becomes(const char *metrics, int code)
{
    int64_t deadline_ns = rk_deadline_in_ms(3000);
    while (health_of(metrics) != code && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(20);
    }
    assert_int_equal(health_of(metrics), code);
}

/* A put of fresh text, which the worker computes, places at the coordinator and writes to the
 * store; with a client of its own, so over connections of its own. */
static bool put_works(const struct cluster *cluster)
{
    static int number;
    char text[64];
    struct rk_client *client = cluster_client(cluster, 0);
    struct rk_put_result result;
    struct rk_error error = {.text = ""};
    (void)snprintf(text, sizeof(text), "Text number %d of the test.", number++);
    struct rk_segment_input segment = {.text = text};
    enum rk_status status =
        rk_client_put_segment(client, &segment, NULL, 0, NULL, NULL, &result, &error);
    rk_client_destroy(client);
    if (status != RK_OK) {
        print_message("put: %s\n", error.text);
    }
    return status == RK_OK;
}

static bool status_works(const struct cluster *cluster)
{
    struct rk_client *client = cluster_client(cluster, -1);
    struct rk_cluster_status all;
    struct rk_error error = {.text = ""};
    enum rk_status status = rk_client_status(client, 0, &all, &error);
    if (status == RK_OK) {
        rk_cluster_status_clear(&all);
    }
    rk_client_destroy(client);
    return status == RK_OK;
}

static void floods_are_survived(struct cluster *cluster, bool speak)
{
    const struct {
        const char *address;
        const char *metrics;
    } daemons[] = {
        {cluster->coordinator_address, cluster->coordinator_metrics},
        {cluster->store_address, cluster->store_metrics},
        {cluster->worker_addresses[0], cluster->worker_metrics[0]},
    };
    for (size_t i = 0; i < sizeof(daemons) / sizeof(daemons[0]); i++) {
        assert_int_equal(health_of(daemons[i].metrics), 200);
        tell(daemons[i].address, speak);
        if (!speak) { /* Who says nothing keeps nobody out. */
            assert_true(put_works(cluster) && status_works(cluster));
        } else {
            becomes(daemons[i].metrics, 503);
        }
        tell(daemons[i].address, false); /* they end */
        int64_t begin_ns = rk_clock_ns();
        bool served = false;
        while (!served && rk_clock_ns() - begin_ns < SERVED_IN_MS * INT64_C(1000000)) {
            served = put_works(cluster) && status_works(cluster);
        }
        print_message("%s: served %lld ms after the flood\n", daemons[i].address,
                      (long long)((rk_clock_ns() - begin_ns) / 1000000));
        assert_true(served);
        becomes(daemons[i].metrics, 200);
    }
}

/* Soft and hard limit of the daemons; the test's own come back where that is allowed. */
static void flooded_at(rlim_t descriptors)
{
    static struct cluster cluster;
    struct rlimit before;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    struct rlimit limit = {.rlim_cur = descriptors, .rlim_max = descriptors};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    cluster_start(&cluster, &(struct cluster_options){.num_workers = 1, .dram = "128MiB"});
    if (setrlimit(RLIMIT_NOFILE, &before) != 0) {
        print_message("not privileged: the test itself stays at %u descriptors\n",
                      rk_descriptors_limit());
    }
    floods_are_survived(&cluster, false);
    floods_are_survived(&cluster, true);
    cluster_stop(&cluster);
}

static void a_flood_at_1024_descriptors(void **state)
{
    (void)state;
    flooded_at(1024);
}

static void a_flood_at_64_descriptors(void **state)
{
    (void)state;
    flooded_at(64);
}

/* ---- Messages ---- */

static long peak_mib(pid_t pid)
{
    return (long)(process_field(pid, "VmHWM:", 10) >> 10);
}

static void nothing(void *context)
{
    (void)context;
}

/* 60 MiB of empty messages in a list; unpacked they were 3 to 5 GiB. */
static void big_messages_cost_what_they_are(void **state)
{
    enum { BYTES = 60 << 20, HEAD = 8 };
    static struct cluster cluster;
    (void)state;
    cluster_start(&cluster, &(struct cluster_options){.dram = "128MiB"});
    const struct {
        const char *address;
        pid_t pid;
        const char *path;
        uint8_t pair[2];
        bool inside; /* of field 1 */
    } rows[] = {
        {cluster.coordinator_address,
         cluster.coordinator.pid,
         "/redknot.v1.Coordinator/Announce",
         {3 << 3 | 2, 0},
         false},
        {cluster.coordinator_address,
         cluster.coordinator.pid,
         "/redknot.v1.Coordinator/Heartbeat",
         {4 << 3 | 2, 0},
         false},
        {cluster.store_address,
         cluster.store.pid,
         "/redknot.v1.KvStore/Put",
         {1 << 3 | 2, 0},
         true},
    };
    uint8_t *packed = malloc(BYTES);
    assert_non_null(packed);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct rk_rpc_channel *channel = NULL;
        struct rk_rpc_stream *stream = NULL;
        struct rk_rpc_part part = {.data = packed, .bytes = BYTES};
        size_t begin = rows[i].inside ? HEAD : 0;
        long before = peak_mib(rows[i].pid);
        for (size_t at = begin; at < BYTES; at += 2) {
            memcpy(packed + at, rows[i].pair, 2);
        }
        if (rows[i].inside) { /* tag, and the length in seven bytes */
            packed[0] = 1 << 3 | 2;
            for (int j = 0; j < 7; j++) {
                packed[1 + j] =
                    (uint8_t)(((size_t)(BYTES - HEAD) >> (7 * j) & 0x7f) | (j < 6 ? 0x80 : 0));
            }
        }
        assert_int_equal(rk_rpc_channel_create(rows[i].address, &channel, NULL), RK_OK);
        assert_int_equal(rk_rpc_stream_open(channel, rows[i].path, 20000, &stream, NULL), RK_OK);
        assert_int_equal(rk_rpc_stream_send_parts(stream, &part, 1, nothing, NULL), RK_OK);
        enum rk_status told = rk_rpc_stream_send_done(stream);
        (void)told; /* It may be over already. */
        struct ProtobufCMessage *reply = NULL;
        assert_int_not_equal(
            rk_rpc_stream_recv(stream, &redknot__v1__put_reply__descriptor, &reply), RK_OK);
        assert_int_equal(rk_rpc_stream_finish(stream, NULL), RK_ERR_TOO_LONG);
        rk_rpc_stream_destroy(stream);
        rk_rpc_channel_destroy(channel);
        long after = peak_mib(rows[i].pid);
        print_message("%s: peak %ld MiB, before %ld\n", rows[i].path, after, before);
#ifndef REDKNOT_SANITIZED
        assert_true(after < 300);
#endif
    }
    free(packed);
    cluster_stop(&cluster);
}

/* ---- Too little to start ---- */

static void too_little_is_said_at_once(void **state)
{
    static const struct {
        const char *limit;
        const char *contains;
    } limits[] = {
        {"-n 24", "may open 24 files, and needs 48"},
#ifndef REDKNOT_SANITIZED /* Their shadow memory needs terabytes. */
        {"-v 300000", "may map 292 MiB of memory, and needs "},
#endif
    };
    static const char *const daemons[] = {"redknot-coordinator --data /tmp/none",
                                          "redknot-kvstore --dram 16MiB",
                                          "redknot-worker --model /dev/null"};
    const size_t num_daemons = sizeof(daemons) / sizeof(daemons[0]);
    (void)state;
    for (size_t i = 0; i < num_daemons * sizeof(limits) / sizeof(limits[0]); i++) {
        char line[512];
        char output[1024];
        const char *contains = limits[i / num_daemons].contains;
        (void)snprintf(line, sizeof(line),
                       "ulimit %s; exec 2>&1; exec timeout 10 " REDKNOT_BINARY_DIR
                       "/bin/%s --listen 127.0.0.1:0 --metrics ''",
                       limits[i / num_daemons].limit, daemons[i % num_daemons]);
        int64_t begin_ns = rk_clock_ns();
        FILE *pipe_ = popen(line, "r");
        assert_non_null(pipe_);
        output[fread(output, 1, sizeof(output) - 1, pipe_)] = '\0';
        int status = pclose(pipe_);
        if (!strstr(output, contains) || WEXITSTATUS(status) != 1 ||
            strchr(output, '\n') != output + strlen(output) - 1) {
            fail_msg("%s: exit %d: %s", line, WEXITSTATUS(status), output);
        }
        assert_true(rk_clock_ns() - begin_ns < 1000 * INT64_C(1000000));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(too_little_is_said_at_once),
        cmocka_unit_test(big_messages_cost_what_they_are),
        cmocka_unit_test(a_flood_at_1024_descriptors),
        cmocka_unit_test(a_flood_at_64_descriptors),
    };
    return cmocka_run_group_tests(tests, flooder_start, flooder_stop);
}
