/*
 * The reference is the text of kernels/device.h in f64: for each row and query
 * head all scores, their softmax, the sum of values.
 */
#include "tests/kernels_cuda/attention_case.h"

#include "common/base/alloc.h"

#include <math.h>

#define REALS          (1u << 20)
#define PAGE_BYTES_MAX ((size_t)2 * RK_PAGE_TOKENS * 128 * 2)
#define PAGE_VALUES    ((size_t)2 * RK_PAGE_TOKENS * 128)
/* Products of a case with one (row, head, token, element) each; a rare case may have more. */
#define WORK_USUAL UINT64_C(4000000)
#define WORK_LARGE UINT64_C(300000000)

static uint32_t num_heads(const struct attention_case *c)
{
    return c->num_kv_heads * c->group;
}

static size_t page_values(const struct attention_case *c)
{
    return (size_t)2 * RK_PAGE_TOKENS * c->head_dim;
}

static size_t page_bytes(const struct attention_case *c)
{
    return page_values(c) * (c->format == KERNELS_PAGE_BF16 ? 2 : 1);
}

/* ---- memory ---- */

static void pool_create(struct attention_memory *m, uint32_t large, enum kernels_page_format format)
{
    struct rk_error error = {.status = RK_OK};
    struct kernels_pool_options options = {
        .head_dim = large ? 128 : 64, .format = format, .pages = CASE_POOL_PAGES};
    struct kernels_pool **pool = &m->pools[large][format];
    must(kernels_pool_create(m->fixture->device, &options, pool, &error), &error,
         "kernels_pool_create");
    must_fill(m->fixture, kernels_pool_pages(*pool), 0xff,
              kernels_pool_page_bytes(*pool) * CASE_POOL_PAGES);
    if (format == KERNELS_PAGE_E4M3) {
        must_copy(m->fixture, kernels_pool_scales(*pool), m->scales,
                  CASE_POOL_PAGES * 2 * sizeof(float));
    }
    must_wait(m->fixture);
}

static void tables_create(struct attention_memory *m)
{
    m->reals = must_allocate(REALS * sizeof(*m->reals));
    m->bytes = must_allocate(REALS);
    for (uint32_t i = 0; i < REALS; i++) {
        m->reals[i] = to_bf16(random_real() + random_real());
        m->bytes[i] = (uint8_t)random_bits();
        if ((m->bytes[i] & 0x7f) == 0x7f) {
            m->bytes[i] = 0x38;
        }
    }
    m->scales = must_allocate(CASE_POOL_PAGES * 2 * sizeof(*m->scales));
    m->permutation = must_allocate(CASE_POOL_PAGES * sizeof(*m->permutation));
    m->slots = must_allocate(CASE_POOL_PAGES * sizeof(*m->slots));
    for (int32_t i = 0; i < CASE_POOL_PAGES; i++) {
        m->scales[2 * i] = 0.004f * (1.5f + random_real());
        m->scales[2 * i + 1] = 0.004f * (1.5f + random_real());
        m->permutation[i] = i;
        m->slots[i] = -1;
    }
}

struct attention_memory *attention_memory_create(const struct fixture *fixture)
{
    struct attention_memory *m = rk_alloc_zero(1, sizeof(*m));
    if (!m) {
        return must_allocate(SIZE_MAX / 2);
    }
    const enum kernels_memory_kind pinned = KERNELS_MEMORY_PINNED;
    const enum kernels_memory_kind device = KERNELS_MEMORY_DEVICE;
    const size_t lse_max = CASE_OUT_MAX / 64;
    const size_t mass_bytes = (size_t)CASE_REFS_MAX * RK_PAGE_TOKENS * sizeof(float);
    m->fixture = fixture;
    random_begin(fixture, "tables", 0);
    tables_create(m);
    for (uint32_t i = 0; i < 4; i++) {
        pool_create(m, i / 2, (enum kernels_page_format)(i % 2));
    }
    struct rk_error error = {.status = RK_OK};
    must(kernels_workspace_create(fixture->device, &m->workspace, &error), &error,
         "kernels_workspace_create");
    m->pages = must_create(fixture, pinned, CASE_REFS_MAX * PAGE_BYTES_MAX);
    m->values = must_allocate(CASE_REFS_MAX * PAGE_VALUES * sizeof(*m->values));
    m->q = must_create(fixture, pinned, CASE_Q_MAX * sizeof(*m->q));
    m->out = must_create(fixture, pinned, CASE_OUT_MAX * sizeof(*m->out));
    m->lse = must_create(fixture, pinned, lse_max * sizeof(*m->lse));
    m->positions = must_create(fixture, pinned, CASE_ROWS_MAX * sizeof(*m->positions));
    m->mass = must_create(fixture, pinned, mass_bytes);
    m->device_q = must_create(fixture, device, CASE_Q_MAX * sizeof(*m->q));
    m->device_out = must_create(fixture, device, CASE_OUT_MAX * sizeof(*m->out));
    m->device_lse = must_create(fixture, device, lse_max * sizeof(*m->lse));
    m->device_positions = must_create(fixture, device, CASE_ROWS_MAX * sizeof(*m->positions));
    m->device_mass = must_create(fixture, device, mass_bytes);
    m->expected_out = must_allocate(CASE_OUT_MAX * sizeof(*m->expected_out));
    m->expected_lse = must_allocate(lse_max * sizeof(*m->expected_lse));
    return m;
}

