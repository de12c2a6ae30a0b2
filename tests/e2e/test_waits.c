/*
 * Goal:   what does not answer costs a request one fetch timeout, however many segments it has, and
 *         the next one nothing; who goes or is told to go is not waited for; readers that take
 * nothing slow nobody. Method: a real cluster for each read path; its store or coordinator is
 * stopped (SIGSTOP) with 8 and 30 segments in it; times to the first token are compared with a cold
 * request's. A worker with a long fetch timeout is left by its client, and ended by SIGTERM, at
 * each stage.
 */
#include "tests/e2e/cluster.h"
#include "tests/e2e/documents.h"

#include "common/base/clock.h"
#include "common/rpc/rpc.h"
#include "redknot/v1/worker.pb-c.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SEGMENTS_MAX     30
#define SEGMENT          8
#define QUESTION         8
#define FETCH_TIMEOUT_S  0.6
#define FETCH_TIMEOUT_MS "600"
#define SLACK_S          0.3
#define PUBLISH_SILENT_S 0.25 /* a store that takes nothing for so long ends the call */
#define NOTHING_S        0.1
#define NEXT_MAX         4
#define LONG_TIMEOUT_MS  "30000"
#define GONE_S           1.0
#define STOPPED_S        5.0
#define SCORERS          9 /* --requests-max is 8 */
#define CONTINUATION     400
#define WAIT_MAX_MS      30000

static int32_t ids[SEGMENTS_MAX][SEGMENT];
static int32_t question[QUESTION];
static struct rk_segment_input segments[SEGMENTS_MAX];
static struct cluster cluster;
static const char *path;
static const char *fetch_timeout = FETCH_TIMEOUT_MS;
static uint64_t seed = 5;
static uint32_t num_cut;

static void cut_documents(void)
{
    for (int i = 0; i < SEGMENTS_MAX; i++) {
        documents_cut(&seed, SEGMENT, ids[i]);
        ids[i][0] = 1000 + (int32_t)num_cut++; /* No two are alike. */
        segments[i] = (struct rk_segment_input){.token_ids = ids[i], .num_tokens = SEGMENT};
    }
    documents_cut(&seed, QUESTION, question);
}

static int start(void **state)
{
    (void)state;
    const char *worker_args[] = {"--fetch-timeout-ms", fetch_timeout, NULL};
    struct cluster_options options = {.num_workers = 1, .path = path, .worker_args = worker_args};
    cut_documents();
    cluster_start(&cluster, &options);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    cluster_stop(&cluster);
    return 0;
}

static struct rk_generate_request request_of(uint32_t num_segments, uint32_t num_tokens)
{
    return (struct rk_generate_request){.segments = segments,
                                        .num_segments = num_segments,
                                        .prompt = {.token_ids = question, .num_tokens = QUESTION},
                                        .max_tokens = num_tokens,
                                        .level = "fast",
                                        .raw = true,
                                        .ignore_eos = true,
                                        .no_publish = true};
}

static void expect_ok(const struct answer *answer)
{
    if (answer->status != RK_OK) {
        fail_msg("%s", answer->error.text);
    }
}

/* The whole call, as its client feels it. */
static double ask_seconds(uint32_t num_segments, bool publish, struct answer *ret_answer)
{
    struct rk_client *client = cluster_client(&cluster, 0);
    struct rk_generate_request request = request_of(num_segments, 1);
    request.no_publish = !publish;
    int64_t begin = rk_clock_ns();
    ask(client, &request, ret_answer);
    double seconds = (double)(rk_clock_ns() - begin) * 1e-9;
    expect_ok(ret_answer);
    rk_client_destroy(client);
    return seconds;
}

static void warm_up(uint32_t num_segments)
{
    int64_t deadline = rk_deadline_in_ms(WAIT_MAX_MS);
    struct answer answer;
    bool warm = false;
    while (!warm) {
        assert_true(rk_deadline_left_ms(deadline) > 0);
        (void)ask_seconds(num_segments, true, &answer);
        warm = answer.report.tokens_reused > (num_segments - 1) * (SEGMENT - 4);
        answer_clear(&answer);
    }
}

/* What the wait adds is told apart from the arithmetic, which other work on the machine slows down.
 */
