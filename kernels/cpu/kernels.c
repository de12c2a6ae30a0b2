/*
 * kernels: creation, the choice of paths, and the calls that are not products.
 */
#include "kernels/kernels.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "common/base/tsan.h"
#include "kernels/cpu/cpu_internal.h"

#include <cpuid.h>
#include <omp.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA  18

struct parallel_call {
    kernels_task task;
    void *context;
};

static void run_task(struct parallel_call *call, uint32_t task, uint32_t worker)
{
    RK_TSAN_ACQUIRE(call);
    call->task(call->context, task, worker);
    RK_TSAN_RELEASE(call);
}

__attribute__((no_sanitize("thread"))) void kernels_parallel(struct kernels *kernels,
                                                             uint32_t count, kernels_task task,
                                                             void *context)
{
    struct parallel_call call = {.task = task, .context = context};
    uint32_t threads = kernels->threads < count ? kernels->threads : count;
    RK_TSAN_RELEASE(&call);
    if (threads <= 1) {
        for (uint32_t i = 0; i < count; i++) {
            run_task(&call, i, 0);
        }
    } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (uint32_t i = 0; i < count; i++) {
            run_task(&call, i, (uint32_t)omp_get_thread_num());
        }
    }
    RK_TSAN_ACQUIRE(&call);
}

/* __builtin_cpu_supports checks XCR0 for AVX and AVX-512 state itself. */
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static bool has_avx512_bf16(void)
{
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    return has_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

/* The tiles need CPU, kernel state (XCR0) and a permission that holds for the whole process. */
static bool has_amx(void)
{
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) ||
        !(edx >> 22 & 1) || !(edx >> 24 & 1)) {
        return false;
    }
    unsigned low;
    unsigned high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3 &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

struct isa {
    const char *name;
    bool (*supported)(void); /* NULL: everywhere */
    attention_path attention;
    bool bf16_only;
    const struct matmul_ops *matmul; /* of KERNELS_BF16; NULL: oneDNN */
};

static const struct isa isas[] = {
    [KERNELS_ISA_REFERENCE] = {"reference", NULL, attention_reference, false, NULL},
    [KERNELS_ISA_AVX2] = {"avx2", has_avx2, attention_avx2, false, NULL},
    [KERNELS_ISA_AVX512] = {"avx512", has_avx512, attention_avx512, false, &matmul_avx512},
    [KERNELS_ISA_AVX512_BF16] = {"avx512_bf16", has_avx512_bf16, attention_avx512_bf16, true,
                                 &matmul_avx512_bf16},
    [KERNELS_ISA_AMX] = {"amx", has_amx, attention_amx, true, NULL},
};
#define NUM_ISAS (sizeof(isas) / sizeof(isas[0]))

bool kernels_isa_supported(enum kernels_isa isa)
{
    if (isa == KERNELS_ISA_AUTO) {
        return true;
    }
    return (size_t)isa < NUM_ISAS && isas[isa].attention &&
           (!isas[isa].supported || isas[isa].supported());
}

/* "reference, avx2": what this CPU and the mode have. */
static void list_isas(enum kernels_mode mode, char *ret_list, size_t bytes)
{
    size_t used = 0;
    ret_list[0] = '\0';
    for (size_t i = 0; i < NUM_ISAS; i++) {
        bool has = kernels_isa_supported((enum kernels_isa)i) && isas[i].name &&
                   (mode == KERNELS_BF16 || !isas[i].bf16_only);
        if (has && used < bytes) {
            int length =
                snprintf(ret_list + used, bytes - used, "%s%s", used ? ", " : "", isas[i].name);
            used += length > 0 ? (size_t)length : 0;
        }
    }
}

enum rk_status kernels_isa_check(enum kernels_isa isa, enum kernels_mode mode,
                                 struct rk_error *error)
{
    char list[96];
    if (isa == KERNELS_ISA_AUTO) {
        return RK_OK;
    }
    if ((size_t)isa >= NUM_ISAS || !isas[isa].name) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED, "there is no attention path %d; use auto",
                            (int)isa);
    }
    list_isas(mode, list, sizeof(list));
    if (!kernels_isa_supported(isa)) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "this CPU has no %s; it has %s: use one of these, or auto",
                            isas[isa].name, list);
    }
    if (isas[isa].bf16_only && mode != KERNELS_BF16) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "attention path %s is for mode bf16; mode f32 has %s: use one of "
                            "these, or auto",
                            isas[isa].name, list);
    }
    return RK_OK;
}

enum kernels_mode kernels_mode_default(void)
{
    return has_avx512_bf16() ? KERNELS_BF16 : KERNELS_F32;
}

enum rk_status kernels_mode_check(enum kernels_mode mode, struct rk_error *error)
{
    if (mode == KERNELS_BF16 && !has_avx512()) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "products in bf16 need a CPU with AVX-512 (F, BW, VL, DQ), which this "
                            "one lacks: use f32");
    }
    return RK_OK;
}

