#include "worker/engine/engine_internal.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/base/log.h"

#include <math.h>

/* ---- Weights ---- */

/* One weight tensor after another into out, all [rows][columns]; they become one matrix. */
static enum rk_status read_stacked(const struct model *model, const enum model_tensor *tensors,
                                   uint32_t num_tensors, uint32_t layer, uint32_t rows,
                                   uint32_t columns, float *out, struct rk_error *error)
{
    uint32_t rows_read = 0;

    for (uint32_t i = 0; i < num_tensors; i++) {
        uint32_t tensor_rows = 0;
        uint32_t tensor_columns = 0;
        enum rk_status status =
            model_tensor_shape(model, tensors[i], layer, &tensor_rows, &tensor_columns);
        if (status != RK_OK) {
            return rk_error_set(error, status, "layer %u: tensor %d is missing", layer,
                                (int)tensors[i]);
        }
        if (tensor_columns != columns || tensor_rows > rows - rows_read) {
            return rk_error_set(error, RK_ERR_INVALID, "layer %u: tensor %d is %u x %u", layer,
                                (int)tensors[i], tensor_rows, tensor_columns);
        }
        status =
            model_tensor_read(model, tensors[i], layer, out + (size_t)rows_read * columns, error);
        if (status != RK_OK) {
            return status;
        }
        rows_read += tensor_rows;
    }
    if (rows_read != rows) {
        return rk_error_set(error, RK_ERR_INVALID, "layer %u: tensor %d has %u rows, not %u", layer,
                            (int)tensors[0], rows_read, rows);
    }
    return RK_OK;
}

static enum rk_status load_matrix(struct engine *engine, const struct model *model,
                                  const enum model_tensor *tensors, uint32_t num_tensors,
                                  uint32_t layer, uint32_t rows, uint32_t columns,
                                  struct kernels_matrix **ret_matrix, struct rk_error *error)
{
    float *weights = rk_alloc_aligned(64, (size_t)rows * columns * sizeof(*weights));
    if (!weights) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory to convert %u x %u weights", rows,
                            columns);
    }
    enum rk_status status =
        read_stacked(model, tensors, num_tensors, layer, rows, columns, weights, error);
    if (status == RK_OK) {
        status = kernels_matrix_create(engine->kernels, weights, rows, columns, ret_matrix, error);
    }
    rk_free(weights);
    return status;
}

static enum rk_status load_norm(const struct engine *engine, const struct model *model,
                                enum model_tensor tensor, uint32_t layer, float **ret_norm,
                                struct rk_error *error)
{
    uint32_t rows = 0;
    uint32_t columns = 0;
    uint32_t hidden = engine->config.hidden;

    enum rk_status status = model_tensor_shape(model, tensor, layer, &rows, &columns);
    if (status != RK_OK || (uint64_t)rows * columns != hidden) {
        return rk_error_set(error, status == RK_OK ? RK_ERR_INVALID : status,
                            "layer %u: norm %d does not have %u weights", layer, (int)tensor,
                            hidden);
    }
    float *norm = rk_alloc_aligned(64, hidden * sizeof(*norm));
    if (!norm) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a norm");
    }
    status = model_tensor_read(model, tensor, layer, norm, error);
    if (status != RK_OK) {
        rk_free(norm);
        return status;
    }
    *ret_norm = norm;
    return RK_OK;
}

static enum rk_status load_layer(struct engine *engine, const struct model *model, uint32_t index,
                                 struct rk_error *error)
{
    static const enum model_tensor qkv[] = {MODEL_Q, MODEL_K, MODEL_V};
    struct engine_layer *layer = &engine->layers[index];
    uint32_t hidden = engine->config.hidden;
    uint32_t wide = engine->config.intermediate;
    const struct {
        const enum model_tensor *tensors;
        uint32_t num_tensors;
        uint32_t rows;
        uint32_t columns;
        struct kernels_matrix **matrix;
    } matrices[] = {
        {qkv, 3, engine->width_q + 2 * engine->width_kv, hidden, &layer->qkv},
        {(const enum model_tensor[]){MODEL_ATTENTION_OUT}, 1, hidden, engine->width_q, &layer->out},
        {(const enum model_tensor[]){MODEL_FFN_GATE}, 1, wide, hidden, &layer->gate},
        {(const enum model_tensor[]){MODEL_FFN_UP}, 1, wide, hidden, &layer->up},
        {(const enum model_tensor[]){MODEL_FFN_DOWN}, 1, hidden, wide, &layer->down},
    };
    enum rk_status status = RK_OK;

