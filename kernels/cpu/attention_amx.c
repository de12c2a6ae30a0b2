/*
 * attention_amx: products of bf16 in AMX tiles.
 *
 * Everything is transposed, so that a lane is a row of the tile: scores
 * S^T = K Q^T takes K straight from the page, softmax goes down the lanes
 * without any horizontal sum, its result has the layout that the next product
 * wants, and O^T = V^T P^T adds to an output that has one row per lane too.
 * Lanes never mix, so rows are independent. V is transposed once per page for
 * all rows of the task.
 *
 * Tests on other CPUs build it again with the tile instructions in C and with
 * another name for ATTENTION.
 */
#include "kernels/cpu/cpu_internal.h"
#include "kernels/cpu/vector_avx512.h"

#include <math.h>

#ifndef ATTENTION
#define ATTENTION attention_amx
#endif
#define BLOCKS (KERNELS_TILE_ROWS / LANES)

/*
 * GCC's tile loads do not tell the compiler that they read memory: what was
 * written through `pointer` must be there before them.
 */
#define WRITTEN(pointer) __asm__ volatile("" : : "r"(pointer) : "memory")

struct tile_config {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* LANES rows of the task, one per lane. */
struct block {
    _Alignas(64) float max[LANES];
    float sum[LANES];
    uint32_t seen[2][LANES]; /* low and high half of the visible keys */
    uint16_t *q;             /* [head_dim / 2][LANES][2] */
    float *out;              /* [head_dim][LANES] */
};

struct task {
    const struct kernels *kernels;
    const struct kernels_attention *a;
    uint32_t head;
    uint32_t first;
    uint32_t rows;
    uint32_t num_blocks;
    uint16_t *v_transposed; /* [head_dim][64] */
    uint16_t *v_pairs;      /* [32][head_dim][2] */
    struct block blocks[BLOCKS];
};

static void rotate_queries(struct task *task, int64_t base)
{
    const struct kernels_attention *a = task->a;
    uint32_t d = a->head_dim;
    _Alignas(64) float turned[KERNELS_HEAD_DIM_MAX];
    for (uint32_t row = 0; row < task->rows; row++) {
        uint32_t at = task->first + row / a->group;
        int64_t angle = (int64_t)a->positions[at] - base;
        if (!rope_covers(a->rope, angle)) {
            continue; /* Such a row sees no page of this base: see look(). */
        }
        float sign;
        size_t offset = rope_offset(a->rope, angle, &sign);
        size_t head = (size_t)task->head * a->group + row % a->group;
        task->kernels->ops->rotate(a->q + ((size_t)at * a->num_kv_heads * a->group + head) * d,
                                   a->rope->cos + offset, a->rope->sin + offset, sign, d, turned);
        uint16_t *q = task->blocks[row / LANES].q + (size_t)(row % LANES) * 2;
        for (uint32_t i = 0; i < d; i++) {
            q[(size_t)(i / 2) * LANES * 2 + i % 2] = bf16_from_f32(turned[i]);
        }
    }
}

/* Fills seen[]; false if no row sees the page. */
static bool look(struct task *task, const struct kernels_page *page)
{
    const struct kernels_attention *a = task->a;
    const struct kernels_head_view *view = &a->heads[task->head];
    uint64_t any = 0;
    uint64_t seen = 0;
    for (uint32_t row = 0; row < task->rows; row++) {
        if (row % a->group == 0) {
            int64_t t = a->positions[task->first + row / a->group];
            seen = page_visible(page, view, t);
            RK_ASSERT(seen == 0 || rope_covers(a->rope, t - page->base));
        }
        task->blocks[row / LANES].seen[0][row % LANES] = (uint32_t)seen;
        task->blocks[row / LANES].seen[1][row % LANES] = (uint32_t)(seen >> 32);
        any |= seen;
    }
    return any != 0;
}

/* V [64][head_dim] -> [head_dim][64]; rows that are not live become zeros. */
static void transpose_v(struct task *task, const uint16_t *v, uint64_t live)
{
    uint32_t d = task->a->head_dim;
    for (uint32_t r = 0; r < RK_PAGE_TOKENS; r += 2) {
        uint32_t keep = (live >> r & 1 ? 0xffff : 0) | (live >> (r + 1) & 1 ? 0xffff0000 : 0);
        for (uint32_t i = 0; i < d; i += LANES) {
            const uint16_t *from = v + (size_t)r * d + i;
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + d)));
            __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            _mm512_storeu_si512(task->v_pairs + ((size_t)r / 2 * d + i) * 2,
                                _mm512_and_si512(pairs, _mm512_set1_epi32((int)keep)));
        }
    }
    for (uint32_t i = 0; i < d; i += LANES) {
        for (uint32_t pair = 0; pair < RK_PAGE_TOKENS / 2; pair += LANES) {
            vector columns[LANES];
            const void *from = task->v_pairs + ((size_t)pair * d + i) * 2;
            transpose(from, d, columns);
            UNROLL_LANES
            for (uint32_t j = 0; j < LANES; j++) {
                V_STORE_WORDS(task->v_transposed + (size_t)(i + j) * RK_PAGE_TOKENS + pair * 2,
                              columns[j]);
            }
        }
    }
}

