/*
 * A bare gRPC core stream, without protobuf: messages of up to 1 MiB, whose slices point at the
 * sender's memory, one outstanding; the receiver copies them into its place. One call moves a
 * batch.
 *
 *   bench_raw_grpc serve PORT | agent PORT
 */
#include "bench/agent.h"
#include "bench/peers/support.h"

#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <stdio.h>
#include <string.h>

#define METHOD            "/bench.Raw/Move"
#define MESSAGE_BYTES_MAX (1u << 20)
#define OPS_MAX           5

/* Operations of one batch; they complete together. */
struct ops {
    grpc_op op[OPS_MAX];
    size_t count;
};

struct client {
    grpc_channel *channel;
    grpc_completion_queue *queue;
    void *method;
};

static grpc_op *ops_add(struct ops *ops, grpc_op_type type)
{
    grpc_op *op = &ops->op[ops->count++];
    *op = (grpc_op){.op = type};
    return op;
}

static void ops_run(grpc_call *call, grpc_completion_queue *queue, struct ops *ops)
{
    if (grpc_call_start_batch(call, ops->op, ops->count, ops, NULL) != GRPC_CALL_OK) {
        agent_fail("gRPC: a batch was refused");
    }
    grpc_event event = grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    if (event.tag != ops || !event.success) {
        agent_fail("gRPC: a batch failed");
    }
    ops->count = 0;
}

static void stays(void *user_data)
{
    (void)user_data;
}

static grpc_byte_buffer *message_of(const void *data, size_t bytes)
{
    void *memory = (void *)(uintptr_t)data;
    grpc_slice slice = grpc_slice_new_with_user_data(memory, bytes, stays, NULL);
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return message;
}

