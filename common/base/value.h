/*
 * value: limits of opaque values, which a store keeps beside shards.
 *
 * A value is bytes under a key, for engines that use RedKnot as their cache's second tier. Its
 * name on the wire is rk_id_value(key). It is stored and checked in pages of
 * RK_VALUE_PAGE_BYTES; the last one is shorter, and a value that is shorter is one page.
 */
#ifndef RK_COMMON_BASE_VALUE_H
#define RK_COMMON_BASE_VALUE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_VALUE_KEY_BYTES_MAX 256u
#define RK_VALUE_BYTES_MAX     (UINT64_C(1) << 30)
#define RK_VALUE_PAGE_BYTES    65536u

static inline uint32_t rk_value_page_bytes(uint64_t value_bytes)
{
    return value_bytes < RK_VALUE_PAGE_BYTES ? (uint32_t)value_bytes : RK_VALUE_PAGE_BYTES;
}

static inline uint64_t rk_value_pages(uint64_t value_bytes)
{
    return (value_bytes + RK_VALUE_PAGE_BYTES - 1) / RK_VALUE_PAGE_BYTES;
}

#ifdef __cplusplus
}
#endif

#endif
