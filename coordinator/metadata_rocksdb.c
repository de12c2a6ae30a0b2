#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/descriptors.h"
#include "common/base/log.h"
#include "coordinator/metadata.h"

#include <errno.h>
#include <pthread.h>
#include <rocksdb/c.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

/* A few thousand entries, then the table goes to disk: the index is in memory anyway. */
#define METADATA_WRITE_BUFFER_BYTES ((size_t)16 << 20)
#define METADATA_OPEN_FILES_MAX     64
#define METADATA_ROOM_BYTES_MIN     ((uint64_t)4 << 20) /* below it nothing is begun */
#define METADATA_ROOM_BYTES_WRITE                                                                  \
    ((uint64_t)1 << 20) /* below it, and a batch, nothing is written */
#define METADATA_REOPEN_MS      1000
#define METADATA_LOG_FILES_KEPT 3
/* Above all of RocksDB's levels: on a full disk its own log ends the process, as its tables would.
 * What matters in it comes back as the text of an error. */
#define METADATA_LOG_LEVEL_NONE 6

struct metadata {
    pthread_rwlock_t lock; /* db: changed by opening again only */
    bool lock_made;
    pthread_mutex_t write_lock; /* before lock; one writer at a time, and the failure */
    struct rk_error failure;    /* of the write after which none is tried; status RK_OK: none */
    int64_t reopen_ns;          /* not before */
    rocksdb_t *db;              /* NULL: it could not be opened again, not even to read */
    rocksdb_options_t *options;
    rocksdb_readoptions_t *read_options;
    rocksdb_writeoptions_t *write_options;
    rocksdb_writeoptions_t *synced_options;
    char *location;
};

/* RocksDB's C API gives text only; its first words are stable over releases. */
static enum rk_status error_status(const char *text)
{
    if (strstr(text, "No space left") != NULL || strstr(text, "Disk quota") != NULL) {
        return RK_ERR_FULL;
    }
    if (strstr(text, "lock") != NULL || strstr(text, "LOCK") != NULL) {
        return strstr(text, "Permission denied") != NULL ? RK_ERR_IO : RK_ERR_BUSY;
    }
    if (strncmp(text, "Corruption", 10) == 0 || strncmp(text, "Invalid argument", 16) == 0 ||
        strncmp(text, "NotFound", 8) == 0 || strncmp(text, "Not implemented", 15) == 0) {
        return RK_ERR_CORRUPT;
    }
    return RK_ERR_IO;
}

static const char *error_advice(enum rk_status status)
{
    switch (status) {
    case RK_ERR_FULL:
        return "make room on that disk";
    case RK_ERR_BUSY:
        return "stop the other coordinator, or give this one another --data";
    case RK_ERR_CORRUPT:
        return "it is damaged or no database of ours: move it away, store nodes announce what "
               "they hold";
    default:
        return "check the disk and the permissions";
    }
}

/* Takes text, RocksDB's own allocation, and frees it. */
static enum rk_status take_error(char *text, const char *what, const char *location,
                                 struct rk_error *error)
{
    enum rk_status status = error_status(text);

    for (char *c = text; *c != '\0'; c++) {
        if (*c == '\n') {
            *c = ' ';
        }
    }
    (void)rk_error_set(error, status, "cannot %s the metadata database %s: %.300s; %s", what,
                       location, text, error_advice(status));
    rocksdb_free(text);
    return status;
}

static void rocksdb_metadata_close(struct metadata *metadata)
{
    if (metadata == NULL) {
        return;
    }
    if (metadata->db != NULL) {
        rocksdb_close(metadata->db);
    }
    if (metadata->synced_options != NULL) {
        rocksdb_writeoptions_destroy(metadata->synced_options);
    }
    if (metadata->write_options != NULL) {
        rocksdb_writeoptions_destroy(metadata->write_options);
    }
    if (metadata->read_options != NULL) {
        rocksdb_readoptions_destroy(metadata->read_options);
    }
    if (metadata->options != NULL) {
        rocksdb_options_destroy(metadata->options);
    }
    if (metadata->lock_made) {
        (void)pthread_rwlock_destroy(&metadata->lock);
        (void)pthread_mutex_destroy(&metadata->write_lock);
    }
    rk_free(metadata->location);
    rk_free(metadata);
}

