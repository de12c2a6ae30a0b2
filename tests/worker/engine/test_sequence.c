/*
 * Goal:   sequences refuse what cannot be right and stay as they were; the pool
 *         gives back every page; a damaged borrowed page is found before it is
 *         used, and its run is named.
 * Method: a small random Llama; damage of one byte at random places (the seed is
 *         printed); each allocation failing in turn.
 */
#include "tests/worker/engine/tiny.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct model *model;
static struct engine *engine;

static int open_engine(void **state)
{
    /* 6 token pages: 384 tokens. */
    const struct engine_options options = {.mode = KERNELS_F32, .threads = 2, .pool_tokens = 384};
    (void)state;
    model = tiny_model(true);
    assert_int_equal(engine_create(model, &options, &engine, NULL), RK_OK);
    return 0;
}

static int close_engine(void **state)
{
    (void)state;
    assert_int_equal(engine_pool_pages_used(engine), 0);
    engine_destroy(engine);
    model_close(model);
    return 0;
}

static struct engine_sequence *own_sequence(uint32_t num_tokens)
{
    struct engine_sequence *sequence = NULL;
    uint32_t run = 0;
    assert_int_equal(engine_sequence_create(engine, &sequence), RK_OK);
    assert_int_equal(engine_sequence_add_own(sequence, num_tokens, &run), RK_OK);
    return sequence;
}

static enum rk_status forward_one(struct engine_sequence *sequence, int32_t id, uint32_t position)
{
    const struct engine_row row = {id, position, false};
    const struct engine_item item = {sequence, &row, 1, NULL};
    struct rk_error error = {0};
    enum rk_status status = engine_forward(engine, &item, 1, false, NULL, &error);
    assert_int_equal(status != RK_OK, error.text[0] != '\0');
    return status;
}

static void bad_rows_are_refused(void **state)
{
    struct engine_sequence *sequence = own_sequence(70);
    struct engine_sequence *other = own_sequence(10);
    const struct engine_row twice[] = {{1, 1, false}, {1, 1, false}};
    const struct engine_row one[] = {{1, 0, false}};
    struct engine_row *many = calloc(KERNELS_ROWS_MAX + 1, sizeof(*many));
    uint32_t run = 0;
    (void)state;

    assert_non_null(many);
    for (uint32_t i = 0; i <= KERNELS_ROWS_MAX; i++) {
        many[i].position = i;
    }
    assert_int_equal(forward_one(sequence, -1, 0), RK_ERR_INVALID);
    assert_int_equal(forward_one(sequence, TINY_VOCAB, 0), RK_ERR_INVALID);
    assert_int_equal(forward_one(sequence, 1, 70), RK_ERR_INVALID);
    assert_int_equal(forward_one(sequence, 1, 1), RK_ERR_INVALID); /* 0 was never computed. */
    assert_int_equal(engine_pool_pages_used(engine), 0);
    assert_int_equal(forward_one(sequence, 1, 0), RK_OK);
    assert_int_equal(forward_one(sequence, 1, 0), RK_OK); /* Once more is allowed. */
    assert_int_equal(engine_sequence_add_own(sequence, 10, &run), RK_OK);
    assert_int_equal(forward_one(sequence, 1, 70), RK_ERR_INVALID); /* The first run has a gap. */

    const struct engine_item descending = {sequence, twice, 2, NULL};
    const struct engine_item same[] = {{other, one, 1, NULL}, {other, one, 1, NULL}};
    const struct engine_item wide = {sequence, many, KERNELS_ROWS_MAX + 1, NULL};
    assert_int_equal(engine_forward(engine, &descending, 1, false, NULL, NULL), RK_ERR_INVALID);
    assert_int_equal(engine_forward(engine, same, 2, false, NULL, NULL), RK_ERR_INVALID);
    assert_int_equal(engine_forward(engine, &wide, 1, false, NULL, NULL), RK_ERR_TOO_LONG);
    assert_int_equal(engine_forward(engine, same, 1, false, NULL, NULL), RK_OK);
    assert_int_equal(engine_forward(engine, NULL, 0, false, NULL, NULL), RK_OK);
    engine_sequence_destroy(sequence);
    engine_sequence_destroy(other);
    free(many);
}

static void lengths_are_bounded(void **state)
{
    struct engine_sequence *sequence = own_sequence(TINY_CONTEXT - 1);
    uint32_t run = 0;
    (void)state;

    assert_int_equal(engine_sequence_add_own(sequence, 2, &run), RK_ERR_TOO_LONG);
    assert_int_equal(engine_sequence_add_own(sequence, UINT32_MAX, &run), RK_ERR_TOO_LONG);
    assert_int_equal(engine_sequence_add_own(sequence, 0, &run), RK_ERR_INVALID);
    assert_int_equal(engine_sequence_num_tokens(sequence), TINY_CONTEXT - 1);
    assert_int_equal(engine_sequence_add_own(sequence, 1, &run), RK_OK);
    assert_int_equal(run, 1);
    engine_sequence_destroy(sequence);
    engine_sequence_destroy(NULL);
}

