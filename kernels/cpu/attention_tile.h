/*
 * attention_tile: SegPagedAttention for one vector instruction set.
 *
 * Included by attention_<isa>.c, which defines the names listed below. One task
 * is a tile: one KV head and up to KERNELS_TILE_ROWS pairs of (row, query head).
 * For each page in list order K and V are packed once for the tile, and then
 * small groups of rows go through scores, softmax and output in registers and
 * the first-level cache. Only rows that see the page are in a group, so others
 * keep their state; a row's sums run over the page in one order, whatever group
 * it is in.
 *
 * ATTENTION          name of the function
 * LANES              floats of a vector
 * GROUP_COLS         vectors of columns that are accumulated at once
 * OPERAND_PAIRS      1: operands are pairs of bf16, else single f32
 * vector             a vector of floats, with V_LOAD, V_STORE, V_SET, V_MUL, V_ADD, V_SUB, V_MAX,
 *                    V_FMA(a, b, c) = a * b + c, V_SELECT(bits, a, b), V_SUM, V_MAX_OF, V_EXP2
 * V_OPERANDS(p)      LANES operands (or pairs)
 * V_BROADCAST(p)     one operand (or pair) to all lanes
 * V_ACCUMULATE       c + a * b for operands
 * transpose(in, stride, out): LANES x LANES words of 32 bits
 * widen(words, out)  LANES pairs of bf16 -> even and odd elements as f32; singles only
 */
#include "kernels/cpu/cpu_internal.h"

#include <math.h>

#define GROUP_ROWS   6 /* at most LANES */
#define ALWAYS       static inline __attribute__((always_inline))
#define SCORE_BLOCKS (RK_PAGE_TOKENS / LANES)
#define UNROLL       _Pragma("GCC unroll 8")

#if OPERAND_PAIRS
typedef uint16_t operand;
#define PER_STEP 2
#else
typedef float operand;
#define PER_STEP 1
#endif

struct tile {
    const struct kernels *kernels;
    const struct kernels_attention *a;
    const struct kernels_head_view *view;
    uint32_t head;
    uint32_t first; /* row of the call */
    uint32_t positions;
    uint32_t rows; /* positions x group */
    operand *q;    /* [rows][head_dim] */
    float *out;    /* [rows][head_dim] */
    operand *k;    /* [head_dim / PER_STEP][64][PER_STEP] */
    const operand *v;
    operand *v_packed; /* [64 / PER_STEP][head_dim][PER_STEP] */
    float *max;        /* [rows] */
    float *sum;
    uint64_t *seen;   /* [positions] */
    uint16_t *active; /* rows that see the page */
};

/* acc[r][c] += a[r] * b over `steps` steps; rows and cols are constants at each call. */
ALWAYS void multiply(uint32_t rows, uint32_t cols, const operand *const *a, const operand *b,
                     size_t b_step, uint32_t steps, vector acc[GROUP_ROWS][GROUP_COLS])
{
    for (uint32_t s = 0; s < steps; s++) {
        vector columns[GROUP_COLS];
        UNROLL
        for (uint32_t c = 0; c < cols; c++) {
            columns[c] = V_OPERANDS(b + s * b_step + (size_t)c * LANES * PER_STEP);
        }
        UNROLL
        for (uint32_t r = 0; r < rows; r++) {
            vector value = V_BROADCAST(a[r] + (size_t)s * PER_STEP);
            UNROLL
            for (uint32_t c = 0; c < cols; c++) {
                acc[r][c] = V_ACCUMULATE(acc[r][c], value, columns[c]);
            }
        }
    }
}

