/* Reading: pins, extents, the walk over what is held, and the scrubber. */
#include "kvstore/kvstore_internal.h"

#include "common/base/hash.h"
#include "common/base/log.h"

#include <string.h>

static uint64_t room_bytes(const struct kvstore_shard *shard)
{
    return (uint64_t)shard->granules * KVSTORE_GRANULE_BYTES;
}

static void pin_locked(struct kvstore *store, struct kvstore_shard *shard)
{
    if (shard->pins++ == 0) {
        kvstore_lru_take(store, shard);
        store->stats.pinned_bytes += room_bytes(shard);
    }
    store->stats.num_pins++;
}

/* RK_MISS_ABSENT, RK_MISS_EVICTED. */
static enum rk_status find_committed(struct kvstore *store, const struct kvstore_name *name,
                                     struct kvstore_shard **ret_shard)
{
    struct slot *slot = kvstore_slot_find(store, name);
    if (slot && slot->committed) {
        *ret_shard = slot->committed;
        return RK_OK;
    }
    struct slot_key key = kvstore_slot_key(name);
    return kvstore_evicted_seen(store, &key) ? RK_MISS_EVICTED : RK_MISS_ABSENT;
}

static void pin_found(struct kvstore *store, enum rk_status status, struct kvstore_shard *shard,
                      const struct kvstore_shard **ret_shard)
{
    store->stats.gets++;
    if (status == RK_OK) {
        pin_locked(store, shard);
        *ret_shard = shard;
    } else {
        store->stats.misses[status]++;
    }
}

enum rk_status kvstore_pin(struct kvstore *store, const struct kvstore_name *name,
                           const struct rk_id *fingerprint, const struct kvstore_shard **ret_shard)
{
    kvstore_lock(store);
    struct kvstore_shard *shard = NULL;
    enum rk_status status = find_committed(store, name, &shard);
    if (status == RK_OK && fingerprint && !rk_id_equal(fingerprint, &shard->header.fingerprint)) {
        status = RK_MISS_FINGERPRINT;
    } else if (status == RK_OK && shard->header.generation != name->generation) {
        status = RK_MISS_STALE_GENERATION;
    }
    pin_found(store, status, shard, ret_shard);
    kvstore_unlock(store);
    return status;
}

enum rk_status kvstore_pin_value(struct kvstore *store, const struct rk_id *id,
                                 const struct kvstore_shard **ret_shard)
{
    struct kvstore_shard *shard = NULL;
    kvstore_lock(store);
    const struct kvstore_name name = {.kind = KVSTORE_VALUE, .segment_id = *id};
    enum rk_status status =
        kvstore_values_doubted(store) ? RK_MISS_NODE_DOWN : find_committed(store, &name, &shard);
    pin_found(store, status, shard, ret_shard);
    kvstore_unlock(store);
    return status;
}

bool kvstore_has_value(struct kvstore *store, const struct rk_id *id)
{
    struct kvstore_shard *shard = NULL;
    kvstore_lock(store);
    const struct kvstore_name name = {.kind = KVSTORE_VALUE, .segment_id = *id};
    enum rk_status status = find_committed(store, &name, &shard);
    kvstore_unlock(store);
    return status == RK_OK;
}

void kvstore_unpin(struct kvstore *store, const struct kvstore_shard *pinned)
{
    struct kvstore_shard *shard = (struct kvstore_shard *)pinned;
    kvstore_lock(store);
    RK_ASSERT(shard->pins > 0);
    store->stats.num_pins--;
    if (--shard->pins == 0) {
        store->stats.pinned_bytes -= room_bytes(shard);
        if (shard->state == SHARD_COMMITTED) {
            kvstore_lru_add(store, shard); /* Its newest end. */
        } else {
            kvstore_shard_reap(store, shard);
        }
    }
    kvstore_unlock(store);
}

const struct kvstore_header *kvstore_shard_header(const struct kvstore_shard *shard)
{
    return &shard->header;
}

size_t kvstore_shard_page_bytes(const struct kvstore_shard *shard)
{
    return shard->page_bytes;
}

uint64_t kvstore_shard_pages(const struct kvstore_shard *shard)
{
    return shard->num_pages;
}

uint64_t kvstore_shard_bytes(const struct kvstore_shard *shard)
{
    return shard->bytes;
}

uint64_t kvstore_shard_seal(const struct kvstore_shard *shard, uint64_t *ret_index)
{
    *ret_index = shard->runs[0].granule_begin;
    return shard->seal;
}

