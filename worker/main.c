/* redknot-worker: arguments, start in order, wait for a signal, stop in reverse. */
#include "client/kv_client.h"
#include "common/base/address.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "common/base/ports.h"
#include "common/base/service.h"
#include "common/base/text.h"
#include "common/metrics/metrics.h"
#include "common/rpc/rpc.h"
#include "worker/api/api.h"
#include "worker/engine/engine.h"
#include "worker/model/model.h"
#include "worker/recovery/head_map.h"
#include "worker/scheduler/scheduler.h"
#include "worker/tokenizer/tokenizer.h"

#include <argp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MEMORY_BYTES (UINT64_C(2) << 30) /* address space of threads and libraries */

struct arguments {
    const char *model;
    const char *listen;
    const char *advertise;
    const char *coordinator;
    const char *metrics;
    const char *node_id;
    const char *head_map;
    int log_level; /* enum rk_log_level */
    int mode;      /* enum kernels_mode; -1: the CPU's best */
    int isa;       /* enum kernels_isa */
    int path;      /* enum rk_path */
    uint32_t threads;
    uint32_t context_tokens;
    uint32_t pool_tokens;
    uint32_t requests_max;
    uint32_t queue_max;
    uint32_t fetch_timeout_ms;
    uint32_t holds_max;
};

enum option_key {
    KEY_LISTEN = 256,
    KEY_ADVERTISE,
    KEY_METRICS,
    KEY_NODE_ID,
    KEY_CLUSTER,
    KEY_HEAD_MAP,
    KEY_LOG_LEVEL,
    KEY_MODE,
    KEY_ISA,
    KEY_PATH,
    KEY_CONTEXT,
    KEY_POOL,
    KEY_REQUESTS,
    KEY_QUEUE,
    KEY_FETCH_TIMEOUT,
    KEY_HOLDS,
};

static const struct argp_option argp_options[] = {
    {"model", 'm', "FILE", 0, "Model, GGUF (required)", 0},
    {"listen", KEY_LISTEN, "HOST:PORT", 0, "gRPC address (" RK_LISTEN_WORKER ")", 0},
    {"advertise", KEY_ADVERTISE, "HOST:PORT", 0,
     "Address that others reach this worker at (the one it listens on)", 0},
    {"coordinator", 'c', "HOST:PORT", 0, "Coordinator; without it nothing is cached", 0},
    {"metrics", KEY_METRICS, "HOST:PORT", 0, "Metrics address; empty: none (" RK_METRICS_WORKER ")",
     0},
    {"node-id", KEY_NODE_ID, "ID", 0, "Name in the cluster (worker-<host>-<random>)", 0},
    {"cluster", KEY_CLUSTER, "ID", 0, "Register only with the coordinator of this cluster", 0},
    {"threads", 't', "N", 0, "Threads of the engine (as many as this process may use)", 0},
    {"mode", KEY_MODE, "bf16|f32", 0, "Precision (bf16 where the CPU is fast at it)", 0},
    {"isa", KEY_ISA, "NAME", 0,
     "Attention path: auto, reference, avx2, avx512, avx512_bf16, amx (auto)", 0},
    {"context", KEY_CONTEXT, "TOKENS", 0, "Longest context (the model's, at most 131072)", 0},
    {"pool-tokens", KEY_POOL, "TOKENS", 0,
     "Size of the KV page pool (twice the context, in half of the memory that is free)", 0},
    {"requests-max", KEY_REQUESTS, "N", 0, "Requests computed side by side (8)", 0},
    {"queue-max", KEY_QUEUE, "N", 0, "Requests that may wait (64)", 0},
    {"head-map", KEY_HEAD_MAP, "FILE", 0,
     "Head map, JSON: what each KV head's queries see at level fast", 0},
    {"path", KEY_PATH, "auto|shm|ucx|grpc", 0, "Read path from stores (auto: the nearest)", 0},
    {"fetch-timeout-ms", KEY_FETCH_TIMEOUT, "MS", 0,
     "So long a request waits for cached KV in all; the rest is a miss (2000)", 0},
    {"holds-max", KEY_HOLDS, "N", 0,
     "Segments that all requests may have fetched together; others wait (2048)", 0},
    {"log-level", KEY_LOG_LEVEL, "LEVEL", 0, "debug, info, warn or error (info)", 0},
    {0},
};

