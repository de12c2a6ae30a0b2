/*
 * Goal:   no other user of the machine decides where a cluster's folder leads, what is read from
 *         it, or which process is signalled for it.
 * Method: folders, links and files of another user, made as root in a folder of the test (skipped
 *         for who is not root); a state that names somebody's process.
 */
#include "client/cli/cluster_internal.h"
#include "common/base/alloc.h"
#include "tests/support/skip.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define STRANGER 54321

static char base[] = "/tmp/redknot-folder-XXXXXX";

static const char *at(const char *name)
{
    static char paths[4][256];
    static int next;
    char *path = paths[next++ % 4];
    (void)snprintf(path, sizeof(paths[0]), "%s/%s", base, name);
    return path;
}

static int setup(void **state)
{
    (void)state;
    (void)snprintf(base, sizeof(base), "/tmp/redknot-folder-XXXXXX");
    return mkdtemp(base) ? 0 : -1;
}

static int teardown(void **state)
{
    char command[300];
    (void)state;
    (void)snprintf(command, sizeof(command), "rm -rf '%s'", base);
    return system(command);
}

static enum rk_status try_open(const char *path, unsigned flags, char *ret_text)
{
    char real[PATH_MAX];
    struct rk_error error = {.text = ""};
    int fd = -1;
    enum rk_status status = folder_open(path, flags, real, &fd, &error);
    if (status == RK_OK) {
        assert_true(fd > 2);
        close(fd);
    }
    (void)snprintf(ret_text, 512, "%.511s", status == RK_OK ? real : error.text);
    return status;
}

static void a_folder_is_made_for_us_alone(void **state)
{
    (void)state;
    struct stat info;
    char text[512];
    assert_int_equal(try_open(at("a/b"), 0, text), RK_ERR_NOT_FOUND);
    assert_int_equal(try_open(at("a/./x/../b/"), FOLDER_CREATE | FOLDER_PRIVATE, text), RK_OK);
    assert_string_equal(text, at("a/b"));
    assert_int_equal(stat(at("a/b"), &info), 0);
    assert_int_equal(info.st_mode & 0777, 0700);
    assert_int_equal(try_open(at("a/b"), FOLDER_PRIVATE, text), RK_OK);
    assert_int_equal(chmod(at("a"), 0755), 0); /* Others may look in: fine, unless it is private. */
    assert_int_equal(try_open(at("a/b"), 0, text), RK_OK);
    assert_int_equal(try_open(at("a/b"), FOLDER_PRIVATE, text), RK_ERR_IO);
    assert_non_null(strstr(text, "chmod 700"));
}

static void links_of_ours_are_followed(void **state)
{
    (void)state;
    char text[512];
    assert_int_equal(mkdir(at("real"), 0700), 0);
    assert_int_equal(symlink("real", at("relative")), 0);
    assert_int_equal(symlink(at("relative"), at("absolute")), 0);
    assert_int_equal(symlink("loop", at("loop")), 0);
    assert_int_equal(try_open(at("absolute/x"), FOLDER_CREATE, text), RK_OK);
    assert_string_equal(text, at("real/x"));
    assert_int_equal(try_open(at("loop"), 0, text), RK_ERR_IO);
    assert_non_null(strstr(text, "leads too far"));
}

static void what_others_may_write_is_refused(void **state)
{
    (void)state;
    char text[512];
    assert_int_equal(mkdir(at("open"), 0700), 0);
    assert_int_equal(mkdir(at("open/mine"), 0700), 0);
    assert_int_equal(chmod(at("open"), 0777), 0);
    assert_int_equal(try_open(at("open/mine"), 0, text), RK_ERR_IO);
    assert_non_null(strstr(text, "written by other users"));
    assert_non_null(strstr(text, "--dir"));
    assert_int_equal(chmod(at("open"), 01777), 0); /* As /tmp is: names cannot be exchanged. */
    assert_int_equal(try_open(at("open/mine"), 0, text), RK_OK);
    assert_int_equal(try_open(at("open"), 0, text),
                     RK_ERR_IO); /* But it is no place for a state. */
}

static void what_is_of_another_user_is_refused(void **state)
{
    (void)state;
    char text[512];
    if (geteuid() != 0) {
        test_skip("a folder of another user", "only root can make one");
    }
    assert_int_equal(mkdir(at("theirs"), 0700), 0);
    assert_int_equal(mkdir(at("theirs/cluster"), 0700), 0);
    assert_int_equal(mkdir(at("ours"), 0700), 0);
    assert_int_equal(symlink("ours", at("link")), 0);
    assert_int_equal(chown(at("theirs"), STRANGER, STRANGER), 0);
    assert_int_equal(lchown(at("link"), STRANGER, STRANGER), 0);
    assert_int_equal(try_open(at("theirs/cluster"), 0, text), RK_ERR_IO);
    assert_non_null(strstr(text, "belongs to user 54321"));
    assert_int_equal(try_open(at("theirs"), FOLDER_CREATE, text), RK_ERR_IO);
    assert_int_equal(try_open(at("link"), 0, text), RK_ERR_IO);
    assert_int_equal(try_open(at("link/new"), FOLDER_CREATE, text), RK_ERR_IO);
    assert_int_equal(access(at("ours/new"), F_OK), -1); /* Nothing was made through it. */
}

