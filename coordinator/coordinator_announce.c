/*
 * Announce: what a store holds.
 *
 * Token ids, which are most of it, go to the database as they come; a few hundred bytes of each
 * shard are kept until the end, when all of it takes effect. So a stream that breaks off, or that
 * nobody can believe, changes nothing. Each message is a sign of life.
 */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "coordinator/coordinator_internal.h"
#include "coordinator/placement.h"
#include "coordinator/record.h"

#include <string.h>

#define ANNOUNCE_DROPS_MS  2000
#define ANNOUNCE_SLICE     4096u   /* shards that take effect in one hold of the index lock */
#define ANNOUNCE_DROPS_MAX 262144u /* of one reply, which has to fit into a message */
#define ANNOUNCE_LABEL_MAX ((size_t)256 << 20) /* bytes of all labels */

struct announcement {
    struct coordinator *coordinator;
    char *node_id; /* NULL: no message has come */
    uint64_t incarnation;
    uint64_t since; /* changes of the index after this one win over what is announced */
    uint64_t ceiling;
    uint64_t capacity_bytes; /* of the node; 0: not told */
    size_t shards_max;
    struct index_announced *shards;
    size_t num_shards;
    size_t shards_capacity;
    size_t label_bytes;
    struct index_ids saved; /* whose tokens were written ahead */
    size_t num_refused;     /* entries that no coordinator placed like this */
    const char *refused_why;
};

static enum rk_status out_of_memory(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NO_MEMORY, "the coordinator is out of memory");
}

static void announcement_free(struct announcement *announcement)
{
    for (size_t i = 0; i < announcement->num_shards; i++) {
        rk_free(announcement->shards[i].label);
    }
    rk_free(announcement->shards);
    rk_free(announcement->node_id);
    index_ids_free(&announcement->saved);
}

/* ---- One message ---- */

static enum rk_status not_registered(const char *node_id, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_NOT_FOUND,
                        "node %s is not registered with this incarnation; Register first", node_id);
}

/* What the first message says holds for all. */
static enum rk_status begin(struct announcement *announcement,
                            const Redknot__V1__AnnounceRequest *message, struct rk_error *error)
{
    struct coordinator *coordinator = announcement->coordinator;
    uint64_t changes;

    if (strnlen(message->node_id, RECORD_NODE_ID_MAX + 1) > RECORD_NODE_ID_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a node id has 1 to %u bytes",
                            RECORD_NODE_ID_MAX);
    }
    announcement->node_id = rk_alloc_string(message->node_id);
    if (announcement->node_id == NULL) {
        return out_of_memory(error);
    }
    announcement->incarnation = message->incarnation;
    if (message->epoch == 0) {
        return RK_OK; /* An older store: the mark is the beginning of the stream. */
    }
    if (message->epoch != coordinator->epoch) {
        return not_registered(message->node_id, error);
    }
    (void)pthread_mutex_lock(&coordinator->index_lock);
    changes = index_changes(coordinator->index);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    if (message->mark == 0 || message->mark > changes) {
        return rk_error_set(error, RK_ERR_INVALID, "node %s announces with a mark of its own",
                            message->node_id);
    }
    announcement->since = message->mark;
    return RK_OK;
}

static enum rk_status reserve(struct announcement *announcement, size_t more)
{
    size_t capacity = announcement->shards_capacity == 0 ? 64 : announcement->shards_capacity;
    struct index_announced *grown;

    while (capacity < announcement->num_shards + more) {
        capacity *= 2;
    }
    if (capacity == announcement->shards_capacity) {
        return RK_OK;
    }
    grown = rk_alloc_resize(announcement->shards, capacity, sizeof(*grown));
    if (grown == NULL) {
        return RK_ERR_NO_MEMORY;
    }
    announcement->shards = grown;
    announcement->shards_capacity = capacity;
    return RK_OK;
}

static bool same_heads(const struct rk_head_range *a, const struct rk_head_range *b)
{
    return memcmp(a, b, sizeof(*a)) == 0;
}

/* NULL: it may be ours. Such an entry is a client's doing, who wrote to the store by himself: the
 * store is told to drop it, and the rest of what it announces is as good as ever. */
static const char *implausible(const struct announcement *announcement,
                               const struct index_announced *shard)
{
    struct rk_head_range heads;
    uint64_t bytes;

    if (shard->generation > announcement->ceiling) {
        return "a generation far above those that were handed out";
    }
    if (placement_num_shards(&shard->layout, shard->num_shards) != shard->num_shards) {
        return "more shards than layers";
    }
    heads = placement_heads(&shard->layout, shard->shard_index, shard->num_shards);
    if (!same_heads(&heads, &shard->heads)) {
        return "heads that are not those of its place in the segment";
    }
    bytes = rk_head_range_heads(&shard->heads) * (uint64_t)rk_kv_pages(shard->num_tokens) *
            rk_kv_page_bytes(&shard->layout);
    if (announcement->capacity_bytes != 0 && bytes > announcement->capacity_bytes) {
        return "more bytes than the store has";
    }
    return NULL;
}