/* mkdir -p with mode 0700: it holds the tokens of everybody's documents. */
static enum rk_status make_directory(const char *location, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    char *path = rk_alloc_string(location);
    struct stat info;

    if (path == NULL) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for the path %s", location);
    }
    for (char *c = path + 1; status == RK_OK; c++) {
        char kept = *c;

        if (kept == '/' || kept == '\0') {
            *c = '\0';
            if (mkdir(path, 0700) != 0 && errno != EEXIST) {
                status = rk_error_set(error, errno == ENOSPC ? RK_ERR_FULL : RK_ERR_IO,
                                      "cannot create the directory %s: %s; choose another --data",
                                      path, strerror(errno));
            }
            *c = kept;
        }
        if (kept == '\0') {
            break;
        }
    }
    if (status == RK_OK && (stat(path, &info) != 0 || !S_ISDIR(info.st_mode))) {
        status = rk_error_set(error, RK_ERR_IO, "%s is no directory; choose another --data", path);
    }
    if (status == RK_OK && access(path, R_OK | W_OK | X_OK) != 0) {
        status = rk_error_set(error, RK_ERR_IO,
                              "cannot use the directory %s: %s; check its owner and mode", path,
                              strerror(errno));
    }
    rk_free(path);
    return status;
}

/* RocksDB ends the process when the disk fills up while it makes its first files, and at the write
 * after one that failed. */
static enum rk_status check_room(const char *location, uint64_t bytes_min, struct rk_error *error)
{
    struct statvfs info;

    if (statvfs(location, &info) == 0 && (uint64_t)info.f_bavail * info.f_frsize < bytes_min) {
        return rk_error_set(error, RK_ERR_FULL,
                            "the disk of %s has %llu KiB left, the metadata database needs %llu; "
                            "make room, or choose another --data",
                            location,
                            (unsigned long long)((uint64_t)info.f_bavail * info.f_frsize >> 10),
                            (unsigned long long)(bytes_min >> 10));
    }
    return RK_OK;
}

static void set_options(struct metadata *metadata)
{
    metadata->options = rocksdb_options_create();
    metadata->read_options = rocksdb_readoptions_create();
    metadata->write_options = rocksdb_writeoptions_create();
    metadata->synced_options = rocksdb_writeoptions_create();
    rocksdb_options_set_create_if_missing(metadata->options, 1);
    rocksdb_options_set_paranoid_checks(metadata->options, 1);
    rocksdb_options_set_write_buffer_size(metadata->options, METADATA_WRITE_BUFFER_BYTES);
    uint32_t files_max = rk_descriptors_limit() / 4;
    rocksdb_options_set_max_open_files(metadata->options, files_max < METADATA_OPEN_FILES_MAX
                                                              ? (int)files_max
                                                              : METADATA_OPEN_FILES_MAX);
    rocksdb_options_set_keep_log_file_num(metadata->options, METADATA_LOG_FILES_KEPT);
    rocksdb_options_set_info_log_level(metadata->options, METADATA_LOG_LEVEL_NONE);
    rocksdb_readoptions_set_verify_checksums(metadata->read_options, 1);
    rocksdb_writeoptions_set_sync(metadata->synced_options, 1);
}

static enum rk_status rocksdb_metadata_open(const char *location, struct metadata **ret_metadata,
                                            struct rk_error *error)
{
    struct metadata *metadata = NULL;
    char *text = NULL;
    enum rk_status status = make_directory(location, error);

    if (status == RK_OK) {
        status = check_room(location, METADATA_ROOM_BYTES_MIN, error);
    }
    if (status != RK_OK) {
        return status;
    }
    metadata = rk_alloc_zero(1, sizeof(*metadata));
    if (metadata == NULL || (metadata->location = rk_alloc_string(location)) == NULL) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for the metadata database");
        goto fail;
    }
    RK_ASSERT(pthread_rwlock_init(&metadata->lock, NULL) == 0);
    RK_ASSERT(pthread_mutex_init(&metadata->write_lock, NULL) == 0);
    metadata->lock_made = true;
    set_options(metadata);
    metadata->db = rocksdb_open(metadata->options, location, &text);
    if (text != NULL) {
        status = take_error(text, "open", location, error);
        goto fail;
    }
    *ret_metadata = metadata;
    return RK_OK;

