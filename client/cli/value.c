/* `redknot value`: opaque values from the command line. */
#include "common/base/value.h"
#include "client/cli/cli_internal.h"
#include "client/values.h"
#include "common/base/alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define READ_STEP_BYTES (1u << 20)

struct value_arguments {
    struct cli_common common;
    const char *path;
    int timeout_ms;
    const char *verb;
    char **words; /* behind the verb */
    int num_words;
};

enum { KEY_PATH = 256, KEY_TIMEOUT };

static const struct argp_option value_options[] = {
    {.name = "path", .key = KEY_PATH, .arg = "PATH", .doc = "auto (default), shm, ucx or grpc"},
    {.name = "timeout-ms",
     .key = KEY_TIMEOUT,
     .arg = "MS",
     .doc = "Of the whole call (default 5000)"},
    {.name = NULL},
};

static error_t parse_value(int key, char *arg, struct argp_state *state)
{
    struct value_arguments *arguments = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case KEY_PATH:
        arguments->path = arg;
        return 0;
    case KEY_TIMEOUT:
        arguments->timeout_ms = (int)cli_parse_uint(state, "--timeout-ms", arg, 1, 3600000);
        return 0;
    case ARGP_KEY_ARGS:
        arguments->verb = state->argv[state->next];
        arguments->words = state->argv + state->next + 1;
        arguments->num_words = state->argc - state->next - 1;
        return 0;
    case ARGP_KEY_NO_ARGS:
        argp_error(state, "say what to do: put, get, exists or drop");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp value_argp = {
    .options = value_options,
    .parser = parse_value,
    .args_doc = "put KEY FILE\nget KEY [FILE]\nexists KEY...\ndrop KEY...",
    .doc = "Opaque values, for engines that use RedKnot as their store. A value has 1 byte to "
           "1 GiB under a key of 1 to 256 bytes, and never changes: to store another one, drop it "
           "first. FILE may be - for standard input or output, which get writes to without one.",
    .children = cli_common_children};

static struct rk_value_key key_of(const char *text)
{
    return (struct rk_value_key){text, strlen(text)};
}

/* ---- Files ---- */

static enum rk_status file_failed(const char *path, const char *what, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_INVALID, "%s: cannot %s: %s", path, what, strerror(errno));
}

static enum rk_status descriptor_read(int fd, const char *path, uint8_t **ret_data,
                                      size_t *ret_bytes, struct rk_error *error)
{
    uint8_t *data = NULL;
    size_t room = 0;
    size_t bytes = 0;
    ssize_t got = 1;
    while (got > 0 && bytes <= RK_VALUE_BYTES_MAX) {
        if (bytes == room) {
            room = room ? room * 2 : READ_STEP_BYTES;
            uint8_t *more = rk_alloc_resize(data, room, 1);
            if (!more) {
                rk_free(data);
                return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: no memory for it", path);
            }
            data = more;
        }
        got = read(fd, data + bytes, room - bytes);
        bytes += got > 0 ? (size_t)got : 0;
    }
    enum rk_status status = RK_OK;
    if (got < 0) {
        status = file_failed(path, "read", error);
    } else if (bytes == 0 || bytes > RK_VALUE_BYTES_MAX) {
        status = rk_error_set(error, RK_ERR_INVALID, "%s: a value has 1 byte to 1 GiB", path);
    }
    if (status != RK_OK) {
        rk_free(data);
        return status;
    }
    *ret_data = data;
    *ret_bytes = bytes;
    return RK_OK;
}

static enum rk_status file_read(const char *path, uint8_t **ret_data, size_t *ret_bytes,
                                struct rk_error *error)
{
    if (strcmp(path, "-") == 0) {
        return descriptor_read(STDIN_FILENO, "standard input", ret_data, ret_bytes, error);
    }
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return file_failed(path, "open", error);
    }
    enum rk_status status = descriptor_read(fd, path, ret_data, ret_bytes, error);
    (void)close(fd);
    return status;
}