static void stopped_peer_costs_one_timeout(const struct process *peer, const char *what)
{
    for (uint32_t count = 8; count <= SEGMENTS_MAX; count += SEGMENTS_MAX - 8) {
        struct answer answer;
        cut_documents();
        (void)ask_seconds(count, false, &answer);
        double cold = answer.report.ttft_s;
        answer_clear(&answer);
        warm_up(count);
        assert_int_equal(kill(peer->pid, SIGSTOP), 0);
        double call = ask_seconds(count, true, &answer);
        double ttft = answer.report.ttft_s;
        double wait = answer.report.fetch_s + answer.report.queue_s;
        uint32_t reused = answer.report.tokens_reused;
        answer_clear(&answer);
        print_message("%s stopped, %u segments over %s: ttft cold %.3f s, then %.3f (waited %.3f, "
                      "call %.3f)",
                      what, count, path ? path : "shm", cold, ttft, wait, call);
        bool free_of_charge = false; /* once it is asked within the back-off, which grows */
        double next_wait_max = 0;
        for (int i = 0; i < NEXT_MAX && !free_of_charge; i++) {
            (void)ask_seconds(count, false, &answer);
            double next_wait = answer.report.fetch_s + answer.report.queue_s;
            print_message(", next %.3f (waited %.3f)", answer.report.ttft_s, next_wait);
            free_of_charge = next_wait < NOTHING_S;
            next_wait_max = next_wait > next_wait_max ? next_wait : next_wait_max;
            answer_clear(&answer);
        }
        print_message("\n");
        assert_int_equal(kill(peer->pid, SIGCONT), 0);
        assert_int_equal(reused, 0);
        assert_true(wait < FETCH_TIMEOUT_S + NOTHING_S);
        assert_true(ttft < 2 * cold + FETCH_TIMEOUT_S + SLACK_S); /* 2: other work */
        assert_true(call < ttft + PUBLISH_SILENT_S + SLACK_S);
        assert_true(free_of_charge);
        assert_true(next_wait_max < FETCH_TIMEOUT_S + NOTHING_S);
        cluster_wait(&cluster, 1, 1);
    }
}

static void a_stopped_store_costs_one_timeout(void **state)
{
    (void)state;
    stopped_peer_costs_one_timeout(&cluster.store, "store");
}

static void a_stopped_coordinator_costs_one_timeout(void **state)
{
    (void)state;
    stopped_peer_costs_one_timeout(&cluster.coordinator, "coordinator");
}

/* ---- Who goes, and who is told to go ---- */

struct caller {
    pthread_t thread;
    struct rk_client *client;
    struct rk_generate_request request;
    struct answer answer;
};

static void *caller_main(void *context)
{
    struct caller *caller = context;
    ask(caller->client, &caller->request, &caller->answer);
    return NULL;
}

static void caller_start(struct caller *caller, uint32_t num_segments, uint32_t num_tokens)
{
    memset(caller, 0, sizeof(*caller));
    caller->client = cluster_client(&cluster, 0);
    caller->request = request_of(num_segments, num_tokens);
    assert_int_equal(pthread_create(&caller->thread, NULL, caller_main, caller), 0);
    rk_clock_sleep_ms(300); /* It is inside. */
}

static void caller_end(struct caller *caller)
{
    pthread_join(caller->thread, NULL);
    answer_clear(&caller->answer);
    rk_client_destroy(caller->client);
}

static const struct stage {
    const char *name;
    bool stop_store, stop_coordinator;
    uint32_t num_tokens;
} stages[] = {
    {.name = "locate", .stop_coordinator = true, .num_tokens = 1},
    {.name = "fetch", .stop_store = true, .num_tokens = 1},
    {.name = "compute", .num_tokens = 2000},
    {.name = "compute, all stopped", .stop_store = true, .stop_coordinator = true, .num_tokens = 1},
};
#define STAGES (sizeof(stages) / sizeof(stages[0]))

static void stage_enter(const struct stage *stage, struct caller *caller)
{
    warm_up(SEGMENTS_MAX);
    if (stage->stop_store) {
        assert_int_equal(kill(cluster.store.pid, SIGSTOP), 0);
    }
    if (stage->stop_coordinator) {
        assert_int_equal(kill(cluster.coordinator.pid, SIGSTOP), 0);
    }
    caller_start(caller, SEGMENTS_MAX, stage->num_tokens);
}

static void stage_leave(const struct stage *stage)
{
    if (stage->stop_store) {
        assert_int_equal(kill(cluster.store.pid, SIGCONT), 0);
    }
    if (stage->stop_coordinator) {
        assert_int_equal(kill(cluster.coordinator.pid, SIGCONT), 0);
    }
    cluster_wait(&cluster, 1, 1);
}

