/*
 * Goal:   SmolLM2-135M gives the numbers of the reference implementation: at
 *         every position of six prompts, inside the layers, and for contexts
 *         put together from segments prefilled alone (with and without a head
 *         map). bf16 stays close, and in both modes no bit depends on chunking,
 *         on borrowing or on the batch.
 * Method: tests/golden (its README says how it was made and how near to f64 it
 *         is); bounds are those of that README. Greedy ids are compared until
 *         the reference's own gap falls below twice the bound.
 */
#include "tests/support/golden.h"
#include "tests/support/skip.h"
#include "tests/worker/engine/drive.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LOGITS_BOUND 2e-3f
#define VOCAB        49152u
#define LAYERS       30u
#define KV_HEADS     3u
#define DIM          64u
#define PAIRS        (LAYERS * KV_HEADS)

static struct model *model;
static struct engine *engines[2]; /* f32, bf16 */
static size_t num_engines = 2;    /* 1: this CPU has no bf16 */

static struct engine *open_engine(enum kernels_mode mode)
{
    const struct engine_options options = {.mode = mode, .context_tokens = 2048};
    struct engine *engine = NULL;
    struct rk_error error = {0};
    if (engine_create(model, &options, &engine, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    return engine;
}

static int open_all(void **state)
{
    struct rk_error error = {0};
    (void)state;
    if (model_open(golden_model_path(), &model, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    engines[0] = open_engine(KERNELS_F32);
    if (kernels_mode_check(KERNELS_BF16, NULL) == RK_OK) {
        engines[1] = open_engine(KERNELS_BF16);
    } else {
        num_engines = 1;
        test_left_out("golden data in bf16", "this CPU multiplies no bf16");
    }
    return 0;
}

static int close_all(void **state)
{
    (void)state;
    engine_destroy(engines[0]);
    engine_destroy(engines[1]);
    model_close(model);
    return 0;
}

static float *rows_create(size_t rows)
{
    float *logits = malloc(rows * VOCAB * sizeof(*logits));
    assert_non_null(logits);
    return logits;
}

static struct engine_sequence *sequence_create(struct engine *engine)
{
    struct engine_sequence *sequence = NULL;
    assert_int_equal(engine_sequence_create(engine, &sequence), RK_OK);
    return sequence;
}

static void add_own(struct engine_sequence *sequence, uint32_t num_tokens)
{
    uint32_t run = 0;
    assert_int_equal(engine_sequence_add_own(sequence, num_tokens, &run), RK_OK);
}

static void add_borrowed(struct engine_sequence *to, const struct engine_sequence *from,
                         uint32_t from_run, uint32_t num_tokens)
{
    const void **pages = malloc((size_t)PAIRS * rk_kv_pages(num_tokens) * sizeof(*pages));
    uint32_t run = 0;
    assert_non_null(pages);
    engine_sequence_run_pages(from, from_run, pages);
    assert_int_equal(engine_sequence_add_borrowed(to, num_tokens, pages, NULL, false, &run), RK_OK);
    free(pages);
}

/* ---- Comparisons ---- */

/* The ten best of one position: their log probabilities, and that nothing else belongs there. */
static void check_top10(const float *logits, const int32_t *ids, const float *logprobs)
{
    float *own = rows_create(1);
    engine_log_softmax(logits, VOCAB, own);
    for (uint32_t i = 0; i < 10; i++) {
        assert_true(fabsf(own[ids[i]] - logprobs[i]) <= LOGITS_BOUND);
        own[ids[i]] = -INFINITY;
    }
    for (uint32_t i = 0; i < VOCAB; i++) {
        assert_true(own[i] <= logprobs[9] + LOGITS_BOUND);
    }
    free(own);
}

/* logits: of the last prompt position; overwritten by each step. */
static void check_greedy(struct engine *engine, struct engine_sequence *sequence,
                         const struct recovery_head_map *map, const json_t *golden,
                         uint32_t position, float *logits)
{
    const json_t *gaps = golden_member(golden, "greedy_gap");
    size_t count = 0;
    int32_t *ids = golden_ids(golden_member(golden, "greedy_ids"), &count);
    size_t step = 0;

    assert_true(count > 0 && json_array_size(gaps) == count);
    for (; step < count; step++) {
        if (json_number_value(json_array_get(gaps, step)) <= 2 * (double)LOGITS_BOUND) {
            break;
        }
        assert_int_equal(drive_best(logits, VOCAB), ids[step]);
        drive_decode(engine, sequence, map, ids[step], position++, logits);
    }
    print_message("    %zu of %zu greedy ids\n", step, count);
    free(ids);
}

static const char *format_name(char *text, const char *a, const char *b)
{
    (void)snprintf(text, 96, "%s.%s", a, b);
    return text;
}

static void check_prompt(const struct golden *golden, const json_t *prompt)
{
    const char *name = json_string_value(golden_member(prompt, "name"));
    struct engine_sequence *sequence = sequence_create(engines[0]);
    char text[96];
    size_t count = 0;
    int32_t *ids = golden_ids(golden_member(prompt, "ids"), &count);
    const int32_t *top = golden_i32(golden, format_name(text, name, "top10_ids"), count * 10);
    const float *logprobs =
        golden_f32(golden, format_name(text, name, "top10_logprobs"), count * 10);
    const float *last = golden_f32(golden, format_name(text, name, "last_logits"), VOCAB);
    float *logits = rows_create(KERNELS_ROWS_MAX);
    uint32_t n = (uint32_t)count;
    uint32_t rows = 0;

    add_own(sequence, n + 64);
    for (uint32_t begin = 0; begin < n; begin += rows) {
        rows = n - begin < KERNELS_ROWS_MAX ? n - begin : KERNELS_ROWS_MAX;
        drive_range(engines[0], sequence, NULL, ids, begin, begin + rows, rows, begin, logits);
        for (uint32_t r = 0; r < rows; r++) {
            check_top10(logits + (size_t)r * VOCAB, top + (size_t)(begin + r) * 10,
                        logprobs + (size_t)(begin + r) * 10);
        }
    }
    float *mine = logits + (size_t)(rows - 1) * VOCAB;
    float distance = drive_distance(mine, last, VOCAB);
    print_message("    %s: last logits differ by %.2g\n", name, (double)distance);
    assert_true(distance <= LOGITS_BOUND);
    check_greedy(engines[0], sequence, NULL, prompt, n, mine);
    engine_sequence_destroy(sequence);
    free(ids);
    free(logits);
}

static void prompts_match(void **state)
{
    (void)state;
    struct golden *golden = golden_open("smollm2/prompts.safetensors");
    json_t *root = golden_json("smollm2/prompts.json");
    const json_t *cases = golden_member(root, "cases");

    assert_int_equal(json_array_size(cases), 6);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        check_prompt(golden, json_array_get(cases, i));
    }
    json_decref(root);
    golden_close(golden);
}

/* expected: [kv_head][token][dim]; part 0: K, 1: V. */
static void check_pages(const struct engine_sequence *sequence, uint32_t layer, uint32_t part,
                        uint32_t num_tokens, const float *expected)
{
    uint32_t num_pages = rk_kv_pages(num_tokens);
    const void **pages = malloc((size_t)PAIRS * num_pages * sizeof(*pages));
    float largest = 0;
    float distance = 0;

    assert_non_null(pages);
    engine_sequence_run_pages(sequence, 0, pages);
    for (uint32_t head = 0; head < KV_HEADS; head++) {
        for (uint32_t token = 0; token < num_tokens; token++) {
            const float *page = pages[(layer * KV_HEADS + head) * num_pages + token / 64];
            const float *row = page + (part * 64 + token % 64) * DIM;
            const float *golden = expected + ((size_t)head * num_tokens + token) * DIM;
            float one = drive_distance(row, golden, DIM);
            distance = one > distance ? one : distance;
            for (uint32_t i = 0; i < DIM; i++) {
                largest = fabsf(golden[i]) > largest ? fabsf(golden[i]) : largest;
            }
        }
    }
    assert_true(largest > 0 && distance <= 1e-3f * largest);
    free(pages);
}

static void check_layers(const struct golden *golden, const char *prefix,
                         const struct engine_sequence *sequence, uint32_t num_tokens)
{
    static const uint32_t layers[] = {0, 15, 29};
    char text[96];
    for (size_t i = 0; i < 3; i++) {
        for (uint32_t part = 0; part < 2; part++) {
            (void)snprintf(text, sizeof(text), "%s%c.%u", prefix, part ? 'v' : 'k', layers[i]);
            const float *expected = golden_f32(golden, text, (uint64_t)KV_HEADS * num_tokens * DIM);
            check_pages(sequence, layers[i], part, num_tokens, expected);
        }
    }
}

/* Ids of a prompt by name; free with free(). */
static int32_t *prompt_ids(const char *name, size_t *ret_count)
{
    json_t *root = golden_json("smollm2/prompts.json");
    const json_t *cases = golden_member(root, "cases");
    int32_t *ids = NULL;
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *prompt = json_array_get(cases, i);
        if (strcmp(json_string_value(golden_member(prompt, "name")), name) == 0) {
            ids = golden_ids(golden_member(prompt, "ids"), ret_count);
        }
    }
    json_decref(root);
    assert_non_null(ids);
    return ids;
}

static void layers_match(void **state)
{
    (void)state;
    struct golden *golden = golden_open("smollm2/layers.safetensors");
    struct engine_sequence *sequence = sequence_create(engines[0]);
    size_t count = 0;
    int32_t *ids = prompt_ids("p2_doc200", &count);

    assert_int_equal(count, 200);
    add_own(sequence, 200);
    drive_range(engines[0], sequence, NULL, ids, 0, 200, 256, UINT32_MAX, NULL);
    check_layers(golden, "", sequence, 200);
    engine_sequence_destroy(sequence);
    golden_close(golden);
    free(ids);
}

/* ---- Reuse ---- */

struct reuse {
    json_t *root;
    struct golden *golden;
    struct recovery_head_map *map;
    struct engine_sequence *alone[3]; /* A, B, C */
    int32_t *ids[3];
    size_t lengths[3];
};

static void reuse_open(struct engine *engine, struct reuse *reuse)
{
    struct rk_error error = {0};
    reuse->root = golden_json("reuse/reuse.json");
    reuse->golden = golden_open("reuse/reuse.safetensors");
    json_t *map = golden_json("reuse/head_map.json");
    char *text = json_dumps(map, 0);
    if (recovery_head_map_parse(text, strlen(text), "head_map.json", LAYERS, KV_HEADS, &reuse->map,
                                &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    free(text);
    json_decref(map);
    for (size_t i = 0; i < 3; i++) {
        const char name[2] = {(char)('A' + i), '\0'};
        const json_t *segment = golden_member(golden_member(reuse->root, "segments"), name);
        reuse->ids[i] = golden_ids(golden_member(segment, "ids"), &reuse->lengths[i]);
        reuse->alone[i] = sequence_create(engine);
        add_own(reuse->alone[i], (uint32_t)reuse->lengths[i]);
        drive_range(engine, reuse->alone[i], NULL, reuse->ids[i], 0, (uint32_t)reuse->lengths[i],
                    256, UINT32_MAX, NULL);
    }
}

static void reuse_close(struct reuse *reuse)
{
    for (size_t i = 0; i < 3; i++) {
        engine_sequence_destroy(reuse->alone[i]);
        free(reuse->ids[i]);
    }
    recovery_head_map_destroy(reuse->map);
    golden_close(reuse->golden);
    json_decref(reuse->root);
}

/* Appends the case's segments, borrowed or own; fills ids; returns where the question begins. */
static uint32_t add_segments(const struct reuse *reuse, const json_t *one, bool borrowed,
                             struct engine_sequence *sequence, int32_t *ids)
{
    const json_t *segments = golden_member(one, "segments");
    uint32_t position = 0;
    for (size_t i = 0; i < json_array_size(segments); i++) {
        const json_t *segment = json_array_get(segments, i);
        size_t at = (size_t)(json_string_value(golden_member(segment, "segment"))[0] - 'A');
        uint32_t length = (uint32_t)reuse->lengths[at];
        if (borrowed) {
            add_borrowed(sequence, reuse->alone[at], 0, length);
        } else {
            add_own(sequence, length);
        }
        memcpy(ids + position, reuse->ids[at], length * sizeof(*ids));
        position += length;
    }
    return position;
}

static void check_case(const struct reuse *reuse, const json_t *one, const char *mode)
{
    const char *name = json_string_value(golden_member(one, "name"));
    const json_t *question = golden_member(golden_member(reuse->root, "questions"),
                                           json_string_value(golden_member(one, "question")));
    const struct recovery_head_map *map = strcmp(mode, "headmap") == 0 ? reuse->map : NULL;
    bool borrowed = strcmp(mode, "full") != 0;
    struct engine_sequence *sequence = sequence_create(engines[0]);
    int32_t ids[1024];
    char prefix[64];
    char text[96];
    size_t count = 0;
    int32_t *asked = golden_ids(golden_member(question, "ids"), &count);
    float *logits = rows_create(count);

    uint32_t begin = add_segments(reuse, one, borrowed, sequence, ids);
    memcpy(ids + begin, asked, count * sizeof(*ids));
    uint32_t end = begin + (uint32_t)count;
    add_own(sequence, (uint32_t)count + 32);
    drive_range(engines[0], sequence, map, ids, borrowed ? begin : 0, end, 256, begin, logits);

    (void)snprintf(prefix, sizeof(prefix), "%s.%s", name, mode);
    const int32_t *top =
        golden_i32(reuse->golden, format_name(text, prefix, "top10_ids"), count * 10);
    const float *logprobs =
        golden_f32(reuse->golden, format_name(text, prefix, "top10_logprobs"), count * 10);
    for (size_t i = 0; i < count; i++) {
        check_top10(logits + i * VOCAB, top + i * 10, logprobs + i * 10);
    }
    float *last = logits + (count - 1) * VOCAB;
    float distance = drive_distance(
        last, golden_f32(reuse->golden, format_name(text, prefix, "last_logits"), VOCAB), VOCAB);
    print_message("    %s: last logits differ by %.2g\n", prefix, (double)distance);
    assert_true(distance <= LOGITS_BOUND);
    check_greedy(engines[0], sequence, map, golden_member(golden_member(one, "modes"), mode), end,
                 last);
    engine_sequence_destroy(sequence);
    free(asked);
    free(logits);
}

static void reuse_matches(void **state)
{
    struct reuse reuse;
    (void)state;
    reuse_open(engines[0], &reuse);
    const json_t *cases = golden_member(reuse.root, "cases");
    assert_int_equal(json_array_size(cases), 5);
    check_layers(reuse.golden, "segment.C.", reuse.alone[2], (uint32_t)reuse.lengths[2]);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        check_case(&reuse, json_array_get(cases, i), "full");
        check_case(&reuse, json_array_get(cases, i), "verbatim");
        check_case(&reuse, json_array_get(cases, i), "headmap");
    }
    reuse_close(&reuse);
}

/* ---- bf16 and bits ---- */

static void bf16_stays_close(void **state)
{
    static const char *const names[] = {"p0_short", "p1_chat", "p2_doc200", "p3_doc"};
    double kl = 0;
    uint32_t same = 0;
    uint32_t positions = 0;
    (void)state;
    if (num_engines < 2) {
        return;
    }

    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        size_t count = 0;
        int32_t *ids = prompt_ids(names[i], &count);
        float *logits[2];
        for (size_t m = 0; m < 2; m++) {
            struct engine_sequence *sequence = sequence_create(engines[m]);
            logits[m] = rows_create(count);
            add_own(sequence, (uint32_t)count);
            drive_range(engines[m], sequence, NULL, ids, 0, (uint32_t)count, 256, 0, logits[m]);
            engine_sequence_destroy(sequence);
        }
        for (size_t p = 0; p < count; p++) {
            const float *a = logits[0] + p * VOCAB;
            const float *b = logits[1] + p * VOCAB;
            kl += drive_kl(a, b, VOCAB);
            same += drive_best(a, VOCAB) == drive_best(b, VOCAB);
            positions++;
        }
        free(logits[0]);
        free(logits[1]);
        free(ids);
    }
    print_message("    mean KL %.2g, top-1 agrees at %.4f of %u positions\n", kl / positions,
                  (double)same / positions, positions);
    assert_true(kl / positions < 0.01);
    assert_true((double)same / positions > 0.95);
}

enum { STEPS = 16 };

/* Logits of the last row of ids[begin, end), then of STEPS greedy steps. */
static void answer(struct engine *engine, struct engine_sequence *sequence, const int32_t *ids,
                   uint32_t begin, uint32_t end, uint32_t want_from, uint32_t chunk, float *logits)
{
    drive_range(engine, sequence, NULL, ids, begin, end, chunk, want_from, logits);
    logits += (size_t)(end - want_from - 1) * VOCAB;
    for (uint32_t i = 0; i < STEPS; i++) {
        drive_decode(engine, sequence, NULL, drive_best(logits, VOCAB), end + i, logits + VOCAB);
        logits += VOCAB;
    }
}

static void chunking_changes_no_bit(void **state)
{
    static const uint32_t chunks[] = {256, 64, 37};
    enum { WANTED = 20 };
    size_t count = 0;
    int32_t *ids = prompt_ids("p3_doc", &count);
    uint32_t n = (uint32_t)count;
    float *first = rows_create(WANTED + STEPS);
    float *logits = rows_create(WANTED + STEPS);
    (void)state;

    for (size_t m = 0; m < num_engines; m++) {
        for (size_t c = 0; c < 3; c++) {
            struct engine_sequence *sequence = sequence_create(engines[m]);
            add_own(sequence, n + STEPS);
            answer(engines[m], sequence, ids, 0, n, n - WANTED, chunks[c], c ? logits : first);
            engine_sequence_destroy(sequence);
            if (c > 0) {
                assert_memory_equal(first, logits, (WANTED + STEPS) * VOCAB * sizeof(float));
            }
        }
    }
    free(ids);
    free(first);
    free(logits);
}

static void borrowed_chain_changes_no_bit(void **state)
{
    enum { A = 200, B = 211, PROMPT = 100 };
    size_t count = 0;
    int32_t *ids = prompt_ids("p3_doc", &count);
    float *cold = rows_create(PROMPT + STEPS);
    float *warm = rows_create(PROMPT + STEPS);
    (void)state;

    assert_int_equal(count, A + B + PROMPT);
    for (size_t m = 0; m < num_engines; m++) {
        struct engine_sequence *owner = sequence_create(engines[m]);
        struct engine_sequence *sequence = sequence_create(engines[m]);
        add_own(owner, A);
        add_own(owner, B);
        add_own(owner, PROMPT + STEPS);
        answer(engines[m], owner, ids, 0, A + B + PROMPT, A + B, 256, cold);
        add_borrowed(sequence, owner, 0, A);
        add_borrowed(sequence, owner, 1, B);
        add_own(sequence, PROMPT + STEPS);
        answer(engines[m], sequence, ids, A + B, A + B + PROMPT, A + B, 64, warm);
        assert_memory_equal(cold, warm, (PROMPT + STEPS) * VOCAB * sizeof(float));
        engine_sequence_destroy(sequence);
        engine_sequence_destroy(owner);
    }
    free(ids);
    free(cold);
    free(warm);
}

static void batch_changes_no_bit(void **state)
{
    static const char *const names[] = {"p0_short", "p1_chat", "p2_doc200"};
    struct rk_error error = {0};
    float *together = rows_create(3);
    (void)state;

    for (size_t m = 0; m < num_engines; m++) {
        struct engine_sequence *sequences[3];
        float *alone[3];
        uint32_t lengths[3];
        for (size_t s = 0; s < 3; s++) {
            size_t count = 0;
            int32_t *ids = prompt_ids(names[s], &count);
            uint32_t n = lengths[s] = (uint32_t)count;
            alone[s] = rows_create(1 + STEPS);
            sequences[s] = sequence_create(engines[m]);
            add_own(sequences[s], n + STEPS);
            answer(engines[m], sequences[s], ids, 0, n, n - 1, 256, alone[s]);
            engine_sequence_destroy(sequences[s]);
            sequences[s] = sequence_create(engines[m]);
            add_own(sequences[s], n + STEPS);
            drive_range(engines[m], sequences[s], NULL, ids, 0, n, 256, UINT32_MAX, NULL);
            free(ids);
        }
        for (uint32_t i = 0; i < STEPS; i++) {
            struct engine_row rows[3];
            struct engine_item items[3];
            for (size_t s = 0; s < 3; s++) {
                rows[s] = (struct engine_row){drive_best(alone[s] + (size_t)i * VOCAB, VOCAB),
                                              lengths[s] + i, true};
                items[s] = (struct engine_item){sequences[s], &rows[s], 1, NULL};
            }
            assert_int_equal(engine_forward(engines[m], items, 3, true, together, &error), RK_OK);
            for (size_t s = 0; s < 3; s++) {
                assert_memory_equal(together + s * VOCAB, alone[s] + (size_t)(i + 1) * VOCAB,
                                    VOCAB * sizeof(float));
            }
        }
        for (size_t s = 0; s < 3; s++) {
            engine_sequence_destroy(sequences[s]);
            free(alone[s]);
        }
    }
    free(together);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(prompts_match),           cmocka_unit_test(layers_match),
        cmocka_unit_test(reuse_matches),           cmocka_unit_test(bf16_stays_close),
        cmocka_unit_test(chunking_changes_no_bit), cmocka_unit_test(borrowed_chain_changes_no_bit),
        cmocka_unit_test(batch_changes_no_bit),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
