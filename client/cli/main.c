#include "client/cli/cli_internal.h"
#include "common/base/log.h"
#include "common/base/service.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *summary;
} commands[] = {
    {"up", cli_up, "start a coordinator, stores and workers on this machine"},
    {"down", cli_down, "stop what `up` started"},
    {"restart", cli_restart, "start one process of it again"},
    {"logs", cli_logs, "show the logs of its processes"},
    {"put", cli_put, "compute documents once and store their KV"},
    {"generate", cli_generate, "answer a prompt over documents in any order"},
    {"status", cli_status, "show nodes and stored segments"},
    {"drop", cli_drop, "forget stored segments"},
    {"value", cli_value, "put, get or drop opaque values by key"},
    {"tokenize", cli_tokenize, "print the token ids of a text"},
    {"eval", cli_eval, "measure fidelity of a level against full recomputation"},
    {"demo", cli_demo, "show reuse end to end on a private cluster"},
};
#define NUM_COMMANDS (sizeof(commands) / sizeof(commands[0]))

static void print_help(FILE *file)
{
    (void)fputs("Usage: redknot COMMAND [OPTION...]\n"
                "RedKnot: a distributed KV cache for LLM inference.\n\n",
                file);
    for (size_t i = 0; i < NUM_COMMANDS; i++) {
        (void)fprintf(file, "  %-10s %s\n", commands[i].name, commands[i].summary);
    }
    (void)fputs(
        "\n`redknot COMMAND --help` tells the options of a command.\n"
        "Every command takes --json and --coordinator ADDR (default " CLI_COORDINATOR_DEFAULT
        ", or $REDKNOT_COORDINATOR).\n"
        "Exit codes: 0 it worked, 1 it failed, 2 wrong usage.\n",
        file);
}

/* Whoever prints checks nothing: a disk that is full shows here, for every command and its help. */
static void close_output(void)
{
    bool failed = ferror(stdout) != 0;
    errno = 0;
    if ((fclose(stdout) != 0 || failed) && errno != EBADF) {
        (void)fprintf(stderr, "redknot: standard output: not everything was written%s%s\n",
                      errno ? ": " : "", errno ? strerror(errno) : "");
        _exit(CLI_FAIL);
    }
}

int main(int argc, char **argv)
{
    static char name[32];
    (void)atexit(close_output);
    rk_log_init("redknot", RK_LOG_LEVEL_ERROR);
    rk_service_init();
    argp_program_version = "redknot " REDKNOT_VERSION;

    if (argc < 2) {
        print_help(stderr);
        return CLI_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-?") == 0 ||
        strcmp(argv[1], "help") == 0) {
        print_help(stdout);
        return CLI_OK;
    }
    if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0) {
        (void)printf("%s\n", argp_program_version);
        return CLI_OK;
    }
    for (size_t i = 0; i < NUM_COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) {
            cli_signals_start();
            (void)snprintf(name, sizeof(name), "redknot %s", argv[1]);
            argv[1] = name;
            return cli_finish(commands[i].run(argc - 1, argv + 1));
        }
    }
    (void)cli_fail("%s: no such command; `redknot --help` lists them", argv[1]);
    return CLI_USAGE;
}
