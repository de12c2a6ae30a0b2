/* redknot-kvstore: one store node. */
#include "kvstore/service_internal.h"

#include "common/base/address.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "common/base/number.h"
#include "common/base/ports.h"
#include "common/base/service.h"
#include "common/base/text.h"

#include <argp.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define UCX_AUTO      "auto"
#define STOP_GRACE_MS 2000
#define PINS_WAIT_MS  2000
#define SOCKET_ADVICE                                                                              \
    "give --shm-socket PATH in a folder where this user may write, or --shm-socket '' for none"
#define MEMORY_BESIDE_BYTES (UINT64_C(2) << 30) /* address space of threads and libraries */

const char *argp_program_version = "redknot-kvstore " REDKNOT_VERSION;

enum option_key {
    OPTION_LISTEN = 0x100,
    OPTION_COORDINATOR,
    OPTION_DRAM,
    OPTION_SHM_SOCKET,
    OPTION_UCX,
    OPTION_METRICS,
    OPTION_NODE_ID,
    OPTION_CLUSTER,
    OPTION_ADVERTISE,
    OPTION_SHARDS_MAX,
    OPTION_STAGED_TTL,
    OPTION_SCRUB_RATE,
    OPTION_FAULT_INJECTION,
    OPTION_LOG_LEVEL,
};

struct settings {
    const char *listen;
    const char *coordinator;
    uint64_t dram_bytes;
    const char *shm_socket; /* NULL: the default; "": not served */
    const char *ucx;        /* NULL or "": not served; "auto" */
    const char *metrics;
    const char *node_id;
    const char *advertise;
    uint32_t shards_max;
    uint32_t staged_ttl_ms;
    uint64_t scrub_rate;
    bool fault_injection;
    enum rk_log_level log_level;
};

static const struct argp_option options[] = {
    {"listen", OPTION_LISTEN, "HOST:PORT", 0, "gRPC address (" RK_LISTEN_STORE "; port 0: any)", 0},
    {"coordinator", OPTION_COORDINATOR, "HOST:PORT", 0, "Register here (none: runs alone)", 0},
    {"dram", OPTION_DRAM, "SIZE", 0, "Memory for KV pages, reserved at start (1GiB)", 0},
    {"shm-socket", OPTION_SHM_SOCKET, "PATH", 0,
     "Unix socket for readers on this host; empty: none (under $XDG_RUNTIME_DIR or /tmp)", 0},
    {"ucx", OPTION_UCX, "HOST:PORT", 0,
     "UCX address for readers on other hosts, in a network without strangers; \"auto\": host of "
     "--listen, any port; empty: none (none)",
     0},
    {"metrics", OPTION_METRICS, "HOST:PORT", 0,
     "Prometheus metrics; empty: none (" RK_METRICS_STORE ")", 0},
    {"node-id", OPTION_NODE_ID, "NAME", 0, "Name in the cluster (made from the host's name)", 0},
    {"cluster", OPTION_CLUSTER, "ID", 0, "Register only with the coordinator of this cluster", 0},
    {"advertise", OPTION_ADVERTISE, "HOST:PORT", 0, "gRPC address for others (that of --listen)",
     0},
    {"shards-max", OPTION_SHARDS_MAX, "COUNT", 0, "Most shards held at once (65536)", 0},
    {"staged-ttl", OPTION_STAGED_TTL, "SECONDS", 0,
     "Drop what was written and not committed for so long (30)", 0},
    {"scrub-rate", OPTION_SCRUB_RATE, "SIZE", 0,
     "Verify stored pages at this rate a second; 0: never (64MiB)", 0},
    {"enable-fault-injection", OPTION_FAULT_INJECTION, NULL, 0,
     "For tests: SIGUSR1 flips a byte of the oldest shard, SIGUSR2 gives back pins that readers "
     "use",
     0},
    {"log-level", OPTION_LOG_LEVEL, "LEVEL", 0, "debug, info, warn or error (info)", 0},
    {0},
};

static uint64_t size_or_usage(const char *text, struct argp_state *state)
{
    uint64_t bytes = 0;
    struct rk_error error;
    if (rk_size_parse(text, &bytes, &error) != RK_OK) {
        argp_error(state, "%s", error.text);
    }
    return bytes;
}

