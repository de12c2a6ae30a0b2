/* redknot-coordinator: options, start, wait, stop. */
#include "common/base/address.h"
#include "common/base/log.h"
#include "common/base/number.h"
#include "common/base/ports.h"
#include "common/base/service.h"
#include "common/metrics/metrics.h"
#include "coordinator/coordinator.h"

#include <argp.h>
#include <stdio.h>
#include <stdlib.h>

#define STOP_GRACE_MS 5000
#define MEMORY_BYTES  (UINT64_C(2) << 30) /* address space of threads and libraries */

enum {
    OPTION_LISTEN = 256,
    OPTION_DATA,
    OPTION_CLUSTER,
    OPTION_METRICS,
    OPTION_HEARTBEAT_MS,
    OPTION_TIMEOUT_MS,
    OPTION_VALUES_LEASE_MS,
    OPTION_SHARDS_PER_SEGMENT,
    OPTION_SEGMENTS_MAX,
    OPTION_SLOW_START_MS,
    OPTION_PROBE_INTERVAL_MS,
    OPTION_PROBE_TIMEOUT_MS,
    OPTION_PROBE_FAILURES,
    OPTION_LOG_LEVEL,
};

struct arguments {
    struct coordinator_options options;
    const char *metrics;
    enum rk_log_level level;
};

const char *argp_program_version = "redknot-coordinator " REDKNOT_VERSION;

static const struct argp_option option_list[] = {
    {"listen", OPTION_LISTEN, "HOST:PORT", 0, "Serve gRPC here (" RK_LISTEN_COORDINATOR ")", 0},
    {"data", OPTION_DATA, "DIR", 0, "Metadata database (./redknot-data/coordinator)", 0},
    {"cluster", OPTION_CLUSTER, "ID", 0, "Id of the cluster: nodes of another one are refused", 0},
    {"metrics", OPTION_METRICS, "HOST:PORT", 0,
     "Serve Prometheus text here; empty: nowhere (" RK_METRICS_COORDINATOR ")", 0},
    {"heartbeat-ms", OPTION_HEARTBEAT_MS, "MS", 0, "How often nodes report (500)", 0},
    {"timeout-ms", OPTION_TIMEOUT_MS, "MS", 0, "A node silent for longer is down (2000)", 0},
    {"values-lease-ms", OPTION_VALUES_LEASE_MS, "MS", 0,
     "So long a store serves values, and stays listed for them, without being heard (3000)", 0},
    {"shards-per-segment", OPTION_SHARDS_PER_SEGMENT, "N", 0,
     "Layer ranges that a segment is spread over (1)", 0},
    {"segments-max", OPTION_SEGMENTS_MAX, "N", 0, "Segments to know at most (1000000)", 0},
    {"slow-start-ms", OPTION_SLOW_START_MS, "MS", 0,
     "A store that has come gets an eighth of its share, then more for so long; 0: off (30000)", 0},
    {"probe-interval-ms", OPTION_PROBE_INTERVAL_MS, "MS", 0,
     "Check the health of each store so often; 0: never, and eject none (2000)", 0},
    {"probe-timeout-ms", OPTION_PROBE_TIMEOUT_MS, "MS", 0, "A check that takes longer fails (500)",
     0},
    {"probe-failures", OPTION_PROBE_FAILURES, "N", 0, "So many failures in a row eject a store (3)",
     0},
    {"log-level", OPTION_LOG_LEVEL, "LEVEL", 0, "debug, info, warn or error (info)", 0},
    {0},
};

static uint32_t parse_number(struct argp_state *state, const char *name, const char *text,
                             uint32_t number_min, uint32_t number_max)
{
    uint64_t number = 0;
    struct rk_error error;

    if (rk_number_parse(name, text, number_min, number_max, &number, &error) != RK_OK) {
        argp_error(state, "--%s", error.text);
    }
    return (uint32_t)number;
}

static uint32_t parse_count(struct argp_state *state, const char *name, const char *text,
                            uint32_t count_max)
{
    return parse_number(state, name, text, 1, count_max);
}

static void check_address(struct argp_state *state, const char *name, const char *text)
{
    struct rk_error error;

    if (rk_address_check(text, RK_ADDRESS_LISTEN, &error) != RK_OK) {
        argp_error(state, "--%s: %s", name, error.text);
    }
}

static void check_cluster(struct argp_state *state, const char *text)
{
    struct rk_error error;

    if (rk_service_cluster_set(text, &error) != RK_OK) {
        argp_error(state, "%s", error.text);
    }
}

