/*
 * Goal:   a listener takes connections whatever came before: strangers, more than it may have, an
 *         exhausted process, a socket that failed; it says when it takes none, and logs seldom.
 * Method: real sockets on loopback; children with few descriptors; the callback keeps or closes.
 */
#include "common/listen/listen.h"

#include "common/base/address.h"
#include "common/base/clock.h"
#include "common/base/descriptors.h"
#include "common/base/health.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define KEPT_MAX 2048

struct taker {
    atomic_int taken;
    int fds[KEPT_MAX];
};

static void keep(void *context, int fd, const struct sockaddr *peer, size_t peer_bytes)
{
    struct taker *taker = context;
    assert_true(peer->sa_family == AF_INET && peer_bytes == sizeof(struct sockaddr_in));
    assert_true(fcntl(fd, F_GETFL) & O_NONBLOCK);
    taker->fds[atomic_load(&taker->taken)] = fd;
    atomic_fetch_add(&taker->taken, 1);
}

static void let_go(struct taker *taker)
{
    for (int i = 0; i < atomic_load(&taker->taken); i++) {
        close(taker->fds[i]);
    }
    atomic_store(&taker->taken, 0);
}

static struct rk_listener *start(struct rk_listener_options options, struct taker *taker)
{
    struct rk_listener *listener = NULL;
    struct rk_error error = {0};
    options.name = "test";
    options.address = options.address ? options.address : "127.0.0.1:0";
    options.on_socket = keep;
    options.context = taker;
    if (rk_listener_create(&options, &listener, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    assert_int_equal(rk_listener_start(listener), RK_OK);
    return listener;
}

static int dial(const struct rk_listener *listener, const char *say)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)rk_listener_port(listener))};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
    if (say) {
        (void)send(fd, say, strlen(say), MSG_NOSIGNAL);
    }
    return fd;
}

static bool wait_taken(struct taker *taker, int count, int timeout_ms)
{
    int64_t deadline_ns = rk_deadline_in_ms(timeout_ms);
    while (atomic_load(&taker->taken) < count && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(1);
    }
    return atomic_load(&taker->taken) == count;
}

/* Whether the other side ended it within the time. */
static bool ended(int fd, int timeout_ms)
{
    struct timeval limit = {.tv_sec = timeout_ms / 1000, .tv_usec = timeout_ms % 1000 * 1000};
    char byte;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    ssize_t got = recv(fd, &byte, 1, 0);
    return got == 0 || (got < 0 && errno != EAGAIN);
}

static void hands_over_who_speaks_the_protocol(void **state)
{
    static struct taker taker;
    (void)state;
    struct rk_listener *listener =
        start((struct rk_listener_options){.preface = "PRI * HTTP/2.0", .preface_timeout_ms = 300},
              &taker);
    int silent = dial(listener, NULL);
    int half = dial(listener, "PRI *");
    int other = dial(listener, "GET / HTTP/1.1\r\n\r\n");
    int good = dial(listener, "PRI * HTTP/2.0\r\n\r\n");
    assert_true(wait_taken(&taker, 1, 2000));
    assert_true(ended(other, 200));
    assert_false(ended(silent, 50)); /* It has its time. */
    assert_true(send(half, " HTTP/2.0", 9, MSG_NOSIGNAL) == 9);
    assert_true(wait_taken(&taker, 2, 2000));
    assert_true(ended(silent, 2000));
    char first[32];
    assert_int_equal(recv(taker.fds[0], first, sizeof(first), 0), 18); /* Nothing was eaten. */
    close(silent), close(half), close(other), close(good);
    let_go(&taker);
    rk_listener_destroy(listener);
}

static void strangers_keep_nobody_out(void **state)
{
    static struct taker taker;
    int silent[100];
    (void)state;
    struct rk_listener *listener =
        start((struct rk_listener_options){.pending_max = 8, .connections_max = 10}, &taker);
    for (int i = 0; i < 100; i++) {
        silent[i] = dial(listener, NULL);
    }
    int good = dial(listener, "x");
    assert_true(wait_taken(&taker, 1, 2000));
    int still_there = 0;
    for (int i = 0; i < 100; i++) {
        still_there += !ended(silent[i], 1);
        close(silent[i]);
    }
    assert_true(still_there <= 8);
    close(good);
    let_go(&taker);
    rk_listener_destroy(listener);
}