static uint32_t count_or_usage(const char *option, const char *text, uint32_t max,
                               struct argp_state *state)
{
    uint64_t number = 0;
    struct rk_error error;
    if (rk_number_parse(option, text, 1, max, &number, &error) != RK_OK) {
        argp_error(state, "%s", error.text);
    }
    return (uint32_t)number;
}

static const char *address_or_usage(const char *text, enum rk_address_use use,
                                    struct argp_state *state)
{
    struct rk_error error;
    if (rk_address_check(text, use, &error) != RK_OK) {
        argp_error(state, "%s", error.text);
    }
    return text;
}

static void cluster_or_usage(const char *text, struct argp_state *state)
{
    struct rk_error error;
    if (rk_service_cluster_set(text, &error) != RK_OK) {
        argp_error(state, "%s", error.text);
    }
}

static error_t parse_option(int key, char *value, struct argp_state *state)
{
    struct settings *settings = state->input;
    struct rk_error error;
    switch (key) {
    case OPTION_LISTEN:
        settings->listen = address_or_usage(value, RK_ADDRESS_LISTEN, state);
        return 0;
    case OPTION_COORDINATOR:
        settings->coordinator = address_or_usage(value, RK_ADDRESS_CALL, state);
        return 0;
    case OPTION_DRAM:
        settings->dram_bytes = size_or_usage(value, state);
        if (settings->dram_bytes < KVSTORE_GRANULE_BYTES) {
            argp_error(state, "--dram must be at least %d bytes", KVSTORE_GRANULE_BYTES);
        }
        return 0;
    case OPTION_SHM_SOCKET:
        settings->shm_socket = value;
        return 0;
    case OPTION_UCX:
        settings->ucx = value[0] && strcmp(value, UCX_AUTO) != 0
                            ? address_or_usage(value, RK_ADDRESS_LISTEN, state)
                            : value;
        return 0;
    case OPTION_METRICS:
        settings->metrics = value[0] ? address_or_usage(value, RK_ADDRESS_LISTEN, state) : value;
        return 0;
    case OPTION_NODE_ID:
        settings->node_id = value;
        if (value[0] == '\0') {
            argp_error(state, "--node-id must have 1 to 255 bytes");
        }
        if (rk_text_check_name("--node-id", value, strlen(value), 255, &error) != RK_OK) {
            argp_error(state, "%s", error.text);
        }
        return 0;
    case OPTION_CLUSTER:
        cluster_or_usage(value, state);
        return 0;
    case OPTION_ADVERTISE:
        settings->advertise = address_or_usage(value, RK_ADDRESS_CALL, state);
        return 0;
    case OPTION_SHARDS_MAX:
        settings->shards_max = count_or_usage("--shards-max", value, 1u << 24, state);
        return 0;
    case OPTION_STAGED_TTL:
        settings->staged_ttl_ms = count_or_usage("--staged-ttl", value, 86400, state) * 1000;
        return 0;
    case OPTION_SCRUB_RATE:
        settings->scrub_rate = size_or_usage(value, state);
        return 0;
    case OPTION_FAULT_INJECTION:
        settings->fault_injection = true;
        return 0;
    case OPTION_LOG_LEVEL:
        if (!rk_log_level_parse(value, &settings->log_level)) {
            argp_error(state, "\"%s\" is not a log level", value);
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- Checks before anything is started ---- */

/* The arena is reserved for good, so asking for what is not there would end in the OOM killer. */
static enum rk_status memory_check(uint64_t bytes, struct rk_error *error)
{
    struct rk_limits limits;
    rk_limits_read(&limits);
    if (bytes > limits.memory_bytes) {
        return rk_error_set(
            error, RK_ERR_NO_MEMORY,
            "--dram asks for %llu MiB and %llu MiB are available (%s): ask for less",
            (unsigned long long)(bytes >> 20), (unsigned long long)(limits.memory_bytes >> 20),
            limits.memory_by);
    }
    return RK_OK;
}

/* A folder of ours that nobody else can enter: /tmp is everybody's. */
static enum rk_status socket_path_default(const char *node_id, uint64_t incarnation,
                                          char **ret_path, struct rk_error *error)
{
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    char *folder = runtime && runtime[0] == '/'
                       ? rk_alloc_format("%s/redknot", runtime)
                       : rk_alloc_format("/tmp/redknot-%u", (unsigned)geteuid());
    char *path = folder ? rk_alloc_format("%s/%s.sock", folder, node_id) : NULL;
    enum rk_status status = RK_OK;
    struct stat info;
    if (path && (strlen(path) > 107 || strchr(node_id, '/'))) {
        rk_free(path); /* Longer than a socket's address. */
        path = rk_alloc_format("%s/%016llx.sock", folder, (unsigned long long)incarnation);
    }
    if (!path) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a path");
    } else if (mkdir(folder, 0700) != 0 && errno != EEXIST) {
        status = rk_error_set(error, RK_ERR_IO, "cannot make %s: %s: " SOCKET_ADVICE, folder,
                              strerror(errno));
    } else if (lstat(folder, &info) != 0 || !S_ISDIR(info.st_mode) || info.st_uid != geteuid() ||
               (info.st_mode & 077) != 0) {
        status = rk_error_set(
            error, RK_ERR_IO,
            "%s is not a folder of this user alone: have it removed, or " SOCKET_ADVICE, folder);
    }
    rk_free(folder);
    if (status != RK_OK) {
        rk_free(path);
        return status;
    }
    *ret_path = path;
    return RK_OK;
}

/* Readers are told the path, and they are in other folders. */
static enum rk_status socket_path_absolute(const char *given, char **ret_path,
                                           struct rk_error *error)
{
    char here[PATH_MAX];
    bool relative = given[0] != '\0' && given[0] != '/';
    if (relative && !getcwd(here, sizeof(here))) {
        return rk_error_set(error, RK_ERR_IO, "--shm-socket %s: the folder here: %s", given,
                            strerror(errno));
    }
    char *path = relative ? rk_alloc_format("%s/%s", here, given) : rk_alloc_string(given);
    if (!path) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a path");
    }
    *ret_path = path;
    return RK_OK;
}

/* ---- The process ---- */

struct process {
    struct settings settings;
    char *node_id;
    uint64_t incarnation;
    char *shm_socket; /* "" when not served */
    char advertise[RK_ADDRESS_BYTES];
    char metrics_address[RK_ADDRESS_BYTES];
    struct kvstore *store;
    struct kvstore_service service;
    struct rk_rpc_server *rpc;
    char ucx_listen[RK_ADDRESS_BYTES];
    char ucx_address[RK_ADDRESS_BYTES]; /* for others; "" when not served */
    struct rk_shm_server *shm;
    struct rk_ucx_server *ucx;
    struct rk_metrics_server *metrics;
    struct upkeep *upkeep;
    struct registrar *registrar;
};

static enum rk_status names_make(struct process *process, struct rk_error *error)
{
    const struct settings *settings = &process->settings;
    process->incarnation = rk_service_incarnation();
    process->node_id =
        settings->node_id ? rk_alloc_string(settings->node_id) : rk_service_node_id("kvstore");
    if (!process->node_id) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the node's name");
    }
    if (!settings->shm_socket) {
        return socket_path_default(process->node_id, process->incarnation, &process->shm_socket,
                                   error);
    }
    return socket_path_absolute(settings->shm_socket, &process->shm_socket, error);
}

