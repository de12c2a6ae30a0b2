/*
 * Pages bit by bit against kernels/cpu/pages_reference.h, on a pool in host memory beside the
 * device's; appended rows and queries also against rotation in f64.
 */
#include "tests/kernels_cuda/support.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"
#include "kernels/cpu/pages_reference.h"
#include "kernels/device_internal.h"

#include <math.h>

#define POOL_PAGES    256
#define POSITIONS_MAX 2048
#define ROWS_MAX      512
#define KV_HEADS_MAX  4
#define Q_HEADS_MAX   32
#define VARIANTS_MAX  4
#define RUNS_MAX      40
#define DIM_MAX       128
#define HALF_MAX      (RK_PAGE_TOKENS * DIM_MAX) /* values of K, or V, of a page */

/* Limits of relative L2 errors against f64: what rounding to the format costs. */
#define BF16_LIMIT 4e-3
#define E4M3_LIMIT 6e-2

struct page_memory {
    const struct fixture *fixture;
    struct kernels_pool *pools[2][2]; /* [head_dim == 128][format] */
    struct kernels_pool mirror;       /* in host memory, of the case's shape */
    float *cosines;                   /* [POSITIONS_MAX][head_dim / 2] of the case */
    float *sines;
    struct kernels_device_rope rope;      /* host */
    struct kernels_device_rope rope_sent; /* device */
    uint8_t *staging;                     /* pinned [POOL_PAGES][32 KB] */
    uint16_t *x;                          /* pinned: sources */
    uint16_t *x2;
    uint16_t *result; /* pinned */
    uint16_t *expected;
    int32_t *indices; /* pinned */
    uint64_t *sums;   /* pinned */
    struct kernels_append_run *runs;
    void *device_x;
    void *device_x2;
    void *device_result;
    int32_t *device_indices;
    uint64_t *device_sums;
    struct kernels_append_run *device_runs;
    double *values; /* [POOL_PAGES][2][64][128]: appended rows before rounding */
    int32_t fill[POOL_PAGES];
};

#define X_MAX   ((size_t)ROWS_MAX * Q_HEADS_MAX * DIM_MAX)
#define OUT_MAX (X_MAX * VARIANTS_MAX)

static struct page_memory *page_memory_create(const struct fixture *fixture)
{
    const enum kernels_memory_kind pinned = KERNELS_MEMORY_PINNED;
    const enum kernels_memory_kind device = KERNELS_MEMORY_DEVICE;
    const size_t pool_bytes = (size_t)POOL_PAGES * 4 * HALF_MAX;
    const size_t table = (size_t)POSITIONS_MAX * DIM_MAX / 2 * sizeof(float);
    struct page_memory *m = must_allocate(sizeof(*m));
    memset(m, 0, sizeof(*m));
    m->fixture = fixture;
    for (uint32_t i = 0; i < 4; i++) {
        struct rk_error error = {.status = RK_OK};
        struct kernels_pool_options options = {.head_dim = i / 2 ? 128 : 64,
                                               .format = (enum kernels_page_format)(i % 2),
                                               .pages = POOL_PAGES};
        must(kernels_pool_create(fixture->device, &options, &m->pools[i / 2][i % 2], &error),
             &error, "kernels_pool_create");
    }
    m->mirror.pages = must_allocate(pool_bytes);
    m->mirror.scales = must_allocate(POOL_PAGES * 2 * sizeof(float));
    m->cosines = must_create(fixture, pinned, table);
    m->sines = must_create(fixture, pinned, table);
    m->rope_sent.cos = must_create(fixture, device, table);
    m->rope_sent.sin = must_create(fixture, device, table);
    m->staging = must_create(fixture, pinned, pool_bytes);
    m->x = must_create(fixture, pinned, X_MAX * 2);
    m->x2 = must_create(fixture, pinned, X_MAX * 2);
    m->result = must_create(fixture, pinned, OUT_MAX * 2);
    m->expected = must_allocate(OUT_MAX * 2);
    m->indices = must_create(fixture, pinned, 2 * ROWS_MAX * sizeof(int32_t));
    m->sums = must_create(fixture, pinned, POOL_PAGES * sizeof(uint64_t));
    m->runs = must_create(fixture, pinned, RUNS_MAX * sizeof(*m->runs));
    m->device_x = must_create(fixture, device, X_MAX * 2);
    m->device_x2 = must_create(fixture, device, X_MAX * 2);
    m->device_result = must_create(fixture, device, OUT_MAX * 2);
    m->device_indices = must_create(fixture, device, 2 * ROWS_MAX * sizeof(int32_t));
    m->device_sums = must_create(fixture, device, POOL_PAGES * sizeof(uint64_t));
    m->device_runs = must_create(fixture, device, RUNS_MAX * sizeof(*m->runs));
    m->values = must_allocate((size_t)POOL_PAGES * 2 * HALF_MAX * sizeof(*m->values));
    return m;
}

