#include "client/cli/eval.h"
#include "client/cli/cli_internal.h"
#include "client/cli/eval_internal.h"
#include "client/cli/score.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <errno.h>
#include <math.h>
#include <string.h>
#include <sys/random.h>

#define SALT_BYTES        16
#define CHAIN_TIMEOUT_MS  10000
#define CHAIN_INTERVAL_MS 50
#define EVAL_LABEL        "redknot eval" /* of all that is stored: `redknot drop --label` finds it */

struct eval_arguments {
    struct cli_common common;
    const char *file;
    const char *level;
    const char *dump;
    const char *worker;
};

enum { KEY_DUMP = 256 };

static const struct argp_option eval_options[] = {
    {.name = "level",
     .key = CLI_LETTER_LEVEL,
     .arg = "LEVEL",
     .doc = "What to measure, default exact"},
    {.name = "fidelity", .key = CLI_LETTER_LEVEL, .flags = OPTION_ALIAS},
    {.name = "dump", .key = KEY_DUMP, .arg = "FILE", .doc = "Write both distributions there"},
    {.name = "worker", .key = CLI_LETTER_WORKER, .arg = "ADDR", .doc = "Measure this worker"},
    {.name = "model", .key = CLI_LETTER_MODEL, .arg = "NAME", .doc = CLI_MODEL_DOC},
    {.name = NULL},
};

static error_t parse_eval(int key, char *arg, struct argp_state *state)
{
    struct eval_arguments *arguments = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case CLI_LETTER_LEVEL:
        arguments->level = cli_parse_level(state, arg);
        return 0;
    case KEY_DUMP:
        arguments->dump = arg;
        return 0;
    case CLI_LETTER_WORKER:
        arguments->worker = arg;
        return 0;
    case CLI_LETTER_MODEL:
        arguments->common.model = arg;
        return 0;
    case ARGP_KEY_ARG:
        if (arguments->file) {
            argp_error(state, "more than one file given");
        }
        arguments->file = arg;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "no file given");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp eval_argp = {
    .options = eval_options,
    .parser = parse_eval,
    .args_doc = "FILE.json",
    .doc = "Measure KL(full || level) and top-1 agreement along given continuations."
           "\vThe file holds {\"requests\": [{\"prefix\": T, \"segments\": [T, ...], "
           "\"question\": T, \"continuation\": T}]}; prefix may be missing. Each T is a list of "
           "token ids, or {\"text\": \"...\"}; with \"special\": true special tokens in the text "
           "are meant. Segments are cached under a fresh salt, so nothing stored before helps or "
           "hurts, and dropped at the end; at level exact their chains, too. All is checked before "
           "anything is computed. --dump writes safetensors, <i>.full and <i>.level, float32 "
           "[positions, vocab].",
    .children = cli_common_children};

struct eval {
    const struct eval_arguments *arguments;
    struct eval_file file;
    struct rk_client *client;
    struct safetensors *dump;
    uint8_t salt[SALT_BYTES];      /* of the level's run */
    uint8_t full_salt[SALT_BYTES]; /* of the full run: what it may publish must not help */
    bool stored;                   /* there may be something to drop at the end */
    uint32_t vocab;
    uint32_t context_tokens;
    struct eval_result *results;
};

/* ---- Checks, before anything is computed ---- */

static enum rk_status tokenize(void *context, const char *text, bool parse_special,
                               int32_t **ret_ids, size_t *ret_count, struct rk_error *error)
{
    return rk_client_tokenize(context, text, parse_special, ret_ids, ret_count, error);
}

static enum rk_status check_length(const struct eval *eval, size_t index, struct rk_error *error)
{
    const struct eval_request *request = &eval->file.requests[index];
    size_t total = request->question.count + request->continuation.count;
    for (size_t i = 0; i < request->num_segments; i++) {
        total += request->segments[i].count;
    }
    if (total > eval->context_tokens) {
        return rk_error_set(error, RK_ERR_TOO_LONG,
                            "%s: request %zu: it has %zu tokens, and the worker's context holds %u",
                            eval->file.name, index, total, eval->context_tokens);
    }
    return RK_OK;
}

