/*
 * Goal:   a plan covers what each row may see, once, in balanced items whose
 *         partial results do not meet; a wrong batch is refused and leaves the
 *         plan empty.
 * Method: random batches over lists in and out of order, with holes, explicit
 *         positions, windows and sinks, on 1 to 132 processors; items are
 *         walked as a device walks them and compared with the definition of
 *         visibility, page by page. Then one wrong value at a time.
 */
#include "kernels/device_internal.h"
#include "tests/kernels/kernels_support.h"

#define ROUNDS       400
#define REQUESTS_MAX 6
#define HEADS_MAX    4
#define ROWS_MAX     1024
#define REFS_MAX     2048
#define EXPLICIT_MAX 64
#define POOL_PAGES   512

/* A batch and its memory. */
struct random_batch {
    struct kernels_batch batch;
    uint32_t row_first[REQUESTS_MAX + 1];
    int32_t positions[ROWS_MAX];
    struct kernels_page_list lists[REQUESTS_MAX * HEADS_MAX];
    struct kernels_page_ref refs[REFS_MAX];
    int32_t explicit_positions[EXPLICIT_MAX][RK_PAGE_TOKENS];
};

struct fixture {
    struct kernels_device *device;
    struct kernels_pool *pool;
    struct kernels_plan *plan;
    struct kernels_plan_options options;
};

static void must(enum rk_status status, const struct rk_error *error)
{
    if (status != RK_OK) {
        print_error("%s\n", error->text);
    }
    assert_int_equal(status, RK_OK);
}

static void fixture_open(struct fixture *b, const struct kernels_plan_options *options,
                         uint32_t processors)
{
    struct rk_error error;
    struct kernels_pool_options pool = {
        .head_dim = options->head_dim, .format = KERNELS_PAGE_BF16, .pages = POOL_PAGES};
    *b = (struct fixture){.options = *options};
    must(kernels_device_create(KERNELS_DEVICE_CPU, 0, &b->device, &error), &error);
    b->device->processors = processors;
    must(kernels_pool_create(b->device, &pool, &b->pool, &error), &error);
    must(kernels_plan_create(b->device, options, &b->plan, &error), &error);
}

static void fixture_close(struct fixture *b)
{
    kernels_plan_destroy(b->plan);
    kernels_pool_destroy(b->pool);
    kernels_device_destroy(b->device);
}

static bool one_in(uint32_t n)
{
    return support_below(n) == 0;
}

/* ---- random batches ---- */

static uint64_t random_live(void)
{
    switch (support_below(6)) {
    case 0:
        return 0;
    case 1:
        return (uint64_t)support_random() << 32 | support_random();
    case 2:
        return UINT64_C(1) << support_below(64);
    default:
        return UINT64_MAX;
    }
}

static void random_explicit(struct random_batch *b, struct kernels_page_ref *ref)
{
    uint32_t n = b->batch.num_explicit;
    if (n == EXPLICIT_MAX) {
        return;
    }
    int32_t position = ref->position;
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        b->explicit_positions[n][r] = position;
        position += (int32_t)support_below(one_in(16) ? 300 : 3);
    }
    ref->positions = (int32_t)n;
    ref->position = -77; /* Not used, so it may be anything. */
    b->batch.num_explicit = n + 1;
}

/* Stretches of pages from anywhere; now and then shuffled. */
static void random_list(struct random_batch *b, struct kernels_page_list *list)
{
    static const uint32_t windows[] = {0, 0, 1, 64, 200, 1000, INT32_MAX, UINT32_MAX};
    static const uint32_t sinks[] = {0, 0, 4, 64, 100, 1000, UINT32_MAX};
    bool whole = one_in(2); /* one stretch from 0, as most lists are */
    uint32_t count = one_in(8) ? 0 : support_below(one_in(3) ? 80 : 20);
    int32_t position = whole ? 0 : (int32_t)support_below(3000);
    *list = (struct kernels_page_list){.first = b->batch.num_refs + support_below(3),
                                       .count = count,
                                       .window = windows[support_below(8)],
                                       .sink = sinks[support_below(7)]};
    for (uint32_t i = 0; i < count; i++) {
        struct kernels_page_ref *ref = &b->refs[list->first + i];
        *ref = (struct kernels_page_ref){.page = (int32_t)support_below(POOL_PAGES),
                                         .variant = (int32_t)support_below(b->batch.num_variants),
                                         .position = position,
                                         .positions = -1,
                                         .live = whole ? UINT64_MAX : random_live()};
        if (!whole && one_in(10)) {
            random_explicit(b, ref);
        }
        position = !whole && one_in(10) ? (int32_t)support_below(6000) : position + RK_PAGE_TOKENS;
    }
    b->batch.num_refs = list->first + count;
    for (uint32_t i = 1; one_in(6) && i < count; i++) {
        struct kernels_page_ref *x = &b->refs[list->first + support_below(count)];
        struct kernels_page_ref swapped = *x;
        *x = b->refs[list->first + i];
        b->refs[list->first + i] = swapped;
    }
}