static void block_scores(const struct block *block, const uint16_t *k, uint32_t d,
                         float scores[RK_PAGE_TOKENS][LANES])
{
    size_t stride = (size_t)d * 2;
    WRITTEN(block->q);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (uint32_t i = 0; i < d; i += 32) {
        _tile_loadd(5, block->q + (size_t)i * LANES, 64);
        _tile_loadd(4, k + i, stride);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, k + (size_t)16 * d + i, stride);
        _tile_dpbf16ps(1, 6, 5);
        _tile_loadd(4, k + (size_t)32 * d + i, stride);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(6, k + (size_t)48 * d + i, stride);
        _tile_dpbf16ps(3, 6, 5);
    }
    _tile_stored(0, scores[0], 64);
    _tile_stored(1, scores[16], 64);
    _tile_stored(2, scores[32], 64);
    _tile_stored(3, scores[48], 64);
}

static inline __mmask16 key_mask(const __m512i seen[2], uint32_t key)
{
    return _mm512_test_epi32_mask(seen[key / 32], _mm512_set1_epi32((int)(1u << key % 32)));
}

/*
 * Scores -> probabilities as pairs of keys, down the lanes. A lane that sees
 * nothing so far has a maximum of -inf, which must not meet itself in a
 * difference.
 */
static vector block_softmax(struct block *block, float scale, float scores[RK_PAGE_TOKENS][LANES],
                            uint16_t p[RK_PAGE_TOKENS / 2][LANES][2])
{
    __m512i seen[2] = {_mm512_loadu_si512(block->seen[0]), _mm512_loadu_si512(block->seen[1])};
    vector hidden = V_SET(-INFINITY);
    vector factor = V_SET(scale * 1.44269504f);
    vector before = V_LOAD(block->max);
    vector max = before;
    for (uint32_t key = 0; key < RK_PAGE_TOKENS; key++) {
        vector s = _mm512_mask_mul_ps(hidden, key_mask(seen, key), V_LOAD(scores[key]), factor);
        V_STORE(scores[key], s);
        max = V_MAX(max, s);
    }
    vector from = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(max, hidden, _CMP_EQ_OQ), max, V_SET(0));
    vector sum = V_SET(0);
    for (uint32_t key = 0; key < RK_PAGE_TOKENS; key += 2) {
        vector p0 =
            _mm512_maskz_mov_ps(key_mask(seen, key), exp2_short(V_SUB(V_LOAD(scores[key]), from)));
        vector p1 = _mm512_maskz_mov_ps(key_mask(seen, key + 1),
                                        exp2_short(V_SUB(V_LOAD(scores[key + 1]), from)));
        sum = V_ADD(V_ADD(sum, p0), p1);
        __m512i low = _mm512_srli_epi32(_mm512_castps_si512(V_ROUND_BF16(p0)), 16);
        __m512i high = _mm512_castps_si512(V_ROUND_BF16(p1));
        _mm512_storeu_si512(p[key / 2], _mm512_or_si512(low, high));
    }
    __mmask16 none = _mm512_cmp_ps_mask(before, hidden, _CMP_EQ_OQ);
    vector keep = _mm512_mask_blend_ps(none, exp2_short(V_SUB(before, from)), V_SET(0));
    V_STORE(block->sum, V_FMA(V_LOAD(block->sum), keep, sum));
    V_STORE(block->max, max);
    return keep;
}

/* out = out * keep + V^T P^T, in lanes that see the page. */
static void block_output(struct block *block, const uint16_t *v_transposed, uint32_t d, vector keep,
                         uint16_t p[RK_PAGE_TOKENS / 2][LANES][2])
{
    _Alignas(64) float sums[LANES][LANES];
    __m512i seen =
        _mm512_or_si512(_mm512_loadu_si512(block->seen[0]), _mm512_loadu_si512(block->seen[1]));
    __mmask16 lanes = _mm512_test_epi32_mask(seen, seen);
    WRITTEN(p);
    WRITTEN(v_transposed);
    _tile_loadd(5, p[0], 64);
    _tile_loadd(6, p[16], 64);
    for (uint32_t i = 0; i < d; i += LANES) {
        _tile_zero(0);
        _tile_loadd(4, v_transposed + (size_t)i * RK_PAGE_TOKENS, RK_PAGE_TOKENS * 2);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(7, v_transposed + (size_t)i * RK_PAGE_TOKENS + 32, RK_PAGE_TOKENS * 2);
        _tile_dpbf16ps(0, 7, 6);
        _tile_stored(0, sums, 64);
        for (uint32_t j = 0; j < LANES; j++) {
            float *out = block->out + (size_t)(i + j) * LANES;
            _mm512_mask_storeu_ps(out, lanes, V_FMA(V_LOAD(out), keep, V_LOAD(sums[j])));
        }
    }
}

