#include "client/cli/cli_internal.h"
#include "client/cli/eval.h"
#include "common/base/alloc.h"

#include <jansson.h>
#include <string.h>

/* Where a message points to: file, request, key, index of a segment. */
struct place {
    const char *name;
    size_t request;
    const char *key;
    long segment; /* -1: not in a list of segments */
};

static enum rk_status wrong(const struct place *place, struct rk_error *error, const char *why)
{
    if (place->segment >= 0) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: request %zu: \"%s\"[%ld]: %s", place->name,
                            place->request, place->key, place->segment, why);
    }
    return rk_error_set(error, RK_ERR_INVALID, "%s: request %zu: \"%s\": %s", place->name,
                        place->request, place->key, why);
}

/* Empty is allowed where min is 0; NULL counts as empty there. */
static enum rk_status take_tokens(const json_t *list, size_t min, size_t max,
                                  const struct place *place, struct eval_tokens *ret_tokens,
                                  struct rk_error *error)
{
    char why[96];
    size_t count = json_array_size(list);
    if (!list && min == 0) {
        *ret_tokens = (struct eval_tokens){.ids = NULL};
        return RK_OK;
    }
    if (!list || !json_is_array(list)) {
        return wrong(place, error,
                     list ? "must be a list of token ids" : "is missing; give a list of token ids");
    }
    if (count < min || count > max) {
        (void)snprintf(why, sizeof(why), "has %zu token ids; allowed are %zu to %zu", count, min,
                       max);
        return wrong(place, error, why);
    }
    int32_t *ids = rk_alloc_zero(count + 1, sizeof(*ids));
    if (!ids) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", place->name);
    }
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_array_get(list, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) > INT32_MAX) {
            rk_free(ids);
            (void)snprintf(why, sizeof(why), "token %zu is no token id (a whole number from 0)", i);
            return wrong(place, error, why);
        }
        ids[i] = (int32_t)json_integer_value(id);
    }
    *ret_tokens = (struct eval_tokens){.ids = ids, .count = count};
    return RK_OK;
}

static enum rk_status take_segments(const json_t *object, struct place *place,
                                    struct eval_request *request, struct rk_error *error)
{
    struct eval_tokens prefix = {.ids = NULL};
    place->key = "prefix";
    place->segment = -1;
    enum rk_status status =
        take_tokens(json_object_get(object, "prefix"), 0, EVAL_TOKENS_MAX, place, &prefix, error);
    if (status != RK_OK) {
        return status;
    }
    place->key = "segments";
    const json_t *list = json_object_get(object, "segments");
    size_t count = json_array_size(list);
    if (!json_is_array(list) || count > EVAL_SEGMENTS_MAX) {
        rk_free(prefix.ids);
        return wrong(place, error,
                     list ? "must be a list of at most 1024 lists of token ids"
                          : "is missing; give a list of lists of token ids");
    }
    request->segments = rk_alloc_zero(count + 1, sizeof(*request->segments));
    if (!request->segments) {
        rk_free(prefix.ids);
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", place->name);
    }
    if (prefix.count > 0) {
        request->segments[request->num_segments++] = prefix;
    } else {
        rk_free(prefix.ids);
    }
    for (size_t i = 0; i < count && status == RK_OK; i++) {
        place->segment = (long)i;
        status = take_tokens(json_array_get(list, i), 1, EVAL_TOKENS_MAX, place,
                             &request->segments[request->num_segments], error);
        if (status == RK_OK) {
            request->num_segments++;
        }
    }
    place->segment = -1;
    return status;
}

static enum rk_status take_request(const json_t *object, const char *name, size_t index,
                                   struct eval_request *request, struct rk_error *error)
{
    struct place place = {.name = name, .request = index, .segment = -1};
    if (!json_is_object(object)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: request %zu: must be an object with \"segments\", \"question\" "
                            "and \"continuation\"",
                            name, index);
    }
    enum rk_status status = take_segments(object, &place, request, error);
    if (status == RK_OK) {
        place.key = "question";
        status = take_tokens(json_object_get(object, place.key), 1, EVAL_TOKENS_MAX, &place,
                             &request->question, error);
    }
    if (status == RK_OK) {
        place.key = "continuation";
        status = take_tokens(json_object_get(object, place.key), 1, EVAL_POSITIONS_MAX, &place,
                             &request->continuation, error);
    }
    return status;
}

void eval_file_clear(struct eval_file *file)
{
    for (size_t i = 0; i < file->num_requests; i++) {
        struct eval_request *request = &file->requests[i];
        for (size_t j = 0; j < request->num_segments; j++) {
            rk_free(request->segments[j].ids);
        }
        rk_free(request->segments);
        rk_free(request->question.ids);
        rk_free(request->continuation.ids);
    }
    rk_free(file->requests);
    memset(file, 0, sizeof(*file));
}

static enum rk_status take_requests(const json_t *root, const char *name,
                                    struct eval_file *ret_file, struct rk_error *error)
{
    const json_t *list = json_object_get(root, "requests");
    size_t count = json_array_size(list);
    if (!json_is_array(list) || count == 0 || count > EVAL_REQUESTS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: \"requests\" must be a list of 1 to %d requests", name,
                            EVAL_REQUESTS_MAX);
    }
    struct eval_file file = {.requests = rk_alloc_zero(count, sizeof(struct eval_request))};
    if (!file.requests) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", name);
    }
    enum rk_status status = RK_OK;
    for (size_t i = 0; i < count && status == RK_OK; i++) {
        file.num_requests++;
        status = take_request(json_array_get(list, i), name, i, &file.requests[i], error);
    }
    if (status != RK_OK) {
        eval_file_clear(&file);
        return status;
    }
    *ret_file = file;
    return RK_OK;
}

enum rk_status eval_file_parse(const char *text, size_t bytes, const char *name,
                               struct eval_file *ret_file, struct rk_error *error)
{
    json_error_t why;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &why);
    if (!root) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: line %d, column %d: %s", name, why.line,
                            why.column, why.text);
    }
    enum rk_status status = take_requests(root, name, ret_file, error);
    json_decref(root);
    return status;
}

enum rk_status eval_file_load(const char *path, struct eval_file *ret_file, struct rk_error *error)
{
    char *text = NULL;
    size_t bytes = 0;
    enum rk_status status = cli_read_text(path, &text, &bytes, error);
    if (status == RK_OK) {
        status = eval_file_parse(text, bytes, path, ret_file, error);
        rk_free(text);
    }
    return status;
}
