/*
 * Goal:   the shm path gives the store's own bytes, read-only, pinned for just
 *         as long as the reader lives; and no reader can harm the server.
 * Method: a server over an arena with a counting pin; readers in this process,
 *         in forked ones that are killed, and raw sockets that send rubbish. A
 *         forked server that is stopped or killed stands for a sick store.
 */
#include "common/transport/transport.h"
#include "common/transport/wire_internal.h"
#include "tests/common/transport/one_get.h"
#include "tests/common/transport/path_checks.h"
#include "tests/common/transport/pinned_pages.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define PAGE_BYTES 4096u
#define NUM_PAGES  64u
#define WAIT_MS    10000

struct arena {
    int fd;
    struct pinned_pages pages;
    char folder[64];
    char socket[96];
    struct rk_shm_server *server;
};

static void server_start(struct arena *arena, uint32_t pins_max, uint32_t connections_max)
{
    const struct rk_shm_server_options options = {.socket_path = arena->socket,
                                                  .arena_fd = arena->fd,
                                                  .arena_bytes = NUM_PAGES * PAGE_BYTES,
                                                  .node_id = "store-2",
                                                  .incarnation = 5,
                                                  .connections_max = connections_max,
                                                  .pins_max = pins_max,
                                                  .pages_max = 2 * NUM_PAGES,
                                                  .ops = &pinned_pages_ops,
                                                  .context = &arena->pages};
    struct rk_error error = {0};
    enum rk_status status = rk_shm_server_start(&options, &arena->server, &error);
    if (status != RK_OK) {
        fail_msg("%s", error.text);
    }
}

static int set_up_arena(void **state)
{
    struct arena *arena = rk_alloc_zero(1, sizeof(*arena));
    size_t bytes = NUM_PAGES * PAGE_BYTES;
    snprintf(arena->folder, sizeof(arena->folder), "/tmp/redknot-test-XXXXXX");
    assert_non_null(mkdtemp(arena->folder));
    snprintf(arena->socket, sizeof(arena->socket), "%s/socket", arena->folder);
    arena->fd = memfd_create("arena", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_int_equal(ftruncate(arena->fd, (off_t)bytes), 0);
    arena->pages.page_bytes = PAGE_BYTES;
    arena->pages.num_pages = NUM_PAGES;
    arena->pages.path = RK_PATH_SHM;
    arena->pages.bytes = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, arena->fd, 0);
    assert_int_equal(
        fcntl(arena->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE), 0);
    for (size_t i = 0; i < bytes; i++) {
        arena->pages.bytes[i] = (uint8_t)(i * 31 + i / PAGE_BYTES);
    }
    *state = arena;
    return 0;
}

static int set_up(void **state)
{
    set_up_arena(state);
    server_start(*state, 4, 8);
    return 0;
}

static int tear_down(void **state)
{
    struct arena *arena = *state;
    rk_shm_server_stop(arena->server);
    assert_int_equal(atomic_load(&arena->pages.pins), 0); /* stop unpins all */
    munmap(arena->pages.bytes, NUM_PAGES * PAGE_BYTES);
    close(arena->fd);
    unlink(arena->socket);
    assert_int_equal(rmdir(arena->folder), 0);
    rk_free(arena);
    return 0;
}

static void pins_become(struct arena *arena, int wanted)
{
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    while (atomic_load(&arena->pages.pins) != wanted && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(1);
    }
    assert_int_equal(atomic_load(&arena->pages.pins), wanted);
}

static struct rk_transport *reader_connect(const struct arena *arena)
{
    struct rk_transport_endpoint endpoint = {
        .grpc_address = "", .host_id = rk_host_id(), .shm_socket = arena->socket};
    struct rk_transport *transport = NULL;
    struct rk_error error = {0};
    if (rk_transport_connect(&endpoint, RK_PATH_SHM, WAIT_MS, &transport, &error) != RK_OK) {
        return NULL;
    }
    return transport;
}

static struct rk_get get_of(const struct rk_extent *extents, size_t num_extents)
{
    return (struct rk_get){
        .generation = 1, .page_bytes = PAGE_BYTES, .extents = extents, .num_extents = num_extents};
}

static const struct rk_extent two_extents[] = {{0, 0, 60, 64}, {0, 0, 2, 4}};

