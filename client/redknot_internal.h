/*
 * redknot_internal: what the sources of libredknot share. Private to client/ and its tests.
 *
 * redknot.c         the client: connections, the cluster, the choice of a worker
 * redknot_calls.c   put, generate, score and their messages
 * redknot_worker.c  a worker's status, the tokens of a text
 */
#ifndef CLIENT_REDKNOT_INTERNAL_H
#define CLIENT_REDKNOT_INTERNAL_H

#include "client/redknot.h"

#include <stddef.h>
#include <stdint.h>

struct ProtobufCBinaryData;
struct ProtobufCMessage;
struct ProtobufCMessageDescriptor;

/* Takes each reply; keeps it when it sets *message to NULL. */
typedef enum rk_status (*rk_reply_handler)(void *context, struct ProtobufCMessage **message,
                                           struct rk_error *error);

struct rk_client_call {
    const char *path;
    const struct ProtobufCMessage *request;
    const struct ProtobufCMessageDescriptor *reply_type;
    rk_reply_handler handler;
    void *context;
};

/* At the living workers in turn until one has answered something. */
RK_MUST_CHECK enum rk_status rk_client_call_worker(struct rk_client *client,
                                                   const struct rk_client_call *call,
                                                   struct rk_error *error);
enum rk_status rk_client_no_memory(struct rk_error *error, const char *what);
/* All zero unless the bytes are exactly an id. */
struct rk_id rk_id_from_message(struct ProtobufCBinaryData bytes);

#endif
