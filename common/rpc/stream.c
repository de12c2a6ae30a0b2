#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/rpc/rpc_internal.h"

#include <grpc/byte_buffer_reader.h>
#include <pthread.h>

#define DEADLINE_SLACK_MS 20 /* gRPC ends a call at its deadline by itself; if not, we do */
#define STUCK_MS          20 /* so long the batches of a cancelled call may take; then it is stuck */
#define REAPER_LOOK_MS    100
#define FINISH_WAIT_MS    2000 /* for the status behind the last message that was read */

struct rk_rpc_stream {
    struct rk_rpc_channel *channel;
    grpc_call *call;
    char *path;
    struct rk_until until; /* the call's end, and who may cancel it before */
    bool given_up;
    grpc_completion_queue *queue; /* of this call alone, worked by its thread */
    struct rpc_sync sync;
    struct rpc_batch opening; /* both initial metadata */
    struct rpc_batch sending;
    struct rpc_batch receiving;
    struct rpc_batch ending; /* the final status */
    grpc_metadata_array initial;
    grpc_metadata_array trailer;
    grpc_status_code code;
    grpc_slice message;
    grpc_byte_buffer *request; /* of a call that has one; until its batch ends */
    grpc_byte_buffer *received;
    struct rpc_scratch scratch;
    bool sent_all;
    bool recv_started; /* and not waited for yet */
    bool received_all;
    struct rk_rpc_stream *next; /* of the reaper's */
};

/* Takes over the request, if there is one. */
static enum rk_status stream_open(struct rk_rpc_channel *channel, const char *path,
                                  grpc_byte_buffer *request, int timeout_ms,
                                  struct rk_rpc_stream **ret_stream, struct rk_error *error)
{
    struct rk_rpc_stream *stream = rk_alloc_zero(1, sizeof(*stream));
    char *path_copy = rk_alloc_string(path);
    if (!stream || !path_copy) {
        rk_free(stream);
        rk_free(path_copy);
        if (request) {
            grpc_byte_buffer_destroy(request);
        }
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for call %s to %s", path,
                            channel->address);
    }
    rpc_channel_ref(channel);
    stream->channel = channel;
    stream->path = path_copy;
    stream->message = grpc_empty_slice();
    stream->until.deadline_ns = rk_deadline_in_ms((int64_t)timeout_ms + DEADLINE_SLACK_MS);
    rpc_sync_init(&stream->sync);
    stream->queue = grpc_completion_queue_create_for_pluck(NULL);
    rpc_channel_look(channel, stream->queue);
    struct rpc_batch *batches[] = {&stream->opening, &stream->sending, &stream->receiving,
                                   &stream->ending};
    for (size_t i = 0; i < sizeof(batches) / sizeof(batches[0]); i++) {
        rpc_batch_init(batches[i], &stream->sync);
        batches[i]->pluck = stream->queue;
    }
    grpc_metadata_array_init(&stream->initial);
    grpc_metadata_array_init(&stream->trailer);

    stream->call = rpc_channel_call(channel, stream->queue, path, timeout_ms);
    grpc_op status_op = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
                         .data.recv_status_on_client = {.trailing_metadata = &stream->trailer,
                                                        .status = &stream->code,
                                                        .status_details = &stream->message}};
    grpc_op open_ops[4] = {{.op = GRPC_OP_SEND_INITIAL_METADATA},
                           {.op = GRPC_OP_RECV_INITIAL_METADATA,
                            .data.recv_initial_metadata.recv_initial_metadata = &stream->initial},
                           {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = request},
                           {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT}};
    stream->request = request;
    stream->sent_all = request != NULL;
    rpc_batch_start(&stream->ending, stream->call, &status_op, 1);
    rpc_batch_start(&stream->opening, stream->call, open_ops, request ? 4 : 2);
    *ret_stream = stream;
    return RK_OK;
}

enum rk_status rk_rpc_stream_open(struct rk_rpc_channel *channel, const char *path, int timeout_ms,
                                  struct rk_rpc_stream **ret_stream, struct rk_error *error)
{
    return stream_open(channel, path, NULL, timeout_ms, ret_stream, error);
}

enum rk_status rk_rpc_stream_open_with(struct rk_rpc_channel *channel, const char *path,
                                       const struct ProtobufCMessage *request, int timeout_ms,
                                       struct rk_rpc_stream **ret_stream, struct rk_error *error)
{
    grpc_byte_buffer *buffer = NULL;
    enum rk_status status = rpc_message_pack(request, &buffer);
    if (status != RK_OK) {
        return rk_error_set(error, status, "the request of %s cannot be sent: %s", path,
                            rk_status_text(status));
    }
    return stream_open(channel, path, buffer, timeout_ms, ret_stream, error);
}

/* Whether the batch succeeded. A message that the socket does not take keeps its batch, though the
 * call is cancelled, until gRPC gives up the connection: nobody waits for that (see the reaper). */
