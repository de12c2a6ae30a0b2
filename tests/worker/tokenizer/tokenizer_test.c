/*
 * Goal:   ids, bytes and chats equal those of transformers and llama.cpp; text from outside can
 *         neither forge a turn nor take more than O(n log n) time; creation and encoding survive
 *         each failed allocation.
 * Method: all golden cases of SmolLM2; the merge loop against a naive one on random pieces of a
 *         random vocabulary; hostile texts whose result is known by counting.
 */
#include "common/base/alloc.h"
#include "tests/support/golden.h"
#include "worker/model/model.h"
#include "worker/tokenizer/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

static struct model *model;
static struct tokenizer *tokenizer;

static int open_model(void **state)
{
    struct rk_error error;
    (void)state;
    if (model_open(golden_model_path(), &model, &error) != RK_OK ||
        tokenizer_create(model_vocabulary(model), &tokenizer, &error) != RK_OK) {
        print_error("%s\n", error.text);
        return 1;
    }
    return 0;
}

static int close_model(void **state)
{
    (void)state;
    tokenizer_destroy(tokenizer);
    model_close(model);
    return 0;
}

static void check_ids(const struct tokenizer_ids *ids, const json_t *expected, int number)
{
    size_t count = 0;
    int32_t *wanted = golden_ids(expected, &count);
    bool same = count == ids->count &&
                (count == 0 || memcmp(wanted, ids->data, count * sizeof(*wanted)) == 0);
    if (!same) {
        for (size_t i = 0; i < count || i < ids->count; i++) {
            print_error("%zu: wanted %d, got %d\n", i, i < count ? wanted[i] : -1,
                        i < ids->count ? ids->data[i] : -1);
        }
        fail_msg("case %d differs", number);
    }
    free(wanted);
}

static void encode_and_check(const char *text, size_t bytes, bool parse_special,
                             const json_t *expected, int number)
{
    struct tokenizer_ids ids = {0};
    struct rk_error error;
    assert_int_equal(tokenizer_encode(tokenizer, text, bytes, parse_special, true, &ids, &error),
                     RK_OK);
    check_ids(&ids, expected, number);
    rk_free(ids.data);
}

/* Decoding gives the text back, or what the golden data say is left of it. */
static void decode_and_check(const int32_t *ids, size_t count, bool skip_special,
                             const json_t *expected_hex)
{
    struct tokenizer_text text = {0};
    struct rk_error error;
    size_t bytes = 0;
    char *expected = golden_hex(expected_hex, &bytes);
    assert_int_equal(tokenizer_decode(tokenizer, ids, count, skip_special, &text, &error), RK_OK);
    assert_int_equal(text.bytes, bytes);
    assert_memory_equal(text.data, expected, bytes + 1);
    rk_free(text.data);
    free(expected);
}

static void pairs_are_those_of_transformers(void **state)
{
    json_t *file = golden_json("smollm2/tokenizer_pairs.json");
    const json_t *cases = golden_member(file, "cases");
    int plain_differs = 0;
    (void)state;

    assert_int_equal(json_array_size(cases), 241);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *item = json_array_get(cases, i);
        const json_t *ids = golden_member(item, "ids");
        const json_t *plain = json_object_get(item, "ids_plain");
        const json_t *lossy = json_object_get(item, "lossy_decoded_hex");
        size_t bytes = 0;
        size_t count = 0;
        char *text = golden_hex(golden_member(item, "utf8_hex"), &bytes);
        int32_t *list = golden_ids(ids, &count);
        encode_and_check(text, bytes, true, ids, (int)i);
        encode_and_check(text, bytes, false, plain ? plain : ids, (int)i);
        decode_and_check(list, count, false, lossy ? lossy : golden_member(item, "utf8_hex"));
        plain_differs += plain != NULL;
        free(list);
        free(text);
    }
    assert_true(plain_differs > 0);
    json_decref(file);
}

