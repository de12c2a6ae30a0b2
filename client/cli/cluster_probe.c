/* Whether a process serves, is who it should be, and is counted by its coordinator. */
#include "client/cli/cli_internal.h"
#include "client/cli/cluster_internal.h"
#include "common/base/clock.h"
#include "common/rpc/rpc.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "redknot/v1/coordinator.pb-c.h"
#include "redknot/v1/kvstore.pb-c.h"
#include "redknot/v1/worker.pb-c.h"

#define PROBE_TIMEOUT_MS  1000
#define PROBE_INTERVAL_MS 50
#define PORT_WAIT_MS      3000
#define LAST_LINE_BYTES   240

/* Who says that it answers. */
struct answerer {
    char node_id[64];
    char cluster_id[RK_CLUSTER_ID_BYTES];
    pid_t pid;
};

static void answerer_fill(struct answerer *who, const char *node_id, const char *cluster_id,
                          uint32_t pid)
{
    (void)snprintf(who->node_id, sizeof(who->node_id), "%s", node_id);
    (void)snprintf(who->cluster_id, sizeof(who->cluster_id), "%s", cluster_id);
    who->pid = (pid_t)pid;
}

static void answerer_read(enum cluster_role role, const ProtobufCMessage *message,
                          struct answerer *ret_who)
{
    if (role == CLUSTER_COORDINATOR) {
        const Redknot__V1__StatusReply *reply = (const Redknot__V1__StatusReply *)message;
        answerer_fill(ret_who, "coordinator", reply->cluster_id, reply->pid);
    } else if (role == CLUSTER_STORE) {
        const Redknot__V1__StoreStatusReply *reply = (const Redknot__V1__StoreStatusReply *)message;
        answerer_fill(ret_who, reply->node_id, reply->cluster_id, reply->pid);
    } else {
        const Redknot__V1__WorkerStatusReply *reply =
            (const Redknot__V1__WorkerStatusReply *)message;
        answerer_fill(ret_who, reply->node_id, reply->cluster_id, reply->pid);
    }
}

/* Its own status call: who answers it serves. */
static enum rk_status ask(const struct cluster_process *process, struct answerer *ret_who)
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
    if (status == RK_OK) {
        answerer_read(process->role, reply, ret_who);
    }
    rk_rpc_message_free(reply);
    rk_rpc_channel_destroy(channel);
    return status;
}

/* ---- What is said when it does not ---- */