static void bytes_are_those_of_the_store(void **state)
{
    struct arena *arena = *state;
    struct rk_transport *reader = reader_connect(arena);
    struct rk_pages pages = {0};
    struct rk_get get = get_of(two_extents, 2);
    const uint32_t expected[] = {60, 61, 62, 63, 2, 3};
    assert_non_null(reader);
    assert_int_equal(rk_transport_path(reader), RK_PATH_SHM);
    assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_OK);
    assert_int_equal(pages.num_pages, 6);
    assert_int_equal(pages.bytes, 6 * PAGE_BYTES);
    assert_int_equal(pages.tier, RK_TIER_DRAM);
    for (size_t i = 0; i < 6; i++) {
        assert_memory_equal(pages.pages[i].data, arena->pages.bytes + expected[i] * PAGE_BYTES,
                            PAGE_BYTES);
        assert_true(rk_page_verify(&pages.pages[i], PAGE_BYTES));
    }
    arena->pages.bytes[2 * PAGE_BYTES + 5] ^= 1; /* In place: the reader sees the store's damage. */
    assert_false(rk_page_verify(&pages.pages[4], PAGE_BYTES));
    assert_int_equal(atomic_load(&arena->pages.pins), 1);
    rk_transport_release(reader, &pages, 1);
    pins_become(arena, 0);
    rk_transport_destroy(reader);
}

static void misses_and_errors_carry_their_reason(void **state)
{
    struct rk_transport *reader = reader_connect(*state);
    struct rk_pages pages = {0};
    struct rk_error error = {0};
    const struct rk_extent outside = {7, 0, 0, 1};
    struct rk_get get = get_of(two_extents, 2);
    get.generation = 2;
    assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, &error), RK_MISS_STALE_GENERATION);
    get = get_of(two_extents, 2);
    get.page_bytes = 8192;
    assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, &error), RK_MISS_FINGERPRINT);
    get = get_of(&outside, 1);
    assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, &error), RK_ERR_INVALID);
    assert_string_equal(error.text, "extent 0 is outside");
    get = get_of(two_extents, 2);
    assert_int_equal(get_one(reader, &get, 0, &pages, &error), RK_ERR_DEADLINE);
    assert_null(pages.pages);
    rk_transport_destroy(reader);
}

static void the_mapping_is_read_only(void **state)
{
    struct rk_transport *reader = reader_connect(*state);
    struct rk_pages pages = {0};
    struct rk_get get = get_of(two_extents, 2);
    assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_OK);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); /* Not the sanitizer's report: the fault itself. */
        *(volatile uint8_t *)pages.pages[0].data = 1;
        _exit(0);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
    rk_transport_release(reader, &pages, 1);
    rk_transport_destroy(reader);
}

static void a_killed_reader_lets_go(void **state)
{
    struct arena *arena = *state;
    pid_t child = fork();
    if (child == 0) {
        struct rk_transport *reader = reader_connect(arena);
        struct rk_pages pages = {0};
        for (int i = 0; reader && i < 3; i++) {
            struct rk_get get = get_of(two_extents, 2);
            if (get_one(reader, &get, WAIT_MS, &pages, NULL) != RK_OK) {
                _exit(1);
            }
        }
        pause();
        _exit(0);
    }
    pins_become(arena, 3);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    pins_become(arena, 0);
}

static void pins_and_connections_are_bounded(void **state)
{
    struct arena *arena = *state;
    struct rk_transport *reader = reader_connect(arena);
    struct rk_pages pages[5] = {{0}};
    struct rk_get get = get_of(two_extents, 2);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages[i], NULL), RK_OK);
    }
    assert_int_equal(get_one(reader, &get, WAIT_MS, &pages[4], NULL), RK_ERR_FULL);
    rk_transport_release(reader, &pages[1], 1);
    assert_int_equal(get_one(reader, &get, WAIT_MS, &pages[4], NULL), RK_OK);
    struct rk_transport *others[8] = {NULL};
    int connected = 0;
    for (int i = 0; i < 8; i++) {
        others[i] = reader_connect(arena);
        connected += others[i] != NULL;
    }
    assert_int_equal(connected, 7);
    for (int i = 0; i < 8; i++) {
        rk_transport_destroy(others[i]);
    }
    for (int i = 0; i < 5; i++) {
        rk_transport_release(reader, &pages[i], 1);
    }
    rk_transport_destroy(reader);
}

