/*
 * Goal:   the forward pass computes what the definitions say, for own, borrowed
 *         and partly recomputed contexts, with and without a head map; and its
 *         results do not depend by a single bit on how rows are cut into calls,
 *         on whether KV is computed or borrowed, or on who else is in the batch.
 * Method: a small random Llama; a second forward pass in f64 straight from the
 *         definitions (tiny.c) for the values; memcmp between engines' answers
 *         for the bits, in both modes.
 */
#include "tests/support/skip.h"
#include "tests/worker/engine/tiny.h"
#include "worker/recovery/recovery.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const enum kernels_mode modes[] = {KERNELS_F32, KERNELS_BF16};

/* How many of them this CPU has. */
static size_t num_modes(void)
{
    if (kernels_mode_check(KERNELS_BF16, NULL) == RK_OK) {
        return 2;
    }
    test_left_out("forward passes in bf16", "this CPU multiplies no bf16");
    return 1;
}

static float *logits_create(uint32_t rows)
{
    float *logits = calloc((size_t)rows * TINY_VOCAB, sizeof(*logits));
    assert_non_null(logits);
    return logits;
}

static uint32_t *range(uint32_t begin, uint32_t end)
{
    uint32_t *positions = malloc((end - begin) * sizeof(*positions));
    assert_non_null(positions);
    for (uint32_t i = begin; i < end; i++) {
        positions[i - begin] = i;
    }
    return positions;
}

static struct engine_sequence *sequence_of(struct engine *engine, const uint32_t *lengths,
                                           uint32_t count)
{
    struct engine_sequence *sequence = NULL;
    uint32_t run = 0;
    assert_int_equal(engine_sequence_create(engine, &sequence), RK_OK);
    for (uint32_t i = 0; i < count; i++) {
        assert_int_equal(engine_sequence_add_own(sequence, lengths[i], &run), RK_OK);
        assert_int_equal(run, i);
    }
    return sequence;
}

static uint32_t borrow(struct engine_sequence *to, const struct engine_sequence *from, uint32_t run,
                       uint32_t num_tokens)
{
    const void **pages = calloc((size_t)TINY_PAIRS * rk_kv_pages(num_tokens), sizeof(*pages));
    uint32_t added = 0;
    assert_non_null(pages);
    engine_sequence_run_pages(from, run, pages);
    assert_int_equal(engine_sequence_add_borrowed(to, num_tokens, pages, NULL, false, &added),
                     RK_OK);
    free(pages);
    return added;
}

static void dense_matches_reference(void **state)
{
    (void)state;
    enum { N = 200 };
    for (int tied = 0; tied < 2; tied++) {
        struct model *model = tiny_model(tied != 0);
        struct engine *engine = tiny_engine(model, KERNELS_F32, 2);
        int32_t *ids = tiny_ids(N);
        uint32_t *positions = range(0, N);
        float *expected = logits_create(N);
        float *logits = logits_create(N);
        struct tiny_reference reference;
        struct engine_sequence *sequence = sequence_of(engine, (uint32_t[]){N}, 1);

        tiny_reference_create(&reference, N);
        tiny_reference_run(&reference, model, NULL, ids, positions, N, 0, expected);
        drive_range(engine, sequence, NULL, ids, 0, N, 256, 0, logits);
        assert_true(drive_distance(expected, logits, (size_t)N * TINY_VOCAB) < 2e-4f);

        engine_sequence_destroy(sequence);
        engine_destroy(engine);
        model_close(model);
        tiny_reference_free(&reference);
        free(ids);
        free(positions);
        free(expected);
        free(logits);
    }
}

/* Segments of a request, and where it ends. */
enum { LENGTH_A = 200, LENGTH_B = 131, PROMPT = 20, AHEAD = 16 };
enum { BEGIN_B = LENGTH_A, BEGIN_P = LENGTH_A + LENGTH_B, TOTAL = BEGIN_P + PROMPT };
static const uint32_t lengths[] = {LENGTH_A, LENGTH_B, PROMPT + AHEAD};

