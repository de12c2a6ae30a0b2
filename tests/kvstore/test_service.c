/*
 * Goal:   a real store process serves puts and gets on both paths with the same
 *         bytes, says why it misses, notices damage, and starts only as asked.
 * Method: redknot-kvstore on free ports; its ready line tells where it is.
 */
#include "tests/common/transport/one_get.h"
#include "tests/kvstore/put_client.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/transport/transport.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define WAIT_MS 20000
#define PROGRAM REDKNOT_BINARY_DIR "/bin/redknot-kvstore"

struct daemon {
    pid_t pid;
    int log_fd;
    char address[64];
    char folder[64];
    char socket[96];
    struct rk_rpc_channel *channel;
};

/* Its standard error, line by line, until `wanted` stands in one. False: it ended first. */
static bool log_wait(int fd, const char *wanted, char *ret_line, size_t line_bytes)
{
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    size_t used = 0;
    for (;;) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (poll(&ready, 1, rk_deadline_left_ms(deadline_ns)) != 1 ||
            read(fd, ret_line + used, 1) != 1) {
            return false;
        }
        if (ret_line[used] == '\n' || used + 2 == line_bytes) {
            ret_line[used] = '\0';
            if (strstr(ret_line, wanted)) {
                return true;
            }
            used = 0;
        } else {
            used++;
        }
    }
}

static pid_t program_start(const char *const *arguments, int *ret_log_fd)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* A failed test leaves nothing behind. */
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        execv(PROGRAM, (char *const *)arguments);
        _exit(127);
    }
    close(ends[1]);
    *ret_log_fd = ends[0];
    return pid;
}

static int set_up(void **state)
{
    struct daemon *daemon = rk_alloc_zero(1, sizeof(*daemon));
    char line[1024];
    snprintf(daemon->folder, sizeof(daemon->folder), "/tmp/redknot-test-XXXXXX");
    assert_non_null(mkdtemp(daemon->folder));
    snprintf(daemon->socket, sizeof(daemon->socket), "%s/s", daemon->folder);
    const char *arguments[] = {
        PROGRAM, "--listen",     "127.0.0.1:0",  "--metrics",    "",  "--dram",
        "1MiB",  "--shm-socket", daemon->socket, "--scrub-rate", "1", "--enable-fault-injection",
        NULL};
    daemon->pid = program_start(arguments, &daemon->log_fd);
    assert_true(log_wait(daemon->log_fd, "event=ready", line, sizeof(line)));
    assert_int_equal(sscanf(strstr(line, "address="), "address=%63s", daemon->address), 1);
    assert_int_equal(rk_rpc_channel_create(daemon->address, &daemon->channel, NULL), RK_OK);
    *state = daemon;
    return 0;
}

