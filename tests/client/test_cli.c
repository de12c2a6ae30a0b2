/*
 * Goal:   the command's exit codes and messages: 0 help and version, 2 wrong
 *         usage, 1 failure with one clear line that names the file.
 * Method: run the program with a table of arguments, against a port on which
 *         nobody listens, and compare exit code and output.
 */
#include "tests/support/skip.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char dir[] = "/tmp/redknot-cli-XXXXXX";

/* Output of both streams. arguments may use $D, the directory of the test's files. */
static int run_program(const char *program, const char *arguments, char *output, size_t room)
{
    char command[2048];
    (void)snprintf(command, sizeof(command),
                   "D=%s; REDKNOT_COORDINATOR=127.0.0.1:1 " REDKNOT_BINARY_DIR
                   "/bin/%s 2>&1 </dev/null %s",
                   dir, program, arguments);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    size_t bytes = fread(output, 1, room - 1, pipe);
    output[bytes] = 0;
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static int run(const char *arguments, char *output, size_t room)
{
    return run_program("redknot", arguments, output, room);
}

static void write_file(const char *name, const char *text, size_t bytes)
{
    char path[128];
    (void)snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

static int make_files(void **state)
{
    (void)state;
    if (!mkdtemp(dir)) {
        return -1;
    }
    write_file("empty.txt", "", 0);
    write_file("nul.txt", "a\0b", 3);
    write_file("latin1.txt", "caf\xE9\n", 5);
    write_file("text.txt", "Some text.\n", 11);
    write_file("bad.json", "{\"requests\": [{\"segments\": 3}]}", 31);
    return 0;
}

static int remove_files(void **state)
{
    (void)state;
    static const char *const names[] = {"empty.txt", "nul.txt",  "latin1.txt",
                                        "text.txt",  "bad.json", "cluster.json"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        char path[128];
        (void)snprintf(path, sizeof(path), "%s/%s", dir, names[i]);
        (void)unlink(path);
    }
    return rmdir(dir);
}

static void exit_codes_and_messages(void **state)
{
    (void)state;
    static const struct {
        const char *arguments;
        int code;
        const char *contains;
    } cases[] = {
        {"--version", 0, "redknot 0.1.0"},
        {"--help", 0, "generate"},
        {"put --help", 0, "--coordinator"},
        {"up --help", 0, "--base-port"},
        {"eval --help", 0, "continuation"},
        {"", 2, "Usage"},
        {"nonsense", 2, "nonsense: no such command"},
        {"put", 2, "no file given"},
        {"put --nonsense x", 2, "nonsense"},
        {"generate", 2, "no --prompt given"},
        {"generate --prompt x --max-tokens 0", 2, "--max-tokens"},
        {"generate --prompt x --temperature hot", 2, "--temperature"},
        {"generate --prompt x --fidelity 'A B'", 2, "A B"},
        {"generate --prompt x stray", 2, "stray"},
        {"generate --prompt x --compare 'A B'", 2, "A B"},
        {"tokenize a b", 2, "more than one text"},
        {"tokenize", 1, "standard input: it is empty"},
        {"tokenize $D/latin1.txt", 1, "not UTF-8"},
        {"tokenize text", 1, "127.0.0.1:1 does not answer"},
        {"drop", 2, "no segment id given"},
        {"drop 12ab", 2, "12ab"},
        {"eval", 2, "no file given"},
        {"up --workers 17", 2, "--workers"},
        {"up --context 1", 2, "--context"},
        {"up --path rdma", 2, "--path"},
        {"up -c 127.0.0.1:7100", 1, "--base-port"},
        {"restart", 2, "no node given"},
        {"restart --dir $D store-0", 1, "no cluster was started there"},
        {"logs --dir $D/absent store-0", 1, "no such folder"},
        {"up --dram lots", 2, "--dram"},
        {"up --mode f16", 2, "--mode"},
        {"put $D/absent.txt", 1, "absent.txt: No such file"},
        {"put $D", 1, "it is a directory"},
        {"put $D/empty.txt", 1, "empty.txt: the file is empty"},
        {"put $D/nul.txt", 1, "NUL byte"},
        {"put $D/latin1.txt", 1, "not UTF-8"},
        {"put $D/text.txt", 1, "127.0.0.1:1 does not answer"},
        {"generate --prompt x --segment $D/absent.txt", 1, "absent.txt: no such file"},
        {"generate --prompt x", 1, "127.0.0.1:1 does not answer"},
        {"status", 1, "127.0.0.1:1 does not answer"},
        {"status --coordinator 127.0.0.1:2", 1, "127.0.0.1:2 does not answer"},
        {"status -c 127.0.0.1:99999", 1, "from 1 to 65535"},
        {"status -c 127.0.0.1:0", 1, "from 1 to 65535"},
        {"put -c 127.0.0.1 $D/text.txt", 1, "no port"},
        {"eval $D/absent.json", 1, "absent.json: No such file"},
        {"eval $D/bad.json", 1, "bad.json: request 0: \"segments\""},
        {"up --dir $D/up --model /nonexistent.gguf", 1, "/nonexistent.gguf: No such file"},
        {"demo --examples $D", 1, "questions.json"},
        {"down --dir $D", 0, "stopped 0"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char output[8192];
        int code = run(cases[i].arguments, output, sizeof(output));
        if (code != cases[i].code || !strstr(output, cases[i].contains)) {
            print_error("redknot %s: exit %d, wanted %d and \"%s\", got:\n%s\n", cases[i].arguments,
                        code, cases[i].code, cases[i].contains, output);
            fail();
        }
        if (cases[i].code == 1) { /* One line, and it begins with the program's name. */
            assert_memory_equal(output, "redknot: ", 9);
            assert_ptr_equal(strchr(output, '\n'), output + strlen(output) - 1);
        }
    }
}

static const char *const commands[] = {"restart", "logs", "up",       "down", "put",   "generate",
                                       "status",  "drop", "tokenize", "eval", "value", "demo"};
static const char *const daemons[] = {"redknot-coordinator", "redknot-kvstore", "redknot-worker"};

/* "  -m, --model=FILE ..." says that m is --model. */
static void letters_of(const char *program, const char *help, char names[128][32])
{
    for (const char *at = help; (at = strstr(at, "\n  -")); at++) {
        char letter = at[4];
        char name[32];
        if (at[5] != ',' || sscanf(at + 6, " --%31[a-z-]", name) != 1) {
            continue;
        }
        if (names[(int)letter][0] && strcmp(names[(int)letter], name) != 0) {
            fail_msg("%s: -%c is --%s, elsewhere it is --%s", program, letter, name,
                     names[(int)letter]);
        }
        (void)snprintf(names[(int)letter], sizeof(names[0]), "%s", name);
    }
}

static void one_letter_means_one_thing(void **state)
{
    (void)state;
    static char names[128][32];
    static char output[16384];
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        char arguments[64];
        (void)snprintf(arguments, sizeof(arguments), "%s --help", commands[i]);
        assert_int_equal(run(arguments, output, sizeof(output)), 0);
        letters_of(commands[i], output, names);
    }
    for (size_t i = 0; i < sizeof(daemons) / sizeof(daemons[0]); i++) {
        assert_int_equal(run_program(daemons[i], "--help", output, sizeof(output)), 0);
        letters_of(daemons[i], output, names);
    }
    assert_string_equal(names['c'], "coordinator");
    assert_string_equal(names['m'], "model");
    assert_string_equal(names['l'], "level");
}

/* Also what comes from the parser itself, as the help does. */
static void unknown_options_are_wrong_usage(void **state)
{
    (void)state;
    static char output[16384];
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        char arguments[64];
        (void)snprintf(arguments, sizeof(arguments), "%s --nonsense", commands[i]);
        assert_int_equal(run(arguments, output, sizeof(output)), 2);
        assert_non_null(strstr(output, "--nonsense"));
    }
    for (size_t i = 0; i < sizeof(daemons) / sizeof(daemons[0]); i++) {
        assert_int_equal(run_program(daemons[i], "--nonsense", output, sizeof(output)), 2);
        assert_int_equal(run_program(daemons[i], "stray", output, sizeof(output)), 2);
    }
}

static void output_that_cannot_be_written_is_a_failure(void **state)
{
    (void)state;
    static const char *const cases[] = {"--help", "--version", "down --dir $D", "down --dir $D -j",
                                        "generate --help"};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char output[1024];
        char arguments[128];
        (void)snprintf(arguments, sizeof(arguments), "%s >/dev/full", cases[i]);
        int code = run(arguments, output, sizeof(output));
        if (code != 1 || !strstr(output, "No space left on device")) {
            fail_msg("redknot %s: exit %d, \"%s\"", arguments, code, output);
        }
    }
}

