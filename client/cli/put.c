#include "client/cli/cli_internal.h"
#include "common/base/alloc.h"

struct put_arguments {
    struct cli_common common;
    const char *worker;
    char **files;
    int num_files;
};

static const struct argp_option put_options[] = {
    {.name = "worker", .key = CLI_LETTER_WORKER, .arg = "ADDR", .doc = "Compute on this worker"},
    {.name = "model", .key = CLI_LETTER_MODEL, .arg = "NAME", .doc = CLI_MODEL_DOC},
    {.name = NULL},
};

static error_t parse_put(int key, char *arg, struct argp_state *state)
{
    struct put_arguments *arguments = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case CLI_LETTER_WORKER:
        arguments->worker = arg;
        return 0;
    case CLI_LETTER_MODEL:
        arguments->common.model = arg;
        return 0;
    case ARGP_KEY_ARGS:
        arguments->files = state->argv + state->next;
        arguments->num_files = state->argc - state->next;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "no file given");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp put_argp = {
    .options = put_options,
    .parser = parse_put,
    .args_doc = "FILE...",
    .doc = "Compute each document alone, once, and store its KV, so that later requests reuse it "
           "at any position.",
    .children = cli_common_children};

static void put_progress(void *context, uint32_t done, uint32_t total)
{
    cli_progress(context, done, total);
}

static enum rk_status put_file(struct rk_client *client, const char *path,
                               struct rk_put_result *ret_result, struct rk_error *error)
{
    char *text = NULL;
    size_t bytes = 0;
    enum rk_status status = cli_read_text(path, &text, &bytes, error);
    if (status != RK_OK) {
        return status;
    }
    struct rk_segment_input segment = {.text = text, .label = path};
    status = rk_client_put_segment(client, &segment, NULL, 0, put_progress, (void *)path,
                                   ret_result, error);
    cli_progress_end();
    rk_free(text);
    if (status != RK_OK) {
        rk_error_prefix(error, "%s", path);
    }
    return status;
}

static json_t *put_json(const char *path, const struct rk_put_result *result)
{
    json_t *row =
        json_pack("{s:o, s:I, s:I, s:f, s:b}", "segment_id", cli_json_id(&result->segment_id),
                  "num_tokens", (json_int_t)result->num_tokens, "bytes", (json_int_t)result->bytes,
                  "seconds", result->seconds, "already_stored", (int)result->already_stored);
    cli_json_set_string(row, "file", path);
    return row;
}

static json_t *put_json_failed(const char *path, const struct rk_error *error)
{
    json_t *row = json_pack("{s:o}", "error", cli_json_error(error));
    cli_json_set_string(row, "file", path);
    return row;
}

static void put_print(const char *path, const struct rk_put_result *result)
{
    char hex[RK_ID_HEX_BYTES];
    char bytes[32];
    char seconds[32];
    char shown[CLI_SHOWN_BYTES];
    rk_id_to_hex(&result->segment_id, hex);
    (void)printf("%s  %6u tokens  %10s  %9s  %s%s\n", hex, result->num_tokens,
                 cli_bytes(result->bytes, bytes), cli_seconds(result->seconds, seconds),
                 cli_shown(path, shown, sizeof(shown)),
                 result->already_stored ? " (already stored)" : "");
    (void)fflush(stdout);
}

int cli_put(int argc, char **argv)
{
    struct put_arguments arguments = {.worker = NULL};
    (void)argp_parse(&put_argp, argc, argv, 0, NULL, &arguments);
    struct rk_error error = {.status = RK_OK};
    struct rk_client *client = NULL;
    if (cli_client_open(&arguments.common, arguments.worker, &client, &error) != RK_OK) {
        return cli_fail_error("put", &error);
    }
    json_t *rows = json_array();
    int code = CLI_OK;
    for (int i = 0; i < arguments.num_files && !cli_interrupted(); i++) {
        struct rk_put_result result;
        enum rk_status status = put_file(client, arguments.files[i], &result, &error);
        if (status != RK_OK) { /* The other files are still worth storing. */
            code = cli_fail_error("put", &error);
            (void)json_array_append_new(rows, put_json_failed(arguments.files[i], &error));
            if (rk_status_remedy(status) == RK_REMEDY_ELSEWHERE) {
                break; /* Nobody is there: one line, not one per file. */
            }
            continue;
        }
        if (arguments.common.json) {
            (void)json_array_append_new(rows, put_json(arguments.files[i], &result));
        } else {
            put_print(arguments.files[i], &result);
        }
    }
    if (arguments.common.json) {
        cli_print_json(json_pack("{s:O}", "segments", rows));
    }
    json_decref(rows);
    cli_client_close(client);
    return cli_interrupted() ? CLI_FAIL : code;
}
