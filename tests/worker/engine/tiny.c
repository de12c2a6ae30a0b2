#include "tests/worker/engine/tiny.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* ---- Random numbers ---- */

static uint64_t random_state = 1;

void tiny_seed(uint64_t seed)
{
    print_message("seed %llu\n", (unsigned long long)seed);
    random_state = seed;
}

static uint64_t random_next(void)
{
    uint64_t z = (random_state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

uint32_t tiny_random(uint32_t below)
{
    return (uint32_t)(random_next() % below);
}

static float random_normal(void)
{
    double sum = 0;
    for (int i = 0; i < 12; i++) {
        sum += (double)(random_next() >> 11) * 0x1p-53;
    }
    return (float)(sum - 6);
}

int32_t *tiny_ids(uint32_t count)
{
    int32_t *ids = malloc(count * sizeof(*ids));
    assert_non_null(ids);
    for (uint32_t i = 0; i < count; i++) {
        ids[i] = (int32_t)tiny_random(TINY_VOCAB);
    }
    return ids;
}

/* ---- A GGUF file ---- */

struct writer {
    unsigned char *data;
    size_t bytes;
    size_t max;
};

static void put(struct writer *writer, const void *data, size_t bytes)
{
    if (writer->bytes + bytes > writer->max) {
        writer->max = 2 * (writer->bytes + bytes);
        writer->data = realloc(writer->data, writer->max);
        assert_non_null(writer->data);
    }
    memcpy(writer->data + writer->bytes, data, bytes);
    writer->bytes += bytes;
}

static void put_u32(struct writer *writer, uint32_t value)
{
    put(writer, &value, sizeof(value));
}

static void put_u64(struct writer *writer, uint64_t value)
{
    put(writer, &value, sizeof(value));
}

static void put_text(struct writer *writer, const char *text)
{
    put_u64(writer, strlen(text));
    put(writer, text, strlen(text));
}

struct tensor {
    char name[48];
    uint32_t rows;
    uint32_t columns;
    float scale;
    float mean;
};

static uint32_t list_tensors(bool tied, struct tensor *tensors)
{
    static const struct tensor by_layer[] = {
        {"attn_norm.weight", 1, TINY_HIDDEN, 0.1f, 1},
        {"attn_q.weight", TINY_HEADS * TINY_DIM, TINY_HIDDEN, 0.25f, 0},
        {"attn_k.weight", TINY_KV * TINY_DIM, TINY_HIDDEN, 0.25f, 0},
        {"attn_v.weight", TINY_KV * TINY_DIM, TINY_HIDDEN, 0.25f, 0},
        {"attn_output.weight", TINY_HIDDEN, TINY_HEADS * TINY_DIM, 0.25f, 0},
        {"ffn_norm.weight", 1, TINY_HIDDEN, 0.1f, 1},
        {"ffn_gate.weight", TINY_WIDE, TINY_HIDDEN, 0.15f, 0},
        {"ffn_up.weight", TINY_WIDE, TINY_HIDDEN, 0.15f, 0},
        {"ffn_down.weight", TINY_HIDDEN, TINY_WIDE, 0.15f, 0},
    };
    uint32_t count = 0;

    tensors[count++] = (struct tensor){"token_embd.weight", TINY_VOCAB, TINY_HIDDEN, 0.5f, 0};
    tensors[count++] = (struct tensor){"output_norm.weight", 1, TINY_HIDDEN, 0.1f, 1};
    if (!tied) {
        tensors[count++] = (struct tensor){"output.weight", TINY_VOCAB, TINY_HIDDEN, 0.2f, 0};
    }
    for (uint32_t layer = 0; layer < TINY_LAYERS; layer++) {
        for (size_t i = 0; i < sizeof(by_layer) / sizeof(by_layer[0]); i++) {
            tensors[count] = by_layer[i];
            (void)snprintf(tensors[count].name, sizeof(tensors[count].name), "blk.%u.%.32s", layer,
                           by_layer[i].name);
            count++;
        }
    }
    return count;
}

static void put_keys(struct writer *writer)
{
    static const struct {
        const char *name;
        uint32_t value;
    } keys[] = {
        {"llama.block_count", TINY_LAYERS},         {"llama.context_length", TINY_CONTEXT},
        {"llama.embedding_length", TINY_HIDDEN},    {"llama.feed_forward_length", TINY_WIDE},
        {"llama.attention.head_count", TINY_HEADS}, {"llama.attention.head_count_kv", TINY_KV},
    };
    const float epsilon = 1e-5f;

    put_text(writer, "general.architecture");
    put_u32(writer, 8); /* string */
    put_text(writer, "llama");
    put_text(writer, "llama.attention.layer_norm_rms_epsilon");
    put_u32(writer, 6); /* f32 */
    put(writer, &epsilon, sizeof(epsilon));
    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
        put_text(writer, keys[i].name);
        put_u32(writer, 4); /* u32 */
        put_u32(writer, keys[i].value);
    }
}

static void put_tensors(struct writer *writer, const struct tensor *tensors, uint32_t count)
{
    uint64_t offset = 0;
    for (uint32_t i = 0; i < count; i++) {
        put_text(writer, tensors[i].name);
        put_u32(writer, tensors[i].rows == 1 ? 1 : 2);
        put_u64(writer, tensors[i].columns);
        if (tensors[i].rows != 1) {
            put_u64(writer, tensors[i].rows);
        }
        put_u32(writer, 0); /* F32 */
        put_u64(writer, offset);
        offset += (uint64_t)tensors[i].rows * tensors[i].columns * sizeof(float);
    }
    while (writer->bytes % 32 != 0) {
        put(writer, "", 1);
    }
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t e = 0; e < tensors[i].rows * tensors[i].columns; e++) {
            float value = tensors[i].mean + tensors[i].scale * random_normal();
            put(writer, &value, sizeof(value));
        }
    }
}

