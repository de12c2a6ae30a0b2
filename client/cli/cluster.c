#include "client/cli/cli_internal.h"
#include "client/cli/cluster_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/limits.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <unistd.h>

#define ARGUMENTS_MAX     48
#define STATE_VERSION     2    /* 1 had neither id nor settings; it can still be stopped */
#define UNIX_SOCKET_BYTES 100  /* sun_path has 108 */
#define ANSWER_MS         3000 /* for a process that ran before us */
#define RESTART_STOP_MS   6000
#define STATE_FILE        "cluster.json"

const char *cluster_role_name(enum cluster_role role)
{
    static const char *const names[] = {"coordinator", "store", "worker"};
    return names[role];
}

const char *cluster_program_name(enum cluster_role role)
{
    static const char *const programs[] = {"redknot-coordinator", "redknot-kvstore",
                                           "redknot-worker"};
    return programs[role];
}

void cluster_default_dir(char ret_dir[PATH_MAX])
{
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    if (runtime && runtime[0] == '/') {
        (void)snprintf(ret_dir, PATH_MAX, "%s/redknot/cluster", runtime);
    } else {
        (void)snprintf(ret_dir, PATH_MAX, "/tmp/redknot-%u/cluster", (unsigned)geteuid());
    }
}

void cluster_default_model(char ret_model[PATH_MAX])
{
    static const char name[] = "models/SmolLM2-135M-Instruct.Q4_1.gguf";
    const char *model = getenv("REDKNOT_MODEL");
    const char *cache = getenv("REDKNOT_CACHE");
    const char *home = getenv("HOME");
    if (model && model[0]) {
        (void)snprintf(ret_model, PATH_MAX, "%s", model);
    } else if (cache && cache[0]) {
        (void)snprintf(ret_model, PATH_MAX, "%s/%s", cache, name);
    } else {
        (void)snprintf(ret_model, PATH_MAX, "%s/.cache/redknot/%s", home ? home : "", name);
    }
}

static void say(bool verbose, const char *format, ...) RK_PRINTF(2, 3);
static void say(bool verbose, const char *format, ...)
{
    va_list args;
    if (!verbose) {
        return;
    }
    va_start(args, format);
    (void)vfprintf(stderr, format, args);
    (void)fputc('\n', stderr);
    va_end(args);
}

/* ---- State ---- */

json_t *cluster_to_json(const struct cluster *cluster)
{
    json_t *rows = json_array();
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        const struct cluster_process *process = &cluster->processes[i];
        (void)json_array_append_new(
            rows, json_pack("{s:i, s:s, s:s, s:I, s:I, s:s, s:s, s:s, s:s}", "kind",
                            (int)process->role, "role", cluster_role_name(process->role), "node_id",
                            process->node_id, "pid", (json_int_t)process->pid, "start_time",
                            (json_int_t)process->start_time, "program", process->program, "address",
                            process->address, "metrics", process->metrics, "log", process->log));
    }
    return json_pack("{s:i, s:s, s:s, s:s, s:o, s:o}", "version", STATE_VERSION, "cluster_id",
                     cluster->id, "dir", cluster->dir, "coordinator", cluster->processes[0].address,
                     "settings", cluster_settings_to_json(&cluster->settings), "processes", rows);
}

enum rk_status cluster_save(const struct cluster *cluster, struct rk_error *error)
{
    json_t *object = cluster_to_json(cluster);
    char *text = json_dumps(object, JSON_INDENT(2));
    enum rk_status status =
        text ? folder_write(cluster->folder, STATE_FILE, text, error)
             : rk_error_set(error, RK_ERR_NO_MEMORY, STATE_FILE ": out of memory");
    free(text);
    json_decref(object);
    if (status != RK_OK) {
        rk_error_prefix(error, "%s", cluster->dir);
    }
    return status;
}

static bool copy_string(const json_t *row, const char *key, char *to, size_t room)
{
    const char *text = json_string_value(json_object_get(row, key));
    if (!text || strlen(text) >= room) {
        return false;
    }
    memcpy(to, text, strlen(text) + 1);
    return true;
}

