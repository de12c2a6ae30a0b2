/*
 * kernels: the arithmetic of a worker, as a C ABI over device code.
 *
 * Two parts. The first, struct kernels, computes on the cores of this process:
 * oneDNN for matrix products (its only user), own code for the rest, a plain C
 * reference beside each vectorised path, chosen at run time. The second,
 * kernels/device.h, is SegPagedAttention over a pool of pages on a device:
 * kernels/cuda for a GPU, and kernels/cpu as the reference that defines it.
 *
 * Row independence: the result of a row depends only on that row's inputs, not
 * on how many rows stand beside it or on which pages other rows see. That makes
 * reuse bit-equal to recomputation; tests hold every path to it.
 *
 * Threads: one call at a time per kernels object; a call uses up to `threads`
 * cores. No call allocates after creation, except where it says so.
 */
#ifndef KERNELS_KERNELS_H
#define KERNELS_KERNELS_H

#include "common/base/kv_layout.h"
#include "common/base/status.h"
#include "kernels/device.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KERNELS_ROWS_MAX  256 /* rows of one call */
#define KERNELS_GROUP_MAX 64  /* query heads of one KV head */

/* How numbers are multiplied: KERNELS_BF16 rounds inputs of products to bf16
 * and adds in f32; KERNELS_F32 is the reference mode. */
enum kernels_mode { KERNELS_F32, KERNELS_BF16 };

/* Attention paths, worst to best. AUTO picks the best that CPU and mode allow. */
enum kernels_isa {
    KERNELS_ISA_AUTO,
    KERNELS_ISA_REFERENCE,
    KERNELS_ISA_AVX2,
    KERNELS_ISA_AVX512,
    KERNELS_ISA_AVX512_BF16, /* KERNELS_BF16 only */
    KERNELS_ISA_AMX,         /* KERNELS_BF16 only */
};

struct kernels;
struct kernels_matrix; /* weights in the layout that the products want */

struct kernels_options {
    enum kernels_mode mode;
    enum kernels_isa isa;
    uint32_t threads; /* 0: as many as this process may use (rk_limits) */
};

RK_MUST_CHECK enum rk_status kernels_create(const struct kernels_options *options,
                                            struct kernels **ret_kernels, struct rk_error *error);
void kernels_destroy(struct kernels *kernels); /* accepts NULL */
enum kernels_mode kernels_mode(const struct kernels *kernels);
uint32_t kernels_threads(const struct kernels *kernels);
const char *kernels_isa_name(const struct kernels *kernels);
/* Which code does the arithmetic: mode, attention, rows, products with the library's version and
 * the instruction set that it keeps to. Two objects whose texts differ may differ in any bit. */
const char *kernels_numeric_path(const struct kernels *kernels);
/* Best mode that is fast on this CPU: BF16 with AVX-512 BF16 or AMX, else F32. */
enum kernels_mode kernels_mode_default(void);
/* Can matrices of that mode be multiplied here? RK_ERR_UNSUPPORTED says what is missing. */
RK_MUST_CHECK enum rk_status kernels_mode_check(enum kernels_mode mode, struct rk_error *error);
/* Can this CPU run that path? */
bool kernels_isa_supported(enum kernels_isa isa);
/* RK_ERR_UNSUPPORTED says by name what is missing, and what this CPU and the mode have. */
RK_MUST_CHECK enum rk_status kernels_isa_check(enum kernels_isa isa, enum kernels_mode mode,
                                               struct rk_error *error);

/* y[rows][n] = x[rows][k] * w[n][k]^T. Weights are converted at creation; the
 * source may be freed after it. Allocates. */
RK_MUST_CHECK enum rk_status kernels_matrix_create(struct kernels *kernels, const float *w,
                                                   uint32_t n, uint32_t k,
                                                   struct kernels_matrix **ret_matrix,
                                                   struct rk_error *error);
void kernels_matrix_destroy(struct kernels_matrix *matrix); /* accepts NULL */
/* The library's name of the implementation chosen for one number of rows, for logs and tests. */
const char *kernels_matrix_implementation(struct kernels_matrix *matrix, uint32_t rows);
/* x, y: f32, row-major, rows <= KERNELS_ROWS_MAX, dense. y must not overlap x. Rows are
 * padded to a few fixed sizes inside, for row independence. */
