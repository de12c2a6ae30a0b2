/*
 * rpc_internal: what the files of this folder share.
 *
 * A server's batches of gRPC operations end on a completion queue that its loop
 * thread drains; handlers wait on a condition. A client's call has a queue of
 * its own, which the calling thread works while it waits: no thread has to wake
 * another. Between calls gRPC's own timer looks at the channels.
 */
#ifndef RK_COMMON_RPC_RPC_INTERNAL_H
#define RK_COMMON_RPC_RPC_INTERNAL_H

#include "common/base/tsan.h"
#include "common/base/until.h"
#include "common/rpc/rpc.h"

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/slice.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <stdatomic.h>

/* gRPC core is not instrumented: tell the thread sanitizer what its queues order. */
#define RPC_TSAN_RELEASE(tag) RK_TSAN_RELEASE(tag)
#define RPC_TSAN_ACQUIRE(tag) RK_TSAN_ACQUIRE(tag)

/* ---- Loop (loop.c) ---- */

/* A completion-queue tag. done runs on the loop's thread and does not block. */
struct rpc_event {
    void (*done)(struct rpc_event *event, bool ok);
};

struct rpc_loop {
    grpc_completion_queue *queue;
    pthread_t thread;
    bool running;
};

/* Each is undone by one grpc_shutdown(). */
void rpc_library_start(void);
/* From now on a forked child knows that it is one. */
void rpc_fork_watch(void);
/* RK_ERR_UNSUPPORTED in a forked child, where gRPC does not work (fork.c). */
RK_MUST_CHECK enum rk_status rpc_fork_check(struct rk_error *error);
/* Also starts the library; rpc_loop_destroy shuts it down again. */
void rpc_loop_create(struct rpc_loop *loop);
RK_MUST_CHECK enum rk_status rpc_loop_start(struct rpc_loop *loop);
/* No event may be outstanding. Accepts a zeroed loop. */
void rpc_loop_destroy(struct rpc_loop *loop);
/* Runs events on the caller's thread until *flag; for loops that were never started. */
void rpc_loop_run_until(struct rpc_loop *loop, const bool *flag);
/* As pthread_create, with every signal blocked: signals belong to the program's own threads. */
int rpc_thread_create(pthread_t *ret_thread, void *(*body)(void *), void *context);

/* A gRPC channel argument; gRPC's own type wants keys that are not const. */
struct rpc_setting {
    const char *key;
    int value;
};

void rpc_settings_fill(const struct rpc_setting *settings, size_t num_settings, grpc_arg *ret_args);

/* A mutex and a condition on the monotonic clock. */
struct rpc_sync {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
};

void rpc_sync_init(struct rpc_sync *sync);
void rpc_sync_destroy(struct rpc_sync *sync);
/* With the mutex held. False once deadline_ns has passed. */
bool rpc_sync_wait(struct rpc_sync *sync, int64_t deadline_ns);

/* One batch of operations that somebody waits for: it ends in a loop's thread, or (pluck) in the
 * waiting thread itself. */
struct rpc_batch {
    struct rpc_event event;
    struct rpc_sync *sync;
    grpc_completion_queue *pluck; /* NULL: a loop's */
    bool pending;                 /* under sync's mutex, unless plucked */
    bool ok;                      /* valid once not pending */
};

/* Takes up what happened to the sockets of all channels since somebody worked them: without it a
 * call would be sent over a connection whose end is known to the kernel already. Does not wait. */
void rpc_queue_look(grpc_completion_queue *queue);
/* Of plucked batches, none of which is under way. */
void rpc_queue_destroy(grpc_completion_queue *queue);
void rpc_batch_init(struct rpc_batch *batch, struct rpc_sync *sync);
void rpc_batch_done(struct rpc_event *event, bool ok);
void rpc_batch_start(struct rpc_batch *batch, grpc_call *call, const grpc_op *ops, size_t num_ops);
/* True when it ended by then. */
bool rpc_batch_wait_until(struct rpc_batch *batch, int64_t deadline_ns);
/* The same in slices, so that a cancellation is seen. */
bool rpc_batch_wait(struct rpc_batch *batch, const struct rk_until *until);
/* Cancels a call that is waited for no longer, with the code that says why. */
void rpc_call_give_up(grpc_call *call, const struct rk_until *until);
/* Cancels the call when until is over, which ends every batch of it. Whether the batch
 * succeeded. */
bool rpc_batch_finish(struct rpc_batch *batch, grpc_call *call, const struct rk_until *until);

/* ---- Messages (message.c) ---- */

/* Joins what arrived in several slices; kept from message to message of a call. */
struct rpc_scratch {
    uint8_t *data;
    size_t bytes;
};

RK_MUST_CHECK enum rk_status rpc_message_pack(const struct ProtobufCMessage *message,
                                              grpc_byte_buffer **ret_buffer);
