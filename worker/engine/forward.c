#include "worker/engine/engine_internal.h"

#include "worker/recovery/head_map.h"

#include <math.h>

/* The rows of one item among the rows of the call. */
struct forward_item {
    struct engine_sequence *sequence;
    const struct recovery_head_map *head_map;
    uint32_t begin;
    uint32_t num_rows;
};

/* One call: what is left to compute. Rows shrink to those that want logits in the last layer. */
struct forward {
    struct engine *engine;
    struct forward_item items[KERNELS_ROWS_MAX];
    uint32_t num_items;
    uint32_t rows;
    bool decode;
};

/* ---- FLOPs: 2 for each weight, 4 * head_dim for each query head and visible key ---- */

static double weights_qkv(const struct engine *engine)
{
    return (double)engine->config.hidden * (engine->width_q + 2.0 * engine->width_kv);
}

/* Weights of a layer behind its K and V. */
static double weights_rest(const struct engine *engine)
{
    double hidden = engine->config.hidden;
    return hidden * engine->width_q + 3.0 * hidden * engine->config.intermediate;
}

static double flops_by_key(const struct engine *engine)
{
    return 4.0 * engine->width_q;
}

double engine_flops_full(const struct engine *engine, uint32_t num_tokens)
{
    double n = num_tokens;
    double layers = engine->config.num_layers;
    double keys = n * (n + 1) / 2;

    /* The last layer does not go on for tokens that nobody wants logits of: all but the last. */
    if (num_tokens == 0) {
        return 0;
    }
    return 2 * (layers * n * weights_qkv(engine) + ((layers - 1) * n + 1) * weights_rest(engine)) +
           flops_by_key(engine) * ((layers - 1) * keys + n);
}

/* Keys that a query at t sees: every position has one live copy, so that no list is walked. */
static double visible_keys(uint32_t t, struct recovery_head head)
{
    uint32_t seen = t + 1;
    if (head.window == 0 || seen <= head.window) {
        return seen;
    }
    uint32_t before = seen - head.window;
    return (double)head.window + (head.sink < before ? head.sink : before);
}

static double row_keys(const struct engine *engine, const struct recovery_head_map *map,
                       uint32_t layer, uint32_t t)
{
    if (!map) {
        return (double)t + 1;
    }
    double keys = 0;
    for (uint32_t head = 0; head < engine->layout.num_kv_heads; head++) {
        keys += visible_keys(t, recovery_head_map_get(map, layer, head));
    }
    return keys / engine->layout.num_kv_heads;
}

/* The layer's share of what the rows that go through all of it cost. */
static void count_rest(const struct forward *call, uint32_t layer)
{
    const struct engine *engine = call->engine;

    for (uint32_t i = 0; i < call->num_items; i++) {
        const struct forward_item *item = &call->items[i];
        double keys = 0;
        for (uint32_t r = item->begin; r < item->begin + item->num_rows; r++) {
            keys += row_keys(engine, item->head_map, layer, (uint32_t)engine->positions[r]);
        }
        item->sequence->flops +=
            2.0 * item->num_rows * weights_rest(engine) + flops_by_key(engine) * keys;
    }
}

static void count_qkv(const struct forward *call)
{
    for (uint32_t i = 0; i < call->num_items; i++) {
        call->items[i].sequence->flops += 2.0 * call->items[i].num_rows * weights_qkv(call->engine);
    }
}

/* ---- One layer ---- */

static void write_kv(const struct forward *call, uint32_t layer)
{
    struct engine *engine = call->engine;
    uint32_t num_kv_heads = engine->layout.num_kv_heads;
    size_t stride = engine->width_q + 2 * (size_t)engine->width_kv;

    for (uint32_t head = 0; head < num_kv_heads; head++) {
        size_t index = (size_t)layer * num_kv_heads + head;
        const float *k = engine->qkv + engine->width_q + (size_t)head * engine->layout.head_dim;
        for (uint32_t r = 0; r < call->rows; r++) {
            const struct engine_place *place = &engine->places[r];
            engine->slots[r] = (struct kernels_page_slot){place->first[index * place->stride],
                                                          place->row, place->position};
        }
        kernels_kv_write(engine->kernels, &engine->rope, k, k + engine->width_kv, stride,
                         engine->slots, call->rows);
    }
}

