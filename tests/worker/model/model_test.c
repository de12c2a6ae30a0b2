/*
 * Goal:   a model file gives the hyper-parameters, shapes and weights that gguf-py reads from it,
 *         Q and K in half-split order; the fingerprint follows every weight byte.
 * Method: all tensors of SmolLM2 against golden sums and digests, some rows element by element;
 *         small files of our own, of every type and with every mistake in shapes and keys.
 */
#include "common/base/alloc.h"
#include "common/base/id.h"
#include "tests/support/golden.h"
#include "tests/worker/model/gguf_writer.h"
#include "worker/model/model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static struct model *model;
static float *buffer; /* holds the largest tensor */
static uint64_t buffer_elements;
static struct gguf_writer writer;

static int open_model(void **state)
{
    struct rk_error error;
    (void)state;
    if (model_open(golden_model_path(), &model, &error) != RK_OK) {
        print_error("%s\n", error.text);
        return 1;
    }
    buffer_elements = (uint64_t)model_config(model)->vocab_size * model_config(model)->hidden;
    buffer = malloc(buffer_elements * sizeof(*buffer));
    return buffer ? 0 : 1;
}

static int close_model(void **state)
{
    (void)state;
    model_close(model);
    free(buffer);
    return 0;
}

static void hyper_parameters(void **state)
{
    const struct model_config *config = model_config(model);
    json_t *file = golden_json("smollm2/model.json");
    const struct {
        const char *key;
        uint32_t value;
    } members[] = {{"n_layers", config->num_layers},
                   {"n_heads", config->num_heads},
                   {"n_kv_heads", config->num_kv_heads},
                   {"head_dim", config->head_dim},
                   {"hidden", config->hidden},
                   {"vocab", config->vocab_size},
                   {"intermediate", config->intermediate},
                   {"context", config->context_tokens},
                   {"n_merges", model_vocabulary(model)->num_merges}};
    (void)state;
    for (size_t i = 0; i < sizeof(members) / sizeof(members[0]); i++) {
        assert_int_equal(json_integer_value(golden_member(file, members[i].key)), members[i].value);
    }
    assert_true(config->tied_embeddings);
    assert_true(config->rope_theta == 100000.0f);
    assert_true(config->rms_norm_epsilon ==
                (float)json_real_value(golden_member(file, "rms_norm_eps")));
    json_decref(file);
}

static void vocabulary(void **state)
{
    const struct model_vocabulary *v = model_vocabulary(model);
    (void)state;
    assert_string_equal(v->model, "gpt2");
    assert_string_equal(v->pre, "smollm");
    assert_int_equal(v->num_tokens, 49152);
    assert_memory_equal(v->tokens[2].data, "<|im_end|>", v->tokens[2].bytes);
    assert_int_equal(v->types[2], 3);
    assert_int_equal(v->types[17], 1);
    assert_int_equal(v->bos_id, 1);
    assert_int_equal(v->eos_id, 2);
    assert_int_equal(v->unknown_id, 0);
    assert_int_equal(v->padding_id, 2);
    assert_false(v->add_bos);
    assert_int_equal(v->merges[0].bytes, 4); /* U+0120, a space, "t" */
    assert_true(v->chat_template.bytes > 100);
}

static void check_tensor(const json_t *item, int *digests)
{
    const char *name = json_string_value(golden_member(item, "name"));
    uint64_t elements = 0;
    double sum = 0;
    double sum_abs = 0;
    char hex[RK_ID_HEX_BYTES];
    assert_int_equal(model_tensor_read_named(model, name, buffer, buffer_elements, &elements),
                     RK_OK);
    for (uint64_t i = 0; i < elements; i++) {
        sum += (double)buffer[i];
        sum_abs += fabs((double)buffer[i]);
    }
    double wanted = json_number_value(golden_member(item, "sum"));
    double wanted_abs = json_number_value(golden_member(item, "sum_abs"));
    /* Relative to what was added up: the sum itself may cancel to nothing. */
    assert_true(fabs(sum_abs - wanted_abs) <= 1e-6 * wanted_abs);
    assert_true(fabs(sum - wanted) <= 1e-6 * wanted_abs);
    struct rk_id digest = rk_id_sha256(buffer, elements * sizeof(*buffer));
    rk_id_to_hex(&digest, hex);
    *digests += strcmp(hex, json_string_value(golden_member(item, "sha256_f32le"))) == 0;
}

