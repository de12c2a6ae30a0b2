/*
 * Goal:   a request waits for the cache once, whatever is silent and however many segments it has;
 *         its cancellation ends each stage; pages that are lost cost computing, never a wrong or a
 *         repeated token; what waits pins nothing; ids are looked up together.
 * Method: requests over a small random model, a scheduler and a fake KV client that is silent,
 * loses pages and refuses as it is told. Answers are compared with those of a cold request.
 */
#include "tests/worker/api/fake_kv.h"
#include "tests/worker/engine/tiny.h"

#include "common/base/clock.h"
#include "worker/api/api_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SEGMENTS_MAX     30
#define SEGMENT          20u
#define PROMPT           9u
#define GENERATED        12u
#define FORCED           40u
#define FETCH_TIMEOUT_MS 300
#define SOON_NS          INT64_C(1000000000)
#define MS               INT64_C(1000000)

static struct model *model;
static struct engine *engine;
static struct scheduler *scheduler;
static struct fake_kv kv;
static struct api *api;
static int32_t *texts[SEGMENTS_MAX];
static int32_t *prompt;
static int32_t *forced;

static int start(void **state)
{
    (void)state;
    struct engine_options sizes = {.mode = KERNELS_F32, .threads = 1, .pool_tokens = 16384};
    struct scheduler_options scheduling = {.jobs_active_max = 2};
    struct rk_kv_layout layout;
    tiny_seed(11);
    model = tiny_model(true);
    assert_int_equal(engine_create(model, &sizes, &engine, NULL), RK_OK);
    engine_layout(engine, &layout);
    fake_kv_create(&kv, &layout);
    scheduling.engine = engine;
    assert_int_equal(scheduler_start(&scheduling, &scheduler, NULL), RK_OK);
    struct api_options options = {.node_id = "worker-1",
                                  .model_name = "tiny",
                                  .incarnation = 42,
                                  .engine = engine,
                                  .mode = "f32",
                                  .scheduler = scheduler,
                                  .kv = (struct rk_kv_client *)(void *)&kv,
                                  .kv_ops = &fake_kv_ops,
                                  .fetch_timeout_ms = FETCH_TIMEOUT_MS,
                                  .requests_max = 2,
                                  .holds_max = 2 * SEGMENTS_MAX};
    assert_int_equal(api_create(&options, &api, NULL), RK_OK);
    for (int i = 0; i < SEGMENTS_MAX; i++) {
        texts[i] = tiny_ids(SEGMENT);
    }
    prompt = tiny_ids(PROMPT);
    forced = tiny_ids(FORCED);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    api_destroy(api);
    scheduler_stop(scheduler);
    fake_kv_destroy(&kv);
    engine_destroy(engine);
    model_close(model);
    for (int i = 0; i < SEGMENTS_MAX; i++) {
        free(texts[i]);
    }
    free(prompt);
    free(forced);
    return 0;
}

static int forget(void **state)
{
    (void)state;
    fake_kv_forget(&kv);
    return 0;
}

/* ---- One request ---- */

struct asked {
    struct session *session;
    int32_t tokens[GENERATED];
    uint32_t num_tokens;
    float first[FORCED]; /* of each row */
    uint32_t num_rows;
    enum rk_status status;
    struct rk_error error;
    int64_t took_ns;
};

static bool flag_set(void *context)
{
    return context && atomic_load((atomic_bool *)context);
}

static enum rk_status keep(void *context, const struct scheduler_event *event)
{
    struct asked *asked = context;
    if (event->kind == SCHEDULER_TOKENS) {
        memcpy(asked->tokens + asked->num_tokens, event->tokens,
               event->num_tokens * sizeof(int32_t));
        asked->num_tokens += event->num_tokens;
    } else if (event->kind == SCHEDULER_ROW) {
        assert_int_equal(event->row, asked->num_rows);
        asked->first[asked->num_rows++] = event->logprobs[0];
    }
    return RK_OK;
}