/*
 * Intel's cores run vdpbf16ps at half the rate of f32 FMA (measured: 87 against
 * 172 GFLOP/s a core), so without AMX they do better by widening bf16 to f32.
 */
static enum kernels_isa best_isa(enum kernels_mode mode, enum kernels_isa at_most)
{
    size_t best = at_most;
    while (!kernels_isa_supported((enum kernels_isa)best) ||
           (isas[best].bf16_only && mode != KERNELS_BF16) ||
           (best == KERNELS_ISA_AVX512_BF16 && __builtin_cpu_is("intel"))) {
        best--;
    }
    return (enum kernels_isa)best;
}

/* A path that gives wrong numbers on this CPU is not used: the next one is, or the caller is told.
 */
static enum rk_status choose_checked_path(struct kernels *kernels, bool automatic,
                                          struct rk_error *error)
{
    while (kernels->isa != KERNELS_ISA_REFERENCE && !attention_self_check(kernels)) {
        if (!automatic) {
            return rk_error_set(error, RK_ERR_UNSUPPORTED,
                                "attention path %s gives wrong numbers on this CPU; use auto",
                                kernels_isa_name(kernels));
        }
        RK_LOG_WARN("attention_path_wrong", "path=%s action=%q", kernels_isa_name(kernels),
                    "use the next one");
        kernels->isa = best_isa(kernels->mode, (enum kernels_isa)(kernels->isa - 1));
        kernels->attention = isas[kernels->isa].attention;
    }
    return RK_OK;
}

/* Our own products, where the path has some and they are right on this CPU; else oneDNN's. */
static enum rk_status choose_products(struct kernels *kernels, bool automatic,
                                      struct rk_error *error)
{
    if (kernels->mode == KERNELS_BF16) {
        kernels->matmul_ops = isas[kernels->isa].matmul;
    }
    if (!kernels->matmul_ops || products_self_check(kernels)) {
        return RK_OK;
    }
    if (!automatic) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "products of path %s give wrong numbers on this CPU; use auto",
                            kernels_isa_name(kernels));
    }
    RK_LOG_WARN("products_wrong", "path=%s action=%q", kernels->matmul_ops->name, "use oneDNN");
    kernels->matmul_ops = NULL;
    return RK_OK;
}

static uint32_t cores_of_process(void)
{
    struct rk_limits limits;
    rk_limits_read(&limits);
    return limits.cpus;
}

static void describe(struct kernels *kernels)
{
    char library[80];
    matmul_onednn_describe(library, sizeof(library));
    (void)snprintf(kernels->numeric_path, sizeof(kernels->numeric_path),
                   "%s attention=%s rows=%s products=%s",
                   kernels->mode == KERNELS_BF16 ? "bf16" : "f32", isas[kernels->isa].name,
                   kernels->ops->name, kernels->matmul_ops ? kernels->matmul_ops->name : library);
}

enum rk_status kernels_create(const struct kernels_options *options, struct kernels **ret_kernels,
                              struct rk_error *error)
{
    enum kernels_isa isa = options->isa == KERNELS_ISA_AUTO
                               ? best_isa(options->mode, (enum kernels_isa)(NUM_ISAS - 1))
                               : options->isa;
    if (kernels_isa_check(isa, options->mode, error) != RK_OK) {
        return RK_ERR_UNSUPPORTED;
    }
    enum rk_status status = RK_ERR_NO_MEMORY;
    struct kernels *kernels = rk_alloc_zero(1, sizeof(*kernels));
    if (!kernels) {
        goto fail;
    }
    kernels->mode = options->mode;
    kernels->isa = isa;
    kernels->attention = isas[isa].attention;
    kernels->threads = options->threads ? options->threads : cores_of_process();
    kernels->ops = has_avx512() ? &elementwise_avx512
                   : has_avx2() ? &elementwise_avx2
                                : &elementwise_baseline;
    kernels->scratch_bytes = KERNELS_SCRATCH_BYTES;
    kernels->scratch = rk_alloc_aligned(64, kernels->threads * kernels->scratch_bytes);
    if (!kernels->scratch) {
        goto fail;
    }
    status = choose_checked_path(kernels, options->isa == KERNELS_ISA_AUTO, error);
    if (status != RK_OK) {
        goto fail;
    }
    status = choose_products(kernels, options->isa == KERNELS_ISA_AUTO, error);
    if (status != RK_OK) {
        goto fail;
    }
    if (!kernels->matmul_ops) {
        status = matmul_create(kernels, &kernels->matmul, error);
        if (status != RK_OK) {
            goto fail;
        }
    }
    describe(kernels);
    *ret_kernels = kernels;
    return RK_OK;

fail:
    kernels_destroy(kernels);
    return status == RK_ERR_NO_MEMORY ? rk_error_set(error, status, "kernels: out of memory")
                                      : status;
}

void kernels_destroy(struct kernels *kernels)
{
    if (kernels) {
        matmul_destroy(kernels->matmul);
        rk_free(kernels->inputs);
        rk_free(kernels->scratch);
        rk_free(kernels);
    }
}

