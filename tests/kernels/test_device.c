/*
 * Goal:   the CPU device computes what device.h defines, from what its callers
 *         hand over, and every call refuses what it cannot do.
 * Method: small random batches with windows, sinks, holes, explicit positions,
 *         query variants and empty lists, in pools where every row that nothing
 *         may see is NaN, against a double loop over tokens that shares no code
 *         with it; then one wrong argument at a time, and failed allocations.
 */
#include "kernels/cpu/paged_reference.h"
#include "kernels/device_internal.h"
#include "tests/kernels/kernels_support.h"

#define ROUNDS       200
#define REQUESTS_MAX 3
#define HEADS_MAX    3
#define PAGES_MAX    6 /* of a list */
#define POOL_PAGES   (REQUESTS_MAX * HEADS_MAX * PAGES_MAX)
#define ROWS_MAX     40
#define EXPLICIT_MAX POOL_PAGES

struct fixture {
    struct kernels_device *device;
    struct kernels_pool *pool;
    struct kernels_plan *plan;
    struct kernels_workspace *workspace;
    struct kernels_plan_options plan_options;
    struct kernels_pool_options pool_options;
    struct kernels_batch batch;
    uint32_t row_first[REQUESTS_MAX + 1];
    int32_t positions[ROWS_MAX];
    struct kernels_page_list lists[REQUESTS_MAX * HEADS_MAX];
    struct kernels_page_ref refs[POOL_PAGES];
    int32_t explicit_positions[EXPLICIT_MAX][RK_PAGE_TOKENS];
    uint32_t rows;
    uint16_t *q;
    uint16_t *out;
    float *lse;
    float *mass;
    double *want;      /* [rows][q heads][head_dim] */
    double *want_lse;  /* [rows][q heads] */
    double *want_mass; /* [refs][64] */
};

static void must(enum rk_status status, const struct rk_error *error)
{
    if (status != RK_OK) {
        print_error("%s\n", error->text);
    }
    assert_int_equal(status, RK_OK);
}

static bool one_in(uint32_t n)
{
    return support_below(n) == 0;
}

static void *memory(struct fixture *f, size_t bytes)
{
    struct rk_error error;
    void *block = NULL;
    must(kernels_memory_create(f->device, KERNELS_MEMORY_DEVICE, bytes, &block, &error), &error);
    return block;
}

/* ---- a random case ---- */

static void random_refs(struct fixture *f)
{
    static const uint32_t windows[] = {0, 0, 1, 30, 64, 150, UINT32_MAX};
    static const uint32_t sinks[] = {0, 4, 70, UINT32_MAX};
    uint32_t n = 0;
    for (uint32_t i = 0; i < f->batch.num_requests * f->plan_options.num_kv_heads; i++) {
        uint32_t count = one_in(5) ? 0 : 1 + support_below(PAGES_MAX);
        bool whole = one_in(2);
        f->lists[i] = (struct kernels_page_list){.first = n,
                                                 .count = count,
                                                 .window = windows[support_below(7)],
                                                 .sink = sinks[support_below(4)]};
        for (uint32_t p = 0; p < count; p++, n++) {
            int32_t position = whole ? (int32_t)p * 64 : (int32_t)support_below(500);
            f->refs[n] = (struct kernels_page_ref){
                .page = (int32_t)n,
                .variant = (int32_t)support_below(f->batch.num_variants),
                .position = position,
                .positions = -1,
                .live = whole       ? UINT64_MAX
                        : one_in(5) ? 0
                                    : (uint64_t)support_random() << 32 | support_random()};
            if (!whole && one_in(3)) {
                f->refs[n].positions = (int32_t)f->batch.num_explicit;
                for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
                    position += (int32_t)support_below(8);
                    f->explicit_positions[f->batch.num_explicit][r] = position;
                }
                f->batch.num_explicit++;
            }
        }
    }
    for (uint32_t i = n; i > 1; i--) { /* Pages stand anywhere. */
        uint32_t other = support_below(i);
        int32_t page = f->refs[i - 1].page;
        f->refs[i - 1].page = f->refs[other].page;
        f->refs[other].page = page;
    }
    f->batch.num_refs = n;
}

