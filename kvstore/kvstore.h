/*
 * kvstore: one node's store of KV-cache shards (DRAM tier).
 *
 * A shard holds the pages [layer][kv_head][page] of a head range of one
 * segment; a page is 64 tokens, K rows then V rows (common/base/kv_layout.h).
 * Its name is (segment id, shard index) plus a generation. It is written once
 * (begin, pages, seal), becomes visible as a whole at commit, and never
 * changes after that: pages are read in place, pinned by a count.
 *
 * Beside shards it keeps opaque values under a key (common/base/value.h) in the same way; their
 * generations are the store's own.
 *
 * All pages live in one arena, a sealed memfd whose memory is reserved at
 * creation. When a put needs room, the least recently used committed shards
 * without pins are evicted; when that does not help, the put is refused with
 * RK_ERR_FULL.
 *
 * Threads: any. One mutex inside; bytes are copied and hashed outside of it.
 * No call blocks on anything else.
 * Errors:  a miss is RK_MISS_* and is never logged.
 */
#ifndef RK_KVSTORE_KVSTORE_H
#define RK_KVSTORE_KVSTORE_H

#include "common/base/id.h"
#include "common/base/kv_layout.h"
#include "common/base/origin.h"
#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KVSTORE_GRANULE_BYTES          4096
#define KVSTORE_LABEL_MAX              255                 /* bytes; a longer label is cut */
#define KVSTORE_SHARDS_PER_SEGMENT_MAX 256                 /* as the coordinator has */
#define KVSTORE_GENERATION_MAX         (UINT64_C(1) << 62) /* exclusive; far over any counter */

struct kvstore;
struct kvstore_put;   /* a shard being written; belongs to one thread at a time */
struct kvstore_shard; /* a pinned, committed shard; immutable */

struct kvstore_options {
    uint64_t dram_bytes;    /* multiple of KVSTORE_GRANULE_BYTES; reserved at creation */
    uint32_t shards_max;    /* and values, staged and committed together, 0: 1,048,576 */
    uint32_t staged_ttl_ms; /* a shard not committed for so long is collected, 0: 30,000 */
    uint32_t removed_max;   /* shards remembered for kvstore_removed_take, 0: 4,096 */
};

enum kvstore_kind { KVSTORE_SHARD, KVSTORE_VALUE };

/*
 * What a shard is. Text and tokens are borrowed by calls and owned by shards. Of a value only
 * key, key_bytes and value_bytes are given; its id and generation are made by the store.
 */
struct kvstore_header {
    enum kvstore_kind kind;
    struct rk_id segment_id;
    struct rk_id fingerprint;
    uint64_t generation;
    uint32_t shard_index;
    uint32_t num_shards;
    struct rk_head_range heads;
    struct rk_kv_layout layout;
    uint32_t num_tokens;
    const int32_t *token_ids; /* NULL with num_token_ids 0 */
    uint32_t num_token_ids;   /* 0 or num_tokens */
    const char *label;        /* NULL counts as "" */
    struct rk_origin origin;  /* zeroed: not known */
    const void *key;
    uint32_t key_bytes;
    uint64_t value_bytes; /* under a key that is stored already: RK_ERR_EXISTS */
};

/* Names one shard of one generation. */
struct kvstore_name {
    enum kvstore_kind kind; /* ids of values and of segments are apart, also when they are equal */
    struct rk_id segment_id;
    uint64_t generation;
    uint32_t shard_index;
};

struct kvstore_stats {
    uint64_t capacity_bytes;
    uint64_t used_bytes;   /* staged ones too */
    uint64_t pinned_bytes; /* of shards with at least one pin */
    uint64_t num_shards;   /* committed */
    uint64_t num_values;   /* committed */
    uint64_t num_staged;
    uint64_t num_pins;
    uint64_t gets;
    uint64_t misses[RK_STATUS_COUNT]; /* by RK_MISS_* */
    uint64_t evictions;
    uint64_t put_bytes;             /* accepted by put_write */
    uint64_t checksum_failures;     /* on arrival and by the scrubber */
    uint64_t put_checksum_failures; /* of these, on arrival: a writer's fault, no bad memory here */
    uint64_t staged_collected;
    uint64_t scrubbed_bytes;
};

/* ---- Life ---- */