/* Prompt rows of logits, then one row for each greedy step, into logits[PROMPT + AHEAD]. */
static void answer(struct engine *engine, struct engine_sequence *sequence,
                   const struct recovery_head_map *map, const int32_t *ids, uint32_t begin,
                   uint32_t chunk, float *logits)
{
    drive_range(engine, sequence, map, ids, begin, TOTAL, chunk, BEGIN_P, logits);
    for (uint32_t i = 0; i < AHEAD; i++) {
        float *row = logits + (size_t)(PROMPT + i) * TINY_VOCAB;
        drive_decode(engine, sequence, map, drive_best(row - TINY_VOCAB, TINY_VOCAB), TOTAL + i,
                     row);
    }
}

static const size_t answer_bytes = (size_t)(PROMPT + AHEAD) * TINY_VOCAB * sizeof(float);

static void chunking_changes_no_bit(void **state)
{
    static const uint32_t chunks[] = {256, 64, 37, 1};
    (void)state;
    for (size_t m = 0; m < num_modes(); m++) {
        struct model *model = tiny_model(true);
        struct engine *engine = tiny_engine(model, modes[m], 2);
        int32_t *ids = tiny_ids(TOTAL);
        float *first = logits_create(PROMPT + AHEAD);
        float *logits = logits_create(PROMPT + AHEAD);

        for (size_t c = 0; c < sizeof(chunks) / sizeof(chunks[0]); c++) {
            struct engine_sequence *sequence = sequence_of(engine, lengths, 3);
            answer(engine, sequence, NULL, ids, 0, chunks[c], c == 0 ? first : logits);
            if (c > 0) {
                assert_memory_equal(first, logits, answer_bytes);
            }
            engine_sequence_destroy(sequence);
        }
        assert_int_equal(engine_pool_pages_used(engine), 0);
        engine_destroy(engine);
        model_close(model);
        free(ids);
        free(first);
        free(logits);
    }
}

static void borrowed_chain_changes_no_bit(void **state)
{
    (void)state;
    for (size_t m = 0; m < num_modes(); m++) {
        struct model *model = tiny_model(false);
        struct engine *engine = tiny_engine(model, modes[m], 2);
        int32_t *ids = tiny_ids(TOTAL);
        float *cold = logits_create(PROMPT + AHEAD);
        float *warm = logits_create(PROMPT + AHEAD);
        struct engine_sequence *owner = sequence_of(engine, lengths, 3);
        struct engine_sequence *sequence = NULL;
        uint32_t run = 0;

        answer(engine, owner, NULL, ids, 0, 256, cold);
        assert_int_equal(engine_sequence_create(engine, &sequence), RK_OK);
        assert_int_equal(borrow(sequence, owner, 0, LENGTH_A), 0);
        assert_int_equal(borrow(sequence, owner, 1, LENGTH_B), 1);
        assert_int_equal(engine_sequence_add_own(sequence, PROMPT + AHEAD, &run), RK_OK);
        answer(engine, sequence, NULL, ids, BEGIN_P, 7, warm);
        assert_memory_equal(cold, warm, answer_bytes);
        assert_true(engine_sequence_flops(sequence) < engine_sequence_flops(owner));

        engine_sequence_destroy(sequence);
        engine_sequence_destroy(owner);
        engine_destroy(engine);
        model_close(model);
        free(ids);
        free(cold);
        free(warm);
    }
}

