/* `redknot restart` and `redknot logs`: one process of a cluster that `up` started. */
#include "client/cli/cli_internal.h"
#include "client/cli/cluster_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define NODES_MAX          CLUSTER_PROCESSES_MAX
#define RESTART_TIMEOUT_MS 120000
#define LINES_DEFAULT      20
#define LINES_MAX          1000000
#define FOLLOW_MS          200
#define BLOCK_BYTES        65536

enum { KEY_FOLLOW = 256, KEY_LINES };

struct node_arguments {
    struct cli_common common;
    const char *dir; /* NULL: the default */
    const char *names[NODES_MAX];
    size_t num_names;
    uint32_t num_lines;
    bool follow;
};

static error_t parse_node(int key, char *arg, struct argp_state *state)
{
    struct node_arguments *arguments = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case CLI_LETTER_DIR:
        arguments->dir = arg;
        return 0;
    case KEY_FOLLOW:
        arguments->follow = true;
        return 0;
    case KEY_LINES:
        arguments->num_lines = (uint32_t)cli_parse_uint(state, "--lines", arg, 0, LINES_MAX);
        return 0;
    case ARGP_KEY_ARG:
        if (arguments->num_names == NODES_MAX) {
            argp_error(state, "at most %d nodes in one call", NODES_MAX);
        }
        arguments->names[arguments->num_names++] = arg;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* "coordinator, store-0, worker-0" */
static void node_names(const struct cluster *cluster, char *text, size_t room)
{
    size_t used = 0;
    text[0] = 0;
    for (uint32_t i = 0; i < cluster->num_processes && used < room; i++) {
        used += (size_t)snprintf(text + used, room - used, "%s%s", i ? ", " : "",
                                 cluster->processes[i].node_id);
    }
}

/* Opens the cluster and finds all that was named, before anything is done to one. */
static enum rk_status find_nodes(const struct node_arguments *arguments, bool change,
                                 struct cluster *cluster,
                                 struct cluster_process *ret_nodes[NODES_MAX],
                                 struct rk_error *error)
{
    char room[PATH_MAX];
    const char *dir = cluster_dir_named(&arguments->common, arguments->dir, room);
    enum rk_status status = cluster_open(dir, change, cluster, error);
    if (status == RK_ERR_CORRUPT && !change) {
        status = RK_OK; /* Logs can be read all the same. */
    }
    if (status == RK_OK) {
        status = cluster_check_named(cluster, &arguments->common, arguments->dir != NULL, error);
    }
    for (size_t i = 0; i < arguments->num_names && status == RK_OK; i++) {
        char names[256];
        ret_nodes[i] = cluster_find(cluster, arguments->names[i]);
        if (!ret_nodes[i]) {
            node_names(cluster, names, sizeof(names));
            status = rk_error_set(error, RK_ERR_NOT_FOUND,
                                  "\"%.60s\" is no process of the cluster in %.150s; it has %s",
                                  arguments->names[i], cluster->dir, names);
        }
    }
    return status;
}

/* ---- restart ---- */

static const struct argp_option restart_options[] = {
    {.name = "dir", .key = CLI_LETTER_DIR, .arg = "DIR", .doc = "What `up` was given"},
    {.name = NULL},
};

static const struct argp restart_argp = {
    .options = restart_options,
    .parser = parse_node,
    .args_doc = "NODE...",
    .doc =
        "Stop processes of the cluster that `redknot up` started, and start each again as it was. "
        "A NODE is coordinator, store-0, worker-0, and so on. A store comes back empty.",
    .children = cli_common_children};

static enum rk_status restart_all(struct cluster *cluster, struct cluster_process **nodes,
                                  size_t num_nodes, struct rk_error *error)
{
    if (!cluster->has_settings) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "%.200s was started by an older version; `redknot down`, then `redknot "
                            "up`",
                            cluster->dir);
    }
    for (size_t i = 0; i < num_nodes; i++) {
        (void)fprintf(stderr, "restarting %s (process %d)\n", nodes[i]->node_id,
                      (int)nodes[i]->pid);
        enum rk_status status = cluster_restart(cluster, nodes[i], RESTART_TIMEOUT_MS, error);
        if (status != RK_OK) {
            return status;
        }
    }
    /* Without a coordinator there is nobody to register with; that it is down is said, no more. */
    if (!process_runs(&cluster->processes[0])) {
        (void)fputs("redknot: the coordinator is down; `redknot restart coordinator` starts it\n",
                    stderr);
        return RK_OK;
    }
    for (size_t i = 0; i < num_nodes; i++) { /* Others may be down; that is not for us to say. */
        enum rk_status status =
            cluster_wait_registered(cluster, nodes[i], rk_deadline_in_ms(10000), error);
        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}

static void print_nodes(const struct node_arguments *arguments, struct cluster_process **nodes)
{
    json_t *rows = json_array();
    for (size_t i = 0; i < arguments->num_names; i++) {
        if (arguments->common.json) {
            (void)json_array_append_new(
                rows, json_pack("{s:s, s:I, s:s}", "node_id", nodes[i]->node_id, "pid",
                                (json_int_t)nodes[i]->pid, "address", nodes[i]->address));
        } else {
            (void)printf("%s serves at %s (process %d)\n", nodes[i]->node_id, nodes[i]->address,
                         (int)nodes[i]->pid);
        }
    }
    if (arguments->common.json) {
        cli_print_json(json_pack("{s:O}", "restarted", rows));
    }
    json_decref(rows);
}

