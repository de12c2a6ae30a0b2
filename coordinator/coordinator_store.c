#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/record.h"

#include <string.h>
#include <time.h>

/* Generations are reserved on disk by blocks: one synced write for so many puts. */
#define GENERATION_BLOCK 4096u
/* A database that is lost and made anew begins beyond what the old one handed out: with the
 * time in seconds above 20 bits, unless it placed more than a million segments a second. */
#define GENERATION_TIME_SHIFT 20
#define GENERATION_SLACK_S    (UINT64_C(100) * 366 * 86400)
#define FLUSH_BATCH           512u

static const char format_key[] = "m/format";
static const char epoch_key[] = "m/epoch";
static const char generation_key[] = "m/generation";
static const char floor_key[] = "m/floor";

#define KEY(literal) (literal), (sizeof(literal) - 1)

static enum rk_status out_of_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for metadata");
}

static enum rk_status put_message(struct coordinator *coordinator, const void *key,
                                  size_t key_bytes, const ProtobufCMessage *message, bool synced,
                                  struct rk_error *error)
{
    struct metadata_change change = {.key = key, .key_bytes = key_bytes};
    void *data = record_pack(message, &change.value_bytes);
    enum rk_status status;

    if (data == NULL) {
        return out_of_memory(error);
    }
    change.value = data;
    status = coordinator->ops->write(coordinator->metadata, &change, 1, synced, error);
    rk_free(data);
    return status;
}

static enum rk_status put_counter(struct coordinator *coordinator, const void *key,
                                  size_t key_bytes, uint64_t value, struct rk_error *error)
{
    Redknot__Coordinator__V1__CounterRecord record = REDKNOT__COORDINATOR__V1__COUNTER_RECORD__INIT;

    record.value = value;
    return put_message(coordinator, key, key_bytes, &record.base, true, error);
}

static enum rk_status corrupt(struct coordinator *coordinator, struct rk_error *error,
                              const char *what)
{
    return rk_error_set(error, RK_ERR_CORRUPT,
                        "the metadata database %s is damaged: %s; move it away, store nodes "
                        "announce what they hold",
                        coordinator->options.data_dir, what);
}

/* 0 when the key is not there. */
static enum rk_status get_counter(struct coordinator *coordinator, const void *key,
                                  size_t key_bytes, uint64_t *ret_value, struct rk_error *error)
{
    void *data = NULL;
    size_t bytes = 0;
    Redknot__Coordinator__V1__CounterRecord *record;
    enum rk_status status =
        coordinator->ops->get(coordinator->metadata, key, key_bytes, &data, &bytes, error);

    if (status == RK_ERR_NOT_FOUND) {
        *ret_value = 0;
        return RK_OK;
    }
    if (status != RK_OK) {
        return status;
    }
    record = (Redknot__Coordinator__V1__CounterRecord *)record_unpack(
        &redknot__coordinator__v1__counter_record__descriptor, data, bytes);
    rk_free(data);
    if (record == NULL || record->value == 0) {
        record_free(record == NULL ? NULL : &record->base);
        return corrupt(coordinator, error, "a counter is unreadable");
    }
    *ret_value = record->value;
    record_free(&record->base);
    return RK_OK;
}

/* ---- Generations ---- */

static enum rk_status reserve_generations(struct coordinator *coordinator, uint64_t begin,
                                          struct rk_error *error)
{
    uint64_t limit = begin + GENERATION_BLOCK;
    enum rk_status status;

    if (limit >= RECORD_GENERATION_MAX) {
        return rk_error_set(error, RK_ERR_INTERNAL, "the generation counter is used up");
    }
    status = put_counter(coordinator, KEY(generation_key), limit, error);
    if (status == RK_OK) {
        coordinator->generation_next = begin;
        coordinator->generation_limit = limit;
    }
    return status;
}

enum rk_status coordinator_next_generation(struct coordinator *coordinator,
                                           uint64_t *ret_generation, struct rk_error *error)
{
    if (coordinator->generation_next == coordinator->generation_limit) {
        enum rk_status status =
            reserve_generations(coordinator, coordinator->generation_next, error);

        if (status != RK_OK) {
            return status;
        }
    }
    *ret_generation = coordinator->generation_next++;
    return RK_OK;
}

