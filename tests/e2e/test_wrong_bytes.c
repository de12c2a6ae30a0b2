/*
 * Goal:   whatever dies, stops, lies or refuses, nobody reads a byte that was not written, nor a
 *         value older than one that was put before, nor bytes that changed under a hold without
 *         the guard saying so; and nobody leaks.
 * Method: two small stores and peers of each kind as processes (bytes_peer.c), which compare every
 *         byte with what was written, for RK_BYTES_SECONDS (10), while this one kills, stops and
 *         restarts stores, coordinator and peers, flips bytes in stores, takes living readers' pins
 *         away and sends rubbish, at random moments (the seed is printed). Under a sanitizer its
 * report fails the test.
 */
#include "tests/e2e/bytes_board.h"
#include "tests/e2e/cluster.h"
#include "tests/e2e/value_bytes.h"

#include "common/base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define SECOND      INT64_C(1000000000)
#define NUM_STORES  2
#define NUM_WRITERS "3"
#define END_MS      40000 /* until a peer has ended: its calls end by their timeouts */

/* The writers come first: a key belongs to one by its index. */
static const struct {
    const char *role;
    const char *path;
} kinds[] = {
    {"write", "shm"},    {"write", "ucx"},    {"write", "grpc"},    {"read", "shm"},
    {"read", "shm"},     {"read", "ucx"},     {"read", "grpc"},     {"segments", "shm"},
    {"segments", "shm"}, {"segments", "ucx"}, {"segments", "grpc"}, {"hoard", "shm"},
    {"fork", "shm"},     {"fork", "grpc"},
};
#define NUM_PEERS (sizeof(kinds) / sizeof(kinds[0]))

enum fault {
    KILL_STORE,
    STOP_STORE,
    KILL_COORDINATOR,
    STOP_COORDINATOR,
    KILL_PEER,
    STOP_PEER,
    FLIP_BYTE,
    LOSE_PINS,
    RUBBISH_TO_SOCKET,
    HALF_A_FRAME,
    CONNECT_AND_GO,
    NUM_FAULTS
};
static const char *const faults[NUM_FAULTS] = {"a store killed",
                                               "a store stopped",
                                               "the coordinator killed",
                                               "the coordinator stopped",
                                               "a peer killed",
                                               "a peer stopped",
                                               "a byte flipped",
                                               "pins of living readers lost",
                                               "rubbish to a store's socket",
                                               "half a frame",
                                               "a connection that says nothing"};

static struct cluster cluster;
static struct board *board;
static int board_fd;
static struct process peers[NUM_PEERS];
static char peer_words[NUM_PEERS][3][24];
static uint64_t random_state;
static uint64_t counts[NUM_FAULTS];

/* What goes on later. */
struct stopped {
    struct process *process;
    int64_t until_ns;
};
static struct stopped sleeper;

static uint64_t below(uint64_t limit)
{
    return value_random(&random_state, limit);
}

static struct process *store_at(uint64_t index)
{
    return index == 0 ? &cluster.store : &cluster.more_stores[index - 1];
}

static void peer_start(size_t index)
{
    struct process *peer = &peers[index];
    static char program[512];
    (void)snprintf(program, sizeof(program), "%s/tests/bytes_peer", REDKNOT_BINARY_DIR);
    (void)snprintf(peer->log, sizeof(peer->log), "%s/peer-%zu.log", cluster.folder, index);
    (void)snprintf(peer_words[index][0], sizeof(peer_words[0][0]), "%d", board_fd);
    (void)snprintf(peer_words[index][1], sizeof(peer_words[0][0]), "%zu", index);
    (void)snprintf(peer_words[index][2], sizeof(peer_words[0][0]), "%llu",
                   (unsigned long long)below(UINT64_MAX));
    const char *words[] = {program,           peer_words[index][0],        peer_words[index][1],
                           NUM_WRITERS,       cluster.coordinator_address, kinds[index].path,
                           kinds[index].role, peer_words[index][2]};
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        peer->argv[i] = words[i];
    }
    process_start(peer);
}