    for (size_t i = 0; status == RK_OK && i < sizeof(matrices) / sizeof(matrices[0]); i++) {
        status = load_matrix(engine, model, matrices[i].tensors, matrices[i].num_tensors, index,
                             matrices[i].rows, matrices[i].columns, matrices[i].matrix, error);
    }
    if (status == RK_OK) {
        status =
            load_norm(engine, model, MODEL_ATTENTION_NORM, index, &layer->attention_norm, error);
    }
    if (status == RK_OK) {
        status = load_norm(engine, model, MODEL_FFN_NORM, index, &layer->ffn_norm, error);
    }
    return status;
}

static enum rk_status load_weights(struct engine *engine, const struct model *model,
                                   struct rk_error *error)
{
    const struct model_config *config = &engine->config;
    const enum model_tensor embedding = MODEL_EMBEDDING;
    const enum model_tensor output = MODEL_OUTPUT;

    engine->layers = rk_alloc_zero(config->num_layers, sizeof(*engine->layers));
    if (!engine->layers) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %u layers", config->num_layers);
    }
    enum rk_status status = load_matrix(engine, model, &output, 1, 0, config->vocab_size,
                                        config->hidden, &engine->output, error);
    if (status == RK_OK && !config->tied_embeddings) {
        status = load_matrix(engine, model, &embedding, 1, 0, config->vocab_size, config->hidden,
                             &engine->embedding, error);
    }
    if (status == RK_OK) {
        status = load_norm(engine, model, MODEL_OUTPUT_NORM, 0, &engine->output_norm, error);
    }
    for (uint32_t layer = 0; status == RK_OK && layer < config->num_layers; layer++) {
        status = load_layer(engine, model, layer, error);
    }
    return status;
}

/* ---- Creation ---- */

static enum rk_status create_rope(struct engine *engine, struct rk_error *error)
{
    uint32_t half = engine->config.head_dim / 2;
    size_t count = (size_t)engine->context_tokens * half;

    engine->rope_cos = rk_alloc_aligned(64, count * sizeof(float));
    engine->rope_sin = rk_alloc_aligned(64, count * sizeof(float));
    if (!engine->rope_cos || !engine->rope_sin) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the rotation of %u positions",
                            engine->context_tokens);
    }
    for (uint32_t i = 0; i < half; i++) {
        double frequency =
            pow((double)engine->config.rope_theta, -2.0 * i / engine->config.head_dim);
        for (uint32_t position = 0; position < engine->context_tokens; position++) {
            engine->rope_cos[(size_t)position * half + i] = (float)cos(position * frequency);
            engine->rope_sin[(size_t)position * half + i] = (float)sin(position * frequency);
        }
    }
    engine->rope = (struct kernels_rope){engine->rope_cos, engine->rope_sin, engine->context_tokens,
                                         engine->config.head_dim};
    return RK_OK;
}

static enum rk_status create_buffers(struct engine *engine, struct rk_error *error)
{
    const struct model_config *config = &engine->config;
    const struct {
        float **buffer;
        uint32_t width;
    } buffers[] = {
        {&engine->x, config->hidden},
        {&engine->norm, config->hidden},
        {&engine->projection, config->hidden},
        {&engine->qkv, engine->width_q + 2 * engine->width_kv},
        {&engine->q, engine->width_q},
        {&engine->attended, engine->width_q},
        {&engine->gate, config->intermediate},
        {&engine->up, config->intermediate},
    };

    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
        size_t bytes = (size_t)KERNELS_ROWS_MAX * buffers[i].width * sizeof(float);
        *buffers[i].buffer = rk_alloc_aligned(64, bytes);
        if (!*buffers[i].buffer) {
            return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the engine's buffers");
        }
    }
    engine->views = rk_alloc_zero(config->num_kv_heads, sizeof(*engine->views));
    if (!engine->views) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the engine's buffers");
    }
    return RK_OK;
}

