/*
 * plan: what the planner costs the host, on one core.
 *
 *   bench_plan [layers]
 *
 * Prints one JSON object per line: microseconds (best of several) for the plans
 * of all layers together, one plan a layer, and how even the items are.
 * "unchanged": the caller's version stands; "changed": all is planned anew.
 * Decode: 64 requests and 8 KV heads, one global of 128 pages and 7 local of 18.
 * Prefill: a chunk of 2,048 rows at the end of 32,768 tokens, the same heads.
 */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "kernels/device.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define KV_HEADS     8
#define GLOBAL_HEADS 1
#define GROUP        4
#define HEAD_DIM     128
#define LAYERS_MAX   128
#define TURNS        50

struct layer {
    struct kernels_plan *plan;
    struct kernels_batch batch;
};

static void must(enum rk_status status, const struct rk_error *error)
{
    if (status != RK_OK) {
        fprintf(stderr, "bench_plan: %s\n", error->text);
        exit(1);
    }
}

static void *must_alloc(size_t count, size_t bytes_each)
{
    void *block = rk_alloc_zero(count, bytes_each);
    if (!block) {
        fprintf(stderr, "bench_plan: out of memory\n");
        exit(1);
    }
    return block;
}

struct shape {
    const char *name;
    enum kernels_plan_kind kind;
    uint32_t requests;
    uint32_t rows; /* of each request, the last of its context */
    uint32_t global_pages;
    uint32_t local_pages; /* pages in the list of a local head; these end where the context ends */
    uint32_t window;      /* of local heads; 0: their lists are all that they see */
};

static const struct shape shapes[] = {
    {"decode", KERNELS_PLAN_DECODE, 64, 1, 128, 18, 0},
    {"decode, window and sink", KERNELS_PLAN_DECODE, 64, 1, 128, 18, 1024},
    {"decode, one request", KERNELS_PLAN_DECODE, 1, 1, 2048, 18, 0},
    {"prefill", KERNELS_PLAN_PREFILL, 1, 2048, 512, 512, 1024},
    {"prefill, all global", KERNELS_PLAN_PREFILL, 1, 2048, 512, 512, 0},
    {"prefill, short chunks", KERNELS_PLAN_PREFILL, 4, 128, 2048, 2048, 1024},
};

static struct kernels_batch make_batch(const struct shape *shape, uint64_t version)
{
    uint32_t requests = shape->requests;
    uint32_t heads_pages =
        GLOBAL_HEADS * shape->global_pages + (KV_HEADS - GLOBAL_HEADS) * shape->local_pages;
    uint32_t *row_first = must_alloc(requests + 1, sizeof(*row_first));
    int32_t *positions = must_alloc((size_t)requests * shape->rows, sizeof(*positions));
    struct kernels_page_list *lists = must_alloc((size_t)requests * KV_HEADS, sizeof(*lists));
    struct kernels_page_ref *refs = must_alloc((size_t)requests * heads_pages, sizeof(*refs));
    uint32_t n = 0;
    for (uint32_t r = 0; r < requests; r++) {
        int32_t end = (int32_t)(shape->global_pages * RK_PAGE_TOKENS);
        row_first[r + 1] = (r + 1) * shape->rows;
        for (uint32_t i = 0; i < shape->rows; i++) {
            positions[r * shape->rows + i] = end - (int32_t)(shape->rows - i);
        }
        for (uint32_t h = 0; h < KV_HEADS; h++) {
            bool global = h < GLOBAL_HEADS;
            uint32_t count = global ? shape->global_pages : shape->local_pages;
            lists[r * KV_HEADS + h] = (struct kernels_page_list){
                .first = n, .count = count, .window = global ? 0 : shape->window, .sink = 4};
            for (uint32_t i = 0; i < count; i++, n++) {
                /* Local heads of decode have the sink's page, then the last ones. */
                uint32_t index = i == 0 ? 0 : shape->global_pages - count + i;
                refs[n] = (struct kernels_page_ref){.page = (int32_t)n,
                                                    .position = (int32_t)(index * RK_PAGE_TOKENS),
                                                    .positions = -1,
                                                    .live = UINT64_MAX};
            }
        }
    }
    return (struct kernels_batch){.num_requests = requests,
                                  .num_variants = 1,
                                  .row_first = row_first,
                                  .positions = positions,
                                  .lists = lists,
                                  .refs = refs,
                                  .num_refs = n,
                                  .version = version};
}

