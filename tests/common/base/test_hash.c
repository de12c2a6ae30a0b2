/*
 * Goal:   SHA-256 and XXH3-64 are what the standards say, however the input is cut.
 * Method: FIPS 180-4 vectors and the empty XXH3 input; random cuts of one message.
 */
#include "common/base/hash.h"

#include "common/base/id.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

static void expect_sha256(const void *data, size_t bytes, const char *hex)
{
    char got[RK_ID_HEX_BYTES];
    struct rk_id id;
    struct rk_sha256 *sha = rk_sha256_begin();
    rk_sha256_update(sha, data, bytes);
    rk_sha256_end(sha, id.bytes);
    rk_id_to_hex(&id, got);
    assert_string_equal(got, hex);
    id = rk_id_sha256(data, bytes);
    rk_id_to_hex(&id, got);
    assert_string_equal(got, hex);
}

static void sha256_matches_the_standard(void **state)
{
    static char million[1000000];
    (void)state;
    expect_sha256("", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    expect_sha256("abc", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    expect_sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56,
                  "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    memset(million, 'a', sizeof(million));
    expect_sha256(million, sizeof(million),
                  "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

static void cuts_do_not_matter(void **state)
{
    uint8_t data[1000];
    uint8_t digest[RK_SHA256_BYTES];
    unsigned seed = (unsigned)time(NULL);
    (void)state;
    print_message("seed %u\n", seed);
    srandom(seed);
    for (size_t i = 0; i < sizeof(data); i++) {
        data[i] = (uint8_t)random();
    }
    struct rk_id whole = rk_id_sha256(data, sizeof(data));
    for (int round = 0; round < 100; round++) {
        struct rk_sha256 *sha = rk_sha256_begin();
        for (size_t used = 0; used < sizeof(data);) {
            size_t some = (size_t)random() % (sizeof(data) - used + 1);
            rk_sha256_update(sha, data + used, some);
            used += some;
        }
        rk_sha256_end(sha, digest);
        assert_memory_equal(digest, whole.bytes, sizeof(digest));
    }
}

static void xxh3_is_stable(void **state)
{
    uint8_t page[4096] = {0};
    (void)state;
    /* XXH3_64bits of nothing, seed 0: from the reference implementation's own self-test. */
    assert_true(rk_hash_xxh3("", 0) == UINT64_C(0x2d06800538d394c2));
    uint64_t clean = rk_hash_xxh3(page, sizeof(page));
    for (size_t bit = 0; bit < sizeof(page) * 8; bit += 7) {
        page[bit / 8] = (uint8_t)(1u << bit % 8);
        assert_true(rk_hash_xxh3(page, sizeof(page)) != clean);
        page[bit / 8] = 0;
    }
    assert_true(rk_hash_xxh3(page, sizeof(page) - 1) != clean);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sha256_matches_the_standard),
        cmocka_unit_test(cuts_do_not_matter),
        cmocka_unit_test(xxh3_is_stable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
