/*
 * Writes small correct GGUF files into a folder, as seeds for fuzz_gguf: one for each tensor
 * type, with a vocabulary.
 */
#include "tests/worker/model/gguf_writer.h"

#include <stdio.h>

static struct gguf_writer writer;

static void put_strings(const char *name, const char *const *strings, uint64_t count)
{
    uint32_t type = 8;
    writer_key(&writer, name, 9);
    writer_put(&writer, &type, 4);
    writer_put(&writer, &count, 8);
    for (uint64_t i = 0; i < count; i++) {
        writer_string(&writer, strings[i]);
    }
}

int main(int argc, char **argv)
{
    static const uint32_t types[] = {0, 1, 2, 3, 8, 30};
    static const char *const tokens[] = {"<s>", "a", "b", "ab", "\xc4\xa0"};
    static const char *const merges[] = {"a b"};
    if (argc != 2) {
        (void)fprintf(stderr, "usage: fuzz_gguf_seeds FOLDER\n");
        return 2;
    }
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        char path[4096];
        writer_begin(&writer, 3);
        writer_small_keys(&writer);
        writer_key_string(&writer, "tokenizer.ggml.model", "gpt2");
        writer_key_string(&writer, "tokenizer.ggml.pre", "smollm");
        put_strings("tokenizer.ggml.tokens", tokens, 5);
        put_strings("tokenizer.ggml.merges", merges, 1);
        writer_key_u32(&writer, "tokenizer.ggml.bos_token_id", 0);
        writer_small_tensors(&writer, types[i]);
        writer_end(&writer);
        (void)snprintf(path, sizeof(path), "%s/type-%u.gguf", argv[1], types[i]);
        FILE *file = fopen(path, "wb");
        if (!file || fwrite(writer.bytes, 1, writer.count, file) != writer.count ||
            fclose(file) != 0) {
            perror(path);
            return 1;
        }
    }
    return 0;
}