void attention_memory_destroy(struct attention_memory *m)
{
    struct kernels_device *device = m->fixture->device;
    for (uint32_t i = 0; i < 4; i++) {
        kernels_pool_destroy(m->pools[i / 2][i % 2]);
        for (uint32_t heads = 0; heads <= CASE_KV_HEADS_MAX; heads++) {
            for (uint32_t group = 0; group <= KERNELS_DEVICE_GROUP_MAX; group++) {
                kernels_plan_destroy(m->plans[i / 2][i % 2][heads][group]);
            }
        }
    }
    kernels_workspace_destroy(m->workspace);
    void *pinned[] = {m->pages, m->q, m->out, m->lse, m->positions, m->mass};
    for (size_t i = 0; i < sizeof(pinned) / sizeof(pinned[0]); i++) {
        kernels_memory_destroy(device, KERNELS_MEMORY_PINNED, pinned[i]);
    }
    void *on_device[] = {m->device_q, m->device_out, m->device_lse, m->device_positions,
                         m->device_mass};
    for (size_t i = 0; i < sizeof(on_device) / sizeof(on_device[0]); i++) {
        kernels_memory_destroy(device, KERNELS_MEMORY_DEVICE, on_device[i]);
    }
    void *plain[] = {m->scales, m->permutation, m->slots,        m->reals,
                     m->bytes,  m->values,      m->expected_out, m->expected_lse};
    for (size_t i = 0; i < sizeof(plain) / sizeof(plain[0]); i++) {
        rk_free(plain[i]);
    }
    rk_free(m);
}

struct kernels_pool *case_pool(const struct attention_memory *m, const struct attention_case *c)
{
    return m->pools[c->head_dim == 128][c->format];
}

struct kernels_plan *case_plan(struct attention_memory *m, const struct attention_case *c)
{
    struct kernels_plan **plan =
        &m->plans[c->head_dim == 128][c->kind == KERNELS_PLAN_DECODE][c->num_kv_heads][c->group];
    if (!*plan) {
        struct kernels_plan_options options = {.kind = c->kind,
                                               .num_kv_heads = c->num_kv_heads,
                                               .group = c->group,
                                               .head_dim = c->head_dim,
                                               .rows_max = CASE_ROWS_MAX,
                                               .requests_max = CASE_REQUESTS_MAX,
                                               .refs_max = CASE_REFS_MAX,
                                               .explicit_max = CASE_EXPLICIT_MAX};
        struct rk_error error = {.status = RK_OK};
        must(kernels_plan_create(m->fixture->device, &options, plan, &error), &error,
             "kernels_plan_create");
    }
    return *plan;
}

struct kernels_batch case_batch(const struct attention_case *c, uint64_t version)
{
    return (struct kernels_batch){.num_requests = c->num_requests,
                                  .num_variants = c->num_variants,
                                  .row_first = c->row_first,
                                  .positions = c->positions,
                                  .lists = c->lists,
                                  .refs = c->refs,
                                  .num_refs = c->num_refs,
                                  .explicit_positions = c->explicit_positions,
                                  .num_explicit = c->num_explicit,
                                  .version = version};
}

/* ---- cases ---- */

