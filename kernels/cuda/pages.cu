/*
 * pages: pages travel to pinned host memory and back.
 */
#include "kernels/cuda/cuda_internal.h"

#define WARP  32
#define CHUNK 16 /* bytes of one access */

/*
 * Each warp moves 4 KB at a time: 8 loads of 512 bytes on their way before the first store. The bus
 * needs its rate times its latency under way, 54 GB/s * 2 us = 108 KB; 32 CTAs of 16 warps have
 * 2 MB, enough also when the list of pages is on the host and each warp first waits for its entry.
 * And they leave 100 of 132 multiprocessors to kernels beside them.
 */
#define MOVE_CTAS    32
#define MOVE_THREADS 512
#define MOVE_LOADS   8
#define MOVE_BYTES   (MOVE_LOADS * WARP * CHUNK)

/* Read once, and not by other warps: it need not stay in L1. */
static __device__ uint4 load_once(const uint4 *from)
{
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

template <bool TO_HOST>
static __global__ void __launch_bounds__(MOVE_THREADS)
    move_kernel(uint8_t *pool, uint8_t *host, const int32_t *pages, uint32_t count,
                uint32_t page_bytes)
{
    uint32_t parts = page_bytes / MOVE_BYTES;
    uint64_t work = (uint64_t)blockIdx.x * (MOVE_THREADS / WARP) + threadIdx.x / WARP;
    uint64_t step = (uint64_t)MOVE_CTAS * (MOVE_THREADS / WARP);
    for (; work < (uint64_t)count * parts; work += step) {
        size_t index = work / parts;
        size_t offset = work % parts * MOVE_BYTES + threadIdx.x % WARP * CHUNK;
        uint8_t *in_pool = pool + (size_t)pages[index] * page_bytes + offset;
        uint8_t *in_host = host + index * page_bytes + offset;
        const uint4 *from = (const uint4 *)(TO_HOST ? in_pool : in_host);
        uint4 *to = (uint4 *)(TO_HOST ? in_host : in_pool);
        uint4 x[MOVE_LOADS];
#pragma unroll
        for (int i = 0; i < MOVE_LOADS; i++) {
            x[i] = load_once(from + i * WARP);
        }
#pragma unroll
        for (int i = 0; i < MOVE_LOADS; i++) {
            if (TO_HOST) {
                __stcs(to + i * WARP, x[i]);
            } else {
                to[i * WARP] = x[i];
            }
        }
    }
}

enum rk_status cuda_gather(struct kernels_device *device, const struct kernels_pool *pool,
                           const int32_t *pages, uint32_t count, void *host, kernels_stream stream,
                           struct rk_error *error)
{
    cuda_use(device);
    if (count == 0) {
        return RK_OK;
    }
    move_kernel<true><<<MOVE_CTAS, MOVE_THREADS, 0, (cudaStream_t)stream>>>(
        (uint8_t *)pool->pages, (uint8_t *)host, pages, count, (uint32_t)pool->page_bytes);
    return cuda_check(cudaGetLastError(), "launching pages_gather", error);
}

enum rk_status cuda_scatter(struct kernels_device *device, const struct kernels_pool *pool,
                            const int32_t *pages, uint32_t count, const void *host,
                            kernels_stream stream, struct rk_error *error)
{
    cuda_use(device);
    if (count == 0) {
        return RK_OK;
    }
    move_kernel<false><<<MOVE_CTAS, MOVE_THREADS, 0, (cudaStream_t)stream>>>(
        (uint8_t *)pool->pages, (uint8_t *)host, pages, count, (uint32_t)pool->page_bytes);
    return cuda_check(cudaGetLastError(), "launching pages_scatter", error);
}
