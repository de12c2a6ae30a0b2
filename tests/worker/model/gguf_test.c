/*
 * Goal:   no file, however damaged, is read past its end, takes long or opens by accident, and
 *         each refusal is one line with file, place and reason.
 * Method: a correct small file cut at every byte, and with every byte changed; the header of
 *         SmolLM2 cut at every 1000th byte; one file for each mistake a parser can make. All are
 *         opened from a block of exactly their size, so that ASan sees the first byte too far.
 */
#include "tests/support/golden.h"
#include "tests/worker/model/gguf_writer.h"
#include "worker/model/model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define HEADER_BYTES 1785664 /* of SmolLM2: keys and tensor directory */

/* Each cut copies and parses up to the whole header: sanitizers get fewer of them. */
#ifdef REDKNOT_SANITIZED
#define CUT_STEP 40009
#else
#define CUT_STEP 1000
#endif

static struct gguf_writer writer;

static enum rk_status open_exactly(const uint8_t *bytes, size_t count, struct rk_error *error)
{
    struct model *model = NULL;
    uint8_t *copy = malloc(count ? count : 1);
    assert_non_null(copy);
    memcpy(copy, bytes, count);
    error->text[0] = '\0';
    enum rk_status status = model_open_bytes(copy, count, "test.gguf", &model, error);
    assert_int_equal(model != NULL, status == RK_OK);
    if (status != RK_OK) {
        assert_non_null(strstr(error->text, "test.gguf"));
        assert_null(strchr(error->text, '\n'));
    }
    model_close(model);
    free(copy);
    return status;
}

static void small_file(void)
{
    writer_begin(&writer, 3);
    writer_small_keys(&writer);
    writer_small_tensors(&writer, 3);
    writer_end(&writer);
}

/* What comes before the weights. */
static size_t header_bytes(void)
{
    size_t header = writer.count;
    for (uint64_t i = 0; i < writer.num_tensors; i++) {
        header -= (writer.tensors[i].bytes + 31) / 32 * 32;
    }
    return header;
}

static void expect(enum rk_status wanted, const char *text)
{
    struct rk_error error;
    enum rk_status status = open_exactly(writer.bytes, writer.count, &error);
    if (status != wanted || !strstr(error.text, text)) {
        fail_msg("wanted %s with \"%s\", got %s: %s", rk_status_name(wanted), text,
                 rk_status_name(status), error.text);
    }
}

static void cut_anywhere_it_is_corrupt(void **state)
{
    struct rk_error error;
    (void)state;
    small_file();
    assert_int_equal(open_exactly(writer.bytes, writer.count, &error), RK_OK);
    /* The last tensor ends on a whole alignment: every byte counts. Inside the weights, which
     * are never looked at here, fewer cuts will do. */
    size_t header = header_bytes();
    for (size_t count = 0; count < writer.count; count += count < header ? 1 : 31) {
        assert_int_equal(open_exactly(writer.bytes, count, &error), RK_ERR_CORRUPT);
        assert_non_null(strstr(error.text, "byte "));
    }
}

static void any_changed_byte_is_survived(void **state)
{
    static const uint8_t flips[] = {0x01, 0x80, 0xff};
    struct rk_error error;
    size_t refused = 0;
    (void)state;
    small_file();
    size_t header = header_bytes();
    for (size_t i = 0; i < header; i++) {
        for (size_t j = 0; j < sizeof(flips); j++) {
            writer.bytes[i] ^= flips[j];
            refused += open_exactly(writer.bytes, writer.count, &error) != RK_OK;
            writer.bytes[i] ^= flips[j];
        }
    }
    assert_true(refused > header); /* Names, sizes and types all matter. */
}

static void cut_header_of_smollm2(void **state)
{
    FILE *file = fopen(golden_model_path(), "rb");
    uint8_t *bytes = malloc(HEADER_BYTES);
    struct rk_error error;
    (void)state;
    assert_non_null(file);
    assert_non_null(bytes);
    assert_int_equal(fread(bytes, 1, HEADER_BYTES, file), HEADER_BYTES);
    (void)fclose(file);
    for (size_t count = 0; count < HEADER_BYTES; count += CUT_STEP) {
        assert_int_equal(open_exactly(bytes, count, &error), RK_ERR_CORRUPT);
    }
    /* All of the header, none of the weights. */
    assert_int_equal(open_exactly(bytes, HEADER_BYTES, &error), RK_ERR_CORRUPT);
    assert_non_null(strstr(error.text, "past the end"));
    free(bytes);
}

static void header_mistakes(void **state)
{
    const uint64_t huge[] = {65537, 1u << 31, UINT64_MAX};
    (void)state;
    small_file();
    writer.bytes[0] = 'g';
    expect(RK_ERR_UNSUPPORTED, "not a GGUF file");
    for (uint32_t version = 0; version < 6; version++) {
        small_file();
        memcpy(writer.bytes + 4, &version, 4);
        if (version != 2 && version != 3) {
            expect(RK_ERR_UNSUPPORTED, "GGUF version");
        } else {
            expect(RK_OK, "");
        }
    }
    for (size_t i = 0; i < sizeof(huge) / sizeof(huge[0]); i++) {
        small_file();
        memcpy(writer.bytes + 8, &huge[i], 8);
        expect(RK_ERR_CORRUPT, "more than 65536");
        small_file();
        memcpy(writer.bytes + 16, &huge[i], 8);
        expect(RK_ERR_CORRUPT, "more than 65536");
    }
}

