/*
 * Goal:   a dump is a safetensors file, complete or absent.
 * Method: write two matrices, read the bytes back by the format's definition
 *         (length, JSON header, data at offsets); then stop half-way, write too
 *         much and too little, and look for leftovers.
 */
#include "client/cli/eval.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static char path[] = "/tmp/redknot-safetensors-XXXXXX";
static char partial[sizeof(path) + 16];
static const struct safetensors_entry entries[] = {{"0.full", 2, 3}, {"0.level", 1, 3}};

static int make_path(void **state)
{
    (void)state;
    int fd = mkstemp(path);
    if (fd < 0) {
        return -1;
    }
    (void)close(fd);
    (void)snprintf(partial, sizeof(partial), "%s.partial", path);
    return unlink(path);
}

/* The file takes its name by a rename: a device would be gone. */
static void devices_are_spared(void **state)
{
    (void)state;
    struct safetensors *writer = NULL;
    struct rk_error error = {.status = RK_OK};
    assert_int_equal(safetensors_create("/dev/null", entries, 2, &writer, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "/dev/null: it is there, and no regular file"));
    assert_int_not_equal(access("/dev/null.partial", F_OK), 0);
}

static void reads_back(void **state)
{
    (void)state;
    const float full[] = {1, 2, 3, 4, 5, 6};
    const float level[] = {7, 8, 9};
    struct safetensors *writer = NULL;
    struct rk_error error = {.status = RK_OK};
    assert_int_equal(safetensors_create(path, entries, 2, &writer, &error), RK_OK);
    assert_int_equal(safetensors_write(writer, full, 6, &error), RK_OK);
    assert_int_not_equal(access(path, F_OK), 0);
    assert_int_equal(safetensors_write(writer, level, 3, &error), RK_OK);
    assert_int_equal(safetensors_finish(writer, &error), RK_OK);
    safetensors_destroy(writer);

    unsigned char bytes[1024];
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    size_t count = fread(bytes, 1, sizeof(bytes), file);
    assert_int_equal(fclose(file), 0);
    uint64_t header_bytes = 0;
    memcpy(&header_bytes, bytes, 8);
    assert_int_equal(header_bytes % 8, 0);
    assert_int_equal(count, 8 + header_bytes + 9 * sizeof(float));
    json_t *header = json_loadb((const char *)bytes + 8, header_bytes, 0, NULL);
    assert_non_null(header);
    const char *dtype = NULL;
    int rows = 0;
    int columns = 0;
    int begin = 0;
    int end = 0;
    assert_int_equal(json_unpack(header, "{s:{s:s, s:[i, i], s:[i, i]}}", "0.level", "dtype",
                                 &dtype, "shape", &rows, &columns, "data_offsets", &begin, &end),
                     0);
    assert_string_equal(dtype, "F32");
    assert_int_equal(rows, 1);
    assert_int_equal(columns, 3);
    assert_int_equal(end - begin, sizeof(level));
    assert_memory_equal(bytes + 8 + header_bytes + begin, level, sizeof(level));
    json_decref(header);
    assert_int_equal(unlink(path), 0);
}

static void leaves_nothing_half_written(void **state)
{
    (void)state;
    const float values[10] = {0};
    struct safetensors *writer = NULL;
    struct rk_error error = {.status = RK_OK};
    assert_int_equal(safetensors_create(path, entries, 2, &writer, &error), RK_OK);
    assert_int_equal(access(partial, F_OK), 0);
    assert_int_equal(safetensors_write(writer, values, 10, &error), RK_ERR_INTERNAL);
    assert_int_equal(safetensors_write(writer, values, 8, &error), RK_OK);
    assert_int_equal(safetensors_finish(writer, &error), RK_ERR_INTERNAL);
    safetensors_destroy(writer);
    assert_int_not_equal(access(path, F_OK), 0);
    assert_int_not_equal(access(partial, F_OK), 0);
    assert_int_equal(safetensors_create("/nonexistent/x", entries, 2, &writer, &error), RK_ERR_IO);
    assert_non_null(strstr(error.text, "/nonexistent/x"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(devices_are_spared),
                                       cmocka_unit_test(reads_back),
                                       cmocka_unit_test(leaves_nothing_half_written)};
    return cmocka_run_group_tests(tests, make_path, NULL);
}