static void gets_in_a_batch(void **state)
{
    struct rk_transport *reader = reader_connect(*state);
    a_batch_is_one_answer(reader, &((struct arena *)*state)->pages);
    rk_transport_destroy(reader);
    pins_become(*state, 0);
}

static void gets_of_what_is_damaged(void **state)
{
    struct rk_transport *reader = reader_connect(*state);
    damage_on_the_way_is_a_miss(reader, &((struct arena *)*state)->pages);
    rk_transport_destroy(reader);
    pins_become(*state, 0);
}

static void another_answer_than_was_asked_for(void **state)
{
    struct arena *arena = *state;
    for (int i = 0; i < 2; i++) {
        struct rk_transport *reader = reader_connect(arena);
        another_answer_is_refused(reader, &arena->pages, i == 1);
        rk_transport_destroy(reader);
    }
    pins_become(arena, 0);
}

static void another_store_than_was_looked_for(void **state)
{
    const struct rk_transport_endpoint endpoint = {.grpc_address = "",
                                                   .host_id = rk_host_id(),
                                                   .shm_socket = ((struct arena *)*state)->socket};
    another_store_is_refused(&endpoint, RK_PATH_SHM);
}

static void puts_over_this_path(void **state)
{
    struct rk_transport *reader = reader_connect(*state);
    puts_arrive_whole(reader, &((struct arena *)*state)->pages);
    a_failed_item_hurts_no_other(reader, &((struct arena *)*state)->pages);
    rk_transport_destroy(reader);
    pins_become(*state, 0);
}

/* ---- Rubbish ---- */

static int raw_connect(const struct arena *arena)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = WAIT_MS / 1000};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", arena->socket);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)), 0);
    return fd;
}

/* The server closes the connection; what it may have said before is skipped. */
static void is_dropped(int fd)
{
    char bytes[512];
    ssize_t got = 1;
    while (got > 0) {
        got = recv(fd, bytes, sizeof(bytes), 0);
    }
    assert_true(got == 0 || errno == ECONNRESET);
    close(fd);
}

static void raw_hello(int fd)
{
    struct shm_frame_header hello;
    char reply[sizeof(hello) + sizeof(struct shm_hello_reply)];
    shm_header_fill(&hello, SHM_HELLO, 1, 0);
    assert_int_equal(send(fd, &hello, sizeof(hello), 0), sizeof(hello));
    assert_int_equal(recv(fd, reply, sizeof(reply), MSG_WAITALL), sizeof(reply));
}

static void rubbish_drops_only_its_sender(void **state)
{
    struct arena *arena = *state;
    struct rk_transport *good = reader_connect(arena);
    struct {
        struct shm_frame_header header;
        uint32_t num_items;
        struct wire_get body;
        struct rk_extent extent;
    } __attribute__((packed)) frame;
    for (int kind = 0; kind < 8; kind++) {
        int fd = raw_connect(arena);
        memset(&frame, 0, sizeof(frame));
        shm_header_fill(&frame.header, SHM_GET, 1, sizeof(frame) - sizeof(frame.header));
        frame.num_items = 1;
        frame.body.num_extents = 1;
        frame.body.generation = 1;
        frame.body.page_bytes = PAGE_BYTES;
        frame.extent.page_end = 1;
        if (kind != 0) { /* 0: a get before hello */
            raw_hello(fd);
        }
        switch (kind) {
        case 1:
            memset(&frame, 0xee, sizeof(frame));
            break;
        case 2:
            frame.header.body_bytes = UINT32_MAX;
            break;
        case 3:
            frame.body.num_extents = UINT32_MAX;
            break;
        case 4:
            frame.extent.page_end = UINT32_MAX;
            break;
        case 5:
            frame.header.type = SHM_FOUND;
            break;
        case 6:
            frame.header.type = SHM_RELEASE;
            break;
        case 7:
            frame.header.version = 77;
            break;
        default:
            break;
        }
        assert_int_equal(send(fd, &frame, sizeof(frame), MSG_NOSIGNAL), sizeof(frame));
        is_dropped(fd);
    }
    struct rk_pages pages = {0};
    struct rk_get get = get_of(two_extents, 2);
    assert_int_equal(get_one(good, &get, WAIT_MS, &pages, NULL), RK_OK);
    rk_transport_release(good, &pages, 1);
    rk_transport_destroy(good);
}

