#include "worker/recovery/head_map.h"

#include "common/base/alloc.h"
#include "common/base/kv_layout.h"

#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

/* A map of the largest layout this version accepts is far below it. */
#define HEAD_MAP_BYTES_MAX ((size_t)64 << 20)

struct recovery_head_map {
    uint32_t num_layers;
    uint32_t num_kv_heads;
    struct recovery_head heads[]; /* [layer][kv_head] */
};

/* What the functions below share while they read one document. */
struct reader {
    const char *name;
    uint32_t num_layers;
    uint32_t num_kv_heads;
    const json_t *distances; /* [layer][kv_head], or NULL */
    const json_t *sinks;     /* [layer][kv_head], or NULL */
    json_int_t window;       /* -1: the document has none */
    json_int_t sink;         /* -1: the document has none */
    struct rk_error *error;
};

/* The published classes. All but "local" need the whole context: "retrieval" is global by
 * definition, and "local_full" asks for positions we do not keep, so that seeing more is the
 * reading that cannot hide a token. */
static const struct {
    const char *name;
    bool local;
} classes[] = {
    {"global", false},
    {"local", true},
    {"local_full", false},
    {"retrieval", false},
};

/* Whole numbers only; some tools write them as 64.0. */
static bool read_whole(const json_t *value, json_int_t *ret_whole)
{
    if (json_is_integer(value)) {
        *ret_whole = json_integer_value(value);
        return true;
    }
    if (json_is_real(value)) {
        double real = json_real_value(value);
        if (!(real >= -1e15 && real <= 1e15) || real != (double)(json_int_t)real) {
            return false;
        }
        *ret_whole = (json_int_t)real;
        return true;
    }
    return false;
}

/* The number under key; fallback when the document does not have it. */
static enum rk_status read_number(const struct reader *reader, const json_t *root, const char *key,
                                  json_int_t fallback, json_int_t *ret_number)
{
    const json_t *value = json_object_get(root, key);
    json_int_t number = fallback;

    if (value && !json_is_null(value)) {
        if (!read_whole(value, &number) || number < 0 || number > INT32_MAX) {
            return rk_error_set(reader->error, RK_ERR_INVALID,
                                "%s: \"%s\" must be a whole number from 0 to %d", reader->name, key,
                                INT32_MAX);
        }
    }
    *ret_number = number;
    return RK_OK;
}

static enum rk_status check_size(const struct reader *reader, const json_t *root, const char *key,
                                 uint32_t expected)
{
    json_int_t number = 0;
    enum rk_status status = read_number(reader, root, key, expected, &number);
    if (status != RK_OK) {
        return status;
    }
    if (number != expected) {
        return rk_error_set(reader->error, RK_ERR_INVALID,
                            "%s: \"%s\" is %" JSON_INTEGER_FORMAT ", the model has %u",
                            reader->name, key, number, expected);
    }
    return RK_OK;
}

/* A list [layer][kv_head] under key; NULL when it is missing and not required. */
static enum rk_status read_list(const struct reader *reader, const json_t *root, const char *key,
                                bool required, const json_t **ret_list)
{
    const json_t *list = json_object_get(root, key);

    if (!list || json_is_null(list)) {
        if (required) {
            return rk_error_set(reader->error, RK_ERR_INVALID, "%s: \"%s\" is missing",
                                reader->name, key);
        }
        *ret_list = NULL;
        return RK_OK;
    }
    if (!json_is_array(list) || json_array_size(list) != reader->num_layers) {
        return rk_error_set(reader->error, RK_ERR_INVALID, "%s: \"%s\" must be a list of %u layers",
                            reader->name, key, reader->num_layers);
    }
    for (uint32_t layer = 0; layer < reader->num_layers; layer++) {
        const json_t *row = json_array_get(list, layer);
        if (!json_is_array(row) || json_array_size(row) != reader->num_kv_heads) {
            return rk_error_set(reader->error, RK_ERR_INVALID,
                                "%s: \"%s\" layer %u must be a list of %u KV heads", reader->name,
                                key, layer, reader->num_kv_heads);
        }
    }
    *ret_list = list;
    return RK_OK;
}

