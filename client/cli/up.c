#include "client/cli/cli_internal.h"
#include "client/cli/cluster_internal.h"
#include "common/base/alloc.h"
#include "common/base/service.h"

#include <string.h>

#define UP_TIMEOUT_MS   120000
#define DOWN_TIMEOUT_MS 10000

struct up_arguments {
    struct cli_common common;
    struct cluster_options options;
    char dir[PATH_MAX];
    char model[PATH_MAX];
};

enum { KEY_WORKERS = 256, KEY_STORES, KEY_BASE_PORT, KEY_DRAM, KEY_MODE, KEY_HEAD_MAP, KEY_DETACH };

static const struct argp_option up_options[] = {
    {.name = "dir", .key = CLI_LETTER_DIR, .arg = "DIR", .doc = "State and logs; default below"},
    {.name = "workers", .key = KEY_WORKERS, .arg = "N", .doc = "Workers, default 2"},
    {.name = "stores", .key = KEY_STORES, .arg = "N", .doc = "Store nodes, default 1"},
    {.name = "model", .key = CLI_LETTER_MODEL, .arg = "FILE", .doc = "GGUF file; default below"},
    {.name = "dram", .key = KEY_DRAM, .arg = "SIZE", .doc = "Of each store, default 1GiB"},
    {.name = "threads",
     .key = CLI_LETTER_THREADS,
     .arg = "N",
     .doc = "Of each worker; default: shared out"},
    {.name = "mode", .key = KEY_MODE, .arg = "MODE", .doc = "bf16 (default) or f32"},
    {.name = "base-port",
     .key = KEY_BASE_PORT,
     .arg = "P",
     .doc = "Of the coordinator, default 7100"},
    {.name = "head-map", .key = KEY_HEAD_MAP, .arg = "FILE", .doc = "Head map of the model"},
    {.name = "detach", .key = KEY_DETACH, .doc = "Return when all serve; the default"},
    {.name = NULL},
};

static error_t parse_dram(const char *arg, struct argp_state *state)
{
    struct rk_error error = {.status = RK_OK};
    uint64_t bytes = 0;
    if (rk_size_parse(arg, &bytes, &error) != RK_OK) {
        argp_error(state, "--dram: %s", error.text);
    }
    return 0;
}

static error_t parse_up(int key, char *arg, struct argp_state *state)
{
    struct up_arguments *arguments = state->input;
    struct cluster_options *options = &arguments->options;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case CLI_LETTER_DIR:
        options->dir = arg;
        return 0;
    case KEY_WORKERS:
        options->num_workers =
            (uint32_t)cli_parse_uint(state, "--workers", arg, 1, CLUSTER_WORKERS_MAX);
        return 0;
    case KEY_STORES:
        options->num_stores =
            (uint32_t)cli_parse_uint(state, "--stores", arg, 1, CLUSTER_STORES_MAX);
        return 0;
    case CLI_LETTER_MODEL:
        options->model = arg;
        return 0;
    case KEY_DRAM:
        options->dram = arg;
        return parse_dram(arg, state);
    case CLI_LETTER_THREADS:
        options->threads = (uint32_t)cli_parse_uint(state, "--threads", arg, 1, 1024);
        return 0;
    case KEY_MODE:
        if (strcmp(arg, "bf16") != 0 && strcmp(arg, "f32") != 0) {
            argp_error(state, "--mode: \"%s\" is neither bf16 nor f32", arg);
        }
        options->mode = arg;
        return 0;
    case KEY_BASE_PORT:
        options->base_port =
            (uint16_t)cli_parse_uint(state, "--base-port", arg, 1, UINT16_MAX - RK_PORTS_SPAN);
        return 0;
    case KEY_HEAD_MAP:
        options->head_map = arg;
        return 0;
    case KEY_DETACH:
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp up_argp = {
    .options = up_options,
    .parser = parse_up,
    .doc = "Start a coordinator, stores and workers on this machine and wait until all serve."
           "\vDefaults: --dir is $XDG_RUNTIME_DIR/redknot/cluster, or /tmp/redknot-UID/cluster; "
           "--model is $REDKNOT_MODEL, or models/SmolLM2-135M-Instruct.Q4_1.gguf below "
           "$REDKNOT_CACHE or ~/.cache/redknot. Stores listen from base-port + 1, workers from "
           "base-port + 20, metrics 100 above each. Logs are in DIR/logs.",
    .children = cli_common_children};

static void print_table(const struct cluster *cluster)
{
    (void)printf("%-12s %-14s %8s  %-18s %-18s %s\n", "ROLE", "NODE", "PID", "ADDRESS", "METRICS",
                 "LOG");
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        const struct cluster_process *process = &cluster->processes[i];
        (void)printf("%-12s %-14s %8d  %-18s %-18s %s\n", cluster_role_name(process->role),
                     process->node_id, (int)process->pid, process->address, process->metrics,
                     process->log);
    }
    if (strcmp(cluster->processes[0].address, CLI_COORDINATOR_DEFAULT) != 0) {
        (void)printf("\nexport REDKNOT_COORDINATOR=%s\n", cluster->processes[0].address);
    }
}

