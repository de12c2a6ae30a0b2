/*
 * Goal:   what device.h rules out is refused with its status, before anything is queued.
 * Method: a good call for each entry, then one value of it wrong at a time.
 */
#include "tests/kernels_cuda/support.h"

#define PAGES 8

struct objects {
    const struct fixture *fixture;
    struct family *family;
    struct kernels_pool *pool; /* bf16, head_dim 64 */
    struct kernels_pool *e4m3;
    struct kernels_plan *decode;
    struct kernels_plan *prefill;
    struct kernels_workspace *workspace;
    void *memory; /* device, enough for any good call here */
    void *host;
};

static void expect(struct objects *o, enum rk_status status, enum rk_status expected,
                   const char *what)
{
    o->family->number = o->family->cases++;
    if (status != expected) {
        fail(o->family, "%s: %s, not %s", what, rk_status_name(status), rk_status_name(expected));
    }
}

static void refuse(struct objects *o, enum rk_status status, const char *what)
{
    expect(o, status, RK_ERR_INVALID, what);
}

static void pools(struct objects *o)
{
    static const struct {
        struct kernels_pool_options options;
        const char *what;
    } wrong[] = {
        {{.head_dim = 80, .format = KERNELS_PAGE_BF16, .pages = 1}, "a pool of head_dim 80"},
        {{.head_dim = 64, .format = (enum kernels_page_format)7, .pages = 1}, "a pool of format 7"},
        {{.head_dim = 64, .format = KERNELS_PAGE_BF16, .pages = 0}, "a pool of no pages"},
        {{.head_dim = 64, .format = KERNELS_PAGE_BF16, .pages = (1u << 24) + 1},
         "a pool of 2^24 + 1 pages"},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct kernels_pool *pool = NULL;
        struct rk_error error;
        refuse(o, kernels_pool_create(o->fixture->device, &wrong[i].options, &pool, &error),
               wrong[i].what);
        kernels_pool_destroy(pool);
    }
}

static struct kernels_plan_options plan_options(void)
{
    return (struct kernels_plan_options){.kind = KERNELS_PLAN_DECODE,
                                         .num_kv_heads = 1,
                                         .group = 2,
                                         .head_dim = 64,
                                         .rows_max = 4,
                                         .requests_max = 2,
                                         .refs_max = 4,
                                         .explicit_max = 1};
}

static void plan_refuse(struct objects *o, const struct kernels_plan_options *options,
                        const char *what)
{
    struct kernels_plan *plan = NULL;
    struct rk_error error;
    refuse(o, kernels_plan_create(o->fixture->device, options, &plan, &error), what);
    kernels_plan_destroy(plan);
}

static void plans(struct objects *o)
{
    struct kernels_plan_options options = plan_options();
    options.head_dim = 96;
    plan_refuse(o, &options, "a plan of head_dim 96");
    options = plan_options();
    options.group = 0;
    plan_refuse(o, &options, "a plan of group 0");
    options.group = KERNELS_DEVICE_GROUP_MAX + 1;
    plan_refuse(o, &options, "a plan of group 17");
    options = plan_options();
    options.num_kv_heads = 0;
    plan_refuse(o, &options, "a plan of no KV heads");
    options = plan_options();
    options.rows_max = 0;
    plan_refuse(o, &options, "a plan of no rows");
    options = plan_options();
    options.kind = (enum kernels_plan_kind)9;
    plan_refuse(o, &options, "a plan of kind 9");
}

/* ---- batches ---- */

struct sample {
    uint32_t row_first[2];
    int32_t positions[8];
    struct kernels_page_list lists[1];
    struct kernels_page_ref refs[8];
    int32_t explicit_positions[1][RK_PAGE_TOKENS];
    struct kernels_batch batch;
};