/* A full pool refuses the whole call; what was computed before goes on once there is room. */
static void full_pool_refuses_whole_calls(void **state)
{
    enum { N = 330 };
    struct engine_sequence *first = own_sequence(N);
    struct engine_sequence *second = own_sequence(N);
    struct engine_row rows[128];
    int32_t *ids = tiny_ids(N);
    float logits[TINY_VOCAB];
    float expected[TINY_VOCAB];
    (void)state;

    assert_int_equal(engine_pool_pages(engine), engine_pages_needed(engine, 384));
    drive_range(engine, first, NULL, ids, 0, N - 64, 256, UINT32_MAX, NULL); /* 5 token pages */
    for (uint32_t i = 0; i < 128; i++) {
        rows[i] = (struct engine_row){ids[i], i, false};
    }
    const struct engine_item item = {second, rows, 128, NULL};
    assert_int_equal(engine_forward(engine, &item, 1, false, NULL, NULL), RK_ERR_FULL);
    assert_int_equal(engine_pool_pages_used(engine), engine_pages_needed(engine, N - 64));
    drive_range(engine, first, NULL, ids, N - 64, N, 64, N - 1, expected);
    engine_sequence_destroy(first);
    drive_range(engine, second, NULL, ids, 0, N, 100, N - 1, logits);
    assert_memory_equal(logits, expected, sizeof(logits));
    engine_sequence_destroy(second);
    free(ids);
}

/* Overlay rows take pool pages too, in order, once each. */
static void overlay_takes_pages_once(void **state)
{
    enum { N = 100 };
    struct engine_sequence *owner = own_sequence(N);
    struct engine_sequence *sequence = NULL;
    const void *pages[TINY_PAIRS * 2];
    int32_t *ids = tiny_ids(N);
    uint64_t before = 0;
    uint32_t run = 0;
    (void)state;

    drive_range(engine, owner, NULL, ids, 0, N, 256, UINT32_MAX, NULL);
    engine_sequence_run_pages(owner, 0, pages);
    assert_int_equal(engine_sequence_create(engine, &sequence), RK_OK);
    assert_int_equal(engine_sequence_add_borrowed(sequence, N, pages, NULL, false, &run), RK_OK);
    before = engine_pool_pages_used(engine);
    drive_range(engine, sequence, NULL, ids, 0, 64, 10, UINT32_MAX, NULL);
    assert_int_equal(engine_pool_pages_used(engine) - before, TINY_PAIRS);
    drive_range(engine, sequence, NULL, ids, 0, 64, 64, UINT32_MAX, NULL);
    assert_int_equal(engine_pool_pages_used(engine) - before, TINY_PAIRS);
    drive_range(engine, sequence, NULL, ids, 64, N, 64, UINT32_MAX, NULL);
    assert_int_equal(engine_pool_pages_used(engine) - before, 2 * TINY_PAIRS);
    engine_sequence_destroy(sequence);
    engine_sequence_destroy(owner);
    free(ids);
}

/* Pages come back from other requests; what this one has not written must be zero, for pages are
 * published and their checksums must depend on their tokens alone. */
static void unwritten_rows_are_zero(void **state)
{
    enum { USED = 384, N = 70 };
    struct engine_sequence *before = own_sequence(USED);
    int32_t *ids = tiny_ids(USED);
    const void *pages[TINY_PAIRS * 2];
    (void)state;

    drive_range(engine, before, NULL, ids, 0, USED, 256, UINT32_MAX, NULL);
    engine_sequence_destroy(before);
    struct engine_sequence *sequence = own_sequence(N);
    drive_range(engine, sequence, NULL, ids, 0, N, 256, UINT32_MAX, NULL);
    engine_sequence_run_pages(sequence, 0, pages);
    for (size_t i = 0; i < TINY_PAIRS; i++) {
        const float *second = pages[2 * i + 1];
        for (size_t row = 0; row < 2 * RK_PAGE_TOKENS; row++) {
            bool written = row % RK_PAGE_TOKENS < N - RK_PAGE_TOKENS;
            for (size_t e = 0; !written && e < TINY_DIM; e++) {
                assert_true(second[row * TINY_DIM + e] == 0);
            }
        }
        assert_true(second[0] != 0);
    }
    engine_sequence_destroy(sequence);
    free(ids);
}

