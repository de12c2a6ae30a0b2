#include "worker/tokenizer/tokenizer.h"

#include "common/base/alloc.h"
#include "common/base/log.h"
#include "worker/model/model.h"
#include "worker/tokenizer/tokenizer_internal.h"

#include <string.h>

/* The GPT-2 pattern. \p{White_Space} rather than \s: PCRE2 counts U+180E among the latter, the
 * tokenizers library does not. No alternative can backtrack by more than one character. */
#define WS "\\p{White_Space}"
static const char piece_pattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" WS
                                    "\\p{L}\\p{N}]+|" WS "+(?!\\P{White_Space})"
                                    "|" WS "+";
static const char number_pattern[] = "\\p{N}";

#define MATCH_LIMIT   (4 * TOKENIZER_TEXT_BYTES_MAX)
#define HEAP_LIMIT_KB (64 * 1024)

static void *pcre_alloc(PCRE2_SIZE bytes, void *unused)
{
    (void)unused;
    return rk_alloc(bytes);
}

static void pcre_free(void *block, void *unused)
{
    (void)unused;
    rk_free(block);
}

static enum rk_status compile(const struct tokenizer *tokenizer, const char *pattern,
                              pcre2_code **ret_code, struct rk_error *error)
{
    int code = 0;
    PCRE2_SIZE offset = 0;
    pcre2_compile_context *context = pcre2_compile_context_create(tokenizer->pcre);
    if (!context) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "tokenizer: no memory for its patterns");
    }
    *ret_code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP,
                              &code, &offset, context);
    pcre2_compile_context_free(context);
    if (!*ret_code) {
        /* The patterns are ours: nothing but memory (ERR21) can be missing. */
        RK_ASSERT(code == PCRE2_ERROR_HEAP_FAILED);
        return rk_error_set(error, RK_ERR_NO_MEMORY, "tokenizer: no memory for its patterns");
    }
    /* Where executable memory is forbidden this fails, and the interpreter serves. */
    (void)pcre2_jit_compile(*ret_code, PCRE2_JIT_COMPLETE);
    return RK_OK;
}

static enum rk_status build_patterns(struct tokenizer *tokenizer, const char *pre,
                                     struct rk_error *error)
{
    bool smollm = strcmp(pre, "smollm") == 0;
    if (!smollm && strcmp(pre, "gpt-2") != 0 && strcmp(pre, "gpt2") != 0) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "vocabulary: pre-tokenizer \"%.64s\" is not supported; smollm and "
                            "gpt-2 are",
                            pre);
    }
    tokenizer->pcre = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    if (tokenizer->pcre) {
        tokenizer->matching = pcre2_match_context_create(tokenizer->pcre);
    }
    if (!tokenizer->matching) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "tokenizer: no memory for its patterns");
    }
    (void)pcre2_set_match_limit(tokenizer->matching, MATCH_LIMIT);
    (void)pcre2_set_heap_limit(tokenizer->matching, HEAP_LIMIT_KB);
    enum rk_status status = compile(tokenizer, piece_pattern, &tokenizer->piece, error);
    if (status == RK_OK && smollm) {
        status = compile(tokenizer, number_pattern, &tokenizer->number, error);
    }
    return status;
}

/* Begin, end and padding are marks of ours: a file that calls one of them "user defined" would let
 * any text end a turn. */
static void guard_marks(struct tokenizer *tokenizer, const struct model_vocabulary *vocabulary)
{
    const int32_t marks[] = {vocabulary->bos_id, vocabulary->eos_id, vocabulary->padding_id};
    for (size_t i = 0; i < sizeof(marks) / sizeof(marks[0]); i++) {
        if (vocabulary->types && marks[i] >= 0 && (uint32_t)marks[i] < tokenizer->num_tokens &&
            vocabulary->types[marks[i]] == TOKENIZER_TYPE_USER_DEFINED) {
            tokenizer_make_control(tokenizer, marks[i]);
        }
    }
}

