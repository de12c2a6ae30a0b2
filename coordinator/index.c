#include "coordinator/index.h"

#include "common/base/log.h"
#include "coordinator/index_internal.h"
#include "coordinator/record.h"

#include <string.h>

/* Enough for every segment and tombstone to change once while the disk is away. */
#define JOURNAL_MAX(index) ((size_t)2 * ((index)->segments_max + INDEX_TOMBSTONES_MAX))

enum rk_status index_create(uint32_t segments_max, int64_t timeout_ns, int64_t slow_start_ns,
                            struct index **ret_index)
{
    struct index *index = rk_alloc_zero(1, sizeof(*index));

    if (index == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    index->segments_max = segments_max;
    index->changes = 1; /* 0 is no mark. */
    index->timeout_ns = timeout_ns;
    index->slow_start_ns = slow_start_ns;
    *ret_index = index;
    return RK_OK;
}

static void node_free(struct index *index, struct index_node *node)
{
    RK_ASSERT(node->locations == NULL);
    HASH_DELETE(hh, index->nodes, node);
    record_free(&node->info->base);
    rk_free(node->node_id);
    rk_free(node);
}

void index_destroy(struct index *index)
{
    struct index_segment *segment;
    struct index_segment *next_segment;
    struct index_node *node;
    struct index_node *next_node;
    struct index_tombstone *tombstone;
    struct index_tombstone *next_tombstone;

    if (index == NULL) {
        return;
    }
    HASH_ITER (hh, index->segments, segment, next_segment) {
        index_segment_free(index, segment);
    }
    HASH_ITER (hh, index->nodes, node, next_node) {
        node_free(index, node);
    }
    HASH_ITER (hh, index->tombstones, tombstone, next_tombstone) {
        HASH_DELETE(hh, index->tombstones, tombstone);
        rk_free(tombstone);
    }
    rk_free(index->journal);
    rk_free(index);
}

/* ---- Nodes ---- */

struct index_node *index_nodes(struct index *index)
{
    return index->nodes;
}

uint64_t index_next_visit(struct index *index)
{
    return ++index->visits;
}

struct index_node *index_node_find(struct index *index, const char *node_id)
{
    struct index_node *node = NULL;

    HASH_FIND_STR(index->nodes, node_id, node);
    return node;
}

bool index_node_alive(const struct index *index, const struct index_node *node, int64_t now_ns)
{
    return node->heard_ns != 0 && now_ns - node->heard_ns <= index->timeout_ns;
}

void index_node_heard(const struct index *index, struct index_node *node, int64_t now_ns)
{
    /* Not heard of yet: we restarted, and it did not. */
    if (node->heard_ns != 0 && !index_node_alive(index, node, now_ns)) {
        liveness_came(&node->liveness, false, now_ns);
        node->registered = false; /* Drops did not reach it: it shall announce what it has. */
    }
    node->heard_ns = now_ns;
}

bool index_node_usable(const struct index *index, const struct index_node *node, int64_t now_ns)
{
    return node->info->role == REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE &&
           index_node_alive(index, node, now_ns) && !node->liveness.ejected;
}

enum node_state index_node_state(const struct index *index, const struct index_node *node,
                                 double factor_max, int64_t now_ns)
{
    if (!index_node_alive(index, node, now_ns)) {
        return NODE_DOWN;
    }
    if (node->liveness.ejected) {
        return NODE_EJECTED;
    }
    if (index_node_usable(index, node, now_ns) &&
        liveness_share(index_node_factor(index, node, now_ns), factor_max) < 1.0) {
        return NODE_SLOW_START;
    }
    return NODE_UP;
}

const char *index_node_state_name(enum node_state state)
{
    static const char *const names[NODE_STATE_COUNT] = {
        [NODE_UP] = "up",
        [NODE_DOWN] = "down",
        [NODE_EJECTED] = "ejected",
        [NODE_SLOW_START] = "slow start",
    };

    return names[state];
}

double index_node_factor(const struct index *index, const struct index_node *node, int64_t now_ns)
{
    return liveness_factor(&node->liveness, index->slow_start_ns, now_ns);
}

double index_factor_max(const struct index *index, int64_t now_ns)
{
    double factor_max = 0.0;

    for (const struct index_node *node = index->nodes; node != NULL; node = node->hh.next) {
        double factor = index_node_factor(index, node, now_ns);

        if (factor > factor_max && index_node_usable(index, node, now_ns)) {
            factor_max = factor;
        }
    }
    return factor_max == 0.0 ? 1.0 : factor_max; /* None is usable. */
}

/* Room for one more: a node that is down and holds nothing is forgotten. */
static bool nodes_make_room(struct index *index, int64_t now_ns)
{
    struct index_node *node;
    struct index_node *next;

    if (HASH_COUNT(index->nodes) < INDEX_NODES_MAX) {
        return true;
    }
    HASH_ITER (hh, index->nodes, node, next) {
        if (node->num_locations == 0 && !index_node_alive(index, node, now_ns) &&
            now_ns > node->lease_ns) {
            node_free(index, node);
            return true;
        }
    }
    return false;
}

static enum rk_status node_add(struct index *index, Redknot__V1__NodeInfo *info, int64_t now_ns,
                               struct index_node **ret_node)
{
    struct index_node *node;