/* Two borrowed runs of copied pages, one byte of the second one turned; half the time none. */
static void damage_is_found(void **state)
{
    enum { N = 100, PAGES = TINY_PAIRS * 2, PROMPT = 5 };
    struct rk_kv_layout layout;
    struct engine_sequence *owner = own_sequence(N);
    unsigned char *copies[PAGES];
    const void *pages[PAGES];
    uint64_t checksums[PAGES];
    int32_t *ids = tiny_ids(2 * N + PROMPT);
    (void)state;

    engine_layout(engine, &layout);
    size_t page_bytes = rk_kv_page_bytes(&layout);
    drive_range(engine, owner, NULL, ids, 0, N, 256, UINT32_MAX, NULL);
    engine_sequence_run_pages(owner, 0, pages);
    for (size_t i = 0; i < PAGES; i++) {
        copies[i] = malloc(page_bytes);
        assert_non_null(copies[i]);
        memcpy(copies[i], pages[i], page_bytes);
        checksums[i] = rk_hash_xxh3(copies[i], page_bytes);
    }
    for (int round = 0; round < 40; round++) {
        struct engine_sequence *sequence = NULL;
        struct engine_row rows[PROMPT];
        float logits[TINY_VOCAB];
        uint32_t run = 0;
        struct rk_error error = {0};
        bool damaged = round % 2 == 0;
        unsigned char *byte = copies[tiny_random(PAGES)] + tiny_random((uint32_t)page_bytes);

        assert_int_equal(engine_sequence_create(engine, &sequence), RK_OK);
        assert_int_equal(engine_sequence_add_borrowed(sequence, N, pages, checksums, true, &run),
                         RK_OK);
        assert_int_equal(engine_sequence_add_borrowed(sequence, N, (const void *const *)copies,
                                                      checksums, true, &run),
                         RK_OK);
        assert_int_equal(engine_sequence_add_own(sequence, PROMPT, &run), RK_OK);
        for (uint32_t i = 0; i < PROMPT; i++) {
            rows[i] = (struct engine_row){ids[i], 2 * N + i, i + 1 == PROMPT};
        }
        const struct engine_item item = {sequence, rows, PROMPT, NULL};
        *byte ^= (unsigned char)(damaged << tiny_random(8));
        unsigned char turned = *byte;
        enum rk_status status = engine_forward(engine, &item, 1, false, logits, &error);
        assert_int_equal(*byte, turned); /* Borrowed pages are never written. */
        assert_int_equal(status, damaged ? RK_MISS_CHECKSUM : RK_OK);
        if (damaged) {
            assert_int_equal(engine_sequence_bad_run(sequence), 1);
            assert_int_equal(engine_forward(engine, &item, 1, false, logits, &error),
                             RK_MISS_CHECKSUM);
        }
        for (size_t i = 0; i < PAGES; i++) {
            memcpy(copies[i], pages[i], page_bytes);
        }
        engine_sequence_destroy(sequence);
    }
    for (size_t i = 0; i < PAGES; i++) {
        free(copies[i]);
    }
    engine_sequence_destroy(owner);
    free(ids);
}

/* Builds a sequence of every kind of run. */
static enum rk_status build(const void *const *pages, const uint64_t *checksums)
{
    struct engine_sequence *sequence = NULL;
    uint32_t run = 0;
    enum rk_status status = engine_sequence_create(engine, &sequence);
    for (int i = 0; status == RK_OK && i < 3; i++) {
        status = engine_sequence_add_borrowed(sequence, 60, pages, checksums, i > 0, &run);
        if (status == RK_OK) {
            status = engine_sequence_add_own(sequence, 70, &run);
        }
    }
    if (status == RK_OK) {
        assert_int_equal(engine_sequence_num_tokens(sequence), 390);
    }
    engine_sequence_destroy(sequence);
    return status;
}

static void survives_failed_allocations(void **state)
{
    const void *pages[TINY_PAIRS] = {0};
    const uint64_t checksums[TINY_PAIRS] = {0};
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    (void)state;

    for (; status != RK_OK; failures++) {
        rk_alloc_fail_after(failures);
        status = build(pages, checksums);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
    }
    rk_alloc_fail_after(-1);
    assert_true(failures > 15);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_rows_are_refused),          cmocka_unit_test(lengths_are_bounded),
        cmocka_unit_test(full_pool_refuses_whole_calls), cmocka_unit_test(overlay_takes_pages_once),
        cmocka_unit_test(unwritten_rows_are_zero),       cmocka_unit_test(damage_is_found),
        cmocka_unit_test(survives_failed_allocations),
    };
    tiny_seed(7);
    return cmocka_run_group_tests(tests, open_engine, close_engine);
}
