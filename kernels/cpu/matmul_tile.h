/*
 * matmul_tile: products of bf16 weights in registers, for CPUs with AVX-512 but
 * without AMX.
 *
 * Included by matmul_<isa>.c, which defines the names listed below. Weights:
 * blocks of 64 rows of w, [n / 64][k / 2][64][2], zero padded. One sum runs over
 * k in order in one lane, whatever rows stand beside it: rows are independent by
 * construction.
 *
 * MATMUL       name of the table that is exported
 * MATMUL_NAME  for logs
 * operand      an element of x as the products take it
 * round_row(kernels, x, k, to)  a row of x in f32 -> operands
 * accumulate(rows, vectors, x, k, weights, acc)  one pair of k for all rows
 */
#include "common/base/alloc.h"

#define PREFETCH_BYTES 4096

struct product_call {
    const struct kernels_matrix *matrix;
    const operand *x; /* [rows][k_even] */
    float *y;
    uint32_t rows;
};

static uint32_t even(uint32_t k)
{
    return (k + 1) / 2 * 2;
}

static uint32_t blocks(const struct kernels_matrix *matrix)
{
    return (matrix->n + COLUMNS - 1) / COLUMNS;
}

static size_t weight_at(const struct kernels_matrix *matrix, uint32_t row, uint32_t k)
{
    size_t block = (size_t)(row / COLUMNS) * COLUMNS * even(matrix->k);
    return block + (size_t)(k / 2) * COLUMNS * 2 + (size_t)(row % COLUMNS) * 2 + k % 2;
}

static enum rk_status init(struct kernels_matrix *matrix, const float *w)
{
    struct kernels *kernels = matrix->kernels;
    uint32_t k = matrix->k;
    size_t input_bytes = (size_t)KERNELS_ROWS_MAX * even(k) * sizeof(float);
    size_t bytes = (size_t)blocks(matrix) * COLUMNS * even(k) * sizeof(uint16_t);
    if (kernels->inputs_bytes < input_bytes) {
        float *inputs = rk_alloc_aligned(64, input_bytes);
        if (!inputs) {
            return RK_ERR_NO_MEMORY;
        }
        rk_free(kernels->inputs);
        kernels->inputs = inputs;
        kernels->inputs_bytes = input_bytes;
    }
    uint16_t *data = rk_alloc_aligned(64, bytes);
    if (!data) {
        return RK_ERR_NO_MEMORY;
    }
    memset(data, 0, bytes);
    for (uint32_t row = 0; row < matrix->n; row++) {
        const float *from = w + (size_t)row * k;
        uint16_t *to = data + weight_at(matrix, row, 0);
        for (uint32_t i = 0; i < k; i++) {
            to[(size_t)(i / 2) * COLUMNS * 2 + i % 2] = bf16_from_f32(from[i]);
        }
    }
    matrix->data = data;
    return RK_OK;
}

static void read_row(const struct kernels_matrix *matrix, uint32_t row, float *ret_row)
{
    const uint16_t *data = matrix->data;
    for (uint32_t i = 0; i < matrix->k; i++) {
        ret_row[i] = f32_from_bf16(data[weight_at(matrix, row, i)]);
    }
}

/* `rows` rows by `vectors` vectors of columns; both are constants at each call. */
ALWAYS void multiply(uint32_t rows, uint32_t vectors, const operand *x, uint32_t k,
                     const uint16_t *weights, float *y, uint32_t n, uint32_t columns)
{
    __m512 acc[ROWS_MANY][VECTORS];
    UNROLL
    for (uint32_t r = 0; r < rows; r++) {
        UNROLL
        for (uint32_t c = 0; c < vectors; c++) {
            acc[r][c] = _mm512_setzero_ps();
        }
    }
    for (uint32_t i = 0; i < k; i += 2) {
        const uint16_t *step = weights + (size_t)i * COLUMNS;
        /* All four lines of a step, also when this pass reads two of them: they come from memory.
         */
        UNROLL
        for (uint32_t c = 0; c < VECTORS; c++) {
            _mm_prefetch((const char *)step + PREFETCH_BYTES + (size_t)c * 64, _MM_HINT_T0);
        }
        accumulate(rows, vectors, x + i, k, step, acc);
    }
    UNROLL
    for (uint32_t c = 0; c < vectors; c++) {
        uint32_t left = columns > c * LANES ? columns - c * LANES : 0;
        __mmask16 mask = (__mmask16)low_bits(left);
        UNROLL
        for (uint32_t r = 0; r < rows; r++) {
            _mm512_mask_storeu_ps(y + (size_t)r * n + (size_t)c * LANES, mask, acc[r][c]);
        }
    }
}

/* A block for 5 to 12 rows, half of it at a time: 24 accumulators. Fewer rows take it whole. */
#define MANY(count)                                                                                \
    case count:                                                                                    \
        multiply(count, 2, x, k, weights, y, n, columns);                                          \
        if (columns > 2 * LANES) {                                                                 \
            multiply(count, 2, x, k, weights + (size_t)2 * LANES * 2, y + (size_t)2 * LANES, n,    \
                     columns - 2 * LANES);                                                         \
        }                                                                                          \
        break
#define FEW(count)                                                                                 \
    case count:                                                                                    \
        multiply(count, VECTORS, x, k, weights, y, n, columns);                                    \
        break

static void block_rows(uint32_t rows, const operand *x, uint32_t k, const uint16_t *weights,
                       float *y, uint32_t n, uint32_t columns)
{
    switch (rows) {
        FEW(1);
        FEW(2);
        FEW(3);
        FEW(4);
        MANY(5);
        MANY(6);
        MANY(7);
        MANY(8);
        MANY(9);
        MANY(10);
        MANY(11);
        MANY(12);
    default:
        RK_ASSERT(rows == 0);
    }
}

static void block_task(void *context, uint32_t task, uint32_t worker)
{
    (void)worker;
    const struct product_call *call = context;
    uint32_t n = call->matrix->n;
    uint32_t k = even(call->matrix->k);
    uint32_t column = task * COLUMNS;
    uint32_t columns = n - column < COLUMNS ? n - column : COLUMNS;
    const uint16_t *weights = (const uint16_t *)call->matrix->data + (size_t)column * k;
    for (uint32_t r = 0; r < call->rows; r += ROWS_MANY) {
        uint32_t left = call->rows - r;
        block_rows(left < ROWS_MANY ? left : ROWS_MANY, call->x + (size_t)r * k, k, weights,
                   call->y + (size_t)r * n + column, n, columns);
    }
}

static void run(struct kernels *kernels, const struct kernels_matrix *matrix, const float *x,
                uint32_t rows, float *y)
{
    uint32_t k = even(matrix->k);
    operand *inputs = (void *)kernels->inputs;
    for (uint32_t r = 0; r < rows; r++) {
        operand *to = inputs + (size_t)r * k;
        to[k - 1] = 0;
        round_row(kernels, x + (size_t)r * matrix->k, matrix->k, to);
    }
    struct product_call call = {.matrix = matrix, .x = inputs, .y = y, .rows = rows};
    kernels_parallel(kernels, blocks(matrix), block_task, &call);
}

const struct matmul_ops MATMUL = {MATMUL_NAME, init, run, read_row};
