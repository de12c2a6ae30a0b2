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

/* A GetReply that comes in pieces: found, if it is the first one, then data. Zeroed but for found
 * at its beginning. */
struct grpc_reply_reader {
    uint32_t header_bytes; /* of the field under way: tag and length read so far */
    bool in_field;
    uint8_t tag;
    uint64_t field_bytes; /* to come */
    struct wire_buffer *found;
    bool found_whole;
};
/* Takes from *piece what there is of one field; *ret_bytes of it are data, at *ret_data. Call until
 * *piece_bytes is 0. False: another message, lengths that disagree, or out of memory. */
bool grpc_reply_read(struct grpc_reply_reader *reader, const uint8_t **piece, size_t *piece_bytes,
                     const uint8_t **ret_data, size_t *ret_bytes);
/* A message may end here. */
bool grpc_reply_whole(const struct grpc_reply_reader *reader);

#endif
