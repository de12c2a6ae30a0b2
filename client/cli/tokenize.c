/* `redknot tokenize`: the token ids of a text, by a worker's model. */
#include "client/cli/cli_internal.h"
#include "common/base/alloc.h"
#include "common/base/text.h"

#include <string.h>
#include <unistd.h>

struct tokenize_arguments {
    struct cli_common common;
    const char *worker;
    const char *input; /* a text, a file, or "-" */
    bool special;
};

enum { KEY_SPECIAL = 256 };

static const struct argp_option tokenize_options[] = {
    {.name = "worker", .key = CLI_LETTER_WORKER, .arg = "ADDR", .doc = "Ask this worker"},
    {.name = "model", .key = CLI_LETTER_MODEL, .arg = "NAME", .doc = CLI_MODEL_DOC},
    {.name = "special", .key = KEY_SPECIAL, .doc = "Special tokens in the text are meant as such"},
    {.name = NULL},
};

static error_t parse_tokenize(int key, char *arg, struct argp_state *state)
{
    struct tokenize_arguments *arguments = state->input;
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
    case KEY_SPECIAL:
        arguments->special = true;
        return 0;
    case ARGP_KEY_ARG:
        if (arguments->input) {
            argp_error(state, "more than one text given; put it in quotes");
        }
        arguments->input = arg;
        return 0;
    case ARGP_KEY_END:
        if (!arguments->input && isatty(STDIN_FILENO)) {
            argp_error(state, "no text given");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp tokenize_argp = {
    .options = tokenize_options,
    .parser = parse_tokenize,
    .args_doc = "[TEXT|FILE|-]",
    .doc = "Print the token ids of a text: of the file of that name if there is one, of standard "
           "input for - or nothing, else of the words themselves. `redknot eval` takes such ids.",
    .children = cli_common_children};

static enum rk_status read_input(const char *input, char **ret_text, struct rk_error *error)
{
    size_t bytes = 0;
    if (!input || strcmp(input, "-") == 0) {
        return cli_read_stdin(ret_text, &bytes, error);
    }
    if (access(input, F_OK) == 0) {
        return cli_read_text(input, ret_text, &bytes, error);
    }
    enum rk_status status = rk_text_check("the text", input, strlen(input), error);
    if (status != RK_OK) {
        return status;
    }
    *ret_text = rk_alloc_string(input);
    return *ret_text ? RK_OK : rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
}

static void print_ids(const struct tokenize_arguments *arguments, const int32_t *ids, size_t count)
{
    if (arguments->common.json) {
        json_t *list = json_array();
        for (size_t i = 0; i < count; i++) {
            (void)json_array_append_new(list, json_integer(ids[i]));
        }
        cli_print_json(json_pack("{s:I, s:o}", "num_tokens", (json_int_t)count, "token_ids", list));
        return;
    }
    for (size_t i = 0; i < count; i++) {
        (void)printf("%s%d", i ? " " : "", (int)ids[i]);
    }
    (void)putchar('\n');
}

int cli_tokenize(int argc, char **argv)
{
    struct tokenize_arguments arguments = {.input = NULL};
    (void)argp_parse(&tokenize_argp, argc, argv, 0, NULL, &arguments);
    struct rk_error error = {.status = RK_OK};
    struct rk_client *client = NULL;
    char *text = NULL;
    int32_t *ids = NULL;
    size_t count = 0;
    enum rk_status status = read_input(arguments.input, &text, &error);
    if (status == RK_OK) {
        status = cli_client_open(&arguments.common, arguments.worker, &client, &error);
    }
    if (status == RK_OK) {
        status = rk_client_tokenize(client, text, arguments.special, &ids, &count, &error);
    }
    int code = CLI_OK;
    if (status == RK_OK) {
        print_ids(&arguments, ids, count);
    } else {
        code = cli_fail_error("tokenize", &error);
    }
    rk_client_tokens_free(ids);
    rk_free(text);
    cli_client_close(client);
    return code;
}
