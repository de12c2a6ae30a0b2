/*
 * Goal:   `redknot up`, `restart`, `logs` and `down` on a cluster whose processes are killed,
 *         stopped or strangers: each says what is there, brings back what is missing, ends within
 *         seconds, and never takes or stops what is not its own.
 * Method: the program itself, in a folder and on ports of this test; clusters without workers for
 *         the drills, and one with a worker, which answers while the coordinator is down.
 */
#include "common/base/clock.h"
#include "tests/support/golden.h"

#include <arpa/inet.h>
#include <jansson.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define OUTPUT_BYTES 16384
#define SECONDS_MAX  8 /* of any command about processes that run, are dead or stopped */
#define SPAN         136

static char base[64];
static unsigned port; /* base port; one above SPAN is for another cluster */
static char output[OUTPUT_BYTES];
static double seconds;

static bool port_is_free(unsigned number)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)number),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool free = bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0;
    close(fd);
    return free;
}

/* Of one cluster: coordinator, two stores, a worker, and their metrics. */
static bool plan_is_free(unsigned number)
{
    static const unsigned of[] = {0, 1, 2, 20, 100, 101, 102, 120};
    for (size_t i = 0; i < sizeof(of) / sizeof(of[0]); i++) {
        if (!port_is_free(number + of[i])) {
            return false;
        }
    }
    return true;
}