/* A program that is none of ours is never signalled, so a state that names one is not ours. */
static bool process_from_json(const json_t *row, struct cluster_process *process)
{
    enum cluster_role role = CLUSTER_COORDINATOR;
    json_int_t kind = json_integer_value(json_object_get(row, "kind"));
    json_int_t pid = json_integer_value(json_object_get(row, "pid"));
    process->role = (enum cluster_role)kind;
    process->pid = (pid_t)pid;
    process->start_time = (uint64_t)json_integer_value(json_object_get(row, "start_time"));
    return kind >= CLUSTER_COORDINATOR && kind <= CLUSTER_WORKER && pid >= 0 && pid != 1 &&
           pid <= INT32_MAX &&
           copy_string(row, "node_id", process->node_id, sizeof(process->node_id)) &&
           copy_string(row, "program", process->program, sizeof(process->program)) &&
           copy_string(row, "address", process->address, sizeof(process->address)) &&
           copy_string(row, "metrics", process->metrics, sizeof(process->metrics)) &&
           copy_string(row, "log", process->log, sizeof(process->log)) &&
           cluster_role_of_program(process->program, &role) && role == process->role;
}

static enum rk_status state_from_json(const json_t *object, struct cluster *cluster,
                                      struct rk_error *error)
{
    json_t *rows = json_object_get(object, "processes");
    size_t count = json_array_size(rows);
    json_int_t version = json_integer_value(json_object_get(object, "version"));
    bool good =
        (version == 1 || version == STATE_VERSION) && count > 0 && count <= CLUSTER_PROCESSES_MAX;
    for (size_t i = 0; i < count && good; i++) {
        good = process_from_json(json_array_get(rows, i), &cluster->processes[i]);
        cluster->num_processes += good ? 1 : 0;
    }
    if (good && version == STATE_VERSION) {
        good = copy_string(object, "cluster_id", cluster->id, sizeof(cluster->id));
    }
    if (!good || cluster->processes[0].role != CLUSTER_COORDINATOR) {
        return rk_error_set(error, RK_ERR_CORRUPT, "it is not as this version writes it");
    }
    cluster->has_settings = version == STATE_VERSION;
    return cluster->has_settings ? cluster_settings_from_json(json_object_get(object, "settings"),
                                                              &cluster->settings, error)
                                 : RK_OK;
}

static enum rk_status state_read(struct cluster *cluster, struct rk_error *error)
{
    char *text = NULL;
    json_error_t why;
    enum rk_status status = folder_read(cluster->folder, STATE_FILE, &text, error);
    if (status == RK_ERR_NOT_FOUND) {
        return rk_error_set(error, status, "%s: no cluster was started there", cluster->dir);
    }
    json_t *object = NULL;
    if (status == RK_OK) {
        object = json_loads(text, 0, &why);
        status = object ? state_from_json(object, cluster, error)
                        : rk_error_set(error, RK_ERR_CORRUPT, "line %d: %s", why.line, why.text);
    }
    json_decref(object);
    rk_free(text);
    if (status == RK_ERR_CORRUPT) {
        cluster->num_processes = 0;
        cluster->has_settings = false;
        memset(cluster->id, 0, sizeof(cluster->id));
        rk_error_prefix(error, "%s/" STATE_FILE " is damaged", cluster->dir);
    } else if (status != RK_OK) {
        rk_error_prefix(error, "%s", cluster->dir);
    }
    return status;
}

/* One process at a time changes a cluster. The kernel gives the lock back when its holder ends. */
static enum rk_status lock_take(struct cluster *cluster, struct rk_error *error)
{
    if (flock(cluster->folder, LOCK_EX | LOCK_NB) == 0) {
        return RK_OK;
    }
    return rk_error_set(
        error, RK_ERR_BUSY,
        "%.300s: another redknot starts or stops this cluster (%s); wait until it is "
        "done, or end it",
        cluster->dir, strerror(errno));
}