/* Which levels exist is the worker's to say: it is asked for one token of the smallest request. */
static enum rk_status check_level(const struct eval *eval, struct rk_error *error)
{
    static const int32_t token;
    struct score_rows rows = {.values = NULL};
    struct rk_report report;
    const struct rk_score_request request = {.prompt = {.token_ids = &token, .num_tokens = 1},
                                             .continuation = {.token_ids = &token, .num_tokens = 1},
                                             .level = eval->arguments->level};
    enum rk_status status = score_run(eval->client, &request, &rows, &report, error);
    if (status == RK_OK) {
        rk_report_clear(&report);
    }
    score_rows_clear(&rows);
    return status;
}

static enum rk_status dump_open(struct eval *eval, struct rk_error *error)
{
    size_t count = 2 * eval->file.num_requests;
    struct safetensors_entry *entries = rk_alloc_zero(count, sizeof(*entries));
    if (!entries) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    for (size_t i = 0; i < count; i++) {
        (void)snprintf(entries[i].name, sizeof(entries[i].name), "%zu.%s", i / 2,
                       i % 2 ? "level" : "full");
        entries[i].rows = eval->file.requests[i / 2].continuation.count;
        entries[i].columns = eval->vocab;
    }
    enum rk_status status =
        safetensors_create(eval->arguments->dump, entries, count, &eval->dump, error);
    rk_free(entries);
    return status;
}

static enum rk_status check_all(struct eval *eval, struct rk_error *error)
{
    struct rk_worker_status worker;
    enum rk_status status = rk_client_worker_status(eval->client, &worker, error);
    if (status != RK_OK) {
        return status;
    }
    eval->vocab = worker.vocab_size;
    eval->context_tokens = worker.context_tokens;
    rk_worker_status_clear(&worker);
    status = eval_file_resolve(&eval->file, tokenize, eval->client, eval->vocab, error);
    for (size_t i = 0; i < eval->file.num_requests && status == RK_OK; i++) {
        status = check_length(eval, i, error);
    }
    if (status == RK_OK) {
        status = check_level(eval, error);
    }
    if (status == RK_OK && eval->arguments->dump) {
        status = dump_open(eval, error);
    }
    return status;
}

/* ---- Storing what is to be reused ---- */

/* The token lists of a request as the library takes them; freed by the caller. */
static struct rk_segment_input *segment_inputs(const struct eval_request *request)
{
    struct rk_segment_input *segments = rk_alloc_zero(request->num_segments + 1, sizeof(*segments));
    for (size_t i = 0; segments && i < request->num_segments; i++) {
        segments[i].token_ids = request->segments[i].ids;
        segments[i].num_tokens = request->segments[i].count;
        segments[i].label = EVAL_LABEL;
    }
    return segments;
}

static void put_progress(void *context, uint32_t done, uint32_t total)
{
    cli_progress(context, done, total);
}

/* Each distinct segment alone; the prefix is the segment at position 0, where alone is in place. */
static enum rk_status put_all(struct eval *eval, struct rk_error *error)
{
    eval->stored = true;
    for (size_t i = 0; i < eval->file.num_requests; i++) {
        const struct eval_request *request = &eval->file.requests[i];
        char what[64];
        (void)snprintf(what, sizeof(what), "storing segments %zu/%zu", i + 1,
                       eval->file.num_requests);
        for (size_t j = 0; j < request->num_segments; j++) {
            struct rk_segment_input segment = {.token_ids = request->segments[j].ids,
                                               .num_tokens = request->segments[j].count,
                                               .label = EVAL_LABEL};
            struct rk_put_result result;
            cli_progress(what, 0, 1);
            enum rk_status status = rk_client_put_segment(
                eval->client, &segment, eval->salt, SALT_BYTES, put_progress, what, &result, error);
            if (status != RK_OK) {
                rk_error_prefix(error, "request %zu: storing segment %zu", i, j);
                return status;
            }
        }
    }
    cli_progress_end();
    return RK_OK;
}

static bool any_token(void *context, const int32_t *token_ids, size_t num_tokens, const char *text,
                      size_t text_bytes)
{
    (void)context;
    (void)token_ids;
    (void)num_tokens;
    (void)text;
    (void)text_bytes;
    return !cli_interrupted();
}

static bool all_chain(const struct rk_report *report)
{
    bool chain = true;
    for (size_t i = 0; i < report->num_segments; i++) {
        chain = chain && strcmp(report->segments[i].source, "chain") == 0;
    }
    return chain;
}

/* Score stores nothing, so the chain that `exact` is to reuse is stored by an answer of one token
 * over the same segments. It may end before all is stored: so it is asked again until it reuses the
 * chain, or does not after some time, which the table then shows. */
