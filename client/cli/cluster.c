#include "client/cli/cli_internal.h"
#include "client/cli/cluster_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/service.h"
#include "common/rpc/rpc.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "redknot/v1/coordinator.pb-c.h"
#include "redknot/v1/kvstore.pb-c.h"
#include "redknot/v1/worker.pb-c.h"

#define PORT_STORES       (RK_PORT_STORE - RK_PORT_COORDINATOR)
#define PORT_WORKERS      (RK_PORT_WORKER - RK_PORT_COORDINATOR)
#define PROBE_TIMEOUT_MS  1000
#define PROBE_INTERVAL_MS 50
#define LOG_TAIL_LINES    6
#define ARGUMENTS_MAX     32
#define STATE_VERSION     1
#define UNIX_SOCKET_BYTES 100 /* sun_path has 108 */

const char *cluster_role_name(enum cluster_role role)
{
    static const char *const names[] = {"coordinator", "store", "worker"};
    return names[role];
}

static const char *const programs[] = {"redknot-coordinator", "redknot-kvstore", "redknot-worker"};

void cluster_default_dir(char ret_dir[PATH_MAX])
{
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    if (runtime && runtime[0] == '/') {
        (void)snprintf(ret_dir, PATH_MAX, "%s/redknot/cluster", runtime);
    } else {
        (void)snprintf(ret_dir, PATH_MAX, "/tmp/redknot-%u/cluster", (unsigned)getuid());
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

static bool port_free(uint16_t port)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return false;
    }
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons(port),
                                  .sin_addr = {.s_addr = htonl(INADDR_LOOPBACK)}};
    bool is_free = bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0;
    (void)close(fd);
    return is_free;
}

static bool ports_free(uint16_t base, uint32_t first, uint32_t count)
{
    for (uint32_t i = first; i < first + count; i++) {
        if (!port_free((uint16_t)(base + i)) ||
            !port_free((uint16_t)(base + i + RK_PORTS_METRICS))) {
            return false;
        }
    }
    return true;
}

uint16_t cluster_free_ports(uint32_t num_stores, uint32_t num_workers)
{
    for (int i = 0; i < 50; i++) {
        uint16_t random = 0;
        if (getrandom(&random, sizeof(random), 0) != sizeof(random)) {
            return 0;
        }
        uint16_t base = (uint16_t)(20000 + random % 10000); /* Below the ephemeral ports. */
        if (ports_free(base, 0, 1) && ports_free(base, PORT_STORES, num_stores) &&
            ports_free(base, PORT_WORKERS, num_workers)) {
            return base;
        }
    }
    return 0;
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
    return json_pack("{s:i, s:s, s:s, s:o}", "version", STATE_VERSION, "dir", cluster->dir,
                     "coordinator", cluster->processes[0].address, "processes", rows);
}

