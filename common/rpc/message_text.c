/*
 * Is every string of a message text, and what will the message take once it is unpacked? protobuf-c
 * keeps strings as C strings and forgets their lengths, so what follows a NUL would be dropped
 * without a word. This walks the packed bytes by the message's descriptor instead, before they are
 * unpacked. It also makes structures of what takes two bytes on the wire, an empty message in a
 * list, and keeps a note of each field while it reads: 60 MiB can become 4 GiB. What that will come
 * to is added up on the way, and refused in time.
 */
#include "common/base/text.h"
#include "common/rpc/rpc_internal.h"

#include <protobuf-c/protobuf-c.h>
#include <string.h>

#define NESTING_MAX 64

/* protobuf-c 1.4, with malloc's own: a note for each field while its message is read, in blocks
 * that double; a field it does not know is kept. */
#define NOTE_BYTES    64
#define BLOCK_BYTES   16
#define UNKNOWN_BYTES 48

/* Of what a legal message unpacks to: much data takes what it is, small things are few. */
#define MEMORY_BASE   ((size_t)32 << 20)
#define MEMORY_FACTOR 2

struct walk {
    size_t memory;
    size_t memory_max;
    struct rk_error *error;
};

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
                                    unsigned nesting, struct walk *walk);

/* Bytes of one element of a list of numbers. */
static size_t number_bytes(ProtobufCType type)
{
    switch (type) {
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_UINT64:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        return 8;
    default:
        return 4;
    }
}

/* Of a list of numbers in one field; at the wire's shortest each is a byte. */
static size_t packed_bytes(ProtobufCType type, size_t wire_bytes)
{
    switch (type) {
    case PROTOBUF_C_TYPE_SFIXED32:
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_FLOAT:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        return wire_bytes;
    default:
        return wire_bytes * number_bytes(type);
    }
}

static size_t field_bytes(const ProtobufCFieldDescriptor *field, bool delimited, size_t wire_bytes)
{
    if (!field) {
        return NOTE_BYTES + UNKNOWN_BYTES + BLOCK_BYTES + wire_bytes;
    }
    switch (field->type) {
    case PROTOBUF_C_TYPE_MESSAGE:
        return NOTE_BYTES + BLOCK_BYTES + sizeof(void *) +
               ((const ProtobufCMessageDescriptor *)field->descriptor)->sizeof_message;
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
        return NOTE_BYTES + BLOCK_BYTES + sizeof(ProtobufCBinaryData) + wire_bytes;
    default:
        return NOTE_BYTES +
               (delimited ? packed_bytes(field->type, wire_bytes) : number_bytes(field->type));
    }
}

static enum rk_status too_much(const ProtobufCMessageDescriptor *type, const struct walk *walk)
{
    return rk_error_set(walk->error, RK_ERR_TOO_LONG,
                        "the message holds so much, in fields of %s, that it would take more than "
                        "%zu MiB; send less at once",
                        type->short_name, walk->memory_max >> 20);
}

/* One field, whose bytes (of a number: none) follow. */
static enum rk_status check_field(const ProtobufCMessageDescriptor *type, uint64_t key,
                                  struct wire bytes, unsigned nesting, struct walk *walk)
{
    uint64_t tag = key >> 3;
    bool delimited = (key & 7) == 2;
    const ProtobufCFieldDescriptor *field =
        tag <= UINT32_MAX ? protobuf_c_message_descriptor_get_field(type, (unsigned)tag) : NULL;
    walk->memory += field_bytes(field, delimited, bytes.left);
    if (walk->memory > walk->memory_max) {
        return too_much(type, walk);
    }
    if (!field || !delimited) {
        return RK_OK;
    }
    if (field->type == PROTOBUF_C_TYPE_STRING) {
        return check_string(type, field, bytes.at, bytes.left, walk->error);
    }
    return field->type == PROTOBUF_C_TYPE_MESSAGE
               ? check_message(field->descriptor, bytes, nesting + 1, walk)
               : RK_OK;
}

static enum rk_status malformed(const ProtobufCMessageDescriptor *type, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_INVALID, "the bytes are no %s", type->short_name);
}

static enum rk_status check_message(const ProtobufCMessageDescriptor *type, struct wire wire,
                                    unsigned nesting, struct walk *walk)
{
    if (nesting > NESTING_MAX) {
        return malformed(type, walk->error);
    }
    while (wire.left > 0) {
        uint64_t key = 0;
        uint64_t bytes = 0;
        struct wire inner = {.at = NULL, .left = 0};
        bool sound = wire_varint(&wire, &key);
        switch (key & 7) {
        case 0:
            sound = sound && wire_varint(&wire, &bytes);
            break;
        case 1:
            sound = sound && wire_skip(&wire, 8);
            break;
        case 2:
            sound = sound && wire_varint(&wire, &bytes) && bytes <= wire.left;
            if (sound) {
                inner = (struct wire){.at = wire.at, .left = (size_t)bytes};
                (void)wire_skip(&wire, bytes);
            }
            break;
        case 5:
            sound = sound && wire_skip(&wire, 4);
            break;
        default: /* Groups are not of proto3. */
            sound = false;
        }
        if (!sound) {
            return malformed(type, walk->error);
        }
        enum rk_status status = check_field(type, key, inner, nesting, walk);
        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}

enum rk_status rk_rpc_message_check_text(const void *data, size_t bytes,
                                         const struct ProtobufCMessageDescriptor *type,
                                         struct rk_error *error)
{
    struct walk walk = {.memory = type->sizeof_message,
                        .memory_max = MEMORY_BASE + MEMORY_FACTOR * bytes,
                        .error = error};
    return check_message(type, (struct wire){.at = data, .left = bytes}, 0, &walk);
}
