#include "client/cli/cli_internal.h"
#include "client/cli/score.h"
#include "common/base/alloc.h"

#include <errno.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#define COMPARE_TOKENS 16 /* at most, that the two levels are compared along */

struct generate_arguments {
    struct cli_common common;
    const char *worker;
    const char *segments[CLI_SEGMENTS_MAX];
    size_t num_segments;
    struct rk_generate_request request;
    const char *prompt;
    const char *compare; /* a level, or NULL */
    bool verbose;
};

enum {
    KEY_RAW = 256,
    KEY_NO_PUBLISH,
    KEY_TOP_P,
    KEY_SEED,
    KEY_SYSTEM,
    KEY_TEMPERATURE,
    KEY_COMPARE
};

static const struct argp_option generate_options[] = {
    {.name = "segment",
     .key = CLI_LETTER_SEGMENT,
     .arg = "FILE|ID",
     .doc = "A document, in this order; repeat"},
    {.name = "prompt", .key = CLI_LETTER_PROMPT, .arg = "TEXT", .doc = "What to answer"},
    {.name = "level",
     .key = CLI_LETTER_LEVEL,
     .arg = "LEVEL",
     .doc = "full, exact (default) or fast"},
    {.name = "fidelity", .key = CLI_LETTER_LEVEL, .flags = OPTION_ALIAS},
    {.name = "compare",
     .key = KEY_COMPARE,
     .arg = "LEVEL",
     .doc = "Answer at this level, too (full), and tell how far the two are from each other"},
    {.name = "max-tokens",
     .key = CLI_LETTER_MAX_TOKENS,
     .arg = "N",
     .doc = "Stop after N tokens, default 128"},
    {.name = "worker", .key = CLI_LETTER_WORKER, .arg = "ADDR", .doc = "Ask this worker"},
    {.name = "model", .key = CLI_LETTER_MODEL, .arg = "NAME", .doc = CLI_MODEL_DOC},
    {.name = "temperature",
     .key = KEY_TEMPERATURE,
     .arg = "T",
     .doc = "0 (default): the likeliest token"},
    {.name = "top-p", .key = KEY_TOP_P, .arg = "P", .doc = "Nucleus sampling, default 1"},
    {.name = "seed", .key = KEY_SEED, .arg = "S", .doc = "Of the sampling"},
    {.name = "system", .key = KEY_SYSTEM, .arg = "TEXT", .doc = "System message"},
    {.name = "raw", .key = KEY_RAW, .doc = "No chat template"},
    {.name = "no-publish", .key = KEY_NO_PUBLISH, .doc = "Store nothing of what is computed"},
    {.name = "verbose", .key = CLI_LETTER_VERBOSE, .doc = "Report each segment"},
    {.name = NULL},
};

static error_t parse_segment(struct generate_arguments *arguments, const char *arg,
                             struct argp_state *state)
{
    if (arguments->num_segments == CLI_SEGMENTS_MAX) {
        argp_error(state, "at most %d segments", CLI_SEGMENTS_MAX);
    }
    arguments->segments[arguments->num_segments++] = arg;
    return 0;
}