static enum rk_status cluster_save(const struct cluster *cluster, struct rk_error *error)
{
    char path[PATH_MAX + 32];
    char temporary[PATH_MAX + 32];
    (void)snprintf(path, sizeof(path), "%s/cluster.json", cluster->dir);
    (void)snprintf(temporary, sizeof(temporary), "%s/cluster.json.new", cluster->dir);
    json_t *object = cluster_to_json(cluster);
    int rc = json_dump_file(object, temporary, JSON_INDENT(2));
    json_decref(object);
    if (rc != 0 || rename(temporary, path) != 0) {
        return rk_error_set(error, RK_ERR_IO, "%s: cannot write it: %s", path, strerror(errno));
    }
    return RK_OK;
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

static bool process_from_json(const json_t *row, struct cluster_process *process)
{
    json_int_t kind = json_integer_value(json_object_get(row, "kind"));
    process->role = (enum cluster_role)kind;
    process->pid = (pid_t)json_integer_value(json_object_get(row, "pid"));
    process->start_time = (uint64_t)json_integer_value(json_object_get(row, "start_time"));
    return kind >= CLUSTER_COORDINATOR && kind <= CLUSTER_WORKER && process->pid > 1 &&
           copy_string(row, "node_id", process->node_id, sizeof(process->node_id)) &&
           copy_string(row, "program", process->program, sizeof(process->program)) &&
           copy_string(row, "address", process->address, sizeof(process->address)) &&
           copy_string(row, "metrics", process->metrics, sizeof(process->metrics)) &&
           copy_string(row, "log", process->log, sizeof(process->log));
}

enum rk_status cluster_load(const char *dir, struct cluster *ret_cluster, struct rk_error *error)
{
    char path[PATH_MAX + 32];
    (void)snprintf(path, sizeof(path), "%s/cluster.json", dir);
    if (access(path, F_OK) != 0 && errno == ENOENT) {
        return rk_error_set(error, RK_ERR_NOT_FOUND, "%s: no cluster was started there", dir);
    }
    json_error_t why;
    json_t *object = json_load_file(path, 0, &why);
    if (!object) {
        return rk_error_set(error, RK_ERR_CORRUPT, "%s: line %d: %s", path, why.line, why.text);
    }
    memset(ret_cluster, 0, sizeof(*ret_cluster));
    (void)snprintf(ret_cluster->dir, sizeof(ret_cluster->dir), "%s", dir);
    json_t *rows = json_object_get(object, "processes");
    size_t count = json_array_size(rows);
    bool good = json_integer_value(json_object_get(object, "version")) == STATE_VERSION &&
                count <= CLUSTER_PROCESSES_MAX;
    for (size_t i = 0; i < count && good; i++) {
        good = process_from_json(json_array_get(rows, i),
                                 &ret_cluster->processes[ret_cluster->num_processes++]);
    }
    json_decref(object);
    if (!good) {
        return rk_error_set(error, RK_ERR_CORRUPT,
                            "%s: not written by this version; stop its processes, then remove it",
                            path);
    }
    return RK_OK;
}

uint32_t cluster_num_running(const struct cluster *cluster)
{
    uint32_t running = 0;
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        int pidfd = process_open(&cluster->processes[i]);
        if (pidfd >= 0) {
            running++;
            (void)close(pidfd);
        }
    }
    return running;
}

/* ---- Stop ---- */

static uint32_t stop_role(struct cluster *cluster, enum cluster_role role, int64_t deadline_ns)
{
    int pidfds[CLUSTER_PROCESSES_MAX];
    uint32_t running = 0;
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        pidfds[i] = -1;
        if (cluster->processes[i].role == role) {
            pidfds[i] = process_open(&cluster->processes[i]);
        }
        if (pidfds[i] >= 0) {
            running++;
            (void)pidfd_send_signal(pidfds[i], SIGTERM, NULL, 0);
        }
    }
    for (uint32_t i = 0; i < cluster->num_processes; i++) {
        if (pidfds[i] < 0) {
            continue;
        }
        if (!process_wait(pidfds[i], deadline_ns)) {
            (void)cli_fail("%s (pid %d) did not stop in time and was killed; its log is %s",
                           cluster->processes[i].node_id, (int)cluster->processes[i].pid,
                           cluster->processes[i].log);
            (void)pidfd_send_signal(pidfds[i], SIGKILL, NULL, 0);
            (void)process_wait(pidfds[i], rk_deadline_in_ms(2000));
        }
        (void)close(pidfds[i]);
        cluster->processes[i].pid = 0;
    }
    process_reap();
    return running;
}

uint32_t cluster_stop(struct cluster *cluster, int timeout_ms)
{
    char path[PATH_MAX + 32];
    uint32_t running = 0;
    for (int role = CLUSTER_WORKER; role >= CLUSTER_COORDINATOR; role--) {
        running += stop_role(cluster, (enum cluster_role)role, rk_deadline_in_ms(timeout_ms));
    }
    (void)snprintf(path, sizeof(path), "%s/cluster.json", cluster->dir);
    (void)unlink(path);
    return running;
}

/* ---- Start ---- */

