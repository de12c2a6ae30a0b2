#include "kvstore/kvstore_internal.h"

#include "common/base/limits.h"
#include "common/transport/transport.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RESERVE_STEP_BYTES   (64u << 20)
#define POPULATE_STEP_BYTES  (UINT64_C(32) << 20)
#define POPULATE_THREADS_MAX 8

void kvstore_lock(struct kvstore *store)
{
    RK_ASSERT(pthread_mutex_lock(&store->mutex) == 0);
}

void kvstore_unlock(struct kvstore *store)
{
    RK_ASSERT(pthread_mutex_unlock(&store->mutex) == 0);
}

/* ---- Lists ---- */

static struct shard_links *links_all(struct kvstore_shard *shard)
{
    return &shard->all;
}

static struct shard_links *links_lru(struct kvstore_shard *shard)
{
    return &shard->lru;
}

typedef struct shard_links *(*links_of)(struct kvstore_shard *shard);

static void list_append(struct shard_list *list, struct kvstore_shard *shard, links_of links)
{
    *links(shard) = (struct shard_links){.prev = list->tail};
    if (list->tail) {
        links(list->tail)->next = shard;
    } else {
        list->head = shard;
    }
    list->tail = shard;
}

static void list_take(struct shard_list *list, struct kvstore_shard *shard, links_of links)
{
    struct shard_links at = *links(shard);
    if (at.prev) {
        links(at.prev)->next = at.next;
    } else {
        list->head = at.next;
    }
    if (at.next) {
        links(at.next)->prev = at.prev;
    } else {
        list->tail = at.prev;
    }
    *links(shard) = (struct shard_links){0};
}

void kvstore_lru_add(struct kvstore *store, struct kvstore_shard *shard)
{
    list_append(&store->lru, shard, links_lru);
    store->evictable_granules += shard->granules;
}

void kvstore_lru_take(struct kvstore *store, struct kvstore_shard *shard)
{
    list_take(&store->lru, shard, links_lru);
    store->evictable_granules -= shard->granules;
}

/* ---- Table ---- */

static uint64_t *count_of(struct kvstore *store, const struct kvstore_shard *shard)
{
    bool value = shard->header.kind == KVSTORE_VALUE;
    return value ? &store->stats.num_values : &store->stats.num_shards;
}

struct slot_key kvstore_slot_key(const struct kvstore_name *name)
{
    struct slot_key key = {.shard_index = name->shard_index, .kind = (uint32_t)name->kind};
    memcpy(key.segment_id, name->segment_id.bytes, RK_ID_BYTES);
    return key;
}

struct slot *kvstore_slot_find(struct kvstore *store, const struct kvstore_name *name)
{
    struct slot_key key = kvstore_slot_key(name);
    struct slot *slot = NULL;
    HASH_FIND(hh, store->slots, &key, sizeof(key), slot);
    return slot;
}

struct kvstore_shard *kvstore_staged_find(struct kvstore *store, const struct kvstore_name *name)
{
    struct slot *slot = kvstore_slot_find(store, name);
    struct kvstore_shard *shard = slot ? slot->staged : NULL;
    while (shard && shard->header.generation != name->generation) {
        shard = shard->staged_next;
    }
    return shard;
}

static void slot_drop_if_empty(struct kvstore *store, struct slot *slot)
{
    RK_ASSERT(slot != NULL);
    if (!slot->committed && !slot->staged) {
        HASH_DEL(store->slots, slot);
        rk_free(slot);
    }
}

void kvstore_staged_add(struct kvstore *store, struct slot *slot, struct kvstore_shard *shard)
{
    shard->slot = slot;
    shard->staged_next = slot->staged;
    slot->staged = shard;
    list_append(&store->staged, shard, links_all);
    store->stats.num_staged++;
}

/* The slot stays, even if it is empty now: the caller goes on with it. */
void kvstore_staged_take(struct kvstore *store, struct kvstore_shard *shard)
{
    RK_ASSERT(shard->slot != NULL);
    struct kvstore_shard **at = &shard->slot->staged;
    while (*at != shard) {
        RK_ASSERT(*at != NULL); /* It is in its slot's list. */
        at = &(*at)->staged_next;
    }
    *at = shard->staged_next;
    shard->staged_next = NULL;
    list_take(&store->staged, shard, links_all);
    store->stats.num_staged--;
}