static void batch_changes_no_bit(void **state)
{
    enum { SEQUENCES = 3, STEPS = 20 };
    static const uint32_t prompts[SEQUENCES] = {70, 3, 130};
    (void)state;
    for (size_t m = 0; m < num_modes(); m++) {
        struct model *model = tiny_model(true);
        struct engine *engine = tiny_engine(model, modes[m], 2);
        int32_t *ids = tiny_ids(256);
        float *alone = logits_create(SEQUENCES * STEPS);
        float *together = logits_create(SEQUENCES);
        float *scrap = logits_create(1);
        struct engine_sequence *sequences[SEQUENCES];
        struct rk_error error = {0};

        for (uint32_t s = 0; s < SEQUENCES; s++) {
            sequences[s] = sequence_of(engine, (uint32_t[]){256}, 1);
            drive_range(engine, sequences[s], NULL, ids + s, 0, prompts[s], 256, UINT32_MAX, scrap);
            for (uint32_t i = 0; i < STEPS; i++) {
                drive_decode(engine, sequences[s], NULL, ids[i], prompts[s] + i,
                             alone + (size_t)(i * SEQUENCES + s) * TINY_VOCAB);
            }
            engine_sequence_destroy(sequences[s]);
            sequences[s] = sequence_of(engine, (uint32_t[]){256}, 1);
            drive_range(engine, sequences[s], NULL, ids + s, 0, prompts[s], 256, UINT32_MAX, scrap);
        }
        for (uint32_t i = 0; i < STEPS; i++) {
            struct engine_row rows[SEQUENCES];
            struct engine_item items[SEQUENCES];
            for (uint32_t s = 0; s < SEQUENCES; s++) {
                rows[s] = (struct engine_row){ids[i], prompts[s] + i, true};
                items[s] = (struct engine_item){sequences[s], &rows[s], 1, NULL};
            }
            assert_int_equal(engine_forward(engine, items, SEQUENCES, true, together, &error),
                             RK_OK);
            assert_memory_equal(together, alone + (size_t)i * SEQUENCES * TINY_VOCAB,
                                SEQUENCES * TINY_VOCAB * sizeof(float));
        }
        for (uint32_t s = 0; s < SEQUENCES; s++) {
            engine_sequence_destroy(sequences[s]);
        }
        engine_destroy(engine);
        model_close(model);
        free(ids);
        free(alone);
        free(together);
        free(scrap);
    }
}

/* Every row of a borrowed run of garbage is computed again: nothing of it may be seen. */
static void overlay_hides_stale_rows(void **state)
{
    enum { FIRST = 90, N = FIRST + 30 };
    (void)state;
    struct model *model = tiny_model(true);
    struct engine *engine = tiny_engine(model, KERNELS_F32, 2);
    struct rk_kv_layout layout;
    int32_t *ids = tiny_ids(N);
    float *expected = logits_create(N);
    float *logits = logits_create(N);
    struct engine_sequence *cold = sequence_of(engine, (uint32_t[]){N}, 1);
    struct engine_sequence *sequence = NULL;
    const void *pages[TINY_PAIRS * 2];
    uint32_t run = 0;

    engine_layout(engine, &layout);
    void *garbage = malloc(rk_kv_page_bytes(&layout));
    assert_non_null(garbage);
    memset(garbage, 0xff, rk_kv_page_bytes(&layout)); /* NaN */
    for (size_t i = 0; i < TINY_PAIRS * 2; i++) {
        pages[i] = garbage;
    }
    drive_range(engine, cold, NULL, ids, 0, N, 256, 0, expected);
    assert_int_equal(engine_sequence_create(engine, &sequence), RK_OK);
    assert_int_equal(engine_sequence_add_borrowed(sequence, FIRST, pages, NULL, false, &run),
                     RK_OK);
    assert_int_equal(engine_sequence_add_own(sequence, N - FIRST, &run), RK_OK);
    drive_range(engine, sequence, NULL, ids, 0, N, 41, 0, logits);
    assert_true(drive_distance(expected, logits, (size_t)N * TINY_VOCAB) < 2e-4f);
    assert_true(engine_sequence_flops(sequence) > 0);

    engine_sequence_destroy(sequence);
    engine_sequence_destroy(cold);
    engine_destroy(engine);
    model_close(model);
    free(garbage);
    free(ids);
    free(expected);
    free(logits);
}