/* Ports first: what is cheap to refuse comes before gigabytes are reserved. */
static enum rk_status process_bind(struct process *process, struct rk_error *error)
{
    const struct settings *settings = &process->settings;
    struct rk_rpc_server_options rpc = {.address = settings->listen, .bind_wait_ms = 3000};
    enum rk_status status = rk_rpc_server_create(&rpc, &process->rpc, error);
    if (status != RK_OK) {
        return status;
    }
    if (settings->metrics[0] != '\0') {
        status = rk_metrics_server_start(settings->metrics, &process->metrics, error);
        if (status != RK_OK) {
            return status;
        }
        status = rk_address_with_port(settings->metrics, rk_metrics_server_port(process->metrics),
                                      process->metrics_address, error);
        if (status != RK_OK) {
            return status;
        }
    }
    if (settings->advertise) {
        snprintf(process->advertise, sizeof(process->advertise), "%s", settings->advertise);
        return RK_OK;
    }
    struct rk_address address;
    if (settings->coordinator &&
        rk_address_parse(settings->listen, RK_ADDRESS_LISTEN, &address, error) == RK_OK &&
        rk_address_is_any(&address)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "--listen %s is no address that others can call: give --advertise",
                            settings->listen);
    }
    return rk_address_with_port(settings->listen, rk_rpc_server_port(process->rpc),
                                process->advertise, error);
}

