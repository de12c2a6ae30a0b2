#include "tests/kernels_cuda/attention_case.h"

#include "common/base/alloc.h"

#include <math.h>

#define ATTENTION_LIMIT 1e-2 /* relative L2, of a whole output */
#define ROW_LIMIT       5e-2 /* of a row of it: finds a lost page in a large output */
#define LSE_LIMIT       2e-3 /* relative, or absolute below 1 */
#define MASS_LIMIT      5e-3

static struct kernels_paged_attention attention_call(struct attention_memory *m,
                                                     const struct attention_case *c)
{
    return (struct kernels_paged_attention){.plan = case_plan(m, c),
                                            .pool = case_pool(m, c),
                                            .workspace = m->workspace,
                                            .q = m->device_q,
                                            .positions = m->device_positions,
                                            .scale = c->scale,
                                            .out = m->device_out,
                                            .lse = m->device_lse};
}

static size_t out_rows(const struct attention_case *c)
{
    return (size_t)c->rows * c->num_kv_heads * c->group;
}

static void poison(struct attention_memory *m, const struct attention_case *c)
{
    size_t rows = out_rows(c);
    must_fill(m->fixture, m->device_out, 0xff, rows * c->head_dim * sizeof(*m->out));
    must_fill(m->fixture, m->device_lse, 0xff, rows * sizeof(*m->lse));
}

static void fetch(struct attention_memory *m, const struct attention_case *c)
{
    size_t rows = out_rows(c);
    must_copy(m->fixture, m->out, m->device_out, rows * c->head_dim * sizeof(*m->out));
    must_copy(m->fixture, m->lse, m->device_lse, rows * sizeof(*m->lse));
    must_wait(m->fixture);
}

static void attend(struct attention_memory *m, const struct kernels_paged_attention *call)
{
    struct rk_error error = {.status = RK_OK};
    must(kernels_paged_attention(m->fixture->device, call, m->fixture->stream, &error), &error,
         "kernels_paged_attention");
}

static bool plan(struct attention_memory *m, const struct attention_case *c, uint64_t version)
{
    struct kernels_batch batch = case_batch(c, version);
    struct rk_error error = {.status = RK_OK};
    bool changed = false;
    must(kernels_plan_update(case_plan(m, c), case_pool(m, c), &batch, &changed, &error), &error,
         case_text(c));
    return changed;
}

static void upload_plan(struct attention_memory *m, const struct attention_case *c)
{
    struct rk_error error = {.status = RK_OK};
    must(kernels_plan_upload(case_plan(m, c), m->fixture->stream, &error), &error,
         "kernels_plan_upload");
}

/* Says what is wrong with a row, or nothing. */
static const char *row_wrong(const struct attention_memory *m, const struct attention_case *c,
                             size_t row, bool with_lse, struct l2 *sum)
{
    const uint16_t *out = m->out + row * c->head_dim;
    const double *expected = m->expected_out + row * c->head_dim;
    double lse = (double)m->lse[row];
    double expected_lse = m->expected_lse[row];
    struct l2 l2 = {0};
    bool zero = true;
    for (uint32_t e = 0; e < c->head_dim; e++) {
        l2_add(&l2, (double)from_bf16(out[e]), expected[e]);
        zero = zero && (out[e] & 0x7fff) == 0;
    }
    sum->difference += l2.difference;
    sum->size += l2.size;
    if (expected_lse == -INFINITY) {
        return !zero                             ? "sees nothing and is not zero"
               : with_lse && !(lse == -INFINITY) ? "sees nothing and has an lse"
                                                 : NULL;
    }
    if (!(l2_error(&l2) <= ROW_LIMIT)) {
        return "is wrong";
    }
    double allowed = LSE_LIMIT * fmax(1, fabs(expected_lse));
    return with_lse && !(fabs(lse - expected_lse) <= allowed) ? "has a wrong lse" : NULL;
}