fail:
    rocksdb_metadata_close(metadata);
    return status;
}

/* Under lock. */
static enum rk_status check_open(const struct metadata *metadata, struct rk_error *error)
{
    return metadata->db != NULL
               ? RK_OK
               : rk_error_set(error, RK_ERR_IO,
                              "the metadata database %s could not be opened again after a failure; "
                              "the log has the reason",
                              metadata->location);
}

static enum rk_status read_value(struct metadata *metadata, const void *key, size_t key_bytes,
                                 void **ret_value, size_t *ret_bytes, struct rk_error *error)
{
    char *text = NULL;
    size_t bytes = 0;
    char *value = rocksdb_get(metadata->db, metadata->read_options, key, key_bytes, &bytes, &text);
    void *copy;

    if (text != NULL) {
        return take_error(text, "read", metadata->location, error);
    }
    if (value == NULL) {
        return RK_ERR_NOT_FOUND;
    }
    copy = rk_alloc(bytes + 1); /* One more, so that an empty value has an address. */
    if (copy != NULL) {
        memcpy(copy, value, bytes);
    }
    rocksdb_free(value);
    if (copy == NULL) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory for a metadata record");
    }
    *ret_value = copy;
    *ret_bytes = bytes;
    return RK_OK;
}

static enum rk_status rocksdb_metadata_get(struct metadata *metadata, const void *key,
                                           size_t key_bytes, void **ret_value, size_t *ret_bytes,
                                           struct rk_error *error)
{
    enum rk_status status;

    (void)pthread_rwlock_rdlock(&metadata->lock);
    status = check_open(metadata, error);
    if (status == RK_OK) {
        status = read_value(metadata, key, key_bytes, ret_value, ret_bytes, error);
    }
    (void)pthread_rwlock_unlock(&metadata->lock);
    return status;
}

/* Under write_lock. */
static enum rk_status write_batch(struct metadata *metadata, rocksdb_writebatch_t *batch,
                                  bool synced, struct rk_error *error)
{
    struct rk_error why = {0};
    char *text = NULL;
    size_t bytes = 0;
    enum rk_status status;

    if (metadata->failure.status != RK_OK) {
        return rk_error_set(error, metadata->failure.status,
                            "nothing is written to the metadata database since it failed, until "
                            "it has been opened again: %.400s",
                            metadata->failure.text);
    }
    /* What cannot fit is not begun: then nothing has failed, and the next one may. */
    (void)rocksdb_writebatch_data(batch, &bytes);
    status = check_room(metadata->location, METADATA_ROOM_BYTES_WRITE + bytes, error);
    if (status != RK_OK) {
        return status;
    }
    rocksdb_write(metadata->db, synced ? metadata->synced_options : metadata->write_options, batch,
                  &text);
    if (text == NULL) {
        return RK_OK;
    }
    status = take_error(text, "write to", metadata->location, &why);
    metadata->failure = why;
    metadata->failure.status = status;
    metadata->reopen_ns = rk_deadline_in_ms(METADATA_REOPEN_MS);
    RK_LOG_ERROR("metadata_failed", "reason=%q", why.text);
    return rk_error_set(error, status, "%s", why.text);
}

static enum rk_status rocksdb_metadata_write(struct metadata *metadata,
                                             const struct metadata_change *changes,
                                             size_t num_changes, bool synced,
                                             struct rk_error *error)
{
    rocksdb_writebatch_t *batch = rocksdb_writebatch_create();
    enum rk_status status;

    for (size_t i = 0; i < num_changes; i++) {
        const struct metadata_change *change = &changes[i];

        if (change->value == NULL) {
            rocksdb_writebatch_delete(batch, change->key, change->key_bytes);
        } else {
            rocksdb_writebatch_put(batch, change->key, change->key_bytes, change->value,
                                   change->value_bytes);
        }
    }
    (void)pthread_mutex_lock(&metadata->write_lock);
    status = write_batch(metadata, batch, synced, error);
    (void)pthread_mutex_unlock(&metadata->write_lock);
    rocksdb_writebatch_destroy(batch);
    return status;
}

