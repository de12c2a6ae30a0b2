#include "common/rpc/server_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/text.h"

#include <stdio.h>

#define STUCK_MS 20 /* so long a batch of a cancelled call may take */

static void call_batch_done(struct rpc_event *event, bool ok)
{
    struct rpc_batch *batch = (struct rpc_batch *)event;
    struct rk_rpc_call *call =
        (struct rk_rpc_call *)((char *)batch->sync - offsetof(struct rk_rpc_call, sync));
    bool gone = batch == &call->closing && call->close_says_cancelled != 0;
    bool first = batch == &call->receiving && call->awaits_first;
    if (gone) {
        atomic_store(&call->cancelled, true);
    }
    rpc_batch_done(event, ok);
    bool told = batch == &call->sending && atomic_exchange(&call->watched_sending, false);
    if (gone || told) { /* The keeper looks after its watchers. */
        rpc_keeper_wake(call->server);
    }
    if (first) {
        call->awaits_first = false;
        if (rpc_keeper_message_came(call)) {
            rpc_server_dispatch(call->server, call);
        }
    }
    rpc_call_unref(call);
}

static void call_start(struct rk_rpc_call *call, struct rpc_batch *batch, const grpc_op *ops,
                       size_t num_ops)
{
    atomic_fetch_add(&call->refs, 1);
    rpc_batch_start(batch, call->call, ops, num_ops);
}

static void call_reset(struct rk_rpc_call *call)
{
    grpc_call_details_init(&call->details);
    grpc_metadata_array_init(&call->metadata);
    struct rpc_batch *batches[] = {&call->opening, &call->sending, &call->receiving, &call->closing,
                                   &call->ending};
    for (size_t i = 0; i < sizeof(batches) / sizeof(batches[0]); i++) {
        rpc_batch_init(batches[i], &call->sync);
        batches[i]->event.done = call_batch_done;
    }
    atomic_init(&call->refs, 1);
    atomic_init(&call->cancelled, false);
    call->call = NULL;
    call->method = NULL;
    call->close_says_cancelled = 0;
    call->opened = false;
    atomic_init(&call->ended, false);
    call->stalled = false;
    call->held = NULL;
    call->received = NULL;
    call->recv_started = false;
    call->refusal.text[0] = '\0';
    call->next = NULL;
    call->awaits_first = false;
    call->kept_in = NULL;
    atomic_init(&call->watched_sending, false);
}

static void call_clear(struct rk_rpc_call *call)
{
    if (call->held) {
        grpc_byte_buffer_destroy(call->held);
    }
    if (call->received) {
        grpc_byte_buffer_destroy(call->received);
    }
    if (call->call) {
        grpc_call_unref(call->call);
    }
    grpc_call_details_destroy(&call->details);
    grpc_metadata_array_destroy(&call->metadata);
    rk_free(call->scratch.data);
    call->scratch = (struct rpc_scratch){0};
}

struct rk_rpc_call *rpc_call_create(struct rk_rpc_server *server)
{
    struct rk_rpc_call *call = rk_alloc_zero(1, sizeof(*call));
    if (call) {
        call->server = server;
        rpc_sync_init(&call->sync);
        call_reset(call);
    }
    return call;
}

void rpc_call_free(struct rk_rpc_call *call)
{
    call_clear(call);
    rpc_sync_destroy(&call->sync);
    rk_free(call);
}

void rpc_call_recycle(struct rk_rpc_call *call)
{
    call_clear(call);
    call_reset(call);
}

void rpc_call_unref(struct rk_rpc_call *call)
{
    if (atomic_fetch_sub(&call->refs, 1) == 1) {
        rpc_server_reclaim(call->server, call);
    }
}

static void recv_start(struct rk_rpc_call *call)
{
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->received};
    call_start(call, &call->receiving, &op, 1);
    call->recv_started = true;
}

void rpc_call_accept(struct rk_rpc_call *call)
{
    gpr_timespec deadline = gpr_convert_clock_type(call->details.deadline, GPR_CLOCK_MONOTONIC);
    if (gpr_time_cmp(deadline, gpr_inf_future(GPR_CLOCK_MONOTONIC)) == 0) {
        call->deadline_ns = rk_deadline_in_ms(call->server->default_deadline_ms);
    } else {
        gpr_timespec left = gpr_time_sub(deadline, gpr_now(GPR_CLOCK_MONOTONIC));
        call->deadline_ns = rk_deadline_in_ms(gpr_time_to_millis(left));
    }
    grpc_op op = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER,
                  .data.recv_close_on_server.cancelled = &call->close_says_cancelled};
    call_start(call, &call->closing, &op, 1);
    recv_start(call); /* It comes while a handler's thread wakes up. */
}

