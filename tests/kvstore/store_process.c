#include "tests/kvstore/store_process.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/value.h"
#include "redknot/v1/kvstore.pb-c.h"
#include "tests/kvstore/put_client.h"

#include <dirent.h>
#include <fcntl.h>
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

#define PROGRAM     REDKNOT_BINARY_DIR "/bin/redknot-kvstore"
#define GOOD_KEY    "good"
#define GOOD_BYTES  200000u
#define PROBE_KEY   "probe"
#define PROBE_BYTES 100001u

/* ---- The process ---- */

/* Its log goes to a file: a pipe that nobody reads would stop it. */
static void process_fork(struct store *store)
{
    const char *const arguments[] = {
        PROGRAM,  "--listen", "127.0.0.1:0",  "--metrics", "",
        "--dram", "16MiB",    "--shm-socket", "",          "--scrub-rate",
        "0",      "--ucx",    "127.0.0.1:0",  "--node-id", "store",
        NULL};
    store->pid = fork();
    assert_true(store->pid >= 0);
    if (store->pid == 0) {
        int log = open(store->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        dup2(log, STDERR_FILENO);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execv(PROGRAM, (char *const *)(uintptr_t)arguments);
        _exit(127);
    }
}

/* Until the log says where it serves. */
static bool ready_read(struct store *store)
{
    char line[1024];
    bool ready = false;
    FILE *log = fopen(store->log, "r");
    while (log && !ready && fgets(line, sizeof(line), log)) {
        const char *address = strstr(line, " address=");
        const char *ucx = strstr(line, " ucx=\"");
        ready = strstr(line, "event=ready") && strchr(line, '\n') && address && ucx &&
                sscanf(address, " address=%63s", store->address) == 1 &&
                sscanf(ucx, " ucx=\"%63[^\"]", store->ucx) == 1;
    }
    if (log) {
        (void)fclose(log);
    }
    return ready;
}

static uint64_t peak_bytes(const struct store *store)
{
    char path[64];
    char line[256];
    uint64_t kib = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/status", store->pid);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    while (fgets(line, sizeof(line), file)) {
        if (strncmp(line, "VmHWM:", 6) == 0) {
            kib = strtoull(line + 6, NULL, 10);
        }
    }
    (void)fclose(file);
    assert_true(kib > 0);
    return kib * 1024;
}

uint64_t store_growth_bytes(const struct store *store)
{
    return peak_bytes(store) - store->peak_bytes;
}

int store_descriptors(const struct store *store)
{
    char path[64];
    int count = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/fd", store->pid);
    DIR *folder = opendir(path);
    assert_non_null(folder);
    while (readdir(folder)) {
        count++;
    }
    closedir(folder);
    return count;
}

/* ---- A good client ---- */

static void status_get(const struct store *store, Redknot__V1__StoreStatusReply **ret_reply)
{
    Redknot__V1__StoreStatusRequest request = REDKNOT__V1__STORE_STATUS_REQUEST__INIT;
    struct rk_error error = {.text = ""};
    int64_t deadline_ns = rk_deadline_in_ms(STORE_WAIT_MS);
    enum rk_status status = RK_OK;
    do { /* Strangers may still occupy all handlers. */
        status = rk_rpc_unary(store->channel, "/redknot.v1.KvStore/StoreStatus", &request.base,
                              &redknot__v1__store_status_reply__descriptor, STORE_WAIT_MS,
                              (struct ProtobufCMessage **)ret_reply, &error);
        rk_clock_sleep_ms(status == RK_OK ? 0 : 20);
    } while (status == RK_ERR_FULL && rk_deadline_left_ms(deadline_ns) > 0);
    if (status != RK_OK) {
        fail_msg("StoreStatus: %s", error.text);
    }
}

