/* Goal: no document makes the head map parser misbehave. What it accepts is complete. */
#include "worker/recovery/head_map.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct recovery_head_map *map = NULL;
    struct rk_error error = {0};

    if (recovery_head_map_parse((const char *)data, bytes, "fuzz", 2, 2, &map, &error) == RK_OK) {
        RK_ASSERT(recovery_head_map_global_heads(map) <= 4);
        recovery_head_map_destroy(map);
    } else {
        RK_ASSERT(map == NULL && error.text[0] != '\0');
    }
    return 0;
}
