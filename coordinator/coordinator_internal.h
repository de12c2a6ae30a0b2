/*
 * What the files of the coordinator share.
 *
 * Locks, in this order:
 *   write_lock  orders changes of the metadata database with those of the index;
 *               held during disk writes, never during a call to a store node.
 *   index_lock  guards index, placed and the counters; held for memory only.
 *   sweep_lock and the prober's lock are leaves: what their threads wait on.
 */
#ifndef RK_COORDINATOR_INTERNAL_H
#define RK_COORDINATOR_INTERNAL_H

#include "common/metrics/metrics.h"
#include "common/rpc/rpc.h"
#include "coordinator/arena.h"
#include "coordinator/coordinator.h"
#include "coordinator/index.h"
#include "coordinator/metadata.h"
#include "coordinator/peers.h"
#include "coordinator/placed.h"

#include <pthread.h>

#define COORDINATOR_IDS_MAX          4096u /* in one Locate or Drop */
#define COORDINATOR_REPLY_TOKENS_MAX (8u << 20)

struct coordinator_metrics {
    struct rk_metric *hits;
    struct rk_metric *misses[RK_STATUS_COUNT]; /* only of misses */
    struct rk_metric *places;
    struct rk_metric *commits;
    struct rk_metric *aborts;
    struct rk_metric *expired;
    struct rk_metric *segments;
    struct rk_metric *placed;
    struct rk_metric *kv_bytes;
    struct rk_metric *metadata_bytes;
    struct rk_metric *metadata_ratio;
    struct rk_metric *nodes[2][NODE_STATE_COUNT]; /* [worker] */
    struct rk_metric *stores[NODE_STATE_COUNT];
    struct rk_metric *ejections;
};

struct probe_target;

struct coordinator_prober {
    pthread_t thread;
    bool running;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool stopping;                /* under lock */
    struct probe_target *targets; /* of the round; under lock, to cancel their probes */
    size_t num_targets;
    unsigned random_state; /* the thread's */
};

struct coordinator {
    struct coordinator_options options;
    uint64_t epoch;
    uint64_t values_marks; /* made so far; under index_lock */
    int64_t started_ns;
    /* Under index_lock: when this process last heard of anybody, and since when it hears again
     * after a restart or a pause of its own (coordinator_stores.c). */
    int64_t awake_ns;
    int64_t settling_ns;
    int64_t settled_before_ns; /* it was awake until then; 0: this process had not begun */

    pthread_mutex_t write_lock;
    const struct metadata_ops *ops;
    struct metadata *metadata;
    uint64_t generation_next;  /* under write_lock */
    uint64_t generation_limit; /* end of the block that is reserved on disk */
    uint64_t generation_seen;  /* the highest one of a record that was loaded */

    pthread_mutex_t index_lock;
    struct index *index;
    struct placed_table placed;

    struct peers *peers;
    struct rk_rpc_server *server;
    bool serving;

    pthread_t sweeper;
    bool sweeping;
    bool behind;   /* the sweeper's: the database refused a write */
    bool stopping; /* under sweep_lock */
    pthread_mutex_t sweep_lock;
    pthread_cond_t sweep_wake;

    struct coordinator_prober prober;

    struct coordinator_metrics metrics;
};

/* ---- coordinator_store.c: the database and the index kept in step ---- */

RK_MUST_CHECK enum rk_status coordinator_load(struct coordinator *coordinator,
                                              struct rk_error *error);
/* Writes what the index journalled. Under write_lock, without index_lock. */
RK_MUST_CHECK enum rk_status coordinator_flush(struct coordinator *coordinator, bool synced,
                                               struct rk_error *error);
/* The same for what need not be durable: what the disk refuses, the sweeper tries again. */
void coordinator_flush_later(struct coordinator *coordinator);
RK_MUST_CHECK enum rk_status coordinator_next_generation(struct coordinator *coordinator,
                                                         uint64_t *ret_generation,
                                                         struct rk_error *error);
/* No generation up to this one is handed out again. Under write_lock. */
RK_MUST_CHECK enum rk_status coordinator_skip_generation(struct coordinator *coordinator,
                                                         uint64_t generation,
                                                         struct rk_error *error);
/* All that was ever handed out is not wanted any more. Synced. Under write_lock. */
RK_MUST_CHECK enum rk_status coordinator_drop_generations(struct coordinator *coordinator,
                                                          struct rk_error *error);
/* A generation above it was not handed out by us, or by anybody before us. Under write_lock. */
uint64_t coordinator_generation_ceiling(const struct coordinator *coordinator);
RK_MUST_CHECK enum rk_status coordinator_save_node(struct coordinator *coordinator,
                                                   const Redknot__V1__NodeInfo *info,
                                                   struct rk_error *error);
/* That clients go on without this incarnation's values, on disk; and that it gave them up, which
 * may be lost: then it gives them up once more. Under write_lock. */
RK_MUST_CHECK enum rk_status coordinator_save_left_out(struct coordinator *coordinator,
                                                       const char *node_id, uint64_t incarnation,
                                                       struct rk_error *error);
void coordinator_forget_left_out(struct coordinator *coordinator, const char *node_id);
struct coordinator_tokens {
    struct rk_id id;
    const uint32_t *token_ids;
    size_t num_tokens;
};
/* Of segments that are about to be known; settle them afterwards, whatever became of them. Both
 * under write_lock. */
RK_MUST_CHECK enum rk_status coordinator_save_tokens_ahead(struct coordinator *coordinator,
                                                           const struct coordinator_tokens *tokens,
                                                           size_t count, struct rk_error *error);