static void expect_quiet(const struct store *store)
{
    int64_t deadline_ns = rk_deadline_in_ms(STORE_WAIT_MS);
    for (;;) {
        Redknot__V1__StoreStatusReply *reply = NULL;
        status_get(store, &reply);
        bool quiet = reply->num_staged == 0 && reply->pinned_bytes == 0 &&
                     reply->used_bytes == store->used_bytes &&
                     reply->num_values == store->num_values;
        if (!quiet && rk_deadline_left_ms(deadline_ns) == 0) {
            fail_msg("%llu staged, %llu pinned bytes, %llu of %llu used bytes, %llu of %llu values",
                     (unsigned long long)reply->num_staged, (unsigned long long)reply->pinned_bytes,
                     (unsigned long long)reply->used_bytes, (unsigned long long)store->used_bytes,
                     (unsigned long long)reply->num_values, (unsigned long long)store->num_values);
        }
        rk_rpc_message_free(&reply->base);
        if (quiet) {
            return;
        }
        rk_clock_sleep_ms(20);
    }
}

static struct rk_transport *client_connect(const struct store *store, enum rk_path path)
{
    const struct rk_transport_endpoint endpoint = {
        .grpc_address = store->address, .host_id = "", .shm_socket = "", .ucx_address = store->ucx};
    struct rk_transport *transport = NULL;
    struct rk_error error = {.text = ""};
    if (rk_transport_connect(&endpoint, path, STORE_WAIT_MS, &transport, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    return transport;
}

static uint8_t *bytes_make(uint8_t first, size_t bytes)
{
    uint8_t *data = rk_alloc(bytes);
    assert_non_null(data);
    for (size_t i = 0; i < bytes; i++) {
        data[i] = (uint8_t)(first + i * 7 + i / 251);
    }
    return data;
}

size_t store_head_pack(const char *key, uint64_t bytes, uint8_t ret_head[512])
{
    Redknot__V1__PutItem item = REDKNOT__V1__PUT_ITEM__INIT;
    Redknot__V1__PutValue value = REDKNOT__V1__PUT_VALUE__INIT;
    value.key = (ProtobufCBinaryData){strlen(key), (uint8_t *)(uintptr_t)key};
    value.bytes = bytes;
    item.what_case = REDKNOT__V1__PUT_ITEM__WHAT_VALUE;
    item.value = &value;
    assert_true(redknot__v1__put_item__get_packed_size(&item) <= 512);
    return redknot__v1__put_item__pack(&item, ret_head);
}

static void client_put_value(struct rk_transport *transport, const char *key, size_t bytes)
{
    uint8_t head[512];
    const void *pages[8];
    uint8_t *data = bytes_make((uint8_t)key[0], bytes);
    struct rk_put put = {.head = head,
                         .head_bytes = store_head_pack(key, bytes, head),
                         .pages = pages,
                         .num_pages = rk_value_pages(bytes),
                         .page_bytes = rk_value_page_bytes(bytes),
                         .bytes = bytes};
    struct rk_error error = {.text = ""};
    for (uint64_t i = 0; i < put.num_pages; i++) {
        pages[i] = data + i * RK_VALUE_PAGE_BYTES;
    }
    if (rk_transport_put(transport, &put, 1,
                         &(struct rk_until){rk_deadline_in_ms(STORE_WAIT_MS), NULL, NULL},
                         &error) != RK_OK ||
        put.status != RK_OK) {
        fail_msg("put of \"%s\": %s", key, error.text);
    }
    rk_free(data);
}

static void client_get_value(struct rk_transport *transport, const char *key, size_t bytes)
{
    uint8_t *data = bytes_make((uint8_t)key[0], bytes);
    const struct rk_get get = {.id = rk_id_value(key, strlen(key)),
                               .buffer = rk_alloc(bytes),
                               .bytes_max = bytes,
                               .verify = true};
    struct rk_pages pages = {.status = RK_OK};
    struct rk_error error = {.text = ""};
    if (rk_transport_get(transport, &get, 1,
                         &(struct rk_until){rk_deadline_in_ms(STORE_WAIT_MS), NULL, NULL}, &pages,
                         &error) != RK_OK ||
        pages.status != RK_OK) {
        fail_msg("get of \"%s\": %s %s", key, rk_status_name(pages.status), error.text);
    }
    assert_int_equal(pages.bytes, bytes);
    assert_memory_equal(get.buffer, data, bytes);
    rk_transport_release(transport, &pages, 1);
    rk_free(get.buffer);
    rk_free(data);
}

static void drop_probe(const struct store *store)
{
    Redknot__V1__DropValuesRequest request = REDKNOT__V1__DROP_VALUES_REQUEST__INIT;
    struct ProtobufCMessage *reply = NULL;
    struct rk_id id = rk_id_value(PROBE_KEY, strlen(PROBE_KEY));
    ProtobufCBinaryData ids = {RK_ID_BYTES, id.bytes};
    request.n_ids = 1;
    request.ids = &ids;
    assert_int_equal(rk_rpc_unary(store->channel, "/redknot.v1.KvStore/DropValues", &request.base,
                                  &redknot__v1__drop_values_reply__descriptor, STORE_WAIT_MS,
                                  &reply, NULL),
                     RK_OK);
    rk_rpc_message_free(reply);
}

void store_still_good(const struct store *store, enum rk_path path)
{
    expect_quiet(store);
    struct rk_transport *transport = client_connect(store, path);
    client_get_value(transport, GOOD_KEY, GOOD_BYTES);
    client_put_value(transport, PROBE_KEY, PROBE_BYTES);
    client_get_value(transport, PROBE_KEY, PROBE_BYTES);
    rk_transport_destroy(transport);
    drop_probe(store);
    expect_quiet(store);
}

/* ---- Life ---- */

void store_start(struct store *store)
{
    *store = (struct store){.pid = 0};
    (void)snprintf(store->folder, sizeof(store->folder), "/tmp/redknot-test-XXXXXX");
    assert_non_null(mkdtemp(store->folder));
    (void)snprintf(store->log, sizeof(store->log), "%s/log", store->folder);
    process_fork(store);
    int64_t deadline_ns = rk_deadline_in_ms(STORE_WAIT_MS);
    while (!ready_read(store)) {
        assert_true(rk_deadline_left_ms(deadline_ns) > 0);
        rk_clock_sleep_ms(5);
    }
    assert_int_equal(rk_rpc_channel_create(store->address, &store->channel, NULL), RK_OK);

    struct kvstore_header header = shard_header(1, 1, STORE_SHARD_TOKENS);
    struct kvstore_name name = shard_name(&header);
    assert_int_equal(client_put(store->channel, &header, -1), RK_OK);
    assert_int_equal(client_end(store->channel, "CommitShard", &name), RK_OK);
    for (int i = 0; i < 2; i++) {
        static const enum rk_path paths[] = {RK_PATH_UCX, RK_PATH_GRPC};
        struct rk_transport *transport = client_connect(store, paths[i]);
        if (i == 0) {
            client_put_value(transport, GOOD_KEY, GOOD_BYTES);
        }
        client_get_value(transport, GOOD_KEY, GOOD_BYTES);
        rk_transport_destroy(transport);
    }
    Redknot__V1__StoreStatusReply *reply = NULL;
    status_get(store, &reply);
    store->used_bytes = reply->used_bytes;
    store->num_values = reply->num_values;
    rk_rpc_message_free(&reply->base);
    store->peak_bytes = peak_bytes(store);
}

void store_stop(struct store *store)
{
    char command[128];
    int status = -1;
    rk_rpc_channel_destroy(store->channel);
    if (!store->told) {
        assert_int_equal(kill(store->pid, SIGTERM), 0);
    }
    assert_int_equal(waitpid(store->pid, &status, 0), store->pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        (void)snprintf(command, sizeof(command), "tail -n 50 '%s' >&2", store->log);
        (void)!system(command);
        fail_msg("the store ended with wait status %d", status);
    }
    (void)unlink(store->log);
    (void)rmdir(store->folder);
}
