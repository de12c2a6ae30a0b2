#include "client/kv_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <string.h>

/* What one shard served; a get holds one of these per shard asked. */
struct hold_part {
    struct rk_kv_connection *connection;
    struct rk_pages pages;
    enum rk_path path;
    uint64_t next; /* of pages, while they are put in order */
};

struct hold {
    uint32_t count;
    struct hold_part parts[];
};

static bool heads_contain(const struct rk_head_range *heads, const struct rk_extent *extent)
{
    return extent->layer >= heads->layer_begin && extent->layer < heads->layer_end &&
           extent->kv_head >= heads->kv_head_begin && extent->kv_head < heads->kv_head_end;
}

static void hold_release(struct rk_kv_client *client, struct hold *hold)
{
    if (!hold) {
        return;
    }
    uint32_t count = rk_is_copy(client->maker) ? 0 : hold->count;
    for (uint32_t i = 0; i < count; i++) {
        rk_kv_pool_release(client->pool, hold->parts[i].connection, &hold->parts[i].pages, 1);
    }
    rk_free(hold);
}

/* Which shard serves each extent: the first one of the list that has its head, as an index into
 * shards. Replicas of a shard repeat its shard_index behind it. */
static enum rk_status extents_assign(const struct rk_kv_shards *shards,
                                     const struct rk_extent *extents, size_t num_extents,
                                     uint32_t *owners)
{
    uint32_t guess = 0;
    for (size_t i = 0; i < num_extents; i++) {
        if (!heads_contain(&shards->shards[guess].heads, &extents[i])) {
            for (guess = 0; guess < shards->count; guess++) {
                if (heads_contain(&shards->shards[guess].heads, &extents[i])) {
                    break;
                }
            }
            if (guess == shards->count) {
                return RK_MISS_ABSENT;
            }
        }
        /* The first of the replicas, so that extents of one shard share one read. */
        uint32_t first = guess;
        for (uint32_t j = 0; j < guess; j++) {
            if (shards->shards[j].shard_index == shards->shards[guess].shard_index &&
                heads_contain(&shards->shards[j].heads, &extents[i])) {
                first = j;
                break;
            }
        }
        owners[i] = guess = first;
    }
    return RK_OK;
}

static enum rk_status check_extents(const struct rk_kv_layout *layout, uint32_t num_tokens,
                                    const struct rk_extent *extents, size_t num_extents,
                                    uint64_t *ret_num_pages, struct rk_error *error)
{
    uint32_t pages = rk_kv_pages(num_tokens);
    uint64_t total = 0;
    for (size_t i = 0; i < num_extents; i++) {
        const struct rk_extent *extent = &extents[i];
        if (extent->layer >= layout->num_layers || extent->kv_head >= layout->num_kv_heads ||
            extent->page_begin >= extent->page_end || extent->page_end > pages) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "extent %zu asks for layer %u, KV head %u, pages [%u, %u) of a "
                                "segment of %u layers, %u KV heads, %u pages",
                                i, extent->layer, extent->kv_head, extent->page_begin,
                                extent->page_end, layout->num_layers, layout->num_kv_heads, pages);
        }
        total += extent->page_end - extent->page_begin;
    }
    *ret_num_pages = total;
    return RK_OK;
}

enum rk_status rk_kv_as_miss(enum rk_status status)
{
    if (status == RK_ERR_UNAVAILABLE) {
        return RK_MISS_NODE_DOWN;
    }
    return status == RK_ERR_DEADLINE ? RK_MISS_DEADLINE : status;
}

/* Asks the shard, then its replicas while nodes are down. */
static enum rk_status shard_get(struct rk_kv_client *client, const struct rk_kv_shards *shards,
                                uint32_t shard, struct rk_get *get, const struct rk_until *until,
                                struct hold_part *ret_part, struct rk_error *error)
{
    enum rk_status status = RK_MISS_NODE_DOWN;
    for (uint32_t i = shard; i < shards->count; i++) {
        const struct rk_kv_shard *replica = &shards->shards[i];
        if (replica->shard_index != shards->shards[shard].shard_index) {
            continue;
        }
        struct hold_part part = {.connection = NULL};
        get->generation = replica->generation;
        get->shard_index = replica->shard_index;
        status = rk_kv_pool_get(client->pool, &replica->endpoint, get, 1, until, &part.pages,
                                &part.path, &part.connection, error);
        if (status == RK_OK && part.pages.status == RK_OK) {
            *ret_part = part;
            return RK_OK;
        }
        if (status == RK_OK) {
            status = part.pages.status;
            rk_kv_pool_release(client->pool, part.connection, &part.pages, 1);
        }
        status = rk_kv_as_miss(status);
        if (status == RK_ERR_CANCELLED || rk_until_over(until) != RK_OK) {
            return status;
        }
    }
    return status;
}

/* owners[i] == shard: extent i is read from there. mine has room for all extents. */
static enum rk_status get_owned(struct rk_kv_client *client, const struct rk_kv_shards *shards,
                                uint32_t shard, const struct rk_extent *extents, size_t num_extents,
                                const uint32_t *owners, struct rk_extent *mine, struct rk_get *get,
                                const struct rk_until *until, struct hold_part *ret_part,
                                struct rk_error *error)
{
    size_t count = 0;
    for (size_t i = 0; i < num_extents; i++) {
        if (owners[i] == shard) {
            mine[count++] = extents[i];
        }
    }
    get->extents = mine;
    get->num_extents = count;
    return shard_get(client, shards, shard, get, until, ret_part, error);
}

