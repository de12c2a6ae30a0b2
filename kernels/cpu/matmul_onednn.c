/*
 * matmul_onednn: matrix products; the only user of oneDNN (C API of 2.x).
 *
 * oneDNN does not promise that a row's result is independent of the number of
 * rows, but most of its kernels are so. Products run at a few fixed numbers of
 * rows ("sizes"); when a shape is first used, the sizes are compared on this
 * CPU, bit by bit, and those that differ are not used.
 *
 * Weights are held once, in the layout that the largest size asks for. Shapes
 * (primitives, scratch memory) are shared by all matrices of one n x k.
 */
#include "common/base/alloc.h"
#include "common/base/log.h"
#include "kernels/cpu/cpu_internal.h"

#include <dnnl.h>
#include <dnnl_debug.h>
#include <omp.h>
#include <stdio.h>

#define ALIGNMENT 64
static const uint32_t sizes[] = {1, 2, 4, 8, 16, 32, 64, 128, KERNELS_ROWS_MAX};
#define NUM_SIZES (sizeof(sizes) / sizeof(sizes[0]))
#define LARGEST   (NUM_SIZES - 1)

struct product {
    uint32_t rows;
    dnnl_primitive_t primitive; /* NULL: this size is not used */
    dnnl_memory_t x;
    dnnl_memory_t y;
    dnnl_memory_t scratchpad;
    size_t scratchpad_bytes;
    const char *name; /* of oneDNN's implementation */
};

struct shape {
    struct shape *next;
    uint32_t n;
    uint32_t k;
    dnnl_memory_desc_t weights;
    size_t *k_offsets; /* [k] place of element k of a row of w in the weights' layout */
    struct product products[NUM_SIZES];
    bool checked;
};

struct matmul {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_data_type_t dtype;
    struct shape *shapes;
    void *x; /* [KERNELS_ROWS_MAX][k] of the widest matrix: rounded or padded input */
    size_t x_bytes;
    float *y; /* padded output */
    size_t y_bytes;
    void *scratchpad;
    size_t scratchpad_bytes;
};

static enum rk_status failed(struct rk_error *error, dnnl_status_t status, const char *what,
                             uint32_t n, uint32_t k)
{
    return rk_error_set(error, status == dnnl_out_of_memory ? RK_ERR_NO_MEMORY : RK_ERR_INTERNAL,
                        "oneDNN: %s of a %u x %u matrix failed with status %d", what, n, k,
                        (int)status);
}

static size_t element_bytes(const struct matmul *matmul)
{
    return matmul->dtype == dnnl_f32 ? 4 : 2;
}

enum rk_status matmul_create(struct kernels *kernels, struct matmul **ret_matmul,
                             struct rk_error *error)
{
    struct matmul *matmul = rk_alloc_zero(1, sizeof(*matmul));
    if (!matmul) {
        return RK_ERR_NO_MEMORY;
    }
    matmul->dtype = kernels->mode == KERNELS_F32 ? dnnl_f32 : dnnl_bf16;
    dnnl_status_t status = dnnl_engine_create(&matmul->engine, dnnl_cpu, 0);
    if (status == dnnl_success) {
        status = dnnl_stream_create(&matmul->stream, matmul->engine, dnnl_stream_default_flags);
    }
    if (status != dnnl_success) {
        matmul_destroy(matmul);
        return failed(error, status, "the engine", 0, 0);
    }
    *ret_matmul = matmul;
    return RK_OK;
}

void matmul_onednn_describe(char *ret_text, size_t bytes)
{
    const dnnl_version_t *version = dnnl_version();
    (void)snprintf(ret_text, bytes, "oneDNN-%d.%d.%d-%.8s/%s", version->major, version->minor,
                   version->patch, version->hash ? version->hash : "",
                   dnnl_cpu_isa2str(dnnl_get_effective_cpu_isa()));
}

