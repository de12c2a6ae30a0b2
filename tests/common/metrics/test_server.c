/*
 * Goal:   the server answers as Prometheus expects, on its own address only, and
 *         neither strange requests nor too many of them harm it.
 * Method: raw HTTP over a loopback socket; the text also goes through "promtool
 *         check metrics" where it is installed.
 */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/metrics/metrics.h"
#include "tests/support/skip.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

static struct rk_metrics_server *server;

static int start(void **state)
{
    struct rk_error error = {0};
    (void)state;
    if (rk_metrics_server_start("127.0.0.1:0", &server, &error) != RK_OK) {
        print_error("%s\n", error.text);
        return -1;
    }
    return 0;
}

static int stop(void **state)
{
    (void)state;
    rk_metrics_server_stop(server);
    rk_metrics_server_stop(NULL);
    return 0;
}

static int connect_to(const char *host)
{
    struct timeval limit = {.tv_sec = 30};
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)rk_metrics_server_port(server))};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(inet_pton(AF_INET, host, &address.sin_addr), 1);
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)), 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* The whole answer; the request must ask for the connection to be closed. */
static char *ask(const char *request)
{
    static char answer[1 << 20];
    size_t used = 0;
    ssize_t got = 0;
    int fd = connect_to("127.0.0.1");
    assert_true(fd >= 0);
    assert_int_equal(send(fd, request, strlen(request), MSG_NOSIGNAL), strlen(request));
    while ((got = recv(fd, answer + used, sizeof(answer) - 1 - used, 0)) > 0) {
        used += (size_t)got;
    }
    close(fd);
    answer[used] = '\0';
    return answer;
}

#define TAIL " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

static void expect_status(const char *request, const char *status)
{
    const char *answer = ask(request);
    if (strncmp(answer, "HTTP/1.1 ", 9) != 0 || strncmp(answer + 9, status, 3) != 0) {
        fail_msg("not %s: %s", status, answer);
    }
}

static void metrics_are_served(void **state)
{
    (void)state;
    rk_metric_add(rk_metric_counter("test_served_total", "Served.", "a=\"b\""), 4);
    const char *answer = ask("GET /metrics" TAIL);
    assert_ptr_equal(strstr(answer, "HTTP/1.1 200"), answer);
    assert_non_null(strstr(answer, "\r\nContent-Type: text/plain; version=0.0.4"));
    assert_non_null(strstr(answer, "\ntest_served_total{a=\"b\"} 4\n"));
    assert_non_null(strstr(answer, "\nredknot_build_info{version=\"" REDKNOT_VERSION "\"} 1\n"));
    assert_non_null(ask("GET /metrics?x=y" TAIL));
    expect_status("GET /metrics?x=y" TAIL, "200");
}

static double shown(const char *name)
{
    char line[128];
    (void)snprintf(line, sizeof(line), "\n%s ", name);
    const char *found = strstr(ask("GET /metrics" TAIL), line);
    assert_non_null(found);
    return strtod(found + strlen(line), NULL);
}

static void process_values_are_true(void **state)
{
    (void)state;
    double now = (double)time(NULL);
    double started = shown("process_start_time_seconds");
    assert_true(started > now - 3600 && started <= now + 2);
    assert_true(shown("process_resident_memory_bytes") > 100000);

    double files = shown("process_open_fds");
    int more[3];
    for (int i = 0; i < 3; i++) {
        more[i] = dup(STDERR_FILENO);
        assert_true(more[i] >= 0);
    }
    /* The connections of asking come and go on the server's side: at most one each way. */
    double files_after = shown("process_open_fds");
    assert_true(files_after >= files + 2 && files_after <= files + 4);
    for (int i = 0; i < 3; i++) {
        close(more[i]);
    }

    double cpu = shown("process_cpu_seconds_total");
    clock_t until = clock() + CLOCKS_PER_SEC / 20;
    while (clock() < until) {
    }
    assert_true(shown("process_cpu_seconds_total") >= cpu + 0.04);
}

static void other_requests_are_refused(void **state)
{
    (void)state;
    expect_status("GET /healthz" TAIL, "200");
    expect_status("HEAD /healthz" TAIL, "200");
    expect_status("GET /" TAIL, "404");
    expect_status("GET /metrics/" TAIL, "404");
    expect_status("GET /../metrics" TAIL, "404");
    expect_status("DELETE /metrics" TAIL, "405");
    expect_status("PUT /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                  "Content-Length: 3\r\n\r\nabc",
                  "405");
    expect_status("POST /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                  "Content-Length: 1000000\r\n\r\n",
                  "405");
    assert_non_null(strstr(ask("POST /metrics" TAIL), "\r\nAllow: GET, HEAD\r\n"));
    (void)ask("\r\n\r\nnonsense\r\n\r\n");
    expect_status("GET /healthz" TAIL, "200"); /* Still there. */
}