struct model *tiny_model(bool tied)
{
    static struct writer files[2];
    struct writer *writer = &files[tied];
    struct tensor tensors[64];
    struct model *model = NULL;
    struct rk_error error = {0};

    if (!writer->data) {
        uint64_t kept = random_state;
        uint32_t count = list_tensors(tied, tensors);
        random_state = 42; /* The weights are always the same. */
        put(writer, "GGUF", 4);
        put_u32(writer, 3);
        put_u64(writer, count);
        put_u64(writer, 8);
        put_keys(writer);
        put_tensors(writer, tensors, count);
        random_state = kept;
    }
    if (model_open_bytes(writer->data, writer->bytes, "tiny", &model, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    return model;
}

struct engine *tiny_engine(const struct model *model, enum kernels_mode mode, uint32_t threads)
{
    const struct engine_options options = {.mode = mode, .threads = threads};
    struct engine *engine = NULL;
    struct rk_error error = {0};
    if (engine_create(model, &options, &engine, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    return engine;
}

struct recovery_head_map *tiny_head_map(void)
{
    static const char json[] =
        "{\"num_layers\": 3, \"num_kv_heads\": 2, \"dense_prefix_layers\": 0, \"sink_size\": 8,"
        "\"kv_head_classification\": [[\"global\", \"local\"], [\"global\", \"global\"],"
        "[\"local\", \"global\"]], \"kv_head_max_distance\": [[-1, 48], [-1, -1], [48, -1]]}";
    struct recovery_head_map *map = NULL;
    struct rk_error error = {0};
    if (recovery_head_map_parse(json, sizeof(json) - 1, "tiny", TINY_LAYERS, TINY_KV, &map,
                                &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    return map;
}

/* ---- The reference ---- */

#define KV_WIDTH (TINY_KV * TINY_DIM)
#define Q_WIDTH  (TINY_HEADS * TINY_DIM)

void tiny_reference_create(struct tiny_reference *reference, uint32_t num_tokens)
{
    reference->num_tokens = num_tokens;
    reference->k = calloc((size_t)TINY_LAYERS * num_tokens * KV_WIDTH, sizeof(double));
    reference->v = calloc((size_t)TINY_LAYERS * num_tokens * KV_WIDTH, sizeof(double));
    assert_non_null(reference->k);
    assert_non_null(reference->v);
}

void tiny_reference_free(struct tiny_reference *reference)
{
    free(reference->k);
    free(reference->v);
}

void tiny_reference_copy(struct tiny_reference *reference, uint32_t position,
                         const struct tiny_reference *from)
{
    for (uint32_t layer = 0; layer < TINY_LAYERS; layer++) {
        size_t to_row = (size_t)layer * reference->num_tokens + position;
        size_t from_row = (size_t)layer * from->num_tokens;
        size_t bytes = (size_t)from->num_tokens * KV_WIDTH * sizeof(double);
        memcpy(reference->k + to_row * KV_WIDTH, from->k + from_row * KV_WIDTH, bytes);
        memcpy(reference->v + to_row * KV_WIDTH, from->v + from_row * KV_WIDTH, bytes);
    }
}

static float *read_weights(const struct model *model, enum model_tensor tensor, uint32_t layer)
{
    uint32_t rows = 0;
    uint32_t columns = 0;
    assert_int_equal(model_tensor_shape(model, tensor, layer, &rows, &columns), RK_OK);
    float *weights = malloc((size_t)rows * columns * sizeof(*weights));
    assert_non_null(weights);
    assert_int_equal(model_tensor_read(model, tensor, layer, weights, NULL), RK_OK);
    return weights;
}

static void multiply(const struct model *model, enum model_tensor tensor, uint32_t layer,
                     const double *x, uint32_t rows, uint32_t k, uint32_t n, double *y)
{
    float *w = read_weights(model, tensor, layer);
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t i = 0; i < n; i++) {
            double sum = 0;
            for (uint32_t j = 0; j < k; j++) {
                sum += x[(size_t)r * k + j] * (double)w[(size_t)i * k + j];
            }
            y[(size_t)r * n + i] = sum;
        }
    }
    free(w);
}

static void norm(const struct model *model, enum model_tensor tensor, uint32_t layer,
                 const double *x, uint32_t rows, double *y)
{
    float *w = read_weights(model, tensor, layer);
    for (uint32_t r = 0; r < rows; r++) {
        double sum = 0;
        for (uint32_t i = 0; i < TINY_HIDDEN; i++) {
            sum += x[r * TINY_HIDDEN + i] * x[r * TINY_HIDDEN + i];
        }
        double scale = 1 / sqrt(sum / TINY_HIDDEN + 1e-5);
        for (uint32_t i = 0; i < TINY_HIDDEN; i++) {
            y[r * TINY_HIDDEN + i] = x[r * TINY_HIDDEN + i] * scale * (double)w[i];
        }
    }
    free(w);
}

static void rotate(const double *x, uint32_t position, double *y)
{
    for (uint32_t i = 0; i < TINY_DIM / 2; i++) {
        double angle = position * pow(10000.0, -2.0 * i / TINY_DIM);
        y[i] = x[i] * cos(angle) - x[i + TINY_DIM / 2] * sin(angle);
        y[i + TINY_DIM / 2] = x[i + TINY_DIM / 2] * cos(angle) + x[i] * sin(angle);
    }
}

/* One query of one head over all that it sees, by the definition. */
static void attend_one(const struct tiny_reference *reference, uint32_t layer, uint32_t kv_head,
                       struct recovery_head head, uint32_t t, const double *q, double *out)
{
    double query[TINY_DIM];
    double scores[TINY_CONTEXT];
    double sum = 0;
    size_t first = (size_t)layer * reference->num_tokens * KV_WIDTH + (size_t)kv_head * TINY_DIM;

    rotate(q, t, query);
    for (uint32_t c = 0; c <= t; c++) {
        double key[TINY_DIM];
        double score = 0;
        rotate(reference->k + first + (size_t)c * KV_WIDTH, c, key);
        for (uint32_t i = 0; i < TINY_DIM; i++) {
            score += query[i] * key[i];
        }
        bool seen = head.window == 0 || c + head.window > t || c < head.sink;
        scores[c] = seen ? exp(score / sqrt(TINY_DIM)) : 0;
        sum += scores[c];
    }
    memset(out, 0, TINY_DIM * sizeof(*out));
    for (uint32_t c = 0; c <= t; c++) {
        for (uint32_t i = 0; i < TINY_DIM; i++) {
            out[i] += scores[c] / sum * reference->v[first + (size_t)c * KV_WIDTH + i];
        }
    }
}

static void run_attention(const struct tiny_reference *reference,
                          const struct recovery_head_map *map, uint32_t layer,
                          const uint32_t *positions, uint32_t count, const double *q, double *out)
{
    for (uint32_t r = 0; r < count; r++) {
        for (uint32_t h = 0; h < TINY_HEADS; h++) {
            uint32_t kv_head = h / (TINY_HEADS / TINY_KV);
            struct recovery_head head = {0, 0};
            if (map) {
                head = recovery_head_map_get(map, layer, kv_head);
            }
            size_t at = (size_t)r * Q_WIDTH + (size_t)h * TINY_DIM;
            attend_one(reference, layer, kv_head, head, positions[r], q + at, out + at);
        }
    }
}

static void add_to(double *x, const double *y, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        x[i] += y[i];
    }
}

void tiny_reference_run(struct tiny_reference *reference, const struct model *model,
                        const struct recovery_head_map *map, const int32_t *ids,
                        const uint32_t *positions, uint32_t count, uint32_t want_from,
                        float *logits)
{
    size_t hidden = (size_t)count * TINY_HIDDEN;
    double *x = calloc(hidden, sizeof(*x));
    double *a = calloc((size_t)count * TINY_VOCAB, sizeof(*a));
    double *b = calloc((size_t)count * TINY_VOCAB, sizeof(*b));
    double *c = calloc((size_t)count * TINY_VOCAB, sizeof(*c));
    float *embedding = read_weights(model, MODEL_EMBEDDING, 0);

    assert_true(x && a && b && c);
    for (size_t i = 0; i < hidden; i++) {
        int32_t id = ids[positions[i / TINY_HIDDEN]];
        x[i] = (double)embedding[(size_t)id * TINY_HIDDEN + i % TINY_HIDDEN];
    }
    for (uint32_t layer = 0; layer < TINY_LAYERS; layer++) {
        norm(model, MODEL_ATTENTION_NORM, layer, x, count, a);
        multiply(model, MODEL_K, layer, a, count, TINY_HIDDEN, KV_WIDTH, b);
        multiply(model, MODEL_V, layer, a, count, TINY_HIDDEN, KV_WIDTH, c);
        for (uint32_t r = 0; r < count; r++) {
            size_t row = ((size_t)layer * reference->num_tokens + positions[r]) * KV_WIDTH;
            memcpy(reference->k + row, b + (size_t)r * KV_WIDTH, KV_WIDTH * sizeof(*b));
            memcpy(reference->v + row, c + (size_t)r * KV_WIDTH, KV_WIDTH * sizeof(*c));
        }
        multiply(model, MODEL_Q, layer, a, count, TINY_HIDDEN, Q_WIDTH, b);
        run_attention(reference, map, layer, positions, count, b, c);
        multiply(model, MODEL_ATTENTION_OUT, layer, c, count, Q_WIDTH, TINY_HIDDEN, b);
        add_to(x, b, hidden);
        norm(model, MODEL_FFN_NORM, layer, x, count, a);
        multiply(model, MODEL_FFN_GATE, layer, a, count, TINY_HIDDEN, TINY_WIDE, b);
        multiply(model, MODEL_FFN_UP, layer, a, count, TINY_HIDDEN, TINY_WIDE, c);
        for (size_t i = 0; i < (size_t)count * TINY_WIDE; i++) {
            b[i] = b[i] / (1 + exp(-b[i])) * c[i];
        }
        multiply(model, MODEL_FFN_DOWN, layer, b, count, TINY_WIDE, TINY_HIDDEN, c);
        add_to(x, c, hidden);
    }
    norm(model, MODEL_OUTPUT_NORM, 0, x, count, a);
    multiply(model, MODEL_OUTPUT, 0, a, count, TINY_HIDDEN, TINY_VOCAB, b);
    for (size_t i = 0; i < (size_t)count * TINY_VOCAB; i++) {
        if (positions[i / TINY_VOCAB] >= want_from) {
            *logits++ = (float)b[i];
        }
    }
    free(x);
    free(a);
    free(b);
    free(c);
    free(embedding);
}
