/*
 * device.c: the checks of device.h, and the objects; work is the ops' of the
 * device's kind.
 */
#include "kernels/device_internal.h"

#include "common/base/alloc.h"
#include "kernels/plan_internal.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#define POOL_PAGES_MAX (1u << 24)
#define SECTION_ALIGN  256
/* Limits of a plan's options: they keep indices in 32 bits. */
#define PLAN_REQUESTS_MAX (1u << 20)
#define PLAN_REFS_MAX     (1u << 26)
#define PLAN_EXPLICIT_MAX (1u << 22)
#define PLAN_ITEMS_MAX    (UINT64_C(1) << 24)

static enum rk_status missing(struct rk_error *error, const char *call, const char *what)
{
    return rk_error_set(error, RK_ERR_INVALID, "%s: %s is NULL", call, what);
}

static bool head_dim_known(uint32_t head_dim)
{
    return head_dim == 64 || head_dim == 128;
}

/* Vector loads and bulk copies need it; every row of a buffer keeps it. */
static bool aligned(const void *memory)
{
    return (uintptr_t)memory % 16 == 0;
}

/* ---- devices, memory, streams, graphs ---- */

/* NULL: not in this build, or no such kind. */
static const struct device_ops *device_ops_find(enum kernels_device_kind kind)
{
#ifdef REDKNOT_CUDA
    if (kind == KERNELS_DEVICE_CUDA) {
        return &device_cuda;
    }
#endif
    return kind == KERNELS_DEVICE_CPU ? &device_cpu : NULL;
}

enum rk_status kernels_device_create(enum kernels_device_kind kind, uint32_t ordinal,
                                     struct kernels_device **ret_device, struct rk_error *error)
{
    const struct device_ops *ops = device_ops_find(kind);
    if (!ops && kind == KERNELS_DEVICE_CUDA) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "this build has no CUDA kernels: build with the preset cuda");
    }
    if (!ops) {
        return rk_error_set(error, RK_ERR_INVALID, "kernels_device_create: no device kind %d",
                            (int)kind);
    }
    if (!ret_device) {
        return missing(error, "kernels_device_create", "ret_device");
    }
    if (kind == KERNELS_DEVICE_CPU && ordinal != 0) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_device_create: the CPU is ordinal 0, not %" PRIu32, ordinal);
    }
    struct kernels_device *device = rk_alloc_zero(1, sizeof(*device));
    if (!device) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a device");
    }
    device->ops = ops;
    device->kind = kind;
    device->ordinal = ordinal;
    enum rk_status status = ops->open(device, error);
    if (status != RK_OK) {
        rk_free(device);
        return status;
    }
    *ret_device = device;
    return RK_OK;
}

void kernels_device_destroy(struct kernels_device *device)
{
    if (device) {
        device->ops->close(device);
        rk_free(device);
    }
}

const char *kernels_device_name(const struct kernels_device *device)
{
    return device->name;
}

uint32_t kernels_device_processors(const struct kernels_device *device)
{
    return device->processors;
}

enum rk_status kernels_memory_create(struct kernels_device *device, enum kernels_memory_kind kind,
                                     size_t bytes, void **ret_memory, struct rk_error *error)
{
    if (!device || !ret_memory) {
        return missing(error, "kernels_memory_create", !device ? "device" : "ret_memory");
    }
    if (kind != KERNELS_MEMORY_DEVICE && kind != KERNELS_MEMORY_PINNED) {
        return rk_error_set(error, RK_ERR_INVALID, "kernels_memory_create: no memory kind %d",
                            (int)kind);
    }
    return device->ops->memory_create(device, kind, bytes ? bytes : 1, ret_memory, error);
}

void kernels_memory_destroy(struct kernels_device *device, enum kernels_memory_kind kind,
                            void *memory)
{
    if (memory) {
        device->ops->memory_destroy(device, kind, memory);
    }
}

enum rk_status kernels_copy(struct kernels_device *device, void *to, const void *from, size_t bytes,
                            kernels_stream stream, struct rk_error *error)
{
    if (!device) {
        return missing(error, "kernels_copy", "device");
    }
    if (bytes == 0) {
        return RK_OK;
    }
    if (!to || !from) {
        return missing(error, "kernels_copy", !to ? "to" : "from");
    }
    return device->ops->copy(device, to, from, bytes, stream, error);
}