enum rk_status coordinator_skip_generation(struct coordinator *coordinator, uint64_t generation,
                                           struct rk_error *error)
{
    enum rk_status status;

    if (generation < coordinator->generation_next) {
        return RK_OK;
    }
    status = reserve_generations(coordinator, generation + 1, error);
    if (status != RK_OK) { /* The next one that is handed out reserves first. */
        coordinator->generation_next = generation + 1;
        coordinator->generation_limit = generation + 1;
    }
    return status;
}

/* A new database counts from the time in seconds, and no counter gets ahead of that; a clock that
 * was wrong, or ours that is, may put it years off, hence a century. It does not follow what was
 * announced: otherwise each announcement could move it further. */
static uint64_t ceiling_by_time(void)
{
    return ((uint64_t)time(NULL) + GENERATION_SLACK_S) << GENERATION_TIME_SHIFT;
}

uint64_t coordinator_generation_ceiling(const struct coordinator *coordinator)
{
    uint64_t ceiling = ceiling_by_time();
    uint64_t handed_out = coordinator->generation_next - 1;

    return handed_out > ceiling ? handed_out : ceiling;
}

enum rk_status coordinator_drop_generations(struct coordinator *coordinator, struct rk_error *error)
{
    uint64_t newest = coordinator->generation_next - 1;
    enum rk_status status = put_counter(coordinator, KEY(floor_key), newest, error);

    if (status == RK_OK) {
        (void)pthread_mutex_lock(&coordinator->index_lock);
        index_floor_set(coordinator->index, newest);
        (void)pthread_mutex_unlock(&coordinator->index_lock);
    }
    return status;
}

/* ---- Loading ---- */

static enum rk_status any_key(const void *key, size_t key_bytes, const void *value,
                              size_t value_bytes, void *context, struct rk_error *error)
{
    (void)key;
    (void)key_bytes;
    (void)value;
    (void)value_bytes;
    (void)context;
    (void)error;
    return RK_ERR_EXISTS; /* One is enough. */
}

static enum rk_status check_format(struct coordinator *coordinator, struct rk_error *error)
{
    Redknot__Coordinator__V1__FormatRecord record = REDKNOT__COORDINATOR__V1__FORMAT_RECORD__INIT;
    Redknot__Coordinator__V1__FormatRecord *found;
    const char *directory = coordinator->options.data_dir;
    void *data = NULL;
    size_t bytes = 0;
    enum rk_status status =
        coordinator->ops->get(coordinator->metadata, KEY(format_key), &data, &bytes, error);

    if (status == RK_ERR_NOT_FOUND) {
        status = coordinator->ops->scan(coordinator->metadata, "", 0, any_key, NULL, error);
        if (status == RK_ERR_EXISTS) {
            return rk_error_set(error, RK_ERR_CORRUPT,
                                "%s holds a database of another program; choose another --data",
                                directory);
        }
        record.magic = (char *)(uintptr_t)RECORD_FORMAT_MAGIC;
        record.version = RECORD_FORMAT;
        return status != RK_OK
                   ? status
                   : put_message(coordinator, KEY(format_key), &record.base, true, error);
    }
    if (status != RK_OK) {
        return status;
    }
    found = (Redknot__Coordinator__V1__FormatRecord *)record_unpack(
        &redknot__coordinator__v1__format_record__descriptor, data, bytes);
    rk_free(data);
    if (found == NULL || strcmp(found->magic, RECORD_FORMAT_MAGIC) != 0) {
        status = rk_error_set(error, RK_ERR_CORRUPT,
                              "%s holds a database of another program; choose another --data",
                              directory);
    } else if (found->version != RECORD_FORMAT) {
        status = rk_error_set(error, RK_ERR_UNSUPPORTED,
                              "%s has format %u, this version reads %u; use the version that wrote "
                              "it, or move it away",
                              directory, found->version, RECORD_FORMAT);
    }
    record_free(found == NULL ? NULL : &found->base);
    return status;
}

