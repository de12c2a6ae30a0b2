/*
 * transport: how pages move between a store node and its readers and writers.
 *
 * One interface, several paths, chosen at connect by distance:
 *   shm   same host: the store's arena (a sealed memfd, passed over a Unix
 *         socket) is mapped read-only; pages are read in place, pinned by a
 *         count that the store drops when the reader's connection dies.
 *   ucx   other hosts: UCX active messages, pushed by whoever has the bytes.
 *   grpc  anyone: a stream.
 *
 * The only user of shared memory and of UCX. Pages carry the checksums that
 * their writer made; a reader either verifies where it uses the bytes
 * (rk_page_verify) or asks the transport to (rk_get.verify), which then looks
 * at each page as it arrives, while the next are on their way.
 *
 * The guard: pages read in place are the store's memory. A pin keeps them; the
 * seal says whether it did. The store has a word of 64 bits for each thing it
 * holds, behind the arena in the same memory: not 0, and never twice the same,
 * while the bytes may be read; 0 before their room is another's. Its two ends
 * are a seqlock's (H.-J. Boehm, "Can seqlocks get along with programming
 * language memory models?", MSPC 2012):
 *   store   seal = 0; fence (seq_cst); writes into the room; ...; seal = another
 *   reader  reads the bytes; fence (acquire); reads the seal
 * Whoever has read a byte that was written after the seal was broken reads a
 * broken seal after it. So a checksum that matched once and a seal that is
 * whole after the last use say that all that was read in between was what the
 * writer wrote: rk_transport_check() after the use is what counts. One before
 * it only saves work, and a checksum before it says nothing of what comes
 * after. As with any seqlock the reads race with the writes, which C does not
 * define; what was read is thrown away then, and nothing may have been done
 * with it that cannot be taken back.
 *
 * Client threads: a connection is used by one thread at a time, but for
 * rk_transport_check(), which any thread may call beside it.
 */
#ifndef RK_COMMON_TRANSPORT_TRANSPORT_H
#define RK_COMMON_TRANSPORT_TRANSPORT_H

#include "common/base/id.h"
#include "common/base/kv_layout.h"
#include "common/base/status.h"
#include "common/base/until.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_TRANSPORT_ITEMS_MAX 256 /* of one batch */

/* Values are those of redknot.v1.Path and redknot.v1.Tier. */
enum rk_path { RK_PATH_NONE = 0, RK_PATH_SHM = 1, RK_PATH_GRPC = 2, RK_PATH_UCX = 3 };
enum rk_tier { RK_TIER_NONE = 0, RK_TIER_DRAM = 1, RK_TIER_HBM = 2, RK_TIER_NVME = 3 };
const char *rk_path_name(enum rk_path path); /* "shm", "grpc", ... */

/* Boot id of this machine (32 hex digits and dashes), or "" where it cannot be read. */
const char *rk_host_id(void);

/* ---- Reader and writer ---- */

struct rk_transport;

/* Text is borrowed during the call. */
struct rk_transport_endpoint {
    const char *grpc_address; /* required */
    const char *host_id;      /* "" when unknown */
    const char *shm_socket;   /* "" when not served */
    const char *ucx_address;  /* host:port, "" when not served */
    /* Who must answer there: another one is RK_ERR_UNAVAILABLE. NULL or "", and 0: whoever does. */
    const char *node_id;
    uint64_t incarnation;
};

/* One item of a batch: pages of a shard, or a whole value. */
struct rk_get {
    struct rk_id id;          /* of the segment or the value */
    struct rk_id fingerprint; /* shards */
    uint64_t generation;      /* shards */
    uint32_t shard_index;
    /* Of a shard what the reader expects; another size is MISS_FINGERPRINT. 0: a value. */
    uint32_t page_bytes;
    const struct rk_extent *extents; /* of a shard, at least one; borrowed during the call */
    size_t num_extents;
    /* Where to: room for all pages, or for bytes_max of a value. NULL: pages stay where the path
     * brings them, until they are released. */
    void *buffer;
    uint64_t bytes_max; /* of a value; a longer one is RK_ERR_TOO_LONG */
    bool verify;        /* a page that does not match is RK_MISS_CHECKSUM */
};

struct rk_page {
    const void *data;  /* page_bytes; read-only unless it lies in the reader's buffer */
    uint64_t checksum; /* XXH3-64 made by the writer */
};

/* What one item brought. */
struct rk_pages {
    enum rk_status status; /* of the item: RK_OK, RK_MISS_*, RK_ERR_*; then nothing else is set */
    struct rk_page *pages; /* in the order of the extents; the last one of a value is shorter */
    uint64_t num_pages;
    uint32_t page_bytes;
    uint64_t bytes;      /* of all pages */
    uint64_t generation; /* of the shard; of a value the store's own */
    enum rk_tier tier;
    bool in_place;        /* the store's memory; else a copy, which nobody else changes */
    const uint64_t *seal; /* in place, of a store that has them: where it is, and whole */
    uint64_t seal_value;
    void *hold; /* of the transport */
};

