/* Writing: begin, pages, seal, commit, and the ends that are not a commit. */
#include "kvstore/kvstore_internal.h"

#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/value.h"

#include <string.h>

/* ---- Begin ---- */

static enum rk_status value_check(const struct kvstore_header *header, struct rk_error *error)
{
    if (header->key_bytes == 0 || header->key_bytes > RK_VALUE_KEY_BYTES_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a key has 1 to %u bytes, not %u",
                            RK_VALUE_KEY_BYTES_MAX, header->key_bytes);
    }
    if (header->value_bytes == 0 || header->value_bytes > RK_VALUE_BYTES_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a value has 1 to %llu bytes, not %llu",
                            (unsigned long long)RK_VALUE_BYTES_MAX,
                            (unsigned long long)header->value_bytes);
    }
    return RK_OK;
}

static enum rk_status header_check(const struct kvstore_header *header, struct rk_error *error)
{
    const char *wrong = NULL;
    if (header->kind == KVSTORE_VALUE) {
        return value_check(header, error);
    }
    if (!rk_kv_layout_valid(&header->layout)) {
        wrong = "the KV layout is out of range";
    } else if (!rk_head_range_valid(&header->heads, &header->layout)) {
        wrong = "the head range is empty or outside the layout";
    } else if (header->num_tokens == 0 || header->num_tokens > RK_SEGMENT_TOKENS_MAX) {
        wrong = "the number of tokens is out of range";
    } else if (header->num_token_ids != 0 && header->num_token_ids != header->num_tokens) {
        wrong = "token ids must be absent or one per token";
    } else if (header->shard_index >= header->num_shards ||
               header->num_shards > KVSTORE_SHARDS_PER_SEGMENT_MAX) {
        wrong = "the shard index is out of range";
    } else if (header->generation == 0 || header->generation >= KVSTORE_GENERATION_MAX) {
        wrong = "the generation is none that a coordinator hands out";
    }
    return wrong ? rk_error_set(error, RK_ERR_INVALID, "%s", wrong) : RK_OK;
}

/* Sizes in pages and bytes; all factors are bounded by header_check. */
static void shard_measure(const struct kvstore_header *header, struct kvstore_shard *shard)
{
    if (header->kind == KVSTORE_VALUE) {
        shard->page_bytes = rk_value_page_bytes(header->value_bytes);
        shard->num_pages = rk_value_pages(header->value_bytes);
        shard->bytes = header->value_bytes;
        return;
    }
    shard->page_bytes = rk_kv_page_bytes(&header->layout);
    shard->pages_per_head = rk_kv_pages(header->num_tokens);
    shard->num_pages = (uint64_t)rk_head_range_heads(&header->heads) * shard->pages_per_head;
    shard->bytes = shard->num_pages * shard->page_bytes;
}

uint64_t kvstore_header_bytes(const struct kvstore_header *header, uint32_t *ret_page_bytes)
{
    struct kvstore_shard size = {.bytes = 0};
    /* A value that cannot be stored still says how many bytes of it there are. */
    if (header->kind == KVSTORE_VALUE ? header->value_bytes > 0
                                      : header_check(header, NULL) == RK_OK) {
        shard_measure(header, &size);
    }
    *ret_page_bytes = (uint32_t)size.page_bytes;
    return size.bytes;
}

/* The names that the store makes itself. */
static bool value_name(const struct kvstore_header *header, struct kvstore_shard *shard)
{
    uint8_t *key = rk_alloc(header->key_bytes);
    if (!key) {
        return false;
    }
    memcpy(key, header->key, header->key_bytes);
    shard->header.key = key;
    shard->header.segment_id = rk_id_value(header->key, header->key_bytes);
    return true;
}

/* An own copy of the header and room for the checksums; no pages yet. */
static struct kvstore_shard *shard_make(const struct kvstore_header *header)
{
    struct kvstore_shard *shard = rk_alloc_zero(1, sizeof(*shard));
    if (!shard) {
        return NULL;
    }
    shard->header = *header;
    shard->header.token_ids = NULL;
    shard->header.label = NULL;
    shard->header.key = NULL;
    shard_measure(header, shard);
    shard->checksums = rk_alloc(shard->num_pages * sizeof(uint64_t));
    bool named = header->kind != KVSTORE_VALUE || value_name(header, shard);