static void who_goes_is_not_waited_for(void **state)
{
    (void)state;
    for (size_t i = 0; i < STAGES; i++) {
        struct caller caller;
        double failures = 0;
        stage_enter(&stages[i], &caller);
        failures =
            cluster_metric(cluster.worker_metrics[0], "redknot_worker_request_failures_total");
        int64_t begin = rk_clock_ns();
        rk_client_cancel(caller.client);
        while (cluster_metric(cluster.worker_metrics[0], "redknot_worker_request_failures_total") ==
               failures) {
            assert_true(rk_clock_ns() - begin < WAIT_MAX_MS * INT64_C(1000000));
            rk_clock_sleep_ms(5);
        }
        double seconds = (double)(rk_clock_ns() - begin) * 1e-9;
        print_message("cancelled at %s over %s: %.3f s\n", stages[i].name, path ? path : "shm",
                      seconds);
        caller_end(&caller);
        stage_leave(&stages[i]);
        assert_true(seconds < GONE_S);
    }
}

static void a_worker_ends_soon_whatever_is_stopped(void **state)
{
    (void)state;
    for (size_t i = 0; i < STAGES; i++) {
        struct caller caller;
        stage_enter(&stages[i], &caller);
        int64_t begin = rk_clock_ns();
        process_kill(&cluster.workers[0], SIGTERM);
        double seconds = (double)(rk_clock_ns() - begin) * 1e-9;
        print_message("SIGTERM at %s over %s: %.3f s\n", stages[i].name, path ? path : "shm",
                      seconds);
        caller_end(&caller);
        process_start(&cluster.workers[0]);
        stage_leave(&stages[i]);
        struct rk_client *client = cluster_client(&cluster, 0);
        struct rk_generate_request request = request_of(1, 1);
        struct answer answer;
        int64_t deadline = rk_deadline_in_ms(WAIT_MAX_MS);
        do { /* Until it has loaded its model. */
            assert_true(rk_deadline_left_ms(deadline) > 0);
            rk_clock_sleep_ms(50);
            ask(client, &request, &answer);
            answer_clear(&answer);
        } while (answer.status == RK_ERR_UNAVAILABLE);
        rk_client_destroy(client);
        assert_true(seconds < STOPPED_S);
    }
}

/* A store that is silent while an answer is published holds up neither the call nor the worker. */
static void a_publish_holds_up_nobody(void **state)
{
    (void)state;
    struct answer answer;
    cut_documents();
    assert_int_equal(kill(cluster.store.pid, SIGSTOP), 0);
    double seconds = ask_seconds(SEGMENTS_MAX, true, &answer);
    double ttft = answer.report.ttft_s;
    answer_clear(&answer);
    print_message("published to a silent store over %s: %.3f s, ttft %.3f s\n", path ? path : "shm",
                  seconds, ttft);
    assert_true(seconds < ttft + PUBLISH_SILENT_S + SLACK_S);
    int64_t begin = rk_clock_ns();
    process_kill(&cluster.workers[0], SIGTERM); /* It is still at it. */
    seconds = (double)(rk_clock_ns() - begin) * 1e-9;
    print_message("SIGTERM at publish over %s: %.3f s\n", path ? path : "shm", seconds);
    process_start(&cluster.workers[0]);
    assert_int_equal(kill(cluster.store.pid, SIGCONT), 0);
    cluster_wait(&cluster, 1, 1);
    assert_true(seconds < STOPPED_S);
}

/* ---- Readers that take nothing ---- */