enum rk_status kernels_fill(struct kernels_device *device, void *to, uint8_t byte, size_t bytes,
                            kernels_stream stream, struct rk_error *error)
{
    if (!device) {
        return missing(error, "kernels_fill", "device");
    }
    if (bytes == 0) {
        return RK_OK;
    }
    if (!to) {
        return missing(error, "kernels_fill", "to");
    }
    return device->ops->fill(device, to, byte, bytes, stream, error);
}

enum rk_status kernels_stream_create(struct kernels_device *device, kernels_stream *ret_stream,
                                     struct rk_error *error)
{
    if (!device || !ret_stream) {
        return missing(error, "kernels_stream_create", !device ? "device" : "ret_stream");
    }
    return device->ops->stream_create(device, ret_stream, error);
}

void kernels_stream_destroy(struct kernels_device *device, kernels_stream stream)
{
    if (stream) {
        device->ops->stream_destroy(device, stream);
    }
}

enum rk_status kernels_stream_wait(struct kernels_device *device, kernels_stream stream,
                                   struct rk_error *error)
{
    if (!device) {
        return missing(error, "kernels_stream_wait", "device");
    }
    return device->ops->stream_wait(device, stream, error);
}

enum rk_status kernels_graph_begin(struct kernels_device *device, kernels_stream stream,
                                   struct rk_error *error)
{
    if (!device) {
        return missing(error, "kernels_graph_begin", "device");
    }
    return device->ops->graph_begin(device, stream, error);
}

enum rk_status kernels_graph_end(struct kernels_device *device, kernels_stream stream,
                                 struct kernels_graph **ret_graph, struct rk_error *error)
{
    if (!device || !ret_graph) {
        return missing(error, "kernels_graph_end", !device ? "device" : "ret_graph");
    }
    struct kernels_graph *graph = rk_alloc_zero(1, sizeof(*graph));
    if (!graph) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a graph");
    }
    graph->device = device;
    enum rk_status status = device->ops->graph_end(device, stream, graph, error);
    if (status != RK_OK) {
        rk_free(graph);
        return status;
    }
    *ret_graph = graph;
    return RK_OK;
}

enum rk_status kernels_graph_launch(struct kernels_graph *graph, kernels_stream stream,
                                    struct rk_error *error)
{
    if (!graph) {
        return missing(error, "kernels_graph_launch", "graph");
    }
    return graph->device->ops->graph_launch(graph, stream, error);
}

void kernels_graph_destroy(struct kernels_graph *graph)
{
    if (graph) {
        graph->device->ops->graph_destroy(graph);
        rk_free(graph);
    }
}

/* ---- the pool ---- */

static enum rk_status pool_options_check(const struct kernels_pool_options *o,
                                         struct rk_error *error)
{
    if (!head_dim_known(o->head_dim)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_pool_create: head_dim is %" PRIu32 ", not 64 or 128",
                            o->head_dim);
    }
    if (o->format != KERNELS_PAGE_BF16 && o->format != KERNELS_PAGE_E4M3) {
        return rk_error_set(error, RK_ERR_INVALID, "kernels_pool_create: no page format %d",
                            (int)o->format);
    }
    if (o->pages == 0 || o->pages > POOL_PAGES_MAX) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_pool_create: %" PRIu32 " pages, not 1 to %u", o->pages,
                            POOL_PAGES_MAX);
    }
    return RK_OK;
}

