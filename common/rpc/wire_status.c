#include "common/rpc/rpc_internal.h"

#include <string.h>

grpc_status_code rpc_status_to_code(enum rk_status status)
{
    static const grpc_status_code codes[RK_STATUS_COUNT] = {
        [RK_OK] = GRPC_STATUS_OK,
        [RK_MISS_ABSENT] = GRPC_STATUS_NOT_FOUND,
        [RK_MISS_EVICTED] = GRPC_STATUS_NOT_FOUND,
        [RK_MISS_STALE_GENERATION] = GRPC_STATUS_ABORTED,
        [RK_MISS_CHECKSUM] = GRPC_STATUS_DATA_LOSS,
        [RK_MISS_NODE_DOWN] = GRPC_STATUS_UNAVAILABLE,
        [RK_MISS_DEADLINE] = GRPC_STATUS_DEADLINE_EXCEEDED,
        [RK_MISS_TENANT] = GRPC_STATUS_NOT_FOUND,
        [RK_MISS_FINGERPRINT] = GRPC_STATUS_FAILED_PRECONDITION,
        [RK_MISS_NUMERIC_PATH] = GRPC_STATUS_FAILED_PRECONDITION,
        [RK_ERR_NO_MEMORY] = GRPC_STATUS_RESOURCE_EXHAUSTED,
        [RK_ERR_FULL] = GRPC_STATUS_RESOURCE_EXHAUSTED,
        [RK_ERR_BUSY] = GRPC_STATUS_ABORTED,
        [RK_ERR_DEADLINE] = GRPC_STATUS_DEADLINE_EXCEEDED,
        [RK_ERR_UNAVAILABLE] = GRPC_STATUS_UNAVAILABLE,
        [RK_ERR_CANCELLED] = GRPC_STATUS_CANCELLED,
        [RK_ERR_INVALID] = GRPC_STATUS_INVALID_ARGUMENT,
        [RK_ERR_NOT_FOUND] = GRPC_STATUS_NOT_FOUND,
        [RK_ERR_EXISTS] = GRPC_STATUS_ALREADY_EXISTS,
        [RK_ERR_TOO_LONG] = GRPC_STATUS_OUT_OF_RANGE,
        [RK_ERR_UNSUPPORTED] = GRPC_STATUS_UNIMPLEMENTED,
        [RK_ERR_CORRUPT] = GRPC_STATUS_DATA_LOSS,
        [RK_ERR_IO] = GRPC_STATUS_INTERNAL,
        [RK_ERR_INTERNAL] = GRPC_STATUS_INTERNAL,
    };
    return (unsigned)status < RK_STATUS_COUNT ? codes[status] : GRPC_STATUS_INTERNAL;
}

static enum rk_status status_from_code(grpc_status_code code, const char *message)
{
    switch (code) {
    case GRPC_STATUS_OK:
        return RK_OK;
    case GRPC_STATUS_CANCELLED:
        return RK_ERR_CANCELLED;
    case GRPC_STATUS_INVALID_ARGUMENT:
    case GRPC_STATUS_PERMISSION_DENIED:
    case GRPC_STATUS_UNAUTHENTICATED:
        return RK_ERR_INVALID;
    case GRPC_STATUS_DEADLINE_EXCEEDED:
        return RK_ERR_DEADLINE;
    case GRPC_STATUS_NOT_FOUND:
        return RK_ERR_NOT_FOUND;
    case GRPC_STATUS_ALREADY_EXISTS:
        return RK_ERR_EXISTS;
    case GRPC_STATUS_RESOURCE_EXHAUSTED:
        /* gRPC uses one code for a full server and for its message limit. */
        return strstr(message, "larger than max") ? RK_ERR_TOO_LONG : RK_ERR_FULL;
    case GRPC_STATUS_FAILED_PRECONDITION:
    case GRPC_STATUS_ABORTED:
        return RK_ERR_BUSY;
    case GRPC_STATUS_OUT_OF_RANGE:
        return RK_ERR_TOO_LONG;
    case GRPC_STATUS_UNIMPLEMENTED:
        return RK_ERR_UNSUPPORTED;
    case GRPC_STATUS_UNAVAILABLE:
        return RK_ERR_UNAVAILABLE;
    case GRPC_STATUS_DATA_LOSS:
        return RK_ERR_CORRUPT;
    default:
        return RK_ERR_INTERNAL;
    }
}

enum rk_status rpc_status_from_wire(grpc_status_code code, const grpc_metadata_array *trailer,
                                    const char *message, bool *ret_from_peer)
{
    *ret_from_peer = false;
    if (code == GRPC_STATUS_OK) {
        return RK_OK;
    }
    for (size_t i = 0; trailer && i < trailer->count; i++) {
        const grpc_metadata *entry = &trailer->metadata[i];
        if (grpc_slice_str_cmp(entry->key, RPC_STATUS_KEY) != 0) {
            continue;
        }
        char name[64];
        rpc_slice_to_text(&entry->value, name, sizeof(name));
        enum rk_status status = rk_status_from_name(name);
        if (status != RK_OK) {
            *ret_from_peer = true;
            /* A newer peer's name: its gRPC code still says something. */
            bool known = strcmp(rk_status_name(status), name) == 0;
            return known ? status : status_from_code(code, message);
        }
    }
    return status_from_code(code, message);
}

void rpc_slice_to_text(const grpc_slice *slice, char *ret_text, size_t text_bytes)
{
    size_t bytes = GRPC_SLICE_LENGTH(*slice);
    bytes = bytes < text_bytes - 1 ? bytes : text_bytes - 1;
    memcpy(ret_text, GRPC_SLICE_START_PTR(*slice), bytes);
    ret_text[bytes] = '\0';
}