/* Unique within this memory, which no other run of the store shares. */
static void seal_make(struct kvstore *store, struct kvstore_shard *shard)
{
    uint64_t index = 0;
    shard->seal = ++store->last_seal;
    (void)kvstore_shard_seal(shard, &index);
    /* Readers hear of it by a pin, whose answer is behind this. */
    atomic_store_explicit(&store->seals[index], shard->seal, memory_order_release);
}

void kvstore_seal_break(struct kvstore *store, const struct kvstore_shard *shard)
{
    uint64_t index = 0;
    if (kvstore_shard_seal(shard, &index) == 0) {
        return; /* It was never committed: nobody reads it. */
    }
    atomic_store_explicit(&store->seals[index], 0, memory_order_relaxed);
    /* Whoever reads a byte that is written after this reads a broken seal after it. */
    atomic_thread_fence(memory_order_seq_cst);
}

void kvstore_committed_add(struct kvstore *store, struct kvstore_shard *shard)
{
    seal_make(store, shard);
    shard->state = SHARD_COMMITTED;
    shard->slot->committed = shard;
    list_append(&store->committed, shard, links_all);
    kvstore_lru_add(store, shard);
    *count_of(store, shard) += 1;
}

void kvstore_shard_free(struct kvstore_shard *shard)
{
    if (!shard) {
        return;
    }
    rk_free((void *)shard->header.token_ids);
    rk_free((void *)shard->header.label);
    rk_free((void *)shard->header.key);
    rk_free(shard->checksums);
    rk_free(shard->runs);
    rk_free(shard);
}

void kvstore_shard_reap(struct kvstore *store, struct kvstore_shard *shard)
{
    if (shard->state != SHARD_GONE || shard->pins > 0 || store->scrubbing == shard) {
        return;
    }
    if (shard->num_runs > 0) {
        kvstore_seal_break(store, shard);
    }
    for (uint32_t i = 0; i < shard->num_runs; i++) {
        space_free(store->space, shard->runs[i].granule_begin, shard->runs[i].granules);
    }
    shard->num_runs = 0;
    if (!shard->writer) {
        kvstore_shard_free(shard);
    }
}

void kvstore_shard_remove(struct kvstore *store, struct kvstore_shard *shard)
{
    struct slot *slot = shard->slot;
    if (shard->state == SHARD_COMMITTED) {
        if (store->scrub_next == shard) {
            store->scrub_next = shard->all.next;
            store->scrub_page = 0;
        }
        if (shard->pins == 0) {
            kvstore_lru_take(store, shard);
        }
        list_take(&store->committed, shard, links_all);
        slot->committed = NULL;
        *count_of(store, shard) -= 1;
    } else {
        kvstore_staged_take(store, shard);
    }
    shard->state = SHARD_GONE;
    shard->slot = NULL;
    slot_drop_if_empty(store, slot);
    kvstore_shard_reap(store, shard);
}

/* ---- What is remembered of removed shards ---- */

void kvstore_removed_note(struct kvstore *store, const struct kvstore_shard *shard)
{
    size_t room = store->options.removed_max;
    if (shard->header.kind == KVSTORE_VALUE) {
        return; /* Nobody keeps a list of them. */
    }
    if (store->removed_count == room) {
        store->removed_begin = (store->removed_begin + 1) % room;
        store->removed_count--;
        store->removed_lost = true;
    }
    store->removed[(store->removed_begin + store->removed_count) % room] =
        (struct kvstore_name){.segment_id = shard->header.segment_id,
                              .generation = shard->header.generation,
                              .shard_index = shard->header.shard_index};
    store->removed_count++;
}

size_t kvstore_removed_take(struct kvstore *store, struct kvstore_name *ret_names, size_t names_max,
                            bool *ret_lost)
{
    kvstore_lock(store);
    size_t taken = store->removed_count < names_max ? store->removed_count : names_max;
    for (size_t i = 0; i < taken; i++) {
        ret_names[i] = store->removed[(store->removed_begin + i) % store->options.removed_max];
    }
    store->removed_begin = (store->removed_begin + taken) % store->options.removed_max;
    store->removed_count -= taken;
    *ret_lost = store->removed_lost;
    store->removed_lost = false;
    kvstore_unlock(store);
    return taken;
}

