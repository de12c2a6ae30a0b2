/* A cluster's folder: walked from the root, so that no other user chooses where it leads. */
#include "client/cli/cluster_internal.h"
#include "common/base/alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LINKS_MAX      40 /* as the kernel */
#define FILE_BYTES_MAX (4u << 20)
#define FDS_FIRST      3 /* A closed standard stream must not become the folder. */

/*
 * Where a name in a folder leads is decided by who may write there. So each part must belong to
 * us, to root or to whoever owns the root folder, and nobody else may write into it, unless it is
 * sticky (/tmp): then only the owner of a name can exchange it, and that name is checked in turn.
 */
struct walk {
    unsigned flags;
    uid_t owner_of_root;
    int fd; /* where we are */
    int num_links;
    struct stat above;       /* of the folder before the last */
    struct stat info;        /* of the one where we are */
    char done[PATH_MAX];     /* its path, for messages */
    char rest[2 * PATH_MAX]; /* still to walk */
};

static enum rk_status refuse(const char *path, const char *why, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_IO, "%.300s %s; choose another folder with --dir", path, why);
}

static enum rk_status refuse_owner(const char *path, uid_t owner, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_IO,
                        "%.300s belongs to user %u, who could choose where it leads; have it "
                        "removed, or choose another folder with --dir",
                        path, (unsigned)owner);
}

static bool trusted(const struct walk *walk, uid_t owner)
{
    return owner == geteuid() || owner == 0 || owner == walk->owner_of_root;
}

/* A group of one's own, as many systems give each user, is nobody else. */
static bool others_may_write(const struct stat *info)
{
    bool own_group = info->st_gid == getegid() && getegid() == (gid_t)geteuid();
    return (info->st_mode & (own_group ? S_IWOTH : S_IWOTH | S_IWGRP)) != 0;
}

static enum rk_status enter(struct walk *walk, int fd, const char *path, struct rk_error *error)
{
    struct stat info;
    if (fstat(fd, &info) != 0) {
        return refuse(path, strerror(errno), error);
    }
    if (!S_ISDIR(info.st_mode)) {
        return refuse(path, "is no folder", error);
    }
    if (!trusted(walk, info.st_uid)) {
        return refuse_owner(path, info.st_uid, error);
    }
    if (others_may_write(&info) && !(info.st_mode & S_ISVTX)) {
        return refuse(path, "may be written by other users (chmod go-w mends that)", error);
    }
    walk->above = walk->info;
    walk->info = info;
    (void)snprintf(walk->done, sizeof(walk->done), "%s", path);
    if (walk->fd >= 0) {
        (void)close(walk->fd);
    }
    walk->fd = fd;
    return RK_OK;
}

static enum rk_status enter_root(struct walk *walk, struct rk_error *error)
{
    int fd = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0) {
        return refuse("/", strerror(errno), error);
    }
    walk->owner_of_root = info.st_uid;
    enum rk_status status = enter(walk, fd, "/", error);
    if (status != RK_OK) {
        (void)close(fd);
    }
    return status;
}

static enum rk_status follow(struct walk *walk, int fd, const char *path, struct rk_error *error)
{
    char target[PATH_MAX];
    char rest[sizeof(walk->rest)];
    struct stat info;
    ssize_t bytes = fstat(fd, &info) == 0 ? readlinkat(fd, "", target, sizeof(target) - 1) : -1;
    if (bytes < 0) {
        return refuse(path, strerror(errno), error);
    }
    if (!trusted(walk, info.st_uid)) {
        return refuse_owner(path, info.st_uid, error);
    }
    target[bytes] = 0;
    int length = snprintf(rest, sizeof(rest), "%s/%s", target, walk->rest);
    if (++walk->num_links > LINKS_MAX || length < 0 || (size_t)length >= sizeof(rest)) {
        return refuse(path, "is a link that leads too far", error);
    }
    memcpy(walk->rest, rest, (size_t)length + 1);
    return target[0] == '/' ? enter_root(walk, error) : RK_OK;
}

static enum rk_status step(struct walk *walk, const char *name, struct rk_error *error)
{
    char path[PATH_MAX + NAME_MAX + 2];
    (void)snprintf(path, sizeof(path), "%s/%s", walk->done[1] ? walk->done : "", name);
    if (strcmp(name, "..") == 0) {
        (void)snprintf(path, sizeof(path), "%s", walk->done);
        *(strrchr(path, '/') == path ? path + 1 : strrchr(path, '/')) = 0;
    }
    int fd = openat(walk->fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT && (walk->flags & FOLDER_CREATE)) {
        if (mkdirat(walk->fd, name, 0700) != 0 && errno != EEXIST) {
            return refuse(path, strerror(errno), error);
        }
        fd = openat(walk->fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    }
    if (fd < 0 && errno == ENOENT) {
        return rk_error_set(error, RK_ERR_NOT_FOUND, "%.300s: no such folder", path);
    }
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0 || strlen(path) >= PATH_MAX) {
        enum rk_status status = refuse(path, fd < 0 ? strerror(errno) : "is too long", error);
        if (fd >= 0) {
            (void)close(fd);
        }
        return status;
    }
    bool is_link = S_ISLNK(info.st_mode);
    enum rk_status status = is_link ? follow(walk, fd, path, error) : enter(walk, fd, path, error);
    if (is_link || status != RK_OK) {
        (void)close(fd);
    }
    return status;
}