static enum rk_status add_entry(struct announcement *announcement,
                                const Redknot__V1__AnnounceRequest__Entry *entry,
                                struct rk_error *error)
{
    struct index_announced *shard = &announcement->shards[announcement->num_shards];
    enum rk_status status = record_check_announced(entry, shard, error);
    const char *why;

    if (status != RK_OK) {
        return status;
    }
    announcement->label_bytes += strlen(entry->label);
    if (announcement->label_bytes > ANNOUNCE_LABEL_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "node %s announces labels of more than %zu MiB",
                            announcement->node_id, ANNOUNCE_LABEL_MAX >> 20);
    }
    if (entry->label[0] != '\0') {
        shard->label = rk_alloc_string(entry->label);
        if (shard->label == NULL) {
            return out_of_memory(error);
        }
    }
    announcement->num_shards++;
    why = implausible(announcement, shard);
    if (why != NULL) {
        shard->unwanted = true;
        announcement->num_refused++;
        announcement->refused_why = why;
    }
    return RK_OK;
}

static enum rk_status add_entries(struct announcement *announcement,
                                  const Redknot__V1__AnnounceRequest *message,
                                  struct rk_error *error)
{
    if (announcement->num_shards + message->n_entries > announcement->shards_max) {
        return rk_error_set(error, RK_ERR_TOO_LONG,
                            "node %s announces more than %zu shards; raise --segments-max",
                            announcement->node_id, announcement->shards_max);
    }
    if (reserve(announcement, message->n_entries) != RK_OK) {
        return out_of_memory(error);
    }
    for (size_t i = 0; i < message->n_entries; i++) {
        enum rk_status status = add_entry(announcement, message->entries[i], error);

        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}

/* A sign of life, and whether it is still the node that registered. */
static enum rk_status note_life(struct announcement *announcement, struct rk_error *error)
{
    struct coordinator *coordinator = announcement->coordinator;
    struct index_node *node;
    enum rk_status status = RK_OK;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = index_node_find(coordinator->index, announcement->node_id);
    if (node == NULL || node->info->incarnation != announcement->incarnation) {
        status = not_registered(announcement->node_id, error);
    } else {
        index_node_heard(coordinator->index, node, rk_clock_ns());
        announcement->capacity_bytes = node->info->capacity_bytes;
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    return status;
}

/* ---- Tokens, ahead of the end ---- */

/* Under index_lock. Nobody has them yet, and they will be wanted. */
static bool wants_tokens(struct coordinator *coordinator, const struct index_announced *shard)
{
    const struct index_segment *segment = index_segment_find(coordinator->index, &shard->id);

    return !shard->unwanted &&
           shard->generation > index_unwanted_generation(coordinator->index, &shard->id) &&
           (segment == NULL || !segment->has_tokens);
}

/* Without tokens a segment is still found, only its id alone cannot be computed again: a disk that
 * is full does not stop an announcement. */
static enum rk_status save_tokens(struct announcement *announcement,
                                  const Redknot__V1__AnnounceRequest *message, size_t first,
                                  struct rk_error *error)
{
    struct coordinator *coordinator = announcement->coordinator;
    struct coordinator_tokens *tokens = rk_alloc_zero(message->n_entries + 1, sizeof(*tokens));
    enum rk_status status = RK_OK;
    size_t count = 0;

    if (tokens == NULL) {
        return out_of_memory(error);
    }
    (void)pthread_mutex_lock(&coordinator->index_lock);
    for (size_t i = 0; i < message->n_entries; i++) {
        struct index_announced *shard = &announcement->shards[first + i];

        if (shard->has_tokens && wants_tokens(coordinator, shard)) {
            tokens[count++] = (struct coordinator_tokens){
                .id = shard->id,
                .token_ids = message->entries[i]->token_ids,
                .num_tokens = message->entries[i]->n_token_ids,
            };
        }
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    for (size_t i = 0; status == RK_OK && i < count; i++) {
        status = index_ids_add(&announcement->saved, &tokens[i].id);
    }
    if (status != RK_OK) {
        (void)out_of_memory(error);
    } else if (count != 0) {
        (void)pthread_mutex_lock(&coordinator->write_lock);
        if (coordinator_save_tokens_ahead(coordinator, tokens, count, NULL) != RK_OK) {
            for (size_t i = 0; i < message->n_entries; i++) {
                announcement->shards[first + i].has_tokens = false;
            }
        }
        (void)pthread_mutex_unlock(&coordinator->write_lock);
    }
    rk_free(tokens);
    return status;
}

static enum rk_status take_message(struct announcement *announcement,
                                   const Redknot__V1__AnnounceRequest *message,
                                   struct rk_error *error)
{
    size_t first = announcement->num_shards;
    enum rk_status status = RK_OK;