/* Pages of each list and rows of each request, within the work allowed. */
static void case_shape(const struct case_wish *wish, struct attention_case *c, uint32_t *pages)
{
    bool large = random_chance(100);
    uint64_t limit = large ? WORK_LARGE : WORK_USUAL;
    uint64_t work;
    c->kind = wish->decode || random_chance(2) ? KERNELS_PLAN_DECODE : KERNELS_PLAN_PREFILL;
    c->format = !wish->bf16 && c->kind == KERNELS_PLAN_DECODE && random_chance(3)
                    ? KERNELS_PAGE_E4M3
                    : KERNELS_PAGE_BF16;
    bool split = c->kind == KERNELS_PLAN_DECODE && random_chance(40);
    do {
        c->head_dim = random_chance(2) ? 64 : 128;
        c->num_requests = split ? 1 : random_between(1, CASE_REQUESTS_MAX);
        c->num_kv_heads = split ? 1 : random_between(1, CASE_KV_HEADS_MAX);
        c->group = random_between(1, random_chance(2) ? 4 : KERNELS_DEVICE_GROUP_MAX);
        c->num_variants = random_between(1, CASE_VARIANTS_MAX);
        work = 0;
        for (uint32_t r = 0; r < c->num_requests; r++) {
            uint32_t rows =
                c->kind == KERNELS_PLAN_DECODE ? random_between(1, 3) : random_log(1, 300);
            c->row_first[r + 1] = c->row_first[r] + rows;
            for (uint32_t h = 0; h < c->num_kv_heads; h++) {
                uint32_t count = split ? random_between(200, 900) : random_log(1, 40);
                if (!wish->growing && random_chance(12)) {
                    count = 0;
                }
                pages[r * c->num_kv_heads + h] = count;
                work += (uint64_t)rows * c->group * count * RK_PAGE_TOKENS * c->head_dim;
            }
        }
        c->rows = c->row_first[c->num_requests];
    } while ((work > limit && !split) ||
             (size_t)c->rows * num_heads(c) * c->head_dim * c->num_variants > CASE_Q_MAX);
}

static void row_positions(const struct case_wish *wish, struct attention_case *c, uint32_t request,
                          uint32_t context)
{
    uint32_t first = c->row_first[request];
    uint32_t rows = c->row_first[request + 1] - first;
    uint32_t style = wish->growing ? 0 : random_below(4);
    uint32_t position =
        style == 0 ? (context > rows ? context - rows : 0) : random_below(context + RK_PAGE_TOKENS);
    for (uint32_t i = 0; i < rows; i++) {
        c->positions[first + i] = (int32_t)position;
        position += style == 3 ? 1 + random_below(1 + 2 * context / rows) : 1;
    }
}

static uint64_t random_live(void)
{
    uint64_t bits = (uint64_t)random_bits() << 32 | random_bits();
    switch (random_below(10)) {
    case 0:
        return bits;
    case 1:
        return bits & ((uint64_t)random_bits() << 32 | random_bits());
    case 2:
        return UINT64_MAX >> random_below(64); /* a ragged tail */
    case 3:
        return random_chance(2) ? 0 : UINT64_C(1) << random_below(64);
    default:
        return UINT64_MAX;
    }
}

static int32_t random_explicit(struct attention_case *c, uint32_t context)
{
    int32_t *positions = c->explicit_positions[c->num_explicit];
    uint32_t step = random_chance(3) ? 1 : 1 + 2 * context / RK_PAGE_TOKENS;
    int32_t position = (int32_t)random_below(context);
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        positions[r] = position;
        position += (int32_t)random_between(1, step);
    }
    return (int32_t)c->num_explicit++;
}

/* A page of the case: mostly a new one, out of the pool's permutation. */
static int32_t case_page(struct attention_memory *m, struct attention_case *c)
{
    if (c->num_pages > 0 && (c->num_pages == CASE_POOL_PAGES || random_chance(10))) {
        return c->pages[random_below(c->num_pages)];
    }
    uint32_t at = random_between(c->num_pages, CASE_POOL_PAGES - 1);
    int32_t page = m->permutation[at];
    m->permutation[at] = m->permutation[c->num_pages];
    m->permutation[c->num_pages] = page;
    m->slots[page] = (int32_t)c->num_pages;
    c->pages[c->num_pages] = page;
    c->needed[c->num_pages] = 0;
    c->num_pages++;
    return page;
}