static enum rk_status load_node(const void *key, size_t key_bytes, const void *value,
                                size_t value_bytes, void *context, struct rk_error *error)
{
    struct coordinator *coordinator = context;
    Redknot__V1__NodeInfo *info = (Redknot__V1__NodeInfo *)record_unpack(
        &redknot__v1__node_info__descriptor, value, value_bytes);
    enum rk_status status;

    (void)key;
    (void)key_bytes;
    if (info == NULL || record_check_node(info, NULL) != RK_OK) {
        status = corrupt(coordinator, error, "a node's record is unreadable");
    } else {
        status = index_node_load(coordinator->index, info);
        if (status == RK_ERR_FULL) {
            status = RK_OK; /* It registers again if it still lives. */
        }
    }
    record_free(info == NULL ? NULL : &info->base);
    return status == RK_ERR_NO_MEMORY ? out_of_memory(error) : status;
}

/* The incarnation of a store that was left out of a list by a former process of ours. */
static enum rk_status load_left_out(const void *key, size_t key_bytes, const void *value,
                                    size_t value_bytes, void *context, struct rk_error *error)
{
    struct coordinator *coordinator = context;
    Redknot__Coordinator__V1__CounterRecord *record =
        (Redknot__Coordinator__V1__CounterRecord *)record_unpack(
            &redknot__coordinator__v1__counter_record__descriptor, value, value_bytes);
    char node_id[RECORD_NODE_ID_MAX + 1];
    struct index_node *node;

    if (record == NULL || key_bytes < 2 || key_bytes - 2 > RECORD_NODE_ID_MAX) {
        record_free(record == NULL ? NULL : &record->base);
        return corrupt(coordinator, error, "the record of a store that was left out is unreadable");
    }
    memcpy(node_id, (const char *)key + 2, key_bytes - 2);
    node_id[key_bytes - 2] = '\0';
    node = index_node_find(coordinator->index, node_id);
    if (node != NULL && node->info->incarnation == record->value) {
        node->values_old = true;
    }
    record_free(&record->base);
    return RK_OK;
}

/* Somebody announced it to a former version of ours, which believed it. The journal, at the end of
 * loading, takes the record away. */
static void forget_implausible(struct coordinator *coordinator, char kind, const struct rk_id *id,
                               uint64_t generation)
{
    char hex[RK_ID_HEX_BYTES];

    rk_id_to_hex(id, hex);
    RK_LOG_WARN("record_implausible", "kind=%c segment=%s generation=%llu action=forgotten", kind,
                hex, (unsigned long long)generation);
    index_journal_add(coordinator->index, kind, id);
}

static enum rk_status load_segment(const void *key, size_t key_bytes, const void *value,
                                   size_t value_bytes, void *context, struct rk_error *error)
{
    struct coordinator *coordinator = context;
    struct record_segment segment = {0};
    struct index_drops drops = {0};
    enum rk_status status = record_decode_segment(value, value_bytes, &segment);

    if (status == RK_OK &&
        (key_bytes != RECORD_KEY_BYTES ||
         memcmp((const char *)key + 2, segment.spec.id.bytes, RK_ID_BYTES) != 0)) {
        status = RK_ERR_CORRUPT;
    }
    if (status == RK_OK && segment.spec.generation > coordinator_generation_ceiling(coordinator)) {
        forget_implausible(coordinator, 's', &segment.spec.id, segment.spec.generation);
    } else if (status == RK_OK) {
        if (segment.spec.generation > coordinator->generation_seen) {
            coordinator->generation_seen = segment.spec.generation;
        }
        status = index_segment_put(coordinator->index, &segment.spec, rk_clock_ns(), &drops);
    }
    index_drops_free(&drops); /* Over a smaller --segments-max: tombstones tell the stores. */
    record_segment_free(&segment);
    if (status == RK_ERR_CORRUPT) {
        return corrupt(coordinator, error, "a segment's record is unreadable");
    }
    return status == RK_ERR_NO_MEMORY ? out_of_memory(error) : status;
}