/* One entry of a list, or fallback where there is no list; must be min or more. */
static enum rk_status read_entry(const struct reader *reader, const json_t *list, const char *key,
                                 json_int_t fallback, json_int_t min, uint32_t layer,
                                 uint32_t kv_head, uint32_t *ret_number)
{
    json_int_t number = fallback;

    if (list && !read_whole(json_array_get(json_array_get(list, layer), kv_head), &number)) {
        return rk_error_set(reader->error, RK_ERR_INVALID,
                            "%s: \"%s\" layer %u head %u is not a whole number", reader->name, key,
                            layer, kv_head);
    }
    if (!list && number < 0) {
        return rk_error_set(reader->error, RK_ERR_INVALID,
                            "%s: \"%s\" is missing, and layer %u head %u is local", reader->name,
                            key, layer, kv_head);
    }
    if (number < min || number > INT32_MAX) {
        return rk_error_set(reader->error, RK_ERR_INVALID,
                            "%s: \"%s\" of local layer %u head %u is %" JSON_INTEGER_FORMAT
                            ", must be from %" JSON_INTEGER_FORMAT " to %d",
                            reader->name, key, layer, kv_head, number, min, INT32_MAX);
    }
    *ret_number = (uint32_t)number;
    return RK_OK;
}

static enum rk_status read_class(const struct reader *reader, const json_t *value, uint32_t layer,
                                 uint32_t kv_head, bool *ret_local)
{
    const char *word = json_string_value(value);

    if (!word) {
        return rk_error_set(reader->error, RK_ERR_INVALID,
                            "%s: \"kv_head_classification\" layer %u head %u is not a string",
                            reader->name, layer, kv_head);
    }
    for (size_t i = 0; i < sizeof(classes) / sizeof(classes[0]); i++) {
        if (strcmp(word, classes[i].name) == 0) {
            *ret_local = classes[i].local;
            return RK_OK;
        }
    }
    return rk_error_set(reader->error, RK_ERR_INVALID,
                        "%s: \"kv_head_classification\" layer %u head %u: unknown class \"%.40s\"",
                        reader->name, layer, kv_head, word);
}

static enum rk_status read_head(const struct reader *reader, const json_t *value, uint32_t layer,
                                uint32_t kv_head, bool dense, struct recovery_head *head)
{
    bool local = false;
    enum rk_status status = read_class(reader, value, layer, kv_head, &local);
    if (status != RK_OK || !local) {
        return status; /* Its distance and sink mean nothing: -1, 0 and 4096 are all published. */
    }
    struct recovery_head read = {0};
    status = read_entry(reader, reader->distances, "kv_head_max_distance", reader->window, 1, layer,
                        kv_head, &read.window);
    if (status == RK_OK) {
        status = read_entry(reader, reader->sinks, "kv_head_sink_size", reader->sink, 0, layer,
                            kv_head, &read.sink);
    }
    if (status == RK_OK && !dense) {
        *head = read;
    }
    return status;
}

static enum rk_status read_heads(struct reader *reader, const json_t *root,
                                 struct recovery_head_map *map)
{
    const json_t *list = NULL;
    json_int_t dense_layers = 0;
    enum rk_status status = read_list(reader, root, "kv_head_classification", true, &list);

    if (status == RK_OK) {
        status = read_list(reader, root, "kv_head_max_distance", false, &reader->distances);
    }
    if (status == RK_OK) {
        status = read_list(reader, root, "kv_head_sink_size", false, &reader->sinks);
    }
    if (status == RK_OK) {
        status = read_number(reader, root, "window", -1, &reader->window);
    }
    if (status == RK_OK) {
        status = read_number(reader, root, "sink_size", -1, &reader->sink);
    }
    if (status == RK_OK) {
        status = read_number(reader, root, "dense_prefix_layers", 0, &dense_layers);
    }
    for (uint32_t layer = 0; status == RK_OK && layer < map->num_layers; layer++) {
        const json_t *row = json_array_get(list, layer);
        for (uint32_t head = 0; status == RK_OK && head < map->num_kv_heads; head++) {
            status = read_head(reader, json_array_get(row, head), layer, head, layer < dense_layers,
                               &map->heads[layer * map->num_kv_heads + head]);
        }
    }
    return status;
}

