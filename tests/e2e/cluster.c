#include "tests/e2e/cluster.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "tests/e2e/network.h"
#include "tests/support/golden.h"
#include "tests/support/skip.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define START_TIMEOUT_MS 60000
#define STOP_TIMEOUT_MS  20000

/*
 * A port that nobody uses, below those that the kernel hands out by itself, so that neither the
 * connections of a test nor another server's "any port" can take it before its owner starts.
 */
static int free_port(void)
{
    enum { BEGIN = 15000, COUNT = 15000 };
    static uint32_t next;
    next = next != 0 ? next : (uint32_t)getpid() * 97;
    for (int tries = 0; tries < COUNT; tries++) {
        int port = BEGIN + (int)(next++ % COUNT);
        struct sockaddr_in address = {.sin_family = AF_INET,
                                      .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                      .sin_port = htons((uint16_t)port)};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_true(fd >= 0);
        bool is_free = bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0;
        close(fd);
        if (is_free) {
            return port;
        }
    }
    fail_msg("no free port in [%d, %d)", BEGIN, BEGIN + COUNT);
    return 0;
}

static void address_make(const struct cluster_options *options, char ret_address[32])
{
    (void)snprintf(ret_address, 32, "%s:%d", options->host ? options->host : "127.0.0.1",
                   free_port());
}

static void print_log(const struct process *process)
{
    char line[1024];
    FILE *log = fopen(process->log, "r");
    (void)fprintf(stderr, "---- %s\n", process->log);
    while (log && fgets(line, sizeof(line), log)) {
        (void)fputs(line, stderr);
    }
    if (log) {
        (void)fclose(log);
    }
}

