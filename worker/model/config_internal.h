/*
 * config: hyper-parameters and vocabulary out of the keys of a GGUF file.
 *
 * A value that would change what the forward pass computes and that we do not
 * implement (RoPE scaling, experts, a sliding window) is refused, not ignored.
 */
#ifndef WORKER_MODEL_CONFIG_INTERNAL_H
#define WORKER_MODEL_CONFIG_INTERNAL_H

#include "worker/model/gguf_internal.h"

#define MODEL_VOCAB_MAX        (1u << 22)
#define MODEL_HEADS_MAX        4096
#define MODEL_HIDDEN_MAX       (1u << 17)
#define MODEL_INTERMEDIATE_MAX (1u << 20)

/* Everything but vocab_size and tied_embeddings, which the tensors say. */
RK_MUST_CHECK enum rk_status config_read(const struct gguf *gguf, struct model_config *ret_config,
                                         struct rk_error *error);

/* Allocates tokens, types, merges, pre and model; vocabulary_clear() frees them also after a
 * failure. A file without tokens gives an empty vocabulary. */
RK_MUST_CHECK enum rk_status vocabulary_read(const struct gguf *gguf, uint32_t vocab_size,
                                             struct model_vocabulary *vocabulary,
                                             struct rk_error *error);
void vocabulary_clear(struct model_vocabulary *vocabulary);

#endif
