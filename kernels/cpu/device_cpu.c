/*
 * device_cpu.c: the CPU as a device: plain memory, work done at once, by the
 * references. It computes from a plan's copy of the batch, not from its items.
 */
#include "kernels/cpu/paged_reference.h"
#include "kernels/cpu/pages_reference.h"
#include "kernels/device_internal.h"

#include "common/base/alloc.h"

#include <stdio.h>
#include <string.h>

#define PROCESSORS 132 /* as an H100, so that plans are alike */
#define ALIGNMENT  256

static enum rk_status cpu_open(struct kernels_device *device, struct rk_error *error)
{
    (void)error;
    device->processors = PROCESSORS;
    (void)snprintf(device->name, sizeof(device->name), "cpu");
    return RK_OK;
}

static void cpu_close(struct kernels_device *device)
{
    (void)device;
}

static enum rk_status cpu_memory_create(struct kernels_device *device,
                                        enum kernels_memory_kind kind, size_t bytes,
                                        void **ret_memory, struct rk_error *error)
{
    (void)device;
    (void)kind;
    void *memory = rk_alloc_aligned(ALIGNMENT, bytes);
    if (!memory) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for %zu bytes", bytes);
    }
    *ret_memory = memory;
    return RK_OK;
}

static void cpu_memory_destroy(struct kernels_device *device, enum kernels_memory_kind kind,
                               void *memory)
{
    (void)device;
    (void)kind;
    rk_free(memory);
}

static enum rk_status cpu_copy(struct kernels_device *device, void *to, const void *from,
                               size_t bytes, kernels_stream stream, struct rk_error *error)
{
    (void)device;
    (void)stream;
    (void)error;
    memmove(to, from, bytes);
    return RK_OK;
}

static enum rk_status cpu_fill(struct kernels_device *device, void *to, uint8_t byte, size_t bytes,
                               kernels_stream stream, struct rk_error *error)
{
    (void)device;
    (void)stream;
    (void)error;
    memset(to, byte, bytes);
    return RK_OK;
}

/* A stream is an address of its own, for nothing is ever queued. */
static enum rk_status cpu_stream_create(struct kernels_device *device, kernels_stream *ret_stream,
                                        struct rk_error *error)
{
    (void)device;
    void *stream = rk_alloc(1);
    if (!stream) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a stream");
    }
    *ret_stream = stream;
    return RK_OK;
}

static void cpu_stream_destroy(struct kernels_device *device, kernels_stream stream)
{
    (void)device;
    rk_free(stream);
}

static enum rk_status cpu_stream_wait(struct kernels_device *device, kernels_stream stream,
                                      struct rk_error *error)
{
    (void)device;
    (void)stream;
    (void)error;
    return RK_OK;
}

static bool cpu_stream_capturing(struct kernels_device *device, kernels_stream stream)
{
    (void)device;
    (void)stream;
    return false;
}

static enum rk_status no_graphs(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_UNSUPPORTED, "the CPU device has no graphs");
}

static enum rk_status cpu_graph_begin(struct kernels_device *device, kernels_stream stream,
                                      struct rk_error *error)
{
    (void)device;
    (void)stream;
    return no_graphs(error);
}

static enum rk_status cpu_graph_end(struct kernels_device *device, kernels_stream stream,
                                    struct kernels_graph *graph, struct rk_error *error)
{
    (void)device;
    (void)stream;
    (void)graph;
    return no_graphs(error);
}

static enum rk_status cpu_graph_launch(struct kernels_graph *graph, kernels_stream stream,
                                       struct rk_error *error)
{
    (void)graph;
    (void)stream;
    return no_graphs(error);
}

static void cpu_graph_destroy(struct kernels_graph *graph)
{
    (void)graph;
}

static enum rk_status cpu_pool_open(struct kernels_pool *pool, struct rk_error *error)
{
    (void)pool;
    (void)error;
    return RK_OK;
}

static void cpu_pool_close(struct kernels_pool *pool)
{
    (void)pool;
}

/* The batch is what the plan copied of it, with the positions of now. */
static struct kernels_batch call_batch(const struct kernels_paged_attention *call)
{
    const struct kernels_plan *plan = call->plan;
    return (struct kernels_batch){
        .num_requests = plan->num_requests,
        .num_variants = plan->num_variants,
        .row_first = plan->row_first,
        .positions = call->positions,
        .lists = plan->lists,
        .refs = plan_refs(plan),
        .num_refs = plan->num_refs,
        .explicit_positions = (const int32_t(*)[RK_PAGE_TOKENS])plan_explicit(plan),
        .num_explicit = plan->num_explicit,
    };
}

static struct paged_reference call_reference(const struct kernels_paged_attention *call,
                                             const struct kernels_batch *batch)
{
    const struct kernels_plan_options *o = &call->plan->options;
    return (struct paged_reference){
        .batch = batch,
        .num_kv_heads = o->num_kv_heads,
        .group = o->group,
        .head_dim = o->head_dim,
        .format = call->pool->options.format,
        .pages = call->pool->pages,
        .scales = call->pool->scales,
        .q = call->q,
        .scale = call->scale,
    };
}

static enum rk_status cpu_attention(struct kernels_device *device,
                                    const struct kernels_paged_attention *call,
                                    kernels_stream stream, struct rk_error *error)
{
    (void)device;
    (void)stream;
    (void)error;
    struct kernels_batch batch = call_batch(call);
    struct paged_reference reference = call_reference(call, &batch);
    struct paged_reference_result result = {.out_bf16 = call->out, .lse_f32 = call->lse};
    paged_attention_reference(&reference, &result);
    return RK_OK;
}

static enum rk_status cpu_mass(struct kernels_device *device,
                               const struct kernels_paged_attention *call, float *mass,
                               kernels_stream stream, struct rk_error *error)
{
    (void)device;
    (void)stream;
    struct kernels_batch batch = call_batch(call);
    struct paged_reference reference = call_reference(call, &batch);
    size_t count = (size_t)batch.num_refs * RK_PAGE_TOKENS;
    double *sums = rk_alloc_zero(count, sizeof(*sums));
    if (!sums) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for %zu sums", count);
    }
    attention_mass_reference(&reference, call->lse, sums);
    for (size_t i = 0; i < count; i++) {
        mass[i] = (float)sums[i];
    }
    rk_free(sums);
    return RK_OK;
}

const struct device_ops device_cpu = {
    .open = cpu_open,
    .close = cpu_close,
    .memory_create = cpu_memory_create,
    .memory_destroy = cpu_memory_destroy,
    .copy = cpu_copy,
    .fill = cpu_fill,
    .stream_create = cpu_stream_create,
    .stream_destroy = cpu_stream_destroy,
    .stream_wait = cpu_stream_wait,
    .stream_capturing = cpu_stream_capturing,
    .graph_begin = cpu_graph_begin,
    .graph_end = cpu_graph_end,
    .graph_launch = cpu_graph_launch,
    .graph_destroy = cpu_graph_destroy,
    .pool_open = cpu_pool_open,
    .pool_close = cpu_pool_close,
    .attention = cpu_attention,
    .mass = cpu_mass,
    .rope_append = pages_reference_rope_append,
    .rope_queries = pages_reference_rope_queries,
    .gather = pages_reference_gather,
    .scatter = pages_reference_scatter,
    .checksum = pages_reference_checksum,
};