static enum rk_status pool_build(struct kernels_pool *pool, struct rk_error *error)
{
    struct kernels_device *device = pool->device;
    size_t bytes = pool->page_bytes * pool->options.pages;
    void *memory = NULL;
    enum rk_status status =
        device->ops->memory_create(device, KERNELS_MEMORY_DEVICE, bytes, &memory, error);
    if (status != RK_OK) {
        return status;
    }
    pool->pages = memory;
    status = device->ops->fill(device, pool->pages, 0, bytes, NULL, error);
    if (status == RK_OK && pool->options.format == KERNELS_PAGE_E4M3) {
        bytes = (size_t)pool->options.pages * 2 * sizeof(float);
        status = device->ops->memory_create(device, KERNELS_MEMORY_DEVICE, bytes, &memory, error);
        if (status == RK_OK) {
            pool->scales = memory;
            status = device->ops->fill(device, pool->scales, 0, bytes, NULL, error);
        }
    }
    /* Streams do not wait for the default one. */
    if (status == RK_OK) {
        status = device->ops->stream_wait(device, NULL, error);
    }
    return status == RK_OK ? device->ops->pool_open(pool, error) : status;
}

enum rk_status kernels_pool_create(struct kernels_device *device,
                                   const struct kernels_pool_options *options,
                                   struct kernels_pool **ret_pool, struct rk_error *error)
{
    if (!device || !options || !ret_pool) {
        return missing(error, "kernels_pool_create",
                       !device    ? "device"
                       : !options ? "options"
                                  : "ret_pool");
    }
    enum rk_status status = pool_options_check(options, error);
    if (status != RK_OK) {
        return status;
    }
    struct kernels_pool *pool = rk_alloc_zero(1, sizeof(*pool));
    if (!pool) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a pool");
    }
    pool->device = device;
    pool->options = *options;
    pool->page_bytes = (size_t)2 * RK_PAGE_TOKENS * options->head_dim *
                       (options->format == KERNELS_PAGE_BF16 ? 2 : 1);
    status = pool_build(pool, error);
    if (status != RK_OK) {
        kernels_pool_destroy(pool);
        return status;
    }
    *ret_pool = pool;
    return RK_OK;
}

/* pool_close() accepts a pool that pool_open() did not reach. */
void kernels_pool_destroy(struct kernels_pool *pool)
{
    if (!pool) {
        return;
    }
    pool->device->ops->pool_close(pool);
    kernels_memory_destroy(pool->device, KERNELS_MEMORY_DEVICE, pool->scales);
    kernels_memory_destroy(pool->device, KERNELS_MEMORY_DEVICE, pool->pages);
    rk_free(pool);
}

size_t kernels_pool_page_bytes(const struct kernels_pool *pool)
{
    return pool->page_bytes;
}

void *kernels_pool_pages(const struct kernels_pool *pool)
{
    return pool->pages;
}

float *kernels_pool_scales(const struct kernels_pool *pool)
{
    return pool->scales;
}

/* ---- plans ---- */

static enum rk_status plan_option_check(const char *name, uint32_t value, uint32_t min,
                                        uint32_t max, struct rk_error *error)
{
    if (value >= min && value <= max) {
        return RK_OK;
    }
    return rk_error_set(error, RK_ERR_INVALID,
                        "kernels_plan_create: %s is %" PRIu32 ", not %" PRIu32 " to %" PRIu32, name,
                        value, min, max);
}

/* Tiles of any batch of these options. */
static uint64_t plan_tiles_max(const struct kernels_plan_options *o)
{
    uint64_t tile = tokens_per_tile(o->kind, o->group);
    return (uint64_t)o->num_kv_heads * ((o->rows_max + tile - 1) / tile + o->requests_max);
}

static enum rk_status plan_options_check(const struct kernels_plan_options *o,
                                         struct rk_error *error)
{
    if (o->kind != KERNELS_PLAN_PREFILL && o->kind != KERNELS_PLAN_DECODE) {
        return rk_error_set(error, RK_ERR_INVALID, "kernels_plan_create: no plan kind %d",
                            (int)o->kind);
    }
    if (!head_dim_known(o->head_dim)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_plan_create: head_dim is %" PRIu32 ", not 64 or 128",
                            o->head_dim);
    }
    const struct {
        const char *name;
        uint32_t value;
        uint32_t min;
        uint32_t max;
    } ranges[] = {
        {"num_kv_heads", o->num_kv_heads, 1, RK_KV_HEADS_MAX},
        {"group", o->group, 1, KERNELS_DEVICE_GROUP_MAX},
        {"rows_max", o->rows_max, 1, RK_SEGMENT_TOKENS_MAX},
        {"requests_max", o->requests_max, 1, PLAN_REQUESTS_MAX},
        {"refs_max", o->refs_max, 0, PLAN_REFS_MAX},
        {"explicit_max", o->explicit_max, 0, PLAN_EXPLICIT_MAX},
    };
    for (size_t i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
        enum rk_status status =
            plan_option_check(ranges[i].name, ranges[i].value, ranges[i].min, ranges[i].max, error);
        if (status != RK_OK) {
            return status;
        }
    }
    if (plan_tiles_max(o) > PLAN_ITEMS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_plan_create: rows_max, requests_max and num_kv_heads allow "
                            "%" PRIu64 " tiles, more than %" PRIu64,
                            plan_tiles_max(o), PLAN_ITEMS_MAX);
    }
    return RK_OK;
}

