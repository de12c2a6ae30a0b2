/*
 * wire: the bytes that the paths share, and the frames on a store's Unix socket.
 *
 * All little endian, packed; the ends may be of different versions. Parsing is
 * pure and trusts nothing.
 *
 * What is asked for, what was found, what is put and how it went are bodies
 * that the shm and the UCX path send alike; gRPC has its own in
 * redknot.v1.KvStore. Each answer to a get names what it is about, which the
 * reader compares with what it asked before it looks at a checksum: those come
 * along with the bytes, also with wrong ones. On the socket the client says
 * HELLO and the server answers HELLO_REPLY, which says who it is, with the
 * arena's descriptor beside it; GET is answered by
 * FOUND, RELEASE (pin ids, u64 each) by nothing. For a put the client hands over its outbox once
 * (OUTBOX, a sealed memfd beside it); PUT says what comes, PUT_DATA where in
 * the outbox the next bytes lie, each answered by TAKEN, and the last one by
 * RESULTS behind it.
 */
#ifndef RK_COMMON_TRANSPORT_WIRE_INTERNAL_H
#define RK_COMMON_TRANSPORT_WIRE_INTERNAL_H

#include "common/transport/transport.h"

#include <sys/uio.h>

#define SHM_MAGIC            0x4b4e4452u /* "RDNK" */
#define SHM_VERSION          3
#define WIRE_EXTENTS_MAX     65536u     /* of a batch */
#define WIRE_PAGES_MAX       (1u << 20) /* of a batch */
#define WIRE_HEADS_BYTES_MAX (16u << 20)
#define WIRE_FRAME_SUMS_MAX  256u /* pages that end in one frame of data */
#define WIRE_TEXT_MAX        480u

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are read in place");

/* ---- Bodies: a count (u32), then so many of these ---- */

struct __attribute__((packed)) wire_get {
    uint8_t id[RK_ID_BYTES];
    uint8_t fingerprint[RK_ID_BYTES];
    uint64_t generation;
    uint64_t bytes_max; /* of a value */
    uint32_t shard_index;
    uint32_t page_bytes;  /* 0: a value */
    uint32_t num_extents; /* so many struct rk_extent follow; 0 with a value */
};

struct __attribute__((packed)) wire_found {
    uint8_t id[RK_ID_BYTES]; /* of what was found, or was not */
    uint64_t generation;     /* of a shard what was asked for, of a value the store's own */
    uint64_t seal_index;     /* shm; which one, and */
    uint64_t seal;           /* its value; 0: none */
    uint64_t pin_id;         /* shm */
    uint64_t bytes;
    uint32_t page_bytes;
    uint32_t num_pages; /* so many checksums follow (ucx), or struct wire_page (shm) */
    uint32_t tier;
    uint32_t text_bytes; /* not 0: nothing was found, and "STATUS text" follows instead */
};

struct __attribute__((packed)) wire_page {
    uint64_t offset;
    uint64_t checksum;
};

/* Who answers. */
struct __attribute__((packed)) wire_identity {
    uint64_t incarnation;           /* 0: not told */
    char node_id[RK_NODE_ID_BYTES]; /* the rest is 0 */
};

/* A put's heads and its results are a length (u32) and so many bytes each; a result is
 * "STATUS text". */

/* ---- Reading and building ---- */

/* What is left of a body. */
struct wire_reader {
    const uint8_t *at;
    size_t left;
};
bool wire_take(struct wire_reader *reader, void *ret, size_t bytes);
/* A length, then so many bytes, which stay where they are. */
bool wire_take_block(struct wire_reader *reader, const uint8_t **ret_data, uint32_t *ret_bytes);

/* Grows; kept from request to request. A failed append marks it, and later ones do nothing. */
struct wire_buffer {
    uint8_t *data;
    size_t bytes;
    size_t room;
    bool failed; /* out of memory */
};
void *wire_append(struct wire_buffer *buffer, const void *data,
                  size_t bytes); /* data NULL: zeros */
void wire_append_count(struct wire_buffer *buffer, uint32_t count);

void wire_gets_append(struct wire_buffer *buffer, const struct rk_get *gets, size_t num_gets);
/* The extents of all items point into scratch, which has room for WIRE_EXTENTS_MAX; ret_gets has
 * room for RK_TRANSPORT_ITEMS_MAX. RK_ERR_INVALID: lengths disagree, or a limit is passed. */
enum rk_status wire_gets_parse(const uint8_t *body, size_t bytes, struct rk_extent *scratch,
                               struct rk_get *ret_gets, size_t *ret_num_gets);