ALWAYS void group_scores(const struct tile *tile, uint32_t rows, const uint16_t *active,
                         float scores[GROUP_ROWS][RK_PAGE_TOKENS])
{
    const operand *a[GROUP_ROWS];
    UNROLL
    for (uint32_t r = 0; r < rows; r++) {
        a[r] = tile->q + (size_t)active[r] * tile->a->head_dim;
    }
    for (uint32_t block = 0; block < SCORE_BLOCKS; block += GROUP_COLS) {
        vector acc[GROUP_ROWS][GROUP_COLS];
        UNROLL
        for (uint32_t r = 0; r < rows; r++) {
            UNROLL
            for (uint32_t c = 0; c < GROUP_COLS; c++) {
                acc[r][c] = V_SET(0.0f);
            }
        }
        multiply(rows, GROUP_COLS, a, tile->k + (size_t)block * LANES * PER_STEP,
                 RK_PAGE_TOKENS * PER_STEP, tile->a->head_dim / PER_STEP, acc);
        UNROLL
        for (uint32_t r = 0; r < rows; r++) {
            UNROLL
            for (uint32_t c = 0; c < GROUP_COLS; c++) {
                V_STORE(&scores[r][(block + c) * LANES], acc[r][c]);
            }
        }
    }
}

ALWAYS void store_probabilities(const struct tile *tile, vector p, operand *ret_p)
{
#if OPERAND_PAIRS
    (void)tile;
    V_STORE_BF16(ret_p, p);
#else
    V_STORE(ret_p, tile->kernels->mode == KERNELS_BF16 ? V_ROUND_BF16(p) : p);
#endif
}

/*
 * Scores of one row -> probabilities; `masked`: some keys are hidden. Hidden
 * scores are replaced before the maximum is taken, so that garbage in dead rows
 * of a page goes nowhere. Maxima are kept in units of log2. Gives the row's new
 * maximum, and the sum of its probabilities.
 */
ALWAYS void softmax(const struct tile *tile, uint32_t row, bool masked, const float *scores,
                    operand *ret_p, float *ret_max, float *ret_sum)
{
    uint64_t seen = tile->seen[row / tile->a->group];
    float scale = tile->a->scale * 1.44269504f;
    vector hidden = V_SET(-INFINITY);
    vector top = hidden;
    vector s[SCORE_BLOCKS];
    UNROLL
    for (uint32_t i = 0; i < SCORE_BLOCKS; i++) {
        s[i] = V_LOAD(scores + (size_t)i * LANES);
        if (masked) {
            s[i] = V_SELECT(seen >> (i * LANES), s[i], hidden);
        }
        top = V_MAX(top, s[i]);
    }
    float max = V_MAX_OF(top) * scale;
    max = max > tile->max[row] ? max : tile->max[row];
    vector factor = V_SET(scale);
    vector shift = V_SET(-max);
    vector sum = V_SET(0.0f);
    UNROLL
    for (uint32_t i = 0; i < SCORE_BLOCKS; i++) {
        s[i] = V_EXP2(V_FMA(s[i], factor, shift));
        if (masked) {
            s[i] = V_SELECT(seen >> (i * LANES), s[i], V_SET(0.0f));
        }
        sum = V_ADD(sum, s[i]);
        store_probabilities(tile, s[i], ret_p + (size_t)i * LANES);
    }
    *ret_max = max;
    *ret_sum = V_SUM(sum);
}

/* The factors for what the rows have summed so far; brings maxima and sums up to date. */
ALWAYS void rescale(const struct tile *tile, uint32_t rows, const uint16_t *active,
                    const float *max, const float *sum, float ret_keep[LANES])
{
    UNROLL
    for (uint32_t r = 0; r < rows; r++) {
        ret_keep[r] = tile->max[active[r]] - max[r];
    }
    /* Of a row that saw nothing before it is -inf. */
    V_STORE(ret_keep, V_EXP2(V_MAX(V_LOAD(ret_keep), V_SET(-200.0f))));
    UNROLL
    for (uint32_t r = 0; r < rows; r++) {
        uint32_t row = active[r];
        tile->sum[row] = tile->sum[row] * ret_keep[r] + sum[r];
        tile->max[row] = max[r];
    }
}