size_t kvstore_shard_page_length(const struct kvstore_shard *shard, uint64_t page)
{
    uint64_t begin = page * shard->page_bytes;
    uint64_t left = shard->bytes - begin;
    return left < shard->page_bytes ? left : shard->page_bytes;
}

void kvstore_shard_page(const struct kvstore_shard *shard, uint64_t page, uint64_t *ret_offset,
                        uint64_t *ret_checksum)
{
    RK_ASSERT(page < shard->num_pages);
    uint32_t low = 0;
    uint32_t high = shard->num_runs;
    while (high - low > 1) { /* The last run that begins at or before page. */
        uint32_t middle = low + (high - low) / 2;
        if (shard->runs[middle].page_begin <= page) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const struct run *run = &shard->runs[low];
    *ret_offset = (uint64_t)run->granule_begin * KVSTORE_GRANULE_BYTES +
                  (page - run->page_begin) * shard->page_bytes;
    *ret_checksum = shard->checksums[page];
}

static bool extent_inside(const struct kvstore_shard *shard, const struct rk_extent *extent)
{
    const struct rk_head_range *heads = &shard->header.heads;
    return extent->layer >= heads->layer_begin && extent->layer < heads->layer_end &&
           extent->kv_head >= heads->kv_head_begin && extent->kv_head < heads->kv_head_end &&
           extent->page_begin < extent->page_end && extent->page_end <= shard->pages_per_head;
}

enum rk_status kvstore_shard_extents(const struct kvstore_shard *shard,
                                     const struct rk_extent *extents, size_t num_extents,
                                     uint64_t *ret_offsets, uint64_t *ret_checksums,
                                     uint64_t *num_pages, struct rk_error *error)
{
    const struct rk_head_range *heads = &shard->header.heads;
    uint32_t heads_wide = heads->kv_head_end - heads->kv_head_begin;
    uint64_t done = 0;
    if (num_extents == 0) {
        for (; done < shard->num_pages && done < *num_pages; done++) {
            kvstore_shard_page(shard, done, &ret_offsets[done], &ret_checksums[done]);
        }
        if (done < shard->num_pages) {
            goto too_long;
        }
    }
    for (size_t i = 0; i < num_extents; i++) {
        const struct rk_extent *extent = &extents[i];
        if (!extent_inside(shard, extent)) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "extent %zu (layer %u, KV head %u, pages %u to %u) is outside the "
                                "shard",
                                i, extent->layer, extent->kv_head, extent->page_begin,
                                extent->page_end);
        }
        uint64_t row = (uint64_t)(extent->layer - heads->layer_begin) * heads_wide +
                       (extent->kv_head - heads->kv_head_begin);
        if (extent->page_end - extent->page_begin > *num_pages - done) {
            goto too_long;
        }
        for (uint32_t page = extent->page_begin; page < extent->page_end; page++, done++) {
            kvstore_shard_page(shard, row * shard->pages_per_head + page, &ret_offsets[done],
                               &ret_checksums[done]);
        }
    }
    *num_pages = done;
    return RK_OK;

too_long:
    return rk_error_set(error, RK_ERR_TOO_LONG, "more than %llu pages in one read",
                        (unsigned long long)*num_pages);
}

enum rk_status kvstore_list(struct kvstore *store, struct kvstore_name **ret_names,
                            size_t *ret_num_names)
{
    size_t count = 0;
    kvstore_lock(store);
    struct kvstore_name *names = rk_alloc_zero(store->stats.num_shards, sizeof(*names));
    struct kvstore_shard *shard = names ? store->committed.head : NULL;
    for (; shard; shard = shard->all.next) {
        if (shard->header.kind != KVSTORE_SHARD) {
            continue;
        }
        names[count++] = (struct kvstore_name){.segment_id = shard->header.segment_id,
                                               .generation = shard->header.generation,
                                               .shard_index = shard->header.shard_index};
    }
    kvstore_unlock(store);
    if (!names) {
        return RK_ERR_NO_MEMORY;
    }
    *ret_names = names;
    *ret_num_names = count;
    return RK_OK;
}

