#include "common/base/alloc.h"
#include "coordinator/index_internal.h"

#include <string.h>

uint64_t index_changes(const struct index *index)
{
    return index->changes;
}

struct index_segment *index_segments(struct index *index)
{
    return index->segments;
}

uint64_t index_num_segments(const struct index *index)
{
    return HASH_COUNT(index->segments);
}

uint64_t index_num_without_kv(const struct index *index)
{
    return index->num_without_kv;
}

uint64_t index_kv_bytes(const struct index *index)
{
    return index->kv_bytes;
}

uint64_t index_segment_bytes(const struct index_segment *segment)
{
    return rk_kv_pages_total(&segment->layout, segment->num_tokens) *
           rk_kv_page_bytes(&segment->layout);
}

struct index_segment *index_segment_find(struct index *index, const struct rk_id *id)
{
    struct index_segment *segment = NULL;

    HASH_FIND(hh, index->segments, id, sizeof(*id), segment);
    return segment;
}

/* ---- Locations and lists of use ---- */

void index_location_clear(struct index *index, struct index_location *location,
                          enum location_state state)
{
    RK_ASSERT(state != LOCATION_PRESENT);
    if (location->node != NULL) {
        DL_DELETE(location->node->locations, location);
        location->node->num_locations--;
        location->node = NULL;
    }
    location->state = state;
    location->changed = ++index->changes;
}

static void location_set(struct index *index, struct index_location *location,
                         struct index_node *node)
{
    index_location_clear(index, location, LOCATION_UNKNOWN);
    DL_APPEND(node->locations, location);
    node->num_locations++;
    location->node = node;
    location->incarnation = node->info->incarnation;
    location->state = LOCATION_PRESENT;
}

static struct index_segment **list_of(struct index *index, const struct index_segment *segment)
{
    return segment->has_kv ? &index->with_kv : &index->without_kv;
}

static void list_add(struct index *index, struct index_segment *segment)
{
    struct index_segment **list = list_of(index, segment);

    DL_APPEND(*list, segment);
    index->num_without_kv += !segment->has_kv;
    index->kv_bytes += segment->has_kv ? index_segment_bytes(segment) : 0;
}

static void list_remove(struct index *index, struct index_segment *segment)
{
    struct index_segment **list = list_of(index, segment);

    DL_DELETE(*list, segment);
    index->num_without_kv -= !segment->has_kv;
    index->kv_bytes -= segment->has_kv ? index_segment_bytes(segment) : 0;
}

void index_segment_touch(struct index *index, struct index_segment *segment)
{
    list_remove(index, segment);
    list_add(index, segment);
}

/* Moves the segment to the list where it now belongs. */
void index_segment_settle(struct index *index, struct index_segment *segment)
{
    bool has_kv = true;

    for (uint32_t i = 0; i < segment->num_shards; i++) {
        has_kv = has_kv && segment->locations[i].state == LOCATION_PRESENT;
    }
    if (has_kv != segment->has_kv) {
        list_remove(index, segment);
        segment->has_kv = has_kv;
        list_add(index, segment);
    }
}

void index_segment_free(struct index *index, struct index_segment *segment)
{
    for (uint32_t i = 0; i < segment->num_shards; i++) {
        index_location_clear(index, &segment->locations[i], LOCATION_UNKNOWN);
    }
    list_remove(index, segment);
    index_kin_unlink(index, segment);
    HASH_DELETE(hh, index->segments, segment);
    rk_free(segment->label);
    rk_free(segment);
}

/* ---- Making and dropping ---- */

static enum rk_status drops_of_segment(struct index *index, const struct index_segment *segment,
                                       int64_t now_ns, struct index_drops *drops)
{
    for (uint32_t i = 0; i < segment->num_shards; i++) {
        if (segment->locations[i].state == LOCATION_PRESENT) {
            enum rk_status status = index_drop_add(index, drops, &segment->id, segment->generation,
                                                   i, segment->locations[i].node, now_ns);

            if (status != RK_OK) {
                return status;
            }
        }
    }
    return RK_OK;
}

