/*
 * device_internal: what kernels/device.c, plan.c, cpu/ and cuda/ share.
 *
 * device.c checks every argument, then calls the ops of the device's kind; ops
 * trust what they get. Also included by CUDA C++ sources.
 */
#ifndef KERNELS_DEVICE_INTERNAL_H
#define KERNELS_DEVICE_INTERNAL_H

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TILE_ROWS_PREFILL 128 /* (row, query head) pairs of an item */
#define TILE_ROWS_DECODE  16
#define PLAN_RANGES       4
#define MERGE_FAN_IN      16 /* decode merges partial results in groups of this many */
/* Items that are part of a split list, per multiprocessor at most; bounds the workspace. */
#define SPLITS_PER_PROCESSOR 4

/*
 * One unit of work: a tile of query rows of one KV head against pages of its list. 80 bytes.
 * Row i of a tile is token i / group, query head i % group. A prefill tile is two halves of 64
 * rows, each with tokens_per_half(group) tokens of its own; rows past them are unused.
 */
struct plan_item {
    int32_t next;   /* next item of this processor, or -1. The first of processor p is p. */
    int32_t row;    /* first query row */
    int32_t tokens; /* query rows in the tile; 0: an empty first item */
    int32_t kv_head;
    int32_t window; /* 0: all */
    int32_t sink;
    int32_t pages;      /* sum of count[] */
    int32_t split;      /* this part ... */
    int32_t num_splits; /* ... of so many; 1: writes the output itself */
    int32_t slot;       /* first slot of partial results of the split list; see below */
    int32_t counter;    /* first of its counters, all zero between launches */
    int32_t reserved;
    /* refs [first[i], first[i] + count[i]); the pages of the item in order. An item sees all
     * pages of its list that are visible to any of its rows, and may see others. */
    int32_t first[PLAN_RANGES];
    int32_t count[PLAN_RANGES];
};

/*
 * Partial results. A slot is TILE_ROWS * (head_dim + 2) floats: m[rows] (of scores * scale *
 * log2(e)), l[rows], o[rows][head_dim], not divided by l. Part s writes slot + s. Decode, when
 * num_splits > MERGE_FAN_IN: the last of group g = s / MERGE_FAN_IN writes their merge to
 * slot + num_splits + g; counters: counter + 0 of groups, counter + 1 + g of group g's parts.
 * Otherwise decode uses counter + 0, prefill counter + 0 and + 1, one for each half tile.
 */
static inline uint32_t tokens_per_half(uint32_t group)
{
    return (TILE_ROWS_PREFILL / 2) / group;
}
static inline uint32_t tokens_per_tile(enum kernels_plan_kind kind, uint32_t group)
{
    return kind == KERNELS_PLAN_PREFILL ? 2 * tokens_per_half(group) : TILE_ROWS_DECODE / group;
}
static inline size_t slot_floats(enum kernels_plan_kind kind, uint32_t head_dim)
{
    uint32_t rows = kind == KERNELS_PLAN_PREFILL ? TILE_ROWS_PREFILL : TILE_ROWS_DECODE;
    return (size_t)rows * (head_dim + 2);
}

struct device_ops;

struct kernels_device {
    const struct device_ops *ops;
    enum kernels_device_kind kind;
    uint32_t ordinal;
    uint32_t processors;
    char name[128];
};

struct kernels_pool {
    struct kernels_device *device;
    struct kernels_pool_options options;
    size_t page_bytes;
    void *pages;
    float *scales; /* NULL for bf16 */
    void *backend; /* of the ops, or NULL */
};

/* Bytes of the sections of a plan's block, the same on host and device. */
struct plan_sections {
    size_t items;              /* offset of struct plan_item [items_max] */
    size_t refs;               /* of struct kernels_page_ref [refs_max] */
    size_t explicit_positions; /* of int32_t [explicit_max][64] */
    size_t bytes;
};

struct kernels_plan {
    struct kernels_device *device;
    struct kernels_plan_options options;
    uint32_t items_max;
    struct plan_sections sections;
    uint8_t *pinned;       /* the block, as planned */
    uint8_t *device_block; /* the block, as uploaded */
    /* Copy of the batch's shape; the CPU device computes from it. */
    uint32_t num_requests;
    uint32_t num_variants;
    uint32_t rows;
    uint32_t num_refs;
    uint32_t num_explicit;
    uint32_t pages_end;              /* above every page of the refs */
    uint32_t *row_first;             /* [requests_max + 1] */
    struct kernels_page_list *lists; /* [requests_max * num_kv_heads] */
    uint32_t num_items;              /* 0: empty plan */
    uint64_t version;                /* of the batch that was planned; 0: none */
    void *scratch;                   /* of plan.c */
    struct kernels_plan_stats stats;
};

