/*
 * Goal:   every attention path computes SegPagedAttention, and a row's result
 *         depends on that row and the pages it sees alone.
 * Method: random cases (several runs with their own bases, overlays with
 *         explicit positions, live masks, ragged tails, windows, sinks, empty
 *         heads; NaN in every row that is not live). Each path is compared with
 *         an f64 evaluation in this file that knows no pages' order and no
 *         online softmax; then bit by bit with itself: rows alone, other
 *         threads, pages added that no row sees.
 */
#include "tests/kernels/kernels_support.h"

#include "kernels/cpu/cpu_internal.h"
#include "tests/support/skip.h"

/* attention_amx.c with its tile instructions in C: see amx_emulated.h. */
#define AMX_EMULATED "amx, emulated"
void attention_amx_emulated(struct kernels *kernels, const struct kernels_attention *attention);

#define POSITIONS_MAX 1024
#define PAGES_MAX     24
#define HEADS_MAX     3
#define ROWS_MAX      96

struct attention_case {
    enum kernels_mode mode;
    struct kernels_rope rope;
    struct kernels_page pages[HEADS_MAX][PAGES_MAX];
    int32_t explicit_positions[HEADS_MAX][PAGES_MAX][RK_PAGE_TOKENS];
    struct kernels_head_view views[HEADS_MAX];
    int32_t positions[ROWS_MAX];
    struct kernels_attention a;
    size_t out_count;
    float *q;
    void *poison; /* a page of NaN */
};

struct path {
    const char *name;
    enum kernels_mode mode;
    enum kernels_isa isa;
    double tolerance; /* of the largest difference, values being in [-1, 1) */
};

static const struct path paths[] = {
    {"reference f32", KERNELS_F32, KERNELS_ISA_REFERENCE, 2e-5},
    {"reference bf16", KERNELS_BF16, KERNELS_ISA_REFERENCE, 1e-2},
    {"avx2 f32", KERNELS_F32, KERNELS_ISA_AVX2, 2e-5},
    {"avx2 bf16", KERNELS_BF16, KERNELS_ISA_AVX2, 1e-2},
    {"avx512 f32", KERNELS_F32, KERNELS_ISA_AVX512, 2e-5},
    {"avx512 bf16", KERNELS_BF16, KERNELS_ISA_AVX512, 1e-2},
    {"avx512_bf16", KERNELS_BF16, KERNELS_ISA_AVX512_BF16, 1e-2},
    {"amx", KERNELS_BF16, KERNELS_ISA_AMX, 1e-2},
    {AMX_EMULATED, KERNELS_BF16, KERNELS_ISA_AVX512_BF16, 1e-2},
};
#ifdef REDKNOT_SANITIZE_thread
#define CASES 3
#elif defined(REDKNOT_SANITIZED)
#define CASES 8
#else
#define CASES 24
#endif
#define NUM_PATHS (sizeof(paths) / sizeof(paths[0]))

static size_t page_elements(const struct attention_case *c)
{
    return (size_t)2 * RK_PAGE_TOKENS * c->a.head_dim;
}

static void set_element(const struct attention_case *c, void *page, size_t index, float value)
{
    if (c->mode == KERNELS_F32) {
        ((float *)page)[index] = value;
    } else {
        ((uint16_t *)page)[index] = isnan(value) ? 0x7fc1 : support_to_bf16(value);
    }
}

static double element(const struct attention_case *c, const void *page, size_t index)
{
    return c->mode == KERNELS_F32 ? (double)((const float *)page)[index]
                                  : (double)support_from_bf16(((const uint16_t *)page)[index]);
}

/* A page of random rows; those that are not live are NaN or infinite. */
static void *page_create(const struct attention_case *c, uint64_t live)
{
    void *page = rk_alloc_aligned(64, page_elements(c) * (c->mode == KERNELS_F32 ? 4 : 2));
    assert_non_null(page);
    for (size_t i = 0; i < page_elements(c); i++) {
        bool dead = !(live >> (i / c->a.head_dim % RK_PAGE_TOKENS) & 1);
        float value = support_real();
        set_element(c, page, i, dead ? (i % 3 ? NAN : INFINITY) : value);
    }
    return page;
}