static int64_t row_position(const struct attention_case *c, const struct kernels_page_ref *ref,
                            uint32_t r)
{
    return ref->positions >= 0 ? c->explicit_positions[ref->positions][r]
                               : (int64_t)ref->position + r;
}

static void case_list(struct attention_memory *m, const struct case_wish *wish,
                      struct attention_case *c, struct kernels_page_list *list, uint32_t count,
                      uint32_t context, int64_t last)
{
    bool ordered = wish->growing || random_chance(2);
    bool overlays = !wish->growing && random_chance(3);
    uint32_t at = wish->growing || random_chance(2) ? 0 : random_below(context);
    *list = (struct kernels_page_list){.first = c->num_refs, .count = count};
    if (random_chance(2)) {
        list->window = random_log(1, context);
        list->sink = random_chance(2) ? 0 : random_log(1, 200);
    }
    for (uint32_t i = 0; i < count; i++) {
        struct kernels_page_ref *ref = &c->refs[c->num_refs++];
        ref->page = case_page(m, c);
        ref->variant = (int32_t)random_below(c->num_variants);
        ref->position = ordered ? (int32_t)at : (int32_t)random_below(context);
        ref->positions = -1;
        ref->live = random_live();
        at += RK_PAGE_TOKENS;
        if (!wish->growing && random_chance(8)) {
            at -= random_below(RK_PAGE_TOKENS - 1); /* the next page begins in a ragged tail */
        }
        if (overlays && c->num_explicit < CASE_EXPLICIT_MAX && random_chance(3)) {
            ref->positions = random_explicit(c, context);
        }
        uint64_t *needed = &c->needed[m->slots[ref->page]];
        for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
            bool may_be_seen = (ref->live >> r & 1) && row_position(c, ref, r) <= last;
            *needed |= (uint64_t)may_be_seen << r;
        }
    }
}

void case_generate(struct attention_memory *m, const struct case_wish *wish,
                   struct attention_case *c)
{
    uint32_t pages[CASE_REQUESTS_MAX * CASE_KV_HEADS_MAX];
    memset(c, 0, sizeof(*c));
    case_shape(wish, c, pages);
    const float gains[] = {0.5f, 2, 6};
    c->gain = gains[random_below(3)];
    c->scale = random_chance(4) ? 0.5f * (1.5f + random_real()) / sqrtf((float)c->head_dim)
                                : 1 / sqrtf((float)c->head_dim);
    for (uint32_t r = 0; r < c->num_requests; r++) {
        uint32_t most = 1;
        for (uint32_t h = 0; h < c->num_kv_heads; h++) {
            uint32_t count = pages[r * c->num_kv_heads + h];
            most = count > most ? count : most;
        }
        uint32_t context = most * RK_PAGE_TOKENS - random_below(RK_PAGE_TOKENS);
        row_positions(wish, c, r, context);
        for (uint32_t h = 0; h < c->num_kv_heads; h++) {
            uint32_t list = r * c->num_kv_heads + h;
            case_list(m, wish, c, &c->lists[list], pages[list], context,
                      c->positions[c->row_first[r + 1] - 1]);
        }
    }
}

/* ---- data ---- */

static float e4m3_value(uint8_t byte)
{
    int exponent = byte >> 3 & 15;
    int mantissa = byte & 7;
    double size = exponent == 0 ? ldexp(mantissa, -9) : ldexp(8 + mantissa, exponent - 10);
    return (float)(byte & 0x80 ? -size : size);
}

static void page_fill(const struct attention_memory *m, const struct attention_case *c,
                      uint32_t slot, uint32_t offset, const float *e4m3)
{
    size_t count = page_values(c);
    uint8_t *page = m->pages + slot * PAGE_BYTES_MAX;
    float *values = m->values + slot * PAGE_VALUES;
    if (c->format == KERNELS_PAGE_BF16) {
        memcpy(page, m->reals + offset, count * 2);
        for (size_t i = 0; i < count; i++) {
            values[i] = from_bf16(m->reals[offset + i]);
        }
    } else {
        const float *scales = m->scales + (size_t)c->pages[slot] * 2;
        memcpy(page, m->bytes + offset, count);
        for (size_t i = 0; i < count; i++) {
            values[i] = e4m3[page[i]] * scales[i >= count / 2];
        }
    }
    size_t row_bytes = page_bytes(c) / (2 * RK_PAGE_TOKENS);
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        if (!(c->needed[slot] >> r & 1)) {
            memset(page + r * row_bytes, 0xff, row_bytes);
            memset(page + (RK_PAGE_TOKENS + r) * row_bytes, 0xff, row_bytes);
        }
    }
}