enum kernels_mode kernels_mode(const struct kernels *kernels)
{
    return kernels->mode;
}

uint32_t kernels_threads(const struct kernels *kernels)
{
    return kernels->threads;
}

const char *kernels_isa_name(const struct kernels *kernels)
{
    return isas[kernels->isa].name;
}

const char *kernels_numeric_path(const struct kernels *kernels)
{
    return kernels->numeric_path;
}

/* Rows of one elementwise task: few enough to share, enough to pay for the start. */
#define ROWS_PER_TASK 16

struct rows_call {
    const struct kernels *kernels;
    const float *x;
    const float *weight;
    float *y;
    uint32_t rows;
    uint32_t width;
    float epsilon;
};

static uint32_t row_tasks(uint32_t rows)
{
    return (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
}

static uint32_t task_rows(uint32_t task, uint32_t rows)
{
    uint32_t left = rows - task * ROWS_PER_TASK;
    return left < ROWS_PER_TASK ? left : ROWS_PER_TASK;
}

static void rms_norm_task(void *context, uint32_t task, uint32_t worker)
{
    (void)worker;
    const struct rows_call *call = context;
    size_t first = (size_t)task * ROWS_PER_TASK * call->width;
    for (uint32_t r = 0; r < task_rows(task, call->rows); r++) {
        size_t at = first + (size_t)r * call->width;
        call->kernels->ops->rms_norm(call->x + at, call->weight, call->width, call->epsilon,
                                     call->y + at);
    }
}

void kernels_rms_norm(struct kernels *kernels, const float *x, const float *weight, uint32_t rows,
                      uint32_t width, float epsilon, float *y)
{
    struct rows_call call = {.kernels = kernels,
                             .x = x,
                             .weight = weight,
                             .y = y,
                             .rows = rows,
                             .width = width,
                             .epsilon = epsilon};
    kernels_parallel(kernels, row_tasks(rows), rms_norm_task, &call);
}

static void silu_mul_task(void *context, uint32_t task, uint32_t worker)
{
    (void)worker;
    const struct rows_call *call = context;
    size_t first = (size_t)task * ROWS_PER_TASK * call->width;
    for (uint32_t r = 0; r < task_rows(task, call->rows); r++) {
        size_t at = first + (size_t)r * call->width;
        call->kernels->ops->silu_mul(call->y + at, call->x + at, call->width);
    }
}

void kernels_silu_mul(struct kernels *kernels, float *gate, const float *up, uint32_t rows,
                      uint32_t width)
{
    struct rows_call call = {.kernels = kernels, .x = up, .y = gate, .rows = rows, .width = width};
    kernels_parallel(kernels, row_tasks(rows), silu_mul_task, &call);
}

/* Bound by memory: not worth a second thread. */
void kernels_add(struct kernels *kernels, float *x, const float *y, uint32_t rows, uint32_t width)
{
    kernels->ops->add(x, y, (size_t)rows * width);
}

void kernels_kv_write(struct kernels *kernels, const struct kernels_rope *rope, const float *k,
                      const float *v, size_t stride, const struct kernels_page_slot *slots,
                      uint32_t rows)
{
    uint32_t d = rope->head_dim;
    float turned[KERNELS_HEAD_DIM_MAX];
    RK_ASSERT(d <= KERNELS_HEAD_DIM_MAX && d % 2 == 0);
    for (uint32_t r = 0; r < rows; r++) {
        const struct kernels_page_slot *slot = &slots[r];
        RK_ASSERT(slot->row < RK_PAGE_TOKENS);
        float sign;
        size_t angle = rope_offset(rope, slot->position, &sign);
        size_t k_at = (size_t)slot->row * d;
        size_t v_at = (size_t)(RK_PAGE_TOKENS + slot->row) * d;
        kernels->ops->rotate(k + r * stride, rope->cos + angle, rope->sin + angle, sign, d, turned);
        if (kernels->mode == KERNELS_F32) {
            memcpy((float *)slot->page + k_at, turned, d * sizeof(float));
            memcpy((float *)slot->page + v_at, v + r * stride, d * sizeof(float));
        } else {
            kernels->ops->round_bf16(turned, d, (uint16_t *)slot->page + k_at);
            kernels->ops->round_bf16(v + r * stride, d, (uint16_t *)slot->page + v_at);
        }
    }
}

void kernels_attention(struct kernels *kernels, const struct kernels_attention *attention)
{
    RK_ASSERT(attention->rows <= KERNELS_ROWS_MAX);
    RK_ASSERT(attention->head_dim >= 16 && attention->head_dim <= KERNELS_HEAD_DIM_MAX &&
              attention->head_dim % 16 == 0 && attention->rope->head_dim == attention->head_dim);
    RK_ASSERT(attention->group >= 1 && attention->group <= KERNELS_GROUP_MAX);
    kernels->attention(kernels, attention);
}