static bool stream_batch_finish(struct rk_rpc_stream *stream, struct rpc_batch *batch)
{
    if (rpc_batch_wait(batch, &stream->until)) {
        return batch->ok;
    }
    stream->given_up = true;
    rpc_call_give_up(stream->call, &stream->until);
    return rpc_batch_wait_until(batch, rk_deadline_in_ms(STUCK_MS)) && batch->ok;
}

static enum rk_status stream_outcome(struct rk_rpc_stream *stream, struct rk_error *error)
{
    (void)stream_batch_finish(stream, &stream->ending);
    if (stream->ending.pending) {
        bool cancelled = rk_until_over(&stream->until) == RK_ERR_CANCELLED;
        return rk_error_set(error, cancelled ? RK_ERR_CANCELLED : RK_ERR_DEADLINE,
                            "call %s to %s did not end in time", stream->path,
                            stream->channel->address);
    }
    return rpc_call_outcome(stream->channel, stream->path, stream->code, &stream->trailer,
                            &stream->message, error);
}

/* Why a send failed. A call that the server ended well takes no more messages either. */
static enum rk_status stream_send_failure(struct rk_rpc_stream *stream)
{
    enum rk_status status = stream_outcome(stream, NULL);
    return status == RK_OK ? RK_ERR_CANCELLED : status;
}

static enum rk_status stream_send_op(struct rk_rpc_stream *stream, const grpc_op *op)
{
    RK_ASSERT(!stream->sent_all);
    rpc_batch_start(&stream->sending, stream->call, op, 1);
    bool ok = stream_batch_finish(stream, &stream->sending);
    return ok ? RK_OK : stream_send_failure(stream);
}

static enum rk_status stream_send_buffer(struct rk_rpc_stream *stream, grpc_byte_buffer *buffer)
{
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = buffer};
    enum rk_status status = stream_send_op(stream, &op);
    grpc_byte_buffer_destroy(buffer);
    return status;
}

enum rk_status rk_rpc_stream_send(struct rk_rpc_stream *stream,
                                  const struct ProtobufCMessage *message)
{
    grpc_byte_buffer *buffer = NULL;
    enum rk_status status = rpc_message_pack(message, &buffer);
    return status == RK_OK ? stream_send_buffer(stream, buffer) : status;
}

enum rk_status rk_rpc_stream_send_parts(struct rk_rpc_stream *stream,
                                        const struct rk_rpc_part *parts, size_t num_parts,
                                        void (*release)(void *release_context),
                                        void *release_context)
{
    grpc_byte_buffer *buffer = NULL;
    enum rk_status status = rpc_parts_pack(parts, num_parts, release, release_context, &buffer);
    return status == RK_OK ? stream_send_buffer(stream, buffer) : status;
}

enum rk_status rk_rpc_stream_send_done(struct rk_rpc_stream *stream)
{
    if (stream->sent_all) {
        return RK_OK;
    }
    grpc_op op = {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT};
    enum rk_status status = stream_send_op(stream, &op);
    stream->sent_all = true;
    return status;
}

static void stream_recv_start(struct rk_rpc_stream *stream)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &stream->received};
    if (!stream->recv_started) {
        rpc_batch_start(&stream->receiving, stream->call, &op, 1);
        stream->recv_started = true;
    }
}

static void stream_drop_received(struct rk_rpc_stream *stream)
{
    if (stream->received) {
        grpc_byte_buffer_destroy(stream->received);
        stream->received = NULL;
    }
}

/* The next message; NULL: there is none. The caller destroys it. */
static grpc_byte_buffer *stream_next(struct rk_rpc_stream *stream)
{
    if (stream->received_all) {
        return NULL;
    }
    stream_recv_start(stream);
    (void)stream_batch_finish(stream, &stream->receiving);
    if (stream->receiving.pending) {
        return NULL;
    }
    stream->recv_started = false;
    grpc_byte_buffer *buffer = stream->received;
    stream->received = NULL;
    stream->received_all = !buffer;
    return buffer;
}

enum rk_status rk_rpc_stream_recv(struct rk_rpc_stream *stream,
                                  const struct ProtobufCMessageDescriptor *type,
                                  struct ProtobufCMessage **ret_message)
{
    grpc_byte_buffer *buffer = stream_next(stream);
    if (!buffer) {
        return RK_ERR_NOT_FOUND;
    }
    enum rk_status status = rpc_message_unpack(buffer, type, &stream->scratch, ret_message, NULL);
    grpc_byte_buffer_destroy(buffer);
    return status;
}