static size_t section_end(size_t begin, size_t count, size_t bytes_each)
{
    size_t end = begin + count * bytes_each;
    return (end + SECTION_ALIGN - 1) / SECTION_ALIGN * SECTION_ALIGN;
}

static enum rk_status plan_build(struct kernels_plan *plan, struct rk_error *error)
{
    const struct kernels_plan_options *o = &plan->options;
    struct kernels_device *device = plan->device;
    uint32_t tiles_max = (uint32_t)plan_tiles_max(o);
    struct plan_sections *s = &plan->sections;
    /* The empty first items, and what splitting adds. */
    plan->items_max = tiles_max + (SPLITS_PER_PROCESSOR + 1) * device->processors;
    s->items = 0;
    s->refs = section_end(s->items, plan->items_max, sizeof(struct plan_item));
    s->explicit_positions = section_end(s->refs, o->refs_max, sizeof(struct kernels_page_ref));
    s->bytes =
        section_end(s->explicit_positions, o->explicit_max, RK_PAGE_TOKENS * sizeof(int32_t));

    plan->row_first = rk_alloc_zero((size_t)o->requests_max + 1, sizeof(*plan->row_first));
    plan->lists = rk_alloc_zero((size_t)o->requests_max * o->num_kv_heads, sizeof(*plan->lists));
    if (!plan->row_first || !plan->lists || !plan_scratch_create(plan, tiles_max)) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a plan of %zu bytes",
                            s->bytes);
    }
    void *memory = NULL;
    enum rk_status status =
        device->ops->memory_create(device, KERNELS_MEMORY_PINNED, s->bytes, &memory, error);
    if (status != RK_OK) {
        return status;
    }
    plan->pinned = memory;
    memset(plan->pinned, 0, s->bytes); /* A captured upload carries all of it. */
    plan_clear(plan);
    status = device->ops->memory_create(device, KERNELS_MEMORY_DEVICE, s->bytes, &memory, error);
    if (status == RK_OK) {
        plan->device_block = memory;
    }
    return status;
}

enum rk_status kernels_plan_create(struct kernels_device *device,
                                   const struct kernels_plan_options *options,
                                   struct kernels_plan **ret_plan, struct rk_error *error)
{
    if (!device || !options || !ret_plan) {
        return missing(error, "kernels_plan_create",
                       !device    ? "device"
                       : !options ? "options"
                                  : "ret_plan");
    }
    enum rk_status status = plan_options_check(options, error);
    if (status != RK_OK) {
        return status;
    }
    struct kernels_plan *plan = rk_alloc_zero(1, sizeof(*plan));
    if (!plan) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a plan");
    }
    plan->device = device;
    plan->options = *options;
    status = plan_build(plan, error);
    if (status != RK_OK) {
        kernels_plan_destroy(plan);
        return status;
    }
    *ret_plan = plan;
    return RK_OK;
}

void kernels_plan_destroy(struct kernels_plan *plan)
{
    if (!plan) {
        return;
    }
    kernels_memory_destroy(plan->device, KERNELS_MEMORY_DEVICE, plan->device_block);
    kernels_memory_destroy(plan->device, KERNELS_MEMORY_PINNED, plan->pinned);
    plan_scratch_destroy(plan);
    rk_free(plan->lists);
    rk_free(plan->row_first);
    rk_free(plan);
}

