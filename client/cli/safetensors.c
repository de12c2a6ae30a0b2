#include "client/cli/cli_internal.h"
#include "client/cli/eval.h"
#include "common/base/alloc.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors are little endian");

struct safetensors {
    char *path;
    char *partial;
    FILE *file;
    uint64_t values_left;
};

/* The format's header: JSON, padded with spaces so that the data begins at a multiple of 8. */
static char *make_header(const struct safetensors_entry *entries, size_t count, size_t *ret_bytes,
                         uint64_t *ret_values)
{
    json_t *object = json_object();
    uint64_t offset = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t end = offset + entries[i].rows * entries[i].columns * sizeof(float);
        json_t *entry = json_pack("{s:s, s:[I, I], s:[I, I]}", "dtype", "F32", "shape",
                                  (json_int_t)entries[i].rows, (json_int_t)entries[i].columns,
                                  "data_offsets", (json_int_t)offset, (json_int_t)end);
        (void)json_object_set_new(object, entries[i].name, entry);
        offset = end;
    }
    char *text = json_dumps(object, JSON_COMPACT);
    json_decref(object);
    if (!text) {
        return NULL;
    }
    size_t bytes = strlen(text);
    size_t padded = (bytes + 7) / 8 * 8;
    char *header = rk_alloc(padded);
    if (header) {
        memset(header, ' ', padded);
        memcpy(header, text, bytes);
        *ret_bytes = padded;
        *ret_values = offset / sizeof(float);
    }
    free(text); /* Of jansson. */
    return header;
}

static enum rk_status failed(const struct safetensors *writer, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_IO,
                        "%s: cannot write it on this machine: %s; make room, or name another file",
                        writer->partial, strerror(errno));
}

/* The file takes its name by a rename, which would put it in the place of a device or a pipe. */
static enum rk_status check_path(const char *path, struct rk_error *error)
{
    struct stat info;
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode)) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: it is there, and no regular file", path);
    }
    return RK_OK;
}

enum rk_status safetensors_create(const char *path, const struct safetensors_entry *entries,
                                  size_t count, struct safetensors **ret_writer,
                                  struct rk_error *error)
{
    struct safetensors *writer = NULL;
    size_t bytes = 0;
    enum rk_status status = check_path(path, error);
    if (status != RK_OK) {
        return status;
    }
    writer = rk_alloc_zero(1, sizeof(*writer));
    status = RK_ERR_NO_MEMORY;
    char *header = NULL;
    if (writer) {
        header = make_header(entries, count, &bytes, &writer->values_left);
        writer->path = rk_alloc_string(path);
        writer->partial = rk_alloc_format("%s.partial", path);
    }
    if (!writer || !header || !writer->path || !writer->partial) {
        (void)rk_error_set(error, status, "%s: out of memory", path);
        goto fail;
    }
    cli_rubbish(writer->partial);
    writer->file = fopen(writer->partial, "wbe");
    uint64_t length = bytes;
    if (!writer->file || fwrite(&length, sizeof(length), 1, writer->file) != 1 ||
        fwrite(header, 1, bytes, writer->file) != bytes) {
        status = failed(writer, error);
        goto fail;
    }
    rk_free(header);
    *ret_writer = writer;
    return RK_OK;

fail:
    rk_free(header);
    safetensors_destroy(writer);
    return status;
}

enum rk_status safetensors_write(struct safetensors *writer, const float *values, size_t count,
                                 struct rk_error *error)
{
    if (count > writer->values_left) {
        return rk_error_set(error, RK_ERR_INTERNAL, "%s: more values than announced", writer->path);
    }
    if (fwrite(values, sizeof(float), count, writer->file) != count) {
        return failed(writer, error);
    }
    writer->values_left -= count;
    return RK_OK;
}

enum rk_status safetensors_finish(struct safetensors *writer, struct rk_error *error)
{
    if (writer->values_left > 0) {
        return rk_error_set(error, RK_ERR_INTERNAL, "%s: fewer values than announced",
                            writer->path);
    }
    int rc = fflush(writer->file);
    if (rc == 0) {
        rc = fsync(fileno(writer->file));
    }
    if (rc != 0 || rename(writer->partial, writer->path) != 0) {
        return failed(writer, error);
    }
    cli_rubbish(NULL);
    (void)fclose(writer->file);
    writer->file = NULL;
    return RK_OK;
}

void safetensors_destroy(struct safetensors *writer)
{
    if (!writer) {
        return;
    }
    if (writer->file) {
        RK_ASSERT(writer->partial != NULL);
        (void)fclose(writer->file);
        (void)unlink(writer->partial);
        cli_rubbish(NULL);
    }
    rk_free(writer->path);
    rk_free(writer->partial);
    rk_free(writer);
}
