/*
 * Goal:   nobody waits for a reader that stalls; what a pass computed from pages that were lost is
 *         never told; a job that begins again tells each token once; gauges are right at any
 * moment. Method: a scheduler over a small random model; readers that take nothing, a check of
 * pages that fails at a chosen pass, and /metrics between the steps.
 */
#include "tests/worker/engine/tiny.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/metrics/metrics.h"
#include "worker/scheduler/scheduler.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SEGMENTS  2
#define SEGMENT   70u
#define PROMPT    9u
#define CONTINUED 200u
#define GENERATED 24u
#define SCORERS   4
#define PLACES    2u
#define LONG_MS   20000

static struct model *model;
static struct engine *engine;
static struct scheduler *scheduler;
static int32_t *tokens[SEGMENTS];
static int32_t *prompt;
static int32_t *continuation;

static int start(void **state)
{
    (void)state;
    struct scheduler_options options = {.jobs_active_max = PLACES, .jobs_queued_max = 3};
    struct engine_options sizes = {.mode = KERNELS_F32, .threads = 1, .pool_tokens = 8192};
    struct rk_error error = {.text = ""};
    tiny_seed(7);
    model = tiny_model(true);
    assert_int_equal(engine_create(model, &sizes, &engine, &error), RK_OK);
    options.engine = engine;
    assert_int_equal(scheduler_start(&options, &scheduler, &error), RK_OK);
    for (int i = 0; i < SEGMENTS; i++) {
        tokens[i] = tiny_ids(SEGMENT);
    }
    prompt = tiny_ids(PROMPT);
    continuation = tiny_ids(CONTINUED);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    scheduler_stop(scheduler);
    engine_destroy(engine);
    model_close(model);
    for (int i = 0; i < SEGMENTS; i++) {
        free(tokens[i]);
    }
    free(prompt);
    free(continuation);
    return 0;
}

/* One request and what it borrows. */
struct request {
    struct scheduler_request request;
    struct recovery_plan plan;
    const int32_t *segment_tokens[SEGMENTS];
    uint32_t segment_num_tokens[SEGMENTS];
    struct rk_kv_pages fetched[SEGMENTS];
    struct scheduler_job *job;
};

/* alone: the last segment comes from fetched. */
static void request_make(struct request *request, const char *level, bool alone, bool score)
{
    struct recovery_segment segments[SEGMENTS];
    struct rk_kv_layout layout;
    memset(request, 0, sizeof(*request));
    engine_layout(engine, &layout);
    for (uint32_t i = 0; i < SEGMENTS; i++) {
        request->segment_tokens[i] = tokens[i];
        request->segment_num_tokens[i] = SEGMENT;
        segments[i] =
            (struct recovery_segment){.num_tokens = SEGMENT, .alone = alone && i + 1 == SEGMENTS};
    }
    assert_int_equal(recovery_plan_make(recovery_level_find(level), NULL, &layout, segments,
                                        SEGMENTS, PROMPT, CONTINUED, &request->plan, NULL),
                     RK_OK);
    request->request =
        (struct scheduler_request){.plan = &request->plan,
                                   .num_segments = SEGMENTS,
                                   .segment_tokens = request->segment_tokens,
                                   .segment_num_tokens = request->segment_num_tokens,
                                   .fetched = request->fetched,
                                   .prompt = prompt,
                                   .num_prompt = PROMPT,
                                   .forced = score ? continuation : NULL,
                                   .num_forced = score ? CONTINUED : 0,
                                   .tokens_max = score ? 0 : GENERATED,
                                   .ignore_end = true,
                                   .sampler = {.top_p = 1, .temperature = 1, .state = 3}};
}

static void request_submit(struct request *request)
{
    struct rk_error error = {.text = ""};
    enum rk_status status =
        scheduler_job_submit(scheduler, &request->request, &request->job, &error);
    if (status != RK_OK) {
        fail_msg("%s", error.text);
    }
}

static void request_clear(struct request *request)
{
    scheduler_job_release(request->job);
    recovery_plan_free(&request->plan);
}

/* Until its end; appends the tokens that are told. */
static enum rk_status follow(struct request *request, int32_t *told, uint32_t *num_told)
{
    for (;;) {
        struct scheduler_event event;
        assert_int_equal(scheduler_job_wait(request->job, rk_deadline_in_ms(LONG_MS), &event),
                         RK_OK);
        if (event.kind == SCHEDULER_DONE) {
            return event.status;
        }
        if (event.kind == SCHEDULER_TOKENS) {
            memcpy(told + *num_told, event.tokens, event.num_tokens * sizeof(*told));
            *num_told += event.num_tokens;
        } else if (event.kind == SCHEDULER_ROW) {
            scheduler_job_row_done(request->job);
        }
    }
}

static void wait_for_load(uint32_t active, uint32_t queued, uint32_t stalled)
{
    struct scheduler_load load;
    int64_t deadline = rk_deadline_in_ms(LONG_MS);
    do {
        scheduler_load(scheduler, &load);
        if (load.active == active && load.queued == queued && load.stalled == stalled) {
            return;
        }
        rk_clock_sleep_ms(1);
    } while (rk_deadline_left_ms(deadline) > 0);
    fail_msg("%u active, %u queued, %u stalled", load.active, load.queued, load.stalled);
}

