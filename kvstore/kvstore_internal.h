/*
 * The store's own structures, shared by kvstore.c, put.c and read.c.
 *
 * A shard is WRITING, then SEALED, then COMMITTED; GONE is the end of each. A
 * slot is what the table holds for one (segment id, shard index): at most one
 * committed shard and a list of staged ones. It is made by put_begin, so that
 * commit allocates nothing and cannot fail half way.
 *
 * Everything below is guarded by store->mutex, except the bytes of pinned
 * pages and the fields of a shard marked "fixed".
 */
#ifndef RK_KVSTORE_KVSTORE_INTERNAL_H
#define RK_KVSTORE_KVSTORE_INTERNAL_H

#include "common/base/alloc.h"
#include "kvstore/kvstore.h"
#include "kvstore/space_internal.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define uthash_malloc(bytes)       rk_alloc(bytes)
#define uthash_free(block, bytes)  rk_free(block)
#define HASH_NONFATAL_OOM          1
#define uthash_nonfatal_oom(added) ((void)0) /* The caller sees hh.tbl == NULL. */
/* Ids are uniform: their first bytes are a hash, and the shard index tells a segment's shards
 * apart. The key is a struct slot_key. */
#define HASH_FUNCTION(key, bytes, hash) ((hash) = kvstore_slot_hash(key))
#include <uthash.h>

#define EVICTED_SLOTS (1u << 16)

enum shard_state { SHARD_WRITING, SHARD_SEALED, SHARD_COMMITTED, SHARD_GONE };

/* Pages lie packed inside a run; a page never crosses runs. */
struct run {
    uint64_t page_begin;
    uint32_t granule_begin;
    uint32_t granules;
};

struct shard_links {
    struct kvstore_shard *prev;
    struct kvstore_shard *next;
};

struct kvstore_shard {
    /* Fixed from begin on. */
    struct kvstore_header header;
    uint64_t page_bytes;
    uint64_t num_pages;
    uint64_t bytes; /* of all pages: the last one of a value is shorter */
    uint32_t pages_per_head;
    uint32_t granules;
    struct run *runs;
    uint32_t num_runs;
    /* Written by the one writer, fixed from seal on. */
    uint64_t *checksums;
    uint64_t seal; /* 0 before commit; fixed from then on */

    enum shard_state state;
    bool writer;   /* a kvstore_put refers to it */
    uint32_t pins; /* readers, or copies of the writer in flight */
    int64_t touched_ns;
    struct slot *slot;
    struct shard_links all;            /* staged list, or committed list in the order of commit */
    struct shard_links lru;            /* committed and not pinned, least recently used first */
    struct kvstore_shard *staged_next; /* of its slot */
};

struct shard_list {
    struct kvstore_shard *head;
    struct kvstore_shard *tail;
};

/* Hashed as bytes: no padding. */
struct slot_key {
    uint8_t segment_id[RK_ID_BYTES];
    uint32_t shard_index;
    uint32_t kind; /* a peer may well put a shard under a value's id: it is another thing */
};

static inline unsigned kvstore_slot_hash(const void *key)
{
    struct slot_key copy;
    unsigned hash = 0;
    memcpy(&copy, key, sizeof(copy));
    memcpy(&hash, copy.segment_id, sizeof(hash));
    return hash + copy.shard_index * 2654435761u + copy.kind * 2246822519u;
}

struct slot {
    struct slot_key key;
    struct kvstore_shard *committed;
    struct kvstore_shard *staged;
    UT_hash_handle hh;
};

/* lease.c */
struct values_lease {
    int64_t until_ns; /* 0: none is needed */
    int64_t ended_ns; /* when that was noticed; 0: it has not */
};

struct kvstore {
    pthread_mutex_t mutex;
    bool mutex_made;
    struct kvstore_options options;
    int fd;
    uint8_t *arena;
    _Atomic uint64_t *seals; /* [granules], behind the arena */
    uint64_t last_seal;
    struct space *space;
    struct slot *slots;
    struct shard_list staged;
    struct shard_list committed;
    struct shard_list lru;
    uint64_t evictable_granules; /* of the lru list */
    struct kvstore_stats stats;
    uint64_t value_generation; /* of the last value begun */
    uint64_t *evicted;         /* [EVICTED_SLOTS] hashes of names last seen evicted */
    struct values_lease lease;
    struct kvstore_name *removed;
    size_t removed_begin;
    size_t removed_count;
    bool removed_lost;
    struct kvstore_shard *scrubbing; /* its bytes are being read, outside of the mutex */
    struct kvstore_shard *scrub_next;
    uint64_t scrub_page;
};

struct kvstore_put {
    struct kvstore *store;
    struct kvstore_shard *shard;
    uint64_t pages_done;
    uint64_t bytes_done;
};

/* All with the mutex held. */
struct slot *kvstore_slot_find(struct kvstore *store, const struct kvstore_name *name);
struct kvstore_shard *kvstore_staged_find(struct kvstore *store, const struct kvstore_name *name);
void kvstore_staged_add(struct kvstore *store, struct slot *slot, struct kvstore_shard *shard);
void kvstore_staged_take(struct kvstore *store, struct kvstore_shard *shard);
void kvstore_committed_add(struct kvstore *store, struct kvstore_shard *shard);
/* Unlinks it everywhere; its room and itself go when nobody uses them any more. */
void kvstore_shard_remove(struct kvstore *store, struct kvstore_shard *shard);
void kvstore_shard_reap(struct kvstore *store, struct kvstore_shard *shard);
void kvstore_removed_note(struct kvstore *store, const struct kvstore_shard *shard);
/* Remembers or forgets why this name would be missed. */
void kvstore_evicted_note(struct kvstore *store, const struct slot_key *key, bool evicted);
bool kvstore_evicted_seen(const struct kvstore *store, const struct slot_key *key);
bool kvstore_evict_one(struct kvstore *store);
/* Before anything is written into its room: readers see it from then on. */
void kvstore_seal_break(struct kvstore *store, const struct kvstore_shard *shard);
void kvstore_lru_add(struct kvstore *store, struct kvstore_shard *shard);
void kvstore_lru_take(struct kvstore *store, struct kvstore_shard *shard);

/* Are values neither given nor taken now? */
bool kvstore_values_doubted(struct kvstore *store);

/* Without the mutex. */
void kvstore_lock(struct kvstore *store);
void kvstore_unlock(struct kvstore *store);
void kvstore_shard_free(struct kvstore_shard *shard); /* memory only; accepts NULL */
struct slot_key kvstore_slot_key(const struct kvstore_name *name);

#endif