static void make_session(struct asked *asked, const char *level, uint32_t num_segments,
                         atomic_bool *cancelled)
{
    struct rk_until until = {
        .deadline_ns = rk_deadline_in_ms(60000), .cancelled = flag_set, .context = cancelled};
    memset(asked, 0, sizeof(*asked));
    assert_int_equal(session_create(api, &until, NULL, 0, &asked->session, NULL), RK_OK);
    asked->session->level = recovery_level_find(level);
    for (uint32_t i = 0; i < num_segments; i++) {
        int32_t *copy = malloc(SEGMENT * sizeof(*copy));
        memcpy(copy, texts[i], SEGMENT * sizeof(*copy));
        assert_int_equal(session_add_segment(asked->session, copy, SEGMENT, NULL, NULL), RK_OK);
    }
    asked->session->prompt = malloc(PROMPT * sizeof(*prompt));
    memcpy(asked->session->prompt, prompt, PROMPT * sizeof(*prompt));
    asked->session->num_prompt = PROMPT;
}

/* Leaves the session for the caller to look at. */
static void run(struct asked *asked, const char *level, uint32_t num_segments, bool score,
                atomic_bool *cancelled)
{
    make_session(asked, level, num_segments, cancelled);
    struct session_run how = {.tokens_max = score ? 0 : GENERATED,
                              .forced = score ? forced : NULL,
                              .num_forced = score ? FORCED : 0,
                              .ignore_end = true,
                              .sampler = {.top_p = 1, .temperature = 1, .state = 5},
                              .on_event = keep,
                              .context = asked};
    int64_t begin = rk_clock_ns();
    asked->status = session_run(asked->session, &how, &asked->error);
    asked->took_ns = rk_clock_ns() - begin;
}

static void end(struct asked *asked)
{
    session_destroy(asked->session);
    assert_int_equal(atomic_load(&kv.holds), 0);
}

static void publish(struct asked *asked)
{
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(60000)};
    session_leave(asked->session);
    session_publish(asked->session, &until);
    assert_int_equal(asked->session->num_not_stored, 0);
}

/* Computes and stores; keeps the answer. */
static void warm(struct asked *ret_asked, const char *level, uint32_t num_segments, bool score)
{
    run(ret_asked, level, num_segments, score, NULL);
    assert_int_equal(ret_asked->status, RK_OK);
    publish(ret_asked);
    end(ret_asked);
}

static void expect_same(const struct asked *asked, const struct asked *reference)
{
    if (asked->status != RK_OK) {
        fail_msg("%s", asked->error.text);
    }
    assert_int_equal(asked->num_tokens, reference->num_tokens);
    assert_memory_equal(asked->tokens, reference->tokens, sizeof(asked->tokens));
    assert_int_equal(asked->num_rows, reference->num_rows);
    assert_memory_equal(asked->first, reference->first, sizeof(asked->first));
}

/* ---- Time ---- */

static void a_silent_store_costs_one_timeout(void **state)
{
    (void)state;
    static const char *const levels[] = {"exact", "fast"};
    for (int l = 0; l < 2; l++) {
        for (uint32_t count = 8; count <= SEGMENTS_MAX; count += SEGMENTS_MAX - 8) {
            struct asked cold;
            struct asked warmed;
            struct asked asked;
            warm(&cold, levels[l], count, false);
            run(&warmed, levels[l], count, false, NULL);
            expect_same(&warmed, &cold);
            assert_int_equal(warmed.session->plan.tokens_reused,
                             l == 0 ? count * SEGMENT : SEGMENT + (count - 1) * (SEGMENT - 4));
            end(&warmed);

            kv.get_silent = true;
            run(&asked, levels[l], count, false, NULL);
            expect_same(&asked, &cold);
            assert_true(asked.took_ns < cold.took_ns + (FETCH_TIMEOUT_MS + 300) * MS);
            assert_int_equal(asked.session->plan.tokens_reused, 0);
            assert_int_equal(asked.session->segments[count - 1].miss, RK_MISS_DEADLINE);
            end(&asked);
            fake_kv_forget(&kv);
        }
    }
}

/* The coordinator's silence and the stores' are paid out of one purse. */
static void all_waits_share_one_timeout(void **state)
{
    (void)state;
    struct asked cold;
    struct asked asked;
    warm(&cold, "fast", 8, false);
    kv.locate_silent = true;
    run(&asked, "fast", 8, false, NULL);
    expect_same(&asked, &cold);
    assert_true(asked.took_ns < cold.took_ns + (FETCH_TIMEOUT_MS + 300) * MS);
    assert_int_equal(asked.session->wait_left_ns, 0);
    assert_int_equal(atomic_load(&kv.gets), 0);
    end(&asked);
}

struct canceller {
    pthread_t thread;
    atomic_bool cancelled;
    int64_t at_ns;
};