/* One whole reply, whose request had one item; its status' name. */
static void raw_reply(int fd, char ret_text[WIRE_TEXT_MAX])
{
    struct shm_frame_header header;
    struct wire_found found;
    uint8_t body[4096];
    struct wire_reader reader = {body, 0};
    uint32_t count = 0;
    assert_int_equal(recv(fd, &header, sizeof(header), MSG_WAITALL), sizeof(header));
    assert_int_equal(header.type, SHM_FOUND);
    assert_true(header.body_bytes <= sizeof(body));
    assert_int_equal(recv(fd, body, header.body_bytes, MSG_WAITALL), header.body_bytes);
    reader.left = header.body_bytes;
    assert_true(wire_take(&reader, &count, sizeof(count)) && count == 1);
    assert_true(wire_take(&reader, &found, sizeof(found)));
    ret_text[0] = '\0';
    if (found.text_bytes > 0) {
        assert_true(found.text_bytes < WIRE_TEXT_MAX && found.text_bytes == reader.left);
        memcpy(ret_text, reader.at, found.text_bytes);
        ret_text[found.text_bytes] = '\0';
        ret_text[strcspn(ret_text, " ")] = '\0';
    }
}

struct raw_get {
    struct shm_frame_header header;
    uint32_t num_items;
    struct wire_get body;
    struct rk_extent extent;
} __attribute__((packed));

static struct raw_get raw_get_all(void)
{
    struct raw_get frame = {.num_items = 1, .body = {.num_extents = 1, .generation = 1}};
    shm_header_fill(&frame.header, SHM_GET, 1, sizeof(frame) - sizeof(frame.header));
    frame.body.page_bytes = PAGE_BYTES;
    frame.extent.page_end = NUM_PAGES / 4;
    return frame;
}

/* Each gets its answer, the first ones their pins; a refusal never costs what was pinned before. */
static void a_flood_is_answered(void **state)
{
    struct arena *arena = *state;
    int fd = raw_connect(arena);
    const struct raw_get frame = raw_get_all();
    char text[WIRE_TEXT_MAX];
    raw_hello(fd);
    for (int i = 0; i < 50; i++) {
        assert_int_equal(send(fd, &frame, sizeof(frame), MSG_NOSIGNAL), sizeof(frame));
    }
    for (int i = 0; i < 200; i++) {
        raw_reply(fd, text);
        assert_string_equal(text, i < 4 ? "" : rk_status_name(RK_ERR_FULL));
        if (i < 150) {
            assert_int_equal(send(fd, &frame, sizeof(frame), MSG_NOSIGNAL), sizeof(frame));
        }
        assert_true(i < 4 || atomic_load(&arena->pages.pins) == 4);
    }
    close(fd);
    pins_become(arena, 0);
}

/* It goes on reading what it has mapped, whatever it said: its pins end with it alone. */
static void pins_outlive_a_protocol_error(void **state)
{
    struct arena *arena = *state;
    for (int kind = 0; kind < 4; kind++) {
        int fd = raw_connect(arena);
        const struct raw_get good = raw_get_all();
        struct raw_get bad = good;
        char text[WIRE_TEXT_MAX];
        char byte = 0;
        raw_hello(fd);
        for (int i = 0; i < 3; i++) {
            assert_int_equal(send(fd, &good, sizeof(good), MSG_NOSIGNAL), sizeof(good));
            raw_reply(fd, text);
        }
        assert_int_equal(atomic_load(&arena->pages.pins), 3);
        switch (kind) {
        case 0:
            memset(&bad, 0xee, sizeof(bad));
            break;
        case 1:
            bad.header.type = SHM_RELEASE;
            break;
        case 2:
            bad.body.num_extents = UINT32_MAX;
            break;
        default:
            assert_int_equal(shutdown(fd, SHUT_WR), 0); /* An end that is half closed lives. */
            break;
        }
        if (kind < 3) {
            assert_int_equal(send(fd, &bad, sizeof(bad), MSG_NOSIGNAL), sizeof(bad));
            assert_int_equal(recv(fd, &byte, 1, 0), 0); /* It is told. */
            (void)send(fd, &good, sizeof(good), MSG_NOSIGNAL);
        }
        struct rk_transport *other = reader_connect(arena); /* After it was dealt with. */
        assert_non_null(other);
        rk_clock_sleep_ms(50);
        assert_int_equal(atomic_load(&arena->pages.pins), 3);
        rk_transport_destroy(other);
        close(fd);
        pins_become(arena, 0);
    }
}