/* Flushes, then removes the tokens of those that did not become known. */
void coordinator_settle_tokens(struct coordinator *coordinator, const struct index_ids *ids);
/* The segment's record and tokens in one synced batch. */
RK_MUST_CHECK enum rk_status coordinator_save_commit(struct coordinator *coordinator,
                                                     const struct segment_spec *spec,
                                                     const uint32_t *token_ids,
                                                     struct rk_error *error);
/* From the arena; RK_ERR_NOT_FOUND when none are kept. Without locks. */
RK_MUST_CHECK enum rk_status coordinator_read_tokens(struct coordinator *coordinator,
                                                     struct arena *arena, const struct rk_id *id,
                                                     uint32_t **ret_token_ids, size_t *ret_count,
                                                     struct rk_error *error);

/* ---- coordinator_handlers.c and its neighbours ---- */

/* Fills *ret_reply from the arena. */
typedef enum rk_status (*coordinator_method)(struct coordinator *coordinator, struct arena *arena,
                                             const ProtobufCMessage *request,
                                             ProtobufCMessage **ret_reply, struct rk_error *error);

RK_MUST_CHECK enum rk_status coordinator_add_service(struct coordinator *coordinator);

enum rk_status coordinator_register(struct coordinator *coordinator, struct arena *arena,
                                    const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                    struct rk_error *error);
enum rk_status coordinator_heartbeat(struct coordinator *coordinator, struct arena *arena,
                                     const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                     struct rk_error *error);
enum rk_status coordinator_announce(struct rk_rpc_call *call, struct coordinator *coordinator,
                                    struct rk_error *error);
enum rk_status coordinator_place(struct coordinator *coordinator, struct arena *arena,
                                 const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                 struct rk_error *error);
enum rk_status coordinator_commit(struct coordinator *coordinator, struct arena *arena,
                                  const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                  struct rk_error *error);
enum rk_status coordinator_abort(struct coordinator *coordinator, struct arena *arena,
                                 const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                 struct rk_error *error);
enum rk_status coordinator_locate(struct coordinator *coordinator, struct arena *arena,
                                  const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                  struct rk_error *error);
enum rk_status coordinator_drop(struct coordinator *coordinator, struct arena *arena,
                                const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                struct rk_error *error);
enum rk_status coordinator_status(struct coordinator *coordinator, struct arena *arena,
                                  const ProtobufCMessage *request, ProtobufCMessage **ret_reply,
                                  struct rk_error *error);
enum rk_status coordinator_list_stores(struct coordinator *coordinator, struct arena *arena,
                                       const ProtobufCMessage *request,
                                       ProtobufCMessage **ret_reply, struct rk_error *error);

/* ---- coordinator_probe.c: does a store that reports answer, too? ---- */

void coordinator_prober_init(struct coordinator *coordinator);
RK_MUST_CHECK enum rk_status coordinator_prober_start(struct coordinator *coordinator);
/* Cancels the probes that run. Accepts one that does not run. */
void coordinator_prober_stop(struct coordinator *coordinator);
void coordinator_prober_destroy(struct coordinator *coordinator);
/* Of calls other than probes; each failure counts like that of a probe. No locks held. */
void coordinator_store_answered(struct coordinator *coordinator, const char *node_id,
                                uint64_t incarnation);
void coordinator_store_failed(struct coordinator *coordinator, const char *node_id,
                              uint64_t incarnation, const char *reason);

/* ---- What the handlers share ---- */

/* Tells store nodes to give shards up, within timeout_ms in all; a living one that could not be
 * told is asked to announce, which tells it. No locks held. */
void coordinator_send_drops(struct coordinator *coordinator, struct index_drops *drops,
                            int timeout_ms);
/* One best-effort call; a failure is only logged. No locks held. */
void coordinator_tell_store(struct coordinator *coordinator, enum peers_verb verb,
                            const char *address, const struct rk_id *id, uint64_t generation,
                            uint32_t shard_index, int64_t deadline_ns);
/* AbortShard and, for the first num_tried that may have committed, DropShard. No locks held. */
void coordinator_undo_placed(struct coordinator *coordinator, const struct placed *placed,
                             uint32_t num_tried);
/* All ids at once, so that a bad one changes nothing. */
RK_MUST_CHECK enum rk_status coordinator_read_ids(struct arena *arena,
                                                  const ProtobufCBinaryData *from, size_t count,
                                                  struct rk_id **ret_ids, struct rk_error *error);
/* A message of a shard of a segment, from the arena. Under index_lock. */
Redknot__V1__Shard *coordinator_shard_message(struct arena *arena,
                                              const struct index_segment *segment,
                                              uint32_t shard_index);
/* One endpoint per node, from the arena. Under index_lock. */
Redknot__V1__StoreEndpoint *coordinator_endpoint_message(struct arena *arena,
                                                         const struct index_node *node);

/* Notices a pause of our own. Under index_lock, before what was heard is noted. */
void coordinator_awake(struct coordinator *coordinator, int64_t now_ns);
/* Under index_lock. What a heartbeat tells a store whose values are out of date: a mark to say when
 * it has given them up; 0: nothing. said: by the heartbeat. */
uint64_t coordinator_values_mark(struct coordinator *coordinator, struct index_node *node,
                                 uint64_t said);
/* Such a store said the mark: the disk need not know of it any longer. */
void coordinator_values_given_up(struct coordinator *coordinator, const char *node_id);
/* Under index_lock. Lets a store that was heard serve its values for so long, in ms; 0: it may not.
 * Until then it is on every list of stores. */
uint32_t coordinator_values_lease(struct coordinator *coordinator, struct index_node *node,
                                  int64_t now_ns);

#endif
