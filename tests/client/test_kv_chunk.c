/*
 * Goal:   the hand-built message of a run of pages is what protobuf-c reads
 *         back, for every size at which a varint grows.
 * Method: build the header, put the pages behind it, unpack with the generated
 *         code and compare every field.
 */
#include "client/kv_internal.h"
#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static void check(size_t num_pages, size_t page_bytes)
{
    uint64_t checksums[RK_KV_CHUNK_PAGES_MAX];
    uint8_t header[RK_KV_CHUNK_HEADER_BYTES];
    for (size_t i = 0; i < num_pages; i++) {
        checksums[i] = UINT64_C(0x0123456789abcdef) * (i + 1);
    }
    size_t header_bytes = rk_kv_chunk_header(checksums, num_pages, page_bytes, header);
    assert_true(header_bytes <= sizeof(header));

    size_t data_bytes = num_pages * page_bytes;
    uint8_t *message = rk_alloc(header_bytes + data_bytes);
    assert_non_null(message);
    memcpy(message, header, header_bytes);
    for (size_t i = 0; i < data_bytes; i++) {
        message[header_bytes + i] = (uint8_t)(i * 31 + i / 256);
    }
    Redknot__V1__PutShardRequest *request =
        redknot__v1__put_shard_request__unpack(NULL, header_bytes + data_bytes, message);
    assert_non_null(request);
    assert_int_equal(request->part_case, REDKNOT__V1__PUT_SHARD_REQUEST__PART_PAGES);
    assert_int_equal(request->pages->n_checksums, num_pages);
    assert_memory_equal(request->pages->checksums, checksums, 8 * num_pages);
    assert_int_equal(request->pages->data.len, data_bytes);
    assert_memory_equal(request->pages->data.data, message + header_bytes, data_bytes);
    assert_null(request->base.unknown_fields);
    redknot__v1__put_shard_request__free_unpacked(request, NULL);
    rk_free(message);
}

static void round_trips(void **state)
{
    (void)state;
    check(1, 1);
    check(1, 127);
    check(1, 128);
    check(15, 8); /* 120 bytes of checksums: a varint of one byte */
    check(16, 8); /* 128: of two */
    check(64, 16384);
    check(RK_KV_CHUNK_PAGES_MAX, 256);
    check(RK_KV_CHUNK_PAGES_MAX, 4096);
}

static void chunks_are_bounded(void **state)
{
    (void)state;
    for (size_t page_bytes = 256; page_bytes <= (8u << 20); page_bytes *= 2) {
        size_t pages = rk_kv_chunk_pages(page_bytes);
        assert_in_range(pages, 1, RK_KV_CHUNK_PAGES_MAX);
        assert_true(pages == 1 || pages * page_bytes <= RK_KV_CHUNK_BYTES);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(round_trips),
                                       cmocka_unit_test(chunks_are_bounded)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