static void random_batch(struct random_batch *b, const struct kernels_plan_options *options)
{
    bool decode = options->kind == KERNELS_PLAN_DECODE;
    memset(b, 0, sizeof(*b));
    for (uint32_t i = 0; i < REFS_MAX; i++) {
        b->refs[i].positions = -1; /* Refs between lists are checked too. */
    }
    b->batch = (struct kernels_batch){.num_requests = 1 + support_below(REQUESTS_MAX),
                                      .num_variants = 1 + support_below(5),
                                      .row_first = b->row_first,
                                      .positions = b->positions,
                                      .lists = b->lists,
                                      .refs = b->refs,
                                      .explicit_positions =
                                          (const int32_t(*)[RK_PAGE_TOKENS])b->explicit_positions};
    uint32_t row = 0;
    for (uint32_t r = 0; r < b->batch.num_requests; r++) {
        uint32_t rows = support_below(decode ? 6 : 150);
        int32_t position = (int32_t)support_below(one_in(4) ? 100 : 5000);
        rows += r == 0; /* At least one row in all. */
        for (uint32_t i = 0; i < rows; i++, row++) {
            b->positions[row] = position;
            position += one_in(50) ? (int32_t)support_below(300) : !one_in(50);
        }
        b->row_first[r + 1] = row;
        for (uint32_t h = 0; h < options->num_kv_heads; h++) {
            random_list(b, &b->lists[r * options->num_kv_heads + h]);
        }
    }
}

/* ---- the check ---- */

static bool page_seen(const struct random_batch *b, const struct kernels_page_list *list,
                      const struct kernels_page_ref *ref, int64_t t)
{
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        int64_t c =
            ref->positions >= 0 ? b->explicit_positions[ref->positions][r] : ref->position + (int)r;
        if ((ref->live >> r & 1) != 0 && c <= t &&
            (list->window == 0 || c > t - (int64_t)list->window || c < (int64_t)list->sink)) {
            return true;
        }
    }
    return false;
}

/* Each item once, as the processors walk them; ret_owner: [num_items]. */
static void check_chains(const struct kernels_plan *plan, uint32_t *ret_owner)
{
    const struct plan_item *items = plan_items(plan);
    uint32_t processors = plan->device->processors;
    uint32_t walked = 0;
    uint32_t busy = 0;
    memset(ret_owner, 0xff, plan->num_items * sizeof(*ret_owner));
    assert_true(plan->num_items >= processors && plan->num_items <= plan->items_max);
    for (uint32_t p = 0; p < processors; p++) {
        if (items[p].tokens == 0) {
            assert_int_equal(items[p].next, -1);
        } else {
            busy++;
        }
        for (int32_t i = (int32_t)p; i >= 0; i = items[i].next) {
            assert_true((uint32_t)i < plan->num_items);
            assert_int_equal(ret_owner[i], UINT32_MAX);
            ret_owner[i] = p;
            walked++;
            assert_true(i == (int32_t)p || items[i].tokens > 0);
        }
    }
    assert_int_equal(walked, plan->num_items);
    assert_int_equal(busy, plan->stats.processors);
}

struct marks {
    uint8_t *slots;
    size_t num_slots;
    uint8_t counters[WORKSPACE_COUNTERS];
};

static void mark(uint8_t *marks, size_t max, int32_t first, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        assert_true(first >= 0 && (size_t)first + i < max);
        assert_int_equal(marks[(uint32_t)first + i]++, 0);
    }
}

static void mark_partials(const struct kernels_plan *plan, const struct plan_item *item,
                          struct marks *marks)
{
    uint32_t parts = (uint32_t)item->num_splits;
    bool prefill = plan->options.kind == KERNELS_PLAN_PREFILL;
    uint32_t groups =
        !prefill && parts > MERGE_FAN_IN ? (parts + MERGE_FAN_IN - 1) / MERGE_FAN_IN : 0;
    mark(marks->slots, marks->num_slots, item->slot, parts + groups);
    mark(marks->counters, WORKSPACE_COUNTERS, item->counter, prefill ? 2 : 1 + groups);
}