/* Copies at most room bytes, destroys the message, and returns its size. */
static size_t message_take(grpc_byte_buffer *message, uint8_t *place, size_t room)
{
    grpc_byte_buffer_reader reader;
    grpc_slice slice;
    size_t bytes = 0;
    if (!message || !grpc_byte_buffer_reader_init(&reader, message)) {
        agent_fail("gRPC: the stream ended early");
    }
    while (grpc_byte_buffer_reader_next(&reader, &slice)) {
        size_t part = GRPC_SLICE_LENGTH(slice);
        if (part > room - bytes) {
            agent_fail("gRPC: more came than was asked for");
        }
        memcpy(place + bytes, GRPC_SLICE_START_PTR(slice), part);
        bytes += part;
        grpc_slice_unref(slice);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(message);
    return bytes;
}

/* Sends data in messages, the first together with what ops already holds. */
static void stream_send(grpc_call *call, grpc_completion_queue *queue, struct ops *ops,
                        const uint8_t *data, size_t bytes)
{
    for (size_t done = 0; done < bytes;) {
        size_t part = bytes - done < MESSAGE_BYTES_MAX ? bytes - done : MESSAGE_BYTES_MAX;
        grpc_byte_buffer *message = message_of(data + done, part);
        ops_add(ops, GRPC_OP_SEND_MESSAGE)->data.send_message.send_message = message;
        ops_run(call, queue, ops);
        grpc_byte_buffer_destroy(message);
        done += part;
    }
}

static void stream_receive(grpc_call *call, grpc_completion_queue *queue, struct ops *ops,
                           uint8_t *place, size_t bytes)
{
    for (size_t done = 0; done < bytes;) {
        grpc_byte_buffer *message = NULL;
        ops_add(ops, GRPC_OP_RECV_MESSAGE)->data.recv_message.recv_message = &message;
        ops_run(call, queue, ops);
        done += message_take(message, place + done, bytes - done);
    }
}

/* ---- The server ---- */

static void serve_call(grpc_call *call, grpc_completion_queue *queue)
{
    struct ops ops = {.count = 0};
    struct raw_request request;
    int cancelled = 0;
    stream_receive(call, queue, &ops, (uint8_t *)&request, sizeof(request));
    uint8_t *place = raw_place(&request);
    size_t bytes = request.batch * request.bytes;
    if (request.put) {
        stream_receive(call, queue, &ops, place, bytes);
        ops_add(&ops, GRPC_OP_SEND_INITIAL_METADATA);
    } else {
        ops_add(&ops, GRPC_OP_SEND_INITIAL_METADATA);
        stream_send(call, queue, &ops, place, bytes);
    }
    ops_add(&ops, GRPC_OP_SEND_STATUS_FROM_SERVER);
    ops_add(&ops, GRPC_OP_RECV_CLOSE_ON_SERVER)->data.recv_close_on_server.cancelled = &cancelled;
    ops_run(call, queue, &ops);
    grpc_call_unref(call);
}

static void serve(int port)
{
    char address[32];
    grpc_metadata_array metadata;
    gpr_timespec deadline;
    grpc_call *call = NULL;
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", port);
    grpc_init();
    grpc_completion_queue *queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server *server = grpc_server_create(NULL, NULL);
    grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
    void *method = grpc_server_register_method(server, METHOD, NULL, GRPC_SRM_PAYLOAD_NONE, 0);
    grpc_server_register_completion_queue(server, queue, NULL);
    if (grpc_server_add_http2_port(server, address, credentials) != port) {
        agent_fail("gRPC: cannot listen on %s", address);
    }
    grpc_server_credentials_release(credentials);
    grpc_server_start(server);
    for (;;) { /* The driver ends it. */
        grpc_metadata_array_init(&metadata);
        (void)grpc_server_request_registered_call(server, method, &call, &deadline, &metadata, NULL,
                                                  queue, queue, server);
        grpc_event event =
            grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        if (!event.success) {
            agent_fail("gRPC: no call came");
        }
        serve_call(call, queue);
        grpc_metadata_array_destroy(&metadata);
    }
}

/* ---- The agent ---- */

static void call_run(struct client *client, const struct raw_request *request, uint8_t *buffer,
                     const uint8_t *data)
{
    struct ops ops = {.count = 0};
    grpc_metadata_array initial;
    grpc_metadata_array trailing;
    grpc_slice details = grpc_empty_slice();
    grpc_status_code status = GRPC_STATUS_UNKNOWN;
    size_t bytes = request->batch * request->bytes;
    grpc_call *call = grpc_channel_create_registered_call(
        client->channel, NULL, GRPC_PROPAGATE_DEFAULTS, client->queue, client->method,
        gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    grpc_metadata_array_init(&initial);
    grpc_metadata_array_init(&trailing);

    grpc_byte_buffer *message = message_of(request, sizeof(*request));
    ops_add(&ops, GRPC_OP_SEND_INITIAL_METADATA);
    ops_add(&ops, GRPC_OP_SEND_MESSAGE)->data.send_message.send_message = message;
    if (data) {
        ops_run(call, client->queue, &ops);
        stream_send(call, client->queue, &ops, data, bytes);
    }
    ops_add(&ops, GRPC_OP_SEND_CLOSE_FROM_CLIENT);
    ops_add(&ops, GRPC_OP_RECV_INITIAL_METADATA)->data.recv_initial_metadata.recv_initial_metadata =
        &initial;
    if (buffer) {
        stream_receive(call, client->queue, &ops, buffer, bytes);
    }
    grpc_op *last = ops_add(&ops, GRPC_OP_RECV_STATUS_ON_CLIENT);
    last->data.recv_status_on_client.trailing_metadata = &trailing;
    last->data.recv_status_on_client.status = &status;
    last->data.recv_status_on_client.status_details = &details;
    ops_run(call, client->queue, &ops);
    if (status != GRPC_STATUS_OK) {
        agent_fail("gRPC: status %d", status);
    }
    grpc_byte_buffer_destroy(message);
    grpc_slice_unref(details);
    grpc_metadata_array_destroy(&initial);
    grpc_metadata_array_destroy(&trailing);
    grpc_call_unref(call);
}

static void get(void *context, uint64_t first, size_t batch, size_t bytes, uint8_t *buffer,
                const uint8_t **ret_values)
{
    const struct raw_request request = {first, batch, bytes, 0};
    (void)ret_values;
    call_run(context, &request, buffer, NULL);
}

static void put(void *context, uint64_t first, size_t batch, size_t bytes, const uint8_t *data)
{
    const struct raw_request request = {first, batch, bytes, 1};
    call_run(context, &request, NULL, data);
}

static int agent(int port)
{
    static const struct agent_peer peer = {.get = get, .put = put};
    char address[32];
    char key[] = GRPC_ARG_ENABLE_HTTP_PROXY;
    grpc_arg no_proxy = {.type = GRPC_ARG_INTEGER, .key = key, .value.integer = 0};
    const grpc_channel_args args = {.num_args = 1, .args = &no_proxy};
    struct client client;
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", port);
    grpc_init();
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    client.queue = grpc_completion_queue_create_for_next(NULL);
    client.channel = grpc_channel_create(address, credentials, &args);
    client.method = grpc_channel_register_call(client.channel, METHOD, NULL, NULL);
    grpc_channel_credentials_release(credentials);
    return agent_run(&peer, &client);
}

int main(int argc, char **argv)
{
    return raw_main(argc, argv, serve, agent);
}