static void product_clear(struct product *product)
{
    if (product->primitive) {
        dnnl_primitive_destroy(product->primitive);
    }
    if (product->x) {
        dnnl_memory_destroy(product->x);
    }
    if (product->y) {
        dnnl_memory_destroy(product->y);
    }
    if (product->scratchpad) {
        dnnl_memory_destroy(product->scratchpad);
    }
    *product = (struct product){.rows = product->rows};
}

static void shape_destroy(struct shape *shape)
{
    if (shape) {
        for (size_t i = 0; i < NUM_SIZES; i++) {
            product_clear(&shape->products[i]);
        }
        rk_free(shape->k_offsets);
        rk_free(shape);
    }
}

void matmul_destroy(struct matmul *matmul)
{
    if (!matmul) {
        return;
    }
    while (matmul->shapes) {
        struct shape *shape = matmul->shapes;
        matmul->shapes = shape->next;
        shape_destroy(shape);
    }
    if (matmul->stream) {
        dnnl_stream_destroy(matmul->stream);
    }
    if (matmul->engine) {
        dnnl_engine_destroy(matmul->engine);
    }
    rk_free(matmul->x);
    rk_free(matmul->y);
    rk_free(matmul->scratchpad);
    rk_free(matmul);
}

/* Memory objects of a product; their addresses are set at each call. */
static dnnl_status_t product_memories(const struct matmul *matmul, struct product *product,
                                      const_dnnl_primitive_desc_t pd)
{
    const dnnl_memory_desc_t *x = dnnl_primitive_desc_query_md(pd, dnnl_query_src_md, 0);
    const dnnl_memory_desc_t *y = dnnl_primitive_desc_query_md(pd, dnnl_query_dst_md, 0);
    const dnnl_memory_desc_t *scratchpad =
        dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
    dnnl_status_t status = dnnl_memory_create(&product->x, x, matmul->engine, DNNL_MEMORY_NONE);
    if (status == dnnl_success) {
        status = dnnl_memory_create(&product->y, y, matmul->engine, DNNL_MEMORY_NONE);
    }
    if (status == dnnl_success) {
        status =
            dnnl_memory_create(&product->scratchpad, scratchpad, matmul->engine, DNNL_MEMORY_NONE);
    }
    product->scratchpad_bytes = dnnl_memory_desc_get_size(scratchpad);
    return status;
}

/*
 * The scratchpad is ours ("user mode"): the library's own belongs to the thread
 * that created the primitive, and would be missing in another.
 */
static dnnl_status_t product_create(const struct matmul *matmul, struct shape *shape,
                                    const dnnl_memory_desc_t *weights, struct product *product)
{
    dnnl_dims_t x_dims = {product->rows, shape->k};
    dnnl_dims_t y_dims = {product->rows, shape->n};
    dnnl_memory_desc_t x;
    dnnl_memory_desc_t y;
    dnnl_matmul_desc_t desc;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_primitive_desc_t pd = NULL;

    dnnl_status_t status = dnnl_memory_desc_init_by_tag(&x, 2, x_dims, matmul->dtype, dnnl_ab);
    if (status == dnnl_success) {
        status = dnnl_memory_desc_init_by_tag(&y, 2, y_dims, dnnl_f32, dnnl_ab);
    }
    if (status == dnnl_success) {
        status = dnnl_matmul_desc_init(&desc, &x, weights, NULL, &y);
    }
    if (status == dnnl_success) {
        status = dnnl_primitive_attr_create(&attr);
    }
    if (status == dnnl_success) {
        status = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
    }
    if (status == dnnl_success) {
        status = dnnl_primitive_desc_create(&pd, &desc, attr, matmul->engine, NULL);
    }
    if (status == dnnl_success) {
        shape->weights = *dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
        status = dnnl_primitive_create(&product->primitive, pd);
    }
    if (status == dnnl_success) {
        /* The text belongs to the library and lives as long as the primitive. */
        const_dnnl_primitive_desc_t kept = NULL;
        dnnl_primitive_get_primitive_desc(product->primitive, &kept);
        dnnl_primitive_desc_query(kept, dnnl_query_impl_info_str, 0, &product->name);
        status = product_memories(matmul, product, kept);
    }
    if (pd) {
        dnnl_primitive_desc_destroy(pd);
    }
    if (attr) {
        dnnl_primitive_attr_destroy(attr);
    }
    return status;
}