static enum rk_status load_tombstone(const void *key, size_t key_bytes, const void *value,
                                     size_t value_bytes, void *context, struct rk_error *error)
{
    struct coordinator *coordinator = context;
    Redknot__Coordinator__V1__TombstoneRecord *record =
        (Redknot__Coordinator__V1__TombstoneRecord *)record_unpack(
            &redknot__coordinator__v1__tombstone_record__descriptor, value, value_bytes);
    enum rk_status status = RK_ERR_CORRUPT;
    struct rk_id id;

    if (record != NULL && key_bytes == RECORD_KEY_BYTES) {
        memcpy(id.bytes, (const char *)key + 2, RK_ID_BYTES);
        status = RK_OK;
        if (record->generation > coordinator_generation_ceiling(coordinator)) {
            forget_implausible(coordinator, 'd', &id, record->generation);
        } else {
            status = index_tombstone_put(coordinator->index, &id, record->generation);
        }
    }
    record_free(record == NULL ? NULL : &record->base);
    if (status == RK_ERR_CORRUPT) {
        return corrupt(coordinator, error, "a tombstone is unreadable");
    }
    return status == RK_ERR_NO_MEMORY ? out_of_memory(error) : status;
}

/* 0: there is none that can be believed. */
static enum rk_status load_generation(struct coordinator *coordinator, const void *key,
                                      size_t key_bytes, uint64_t *ret_value, struct rk_error *error)
{
    uint64_t value = 0;
    enum rk_status status = get_counter(coordinator, key, key_bytes, &value, error);

    if (status == RK_OK && value > ceiling_by_time() + GENERATION_BLOCK) {
        RK_LOG_WARN("counter_implausible", "key=%.*s value=%llu action=%q", (int)key_bytes,
                    (const char *)key, (unsigned long long)value,
                    "it is ignored, and counting goes on from the time");
        value = 0;
    }
    *ret_value = value;
    return status;
}

static enum rk_status load_counters(struct coordinator *coordinator, struct rk_error *error)
{
    uint64_t now = (uint64_t)time(NULL);
    uint64_t epoch = 0;
    uint64_t generation = 0;
    uint64_t floor = 0;
    enum rk_status status = get_counter(coordinator, KEY(epoch_key), &epoch, error);

    if (status == RK_OK) {
        status = load_generation(coordinator, KEY(generation_key), &generation, error);
    }
    if (status == RK_OK) {
        status = load_generation(coordinator, KEY(floor_key), &floor, error);
        index_floor_set(coordinator->index, floor);
    }
    if (status == RK_OK) {
        /* Also higher than that of a database that was lost. */
        coordinator->epoch = epoch + 1 > now ? epoch + 1 : now;
        status = put_counter(coordinator, KEY(epoch_key), coordinator->epoch, error);
    }
    if (status == RK_OK) {
        status = reserve_generations(
            coordinator, generation != 0 ? generation : now << GENERATION_TIME_SHIFT, error);
    }
    return status;
}

/* Tokens of announcements that did not come to their end. */
struct ahead {
    struct coordinator *coordinator;
    struct index_ids ids;
};

static enum rk_status load_ahead(const void *key, size_t key_bytes, const void *value,
                                 size_t value_bytes, void *context, struct rk_error *error)
{
    struct ahead *ahead = context;
    struct rk_id id;

    (void)value;
    (void)value_bytes;
    if (key_bytes != RECORD_KEY_BYTES) {
        return corrupt(ahead->coordinator, error, "a mark of tokens is unreadable");
    }
    memcpy(id.bytes, (const char *)key + 2, RK_ID_BYTES);
    return index_ids_add(&ahead->ids, &id) == RK_OK ? RK_OK : out_of_memory(error);
}

enum rk_status coordinator_load(struct coordinator *coordinator, struct rk_error *error)
{
    static const struct {
        const char *prefix;
        metadata_visit visit;
    } tables[] = {
        {"n/", load_node}, {"o/", load_left_out}, {"d/", load_tombstone}, {"s/", load_segment}};
    struct ahead ahead = {.coordinator = coordinator};
    enum rk_status status = check_format(coordinator, error);

    if (status == RK_OK) {
        status = load_counters(coordinator, error);
    }
    for (size_t i = 0; status == RK_OK && i < sizeof(tables) / sizeof(tables[0]); i++) {
        status = coordinator->ops->scan(coordinator->metadata, tables[i].prefix, 2, tables[i].visit,
                                        coordinator, error);
    }
    if (status == RK_OK) {
        status = coordinator_skip_generation(coordinator, coordinator->generation_seen, error);
    }
    if (status == RK_OK) {
        status = coordinator->ops->scan(coordinator->metadata, "a/", 2, load_ahead, &ahead, error);
    }
    if (status == RK_OK) {
        status = coordinator_flush(coordinator, false, error);
    }
    if (status == RK_OK && ahead.ids.count != 0) {
        coordinator_settle_tokens(coordinator, &ahead.ids);
    }
    index_ids_free(&ahead.ids);
    return status;
}

