#include "worker/model/config_internal.h"

#include "common/base/alloc.h"

#include <string.h>

static enum rk_status key_error(const struct gguf *gguf, enum rk_status status, const char *name,
                                struct rk_error *error, const char *reason)
{
    const struct gguf_key *key = gguf_find_key(gguf, name);
    return rk_error_set(error, status, "%s: byte %llu: key %s %s", gguf->file,
                        (unsigned long long)(key ? key->offset : 0), name, reason);
}

/* An absent key leaves *value as it is, when optional. */
static enum rk_status read_u32(const struct gguf *gguf, const char *name, bool optional,
                               uint32_t maximum, uint32_t *value, struct rk_error *error)
{
    const struct gguf_key *key = gguf_find_key(gguf, name);
    int64_t integer = 0;
    if (!key) {
        return optional ? RK_OK : key_error(gguf, RK_ERR_CORRUPT, name, error, "is missing");
    }
    if (key->type == GGUF_ARRAY) {
        return key_error(gguf, RK_ERR_UNSUPPORTED, name, error,
                         "is an array: layers of different shapes are not supported");
    }
    if (!gguf_key_integer(key, &integer)) {
        return key_error(gguf, RK_ERR_CORRUPT, name, error, "is not an integer");
    }
    if (integer < 1 || integer > maximum) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "%s: byte %llu: key %s is %lld; supported is 1 to %u", gguf->file,
                            (unsigned long long)key->offset, name, (long long)integer, maximum);
    }
    *value = (uint32_t)integer;
    return RK_OK;
}

static enum rk_status read_float(const struct gguf *gguf, const char *name, bool optional,
                                 double min, double max, float *value, struct rk_error *error)
{
    const struct gguf_key *key = gguf_find_key(gguf, name);
    double number = 0;
    if (!key) {
        return optional ? RK_OK : key_error(gguf, RK_ERR_CORRUPT, name, error, "is missing");
    }
    if (!gguf_key_number(key, &number)) {
        return key_error(gguf, RK_ERR_CORRUPT, name, error, "is not a floating-point number");
    }
    if (!(number >= min && number <= max)) {
        return rk_error_set(error, RK_ERR_CORRUPT,
                            "%s: byte %llu: key %s is %g; a number from %g to %g makes sense",
                            gguf->file, (unsigned long long)key->offset, name, number, min, max);
    }
    *value = (float)number;
    return RK_OK;
}

/* What we would have to compute differently for, and do not. */
static enum rk_status refuse_variants(const struct gguf *gguf, struct rk_error *error)
{
    static const char *const zero_keys[] = {"llama.expert_count", "llama.attention.sliding_window",
                                            "llama.attention.logit_softcapping"};
    static const char *const one_keys[] = {"llama.rope.scaling.factor",
                                           "llama.rope.scale_linear",
                                           "llama.rope.scaling.attn_factor",
                                           "split.count",
                                           "llama.residual_scale",
                                           "llama.embedding_scale",
                                           "llama.logit_scale"};
    for (size_t i = 0; i < sizeof(zero_keys) / sizeof(zero_keys[0]); i++) {
        const struct gguf_key *key = gguf_find_key(gguf, zero_keys[i]);
        int64_t integer = 1;
        if (key && (!gguf_key_integer(key, &integer) || integer != 0)) {
            return key_error(gguf, RK_ERR_UNSUPPORTED, zero_keys[i], error, "is not supported");
        }
    }
    for (size_t i = 0; i < sizeof(one_keys) / sizeof(one_keys[0]); i++) {
        const struct gguf_key *key = gguf_find_key(gguf, one_keys[i]);
        int64_t integer = 0;
        double number = 0;
        if (key && !(gguf_key_integer(key, &integer) && (integer == 0 || integer == 1)) &&
            !(gguf_key_number(key, &number) && (number == 0.0 || number == 1.0))) {
            return key_error(gguf, RK_ERR_UNSUPPORTED, one_keys[i], error,
                             "other than 1 is not supported");
        }
    }
    const struct gguf_key *scaling = gguf_find_key(gguf, "llama.rope.scaling.type");
    if (scaling &&
        (scaling->type != GGUF_STRING ||
         !gguf_string_equal((struct model_string){(const char *)scaling->data, scaling->count},
                            "none"))) {
        return key_error(gguf, RK_ERR_UNSUPPORTED, "llama.rope.scaling.type", error,
                         "other than none is not supported");
    }
    return RK_OK;
}

