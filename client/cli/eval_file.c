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

static enum rk_status wrong_count(const struct place *place, size_t count, size_t min, size_t max,
                                  struct rk_error *error)
{
    char why[96];
    (void)snprintf(why, sizeof(why), "has %zu token ids; allowed are %zu to %zu", count, min, max);
    return wrong(place, error, why);
}

/* {"text": "...", "special": true} */
static enum rk_status take_text(const json_t *object, const struct place *place,
                                struct eval_tokens *ret_tokens, struct rk_error *error)
{
    const json_t *text = json_object_get(object, "text");
    const json_t *special = json_object_get(object, "special");
    if (!json_is_string(text) || json_string_length(text) == 0 ||
        (special && !json_is_boolean(special)) || json_object_size(object) > (special ? 2 : 1)) {
        return wrong(place, error,
                     "must be a list of token ids, or {\"text\": \"...\"} with \"special\": true "
                     "where special tokens in it are meant");
    }
    if (strlen(json_string_value(text)) != json_string_length(text)) {
        return wrong(place, error, "the text holds a NUL (U+0000); leave it out");
    }
    char *copy = rk_alloc_string(json_string_value(text));
    if (!copy) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", place->name);
    }
    *ret_tokens = (struct eval_tokens){.text = copy, .parse_special = json_is_true(special)};
    return RK_OK;
}

static void tokens_clear(struct eval_tokens *tokens)
{
    rk_free(tokens->ids);
    rk_free(tokens->text);
    *tokens = (struct eval_tokens){.ids = NULL};
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
    if (json_is_object(list)) {
        return take_text(list, place, ret_tokens, error);
    }
    if (!list || !json_is_array(list)) {
        return wrong(place, error,
                     list ? "must be a list of token ids, or {\"text\": \"...\"}"
                          : "is missing; give a list of token ids, or {\"text\": \"...\"}");
    }
    if (count < min || count > max) {
        return wrong_count(place, count, min, max, error);
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
        tokens_clear(&prefix);
        return wrong(place, error,
                     list ? "must be a list of at most 1024 lists of token ids"
                          : "is missing; give a list of lists of token ids");
    }
    request->segments = rk_alloc_zero(count + 1, sizeof(*request->segments));
    if (!request->segments) {
        tokens_clear(&prefix);
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", place->name);
    }
    request->has_prefix = prefix.count > 0 || prefix.text;
    if (request->has_prefix) {
        request->segments[request->num_segments++] = prefix;
    } else {
        tokens_clear(&prefix);
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
            tokens_clear(&request->segments[j]);
        }
        rk_free(request->segments);
        tokens_clear(&request->question);
        tokens_clear(&request->continuation);
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
    struct eval_file file = {.requests = rk_alloc_zero(count, sizeof(struct eval_request)),
                             .name = name};
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

/* ---- Text into ids ---- */

struct resolve {
    eval_tokenize tokenize;
    void *context;
    uint32_t vocab;
    struct rk_error *error;
};

static enum rk_status resolve_tokens(const struct resolve *resolve, const struct place *place,
                                     size_t max, struct eval_tokens *tokens)
{
    if (tokens->text && !tokens->ids) {
        enum rk_status status =
            resolve->tokenize(resolve->context, tokens->text, tokens->parse_special, &tokens->ids,
                              &tokens->count, resolve->error);
        if (status != RK_OK) {
            rk_error_prefix(resolve->error, "%s: request %zu: \"%s\"", place->name, place->request,
                            place->key);
            return status;
        }
        if (tokens->count == 0 || tokens->count > max) {
            return wrong_count(place, tokens->count, 1, max, resolve->error);
        }
    }
    for (size_t i = 0; i < tokens->count; i++) {
        if ((uint32_t)tokens->ids[i] >= resolve->vocab) {
            char why[96];
            (void)snprintf(why, sizeof(why), "token %zu is %d, outside the vocabulary of %u", i,
                           (int)tokens->ids[i], resolve->vocab);
            return wrong(place, resolve->error, why);
        }
    }
    return RK_OK;
}

static enum rk_status resolve_request(const struct resolve *resolve, struct place *place,
                                      struct eval_request *request)
{
    enum rk_status status = RK_OK;
    for (size_t i = 0; i < request->num_segments && status == RK_OK; i++) {
        bool prefix = request->has_prefix && i == 0;
        place->key = prefix ? "prefix" : "segments";
        place->segment = prefix ? -1 : (long)i - request->has_prefix;
        status = resolve_tokens(resolve, place, EVAL_TOKENS_MAX, &request->segments[i]);
    }
    place->segment = -1;
    if (status == RK_OK) {
        place->key = "question";
        status = resolve_tokens(resolve, place, EVAL_TOKENS_MAX, &request->question);
    }
    if (status == RK_OK) {
        place->key = "continuation";
        status = resolve_tokens(resolve, place, EVAL_POSITIONS_MAX, &request->continuation);
    }
    return status;
}

enum rk_status eval_file_resolve(struct eval_file *file, eval_tokenize tokenize, void *context,
                                 uint32_t vocab, struct rk_error *error)
{
    struct resolve resolve = {
        .tokenize = tokenize, .context = context, .vocab = vocab, .error = error};
    enum rk_status status = RK_OK;
    for (size_t i = 0; i < file->num_requests && status == RK_OK; i++) {
        struct place place = {.name = file->name, .request = i, .segment = -1};
        status = resolve_request(&resolve, &place, &file->requests[i]);
    }
    return status;
}

enum rk_status eval_file_parse(const char *text, size_t bytes, const char *name,
                               struct eval_file *ret_file, struct rk_error *error)
{
    json_error_t why;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &why);
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
