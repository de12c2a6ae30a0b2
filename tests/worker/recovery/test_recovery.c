/*
 * Goal:   a plan covers every position exactly once, in order; each level reuses
 *         what it may and nothing else; and what it fetches is exactly what some
 *         query can see.
 * Method: random requests and head maps (the seed is printed), compared with
 *         brute force over all rows and queries; fixed cases for the rules.
 */
#include "worker/recovery/recovery.h"

#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { LAYERS = 3, HEADS = 2, SEGMENTS = 6 };
static const struct rk_kv_layout layout = {LAYERS, HEADS, 64, RK_DTYPE_BF16};
static const char *const level_names[] = {"full", "exact", "fast"};

static uint32_t below(uint32_t bound)
{
    static uint64_t state = 20240611;
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(state >> 33) % bound;
}

static struct recovery_head_map *random_map(void)
{
    struct recovery_head_map *map = NULL;
    struct rk_error error = {0};
    char json[1024];
    char classes[256] = "";
    char distances[256] = "";
    char sinks[256] = "";

    for (int i = 0; i < LAYERS * HEADS; i++) {
        const char *begin = i % HEADS == 0 ? (i ? "],[" : "[") : ",";
        bool local = below(3) > 0;
        size_t at = strlen(classes);
        (void)snprintf(classes + at, sizeof(classes) - at, "%s\"%s\"", begin,
                       local ? "local" : "global");
        at = strlen(distances);
        (void)snprintf(distances + at, sizeof(distances) - at, "%s%d", begin,
                       local ? (int)(1 + below(300)) : -1);
        at = strlen(sinks);
        (void)snprintf(sinks + at, sizeof(sinks) - at, "%s%u", begin, below(100));
    }
    (void)snprintf(json, sizeof(json),
                   "{\"num_layers\":%d,\"num_kv_heads\":%d,\"kv_head_classification\":[%s]],"
                   "\"kv_head_max_distance\":[%s]],\"kv_head_sink_size\":[%s]]}",
                   LAYERS, HEADS, classes, distances, sinks);
    if (recovery_head_map_parse(json, strlen(json), "random", LAYERS, HEADS, &map, &error) !=
        RK_OK) {
        fail_msg("%s", error.text);
    }
    return map;
}

/* Is position p computed in this request (not in a run that is computed alone)? */
static bool computed(const struct recovery_plan *plan, uint32_t p)
{
    for (uint32_t i = 0; i < plan->num_positions; i++) {
        if (plan->positions[i] == p) {
            return true;
        }
    }
    return false;
}

static void check_sources(const struct recovery_plan *plan, const struct recovery_segment *segments)
{
    const struct recovery_level *level = plan->level;
    bool chain = level->reuse_chain;
    uint32_t position = 0;

    for (uint32_t i = 0; i < plan->num_segments; i++) {
        const struct recovery_run *run = &plan->runs[i];
        bool exact = segments[i].in_chain || (i == 0 && segments[i].alone);
        chain = chain && exact;
        assert_int_equal(run->position, position);
        assert_int_equal(run->num_tokens, segments[i].num_tokens);
        position += run->num_tokens;
        if (chain) {
            assert_int_equal(run->source, segments[i].in_chain ? RECOVERY_CHAIN : RECOVERY_SEGMENT);
            assert_int_equal(run->first_tokens, 0);
        } else if (!level->reuse_segments) {
            assert_int_equal(run->source, RECOVERY_COMPUTE);
        } else {
            uint32_t first = run->num_tokens < 4 ? run->num_tokens : 4;
            assert_int_equal(run->source,
                             segments[i].alone ? RECOVERY_SEGMENT : RECOVERY_COMPUTE_ALONE);
            assert_int_equal(run->first_tokens, i == 0 ? 0 : first);
        }
    }
    assert_int_equal(plan->prompt_position, position);
}