enum rk_status kernels_plan_upload(struct kernels_plan *plan, kernels_stream stream,
                                   struct rk_error *error)
{
    if (!plan) {
        return missing(error, "kernels_plan_upload", "plan");
    }
    struct kernels_device *device = plan->device;
    const struct plan_sections *s = &plan->sections;
    if (device->ops->stream_capturing(device, stream)) {
        return device->ops->copy(device, plan->device_block, plan->pinned, s->bytes, stream, error);
    }
    const struct {
        size_t offset;
        size_t bytes;
    } used[] = {
        {s->items, plan->num_items * sizeof(struct plan_item)},
        {s->refs, plan->num_refs * sizeof(struct kernels_page_ref)},
        {s->explicit_positions, (size_t)plan->num_explicit * RK_PAGE_TOKENS * sizeof(int32_t)},
    };
    if (plan->num_items == 0) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_plan_upload: the plan is empty; update it first");
    }
    for (size_t i = 0; i < sizeof(used) / sizeof(used[0]); i++) {
        enum rk_status status =
            kernels_copy(device, plan->device_block + used[i].offset, plan->pinned + used[i].offset,
                         used[i].bytes, stream, error);
        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}

struct kernels_plan_stats kernels_plan_stats(const struct kernels_plan *plan)
{
    return plan->stats;
}

/* ---- work on the device ---- */

enum rk_status kernels_workspace_create(struct kernels_device *device,
                                        struct kernels_workspace **ret_workspace,
                                        struct rk_error *error)
{
    if (!device || !ret_workspace) {
        return missing(error, "kernels_workspace_create", !device ? "device" : "ret_workspace");
    }
    struct kernels_workspace *workspace = rk_alloc_zero(1, sizeof(*workspace));
    if (!workspace) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a workspace");
    }
    workspace->device = device;
    size_t slots = (size_t)SPLITS_PER_PROCESSOR * device->processors *
                   slot_floats(KERNELS_PLAN_PREFILL, 128) * sizeof(float);
    size_t counters = WORKSPACE_COUNTERS * sizeof(int32_t);
    void *memory = NULL;
    enum rk_status status =
        device->ops->memory_create(device, KERNELS_MEMORY_DEVICE, slots, &memory, error);
    if (status != RK_OK) {
        goto fail;
    }
    workspace->slots = memory;
    status = device->ops->memory_create(device, KERNELS_MEMORY_DEVICE, counters, &memory, error);
    if (status != RK_OK) {
        goto fail;
    }
    workspace->counters = memory;
    status = device->ops->fill(device, workspace->counters, 0, counters, NULL, error);
    if (status == RK_OK) {
        status = device->ops->stream_wait(device, NULL, error);
    }
    if (status != RK_OK) {
        goto fail;
    }
    *ret_workspace = workspace;
    return RK_OK;

fail:
    kernels_workspace_destroy(workspace);
    return status;
}

void kernels_workspace_destroy(struct kernels_workspace *workspace)
{
    if (!workspace) {
        return;
    }
    kernels_memory_destroy(workspace->device, KERNELS_MEMORY_DEVICE, workspace->counters);
    kernels_memory_destroy(workspace->device, KERNELS_MEMORY_DEVICE, workspace->slots);
    rk_free(workspace);
}

/* Everything of a call but out, lse and workspace. */
static enum rk_status attention_check(const char *name, const struct kernels_device *device,
                                      const struct kernels_paged_attention *call,
                                      struct rk_error *error)
{
    if (!device || !call || !call->plan || !call->pool || !call->q || !call->positions) {
        return missing(error, name,
                       !device       ? "device"
                       : !call       ? "call"
                       : !call->plan ? "plan"
                       : !call->pool ? "pool"
                       : !call->q    ? "q"
                                     : "positions");
    }
    const struct kernels_plan *plan = call->plan;
    const struct kernels_pool *pool = call->pool;
    if (plan->device != device || pool->device != device) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: the %s is of another device", name,
                            plan->device != device ? "plan" : "pool");
    }
    if (plan->num_items == 0) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: the plan is empty; kernels_plan_update() has to succeed first",
                            name);
    }
    if (plan->options.head_dim != pool->options.head_dim) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: the plan is for head_dim %" PRIu32 ", the pool for %" PRIu32, name,
                            plan->options.head_dim, pool->options.head_dim);
    }
    if (plan->pages_end > pool->options.pages) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: the plan names page %" PRIu32 ", the pool has %" PRIu32, name,
                            plan->pages_end - 1, pool->options.pages);
    }
    if (!(call->scale > 0) || !isfinite(call->scale)) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: scale is %g, not a finite number above 0",
                            name, (double)call->scale);
    }
    if (!aligned(call->q)) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: q is not aligned to 16 bytes", name);
    }
    return RK_OK;
}

