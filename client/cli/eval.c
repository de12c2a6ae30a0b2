#include "client/cli/eval.h"
#include "client/cli/cli_internal.h"
#include "common/base/alloc.h"

#include <errno.h>
#include <math.h>
#include <string.h>
#include <sys/random.h>

#define SALT_BYTES 16

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
           "\vThe file holds {\"requests\": [{\"prefix\": [ids], \"segments\": [[ids], ...], "
           "\"question\": [ids], \"continuation\": [ids]}]}; prefix may be missing. Segments are "
           "cached under a fresh salt, so nothing stored before helps or hurts, and dropped at the "
           "end. --dump writes safetensors, <i>.full and <i>.level, float32 [positions, vocab].",
    .children = cli_common_children};

/* Log-probabilities [positions][vocab] of one run. */
struct rows {
    float *values;
    size_t positions;
    size_t vocab;
    uint32_t next;
    bool bad;
};

struct eval_result {
    double kl;
    double top1;
    struct rk_report full; /* numbers only; strings are cleared with the report */
    struct rk_report level;
};

struct eval {
    const struct eval_arguments *arguments;
    struct eval_file file;
    struct rk_client *client;
    struct safetensors *dump;
    struct rk_id *stored; /* to drop at the end */
    size_t num_stored;
    size_t stored_max;
    uint8_t salt[SALT_BYTES];      /* of the level's run */
    uint8_t full_salt[SALT_BYTES]; /* of the full run: what it may publish must not help */
    size_t vocab;
    struct eval_result *results;
};

static bool on_row(void *context, uint32_t row, const float *logprobs, size_t vocab)
{
    struct rows *rows = context;
    if (!rows->values) {
        rows->vocab = vocab;
        rows->values = rk_alloc_zero(rows->positions * vocab, sizeof(float));
    }
    if (!rows->values || vocab != rows->vocab || row != rows->next || row >= rows->positions) {
        rows->bad = true;
        return false;
    }
    memcpy(rows->values + (size_t)row * vocab, logprobs, vocab * sizeof(float));
    rows->next++;
    return true;
}

static void remember(struct eval *eval, const struct rk_id *id)
{
    for (size_t i = 0; i < eval->num_stored; i++) {
        if (rk_id_equal(&eval->stored[i], id)) {
            return;
        }
    }
    if (eval->num_stored < eval->stored_max) {
        eval->stored[eval->num_stored++] = *id;
    }
}

/* Each distinct segment alone; the prefix is the segment at position 0, where alone is in place. */
static enum rk_status put_all(struct eval *eval, struct rk_error *error)
{
    for (size_t i = 0; i < eval->file.num_requests; i++) {
        const struct eval_request *request = &eval->file.requests[i];
        for (size_t j = 0; j < request->num_segments; j++) {
            struct rk_segment_input segment = {.token_ids = request->segments[j].ids,
                                               .num_tokens = request->segments[j].count,
                                               .label = "redknot eval"};
            struct rk_put_result result;
            enum rk_status status = rk_client_put_segment(eval->client, &segment, eval->salt,
                                                          SALT_BYTES, NULL, NULL, &result, error);
            if (status != RK_OK) {
                rk_error_prefix(error, "request %zu: storing segment %zu", i, j);
                return status;
            }
            remember(eval, &result.segment_id);
        }
        cli_progress("storing segments", i + 1, eval->file.num_requests);
    }
    return RK_OK;
}

static enum rk_status score(struct eval *eval, size_t index, const char *level,
                            const uint8_t salt[SALT_BYTES], struct rows *rows,
                            struct rk_report *ret_report, struct rk_error *error)
{
    const struct eval_request *from = &eval->file.requests[index];
    struct rk_segment_input *segments = rk_alloc_zero(from->num_segments + 1, sizeof(*segments));
    if (!segments) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    for (size_t i = 0; i < from->num_segments; i++) {
        segments[i].token_ids = from->segments[i].ids;
        segments[i].num_tokens = from->segments[i].count;
    }
    struct rk_score_request request = {
        .segments = segments,
        .num_segments = from->num_segments,
        .prompt = {.token_ids = from->question.ids, .num_tokens = from->question.count},
        .continuation = {.token_ids = from->continuation.ids,
                         .num_tokens = from->continuation.count},
        .level = level,
        .salt = salt,
        .salt_bytes = SALT_BYTES};
    rows->positions = from->continuation.count;
    rows->next = 0;
    enum rk_status status =
        rk_client_score(eval->client, &request, on_row, rows, ret_report, error);
    rk_free(segments);
    if (rows->bad || (status == RK_OK && rows->next != rows->positions)) {
        if (status == RK_OK) {
            rk_report_clear(ret_report);
        }
        status = rk_error_set(error, RK_ERR_INTERNAL,
                              "got %u rows, not the %zu of the continuation, or of another size",
                              rows->next, rows->positions);
    }
    if (status != RK_OK) {
        rk_error_prefix(error, "request %zu at %s", index, level);
        return status;
    }
    for (size_t i = 0; i < ret_report->num_segments; i++) {
        if (!rk_id_is_zero(&ret_report->segments[i].segment_id)) {
            remember(eval, &ret_report->segments[i].segment_id);
        }
    }
    return RK_OK;
}

