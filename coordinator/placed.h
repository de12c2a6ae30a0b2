/*
 * placed: puts between Place and Commit, by generation.
 *
 * Threads: none of its own; the coordinator's index lock guards every call. An
 * entry taken for a commit (committing) is left alone by the others until its
 * committer gives it back, but for the marks of what its stores removed: those
 * are set and read under the index lock.
 */
#ifndef RK_COORDINATOR_PLACED_H
#define RK_COORDINATOR_PLACED_H

#include "coordinator/index.h"

#define PLACED_MAX       65536u
#define PLACED_BYTES_MAX ((uint64_t)256 << 20) /* token ids kept until commit */

struct placed_shard {
    char *node_id;
    char *address;
    uint64_t incarnation;
    struct rk_head_range heads;
    bool removed; /* its store committed it and gave it up again */
};

struct placed {
    struct rk_id id;
    struct rk_id fingerprint;
    struct rk_kv_layout layout;
    uint64_t generation;
    uint32_t num_tokens;
    uint32_t num_shards;
    uint32_t num_token_ids; /* 0 or num_tokens */
    uint32_t *token_ids;
    char *label;
    struct rk_origin origin;
    int64_t placed_ns;
    bool committing;
    bool unwanted;       /* it, or what it stems from, was dropped since */
    struct placed *prev; /* in order of placing */
    struct placed *next;
    UT_hash_handle hh;
    struct placed_shard shards[]; /* [shard_index] */
};

struct placed_table { /* zero-initialised */
    struct placed *by_generation;
    struct placed *oldest;
    uint64_t bytes;
};

/* num_shards rows, zeroed; fill them, then add. NULL when memory is out. */
struct placed *placed_create(uint32_t num_shards, const uint32_t *token_ids, uint32_t num_token_ids,
                             const char *label);
void placed_destroy(struct placed *placed); /* not in a table; accepts NULL */

/* RK_ERR_FULL over the bounds above. The table owns it on RK_OK. */
RK_MUST_CHECK enum rk_status placed_add(struct placed_table *table, struct placed *placed);
struct placed *placed_find(const struct placed_table *table, const struct rk_id *id,
                           uint64_t generation);
/* Its store says that it gave this shard up. Others' are ignored. */
void placed_shard_removed(const struct placed_table *table, const struct rk_id *id,
                          uint64_t generation, uint32_t shard_index, const char *node_id,
                          uint64_t incarnation);
void placed_take(struct placed_table *table, struct placed *placed); /* the caller owns it now */
/* The oldest one from before before_ns that nobody commits, taken out; NULL: none. */
struct placed *placed_take_expired(struct placed_table *table, int64_t before_ns);
void placed_clear(struct placed_table *table);

#endif