enum rk_status kernels_paged_attention(struct kernels_device *device,
                                       const struct kernels_paged_attention *call,
                                       kernels_stream stream, struct rk_error *error)
{
    enum rk_status status = attention_check("kernels_paged_attention", device, call, error);
    if (status != RK_OK) {
        return status;
    }
    if (!call->out || !call->workspace) {
        return missing(error, "kernels_paged_attention", !call->out ? "out" : "workspace");
    }
    if (!aligned(call->out)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_paged_attention: out is not aligned to 16 bytes");
    }
    if (call->workspace->device != device) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_paged_attention: the workspace is of another device");
    }
    if (call->plan->options.kind == KERNELS_PLAN_PREFILL &&
        call->pool->options.format == KERNELS_PAGE_E4M3) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "kernels_paged_attention: e4m3 pages are for decode only, and the "
                            "plan is for prefill");
    }
    return device->ops->attention(device, call, stream, error);
}

enum rk_status kernels_attention_mass(struct kernels_device *device,
                                      const struct kernels_paged_attention *call, float *mass,
                                      kernels_stream stream, struct rk_error *error)
{
    enum rk_status status = attention_check("kernels_attention_mass", device, call, error);
    if (status != RK_OK) {
        return status;
    }
    if (!call->lse || !mass) {
        return missing(error, "kernels_attention_mass", !call->lse ? "lse" : "mass");
    }
    if (call->pool->options.format != KERNELS_PAGE_BF16) {
        return rk_error_set(error, RK_ERR_INVALID, "kernels_attention_mass: the pool is not bf16");
    }
    return device->ops->mass(device, call, mass, stream, error);
}

static enum rk_status rope_check(const char *name, const struct kernels_device_rope *rope,
                                 struct rk_error *error)
{
    if (!rope || !rope->cos || !rope->sin) {
        return missing(error, name,
                       !rope        ? "rope"
                       : !rope->cos ? "rope's table of cosines"
                                    : "rope's table of sines");
    }
    if (!head_dim_known(rope->head_dim) || rope->positions_max == 0) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: a rope of head_dim %" PRIu32 " and %" PRIu32
                            " positions; head_dim is 64 or 128, positions at least 1",
                            name, rope->head_dim, rope->positions_max);
    }
    return RK_OK;
}

enum rk_status kernels_rope_append(struct kernels_device *device,
                                   const struct kernels_rope_append *call, kernels_stream stream,
                                   struct rk_error *error)
{
    static const char name[] = "kernels_rope_append";
    if (!device || !call || !call->pool) {
        return missing(error, name, !device ? "device" : !call ? "call" : "pool");
    }
    enum rk_status status = rope_check(name, call->rope, error);
    if (status != RK_OK) {
        return status;
    }
    if (call->pool->device != device) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: the pool is of another device", name);
    }
    if (call->rope->head_dim != call->pool->options.head_dim) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: the rope is for head_dim %" PRIu32 ", the pool for %" PRIu32, name,
                            call->rope->head_dim, call->pool->options.head_dim);
    }
    if (call->num_runs == 0) {
        return RK_OK;
    }
    if (!call->k || !call->v || !call->positions || !call->runs) {
        return missing(error, name,
                       !call->k           ? "k"
                       : !call->v         ? "v"
                       : !call->positions ? "positions"
                                          : "runs");
    }
    if (call->rows == 0 || call->num_kv_heads == 0 || call->num_kv_heads > RK_KV_HEADS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: %" PRIu32 " rows of %" PRIu32 " KV heads; both are at least 1, "
                            "heads at most %d",
                            name, call->rows, call->num_kv_heads, RK_KV_HEADS_MAX);
    }
    if (!aligned(call->k) || !aligned(call->v)) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: %s is not aligned to 16 bytes", name,
                            !aligned(call->k) ? "k" : "v");
    }
    return device->ops->rope_append(device, call, stream, error);
}