/* Each position is computed here, or belongs to a run that brings its KV: never both. */
static void check_cover(const struct recovery_plan *plan)
{
    uint32_t reused = 0;
    uint32_t alone = 0;

    for (uint32_t i = 1; i < plan->num_positions; i++) {
        assert_true(plan->positions[i] > plan->positions[i - 1]);
    }
    for (uint32_t i = 0; i < plan->num_segments; i++) {
        const struct recovery_run *run = &plan->runs[i];
        for (uint32_t token = 0; token < run->num_tokens; token++) {
            bool expected = run->source == RECOVERY_COMPUTE || token < run->first_tokens;
            assert_int_equal(computed(plan, run->position + token), expected);
            reused += !expected && run->source != RECOVERY_COMPUTE_ALONE;
        }
        alone += run->source == RECOVERY_COMPUTE_ALONE ? run->num_tokens : 0;
    }
    for (uint32_t token = 0; token < plan->prompt_tokens; token++) {
        assert_true(computed(plan, plan->prompt_position + token));
    }
    assert_int_equal(plan->tokens_reused, reused);
    assert_int_equal(plan->tokens_computed, plan->num_positions + alone);
}

/* Can a query see a row of this page that is not computed again? */
static bool page_seen(const struct recovery_plan *plan, const struct recovery_run *run,
                      uint32_t page, struct recovery_head head, uint32_t end)
{
    for (uint32_t row = page * 64; row < page * 64 + 64 && row < run->num_tokens; row++) {
        uint32_t c = run->position + row;
        if (computed(plan, c)) {
            continue;
        }
        for (uint32_t t = c; t < end; t++) {
            bool query = t >= plan->prompt_position || computed(plan, t);
            if (head.window == 0 || (query && (c + head.window > t || c < head.sink))) {
                return true; /* A global head's live rows always travel. */
            }
        }
    }
    return false;
}

static void check_extents(const struct recovery_plan *plan, uint32_t tokens_ahead)
{
    uint32_t end = plan->prompt_position + plan->prompt_tokens + tokens_ahead;

    for (uint32_t i = 0; i < plan->num_segments; i++) {
        const struct recovery_run *run = &plan->runs[i];
        uint64_t num_pages = 0;
        if (run->source != RECOVERY_CHAIN && run->source != RECOVERY_SEGMENT) {
            assert_null(run->extents);
            continue;
        }
        for (uint32_t at = 0; at < LAYERS * HEADS; at++) {
            struct recovery_head head = {0, 0};
            if (plan->head_map) {
                head = recovery_head_map_get(plan->head_map, at / HEADS, at % HEADS);
            }
            for (uint32_t page = 0; page < rk_kv_pages(run->num_tokens); page++) {
                uint32_t listed = 0;
                for (size_t e = 0; e < run->num_extents; e++) {
                    const struct rk_extent *extent = &run->extents[e];
                    listed += extent->layer == at / HEADS && extent->kv_head == at % HEADS &&
                              page >= extent->page_begin && page < extent->page_end;
                }
                assert_int_equal(listed, page_seen(plan, run, page, head, end));
                num_pages += listed;
            }
        }
        assert_int_equal(run->num_pages, num_pages);
    }
}

static void random_plans_hold(void **state)
{
    (void)state;
    print_message("seed 20240611\n");
    for (int round = 0; round < 150; round++) {
        struct recovery_segment segments[SEGMENTS];
        struct recovery_head_map *map = below(3) ? random_map() : NULL;
        const struct recovery_level *level = recovery_level_find(level_names[below(3)]);
        uint32_t num_segments = below(SEGMENTS + 1);
        uint32_t prompt = 1 + below(20);
        uint32_t ahead = below(20);
        struct recovery_plan plan;

        for (uint32_t i = 0; i < num_segments; i++) {
            segments[i] = (struct recovery_segment){1 + below(below(2) ? 8 : 260), below(4) > 0,
                                                    below(3) > 0};
        }
        assert_int_equal(recovery_plan_make(level, map, &layout, segments, num_segments, prompt,
                                            ahead, &plan, NULL),
                         RK_OK);
        assert_ptr_equal(plan.head_map, level->head_map ? map : NULL);
        check_sources(&plan, segments);
        check_cover(&plan);
        check_extents(&plan, ahead);
        recovery_plan_free(&plan);
        assert_null(plan.runs);
        recovery_head_map_destroy(map);
    }
}