/* One item to write. head says what it is, in the store's own words (redknot.v1.PutItem, packed);
 * the transport does not look into it. */
struct rk_put {
    const void *head;
    size_t head_bytes;
    const void *const *pages;  /* [num_pages], each page_bytes, but for a shorter last one */
    const uint64_t *checksums; /* [num_pages]; NULL: made on the way */
    uint64_t num_pages;
    uint32_t page_bytes;
    uint64_t bytes;        /* of all pages */
    enum rk_status status; /* out */
};

/* path RK_PATH_NONE: the nearest that works (shm, else ucx, else grpc); each but the last may use a
 * third of the time that is left. Else that one or an error. Whoever is connected has spoken: a
 * port that takes connections and says nothing is RK_ERR_UNAVAILABLE. */
RK_MUST_CHECK enum rk_status rk_transport_connect(const struct rk_transport_endpoint *endpoint,
                                                  enum rk_path path, int timeout_ms,
                                                  struct rk_transport **ret_transport,
                                                  struct rk_error *error);
/* The same for a caller that may lose interest: also RK_ERR_CANCELLED. */
RK_MUST_CHECK enum rk_status rk_transport_connect_until(
    const struct rk_transport_endpoint *endpoint, enum rk_path path, const struct rk_until *until,
    struct rk_transport **ret_transport, struct rk_error *error);
enum rk_path rk_transport_path(const struct rk_transport *transport);
/* The path that would be tried first; RK_PATH_NONE: there is none. */
enum rk_path rk_transport_nearest(const struct rk_transport_endpoint *endpoint);
/*
 * RK_OK: the store answered; each item's status says what it said, and error has the text of the
 * first that failed. Else no item has pages: RK_ERR_DEADLINE, RK_ERR_CANCELLED,
 * RK_ERR_UNAVAILABLE (drop this connection), RK_ERR_INVALID, RK_ERR_NO_MEMORY. What is late is an
 * error here; whether it is a miss is for the client to say.
 * ret_pages: [num_gets], each to be released; it may be released after the connection failed.
 */
RK_MUST_CHECK enum rk_status rk_transport_get(struct rk_transport *transport,
                                              const struct rk_get *gets, size_t num_gets,
                                              const struct rk_until *until,
                                              struct rk_pages *ret_pages, struct rk_error *error);
/* Never blocks, and never fails: what a store that is behind does not take is kept, and goes with
 * the next request or rk_transport_flush(). */
void rk_transport_release(struct rk_transport *transport, struct rk_pages *pages, size_t num_pages);
/* Tries to send what releases left here, for a connection that lies idle: the store cannot evict
 * what it still takes for pinned. Cheap when there is nothing; never blocks. False: some is left.
 */
bool rk_transport_flush(struct rk_transport *transport);
/*
 * Are these pages still what they were when they came? RK_OK: whatever was read of them before the
 * call was. RK_MISS_EVICTED: their room was given to another, though they are pinned. That is a
 * fault of the store's or of ours; what was made of them must not be used. RK_MISS_NODE_DOWN: the
 * connection is lost, and its pins with it. A copy is always RK_OK.
 * Any thread, beside any other use of the connection; reads one word and asks poll(2) once.
 */
RK_MUST_CHECK enum rk_status rk_transport_check(const struct rk_transport *transport,
                                                const struct rk_pages *pages);
/* Its parts, for whoever asks for many pages: the seal alone, and the connection alone. */
bool rk_pages_sealed(const struct rk_pages *pages);
bool rk_transport_alive(const struct rk_transport *transport);
/* As get: RK_OK, and a status in each put. When it returns nothing reads the pages any more. */
RK_MUST_CHECK enum rk_status rk_transport_put(struct rk_transport *transport, struct rk_put *puts,
                                              size_t num_puts, const struct rk_until *until,
                                              struct rk_error *error);
/* Outstanding pages must be released first. Accepts NULL. */
void rk_transport_destroy(struct rk_transport *transport);

bool rk_page_verify(const struct rk_page *page, size_t page_bytes);

/* ---- Store side ---- */

/* What a store has pinned. The paths tell their reader what is here, not what it asked for. */
struct rk_found {
    void *pin;
    struct rk_id id;
    uint64_t generation;
    uint64_t seal; /* 0: this store has none */
    uint64_t seal_index;
    uint64_t num_pages;
    uint32_t page_bytes;
    uint64_t bytes; /* of all pages: the last one may be shorter */
    enum rk_tier tier;
};

/* What a store does for a path. Called on the path's own thread; must be safe beside the store's
 * other callers. */