static int tear_down(void **state)
{
    struct daemon *daemon = *state;
    int status = 0;
    rk_rpc_channel_destroy(daemon->channel);
    if (daemon->pid > 0) {
        kill(daemon->pid, SIGTERM);
        assert_int_equal(waitpid(daemon->pid, &status, 0), daemon->pid);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    close(daemon->log_fd);
    unlink(daemon->socket);
    rmdir(daemon->folder);
    rk_free(daemon);
    return 0;
}

static struct rk_transport *reader_connect(const struct daemon *daemon, enum rk_path path)
{
    struct rk_transport *reader = NULL;
    struct rk_transport_endpoint endpoint = {
        .grpc_address = daemon->address, .host_id = rk_host_id(), .shm_socket = daemon->socket};
    assert_int_equal(rk_transport_connect(&endpoint, path, WAIT_MS, &reader, NULL), RK_OK);
    return reader;
}

static struct rk_get get_of(const struct kvstore_header *header, const struct rk_extent *extents,
                            size_t num_extents)
{
    return (struct rk_get){.id = header->segment_id,
                           .fingerprint = header->fingerprint,
                           .generation = header->generation,
                           .page_bytes = (uint32_t)rk_kv_page_bytes(&header->layout),
                           .extents = extents,
                           .num_extents = num_extents};
}

static void stored(const struct daemon *daemon, const struct kvstore_header *header)
{
    struct kvstore_name name = shard_name(header);
    assert_int_equal(client_put(daemon->channel, header, -1), RK_OK);
    assert_int_equal(client_end(daemon->channel, "CommitShard", &name), RK_OK);
}

static const enum rk_path both_paths[] = {RK_PATH_SHM, RK_PATH_GRPC};

/* 2 heads x 2 layers x 16 pages; heads (1, 0) and (0, 1) in part. */
static const struct rk_extent parts[] = {{1, 0, 3, 16}, {0, 1, 0, 2}};

static void both_paths_give_the_same_bytes(void **state)
{
    struct daemon *daemon = *state;
    struct kvstore_header header = shard_header(1, 1, 64 * 16);
    stored(daemon, &header);
    for (size_t p = 0; p < 2; p++) {
        struct rk_transport *reader = reader_connect(daemon, both_paths[p]);
        struct rk_get get = get_of(&header, parts, 2);
        struct rk_pages pages = {0};
        uint8_t expected[4096];
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_OK);
        assert_int_equal(pages.num_pages, 15);
        assert_int_equal(rk_transport_path(reader), both_paths[p]);
        for (uint64_t i = 0; i < 15; i++) {
            uint64_t page = i < 13 ? 2 * 16 + 3 + i : 16 + (i - 13);
            assert_int_equal(shard_page_fill(&header, page, expected), pages.pages[i].checksum);
            assert_memory_equal(pages.pages[i].data, expected, sizeof(expected));
        }
        rk_transport_release(reader, &pages, 1);
        rk_transport_destroy(reader);
    }
}

static void both_paths_give_the_same_reasons(void **state)
{
    struct daemon *daemon = *state;
    struct kvstore_header header = shard_header(1, 5, 64 * 16);
    struct kvstore_header other = shard_header(2, 5, 64 * 40); /* 160 of 256 pages */
    stored(daemon, &header);
    for (size_t p = 0; p < 2; p++) {
        struct rk_transport *reader = reader_connect(daemon, both_paths[p]);
        struct rk_pages pages = {0};
        const struct rk_extent outside = {1, 0, 15, 17};
        struct rk_get get = get_of(&header, parts, 2);
        get.generation = 4;
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_MISS_STALE_GENERATION);
        get = get_of(&header, parts, 2);
        get.fingerprint.bytes[3] ^= 1;
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_MISS_FINGERPRINT);
        get = get_of(&header, parts, 2);
        get.page_bytes = 8192;
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_MISS_FINGERPRINT);
        get = get_of(&header, &outside, 1);
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_ERR_INVALID);
        get = get_of(&other, parts, 2);
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_MISS_ABSENT);
        rk_transport_destroy(reader);
    }
    struct kvstore_header third = shard_header(3, 5, 64 * 40);
    stored(daemon, &other);
    stored(daemon, &third);
    for (size_t p = 0; p < 2; p++) {
        struct rk_transport *reader = reader_connect(daemon, both_paths[p]);
        struct rk_pages pages = {0};
        struct rk_get get = get_of(&header, parts, 2);
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_MISS_EVICTED);
        rk_transport_destroy(reader);
    }
}