/* The parts of one tile against its list. */
static void check_tile(const struct kernels_plan *plan, const struct random_batch *b,
                       uint32_t request, uint32_t head, uint32_t row, uint32_t tokens,
                       struct marks *marks, uint32_t *items_seen)
{
    const struct kernels_page_list *list = &b->lists[request * plan->options.num_kv_heads + head];
    const struct plan_item *items = plan_items(plan);
    uint8_t covered[REFS_MAX] = {0};
    int32_t parts = 0;
    int32_t num_splits = 0;
    int32_t last_end = 0;
    for (int32_t part = 0; part == 0 || part < num_splits; part++) {
        for (uint32_t i = 0; i < plan->num_items; i++) {
            const struct plan_item *item = &items[i];
            if (item->row != (int32_t)row || item->kv_head != (int32_t)head || item->tokens == 0 ||
                item->split != part) {
                continue;
            }
            int32_t pages = 0;
            parts++;
            (*items_seen)++;
            assert_int_equal(item->tokens, tokens);
            bool all = list->window > INT32_MAX || list->sink > INT32_MAX;
            assert_int_equal(item->window, all ? 0 : list->window);
            assert_int_equal(item->sink, item->window == 0 ? 0 : list->sink);
            num_splits = num_splits == 0 ? item->num_splits : num_splits;
            assert_int_equal(item->num_splits, num_splits);
            if (part == 0 && num_splits > 1) {
                mark_partials(plan, item, marks);
            }
            for (int n = 0; n < PLAN_RANGES; n++) {
                assert_true(item->count[n] >= 0);
                assert_true(item->count[n] == 0 || n == 0 || item->count[n - 1] > 0);
                for (int32_t at = item->first[n]; at < item->first[n] + item->count[n]; at++) {
                    assert_true(at >= (int32_t)list->first &&
                                at < (int32_t)(list->first + list->count));
                    assert_true(at >= last_end); /* in order, over parts too */
                    last_end = at + 1;
                    covered[at]++;
                    pages++;
                }
            }
            assert_int_equal(pages, item->pages);
            assert_true(num_splits == 1 || pages >= 1);
        }
    }
    assert_true(num_splits >= 1);
    assert_int_equal(parts, num_splits);
    for (uint32_t n = list->first; n < list->first + list->count; n++) {
        bool seen = false;
        for (uint32_t i = row; i < row + tokens && !seen; i++) {
            seen = page_seen(b, list, &b->refs[n], b->positions[i]);
        }
        assert_true(covered[n] <= 1);
        assert_true(!seen || covered[n] == 1);
    }
}

/* No processor has much more than its share, in the planner's own measure of cost. */
static void check_balance(const struct kernels_plan *plan, const uint32_t *owner)
{
    const struct plan_item *items = plan_items(plan);
    uint32_t processors = plan->device->processors;
    bool decode = plan->options.kind == KERNELS_PLAN_DECODE;
    uint64_t *loads = rk_alloc_zero(processors, sizeof(*loads));
    uint64_t *pages = rk_alloc_zero(processors, sizeof(*pages));
    assert_non_null(loads);
    assert_non_null(pages);
    uint64_t total = 0;
    uint64_t longest = 0;
    uint64_t highest = 0;
    uint64_t all_pages = 0;
    uint64_t busiest = 0;
    for (uint32_t i = 0; i < plan->num_items; i++) {
        if (items[i].tokens == 0) {
            continue;
        }
        uint64_t n = (uint64_t)items[i].pages;
        const bool split = items[i].num_splits > 1;
        uint64_t cost = decode ? n + 1 : (n + 1) / 2 + 1 + (split ? 2 : 0);
        total += cost;
        longest = cost > longest ? cost : longest;
        loads[owner[i]] += cost;
        pages[owner[i]] += n;
        all_pages += n;
    }
    for (uint32_t p = 0; p < processors; p++) {
        highest = loads[p] > highest ? loads[p] : highest;
        busiest = pages[p] > busiest ? pages[p] : busiest;
    }
    uint64_t mean = (total + processors - 1) / processors;
    if (decode) {
        /* Room for less than three pages may stay empty, and each cut costs a page. */
        assert_true(highest <= (mean > 4 ? mean : 4) + 4);
    } else {
        assert_true(highest <= mean + longest); /* of any list schedule */
    }
    assert_int_equal(all_pages, plan->stats.pages);
    assert_int_equal(busiest, plan->stats.pages_busiest);
    rk_free(loads);
    rk_free(pages);
}

