/*
 * Goal:   reuse is right on a whole cluster: `exact` with a warm cache is bit-equal to computing
 *         without one, on any worker; `fast` reuses segments in another order; reports tell the
 *         truth about what was reused, fetched and by which path. Workers with different arithmetic
 *         share nothing at `exact`.
 * Method: real processes; random requests over golden texts (printed seed), scored and generated
 *         at `full` without publishing and at `exact`, compared byte by byte.
 */
#include "tests/e2e/cluster.h"
#include "tests/e2e/documents.h"
#include "tests/support/golden.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define SEGMENTS_MAX 4
#define TOKENS_MAX   100
#define PROMPT_MAX   20
#define FORCED       4
#define GENERATED    4
#define LIBRARY      8 /* documents that the random requests draw from */

static uint64_t seed;

struct library {
    int32_t ids[LIBRARY][TOKENS_MAX + 8];
    size_t count[LIBRARY];
};

struct rows {
    float *data;
    size_t vocab;
    uint32_t num_rows;
};

static bool keep_row(void *context, uint32_t row, const float *logprobs, size_t vocab)
{
    struct rows *rows = context;
    if (!rows->data) {
        rows->vocab = vocab;
        rows->data = malloc(FORCED * vocab * sizeof(float));
    }
    assert_int_equal(row, rows->num_rows);
    assert_true(row < FORCED);
    memcpy(rows->data + row * vocab, logprobs, vocab * sizeof(float));
    rows->num_rows++;
    return true;
}

static void make_library(uint64_t *state, struct library *library)
{
    for (int i = 0; i < LIBRARY; i++) {
        library->count[i] = 1 + documents_random(state) % TOKENS_MAX;
        documents_cut(state, library->count[i], library->ids[i]);
    }
}

static size_t draw_segments(uint64_t *state, const struct library *library,
                            struct rk_segment_input *ret_segments)
{
    size_t count = 1 + documents_random(state) % SEGMENTS_MAX;
    for (size_t i = 0; i < count; i++) {
        size_t document = documents_random(state) % LIBRARY;
        ret_segments[i] = (struct rk_segment_input){.token_ids = library->ids[document],
                                                    .num_tokens = library->count[document]};
    }
    return count;
}

static void score_rows(struct rk_client *client, struct rk_score_request *request,
                       const char *level, struct rows *ret_rows, struct rk_report *ret_report)
{
    struct rk_error error = {.text = ""};
    request->level = level;
    memset(ret_rows, 0, sizeof(*ret_rows));
    enum rk_status status =
        rk_client_score(client, request, keep_row, ret_rows, ret_report, &error);
    if (status != RK_OK) {
        fail_msg("score at %s: %s", level, error.text);
    }
    assert_int_equal(ret_rows->num_rows, FORCED);
}

/* The writer publishes the chain; the reader then finds all of it. */
static void compare_tokens(struct rk_client *writer, struct rk_client *reader,
                           struct rk_generate_request *request, uint32_t *ret_reused)
{
    struct rk_client *askers[2] = {writer, reader};
    struct answer cold;
    request->level = "full";
    request->no_publish = true;
    ask(writer, request, &cold);
    assert_int_equal(cold.status, RK_OK);
    assert_int_equal(cold.report.tokens_reused, 0);
    request->level = "exact";
    request->no_publish = false;
    for (int i = 0; i < 2; i++) {
        struct answer warm;
        ask(askers[i], request, &warm);
        assert_int_equal(warm.status, RK_OK);
        assert_int_equal(warm.num_tokens, cold.num_tokens);
        assert_memory_equal(warm.tokens, cold.tokens, cold.num_tokens * sizeof(cold.tokens[0]));
        *ret_reused += warm.report.tokens_reused;
        answer_clear(&warm);
    }
    answer_clear(&cold);
}

