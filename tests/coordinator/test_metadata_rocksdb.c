/*
 * Goal:   what was acknowledged is there after a crash; a generation is never
 *         used twice; a damaged, foreign or locked database is refused.
 * Method: a real database in a fresh directory. A child commits in a loop,
 *         reports each acknowledged write over a pipe, and is killed with
 *         SIGKILL; the parent opens the database and looks for each.
 */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "coordinator/metadata.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define CHILD_WRITES 200

static char root[] = "/tmp/redknot-metadata-XXXXXX";

static void path_of(const char *name, char ret_path[128])
{
    (void)snprintf(ret_path, 128, "%s/%s", root, name);
}

static struct metadata *open_ok(const char *path)
{
    struct metadata *metadata = NULL;
    struct rk_error error = {0};

    assert_int_equal(metadata_rocksdb.open(path, &metadata, &error), RK_OK);
    return metadata;
}

static enum rk_status put(struct metadata *metadata, const char *key, const char *value)
{
    struct metadata_change change = {key, strlen(key), value, value == NULL ? 0 : strlen(value)};

    return metadata_rocksdb.write(metadata, &change, 1, true, NULL);
}

static enum rk_status count_visit(const void *key, size_t key_bytes, const void *value,
                                  size_t value_bytes, void *context, struct rk_error *error)
{
    (void)key;
    (void)key_bytes;
    (void)value;
    (void)value_bytes;
    (void)error;
    ++*(int *)context;
    return RK_OK;
}

static void round_trip_and_delete(void **state)
{
    char path[128];
    struct metadata *metadata;
    struct stat info;
    void *value = NULL;
    size_t bytes = 0;
    int count = 0;

    (void)state;
    path_of("deep/er/round", path);
    metadata = open_ok(path);
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_mode & 0777, 0700);
    assert_int_equal(put(metadata, "a/1", "one"), RK_OK);
    assert_int_equal(put(metadata, "a/2", ""), RK_OK);
    assert_int_equal(put(metadata, "b/1", "other"), RK_OK);
    assert_int_equal(metadata_rocksdb.scan(metadata, "a/", 2, count_visit, &count, NULL), RK_OK);
    assert_int_equal(count, 2);
    metadata_rocksdb.close(metadata);

    metadata = open_ok(path);
    assert_int_equal(metadata_rocksdb.get(metadata, "a/1", 3, &value, &bytes, NULL), RK_OK);
    assert_int_equal(bytes, 3);
    assert_memory_equal(value, "one", 3);
    rk_free(value);
    assert_int_equal(metadata_rocksdb.get(metadata, "a/2", 3, &value, &bytes, NULL), RK_OK);
    assert_int_equal(bytes, 0);
    rk_free(value);
    assert_int_equal(put(metadata, "a/1", NULL), RK_OK);
    assert_int_equal(metadata_rocksdb.get(metadata, "a/1", 3, &value, &bytes, NULL),
                     RK_ERR_NOT_FOUND);
    metadata_rocksdb.close(metadata);
}

static void a_second_opener_is_told_that_it_is_locked(void **state)
{
    char path[128];
    struct metadata *metadata;
    struct metadata *second = NULL;
    struct rk_error error = {0};

    (void)state;
    path_of("locked", path);
    metadata = open_ok(path);
    assert_int_equal(metadata_rocksdb.open(path, &second, &error), RK_ERR_BUSY);
    assert_null(second);
    assert_non_null(strstr(error.text, path));
    assert_null(strchr(error.text, '\n'));
    metadata_rocksdb.close(metadata);
}

static void damage_is_told(void **state)
{
    char path[128];
    char file[160];
    struct metadata *metadata = NULL;
    struct rk_error error = {0};
    int fd;

    (void)state;
    path_of("damaged", path);
    metadata_rocksdb.close(open_ok(path));
    (void)snprintf(file, sizeof(file), "%s/CURRENT", path);
    fd = open(file, O_WRONLY | O_TRUNC);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, "garbage", 7), 7);
    (void)close(fd);
    metadata = NULL;
    assert_int_equal(metadata_rocksdb.open(path, &metadata, &error), RK_ERR_CORRUPT);
    assert_null(metadata);
    assert_non_null(strstr(error.text, path));
}

static void a_file_in_the_way_is_told(void **state)
{
    char path[128];
    struct metadata *metadata = NULL;
    struct rk_error error = {0};
    int fd;

    (void)state;
    path_of("file", path);
    fd = open(path, O_WRONLY | O_CREAT, 0600);
    assert_true(fd >= 0);
    (void)close(fd);
    assert_int_equal(metadata_rocksdb.open(path, &metadata, &error), RK_ERR_IO);
    assert_non_null(strstr(error.text, path));
}

