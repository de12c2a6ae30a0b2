/*
 * Goal:   a process that dies or lies costs time, never a wrong answer: store, coordinator and
 *         worker killed in the middle of a request and at random moments; a stopped store, a
 *         stopped coordinator; a flipped byte; all restarts; two puts of the same at once.
 * Method: real processes, each read path, SIGKILL and SIGSTOP at the first token, before the
 * request and after a random delay (the seed is printed), SIGUSR1 to the store's fault injection.
 * The reference answer is computed once at level `full`; every exact answer must equal it.
 */
#include "tests/e2e/cluster.h"
#include "tests/e2e/documents.h"

#include "common/base/clock.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define DOCUMENTS       2
#define DOCUMENT        70
#define QUESTION        12
#define GENERATED       24
#define BRIEF           2 /* tokens, where the answer is only compared */
#define STORE_KILLS     10
#define KILL_DELAY_MAX  50 /* ms after the request */
#define RECOVER_MAX_NS  30000000000
#define RESTARTS        "redknot_worker_restarts_total{reason=\"MISS_NODE_DOWN\"}"
#define CHECKSUM_MISSES "redknot_worker_segment_misses_total{reason=\"MISS_CHECKSUM\"}"

static int32_t ids[DOCUMENTS][DOCUMENT];
static int32_t question[QUESTION];
static struct rk_segment_input segments[DOCUMENTS];
static struct cluster cluster;
static int32_t reference[GENERATED];
static uint64_t seed;
static const char *path; /* by which the workers read; NULL: the nearest */

static struct rk_generate_request request_at(const char *level, uint32_t num_tokens)
{
    return (struct rk_generate_request){.segments = segments,
                                        .num_segments = DOCUMENTS,
                                        .prompt = {.token_ids = question, .num_tokens = QUESTION},
                                        .max_tokens = num_tokens,
                                        .level = level,
                                        .raw = true,
                                        .ignore_eos = true};
}

static int start(void **state)
{
    (void)state;
    static const char *const store_args[] = {"--scrub-rate", "0", NULL};
    static const char *const worker_args[] = {"--fetch-timeout-ms", "500", NULL};
    struct cluster_options options = {.num_workers = 2,
                                      .path = path,
                                      .store_faults = true,
                                      .store_args = store_args,
                                      .worker_args = worker_args};
    uint64_t random = 7;
    for (int i = 0; i < DOCUMENTS; i++) {
        documents_cut(&random, DOCUMENT, ids[i]);
        segments[i] = (struct rk_segment_input){.token_ids = ids[i], .num_tokens = DOCUMENT};
    }
    documents_cut(&random, QUESTION, question);
    cluster_start(&cluster, &options);

    struct rk_client *client = cluster_client(&cluster, 0);
    struct rk_generate_request request = request_at("full", GENERATED);
    struct answer answer;
    request.no_publish = true;
    ask(client, &request, &answer);
    assert_int_equal(answer.status, RK_OK);
    assert_int_equal(answer.num_tokens, GENERATED);
    memcpy(reference, answer.tokens, sizeof(reference));
    answer_clear(&answer);
    rk_client_destroy(client);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    cluster_stop(&cluster);
    return 0;
}

static void expect_right(const struct answer *answer, const char *level, uint32_t num_tokens)
{
    if (answer->status != RK_OK) {
        fail_msg("at %s (seed %llu): %s", level, (unsigned long long)seed, answer->error.text);
    }
    assert_int_equal(answer->num_tokens, num_tokens);
    if (strcmp(level, "exact") == 0) {
        assert_memory_equal(answer->tokens, reference, num_tokens * sizeof(reference[0]));
    }
}

/* Stores nothing unless `publish`: with a store that is away the call would wait for it. */
static void ask_right(int worker, const char *level, bool publish, struct answer *ret_answer)
{
    struct rk_client *client = cluster_client(&cluster, worker);
    struct rk_generate_request request = request_at(level, BRIEF);
    request.no_publish = !publish;
    ask(client, &request, ret_answer);
    expect_right(ret_answer, level, BRIEF);
    rk_client_destroy(client);
}

/* Until both workers find all of the chain in the store again. */
static void warm_up(void)
{
    struct answer answer;
    int64_t begin = rk_clock_ns();
    for (int worker = 0; worker < 2; worker++) {
        uint32_t reused = 0;
        while (reused != DOCUMENTS * DOCUMENT) {
            if (rk_clock_ns() - begin > RECOVER_MAX_NS) {
                fail_msg("worker %d reuses %u tokens after half a minute (seed %llu)", worker,
                         reused, (unsigned long long)seed);
            }
            ask_right(worker, "exact", true, &answer);
            reused = answer.report.tokens_reused;
            answer_clear(&answer);
        }
    }
}

