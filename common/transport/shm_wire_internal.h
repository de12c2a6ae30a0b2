/*
 * shm_wire: the frames on a store's Unix socket. The body of a GET and the text
 * of a failure are those of the UCX path too.
 *
 * All little endian, packed, with a fixed header; both ends are on one machine
 * but may be of different versions. The client says HELLO, the server answers
 * HELLO_REPLY with the arena's descriptor beside it; then GET is answered by
 * GET_REPLY, and RELEASE by nothing. Parsing is pure and trusts nothing.
 */
#ifndef RK_COMMON_TRANSPORT_SHM_WIRE_INTERNAL_H
#define RK_COMMON_TRANSPORT_SHM_WIRE_INTERNAL_H

#include "common/transport/transport.h"

#define SHM_MAGIC          0x4b4e4452u /* "RDNK" */
#define SHM_VERSION        1
#define SHM_EXTENTS_MAX    65536u
#define SHM_ERROR_TEXT_MAX 480u
#define SHM_PAGES_MAX      (1u << 20)

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are read in place");

enum shm_frame_type {
    SHM_HELLO = 1,
    SHM_HELLO_REPLY = 2,
    SHM_GET = 3,
    SHM_GET_REPLY = 4,
    SHM_RELEASE = 5,
};

struct __attribute__((packed)) shm_frame_header {
    uint32_t magic;
    uint16_t version;
    uint16_t type;
    uint32_t request_id; /* a reply carries that of its request */
    uint32_t body_bytes;
};

struct __attribute__((packed)) shm_hello_reply {
    uint64_t arena_bytes;
};

struct __attribute__((packed)) shm_get {
    uint8_t segment_id[RK_ID_BYTES];
    uint8_t fingerprint[RK_ID_BYTES];
    uint64_t generation;
    uint32_t shard_index;
    uint32_t page_bytes;
    uint32_t num_extents; /* so many struct rk_extent follow */
};

struct __attribute__((packed)) shm_get_reply {
    uint64_t pin_id;
    uint32_t failed;    /* 0: num_pages of struct shm_page follow */
    uint32_t num_pages; /* else "STATUS_NAME text", without a final NUL */
};

struct __attribute__((packed)) shm_page {
    uint64_t offset;
    uint64_t checksum;
};

struct __attribute__((packed)) shm_release {
    uint64_t pin_id;
};

#define SHM_REQUEST_BYTES_MAX                                                                      \
    (sizeof(struct shm_frame_header) + sizeof(struct shm_get) +                                    \
     SHM_EXTENTS_MAX * sizeof(struct rk_extent))
#define SHM_REPLY_BYTES_MAX                                                                        \
    (sizeof(struct shm_frame_header) + sizeof(struct shm_get_reply) +                              \
     (size_t)SHM_PAGES_MAX * sizeof(struct shm_page))

/* The body lies behind the header in the buffer given to the parser. */
struct shm_frame {
    struct shm_frame_header header;
    const uint8_t *body;
    size_t bytes; /* header and body */
};

/*
 * RK_OK: a whole frame is there. RK_ERR_BUSY: more bytes are needed, at most
 * *ret_bytes_needed in all. RK_ERR_INVALID: no frame of ours, or too long.
 */
enum rk_status shm_frame_parse(const uint8_t *data, size_t bytes, size_t frame_bytes_max,
                               struct shm_frame *ret_frame, size_t *ret_bytes_needed);
/* Sets all of *ret_get but the deadline; its extents point into scratch, which has room for
 * SHM_EXTENTS_MAX. RK_ERR_INVALID: lengths disagree, or more than pages_max pages. */
enum rk_status shm_get_parse(const struct shm_frame *frame, uint64_t pages_max,
                             struct rk_extent *scratch, struct rk_get *ret_get);
/* Sum over extents; false when one is empty or reversed, or the sum is above pages_max. */
bool shm_extents_pages(const struct rk_extent *extents, size_t num_extents, uint64_t pages_max,
                       uint64_t *ret_pages);
/* The body of a GET up to its extents. */
void shm_get_fill(const struct rk_get *get, struct shm_get *ret_body);
/* "STATUS_NAME text", why a get failed: its bytes without a final NUL; and back. */
size_t shm_failure_format(enum rk_status status, const char *text,
                          char ret_line[SHM_ERROR_TEXT_MAX]);
enum rk_status shm_failure_parse(const uint8_t *line, size_t bytes, struct rk_error *error);
void shm_header_fill(struct shm_frame_header *header, enum shm_frame_type type, uint32_t request_id,
                     size_t body_bytes);

#endif