static void sample_init(struct sample *s)
{
    *s = (struct sample){.row_first = {0, 2}, .positions = {70, 71}, .lists = {{.count = 2}}};
    for (int32_t i = 0; i < 8; i++) {
        s->refs[i] = (struct kernels_page_ref){
            .page = i, .position = i * RK_PAGE_TOKENS, .positions = -1, .live = UINT64_MAX};
    }
    for (int32_t i = 0; i < RK_PAGE_TOKENS; i++) {
        s->explicit_positions[0][i] = 2 * i;
    }
    s->batch = (struct kernels_batch){.num_requests = 1,
                                      .num_variants = 1,
                                      .row_first = s->row_first,
                                      .positions = s->positions,
                                      .lists = s->lists,
                                      .refs = s->refs,
                                      .num_refs = 2,
                                      .explicit_positions = s->explicit_positions,
                                      .num_explicit = 1};
}

static enum rk_status update(struct objects *o, struct kernels_plan *plan, struct sample *s)
{
    struct rk_error error;
    bool changed = false;
    return kernels_plan_update(plan, o->pool, &s->batch, &changed, &error);
}

static void batches(struct objects *o)
{
    struct sample s;
    sample_init(&s);
    expect(o, update(o, o->decode, &s), RK_OK, "a good batch");
    s.refs[1].page = PAGES;
    refuse(o, update(o, o->decode, &s), "a page past the pool");
    sample_init(&s);
    s.refs[1].page = -1;
    refuse(o, update(o, o->decode, &s), "page -1");
    sample_init(&s);
    s.refs[0].variant = 1;
    refuse(o, update(o, o->decode, &s), "variant 1 of 1");
    sample_init(&s);
    s.refs[0].positions = 1;
    refuse(o, update(o, o->decode, &s), "explicit positions 1 of 1");
    sample_init(&s);
    s.explicit_positions[0][5] = 3;
    s.refs[0].positions = 0;
    refuse(o, update(o, o->decode, &s), "explicit positions that do not ascend");
    sample_init(&s);
    s.lists[0].count = 3;
    refuse(o, update(o, o->decode, &s), "a list past the refs");
    sample_init(&s);
    s.positions[0] = -1;
    refuse(o, update(o, o->decode, &s), "a negative position");
    sample_init(&s);
    s.positions[1] = 3;
    refuse(o, update(o, o->decode, &s), "positions that do not ascend");
    sample_init(&s);
    s.row_first[0] = 1;
    refuse(o, update(o, o->decode, &s), "rows that begin at 1");
    sample_init(&s);
    s.batch.num_variants = 0;
    refuse(o, update(o, o->decode, &s), "no variants");
    sample_init(&s);
    s.row_first[1] = 5;
    s.positions[2] = s.positions[3] = s.positions[4] = 80;
    expect(o, update(o, o->decode, &s), RK_ERR_FULL, "5 rows of 4");
    sample_init(&s);
    s.batch.num_refs = 5;
    expect(o, update(o, o->decode, &s), RK_ERR_FULL, "5 refs of 4");
}

/* ---- calls ---- */

static enum rk_status attend(struct objects *o, const struct kernels_paged_attention *call)
{
    struct rk_error error;
    return kernels_paged_attention(o->fixture->device, call, o->fixture->stream, &error);
}

static void attentions(struct objects *o)
{
    struct rk_error error;
    struct sample s;
    struct kernels_paged_attention good = {.plan = o->decode,
                                           .pool = o->pool,
                                           .workspace = o->workspace,
                                           .q = o->memory,
                                           .positions = o->memory,
                                           .scale = 1,
                                           .out = (uint8_t *)o->memory + 65536,
                                           .lse = NULL};
    refuse(o, attend(o, &good), "attention after a refused update");
    sample_init(&s);
    expect(o, update(o, o->decode, &s), RK_OK, "a good batch");
    expect(o, update(o, o->prefill, &s), RK_OK, "a good batch for prefill");
    struct kernels_paged_attention call = good;
    call.scale = 0;
    refuse(o, attend(o, &call), "scale 0");
    call = good;
    call.q = NULL;
    refuse(o, attend(o, &call), "attention without q");
    call = good;
    call.out = NULL;
    refuse(o, attend(o, &call), "attention without out");
    call = good;
    call.workspace = NULL;
    refuse(o, attend(o, &call), "attention without workspace");
    call = good;
    call.plan = o->prefill;
    call.pool = o->e4m3;
    refuse(o, attend(o, &call), "prefill of e4m3 pages");
    refuse(o,
           kernels_attention_mass(o->fixture->device, &good, o->memory, o->fixture->stream, &error),
           "mass without lse");
    call = good;
    call.lse = o->memory;
    call.pool = o->e4m3;
    refuse(o,
           kernels_attention_mass(o->fixture->device, &call, o->memory, o->fixture->stream, &error),
           "mass of e4m3 pages");
}

