/*
 * Goal:   addresses are read as people mean them or refused with a reason; no port is cut to
 *         16 bits, and nobody calls port 0.
 * Method: tables of inputs, read, written and read again.
 */
#include "common/base/address.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static void addresses_are_read(void **state)
{
    static const struct {
        const char *text;
        const char *host;
        uint16_t port;
    } rows[] = {
        {"127.0.0.1:9101", "127.0.0.1", 9101}, {"store-3.example:0", "store-3.example", 0},
        {"[::1]:7000", "::1", 7000},           {"[fe80::1%eth0]:65535", "fe80::1%eth0", 65535},
        {"0.0.0.0:080", "0.0.0.0", 80},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct rk_address address;
        assert_int_equal(rk_address_parse(rows[i].text, RK_ADDRESS_LISTEN, &address, NULL), RK_OK);
        assert_string_equal(address.host, rows[i].host);
        assert_int_equal(address.port, rows[i].port);
    }
}

static void wrong_addresses_are_refused_with_a_reason(void **state)
{
    static const struct {
        const char *text;
        const char *reason;
    } rows[] = {
        {"", "no port"},
        {"host", "no port"},
        {":80", "0.0.0.0:80"},
        {"host:", "not a number"},
        {"host:65536", "not a number"},
        {"host:99999999999999999999", "not a number"},
        {"host:-1", "not a number"},
        {"host:80x", "not a number"},
        {"::1:80", "brackets"},
        {"[::1]", "brackets"},
        {"[]:80", "brackets"},
        {"[::1:80", "brackets"},
        {"http://host:80", "brackets"},
        {"ho st:80", "no spaces"},
        {"host\n:80", "no spaces"},
        {"a/b:80", "no spaces"},
        {"user@host:80", "no spaces"},
    };
    char longest[RK_HOST_BYTES + 10];
    struct rk_address address = {.port = 77};
    struct rk_error error = {0};
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        assert_int_equal(rk_address_parse(rows[i].text, RK_ADDRESS_LISTEN, &address, &error),
                         RK_ERR_INVALID);
        if (!strstr(error.text, rows[i].reason)) {
            fail_msg("%s: %s", rows[i].text, error.text);
        }
        assert_int_equal(address.port, 77);
    }
    memset(longest, 'h', sizeof(longest));
    memcpy(longest + RK_HOST_BYTES - 1, ":1", 3);
    assert_int_equal(rk_address_parse(longest, RK_ADDRESS_LISTEN, &address, &error), RK_OK);
    assert_int_equal(strlen(address.host), RK_HOST_BYTES - 1);
    longest[RK_HOST_BYTES - 1] = 'h';
    memcpy(longest + RK_HOST_BYTES, ":1", 3);
    assert_int_equal(rk_address_parse(longest, RK_ADDRESS_LISTEN, &address, &error),
                     RK_ERR_INVALID);
}

static void only_a_listener_may_leave_the_port_open(void **state)
{
    (void)state;
    struct rk_error error = {0};
    assert_int_equal(rk_address_check("127.0.0.1:0", RK_ADDRESS_LISTEN, &error), RK_OK);
    assert_int_equal(rk_address_check("127.0.0.1:0", RK_ADDRESS_CALL, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "from 1 to 65535"));
    /* 99999 is 34463 in 16 bits. */
    assert_int_equal(rk_address_check("127.0.0.1:99999", RK_ADDRESS_CALL, &error), RK_ERR_INVALID);
    assert_int_equal(rk_address_check("127.0.0.1:65536", RK_ADDRESS_LISTEN, &error),
                     RK_ERR_INVALID);
    assert_int_equal(rk_address_check("127.0.0.1:65535", RK_ADDRESS_CALL, &error), RK_OK);
}

static void what_is_written_reads_the_same(void **state)
{
    static const char *const rows[] = {"127.0.0.1:1", "[::1]:7000", "[fe80::1%eth0]:65535",
                                       "store-3.example:9"};
    char text[RK_ADDRESS_BYTES];
    struct rk_address address;
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        assert_int_equal(rk_address_parse(rows[i], RK_ADDRESS_CALL, &address, NULL), RK_OK);
        rk_address_format(&address, text);
        assert_string_equal(text, rows[i]);
    }
    assert_int_equal(rk_address_with_port("[::]:0", 41234, text, NULL), RK_OK);
    assert_string_equal(text, "[::]:41234");
    assert_int_equal(rk_address_with_port("junk", 41234, text, NULL), RK_ERR_INVALID);
}

static void all_interfaces_are_known_in_any_spelling(void **state)
{
    static const struct {
        const char *text;
        bool any;
    } rows[] = {
        {"0.0.0.0:1", true},           {"0:1", true},      {"[::]:1", true},
        {"[0:0:0:0:0:0:0:0]:1", true}, {"[::0]:1", true},  {"[::ffff:0.0.0.0]:1", true},
        {"127.0.0.1:1", false},        {"[::1]:1", false}, {"localhost:1", false},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct rk_address address;
        assert_int_equal(rk_address_parse(rows[i].text, RK_ADDRESS_CALL, &address, NULL), RK_OK);
        assert_int_equal(rk_address_is_any(&address), rows[i].any);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(addresses_are_read),
        cmocka_unit_test(wrong_addresses_are_refused_with_a_reason),
        cmocka_unit_test(only_a_listener_may_leave_the_port_open),
        cmocka_unit_test(what_is_written_reads_the_same),
        cmocka_unit_test(all_interfaces_are_known_in_any_spelling),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