static void write_until_killed(const char *path, int report)
{
    struct metadata *metadata = NULL;

    if (metadata_rocksdb.open(path, &metadata, NULL) != RK_OK) {
        _exit(1);
    }
    for (uint32_t i = 0;; i++) {
        char key[16];

        (void)snprintf(key, sizeof(key), "s/%08u", i);
        if (put(metadata, key, key) != RK_OK ||
            write(report, &i, sizeof(i)) != (ssize_t)sizeof(i)) {
            _exit(1);
        }
    }
}

static void each_acknowledged_write_survives_sigkill(void **state)
{
    char path[128];
    struct metadata *metadata;
    int report[2];
    uint32_t last = 0;
    uint32_t acknowledged = 0;
    pid_t child;
    int status = 0;

    (void)state;
    path_of("killed", path);
    assert_int_equal(pipe(report), 0);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)close(report[0]);
        write_until_killed(path, report[1]);
    }
    (void)close(report[1]);
    while (acknowledged < CHILD_WRITES && read(report[0], &last, sizeof(last)) == sizeof(last)) {
        acknowledged++;
    }
    assert_int_equal(acknowledged, CHILD_WRITES);
    assert_int_equal(kill(child, SIGKILL), 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    while (read(report[0], &last, sizeof(last)) == sizeof(last)) {
    }
    (void)close(report[0]);

    metadata = open_ok(path);
    for (uint32_t i = 0; i <= last; i++) {
        char key[16];
        void *value = NULL;
        size_t bytes = 0;

        (void)snprintf(key, sizeof(key), "s/%08u", i);
        assert_int_equal(metadata_rocksdb.get(metadata, key, strlen(key), &value, &bytes, NULL),
                         RK_OK);
        rk_free(value);
    }
    metadata_rocksdb.close(metadata);
}

/* A limit on the size of files stands for a disk that is full: the kernel refuses the write. */
static void limit_files(rlim_t bytes)
{
    struct rlimit limit;

    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes == 0 ? limit.rlim_max : bytes;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

static bool can_read(struct metadata *metadata, const char *key)
{
    void *value = NULL;
    size_t bytes = 0;
    enum rk_status status = metadata_rocksdb.get(metadata, key, strlen(key), &value, &bytes, NULL);

    rk_free(value);
    return status == RK_OK;
}

/* RocksDB ends the process at the write after one that failed. */
static void a_write_that_fails_is_the_last_one(void **state)
{
    char path[128];
    char big[65536];
    struct metadata *metadata;
    int64_t deadline_ns = rk_deadline_in_ms(20000);
    enum rk_status failed = RK_OK;

    (void)state;
    (void)signal(SIGXFSZ, SIG_IGN);
    memset(big, 'x', sizeof(big) - 1);
    big[sizeof(big) - 1] = '\0';
    path_of("full", path);
    metadata = open_ok(path);
    assert_int_equal(put(metadata, "a/first", "one"), RK_OK);
    limit_files(1 << 20);
    for (int i = 0; i < 64 && failed == RK_OK; i++) {
        failed = put(metadata, "a/big", big);
    }
    assert_int_not_equal(failed, RK_OK);
    for (int i = 0; i < 10; i++) { /* Not tried. */
        struct metadata_change change = {"a/more", 6, "two", 3};
        struct rk_error error = {0};

        assert_int_equal(metadata_rocksdb.write(metadata, &change, 1, i % 2 == 0, &error), failed);
        assert_non_null(strstr(error.text, "since it failed"));
        assert_true(can_read(metadata, "a/first"));
    }
    assert_false(metadata_rocksdb.tend(metadata)); /* Not at once again and again. */
    limit_files(0);
    while (!metadata_rocksdb.tend(metadata) && rk_deadline_left_ms(deadline_ns) != 0) {
        rk_clock_sleep_ms(20);
    }
    assert_int_equal(put(metadata, "a/more", "two"), RK_OK);
    assert_true(can_read(metadata, "a/first"));
    assert_true(can_read(metadata, "a/more"));
    metadata_rocksdb.close(metadata);
    metadata = open_ok(path);
    assert_true(can_read(metadata, "a/first"));
    assert_true(can_read(metadata, "a/big"));
    assert_true(can_read(metadata, "a/more"));
    metadata_rocksdb.close(metadata);
}

static int make_root(void **state)
{
    (void)state;
    return mkdtemp(root) == NULL;
}

static int remove_root(void **state)
{
    char command[64];

    (void)state;
    (void)snprintf(command, sizeof(command), "rm -rf %s", root);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_acknowledged_write_survives_sigkill), /* Forks before any thread. */
        cmocka_unit_test(round_trip_and_delete),
        cmocka_unit_test(a_second_opener_is_told_that_it_is_locked),
        cmocka_unit_test(damage_is_told),
        cmocka_unit_test(a_file_in_the_way_is_told),
        cmocka_unit_test(a_write_that_fails_is_the_last_one),
    };

    return cmocka_run_group_tests(tests, make_root, remove_root);
}
