/*
 * eval: the pure parts of `redknot eval`: its input, its arithmetic, its dump.
 *
 * Fidelity is KL(full || level) in nats and top-1 agreement of next-token
 * distributions, over the whole vocabulary, per position, in f64.
 */
#ifndef CLIENT_CLI_EVAL_H
#define CLIENT_CLI_EVAL_H

#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define EVAL_REQUESTS_MAX  10000
#define EVAL_SEGMENTS_MAX  1024       /* of one request */
#define EVAL_TOKENS_MAX    (1u << 20) /* of one list */
#define EVAL_POSITIONS_MAX 4096       /* of one continuation */

/* ---- eval_file.c ---- */

struct eval_tokens {
    int32_t *ids;
    size_t count;
    char *text;         /* given instead of ids, which eval_file_resolve() adds; else NULL */
    bool parse_special; /* of the text: special tokens in it are not plain text */
};

struct eval_request {
    struct eval_tokens *segments; /* the prefix, if any, is the first */
    size_t num_segments;
    bool has_prefix;
    struct eval_tokens question;
    struct eval_tokens continuation;
};

struct eval_file {
    struct eval_request *requests;
    size_t num_requests;
    const char *name; /* borrowed: what errors call it */
};

/* ids are the caller's, to be freed with rk_free. */
typedef enum rk_status (*eval_tokenize)(void *context, const char *text, bool parse_special,
                                        int32_t **ret_ids, size_t *ret_count,
                                        struct rk_error *error);

/* The error names file, request index and key. */
RK_MUST_CHECK enum rk_status eval_file_load(const char *path, struct eval_file *ret_file,
                                            struct rk_error *error);
/* From JSON text; name is what errors call it, and outlives the file. */
RK_MUST_CHECK enum rk_status eval_file_parse(const char *text, size_t bytes, const char *name,
                                             struct eval_file *ret_file, struct rk_error *error);
/* Makes ids of all that is given as text, and checks every id against the vocabulary: whatever is
 * wrong is said before anything is computed. */
RK_MUST_CHECK enum rk_status eval_file_resolve(struct eval_file *file, eval_tokenize tokenize,
                                               void *context, uint32_t vocab,
                                               struct rk_error *error);
void eval_file_clear(struct eval_file *file);

/* ---- eval_math.c ---- */

/* Log-probabilities [vocab] of one position; both are normalised in f64 first, so that float
 * rounding of the inputs' sums does not count. Equal inputs give exactly 0. Infinite when q
 * excludes what p does not; NaN when an input is NaN or all -inf. */
double eval_kl(const float *p, const float *q, size_t vocab);
/* Index of the largest; the first of equals. */
size_t eval_top1(const float *logprobs, size_t vocab);

/* ---- safetensors.c ---- */

/* Writes float32 matrices in the order of their names, streamed to PATH.partial; the file appears
 * under its name, whole, at finish. */
struct safetensors;

struct safetensors_entry {
    char name[32];
    uint64_t rows;
    uint64_t columns;
};

RK_MUST_CHECK enum rk_status safetensors_create(const char *path,
                                                const struct safetensors_entry *entries,
                                                size_t count, struct safetensors **ret_writer,
                                                struct rk_error *error);
RK_MUST_CHECK enum rk_status safetensors_write(struct safetensors *writer, const float *values,
                                               size_t count, struct rk_error *error);
/* RK_ERR_INTERNAL when not exactly all values were written. */
RK_MUST_CHECK enum rk_status safetensors_finish(struct safetensors *writer, struct rk_error *error);
/* Removes what is unfinished. Accepts NULL. */
void safetensors_destroy(struct safetensors *writer);

#endif