struct rk_transport_store_ops {
    /* Pins what an item asks for and gives its pages' byte offsets in the arena and checksums, in
     * the order of the extents. RK_ERR_TOO_LONG: more than pages_max. */
    enum rk_status (*pin)(void *context, enum rk_path path, const struct rk_get *get,
                          uint64_t pages_max, uint64_t *ret_offsets, uint64_t *ret_checksums,
                          struct rk_found *ret_found, struct rk_error *error);
    void (*unpin)(void *context, void *pin);
    /* Begins an item that is written. *ret_bytes, how many bytes of it follow, and
     * *ret_page_bytes are also set with most errors, for they must be passed over; 0 when the
     * head does not say. */
    enum rk_status (*put_begin)(void *context, enum rk_path path, const void *head,
                                size_t head_bytes, void **ret_put, uint64_t *ret_bytes,
                                uint32_t *ret_page_bytes, struct rk_error *error);
    /* The next bytes, and a checksum for each page that ends in them. */
    enum rk_status (*put_write)(void *context, void *put, const void *data, size_t bytes,
                                const uint64_t *checksums, size_t num_checksums,
                                struct rk_error *error);
    enum rk_status (*put_end)(void *context, void *put, struct rk_error *error); /* all is there */
    void (*put_destroy)(void *context, void *put);
};

/*
 * The items of one put as they come in, over any path: gives each its bytes, passes over those of
 * items that failed, and remembers how each went. One thread at a time.
 */
struct rk_intake;

RK_MUST_CHECK enum rk_status rk_intake_create(const struct rk_transport_store_ops *ops,
                                              void *context, size_t items_max,
                                              struct rk_intake **ret_intake);
/* The next item, as put_begin left it. bytes 0, when its size is not known: the whole put fails
 * with its status. */
void rk_intake_add(struct rk_intake *intake, enum rk_status status, const char *text, void *put,
                   uint64_t bytes, uint32_t page_bytes);
/* RK_ERR_INVALID: more bytes than there are to come, or another number of checksums than of pages
 * that end in them; then the put is over. */
RK_MUST_CHECK enum rk_status rk_intake_write(struct rk_intake *intake, const void *data,
                                             size_t bytes, const uint64_t *checksums,
                                             size_t num_checksums);
bool rk_intake_whole(const struct rk_intake *intake);
void rk_intake_end(struct rk_intake *intake); /* once, when it is whole */
size_t rk_intake_items(const struct rk_intake *intake);
enum rk_status rk_intake_result(const struct rk_intake *intake, size_t item,
                                const char **ret_text); /* borrowed */
void rk_intake_destroy(struct rk_intake *intake);       /* accepts NULL; drops what did not end */

#define RK_NODE_ID_BYTES 256 /* with its final NUL */

/* The room of so many seals behind an arena. */
static inline uint64_t rk_seals_bytes(uint64_t num_seals)
{
    return (num_seals * sizeof(uint64_t) + 4095) / 4096 * 4096;
}

struct rk_shm_server;

struct rk_shm_server_options {
    const char *socket_path; /* made with mode 0600, replaced if stale, removed at stop */
    int arena_fd;            /* borrowed memfd, sealed against shrinking and future writes */
    uint64_t arena_bytes;
    uint64_t num_seals;  /* u64, behind the arena (rk_seals_bytes); 0: none */
    const char *node_id; /* told to readers, at most RK_NODE_ID_BYTES - 1; NULL: not */
    uint64_t incarnation;
    uint32_t connections_max; /* 0: 256 */
    uint32_t pins_max;        /* per connection, 0: 4,096 */
    uint64_t pages_max;       /* per item, 0: 1 << 20 */
    const struct rk_transport_store_ops *ops;
    void *context;
};

RK_MUST_CHECK enum rk_status rk_shm_server_start(const struct rk_shm_server_options *options,
                                                 struct rk_shm_server **ret_server,
                                                 struct rk_error *error);
/* Unpins all, also what readers go on reading: nothing may be written into the arena after it.
 * Accepts NULL. */
void rk_shm_server_stop(struct rk_shm_server *server);
/* For tests of the guard, a fault: gives back all pins of all readers, who are not told. Returns
 * when it is done. */
void rk_shm_server_fault_unpin(struct rk_shm_server *server);

struct rk_ucx_server;

struct rk_ucx_server_options {
    const char *listen;       /* host:port, port 0: any; borrowed until stop */
    const void *arena;        /* borrowed until stop */
    uint32_t connections_max; /* 0: 256 */
    uint32_t requests_max;    /* gets and puts under way, per connection; 0: 64 */
    bool rendezvous;          /* for large pieces also over tcp; elsewhere it is always used */
    const char *node_id;      /* as for shm */
    uint64_t incarnation;
    const struct rk_transport_store_ops *ops;
    void *context;
};

/* RK_ERR_UNSUPPORTED: this machine has no UCX. RK_ERR_UNAVAILABLE: the address cannot be used. */
RK_MUST_CHECK enum rk_status rk_ucx_server_start(const struct rk_ucx_server_options *options,
                                                 struct rk_ucx_server **ret_server,
                                                 struct rk_error *error);
int rk_ucx_server_port(const struct rk_ucx_server *server);
void rk_ucx_server_stop(struct rk_ucx_server *server); /* unpins all; accepts NULL */

#ifdef __cplusplus
}
#endif

#endif
