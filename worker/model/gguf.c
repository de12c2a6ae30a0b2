#include "worker/model/gguf_internal.h"

#include "common/base/alloc.h"
#include "worker/model/dequant_internal.h"

#include <stdlib.h>
#include <string.h>

struct reader {
    const uint8_t *data;
    uint64_t bytes;
    uint64_t position; /* never above bytes */
    const char *file;
    struct rk_error *error;
};

static enum rk_status truncated(const struct reader *reader, const char *what)
{
    return rk_error_set(reader->error, RK_ERR_CORRUPT,
                        "%s: byte %llu: the file ends inside %s; download it again", reader->file,
                        (unsigned long long)reader->position, what);
}

static enum rk_status refuse(const struct reader *reader, enum rk_status status, uint64_t offset,
                             const char *reason)
{
    return rk_error_set(reader->error, status, "%s: byte %llu: %s", reader->file,
                        (unsigned long long)offset, reason);
}

static uint64_t left(const struct reader *reader)
{
    return reader->bytes - reader->position;
}

static enum rk_status read_bytes(struct reader *reader, void *ret_value, size_t bytes,
                                 const char *what)
{
    if (left(reader) < bytes) {
        return truncated(reader, what);
    }
    memcpy(ret_value, reader->data + reader->position, bytes);
    reader->position += bytes;
    return RK_OK;
}

static enum rk_status read_string(struct reader *reader, struct model_string *ret_string,
                                  const char *what)
{
    uint64_t bytes = 0;
    enum rk_status status = read_bytes(reader, &bytes, sizeof(bytes), what);
    if (status != RK_OK) {
        return status;
    }
    if (bytes > left(reader)) {
        return truncated(reader, what);
    }
    ret_string->data = (const char *)reader->data + reader->position;
    ret_string->bytes = (size_t)bytes;
    reader->position += bytes;
    return RK_OK;
}

static enum rk_status read_name(struct reader *reader, struct model_string *ret_name,
                                const char *what)
{
    uint64_t offset = reader->position;
    enum rk_status status = read_string(reader, ret_name, what);
    if (status != RK_OK) {
        return status;
    }
    if (ret_name->bytes == 0 || ret_name->bytes > GGUF_NAME_MAX) {
        return refuse(reader, RK_ERR_CORRUPT, offset, "a name is empty or longer than 1024 bytes");
    }
    return RK_OK;
}

/* 0: not a type of fixed size. */
static size_t scalar_bytes(uint32_t type)
{
    static const uint8_t bytes[] = {
        [GGUF_U8] = 1,  [GGUF_I8] = 1,  [GGUF_U16] = 2, [GGUF_I16] = 2,
        [GGUF_U32] = 4, [GGUF_I32] = 4, [GGUF_F32] = 4, [GGUF_BOOL] = 1,
        [GGUF_U64] = 8, [GGUF_I64] = 8, [GGUF_F64] = 8,
    };
    return type < sizeof(bytes) ? bytes[type] : 0;
}