/* Forget the rows that want no logits. */
static void keep_wanted(struct forward *call)
{
    struct engine *engine = call->engine;
    size_t hidden = engine->config.hidden;
    uint32_t kept = 0;

    for (uint32_t i = 0; i < call->num_items; i++) {
        struct forward_item *item = &call->items[i];
        uint32_t begin = kept;
        for (uint32_t r = item->begin; r < item->begin + item->num_rows; r++) {
            if (!engine->wanted[r]) {
                continue;
            }
            if (r != kept) {
                memcpy(engine->x + kept * hidden, engine->x + r * hidden, hidden * sizeof(float));
            }
            engine->positions[kept] = engine->positions[r];
            engine->sources[kept] = r;
            kept++;
        }
        item->begin = begin;
        item->num_rows = kept - begin;
    }
    call->rows = kept;
}

static void attend(const struct forward *call, uint32_t layer)
{
    struct engine *engine = call->engine;
    const struct rk_kv_layout *layout = &engine->layout;

    for (uint32_t i = 0; i < call->num_items; i++) {
        const struct forward_item *item = &call->items[i];
        const struct engine_sequence *sequence = item->sequence;
        if (item->num_rows == 0) {
            continue;
        }
        for (uint32_t head = 0; head < layout->num_kv_heads; head++) {
            size_t index = (size_t)layer * layout->num_kv_heads + head;
            struct recovery_head seen = {0, 0};
            if (item->head_map) {
                seen = recovery_head_map_get(item->head_map, layer, head);
            }
            engine->views[head] =
                (struct kernels_head_view){sequence->lists + index * sequence->lists_max,
                                           sequence->list_lengths[index], seen.window, seen.sink};
        }
        const struct kernels_attention attention = {
            .num_kv_heads = layout->num_kv_heads,
            .group = engine->config.num_heads / layout->num_kv_heads,
            .head_dim = layout->head_dim,
            .scale = (float)(1 / sqrt((double)layout->head_dim)),
            .rope = &engine->rope,
            .heads = engine->views,
            .q = engine->q + (size_t)item->begin * engine->width_q,
            .positions = engine->positions + item->begin,
            .rows = item->num_rows,
            .out = engine->attended + (size_t)item->begin * engine->width_q,
            .decode = call->decode,
        };
        kernels_attention(engine->kernels, &attention);
    }
}

static void feed_forward(const struct forward *call, const struct engine_layer *layer)
{
    struct engine *engine = call->engine;
    struct kernels *kernels = engine->kernels;
    uint32_t hidden = engine->config.hidden;

    kernels_rms_norm(kernels, engine->x, layer->ffn_norm, call->rows, hidden,
                     engine->config.rms_norm_epsilon, engine->norm);
    kernels_matmul(kernels, layer->gate, engine->norm, call->rows, engine->gate);
    kernels_matmul(kernels, layer->up, engine->norm, call->rows, engine->up);
    kernels_silu_mul(kernels, engine->gate, engine->up, call->rows, engine->config.intermediate);
    kernels_matmul(kernels, layer->down, engine->gate, call->rows, engine->projection);
    kernels_add(kernels, engine->x, engine->projection, call->rows, hidden);
}

static enum rk_status verify_items(const struct forward *call, uint32_t layer,
                                   struct rk_error *error)
{
    enum rk_status status = RK_OK;
    for (uint32_t i = 0; status == RK_OK && i < call->num_items; i++) {
        if (call->items[i].num_rows > 0) {
            status = engine_sequence_verify(call->items[i].sequence, layer, error);
        }
    }
    return status;
}

static enum rk_status run_layer(struct forward *call, uint32_t index, struct rk_error *error)
{
    struct engine *engine = call->engine;
    struct kernels *kernels = engine->kernels;
    const struct engine_layer *layer = &engine->layers[index];
    uint32_t hidden = engine->config.hidden;
    size_t stride = engine->width_q + 2 * (size_t)engine->width_kv;

