#include "worker/tokenizer/tokenizer_internal.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"
#include "worker/model/model.h"

#include <stdlib.h>
#include <string.h>

enum { TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER_DEFINED = TOKENIZER_TYPE_USER_DEFINED };

/* The GPT-2 alphabet: printable Latin-1 bytes stand for themselves, the other 68 are
 * U+0100 + n in the order of their values. */
#define ALPHABET_FIRST 0x100
#define ALPHABET_LAST  0x143

static bool stands_for_itself(int byte)
{
    return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

static void fill_alphabet(int16_t bytes[ALPHABET_LAST + 1])
{
    int next = ALPHABET_FIRST;
    for (int i = 0; i <= ALPHABET_LAST; i++) {
        bytes[i] = -1;
    }
    for (int byte = 0; byte < 256; byte++) {
        bytes[stands_for_itself(byte) ? byte : next++] = (int16_t)byte;
    }
}

/* Undoes the alphabet into out (at most as long as the text). -1: a letter outside it. */
static long spell_out(const int16_t alphabet[ALPHABET_LAST + 1], struct model_string text,
                      char *out)
{
    long count = 0;
    for (size_t i = 0; i < text.bytes; i++) {
        uint32_t letter = (uint8_t)text.data[i];
        if (letter >= 0x80) {
            if ((letter & 0xe0) != 0xc0 || i + 1 >= text.bytes ||
                ((uint8_t)text.data[i + 1] & 0xc0) != 0x80) {
                return -1; /* The alphabet ends below U+0800: two bytes at most. */
            }
            letter = (letter & 0x1f) << 6 | ((uint8_t)text.data[++i] & 0x3f);
        }
        if (letter > ALPHABET_LAST || alphabet[letter] < 0) {
            return -1;
        }
        out[count++] = (char)alphabet[letter];
    }
    return count;
}

/* The smallest power of two that leaves half of the slots empty. */
static uint32_t slots_for(uint32_t entries)
{
    uint32_t slots = 16;
    while (slots < 2 * entries) {
        slots *= 2;
    }
    return slots;
}

static enum rk_status no_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "vocabulary: no memory for its tables");
}

int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *bytes, size_t count)
{
    uint32_t slot = (uint32_t)rk_hash_xxh3(bytes, count) & tokenizer->map.mask;
    for (; tokenizer->map.slots[slot]; slot = (slot + 1) & tokenizer->map.mask) {
        uint32_t id = tokenizer->map.slots[slot] - 1;
        uint64_t begin = tokenizer->offsets[id];
        if (tokenizer->offsets[id + 1] - begin == count &&
            memcmp(tokenizer->bytes + begin, bytes, count) == 0) {
            return (int32_t)id;
        }
    }
    return -1;
}

/* Of tokens with the same bytes the first one counts. */
static void map_token(struct tokenizer *tokenizer, uint32_t id)
{
    const char *bytes = tokenizer->bytes + tokenizer->offsets[id];
    size_t count = tokenizer->offsets[id + 1] - tokenizer->offsets[id];
    if (count == 0) {
        return;
    }
    if (tokenizer_find(tokenizer, bytes, count) >= 0) {
        tokenizer->num_equal++;
        return;
    }
    uint32_t slot = (uint32_t)rk_hash_xxh3(bytes, count) & tokenizer->map.mask;
    while (tokenizer->map.slots[slot]) {
        slot = (slot + 1) & tokenizer->map.mask;
    }
    tokenizer->map.slots[slot] = id + 1;
}

static bool is_special_type(int32_t type)
{
    return type == TYPE_CONTROL || type == TYPE_USER_DEFINED || type == TYPE_UNKNOWN;
}

