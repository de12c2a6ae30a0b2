#include "common/base/address.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/text.h"
#include "common/rpc/rpc_internal.h"

#include <errno.h>
#include <grpc/grpc_security.h>
#include <string.h>

#define BACKOFF_FIRST_MS  100
#define BACKOFF_MAX_MS    1000
#define KEEPALIVE_MS      10000
#define RENEW_MS          100  /* at most so often, since several calls fail together */
#define IDLE_MS           20   /* so long unused, a channel is looked at before its next call */
#define DEADLINE_SLACK_MS 1000 /* gRPC's own deadline goes first: it knows the better reason */

static grpc_channel *channel_open(const char *address)
{
    static const struct rpc_setting settings[] = {
        {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, RK_RPC_MESSAGE_BYTES_MAX},
        {GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, RK_RPC_MESSAGE_BYTES_MAX},
        {GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, BACKOFF_FIRST_MS},
        {GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
         BACKOFF_MAX_MS}, /* also how long one attempt to connect may take */
        {GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, BACKOFF_MAX_MS},
        {GRPC_ARG_ENABLE_RETRIES, 0},
        {GRPC_ARG_ENABLE_HTTP_PROXY, 0},
        {GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1},
        /* A channel's own connection: two of them to one address share neither it nor back-off. */
        {GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1},
        {GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS},
        {GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_MS},
        {GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0},
    };
    grpc_arg args[sizeof(settings) / sizeof(settings[0])];
    rpc_settings_fill(settings, sizeof(settings) / sizeof(settings[0]), args);
    grpc_channel_args all = {.num_args = sizeof(args) / sizeof(args[0]), .args = args};
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create(address, credentials, &all);
    grpc_channel_credentials_release(credentials);
    return channel;
}

enum rk_status rk_rpc_channel_create(const char *address, struct rk_rpc_channel **ret_channel,
                                     struct rk_error *error)
{
    enum rk_status status = rpc_fork_check(error);
    if (status == RK_OK) {
        status = rk_address_check(address, RK_ADDRESS_CALL, error);
    }
    if (status != RK_OK) {
        return status;
    }
    struct rk_rpc_channel *channel = rk_alloc_zero(1, sizeof(*channel));
    char *copy = rk_alloc_string(address);
    if (!channel || !copy) {
        rk_free(channel);
        rk_free(copy);
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a channel to %s", address);
    }
    rpc_library_start();
    atomic_init(&channel->refs, 1);
    RK_ASSERT(pthread_mutex_init(&channel->lock, NULL) == 0);
    channel->address = copy;
    channel->channel = channel_open(address);
    channel->made_ns = rk_clock_ns();
    *ret_channel = channel;
    return RK_OK;
}

void rpc_channel_ref(struct rk_rpc_channel *channel)
{
    atomic_fetch_add(&channel->refs, 1);
}

void rpc_channel_unref(struct rk_rpc_channel *channel)
{
    if (atomic_fetch_sub(&channel->refs, 1) != 1) {
        return;
    }
    grpc_channel_destroy(channel->channel);
    (void)pthread_mutex_destroy(&channel->lock);
    rk_free(channel->address);
    rk_free(channel);
    grpc_shutdown();
}

void rpc_channel_look(struct rk_rpc_channel *channel, grpc_completion_queue *queue)
{
    int64_t now_ns = rk_clock_ns();
    if (now_ns - atomic_exchange(&channel->used_ns, now_ns) > IDLE_MS * INT64_C(1000000)) {
        rpc_queue_look(queue);
    }
}

void rk_rpc_channel_destroy(struct rk_rpc_channel *channel)
{
    if (channel) {
        rpc_channel_unref(channel);
    }
}

grpc_call *rpc_channel_call(struct rk_rpc_channel *channel, grpc_completion_queue *queue,
                            const char *path, int timeout_ms)
{
    grpc_slice method = grpc_slice_from_copied_string(path);
    (void)pthread_mutex_lock(&channel->lock);
    grpc_call *call =
        grpc_channel_create_call(channel->channel, NULL, GRPC_PROPAGATE_DEFAULTS, queue, method,
                                 NULL, rpc_timespec_in_ms(timeout_ms), NULL);
    (void)pthread_mutex_unlock(&channel->lock);
    grpc_slice_unref(method);
    return call;
}

/* Its connection is out of step with the server: gRPC does not notice, and would keep it. Calls
 * under way have references of their own to what they use. */
static void channel_renew(struct rk_rpc_channel *channel)
{
    (void)pthread_mutex_lock(&channel->lock);
    grpc_channel *old = NULL;
    if (rk_clock_ns() - channel->made_ns > RENEW_MS * INT64_C(1000000)) {
        old = channel->channel;
        channel->channel = channel_open(channel->address);
        channel->made_ns = rk_clock_ns();
    }
    (void)pthread_mutex_unlock(&channel->lock);
    if (old) {
        grpc_channel_destroy(old);
    }
}

gpr_timespec rpc_timespec_in_ms(int timeout_ms)
{
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                        gpr_time_from_millis(timeout_ms, GPR_TIMESPAN));
}

/* gRPC knows one code for a peer that refuses and for a socket that this process could not make. */
static bool is_our_own_trouble(const char *text)
{
    static const int causes[] = {EMFILE, ENFILE, ENOBUFS, ENOMEM};
    for (size_t i = 0; i < sizeof(causes) / sizeof(causes[0]); i++) {
        if (strstr(text, strerrordesc_np(causes[i]))) {
            return true;
        }
    }
    return false;
}