    size_t label_bytes = header->label ? strnlen(header->label, KVSTORE_LABEL_MAX) : 0;
    char *label = rk_alloc(label_bytes + 1);
    if (label) {
        memcpy(label, header->label ? header->label : "", label_bytes);
        label[label_bytes] = '\0';
        shard->header.label = label;
    }
    int32_t *token_ids = NULL;
    if (header->num_token_ids > 0) {
        token_ids = rk_alloc(header->num_token_ids * sizeof(int32_t));
        if (token_ids) {
            memcpy(token_ids, header->token_ids, header->num_token_ids * sizeof(int32_t));
        }
        shard->header.token_ids = token_ids;
    }
    if (!named || !shard->checksums || !label || (header->num_token_ids > 0 && !token_ids)) {
        kvstore_shard_free(shard);
        return NULL;
    }
    return shard;
}

static void runs_release(struct kvstore *store, struct kvstore_shard *shard)
{
    for (uint32_t i = 0; i < shard->num_runs; i++) {
        space_free(store->space, shard->runs[i].granule_begin, shard->runs[i].granules);
    }
    shard->num_runs = 0;
    shard->granules = 0;
}

static uint32_t granules_for(uint64_t bytes)
{
    return (uint32_t)((bytes + KVSTORE_GRANULE_BYTES - 1) / KVSTORE_GRANULE_BYTES);
}

/* As few runs as the free extents allow. RK_ERR_FULL: no extent holds one more page. */
static enum rk_status runs_take(struct kvstore *store, struct kvstore_shard *shard)
{
    uint32_t room = 0;
    for (uint64_t page = 0; page < shard->num_pages;) {
        uint64_t left = shard->num_pages - page;
        uint32_t begin = 0;
        uint32_t want = granules_for(left * shard->page_bytes);
        uint32_t count = space_alloc(store->space, want, granules_for(shard->page_bytes), &begin);
        if (count == 0) {
            runs_release(store, shard);
            return RK_ERR_FULL;
        }
        uint64_t fit = (uint64_t)count * KVSTORE_GRANULE_BYTES / shard->page_bytes;
        uint64_t pages = fit < left ? fit : left;
        uint32_t used = granules_for(pages * shard->page_bytes);
        if (used < count) {
            space_free(store->space, begin + used, count - used);
        }
        if (shard->num_runs == room) {
            uint32_t more = room ? room * 2 : 4;
            struct run *runs = rk_alloc_resize(shard->runs, more, sizeof(*runs));
            if (!runs) {
                space_free(store->space, begin, used);
                runs_release(store, shard);
                return RK_ERR_NO_MEMORY;
            }
            shard->runs = runs;
            room = more;
        }
        shard->runs[shard->num_runs++] =
            (struct run){.page_begin = page, .granule_begin = begin, .granules = used};
        shard->granules += used;
        page += pages;
    }
    return RK_OK;
}

/* Evicts only when that can work: a put that cannot fit must not empty the store. */
static enum rk_status make_room(struct kvstore *store, struct kvstore_shard *shard,
                                struct rk_error *error)
{
    uint64_t need = granules_for(shard->num_pages * shard->page_bytes);
    struct kvstore_stats *stats = &store->stats;
    if (need > space_free_granules(store->space) + store->evictable_granules) {
        return rk_error_set(error, RK_ERR_FULL,
                            "the shard needs %llu KiB; what is free and not in use is less",
                            (unsigned long long)(need * KVSTORE_GRANULE_BYTES / 1024));
    }
    while (stats->num_shards + stats->num_values + stats->num_staged >= store->options.shards_max) {
        if (!kvstore_evict_one(store)) {
            return rk_error_set(error, RK_ERR_FULL,
                                "%u shards and values are held, the configured maximum",
                                store->options.shards_max);
        }
    }
    for (;;) {
        enum rk_status status = RK_ERR_FULL;
        if (space_free_granules(store->space) >= need) {
            status = runs_take(store, shard);
        }
        if (status == RK_OK) {
            return RK_OK;
        }
        if (status != RK_ERR_FULL) {
            return rk_error_set(error, status, "no memory for a shard's runs");
        }
        if (!kvstore_evict_one(store)) {
            return rk_error_set(error, RK_ERR_FULL, "what is free is too fragmented");
        }
    }
}

static enum rk_status value_exists(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_EXISTS, "a value is stored under this key");
}