static void random_bytes_never_crash(void **state)
{
    struct arena *arena = *state;
    unsigned seed = (unsigned)rk_clock_ns();
    print_message("seed %u\n", seed);
    for (int round = 0; round < 200; round++) {
        uint8_t bytes[256];
        int fd = raw_connect(arena);
        if (round % 2) {
            raw_hello(fd);
        }
        for (size_t i = 0; i < sizeof(bytes); i++) {
            bytes[i] = (uint8_t)rand_r(&seed);
        }
        struct shm_frame_header header;
        shm_header_fill(&header, (enum shm_frame_type)(1 + rand_r(&seed) % 10), 1,
                        (size_t)rand_r(&seed) % 300);
        memcpy(bytes, &header, round % 4 ? sizeof(header) : 4);
        ssize_t sent = send(fd, bytes, sizeof(bytes), MSG_NOSIGNAL);
        assert_true(sent != 0);
        close(fd);
    }
    struct rk_transport *good = reader_connect(arena);
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    while (!good && rk_deadline_left_ms(deadline_ns) > 0) {
        good = reader_connect(arena); /* The last of them may still hold places. */
    }
    assert_non_null(good);
    rk_transport_destroy(good);
}

/* ---- A sick store ---- */

/* A server in a process of its own. */
static pid_t server_fork(struct arena *arena, uint32_t pins_max)
{
    int ready[2];
    char byte = 0;
    assert_int_equal(pipe(ready), 0);
    pid_t child = fork();
    if (child == 0) {
        server_start(arena, pins_max, 8);
        if (write(ready[1], "r", 1) == 1) {
            pause();
        }
        _exit(0);
    }
    assert_int_equal(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    close(ready[1]);
    return child;
}

static void a_stopped_store_is_a_miss_in_time(void **state)
{
    struct arena *arena = *state;
    pid_t child = server_fork(arena, 5);
    struct rk_transport *reader = reader_connect(arena);
    struct rk_pages held = {0};
    struct rk_pages pages = {0};
    struct rk_get get = get_of(two_extents, 2);
    assert_int_equal(get_one(reader, &get, WAIT_MS, &held, NULL), RK_OK);
    kill(child, SIGSTOP);
    int stopped = 0;
    assert_int_equal(waitpid(child, &stopped, WUNTRACED), child); /* It takes effect later. */
    assert_true(WIFSTOPPED(stopped));
    for (int i = 0; i < 3; i++) {
        assert_int_equal(get_one(reader, &get, 30, &pages, NULL), RK_ERR_DEADLINE);
    }
    struct rk_transport_endpoint endpoint = {
        .grpc_address = "", .host_id = "", .shm_socket = arena->socket};
    struct rk_transport *second = NULL;
    assert_int_equal(rk_transport_connect(&endpoint, RK_PATH_SHM, 30, &second, NULL),
                     RK_ERR_UNAVAILABLE);
    kill(child, SIGCONT);
    /* Late replies are passed over and their pins given back: else the second get would find
     * all five pins taken. */
    for (int i = 0; i < 4; i++) {
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_OK);
        assert_memory_equal(pages.pages[4].data, arena->pages.bytes + 2 * PAGE_BYTES, PAGE_BYTES);
        rk_transport_release(reader, &pages, 1);
    }
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_ERR_UNAVAILABLE);
    /* What is held stays readable: the mapping outlives the store. */
    assert_true(rk_page_verify(&held.pages[0], PAGE_BYTES));
    rk_transport_release(reader, &held, 1);
    rk_transport_destroy(reader);
    /* A socket nobody listens on is replaced. */
    server_start(arena, 4, 8);
}

static void store_stop(pid_t child)
{
    int stopped = 0;
    kill(child, SIGSTOP);
    assert_int_equal(waitpid(child, &stopped, WUNTRACED), child); /* It takes effect later. */
    assert_true(WIFSTOPPED(stopped));
}