static error_t parse_generate(int key, char *arg, struct argp_state *state)
{
    struct generate_arguments *arguments = state->input;
    struct rk_generate_request *request = &arguments->request;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case CLI_LETTER_SEGMENT:
        return parse_segment(arguments, arg, state);
    case CLI_LETTER_PROMPT:
        arguments->prompt = arg;
        return 0;
    case CLI_LETTER_LEVEL:
        request->level = cli_parse_level(state, arg);
        return 0;
    case KEY_COMPARE:
        arguments->compare = cli_parse_level(state, arg);
        return 0;
    case CLI_LETTER_MAX_TOKENS:
        request->max_tokens = (uint32_t)cli_parse_uint(state, "--max-tokens", arg, 1, 1u << 20);
        return 0;
    case CLI_LETTER_WORKER:
        arguments->worker = arg;
        return 0;
    case CLI_LETTER_MODEL:
        arguments->common.model = arg;
        return 0;
    case KEY_TEMPERATURE:
        request->temperature = (float)cli_parse_double(state, "--temperature", arg, 0, 100);
        return 0;
    case CLI_LETTER_VERBOSE:
        arguments->verbose = true;
        return 0;
    case KEY_TOP_P:
        request->top_p = (float)cli_parse_double(state, "--top-p", arg, 1e-6, 1);
        return 0;
    case KEY_SEED:
        request->seed = cli_parse_uint(state, "--seed", arg, 0, UINT64_MAX);
        return 0;
    case KEY_SYSTEM:
        request->system = arg;
        return 0;
    case KEY_RAW:
        request->raw = true;
        return 0;
    case KEY_NO_PUBLISH:
        request->no_publish = true;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"; documents are given by --segment", arg);
        return 0;
    case ARGP_KEY_END:
        if (!arguments->prompt || !arguments->prompt[0]) {
            argp_error(state, "no --prompt given");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp generate_argp = {
    .options = generate_options,
    .parser = parse_generate,
    .doc = "Answer a prompt over documents. Documents that are stored are reused at any position; "
           "others are computed.\vThe text goes to standard output as it comes, a report to "
           "standard error.",
    .children = cli_common_children};

/* Segments of the request, with what they own. */
struct segments {
    struct rk_segment_input inputs[CLI_SEGMENTS_MAX];
    struct rk_id ids[CLI_SEGMENTS_MAX];
    char *texts[CLI_SEGMENTS_MAX];
    size_t count;
};

static void segments_destroy(struct segments *segments)
{
    for (size_t i = 0; segments && i < segments->count; i++) {
        rk_free(segments->texts[i]);
    }
    rk_free(segments);
}

static enum rk_status segments_read(const struct generate_arguments *arguments,
                                    struct segments **ret_segments, struct rk_error *error)
{
    struct segments *segments = rk_alloc_zero(1, sizeof(*segments));
    if (!segments) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    for (size_t i = 0; i < arguments->num_segments; i++) {
        const char *name = arguments->segments[i];
        if (rk_id_from_hex(name, &segments->ids[i])) {
            segments->inputs[i].segment_id = &segments->ids[i];
        } else {
            size_t bytes = 0;
            enum rk_status status = cli_read_text(name, &segments->texts[i], &bytes, error);
            if (status != RK_OK) {
                if (access(name, F_OK) != 0) {
                    (void)rk_error_set(error, status,
                                       "--segment %s: no such file, and no segment id either (%d "
                                       "hex digits)",
                                       name, 2 * RK_ID_BYTES);
                }
                segments_destroy(segments);
                return status;
            }
            segments->inputs[i].text = segments->texts[i];
            segments->inputs[i].label = name;
        }
        segments->count++;
    }
    *ret_segments = segments;
    return RK_OK;
}

/* ---- One answer ---- */

struct answer {
    bool shown; /* as it comes, on standard output */
    bool terminal;
    bool ends_line;
    int write_error; /* errno of what ended it; 0: none */
    char *text;
    size_t text_bytes;
    int32_t *ids;
    size_t num_ids;
    struct rk_report report;
};

static void answer_clear(struct answer *answer)
{
    rk_report_clear(&answer->report);
    rk_free(answer->text);
    rk_free(answer->ids);
}

/* A terminal obeys control characters, and a model may write any; a file gets the bytes. */
static bool show(struct answer *answer, const char *text, size_t text_bytes)
{
    if (text_bytes > 0) {
        answer->ends_line = text[text_bytes - 1] == '\n';
    }
    bool written = answer->terminal ? cli_write_text(stdout, text, text_bytes)
                                    : fwrite(text, 1, text_bytes, stdout) == text_bytes;
    if (!written || fflush(stdout) != 0) {
        answer->write_error = errno;
        return false;
    }
    return true;
}

static bool on_token(void *context, const int32_t *token_ids, size_t num_tokens, const char *text,
                     size_t text_bytes)
{
    struct answer *answer = context;
    char *longer = rk_alloc_resize(answer->text, answer->text_bytes + text_bytes + 1, 1);
    answer->text = longer ? longer : answer->text;
    int32_t *more = rk_alloc_resize(answer->ids, answer->num_ids + num_tokens + 1, sizeof(*more));
    answer->ids = more ? more : answer->ids;
    if (!longer || !more) {
        return false;
    }
    memcpy(longer + answer->text_bytes, text, text_bytes);
    answer->text_bytes += text_bytes;
    for (size_t i = 0; i < num_tokens; i++) {
        more[answer->num_ids++] = token_ids[i];
    }
    return !answer->shown || show(answer, text, text_bytes);
}

static json_t *answer_json(const struct answer *answer)
{
    json_t *ids = json_array();
    for (size_t i = 0; i < answer->num_ids; i++) {
        (void)json_array_append_new(ids, json_integer(answer->ids[i]));
    }
    json_t *object =
        json_pack("{s:o, s:o}", "token_ids", ids, "report", cli_report_json(&answer->report));
    cli_json_set_text(object, "text", answer->text ? answer->text : "", answer->text_bytes);
    return object;
}

/* ---- Two answers ---- */

struct comparison {
    struct answer answer;    /* at the other level */
    size_t first_difference; /* of the tokens; SIZE_MAX: they are the same */
    struct score_distance distance;
    size_t positions; /* that it was measured over */
};

/* Along the other answer's first tokens: what the level would have said there. */
static enum rk_status measure(struct rk_client *client, const struct generate_arguments *arguments,
                              struct comparison *comparison, struct rk_error *error)
{
    const struct rk_generate_request *from = &arguments->request;
    struct score_rows there = {.values = NULL};
    struct score_rows here = {.values = NULL};
    struct rk_report report = {.owner = NULL};
    size_t count = comparison->answer.num_ids;
    count = count < COMPARE_TOKENS ? count : COMPARE_TOKENS;
    struct rk_score_request request = {
        .segments = from->segments,
        .num_segments = from->num_segments,
        .prompt = from->prompt,
        .continuation = {.token_ids = comparison->answer.ids, .num_tokens = count},
        .level = arguments->compare,
        .chat = !from->raw,
        .system = from->system};
    if (count == 0) {
        return RK_OK; /* An answer without a token: nothing to measure along. */
    }
    enum rk_status status = score_run(client, &request, &there, &report, error);
    rk_report_clear(&report);
    request.level = from->level;
    if (status == RK_OK) {
        status = score_run(client, &request, &here, &report, error);
        rk_report_clear(&report);
    }
    if (status == RK_OK) {
        status = score_compare(&there, &here, &comparison->distance, error);
        comparison->positions = count;
    }
    score_rows_clear(&there);
    score_rows_clear(&here);
    return status;
}

static enum rk_status compare(struct rk_client *client, const struct generate_arguments *arguments,
                              const struct answer *answer, struct comparison *comparison,
                              struct rk_error *error)
{
    struct rk_generate_request request = arguments->request;
    struct answer *other = &comparison->answer;
    request.level = arguments->compare;
    request.no_publish = true; /* It must not make the level better than it is. */
    enum rk_status status =
        rk_client_generate(client, &request, on_token, other, &other->report, error);
    if (status == RK_OK) {
        status = measure(client, arguments, comparison, error);
    }
    if (status != RK_OK) {
        rk_error_prefix(error, "--compare %s", arguments->compare);
        return status;
    }
    size_t at = 0;
    while (at < answer->num_ids && at < other->num_ids && answer->ids[at] == other->ids[at]) {
        at++;
    }
    bool same = answer->num_ids == other->num_ids && at == answer->num_ids;
    comparison->first_difference = same ? SIZE_MAX : at;
    return RK_OK;
}

static json_t *comparison_json(const struct comparison *comparison, const char *level)
{
    bool same = comparison->first_difference == SIZE_MAX;
    bool finite = comparison->positions > 0 && isfinite(comparison->distance.kl);
    json_t *object = answer_json(&comparison->answer);
    (void)json_object_set_new(object, "level", json_string(level));
    (void)json_object_set_new(object, "kl",
                              finite ? json_real(comparison->distance.kl) : json_null());
    (void)json_object_set_new(object, "top1", json_real(comparison->distance.top1));
    (void)json_object_set_new(object, "positions", json_integer((json_int_t)comparison->positions));
    (void)json_object_set_new(object, "first_difference",
                              same ? json_null()
                                   : json_integer((json_int_t)comparison->first_difference));
    return object;
}

static void comparison_print(const struct comparison *comparison, const char *level,
                             const char *other, bool verbose)
{
    cli_report_print(stderr, &comparison->answer.report, verbose);
    if (comparison->first_difference == SIZE_MAX) {
        (void)fprintf(stderr, "the two answers are the same");
    } else {
        (void)fprintf(stderr, "the two answers differ from token %zu on",
                      comparison->first_difference + 1);
    }
    (void)fprintf(stderr,
                  "; KL(%s || %s) %.4g nats, top-1 %.0f %%: means along the first %zu tokens of "
                  "the answer at %s\n",
                  other, level, comparison->distance.kl, 100 * comparison->distance.top1,
                  comparison->positions, other);
}

/* ---- The command ---- */

/* Two levels are compared on one worker: its arithmetic must not differ. */
static enum rk_status open_client(const struct generate_arguments *arguments,
                                  struct rk_client **ret_client, struct rk_error *error)
{
    if (arguments->compare) {
        return cli_client_open_one(&arguments->common, arguments->worker, ret_client, error);
    }
    return cli_client_open(&arguments->common, arguments->worker, ret_client, error);
}

static void heading(const char *level)
{
    (void)printf("[%s]\n", level);
    (void)fflush(stdout);
}

static void end_line(struct answer *answer)
{
    if (answer->shown && !answer->ends_line) {
        (void)fputc('\n', stdout);
        (void)fflush(stdout);
    }
}

static int print_all(const struct generate_arguments *arguments, const struct answer *answer,
                     const struct comparison *comparison)
{
    if (arguments->common.json) {
        json_t *object = answer_json(answer);
        if (arguments->compare) {
            (void)json_object_set_new(object, "compare",
                                      comparison_json(comparison, arguments->compare));
        }
        cli_print_json(object);
        return CLI_OK;
    }
    cli_report_print(stderr, &answer->report, arguments->verbose);
    if (arguments->compare) {
        comparison_print(comparison, answer->report.level, arguments->compare, arguments->verbose);
    }
    return CLI_OK;
}

static int generate_run(struct generate_arguments *arguments, struct segments *segments)
{
    struct rk_error error = {.status = RK_OK};
    struct rk_client *client = NULL;
    struct answer answer = {
        .shown = !arguments->common.json, .terminal = isatty(STDOUT_FILENO), .ends_line = true};
    struct comparison comparison = {.answer = answer};
    arguments->request.segments = segments->inputs;
    arguments->request.num_segments = segments->count;
    arguments->request.prompt = (struct rk_segment_input){.text = arguments->prompt};
    bool headings = arguments->compare && answer.shown;

    int code = CLI_OK;
    enum rk_status status = open_client(arguments, &client, &error);
    if (status == RK_OK) {
        if (headings) {
            heading(arguments->request.level ? arguments->request.level : "exact");
        }
        status = rk_client_generate(client, &arguments->request, on_token, &answer, &answer.report,
                                    &error);
        end_line(&answer);
    }
    if (status == RK_OK && arguments->compare) {
        if (headings) {
            heading(arguments->compare);
        }
        status = compare(client, arguments, &answer, &comparison, &error);
        end_line(&comparison.answer);
    }
    int write_error = answer.write_error ? answer.write_error : comparison.answer.write_error;
    if (status != RK_OK && write_error) {
        code = cli_fail("generate: standard output: %s", strerror(write_error));
    } else if (status != RK_OK) {
        code = cli_fail_error("generate", &error);
    } else {
        code = print_all(arguments, &answer, &comparison);
    }
    answer_clear(&answer);
    answer_clear(&comparison.answer);
    cli_client_close(client);
    return code;
}

int cli_generate(int argc, char **argv)
{
    struct generate_arguments *arguments = rk_alloc_zero(1, sizeof(*arguments));
    if (!arguments) {
        return cli_fail("generate: out of memory");
    }
    (void)argp_parse(&generate_argp, argc, argv, 0, NULL, arguments);
    struct rk_error error = {.status = RK_OK};
    struct segments *segments = NULL;
    int code = CLI_OK;
    if (segments_read(arguments, &segments, &error) != RK_OK) {
        code = cli_fail_error("generate", &error);
    } else {
        code = generate_run(arguments, segments);
    }
    segments_destroy(segments);
    rk_free(arguments);
    return code;
}
