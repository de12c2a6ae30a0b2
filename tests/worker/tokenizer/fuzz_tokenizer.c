/*
 * Goal:   neither a hostile vocabulary nor hostile text makes the tokenizer misbehave.
 * Method: libFuzzer. The input is a vocabulary blob and a text. What encodes must decode; with all
 *         256 bytes in the vocabulary, to the very text.
 *
 * Input: u8 number of tokens, u8 number of merges, u8 flags, u8 bytes of the template; then the
 * tokens and merges, each u8 type, u8 length and the bytes; the template; the rest is the text.
 */
#include "common/base/alloc.h"
#include "worker/model/model.h"
#include "worker/tokenizer/tokenizer.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

enum { FLAG_SMOLLM = 1, FLAG_PARSE_SPECIAL = 2, FLAG_ALL_BYTES = 4, FLAG_BOS = 8 };

struct input {
    const uint8_t *data;
    size_t bytes;
};

static uint8_t take_byte(struct input *input)
{
    if (input->bytes == 0) {
        return 0;
    }
    input->bytes--;
    return *input->data++;
}

static struct model_string take_string(struct input *input, size_t bytes)
{
    bytes = bytes < input->bytes ? bytes : input->bytes;
    struct model_string string = {(const char *)input->data, bytes};
    input->data += bytes;
    input->bytes -= bytes;
    return string;
}

/* The letter of a byte in the GPT-2 alphabet, as UTF-8. */
static struct model_string letter_of(int byte, char out[3])
{
    int letter = byte;
    if (!((byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae)) {
        letter = 0x100 + (byte <= 0x20 ? byte : byte <= 0xa0 ? byte - 0x7f + 0x21 : 0x43);
    }
    if (letter < 0x80) {
        out[0] = (char)letter;
        return (struct model_string){out, 1};
    }
    out[0] = (char)(0xc0 | letter >> 6);
    out[1] = (char)(0x80 | (letter & 0x3f));
    return (struct model_string){out, 2};
}

static void check_round_trip(const struct tokenizer *tokenizer, const struct tokenizer_ids *ids,
                             struct model_string text, bool exact)
{
    struct tokenizer_text out;
    if (tokenizer_decode(tokenizer, ids->data, ids->count, false, &out, NULL) != RK_OK) {
        abort();
    }
    if (exact && (out.bytes != text.bytes || memcmp(out.data, text.data, out.bytes) != 0)) {
        abort();
    }
    rk_free(out.data);
}

static void use(const struct tokenizer *tokenizer, struct model_string text, uint8_t flags)
{
    struct tokenizer_message messages[2] = {{"user", text.data, text.bytes},
                                            {"assistant", text.data, text.bytes / 2}};
    struct tokenizer_ids ids = {0};
    bool bos = (flags & FLAG_BOS) != 0;
    if (tokenizer_encode(tokenizer, text.data, text.bytes, (flags & FLAG_PARSE_SPECIAL) != 0, bos,
                         &ids, NULL) != RK_OK) {
        abort();
    }
    check_round_trip(tokenizer, &ids, text, (flags & FLAG_ALL_BYTES) != 0 && !bos);
    rk_free(ids.data);
    if (tokenizer_has_chat(tokenizer)) {
        if (tokenizer_chat_encode(tokenizer, messages, 2, true, false, &ids, NULL) != RK_OK) {
            abort();
        }
        rk_free(ids.data);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct model_string tokens[512];
    static int32_t types[512];
    static struct model_string merges[256];
    static char letters[256][3];
    struct input input = {data, bytes};
    uint32_t num_tokens = take_byte(&input);
    uint32_t num_merges = take_byte(&input);
    uint8_t flags = take_byte(&input);
    uint8_t template_bytes = take_byte(&input);
    for (uint32_t i = 0; i < num_tokens; i++) {
        types[i] = take_byte(&input) % 8;
        tokens[i] = take_string(&input, take_byte(&input));
    }
    for (uint32_t i = 0; i < num_merges; i++) {
        (void)take_byte(&input);
        merges[i] = take_string(&input, take_byte(&input));
    }
    for (int i = 0; (flags & FLAG_ALL_BYTES) != 0 && i < 256; i++) {
        types[num_tokens] = 1;
        tokens[num_tokens++] = letter_of(i, letters[i]);
    }
    struct model_vocabulary vocabulary = {
        .pre = flags & FLAG_SMOLLM ? "smollm" : "gpt-2",
        .tokens = tokens,
        .types = types,
        .merges = merges,
        .num_tokens = num_tokens,
        .num_merges = num_merges,
        .bos_id = num_tokens ? 0 : -1,
        .eos_id = -1,
        .add_bos = true,
        .chat_template = take_string(&input, template_bytes),
    };
    struct tokenizer *tokenizer = NULL;
    if (tokenizer_create(&vocabulary, &tokenizer, NULL) != RK_OK) {
        return 0;
    }
    use(tokenizer, (struct model_string){(const char *)input.data, input.bytes}, flags);
    tokenizer_destroy(tokenizer);
    return 0;
}