static void compare(struct attention_memory *m, const struct attention_case *c, bool with_lse,
                    struct family *family, const char *what)
{
    struct l2 sum = {0};
    size_t wrong = 0;
    size_t first = 0;
    const char *first_wrong = NULL;
    size_t rows = out_rows(c);
    for (size_t row = 0; row < rows; row++) {
        const char *text = row_wrong(m, c, row, with_lse, &sum);
        if (text && wrong++ == 0) {
            first = row;
            first_wrong = text;
        }
    }
    if (wrong > 0) {
        size_t heads = (size_t)c->num_kv_heads * c->group;
        fail(family,
             "%s%zu of %zu rows; row %zu, query head %zu %s: out[0] %g for %g, lse %g for %g; %s",
             what, wrong, rows, first / heads, first % heads, first_wrong,
             (double)from_bf16(m->out[first * c->head_dim]), m->expected_out[first * c->head_dim],
             (double)m->lse[first], m->expected_lse[first], case_text(c));
    }
    l2_check(family, &sum, ATTENTION_LIMIT, case_text(c));
}

/* A batch as it is, planned, uploaded, computed, compared. */
static void attention_run(struct attention_memory *m, const struct attention_case *c,
                          struct family *family)
{
    struct kernels_paged_attention call = attention_call(m, c);
    bool with_lse = !random_chance(8);
    if (!with_lse) {
        call.lse = NULL;
    }
    if (!plan(m, c, random_chance(2) ? 0 : (uint64_t)random_bits() << 20 | family->number)) {
        fail(family, "a new batch changed nothing; %s", case_text(c));
    }
    case_upload(m, c);
    upload_plan(m, c);
    poison(m, c);
    attend(m, &call);
    case_expect(m, c);
    fetch(m, c);
    compare(m, c, with_lse, family, "");
    if (random_chance(10)) { /* And again: counters are as they were. */
        poison(m, c);
        attend(m, &call);
        fetch(m, c);
        compare(m, c, with_lse, family, "second run: ");
    }
    case_withdraw(m, c);
}

void family_attention(const struct fixture *fixture, struct family *family)
{
    const struct case_wish wish = {.bf16 = false};
    struct attention_memory *m = attention_memory_create(fixture);
    struct attention_case *c = must_allocate(sizeof(*c));
    for (uint64_t i = fixture->first; i < fixture->first + fixture->cases; i++) {
        family->number = i;
        random_begin(fixture, family->name, i);
        case_generate(m, &wish, c);
        attention_run(m, c, family);
        family->cases++;
    }
    rk_free(c);
    attention_memory_destroy(m);
}

/* ---- mass ---- */

static void mass_compare(const struct attention_memory *m, const struct attention_case *c,
                         const double *expected, struct family *family)
{
    struct l2 sum = {0};
    for (size_t i = 0; i < (size_t)c->num_refs * RK_PAGE_TOKENS; i++) {
        double mass = (double)m->mass[i];
        l2_add(&sum, mass, expected[i]);
        if (!(fabs(mass - expected[i]) <= 1e-2 * expected[i] + 1e-6)) {
            fail(family, "mass of ref %zu, row %zu is %g, not %g; %s", i / RK_PAGE_TOKENS,
                 i % RK_PAGE_TOKENS, mass, expected[i], case_text(c));
            return;
        }
    }
    l2_check(family, &sum, MASS_LIMIT, case_text(c));
}

void family_mass(const struct fixture *fixture, struct family *family)
{
    const struct case_wish wish = {.bf16 = true};
    struct attention_memory *m = attention_memory_create(fixture);
    struct attention_case *c = must_allocate(sizeof(*c));
    double *expected = must_allocate((size_t)CASE_REFS_MAX * RK_PAGE_TOKENS * sizeof(*expected));
    for (uint64_t i = fixture->first; i < fixture->first + fixture->cases; i++) {
        family->number = i;
        random_begin(fixture, family->name, i);
        case_generate(m, &wish, c);
        struct kernels_paged_attention call = attention_call(m, c);
        struct rk_error error = {.status = RK_OK};
        size_t bytes = (size_t)c->num_refs * RK_PAGE_TOKENS * sizeof(*m->mass);
        (void)plan(m, c, 0);
        case_upload(m, c);
        upload_plan(m, c);
        poison(m, c);
        must_fill(fixture, m->device_mass, 0xff, bytes);
        attend(m, &call);
        must(
            kernels_attention_mass(fixture->device, &call, m->device_mass, fixture->stream, &error),
            &error, "kernels_attention_mass");
        must_copy(fixture, m->mass, m->device_mass, bytes);
        case_expect(m, c);
        case_expect_mass(m, c, expected);
        must_wait(fixture);
        mass_compare(m, c, expected, family);
        case_withdraw(m, c);
        family->cases++;
    }
    rk_free(expected);
    rk_free(c);
    attention_memory_destroy(m);
}

