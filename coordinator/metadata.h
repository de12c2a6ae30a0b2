/*
 * metadata: the ordered key-value table that outlives the coordinator.
 *
 * One table of operations, so that the embedded form (RocksDB, one machine) and
 * a cluster form can stand behind the same coordinator. Keys and values are
 * bytes; a batch is atomic; a synced batch survives loss of power.
 *
 * Threads: any; batches of two threads are ordered by whoever comes first.
 * Errors:  RK_ERR_BUSY: another process has it open. RK_ERR_CORRUPT: damaged or
 *          not ours. RK_ERR_FULL: no room on the disk. RK_ERR_IO: anything else.
 *          After a write that failed all others fail alike, without being tried,
 *          until tend() has opened the table again; reads go on.
 */
#ifndef RK_COORDINATOR_METADATA_H
#define RK_COORDINATOR_METADATA_H

#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct metadata;

struct metadata_change {
    const void *key;
    size_t key_bytes;
    const void *value; /* NULL: delete the key */
    size_t value_bytes;
};

/* A status other than RK_OK ends the scan and becomes its result. */
typedef enum rk_status (*metadata_visit)(const void *key, size_t key_bytes, const void *value,
                                         size_t value_bytes, void *context, struct rk_error *error);

struct metadata_ops {
    const char *name;
    enum rk_status (*open)(const char *location, struct metadata **ret_metadata,
                           struct rk_error *error);
    void (*close)(struct metadata *metadata); /* accepts NULL */
    /* RK_ERR_NOT_FOUND leaves error alone. Free the value with rk_free. */
    enum rk_status (*get)(struct metadata *metadata, const void *key, size_t key_bytes,
                          void **ret_value, size_t *ret_bytes, struct rk_error *error);
    /* All of it or nothing. */
    enum rk_status (*write)(struct metadata *metadata, const struct metadata_change *changes,
                            size_t num_changes, bool synced, struct rk_error *error);
    /* Ascending keys that begin with prefix. */
    enum rk_status (*scan)(struct metadata *metadata, const void *prefix, size_t prefix_bytes,
                           metadata_visit visit, void *context, struct rk_error *error);
    /* Call it a few times a second: opens a table again that a write failed on, once that can go
     * well. True: it did so just now. */
    bool (*tend)(struct metadata *metadata);
    uint64_t (*bytes)(struct metadata *metadata); /* on disk and in memory, an estimate */
};

/* Location: a directory, created with mode 0700. */
extern const struct metadata_ops metadata_rocksdb;

#endif
