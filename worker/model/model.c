#include "worker/model/model.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"
#include "worker/model/config_internal.h"
#include "worker/model/dequant_internal.h"
#include "worker/model/gguf_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define NUM_TENSORS (MODEL_FFN_DOWN + 1)

struct model {
    char *file;
    void *mapping; /* NULL: the bytes are the caller's */
    size_t mapping_bytes;
    struct gguf gguf;
    struct model_config config;
    struct model_vocabulary vocabulary;
    const struct gguf_tensor *global[MODEL_ATTENTION_NORM];
    const struct gguf_tensor **layers; /* [num_layers][NUM_TENSORS]; the global ones are NULL */
};

/* Names after "blk.N." for those of a layer. */
static const char *const tensor_names[NUM_TENSORS] = {
    [MODEL_EMBEDDING] = "token_embd.weight",
    [MODEL_OUTPUT] = "output.weight",
    [MODEL_OUTPUT_NORM] = "output_norm.weight",
    [MODEL_ATTENTION_NORM] = "attn_norm.weight",
    [MODEL_Q] = "attn_q.weight",
    [MODEL_K] = "attn_k.weight",
    [MODEL_V] = "attn_v.weight",
    [MODEL_ATTENTION_OUT] = "attn_output.weight",
    [MODEL_FFN_NORM] = "ffn_norm.weight",
    [MODEL_FFN_GATE] = "ffn_gate.weight",
    [MODEL_FFN_UP] = "ffn_up.weight",
    [MODEL_FFN_DOWN] = "ffn_down.weight",
};

struct shape {
    uint64_t rows;
    uint64_t columns;
};

static struct shape tensor_shape(const struct model_config *config, enum model_tensor tensor)
{
    uint64_t q_rows = (uint64_t)config->num_heads * config->head_dim;
    uint64_t kv_rows = (uint64_t)config->num_kv_heads * config->head_dim;
    uint64_t hidden = config->hidden;
    switch (tensor) {
    case MODEL_EMBEDDING:
    case MODEL_OUTPUT:
        return (struct shape){config->vocab_size, hidden};
    case MODEL_OUTPUT_NORM:
    case MODEL_ATTENTION_NORM:
    case MODEL_FFN_NORM:
        return (struct shape){1, hidden};
    case MODEL_Q:
        return (struct shape){q_rows, hidden};
    case MODEL_K:
    case MODEL_V:
        return (struct shape){kv_rows, hidden};
    case MODEL_ATTENTION_OUT:
        return (struct shape){hidden, q_rows};
    case MODEL_FFN_GATE:
    case MODEL_FFN_UP:
        return (struct shape){config->intermediate, hidden};
    case MODEL_FFN_DOWN:
        return (struct shape){hidden, config->intermediate};
    }
    return (struct shape){0, 0};
}

static enum rk_status check_shape(const struct model *model, const struct gguf_tensor *tensor,
                                  struct shape shape, struct rk_error *error)
{
    if (tensor->dims[0] == shape.columns && tensor->dims[1] == shape.rows && tensor->dims[2] == 1 &&
        tensor->dims[3] == 1) {
        return RK_OK;
    }
    return rk_error_set(error, RK_ERR_CORRUPT,
                        "%s: byte %llu: tensor %s is [%llu, %llu, %llu, %llu]; the "
                        "hyper-parameters ask for [%llu, %llu]",
                        model->file, (unsigned long long)tensor->offset,
                        gguf_print(tensor->name).text, (unsigned long long)tensor->dims[0],
                        (unsigned long long)tensor->dims[1], (unsigned long long)tensor->dims[2],
                        (unsigned long long)tensor->dims[3], (unsigned long long)shape.columns,
                        (unsigned long long)shape.rows);
}

/* Finds a tensor that must be there and checks its shape. */
static enum rk_status bind_tensor(const struct model *model, enum model_tensor which,
                                  const char *name, const struct gguf_tensor **tensor,
                                  struct rk_error *error)
{
    *tensor = gguf_find_tensor(&model->gguf, name);
    if (!*tensor) {
        return rk_error_set(error, RK_ERR_CORRUPT, "%s: tensor %s is missing", model->file, name);
    }
    return check_shape(model, *tensor, tensor_shape(&model->config, which), error);
}

