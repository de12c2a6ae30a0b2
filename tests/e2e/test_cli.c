/*
 * Goal:   the command tells the truth about a cluster: `eval` measures what it says and leaves
 *         nothing behind, `generate` says what its answer is worth, and JSON is whole whatever
 * bytes it is about. Method: the real program against real processes; its output, exit code and
 * what is stored afterwards.
 */
#include "tests/e2e/cluster.h"

#include "common/base/clock.h"

#include <jansson.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define OUTPUT_BYTES (1 << 20)
#define LONG_WORDS   450 /* some 20 MiB of KV in f32 */

static struct cluster cluster;
static char output[OUTPUT_BYTES]; /* standard output of the last run */
static char errors[OUTPUT_BYTES]; /* its standard error */

static void read_file(const char *name, char text[OUTPUT_BYTES])
{
    char path[256];
    (void)snprintf(path, sizeof(path), "%s/%s", cluster.folder, name);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    size_t bytes = fread(text, 1, OUTPUT_BYTES - 1, file);
    text[bytes] = '\0';
    (void)fclose(file);
}

static void write_file(const char *name, const char *text)
{
    char path[256];
    (void)snprintf(path, sizeof(path), "%s/%s", cluster.folder, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

/* $D is the cluster's folder. */
static int run(const char *arguments)
{
    char line[4096];
    (void)snprintf(line, sizeof(line),
                   "D=%s; export REDKNOT_COORDINATOR=%s; timeout 120 " REDKNOT_BINARY_DIR
                   "/bin/redknot >$D/out 2>$D/err </dev/null %s",
                   cluster.folder, cluster.coordinator_address, arguments);
    int status = system(line);
    assert_true(WIFEXITED(status));
    read_file("out", output);
    read_file("err", errors);
    return WEXITSTATUS(status);
}

static void expect(const char *arguments, int code)
{
    int got = run(arguments);
    if (got != code) {
        fail_msg("redknot %s: exit %d, wanted %d: %s%s", arguments, got, code, output, errors);
    }
}

/* Of the last run; to be freed. */
static json_t *output_json(void)
{
    json_error_t why;
    json_t *object = json_loads(output, 0, &why);
    if (!object) {
        fail_msg("%s: %s", why.text, output);
    }
    return object;
}

static size_t num_stored(void)
{
    expect("status --json", 0);
    json_t *status = output_json();
    size_t stored = (size_t)(json_integer_value(json_object_get(status, "num_segments")) -
                             json_integer_value(json_object_get(status, "num_gone")));
    json_decref(status);
    return stored;
}

static const json_t *path_of(const json_t *from, const char *first, size_t index,
                             const char *second)
{
    return json_object_get(json_array_get(json_object_get(from, first), index), second);
}

static int start(void **state)
{
    (void)state;
    struct cluster_options options = {.num_workers = 1};
    cluster_start(&cluster, &options);
    write_file("tea.txt", "The tea house of Brell stands beside the canal and opens at six.\n");
    write_file("bridge.txt", "The bridge over the Tam was drawn by Pavel Orlik of Halden.\n");
    write_file("requests.json",
               "{\"requests\": [{\"segments\": [{\"text\": \"The lamp was lit in October.\"},"
               " {\"text\": \"The bridge was opened in June.\"}, [5, 6, 7, 8]],"
               " \"question\": {\"text\": \"When was the lamp lit?\"},"
               " \"continuation\": {\"text\": \" It was lit in October.\"}}]}");
    write_file("outside.json", "{\"requests\": [{\"segments\": [[5, 6, 7]], \"question\": [8],"
                               " \"continuation\": [9, 1000000]}]}");
    return 0;
}

static int stop(void **state)
{
    (void)state;
    cluster_stop(&cluster);
    return 0;
}

/* `exact` that reuses no chain would have KL 0 without saying anything. */
static void eval_of_exact_reuses_chains(void **state)
{
    (void)state;
    expect("eval $D/requests.json --level exact --json", 0);
    json_t *result = output_json();
    const json_t *segments = json_object_get(path_of(result, "requests", 0, "report"), "segments");
    assert_int_equal(json_array_size(segments), 3);
    for (size_t i = 0; i < 3; i++) {
        const char *source =
            json_string_value(json_object_get(json_array_get(segments, i), "source"));
        assert_string_equal(source, "chain");
    }
    assert_true(json_real_value(path_of(result, "requests", 0, "kl")) == 0);
    json_decref(result);
    assert_int_equal(num_stored(), 0);
    expect("eval $D/requests.json --level exact", 0);
    assert_non_null(strstr(output, "3 chain"));
}

static void eval_of_fast_reuses_segments(void **state)
{
    (void)state;
    expect("eval $D/requests.json --level fast --json", 0);
    json_t *result = output_json();
    const json_t *segments = json_object_get(path_of(result, "requests", 0, "report"), "segments");
    assert_string_equal(json_string_value(json_object_get(json_array_get(segments, 1), "source")),
                        "segment");
    assert_true(json_real_value(path_of(result, "requests", 0, "kl")) > 0);
    json_decref(result);
    assert_int_equal(num_stored(), 0);
}

static void eval_checks_before_it_computes(void **state)
{
    (void)state;
    static const struct {
        const char *arguments;
        const char *contains;
    } cases[] = {
        {"eval $D/requests.json --level balanced", "balanced"},
        {"eval $D/outside.json", "token 1 is 1000000, outside the vocabulary"},
        {"eval $D/requests.json --dump /dev/null", "no regular file"},
        {"eval $D/requests.json --dump /nonexistent/x", "on this machine: No such file"},
    };
    double puts = cluster_metric(cluster.worker_metrics[0],
                                 "redknot_worker_requests_total{call=\"PutSegment\"}");
    assert_true(puts > 0); /* Of the tests before: the name is right. */
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        expect(cases[i].arguments, 1);
        if (!strstr(errors, cases[i].contains) || strstr(errors, "node's log")) {
            fail_msg("redknot %s: %s", cases[i].arguments, errors);
        }
    }
    assert_true(cluster_metric(cluster.worker_metrics[0],
                               "redknot_worker_requests_total{call=\"PutSegment\"}") == puts);
    expect("eval $D/requests.json --level balanced --json", 1);
    json_t *error = output_json();
    assert_string_equal(
        json_string_value(json_object_get(json_object_get(error, "error"), "status")), "INVALID");
    json_decref(error);
}

/* The coordinator stops while it runs: what is stored cannot be dropped. */
static void eval_says_what_it_leaves(void **state)
{
    (void)state;
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        _exit(run("eval $D/requests.json --level exact") == 1 ? 0 : 1);
    }
    int64_t deadline_ns = rk_deadline_in_ms(20000);
    while (cluster_metric(cluster.store_metrics, "redknot_kvstore_used_bytes") == 0) {
        assert_true(rk_deadline_left_ms(deadline_ns) > 0);
    }
    assert_int_equal(kill(cluster.coordinator.pid, SIGSTOP), 0);
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(kill(cluster.coordinator.pid, SIGCONT), 0);
    read_file("err", errors);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || !strstr(errors, "remain stored")) {
        fail_msg("eval did not fail, or did not say what remains: %s", errors);
    }
    cluster_wait(&cluster, 1, 1);
    expect("drop --label 'redknot eval'", 0); /* As the message says. */
    assert_int_equal(num_stored(), 0);
}