static enum rk_status build_tokens(struct tokenizer *tokenizer,
                                   const struct model_vocabulary *vocabulary,
                                   const int16_t *alphabet, struct rk_error *error)
{
    uint32_t num_tokens = vocabulary->num_tokens;
    uint64_t total = 0;
    for (uint32_t i = 0; i < num_tokens; i++) {
        total += vocabulary->tokens[i].bytes;
    }
    uint32_t slots = slots_for(num_tokens);
    tokenizer->num_tokens = num_tokens;
    tokenizer->bytes = rk_alloc(total);
    tokenizer->offsets = rk_alloc_zero((size_t)num_tokens + 1, sizeof(*tokenizer->offsets));
    tokenizer->control = rk_alloc_zero(num_tokens, 1);
    tokenizer->map.slots = rk_alloc_zero(slots, sizeof(*tokenizer->map.slots));
    tokenizer->map.mask = slots - 1;
    if (!tokenizer->bytes || !tokenizer->offsets || !tokenizer->control || !tokenizer->map.slots) {
        return no_memory(error);
    }
    for (uint32_t i = 0; i < num_tokens; i++) {
        struct model_string text = vocabulary->tokens[i];
        int32_t type = vocabulary->types ? vocabulary->types[i] : 1;
        char *out = tokenizer->bytes + tokenizer->offsets[i];
        long count = is_special_type(type) ? -1 : spell_out(alphabet, text, out);
        if (count < 0) { /* Special tokens, and strays outside the alphabet, are literal text. */
            memcpy(out, text.data, text.bytes);
            count = (long)text.bytes;
        }
        tokenizer->offsets[i + 1] = tokenizer->offsets[i] + (uint64_t)count;
        tokenizer->control[i] = type == TYPE_CONTROL || type == TYPE_UNKNOWN;
        if (!is_special_type(type)) {
            map_token(tokenizer, i);
        }
    }
    for (int byte = 0; byte < 256; byte++) {
        char text = (char)byte;
        tokenizer->byte_ids[byte] = tokenizer_find(tokenizer, &text, 1);
    }
    return RK_OK;
}

/* ---- Merges ---- */

static uint32_t merge_slot(const struct tokenizer *tokenizer, int32_t left, int32_t right)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    key *= 0x9e3779b97f4a7c15u;
    key ^= key >> 32;
    key *= 0xd6e8feb86659fd93u;
    return (uint32_t)(key >> 32) & tokenizer->merges.mask;
}

const struct merge *tokenizer_find_merge(const struct tokenizer *tokenizer, int32_t left,
                                         int32_t right)
{
    uint32_t slot = merge_slot(tokenizer, left, right);
    for (; tokenizer->merges.slots[slot].left >= 0; slot = (slot + 1) & tokenizer->merges.mask) {
        const struct merge *merge = &tokenizer->merges.slots[slot];
        if (merge->left == left && merge->right == right) {
            return merge;
        }
    }
    return NULL;
}

/* "left right" -> the three ids. False: not two words that are tokens and make a token. */
static bool resolve_merge(const struct tokenizer *tokenizer, const int16_t *alphabet,
                          struct model_string text, char *scratch, struct merge *ret_merge)
{
    const char *space = memchr(text.data, ' ', text.bytes);
    if (!space) {
        return false;
    }
    struct model_string left = {text.data, (size_t)(space - text.data)};
    struct model_string right = {space + 1, text.bytes - left.bytes - 1};
    long left_bytes = spell_out(alphabet, left, scratch);
    if (left_bytes <= 0) {
        return false;
    }
    long right_bytes = spell_out(alphabet, right, scratch + left_bytes);
    if (right_bytes <= 0) {
        return false;
    }
    ret_merge->left = tokenizer_find(tokenizer, scratch, (size_t)left_bytes);
    ret_merge->right = tokenizer_find(tokenizer, scratch + left_bytes, (size_t)right_bytes);
    ret_merge->result = tokenizer_find(tokenizer, scratch, (size_t)(left_bytes + right_bytes));
    return ret_merge->left >= 0 && ret_merge->right >= 0 && ret_merge->result >= 0;
}