static void all_weights_are_those_of_gguf_py(void **state)
{
    json_t *file = golden_json("smollm2/dequant.json");
    const json_t *tensors = golden_member(file, "tensors");
    int digests = 0;
    (void)state;
    assert_int_equal(json_array_size(tensors), 272);
    for (size_t i = 0; i < json_array_size(tensors); i++) {
        check_tensor(json_array_get(tensors, i), &digests);
    }
    assert_int_equal(digests, 272); /* Product and sum are rounded apart, as there. */
    json_decref(file);
}

static void compare_rows(const float *got, const float *wanted, const int32_t *rows,
                         uint64_t num_rows, uint64_t columns)
{
    for (uint64_t i = 0; i < num_rows; i++) {
        assert_memory_equal(got + (uint64_t)rows[i] * columns, wanted + i * columns,
                            columns * sizeof(*got));
    }
}

/* The rows stored in file order by their own name, and Q and K after un-permuting. */
static void rows_element_by_element(void **state)
{
    static const struct {
        const char *file;
        const char *hf;
        enum model_tensor tensor;
        uint32_t layer;
    } tensors[] = {
        {"token_embd.weight", NULL, MODEL_EMBEDDING, 0},
        {"blk.0.attn_q.weight", "hf.model.layers.0.self_attn.q_proj.weight", MODEL_Q, 0},
        {"blk.0.attn_k.weight", "hf.model.layers.0.self_attn.k_proj.weight", MODEL_K, 0},
    };
    struct golden *golden = golden_open("smollm2/dequant.safetensors");
    (void)state;
    for (size_t i = 0; i < sizeof(tensors) / sizeof(tensors[0]); i++) {
        char rows_name[96];
        uint64_t elements = 0;
        uint32_t all_rows = 0;
        uint32_t columns = 0;
        (void)snprintf(rows_name, sizeof(rows_name), "%s.rows", tensors[i].file);
        struct golden_tensor rows = golden_tensor(golden, rows_name);
        assert_int_equal(
            model_tensor_shape(model, tensors[i].tensor, tensors[i].layer, &all_rows, &columns),
            RK_OK);
        assert_int_equal(
            model_tensor_read_named(model, tensors[i].file, buffer, buffer_elements, &elements),
            RK_OK);
        assert_int_equal(elements, (uint64_t)all_rows * columns);
        compare_rows(buffer, golden_f32(golden, tensors[i].file, rows.elements * columns),
                     rows.data, rows.elements, columns);
        if (tensors[i].hf) {
            assert_int_equal(
                model_tensor_read(model, tensors[i].tensor, tensors[i].layer, buffer, NULL), RK_OK);
            compare_rows(buffer, golden_f32(golden, tensors[i].hf, rows.elements * columns),
                         rows.data, rows.elements, columns);
        }
    }
    golden_close(golden);
}

static void reading_by_kind_finds_the_right_tensor(void **state)
{
    static const char *const names[] = {"token_embd.weight",
                                        "token_embd.weight",
                                        "output_norm.weight",
                                        "blk.29.attn_norm.weight",
                                        NULL,
                                        NULL,
                                        "blk.29.attn_v.weight",
                                        "blk.29.attn_output.weight",
                                        "blk.29.ffn_norm.weight",
                                        "blk.29.ffn_gate.weight",
                                        "blk.29.ffn_up.weight",
                                        "blk.29.ffn_down.weight"};
    uint32_t rows = 0;
    uint32_t columns = 0;
    (void)state;
    for (int i = MODEL_OUTPUT_NORM; i <= MODEL_FFN_DOWN; i++) {
        uint64_t elements = 0;
        if (!names[i]) {
            continue;
        }
        assert_int_equal(model_tensor_shape(model, (enum model_tensor)i, 29, &rows, &columns),
                         RK_OK);
        uint64_t count = (uint64_t)rows * columns;
        assert_true(2 * count <= buffer_elements);
        assert_int_equal(model_tensor_read(model, (enum model_tensor)i, 29, buffer, NULL), RK_OK);
        assert_int_equal(model_tensor_read_named(model, names[i], buffer + count, count, &elements),
                         RK_OK);
        assert_int_equal(elements, count);
        assert_memory_equal(buffer, buffer + count, count * sizeof(*buffer));
    }
    assert_int_equal(model_tensor_read(model, MODEL_V, 30, buffer, NULL), RK_ERR_INVALID);
    assert_int_equal(model_tensor_shape(model, (enum model_tensor)99, 0, &rows, &columns),
                     RK_ERR_INVALID);
    uint64_t elements = 0;
    assert_int_equal(model_tensor_read_named(model, "no", buffer, 1, &elements), RK_ERR_NOT_FOUND);
    assert_int_equal(model_tensor_read_named(model, names[1], buffer, 1, &elements),
                     RK_ERR_TOO_LONG);
}