static double gauge(const char *name)
{
    return rk_metric_value(rk_metric_gauge(name, "", NULL));
}

/* ---- Readers ---- */

static void stalled_readers_give_up_their_places(void **state)
{
    (void)state;
    struct request scorers[SCORERS];
    struct request generate;
    int32_t told[GENERATED];
    uint32_t num_told = 0;
    for (int i = 0; i < SCORERS; i++) { /* More than there are places. */
        request_make(&scorers[i], "full", false, true);
        request_submit(&scorers[i]);
        wait_for_load(0, 0, (uint32_t)i + 1);
    }
    request_make(&generate, "full", false, false);
    request_submit(&generate);
    assert_int_equal(follow(&generate, told, &num_told), RK_OK);
    assert_int_equal(num_told, GENERATED);
    request_clear(&generate);

    /* Each goes on when it is read, and misses nothing. */
    for (int i = 0; i < SCORERS; i++) {
        uint32_t rows = 0;
        for (;;) {
            struct scheduler_event event;
            assert_int_equal(scheduler_job_wait(scorers[i].job, rk_deadline_in_ms(LONG_MS), &event),
                             RK_OK);
            if (event.kind == SCHEDULER_DONE) {
                assert_int_equal(event.status, RK_OK);
                break;
            }
            if (event.kind == SCHEDULER_ROW) {
                assert_int_equal(event.row, rows++);
                scheduler_job_row_done(scorers[i].job);
            }
        }
        assert_int_equal(rows, CONTINUED);
        request_clear(&scorers[i]);
    }
    wait_for_load(0, 0, 0);
}

static void a_stalled_job_can_be_cancelled(void **state)
{
    (void)state;
    struct request scorer;
    struct scheduler_event event;
    request_make(&scorer, "full", false, true);
    request_submit(&scorer);
    wait_for_load(0, 0, 1);
    assert_int_equal(scheduler_job_wait(scorer.job, rk_deadline_in_ms(LONG_MS), &event), RK_OK);
    scheduler_job_row_done(scorer.job);
    wait_for_load(0, 0, 1); /* One row of room is not worth a pass. */
    scheduler_job_cancel(scorer.job);
    wait_for_load(0, 0, 0);
    request_clear(&scorer);
}

/* ---- Pages that are lost ---- */

struct guard {
    atomic_int passes;
    int fails_at;
    enum rk_status status;
};

static enum rk_status guard_check(void *context, uint32_t *ret_segment)
{
    struct guard *guard = context;
    if (atomic_fetch_add(&guard->passes, 1) + 1 != guard->fails_at) {
        return RK_OK;
    }
    *ret_segment = 1;
    return guard->status;
}

static void reference(int32_t *ret_told)
{
    struct request request;
    uint32_t num_told = 0;
    request_make(&request, "exact", false, false);
    request_submit(&request);
    assert_int_equal(follow(&request, ret_told, &num_told), RK_OK);
    assert_int_equal(num_told, GENERATED);
    request_clear(&request);
}

/* Lost at any pass: the tokens of that pass are not told, and another job goes on where the first
 * one stopped, with the answer of one that was never disturbed. */
static void a_lost_page_never_shows(void **state)
{
    (void)state;
    int32_t wanted[GENERATED];
    reference(wanted);
    int begun_again = 0;
    for (int fails_at = 1;; fails_at++) {
        struct guard guard = {.fails_at = fails_at, .status = RK_MISS_EVICTED};
        struct request request;
        struct scheduler_result result;
        int32_t told[GENERATED];
        uint32_t num_told = 0;
        request_make(&request, "exact", false, false);
        request.request.pages_check = guard_check;
        request.request.pages_context = &guard;
        request_submit(&request);
        enum rk_status status = follow(&request, told, &num_told);
        scheduler_job_result(request.job, &result);
        request_clear(&request);
        if (status == RK_OK) {
            assert_true(atomic_load(&guard.passes) < fails_at); /* It was asked each time. */
            break;
        }
        assert_int_equal(status, RK_MISS_EVICTED);
        assert_int_equal(result.bad_segment, 1);
        assert_int_equal(num_told, fails_at - 1);
        assert_memory_equal(told, wanted, num_told * sizeof(told[0]));

        request_make(&request, "exact", false, false);
        request.request.replay = told;
        request.request.num_replay = num_told;
        request_submit(&request);
        int32_t again[GENERATED];
        uint32_t num_again = 0;
        assert_int_equal(follow(&request, again, &num_again), RK_OK);
        request_clear(&request);
        assert_int_equal(num_told + num_again, GENERATED);
        assert_memory_equal(again, wanted + num_told, num_again * sizeof(again[0]));
        begun_again++;
    }
    assert_int_equal(begun_again, GENERATED);
}

