/*
 * attention_reference: SegPagedAttention as its definition reads, in f64.
 *
 * Every other path is tested against it. Like them it rounds queries and
 * probabilities to bf16 in KERNELS_BF16, for that is what the mode means.
 */
#include "kernels/cpu/cpu_internal.h"

#include <math.h>

/* The header's sentence on visibility, word by word; the fast paths have a quicker form. */
static uint64_t visible_rows(const struct kernels_page *page, const struct kernels_head_view *view,
                             int64_t t)
{
    uint64_t visible = 0;
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        int64_t c = page->positions ? page->positions[r] : (int64_t)page->position + r;
        bool live = page->live >> r & 1;
        if (live && c <= t &&
            (view->window == 0 || c > t - view->window || c < (int64_t)view->sink)) {
            visible |= UINT64_C(1) << r;
        }
    }
    return visible;
}

struct row_state {
    double max;
    double sum;
    double out[KERNELS_HEAD_DIM_MAX];
};

static double page_element(const struct kernels *kernels, const void *page, size_t index)
{
    if (kernels->mode == KERNELS_F32) {
        return (double)((const float *)page)[index];
    }
    return (double)f32_from_bf16(((const uint16_t *)page)[index]);
}

static double rounded(const struct kernels *kernels, double value)
{
    return kernels->mode == KERNELS_F32 ? value
                                        : (double)f32_from_bf16(bf16_from_f32((float)value));
}

static void rotated_query(const struct kernels *kernels, const struct kernels_attention *a,
                          const float *q, int64_t angle, float *ret_q)
{
    float sign;
    size_t offset = rope_offset(a->rope, angle, &sign);
    kernels->ops->rotate(q, a->rope->cos + offset, a->rope->sin + offset, sign, a->head_dim, ret_q);
    for (uint32_t i = 0; i < a->head_dim; i++) {
        ret_q[i] = (float)rounded(kernels, (double)ret_q[i]);
    }
}

/* Online softmax over the visible rows of one page. */
static void add_page(const struct kernels *kernels, const struct kernels_attention *a,
                     const void *page, uint64_t visible, const float *q, struct row_state *state)
{
    uint32_t d = a->head_dim;
    double scores[RK_PAGE_TOKENS];
    double max = state->max;
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        if (visible >> r & 1) {
            double dot = 0;
            for (uint32_t i = 0; i < d; i++) {
                dot += (double)q[i] * page_element(kernels, page, (size_t)r * d + i);
            }
            scores[r] = dot * (double)a->scale;
            max = scores[r] > max ? scores[r] : max;
        }
    }
    double keep = exp(state->max - max);
    state->max = max;
    state->sum *= keep;
    for (uint32_t i = 0; i < d; i++) {
        state->out[i] *= keep;
    }
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        if (visible >> r & 1) {
            double p = exp(scores[r] - max);
            state->sum += p;
            p = rounded(kernels, p);
            for (uint32_t i = 0; i < d; i++) {
                size_t index = (size_t)(RK_PAGE_TOKENS + r) * d + i;
                state->out[i] += p * page_element(kernels, page, index);
            }
        }
    }
}

struct reference_call {
    const struct kernels *kernels;
    const struct kernels_attention *a;
};

/* One task is one (row, query head). */
static void reference_row(void *context, uint32_t task, uint32_t worker)
{
    (void)worker;
    const struct reference_call *call = context;
    const struct kernels_attention *a = call->a;
    uint32_t heads = a->num_kv_heads * a->group;
    const struct kernels_head_view *view = &a->heads[task % heads / a->group];
    int64_t t = a->positions[task / heads];
    const float *q = a->q + (size_t)task * a->head_dim;
    float *out = a->out + (size_t)task * a->head_dim;
    float turned[KERNELS_HEAD_DIM_MAX];
    struct row_state state = {.max = -INFINITY};

    for (uint32_t p = 0; p < view->num_pages; p++) {
        const struct kernels_page *page = &view->pages[p];
        uint64_t visible = visible_rows(page, view, t);
        if (visible != 0) {
            rotated_query(call->kernels, a, q, t - (int64_t)page->base, turned);
            add_page(call->kernels, a, page->data, visible, turned, &state);
        }
    }
    for (uint32_t i = 0; i < a->head_dim; i++) {
        out[i] = state.sum > 0 ? (float)(state.out[i] / state.sum) : 0.0f;
    }
}

void attention_reference(struct kernels *kernels, const struct kernels_attention *attention)
{
    struct reference_call call = {.kernels = kernels, .a = attention};
    kernels_parallel(kernels, attention->rows * attention->num_kv_heads * attention->group,
                     reference_row, &call);
}