static inline struct plan_item *plan_items(const struct kernels_plan *plan)
{
    return (struct plan_item *)(plan->pinned + plan->sections.items);
}
static inline struct kernels_page_ref *plan_refs(const struct kernels_plan *plan)
{
    return (struct kernels_page_ref *)(plan->pinned + plan->sections.refs);
}
static inline int32_t (*plan_explicit(const struct kernels_plan *plan))[RK_PAGE_TOKENS]
{
    return (int32_t(*)[RK_PAGE_TOKENS])(plan->pinned + plan->sections.explicit_positions);
}

struct kernels_workspace {
    struct kernels_device *device;
    float *slots;      /* SPLITS_PER_PROCESSOR * processors prefill slots of head_dim 128 */
    int32_t *counters; /* [WORKSPACE_COUNTERS], zero between launches */
};
#define WORKSPACE_COUNTERS 8192

struct kernels_graph {
    struct kernels_device *device;
    void *exec; /* of the ops */
};

/* What a kind of device does. Arguments are checked; memory is of this device. */
struct device_ops {
    enum rk_status (*open)(struct kernels_device *device, struct rk_error *error);
    void (*close)(struct kernels_device *device);
    enum rk_status (*memory_create)(struct kernels_device *device, enum kernels_memory_kind kind,
                                    size_t bytes, void **ret_memory, struct rk_error *error);
    void (*memory_destroy)(struct kernels_device *device, enum kernels_memory_kind kind,
                           void *memory);
    enum rk_status (*copy)(struct kernels_device *device, void *to, const void *from, size_t bytes,
                           kernels_stream stream, struct rk_error *error);
    enum rk_status (*fill)(struct kernels_device *device, void *to, uint8_t byte, size_t bytes,
                           kernels_stream stream, struct rk_error *error);
    enum rk_status (*stream_create)(struct kernels_device *device, kernels_stream *ret_stream,
                                    struct rk_error *error);
    void (*stream_destroy)(struct kernels_device *device, kernels_stream stream);
    enum rk_status (*stream_wait)(struct kernels_device *device, kernels_stream stream,
                                  struct rk_error *error);
    bool (*stream_capturing)(struct kernels_device *device, kernels_stream stream);
    enum rk_status (*graph_begin)(struct kernels_device *device, kernels_stream stream,
                                  struct rk_error *error);
    enum rk_status (*graph_end)(struct kernels_device *device, kernels_stream stream,
                                struct kernels_graph *graph, struct rk_error *error);
    enum rk_status (*graph_launch)(struct kernels_graph *graph, kernels_stream stream,
                                   struct rk_error *error);
    void (*graph_destroy)(struct kernels_graph *graph);
    /* pool->pages is there; makes pool->backend. */
    enum rk_status (*pool_open)(struct kernels_pool *pool, struct rk_error *error);
    void (*pool_close)(struct kernels_pool *pool);
    enum rk_status (*attention)(struct kernels_device *device,
                                const struct kernels_paged_attention *call, kernels_stream stream,
                                struct rk_error *error);
    enum rk_status (*mass)(struct kernels_device *device,
                           const struct kernels_paged_attention *call, float *mass,
                           kernels_stream stream, struct rk_error *error);
    enum rk_status (*rope_append)(struct kernels_device *device,
                                  const struct kernels_rope_append *call, kernels_stream stream,
                                  struct rk_error *error);
    enum rk_status (*rope_queries)(struct kernels_device *device,
                                   const struct kernels_rope_queries *call, kernels_stream stream,
                                   struct rk_error *error);
    enum rk_status (*gather)(struct kernels_device *device, const struct kernels_pool *pool,
                             const int32_t *pages, uint32_t count, void *host,
                             kernels_stream stream, struct rk_error *error);
    enum rk_status (*scatter)(struct kernels_device *device, const struct kernels_pool *pool,
                              const int32_t *pages, uint32_t count, const void *host,
                              kernels_stream stream, struct rk_error *error);
    enum rk_status (*checksum)(struct kernels_device *device, const struct kernels_pool *pool,
                               const int32_t *pages, uint32_t count, uint64_t *sums,
                               kernels_stream stream, struct rk_error *error);
};
extern const struct device_ops device_cpu;
extern const struct device_ops device_cuda; /* only in builds with REDKNOT_CUDA */

#ifdef __cplusplus
}
#endif

#endif
