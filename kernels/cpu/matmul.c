/*
 * matmul: which code multiplies. oneDNN does, but for bf16 on AVX-512 without
 * AMX, where our own code reads weights faster and is row-independent by
 * construction.
 */
#include "common/base/alloc.h"
#include "kernels/cpu/cpu_internal.h"

enum rk_status kernels_matrix_create(struct kernels *kernels, const float *w, uint32_t n,
                                     uint32_t k, struct kernels_matrix **ret_matrix,
                                     struct rk_error *error)
{
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (n == 0 || k == 0) {
        return rk_error_set(error, RK_ERR_INVALID, "a matrix of %u x %u has no elements", n, k);
    }
    struct kernels_matrix *matrix = rk_alloc_zero(1, sizeof(*matrix));
    if (!matrix) {
        goto fail;
    }
    matrix->kernels = kernels;
    matrix->n = n;
    matrix->k = k;
    status = kernels->matmul_ops ? kernels->matmul_ops->init(matrix, w)
                                 : matmul_onednn_init(matrix, w, error);
    if (status != RK_OK) {
        goto fail;
    }
    *ret_matrix = matrix;
    return RK_OK;

fail:
    kernels_matrix_destroy(matrix);
    return status == RK_ERR_NO_MEMORY
               ? rk_error_set(error, status, "out of memory for a %u x %u matrix", n, k)
               : status;
}

void kernels_matrix_destroy(struct kernels_matrix *matrix)
{
    if (matrix) {
        matmul_onednn_clear(matrix);
        rk_free(matrix->data);
        rk_free(matrix);
    }
}

const char *kernels_matrix_implementation(struct kernels_matrix *matrix, uint32_t rows)
{
    return matrix->shape ? matmul_onednn_name(matrix, rows) : matrix->kernels->matmul_ops->name;
}

void kernels_matmul(struct kernels *kernels, const struct kernels_matrix *matrix, const float *x,
                    uint32_t rows, float *y)
{
    RK_ASSERT(rows <= KERNELS_ROWS_MAX);
    RK_ASSERT(matrix->kernels == kernels);
    if (matrix->shape) {
        matmul_onednn(kernels, matrix, x, rows, y);
    } else {
        kernels->matmul_ops->run(kernels, matrix, x, rows, y);
    }
}

void kernels_matrix_row(const struct kernels_matrix *matrix, uint32_t row, float *ret_row)
{
    RK_ASSERT(row < matrix->n);
    if (matrix->shape) {
        matmul_onednn_row(matrix, row, ret_row);
    } else {
        matrix->kernels->matmul_ops->row(matrix, row, ret_row);
    }
}
