/*
 * gguf_writer: builds small GGUF files in memory for tests, right or wrong ones.
 *
 * What is written is taken as it is: a test that wants a bad file writes one.
 */
#ifndef TESTS_WORKER_MODEL_GGUF_WRITER_H
#define TESTS_WORKER_MODEL_GGUF_WRITER_H

#include <stddef.h>
#include <stdint.h>

#define WRITER_BYTES_MAX   (1u << 20)
#define WRITER_TENSORS_MAX 64

struct gguf_writer {
    uint8_t bytes[WRITER_BYTES_MAX];
    size_t count;
    uint64_t num_tensors;
    uint64_t num_keys;
    struct {
        char name[64];
        uint32_t type;
        uint32_t num_dims;
        uint64_t dims[4];
        size_t bytes;
    } tensors[WRITER_TENSORS_MAX];
};

/* Header, then keys, then tensors, then end. */
void writer_begin(struct gguf_writer *writer, uint32_t version);
void writer_put(struct gguf_writer *writer, const void *data, size_t bytes);
void writer_string(struct gguf_writer *writer, const char *text);
void writer_key(struct gguf_writer *writer, const char *name, uint32_t type);
void writer_key_u32(struct gguf_writer *writer, const char *name, uint32_t value);
void writer_key_f32(struct gguf_writer *writer, const char *name, float value);
void writer_key_string(struct gguf_writer *writer, const char *name, const char *value);
/* rows 0: one dimension. The data are bytes of a fixed pattern, finite in every type. */
void writer_tensor(struct gguf_writer *writer, const char *name, uint32_t type, uint64_t columns,
                   uint64_t rows);
/* Writes directory, padding and data, and the counts into the header. */
void writer_end(struct gguf_writer *writer);

/* The keys of a model with one layer, 2 heads of 16, 1 KV head, hidden 32, intermediate 64. */
void writer_small_keys(struct gguf_writer *writer);
/* Its tensors; those with two dimensions are of this type. */
void writer_small_tensors(struct gguf_writer *writer, uint32_t type);

#endif