/* The embedding says how large the vocabulary is. */
static enum rk_status bind_embedding(struct model *model, struct rk_error *error)
{
    const struct gguf_tensor *embedding =
        gguf_find_tensor(&model->gguf, tensor_names[MODEL_EMBEDDING]);
    const struct gguf_key *key = gguf_find_key(&model->gguf, "llama.vocab_size");
    int64_t vocab_size = 0;
    if (!embedding) {
        return rk_error_set(error, RK_ERR_CORRUPT, "%s: tensor token_embd.weight is missing",
                            model->file);
    }
    if (embedding->dims[1] > MODEL_VOCAB_MAX) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "%s: byte %llu: a vocabulary of more than %u tokens", model->file,
                            (unsigned long long)embedding->offset, MODEL_VOCAB_MAX);
    }
    if (key && (!gguf_key_integer(key, &vocab_size) || vocab_size < 0 ||
                (uint64_t)vocab_size != embedding->dims[1])) {
        return rk_error_set(error, RK_ERR_CORRUPT,
                            "%s: byte %llu: key llama.vocab_size does not match token_embd.weight",
                            model->file, (unsigned long long)key->offset);
    }
    model->config.vocab_size = (uint32_t)embedding->dims[1];
    model->global[MODEL_EMBEDDING] = embedding;
    return check_shape(model, embedding, tensor_shape(&model->config, MODEL_EMBEDDING), error);
}

static enum rk_status bind_global(struct model *model, struct rk_error *error)
{
    enum rk_status status = bind_embedding(model, error);
    if (status != RK_OK) {
        return status;
    }
    model->config.tied_embeddings =
        gguf_find_tensor(&model->gguf, tensor_names[MODEL_OUTPUT]) == NULL;
    if (model->config.tied_embeddings) {
        model->global[MODEL_OUTPUT] = model->global[MODEL_EMBEDDING];
    } else {
        status = bind_tensor(model, MODEL_OUTPUT, tensor_names[MODEL_OUTPUT],
                             &model->global[MODEL_OUTPUT], error);
    }
    return status == RK_OK ? bind_tensor(model, MODEL_OUTPUT_NORM, tensor_names[MODEL_OUTPUT_NORM],
                                         &model->global[MODEL_OUTPUT_NORM], error)
                           : status;
}

static enum rk_status bind_layers(struct model *model, struct rk_error *error)
{
    model->layers =
        rk_alloc_zero((size_t)model->config.num_layers * NUM_TENSORS, sizeof(*model->layers));
    if (!model->layers) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: no memory for its layers", model->file);
    }
    for (uint32_t layer = 0; layer < model->config.num_layers; layer++) {
        for (int i = MODEL_ATTENTION_NORM; i < NUM_TENSORS; i++) {
            char name[64];
            (void)snprintf(name, sizeof(name), "blk.%u.%s", layer, tensor_names[i]);
            enum rk_status status = bind_tensor(model, (enum model_tensor)i, name,
                                                &model->layers[layer * NUM_TENSORS + i], error);
            if (status != RK_OK) {
                return status;
            }
        }
    }
    return RK_OK;
}

/* A tensor that we would not use (a bias, RoPE factors, an expert) means another computation.
 * All tensors that we need are there and none occurs twice, so counting them is enough. */
static enum rk_status refuse_extra_tensors(const struct model *model, struct rk_error *error)
{
    uint32_t needed = (model->config.tied_embeddings ? 2 : 3) +
                      model->config.num_layers * (NUM_TENSORS - MODEL_ATTENTION_NORM);
    if (model->gguf.num_tensors == needed) {
        return RK_OK;
    }
    for (uint32_t i = 0; i < model->gguf.num_tensors; i++) {
        const struct gguf_tensor *tensor = &model->gguf.tensors[i];
        bool used = false;
        for (uint32_t j = 0; j < MODEL_ATTENTION_NORM && !used; j++) {
            used = model->global[j] == tensor;
        }
        for (uint32_t j = 0; j < model->config.num_layers * NUM_TENSORS && !used; j++) {
            used = model->layers[j] == tensor;
        }
        if (!used) {
            return rk_error_set(error, RK_ERR_UNSUPPORTED,
                                "%s: byte %llu: tensor %s has no place in a model of "
                                "architecture llama as this version computes it",
                                model->file, (unsigned long long)tensor->offset,
                                gguf_print(tensor->name).text);
        }
    }
    return RK_OK;
}

