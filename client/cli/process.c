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

/* Of a program that was built again while it runs, the name is the same and the file is not. */
static bool runs_program(const struct cluster_process *process)
{
    char program[PATH_MAX];
    enum cluster_role role = CLUSTER_COORDINATOR;
    return cluster_role_of_program(process->program, &role) && role == process->role &&
           proc_is_ours(process->pid) && proc_program(process->pid, program) &&
           strcmp(program, process->program) == 0;
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

bool process_runs(const struct cluster_process *process)
{
    int pidfd = process_open(process);
    if (pidfd >= 0) {
        (void)close(pidfd);
    }
    return pidfd >= 0;
}

void process_terminate(int pidfd)
{
    (void)pidfd_send_signal(pidfd, SIGTERM, NULL, 0);
    (void)pidfd_send_signal(pidfd, SIGCONT, NULL, 0); /* A stopped one would never take it. */
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

static int spawn(char *const argv[], int log_fd, pid_t *ret_pid)
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
        rc = posix_spawn_file_actions_adddup2(&actions, log_fd, 1);
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

enum rk_status process_spawn(struct cluster_process *process, char *const argv[], int log_fd,
                             struct rk_error *error)
{
    pid_t pid = 0;
    int rc = spawn(argv, log_fd, &pid);
    if (rc != 0) {
        return rk_error_set(error, RK_ERR_IO, "%s: %s; it must lie beside the redknot program",
                            argv[0], strerror(rc));
    }
    process->pid = pid;
    process->start_time = process_start_time(pid);
    return RK_OK;
}
