#include "common/base/alloc.h"
#include "common/rpc/rpc_internal.h"

#include "rpc_descriptor.pb-c.h"

#include <string.h>

/* The descriptor sets that protoc wrote, as bytes of this object file. */
#define EMBED(name, path)                                                                          \
    __asm__(".pushsection .rodata\n" #name "_begin:\n.incbin \"" path "\"\n" #name                 \
            "_end:\n.byte 0\n.popsection\n");                                                      \
    extern const uint8_t name##_begin[] __attribute__((visibility("hidden")));                     \
    extern const uint8_t name##_end[] __attribute__((visibility("hidden")))

EMBED(rpc_embedded_redknot, REDKNOT_PROTOSET);
EMBED(rpc_embedded_builtin, RPC_PROTOSET);

static const Redknot__Rpc__DescriptorFile *parsed(const struct rpc_descriptor_file *file)
{
    return (const Redknot__Rpc__DescriptorFile *)file->parsed;
}

/* Takes the name. */
static enum rk_status symbol_add(struct rpc_descriptors *descriptors, char *name,
                                 bool request_is_single, bool reply_is_single)
{
    if (!name) {
        return RK_ERR_NO_MEMORY;
    }
    if (descriptors->num_symbols == descriptors->symbols_room) {
        size_t room = descriptors->symbols_room > 0 ? 2 * descriptors->symbols_room : 64;
        struct rpc_symbol *symbols =
            room <= RPC_SYMBOLS_MAX ? rk_alloc_resize(descriptors->symbols, room, sizeof(*symbols))
                                    : NULL;
        if (!symbols) {
            rk_free(name);
            return room <= RPC_SYMBOLS_MAX ? RK_ERR_NO_MEMORY : RK_ERR_TOO_LONG;
        }
        descriptors->symbols = symbols;
        descriptors->symbols_room = room;
    }
    descriptors->symbols[descriptors->num_symbols++] =
        (struct rpc_symbol){.name = name,
                            .file = descriptors->num_files - 1, /* the file being read */
                            .request_is_single = request_is_single,
                            .reply_is_single = reply_is_single};
    return RK_OK;
}

static char *name_join(const char *scope, const char *name)
{
    return scope[0] != '\0' ? rk_alloc_format("%s.%s", scope, name) : rk_alloc_string(name);
}

static enum rk_status enums_add(struct rpc_descriptors *descriptors, const char *scope,
                                Redknot__Rpc__DescriptorEnum **enums, size_t num_enums)
{
    enum rk_status status = RK_OK;
    for (size_t i = 0; i < num_enums && status == RK_OK; i++) {
        status = symbol_add(descriptors, name_join(scope, enums[i]->name), false, false);
    }
    return status;
}

static enum rk_status message_add(struct rpc_descriptors *descriptors, const char *scope,
                                  const Redknot__Rpc__DescriptorMessage *message, int depth)
{
    if (depth == RPC_NESTING_MAX) {
        return RK_ERR_TOO_LONG;
    }
    char *name = name_join(scope, message->name);
    char *inner = name ? rk_alloc_string(name) : NULL;
    if (!inner) {
        rk_free(name);
        return RK_ERR_NO_MEMORY;
    }
    enum rk_status status = symbol_add(descriptors, name, false, false);
    if (status == RK_OK) {
        status = enums_add(descriptors, inner, message->enum_type, message->n_enum_type);
    }
    for (size_t i = 0; i < message->n_nested_type && status == RK_OK; i++) {
        struct ProtobufCMessage *nested = NULL;
        status = rk_rpc_message_unpack(message->nested_type[i].data, message->nested_type[i].len,
                                       &redknot__rpc__descriptor_message__descriptor, &nested);
        if (status == RK_OK) {
            status = message_add(descriptors, inner,
                                 (const Redknot__Rpc__DescriptorMessage *)nested, depth + 1);
        }
        rk_rpc_message_free(nested);
    }
    rk_free(inner);
    return status;
}

static enum rk_status service_add(struct rpc_descriptors *descriptors, const char *scope,
                                  const Redknot__Rpc__DescriptorService *service)
{
    char *inner = name_join(scope, service->name);
    if (!inner) {
        return RK_ERR_NO_MEMORY;
    }
    enum rk_status status = symbol_add(descriptors, rk_alloc_string(inner), false, false);
    for (size_t i = 0; i < service->n_method && status == RK_OK; i++) {
        status = symbol_add(descriptors, name_join(inner, service->method[i]->name),
                            !service->method[i]->client_streaming,
                            !service->method[i]->server_streaming);
    }
    rk_free(inner);
    return status;
}