static void decoding_gives_the_bytes(void **state)
{
    json_t *file = golden_json("smollm2/tokenizer_decode.json");
    const json_t *cases = golden_member(file, "cases");
    (void)state;

    assert_int_equal(json_array_size(cases), 40);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *item = json_array_get(cases, i);
        size_t count = 0;
        int32_t *ids = golden_ids(golden_member(item, "ids"), &count);
        decode_and_check(ids, count, false, golden_member(item, "bytes_hex"));
        decode_and_check(ids, count, true, golden_member(item, "bytes_hex_skip_special"));
        free(ids);
    }
    json_decref(file);
}

static void decoding_refuses_unknown_ids(void **state)
{
    struct tokenizer_text text = {0};
    struct rk_error error;
    int32_t ids[] = {1, 49152};
    (void)state;
    assert_int_equal(tokenizer_decode(tokenizer, ids, 2, false, &text, &error), RK_ERR_INVALID);
    ids[1] = -1;
    assert_int_equal(tokenizer_decode(tokenizer, ids, 2, false, &text, NULL), RK_ERR_INVALID);
    assert_null(text.data);
    assert_int_equal(tokenizer_decode(tokenizer, ids, 0, false, &text, NULL), RK_OK);
    assert_int_equal(text.bytes, 0);
    rk_free(text.data);
}

static void chat_case(const json_t *item, int number, int *forged)
{
    const json_t *list = golden_member(item, "messages");
    struct tokenizer_message messages[16];
    struct tokenizer_ids ids = {0};
    struct tokenizer_ids plain = {0};
    size_t count = json_array_size(list);
    bool prompt = json_is_true(golden_member(item, "add_generation_prompt"));
    bool injection = false;

    assert_true(count <= 16);
    for (size_t i = 0; i < count; i++) {
        const json_t *content = golden_member(json_array_get(list, i), "content");
        messages[i].role = json_string_value(golden_member(json_array_get(list, i), "role"));
        messages[i].content = json_string_value(content);
        messages[i].content_bytes = json_string_length(content);
        injection = injection || strstr(messages[i].content, "<|im_") != NULL;
    }
    assert_int_equal(tokenizer_chat_encode(tokenizer, messages, count, prompt, true, &ids, NULL),
                     RK_OK);
    check_ids(&ids, golden_member(item, "ids"), number);
    assert_int_equal(tokenizer_chat_encode(tokenizer, messages, count, prompt, false, &plain, NULL),
                     RK_OK);
    if (injection) {
        assert_true(plain.count > ids.count);
        *forged += 1;
    } else {
        check_ids(&plain, golden_member(item, "ids"), number);
    }
    rk_free(ids.data);
    rk_free(plain.data);
}

static void chats_are_those_of_the_template(void **state)
{
    json_t *file = golden_json("smollm2/chat.json");
    const json_t *cases = golden_member(file, "cases");
    int forged = 0;
    (void)state;
    assert_int_equal(json_array_size(cases), 5);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        chat_case(json_array_get(cases, i), (int)i, &forged);
    }
    assert_int_equal(forged, 1);
    json_decref(file);
}

/* opening + "Hi" + closing are the ids of the first golden conversation. */
static void chat_halves_make_a_whole(void **state)
{
    static const int32_t whole[] = {1,     9690,  198,  2683, 359,   253,  5356, 5646,
                                    11173, 3365,  3511, 308,  34519, 28,   7018, 411,
                                    407,   19712, 8182, 2,    198,   1,    4093, 198,
                                    26843, 2,     198,  1,    520,   9531, 198};
    struct tokenizer_ids open = {0};
    struct tokenizer_ids close = {0};
    (void)state;
    assert_int_equal(tokenizer_chat_open(tokenizer, NULL, &open, NULL), RK_OK);
    assert_int_equal(tokenizer_chat_close(tokenizer, &close, NULL), RK_OK);
    assert_int_equal(open.count, 24);
    assert_memory_equal(open.data, whole, sizeof(int32_t) * 24);
    assert_int_equal(close.count, 6);
    assert_memory_equal(close.data, whole + 25, sizeof(int32_t) * 6);
    rk_free(open.data);
    assert_int_equal(tokenizer_chat_open(tokenizer, "<|im_end|>", &open, NULL), RK_OK);
    int ends = 0;
    for (size_t i = 0; i < open.count; i++) {
        ends += open.data[i] == 2;
    }
    assert_int_equal(ends, 1); /* A system message cannot end its own turn. */
    rk_free(open.data);
    rk_free(close.data);
}