const char *argp_program_version = "redknot-worker " REDKNOT_VERSION;

static uint32_t parse_number(struct argp_state *state, const char *name, const char *text,
                             uint32_t min, uint32_t max)
{
    char *end = NULL;
    unsigned long value = strtoul(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || value < min || value > max) {
        argp_error(state, "%s %s: a number from %u to %u is needed", name, text, min, max);
    }
    return (uint32_t)value;
}

struct word {
    const char *word;
    int value;
};

static const struct word isa_words[] = {
    {"auto", KERNELS_ISA_AUTO},
    {"reference", KERNELS_ISA_REFERENCE},
    {"avx2", KERNELS_ISA_AVX2},
    {"avx512", KERNELS_ISA_AVX512},
    {"avx512_bf16", KERNELS_ISA_AVX512_BF16},
    {"amx", KERNELS_ISA_AMX},
    {NULL, 0},
};
static const struct word mode_words[] = {{"f32", KERNELS_F32}, {"bf16", KERNELS_BF16}, {NULL, 0}};
static const struct word path_words[] = {{"auto", RK_PATH_NONE},
                                         {"shm", RK_PATH_SHM},
                                         {"ucx", RK_PATH_UCX},
                                         {"grpc", RK_PATH_GRPC},
                                         {NULL, 0}};
static const struct word level_words[] = {{"debug", RK_LOG_LEVEL_DEBUG},
                                          {"info", RK_LOG_LEVEL_INFO},
                                          {"warn", RK_LOG_LEVEL_WARN},
                                          {"error", RK_LOG_LEVEL_ERROR},
                                          {NULL, 0}};

/* One word out of a list; its value. */
static int parse_word(struct argp_state *state, const char *name, const char *text,
                      const struct word *words)
{
    char list[128];
    size_t used = 0;
    for (size_t i = 0; words[i].word; i++) {
        if (strcmp(text, words[i].word) == 0) {
            return words[i].value;
        }
        int length =
            snprintf(list + used, sizeof(list) - used, "%s%s", i ? ", " : "", words[i].word);
        used += length > 0 && (size_t)length < sizeof(list) - used ? (size_t)length : 0;
    }
    argp_error(state, "%s %s: use one of %s", name, text, list);
    return 0;
}

static const char *parse_address(struct argp_state *state, const char *name, const char *text,
                                 enum rk_address_use use)
{
    struct rk_error error;
    if (rk_address_check(text, use, &error) != RK_OK) {
        argp_error(state, "%s: %s", name, error.text);
    }
    return text;
}

static const char *parse_node_id(struct argp_state *state, const char *text)
{
    struct rk_error error;
    if (text[0] == '\0') {
        argp_error(state, "--node-id must have 1 to 255 bytes");
    }
    if (rk_text_check_name("--node-id", text, strlen(text), 255, &error) != RK_OK) {
        argp_error(state, "%s", error.text);
    }
    return text;
}

/* What others are told must be an address that they can call. */
static void check_advertised(struct argp_state *state, const struct arguments *arguments)
{
    struct rk_address address;
    if (arguments->coordinator && !arguments->advertise &&
        rk_address_parse(arguments->listen, RK_ADDRESS_LISTEN, &address, NULL) == RK_OK &&
        rk_address_is_any(&address)) {
        argp_error(state, "--listen %s is no address that others can call: give --advertise",
                   arguments->listen);
    }
}

static void parse_cluster(struct argp_state *state, const char *text)
{
    struct rk_error error;
    if (rk_service_cluster_set(text, &error) != RK_OK) {
        argp_error(state, "%s", error.text);
    }
}

/* What only all options together can tell. */
static void check_together(struct argp_state *state, struct arguments *arguments)
{
    struct rk_error error;
    check_advertised(state, arguments);
    if (!arguments->model) {
        argp_error(state, "no model: give --model FILE.gguf");
    }
    if (arguments->mode < 0) {
        arguments->mode = (int)kernels_mode_default();
    }
    if (kernels_isa_check((enum kernels_isa)arguments->isa, (enum kernels_mode)arguments->mode,
                          &error) != RK_OK) {
        argp_error(state, "--isa: %s", error.text);
    }
    if (kernels_mode_check((enum kernels_mode)arguments->mode, &error) != RK_OK) {
        argp_error(state, "--mode: %s", error.text);
    }
}

