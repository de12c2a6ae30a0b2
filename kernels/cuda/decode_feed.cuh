/*
 * decode_feed: the producer warp of the decode kernel: items, queries and pages to
 * shared memory, ahead of their use.
 */
#ifndef KERNELS_CUDA_DECODE_FEED_CUH
#define KERNELS_CUDA_DECODE_FEED_CUH

#include "kernels/cuda/decode_internal.cuh"

/* Queues the copies of an item, its positions and its queries to a slot. The whole warp. */
template <class SHAPE, int HEAD_DIM>
DEVICE_CALL void item_send(const struct decode_params *p, uint8_t *slot_memory, uint32_t full,
                           const struct plan_item &item, int32_t index, int32_t variant,
                           uint32_t lane)
{
    constexpr uint32_t CHUNKS = HEAD_DIM / 8; /* of 16 bytes, in a row of queries */
    struct item_slot *slot = (struct item_slot *)slot_memory;
    uint32_t queries = smem_address(slot + 1);

    if (lane < sizeof(struct plan_item) / 16) {
        copy_async_16(smem_address(&slot->item) + 16 * lane,
                      (const uint8_t *)(p->items + index) + 16 * lane);
    }
    if (lane < (uint32_t)item.tokens) {
        copy_async_4(smem_address(&slot->positions[lane]), p->positions + item.row + lane);
    }
    for (uint32_t i = lane; i < item.tokens * p->group * CHUNKS; i += 32) {
        uint32_t row = i / CHUNKS, chunk = i % CHUNKS;
        size_t query = ((size_t)variant * p->rows + item.row + row / p->group) * p->num_q_heads +
                       item.kv_head * p->group + row % p->group;

        copy_async_16(queries + row * SHAPE::QUERY_ROW + 16 * chunk,
                      p->q + query * HEAD_DIM + 8 * chunk);
    }
    barrier_arrive_copies(full);
    if (lane == 0) {
        slot->variant = variant;
        barrier_arrive(full);
    }
}

/* A page ref as a lane holds it. */
struct lane_ref {
    int2 page_variant;
    int2 where; /* position, positions */
    uint2 live;
};

/* Queues the copy of a page to a free stage. One lane. */
template <class SHAPE, bool E4M3>
DEVICE_CALL void page_send(const struct decode_params *p, const CUtensorMap *map, uint8_t *smem,
                           uint32_t stage, const struct lane_ref &ref)
{
    struct stage_info *info = (struct stage_info *)(smem + SHAPE::INFO) + stage;
    uint32_t base = smem_address(smem), full = base + SHAPE::FULL + stage * 8;

    info->live = (uint64_t)ref.live.y << 32 | ref.live.x;
    info->position = ref.where.x;
    info->positions = ref.where.y;
    info->variant = ref.page_variant.y;
    barrier_arrive_expect(full, SHAPE::PAGE_BYTES);
    tma_load_4d_once(base + stage * SHAPE::PAGE_BYTES, map, full, 0, 0, 0, ref.page_variant.x);
    if (E4M3) {
        copy_async_8(smem_address(&info->scale_k), p->scales + 2 * (size_t)ref.page_variant.x);
        barrier_arrive_copies(full);
    }
}

/* The same once the stage is free, by the lane that has the page; the stages move on. */
template <class SHAPE, bool E4M3>
DEVICE_CALL void page_send_in_turn(const struct decode_params *p, const CUtensorMap *map,
                                   uint8_t *smem, uint32_t *stage, uint32_t *parity,
                                   const struct lane_ref &ref, bool mine)
{
    if (mine) {
        barrier_wait(smem_address(smem) + SHAPE::EMPTY + *stage * 8, *parity);
        page_send<SHAPE, E4M3>(p, map, smem, *stage, ref);
    }
    __syncwarp();
    if (++*stage == SHAPE::STAGES) {
        *stage = 0;
        *parity ^= 1;
    }
}

template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void produce(const struct decode_params *p, const CUtensorMap *map, uint8_t *smem,
                         struct plan_item item, uint32_t lane)
{
    uint32_t base = smem_address(smem);
    uint32_t stage = 0, parity = 1; /* an unused stage counts as released */
    uint32_t slot = 0, slot_parity = 1;
    int32_t index = blockIdx.x;
    bool waited = false;

    for (;;) {
        struct plan_item next = item;

        if (item.next >= 0) {
            next = item_load(p->items + item.next);
        }
        for (int32_t first = 0; first < max(item.pages, 1); first += 32) {
            int32_t pages = min(item.pages - first, 32);
            struct lane_ref ref = {};

            /* Lane i has page i. Plans are not written by the kernel before: no need to wait. */
            if ((int32_t)lane < pages) {
                const int2 *from = (const int2 *)(p->refs + item_ref(&item, first + lane));

                ref.page_variant = __ldg(from);
                ref.where = __ldg(from + 1);
                ref.live = __ldg((const uint2 *)(from + 2));
            }
            int32_t i = 0;

            if (!waited) {
                /* The first pages come to L2 while the kernel before ends; that may still write
                 * pages, but only what is loaded after the wait is used. More would take from the
                 * blocks that are behind. */
                i = min(pages, SHAPE::STAGES);
                if ((int32_t)lane < min(i, SHAPE::EARLY_PAGES)) {
                    l2_prefetch_once(p->pages + (size_t)ref.page_variant.x * SHAPE::PAGE_BYTES,
                                     SHAPE::PAGE_BYTES);
                }
                wait_previous_kernel();
                waited = true;
                if ((int32_t)lane < i) { /* All stages are free. */
                    page_send<SHAPE, E4M3>(p, map, smem, lane, ref);
                }
                __syncwarp();
                stage = i % SHAPE::STAGES;
                parity ^= i == SHAPE::STAGES;
            } else if (pages > 0) {
                page_send_in_turn<SHAPE, E4M3>(p, map, smem, &stage, &parity, ref, lane == 0);
                i = 1;
            }
            if (first == 0) { /* Behind the first page, which takes longer. */
                barrier_wait(base + SHAPE::ITEM_EMPTY + slot * 8, slot_parity);
                item_send<SHAPE, HEAD_DIM>(p, smem + SHAPE::ITEMS + slot * SHAPE::SLOT_BYTES,
                                           base + SHAPE::ITEM_FULL + slot * 8, item, index,
                                           __shfl_sync(~0u, ref.page_variant.y, 0), lane);
                if (++slot == ITEM_SLOTS) {
                    slot = 0;
                    slot_parity ^= 1;
                }
            }
#pragma unroll 1
            for (; i < pages; i++) {
                page_send_in_turn<SHAPE, E4M3>(p, map, smem, &stage, &parity, ref,
                                               (int32_t)lane == i);
            }
        }
        if (item.next < 0) {
            return;
        }
        index = item.next;
        item = next;
    }
}

#endif