static enum rk_status read_root(struct reader *reader, const json_t *root,
                                struct recovery_head_map *map)
{
    if (!json_is_object(root)) {
        return rk_error_set(reader->error, RK_ERR_INVALID, "%s: not a JSON object", reader->name);
    }
    enum rk_status status = check_size(reader, root, "num_layers", reader->num_layers);
    if (status == RK_OK) {
        status = check_size(reader, root, "num_kv_heads", reader->num_kv_heads);
    }
    return status == RK_OK ? read_heads(reader, root, map) : status;
}

enum rk_status recovery_head_map_parse(const char *json, size_t bytes, const char *name,
                                       uint32_t num_layers, uint32_t num_kv_heads,
                                       struct recovery_head_map **ret_map, struct rk_error *error)
{
    struct reader reader = {name, num_layers, num_kv_heads, NULL, NULL, -1, -1, error};
    struct recovery_head_map *map = NULL;
    json_error_t json_error;

    if (num_layers < 1 || num_layers > RK_LAYERS_MAX || num_kv_heads < 1 ||
        num_kv_heads > RK_KV_HEADS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: a model of %u layers and %u KV heads", name,
                            num_layers, num_kv_heads);
    }
    if (bytes > HEAD_MAP_BYTES_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%s: longer than %zu bytes", name,
                            HEAD_MAP_BYTES_MAX);
    }
    json_t *root = json_loadb(json, bytes, JSON_REJECT_DUPLICATES, &json_error);
    if (!root) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: line %d: %s", name, json_error.line,
                            json_error.text);
    }
    enum rk_status status = RK_ERR_NO_MEMORY;
    map = rk_alloc_zero(1, sizeof(*map) +
                               (size_t)num_layers * num_kv_heads * sizeof(struct recovery_head));
    if (!map) {
        (void)rk_error_set(error, status, "%s: no memory for the head map", name);
        goto fail;
    }
    map->num_layers = num_layers;
    map->num_kv_heads = num_kv_heads;
    status = read_root(&reader, root, map);
    if (status != RK_OK) {
        goto fail;
    }
    json_decref(root);
    *ret_map = map;
    return RK_OK;

fail:
    json_decref(root);
    recovery_head_map_destroy(map);
    return status;
}

enum rk_status recovery_head_map_load(const char *path, uint32_t num_layers, uint32_t num_kv_heads,
                                      struct recovery_head_map **ret_map, struct rk_error *error)
{
    enum rk_status status = RK_ERR_IO;
    char *text = NULL;
    size_t bytes = 0;
    struct stat info;
    FILE *file = fopen(path, "rb");

    if (!file) {
        return rk_error_set(error, RK_ERR_IO, "%s: cannot be opened: %m", path);
    }
    if (fstat(fileno(file), &info) != 0 || !S_ISREG(info.st_mode)) {
        (void)rk_error_set(error, status, "%s: not a regular file", path);
        goto done;
    }
    if ((uint64_t)info.st_size > HEAD_MAP_BYTES_MAX) {
        status = rk_error_set(error, RK_ERR_TOO_LONG, "%s: longer than %zu bytes", path,
                              HEAD_MAP_BYTES_MAX);
        goto done;
    }
    text = rk_alloc((size_t)info.st_size);
    if (!text) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "%s: no memory to read it", path);
        goto done;
    }
    bytes = fread(text, 1, (size_t)info.st_size, file);
    if (ferror(file)) {
        (void)rk_error_set(error, status, "%s: cannot be read: %m", path);
        goto done;
    }
    status = recovery_head_map_parse(text, bytes, path, num_layers, num_kv_heads, ret_map, error);

done:
    rk_free(text);
    (void)fclose(file);
    return status;
}

void recovery_head_map_destroy(struct recovery_head_map *map)
{
    rk_free(map);
}

struct recovery_head recovery_head_map_get(const struct recovery_head_map *map, uint32_t layer,
                                           uint32_t kv_head)
{
    RK_ASSERT(layer < map->num_layers && kv_head < map->num_kv_heads);
    return map->heads[layer * map->num_kv_heads + kv_head];
}

uint32_t recovery_head_map_global_heads(const struct recovery_head_map *map)
{
    uint32_t heads = 0;
    for (uint32_t i = 0; i < map->num_layers * map->num_kv_heads; i++) {
        heads += map->heads[i].window == 0;
    }
    return heads;
}
