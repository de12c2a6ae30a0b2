/*
 * kernels_cpu: speed of the CPU kernels at the shapes of SmolLM2-135M.
 *
 *   kernels_cpu [threads] [context]
 *
 * Prints one JSON object per line: kernel, shape, isa or implementation,
 * threads, microseconds (best of several) and GFLOP/s. The last lines sum up a
 * decode pass and a prefill of `context` tokens over all layers.
 */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "kernels/kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS   30
#define KV_HEADS 3
#define GROUP    3
#define HEAD_DIM 64

struct shape {
    const char *name;
    uint32_t n;
    uint32_t k;
    uint32_t count; /* in a pass */
};

static const struct shape shapes[] = {
    {"q,o", 576, 576, 2 * LAYERS},      {"k,v", 192, 576, 2 * LAYERS},
    {"gate,up", 1536, 576, 2 * LAYERS}, {"down", 576, 1536, LAYERS},
    {"output", 49152, 576, 1},
};
#define NUM_SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static const char *const mode_names[] = {[KERNELS_F32] = "f32", [KERNELS_BF16] = "bf16"};

static void *must(void *block)
{
    if (!block) {
        fprintf(stderr, "kernels_cpu: out of memory\n");
        exit(1);
    }
    return block;
}

static float *reals(size_t count)
{
    float *values = must(rk_alloc_aligned(64, count * sizeof(float)));
    for (size_t i = 0; i < count; i++) {
        values[i] = (float)((i * 2654435761u >> 8) % 65536) / 32768.0f - 1.0f;
    }
    return values;
}

static struct kernels *create(enum kernels_mode mode, enum kernels_isa isa, uint32_t threads)
{
    struct kernels_options options = {.mode = mode, .isa = isa, .threads = threads};
    struct kernels *kernels = NULL;
    struct rk_error error;
    if (kernels_create(&options, &kernels, &error) != RK_OK) {
        fprintf(stderr, "kernels_cpu: %s\n", error.text);
        exit(1);
    }
    return kernels;
}

/* Each of `count` matrices of the shape in turn, so that decode reads weights from memory. */
static double bench_shape(struct kernels *kernels, const struct shape *shape, uint32_t rows)
{
    struct rk_error error;
    struct kernels_matrix *matrices[2 * LAYERS] = {NULL};
    float *w = reals((size_t)shape->n * shape->k);
    float *x = reals((size_t)KERNELS_ROWS_MAX * shape->k);
    float *y = reals((size_t)rows * shape->n);
    for (uint32_t i = 0; i < shape->count; i++) {
        if (kernels_matrix_create(kernels, w, shape->n, shape->k, &matrices[i], &error) != RK_OK) {
            fprintf(stderr, "kernels_cpu: %s\n", error.text);
            exit(1);
        }
    }
    double best = INFINITY;
    for (int turn = 0; turn < 5; turn++) {
        double start = rk_clock_s();
        for (uint32_t i = 0; i < shape->count; i++) {
            kernels_matmul(kernels, matrices[i], x, rows, y);
        }
        best = fmin(best, rk_clock_s() - start);
    }
    double flops = 2.0 * rows * shape->n * shape->k * shape->count;
    printf("{\"kernel\": \"matmul\", \"shape\": \"%s\", \"n\": %u, \"k\": %u, \"rows\": %u, "
           "\"mode\": \"%s\", \"implementation\": \"%s\", \"threads\": %u, \"us\": %.1f, "
           "\"gflops\": %.1f}\n",
           shape->name, shape->n, shape->k, rows, mode_names[kernels_mode(kernels)],
           kernels_matrix_implementation(matrices[0], rows), kernels_threads(kernels),
           best / shape->count * 1e6, flops / best * 1e-9);
    for (uint32_t i = 0; i < shape->count; i++) {
        kernels_matrix_destroy(matrices[i]);
    }
    rk_free(w);
    rk_free(x);
    rk_free(y);
    return best;
}