/* What was told stays, even where the second job would have said something else. */
static void replayed_tokens_stay_what_they_were(void **state)
{
    (void)state;
    int32_t told[2] = {1, 2};
    int32_t again[GENERATED];
    uint32_t num_again = 0;
    struct request request;
    request_make(&request, "exact", false, false);
    request.request.replay = told;
    request.request.num_replay = 2;
    request_submit(&request);
    assert_int_equal(follow(&request, again, &num_again), RK_OK);
    assert_int_equal(num_again, GENERATED - 2);
    struct scheduler_result result;
    scheduler_job_result(request.job, &result);
    assert_int_equal(result.num_tokens, GENERATED);
    request_clear(&request);
}

static void bad_bytes(struct request *request, const void *page, struct rk_page *pages)
{
    const struct recovery_run *run = &request->plan.runs[1];
    assert_int_equal(run->source, RECOVERY_SEGMENT);
    assert_int_equal(request->plan.runs[0].source, RECOVERY_COMPUTE_ALONE);
    for (uint64_t i = 0; i < run->num_pages; i++) {
        pages[i] = (struct rk_page){.data = page, .checksum = 1};
    }
    request->fetched[1] = (struct rk_kv_pages){.pages = pages, .num_pages = run->num_pages};
}

/* A page that was given to others does not match its checksum either: it is no bad memory. */
static void a_checksum_names_the_segment_unless_the_page_was_lost(void **state)
{
    (void)state;
    static unsigned char page[1 << 16];
    struct rk_page pages[64];
    for (int lost = 0; lost < 2; lost++) {
        struct guard guard = {.fails_at = lost ? 1 : 0, .status = RK_MISS_NODE_DOWN};
        struct request request;
        struct scheduler_result result;
        uint32_t num_told = 0;
        request_make(&request, "fast", true, false);
        bad_bytes(&request, page, pages);
        request.request.pages_check = guard_check;
        request.request.pages_context = &guard;
        request_submit(&request);
        assert_int_equal(follow(&request, NULL, &num_told),
                         lost ? RK_MISS_NODE_DOWN : RK_MISS_CHECKSUM);
        scheduler_job_result(request.job, &result);
        assert_int_equal(result.bad_segment, 1);
        assert_non_null(strstr(result.text, lost ? "segment 1" : "page 0"));
        request_clear(&request);
    }
}

/* ---- Gauges and bounds ---- */

/* The engine's thread sets them before it sleeps: soon after, never only at a request's end. */
static void wait_for_gauge(const char *name, double wanted)
{
    int64_t deadline = rk_deadline_in_ms(LONG_MS);
    while (gauge(name) != wanted) {
        if (rk_deadline_left_ms(deadline) == 0) {
            fail_msg("%s is %.0f, not %.0f", name, gauge(name), wanted);
        }
        rk_clock_sleep_ms(1);
    }
}

static void gauges_are_right_at_any_moment(void **state)
{
    (void)state;
    struct request request;
    wait_for_gauge("redknot_worker_requests_active", 0);
    assert_true(gauge("redknot_worker_pool_pages") == (double)engine_pool_pages(engine));
    request_make(&request, "full", false, true);
    request_submit(&request);
    wait_for_load(0, 0, 1);
    wait_for_gauge("redknot_worker_requests_stalled", 1);
    wait_for_gauge("redknot_worker_requests_active", 0);
    assert_true(engine_pool_pages_used(engine) > 0);
    wait_for_gauge("redknot_worker_pool_pages_used", (double)engine_pool_pages_used(engine));
    request_clear(&request);
    wait_for_gauge("redknot_worker_pool_pages_used", 0);
    wait_for_gauge("redknot_worker_requests_stalled", 0);
    wait_for_gauge("redknot_worker_requests_queued", 0);
}

static void a_full_queue_says_what_is_full(void **state)
{
    (void)state;
    struct request requests[64];
    struct scheduler_job *refused = NULL;
    struct rk_error error = {.text = ""};
    int count = 0;
    enum rk_status status = RK_OK;
    while (status == RK_OK && count < 64) {
        request_make(&requests[count], "full", false, false);
        requests[count].request.tokens_max = CONTINUED; /* long enough to wait for */
        status = scheduler_job_submit(scheduler, &requests[count].request, &refused, &error);
        requests[count++].job = status == RK_OK ? refused : NULL;
    }
    assert_int_equal(status, RK_ERR_FULL);
    assert_non_null(strstr(error.text, "--queue-max"));
    for (int i = 0; i < count; i++) {
        request_clear(&requests[i]);
    }
    assert_true(gauge("redknot_worker_requests_queued") == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stalled_readers_give_up_their_places),
        cmocka_unit_test(a_stalled_job_can_be_cancelled),
        cmocka_unit_test(a_lost_page_never_shows),
        cmocka_unit_test(replayed_tokens_stay_what_they_were),
        cmocka_unit_test(a_checksum_names_the_segment_unless_the_page_was_lost),
        cmocka_unit_test(gauges_are_right_at_any_moment),
        cmocka_unit_test(a_full_queue_says_what_is_full),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
