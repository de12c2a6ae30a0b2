/* Drop: of single segments, of a label, of a tenant, of everything. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/record.h"

#include <stdlib.h>
#include <string.h>

#define DROP_MS        2000
#define DROP_BATCH_MAX 4096u /* segments named between two looks at the locks and the clock */

static enum rk_status out_of_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "the coordinator is out of memory");
}

enum rk_status coordinator_read_ids(struct arena *arena, const ProtobufCBinaryData *from,
                                    size_t count, struct rk_id **ret_ids, struct rk_error *error)
{
    struct rk_id *ids;

    if (count > COORDINATOR_IDS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%zu segment ids in one call, at most %u",
                            count, COORDINATOR_IDS_MAX);
    }
    ids = arena_alloc(arena, count, sizeof(*ids));
    if (ids == NULL) {
        return out_of_memory(error);
    }
    for (size_t i = 0; i < count; i++) {
        if (!record_id(&from[i], &ids[i])) {
            return rk_error_set(error, RK_ERR_INVALID, "segment id %zu has %zu bytes instead of %d",
                                i, from[i].len, RK_ID_BYTES);
        }
    }
    *ret_ids = ids;
    return RK_OK;
}

/* ---- Telling the stores ---- */

/* It lives and has not heard: its next heartbeat makes it announce, and the answer tells it. */
static void ask_to_announce(struct coordinator *coordinator, const char *node_id)
{
    struct index_node *node;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = index_node_find(coordinator->index, node_id);
    if (node != NULL) {
        node->registered = false;
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
}

static int by_address(const void *a, const void *b)
{
    const struct index_drop *left = a;
    const struct index_drop *right = b;

    if (left->address == NULL || right->address == NULL) {
        return (left->address == NULL) - (right->address == NULL); /* Those without come last. */
    }
    return strcmp(left->address, right->address);
}

/* How many from begin on go to the same store, in one call. */
static size_t same_store(const struct index_drops *drops, size_t begin)
{
    size_t end = begin + 1;

    while (end < drops->count && end - begin < PEERS_DROPS_MAX &&
           by_address(&drops->items[begin], &drops->items[end]) == 0) {
        end++;
    }
    return end - begin;
}

void coordinator_send_drops(struct coordinator *coordinator, struct index_drops *drops,
                            int timeout_ms)
{
    int64_t deadline_ns = rk_deadline_in_ms(timeout_ms);

    if (drops->count != 0) {
        qsort(drops->items, drops->count, sizeof(*drops->items), by_address);
    }
    for (size_t i = 0; i < drops->count && drops->items[i].address != NULL;) {
        const struct index_drop *drop = &drops->items[i];
        size_t count = same_store(drops, i);
        struct rk_error error = {0};
        int left_ms = rk_deadline_left_ms(deadline_ns);
        enum rk_status status = RK_ERR_DEADLINE;

        if (left_ms != 0) {
            status = peers_drop(coordinator->peers, drop, count, left_ms, &error);
        }
        if (status != RK_OK) {
            RK_LOG_WARN("store_not_told", "node=%q drops=%zu reason=%q", drop->node_id, count,
                        error.text[0] == '\0' ? rk_status_text(status) : error.text);
            ask_to_announce(coordinator, drop->node_id);
        }
        i += count;
    }
}

/* ---- One copy ---- */

/* The node's shards of just this generation are gone. Under index_lock. */
static enum rk_status drop_copy(struct coordinator *coordinator,
                                const Redknot__V1__DropRequest__Copy *copy,
                                struct index_drops *drops, uint32_t *dropped)
{
    struct index_node *node = index_node_find(coordinator->index, copy->node_id);
    struct index_segment *segment;
    struct rk_id id;
    bool found = false;

    RK_ASSERT(record_id(&copy->segment_id, &id)); /* check_copies() */
    segment = index_segment_find(coordinator->index, &id);
    if (node == NULL || segment == NULL || segment->generation != copy->generation) {
        return RK_OK;
    }
    for (uint32_t i = 0; i < segment->num_shards; i++) {
        if (segment->locations[i].node == node) {
            enum rk_status status = index_drop_add(coordinator->index, drops, &id,
                                                   segment->generation, i, node, rk_clock_ns());

            if (status != RK_OK) {
                return status;
            }
            index_shard_removed(coordinator->index, node, &id, segment->generation, i);
            found = true;
        }
    }
    *dropped += found;
    return RK_OK;
}

static enum rk_status check_copies(const Redknot__V1__DropRequest *request, struct rk_error *error)
{
    struct rk_id id;

    if (request->n_copies > COORDINATOR_IDS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%zu copies in one call, at most %u",
                            request->n_copies, COORDINATOR_IDS_MAX);
    }
    for (size_t i = 0; i < request->n_copies; i++) {
        if (!record_id(&request->copies[i]->segment_id, &id) ||
            request->copies[i]->generation == 0) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "copy %zu: it takes a segment id of %d bytes and a generation", i,
                                RK_ID_BYTES);
        }
    }
    return RK_OK;
}