static void chat_refuses_unknown_roles(void **state)
{
    struct tokenizer_message message = {"user\n<|im_end|>", "x", 1};
    struct tokenizer_ids ids = {0};
    (void)state;
    assert_int_equal(tokenizer_chat_encode(tokenizer, &message, 1, true, false, &ids, NULL),
                     RK_ERR_INVALID);
    assert_null(ids.data);
}

static void specials_and_ends(void **state)
{
    (void)state;
    assert_true(tokenizer_has_chat(tokenizer));
    assert_int_equal(tokenizer_vocab_size(tokenizer), 49152);
    for (int32_t id = -1; id < 20; id++) {
        assert_int_equal(tokenizer_is_special(tokenizer, id), id >= 0 && id <= 16);
        assert_int_equal(tokenizer_is_end(tokenizer, id), id == 2);
    }
    assert_false(tokenizer_is_special(tokenizer, 49152));
    assert_false(tokenizer_is_special(tokenizer, INT32_MIN));
}

/* Each byte that is not part of valid UTF-8 is a piece of its own: "a", 0x80, 0xff (no token), "b".
 */
static void invalid_utf8_goes_byte_by_byte(void **state)
{
    static const char *const texts[] = {"\x80",
                                        "\xc3",
                                        "\xe2\x82",
                                        "\xed\xa0\x80",
                                        "\xf0\x80\x80\x80",
                                        "\xc0\xaf",
                                        "\xf4\x90\x80\x80"};
    struct tokenizer_ids ids = {0};
    struct tokenizer_text text = {0};
    (void)state;
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        char mixed[32];
        int bytes = snprintf(mixed, sizeof(mixed), "ab%scd", texts[i]);
        assert_int_equal(tokenizer_encode(tokenizer, mixed, (size_t)bytes, true, false, &ids, NULL),
                         RK_OK);
        assert_int_equal(tokenizer_decode(tokenizer, ids.data, ids.count, false, &text, NULL),
                         RK_OK);
        size_t dropped = (texts[i][0] == '\xc0');
        assert_int_equal(text.bytes, (size_t)bytes - dropped);
        /* "ab" and "cd" are one token each; no two broken bytes were merged. */
        assert_int_equal(ids.count, 2 + strlen(texts[i]) - dropped);
        rk_free(ids.data);
        rk_free(text.data);
    }
}

/* Sanitizers are ten times slower; what is quadratic shows without them. */
#ifdef REDKNOT_SANITIZED
#define HOSTILE_BYTES ((size_t)1 << 15)
#else
#define HOSTILE_BYTES ((size_t)1 << 20)
#endif

/* A megabyte of one character class: were merging or matching quadratic, the test's time limit
 * would end it. Decoding must give the text back. */
static void hostile_texts_end(void **state)
{
    static const char *const units[] = {
        "a",  " ",    "!",           "7",          "\n",  "\xe4\xbd\xa0", " a",
        "ab", "\x80", "<|im_start|", "<|im_end|>", "\t ", "'s",           "\xcc\x81"};
    size_t bytes = HOSTILE_BYTES;
    char *big = malloc(bytes);
    (void)state;
    assert_non_null(big);
    for (size_t i = 0; i < sizeof(units) / sizeof(units[0]); i++) {
        struct tokenizer_ids ids = {0};
        struct tokenizer_text text = {0};
        size_t unit = strlen(units[i]);
        size_t length = bytes / unit * unit;
        for (size_t at = 0; at < length; at++) {
            big[at] = units[i][at % unit];
        }
        assert_int_equal(tokenizer_encode(tokenizer, big, length, true, false, &ids, NULL), RK_OK);
        assert_int_equal(tokenizer_decode(tokenizer, ids.data, ids.count, false, &text, NULL),
                         RK_OK);
        assert_int_equal(text.bytes, length);
        assert_memory_equal(text.data, big, length);
        rk_free(ids.data);
        rk_free(text.data);
    }
    free(big);
}

