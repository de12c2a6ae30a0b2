/*
 * paged_reference.c: a task is a few rows of one (request, KV head), so that a
 * page is widened once for them; the arithmetic of a row does not depend on it.
 */
#include "kernels/cpu/paged_reference.h"

#include "kernels/cpu/cpu_internal.h"

#include <math.h>

#define TASK_ROWS    4
#define HEAD_DIM_MAX 128

/* One (row, query head). */
struct reference_state {
    double max;
    double sum;
    double out[HEAD_DIM_MAX];
};

/* A page in f64, keys transposed: the inner loops then add to many sums at once. */
struct reference_page {
    double keys[HEAD_DIM_MAX][RK_PAGE_TOKENS];
    double values[RK_PAGE_TOKENS][HEAD_DIM_MAX];
};

double paged_reference_e4m3(uint8_t byte)
{
    int exponent = byte >> 3 & 15;
    int fraction = byte & 7;
    double value = exponent == 0 ? ldexp(fraction, -9) : ldexp(8 + fraction, exponent - 10);
    if ((byte & 0x7f) == 0x7f) {
        value = NAN;
    }
    return byte & 0x80 ? -value : value;
}

static double page_element(const struct paged_reference *call, const double *e4m3, int32_t page,
                           size_t index)
{
    size_t elements = (size_t)2 * RK_PAGE_TOKENS * call->head_dim;
    size_t at = (size_t)page * elements + index;
    if (call->format == KERNELS_PAGE_BF16) {
        return (double)f32_from_bf16(((const uint16_t *)call->pages)[at]);
    }
    size_t which = (size_t)page * 2 + (index >= elements / 2);
    return e4m3[((const uint8_t *)call->pages)[at]] * (double)call->scales[which];
}

static void page_widen(const struct paged_reference *call, const double *e4m3, int32_t page,
                       struct reference_page *ret)
{
    uint32_t d = call->head_dim;
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        for (uint32_t i = 0; i < d; i++) {
            ret->keys[i][r] = page_element(call, e4m3, page, (size_t)r * d + i);
            ret->values[r][i] =
                page_element(call, e4m3, page, (size_t)(RK_PAGE_TOKENS + r) * d + i);
        }
    }
}

/* The header's sentence on visibility, word by word. */
static uint64_t visible_rows(const struct paged_reference *call,
                             const struct kernels_page_list *list,
                             const struct kernels_page_ref *ref, int64_t t)
{
    uint64_t visible = 0;
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        int64_t c = ref->positions < 0 ? (int64_t)ref->position + r
                                       : call->batch->explicit_positions[ref->positions][r];
        bool live = ref->live >> r & 1;
        if (live && c <= t &&
            (list->window == 0 || c > t - (int64_t)list->window || c < (int64_t)list->sink)) {
            visible |= UINT64_C(1) << r;
        }
    }
    return visible;
}

/* Scores of one (row, query head) with all rows of a page; those not visible mean nothing. */
static void page_scores(const struct paged_reference *call, const struct reference_page *page,
                        int32_t variant, uint32_t row, uint32_t q_head, double *ret_scores)
{
    uint32_t rows = call->batch->row_first[call->batch->num_requests];
    uint32_t heads = call->num_kv_heads * call->group;
    size_t at = ((size_t)variant * rows + row) * heads + q_head;
    const uint16_t *q = call->q + at * call->head_dim;
    memset(ret_scores, 0, RK_PAGE_TOKENS * sizeof(*ret_scores));
    for (uint32_t i = 0; i < call->head_dim; i++) {
        double element = (double)f32_from_bf16(q[i]);
        for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
            ret_scores[r] += element * page->keys[i][r];
        }
    }
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        ret_scores[r] *= (double)call->scale;
    }
}

/* Online softmax over the visible rows of one page. */
static void page_add(uint32_t head_dim, const struct reference_page *page, uint64_t visible,
                     const double *scores, struct reference_state *state)
{
    double max = state->max;
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        if (visible >> r & 1) {
            max = scores[r] > max ? scores[r] : max;
        }
    }
    double keep = exp(state->max - max);
    state->max = max;
    state->sum *= keep;
    for (uint32_t i = 0; i < head_dim; i++) {
        state->out[i] *= keep;
    }
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        if (visible >> r & 1) {
            double p = exp(scores[r] - max);
            state->sum += p;
            for (uint32_t i = 0; i < head_dim; i++) {
                state->out[i] += p * page->values[r][i];
            }
        }
    }
}

static void state_write(const struct paged_reference *call,
                        const struct paged_reference_result *result, size_t at,
                        const struct reference_state *state)
{
    uint32_t d = call->head_dim;
    bool seen = state->max != (double)-INFINITY;
    double lse = seen ? state->max + log(state->sum) : (double)-INFINITY;
    for (uint32_t i = 0; i < d; i++) {
        double value = seen ? state->out[i] / state->sum : 0;
        if (result->out) {
            result->out[at * d + i] = value;
        }
        if (result->out_bf16) {
            result->out_bf16[at * d + i] = bf16_from_f32((float)value);
        }
    }
    if (result->lse) {
        result->lse[at] = lse;
    }
    if (result->lse_f32) {
        result->lse_f32[at] = (float)lse;
    }
}