static void fingerprint_names_the_model(void **state)
{
    struct rk_id f32 = model_fingerprint(model, RK_DTYPE_F32);
    struct rk_id bf16 = model_fingerprint(model, RK_DTYPE_BF16);
    (void)state;
    assert_false(rk_id_equal(&f32, &bf16));
    model_release_pages(model);
    struct rk_id again = model_fingerprint(model, RK_DTYPE_F32);
    assert_true(rk_id_equal(&f32, &again));
}

/* ---- Small files ---- */

static enum rk_status open_written(struct model **ret_model, struct rk_error *error)
{
    /* A block of exactly this size: ASan sees the first byte too far. */
    uint8_t *copy = malloc(writer.count ? writer.count : 1);
    assert_non_null(copy);
    memcpy(copy, writer.bytes, writer.count);
    enum rk_status status = model_open_bytes(copy, writer.count, "test.gguf", ret_model, error);
    if (status == RK_OK) {
        return status; /* The caller frees the copy with close_written(). */
    }
    free(copy);
    return status;
}

static void small_begin(void)
{
    writer_begin(&writer, 3);
    writer_small_keys(&writer);
}

static void small_open(uint32_t type, struct model **ret_model)
{
    struct rk_error error;
    small_begin();
    writer_small_tensors(&writer, type);
    writer_end(&writer);
    if (model_open_bytes(writer.bytes, writer.count, "test.gguf", ret_model, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
}

static void every_type_opens(void **state)
{
    static const uint32_t types[] = {0, 1, 2, 3, 8, 30};
    (void)state;
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        struct model *small = NULL;
        float q[32 * 32];
        float file[32 * 32];
        uint64_t elements = 0;
        small_open(types[i], &small);
        assert_string_equal(model_config(small)->name, "small?\"one\"");
        assert_int_equal(model_config(small)->head_dim, 16);
        assert_int_equal(model_config(small)->vocab_size, 5);
        assert_int_equal(model_vocabulary(small)->num_tokens, 0);
        assert_int_equal(model_tensor_read(small, MODEL_Q, 0, q, NULL), RK_OK);
        assert_int_equal(
            model_tensor_read_named(small, "blk.0.attn_q.weight", file, 1024, &elements), RK_OK);
        /* Row 16 + 2*3 + 1 of the file is row 16 + 8 + 3. */
        assert_memory_equal(q + 27 * 32, file + 23 * 32, 32 * sizeof(float));
        assert_memory_equal(q + 8 * 32, file + 1 * 32, 32 * sizeof(float));
        model_close(small);
    }
}

static void fingerprint_follows_each_byte(void **state)
{
    struct model *small = NULL;
    (void)state;
    small_open(0, &small);
    struct rk_id before = model_fingerprint(small, RK_DTYPE_BF16);
    writer.bytes[writer.count - 1] ^= 1;
    struct rk_id after = model_fingerprint(small, RK_DTYPE_BF16);
    model_close(small);
    assert_false(rk_id_equal(&before, &after));
}

static void expect(enum rk_status wanted, const char *text)
{
    struct model *small = NULL;
    struct rk_error error = {.text = ""};
    writer_end(&writer);
    enum rk_status status = open_written(&small, &error);
    if (status != wanted || !strstr(error.text, text) || !strstr(error.text, "test.gguf") ||
        strchr(error.text, '\n')) {
        fail_msg("wanted %s with \"%s\", got %s: %s", rk_status_name(wanted), text,
                 rk_status_name(status), error.text);
    }
    assert_null(small);
}

static void variants_are_refused(void **state)
{
    (void)state;
    small_begin();
    writer_small_tensors(&writer, 0);
    writer_tensor(&writer, "rope_freqs.weight", 0, 8, 0);
    expect(RK_ERR_UNSUPPORTED, "rope_freqs.weight");
    small_begin();
    writer_small_tensors(&writer, 0);
    writer_tensor(&writer, "blk.0.attn_q.bias", 0, 32, 0);
    expect(RK_ERR_UNSUPPORTED, "attn_q.bias");
    small_begin();
    writer_key_string(&writer, "llama.rope.scaling.type", "linear");
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_UNSUPPORTED, "llama.rope.scaling.type");
    small_begin();
    writer_key_f32(&writer, "llama.rope.scaling.factor", 2.0f);
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_UNSUPPORTED, "llama.rope.scaling.factor");
    small_begin();
    writer_key_u32(&writer, "llama.expert_count", 8);
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_UNSUPPORTED, "llama.expert_count");
    small_begin();
    writer_key_u32(&writer, "llama.rope.dimension_count", 8);
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_UNSUPPORTED, "RoPE 8");
    writer_begin(&writer, 3);
    writer_key_string(&writer, "general.architecture", "mamba");
    expect(RK_ERR_UNSUPPORTED, "mamba");
}

