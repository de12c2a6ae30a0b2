/*
 * golden: reference data for tests, and where the model file is.
 *
 * Data lies in tests/golden; tests/golden/README.md says how it was made. What
 * is missing or malformed ends the program with one line: a test without its
 * data must not pass. Tensors are borrowed from the mapping of their file.
 *
 * Threads: one.
 */
#ifndef TESTS_SUPPORT_GOLDEN_H
#define TESTS_SUPPORT_GOLDEN_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct golden; /* one .safetensors file */

struct golden_tensor {
    char dtype[8]; /* "F32", "I32", "BF16", "F16", ... */
    uint32_t num_dims;
    uint64_t dims[8];
    uint64_t elements;
    const void *data; /* little endian, row-major, aligned to its element */
    uint64_t bytes;
};

/* name: relative to tests/golden, such as "smollm2/prompts.safetensors". */
struct golden *golden_open(const char *name);
void golden_close(struct golden *golden); /* accepts NULL */
bool golden_has(const struct golden *golden, const char *tensor);
struct golden_tensor golden_tensor(const struct golden *golden, const char *tensor);
/* These check dtype, and the number of elements unless it is 0. */
const float *golden_f32(const struct golden *golden, const char *tensor, uint64_t elements);
const int32_t *golden_i32(const struct golden *golden, const char *tensor, uint64_t elements);

/* A whole JSON file; the caller ends it with json_decref(). */
json_t *golden_json(const char *name);
/* Member of an object, which must be there; borrowed. */
json_t *golden_member(const json_t *object, const char *key);
/* An array of integers; *ret_count of them. Free with free(). */
int32_t *golden_ids(const json_t *array, size_t *ret_count);
/* Bytes of a hex string, with a NUL behind them. Free with free(). */
char *golden_hex(const json_t *string, size_t *ret_bytes);

/* $REDKNOT_MODEL, else SmolLM2 in the cache; ends the program ("run make setup") when it is not
 * there. Borrowed, for the life of the process. */
const char *golden_model_path(void);

#endif
