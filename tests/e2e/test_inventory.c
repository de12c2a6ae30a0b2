/*
 * Goal:   a store with a long inventory is up once and stays up when the coordinator restarts, and
 *         the coordinator does not need the memory of all token ids for it: neither with its
 *         database, nor when that is lost.
 * Method: a real coordinator and store; segments with many token ids and hardly any KV, put by the
 *         KV client. Then the coordinator is killed and started again; its log is read for what
 *         happened, and its peak of memory from /proc. REDKNOT_INVENTORY_SEGMENTS (1,000) and
 *         _TOKENS (8,000) make it larger: 36,000 take 1.1 GB of ids.
 */
#include "client/kv_client.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "tests/e2e/cluster.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define WATCH_MS 5000 /* after it announced; longer than a silent node takes to be down */
#define WAIT_MS  300000

static uint32_t number_of(const char *name, uint32_t otherwise)
{
    const char *text = getenv(name);
    return text ? (uint32_t)strtoul(text, NULL, 10) : otherwise;
}

static void put_all(struct cluster *cluster, uint32_t num_segments, uint32_t num_tokens)
{
    const struct rk_kv_client_options options = {.coordinator = cluster->coordinator_address,
                                                 .timeout_ms = 60000};
    const struct rk_kv_layout layout = {
        .num_layers = 1, .num_kv_heads = 1, .head_dim = 1, .dtype = RK_DTYPE_BF16};
    uint64_t num_pages = rk_kv_pages_total(&layout, num_tokens);
    size_t page_bytes = rk_kv_page_bytes(&layout);
    struct rk_kv_client *client = NULL;
    uint8_t *page = calloc(1, page_bytes);
    const void **pages = calloc(num_pages, sizeof(*pages));
    uint64_t *checksums = calloc(num_pages, sizeof(*checksums));
    int32_t *tokens = calloc(num_tokens, sizeof(*tokens));
    assert_true(page && pages && checksums && tokens);
    for (uint64_t i = 0; i < num_pages; i++) {
        pages[i] = page;
        checksums[i] = rk_hash_xxh3(page, page_bytes);
    }
    assert_int_equal(rk_kv_client_create(&options, &client, NULL), RK_OK);
    for (uint32_t i = 0; i < num_segments; i++) {
        const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(60000)};
        struct rk_error error = {.text = ""};
        for (uint32_t j = 0; j < num_tokens; j++) {
            tokens[j] = (int32_t)((i * 7919 + j * 104729) % 49152);
        }
        struct rk_kv_put put = {.segment_id = rk_id_sha256(&i, sizeof(i)),
                                .fingerprint = rk_id_sha256("inventory", 9),
                                .layout = layout,
                                .num_tokens = num_tokens,
                                .token_ids = tokens,
                                .label = "inventory",
                                .pages = pages,
                                .checksums = checksums};
        put.origin.alone = put.segment_id;
        if (rk_kv_put(client, &put, &until, NULL, &error) != RK_OK) {
            fail_msg("put %u: %s", i, error.text);
        }
    }
    rk_kv_client_destroy(client);
    free(page);
    free(pages);
    free(checksums);
    free(tokens);
}

/* Lines of the coordinator's log, from `from` on, with this event. */
static int events(const struct cluster *cluster, long from, const char *event)
{
    char line[4096];
    int count = 0;
    FILE *log = fopen(cluster->coordinator.log, "r");
    assert_non_null(log);
    assert_int_equal(fseek(log, from, SEEK_SET), 0);
    while (fgets(line, sizeof(line), log)) {
        count += strstr(line, event) != NULL;
    }
    (void)fclose(log);
    return count;
}

static long log_end(const struct cluster *cluster)
{
    FILE *log = fopen(cluster->coordinator.log, "r");
    assert_non_null(log);
    assert_int_equal(fseek(log, 0, SEEK_END), 0);
    long end = ftell(log);
    (void)fclose(log);
    return end;
}

static uint64_t peak_kib(const struct process *process)
{
    return process_field(process->pid, "VmHWM:", 10);
}

static void restart_and_watch(struct cluster *cluster, const char *what, uint32_t num_segments)
{
    long from = log_end(cluster);
    int64_t begin_ns = rk_clock_ns();
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    process_start(&cluster->coordinator);
    while (events(cluster, from, "event=node_announced") == 0 &&
           rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(100);
    }
    double seconds = (double)(rk_clock_ns() - begin_ns) * 1e-9;
    rk_clock_sleep_ms(WATCH_MS);
    uint64_t peak = peak_kib(&cluster->coordinator);
    print_message("%s: announced after %.1f s, coordinator's peak %llu MB\n", what, seconds,
                  (unsigned long long)(peak * 1024 / 1000000));
    assert_int_equal(events(cluster, from, "event=node_announced"), 1);
    assert_int_equal(events(cluster, from, "event=node_registered"), 1);
    assert_int_equal(events(cluster, from, "event=node_up"), 1);
    assert_int_equal(events(cluster, from, "event=node_down"), 0);
    assert_true(peak * 1024 <= 600000000);
    char expected[64];
    (void)snprintf(expected, sizeof(expected), "accepted=%u drop=0", num_segments);
    assert_int_equal(events(cluster, from, expected), 1);
}

static void a_long_inventory_settles(void **state)
{
    (void)state;
    uint32_t num_segments = number_of("REDKNOT_INVENTORY_SEGMENTS", 1000);
    uint32_t num_tokens = number_of("REDKNOT_INVENTORY_TOKENS", 8000);
    struct cluster cluster;
    struct cluster_options options = {.dram = "2GiB"};
    char command[256];
    cluster_start(&cluster, &options);
    put_all(&cluster, num_segments, num_tokens);
    print_message("%u segments of %u tokens; coordinator's peak %llu MB while they were put\n",
                  num_segments, num_tokens,
                  (unsigned long long)(peak_kib(&cluster.coordinator) * 1024 / 1000000));
    process_kill(&cluster.coordinator, SIGKILL);
    restart_and_watch(&cluster, "with its database", num_segments);
    process_kill(&cluster.coordinator, SIGKILL);
    (void)snprintf(command, sizeof(command), "rm -rf %s/*", cluster.data);
    assert_int_equal(system(command), 0);
    restart_and_watch(&cluster, "without", num_segments);
    cluster_stop(&cluster);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_long_inventory_settles)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