static void exact_equals_full(const char *mode, const char *path, int requests)
{
    static struct library library;
    struct cluster cluster;
    struct cluster_options options = {.num_workers = 2, .mode = mode, .path = path};
    uint64_t state = seed;
    uint32_t reused = 0;
    cluster_start(&cluster, &options);
    make_library(&state, &library);
    struct rk_client *clients[2] = {cluster_client(&cluster, 0), cluster_client(&cluster, 1)};
    for (int i = 0; i < requests; i++) {
        struct rk_segment_input segments[SEGMENTS_MAX];
        int32_t prompt[PROMPT_MAX];
        int32_t forced[FORCED];
        size_t count = draw_segments(&state, &library, segments);
        size_t num_prompt = 1 + documents_random(&state) % PROMPT_MAX;
        documents_cut(&state, num_prompt, prompt);
        documents_cut(&state, FORCED, forced);
        struct rk_generate_request generate = {
            .segments = segments,
            .num_segments = count,
            .prompt = {.token_ids = prompt, .num_tokens = num_prompt},
            .max_tokens = GENERATED,
            .raw = true,
            .ignore_eos = true};
        struct rk_score_request score = {
            .segments = segments,
            .num_segments = count,
            .prompt = generate.prompt,
            .continuation = {.token_ids = forced, .num_tokens = FORCED}};
        compare_tokens(clients[i % 2], clients[1 - i % 2], &generate, &reused);
        struct rows full;
        struct rows exact;
        struct rk_report reports[2] = {0};
        score_rows(clients[i % 2], &score, "full", &full, &reports[0]);
        score_rows(clients[1 - i % 2], &score, "exact", &exact, &reports[1]);
        assert_int_equal(reports[1].tokens_computed, num_prompt);
        assert_string_equal(reports[1].path, path ? path : "shm");
        if (memcmp(full.data, exact.data, FORCED * full.vocab * sizeof(float)) != 0) {
            fail_msg("request %d (seed %llu): log-probabilities differ", i,
                     (unsigned long long)seed);
        }
        free(full.data);
        free(exact.data);
        rk_report_clear(&reports[0]);
        rk_report_clear(&reports[1]);
    }
    assert_true(reused > 0);
    rk_client_destroy(clients[0]);
    rk_client_destroy(clients[1]);
    cluster_stop(&cluster);
}

static void exact_equals_full_over_shared_memory(void **state)
{
    (void)state;
    exact_equals_full(NULL, NULL, 50);
}

static void exact_equals_full_in_f32_over_grpc(void **state)
{
    (void)state;
    exact_equals_full("f32", "grpc", 10);
}

static void exact_equals_full_over_ucx(void **state)
{
    (void)state;
    exact_equals_full(NULL, "ucx", 10);
}

/* Documents stored one way round and asked for the other way round, by a worker that never
 * computed them. */
static void fast_reuses_in_another_order(void **unused)
{
    (void)unused;
    static struct library library;
    struct cluster cluster;
    struct cluster_options options = {.num_workers = 2};
    struct rk_put_result put;
    struct rk_segment_input segments[3];
    struct answer answer;
    struct answer again;
    uint64_t state = seed + 1;
    cluster_start(&cluster, &options);
    make_library(&state, &library);
    struct rk_client *writer = cluster_client(&cluster, 0);
    struct rk_client *reader = cluster_client(&cluster, 1);
    for (int i = 0; i < 3; i++) {
        library.count[i] = 100 + (size_t)i;
        documents_cut(&state, library.count[i], library.ids[i]);
        segments[i] = (struct rk_segment_input){.token_ids = library.ids[2 - i],
                                                .num_tokens = 100 + (size_t)(2 - i)};
    }
    for (int i = 0; i < 3; i++) {
        struct rk_segment_input segment = {.token_ids = library.ids[i],
                                           .num_tokens = library.count[i]};
        assert_int_equal(rk_client_put_segment(writer, &segment, NULL, 0, NULL, NULL, &put, NULL),
                         RK_OK);
        assert_false(put.already_stored);
        assert_int_equal(put.num_tokens, library.count[i]);
        assert_int_equal(rk_client_put_segment(reader, &segment, NULL, 0, NULL, NULL, &put, NULL),
                         RK_OK);
        assert_true(put.already_stored);
    }
    struct rk_generate_request request = {.segments = segments,
                                          .num_segments = 3,
                                          .prompt = {.token_ids = library.ids[5], .num_tokens = 10},
                                          .level = "fast",
                                          .raw = true,
                                          .ignore_eos = true,
                                          .max_tokens = GENERATED};
    ask(reader, &request, &answer);
    assert_int_equal(answer.status, RK_OK);
    assert_string_equal(answer.report.segments[0].source, "chain");
    assert_string_equal(answer.report.segments[1].source, "segment");
    assert_int_equal(answer.report.tokens_computed, 2 * 4 + 10);
    assert_int_equal(answer.report.tokens_reused, 303 - 8);
    assert_string_equal(answer.report.path, "shm");
    assert_true(answer.report.flops < 0.2 * answer.report.flops_full);
    /* The answer does not depend on what is cached: nothing is, under another salt. */
    request.salt = "other";
    request.salt_bytes = 5;
    ask(reader, &request, &again);
    assert_int_equal(again.status, RK_OK);
    assert_int_equal(again.report.tokens_reused, 0);
    assert_memory_equal(again.tokens, answer.tokens, sizeof(answer.tokens[0]) * GENERATED);
    answer_clear(&answer);
    answer_clear(&again);
    rk_client_destroy(writer);
    rk_client_destroy(reader);
    cluster_stop(&cluster);
}

