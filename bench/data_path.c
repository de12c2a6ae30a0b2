/*
 * Reads from a store over each path, in turns: checksums on, every page verified.
 *
 *   bench_data_path COORDINATOR STORE_PID ROUNDS SECONDS
 *
 * Stores one segment of 64 MiB in pages of 64 KiB, then reads runs of 1, 16 and 256 pages of it
 * from random places. One JSON line by round, path and size; bench/data_path.py starts the cluster
 * and adds the medians.
 */
#include "client/kv_client.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { LAYERS = 16, KV_HEADS = 8, PAGES_BY_HEAD = 8, PAGES = LAYERS * KV_HEADS * PAGES_BY_HEAD };
#define LATENCIES_MAX 1000000

static const struct rk_kv_layout layout = {
    .num_layers = LAYERS, .num_kv_heads = KV_HEADS, .head_dim = 256, .dtype = RK_DTYPE_BF16};
static const enum rk_path paths[] = {RK_PATH_SHM, RK_PATH_UCX, RK_PATH_GRPC};
static const uint32_t sizes[] = {1, 16, 256}; /* pages of one read */
#define NUM_PATHS (sizeof(paths) / sizeof(paths[0]))
#define NUM_SIZES (sizeof(sizes) / sizeof(sizes[0]))

static struct rk_id fingerprint;
static struct rk_id segment;

static void check(enum rk_status status, const char *what, const struct rk_error *error)
{
    if (status != RK_OK) {
        (void)fprintf(stderr, "bench_data_path: %s: %s %s\n", what, rk_status_name(status),
                      error->text);
        exit(1);
    }
}

static void put(struct rk_kv_client *client)
{
    struct rk_error error = {.text = ""};
    size_t page_bytes = rk_kv_page_bytes(&layout);
    uint8_t *bytes = rk_alloc(PAGES * page_bytes);
    const void **pages = rk_alloc_zero(PAGES, sizeof(*pages));
    uint64_t *checksums = rk_alloc_zero(PAGES, sizeof(*checksums));
    uint64_t state = (uint64_t)rk_clock_ns();
    if (!bytes || !pages || !checksums) {
        check(RK_ERR_NO_MEMORY, "put", &error);
    }
    for (size_t i = 0; i < PAGES * page_bytes; i += sizeof(state)) {
        state = state * 6364136223846793005 + 1442695040888963407;
        memcpy(bytes + i, &state, sizeof(state));
    }
    memcpy(&segment, bytes, sizeof(segment));
    for (size_t i = 0; i < PAGES; i++) {
        pages[i] = bytes + i * page_bytes;
        checksums[i] = rk_hash_xxh3(pages[i], page_bytes);
    }
    const struct rk_kv_put request = {.segment_id = segment,
                                      .fingerprint = fingerprint,
                                      .layout = layout,
                                      .num_tokens = PAGES_BY_HEAD * RK_PAGE_TOKENS,
                                      .label = "bench_data_path",
                                      .pages = pages,
                                      .checksums = checksums};
    check(rk_kv_put(client, &request, 30000, NULL, &error), "put", &error);
    rk_free(bytes);
    rk_free(pages);
    rk_free(checksums);
}

/* User and system ticks of a process: fields 14 and 15 of its stat, counted behind the name. */
static double cpu_ticks(const char *pid)
{
    char path[64];
    char line[1024] = "";
    double ticks = 0;
    (void)snprintf(path, sizeof(path), "/proc/%s/stat", pid);
    FILE *file = fopen(path, "re");
    if (!file) {
        return 0;
    }
    char *at = fgets(line, sizeof(line), file) ? strrchr(line, ')') : NULL;
    (void)fclose(file);
    for (int field = 3; at && field <= 15; field++) {
        at = strchr(at + 1, ' ');
        ticks += at && field >= 14 ? strtod(at, NULL) : 0;
    }
    return ticks;
}

/* User and system seconds of this process and of the store. */
static double cpu_seconds(const char *store_pid)
{
    struct rusage usage;
    (void)getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6 +
           cpu_ticks(store_pid) / (double)sysconf(_SC_CLK_TCK);
}