static enum rk_status open_folder(const char *dir, bool create, bool change,
                                  struct cluster *cluster, struct rk_error *error)
{
    char path[PATH_MAX];
    unsigned flags = create ? FOLDER_CREATE : 0;
    if (!dir) {
        cluster_default_dir(path);
        flags |= FOLDER_PRIVATE;
    }
    memset(cluster, 0, sizeof(*cluster));
    enum rk_status status =
        folder_open(dir ? dir : path, flags, cluster->dir, &cluster->folder, error);
    if (status == RK_OK && change) {
        status = lock_take(cluster, error);
    }
    if (status != RK_OK) {
        cluster_close(cluster);
    }
    return status;
}

enum rk_status cluster_open(const char *dir, bool change, struct cluster *ret_cluster,
                            struct rk_error *error)
{
    enum rk_status status = open_folder(dir, false, change, ret_cluster, error);
    if (status != RK_OK) {
        return status;
    }
    status = state_read(ret_cluster, error);
    if (status == RK_ERR_CORRUPT) {
        cluster_find_strays(ret_cluster);
    } else if (status != RK_OK && status != RK_ERR_NOT_FOUND) {
        cluster_close(ret_cluster);
    }
    return status;
}

void cluster_close(struct cluster *cluster)
{
    if (cluster->folder > 0) {
        (void)close(cluster->folder);
    }
    cluster->folder = 0;
}

static void stray_visit(void *context, const struct proc_daemon *daemon)
{
    struct cluster *cluster = context;
    size_t length = strlen(cluster->dir);
    const char *log = daemon->process.log;
    if (strncmp(log, cluster->dir, length) != 0 || strncmp(log + length, "/logs/", 6) != 0 ||
        cluster->num_processes == CLUSTER_PROCESSES_MAX) {
        return;
    }
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        if (cluster->processes[i].pid == daemon->process.pid) {
            return;
        }
    }
    cluster->processes[cluster->num_processes++] = daemon->process;
}

void cluster_find_strays(struct cluster *cluster)
{
    proc_each_daemon(stray_visit, cluster);
}

uint32_t cluster_num_running(const struct cluster *cluster)
{
    uint32_t running = 0;
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        running += process_runs(&cluster->processes[i]) ? 1 : 0;
    }
    return running;
}

struct cluster_process *cluster_find(struct cluster *cluster, const char *node_id)
{
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        if (strcmp(cluster->processes[i].node_id, node_id) == 0) {
            return &cluster->processes[i];
        }
    }
    return NULL;
}

/* ---- Stop ---- */

static void stop_wait(struct cluster_process *process, int pidfd, int64_t deadline_ns)
{
    if (!process_wait(pidfd, deadline_ns)) {
        (void)cli_fail("%s (pid %d) did not stop in time and was killed; its log is %s",
                       process->node_id, (int)process->pid, process->log);
        (void)pidfd_send_signal(pidfd, SIGKILL, NULL, 0);
        (void)process_wait(pidfd, rk_deadline_in_ms(2000));
    }
    (void)close(pidfd);
    process->pid = 0;
}

static uint32_t stop_role(struct cluster *cluster, enum cluster_role role, int64_t deadline_ns,
                          bool verbose)
{
    int pidfds[CLUSTER_PROCESSES_MAX] = {0};
    uint32_t running = 0;
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        struct cluster_process *process = &cluster->processes[i];
        pidfds[i] = process->role == role ? process_open(process) : -1;
        if (pidfds[i] >= 0) {
            running++;
            say(verbose, "stopping %s (process %d)", process->node_id, (int)process->pid);
            process_terminate(pidfds[i]);
        }
    }
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        if (pidfds[i] >= 0) {
            stop_wait(&cluster->processes[i], pidfds[i], deadline_ns);
        }
    }
    process_reap();
    return running;
}

uint32_t cluster_stop(struct cluster *cluster, int timeout_ms, bool verbose)
{
    uint32_t running = 0;
    for (int role = CLUSTER_WORKER; role >= CLUSTER_COORDINATOR; role--) {
        running +=
            stop_role(cluster, (enum cluster_role)role, rk_deadline_in_ms(timeout_ms), verbose);
    }
    (void)unlinkat(cluster->folder, STATE_FILE, 0);
    cluster_close(cluster);
    return running;
}