/* On RK_OK the caller owns *ret_store. RK_ERR_NO_MEMORY: the arena cannot be reserved. */
RK_MUST_CHECK enum rk_status kvstore_create(const struct kvstore_options *options,
                                            struct kvstore **ret_store, struct rk_error *error);
/* Accepts NULL and half-built stores. No pin and no put may be outstanding. */
void kvstore_destroy(struct kvstore *store);

/* The sealed memfd; borrowed, writable only through the store's own mapping. */
int kvstore_arena_fd(const struct kvstore *store);
const void *kvstore_arena(const struct kvstore *store);
uint64_t kvstore_arena_bytes(const struct kvstore *store);
/* Behind the arena lie so many seals (common/transport/transport.h): one for each granule, of
 * which a shard uses that of its first one. */
uint64_t kvstore_num_seals(const struct kvstore *store);
void kvstore_stats_get(struct kvstore *store, struct kvstore_stats *ret_stats);

/* ---- Put, in two phases ---- */

/* All bytes that follow a header, and those of a page; 0: the header makes no sense. */
uint64_t kvstore_header_bytes(const struct kvstore_header *header, uint32_t *ret_page_bytes);

/*
 * Reserves room for the whole shard; evicts if it must.
 * RK_ERR_INVALID: header; RK_ERR_EXISTS: this or a newer generation is
 * committed; RK_ERR_BUSY: this generation is being written; RK_ERR_FULL;
 * RK_ERR_NO_MEMORY. A sealed shard of the same generation is replaced.
 */
RK_MUST_CHECK enum rk_status kvstore_put_begin(struct kvstore *store,
                                               const struct kvstore_header *header,
                                               struct kvstore_put **ret_put,
                                               struct rk_error *error);
/*
 * The next bytes of the pages in the order layer, KV head, page, back to back; a page may come in
 * several calls. checksums: XXH3-64 of each page that ends in these bytes, and of no other; each
 * page is verified where it now lives. After any error nothing of the shard is kept:
 * RK_ERR_CORRUPT, RK_ERR_INVALID (more bytes than there are to come, another number of
 * checksums), RK_ERR_CANCELLED (aborted or collected meanwhile).
 */
RK_MUST_CHECK enum rk_status kvstore_put_write(struct kvstore_put *put, const void *data,
                                               size_t bytes, const uint64_t *checksums,
                                               size_t num_checksums, struct rk_error *error);
/* All pages are here: the shard waits for its commit. RK_ERR_INVALID: pages are missing. */
RK_MUST_CHECK enum rk_status kvstore_put_seal(struct kvstore_put *put, struct rk_error *error);
/* Seals and commits at once: for values, which have one holder. Errors of both. */
RK_MUST_CHECK enum rk_status kvstore_put_commit(struct kvstore_put *put, struct rk_error *error);
enum kvstore_kind kvstore_put_kind(const struct kvstore_put *put);
/* Ends the writing; what was not sealed is dropped. Accepts NULL. */
void kvstore_put_destroy(struct kvstore_put *put);

/*
 * Makes a sealed shard visible; an older generation goes as soon as it has no
 * pin. Committing what is committed is RK_OK. RK_ERR_NOT_FOUND: not sealed
 * here; RK_ERR_EXISTS: a newer generation is held (the staged one is dropped).
 */
RK_MUST_CHECK enum rk_status kvstore_commit(struct kvstore *store, const struct kvstore_name *name,
                                            struct rk_error *error);
/* Drops a staged shard. RK_ERR_NOT_FOUND: nothing staged under this name. */
RK_MUST_CHECK enum rk_status kvstore_abort(struct kvstore *store, const struct kvstore_name *name);
/* Drops a staged or committed shard; its room comes back with its last pin. generation 0: any
 * committed one. RK_ERR_NOT_FOUND: no such generation here. */
RK_MUST_CHECK enum rk_status kvstore_drop(struct kvstore *store, const struct kvstore_name *name);

/* ---- Get ---- */

/*
 * Pins a committed shard. fingerprint NULL: not compared. RK_MISS_ABSENT,
 * RK_MISS_EVICTED, RK_MISS_FINGERPRINT, RK_MISS_STALE_GENERATION.
 */
RK_MUST_CHECK enum rk_status kvstore_pin(struct kvstore *store, const struct kvstore_name *name,
                                         const struct rk_id *fingerprint,
                                         const struct kvstore_shard **ret_shard);
