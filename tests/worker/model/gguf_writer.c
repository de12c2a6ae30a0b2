#include "tests/worker/model/gguf_writer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void writer_put(struct gguf_writer *writer, const void *data, size_t bytes)
{
    if (writer->count + bytes > WRITER_BYTES_MAX) {
        abort();
    }
    memcpy(writer->bytes + writer->count, data, bytes);
    writer->count += bytes;
}

void writer_begin(struct gguf_writer *writer, uint32_t version)
{
    static const uint8_t counts[16];
    memset(writer, 0, sizeof(*writer));
    writer_put(writer, "GGUF", 4);
    writer_put(writer, &version, 4);
    writer_put(writer, counts, 16);
}

void writer_string(struct gguf_writer *writer, const char *text)
{
    uint64_t bytes = strlen(text);
    writer_put(writer, &bytes, 8);
    writer_put(writer, text, bytes);
}

void writer_key(struct gguf_writer *writer, const char *name, uint32_t type)
{
    writer_string(writer, name);
    writer_put(writer, &type, 4);
    writer->num_keys++;
}

void writer_key_u32(struct gguf_writer *writer, const char *name, uint32_t value)
{
    writer_key(writer, name, 4);
    writer_put(writer, &value, 4);
}

void writer_key_f32(struct gguf_writer *writer, const char *name, float value)
{
    writer_key(writer, name, 6);
    writer_put(writer, &value, 4);
}

void writer_key_string(struct gguf_writer *writer, const char *name, const char *value)
{
    writer_key(writer, name, 8);
    writer_string(writer, value);
}

static size_t tensor_bytes(uint32_t type, uint64_t elements)
{
    switch (type) {
    case 0:
        return elements * 4;
    case 2:
        return elements / 32 * 18;
    case 3:
        return elements / 32 * 20;
    case 8:
        return elements / 32 * 34;
    default:
        return elements * 2;
    }
}

void writer_tensor(struct gguf_writer *writer, const char *name, uint32_t type, uint64_t columns,
                   uint64_t rows)
{
    if (writer->num_tensors == WRITER_TENSORS_MAX) {
        abort();
    }
    size_t i = writer->num_tensors++;
    (void)snprintf(writer->tensors[i].name, sizeof(writer->tensors[i].name), "%s", name);
    writer->tensors[i].type = type;
    writer->tensors[i].num_dims = rows ? 2 : 1;
    writer->tensors[i].dims[0] = columns;
    writer->tensors[i].dims[1] = rows;
    writer->tensors[i].bytes = tensor_bytes(type, columns * (rows ? rows : 1));
}

void writer_end(struct gguf_writer *writer)
{
    uint64_t offset = 0;
    uint8_t byte = 0;
    for (uint64_t i = 0; i < writer->num_tensors; i++) {
        writer_string(writer, writer->tensors[i].name);
        writer_put(writer, &writer->tensors[i].num_dims, 4);
        writer_put(writer, writer->tensors[i].dims, (size_t)8 * writer->tensors[i].num_dims);
        writer_put(writer, &writer->tensors[i].type, 4);
        writer_put(writer, &offset, 8);
        offset += (writer->tensors[i].bytes + 31) / 32 * 32;
    }
    while (writer->count % 32 != 0) {
        writer_put(writer, "", 1);
    }
    for (uint64_t i = 0; i < writer->num_tensors; i++) {
        for (size_t at = 0; at < (writer->tensors[i].bytes + 31) / 32 * 32; at++) {
            byte = (uint8_t)((at * 37 + i * 11) % 59); /* never an exponent of all ones */
            writer_put(writer, &byte, 1);
        }
    }
    memcpy(writer->bytes + 8, &writer->num_tensors, 8);
    memcpy(writer->bytes + 16, &writer->num_keys, 8);
}

void writer_small_keys(struct gguf_writer *writer)
{
    writer_key_string(writer, "general.architecture", "llama");
    writer_key_string(writer, "general.name", "small\n\"one\"");
    writer_key_u32(writer, "llama.block_count", 1);
    writer_key_u32(writer, "llama.context_length", 128);
    writer_key_u32(writer, "llama.embedding_length", 32);
    writer_key_u32(writer, "llama.feed_forward_length", 64);
    writer_key_u32(writer, "llama.attention.head_count", 2);
    writer_key_u32(writer, "llama.attention.head_count_kv", 1);
    writer_key_f32(writer, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
}

void writer_small_tensors(struct gguf_writer *writer, uint32_t type)
{
    writer_tensor(writer, "token_embd.weight", type, 32, 5);
    writer_tensor(writer, "output_norm.weight", 0, 32, 0);
    writer_tensor(writer, "blk.0.attn_norm.weight", 0, 32, 0);
    writer_tensor(writer, "blk.0.attn_q.weight", type, 32, 32);
    writer_tensor(writer, "blk.0.attn_k.weight", type, 32, 16);
    writer_tensor(writer, "blk.0.attn_v.weight", type, 32, 16);
    writer_tensor(writer, "blk.0.attn_output.weight", type, 32, 32);
    writer_tensor(writer, "blk.0.ffn_norm.weight", 0, 32, 0);
    writer_tensor(writer, "blk.0.ffn_gate.weight", type, 32, 64);
    writer_tensor(writer, "blk.0.ffn_up.weight", type, 32, 64);
    writer_tensor(writer, "blk.0.ffn_down.weight", type, 64, 32);
}