static enum rk_status read_array(struct reader *reader, struct gguf_key *key)
{
    uint64_t offset = reader->position;
    enum rk_status status = read_bytes(reader, &key->element_type, 4, "an array's type");
    if (status == RK_OK) {
        status = read_bytes(reader, &key->count, 8, "an array's length");
    }
    if (status != RK_OK) {
        return status;
    }
    key->data = reader->data + reader->position;
    size_t each = scalar_bytes(key->element_type);
    if (each > 0) {
        if (key->count > left(reader) / each) {
            return truncated(reader, "an array");
        }
        reader->position += key->count * each;
        return RK_OK;
    }
    if (key->element_type == GGUF_ARRAY) {
        return refuse(reader, RK_ERR_UNSUPPORTED, offset, "an array of arrays");
    }
    if (key->element_type != GGUF_STRING) {
        return refuse(reader, RK_ERR_UNSUPPORTED, offset, "an array of an unknown type");
    }
    /* Each string takes at least its length: a count that cannot be true costs no loop. */
    if (key->count > left(reader) / 8) {
        return truncated(reader, "an array of strings");
    }
    for (uint64_t i = 0; i < key->count; i++) {
        struct model_string string;
        status = read_string(reader, &string, "a string of an array");
        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}

static enum rk_status read_key(struct reader *reader, struct gguf_key *key)
{
    key->offset = reader->position;
    enum rk_status status = read_name(reader, &key->name, "a key");
    if (status == RK_OK) {
        status = read_bytes(reader, &key->type, 4, "the type of a key");
    }
    if (status != RK_OK) {
        return status;
    }
    size_t bytes = scalar_bytes(key->type);
    if (bytes > 0) {
        if (left(reader) < bytes) {
            return truncated(reader, "the value of a key");
        }
        key->count = 1;
        key->data = reader->data + reader->position;
        reader->position += bytes;
        return RK_OK;
    }
    if (key->type == GGUF_STRING) {
        struct model_string string;
        status = read_string(reader, &string, "the string of a key");
        if (status == RK_OK) {
            key->data = (const uint8_t *)string.data;
            key->count = string.bytes;
        }
        return status;
    }
    if (key->type == GGUF_ARRAY) {
        return read_array(reader, key);
    }
    return refuse(reader, RK_ERR_UNSUPPORTED, key->offset, "a key of an unknown type");
}

static enum rk_status tensor_size(const struct reader *reader, struct gguf_tensor *tensor)
{
    const struct dequant *type = dequant_find(tensor->type);
    if (!type) {
        return rk_error_set(reader->error, RK_ERR_UNSUPPORTED,
                            "%s: byte %llu: tensor %s has type %u (%s); supported are F32, F16, "
                            "BF16, Q4_0, Q4_1 and Q8_0",
                            reader->file, (unsigned long long)tensor->offset,
                            gguf_print(tensor->name).text, tensor->type,
                            dequant_type_name(tensor->type));
    }
    tensor->elements = 1;
    for (uint32_t i = 0; i < GGUF_DIMS_MAX; i++) {
        if (tensor->dims[i] == 0 ||
            __builtin_mul_overflow(tensor->elements, tensor->dims[i], &tensor->elements)) {
            return refuse(reader, RK_ERR_CORRUPT, tensor->offset,
                          "a tensor has a dimension of zero or overflows");
        }
    }
    if (tensor->dims[0] % type->block_elements != 0) {
        return refuse(reader, RK_ERR_CORRUPT, tensor->offset,
                      "a tensor's row is not a whole number of blocks");
    }
    if (__builtin_mul_overflow(tensor->elements / type->block_elements, type->block_bytes,
                               &tensor->bytes)) {
        return refuse(reader, RK_ERR_CORRUPT, tensor->offset, "a tensor's size overflows");
    }
    return RK_OK;
}

/* Leaves the offset inside the data part in *ret_data_offset: where that begins is known later. */
static enum rk_status read_tensor(struct reader *reader, struct gguf_tensor *tensor,
                                  uint64_t *ret_data_offset)
{
    tensor->offset = reader->position;
    enum rk_status status = read_name(reader, &tensor->name, "a tensor's name");
    if (status == RK_OK) {
        status = read_bytes(reader, &tensor->num_dims, 4, "a tensor's entry");
    }
    if (status != RK_OK) {
        return status;
    }
    if (tensor->num_dims == 0 || tensor->num_dims > GGUF_DIMS_MAX) {
        return refuse(reader, RK_ERR_CORRUPT, tensor->offset,
                      "a tensor has no dimension or more than 4");
    }
    for (uint32_t i = 0; i < GGUF_DIMS_MAX; i++) {
        tensor->dims[i] = 1;
    }
    status = read_bytes(reader, tensor->dims, (size_t)8 * tensor->num_dims, "a tensor's entry");
    if (status == RK_OK) {
        status = read_bytes(reader, &tensor->type, 4, "a tensor's entry");
    }
    if (status == RK_OK) {
        status = read_bytes(reader, ret_data_offset, 8, "a tensor's entry");
    }
    return status == RK_OK ? tensor_size(reader, tensor) : status;
}

static int compare_strings(struct model_string a, struct model_string b)
{
    int order = memcmp(a.data, b.data, a.bytes < b.bytes ? a.bytes : b.bytes);
    return order ? order : (a.bytes > b.bytes) - (a.bytes < b.bytes);
}

/* Keys and tensors both begin with their name. */
static int compare_names(const void *a, const void *b)
{
    return compare_strings(*(const struct model_string *)a, *(const struct model_string *)b);
}

static enum rk_status read_keys(struct reader *reader, struct gguf *gguf, uint32_t num_keys)
{
    for (; gguf->num_keys < num_keys; gguf->num_keys++) {
        enum rk_status status = read_key(reader, &gguf->keys[gguf->num_keys]);
        if (status != RK_OK) {
            return status;
        }
    }
    qsort(gguf->keys, num_keys, sizeof(*gguf->keys), compare_names);
    for (uint32_t i = 1; i < num_keys; i++) {
        if (compare_names(&gguf->keys[i - 1], &gguf->keys[i]) == 0) {
            return rk_error_set(reader->error, RK_ERR_CORRUPT, "%s: byte %llu: key %s occurs twice",
                                reader->file, (unsigned long long)gguf->keys[i].offset,
                                gguf_print(gguf->keys[i].name).text);
        }
    }
    return RK_OK;
}

static enum rk_status data_begin(struct reader *reader, const struct gguf *gguf,
                                 uint64_t *ret_alignment, uint64_t *ret_begin)
{
    const struct gguf_key *key = gguf_find_key(gguf, "general.alignment");
    int64_t alignment = 32;
    if (key && (!gguf_key_integer(key, &alignment) || alignment < 1 ||
                alignment > GGUF_ALIGNMENT_MAX || (alignment & (alignment - 1)) != 0)) {
        return refuse(reader, RK_ERR_CORRUPT, key->offset,
                      "general.alignment is not a power of two up to 1048576");
    }
    *ret_alignment = (uint64_t)alignment;
    *ret_begin =
        (reader->position + (uint64_t)alignment - 1) / (uint64_t)alignment * (uint64_t)alignment;
    return RK_OK;
}

static enum rk_status place_tensor(const struct reader *reader, struct gguf_tensor *tensor,
                                   uint64_t alignment, uint64_t begin, uint64_t data_offset)
{
    uint64_t first = 0;
    uint64_t end = 0;
    if (data_offset % alignment != 0) {
        return rk_error_set(reader->error, RK_ERR_CORRUPT,
                            "%s: byte %llu: tensor %s is not aligned to %llu bytes", reader->file,
                            (unsigned long long)tensor->offset, gguf_print(tensor->name).text,
                            (unsigned long long)alignment);
    }
    if (__builtin_add_overflow(begin, data_offset, &first) ||
        __builtin_add_overflow(first, tensor->bytes, &end) || end > reader->bytes) {
        return rk_error_set(reader->error, RK_ERR_CORRUPT,
                            "%s: byte %llu: tensor %s (%llu bytes at %llu) lies past the end of "
                            "the file (%llu bytes); download it again",
                            reader->file, (unsigned long long)tensor->offset,
                            gguf_print(tensor->name).text, (unsigned long long)tensor->bytes,
                            (unsigned long long)data_offset, (unsigned long long)reader->bytes);
    }
    tensor->data = reader->data + first;
    return RK_OK;
}

static int compare_places(const void *a, const void *b)
{
    const struct gguf_tensor *left = *(const struct gguf_tensor *const *)a;
    const struct gguf_tensor *right = *(const struct gguf_tensor *const *)b;
    return (left->data > right->data) - (left->data < right->data);
}

/* Each byte belongs to one tensor: two that share some are a damaged directory. */
static enum rk_status check_overlap(const struct reader *reader, const struct gguf *gguf)
{
    enum rk_status status = RK_OK;
    const struct gguf_tensor **order = rk_alloc_zero(gguf->num_tensors, sizeof(*order));
    if (!order) {
        return rk_error_set(reader->error, RK_ERR_NO_MEMORY, "%s: no memory for its directory",
                            reader->file);
    }
    for (uint32_t i = 0; i < gguf->num_tensors; i++) {
        order[i] = &gguf->tensors[i];
    }
    if (gguf->num_tensors > 0) {
        qsort(order, gguf->num_tensors, sizeof(*order), compare_places);
    }
    for (uint32_t i = 1; status == RK_OK && i < gguf->num_tensors; i++) {
        if (order[i - 1]->data + order[i - 1]->bytes > order[i]->data) {
            status =
                rk_error_set(reader->error, RK_ERR_CORRUPT,
                             "%s: byte %llu: tensor %s shares bytes with tensor %s; download "
                             "it again",
                             reader->file, (unsigned long long)order[i]->offset,
                             gguf_print(order[i]->name).text, gguf_print(order[i - 1]->name).text);
        }
    }
    rk_free(order);
    return status;
}

static enum rk_status read_tensors(struct reader *reader, struct gguf *gguf, uint32_t num_tensors,
                                   uint64_t *data_offsets)
{
    for (; gguf->num_tensors < num_tensors; gguf->num_tensors++) {
        enum rk_status status = read_tensor(reader, &gguf->tensors[gguf->num_tensors],
                                            &data_offsets[gguf->num_tensors]);
        if (status != RK_OK) {
            return status;
        }
    }
    uint64_t alignment = 0;
    uint64_t begin = 0;
    enum rk_status status = data_begin(reader, gguf, &alignment, &begin);
    for (uint32_t i = 0; status == RK_OK && i < num_tensors; i++) {
        status = place_tensor(reader, &gguf->tensors[i], alignment, begin, data_offsets[i]);
    }
    if (status == RK_OK) {
        status = check_overlap(reader, gguf);
    }
    if (status != RK_OK) {
        return status;
    }
    qsort(gguf->tensors, num_tensors, sizeof(*gguf->tensors), compare_names);
    for (uint32_t i = 1; i < num_tensors; i++) {
        if (compare_names(&gguf->tensors[i - 1], &gguf->tensors[i]) == 0) {
            return rk_error_set(reader->error, RK_ERR_CORRUPT,
                                "%s: byte %llu: tensor %s occurs twice", reader->file,
                                (unsigned long long)gguf->tensors[i].offset,
                                gguf_print(gguf->tensors[i].name).text);
        }
    }
    return RK_OK;
}

struct counts {
    uint32_t keys;
    uint32_t tensors;
};

static enum rk_status read_header(struct reader *reader, struct gguf *gguf,
                                  struct counts *ret_counts)
{
    uint8_t magic[4];
    uint64_t num_tensors = 0;
    uint64_t num_keys = 0;
    enum rk_status status = read_bytes(reader, magic, sizeof(magic), "the header");
    if (status != RK_OK) {
        return status;
    }
    if (memcmp(magic, "GGUF", 4) != 0) {
        return refuse(reader, RK_ERR_UNSUPPORTED, 0, "not a GGUF file");
    }
    status = read_bytes(reader, &gguf->version, 4, "the header");
    if (status != RK_OK) {
        return status;
    }
    if (gguf->version != 2 && gguf->version != 3) {
        return rk_error_set(reader->error, RK_ERR_UNSUPPORTED,
                            "%s: byte 4: GGUF version %u; supported are 2 and 3, little endian",
                            reader->file, gguf->version);
    }
    status = read_bytes(reader, &num_tensors, 8, "the header");
    if (status == RK_OK) {
        status = read_bytes(reader, &num_keys, 8, "the header");
    }
    if (status != RK_OK) {
        return status;
    }
    if (num_tensors > GGUF_TENSORS_MAX || num_keys > GGUF_KEYS_MAX) {
        return refuse(reader, RK_ERR_CORRUPT, 8, "more than 65536 tensors or keys");
    }
    ret_counts->keys = (uint32_t)num_keys;
    ret_counts->tensors = (uint32_t)num_tensors;
    return RK_OK;
}

enum rk_status gguf_parse(const void *data, uint64_t bytes, const char *file, struct gguf *gguf,
                          struct rk_error *error)
{
    struct reader reader = {.data = data, .bytes = bytes, .file = file, .error = error};
    struct counts counts = {0, 0};
    uint64_t *data_offsets = NULL;