/* Over the maximum of 16 callers wait in the kernel's queue, which holds 16 more. */
static void idle_connections_are_bounded(void **state)
{
    int idle[24];
    int first = dup(STDERR_FILENO);
    (void)state;
    assert_true(first >= 0);
    close(first);
    for (int i = 0; i < 24; i++) {
        idle[i] = connect_to("127.0.0.1");
        assert_true(idle[i] >= 0);
    }
    /* Both ends are in this process; an earlier connection or two may still be closing. */
    rk_clock_sleep_ms(100);
    int next = dup(STDERR_FILENO);
    assert_true(next >= 0 && next <= first + 24 + 16 + 2);
    close(next);
    for (int i = 0; i < 24; i++) {
        close(idle[i]);
    }
    expect_status("GET /healthz" TAIL, "200");
}

static void only_the_given_address_listens(void **state)
{
    (void)state;
    int fd = connect_to("127.0.0.2");
    assert_int_equal(fd, -1);
}

static void a_taken_port_is_named(void **state)
{
    char address[32];
    struct rk_metrics_server *second = NULL;
    struct rk_error error = {0};
    (void)state;
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", rk_metrics_server_port(server));
    assert_int_equal(rk_metrics_server_start(address, &second, &error), RK_ERR_IO);
    assert_null(second);
    assert_int_equal(error.status, RK_ERR_IO);
    assert_non_null(strstr(error.text, address));
    assert_non_null(strstr(error.text, "in use"));
}

static void wrong_addresses_are_refused(void **state)
{
    struct rk_metrics_server *second = NULL;
    struct rk_error error = {0};
    (void)state;
    assert_int_equal(rk_metrics_server_start("nonsense", &second, &error), RK_ERR_INVALID);
    assert_int_equal(rk_metrics_server_start(":80", &second, NULL), RK_ERR_INVALID);
    assert_int_equal(rk_metrics_server_start("203.0.113.1:0", &second, &error), RK_ERR_IO);
    assert_non_null(strstr(error.text, "203.0.113.1:0"));
    rk_alloc_fail_after(0);
    assert_int_equal(rk_metrics_server_start("127.0.0.1:0", &second, &error), RK_ERR_NO_MEMORY);
    rk_alloc_fail_after(-1);
    assert_null(second);
}

static void no_memory_is_said(void **state)
{
    (void)state;
    rk_alloc_fail_after(0);
    expect_status("GET /metrics" TAIL, "503");
    rk_alloc_fail_after(-1);
    expect_status("GET /metrics" TAIL, "200");
}

static void promtool_has_no_complaint(void **state)
{
    (void)state;
    if (!test_has_program("promtool")) {
        test_skip("promtool_has_no_complaint", "promtool is not installed (package prometheus)");
    }
    rk_metric_observe(rk_metric_histogram("redknot_test_wait_seconds", "Wait.", "path=\"shm\"",
                                          rk_metric_seconds, rk_metric_seconds_count),
                      0.1);
    rk_metric_add(
        rk_metric_counter("redknot_test_odd_total", "Odd \\ \n \"help\".", "value=\"\\\"\\\\\\n\""),
        1);
    char *text = rk_metrics_text();
    FILE *promtool = popen("promtool check metrics 2>&1", "w");
    assert_non_null(text);
    assert_non_null(promtool);
    assert_true(fputs(text, promtool) >= 0);
    rk_free(text);
    /* promtool exits with 0 only when it has nothing to say. */
    assert_int_equal(pclose(promtool), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(metrics_are_served),
        cmocka_unit_test(process_values_are_true),
        cmocka_unit_test(other_requests_are_refused),
        cmocka_unit_test(idle_connections_are_bounded),
        cmocka_unit_test(only_the_given_address_listens),
        cmocka_unit_test(a_taken_port_is_named),
        cmocka_unit_test(wrong_addresses_are_refused),
        cmocka_unit_test(no_memory_is_said),
        cmocka_unit_test(promtool_has_no_complaint),
    };
    return test_exit_code(cmocka_run_group_tests(tests, start, stop));
}