    if (announcement->node_id == NULL) {
        status = begin(announcement, message, error);
    } else if (strcmp(announcement->node_id, message->node_id) != 0 ||
               announcement->incarnation != message->incarnation) {
        status = rk_error_set(error, RK_ERR_INVALID, "one announcement names two nodes");
    }
    if (status == RK_OK) {
        status = note_life(announcement, error);
    }
    if (status == RK_OK) {
        status = add_entries(announcement, message, error);
    }
    if (status == RK_OK) {
        status = save_tokens(announcement, message, first, error);
    }
    return status;
}

static enum rk_status receive(struct rk_rpc_call *call, struct announcement *announcement,
                              struct rk_error *error)
{
    for (;;) {
        ProtobufCMessage *message = NULL;
        enum rk_status status =
            rk_rpc_call_recv(call, &redknot__v1__announce_request__descriptor, &message);

        if (status == RK_ERR_NOT_FOUND) {
            return RK_OK;
        }
        if (status != RK_OK) {
            return rk_error_set(error, status, "the announcement broke off: %s",
                                rk_status_text(status));
        }
        status = take_message(announcement, (const Redknot__V1__AnnounceRequest *)message, error);
        rk_rpc_message_free(message);
        if (status != RK_OK) {
            return status;
        }
    }
}

/* ---- The end ---- */

/* Under index_lock. NULL: it is another one by now. */
static struct index_node *find_node(struct announcement *announcement, struct rk_error *error)
{
    struct index_node *node =
        index_node_find(announcement->coordinator->index, announcement->node_id);

    if (node == NULL || node->info->incarnation != announcement->incarnation) {
        (void)not_registered(announcement->node_id, error);
        return NULL;
    }
    return node;
}

/* Under index_lock. */
static enum rk_status apply_slice(struct announcement *announcement, struct index_node *node,
                                  size_t begin, size_t end, struct index_drops *drops)
{
    struct coordinator *coordinator = announcement->coordinator;
    enum rk_status status = RK_OK;

    for (size_t i = begin; status == RK_OK && i < end; i++) {
        struct index_announced *shard = &announcement->shards[i];

        /* One whose put is between Place and Commit is wanted, but not yet visible. */
        if (!shard->unwanted &&
            placed_find(&coordinator->placed, &shard->id, shard->generation) == NULL) {
            status = index_announce(coordinator->index, node, shard, announcement->since,
                                    rk_clock_ns(), drops);
        }
    }
    return status;
}

/* Adds what it holds, slice by slice, so that others' heartbeats get in between; then takes away
 * what it does not hold any more. Under write_lock. */
static enum rk_status apply(struct announcement *announcement, struct index_drops *drops,
                            struct rk_error *error)
{
    struct coordinator *coordinator = announcement->coordinator;
    enum rk_status status = RK_OK;
    bool last = false;