static void page_memory_destroy(struct page_memory *m)
{
    struct kernels_device *device = m->fixture->device;
    union {
        const float *in;
        void *out;
    } cosines = {.in = m->rope_sent.cos}, sines = {.in = m->rope_sent.sin};
    for (uint32_t i = 0; i < 4; i++) {
        kernels_pool_destroy(m->pools[i / 2][i % 2]);
    }
    void *pinned[] = {m->cosines, m->sines,   m->staging, m->x,   m->x2,
                      m->result,  m->indices, m->sums,    m->runs};
    for (size_t i = 0; i < sizeof(pinned) / sizeof(pinned[0]); i++) {
        kernels_memory_destroy(device, KERNELS_MEMORY_PINNED, pinned[i]);
    }
    void *on_device[] = {cosines.out,      sines.out,         m->device_x,    m->device_x2,
                         m->device_result, m->device_indices, m->device_sums, m->device_runs};
    for (size_t i = 0; i < sizeof(on_device) / sizeof(on_device[0]); i++) {
        kernels_memory_destroy(device, KERNELS_MEMORY_DEVICE, on_device[i]);
    }
    rk_free(m->mirror.pages);
    rk_free(m->mirror.scales);
    rk_free(m->expected);
    rk_free(m->values);
    rk_free(m);
}

/* ---- cases in common ---- */

/* Chooses a pool, fills it and its mirror with the same random bytes. */
static struct kernels_pool *pool_begin(struct page_memory *m)
{
    uint32_t large = random_below(2);
    uint32_t format = random_below(2);
    struct kernels_pool *pool = m->pools[large][format];
    m->mirror.options = pool->options;
    m->mirror.page_bytes = kernels_pool_page_bytes(pool);
    uint32_t *words = m->mirror.pages;
    size_t bytes = m->mirror.page_bytes * POOL_PAGES;
    for (size_t i = 0; i < bytes / 4; i++) {
        words[i] = random_bits();
    }
    memcpy(m->staging, words, bytes);
    must_copy(m->fixture, kernels_pool_pages(pool), m->staging, bytes);
    if (format == KERNELS_PAGE_E4M3) {
        for (uint32_t i = 0; i < 2 * POOL_PAGES; i++) {
            m->mirror.scales[i] = random_real();
        }
        must_copy(m->fixture, kernels_pool_scales(pool), m->mirror.scales,
                  2 * POOL_PAGES * sizeof(float));
    }
    must_wait(m->fixture);
    return pool;
}

static void pool_compare(struct page_memory *m, struct kernels_pool *pool, struct family *family,
                         const char *what)
{
    size_t page_bytes = m->mirror.page_bytes;
    const uint8_t *expected = m->mirror.pages;
    must_copy(m->fixture, m->staging, kernels_pool_pages(pool), page_bytes * POOL_PAGES);
    must_wait(m->fixture);
    for (size_t i = 0; i < page_bytes * POOL_PAGES; i++) {
        if (m->staging[i] != expected[i]) {
            fail(family, "%s: page %zu, byte %zu is %#x, not %#x; head_dim %u, format %d", what,
                 i / page_bytes, i % page_bytes, m->staging[i], expected[i],
                 m->mirror.options.head_dim, (int)m->mirror.options.format);
            return;
        }
    }
}