static void check_plan(const struct kernels_plan *plan, const struct random_batch *b)
{
    static struct marks marks;
    const struct kernels_plan_options *o = &plan->options;
    uint32_t size = tokens_per_tile(o->kind, o->group);
    uint32_t items_seen = 0;
    size_t room = (size_t)SPLITS_PER_PROCESSOR * plan->device->processors;
    uint32_t *owner = rk_alloc_zero(plan->num_items, sizeof(*owner));
    assert_non_null(owner);
    assert_true(plan->stats.splits <= room);
    marks.num_slots =
        room * slot_floats(KERNELS_PLAN_PREFILL, 128) / slot_floats(o->kind, o->head_dim);
    marks.slots = rk_alloc_zero(marks.num_slots, 1);
    assert_non_null(marks.slots);
    memset(marks.counters, 0, sizeof(marks.counters));

    check_chains(plan, owner);
    for (uint32_t request = 0; request < b->batch.num_requests; request++) {
        for (uint32_t head = 0; head < o->num_kv_heads; head++) {
            uint32_t end = b->row_first[request + 1];
            for (uint32_t row = b->row_first[request]; row < end; row += size) {
                check_tile(plan, b, request, head, row, end - row < size ? end - row : size, &marks,
                           &items_seen);
            }
        }
    }
    assert_int_equal(items_seen, plan->stats.items); /* and no other */
    check_balance(plan, owner);
    rk_free(marks.slots);
    rk_free(owner);
}

/* Rows move on, up to the last position of the last page of each list. */
static void move_on(struct random_batch *b, const struct kernels_plan_options *o)
{
    for (uint32_t request = 0; request < b->batch.num_requests; request++) {
        uint32_t first = b->row_first[request];
        uint32_t end = b->row_first[request + 1];
        int32_t limit = 0;
        for (uint32_t h = 0; h < o->num_kv_heads; h++) {
            const struct kernels_page_list *list = &b->lists[request * o->num_kv_heads + h];
            for (uint32_t n = list->first; n < list->first + list->count; n++) {
                const struct kernels_page_ref *ref = &b->refs[n];
                int32_t last = ref->positions >= 0 ? b->explicit_positions[ref->positions][63]
                                                   : ref->position + 63;
                limit = last > limit ? last : limit;
            }
        }
        if (first < end && b->positions[end - 1] < limit) {
            int32_t by = (int32_t)support_below((uint32_t)(limit - b->positions[end - 1]) + 1);
            for (uint32_t row = first; row < end; row++) {
                b->positions[row] += by;
            }
        }
    }
}

static struct kernels_plan_options random_options(void)
{
    static const uint32_t groups[] = {1, 2, 3, 4, 5, 7, 8, 16};
    return (struct kernels_plan_options){.kind =
                                             one_in(2) ? KERNELS_PLAN_DECODE : KERNELS_PLAN_PREFILL,
                                         .num_kv_heads = 1 + support_below(HEADS_MAX),
                                         .group = groups[support_below(8)],
                                         .head_dim = one_in(2) ? 64 : 128,
                                         .rows_max = ROWS_MAX,
                                         .requests_max = REQUESTS_MAX,
                                         .refs_max = REFS_MAX,
                                         .explicit_max = EXPLICIT_MAX};
}

static void plans_cover_what_is_seen(void **state)
{
    (void)state;
    static const uint32_t processors[] = {1, 3, 16, 132, 132};
    static struct random_batch b;
    for (int round = 0; round < ROUNDS; round++) {
        struct fixture f;
        struct kernels_plan_options options = random_options();
        struct rk_error error;
        fixture_open(&f, &options, processors[support_below(5)]);
        for (int update = 0; update < 3; update++) {
            bool changed = false;
            random_batch(&b, &options);
            b.batch.version = (uint64_t)update + 1;
            must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
            assert_true(changed);
            check_plan(f.plan, &b);
            if (options.kind == KERNELS_PLAN_DECODE) {
                move_on(&b, &options);
                must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
                assert_false(changed);
                check_plan(f.plan, &b);
            }
        }
        fixture_close(&f);
    }
}

static void the_same_batch_gives_the_same_plan(void **state)
{
    (void)state;
    static struct random_batch b;
    for (int round = 0; round < 50; round++) {
        struct fixture f;
        struct kernels_plan_options options = random_options();
        struct rk_error error;
        bool changed = false;
        fixture_open(&f, &options, 132);
        random_batch(&b, &options); /* version 0: always new */
        must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
        size_t bytes = f.plan->num_items * sizeof(struct plan_item);
        void *before = rk_alloc(bytes);
        assert_non_null(before);
        memcpy(before, plan_items(f.plan), bytes);
        must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
        assert_true(changed);
        assert_memory_equal(before, plan_items(f.plan), bytes);
        rk_free(before);
        fixture_close(&f);
    }
}

/* ---- shapes that are known ---- */