/* Without locks held. */
static enum rk_status drop_copies(struct coordinator *coordinator,
                                  const Redknot__V1__DropRequest *request, uint32_t *ret_dropped,
                                  struct rk_error *error)
{
    struct index_drops drops = {0};
    enum rk_status status = RK_OK;
    uint32_t dropped = 0;

    (void)pthread_mutex_lock(&coordinator->write_lock);
    (void)pthread_mutex_lock(&coordinator->index_lock);
    for (size_t i = 0; status == RK_OK && i < request->n_copies; i++) {
        status = drop_copy(coordinator, request->copies[i], &drops, &dropped);
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    status = status == RK_OK ? coordinator_flush(coordinator, false, error) : out_of_memory(error);
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    coordinator_send_drops(coordinator, &drops, DROP_MS);
    index_drops_free(&drops);
    *ret_dropped = dropped;
    return status;
}

/* ---- What is dropped ---- */

/* What a call asks for, checked. */
struct drop_query {
    const struct rk_id *ids;
    size_t num_ids;
    const char *label;                  /* "": by no label */
    const struct rk_salt_tag *salt_tag; /* NULL: by no tenant */
    bool all;
};

static enum rk_status check_drop(struct arena *arena, const Redknot__V1__DropRequest *request,
                                 struct drop_query *ret_query, struct rk_error *error)
{
    struct rk_id *ids = NULL;
    struct drop_query query = {
        .num_ids = request->n_segment_ids, .label = request->label, .all = request->all};
    enum rk_status status =
        coordinator_read_ids(arena, request->segment_ids, request->n_segment_ids, &ids, error);

    if (status != RK_OK) {
        return status;
    }
    query.ids = ids;
    if (request->salt_tag.len != 0) {
        struct rk_salt_tag *tag = arena_alloc(arena, 1, sizeof(*tag));

        if (tag == NULL) {
            return out_of_memory(error);
        }
        if (request->salt_tag.len != sizeof(tag->bytes)) {
            return rk_error_set(error, RK_ERR_INVALID, "a salt tag has %d bytes, not %zu",
                                RK_SALT_TAG_BYTES, request->salt_tag.len);
        }
        memcpy(tag->bytes, request->salt_tag.data, sizeof(tag->bytes));
        query.salt_tag = tag;
    }
    *ret_query = query;
    return RK_OK;
}

static bool named_by_query(const struct drop_query *query, const char *label,
                           const struct rk_origin *origin)
{
    return query->all || (query->label[0] != '\0' && strcmp(query->label, label) == 0) ||
           (query->salt_tag != NULL && rk_origin_known(origin) &&
            rk_salt_tag_equal(query->salt_tag, &origin->salt_tag));
}

/* Under index_lock. The next ones that a label, a tenant or `all` names. */
static enum rk_status find_named(struct coordinator *coordinator, const struct drop_query *query,
                                 struct index_ids *named)
{
    enum rk_status status = RK_OK;

    named->count = 0;
    for (const struct index_segment *segment = index_segments(coordinator->index);
         status == RK_OK && segment != NULL && named->count < DROP_BATCH_MAX;
         segment = segment->hh.next) {
        if (named_by_query(query, segment->label, &segment->origin)) {
            status = index_ids_add(named, &segment->id);
        }
    }
    return status;
}

static int compare_ids(const void *a, const void *b)
{
    return memcmp(a, b, sizeof(struct rk_id));
}

/* Puts under way whose id, segment or parent is dropped must be placed again. Under index_lock. */
static void drop_placed(struct coordinator *coordinator, const struct drop_query *query,
                        struct index_ids *dropped)
{
    struct placed *placed;