/* ---- replay ---- */

/* The batch some tokens earlier: lists lack their last page, where they have several. */
static void step_back(struct attention_case *c, uint32_t tokens, bool drop_page)
{
    for (uint32_t r = 0; r < c->num_requests; r++) {
        int32_t first = c->positions[c->row_first[r]];
        int32_t back = first < (int32_t)tokens ? first : (int32_t)tokens;
        for (uint32_t row = c->row_first[r]; row < c->row_first[r + 1]; row++) {
            c->positions[row] -= back;
        }
    }
    for (uint32_t i = 0; drop_page && i < c->num_requests * c->num_kv_heads; i++) {
        c->lists[i].count -= c->lists[i].count > 1;
    }
}

static void replay_compare(struct attention_memory *m, const struct attention_case *c,
                           struct kernels_graph *graph, struct family *family, const char *what)
{
    struct rk_error error = {.status = RK_OK};
    memcpy(m->positions, c->positions, c->rows * sizeof(*m->positions));
    must_copy(m->fixture, m->device_positions, m->positions, c->rows * sizeof(*m->positions));
    poison(m, c);
    if (graph) {
        must(kernels_graph_launch(graph, m->fixture->stream, &error), &error,
             "kernels_graph_launch");
    } else {
        struct kernels_paged_attention call = attention_call(m, c);
        upload_plan(m, c);
        attend(m, &call);
    }
    case_expect(m, c);
    fetch(m, c);
    compare(m, c, true, family, what);
}

/* NULL on the CPU, which has no graphs. */
static struct kernels_graph *capture(struct attention_memory *m, const struct attention_case *c)
{
    struct kernels_paged_attention call = attention_call(m, c);
    struct kernels_graph *graph = NULL;
    struct rk_error error = {.status = RK_OK};
    enum rk_status status = kernels_graph_begin(m->fixture->device, m->fixture->stream, &error);
    if (status == RK_ERR_UNSUPPORTED) {
        return NULL;
    }
    must(status, &error, "kernels_graph_begin");
    upload_plan(m, c);
    attend(m, &call);
    must(kernels_graph_end(m->fixture->device, m->fixture->stream, &graph, &error), &error,
         "kernels_graph_end");
    return graph;
}

/* c: the last of three states, `earlier` memory for the others. */
static void replay_run(struct attention_memory *m, const struct attention_case *c,
                       struct attention_case *earlier, struct family *family)
{
    uint32_t moved = random_below(20);
    *earlier = *c;
    step_back(earlier, moved + random_below(100), true);
    uint64_t version = ((uint64_t)random_bits() << 20) + 1;
    (void)plan(m, earlier, version);
    case_upload(m, c);
    must_wait(m->fixture); /* the positions in pinned memory are now to change */
    struct kernels_graph *graph = capture(m, earlier);
    replay_compare(m, earlier, graph, family, "captured: ");

    *earlier = *c;
    step_back(earlier, moved, false);
    if (!plan(m, earlier, version + 1)) {
        fail(family, "a page more changed nothing; %s", case_text(c));
    }
    replay_compare(m, earlier, graph, family, "page added: ");

    if (plan(m, c, version + 1)) {
        fail(family, "rows that moved on inside their pages changed the plan; %s", case_text(c));
    }
    replay_compare(m, c, graph, family, "rows moved on: ");
    kernels_graph_destroy(graph);
    case_withdraw(m, c);
}

void family_replay(const struct fixture *fixture, struct family *family)
{
    const struct case_wish wish = {.decode = true, .growing = true};
    struct attention_memory *m = attention_memory_create(fixture);
    struct attention_case *c = must_allocate(sizeof(*c));
    struct attention_case *earlier = must_allocate(sizeof(*earlier));
    for (uint64_t i = fixture->first; i < fixture->first + fixture->cases; i++) {
        family->number = i;
        random_begin(fixture, family->name, i);
        case_generate(m, &wish, c);
        replay_run(m, c, earlier, family);
        family->cases++;
    }
    rk_free(earlier);
    rk_free(c);
    attention_memory_destroy(m);
}
