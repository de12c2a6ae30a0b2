/*
 * kv_client: put and get of segments' KV: coordinator for the where, store
 * nodes for the bytes. Part of libredknot; what a worker and a connector use.
 *
 * A put is two-phase (Place, write, Commit): visible all or not at all. A get
 * gives pages in place when the store is on this host. A miss is a status
 * RK_MISS_* with a reason; a coordinator or store that is down is a miss, never
 * a hang: every call ends with its caller's `until`, RK_ERR_CANCELLED if that
 * was cancelled. One until serves a whole request: what is left of it is what
 * the next call gets.
 *
 * A client serves the process that made it: in a child after fork() every call
 * is refused with RK_ERR_INVALID, destroying and releasing do nothing. Fork before
 * the first client is made: the child cannot make another one.
 *
 * Threads: any thread may call; calls on one client run side by side (a
 * transport connection per calling thread is taken from a bounded pool).
 */
#ifndef CLIENT_KV_CLIENT_H
#define CLIENT_KV_CLIENT_H

#include "common/base/id.h"
#include "common/base/kv_layout.h"
#include "common/base/origin.h"
#include "common/base/status.h"
#include "common/base/until.h"
#include "common/transport/transport.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rk_kv_client;

struct rk_kv_client_options {
    const char *coordinator; /* "127.0.0.1:7100" */
    int timeout_ms;          /* a metadata call takes at most, 0: 2,000 */
    enum rk_path path;       /* RK_PATH_NONE: the nearest */
};

RK_MUST_CHECK enum rk_status rk_kv_client_create(const struct rk_kv_client_options *options,
                                                 struct rk_kv_client **ret_client,
                                                 struct rk_error *error);
void rk_kv_client_destroy(struct rk_kv_client *client); /* accepts NULL; no hold may be out */

/* Where one segment's KV is. Owned by the caller: rk_kv_locations_free. */
struct rk_kv_location {
    enum rk_status status; /* RK_OK or RK_MISS_* */
    struct rk_id segment_id;
    uint32_t num_tokens;     /* 0 when nothing is known of the segment */
    int32_t *token_ids;      /* [num_tokens] if asked for and known, also with a miss; else NULL */
    char *label;             /* NULL: unknown */
    struct rk_origin origin; /* zeroed: unknown */
    void *shards;            /* of kv_client.c; NULL with a miss */
};

/* Batched: locations[i] answers ids[i]. When the coordinator does not answer, every location is
 * RK_MISS_NODE_DOWN and the call still returns RK_OK. */
RK_MUST_CHECK enum rk_status rk_kv_locate(struct rk_kv_client *client,
                                          const struct rk_id *fingerprint, const struct rk_id *ids,
                                          size_t num_ids, bool with_token_ids,
                                          const struct rk_until *until,
                                          struct rk_kv_location *ret_locations,
                                          struct rk_error *error);
void rk_kv_locations_free(struct rk_kv_location *locations, size_t count);

/* Pages of one segment, across its shards, in the order of the extents. Checksums are carried,
 * not verified: verify where the bytes are used. */
struct rk_kv_pages {
    struct rk_page *pages; /* [num_pages] */
    uint64_t num_pages;
    uint64_t bytes;
    enum rk_path path;
    enum rk_tier tier;
    void *hold; /* connections and pins; keep until rk_kv_release */
};
RK_MUST_CHECK enum rk_status rk_kv_get(struct rk_kv_client *client, const struct rk_id *fingerprint,
                                       const struct rk_kv_layout *layout,
                                       const struct rk_kv_location *location,
                                       const struct rk_extent *extents, size_t num_extents,
                                       const struct rk_until *until, struct rk_kv_pages *ret_pages,
                                       struct rk_error *error);
void rk_kv_release(struct rk_kv_client *client, struct rk_kv_pages *pages);
/*
 * Are these pages still what they were when they came? To be asked after each use, before anything
 * that was made of them is shown: see "The guard" in common/transport/transport.h.
 * RK_MISS_EVICTED: the room of some was given to another. RK_MISS_NODE_DOWN: a store's connection
 * is lost, and its pins with it. Any thread, beside any other use of the client; it never blocks.
 */
RK_MUST_CHECK enum rk_status rk_kv_pages_check(const struct rk_kv_client *client,
                                               const struct rk_kv_pages *pages);

/* pages: [layer][kv_head][page], each rk_kv_page_bytes(layout); checksums alike, XXH3-64 of the
 * whole page. Already stored is RK_OK too (*ret_already, may be NULL). */
struct rk_kv_put {
    struct rk_id segment_id;
    struct rk_id fingerprint;
    struct rk_kv_layout layout;
    uint32_t num_tokens;
    const int32_t *token_ids; /* [num_tokens] or NULL */
    const char *label;        /* or NULL */
    struct rk_origin origin;  /* what it was computed from; zeroed: not told */
    const void *const *pages;
    const uint64_t *checksums;
};
RK_MUST_CHECK enum rk_status rk_kv_put(struct rk_kv_client *client, const struct rk_kv_put *put,
                                       const struct rk_until *until, bool *ret_already,
                                       struct rk_error *error);

RK_MUST_CHECK enum rk_status rk_kv_drop(struct rk_kv_client *client, const struct rk_id *ids,
                                        size_t num_ids, const struct rk_until *until,
                                        uint32_t *ret_dropped, struct rk_error *error);
/*
 * The copy of location that was read is bad: that copy of that generation is evicted, and nothing
 * else; a newer one, another node's shards, chains and tokens stay. bad: a page of it, which names
 * the shard; NULL: all its shards. *ret_dropped (may be NULL): false when it is gone already.
 */
RK_MUST_CHECK enum rk_status rk_kv_drop_copy(struct rk_kv_client *client,
                                             const struct rk_kv_location *location,
                                             const struct rk_extent *bad,
                                             const struct rk_until *until, bool *ret_dropped,
                                             struct rk_error *error);
/* The node that a page of location was read from, borrowed from location; "" when there is none. */
const char *rk_kv_location_node(const struct rk_kv_location *location, const struct rk_extent *of);

#ifdef __cplusplus
}
#endif

#endif