static void a_state_is_a_file_of_ours(void **state)
{
    (void)state;
    char real[PATH_MAX];
    struct rk_error error;
    char *text = NULL;
    int fd = -1;
    assert_int_equal(folder_open(base, 0, real, &fd, &error), RK_OK);
    assert_int_equal(folder_read(fd, "state", &text, &error), RK_ERR_NOT_FOUND);
    assert_int_equal(folder_write(fd, "state", "{}", &error), RK_OK);
    assert_int_equal(folder_read(fd, "state", &text, &error), RK_OK);
    assert_string_equal(text, "{}");
    rk_free(text);
    assert_int_equal(symlink("state", at("link")), 0);
    assert_int_equal(folder_read(fd, "link", &text, &error), RK_ERR_IO);
    assert_int_equal(mkfifo(at("fifo"), 0600), 0);
    assert_int_equal(folder_read(fd, "fifo", &text, &error), RK_ERR_IO); /* And does not hang. */
    assert_int_equal(chmod(at("state"), 0666), 0);
    assert_int_equal(folder_read(fd, "state", &text, &error), RK_ERR_IO);
    assert_int_equal(chmod(at("state"), 0600), 0);
    if (geteuid() == 0) {
        assert_int_equal(chown(at("state"), STRANGER, STRANGER), 0);
        assert_int_equal(folder_read(fd, "state", &text, &error), RK_ERR_IO);
    }
    close(fd);
}

/* ---- Whom a signal may reach ---- */

static pid_t start_sleep(const char *program, uid_t uid)
{
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (setgid(uid) != 0 || setuid(uid) != 0) {
            _exit(126);
        }
        (void)execl(program, program, "30", (char *)NULL);
        _exit(127);
    }
    for (int i = 0; i < 500; i++) { /* Until it is that program. */
        char path[PATH_MAX];
        if (proc_program(child, path) && strcmp(path, program) == 0) {
            return child;
        }
        usleep(10000);
    }
    fail_msg("%s does not start", program);
    return -1;
}

static void end(pid_t child)
{
    assert_int_equal(kill(child, SIGKILL), 0);
    assert_int_equal(waitpid(child, NULL, 0), child);
}

static void only_our_programs_of_our_user_are_signalled(void **state)
{
    (void)state;
    char copy[PATH_MAX];
    char command[2 * PATH_MAX];
    struct cluster_process process = {.role = CLUSTER_STORE};
    (void)snprintf(copy, sizeof(copy), "%s", at("redknot-kvstore"));
    (void)snprintf(command, sizeof(command), "chmod 755 '%s'; cp \"$(realpath /bin/sleep)\" '%s'",
                   base, copy);
    assert_int_equal(system(command), 0);

    pid_t child = start_sleep(copy, geteuid());
    (void)snprintf(process.program, sizeof(process.program), "%s", copy);
    process.pid = child;
    process.start_time = process_start_time(child);
    assert_true(process_runs(&process));
    process.start_time++;
    assert_false(process_runs(&process)); /* Another process has its pid. */
    process.start_time--;
    process.role = CLUSTER_WORKER;
    assert_false(process_runs(&process)); /* Its program is that of a store. */
    process.role = CLUSTER_STORE;
    (void)snprintf(process.program, sizeof(process.program), "%.200s-2", copy);
    assert_false(process_runs(&process));
    end(child);

    char sleep[PATH_MAX];
    assert_non_null(realpath("/bin/sleep", sleep));
    child = start_sleep(sleep, geteuid());
    process = (struct cluster_process){
        .role = CLUSTER_STORE, .pid = child, .start_time = process_start_time(child)};
    (void)snprintf(process.program, sizeof(process.program), "%s", sleep);
    assert_false(process_runs(&process)); /* None of our programs, whatever the state says. */
    end(child);

    if (geteuid() == 0) {
        child = start_sleep(copy, STRANGER);
        process = (struct cluster_process){
            .role = CLUSTER_STORE, .pid = child, .start_time = process_start_time(child)};
        (void)snprintf(process.program, sizeof(process.program), "%s", copy);
        assert_false(process_runs(&process)); /* Another user's. */
        end(child);
    }
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(a_folder_is_made_for_us_alone),    TEST(links_of_ours_are_followed),
        TEST(what_others_may_write_is_refused), TEST(what_is_of_another_user_is_refused),
        TEST(a_state_is_a_file_of_ours),        TEST(only_our_programs_of_our_user_are_signalled),
    };
    return test_exit_code(cmocka_run_group_tests(tests, NULL, NULL));
}
