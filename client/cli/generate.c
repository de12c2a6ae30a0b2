#include "client/cli/cli_internal.h"
#include "common/base/alloc.h"

#include <string.h>
#include <unistd.h>

struct generate_arguments {
    struct cli_common common;
    const char *worker;
    const char *segments[CLI_SEGMENTS_MAX];
    size_t num_segments;
    struct rk_generate_request request;
    const char *prompt;
    bool verbose;
};

enum { KEY_RAW = 256, KEY_NO_PUBLISH, KEY_TOP_P, KEY_SEED, KEY_SYSTEM, KEY_TEMPERATURE };

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
    {.name = "max-tokens",
     .key = CLI_LETTER_MAX_TOKENS,
     .arg = "N",
     .doc = "Stop after N tokens, default 128"},
    {.name = "worker", .key = CLI_LETTER_WORKER, .arg = "ADDR", .doc = "Ask this worker"},
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
    case CLI_LETTER_MAX_TOKENS:
        request->max_tokens = (uint32_t)cli_parse_uint(state, "--max-tokens", arg, 1, 1u << 20);
        return 0;
    case CLI_LETTER_WORKER:
        arguments->worker = arg;
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

struct output {
    bool json;
    char *text;
    size_t text_bytes;
    json_t *token_ids;
    bool ends_line;
};

static bool on_token(void *context, const int32_t *token_ids, size_t num_tokens, const char *text,
                     size_t text_bytes)
{
    struct output *output = context;
    if (!output->json) {
        if (text_bytes > 0) {
            output->ends_line = text[text_bytes - 1] == '\n';
        }
        return fwrite(text, 1, text_bytes, stdout) == text_bytes && fflush(stdout) == 0;
    }
    for (size_t i = 0; i < num_tokens; i++) {
        (void)json_array_append_new(output->token_ids, json_integer(token_ids[i]));
    }
    char *longer = rk_alloc_resize(output->text, output->text_bytes + text_bytes + 1, 1);
    if (!longer) {
        return false;
    }
    output->text = longer;
    memcpy(longer + output->text_bytes, text, text_bytes);
    output->text_bytes += text_bytes;
    return true;
}

static int output_json(struct output *output, const struct rk_report *report)
{
    json_t *text = json_stringn(output->text ? output->text : "", output->text_bytes);
    if (!text) { /* A model may generate bytes that are no UTF-8; the ids tell which. */
        text = json_null();
    }
    cli_print_json(json_pack("{s:o, s:O, s:o}", "text", text, "token_ids", output->token_ids,
                             "report", cli_report_json(report)));
    return CLI_OK;
}

static int generate_run(struct generate_arguments *arguments, struct segments *segments)
{
    struct rk_error error = {.status = RK_OK};
    struct rk_client *client = NULL;
    struct rk_report report = {.owner = NULL};
    struct output output = {
        .json = arguments->common.json, .token_ids = json_array(), .ends_line = true};
    arguments->request.segments = segments->inputs;
    arguments->request.num_segments = segments->count;
    arguments->request.prompt = (struct rk_segment_input){.text = arguments->prompt};

    int code = CLI_OK;
    enum rk_status status = cli_client_open(&arguments->common, arguments->worker, &client, &error);
    if (status == RK_OK) {
        status =
            rk_client_generate(client, &arguments->request, on_token, &output, &report, &error);
    }
    if (!output.json && !output.ends_line) {
        (void)fputc('\n', stdout);
        (void)fflush(stdout);
    }
    if (status != RK_OK) {
        code = cli_fail_error("generate", &error);
    } else if (output.json) {
        code = output_json(&output, &report);
    } else {
        cli_report_print(stderr, &report, arguments->verbose);
    }
    rk_report_clear(&report);
    json_decref(output.token_ids);
    rk_free(output.text);
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