/* An earlier attempt of the same generation gives way, unless it is still being written. */
static enum rk_status begin_check_slot(struct kvstore *store, const struct kvstore_shard *shard,
                                       const struct kvstore_name *name, struct rk_error *error)
{
    struct slot *slot = kvstore_slot_find(store, name);
    if (shard->header.kind == KVSTORE_VALUE && kvstore_values_doubted(store)) {
        return rk_error_set(
            error, RK_ERR_UNAVAILABLE,
            "the coordinator has not answered this store for a while, and clients may "
            "have gone on without it: try again in a moment");
    }
    if (shard->header.kind == KVSTORE_VALUE) {
        return slot && slot->committed ? value_exists(error) : RK_OK;
    }
    if (slot && slot->committed && slot->committed->header.generation >= name->generation) {
        return rk_error_set(error, RK_ERR_EXISTS, "generation %llu is committed here",
                            (unsigned long long)slot->committed->header.generation);
    }
    struct kvstore_shard *staged = kvstore_staged_find(store, name);
    if (staged && staged->writer) {
        return rk_error_set(error, RK_ERR_BUSY, "this shard is being written");
    }
    if (staged) {
        kvstore_shard_remove(store, staged);
    }
    return RK_OK;
}

static struct slot *slot_get(struct kvstore *store, const struct kvstore_name *name)
{
    struct slot *slot = kvstore_slot_find(store, name);
    if (slot) {
        return slot;
    }
    slot = rk_alloc_zero(1, sizeof(*slot));
    if (!slot) {
        return NULL;
    }
    slot->key = kvstore_slot_key(name);
    HASH_ADD(hh, store->slots, key, sizeof(slot->key), slot);
    if (!slot->hh.tbl) {
        rk_free(slot);
        return NULL;
    }
    return slot;
}

static struct kvstore_name shard_name(const struct kvstore_shard *shard)
{
    return (struct kvstore_name){.kind = shard->header.kind,
                                 .segment_id = shard->header.segment_id,
                                 .generation = shard->header.generation,
                                 .shard_index = shard->header.shard_index};
}

static enum rk_status begin_locked(struct kvstore *store, struct kvstore_shard *shard,
                                   struct rk_error *error)
{
    if (shard->header.kind == KVSTORE_VALUE) {
        shard->header.generation = ++store->value_generation;
    }
    struct kvstore_name name = shard_name(shard);
    enum rk_status status = begin_check_slot(store, shard, &name, error);
    if (status == RK_OK) {
        status = make_room(store, shard, error);
    }
    if (status != RK_OK) {
        return status;
    }
    /* After the evictions, which may have freed this very slot. */
    struct slot *slot = slot_get(store, &name);
    if (!slot) {
        runs_release(store, shard);
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the shard table");
    }
    shard->writer = true;
    shard->touched_ns = rk_clock_ns();
    kvstore_staged_add(store, slot, shard);
    return RK_OK;
}

enum rk_status kvstore_put_begin(struct kvstore *store, const struct kvstore_header *header,
                                 struct kvstore_put **ret_put, struct rk_error *error)
{
    enum rk_status status = header_check(header, error);
    if (status != RK_OK) {
        return status;
    }
    struct kvstore_shard size = {.bytes = 0};
    shard_measure(header, &size);
    /* Before anything of that size is allocated. */
    if (size.bytes > store->options.dram_bytes) {
        return rk_error_set(error, RK_ERR_FULL, "the %s is larger than the whole store",
                            header->kind == KVSTORE_VALUE ? "value" : "shard");
    }
    struct kvstore_shard *shard = shard_make(header);
    struct kvstore_put *put = rk_alloc_zero(1, sizeof(*put));
    if (!shard || !put) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a shard");
        goto fail;
    }
    kvstore_lock(store);
    status = begin_locked(store, shard, error);
    kvstore_unlock(store);
    if (status != RK_OK) {
        goto fail;
    }
    *put = (struct kvstore_put){.store = store, .shard = shard};
    *ret_put = put;
    return RK_OK;

fail:
    kvstore_shard_free(shard);
    rk_free(put);
    return status;
}

/* ---- Pages ---- */

