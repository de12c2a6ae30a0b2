/*
 * Goal:   the store's program says at its start, in one line and with what to do, that it cannot
 *         work here; and tells others a path that they can use.
 * Method: run it with ports of its own choice and no coordinator, and look at what it says.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define PROGRAM REDKNOT_BINARY_DIR "/bin/redknot-kvstore"
#define QUIET   " --listen 127.0.0.1:0 --metrics '' --ucx '' "

static char output[8192];

static int run(const char *before, const char *options)
{
    char command[1024];
    (void)snprintf(command, sizeof(command), "%s timeout 20 " PROGRAM QUIET "%s 2>&1", before,
                   options);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    size_t bytes = fread(output, 1, sizeof(output) - 1, pipe);
    output[bytes] = 0;
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void expect(int code, int wanted, const char *text)
{
    if (code != wanted || !strstr(output, text)) {
        fail_msg("exit %d, wanted %d and \"%s\"; got:\n%s", code, wanted, text, output);
    }
}

static void what_cannot_work_is_said_with_what_to_do(void **state)
{
    (void)state;
    expect(run("", "--shm-socket '' --dram 900TiB"), 1, "--dram asks for");
    assert_non_null(strstr(output, "ask for less"));
    /* Where nothing can be made, also by root. */
    expect(run("XDG_RUNTIME_DIR=/proc", "--dram 64MiB"), 1, "cannot make /proc/redknot");
    assert_non_null(strstr(output, "give --shm-socket PATH"));
    expect(run("", "--dram 64MiB --shm-socket /proc/no/store.sock"), 1, "give --shm-socket PATH");
}

/* Readers are in other folders than the store. */
static void a_relative_socket_is_told_as_it_can_be_found(void **state)
{
    (void)state;
    char dir[] = "/tmp/redknot-store-XXXXXX";
    char before[256];
    char path[128];
    assert_non_null(mkdtemp(dir));
    (void)snprintf(before, sizeof(before), "cd %s && exec", dir);
    (void)snprintf(path, sizeof(path), "shm_socket=\"%s/s/store.sock\"", dir);
    (void)snprintf(output, sizeof(output), "%s timeout 1 %s%s 2>&1", before, PROGRAM QUIET,
                   "--dram 64MiB --shm-socket s/store.sock");
    FILE *pipe = popen(output, "r");
    assert_non_null(pipe);
    size_t bytes = fread(output, 1, sizeof(output) - 1, pipe);
    output[bytes] = 0;
    (void)pclose(pipe);
    assert_non_null(strstr(output, "event=ready"));
    assert_non_null(strstr(output, path));
    (void)snprintf(before, sizeof(before), "rm -rf %s", dir);
    assert_int_equal(system(before), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_cannot_work_is_said_with_what_to_do),
        cmocka_unit_test(a_relative_socket_is_told_as_it_can_be_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