static enum rk_status file_add(struct rpc_descriptors *descriptors, const ProtobufCBinaryData *data)
{
    if (descriptors->num_files == RPC_FILES_MAX) {
        return RK_ERR_TOO_LONG;
    }
    struct rpc_descriptor_file *files =
        rk_alloc_resize(descriptors->files, descriptors->num_files + 1, sizeof(*files));
    if (!files) {
        return RK_ERR_NO_MEMORY;
    }
    descriptors->files = files;
    struct ProtobufCMessage *message = NULL;
    enum rk_status status = rk_rpc_message_unpack(
        data->data, data->len, &redknot__rpc__descriptor_file__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__Rpc__DescriptorFile *file = (const Redknot__Rpc__DescriptorFile *)message;
    descriptors->files[descriptors->num_files++] = (struct rpc_descriptor_file){
        .name = file->name, .data = data->data, .bytes = data->len, .parsed = message};
    status = enums_add(descriptors, file->package, file->enum_type, file->n_enum_type);
    for (size_t i = 0; i < file->n_message_type && status == RK_OK; i++) {
        status = message_add(descriptors, file->package, file->message_type[i], 0);
    }
    for (size_t i = 0; i < file->n_service && status == RK_OK; i++) {
        status = service_add(descriptors, file->package, file->service[i]);
    }
    return status;
}

enum rk_status rpc_descriptors_add(struct rpc_descriptors *descriptors, const uint8_t *set,
                                   size_t bytes)
{
    struct ProtobufCMessage **sets = rk_alloc_resize(descriptors->sets, descriptors->num_sets + 1,
                                                     sizeof(struct ProtobufCMessage *));
    if (!sets) {
        return RK_ERR_NO_MEMORY;
    }
    descriptors->sets = sets;
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_message_unpack(set, bytes, &redknot__rpc__descriptor_set__descriptor, &message);
    if (status != RK_OK) {
        return status;
    }
    descriptors->sets[descriptors->num_sets++] = message;
    const Redknot__Rpc__DescriptorSet *files = (const Redknot__Rpc__DescriptorSet *)message;
    for (size_t i = 0; i < files->n_file && status == RK_OK; i++) {
        status = file_add(descriptors, &files->file[i]);
    }
    return status;
}

enum rk_status rpc_descriptors_create(struct rpc_descriptors **ret_descriptors)
{
    struct rpc_descriptors *descriptors = rk_alloc_zero(1, sizeof(*descriptors));
    if (!descriptors) {
        return RK_ERR_NO_MEMORY;
    }
    enum rk_status status =
        rpc_descriptors_add(descriptors, rpc_embedded_redknot_begin,
                            (size_t)(rpc_embedded_redknot_end - rpc_embedded_redknot_begin));
    if (status == RK_OK) {
        status =
            rpc_descriptors_add(descriptors, rpc_embedded_builtin_begin,
                                (size_t)(rpc_embedded_builtin_end - rpc_embedded_builtin_begin));
    }
    if (status != RK_OK) {
        goto fail;
    }
    *ret_descriptors = descriptors;
    return RK_OK;

fail:
    rpc_descriptors_destroy(descriptors);
    return status;
}

void rpc_descriptors_destroy(struct rpc_descriptors *descriptors)
{
    if (!descriptors) {
        return;
    }
    for (size_t i = 0; i < descriptors->num_symbols; i++) {
        rk_free(descriptors->symbols[i].name);
    }
    for (size_t i = 0; i < descriptors->num_files; i++) {
        rk_rpc_message_free(descriptors->files[i].parsed);
    }
    for (size_t i = 0; i < descriptors->num_sets; i++) {
        rk_rpc_message_free(descriptors->sets[i]);
    }
    rk_free(descriptors->symbols);
    rk_free(descriptors->files);
    rk_free(descriptors->sets);
    rk_free(descriptors);
}

const struct rpc_symbol *rpc_descriptors_symbol(const struct rpc_descriptors *descriptors,
                                                const char *name)
{
    for (size_t i = 0; i < descriptors->num_symbols; i++) {
        if (strcmp(descriptors->symbols[i].name, name) == 0) {
            return &descriptors->symbols[i];
        }
    }
    return NULL;
}

size_t rpc_descriptors_file(const struct rpc_descriptors *descriptors, const char *name)
{
    size_t i = 0;
    while (i < descriptors->num_files && strcmp(descriptors->files[i].name, name) != 0) {
        i++;
    }
    return i;
}

size_t rpc_descriptors_closure(const struct rpc_descriptors *descriptors, size_t file,
                               size_t *ret_order)
{
    size_t count = 0;
    ret_order[count++] = file;
    /* Breadth first; a file is entered once, so imports in a circle end too. */
    for (size_t next = 0; next < count; next++) {
        const Redknot__Rpc__DescriptorFile *at = parsed(&descriptors->files[ret_order[next]]);
        for (size_t i = 0; i < at->n_dependency; i++) {
            size_t found = rpc_descriptors_file(descriptors, at->dependency[i]);
            bool known = found == descriptors->num_files;
            for (size_t k = 0; k < count && !known; k++) {
                known = ret_order[k] == found;
            }
            if (!known) {
                ret_order[count++] = found;
            }
        }
    }
    return count;
}