static uint64_t random_live(void)
{
    uint64_t bits = (uint64_t)support_random() << 32 | support_random();
    switch (support_below(4)) {
    case 0:
        return bits;
    case 1:
        return bits >> support_below(64); /* a ragged tail, with holes */
    case 2:
        return UINT64_MAX >> support_below(64);
    default:
        return UINT64_MAX;
    }
}

/* Runs with a base each, and now and then an overlay page with rows all over the run. */
static void head_create(struct attention_case *c, uint32_t head)
{
    struct kernels_head_view *view = &c->views[head];
    int32_t position = 0;
    int32_t base = 0;
    view->pages = c->pages[head];
    view->num_pages = 0;
    view->window = support_below(2) ? support_below(300) : 0;
    view->sink = support_below(2) ? support_below(80) : 0;
    uint32_t wanted = support_below(4) == 0 ? 0 : support_below(12);
    for (uint32_t i = 0; i < wanted; i++) {
        struct kernels_page *page = &c->pages[head][view->num_pages];
        *page = (struct kernels_page){.base = base, .position = position, .live = random_live()};
        if (support_below(4) == 0) {
            int32_t *explicit_positions = c->explicit_positions[head][view->num_pages];
            for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
                explicit_positions[r] = base + (int32_t)support_below(200);
            }
            page->positions = explicit_positions;
        } else {
            position += (int32_t)(support_below(3) ? 64 : 1 + support_below(64));
        }
        page->data = page_create(c, page->live);
        if (support_below(3) == 0) {
            base = position;
        }
        view->num_pages++;
    }
}

static void case_create(struct attention_case *c, enum kernels_mode mode)
{
    static const uint32_t head_dims[] = {16, 48, 64, 64, 64, 80, 128};
    memset(c, 0, sizeof(*c));
    c->mode = mode;
    c->a.head_dim = head_dims[support_below(7)];
    c->a.num_kv_heads = 1 + support_below(HEADS_MAX);
    c->a.group = 1 + support_below(support_below(3) ? 4 : 16);
    c->a.scale = 1.0f / sqrtf((float)c->a.head_dim);
    c->a.rows = 1 + support_below(support_below(4) ? 12 : ROWS_MAX);
    c->rope = support_rope(c->a.head_dim, POSITIONS_MAX);
    int32_t t = (int32_t)support_below(700);
    for (uint32_t r = 0; r < c->a.rows; r++) {
        c->positions[r] = t;
        t += (int32_t)support_below(4);
    }
    for (uint32_t h = 0; h < c->a.num_kv_heads; h++) {
        head_create(c, h);
    }
    c->out_count = (size_t)c->a.rows * c->a.num_kv_heads * c->a.group * c->a.head_dim;
    c->q = support_reals(c->out_count);
    c->poison = page_create(c, 0);
    c->a.rope = &c->rope;
    c->a.heads = c->views;
    c->a.q = c->q;
    c->a.positions = c->positions;
}

static void case_destroy(struct attention_case *c)
{
    for (uint32_t h = 0; h < c->a.num_kv_heads; h++) {
        for (uint32_t i = 0; i < c->views[h].num_pages; i++) {
            union {
                const void *in;
                void *out;
            } data = {.in = c->pages[h][i].data};
            rk_free(data.out);
        }
    }
    support_rope_free(&c->rope);
    rk_free(c->q);
    rk_free(c->poison);
}

static bool visible(const struct kernels_head_view *view, const struct kernels_page *page,
                    uint32_t r, int64_t t)
{
    int64_t position = page->positions ? page->positions[r] : (int64_t)page->position + r;
    return (page->live >> r & 1) && position <= t &&
           (view->window == 0 || position > t - (int64_t)view->window ||
            position < (int64_t)view->sink);
}