/* More frames than a socket takes: what is given back is kept, and costs no connection. */
static void releases_wait_for_a_store_that_is_behind(void **state)
{
    enum { PINS = 3000 };
    static struct rk_pages pages[PINS];
    struct arena *arena = *state;
    pid_t child = server_fork(arena, PINS);
    struct rk_transport *reader = reader_connect(arena);
    const struct rk_extent one = {0, 0, 3, 4};
    struct rk_get get = get_of(&one, 1);
    for (int round = 0; round < 2; round++) { /* The second time only if all came back. */
        for (int i = 0; i < PINS; i++) {
            assert_int_equal(get_one(reader, &get, WAIT_MS, &pages[i], NULL), RK_OK);
        }
        store_stop(child);
        int64_t begin_ns = rk_clock_ns();
        for (int i = 0; i < PINS; i++) {
            rk_transport_release(reader, &pages[i], 1);
        }
        assert_true(rk_clock_ns() - begin_ns < INT64_C(1000000000));
        assert_int_equal(get_one(reader, &get, 30, &pages[0], NULL), RK_ERR_DEADLINE);
        assert_true(rk_transport_alive(reader));
        assert_false(rk_transport_flush(reader));
        kill(child, SIGCONT);
        int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
        while (!rk_transport_flush(reader)) {
            assert_true(rk_deadline_left_ms(deadline_ns) > 0);
        }
    }
    /* A put has the same way before it. */
    for (int i = 0; i < PINS; i++) {
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages[i], NULL), RK_OK);
    }
    store_stop(child);
    for (int i = 0; i < PINS; i++) {
        rk_transport_release(reader, &pages[i], 1);
    }
    kill(child, SIGCONT);
    const void *put_pages[] = {arena->pages.bytes};
    const struct pinned_head head = {.bytes = 4096, .page_bytes = 4096};
    struct rk_put put = {.head = &head,
                         .head_bytes = sizeof(head),
                         .pages = put_pages,
                         .num_pages = 1,
                         .page_bytes = 4096,
                         .bytes = 4096};
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(WAIT_MS)};
    assert_int_equal(rk_transport_put(reader, &put, 1, &until, NULL), RK_OK);
    assert_int_equal(put.status, RK_OK);
    rk_transport_destroy(reader);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    server_start(arena, 4, 8);
}

/* ---- Descriptors ---- */

static int descriptors_open(void)
{
    int count = 0;
    for (int fd = 0; fd < 1024; fd++) {
        count += fcntl(fd, F_GETFD) >= 0;
    }
    return count;
}

/* These bytes, with so many descriptors beside them. */
static void raw_send_beside(int fd, const void *data, size_t bytes, int beside, size_t num_fds)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(253 * sizeof(int))];
    } control = {.bytes = {0}};
    struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = bytes};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = CMSG_SPACE(num_fds * sizeof(int))};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(num_fds * sizeof(int));
    for (size_t i = 0; i < num_fds; i++) {
        memcpy(CMSG_DATA(rights) + i * sizeof(int), &beside, sizeof(int));
    }
    (void)sendmsg(fd, &message, MSG_NOSIGNAL);
}

static void raw_send_with(int fd, const void *data, size_t bytes, size_t num_fds)
{
    raw_send_beside(fd, data, bytes, fd, num_fds);
}

static void descriptors_beside_frames_are_closed(void **state)
{
    static const size_t counts[] = {1, 2, 3, 100, 253};
    struct arena *arena = *state;
    const struct raw_get frame = raw_get_all();
    struct rk_transport *first =
        reader_connect(arena); /* The server's own are open from then on. */
    assert_non_null(first);
    const int before = descriptors_open();
    for (int round = 0; round < 20; round++) {
        for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
            int fd = raw_connect(arena);
            raw_hello(fd);
            if (round % 2) { /* In the middle of a frame. */
                raw_send_with(fd, &frame, 5, counts[i]);
                raw_send_with(fd, (const uint8_t *)&frame + 5, sizeof(frame) - 5, counts[i]);
            } else {
                raw_send_with(fd, &frame, sizeof(frame), counts[i]);
            }
            close(fd);
        }
    }
    struct rk_transport *reader = reader_connect(arena);
    puts_arrive_whole(reader, &arena->pages); /* The one descriptor that is wanted. */
    rk_transport_destroy(reader);
    pins_become(arena, 0);
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    while (descriptors_open() > before && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(1);
    }
    assert_int_equal(descriptors_open(), before);
    rk_transport_destroy(first);
}

