/*
 * checksum: XXH3-64 of pages, as common/base/hash.h computes it on the host.
 */
#include "kernels/cuda/cuda_internal.h"

#define WARP      32
#define ALL_LANES 0xffffffffu

/*
 * XXH3-64 of inputs above 240 bytes, https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md. Eight
 * lanes of 64 bits take in stripes of 64 bytes, lane i the words i; after a block of 16 stripes,
 * which is as many as the secret has offsets, all lanes are scrambled. Within a block the lanes
 * only add up, so that all blocks of a page are summed at the same time; the scrambles then take
 * place in order. The last stripe of a page has an offset of its own and no scramble after it.
 */
#define SUM_THREADS     256
#define SUM_WARPS       (SUM_THREADS / WARP)
#define BLOCK_BYTES     1024
#define BLOCKS_MAX      32
#define STRIPE_LANES    8
#define STRIPES         16 /* of a block */
#define SECRET_BYTES    192
#define SECRET_LAST     (SECRET_BYTES - 64 - 7)
#define SECRET_SCRAMBLE (SECRET_BYTES - 64)
#define SECRET_MERGE    11

static __constant__ uint64_t xxh3_secret[SECRET_BYTES / 8] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
    0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
    0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
    0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};
static __constant__ uint64_t xxh3_lanes[STRIPE_LANES] = {
    0x00000000c2b2ae3d, 0x9e3779b185ebca87, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9,
    0x85ebca77c2b2ae63, 0x0000000085ebca77, 0x27d4eb2f165667c5, 0x000000009e3779b1,
};
#define XXH_PRIME32_1  UINT64_C(0x9e3779b1)
#define XXH_PRIME64_1  UINT64_C(0x9e3779b185ebca87)
#define XXH3_AVALANCHE UINT64_C(0x165667919e3779f9)

/* 8 bytes of the secret at any offset, little endian. */
static __device__ uint64_t secret_at(const uint64_t *secret, uint32_t offset)
{
    uint32_t shift = offset % 8 * 8;
    uint64_t low = secret[offset / 8] >> shift;
    return shift == 0 ? low : low | secret[offset / 8 + 1] << (64 - shift);
}

static __device__ uint64_t product_of_halves(uint64_t x)
{
    return (x & 0xffffffff) * (x >> 32);
}

/* A lane has its own words' products and its neighbour's words. A thread takes 16 bytes, two lanes:
 * chunks t and t + 32 of the block, both of lanes 2 * (t % 4) and the next. */
static __device__ void sum_block(const uint8_t *block, bool last, const uint64_t *secret,
                                 uint64_t *ret_sums)
{
    uint32_t lane = threadIdx.x % WARP;
    uint32_t pair = lane % 4;
    ulonglong2 x[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        x[i] = __ldg((const ulonglong2 *)block + lane + i * WARP);
    }
    uint64_t sum0 = 0;
    uint64_t sum1 = 0;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t stripe = (lane + i * WARP) / 4;
        uint32_t offset = (last && stripe == STRIPES - 1 ? SECRET_LAST : stripe * 8) + pair * 16;
        sum0 += x[i].y + product_of_halves(x[i].x ^ secret_at(secret, offset));
        sum1 += x[i].x + product_of_halves(x[i].y ^ secret_at(secret, offset + 8));
    }
#pragma unroll
    for (int step = 4; step < WARP; step *= 2) {
        sum0 += __shfl_xor_sync(ALL_LANES, sum0, step);
        sum1 += __shfl_xor_sync(ALL_LANES, sum1, step);
    }
    if (lane < 4) {
        ret_sums[2 * pair] = sum0;
        ret_sums[2 * pair + 1] = sum1;
    }
}

static __device__ uint64_t merge_lanes(const uint64_t *lanes, const uint64_t *secret,
                                       uint64_t page_bytes)
{
    uint64_t sum = page_bytes * XXH_PRIME64_1;
    for (uint32_t i = 0; i < STRIPE_LANES; i += 2) {
        uint64_t a = lanes[i] ^ secret_at(secret, SECRET_MERGE + 8 * i);
        uint64_t b = lanes[i + 1] ^ secret_at(secret, SECRET_MERGE + 8 * i + 8);
        sum += a * b ^ __umul64hi(a, b);
    }
    sum ^= sum >> 37;
    sum *= XXH3_AVALANCHE;
    return sum ^ sum >> 32;
}

static __global__ void __launch_bounds__(SUM_THREADS)
    checksum_kernel(const uint8_t *pool, const int32_t *pages, uint32_t page_bytes, uint64_t *sums)
{
    __shared__ uint64_t secret[SECRET_BYTES / 8];
    __shared__ uint64_t block_sums[BLOCKS_MAX][STRIPE_LANES];
    __shared__ uint64_t lanes[STRIPE_LANES];
    const uint8_t *page = pool + (size_t)pages[blockIdx.x] * page_bytes;
    uint32_t blocks = page_bytes / BLOCK_BYTES;
    if (threadIdx.x < SECRET_BYTES / 8) {
        secret[threadIdx.x] = xxh3_secret[threadIdx.x];
    }
    __syncthreads();
    for (uint32_t b = threadIdx.x / WARP; b < blocks; b += SUM_WARPS) {
        sum_block(page + b * BLOCK_BYTES, b == blocks - 1, secret, block_sums[b]);
    }
    __syncthreads();
    if (threadIdx.x < STRIPE_LANES) {
        uint64_t key = secret_at(secret, SECRET_SCRAMBLE + 8 * threadIdx.x);
        uint64_t lane = xxh3_lanes[threadIdx.x];
        for (uint32_t b = 0; b < blocks - 1; b++) {
            lane += block_sums[b][threadIdx.x];
            lane = (lane ^ lane >> 47 ^ key) * XXH_PRIME32_1;
        }
        lanes[threadIdx.x] = lane + block_sums[blocks - 1][threadIdx.x];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = merge_lanes(lanes, secret, page_bytes);
    }
}

enum rk_status cuda_checksum(struct kernels_device *device, const struct kernels_pool *pool,
                             const int32_t *pages, uint32_t count, uint64_t *sums,
                             kernels_stream stream, struct rk_error *error)
{
    cuda_use(device);
    if (count == 0) {
        return RK_OK;
    }
    checksum_kernel<<<count, SUM_THREADS, 0, (cudaStream_t)stream>>>(
        (const uint8_t *)pool->pages, pages, (uint32_t)pool->page_bytes, sums);
    return cuda_check(cudaGetLastError(), "launching pages_checksum", error);
}