static error_t parse_option(int key, char *text, struct argp_state *state)
{
    struct arguments *arguments = state->input;
    switch (key) {
    case 'm':
        arguments->model = text;
        break;
    case 'c':
        arguments->coordinator = parse_address(state, "--coordinator", text, RK_ADDRESS_CALL);
        break;
    case 't':
        arguments->threads = parse_number(state, "--threads", text, 1, 1024);
        break;
    case KEY_LISTEN:
        arguments->listen = parse_address(state, "--listen", text, RK_ADDRESS_LISTEN);
        break;
    case KEY_ADVERTISE:
        arguments->advertise = parse_address(state, "--advertise", text, RK_ADDRESS_CALL);
        break;
    case KEY_METRICS:
        arguments->metrics =
            text[0] ? parse_address(state, "--metrics", text, RK_ADDRESS_LISTEN) : text;
        break;
    case KEY_NODE_ID:
        arguments->node_id = parse_node_id(state, text);
        break;
    case KEY_CLUSTER:
        parse_cluster(state, text);
        break;
    case KEY_HEAD_MAP:
        arguments->head_map = text;
        break;
    case KEY_LOG_LEVEL:
        arguments->log_level = parse_word(state, "--log-level", text, level_words);
        break;
    case KEY_MODE:
        arguments->mode = parse_word(state, "--mode", text, mode_words);
        break;
    case KEY_ISA:
        arguments->isa = parse_word(state, "--isa", text, isa_words);
        break;
    case KEY_PATH:
        arguments->path = parse_word(state, "--path", text, path_words);
        break;
    case KEY_CONTEXT:
        arguments->context_tokens = parse_number(state, "--context", text, 64, 1 << 22);
        break;
    case KEY_POOL:
        arguments->pool_tokens = parse_number(state, "--pool-tokens", text, 64, 1 << 26);
        break;
    case KEY_REQUESTS:
        arguments->requests_max = parse_number(state, "--requests-max", text, 1, 32);
        break;
    case KEY_QUEUE:
        arguments->queue_max = parse_number(state, "--queue-max", text, 1, 65536);
        break;
    case KEY_FETCH_TIMEOUT:
        arguments->fetch_timeout_ms = parse_number(state, "--fetch-timeout-ms", text, 1, 600000);
        break;
    case KEY_HOLDS:
        arguments->holds_max = parse_number(state, "--holds-max", text, 1, 1 << 20);
        break;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", text);
        break;
    case ARGP_KEY_END:
        check_together(state, arguments);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

/* Everything that runs, in the order of its start. */
struct worker {
    struct engine *engine;
    struct tokenizer *tokenizer;
    struct recovery_head_map *head_map;
    struct rk_kv_client *kv;
    struct scheduler *scheduler;
    struct api *api;
    struct rk_rpc_server *server;
    struct rk_metrics_server *metrics;
    struct api_membership *membership;
    struct rk_id fingerprint;
    struct rk_id numeric_path;
    uint64_t incarnation;
    char *node_id;
    char address[RK_ADDRESS_BYTES];
    char metrics_address[RK_ADDRESS_BYTES]; /* "" when not served */
    char model_name[64];
    enum kernels_mode mode;
};

static const char *mode_name(const struct worker *worker)
{
    return worker->mode == KERNELS_BF16 ? "bf16" : "f32";
}

static enum rk_status load_model(struct worker *worker, const struct arguments *arguments,
                                 struct rk_error *error)
{
    struct engine_options options = {.threads = arguments->threads,
                                     .context_tokens = arguments->context_tokens,
                                     .pool_tokens = arguments->pool_tokens,
                                     .isa = (enum kernels_isa)arguments->isa,
                                     .mode = (enum kernels_mode)arguments->mode};
    worker->mode = options.mode;

    struct model *model = NULL;
    int64_t begin = rk_clock_ns();
    enum rk_status status = model_open(arguments->model, &model, error);
    if (status == RK_OK) {
        memcpy(worker->model_name, model_config(model)->name, sizeof(worker->model_name));
        worker->fingerprint =
            model_fingerprint(model, options.mode == KERNELS_BF16 ? RK_DTYPE_BF16 : RK_DTYPE_F32);
        status = tokenizer_create(model_vocabulary(model), &worker->tokenizer, error);
    }
    if (status == RK_OK) {
        status = tokenizer_check(worker->tokenizer, error);
    }
    if (status == RK_OK && arguments->head_map) {
        const struct model_config *config = model_config(model);
        status = recovery_head_map_load(arguments->head_map, config->num_layers,
                                        config->num_kv_heads, &worker->head_map, error);
    }
    if (status == RK_OK) {
        status = engine_create(model, &options, &worker->engine, error);
    }
    if (status == RK_OK) {
        status = engine_numeric_path(worker->engine, &worker->numeric_path, error);
    }
    model_close(model);
    if (status == RK_OK) {
        char id[RK_ID_HEX_BYTES];
        rk_id_to_hex(&worker->numeric_path, id);
        RK_LOG_INFO(
            "model_loaded",
            "model=%q file=%q mode=%s attention=%s numeric_path=%.16s arithmetic=%q seconds=%.3f",
            worker->model_name, arguments->model, mode_name(worker),
            engine_isa_name(worker->engine), id, engine_numeric_path_name(worker->engine),
            (double)(rk_clock_ns() - begin) * 1e-9);
    }
    return status;
}

static enum rk_status connect_cluster(struct worker *worker, const struct arguments *arguments,
                                      struct rk_error *error)
{
    if (!arguments->coordinator) {
        RK_LOG_WARN("no_coordinator", "effect=%q", "nothing is cached; give --coordinator");
        return RK_OK;
    }
    struct rk_kv_client_options options = {.coordinator = arguments->coordinator,
                                           .path = (enum rk_path)arguments->path};
    return rk_kv_client_create(&options, &worker->kv, error);
}

static enum rk_status start_serving(struct worker *worker, const struct arguments *arguments,
                                    struct rk_error *error)
{
    struct scheduler_options scheduler_options = {
        .engine = worker->engine,
        .tokenizer = worker->tokenizer,
        .jobs_active_max = arguments->requests_max,
    };
    struct rk_rpc_server_options server_options = {.address = arguments->listen,
                                                   .calls_max = 256,
                                                   .send_timeout_ms = 10000,
                                                   .bind_wait_ms = 3000};
    struct api_options options = {
        .node_id = worker->node_id,
        .model_name = worker->model_name,
        .incarnation = worker->incarnation,
        .fingerprint = worker->fingerprint,
        .numeric_path = worker->numeric_path,
        .engine = worker->engine,
        .mode = mode_name(worker),
        .threads = arguments->threads,
        .tokenizer = worker->tokenizer,
        .head_map = worker->head_map,
        .kv = worker->kv,
        .fetch_timeout_ms = (int)arguments->fetch_timeout_ms,
        .requests_max = arguments->requests_max,
        .queue_max = arguments->queue_max,
        .holds_max = arguments->holds_max,
    };
    enum rk_status status = scheduler_start(&scheduler_options, &worker->scheduler, error);
    if (status == RK_OK) {
        options.scheduler = worker->scheduler;
        status = api_create(&options, &worker->api, error);
    }
    if (status == RK_OK && arguments->metrics[0] != '\0') {
        status = rk_metrics_server_start(arguments->metrics, &worker->metrics, error);
    }
    if (status == RK_OK) {
        status = rk_rpc_server_create(&server_options, &worker->server, error);
    }
    if (status == RK_OK) {
        status = api_add_to_server(worker->api, worker->server);
    }
    if (status == RK_OK) {
        status = rk_rpc_server_start(worker->server);
    }
    return status;
}

static enum rk_status join_cluster(struct worker *worker, const struct arguments *arguments,
                                   struct rk_error *error)
{
    enum rk_status status = RK_OK;
    if (arguments->advertise) {
        (void)snprintf(worker->address, sizeof(worker->address), "%s", arguments->advertise);
    } else {
        status = rk_address_with_port(arguments->listen, rk_rpc_server_port(worker->server),
                                      worker->address, error);
    }
    if (status == RK_OK && worker->metrics) {
        status = rk_address_with_port(arguments->metrics, rk_metrics_server_port(worker->metrics),
                                      worker->metrics_address, error);
    }
    if (status != RK_OK) {
        return status;
    }
    RK_LOG_INFO("serving", "address=%s metrics=%s node=%s", worker->address,
                worker->metrics_address, worker->node_id);
    if (!arguments->coordinator) {
        return RK_OK;
    }
    struct api_membership_options options = {
        .coordinator = arguments->coordinator,
        .node_id = worker->node_id,
        .incarnation = worker->incarnation,
        .grpc_address = worker->address,
        .metrics_address = worker->metrics_address,
        .model_name = worker->model_name,
        .fingerprint = worker->fingerprint,
        .numeric_path = worker->numeric_path,
    };
    return api_membership_start(&options, &worker->membership, error);
}

static void stop_all(struct worker *worker)
{
    api_stop(worker->api);
    api_membership_stop(worker->membership);
    if (worker->server) {
        rk_rpc_server_stop(worker->server, 2000);
    }
    rk_rpc_server_destroy(worker->server);
    scheduler_stop(worker->scheduler);
    api_destroy(worker->api);
    rk_metrics_server_stop(worker->metrics);
    rk_kv_client_destroy(worker->kv);
    recovery_head_map_destroy(worker->head_map);
    tokenizer_destroy(worker->tokenizer);
    engine_destroy(worker->engine);
    rk_free(worker->node_id);
}

static enum rk_status start_all(struct worker *worker, const struct arguments *arguments,
                                struct rk_error *error)
{
    worker->incarnation = rk_service_incarnation();
    worker->node_id =
        arguments->node_id ? rk_alloc_string(arguments->node_id) : rk_service_node_id("worker");
    if (!worker->node_id) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the node's name");
    }
    enum rk_status status = load_model(worker, arguments, error);
    if (status == RK_OK) {
        status = connect_cluster(worker, arguments, error);
    }
    if (status == RK_OK) {
        status = start_serving(worker, arguments, error);
    }
    return status == RK_OK ? join_cluster(worker, arguments, error) : status;
}

/* Idle threads of the engine must not spin: several processes share the cores. libgomp reads its
 * environment before main, so the program starts itself once more. */
static void limit_spinning(char **argv)
{
    char path[4096];
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) {
        return;
    }
    ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
    if (length > 0) {
        path[length] = '\0';
        setenv("GOMP_SPINCOUNT", "20000", 1);
        execv(path, argv); /* Failing that, it runs as it is. */
    }
}

