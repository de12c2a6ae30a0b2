#include "common/transport/transport_internal.h"
#include "common/transport/wire_internal.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"
#include "common/base/value.h"

#include <stdio.h>
#include <string.h>

/* ---- Reading and building ---- */

bool wire_take(struct wire_reader *reader, void *ret, size_t bytes)
{
    if (bytes > reader->left) {
        return false;
    }
    memcpy(ret, reader->at, bytes);
    reader->at += bytes;
    reader->left -= bytes;
    return true;
}

bool wire_take_block(struct wire_reader *reader, const uint8_t **ret_data, uint32_t *ret_bytes)
{
    uint32_t bytes = 0;
    if (!wire_take(reader, &bytes, sizeof(bytes)) || bytes > reader->left) {
        return false;
    }
    *ret_data = reader->at;
    *ret_bytes = bytes;
    reader->at += bytes;
    reader->left -= bytes;
    return true;
}

void *wire_append(struct wire_buffer *buffer, const void *data, size_t bytes)
{
    if (buffer->failed) {
        return NULL;
    }
    if (bytes > buffer->room - buffer->bytes) {
        size_t room =
            buffer->room * 2 > buffer->bytes + bytes ? buffer->room * 2 : buffer->bytes + bytes;
        uint8_t *more = rk_alloc_resize(buffer->data, room, 1);
        if (!more) {
            buffer->failed = true;
            return NULL;
        }
        buffer->data = more;
        buffer->room = room;
    }
    uint8_t *place = buffer->data + buffer->bytes;
    if (data && bytes > 0) {
        memcpy(place, data, bytes);
    } else if (bytes > 0) {
        memset(place, 0, bytes);
    }
    buffer->bytes += bytes;
    return place;
}

void wire_append_count(struct wire_buffer *buffer, uint32_t count)
{
    (void)wire_append(buffer, &count, sizeof(count));
}

static void append_block(struct wire_buffer *buffer, const void *data, uint32_t bytes)
{
    wire_append_count(buffer, bytes);
    (void)wire_append(buffer, data, bytes);
}

size_t wire_text_format(enum rk_status status, const char *text, char ret_line[WIRE_TEXT_MAX])
{
    int length = snprintf(ret_line, WIRE_TEXT_MAX, "%s %s", rk_status_name(status), text);
    return (size_t)length < WIRE_TEXT_MAX ? (size_t)length : WIRE_TEXT_MAX - 1;
}

enum rk_status wire_text_parse(const uint8_t *line, size_t bytes, struct rk_error *error)
{
    char text[WIRE_TEXT_MAX + 1];
    size_t length = bytes < WIRE_TEXT_MAX ? bytes : WIRE_TEXT_MAX;
    memcpy(text, line, length);
    text[length] = '\0';
    char *space = strchr(text, ' ');
    if (space) {
        *space = '\0';
    }
    enum rk_status status = rk_status_from_name(text);
    return status == RK_OK ? RK_OK : rk_error_set(error, status, "%s", space ? space + 1 : "");
}

/* The first failure's text is the batch's. */
static enum rk_status text_parse_first(const uint8_t *line, size_t bytes, struct rk_error *error)
{
    bool first = error && error->text[0] == '\0';
    return wire_text_parse(line, bytes, first ? error : NULL);
}

/* ---- What is asked for ---- */

void wire_gets_append(struct wire_buffer *buffer, const struct rk_get *gets, size_t num_gets)
{
    wire_append_count(buffer, (uint32_t)num_gets);
    for (size_t i = 0; i < num_gets; i++) {
        const struct rk_get *get = &gets[i];
        struct wire_get wire = {.generation = get->generation,
                                .bytes_max = get->bytes_max,
                                .shard_index = get->shard_index,
                                .page_bytes = get->page_bytes,
                                .num_extents = (uint32_t)get->num_extents};
        memcpy(wire.id, get->id.bytes, RK_ID_BYTES);
        memcpy(wire.fingerprint, get->fingerprint.bytes, RK_ID_BYTES);
        (void)wire_append(buffer, &wire, sizeof(wire));
        (void)wire_append(buffer, get->extents, get->num_extents * sizeof(struct rk_extent));
    }
}