/* `heads` lists of counts[h] pages for each of `requests`, which have `rows` rows at the end. */
static void plain_batch(struct random_batch *b, uint32_t requests, uint32_t heads, uint32_t rows,
                        const uint32_t *counts)
{
    memset(b, 0, sizeof(*b));
    b->batch = (struct kernels_batch){.num_requests = requests,
                                      .num_variants = 1,
                                      .row_first = b->row_first,
                                      .positions = b->positions,
                                      .lists = b->lists,
                                      .refs = b->refs};
    for (uint32_t r = 0; r < requests; r++) {
        uint32_t most = 0;
        for (uint32_t h = 0; h < heads; h++) {
            b->lists[r * heads + h] =
                (struct kernels_page_list){.first = b->batch.num_refs, .count = counts[h]};
            for (uint32_t n = 0; n < counts[h]; n++) {
                b->refs[b->batch.num_refs++] =
                    (struct kernels_page_ref){.page = (int32_t)(n % POOL_PAGES),
                                              .position = (int32_t)(n * RK_PAGE_TOKENS),
                                              .positions = -1,
                                              .live = UINT64_MAX};
            }
            most = counts[h] > most ? counts[h] : most;
        }
        for (uint32_t i = 0; i < rows; i++) {
            b->positions[r * rows + i] = (int32_t)(most * RK_PAGE_TOKENS - rows + i);
        }
        b->row_first[r + 1] = (r + 1) * rows;
    }
}

static struct kernels_plan_options plain_options(enum kernels_plan_kind kind, uint32_t heads)
{
    return (struct kernels_plan_options){.kind = kind,
                                         .num_kv_heads = heads,
                                         .group = 4,
                                         .head_dim = 128,
                                         .rows_max = ROWS_MAX,
                                         .requests_max = REQUESTS_MAX,
                                         .refs_max = REFS_MAX,
                                         .explicit_max = EXPLICIT_MAX};
}

/* A few long lists keep all processors busy. */
static void long_lists_are_shared_out(void **state)
{
    (void)state;
    static struct random_batch b;
    static const struct {
        enum kernels_plan_kind kind;
        uint32_t heads;
        uint32_t rows;
        uint32_t counts[HEADS_MAX];
        uint32_t percent; /* of a fair share, that the busiest may have */
    } cases[] = {
        {KERNELS_PLAN_DECODE, 1, 1, {2048}, 115},
        {KERNELS_PLAN_DECODE, 4, 1, {1000, 20, 20, 20}, 120},
        {KERNELS_PLAN_PREFILL, 1, 32, {2000}, 125},
        {KERNELS_PLAN_PREFILL, 4, 256, {500, 500, 500, 500}, 115},
        {KERNELS_PLAN_PREFILL, 4, 1000, {500, 500, 500, 500}, 115},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct fixture f;
        struct rk_error error;
        bool changed = false;
        struct kernels_plan_options options = plain_options(cases[i].kind, cases[i].heads);
        fixture_open(&f, &options, 132);
        plain_batch(&b, 1, cases[i].heads, cases[i].rows, cases[i].counts);
        must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
        check_plan(f.plan, &b);
        struct kernels_plan_stats stats = kernels_plan_stats(f.plan);
        print_message("case %zu: %u items, %u splits, %u processors, busiest %llu of %.1f pages\n",
                      i, stats.items, stats.splits, stats.processors,
                      (unsigned long long)stats.pages_busiest, (double)stats.pages / 132);
        assert_true((double)stats.pages_busiest * 132 * 100 <=
                    (double)stats.pages * cases[i].percent);
        assert_true(stats.splits > 0 || cases[i].rows > 500);
        fixture_close(&f);
    }
}

static void lists_that_show_nothing_have_an_item(void **state)
{
    (void)state;
    static struct random_batch b;
    for (int kind = KERNELS_PLAN_PREFILL; kind <= KERNELS_PLAN_DECODE; kind++) {
        static const uint32_t counts[] = {0, 3};
        struct kernels_plan_options options = plain_options((enum kernels_plan_kind)kind, 2);
        struct fixture f;
        struct rk_error error;
        bool changed = false;
        fixture_open(&f, &options, 132);
        plain_batch(&b, 1, 2, 1, counts);
        for (uint32_t n = 0; n < b.batch.num_refs; n++) {
            b.refs[n].live = 0;
        }
        must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
        check_plan(f.plan, &b);
        assert_int_equal(kernels_plan_stats(f.plan).items, 2);
        assert_int_equal(kernels_plan_stats(f.plan).pages, 0);
        fixture_close(&f);
    }
}

/* Prefill reads nothing after its rows, and nothing before a window. */
static void windows_leave_pages_out(void **state)
{
    (void)state;
    static struct random_batch b;
    static const uint32_t counts[] = {100};
    struct kernels_plan_options options = plain_options(KERNELS_PLAN_PREFILL, 1);
    struct fixture f;
    struct rk_error error;
    bool changed = false;
    fixture_open(&f, &options, 132);
    plain_batch(&b, 1, 1, 1, counts);
    b.positions[0] = 50 * RK_PAGE_TOKENS; /* row 0 of page 50 */
    b.lists[0].window = 65;               /* that, and page 49 */
    b.lists[0].sink = 65;                 /* pages 0 and 1 */
    must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
    check_plan(f.plan, &b);
    assert_int_equal(kernels_plan_stats(f.plan).pages, 4);
    b.lists[0].window = 66; /* and the last row of page 48 */
    must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
    assert_int_equal(kernels_plan_stats(f.plan).pages, 5);
    b.lists[0].window = 0;
    must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
    assert_int_equal(kernels_plan_stats(f.plan).pages, 51);
    fixture_close(&f);
}

