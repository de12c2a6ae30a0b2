/* Questions to a worker that compute nothing: its status, and the tokens of a text. */
#include "client/redknot.h"
#include "client/redknot_internal.h"
#include "common/base/alloc.h"
#include "common/rpc/rpc.h"

#include <string.h>

#include "redknot/v1/worker.pb-c.h"

/* The one reply of a call, kept. */
static enum rk_status keep_reply(void *context, ProtobufCMessage **message, struct rk_error *error)
{
    ProtobufCMessage **kept = context;
    (void)error;
    rk_rpc_message_free(*kept);
    *kept = *message;
    *message = NULL;
    return RK_OK;
}

static enum rk_status ask(struct rk_client *client, const char *path,
                          const ProtobufCMessage *request,
                          const ProtobufCMessageDescriptor *reply_type,
                          ProtobufCMessage **ret_reply, struct rk_error *error)
{
    ProtobufCMessage *reply = NULL;
    struct rk_client_call call = {.path = path,
                                  .request = request,
                                  .reply_type = reply_type,
                                  .handler = keep_reply,
                                  .context = &reply};
    enum rk_status status = rk_client_call_worker(client, &call, error);
    if (status == RK_OK && !reply) {
        status = rk_error_set(error, RK_ERR_INTERNAL, "the worker ended the call without a reply");
    }
    if (status != RK_OK) {
        rk_rpc_message_free(reply);
        return status;
    }
    *ret_reply = reply;
    return RK_OK;
}

enum rk_status rk_client_tokenize(struct rk_client *client, const char *text, bool parse_special,
                                  int32_t **ret_ids, size_t *ret_count, struct rk_error *error)
{
    Redknot__V1__TokenizeRequest request = REDKNOT__V1__TOKENIZE_REQUEST__INIT;
    ProtobufCMessage *message = NULL;
    request.text = (char *)text;
    request.parse_special = parse_special;
    enum rk_status status = ask(client, "/redknot.v1.Worker/Tokenize", &request.base,
                                &redknot__v1__tokenize_reply__descriptor, &message, error);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__TokenizeReply *reply = (const Redknot__V1__TokenizeReply *)message;
    int32_t *ids = rk_alloc_zero(reply->n_token_ids + 1, sizeof(*ids));
    if (ids) {
        for (size_t i = 0; i < reply->n_token_ids; i++) {
            ids[i] = (int32_t)reply->token_ids[i];
        }
        *ret_ids = ids;
        *ret_count = reply->n_token_ids;
    }
    rk_rpc_message_free(message);
    return ids ? RK_OK : rk_client_no_memory(error, "reading token ids");
}

void rk_client_tokens_free(int32_t *ids)
{
    rk_free(ids);
}

enum rk_status rk_client_worker_status(struct rk_client *client,
                                       struct rk_worker_status *ret_status, struct rk_error *error)
{
    Redknot__V1__WorkerStatusRequest request = REDKNOT__V1__WORKER_STATUS_REQUEST__INIT;
    ProtobufCMessage *message = NULL;
    enum rk_status status = ask(client, "/redknot.v1.Worker/WorkerStatus", &request.base,
                                &redknot__v1__worker_status_reply__descriptor, &message, error);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__WorkerStatusReply *reply = (const Redknot__V1__WorkerStatusReply *)message;
    *ret_status = (struct rk_worker_status){.node_id = reply->node_id,
                                            .model = reply->model,
                                            .mode = reply->mode,
                                            .kernels = reply->kernels,
                                            .version = reply->version,
                                            .context_tokens = reply->context_tokens,
                                            .vocab_size = reply->vocab_size,
                                            .owner = message};
    return RK_OK;
}

void rk_worker_status_clear(struct rk_worker_status *status)
{
    rk_rpc_message_free(status->owner);
    memset(status, 0, sizeof(*status));
}
