/*
 * gguf: the container format: header, keys, tensor directory.
 *
 * Nothing is trusted: every count, length, offset and alignment is checked
 * against the bytes that are there before it is used. All pointers point into
 * those bytes, which the caller keeps. An error is one line: name of the file,
 * byte offset (of the thing that is wrong) and reason.
 *
 * Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 */
#ifndef WORKER_MODEL_GGUF_INTERNAL_H
#define WORKER_MODEL_GGUF_INTERNAL_H

#include "common/base/status.h"
#include "worker/model/model.h"

#define GGUF_KEYS_MAX      65536
#define GGUF_TENSORS_MAX   65536
#define GGUF_NAME_MAX      1024
#define GGUF_DIMS_MAX      4
#define GGUF_ALIGNMENT_MAX (1u << 20)

enum gguf_value_type {
    GGUF_U8 = 0,
    GGUF_I8 = 1,
    GGUF_U16 = 2,
    GGUF_I16 = 3,
    GGUF_U32 = 4,
    GGUF_I32 = 5,
    GGUF_F32 = 6,
    GGUF_BOOL = 7,
    GGUF_STRING = 8,
    GGUF_ARRAY = 9,
    GGUF_U64 = 10,
    GGUF_I64 = 11,
    GGUF_F64 = 12,
};

struct gguf_key {
    struct model_string name;
    uint64_t offset;       /* of the key in the file, for messages */
    uint32_t type;         /* enum gguf_value_type */
    uint32_t element_type; /* of an array */
    uint64_t count;        /* elements of an array, bytes of a string, else 1 */
    const uint8_t *data;   /* the first element; of a string its first byte */
};

struct gguf_tensor {
    struct model_string name;
    uint64_t offset; /* of its directory entry, for messages */
    uint32_t type;   /* of ggml; one that dequant_find() knows */
    uint32_t num_dims;
    uint64_t dims[GGUF_DIMS_MAX]; /* dims[0] is the row length; the rest 1 where absent */
    uint64_t elements;
    const uint8_t *data;
    uint64_t bytes;
};

struct gguf {
    const char *file; /* borrowed */
    const uint8_t *data;
    uint64_t bytes;
    uint32_t version;
    struct gguf_key *keys; /* sorted by name, no duplicates */
    uint32_t num_keys;
    struct gguf_tensor *tensors; /* sorted by name, no duplicates */
    uint32_t num_tensors;
};

/* gguf is zeroed by the caller; gguf_clear() frees it also after a failure. */
RK_MUST_CHECK enum rk_status gguf_parse(const void *data, uint64_t bytes, const char *file,
                                        struct gguf *gguf, struct rk_error *error);
void gguf_clear(struct gguf *gguf);

/* NULL: absent. */
const struct gguf_key *gguf_find_key(const struct gguf *gguf, const char *name);
const struct gguf_tensor *gguf_find_tensor(const struct gguf *gguf, const char *name);

/* True for the integer types; the value is widened. */
bool gguf_key_integer(const struct gguf_key *key, int64_t *ret_value);
bool gguf_key_number(const struct gguf_key *key, double *ret_value); /* F32 and F64 */
bool gguf_string_equal(struct model_string string, const char *text);

/* Names from the file, fit for a message: cut, and other than printable ASCII becomes '?'. */
#define GGUF_PRINT_BYTES 72
struct gguf_print {
    char text[GGUF_PRINT_BYTES];
};
struct gguf_print gguf_print(struct model_string string);

#endif