static void connections_are_bounded_and_come_back(void **state)
{
    static struct taker taker;
    int fds[5];
    char text[512];
    (void)state;
    struct rk_listener *listener =
        start((struct rk_listener_options){.connections_max = 4}, &taker);
    for (int i = 0; i < 4; i++) {
        fds[i] = dial(listener, "x");
        assert_true(wait_taken(&taker, i + 1, 2000));
    }
    assert_true(rk_health_ask(text, sizeof(text)));
    fds[4] = dial(listener, "x");
    assert_true(ended(fds[4], 2000));
    assert_false(rk_health_ask(text, sizeof(text)));
    assert_non_null(strstr(text, "test: no connections are taken at 127.0.0.1:0: as many"));
    close(taker.fds[3]); /* Its owner says nothing: the listener finds out. */
    atomic_store(&taker.taken, 3);
    close(fds[4]);
    rk_clock_sleep_ms(50);
    fds[4] = dial(listener, "x");
    assert_true(wait_taken(&taker, 4, 2000));
    let_go(&taker);
    int64_t deadline_ns = rk_deadline_in_ms(3000); /* Health too, though nobody asks to connect. */
    while (!rk_health_ask(text, sizeof(text)) && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(10);
    }
    assert_true(rk_health_ask(text, sizeof(text)));
    for (int i = 0; i < 5; i++) {
        close(fds[i]);
    }
    rk_listener_destroy(listener);
    assert_true(rk_health_ask(text, sizeof(text)));
}

/* ---- Descriptors ---- */

static void dialler(int port, int count, bool speak, int ready, int release)
{
    static int fds[KEPT_MAX];
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)port)};
    char byte = 0;
    rk_descriptors_raise();
    for (int i = 0; i < count; i++) {
        fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fds[i] < 0 ||
            connect(fds[i], (const struct sockaddr *)&address, sizeof(address)) != 0) {
            _exit(2);
        }
        if (speak) {
            (void)send(fds[i], "x", 1, MSG_NOSIGNAL);
        }
    }
    (void)!write(ready, &byte, 1);
    (void)!read(release, &byte, 1);
    _exit(0);
}

/* `count` connections at a limit of `descriptors`, then none: is a fresh one taken, and how many
 * lines were logged? */
static void exhausted(rlim_t descriptors, int count, bool speak)
{
    static struct taker taker;
    struct rlimit limit;
    int ready[2];
    int release[2];
    int lines[2];
    char text[512];
    char byte = 0;
    struct rk_listener *listener = start((struct rk_listener_options){0}, &taker);
    assert_int_equal(pipe(ready), 0);
    assert_int_equal(pipe(release), 0);
    assert_int_equal(pipe2(lines, O_NONBLOCK), 0);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = descriptors;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) { /* It raises its own limit again. */
        close(release[1]);
        dialler(rk_listener_port(listener), count, speak, ready[1], release[0]);
    }
    int errors = dup(STDERR_FILENO);
    (void)dup2(lines[1], STDERR_FILENO);
    assert_int_equal(read(ready[0], &byte, 1), 1);
    rk_clock_sleep_ms(100);
    /* The reserve is there, and it says so. */
    int own = dup(errors);
    assert_true(own >= 0);
    close(own);
    assert_int_equal(rk_health_ask(text, sizeof(text)), !speak);
    assert_int_equal(write(release[1], &byte, 1), 1);
    assert_int_equal(waitpid(child, NULL, 0), child);
    let_go(&taker);
    int fd = dial(listener, "x");
    bool served = wait_taken(&taker, 1, 1000);
    limit.rlim_cur = limit.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    (void)dup2(errors, STDERR_FILENO);
    static char logged[1 << 16];
    ssize_t bytes = read(lines[0], logged, sizeof(logged) - 1);
    logged[bytes > 0 ? bytes : 0] = '\0';
    int num_lines = 0;
    for (const char *p = logged; *p; p++) {
        num_lines += *p == '\n';
    }
    assert_true(served);
    assert_true(num_lines <= 3);
    close(fd), close(errors), close(ready[0]), close(ready[1]), close(release[0]),
        close(release[1]), close(lines[0]), close(lines[1]);
    let_go(&taker);
    rk_listener_destroy(listener);
}