/* A Score of whose rows one is read. */
static void scorer_start(struct rk_rpc_channel *channel, struct rk_rpc_stream **ret_stream)
{
    Redknot__V1__ScoreRequest request = REDKNOT__V1__SCORE_REQUEST__INIT;
    Redknot__V1__SegmentInput inputs[2] = {REDKNOT__V1__SEGMENT_INPUT__INIT,
                                           REDKNOT__V1__SEGMENT_INPUT__INIT};
    Redknot__V1__SegmentInput__TokenIds tokens[2] = {REDKNOT__V1__SEGMENT_INPUT__TOKEN_IDS__INIT,
                                                     REDKNOT__V1__SEGMENT_INPUT__TOKEN_IDS__INIT};
    int32_t continuation[CONTINUATION];
    documents_cut(&seed, CONTINUATION, continuation);
    tokens[0].ids = (uint32_t *)question;
    tokens[0].n_ids = QUESTION;
    tokens[1].ids = (uint32_t *)continuation;
    tokens[1].n_ids = CONTINUATION;
    for (int i = 0; i < 2; i++) {
        inputs[i].content_case = REDKNOT__V1__SEGMENT_INPUT__CONTENT_TOKENS;
        inputs[i].tokens = &tokens[i];
    }
    request.prompt = &inputs[0];
    request.continuation = &inputs[1];
    request.level = (char *)"full";
    assert_int_equal(rk_rpc_stream_open_with(channel, "/redknot.v1.Worker/Score", &request.base,
                                             4 * WAIT_MAX_MS, ret_stream, NULL),
                     RK_OK);
    struct ProtobufCMessage *message = NULL; /* One row: nothing is sent by a call that waits. */
    assert_int_equal(
        rk_rpc_stream_recv(*ret_stream, &redknot__v1__score_reply__descriptor, &message), RK_OK);
    rk_rpc_message_free(message);
}

static double stalled_count(void)
{
    return cluster_metric(cluster.worker_metrics[0], "redknot_worker_requests_stalled");
}

static void wait_for_stalled(double wanted)
{
    int64_t deadline = rk_deadline_in_ms(WAIT_MAX_MS);
    while (stalled_count() != wanted) {
        assert_true(rk_deadline_left_ms(deadline) > 0);
        rk_clock_sleep_ms(20);
    }
}

/* More of them than there are places: they slow nobody down, and do not stay. */
static void readers_that_take_nothing_slow_nobody(void **state)
{
    (void)state;
    struct rk_rpc_channel *channels[SCORERS];
    struct rk_rpc_stream *streams[SCORERS];
    struct answer answer;
    cut_documents();
    double alone = ask_seconds(8, false, &answer);
    answer_clear(&answer);
    for (int i = 0; i < SCORERS; i++) {
        assert_int_equal(rk_rpc_channel_create(cluster.worker_addresses[0], &channels[i], NULL),
                         RK_OK);
        scorer_start(channels[i], &streams[i]);
    }
    wait_for_stalled(SCORERS);
    double beside = ask_seconds(8, false, &answer);
    answer_clear(&answer);
    print_message("a request of 8 segments: %.3f s alone, %.3f s beside %d stalled scores\n", alone,
                  beside, SCORERS);
    assert_true(stalled_count() == SCORERS); /* They were there all the time. */
    wait_for_stalled(0);
    for (int i = 0; i < SCORERS; i++) {
        struct ProtobufCMessage *message = NULL;
        while (rk_rpc_stream_recv(streams[i], &redknot__v1__score_reply__descriptor, &message) ==
               RK_OK) {
            rk_rpc_message_free(message);
        }
        assert_int_equal(rk_rpc_stream_finish(streams[i], NULL), RK_ERR_DEADLINE);
        rk_rpc_stream_destroy(streams[i]);
        rk_rpc_channel_destroy(channels[i]);
    }
    assert_true(beside < 2 * alone + SLACK_S);
}

int main(void)
{
    static const char *const paths[] = {NULL, "ucx", "grpc"};
    const struct CMUnitTest times[] = {
        cmocka_unit_test(a_stopped_store_costs_one_timeout),
        cmocka_unit_test(a_stopped_coordinator_costs_one_timeout),
    };
    const struct CMUnitTest readers[] = {
        cmocka_unit_test(readers_that_take_nothing_slow_nobody),
    };
    const struct CMUnitTest ends[] = {
        cmocka_unit_test(who_goes_is_not_waited_for),
        cmocka_unit_test(a_worker_ends_soon_whatever_is_stopped),
        cmocka_unit_test(a_publish_holds_up_nobody),
    };
    int failed = 0;
    const char *only = getenv("REDKNOT_TEST_PATH"); /* one of them, for a person in a hurry */
    if (!only || strcmp(only, "readers") == 0) {
        failed += cmocka_run_group_tests_name("readers", readers, start, stop);
    }
    for (int i = 0; i < 3; i++) {
        path = paths[i];
        if (only && strcmp(only, path ? path : "shm") != 0) {
            continue;
        }
        fetch_timeout = FETCH_TIMEOUT_MS;
        failed += cmocka_run_group_tests_name(path ? path : "shm", times, start, stop);
        fetch_timeout = LONG_TIMEOUT_MS;
        failed += cmocka_run_group_tests_name(path ? path : "shm", ends, start, stop);
    }
    return failed;
}
