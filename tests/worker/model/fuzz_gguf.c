/*
 * Goal:   no bytes make the reader of GGUF files misbehave.
 * Method: libFuzzer; what opens is read whole: every tensor, the vocabulary, the fingerprint.
 */
#include "worker/model/model.h"

#include <stdint.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void read_all(const struct model *model)
{
    const struct model_config *config = model_config(model);
    for (uint32_t layer = 0; layer < config->num_layers; layer++) {
        for (int tensor = MODEL_EMBEDDING; tensor <= MODEL_FFN_DOWN; tensor++) {
            uint32_t rows = 0;
            uint32_t columns = 0;
            if (model_tensor_shape(model, (enum model_tensor)tensor, layer, &rows, &columns) !=
                RK_OK) {
                abort();
            }
            /* The weights of a small file are at most four times as large. */
            float *out = malloc((size_t)rows * columns * sizeof(*out));
            enum rk_status status =
                model_tensor_read(model, (enum model_tensor)tensor, layer, out, NULL);
            if (!out || (status != RK_OK && status != RK_ERR_CORRUPT)) {
                abort();
            }
            free(out);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct model *model = NULL;
    struct rk_error error;
    if (model_open_bytes(data, bytes, "fuzz", &model, &error) != RK_OK) {
        return 0;
    }
    read_all(model);
    const struct model_vocabulary *vocabulary = model_vocabulary(model);
    size_t total = 0;
    for (uint32_t i = 0; i < vocabulary->num_tokens; i++) {
        total += vocabulary->tokens[i].bytes;
    }
    for (uint32_t i = 0; i < vocabulary->num_merges; i++) {
        total += vocabulary->merges[i].bytes;
    }
    if (total > bytes) {
        abort();
    }
    (void)model_fingerprint(model, RK_DTYPE_BF16);
    model_close(model);
    return 0;
}