static enum rk_status interpret(struct model *model, const void *data, size_t bytes,
                                struct rk_error *error)
{
    enum rk_status status = gguf_parse(data, bytes, model->file, &model->gguf, error);
    if (status == RK_OK) {
        status = config_read(&model->gguf, &model->config, error);
    }
    if (status == RK_OK) {
        status = bind_global(model, error);
    }
    if (status == RK_OK) {
        status = bind_layers(model, error);
    }
    if (status == RK_OK) {
        status = refuse_extra_tensors(model, error);
    }
    if (status == RK_OK) {
        status = vocabulary_read(&model->gguf, model->config.vocab_size, &model->vocabulary, error);
    }
    return status;
}

static struct model *model_begin(const char *name)
{
    struct model *model = rk_alloc_zero(1, sizeof(*model));
    if (model) {
        model->file = rk_alloc_string(name);
    }
    if (model && !model->file) {
        rk_free(model);
        model = NULL;
    }
    return model;
}

enum rk_status model_open_bytes(const void *data, size_t bytes, const char *name,
                                struct model **ret_model, struct rk_error *error)
{
    struct model *model = model_begin(name);
    if (!model) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: no memory to open it", name);
    }
    enum rk_status status = interpret(model, data, bytes, error);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_model = model;
    return RK_OK;

fail:
    model_close(model);
    return status;
}

static enum rk_status io_error(const char *path, const char *action, struct rk_error *error)
{
    int cause = errno;
    char text[128];
    const char *reason = strerror_r(cause, text, sizeof(text));
    return rk_error_set(error, cause == ENOENT ? RK_ERR_NOT_FOUND : RK_ERR_IO, "%s: cannot %s: %s",
                        path, action, reason);
}

/* The mapping outlives the descriptor, which the caller closes. */
static enum rk_status map_file(int fd, const char *path, struct model *model,
                               struct rk_error *error)
{
    struct stat status;
    if (fstat(fd, &status) != 0) {
        return io_error(path, "examine it", error);
    }
    if (!S_ISREG(status.st_mode)) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: not a regular file; name a .gguf file",
                            path);
    }
    if (status.st_size == 0) {
        return rk_error_set(error, RK_ERR_CORRUPT,
                            "%s: byte 0: the file is empty; download it again", path);
    }
    size_t bytes = (size_t)status.st_size;
    void *mapping = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (mapping == MAP_FAILED) {
        return io_error(path, "map it", error);
    }
    model->mapping = mapping;
    model->mapping_bytes = bytes;
    return RK_OK;
}

enum rk_status model_open(const char *path, struct model **ret_model, struct rk_error *error)
{
    struct model *model = model_begin(path);
    if (!model) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: no memory to open it", path);
    }
    enum rk_status status = RK_OK;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* A FIFO must not make us wait. */
    if (fd < 0) {
        status = io_error(path, "open it", error);
        goto fail;
    }
    status = map_file(fd, path, model, error);
    (void)close(fd);
    if (status == RK_OK) {
        status = interpret(model, model->mapping, model->mapping_bytes, error);
    }
    if (status != RK_OK) {
        goto fail;
    }
    *ret_model = model;
    return RK_OK;

fail:
    model_close(model);
    return status;
}

void model_close(struct model *model)
{
    if (!model) {
        return;
    }
    vocabulary_clear(&model->vocabulary);
    gguf_clear(&model->gguf);
    rk_free(model->layers);
    if (model->mapping) {
        (void)munmap(model->mapping, model->mapping_bytes);
    }
    rk_free(model->file);
    rk_free(model);
}

const struct model_config *model_config(const struct model *model)
{
    return &model->config;
}

const struct model_vocabulary *model_vocabulary(const struct model *model)
{
    return &model->vocabulary;
}

/* NULL: there is no such tensor or layer. */
static const struct gguf_tensor *tensor_of(const struct model *model, enum model_tensor tensor,
                                           uint32_t layer)
{
    if ((unsigned)tensor >= NUM_TENSORS) {
        return NULL;
    }
    if (tensor < MODEL_ATTENTION_NORM) {
        return model->global[tensor];
    }
    return layer < model->config.num_layers ? model->layers[layer * NUM_TENSORS + tensor] : NULL;
}

enum rk_status model_tensor_shape(const struct model *model, enum model_tensor tensor,
                                  uint32_t layer, uint32_t *ret_rows, uint32_t *ret_columns)
{
    if (!tensor_of(model, tensor, layer)) {
        return RK_ERR_INVALID;
    }
    /* The limits of the configuration keep both below 2^32. */
    struct shape shape = tensor_shape(&model->config, tensor);
    *ret_rows = (uint32_t)shape.rows;
    *ret_columns = (uint32_t)shape.columns;
    return RK_OK;
}