/* A recorded pid that another process has now: it must not be hit. */
static void down_spares_a_reused_pid(void **state)
{
    (void)state;
    char output[1024];
    char text[1024];
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)execlp("sleep", "sleep", "30", (char *)NULL);
        _exit(127);
    }
    (void)snprintf(text, sizeof(text),
                   "{\"version\": 1, \"processes\": [{\"kind\": 0, \"node_id\": \"coordinator\","
                   " \"pid\": %d, \"start_time\": 1, \"program\": \"/bin/redknot-coordinator\","
                   " \"address\": \"127.0.0.1:1\", \"metrics\": \"127.0.0.1:2\","
                   " \"log\": \"x\"}]}",
                   (int)child);
    write_file("cluster.json", text, strlen(text));
    assert_int_equal(run("down --dir $D", output, sizeof(output)), 0);
    assert_non_null(strstr(output, "stopped 0"));
    assert_int_equal(waitpid(child, NULL, WNOHANG), 0); /* It lives. */
    assert_int_equal(kill(child, 9), 0);
    assert_int_equal(waitpid(child, NULL, 0), child);
}

static void write_state(const char *path, pid_t pid)
{
    char stat_path[64];
    char stat[1024] = "";
    char program[256];
    unsigned long long start = 0;
    (void)snprintf(stat_path, sizeof(stat_path), "/proc/%d/stat", (int)pid);
    FILE *file = fopen(stat_path, "r");
    assert_non_null(file);
    assert_non_null(fgets(stat, sizeof(stat), file));
    (void)fclose(file);
    const char *fields = strrchr(stat, ')');
    for (int field = 2; fields && field < 22; field++) { /* starttime is the 22nd, see proc(5) */
        fields = strchr(fields + 1, ' ');
    }
    assert_non_null(fields);
    start = strtoull(fields, NULL, 10);
    assert_non_null(realpath("/bin/sleep", program));
    file = fopen(path, "w");
    assert_non_null(file);
    (void)fprintf(file,
                  "{\"version\": 1, \"processes\": [{\"kind\": 0, \"node_id\": \"coordinator\","
                  " \"pid\": %d, \"start_time\": %llu, \"program\": \"%s\","
                  " \"address\": \"127.0.0.1:1\", \"metrics\": \"127.0.0.1:2\", \"log\": \"x\"}]}",
                  (int)pid, start, program);
    assert_int_equal(fclose(file), 0);
}