enum rk_status kvstore_describe(struct kvstore *store, const struct kvstore_name *name,
                                struct kvstore_header **ret_header)
{
    struct kvstore_header *copy = NULL;
    RK_ASSERT(name->kind == KVSTORE_SHARD);
    kvstore_lock(store);
    struct slot *slot = kvstore_slot_find(store, name);
    struct kvstore_shard *shard = slot ? slot->committed : NULL;
    bool found = shard && shard->header.generation == name->generation;
    if (found) {
        const struct kvstore_header *header = &shard->header;
        size_t tokens_bytes = header->num_token_ids * sizeof(int32_t);
        size_t label_bytes = strlen(header->label) + 1;
        copy = rk_alloc(sizeof(*copy) + tokens_bytes + label_bytes);
        if (copy) {
            uint8_t *rest = (uint8_t *)(copy + 1);
            *copy = *header;
            copy->token_ids = tokens_bytes ? (const int32_t *)rest : NULL;
            copy->label = (const char *)(rest + tokens_bytes);
            if (tokens_bytes) {
                memcpy(rest, header->token_ids, tokens_bytes);
            }
            memcpy(rest + tokens_bytes, header->label, label_bytes);
        }
    }
    kvstore_unlock(store);
    if (!copy) {
        return found ? RK_ERR_NO_MEMORY : RK_ERR_NOT_FOUND;
    }
    *ret_header = copy;
    return RK_OK;
}

/* ---- Scrubber ---- */

static bool page_good(const struct kvstore *store, const struct kvstore_shard *shard, uint64_t page)
{
    uint64_t offset = 0;
    uint64_t checksum = 0;
    kvstore_shard_page(shard, page, &offset, &checksum);
    return rk_hash_xxh3(store->arena + offset, kvstore_shard_page_length(shard, page)) == checksum;
}

static void scrub_drop(struct kvstore *store, struct kvstore_shard *shard, uint64_t page)
{
    char hex[RK_ID_HEX_BYTES];
    rk_id_to_hex(&shard->header.segment_id, hex);
    RK_LOG_ERROR("page_corrupt", "segment=%s shard=%u generation=%llu page=%llu action=dropped",
                 hex, shard->header.shard_index, (unsigned long long)shard->header.generation,
                 (unsigned long long)page);
    kvstore_seal_break(store, shard); /* Also those who verified it before the damage. */
    kvstore_removed_note(store, shard);
    kvstore_shard_remove(store, shard);
}

/* Verifies the next pages of the round; 0 when nothing is committed. */
static uint64_t scrub_step(struct kvstore *store, uint64_t bytes_max)
{
    kvstore_lock(store);
    if (!store->scrub_next) {
        store->scrub_next = store->committed.head;
        store->scrub_page = 0;
    }
    struct kvstore_shard *shard = store->scrub_next;
    uint64_t page = store->scrub_page;
    /* Keeps it from eviction and release, but is not a pin: its age does not change. */
    store->scrubbing = shard;
    kvstore_unlock(store);
    if (!shard) {
        return 0;
    }
    bool good = true;
    uint64_t bytes = 0;
    for (; good && page < shard->num_pages && bytes < bytes_max; page++) {
        good = page_good(store, shard, page);
        bytes += shard->page_bytes;
    }
    kvstore_lock(store);
    store->scrubbing = NULL;
    store->stats.scrubbed_bytes += bytes;
    store->stats.checksum_failures += !good;
    if (shard->state != SHARD_COMMITTED) {
        kvstore_shard_reap(store, shard);
    } else if (!good) {
        scrub_drop(store, shard, page - 1);
    } else if (page == shard->num_pages) {
        store->scrub_next = shard->all.next;
        store->scrub_page = 0;
    } else {
        store->scrub_page = page;
    }
    kvstore_unlock(store);
    return bytes;
}

uint64_t kvstore_scrub(struct kvstore *store, uint64_t bytes_max)
{
    uint64_t done = 0;
    while (done < bytes_max) {
        uint64_t bytes = scrub_step(store, bytes_max - done);
        if (bytes == 0) {
            break;
        }
        done += bytes;
    }
    return done;
}

enum rk_status kvstore_fault_inject(struct kvstore *store, struct kvstore_name *ret_name,
                                    uint64_t *ret_offset)
{
    kvstore_lock(store);
    struct kvstore_shard *shard = store->committed.head;
    if (shard) {
        uint64_t checksum = 0;
        kvstore_shard_page(shard, 0, ret_offset, &checksum);
        store->arena[*ret_offset] ^= 0x01;
        *ret_name = (struct kvstore_name){.kind = shard->header.kind,
                                          .segment_id = shard->header.segment_id,
                                          .generation = shard->header.generation,
                                          .shard_index = shard->header.shard_index};
    }
    kvstore_unlock(store);
    return shard ? RK_OK : RK_ERR_NOT_FOUND;
}