/* ---- A victim of a request, killed at its first token ---- */

struct killer {
    struct answer answer;
    struct process *victim;
    bool killed;
};

static bool kill_at_token(void *context, const int32_t *token_ids, size_t num_tokens,
                          const char *text, size_t text_bytes)
{
    struct killer *killer = context;
    (void)text;
    (void)text_bytes;
    for (size_t i = 0; i < num_tokens && killer->answer.num_tokens < ANSWER_TOKENS_MAX; i++) {
        killer->answer.tokens[killer->answer.num_tokens++] = token_ids[i];
    }
    if (!killer->killed) {
        process_kill(killer->victim, SIGKILL);
        killer->killed = true;
    }
    return true;
}

static void ask_and_kill(int worker, struct process *victim, struct killer *ret_killer)
{
    struct rk_client *client = cluster_client(&cluster, worker);
    struct rk_generate_request request = request_at("exact", GENERATED);
    memset(ret_killer, 0, sizeof(*ret_killer));
    ret_killer->victim = victim;
    ret_killer->answer.status =
        rk_client_generate(client, &request, kill_at_token, ret_killer, &ret_killer->answer.report,
                           &ret_killer->answer.error);
    assert_true(ret_killer->killed);
    rk_client_destroy(client);
}

static void store_killed_in_the_middle(void **state)
{
    (void)state;
    struct killer killer;
    struct answer answer;
    warm_up();
    double restarts = cluster_metric(cluster.worker_metrics[0], RESTARTS);
    ask_and_kill(0, &cluster.store, &killer); /* pages in use go with the store: it begins again */
    expect_right(&killer.answer, "exact", GENERATED);
    if (!path) { /* Over the others they are copies. */
        assert_int_equal(killer.answer.report.restarts, 1);
        assert_true(cluster_metric(cluster.worker_metrics[0], RESTARTS) == restarts + 1);
    }
    answer_clear(&killer.answer);
    /* While it is away: everything is a miss with a reason, and is computed. */
    ask_right(1, "exact", false, &answer);
    assert_int_equal(answer.report.tokens_reused, 0);
    assert_string_not_equal(answer.report.segments[0].miss, "");
    answer_clear(&answer);
    ask_right(0, "fast", true, &answer);
    answer_clear(&answer);
    process_start(&cluster.store);
    warm_up();
}

static void coordinator_killed_in_the_middle(void **state)
{
    (void)state;
    struct killer killer;
    struct answer answer;
    ask_and_kill(0, &cluster.coordinator, &killer);
    expect_right(&killer.answer, "exact", GENERATED);
    answer_clear(&killer.answer);
    ask_right(1, "exact", true, &answer);
    assert_string_equal(answer.report.segments[0].miss, "MISS_NODE_DOWN");
    answer_clear(&answer);

    process_start(&cluster.coordinator);
    int64_t begin = rk_clock_ns();
    uint32_t reused = 0;
    while (reused != DOCUMENTS * DOCUMENT) { /* The store announces what it kept. */
        assert_true(rk_clock_ns() - begin < RECOVER_MAX_NS);
        ask_right(1, "exact", false, &answer);
        reused = answer.report.tokens_reused;
        answer_clear(&answer);
    }
    print_message("restarted coordinator: everything found after %.3f s\n",
                  (double)(rk_clock_ns() - begin) * 1e-9);
    cluster_wait(&cluster, 1, 2);
}

static void worker_killed_in_the_middle(void **state)
{
    (void)state;
    struct killer killer;
    struct answer answer;
    warm_up();
    ask_and_kill(0, &cluster.workers[0], &killer);
    assert_int_equal(killer.answer.status, RK_ERR_UNAVAILABLE);
    assert_string_not_equal(killer.answer.error.text, "");
    answer_clear(&killer.answer);
    ask_right(1, "exact", true, &answer); /* and the pins that it held are gone with it */
    assert_int_equal(answer.report.tokens_reused, DOCUMENTS * DOCUMENT);
    answer_clear(&answer);
    process_start(&cluster.workers[0]);
    struct rk_client *client = cluster_client(&cluster, 0);
    struct rk_generate_request request = request_at("exact", BRIEF);
    int64_t begin = rk_clock_ns();
    do { /* Until it has loaded its model. */
        assert_true(rk_clock_ns() - begin < RECOVER_MAX_NS);
        rk_clock_sleep_ms(50);
        ask(client, &request, &answer);
    } while (answer.status == RK_ERR_UNAVAILABLE);
    expect_right(&answer, "exact", BRIEF);
    answer_clear(&answer);
    rk_client_destroy(client);
    warm_up();
}