static void rows_attend(const struct paged_reference *call, const double *e4m3,
                        const struct paged_reference_result *result, uint32_t request,
                        uint32_t kv_head, uint32_t row_begin, uint32_t row_end)
{
    const struct kernels_batch *batch = call->batch;
    const struct kernels_page_list *list =
        &batch->lists[(size_t)request * call->num_kv_heads + kv_head];
    struct reference_state states[TASK_ROWS * KERNELS_DEVICE_GROUP_MAX];
    struct reference_page page;
    double scores[RK_PAGE_TOKENS];

    memset(states, 0, sizeof(states));
    for (uint32_t i = 0; i < TASK_ROWS * KERNELS_DEVICE_GROUP_MAX; i++) {
        states[i].max = (double)-INFINITY;
    }
    for (uint32_t n = list->first; n < list->first + list->count; n++) {
        const struct kernels_page_ref *ref = &batch->refs[n];
        bool widened = false;
        for (uint32_t row = row_begin; row < row_end; row++) {
            uint64_t visible = visible_rows(call, list, ref, batch->positions[row]);
            if (visible == 0) {
                continue;
            }
            if (!widened) {
                page_widen(call, e4m3, ref->page, &page);
                widened = true;
            }
            for (uint32_t g = 0; g < call->group; g++) {
                page_scores(call, &page, ref->variant, row, kv_head * call->group + g, scores);
                page_add(call->head_dim, &page, visible, scores,
                         &states[(row - row_begin) * call->group + g]);
            }
        }
    }
    for (uint32_t row = row_begin; row < row_end; row++) {
        size_t at = ((size_t)row * call->num_kv_heads + kv_head) * call->group;
        for (uint32_t g = 0; g < call->group; g++) {
            state_write(call, result, at + g, &states[(row - row_begin) * call->group + g]);
        }
    }
}

void paged_attention_reference(const struct paged_reference *call,
                               const struct paged_reference_result *result)
{
    const struct kernels_batch *batch = call->batch;
    double e4m3[256];
    for (int i = 0; i < 256; i++) {
        e4m3[i] = paged_reference_e4m3((uint8_t)i);
    }
    for (uint32_t request = 0; request < batch->num_requests; request++) {
        uint32_t begin = batch->row_first[request];
        uint32_t end = batch->row_first[request + 1];
        uint32_t blocks = (end - begin + TASK_ROWS - 1) / TASK_ROWS;
#pragma omp parallel for schedule(dynamic)
        for (uint32_t task = 0; task < blocks * call->num_kv_heads; task++) {
            uint32_t row = begin + task / call->num_kv_heads * TASK_ROWS;
            rows_attend(call, e4m3, result, request, task % call->num_kv_heads, row,
                        end - row < TASK_ROWS ? end : row + TASK_ROWS);
        }
    }
}

/* One list; another may share its refs. */
static void list_mass(const struct paged_reference *call, const double *e4m3, const float *lse,
                      uint32_t request, uint32_t kv_head, double *mass)
{
    const struct kernels_batch *batch = call->batch;
    const struct kernels_page_list *list =
        &batch->lists[(size_t)request * call->num_kv_heads + kv_head];
    struct reference_page page;
    double scores[RK_PAGE_TOKENS];

    for (uint32_t n = list->first; n < list->first + list->count; n++) {
        const struct kernels_page_ref *ref = &batch->refs[n];
        bool widened = false;
        for (uint32_t row = batch->row_first[request]; row < batch->row_first[request + 1]; row++) {
            uint64_t visible = visible_rows(call, list, ref, batch->positions[row]);
            if (visible != 0 && !widened) {
                page_widen(call, e4m3, ref->page, &page);
                widened = true;
            }
            for (uint32_t g = 0; visible != 0 && g < call->group; g++) {
                uint32_t q_head = kv_head * call->group + g;
                size_t at = (size_t)row * call->num_kv_heads * call->group + q_head;
                page_scores(call, &page, ref->variant, row, q_head, scores);
                for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
                    if (visible >> r & 1) {
                        double weight = exp(scores[r] - (double)lse[at]);
#pragma omp atomic
                        mass[(size_t)n * RK_PAGE_TOKENS + r] += weight;
                    }
                }
            }
        }
    }
}

void attention_mass_reference(const struct paged_reference *call, const float *lse, double *mass)
{
    const struct kernels_batch *batch = call->batch;
    double e4m3[256];
    for (int i = 0; i < 256; i++) {
        e4m3[i] = paged_reference_e4m3((uint8_t)i);
    }
    memset(mass, 0, (size_t)batch->num_refs * RK_PAGE_TOKENS * sizeof(*mass));
#pragma omp parallel for schedule(dynamic)
    for (uint32_t i = 0; i < batch->num_requests * call->num_kv_heads; i++) {
        list_mass(call, e4m3, lse, i / call->num_kv_heads, i % call->num_kv_heads, mass);
    }
}