void kernels_matmul(struct kernels *kernels, const struct kernels_matrix *matrix, const float *x,
                    uint32_t rows, float *y);

/* Row r of a matrix that was created with this w, as f32 in the precision of the mode:
 * the embedding of a tied model. */
void kernels_matrix_row(const struct kernels_matrix *matrix, uint32_t row, float *ret_row);

/* y[r] = x[r] / rms(x[r]) * weight; width elements a row. In place allowed. */
void kernels_rms_norm(struct kernels *kernels, const float *x, const float *weight, uint32_t rows,
                      uint32_t width, float epsilon, float *y);
/* gate[r][i] = silu(gate[r][i]) * up[r][i] */
void kernels_silu_mul(struct kernels *kernels, float *gate, const float *up, uint32_t rows,
                      uint32_t width);
/* x += y */
void kernels_add(struct kernels *kernels, float *x, const float *y, uint32_t rows, uint32_t width);

/*
 * Rotation table: cos and sin of position * frequency[i], i < head_dim / 2, for
 * positions [0, positions_max), computed in f64 and rounded to f32.
 * Half-split convention (NeoX): element i pairs with i + head_dim / 2.
 */
struct kernels_rope {
    const float *cos; /* [positions_max][head_dim / 2] */
    const float *sin;
    uint32_t positions_max;
    uint32_t head_dim;
};

/*
 * Write rows of K (rotated) and V into pages. k, v: f32, row r at
 * k + r * stride. Row r goes to slots[r].
 */
struct kernels_page_slot {
    void *page;        /* K[64][head_dim] then V[64][head_dim], in the mode's dtype */
    uint32_t row;      /* 0..63 */
    uint32_t position; /* rotation angle: position inside the run */
};
void kernels_kv_write(struct kernels *kernels, const struct kernels_rope *rope, const float *k,
                      const float *v, size_t stride, const struct kernels_page_slot *slots,
                      uint32_t rows);

/*
 * SegPagedAttention: each KV head has its own list of pages.
 *
 * Query relocation (RedKnot, arXiv 2606.06256): the keys of a run that stands
 * at base P were rotated at their position inside the run; for them the query
 * at absolute position t is rotated at t - P. So pages are shared by every
 * request, at any position, and never rewritten.
 */
struct kernels_page {
    const void *data;         /* a page */
    int32_t base;             /* P: queries are rotated at t - base for this page */
    int32_t position;         /* absolute position of row 0; rows follow on */
    const int32_t *positions; /* not NULL: explicit absolute positions [64] instead */
    uint64_t live;            /* bit r: row r may be seen at all */
};

/* Visible to the query at t: live, position c <= t, and (window == 0 or c > t - window or c <
 * sink). */
struct kernels_head_view {
    const struct kernels_page *pages;
    uint32_t num_pages;
    uint32_t window; /* tokens, 0: all */
    uint32_t sink;   /* tokens */
};

struct kernels_attention {
    uint32_t num_kv_heads;
    uint32_t group;    /* query heads per KV head, 1..KERNELS_GROUP_MAX */
    uint32_t head_dim; /* 16..256, multiple of 16 */
    float scale;       /* above 0, usually 1 / sqrt(head_dim) */
    const struct kernels_rope *rope;
    const struct kernels_head_view *heads; /* [num_kv_heads] */
    const float *q;                        /* [rows][num_kv_heads * group][head_dim], not rotated */
    const int32_t *positions;              /* [rows], absolute, ascending */
    uint32_t rows;                         /* <= KERNELS_ROWS_MAX */
    float *out;                            /* as q; a row that sees nothing gives zeros */
    /* true: one row per call in the long run (decode), another loop order may be used;
     * results may differ from those with false, but obey row independence among themselves. */
    bool decode;
};

/* Products q.k and p.v in the mode's precision, online softmax page by page in
 * list order, so that a page that a row does not see leaves its result untouched
 * bit by bit. Rows of pages that are not live may hold any finite or non-finite bytes. */
void kernels_attention(struct kernels *kernels, const struct kernels_attention *attention);

#endif