ALWAYS void output_columns(const struct tile *tile, uint32_t rows, uint32_t cols,
                           const uint16_t *active, const operand *const *p, const float *keep,
                           uint32_t column)
{
    vector acc[GROUP_ROWS][GROUP_COLS];
    uint32_t d = tile->a->head_dim;
    UNROLL
    for (uint32_t r = 0; r < rows; r++) {
        UNROLL
        for (uint32_t c = 0; c < cols; c++) {
            float *out = tile->out + (size_t)active[r] * d + column + (size_t)c * LANES;
            acc[r][c] = V_MUL(V_LOAD(out), V_SET(keep[r]));
        }
    }
    multiply(rows, cols, p, tile->v + (size_t)column * PER_STEP, (size_t)d * PER_STEP,
             RK_PAGE_TOKENS / PER_STEP, acc);
    UNROLL
    for (uint32_t r = 0; r < rows; r++) {
        UNROLL
        for (uint32_t c = 0; c < cols; c++) {
            V_STORE(tile->out + (size_t)active[r] * d + column + (size_t)c * LANES, acc[r][c]);
        }
    }
}

/* Scores, softmax and output of `rows` rows, a constant at each call. */
ALWAYS void group(struct tile *tile, uint32_t rows, const uint16_t *active)
{
    _Alignas(64) float scores[GROUP_ROWS][RK_PAGE_TOKENS];
    _Alignas(64) operand p[GROUP_ROWS][RK_PAGE_TOKENS];
    const operand *p_rows[GROUP_ROWS];
    _Alignas(64) float keep[LANES] = {0};
    float max[GROUP_ROWS];
    float sum[GROUP_ROWS];
    uint32_t column = 0;

    group_scores(tile, rows, active, scores);
    UNROLL
    for (uint32_t r = 0; r < rows; r++) {
        if (tile->seen[active[r] / tile->a->group] == UINT64_MAX) {
            softmax(tile, active[r], false, scores[r], p[r], &max[r], &sum[r]);
        } else {
            softmax(tile, active[r], true, scores[r], p[r], &max[r], &sum[r]);
        }
        p_rows[r] = p[r];
    }
    rescale(tile, rows, active, max, sum, keep);
    for (; column + GROUP_COLS * LANES <= tile->a->head_dim; column += GROUP_COLS * LANES) {
        output_columns(tile, rows, GROUP_COLS, active, p_rows, keep, column);
    }
    for (; column < tile->a->head_dim; column += LANES) {
        output_columns(tile, rows, 1, active, p_rows, keep, column);
    }
}

static void tile_groups(struct tile *tile, uint32_t count)
{
    const uint16_t *active = tile->active;
    for (; count >= GROUP_ROWS; count -= GROUP_ROWS, active += GROUP_ROWS) {
        group(tile, GROUP_ROWS, active);
    }
    switch (count) {
    case 1:
        group(tile, 1, active);
        break;
    case 2:
        group(tile, 2, active);
        break;
    case 3:
        group(tile, 3, active);
        break;
    case 4:
        group(tile, 4, active);
        break;
    case 5:
        group(tile, 5, active);
        break;
    default:
        break;
    }
}

/* One word of the packed K: an f32, or a pair of bf16, of key r. */
static inline void pack_word(const struct tile *tile, uint32_t word, uint32_t r, uint32_t bits)
{
#if OPERAND_PAIRS
    memcpy(tile->k + ((size_t)word * RK_PAGE_TOKENS + r) * 2, &bits, sizeof(bits));
#else
    if (tile->kernels->mode == KERNELS_F32) {
        memcpy(tile->k + (size_t)word * RK_PAGE_TOKENS + r, &bits, sizeof(bits));
    } else {
        tile->k[(size_t)2 * word * RK_PAGE_TOKENS + r] = f32_from_bf16((uint16_t)bits);
        tile->k[(size_t)(2 * word + 1) * RK_PAGE_TOKENS + r] =
            f32_from_bf16((uint16_t)(bits >> 16));
    }
#endif
}