enum rk_status index_segment_drop(struct index *index, struct index_segment *segment,
                                  uint64_t generation, int64_t now_ns, struct index_drops *drops)
{
    struct rk_id id = segment->id;
    enum rk_status status = drops_of_segment(index, segment, now_ns, drops);

    if (status == RK_OK) {
        status = index_tombstone_put(
            index, &id, generation > segment->generation ? generation : segment->generation);
    }
    if (status == RK_OK) {
        index_journal_add(index, 's', &id);
        index_segment_free(index, segment);
    }
    return status;
}

/* A chain that is forgotten takes those that continue it along: nothing would tell any more of
 * which segments they were computed, and a drop of one of these would miss them. */
static enum rk_status forget_with_chains(struct index *index, struct index_segment *segment,
                                         int64_t now_ns, struct index_drops *drops)
{
    struct index_ids ids = {0};
    struct rk_id id = segment->id;
    bool known = false;
    enum rk_status status;

    if (!rk_origin_is_chain(&segment->origin)) {
        return index_segment_drop(index, segment, 0, now_ns, drops);
    }
    status = index_kin_drop(index, &id, 0, now_ns, drops, &ids, &known);
    index_ids_free(&ids);
    return status;
}

/* Segments without KV go first, then the longest unused of all. */
static enum rk_status make_room(struct index *index, int64_t now_ns, struct index_drops *drops)
{
    while (HASH_COUNT(index->segments) >= index->segments_max) {
        struct index_segment *victim = index->without_kv;
        enum rk_status status;

        if (victim == NULL) {
            victim = index->with_kv;
        } else if (!rk_origin_is_chain(&victim->origin) ||
                   !index_kin_has_children(index, &victim->id)) {
            struct rk_id id = victim->id;

            index_journal_add(index, 's', &id);
            index_segment_free(index, victim);
            continue;
        }
        status = forget_with_chains(index, victim, now_ns, drops);
        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}

static enum rk_status segment_create(const struct segment_spec *spec,
                                     struct index_segment **ret_segment)
{
    struct index_segment *segment =
        rk_alloc_zero(1, sizeof(*segment) + spec->num_shards * sizeof(segment->locations[0]));