static void random_rows(struct fixture *f)
{
    bool decode = f->plan_options.kind == KERNELS_PLAN_DECODE;
    f->rows = 0;
    for (uint32_t r = 0; r < f->batch.num_requests; r++) {
        uint32_t rows = (r == 0) + support_below(decode ? 3 : ROWS_MAX / REQUESTS_MAX);
        int32_t position = (int32_t)support_below(400);
        for (uint32_t i = 0; i < rows; i++) {
            f->positions[f->rows++] = position;
            position += 1 + (int32_t)support_below(2) * (int32_t)support_below(20);
        }
        f->row_first[r + 1] = f->rows;
    }
}

static int64_t token_position(const struct fixture *f, const struct kernels_page_ref *ref,
                              uint32_t r)
{
    return ref->positions < 0 ? (int64_t)ref->position + r
                              : f->explicit_positions[ref->positions][r];
}

static bool token_visible(const struct fixture *f, const struct kernels_page_list *list,
                          const struct kernels_page_ref *ref, uint32_t r, int64_t t)
{
    int64_t c = token_position(f, ref, r);
    int64_t window = list->window;
    if (c > t || (ref->live & UINT64_C(1) << r) == 0) {
        return false;
    }
    return window == 0 || c > t - window || c < (int64_t)list->sink;
}

/* Index of an element of K (which 0) or V (1) in the pool. */
static size_t element_at(const struct fixture *f, int32_t page, uint32_t which, uint32_t r,
                         uint32_t i)
{
    return (((size_t)page * 2 + which) * RK_PAGE_TOKENS + r) * f->pool_options.head_dim + i;
}

/* Any bytes where nothing looks: NaN. */
static void random_pool(struct fixture *f)
{
    bool bf16 = f->pool_options.format == KERNELS_PAGE_BF16;
    uint32_t d = f->pool_options.head_dim;
    memset(kernels_pool_pages(f->pool), 0xff, kernels_pool_page_bytes(f->pool) * POOL_PAGES);
    for (uint32_t l = 0; l < f->batch.num_requests * f->plan_options.num_kv_heads; l++) {
        const struct kernels_page_list *list = &f->lists[l];
        uint32_t request = l / f->plan_options.num_kv_heads;
        for (uint32_t n = list->first; n < list->first + list->count; n++) {
            for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
                bool seen = false;
                for (uint32_t row = f->row_first[request]; row < f->row_first[request + 1]; row++) {
                    seen |= token_visible(f, list, &f->refs[n], r, f->positions[row]);
                }
                for (uint32_t i = 0; seen && i < 2 * d; i++) {
                    size_t at = element_at(f, f->refs[n].page, i / d, r, i % d);
                    if (bf16) {
                        ((uint16_t *)f->pool->pages)[at] = support_to_bf16(support_real());
                    } else {
                        uint8_t byte = (uint8_t)support_random();
                        ((uint8_t *)f->pool->pages)[at] = (byte & 0x7f) == 0x7f ? 0 : byte;
                    }
                }
            }
        }
    }
    for (uint32_t i = 0; !bf16 && i < 2 * POOL_PAGES; i++) {
        f->pool->scales[i] = 0.001f + 0.01f * fabsf(support_real());
    }
}

static void fixture_open(struct fixture *f, enum kernels_plan_kind kind,
                         enum kernels_page_format format)
{
    static const uint32_t groups[] = {1, 2, 4, 7, 16};
    struct rk_error error;
    uint32_t head_dim = one_in(2) ? 64 : 128;
    memset(f, 0, sizeof(*f));
    f->plan_options = (struct kernels_plan_options){.kind = kind,
                                                    .num_kv_heads = 1 + support_below(HEADS_MAX),
                                                    .group = groups[support_below(5)],
                                                    .head_dim = head_dim,
                                                    .rows_max = ROWS_MAX,
                                                    .requests_max = REQUESTS_MAX,
                                                    .refs_max = POOL_PAGES,
                                                    .explicit_max = EXPLICIT_MAX};
    f->pool_options =
        (struct kernels_pool_options){.head_dim = head_dim, .format = format, .pages = POOL_PAGES};
    must(kernels_device_create(KERNELS_DEVICE_CPU, 0, &f->device, &error), &error);
    must(kernels_pool_create(f->device, &f->pool_options, &f->pool, &error), &error);
    must(kernels_plan_create(f->device, &f->plan_options, &f->plan, &error), &error);
    must(kernels_workspace_create(f->device, &f->workspace, &error), &error);
    f->batch = (struct kernels_batch){.num_requests = 1 + support_below(REQUESTS_MAX),
                                      .num_variants = 1 + support_below(4),
                                      .row_first = f->row_first,
                                      .positions = f->positions,
                                      .lists = f->lists,
                                      .refs = f->refs,
                                      .explicit_positions =
                                          (const int32_t(*)[RK_PAGE_TOKENS])f->explicit_positions};
    random_rows(f);
    random_refs(f);
    random_pool(f);
    size_t heads = (size_t)f->rows * f->plan_options.num_kv_heads * f->plan_options.group;
    f->q = memory(f, f->batch.num_variants * heads * head_dim * 2);
    for (size_t i = 0; i < f->batch.num_variants * heads * head_dim; i++) {
        f->q[i] = support_to_bf16(support_real());
    }
    f->out = memory(f, heads * head_dim * 2);
    f->lse = memory(f, heads * sizeof(float));
    f->mass = memory(f, POOL_PAGES * RK_PAGE_TOKENS * sizeof(float));
    f->want = memory(f, heads * head_dim * sizeof(double));
    f->want_lse = memory(f, heads * sizeof(double));
    f->want_mass = memory(f, POOL_PAGES * RK_PAGE_TOKENS * sizeof(double));
    memset(f->out, 0xff, heads * head_dim * 2);
    memset(f->lse, 0xff, heads * sizeof(float));
}

