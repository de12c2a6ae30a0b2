/*
 * Goal:   the UCX path brings the store's bytes with their checksums; whichever end dies, stops or
 *         lies, the other goes on within its deadline, without a pin or memory left behind.
 * Method: a server over an arena with a counting pin, and readers in this process; ucx_peer is the
 *         other end where it is stopped and killed; raw active messages and raw bytes that are no
 *         messages at all for the rest. The network is loopback's.
 */
#include "common/transport/ucx_internal.h"
#include "tests/common/transport/one_get.h"
#include "tests/common/transport/path_checks.h"
#include "tests/common/transport/ucx_arena.h"
#include "tests/common/transport/ucx_stranger.h"

#include "common/base/clock.h"
#include "common/base/log.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define WAIT_MS  20000
#define CONNECTS 1000

static struct arena arena;

static int set_up(void **state)
{
    struct rk_error error = {.text = ""};
    bool rendezvous = *state != NULL;
    if (arena_serve(&arena, rendezvous, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    rk_ucx_server_stop(arena.server);
    assert_int_equal(atomic_load(&arena.pages.pins), 0); /* stop unpins all */
    rk_free(arena.pages.bytes);
    return 0;
}

static const char *address_of(int port)
{
    static char text[32];
    (void)snprintf(text, sizeof(text), "127.0.0.1:%d", port);
    return text;
}

static struct rk_transport *reader_connect(int port, int timeout_ms, enum rk_status *ret_status)
{
    const struct rk_transport_endpoint endpoint = {
        .grpc_address = "", .host_id = "", .shm_socket = "", .ucx_address = address_of(port)};
    struct rk_transport *transport = NULL;
    struct rk_error error = {.text = ""};
    *ret_status = rk_transport_connect(&endpoint, RK_PATH_UCX, timeout_ms, &transport, &error);
    return transport;
}

static struct rk_transport *connected(void)
{
    enum rk_status status = RK_OK;
    struct rk_transport *transport =
        reader_connect(rk_ucx_server_port(arena.server), WAIT_MS, &status);
    assert_int_equal(status, RK_OK);
    assert_int_equal(rk_transport_path(transport), RK_PATH_UCX);
    return transport;
}

static struct rk_get get_of(const struct rk_extent *extents, size_t num_extents)
{
    return (struct rk_get){
        .generation = 1, .page_bytes = PAGE_BYTES, .extents = extents, .num_extents = num_extents};
}

static void pins_become(int wanted)
{
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    while (atomic_load(&arena.pages.pins) != wanted && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(1);
    }
    assert_int_equal(atomic_load(&arena.pages.pins), wanted);
}

/* ---- What it is for ---- */

static void expect_pages(struct rk_transport *transport, const struct rk_extent *extents,
                         size_t num_extents)
{
    struct rk_pages pages = {0};
    struct rk_error error = {.text = ""};
    struct rk_get get = get_of(extents, num_extents);
    uint64_t at = 0;
    if (get_one(transport, &get, WAIT_MS, &pages, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    assert_int_equal(pages.tier, RK_TIER_DRAM);
    for (size_t i = 0; i < num_extents; i++) {
        for (uint32_t page = extents[i].page_begin; page < extents[i].page_end; page++, at++) {
            assert_memory_equal(pages.pages[at].data, arena.pages.bytes + (size_t)page * PAGE_BYTES,
                                PAGE_BYTES);
            assert_true(rk_page_verify(&pages.pages[at], PAGE_BYTES));
        }
    }
    assert_int_equal(pages.num_pages, at);
    assert_int_equal(pages.bytes, at * PAGE_BYTES);
    rk_transport_release(transport, &pages, 1);
}

static void bytes_are_those_of_the_store(void **state)
{
    (void)state;
    static struct rk_extent odd[NUM_PAGES / 2];
    const struct rk_extent one[] = {{0, 0, 7, 8}};
    const struct rk_extent two[] = {{0, 0, 60, 64}, {0, 0, 2, 4}};
    const struct rk_extent all[] = {{0, 0, 0, NUM_PAGES}};
    for (uint32_t i = 0; i < NUM_PAGES / 2; i++) {
        odd[i] = (struct rk_extent){0, 0, 2 * i + 1, 2 * i + 2}; /* No two lie side by side. */
    }
    struct rk_transport *transport = connected();
    expect_pages(transport, one, 1);
    expect_pages(transport, two, 2);
    expect_pages(transport, all, 1);
    expect_pages(transport, odd, NUM_PAGES / 2);
    expect_pages(transport, one, 1);
    rk_transport_destroy(transport);
    pins_become(0);
}

static void misses_and_errors_carry_their_reason(void **state)
{
    (void)state;
    struct rk_transport *transport = connected();
    struct rk_pages pages = {0};
    struct rk_error error = {.text = ""};
    const struct rk_extent one = {0, 0, 0, 1};
    const struct rk_extent outside = {7, 0, 0, 1};
    struct rk_get get = get_of(&one, 1);
    get.generation = 2;
    assert_int_equal(get_one(transport, &get, WAIT_MS, &pages, &error), RK_MISS_STALE_GENERATION);
    get = get_of(&one, 1);
    get.page_bytes = 8192;
    assert_int_equal(get_one(transport, &get, WAIT_MS, &pages, &error), RK_MISS_FINGERPRINT);
    get = get_of(&outside, 1);
    assert_int_equal(get_one(transport, &get, WAIT_MS, &pages, &error), RK_ERR_INVALID);
    assert_string_equal(error.text, "extent 0 is outside");
    expect_pages(transport, &one, 1); /* None of it hurt the connection. */
    rk_transport_destroy(transport);
}

static void gets_in_a_batch(void **state)
{
    (void)state;
    struct rk_transport *reader = connected();
    a_batch_is_one_answer(reader, &arena.pages);
    rk_transport_destroy(reader);
    pins_become(0);
}

static void gets_of_what_is_damaged(void **state)
{
    (void)state;
    struct rk_transport *reader = connected();
    damage_on_the_way_is_a_miss(reader, &arena.pages);
    rk_transport_destroy(reader);
    pins_become(0);
}

static void puts_over_this_path(void **state)
{
    (void)state;
    struct rk_transport *reader = connected();
    puts_arrive_whole(reader, &arena.pages);
    a_failed_item_hurts_no_other(reader, &arena.pages);
    rk_transport_destroy(reader);
    pins_become(0);
}

/* ---- Peers that die or stop ---- */

struct peer {
    pid_t pid;
    FILE *in;
    FILE *out;
};

static void peer_start(struct peer *peer, char *const *arguments)
{
    int in[2];
    int out[2];
    posix_spawn_file_actions_t actions;
    char path[] = REDKNOT_BINARY_DIR "/tests/ucx_peer";
    char *argv[5] = {path};
    for (int i = 0; arguments[i]; i++) {
        argv[i + 1] = arguments[i];
    }
    assert_int_equal(pipe2(in, 02000000 /* O_CLOEXEC */), 0);
    assert_int_equal(pipe2(out, 02000000), 0);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    assert_int_equal(posix_spawn(&peer->pid, path, &actions, NULL, argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    peer->in = fdopen(in[1], "w");
    peer->out = fdopen(out[0], "r");
}

static void peer_end(struct peer *peer, int signal_number)
{
    if (signal_number != 0) {
        assert_int_equal(kill(peer->pid, signal_number), 0);
    }
    (void)fclose(peer->in);
    (void)fclose(peer->out);
    assert_int_equal(waitpid(peer->pid, NULL, 0), peer->pid);
}

static int peer_line(struct peer *peer)
{
    char line[64];
    assert_non_null(fgets(line, sizeof(line), peer->out));
    return (int)strtol(line, NULL, 10);
}

static int store_start(struct peer *peer)
{
    char serve[] = "serve";
    char *arguments[] = {serve, NULL};
    peer_start(peer, arguments);
    return peer_line(peer);
}

static void reader_start(struct peer *peer, int timeout_ms)
{
    char text[32];
    char timeout[16];
    (void)snprintf(text, sizeof(text), "127.0.0.1:%d", rk_ucx_server_port(arena.server));
    (void)snprintf(timeout, sizeof(timeout), "%d", timeout_ms);
    char read[] = "read";
    char *arguments[] = {read, text, timeout, NULL};
    peer_start(peer, arguments);
    (void)peer_line(peer); /* It has read once, and goes on. */
}

static void a_killed_store_is_noticed(void **state)
{
    (void)state;
    struct peer store;
    struct rk_pages pages = {0};
    enum rk_status status = RK_OK;
    const struct rk_extent all = {0, 0, 0, NUM_PAGES};
    int port = store_start(&store);
    struct rk_transport *transport = reader_connect(port, WAIT_MS, &status);
    assert_int_equal(status, RK_OK);
    struct rk_get get = get_of(&all, 1);
    assert_int_equal(get_one(transport, &get, WAIT_MS, &pages, NULL), RK_OK);
    rk_transport_release(transport, &pages, 1);
    peer_end(&store, SIGKILL);
    get = get_of(&all, 1);
    int64_t begin_ns = rk_clock_ns();
    assert_int_equal(get_one(transport, &get, WAIT_MS, &pages, NULL), RK_ERR_UNAVAILABLE);
    assert_true(rk_clock_ns() - begin_ns < WAIT_MS / 2 * INT64_C(1000000)); /* Not the deadline. */
    rk_transport_destroy(transport);
    assert_null(reader_connect(port, WAIT_MS, &status));
    assert_int_equal(status, RK_ERR_UNAVAILABLE);
}

static void a_stopped_store_costs_one_deadline(void **state)
{
    (void)state;
    struct peer store;
    struct rk_pages pages = {0};
    enum rk_status status = RK_OK;
    const struct rk_extent all = {0, 0, 0, NUM_PAGES};
    int port = store_start(&store);
    struct rk_transport *transport = reader_connect(port, WAIT_MS, &status);
    assert_int_equal(status, RK_OK);
    assert_int_equal(kill(store.pid, SIGSTOP), 0);
    struct rk_get get = get_of(&all, 1);
    enum rk_status late = get_one(transport, &get, 300, &pages, NULL);
    assert_int_equal(late, RK_ERR_DEADLINE);
    int64_t took_ms = 0;
    enum rk_status cancelled = get_one_cancelled(transport, &get, &took_ms);
    assert_true(cancelled == RK_ERR_CANCELLED || cancelled == RK_ERR_UNAVAILABLE);
    assert_true(took_ms < 1000);
    assert_null(reader_connect(port, 300, &status));
    assert_int_equal(status, RK_ERR_UNAVAILABLE);
    assert_int_equal(kill(store.pid, SIGCONT), 0);
    if (cancelled == RK_ERR_UNAVAILABLE ||
        get_one(transport, &get, WAIT_MS, &pages, NULL) != RK_OK) {
        rk_transport_destroy(transport); /* It stopped in the middle of a frame. */
        transport = reader_connect(port, WAIT_MS, &status);
        assert_int_equal(status, RK_OK);
    } else {
        rk_transport_release(transport, &pages, 1);
    }
    get = get_of(&all, 1); /* Late frames of the first get are not taken for these. */
    assert_int_equal(get_one(transport, &get, WAIT_MS, &pages, NULL), RK_OK);
    for (uint64_t i = 0; i < pages.num_pages; i++) {
        assert_true(rk_page_verify(&pages.pages[i], PAGE_BYTES));
    }
    rk_transport_release(transport, &pages, 1);
    rk_transport_destroy(transport);
    peer_end(&store, 0);
}

static void a_killed_reader_lets_go(void **state)
{
    (void)state;
    struct peer peer;
    reader_start(&peer, WAIT_MS);
    peer_end(&peer, SIGKILL);
    pins_become(0);
    struct rk_transport *transport = connected();
    const struct rk_extent one = {0, 0, 0, 1};
    expect_pages(transport, &one, 1);
    rk_transport_destroy(transport);
}

static void a_stopped_reader_is_cut_off(void **state)
{
    (void)state;
    struct peer peer;
    reader_start(&peer, 500);
    rk_clock_sleep_ms(20);
    assert_int_equal(kill(peer.pid, SIGSTOP), 0);
    pins_become(0); /* Though it never said so. */
    struct rk_transport *transport = connected();
    const struct rk_extent all = {0, 0, 0, NUM_PAGES};
    expect_pages(transport, &all, 1);
    rk_transport_destroy(transport);
    peer_end(&peer, SIGKILL);
}

/* ---- Many, and strange ones ---- */

static int open_descriptors(void)
{
    DIR *folder = opendir("/proc/self/fd");
    int count = 0;
    assert_non_null(folder);
    while (readdir(folder)) {
        count++;
    }
    closedir(folder);
    return count;
}

static void connections_come_and_go(void **state)
{
    (void)state;
    const struct rk_extent one = {0, 0, 0, 1};
    int before = 0;
    for (int i = 0; i < CONNECTS; i++) {
        struct rk_transport *transport = connected();
        if (i % 2) {
            expect_pages(transport, &one, 1);
        }
        rk_transport_destroy(transport);
        if (i == CONNECTS / 2) {
            before = open_descriptors();
        }
    }
    assert_true(open_descriptors() < before + CONNECTS / 4);
}

static void connections_are_bounded(void **state)
{
    (void)state;
    struct rk_transport *readers[CONNECTIONS];
    enum rk_status status = RK_OK;
    for (int i = 0; i < CONNECTIONS; i++) {
        readers[i] = connected();
    }
    assert_null(reader_connect(rk_ucx_server_port(arena.server), 2000, &status));
    assert_int_equal(status, RK_ERR_UNAVAILABLE);
    for (int i = 0; i < CONNECTIONS; i++) {
        rk_transport_destroy(readers[i]);
    }
}

static void another_answer_than_was_asked_for(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct rk_transport *reader = connected();
        another_answer_is_refused(reader, &arena.pages, i == 1);
        rk_transport_destroy(reader);
    }
}

static void another_store_than_was_looked_for(void **state)
{
    (void)state;
    const struct rk_transport_endpoint endpoint = {
        .grpc_address = "", .ucx_address = address_of(rk_ucx_server_port(arena.server))};
    another_store_is_refused(&endpoint, RK_PATH_UCX);
}

static void strangers_are_cut_off(void **state)
{
    (void)state;
    const struct ucx_hello good = {UCX_MAGIC, UCX_VERSION};
    const struct ucx_hello other = {UCX_MAGIC, UCX_VERSION + 1};
    const struct ucx_request get = {UCX_MAGIC, 1, WAIT_MS};
    struct __attribute__((packed)) {
        uint32_t num_items;
        struct wire_get get;
        struct rk_extent extents[2];
    } body = {.num_items = 1,
              .get = {.generation = 1, .page_bytes = PAGE_BYTES, .num_extents = 1000},
              .extents = {{0, 0, 0, 1}, {0, 0, 9, 3}}};
    struct stranger stranger;
    for (int kind = 0; kind < 6; kind++) {
        stranger_start(&stranger, address_of(rk_ucx_server_port(arena.server)));
        if (kind >= 2) {
            stranger_send(&stranger, UCX_HELLO, &good, sizeof(good), NULL, 0);
        }
        switch (kind) {
        case 0: /* another version */
            stranger_send(&stranger, UCX_HELLO, &other, sizeof(other), NULL, 0);
            break;
        case 1: /* no hello */
            stranger_send(&stranger, UCX_GET, &get, sizeof(get), &body, sizeof(body));
            break;
        case 2: /* more extents than were sent */
            stranger_send(&stranger, UCX_GET, &get, sizeof(get), &body, sizeof(body));
            break;
        case 3: /* an extent that ends before it begins */
            body.get.num_extents = 2;
            stranger_send(&stranger, UCX_GET, &get, sizeof(get), &body, sizeof(body));
            break;
        case 4: /* half a header */
            stranger_send(&stranger, UCX_GET, &get, 3, &body, sizeof(body));
            break;
        default: /* nothing asked for */
            stranger_send(&stranger, UCX_GET, &get, sizeof(get), NULL, 0);
            break;
        }
        stranger_is_cut(&stranger);
    }
    /* Frames that nobody knows are nothing to anybody. */
    for (unsigned id = 0; id < 65536; id = 2 * id + 5) {
        stranger_start(&stranger, address_of(rk_ucx_server_port(arena.server)));
        stranger_send(&stranger, id, &get, sizeof(get), &body, sizeof(body));
        stranger_end(&stranger);
    }
    /* And bytes that are no UCX at all. */
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                             .sin_port = htons((uint16_t)rk_ucx_server_port(arena.server))};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
    assert_true(send(fd, "GET / HTTP/1.0\r\n\r\n", 18, MSG_NOSIGNAL) == 18);
    struct rk_transport *transport = connected();
    const struct rk_extent one = {0, 0, 0, 1};
    expect_pages(transport, &one, 1);
    rk_transport_destroy(transport);
    close(fd);
}

/* Each form of an address: served, or refused with a reason, never half. */
static void addresses_of_every_form(void **state)
{
    static const struct {
        const char *listen;
        enum rk_status status;
    } forms[] = {{"127.0.0.1:0", RK_OK},
                 {"0.0.0.0:0", RK_OK},
                 {"localhost:0", RK_OK},
                 {"[::1]:0", RK_ERR_UNSUPPORTED},
                 {"[::]:0", RK_ERR_UNSUPPORTED},
                 {"[::ffff:127.0.0.1]:0", RK_OK},
                 {"127.0.0.1:65536", RK_ERR_INVALID},
                 {"no.such.host.invalid:0", RK_ERR_UNAVAILABLE},
                 {"nothing", RK_ERR_INVALID}};
    (void)state;
    for (size_t i = 0; i < sizeof(forms) / sizeof(forms[0]); i++) {
        const struct rk_ucx_server_options options = {.listen = forms[i].listen,
                                                      .arena = "",
                                                      .ops = &pinned_pages_ops,
                                                      .context = &arena.pages};
        struct rk_ucx_server *server = NULL;
        struct rk_error error = {.text = ""};
        enum rk_status status = rk_ucx_server_start(&options, &server, &error);
        if (status != forms[i].status) {
            fail_msg("%s: %s %s", forms[i].listen, rk_status_name(status), error.text);
        }
        assert_true(status == RK_OK || error.text[0] != '\0');
        rk_ucx_server_stop(status == RK_OK ? server : NULL);
    }
    const struct rk_transport_endpoint nowhere = {.grpc_address = "", .ucx_address = ""};
    struct rk_transport *none = NULL;
    struct rk_error why = {.text = ""};
    assert_int_equal(rk_transport_connect(&nowhere, RK_PATH_UCX, 1000, &none, &why),
                     RK_ERR_UNAVAILABLE);
    assert_non_null(strstr(why.text, "--ucx"));
    /* A reader does not try, either. */
    const struct rk_transport_endpoint endpoint = {.grpc_address = "", .ucx_address = "[::1]:7"};
    struct rk_transport *transport = NULL;
    assert_int_equal(rk_transport_connect(&endpoint, RK_PATH_UCX, WAIT_MS, &transport, NULL),
                     RK_ERR_UNSUPPORTED);
}

/* A store that ended first finds its port in the state TIME_WAIT. */
static void a_port_is_served_again(void **state)
{
    (void)state;
    char listen[32];
    struct rk_error error = {.text = ""};
    struct rk_ucx_server_options options = {
        .listen = "127.0.0.1:0", .arena = "", .ops = &pinned_pages_ops, .context = &arena.pages};
    struct rk_ucx_server *server = NULL;
    for (int round = 0; round < 3; round++) {
        enum rk_status status = rk_ucx_server_start(&options, &server, &error);
        if (status != RK_OK) {
            fail_msg("round %d: %s", round, error.text);
        }
        struct rk_transport *reader = reader_connect(rk_ucx_server_port(server), WAIT_MS, &status);
        assert_int_equal(status, RK_OK);
        (void)snprintf(listen, sizeof(listen), "127.0.0.1:%d", rk_ucx_server_port(server));
        options.listen = listen;
        rk_ucx_server_stop(server);
        rk_transport_destroy(reader);
    }
}

static const char *environment_value;

/* What was there stays as it was, where it was: other threads may be reading it. */
static void the_environment_only_grows(void **state)
{
    (void)state;
    assert_string_equal(getenv("UCX_LOG_LEVEL"), "error"); /* A user's own, see main(). */
    assert_ptr_equal(getenv("REDKNOT_TEST_UCX"), environment_value);
    /* Whether the library has read the rest, ucx_peer.c says: there nobody else handles signals. */
    assert_string_equal(getenv("UCX_ERROR_SIGNALS"), "");
}

static void nobody_listens_there(void **state)
{
    (void)state;
    struct rk_error error = {.text = ""};
    const struct rk_transport_endpoint endpoint = {
        .grpc_address = "", .host_id = "", .shm_socket = "", .ucx_address = "127.0.0.1:1"};
    struct rk_transport *transport = NULL;
    assert_int_equal(rk_transport_connect(&endpoint, RK_PATH_UCX, WAIT_MS, &transport, &error),
                     RK_ERR_UNAVAILABLE);
    assert_true(error.text[0] != '\0');
}

int main(void)
{
    (void)setenv("UCX_LOG_LEVEL", "error", 1);
    (void)setenv("REDKNOT_TEST_UCX", "1", 1);
    environment_value = getenv("REDKNOT_TEST_UCX");
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
#define WITH_SERVER(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
#define WITH_RENDEZVOUS(test)                                                                      \
    cmocka_unit_test_prestate_setup_teardown(test, set_up, tear_down, &arena)
    const struct CMUnitTest tests[] = {
        WITH_SERVER(bytes_are_those_of_the_store),
        WITH_RENDEZVOUS(bytes_are_those_of_the_store),
        WITH_RENDEZVOUS(gets_in_a_batch),
        WITH_RENDEZVOUS(gets_of_what_is_damaged),
        WITH_RENDEZVOUS(a_killed_reader_lets_go),
        WITH_SERVER(misses_and_errors_carry_their_reason),
        WITH_SERVER(gets_in_a_batch),
        WITH_SERVER(gets_of_what_is_damaged),
        WITH_SERVER(puts_over_this_path),
        WITH_SERVER(another_answer_than_was_asked_for),
        WITH_SERVER(another_store_than_was_looked_for),
        cmocka_unit_test(addresses_of_every_form),
        cmocka_unit_test(a_port_is_served_again),
        cmocka_unit_test(the_environment_only_grows),
        cmocka_unit_test(a_killed_store_is_noticed),
        cmocka_unit_test(a_stopped_store_costs_one_deadline),
        WITH_SERVER(a_killed_reader_lets_go),
        WITH_SERVER(a_stopped_reader_is_cut_off),
        WITH_SERVER(connections_come_and_go),
        WITH_SERVER(connections_are_bounded),
        WITH_SERVER(strangers_are_cut_off),
        cmocka_unit_test(nobody_listens_there),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