static enum rk_status make_directories(const char *dir, struct rk_error *error)
{
    static const char *const parts[] = {"", "/logs", "/coordinator"};
    char path[PATH_MAX + 32];
    (void)snprintf(path, sizeof(path), "%s", dir);
    for (char *at = strchr(path + 1, '/'); at; at = strchr(at + 1, '/')) {
        *at = 0;
        (void)mkdir(path, 0700); /* What is wrong shows at the last one. */
        *at = '/';
    }
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        struct stat info;
        (void)snprintf(path, sizeof(path), "%s%s", dir, parts[i]);
        if (mkdir(path, 0700) != 0 && errno != EEXIST) {
            return rk_error_set(error, RK_ERR_IO, "%s: %s; choose another with --dir", path,
                                strerror(errno));
        }
        if (stat(path, &info) != 0 || !S_ISDIR(info.st_mode) || info.st_uid != getuid()) {
            return rk_error_set(error, RK_ERR_IO,
                                "%s: not a directory of yours; choose another with --dir", path);
        }
    }
    return RK_OK;
}

static enum rk_status process_name(const struct cluster_options *options, const char *bin,
                                   enum cluster_role role, uint32_t index, struct cluster *cluster,
                                   struct cluster_process **ret_process, struct rk_error *error)
{
    struct cluster_process *process = &cluster->processes[cluster->num_processes];
    static const uint16_t first[] = {0, PORT_STORES, PORT_WORKERS};
    unsigned port = options->base_port + first[role] + index;
    memset(process, 0, sizeof(*process));
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
    char log[PATH_MAX + 64];
    int program = snprintf(process->program, PATH_MAX, "%s/%s", bin, programs[role]);
    int length = snprintf(log, sizeof(log), "%s/logs/%s.log", cluster->dir, process->node_id);
    if (program >= PATH_MAX || length >= PATH_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%s: the path is too long", cluster->dir);
    }
    memcpy(process->log, log, (size_t)length + 1);
    *ret_process = process;
    return RK_OK;
}

struct arguments {
    char *argv[ARGUMENTS_MAX];
    int argc;
};

static void add(struct arguments *arguments, const char *option, const char *value)
{
    RK_ASSERT(arguments->argc + 2 < ARGUMENTS_MAX);
    arguments->argv[arguments->argc++] = (char *)option;
    if (value) {
        arguments->argv[arguments->argc++] = (char *)value;
    }
    arguments->argv[arguments->argc] = NULL;
}

static enum rk_status start_process(const struct cluster_options *options, const char *bin,
                                    enum cluster_role role, uint32_t index, struct cluster *cluster,
                                    struct rk_error *error)
{
    struct cluster_process *process = NULL;
    char path[PATH_MAX + 64];
    char threads[16];
    enum rk_status status = process_name(options, bin, role, index, cluster, &process, error);
    if (status != RK_OK) {
        return status;
    }
    struct arguments arguments = {.argc = 0};
    add(&arguments, process->program, NULL);
    add(&arguments, "--listen", process->address);
    add(&arguments, "--metrics", process->metrics);
    if (role == CLUSTER_COORDINATOR) {
        (void)snprintf(path, sizeof(path), "%s/coordinator", cluster->dir);
        add(&arguments, "--data", path);
    } else {
        add(&arguments, "--coordinator", cluster->processes[0].address);
        add(&arguments, "--node-id", process->node_id);
    }
    if (role == CLUSTER_STORE) {
        (void)snprintf(path, sizeof(path), "%s/%s.sock", cluster->dir, process->node_id);
        if (strlen(path) > UNIX_SOCKET_BYTES) {
            return rk_error_set(error, RK_ERR_TOO_LONG,
                                "%s: longer than a Unix socket may be; choose a shorter --dir",
                                path);
        }
        add(&arguments, "--dram", options->dram);
        add(&arguments, "--shm-socket", path);
    }
    if (role == CLUSTER_WORKER) {
        long processors = sysconf(_SC_NPROCESSORS_ONLN);
        uint32_t shared = (uint32_t)(processors > 0 ? processors : 1) / options->num_workers;
        (void)snprintf(threads, sizeof(threads), "%u",
                       options->threads ? options->threads
                       : shared         ? shared
                                        : 1);
        add(&arguments, "--model", options->model);
        add(&arguments, "--threads", threads);
        add(&arguments, "--mode", options->mode);
        if (options->head_map) {
            add(&arguments, "--head-map", options->head_map);
        }
    }
    status = process_spawn(process, arguments.argv, error);
    if (status == RK_OK) {
        cluster->num_processes++;
        status = cluster_save(cluster, error); /* At once: `down` finds it whatever comes. */
    }
    return status;
}