static void a_bad_put_is_refused(void **state)
{
    struct daemon *daemon = *state;
    struct kvstore_header header = shard_header(1, 1, 64);
    struct kvstore_header wrong = shard_header(1, 0, 64);
    struct kvstore_name name = shard_name(&header);
    assert_int_equal(client_put(daemon->channel, &header, 2), RK_ERR_CORRUPT);
    assert_int_equal(client_end(daemon->channel, "CommitShard", &name), RK_ERR_NOT_FOUND);
    assert_int_equal(client_put(daemon->channel, &wrong, -1), RK_ERR_INVALID);
    assert_int_equal(client_end(daemon->channel, "AbortShard", &name), RK_OK);
    stored(daemon, &header);
    assert_int_equal(client_put(daemon->channel, &header, -1), RK_ERR_EXISTS);
    assert_int_equal(client_end(daemon->channel, "DropShard", &name), RK_OK);
    assert_int_equal(client_end(daemon->channel, "DropShard", &name), RK_OK);

    Redknot__V1__StoreStatusRequest request = REDKNOT__V1__STORE_STATUS_REQUEST__INIT;
    struct ProtobufCMessage *message = NULL;
    request.with_shards = 1;
    assert_int_equal(rk_rpc_unary(daemon->channel, "/redknot.v1.KvStore/StoreStatus", &request.base,
                                  &redknot__v1__store_status_reply__descriptor, WAIT_MS, &message,
                                  NULL),
                     RK_OK);
    const Redknot__V1__StoreStatusReply *reply = (const Redknot__V1__StoreStatusReply *)message;
    assert_int_equal(reply->used_bytes, 0);
    assert_int_equal(reply->num_staged, 0);
    assert_int_equal(reply->capacity_bytes, 1 << 20);
    rk_rpc_message_free(message);
}

/* In pages, so that no reply is too long for a message; what goes in between is no stumbling block.
 */
static void status_comes_in_pages(void **state)
{
    struct daemon *daemon = *state;
    Redknot__V1__StoreStatusRequest request = REDKNOT__V1__STORE_STATUS_REQUEST__INIT;
    uint8_t after[64];
    uint8_t last[RK_ID_BYTES] = {0};
    int count = 0;
    for (uint32_t i = 1; i <= 7; i++) {
        struct kvstore_header header = shard_header(i, 1, 64);
        stored(daemon, &header);
    }
    request.with_shards = 1;
    request.shards_max = 2;
    do {
        struct ProtobufCMessage *message = NULL;
        assert_int_equal(rk_rpc_unary(daemon->channel, "/redknot.v1.KvStore/StoreStatus",
                                      &request.base, &redknot__v1__store_status_reply__descriptor,
                                      WAIT_MS, &message, NULL),
                         RK_OK);
        const Redknot__V1__StoreStatusReply *reply = (const Redknot__V1__StoreStatusReply *)message;
        assert_true(reply->n_shards <= 2 && reply->next_after.len <= sizeof(after));
        for (size_t i = 0; i < reply->n_shards; i++) {
            assert_true(memcmp(last, reply->shards[i]->segment_id.data, sizeof(last)) < 0);
            memcpy(last, reply->shards[i]->segment_id.data, sizeof(last));
            count++;
        }
        request.after = (ProtobufCBinaryData){reply->next_after.len, after};
        if (reply->next_after.len > 0) {
            memcpy(after, reply->next_after.data, reply->next_after.len);
        }
        rk_rpc_message_free(message);
        if (count == 2) { /* The one that the page ended with. */
            struct kvstore_name name = {.generation = 1};
            memcpy(name.segment_id.bytes, last, sizeof(last));
            assert_int_equal(client_end(daemon->channel, "DropShard", &name), RK_OK);
        }
    } while (request.after.len > 0);
    assert_int_equal(count, 7);
    request.after = (ProtobufCBinaryData){5, after};
    struct ProtobufCMessage *message = NULL;
    assert_int_equal(rk_rpc_unary(daemon->channel, "/redknot.v1.KvStore/StoreStatus", &request.base,
                                  &redknot__v1__store_status_reply__descriptor, WAIT_MS, &message,
                                  NULL),
                     RK_ERR_INVALID);
}

static void damage_is_noticed_by_the_reader(void **state)
{
    struct daemon *daemon = *state;
    struct kvstore_header header = shard_header(1, 1, 64);
    const struct rk_extent first = {0, 0, 0, 1};
    char line[1024];
    stored(daemon, &header);
    kill(daemon->pid, SIGUSR1);
    assert_true(log_wait(daemon->log_fd, "event=fault_injected", line, sizeof(line)));
    for (size_t p = 0; p < 2; p++) {
        struct rk_transport *reader = reader_connect(daemon, both_paths[p]);
        struct rk_get get = get_of(&header, &first, 1);
        struct rk_pages pages = {0};
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_OK);
        assert_false(rk_page_verify(&pages.pages[0], get.page_bytes));
        rk_transport_release(reader, &pages, 1);
        rk_transport_destroy(reader);
    }
}