/* Where others reach it: as they reach the store, unless that is by IPv6, where it is not served.
 */
static enum rk_status ucx_announce(struct process *process, const char *listen,
                                   struct rk_error *error)
{
    bool ipv6 = process->advertise[0] == '[';
    return rk_address_with_port(ipv6 ? listen : process->advertise,
                                rk_ucx_server_port(process->ucx), process->ucx_address, error);
}

/* With "auto" a machine that cannot serve it only lacks this path, and says so. */
static enum rk_status ucx_start(struct process *process, struct rk_error *error)
{
    const struct settings *settings = &process->settings;
    const char *listen = settings->ucx;
    enum rk_status status = RK_OK;
    if (!listen || listen[0] == '\0') {
        return RK_OK;
    }
    bool any = strcmp(listen, UCX_AUTO) == 0;
    if (any) {
        status = rk_address_with_port(settings->listen, 0, process->ucx_listen, error);
        listen = process->ucx_listen;
    }
    if (status != RK_OK) {
        return status;
    }
    struct rk_ucx_server_options ucx = {.listen = listen,
                                        .arena = kvstore_arena(process->store),
                                        .node_id = process->node_id,
                                        .incarnation = process->incarnation,
                                        .ops = &kvstore_service_store_ops,
                                        .context = &process->service};
    status = rk_ucx_server_start(&ucx, &process->ucx, error);
    if (status != RK_OK && any) {
        RK_LOG_WARN("ucx_not_served", "reason=%q", error ? error->text : "");
        return RK_OK;
    }
    return status == RK_OK ? ucx_announce(process, listen, error) : status;
}

static enum rk_status process_store(struct process *process, struct rk_error *error)
{
    const struct settings *settings = &process->settings;
    struct kvstore_options store = {
        .dram_bytes = settings->dram_bytes / KVSTORE_GRANULE_BYTES * KVSTORE_GRANULE_BYTES,
        .shards_max = settings->shards_max,
        .staged_ttl_ms = settings->staged_ttl_ms,
    };
    enum rk_status status = memory_check(store.dram_bytes, error);
    if (status == RK_OK) {
        status = kvstore_create(&store, &process->store, error);
    }
    if (status != RK_OK) {
        return status;
    }
    kvstore_service_init(&process->service, process->store, process->node_id, process->incarnation);
    RK_ASSERT(process->shm_socket != NULL); /* names_make() made it. */
    status = ucx_start(process, error);
    if (status != RK_OK || process->shm_socket[0] == '\0') {
        return status;
    }
    struct rk_shm_server_options shm = {
        .socket_path = process->shm_socket,
        .arena_fd = kvstore_arena_fd(process->store),
        .arena_bytes = kvstore_arena_bytes(process->store),
        .num_seals = kvstore_num_seals(process->store),
        .node_id = process->node_id,
        .incarnation = process->incarnation,
        .ops = &kvstore_service_store_ops,
        .context = &process->service,
    };
    struct rk_error cause = {.text = ""};
    status = rk_shm_server_start(&shm, &process->shm, &cause);
    return status == RK_OK ? RK_OK
                           : rk_error_set(error, status, "%.300s: " SOCKET_ADVICE, cause.text);
}