/* Pages of a run that its plan asks for; the others are not there. */
static void borrow_planned(struct engine_sequence *to, const struct engine_sequence *from,
                           const struct recovery_run *run)
{
    uint32_t num_pages = rk_kv_pages(run->num_tokens);
    const void **all = calloc((size_t)TINY_PAIRS * num_pages, sizeof(*all));
    const void **planned = calloc((size_t)TINY_PAIRS * num_pages, sizeof(*planned));
    uint32_t added = 0;

    assert_true(all && planned);
    engine_sequence_run_pages(from, 0, all);
    for (size_t i = 0; i < run->num_extents; i++) {
        const struct rk_extent *extent = &run->extents[i];
        for (uint32_t page = extent->page_begin; page < extent->page_end; page++) {
            size_t at = (size_t)(extent->layer * TINY_KV + extent->kv_head) * num_pages + page;
            planned[at] = all[at];
        }
    }
    assert_int_equal(
        engine_sequence_add_borrowed(to, run->num_tokens, planned, NULL, false, &added), RK_OK);
    free(all);
    free(planned);
}

/* A whole "fast" request, as its plan says: against the definitions, and once more with all pages
 * present, which must not change a bit. */
static void fast_plan_matches_reference(void **state)
{
    const struct recovery_segment segments[] = {{LENGTH_A, false, true}, {LENGTH_B, false, true}};
    (void)state;
    struct model *model = tiny_model(true);
    struct engine *engine = tiny_engine(model, KERNELS_F32, 2);
    struct recovery_head_map *map = tiny_head_map();
    struct rk_kv_layout layout;
    int32_t *ids = tiny_ids(TOTAL);
    float *expected = logits_create(PROMPT);
    float *logits = logits_create(PROMPT + AHEAD);
    float *whole = logits_create(PROMPT + AHEAD);
    struct tiny_reference alone[2];
    struct tiny_reference request;
    struct engine_sequence *owners[2];
    struct recovery_plan plan;
    struct rk_error error = {0};
    uint32_t run = 0;

    engine_layout(engine, &layout);
    assert_int_equal(recovery_plan_make(recovery_level_find("fast"), map, &layout, segments, 2,
                                        PROMPT, AHEAD, &plan, &error),
                     RK_OK);
    assert_int_equal(plan.num_positions, 4 + PROMPT);
    assert_true(plan.runs[0].num_pages < TINY_PAIRS * rk_kv_pages(LENGTH_A));
    tiny_reference_create(&request, TOTAL);
    for (uint32_t s = 0; s < 2; s++) {
        uint32_t *positions = range(0, lengths[s]);
        uint32_t begin = plan.runs[s].position;
        owners[s] = sequence_of(engine, &lengths[s], 1);
        drive_range(engine, owners[s], NULL, ids + begin, 0, lengths[s], 64, UINT32_MAX, NULL);
        tiny_reference_create(&alone[s], lengths[s]);
        tiny_reference_run(&alone[s], model, NULL, ids + begin, positions, lengths[s], UINT32_MAX,
                           NULL);
        tiny_reference_copy(&request, begin, &alone[s]);
        tiny_reference_free(&alone[s]);
        free(positions);
    }
    tiny_reference_run(&request, model, map, ids, plan.positions, plan.num_positions, BEGIN_P,
                       expected);
    for (int all = 0; all < 2; all++) {
        struct engine_sequence *sequence = NULL;
        float *out = all ? whole : logits;
        assert_int_equal(engine_sequence_create(engine, &sequence), RK_OK);
        for (uint32_t s = 0; s < 2; s++) {
            if (all) {
                (void)borrow(sequence, owners[s], 0, lengths[s]);
            } else {
                borrow_planned(sequence, owners[s], &plan.runs[s]);
            }
        }
        assert_int_equal(engine_sequence_add_own(sequence, PROMPT + AHEAD, &run), RK_OK);
        drive_rows(engine, sequence, map, ids, plan.positions, 4, 256, BEGIN_P, out);
        answer(engine, sequence, map, ids, BEGIN_P, all ? 256 : 9, out);
        engine_sequence_destroy(sequence);
    }
    assert_true(drive_distance(expected, logits, (size_t)PROMPT * TINY_VOCAB) < 2e-4f);
    assert_memory_equal(logits, whole, answer_bytes);

    for (uint32_t s = 0; s < 2; s++) {
        engine_sequence_destroy(owners[s]);
    }
    recovery_plan_free(&plan);
    tiny_reference_free(&request);
    recovery_head_map_destroy(map);
    engine_destroy(engine);
    model_close(model);
    free(ids);
    free(expected);
    free(logits);
    free(whole);
}