static enum rk_status publish_chain(struct eval *eval, size_t index, struct rk_error *error)
{
    const struct eval_request *from = &eval->file.requests[index];
    struct rk_segment_input *segments = segment_inputs(from);
    if (!segments) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    const struct rk_generate_request request = {
        .segments = segments,
        .num_segments = from->num_segments,
        .prompt = {.token_ids = from->question.ids, .num_tokens = 1},
        .level = "exact",
        .max_tokens = 1,
        .raw = true,
        .ignore_eos = true,
        .salt = eval->salt,
        .salt_bytes = SALT_BYTES};
    int64_t deadline_ns = rk_deadline_in_ms(CHAIN_TIMEOUT_MS);
    enum rk_status status = RK_OK;
    bool stored = false;
    while (status == RK_OK && !stored) {
        struct rk_report report = {.owner = NULL};
        status = rk_client_generate(eval->client, &request, any_token, NULL, &report, error);
        stored = status == RK_OK && (all_chain(&report) || report.segments_not_stored > 0 ||
                                     rk_deadline_left_ms(deadline_ns) == 0);
        if (status == RK_OK && !stored && report.segments_stored == 0) {
            rk_clock_sleep_ms(CHAIN_INTERVAL_MS); /* It is being stored. */
        }
        rk_report_clear(&report);
    }
    rk_free(segments);
    if (status != RK_OK) {
        rk_error_prefix(error, "request %zu: storing its chain", index);
    }
    return status;
}

static enum rk_status publish_chains(struct eval *eval, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    if (strcmp(eval->arguments->level, "exact") != 0) {
        return RK_OK; /* Elsewhere a chain would make what is measured better than it is. */
    }
    for (size_t i = 0; i < eval->file.num_requests && status == RK_OK; i++) {
        cli_progress("storing chains", i, eval->file.num_requests);
        if (eval->file.requests[i].num_segments > 1) { /* A chain of one is stored already. */
            status = publish_chain(eval, i, error);
        }
    }
    cli_progress_end();
    return status;
}

/* ---- Scoring ---- */

static void row_progress(void *context, uint32_t rows_done, size_t rows_total)
{
    cli_progress(context, rows_done, rows_total);
}

static enum rk_status score(struct eval *eval, size_t index, const char *level,
                            const uint8_t salt[SALT_BYTES], struct score_rows *rows,
                            struct rk_report *ret_report, struct rk_error *error)
{
    const struct eval_request *from = &eval->file.requests[index];
    struct rk_segment_input *segments = segment_inputs(from);
    char what[64];
    if (!segments) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    (void)snprintf(what, sizeof(what), "request %zu/%zu at %s", index + 1, eval->file.num_requests,
                   level);
    const struct rk_score_request request = {
        .segments = segments,
        .num_segments = from->num_segments,
        .prompt = {.token_ids = from->question.ids, .num_tokens = from->question.count},
        .continuation = {.token_ids = from->continuation.ids,
                         .num_tokens = from->continuation.count},
        .level = level,
        .salt = salt,
        .salt_bytes = SALT_BYTES};
    rows->progress = row_progress;
    rows->context = what;
    cli_progress(what, 0, from->continuation.count);
    enum rk_status status = score_run(eval->client, &request, rows, ret_report, error);
    cli_progress_end();
    rk_free(segments);
    if (status != RK_OK) {
        rk_error_prefix(error, "request %zu at %s", index, level);
    }
    return status;
}

static enum rk_status dump(struct eval *eval, const struct score_rows *full,
                           const struct score_rows *level, struct rk_error *error)
{
    if (!eval->dump) {
        return RK_OK;
    }
    enum rk_status status =
        safetensors_write(eval->dump, full->values, full->positions * full->vocab, error);
    if (status == RK_OK) {
        status =
            safetensors_write(eval->dump, level->values, level->positions * level->vocab, error);
    }
    return status;
}