static void fixture_close(struct fixture *f)
{
    void *blocks[] = {f->q, f->out, f->lse, f->mass, f->want, f->want_lse, f->want_mass};
    for (size_t i = 0; i < sizeof(blocks) / sizeof(blocks[0]); i++) {
        kernels_memory_destroy(f->device, KERNELS_MEMORY_DEVICE, blocks[i]);
    }
    kernels_workspace_destroy(f->workspace);
    kernels_plan_destroy(f->plan);
    kernels_pool_destroy(f->pool);
    kernels_device_destroy(f->device);
}

static struct kernels_paged_attention fixture_call(struct fixture *f)
{
    return (struct kernels_paged_attention){.plan = f->plan,
                                            .pool = f->pool,
                                            .workspace = f->workspace,
                                            .q = f->q,
                                            .positions = f->positions,
                                            .scale = 0.3f,
                                            .out = f->out,
                                            .lse = f->lse};
}

/* ---- brute force ---- */

static double e4m3(uint8_t byte)
{
    double value = (byte & 0x78) ? 1 + (byte & 7) / 8.0 : (byte & 7) / 8.0;
    int exponent = (byte & 0x78) ? (byte >> 3 & 15) - 7 : -6;
    return (byte & 0x80 ? -1 : 1) * value * pow(2, exponent);
}

static double element(const struct fixture *f, int32_t page, uint32_t which, uint32_t r, uint32_t i)
{
    size_t at = element_at(f, page, which, r, i);
    if (f->pool_options.format == KERNELS_PAGE_BF16) {
        return (double)support_from_bf16(((uint16_t *)f->pool->pages)[at]);
    }
    return e4m3(((uint8_t *)f->pool->pages)[at]) *
           (double)f->pool->scales[(size_t)page * 2 + which];
}

static double score(const struct fixture *f, const struct kernels_page_ref *ref, uint32_t r,
                    size_t row_head)
{
    uint32_t d = f->pool_options.head_dim;
    size_t copy = (size_t)f->rows * f->plan_options.num_kv_heads * f->plan_options.group;
    const uint16_t *q = f->q + ((size_t)ref->variant * copy + row_head) * d;
    double sum = 0;
    for (uint32_t i = 0; i < d; i++) {
        sum += (double)support_from_bf16(q[i]) * element(f, ref->page, 0, r, i);
    }
    return sum * (double)0.3f;
}

/* Two passes over the tokens, for scores here are small: exponents need no maximum. */
static void brute_row(struct fixture *f, const struct kernels_page_list *list, uint32_t row,
                      uint32_t q_head)
{
    uint32_t d = f->pool_options.head_dim;
    size_t at = (size_t)row * f->plan_options.num_kv_heads * f->plan_options.group + q_head;
    double sum = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t n = list->first; n < list->first + list->count; n++) {
            for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
                if (!token_visible(f, list, &f->refs[n], r, f->positions[row])) {
                    continue;
                }
                double weight = exp(score(f, &f->refs[n], r, at));
                if (pass == 0) {
                    sum += weight;
                    continue;
                }
                weight /= sum;
                f->want_mass[(size_t)n * RK_PAGE_TOKENS + r] += weight;
                for (uint32_t i = 0; i < d; i++) {
                    f->want[at * d + i] += weight * element(f, f->refs[n].page, 1, r, i);
                }
            }
        }
    }
    f->want_lse[at] = log(sum);
}

