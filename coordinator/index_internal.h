/* What index.c and index_segment.c share. */
#ifndef RK_COORDINATOR_INDEX_INTERNAL_H
#define RK_COORDINATOR_INDEX_INTERNAL_H

#include "coordinator/index.h"

struct index_tombstone {
    struct rk_id id;
    uint64_t generation;
    UT_hash_handle hh; /* its order is the order of arrival */
};

/* What one id brings down with it; exists while a list is not empty. */
struct index_kin {
    struct rk_id id;
    struct index_segment *chains;   /* whose origin.alone it is */
    struct index_segment *children; /* whose origin.parent it is */
    UT_hash_handle hh;
};

struct index {
    struct index_node *nodes;
    struct index_segment *segments;
    struct index_segment *with_kv;    /* longest unused first */
    struct index_segment *without_kv; /* likewise */
    struct index_tombstone *tombstones;
    struct index_kin *kin;
    uint64_t floor;
    uint64_t serials;
    struct index_journal_entry *journal;
    size_t journal_count;
    size_t journal_capacity;
    uint64_t changes;
    uint64_t visits;
    uint64_t kv_bytes;
    uint64_t num_without_kv;
    uint32_t segments_max;
    int64_t timeout_ns;
    int64_t slow_start_ns;
};

void index_location_clear(struct index *index, struct index_location *location,
                          enum location_state state);
void index_segment_settle(struct index *index, struct index_segment *segment);
void index_segment_free(struct index *index, struct index_segment *segment);

/* ---- index_kin.c ---- */

/* RK_ERR_NO_MEMORY leaves the segment in no list. */
enum rk_status index_kin_link(struct index *index, struct index_segment *segment);
void index_kin_unlink(struct index *index, struct index_segment *segment);
bool index_kin_has_children(struct index *index, const struct rk_id *id);

#endif