/* ---- Start one ---- */

struct arguments {
    char *argv[ARGUMENTS_MAX];
    char numbers[8][16];
    int argc;
    int num_numbers;
};

static void add(struct arguments *arguments, const char *option, const char *value)
{
    RK_ASSERT(arguments->argc + 2 < ARGUMENTS_MAX);
    arguments->argv[arguments->argc++] = (char *)option;
    if (value) {
        arguments->argv[arguments->argc++] = (char *)value;
    }
}

static void add_number(struct arguments *arguments, const char *option, uint32_t number)
{
    RK_ASSERT(arguments->num_numbers < 8);
    char *text = arguments->numbers[arguments->num_numbers++];
    if (number != 0) { /* 0: what the daemon does without it. */
        (void)snprintf(text, sizeof(arguments->numbers[0]), "%u", number);
        add(arguments, option, text);
    }
}

static void add_worker(struct arguments *arguments, const struct cluster_settings *settings)
{
    struct rk_limits limits;
    rk_limits_read(&limits);
    uint32_t shared = limits.cpus / settings->num_workers;
    add(arguments, "--model", settings->model);
    if (settings->mode[0]) {
        add(arguments, "--mode", settings->mode);
    }
    add(arguments, "--path", settings->path);
    add_number(arguments, "--threads", settings->threads ? settings->threads : shared ? shared : 1);
    add_number(arguments, "--context", settings->context);
    add_number(arguments, "--pool-tokens", settings->pool_tokens);
    add_number(arguments, "--queue-max", settings->queue_max);
    if (settings->head_map[0]) {
        add(arguments, "--head-map", settings->head_map);
    }
}