enum rk_status tokenizer_create(const struct model_vocabulary *vocabulary,
                                struct tokenizer **ret_tokenizer, struct rk_error *error)
{
    if (vocabulary->num_tokens == 0) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED, "vocabulary: the model file has no tokens");
    }
    if (vocabulary->model && strcmp(vocabulary->model, "gpt2") != 0) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "vocabulary: tokenizer \"%.64s\" is not supported; gpt2 (byte-level "
                            "BPE) is",
                            vocabulary->model);
    }
    struct tokenizer *tokenizer = rk_alloc_zero(1, sizeof(*tokenizer));
    if (!tokenizer) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "tokenizer: no memory");
    }
    tokenizer->bos_id = vocabulary->bos_id;
    tokenizer->eos_id = vocabulary->eos_id;
    tokenizer->add_bos = vocabulary->add_bos;
    enum rk_status status = build_patterns(tokenizer, vocabulary->pre, error);
    if (status == RK_OK) {
        status = tokenizer_build(tokenizer, vocabulary, error);
    }
    if (status == RK_OK) {
        guard_marks(tokenizer, vocabulary);
        status = tokenizer_build_chat(tokenizer, vocabulary, error);
    }
    if (status != RK_OK) {
        goto fail;
    }
    *ret_tokenizer = tokenizer;
    return RK_OK;

fail:
    tokenizer_destroy(tokenizer);
    return status;
}

void tokenizer_destroy(struct tokenizer *tokenizer)
{
    if (!tokenizer) {
        return;
    }
    pcre2_code_free(tokenizer->number);
    pcre2_code_free(tokenizer->piece);
    pcre2_match_context_free(tokenizer->matching);
    pcre2_general_context_free(tokenizer->pcre);
    rk_free(tokenizer->bytes);
    rk_free(tokenizer->offsets);
    rk_free(tokenizer->control);
    rk_free(tokenizer->map.slots);
    rk_free(tokenizer->merges.slots);
    rk_free(tokenizer->specials);
    rk_free(tokenizer->default_system);
    rk_free(tokenizer);
}

/* ---- Encoding, from the inside out ---- */

struct encoder {
    const struct tokenizer *tokenizer;
    struct bpe *bpe;
    pcre2_match_data *match;
    struct id_list *list;
};

/* The first match at or behind from; *ret_begin = bytes: none. */
static enum rk_status match(const struct encoder *encoder, const pcre2_code *code, const char *text,
                            size_t bytes, size_t from, size_t *ret_begin, size_t *ret_end)
{
    /* The text was checked by valid_bytes(); checking it again at each match would make the
     * whole quadratic. */
    int matched = pcre2_match(code, (PCRE2_SPTR)text, bytes, from, PCRE2_NO_UTF_CHECK,
                              encoder->match, encoder->tokenizer->matching);
    if (matched == PCRE2_ERROR_NOMATCH) {
        *ret_begin = bytes;
        *ret_end = bytes;
        return RK_OK;
    }
    if (matched < 0) {
        return matched == PCRE2_ERROR_NOMEMORY ? RK_ERR_NO_MEMORY : RK_ERR_TOO_LONG;
    }
    const PCRE2_SIZE *offsets = pcre2_get_ovector_pointer(encoder->match);
    *ret_begin = offsets[0];
    *ret_end = offsets[1];
    return RK_OK;
}

/* A run without special tokens and without cut-out numbers; its end is the look-ahead's end. */
static enum rk_status encode_run(const struct encoder *encoder, const char *text, size_t bytes)
{
    size_t position = 0;
    while (position < bytes) {
        size_t begin = 0;
        size_t end = 0;
        enum rk_status status =
            match(encoder, encoder->tokenizer->piece, text, bytes, position, &begin, &end);
        if (status == RK_OK) {
            /* The pattern takes every character; one that it did not is a piece all the same. */
            end = end > position ? end : bytes;
            status = bpe_encode(encoder->tokenizer, encoder->bpe, text + position, end - position,
                                encoder->list);
        }
        if (status != RK_OK) {
            return status;
        }
        position = end;
    }
    return RK_OK;
}