static double score(const struct attention_case *c, const struct kernels_page *page, uint32_t r,
                    const float *q, int64_t t)
{
    uint32_t half = c->a.head_dim / 2;
    int64_t angle = t - page->base;
    double sign = angle < 0 ? -1 : 1;
    size_t at = (size_t)(angle < 0 ? -angle : angle) * half;
    double dot = 0;
    for (uint32_t i = 0; i < half; i++) {
        double cosine = (double)c->rope.cos[at + i];
        double sine = sign * (double)c->rope.sin[at + i];
        double low = (double)q[i] * cosine - (double)q[i + half] * sine;
        double high = (double)q[i + half] * cosine + (double)q[i] * sine;
        size_t k = (size_t)r * c->a.head_dim + i;
        dot += (double)support_round(c->mode, (float)low) * element(c, page->data, k) +
               (double)support_round(c->mode, (float)high) * element(c, page->data, k + half);
    }
    return dot * (double)c->a.scale;
}

/* The definition: exp of scores over their sum, no pages, no running maximum. */
static void expected_row(const struct attention_case *c, uint32_t row, uint32_t head, double *out)
{
    const struct kernels_head_view *view = &c->views[head / c->a.group];
    const float *q = c->q + ((size_t)row * c->a.num_kv_heads * c->a.group + head) * c->a.head_dim;
    double sum = 0;
    memset(out, 0, c->a.head_dim * sizeof(*out));
    for (uint32_t i = 0; i < view->num_pages; i++) {
        for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
            if (!visible(view, &view->pages[i], r, c->positions[row])) {
                continue;
            }
            double p = exp(score(c, &view->pages[i], r, q, c->positions[row]));
            sum += p;
            for (uint32_t d = 0; d < c->a.head_dim; d++) {
                size_t v = (size_t)(RK_PAGE_TOKENS + r) * c->a.head_dim + d;
                out[d] += p * element(c, view->pages[i].data, v);
            }
        }
    }
    for (uint32_t d = 0; sum > 0 && d < c->a.head_dim; d++) {
        out[d] /= sum;
    }
}

static double worst_difference(const struct attention_case *c, const float *out)
{
    double expected[256];
    double worst = 0;
    uint32_t heads = c->a.num_kv_heads * c->a.group;
    for (uint32_t row = 0; row < c->a.rows; row++) {
        for (uint32_t head = 0; head < heads; head++) {
            expected_row(c, row, head, expected);
            for (uint32_t d = 0; d < c->a.head_dim; d++) {
                size_t at = ((size_t)row * heads + head) * c->a.head_dim + d;
                double difference = fabs((double)out[at] - expected[d]);
                worst = difference <= worst ? worst : difference; /* NaN stays. */
            }
        }
    }
    return worst;
}

static float *run(struct kernels *kernels, const struct kernels_attention *a, size_t count)
{
    struct kernels_attention call = *a;
    call.out = rk_alloc_aligned(64, count * sizeof(float));
    assert_non_null(call.out);
    memset(call.out, 0xff, count * sizeof(float)); /* NaN: every element must be written. */
    kernels_attention(kernels, &call);
    return call.out;
}

static void same_alone(struct kernels *kernels, const struct attention_case *c, const float *out)
{
    size_t width = c->out_count / c->a.rows;
    for (uint32_t i = 0; i < 4; i++) {
        struct kernels_attention some = c->a;
        uint32_t first = support_below(c->a.rows);
        some.rows = i < 2 ? 1 : 1 + support_below(c->a.rows - first);
        some.q = c->q + first * width;
        some.positions = c->positions + first;
        float *again = run(kernels, &some, some.rows * width);
        assert_memory_equal(again, out + first * width, some.rows * width * sizeof(float));
        rk_free(again);
    }
}