static enum rk_status find_string(const struct gguf *gguf, const char *name,
                                  struct model_string *ret_string, struct rk_error *error)
{
    const struct gguf_key *key = gguf_find_key(gguf, name);
    *ret_string = (struct model_string){"", 0};
    if (!key) {
        return RK_OK;
    }
    if (key->type != GGUF_STRING) {
        return key_error(gguf, RK_ERR_CORRUPT, name, error, "is not a string");
    }
    *ret_string = (struct model_string){(const char *)key->data, key->count};
    return RK_OK;
}

static enum rk_status check_architecture(const struct gguf *gguf, struct rk_error *error)
{
    struct model_string architecture;
    enum rk_status status = find_string(gguf, "general.architecture", &architecture, error);
    if (status != RK_OK) {
        return status;
    }
    if (architecture.bytes == 0) {
        return key_error(gguf, RK_ERR_CORRUPT, "general.architecture", error, "is missing");
    }
    if (!gguf_string_equal(architecture, "llama")) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "%s: architecture %s is not supported; only llama is", gguf->file,
                            gguf_print(architecture).text);
    }
    return refuse_variants(gguf, error);
}

static enum rk_status read_heads(const struct gguf *gguf, struct model_config *config,
                                 struct rk_error *error)
{
    enum rk_status status = read_u32(gguf, "llama.attention.head_count", false, MODEL_HEADS_MAX,
                                     &config->num_heads, error);
    if (status != RK_OK) {
        return status;
    }
    config->num_kv_heads = config->num_heads;
    status = read_u32(gguf, "llama.attention.head_count_kv", true, MODEL_HEADS_MAX,
                      &config->num_kv_heads, error);
    if (status != RK_OK) {
        return status;
    }
    if (config->num_kv_heads > RK_KV_HEADS_MAX || config->num_heads % config->num_kv_heads != 0) {
        return key_error(gguf, RK_ERR_UNSUPPORTED, "llama.attention.head_count_kv", error,
                         "is above 256 or does not divide head_count");
    }
    config->head_dim = config->hidden / config->num_heads;
    status = read_u32(gguf, "llama.attention.key_length", true, RK_HEAD_DIM_MAX, &config->head_dim,
                      error);
    if (status != RK_OK) {
        return status;
    }
    uint32_t value_dim = config->head_dim;
    uint32_t rope_dim = config->head_dim;
    status =
        read_u32(gguf, "llama.attention.value_length", true, RK_HEAD_DIM_MAX, &value_dim, error);
    if (status == RK_OK) {
        status =
            read_u32(gguf, "llama.rope.dimension_count", true, RK_HEAD_DIM_MAX, &rope_dim, error);
    }
    if (status != RK_OK) {
        return status;
    }
    if (config->head_dim < 2 || config->head_dim > RK_HEAD_DIM_MAX || config->head_dim % 2 != 0 ||
        value_dim != config->head_dim || rope_dim != config->head_dim) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "%s: head dimensions of keys %u, values %u and RoPE %u; they must be "
                            "equal, even and 2 to %d",
                            gguf->file, config->head_dim, value_dim, rope_dim, RK_HEAD_DIM_MAX);
    }
    return RK_OK;
}

enum rk_status config_read(const struct gguf *gguf, struct model_config *ret_config,
                           struct rk_error *error)
{
    struct model_config config = {.rope_theta = 10000.0f};
    enum rk_status status = check_architecture(gguf, error);
    if (status != RK_OK) {
        return status;
    }
    const struct {
        const char *name;
        uint32_t maximum;
        uint32_t *value;
    } keys[] = {
        {"llama.block_count", RK_LAYERS_MAX, &config.num_layers},
        {"llama.context_length", UINT32_MAX, &config.context_tokens},
        {"llama.embedding_length", MODEL_HIDDEN_MAX, &config.hidden},
        {"llama.feed_forward_length", MODEL_INTERMEDIATE_MAX, &config.intermediate},
    };
    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]) && status == RK_OK; i++) {
        status = read_u32(gguf, keys[i].name, false, keys[i].maximum, keys[i].value, error);
    }
    if (config.context_tokens > RK_SEGMENT_TOKENS_MAX) { /* More than anybody asks for. */
        config.context_tokens = RK_SEGMENT_TOKENS_MAX;
    }
    if (status == RK_OK) {
        status = read_heads(gguf, &config, error);
    }
    if (status == RK_OK) {
        status = read_float(gguf, "llama.rope.freq_base", true, 1, 1e15, &config.rope_theta, error);
    }
    if (status == RK_OK) {
        status = read_float(gguf, "llama.attention.layer_norm_rms_epsilon", false, 1e-30, 0.1,
                            &config.rms_norm_epsilon, error);
    }
    struct model_string name;
    if (status == RK_OK) {
        status = find_string(gguf, "general.name", &name, error);
    }
    if (status != RK_OK) {
        return status;
    }
    struct gguf_print print = gguf_print(name);
    print.text[sizeof(config.name) - 1] = '\0';
    memcpy(config.name, print.text, strlen(print.text) + 1);
    *ret_config = config;
    return RK_OK;
}

