#include "common/transport/transport_internal.h"

#include "common/base/alloc.h"

#include <string.h>

#define BUFFER_ALIGNMENT 4096
#define SPARE_BYTES_MAX  (64u << 20)

struct arrival_buffer {
    size_t bytes;
    uint8_t pad[BUFFER_ALIGNMENT - sizeof(size_t)];
    uint8_t data[];
};

static struct arrival_buffer *buffer_take(struct arrival_buffers *buffers, size_t bytes)
{
    struct arrival_buffer *buffer = buffers->spare;
    if (buffer && buffer->bytes >= bytes) {
        buffers->spare = NULL;
        return buffer;
    }
    buffer = rk_alloc_aligned(BUFFER_ALIGNMENT, sizeof(*buffer) + bytes);
    if (buffer) {
        buffer->bytes = bytes;
    }
    return buffer;
}

/* The largest is kept. */
static void buffer_give(struct arrival_buffers *buffers, struct arrival_buffer *buffer)
{
    struct arrival_buffer *other = buffers->spare;
    if (buffer->bytes <= SPARE_BYTES_MAX && (!other || other->bytes < buffer->bytes)) {
        buffers->spare = buffer;
        buffer = other;
    }
    rk_free(buffer);
}

void arrival_buffers_destroy(struct arrival_buffers *buffers)
{
    rk_free(buffers->spare);
    buffers->spare = NULL;
}

void arrival_release(struct arrival_buffers *buffers, struct rk_pages *pages, size_t num_pages)
{
    for (size_t i = 0; i < num_pages; i++) {
        if (pages[i].hold) {
            buffer_give(buffers, pages[i].hold);
            pages[i].hold = NULL;
        }
    }
}

static size_t page_length(const struct rk_pages *pages, uint64_t page)
{
    uint64_t left = pages->bytes - page * pages->page_bytes;
    return left < pages->page_bytes ? (size_t)left : pages->page_bytes;
}

enum rk_status arrival_begin(struct arrival *arrival, struct arrival_buffers *buffers,
                             const struct rk_get *gets, struct rk_pages *pages, size_t num_items,
                             struct rk_error *error)
{
    *arrival = (struct arrival){.gets = gets, .pages = pages, .num_items = num_items};
    for (size_t i = 0; i < num_items; i++) {
        struct rk_pages *item = &pages[i];
        uint8_t *place = gets[i].buffer;
        if (item->status != RK_OK) {
            continue;
        }
        if (!place) {
            struct arrival_buffer *buffer = buffer_take(buffers, item->bytes);
            if (!buffer) {
                return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %llu bytes",
                                    (unsigned long long)item->bytes);
            }
            item->hold = buffer;
            place = buffer->data;
        }
        for (uint64_t page = 0; page < item->num_pages; page++) {
            item->pages[page].data = place + page * item->page_bytes;
        }
        arrival->total += item->bytes;
    }
    return RK_OK;
}

static uint8_t *item_bytes(const struct rk_pages *item)
{
    return (uint8_t *)(uintptr_t)item->pages[0].data;
}

static void pages_verify(struct arrival *arrival, const struct arrival_range *range)
{
    struct rk_pages *item = &arrival->pages[range->item];
    if (!arrival->gets[range->item].verify) {
        return;
    }
    for (uint64_t page = range->page_begin; page < range->page_end; page++) {
        if (item->status == RK_OK && !rk_page_verify(&item->pages[page], page_length(item, page))) {
            item->status = RK_MISS_CHECKSUM;
        }
    }
}

/* Pages that are whole when so many bytes of the item have come. */
static uint64_t pages_within(const struct rk_pages *item, uint64_t bytes)
{
    return bytes == item->bytes ? item->num_pages : bytes / item->page_bytes;
}

/* To the next item that has bytes to come. */
static void skip_done(struct arrival *arrival)
{
    while (arrival->item < arrival->num_items) {
        const struct rk_pages *item = &arrival->pages[arrival->item];
        if (item->num_pages > 0 && arrival->item_done < item->bytes) {
            return;
        }
        arrival->item++;
        arrival->item_done = 0;
    }
}

bool arrival_take(struct arrival *arrival, const void *data, size_t bytes)
{
    const uint8_t *from = data;
    if (bytes > arrival->total - arrival->done) {
        return false;
    }
    arrival->done += bytes;
    while (bytes > 0) {
        skip_done(arrival);
        struct rk_pages *item = &arrival->pages[arrival->item];
        uint64_t left = item->bytes - arrival->item_done;
        /* A page at a time, so that it is looked at while it is still in the cache. */
        uint64_t in_page = item->page_bytes - arrival->item_done % item->page_bytes;
        size_t count = in_page < left ? (size_t)in_page : (size_t)left;
        count = bytes < count ? bytes : count;
        memcpy(item_bytes(item) + arrival->item_done, from, count);
        const struct arrival_range range = {arrival->item, pages_within(item, arrival->item_done),
                                            pages_within(item, arrival->item_done + count)};
        arrival->item_done += count;
        from += count;
        bytes -= count;
        pages_verify(arrival, &range);
    }
    return true;
}

void *arrival_reserve(struct arrival *arrival, size_t bytes, struct arrival_range *ret_range)
{
    skip_done(arrival);
    if (bytes == 0 || bytes > arrival->total - arrival->done) {
        return NULL;
    }
    const struct rk_pages *item = &arrival->pages[arrival->item];
    uint64_t end = arrival->item_done + bytes;
    if (end > item->bytes || arrival->item_done % item->page_bytes != 0 ||
        (end % item->page_bytes != 0 && end != item->bytes)) {
        return NULL;
    }
    *ret_range = (struct arrival_range){arrival->item, arrival->item_done / item->page_bytes,
                                        pages_within(item, end)};
    void *place = item_bytes(item) + arrival->item_done;
    arrival->item_done = end;
    arrival->done += bytes;
    return place;
}

void arrival_placed(struct arrival *arrival, const struct arrival_range *range)
{
    pages_verify(arrival, range);
}