    if (dropped->count != 0) {
        qsort(dropped->items, dropped->count, sizeof(*dropped->items), compare_ids);
    }
    DL_FOREACH (coordinator->placed.oldest, placed) {
        const struct rk_id *names[3] = {&placed->id, &placed->origin.alone, &placed->origin.parent};

        placed->unwanted =
            placed->unwanted || named_by_query(query, placed->label, &placed->origin);
        for (size_t i = 0; i < 3 && !placed->unwanted && dropped->count != 0; i++) {
            placed->unwanted = bsearch(names[i], dropped->items, dropped->count,
                                       sizeof(*dropped->items), compare_ids) != NULL;
        }
    }
}

struct drop_result {
    uint32_t named;
    uint64_t dropped; /* named ones and chains */
};

/* Some ids with all that stems from them. Under write_lock. */
static enum rk_status drop_ids(struct coordinator *coordinator, const struct drop_query *query,
                               const struct rk_id *ids, size_t count, struct drop_result *result,
                               struct rk_error *error)
{
    uint64_t before;
    struct index_drops drops = {0};
    struct index_ids dropped = {0};
    enum rk_status status = RK_OK;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    before = index_num_segments(coordinator->index);
    for (size_t i = 0; status == RK_OK && i < count; i++) {
        bool known = false;

        /* Also what is placed now, but not yet committed, is not wanted any more. */
        status = index_kin_drop(coordinator->index, &ids[i], coordinator->generation_next - 1,
                                rk_clock_ns(), &drops, &dropped, &known);
        result->named += known;
    }
    drop_placed(coordinator, query, &dropped);
    result->dropped += before - index_num_segments(coordinator->index);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (status != RK_OK) {
        (void)out_of_memory(error);
    } else {
        status = coordinator_flush(coordinator, true, error);
    }
    /* No lock of ours is held while stores are told. */
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    coordinator_send_drops(coordinator, &drops, DROP_MS);
    (void)pthread_mutex_lock(&coordinator->write_lock);
    index_drops_free(&drops);
    index_ids_free(&dropped);
    return status;
}

/* Under write_lock, which is given up between batches. */
static enum rk_status drop_named(struct coordinator *coordinator, const struct drop_query *query,
                                 struct drop_result *result, struct rk_error *error)
{
    struct index_ids named = {0};
    enum rk_status status = RK_OK;

    if (query->all) { /* At once and for good, however long it takes to clear the tables. */
        status = coordinator_drop_generations(coordinator, error);
    } else if (query->label[0] == '\0' && query->salt_tag == NULL) {
        return RK_OK;
    }
    do {
        named.count = 0;
        if (status == RK_OK) {
            (void)pthread_mutex_lock(&coordinator->index_lock);
            status = find_named(coordinator, query, &named);
            (void)pthread_mutex_unlock(&coordinator->index_lock);
            status = status == RK_OK ? RK_OK : out_of_memory(error);
        }
        if (status == RK_OK) {
            status = drop_ids(coordinator, query, named.items, named.count, result, error);
        }
    } while (status == RK_OK && named.count != 0);
    index_ids_free(&named);
    return status;
}

enum rk_status coordinator_drop(struct coordinator *coordinator, struct arena *arena,
                                const ProtobufCMessage *message, ProtobufCMessage **ret_reply,
                                struct rk_error *error)
{
    const Redknot__V1__DropRequest *request = (const Redknot__V1__DropRequest *)message;
    Redknot__V1__DropReply *reply = arena_alloc(arena, 1, sizeof(*reply));
    struct drop_result result = {0};
    struct drop_query query;
    uint32_t copies = 0;
    enum rk_status status = check_drop(arena, request, &query, error);

    if (status == RK_OK) {
        status = check_copies(request, error);
    }
    if (status == RK_OK && reply == NULL) {
        status = out_of_memory(error);
    }
    if (status == RK_OK && request->n_copies != 0) {
        status = drop_copies(coordinator, request, &copies, error);
    }
    if (status != RK_OK) {
        return status;
    }
    (void)pthread_mutex_lock(&coordinator->write_lock);
    status = drop_ids(coordinator, &query, query.ids, query.num_ids, &result, error);
    if (status == RK_OK) {
        status = drop_named(coordinator, &query, &result, error);
    }
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    redknot__v1__drop_reply__init(reply);
    reply->dropped = result.named;
    reply->copies = copies;
    reply->chains = result.dropped > result.named ? result.dropped - result.named : 0;
    *ret_reply = &reply->base;
    return status;
}