/* The last lines of a log, for a process that did not come up. */
static void print_log_tail(const struct cluster_process *process)
{
    char text[4096];
    int fd = open(process->log, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return;
    }
    off_t end = lseek(fd, 0, SEEK_END);
    off_t begin = end > (off_t)sizeof(text) ? end - (off_t)sizeof(text) : 0;
    ssize_t bytes = end >= 0 ? pread(fd, text, sizeof(text), begin) : -1;
    (void)close(fd);
    if (bytes <= 0) {
        return;
    }
    ssize_t from = bytes;
    for (int lines = 0; from > 0; from--) {
        if (text[from - 1] == '\n' && from != bytes && ++lines == LOG_TAIL_LINES) {
            break;
        }
    }
    (void)fprintf(stderr, "%s (%s) said last:\n%.*s", process->node_id, process->log,
                  (int)(bytes - from), text + from);
    if (text[bytes - 1] != '\n') {
        (void)fputc('\n', stderr);
    }
}

/* Its own status call: who answers it serves. */
static bool process_serves(const struct cluster_process *process)
{
    static const Redknot__V1__StatusRequest coordinator = REDKNOT__V1__STATUS_REQUEST__INIT;
    static const Redknot__V1__StoreStatusRequest store = REDKNOT__V1__STORE_STATUS_REQUEST__INIT;
    static const Redknot__V1__WorkerStatusRequest worker = REDKNOT__V1__WORKER_STATUS_REQUEST__INIT;
    static const struct {
        const char *path;
        const ProtobufCMessage *request;
        const ProtobufCMessageDescriptor *type;
    } probes[] = {
        {"/redknot.v1.Coordinator/Status", &coordinator.base,
         &redknot__v1__status_reply__descriptor},
        {"/redknot.v1.KvStore/StoreStatus", &store.base,
         &redknot__v1__store_status_reply__descriptor},
        {"/redknot.v1.Worker/WorkerStatus", &worker.base,
         &redknot__v1__worker_status_reply__descriptor},
    };
    struct rk_rpc_channel *channel = NULL;
    ProtobufCMessage *reply = NULL;
    struct rk_error error = {.status = RK_OK};
    enum rk_status status = rk_rpc_channel_create(process->address, &channel, &error);
    if (status == RK_OK) {
        status = rk_rpc_unary(channel, probes[process->role].path, probes[process->role].request,
                              probes[process->role].type, PROBE_TIMEOUT_MS, &reply, &error);
    }
    rk_rpc_message_free(reply);
    rk_rpc_channel_destroy(channel);
    return status == RK_OK;
}

/* Until it serves, and, but for the coordinator itself, until the coordinator counts it alive. */
static enum rk_status wait_serving(const struct cluster_process *process, int64_t deadline_ns,
                                   struct rk_error *error)
{
    for (;;) {
        int pidfd = process_open(process);
        if (pidfd < 0) {
            process_reap();
            print_log_tail(process);
            return rk_error_set(error, RK_ERR_INTERNAL, "%s ended at once; %s says why",
                                process->node_id, process->log);
        }
        (void)close(pidfd);
        if (process_serves(process)) {
            return RK_OK;
        }
        if (cli_interrupted()) {
            return rk_error_set(error, RK_ERR_CANCELLED, "interrupted");
        }
        if (rk_clock_ns() >= deadline_ns) {
            print_log_tail(process);
            return rk_error_set(error, RK_ERR_DEADLINE, "%s does not serve at %s in time",
                                process->node_id, process->address);
        }
        rk_clock_sleep_ms(PROBE_INTERVAL_MS);
    }
}

static bool counted_alive(const struct rk_cluster_status *status,
                          const struct cluster_process *process)
{
    for (size_t i = 0; i < status->num_nodes; i++) {
        if (strcmp(status->nodes[i].node_id, process->node_id) == 0) {
            return status->nodes[i].alive;
        }
    }
    return false;
}

