/*
 * Goal:   an output file is there whole or not at all, and never in the place of a device.
 * Method: commit, abort and fail at a full disk, over nothing, a file, a link and a folder; look at
 *         bytes, mode and leftovers.
 */
#include "client/cli/cli_internal.h"

#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char dir[] = "/tmp/redknot-file-XXXXXX";
static char path[64];

static int make_dir(void **state)
{
    (void)state;
    (void)umask(022);
    return mkdtemp(dir) ? snprintf(path, sizeof(path), "%s/out", dir) < 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    return rmdir(dir);
}

static size_t num_entries(void)
{
    DIR *folder = opendir(dir);
    size_t count = 0;
    assert_non_null(folder);
    while (readdir(folder)) {
        count++;
    }
    (void)closedir(folder);
    return count - 2; /* . and .. */
}

static void expect_content(const char *content)
{
    char bytes[64] = "";
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    (void)fread(bytes, 1, sizeof(bytes) - 1, file);
    assert_int_equal(fclose(file), 0);
    assert_string_equal(bytes, content);
}

static void write_whole(const char *content)
{
    struct cli_file *file = NULL;
    struct rk_error error = {.status = RK_OK};
    assert_int_equal(cli_file_create(path, &file, &error), RK_OK);
    assert_int_equal(cli_file_write(file, content, strlen(content), &error), RK_OK);
    assert_int_equal(cli_file_commit(file, &error), RK_OK);
}

static void files_appear_whole(void **state)
{
    (void)state;
    struct cli_file *file = NULL;
    struct rk_error error = {.status = RK_OK};
    struct stat info;
    write_whole("first");
    expect_content("first");
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_mode & 07777, 0644);

    assert_int_equal(chmod(path, 0600), 0);
    assert_int_equal(cli_file_create(path, &file, &error), RK_OK);
    assert_int_equal(cli_file_write(file, "half", 4, &error), RK_OK);
    expect_content("first"); /* Until the commit. */
    cli_file_abort(file);
    expect_content("first");

    write_whole("second");
    expect_content("second");
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_mode & 07777, 0600);
    assert_int_equal(num_entries(), 1);
    assert_int_equal(unlink(path), 0);
}

static void a_link_stays_a_link(void **state)
{
    (void)state;
    char target[80];
    struct stat info;
    (void)snprintf(target, sizeof(target), "%s/target", dir);
    write_whole("first");
    assert_int_equal(rename(path, target), 0);
    assert_int_equal(symlink(target, path), 0);
    write_whole("second");
    expect_content("second");
    assert_int_equal(lstat(path, &info), 0);
    assert_true(S_ISLNK(info.st_mode));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(unlink(target), 0);
}

static void failures_are_told_and_leave_nothing(void **state)
{
    (void)state;
    struct cli_file *file = NULL;
    struct rk_error error = {.status = RK_OK};
    struct stat info;
    assert_int_equal(cli_file_create("/dev/full", &file, &error), RK_OK);
    assert_int_equal(cli_file_write(file, "bytes", 5, &error), RK_OK); /* Buffered. */
    assert_int_equal(cli_file_commit(file, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "/dev/full: cannot write it: No space left"));
    assert_int_equal(stat("/dev/full", &info), 0);
    assert_true(S_ISCHR(info.st_mode)); /* And no file in its place. */

    assert_int_equal(cli_file_create(dir, &file, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "Is a directory"));
    assert_int_equal(cli_file_create("/nonexistent/x", &file, &error), RK_ERR_INVALID);
    assert_non_null(strstr(error.text, "/nonexistent/x: cannot create it: No such file"));
    assert_int_equal(num_entries(), 0);
    cli_file_abort(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(files_appear_whole),
        cmocka_unit_test(a_link_stays_a_link),
        cmocka_unit_test(failures_are_told_and_leave_nothing),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