    if (!nodes_make_room(index, now_ns)) {
        return RK_ERR_FULL;
    }
    node = rk_alloc_zero(1, sizeof(*node));
    if (node == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    node->node_id = rk_alloc_string(info->node_id);
    if (node->node_id != NULL) {
        HASH_ADD_KEYPTR(hh, index->nodes, node->node_id, strlen(node->node_id), node);
    }
    if (node->hh.tbl == NULL) {
        rk_free(node->node_id);
        rk_free(node);
        return RK_ERR_NO_MEMORY;
    }
    node->info = info;
    *ret_node = node;
    return RK_OK;
}

static void node_lose_all(struct index *index, struct index_node *node)
{
    while (node->locations != NULL) {
        struct index_location *location = node->locations;

        index_location_clear(index, location, LOCATION_LOST);
        index_segment_settle(index, location->segment);
        index_journal_add(index, 's', &location->segment->id);
    }
}

enum rk_status index_node_register(struct index *index, const Redknot__V1__NodeInfo *info,
                                   int64_t now_ns, struct index_node **ret_node)
{
    struct index_node *node = index_node_find(index, info->node_id);
    Redknot__V1__NodeInfo *copy =
        (Redknot__V1__NodeInfo *)record_copy(&info->base, &redknot__v1__node_info__descriptor);

    if (copy == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    if (node == NULL) {
        enum rk_status status = node_add(index, copy, now_ns, &node);

        if (status != RK_OK) {
            record_free(&copy->base);
            return status;
        }
        liveness_came(&node->liveness, true, now_ns);
    } else {
        if (node->info->incarnation != info->incarnation) {
            node_lose_all(index, node);
            node->replaced = node->info->incarnation;
            node->liveness = (struct liveness){0}; /* What failed was the former process. */
            liveness_came(&node->liveness, false, now_ns);
        }
        record_free(&node->info->base);
        node->info = copy;
    }
    index_node_heard(index, node, now_ns);
    node->registered = true;
    *ret_node = node;
    return RK_OK;
}

enum rk_status index_node_load(struct index *index, const Redknot__V1__NodeInfo *info)
{
    struct index_node *node = NULL;
    enum rk_status status = index_node_register(index, info, 1, &node);

    if (status == RK_OK) {
        node->heard_ns = 0;
        node->registered = false;
        node->liveness = (struct liveness){0};
    }
    return status;
}

/* ---- Tombstones ---- */

enum rk_status index_tombstone_put(struct index *index, const struct rk_id *id, uint64_t generation)
{
    struct index_tombstone *tombstone = NULL;

    HASH_FIND(hh, index->tombstones, id, sizeof(*id), tombstone);
    if (tombstone != NULL) {
        if (generation > tombstone->generation) {
            tombstone->generation = generation;
        }
        index_journal_add(index, 'd', id);
        return RK_OK;
    }
    if (HASH_COUNT(index->tombstones) >= INDEX_TOMBSTONES_MAX) {
        struct index_tombstone *oldest = index->tombstones;
        struct rk_id old_id = oldest->id;

        HASH_DELETE(hh, index->tombstones, oldest);
        rk_free(oldest);
        index_journal_add(index, 'd', &old_id);
    }
    tombstone = rk_alloc_zero(1, sizeof(*tombstone));
    if (tombstone == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    tombstone->id = *id;
    tombstone->generation = generation;
    HASH_ADD(hh, index->tombstones, id, sizeof(*id), tombstone);
    if (tombstone->hh.tbl == NULL) {
        rk_free(tombstone);
        return RK_ERR_NO_MEMORY;
    }
    index_journal_add(index, 'd', id);
    return RK_OK;
}

uint64_t index_tombstone_generation(struct index *index, const struct rk_id *id)
{
    struct index_tombstone *tombstone = NULL;

    HASH_FIND(hh, index->tombstones, id, sizeof(*id), tombstone);
    return tombstone == NULL ? 0 : tombstone->generation;
}

void index_floor_set(struct index *index, uint64_t generation)
{
    if (generation > index->floor) {
        index->floor = generation;
    }
}

uint64_t index_unwanted_generation(struct index *index, const struct rk_id *id)
{
    uint64_t generation = index_tombstone_generation(index, id);

    return generation > index->floor ? generation : index->floor;
}

/* ---- Journal ---- */

void index_journal_add(struct index *index, char kind, const struct rk_id *id)
{
    struct index_segment *segment = kind == 's' ? index_segment_find(index, id) : NULL;

    if (segment != NULL && segment->journalled) {
        return;
    }
    if (index->journal_count == index->journal_capacity) {
        size_t capacity = index->journal_capacity == 0 ? 256 : index->journal_capacity * 2;
        struct index_journal_entry *grown = NULL;

        if (capacity <= JOURNAL_MAX(index) + 256) {
            grown = rk_alloc_resize(index->journal, capacity, sizeof(*grown));
        }
        if (grown == NULL) {
            /* The next Announce repairs what a restart would then read back wrongly. */
            RK_LOG_ERROR("journal_full", "entries=%zu", index->journal_count);
            return;
        }
        index->journal = grown;
        index->journal_capacity = capacity;
    }
    index->journal[index->journal_count++] = (struct index_journal_entry){.kind = kind, .id = *id};
    if (segment != NULL) {
        segment->journalled = true;
    }
}

size_t index_journal_take(struct index *index, struct index_journal_entry *ret_entries,
                          size_t count)
{
    size_t taken = count < index->journal_count ? count : index->journal_count;

    if (taken == 0) {
        return 0;
    }
    index->journal_count -= taken;
    memcpy(ret_entries, index->journal + index->journal_count, taken * sizeof(*ret_entries));
    for (size_t i = 0; i < taken; i++) {
        struct index_segment *segment = index_segment_find(index, &ret_entries[i].id);

        if (ret_entries[i].kind == 's' && segment != NULL) {
            segment->journalled = false;
        }
    }
    return taken;
}

void index_journal_clear(struct index *index)
{
    struct index_journal_entry entry;

    while (index_journal_take(index, &entry, 1) != 0) {
    }
}

/* ---- Drops ---- */

enum rk_status index_drop_add(const struct index *index, struct index_drops *drops,
                              const struct rk_id *id, uint64_t generation, uint32_t shard_index,
                              const struct index_node *node, int64_t now_ns)
{
    struct index_drop *drop;

    if (drops->count == drops->capacity) {
        size_t capacity = drops->capacity == 0 ? 16 : drops->capacity * 2;
        struct index_drop *grown = rk_alloc_resize(drops->items, capacity, sizeof(*grown));

        if (grown == NULL) {
            return RK_ERR_NO_MEMORY;
        }
        drops->items = grown;
        drops->capacity = capacity;
    }
    drop = &drops->items[drops->count];
    *drop = (struct index_drop){.id = *id, .generation = generation, .shard_index = shard_index};
    if (node != NULL && index_node_alive(index, node, now_ns)) {
        drop->address = rk_alloc_string(node->info->grpc_address);
        drop->node_id = rk_alloc_string(node->node_id);
    }
    drops->count++;
    return RK_OK;
}

void index_drops_free(struct index_drops *drops)
{
    for (size_t i = 0; i < drops->count; i++) {
        rk_free(drops->items[i].address);
        rk_free(drops->items[i].node_id);
    }
    rk_free(drops->items);
    *drops = (struct index_drops){0};
}
