#include "client/kv_internal.h"

/* Protobuf wire format: tag = field << 3 | 2 for length-delimited fields. */
#define TAG_REQUEST_PAGES  ((2u << 3) | 2u)
#define TAG_CHUNK_CHECKSUM ((1u << 3) | 2u)
#define TAG_CHUNK_DATA     ((15u << 3) | 2u)

static size_t varint_bytes(uint64_t value)
{
    size_t bytes = 1;
    for (; value >= 0x80; value >>= 7) {
        bytes++;
    }
    return bytes;
}

static uint8_t *put_varint(uint8_t *at, uint64_t value)
{
    for (; value >= 0x80; value >>= 7) {
        *at++ = (uint8_t)(value | 0x80);
    }
    *at++ = (uint8_t)value;
    return at;
}

size_t rk_kv_chunk_pages(size_t page_bytes)
{
    size_t pages = RK_KV_CHUNK_BYTES / page_bytes;
    if (pages > RK_KV_CHUNK_PAGES_MAX) {
        pages = RK_KV_CHUNK_PAGES_MAX;
    }
    return pages ? pages : 1;
}

size_t rk_kv_chunk_header(const uint64_t *checksums, size_t num_pages, size_t page_bytes,
                          uint8_t *header)
{
    RK_ASSERT(num_pages > 0 && num_pages <= RK_KV_CHUNK_PAGES_MAX);
    uint64_t sums_bytes = 8 * (uint64_t)num_pages;
    uint64_t data_bytes = (uint64_t)num_pages * page_bytes;
    uint64_t chunk_bytes =
        1 + varint_bytes(sums_bytes) + sums_bytes + 1 + varint_bytes(data_bytes) + data_bytes;

    uint8_t *at = header;
    *at++ = TAG_REQUEST_PAGES;
    at = put_varint(at, chunk_bytes);
    *at++ = TAG_CHUNK_CHECKSUM;
    at = put_varint(at, sums_bytes);
    for (size_t i = 0; i < num_pages; i++) {
        for (unsigned shift = 0; shift < 64; shift += 8) { /* fixed64 is little endian */
            *at++ = (uint8_t)(checksums[i] >> shift);
        }
    }
    *at++ = TAG_CHUNK_DATA;
    at = put_varint(at, data_bytes);
    return (size_t)(at - header);
}