static enum rk_status check_config(const struct model_config *config,
                                   const struct engine_options *options, struct rk_error *error)
{
    if (config->num_layers < 1 || config->num_kv_heads < 1 || config->hidden < 1 ||
        config->intermediate < 1 || config->vocab_size < 1 || config->num_layers > RK_LAYERS_MAX ||
        config->num_kv_heads > RK_KV_HEADS_MAX || config->num_heads % config->num_kv_heads != 0 ||
        config->num_heads < config->num_kv_heads) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "%s: %u layers, %u heads, %u KV heads are not supported", config->name,
                            config->num_layers, config->num_heads, config->num_kv_heads);
    }
    if (config->num_heads / config->num_kv_heads > KERNELS_GROUP_MAX) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "%s: %u heads share a KV head; at most %d are supported", config->name,
                            config->num_heads / config->num_kv_heads, KERNELS_GROUP_MAX);
    }
    if (config->head_dim < 16 || config->head_dim > 256 || config->head_dim % 16 != 0) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "%s: head dimension %u is not a multiple of 16 from 16 to 256",
                            config->name, config->head_dim);
    }
    if (options->context_tokens > config->context_tokens) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "a context of %u tokens was asked for, %s is made for %u",
                            options->context_tokens, config->name, config->context_tokens);
    }
    if (config->context_tokens < 1 || config->context_tokens > RK_SEGMENT_TOKENS_MAX) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED, "%s: a context of %u tokens", config->name,
                            config->context_tokens);
    }
    return RK_OK;
}

/* Twice the context, but no more than half of the memory that this process may still take. */
static uint64_t default_pool_tokens(const struct engine *engine)
{
    uint64_t tokens = 2 * (uint64_t)engine->context_tokens;
    uint64_t page = engine_num_heads(engine) * rk_kv_page_bytes(&engine->layout); /* 64 tokens */
    struct rk_limits limits;
    rk_limits_read(&limits);
    uint64_t fit = limits.memory_bytes / 2 / page * RK_PAGE_TOKENS;
    if (fit >= tokens) {
        return tokens;
    }
    fit = fit > RK_PAGE_TOKENS ? fit : RK_PAGE_TOKENS;
    RK_LOG_WARN("pool_limited", "tokens=%llu wanted=%llu memory_mib=%llu by=%q effect=%q",
                (unsigned long long)fit, (unsigned long long)tokens,
                (unsigned long long)(limits.memory_bytes >> 20), limits.memory_by,
                "fewer requests at once; set --pool-tokens or --context");
    return fit;
}

static enum rk_status create_pool(struct engine *engine, uint64_t pool_tokens,
                                  struct rk_error *error)
{
    uint64_t tokens = pool_tokens ? pool_tokens : default_pool_tokens(engine);
    uint64_t token_pages = tokens / RK_PAGE_TOKENS + (tokens % RK_PAGE_TOKENS != 0);
    uint64_t pages = 0;
    enum rk_status status = RK_ERR_INVALID;

    if (!__builtin_mul_overflow(token_pages, (uint64_t)engine_num_heads(engine), &pages)) {
        status = engine_page_pool_create(&engine->pool, pages, rk_kv_page_bytes(&engine->layout));
    }
    return status == RK_OK ? RK_OK
                           : rk_error_set(error, status, "no page pool for %llu tokens",
                                          (unsigned long long)tokens);
}