static void rope_begin(struct page_memory *m, uint32_t head_dim)
{
    uint32_t half = head_dim / 2;
    union {
        const float *in;
        void *out;
    } cosines = {.in = m->rope_sent.cos}, sines = {.in = m->rope_sent.sin};
    if (m->rope.head_dim == head_dim) {
        return;
    }
    for (uint32_t p = 0; p < POSITIONS_MAX; p++) {
        for (uint32_t i = 0; i < half; i++) {
            double angle = p * pow(10000.0, -2.0 * i / head_dim);
            m->cosines[(size_t)p * half + i] = (float)cos(angle);
            m->sines[(size_t)p * half + i] = (float)sin(angle);
        }
    }
    m->rope = (struct kernels_device_rope){
        .cos = m->cosines, .sin = m->sines, .positions_max = POSITIONS_MAX, .head_dim = head_dim};
    m->rope_sent.positions_max = POSITIONS_MAX;
    m->rope_sent.head_dim = head_dim;
    size_t bytes = (size_t)POSITIONS_MAX * half * sizeof(float);
    must_copy(m->fixture, cosines.out, m->cosines, bytes);
    must_copy(m->fixture, sines.out, m->sines, bytes);
    must_wait(m->fixture);
}

static void rotate_f64(const uint16_t *x, uint32_t head_dim, double position, double *ret_y)
{
    uint32_t half = head_dim / 2;
    for (uint32_t i = 0; i < half; i++) {
        double angle = position * pow(10000.0, -2.0 * i / head_dim);
        double a = (double)from_bf16(x[i]);
        double b = (double)from_bf16(x[i + half]);
        ret_y[i] = a * cos(angle) - b * sin(angle);
        ret_y[i + half] = b * cos(angle) + a * sin(angle);
    }
}

/* ---- append ---- */

struct append_source {
    uint32_t rows;
    uint32_t num_kv_heads;
};

/* The numbers of one call. Larger ones from call to call, at times: pages are then scaled anew. */
static struct append_source append_source(struct page_memory *m, uint32_t head_dim, float gain)
{
    struct append_source s = {.rows = random_between(RK_PAGE_TOKENS, 200),
                              .num_kv_heads = random_between(1, KV_HEADS_MAX)};
    size_t count = (size_t)s.rows * s.num_kv_heads * head_dim;
    float v_gain = random_chance(8) ? 0 : gain * (1.5f + random_real());
    for (size_t i = 0; i < count; i++) {
        m->x[i] = to_bf16(gain * random_real());
        m->x2[i] = to_bf16(v_gain * random_real());
    }
    for (uint32_t r = 0; r < s.rows; r++) {
        m->indices[r] = (int32_t)random_between(POSITIONS_MAX / 2, POSITIONS_MAX - 1);
    }
    must_copy(m->fixture, m->device_x, m->x, count * 2);
    must_copy(m->fixture, m->device_x2, m->x2, count * 2);
    must_copy(m->fixture, m->device_indices, m->indices, s.rows * sizeof(int32_t));
    return s;
}

static uint32_t append_runs(struct page_memory *m, const struct append_source *s,
                            const int32_t *pages, uint32_t num_pages)
{
    uint32_t num_runs = 0;
    for (uint32_t i = 0; i < num_pages; i++) {
        int32_t *fill = &m->fill[pages[i]];
        if (*fill == RK_PAGE_TOKENS || random_chance(6)) {
            *fill = 0;
        }
        uint32_t count = random_between(1, (uint32_t)(RK_PAGE_TOKENS - *fill));
        m->runs[num_runs++] =
            (struct kernels_append_run){.page = pages[i],
                                        .page_row = *fill,
                                        .count = (int32_t)count,
                                        .row = (int32_t)random_below(s->rows - count + 1),
                                        .kv_head = (int32_t)random_below(s->num_kv_heads),
                                        .base = (int32_t)random_below(POSITIONS_MAX / 2)};
        *fill += (int32_t)count;
    }
    must_copy(m->fixture, m->device_runs, m->runs, num_runs * sizeof(*m->runs));
    return num_runs;
}

