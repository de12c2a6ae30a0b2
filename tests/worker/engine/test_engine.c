/*
 * Goal:   creation never leaks and never half-succeeds, and refuses options that
 *         cannot be met.
 * Method: a small random Llama; fail the first allocation, then the second, and
 *         so on, until creation gets through.
 */
#include "tests/worker/engine/tiny.h"
#include "tests/worker/model/gguf_writer.h"

#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static void survives_failed_allocations(void **state)
{
    struct model *model = tiny_model(false);
    const struct engine_options options = {.mode = KERNELS_F32, .threads = 1};
    struct engine *engine = NULL;
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    (void)state;

    for (; status != RK_OK; failures++) {
        struct rk_error error = {0};
        rk_alloc_fail_after(failures);
        status = engine_create(model, &options, &engine, &error);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        assert_int_equal(engine != NULL, status == RK_OK);
        assert_int_equal(error.text[0] != '\0', status != RK_OK);
    }
    rk_alloc_fail_after(-1);
    assert_true(failures > 30);
    engine_destroy(engine);
    engine_destroy(NULL);
    model_close(model);
}

static void options_are_checked(void **state)
{
    struct model *model = tiny_model(true);
    const struct engine_options wide = {.mode = KERNELS_F32, .context_tokens = TINY_CONTEXT + 1};
    const struct engine_options endless = {.mode = KERNELS_F32, .pool_tokens = UINT64_MAX};
    enum kernels_mode best =
        kernels_mode_check(KERNELS_BF16, NULL) == RK_OK ? KERNELS_BF16 : KERNELS_F32;
    enum rk_dtype dtype = best == KERNELS_BF16 ? RK_DTYPE_BF16 : RK_DTYPE_F32;
    const struct engine_options small = {
        .mode = best, .threads = 1, .context_tokens = 100, .pool_tokens = 65};
    struct engine *engine = NULL;
    struct rk_error error = {0};
    struct rk_kv_layout layout;
    (void)state;

    assert_int_equal(engine_create(model, &wide, &engine, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "1025"));
    assert_int_equal(engine_create(model, &endless, &engine, &error), RK_ERR_INVALID);
    assert_int_equal(engine_create(model, &small, &engine, &error), RK_OK);
    engine_layout(engine, &layout);
    const struct rk_kv_layout expected = {TINY_LAYERS, TINY_KV, TINY_DIM, dtype};
    assert_true(rk_kv_layout_equal(&layout, &expected));
    assert_int_equal(engine_context_tokens(engine), 100);
    assert_int_equal(engine_vocab_size(engine), TINY_VOCAB);
    assert_int_equal(engine_pool_pages(engine), 2 * TINY_PAIRS);
    assert_int_equal(engine_pages_needed(engine, 64), TINY_PAIRS);
    assert_int_equal(engine_pages_needed(engine, 65), 2 * TINY_PAIRS);
    assert_non_null(engine_isa_name(engine));
    assert_true(engine_flops_full(engine, 0) == 0);
    engine_destroy(engine);
    model_close(model);
}

static struct rk_id path_of(const struct model *model, enum kernels_mode mode, enum kernels_isa isa,
                            uint32_t threads)
{
    const struct engine_options options = {.mode = mode, .isa = isa, .threads = threads};
    struct engine *engine = NULL;
    struct rk_error error = {0};
    struct rk_id ids[2];
    assert_int_equal(engine_create(model, &options, &engine, &error), RK_OK);
    for (int i = 0; i < 2; i++) {
        if (engine_numeric_path(engine, &ids[i], &error) != RK_OK) {
            fail_msg("%s", error.text);
        }
    }
    assert_true(rk_id_equal(&ids[0], &ids[1]));
    assert_int_equal(engine_pool_pages_used(engine), 0);
    assert_non_null(strstr(engine_numeric_path_name(engine), engine_isa_name(engine)));
    engine_destroy(engine);
    return ids[0];
}

/* Equal options give equal ids; another mode, another attention path or other weights do not. */
static void arithmetics_are_told_apart(void **state)
{
    struct model *model = tiny_model(true);
    struct model *other = tiny_model(false);
    struct rk_id ids[2 * KERNELS_ISA_AMX + 1];
    uint32_t count = 0;
    (void)state;

    for (int mode = KERNELS_F32; mode <= KERNELS_BF16; mode++) {
        for (int isa = KERNELS_ISA_REFERENCE; isa <= KERNELS_ISA_AMX; isa++) {
            bool bf16_only = isa >= KERNELS_ISA_AVX512_BF16;
            if (!kernels_isa_supported((enum kernels_isa)isa) ||
                kernels_mode_check((enum kernels_mode)mode, NULL) != RK_OK ||
                (bf16_only && mode != KERNELS_BF16)) {
                continue;
            }
            ids[count] = path_of(model, (enum kernels_mode)mode, (enum kernels_isa)isa, 1);
            struct rk_id again = path_of(model, (enum kernels_mode)mode, (enum kernels_isa)isa, 2);
            assert_true(rk_id_equal(&ids[count], &again));
            count++;
        }
    }
    ids[count++] = path_of(other, KERNELS_F32, KERNELS_ISA_REFERENCE, 1);
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t j = 0; j < i; j++) {
            assert_false(rk_id_equal(&ids[i], &ids[j]));
        }
    }
    model_close(model);
    model_close(other);
}