enum rk_status rpc_call_outcome(struct rk_rpc_channel *channel, const char *path,
                                grpc_status_code code, const grpc_metadata_array *trailer,
                                const grpc_slice *message, struct rk_error *error)
{
    char text[sizeof(error->text)];
    rpc_slice_to_text(message, text, sizeof(text));
    rk_text_clean(text); /* It comes from the peer. */
    bool from_peer = false;
    enum rk_status status = rpc_status_from_wire(code, trailer, text, &from_peer);
    if (status == RK_OK) {
        return RK_OK;
    }
    if (from_peer) {
        (void)rk_error_set(error, status, "%s", text); /* the handler's own words */
        if (error) {
            error->answered = true;
        }
        return status;
    }
    if (code == GRPC_STATUS_INTERNAL) {
        /* Not a handler's word but the protocol's, such as "Missing :authority header" when another
         * process wrote to the same connection: that one is of no use any more. */
        channel_renew(channel);
        status = RK_ERR_UNAVAILABLE;
    }
    if (status == RK_ERR_UNAVAILABLE && is_our_own_trouble(text)) {
        status = RK_ERR_NO_MEMORY; /* The peer may be in the best of health. */
    }
    /* Cut from the right, so that who and what survive. */
    (void)rk_error_set(error, status, "%s", text[0] != '\0' ? text : rk_status_text(status));
    rk_error_prefix(error, "call %s to %s failed", path, channel->address);
    return status;
}

/* All of a unary call that gRPC writes to until the batch has ended. */
struct unary {
    struct rpc_sync sync;
    struct rpc_batch batch;
    grpc_call *call;
    grpc_completion_queue *queue; /* of this call alone, worked by its thread */
    grpc_metadata_array initial;
    grpc_metadata_array trailer;
    grpc_status_code code;
    grpc_slice message;
    grpc_byte_buffer *reply;
};

static void unary_run(struct unary *unary, struct rk_rpc_channel *channel, const char *path,
                      grpc_byte_buffer *request, const struct rk_until *until)
{
    int timeout_ms = rk_deadline_left_ms(until->deadline_ns);
    struct rk_until late = *until;
    late.deadline_ns = rk_deadline_in_ms((int64_t)timeout_ms + DEADLINE_SLACK_MS);
    unary->call = rpc_channel_call(channel, unary->queue, path, timeout_ms);
    grpc_op ops[] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA},
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = request},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA,
         .data.recv_initial_metadata.recv_initial_metadata = &unary->initial},
        {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &unary->reply},
        {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
         .data.recv_status_on_client = {.trailing_metadata = &unary->trailer,
                                        .status = &unary->code,
                                        .status_details = &unary->message}},
    };
    rpc_batch_init(&unary->batch, &unary->sync);
    unary->batch.pluck = unary->queue;
    rpc_batch_start(&unary->batch, unary->call, ops, sizeof(ops) / sizeof(ops[0]));
    (void)rpc_batch_finish(&unary->batch, unary->call, &late);
}

static enum rk_status unary_reply(struct unary *unary, struct rk_rpc_channel *channel,
                                  const char *path, const struct ProtobufCMessageDescriptor *type,
                                  struct ProtobufCMessage **ret_reply, struct rk_error *error)
{
    enum rk_status status =
        rpc_call_outcome(channel, path, unary->code, &unary->trailer, &unary->message, error);
    if (status != RK_OK) {
        return status;
    }
    if (!unary->reply) {
        return rk_error_set(error, RK_ERR_INTERNAL, "call %s to %s ended without a reply", path,
                            channel->address);
    }
    struct rpc_scratch scratch = {0};
    status = rpc_message_unpack(unary->reply, type, &scratch, ret_reply, NULL);
    rk_free(scratch.data);
    if (status != RK_OK) {
        (void)rk_error_set(error, status, "the reply to %s from %s cannot be read: %s", path,
                           channel->address, rk_status_text(status));
    }
    return status;
}

enum rk_status rk_rpc_unary(struct rk_rpc_channel *channel, const char *path,
                            const struct ProtobufCMessage *request,
                            const struct ProtobufCMessageDescriptor *type, int timeout_ms,
                            struct ProtobufCMessage **ret_reply, struct rk_error *error)
{
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(timeout_ms)};
    return rk_rpc_unary_until(channel, path, request, type, &until, ret_reply, error);
}

enum rk_status rk_rpc_unary_until(struct rk_rpc_channel *channel, const char *path,
                                  const struct ProtobufCMessage *request,
                                  const struct ProtobufCMessageDescriptor *type,
                                  const struct rk_until *until, struct ProtobufCMessage **ret_reply,
                                  struct rk_error *error)
{
    grpc_byte_buffer *buffer = NULL;
    enum rk_status status = rpc_message_pack(request, &buffer);
    if (status != RK_OK) {
        return rk_error_set(error, status, "the request of %s cannot be sent: %s", path,
                            rk_status_text(status));
    }
    struct unary unary = {.message = grpc_empty_slice()};
    unary.queue = grpc_completion_queue_create_for_pluck(NULL);
    rpc_sync_init(&unary.sync);
    grpc_metadata_array_init(&unary.initial);
    grpc_metadata_array_init(&unary.trailer);
    rpc_channel_look(channel, unary.queue);
    unary_run(&unary, channel, path, buffer, until);
    status = unary_reply(&unary, channel, path, type, ret_reply, error);

    grpc_byte_buffer_destroy(buffer);
    if (unary.reply) {
        grpc_byte_buffer_destroy(unary.reply);
    }
    grpc_slice_unref(unary.message);
    grpc_metadata_array_destroy(&unary.initial);
    grpc_metadata_array_destroy(&unary.trailer);
    grpc_call_unref(unary.call);
    rpc_queue_destroy(unary.queue);
    rpc_sync_destroy(&unary.sync);
    return status;
}