/* The extents of a run of pages that begins at a head's first page. */
static size_t run_of(uint32_t first, uint32_t count, struct rk_extent *ret_extents)
{
    size_t extents = 0;
    while (count > 0) {
        uint32_t head = first / PAGES_BY_HEAD;
        uint32_t begin = first % PAGES_BY_HEAD;
        uint32_t end = begin + count < PAGES_BY_HEAD ? begin + count : PAGES_BY_HEAD;
        ret_extents[extents++] = (struct rk_extent){head / KV_HEADS, head % KV_HEADS, begin, end};
        first += end - begin;
        count -= end - begin;
    }
    return extents;
}

static void read_once(struct rk_kv_client *client, const struct rk_kv_location *location,
                      uint32_t count)
{
    struct rk_extent extents[LAYERS * KV_HEADS];
    struct rk_kv_pages pages;
    struct rk_error error = {.text = ""};
    size_t page_bytes = rk_kv_page_bytes(&layout);
    uint32_t first = (uint32_t)random() % (PAGES - count + 1);
    size_t num_extents = run_of(first, count, extents);
    check(rk_kv_get(client, &fingerprint, &layout, location, extents, num_extents, 5000, &pages,
                    &error),
          "get", &error);
    for (uint64_t i = 0; i < pages.num_pages; i++) {
        if (!rk_page_verify(&pages.pages[i], page_bytes)) {
            check(RK_ERR_CORRUPT, "verify", &error);
        }
    }
    rk_kv_release(client, &pages);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(struct rk_kv_client *client, const struct rk_kv_location *location,
                    enum rk_path path, uint32_t count, int round, double seconds,
                    const char *store_pid)
{
    static double latencies[LATENCIES_MAX];
    size_t reads = 0;
    double cpu = cpu_seconds(store_pid);
    double begin = rk_clock_s();
    double now = begin;
    while (now - begin < seconds && reads < LATENCIES_MAX) {
        read_once(client, location, count);
        double end = rk_clock_s();
        latencies[reads++] = end - now;
        now = end;
    }
    double bytes = (double)reads * count * (double)rk_kv_page_bytes(&layout);
    cpu = cpu_seconds(store_pid) - cpu;
    qsort(latencies, reads, sizeof(latencies[0]), by_value);
    printf(
        "{\"peer\": \"redknot\", \"path\": \"%s\", \"op\": \"get\", \"bytes\": %zu, \"batch\": 1, "
        "\"gb_per_s\": %.3f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"cpu_s_per_gb\": %.3f, "
        "\"round\": %d}\n",
        rk_path_name(path), count * rk_kv_page_bytes(&layout), bytes / (now - begin) * 1e-9,
        latencies[reads / 2] * 1e6, latencies[reads * 99 / 100] * 1e6, cpu / bytes * 1e9, round);
    (void)fflush(stdout);
}

int main(int argc, char **argv)
{
    struct rk_kv_client *clients[NUM_PATHS];
    struct rk_kv_location location;
    struct rk_error error = {.text = ""};
    if (argc != 5) {
        (void)fprintf(stderr, "usage: bench_data_path COORDINATOR STORE_PID ROUNDS SECONDS\n");
        return 2;
    }
    int rounds = (int)strtol(argv[3], NULL, 10);
    double seconds = strtod(argv[4], NULL);
    memset(&fingerprint, 7, sizeof(fingerprint));
    for (size_t p = 0; p < NUM_PATHS; p++) {
        const struct rk_kv_client_options options = {.coordinator = argv[1], .path = paths[p]};
        check(rk_kv_client_create(&options, &clients[p], &error), "client", &error);
    }
    put(clients[0]);
    check(rk_kv_locate(clients[0], &fingerprint, &segment, 1, false, &location, &error), "locate",
          &error);
    for (int round = -1; round < rounds; round++) { /* The first warms up. */
        for (size_t s = 0; s < NUM_SIZES; s++) {
            for (size_t i = 0; i < NUM_PATHS; i++) {
                size_t p = (i + (size_t)(round + 1)) % NUM_PATHS;
                measure(clients[p], &location, paths[p], sizes[s], round,
                        round < 0 ? seconds / 10 : seconds, argv[2]);
            }
        }
    }
    rk_kv_locations_free(&location, 1);
    for (size_t p = 0; p < NUM_PATHS; p++) {
        rk_kv_client_destroy(clients[p]);
    }
    return 0;
}