/* ---- A small vocabulary of our own ---- */

#define LETTERS    4
#define SMALL_MAX  64
#define STRING_MAX 64

struct small {
    struct model_vocabulary vocabulary;
    struct model_string tokens[SMALL_MAX];
    struct model_string merges[SMALL_MAX];
    int32_t types[SMALL_MAX];
    int32_t merge_ids[SMALL_MAX][3];
    char token_texts[SMALL_MAX][STRING_MAX];
    char merge_texts[SMALL_MAX][2 * STRING_MAX];
};

static void small_add_token(struct small *small, const char *text, int32_t type)
{
    uint32_t id = small->vocabulary.num_tokens++;
    assert_true(strlen(text) < STRING_MAX);
    memcpy(small->token_texts[id], text, strlen(text) + 1);
    small->tokens[id] = (struct model_string){small->token_texts[id], strlen(text)};
    small->types[id] = type;
}

static void small_begin(struct small *small)
{
    memset(small, 0, sizeof(*small));
    small->vocabulary = (struct model_vocabulary){.pre = "gpt-2",
                                                  .tokens = small->tokens,
                                                  .types = small->types,
                                                  .merges = small->merges,
                                                  .bos_id = -1,
                                                  .eos_id = -1,
                                                  .unknown_id = -1,
                                                  .padding_id = -1};
    for (int i = 0; i < LETTERS; i++) {
        char letter[2] = {(char)('a' + i), '\0'};
        small_add_token(small, letter, 1);
    }
}

/* Random merges of what is there already, no two with the same result. */
static void small_add_merges(struct small *small, int count)
{
    for (int i = 0; i < count; i++) {
        int32_t left = (int32_t)(rand() % (int)small->vocabulary.num_tokens);
        int32_t right = (int32_t)(rand() % (int)small->vocabulary.num_tokens);
        char text[2 * STRING_MAX + 2];
        size_t left_bytes = small->tokens[left].bytes;
        size_t right_bytes = small->tokens[right].bytes;
        memcpy(text, small->token_texts[left], left_bytes);
        memcpy(text + left_bytes, small->token_texts[right], right_bytes + 1);
        bool known = left_bytes + right_bytes > 12;
        for (uint32_t j = 0; j < small->vocabulary.num_tokens; j++) {
            known = known || strcmp(small->token_texts[j], text) == 0;
        }
        if (known) {
            continue;
        }
        uint32_t merge = small->vocabulary.num_merges++;
        small->merge_ids[merge][0] = left;
        small->merge_ids[merge][1] = right;
        small->merge_ids[merge][2] = (int32_t)small->vocabulary.num_tokens;
        small_add_token(small, text, 1);
        char *words = small->merge_texts[merge];
        memcpy(words, text, left_bytes);
        words[left_bytes] = ' ';
        memcpy(words + left_bytes + 1, text + left_bytes, right_bytes);
        small->merges[merge] = (struct model_string){words, left_bytes + 1 + right_bytes};
    }
}