static void bench_matmul(enum kernels_mode mode, uint32_t threads)
{
    static const uint32_t rows[] = {1, 2, 4, 8, 16, 32, 64, 128, 256};
    struct kernels *kernels = create(mode, KERNELS_ISA_AUTO, threads);
    for (size_t r = 0; r < sizeof(rows) / sizeof(rows[0]); r++) {
        double total = 0;
        for (size_t i = 0; i < NUM_SHAPES; i++) {
            bool output = shapes[i].n == 49152;
            if (!output || rows[r] <= 16) { /* Prefill needs the output of one row alone. */
                total += bench_shape(kernels, &shapes[i], rows[r]);
            }
        }
        printf("{\"kernel\": \"all matmuls of a pass\", \"rows\": %u, \"mode\": \"%s\", "
               "\"threads\": %u, \"us\": %.1f, \"tokens_per_s\": %.1f}\n",
               rows[r], mode_names[mode], threads, total * 1e6, rows[r] / total);
        fflush(stdout);
    }
    kernels_destroy(kernels);
}

struct attention_bench {
    struct kernels_rope rope;
    struct kernels_page *pages;
    struct kernels_head_view views[KV_HEADS];
    uint8_t *data;
    float *q;
    float *out;
    int32_t positions[KERNELS_ROWS_MAX];
};

static void attention_setup(struct attention_bench *b, enum kernels_mode mode, uint32_t context)
{
    uint32_t pages = context / RK_PAGE_TOKENS;
    size_t elements = (size_t)2 * RK_PAGE_TOKENS * HEAD_DIM;
    size_t bytes = elements * (mode == KERNELS_F32 ? 4 : 2);
    size_t table = (size_t)context * HEAD_DIM / 2;
    b->rope = (struct kernels_rope){
        .cos = reals(table), .sin = reals(table), .positions_max = context, .head_dim = HEAD_DIM};
    b->pages = must(rk_alloc_zero((size_t)KV_HEADS * pages, sizeof(*b->pages)));
    b->data = must(rk_alloc_aligned(64, KV_HEADS * pages * bytes));
    b->q = reals((size_t)KERNELS_ROWS_MAX * KV_HEADS * GROUP * HEAD_DIM);
    b->out = reals((size_t)KERNELS_ROWS_MAX * KV_HEADS * GROUP * HEAD_DIM);
    for (size_t i = 0; i < KV_HEADS * pages * elements; i++) {
        float value = (float)(i * 2654435761u >> 8 & 0xffff) / 65536.0f;
        uint32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        if (mode == KERNELS_F32) {
            ((uint32_t *)b->data)[i] = bits;
        } else {
            ((uint16_t *)b->data)[i] = (uint16_t)(bits >> 16);
        }
    }
    for (uint32_t i = 0; i < KV_HEADS * pages; i++) {
        b->pages[i] = (struct kernels_page){.data = b->data + i * bytes,
                                            .position = (int32_t)(i % pages * RK_PAGE_TOKENS),
                                            .live = UINT64_MAX};
    }
    for (uint32_t h = 0; h < KV_HEADS; h++) {
        b->views[h] =
            (struct kernels_head_view){.pages = b->pages + (size_t)h * pages, .num_pages = pages};
    }
}

/* One layer's attention for rows [first, first + rows) of the context. */
static void attention_run(struct kernels *kernels, struct attention_bench *b, uint32_t first,
                          uint32_t rows)
{
    for (uint32_t r = 0; r < rows; r++) {
        b->positions[r] = (int32_t)(first + r);
    }
    for (uint32_t h = 0; h < KV_HEADS; h++) {
        b->views[h].num_pages = (first + rows + RK_PAGE_TOKENS - 1) / RK_PAGE_TOKENS;
    }
    struct kernels_attention a = {.num_kv_heads = KV_HEADS,
                                  .group = GROUP,
                                  .head_dim = HEAD_DIM,
                                  .scale = 0.125f,
                                  .rope = &b->rope,
                                  .heads = b->views,
                                  .q = b->q,
                                  .positions = b->positions,
                                  .rows = rows,
                                  .out = b->out,
                                  .decode = rows == 1};
    kernels_attention(kernels, &a);
}

