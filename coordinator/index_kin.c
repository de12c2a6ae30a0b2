/* Chains by the segments that they stem from, so that a drop finds them. */
#include "coordinator/index_internal.h"

static struct index_kin *find(struct index *index, const struct rk_id *id)
{
    struct index_kin *kin = NULL;

    HASH_FIND(hh, index->kin, id, sizeof(*id), kin);
    return kin;
}

static struct index_kin *get(struct index *index, const struct rk_id *id)
{
    struct index_kin *kin = find(index, id);

    if (kin != NULL) {
        return kin;
    }
    kin = rk_alloc_zero(1, sizeof(*kin));
    if (kin == NULL) {
        return NULL;
    }
    kin->id = *id;
    HASH_ADD(hh, index->kin, id, sizeof(kin->id), kin);
    if (kin->hh.tbl == NULL) {
        rk_free(kin);
        return NULL;
    }
    return kin;
}

static void free_if_empty(struct index *index, struct index_kin *kin)
{
    if (kin->chains == NULL && kin->children == NULL) {
        RK_ASSERT(index->kin != NULL); /* It is in there. */
        HASH_DELETE(hh, index->kin, kin);
        rk_free(kin);
    }
}

void index_kin_unlink(struct index *index, struct index_segment *segment)
{
    struct index_kin *alone = segment->in_alone.kin;
    struct index_kin *parent = segment->in_parent.kin;

    if (alone != NULL) {
        RK_ASSERT(alone->chains != NULL && segment->in_alone.prev != NULL);
        DL_DELETE2(alone->chains, segment, in_alone.prev, in_alone.next);
        segment->in_alone.kin = NULL;
    }
    if (parent != NULL) {
        RK_ASSERT(parent->children != NULL && segment->in_parent.prev != NULL);
        DL_DELETE2(parent->children, segment, in_parent.prev, in_parent.next);
        segment->in_parent.kin = NULL;
        free_if_empty(index, parent);
    }
    if (alone != NULL && alone != parent) {
        free_if_empty(index, alone);
    }
}

enum rk_status index_kin_link(struct index *index, struct index_segment *segment)
{
    struct index_kin *alone;
    struct index_kin *parent;

    if (!rk_origin_is_chain(&segment->origin)) {
        return RK_OK; /* It stems from nothing but itself. */
    }
    alone = get(index, &segment->origin.alone);
    if (alone == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    parent = get(index, &segment->origin.parent);
    if (parent == NULL) {
        free_if_empty(index, alone);
        return RK_ERR_NO_MEMORY;
    }
    DL_APPEND2(alone->chains, segment, in_alone.prev, in_alone.next);
    segment->in_alone.kin = alone;
    DL_APPEND2(parent->children, segment, in_parent.prev, in_parent.next);
    segment->in_parent.kin = parent;
    return RK_OK;
}

bool index_kin_has_children(struct index *index, const struct rk_id *id)
{
    const struct index_kin *kin = find(index, id);

    return kin != NULL && kin->children != NULL;
}

/* One of what id brings down; NULL: nothing is left. */
static struct index_segment *next_victim(struct index *index, const struct rk_id *id)
{
    struct index_segment *segment = index_segment_find(index, id);
    const struct index_kin *kin;

    if (segment != NULL) {
        return segment;
    }
    kin = find(index, id);
    if (kin == NULL) {
        return NULL;
    }
    return kin->chains != NULL ? kin->chains : kin->children;
}

enum rk_status index_kin_drop(struct index *index, const struct rk_id *id, uint64_t generation,
                              int64_t now_ns, struct index_drops *drops, struct index_ids *ids,
                              bool *ret_known)
{
    size_t first = ids->count;
    enum rk_status status = index_ids_add(ids, id);

    /* A list of what is still to be looked at, not a recursion: origins come from peers, and may
     * be as long as they like, or go in a circle. Each step drops a segment or ends a row. */
    *ret_known = false;
    for (size_t i = first; status == RK_OK && i < ids->count; i++) {
        struct rk_id of = ids->items[i];
        struct index_segment *victim = next_victim(index, &of);

        while (status == RK_OK && victim != NULL) {
            struct rk_id victim_id = victim->id;

            *ret_known = true;
            status = index_segment_drop(index, victim, generation, now_ns, drops);
            if (status == RK_OK && !rk_id_equal(&victim_id, &of)) {
                status = index_ids_add(ids, &victim_id);
            }
            victim = status == RK_OK ? next_victim(index, &of) : NULL;
        }
    }
    return status;
}

uint64_t index_unwanted_kin(struct index *index, const struct rk_id *id,
                            const struct rk_origin *origin)
{
    uint64_t generation = index_unwanted_generation(index, id);

    if (rk_origin_is_chain(origin)) {
        uint64_t alone = index_unwanted_generation(index, &origin->alone);
        uint64_t parent = index_unwanted_generation(index, &origin->parent);

        generation = alone > generation ? alone : generation;
        generation = parent > generation ? parent : generation;
    }
    return generation;
}

enum rk_status index_ids_add(struct index_ids *ids, const struct rk_id *id)
{
    if (ids->count == ids->capacity) {
        size_t capacity = ids->capacity == 0 ? 16 : ids->capacity * 2;
        struct rk_id *grown = rk_alloc_resize(ids->items, capacity, sizeof(*grown));

        if (grown == NULL) {
            return RK_ERR_NO_MEMORY;
        }
        ids->items = grown;
        ids->capacity = capacity;
    }
    ids->items[ids->count++] = *id;
    return RK_OK;
}

void index_ids_free(struct index_ids *ids)
{
    rk_free(ids->items);
    *ids = (struct index_ids){0};
}
