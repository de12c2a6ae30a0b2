#include "client/cli/cli_internal.h"
#include "client/cli/cluster_internal.h"
#include "common/base/alloc.h"
#include "common/base/service.h"

#include <string.h>

#define UP_TIMEOUT_MS   120000
#define DOWN_TIMEOUT_MS 10000

/* ---- Which cluster is meant ---- */

/* Whoever names a coordinator means its cluster, so another one's folder is not taken for it. A
 * folder that was named goes before the variable, which may be from a while ago. */
enum rk_status cluster_check_named(const struct cluster *cluster, const struct cli_common *common,
                                   bool dir_given, struct rk_error *error)
{
    const struct cluster_process *coordinator = &cluster->processes[0];
    const char *origin = common->coordinator_given               ? "--coordinator"
                         : common->coordinator_env && !dir_given ? "REDKNOT_COORDINATOR"
                                                                 : NULL;
    if (!origin || cluster->num_processes == 0 || coordinator->role != CLUSTER_COORDINATOR ||
        strcmp(coordinator->address, common->coordinator) == 0) {
        return RK_OK;
    }
    return rk_error_set(
        error, RK_ERR_INVALID,
        "%s names %.100s, and the cluster in %.200s has its coordinator at %s; give "
        "--dir of the one that you mean%s",
        origin, common->coordinator, cluster->dir, coordinator->address,
        common->coordinator_given ? "" : ", or unset the variable");
}

struct named {
    const char *coordinator;
    char *dir;
};

static void named_visit(void *context, const struct proc_daemon *daemon)
{
    struct named *named = context;
    const char *address =
        daemon->process.role == CLUSTER_COORDINATOR ? daemon->process.address : daemon->coordinator;
    const char *logs = strstr(daemon->process.log, "/logs/");
    if (logs && strcmp(address, named->coordinator) == 0) {
        (void)snprintf(named->dir, PATH_MAX, "%.*s", (int)(logs - daemon->process.log),
                       daemon->process.log);
    }
}

const char *cluster_dir_named(const struct cli_common *common, const char *dir, char room[PATH_MAX])
{
    struct named named = {.coordinator = common->coordinator, .dir = room};
    room[0] = 0;
    if (!dir && (common->coordinator_given || common->coordinator_env)) {
        proc_each_daemon(named_visit, &named);
    }
    return room[0] ? room : dir;
}

/* ---- up ---- */

#define SETTINGS_MAX 32

enum { KEY_DETACH = 256, KEY_SETTING };

struct up_arguments {
    struct cli_common common;
    struct cluster_options options;
};

static const struct {
    const char *setting;
    int letter;
} setting_letters[] = {{"model", CLI_LETTER_MODEL}, {"threads", CLI_LETTER_THREADS}};

/* Options come from the table of settings. */
static int setting_key(uint32_t index)
{
    for (size_t i = 0; i < sizeof(setting_letters) / sizeof(setting_letters[0]); i++) {
        if (strcmp(cluster_setting_list[index].name, setting_letters[i].setting) == 0) {
            return setting_letters[i].letter;
        }
    }
    return KEY_SETTING + (int)index;
}

static error_t parse_setting(int key, const char *arg, struct argp_state *state)
{
    struct up_arguments *arguments = state->input;
    struct rk_error error = {.status = RK_OK};
    uint32_t index = 0;
    while (index < cluster_num_settings && setting_key(index) != key) {
        index++;
    }
    if (index == cluster_num_settings) {
        return ARGP_ERR_UNKNOWN;
    }
    if (cluster_setting_parse(&cluster_setting_list[index], arg, &arguments->options.settings,
                              &error) != RK_OK) {
        argp_error(state, "%s", error.text);
    }
    arguments->options.given |= 1u << index;
    return 0;
}

static error_t parse_up(int key, char *arg, struct argp_state *state)
{
    struct up_arguments *arguments = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case CLI_LETTER_DIR:
        arguments->options.dir = arg;
        return 0;
    case KEY_DETACH:
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return parse_setting(key, arg, state);
    }
}

static void up_options(struct argp_option options[SETTINGS_MAX + 3])
{
    uint32_t count = 0;
    options[count++] = (struct argp_option){
        .name = "dir", .key = CLI_LETTER_DIR, .arg = "DIR", .doc = "State and logs; default below"};
    for (uint32_t i = 0; i < cluster_num_settings; i++) {
        const struct cluster_setting *setting = &cluster_setting_list[i];
        options[count++] = (struct argp_option){.name = setting->name,
                                                .key = setting_key(i),
                                                .arg = setting->argument,
                                                .doc = setting->doc};
    }
    options[count++] = (struct argp_option){
        .name = "detach", .key = KEY_DETACH, .doc = "Return when all serve; the default"};
    options[count] = (struct argp_option){.name = NULL};
}