    kernels_rms_norm(kernels, engine->x, layer->attention_norm, call->rows, hidden,
                     engine->config.rms_norm_epsilon, engine->norm);
    kernels_matmul(kernels, layer->qkv, engine->norm, call->rows, engine->qkv);
    write_kv(call, index);
    count_qkv(call);
    if (index + 1 == engine->config.num_layers) {
        keep_wanted(call);
    }
    if (call->rows == 0) {
        return RK_OK;
    }
    enum rk_status status = verify_items(call, index, error);
    if (status != RK_OK) {
        return status;
    }
    for (uint32_t r = 0; r < call->rows; r++) {
        memcpy(engine->q + (size_t)r * engine->width_q, engine->qkv + engine->sources[r] * stride,
               engine->width_q * sizeof(float));
    }
    attend(call, index);
    kernels_matmul(kernels, layer->out, engine->attended, call->rows, engine->projection);
    kernels_add(kernels, engine->x, engine->projection, call->rows, hidden);
    feed_forward(call, layer);
    count_rest(call, index);
    return RK_OK;
}

/* ---- A call ---- */

static void clear_marks(const struct engine_item *items, uint32_t num_items)
{
    for (uint32_t i = 0; i < num_items; i++) {
        items[i].sequence->in_call = false;
    }
}

/* Checks everything that can be wrong before anything is changed. */
static enum rk_status plan_call(struct engine *engine, const struct engine_item *items,
                                uint32_t num_items, struct rk_error *error)
{
    uint64_t pages = 0;
    uint64_t rows = 0;

    if (num_items > KERNELS_ROWS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%u items in one call, at most %d", num_items,
                            KERNELS_ROWS_MAX);
    }
    for (uint32_t i = 0; i < num_items; i++) {
        uint64_t item_pages = 0;
        RK_ASSERT(items[i].sequence->engine == engine);
        if (items[i].sequence->in_call) {
            clear_marks(items, i);
            return rk_error_set(error, RK_ERR_INVALID, "item %u: its sequence occurs twice", i);
        }
        rows += items[i].num_rows;
        enum rk_status status =
            rows <= KERNELS_ROWS_MAX
                ? engine_sequence_plan(&items[i], &item_pages, error)
                : rk_error_set(error, RK_ERR_TOO_LONG, "more than %d rows in one call",
                               KERNELS_ROWS_MAX);
        if (status != RK_OK) {
            clear_marks(items, i);
            return status;
        }
        items[i].sequence->in_call = true;
        pages += item_pages;
    }
    clear_marks(items, num_items);
    if (pages > engine->pool.num_free) {
        return rk_error_set(error, RK_ERR_FULL, "%llu pages are needed, %u of %u are free",
                            (unsigned long long)pages, engine->pool.num_free,
                            engine->pool.num_pages);
    }
    return RK_OK;
}

static void gather_rows(struct forward *call, const struct engine_item *items, uint32_t num_items)
{
    struct engine *engine = call->engine;
    const struct kernels_matrix *embedding = engine->embedding ? engine->embedding : engine->output;

    for (uint32_t i = 0; i < num_items; i++) {
        const struct engine_item *item = &items[i];
        call->items[i] =
            (struct forward_item){item->sequence, item->head_map, call->rows, item->num_rows};
        engine_sequence_place(item, engine->places + call->rows);
        engine_sequence_refresh(item->sequence);
        for (uint32_t r = 0; r < item->num_rows; r++) {
            uint32_t row = call->rows++;
            engine->positions[row] = (int32_t)item->rows[r].position;
            engine->wanted[row] = item->rows[r].want_logits;
            engine->sources[row] = row;
            kernels_matrix_row(embedding, (uint32_t)item->rows[r].token_id,
                               engine->x + (size_t)row * engine->config.hidden);
        }
    }
    call->num_items = num_items;
}

enum rk_status engine_forward(struct engine *engine, const struct engine_item *items,
                              uint32_t num_items, bool decode, float *logits,
                              struct rk_error *error)
{
    struct forward call = {.engine = engine, .decode = decode};
    enum rk_status status = plan_call(engine, items, num_items, error);
    if (status != RK_OK) {
        return status;
    }
    gather_rows(&call, items, num_items);
    if (call.rows == 0) {
        return RK_OK;
    }
    for (uint32_t layer = 0; layer < engine->config.num_layers; layer++) {
        status = run_layer(&call, layer, error);
        if (status != RK_OK) {
            return status;
        }
    }
    for (uint32_t i = 0; i < num_items; i++) {
        engine_sequence_filled(&items[i]);
    }
    if (call.rows > 0) {
        kernels_rms_norm(engine->kernels, engine->x, engine->output_norm, call.rows,
                         engine->config.hidden, engine->config.rms_norm_epsilon, engine->norm);
        kernels_matmul(engine->kernels, engine->output, engine->norm, call.rows, logits);
    }
    return RK_OK;
}