static void log_print(const struct process *process)
{
    char command[256];
    (void)snprintf(command, sizeof(command), "tail -n 60 '%s' >&2", process->log);
    (void)!system(command);
}

/* A process that was not killed by us must not end. */
static void still_runs(struct process *process)
{
    int code = 0;
    if (waitpid(process->pid, &code, WNOHANG) == process->pid) {
        process->pid = 0;
        log_print(process);
        fail_msg("%s ended by itself with wait status %d", process->argv[0], code);
    }
}

/* ---- Faults ---- */

static void kill_and_restart(struct process *process)
{
    process_kill(process, SIGKILL);
    rk_clock_sleep_ms((int64_t)below(400));
    process_start(process);
}

static void stop_for_a_while(struct process *process)
{
    if (sleeper.process) {
        return; /* One at a time: with both stores stopped nothing happens. */
    }
    assert_int_equal(kill(process->pid, SIGSTOP), 0);
    sleeper = (struct stopped){process, rk_deadline_in_ms(100 + (int64_t)below(2900))};
}

static void wake(void)
{
    if (sleeper.process) {
        assert_int_equal(kill(sleeper.process->pid, SIGCONT), 0);
        sleeper.process = NULL;
    }
}

/* Connects to a store's socket, says this much of something, and goes. */
static void rubbish(uint64_t store, size_t bytes, bool frame)
{
    uint8_t data[256];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = store == 0 ? cluster.store_socket : cluster.more_store_sockets[store - 1];
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0 && strlen(path) < sizeof(address.sun_path));
    memcpy(address.sun_path, path, strlen(path) + 1);
    for (size_t i = 0; i < sizeof(data); i++) {
        data[i] = (uint8_t)below(256);
    }
    if (frame) {
        memcpy(data, "RDNK", 4);
    }
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0 && bytes > 0) {
        (void)!send(fd, data, bytes, MSG_NOSIGNAL);
    }
    close(fd);
}

/* A store that has just started has not blocked the signals of its fault injection yet. */
static void store_signal(uint64_t index, int number)
{
    pid_t pid = store_at(index)->pid;
    if (process_field(pid, "SigBlk:", 16) >> (number - 1) & 1) {
        assert_int_equal(kill(pid, number), 0);
    }
}

static void inject(enum fault fault)
{
    uint64_t store = below(NUM_STORES);
    size_t peer = below(NUM_PEERS);
    counts[fault]++;
    switch (fault) {
    case KILL_STORE:
        wake();
        kill_and_restart(store_at(store));
        break;
    case STOP_STORE:
        stop_for_a_while(store_at(store));
        break;
    case KILL_COORDINATOR:
        wake();
        kill_and_restart(&cluster.coordinator);
        break;
    case STOP_COORDINATOR:
        stop_for_a_while(&cluster.coordinator);
        break;
    case KILL_PEER:
        wake();
        process_kill(&peers[peer], SIGKILL);
        peer_start(peer);
        break;
    case STOP_PEER:
        stop_for_a_while(&peers[peer]);
        break;
    case FLIP_BYTE:
        store_signal(store, SIGUSR1);
        break;
    case LOSE_PINS: /* Of living readers: only the guard can tell. */
        store_signal(store, SIGUSR2);
        break;
    case RUBBISH_TO_SOCKET:
        rubbish(store, 1 + below(256), false);
        break;
    case HALF_A_FRAME:
        rubbish(store, 5 + below(60), true);
        break;
    case CONNECT_AND_GO:
        rubbish(store, 0, false);
        break;
    default:
        break;
    }
}