void process_start(struct process *process)
{
    process->pid = fork();
    assert_true(process->pid >= 0);
    if (process->pid == 0) {
        int log = open(process->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        dup2(log, STDOUT_FILENO);
        dup2(log, STDERR_FILENO);
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* A test that dies leaves nobody behind. */
        if (process->netns && !network_enter(process->netns)) {
            _exit(126);
        }
        execv(process->argv[0], (char *const *)process->argv);
        _exit(127);
    }
}

static bool process_reap(struct process *process, int timeout_ms, int *ret_code)
{
    int64_t deadline = rk_deadline_in_ms(timeout_ms);
    while (rk_deadline_left_ms(deadline) > 0) {
        int code = 0;
        if (waitpid(process->pid, &code, WNOHANG) == process->pid) {
            process->pid = 0;
            *ret_code = code;
            return true;
        }
        rk_clock_sleep_ms(5);
    }
    return false;
}

void process_kill(struct process *process, int signal)
{
    int code = 0;
    assert_true(process->pid > 0);
    assert_int_equal(kill(process->pid, signal), 0);
    assert_true(process_reap(process, STOP_TIMEOUT_MS, &code));
}

static void process_define(struct process *process, const struct cluster *cluster, const char *name,
                           const char *program)
{
    static char paths[3][512];
    static int used;
    int slot = 0;
    while (slot < used && !strstr(paths[slot], program)) {
        slot++;
    }
    if (slot == used) {
        (void)snprintf(paths[used++], sizeof(paths[0]), "%s/bin/%s", REDKNOT_BINARY_DIR, program);
    }
    process->argv[0] = paths[slot];
    (void)snprintf(process->log, sizeof(process->log), "%s/%s.log", cluster->folder, name);
}

static void process_arguments(struct process *process, ...)
{
    va_list list;
    int count = 0;
    while (process->argv[count]) {
        count++;
    }
    va_start(list, process);
    for (const char *word = va_arg(list, const char *); word; word = va_arg(list, const char *)) {
        assert_true(count < 38);
        process->argv[count++] = word;
    }
    va_end(list);
}

static void process_more(struct process *process, const char *const *list)
{
    for (size_t i = 0; list && list[i]; i++) {
        process_arguments(process, list[i], NULL);
    }
}

void process_set_argument(struct process *process, const char *option, const char *value)
{
    for (int i = 0; process->argv[i]; i++) {
        if (strcmp(process->argv[i], option) == 0) {
            process->argv[i + 1] = value;
            return;
        }
    }
    process_arguments(process, option, value, NULL);
}

static void define_worker(struct cluster *cluster, const struct cluster_options *options,
                          uint32_t index)
{
    struct process *worker = &cluster->workers[index];
    char *name = cluster->names[index + 2];
    (void)snprintf(name, sizeof(cluster->names[0]), "worker-%u", index);
    address_make(options, cluster->worker_addresses[index]);
    address_make(options, cluster->worker_metrics[index]);
    process_define(worker, cluster, name, "redknot-worker");
    process_arguments(worker, "--model", golden_model_path(), "--listen",
                      cluster->worker_addresses[index], "--metrics", cluster->worker_metrics[index],
                      "--coordinator", cluster->coordinator_address, "--node-id", name, NULL);
    if (options->mode) {
        process_arguments(worker, "--mode", options->mode, NULL);
    }
    if (options->path) {
        process_arguments(worker, "--path", options->path, NULL);
    }
    process_more(worker, options->worker_args);
    process_more(worker, options->args_of_worker[index]);
}

static void define_store(struct cluster *cluster, const struct cluster_options *options,
                         struct process *store, uint32_t index, char address[32], char metrics[32],
                         char socket[160])
{
    char *name = cluster->names[CLUSTER_WORKERS_MAX + 2 + index];
    (void)snprintf(name, sizeof(cluster->names[0]), "store-%u", index);
    (void)snprintf(socket, 160, "%s/%s.sock", cluster->folder, name);
    address_make(options, address);
    address_make(options, metrics);
    process_define(store, cluster, name, "redknot-kvstore");
    process_arguments(store, "--listen", address, "--metrics", metrics, "--coordinator",
                      cluster->coordinator_address, "--dram",
                      options->dram ? options->dram : "1GiB", "--shm-socket", socket, "--node-id",
                      name, NULL);
    process_arguments(store, "--ucx", "auto", NULL);
    if (options->store_faults) {
        process_arguments(store, "--enable-fault-injection", NULL);
    }
    process_more(store, options->store_args);
    store->netns = options->netns;
}

void cluster_start(struct cluster *cluster, const struct cluster_options *options)
{
    memset(cluster, 0, sizeof(*cluster));
    (void)snprintf(cluster->folder, sizeof(cluster->folder), "%s/redknot-e2e.XXXXXX",
                   getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    assert_non_null(mkdtemp(cluster->folder));
    (void)snprintf(cluster->data, sizeof(cluster->data), "%s/data", cluster->folder);
    address_make(options, cluster->coordinator_address);
    address_make(options, cluster->coordinator_metrics);

    process_define(&cluster->coordinator, cluster, "coordinator", "redknot-coordinator");
    process_arguments(&cluster->coordinator, "--listen", cluster->coordinator_address, "--data",
                      cluster->data, "--metrics", cluster->coordinator_metrics, NULL);
    cluster->coordinator.netns = options->netns;
    define_store(cluster, options, &cluster->store, 0, cluster->store_address,
                 cluster->store_metrics, cluster->store_socket);
    cluster->num_stores = options->num_stores > 0 ? options->num_stores : 1;
    for (uint32_t i = 1; i < cluster->num_stores; i++) {
        define_store(cluster, options, &cluster->more_stores[i - 1], i,
                     cluster->more_store_addresses[i - 1], cluster->more_store_metrics[i - 1],
                     cluster->more_store_sockets[i - 1]);
    }
    cluster->num_workers = options->num_workers;
    for (uint32_t i = 0; i < options->num_workers; i++) {
        define_worker(cluster, options, i);
    }
    process_start(&cluster->coordinator);
    process_start(&cluster->store);
    for (uint32_t i = 1; i < cluster->num_stores; i++) {
        process_start(&cluster->more_stores[i - 1]);
    }
    for (uint32_t i = 0; i < options->num_workers; i++) {
        process_start(&cluster->workers[i]);
    }
    cluster_wait(cluster, cluster->num_stores, options->num_workers);
}

static bool count_nodes(struct rk_client *client, uint32_t *ret_stores, uint32_t *ret_workers)
{
    struct rk_cluster_status status = {0};
    if (rk_client_status(client, 0, &status, NULL) != RK_OK) {
        return false;
    }
    *ret_stores = 0;
    *ret_workers = 0;
    for (size_t i = 0; i < status.num_nodes; i++) {
        *ret_stores += status.nodes[i].alive && status.nodes[i].role == RK_NODE_STORE;
        *ret_workers += status.nodes[i].alive && status.nodes[i].role == RK_NODE_WORKER;
    }
    rk_cluster_status_clear(&status);
    return true;
}

void cluster_wait(struct cluster *cluster, uint32_t stores, uint32_t workers)
{
    struct rk_client *client = cluster_client(cluster, -1);
    int64_t deadline = rk_deadline_in_ms(START_TIMEOUT_MS);
    uint32_t living_stores = 0;
    uint32_t living_workers = 0;
    while (!count_nodes(client, &living_stores, &living_workers) || living_stores != stores ||
           living_workers != workers) {
        if (rk_deadline_left_ms(deadline) == 0) {
            print_log(&cluster->coordinator);
            print_log(&cluster->store);
            for (uint32_t i = 1; i < cluster->num_stores; i++) {
                print_log(&cluster->more_stores[i - 1]);
            }
            for (uint32_t i = 0; i < cluster->num_workers; i++) {
                print_log(&cluster->workers[i]);
            }
            fail_msg("%u stores and %u workers live; %u and %u were expected", living_stores,
                     living_workers, stores, workers);
        }
        rk_clock_sleep_ms(20);
    }
    rk_client_destroy(client);
}

static void stop_process(struct process *process)
{
    int code = -1;
    if (process->pid == 0) {
        return;
    }
    assert_int_equal(kill(process->pid, SIGTERM), 0);
    if (!process_reap(process, STOP_TIMEOUT_MS, &code) || code != 0) {
        print_log(process);
        fail_msg("%s: ended with wait status %d instead of 0 after SIGTERM", process->argv[0],
                 code);
    }
}

void cluster_stop(struct cluster *cluster)
{
    char command[256];
    for (uint32_t i = 0; i < cluster->num_workers; i++) {
        stop_process(&cluster->workers[i]);
    }
    stop_process(&cluster->store);
    for (uint32_t i = 1; i < cluster->num_stores; i++) {
        stop_process(&cluster->more_stores[i - 1]);
    }
    stop_process(&cluster->coordinator);
    (void)snprintf(command, sizeof(command), "rm -rf '%s'", cluster->folder);
    assert_int_equal(system(command), 0);
}

struct rk_client *cluster_client(const struct cluster *cluster, int worker)
{
    struct rk_client *client = NULL;
    struct rk_client_options options = {
        .coordinator = cluster->coordinator_address,
        .worker = worker < 0 ? NULL : cluster->worker_addresses[worker],
        .timeout_ms = 120000,
    };
    assert_int_equal(rk_client_create(&options, &client, NULL), RK_OK);
    return client;
}

static FILE *metrics_open(const char *address)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    char request[] = "GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n";
    char host[32];
    (void)snprintf(host, sizeof(host), "%s", address);
    char *colon = strchr(host, ':');
    assert_non_null(colon);
    *colon = '\0';
    assert_int_equal(inet_pton(AF_INET, host, &to.sin_addr), 1);
    to.sin_port = htons((uint16_t)strtol(colon + 1, NULL, 10));
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
    assert_int_equal(write(fd, request, sizeof(request) - 1), sizeof(request) - 1);
    return fdopen(fd, "r");
}

double cluster_metric(const char *address, const char *name)
{
    FILE *reply = metrics_open(address);
    char line[1024];
    double sum = 0;
    while (fgets(line, sizeof(line), reply)) {
        if (strncmp(line, name, strlen(name)) == 0 && strrchr(line, ' ')) {
            sum += strtod(strrchr(line, ' '), NULL);
        }
    }
    (void)fclose(reply);
    return sum;
}

void cluster_store_becomes_quiet(const struct cluster *cluster)
{
    static const char *const gauges[] = {"redknot_kvstore_pinned_bytes ",
                                         "redknot_kvstore_staged "};
    enum { WAIT_MS = 30000 };
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    rk_clock_sleep_ms(250); /* The store publishes its gauges five times a second. */
    for (size_t i = 0; i < sizeof(gauges) / sizeof(gauges[0]); i++) {
        double value = 1;
        while ((value = cluster_metric(cluster->store_metrics, gauges[i])) > 0) {
            if (rk_deadline_left_ms(deadline_ns) == 0) {
                fail_msg("%s stays at %.0f", gauges[i], value);
            }
            rk_clock_sleep_ms(50);
        }
    }
}

void cluster_metrics_check(const char *address)
{
    if (!test_has_program("promtool")) {
        test_skipped("the form of the daemons' metrics",
                     "promtool is not installed (package prometheus)");
        return;
    }
    FILE *reply = metrics_open(address);
    FILE *promtool = popen("promtool check metrics 2>&1", "w");
    char line[1024];
    bool body = false;
    assert_non_null(promtool);
    while (fgets(line, sizeof(line), reply)) {
        if (body) {
            assert_true(fputs(line, promtool) >= 0);
        }
        body = body || strcmp(line, "\r\n") == 0;
    }
    (void)fclose(reply);
    assert_true(body);
    assert_int_equal(pclose(promtool), 0); /* 3: it has something to say */
}

uint64_t process_field(pid_t pid, const char *field, int base)
{
    char path[64];
    char line[256];
    uint64_t number = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    while (fgets(line, sizeof(line), file)) {
        if (strncmp(line, field, strlen(field)) == 0) {
            number = strtoull(line + strlen(field), NULL, base);
        }
    }
    (void)fclose(file);
    return number;
}

uint64_t process_resident_bytes(const struct process *process)
{
    return process_field(process->pid, "VmRSS:", 10) * 1024;
}

static bool keep_tokens(void *context, const int32_t *token_ids, size_t num_tokens,
                        const char *text, size_t text_bytes)
{
    struct answer *answer = context;
    (void)text;
    (void)text_bytes;
    for (size_t i = 0; i < num_tokens && answer->num_tokens < ANSWER_TOKENS_MAX; i++) {
        answer->tokens[answer->num_tokens++] = token_ids[i];
    }
    return true;
}

void ask(struct rk_client *client, const struct rk_generate_request *request,
         struct answer *ret_answer)
{
    memset(ret_answer, 0, sizeof(*ret_answer));
    ret_answer->status = rk_client_generate(client, request, keep_tokens, ret_answer,
                                            &ret_answer->report, &ret_answer->error);
}

void answer_clear(struct answer *answer)
{
    rk_report_clear(&answer->report);
}
