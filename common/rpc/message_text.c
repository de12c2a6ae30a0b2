/*
 * Is every string of a message text? protobuf-c keeps strings as C strings and forgets their
 * lengths, so what follows a NUL would be dropped without a word. This walks the packed bytes by
 * the message's descriptor instead, before they are unpacked.
 */
#include "common/base/text.h"
#include "common/rpc/rpc_internal.h"

#include <protobuf-c/protobuf-c.h>
#include <string.h>

#define NESTING_MAX 64

/* What is left of a message. */
struct wire {
    const uint8_t *at;
    size_t left;
};

static bool wire_skip(struct wire *wire, uint64_t bytes)
{
    if (bytes > wire->left) {
        return false;
    }
    wire->at += bytes;
    wire->left -= bytes;
    return true;
}

static bool wire_varint(struct wire *wire, uint64_t *ret_value)
{
    uint64_t value = 0;
    for (unsigned shift = 0; shift < 64 && wire->left > 0; shift += 7) {
        uint8_t byte = *wire->at;
        (void)wire_skip(wire, 1);
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            *ret_value = value;
            return true;
        }
    }
    return false;
}

static enum rk_status check_string(const ProtobufCMessageDescriptor *type,
                                   const ProtobufCFieldDescriptor *field, const uint8_t *text,
                                   size_t bytes, struct rk_error *error)
{
    const uint8_t *nul = memchr(text, 0, bytes);
    if (nul) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s of %s has a NUL character (U+0000) at byte %zu: text cannot hold "
                            "one; leave it out",
                            field->name, type->short_name, (size_t)(nul - text));
    }
    for (size_t at = 0; at < bytes;) {
        size_t sequence = rk_utf8_character(text + at, bytes - at);
        if (sequence == 0) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "%s of %s is not UTF-8: byte 0x%02x at byte %zu; convert it",
                                field->name, type->short_name, text[at], at);
        }
        at += sequence;
    }
    return RK_OK;
}

static enum rk_status check_message(const ProtobufCMessageDescriptor *type, struct wire wire,
                                    unsigned nesting, struct rk_error *error);

/* A field of bytes: a string, a message, or what needs no look. */
static enum rk_status check_bytes(const ProtobufCMessageDescriptor *type, uint64_t tag,
                                  struct wire bytes, unsigned nesting, struct rk_error *error)
{
    const ProtobufCFieldDescriptor *field =
        tag <= UINT32_MAX ? protobuf_c_message_descriptor_get_field(type, (unsigned)tag) : NULL;
    if (!field) {
        return RK_OK;
    }
    if (field->type == PROTOBUF_C_TYPE_STRING) {
        return check_string(type, field, bytes.at, bytes.left, error);
    }
    return field->type == PROTOBUF_C_TYPE_MESSAGE
               ? check_message(field->descriptor, bytes, nesting + 1, error)
               : RK_OK;
}

static enum rk_status malformed(const ProtobufCMessageDescriptor *type, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_INVALID, "the bytes are no %s", type->short_name);
}

static enum rk_status check_message(const ProtobufCMessageDescriptor *type, struct wire wire,
                                    unsigned nesting, struct rk_error *error)
{
    if (nesting > NESTING_MAX) {
        return malformed(type, error);
    }
    while (wire.left > 0) {
        uint64_t key = 0;
        uint64_t bytes = 0;
        enum rk_status status = RK_OK;
        bool sound = wire_varint(&wire, &key);
        switch (key & 7) {
        case 0:
            sound = sound && wire_varint(&wire, &bytes);
            break;
        case 1:
            sound = sound && wire_skip(&wire, 8);
            break;
        case 2: {
            sound = sound && wire_varint(&wire, &bytes) && bytes <= wire.left;
            if (sound) {
                struct wire inner = {.at = wire.at, .left = (size_t)bytes};
                status = check_bytes(type, key >> 3, inner, nesting, error);
                (void)wire_skip(&wire, bytes);
            }
            break;
        }
        case 5:
            sound = sound && wire_skip(&wire, 4);
            break;
        default: /* Groups are not of proto3. */
            sound = false;
        }
        if (!sound || status != RK_OK) {
            return sound ? status : malformed(type, error);
        }
    }
    return RK_OK;
}

enum rk_status rk_rpc_message_check_text(const void *data, size_t bytes,
                                         const struct ProtobufCMessageDescriptor *type,
                                         struct rk_error *error)
{
    return check_message(type, (struct wire){.at = data, .left = bytes}, 0, error);
}