/* All processors begin with the longest items of one KV head, whose pages L2 then holds. */
static void prefill_goes_head_by_head(void **state)
{
    (void)state;
    static struct random_batch b;
    static const uint32_t counts[] = {16, 16, 16, 16};
    struct kernels_plan_options options = plain_options(KERNELS_PLAN_PREFILL, 4);
    struct fixture f;
    struct rk_error error;
    bool changed = false;
    fixture_open(&f, &options, 16);
    plain_batch(&b, 1, 4, 1000, counts);
    must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
    check_plan(f.plan, &b);
    for (uint32_t p = 0; p < 16; p++) {
        assert_int_equal(plan_items(f.plan)[p].kv_head, 0);
        assert_true(plan_items(f.plan)[p].row >= 480); /* the second half of the rows */
    }
    fixture_close(&f);
}

/* Five places that are seen, where four fit: the closest two are read as one. */
static void the_smallest_gap_is_closed(void **state)
{
    (void)state;
    static struct random_batch b;
    static const uint32_t counts[] = {60};
    static const uint32_t seen[][5] = {
        {0, 10, 20, 30, 33}, {0, 10, 20, 23, 33}, {0, 3, 20, 30, 40}, {5, 15, 18, 30, 59}};
    struct kernels_plan_options options = plain_options(KERNELS_PLAN_PREFILL, 1);
    struct fixture f;
    struct rk_error error;
    bool changed = false;
    fixture_open(&f, &options, 1);
    for (size_t i = 0; i < sizeof(seen) / sizeof(seen[0]); i++) {
        plain_batch(&b, 1, 1, 1, counts);
        b.positions[0] = 64;
        for (uint32_t n = 0; n < 60; n++) {
            b.refs[n].position = 1000;
        }
        for (uint32_t n = 0; n < 5; n++) {
            b.refs[seen[i][n]].position = 0;
        }
        must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
        check_plan(f.plan, &b);
        assert_int_equal(kernels_plan_stats(f.plan).pages, 5 + 2);
    }
    fixture_close(&f);
}

/* ---- refusals ---- */

static void wrong_null_rows(struct random_batch *b)
{
    b->batch.row_first = NULL;
}
static void wrong_null_positions(struct random_batch *b)
{
    b->batch.positions = NULL;
}
static void wrong_null_lists(struct random_batch *b)
{
    b->batch.lists = NULL;
}
static void wrong_null_refs(struct random_batch *b)
{
    b->batch.refs = NULL;
}
static void wrong_null_explicit(struct random_batch *b)
{
    b->batch.explicit_positions = NULL;
}
static void wrong_no_requests(struct random_batch *b)
{
    b->batch.num_requests = 0;
}
static void wrong_no_variants(struct random_batch *b)
{
    b->batch.num_variants = 0;
}
static void wrong_no_rows(struct random_batch *b)
{
    b->row_first[1] = b->row_first[2] = 0;
}
static void wrong_first_row(struct random_batch *b)
{
    b->row_first[0] = 1;
}
static void wrong_row_order(struct random_batch *b)
{
    b->row_first[1] = b->row_first[2] + 1;
}
static void wrong_negative_position(struct random_batch *b)
{
    b->positions[0] = -1;
}
static void wrong_falling_position(struct random_batch *b)
{
    b->positions[1] = b->positions[0] - 1;
}
static void wrong_high_position(struct random_batch *b)
{
    b->positions[3] = INT32_MAX;
}
static void wrong_page(struct random_batch *b)
{
    b->refs[5].page = POOL_PAGES;
}
static void wrong_negative_page(struct random_batch *b)
{
    b->refs[5].page = -1;
}
static void wrong_variant(struct random_batch *b)
{
    b->refs[5].variant = 1;
}
static void wrong_negative_variant(struct random_batch *b)
{
    b->refs[0].variant = -1;
}
static void wrong_table(struct random_batch *b)
{
    b->refs[5].positions = 1;
}
static void wrong_negative_table(struct random_batch *b)
{
    b->refs[5].positions = -2;
}
static void wrong_ref_position(struct random_batch *b)
{
    b->refs[5].position = -1;
}
static void wrong_high_ref_position(struct random_batch *b)
{
    b->refs[5].position = INT32_MAX - 10;
}
static void wrong_falling_table(struct random_batch *b)
{
    b->explicit_positions[0][40] = 39;
    b->explicit_positions[0][39] = 40;
}
static void wrong_negative_in_table(struct random_batch *b)
{
    b->explicit_positions[0][0] = -1;
}
static void wrong_high_in_table(struct random_batch *b)
{
    b->explicit_positions[0][63] = INT32_MAX;
}
static void wrong_list_end(struct random_batch *b)
{
    b->lists[3].count++;
}
static void wrong_list_overflow(struct random_batch *b)
{
    b->lists[3].first = UINT32_MAX - 1;
}
static void full_requests(struct random_batch *b)
{
    b->batch.num_requests = REQUESTS_MAX + 1;
}
static void full_refs(struct random_batch *b)
{
    b->batch.num_refs = REFS_MAX + 1;
}
static void full_explicit(struct random_batch *b)
{
    b->batch.num_explicit = EXPLICIT_MAX + 1;
}
static void full_rows(struct random_batch *b)
{
    b->row_first[2] = ROWS_MAX + 1;
}