static void append_note(struct page_memory *m, const struct append_source *s, uint32_t num_runs)
{
    uint32_t d = m->mirror.options.head_dim;
    for (uint32_t i = 0; i < num_runs; i++) {
        const struct kernels_append_run *run = &m->runs[i];
        double *k = m->values + (size_t)run->page * 2 * HALF_MAX;
        double *v = k + HALF_MAX;
        for (int32_t j = 0; j < run->count; j++) {
            size_t row = (size_t)(run->row + j);
            size_t offset = (row * s->num_kv_heads + (size_t)run->kv_head) * d;
            size_t to = (size_t)(run->page_row + j) * d;
            rotate_f64(m->x + offset, d, m->indices[row] - run->base, k + to);
            for (uint32_t e = 0; e < d; e++) {
                v[to + e] = (double)from_bf16(m->x2[offset + e]);
            }
        }
    }
}

/* m->staging holds the pool as the device left it. */
static void append_check_f64(struct page_memory *m, const int32_t *pages, uint32_t num_pages,
                             struct family *family)
{
    uint32_t d = m->mirror.options.head_dim;
    bool bf16 = m->mirror.options.format == KERNELS_PAGE_BF16;
    struct l2 l2 = {0};
    for (uint32_t i = 0; i < num_pages; i++) {
        const uint8_t *page = m->staging + (size_t)pages[i] * m->mirror.page_bytes;
        for (uint32_t half = 0; half < 2; half++) {
            const double *expected = m->values + ((size_t)pages[i] * 2 + half) * HALF_MAX;
            const float scale = m->mirror.scales[pages[i] * 2 + (int32_t)half];
            for (size_t e = 0; e < (size_t)RK_PAGE_TOKENS * d; e++) {
                size_t at = half * (size_t)RK_PAGE_TOKENS * d + e;
                uint16_t word;
                memcpy(&word, page + 2 * at * bf16, sizeof(word));
                double value =
                    bf16 ? (double)from_bf16(word) : (double)e4m3_to_f32(page[at]) * (double)scale;
                bool written = e < (size_t)m->fill[pages[i]] * d;
                l2_add(&l2, value, written ? expected[e] : 0);
            }
        }
    }
    l2_check(family, &l2, bf16 ? BF16_LIMIT : E4M3_LIMIT, "against f64");
}

static void append_scales(struct page_memory *m, struct kernels_pool *pool, struct family *family)
{
    float *scales = (float *)(void *)m->sums;
    must_copy(m->fixture, scales, kernels_pool_scales(pool), 2 * POOL_PAGES * sizeof(float));
    must_wait(m->fixture);
    for (uint32_t i = 0; i < 2 * POOL_PAGES; i++) {
        if (scales[i] != m->mirror.scales[i]) {
            fail(family, "scale %u of page %u is %a, not %a", i % 2, i / 2, (double)scales[i],
                 (double)m->mirror.scales[i]);
            return;
        }
    }
}

static void append_run(struct page_memory *m, struct family *family)
{
    struct kernels_pool *pool = pool_begin(m);
    uint32_t d = pool->options.head_dim;
    int32_t pages[POOL_PAGES];
    uint32_t num_pages = random_between(1, RUNS_MAX);
    uint32_t calls = random_between(1, 5);
    float gain = 1;
    rope_begin(m, d);
    for (int32_t i = 0; i < POOL_PAGES; i++) {
        pages[i] = i;
        m->fill[i] = 0;
    }
    random_shuffle(pages, POOL_PAGES);
    for (uint32_t i = 0; i < calls; i++) {
        struct rk_error error = {.status = RK_OK};
        struct append_source s = append_source(m, d, gain);
        struct kernels_rope_append call = {.pool = pool,
                                           .rope = &m->rope_sent,
                                           .rows = s.rows,
                                           .num_kv_heads = s.num_kv_heads,
                                           .k = m->device_x,
                                           .v = m->device_x2,
                                           .positions = m->device_indices,
                                           .runs = m->device_runs};
        call.num_runs = append_runs(m, &s, pages, num_pages);
        must(kernels_rope_append(m->fixture->device, &call, m->fixture->stream, &error), &error,
             "kernels_rope_append");
        call.pool = &m->mirror;
        call.rope = &m->rope;
        call.k = m->x;
        call.v = m->x2;
        call.positions = m->indices;
        call.runs = m->runs;
        must(pages_reference_rope_append(NULL, &call, NULL, &error), &error, "reference");
        append_note(m, &s, call.num_runs);
        must_wait(m->fixture); /* sources in pinned memory are now to change */
        gain *= random_chance(2) ? 1 : 1.5f + random_real();
    }
    pool_compare(m, pool, family, "append");
    append_check_f64(m, pages, num_pages, family);
    if (pool->options.format == KERNELS_PAGE_E4M3) {
        append_scales(m, pool, family);
    }
}

