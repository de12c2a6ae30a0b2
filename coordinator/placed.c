#include "coordinator/placed.h"

#include <string.h>

static uint64_t placed_bytes(const struct placed *placed)
{
    return (uint64_t)placed->num_token_ids * sizeof(*placed->token_ids);
}

struct placed *placed_create(uint32_t num_shards, const uint32_t *token_ids, uint32_t num_token_ids,
                             const char *label)
{
    struct placed *placed =
        rk_alloc_zero(1, sizeof(*placed) + num_shards * sizeof(placed->shards[0]));

    if (placed == NULL) {
        return NULL;
    }
    placed->num_shards = num_shards;
    placed->label = rk_alloc_string(label);
    if (placed->label == NULL) {
        goto fail;
    }
    if (num_token_ids != 0) {
        placed->token_ids = rk_alloc_zero(num_token_ids, sizeof(*token_ids));
        if (placed->token_ids == NULL) {
            goto fail;
        }
        memcpy(placed->token_ids, token_ids, num_token_ids * sizeof(*token_ids));
        placed->num_token_ids = num_token_ids;
    }
    return placed;

fail:
    placed_destroy(placed);
    return NULL;
}

void placed_destroy(struct placed *placed)
{
    if (placed == NULL) {
        return;
    }
    for (uint32_t i = 0; i < placed->num_shards; i++) {
        rk_free(placed->shards[i].node_id);
        rk_free(placed->shards[i].address);
    }
    rk_free(placed->token_ids);
    rk_free(placed->label);
    rk_free(placed);
}

enum rk_status placed_add(struct placed_table *table, struct placed *placed)
{
    if (HASH_COUNT(table->by_generation) >= PLACED_MAX ||
        table->bytes + placed_bytes(placed) > PLACED_BYTES_MAX) {
        return RK_ERR_FULL;
    }
    HASH_ADD(hh, table->by_generation, generation, sizeof(placed->generation), placed);
    if (placed->hh.tbl == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    DL_APPEND(table->oldest, placed);
    table->bytes += placed_bytes(placed);
    return RK_OK;
}

struct placed *placed_find(const struct placed_table *table, const struct rk_id *id,
                           uint64_t generation)
{
    struct placed *placed = NULL;

    HASH_FIND(hh, table->by_generation, &generation, sizeof(generation), placed);
    return placed != NULL && rk_id_equal(&placed->id, id) ? placed : NULL;
}

void placed_shard_removed(const struct placed_table *table, const struct rk_id *id,
                          uint64_t generation, uint32_t shard_index, const char *node_id,
                          uint64_t incarnation)
{
    struct placed *placed = placed_find(table, id, generation);

    if (placed != NULL && shard_index < placed->num_shards &&
        placed->shards[shard_index].incarnation == incarnation &&
        strcmp(placed->shards[shard_index].node_id, node_id) == 0) {
        placed->shards[shard_index].removed = true;
    }
}

void placed_take(struct placed_table *table, struct placed *placed)
{
    RK_ASSERT(table->by_generation != NULL && table->oldest != NULL);
    HASH_DELETE(hh, table->by_generation, placed);
    DL_DELETE(table->oldest, placed);
    table->bytes -= placed_bytes(placed);
}

struct placed *placed_take_expired(struct placed_table *table, int64_t before_ns)
{
    struct placed *placed;

    DL_FOREACH (table->oldest, placed) {
        if (placed->placed_ns >= before_ns) {
            return NULL;
        }
        if (!placed->committing) {
            placed_take(table, placed);
            return placed;
        }
    }
    return NULL;
}

void placed_clear(struct placed_table *table)
{
    struct placed *placed;
    struct placed *next;

    DL_FOREACH_SAFE(table->oldest, placed, next)
    {
        placed_take(table, placed);
        placed_destroy(placed);
    }
}
