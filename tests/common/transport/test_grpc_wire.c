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

static void data_is_read_in_any_pieces(void **state)
{
    static uint8_t data[300];
    uint8_t message[400];
    Redknot__V1__GetReply reply = REDKNOT__V1__GET_REPLY__INIT;
    (void)state;
    for (size_t i = 0; i < sizeof(data); i++) {
        data[i] = (uint8_t)(i * 7);
    }
    reply.part_case = REDKNOT__V1__GET_REPLY__PART_DATA;
    reply.data = (ProtobufCBinaryData){sizeof(data), data};
    size_t bytes = redknot__v1__get_reply__pack(&reply, message);
    for (size_t piece = 1; piece <= bytes; piece++) {
        struct grpc_data_reader reader = {.done = 0};
        uint8_t got[400];
        size_t done = 0;
        for (size_t at = 0; at < bytes; at += piece) {
            const uint8_t *part = NULL;
            size_t count = 0;
            size_t length = bytes - at < piece ? bytes - at : piece;
            assert_true(grpc_data_read(&reader, message + at, length, &part, &count));
            memcpy(got + done, part, count);
            done += count;
        }
        assert_int_equal(done, sizeof(data));
        assert_int_equal(reader.bytes, sizeof(data));
        assert_memory_equal(got, data, sizeof(data));
    }
    struct grpc_data_reader reader = {.done = 0};
    const uint8_t *part = NULL;
    size_t count = 0;
    message[0] ^= 1; /* Another field. */
    assert_false(grpc_data_read(&reader, message, bytes, &part, &count));
    message[0] ^= 1;
    message[1]--; /* One byte fewer than there are. */
    reader = (struct grpc_data_reader){.done = 0};
    assert_false(grpc_data_read(&reader, message, bytes, &part, &count));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(chunks_are_what_protobuf_reads),
                                       cmocka_unit_test(items_are_what_protobuf_reads),
                                       cmocka_unit_test(data_is_read_in_any_pieces)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
