/*
 * device_cuda: a GPU as a kernels_device: memory, streams, graphs, tensor maps.
 */
#include "kernels/cuda/cuda_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct pool_maps {
    CUtensorMap prefill; /* bf16 pools only */
    CUtensorMap decode;
};

enum rk_status cuda_check(cudaError_t failed, const char *doing, struct rk_error *error)
{
    if (failed == cudaSuccess) {
        return RK_OK;
    }
    (void)cudaGetLastError(); /* Not to be reported again by the next call. */
    if (failed == cudaErrorMemoryAllocation) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: the GPU is out of memory", doing);
    }
    return rk_error_set(error, RK_ERR_INTERNAL, "%s: CUDA says %s (%s)", doing,
                        cudaGetErrorName(failed), cudaGetErrorString(failed));
}

void cuda_use(const struct kernels_device *device)
{
    (void)cudaSetDevice((int)device->ordinal);
}

enum rk_status cuda_tensor_map(CUtensorMap *ret_map, CUtensorMapDataType type, uint32_t rank,
                               const void *address, const uint64_t *extents,
                               const uint64_t *strides, const uint32_t *box,
                               CUtensorMapSwizzle swizzle, struct rk_error *error)
{
    static PFN_cuTensorMapEncodeTiled_v12000 encode; /* Always the same: a race is harmless. */
    static const uint32_t steps[5] = {1, 1, 1, 1, 1};
    if (!encode) {
        void *function = NULL;
        cudaDriverEntryPointQueryResult found;
        cudaError_t failed = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
        if (failed != cudaSuccess || found != cudaDriverEntryPointSuccess) {
            return rk_error_set(error, RK_ERR_UNSUPPORTED,
                                "the NVIDIA driver has no cuTensorMapEncodeTiled: it is older than "
                                "CUDA 12; update it");
        }
        encode = (PFN_cuTensorMapEncodeTiled_v12000)function;
    }
    CUresult failed = encode(ret_map, type, rank, (void *)address, extents, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (failed != CUDA_SUCCESS) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "the GPU takes no tensor map at %p (must be 16-byte aligned): driver "
                            "error %d",
                            address, (int)failed);
    }
    return RK_OK;
}

static enum rk_status open(struct kernels_device *device, struct rk_error *error)
{
    int count = 0;
    cudaError_t failed = cudaGetDeviceCount(&count);
    if (failed != cudaSuccess) {
        return rk_error_set(
            error, RK_ERR_UNSUPPORTED,
            "no GPU can be used: CUDA says %s; check the NVIDIA driver (nvidia-smi)",
            cudaGetErrorString(failed));
    }
    if (device->ordinal >= (uint32_t)count) {
        return rk_error_set(error, RK_ERR_INVALID, "GPU %u does not exist: this machine has %d",
                            device->ordinal, count);
    }
    struct cudaDeviceProp properties;
    failed = cudaGetDeviceProperties(&properties, (int)device->ordinal);
    if (failed != cudaSuccess) {
        return cuda_check(failed, "reading the GPU's properties", error);
    }
    if (properties.major != 9 || properties.minor != 0) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "GPU %u, %s, is of compute capability %d.%d; the kernels are built for "
                            "9.0 (H100, H200) only",
                            device->ordinal, properties.name, properties.major, properties.minor);
    }
    device->processors = (uint32_t)properties.multiProcessorCount;
    snprintf(device->name, sizeof(device->name), "%s", properties.name);
    return cuda_check(cudaSetDevice((int)device->ordinal), "choosing the GPU", error);
}

static void close(struct kernels_device *device)
{
    (void)device;
}

static enum rk_status memory_create(struct kernels_device *device, enum kernels_memory_kind kind,
                                    size_t bytes, void **ret_memory, struct rk_error *error)
{
    cuda_use(device);
    return cuda_check(
        kind == KERNELS_MEMORY_DEVICE ? cudaMalloc(ret_memory, bytes)
                                      : cudaHostAlloc(ret_memory, bytes, cudaHostAllocDefault),
        kind == KERNELS_MEMORY_DEVICE ? "allocating GPU memory" : "allocating pinned memory",
        error);
}

static void memory_destroy(struct kernels_device *device, enum kernels_memory_kind kind,
                           void *memory)
{
    cuda_use(device);
    if (kind == KERNELS_MEMORY_DEVICE) {
        (void)cudaFree(memory);
    } else {
        (void)cudaFreeHost(memory);
    }
}

static enum rk_status copy(struct kernels_device *device, void *to, const void *from, size_t bytes,
                           kernels_stream stream, struct rk_error *error)
{
    cuda_use(device);
    return cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, (cudaStream_t)stream),
                      "copying memory", error);
}

static enum rk_status fill(struct kernels_device *device, void *to, uint8_t byte, size_t bytes,
                           kernels_stream stream, struct rk_error *error)
{
    cuda_use(device);
    return cuda_check(cudaMemsetAsync(to, byte, bytes, (cudaStream_t)stream), "filling memory",
                      error);
}