/* Under write_lock. To write if that goes, else to read at least. */
static enum rk_status reopen(struct metadata *metadata, struct rk_error *error)
{
    char *text = NULL;
    enum rk_status status = RK_OK;

    (void)pthread_rwlock_wrlock(&metadata->lock);
    if (metadata->db != NULL) {
        rocksdb_close(metadata->db);
    }
    metadata->db = rocksdb_open(metadata->options, metadata->location, &text);
    if (text != NULL) {
        status = take_error(text, "open again", metadata->location, error);
        text = NULL;
        metadata->db = rocksdb_open_for_read_only(metadata->options, metadata->location, 0, &text);
        rocksdb_free(text);
    }
    (void)pthread_rwlock_unlock(&metadata->lock);
    return status;
}

static bool rocksdb_metadata_tend(struct metadata *metadata)
{
    struct rk_error error = {0};
    bool reopened = false;

    (void)pthread_mutex_lock(&metadata->write_lock);
    if (metadata->failure.status != RK_OK && rk_deadline_left_ms(metadata->reopen_ns) == 0 &&
        check_room(metadata->location, METADATA_ROOM_BYTES_MIN, NULL) == RK_OK) {
        reopened = reopen(metadata, &error) == RK_OK;
        if (reopened) {
            metadata->failure = (struct rk_error){.status = RK_OK};
            RK_LOG_INFO("metadata_reopened", "location=%q", metadata->location);
        } else {
            metadata->reopen_ns = rk_deadline_in_ms(METADATA_REOPEN_MS);
            RK_LOG_ERROR("metadata_not_reopened", "reason=%q", error.text);
        }
    }
    (void)pthread_mutex_unlock(&metadata->write_lock);
    return reopened;
}

static enum rk_status scan_open(struct metadata *metadata, const void *prefix, size_t prefix_bytes,
                                metadata_visit visit, void *context, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    char *text = NULL;
    rocksdb_iterator_t *iterator = rocksdb_create_iterator(metadata->db, metadata->read_options);

    for (rocksdb_iter_seek(iterator, prefix, prefix_bytes);
         status == RK_OK && rocksdb_iter_valid(iterator); rocksdb_iter_next(iterator)) {
        size_t key_bytes;
        size_t value_bytes;
        const char *key = rocksdb_iter_key(iterator, &key_bytes);
        const char *value = rocksdb_iter_value(iterator, &value_bytes);

        if (key_bytes < prefix_bytes || memcmp(key, prefix, prefix_bytes) != 0) {
            break;
        }
        status = visit(key, key_bytes, value, value_bytes, context, error);
    }
    if (status == RK_OK) {
        rocksdb_iter_get_error(iterator, &text);
        if (text != NULL) {
            status = take_error(text, "read", metadata->location, error);
        }
    }
    rocksdb_iter_destroy(iterator);
    return status;
}

static enum rk_status rocksdb_metadata_scan(struct metadata *metadata, const void *prefix,
                                            size_t prefix_bytes, metadata_visit visit,
                                            void *context, struct rk_error *error)
{
    enum rk_status status;

    (void)pthread_rwlock_rdlock(&metadata->lock);
    status = check_open(metadata, error);
    if (status == RK_OK) {
        status = scan_open(metadata, prefix, prefix_bytes, visit, context, error);
    }
    (void)pthread_rwlock_unlock(&metadata->lock);
    return status;
}

static uint64_t rocksdb_metadata_bytes(struct metadata *metadata)
{
    uint64_t files = 0;
    uint64_t tables = 0;

    (void)pthread_rwlock_rdlock(&metadata->lock);
    if (metadata->db != NULL) {
        (void)rocksdb_property_int(metadata->db, "rocksdb.total-sst-files-size", &files);
        (void)rocksdb_property_int(metadata->db, "rocksdb.cur-size-all-mem-tables", &tables);
    }
    (void)pthread_rwlock_unlock(&metadata->lock);
    return files + tables;
}

const struct metadata_ops metadata_rocksdb = {
    .name = "rocksdb",
    .open = rocksdb_metadata_open,
    .close = rocksdb_metadata_close,
    .get = rocksdb_metadata_get,
    .write = rocksdb_metadata_write,
    .scan = rocksdb_metadata_scan,
    .tend = rocksdb_metadata_tend,
    .bytes = rocksdb_metadata_bytes,
};