static void bf16_stays_close(void **state)
{
    enum { N = 150 };
    (void)state;
    if (num_modes() < 2) {
        return;
    }
    struct model *model = tiny_model(true);
    int32_t *ids = tiny_ids(N);
    float *logits[2];
    double kl = 0;

    for (size_t m = 0; m < 2; m++) {
        struct engine *engine = tiny_engine(model, modes[m], 2);
        struct engine_sequence *sequence = sequence_of(engine, (uint32_t[]){N}, 1);
        logits[m] = logits_create(N);
        drive_range(engine, sequence, NULL, ids, 0, N, 256, 0, logits[m]);
        engine_sequence_destroy(sequence);
        engine_destroy(engine);
    }
    for (size_t i = 0; i < N; i++) {
        kl += drive_kl(logits[0] + i * TINY_VOCAB, logits[1] + i * TINY_VOCAB, TINY_VOCAB) / N;
    }
    assert_true(kl > 0 && kl < 0.01);
    model_close(model);
    free(ids);
    free(logits[0]);
    free(logits[1]);
}

/* What a cold sequence counts is what the closed form says, to the last FLOP; with a head map it
 * is what brute force over visible keys says. */
static void flops_agree(void **state)
{
    enum { N = 150 };
    (void)state;
    struct model *model = tiny_model(true);
    struct engine *engine = tiny_engine(model, KERNELS_F32, 1);
    struct recovery_head_map *map = tiny_head_map();
    int32_t *ids = tiny_ids(N);
    float *logits = logits_create(1);
    double skipped = 0;

    for (int mapped = 0; mapped < 2; mapped++) {
        struct engine_sequence *sequence = sequence_of(engine, (uint32_t[]){N}, 1);
        drive_range(engine, sequence, mapped ? map : NULL, ids, 0, N, 37, N - 1, logits);
        for (uint32_t layer = 0; mapped && layer < TINY_LAYERS; layer++) {
            for (uint32_t t = layer + 1 == TINY_LAYERS ? N - 1 : 0; t < N; t++) {
                for (uint32_t h = 0; h < TINY_HEADS; h++) {
                    struct recovery_head head = recovery_head_map_get(map, layer, h / 2);
                    for (uint32_t c = 0; c <= t; c++) {
                        bool seen = head.window == 0 || c + head.window > t || c < head.sink;
                        skipped += seen ? 0 : 4.0 * TINY_DIM;
                    }
                }
            }
        }
        assert_true(!mapped || skipped > 0);
        assert_true(engine_sequence_flops(sequence) == engine_flops_full(engine, N) - skipped);
        engine_sequence_destroy(sequence);
    }
    recovery_head_map_destroy(map);
    engine_destroy(engine);
    model_close(model);
    free(ids);
    free(logits);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dense_matches_reference),
        cmocka_unit_test(chunking_changes_no_bit),
        cmocka_unit_test(borrowed_chain_changes_no_bit),
        cmocka_unit_test(batch_changes_no_bit),
        cmocka_unit_test(overlay_hides_stale_rows),
        cmocka_unit_test(fast_plan_matches_reference),
        cmocka_unit_test(bf16_stays_close),
        cmocka_unit_test(flops_agree),
    };
    tiny_seed(20240611);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