static enum rk_status stdout_write(const struct rk_value_view *view, struct rk_error *error)
{
    size_t wanted = 0;
    size_t written = 0;
    for (size_t i = 0; i < view->num_parts && written == wanted; i++) {
        wanted += view->parts[i].bytes;
        written += fwrite(view->parts[i].data, 1, view->parts[i].bytes, stdout);
    }
    return written == wanted && fflush(stdout) == 0
               ? RK_OK
               : file_failed("standard output", "write", error);
}

static enum rk_status file_write(const char *path, const struct rk_value_view *view,
                                 struct rk_error *error)
{
    struct cli_file *file = NULL;
    if (strcmp(path, "-") == 0) {
        return stdout_write(view, error);
    }
    enum rk_status status = cli_file_create(path, &file, error);
    if (status != RK_OK) {
        return status;
    }
    for (size_t i = 0; i < view->num_parts && status == RK_OK; i++) {
        status = cli_file_write(file, view->parts[i].data, view->parts[i].bytes, error);
    }
    if (status != RK_OK) {
        cli_file_abort(file);
        return status;
    }
    return cli_file_commit(file, error);
}

/* ---- What can be done ---- */

static int value_put(struct rk_values *values, const struct value_arguments *arguments)
{
    struct rk_error error = {.text = ""};
    struct rk_value_put put = {.key = key_of(arguments->words[0])};
    uint8_t *data = NULL;
    size_t bytes = 0;
    enum rk_status status = file_read(arguments->words[1], &data, &bytes, &error);
    if (status == RK_OK) {
        put.data = data;
        put.bytes = bytes;
        status = rk_values_put(values, &put, 1, arguments->timeout_ms, &error);
    }
    rk_free(data);
    status = status == RK_OK ? put.status : status;
    if (status != RK_OK) {
        error.status = status;
        return cli_fail_error("value put", &error);
    }
    if (arguments->common.json) {
        json_t *object =
            json_pack("{s:I, s:b}", "bytes", (json_int_t)bytes, "existed", (int)put.existed);
        cli_json_set_string(object, "key", arguments->words[0]);
        cli_print_json(object);
    } else {
        char text[32];
        char key[CLI_SHOWN_BYTES];
        (void)printf("%s  %s%s\n", cli_shown(arguments->words[0], key, sizeof(key)),
                     cli_bytes(bytes, text),
                     put.existed ? "  (a value is there already, and stays as it is)" : "");
    }
    return CLI_OK;
}

static int value_get(struct rk_values *values, const struct value_arguments *arguments)
{
    struct rk_error error = {.text = ""};
    struct rk_value_views views = {.views = NULL};
    const struct rk_value_key key = key_of(arguments->words[0]);
    const char *path = arguments->num_words > 1 ? arguments->words[1] : "-";
    if (arguments->common.json && strcmp(path, "-") == 0) {
        (void)cli_fail("value get: with --json the value needs a FILE, for standard output has "
                       "the JSON");
        return CLI_USAGE;
    }
    enum rk_status status = rk_values_view(values, &key, 1, arguments->timeout_ms, &views, &error);
    if (status == RK_OK) {
        status = views.views[0].status;
    }
    if (status == RK_OK) {
        status = file_write(path, &views.views[0], &error);
    }
    if (status == RK_OK && arguments->common.json && strcmp(path, "-") != 0) {
        json_t *object =
            json_pack("{s:I, s:s}", "bytes", (json_int_t)views.views[0].bytes, "path", views.path);
        cli_json_set_string(object, "key", arguments->words[0]);
        cli_print_json(object);
    }
    rk_values_release(values, &views);
    if (status != RK_OK) {
        error.status = status;
        if (error.text[0] == '\0') {
            (void)rk_error_set(&error, status, "%s", rk_status_text(status));
        }
        rk_error_prefix(&error, "%s", arguments->words[0]);
        return cli_fail_error("value get", &error);
    }
    return CLI_OK;
}

