/*
 * Goal:   8 clients at once against 2 workers, with a store too small for all they ask for: no
 *         error, no wrong answer, the store within its capacity, memory that does not grow.
 * Method: each client asks random requests over a shared set of documents at all levels and
 *         compares repeated greedy answers; run for REDKNOT_SOAK_SECONDS (15; CI: 60, under
 *         AddressSanitizer, whose leak check is part of cluster_stop).
 */
#include "tests/e2e/cluster.h"
#include "tests/e2e/documents.h"
#include "tests/support/skip.h"

#include "common/base/clock.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define CLIENTS   8
#define DOCUMENTS 12
#define DOCUMENT  120
#define GENERATED 6

static int32_t ids[DOCUMENTS][DOCUMENT];
static struct cluster cluster;
static int64_t end_ns;

/* What the first exact answer was, by the document that it is about. */
struct memory {
    pthread_mutex_t mutex;
    int32_t tokens[DOCUMENTS][GENERATED];
    bool known[DOCUMENTS];
};
static struct memory memory = {.mutex = PTHREAD_MUTEX_INITIALIZER};

struct soaker {
    pthread_t thread;
    uint64_t random;
    uint32_t requests;
    char failure[600];
};

static void check_answer(struct soaker *soaker, const struct answer *answer, size_t first)
{
    pthread_mutex_lock(&memory.mutex);
    int32_t *tokens = memory.tokens[first];
    if (!memory.known[first]) {
        memory.known[first] = true;
        memcpy(tokens, answer->tokens, sizeof(memory.tokens[0]));
    } else if (memcmp(tokens, answer->tokens, sizeof(memory.tokens[0])) != 0) {
        (void)snprintf(soaker->failure, sizeof(soaker->failure),
                       "another exact answer about document %zu", first);
    }
    pthread_mutex_unlock(&memory.mutex);
}

static void *soak(void *context)
{
    struct soaker *soaker = context;
    struct rk_client *client = cluster_client(&cluster, -1);
    while (rk_clock_ns() < end_ns && !soaker->failure[0]) {
        struct rk_segment_input segments[3];
        size_t first = documents_random(&soaker->random) % DOCUMENTS;
        int level = (int)(documents_random(&soaker->random) % 2);
        for (size_t i = 0; i < 3; i++) {
            segments[i] = (struct rk_segment_input){.token_ids = ids[(first + 5 * i) % DOCUMENTS],
                                                    .num_tokens = DOCUMENT};
        }
        struct rk_generate_request request = {.segments = segments,
                                              .num_segments = 3,
                                              .prompt = {.token_ids = ids[first], .num_tokens = 8},
                                              .level = level ? "fast" : "exact",
                                              .max_tokens = GENERATED,
                                              .raw = true,
                                              .ignore_eos = true};
        struct answer answer;
        ask(client, &request, &answer);
        if (answer.status != RK_OK) {
            (void)snprintf(soaker->failure, sizeof(soaker->failure), "%s: %s",
                           rk_status_name(answer.status), answer.error.text);
        } else {
            /* At `fast` a cached chain makes an answer better, so only exact ones repeat. */
            if (level == 0) {
                check_answer(soaker, &answer, first);
            }
            soaker->requests++;
        }
        answer_clear(&answer);
    }
    rk_client_destroy(client);
    return NULL;
}

static void eight_clients_two_workers(void **state)
{
    (void)state;
    struct soaker soakers[CLIENTS];
    /* 12 documents take 24 MiB in bf16, and each of 12 chains 6 MiB more: they evict each other. */
    struct cluster_options options = {.num_workers = 2, .dram = "48MiB"};
    const char *given = getenv("REDKNOT_SOAK_SECONDS");
    uint64_t random = 99;
    uint32_t requests = 0;
    for (int i = 0; i < DOCUMENTS; i++) {
        documents_cut(&random, DOCUMENT, ids[i]);
    }
    cluster_start(&cluster, &options);
    end_ns = rk_deadline_in_ms(1000 * (given ? strtol(given, NULL, 10) : 15));
    for (int i = 0; i < CLIENTS; i++) {
        soakers[i] = (struct soaker){.random = (uint64_t)i};
        assert_int_equal(pthread_create(&soakers[i].thread, NULL, soak, &soakers[i]), 0);
    }
    double used_max = 0;
    while (rk_clock_ns() < end_ns) {
        double used = cluster_metric(cluster.store_metrics, "redknot_kvstore_used_bytes");
        used_max = used > used_max ? used : used_max;
        rk_clock_sleep_ms(200);
    }
    for (int i = 0; i < CLIENTS; i++) {
        pthread_join(soakers[i].thread, NULL);
        if (soakers[i].failure[0]) {
            fail_msg("client %d: %s", i, soakers[i].failure);
        }
        requests += soakers[i].requests;
    }
    double capacity = cluster_metric(cluster.store_metrics, "redknot_kvstore_capacity_bytes");
    double evictions = cluster_metric(cluster.store_metrics, "redknot_kvstore_evictions_total");
    print_message("%u requests, %.0f evictions, at most %.1f of %.1f MiB used\n", requests,
                  evictions, used_max / 1048576, capacity / 1048576);
    assert_true(requests > CLIENTS);
    assert_true(used_max > 0 && used_max <= capacity);
    assert_true(evictions > 0);
    cluster_metrics_check(cluster.coordinator_metrics);
    cluster_metrics_check(cluster.store_metrics);
    cluster_metrics_check(cluster.worker_metrics[0]);
    cluster_stop(&cluster);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(eight_clients_two_workers)};
    return test_exit_code(cmocka_run_group_tests(tests, NULL, NULL));
}