static void an_exhausted_process_accepts_again(void **state)
{
    (void)state;
    exhausted(1024, 1100, true);
    exhausted(64, 200, true);
    exhausted(64, 200, false); /* Who says nothing does not even exhaust it. */
}

static void without_any_descriptor_it_lives(void **state)
{
    static struct taker taker;
    static int all[256];
    struct rlimit limit;
    struct rlimit few;
    int num = 0;
    (void)state;
    struct rk_listener *listener = start((struct rk_listener_options){0}, &taker);
    int early = dial(listener, "x"); /* so that it has its spare */
    assert_true(wait_taken(&taker, 1, 2000));
    int late = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    few = limit;
    few.rlim_cur = 64;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    while ((all[num] = dup(STDERR_FILENO)) >= 0) {
        num++;
    }
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)rk_listener_port(listener))};
    assert_int_equal(connect(late, (const struct sockaddr *)&address, sizeof(address)), 0);
    assert_true(ended(late, 2000)); /* The spare took it. */
    while (num > 0) {
        close(all[--num]);
    }
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    int again = dial(listener, "x");
    assert_true(wait_taken(&taker, 2, 2000));
    close(early), close(late), close(again);
    let_go(&taker);
    rk_listener_destroy(listener);
}

/* A listening socket that is none any more; nobody knows which descriptor it is, so all of the
 * listening ones are ended. */
static void a_failed_socket_is_opened_again(void **state)
{
    static struct taker taker;
    (void)state;
    struct rk_listener *listener = start((struct rk_listener_options){0}, &taker);
    int port = rk_listener_port(listener);
    for (int fd = 3; fd < 64; fd++) {
        int listening = 0;
        socklen_t bytes = sizeof(listening);
        if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &bytes) == 0 && listening) {
            assert_int_equal(shutdown(fd, SHUT_RDWR), 0);
        }
    }
    int64_t deadline_ns = rk_deadline_in_ms(3000);
    int fd = -1;
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)port)};
    do {
        rk_clock_sleep_ms(10);
        close(fd);
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    } while (connect(fd, (const struct sockaddr *)&address, sizeof(address)) != 0 &&
             rk_deadline_left_ms(deadline_ns) > 0);
    assert_int_equal(send(fd, "x", 1, MSG_NOSIGNAL), 1);
    assert_true(wait_taken(&taker, 1, 2000));
    close(fd);
    let_go(&taker);
    rk_listener_destroy(listener);
}

static void a_port_in_use_is_waited_for(void **state)
{
    static struct taker taker;
    char address[RK_ADDRESS_BYTES];
    struct rk_listener *second = NULL;
    struct rk_error error = {0};
    (void)state;
    struct rk_listener *first = start((struct rk_listener_options){0}, &taker);
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", rk_listener_port(first));
    struct rk_listener_options options = {
        .name = "second", .address = address, .on_socket = keep, .context = &taker};
    assert_int_equal(rk_listener_create(&options, &second, &error), RK_ERR_IO);
    assert_non_null(strstr(error.text, "in use"));
    options.bind_wait_ms = 150;
    int64_t begin_ns = rk_clock_ns();
    assert_int_equal(rk_listener_create(&options, &second, &error), RK_ERR_IO);
    assert_true(rk_clock_ns() - begin_ns >= 150 * 1000000);
    rk_listener_destroy(first);
    assert_int_equal(rk_listener_create(&options, &second, &error), RK_OK);
    rk_listener_destroy(second);
    options.address = "[::1]:0";
    if (rk_listener_create(&options, &second, &error) == RK_OK) { /* A machine may lack IPv6. */
        assert_true(rk_listener_port(second) > 0);
        rk_listener_destroy(second);
    }
    options.address = "127.0.0.1:99999";
    assert_int_equal(rk_listener_create(&options, &second, &error), RK_ERR_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hands_over_who_speaks_the_protocol),
        cmocka_unit_test(strangers_keep_nobody_out),
        cmocka_unit_test(connections_are_bounded_and_come_back),
        cmocka_unit_test(an_exhausted_process_accepts_again),
        cmocka_unit_test(without_any_descriptor_it_lives),
        cmocka_unit_test(a_failed_socket_is_opened_again),
        cmocka_unit_test(a_port_in_use_is_waited_for),
    };
    rk_descriptors_raise();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