enum rk_status rk_rpc_stream_recv_pieces(struct rk_rpc_stream *stream,
                                         rk_rpc_piece_callback on_piece, void *context)
{
    grpc_byte_buffer *buffer = stream_next(stream);
    grpc_byte_buffer_reader reader;
    grpc_slice slice;
    if (!buffer) {
        return RK_ERR_NOT_FOUND;
    }
    stream_recv_start(stream);
    if (!grpc_byte_buffer_reader_init(&reader, buffer)) {
        grpc_byte_buffer_destroy(buffer);
        return RK_ERR_INVALID;
    }
    while (grpc_byte_buffer_reader_next(&reader, &slice)) {
        on_piece(context, GRPC_SLICE_START_PTR(slice), GRPC_SLICE_LENGTH(slice));
        grpc_slice_unref(slice);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(buffer);
    return RK_OK;
}

enum rk_status rk_rpc_stream_finish(struct rk_rpc_stream *stream, struct rk_error *error)
{
    if (!stream->received_all && stream->sent_all && !stream->given_up) {
        /* The caller may have read the only reply without looking for the end behind it. */
        struct rk_until soon = rk_until_sooner(&stream->until, rk_deadline_in_ms(FINISH_WAIT_MS));
        stream_recv_start(stream);
        stream->received_all = rpc_batch_wait(&stream->receiving, &soon) && !stream->received;
    }
    if (!stream->received_all) {
        rk_rpc_stream_cancel(stream);
        (void)rpc_batch_wait_until(&stream->receiving, rk_deadline_in_ms(STUCK_MS));
        stream->received_all = true;
    }
    if (!stream->receiving.pending) {
        stream_drop_received(stream);
    }
    return stream_outcome(stream, error);
}

void rk_rpc_stream_watch(struct rk_rpc_stream *stream, const struct rk_until *until)
{
    stream->until.cancelled = until->cancelled;
    stream->until.context = until->context;
}

void rk_rpc_stream_cancel(struct rk_rpc_stream *stream)
{
    (void)grpc_call_cancel(stream->call, NULL);
}

static void stream_free(struct rk_rpc_stream *stream)
{
    stream_drop_received(stream);
    if (stream->request) {
        grpc_byte_buffer_destroy(stream->request);
    }
    grpc_call_unref(stream->call);
    grpc_slice_unref(stream->message);
    grpc_metadata_array_destroy(&stream->initial);
    grpc_metadata_array_destroy(&stream->trailer);
    rpc_queue_destroy(stream->queue);
    rpc_channel_unref(stream->channel);
    rpc_sync_destroy(&stream->sync);
    rk_free(stream->scratch.data);
    rk_free(stream->path);
    rk_free(stream);
}

/* All batches of a cancelled call. */
static bool stream_ended(struct rk_rpc_stream *stream, int64_t deadline_ns)
{
    return rpc_batch_wait_until(&stream->opening, deadline_ns) &&
           rpc_batch_wait_until(&stream->ending, deadline_ns) &&
           rpc_batch_wait_until(&stream->receiving, deadline_ns) &&
           rpc_batch_wait_until(&stream->sending, deadline_ns);
}

/* ---- Streams whose batches have not ended yet ---- */

static pthread_mutex_t reaper_lock = PTHREAD_MUTEX_INITIALIZER; /* Leaf. */
static struct rk_rpc_stream *reaper_streams;
static bool reaper_running;

static struct rk_rpc_stream *reaper_take(void)
{
    (void)pthread_mutex_lock(&reaper_lock);
    struct rk_rpc_stream *stream = reaper_streams;
    if (stream) {
        reaper_streams = stream->next;
    } else {
        reaper_running = false;
    }
    (void)pthread_mutex_unlock(&reaper_lock);
    return stream;
}

static void reaper_give(struct rk_rpc_stream *stream)
{
    (void)pthread_mutex_lock(&reaper_lock);
    struct rk_rpc_stream **at = &reaper_streams;
    while (*at) { /* Behind the others. */
        at = &(*at)->next;
    }
    stream->next = NULL;
    *at = stream;
    (void)pthread_mutex_unlock(&reaper_lock);
}

/* Ends when nothing is left. */
static void *reaper_main(void *context)
{
    (void)context;
    for (struct rk_rpc_stream *stream = reaper_take(); stream; stream = reaper_take()) {
        if (stream_ended(stream, rk_deadline_in_ms(REAPER_LOOK_MS))) {
            stream_free(stream);
        } else {
            reaper_give(stream);
        }
    }
    return NULL;
}

static void reap(struct rk_rpc_stream *stream)
{
    pthread_t thread;
    reaper_give(stream);
    (void)pthread_mutex_lock(&reaper_lock);
    if (!reaper_running && rpc_thread_create(&thread, reaper_main, NULL) == 0) {
        (void)pthread_detach(thread);
        reaper_running = true;
    } /* Else the next one that is stuck starts it. */
    (void)pthread_mutex_unlock(&reaper_lock);
}

void rk_rpc_stream_destroy(struct rk_rpc_stream *stream)
{
    if (!stream) {
        return;
    }
    /* No effect on a call that is over; else it ends all batches at once, but for a message that
     * the socket does not take. */
    rk_rpc_stream_cancel(stream);
    if (stream_ended(stream, rk_deadline_in_ms(STUCK_MS))) {
        stream_free(stream);
    } else {
        reap(stream);
    }
}