enum rk_status kernels_rope_queries(struct kernels_device *device,
                                    const struct kernels_rope_queries *call, kernels_stream stream,
                                    struct rk_error *error)
{
    static const char name[] = "kernels_rope_queries";
    if (!device || !call) {
        return missing(error, name, !device ? "device" : "call");
    }
    enum rk_status status = rope_check(name, call->rope, error);
    if (status != RK_OK) {
        return status;
    }
    if (call->rows == 0 || call->num_variants == 0) {
        return RK_OK;
    }
    if (!call->q || !call->positions || !call->bases || !call->out) {
        return missing(error, name,
                       !call->q           ? "q"
                       : !call->positions ? "positions"
                       : !call->bases     ? "bases"
                                          : "out");
    }
    if (call->num_q_heads == 0 || call->num_q_heads > RK_KV_HEADS_MAX * KERNELS_DEVICE_GROUP_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: %" PRIu32 " query heads, not 1 to %d", name,
                            call->num_q_heads, RK_KV_HEADS_MAX * KERNELS_DEVICE_GROUP_MAX);
    }
    if (call->q == call->out || !aligned(call->q) || !aligned(call->out)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: q and out are the same, or not aligned to 16 bytes", name);
    }
    return device->ops->rope_queries(device, call, stream, error);
}

/* What the three calls on whole pages ask for. */
static enum rk_status pages_check(const char *name, const struct kernels_device *device,
                                  const struct kernels_pool *pool, const int32_t *pages,
                                  const void *data, struct rk_error *error)
{
    if (!device || !pool || !pages || !data) {
        return missing(error, name,
                       !device  ? "device"
                       : !pool  ? "pool"
                       : !pages ? "pages"
                                : "the memory for the result or of the source");
    }
    if (pool->device != device) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: the pool is of another device", name);
    }
    return RK_OK;
}

enum rk_status kernels_pages_gather(struct kernels_device *device, const struct kernels_pool *pool,
                                    const int32_t *pages, uint32_t count, void *host,
                                    kernels_stream stream, struct rk_error *error)
{
    if (count == 0) {
        return RK_OK;
    }
    enum rk_status status = pages_check("kernels_pages_gather", device, pool, pages, host, error);
    if (status == RK_OK && !aligned(host)) {
        status = rk_error_set(error, RK_ERR_INVALID,
                              "kernels_pages_gather: host is not aligned to 16 bytes");
    }
    return status == RK_OK ? device->ops->gather(device, pool, pages, count, host, stream, error)
                           : status;
}

enum rk_status kernels_pages_scatter(struct kernels_device *device, const struct kernels_pool *pool,
                                     const int32_t *pages, uint32_t count, const void *host,
                                     kernels_stream stream, struct rk_error *error)
{
    if (count == 0) {
        return RK_OK;
    }
    enum rk_status status = pages_check("kernels_pages_scatter", device, pool, pages, host, error);
    if (status == RK_OK && !aligned(host)) {
        status = rk_error_set(error, RK_ERR_INVALID,
                              "kernels_pages_scatter: host is not aligned to 16 bytes");
    }
    return status == RK_OK ? device->ops->scatter(device, pool, pages, count, host, stream, error)
                           : status;
}

enum rk_status kernels_pages_checksum(struct kernels_device *device,
                                      const struct kernels_pool *pool, const int32_t *pages,
                                      uint32_t count, uint64_t *sums, kernels_stream stream,
                                      struct rk_error *error)
{
    if (count == 0) {
        return RK_OK;
    }
    enum rk_status status = pages_check("kernels_pages_checksum", device, pool, pages, sums, error);
    return status == RK_OK ? device->ops->checksum(device, pool, pages, count, sums, stream, error)
                           : status;
}