/* ---- Vocabulary ---- */

static enum rk_status no_memory(const struct gguf *gguf, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: no memory for the vocabulary", gguf->file);
}

/* The parser has checked that all strings lie inside the file. */
static enum rk_status read_strings(const struct gguf *gguf, const struct gguf_key *key,
                                   const struct model_string **strings, struct rk_error *error)
{
    struct model_string *list = rk_alloc_zero(key->count, sizeof(*list));
    const uint8_t *data = key->data;
    if (!list) {
        return no_memory(gguf, error);
    }
    for (uint64_t i = 0; i < key->count; i++) {
        uint64_t bytes;
        memcpy(&bytes, data, sizeof(bytes));
        list[i] = (struct model_string){(const char *)data + sizeof(bytes), bytes};
        data += sizeof(bytes) + bytes;
    }
    *strings = list;
    return RK_OK;
}

static enum rk_status read_types(const struct gguf *gguf, struct model_vocabulary *vocabulary,
                                 struct rk_error *error)
{
    static const char name[] = "tokenizer.ggml.token_type";
    const struct gguf_key *key = gguf_find_key(gguf, name);
    if (key && (key->type != GGUF_ARRAY || key->element_type != GGUF_I32 ||
                key->count != vocabulary->num_tokens)) {
        return key_error(gguf, RK_ERR_CORRUPT, name, error, "is not one i32 for each token");
    }
    int32_t *types = rk_alloc_zero(vocabulary->num_tokens, sizeof(*types));
    if (!types) {
        return no_memory(gguf, error);
    }
    vocabulary->types = types;
    if (key) {
        memcpy(types, key->data, vocabulary->num_tokens * sizeof(*types));
        return RK_OK;
    }
    for (uint32_t i = 0; i < vocabulary->num_tokens; i++) {
        types[i] = 1; /* normal */
    }
    return RK_OK;
}

static enum rk_status read_merges(const struct gguf *gguf, struct model_vocabulary *vocabulary,
                                  struct rk_error *error)
{
    static const char name[] = "tokenizer.ggml.merges";
    const struct gguf_key *key = gguf_find_key(gguf, name);
    bool bpe = !vocabulary->model || vocabulary->model[0] == '\0' ||
               strcmp(vocabulary->model, "gpt2") == 0;
    if (vocabulary->num_tokens > 0 && bpe && (!key || key->count == 0)) {
        return rk_error_set(error, RK_ERR_CORRUPT,
                            "%s: key %s is missing or empty: byte-level BPE without merges would "
                            "read every text letter by letter; download or convert it again",
                            gguf->file, name);
    }
    if (!key) {
        return RK_OK;
    }
    if (key->type != GGUF_ARRAY || key->element_type != GGUF_STRING ||
        key->count > 2 * MODEL_VOCAB_MAX) {
        return key_error(gguf, RK_ERR_CORRUPT, name, error, "is not an array of strings");
    }
    vocabulary->num_merges = (uint32_t)key->count;
    return read_strings(gguf, key, &vocabulary->merges, error);
}