static void *cancel_later(void *context)
{
    struct canceller *canceller = context;
    rk_clock_sleep_ms(100);
    canceller->at_ns = rk_clock_ns();
    atomic_store(&canceller->cancelled, true);
    return NULL;
}

static void cancellation_ends_locate_and_fetch(void **state)
{
    (void)state;
    struct asked cold;
    warm(&cold, "fast", 8, false);
    api->options.fetch_timeout_ms = 30000;
    for (int stage = 0; stage < 2; stage++) {
        struct canceller canceller = {.cancelled = false};
        struct asked asked;
        kv.locate_silent = stage == 0;
        kv.get_silent = stage == 1;
        assert_int_equal(pthread_create(&canceller.thread, NULL, cancel_later, &canceller), 0);
        run(&asked, "fast", 8, false, &canceller.cancelled);
        pthread_join(canceller.thread, NULL);
        assert_int_equal(asked.status, RK_ERR_CANCELLED);
        assert_true(rk_clock_ns() - canceller.at_ns < SOON_NS);
        end(&asked);
    }
    api->options.fetch_timeout_ms = FETCH_TIMEOUT_MS;
}

static void cancellation_ends_a_publish(void **state)
{
    (void)state;
    struct canceller canceller = {.cancelled = false};
    struct asked asked;
    run(&asked, "fast", 8, false, NULL);
    kv.put_silent = true;
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(60000),
                             .cancelled = flag_set,
                             .context = &canceller.cancelled};
    assert_int_equal(pthread_create(&canceller.thread, NULL, cancel_later, &canceller), 0);
    session_publish(asked.session, &until);
    pthread_join(canceller.thread, NULL);
    assert_true(rk_clock_ns() - canceller.at_ns < SOON_NS);
    assert_int_equal(asked.session->num_stored, 0);
    assert_int_equal(asked.session->num_not_stored, 8);
    assert_non_null(strstr(asked.session->store_error.text, "silent"));
    assert_int_equal(atomic_load(&kv.puts), 1); /* The others would have waited alike. */
    end(&asked);
}

/* ---- Pages that are lost ---- */

/* At every check in turn. lost_all: with the connection all pages go. */
static void lose_pages(const char *level, bool score, enum rk_status why, bool lost_all)
{
    struct asked cold;
    int restarts = 0;
    warm(&cold, level, 4, score);
    for (int fails_at = 1;; fails_at += 3) {
        struct asked asked;
        atomic_store(&kv.checks, 0);
        kv.fails_at = fails_at;
        kv.lost = why;
        kv.lost_all = lost_all;
        run(&asked, level, 4, score, NULL);
        expect_same(&asked, &cold);
        bool lost = atomic_load(&kv.checks) >= fails_at;
        assert_int_equal(asked.session->restarts > 0, lost);
        assert_int_equal(asked.session->plan.tokens_computed > PROMPT + 3 * 4, lost);
        if (lost && lost_all) {
            assert_int_equal(asked.session->restarts, 1);
        }
        end(&asked);
        if (!lost) {
            break;
        }
        restarts++;
    }
    assert_true(restarts > 2); /* It did bite. */
    fake_kv_forget(&kv);
}

static void lost_pages_cost_computing_only(void **state)
{
    (void)state;
    double before = rk_metric_value(api->metrics.restarts[RK_MISS_EVICTED]);
    lose_pages("exact", false, RK_MISS_EVICTED, false);
    assert_true(rk_metric_value(api->metrics.restarts[RK_MISS_EVICTED]) > before);
    lose_pages("exact", false, RK_MISS_NODE_DOWN, true);
    lose_pages("fast", false, RK_MISS_EVICTED, false);
    lose_pages("fast", false, RK_MISS_NODE_DOWN, true);
}

static void lost_pages_cost_scores_nothing_else(void **state)
{
    (void)state;
    lose_pages("exact", true, RK_MISS_EVICTED, false);
    lose_pages("fast", true, RK_MISS_NODE_DOWN, true);
}