/* Name of a node that the coordinator does not count as alive; NULL: it counts all. */
static const char *missing_node(const struct cluster *cluster, struct rk_client *client)
{
    struct rk_cluster_status status;
    struct rk_error error = {.status = RK_OK};
    const char *missing = NULL;
    if (rk_client_status(client, 0, &status, &error) != RK_OK) {
        return "coordinator";
    }
    for (uint32_t i = 1; i < cluster->num_processes && !missing; i++) {
        if (!counted_alive(&status, &cluster->processes[i])) {
            missing = cluster->processes[i].node_id;
        }
    }
    rk_cluster_status_clear(&status);
    return missing;
}

static enum rk_status wait_registered(const struct cluster *cluster, int64_t deadline_ns,
                                      struct rk_error *error)
{
    struct rk_client_options options = {.coordinator = cluster->processes[0].address};
    struct rk_client *client = NULL;
    enum rk_status status = rk_client_create(&options, &client, error);
    if (status != RK_OK) {
        return status;
    }
    const char *missing = NULL;
    while ((missing = missing_node(cluster, client)) && status == RK_OK) {
        if (cli_interrupted()) {
            status = rk_error_set(error, RK_ERR_CANCELLED, "interrupted");
        } else if (rk_clock_ns() >= deadline_ns) {
            status = rk_error_set(error, RK_ERR_DEADLINE,
                                  "%s did not register with the coordinator in time", missing);
        } else {
            rk_clock_sleep_ms(PROBE_INTERVAL_MS);
        }
    }
    rk_client_destroy(client);
    return status;
}

static enum rk_status start_all(const struct cluster_options *options, const char *bin,
                                int64_t deadline_ns, struct cluster *cluster,
                                struct rk_error *error)
{
    enum rk_status status = start_process(options, bin, CLUSTER_COORDINATOR, 0, cluster, error);
    if (status == RK_OK) {
        status = wait_serving(&cluster->processes[0], deadline_ns, error);
    }
    for (uint32_t i = 0; i < options->num_stores && status == RK_OK; i++) {
        status = start_process(options, bin, CLUSTER_STORE, i, cluster, error);
    }
    for (uint32_t i = 0; i < options->num_workers && status == RK_OK; i++) {
        status = start_process(options, bin, CLUSTER_WORKER, i, cluster, error);
    }
    for (uint32_t i = 1; i < cluster->num_processes && status == RK_OK; i++) {
        status = wait_serving(&cluster->processes[i], deadline_ns, error);
    }
    return status == RK_OK ? wait_registered(cluster, deadline_ns, error) : status;
}

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

enum rk_status cluster_start(const struct cluster_options *options, int timeout_ms,
                             struct cluster *ret_cluster, struct rk_error *error)
{
    char bin[PATH_MAX];
    enum rk_status status = own_directory(bin, error);
    if (status == RK_OK && access(options->model, R_OK) != 0) {
        status =
            rk_error_set(error, RK_ERR_IO, "model %s: %s; give --model FILE or set REDKNOT_MODEL",
                         options->model, strerror(errno));
    }
    if (status == RK_OK && options->head_map && access(options->head_map, R_OK) != 0) {
        status = rk_error_set(error, RK_ERR_IO, "head map %s: %s; check the path",
                              options->head_map, strerror(errno));
    }
    if (status == RK_OK) {
        status = make_directories(options->dir, error);
    }
    if (status != RK_OK) {
        return status;
    }
    status = cluster_load(options->dir, ret_cluster, error);
    if (status == RK_OK && cluster_num_running(ret_cluster) > 0) {
        return rk_error_set(error, RK_ERR_EXISTS,
                            "%s: %u processes run there already; `redknot down --dir %s` first",
                            options->dir, cluster_num_running(ret_cluster), options->dir);
    }
    memset(ret_cluster, 0, sizeof(*ret_cluster)); /* What was there is gone or unreadable. */
    if (!realpath(options->dir, ret_cluster->dir)) {
        return rk_error_set(error, RK_ERR_IO, "%s: %s", options->dir, strerror(errno));
    }
    status = start_all(options, bin, rk_deadline_in_ms(timeout_ms), ret_cluster, error);
    if (status != RK_OK) {
        (void)cluster_stop(ret_cluster, 5000);
    }
    return status;
}
