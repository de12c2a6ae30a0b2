/*
 * self_check: does a vectorised attention path give the right numbers on this
 * very CPU? One small case against the C reference, at creation: a compiler, an
 * emulator or a hypervisor that gets an instruction set wrong must cost speed,
 * never an answer.
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