    gguf->file = file;
    gguf->data = data;
    gguf->bytes = bytes;
    enum rk_status status = read_header(&reader, gguf, &counts);
    if (status != RK_OK) {
        return status;
    }
    gguf->keys = rk_alloc_zero(counts.keys, sizeof(*gguf->keys));
    gguf->tensors = rk_alloc_zero(counts.tensors, sizeof(*gguf->tensors));
    data_offsets = rk_alloc_zero(counts.tensors, sizeof(*data_offsets));
    if (!gguf->keys || !gguf->tensors || !data_offsets) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "%s: no memory for its directory", file);
        goto done;
    }
    status = read_keys(&reader, gguf, counts.keys);
    if (status == RK_OK) {
        status = read_tensors(&reader, gguf, counts.tensors, data_offsets);
    }
done:
    rk_free(data_offsets);
    return status;
}

void gguf_clear(struct gguf *gguf)
{
    rk_free(gguf->keys);
    rk_free(gguf->tensors);
    *gguf = (struct gguf){0};
}

static const void *find(const void *entries, uint32_t count, size_t bytes_each, const char *name)
{
    struct model_string key = {name, strlen(name)};
    return count ? bsearch(&key, entries, count, bytes_each, compare_names) : NULL;
}

const struct gguf_key *gguf_find_key(const struct gguf *gguf, const char *name)
{
    return find(gguf->keys, gguf->num_keys, sizeof(*gguf->keys), name);
}

