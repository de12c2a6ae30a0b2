/*
 * index: what the coordinator believes, in memory.
 *
 * Nodes by id; segments by id, each with one location per shard; tombstones of
 * segments that were dropped. It does no I/O: each change of what must outlive
 * the process leaves a line in the journal, which the owner writes to the
 * metadata database by looking the id up again.
 *
 * A segment has KV when all its shards are present. One without stays known
 * (tokens, label) until room is needed; those are dropped first, longest unused
 * first.
 *
 * Threads: none of its own; the coordinator's index lock guards every call.
 * Structs are open for reading by the handlers, under that lock.
 */
#ifndef RK_COORDINATOR_INDEX_H
#define RK_COORDINATOR_INDEX_H

#include "common/base/id.h"
#include "common/base/kv_layout.h"
#include "common/base/origin.h"
#include "common/base/status.h"
#include "coordinator/liveness.h"
#include "coordinator/table_internal.h"
#include "redknot/v1/coordinator.pb-c.h"

#define INDEX_NODES_MAX      4096u
#define INDEX_TOMBSTONES_MAX 65536u

enum location_state {
    LOCATION_UNKNOWN, /* nobody said that this shard exists */
    LOCATION_PRESENT,
    LOCATION_EVICTED,
    LOCATION_LOST, /* its node restarted */
};

enum node_state {
    NODE_UP,
    NODE_DOWN,       /* silent */
    NODE_EJECTED,    /* alive, yet it does not answer */
    NODE_SLOW_START, /* up, with a part of its share */
    NODE_STATE_COUNT,
};

struct index_node {
    char *node_id;
    Redknot__V1__NodeInfo *info; /* own copy */
    int64_t heard_ns;            /* last sign of life; 0: none since this process began */
    bool registered;             /* since this process began, or since it came back */
    bool unsaved;                /* the disk refused its record: the sweeper tries again */
    bool was_alive;              /* for the log: changes are told once */
    uint64_t replaced;           /* the incarnation before this one; 0: none that we know of */
    uint64_t refused;            /* the last one that came while this one lives: told once */
    bool values_old;             /* of a store: clients went on without it (coordinator_stores.c) */
    bool values_unsaved;         /* and the disk does not know yet */
    uint64_t values_mark;        /* to be said when it has given them up; 0: none made yet */
    int64_t lease_ns;            /* until then it serves its values, heard or not; 0: it does not */
    struct liveness liveness;    /* of stores */
    uint64_t visit;              /* scratch of whoever walks over nodes */
    uint64_t num_locations;
    struct index_location *locations; /* present ones */
    UT_hash_handle hh;
};

struct index_location {
    struct index_segment *segment;
    struct index_node *node; /* NULL unless present */
    struct index_location *prev;
    struct index_location *next;
    uint64_t incarnation;
    uint64_t changed; /* the index's change counter when it last changed */
    struct rk_head_range heads;
    enum location_state state;
};

/* A chain's place in a list of chains that are dropped together. */
struct index_kin_links {
    struct index_kin *kin; /* whose list; NULL: in none */
    struct index_segment *prev;
    struct index_segment *next;
};

struct index_segment {
    struct rk_id id;
    struct rk_id fingerprint;
    struct rk_kv_layout layout;
    uint64_t generation;
    uint32_t num_tokens;
    uint32_t num_shards;
    char *label;
    struct rk_origin origin;
    bool has_tokens;
    bool has_kv;
    bool journalled;
    uint64_t serial;            /* of its arrival: the order of the table */
    struct index_segment *prev; /* in its list of use */
    struct index_segment *next;
    struct index_kin_links in_alone;  /* of a chain: with the others of its segment */
    struct index_kin_links in_parent; /* of a chain: with the others that continue the same one */
    UT_hash_handle hh;
    struct index_location locations[]; /* [shard_index] */
};

/* A segment as it comes from a commit or from the database. Strings are borrowed. */
struct segment_location_spec {
    const char *node_id;
    uint64_t incarnation;
    struct rk_head_range heads;
    enum location_state state;
};

struct segment_spec {
    struct rk_id id;
    struct rk_id fingerprint;
    struct rk_kv_layout layout;
    uint64_t generation;
    uint32_t num_tokens;
    uint32_t num_shards;
    const char *label;
    struct rk_origin origin;
    bool has_tokens;
    const struct segment_location_spec *locations; /* [num_shards] */
};

/* A shard that a store should give up. */
struct index_drop {
    struct rk_id id;
    uint64_t generation;
    uint32_t shard_index;
    char *address; /* NULL when the node is down */
    char *node_id; /* likewise */
};

struct index_drops {
    struct index_drop *items;
    size_t count;
    size_t capacity;
};

struct index_ids { /* zero-initialised; free with index_ids_free */
    struct rk_id *items;
    size_t count;
    size_t capacity;
};

struct index_journal_entry {
    char kind; /* 's': segment, 'd': tombstone */
    struct rk_id id;
};

/* One announced shard. */
struct index_announced {
    struct rk_id id;
    struct rk_id fingerprint;
    struct rk_kv_layout layout;
    struct rk_head_range heads;
    struct rk_origin origin;
    uint64_t generation;
    uint32_t shard_index;
    uint32_t num_shards;
    uint32_t num_tokens;
    char *label; /* NULL: none */
    bool has_tokens;
    bool unwanted; /* its store should drop it */
};

struct index;

/* slow_start_ns 0: stores that come get their full share at once. */
RK_MUST_CHECK enum rk_status index_create(uint32_t segments_max, int64_t timeout_ns,
                                          int64_t slow_start_ns, struct index **ret_index);
void index_destroy(struct index *index); /* accepts NULL */

/* ---- Nodes ---- */