static void print_table(const struct cluster *cluster, const struct cli_common *common)
{
    (void)printf("%-12s %-14s %8s  %-18s %-18s %s\n", "ROLE", "NODE", "PID", "ADDRESS", "METRICS",
                 "LOG");
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        const struct cluster_process *process = &cluster->processes[i];
        (void)printf("%-12s %-14s %8d  %-18s %-18s %s\n", cluster_role_name(process->role),
                     process->node_id, (int)process->pid, process->address, process->metrics,
                     process->log);
    }
    /* Other commands go by the variable, or by the default. */
    if (strcmp(cluster->processes[0].address, common->coordinator) != 0) {
        (void)printf("\nexport REDKNOT_COORDINATOR=%s\n", cluster->processes[0].address);
    }
}

static int up_run(struct up_arguments *arguments, struct cluster *cluster)
{
    struct rk_error error = {.status = RK_OK};
    uint32_t started = 0;
    if (cluster_start(&arguments->options, UP_TIMEOUT_MS, cluster, &started, &error) != RK_OK) {
        return cli_interrupted()
                   ? cli_fail("up: interrupted; what it had started was stopped again")
                   : cli_fail("up: %s", error.text);
    }
    if (started < cluster->num_processes) {
        (void)fprintf(stderr, "%u of %u processes ran already, %u were started\n",
                      cluster->num_processes - started, cluster->num_processes, started);
    }
    if (arguments->common.json) {
        cli_print_json(cluster_to_json(cluster));
    } else {
        print_table(cluster, &arguments->common);
    }
    cluster_close(cluster);
    return CLI_OK;
}

int cli_up(int argc, char **argv)
{
    static struct argp_option options[SETTINGS_MAX + 3];
    static const struct argp up_argp = {
        .options = options,
        .parser = parse_up,
        .doc =
            "Start a coordinator, stores and workers on this machine and wait until all serve. "
            "Where some of them run already, start what is missing, as they were started."
            "\vDefaults: --dir is $XDG_RUNTIME_DIR/redknot/cluster, or /tmp/redknot-UID/cluster; "
            "--model is $REDKNOT_MODEL, or models/SmolLM2-135M-Instruct.Q4_1.gguf below "
            "$REDKNOT_CACHE or ~/.cache/redknot. Stores listen from base-port + 1, workers from "
            "base-port + 20, metrics 100 above each. Logs are in DIR/logs.",
        .children = cli_common_children};
    struct up_arguments *arguments = rk_alloc_zero(1, sizeof(*arguments));
    struct cluster *cluster = rk_alloc_zero(1, sizeof(*cluster));
    int code = CLI_FAIL;
    if (!arguments || !cluster) {
        (void)cli_fail("up: out of memory");
    } else {
        cluster_settings_default(&arguments->options.settings);
        arguments->options.verbose = true;
        up_options(options);
        (void)argp_parse(&up_argp, argc, argv, 0, NULL, arguments);
        code = arguments->common.coordinator_given
                   ? cli_fail("up: --coordinator names one that runs; `up` starts its own: choose "
                              "its port with --base-port")
                   : up_run(arguments, cluster);
    }
    rk_free(arguments);
    rk_free(cluster);
    return code;
}

/* ---- down ---- */

struct down_arguments {
    struct cli_common common;
    const char *dir; /* NULL: the default */
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

static enum rk_status down_run(const struct down_arguments *arguments, struct cluster *cluster,
                               uint32_t *ret_stopped, struct rk_error *error)
{
    char room[PATH_MAX];
    const char *dir = cluster_dir_named(&arguments->common, arguments->dir, room);
    enum rk_status status = cluster_open(dir, true, cluster, error);
    if (status == RK_ERR_CORRUPT) {
        (void)fprintf(stderr, "redknot: %s; what runs there was found by its logs\n", error->text);
    } else if (status != RK_OK && (status != RK_ERR_NOT_FOUND || cluster->folder == 0)) {
        return status == RK_ERR_NOT_FOUND ? RK_OK : status;
    }
    cluster_find_strays(cluster);
    status = cluster_check_named(cluster, &arguments->common, arguments->dir != NULL, error);
    if (status == RK_OK) {
        *ret_stopped = cluster_stop(cluster, DOWN_TIMEOUT_MS, !arguments->common.json);
    }
    cluster_close(cluster);
    return status;
}

int cli_down(int argc, char **argv)
{
    struct down_arguments arguments = {.dir = NULL};
    (void)argp_parse(&down_argp, argc, argv, 0, NULL, &arguments);
    struct cluster *cluster = rk_alloc_zero(1, sizeof(*cluster));
    struct rk_error error = {.status = RK_OK};
    uint32_t stopped = 0;
    if (!cluster) {
        return cli_fail("down: out of memory");
    }
    enum rk_status status = down_run(&arguments, cluster, &stopped, &error);
    rk_free(cluster);
    if (status != RK_OK) {
        return cli_fail("down: %s", error.text);
    }
    if (arguments.common.json) {
        cli_print_json(json_pack("{s:I}", "stopped", (json_int_t)stopped));
    } else {
        (void)printf("stopped %u processes\n", stopped);
    }
    return CLI_OK;
}