static enum rk_status process_serve(struct process *process, struct rk_error *error)
{
    const struct settings *settings = &process->settings;
    enum rk_status status = kvstore_service_attach(&process->service, process->rpc);
    if (status == RK_OK) {
        status = rk_rpc_server_start(process->rpc);
    }
    if (status != RK_OK) {
        return rk_error_set(error, status, "cannot start the gRPC server: %s",
                            rk_status_text(status));
    }
    struct upkeep_options upkeep = {.store = process->store,
                                    .scrub_rate = settings->scrub_rate,
                                    .fault_injection = settings->fault_injection,
                                    .shm = process->shm};
    status = upkeep_start(&upkeep, &process->upkeep, error);
    if (status != RK_OK || !settings->coordinator) {
        return status;
    }
    struct registrar_options registrar = {.store = process->store,
                                          .coordinator = settings->coordinator,
                                          .node_id = process->node_id,
                                          .incarnation = process->incarnation,
                                          .grpc_address = process->advertise,
                                          .shm_socket = process->shm_socket,
                                          .ucx_address = process->ucx_address,
                                          .metrics_address = process->metrics_address};
    return registrar_start(&registrar, &process->registrar, error);
}

static void process_stop(struct process *process)
{
    registrar_stop(process->registrar);
    if (process->rpc) {
        rk_rpc_server_set_serving(process->rpc, false);
        rk_rpc_server_stop(process->rpc, STOP_GRACE_MS);
    }
    rk_rpc_server_destroy(process->rpc);
    rk_ucx_server_stop(process->ucx);
    upkeep_stop(process->upkeep);
    /* The last that can write has ended: what readers still look at is given to nobody any more. */
    rk_shm_server_stop(process->shm);
    rk_metrics_server_stop(process->metrics);
    bool pinned = process->store != NULL;
    int64_t deadline_ns = rk_deadline_in_ms(PINS_WAIT_MS);
    while (pinned && rk_deadline_left_ms(deadline_ns) > 0) {
        struct kvstore_stats stats;
        kvstore_stats_get(process->store, &stats);
        pinned = stats.num_pins > 0;
        if (pinned) {
            rk_clock_sleep_ms(5); /* gRPC lets go of sent pages in its own time. */
        }
    }
    if (!pinned) {
        kvstore_destroy(process->store);
    }
    rk_free(process->node_id);
    rk_free(process->shm_socket);
}

static enum rk_status process_start(struct process *process, struct rk_error *error)
{
    enum rk_status status = names_make(process, error);
    if (status == RK_OK) {
        status = process_bind(process, error);
    }
    if (status == RK_OK) {
        status = process_store(process, error);
    }
    if (status == RK_OK) {
        status = process_serve(process, error);
    }
    return status;
}

static void fault_signal_set(bool enabled)
{
    sigset_t signals;
    if (!enabled) {
        signal(SIGUSR1, SIG_IGN);
        signal(SIGUSR2, SIG_IGN);
        return;
    }
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    sigaddset(&signals, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
}

int main(int argc, char **argv)
{
    static struct process process = {.settings = {.listen = RK_LISTEN_STORE,
                                                  .dram_bytes = UINT64_C(1) << 30,
                                                  .metrics = RK_METRICS_STORE,
                                                  .scrub_rate = UINT64_C(64) << 20,
                                                  .log_level = RK_LOG_LEVEL_INFO}};
    static const struct argp argp = {
        options, parse_option, NULL, "A store node of RedKnot: holds KV-cache shards in memory.",
        NULL,    NULL,         NULL};
    struct rk_error error = {0};
    rk_service_init();
    argp_parse(&argp, argc, argv, 0, NULL, &process.settings);
    rk_log_init("kvstore", process.settings.log_level);
    fault_signal_set(process.settings.fault_injection);

    enum rk_status status =
        rk_service_check_limits(process.settings.dram_bytes + MEMORY_BESIDE_BYTES, &error);
    if (status == RK_OK) {
        status = process_start(&process, &error);
    }
    if (status != RK_OK) {
        fprintf(stderr, "redknot-kvstore: %s\n", error.text);
        process_stop(&process);
        return 1;
    }
    RK_LOG_INFO("ready", "node=%s address=%s dram_bytes=%llu shm_socket=%q ucx=%q metrics=%s",
                process.node_id, process.advertise,
                (unsigned long long)kvstore_arena_bytes(process.store), process.shm_socket,
                process.ucx_address, process.metrics_address);
    RK_LOG_INFO("stopping", "signal=%d", rk_service_wait());
    process_stop(&process);
    return 0;
}