/* The header needs the vocabulary's size, which the first row tells. */
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

static enum rk_status dump(struct eval *eval, const struct rows *full, const struct rows *level,
                           struct rk_error *error)
{
    if (!eval->arguments->dump) {
        return RK_OK;
    }
    enum rk_status status = eval->dump ? RK_OK : dump_open(eval, error);
    if (status == RK_OK) {
        status = safetensors_write(eval->dump, full->values, full->positions * full->vocab, error);
    }
    if (status == RK_OK) {
        status =
            safetensors_write(eval->dump, level->values, level->positions * level->vocab, error);
    }
    return status;
}

static enum rk_status compare(struct eval *eval, size_t index, const struct rows *full,
                              const struct rows *level, struct rk_error *error)
{
    struct eval_result *result = &eval->results[index];
    if (full->vocab != level->vocab || (eval->vocab && full->vocab != eval->vocab)) {
        return rk_error_set(error, RK_ERR_INTERNAL, "request %zu: the vocabulary's size changed",
                            index);
    }
    eval->vocab = full->vocab;
    for (size_t i = 0; i < full->positions; i++) {
        const float *p = full->values + i * full->vocab;
        const float *q = level->values + i * full->vocab;
        double kl = eval_kl(p, q, full->vocab);
        if (isnan(kl)) {
            return rk_error_set(error, RK_ERR_INTERNAL,
                                "request %zu, position %zu: log-probabilities that are no numbers",
                                index, i);
        }
        result->kl += kl;
        result->top1 += eval_top1(p, full->vocab) == eval_top1(q, full->vocab);
    }
    result->kl /= (double)full->positions;
    result->top1 /= (double)full->positions;
    return dump(eval, full, level, error);
}

static enum rk_status run_request(struct eval *eval, size_t index, struct rk_error *error)
{
    struct rows full = {.values = NULL};
    struct rows level = {.values = NULL};
    struct eval_result *result = &eval->results[index];
    enum rk_status status =
        score(eval, index, "full", eval->full_salt, &full, &result->full, error);
    if (status == RK_OK) {
        status =
            score(eval, index, eval->arguments->level, eval->salt, &level, &result->level, error);
    }
    if (status == RK_OK) {
        status = compare(eval, index, &full, &level, error);
    }
    rk_free(full.values);
    rk_free(level.values);
    return status;
}

/* Sums over requests; kl and top1 are means over all positions of all requests. */
struct summary {
    double kl;
    double top1;
    double flops;
    double flops_full;
    double tokens_computed;
    double bytes_fetched;
    double ttft_full_s;
    double ttft_level_s;
};

static struct summary summarize(const struct eval *eval)
{
    struct summary summary = {.kl = 0};
    double positions = 0;
    for (size_t i = 0; i < eval->file.num_requests; i++) {
        const struct eval_result *result = &eval->results[i];
        double count = (double)eval->file.requests[i].continuation.count;
        positions += count;
        summary.kl += result->kl * count;
        summary.top1 += result->top1 * count;
        summary.flops += result->level.flops;
        summary.flops_full += result->level.flops_full;
        summary.tokens_computed += result->level.tokens_computed;
        summary.bytes_fetched += (double)result->level.bytes_fetched;
        summary.ttft_full_s += result->full.ttft_s;
        summary.ttft_level_s += result->level.ttft_s;
    }
    summary.kl /= positions;
    summary.top1 /= positions;
    summary.ttft_full_s /= (double)eval->file.num_requests; /* Of one request. */
    summary.ttft_level_s /= (double)eval->file.num_requests;
    return summary;
}

static double share(double flops, double flops_full)
{
    return flops_full > 0 ? flops / flops_full : 0;
}

/* JSON has no infinity: such a KL is null. */
static json_t *number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *eval_json(const struct eval *eval)
{
    json_t *rows = json_array();
    for (size_t i = 0; i < eval->file.num_requests; i++) {
        const struct eval_result *result = &eval->results[i];
        (void)json_array_append_new(
            rows, json_pack("{s:o, s:f, s:I, s:f, s:I, s:I, s:f, s:f, s:o}", "kl",
                            number(result->kl), "top1", result->top1, "positions",
                            (json_int_t)eval->file.requests[i].continuation.count, "flops_share",
                            share(result->level.flops, result->level.flops_full), "tokens_computed",
                            (json_int_t)result->level.tokens_computed, "bytes_fetched",
                            (json_int_t)result->level.bytes_fetched, "ttft_full_s",
                            result->full.ttft_s, "ttft_level_s", result->level.ttft_s, "report",
                            cli_report_json(&result->level)));
    }
    struct summary summary = summarize(eval);
    json_t *total = json_pack("{s:s, s:o, s:f, s:f, s:I, s:I, s:f, s:f}", "level",
                              eval->arguments->level, "kl", number(summary.kl), "top1",
                              summary.top1, "flops_share", share(summary.flops, summary.flops_full),
                              "tokens_computed", (json_int_t)summary.tokens_computed,
                              "bytes_fetched", (json_int_t)summary.bytes_fetched, "ttft_full_s",
                              summary.ttft_full_s, "ttft_level_s", summary.ttft_level_s);
    return json_pack("{s:o, s:o}", "requests", rows, "summary", total);
}