/* Why the call cannot go on, once one of its batches failed. */
static enum rk_status call_failure(struct rk_rpc_call *call)
{
    return call->stalled || rk_clock_ns() >= call->deadline_ns ? RK_ERR_DEADLINE : RK_ERR_CANCELLED;
}

/* Whether the batch succeeded. A message that the socket does not take keeps its batch, though the
 * call is cancelled, until gRPC gives up the connection: no handler waits for that. The batch has a
 * reference to the call. */
static bool call_finish(struct rk_rpc_call *call, struct rpc_batch *batch)
{
    if (!rpc_batch_wait_until(batch, call->deadline_ns)) {
        (void)grpc_call_cancel_with_status(call->call, GRPC_STATUS_DEADLINE_EXCEEDED,
                                           "deadline exceeded", NULL);
        if (!rpc_batch_wait_until(batch, rk_deadline_in_ms(STUCK_MS))) {
            return false;
        }
    }
    return batch->ok;
}

/* As call_finish, for the message under way, which has a time of its own to leave. */
static bool call_finish_sending(struct rk_rpc_call *call)
{
    int64_t timeout_ns = call->server->send_timeout_ms * INT64_C(1000000);
    if (timeout_ns > 0 && call->sent_ns + timeout_ns < call->deadline_ns &&
        !rpc_batch_wait_until(&call->sending, call->sent_ns + timeout_ns)) {
        call->stalled = true;
        (void)grpc_call_cancel_with_status(call->call, GRPC_STATUS_DEADLINE_EXCEEDED,
                                           "the client took no message for too long", NULL);
        return rpc_batch_wait_until(&call->sending, rk_deadline_in_ms(STUCK_MS)) &&
               call->sending.ok;
    }
    return call_finish(call, &call->sending);
}

/* A client that broke off looks like one that sent its last message. Opening our
 * direction tells them apart, because only the former has closed that as well. */
static enum rk_status call_end_of_requests(struct rk_rpc_call *call)
{
    if (!call->opened) {
        grpc_op op = {.op = GRPC_OP_SEND_INITIAL_METADATA};
        call->opened = true;
        call_start(call, &call->opening, &op, 1);
        if (!call_finish(call, &call->opening)) {
            return call_failure(call);
        }
    }
    return rk_rpc_call_cancelled(call) ? call_failure(call) : RK_ERR_NOT_FOUND;
}

/* False: the client, though it lives, has sent nothing for too long; its call ends with that. */
static bool call_wait_message(struct rk_rpc_call *call)
{
    int64_t idle_ns = rk_deadline_in_ms(call->server->recv_idle_ms);
    if (idle_ns >= call->deadline_ns || rpc_batch_wait_until(&call->receiving, idle_ns)) {
        return true;
    }
    call->stalled = true;
    (void)rk_error_set(&call->refusal, RK_ERR_DEADLINE, "no message came for %u s",
                       call->server->recv_idle_ms / 1000);
    return false;
}

enum rk_status rk_rpc_call_recv(struct rk_rpc_call *call,
                                const struct ProtobufCMessageDescriptor *type,
                                struct ProtobufCMessage **ret_message)
{
    if (rk_rpc_call_cancelled(call)) {
        return call_failure(call);
    }
    if (!call->recv_started) {
        recv_start(call);
    }
    if (!call_wait_message(call)) {
        return RK_ERR_DEADLINE;
    }
    bool ok = call_finish(call, &call->receiving);
    grpc_byte_buffer *buffer = call->received;
    call->received = NULL;
    call->recv_started = false;
    size_t bytes_max = call->method->request_bytes_max;
    enum rk_status status;
    if (ok && buffer && bytes_max > 0 && grpc_byte_buffer_length(buffer) > bytes_max) {
        status = RK_ERR_TOO_LONG;
    } else if (ok && buffer) {
        status = rpc_message_unpack(buffer, type, &call->scratch, ret_message, &call->refusal);
    } else {
        status = ok ? call_end_of_requests(call) : call_failure(call);
    }
    if (buffer) {
        grpc_byte_buffer_destroy(buffer);
    }
    return status;
}

/* Takes the buffer. Returns once the message before this one has left. */
static enum rk_status call_send_buffer(struct rk_rpc_call *call, grpc_byte_buffer *buffer)
{
    enum rk_status status = RK_OK;
    if (!call_finish_sending(call) || rk_rpc_call_cancelled(call)) {
        status = call_failure(call);
    } else {
        grpc_op ops[2] = {{.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = buffer},
                          {.op = GRPC_OP_SEND_INITIAL_METADATA}};
        call->sent_ns = rk_clock_ns();
        call_start(call, &call->sending, ops, call->opened ? 1 : 2);
        call->opened = true;
    }
    grpc_byte_buffer_destroy(buffer); /* The batch keeps the slices. */
    return status;
}