    if (segment == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    segment->id = spec->id;
    segment->fingerprint = spec->fingerprint;
    segment->layout = spec->layout;
    segment->generation = spec->generation;
    segment->num_tokens = spec->num_tokens;
    segment->num_shards = spec->num_shards;
    segment->has_tokens = spec->has_tokens;
    segment->origin = spec->origin;
    segment->label = rk_alloc_string(spec->label == NULL ? "" : spec->label);
    for (uint32_t i = 0; i < spec->num_shards; i++) {
        segment->locations[i].segment = segment;
        segment->locations[i].heads = spec->locations[i].heads;
        segment->locations[i].incarnation = spec->locations[i].incarnation;
    }
    if (segment->label == NULL) {
        rk_free(segment);
        return RK_ERR_NO_MEMORY;
    }
    *ret_segment = segment;
    return RK_OK;
}

static void place_locations(struct index *index, struct index_segment *segment,
                            const struct segment_spec *spec)
{
    for (uint32_t i = 0; i < spec->num_shards; i++) {
        const struct segment_location_spec *from = &spec->locations[i];
        struct index_node *node =
            from->state == LOCATION_PRESENT ? index_node_find(index, from->node_id) : NULL;

        if (node != NULL && node->info->incarnation == from->incarnation) {
            location_set(index, &segment->locations[i], node);
        } else {
            index_location_clear(index, &segment->locations[i],
                                 from->state == LOCATION_PRESENT ? LOCATION_LOST : from->state);
        }
    }
}

enum rk_status index_segment_put(struct index *index, const struct segment_spec *spec,
                                 int64_t now_ns, struct index_drops *drops)
{
    struct index_segment *old = index_segment_find(index, &spec->id);
    struct index_segment *segment = NULL;
    enum rk_status status = segment_create(spec, &segment);

    if (status == RK_OK && old != NULL && old->generation != spec->generation) {
        status = drops_of_segment(index, old, now_ns, drops);
    }
    if (status == RK_OK && old == NULL) {
        status = make_room(index, now_ns, drops);
    }
    if (status != RK_OK) {
        goto fail;
    }
    if (old != NULL) {
        if (!rk_origin_known(&segment->origin)) {
            segment->origin = old->origin; /* Told by an older peer; the id is the same. */
        }
        index_segment_free(index, old);
    }
    HASH_ADD(hh, index->segments, id, sizeof(segment->id), segment);
    if (segment->hh.tbl == NULL) {
        status = RK_ERR_NO_MEMORY;
        goto fail;
    }
    segment->serial = ++index->serials;
    list_add(index, segment);
    if (index_kin_link(index, segment) != RK_OK) {
        index_segment_free(index, segment);
        return RK_ERR_NO_MEMORY;
    }
    place_locations(index, segment, spec);
    index_segment_settle(index, segment);
    return RK_OK;

fail:
    if (segment != NULL) {
        rk_free(segment->label);
        rk_free(segment);
    }
    return status;
}

void index_shard_removed(struct index *index, struct index_node *node, const struct rk_id *id,
                         uint64_t generation, uint32_t shard_index)
{
    struct index_segment *segment = index_segment_find(index, id);

    if (segment == NULL || segment->generation != generation ||
        shard_index >= segment->num_shards || segment->locations[shard_index].node != node) {
        return;
    }
    index_location_clear(index, &segment->locations[shard_index], LOCATION_EVICTED);
    index_segment_settle(index, segment);
    index_journal_add(index, 's', id);
}

enum rk_status index_segment_state(const struct index *index, const struct index_segment *segment,
                                   const struct rk_id *fingerprint, int64_t now_ns)
{
    enum rk_status state = RK_OK;

    if (fingerprint != NULL && !rk_id_equal(fingerprint, &segment->fingerprint)) {
        return RK_MISS_FINGERPRINT;
    }
    for (uint32_t i = 0; i < segment->num_shards; i++) {
        const struct index_location *location = &segment->locations[i];

        switch (location->state) {
        case LOCATION_EVICTED:
            return RK_MISS_EVICTED; /* Final; a node that is down may come back. */
        case LOCATION_UNKNOWN:
            state = state == RK_OK ? RK_MISS_ABSENT : state;
            break;
        case LOCATION_LOST:
            state = RK_MISS_NODE_DOWN;
            break;
        case LOCATION_PRESENT:
            if (!index_node_usable(index, location->node, now_ns)) {
                state = RK_MISS_NODE_DOWN;
            }
            break;
        }
    }
    return state;
}

/* ---- Announce ---- */

static bool same_shape(const struct index_segment *segment, const struct index_announced *announced)
{
    return segment->num_shards == announced->num_shards &&
           segment->num_tokens == announced->num_tokens &&
           rk_kv_layout_equal(&segment->layout, &announced->layout) &&
           rk_id_equal(&segment->fingerprint, &announced->fingerprint);
}

/* A segment that nobody told us of, or a newer generation of one: known by this shard first. */
static enum rk_status adopt(struct index *index, const struct index_announced *announced,
                            int64_t now_ns, struct index_drops *drops)
{
    struct segment_location_spec *locations =
        rk_alloc_zero(announced->num_shards, sizeof(*locations));
    struct segment_spec spec = {
        .id = announced->id,
        .fingerprint = announced->fingerprint,
        .layout = announced->layout,
        .generation = announced->generation,
        .num_tokens = announced->num_tokens,
        .num_shards = announced->num_shards,
        .label = announced->label,
        .origin = announced->origin,
        .has_tokens = announced->has_tokens,
        .locations = locations,
    };
    enum rk_status status;

    if (locations == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < announced->num_shards; i++) {
        locations[i].heads = announced->heads;
    }
    status = index_segment_put(index, &spec, now_ns, drops);
    rk_free(locations);
    return status;
}

/* What the segment's record does not say yet. */
static enum rk_status complete(struct index *index, struct index_segment *segment,
                               const struct index_announced *announced)
{
    if (!segment->has_tokens && announced->has_tokens) {
        segment->has_tokens = true;
        index_journal_add(index, 's', &segment->id);
    }
    if (rk_origin_known(&segment->origin) || !rk_origin_known(&announced->origin)) {
        return RK_OK;
    }
    segment->origin = announced->origin; /* The record is of an older version. */
    index_journal_add(index, 's', &segment->id);
    return index_kin_link(index, segment);
}

/* A chain that a drop would have taken along, had it been known: with what continues it, which may
 * have been announced before it. */
static enum rk_status refuse_kin(struct index *index, const struct index_announced *announced,
                                 uint64_t unwanted, int64_t now_ns, struct index_drops *drops)
{
    struct index_ids ids = {0};
    bool known = false;
    enum rk_status status = index_tombstone_put(index, &announced->id, unwanted);

    if (status == RK_OK) {
        status = index_kin_drop(index, &announced->id, unwanted, now_ns, drops, &ids, &known);
    }
    index_ids_free(&ids);
    return status;
}

enum rk_status index_announce(struct index *index, struct index_node *node,
                              struct index_announced *announced, uint64_t since, int64_t now_ns,
                              struct index_drops *drops)
{
    struct index_segment *segment = index_segment_find(index, &announced->id);
    uint64_t unwanted = index_unwanted_kin(index, &announced->id, &announced->origin);
    struct index_location *location;
    enum rk_status status;