static int up_run(struct up_arguments *arguments, struct cluster *cluster)
{
    struct rk_error error = {.status = RK_OK};
    if (cluster_start(&arguments->options, UP_TIMEOUT_MS, cluster, &error) != RK_OK) {
        return cli_interrupted() ? cli_fail("up: interrupted; everything was stopped again")
                                 : cli_fail("up: %s", error.text);
    }
    if (arguments->common.json) {
        cli_print_json(cluster_to_json(cluster));
    } else {
        print_table(cluster);
    }
    return CLI_OK;
}

int cli_up(int argc, char **argv)
{
    struct up_arguments *arguments = rk_alloc_zero(1, sizeof(*arguments));
    struct cluster *cluster = rk_alloc_zero(1, sizeof(*cluster));
    int code = CLI_FAIL;
    if (!arguments || !cluster) {
        (void)cli_fail("up: out of memory");
    } else {
        cluster_default_dir(arguments->dir);
        cluster_default_model(arguments->model);
        arguments->options = (struct cluster_options){.dir = arguments->dir,
                                                      .model = arguments->model,
                                                      .mode = "bf16",
                                                      .dram = "1GiB",
                                                      .num_workers = 2,
                                                      .num_stores = 1,
                                                      .base_port = RK_PORT_COORDINATOR};
        (void)argp_parse(&up_argp, argc, argv, 0, NULL, arguments);
        code = up_run(arguments, cluster);
    }
    rk_free(arguments);
    rk_free(cluster);
    return code;
}

/* ---- down ---- */

struct down_arguments {
    struct cli_common common;
    const char *dir;
};

static const struct argp_option down_options[] = {
    {.name = "dir", .key = CLI_LETTER_DIR, .arg = "DIR", .doc = "What `up` was given"},
    {.name = NULL},
};

static error_t parse_down(int key, char *arg, struct argp_state *state)
{
    struct down_arguments *arguments = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case CLI_LETTER_DIR:
        arguments->dir = arg;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp down_argp = {.options = down_options,
                                      .parser = parse_down,
                                      .doc = "Stop what `redknot up` started. Nothing running is "
                                             "fine, too.",
                                      .children = cli_common_children};

int cli_down(int argc, char **argv)
{
    char dir[PATH_MAX];
    cluster_default_dir(dir);
    struct down_arguments arguments = {.dir = dir};
    (void)argp_parse(&down_argp, argc, argv, 0, NULL, &arguments);
    struct cluster *cluster = rk_alloc_zero(1, sizeof(*cluster));
    struct rk_error error = {.status = RK_OK};
    uint32_t stopped = 0;
    if (!cluster) {
        return cli_fail("down: out of memory");
    }
    enum rk_status status = cluster_load(arguments.dir, cluster, &error);
    if (status == RK_OK) {
        stopped = cluster_stop(cluster, DOWN_TIMEOUT_MS);
    }
    rk_free(cluster);
    if (status != RK_OK && status != RK_ERR_NOT_FOUND) {
        return cli_fail("down: %s", error.text);
    }
    if (arguments.common.json) {
        cli_print_json(json_pack("{s:I}", "stopped", (json_int_t)stopped));
    } else {
        (void)printf("stopped %u processes\n", stopped);
    }
    return CLI_OK;
}
