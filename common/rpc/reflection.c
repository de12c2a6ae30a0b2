#include "common/rpc/server_internal.h"

#include "common/base/alloc.h"
#include "grpc/reflection/v1/reflection.pb-c.h"

#include <protobuf-c/protobuf-c.h>

/* v1 and v1alpha are the same on the wire, so one set of messages serves both. */
#define REQUEST_IS(kind)  GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##kind
#define RESPONSE_IS(kind) GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##kind

/* One answer and what it points to. */
struct answer {
    Grpc__Reflection__V1__ServerReflectionResponse response;
    Grpc__Reflection__V1__FileDescriptorResponse files;
    Grpc__Reflection__V1__ListServiceResponse list;
    Grpc__Reflection__V1__ErrorResponse error;
    Grpc__Reflection__V1__ServiceResponse services[RPC_SERVICES_MAX];
    Grpc__Reflection__V1__ServiceResponse *service_rows[RPC_SERVICES_MAX];
    ProtobufCBinaryData *file_rows;
};

static void answer_error(struct answer *answer, enum rk_status status, const char *text)
{
    answer->error = (Grpc__Reflection__V1__ErrorResponse)GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    answer->error.error_code = (int32_t)rpc_status_to_code(status);
    answer->error.error_message = (char *)(uintptr_t)text; /* protobuf-c only reads it */
    answer->response.message_response_case = RESPONSE_IS(ERROR_RESPONSE);
    answer->response.error_response = &answer->error;
}

static void answer_list(struct answer *answer, const char *const *services, size_t num_services)
{
    RK_ASSERT(num_services <= RPC_SERVICES_MAX);
    answer->list = (Grpc__Reflection__V1__ListServiceResponse)
        GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    for (size_t i = 0; i < num_services; i++) {
        answer->services[i] =
            (Grpc__Reflection__V1__ServiceResponse)GRPC__REFLECTION__V1__SERVICE_RESPONSE__INIT;
        answer->services[i].name = (char *)(uintptr_t)services[i];
        answer->service_rows[i] = &answer->services[i];
    }
    answer->list.n_service = num_services;
    answer->list.service = answer->service_rows;
    answer->response.message_response_case = RESPONSE_IS(LIST_SERVICES_RESPONSE);
    answer->response.list_services_response = &answer->list;
}

/* The file with all its imports, so that a client needs no second question. */
static enum rk_status answer_file(struct answer *answer, const struct rpc_descriptors *descriptors,
                                  size_t file)
{
    size_t *order = rk_alloc_zero(descriptors->num_files, sizeof(*order));
    answer->file_rows = rk_alloc_zero(descriptors->num_files, sizeof(*answer->file_rows));
    if (!order || !answer->file_rows) {
        rk_free(order);
        return RK_ERR_NO_MEMORY;
    }
    answer->files = (Grpc__Reflection__V1__FileDescriptorResponse)
        GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    answer->files.n_file_descriptor_proto = rpc_descriptors_closure(descriptors, file, order);
    for (size_t i = 0; i < answer->files.n_file_descriptor_proto; i++) {
        const struct rpc_descriptor_file *from = &descriptors->files[order[i]];
        answer->file_rows[i] =
            (ProtobufCBinaryData){.len = from->bytes, .data = (uint8_t *)(uintptr_t)from->data};
    }
    rk_free(order);
    answer->files.file_descriptor_proto = answer->file_rows;
    answer->response.message_response_case = RESPONSE_IS(FILE_DESCRIPTOR_RESPONSE);
    answer->response.file_descriptor_response = &answer->files;
    return RK_OK;
}