bool wire_extents_pages(const struct rk_extent *extents, size_t num_extents, uint64_t pages_max,
                        uint64_t *ret_pages)
{
    uint64_t pages = 0;
    for (size_t i = 0; i < num_extents; i++) {
        if (extents[i].page_end <= extents[i].page_begin) {
            return false;
        }
        pages += extents[i].page_end - extents[i].page_begin;
        if (pages > pages_max) {
            return false;
        }
    }
    *ret_pages = pages;
    return true;
}

enum rk_status wire_gets_parse(const uint8_t *body, size_t bytes, struct rk_extent *scratch,
                               struct rk_get *ret_gets, size_t *ret_num_gets)
{
    struct wire_reader reader = {body, bytes};
    uint32_t count = 0;
    uint64_t extents = 0;
    uint64_t pages = 0;
    if (!wire_take(&reader, &count, sizeof(count)) || count == 0 ||
        count > RK_TRANSPORT_ITEMS_MAX) {
        return RK_ERR_INVALID;
    }
    for (uint32_t i = 0; i < count; i++) {
        struct wire_get wire;
        uint64_t mine = 0;
        if (!wire_take(&reader, &wire, sizeof(wire)) ||
            wire.num_extents > WIRE_EXTENTS_MAX - extents ||
            (wire.num_extents == 0) != (wire.page_bytes == 0) ||
            !wire_take(&reader, scratch + extents, wire.num_extents * sizeof(*scratch)) ||
            !wire_extents_pages(scratch + extents, wire.num_extents, WIRE_PAGES_MAX - pages,
                                &mine)) {
            return RK_ERR_INVALID;
        }
        ret_gets[i] = (struct rk_get){.generation = wire.generation,
                                      .shard_index = wire.shard_index,
                                      .page_bytes = wire.page_bytes,
                                      .extents = scratch + extents,
                                      .num_extents = wire.num_extents,
                                      .bytes_max = wire.bytes_max};
        memcpy(ret_gets[i].id.bytes, wire.id, RK_ID_BYTES);
        memcpy(ret_gets[i].fingerprint.bytes, wire.fingerprint, RK_ID_BYTES);
        extents += wire.num_extents;
        pages += mine;
    }
    *ret_num_gets = count;
    return reader.left == 0 ? RK_OK : RK_ERR_INVALID;
}

/* ---- What was found ---- */

void wire_found_append(struct wire_buffer *buffer, const struct rk_found *found, uint64_t pin_id,
                       const uint64_t *offsets, const uint64_t *checksums)
{
    struct wire_found wire = {.generation = found->generation,
                              .seal_index = found->seal_index,
                              .seal = found->seal,
                              .pin_id = pin_id,
                              .bytes = found->bytes,
                              .page_bytes = found->page_bytes,
                              .num_pages = (uint32_t)found->num_pages,
                              .tier = found->tier};
    memcpy(wire.id, found->id.bytes, RK_ID_BYTES);
    (void)wire_append(buffer, &wire, sizeof(wire));
    if (!offsets) {
        (void)wire_append(buffer, checksums, found->num_pages * sizeof(*checksums));
        return;
    }
    uint8_t *place = wire_append(buffer, NULL, found->num_pages * sizeof(struct wire_page));
    for (uint64_t i = 0; place && i < found->num_pages; i++) {
        struct wire_page page = {.offset = offsets[i], .checksum = checksums[i]};
        memcpy(place + i * sizeof(page), &page, sizeof(page));
    }
}

void wire_failure_append(struct wire_buffer *buffer, const struct rk_get *get,
                         enum rk_status status, const char *text)
{
    char line[WIRE_TEXT_MAX];
    struct wire_found wire = {.generation = get->generation,
                              .text_bytes = (uint32_t)wire_text_format(status, text, line)};
    memcpy(wire.id, get->id.bytes, RK_ID_BYTES);
    (void)wire_append(buffer, &wire, sizeof(wire));
    (void)wire_append(buffer, line, wire.text_bytes);
}

bool wire_found_fits(const struct rk_get *get, uint64_t bytes, uint32_t page_bytes,
                     uint64_t num_pages)
{
    uint64_t pages = 0;
    if (get->page_bytes == 0) {
        return bytes > 0 && bytes <= get->bytes_max && page_bytes == rk_value_page_bytes(bytes) &&
               num_pages == rk_value_pages(bytes);
    }
    return page_bytes == get->page_bytes &&
           wire_extents_pages(get->extents, get->num_extents, WIRE_PAGES_MAX, &pages) &&
           num_pages == pages && bytes == pages * page_bytes;
}

