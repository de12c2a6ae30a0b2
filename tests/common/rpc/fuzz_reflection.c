/*
 * Goal:   no descriptor set and no reflection request, however broken, makes the
 *         parsers of this process read or write out of bounds or loop.
 * Method: the first byte chooses: a request to the real descriptors, or a
 *         descriptor set of which every symbol's file is then asked for.
 */
#include "common/base/alloc.h"
#include "common/rpc/rpc_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void fuzz_request(const uint8_t *data, size_t bytes)
{
    static struct rpc_descriptors *descriptors;
    static const char *const services[] = {"redknot.v1.Worker"};
    uint8_t *reply = NULL;
    size_t reply_bytes = 0;
    if (!descriptors) {
        RK_ASSERT(rpc_descriptors_create(&descriptors) == RK_OK);
    }
    if (rpc_reflection_answer(descriptors, services, 1, data, bytes, &reply, &reply_bytes) ==
        RK_OK) {
        rk_free(reply);
    }
}

static void fuzz_set(const uint8_t *data, size_t bytes)
{
    struct rpc_descriptors *descriptors = rk_alloc_zero(1, sizeof(*descriptors));
    RK_ASSERT(descriptors != NULL);
    if (rpc_descriptors_add(descriptors, data, bytes) == RK_OK && descriptors->num_files > 0) {
        size_t *order = rk_alloc_zero(descriptors->num_files, sizeof(*order));
        RK_ASSERT(order != NULL);
        for (size_t i = 0; i < descriptors->num_symbols && i < 64; i++) {
            const struct rpc_symbol *symbol =
                rpc_descriptors_symbol(descriptors, descriptors->symbols[i].name);
            RK_ASSERT(symbol && symbol->file < descriptors->num_files);
            RK_ASSERT(rpc_descriptors_closure(descriptors, symbol->file, order) <=
                      descriptors->num_files);
        }
        rk_free(order);
    }
    rpc_descriptors_destroy(descriptors);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes > 0 && data[0] % 2 == 0) {
        fuzz_request(data + 1, bytes - 1);
    } else if (bytes > 0) {
        fuzz_set(data + 1, bytes - 1);
    }
    return 0;
}
