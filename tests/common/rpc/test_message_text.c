/*
 * Goal:   a string that protobuf-c would cut at a NUL, or that is not UTF-8, is refused with a
 *         sentence, in every message and at every depth, and so is what would unpack to gigabytes;
 *         everything else passes.
 * Method: messages packed by hand, given to the check alone and to a server's handler.
 */
#include "redknot/v1/coordinator.pb-c.h"
#include "redknot/v1/kvstore.pb-c.h"
#include "redknot/v1/worker.pb-c.h"
#include "tests/common/rpc/echo_service.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LONG_MS 30000

/* A message around bytes: field number below 16, less than 128 bytes. */
static size_t wrap(uint8_t *bytes, size_t count, unsigned field)
{
    memmove(bytes + 2, bytes, count);
    bytes[0] = (uint8_t)(field << 3 | 2);
    bytes[1] = (uint8_t)count;
    return count + 2;
}

static enum rk_status check(const void *text, size_t bytes, struct rk_error *error)
{
    uint8_t packed[128];
    memcpy(packed, text, bytes);
    size_t count = wrap(packed, bytes, 1);
    return rk_rpc_message_check_text(packed, count, &redknot__v1__tokenize_request__descriptor,
                                     error);
}

static void text_passes(void **state)
{
    (void)state;
    static const char *const texts[] = {"", "plain\n\ttext\x7f",
                                        "\xC2\x80\xDF\xBF\xE0\xA0\x80\xED\x9F\xBF\xEE\x80\x80",
                                        "\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF"};
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        assert_int_equal(check(texts[i], strlen(texts[i]), NULL), RK_OK);
    }
}

static void nul_is_refused_wherever_it_is(void **state)
{
    (void)state;
    static const char text[] = "a\0b";
    struct rk_error error = {.text = ""};
    for (size_t begin = 0; begin < 3; begin++) {
        for (size_t end = begin; end <= 3; end++) {
            bool has = begin <= 1 && end > 1;
            assert_int_equal(check(text + begin, end - begin, &error),
                             has ? RK_ERR_INVALID : RK_OK);
        }
    }
    assert_int_equal(check(text, 3, &error), RK_ERR_INVALID);
    assert_string_equal(error.text, "text of TokenizeRequest has a NUL character (U+0000) at byte "
                                    "1: text cannot hold one; leave it out");
}

static void what_is_no_utf8_is_refused(void **state)
{
    (void)state;
    static const char *const texts[] = {"\x80",
                                        "\xC0\x80",
                                        "\xC1\xBF",
                                        "\xC3",
                                        "\xC3(",
                                        "\xE0\x9F\xBF",
                                        "\xED\xA0\x80",
                                        "\xE2\x82",
                                        "\xF0\x8F\xBF\xBF",
                                        "\xF5",
                                        "\xF4\x90\x80\x80",
                                        "\xF0\x9F\x98"};
    struct rk_error error = {.text = ""};
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        assert_int_equal(check(texts[i], strlen(texts[i]), &error), RK_ERR_INVALID);
        assert_non_null(strstr(error.text, "not UTF-8"));
    }
}

/* bytes fields may hold anything; strings in messages inside are seen. */
static void messages_inside_are_walked(void **state)
{
    (void)state;
    uint8_t packed[64] = "x\0y";
    struct rk_error error = {.text = ""};
    size_t count = wrap(packed, 3, 4); /* SegmentInput.label */
    count = wrap(packed, count, 2);    /* GenerateRequest.prompt */
    assert_int_equal(rk_rpc_message_check_text(packed, count,
                                               &redknot__v1__generate_request__descriptor, &error),
                     RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "label of SegmentInput"));

    memcpy(packed, "x\0y", 3);
    count = wrap(packed, 3, 3); /* SegmentInput.segment_id */
    count = wrap(packed, count, 2);
    assert_int_equal(rk_rpc_message_check_text(packed, count,
                                               &redknot__v1__generate_request__descriptor, &error),
                     RK_OK);
}

static void cut_messages_are_refused(void **state)
{
    (void)state;
    static const uint8_t whole[] = {0x0a, 2, 'a', 'b', 0x10, 1};
    static const uint8_t endless[] = {0x80, 0x80, 0x80, 0x80, 0x80, 0x80,
                                      0x80, 0x80, 0x80, 0x80, 0x80};
    const struct ProtobufCMessageDescriptor *type = &redknot__v1__tokenize_request__descriptor;
    for (size_t count = 0; count <= sizeof(whole); count++) {
        bool sound = count == 0 || count == 4 || count == sizeof(whole);
        assert_int_equal(rk_rpc_message_check_text(whole, count, type, NULL),
                         sound ? RK_OK : RK_ERR_INVALID);
    }
    assert_int_equal(rk_rpc_message_check_text(endless, sizeof(endless), type, NULL),
                     RK_ERR_INVALID);
}

static void release_nothing(void *context)
{
    (void)context;
}