static void a_probe_survives_failed_allocations(void **state)
{
    struct model *model = tiny_model(true);
    struct engine *engine = tiny_engine(model, KERNELS_F32, 1);
    enum rk_status status = RK_ERR_NO_MEMORY;
    struct rk_id id;
    int failures = 0;
    (void)state;

    for (; status != RK_OK; failures++) {
        struct rk_error error = {0};
        rk_alloc_fail_after(failures);
        status = engine_numeric_path(engine, &id, &error);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        assert_int_equal(error.text[0] != '\0', status != RK_OK);
        assert_int_equal(engine_pool_pages_used(engine), 0);
    }
    rk_alloc_fail_after(-1);
    assert_true(failures > 3);
    engine_destroy(engine);
    model_close(model);
}

static enum rk_status create_written(uint32_t heads, uint32_t context,
                                     const struct engine_options *options,
                                     struct engine **ret_engine, struct rk_error *error)
{
    static struct gguf_writer writer;
    struct model *model = NULL;
    writer_begin(&writer, 3);
    writer_key_string(&writer, "general.architecture", "llama");
    writer_key_u32(&writer, "llama.block_count", 1);
    writer_key_u32(&writer, "llama.context_length", context);
    writer_key_u32(&writer, "llama.embedding_length", 32);
    writer_key_u32(&writer, "llama.feed_forward_length", 64);
    writer_key_u32(&writer, "llama.attention.head_count", heads);
    writer_key_u32(&writer, "llama.attention.head_count_kv", 1);
    writer_key_u32(&writer, "llama.attention.key_length", 16);
    writer_key_u32(&writer, "llama.attention.value_length", 16);
    writer_key_f32(&writer, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    writer_small_tensors(&writer, 0);
    writer.tensors[3].dims[1] = (uint64_t)heads * 16; /* q */
    writer.tensors[3].bytes = (size_t)heads * 16 * 32 * 4;
    writer.tensors[6].dims[0] = (uint64_t)heads * 16; /* output of attention */
    writer.tensors[6].bytes = (size_t)heads * 16 * 32 * 4;
    writer_end(&writer);
    assert_int_equal(model_open_bytes(writer.bytes, writer.count, "written", &model, error), RK_OK);
    enum rk_status status = engine_create(model, options, ret_engine, error);
    model_close(model);
    return status;
}

/* Kernels would assert; a file may say what it likes. */
static void too_many_heads_for_one_are_refused(void **state)
{
    const struct engine_options options = {.mode = KERNELS_F32, .threads = 1};
    struct engine *engine = NULL;
    struct rk_error error = {0};
    struct rk_id id;
    (void)state;
    assert_int_equal(create_written(65, 100, &options, &engine, &error), RK_ERR_UNSUPPORTED);
    assert_non_null(strstr(error.text, "65 heads share a KV head"));
    assert_int_equal(create_written(64, 100, &options, &engine, &error), RK_OK);
    assert_int_equal(engine_numeric_path(engine, &id, &error), RK_OK);
    engine_destroy(engine);
}

/* A file that claims 4 million tokens does not get GiBs of rotation tables unasked. */
static void a_claimed_context_costs_nothing(void **state)
{
    struct engine_options options = {.mode = KERNELS_F32, .threads = 1, .pool_tokens = 256};
    struct engine *engine = NULL;
    (void)state;
    assert_int_equal(create_written(2, 4000000, &options, &engine, NULL), RK_OK);
    assert_int_equal(engine_context_tokens(engine), ENGINE_CONTEXT_DEFAULT_MAX);
    engine_destroy(engine);
    options.context_tokens = ENGINE_CONTEXT_DEFAULT_MAX + 64;
    assert_int_equal(create_written(2, 4000000, &options, &engine, NULL), RK_OK);
    assert_int_equal(engine_context_tokens(engine), ENGINE_CONTEXT_DEFAULT_MAX + 64);
    engine_destroy(engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(survives_failed_allocations),
        cmocka_unit_test(options_are_checked),
        cmocka_unit_test(arithmetics_are_told_apart),
        cmocka_unit_test(too_many_heads_for_one_are_refused),
        cmocka_unit_test(a_claimed_context_costs_nothing),
        cmocka_unit_test(a_probe_survives_failed_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