static enum rk_status encode_valid(const struct encoder *encoder, const char *text, size_t bytes)
{
    size_t position = 0;
    if (!encoder->tokenizer->number) {
        return encode_run(encoder, text, bytes);
    }
    while (position < bytes) {
        size_t begin = 0;
        size_t end = 0;
        enum rk_status status =
            match(encoder, encoder->tokenizer->number, text, bytes, position, &begin, &end);
        if (status == RK_OK) {
            status = encode_run(encoder, text + position, begin - position);
        }
        if (status == RK_OK) {
            status = bpe_encode(encoder->tokenizer, encoder->bpe, text + begin, end - begin,
                                encoder->list);
        }
        if (status != RK_OK) {
            return status;
        }
        position = end;
    }
    return RK_OK;
}

/* Bytes of the well-formed UTF-8 character (Unicode, table 3-7) that text begins with; 0: none. */
static size_t character_bytes(const uint8_t *text, size_t bytes)
{
    uint8_t first = text[0];
    if (first < 0x80) {
        return 1;
    }
    size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || bytes < length) {
        return 0;
    }
    uint8_t lowest = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    uint8_t highest = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    if (text[1] < lowest || text[1] > highest) {
        return 0;
    }
    for (size_t i = 2; i < length; i++) {
        if ((text[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    return length;
}

static size_t valid_bytes(const char *text, size_t bytes)
{
    size_t position = 0;
    while (position < bytes) {
        size_t length = character_bytes((const uint8_t *)text + position, bytes - position);
        if (length == 0) {
            break;
        }
        position += length;
    }
    return position;
}

static enum rk_status encode_plain(const struct encoder *encoder, const char *text, size_t bytes)
{
    while (bytes > 0) {
        size_t valid = valid_bytes(text, bytes);
        enum rk_status status =
            valid ? encode_valid(encoder, text, valid)
                  : bpe_encode(encoder->tokenizer, encoder->bpe, text, 1, encoder->list);
        if (status != RK_OK) {
            return status;
        }
        text += valid ? valid : 1;
        bytes -= valid ? valid : 1;
    }
    return RK_OK;
}

/* The longest special token that text begins with; -1: none. */
static int32_t special_at(const struct tokenizer *tokenizer, const char *text, size_t bytes,
                          bool parse_special)
{
    uint8_t first = (uint8_t)text[0];
    for (uint32_t i = tokenizer->special_begin[first]; i < tokenizer->special_begin[first + 1];
         i++) {
        const struct special *special = &tokenizer->specials[i];
        uint64_t begin = tokenizer->offsets[special->id];
        uint64_t count = tokenizer->offsets[special->id + 1] - begin;
        if ((parse_special || special->always) && count <= bytes &&
            memcmp(tokenizer->bytes + begin, text, count) == 0) {
            return special->id;
        }
    }
    return -1;
}

static enum rk_status encode_text(const struct encoder *encoder, const char *text, size_t bytes,
                                  bool parse_special)
{
    const struct tokenizer *tokenizer = encoder->tokenizer;
    size_t plain = 0; /* where the text without special tokens began */
    enum rk_status status = RK_OK;
    for (size_t i = 0; i < bytes && status == RK_OK;) {
        int32_t id = special_at(tokenizer, text + i, bytes - i, parse_special);
        if (id < 0) {
            i++;
            continue;
        }
        status = encode_plain(encoder, text + plain, i - plain);
        if (status == RK_OK) {
            status = id_list_append(encoder->list, id);
        }
        i += tokenizer->offsets[id + 1] - tokenizer->offsets[id];
        plain = i;
    }
    return status == RK_OK ? encode_plain(encoder, text + plain, bytes - plain) : status;
}

enum rk_status tokenizer_append(const struct tokenizer *tokenizer, struct bpe *bpe,
                                const char *text, size_t bytes, bool parse_special,
                                struct id_list *list, struct rk_error *error)
{
    enum rk_status status = RK_ERR_TOO_LONG;
    if (bytes <= TOKENIZER_TEXT_BYTES_MAX) {
        struct encoder encoder = {tokenizer, bpe, pcre2_match_data_create(1, tokenizer->pcre),
                                  list};
        status =
            encoder.match ? encode_text(&encoder, text, bytes, parse_special) : RK_ERR_NO_MEMORY;
        pcre2_match_data_free(encoder.match);
    }
    if (status == RK_ERR_TOO_LONG) {
        return rk_error_set(error, status,
                            "tokenizer: %zu bytes of text are more than it takes at once", bytes);
    }
    if (status != RK_OK) {
        return rk_error_set(error, status, "tokenizer: no memory for %zu bytes of text", bytes);
    }
    return RK_OK;
}

enum rk_status tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t bytes,
                                bool parse_special, bool add_bos, struct tokenizer_ids *ret_ids,
                                struct rk_error *error)
{
    struct bpe bpe = {0};
    struct id_list list = {0};
    enum rk_status status = RK_OK;
    if (add_bos && tokenizer_begin_id(tokenizer) >= 0) {
        status = id_list_append(&list, tokenizer->bos_id);
    }
    if (status == RK_OK) {
        status = tokenizer_append(tokenizer, &bpe, text, bytes, parse_special, &list, error);
    } else {
        status = rk_error_set(error, status, "tokenizer: no memory");
    }
    bpe_clear(&bpe);
    if (status != RK_OK) {
        rk_free(list.data);
        return status;
    }
    *ret_ids = (struct tokenizer_ids){list.data, list.count};
    return RK_OK;
}

/* ---- Decoding ---- */

enum rk_status tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, size_t count,
                                bool skip_special, struct tokenizer_text *ret_text,
                                struct rk_error *error)
{
    size_t total = 0;
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0 || (uint32_t)ids[i] >= tokenizer->num_tokens) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "tokenizer: id %d at index %zu is not in the vocabulary of %u",
                                ids[i], i, tokenizer->num_tokens);
        }
        size_t bytes = tokenizer->offsets[ids[i] + 1] - tokenizer->offsets[ids[i]];
        if (__builtin_add_overflow(total, bytes, &total) || total == SIZE_MAX) {
            return rk_error_set(error, RK_ERR_TOO_LONG, "tokenizer: the text is too long");
        }
    }
    char *text = rk_alloc(total + 1);
    if (!text) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "tokenizer: no memory for %zu ids", count);
    }
    size_t length = 0;
    for (size_t i = 0; i < count; i++) {
        if (skip_special && tokenizer->control[ids[i]]) {
            continue;
        }
        size_t bytes = tokenizer->offsets[ids[i] + 1] - tokenizer->offsets[ids[i]];
        memcpy(text + length, tokenizer->bytes + tokenizer->offsets[ids[i]], bytes);
        length += bytes;
    }
    text[length] = '\0';
    *ret_text = (struct tokenizer_text){text, length};
    return RK_OK;
}