const struct gguf_tensor *gguf_find_tensor(const struct gguf *gguf, const char *name)
{
    return find(gguf->tensors, gguf->num_tensors, sizeof(*gguf->tensors), name);
}

bool gguf_key_integer(const struct gguf_key *key, int64_t *ret_value)
{
    uint64_t bits = 0;
    size_t bytes = scalar_bytes(key->type);
    if (bytes == 0 || key->type == GGUF_F32 || key->type == GGUF_F64 || key->type == GGUF_BOOL) {
        return false;
    }
    memcpy(&bits, key->data, bytes);
    if (key->type == GGUF_U64 && bits > INT64_MAX) {
        return false;
    }
    if (key->type == GGUF_I8 || key->type == GGUF_I16 || key->type == GGUF_I32) {
        int shift = 64 - 8 * (int)bytes;
        *ret_value = (int64_t)(bits << shift) >> shift;
        return true;
    }
    *ret_value = (int64_t)bits;
    return true;
}

bool gguf_key_number(const struct gguf_key *key, double *ret_value)
{
    if (key->type == GGUF_F32) {
        float value;
        memcpy(&value, key->data, sizeof(value));
        *ret_value = (double)value;
        return true;
    }
    if (key->type == GGUF_F64) {
        memcpy(ret_value, key->data, sizeof(*ret_value));
        return true;
    }
    return false;
}

bool gguf_string_equal(struct model_string string, const char *text)
{
    return string.bytes == strlen(text) && memcmp(string.data, text, string.bytes) == 0;
}

struct gguf_print gguf_print(struct model_string string)
{
    struct gguf_print print;
    size_t bytes = string.bytes < GGUF_PRINT_BYTES - 1 ? string.bytes : GGUF_PRINT_BYTES - 1;
    for (size_t i = 0; i < bytes; i++) {
        char c = string.data[i];
        print.text[i] = c >= 0x20 && c < 0x7f ? c : '?';
    }
    print.text[bytes] = '\0';
    return print;
}