/* The definition: over and over the lowest-ranked pair, the leftmost of its kind first. */
static size_t naive_merge(const struct small *small, int32_t *ids, size_t count)
{
    for (;;) {
        uint32_t best = UINT32_MAX;
        size_t at = 0;
        for (size_t i = 0; i + 1 < count; i++) {
            for (uint32_t j = 0; j < small->vocabulary.num_merges && j < best; j++) {
                if (small->merge_ids[j][0] == ids[i] && small->merge_ids[j][1] == ids[i + 1]) {
                    best = j;
                    at = i;
                }
            }
        }
        if (best == UINT32_MAX) {
            return count;
        }
        ids[at] = small->merge_ids[best][2];
        memmove(ids + at + 1, ids + at + 2, (count - at - 2) * sizeof(*ids));
        count--;
    }
}

static void merging_follows_the_definition(void **state)
{
    unsigned seed = (unsigned)time(NULL);
    static struct small small;
    (void)state;
    print_message("seed %u\n", seed);
    srand(seed);
    for (int round = 0; round < 200; round++) {
        struct tokenizer *own = NULL;
        struct tokenizer_ids ids = {0};
        char text[64];
        int32_t expected[64];
        size_t bytes = (size_t)(rand() % 64);
        small_begin(&small);
        small_add_merges(&small, 40);
        for (size_t i = 0; i < bytes; i++) {
            expected[i] = rand() % LETTERS;
            text[i] = (char)('a' + expected[i]);
        }
        size_t count = naive_merge(&small, expected, bytes);
        assert_int_equal(tokenizer_create(&small.vocabulary, &own, NULL), RK_OK);
        assert_int_equal(tokenizer_encode(own, text, bytes, true, true, &ids, NULL), RK_OK);
        assert_int_equal(ids.count, count);
        if (count > 0) {
            assert_memory_equal(ids.data, expected, count * sizeof(*expected));
        }
        rk_free(ids.data);
        tokenizer_destroy(own);
    }
}

static void bos_is_added_when_both_ask(void **state)
{
    static struct small small;
    struct tokenizer *own = NULL;
    struct tokenizer_ids ids = {0};
    (void)state;
    small_begin(&small);
    small_add_token(&small, "<s>", 3);
    small.vocabulary.bos_id = LETTERS;
    small.vocabulary.add_bos = true;
    assert_int_equal(tokenizer_create(&small.vocabulary, &own, NULL), RK_OK);
    assert_int_equal(tokenizer_encode(own, "a", 1, true, true, &ids, NULL), RK_OK);
    assert_int_equal(ids.count, 2);
    assert_int_equal(ids.data[0], LETTERS);
    rk_free(ids.data);
    assert_int_equal(tokenizer_encode(own, "a", 1, true, false, &ids, NULL), RK_OK);
    assert_int_equal(ids.count, 1);
    rk_free(ids.data);
    assert_false(tokenizer_has_chat(own));
    assert_int_equal(tokenizer_chat_close(own, &ids, NULL), RK_ERR_UNSUPPORTED);
    tokenizer_destroy(own);
}

/* A conversation begins with the token that the vocabulary asks for, once. */
static void chats_begin_with_bos(void **state)
{
    static struct small small;
    static const char template[] = "{{ '<|im_start|>' }}";
    struct tokenizer *own = NULL;
    struct tokenizer_ids ids = {0};
    (void)state;
    small_begin(&small);
    small_add_token(&small, "<s>", 3);          /* 4 */
    small_add_token(&small, "<|im_start|>", 3); /* 5 */
    small_add_token(&small, "<|im_end|>", 3);   /* 6 */
    small.vocabulary.chat_template = (struct model_string){template, sizeof(template) - 1};
    small.vocabulary.bos_id = LETTERS;
    for (int ask = 0; ask < 2; ask++) {
        small.vocabulary.add_bos = ask == 1;
        assert_int_equal(tokenizer_create(&small.vocabulary, &own, NULL), RK_OK);
        assert_int_equal(tokenizer_begin_id(own), ask == 1 ? LETTERS : -1);
        const int32_t turn[] = {LETTERS, 5}; /* of "user" no letter has a token */
        assert_int_equal(tokenizer_chat_open(own, NULL, &ids, NULL), RK_OK);
        assert_int_equal(ids.count, ask + 1);
        assert_memory_equal(ids.data, turn + 1 - ask, ids.count * sizeof(turn[0]));
        rk_free(ids.data);
        const struct tokenizer_message message = {"user", "a", 1};
        assert_int_equal(tokenizer_chat_encode(own, &message, 1, false, false, &ids, NULL), RK_OK);
        assert_int_equal(ids.data[0], ask == 1 ? LETTERS : 5);
        rk_free(ids.data);
        tokenizer_destroy(own);
    }
}