static void faults_for(int64_t seconds)
{
    int64_t end_ns = rk_clock_ns() + seconds * SECOND;
    while (rk_clock_ns() < end_ns) {
        rk_clock_sleep_ms(50 + (int64_t)below(400));
        if (sleeper.process && rk_clock_ns() > sleeper.until_ns) {
            wake();
        }
        inject((enum fault)below(NUM_FAULTS));
        for (size_t i = 0; i < NUM_PEERS; i++) {
            still_runs(&peers[i]);
            if (board->peers[i].wrong[0] != '\0') {
                return;
            }
        }
        for (uint64_t i = 0; i < NUM_STORES; i++) {
            still_runs(store_at(i));
        }
        still_runs(&cluster.coordinator);
    }
}

/* ---- The test ---- */

static void peers_end(void)
{
    int64_t deadline_ns = rk_deadline_in_ms(END_MS);
    atomic_store(&board->stopping, 1);
    for (size_t i = 0; i < NUM_PEERS; i++) {
        int code = 0;
        while (waitpid(peers[i].pid, &code, WNOHANG) != peers[i].pid) {
            if (rk_deadline_left_ms(deadline_ns) == 0) {
                (void)kill(peers[i].pid, SIGABRT);
                log_print(&peers[i]);
                fail_msg("peer %zu (%s over %s) does not end", i, kinds[i].role, kinds[i].path);
            }
            rk_clock_sleep_ms(20);
        }
        peers[i].pid = 0;
        if (code != 0) {
            log_print(&peers[i]);
            fail_msg("peer %zu (%s over %s) ended with wait status %d", i, kinds[i].role,
                     kinds[i].path, code);
        }
    }
}

static void results_print(void)
{
    for (size_t i = 0; i < NUM_PEERS; i++) {
        const struct board_peer *peer = &board->peers[i];
        print_message("%-8s %-4s: %llu MiB compared, %llu holds lost, %llu flipped, %llu children;",
                      kinds[i].role, kinds[i].path, (unsigned long long)peer->bytes >> 20,
                      (unsigned long long)peer->lost, (unsigned long long)peer->flipped,
                      (unsigned long long)peer->refused);
        for (int status = 0; status < RK_STATUS_COUNT; status++) {
            if (peer->statuses[status] > 0) {
                print_message(" %s %llu", rk_status_name((enum rk_status)status),
                              (unsigned long long)peer->statuses[status]);
            }
        }
        print_message("\n");
    }
    for (int fault = 0; fault < NUM_FAULTS; fault++) {
        print_message("%llu times %s\n", (unsigned long long)counts[fault], faults[fault]);
    }
}

static void no_wrong_byte_whatever_happens(void **state)
{
    const char *seconds = getenv("RK_BYTES_SECONDS");
    const char *given = getenv("REDKNOT_TEST_SEED");
    const struct cluster_options options = {
        .dram = "48MiB", .num_stores = NUM_STORES, .store_faults = true};
    (void)state;
    random_state = given ? strtoull(given, NULL, 10) : (uint64_t)rk_clock_ns();
    print_message("seed %llu (REDKNOT_TEST_SEED)\n", (unsigned long long)random_state);
    board_fd = memfd_create("board", 0); /* The peers inherit it. */
    assert_true(board_fd >= 0 && ftruncate(board_fd, sizeof(*board)) == 0);
    board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED, board_fd, 0);
    assert_true(board != MAP_FAILED);
    cluster_start(&cluster, &options);
    for (size_t i = 0; i < NUM_PEERS; i++) {
        peer_start(i);
    }
    faults_for(seconds ? strtol(seconds, NULL, 10) : 10);
    wake();
    peers_end();
    results_print();
    uint64_t compared = 0;
    for (size_t i = 0; i < NUM_PEERS; i++) {
        if (board->peers[i].wrong[0] != '\0') {
            fail_msg("%s", board->peers[i].wrong);
        }
        compared += board->peers[i].bytes;
    }
    assert_true(compared > 0);
    cluster_wait(&cluster, NUM_STORES, 0);
    cluster_store_becomes_quiet(&cluster);
    cluster_stop(&cluster);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(no_wrong_byte_whatever_happens)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