static void wrong_shapes_and_keys_are_refused(void **state)
{
    (void)state;
    small_begin();
    writer_small_tensors(&writer, 0);
    writer.tensors[4].dims[1] = 32;
    expect(RK_ERR_CORRUPT, "attn_k.weight");
    small_begin();
    writer_small_tensors(&writer, 0);
    writer.tensors[1].dims[0] = 64;
    expect(RK_ERR_CORRUPT, "output_norm.weight");
    small_begin();
    writer_small_tensors(&writer, 0);
    (void)strcpy(writer.tensors[10].name, "blk.1.ffn_down.weight");
    expect(RK_ERR_CORRUPT, "blk.0.ffn_down.weight is missing");
    small_begin();
    writer_key_u32(&writer, "llama.vocab_size", 6);
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_CORRUPT, "llama.vocab_size");
    writer_begin(&writer, 3);
    writer_key_string(&writer, "general.architecture", "llama");
    expect(RK_ERR_CORRUPT, "llama.block_count is missing");
    writer_begin(&writer, 3);
    expect(RK_ERR_CORRUPT, "general.architecture is missing");
    writer_begin(&writer, 3);
    writer_key_string(&writer, "general.architecture", "llama");
    writer_key_u32(&writer, "llama.block_count", 100000);
    expect(RK_ERR_UNSUPPORTED, "llama.block_count is 100000");
    writer_begin(&writer, 3);
    writer_key_string(&writer, "general.architecture", "llama");
    writer_key_string(&writer, "llama.block_count", "1");
    expect(RK_ERR_CORRUPT, "llama.block_count is not an integer");
}

/* A NaN or an infinity, wherever a type keeps its exponent, is named with its tensor; and what
 * follows the last tensor is not looked at. */
static void weights_that_are_no_numbers_are_refused(void **state)
{
    static const struct {
        uint32_t type;
        size_t from_end; /* of blk.0.ffn_down.weight, the file's last bytes */
        uint8_t bytes[4];
        size_t count;
    } cases[] = {
        {0, 4, {0, 0, 0xc0, 0x7f}, 4}, {0, 4, {0, 0, 0x80, 0xff}, 4}, {1, 2, {0, 0x7c}, 2},
        {1, 2, {1, 0xfe}, 2},          {30, 2, {0x80, 0x7f}, 2},      {2, 18, {0, 0x7e}, 2},
        {3, 18, {0, 0xfc}, 2},         {8, 34, {0, 0x7c}, 2},
    };
    float out[64 * 32];
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct model *small = NULL;
        struct rk_error error = {.text = ""};
        small_open(cases[i].type, &small);
        assert_int_equal(model_tensor_read(small, MODEL_FFN_DOWN, 0, out, &error), RK_OK);
        memcpy(writer.bytes + writer.count - cases[i].from_end, cases[i].bytes, cases[i].count);
        assert_int_equal(model_tensor_read(small, MODEL_FFN_DOWN, 0, out, &error), RK_ERR_CORRUPT);
        assert_non_null(strstr(error.text, "test.gguf: byte "));
        assert_non_null(strstr(error.text, "row 31 of tensor blk.0.ffn_down.weight"));
        assert_int_equal(model_tensor_read(small, MODEL_FFN_UP, 0, out, &error), RK_OK);
        model_close(small);
    }
}

static void put_array(const char *name, uint32_t element_type, uint64_t count)
{
    writer_key(&writer, name, 9);
    writer_put(&writer, &element_type, 4);
    writer_put(&writer, &count, 8);
}

/* Five tokens, as many as the embedding has rows. */
static void vocabulary_begin(void)
{
    small_begin();
    put_array("tokenizer.ggml.tokens", 8, 5);
    for (int i = 0; i < 5; i++) {
        writer_string(&writer, (const char *[]){"a", "b", "ab", "<s>", "</s>"}[i]);
    }
}

