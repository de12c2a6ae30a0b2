/*
 * cpu_internal: what the files of kernels/cpu share.
 *
 * Work is cut into tasks whose arithmetic does not depend on the number of
 * threads; kernels_parallel() is the one place that starts them.
 */
#ifndef KERNELS_CPU_CPU_INTERNAL_H
#define KERNELS_CPU_CPU_INTERNAL_H

#include "kernels/kernels.h"

#include <string.h>

#define KERNELS_HEAD_DIM_MAX 256
/* (row, query head) pairs of one attention task: enough to pay for packing a page. */
#define KERNELS_TILE_ROWS 192

/* What one task needs at most: queries, output, K, V in f32, and the states of its rows. */
#define KERNELS_SCRATCH_BYTES                                                                      \
    ((size_t)(2 * KERNELS_TILE_ROWS + 2 * RK_PAGE_TOKENS) * KERNELS_HEAD_DIM_MAX * 4 +             \
     (size_t)KERNELS_TILE_ROWS * 32)

struct matmul; /* oneDNN's part of a kernels object */
struct shape;
struct dnnl_memory;

/* Tasks [0, count) of one call; worker < threads names the scratch that the task may use. */
typedef void (*kernels_task)(void *context, uint32_t task, uint32_t worker);

/* One build of elementwise.c for one instruction set. All work on whole rows. */
struct elementwise_ops {
    const char *name;
    void (*rms_norm)(const float *x, const float *weight, uint32_t width, float epsilon, float *y);
    void (*silu_mul)(float *gate, const float *up, size_t count);
    void (*add)(float *x, const float *y, size_t count);
    void (*round_bf16)(const float *x, size_t count, uint16_t *y);
    /* y = x rotated; sin_sign -1 turns back. y may be x. */
    void (*rotate)(const float *x, const float *cos, const float *sin, float sin_sign,
                   uint32_t head_dim, float *y);
};
extern const struct elementwise_ops elementwise_baseline;
extern const struct elementwise_ops elementwise_avx2;
extern const struct elementwise_ops elementwise_avx512;

typedef void (*attention_path)(struct kernels *kernels, const struct kernels_attention *attention);
void attention_reference(struct kernels *kernels, const struct kernels_attention *attention);
void attention_avx2(struct kernels *kernels, const struct kernels_attention *attention);
void attention_avx512(struct kernels *kernels, const struct kernels_attention *attention);
void attention_avx512_bf16(struct kernels *kernels, const struct kernels_attention *attention);
void attention_amx(struct kernels *kernels, const struct kernels_attention *attention);
/* A small case against the reference; kernels' own path and scratch. */
bool attention_self_check(struct kernels *kernels);
/* A small product against its definition, by kernels->matmul_ops. */
bool products_self_check(struct kernels *kernels);

struct kernels {
    enum kernels_mode mode;
    enum kernels_isa isa;
    uint32_t threads;
    const struct elementwise_ops *ops;
    attention_path attention;
    struct matmul *matmul;               /* oneDNN's part, or NULL */
    const struct matmul_ops *matmul_ops; /* our own products, or NULL */
    float *inputs; /* [KERNELS_ROWS_MAX][k] of the widest matrix: rounded input of these */
    size_t inputs_bytes;
    uint8_t *scratch; /* [threads][scratch_bytes], 64-byte aligned */
    size_t scratch_bytes;
    char numeric_path[160];
};

/* One call of a path that works in tiles of rows. */
struct attention_call {
    const struct kernels *kernels;
    const struct kernels_attention *a;
    uint32_t tile_positions; /* rows of the call in a tile */
    uint32_t tiles;
};

static inline struct attention_call attention_call_plan(const struct kernels *kernels,
                                                        const struct kernels_attention *a)
{
    struct attention_call call = {.kernels = kernels, .a = a};
    call.tile_positions = KERNELS_TILE_ROWS / a->group;
    call.tiles = (a->rows + call.tile_positions - 1) / call.tile_positions;
    return call;
}

void kernels_parallel(struct kernels *kernels, uint32_t count, kernels_task task, void *context);

struct kernels_matrix {
    struct kernels *kernels;
    uint32_t n;
    uint32_t k;
    void *data;
    struct shape *shape; /* NULL: a matrix of matmul_tile.h */
    struct dnnl_memory *memory;
};

enum rk_status matmul_create(struct kernels *kernels, struct matmul **ret_matmul,
                             struct rk_error *error);
void matmul_destroy(struct matmul *matmul); /* accepts NULL */
/* Its version and the instruction set that it keeps to on this CPU. */
void matmul_onednn_describe(char *ret_text, size_t bytes);
enum rk_status matmul_onednn_init(struct kernels_matrix *matrix, const float *w,
                                  struct rk_error *error);
void matmul_onednn_clear(struct kernels_matrix *matrix); /* all but data */
const char *matmul_onednn_name(const struct kernels_matrix *matrix, uint32_t rows);
void matmul_onednn(struct kernels *kernels, const struct kernels_matrix *matrix, const float *x,
                   uint32_t rows, float *y);
void matmul_onednn_row(const struct kernels_matrix *matrix, uint32_t row, float *ret_row);

/* One build of matmul_tile.h. */
struct matmul_ops {
    const char *name;
    enum rk_status (*init)(struct kernels_matrix *matrix, const float *w);
    void (*run)(struct kernels *kernels, const struct kernels_matrix *matrix, const float *x,
                uint32_t rows, float *y);
    void (*row)(const struct kernels_matrix *matrix, uint32_t row, float *ret_row);
};
extern const struct matmul_ops matmul_avx512;
extern const struct matmul_ops matmul_avx512_bf16;

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t bf16_from_f32(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return (uint16_t)((bits >> 16) | 0x40);
    }
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float f32_from_bf16(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof(result));
    return result;
}

static inline bool rope_covers(const struct kernels_rope *rope, int64_t angle)
{
    return angle < rope->positions_max && -angle < rope->positions_max;
}

/* Cosines of a rotation by `angle` positions, which may be negative; *ret_sign is for the sines. */
static inline size_t rope_offset(const struct kernels_rope *rope, int64_t angle, float *ret_sign)
{
    uint64_t turn = (uint64_t)(angle < 0 ? -angle : angle);
    RK_ASSERT(turn < rope->positions_max);
    *ret_sign = angle < 0 ? -1.0f : 1.0f;
    return turn * (rope->head_dim / 2);
}

/* The n lowest bits; n may be anything. */
static inline uint64_t low_bits(int64_t n)
{
    return n <= 0 ? 0 : n >= 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1;
}

/* Bit r: row r of the page is visible to the query at position t. */
static inline uint64_t page_visible(const struct kernels_page *page,
                                    const struct kernels_head_view *view, int64_t t)
{
    int64_t after = t - view->window; /* positions above it are in the window */
    if (page->live == 0) {
        return 0;
    }
    if (!page->positions) {
        uint64_t seen = low_bits(t + 1 - page->position);
        if (view->window != 0) {
            seen &= ~low_bits(after + 1 - page->position) |
                    low_bits((int64_t)view->sink - page->position);
        }
        return seen & page->live;
    }
    uint64_t seen = 0;
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        int64_t c = page->positions[r];
        bool visible = c <= t && (view->window == 0 || c > after || c < (int64_t)view->sink);
        seen |= (uint64_t)visible << r;
    }
    return seen & page->live;
}

#endif
