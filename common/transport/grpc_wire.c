#include "common/transport/grpc_wire_internal.h"

#include <string.h>

/* Protobuf wire format: tag = field << 3 | 2 for length-delimited fields. */
#define TAG(field) ((uint8_t)((field) << 3 | 2u))

enum {
    ITEMS = 1,
    ITEMS_ITEM = 1,
    CHUNK = 2,
    CHUNK_CHECKSUMS = 1,
    CHUNK_DATA = 15,
    REPLY_FOUND = 1,
    REPLY_DATA = 15
};

static size_t varint_bytes(uint64_t value)
{
    size_t bytes = 1;
    for (; value >= 0x80; value >>= 7) {
        bytes++;
    }
    return bytes;
}

static size_t field_put(uint8_t *at, unsigned field, uint64_t bytes)
{
    size_t count = 0;
    at[count++] = TAG(field);
    for (; bytes >= 0x80; bytes >>= 7) {
        at[count++] = (uint8_t)(bytes | 0x80);
    }
    at[count++] = (uint8_t)bytes;
    return count;
}

size_t grpc_chunk_header(const uint64_t *checksums, size_t num_checksums, size_t data_bytes,
                         uint8_t *ret_header)
{
    RK_ASSERT(num_checksums <= WIRE_FRAME_SUMS_MAX);
    uint64_t sums_bytes = num_checksums * sizeof(uint64_t);
    uint64_t sums_field = sums_bytes > 0 ? 1 + varint_bytes(sums_bytes) + sums_bytes : 0;
    uint8_t *at = ret_header;
    at += field_put(at, CHUNK, sums_field + 1 + varint_bytes(data_bytes) + data_bytes);
    if (sums_bytes > 0) {
        at += field_put(at, CHUNK_CHECKSUMS, sums_bytes);
        memcpy(at, checksums, sums_bytes); /* fixed64 is little endian, as we are */
        at += sums_bytes;
    }
    at += field_put(at, CHUNK_DATA, data_bytes);
    return (size_t)(at - ret_header);
}

void grpc_items_append(struct wire_buffer *buffer, const struct rk_put *puts, size_t num_puts)
{
    uint8_t field[16];
    uint64_t bytes = 0;
    for (size_t i = 0; i < num_puts; i++) {
        bytes += 1 + varint_bytes(puts[i].head_bytes) + puts[i].head_bytes;
    }
    (void)wire_append(buffer, field, field_put(field, ITEMS, bytes));
    for (size_t i = 0; i < num_puts; i++) {
        (void)wire_append(buffer, field, field_put(field, ITEMS_ITEM, puts[i].head_bytes));
        (void)wire_append(buffer, puts[i].head, puts[i].head_bytes);
    }
}

/* One byte of a field's tag or length. */
static bool header_read(struct grpc_reply_reader *reader, uint8_t byte)
{
    uint32_t at = reader->header_bytes++;
    if (at == 0) {
        reader->tag = byte;
        reader->field_bytes = 0;
        return byte == TAG(REPLY_DATA) || (byte == TAG(REPLY_FOUND) && !reader->found_whole);
    }
    if (at > 5) { /* No message is that long. */
        return false;
    }
    reader->field_bytes |= (uint64_t)(byte & 0x7f) << (7 * (at - 1));
    reader->in_field = (byte & 0x80) == 0;
    return true;
}

static void field_end(struct grpc_reply_reader *reader)
{
    reader->in_field = false;
    reader->header_bytes = 0;
    reader->found_whole = reader->found_whole || reader->tag == TAG(REPLY_FOUND);
}

bool grpc_reply_read(struct grpc_reply_reader *reader, const uint8_t **piece, size_t *piece_bytes,
                     const uint8_t **ret_data, size_t *ret_bytes)
{
    *ret_data = *piece;
    *ret_bytes = 0;
    while (*piece_bytes > 0 && !reader->in_field) {
        if (!header_read(reader, **piece)) {
            return false;
        }
        (*piece)++;
        (*piece_bytes)--;
    }
    if (!reader->in_field) {
        return true;
    }
    size_t count = reader->field_bytes < *piece_bytes ? (size_t)reader->field_bytes : *piece_bytes;
    if (reader->tag == TAG(REPLY_DATA)) {
        *ret_data = *piece;
        *ret_bytes = count;
    } else {
        (void)wire_append(reader->found, *piece, count);
    }
    *piece += count;
    *piece_bytes -= count;
    reader->field_bytes -= count;
    if (reader->field_bytes == 0) {
        field_end(reader);
    }
    return !reader->found->failed;
}

bool grpc_reply_whole(const struct grpc_reply_reader *reader)
{
    return reader->header_bytes == 0;
}
