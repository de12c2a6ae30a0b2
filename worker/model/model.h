/*
 * model: hyper-parameters and weights of a model file.
 *
 * GGUF (versions 2 and 3) with F32, F16, BF16, Q4_0, Q4_1 and Q8_0 tensors,
 * architecture "llama". The file is mapped read-only and nothing in it is
 * trusted: every length is checked against the file before it is used, and a
 * bad file gives one line that names the file, the place and the reason.
 * Safetensors checkpoints and further architectures join behind this header.
 *
 * Threads: immutable after opening; any thread.
 */
#ifndef WORKER_MODEL_MODEL_H
#define WORKER_MODEL_MODEL_H

#include "common/base/id.h"
#include "common/base/kv_layout.h"
#include "common/base/status.h"

struct model;

struct model_config {
    uint32_t num_layers;
    uint32_t num_heads;
    uint32_t num_kv_heads;
    uint32_t head_dim;
    uint32_t hidden;
    uint32_t intermediate;
    uint32_t vocab_size;
    uint32_t context_tokens;
    float rope_theta;
    float rms_norm_epsilon;
    bool tied_embeddings;
    char name[64];
};

/* What a tokenizer needs from the file; borrowed from the model. Strings are not NUL-terminated. */
struct model_string {
    const char *data;
    size_t bytes;
};
struct model_vocabulary {
    const char *model;                 /* "gpt2": byte-level BPE; NULL says the same */
    const char *pre;                   /* "smollm", "gpt-2", ...; empty: the file does not say */
    const struct model_string *tokens; /* [num_tokens] */
    const int32_t *types; /* [num_tokens], GGUF token types; 3 = control, 4 = user defined */
    uint32_t num_tokens;
    const struct model_string *merges; /* [num_merges], "left right" */
    uint32_t num_merges;
    int32_t bos_id, eos_id, unknown_id, padding_id; /* -1: none */
    bool add_bos;
    struct model_string chat_template; /* empty: none */
};

enum model_tensor {
    MODEL_EMBEDDING,      /* [vocab][hidden] */
    MODEL_OUTPUT,         /* [vocab][hidden]; the embedding itself when tied */
    MODEL_OUTPUT_NORM,    /* [hidden] */
    MODEL_ATTENTION_NORM, /* the rest per layer; [hidden] */
    MODEL_Q,              /* [heads * head_dim][hidden] */
    MODEL_K,              /* [kv_heads * head_dim][hidden] */
    MODEL_V,
    MODEL_ATTENTION_OUT, /* [hidden][heads * head_dim] */
    MODEL_FFN_NORM,
    MODEL_FFN_GATE, /* [intermediate][hidden] */
    MODEL_FFN_UP,
    MODEL_FFN_DOWN, /* [hidden][intermediate] */
};

RK_MUST_CHECK enum rk_status model_open(const char *path, struct model **ret_model,
                                        struct rk_error *error);
/* The same from bytes in memory (borrowed until close): for fuzzing. name: for messages. */
RK_MUST_CHECK enum rk_status model_open_bytes(const void *data, size_t bytes, const char *name,
                                              struct model **ret_model, struct rk_error *error);
void model_close(struct model *model); /* accepts NULL */

const struct model_config *model_config(const struct model *model);
const struct model_vocabulary *model_vocabulary(const struct model *model);

/* Dequantised to f32, row-major, as gguf-py does. Rows of Q and K of architecture "llama" are
 * brought from llama.cpp's interleaved order to the half-split order. out holds rows * columns.
 * RK_ERR_CORRUPT names a tensor with a NaN or an infinity: every answer would be nonsense. */
RK_MUST_CHECK enum rk_status model_tensor_shape(const struct model *model, enum model_tensor tensor,
                                                uint32_t layer, uint32_t *ret_rows,
                                                uint32_t *ret_columns);
RK_MUST_CHECK enum rk_status model_tensor_read(const struct model *model, enum model_tensor tensor,
                                               uint32_t layer, float *out, struct rk_error *error);
/* By the file's own name, in the file's own row order: for tests and tools. */
RK_MUST_CHECK enum rk_status model_tensor_read_named(const struct model *model, const char *name,
                                                     float *out, uint64_t elements_max,
                                                     uint64_t *ret_elements);

/* SHA-256 over architecture, all weights' bytes, RoPE parameters, KV dtype and layout version
 * (docs/architecture.md): what must match for KV to be shared. Reads the whole file. */
struct rk_id model_fingerprint(const struct model *model, enum rk_dtype kv_dtype);
/* Lets the pages of the mapping go; later reads fault them in again. */
void model_release_pages(const struct model *model);

#endif