/* Whoever makes the default folder first must not have us end our own processes, nor choose where
 * we write. */
static void a_folder_of_another_user_orders_nothing(void **state)
{
    (void)state;
    char output[2048];
    char path[192];
    char command[256];
    if (geteuid() != 0) {
        test_skip("a folder of another user", "only root can make one");
    }
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        (void)execlp("sleep", "sleep", "30", (char *)NULL);
        _exit(127);
    }
    usleep(200000); /* Until it is sleep. */
    (void)snprintf(command, sizeof(command), "mkdir -p -m 700 %s/run/redknot/cluster", dir);
    assert_int_equal(system(command), 0);
    (void)snprintf(path, sizeof(path), "%s/run/redknot/cluster/cluster.json", dir);
    write_state(path, child);
    (void)snprintf(command, sizeof(command),
                   "chmod 700 %s/run/redknot; chown -R 54321 %s/run/redknot", dir, dir);
    assert_int_equal(system(command), 0);
    (void)snprintf(path, sizeof(path), "%s/run", dir);
    assert_int_equal(setenv("XDG_RUNTIME_DIR", path, 1), 0);

    assert_int_equal(run("down", output, sizeof(output)), 1);
    assert_non_null(strstr(output, "belongs to user 54321"));
    assert_int_equal(run("up --workers 0", output, sizeof(output)), 1);
    assert_non_null(strstr(output, "--dir"));
    assert_int_equal(waitpid(child, NULL, WNOHANG), 0); /* It lives. */
    /* Also of our own folder: none of our programs is named there. */
    (void)snprintf(command, sizeof(command), "chown -R 0 %s/run/redknot", dir);
    assert_int_equal(system(command), 0);
    assert_int_equal(run("down", output, sizeof(output)), 0);
    assert_non_null(strstr(output, "stopped 0"));
    assert_int_equal(waitpid(child, NULL, WNOHANG), 0);

    assert_int_equal(unsetenv("XDG_RUNTIME_DIR"), 0);
    (void)snprintf(command, sizeof(command), "rm -rf %s/run", dir);
    assert_int_equal(system(command), 0);
    assert_int_equal(kill(child, 9), 0);
    assert_int_equal(waitpid(child, NULL, 0), child);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(exit_codes_and_messages),
                                       cmocka_unit_test(one_letter_means_one_thing),
                                       cmocka_unit_test(unknown_options_are_wrong_usage),
                                       cmocka_unit_test(output_that_cannot_be_written_is_a_failure),
                                       cmocka_unit_test(a_folder_of_another_user_orders_nothing),
                                       cmocka_unit_test(down_spares_a_reused_pid)};
    return test_exit_code(cmocka_run_group_tests(tests, make_files, remove_files));
}