/* What is dropped is computed by the next answer, and so is what followed it in a chain; ids that
 * status prints, also of chains, are taken where ids are. */
static void dropped_segments_are_computed(void **unused)
{
    (void)unused;
    static struct library library;
    struct cluster cluster;
    struct cluster_options options = {.num_workers = 1};
    struct rk_segment_input segments[3];
    struct rk_cluster_status status;
    struct rk_drop_query query = {.num_ids = 1};
    struct rk_drop_result dropped;
    struct rk_id chain = {{0}};
    struct answer answer;
    uint64_t state = seed + 2;
    cluster_start(&cluster, &options);
    make_library(&state, &library);
    struct rk_client *client = cluster_client(&cluster, 0);
    for (int i = 0; i < 3; i++) {
        segments[i] = (struct rk_segment_input){
            .token_ids = library.ids[i], .num_tokens = library.count[i], .label = "doc"};
    }
    struct rk_generate_request request = {.segments = segments,
                                          .num_segments = 3,
                                          .prompt = {.token_ids = library.ids[5], .num_tokens = 9},
                                          .level = "exact",
                                          .raw = true,
                                          .ignore_eos = true,
                                          .max_tokens = GENERATED};
    for (int turn = 0; turn < 3; turn++) {
        bool warm = turn == 1;
        ask(client, &request, &answer);
        assert_int_equal(answer.status, RK_OK);
        for (int i = 0; i < 3; i++) {
            assert_string_equal(answer.report.segments[i].source, warm ? "chain" : "compute");
            assert_string_equal(answer.report.segments[i].miss, warm ? "" : "MISS_ABSENT");
        }
        if (warm) { /* The first one is in all three chains. */
            query.ids = &answer.report.segments[0].segment_id;
            assert_int_equal(rk_client_drop_query(client, &query, &dropped, NULL), RK_OK);
            assert_int_equal(dropped.dropped, 1);
            assert_int_equal(dropped.chains, 2);
        }
        answer_clear(&answer);
    }
    assert_int_equal(rk_client_status(client, 10, &status, NULL), RK_OK);
    assert_int_equal(status.num_segments_listed, 3);
    for (size_t i = 0; i < 3; i++) {
        if (strcmp(status.segments[i].kind, "chain") == 0) {
            chain = status.segments[i].segment_id;
        }
    }
    assert_false(rk_id_is_zero(&chain));
    rk_cluster_status_clear(&status);
    segments[2] = (struct rk_segment_input){.segment_id = &chain};
    ask(client, &request, &answer);
    assert_int_equal(answer.status, RK_OK);
    answer_clear(&answer);
    query = (struct rk_drop_query){.label = "doc"};
    assert_int_equal(rk_client_drop_query(client, &query, &dropped, NULL), RK_OK);
    assert_int_equal(rk_client_status(client, 10, &status, NULL), RK_OK);
    assert_int_equal(status.num_segments, 0);
    rk_cluster_status_clear(&status);
    rk_client_destroy(client);
    cluster_stop(&cluster);
}

static void expect_rows_equal(const struct rows *a, const struct rows *b, const char *what)
{
    assert_int_equal(a->vocab, b->vocab);
    if (memcmp(a->data, b->data, FORCED * a->vocab * sizeof(float)) != 0) {
        fail_msg("%s (seed %llu): log-probabilities differ", what, (unsigned long long)seed);
    }
}