static void eval_print(const struct eval *eval)
{
    char bytes[32];
    char full[32];
    char level[32];
    (void)printf("%-8s %12s %7s %12s %9s %11s %11s %11s\n", "REQUEST", "KL (nats)", "TOP-1",
                 "FLOPS SHARE", "COMPUTED", "FETCHED", "TTFT FULL", "TTFT LEVEL");
    for (size_t i = 0; i < eval->file.num_requests; i++) {
        const struct eval_result *result = &eval->results[i];
        (void)printf("%-8zu %12.6g %7.4f %12.4f %9u %11s %11s %11s\n", i, result->kl, result->top1,
                     share(result->level.flops, result->level.flops_full),
                     result->level.tokens_computed, cli_bytes(result->level.bytes_fetched, bytes),
                     cli_seconds(result->full.ttft_s, full),
                     cli_seconds(result->level.ttft_s, level));
    }
    struct summary summary = summarize(eval);
    (void)printf("%-8s %12.6g %7.4f %12.4f %9.0f %11s %11s %11s\n", eval->arguments->level,
                 summary.kl, summary.top1, share(summary.flops, summary.flops_full),
                 summary.tokens_computed, cli_bytes((uint64_t)summary.bytes_fetched, bytes),
                 cli_seconds(summary.ttft_full_s, full), cli_seconds(summary.ttft_level_s, level));
}

static enum rk_status eval_prepare(struct eval *eval, struct rk_error *error)
{
    if (getrandom(eval->salt, SALT_BYTES, 0) != SALT_BYTES ||
        getrandom(eval->full_salt, SALT_BYTES, 0) != SALT_BYTES) {
        return rk_error_set(error, RK_ERR_IO, "no random numbers: %s", strerror(errno));
    }
    for (size_t i = 0; i < eval->file.num_requests; i++) {
        eval->stored_max += 2 * eval->file.requests[i].num_segments + 4;
    }
    eval->stored = rk_alloc_zero(eval->stored_max, sizeof(*eval->stored));
    eval->results = rk_alloc_zero(eval->file.num_requests, sizeof(*eval->results));
    if (!eval->stored || !eval->results) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    return RK_OK;
}

/* One worker for everything: fidelity is a property of one machine's arithmetic. */
static enum rk_status eval_connect(struct eval *eval, struct rk_error *error)
{
    char *worker = NULL;
    struct rk_client *client = NULL;
    enum rk_status status =
        cli_client_open(&eval->arguments->common, eval->arguments->worker, &client, error);
    if (status == RK_OK) {
        status = rk_client_pick_worker(client, &worker, error);
    }
    cli_client_close(client);
    if (status == RK_OK) {
        status = cli_client_open(&eval->arguments->common, worker, &eval->client, error);
    }
    rk_client_string_free(worker);
    return status;
}

static enum rk_status eval_run(struct eval *eval, struct rk_error *error)
{
    enum rk_status status = eval_prepare(eval, error);
    if (status == RK_OK) {
        status = eval_connect(eval, error);
    }
    if (status == RK_OK) {
        status = put_all(eval, error);
    }
    for (size_t i = 0; i < eval->file.num_requests && status == RK_OK; i++) {
        cli_progress("scoring", i, eval->file.num_requests);
        status = run_request(eval, i, error);
    }
    cli_progress_end();
    if (status == RK_OK && eval->dump) {
        status = safetensors_finish(eval->dump, error);
    }
    return status;
}

static void eval_clear(struct eval *eval)
{
    struct rk_error error = {.status = RK_OK};
    if (eval->client && eval->num_stored > 0 &&
        rk_client_drop(eval->client, eval->stored, eval->num_stored, NULL, &error) != RK_OK) {
        (void)cli_fail_error("eval: dropping its segments", &error);
    }
    cli_client_close(eval->client);
    safetensors_destroy(eval->dump);
    for (size_t i = 0; eval->results && i < eval->file.num_requests; i++) {
        rk_report_clear(&eval->results[i].full);
        rk_report_clear(&eval->results[i].level);
    }
    rk_free(eval->results);
    rk_free(eval->stored);
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
        cli_print_json(eval_json(&eval));
    } else {
        eval_print(&eval);
    }
    eval_clear(&eval);
    return code;
}