int cli_restart(int argc, char **argv)
{
    struct node_arguments arguments = {.num_lines = 0};
    struct cluster_process *nodes[NODES_MAX];
    struct rk_error error = {.status = RK_OK};
    (void)argp_parse(&restart_argp, argc, argv, 0, NULL, &arguments);
    if (arguments.num_names == 0) {
        (void)cli_fail("restart: no node given; `redknot restart --help` says how they are named");
        return CLI_USAGE;
    }
    struct cluster *cluster = rk_alloc_zero(1, sizeof(*cluster));
    if (!cluster) {
        return cli_fail("restart: out of memory");
    }
    enum rk_status status = find_nodes(&arguments, true, cluster, nodes, &error);
    if (status == RK_OK) {
        status = restart_all(cluster, nodes, arguments.num_names, &error);
    }
    if (status == RK_OK) {
        print_nodes(&arguments, nodes);
    }
    cluster_close(cluster);
    rk_free(cluster);
    return status == RK_OK ? CLI_OK : cli_fail("restart: %s", error.text);
}

/* ---- logs ---- */

static const struct argp_option logs_options[] = {
    {.name = "dir", .key = CLI_LETTER_DIR, .arg = "DIR", .doc = "What `up` was given"},
    {.name = "lines", .key = KEY_LINES, .arg = "N", .doc = "The last N, default 20"},
    {.name = "follow", .key = KEY_FOLLOW, .doc = "Go on with what is written, until Ctrl-C"},
    {.name = NULL},
};

static const struct argp logs_argp = {
    .options = logs_options,
    .parser = parse_node,
    .args_doc = "[NODE...]",
    .doc =
        "Show the logs of a cluster that `redknot up` started: of one process, of several, or of "
        "all. A NODE is coordinator, store-0, worker-0, and so on.",
    .children = cli_common_children};

struct log {
    const struct cluster_process *process;
    int fd;
    off_t at;
};

/* Where the last num_lines lines begin. */
static off_t lines_begin(int fd, off_t end, uint32_t num_lines)
{
    static char block[BLOCK_BYTES];
    uint64_t seen = 0;
    for (off_t to = end; to > 0;) {
        off_t from = to > BLOCK_BYTES ? to - BLOCK_BYTES : 0;
        ssize_t bytes = pread(fd, block, (size_t)(to - from), from);
        for (ssize_t i = bytes; i > 0; i--) {
            bool last = from + i == end; /* The end of the last line begins none. */
            if (block[i - 1] == '\n' && !last && ++seen == num_lines) {
                return from + i;
            }
        }
        to = from;
    }
    return num_lines ? 0 : end;
}

static enum rk_status log_open(const struct cluster *cluster, struct log *log, uint32_t num_lines,
                               struct rk_error *error)
{
    char name[64];
    struct stat info;
    (void)snprintf(name, sizeof(name), "logs/%s.log", log->process->node_id);
    log->fd = openat(cluster->folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (log->fd < 0 || fstat(log->fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        return rk_error_set(error, RK_ERR_IO, "%.300s: %s", log->process->log,
                            log->fd < 0 ? strerror(errno) : "is no file");
    }
    log->at = lines_begin(log->fd, info.st_size, num_lines);
    return RK_OK;
}

/* What is there behind the place that was printed up to. */
static void log_print(struct log *log, const struct log **last, bool headed)
{
    static char block[BLOCK_BYTES];
    ssize_t bytes = 0;
    while ((bytes = pread(log->fd, block, sizeof(block), log->at)) > 0) {
        if (headed && *last != log) {
            (void)printf("%s==> %s <==\n", *last ? "\n" : "", log->process->node_id);
        }
        *last = log;
        (void)fwrite(block, 1, (size_t)bytes, stdout);
        log->at += bytes;
    }
}

static enum rk_status logs_run(const struct node_arguments *arguments, struct cluster *cluster,
                               struct cluster_process **nodes, struct rk_error *error)
{
    struct log logs[NODES_MAX];
    const struct log *last = NULL;
    enum rk_status status = RK_OK;
    size_t count = arguments->num_names ? arguments->num_names : cluster->num_processes;
    for (size_t i = 0; i < count; i++) {
        logs[i] = (struct log){.process = arguments->num_names ? nodes[i] : &cluster->processes[i],
                               .fd = -1};
    }
    for (size_t i = 0; i < count && status == RK_OK; i++) {
        status = log_open(cluster, &logs[i], arguments->num_lines, error);
        if (status == RK_OK) {
            log_print(&logs[i], &last, count > 1);
        }
    }
    while (status == RK_OK && arguments->follow && !cli_interrupted()) {
        if (fflush(stdout) != 0) {
            break; /* Whoever read it went away. */
        }
        rk_clock_sleep_ms(FOLLOW_MS);
        for (size_t i = 0; i < count; i++) {
            log_print(&logs[i], &last, count > 1);
        }
    }
    for (size_t i = 0; i < count; i++) {
        if (logs[i].fd >= 0) {
            (void)close(logs[i].fd);
        }
    }
    return status;
}

int cli_logs(int argc, char **argv)
{
    struct node_arguments arguments = {.num_lines = LINES_DEFAULT};
    struct cluster_process *nodes[NODES_MAX];
    struct rk_error error = {.status = RK_OK};
    (void)argp_parse(&logs_argp, argc, argv, 0, NULL, &arguments);
    struct cluster *cluster = rk_alloc_zero(1, sizeof(*cluster));
    if (!cluster) {
        return cli_fail("logs: out of memory");
    }
    enum rk_status status = find_nodes(&arguments, false, cluster, nodes, &error);
    if (status == RK_OK) {
        status = logs_run(&arguments, cluster, nodes, &error);
    }
    cluster_close(cluster);
    rk_free(cluster);
    return status == RK_OK ? CLI_OK : cli_fail("logs: %s", error.text);
}