static void brute_force(struct fixture *f)
{
    uint32_t heads = f->plan_options.num_kv_heads;
    uint32_t group = f->plan_options.group;
    memset(f->want, 0, (size_t)f->rows * heads * group * f->pool_options.head_dim * 8);
    memset(f->want_mass, 0, POOL_PAGES * RK_PAGE_TOKENS * sizeof(double));
    for (uint32_t request = 0; request < f->batch.num_requests; request++) {
        for (uint32_t row = f->row_first[request]; row < f->row_first[request + 1]; row++) {
            for (uint32_t q_head = 0; q_head < heads * group; q_head++) {
                brute_row(f, &f->lists[request * heads + q_head / group], row, q_head);
            }
        }
    }
}

static void near(double is, double want, double relative)
{
    if (isinf(want)) {
        assert_true(is == want);
        return;
    }
    if (!(fabs(is - want) <= relative * (fabs(want) + 1e-4))) {
        fail_msg("%.12g, not %.12g", is, want);
    }
}

static void check_doubles(struct fixture *f)
{
    struct paged_reference reference = {.batch = &f->batch,
                                        .num_kv_heads = f->plan_options.num_kv_heads,
                                        .group = f->plan_options.group,
                                        .head_dim = f->pool_options.head_dim,
                                        .format = f->pool_options.format,
                                        .pages = f->pool->pages,
                                        .scales = f->pool->scales,
                                        .q = f->q,
                                        .scale = 0.3f};
    size_t heads = (size_t)f->rows * f->plan_options.num_kv_heads * f->plan_options.group;
    size_t count = heads * f->pool_options.head_dim;
    double *out = memory(f, count * sizeof(double));
    double *lse = memory(f, heads * sizeof(double));
    struct paged_reference_result result = {.out = out, .lse = lse};
    paged_attention_reference(&reference, &result);
    for (size_t i = 0; i < count; i++) {
        near(out[i], f->want[i], 1e-8);
    }
    for (size_t i = 0; i < heads; i++) {
        near(lse[i], f->want_lse[i], 1e-10);
    }
    kernels_memory_destroy(f->device, KERNELS_MEMORY_DEVICE, out);
    kernels_memory_destroy(f->device, KERNELS_MEMORY_DEVICE, lse);
}

static void attention_is_as_defined(void **state)
{
    (void)state;
    static struct fixture f;
    size_t unseen = 0;
    size_t seen = 0;
    for (int round = 0; round < ROUNDS; round++) {
        struct rk_error error;
        bool changed = false;
        enum kernels_plan_kind kind = one_in(2) ? KERNELS_PLAN_DECODE : KERNELS_PLAN_PREFILL;
        fixture_open(&f, kind,
                     kind == KERNELS_PLAN_DECODE && one_in(2) ? KERNELS_PAGE_E4M3
                                                              : KERNELS_PAGE_BF16);
        struct kernels_paged_attention call = fixture_call(&f);
        must(kernels_plan_update(f.plan, f.pool, &f.batch, &changed, &error), &error);
        must(kernels_plan_upload(f.plan, NULL, &error), &error);
        must(kernels_paged_attention(f.device, &call, NULL, &error), &error);
        must(kernels_stream_wait(f.device, NULL, &error), &error);
        brute_force(&f);
        size_t heads = (size_t)f.rows * f.plan_options.num_kv_heads * f.plan_options.group;
        for (size_t i = 0; i < heads; i++) {
            near((double)f.lse[i], f.want_lse[i], 1e-6);
            seen += !isinf(f.want_lse[i]);
            unseen += isinf(f.want_lse[i]);
        }
        for (size_t i = 0; i < heads * f.pool_options.head_dim; i++) {
            near((double)support_from_bf16(f.out[i]), f.want[i], 1.0 / 256);
        }
        check_doubles(&f);
        if (f.pool_options.format == KERNELS_PAGE_BF16) {
            must(kernels_attention_mass(f.device, &call, f.mass, NULL, &error), &error);
            for (size_t i = 0; i < (size_t)f.batch.num_refs * RK_PAGE_TOKENS; i++) {
                near((double)f.mass[i], f.want_mass[i], 1e-5);
            }
        }
        call.lse = NULL; /* optional */
        must(kernels_paged_attention(f.device, &call, NULL, &error), &error);
        fixture_close(&f);
    }
    assert_true(seen > 0 && unseen > 0);
}