static unsigned lines_of(const char *path, const char *event)
{
    char line[512];
    unsigned count = 0;
    FILE *log = fopen(path, "r");
    while (log && fgets(line, sizeof(line), log)) {
        count += strstr(line, event) != NULL;
    }
    if (log) {
        (void)fclose(log);
    }
    return count;
}

/* Nobody is kept waiting, the readers that there are least of all, and the log is not flooded. */
static void no_descriptor_left(void **state)
{
    struct arena *arena = *state;
    char log[128];
    char byte = 0;
    int ready[2];
    int fds[30];
    snprintf(log, sizeof(log), "%s/log", arena->folder);
    assert_int_equal(pipe(ready), 0);
    pid_t child = fork();
    if (child == 0) {
        int out = open(log, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        (void)dup2(out, STDERR_FILENO);
        rk_log_init("test", RK_LOG_LEVEL_INFO);
        server_start(arena, 4, 64);
        struct rlimit limit = {0};
        int next = dup(0);
        close(next);
        (void)getrlimit(RLIMIT_NOFILE, &limit);
        limit.rlim_cur = (rlim_t)next + 16;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
        if (write(ready[1], "r", 1) == 1) {
            pause();
        }
        _exit(0);
    }
    assert_int_equal(read(ready[0], &byte, 1), 1);
    close(ready[0]);
    close(ready[1]);
    struct rk_transport *reader = reader_connect(arena);
    struct rk_get get = get_of(two_extents, 2);
    struct rk_pages pages;
    int64_t deadline_ns = rk_deadline_in_ms(1000);
    int64_t slowest_ns = 0;
    while (rk_deadline_left_ms(deadline_ns) > 0) {
        for (int i = 0; i < 30; i++) {
            fds[i] = raw_connect(arena);
        }
        for (int i = 0; i < 100; i++) {
            int64_t begin_ns = rk_clock_ns();
            assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_OK);
            rk_transport_release(reader, &pages, 1);
            int64_t took_ns = rk_clock_ns() - begin_ns;
            slowest_ns = took_ns > slowest_ns ? took_ns : slowest_ns;
        }
        is_dropped(fds[29]); /* Told at once, or within the pause. */
        for (int i = 0; i < 29; i++) {
            close(fds[i]);
        }
    }
    print_message("slowest get %lld us\n", (long long)slowest_ns / 1000);
    struct rk_transport *later = reader_connect(arena); /* There are descriptors again. */
    for (int i = 0; i < 100 && !later; i++) {
        rk_clock_sleep_ms(20);
        later = reader_connect(arena);
    }
    assert_non_null(later);
    rk_transport_destroy(later);
    rk_transport_destroy(reader);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    unsigned lines = lines_of(log, "shm_reader_refused");
    assert_true(lines >= 1 && lines <= 2);
    assert_int_equal(unlink(log), 0);
    server_start(arena, 4, 8);
}