/* $D is the test's folder, $P and $Q are base ports. Both streams; the exit code. */
static int redknot(const char *format, ...) __attribute__((format(printf, 1, 2)));
static int redknot(const char *format, ...)
{
    char arguments[512];
    char command[1024];
    va_list list;
    va_start(list, format);
    (void)vsnprintf(arguments, sizeof(arguments), format, list);
    va_end(list);
    (void)snprintf(
        command, sizeof(command), "D=%s; P=%u; Q=%u; %s%s/bin/redknot %s 2>&1 </dev/null", base,
        port, port + 2 * SPAN, strstr(arguments, "REDKNOT_") ? "" : "unset REDKNOT_COORDINATOR;",
        REDKNOT_BINARY_DIR, arguments);
    int64_t begin = rk_clock_ns();
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    size_t bytes = fread(output, 1, sizeof(output) - 1, pipe);
    output[bytes] = 0;
    int status = pclose(pipe);
    seconds = (double)(rk_clock_ns() - begin) * 1e-9;
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void expect(int got, int code, const char *text)
{
    if (got != code || !strstr(output, text) || seconds > SECONDS_MAX) {
        fail_msg("exit %d after %.1f s, wanted %d and \"%s\"; got:\n%s", got, seconds, code, text,
                 output);
    }
}

/* Of a process in cluster.json; 0 when it is not running. */
static pid_t pid_of(const char *folder, const char *node)
{
    char path[128];
    pid_t pid = 0;
    (void)snprintf(path, sizeof(path), "%s/%s/cluster.json", base, folder);
    json_t *state = json_load_file(path, 0, NULL);
    json_t *row = NULL;
    size_t i = 0;
    assert_non_null(state);
    json_array_foreach (json_object_get(state, "processes"), i, row) {
        if (strcmp(json_string_value(json_object_get(row, "node_id")), node) == 0) {
            pid = (pid_t)json_integer_value(json_object_get(row, "pid"));
        }
    }
    json_decref(state);
    return pid;
}

/* Nobody may have asked yet how it ended: then it is there, but as a zombie. */
static bool lives(pid_t pid)
{
    char path[64];
    char text[256] = "";
    (void)snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    if (file) {
        (void)fgets(text, sizeof(text), file);
        (void)fclose(file);
    }
    return text[0] && !strstr(text, ") Z");
}

static void hit(const char *folder, const char *node, int number)
{
    pid_t pid = pid_of(folder, node);
    assert_true(pid > 1); /* Else the whole group of this test. */
    assert_int_equal(kill(pid, number), 0);
    for (int i = 0; number == SIGKILL && lives(pid) && i < 500; i++) {
        rk_clock_sleep_ms(10);
    }
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(base, sizeof(base), "/tmp/redknot-up-XXXXXX");
    port = 15000 + (unsigned)getpid() % 12000;
    while (!plan_is_free(port) || !plan_is_free(port + 2 * SPAN)) {
        port += SPAN;
    }
    return mkdtemp(base) ? 0 : -1;
}

static int teardown(void **state)
{
    char command[128];
    (void)state;
    (void)redknot("down --dir $D/a");
    (void)redknot("down --dir $D/b");
    (void)snprintf(command, sizeof(command), "rm -rf '%s'", base);
    return system(command);
}

static void start_cache(const char *folder, const char *letter)
{
    int code = redknot("up --dir $D/%s --base-port %s --workers 0 --stores 2 --dram 64MiB", folder,
                       letter);
    expect(code, 0, "export REDKNOT_COORDINATOR=");
    assert_non_null(strstr(output, "starting store-1"));
}

static void a_second_cluster_on_the_same_ports_is_refused(void **state)
{
    (void)state;
    start_cache("a", "$P");
    pid_t coordinator = pid_of("a", "coordinator");
    expect(redknot("up --dir $D/b --base-port $P --workers 0 --dram 64MiB"), 1, "--base-port");
    assert_non_null(strstr(output, "is taken by process"));
    assert_non_null(strstr(output, "/a ")); /* The cluster that has it. */
    assert_null(strstr(output, "ROLE"));    /* No table of what does not run. */
    expect(redknot("down --dir $D/b"), 0, "stopped 0");
    assert_true(lives(coordinator));
    start_cache("b", "$Q"); /* Elsewhere it may be. */
    expect(redknot("down --dir $D/b"), 0, "stopped 3");
    assert_true(lives(coordinator));
}

static void up_brings_back_what_is_missing(void **state)
{
    (void)state;
    static const char *const nodes[] = {"coordinator", "store-0", "store-1"};
    start_cache("a", "$P");
    expect(redknot("up --dir $D/a"), 0, "3 of 3 processes ran already");
    for (size_t i = 0; i < 3; i++) {
        pid_t before = pid_of("a", nodes[i]);
        pid_t other = pid_of("a", nodes[(i + 1) % 3]);
        hit("a", nodes[i], SIGKILL);
        expect(redknot("up --dir $D/a"), 0, "2 of 3 processes ran already, 1 were started");
        assert_true(pid_of("a", nodes[i]) != before && lives(pid_of("a", nodes[i])));
        assert_int_equal(pid_of("a", nodes[(i + 1) % 3]), other);
    }
    expect(redknot("up --dir $D/a --stores 2 --workers 0"), 0, "3 of 3"); /* As it was started. */
    expect(redknot("up --dir $D/a --stores 1"), 1, "--stores \"2\"");
    hit("a", "store-0", SIGKILL);
    hit("a", "store-1", SIGKILL);
    hit("a", "coordinator", SIGKILL);
    expect(redknot("up --dir $D/a --base-port $P --workers 0 --dram 64MiB"), 0, "store-0");
    assert_int_equal(pid_of("a", "store-1"), 0); /* Nothing ran: a new one, as now asked for. */
}

static void what_is_stopped_is_named_and_replaced(void **state)
{
    (void)state;
    static const char *const nodes[] = {"coordinator", "store-0"};
    start_cache("a", "$P");
    for (size_t i = 0; i < 2; i++) {
        hit("a", nodes[i], SIGSTOP);
        expect(redknot("up --dir $D/a"), 1, "is stopped by a signal");
        assert_non_null(strstr(output, "redknot restart"));
        (void)redknot("status -c 127.0.0.1:%u", port);
        assert_true(seconds < SECONDS_MAX);
        expect(redknot("restart --dir $D/a %s", nodes[i]), 0, "serves at");
        expect(redknot("up --dir $D/a"), 0, "3 of 3");
    }
    hit("a", "store-0", SIGSTOP);
    hit("a", "store-1", SIGSTOP);
    hit("a", "coordinator", SIGSTOP);
    expect(redknot("down --dir $D/a"), 0, "stopped 3");
}

static void one_process_is_restarted(void **state)
{
    (void)state;
    start_cache("a", "$P");
    pid_t before = pid_of("a", "store-1");
    pid_t other = pid_of("a", "store-0");
    expect(redknot("restart --dir $D/a store-1"), 0, "store-1 serves at");
    assert_true(!lives(before) && lives(pid_of("a", "store-1")));
    assert_int_equal(pid_of("a", "store-0"), other);
    expect(redknot("restart --dir $D/a store-1 store-9"), 1,
           "it has coordinator, store-0, store-1");
    hit("a", "coordinator", SIGKILL); /* What is down is not needed to restart another. */
    expect(redknot("restart --dir $D/a store-0"), 0, "redknot restart coordinator");
    expect(redknot("restart --dir $D/a coordinator"), 0, "coordinator serves");
    expect(redknot("logs --dir $D/a store-0 --lines 500"), 0, "event=stopping");
    expect(redknot("logs --dir $D/a --lines 1"), 0, "==> store-1 <==");
    expect(redknot("logs --dir $D/a store-0 --lines 0"), 0, "");
    assert_string_equal(output, "");
}

static void down_goes_where_it_is_told_or_refuses(void **state)
{
    (void)state;
    start_cache("a", "$P");
    pid_t coordinator = pid_of("a", "coordinator");
    expect(redknot("down --dir $D/a --coordinator 127.0.0.1:$Q"), 1, "--coordinator names");
    assert_true(lives(coordinator));
    expect(redknot("restart --dir $D/a store-0 -c 127.0.0.1:$Q"), 1, "--coordinator names");
    /* Without a folder, the cluster of the coordinator that is named: not the default one. */
    expect(redknot("logs store-0 --lines 1 -c 127.0.0.1:$P"), 0, "component=kvstore");
    expect(redknot("down --coordinator 127.0.0.1:$P"), 0, "stopped 3");
    assert_false(lives(coordinator));
}

static void a_damaged_state_hides_nothing(void **state)
{
    (void)state;
    static const char *const damage[] = {"echo '{\"version\": 2' >", "rm -f", "chmod 666"};
    static const char *const said[] = {"damaged", "gone", "only you may write"};
    for (size_t i = 0; i < 3; i++) {
        char command[128];
        start_cache("a", "$P");
        pid_t store = pid_of("a", "store-1");
        (void)snprintf(command, sizeof(command), "%s %s/a/cluster.json", damage[i], base);
        assert_int_equal(system(command), 0);
        expect(redknot("up --dir $D/a"), 1, said[i]);
        assert_true(lives(store));
        if (i == 2) { /* Somebody may have written it: first that is mended. */
            expect(redknot("down --dir $D/a"), 1, said[i]);
            (void)snprintf(command, sizeof(command), "chmod 600 %s/a/cluster.json", base);
            assert_int_equal(system(command), 0);
        }
        expect(redknot("down --dir $D/a"), 0, "stopped 3");
        assert_false(lives(store));
    }
}

static void a_process_that_cannot_start_says_why(void **state)
{
    (void)state;
    char command[256];
    expect(redknot("up --dir $D/a --base-port $P --workers 0 --dram 900TiB"), 1, "ask for less");
    (void)snprintf(command, sizeof(command), "mkdir -p -m 700 %s/a; echo > %s/a/store-0.sock", base,
                   base);
    assert_int_equal(system(command), 0);
    expect(redknot("up --dir $D/a --base-port $P --workers 0 --dram 64MiB"), 1, "ended at once");
    assert_non_null(strstr(output, "is no socket"));    /* The last line of its log. */
    expect(redknot("down --dir $D/a"), 0, "stopped 0"); /* Nothing was left behind. */
}

/* A copy of the model whose norms add another epsilon, by its last bit: another model. */
static const char *other_model(void)
{
    static const char key[] = "llama.attention.layer_norm_rms_epsilon";
    enum { METADATA_BYTES = 8 << 20 };
    static char path[160];
    char command[1400];
    (void)snprintf(path, sizeof(path), "%s/other.gguf", base);
    (void)snprintf(command, sizeof(command), "cp '%s' %s", golden_model_path(), path);
    assert_int_equal(system(command), 0);
    FILE *file = fopen(path, "r+");
    char *head = malloc(METADATA_BYTES);
    assert_true(file && head && fread(head, METADATA_BYTES, 1, file) == 1);
    char *value = memmem(head, METADATA_BYTES, key, sizeof(key) - 1);
    assert_non_null(value);
    value += sizeof(key) - 1 + 4; /* Behind its type. */
    assert_int_equal(fseek(file, value - head, SEEK_SET), 0);
    assert_int_equal(fputc((unsigned char)*value ^ 1, file), (unsigned char)*value ^ 1);
    assert_int_equal(fclose(file), 0);
    free(head);
    return path;
}

/* A worker beside those of `up`, of another model. */
static pid_t start_worker_by_hand(void)
{
    const char *model = other_model();
    char own[32];
    char coordinator[32];
    char log[128];
    (void)snprintf(own, sizeof(own), "127.0.0.1:%u", port + 2 * SPAN + 20);
    (void)snprintf(coordinator, sizeof(coordinator), "127.0.0.1:%u", port);
    (void)snprintf(log, sizeof(log), "%s/by-hand.log", base);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (!freopen(log, "w", stderr)) {
            _exit(126);
        }
        (void)execl(REDKNOT_BINARY_DIR "/bin/redknot-worker", "redknot-worker", "--model", model,
                    "--context", "256", "--listen", own, "--metrics", "", "--coordinator",
                    coordinator, "--node-id", "by-hand", (char *)NULL);
        _exit(127);
    }
    for (int i = 0; i < 600; i++) { /* Until the coordinator lists it. */
        (void)redknot("status -c %s", coordinator);
        if (strstr(output, "by-hand")) {
            return child;
        }
        rk_clock_sleep_ms(100);
    }
    fail_msg("no worker by hand: %s", output);
    return -1;
}

