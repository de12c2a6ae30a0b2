#include "common/transport/shm_wire_internal.h"

#include <stdio.h>
#include <string.h>

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
        header.type > SHM_RELEASE || header.body_bytes > frame_bytes_max - sizeof(header)) {
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

bool shm_extents_pages(const struct rk_extent *extents, size_t num_extents, uint64_t pages_max,
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

enum rk_status shm_get_parse(const struct shm_frame *frame, uint64_t pages_max,
                             struct rk_extent *scratch, struct rk_get *ret_get)
{
    struct shm_get wire;
    size_t bytes = frame->header.body_bytes;
    if (bytes < sizeof(wire)) {
        return RK_ERR_INVALID;
    }
    memcpy(&wire, frame->body, sizeof(wire));
    if (wire.num_extents == 0 || wire.num_extents > SHM_EXTENTS_MAX ||
        bytes - sizeof(wire) != wire.num_extents * sizeof(struct rk_extent)) {
        return RK_ERR_INVALID;
    }
    memcpy(scratch, frame->body + sizeof(wire), bytes - sizeof(wire));
    uint64_t pages = 0;
    if (!shm_extents_pages(scratch, wire.num_extents, pages_max, &pages)) {
        return RK_ERR_INVALID;
    }
    *ret_get = (struct rk_get){.generation = wire.generation,
                               .shard_index = wire.shard_index,
                               .page_bytes = wire.page_bytes,
                               .extents = scratch,
                               .num_extents = wire.num_extents,
                               .pages_max = pages};
    memcpy(ret_get->segment_id.bytes, wire.segment_id, RK_ID_BYTES);
    memcpy(ret_get->fingerprint.bytes, wire.fingerprint, RK_ID_BYTES);
    return RK_OK;
}

void shm_get_fill(const struct rk_get *get, struct shm_get *ret_body)
{
    *ret_body = (struct shm_get){.generation = get->generation,
                                 .shard_index = get->shard_index,
                                 .page_bytes = get->page_bytes,
                                 .num_extents = (uint32_t)get->num_extents};
    memcpy(ret_body->segment_id, get->segment_id.bytes, RK_ID_BYTES);
    memcpy(ret_body->fingerprint, get->fingerprint.bytes, RK_ID_BYTES);
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

enum rk_status shm_failure_parse(const uint8_t *line, size_t bytes, struct rk_error *error)
{
    char text[SHM_ERROR_TEXT_MAX + 1];
    size_t length = bytes < SHM_ERROR_TEXT_MAX ? bytes : SHM_ERROR_TEXT_MAX;
    memcpy(text, line, length);
    text[length] = '\0';
    char *space = strchr(text, ' ');
    if (space) {
        *space = '\0';
    }
    enum rk_status status = rk_status_from_name(text);
    if (status == RK_OK) {
        status = RK_ERR_INTERNAL; /* "It failed with success" is no answer. */
    }
    return rk_error_set(error, status, "%s", space ? space + 1 : "");
}

size_t shm_failure_format(enum rk_status status, const char *text,
                          char ret_line[SHM_ERROR_TEXT_MAX])
{
    int length = snprintf(ret_line, SHM_ERROR_TEXT_MAX, "%s %s", rk_status_name(status), text);
    return (size_t)length < SHM_ERROR_TEXT_MAX ? (size_t)length : SHM_ERROR_TEXT_MAX - 1;
}