    for (size_t begin = 0; status == RK_OK && !last;) {
        size_t left = announcement->num_shards - begin;
        size_t end = begin + (left < ANNOUNCE_SLICE ? left : ANNOUNCE_SLICE);
        struct index_node *node;

        last = end == announcement->num_shards;
        (void)pthread_mutex_lock(&coordinator->index_lock);
        node = find_node(announcement, error);
        if (node == NULL) {
            status = RK_ERR_NOT_FOUND;
        } else if (apply_slice(announcement, node, begin, end, drops) != RK_OK) {
            status = out_of_memory(error);
        } else if (last) {
            index_announce_end(coordinator->index, node, announcement->since);
            /* Whatever made us ask it to announce is answered by now. */
            node->registered = true;
            if (announcement->num_shards != 0) {
                liveness_announced(&node->liveness);
            }
        }
        (void)pthread_mutex_unlock(&coordinator->index_lock);
        begin = end;
    }
    return status;
}

/* Under write_lock. */
static void move_generation(struct announcement *announcement)
{
    uint64_t generation = 0;
    struct rk_error error = {0};

    for (size_t i = 0; i < announcement->num_shards; i++) {
        const struct index_announced *shard = &announcement->shards[i];

        if (shard->generation > generation && shard->generation <= announcement->ceiling) {
            generation = shard->generation;
        }
    }
    if (coordinator_skip_generation(announcement->coordinator, generation, &error) != RK_OK) {
        RK_LOG_WARN("metadata_behind", "reason=%q", error.text);
    }
}

/* The rest of what it should drop is told when it announces next. */
static void ask_again(const struct announcement *announcement)
{
    struct coordinator *coordinator = announcement->coordinator;
    struct index_node *node;

    (void)pthread_mutex_lock(&coordinator->index_lock);
    node = index_node_find(coordinator->index, announcement->node_id);
    if (node != NULL && node->info->incarnation == announcement->incarnation) {
        node->registered = false;
    }
    (void)pthread_mutex_unlock(&coordinator->index_lock);
}

static enum rk_status reply_announce(struct rk_rpc_call *call,
                                     const struct announcement *announcement,
                                     struct rk_error *error)
{
    Redknot__V1__AnnounceReply reply = REDKNOT__V1__ANNOUNCE_REPLY__INIT;
    size_t num_unwanted = 0;
    size_t num_told;
    Redknot__V1__Shard *shards;
    enum rk_status status;

    for (size_t i = 0; i < announcement->num_shards; i++) {
        num_unwanted += announcement->shards[i].unwanted;
    }
    num_told = num_unwanted < ANNOUNCE_DROPS_MAX ? num_unwanted : ANNOUNCE_DROPS_MAX;
    if (num_told < num_unwanted) {
        ask_again(announcement);
    }
    shards = rk_alloc_zero(num_told + 1, sizeof(*shards));
    reply.drop = rk_alloc_zero(num_told + 1, sizeof(*reply.drop));
    if (shards == NULL || reply.drop == NULL) {
        status = out_of_memory(error);
        goto done;
    }
    for (size_t i = 0; i < announcement->num_shards && reply.n_drop < num_told; i++) {
        const struct index_announced *from = &announcement->shards[i];
        Redknot__V1__Shard *shard = &shards[reply.n_drop];

        if (from->unwanted) { /* Only its name: a long list must fit into a message. */
            redknot__v1__shard__init(shard);
            shard->segment_id = record_put_id(&from->id);
            shard->generation = from->generation;
            shard->shard_index = from->shard_index;
            reply.drop[reply.n_drop++] = shard;
        }
    }
    reply.accepted = (uint32_t)(announcement->num_shards - num_unwanted);
    if (announcement->node_id != NULL) {
        RK_LOG_INFO("node_announced", "node=%q accepted=%u drop=%zu", announcement->node_id,
                    reply.accepted, reply.n_drop);
    }
    if (announcement->num_refused != 0) {
        RK_LOG_WARN("shards_refused", "node=%q count=%zu last=%q action=dropped",
                    announcement->node_id, announcement->num_refused, announcement->refused_why);
    }
    status = rk_rpc_call_send(call, &reply.base);

done:
    rk_free(reply.drop);
    rk_free(shards);
    return status;
}

enum rk_status coordinator_announce(struct rk_rpc_call *call, struct coordinator *coordinator,
                                    struct rk_error *error)
{
    struct announcement announcement = {
        .coordinator = coordinator,
        .shards_max =
            (size_t)coordinator->options.segments_max * coordinator->options.shards_per_segment,
    };
    struct index_drops drops = {0};
    enum rk_status status;

    (void)pthread_mutex_lock(&coordinator->write_lock);
    announcement.ceiling = coordinator_generation_ceiling(coordinator);
    (void)pthread_mutex_unlock(&coordinator->write_lock);
    (void)pthread_mutex_lock(&coordinator->index_lock);
    announcement.since = index_changes(coordinator->index);
    (void)pthread_mutex_unlock(&coordinator->index_lock);
    status = receive(call, &announcement, error);
    /* A stream without a message names no node: nothing is announced and nothing changes. */
    if (announcement.node_id != NULL) {
        (void)pthread_mutex_lock(&coordinator->write_lock);
        if (status == RK_OK) {
            status = apply(&announcement, &drops, error);
        }
        if (status == RK_OK) {
            move_generation(&announcement);
        }
        coordinator_settle_tokens(coordinator, &announcement.saved);
        (void)pthread_mutex_unlock(&coordinator->write_lock);
    }
    if (status == RK_OK) {
        status = reply_announce(call, &announcement, error);
    }
    coordinator_send_drops(coordinator, &drops, ANNOUNCE_DROPS_MS);
    index_drops_free(&drops);
    announcement_free(&announcement);
    return status;
}
