#include "common/rpc/origin_message.h"

#include <string.h>

static ProtobufCBinaryData borrow(const uint8_t *data, size_t bytes)
{
    /* protobuf-c has no const; packing only reads. */
    return (ProtobufCBinaryData){.len = bytes, .data = (uint8_t *)(uintptr_t)data};
}

void rk_origin_message_fill(const struct rk_origin *origin, Redknot__V1__Origin *ret_message)
{
    redknot__v1__origin__init(ret_message);
    ret_message->alone_id = borrow(origin->alone.bytes, RK_ID_BYTES);
    if (rk_origin_is_chain(origin)) {
        ret_message->parent_chain_id = borrow(origin->parent.bytes, RK_ID_BYTES);
    }
    ret_message->salt_tag = borrow(origin->salt_tag.bytes, RK_SALT_TAG_BYTES);
    if (!rk_id_is_zero(&origin->numeric_path)) {
        ret_message->numeric_path = borrow(origin->numeric_path.bytes, RK_ID_BYTES);
    }
}

bool rk_origin_message_read(const Redknot__V1__Origin *message, struct rk_origin *ret_origin)
{
    struct rk_origin origin = {0};

    if (message != NULL && (message->alone_id.len | message->parent_chain_id.len |
                            message->salt_tag.len | message->numeric_path.len) != 0) {
        if (message->alone_id.len != RK_ID_BYTES || message->salt_tag.len != RK_SALT_TAG_BYTES ||
            (message->parent_chain_id.len != 0 && message->parent_chain_id.len != RK_ID_BYTES) ||
            (message->numeric_path.len != 0 && message->numeric_path.len != RK_ID_BYTES)) {
            return false;
        }
        memcpy(origin.alone.bytes, message->alone_id.data, RK_ID_BYTES);
        memcpy(origin.salt_tag.bytes, message->salt_tag.data, RK_SALT_TAG_BYTES);
        if (message->parent_chain_id.len != 0) {
            memcpy(origin.parent.bytes, message->parent_chain_id.data, RK_ID_BYTES);
        }
        if (message->numeric_path.len != 0) {
            memcpy(origin.numeric_path.bytes, message->numeric_path.data, RK_ID_BYTES);
        }
    }
    *ret_origin = origin;
    return true;
}