static void a_bad_page_drops_one_copy(void **state)
{
    (void)state;
    struct asked cold;
    struct asked asked;
    warm(&cold, "fast", 4, false);
    assert_int_equal(kv.num_segments, 4);
    /* Layer 1, KV head 1: the segment has one page of each. */
    fake_kv_damage(&kv, 2, 1 * TINY_KV + 1);
    run(&asked, "fast", 4, false, NULL);
    expect_same(&asked, &cold);
    assert_int_equal(atomic_load(&kv.drops), 1);
    assert_true(kv.segments[2].dropped);
    assert_int_equal(kv.dropped_page.layer, 1);
    assert_int_equal(kv.dropped_page.kv_head, 1);
    assert_int_equal(kv.dropped_page.page_begin, 0);
    assert_int_equal(asked.session->segments[2].miss, RK_MISS_CHECKSUM);
    assert_int_equal(asked.session->restarts, 1);
    end(&asked);
}

/* ---- Bounds ---- */

struct crowd {
    pthread_t thread;
    struct asked asked;
};

static void *crowd_main(void *context)
{
    struct crowd *one = context;
    run(&one->asked, "fast", SEGMENTS_MAX, false, NULL);
    session_destroy(one->asked.session);
    return NULL;
}

static void what_waits_pins_nothing(void **state)
{
    (void)state;
    static struct crowd crowd[12];
    struct asked cold;
    warm(&cold, "fast", SEGMENTS_MAX, false);
    for (int i = 0; i < 12; i++) {
        assert_int_equal(pthread_create(&crowd[i].thread, NULL, crowd_main, &crowd[i]), 0);
    }
    for (int i = 0; i < 12; i++) {
        pthread_join(crowd[i].thread, NULL);
        expect_same(&crowd[i].asked, &cold);
    }
    assert_true(atomic_load(&kv.holds_max) <= 2 * SEGMENTS_MAX); /* --holds-max */
    assert_int_equal(atomic_load(&kv.holds), 0);
}

static void ids_are_located_together(void **state)
{
    (void)state;
    struct asked cold;
    struct asked asked;
    struct rk_id ids[4];
    struct rk_kv_location locations[4];
    struct rk_error error = {.text = ""};
    run(&cold, "fast", 4, false, NULL);
    for (int i = 0; i < 4; i++) {
        ids[i] = cold.session->segments[i].id;
    }
    publish(&cold);
    end(&cold);

    make_session(&asked, "fast", 0, NULL);
    int before = atomic_load(&kv.locates);
    assert_int_equal(session_locate_ids(asked.session, ids, 4, locations, &error), RK_OK);
    assert_int_equal(atomic_load(&kv.locates), before + 1);
    for (int i = 0; i < 4; i++) {
        /* The first is computed in its place, at position 0: its chain's id is its own. */
        assert_int_equal(session_add_located(asked.session, &locations[i], NULL, &error), RK_OK);
        assert_true(rk_id_equal(&asked.session->segments[i].id, &ids[i]));
    }
    rk_kv_locations_free(locations, 4);
    end(&asked);

    kv.locate_silent = true;
    make_session(&asked, "fast", 0, NULL);
    assert_int_equal(session_locate_ids(asked.session, ids, 1, locations, &error), RK_OK);
    assert_int_equal(session_add_located(asked.session, &locations[0], NULL, &error),
                     RK_ERR_UNAVAILABLE);
    assert_non_null(strstr(error.text, "the coordinator does not answer"));
    rk_kv_locations_free(locations, 1);
    end(&asked);
}

static void a_put_is_stored_once(void **state)
{
    (void)state;
    struct asked asked;
    struct rk_error error = {.text = ""};
    make_session(&asked, "fast", 1, NULL);
    assert_false(session_segment_stored(asked.session));
    struct session_run how = {.on_event = keep, .context = &asked};
    uint64_t bytes = 0;
    assert_int_equal(session_put(asked.session, &how, &bytes, &error), RK_OK);
    assert_true(session_segment_stored(asked.session));
    kv.segments[0].dropped = true; /* Its store is away: it may be stored elsewhere. */
    assert_false(session_segment_stored(asked.session));
    end(&asked);
}

#define TEST(name) cmocka_unit_test_setup(name, forget)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_silent_store_costs_one_timeout),   TEST(all_waits_share_one_timeout),
        TEST(cancellation_ends_locate_and_fetch), TEST(cancellation_ends_a_publish),
        TEST(lost_pages_cost_computing_only),     TEST(lost_pages_cost_scores_nothing_else),
        TEST(a_bad_page_drops_one_copy),          TEST(what_waits_pins_nothing),
        TEST(ids_are_located_together),           TEST(a_put_is_stored_once),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
