/*
 * Prefill and decode of a model on this machine.
 *
 *   bench_engine MODEL.gguf THREADS bf16|f32 [ISA]
 *
 * One round per line of standard input, "prefill" or "decode", one JSON line each,
 * so that bench/prefill.py can take turns with another program. Prefill: a cold
 * context of 2,048 tokens in calls of KERNELS_ROWS_MAX rows, logits of the last one
 * only. Decode: 64 tokens of one sequence behind 512.
 */
#include "worker/engine/engine.h"
#include "common/base/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PREFILL_TOKENS = 2048, DECODE_CONTEXT = 512, DECODE_STEPS = 64 };

static void die(const char *what, const struct rk_error *error)
{
    (void)fprintf(stderr, "%s: %s\n", what, error->text);
    exit(1);
}

static void forward(struct engine *engine, struct engine_sequence *sequence, uint32_t begin,
                    uint32_t count, bool want, bool decode, float *logits)
{
    struct engine_row rows[KERNELS_ROWS_MAX];
    struct rk_error error = {0};
    const struct engine_item item = {sequence, rows, count, NULL};

    for (uint32_t i = 0; i < count; i++) {
        uint32_t id = (begin + i) * 7919u % (engine_vocab_size(engine) - 100) + 50;
        rows[i] = (struct engine_row){(int32_t)id, begin + i, want && i + 1 == count};
    }
    if (engine_forward(engine, &item, 1, decode, logits, &error) != RK_OK) {
        die("forward", &error);
    }
}

static struct engine_sequence *sequence_create(struct engine *engine, uint32_t tokens)
{
    struct engine_sequence *sequence = NULL;
    const struct rk_error error = {.status = RK_ERR_NO_MEMORY, .text = "no memory"};
    uint32_t run = 0;
    if (engine_sequence_create(engine, &sequence) != RK_OK ||
        engine_sequence_add_own(sequence, tokens, &run) != RK_OK) {
        die("sequence", &error);
    }
    return sequence;
}

static void prefill(struct engine *engine, struct engine_sequence *sequence, uint32_t tokens,
                    float *logits)
{
    for (uint32_t begin = 0; begin < tokens; begin += KERNELS_ROWS_MAX) {
        uint32_t left = tokens - begin;
        uint32_t count = left < KERNELS_ROWS_MAX ? left : KERNELS_ROWS_MAX;
        forward(engine, sequence, begin, count, count == left, false, logits);
    }
}

static double measure_prefill(struct engine *engine, float *logits)
{
    struct engine_sequence *sequence = sequence_create(engine, PREFILL_TOKENS);
    int64_t begin = rk_clock_ns();
    prefill(engine, sequence, PREFILL_TOKENS, logits);
    double seconds = (double)(rk_clock_ns() - begin) * 1e-9;
    engine_sequence_destroy(sequence);
    return PREFILL_TOKENS / seconds;
}

static double measure_decode(struct engine *engine, float *logits)
{
    struct engine_sequence *sequence = sequence_create(engine, DECODE_CONTEXT + DECODE_STEPS);
    prefill(engine, sequence, DECODE_CONTEXT, logits);
    int64_t begin = rk_clock_ns();
    for (uint32_t i = 0; i < DECODE_STEPS; i++) {
        forward(engine, sequence, DECODE_CONTEXT + i, 1, true, true, logits);
    }
    double seconds = (double)(rk_clock_ns() - begin) * 1e-9;
    engine_sequence_destroy(sequence);
    return DECODE_STEPS / seconds;
}

_Noreturn static void usage(const char *what)
{
    (void)fprintf(stderr, "%s\nusage: bench_engine MODEL.gguf THREADS bf16|f32 [ISA]\n", what);
    exit(2);
}

static enum kernels_isa find_isa(const char *name)
{
    static const struct {
        const char *name;
        enum kernels_isa isa;
    } isas[] = {
        {"auto", KERNELS_ISA_AUTO},
        {"reference", KERNELS_ISA_REFERENCE},
        {"avx2", KERNELS_ISA_AVX2},
        {"avx512", KERNELS_ISA_AVX512},
        {"avx512_bf16", KERNELS_ISA_AVX512_BF16},
        {"amx", KERNELS_ISA_AMX},
    };
    for (size_t i = 0; i < sizeof(isas) / sizeof(isas[0]); i++) {
        if (strcmp(isas[i].name, name) == 0) {
            return isas[i].isa;
        }
    }
    usage("unknown attention path");
}

/* A figure must not be of another mode than its line says. */
static enum kernels_mode find_mode(const char *name)
{
    if (strcmp(name, "f32") != 0 && strcmp(name, "bf16") != 0) {
        usage("unknown mode");
    }
    return strcmp(name, "f32") == 0 ? KERNELS_F32 : KERNELS_BF16;
}

static uint32_t find_threads(const char *text)
{
    char *end = NULL;
    unsigned long threads = strtoul(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || threads < 1 || threads > 1024) {
        usage("THREADS is a number from 1 to 1024");
    }
    return (uint32_t)threads;
}

int main(int argc, char **argv)
{
    struct model *model = NULL;
    struct engine *engine = NULL;
    struct rk_error error = {0};
    char line[64];

    if (argc < 4) {
        usage("too few arguments");
    }
    const struct engine_options options = {
        .mode = find_mode(argv[3]),
        .isa = find_isa(argc > 4 ? argv[4] : "auto"),
        .threads = find_threads(argv[2]),
        .context_tokens = PREFILL_TOKENS,
    };
    if (model_open(argv[1], &model, &error) != RK_OK ||
        engine_create(model, &options, &engine, &error) != RK_OK) {
        die("engine", &error);
    }
    model_close(model);
    float *logits = calloc(engine_vocab_size(engine), sizeof(*logits));
    if (!logits) {
        abort();
    }
    printf("{\"ready\": true}\n");
    (void)fflush(stdout);
    while (fgets(line, sizeof(line), stdin)) {
        bool decode = strncmp(line, "decode", 6) == 0;
        double rate = decode ? measure_decode(engine, logits) : measure_prefill(engine, logits);
        printf("{\"what\": \"%s\", \"mode\": \"%s\", \"isa\": \"%s\", \"threads\": %u, "
               "\"tokens_per_s\": %.1f}\n",
               decode ? "decode" : "prefill", argv[3], engine_isa_name(engine), options.threads,
               rate);
        (void)fflush(stdout);
    }
    free(logits);
    engine_destroy(engine);
    return 0;
}