/* ---- refusals ---- */

#define REFUSED(call, expected, part)                                                              \
    do {                                                                                           \
        struct rk_error refused = {.text = ""};                                                    \
        struct rk_error *error = &refused;                                                         \
        assert_int_equal(call, expected);                                                          \
        if (!strstr(refused.text, part)) {                                                         \
            fail_msg("\"%s\" lacks \"%s\"", refused.text, part);                                   \
        }                                                                                          \
    } while (0)

static void devices_that_are_not_there_are_refused(void **state)
{
    (void)state;
    struct kernels_device *device = NULL;
    REFUSED(kernels_device_create((enum kernels_device_kind)7, 0, &device, error), RK_ERR_INVALID,
            "kind 7");
    REFUSED(kernels_device_create(KERNELS_DEVICE_CPU, 1, &device, error), RK_ERR_INVALID,
            "ordinal 0");
    REFUSED(kernels_device_create(KERNELS_DEVICE_CPU, 0, NULL, error), RK_ERR_INVALID, "NULL");
#ifndef REDKNOT_CUDA
    REFUSED(kernels_device_create(KERNELS_DEVICE_CUDA, 0, &device, error), RK_ERR_UNSUPPORTED,
            "preset cuda");
#endif
    assert_null(device);
    kernels_device_destroy(NULL);
}

static void memory_and_streams(void **state)
{
    (void)state;
    struct kernels_device *device = NULL;
    struct kernels_graph *graph = NULL;
    struct rk_error e;
    void *block = NULL;
    kernels_stream stream = NULL;
    char text[8] = "";
    must(kernels_device_create(KERNELS_DEVICE_CPU, 0, &device, &e), &e);
    assert_string_equal(kernels_device_name(device), "cpu");
    assert_int_equal(kernels_device_processors(device), 132);
    REFUSED(kernels_memory_create(device, (enum kernels_memory_kind)9, 8, &block, error),
            RK_ERR_INVALID, "kind 9");
    REFUSED(kernels_memory_create(NULL, KERNELS_MEMORY_PINNED, 8, &block, error), RK_ERR_INVALID,
            "device");
    must(kernels_memory_create(device, KERNELS_MEMORY_PINNED, 8, &block, &e), &e);
    must(kernels_stream_create(device, &stream, &e), &e);
    assert_non_null(stream);
    must(kernels_fill(device, block, 'x', 8, stream, &e), &e);
    must(kernels_copy(device, text, block, 7, stream, &e), &e);
    must(kernels_stream_wait(device, stream, &e), &e);
    assert_string_equal(text, "xxxxxxx");
    must(kernels_copy(device, NULL, NULL, 0, stream, &e), &e);
    must(kernels_fill(device, NULL, 0, 0, stream, &e), &e);
    REFUSED(kernels_copy(device, NULL, block, 1, stream, error), RK_ERR_INVALID, "to is NULL");
    REFUSED(kernels_copy(device, block, NULL, 1, stream, error), RK_ERR_INVALID, "from is NULL");
    REFUSED(kernels_fill(device, NULL, 0, 1, stream, error), RK_ERR_INVALID, "to is NULL");
    REFUSED(kernels_graph_begin(device, stream, error), RK_ERR_UNSUPPORTED, "graphs");
    REFUSED(kernels_graph_end(device, stream, &graph, error), RK_ERR_UNSUPPORTED, "graphs");
    REFUSED(kernels_graph_launch(graph, stream, error), RK_ERR_INVALID, "graph is NULL");
    assert_null(graph);
    kernels_graph_destroy(graph);
    kernels_stream_destroy(device, stream);
    kernels_stream_destroy(device, NULL);
    kernels_memory_destroy(device, KERNELS_MEMORY_PINNED, block);
    kernels_memory_destroy(device, KERNELS_MEMORY_PINNED, NULL);
    kernels_device_destroy(device);
}

