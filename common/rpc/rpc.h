/*
 * rpc: gRPC servers and clients with blocking calls and a deadline on each.
 *
 * The only user of gRPC core. A handler runs on its own thread of a bounded
 * pool and talks to its call with blocking recv and send; over the bound a
 * caller gets RESOURCE_EXHAUSTED at once. Every server also serves
 * grpc.health.v1 (Check, Watch) and server reflection (v1 and v1alpha).
 *
 * An rk_status travels as the gRPC code nearest to it plus the trailer
 * "redknot-status: NAME", so that a miss's reason survives the wire; the error
 * text is the gRPC status message.
 *
 * protobuf-c's types are only named here by their struct tags.
 */
#ifndef RK_COMMON_RPC_RPC_H
#define RK_COMMON_RPC_RPC_H

#include "common/base/status.h"
#include "common/base/until.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ProtobufCMessage;
struct ProtobufCMessageDescriptor;

#define RK_RPC_MESSAGE_BYTES_MAX (64u << 20) /* both directions */

/* ---- Server ---- */

struct rk_rpc_server;
struct rk_rpc_call; /* server side of one call; belongs to its handler's thread */

/* The returned status (and *error's text) ends the call. */
typedef enum rk_status (*rk_rpc_handler)(struct rk_rpc_call *call, void *context,
                                         struct rk_error *error);

struct rk_rpc_method {
    const char *path; /* "/redknot.v1.KvStore/Put"; kept by pointer */
    rk_rpc_handler handler;
    size_t request_bytes_max; /* of one message, unpacked only within it; 0: as above */
};

struct rk_rpc_server_options {
    const char *address;          /* "127.0.0.1:7100"; port 0 picks a free one */
    uint32_t calls_max;           /* handlers at once, 0: 64, and a quarter more that only calls
                                   * without streams get; health needs none */
    uint32_t connections_max;     /* 0: 4096; one over that is ended at once */
    uint32_t bind_wait_ms;        /* for a port that is in use; 0: not at all */
    uint32_t default_deadline_ms; /* for calls that bring none, 0: 600,000 */
    uint32_t recv_idle_ms;        /* a client that sends no message for so long while one is waited
                                   * for loses its call with RK_ERR_DEADLINE; 0: 30,000 */
    uint32_t send_timeout_ms;     /* a client that takes no message for so long loses its call with
                                   * RK_ERR_DEADLINE; 0: it has until the call's deadline */
};

/* Binds but does not serve yet. RK_ERR_IO names the address and why (port in use). */
RK_MUST_CHECK enum rk_status rk_rpc_server_create(const struct rk_rpc_server_options *options,
                                                  struct rk_rpc_server **ret_server,
                                                  struct rk_error *error);
/* Before start. methods: num_methods rows, copied. service: "redknot.v1.KvStore", for health. */
RK_MUST_CHECK enum rk_status rk_rpc_server_add_service(struct rk_rpc_server *server,
                                                       const char *service,
                                                       const struct rk_rpc_method *methods,
                                                       size_t num_methods, void *context);
RK_MUST_CHECK enum rk_status rk_rpc_server_start(struct rk_rpc_server *server);
int rk_rpc_server_port(const struct rk_rpc_server *server);
/* Health of every service and of "". Starts as serving. */
void rk_rpc_server_set_serving(struct rk_rpc_server *server, bool serving);
/* No new calls; cancels running ones after grace_ms; returns when all handlers are out. */
void rk_rpc_server_stop(struct rk_rpc_server *server, int grace_ms);
void rk_rpc_server_destroy(struct rk_rpc_server *server); /* stops if needed; accepts NULL */

/* Next request message, unpacked; caller frees it with rk_rpc_message_free.
 * RK_ERR_NOT_FOUND: the client sent its last one. RK_ERR_INVALID: not this
 * message, or one with a string that is no text (see rk_rpc_message_check_text); the call then
 * ends with a sentence about it unless the handler has one. RK_ERR_CANCELLED, RK_ERR_DEADLINE. */
RK_MUST_CHECK enum rk_status rk_rpc_call_recv(struct rk_rpc_call *call,
                                              const struct ProtobufCMessageDescriptor *type,
                                              struct ProtobufCMessage **ret_message);
/* Blocks until gRPC has taken it: at most one is in flight. */
RK_MUST_CHECK enum rk_status rk_rpc_call_send(struct rk_rpc_call *call,
                                              const struct ProtobufCMessage *message);
/* A message given as bytes in parts, sent without a copy; the parts stay
 * untouched until release(release_context) is called, once, from any thread,
 * also when sending fails. For big values: protobuf header, then payload. */
struct rk_rpc_part {
    const void *data;
    size_t bytes;
};
RK_MUST_CHECK enum rk_status rk_rpc_call_send_parts(struct rk_rpc_call *call,
                                                    const struct rk_rpc_part *parts,
                                                    size_t num_parts,
                                                    void (*release)(void *release_context),
                                                    void *release_context);
/* The same for the last message of a call that will end with RK_OK: it leaves together with the
 * status, when the handler returns. With another status it is not sent. */
RK_MUST_CHECK enum rk_status rk_rpc_call_send_last_parts(struct rk_rpc_call *call,
                                                         const struct rk_rpc_part *parts,
                                                         size_t num_parts,
                                                         void (*release)(void *release_context),
                                                         void *release_context);
/* Ends the call with RK_OK before its handler returns, for work that goes on behind the answer: the
 * client has its status, and nothing more can be received, sent or told. The handler's thread stays
 * taken until it returns; what it returns is ignored. */