/* Whoever puts something and goes is no stranger, and the log does not say so. */
static void going_after_a_put_is_no_fault(void **state)
{
    struct arena *arena = *state;
    struct __attribute__((packed)) {
        struct shm_frame_header header;
        struct shm_outbox outbox;
        struct shm_frame_header put_header;
        uint32_t count;
        uint32_t head_bytes;
        struct pinned_head head; /* of 0 bytes: its answer comes at once */
    } frames = {.outbox.bytes = 4096, .count = 1, .head_bytes = sizeof(frames.head)};
    char log[128];
    shm_header_fill(&frames.header, SHM_OUTBOX, 0, sizeof(frames.outbox));
    shm_header_fill(&frames.put_header, SHM_PUT, 1,
                    sizeof(uint32_t) * 2 + sizeof(struct pinned_head));
    snprintf(log, sizeof(log), "%s/log", arena->folder);
    int stderr_before = dup(STDERR_FILENO);
    int out = open(log, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(dup2(out, STDERR_FILENO) >= 0);
    rk_log_init("test", RK_LOG_LEVEL_INFO);
    int outbox = memfd_create("outbox", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_int_equal(ftruncate(outbox, 4096), 0);
    assert_int_equal(fcntl(outbox, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    int fd = raw_connect(arena);
    raw_hello(fd);
    raw_send_beside(fd, &frames, sizeof(frames), outbox, 1);
    assert_int_equal(shutdown(fd, SHUT_WR), 0);
    is_dropped(fd);
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
    assert_true(dup2(stderr_before, STDERR_FILENO) >= 0);
    assert_int_equal(lines_of(log, "shm_reader_dropped"), 0);
    close(stderr_before);
    close(out);
    close(outbox);
    assert_int_equal(unlink(log), 0);
}

/* A store that hands over more than its memory. */
static void more_than_an_arena_is_refused(void **state)
{
    struct arena *arena = *state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", arena->socket);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(listener, 4), 0);
    pid_t child = fork();
    for (int round = 0; child == 0 && round < 3; round++) {
        struct __attribute__((packed)) {
            struct shm_frame_header header;
            struct shm_hello_reply body;
        } reply = {.body.arena_bytes = 4096};
        shm_header_fill(&reply.header, SHM_HELLO_REPLY, 0, sizeof(reply.body));
        int fd = accept(listener, NULL, NULL);
        char hello[sizeof(reply.header)];
        if (recv(fd, hello, sizeof(hello), MSG_WAITALL) == (ssize_t)sizeof(hello)) {
            raw_send_with(fd, &reply, sizeof(reply), (size_t)round + 1);
        }
        close(fd);
    }
    if (child == 0) {
        _exit(0);
    }
    close(listener);
    const int before = descriptors_open();
    for (int round = 0; round < 3; round++) {
        assert_null(reader_connect(arena));
        assert_int_equal(descriptors_open(), before);
    }
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_int_equal(unlink(arena->socket), 0);
    server_start(arena, 4, 8);
}

static void the_socket_is_private_and_single(void **state)
{
    struct arena *arena = *state;
    struct stat info;
    struct rk_shm_server *second = NULL;
    struct rk_error error = {0};
    assert_int_equal(lstat(arena->socket, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0600);
    struct rk_shm_server_options options = {.socket_path = arena->socket,
                                            .arena_fd = arena->fd,
                                            .arena_bytes = NUM_PAGES * PAGE_BYTES,
                                            .ops = &pinned_pages_ops,
                                            .context = &arena->pages};
    assert_int_equal(rk_shm_server_start(&options, &second, &error), RK_ERR_EXISTS);
    char path[200];
    memset(path, 'x', sizeof(path));
    path[sizeof(path) - 1] = '\0';
    options.socket_path = path;
    assert_int_equal(rk_shm_server_start(&options, &second, &error), RK_ERR_INVALID);
    assert_null(second);
}

static void start_survives_each_failed_allocation(void **state)
{
    struct arena *arena = *state;
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    for (; status != RK_OK; failures++) {
        struct rk_shm_server_options options = {.socket_path = arena->socket,
                                                .arena_fd = arena->fd,
                                                .arena_bytes = NUM_PAGES * PAGE_BYTES,
                                                .ops = &pinned_pages_ops,
                                                .context = &arena->pages};
        rk_alloc_fail_after(failures);
        status = rk_shm_server_start(&options, &arena->server, NULL);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
    }
    rk_alloc_fail_after(-1);
    assert_true(failures > 5);
}

int main(void)
{
#define SERVED(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
#define ALONE(test)  cmocka_unit_test_setup_teardown(test, set_up_arena, tear_down)
    const struct CMUnitTest tests[] = {
        SERVED(bytes_are_those_of_the_store),
        SERVED(misses_and_errors_carry_their_reason),
        SERVED(gets_in_a_batch),
        SERVED(gets_of_what_is_damaged),
        SERVED(another_answer_than_was_asked_for),
        SERVED(another_store_than_was_looked_for),
        SERVED(puts_over_this_path),
        SERVED(the_mapping_is_read_only),
        SERVED(a_killed_reader_lets_go),
        SERVED(pins_and_connections_are_bounded),
        SERVED(rubbish_drops_only_its_sender),
        SERVED(a_flood_is_answered),
        SERVED(pins_outlive_a_protocol_error),
        SERVED(random_bytes_never_crash),
        SERVED(the_socket_is_private_and_single),
        ALONE(a_stopped_store_is_a_miss_in_time),
        ALONE(releases_wait_for_a_store_that_is_behind),
        SERVED(descriptors_beside_frames_are_closed),
        ALONE(more_than_an_arena_is_refused),
        ALONE(no_descriptor_left),
        SERVED(going_after_a_put_is_no_fault),
        ALONE(start_survives_each_failed_allocation),
    };
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