/* ---- queries ---- */

static void queries_run(struct page_memory *m, struct family *family)
{
    struct rk_error error = {.status = RK_OK};
    uint32_t d = random_chance(2) ? 64 : 128;
    int32_t *bases = m->indices + ROWS_MAX;
    struct kernels_rope_queries call = {.rope = &m->rope_sent,
                                        .rows = random_log(1, 64),
                                        .num_q_heads = random_between(1, Q_HEADS_MAX),
                                        .num_variants = random_between(1, VARIANTS_MAX),
                                        .q = m->device_x,
                                        .positions = m->device_indices,
                                        .bases = m->device_indices + ROWS_MAX,
                                        .out = m->device_result};
    size_t count = (size_t)call.rows * call.num_q_heads * d;
    rope_begin(m, d);
    for (size_t i = 0; i < count; i++) {
        m->x[i] = to_bf16(random_real());
    }
    for (uint32_t i = 0; i < ROWS_MAX; i++) {
        m->indices[i] = (int32_t)random_below(POSITIONS_MAX);
        bases[i] = (int32_t)random_below(POSITIONS_MAX);
    }
    must_copy(m->fixture, m->device_x, m->x, count * 2);
    must_copy(m->fixture, m->device_indices, m->indices, 2 * ROWS_MAX * sizeof(int32_t));
    must_fill(m->fixture, m->device_result, 0xff, count * call.num_variants * 2);
    must(kernels_rope_queries(m->fixture->device, &call, m->fixture->stream, &error), &error,
         "kernels_rope_queries");
    must_copy(m->fixture, m->result, m->device_result, count * call.num_variants * 2);
    call.rope = &m->rope;
    call.q = m->x;
    call.positions = m->indices;
    call.bases = bases;
    call.out = m->expected;
    must(pages_reference_rope_queries(NULL, &call, NULL, &error), &error, "reference");
    must_wait(m->fixture);

    struct l2 l2 = {0};
    double y[DIM_MAX];
    for (size_t i = 0; i < count * call.num_variants; i += d) {
        size_t row = i % count / d / call.num_q_heads;
        rotate_f64(m->x + i % count, d, m->indices[row] - bases[i / count], y);
        for (uint32_t e = 0; e < d; e++) {
            l2_add(&l2, (double)from_bf16(m->result[i + e]), y[e]);
        }
        if (memcmp(m->result + i, m->expected + i, d * sizeof(*m->result)) != 0) {
            fail(family, "variant %zu, row %zu differs from the reference; head_dim %u", i / count,
                 row, d);
            return;
        }
    }
    l2_check(family, &l2, BF16_LIMIT, "against f64");
}

/* ---- gather, scatter, checksum ---- */

static uint32_t random_pages(struct page_memory *m, bool *ret_pinned)
{
    for (int32_t i = 0; i < POOL_PAGES; i++) {
        m->indices[i] = i;
    }
    random_shuffle(m->indices, POOL_PAGES);
    must_copy(m->fixture, m->device_indices, m->indices, POOL_PAGES * sizeof(int32_t));
    must_wait(m->fixture);
    *ret_pinned = random_chance(2);
    return random_chance(10) ? 0 : random_log(1, POOL_PAGES);
}