/* Ids are uniform, so their first bytes are a hash; 0 marks a free place. */
static uint64_t evicted_tag(const struct slot_key *key)
{
    uint64_t tag = 0;
    memcpy(&tag, key->segment_id, sizeof(tag));
    tag += (key->shard_index + ((uint64_t)key->kind << 32)) * UINT64_C(0x9e3779b97f4a7c15);
    return tag ? tag : 1;
}

void kvstore_evicted_note(struct kvstore *store, const struct slot_key *key, bool evicted)
{
    uint64_t tag = evicted_tag(key);
    uint64_t *place = &store->evicted[tag % EVICTED_SLOTS];
    if (evicted) {
        *place = tag; /* An older name in the same place is forgotten: "absent" is true as well. */
    } else if (*place == tag) {
        *place = 0;
    }
}

bool kvstore_evicted_seen(const struct kvstore *store, const struct slot_key *key)
{
    uint64_t tag = evicted_tag(key);
    return store->evicted[tag % EVICTED_SLOTS] == tag;
}

bool kvstore_evict_one(struct kvstore *store)
{
    struct kvstore_shard *shard = store->lru.head;
    if (shard && shard == store->scrubbing) {
        shard = shard->lru.next; /* Its room would not come back at once. */
    }
    if (!shard) {
        return false;
    }
    kvstore_evicted_note(store, &shard->slot->key, true);
    kvstore_removed_note(store, shard);
    store->stats.evictions++;
    kvstore_shard_remove(store, shard);
    return true;
}

/* ---- Life ---- */

/* In steps, so that a signal does not start gigabytes over again. */
static enum rk_status reserve(int fd, uint64_t bytes, struct rk_error *error)
{
    for (uint64_t at = 0; at < bytes;) {
        uint64_t step = bytes - at < RESERVE_STEP_BYTES ? bytes - at : RESERVE_STEP_BYTES;
        if (fallocate(fd, 0, (off_t)at, (off_t)step) == 0) {
            at += step;
        } else if (errno != EINTR) {
            return rk_error_set(error, RK_ERR_NO_MEMORY,
                                "cannot reserve %llu bytes of memory for the arena: %s; "
                                "ask for less",
                                (unsigned long long)bytes, strerror(errno));
        }
    }
    return RK_OK;
}

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

struct populating {
    uint8_t *arena;
    uint64_t bytes;
    atomic_uint_fast64_t next;
};

/* Best effort: a kernel that cannot leaves it to the first writes. */
static void *populate_main(void *context)
{
    struct populating *populating = context;
    for (;;) {
        uint64_t at = atomic_fetch_add(&populating->next, POPULATE_STEP_BYTES);
        if (at >= populating->bytes) {
            return NULL;
        }
        uint64_t left = populating->bytes - at;
        uint64_t step = left < POPULATE_STEP_BYTES ? left : POPULATE_STEP_BYTES;
        while (madvise(populating->arena + at, step, MADV_POPULATE_WRITE) != 0) {
            if (errno != EAGAIN && errno != EINTR) {
                return NULL;
            }
        }
    }
}

/* What was reserved is not mapped yet: without this the first puts pay for it, page by page, and
 * take twenty times as long as those after them. */
static void populate(uint8_t *arena, uint64_t bytes)
{
    struct populating populating = {.arena = arena, .bytes = bytes};
    pthread_t threads[POPULATE_THREADS_MAX];
    struct rk_limits limits;
    rk_limits_read(&limits);
    uint32_t wanted = limits.cpus < POPULATE_THREADS_MAX ? limits.cpus : POPULATE_THREADS_MAX;
    uint32_t started = 0;
    uint64_t steps = (bytes + POPULATE_STEP_BYTES - 1) / POPULATE_STEP_BYTES;
    while (started + 1 < wanted && started + 1 < steps &&
           pthread_create(&threads[started], NULL, populate_main, &populating) == 0) {
        started++;
    }
    (void)populate_main(&populating);
    for (uint32_t i = 0; i < started; i++) {
        (void)pthread_join(threads[i], NULL);
    }
}

