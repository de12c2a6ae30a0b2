/* What `up` can be told: one table for its options, for the state and for comparing both. */
#include "client/cli/cluster_internal.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define AT(field)   .offset = offsetof(struct cluster_settings, field)
#define TEXT(field) AT(field), .room = sizeof(((struct cluster_settings *)0)->field)

const struct cluster_setting cluster_setting_list[] = {
    {"workers", "N", "Workers, default 2; 0: a cache alone", AT(num_workers),
     .max = CLUSTER_WORKERS_MAX},
    {"stores", "N", "Store nodes, default 1", AT(num_stores), .min = 1, .max = CLUSTER_STORES_MAX},
    {"model", "FILE", "GGUF file; default below", TEXT(model)},
    {"dram", "SIZE", "Of each store, default 1GiB", TEXT(dram)},
    {"threads", "N", "Of each worker; default: shared out", AT(threads), .min = 1, .max = 1024},
    {"mode", "MODE", "bf16 or f32; default: bf16 where the CPU is fast at it", TEXT(mode),
     .words = " bf16 f32 "},
    {"path", "PATH", "How workers read: auto (default), shm, ucx or grpc", TEXT(path),
     .words = " auto shm ucx grpc "},
    {"context", "TOKENS", "Longest context of a worker; default: the model's", AT(context),
     .min = 64, .max = 1u << 22},
    {"pool-tokens", "TOKENS", "KV pool of a worker; default: twice the context", AT(pool_tokens),
     .min = 64, .max = 1u << 26},
    {"queue-max", "N", "Requests that may wait at a worker, default 64", AT(queue_max), .min = 1,
     .max = 65536},
    {"base-port", "P", "Of the coordinator, default 7100; the others count up from it",
     AT(base_port), .min = 1, .max = UINT16_MAX - RK_PORTS_SPAN},
    {"head-map", "FILE", "Head map of the model", TEXT(head_map)},
};
const uint32_t cluster_num_settings =
    sizeof(cluster_setting_list) / sizeof(cluster_setting_list[0]);

static const void *field(const struct cluster_setting *setting,
                         const struct cluster_settings *settings)
{
    return (const char *)settings + setting->offset;
}

static enum rk_status parse_text(const struct cluster_setting *setting, const char *text,
                                 struct cluster_settings *settings, struct rk_error *error)
{
    char word[16];
    if (strlen(text) >= setting->room) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "--%s: at most %zu bytes are possible",
                            setting->name, setting->room - 1);
    }
    (void)snprintf(word, sizeof(word), " %s ", text);
    if (setting->words && (!strstr(setting->words, word) || strchr(text, ' ') || !text[0])) {
        return rk_error_set(error, RK_ERR_INVALID, "--%s: \"%s\" is none of%s", setting->name, text,
                            setting->words);
    }
    uint64_t bytes = 0;
    if (strcmp(setting->name, "dram") == 0 && rk_size_parse(text, &bytes, error) != RK_OK) {
        rk_error_prefix(error, "--%s", setting->name);
        return error ? error->status : RK_ERR_INVALID;
    }
    memcpy((char *)settings + setting->offset, text, strlen(text) + 1);
    return RK_OK;
}

enum rk_status cluster_setting_parse(const struct cluster_setting *setting, const char *text,
                                     struct cluster_settings *settings, struct rk_error *error)
{
    if (setting->room) {
        return parse_text(setting, text, settings, error);
    }
    char *end = NULL;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || value < setting->min ||
        value > setting->max) {
        return rk_error_set(error, RK_ERR_INVALID, "--%s: \"%s\" is no whole number from %u to %u",
                            setting->name, text, setting->min, setting->max);
    }
    *(uint32_t *)((char *)settings + setting->offset) = (uint32_t)value;
    return RK_OK;
}

void cluster_settings_default(struct cluster_settings *ret_settings)
{
    memset(ret_settings, 0, sizeof(*ret_settings));
    cluster_default_model(ret_settings->model);
    (void)snprintf(ret_settings->dram, sizeof(ret_settings->dram), "1GiB");
    (void)snprintf(ret_settings->path, sizeof(ret_settings->path), "auto");
    ret_settings->num_workers = 2;
    ret_settings->num_stores = 1;
    ret_settings->base_port = RK_PORT_COORDINATOR;
}

json_t *cluster_settings_to_json(const struct cluster_settings *settings)
{
    json_t *object = json_object();
    for (uint32_t i = 0; i < cluster_num_settings; i++) {
        const struct cluster_setting *setting = &cluster_setting_list[i];
        const void *value = field(setting, settings);
        (void)json_object_set_new(object, setting->name,
                                  setting->room ? json_string(value)
                                                : json_integer(*(const uint32_t *)value));
    }
    return object;
}

enum rk_status cluster_settings_from_json(const json_t *object,
                                          struct cluster_settings *ret_settings,
                                          struct rk_error *error)
{
    memset(ret_settings, 0, sizeof(*ret_settings));
    for (uint32_t i = 0; i < cluster_num_settings; i++) {
        const struct cluster_setting *setting = &cluster_setting_list[i];
        const json_t *value = json_object_get(object, setting->name);
        json_int_t number = json_integer_value(value);
        const char *text = json_string_value(value);
        bool fits = setting->room ? text && strlen(text) < setting->room
                                  : json_is_integer(value) && number >= 0 && number <= setting->max;
        if (!fits) {
            return rk_error_set(error, RK_ERR_CORRUPT, "its setting \"%s\" makes no sense",
                                setting->name);
        }
        if (setting->room) {
            memcpy((char *)ret_settings + setting->offset, text, strlen(text) + 1);
        } else {
            *(uint32_t *)((char *)ret_settings + setting->offset) = (uint32_t)number;
        }
    }
    return RK_OK;
}

const struct cluster_setting *cluster_settings_differ(const struct cluster_settings *wanted,
                                                      const struct cluster_settings *running,
                                                      uint32_t given)
{
    for (uint32_t i = 0; i < cluster_num_settings; i++) {
        const struct cluster_setting *setting = &cluster_setting_list[i];
        const void *one = field(setting, wanted);
        const void *other = field(setting, running);
        bool same = setting->room ? strcmp(one, other) == 0
                                  : *(const uint32_t *)one == *(const uint32_t *)other;
        if ((given & 1u << i) && !same) {
            return setting;
        }
    }
    return NULL;
}

void cluster_setting_text(const struct cluster_setting *setting,
                          const struct cluster_settings *settings, char *ret_text, size_t room)
{
    const void *value = field(setting, settings);
    if (setting->room) {
        (void)snprintf(ret_text, room, "%s", (const char *)value);
    } else {
        (void)snprintf(ret_text, room, "%u", *(const uint32_t *)value);
    }
}