/* Sum over extents; false when one is empty or reversed, or the sum is above pages_max. */
bool wire_extents_pages(const struct rk_extent *extents, size_t num_extents, uint64_t pages_max,
                        uint64_t *ret_pages);

/* offsets NULL: checksums alone. */
void wire_found_append(struct wire_buffer *buffer, const struct rk_found *found, uint64_t pin_id,
                       const uint64_t *offsets, const uint64_t *checksums);
void wire_failure_append(struct wire_buffer *buffer, const struct rk_get *get,
                         enum rk_status status, const char *text);
/* Is it what was asked for? */
bool wire_found_fits(const struct rk_get *get, uint64_t bytes, uint32_t page_bytes,
                     uint64_t num_pages);
/*
 * One item of a reply, with its pages' array made and their checksums set. Its status is set to
 * what the store says, its text to error if that is the first. *ret_entries: wire_page's, or
 * checksums. RK_ERR_UNAVAILABLE: no such reply, or about another id, generation or size than was
 * asked for. RK_ERR_NO_MEMORY.
 */
enum rk_status wire_found_parse(struct wire_reader *reader, bool with_offsets,
                                const struct rk_get *get, struct rk_pages *ret_pages,
                                struct wire_found *ret_found, const uint8_t **ret_entries,
                                struct rk_error *error);

struct wire_identity wire_identity_make(const char *node_id, uint64_t incarnation);
/* RK_ERR_UNAVAILABLE: none, or not the one that was looked for. */
enum rk_status wire_identity_check(const struct wire_identity *identity, const char *wanted_id,
                                   uint64_t wanted_incarnation, struct rk_error *error);

void wire_heads_append(struct wire_buffer *buffer, const struct rk_put *puts, size_t num_puts);
void wire_result_append(struct wire_buffer *buffer, enum rk_status status, const char *text);
/* Sets the puts' statuses. RK_ERR_UNAVAILABLE: no such reply. */
enum rk_status wire_results_parse(const uint8_t *body, size_t bytes, struct rk_put *puts,
                                  size_t num_puts, struct rk_error *error);

/* "STATUS_NAME text", why something failed: its bytes without a final NUL; and back. */
size_t wire_text_format(enum rk_status status, const char *text, char ret_line[WIRE_TEXT_MAX]);
enum rk_status wire_text_parse(const uint8_t *line, size_t bytes, struct rk_error *error);

/* ---- The bytes of a put, in frames ---- */

struct wire_outflow {
    const struct rk_put *puts;
    size_t num_puts;
    size_t item;
    uint64_t page;
    uint64_t page_done; /* bytes of this page */
    uint64_t offset;    /* of the next byte among those of all items */
};

struct wire_frame {
    struct iovec *parts; /* [parts_max], of the caller */
    size_t parts_max;
    size_t num_parts;
    size_t bytes;
    uint64_t checksums[WIRE_FRAME_SUMS_MAX]; /* of the pages that end in it */
    uint32_t num_checksums;
};

/* False: all is out. */
bool wire_outflow_next(struct wire_outflow *outflow, size_t bytes_max, struct wire_frame *frame);

/* ---- Frames on the Unix socket ---- */

enum shm_frame_type {
    SHM_HELLO = 1,
    SHM_HELLO_REPLY = 2,
    SHM_GET = 3,
    SHM_FOUND = 4,
    SHM_RELEASE = 5,
    SHM_OUTBOX = 6,
    SHM_PUT = 7,
    SHM_PUT_DATA = 8,
    SHM_TAKEN = 9,
    SHM_RESULTS = 10,
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
    uint64_t num_seals;
    struct wire_identity identity;
};

struct __attribute__((packed)) shm_outbox {
    uint64_t bytes;
};

struct __attribute__((packed)) shm_put_data {
    uint64_t place; /* in the outbox */
    uint32_t bytes;
    uint32_t num_checksums; /* so many u64 follow */
};

#define SHM_REQUEST_BYTES_MAX (sizeof(struct shm_frame_header) + 4 + WIRE_HEADS_BYTES_MAX)
#define SHM_REPLY_BYTES_MAX                                                                        \
    (sizeof(struct shm_frame_header) + 4 +                                                         \
     RK_TRANSPORT_ITEMS_MAX * (sizeof(struct wire_found) + WIRE_TEXT_MAX) +                        \
     (size_t)WIRE_PAGES_MAX * sizeof(struct wire_page))

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
void shm_header_fill(struct shm_frame_header *header, enum shm_frame_type type, uint32_t request_id,
                     size_t body_bytes);

#endif