static void begin_array(uint32_t element_type, uint64_t count)
{
    writer_begin(&writer, 3);
    writer_key(&writer, "list", 9);
    writer_put(&writer, &element_type, 4);
    writer_put(&writer, &count, 8);
}

static void key_mistakes(void **state)
{
    static const uint32_t alignments[] = {0, 3, 24, 1u << 21};
    uint64_t huge = UINT64_MAX;
    (void)state;
    for (uint32_t type = 0; type < 13; type++) {
        begin_array(type, UINT64_MAX / 4); /* times the element it would overflow */
        writer_end(&writer);
        expect(type == 9 ? RK_ERR_UNSUPPORTED : RK_ERR_CORRUPT, type == 9 ? "of arrays" : "ends");
    }
    begin_array(77, 1);
    writer_end(&writer);
    expect(RK_ERR_UNSUPPORTED, "unknown type");
    writer_begin(&writer, 3);
    writer_key(&writer, "what", 13);
    writer_end(&writer);
    expect(RK_ERR_UNSUPPORTED, "unknown type");
    writer_begin(&writer, 3);
    writer_key(&writer, "text", 8);
    writer_put(&writer, &huge, 8);
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "ends inside");
    writer_begin(&writer, 3);
    writer_key_u32(&writer, "", 1);
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "empty");
    writer_begin(&writer, 3);
    writer_small_keys(&writer);
    writer_key_u32(&writer, "llama.block_count", 1);
    writer_small_tensors(&writer, 0);
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "llama.block_count occurs twice");
    for (size_t i = 0; i < sizeof(alignments) / sizeof(alignments[0]); i++) {
        writer_begin(&writer, 3);
        writer_small_keys(&writer);
        writer_key_u32(&writer, "general.alignment", alignments[i]);
        writer_small_tensors(&writer, 0);
        writer_end(&writer);
        expect(RK_ERR_CORRUPT, "general.alignment");
    }
}

static void begin_tensors(void)
{
    writer_begin(&writer, 3);
    writer_small_keys(&writer);
    writer_small_tensors(&writer, 0);
}

static void tensor_mistakes(void **state)
{
    (void)state;
    begin_tensors();
    writer.tensors[3].type = 14;
    writer_end(&writer);
    expect(RK_ERR_UNSUPPORTED, "attn_q.weight has type 14 (Q6_K)");
    begin_tensors();
    writer.tensors[3].dims[1] = 0;
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "zero");
    begin_tensors();
    writer.tensors[3].dims[0] = (uint64_t)1 << 40;
    writer.tensors[3].dims[1] = (uint64_t)1 << 40;
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "overflow");
    begin_tensors();
    writer.tensors[3].dims[0] = (uint64_t)1 << 31;
    writer.tensors[3].dims[1] = (uint64_t)1 << 31;
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "overflow");
    begin_tensors();
    writer.tensors[10].dims[1] = 33; /* the last one: past the end */
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "past the end");
    begin_tensors();
    writer.tensors[0].num_dims = 0;
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "no dimension");
    begin_tensors();
    writer.tensors[0].type = 8;
    writer.tensors[0].dims[0] = 33;
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "whole number of blocks");
    begin_tensors();
    memcpy(writer.tensors[5].name, writer.tensors[4].name, sizeof(writer.tensors[4].name));
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "blk.0.attn_k.weight occurs twice");
    begin_tensors();
    writer.tensors[0].bytes = 5 * 32 * 4 - 1;
    writer.tensors[0].name[0] = '\x1b'; /* An escape sequence does not reach the terminal. */
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "token_embd.weight is missing");
}

/* Offsets stand last in an entry; the first entry's follows the keys. */
static void offset_mistakes(void **state)
{
    const uint64_t offsets[] = {1, UINT64_MAX - 31, (uint64_t)1 << 62};
    static const char *const reasons[] = {"not aligned", "past the end", "past the end"};
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        writer_begin(&writer, 3);
        writer_small_keys(&writer);
        size_t entry = writer.count + 8 + strlen("token_embd.weight") + 4 + 16 + 4;
        writer_small_tensors(&writer, 0);
        writer_end(&writer);
        memcpy(writer.bytes + entry, &offsets[i], 8);
        expect(RK_ERR_CORRUPT, reasons[i]);
    }
}

/* The second tensor of a file is said to begin inside the first one. */
static void overlapping_tensors_are_refused(void **state)
{
    (void)state;
    begin_tensors();
    writer.tensors[3].dims[1] = 64; /* one row of blocks more than its bytes */
    writer_end(&writer);
    expect(RK_ERR_CORRUPT, "blk.0.attn_k.weight shares bytes with tensor blk.0.attn_q.weight");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cut_anywhere_it_is_corrupt),
        cmocka_unit_test(any_changed_byte_is_survived),
        cmocka_unit_test(cut_header_of_smollm2),
        cmocka_unit_test(header_mistakes),
        cmocka_unit_test(key_mistakes),
        cmocka_unit_test(tensor_mistakes),
        cmocka_unit_test(offset_mistakes),
        cmocka_unit_test(overlapping_tensors_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