/* Status tells which workers share, and which do not. */
static void expect_two_paths(struct rk_client *client)
{
    struct rk_cluster_status status;
    const char *paths[2] = {"", ""};
    size_t found = 0;
    assert_int_equal(rk_client_status(client, 0, &status, NULL), RK_OK);
    for (size_t i = 0; i < status.num_nodes; i++) {
        if (status.nodes[i].role == RK_NODE_WORKER) {
            assert_int_equal(strlen(status.nodes[i].numeric_path), 16);
            paths[found++ % 2] = status.nodes[i].numeric_path;
        } else {
            assert_string_equal(status.nodes[i].numeric_path, "");
        }
    }
    assert_int_equal(found, 2);
    assert_string_not_equal(paths[0], paths[1]);
    rk_cluster_status_clear(&status);
}

/* One worker computes with AVX2, the other with the best that the CPU has: what the first one
 * published is not exact for the second one, which says so and computes; `fast` shares it. */
static void exact_keeps_to_its_own_arithmetic(void **unused)
{
    (void)unused;
    static const char *const avx2[] = {"--isa", "avx2", NULL};
    static const char *const reference[] = {"--isa", "reference", NULL};
    static struct library library;
    struct cluster cluster;
    struct cluster_options options = {.num_workers = 2};
    struct rk_segment_input segments[2];
    struct rows rows[2];
    struct rk_report report = {0};
    struct answer answer;
    uint64_t state = seed + 3;
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avx512f");
    options.args_of_worker[0] = has_avx2 ? avx2 : reference;
    cluster_start(&cluster, &options);
    struct rk_client *clients[2] = {cluster_client(&cluster, 0), cluster_client(&cluster, 1)};
    for (int i = 0; i < LIBRARY; i++) {
        library.count[i] = TOKENS_MAX;
        documents_cut(&state, TOKENS_MAX, library.ids[i]);
    }
    for (int i = 0; i < 2; i++) {
        segments[i] =
            (struct rk_segment_input){.token_ids = library.ids[i], .num_tokens = TOKENS_MAX};
    }
    struct rk_generate_request generate = {
        .segments = segments,
        .num_segments = 2,
        .prompt = {.token_ids = library.ids[5], .num_tokens = 10},
        .level = "exact",
        .max_tokens = GENERATED,
        .raw = true,
        .ignore_eos = true};
    struct rk_score_request score = {
        .segments = segments,
        .num_segments = 2,
        .prompt = generate.prompt,
        .continuation = {.token_ids = library.ids[6], .num_tokens = FORCED}};

    expect_two_paths(clients[0]);
    ask(clients[0], &generate, &answer); /* Publishes the first one's chain. */
    assert_int_equal(answer.status, RK_OK);
    answer_clear(&answer);
    score_rows(clients[1], &score, "full", &rows[0], &report);
    rk_report_clear(&report);
    for (int turn = 0; turn < 2; turn++) {
        score_rows(clients[1], &score, "exact", &rows[1], &report);
        expect_rows_equal(&rows[0], &rows[1], turn == 0 ? "a foreign chain" : "its own chain");
        assert_string_equal(report.segments[0].source, turn == 0 ? "compute" : "chain");
        assert_string_equal(report.segments[0].miss, turn == 0 ? "MISS_NUMERIC_PATH" : "");
        assert_int_equal(report.tokens_reused, turn == 0 ? 0 : 2 * TOKENS_MAX);
        free(rows[1].data);
        rk_report_clear(&report);
        ask(clients[1], &generate, &answer); /* Publishes its own. */
        assert_int_equal(answer.status, RK_OK);
        answer_clear(&answer);
    }
    generate.level = "fast";
    for (int i = 0; i < 2; i++) {
        ask(clients[i], &generate, &answer);
        assert_int_equal(answer.report.tokens_reused, 2 * TOKENS_MAX);
        answer_clear(&answer);
    }
    /* Another order: all that the second one may have is what the first one computed alone. */
    segments[0] = (struct rk_segment_input){.token_ids = library.ids[2], .num_tokens = 50};
    segments[1] = (struct rk_segment_input){.token_ids = library.ids[0], .num_tokens = TOKENS_MAX};
    ask(clients[1], &generate, &answer);
    assert_string_equal(answer.report.segments[1].source, "segment");
    struct rk_drop_query query = {.ids = &answer.report.segments[1].segment_id, .num_ids = 1};
    struct rk_drop_result dropped;
    assert_int_equal(rk_client_drop_query(clients[0], &query, &dropped, NULL), RK_OK);
    assert_int_equal(dropped.dropped, 1);
    assert_int_equal(dropped.chains, 3); /* one of the first one's, two of the second one's */
    answer_clear(&answer);
    free(rows[0].data);
    rk_client_destroy(clients[0]);
    rk_client_destroy(clients[1]);
    cluster_stop(&cluster);
}