/* What a client of another language sends, at a real server. */
static void a_call_with_a_nul_ends_with_a_sentence(void **state)
{
    (void)state;
    static const uint8_t bad[] = {0x0a, 3, 'a', 0, 'b'};
    struct echo_service service = {0};
    struct rk_rpc_server_options options = {.address = "127.0.0.1:0", .calls_max = 4};
    struct rk_rpc_server *server = NULL;
    struct rk_rpc_channel *channel = NULL;
    struct rk_rpc_stream *stream = NULL;
    struct rk_rpc_part part = {.data = bad, .bytes = sizeof(bad)};
    struct ProtobufCMessage *message = NULL;
    struct rk_error error = {.text = ""};
    char address[64];
    assert_int_equal(rk_rpc_server_create(&options, &server, &error), RK_OK);
    assert_int_equal(
        rk_rpc_server_add_service(server, ECHO_SERVICE, echo_methods, echo_num_methods, &service),
        RK_OK);
    assert_int_equal(rk_rpc_server_start(server), RK_OK);
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", rk_rpc_server_port(server));
    assert_int_equal(rk_rpc_channel_create(address, &channel, &error), RK_OK);
    assert_int_equal(rk_rpc_stream_open(channel, ECHO_BIDI, LONG_MS, &stream, &error), RK_OK);
    assert_int_equal(rk_rpc_stream_send_parts(stream, &part, 1, release_nothing, NULL), RK_OK);
    assert_int_equal(rk_rpc_stream_recv(stream, &redknot__v1__tokenize_reply__descriptor, &message),
                     RK_ERR_NOT_FOUND);
    assert_int_equal(rk_rpc_stream_finish(stream, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "NUL character"));
    rk_rpc_stream_destroy(stream);
    rk_rpc_channel_destroy(channel);
    rk_rpc_server_destroy(server);
}

/* What takes two bytes on the wire and a hundred and more in memory. */
static void millions_of_small_things_are_refused(void **state)
{
    enum { BYTES = 60 << 20, HEAD = 8 };
    static const struct {
        const ProtobufCMessageDescriptor *type;
        uint8_t pair[2];
        bool inside; /* of field 1 */
    } rows[] = {
        {&redknot__v1__announce_request__descriptor, {3 << 3 | 2, 0}, false},
        {&redknot__v1__heartbeat_request__descriptor, {4 << 3 | 2, 0}, false},
        {&redknot__v1__put_request__descriptor, {1 << 3 | 2, 0}, true},
        {&redknot__v1__locate_request__descriptor, {1 << 3 | 2, 0}, false}, /* bytes */
        {&redknot__v1__heartbeat_request__descriptor, {15 << 3, 0}, false}, /* no field of it */
        {&redknot__v1__heartbeat_request__descriptor,
         {2 << 3, 0},
         false}, /* one, again and again */
    };
    (void)state;
    uint8_t *packed = malloc(BYTES);
    assert_non_null(packed);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct rk_error error = {.text = ""};
        size_t begin = rows[i].inside ? HEAD : 0;
        size_t bytes = BYTES - begin;
        for (size_t at = begin; at < BYTES; at += 2) {
            memcpy(packed + at, rows[i].pair, 2);
        }
        if (rows[i].inside) { /* tag, and the length in seven bytes */
            packed[0] = 1 << 3 | 2;
            for (int j = 0; j < 7; j++) {
                packed[1 + j] = (uint8_t)((bytes >> (7 * j) & 0x7f) | (j < 6 ? 0x80 : 0));
            }
        }
        assert_int_equal(rk_rpc_message_check_text(packed, BYTES, rows[i].type, &error),
                         RK_ERR_TOO_LONG);
        assert_non_null(strstr(error.text, "send less at once"));
    }
    free(packed);
}

static void what_is_legal_is_not(void **state)
{
    enum { IDS = 4 << 20, SHARDS = 4096 };
    (void)state;
    Redknot__V1__PlaceRequest place = REDKNOT__V1__PLACE_REQUEST__INIT;
    place.n_token_ids = IDS;
    place.token_ids = calloc(IDS, sizeof(*place.token_ids)); /* a byte each on the wire */
    Redknot__V1__Shard shard = REDKNOT__V1__SHARD__INIT;
    Redknot__V1__Shard *shards[SHARDS];
    uint8_t id[32] = {1};
    shard.segment_id = (ProtobufCBinaryData){sizeof(id), id};
    shard.generation = UINT64_MAX;
    for (int i = 0; i < SHARDS; i++) {
        shards[i] = &shard;
    }
    Redknot__V1__HeartbeatRequest heartbeat = REDKNOT__V1__HEARTBEAT_REQUEST__INIT;
    heartbeat.n_removed = SHARDS;
    heartbeat.removed = shards;
    const ProtobufCMessage *messages[] = {&place.base, &heartbeat.base};
    for (size_t i = 0; i < 2; i++) {
        uint8_t *packed = malloc(protobuf_c_message_get_packed_size(messages[i]));
        size_t bytes = protobuf_c_message_pack(messages[i], packed);
        assert_int_equal(rk_rpc_message_check_text(packed, bytes, messages[i]->descriptor, NULL),
                         RK_OK);
        free(packed);
    }
    free(place.token_ids);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_passes),
        cmocka_unit_test(nul_is_refused_wherever_it_is),
        cmocka_unit_test(what_is_no_utf8_is_refused),
        cmocka_unit_test(messages_inside_are_walked),
        cmocka_unit_test(cut_messages_are_refused),
        cmocka_unit_test(a_call_with_a_nul_ends_with_a_sentence),
        cmocka_unit_test(millions_of_small_things_are_refused),
        cmocka_unit_test(what_is_legal_is_not),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