int main(int argc, char **argv)
{
    static const struct argp argp = {
        argp_options,
        parse_option,
        NULL,
        "Prefill and decode over KV segments, reused at any position.\v"
        "Example: redknot-worker --model SmolLM2.gguf --coordinator 127.0.0.1:7100",
        NULL,
        NULL,
        NULL};
    struct arguments arguments = {.listen = RK_LISTEN_WORKER,
                                  .metrics = RK_METRICS_WORKER,
                                  .log_level = RK_LOG_LEVEL_INFO,
                                  .mode = -1,
                                  .isa = KERNELS_ISA_AUTO,
                                  .path = RK_PATH_NONE};
    struct worker worker = {0};
    struct rk_error error = {.text = ""};
    limit_spinning(argv);
    rk_service_init();
    argp_parse(&argp, argc, argv, 0, NULL, &arguments);
    rk_log_init("worker", (enum rk_log_level)arguments.log_level);
    if (arguments.threads == 0) {
        struct rk_limits limits;
        rk_limits_read(&limits);
        arguments.threads = limits.cpus;
    }
    enum rk_status status = rk_service_check_limits(MEMORY_BYTES, &error);
    if (status == RK_OK) {
        status = start_all(&worker, &arguments, &error);
    }
    if (status == RK_OK) {
        RK_LOG_INFO("stopping", "signal=%d", rk_service_wait());
    } else {
        (void)fprintf(stderr, "redknot-worker: %s\n", error.text);
    }
    stop_all(&worker);
    return status == RK_OK ? 0 : 1;
}