int32_t tokenizer_begin_id(const struct tokenizer *tokenizer)
{
    return tokenizer->add_bos ? tokenizer->bos_id : -1;
}

enum rk_status tokenizer_check(const struct tokenizer *tokenizer, struct rk_error *error)
{
    uint32_t missing = 0;
    for (int byte = 0; byte < 256; byte++) {
        bool needed = (byte >= 0x20 && byte < 0x7f) || byte == '\n';
        if (tokenizer->byte_ids[byte] < 0 && needed) {
            return rk_error_set(error, RK_ERR_CORRUPT,
                                "vocabulary: no token for byte 0x%02x: texts would lose that "
                                "character; download or convert the model again",
                                (unsigned)byte);
        }
        missing += tokenizer->byte_ids[byte] < 0;
    }
    if (missing > 0 || tokenizer->num_equal > 0) {
        RK_LOG_WARN("vocabulary_unusual", "bytes_without_token=%u equal_tokens=%u effect=%q",
                    missing, tokenizer->num_equal,
                    "such bytes are left out of texts; of equal tokens the first one is used");
    }
    if (tokenizer->eos_id < 0 && tokenizer->turn_end_id < 0) {
        RK_LOG_WARN("vocabulary_unusual", "end_token=none effect=%q",
                    "answers end at their maximum of tokens only");
    }
    return RK_OK;
}

bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id)
{
    return id >= 0 && (uint32_t)id < tokenizer->num_tokens && tokenizer->control[id];
}

bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t id)
{
    return id >= 0 && (id == tokenizer->eos_id || id == tokenizer->turn_end_id);
}

uint32_t tokenizer_vocab_size(const struct tokenizer *tokenizer)
{
    return tokenizer->num_tokens;
}