static enum rk_status call_send(struct rk_rpc_call *call, grpc_byte_buffer *buffer)
{
    grpc_byte_buffer *held = call->held;
    if (call->method->reply_is_single && !held) {
        call->held = buffer;
        return rk_rpc_call_cancelled(call) ? call_failure(call) : RK_OK;
    }
    if (held) {
        /* A second reply where the descriptors promise one: the client shall see and refuse it. */
        call->held = NULL;
        enum rk_status status = call_send_buffer(call, held);
        if (status != RK_OK) {
            grpc_byte_buffer_destroy(buffer);
            return status;
        }
    }
    return call_send_buffer(call, buffer);
}

enum rk_status rk_rpc_call_send(struct rk_rpc_call *call, const struct ProtobufCMessage *message)
{
    grpc_byte_buffer *buffer = NULL;
    enum rk_status status = rpc_message_pack(message, &buffer);
    return status == RK_OK ? call_send(call, buffer) : status;
}

enum rk_status rk_rpc_call_send_parts(struct rk_rpc_call *call, const struct rk_rpc_part *parts,
                                      size_t num_parts, void (*release)(void *release_context),
                                      void *release_context)
{
    grpc_byte_buffer *buffer = NULL;
    enum rk_status status = rpc_parts_pack(parts, num_parts, release, release_context, &buffer);
    return status == RK_OK ? call_send(call, buffer) : status;
}

enum rk_status rk_rpc_call_send_last_parts(struct rk_rpc_call *call,
                                           const struct rk_rpc_part *parts, size_t num_parts,
                                           void (*release)(void *release_context),
                                           void *release_context)
{
    grpc_byte_buffer *buffer = NULL;
    RK_ASSERT(!call->held);
    enum rk_status status = rpc_parts_pack(parts, num_parts, release, release_context, &buffer);
    if (status == RK_OK) {
        call->held = buffer;
    }
    return status;
}

bool rk_rpc_call_cancelled(struct rk_rpc_call *call)
{
    return !atomic_load(&call->ended) &&
           (atomic_load(&call->cancelled) || rk_clock_ns() >= call->deadline_ns);
}

int64_t rk_rpc_call_deadline_ns(const struct rk_rpc_call *call)
{
    return call->deadline_ns;
}

void rk_rpc_call_end_early(struct rk_rpc_call *call)
{
    rpc_call_end(call, RK_OK, "");
}

void rpc_call_end(struct rk_rpc_call *call, enum rk_status status, const char *text)
{
    if (atomic_load(&call->ended)) {
        return;
    }
    /* One final status may follow a message under way, but not overtake it. */
    if (!call_finish_sending(call) && status == RK_OK) {
        status = call_failure(call);
    }
    atomic_store(&call->ended, true);
    if (status == RK_ERR_CANCELLED && rk_clock_ns() >= call->deadline_ns) {
        status = RK_ERR_DEADLINE; /* A handler cannot tell; the client shall not have to guess. */
    }
    char message[sizeof(((struct rk_error *)0)->text)] = "";
    if (status != RK_OK) {
        (void)snprintf(message, sizeof(message), "%s",
                       text[0] != '\0'         ? text
                       : call->refusal.text[0] ? call->refusal.text
                                               : rk_status_text(status));
        rk_text_clean(message);
    }
    grpc_slice details = grpc_slice_from_copied_string(message);
    grpc_metadata trailer = {.key = grpc_slice_from_static_string(RPC_STATUS_KEY),
                             .value = grpc_slice_from_static_string(rk_status_name(status))};
    grpc_op ops[3] = {{.op = GRPC_OP_SEND_STATUS_FROM_SERVER,
                       .data.send_status_from_server = {.trailing_metadata_count = status != RK_OK,
                                                        .trailing_metadata = &trailer,
                                                        .status = rpc_status_to_code(status),
                                                        .status_details = &details}}};
    size_t num_ops = 1;
    if (!call->opened) {
        ops[num_ops++] = (grpc_op){.op = GRPC_OP_SEND_INITIAL_METADATA};
        call->opened = true;
    }
    if (call->held && status == RK_OK) {
        ops[num_ops++] =
            (grpc_op){.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = call->held};
    }
    call_start(call, &call->ending, ops, num_ops);
    grpc_slice_unref(details);
}