/* ---- Saving ---- */

struct flush_batch {
    struct index_journal_entry entries[FLUSH_BATCH];
    struct metadata_change changes[2 * FLUSH_BATCH];
    uint8_t keys[2 * FLUSH_BATCH][RECORD_KEY_BYTES];
    void *values[FLUSH_BATCH];
    size_t num_changes;
};

static void add_change(struct flush_batch *batch, char kind, const struct rk_id *id,
                       const void *value, size_t value_bytes)
{
    struct metadata_change *change = &batch->changes[batch->num_changes];

    record_key(kind, id, batch->keys[batch->num_changes]);
    *change = (struct metadata_change){
        .key = batch->keys[batch->num_changes],
        .key_bytes = RECORD_KEY_BYTES,
        .value = value,
        .value_bytes = value_bytes,
    };
    batch->num_changes++;
}

/* The present state of what the journal names. Under index_lock. */
static enum rk_status encode_entry(struct coordinator *coordinator, struct flush_batch *batch,
                                   size_t i)
{
    const struct rk_id *id = &batch->entries[i].id;
    size_t bytes = 0;

    if (batch->entries[i].kind == 's') {
        const struct index_segment *segment = index_segment_find(coordinator->index, id);
        enum rk_status status;

        if (segment == NULL) {
            add_change(batch, 's', id, NULL, 0);
            add_change(batch, 't', id, NULL, 0);
            return RK_OK;
        }
        status = record_encode_segment(segment, &batch->values[i], &bytes);
        if (status != RK_OK) {
            return status;
        }
    } else {
        Redknot__Coordinator__V1__TombstoneRecord record =
            REDKNOT__COORDINATOR__V1__TOMBSTONE_RECORD__INIT;

        record.generation = index_tombstone_generation(coordinator->index, id);
        if (record.generation == 0) {
            add_change(batch, 'd', id, NULL, 0);
            return RK_OK;
        }
        batch->values[i] = record_pack(&record.base, &bytes);
        if (batch->values[i] == NULL) {
            return RK_ERR_NO_MEMORY;
        }
    }
    add_change(batch, batch->entries[i].kind, id, batch->values[i], bytes);
    return RK_OK;
}