/* llama.cpp stores rows of Q and K for neighbouring RoPE pairs: row h*D + 2i + s of the file is
 * row h*D + s*D/2 + i of the half-split order. */
static uint64_t half_split_row(uint64_t file_row, uint32_t head_dim)
{
    uint64_t in_head = file_row % head_dim;
    return file_row - in_head + (in_head % 2) * (head_dim / 2) + in_head / 2;
}

enum rk_status model_tensor_read(const struct model *model, enum model_tensor tensor,
                                 uint32_t layer, float *out, struct rk_error *error)
{
    const struct gguf_tensor *source = tensor_of(model, tensor, layer);
    if (!source) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: no tensor %d of layer %u", model->file,
                            (int)tensor, layer);
    }
    const struct dequant *type = dequant_find(source->type);
    bool split = tensor == MODEL_Q || tensor == MODEL_K;
    struct shape shape = tensor_shape(&model->config, tensor);
    uint64_t row_bytes = shape.columns / type->block_elements * type->block_bytes;
    for (uint64_t row = 0; row < shape.rows; row++) {
        uint64_t target = split ? half_split_row(row, model->config.head_dim) : row;
        const uint8_t *data = source->data + row * row_bytes;
        float *values = out + target * shape.columns;
        type->row(data, shape.columns, values);
        if (!dequant_finite(values, shape.columns)) {
            return rk_error_set(error, RK_ERR_CORRUPT,
                                "%s: byte %llu: row %llu of tensor %s holds a NaN or an infinity; "
                                "download it again",
                                model->file, (unsigned long long)(data - model->gguf.data),
                                (unsigned long long)row, gguf_print(source->name).text);
        }
    }
    return RK_OK;
}

enum rk_status model_tensor_read_named(const struct model *model, const char *name, float *out,
                                       uint64_t elements_max, uint64_t *ret_elements)
{
    const struct gguf_tensor *tensor = gguf_find_tensor(&model->gguf, name);
    if (!tensor) {
        return RK_ERR_NOT_FOUND;
    }
    if (tensor->elements > elements_max) {
        return RK_ERR_TOO_LONG;
    }
    dequant_find(tensor->type)->row(tensor->data, tensor->elements, out);
    *ret_elements = tensor->elements;
    return RK_OK;
}

static void hash_field(struct rk_sha256 *sha, const void *data, uint64_t bytes)
{
    rk_sha256_update(sha, &bytes, sizeof(bytes));
    rk_sha256_update(sha, data, bytes);
}

struct rk_id model_fingerprint(const struct model *model, enum rk_dtype kv_dtype)
{
    /* Bump the last word when pages or the meaning of their rows change. */
    static const char domain[] = "redknot.model.v1 llama kv-layout.v1 page64 k-half-split-rotated";
    const struct model_config *config = &model->config;
    const uint32_t numbers[] = {
        config->num_layers, config->num_heads,       config->num_kv_heads,
        config->head_dim,   config->hidden,          config->intermediate,
        config->vocab_size, config->tied_embeddings, (uint32_t)kv_dtype,
    };
    const float floats[] = {config->rope_theta, config->rms_norm_epsilon};
    struct rk_sha256 *sha = rk_sha256_begin();
    struct rk_id id;

    if (model->mapping) {
        (void)madvise(model->mapping, model->mapping_bytes, MADV_WILLNEED);
    }
    hash_field(sha, domain, sizeof(domain) - 1);
    hash_field(sha, numbers, sizeof(numbers));
    hash_field(sha, floats, sizeof(floats));
    for (uint32_t i = 0; i < model->gguf.num_tensors; i++) { /* sorted by name */
        const struct gguf_tensor *tensor = &model->gguf.tensors[i];
        hash_field(sha, tensor->name.data, tensor->name.bytes);
        hash_field(sha, &tensor->type, sizeof(tensor->type));
        hash_field(sha, tensor->dims, sizeof(tensor->dims));
        hash_field(sha, tensor->data, tensor->bytes);
    }
    rk_sha256_end(sha, id.bytes);
    return id;
}

void model_release_pages(const struct model *model)
{
    if (model->mapping) {
        (void)madvise(model->mapping, model->mapping_bytes, MADV_DONTNEED);
    }
}