static void wrong_batches_are_refused(void **state)
{
    (void)state;
    static const struct {
        void (*spoil)(struct random_batch *b);
        enum rk_status status;
        const char *text;
    } cases[] = {
        {wrong_null_rows, RK_ERR_INVALID, "row_first is NULL"},
        {wrong_null_positions, RK_ERR_INVALID, "positions is NULL"},
        {wrong_null_lists, RK_ERR_INVALID, "lists is NULL"},
        {wrong_null_refs, RK_ERR_INVALID, "refs is NULL"},
        {wrong_null_explicit, RK_ERR_INVALID, "explicit_positions is NULL"},
        {wrong_no_requests, RK_ERR_INVALID, "no requests"},
        {wrong_no_variants, RK_ERR_INVALID, "no variants"},
        {wrong_no_rows, RK_ERR_INVALID, "no rows"},
        {wrong_first_row, RK_ERR_INVALID, "row_first[0]"},
        {wrong_row_order, RK_ERR_INVALID, "row_first of request 1"},
        {wrong_negative_position, RK_ERR_INVALID, "row 0 of request 0"},
        {wrong_falling_position, RK_ERR_INVALID, "row 1 of request 0"},
        {wrong_high_position, RK_ERR_INVALID, "row 3 of request 1"},
        {wrong_page, RK_ERR_INVALID, "ref 5 names page 512"},
        {wrong_negative_page, RK_ERR_INVALID, "ref 5 names page -1"},
        {wrong_variant, RK_ERR_INVALID, "ref 5 names query variant 1"},
        {wrong_negative_variant, RK_ERR_INVALID, "ref 0 names query variant -1"},
        {wrong_table, RK_ERR_INVALID, "ref 5 names table 1"},
        {wrong_negative_table, RK_ERR_INVALID, "ref 5 names table -2"},
        {wrong_ref_position, RK_ERR_INVALID, "ref 5 is at position -1"},
        {wrong_high_ref_position, RK_ERR_INVALID, "ref 5 is at position"},
        {wrong_falling_table, RK_ERR_INVALID, "table 0 of explicit positions"},
        {wrong_negative_in_table, RK_ERR_INVALID, "table 0 of explicit positions"},
        {wrong_high_in_table, RK_ERR_INVALID, "table 0 of explicit positions"},
        {wrong_list_end, RK_ERR_INVALID, "request 1, KV head 1"},
        {wrong_list_overflow, RK_ERR_INVALID, "request 1, KV head 1"},
        {full_requests, RK_ERR_FULL, "7 requests"},
        {full_refs, RK_ERR_FULL, "2049 page refs"},
        {full_explicit, RK_ERR_FULL, "65 tables"},
        {full_rows, RK_ERR_FULL, "1025 rows"},
    };
    static struct random_batch b;
    static const uint32_t counts[] = {10, 5};
    struct kernels_plan_options options = plain_options(KERNELS_PLAN_DECODE, 2);
    struct fixture f;
    fixture_open(&f, &options, 132);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct rk_error error = {.text = ""};
        bool changed = false;
        plain_batch(&b, 2, 2, 2, counts);
        b.batch.explicit_positions = (const int32_t(*)[RK_PAGE_TOKENS])b.explicit_positions;
        b.batch.num_explicit = 1;
        b.batch.version = 7;
        must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
        assert_true(changed);
        changed = false;
        cases[i].spoil(&b);
        b.batch.version = 8;
        assert_int_equal(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error),
                         cases[i].status);
        if (!strstr(error.text, cases[i].text)) {
            fail_msg("\"%s\" lacks \"%s\"", error.text, cases[i].text);
        }
        assert_false(changed);
        assert_int_equal(f.plan->num_items, 0);
        for (uint32_t p = 0; p < 132; p++) { /* An upload in a graph carries no work. */
            assert_int_equal(plan_items(f.plan)[p].tokens, 0);
            assert_int_equal(plan_items(f.plan)[p].next, -1);
        }
        for (b.batch.version = 7; b.batch.version <= 8; b.batch.version++) {
            /* Neither what failed nor what was there before counts as seen. */
            assert_int_equal(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, NULL),
                             cases[i].status);
        }
    }
    fixture_close(&f);
}