static void a_worker_is_found_by_its_model_and_without_the_coordinator(void **state)
{
    (void)state;
    char fingerprint[13] = "";
    (void)redknot("up --dir $D/a --base-port $P --workers 1 --dram 64MiB --context 256 --model %s",
                  golden_model_path());
    seconds = 0; /* It loads a model. */
    expect(0, 0, "worker-0");
    expect(redknot("generate -p hello -n 2 -c 127.0.0.1:%u", port), 0, "");
    pid_t other = start_worker_by_hand();
    for (int i = 0; i < 4; i++) { /* Whichever comes first in the list. */
        expect(redknot("generate -p hello -n 2 -c 127.0.0.1:%u", port), 1, "several models");
    }
    const char *at = strstr(output, "(fingerprint ");
    assert_non_null(at);
    assert_int_equal(sscanf(at, "(fingerprint %12[0-9a-f]", fingerprint), 1);
    expect(redknot("generate -p hello -n 2 -c 127.0.0.1:%u -m %s", port, fingerprint), 0, "");
    expect(redknot("generate -p hello -n 2 -c 127.0.0.1:%u -m nonesuch", port), 1, "nonesuch");
    assert_int_equal(kill(other, SIGKILL), 0);
    assert_int_equal(waitpid(other, NULL, 0), other);

    hit("a", "coordinator", SIGKILL);
    expect(redknot("generate -p hello -n 2 -c 127.0.0.1:%u", port), 0, "");
    expect(redknot("status -c 127.0.0.1:%u", port), 1, "does not answer");
    expect(redknot("up --dir $D/a"), 0, "2 of 3 processes ran already");
    hit("a", "worker-0", SIGSTOP);
    expect(redknot("restart --dir $D/a worker-0"), 0, "worker-0 serves");
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(a_second_cluster_on_the_same_ports_is_refused),
        TEST(up_brings_back_what_is_missing),
        TEST(what_is_stopped_is_named_and_replaced),
        TEST(one_process_is_restarted),
        TEST(down_goes_where_it_is_told_or_refuses),
        TEST(a_damaged_state_hides_nothing),
        TEST(a_process_that_cannot_start_says_why),
        TEST(a_worker_is_found_by_its_model_and_without_the_coordinator),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
