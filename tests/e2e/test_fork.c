/*
 * Goal:   a client belongs to the process that made it: in a forked child its calls are refused,
 *         as are new clients, and what the child lets go of does not reach the parent's
 connections;
 *         the parent goes on, and reads its own values only. Clients made after a fork work.
 * Method: a real cluster; over each path a parent with values and a view open forks, and both work
 *         side by side.
 */
#include "client/redknot.h"
#include "client/values.h"
#include "tests/e2e/cluster.h"
#include "tests/e2e/value_bytes.h"

#include "common/base/alloc.h"
#include "common/base/log.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define WAIT_MS     10000
#define VALUE_BYTES 4096
#define ROUNDS      60

static struct cluster cluster;

static struct rk_values *values_open(const char *path)
{
    const struct rk_values_options options = {.coordinator = cluster.coordinator_address,
                                              .path = path};
    struct rk_values *values = NULL;
    return rk_values_create(&options, &values, NULL) == RK_OK ? values : NULL;
}

static struct rk_value_key key_of(unsigned name, char text[32])
{
    int length = snprintf(text, 32, "fork/%u", name);
    return (struct rk_value_key){text, (size_t)length};
}

static bool put_one(struct rk_values *values, unsigned name)
{
    static uint8_t data[VALUE_BYTES];
    char text[32];
    value_fill(name, data, sizeof(data));
    struct rk_value_put put = {.key = key_of(name, text), .data = data, .bytes = sizeof(data)};
    return rk_values_put(values, &put, 1, WAIT_MS, NULL) == RK_OK && put.status == RK_OK;
}

static bool get_one(struct rk_values *values, unsigned name)
{
    static uint8_t data[VALUE_BYTES];
    char text[32];
    struct rk_value_get get = {
        .key = key_of(name, text), .buffer = data, .buffer_bytes = sizeof(data)};
    return rk_values_get(values, &get, 1, WAIT_MS, NULL) == RK_OK && get.status == RK_OK &&
           value_compare(name, data, sizeof(data)) == sizeof(data);
}

static bool refused(enum rk_status status, const struct rk_error *error)
{
    return status == RK_ERR_INVALID && strstr(error->text, "after the fork");
}

/* Each number is a check that failed. */
static int child_main(struct rk_values *values, struct rk_value_views *views,
                      struct rk_client *client, const char *path)
{
    struct rk_error error = {.text = ""};
    char text[32];
    struct rk_value_get get = {.key = key_of(1, text), .buffer = text, .buffer_bytes = 1};
    struct rk_value_put put = {.key = get.key, .data = "x", .bytes = 1};
    struct rk_value_completion completion;
    struct rk_value_views more;
    struct rk_cluster_status status;
    uint64_t id = 0;
    bool flag = false;
    (void)alarm(30); /* A wait without an end shows as a signal. */
    if (!refused(rk_values_get(values, &get, 1, WAIT_MS, &error), &error) ||
        !refused(rk_values_put(values, &put, 1, WAIT_MS, &error), &error) ||
        !refused(rk_values_view(values, &get.key, 1, WAIT_MS, &more, &error), &error) ||
        !refused(rk_values_exists(values, &get.key, 1, WAIT_MS, &flag, &error), &error) ||
        !refused(rk_values_drop(values, &get.key, 1, WAIT_MS, &flag, &error), &error) ||
        !refused(rk_values_submit_get(values, &get, 1, WAIT_MS, &id, &error), &error) ||
        !refused(rk_client_status(client, 0, &status, &error), &error) ||
        rk_values_drain(values, &completion, 1) != 0) {
        return 1;
    }
    rk_values_release(values, views);
    rk_values_destroy(values);
    rk_client_destroy(client);
    const struct rk_values_options options = {.coordinator = cluster.coordinator_address,
                                              .path = path};
    enum rk_status status_of_new = rk_values_create(&options, &values, &error);
    return status_of_new == RK_ERR_UNSUPPORTED && strstr(error.text, "after the fork") ? 0 : 2;
}

static struct early {
    pid_t pid;
    int address_fd;
} early[2];

/* Forked before this process used gRPC; told later where the cluster is. */
static void early_start(unsigned number)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    (void)fflush(NULL);
    early[number].pid = fork();
    early[number].address_fd = ends[1];
    if (early[number].pid > 0) {
        (void)close(ends[0]);
        return;
    }
    if (read(ends[0], cluster.coordinator_address, sizeof(cluster.coordinator_address)) <= 0) {
        _exit(2);
    }
    (void)alarm(30);
    struct rk_values *own = values_open("grpc");
    bool good = own && put_one(own, 10 + number);
    for (int round = 0; good && round < ROUNDS; round++) {
        good = get_one(own, 10 + number);
    }
    rk_values_destroy(own);
    _exit(good ? 0 : 1);
}

static void clients_made_after_a_fork_work(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(write(early[i].address_fd, cluster.coordinator_address,
                               sizeof(cluster.coordinator_address)),
                         sizeof(cluster.coordinator_address));
    }
    for (unsigned i = 0; i < 2; i++) {
        int child_status = 0;
        (void)close(early[i].address_fd);
        assert_int_equal(waitpid(early[i].pid, &child_status, 0), early[i].pid);
        assert_int_equal(child_status, 0);
    }
}

static void a_copy_of_a_client_is_refused(void **state)
{
    const char *path = *state;
    struct rk_values *values = values_open(path);
    struct rk_client *client = cluster_client(&cluster, -1);
    struct rk_cluster_status status;
    struct rk_value_views views = {.views = NULL};
    char text[32];
    struct rk_value_key key = key_of(1, text);
    int child_status = 0;
    assert_non_null(values);
    assert_true(put_one(values, 1) && put_one(values, 2));
    assert_int_equal(rk_client_status(client, 0, &status, NULL), RK_OK);
    rk_cluster_status_clear(&status);
    for (int round = 0; round < 3; round++) {
        assert_int_equal(rk_values_view(values, &key, 1, WAIT_MS, &views, NULL), RK_OK);
        assert_int_equal(views.views[0].status, RK_OK);
        (void)fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            _exit(child_main(values, &views, client, path));
        }
        for (int i = 0; i < ROUNDS; i++) {
            assert_true(get_one(values, 1));
        }
        assert_int_equal(waitpid(child, &child_status, 0), child);
        assert_int_equal(child_status, 0);
        assert_int_equal(value_compare(1, views.views[0].parts[0].data, VALUE_BYTES), VALUE_BYTES);
        rk_values_release(values, &views);
        assert_true(get_one(values, 2));
        assert_int_equal(rk_client_status(client, 0, &status, NULL), RK_OK);
        rk_cluster_status_clear(&status);
    }
    rk_client_destroy(client);
    rk_values_destroy(values);
    cluster_store_becomes_quiet(&cluster);
}

static int group_set_up(void **state)
{
    const struct cluster_options options = {.dram = "64MiB"};
    (void)state;
    early_start(0);
    early_start(1);
    cluster_start(&cluster, &options);
    return 0;
}

static int group_tear_down(void **state)
{
    (void)state;
    cluster_stop(&cluster);
    return 0;
}

int main(void)
{
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(clients_made_after_a_fork_work),
        cmocka_unit_test_prestate(a_copy_of_a_client_is_refused, (void *)(uintptr_t) "shm"),
        cmocka_unit_test_prestate(a_copy_of_a_client_is_refused, (void *)(uintptr_t) "grpc"),
        cmocka_unit_test_prestate(a_copy_of_a_client_is_refused, (void *)(uintptr_t) "ucx"),
    };
    return cmocka_run_group_tests(tests, group_set_up, group_tear_down);
}