/* Is it about what was asked for? */
static bool found_named(const struct rk_get *get, const struct wire_found *wire)
{
    bool value = get->page_bytes == 0; /* Its generation is the store's own. */
    return memcmp(wire->id, get->id.bytes, RK_ID_BYTES) == 0 &&
           (value || wire->generation == get->generation);
}

enum rk_status wire_found_parse(struct wire_reader *reader, bool with_offsets,
                                const struct rk_get *get, struct rk_pages *ret_pages,
                                struct wire_found *ret_found, const uint8_t **ret_entries,
                                struct rk_error *error)
{
    struct wire_found wire;
    size_t entry = with_offsets ? sizeof(struct wire_page) : sizeof(uint64_t);
    if (!wire_take(reader, &wire, sizeof(wire)) || !found_named(get, &wire) ||
        wire.text_bytes > reader->left ||
        (wire.text_bytes == 0 &&
         (!wire_found_fits(get, wire.bytes, wire.page_bytes, wire.num_pages) ||
          wire.num_pages > reader->left / entry))) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE,
                            "the store's answer is not to what was asked");
    }
    const uint8_t *at = reader->at;
    size_t taken = wire.text_bytes ? wire.text_bytes : wire.num_pages * entry;
    reader->at += taken;
    reader->left -= taken;
    *ret_pages = (struct rk_pages){.num_pages = wire.num_pages,
                                   .page_bytes = wire.page_bytes,
                                   .bytes = wire.bytes,
                                   .generation = wire.generation,
                                   .tier = (enum rk_tier)wire.tier};
    if (wire.text_bytes > 0) {
        enum rk_status status = text_parse_first(at, wire.text_bytes, error);
        *ret_pages = (struct rk_pages){.status = status == RK_OK ? RK_ERR_INTERNAL : status};
        return RK_OK;
    }
    ret_pages->pages = rk_alloc_zero(wire.num_pages, sizeof(struct rk_page));
    if (!ret_pages->pages) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %u pages", wire.num_pages);
    }
    for (uint32_t i = 0; i < wire.num_pages; i++) {
        memcpy(&ret_pages->pages[i].checksum, at + (i + 1) * entry - sizeof(uint64_t),
               sizeof(uint64_t));
    }
    *ret_found = wire;
    *ret_entries = at;
    return RK_OK;
}

/* ---- Who answers ---- */

struct wire_identity wire_identity_make(const char *node_id, uint64_t incarnation)
{
    struct wire_identity identity = {.incarnation = incarnation};
    size_t bytes = node_id ? strlen(node_id) : 0;
    RK_ASSERT(bytes < RK_NODE_ID_BYTES);
    if (bytes > 0) {
        memcpy(identity.node_id, node_id, bytes);
    }
    return identity;
}

enum rk_status wire_identity_check(const struct wire_identity *identity, const char *wanted_id,
                                   uint64_t wanted_incarnation, struct rk_error *error)
{
    char node_id[RK_NODE_ID_BYTES];
    memcpy(node_id, identity->node_id, sizeof(node_id));
    if (memchr(node_id, '\0', sizeof(node_id)) == NULL) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "the store's name is none");
    }
    return transport_identity_check(wanted_id, wanted_incarnation, node_id, identity->incarnation,
                                    error);
}

/* ---- What is put, and how it went ---- */

void wire_heads_append(struct wire_buffer *buffer, const struct rk_put *puts, size_t num_puts)
{
    wire_append_count(buffer, (uint32_t)num_puts);
    for (size_t i = 0; i < num_puts; i++) {
        append_block(buffer, puts[i].head, (uint32_t)puts[i].head_bytes);
    }
}

void wire_result_append(struct wire_buffer *buffer, enum rk_status status, const char *text)
{
    char line[WIRE_TEXT_MAX];
    size_t bytes = wire_text_format(status, text, line);
    append_block(buffer, line, (uint32_t)bytes);
}