/* Pages of NaN without live rows and pages of the future, anywhere in the lists. */
static void same_with_unseen_pages(struct kernels *kernels, struct attention_case *c,
                                   const float *out)
{
    struct kernels_head_view saved[HEADS_MAX];
    struct kernels_page pages[HEADS_MAX][2 * PAGES_MAX];
    memcpy(saved, c->views, sizeof(saved));
    for (uint32_t h = 0; h < c->a.num_kv_heads; h++) {
        uint32_t count = 0;
        for (uint32_t i = 0; i <= saved[h].num_pages; i++) {
            if (support_below(2)) {
                bool future = support_below(2);
                pages[h][count++] =
                    (struct kernels_page){.data = c->poison,
                                          .base = (int32_t)support_below(2000) - 1000,
                                          .position = future ? 100000 : 0,
                                          .live = future ? UINT64_MAX : 0};
            }
            if (i < saved[h].num_pages) {
                pages[h][count++] = saved[h].pages[i];
            }
        }
        c->views[h].pages = pages[h];
        c->views[h].num_pages = count;
    }
    float *again = run(kernels, &c->a, c->out_count);
    assert_memory_equal(again, out, c->out_count * sizeof(float));
    rk_free(again);
    memcpy(c->views, saved, sizeof(saved));
}

static struct kernels *path_create(const struct path *path, uint32_t threads)
{
    struct kernels *kernels = support_kernels(path->mode, path->isa, threads);
    if (strcmp(path->name, AMX_EMULATED) == 0) {
        kernels->attention = attention_amx_emulated;
    }
    return kernels;
}

static void check_path(const struct path *path, uint32_t cases)
{
    struct kernels *one = path_create(path, 1);
    struct kernels *three = path_create(path, 3);
    double worst = 0;
    for (uint32_t i = 0; i < cases; i++) {
        struct attention_case c;
        case_create(&c, path->mode);
        c.a.decode = c.a.rows == 1;
        float *out = run(one, &c.a, c.out_count);
        double difference = worst_difference(&c, out);
        if (!(difference <= path->tolerance)) {
            print_error("%s, case %u: head_dim %u group %u rows %u: off by %g\n", path->name, i,
                        c.a.head_dim, c.a.group, c.a.rows, difference);
        }
        assert_true(difference <= path->tolerance);
        worst = fmax(worst, difference);

        float *threaded = run(three, &c.a, c.out_count);
        assert_memory_equal(threaded, out, c.out_count * sizeof(float));
        rk_free(threaded);
        c.a.decode = false;
        if (c.a.rows > 1) {
            same_alone(one, &c, out);
        }
        same_with_unseen_pages(one, &c, out);
        rk_free(out);
        case_destroy(&c);
    }
    printf("%s (%s): %u cases, largest difference %.2g\n", path->name, kernels_isa_name(one), cases,
           worst);
    kernels_destroy(one);
    kernels_destroy(three);
}

static void every_path_agrees_with_the_definition(void **state)
{
    (void)state;
    for (size_t i = 0; i < NUM_PATHS; i++) {
        if (kernels_isa_supported(paths[i].isa)) {
            check_path(&paths[i], CASES);
        } else {
            test_left_out(paths[i].name, "this CPU has no such instructions");
        }
    }
}

/* Moving a run and all that looks at it changes nothing: only t - base matters. */
static void a_run_may_stand_anywhere(void **state)
{
    (void)state;
    for (size_t p = 0; p < NUM_PATHS; p++) {
        if (!kernels_isa_supported(paths[p].isa)) {
            continue;
        }
        struct attention_case c;
        struct kernels *kernels = path_create(&paths[p], 1);
        case_create(&c, paths[p].mode);
        for (uint32_t h = 0; h < c.a.num_kv_heads; h++) {
            c.views[h].sink = 0; /* The sink alone is tied to absolute positions. */
        }
        float *out = run(kernels, &c.a, c.out_count);
        for (uint32_t h = 0; h < c.a.num_kv_heads; h++) {
            for (uint32_t i = 0; i < c.views[h].num_pages; i++) {
                c.pages[h][i].base += 5000000;
                c.pages[h][i].position += 5000000;
                for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
                    c.explicit_positions[h][i][r] += 5000000;
                }
            }
        }
        for (uint32_t r = 0; r < c.a.rows; r++) {
            c.positions[r] += 5000000;
        }
        float *moved = run(kernels, &c.a, c.out_count);
        assert_memory_equal(moved, out, c.out_count * sizeof(float));
        rk_free(out);
        rk_free(moved);
        case_destroy(&c);
        kernels_destroy(kernels);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_path_agrees_with_the_definition),
        cmocka_unit_test(a_run_may_stand_anywhere),
    };
    support_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