void case_upload(struct attention_memory *m, const struct attention_case *c)
{
    float e4m3[256];
    uint32_t offset = random_below(REALS);
    for (uint32_t i = 0; i < 256; i++) {
        e4m3[i] = e4m3_value((uint8_t)i);
    }
#pragma omp parallel for schedule(static) if (c->num_pages > 16)
    for (uint32_t slot = 0; slot < c->num_pages; slot++) {
        uint32_t from = (offset + slot * 40503u) % (uint32_t)(REALS - PAGE_VALUES);
        page_fill(m, c, slot, from, e4m3);
    }
    struct kernels_pool *pool = case_pool(m, c);
    uint8_t *pages = kernels_pool_pages(pool);
    size_t bytes = page_bytes(c);
    for (uint32_t slot = 0; slot < c->num_pages; slot++) {
        must_copy(m->fixture, pages + (size_t)c->pages[slot] * bytes,
                  m->pages + slot * PAGE_BYTES_MAX, bytes);
    }
    size_t count = (size_t)c->num_variants * c->rows * num_heads(c) * c->head_dim;
    for (size_t i = 0; i < count; i++) {
        m->q[i] = to_bf16(c->gain * from_bf16(m->reals[(i * 7 + offset) % REALS]));
    }
    must_copy(m->fixture, m->device_q, m->q, count * sizeof(*m->q));
    memcpy(m->positions, c->positions, c->rows * sizeof(*m->positions));
    must_copy(m->fixture, m->device_positions, m->positions, c->rows * sizeof(*m->positions));
}

void case_withdraw(struct attention_memory *m, const struct attention_case *c)
{
    uint8_t *pages = kernels_pool_pages(case_pool(m, c));
    size_t bytes = page_bytes(c);
    for (uint32_t slot = 0; slot < c->num_pages; slot++) {
        must_fill(m->fixture, pages + (size_t)c->pages[slot] * bytes, 0xff, bytes);
    }
}

/* ---- what attention is ---- */

static bool visible(const struct attention_case *c, const struct kernels_page_list *list,
                    const struct kernels_page_ref *ref, uint32_t r, int64_t t)
{
    int64_t at = row_position(c, ref, r);
    return (ref->live >> r & 1) && at <= t &&
           (list->window == 0 || at > t - (int64_t)list->window || at < (int64_t)list->sink);
}

static double dot(const float *a, const float *b, uint32_t count)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (uint32_t i = 0; i < count; i++) {
        sum += (double)a[i] * (double)b[i];
    }
    return sum;
}

static void query_copies(const struct attention_memory *m, const struct attention_case *c,
                         uint32_t row, uint32_t head, float q[CASE_VARIANTS_MAX][128])
{
    for (uint32_t v = 0; v < c->num_variants; v++) {
        size_t offset = (((size_t)v * c->rows + row) * num_heads(c) + head) * c->head_dim;
        for (uint32_t i = 0; i < c->head_dim; i++) {
            q[v][i] = from_bf16(m->q[offset + i]);
        }
    }
}

static const float *ref_values(const struct attention_memory *m, const struct kernels_page_ref *ref)
{
    return m->values + (size_t)m->slots[ref->page] * PAGE_VALUES;
}

static const struct kernels_page_list *list_of(const struct attention_case *c, uint32_t row,
                                               uint32_t head)
{
    uint32_t request = 0;
    while (row >= c->row_first[request + 1]) {
        request++;
    }
    return &c->lists[request * c->num_kv_heads + head / c->group];
}