typedef enum rk_status (*flags_call)(struct rk_values *values, const struct rk_value_key *keys,
                                     size_t num_keys, int timeout_ms, bool *ret_flags,
                                     struct rk_error *error);

/* Fails when one of the keys is not there. */
static int value_flags(struct rk_values *values, const struct value_arguments *arguments,
                       flags_call call, const char *yes, const char *no)
{
    size_t count = (size_t)arguments->num_words;
    struct rk_error error = {.text = ""};
    struct rk_value_key *keys = rk_alloc_zero(count, sizeof(*keys));
    bool *flags = rk_alloc_zero(count, sizeof(*flags));
    enum rk_status status = RK_ERR_NO_MEMORY;
    int code = CLI_OK;
    if (keys && flags) {
        for (size_t i = 0; i < count; i++) {
            keys[i] = key_of(arguments->words[i]);
        }
        status = call(values, keys, count, arguments->timeout_ms, flags, &error);
    }
    json_t *rows = json_array();
    for (size_t i = 0; status == RK_OK && i < count; i++) {
        code = flags[i] ? code : CLI_FAIL;
        if (arguments->common.json) {
            json_t *row = json_pack("{s:b}", yes, (int)flags[i]);
            cli_json_set_string(row, "key", arguments->words[i]);
            (void)json_array_append_new(rows, row);
        } else {
            char key[CLI_SHOWN_BYTES];
            (void)printf("%s  %s\n", cli_shown(arguments->words[i], key, sizeof(key)),
                         flags[i] ? yes : no);
        }
    }
    if (status == RK_OK && arguments->common.json) {
        cli_print_json(json_pack("{s:O}", "keys", rows));
    }
    json_decref(rows);
    rk_free(keys);
    rk_free(flags);
    if (status != RK_OK) {
        error.status = status;
        return cli_fail_error("value", &error);
    }
    return code;
}

static int value_exists(struct rk_values *values, const struct value_arguments *arguments)
{
    return value_flags(values, arguments, rk_values_exists, "present", "absent");
}

static int value_drop(struct rk_values *values, const struct value_arguments *arguments)
{
    return value_flags(values, arguments, rk_values_drop, "dropped", "absent");
}

static const struct verb {
    const char *name;
    int words_min;
    int words_max;
    int (*run)(struct rk_values *values, const struct value_arguments *arguments);
} verbs[] = {{"put", 2, 2, value_put},
             {"get", 1, 2, value_get},
             {"exists", 1, 4096, value_exists},
             {"drop", 1, 4096, value_drop}};

int cli_value(int argc, char **argv)
{
    struct value_arguments arguments = {.path = "auto"};
    const struct verb *verb = NULL;
    (void)argp_parse(&value_argp, argc, argv, 0, NULL, &arguments);
    for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
        if (strcmp(verbs[i].name, arguments.verb) == 0) {
            verb = &verbs[i];
        }
    }
    if (!verb || arguments.num_words < verb->words_min || arguments.num_words > verb->words_max) {
        (void)cli_fail("value %s: %s; `redknot value --help` tells how", arguments.verb,
                       verb ? "too few or too many words" : "no such thing to do");
        return CLI_USAGE;
    }
    const struct rk_values_options options = {
        .coordinator = arguments.common.coordinator, .path = arguments.path, .threads = 1};
    struct rk_values *values = NULL;
    struct rk_error error = {.text = ""};
    enum rk_status status = rk_values_create(&options, &values, &error);
    if (status != RK_OK) {
        (void)cli_fail_error("value", &error);
        return status == RK_ERR_INVALID ? CLI_USAGE : CLI_FAIL;
    }
    cli_signals_end();
    int code = verb->run(values, &arguments);
    rk_values_destroy(values);
    return code;
}
