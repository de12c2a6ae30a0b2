#include "common/base/kv_layout.h"

bool rk_kv_layout_valid(const struct rk_kv_layout *layout)
{
    return layout->num_layers >= 1 && layout->num_layers <= RK_LAYERS_MAX &&
           layout->num_kv_heads >= 1 && layout->num_kv_heads <= RK_KV_HEADS_MAX &&
           layout->head_dim >= 1 && layout->head_dim <= RK_HEAD_DIM_MAX &&
           (layout->dtype == RK_DTYPE_F32 || layout->dtype == RK_DTYPE_BF16);
}

bool rk_kv_layout_equal(const struct rk_kv_layout *a, const struct rk_kv_layout *b)
{
    return a->num_layers == b->num_layers && a->num_kv_heads == b->num_kv_heads &&
           a->head_dim == b->head_dim && a->dtype == b->dtype;
}

size_t rk_dtype_bytes(enum rk_dtype dtype)
{
    return dtype == RK_DTYPE_F32 ? 4 : 2;
}

size_t rk_kv_page_bytes(const struct rk_kv_layout *layout)
{
    return (size_t)2 * RK_PAGE_TOKENS * layout->head_dim * rk_dtype_bytes(layout->dtype);
}

uint32_t rk_kv_pages(uint32_t num_tokens)
{
    return num_tokens / RK_PAGE_TOKENS + (num_tokens % RK_PAGE_TOKENS != 0);
}

uint64_t rk_kv_pages_total(const struct rk_kv_layout *layout, uint32_t num_tokens)
{
    return (uint64_t)layout->num_layers * layout->num_kv_heads * rk_kv_pages(num_tokens);
}

bool rk_head_range_valid(const struct rk_head_range *range, const struct rk_kv_layout *layout)
{
    return range->layer_begin < range->layer_end && range->layer_end <= layout->num_layers &&
           range->kv_head_begin < range->kv_head_end && range->kv_head_end <= layout->num_kv_heads;
}

uint32_t rk_head_range_heads(const struct rk_head_range *range)
{
    return (range->layer_end - range->layer_begin) * (range->kv_head_end - range->kv_head_begin);
}