/* The bytes are hashed where they will be read, so that what was checked is what is kept. */
static bool copy_bytes(struct kvstore_put *put, const uint8_t *data, size_t bytes,
                       const uint64_t *checksums)
{
    struct kvstore_shard *shard = put->shard;
    uint64_t page = put->pages_done;
    uint64_t filled = put->bytes_done - page * shard->page_bytes;
    while (bytes > 0) {
        uint64_t offset = 0;
        uint64_t unset = 0;
        size_t length = kvstore_shard_page_length(shard, page);
        size_t count = bytes < length - filled ? bytes : length - filled;
        kvstore_shard_page(shard, page, &offset, &unset);
        uint8_t *place = put->store->arena + offset;
        memcpy(place + filled, data, count);
        data += count;
        bytes -= count;
        filled += count;
        if (filled == length) {
            shard->checksums[page] = *checksums++;
            if (rk_hash_xxh3(place, length) != shard->checksums[page]) {
                return false;
            }
            page++;
            filled = 0;
        }
    }
    return true;
}

/* Pages that are whole when so many bytes have come. */
static uint64_t pages_within(const struct kvstore_shard *shard, uint64_t bytes)
{
    return bytes == shard->bytes ? shard->num_pages : bytes / shard->page_bytes;
}

static enum rk_status put_gone(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_CANCELLED, "the put was aborted or took too long");
}

enum rk_status kvstore_put_write(struct kvstore_put *put, const void *data, size_t bytes,
                                 const uint64_t *checksums, size_t num_checksums,
                                 struct rk_error *error)
{
    struct kvstore *store = put->store;
    struct kvstore_shard *shard = put->shard;
    uint64_t left = shard->bytes - put->bytes_done;
    uint64_t pages =
        bytes <= left ? pages_within(shard, put->bytes_done + bytes) - put->pages_done : 0;
    bool fits = bytes <= left && num_checksums == pages;
    kvstore_lock(store);
    bool open = shard->state == SHARD_WRITING;
    if (open && !fits) {
        kvstore_shard_remove(store, shard);
    } else if (open) {
        shard->pins++; /* Keeps the room while bytes are copied into it. */
        shard->touched_ns = rk_clock_ns();
    }
    kvstore_unlock(store);
    if (!open) {
        return put_gone(error);
    }
    if (!fits) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%zu bytes with %zu checksums: %llu bytes are to come, and %llu pages "
                            "end in these",
                            bytes, num_checksums, (unsigned long long)left,
                            (unsigned long long)pages);
    }
    bool good = copy_bytes(put, data, bytes, checksums);

    kvstore_lock(store);
    shard->pins--;
    open = shard->state == SHARD_WRITING;
    if (!open) {
        kvstore_shard_reap(store, shard);
    } else if (!good) {
        store->stats.checksum_failures++;
        store->stats.put_checksum_failures++;
        kvstore_shard_remove(store, shard);
    } else {
        store->stats.put_bytes += bytes;
        put->pages_done += pages;
        put->bytes_done += bytes;
    }
    kvstore_unlock(store);
    if (!good) {
        return rk_error_set(error, RK_ERR_CORRUPT, "a page does not match its checksum");
    }
    return open ? RK_OK : put_gone(error);
}

enum rk_status kvstore_put_seal(struct kvstore_put *put, struct rk_error *error)
{
    struct kvstore *store = put->store;
    struct kvstore_shard *shard = put->shard;
    bool whole = put->bytes_done == shard->bytes;
    kvstore_lock(store);
    bool open = shard->state == SHARD_WRITING;
    if (open && whole) {
        shard->state = SHARD_SEALED;
        shard->touched_ns = rk_clock_ns();
    } else if (open) {
        kvstore_shard_remove(store, shard);
    }
    kvstore_unlock(store);
    if (!open) {
        return put_gone(error);
    }
    if (!whole) {
        return rk_error_set(error, RK_ERR_INVALID, "%llu of %llu pages were written",
                            (unsigned long long)put->pages_done,
                            (unsigned long long)shard->num_pages);
    }
    return RK_OK;
}

enum rk_status kvstore_put_commit(struct kvstore_put *put, struct rk_error *error)
{
    struct kvstore_name name = shard_name(put->shard);
    enum rk_status status = kvstore_put_seal(put, error);
    return status == RK_OK ? kvstore_commit(put->store, &name, error) : status;
}

enum kvstore_kind kvstore_put_kind(const struct kvstore_put *put)
{
    return put->shard->header.kind;
}

void kvstore_put_destroy(struct kvstore_put *put)
{
    if (!put) {
        return;
    }
    struct kvstore *store = put->store;
    struct kvstore_shard *shard = put->shard;
    kvstore_lock(store);
    shard->writer = false;
    if (shard->state == SHARD_WRITING) {
        kvstore_shard_remove(store, shard);
    } else {
        kvstore_shard_reap(store, shard);
    }
    kvstore_unlock(store);
    rk_free(put);
}

