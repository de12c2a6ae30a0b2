#include "client/cli/cluster_internal.h"
#include "common/base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/wait.h>
#include <unistd.h>

uint64_t process_start_time(pid_t pid)
{
    char path[64];
    char text[1024];
    (void)snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return 0;
    }
    ssize_t bytes = read(fd, text, sizeof(text) - 1);
    (void)close(fd);
    if (bytes <= 0) {
        return 0;
    }
    text[bytes] = 0;
    /* proc(5): the name may hold anything, so fields are counted behind its last parenthesis. */
    char *field = strrchr(text, ')');
    if (!field || field[1] != ' ' || field[2] == 'Z' || field[2] == 'X') {
        return 0;
    }
    field += 2;
    for (int i = 3; i < 22; i++) { /* Field 3 is the state, field 22 the start time. */
        field = strchr(field, ' ');
        if (!field) {
            return 0;
        }
        field++;
    }
    return strtoull(field, NULL, 10);
}

static bool runs_program(const struct cluster_process *process)
{
    char path[64];
    char program[PATH_MAX];
    (void)snprintf(path, sizeof(path), "/proc/%d/exe", (int)process->pid);
    ssize_t bytes = readlink(path, program, sizeof(program) - 1);
    if (bytes < 0) {
        return false;
    }
    program[bytes] = 0;
    size_t length = strlen(process->program);
    /* A program that was built again while it ran has " (deleted)" behind its name. */
    return strncmp(program, process->program, length) == 0 &&
           (program[length] == 0 || strcmp(program + length, " (deleted)") == 0);
}

int process_open(const struct cluster_process *process)
{
    if (process->pid <= 0) {
        return -1;
    }
    int pidfd = pidfd_open(process->pid, 0); /* First: then the pid cannot change hands. */
    if (pidfd < 0) {
        return -1;
    }
    if (process_start_time(process->pid) != process->start_time || !runs_program(process)) {
        (void)close(pidfd);
        return -1;
    }
    return pidfd;
}

bool process_wait(int pidfd, int64_t deadline_ns)
{
    struct pollfd wait = {.fd = pidfd, .events = POLLIN};
    for (;;) {
        int ready = poll(&wait, 1, rk_deadline_left_ms(deadline_ns));
        if (ready > 0) {
            return true;
        }
        if (ready == 0 || errno != EINTR) {
            return false;
        }
    }
}

void process_reap(void)
{
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
}

static int spawn(const struct cluster_process *process, char *const argv[], pid_t *ret_pid)
{
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none;
    sigset_t defaults;
    (void)sigemptyset(&none);
    (void)sigemptyset(&defaults);
    (void)sigaddset(&defaults, SIGPIPE);
    int rc = posix_spawn_file_actions_init(&actions);
    if (rc != 0) {
        return rc;
    }
    rc = posix_spawnattr_init(&attributes);
    if (rc != 0) {
        (void)posix_spawn_file_actions_destroy(&actions);
        return rc;
    }
    /* A session of its own: Ctrl-C at the terminal is ours to handle, and closing it harmless. */
    (void)posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK |
                                                    POSIX_SPAWN_SETSIGDEF);
    (void)posix_spawnattr_setsigmask(&attributes, &none);
    (void)posix_spawnattr_setsigdefault(&attributes, &defaults);
    rc = posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    if (rc == 0) {
        rc = posix_spawn_file_actions_addopen(&actions, 1, process->log,
                                              O_WRONLY | O_CREAT | O_APPEND, 0600);
    }
    if (rc == 0) {
        rc = posix_spawn_file_actions_adddup2(&actions, 1, 2);
    }
    if (rc == 0) {
        rc = posix_spawn(ret_pid, argv[0], &actions, &attributes, argv, environ);
    }
    (void)posix_spawnattr_destroy(&attributes);
    (void)posix_spawn_file_actions_destroy(&actions);
    return rc;
}

enum rk_status process_spawn(struct cluster_process *process, char *const argv[],
                             struct rk_error *error)
{
    pid_t pid = 0;
    int rc = spawn(process, argv, &pid);
    if (rc != 0) {
        return rk_error_set(error, RK_ERR_IO, "%s: %s; it must lie beside the redknot program",
                            argv[0], strerror(rc));
    }
    process->pid = pid;
    process->start_time = process_start_time(pid);
    return RK_OK;
}