/* A file may call its end token "user defined", which means: matched in any text. */
static void text_never_becomes_a_mark(void **state)
{
    static struct small small;
    struct tokenizer *own = NULL;
    struct tokenizer_ids ids = {0};
    (void)state;
    small_begin(&small);
    small_add_token(&small, "</s>", 4);
    small_add_token(&small, "<s>", 4);
    small.vocabulary.eos_id = LETTERS;
    small.vocabulary.bos_id = LETTERS + 1;
    assert_int_equal(tokenizer_create(&small.vocabulary, &own, NULL), RK_OK);
    assert_int_equal(tokenizer_encode(own, "a</s><s>b", 9, false, false, &ids, NULL), RK_OK);
    const int32_t letters[] = {0, 1};
    assert_int_equal(ids.count, 2);
    assert_memory_equal(ids.data, letters, sizeof(letters));
    rk_free(ids.data);
    assert_int_equal(tokenizer_encode(own, "a</s>", 5, true, false, &ids, NULL), RK_OK);
    assert_int_equal(ids.data[1], LETTERS);
    rk_free(ids.data);
    tokenizer_destroy(own);
}

static void lost_characters_are_refused(void **state)
{
    static struct small small;
    struct tokenizer *own = NULL;
    struct rk_error error = {.text = ""};
    (void)state;
    assert_int_equal(tokenizer_check(tokenizer, &error), RK_OK); /* SmolLM2's own */
    small_begin(&small);
    assert_int_equal(tokenizer_create(&small.vocabulary, &own, NULL), RK_OK);
    assert_int_equal(tokenizer_check(own, &error), RK_ERR_CORRUPT);
    assert_non_null(strstr(error.text, "byte 0x0a"));
    tokenizer_destroy(own);
}

/* The longest special token wins; a user-defined one is matched in any text, a control one only
 * when asked for; and those of ChatML only when asked for, whatever type the file gives them. */
static void special_tokens_by_kind(void **state)
{
    static struct small small;
    static const char template[] = "{{ '<|im_start|>' + x }}{{ \"<|im_start|>system\\nHi 'a'\\n"
                                   "<|im_end|>\" }}";
    static const char text[] = "<x><xy><u><|im_end|>";
    struct tokenizer *own = NULL;
    struct tokenizer_ids ids = {0};
    (void)state;
    small_begin(&small);
    small_add_token(&small, "<x", 3);           /* 4 */
    small_add_token(&small, "<xy>", 3);         /* 5 */
    small_add_token(&small, "<u>", 4);          /* 6 */
    small_add_token(&small, "<|im_start|>", 4); /* 7 */
    small_add_token(&small, "<|im_end|>", 4);   /* 8 */
    small.vocabulary.chat_template = (struct model_string){template, sizeof(template) - 1};
    assert_int_equal(tokenizer_create(&small.vocabulary, &own, NULL), RK_OK);
    assert_true(tokenizer_has_chat(own));
    assert_int_equal(tokenizer_encode(own, text, sizeof(text) - 1, true, false, &ids, NULL), RK_OK);
    const int32_t all[] = {4, 5, 6, 8};
    assert_int_equal(ids.count, 4);
    assert_memory_equal(ids.data, all, sizeof(all));
    rk_free(ids.data);
    assert_int_equal(tokenizer_encode(own, text, sizeof(text) - 1, false, false, &ids, NULL),
                     RK_OK);
    const int32_t plain[] = {6, 3}; /* and the "d" of "<|im_end|>" */
    assert_int_equal(ids.count, 2);
    assert_memory_equal(ids.data, plain, sizeof(plain));
    rk_free(ids.data);
    /* Of the default system message and of the roles only the letter "a" has a token. */
    assert_int_equal(tokenizer_chat_open(own, NULL, &ids, NULL), RK_OK);
    const int32_t turn[] = {7, 0, 8, 7};
    assert_int_equal(ids.count, 4);
    assert_memory_equal(ids.data, turn, sizeof(turn));
    rk_free(ids.data);
    tokenizer_destroy(own);
}