static enum rk_status run_request(struct eval *eval, size_t index, struct rk_error *error)
{
    struct score_rows full = {.values = NULL};
    struct score_rows level = {.values = NULL};
    struct eval_result *result = &eval->results[index];
    enum rk_status status =
        score(eval, index, "full", eval->full_salt, &full, &result->full, error);
    if (status == RK_OK) {
        status =
            score(eval, index, eval->arguments->level, eval->salt, &level, &result->level, error);
    }
    if (status == RK_OK) {
        result->positions = full.positions;
        status = score_compare(&full, &level, &result->distance, error);
        if (status == RK_OK && full.vocab != eval->vocab) {
            status = rk_error_set(error, RK_ERR_INTERNAL, "the vocabulary's size changed");
        }
        if (status != RK_OK) {
            rk_error_prefix(error, "request %zu", index);
        }
    }
    if (status == RK_OK) {
        status = dump(eval, &full, &level, error);
    }
    score_rows_clear(&full);
    score_rows_clear(&level);
    return status;
}

static enum rk_status eval_prepare(struct eval *eval, struct rk_error *error)
{
    if (getrandom(eval->salt, SALT_BYTES, 0) != SALT_BYTES ||
        getrandom(eval->full_salt, SALT_BYTES, 0) != SALT_BYTES) {
        return rk_error_set(error, RK_ERR_IO, "no random numbers: %s", strerror(errno));
    }
    eval->results = rk_alloc_zero(eval->file.num_requests, sizeof(*eval->results));
    if (!eval->results) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    return RK_OK;
}

static enum rk_status eval_run(struct eval *eval, struct rk_error *error)
{
    enum rk_status status = eval_prepare(eval, error);
    if (status == RK_OK) {
        /* One worker for everything: fidelity is a property of one machine's arithmetic. */
        status = cli_client_open_one(&eval->arguments->common, eval->arguments->worker,
                                     &eval->client, error);
    }
    if (status == RK_OK) {
        status = check_all(eval, error);
    }
    if (status == RK_OK) {
        status = put_all(eval, error);
    }
    if (status == RK_OK) {
        status = publish_chains(eval, error);
    }
    for (size_t i = 0; i < eval->file.num_requests && status == RK_OK; i++) {
        status = run_request(eval, i, error);
    }
    if (status == RK_OK && eval->dump) {
        status = safetensors_finish(eval->dump, error);
    }
    return status;
}

/* All that was stored under the two salts, chains too. CLI_FAIL when something may be left: with
 * what removes it. */
static int eval_drop(struct eval *eval)
{
    struct rk_error error = {.status = RK_OK};
    const uint8_t *salts[] = {eval->salt, eval->full_salt};
    struct rk_client *client = NULL; /* One that no interrupt has cancelled. */
    enum rk_status status = RK_OK;
    if (!eval->stored) {
        return CLI_OK;
    }
    const struct rk_client_options options = {.coordinator = eval->arguments->common.coordinator};
    status = rk_client_create(&options, &client, &error);
    for (size_t i = 0; i < 2 && status == RK_OK; i++) {
        struct rk_drop_query query = {.salt = salts[i], .salt_bytes = SALT_BYTES};
        struct rk_drop_result result;
        status = rk_client_drop_query(client, &query, &result, &error);
    }
    rk_client_destroy(client);
    if (status == RK_OK) {
        return CLI_OK;
    }
    return cli_fail("eval: dropping its segments: %s; they remain stored: `redknot drop --label "
                    "\"" EVAL_LABEL "\"` drops them",
                    error.text);
}

static void eval_clear(struct eval *eval)
{
    cli_client_close(eval->client);
    safetensors_destroy(eval->dump);
    for (size_t i = 0; eval->results && i < eval->file.num_requests; i++) {
        rk_report_clear(&eval->results[i].full);
        rk_report_clear(&eval->results[i].level);
    }
    rk_free(eval->results);
    eval_file_clear(&eval->file);
}

int cli_eval(int argc, char **argv)
{
    struct eval_arguments arguments = {.level = "exact"};
    (void)argp_parse(&eval_argp, argc, argv, 0, NULL, &arguments);
    struct rk_error error = {.status = RK_OK};
    struct eval eval = {.arguments = &arguments};
    int code = CLI_OK;
    enum rk_status status = eval_file_load(arguments.file, &eval.file, &error);
    if (status == RK_OK) {
        status = eval_run(&eval, &error);
    }
    if (status != RK_OK) {
        code = cli_fail_error("eval", &error);
    } else if (arguments.common.json) {
        cli_print_json(eval_results_json(eval.results, eval.file.num_requests, arguments.level));
    } else {
        eval_results_print(eval.results, eval.file.num_requests, arguments.level);
    }
    if (eval_drop(&eval) != CLI_OK) {
        code = CLI_FAIL;
    }
    eval_clear(&eval);
    return code;
}
