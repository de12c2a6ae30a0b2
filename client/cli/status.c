#include "client/cli/cli_internal.h"
#include "common/base/alloc.h"

#include <string.h>

#define SEGMENTS_LISTED_MAX 1000

enum { OPTION_SEGMENTS = 256, OPTION_GONE, OPTION_LABEL, OPTION_SALT, OPTION_ALL };

struct status_arguments {
    struct cli_common common;
    bool segments;
    bool gone;
};

static const struct argp_option status_options[] = {
    {.name = "segments", .key = OPTION_SEGMENTS, .doc = "List the stored segments, too"},
    {.name = "gone",
     .key = OPTION_GONE,
     .doc = "With --segments: also those whose KV is gone (evicted, or lost with its store); their "
            "tokens are still known"},
    {.name = NULL},
};

static error_t parse_status(int key, char *arg, struct argp_state *state)
{
    struct status_arguments *arguments = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case OPTION_SEGMENTS:
        arguments->segments = true;
        return 0;
    case OPTION_GONE:
        arguments->gone = true;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp status_argp = {.options = status_options,
                                        .parser = parse_status,
                                        .doc = "Show the nodes of the cluster and what they hold.",
                                        .children = cli_common_children};

static const char *role_name(enum rk_node_role role)
{
    return role == RK_NODE_STORE ? "store" : role == RK_NODE_WORKER ? "worker" : "other";
}

static json_t *node_json(const struct rk_node_status *node)
{
    json_t *row = json_pack(
        "{s:s, s:b, s:s, s:I, s:I, s:I, s:I}", "role", role_name(node->role), "alive",
        (int)node->alive, "state", node->state, "capacity_bytes", (json_int_t)node->capacity_bytes,
        "used_bytes", (json_int_t)node->used_bytes, "num_shards", (json_int_t)node->num_shards,
        "heartbeat_age_ms", (json_int_t)node->heartbeat_age_ms);
    cli_json_set_string(row, "node_id", node->node_id);
    cli_json_set_string(row, "address", node->address);
    cli_json_set_string(row, "metrics_address", node->metrics_address);
    cli_json_set_string(row, "model", node->model);
    cli_json_set_string(row, "numeric_path", node->numeric_path);
    cli_json_set_string(row, "version", node->version);
    return row;
}

static json_t *segment_json(const struct rk_segment_status *segment)
{
    json_t *node_ids = json_array();
    for (size_t i = 0; i < segment->num_node_ids; i++) {
        const char *id = segment->node_ids[i];
        (void)json_array_append_new(node_ids, cli_json_text(id, strlen(id)));
    }
    json_t *row =
        json_pack("{s:o, s:I, s:I, s:b, s:s, s:s, s:o*, s:o}", "segment_id",
                  cli_json_id(&segment->segment_id), "num_tokens", (json_int_t)segment->num_tokens,
                  "bytes", (json_int_t)segment->bytes, "committed", (int)segment->committed, "kind",
                  segment->kind, "state", segment->state, "alone_id",
                  rk_id_is_zero(&segment->alone_id) ? NULL : cli_json_id(&segment->alone_id),
                  "node_ids", node_ids);
    cli_json_set_string(row, "label", segment->label);
    return row;
}

static json_t *status_json(const struct rk_cluster_status *cluster, bool with_segments)
{
    json_t *nodes = json_array();
    for (size_t i = 0; i < cluster->num_nodes; i++) {
        (void)json_array_append_new(nodes, node_json(&cluster->nodes[i]));
    }
    json_t *object = json_pack("{s:I, s:I, s:I, s:o}", "uptime_ms", (json_int_t)cluster->uptime_ms,
                               "num_segments", (json_int_t)cluster->num_segments, "num_gone",
                               (json_int_t)cluster->num_gone, "nodes", nodes);
    cli_json_set_string(object, "version", cluster->version);
    if (!with_segments) {
        return object;
    }
    json_t *segments = json_array();
    for (size_t i = 0; i < cluster->num_segments_listed; i++) {
        (void)json_array_append_new(segments, segment_json(&cluster->segments[i]));
    }
    (void)json_object_set_new(object, "segments", segments);
    return object;
}

static void status_print(const struct rk_cluster_status *cluster, bool with_segments,
                         bool with_gone)
{
    char used[32];
    char capacity[32];
    char id[CLI_SHOWN_BYTES];
    char address[CLI_SHOWN_BYTES];
    char model[CLI_SHOWN_BYTES];
    char path[CLI_SHOWN_BYTES];
    uint64_t num_stored = cluster->num_segments - cluster->num_gone;
    (void)printf("coordinator %s, up for %llu s, %llu segments\n\n", cluster->version,
                 (unsigned long long)(cluster->uptime_ms / 1000), (unsigned long long)num_stored);
    (void)printf("%-8s %-24s %-22s %-10s %10s %10s %7s  %s\n", "ROLE", "NODE", "ADDRESS", "STATE",
                 "USED", "CAPACITY", "SHARDS", "MODEL, NUMERIC PATH");
    for (size_t i = 0; i < cluster->num_nodes; i++) {
        const struct rk_node_status *node = &cluster->nodes[i];
        bool store = node->role == RK_NODE_STORE;
        (void)printf("%-8s %-24s %-22s %-10s %10s %10s %7llu  %s%s%s\n", role_name(node->role),
                     cli_shown(node->node_id, id, sizeof(id)),
                     cli_shown(node->address, address, sizeof(address)), node->state,
                     store ? cli_bytes(node->used_bytes, used) : "-",
                     store ? cli_bytes(node->capacity_bytes, capacity) : "-",
                     (unsigned long long)node->num_shards,
                     cli_shown(node->model, model, sizeof(model)), node->model[0] ? ", " : "",
                     cli_shown(node->numeric_path, path, sizeof(path)));
    }
    if (!with_segments) {
        return;
    }
    (void)printf("\n%-64s %-5s %8s %10s  %-7s %s\n", "SEGMENT", "KIND", "TOKENS", "BYTES", "STATE",
                 "LABEL");
    for (size_t i = 0; i < cluster->num_segments_listed; i++) {
        const struct rk_segment_status *segment = &cluster->segments[i];
        char hex[RK_ID_HEX_BYTES];
        rk_id_to_hex(&segment->segment_id, hex);
        (void)printf("%-64s %-5s %8u %10s  %-7s %s\n", hex,
                     segment->kind[0] == '\0' ? "-" : segment->kind, segment->num_tokens,
                     cli_bytes(segment->bytes, used), segment->state,
                     cli_shown(segment->label, id, sizeof(id)));
    }
    uint64_t num_listable = with_gone ? cluster->num_segments : num_stored;
    if (cluster->num_segments_listed < num_listable) {
        (void)printf("... and %llu more\n",
                     (unsigned long long)(num_listable - cluster->num_segments_listed));
    }
    if (!with_gone && cluster->num_gone > 0) {
        (void)printf("%llu more are known by their tokens only (--gone lists them)\n",
                     (unsigned long long)cluster->num_gone);
    }
}

int cli_status(int argc, char **argv)
{
    struct status_arguments arguments = {.segments = false};
    (void)argp_parse(&status_argp, argc, argv, 0, NULL, &arguments);
    struct rk_error error = {.status = RK_OK};
    struct rk_client *client = NULL;
    struct rk_cluster_status cluster;
    enum rk_status status = cli_client_open(&arguments.common, NULL, &client, &error);
    if (status == RK_OK) {
        struct rk_status_query query = {.segments_max =
                                            arguments.segments ? SEGMENTS_LISTED_MAX : 0,
                                        .with_gone = arguments.gone};
        status = rk_client_status_query(client, &query, &cluster, &error);
        cli_client_close(client);
    }
    if (status != RK_OK) {
        return cli_fail_error("status", &error);
    }
    if (arguments.common.json) {
        cli_print_json(status_json(&cluster, arguments.segments));
    } else {
        status_print(&cluster, arguments.segments, arguments.gone);
    }
    rk_cluster_status_clear(&cluster);
    return CLI_OK;
}

/* ---- drop ---- */

struct drop_arguments {
    struct cli_common common;
    struct rk_id ids[CLI_SEGMENTS_MAX];
    size_t num_ids;
    const char *label;
    const char *salt;
    bool all;
};

static const struct argp_option drop_options[] = {
    {.name = "label", .key = OPTION_LABEL, .arg = "L", .doc = "All with just this label"},
    {.name = "salt",
     .key = OPTION_SALT,
     .arg = "S",
     .doc = "All of the tenant with this salt; \"\": of those without one"},
    {.name = "all", .key = OPTION_ALL, .doc = "Everything that is stored"},
    {.name = NULL},
};

static error_t parse_drop(int key, char *arg, struct argp_state *state)
{
    struct drop_arguments *arguments = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case ARGP_KEY_ARG:
        if (arguments->num_ids == CLI_SEGMENTS_MAX) {
            argp_error(state, "at most %d ids in one call", CLI_SEGMENTS_MAX);
        }
        if (!rk_id_from_hex(arg, &arguments->ids[arguments->num_ids])) {
            argp_error(state,
                       "\"%s\" is no segment id of 64 hex digits; `redknot status "
                       "--segments` lists them",
                       arg);
        }
        arguments->num_ids++;
        return 0;
    case OPTION_LABEL:
        if (arg[0] == '\0') {
            argp_error(state, "--label: needs a label");
        }
        arguments->label = arg;
        return 0;
    case OPTION_SALT:
        arguments->salt = arg;
        return 0;
    case OPTION_ALL:
        arguments->all = true;
        return 0;
    case ARGP_KEY_END:
        if (arguments->num_ids == 0 && !arguments->label && !arguments->salt && !arguments->all) {
            argp_error(state, "no segment id given, nor --label, --salt or --all");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp drop_argp = {.options = drop_options,
                                      .parser = parse_drop,
                                      .args_doc = "[ID...]",
                                      .doc = "Forget stored segments, and with each the chains "
                                             "that it is part of: afterwards they are computed.",
                                      .children = cli_common_children};

static void drop_print(const struct drop_arguments *arguments, const struct rk_drop_result *result)
{
    bool by_id = !arguments->label && !arguments->salt && !arguments->all;
    (void)printf("dropped %llu", (unsigned long long)result->dropped);
    if (by_id) {
        (void)printf(" of %zu", arguments->num_ids);
    }
    if (result->chains > 0) {
        (void)printf(", and %llu computed in chains with them", (unsigned long long)result->chains);
    }
    (void)printf("\n");
}

int cli_drop(int argc, char **argv)
{
    struct drop_arguments *arguments = rk_alloc_zero(1, sizeof(*arguments));
    if (!arguments) {
        return cli_fail("drop: out of memory");
    }
    (void)argp_parse(&drop_argp, argc, argv, 0, NULL, arguments);
    struct rk_error error = {.status = RK_OK};
    struct rk_client *client = NULL;
    struct rk_drop_result result = {.dropped = 0};
    int code = CLI_OK;
    enum rk_status status = cli_client_open(&arguments->common, NULL, &client, &error);
    if (status == RK_OK) {
        struct rk_drop_query query = {.ids = arguments->ids,
                                      .num_ids = arguments->num_ids,
                                      .label = arguments->label,
                                      .salt = arguments->salt,
                                      .salt_bytes = arguments->salt ? strlen(arguments->salt) : 0,
                                      .all = arguments->all};
        status = rk_client_drop_query(client, &query, &result, &error);
        cli_client_close(client);
    }
    if (status != RK_OK) {
        code = cli_fail_error("drop", &error);
    } else if (arguments->common.json) {
        cli_print_json(json_pack("{s:I, s:I}", "dropped", (json_int_t)result.dropped, "chains",
                                 (json_int_t)result.chains));
    } else {
        drop_print(arguments, &result);
    }
    rk_free(arguments);
    return code;
}