/* K [64][head_dim] -> columns of keys, by blocks of LANES x LANES words of 32 bits. */
static void pack_k(const struct tile *tile, const uint32_t *k)
{
    bool f32 = tile->kernels->mode == KERNELS_F32;
    uint32_t words = f32 ? tile->a->head_dim : tile->a->head_dim / 2; /* of a key */
    uint32_t word = 0;
    for (; word + LANES <= words; word += LANES) {
        for (uint32_t r = 0; r < RK_PAGE_TOKENS; r += LANES) {
            vector block[LANES];
            transpose(k + (size_t)r * words + word, words, block);
            UNROLL_LANES
            for (uint32_t i = 0; i < LANES; i++) {
#if OPERAND_PAIRS
                V_STORE_WORDS(tile->k + ((size_t)(word + i) * RK_PAGE_TOKENS + r) * 2, block[i]);
#else
                if (f32) {
                    V_STORE(tile->k + (size_t)(word + i) * RK_PAGE_TOKENS + r, block[i]);
                } else {
                    float *even = tile->k + (size_t)2 * (word + i) * RK_PAGE_TOKENS + r;
                    widen(block[i], even, even + RK_PAGE_TOKENS);
                }
#endif
            }
        }
    }
    for (; word < words; word++) {
        for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
            pack_word(tile, word, r, k[(size_t)r * words + word]);
        }
    }
}

/* V as operands. Rows that are not live become zeros: 0 * NaN would be NaN. */
static void pack_v(struct tile *tile, const void *v, uint64_t live)
{
    uint32_t d = tile->a->head_dim;
#if OPERAND_PAIRS
    const uint16_t *rows = v;
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r += 2) {
        uint32_t keep = (live >> r & 1 ? 0xffff : 0) | (live >> (r + 1) & 1 ? 0xffff0000 : 0);
        pack_pairs(rows + (size_t)r * d, rows + (size_t)(r + 1) * d, d, keep,
                   tile->v_packed + (size_t)r * d);
    }
#else
    bool f32 = tile->kernels->mode == KERNELS_F32;
    if (f32 && live == UINT64_MAX) {
        tile->v = v; /* As it is. */
        return;
    }
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r++) {
        float *to = tile->v_packed + (size_t)r * d;
        if (!(live >> r & 1)) {
            memset(to, 0, d * sizeof(*to));
        } else if (f32) {
            memcpy(to, (const float *)v + (size_t)r * d, d * sizeof(*to));
        } else {
            const uint16_t *from = (const uint16_t *)v + (size_t)r * d;
            for (uint32_t i = 0; i < d; i++) {
                to[i] = f32_from_bf16(from[i]);
            }
        }
    }
#endif
    tile->v = tile->v_packed;
}

/* Queries as operands, rotated for pages of this base. */
static void rotate_queries(struct tile *tile, int64_t base)
{
    const struct kernels_attention *a = tile->a;
    const struct elementwise_ops *ops = tile->kernels->ops;
    uint32_t d = a->head_dim;
    _Alignas(64) float turned[KERNELS_HEAD_DIM_MAX];
    for (uint32_t row = 0; row < tile->rows; row++) {
        uint32_t at = tile->first + row / a->group;
        int64_t angle = (int64_t)a->positions[at] - base;
        if (!rope_covers(a->rope, angle)) {
            continue; /* Such a row sees no page of this base: see tile_look(). */
        }
        float sign;
        size_t offset = rope_offset(a->rope, angle, &sign);
        size_t head = (size_t)tile->head * a->group + row % a->group;
        ops->rotate(a->q + ((size_t)at * a->num_kv_heads * a->group + head) * d,
                    a->rope->cos + offset, a->rope->sin + offset, sign, d, turned);
        operand *q = tile->q + (size_t)row * d;
#if OPERAND_PAIRS
        ops->round_bf16(turned, d, q);
#else
        for (uint32_t i = 0; i < d; i++) {
            q[i] = tile->kernels->mode == KERNELS_F32 ? turned[i]
                                                      : f32_from_bf16(bf16_from_f32(turned[i]));
        }
#endif
    }
}