/* The last line that it logged, without what a terminal would act on. */
static void last_line(const struct cluster_process *process, char ret_line[LAST_LINE_BYTES])
{
    char text[2048];
    int fd = open(process->log, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    off_t end = fd >= 0 ? lseek(fd, 0, SEEK_END) : -1;
    off_t begin = end > (off_t)sizeof(text) - 1 ? end - (off_t)sizeof(text) + 1 : 0;
    ssize_t bytes = end > 0 ? pread(fd, text, sizeof(text) - 1, begin) : 0;
    if (fd >= 0) {
        (void)close(fd);
    }
    bytes = bytes > 0 ? bytes : 0;
    while (bytes > 0 && text[bytes - 1] == '\n') {
        bytes--;
    }
    text[bytes] = 0;
    const char *line = strrchr(text, '\n');
    (void)snprintf(ret_line, LAST_LINE_BYTES, "%.*s", LAST_LINE_BYTES - 1, line ? line + 1 : text);
    for (char *at = ret_line; *at; at++) {
        *at = (unsigned char)*at < ' ' || *at == 127 ? ' ' : *at;
    }
}

static enum rk_status fail_ended(const struct cluster_process *process, struct rk_error *error)
{
    char line[LAST_LINE_BYTES];
    process_reap();
    last_line(process, line);
    return rk_error_set(error, RK_ERR_INTERNAL, "%s ended at once%s%s; its log is %.150s",
                        process->node_id, line[0] ? ", and said last: " : "", line, process->log);
}

static enum rk_status fail_late(const struct cluster_process *process, struct rk_error *error)
{
    char line[LAST_LINE_BYTES];
    last_line(process, line);
    if (proc_state(process->pid) == 'T') {
        return rk_error_set(
            error, RK_ERR_DEADLINE,
            "%s (process %d) is stopped by a signal; `kill -CONT %d` lets it go on, "
            "`redknot restart %s` replaces it",
            process->node_id, (int)process->pid, (int)process->pid, process->node_id);
    }
    return rk_error_set(error, RK_ERR_DEADLINE,
                        "%s (process %d) does not serve at %s in time%s%s; `redknot restart %s` "
                        "replaces it",
                        process->node_id, (int)process->pid, process->address,
                        line[0] ? ", and said last: " : "", line, process->node_id);
}

static enum rk_status fail_stranger(const struct cluster *cluster,
                                    const struct cluster_process *process,
                                    const struct answerer *who, struct rk_error *error)
{
    const char *of = strcmp(who->cluster_id, cluster->id) == 0 ? "this cluster"
                     : who->cluster_id[0]                      ? "another cluster"
                                                               : "no cluster that it tells";
    return rk_error_set(error, RK_ERR_EXISTS,
                        "%s: \"%.60s\" (process %d, of %s) answers there, and not %s that was "
                        "started as process %d; choose other ports with --base-port, or end it",
                        process->address, who->node_id, (int)who->pid, of, process->node_id,
                        (int)process->pid);
}

enum rk_status cluster_wait_serving(const struct cluster *cluster,
                                    const struct cluster_process *process, int64_t deadline_ns,
                                    struct rk_error *error)
{
    for (;;) {
        struct answerer who = {.pid = 0};
        if (!process_runs(process)) {
            return fail_ended(process, error);
        }
        if (ask(process, &who) == RK_OK) {
            bool same = who.pid == process->pid && strcmp(who.cluster_id, cluster->id) == 0 &&
                        strcmp(who.node_id, process->node_id) == 0;
            return same ? RK_OK : fail_stranger(cluster, process, &who, error);
        }
        if (cli_interrupted()) {
            return rk_error_set(error, RK_ERR_CANCELLED, "interrupted");
        }
        if (rk_clock_ns() >= deadline_ns) {
            return fail_late(process, error);
        }
        rk_clock_sleep_ms(PROBE_INTERVAL_MS);
    }
}

/* ---- Registered ---- */

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
static const char *missing_node(const struct cluster *cluster, const struct cluster_process *only,
                                struct rk_client *client)
{
    struct rk_cluster_status status;
    struct rk_error error = {.status = RK_OK};
    const char *missing = NULL;
    if (rk_client_status(client, 0, &status, &error) != RK_OK) {
        return "coordinator";
    }
    for (uint32_t i = 0; i < cluster->num_processes && !missing; i++) {
        const struct cluster_process *process = &cluster->processes[i];
        if (process->role != CLUSTER_COORDINATOR && (!only || only == process) &&
            !counted_alive(&status, process)) {
            missing = process->node_id;
        }
    }
    rk_cluster_status_clear(&status);
    return missing;
}

enum rk_status cluster_wait_registered(const struct cluster *cluster,
                                       const struct cluster_process *process, int64_t deadline_ns,
                                       struct rk_error *error)
{
    struct rk_client_options options = {.coordinator = cluster->processes[0].address,
                                        .metadata_timeout_ms = PROBE_TIMEOUT_MS};
    struct rk_client *client = NULL;
    enum rk_status status = rk_client_create(&options, &client, error);
    if (status != RK_OK) {
        return status;
    }
    const char *missing = NULL;
    while (status == RK_OK && (missing = missing_node(cluster, process, client))) {
        if (cli_interrupted()) {
            status = rk_error_set(error, RK_ERR_CANCELLED, "interrupted");
        } else if (rk_clock_ns() >= deadline_ns) {
            status = rk_error_set(error, RK_ERR_DEADLINE,
                                  "%s did not register with the coordinator in time; `redknot logs "
                                  "%s` says why",
                                  missing, missing);
        } else {
            rk_clock_sleep_ms(PROBE_INTERVAL_MS);
        }
    }
    rk_client_destroy(client);
    return status;
}

/* ---- Ports ---- */

/* As the daemons bind: connections of a predecessor that only linger are no obstacle. */
static bool port_free(uint16_t port)
{
    int one = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return false;
    }
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons(port),
                                  .sin_addr = {.s_addr = htonl(INADDR_LOOPBACK)}};
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    bool is_free =
        bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(fd, 1) == 0;
    (void)close(fd);
    return is_free;
}