static int open_log(const struct cluster *cluster, const struct cluster_process *process)
{
    char name[64];
    (void)snprintf(name, sizeof(name), "logs/%s.log", process->node_id);
    int fd = openat(cluster->folder, name,
                    O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    struct stat info;
    if (fd >= 0 && (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_uid != geteuid())) {
        (void)close(fd);
        errno = EPERM;
        return -1;
    }
    return fd;
}

static enum rk_status start_process(struct cluster *cluster, struct cluster_process *process,
                                    struct rk_error *error)
{
    char path[PATH_MAX + 64];
    struct arguments arguments = {.argc = 0};
    enum rk_status status = cluster_check_ports(process, error);
    if (status != RK_OK) {
        return status;
    }
    add(&arguments, process->program, NULL);
    add(&arguments, "--listen", process->address);
    add(&arguments, "--metrics", process->metrics);
    add(&arguments, "--cluster", cluster->id);
    if (process->role == CLUSTER_COORDINATOR) {
        (void)snprintf(path, sizeof(path), "%s/coordinator", cluster->dir);
        add(&arguments, "--data", path);
    } else {
        add(&arguments, "--coordinator", cluster->processes[0].address);
        add(&arguments, "--node-id", process->node_id);
    }
    if (process->role == CLUSTER_STORE) {
        (void)snprintf(path, sizeof(path), "%s/%s.sock", cluster->dir, process->node_id);
        if (strlen(path) > UNIX_SOCKET_BYTES) {
            return rk_error_set(error, RK_ERR_TOO_LONG,
                                "%.300s: longer than a Unix socket may be; choose a shorter --dir",
                                path);
        }
        add(&arguments, "--dram", cluster->settings.dram);
        add(&arguments, "--shm-socket", path);
        if (cluster->settings.path[0] == 'u') { /* UCX is served only when it is asked for. */
            add(&arguments, "--ucx", "auto");
        }
    }
    if (process->role == CLUSTER_WORKER) {
        add_worker(&arguments, &cluster->settings);
    }
    int log = open_log(cluster, process);
    if (log < 0) {
        return rk_error_set(error, RK_ERR_IO, "%.300s: %s; choose another --dir", process->log,
                            strerror(errno));
    }
    status = process_spawn(process, arguments.argv, log, error);
    (void)close(log);
    return status == RK_OK ? cluster_save(cluster, error) /* At once: `down` finds it. */
                           : status;
}

/* ---- Start all ---- */

static enum rk_status own_directory(char ret_bin[PATH_MAX], struct rk_error *error)
{
    ssize_t bytes = readlink("/proc/self/exe", ret_bin, PATH_MAX - 1);
    if (bytes <= 0) {
        return rk_error_set(error, RK_ERR_IO, "/proc/self/exe: %s", strerror(errno));
    }
    ret_bin[bytes] = 0;
    *strrchr(ret_bin, '/') = 0;
    return RK_OK;
}

static enum rk_status plan_process(struct cluster *cluster, const char *bin, enum cluster_role role,
                                   uint32_t index, struct rk_error *error)
{
    static const uint32_t first[] = {0, RK_PORT_STORE - RK_PORT_COORDINATOR,
                                     RK_PORT_WORKER - RK_PORT_COORDINATOR};
    struct cluster_process *process = &cluster->processes[cluster->num_processes++];
    unsigned port = cluster->settings.base_port + first[role] + index;
    char log[PATH_MAX + 64];
    process->role = role;
    if (role == CLUSTER_COORDINATOR) {
        (void)snprintf(process->node_id, sizeof(process->node_id), "coordinator");
    } else {
        (void)snprintf(process->node_id, sizeof(process->node_id), "%s-%u", cluster_role_name(role),
                       index);
    }
    (void)snprintf(process->address, sizeof(process->address), "127.0.0.1:%u", port);
    (void)snprintf(process->metrics, sizeof(process->metrics), "127.0.0.1:%u",
                   port + RK_PORTS_METRICS);
    int program = snprintf(process->program, PATH_MAX, "%s/%s", bin, cluster_program_name(role));
    int length = snprintf(log, sizeof(log), "%s/logs/%s.log", cluster->dir, process->node_id);
    if (program >= PATH_MAX || length >= PATH_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%.300s: the path is too long", cluster->dir);
    }
    memcpy(process->log, log, (size_t)length + 1);
    return RK_OK;
}

static enum rk_status plan(struct cluster *cluster, const struct cluster_options *options,
                           struct rk_error *error)
{
    char bin[PATH_MAX];
    cluster->settings = options->settings;
    cluster->has_settings = true;
    cluster->num_processes = 0;
    if (!cluster->id[0]) {
        (void)snprintf(cluster->id, sizeof(cluster->id), "%016llx",
                       (unsigned long long)rk_service_incarnation());
    }
    memset(cluster->processes, 0, sizeof(cluster->processes));
    enum rk_status status = own_directory(bin, error);
    if (status == RK_OK) {
        status = plan_process(cluster, bin, CLUSTER_COORDINATOR, 0, error);
    }
    for (uint32_t i = 0; i < cluster->settings.num_stores && status == RK_OK; i++) {
        status = plan_process(cluster, bin, CLUSTER_STORE, i, error);
    }
    for (uint32_t i = 0; i < cluster->settings.num_workers && status == RK_OK; i++) {
        status = plan_process(cluster, bin, CLUSTER_WORKER, i, error);
    }
    return status;
}

/* As it is, or absolute: a later `restart` may be called elsewhere. */
static enum rk_status absolute(const char *what, const char *advice, char path[PATH_MAX],
                               struct rk_error *error)
{
    char real[PATH_MAX];
    if (!realpath(path, real) || access(real, R_OK) != 0) {
        return rk_error_set(error, RK_ERR_IO, "%s %.300s: %s; %s", what, path, strerror(errno),
                            advice);
    }
    memcpy(path, real, strlen(real) + 1);
    return RK_OK;
}

static bool is_given(const struct cluster_options *options, const char *name)
{
    for (uint32_t i = 0; i < cluster_num_settings; i++) {
        if (strcmp(cluster_setting_list[i].name, name) == 0) {
            return (options->given & 1u << i) != 0;
        }
    }
    return false;
}

static enum rk_status check_given(struct cluster_options *options, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    if (is_given(options, "model")) {
        status = absolute("model", "check --model", options->settings.model, error);
    }
    if (status == RK_OK && is_given(options, "head-map")) {
        status = absolute("head map", "check the path", options->settings.head_map, error);
    }
    return status;
}

static enum rk_status check_files(struct cluster_settings *settings, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    if (settings->num_workers > 0) {
        status =
            absolute("model", "give --model FILE or set REDKNOT_MODEL", settings->model, error);
    }
    if (status == RK_OK && settings->head_map[0]) {
        status = absolute("head map", "check the path", settings->head_map, error);
    }
    return status;
}

/* Each store looks only for itself, and takes its memory as it fills: together they may ask for
 * more than there is, and would end in the OOM killer. */
static enum rk_status check_memory(const struct cluster_settings *settings, struct rk_error *error)
{
    uint64_t bytes = 0;
    struct rk_limits limits;
    rk_limits_read(&limits);
    enum rk_status status = rk_size_parse(settings->dram, &bytes, error);
    if (status != RK_OK || bytes <= limits.memory_bytes / settings->num_stores) {
        return status;
    }
    return rk_error_set(error, RK_ERR_NO_MEMORY,
                        "--dram %s for --stores %u, and %llu MiB are available (%s); ask for less",
                        settings->dram, settings->num_stores,
                        (unsigned long long)(limits.memory_bytes >> 20), limits.memory_by);
}

/* Those that do not run; then those that do are asked, too. */
static enum rk_status start_missing(struct cluster *cluster, const struct cluster_options *options,
                                    int64_t deadline_ns, bool started[CLUSTER_PROCESSES_MAX],
                                    struct rk_error *error)
{
    enum rk_status status = RK_OK;
    for (uint32_t i = 0; i < cluster->num_processes && status == RK_OK; i++) {
        struct cluster_process *process = &cluster->processes[i];
        if (!process_runs(process)) {
            process->pid = 0;
            status = start_process(cluster, process, error);
            started[i] = process->pid != 0;
            say(options->verbose && started[i], "starting %s (process %d) at %s, log %s",
                process->node_id, (int)process->pid, process->address, process->log);
        }
        if (i == 0 && status == RK_OK) { /* The others register with it. */
            status = cluster_wait_serving(
                cluster, process, started[0] ? deadline_ns : rk_deadline_in_ms(ANSWER_MS), error);
        }
    }
    for (uint32_t i = 1; i < cluster->num_processes && status == RK_OK; i++) {
        status =
            cluster_wait_serving(cluster, &cluster->processes[i],
                                 started[i] ? deadline_ns : rk_deadline_in_ms(ANSWER_MS), error);
    }
    if (status == RK_OK) {
        status = cluster_wait_registered(cluster, NULL, deadline_ns, error);
    }
    for (uint32_t i = 0; i < cluster->num_processes && status == RK_OK; i++) {
        if (!process_runs(&cluster->processes[i])) { /* It may have ended since it answered. */
            status = rk_error_set(error, RK_ERR_INTERNAL, "%s ended again; its log is %s",
                                  cluster->processes[i].node_id, cluster->processes[i].log);
        }
    }
    return status;
}

static void stop_started(struct cluster *cluster, const bool started[CLUSTER_PROCESSES_MAX])
{
    struct rk_error error;
    for (uint32_t i = cluster->num_processes; i-- > 0;) {
        int pidfd = started[i] ? process_open(&cluster->processes[i]) : -1;
        if (pidfd >= 0) {
            process_terminate(pidfd);
            stop_wait(&cluster->processes[i], pidfd, rk_deadline_in_ms(RESTART_STOP_MS));
        } else if (started[i]) {
            cluster->processes[i].pid = 0;
        }
    }
    process_reap();
    if (cluster_save(cluster, &error) != RK_OK) {
        (void)cli_fail("%s", error.text);
    }
}

/* What is there: nothing (RK_ERR_NOT_FOUND), or a cluster that runs, whose settings count. */
static enum rk_status look(const struct cluster_options *options, struct cluster *cluster,
                           struct rk_error *error)
{
    char text[64];
    enum rk_status status = state_read(cluster, error);
    if (status == RK_ERR_CORRUPT || status == RK_ERR_NOT_FOUND) {
        cluster_find_strays(cluster);
        if (cluster_num_running(cluster) > 0) {
            return rk_error_set(error, RK_ERR_EXISTS,
                                "%.300s: %u processes run there, and what was kept about them is "
                                "%s; `redknot down --dir %.100s` stops them",
                                cluster->dir, cluster_num_running(cluster),
                                status == RK_ERR_CORRUPT ? "damaged" : "gone", cluster->dir);
        }
        return RK_ERR_NOT_FOUND;
    }
    if (status != RK_OK) {
        return status;
    }
    if (cluster_num_running(cluster) == 0) {
        return RK_ERR_NOT_FOUND;
    }
    if (!cluster->has_settings) {
        return rk_error_set(error, RK_ERR_EXISTS,
                            "%.300s: a cluster of an older version runs there; `redknot down "
                            "--dir %.100s` first",
                            cluster->dir, cluster->dir);
    }
    const struct cluster_setting *other =
        cluster_settings_differ(&options->settings, &cluster->settings, options->given);
    if (other) {
        cluster_setting_text(other, &cluster->settings, text, sizeof(text));
        return rk_error_set(error, RK_ERR_EXISTS,
                            "%.300s: the cluster that runs there has --%s \"%s\"; leave the option "
                            "out, or `redknot down --dir %.100s` first",
                            cluster->dir, other->name, text, cluster->dir);
    }
    return RK_OK;
}

static enum rk_status start_in_folder(struct cluster_options *options, int timeout_ms,
                                      struct cluster *cluster, uint32_t *ret_started,
                                      struct rk_error *error)
{
    bool started[CLUSTER_PROCESSES_MAX] = {false};
    enum rk_status status = look(options, cluster, error);
    bool is_new = status == RK_ERR_NOT_FOUND;
    if (is_new) {
        status = check_files(&options->settings, error);
    }
    if (is_new && status == RK_OK) {
        status = check_memory(&options->settings, error);
    }
    if (is_new && status == RK_OK) {
        status = plan(cluster, options, error);
    }
    if (status == RK_OK) {
        status = folder_make(cluster->folder, "logs", error);
    }
    if (status == RK_OK) {
        status = folder_make(cluster->folder, "coordinator", error);
    }
    if (status != RK_OK) {
        cluster_close(cluster);
        return status;
    }
    status = start_missing(cluster, options, rk_deadline_in_ms(timeout_ms), started, error);
    if (status != RK_OK && is_new) {
        (void)cluster_stop(cluster, RESTART_STOP_MS, false);
    } else if (status != RK_OK) {
        stop_started(cluster, started);
        cluster_close(cluster);
    }
    *ret_started = 0;
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        *ret_started += started[i] ? 1 : 0;
    }
    return status;
}

enum rk_status cluster_start(const struct cluster_options *options, int timeout_ms,
                             struct cluster *ret_cluster, uint32_t *ret_started,
                             struct rk_error *error)
{
    struct cluster_options *absolute_options = rk_alloc(sizeof(*absolute_options));
    if (!absolute_options) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    *absolute_options = *options;
    enum rk_status status = check_given(absolute_options, error); /* Before a folder is made. */
    if (status == RK_OK) {
        status = open_folder(options->dir, true, true, ret_cluster, error);
    }
    if (status == RK_OK) {
        status = start_in_folder(absolute_options, timeout_ms, ret_cluster, ret_started, error);
    }
    rk_free(absolute_options);
    return status;
}

enum rk_status cluster_restart(struct cluster *cluster, struct cluster_process *process,
                               int timeout_ms, struct rk_error *error)
{
    int pidfd = process_open(process);
    if (pidfd >= 0) {
        process_terminate(pidfd);
        stop_wait(process, pidfd, rk_deadline_in_ms(RESTART_STOP_MS));
    }
    process->pid = 0;
    enum rk_status status = start_process(cluster, process, error);
    return status == RK_OK
               ? cluster_wait_serving(cluster, process, rk_deadline_in_ms(timeout_ms), error)
               : status;
}
