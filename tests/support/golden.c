#include "tests/support/golden.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct golden {
    char path[1024];
    uint8_t *mapping;
    size_t bytes;
    json_t *header;
    size_t data_begin;
};

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    (void)fputs("golden data: ", stderr);
    (void)vfprintf(stderr, format, args);
    (void)fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static void path_of(const char *name, char path[1024])
{
    if (snprintf(path, 1024, "%s/tests/golden/%s", REDKNOT_SOURCE_DIR, name) >= 1024) {
        fail("%s: the path is too long", name);
    }
}

struct golden *golden_open(const char *name)
{
    struct golden *golden = calloc(1, sizeof(*golden));
    struct stat status;
    uint64_t header_bytes = 0;
    json_error_t error;
    if (!golden) {
        fail("no memory");
    }
    path_of(name, golden->path);
    int fd = open(golden->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) != 0 || status.st_size < 8) {
        fail("%s: missing or too short", golden->path);
    }
    golden->bytes = (size_t)status.st_size;
    golden->mapping = mmap(NULL, golden->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    (void)close(fd);
    if (golden->mapping == MAP_FAILED) {
        fail("%s: cannot be mapped", golden->path);
    }
    memcpy(&header_bytes, golden->mapping, sizeof(header_bytes));
    if (header_bytes > golden->bytes - 8) {
        fail("%s: the header is longer than the file", golden->path);
    }
    golden->data_begin = 8 + (size_t)header_bytes;
    golden->header = json_loadb((const char *)golden->mapping + 8, header_bytes, 0, &error);
    if (!json_is_object(golden->header)) {
        fail("%s: the header is not JSON: %s", golden->path, error.text);
    }
    return golden;
}

void golden_close(struct golden *golden)
{
    if (golden) {
        json_decref(golden->header);
        (void)munmap(golden->mapping, golden->bytes);
        free(golden);
    }
}

bool golden_has(const struct golden *golden, const char *tensor)
{
    return json_object_get(golden->header, tensor) != NULL;
}

static size_t element_bytes(const char *dtype)
{
    static const struct {
        const char *dtype;
        size_t bytes;
    } types[] = {{"F32", 4}, {"I32", 4},  {"F16", 2}, {"BF16", 2}, {"F64", 8},
                 {"I64", 8}, {"BOOL", 1}, {"U8", 1},  {"I8", 1},   {"I16", 2}};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        if (strcmp(dtype, types[i].dtype) == 0) {
            return types[i].bytes;
        }
    }
    return 0;
}

struct golden_tensor golden_tensor(const struct golden *golden, const char *name)
{
    struct golden_tensor tensor = {.elements = 1};
    const json_t *entry = json_object_get(golden->header, name);
    if (!entry) {
        fail("%s: no tensor %s", golden->path, name);
    }
    const char *dtype = json_string_value(golden_member(entry, "dtype"));
    const json_t *shape = golden_member(entry, "shape");
    const json_t *offsets = golden_member(entry, "data_offsets");
    size_t each = dtype ? element_bytes(dtype) : 0;
    tensor.num_dims = (uint32_t)json_array_size(shape);
    if (each == 0 || tensor.num_dims > 8) {
        fail("%s: tensor %s has an unknown type or too many dimensions", golden->path, name);
    }
    (void)snprintf(tensor.dtype, sizeof(tensor.dtype), "%s", dtype);
    for (uint32_t i = 0; i < tensor.num_dims; i++) {
        tensor.dims[i] = (uint64_t)json_integer_value(json_array_get(shape, i));
        if (__builtin_mul_overflow(tensor.elements, tensor.dims[i], &tensor.elements)) {
            fail("%s: tensor %s is too large", golden->path, name);
        }
    }
    uint64_t begin = (uint64_t)json_integer_value(json_array_get(offsets, 0));
    uint64_t end = (uint64_t)json_integer_value(json_array_get(offsets, 1));
    if (begin > end || end > golden->bytes - golden->data_begin ||
        tensor.elements != (end - begin) / each || (golden->data_begin + begin) % each != 0) {
        fail("%s: tensor %s does not fit its place", golden->path, name);
    }
    tensor.data = golden->mapping + golden->data_begin + begin;
    tensor.bytes = end - begin;
    return tensor;
}

static const void *typed(const struct golden *golden, const char *name, const char *dtype,
                         uint64_t elements)
{
    struct golden_tensor tensor = golden_tensor(golden, name);
    if (strcmp(tensor.dtype, dtype) != 0 || (elements != 0 && tensor.elements != elements)) {
        fail("%s: tensor %s has %llu elements of %s; the test wants %llu of %s", golden->path, name,
             (unsigned long long)tensor.elements, tensor.dtype, (unsigned long long)elements,
             dtype);
    }
    return tensor.data;
}

const float *golden_f32(const struct golden *golden, const char *tensor, uint64_t elements)
{
    return typed(golden, tensor, "F32", elements);
}

const int32_t *golden_i32(const struct golden *golden, const char *tensor, uint64_t elements)
{
    return typed(golden, tensor, "I32", elements);
}

json_t *golden_json(const char *name)
{
    char path[1024];
    json_error_t error;
    path_of(name, path);
    /* Texts hold NUL bytes: allowed here, and read from their hex form. */
    json_t *json = json_load_file(path, JSON_ALLOW_NUL, &error);
    if (!json) {
        fail("%s: %s (line %d)", path, error.text, error.line);
    }
    return json;
}

json_t *golden_member(const json_t *object, const char *key)
{
    json_t *member = json_object_get(object, key);
    if (!member) {
        fail("no member %s", key);
    }
    return member;
}

int32_t *golden_ids(const json_t *array, size_t *ret_count)
{
    size_t count = json_array_size(array);
    int32_t *ids = calloc(count + 1, sizeof(*ids));
    if (!ids || !json_is_array(array)) {
        fail("not a list of ids");
    }
    for (size_t i = 0; i < count; i++) {
        ids[i] = (int32_t)json_integer_value(json_array_get(array, i));
    }
    *ret_count = count;
    return ids;
}

char *golden_hex(const json_t *string, size_t *ret_bytes)
{
    const char *hex = json_string_value(string);
    size_t bytes = json_string_length(string) / 2;
    char *out = calloc(bytes + 1, 1);
    if (!hex || !out) {
        fail("not a hex string");
    }
    for (size_t i = 0; i < bytes; i++) {
        char digits[3] = {hex[2 * i], hex[2 * i + 1], '\0'};
        char *end = NULL;
        out[i] = (char)strtoul(digits, &end, 16);
        if (*end != '\0') {
            fail("not a hex string");
        }
    }
    *ret_bytes = bytes;
    return out;
}

const char *golden_model_path(void)
{
    static char path[1024];
    const char *model = getenv("REDKNOT_MODEL");
    const char *cache = getenv("REDKNOT_CACHE");
    const char *home = getenv("HOME");
    if (model && *model) {
        (void)snprintf(path, sizeof(path), "%s", model);
    } else {
        (void)snprintf(path, sizeof(path), "%s%s/models/SmolLM2-135M-Instruct.Q4_1.gguf",
                       cache && *cache ? cache : (home ? home : ""),
                       cache && *cache ? "" : "/.cache/redknot");
    }
    if (access(path, R_OK) != 0) {
        fail("the model file %s is missing; run make setup", path);
    }
    return path;
}