enum rk_status engine_create(const struct model *model, const struct engine_options *options,
                             struct engine **ret_engine, struct rk_error *error)
{
    const struct model_config *config = model_config(model);
    const struct kernels_options kernels = {options->mode, options->isa, options->threads};
    enum rk_status status = check_config(config, options, error);
    if (status != RK_OK) {
        return status;
    }
    struct engine *engine = rk_alloc_zero(1, sizeof(*engine));
    if (!engine) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for an engine");
    }
    engine->config = *config;
    engine->width_q = config->num_heads * config->head_dim;
    engine->width_kv = config->num_kv_heads * config->head_dim;
    engine->context_tokens = options->context_tokens ? options->context_tokens
                             : config->context_tokens < ENGINE_CONTEXT_DEFAULT_MAX
                                 ? config->context_tokens
                                 : ENGINE_CONTEXT_DEFAULT_MAX;
    engine->layout = (struct rk_kv_layout){
        .num_layers = config->num_layers,
        .num_kv_heads = config->num_kv_heads,
        .head_dim = config->head_dim,
        .dtype = options->mode == KERNELS_F32 ? RK_DTYPE_F32 : RK_DTYPE_BF16,
    };
    status = kernels_create(&kernels, &engine->kernels, error);
    if (status != RK_OK) {
        goto fail;
    }
    status = load_weights(engine, model, error);
    if (status != RK_OK) {
        goto fail;
    }
    status = create_rope(engine, error);
    if (status != RK_OK) {
        goto fail;
    }
    status = create_buffers(engine, error);
    if (status != RK_OK) {
        goto fail;
    }
    status = create_pool(engine, options->pool_tokens, error);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_engine = engine;
    return RK_OK;

fail:
    engine_destroy(engine);
    return status;
}

static void layer_destroy(struct engine_layer *layer)
{
    kernels_matrix_destroy(layer->qkv);
    kernels_matrix_destroy(layer->out);
    kernels_matrix_destroy(layer->gate);
    kernels_matrix_destroy(layer->up);
    kernels_matrix_destroy(layer->down);
    rk_free(layer->attention_norm);
    rk_free(layer->ffn_norm);
}

void engine_destroy(struct engine *engine)
{
    if (!engine) {
        return;
    }
    RK_ASSERT(engine->num_sequences == 0);
    for (uint32_t i = 0; engine->layers && i < engine->config.num_layers; i++) {
        layer_destroy(&engine->layers[i]);
    }
    rk_free(engine->layers);
    kernels_matrix_destroy(engine->embedding);
    kernels_matrix_destroy(engine->output);
    rk_free(engine->output_norm);
    rk_free(engine->rope_cos);
    rk_free(engine->rope_sin);
    rk_free(engine->x);
    rk_free(engine->norm);
    rk_free(engine->projection);
    rk_free(engine->qkv);
    rk_free(engine->q);
    rk_free(engine->attended);
    rk_free(engine->gate);
    rk_free(engine->up);
    rk_free(engine->views);
    engine_page_pool_destroy(&engine->pool);
    kernels_destroy(engine->kernels);
    rk_free(engine);
}

/* ---- What it is ---- */

void engine_layout(const struct engine *engine, struct rk_kv_layout *ret_layout)
{
    *ret_layout = engine->layout;
}

uint32_t engine_context_tokens(const struct engine *engine)
{
    return engine->context_tokens;
}

uint32_t engine_vocab_size(const struct engine *engine)
{
    return engine->config.vocab_size;
}

const char *engine_isa_name(const struct engine *engine)
{
    return kernels_isa_name(engine->kernels);
}

const char *engine_numeric_path_name(const struct engine *engine)
{
    return kernels_numeric_path(engine->kernels);
}

uint64_t engine_pool_pages(const struct engine *engine)
{
    return engine->pool.num_pages;
}

uint64_t engine_pool_pages_used(const struct engine *engine)
{
    return engine->pool.num_pages - engine->pool.num_free;
}

uint64_t engine_pages_needed(const struct engine *engine, uint32_t num_tokens)
{
    return rk_kv_pages_total(&engine->layout, num_tokens);
}