/* Offset of element (row of w, k) in a blocked layout of [k][n], as oneDNN defines it. */
static size_t blocked_offset(const dnnl_memory_desc_t *md, size_t k, size_t n)
{
    const dnnl_blocking_desc_t *blocking = &md->format_desc.blocking;
    size_t position[2] = {k, n};
    size_t offset = (size_t)md->offset0;
    size_t stride = 1;
    for (int i = blocking->inner_nblks - 1; i >= 0; i--) {
        size_t block = (size_t)blocking->inner_blks[i];
        size_t *at = &position[blocking->inner_idxs[i]];
        offset += *at % block * stride;
        *at /= block;
        stride *= block;
    }
    return offset + position[0] * (size_t)blocking->strides[0] +
           position[1] * (size_t)blocking->strides[1];
}

static enum rk_status grow(void **block, size_t *bytes, size_t wanted)
{
    if (*bytes < wanted) {
        void *larger = rk_alloc_aligned(ALIGNMENT, wanted);
        if (!larger) {
            return RK_ERR_NO_MEMORY;
        }
        rk_free(*block);
        *block = larger;
        *bytes = wanted;
    }
    return RK_OK;
}

/* Buffers that calls with this shape use. */
static enum rk_status grow_buffers(struct matmul *matmul, const struct shape *shape)
{
    size_t scratchpad = 0;
    for (size_t i = 0; i < NUM_SIZES; i++) {
        if (shape->products[i].scratchpad_bytes > scratchpad) {
            scratchpad = shape->products[i].scratchpad_bytes;
        }
    }
    enum rk_status status =
        grow(&matmul->x, &matmul->x_bytes, KERNELS_ROWS_MAX * shape->k * element_bytes(matmul));
    if (status == RK_OK) {
        void *y = matmul->y;
        status = grow(&y, &matmul->y_bytes, KERNELS_ROWS_MAX * shape->n * sizeof(float));
        matmul->y = y;
    }
    if (status == RK_OK) {
        status = grow(&matmul->scratchpad, &matmul->scratchpad_bytes, scratchpad);
    }
    return status;
}

static enum rk_status shape_create(struct matmul *matmul, uint32_t n, uint32_t k,
                                   struct shape **ret_shape, struct rk_error *error)
{
    dnnl_dims_t dims = {k, n};
    dnnl_memory_desc_t any;
    struct shape *shape = rk_alloc_zero(1, sizeof(*shape));
    if (!shape) {
        return RK_ERR_NO_MEMORY;
    }
    enum rk_status status = RK_ERR_NO_MEMORY;
    shape->n = n;
    shape->k = k;
    for (size_t i = 0; i < NUM_SIZES; i++) {
        shape->products[i].rows = sizes[i];
    }
    dnnl_status_t result =
        dnnl_memory_desc_init_by_tag(&any, 2, dims, matmul->dtype, dnnl_format_tag_any);
    if (result == dnnl_success) {
        result = product_create(matmul, shape, &any, &shape->products[LARGEST]);
    }
    if (result != dnnl_success || shape->weights.format_kind != dnnl_blocked) {
        status = failed(error, result, "the product", n, k);
        goto fail;
    }
    dnnl_memory_desc_t weights = shape->weights;
    for (size_t i = 0; i < LARGEST; i++) {
        /* A size may have no implementation for this layout: then it is not used. */
        struct product *product = &shape->products[i];
        if (product_create(matmul, shape, &weights, product) != dnnl_success ||
            strncmp(product->name, "ref", 3) == 0) {
            product_clear(product);
        }
    }
    shape->weights = weights;
    shape->k_offsets = rk_alloc_zero(k, sizeof(*shape->k_offsets));
    if (!shape->k_offsets) {
        goto fail;
    }
    for (uint32_t i = 0; i < k; i++) {
        shape->k_offsets[i] = blocked_offset(&weights, i, 0) - blocked_offset(&weights, 0, 0);
    }
    status = grow_buffers(matmul, shape);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_shape = shape;
    return RK_OK;

fail:
    shape_destroy(shape);
    return status;
}