/* Pins what is stored under a key. RK_MISS_ABSENT, RK_MISS_EVICTED. */
RK_MUST_CHECK enum rk_status kvstore_pin_value(struct kvstore *store, const struct rk_id *id,
                                               const struct kvstore_shard **ret_shard);
bool kvstore_has_value(struct kvstore *store, const struct rk_id *id); /* leaves its age alone */
void kvstore_unpin(struct kvstore *store, const struct kvstore_shard *shard);

/* Of a pinned shard; no lock is taken. */
const struct kvstore_header *kvstore_shard_header(const struct kvstore_shard *shard);
size_t kvstore_shard_page_bytes(const struct kvstore_shard *shard);
uint64_t kvstore_shard_pages(const struct kvstore_shard *shard);
uint64_t kvstore_shard_bytes(const struct kvstore_shard *shard); /* of all pages */
/* Not 0, and unique, until the shard is removed and its last pin is gone, or a page of it is found
 * to be damaged. */
uint64_t kvstore_shard_seal(const struct kvstore_shard *shard, uint64_t *ret_index);
/* Of a page: page_bytes, but for a value's last one. */
size_t kvstore_shard_page_length(const struct kvstore_shard *shard, uint64_t page);
/* page: in the order layer, KV head, page of the shard. */
void kvstore_shard_page(const struct kvstore_shard *shard, uint64_t page, uint64_t *ret_offset,
                        uint64_t *ret_checksum);
/*
 * Offsets in the arena and checksums of the pages of extents, in their order;
 * layer and head indices are global. No extents: all pages. *num_pages: in,
 * room of the arrays; out, written. RK_ERR_INVALID: an extent reaches outside
 * the shard. RK_ERR_TOO_LONG: no room.
 */
RK_MUST_CHECK enum rk_status kvstore_shard_extents(const struct kvstore_shard *shard,
                                                   const struct rk_extent *extents,
                                                   size_t num_extents, uint64_t *ret_offsets,
                                                   uint64_t *ret_checksums, uint64_t *num_pages,
                                                   struct rk_error *error);

/* ---- The lease: may values be out of date? (lease.c) ---- */

/*
 * From the first call on, values are given and taken only until then (monotonic); after that a read
 * is RK_MISS_NODE_DOWN and a put RK_ERR_UNAVAILABLE. A lease that ended is renewed a second later
 * at the earliest: until then this does nothing.
 */
void kvstore_values_renew(struct kvstore *store, int64_t until_ns);
/* The same, but a lease that ended stays ended. */
void kvstore_values_extend(struct kvstore *store, int64_t until_ns);
bool kvstore_values_sure(struct kvstore *store);

/* ---- Upkeep ---- */

/* Drops staged shards whose time to live has passed at now_ns; returns how many. */
uint32_t kvstore_collect(struct kvstore *store, int64_t now_ns);
/*
 * Verifies about bytes_max more bytes of committed shards, round robin; drops
 * a shard with a bad page. For one thread. Returns the bytes verified.
 */
uint64_t kvstore_scrub(struct kvstore *store, uint64_t bytes_max);
/*
 * Committed shards, not values, that were removed since the last call, oldest first.
 * *ret_lost: some were forgotten since; the whole inventory must be announced.
 */
size_t kvstore_removed_take(struct kvstore *store, struct kvstore_name *ret_names, size_t names_max,
                            bool *ret_lost);
/* Gives up all values, also those being written: they may be older than what other stores hold.
 * Readers keep what they pinned. Returns how many were committed. */
uint64_t kvstore_values_forget(struct kvstore *store);
/* Names of committed shards, not of values, for a walk that pins each in turn. Caller frees with
 * rk_free. */
RK_MUST_CHECK enum rk_status kvstore_list(struct kvstore *store, struct kvstore_name **ret_names,
                                          size_t *ret_num_names);
/* A copy of a committed shard's header, its text and tokens in the same block, without touching
 * its age. Caller frees with rk_free. RK_ERR_NOT_FOUND, RK_ERR_NO_MEMORY. */
RK_MUST_CHECK enum rk_status kvstore_describe(struct kvstore *store,
                                              const struct kvstore_name *name,
                                              struct kvstore_header **ret_header);
/* For tests of corruption: flips one byte of the first page of the oldest committed shard. */
RK_MUST_CHECK enum rk_status kvstore_fault_inject(struct kvstore *store,
                                                  struct kvstore_name *ret_name,
                                                  uint64_t *ret_offset);

#endif