/* Asks every shard that owns an extent; slots[shard] becomes its index in hold->parts. */
static enum rk_status get_all(struct rk_kv_client *client, const struct rk_kv_shards *shards,
                              const struct rk_extent *extents, size_t num_extents,
                              const uint32_t *owners, uint32_t *slots, struct rk_get *get,
                              const struct rk_until *until, struct hold *hold,
                              struct rk_error *error)
{
    struct rk_extent *mine = rk_alloc_zero(num_extents, sizeof(*mine));
    if (!mine) {
        return RK_ERR_NO_MEMORY;
    }
    enum rk_status status = RK_OK;
    for (uint32_t i = 0; i < shards->count; i++) {
        slots[i] = UINT32_MAX;
    }
    for (size_t i = 0; i < num_extents && status == RK_OK; i++) {
        if (slots[owners[i]] != UINT32_MAX) {
            continue;
        }
        status = get_owned(client, shards, owners[i], extents, num_extents, owners, mine, get,
                           until, &hold->parts[hold->count], error);
        if (status == RK_OK) {
            slots[owners[i]] = hold->count++;
        }
    }
    rk_free(mine);
    return status;
}

/* Pages of the shards, each in the order of its own extents, into the order of all extents. */
static void gather(const struct rk_extent *extents, size_t num_extents, const uint32_t *owners,
                   const uint32_t *slots, struct hold *hold, struct rk_kv_pages *pages)
{
    uint64_t at = 0;
    for (size_t i = 0; i < num_extents; i++) {
        struct hold_part *part = &hold->parts[slots[owners[i]]];
        uint64_t count = extents[i].page_end - extents[i].page_begin;
        memcpy(&pages->pages[at], &part->pages.pages[part->next], count * sizeof(struct rk_page));
        part->next += count;
        at += count;
    }
    for (uint32_t i = 0; i < hold->count; i++) { /* The farthest of several is what it cost. */
        const struct rk_pages *from = &hold->parts[i].pages;
        pages->bytes += from->bytes;
        enum rk_path path = hold->parts[i].path;
        pages->path = path > pages->path ? path : pages->path;
        pages->tier = from->tier > pages->tier ? from->tier : pages->tier;
    }
}

static enum rk_status check_location(const struct rk_kv_location *location,
                                     const struct rk_id *fingerprint,
                                     const struct rk_kv_layout *layout)
{
    const struct rk_kv_shards *shards = location->shards;
    if (location->status != RK_OK) {
        return location->status;
    }
    if (!shards || shards->count == 0) {
        return RK_MISS_ABSENT;
    }
    if (!rk_id_equal(fingerprint, &shards->fingerprint)) {
        return RK_MISS_FINGERPRINT;
    }
    for (uint32_t i = 0; i < shards->count; i++) {
        if (!rk_kv_layout_equal(layout, &shards->shards[i].layout)) {
            return RK_MISS_FINGERPRINT;
        }
    }
    return RK_OK;
}

enum rk_status rk_kv_get(struct rk_kv_client *client, const struct rk_id *fingerprint,
                         const struct rk_kv_layout *layout, const struct rk_kv_location *location,
                         const struct rk_extent *extents, size_t num_extents,
                         const struct rk_until *until, struct rk_kv_pages *ret_pages,
                         struct rk_error *error)
{
    if (rk_is_copy(client->maker)) {
        return rk_copy_refuse(error);
    }
    enum rk_status status = check_location(location, fingerprint, layout);
    if (status != RK_OK) {
        return rk_error_set(error, status, "%s", rk_status_text(status));
    }
    struct rk_kv_pages pages = {.num_pages = 0};
    status =
        check_extents(layout, location->num_tokens, extents, num_extents, &pages.num_pages, error);
    if (status != RK_OK || num_extents == 0) {
        if (status == RK_OK) {
            *ret_pages = pages;
        }
        return status;
    }

    const struct rk_kv_shards *shards = location->shards;
    uint32_t *owners = rk_alloc_zero(num_extents, sizeof(*owners));
    uint32_t *slots = rk_alloc_zero(shards->count, sizeof(*slots));
    struct hold *hold = rk_alloc_zero(1, sizeof(*hold) + shards->count * sizeof(struct hold_part));
    pages.pages = rk_alloc_zero(pages.num_pages, sizeof(*pages.pages));
    struct rk_get get = {.id = location->segment_id,
                         .fingerprint = *fingerprint,
                         .page_bytes = (uint32_t)rk_kv_page_bytes(layout)};
    if (!owners || !slots || !hold || !pages.pages) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "reading pages: out of memory");
        goto fail;
    }
    status = extents_assign(shards, extents, num_extents, owners);
    if (status == RK_OK) {
        status =
            get_all(client, shards, extents, num_extents, owners, slots, &get, until, hold, error);
    }
    if (status != RK_OK) {
        goto fail;
    }
    gather(extents, num_extents, owners, slots, hold, &pages);
    pages.hold = hold;
    *ret_pages = pages;
    rk_free(owners);
    rk_free(slots);
    return RK_OK;

fail:
    hold_release(client, hold);
    rk_free(pages.pages);
    rk_free(owners);
    rk_free(slots);
    return status;
}

enum rk_status rk_kv_pages_check(const struct rk_kv_client *client, const struct rk_kv_pages *pages)
{
    const struct hold *hold = pages->hold;
    enum rk_status status = RK_OK;
    for (uint32_t i = 0; hold && status == RK_OK && i < hold->count; i++) {
        status = rk_kv_pool_check(client->pool, hold->parts[i].connection, &hold->parts[i].pages);
    }
    return status;
}

void rk_kv_release(struct rk_kv_client *client, struct rk_kv_pages *pages)
{
    hold_release(client, pages->hold);
    rk_free(pages->pages);
    memset(pages, 0, sizeof(*pages));
}