static enum rk_status shape_get(struct matmul *matmul, uint32_t n, uint32_t k,
                                struct shape **ret_shape, struct rk_error *error)
{
    for (struct shape *shape = matmul->shapes; shape; shape = shape->next) {
        if (shape->n == n && shape->k == k) {
            *ret_shape = shape;
            return RK_OK;
        }
    }
    struct shape *shape = NULL;
    enum rk_status status = shape_create(matmul, n, k, &shape, error);
    if (status == RK_OK) {
        shape->next = matmul->shapes;
        matmul->shapes = shape;
        *ret_shape = shape;
    }
    return status;
}

static void product_run(struct matmul *matmul, const struct product *product,
                        const struct kernels_matrix *matrix, const void *x, float *y)
{
    union {
        const void *in;
        void *out;
    } input = {.in = x}; /* The library takes inputs without const. */
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, product->x},
                              {DNNL_ARG_WEIGHTS, matrix->memory},
                              {DNNL_ARG_DST, product->y},
                              {DNNL_ARG_SCRATCHPAD, product->scratchpad}};
    RK_ASSERT(dnnl_memory_set_data_handle(product->x, input.out) == dnnl_success);
    RK_ASSERT(dnnl_memory_set_data_handle(product->y, y) == dnnl_success);
    RK_ASSERT(dnnl_memory_set_data_handle(product->scratchpad, matmul->scratchpad) == dnnl_success);
    RK_ASSERT(dnnl_primitive_execute(product->primitive, matmul->stream, 4, args) == dnnl_success);
    RK_ASSERT(dnnl_stream_wait(matmul->stream) == dnnl_success);
}

/* Different rows in a check: prime, so that each meets each place of a block, and the more the
 * fewer results a row has, for a difference in the last bit is rare. */
static uint32_t check_turns(uint32_t n)
{
    return n >= 512 ? 7 : n >= 64 ? 61 : 251;
}

/* Fill matmul->x with `turns` different rows, again and again. */
static void check_fill(struct matmul *matmul, const struct kernels *kernels, uint32_t k,
                       uint32_t turns)
{
    uint64_t seed = 0x9e3779b97f4a7c15;
    for (size_t i = 0; i < (size_t)KERNELS_ROWS_MAX * k; i++) {
        size_t source = i % ((size_t)turns * k);
        if (source < i) {
            memcpy((uint8_t *)matmul->x + i * element_bytes(matmul),
                   (uint8_t *)matmul->x + source * element_bytes(matmul), element_bytes(matmul));
            continue;
        }
        seed = seed * 6364136223846793005 + 1442695040888963407;
        float value = (float)(int32_t)(seed >> 32) / 2147483648.0f;
        if (matmul->dtype == dnnl_f32) {
            ((float *)matmul->x)[i] = value;
        } else {
            kernels->ops->round_bf16(&value, 1, (uint16_t *)matmul->x + i);
        }
    }
}

/* Does this product give every row of matmul->x the result that is wanted? `wanted` has those of
 * the different rows, or is filled here if it is not `known`. */
