/*
 * Goal:   every status has a code and comes back from code and trailer; names of
 *         newer peers and text from outside do no harm.
 * Method: all statuses; trailers made by hand; texts with every kind of bad byte.
 */
#include "common/base/text.h"
#include "common/rpc/rpc_internal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static enum rk_status from_wire(grpc_status_code code, const char *name, const char *message)
{
    bool from_peer = false;
    grpc_metadata entry = {.key = grpc_slice_from_static_string(RPC_STATUS_KEY),
                           .value = grpc_slice_from_static_string(name)};
    grpc_metadata_array trailer = {.count = name[0] != '\0', .capacity = 1, .metadata = &entry};
    return rpc_status_from_wire(code, &trailer, message, &from_peer);
}

static void statuses_come_back(void **state)
{
    (void)state;
    for (int i = 0; i < RK_STATUS_COUNT; i++) {
        enum rk_status status = (enum rk_status)i;
        grpc_status_code code = rpc_status_to_code(status);
        assert_int_equal(code == GRPC_STATUS_OK, status == RK_OK);
        assert_int_equal(from_wire(code, rk_status_name(status), ""), status);
    }
}

static void codes_alone_say_something(void **state)
{
    (void)state;
    assert_int_equal(from_wire(GRPC_STATUS_OK, "NOT_FOUND", ""), RK_OK);
    for (int code = 1; code <= 16; code++) {
        assert_int_not_equal(from_wire((grpc_status_code)code, "", ""), RK_OK);
        /* A peer that contradicts itself has not succeeded. */
        assert_int_not_equal(from_wire((grpc_status_code)code, "OK", ""), RK_OK);
    }
    assert_int_equal(from_wire(GRPC_STATUS_UNAVAILABLE, "FROM_THE_FUTURE", ""), RK_ERR_UNAVAILABLE);
    assert_int_equal(from_wire(GRPC_STATUS_RESOURCE_EXHAUSTED, "", "full"), RK_ERR_FULL);
    assert_int_equal(
        from_wire(GRPC_STATUS_RESOURCE_EXHAUSTED, "", "Received message larger than max (5 vs. 4)"),
        RK_ERR_TOO_LONG);
}

static void text_becomes_valid(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"plain", "plain"},
        {"caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80", "caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"},
        {"line\nbreak\x7f\x01", "line?break??"},
        {"cut \xe2\x82", "cut ??"},
        {"\xff\xc0\x80", "???"},
        {"\xed\xa0\x80", "???"},
        {"\xf4\x90\x80\x80", "????"},
        {"\xe0\x80\x80", "???"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        char text[64];
        (void)snprintf(text, sizeof(text), "%s", rows[i][0]);
        rk_text_clean(text);
        assert_string_equal(text, rows[i][1]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(statuses_come_back),
        cmocka_unit_test(codes_alone_say_something),
        cmocka_unit_test(text_becomes_valid),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