/* ---- A victim killed after a delay ---- */

struct timed_kill {
    pthread_t thread;
    struct process *victim;
    int delay_ms;
};

static void *kill_later(void *context)
{
    struct timed_kill *timed = context;
    rk_clock_sleep_ms(timed->delay_ms);
    (void)kill(timed->victim->pid, SIGKILL);
    return NULL;
}

/* Located, mapped, pinned, half read, not yet asked: whatever it hits, the answer stays. */
static void ask_and_kill_later(int worker, struct process *victim, uint64_t *random)
{
    struct timed_kill timed = {.victim = victim,
                               .delay_ms = (int)(documents_random(random) % KILL_DELAY_MAX)};
    struct answer answer;
    assert_int_equal(pthread_create(&timed.thread, NULL, kill_later, &timed), 0);
    ask_right(worker, "exact", false, &answer);
    answer_clear(&answer);
    assert_int_equal(pthread_join(timed.thread, NULL), 0);
    process_kill(victim, SIGKILL); /* Reaps it. */
    process_start(victim);
    warm_up();
}

static void store_killed_at_random_moments(void **state)
{
    (void)state;
    uint64_t random = seed;
    for (int i = 0; i < STORE_KILLS; i++) {
        ask_and_kill_later(i % 2, &cluster.store, &random);
    }
}

static void coordinator_killed_at_random_moments(void **state)
{
    (void)state;
    uint64_t random = seed + 1;
    for (int i = 0; i < 3; i++) {
        ask_and_kill_later(i % 2, &cluster.coordinator, &random);
    }
    cluster_wait(&cluster, 1, 2);
}

/* ---- Stopped, restarted ---- */

static void stopped_peer_is_a_miss_in_time(const struct process *peer)
{
    struct answer answer;
    warm_up();
    assert_int_equal(kill(peer->pid, SIGSTOP), 0);
    ask_right(0, "exact", false, &answer);
    int continued = kill(peer->pid, SIGCONT);
    assert_int_equal(continued, 0);
    assert_int_equal(answer.report.tokens_reused, 0);
    assert_true(answer.report.segments[0].miss[0] != '\0');
    answer_clear(&answer);
    cluster_wait(&cluster, 1, 2);
    warm_up();
}

static void stopped_store_is_a_miss_in_time(void **state)
{
    (void)state;
    stopped_peer_is_a_miss_in_time(&cluster.store);
}

static void stopped_coordinator_is_a_miss_in_time(void **state)
{
    (void)state;
    stopped_peer_is_a_miss_in_time(&cluster.coordinator);
}

static void put_document(int worker, size_t num_tokens, struct rk_put_result *ret_result)
{
    struct rk_client *client = cluster_client(&cluster, worker);
    struct rk_segment_input segment = {.token_ids = ids[1], .num_tokens = num_tokens};
    struct rk_error error = {.text = ""};
    if (rk_client_put_segment(client, &segment, NULL, 0, NULL, NULL, ret_result, &error) != RK_OK) {
        fail_msg("put: %s", error.text);
    }
    rk_client_destroy(client);
}

/* The store comes back empty, the coordinator with its database, or without. */
static void puts_work_after_restarts(void **state)
{
    (void)state;
    struct rk_put_result put;
    char command[256];
    put_document(0, 20, &put);
    for (const char *who = "scSCx"; *who; who++) {
        if (*who == 's' || *who == 'S') {
            process_kill(&cluster.store, SIGTERM);
        }
        if (*who != 's') {
            process_kill(&cluster.coordinator, SIGTERM);
        }
        if (*who == 'C') { /* Both, the store first. */
            process_kill(&cluster.store, SIGTERM);
            process_start(&cluster.store);
        }
        if (*who == 'x') { /* Its data is gone; the store lives on. */
            (void)snprintf(command, sizeof(command), "rm -rf '%s'", cluster.data);
            assert_int_equal(system(command), 0);
        }
        if (*who != 's') {
            process_start(&cluster.coordinator);
        }
        if (*who == 's' || *who == 'S') {
            process_start(&cluster.store);
        }
        warm_up();
        put_document(0, 20, &put);
        put_document(1, 20, &put);
        assert_true(put.already_stored);
    }
    cluster_wait(&cluster, 1, 2);
}