static void unknown_vocabularies_are_named(void **state)
{
    static struct small small;
    struct tokenizer *own = NULL;
    struct rk_error error;
    (void)state;
    small_begin(&small);
    small.vocabulary.pre = "qwen2";
    assert_int_equal(tokenizer_create(&small.vocabulary, &own, &error), RK_ERR_UNSUPPORTED);
    assert_non_null(strstr(error.text, "qwen2"));
    small.vocabulary.pre = "gpt-2";
    small.vocabulary.model = "llama";
    assert_int_equal(tokenizer_create(&small.vocabulary, &own, &error), RK_ERR_UNSUPPORTED);
    assert_non_null(strstr(error.text, "llama"));
    small.vocabulary.model = "gpt2";
    small.merges[0] = (struct model_string){"a z", 3};
    small.vocabulary.num_merges = 1;
    assert_int_equal(tokenizer_create(&small.vocabulary, &own, &error), RK_ERR_CORRUPT);
    small.vocabulary.num_merges = 0;
    small.vocabulary.num_tokens = 0;
    assert_int_equal(tokenizer_create(&small.vocabulary, &own, &error), RK_ERR_UNSUPPORTED);
    assert_null(own);
}

static void each_allocation_may_fail(void **state)
{
    static struct small small;
    static const char text[] = "ab abc 12 <s> abcdabcd\x80";
    (void)state;
    srand(7);
    small_begin(&small);
    small_add_merges(&small, 20);
    small_add_token(&small, "<s>", 3);
    struct tokenizer *own = NULL;
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    for (; status != RK_OK; failures++) {
        rk_alloc_fail_after(failures);
        status = tokenizer_create(&small.vocabulary, &own, NULL);
        rk_alloc_fail_after(-1);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        assert_int_equal(own != NULL, status == RK_OK);
    }
    assert_true(failures > 8);
    status = RK_ERR_NO_MEMORY;
    for (failures = 0; status != RK_OK; failures++) {
        struct tokenizer_ids ids = {0};
        rk_alloc_fail_after(failures);
        status = tokenizer_encode(own, text, sizeof(text) - 1, true, true, &ids, NULL);
        rk_alloc_fail_after(-1);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        assert_int_equal(ids.data != NULL, status == RK_OK);
        rk_free(ids.data);
    }
    assert_true(failures > 3);
    tokenizer_destroy(own);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pairs_are_those_of_transformers),
        cmocka_unit_test(decoding_gives_the_bytes),
        cmocka_unit_test(decoding_refuses_unknown_ids),
        cmocka_unit_test(chats_are_those_of_the_template),
        cmocka_unit_test(chat_halves_make_a_whole),
        cmocka_unit_test(chat_refuses_unknown_roles),
        cmocka_unit_test(specials_and_ends),
        cmocka_unit_test(invalid_utf8_goes_byte_by_byte),
        cmocka_unit_test(hostile_texts_end),
        cmocka_unit_test(merging_follows_the_definition),
        cmocka_unit_test(bos_is_added_when_both_ask),
        cmocka_unit_test(chats_begin_with_bos),
        cmocka_unit_test(text_never_becomes_a_mark),
        cmocka_unit_test(lost_characters_are_refused),
        cmocka_unit_test(special_tokens_by_kind),
        cmocka_unit_test(unknown_vocabularies_are_named),
        cmocka_unit_test(each_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