/* scores: [pages of the list][64]; -inf where nothing is seen. */
static void expect_row(const struct attention_memory *m, const struct attention_case *c,
                       uint32_t row, uint32_t head, double *scores)
{
    const struct kernels_page_list *list = list_of(c, row, head);
    float q[CASE_VARIANTS_MAX][128];
    uint32_t d = c->head_dim;
    double max = -INFINITY;
    double sum = 0;
    size_t index = (size_t)row * num_heads(c) + head;
    double *out = m->expected_out + index * d;
    query_copies(m, c, row, head, q);
    for (uint32_t i = 0; i < list->count; i++) {
        const struct kernels_page_ref *ref = &c->refs[list->first + i];
        const float *k = ref_values(m, ref);
        for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
            double *score = &scores[(size_t)i * RK_PAGE_TOKENS + r];
            *score = -INFINITY;
            if (visible(c, list, ref, r, c->positions[row])) {
                *score = dot(q[ref->variant], k + (size_t)r * d, d) * (double)c->scale;
                max = *score > max ? *score : max;
            }
        }
    }
    memset(out, 0, d * sizeof(*out));
    for (size_t j = 0; j < (size_t)list->count * RK_PAGE_TOKENS; j++) {
        if (scores[j] == -INFINITY) {
            continue;
        }
        double weight = exp(scores[j] - max);
        const float *v = ref_values(m, &c->refs[list->first + j / RK_PAGE_TOKENS]) +
                         (RK_PAGE_TOKENS + j % RK_PAGE_TOKENS) * d;
        sum += weight;
#pragma omp simd
        for (uint32_t e = 0; e < d; e++) {
            out[e] += weight * (double)v[e];
        }
    }
    for (uint32_t e = 0; e < d && sum > 0; e++) {
        out[e] /= sum;
    }
    m->expected_lse[index] = sum > 0 ? max + log(sum) : -INFINITY;
}

void case_expect(struct attention_memory *m, const struct attention_case *c)
{
    uint32_t tasks = c->rows * num_heads(c);
    uint32_t pages = 0;
    for (uint32_t i = 0; i < c->num_requests * c->num_kv_heads; i++) {
        pages = c->lists[i].count > pages ? c->lists[i].count : pages;
    }
#pragma omp parallel
    {
        double *scores = must_allocate(((size_t)pages * RK_PAGE_TOKENS + 1) * sizeof(*scores));
#pragma omp for schedule(dynamic, 4)
        for (uint32_t task = 0; task < tasks; task++) {
            expect_row(m, c, task / num_heads(c), task % num_heads(c), scores);
        }
        rk_free(scores);
    }
}

static void expect_mass_row(const struct attention_memory *m, const struct attention_case *c,
                            uint32_t row, uint32_t head, double *expected)
{
    const struct kernels_page_list *list = list_of(c, row, head);
    float q[CASE_VARIANTS_MAX][128];
    double lse = m->expected_lse[(size_t)row * num_heads(c) + head];
    query_copies(m, c, row, head, q);
    for (uint32_t i = list->first; i < list->first + list->count; i++) {
        const struct kernels_page_ref *ref = &c->refs[i];
        const float *k = ref_values(m, ref);
        for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
            if (visible(c, list, ref, r, c->positions[row])) {
                double score = dot(q[ref->variant], k + (size_t)r * c->head_dim, c->head_dim);
                expected[(size_t)i * RK_PAGE_TOKENS + r] += exp(score * (double)c->scale - lse);
            }
        }
    }
}

/* Lists share no refs, so that a KV head can have a thread. */
void case_expect_mass(const struct attention_memory *m, const struct attention_case *c,
                      double *expected)
{
    memset(expected, 0, (size_t)c->num_refs * RK_PAGE_TOKENS * sizeof(*expected));
#pragma omp parallel for schedule(dynamic, 1)
    for (uint32_t kv_head = 0; kv_head < c->num_kv_heads; kv_head++) {
        for (uint32_t row = 0; row < c->rows; row++) {
            for (uint32_t h = 0; h < c->group; h++) {
                expect_mass_row(m, c, row, kv_head * c->group + h, expected);
            }
        }
    }
}

const char *case_text(const struct attention_case *c)
{
    static char text[200];
    (void)snprintf(text, sizeof(text),
                   "%s %s head_dim %u, %u KV heads of %u, %u requests, %u rows, %u refs, %u "
                   "explicit, %u variants",
                   c->kind == KERNELS_PLAN_PREFILL ? "prefill" : "decode",
                   c->format == KERNELS_PAGE_BF16 ? "bf16" : "e4m3", c->head_dim, c->num_kv_heads,
                   c->group, c->num_requests, c->rows, c->num_refs, c->num_explicit,
                   c->num_variants);
    return text;
}