struct owner {
    pid_t pid;
    char dir[PATH_MAX]; /* of the cluster that it is of; "" */
};

static void owner_visit(void *context, const struct proc_daemon *daemon)
{
    struct owner *owner = context;
    const char *logs = strstr(daemon->process.log, "/logs/");
    if (daemon->process.pid == owner->pid && logs) {
        (void)snprintf(owner->dir, sizeof(owner->dir), "%.*s", (int)(logs - daemon->process.log),
                       daemon->process.log);
    }
}

static enum rk_status check_port(const struct cluster_process *process, const char *what,
                                 const char *address, struct rk_error *error)
{
    struct owner owner = {.pid = 0};
    char who[160];
    const char *colon = strrchr(address, ':');
    unsigned long port = colon ? strtoul(colon + 1, NULL, 10) : 0;
    if (port == 0 || port > UINT16_MAX) {
        return RK_OK;
    }
    /* Of a predecessor that was killed the kernel has still to put the sockets away: nobody holds
     * them any more, or nobody listens. */
    int64_t deadline_ns = rk_deadline_in_ms(PORT_WAIT_MS);
    while (owner.pid == 0) {
        if (port_free((uint16_t)port)) {
            return RK_OK;
        }
        bool listens = proc_port_listener((uint16_t)port, &owner.pid);
        if (owner.pid > 0 && rk_clock_ns() < deadline_ns && proc_is_ending(owner.pid)) {
            owner.pid = 0; /* Its memory is gone already, its sockets go next. */
        }
        if (owner.pid == 0 && rk_clock_ns() >= deadline_ns) {
            if (!listens) {
                return RK_OK; /* The daemon waits some more, and says best what is wrong. */
            }
            break;
        }
        if (owner.pid == 0) {
            rk_clock_sleep_ms(PROBE_INTERVAL_MS);
        }
    }
    proc_each_daemon(owner_visit, &owner);
    proc_describe(owner.pid, who, sizeof(who));
    return rk_error_set(error, RK_ERR_EXISTS,
                        "port %lu, %s of %s, is taken by %s%s%.150s%s; choose other ports with "
                        "--base-port (and another folder with --dir), or end it",
                        port, what, process->node_id, who,
                        owner.dir[0] ? " of the cluster in " : "", owner.dir,
                        owner.dir[0] ? " (`redknot down --dir` stops that)" : "");
}

enum rk_status cluster_check_ports(const struct cluster_process *process, struct rk_error *error)
{
    enum rk_status status = check_port(process, "the gRPC port", process->address, error);
    return status == RK_OK ? check_port(process, "the metrics port", process->metrics, error)
                           : status;
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
        /* Below the ephemeral ports. */
        uint16_t base = (uint16_t)(20000 + rk_service_incarnation() % 10000);
        if (ports_free(base, 0, 1) &&
            ports_free(base, RK_PORT_STORE - RK_PORT_COORDINATOR, num_stores) &&
            ports_free(base, RK_PORT_WORKER - RK_PORT_COORDINATOR, num_workers)) {
            return base;
        }
    }
    return 0;
}