static enum rk_status read_id(const struct gguf *gguf, const char *name, uint32_t num_tokens,
                              int32_t *ret_id, struct rk_error *error)
{
    const struct gguf_key *key = gguf_find_key(gguf, name);
    int64_t id = -1;
    /* Converters write "none" as -1 or as 2^32 - 1. */
    if (key && (!gguf_key_integer(key, &id) || id < -1 || (id >= num_tokens && id != UINT32_MAX))) {
        return key_error(gguf, RK_ERR_CORRUPT, name, error, "is not the id of a token");
    }
    *ret_id = id == UINT32_MAX ? -1 : (int32_t)id;
    return RK_OK;
}

static enum rk_status read_ids(const struct gguf *gguf, struct model_vocabulary *vocabulary,
                               struct rk_error *error)
{
    const struct {
        const char *name;
        int32_t *id;
    } ids[] = {
        {"tokenizer.ggml.bos_token_id", &vocabulary->bos_id},
        {"tokenizer.ggml.eos_token_id", &vocabulary->eos_id},
        {"tokenizer.ggml.unknown_token_id", &vocabulary->unknown_id},
        {"tokenizer.ggml.padding_token_id", &vocabulary->padding_id},
    };
    for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]); i++) {
        enum rk_status status =
            read_id(gguf, ids[i].name, vocabulary->num_tokens, ids[i].id, error);
        if (status != RK_OK) {
            return status;
        }
    }
    const struct gguf_key *add_bos = gguf_find_key(gguf, "tokenizer.ggml.add_bos_token");
    if (add_bos && add_bos->type != GGUF_BOOL) {
        return key_error(gguf, RK_ERR_CORRUPT, "tokenizer.ggml.add_bos_token", error,
                         "is not a boolean");
    }
    vocabulary->add_bos = add_bos && *add_bos->data != 0;
    if (vocabulary->add_bos && vocabulary->bos_id < 0) {
        return key_error(gguf, RK_ERR_CORRUPT, "tokenizer.ggml.add_bos_token", error,
                         "is true, but tokenizer.ggml.bos_token_id names no token");
    }
    return RK_OK;
}

static enum rk_status copy_string(const struct gguf *gguf, const char *name, const char **ret_copy,
                                  struct rk_error *error)
{
    struct model_string string;
    enum rk_status status = find_string(gguf, name, &string, error);
    if (status != RK_OK) {
        return status;
    }
    *ret_copy = rk_alloc_string(gguf_print(string).text);
    return *ret_copy ? RK_OK : no_memory(gguf, error);
}

static enum rk_status read_texts(const struct gguf *gguf, struct model_vocabulary *vocabulary,
                                 struct rk_error *error)
{
    enum rk_status status = copy_string(gguf, "tokenizer.ggml.model", &vocabulary->model, error);
    if (status == RK_OK) {
        status = copy_string(gguf, "tokenizer.ggml.pre", &vocabulary->pre, error);
    }
    if (status == RK_OK) {
        status = find_string(gguf, "tokenizer.chat_template", &vocabulary->chat_template, error);
    }
    return status;
}

enum rk_status vocabulary_read(const struct gguf *gguf, uint32_t vocab_size,
                               struct model_vocabulary *vocabulary, struct rk_error *error)
{
    const struct gguf_key *tokens = gguf_find_key(gguf, "tokenizer.ggml.tokens");
    enum rk_status status = read_texts(gguf, vocabulary, error);
    if (status != RK_OK) {
        return status;
    }
    if (tokens) {
        if (tokens->type != GGUF_ARRAY || tokens->element_type != GGUF_STRING ||
            tokens->count != vocab_size) {
            return key_error(gguf, RK_ERR_CORRUPT, "tokenizer.ggml.tokens", error,
                             "is not one string for each row of token_embd.weight");
        }
        vocabulary->num_tokens = (uint32_t)tokens->count;
        status = read_strings(gguf, tokens, &vocabulary->tokens, error);
    }
    if (status == RK_OK) {
        status = read_types(gguf, vocabulary, error);
    }
    if (status == RK_OK) {
        status = read_merges(gguf, vocabulary, error);
    }
    if (status == RK_OK) {
        status = read_ids(gguf, vocabulary, error);
    }
    return status;
}

void vocabulary_clear(struct model_vocabulary *vocabulary)
{
    rk_free((void *)vocabulary->tokens);
    rk_free((void *)vocabulary->types);
    rk_free((void *)vocabulary->merges);
    rk_free((void *)vocabulary->pre);
    rk_free((void *)vocabulary->model);
    *vocabulary = (struct model_vocabulary){0};
}
