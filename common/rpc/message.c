#include "common/base/alloc.h"
#include "common/rpc/rpc_internal.h"

#include <grpc/byte_buffer_reader.h>
#include <protobuf-c/protobuf-c.h>
#include <string.h>

static void *message_alloc(void *context, size_t bytes)
{
    bool *out_of_memory = context;
    void *block = rk_alloc(bytes > 0 ? bytes : 1);
    if (!block) {
        *out_of_memory = true;
    }
    return block;
}

static void message_free(void *context, void *block)
{
    (void)context;
    rk_free(block);
}

enum rk_status rk_rpc_message_unpack(const void *data, size_t bytes,
                                     const struct ProtobufCMessageDescriptor *type,
                                     struct ProtobufCMessage **ret_message)
{
    /* protobuf-c answers NULL for both, and a caller must tell them apart. */
    bool out_of_memory = false;
    ProtobufCAllocator allocator = {message_alloc, message_free, &out_of_memory};
    struct ProtobufCMessage *message = protobuf_c_message_unpack(type, &allocator, bytes, data);
    if (!message) {
        return out_of_memory ? RK_ERR_NO_MEMORY : RK_ERR_INVALID;
    }
    *ret_message = message;
    return RK_OK;
}

void rk_rpc_message_free(struct ProtobufCMessage *message)
{
    if (message) {
        ProtobufCAllocator allocator = {message_alloc, message_free, NULL};
        protobuf_c_message_free_unpacked(message, &allocator);
    }
}

static enum rk_status scratch_reserve(struct rpc_scratch *scratch, size_t bytes)
{
    if (bytes <= scratch->bytes) {
        return RK_OK;
    }
    rk_free(scratch->data); /* Nothing in it is worth a copy. */
    scratch->bytes = 0;
    scratch->data = rk_alloc(bytes);
    if (!scratch->data) {
        return RK_ERR_NO_MEMORY;
    }
    scratch->bytes = bytes;
    return RK_OK;
}

static enum rk_status message_join(grpc_byte_buffer_reader *reader, grpc_slice first, size_t bytes,
                                   struct rpc_scratch *scratch)
{
    enum rk_status status = scratch_reserve(scratch, bytes);
    grpc_slice slice = first;
    size_t used = 0;
    bool more = true;
    while (status == RK_OK && more) {
        size_t length = GRPC_SLICE_LENGTH(slice);
        if (length > bytes - used) {
            status = RK_ERR_INVALID;
            break;
        }
        memcpy(scratch->data + used, GRPC_SLICE_START_PTR(slice), length);
        used += length;
        grpc_slice_unref(slice);
        slice = grpc_empty_slice();
        more = grpc_byte_buffer_reader_next(reader, &slice) != 0;
    }
    grpc_slice_unref(slice);
    return status == RK_OK && used != bytes ? RK_ERR_INVALID : status;
}

static enum rk_status message_take(const void *data, size_t bytes,
                                   const struct ProtobufCMessageDescriptor *type,
                                   struct ProtobufCMessage **ret_message, struct rk_error *refusal)
{
    enum rk_status status = refusal ? rk_rpc_message_check_text(data, bytes, type, refusal) : RK_OK;
    return status == RK_OK ? rk_rpc_message_unpack(data, bytes, type, ret_message) : status;
}

enum rk_status rpc_message_unpack(grpc_byte_buffer *buffer,
                                  const struct ProtobufCMessageDescriptor *type,
                                  struct rpc_scratch *scratch,
                                  struct ProtobufCMessage **ret_message, struct rk_error *refusal)
{
    static const uint8_t nothing[1];
    size_t bytes = grpc_byte_buffer_length(buffer);
    if (bytes > RK_RPC_MESSAGE_BYTES_MAX) {
        return RK_ERR_TOO_LONG;
    }
    if (bytes == 0) {
        return rk_rpc_message_unpack(nothing, 0, type, ret_message);
    }
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer)) {
        return RK_ERR_INVALID;
    }
    enum rk_status status = RK_ERR_INVALID;
    grpc_slice slice;
    if (grpc_byte_buffer_reader_next(&reader, &slice)) {
        if (GRPC_SLICE_LENGTH(slice) == bytes) {
            status = message_take(GRPC_SLICE_START_PTR(slice), bytes, type, ret_message, refusal);
            grpc_slice_unref(slice);
        } else {
            status = message_join(&reader, slice, bytes, scratch);
            if (status == RK_OK) {
                status = message_take(scratch->data, bytes, type, ret_message, refusal);
            }
        }
    }
    grpc_byte_buffer_reader_destroy(&reader);
    return status;
}

enum rk_status rpc_message_pack(const struct ProtobufCMessage *message,
                                grpc_byte_buffer **ret_buffer)
{
    size_t bytes = protobuf_c_message_get_packed_size(message);
    if (bytes > RK_RPC_MESSAGE_BYTES_MAX) {
        return RK_ERR_TOO_LONG;
    }
    uint8_t *data = rk_alloc(bytes > 0 ? bytes : 1);
    if (!data) {
        return RK_ERR_NO_MEMORY;
    }
    (void)protobuf_c_message_pack(message, data);
    grpc_slice slice = grpc_slice_new(data, bytes, rk_free);
    *ret_buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return RK_OK;
}

/* Shared by the slices of one message; the last one to go releases the parts. */
struct parts_lease {
    atomic_size_t refs;
    void (*release)(void *release_context);
    void *release_context;
};

static void parts_unref(void *context)
{
    struct parts_lease *lease = context;
    /* Release orders our uses before the count; acquire orders the owner's after all of them. */
    if (atomic_fetch_sub_explicit(&lease->refs, 1, memory_order_acq_rel) == 1) {
        lease->release(lease->release_context);
        rk_free(lease);
    }
}

enum rk_status rpc_parts_pack(const struct rk_rpc_part *parts, size_t num_parts,
                              void (*release)(void *release_context), void *release_context,
                              grpc_byte_buffer **ret_buffer)
{
    enum rk_status status = RK_OK;
    size_t bytes = 0;
    for (size_t i = 0; i < num_parts; i++) {
        if (parts[i].bytes > RK_RPC_MESSAGE_BYTES_MAX - bytes) {
            status = RK_ERR_TOO_LONG;
            break;
        }
        bytes += parts[i].bytes;
    }
    struct parts_lease *lease = NULL;
    grpc_slice *slices = NULL;
    if (status == RK_OK) {
        lease = rk_alloc_zero(1, sizeof(*lease));
        slices = rk_alloc_zero(num_parts + 1, sizeof(*slices));
        status = lease && slices ? RK_OK : RK_ERR_NO_MEMORY;
    }
    if (status != RK_OK) {
        rk_free(lease);
        rk_free(slices);
        release(release_context);
        return status;
    }
    lease->release = release;
    lease->release_context = release_context;
    atomic_init(&lease->refs, num_parts + 1); /* One is ours until the end. */
    for (size_t i = 0; i < num_parts; i++) {
        /* gRPC only reads what it sends. */
        slices[i] = grpc_slice_new_with_user_data((void *)(uintptr_t)parts[i].data, parts[i].bytes,
                                                  parts_unref, lease);
    }
    *ret_buffer = grpc_raw_byte_buffer_create(slices, num_parts);
    for (size_t i = 0; i < num_parts; i++) {
        grpc_slice_unref(slices[i]);
    }
    rk_free(slices);
    parts_unref(lease);
    return RK_OK;
}