static void page_calls(struct objects *o)
{
    struct rk_error error;
    struct kernels_device *device = o->fixture->device;
    kernels_stream stream = o->fixture->stream;
    struct kernels_device_rope rope = {
        .cos = o->memory, .sin = o->memory, .positions_max = 16, .head_dim = 128};
    struct kernels_rope_append append = {.pool = o->pool,
                                         .rope = &rope,
                                         .rows = 1,
                                         .num_kv_heads = 1,
                                         .k = o->memory,
                                         .v = o->memory,
                                         .positions = o->memory,
                                         .runs = o->memory,
                                         .num_runs = 1};
    refuse(o, kernels_rope_append(device, &append, stream, &error),
           "append with a rope of another head_dim");
    rope.head_dim = 64;
    append.k = NULL;
    refuse(o, kernels_rope_append(device, &append, stream, &error), "append without k");
    struct kernels_rope_queries queries = {.rope = &rope,
                                           .rows = 1,
                                           .num_q_heads = 1,
                                           .q = o->memory,
                                           .positions = o->memory,
                                           .bases = o->memory,
                                           .num_variants = 1,
                                           .out = o->memory};
    refuse(o, kernels_rope_queries(device, &queries, stream, &error), "queries in place");
    rope.head_dim = 32;
    queries.out = (uint8_t *)o->memory + 65536;
    refuse(o, kernels_rope_queries(device, &queries, stream, &error), "a rope of head_dim 32");
    refuse(o, kernels_pages_gather(device, o->pool, NULL, 1, o->host, stream, &error),
           "gather without pages");
    refuse(o, kernels_pages_scatter(device, o->pool, o->memory, 1, NULL, stream, &error),
           "scatter without host memory");
    refuse(o, kernels_pages_checksum(device, o->pool, o->memory, 1, NULL, stream, &error),
           "checksums without sums");
}

void family_refusals(const struct fixture *fixture, struct family *family)
{
    struct objects o = {.fixture = fixture, .family = family};
    struct rk_error error = {.status = RK_OK};
    struct kernels_device *device = fixture->device;
    struct kernels_pool_options pool = {
        .head_dim = 64, .format = KERNELS_PAGE_BF16, .pages = PAGES};
    struct kernels_plan_options options = plan_options();
    o.memory = must_create(fixture, KERNELS_MEMORY_DEVICE, 1 << 20);
    o.host = must_create(fixture, KERNELS_MEMORY_PINNED, 1 << 20);
    must(kernels_pool_create(device, &pool, &o.pool, &error), &error, "kernels_pool_create");
    pool.format = KERNELS_PAGE_E4M3;
    must(kernels_pool_create(device, &pool, &o.e4m3, &error), &error, "kernels_pool_create");
    must(kernels_plan_create(device, &options, &o.decode, &error), &error, "kernels_plan_create");
    options.kind = KERNELS_PLAN_PREFILL;
    must(kernels_plan_create(device, &options, &o.prefill, &error), &error, "kernels_plan_create");
    must(kernels_workspace_create(device, &o.workspace, &error), &error,
         "kernels_workspace_create");
    pools(&o);
    plans(&o);
    batches(&o);
    attentions(&o);
    page_calls(&o);
    must_wait(fixture); /* nothing was queued that could fail */
    kernels_workspace_destroy(o.workspace);
    kernels_plan_destroy(o.prefill);
    kernels_plan_destroy(o.decode);
    kernels_pool_destroy(o.e4m3);
    kernels_pool_destroy(o.pool);
    kernels_memory_destroy(device, KERNELS_MEMORY_PINNED, o.host);
    kernels_memory_destroy(device, KERNELS_MEMORY_DEVICE, o.memory);
}