static void generate_says_what_its_answer_is_worth(void **state)
{
    (void)state;
    expect("put $D/tea.txt $D/bridge.txt", 0);
    expect("generate -p 'Who drew the bridge?' -n 8 --level fast -s $D/tea.txt -s $D/bridge.txt "
           "--compare full",
           0);
    assert_non_null(strstr(output, "[fast]\n"));
    assert_non_null(strstr(output, "[full]\n"));
    assert_non_null(strstr(errors, "approximate: 2 of 3 segments"));
    assert_non_null(strstr(errors, "approximate from segments alone"));
    assert_non_null(strstr(errors, "KL(full || fast)"));

    expect("generate -p 'Who drew the bridge?' -n 8 --level exact -s $D/tea.txt -s $D/bridge.txt "
           "--compare full --json",
           0);
    json_t *result = output_json();
    const json_t *other = json_object_get(result, "compare");
    assert_true(json_real_value(json_object_get(other, "kl")) == 0);
    assert_true(json_real_value(json_object_get(other, "top1")) == 1);
    assert_true(json_is_null(json_object_get(other, "first_difference")));
    assert_true(json_integer_value(json_object_get(other, "positions")) > 0);
    assert_true(json_is_false(json_object_get(json_object_get(result, "report"), "approximate")));
    json_decref(result);
    expect("drop --all", 0);

    expect("generate -p 'Who is it?' -n 2 > /dev/full", 1);
    assert_non_null(strstr(errors, "generate: standard output: No space left on device"));
}

