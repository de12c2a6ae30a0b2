/*
 * cuda_internal: what the files of kernels/cuda share. One .cu a kernel; each
 * queues its work on the caller's stream and neither allocates nor waits.
 */
#ifndef KERNELS_CUDA_CUDA_INTERNAL_H
#define KERNELS_CUDA_CUDA_INTERNAL_H

#include "kernels/device_internal.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

extern "C" {

/* The calling thread's CUDA calls are for this GPU from now on; each op begins with it. */
void cuda_use(const struct kernels_device *device);
/* Status of a CUDA call; `doing` says for a person what failed. */
enum rk_status cuda_check(cudaError_t failed, const char *doing, struct rk_error *error);

/* strides: bytes, of all dimensions but the first. */
enum rk_status cuda_tensor_map(CUtensorMap *ret_map, CUtensorMapDataType type, uint32_t rank,
                               const void *address, const uint64_t *extents,
                               const uint64_t *strides, const uint32_t *box,
                               CUtensorMapSwizzle swizzle, struct rk_error *error);

/* Boxes of half a page's K or V, of 64 columns: {64, 128 rows, halves, pages}, box {64, 64, 1, 1}.
 */
enum rk_status cuda_prefill(struct kernels_device *device,
                            const struct kernels_paged_attention *call, const CUtensorMap *page_map,
                            kernels_stream stream, struct rk_error *error);
/* Whole pages: box {columns of 128 bytes or less, 128, halves, 1}. */
enum rk_status cuda_decode(struct kernels_device *device,
                           const struct kernels_paged_attention *call, const CUtensorMap *page_map,
                           kernels_stream stream, struct rk_error *error);
enum rk_status cuda_mass(struct kernels_device *device, const struct kernels_paged_attention *call,
                         float *mass, kernels_stream stream, struct rk_error *error);
enum rk_status cuda_rope_append(struct kernels_device *device,
                                const struct kernels_rope_append *call, kernels_stream stream,
                                struct rk_error *error);
enum rk_status cuda_rope_queries(struct kernels_device *device,
                                 const struct kernels_rope_queries *call, kernels_stream stream,
                                 struct rk_error *error);
enum rk_status cuda_gather(struct kernels_device *device, const struct kernels_pool *pool,
                           const int32_t *pages, uint32_t count, void *host, kernels_stream stream,
                           struct rk_error *error);
enum rk_status cuda_scatter(struct kernels_device *device, const struct kernels_pool *pool,
                            const int32_t *pages, uint32_t count, const void *host,
                            kernels_stream stream, struct rk_error *error);
enum rk_status cuda_checksum(struct kernels_device *device, const struct kernels_pool *pool,
                             const int32_t *pages, uint32_t count, uint64_t *sums,
                             kernels_stream stream, struct rk_error *error);
}

#endif