static void pools_are_zeroed_and_checked(void **state)
{
    (void)state;
    struct kernels_device *device = NULL;
    struct kernels_pool *pool = NULL;
    struct rk_error e;
    struct kernels_pool_options options = {.head_dim = 64, .pages = 3};
    must(kernels_device_create(KERNELS_DEVICE_CPU, 0, &device, &e), &e);
    for (int format = KERNELS_PAGE_BF16; format <= KERNELS_PAGE_E4M3; format++) {
        options.format = (enum kernels_page_format)format;
        must(kernels_pool_create(device, &options, &pool, &e), &e);
        size_t bytes = kernels_pool_page_bytes(pool);
        assert_int_equal(bytes, 2 * 64 * 64 * (format == KERNELS_PAGE_BF16 ? 2 : 1));
        for (size_t i = 0; i < 3 * bytes; i++) {
            assert_int_equal(((uint8_t *)kernels_pool_pages(pool))[i], 0);
        }
        assert_int_equal(kernels_pool_scales(pool) != NULL, format == KERNELS_PAGE_E4M3);
        kernels_pool_destroy(pool);
        pool = NULL;
    }
    kernels_pool_destroy(NULL);
    options.format = (enum kernels_page_format)5;
    REFUSED(kernels_pool_create(device, &options, &pool, error), RK_ERR_INVALID, "format 5");
    options = (struct kernels_pool_options){.head_dim = 80, .pages = 3};
    REFUSED(kernels_pool_create(device, &options, &pool, error), RK_ERR_INVALID, "head_dim is 80");
    options = (struct kernels_pool_options){.head_dim = 64, .pages = 0};
    REFUSED(kernels_pool_create(device, &options, &pool, error), RK_ERR_INVALID, "0 pages");
    options.pages = (1u << 24) + 1;
    REFUSED(kernels_pool_create(device, &options, &pool, error), RK_ERR_INVALID, "16777217 pages");
    REFUSED(kernels_pool_create(device, NULL, &pool, error), RK_ERR_INVALID, "options");
    assert_null(pool);
    kernels_device_destroy(device);
}

static void wrong_attention_is_refused(void **state)
{
    (void)state;
    static struct fixture f;
    static struct fixture other;
    struct rk_error e;
    bool changed = false;
    fixture_open(&f, KERNELS_PLAN_PREFILL, KERNELS_PAGE_BF16);
    fixture_open(&other, KERNELS_PLAN_PREFILL, KERNELS_PAGE_BF16);
    struct kernels_paged_attention good = fixture_call(&f);
    REFUSED(kernels_paged_attention(f.device, &good, NULL, error), RK_ERR_INVALID, "empty");
    REFUSED(kernels_plan_upload(f.plan, NULL, error), RK_ERR_INVALID, "empty");
    REFUSED(kernels_plan_upload(NULL, NULL, error), RK_ERR_INVALID, "plan is NULL");
    must(kernels_plan_update(f.plan, f.pool, &f.batch, &changed, &e), &e);
    must(kernels_paged_attention(f.device, &good, NULL, &e), &e);

    struct kernels_paged_attention c[14];
    for (size_t i = 0; i < sizeof(c) / sizeof(c[0]); i++) {
        c[i] = good;
    }
    c[0].plan = NULL;
    c[1].pool = NULL;
    c[2].workspace = NULL;
    c[3].q = NULL;
    c[4].positions = NULL;
    c[5].out = NULL;
    c[6].scale = 0;
    c[7].scale = -1;
    c[8].scale = NAN;
    c[9].scale = INFINITY;
    c[10].pool = other.pool;
    c[11].workspace = other.workspace;
    c[12].q = (const uint8_t *)f.q + 2;
    c[13].out = (uint8_t *)f.out + 2;
    static const char *const parts[] = {"plan is NULL",
                                        "pool is NULL",
                                        "workspace is NULL",
                                        "q is NULL",
                                        "positions is NULL",
                                        "out is NULL",
                                        "scale",
                                        "scale",
                                        "scale",
                                        "scale",
                                        "another",
                                        "another",
                                        "q is not aligned",
                                        "out is not aligned"};
    for (size_t i = 0; i < sizeof(c) / sizeof(c[0]); i++) {
        REFUSED(kernels_paged_attention(f.device, &c[i], NULL, error), RK_ERR_INVALID, parts[i]);
    }
    REFUSED(kernels_paged_attention(f.device, NULL, NULL, error), RK_ERR_INVALID, "call is NULL");
    REFUSED(kernels_paged_attention(NULL, &good, NULL, error), RK_ERR_INVALID, "device is NULL");

    struct kernels_paged_attention mass = good;
    mass.out = NULL; /* not used */
    must(kernels_attention_mass(f.device, &mass, f.mass, NULL, &e), &e);
    REFUSED(kernels_attention_mass(f.device, &mass, NULL, NULL, error), RK_ERR_INVALID, "mass");
    mass.lse = NULL;
    REFUSED(kernels_attention_mass(f.device, &mass, f.mass, NULL, error), RK_ERR_INVALID, "lse");
    fixture_close(&f);
    fixture_close(&other);
}