static void levels_have_names(void **state)
{
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        assert_string_equal(recovery_level_find(level_names[i])->name, level_names[i]);
        assert_non_null(strstr(recovery_level_names(), level_names[i]));
    }
    assert_string_equal(recovery_level_find(NULL)->name, "exact");
    assert_string_equal(recovery_level_find("")->name, "exact");
    assert_null(recovery_level_find("Exact"));
    assert_null(recovery_level_find("balanced"));
    assert_string_equal(recovery_source_name(RECOVERY_COMPUTE_ALONE), "compute_alone");
}

static enum rk_status plan_status(const struct recovery_segment *segments, uint32_t num_segments,
                                  uint32_t prompt, uint32_t ahead)
{
    struct recovery_plan plan;
    struct rk_error error = {0};
    enum rk_status status = recovery_plan_make(recovery_level_find("fast"), NULL, &layout, segments,
                                               num_segments, prompt, ahead, &plan, &error);
    if (status == RK_OK) {
        recovery_plan_free(&plan);
    } else {
        assert_true(error.text[0] != '\0');
    }
    return status;
}

static void bad_requests_are_refused(void **state)
{
    const struct recovery_segment empty[] = {{5, true, true}, {0, true, true}};
    const struct recovery_segment huge[] = {{RK_SEGMENT_TOKENS_MAX + 1, true, true}};
    const struct recovery_segment two[] = {{RK_SEGMENT_TOKENS_MAX / 2, false, false},
                                           {RK_SEGMENT_TOKENS_MAX / 2, false, false}};
    struct recovery_segment *many = calloc(RECOVERY_SEGMENTS_MAX + 1, sizeof(*many));
    (void)state;

    assert_non_null(many);
    for (uint32_t i = 0; i <= RECOVERY_SEGMENTS_MAX; i++) {
        many[i].num_tokens = 1;
    }
    assert_int_equal(plan_status(empty, 2, 1, 1), RK_ERR_INVALID);
    assert_int_equal(plan_status(huge, 1, 1, 1), RK_ERR_TOO_LONG);
    assert_int_equal(plan_status(two, 2, 0, 0), RK_OK);
    assert_int_equal(plan_status(two, 2, 1, 0), RK_ERR_TOO_LONG);
    assert_int_equal(plan_status(two, 1, UINT32_MAX, UINT32_MAX), RK_ERR_TOO_LONG);
    assert_int_equal(plan_status(many, RECOVERY_SEGMENTS_MAX, 1, 1), RK_OK);
    assert_int_equal(plan_status(many, RECOVERY_SEGMENTS_MAX + 1, 1, 1), RK_ERR_TOO_LONG);
    assert_int_equal(plan_status(NULL, 0, 1, 0), RK_OK);
    free(many);
}

/* Each allocation fails in turn; nothing leaks and nothing is half made. */
static void plans_survive_failed_allocations(void **state)
{
    const struct recovery_segment segments[] = {{100, true, true}, {70, false, true}};
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    (void)state;

    for (; status != RK_OK; failures++) {
        rk_alloc_fail_after(failures);
        status = plan_status(segments, 2, 5, 5);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
    }
    rk_alloc_fail_after(-1);
    assert_int_equal(failures, 6); /* runs, positions, page needs, two lists of extents. */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_plans_hold),
        cmocka_unit_test(levels_have_names),
        cmocka_unit_test(bad_requests_are_refused),
        cmocka_unit_test(plans_survive_failed_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