/* release is called exactly once, whatever is returned. */
RK_MUST_CHECK enum rk_status rpc_parts_pack(const struct rk_rpc_part *parts, size_t num_parts,
                                            void (*release)(void *release_context),
                                            void *release_context, grpc_byte_buffer **ret_buffer);
/* refusal: of a request, whose strings are checked, for the sentence; NULL for a reply. */
RK_MUST_CHECK enum rk_status rpc_message_unpack(grpc_byte_buffer *buffer,
                                                const struct ProtobufCMessageDescriptor *type,
                                                struct rpc_scratch *scratch,
                                                struct ProtobufCMessage **ret_message,
                                                struct rk_error *refusal);

/* ---- Status on the wire (wire_status.c) ---- */

#define RPC_STATUS_KEY "redknot-status"

grpc_status_code rpc_status_to_code(enum rk_status status);
/* RK_OK if and only if code is. trailer may be NULL. */
enum rk_status rpc_status_from_wire(grpc_status_code code, const grpc_metadata_array *trailer,
                                    const char *message, bool *ret_from_peer);
/* Copies a slice as text, cut to the room there is. */
void rpc_slice_to_text(const grpc_slice *slice, char *ret_text, size_t text_bytes);

/* ---- Client calls (client.c, stream.c) ---- */

struct rk_rpc_channel {
    pthread_mutex_t lock; /* Leaf: the channel is made anew under it. */
    grpc_channel *channel;
    int64_t made_ns;
    char *address;
    atomic_uint refs; /* the owner, and each stream */
    _Atomic int64_t used_ns;
};

void rpc_channel_ref(struct rk_rpc_channel *channel);
/* Before a call: rpc_queue_look, unless the channel was in use a moment ago. */
void rpc_channel_look(struct rk_rpc_channel *channel, grpc_completion_queue *queue);
grpc_call *rpc_channel_call(struct rk_rpc_channel *channel, grpc_completion_queue *queue,
                            const char *path, int timeout_ms);
void rpc_channel_unref(struct rk_rpc_channel *channel);
gpr_timespec rpc_timespec_in_ms(int timeout_ms);
/* Turns a finished call's code, trailer and message into status and text. */
enum rk_status rpc_call_outcome(struct rk_rpc_channel *channel, const char *path,
                                grpc_status_code code, const grpc_metadata_array *trailer,
                                const grpc_slice *message, struct rk_error *error);

/* ---- Descriptors (descriptors.c) ---- */

struct rpc_symbol {
    char *name; /* "redknot.v1.Worker.Score" */
    size_t file;
    bool request_is_single; /* a method whose request is no stream */
    bool reply_is_single;
};

struct rpc_descriptor_file {
    const char *name; /* into the parsed file */
    const uint8_t *data;
    size_t bytes;
    struct ProtobufCMessage *parsed;
};

/* Everything that reflection can tell; immutable once made, so for any thread. */
struct rpc_descriptors {
    struct rpc_descriptor_file *files;
    size_t num_files;
    struct rpc_symbol *symbols;
    size_t num_symbols;
    size_t symbols_room;
    struct ProtobufCMessage **sets; /* keep the files' bytes */
    size_t num_sets;
};

#define RPC_FILES_MAX   1024
#define RPC_SYMBOLS_MAX 65536
#define RPC_NESTING_MAX 16

/* The sets that this program was built with. */
RK_MUST_CHECK enum rk_status rpc_descriptors_create(struct rpc_descriptors **ret_descriptors);
/* Adds a serialised FileDescriptorSet; on an error only destroy is left. */
RK_MUST_CHECK enum rk_status rpc_descriptors_add(struct rpc_descriptors *descriptors,
                                                 const uint8_t *set, size_t bytes);
void rpc_descriptors_destroy(struct rpc_descriptors *descriptors); /* accepts NULL */
const struct rpc_symbol *rpc_descriptors_symbol(const struct rpc_descriptors *descriptors,
                                                const char *name);
/* The file and all that it imports, the file first. order has room for num_files. */
size_t rpc_descriptors_closure(const struct rpc_descriptors *descriptors, size_t file,
                               size_t *ret_order);
/* num_files when there is none. */
size_t rpc_descriptors_file(const struct rpc_descriptors *descriptors, const char *name);

/* ---- Reflection (reflection.c) ---- */

/* Packs the answer to one request; the caller frees with rk_free. */
RK_MUST_CHECK enum rk_status rpc_reflection_answer(const struct rpc_descriptors *descriptors,
                                                   const char *const *services, size_t num_services,
                                                   const uint8_t *request, size_t request_bytes,
                                                   uint8_t **ret_reply, size_t *ret_reply_bytes);

#endif