static void tokens_are_those_of_the_model(void **state)
{
    (void)state;
    expect("tokenize 'Hello world'", 0);
    assert_string_equal(output, "19556 905\n");
    expect("tokenize $D/tea.txt --json", 0);
    json_t *result = output_json();
    assert_true(json_integer_value(json_object_get(result, "num_tokens")) > 10);
    json_decref(result);
    expect("tokenize '<|im_end|>' --special", 0);
    assert_string_equal(output, "2\n");
}

#define ODD_KEY "$(printf 'k\\377\\033[31m')"

static void json_leaves_no_row_out(void **state)
{
    (void)state;
    expect("value put " ODD_KEY " $D/tea.txt --json", 0);
    json_t *result = output_json();
    assert_string_equal(json_string_value(json_object_get(result, "key_hex")), "6bff1b5b33316d");
    json_decref(result);
    expect("value exists --json " ODD_KEY " other", 1);
    result = output_json();
    assert_int_equal(json_array_size(json_object_get(result, "keys")), 2);
    assert_true(json_is_true(path_of(result, "keys", 0, "present")));
    assert_true(json_is_false(path_of(result, "keys", 1, "present")));
    json_decref(result);
    expect("value exists " ODD_KEY, 0);
    assert_string_equal(output, "k\\xff\\x1b[31m  present\n");
    expect("value get " ODD_KEY " $D/got --json", 0);
    result = output_json();
    assert_int_equal(json_integer_value(json_object_get(result, "bytes")), 65);
    json_decref(result);
    expect("value get " ODD_KEY " /dev/full", 1);
    assert_non_null(strstr(errors, "No space left on device"));
    expect("value get absent $D/absent --json", 1);
    result = output_json();
    assert_string_equal(
        json_string_value(json_object_get(json_object_get(result, "error"), "status")),
        "MISS_ABSENT");
    json_decref(result);
    expect("put --json $D/tea.txt $D/absent", 1);
    result = output_json();
    assert_int_equal(json_array_size(json_object_get(result, "segments")), 2);
    assert_non_null(path_of(result, "segments", 0, "segment_id"));
    assert_non_null(path_of(result, "segments", 1, "error"));
    json_decref(result);
}

/* Each question of the demo has the truth, from its document, beside it. */
static void the_demo_answers_what_the_documents_say(void **state)
{
    (void)state;
    json_t *questions = json_load_file(REDKNOT_SOURCE_DIR "/examples/questions.json", 0, NULL);
    assert_non_null(questions);
    expect("demo --json --examples " REDKNOT_SOURCE_DIR "/examples", 0);
    json_t *result = output_json();
    size_t count = json_array_size(json_object_get(questions, "questions"));
    assert_true(count > 0);
    for (size_t i = 0; i < count; i++) {
        const char *truth = json_string_value(path_of(questions, "questions", i, "truth"));
        const char *answer = json_string_value(path_of(result, "questions", i, "answer"));
        assert_non_null(truth);
        if (!strstr(answer, truth)) {
            fail_msg("question %zu: \"%s\" lacks \"%s\"", i + 1, answer, truth);
        }
        const char *level = json_string_value(path_of(result, "questions", i, "level"));
        assert_true(strcmp(level, "exact") != 0 ||
                    json_is_true(path_of(result, "questions", i, "same_as_full")));
    }
    json_decref(result);
    json_decref(questions);
}

/* The last test: from here on the stores are small. */
static void a_store_too_small_is_told(void **state)
{
    (void)state;
    static char text[LONG_WORDS * 6 + 1];
    struct cluster_options options = {.num_workers = 1, .dram = "16MiB", .mode = "f32"};
    for (size_t i = 0; i < LONG_WORDS; i++) {
        memcpy(text + i * 6, "seven ", 6);
    }
    cluster_stop(&cluster);
    cluster_start(&cluster, &options);
    write_file("long.txt", text);
    expect("put $D/long.txt", 1);
    assert_non_null(strstr(errors, "--dram 2"));
    expect("generate -p 'What is it?' -n 1 --level exact -s $D/long.txt", 0);
    assert_non_null(strstr(errors, "not stored: 1 of the 2 segments that were computed: "));
    assert_non_null(strstr(errors, "--dram 2"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(eval_of_exact_reuses_chains),
        cmocka_unit_test(eval_of_fast_reuses_segments),
        cmocka_unit_test(eval_checks_before_it_computes),
        cmocka_unit_test(eval_says_what_it_leaves),
        cmocka_unit_test(generate_says_what_its_answer_is_worth),
        cmocka_unit_test(tokens_are_those_of_the_model),
        cmocka_unit_test(json_leaves_no_row_out),
        cmocka_unit_test(the_demo_answers_what_the_documents_say),
        cmocka_unit_test(a_store_too_small_is_told),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