/* The plan fits the pool that it was updated with; attention names another. */
static void pools_that_do_not_fit_the_plan_are_refused(void **state)
{
    (void)state;
    static struct fixture f;
    struct rk_error e;
    bool changed = false;
    fixture_open(&f, KERNELS_PLAN_PREFILL, KERNELS_PAGE_BF16);
    f.refs[0].page = POOL_PAGES - 1;
    f.batch.num_refs = f.batch.num_refs == 0 ? 1 : f.batch.num_refs;
    f.refs[0].positions = f.batch.num_explicit == 0 ? -1 : f.refs[0].positions;
    must(kernels_plan_update(f.plan, f.pool, &f.batch, &changed, &e), &e);
    uint32_t d = f.pool_options.head_dim;
    const struct {
        struct kernels_pool_options options;
        const char *part;
    } cases[] = {
        {{.head_dim = d, .format = KERNELS_PAGE_E4M3, .pages = POOL_PAGES}, "e4m3"},
        {{.head_dim = 192 - d, .pages = POOL_PAGES}, "head_dim"},
        {{.head_dim = d, .pages = POOL_PAGES - 1}, "names page"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct kernels_pool *pool = NULL;
        struct kernels_paged_attention call = fixture_call(&f);
        must(kernels_pool_create(f.device, &cases[i].options, &pool, &e), &e);
        call.pool = pool;
        REFUSED(kernels_paged_attention(f.device, &call, NULL, error), RK_ERR_INVALID,
                cases[i].part);
        if (i == 0) {
            REFUSED(kernels_attention_mass(f.device, &call, f.mass, NULL, error), RK_ERR_INVALID,
                    "bf16");
        }
        if (i == 1) {
            REFUSED(kernels_plan_update(f.plan, pool, &f.batch, &changed, error), RK_ERR_INVALID,
                    "head_dim");
            must(kernels_plan_update(f.plan, f.pool, &f.batch, &changed, &e), &e);
        }
        kernels_pool_destroy(pool);
    }
    fixture_close(&f);
}

static void wrong_ropes_and_pages_are_refused(void **state)
{
    (void)state;
    static struct fixture f;
    struct rk_error e;
    float table[64] = {0};
    fixture_open(&f, KERNELS_PLAN_PREFILL, KERNELS_PAGE_BF16);
    struct kernels_device_rope rope = {
        .cos = table, .sin = table, .positions_max = 1, .head_dim = f.pool_options.head_dim};
    struct kernels_device_rope other = rope;
    other.head_dim = 192 - rope.head_dim;
    struct kernels_append_run run = {.count = 1};
    struct kernels_rope_append append = {.pool = f.pool,
                                         .rope = &rope,
                                         .rows = 1,
                                         .num_kv_heads = 1,
                                         .k = f.q,
                                         .v = f.q,
                                         .positions = f.positions,
                                         .runs = &run,
                                         .num_runs = 1};
    struct kernels_rope_append a = append;
    a.num_runs = 0;
    must(kernels_rope_append(f.device, &a, NULL, &e), &e);
    a = append;
    a.pool = NULL;
    REFUSED(kernels_rope_append(f.device, &a, NULL, error), RK_ERR_INVALID, "pool is NULL");
    a = append;
    a.rope = NULL;
    REFUSED(kernels_rope_append(f.device, &a, NULL, error), RK_ERR_INVALID, "rope is NULL");
    a = append;
    a.rope = &other;
    REFUSED(kernels_rope_append(f.device, &a, NULL, error), RK_ERR_INVALID, "head_dim");
    a = append;
    a.runs = NULL;
    REFUSED(kernels_rope_append(f.device, &a, NULL, error), RK_ERR_INVALID, "runs is NULL");
    a = append;
    a.num_kv_heads = 0;
    REFUSED(kernels_rope_append(f.device, &a, NULL, error), RK_ERR_INVALID, "0 KV heads");
    a = append;
    a.k = (const uint8_t *)f.q + 2;
    REFUSED(kernels_rope_append(f.device, &a, NULL, error), RK_ERR_INVALID, "k is not aligned");

    struct kernels_rope_queries queries = {.rope = &rope,
                                           .rows = 1,
                                           .num_q_heads = 1,
                                           .q = f.q,
                                           .positions = f.positions,
                                           .bases = f.positions,
                                           .num_variants = 1,
                                           .out = f.out};
    struct kernels_rope_queries q = queries;
    q.rows = 0;
    must(kernels_rope_queries(f.device, &q, NULL, &e), &e);
    q = queries;
    q.out = f.q;
    REFUSED(kernels_rope_queries(f.device, &q, NULL, error), RK_ERR_INVALID, "the same");
    q = queries;
    q.bases = NULL;
    REFUSED(kernels_rope_queries(f.device, &q, NULL, error), RK_ERR_INVALID, "bases is NULL");
    q = queries;
    q.num_q_heads = 0;
    REFUSED(kernels_rope_queries(f.device, &q, NULL, error), RK_ERR_INVALID, "0 query heads");
    other = rope;
    other.positions_max = 0;
    q.rope = &other;
    REFUSED(kernels_rope_queries(f.device, &q, NULL, error), RK_ERR_INVALID, "0 positions");

    int32_t pages[1] = {0};
    uint64_t sums[1];
    must(kernels_pages_gather(f.device, f.pool, NULL, 0, NULL, NULL, &e), &e);
    must(kernels_pages_scatter(f.device, f.pool, NULL, 0, NULL, NULL, &e), &e);
    must(kernels_pages_checksum(f.device, f.pool, NULL, 0, NULL, NULL, &e), &e);
    REFUSED(kernels_pages_gather(f.device, f.pool, pages, 1, NULL, NULL, error), RK_ERR_INVALID,
            "NULL");
    REFUSED(kernels_pages_gather(f.device, f.pool, pages, 1, (uint8_t *)f.out + 8, NULL, error),
            RK_ERR_INVALID, "aligned");
    REFUSED(kernels_pages_scatter(f.device, f.pool, NULL, 1, f.out, NULL, error), RK_ERR_INVALID,
            "pages is NULL");
    REFUSED(kernels_pages_checksum(f.device, NULL, pages, 1, sums, NULL, error), RK_ERR_INVALID,
            "pool is NULL");
    fixture_close(&f);
}

static enum rk_status create_all(void)
{
    struct kernels_pool_options options = {.head_dim = 64, .format = KERNELS_PAGE_E4M3, .pages = 2};
    struct kernels_device *device = NULL;
    struct kernels_pool *pool = NULL;
    struct kernels_workspace *workspace = NULL;
    kernels_stream stream = NULL;
    enum rk_status status = kernels_device_create(KERNELS_DEVICE_CPU, 0, &device, NULL);
    assert_int_equal(device != NULL, status == RK_OK);
    if (status == RK_OK) {
        status = kernels_pool_create(device, &options, &pool, NULL);
        assert_int_equal(pool != NULL, status == RK_OK);
    }
    if (status == RK_OK) {
        status = kernels_workspace_create(device, &workspace, NULL);
        assert_int_equal(workspace != NULL, status == RK_OK);
    }
    if (status == RK_OK) {
        status = kernels_stream_create(device, &stream, NULL);
        kernels_stream_destroy(device, stream);
    }
    kernels_workspace_destroy(workspace);
    kernels_pool_destroy(pool);
    kernels_device_destroy(device);
    return status;
}

static void creation_survives_each_failed_allocation(void **state)
{
    (void)state;
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    for (; status != RK_OK; failures++) {
        rk_alloc_fail_after(failures);
        status = create_all();
        rk_alloc_fail_after(-1);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
    }
    assert_true(failures > 7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_is_as_defined),
        cmocka_unit_test(devices_that_are_not_there_are_refused),
        cmocka_unit_test(memory_and_streams),
        cmocka_unit_test(pools_are_zeroed_and_checked),
        cmocka_unit_test(wrong_attention_is_refused),
        cmocka_unit_test(pools_that_do_not_fit_the_plan_are_refused),
        cmocka_unit_test(wrong_ropes_and_pages_are_refused),
        cmocka_unit_test(creation_survives_each_failed_allocation),
    };
    support_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
