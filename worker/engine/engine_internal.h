/*
 * What the files of the engine share: weights and buffers, the page pool, runs
 * and the lists of pages that attention walks.
 */
#ifndef WORKER_ENGINE_ENGINE_INTERNAL_H
#define WORKER_ENGINE_ENGINE_INTERNAL_H

#include "worker/engine/engine.h"

#include <string.h>

/* ---- page_pool.c: one arena, reserved at creation, touched when used ---- */

struct engine_page_pool {
    unsigned char *arena;
    size_t arena_bytes;
    size_t page_bytes;
    uint32_t *free;            /* stack of page numbers */
    _Atomic uint32_t num_free; /* written by the engine's thread, read by any */
    uint32_t num_pages;
};

RK_MUST_CHECK enum rk_status engine_page_pool_create(struct engine_page_pool *pool,
                                                     uint64_t num_pages, size_t page_bytes);
void engine_page_pool_destroy(struct engine_page_pool *pool); /* accepts a zeroed pool */
/* Zeroed. The caller has made sure that one is free. */
void *engine_page_pool_take(struct engine_page_pool *pool);
void engine_page_pool_give(struct engine_page_pool *pool, void *page);

/* ---- engine.c ---- */

struct engine_layer {
    struct kernels_matrix *qkv; /* [q; k; v][hidden]: one product */
    struct kernels_matrix *out;
    struct kernels_matrix *gate;
    struct kernels_matrix *up;
    struct kernels_matrix *down;
    float *attention_norm;
    float *ffn_norm;
};

/* One row of a call, found in its sequence. Its page of (layer, head) i is first[i * stride]. */
struct engine_place {
    void *const *first;
    size_t stride;
    uint32_t row;
    uint32_t position; /* rotation angle */
};

struct engine {
    struct model_config config;
    struct rk_kv_layout layout;
    struct kernels *kernels;
    struct kernels_rope rope;
    float *rope_cos;
    float *rope_sin;
    struct kernels_matrix *embedding; /* NULL when tied */
    struct kernels_matrix *output;
    float *output_norm;
    struct engine_layer *layers;
    struct engine_page_pool pool;
    uint32_t context_tokens;
    uint32_t num_sequences;
    uint32_t width_q;  /* heads * head_dim */
    uint32_t width_kv; /* KV heads * head_dim */

    /* Of one call, for KERNELS_ROWS_MAX rows. */
    float *x;                        /* [rows][hidden], the residual stream */
    float *norm;                     /* [rows][hidden] */
    float *projection;               /* [rows][hidden] */
    float *qkv;                      /* [rows][width_q + 2 * width_kv] */
    float *q;                        /* [rows][width_q] */
    float *attended;                 /* [rows][width_q] */
    float *gate;                     /* [rows][intermediate] */
    float *up;                       /* [rows][intermediate] */
    struct kernels_head_view *views; /* [kv_head] */
    struct engine_place places[KERNELS_ROWS_MAX];
    struct kernels_page_slot slots[KERNELS_ROWS_MAX];
    int32_t positions[KERNELS_ROWS_MAX];
    uint32_t sources[KERNELS_ROWS_MAX]; /* row of qkv */
    bool wanted[KERNELS_ROWS_MAX];
};

/* ---- sequence.c ---- */

struct engine_run {
    bool own;
    bool verify;
    uint32_t base;
    uint32_t num_tokens;
    uint32_t num_pages;
    uint32_t filled;       /* own: rows that were computed */
    uint32_t pages_taken;  /* own: token pages that have memory */
    void **pages;          /* [layer][kv_head][page]; borrowed ones are never written */
    uint64_t *checksums;   /* borrowed, verify: as pages */
    bool *verified;        /* borrowed, verify: [layer] */
    uint64_t *replaced;    /* borrowed: [page], rows that live in the overlay */
    int32_t *overlay_rows; /* borrowed: [token], row of the overlay or -1 */
};

/* Rows of borrowed runs that were computed again, in the order in which they came. */
struct engine_overlay {
    void **pages;       /* [page][layer][kv_head] */
    int32_t *positions; /* [page][64] */
    uint32_t num_pages; /* reserved: enough for every borrowed token */
    uint32_t pages_taken;
    uint32_t rows;
};

struct engine_sequence {
    struct engine *engine;
    struct engine_run *runs;
    uint32_t num_runs;
    uint32_t runs_max;
    uint32_t num_tokens;
    uint32_t borrowed_tokens;
    struct engine_overlay overlay;
    struct kernels_page *lists; /* [layer][kv_head][lists_max] */
    uint32_t *list_lengths;     /* [layer][kv_head] */
    uint32_t lists_max;         /* pages of all runs and of the overlay */
    bool lists_stale;           /* pages or live masks changed since they were made */
    bool in_call;
    double flops;
    uint32_t bad_run;
    struct rk_extent bad_page;
    bool broken; /* after RK_MISS_CHECKSUM */
};

/* Pool pages the item takes beyond those it has; checks the rows. */
RK_MUST_CHECK enum rk_status engine_sequence_plan(const struct engine_item *item,
                                                  uint64_t *ret_pages, struct rk_error *error);
/* Takes the pages, marks what is replaced and writes one place by row. */
void engine_sequence_place(const struct engine_item *item, struct engine_place *places);
/* The rows' K and V are in their pages. */
void engine_sequence_filled(const struct engine_item *item);
/* Brings the lists up to date. */
void engine_sequence_refresh(struct engine_sequence *sequence);
/* Checks the borrowed pages of a layer, once. */
RK_MUST_CHECK enum rk_status engine_sequence_verify(struct engine_sequence *sequence,
                                                    uint32_t layer, struct rk_error *error);

static inline size_t engine_num_heads(const struct engine *engine)
{
    return (size_t)engine->layout.num_layers * engine->layout.num_kv_heads;
}

#endif