static void moves_run(struct page_memory *m, struct family *family)
{
    struct rk_error error = {.status = RK_OK};
    struct kernels_pool *pool = pool_begin(m);
    size_t bytes = m->mirror.page_bytes;
    uint8_t *mirror = m->mirror.pages;
    bool pinned;
    uint32_t count = random_pages(m, &pinned);
    memset(m->staging, 0xff, bytes * POOL_PAGES);
    must(kernels_pages_gather(m->fixture->device, pool, pinned ? m->indices : m->device_indices,
                              count, m->staging, m->fixture->stream, &error),
         &error, "kernels_pages_gather");
    must_wait(m->fixture);
    for (uint32_t i = 0; i < POOL_PAGES; i++) {
        const uint8_t *page = m->staging + i * bytes;
        if (i < count && memcmp(page, mirror + (size_t)m->indices[i] * bytes, bytes) != 0) {
            fail(family, "gather: %u of %u, page %d of %zu bytes", i, count, m->indices[i], bytes);
        } else if (i >= count && (page[0] != 0xff || page[bytes - 1] != 0xff)) {
            fail(family, "gather of %u wrote page %u of the host", count, i);
        }
    }
    count = random_pages(m, &pinned);
    for (size_t i = 0; i < count * bytes / 4; i++) {
        uint32_t word = random_bits();
        memcpy(m->staging + 4 * i, &word, sizeof(word));
    }
    must(kernels_pages_scatter(m->fixture->device, pool, pinned ? m->indices : m->device_indices,
                               count, m->staging, m->fixture->stream, &error),
         &error, "kernels_pages_scatter");
    must_wait(m->fixture);
    for (uint32_t i = 0; i < count; i++) {
        memcpy(mirror + (size_t)m->indices[i] * bytes, m->staging + i * bytes, bytes);
    }
    pool_compare(m, pool, family, "scatter");
}

static void checksum_run(struct page_memory *m, struct family *family)
{
    struct rk_error error = {.status = RK_OK};
    struct kernels_pool *pool = pool_begin(m);
    bool pinned;
    uint32_t count = random_pages(m, &pinned);
    must_fill(m->fixture, m->device_sums, 0xff, POOL_PAGES * sizeof(uint64_t));
    must(kernels_pages_checksum(m->fixture->device, pool, pinned ? m->indices : m->device_indices,
                                count, m->device_sums, m->fixture->stream, &error),
         &error, "kernels_pages_checksum");
    must_copy(m->fixture, m->sums, m->device_sums, POOL_PAGES * sizeof(uint64_t));
    must_wait(m->fixture);
    for (uint32_t i = 0; i < POOL_PAGES; i++) {
        const uint8_t *page =
            (const uint8_t *)m->mirror.pages + (size_t)m->indices[i] * m->mirror.page_bytes;
        uint64_t expected = i < count ? rk_hash_xxh3(page, m->mirror.page_bytes) : UINT64_MAX;
        if (m->sums[i] != expected) {
            fail(family, "sum %u of %u is %#llx, not %#llx; pages of %zu bytes", i, count,
                 (unsigned long long)m->sums[i], (unsigned long long)expected,
                 m->mirror.page_bytes);
            return;
        }
    }
}

static void family_run(const struct fixture *fixture, struct family *family,
                       void (*run)(struct page_memory *m, struct family *family))
{
    struct page_memory *m = page_memory_create(fixture);
    for (uint64_t i = fixture->first; i < fixture->first + fixture->cases; i++) {
        family->number = i;
        random_begin(fixture, family->name, i);
        run(m, family);
        family->cases++;
    }
    page_memory_destroy(m);
}

void family_append(const struct fixture *fixture, struct family *family)
{
    family_run(fixture, family, append_run);
}

void family_queries(const struct fixture *fixture, struct family *family)
{
    family_run(fixture, family, queries_run);
}

void family_moves(const struct fixture *fixture, struct family *family)
{
    family_run(fixture, family, moves_run);
}

void family_checksum(const struct fixture *fixture, struct family *family)
{
    family_run(fixture, family, checksum_run);
}