static enum rk_status answer_fill(struct answer *answer, const struct rpc_descriptors *descriptors,
                                  const char *const *services, size_t num_services,
                                  const Grpc__Reflection__V1__ServerReflectionRequest *request)
{
    switch (request->message_request_case) {
    case REQUEST_IS(LIST_SERVICES):
        answer_list(answer, services, num_services);
        return RK_OK;
    case REQUEST_IS(FILE_BY_FILENAME): {
        size_t file = rpc_descriptors_file(descriptors, request->file_by_filename);
        if (file < descriptors->num_files) {
            return answer_file(answer, descriptors, file);
        }
        answer_error(answer, RK_ERR_NOT_FOUND, "no such file");
        return RK_OK;
    }
    case REQUEST_IS(FILE_CONTAINING_SYMBOL): {
        const struct rpc_symbol *symbol =
            rpc_descriptors_symbol(descriptors, request->file_containing_symbol);
        if (symbol) {
            return answer_file(answer, descriptors, symbol->file);
        }
        answer_error(answer, RK_ERR_NOT_FOUND, "no such symbol");
        return RK_OK;
    }
    case REQUEST_IS(FILE_CONTAINING_EXTENSION):
    case REQUEST_IS(ALL_EXTENSION_NUMBERS_OF_TYPE):
        answer_error(answer, RK_ERR_NOT_FOUND, "proto3 has no extensions");
        return RK_OK;
    default:
        answer_error(answer, RK_ERR_INVALID, "the request asks nothing that is known here");
        return RK_OK;
    }
}

static enum rk_status reflection_answer(const struct rpc_descriptors *descriptors,
                                        const char *const *services, size_t num_services,
                                        Grpc__Reflection__V1__ServerReflectionRequest *request,
                                        uint8_t **ret_reply, size_t *ret_reply_bytes)
{
    struct answer answer = {.response = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT};
    answer.response.valid_host = request->host;
    answer.response.original_request = request;
    enum rk_status status = answer_fill(&answer, descriptors, services, num_services, request);
    if (status == RK_OK) {
        size_t bytes = protobuf_c_message_get_packed_size(&answer.response.base);
        uint8_t *reply = rk_alloc(bytes > 0 ? bytes : 1);
        if (reply) {
            *ret_reply_bytes = protobuf_c_message_pack(&answer.response.base, reply);
            *ret_reply = reply;
        } else {
            status = RK_ERR_NO_MEMORY;
        }
    }
    rk_free(answer.file_rows);
    return status;
}

enum rk_status rpc_reflection_answer(const struct rpc_descriptors *descriptors,
                                     const char *const *services, size_t num_services,
                                     const uint8_t *request, size_t request_bytes,
                                     uint8_t **ret_reply, size_t *ret_reply_bytes)
{
    struct ProtobufCMessage *message = NULL;
    enum rk_status status = rk_rpc_message_unpack(
        request, request_bytes, &grpc__reflection__v1__server_reflection_request__descriptor,
        &message);
    if (status == RK_OK) {
        status = reflection_answer(descriptors, services, num_services,
                                   (Grpc__Reflection__V1__ServerReflectionRequest *)message,
                                   ret_reply, ret_reply_bytes);
        rk_rpc_message_free(message);
    }
    return status;
}

static enum rk_status reflection_info(struct rk_rpc_call *call, void *context,
                                      struct rk_error *error)
{
    (void)error;
    const struct rk_rpc_server *server = context;
    for (;;) {
        struct ProtobufCMessage *message = NULL;
        enum rk_status status = rk_rpc_call_recv(
            call, &grpc__reflection__v1__server_reflection_request__descriptor, &message);
        if (status != RK_OK) {
            return status == RK_ERR_NOT_FOUND ? RK_OK : status;
        }
        uint8_t *reply = NULL;
        size_t bytes = 0;
        status = reflection_answer(server->descriptors, server->services, server->num_services,
                                   (Grpc__Reflection__V1__ServerReflectionRequest *)message, &reply,
                                   &bytes);
        rk_rpc_message_free(message);
        if (status == RK_OK) {
            struct rk_rpc_part part = {reply, bytes};
            status = rk_rpc_call_send_parts(call, &part, 1, rk_free, reply);
        }
        if (status != RK_OK) {
            return status;
        }
    }
}

enum rk_status rpc_reflection_add(struct rk_rpc_server *server)
{
    static const struct rk_rpc_method v1[] = {
        {.path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
         .handler = reflection_info}};
    static const struct rk_rpc_method v1alpha[] = {
        {.path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
         .handler = reflection_info}};
    enum rk_status status =
        rk_rpc_server_add_service(server, "grpc.reflection.v1.ServerReflection", v1, 1, server);
    if (status == RK_OK) {
        status = rk_rpc_server_add_service(server, "grpc.reflection.v1alpha.ServerReflection",
                                           v1alpha, 1, server);
    }
    return status;
}
