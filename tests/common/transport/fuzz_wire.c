/*
 * Frames of the shm socket and the bodies that both paths parse: any bytes are what they should
 * be, a need for more, or refused.
 */
#include "common/transport/grpc_wire_internal.h"
#include "common/transport/wire_internal.h"

#include "common/base/alloc.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void frames(const uint8_t *data, size_t size)
{
    static struct rk_extent scratch[WIRE_EXTENTS_MAX];
    static struct rk_get gets[RK_TRANSPORT_ITEMS_MAX];
    struct shm_frame frame;
    size_t needed = 0;
    size_t at = 0;
    size_t count = 0;
    while (at <= size) {
        enum rk_status status =
            shm_frame_parse(data + at, size - at, SHM_REQUEST_BYTES_MAX, &frame, &needed);
        if (status == RK_ERR_BUSY) {
            RK_ASSERT(needed > size - at && needed <= SHM_REQUEST_BYTES_MAX);
        }
        if (status != RK_OK) {
            break;
        }
        RK_ASSERT(frame.bytes <= size - at);
        if (wire_gets_parse(frame.body, frame.header.body_bytes, scratch, gets, &count) == RK_OK) {
            RK_ASSERT(count > 0 && count <= RK_TRANSPORT_ITEMS_MAX);
        }
        at += frame.bytes;
    }
}

static void answers(const uint8_t *data, size_t size)
{
    const struct rk_get value = {.bytes_max = 1u << 20};
    struct wire_reader reader = {data, size};
    struct rk_put puts[2] = {{.head = NULL}};
    struct rk_pages pages;
    enum rk_status status = RK_OK;
    while (status == RK_OK) {
        const uint8_t *entries = NULL;
        struct wire_found found;
        pages = (struct rk_pages){.num_pages = 0};
        status = wire_found_parse(&reader, size % 2, &value, &pages, &found, &entries, NULL);
        RK_ASSERT(status != RK_OK || pages.status != RK_OK || pages.bytes <= value.bytes_max);
        rk_free(pages.pages);
    }
    if (wire_results_parse(data, size, puts, 2, NULL) == RK_OK) {
        RK_ASSERT(puts[1].status < RK_STATUS_COUNT);
    }
}

static void pieces(const uint8_t *data, size_t size)
{
    struct wire_buffer found = {.bytes = 0};
    struct grpc_reply_reader reader = {.found = &found};
    size_t half = size / 2;
    bool good = true;
    for (int i = 0; i < 2; i++) {
        const uint8_t *piece = i ? data + half : data;
        size_t left = i ? size - half : half;
        while (good && left > 0) {
            const uint8_t *part = NULL;
            size_t count = 0;
            size_t before = left;
            good = grpc_reply_read(&reader, &piece, &left, &part, &count);
            RK_ASSERT(!good || (left < before && count <= before - left));
        }
    }
    rk_free(found.data);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    frames(data, size);
    answers(data, size);
    pieces(data, size);
    return 0;
}