static bool check_product(struct matmul *matmul, const struct product *product,
                          const struct kernels_matrix *matrix, uint32_t turns, bool known,
                          float *wanted)
{
    uint32_t n = matrix->n;
    size_t row_bytes = n * sizeof(float);
    uint32_t rows = product->rows;
    uint32_t end = rows > turns ? rows : turns;
    for (uint32_t first = 0; first < end && first + rows <= KERNELS_ROWS_MAX; first += rows) {
        product_run(matmul, product, matrix,
                    (uint8_t *)matmul->x + (size_t)first * matrix->k * element_bytes(matmul),
                    matmul->y);
        for (uint32_t r = 0; r < rows; r++) {
            float *row = wanted + (size_t)((first + r) % turns) * n;
            const float *y = matmul->y + (size_t)r * n;
            if (!known && first + r < turns) {
                memcpy(row, y, row_bytes);
            } else if (memcmp(row, y, row_bytes) != 0) {
                return false;
            }
        }
    }
    return true;
}

static void drop(const struct shape *shape, struct product *product)
{
    RK_LOG_DEBUG("matmul_size_dropped", "n=%u k=%u rows=%u implementation=%q", shape->n, shape->k,
                 product->rows, product->name);
    product_clear(product);
}

/*
 * Keep the largest size that gives a row the same result at each place, and the
 * sizes below that agree with it; a size of one row always does with itself.
 * Weights that are mostly zero prove nothing: the next matrix is checked again.
 */
static enum rk_status shape_check(struct kernels *kernels, const struct kernels_matrix *matrix,
                                  struct rk_error *error)
{
    struct matmul *matmul = kernels->matmul;
    struct shape *shape = matrix->shape;
    uint32_t n = shape->n;
    uint32_t turns = check_turns(n);
    bool known = false;
    float *wanted = rk_alloc_aligned(ALIGNMENT, (size_t)turns * n * sizeof(float));
    if (!wanted) {
        return RK_ERR_NO_MEMORY;
    }
    check_fill(matmul, kernels, shape->k, turns);
    for (size_t i = NUM_SIZES; i-- > 0;) {
        struct product *product = &shape->products[i];
        if (!product->primitive) {
            continue;
        }
        if (check_product(matmul, product, matrix, turns, known, wanted)) {
            known = true;
        } else {
            drop(shape, product);
        }
    }
    uint32_t telling = 0;
    for (uint32_t i = 0; known && i < n; i++) {
        telling += wanted[i] != 0;
    }
    shape->checked = telling > n / 2;
    rk_free(wanted);
    return known ? RK_OK
                 : rk_error_set(error, RK_ERR_UNSUPPORTED,
                                "oneDNN has no product of a %u x %u matrix whose rows are "
                                "independent on this CPU",
                                n, shape->k);
}

/* w [n][k] in f32 -> the product's type and layout, in one pass of the library. */
static dnnl_status_t convert_weights(struct matmul *matmul, const float *w,
                                     struct kernels_matrix *matrix)
{
    const struct shape *shape = matrix->shape;
    dnnl_dims_t dims = {shape->k, shape->n};
    dnnl_dims_t strides = {1, shape->k};
    dnnl_memory_desc_t source_md;
    dnnl_memory_t source = NULL;
    dnnl_primitive_desc_t pd = NULL;
    dnnl_primitive_t reorder = NULL;
    union {
        const void *in;
        void *out;
    } input = {.in = w};

    dnnl_status_t status = dnnl_memory_desc_init_by_strides(&source_md, 2, dims, dnnl_f32, strides);
    if (status == dnnl_success) {
        status = dnnl_memory_create(&source, &source_md, matmul->engine, input.out);
    }
    if (status == dnnl_success) {
        status = dnnl_reorder_primitive_desc_create(&pd, &source_md, matmul->engine,
                                                    &shape->weights, matmul->engine, NULL);
    }
    if (status == dnnl_success) {
        status = dnnl_primitive_create(&reorder, pd);
    }
    if (status == dnnl_success) {
        dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, source}, {DNNL_ARG_TO, matrix->memory}};
        status = dnnl_primitive_execute(reorder, matmul->stream, 2, args);
    }
    if (status == dnnl_success) {
        status = dnnl_stream_wait(matmul->stream);
    }
    if (reorder) {
        dnnl_primitive_destroy(reorder);
    }
    if (pd) {
        dnnl_primitive_desc_destroy(pd);
    }
    if (source) {
        dnnl_memory_destroy(source);
    }
    return status;
}