static void free_const(const void *block)
{
    rk_free((void *)(uintptr_t)block);
}

static double update_all(struct layer *layers, uint32_t count, const struct kernels_pool *pool,
                         bool anew)
{
    struct rk_error error;
    double start = rk_clock_s();
    for (uint32_t i = 0; i < count; i++) {
        bool changed = false;
        layers[i].batch.version += anew;
        must(kernels_plan_update(layers[i].plan, pool, &layers[i].batch, &changed, &error), &error);
    }
    return rk_clock_s() - start;
}

static void bench_shape(struct kernels_device *device, const struct kernels_pool *pool,
                        const struct shape *shape, uint32_t count)
{
    static struct layer layers[LAYERS_MAX];
    struct rk_error error;
    for (uint32_t i = 0; i < count; i++) {
        layers[i].batch = make_batch(shape, 1);
        struct kernels_plan_options options = {.kind = shape->kind,
                                               .num_kv_heads = KV_HEADS,
                                               .group = GROUP,
                                               .head_dim = HEAD_DIM,
                                               .rows_max = shape->requests * shape->rows,
                                               .requests_max = shape->requests,
                                               .refs_max = layers[i].batch.num_refs};
        must(kernels_plan_create(device, &options, &layers[i].plan, &error), &error);
    }
    double changed = INFINITY;
    double unchanged = INFINITY;
    for (int turn = 0; turn < TURNS; turn++) {
        changed = fmin(changed, update_all(layers, count, pool, true));
        unchanged = fmin(unchanged, update_all(layers, count, pool, false));
    }
    struct kernels_plan_stats stats = kernels_plan_stats(layers[0].plan);
    printf("{\"shape\": \"%s\", \"layers\": %u, \"requests\": %u, \"rows\": %u, \"refs\": %u, "
           "\"us_unchanged\": %.1f, \"us_changed\": %.1f, \"items\": %u, \"splits\": %u, "
           "\"processors\": %u, \"pages\": %llu, \"busiest_over_mean\": %.3f}\n",
           shape->name, count, shape->requests, shape->requests * shape->rows,
           layers[0].batch.num_refs, unchanged * 1e6, changed * 1e6, stats.items, stats.splits,
           stats.processors, (unsigned long long)stats.pages,
           (double)stats.pages_busiest * kernels_device_processors(device) / (double)stats.pages);
    fflush(stdout);
    for (uint32_t i = 0; i < count; i++) {
        kernels_plan_destroy(layers[i].plan);
        free_const(layers[i].batch.row_first);
        free_const(layers[i].batch.positions);
        free_const(layers[i].batch.lists);
        free_const(layers[i].batch.refs);
    }
}

int main(int argc, char **argv)
{
    uint32_t count = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 32;
    struct kernels_pool_options options = {.head_dim = HEAD_DIM, .pages = 1u << 16};
    struct kernels_device *device = NULL;
    struct kernels_pool *pool = NULL;
    struct rk_error error;
    if (count == 0 || count > LAYERS_MAX) {
        fprintf(stderr, "usage: bench_plan [layers, at most %d]\n", LAYERS_MAX);
        return 2;
    }
    must(kernels_device_create(KERNELS_DEVICE_CPU, 0, &device, &error), &error);
    must(kernels_pool_create(device, &options, &pool, &error), &error);
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        bench_shape(device, pool, &shapes[i], count);
    }
    kernels_pool_destroy(pool);
    kernels_device_destroy(device);
    return 0;
}
