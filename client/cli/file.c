/* Output files: whole under their name, or not there. */
#include "client/cli/cli_internal.h"
#include "common/base/alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct cli_file {
    FILE *file;
    char *path;      /* a link's target, should it be one */
    char *temporary; /* beside it; NULL: a device or pipe, written to as it is */
};

static enum rk_status failed(const struct cli_file *file, const char *what, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_INVALID, "%s: cannot %s it: %s", file->path, what,
                        strerror(errno));
}

/* Mode of what is replaced, else of what is new here. */
static mode_t mode_for(const struct stat *info)
{
    if (info) {
        return info->st_mode & 07777;
    }
    mode_t mask = umask(0);
    (void)umask(mask);
    return 0666 & ~mask;
}

static enum rk_status open_temporary(struct cli_file *file, const struct stat *info,
                                     struct rk_error *error)
{
    file->temporary = rk_alloc_format("%s.XXXXXX", file->path);
    if (!file->temporary) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", file->path);
    }
    int fd = mkostemp(file->temporary, O_CLOEXEC);
    if (fd < 0) {
        rk_free(file->temporary);
        file->temporary = NULL;
        return failed(file, "create", error);
    }
    cli_rubbish(file->temporary);
    file->file = fdopen(fd, "wb");
    if (!file->file || fchmod(fd, mode_for(info)) != 0) {
        enum rk_status status = failed(file, "create", error);
        if (!file->file) {
            (void)close(fd);
        }
        return status;
    }
    return RK_OK;
}

enum rk_status cli_file_create(const char *path, struct cli_file **ret_file, struct rk_error *error)
{
    struct stat info;
    bool there = stat(path, &info) == 0;
    struct cli_file *file = rk_alloc_zero(1, sizeof(*file));
    char *real = there ? realpath(path, NULL) : NULL;
    enum rk_status status = RK_OK;
    if (file) {
        file->path = rk_alloc_string(real ? real : path);
    }
    free(real); /* Of libc. */
    if (!file || !file->path) {
        rk_free(file);
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    if (there && S_ISDIR(info.st_mode)) {
        errno = EISDIR;
        status = failed(file, "write", error);
    } else if (there && !S_ISREG(info.st_mode)) {
        file->file = fopen(file->path, "wbe");
        status = file->file ? RK_OK : failed(file, "open", error);
    } else {
        status = open_temporary(file, there ? &info : NULL, error);
    }
    if (status != RK_OK) {
        cli_file_abort(file);
        return status;
    }
    *ret_file = file;
    return RK_OK;
}

enum rk_status cli_file_write(struct cli_file *file, const void *data, size_t bytes,
                              struct rk_error *error)
{
    return fwrite(data, 1, bytes, file->file) == bytes ? RK_OK : failed(file, "write", error);
}

enum rk_status cli_file_commit(struct cli_file *file, struct rk_error *error)
{
    enum rk_status status = fflush(file->file) == 0 ? RK_OK : failed(file, "write", error);
    int rc = fclose(file->file);
    file->file = NULL;
    if (rc != 0 && status == RK_OK) {
        status = failed(file, "write", error);
    }
    if (status == RK_OK && file->temporary) {
        if (rename(file->temporary, file->path) != 0) {
            status = failed(file, "name", error);
        } else {
            cli_rubbish(NULL);
            rk_free(file->temporary);
            file->temporary = NULL;
        }
    }
    cli_file_abort(file);
    return status;
}

void cli_file_abort(struct cli_file *file)
{
    if (!file) {
        return;
    }
    if (file->file) {
        (void)fclose(file->file);
    }
    if (file->temporary) {
        (void)unlink(file->temporary);
        cli_rubbish(NULL);
    }
    rk_free(file->temporary);
    rk_free(file->path);
    rk_free(file);
}