enum rk_status wire_results_parse(const uint8_t *body, size_t bytes, struct rk_put *puts,
                                  size_t num_puts, struct rk_error *error)
{
    struct wire_reader reader = {body, bytes};
    uint32_t count = 0;
    bool good = wire_take(&reader, &count, sizeof(count)) && count == num_puts;
    for (size_t i = 0; good && i < num_puts; i++) {
        const uint8_t *line = NULL;
        uint32_t line_bytes = 0;
        good = wire_take_block(&reader, &line, &line_bytes);
        if (good) {
            puts[i].status = text_parse_first(line, line_bytes, error);
        }
    }
    if (!good || reader.left > 0) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "the store's answer to a put is none");
    }
    return RK_OK;
}

static uint64_t page_length(const struct rk_put *put, uint64_t page)
{
    uint64_t left = put->bytes - page * put->page_bytes;
    return left < put->page_bytes ? left : put->page_bytes;
}

/* Takes more of the page under way into the frame. */
static void outflow_take(struct wire_outflow *outflow, size_t bytes, struct wire_frame *frame)
{
    const struct rk_put *put = &outflow->puts[outflow->item];
    const uint8_t *page = put->pages[outflow->page];
    /* Whoever sends only reads. */
    uint8_t *data = (uint8_t *)(uintptr_t)(page + outflow->page_done);
    struct iovec *last = frame->num_parts > 0 ? &frame->parts[frame->num_parts - 1] : NULL;
    if (last && (uint8_t *)last->iov_base + last->iov_len == data) {
        last->iov_len += bytes;
    } else {
        frame->parts[frame->num_parts++] = (struct iovec){.iov_base = data, .iov_len = bytes};
    }
    frame->bytes += bytes;
    outflow->page_done += bytes;
    outflow->offset += bytes;
    uint64_t length = page_length(put, outflow->page);
    if (outflow->page_done < length) {
        return;
    }
    frame->checksums[frame->num_checksums++] =
        put->checksums ? put->checksums[outflow->page] : rk_hash_xxh3(page, length);
    outflow->page_done = 0;
    if (++outflow->page == put->num_pages) {
        outflow->page = 0;
        outflow->item++;
    }
}

bool wire_outflow_next(struct wire_outflow *outflow, size_t bytes_max, struct wire_frame *frame)
{
    frame->num_parts = 0;
    frame->bytes = 0;
    frame->num_checksums = 0;
    while (outflow->item < outflow->num_puts && frame->bytes < bytes_max &&
           frame->num_parts < frame->parts_max && frame->num_checksums < WIRE_FRAME_SUMS_MAX) {
        uint64_t left =
            page_length(&outflow->puts[outflow->item], outflow->page) - outflow->page_done;
        size_t room = bytes_max - frame->bytes;
        outflow_take(outflow, left < room ? (size_t)left : room, frame);
    }
    return frame->bytes > 0;
}

/* ---- Frames on the Unix socket ---- */

enum rk_status shm_frame_parse(const uint8_t *data, size_t bytes, size_t frame_bytes_max,
                               struct shm_frame *ret_frame, size_t *ret_bytes_needed)
{
    struct shm_frame_header header;
    if (bytes < sizeof(header)) {
        *ret_bytes_needed = sizeof(header);
        return RK_ERR_BUSY;
    }
    memcpy(&header, data, sizeof(header));
    if (header.magic != SHM_MAGIC || header.version != SHM_VERSION || header.type < SHM_HELLO ||
        header.type > SHM_RESULTS || header.body_bytes > frame_bytes_max - sizeof(header)) {
        return RK_ERR_INVALID;
    }
    size_t whole = sizeof(header) + header.body_bytes;
    if (bytes < whole) {
        *ret_bytes_needed = whole;
        return RK_ERR_BUSY;
    }
    *ret_frame =
        (struct shm_frame){.header = header, .body = data + sizeof(header), .bytes = whole};
    return RK_OK;
}

void shm_header_fill(struct shm_frame_header *header, enum shm_frame_type type, uint32_t request_id,
                     size_t body_bytes)
{
    *header = (struct shm_frame_header){.magic = SHM_MAGIC,
                                        .version = SHM_VERSION,
                                        .type = (uint16_t)type,
                                        .request_id = request_id,
                                        .body_bytes = (uint32_t)body_bytes};
}