static enum rk_status arena_create(struct kvstore *store, struct rk_error *error)
{
    uint64_t bytes = store->options.dram_bytes + rk_seals_bytes(kvstore_num_seals(store));
    store->fd = memfd_create("redknot-arena", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (store->fd < 0 || ftruncate(store->fd, (off_t)bytes) != 0) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "cannot make an arena of %llu bytes: %s",
                            (unsigned long long)bytes, strerror(errno));
    }
    enum rk_status status = reserve(store->fd, bytes, error);
    if (status != RK_OK) {
        return status;
    }
    void *arena = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, store->fd, 0);
    if (arena == MAP_FAILED) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "cannot map the arena: %s", strerror(errno));
    }
    store->arena = arena;
    populate(arena, bytes);
    store->seals = (_Atomic uint64_t *)(void *)(store->arena + store->options.dram_bytes);
    /* From here on nobody else can write, and no reader can be cut off by a shrinking file. */
    int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
    if (fcntl(store->fd, F_ADD_SEALS, seals) != 0) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED, "cannot seal the arena: %s",
                            strerror(errno));
    }
    return RK_OK;
}

enum rk_status kvstore_create(const struct kvstore_options *options, struct kvstore **ret_store,
                              struct rk_error *error)
{
    uint64_t granules = options->dram_bytes / KVSTORE_GRANULE_BYTES;
    if (granules == 0 || granules >= UINT32_MAX || options->dram_bytes % KVSTORE_GRANULE_BYTES) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "the arena's size must be a multiple of %d bytes below 16 TiB",
                            KVSTORE_GRANULE_BYTES);
    }
    struct kvstore *store = rk_alloc_zero(1, sizeof(*store));
    if (!store) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a store");
    }
    store->fd = -1;
    store->options = *options;
    store->options.shards_max = options->shards_max ? options->shards_max : 1u << 20;
    store->options.staged_ttl_ms = options->staged_ttl_ms ? options->staged_ttl_ms : 30000;
    store->options.removed_max = options->removed_max ? options->removed_max : 4096;
    store->stats.capacity_bytes = options->dram_bytes;
    RK_ASSERT(pthread_mutex_init(&store->mutex, NULL) == 0);
    store->mutex_made = true;

    enum rk_status status = space_create((uint32_t)granules, &store->space);
    store->evicted = rk_alloc_zero(EVICTED_SLOTS, sizeof(*store->evicted));
    store->removed = rk_alloc_zero(store->options.removed_max, sizeof(*store->removed));
    if (status != RK_OK || !store->evicted || !store->removed) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the store's tables");
        goto fail;
    }
    status = arena_create(store, error);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_store = store;
    return RK_OK;

fail:
    kvstore_destroy(store);
    return status;
}

void kvstore_destroy(struct kvstore *store)
{
    if (!store) {
        return;
    }
    RK_ASSERT(store->stats.num_pins == 0);
    while (store->committed.head) {
        kvstore_shard_remove(store, store->committed.head);
    }
    while (store->staged.head) {
        RK_ASSERT(!store->staged.head->writer);
        kvstore_shard_remove(store, store->staged.head);
    }
    if (store->arena) {
        munmap(store->arena, store->options.dram_bytes + rk_seals_bytes(kvstore_num_seals(store)));
    }
    if (store->fd >= 0) {
        close(store->fd);
    }
    space_destroy(store->space);
    rk_free(store->evicted);
    rk_free(store->removed);
    if (store->mutex_made) {
        pthread_mutex_destroy(&store->mutex);
    }
    rk_free(store);
}

int kvstore_arena_fd(const struct kvstore *store)
{
    return store->fd;
}

const void *kvstore_arena(const struct kvstore *store)
{
    return store->arena;
}

uint64_t kvstore_arena_bytes(const struct kvstore *store)
{
    return store->options.dram_bytes;
}

uint64_t kvstore_num_seals(const struct kvstore *store)
{
    return store->options.dram_bytes / KVSTORE_GRANULE_BYTES;
}

void kvstore_stats_get(struct kvstore *store, struct kvstore_stats *ret_stats)
{
    kvstore_lock(store);
    *ret_stats = store->stats;
    ret_stats->used_bytes = store->stats.capacity_bytes -
                            (uint64_t)space_free_granules(store->space) * KVSTORE_GRANULE_BYTES;
    kvstore_unlock(store);
}
