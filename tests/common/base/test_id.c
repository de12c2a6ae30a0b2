/*
 * Goal:   names are what id.h specifies, for good: stored segments live by them.
 * Method: vectors computed from the specification with Python's hashlib, boundary
 *         shifts between fields, hex in all its wrong forms.
 */
#include "common/base/id.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static const char segment_hex[] =
    "4ed5b885126dafb6e84ddb1c748e5bdbb9c1ebe66ceac7503925b8eff9b8a5fe";
static const char empty_hex[] = "fca596052f71446aa308d0943fe39de622067426e77e4cc29e8fa74e4c1f7f3b";
static const char chain_hex[] = "eff1f025bc772c88d00e6b50f811a6966dd3476a132c117e58237310b6ebfcbc";
static const int32_t tokens[] = {1, 2, 3, -1, 49151};

static struct rk_id fingerprint(void)
{
    struct rk_id id;
    for (int i = 0; i < RK_ID_BYTES; i++) {
        id.bytes[i] = (uint8_t)i;
    }
    return id;
}

static void expect_hex(struct rk_id id, const char *hex)
{
    char got[RK_ID_HEX_BYTES];
    rk_id_to_hex(&id, got);
    assert_string_equal(got, hex);
}

static void segments_and_chains_match_the_specification(void **state)
{
    struct rk_id model = fingerprint();
    struct rk_id segment = rk_id_segment("tenant-a", 8, &model, tokens, 5);
    struct rk_id empty = rk_id_segment("tenant-a", 8, &model, tokens, 0);
    (void)state;
    expect_hex(segment, segment_hex);
    expect_hex(empty, empty_hex);
    expect_hex(rk_id_chain(&segment, &empty), chain_hex);
}

/* Made with Python's hashlib from docs/protocol.md, for clients in other languages do the same. */
static void values_match_the_specification(void **state)
{
    uint8_t longest[256];
    (void)state;
    for (int i = 0; i < 256; i++) {
        longest[i] = (uint8_t)i;
    }
    expect_hex(rk_id_value("model@0@chunk", 13),
               "761bc6c0f75aad7806326ccfff5a7760d1171a7a1b678ded1c65d1c370f803a1");
    expect_hex(rk_id_value(longest, sizeof(longest)),
               "84cf8db6d64ddf2feb48ff86695cb846ce2fd12e6d3eb1d357659e797651cae5");
}

static void a_chain_of_one_is_its_segment(void **state)
{
    struct rk_id model = fingerprint();
    struct rk_id segment = rk_id_segment("tenant-a", 8, &model, tokens, 5);
    struct rk_id one = rk_id_chain(NULL, &segment);
    struct rk_id twice = rk_id_chain(&one, &segment);
    (void)state;
    assert_true(rk_id_equal(&one, &segment));
    assert_false(rk_id_equal(&twice, &segment));
}

static void chains_have_an_order(void **state)
{
    struct rk_id model = fingerprint();
    struct rk_id a = rk_id_segment("s", 1, &model, tokens, 1);
    struct rk_id b = rk_id_segment("s", 1, &model, tokens, 2);
    struct rk_id c = rk_id_segment("s", 1, &model, tokens, 3);
    struct rk_id ab = rk_id_chain(&a, &b);
    struct rk_id ba = rk_id_chain(&b, &a);
    struct rk_id bc = rk_id_chain(&b, &c);
    struct rk_id ab_c = rk_id_chain(&ab, &c);
    struct rk_id a_bc = rk_id_chain(&a, &bc);
    (void)state;
    assert_false(rk_id_equal(&ab, &ba));
    assert_false(rk_id_equal(&ab_c, &a_bc));
}