void rk_rpc_call_end_early(struct rk_rpc_call *call);
/* True once the client is gone or the deadline passed. False for good after rk_rpc_call_end_early.
 * Cheap; from any thread. */
bool rk_rpc_call_cancelled(struct rk_rpc_call *call);
int64_t rk_rpc_call_deadline_ns(const struct rk_rpc_call *call);

/* ---- Client ---- */

struct rk_rpc_channel; /* any thread; connects lazily, reconnects with back-off */
struct rk_rpc_stream;  /* one call with streams; belongs to one thread */

/* RK_ERR_UNSUPPORTED in a child that was forked after its parent used gRPC: it would harm both. */
RK_MUST_CHECK enum rk_status rk_rpc_channel_create(const char *address,
                                                   struct rk_rpc_channel **ret_channel,
                                                   struct rk_error *error);
void rk_rpc_channel_destroy(struct rk_rpc_channel *channel); /* accepts NULL */

/* reply: of `type`, caller frees with rk_rpc_message_free. RK_ERR_NO_MEMORY, not answered by the
 * peer: this process had no descriptor or memory for the connection, which says nothing of the
 * peer. */
RK_MUST_CHECK enum rk_status rk_rpc_unary(struct rk_rpc_channel *channel, const char *path,
                                          const struct ProtobufCMessage *request,
                                          const struct ProtobufCMessageDescriptor *type,
                                          int timeout_ms, struct ProtobufCMessage **ret_reply,
                                          struct rk_error *error);

/* The same until a deadline or a cancellation: then RK_ERR_DEADLINE, RK_ERR_CANCELLED. */
RK_MUST_CHECK enum rk_status rk_rpc_unary_until(struct rk_rpc_channel *channel, const char *path,
                                                const struct ProtobufCMessage *request,
                                                const struct ProtobufCMessageDescriptor *type,
                                                const struct rk_until *until,
                                                struct ProtobufCMessage **ret_reply,
                                                struct rk_error *error);

RK_MUST_CHECK enum rk_status rk_rpc_stream_open(struct rk_rpc_channel *channel, const char *path,
                                                int timeout_ms, struct rk_rpc_stream **ret_stream,
                                                struct rk_error *error);
/* A call with one request, which leaves together with the opening: nothing more is sent. */
RK_MUST_CHECK enum rk_status rk_rpc_stream_open_with(
    struct rk_rpc_channel *channel, const char *path, const struct ProtobufCMessage *request,
    int timeout_ms, struct rk_rpc_stream **ret_stream, struct rk_error *error);
RK_MUST_CHECK enum rk_status rk_rpc_stream_send(struct rk_rpc_stream *stream,
                                                const struct ProtobufCMessage *message);
/* As rk_rpc_call_send_parts. */
RK_MUST_CHECK enum rk_status rk_rpc_stream_send_parts(struct rk_rpc_stream *stream,
                                                      const struct rk_rpc_part *parts,
                                                      size_t num_parts,
                                                      void (*release)(void *release_context),
                                                      void *release_context);
RK_MUST_CHECK enum rk_status rk_rpc_stream_send_done(struct rk_rpc_stream *stream);
/* RK_ERR_NOT_FOUND: the server sent its last message and the call is over; ask finish why. */
RK_MUST_CHECK enum rk_status rk_rpc_stream_recv(struct rk_rpc_stream *stream,
                                                const struct ProtobufCMessageDescriptor *type,
                                                struct ProtobufCMessage **ret_message);
/* As recv, but gives the message's bytes as they came, in pieces, in order, without a copy; the
 * next message is received meanwhile. */
typedef void (*rk_rpc_piece_callback)(void *context, const void *data, size_t bytes);
RK_MUST_CHECK enum rk_status rk_rpc_stream_recv_pieces(struct rk_rpc_stream *stream,
                                                       rk_rpc_piece_callback on_piece,
                                                       void *context);
/* Waits for the call's final status (cancels it first when the streams are not at their end). */
RK_MUST_CHECK enum rk_status rk_rpc_stream_finish(struct rk_rpc_stream *stream,
                                                  struct rk_error *error);
/* From now on waits also end when until is cancelled, which cancels the call; its deadline is not
 * looked at. Borrowed for the stream's life. */
void rk_rpc_stream_watch(struct rk_rpc_stream *stream, const struct rk_until *until);
void rk_rpc_stream_cancel(struct rk_rpc_stream *stream);  /* from any thread */
void rk_rpc_stream_destroy(struct rk_rpc_stream *stream); /* accepts NULL */

/* RK_ERR_INVALID: the bytes are no such message. RK_ERR_NO_MEMORY. */
RK_MUST_CHECK enum rk_status rk_rpc_message_unpack(const void *data, size_t bytes,
                                                   const struct ProtobufCMessageDescriptor *type,
                                                   struct ProtobufCMessage **ret_message);
void rk_rpc_message_free(struct ProtobufCMessage *message); /* accepts NULL */
/* RK_ERR_INVALID, and a sentence, when a string of the message, or of one inside it, is not UTF-8
 * or holds a NUL: unpacked it would be cut there. rk_rpc_call_recv does this for every request;
 * for bytes that came another way it is done before rk_rpc_message_unpack. RK_ERR_TOO_LONG:
 * unpacked it would take more than 32 MiB and twice its bytes, as a list of millions of empty
 * messages. */
RK_MUST_CHECK enum rk_status rk_rpc_message_check_text(
    const void *data, size_t bytes, const struct ProtobufCMessageDescriptor *type,
    struct rk_error *error);

#endif
