/*
 * kv_layout: the shape of a model's KV cache, and of ranges of it.
 *
 * Canonical KV of a segment: pages of 64 tokens for each (layer, KV head);
 * a page is K[64][head_dim], then V[64][head_dim]. Keys are rotated at their
 * position inside the segment. The page in the store, on the wire and in a
 * worker's pool has the same bytes. All pure, any thread.
 */
#ifndef RK_COMMON_BASE_KV_LAYOUT_H
#define RK_COMMON_BASE_KV_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_PAGE_TOKENS 64

/* Limits that every parser of a layout applies; they keep all products below in 64 bits. */
#define RK_LAYERS_MAX         1024
#define RK_KV_HEADS_MAX       256
#define RK_HEAD_DIM_MAX       1024
#define RK_SEGMENT_TOKENS_MAX (1u << 22)

/* Values are those of redknot.v1.KvLayout.Dtype. */
enum rk_dtype { RK_DTYPE_F32 = 1, RK_DTYPE_BF16 = 2 };

struct rk_kv_layout {
    uint32_t num_layers;
    uint32_t num_kv_heads;
    uint32_t head_dim;
    enum rk_dtype dtype;
};

/* Pages [page_begin, page_end) of one (layer, KV head), head index global. */
struct rk_extent {
    uint32_t layer;
    uint32_t kv_head;
    uint32_t page_begin;
    uint32_t page_end;
};

/* Heads [layer_begin, layer_end) x [kv_head_begin, kv_head_end). */
struct rk_head_range {
    uint32_t layer_begin;
    uint32_t layer_end;
    uint32_t kv_head_begin;
    uint32_t kv_head_end;
};

bool rk_kv_layout_valid(const struct rk_kv_layout *layout);
bool rk_kv_layout_equal(const struct rk_kv_layout *a, const struct rk_kv_layout *b);
size_t rk_dtype_bytes(enum rk_dtype dtype);
size_t rk_kv_page_bytes(const struct rk_kv_layout *layout);
/* Pages of num_tokens tokens in one (layer, KV head): the last one may be part full. */
uint32_t rk_kv_pages(uint32_t num_tokens);
/* All pages of a segment: layers x heads x pages. */
uint64_t rk_kv_pages_total(const struct rk_kv_layout *layout, uint32_t num_tokens);
bool rk_head_range_valid(const struct rk_head_range *range, const struct rk_kv_layout *layout);
uint32_t rk_head_range_heads(const struct rk_head_range *range); /* (layer, head) pairs */

#ifdef __cplusplus
}
#endif

#endif