/* The golden model, with its flag set that asks for a token in front of each text. */
static void write_model_with_bos(const char *path)
{
    static const char key[] = "tokenizer.ggml.add_bos_token";
    FILE *from = fopen(golden_model_path(), "rb");
    FILE *to = fopen(path, "wb");
    static char block[1 << 22]; /* The key is near the front. */
    size_t bytes = 0;
    bool found = false;
    assert_non_null(from);
    assert_non_null(to);
    while ((bytes = fread(block, 1, sizeof(block), from)) > 0) {
        char *at = memmem(block, bytes, key, sizeof(key) - 1);
        if (at && at + sizeof(key) + 4 <= block + bytes) {
            at[sizeof(key) - 1 + 4] = 1; /* behind the type */
            found = true;
        }
        assert_int_equal(fwrite(block, 1, bytes, to), bytes);
    }
    assert_true(found);
    assert_int_equal(fclose(from), 0);
    assert_int_equal(fclose(to), 0);
}

/* One worker's model asks for a token in front of each text, the other's does not. */
static void a_model_gets_the_beginning_it_asks_for(void **unused)
{
    (void)unused;
    char path[] = "/tmp/redknot-bos-XXXXXX";
    int fd = mkstemp(path);
    const char *const args[] = {"--model", path, NULL};
    struct cluster cluster;
    struct cluster_options options = {.num_workers = 2};
    struct rk_segment_input document = {.text = "A document of some words."};
    int32_t ids[] = {100, 200, 300};
    uint32_t tokens[3][2];
    struct answer answer;
    assert_true(fd >= 0);
    close(fd);
    write_model_with_bos(path);
    options.args_of_worker[1] = args;
    cluster_start(&cluster, &options);
    for (int worker = 0; worker < 2; worker++) {
        struct rk_client *client = cluster_client(&cluster, worker);
        struct rk_generate_request request = {.prompt = {.text = "Hello world"},
                                              .level = "exact",
                                              .max_tokens = 2,
                                              .raw = true,
                                              .ignore_eos = true};
        for (int kind = 0; kind < 3; kind++) { /* text alone, behind a segment, ids */
            request.segments = kind == 1 ? &document : NULL;
            request.num_segments = kind == 1;
            if (kind == 2) {
                request.prompt = (struct rk_segment_input){.token_ids = ids, .num_tokens = 3};
            }
            ask(client, &request, &answer);
            assert_int_equal(answer.status, RK_OK);
            tokens[kind][worker] = answer.report.prompt_tokens;
            assert_int_equal(answer.report.num_segments,
                             kind == 1 ? (size_t)1 + (size_t)worker : 0);
            answer_clear(&answer);
        }
        rk_client_destroy(client);
    }
    assert_int_equal(tokens[0][0], 2);
    assert_int_equal(tokens[0][1], 3);
    assert_int_equal(tokens[1][1], tokens[1][0] + 1);
    assert_int_equal(tokens[2][0], 3);
    assert_int_equal(tokens[2][1], 3);
    cluster_stop(&cluster);
    assert_int_equal(unlink(path), 0);
}

int main(void)
{
    const char *given = getenv("REDKNOT_TEST_SEED");
    seed = given ? strtoull(given, NULL, 10) : 20261123;
    print_message("seed %llu (REDKNOT_TEST_SEED)\n", (unsigned long long)seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exact_equals_full_over_shared_memory),
        cmocka_unit_test(exact_equals_full_in_f32_over_grpc),
        cmocka_unit_test(exact_equals_full_over_ucx),
        cmocka_unit_test(fast_reuses_in_another_order),
        cmocka_unit_test(dropped_segments_are_computed),
        cmocka_unit_test(exact_keeps_to_its_own_arithmetic),
        cmocka_unit_test(a_model_gets_the_beginning_it_asks_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
