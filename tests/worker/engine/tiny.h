/*
 * tiny: a small random Llama as a GGUF file in memory, and a straightforward f64
 * forward pass over it from the definitions.
 * Failures end the test through cmocka. One thread.
 */
#ifndef TESTS_WORKER_ENGINE_TINY_H
#define TESTS_WORKER_ENGINE_TINY_H

#include "tests/worker/engine/drive.h"

#define TINY_VOCAB   160u
#define TINY_LAYERS  3u
#define TINY_HEADS   4u
#define TINY_KV      2u
#define TINY_DIM     16u
#define TINY_HIDDEN  64u
#define TINY_WIDE    96u
#define TINY_CONTEXT 1024u
#define TINY_PAIRS   (TINY_LAYERS * TINY_KV)

/* The file's bytes, alive until the process ends; tied: no output matrix of its own. */
struct model *tiny_model(bool tied);
struct engine *tiny_engine(const struct model *model, enum kernels_mode mode, uint32_t threads);
uint32_t tiny_random(uint32_t below);
void tiny_seed(uint64_t seed); /* prints it */
/* Random ids; free with free(). */
int32_t *tiny_ids(uint32_t count);
/* Local head 1 of layer 0 and head 0 of layer 2: window 48, sink 8; others global. */
struct recovery_head_map *tiny_head_map(void);

/*
 * The reference: K (not rotated) and V by [layer][position][kv_head * dim]. Computed positions are
 * marked; rows of others must be there already. logits: of all computed positions >= want_from.
 */
struct tiny_reference {
    double *k;
    double *v;
    uint32_t num_tokens;
};
void tiny_reference_create(struct tiny_reference *reference, uint32_t num_tokens);
void tiny_reference_free(struct tiny_reference *reference);
/* Rows [0, from->num_tokens) of another one to position on, as if its segment stood there. */
void tiny_reference_copy(struct tiny_reference *reference, uint32_t position,
                         const struct tiny_reference *from);
void tiny_reference_run(struct tiny_reference *reference, const struct model *model,
                        const struct recovery_head_map *map, const int32_t *ids,
                        const uint32_t *positions, uint32_t count, uint32_t want_from,
                        float *logits);

#endif