/* The same bytes, cut at another place: without lengths the digests would be equal. */
static void fields_cannot_run_into_each_other(void **state)
{
    uint8_t salt[8 + RK_ID_BYTES];
    struct rk_id model = fingerprint();
    struct rk_id shifted;
    (void)state;
    memcpy(salt, "tenant-a", 8); /* NOLINT(bugprone-not-null-terminated-result): bytes */
    memcpy(salt + 8, model.bytes, RK_ID_BYTES);
    struct rk_id plain = rk_id_segment(salt, 8, &model, tokens, 5);
    for (size_t shift = 4; shift <= 32; shift += 4) {
        /* salt takes the first bytes of the fingerprint, that takes some of the tokens. */
        int32_t rest[16];
        size_t left = sizeof(tokens) > shift ? sizeof(tokens) - shift : 0;
        uint8_t all[RK_ID_BYTES + sizeof(tokens)];
        memcpy(all, model.bytes, RK_ID_BYTES);
        memcpy(all + RK_ID_BYTES, tokens, sizeof(tokens));
        if (shift > sizeof(tokens)) {
            continue;
        }
        memcpy(shifted.bytes, all + shift, RK_ID_BYTES);
        memcpy(rest, all + shift + RK_ID_BYTES, left);
        struct rk_id other = rk_id_segment(salt, 8 + shift, &shifted, rest, left / 4);
        assert_false(rk_id_equal(&plain, &other));
    }
}

static void each_field_counts(void **state)
{
    struct rk_id model = fingerprint();
    struct rk_id other_model = model;
    int32_t other_tokens[] = {1, 2, 3, -1, 49150};
    (void)state;
    other_model.bytes[31] ^= 1;
    struct rk_id ids[] = {
        rk_id_segment("tenant-a", 8, &model, tokens, 5),
        rk_id_segment("tenant-b", 8, &model, tokens, 5),
        rk_id_segment("", 0, &model, tokens, 5),
        rk_id_segment("tenant-a", 8, &other_model, tokens, 5),
        rk_id_segment("tenant-a", 8, &model, other_tokens, 5),
        rk_id_segment("tenant-a", 8, &model, tokens, 4),
    };
    for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]); i++) {
        assert_false(rk_id_is_zero(&ids[i]));
        for (size_t j = 0; j < i; j++) {
            assert_false(rk_id_equal(&ids[i], &ids[j]));
            assert_true(rk_id_hash(&ids[i]) != rk_id_hash(&ids[j]));
        }
    }
}

static void hex_is_strict(void **state)
{
    struct rk_id id = {.bytes = {0}};
    struct rk_id before = id;
    char text[80];
    (void)state;
    assert_true(rk_id_is_zero(&id));
    assert_true(rk_id_from_hex(segment_hex, &id));
    expect_hex(id, segment_hex);
    for (int i = 0; i < 64; i++) {
        text[i] = (char)(segment_hex[i] >= 'a' ? segment_hex[i] - 32 : segment_hex[i]);
    }
    text[64] = '\0';
    assert_true(rk_id_from_hex(text, &id)); /* upper case */
    expect_hex(id, segment_hex);

    id = before;
    assert_false(rk_id_from_hex("", &id));
    (void)snprintf(text, sizeof(text), "%.63s", segment_hex);
    assert_false(rk_id_from_hex(text, &id));
    (void)snprintf(text, sizeof(text), "%s0", segment_hex);
    assert_false(rk_id_from_hex(text, &id));
    for (int c = 1; c < 256; c++) {
        bool digit = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
        for (int place = 0; place < 64; place += 63) {
            memcpy(text, segment_hex, sizeof(segment_hex));
            text[place] = (char)c;
            struct rk_id got = before;
            assert_int_equal(rk_id_from_hex(text, &got), digit);
            assert_true(digit || rk_id_equal(&got, &before)); /* written on success only */
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(segments_and_chains_match_the_specification),
        cmocka_unit_test(values_match_the_specification),
        cmocka_unit_test(a_chain_of_one_is_its_segment),
        cmocka_unit_test(chains_have_an_order),
        cmocka_unit_test(fields_cannot_run_into_each_other),
        cmocka_unit_test(each_field_counts),
        cmocka_unit_test(hex_is_strict),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
