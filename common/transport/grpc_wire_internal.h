/*
 * grpc_wire: the messages of redknot.v1.KvStore that carry bytes, put together and taken apart by
 * hand, so that the bytes are not copied through protobuf-c.
 */
#ifndef RK_COMMON_TRANSPORT_GRPC_WIRE_INTERNAL_H
#define RK_COMMON_TRANSPORT_GRPC_WIRE_INTERNAL_H

#include "common/transport/wire_internal.h"

#define GRPC_CHUNK_HEADER_BYTES (36 + 8 * WIRE_FRAME_SUMS_MAX)

/* PutRequest{chunk{checksums, data}} up to the bytes of data. Returns its length. */
size_t grpc_chunk_header(const uint64_t *checksums, size_t num_checksums, size_t data_bytes,
                         uint8_t *ret_header);
/* PutRequest{items}, from packed PutItem's. */
void grpc_items_append(struct wire_buffer *buffer, const struct rk_put *puts, size_t num_puts);

/* One GetReply{data} that comes in pieces. Zeroed: at its beginning. */
struct grpc_data_reader {
    uint32_t header_bytes; /* read so far */
    bool header_done;
    uint64_t bytes; /* of data, as announced */
    uint64_t done;
};
/* The bytes of data in the next piece. False: another message, or lengths that disagree. */
bool grpc_data_read(struct grpc_data_reader *reader, const uint8_t *piece, size_t piece_bytes,
                    const uint8_t **ret_data, size_t *ret_bytes);

#endif