static enum rk_status flush_some(struct coordinator *coordinator, struct flush_batch *batch,
                                 bool synced, size_t *ret_count, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    size_t count;

    memset(batch->values, 0, sizeof(batch->values));
    batch->num_changes = 0;
    (void)pthread_mutex_lock(&coordinator->index_lock);
    count = index_journal_take(coordinator->index, batch->entries, FLUSH_BATCH);
    for (size_t i = 0; status == RK_OK && i < count; i++) {
        status = encode_entry(coordinator, batch, i);
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (status != RK_OK) {
        (void)out_of_memory(error);
    } else if (count != 0) {
        status = coordinator->ops->write(coordinator->metadata, batch->changes, batch->num_changes,
                                         synced, error);
    }
    if (status != RK_OK) {
        /* Back into the journal: the sweeper tries again. */
        (void)pthread_mutex_lock(&coordinator->index_lock);
        for (size_t i = 0; i < count; i++) {
            index_journal_add(coordinator->index, batch->entries[i].kind, &batch->entries[i].id);
        }
        (void)pthread_mutex_unlock(&coordinator->index_lock);
    }
    for (size_t i = 0; i < count; i++) {
        rk_free(batch->values[i]);
    }
    *ret_count = count;
    return status;
}

enum rk_status coordinator_flush(struct coordinator *coordinator, bool synced,
                                 struct rk_error *error)
{
    struct flush_batch *batch = rk_alloc(sizeof(*batch));
    enum rk_status status = RK_OK;
    size_t count = 1;

    if (batch == NULL) {
        return out_of_memory(error);
    }
    while (status == RK_OK && count != 0) {
        status = flush_some(coordinator, batch, synced, &count, error);
    }
    rk_free(batch);
    return status;
}

void coordinator_flush_later(struct coordinator *coordinator)
{
    struct rk_error error = {0};

    if (coordinator_flush(coordinator, false, &error) != RK_OK) {
        RK_LOG_DEBUG("metadata_behind", "reason=%q", error.text);
    }
}

#define NODE_KEY_MAX (2 + RECORD_NODE_ID_MAX)

/* Returns its length. */
static size_t node_key(char kind, const char *node_id, char ret_key[NODE_KEY_MAX])
{
    size_t bytes = strlen(node_id);

    RK_ASSERT(bytes <= RECORD_NODE_ID_MAX);
    ret_key[0] = kind;
    ret_key[1] = '/';
    memcpy(ret_key + 2, node_id, bytes);
    return 2 + bytes;
}

enum rk_status coordinator_save_node(struct coordinator *coordinator,
                                     const Redknot__V1__NodeInfo *info, struct rk_error *error)
{
    char key[NODE_KEY_MAX];
    size_t bytes = node_key('n', info->node_id, key);

    return put_message(coordinator, key, bytes, &info->base, false, error);
}

enum rk_status coordinator_save_left_out(struct coordinator *coordinator, const char *node_id,
                                         uint64_t incarnation, struct rk_error *error)
{
    char key[NODE_KEY_MAX];
    size_t bytes = node_key('o', node_id, key);

    return put_counter(coordinator, key, bytes, incarnation, error);
}

void coordinator_forget_left_out(struct coordinator *coordinator, const char *node_id)
{
    char key[NODE_KEY_MAX];
    const struct metadata_change change = {.key = key, .key_bytes = node_key('o', node_id, key)};
    struct rk_error error = {0};

    if (coordinator->ops->write(coordinator->metadata, &change, 1, false, &error) != RK_OK) {
        RK_LOG_DEBUG("metadata_behind", "reason=%q", error.text);
    }
}

/* An empty answer means no tokens, so an empty list needs no record. */
static void tokens_record(const uint32_t *token_ids, size_t num_tokens,
                          Redknot__Coordinator__V1__TokensRecord *ret_record)
{
    redknot__coordinator__v1__tokens_record__init(ret_record);
    ret_record->n_token_ids = num_tokens;
    ret_record->token_ids = (uint32_t *)(uintptr_t)token_ids;
}

/* Each with a mark beside it, so that a crash before its segment is known leaves none behind. */
enum rk_status coordinator_save_tokens_ahead(struct coordinator *coordinator,
                                             const struct coordinator_tokens *tokens, size_t count,
                                             struct rk_error *error)
{
    struct metadata_change *changes = rk_alloc_zero(2 * count, sizeof(*changes));
    uint8_t(*keys)[RECORD_KEY_BYTES] = rk_alloc_zero(2 * count, sizeof(*keys));
    enum rk_status status = changes == NULL || keys == NULL ? RK_ERR_NO_MEMORY : RK_OK;
    size_t packed = 0;

    for (; status == RK_OK && packed < count; packed++) {
        struct metadata_change *change = &changes[2 * packed];
        Redknot__Coordinator__V1__TokensRecord record;

        record_key('t', &tokens[packed].id, keys[2 * packed]);
        record_key('a', &tokens[packed].id, keys[2 * packed + 1]);
        tokens_record(tokens[packed].token_ids, tokens[packed].num_tokens, &record);
        change[0].key = keys[2 * packed];
        change[0].key_bytes = RECORD_KEY_BYTES;
        change[0].value = record_pack(&record.base, &change[0].value_bytes);
        change[1].key = keys[2 * packed + 1];
        change[1].key_bytes = RECORD_KEY_BYTES;
        change[1].value = "";
        status = change[0].value == NULL ? RK_ERR_NO_MEMORY : RK_OK;
    }
    status = status == RK_OK
                 ? coordinator->ops->write(coordinator->metadata, changes, 2 * count, false, error)
                 : out_of_memory(error);
    for (size_t i = 0; i < packed; i++) {
        rk_free((void *)(uintptr_t)changes[2 * i].value);
    }
    rk_free(changes);
    rk_free(keys);
    return status;
}

/* Takes the marks away again, and the tokens of what is not known after all. */
static enum rk_status settle_some(struct coordinator *coordinator, struct flush_batch *batch,
                                  const struct rk_id *ids, size_t count, struct rk_error *error)
{
    batch->num_changes = 0;
    (void)pthread_mutex_lock(&coordinator->index_lock);
    for (size_t i = 0; i < count; i++) {
        const struct index_segment *segment = index_segment_find(coordinator->index, &ids[i]);

        add_change(batch, 'a', &ids[i], NULL, 0);
        if (segment == NULL || !segment->has_tokens) {
            add_change(batch, 't', &ids[i], NULL, 0);
        }
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    return coordinator->ops->write(coordinator->metadata, batch->changes, batch->num_changes, false,
                                   error);
}

void coordinator_settle_tokens(struct coordinator *coordinator, const struct index_ids *ids)
{
    struct flush_batch *batch = rk_alloc(sizeof(*batch));
    struct rk_error error = {0};
    /* The segments first: with them the tokens are not left behind. */
    enum rk_status status = coordinator_flush(coordinator, false, &error);

    if (batch == NULL) {
        status = out_of_memory(&error);
    }
    for (size_t begin = 0; status == RK_OK && begin < ids->count; begin += FLUSH_BATCH) {
        size_t left = ids->count - begin;

        status = settle_some(coordinator, batch, ids->items + begin,
                             left < FLUSH_BATCH ? left : FLUSH_BATCH, &error);
    }
    if (status != RK_OK) { /* The next start does it. */
        RK_LOG_WARN("metadata_behind", "reason=%q", error.text);
    }
    rk_free(batch);
}

enum rk_status coordinator_save_commit(struct coordinator *coordinator,
                                       const struct segment_spec *spec, const uint32_t *token_ids,
                                       struct rk_error *error)
{
    Redknot__Coordinator__V1__TokensRecord record;
    uint8_t keys[2][RECORD_KEY_BYTES];
    struct metadata_change changes[2] = {
        {.key = keys[0], .key_bytes = RECORD_KEY_BYTES},
        {.key = keys[1], .key_bytes = RECORD_KEY_BYTES},
    };
    void *segment = NULL;
    void *tokens = NULL;
    enum rk_status status = record_encode_spec(spec, &segment, &changes[0].value_bytes);

    record_key('s', &spec->id, keys[0]);
    record_key('t', &spec->id, keys[1]);
    if (status == RK_OK && spec->has_tokens) {
        tokens_record(token_ids, spec->num_tokens, &record);
        tokens = record_pack(&record.base, &changes[1].value_bytes);
        status = tokens == NULL ? RK_ERR_NO_MEMORY : RK_OK;
    }
    if (status == RK_OK) {
        changes[0].value = segment;
        changes[1].value = tokens; /* NULL removes those of an older generation. */
        status = coordinator->ops->write(coordinator->metadata, changes, 2, true, error);
    } else {
        (void)out_of_memory(error);
    }
    rk_free(tokens);
    rk_free(segment);
    return status;
}

enum rk_status coordinator_read_tokens(struct coordinator *coordinator, struct arena *arena,
                                       const struct rk_id *id, uint32_t **ret_token_ids,
                                       size_t *ret_count, struct rk_error *error)
{
    Redknot__Coordinator__V1__TokensRecord *record;
    uint8_t key[RECORD_KEY_BYTES];
    void *data = NULL;
    size_t bytes = 0;
    uint32_t *copy = NULL;
    enum rk_status status;

    record_key('t', id, key);
    status = coordinator->ops->get(coordinator->metadata, key, sizeof(key), &data, &bytes, error);
    if (status != RK_OK) {
        return status;
    }
    record = (Redknot__Coordinator__V1__TokensRecord *)record_unpack(
        &redknot__coordinator__v1__tokens_record__descriptor, data, bytes);
    rk_free(data);
    if (record == NULL) {
        return corrupt(coordinator, error, "a list of tokens is unreadable");
    }
    copy = arena_alloc(arena, record->n_token_ids, sizeof(*copy));
    if (copy != NULL && record->n_token_ids != 0) {
        memcpy(copy, record->token_ids, record->n_token_ids * sizeof(*copy));
    }
    *ret_count = record->n_token_ids;
    record_free(&record->base);
    if (copy == NULL) {
        return out_of_memory(error);
    }
    *ret_token_ids = copy;
    return RK_OK;
}