static void a_seen_version_is_left_alone(void **state)
{
    (void)state;
    static struct random_batch b;
    static const uint32_t counts[] = {10, 5};
    struct kernels_plan_options options = plain_options(KERNELS_PLAN_DECODE, 2);
    struct kernels_pool_options small = {.head_dim = 128, .pages = 8};
    struct kernels_pool *other = NULL;
    struct fixture f;
    struct rk_error error;
    bool changed = false;
    fixture_open(&f, &options, 132);
    must(kernels_pool_create(f.device, &small, &other, &error), &error);
    plain_batch(&b, 2, 2, 2, counts);
    b.batch.version = 3;
    must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
    assert_true(changed);
    must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
    assert_false(changed);
    /* Seen, but not for a pool that lacks its pages. */
    assert_int_equal(kernels_plan_update(f.plan, other, &b.batch, &changed, &error),
                     RK_ERR_INVALID);
    b.batch.version = 0;
    for (int i = 0; i < 2; i++) {
        must(kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error), &error);
        assert_true(changed);
    }
    kernels_pool_destroy(other);
    fixture_close(&f);
}

static enum rk_status create_all(void)
{
    struct kernels_plan_options options = plain_options(KERNELS_PLAN_PREFILL, 2);
    struct kernels_device *device = NULL;
    struct kernels_plan *plan = NULL;
    enum rk_status status = kernels_device_create(KERNELS_DEVICE_CPU, 0, &device, NULL);
    assert_int_equal(device != NULL, status == RK_OK);
    if (status == RK_OK) {
        status = kernels_plan_create(device, &options, &plan, NULL);
        assert_int_equal(plan != NULL, status == RK_OK);
    }
    kernels_plan_destroy(plan);
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
    assert_true(failures > 10);
}

static void updates_allocate_nothing(void **state)
{
    (void)state;
    static struct random_batch b;
    struct kernels_plan_options options = plain_options(KERNELS_PLAN_PREFILL, HEADS_MAX);
    struct fixture f;
    struct rk_error error;
    bool changed = false;
    fixture_open(&f, &options, 132);
    random_batch(&b, &options);
    rk_alloc_fail_after(0);
    enum rk_status status = kernels_plan_update(f.plan, f.pool, &b.batch, &changed, &error);
    rk_alloc_fail_after(-1);
    must(status, &error);
    fixture_close(&f);
}

static void wrong_options_are_refused(void **state)
{
    (void)state;
    struct kernels_plan_options good = plain_options(KERNELS_PLAN_DECODE, 2);
    struct kernels_plan_options bad[] = {good, good, good, good, good, good, good, good, good};
    bad[0].kind = (enum kernels_plan_kind)2;
    bad[1].num_kv_heads = 0;
    bad[2].group = 0;
    bad[3].group = 17;
    bad[4].head_dim = 96;
    bad[5].rows_max = 0;
    bad[6].requests_max = 0;
    bad[7].refs_max = UINT32_MAX;
    bad[8].explicit_max = UINT32_MAX;
    struct fixture f;
    fixture_open(&f, &good, 132);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct kernels_plan *plan = NULL;
        struct rk_error error = {.text = ""};
        assert_int_equal(kernels_plan_create(f.device, &bad[i], &plan, &error), RK_ERR_INVALID);
        assert_null(plan);
        assert_string_not_equal(error.text, "");
    }
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plans_cover_what_is_seen),
        cmocka_unit_test(the_same_batch_gives_the_same_plan),
        cmocka_unit_test(long_lists_are_shared_out),
        cmocka_unit_test(lists_that_show_nothing_have_an_item),
        cmocka_unit_test(windows_leave_pages_out),
        cmocka_unit_test(prefill_goes_head_by_head),
        cmocka_unit_test(the_smallest_gap_is_closed),
        cmocka_unit_test(wrong_batches_are_refused),
        cmocka_unit_test(a_seen_version_is_left_alone),
        cmocka_unit_test(creation_survives_each_failed_allocation),
        cmocka_unit_test(updates_allocate_nothing),
        cmocka_unit_test(wrong_options_are_refused),
    };
    support_seed();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