static void vocabularies_that_cannot_work_are_refused(void **state)
{
    static const uint8_t yes = 1;
    (void)state;
    vocabulary_begin();
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_CORRUPT, "tokenizer.ggml.merges is missing or empty");
    vocabulary_begin();
    put_array("tokenizer.ggml.merges", 8, 0);
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_CORRUPT, "tokenizer.ggml.merges is missing or empty");
    vocabulary_begin();
    put_array("tokenizer.ggml.merges", 8, 1);
    writer_string(&writer, "a b");
    writer_key(&writer, "tokenizer.ggml.add_bos_token", 7);
    writer_put(&writer, &yes, 1);
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_CORRUPT, "add_bos_token is true, but");
    vocabulary_begin();
    put_array("tokenizer.ggml.merges", 8, 1);
    writer_string(&writer, "a b");
    writer_key_u32(&writer, "tokenizer.ggml.eos_token_id", 5);
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_CORRUPT, "eos_token_id is not the id of a token");
}

static void numbers_out_of_range(void **state)
{
    struct model *small = NULL;
    (void)state;
    small_begin();
    writer_key_f32(&writer, "llama.rope.freq_base", 0.5f);
    writer_small_tensors(&writer, 0);
    expect(RK_ERR_CORRUPT, "llama.rope.freq_base is 0.5");
    writer_begin(&writer, 3);
    writer_key_string(&writer, "general.architecture", "llama");
    writer_key_u32(&writer, "llama.block_count", 1);
    writer_key_u32(&writer, "llama.context_length", 4000000000u); /* unusual, not wrong */
    writer_key_u32(&writer, "llama.embedding_length", 32);
    writer_key_u32(&writer, "llama.feed_forward_length", 64);
    writer_key_u32(&writer, "llama.attention.head_count", 2);
    writer_key_u32(&writer, "llama.attention.head_count_kv", 1);
    writer_key_f32(&writer, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    writer_small_tensors(&writer, 0);
    writer_end(&writer);
    assert_int_equal(model_open_bytes(writer.bytes, writer.count, "test.gguf", &small, NULL),
                     RK_OK);
    assert_int_equal(model_config(small)->context_tokens, RK_SEGMENT_TOKENS_MAX);
    model_close(small);
}

/* ---- Paths ---- */

static void expect_path(const char *path, enum rk_status wanted)
{
    struct model *small = NULL;
    struct rk_error error = {.text = ""};
    assert_int_equal(model_open(path, &small, &error), wanted);
    assert_non_null(strstr(error.text, path));
    assert_null(small);
}

static void other_than_files_are_refused(void **state)
{
    char folder[] = "/tmp/redknot-model-XXXXXX";
    char path[64];
    (void)state;
    assert_non_null(mkdtemp(folder));
    expect_path(folder, RK_ERR_INVALID);
    (void)snprintf(path, sizeof(path), "%s/none.gguf", folder);
    expect_path(path, RK_ERR_NOT_FOUND);
    assert_int_equal(mkfifo(path, 0600), 0);
    expect_path(path, RK_ERR_INVALID); /* and does not wait for a writer */
    assert_int_equal(unlink(path), 0);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fclose(file), 0);
    expect_path(path, RK_ERR_CORRUPT);
    if (geteuid() != 0) { /* root reads everything */
        assert_int_equal(chmod(path, 0), 0);
        expect_path(path, RK_ERR_IO);
    }
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(folder), 0);
}

static void opening_survives_each_failed_allocation(void **state)
{
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    (void)state;
    small_begin();
    writer_small_tensors(&writer, 3);
    writer_end(&writer);
    for (; status != RK_OK; failures++) {
        struct model *small = NULL;
        rk_alloc_fail_after(failures);
        status = model_open_bytes(writer.bytes, writer.count, "test.gguf", &small, NULL);
        rk_alloc_fail_after(-1);
        assert_true(status == RK_OK || status == RK_ERR_NO_MEMORY);
        assert_int_equal(small != NULL, status == RK_OK);
        model_close(small);
    }
    assert_true(failures > 6);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hyper_parameters),
        cmocka_unit_test(vocabulary),
        cmocka_unit_test(all_weights_are_those_of_gguf_py),
        cmocka_unit_test(rows_element_by_element),
        cmocka_unit_test(reading_by_kind_finds_the_right_tensor),
        cmocka_unit_test(fingerprint_names_the_model),
        cmocka_unit_test(every_type_opens),
        cmocka_unit_test(fingerprint_follows_each_byte),
        cmocka_unit_test(variants_are_refused),
        cmocka_unit_test(wrong_shapes_and_keys_are_refused),
        cmocka_unit_test(weights_that_are_no_numbers_are_refused),
        cmocka_unit_test(vocabularies_that_cannot_work_are_refused),
        cmocka_unit_test(numbers_out_of_range),
        cmocka_unit_test(other_than_files_are_refused),
        cmocka_unit_test(opening_survives_each_failed_allocation),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