static enum rk_status build_merges(struct tokenizer *tokenizer,
                                   const struct model_vocabulary *vocabulary,
                                   const int16_t *alphabet, struct rk_error *error)
{
    uint32_t slots = slots_for(vocabulary->num_merges);
    size_t longest = 0;
    for (uint32_t i = 0; i < vocabulary->num_merges; i++) {
        longest = vocabulary->merges[i].bytes > longest ? vocabulary->merges[i].bytes : longest;
    }
    char *scratch = rk_alloc(longest);
    tokenizer->merges.slots = rk_alloc_zero(slots, sizeof(*tokenizer->merges.slots));
    tokenizer->merges.mask = slots - 1;
    if (!scratch || !tokenizer->merges.slots) {
        rk_free(scratch);
        return no_memory(error);
    }
    for (uint32_t i = 0; i < slots; i++) {
        tokenizer->merges.slots[i].left = -1;
    }
    enum rk_status status = RK_OK;
    for (uint32_t i = 0; i < vocabulary->num_merges && status == RK_OK; i++) {
        struct merge merge = {.rank = i};
        if (!resolve_merge(tokenizer, alphabet, vocabulary->merges[i], scratch, &merge)) {
            status = rk_error_set(error, RK_ERR_CORRUPT,
                                  "vocabulary: merge %u is not two tokens that make a third", i);
        } else if (!tokenizer_find_merge(tokenizer, merge.left, merge.right)) {
            uint32_t slot = merge_slot(tokenizer, merge.left, merge.right);
            while (tokenizer->merges.slots[slot].left >= 0) {
                slot = (slot + 1) & tokenizer->merges.mask;
            }
            tokenizer->merges.slots[slot] = merge;
        }
    }
    rk_free(scratch);
    return status;
}

/* ---- Special tokens ---- */

struct sortable {
    struct special special;
    const char *bytes;
    size_t count;
};

static int compare_specials(const void *left, const void *right)
{
    const struct sortable *a = left;
    const struct sortable *b = right;
    int first_a = (uint8_t)a->bytes[0];
    int first_b = (uint8_t)b->bytes[0];
    if (first_a != first_b) {
        return first_a - first_b;
    }
    if (a->count != b->count) {
        return a->count < b->count ? 1 : -1;
    }
    return (a->special.id > b->special.id) - (a->special.id < b->special.id);
}

static enum rk_status build_specials(struct tokenizer *tokenizer,
                                     const struct model_vocabulary *vocabulary,
                                     struct rk_error *error)
{
    uint32_t count = 0;
    for (uint32_t i = 0; vocabulary->types && i < vocabulary->num_tokens; i++) {
        count += is_special_type(vocabulary->types[i]) && vocabulary->tokens[i].bytes > 0;
    }
    if (count > TOKENIZER_SPECIALS_MAX) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "vocabulary: %u special tokens; at most %u are supported", count,
                            TOKENIZER_SPECIALS_MAX);
    }
    struct sortable *sortable = rk_alloc_zero(count, sizeof(*sortable));
    tokenizer->specials = rk_alloc_zero(count, sizeof(*tokenizer->specials));
    if (!sortable || !tokenizer->specials) {
        rk_free(sortable);
        return no_memory(error);
    }
    uint32_t filled = 0;
    for (uint32_t i = 0; filled < count; i++) {
        if (is_special_type(vocabulary->types[i]) && vocabulary->tokens[i].bytes > 0) {
            sortable[filled].special.id = (int32_t)i;
            sortable[filled].special.always = vocabulary->types[i] == TYPE_USER_DEFINED;
            sortable[filled].bytes = vocabulary->tokens[i].data;
            sortable[filled].count = vocabulary->tokens[i].bytes;
            filled++;
        }
    }
    if (count > 0) {
        qsort(sortable, count, sizeof(*sortable), compare_specials);
    }
    for (uint32_t i = 0; i < count; i++) {
        tokenizer->specials[i] = sortable[i].special;
        tokenizer->special_begin[(uint8_t)sortable[i].bytes[0] + 1]++;
    }
    for (int byte = 0; byte < 256; byte++) {
        tokenizer->special_begin[byte + 1] += tokenizer->special_begin[byte];
    }
    rk_free(sortable);
    return RK_OK;
}

enum rk_status tokenizer_build(struct tokenizer *tokenizer,
                               const struct model_vocabulary *vocabulary, struct rk_error *error)
{
    int16_t alphabet[ALPHABET_LAST + 1];
    fill_alphabet(alphabet);
    enum rk_status status = build_tokens(tokenizer, vocabulary, alphabet, error);
    if (status == RK_OK) {
        status = build_merges(tokenizer, vocabulary, alphabet, error);
    }
    return status == RK_OK ? build_specials(tokenizer, vocabulary, error) : status;
}