static void a_stopped_store_is_a_miss_in_time(void **state)
{
    struct daemon *daemon = *state;
    struct kvstore_header header = shard_header(1, 1, 64 * 16);
    stored(daemon, &header);
    for (size_t p = 0; p < 2; p++) {
        struct rk_transport *reader = reader_connect(daemon, both_paths[p]);
        struct rk_get get = get_of(&header, parts, 2);
        struct rk_pages pages = {0};
        int stopped = 0;
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_OK);
        rk_transport_release(reader, &pages, 1);
        kill(daemon->pid, SIGSTOP);
        assert_int_equal(waitpid(daemon->pid, &stopped, WUNTRACED), daemon->pid);
        assert_int_equal(get_one(reader, &get, 100, &pages, NULL), RK_ERR_DEADLINE);
        int64_t took_ms = 0;
        assert_int_equal(get_one_cancelled(reader, &get, &took_ms), RK_ERR_CANCELLED);
        assert_true(took_ms < 1000);
        kill(daemon->pid, SIGCONT);
        assert_int_equal(get_one(reader, &get, WAIT_MS, &pages, NULL), RK_OK);
        rk_transport_release(reader, &pages, 1);
        rk_transport_destroy(reader);
    }
}

static void a_killed_store_is_unavailable(void **state)
{
    struct daemon *daemon = *state;
    struct kvstore_header header = shard_header(1, 1, 64 * 16);
    struct rk_transport *readers[2];
    stored(daemon, &header);
    for (size_t p = 0; p < 2; p++) {
        readers[p] = reader_connect(daemon, both_paths[p]);
    }
    kill(daemon->pid, SIGKILL);
    assert_int_equal(waitpid(daemon->pid, NULL, 0), daemon->pid);
    daemon->pid = 0;
    for (size_t p = 0; p < 2; p++) {
        struct rk_get get = get_of(&header, parts, 2);
        struct rk_pages pages = {0};
        assert_int_equal(get_one(readers[p], &get, WAIT_MS, &pages, NULL), RK_ERR_UNAVAILABLE);
        rk_transport_destroy(readers[p]);
    }
}

static void expect_refusal(const char *const *arguments, int exit_code, const char *text)
{
    char line[1024];
    int status = 0;
    int log_fd = -1;
    pid_t pid = program_start(arguments, &log_fd);
    assert_true(log_wait(log_fd, text, line, sizeof(line)));
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), exit_code);
    close(log_fd);
}

static void it_starts_only_as_asked(void **state)
{
    struct daemon *daemon = *state;
    const char *taken[] = {PROGRAM, "--listen", daemon->address, "--metrics", "", NULL};
    const char *huge[] = {PROGRAM, "--listen", "127.0.0.1:0", "--metrics",
                          "",      "--dram",   "900TiB",      NULL};
    const char *unit[] = {PROGRAM, "--dram", "many", NULL};
    const char *unknown[] = {PROGRAM, "--no-such-option", NULL};
    expect_refusal(taken, 1, strrchr(daemon->address, ':') + 1);
    expect_refusal(huge, 1, "--dram");
    const char *wildcard[] = {PROGRAM,       "--listen",  "0.0.0.0:0", "--coordinator",
                              "127.0.0.1:1", "--metrics", "",          NULL};
    expect_refusal(wildcard, 1, "--advertise");
    expect_refusal(unit, 2, "many");
    expect_refusal(unknown, 2, "no-such-option");
}

int main(void)
{
#define SERVED(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        SERVED(both_paths_give_the_same_bytes),
        SERVED(both_paths_give_the_same_reasons),
        SERVED(a_bad_put_is_refused),
        SERVED(status_comes_in_pages),
        SERVED(damage_is_noticed_by_the_reader),
        SERVED(a_stopped_store_is_a_miss_in_time),
        SERVED(a_killed_store_is_unavailable),
        SERVED(it_starts_only_as_asked),
    };
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