static error_t parse_option(int key, char *text, struct argp_state *state)
{
    struct arguments *arguments = state->input;
    struct coordinator_options *options = &arguments->options;

    switch (key) {
    case OPTION_LISTEN:
        check_address(state, "listen", text);
        options->listen = text;
        break;
    case OPTION_DATA:
        if (text[0] == '\0') {
            argp_error(state, "--data: needs a directory");
        }
        options->data_dir = text;
        break;
    case OPTION_CLUSTER:
        check_cluster(state, text);
        options->cluster_id = text;
        break;
    case OPTION_METRICS:
        if (text[0] != '\0') {
            check_address(state, "metrics", text);
        }
        arguments->metrics = text;
        break;
    case OPTION_HEARTBEAT_MS:
        options->heartbeat_ms = parse_count(state, "heartbeat-ms", text, 600000);
        break;
    case OPTION_TIMEOUT_MS:
        options->timeout_ms = parse_count(state, "timeout-ms", text, 3600000);
        break;
    case OPTION_VALUES_LEASE_MS:
        options->values_lease_ms = parse_count(state, "values-lease-ms", text, 3600000);
        break;
    case OPTION_SHARDS_PER_SEGMENT:
        options->shards_per_segment =
            parse_count(state, "shards-per-segment", text, COORDINATOR_SHARDS_MAX);
        break;
    case OPTION_SEGMENTS_MAX:
        options->segments_max = parse_count(state, "segments-max", text, 1000000000);
        break;
    case OPTION_SLOW_START_MS:
        options->slow_start_ms = parse_number(state, "slow-start-ms", text, 0, 3600000);
        break;
    case OPTION_PROBE_INTERVAL_MS:
        options->probe_interval_ms = parse_number(state, "probe-interval-ms", text, 0, 3600000);
        break;
    case OPTION_PROBE_TIMEOUT_MS:
        options->probe_timeout_ms = parse_count(state, "probe-timeout-ms", text, 60000);
        break;
    case OPTION_PROBE_FAILURES:
        options->probe_failures = parse_count(state, "probe-failures", text, 1000);
        break;
    case OPTION_LOG_LEVEL:
        if (!rk_log_level_parse(text, &arguments->level)) {
            argp_error(state, "--log-level: \"%s\" is none of debug, info, warn, error", text);
        }
        break;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", text);
        break;
    case ARGP_KEY_END:
        if (options->heartbeat_ms >= options->timeout_ms) {
            argp_error(state, "--timeout-ms %u must be larger than --heartbeat-ms %u",
                       options->timeout_ms, options->heartbeat_ms);
        }
        if (options->heartbeat_ms >= options->values_lease_ms) {
            argp_error(state, "--values-lease-ms %u must be larger than --heartbeat-ms %u",
                       options->values_lease_ms, options->heartbeat_ms);
        }
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

int main(int argc, char **argv)
{
    static const struct argp argp = {
        .options = option_list,
        .parser = parse_option,
        .doc = "Knows which store nodes hold which KV segments.\v"
               "Logs go to stderr. SIGTERM or SIGINT stops it in order.",
    };
    struct arguments arguments = {
        .options =
            {
                .listen = RK_LISTEN_COORDINATOR,
                .data_dir = "./redknot-data/coordinator",
                .heartbeat_ms = 500,
                .timeout_ms = 2000,
                .values_lease_ms = 3000,
                .slow_start_ms = 30000,
                .probe_interval_ms = 2000,
            },
        .metrics = RK_METRICS_COORDINATOR,
        .level = RK_LOG_LEVEL_INFO,
    };
    struct coordinator *coordinator = NULL;
    struct rk_metrics_server *metrics = NULL;
    struct rk_error error = {0};
    enum rk_status status;

    rk_service_init();
    (void)argp_parse(&argp, argc, argv, 0, NULL, &arguments);
    rk_log_init("coordinator", arguments.level);
    status = rk_service_check_limits(MEMORY_BYTES, &error);
    if (status == RK_OK) {
        status = coordinator_create(&arguments.options, &coordinator, &error);
    }
    if (status == RK_OK && arguments.metrics[0] != '\0') {
        status = rk_metrics_server_start(arguments.metrics, &metrics, &error);
    }
    if (status == RK_OK) {
        status = coordinator_start(coordinator);
        if (status != RK_OK) {
            (void)rk_error_set(&error, status, "cannot start: %s", rk_status_text(status));
        }
    }
    if (status == RK_OK) {
        RK_LOG_INFO("started", "address=%q port=%d data=%q metrics=%q epoch=%llu version=%s",
                    arguments.options.listen, coordinator_port(coordinator),
                    arguments.options.data_dir, arguments.metrics,
                    (unsigned long long)coordinator_epoch(coordinator), REDKNOT_VERSION);
        RK_LOG_INFO("stopping", "signal=%d", rk_service_wait());
        coordinator_stop(coordinator, STOP_GRACE_MS);
    } else {
        (void)fprintf(stderr, "redknot-coordinator: %s\n", error.text);
    }
    rk_metrics_server_stop(metrics);
    coordinator_destroy(coordinator);
    return status == RK_OK ? EXIT_SUCCESS : EXIT_FAILURE;
}