/* A new incarnation loses what the old one held. RK_ERR_FULL over INDEX_NODES_MAX. */
RK_MUST_CHECK enum rk_status index_node_register(struct index *index,
                                                 const Redknot__V1__NodeInfo *info, int64_t now_ns,
                                                 struct index_node **ret_node);
/* As known from an earlier run: down until it is heard of. */
RK_MUST_CHECK enum rk_status index_node_load(struct index *index,
                                             const Redknot__V1__NodeInfo *info);
struct index_node *index_node_find(struct index *index, const char *node_id);
/* A sign of life. A node that was down is back, and must register and announce again. */
void index_node_heard(const struct index *index, struct index_node *node, int64_t now_ns);
bool index_node_alive(const struct index *index, const struct index_node *node, int64_t now_ns);
/* A store that may be placed on, and whose shards are located. */
bool index_node_usable(const struct index *index, const struct index_node *node, int64_t now_ns);
/* Of slow start: the part of its weight that it gets now, and the highest of the usable stores. */
double index_node_factor(const struct index *index, const struct index_node *node, int64_t now_ns);
double index_factor_max(const struct index *index, int64_t now_ns);
/* factor_max: that of the index. */
enum node_state index_node_state(const struct index *index, const struct index_node *node,
                                 double factor_max, int64_t now_ns);
const char *index_node_state_name(enum node_state state); /* "slow start" */
struct index_node *index_nodes(struct index *index);      /* first; walk with hh.next */
uint64_t index_next_visit(struct index *index);           /* a value that no node's visit has */

/* ---- Segments ---- */

struct index_segment *index_segment_find(struct index *index, const struct rk_id *id);
/* Makes or replaces a segment; journals nothing for it, the caller has written it. What it
 * supersedes goes to drops. Unknown nodes make lost locations. */
RK_MUST_CHECK enum rk_status index_segment_put(struct index *index, const struct segment_spec *spec,
                                               int64_t now_ns, struct index_drops *drops);
/* Forgets it and keeps a tombstone: of this generation, or of the segment's own if higher. */
RK_MUST_CHECK enum rk_status index_segment_drop(struct index *index, struct index_segment *segment,
                                                uint64_t generation, int64_t now_ns,
                                                struct index_drops *drops);
/* The store says that it gave this shard up. Others' and older ones are ignored. */
void index_shard_removed(struct index *index, struct index_node *node, const struct rk_id *id,
                         uint64_t generation, uint32_t shard_index);
/*
 * Drops the segment and all chains that are not to outlive it: those of which it is the last
 * segment, those that continue it, and so on. generation as above. Adds every id that it dropped,
 * its own first and also when it is not known, to ids; that array grows. *ret_known: the segment
 * or a chain of it was there.
 */
RK_MUST_CHECK enum rk_status index_kin_drop(struct index *index, const struct rk_id *id,
                                            uint64_t generation, int64_t now_ns,
                                            struct index_drops *drops, struct index_ids *ids,
                                            bool *ret_known);
/* RK_OK: all shards are on usable nodes. Else a miss. fingerprint NULL: any. */
enum rk_status index_segment_state(const struct index *index, const struct index_segment *segment,
                                   const struct rk_id *fingerprint, int64_t now_ns);
void index_segment_touch(struct index *index, struct index_segment *segment);
uint64_t index_segment_bytes(const struct index_segment *segment); /* of KV */
struct index_segment *index_segments(struct index *index);         /* first; walk with hh.next */
uint64_t index_num_segments(const struct index *index);
uint64_t index_num_without_kv(const struct index *index);
uint64_t index_kv_bytes(const struct index *index); /* of segments that have KV */

/* ---- Announce ---- */

/* Changes after it win over the announced state; never 0. */
uint64_t index_changes(const struct index *index);
/* One shard that node says it holds: believes it, or marks it as unwanted. */
RK_MUST_CHECK enum rk_status index_announce(struct index *index, struct index_node *node,
                                            struct index_announced *announced, uint64_t since,
                                            int64_t now_ns, struct index_drops *drops);
/* That was all of it: what else was believed about the node, from before since, is evicted. */
void index_announce_end(struct index *index, struct index_node *node, uint64_t since);

/* ---- Tombstones ---- */

RK_MUST_CHECK enum rk_status index_tombstone_put(struct index *index, const struct rk_id *id,
                                                 uint64_t generation);
/* 0: none. */
uint64_t index_tombstone_generation(struct index *index, const struct rk_id *id);

/* Everything up to this generation was dropped; tombstones of single segments are on top. */
void index_floor_set(struct index *index, uint64_t generation);
/* What is not newer is not wanted: the floor, or its tombstone if that is higher. */
uint64_t index_unwanted_generation(struct index *index, const struct rk_id *id);

/* The same of something with an origin: also what its segment or its parent was dropped with, for
 * a chain that was placed before that was computed from it. */
uint64_t index_unwanted_kin(struct index *index, const struct rk_id *id,
                            const struct rk_origin *origin);

/* ---- Journal ---- */

/* Moves up to count entries, in no order: each is looked up again. Clears their marks. */
size_t index_journal_take(struct index *index, struct index_journal_entry *ret_entries,
                          size_t count);
void index_journal_add(struct index *index, char kind, const struct rk_id *id);
void index_journal_clear(struct index *index); /* after loading */

/* The address is left out when the node is down or NULL. */
RK_MUST_CHECK enum rk_status index_drop_add(const struct index *index, struct index_drops *drops,
                                            const struct rk_id *id, uint64_t generation,
                                            uint32_t shard_index, const struct index_node *node,
                                            int64_t now_ns);
void index_drops_free(struct index_drops *drops);
RK_MUST_CHECK enum rk_status index_ids_add(struct index_ids *ids, const struct rk_id *id);
void index_ids_free(struct index_ids *ids);

#endif