static void block_page(struct task *task, struct block *block, const uint16_t *k)
{
    _Alignas(64) float scores[RK_PAGE_TOKENS][LANES];
    _Alignas(64) uint16_t p[RK_PAGE_TOKENS / 2][LANES][2];
    uint32_t any = 0;
    for (uint32_t i = 0; i < LANES; i++) {
        any |= block->seen[0][i] | block->seen[1][i];
    }
    if (any != 0) {
        block_scores(block, k, task->a->head_dim, scores);
        vector keep = block_softmax(block, task->a->scale, scores, p);
        block_output(block, task->v_transposed, task->a->head_dim, keep, p);
    }
}

static void task_write(const struct task *task)
{
    const struct kernels_attention *a = task->a;
    uint32_t d = a->head_dim;
    for (uint32_t row = 0; row < task->rows; row++) {
        const struct block *block = &task->blocks[row / LANES];
        size_t at = task->first + row / a->group;
        size_t head = (size_t)task->head * a->group + row % a->group;
        float *out = a->out + (at * a->num_kv_heads * a->group + head) * d;
        float sum = block->sum[row % LANES];
        float factor = sum > 0 ? 1.0f / sum : 0.0f;
        for (uint32_t i = 0; i < d; i++) {
            out[i] = block->out[(size_t)i * LANES + row % LANES] * factor;
        }
    }
}

/* All tiles: 16 rows of 64 bytes. */
static void load_config(void)
{
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    WRITTEN(&config);
    _tile_loadconfig(&config);
}

static void task_prepare(struct task *task, uint8_t *scratch)
{
    size_t d = task->a->head_dim;
    task->v_transposed = (uint16_t *)scratch;
    task->v_pairs = task->v_transposed + d * RK_PAGE_TOKENS;
    uint16_t *q = task->v_pairs + d * RK_PAGE_TOKENS;
    float *out = (float *)(scratch + (size_t)(2 * RK_PAGE_TOKENS + KERNELS_TILE_ROWS) * d * 2);
    task->num_blocks = (task->rows + LANES - 1) / LANES;
    for (uint32_t i = 0; i < task->num_blocks; i++) {
        struct block *block = &task->blocks[i];
        memset(block, 0, sizeof(*block));
        block->q = q + (size_t)i * LANES * d;
        block->out = out + (size_t)i * LANES * d;
        memset(block->q, 0, LANES * d * sizeof(*block->q));
        memset(block->out, 0, LANES * d * sizeof(*block->out));
        V_STORE(block->max, V_SET(-INFINITY));
    }
}

static void run_task(void *context, uint32_t index, uint32_t worker)
{
    const struct attention_call *call = context;
    const struct kernels_attention *a = call->a;
    struct task task = {.kernels = call->kernels, .a = a, .head = index % a->num_kv_heads};
    const struct kernels_head_view *view = &a->heads[task.head];
    /* The last tiles see the most pages: they go first, so that threads end together. */
    task.first = (call->tiles - 1 - index / a->num_kv_heads) * call->tile_positions;
    uint32_t left = a->rows - task.first;
    task.rows = (left < call->tile_positions ? left : call->tile_positions) * a->group;
    task_prepare(&task, call->kernels->scratch + worker * call->kernels->scratch_bytes);
    load_config();
    int64_t base = INT64_MAX; /* No page has it. */
    for (uint32_t i = 0; i < view->num_pages; i++) {
        const struct kernels_page *page = &view->pages[i];
        if (!look(&task, page)) {
            continue;
        }
        if (base != page->base) {
            base = page->base;
            rotate_queries(&task, base);
        }
        const uint16_t *k = page->data;
        transpose_v(&task, k + (size_t)RK_PAGE_TOKENS * a->head_dim, page->live);
        for (uint32_t b = 0; b < task.num_blocks; b++) {
            block_page(&task, &task.blocks[b], k);
        }
    }
    _tile_release();
    task_write(&task);
}

/* Tiles take 32 elements of K at a time; other sizes go the way of vectors. */
void ATTENTION(struct kernels *kernels, const struct kernels_attention *attention)
{
    if (attention->head_dim % 32 != 0) {
        attention_avx512_bf16(kernels, attention);
        return;
    }
    struct attention_call call = attention_call_plan(kernels, attention);
    kernels_parallel(kernels, call.tiles * attention->num_kv_heads, run_task, &call);
}