/* Which rows of the tile see the page? Returns their number. */
static uint32_t tile_look(struct tile *tile, const struct kernels_page *page)
{
    uint32_t count = 0;
    uint32_t group_size = tile->a->group;
    for (uint32_t i = 0; i < tile->positions; i++) {
        tile->seen[i] = page_visible(page, tile->view, tile->a->positions[tile->first + i]);
        if (tile->seen[i] == 0) {
            continue;
        }
        RK_ASSERT(
            rope_covers(tile->a->rope, (int64_t)tile->a->positions[tile->first + i] - page->base));
        for (uint32_t g = 0; g < group_size; g++) {
            tile->active[count++] = (uint16_t)(i * group_size + g);
        }
    }
    return count;
}

static void tile_write(const struct tile *tile)
{
    const struct kernels_attention *a = tile->a;
    uint32_t d = a->head_dim;
    for (uint32_t row = 0; row < tile->rows; row++) {
        size_t at = tile->first + row / a->group;
        size_t head = (size_t)tile->head * a->group + row % a->group;
        float *out = a->out + (at * a->num_kv_heads * a->group + head) * d;
        float factor = tile->sum[row] > 0 ? 1.0f / tile->sum[row] : 0.0f;
        for (uint32_t i = 0; i < d; i++) {
            out[i] = tile->out[(size_t)row * d + i] * factor;
        }
    }
}

static void *take(uint8_t **place, size_t bytes)
{
    void *taken = *place;
    *place += (bytes + 63) / 64 * 64;
    return taken;
}

static void tile_task(void *context, uint32_t task, uint32_t worker)
{
    const struct attention_call *call = context;
    const struct kernels_attention *a = call->a;
    uint32_t d = a->head_dim;
    uint8_t *place = call->kernels->scratch + worker * call->kernels->scratch_bytes;
    struct tile tile = {.kernels = call->kernels, .a = a, .head = task % a->num_kv_heads};
    tile.view = &a->heads[tile.head];
    /* The last tiles see the most pages: they go first, so that threads end together. */
    tile.first = (call->tiles - 1 - task / a->num_kv_heads) * call->tile_positions;
    tile.positions =
        a->rows - tile.first < call->tile_positions ? a->rows - tile.first : call->tile_positions;
    tile.rows = tile.positions * a->group;
    tile.q = take(&place, (size_t)KERNELS_TILE_ROWS * d * sizeof(operand));
    tile.out = take(&place, (size_t)KERNELS_TILE_ROWS * d * sizeof(float));
    tile.k = take(&place, (size_t)RK_PAGE_TOKENS * d * sizeof(operand));
    tile.v_packed = take(&place, (size_t)RK_PAGE_TOKENS * d * sizeof(operand));
    tile.max = take(&place, KERNELS_TILE_ROWS * sizeof(float));
    tile.sum = take(&place, KERNELS_TILE_ROWS * sizeof(float));
    tile.seen = take(&place, KERNELS_TILE_ROWS * sizeof(uint64_t));
    tile.active = take(&place, KERNELS_TILE_ROWS * sizeof(uint16_t));

    memset(tile.out, 0, (size_t)tile.rows * d * sizeof(float));
    memset(tile.sum, 0, tile.rows * sizeof(float));
    for (uint32_t row = 0; row < tile.rows; row++) {
        tile.max[row] = -INFINITY;
    }
    int64_t base = INT64_MAX; /* No page has it. */
    for (uint32_t i = 0; i < tile.view->num_pages; i++) {
        const struct kernels_page *page = &tile.view->pages[i];
        uint32_t count = tile_look(&tile, page);
        if (count == 0) {
            continue;
        }
        if (base != page->base) {
            base = page->base;
            rotate_queries(&tile, base);
        }
        size_t half = (size_t)RK_PAGE_TOKENS * d * (call->kernels->mode == KERNELS_F32 ? 4 : 2);
        pack_k(&tile, page->data);
        pack_v(&tile, (const uint8_t *)page->data + half, page->live);
        tile_groups(&tile, count);
    }
    tile_write(&tile);
}

void ATTENTION(struct kernels *kernels, const struct kernels_attention *attention)
{
    struct attention_call call = attention_call_plan(kernels, attention);
    kernels_parallel(kernels, call.tiles * attention->num_kv_heads, tile_task, &call);
}