static enum rk_status walk_all(struct walk *walk, struct rk_error *error)
{
    enum rk_status status = enter_root(walk, error);
    while (status == RK_OK) {
        char name[NAME_MAX + 1];
        const char *from = walk->rest + strspn(walk->rest, "/");
        size_t length = strcspn(from, "/");
        if (length == 0) {
            return RK_OK;
        }
        if (length > NAME_MAX) {
            return refuse(walk->rest, "is too long", error);
        }
        memcpy(name, from, length);
        name[length] = 0;
        memmove(walk->rest, from + length, strlen(from + length) + 1);
        if (strcmp(name, ".") != 0) {
            status = step(walk, name, error);
        }
    }
    return status;
}

/* What we read our orders from, and write to, is ours alone. */
static enum rk_status check_last(const struct walk *walk, struct rk_error *error)
{
    bool is_private = (walk->flags & FOLDER_PRIVATE) != 0;
    if (walk->info.st_uid != geteuid()) {
        return refuse_owner(walk->done, walk->info.st_uid, error);
    }
    if (others_may_write(&walk->info)) {
        return refuse(walk->done, "may be written by other users (chmod go-w mends that)", error);
    }
    if (is_private && (walk->above.st_uid != geteuid() ||
                       ((walk->above.st_mode | walk->info.st_mode) & 077) != 0)) {
        return refuse(walk->done,
                      "and the folder that it is in must be yours alone (chmod 700 on both)",
                      error);
    }
    return RK_OK;
}

enum rk_status folder_open(const char *path, unsigned flags, char ret_path[PATH_MAX], int *ret_fd,
                           struct rk_error *error)
{
    struct walk *walk = rk_alloc_zero(1, sizeof(*walk));
    if (!walk) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    walk->fd = -1;
    walk->flags = flags;
    enum rk_status status = RK_OK;
    char here[PATH_MAX] = "";
    if (path[0] != '/' && !getcwd(here, sizeof(here))) {
        status = refuse(path, strerror(errno), error);
    }
    if (snprintf(walk->rest, sizeof(walk->rest), "%s/%s", here, path) >= (int)sizeof(walk->rest)) {
        status = refuse(path, "is too long", error);
    }
    if (status == RK_OK) {
        status = walk_all(walk, error);
    }
    if (status == RK_OK) {
        status = check_last(walk, error);
    }
    int fd = status == RK_OK ? openat(walk->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        *ret_fd = fcntl(fd, F_DUPFD_CLOEXEC, FDS_FIRST);
        (void)close(fd);
        memcpy(ret_path, walk->done, sizeof(walk->done));
    }
    if (status == RK_OK && (fd < 0 || *ret_fd < 0)) {
        status = refuse(walk->done, strerror(errno), error);
    }
    if (walk->fd >= 0) {
        (void)close(walk->fd);
    }
    rk_free(walk);
    return status;
}

/* ---- What lies in it ---- */

enum rk_status folder_make(int fd, const char *name, struct rk_error *error)
{
    struct stat info;
    if (mkdirat(fd, name, 0700) != 0 && errno != EEXIST) {
        return refuse(name, strerror(errno), error);
    }
    if (fstatat(fd, name, &info, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISDIR(info.st_mode) ||
        info.st_uid != geteuid() || others_may_write(&info)) {
        return refuse(name, "in the cluster's folder is no folder of yours alone", error);
    }
    return RK_OK;
}

static enum rk_status read_file(int fd, const char *name, char **ret_text, struct rk_error *error)
{
    struct stat info;
    if (fstat(fd, &info) != 0) {
        return refuse(name, strerror(errno), error);
    }
    if (!S_ISREG(info.st_mode) || info.st_uid != geteuid() || others_may_write(&info)) {
        return refuse(name, "is no file that only you may write", error);
    }
    if (info.st_size > (off_t)FILE_BYTES_MAX) {
        return rk_error_set(error, RK_ERR_CORRUPT, "it is larger than %u MiB",
                            FILE_BYTES_MAX >> 20);
    }
    char *text = rk_alloc_zero(1, (size_t)info.st_size + 1);
    if (!text) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    ssize_t bytes = pread(fd, text, (size_t)info.st_size, 0);
    text[bytes > 0 ? bytes : 0] = 0;
    *ret_text = text;
    return RK_OK;
}

enum rk_status folder_read(int fd, const char *name, char **ret_text, struct rk_error *error)
{
    int file = openat(fd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) {
        return errno == ENOENT
                   ? rk_error_set(error, RK_ERR_NOT_FOUND, "%s: no such file", name)
                   : refuse(name, errno == ELOOP ? "is a link" : strerror(errno), error);
    }
    enum rk_status status = read_file(file, name, ret_text, error);
    (void)close(file);
    return status;
}

enum rk_status folder_write(int fd, const char *name, const char *text, struct rk_error *error)
{
    char temporary[NAME_MAX + 8];
    size_t bytes = strlen(text);
    (void)snprintf(temporary, sizeof(temporary), "%s.new", name);
    (void)unlinkat(fd, temporary, 0);
    int file = openat(fd, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    bool written = file >= 0 && write(file, text, bytes) == (ssize_t)bytes;
    if (file >= 0) {
        written = close(file) == 0 && written;
    }
    if (!written || renameat(fd, temporary, fd, name) != 0) {
        return rk_error_set(error, RK_ERR_IO, "%s: cannot write it: %s", name, strerror(errno));
    }
    return RK_OK;
}
