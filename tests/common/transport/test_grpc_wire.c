/*
 * Goal:   the hand-built messages are what protobuf-c reads back, for every size at which a varint
 *         grows, and a GetReply that protobuf-c packed is read in any pieces.
 * Method: pack by one, unpack by the other, and compare every field.
 */
#include "common/transport/grpc_wire_internal.h"
#include "redknot/v1/kvstore.pb-c.h"

#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static void check_chunk(size_t num_checksums, size_t data_bytes)
{
    uint64_t checksums[WIRE_FRAME_SUMS_MAX];
    uint8_t header[GRPC_CHUNK_HEADER_BYTES];
    for (size_t i = 0; i < num_checksums; i++) {
        checksums[i] = UINT64_C(0x0123456789abcdef) * (i + 1);
    }
    size_t header_bytes = grpc_chunk_header(checksums, num_checksums, data_bytes, header);
    assert_true(header_bytes <= sizeof(header));

    uint8_t *message = rk_alloc(header_bytes + data_bytes);
    assert_non_null(message);
    memcpy(message, header, header_bytes);
    for (size_t i = 0; i < data_bytes; i++) {
        message[header_bytes + i] = (uint8_t)(i * 31 + i / 256);
    }
    Redknot__V1__PutRequest *request =
        redknot__v1__put_request__unpack(NULL, header_bytes + data_bytes, message);
    assert_non_null(request);
    assert_int_equal(request->part_case, REDKNOT__V1__PUT_REQUEST__PART_CHUNK);
    assert_int_equal(request->chunk->n_checksums, num_checksums);
    if (num_checksums > 0) {
        assert_memory_equal(request->chunk->checksums, checksums, 8 * num_checksums);
    }
    assert_int_equal(request->chunk->data.len, data_bytes);
    assert_memory_equal(request->chunk->data.data, message + header_bytes, data_bytes);
    assert_null(request->base.unknown_fields);
    redknot__v1__put_request__free_unpacked(request, NULL);
    rk_free(message);
}

static void chunks_are_what_protobuf_reads(void **state)
{
    (void)state;
    check_chunk(0, 100);
    check_chunk(1, 1);
    check_chunk(1, 127);
    check_chunk(1, 128);
    check_chunk(15, 120); /* 120 bytes of checksums: a varint of one byte */
    check_chunk(16, 128); /* 128: of two */
    check_chunk(64, 1048576);
    check_chunk(WIRE_FRAME_SUMS_MAX, 65536);
}

static void items_are_what_protobuf_reads(void **state)
{
    uint8_t key[200] = {1, 2, 3};
    uint8_t heads[2][256];
    struct rk_put puts[2];
    struct wire_buffer buffer = {.bytes = 0};
    (void)state;
    for (int i = 0; i < 2; i++) {
        Redknot__V1__PutValue value = REDKNOT__V1__PUT_VALUE__INIT;
        Redknot__V1__PutItem item = REDKNOT__V1__PUT_ITEM__INIT;
        value.key = (ProtobufCBinaryData){i ? 200 : 3, key};
        value.bytes = 1000 + (unsigned)i;
        item.what_case = REDKNOT__V1__PUT_ITEM__WHAT_VALUE;
        item.value = &value;
        puts[i] = (struct rk_put){.head = heads[i],
                                  .head_bytes = redknot__v1__put_item__pack(&item, heads[i])};
    }
    grpc_items_append(&buffer, puts, 2);
    Redknot__V1__PutRequest *request =
        redknot__v1__put_request__unpack(NULL, buffer.bytes, buffer.data);
    assert_non_null(request);
    assert_int_equal(request->part_case, REDKNOT__V1__PUT_REQUEST__PART_ITEMS);
    assert_int_equal(request->items->n_items, 2);
    assert_int_equal(request->items->items[1]->value->key.len, 200);
    assert_int_equal(request->items->items[1]->value->bytes, 1001);
    redknot__v1__put_request__free_unpacked(request, NULL);
    rk_free(buffer.data);
}

static size_t reply_pack(uint8_t *data, size_t data_bytes, uint8_t *ret_message)
{
    char ok[] = "OK";
    char empty[] = "";
    Redknot__V1__GetReply reply = REDKNOT__V1__GET_REPLY__INIT;
    Redknot__V1__GetReply__Item item = REDKNOT__V1__GET_REPLY__ITEM__INIT;
    Redknot__V1__GetReply__Item *pointer = &item;
    Redknot__V1__GetReply__Found found = REDKNOT__V1__GET_REPLY__FOUND__INIT;
    item.status = ok;
    item.error = empty;
    item.bytes = data_bytes;
    found.n_items = 1;
    found.items = &pointer;
    reply.found = &found;
    reply.data = (ProtobufCBinaryData){data_bytes, data};
    return redknot__v1__get_reply__pack(&reply, ret_message);
}

static bool reply_read(const uint8_t *message, size_t bytes, size_t piece, uint8_t *ret_data,
                       size_t *ret_data_bytes, struct wire_buffer *found)
{
    struct grpc_reply_reader reader = {.found = found};
    size_t done = 0;
    found->bytes = 0;
    for (size_t at = 0; at < bytes; at += piece) {
        const uint8_t *from = message + at;
        size_t left = bytes - at < piece ? bytes - at : piece;
        while (left > 0) {
            const uint8_t *part = NULL;
            size_t count = 0;
            if (!grpc_reply_read(&reader, &from, &left, &part, &count)) {
                return false;
            }
            memcpy(ret_data + done, part, count);
            done += count;
        }
    }
    *ret_data_bytes = done;
    return reader.found_whole && grpc_reply_whole(&reader);
}

static void a_reply_is_read_in_any_pieces(void **state)
{
    static uint8_t data[300];
    uint8_t message[400];
    uint8_t got[400];
    size_t got_bytes = 0;
    struct wire_buffer found = {.bytes = 0};
    (void)state;
    for (size_t i = 0; i < sizeof(data); i++) {
        data[i] = (uint8_t)(i * 7);
    }
    size_t bytes = reply_pack(data, sizeof(data), message);
    for (size_t piece = 1; piece <= bytes; piece++) {
        assert_true(reply_read(message, bytes, piece, got, &got_bytes, &found));
        assert_int_equal(got_bytes, sizeof(data));
        assert_memory_equal(got, data, sizeof(data));
        ProtobufCMessage *unpacked = protobuf_c_message_unpack(
            &redknot__v1__get_reply__found__descriptor, NULL, found.bytes, found.data);
        assert_non_null(unpacked);
        assert_int_equal(
            ((const Redknot__V1__GetReply__Found *)(const void *)unpacked)->items[0]->bytes,
            sizeof(data));
        protobuf_c_message_free_unpacked(unpacked, NULL);
    }
    assert_false(reply_read(message, bytes - 1, 50, got, &got_bytes, &found)); /* Cut off. */
    message[0] ^= 8;                                                           /* Another field. */
    assert_false(reply_read(message, bytes, 50, got, &got_bytes, &found));
    message[0] ^= 8;
    message[1]--; /* Of found one byte less than there is. */
    assert_false(reply_read(message, bytes, 50, got, &got_bytes, &found));
    rk_free(found.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(chunks_are_what_protobuf_reads),
                                       cmocka_unit_test(items_are_what_protobuf_reads),
                                       cmocka_unit_test(a_reply_is_read_in_any_pieces)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