static void *put_same(void *context)
{
    struct rk_put_result put;
    put_document(*(int *)context, 40, &put);
    return NULL;
}

static void two_put_the_same_at_once(void **state)
{
    (void)state;
    int workers[2] = {0, 1};
    struct rk_put_result put;
    for (int i = 0; i < 5; i++) {
        pthread_t threads[2];
        for (int j = 0; j < 2; j++) {
            assert_int_equal(pthread_create(&threads[j], NULL, put_same, &workers[j]), 0);
        }
        pthread_join(threads[0], NULL);
        pthread_join(threads[1], NULL);
        put_document(0, 40, &put);
        assert_true(put.already_stored);
        struct rk_client *client = cluster_client(&cluster, -1);
        uint32_t dropped = 0;
        assert_int_equal(rk_client_drop(client, &put.segment_id, 1, &dropped, NULL), RK_OK);
        assert_int_equal(dropped, 1);
        rk_client_destroy(client);
    }
}

/* ---- A flipped byte ---- */

static void wait_for_metric(const char *address, const char *name, double value)
{
    int64_t deadline = rk_deadline_in_ms(20000);
    while (cluster_metric(address, name) < value) {
        if (rk_deadline_left_ms(deadline) == 0) {
            fail_msg("%s stays below %.0f", name, value);
        }
        rk_clock_sleep_ms(20);
    }
}

static void flipped_byte_is_a_counted_miss(void **state)
{
    (void)state;
    struct answer answer;
    warm_up();
    double before = cluster_metric(cluster.worker_metrics[0], CHECKSUM_MISSES);
    assert_int_equal(kill(cluster.store.pid, SIGUSR1), 0);
    /* The store flips it on its own thread, soon. */
    int64_t deadline = rk_deadline_in_ms(20000);
    while (cluster_metric(cluster.worker_metrics[0], CHECKSUM_MISSES) == before) {
        assert_true(rk_deadline_left_ms(deadline) > 0);
        ask_right(0, "exact", true, &answer);
        answer_clear(&answer);
    }
    assert_true(cluster_metric(cluster.worker_metrics[0], CHECKSUM_MISSES) == before + 1);
    warm_up(); /* The bad copy was replaced. */
}

static void scrubber_drops_a_flipped_byte(void **state)
{
    (void)state;
    process_kill(&cluster.store, SIGTERM);
    process_set_argument(&cluster.store, "--scrub-rate", "1GiB");
    process_start(&cluster.store);
    warm_up();
    double misses = cluster_metric(cluster.worker_metrics[0], CHECKSUM_MISSES);
    assert_int_equal(kill(cluster.store.pid, SIGUSR1), 0);
    wait_for_metric(cluster.store_metrics, "redknot_kvstore_checksum_failures_total", 1);
    warm_up(); /* Nobody read it; it is computed again. */
    assert_true(cluster_metric(cluster.worker_metrics[0], CHECKSUM_MISSES) == misses);
}

int main(void)
{
    const char *given = getenv("REDKNOT_TEST_SEED");
    seed = given ? strtoull(given, NULL, 10) : (uint64_t)rk_clock_ns();
    print_message("seed %llu (REDKNOT_TEST_SEED)\n", (unsigned long long)seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(store_killed_in_the_middle),
        cmocka_unit_test(coordinator_killed_in_the_middle),
        cmocka_unit_test(worker_killed_in_the_middle),
        cmocka_unit_test(store_killed_at_random_moments),
        cmocka_unit_test(coordinator_killed_at_random_moments),
        cmocka_unit_test(stopped_store_is_a_miss_in_time),
        cmocka_unit_test(stopped_coordinator_is_a_miss_in_time),
        cmocka_unit_test(two_put_the_same_at_once),
        cmocka_unit_test(flipped_byte_is_a_counted_miss),
        cmocka_unit_test(puts_work_after_restarts),
        cmocka_unit_test(scrubber_drops_a_flipped_byte),
    };
    const struct CMUnitTest over_network[] = {
        cmocka_unit_test(store_killed_in_the_middle),
        cmocka_unit_test(store_killed_at_random_moments),
        cmocka_unit_test(worker_killed_in_the_middle),
        cmocka_unit_test(stopped_store_is_a_miss_in_time),
        cmocka_unit_test(flipped_byte_is_a_counted_miss),
    };
    int failed = cmocka_run_group_tests(tests, start, stop);
    path = "ucx";
    failed += cmocka_run_group_tests_name("over ucx", over_network, start, stop);
    path = "grpc";
    return failed + cmocka_run_group_tests_name("over grpc", over_network, start, stop);
}
