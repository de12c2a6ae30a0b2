/*
 * recovery: which cached KV a request reuses, and which tokens it computes.
 *
 * One planner, presets by level. A request is segments 0..n-1 in order, then
 * the prompt (never cached). Lookup order: the longest exact chain from
 * position 0, then segments alone, then computation.
 *   full    nothing is reused: the reference.
 *   exact   the longest chain is reused, the rest computed; bit-equal to full.
 *   fast    segments are reused wherever they lie; of each one behind the
 *           exact chain the first 4 tokens are computed again (EPIC,
 *           arXiv 2410.15332) and the prompt is computed. A segment that is
 *           missing is computed alone first, so that an answer does not depend
 *           on what happens to be cached.
 * Further levels (high, balanced) join as rows of the same table.
 *
 * A segment that is to be had alone and stands at position 0 is a chain of one: it is exact, is
 * reused by "exact" too (source RECOVERY_SEGMENT), and nothing of it is computed again. It is the
 * caller's to know that what is to be had was computed by the same arithmetic (numeric path).
 *
 * Pure: no I/O, no clock; any thread.
 * Errors: RK_ERR_INVALID for an empty segment, RK_ERR_TOO_LONG above the limits below.
 */
#ifndef WORKER_RECOVERY_RECOVERY_H
#define WORKER_RECOVERY_RECOVERY_H

#include "common/base/kv_layout.h"
#include "common/base/status.h"
#include "worker/recovery/head_map.h"

#define RECOVERY_SEGMENTS_MAX 1024
/* Segments, prompt and generated tokens of one request; bounds what a plan may allocate. */
#define RECOVERY_TOKENS_MAX RK_SEGMENT_TOKENS_MAX

struct recovery_level {
    const char *name;      /* "full", "exact", "fast" */
    bool reuse_chain;      /* KV computed in this very chain may be used */
    bool reuse_segments;   /* KV of a segment alone may be used at any position */
    uint32_t first_tokens; /* of each segment reused behind the chain: computed again */
    bool head_map;         /* a configured head map limits what queries see */
};

/* NULL for an unknown name; "" or NULL is "exact". */
const struct recovery_level *recovery_level_find(const char *name);
/* "full, exact, fast": for messages. */
const char *recovery_level_names(void);

enum recovery_source {
    RECOVERY_CHAIN,         /* reuse KV computed in this chain */
    RECOVERY_SEGMENT,       /* reuse KV of the segment alone */
    RECOVERY_COMPUTE_ALONE, /* compute the segment alone, then as RECOVERY_SEGMENT */
    RECOVERY_COMPUTE,       /* compute in place */
};
const char *recovery_source_name(enum recovery_source source); /* "chain", "segment", ... */

struct recovery_segment {
    uint32_t num_tokens;
    bool in_chain; /* KV of the chain 0..this is to be had */
    bool alone;    /* KV of the segment alone is to be had */
};

struct recovery_run {
    enum recovery_source source;
    uint32_t position; /* P */
    uint32_t num_tokens;
    uint32_t first_tokens;     /* computed again, from the run's start */
    struct rk_extent *extents; /* what must be fetched (sources CHAIN and SEGMENT); else NULL */
    size_t num_extents;
    uint64_t num_pages;
};

struct recovery_plan {
    const struct recovery_level *level;
    const struct recovery_head_map *head_map; /* NULL: every query sees everything */
    struct recovery_run *runs;                /* [num_segments] */
    uint32_t num_segments;
    uint32_t prompt_position;
    uint32_t prompt_tokens;
    uint32_t
        *positions; /* absolute positions that run through the layers, ascending, prompt included */
    uint32_t num_positions;
    uint32_t tokens_reused;
    uint32_t tokens_computed; /* num_positions + tokens of COMPUTE_ALONE */
};

/* head_map may be NULL; it is used only where the level says so. tokens_ahead: how many tokens
 * may be generated (they widen what must be fetched under a head map). Free with
 * recovery_plan_free. */
RK_MUST_CHECK enum rk_status recovery_plan_make(
    const struct recovery_level *level, const struct recovery_head_map *head_map,
    const struct rk_kv_layout *layout, const struct recovery_segment *segments,
    uint32_t num_segments, uint32_t prompt_tokens, uint32_t tokens_ahead,
    struct recovery_plan *ret_plan, struct rk_error *error);
void recovery_plan_free(struct recovery_plan *plan); /* leaves it zeroed */

#endif