    if (segment == NULL && announced->generation <= unwanted &&
        unwanted > index_unwanted_generation(index, &announced->id)) {
        announced->unwanted = true;
        return refuse_kin(index, announced, unwanted, now_ns, drops);
    }
    announced->unwanted = announced->generation <= unwanted ||
                          (segment != NULL && segment->generation > announced->generation) ||
                          (segment != NULL && segment->generation == announced->generation &&
                           !same_shape(segment, announced));
    if (announced->unwanted) {
        return RK_OK;
    }
    if (segment == NULL || segment->generation < announced->generation) {
        status = adopt(index, announced, now_ns, drops);
        if (status != RK_OK) {
            return status;
        }
        segment = index_segment_find(index, &announced->id);
    }
    status = complete(index, segment, announced);
    if (status != RK_OK) {
        return status;
    }
    location = &segment->locations[announced->shard_index];
    if (location->node != NULL && location->node != node) {
        /* Two nodes with one shard: whoever serves it stays. */
        announced->unwanted = index_node_usable(index, location->node, now_ns);
    } else if (location->changed > since && location->state == LOCATION_EVICTED) {
        announced->unwanted = true; /* Evicted while it announced. */
    }
    if (announced->unwanted) {
        return RK_OK;
    }
    if (location->node != node) {
        location->heads = announced->heads;
        location_set(index, location, node);
        index_segment_settle(index, segment);
        index_journal_add(index, 's', &segment->id);
    }
    location->changed = ++index->changes; /* What the node confirms gets a newer mark. */
    return RK_OK;
}

void index_announce_end(struct index *index, struct index_node *node, uint64_t since)
{
    struct index_location *location;
    struct index_location *next;

    DL_FOREACH_SAFE(node->locations, location, next)
    {
        if (location->changed <= since) {
            struct index_segment *segment = location->segment;

            index_location_clear(index, location, LOCATION_EVICTED);
            index_segment_settle(index, segment);
            index_journal_add(index, 's', &segment->id);
        }
    }
}