static enum rk_status stream_create(struct kernels_device *device, kernels_stream *ret_stream,
                                    struct rk_error *error)
{
    cuda_use(device);
    return cuda_check(cudaStreamCreateWithFlags((cudaStream_t *)ret_stream, cudaStreamNonBlocking),
                      "creating a stream", error);
}

static void stream_destroy(struct kernels_device *device, kernels_stream stream)
{
    cuda_use(device);
    (void)cudaStreamDestroy((cudaStream_t)stream);
}

static enum rk_status stream_wait(struct kernels_device *device, kernels_stream stream,
                                  struct rk_error *error)
{
    cuda_use(device);
    return cuda_check(cudaStreamSynchronize((cudaStream_t)stream), "waiting for the GPU", error);
}

static bool stream_capturing(struct kernels_device *device, kernels_stream stream)
{
    cuda_use(device);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    (void)cudaStreamIsCapturing((cudaStream_t)stream, &capture);
    return capture == cudaStreamCaptureStatusActive;
}

static enum rk_status graph_begin(struct kernels_device *device, kernels_stream stream,
                                  struct rk_error *error)
{
    cuda_use(device);
    return cuda_check(
        cudaStreamBeginCapture((cudaStream_t)stream, cudaStreamCaptureModeThreadLocal),
        "capturing a graph", error);
}

static enum rk_status graph_end(struct kernels_device *device, kernels_stream stream,
                                struct kernels_graph *graph, struct rk_error *error)
{
    cuda_use(device);
    cudaGraph_t recorded = NULL;
    cudaGraphExec_t exec = NULL;
    cudaError_t failed = cudaStreamEndCapture((cudaStream_t)stream, &recorded);
    if (failed == cudaSuccess) {
        failed = cudaGraphInstantiate(&exec, recorded, 0);
    }
    if (recorded) {
        (void)cudaGraphDestroy(recorded);
    }
    graph->exec = exec;
    return cuda_check(failed, "making a graph of what was captured", error);
}

static enum rk_status graph_launch(struct kernels_graph *graph, kernels_stream stream,
                                   struct rk_error *error)
{
    return cuda_check(cudaGraphLaunch((cudaGraphExec_t)graph->exec, (cudaStream_t)stream),
                      "launching a graph", error);
}

static void graph_destroy(struct kernels_graph *graph)
{
    if (graph->exec) {
        (void)cudaGraphExecDestroy((cudaGraphExec_t)graph->exec);
    }
}

static enum rk_status pool_open(struct kernels_pool *pool, struct rk_error *error)
{
    const uint32_t element = pool->options.format == KERNELS_PAGE_BF16 ? 2 : 1;
    const uint32_t row_bytes = pool->options.head_dim * element;
    const uint32_t box_bytes = row_bytes < 128 ? row_bytes : 128;
    const CUtensorMapDataType type =
        element == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    const CUtensorMapSwizzle swizzle =
        box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    const uint32_t halves = row_bytes / box_bytes;
    const uint64_t extents[4] = {box_bytes / element, 2 * RK_PAGE_TOKENS, halves,
                                 pool->options.pages};
    /* A dimension of 1 needs a stride too, a multiple of 16. */
    const uint64_t strides[3] = {row_bytes, box_bytes, pool->page_bytes};
    const uint32_t whole[4] = {box_bytes / element, 2 * RK_PAGE_TOKENS, halves, 1};
    const uint32_t part[4] = {box_bytes / element, RK_PAGE_TOKENS, 1, 1};
    struct pool_maps *maps = NULL;
    if (posix_memalign((void **)&maps, 64, sizeof(*maps)) != 0) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the pool's tensor maps");
    }
    memset(maps, 0, sizeof(*maps));
    pool->backend = maps;
    enum rk_status status = cuda_tensor_map(&maps->decode, type, 4, pool->pages, extents, strides,
                                            whole, swizzle, error);
    if (status == RK_OK && element == 2) {
        status = cuda_tensor_map(&maps->prefill, type, 4, pool->pages, extents, strides, part,
                                 swizzle, error);
    }
    return status;
}

static void pool_close(struct kernels_pool *pool)
{
    free(pool->backend);
}

static enum rk_status attention(struct kernels_device *device,
                                const struct kernels_paged_attention *call, kernels_stream stream,
                                struct rk_error *error)
{
    const struct pool_maps *maps = (const struct pool_maps *)call->pool->backend;
    cuda_use(device);
    if (call->plan->options.kind == KERNELS_PLAN_PREFILL) {
        return cuda_prefill(device, call, &maps->prefill, stream, error);
    }
    return cuda_decode(device, call, &maps->decode, stream, error);
}

extern "C" const struct device_ops device_cuda = {
    open,        close,         memory_create,  memory_destroy,   copy,
    fill,        stream_create, stream_destroy, stream_wait,      stream_capturing,
    graph_begin, graph_end,     graph_launch,   graph_destroy,    pool_open,
    pool_close,  attention,     cuda_mass,      cuda_rope_append, cuda_rope_queries,
    cuda_gather, cuda_scatter,  cuda_checksum,
};