enum rk_status matmul_onednn_init(struct kernels_matrix *matrix, const float *w,
                                  struct rk_error *error)
{
    struct kernels *kernels = matrix->kernels;
    struct matmul *matmul = kernels->matmul;
    omp_set_num_threads((int)kernels->threads);
    enum rk_status status = shape_get(matmul, matrix->n, matrix->k, &matrix->shape, error);
    if (status != RK_OK) {
        return status;
    }
    const dnnl_memory_desc_t *layout = &matrix->shape->weights;
    matrix->data = rk_alloc_aligned(ALIGNMENT, dnnl_memory_desc_get_size(layout));
    if (!matrix->data) {
        return RK_ERR_NO_MEMORY;
    }
    dnnl_status_t result =
        dnnl_memory_create(&matrix->memory, layout, matmul->engine, matrix->data);
    if (result == dnnl_success) {
        result = convert_weights(matmul, w, matrix);
    }
    if (result != dnnl_success) {
        return failed(error, result, "the conversion", matrix->n, matrix->k);
    }
    return matrix->shape->checked ? RK_OK : shape_check(kernels, matrix, error);
}

void matmul_onednn_clear(struct kernels_matrix *matrix)
{
    if (matrix->memory) {
        dnnl_memory_destroy(matrix->memory);
        matrix->memory = NULL;
    }
}

/* The largest usable size that fits, or a smallest one above when at most a quarter is padding. */
static const struct product *product_for(const struct shape *shape, uint32_t rows)
{
    const struct product *below = NULL;
    for (size_t i = 0; i < NUM_SIZES; i++) {
        const struct product *product = &shape->products[i];
        if (!product->primitive) {
            continue;
        }
        if (product->rows >= rows) {
            return !below || product->rows - rows <= product->rows / 4 ? product : below;
        }
        below = product;
    }
    return below;
}

const char *matmul_onednn_name(const struct kernels_matrix *matrix, uint32_t rows)
{
    return product_for(matrix->shape, rows)->name;
}

void matmul_onednn(struct kernels *kernels, const struct kernels_matrix *matrix, const float *x,
                   uint32_t rows, float *y)
{
    struct matmul *matmul = kernels->matmul;
    const struct shape *shape = matrix->shape;
    omp_set_num_threads((int)kernels->threads);
    while (rows > 0) {
        const struct product *product = product_for(shape, rows);
        uint32_t used = rows < product->rows ? rows : product->rows;
        size_t count = (size_t)used * shape->k;
        size_t row_bytes = shape->k * element_bytes(matmul);
        const void *input = x;
        if (matmul->dtype == dnnl_bf16) {
            kernels->ops->round_bf16(x, count, matmul->x);
            input = matmul->x;
        } else if (used < product->rows) {
            memcpy(matmul->x, x, count * sizeof(float));
            input = matmul->x;
        }
        if (used < product->rows) {
            memset((uint8_t *)matmul->x + used * row_bytes, 0, (product->rows - used) * row_bytes);
            product_run(matmul, product, matrix, input, matmul->y);
            memcpy(y, matmul->y, (size_t)used * shape->n * sizeof(float));
        } else {
            product_run(matmul, product, matrix, input, y);
        }
        x += count;
        y += (size_t)used * shape->n;
        rows -= used;
    }
}

void matmul_onednn_row(const struct kernels_matrix *matrix, uint32_t row, float *ret_row)
{
    const struct shape *shape = matrix->shape;
    size_t base = blocked_offset(&shape->weights, 0, row);
    for (uint32_t i = 0; i < shape->k; i++) {
        size_t at = base + shape->k_offsets[i];
        ret_row[i] = matrix->kernels->mode == KERNELS_F32
                         ? ((const float *)matrix->data)[at]
                         : f32_from_bf16(((const uint16_t *)matrix->data)[at]);
    }
}
