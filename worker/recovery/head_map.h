/*
 * head_map: which KV heads see the whole context and which only a sink and a
 * window; read from the published JSON format (kv_head_classification,
 * kv_head_max_distance, kv_head_sink_size, num_layers, num_kv_heads,
 * dense_prefix_layers). The class decides; missing sink sizes fall back to
 * sink_size. Immutable after loading; any thread.
 */
#ifndef WORKER_RECOVERY_HEAD_MAP_H
#define WORKER_RECOVERY_HEAD_MAP_H

#include "common/base/status.h"

#include <stddef.h>
#include <stdint.h>

struct recovery_head_map;

/* window 0: the head is global. Visible to a query at t: c <= t and (c > t - window or c < sink).
 */
struct recovery_head {
    uint32_t window;
    uint32_t sink;
};

RK_MUST_CHECK enum rk_status recovery_head_map_load(const char *path, uint32_t num_layers,
                                                    uint32_t num_kv_heads,
                                                    struct recovery_head_map **ret_map,
                                                    struct rk_error *error);
/* name: for messages. */
RK_MUST_CHECK enum rk_status recovery_head_map_parse(const char *json, size_t bytes,
                                                     const char *name, uint32_t num_layers,
                                                     uint32_t num_kv_heads,
                                                     struct recovery_head_map **ret_map,
                                                     struct rk_error *error);
void recovery_head_map_destroy(struct recovery_head_map *map); /* accepts NULL */
struct recovery_head recovery_head_map_get(const struct recovery_head_map *map, uint32_t layer,
                                           uint32_t kv_head);
uint32_t recovery_head_map_global_heads(const struct recovery_head_map *map);

#endif