static void attention_report(const char *what, const struct kernels *kernels, uint32_t context,
                             double seconds, double flops)
{
    printf("{\"kernel\": \"%s\", \"context\": %u, \"mode\": \"%s\", \"isa\": \"%s\", "
           "\"threads\": %u, \"us_layer\": %.1f, \"ms_model\": %.2f, \"gflops\": %.1f}\n",
           what, context, mode_names[kernels_mode(kernels)], kernels_isa_name(kernels),
           kernels_threads(kernels), seconds * 1e6, seconds * 1e3 * LAYERS, flops / seconds * 1e-9);
    fflush(stdout);
}

static void bench_attention(enum kernels_mode mode, enum kernels_isa isa, uint32_t threads,
                            uint32_t context)
{
    struct kernels *kernels = create(mode, isa, threads);
    struct attention_bench b;
    attention_setup(&b, mode, context);
    double prefill = INFINITY;
    double decode = INFINITY;
    int turns = 4;
    for (int turn = 0; turn < turns; turn++) {
        double start = rk_clock_s();
        for (uint32_t first = 0; first < context; first += KERNELS_ROWS_MAX) {
            attention_run(kernels, &b, first, KERNELS_ROWS_MAX);
        }
        prefill = fmin(prefill, rk_clock_s() - start);
    }
    for (int turn = 0; turn < turns * 5; turn++) {
        double start = rk_clock_s();
        attention_run(kernels, &b, context - 1, 1);
        decode = fmin(decode, rk_clock_s() - start);
    }
    double pair = 4.0 * HEAD_DIM * KV_HEADS * GROUP;
    attention_report("attention prefill", kernels, context, prefill,
                     pair * context * (context + 1) / 2);
    attention_report("attention decode", kernels, context, decode, pair * context);
    rk_free(b.pages);
    rk_free(b.data);
    rk_free(b.q);
    rk_free(b.out);
    kernels_destroy(kernels);
}

static void bench_elementwise(uint32_t threads)
{
    struct kernels *kernels = create(KERNELS_F32, KERNELS_ISA_AUTO, threads);
    float *x = reals((size_t)256 * 1536);
    float *y = reals((size_t)256 * 1536);
    float *fresh = reals((size_t)256 * 1536);
    double best[3] = {INFINITY, INFINITY, INFINITY};
    for (int turn = 0; turn < 20; turn++) {
        /* Results on results would end in denormal numbers, which are slow. */
        memcpy(x, fresh, (size_t)256 * 1536 * sizeof(float));
        memcpy(y, fresh, (size_t)256 * 1536 * sizeof(float));
        double t0 = rk_clock_s();
        kernels_rms_norm(kernels, x, fresh, 256, 576, 1e-5f, y);
        double t1 = rk_clock_s();
        kernels_silu_mul(kernels, x, y, 256, 1536);
        double t2 = rk_clock_s();
        kernels_add(kernels, x, y, 256, 576);
        double t3 = rk_clock_s();
        best[0] = fmin(best[0], t1 - t0);
        best[1] = fmin(best[1], t2 - t1);
        best[2] = fmin(best[2], t3 - t2);
    }
    static const char *const names[] = {"rms_norm 256x576", "silu_mul 256x1536", "add 256x576"};
    for (int i = 0; i < 3; i++) {
        printf("{\"kernel\": \"%s\", \"threads\": %u, \"us\": %.1f}\n", names[i], threads,
               best[i] * 1e6);
    }
    rk_free(x);
    rk_free(y);
    rk_free(fresh);
    kernels_destroy(kernels);
}

int main(int argc, char **argv)
{
    uint32_t threads = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 1;
    uint32_t context = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 2048;
    if (threads == 0 || context == 0 || context % KERNELS_ROWS_MAX != 0) {
        fprintf(stderr, "usage: kernels_cpu [threads] [context, a multiple of 256]\n");
        return 2;
    }
    for (int isa = KERNELS_ISA_AVX2; isa <= KERNELS_ISA_AMX; isa++) {
        if (kernels_isa_supported((enum kernels_isa)isa)) {
            if (isa <= KERNELS_ISA_AVX512) {
                bench_attention(KERNELS_F32, (enum kernels_isa)isa, threads, context);
            }
            bench_attention(KERNELS_BF16, (enum kernels_isa)isa, threads, context);
        }
    }
    bench_elementwise(threads);
    bench_matmul(KERNELS_BF16, threads);
    bench_matmul(KERNELS_F32, threads);
    return 0;
}