/* ---- Commit and the other ends ---- */

enum rk_status kvstore_commit(struct kvstore *store, const struct kvstore_name *name,
                              struct rk_error *error)
{
    enum rk_status status = RK_OK;
    kvstore_lock(store);
    struct slot *slot = kvstore_slot_find(store, name);
    struct kvstore_shard *old = slot ? slot->committed : NULL;
    struct kvstore_shard *fresh = kvstore_staged_find(store, name);
    if (old && old->header.generation == name->generation) {
        goto done; /* A repeated commit, such as after a lost reply. */
    }
    if (old && fresh && fresh->header.kind == KVSTORE_VALUE) {
        kvstore_shard_remove(store, fresh); /* Another writer was first. */
        status = value_exists(error);
        goto done;
    }
    if (old && old->header.generation > name->generation) {
        status = rk_error_set(error, RK_ERR_EXISTS, "a newer generation, %llu, is committed here",
                              (unsigned long long)old->header.generation);
        if (fresh) {
            kvstore_shard_remove(store, fresh);
        }
        goto done;
    }
    if (!fresh || fresh->state != SHARD_SEALED) {
        status = rk_error_set(error, RK_ERR_NOT_FOUND, "%s",
                              fresh ? "the shard is not written to its end"
                                    : "no such shard is staged here");
        goto done;
    }
    if (old) {
        /* Told as well: the fresh one may be undone, and then this one is not there either. */
        kvstore_removed_note(store, old);
        kvstore_shard_remove(store, old); /* The staged one keeps their slot. */
    }
    kvstore_staged_take(store, fresh);
    kvstore_committed_add(store, fresh);
    kvstore_evicted_note(store, &fresh->slot->key, false);

done:
    kvstore_unlock(store);
    return status;
}

enum rk_status kvstore_abort(struct kvstore *store, const struct kvstore_name *name)
{
    kvstore_lock(store);
    struct kvstore_shard *shard = kvstore_staged_find(store, name);
    if (shard) {
        kvstore_shard_remove(store, shard);
    }
    kvstore_unlock(store);
    return shard ? RK_OK : RK_ERR_NOT_FOUND;
}

enum rk_status kvstore_drop(struct kvstore *store, const struct kvstore_name *name)
{
    enum rk_status status = RK_ERR_NOT_FOUND;
    kvstore_lock(store);
    struct kvstore_shard *staged = kvstore_staged_find(store, name);
    if (staged) {
        kvstore_shard_remove(store, staged);
        status = RK_OK;
    }
    struct slot *slot = kvstore_slot_find(store, name);
    struct kvstore_shard *held = slot ? slot->committed : NULL;
    if (held && (name->generation == 0 || held->header.generation == name->generation)) {
        kvstore_evicted_note(store, &slot->key, false);
        kvstore_removed_note(store, held);
        kvstore_shard_remove(store, held);
        status = RK_OK;
    }
    kvstore_unlock(store);
    return status;
}

uint64_t kvstore_values_forget(struct kvstore *store)
{
    uint64_t forgotten = 0;
    kvstore_lock(store);
    for (struct kvstore_shard *shard = store->staged.head, *next = NULL; shard; shard = next) {
        next = shard->all.next;
        if (shard->header.kind == KVSTORE_VALUE) {
            kvstore_shard_remove(store, shard);
        }
    }
    for (struct kvstore_shard *shard = store->committed.head, *next = NULL; shard; shard = next) {
        next = shard->all.next;
        if (shard->header.kind == KVSTORE_VALUE) {
            kvstore_removed_note(store, shard);
            kvstore_shard_remove(store, shard);
            forgotten++;
        }
    }
    kvstore_unlock(store);
    return forgotten;
}

uint32_t kvstore_collect(struct kvstore *store, int64_t now_ns)
{
    uint32_t collected = 0;
    int64_t ttl_ns = (int64_t)store->options.staged_ttl_ms * 1000000;
    kvstore_lock(store);
    struct kvstore_shard *shard = store->staged.head;
    while (shard) {
        struct kvstore_shard *next = shard->all.next;
        if (now_ns - shard->touched_ns > ttl_ns) {
            kvstore_shard_remove(store, shard);
            collected++;
        }
        shard = next;
    }
    store->stats.staged_collected += collected;
    kvstore_unlock(store);
    return collected;
}
