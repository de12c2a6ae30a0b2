/*
 * self_check: do a vectorised attention path and our own products give the
 * right numbers on this very CPU? One small case each against C, at creation: a
 * compiler, an emulator or a hypervisor that gets an instruction set wrong must
 * cost speed, never an answer.
 */
#include "common/base/alloc.h"
#include "kernels/cpu/cpu_internal.h"

#include <math.h>

enum { ROWS = 20, GROUP = 3, HEAD_DIM = 64, PAGES = 2, POSITIONS = 128, BASE = 7 };

struct check_case {
    float q[ROWS * GROUP * HEAD_DIM];
    float out[2][ROWS * GROUP * HEAD_DIM];
    float cos[POSITIONS * HEAD_DIM / 2];
    float sin[POSITIONS * HEAD_DIM / 2];
    int32_t positions[ROWS];
    _Alignas(64) uint8_t pages[PAGES][2 * RK_PAGE_TOKENS * HEAD_DIM * sizeof(float)];
};

/* In [-1, 1], the same each time. */
static float next_value(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(int32_t)*state / 2147483648.0f;
}

static void fill(struct check_case *c, enum kernels_mode mode)
{
    uint32_t state = 1;
    for (size_t i = 0; i < sizeof(c->q) / sizeof(c->q[0]); i++) {
        c->q[i] = 4 * next_value(&state);
    }
    for (size_t i = 0; i < (size_t)POSITIONS * HEAD_DIM / 2; i++) {
        size_t position = i / (HEAD_DIM / 2);
        size_t element = i % (HEAD_DIM / 2);
        double angle = (double)position / (1.0 + (double)element);
        c->cos[i] = (float)cos(angle);
        c->sin[i] = (float)sin(angle);
    }
    for (int i = 0; i < ROWS; i++) {
        c->positions[i] = 60 + i;
    }
    for (size_t i = 0; i < (size_t)PAGES * 2 * RK_PAGE_TOKENS * HEAD_DIM; i++) {
        size_t page = i / (2 * RK_PAGE_TOKENS * HEAD_DIM);
        size_t at = i % (2 * RK_PAGE_TOKENS * HEAD_DIM);
        float value = next_value(&state);
        if (mode == KERNELS_F32) {
            memcpy(c->pages[page] + at * sizeof(float), &value, sizeof(float));
        } else {
            uint16_t half = bf16_from_f32(value);
            memcpy(c->pages[page] + at * sizeof(half), &half, sizeof(half));
        }
    }
}

/* Out of memory says nothing against the path: true. */
bool attention_self_check(struct kernels *kernels)
{
    struct check_case *c = rk_alloc_aligned(64, sizeof(*c));
    if (!c) {
        return true;
    }
    const struct kernels_rope rope = {c->cos, c->sin, POSITIONS, HEAD_DIM};
    const struct kernels_page pages[PAGES] = {
        {.data = c->pages[0], .base = 0, .position = 0, .live = ~(uint64_t)4},
        {.data = c->pages[1], .base = BASE, .position = RK_PAGE_TOKENS, .live = 0xffff},
    };
    const struct kernels_head_view view = {pages, PAGES, 50, 4};
    float tolerance = kernels->mode == KERNELS_F32 ? 1e-4f : 2e-2f;
    bool equal = true;
    fill(c, kernels->mode);
    for (int i = 0; i < 2; i++) {
        struct kernels_attention attention = {.num_kv_heads = 1,
                                              .group = GROUP,
                                              .head_dim = HEAD_DIM,
                                              .scale = 0.125f,
                                              .rope = &rope,
                                              .heads = &view,
                                              .q = c->q,
                                              .positions = c->positions,
                                              .rows = ROWS,
                                              .out = c->out[i]};
        (i == 0 ? attention_reference : kernels->attention)(kernels, &attention);
    }
    for (size_t i = 0; i < sizeof(c->q) / sizeof(c->q[0]); i++) {
        equal = equal && fabsf(c->out[0][i] - c->out[1][i]) <= tolerance;
    }
    rk_free(c);
    return equal;
}

/* Sizes that fill no block: the edges are where masks may go wrong. */
enum { CHECK_N = 71, CHECK_K = 37, CHECK_ROWS = 13 };

/* Out of memory says nothing against the path: true. */
bool products_self_check(struct kernels *kernels)
{
    float w[CHECK_N * CHECK_K];
    float x[CHECK_ROWS * CHECK_K];
    float y[CHECK_ROWS * CHECK_N];
    struct kernels_matrix *matrix = NULL;
    uint32_t state = 2;
    bool equal = true;
    for (size_t i = 0; i < sizeof(w) / sizeof(w[0]); i++) {
        w[i] = next_value(&state);
    }
    for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); i++) {
        x[i] = next_value(&state);
    }
    if (kernels_matrix_create(kernels, w, CHECK_N, CHECK_K, &matrix, NULL) != RK_OK) {
        return true;
    }
    kernels_matmul(kernels, matrix, x, CHECK_ROWS, y);
    kernels_matrix_destroy(matrix);
    for (size_t i = 0; i < sizeof(y) / sizeof(y[0]); i++) {
        double wanted = 0;
        for (size_t k = 0; k < CHECK_K; k++) {
            wanted += (double)x[i / CHECK_N * CHECK_K + k] * (double)w[i % CHECK_N * CHECK_K + k];
        }
        equal = equal && fabs((double)y[i] - wanted) <= 0.1; /* of 37 terms in bf16; NaN is none */
    }
    return equal;
}
