/* What /proc tells: of a process, of our daemons, and of who listens on a port. */
#include "client/cli/cluster_internal.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define TCP_LISTEN 0x0A /* state in /proc/net/tcp */

static ssize_t read_proc(pid_t pid, const char *name, char *text, size_t room)
{
    char path[64];
    (void)snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return -1;
    }
    ssize_t bytes = read(fd, text, room - 1);
    (void)close(fd);
    text[bytes > 0 ? bytes : 0] = 0;
    return bytes;
}

static bool link_of(pid_t pid, const char *name, char ret_target[PATH_MAX])
{
    char path[64];
    char target[PATH_MAX]; /* gcc takes ret_target for NULL where UBSan asks whether it is */
    (void)snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, name);
    ssize_t bytes = readlink(path, target, sizeof(target) - 1);
    target[bytes > 0 ? bytes : 0] = 0;
    memcpy(ret_target, target, (size_t)(bytes > 0 ? bytes : 0) + 1);
    /* A program that was built again while it ran has " (deleted)" behind its name. */
    char *deleted = strstr(ret_target, " (deleted)");
    if (deleted && deleted[strlen(" (deleted)")] == 0) {
        *deleted = 0;
    }
    return bytes > 0;
}

/* proc(5): the name may hold anything, so fields are counted behind its last parenthesis. */
static char *stat_field(char *text, int number)
{
    char *field = strrchr(text, ')');
    if (!field || field[1] != ' ') {
        return NULL;
    }
    field += 2;
    for (int i = 3; i < number && field; i++) { /* Field 3 is the state. */
        field = strchr(field, ' ');
        field = field ? field + 1 : NULL;
    }
    return field;
}

char proc_state(pid_t pid)
{
    char text[1024];
    char *field = read_proc(pid, "stat", text, sizeof(text)) > 0 ? stat_field(text, 3) : NULL;
    return field ? *field : 0;
}

uint64_t process_start_time(pid_t pid)
{
    char text[1024];
    if (read_proc(pid, "stat", text, sizeof(text)) <= 0) {
        return 0;
    }
    char *state = stat_field(text, 3);
    char *field = stat_field(text, 22);
    return field && *state != 'Z' && *state != 'X' ? strtoull(field, NULL, 10) : 0;
}

bool proc_program(pid_t pid, char ret_program[PATH_MAX])
{
    return link_of(pid, "exe", ret_program);
}

bool proc_is_ours(pid_t pid)
{
    char path[64];
    struct stat info;
    (void)snprintf(path, sizeof(path), "/proc/%d", (int)pid);
    return stat(path, &info) == 0 && info.st_uid == geteuid();
}

/* ---- Our daemons ---- */

bool cluster_role_of_program(const char *program, enum cluster_role *ret_role)
{
    const char *slash = strrchr(program, '/');
    const char *name = slash ? slash + 1 : program;
    for (int role = CLUSTER_COORDINATOR; role <= CLUSTER_WORKER; role++) {
        if (strcmp(name, cluster_program_name((enum cluster_role)role)) == 0) {
            *ret_role = (enum cluster_role)role;
            return true;
        }
    }
    return false;
}

/* "--listen X" and "--listen=X" among the arguments, which lie back to back. */
static void argument_of(const char *arguments, size_t bytes, const char *option, char *ret_value,
                        size_t room)
{
    size_t length = strlen(option);
    ret_value[0] = 0;
    for (size_t at = 0; at < bytes; at += strlen(arguments + at) + 1) {
        const char *word = arguments + at;
        if (strncmp(word, option, length) != 0) {
            continue;
        }
        if (word[length] == '=') {
            (void)snprintf(ret_value, room, "%s", word + length + 1);
        } else if (word[length] == 0 && at + length + 1 < bytes) {
            (void)snprintf(ret_value, room, "%s", word + length + 1);
        }
    }
}

static bool daemon_read(pid_t pid, struct proc_daemon *daemon)
{
    char arguments[8192];
    struct cluster_process *process = &daemon->process;
    memset(daemon, 0, sizeof(*daemon));
    if (!proc_is_ours(pid) || !proc_program(pid, process->program) ||
        !cluster_role_of_program(process->program, &process->role)) {
        return false;
    }
    ssize_t bytes = read_proc(pid, "cmdline", arguments, sizeof(arguments));
    process->pid = pid;
    process->start_time = process_start_time(pid);
    (void)link_of(pid, "fd/1", process->log);
    if (bytes <= 0 || process->start_time == 0) {
        return false;
    }
    argument_of(arguments, (size_t)bytes, "--node-id", process->node_id, sizeof(process->node_id));
    argument_of(arguments, (size_t)bytes, "--listen", process->address, sizeof(process->address));
    argument_of(arguments, (size_t)bytes, "--metrics", process->metrics, sizeof(process->metrics));
    argument_of(arguments, (size_t)bytes, "--coordinator", daemon->coordinator,
                sizeof(daemon->coordinator));
    if (process->role == CLUSTER_COORDINATOR) {
        (void)snprintf(process->node_id, sizeof(process->node_id), "coordinator");
    }
    return true;
}

void proc_each_daemon(void (*visit)(void *context, const struct proc_daemon *daemon), void *context)
{
    DIR *folder = opendir("/proc");
    struct dirent *entry = NULL;
    struct proc_daemon daemon;
    while (folder && (entry = readdir(folder))) {
        pid_t pid = (pid_t)strtol(entry->d_name, NULL, 10);
        if (isdigit((unsigned char)entry->d_name[0]) && daemon_read(pid, &daemon)) {
            visit(context, &daemon);
        }
    }
    if (folder) {
        (void)closedir(folder);
    }
}

/* ---- Who listens ---- */

/* "sl: local:port remote:port state queues timer retransmits uid timeout inode ...", all but the
 * last two in hex; 0 unless it listens on the port. */
static unsigned long inode_of_line(char *line, uint16_t port)
{
    enum { LOCAL = 1, STATE = 3, INODE = 9 };
    const char *fields[INODE + 1] = {NULL};
    char *state = NULL;
    int count = 0;
    for (char *field = strtok_r(line, " ", &state); field && count <= INODE;
         field = strtok_r(NULL, " ", &state)) {
        fields[count++] = field;
    }
    const char *colon = count > INODE ? strrchr(fields[LOCAL], ':') : NULL;
    if (!colon || strtoul(colon + 1, NULL, 16) != port ||
        strtoul(fields[STATE], NULL, 16) != TCP_LISTEN) {
        return 0;
    }
    return strtoul(fields[INODE], NULL, 10);
}

/* Inode of the socket that listens on the port; 0: none. Any address counts: 0.0.0.0 takes it. */
static unsigned long listening_inode(const char *table, uint16_t port)
{
    char line[512];
    unsigned long found = 0;
    FILE *file = fopen(table, "re");
    while (file && !found && fgets(line, sizeof(line), file)) {
        found = inode_of_line(line, port);
    }
    if (file) {
        (void)fclose(file);
    }
    return found;
}

static bool holds_socket(pid_t pid, unsigned long inode)
{
    char path[64];
    char wanted[64];
    bool found = false;
    (void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    (void)snprintf(wanted, sizeof(wanted), "socket:[%lu]", inode);
    DIR *folder = opendir(path);
    struct dirent *entry = NULL;
    while (folder && !found && (entry = readdir(folder))) {
        char target[64];
        ssize_t bytes = readlinkat(dirfd(folder), entry->d_name, target, sizeof(target) - 1);
        target[bytes > 0 ? bytes : 0] = 0;
        found = strcmp(target, wanted) == 0;
    }
    if (folder) {
        (void)closedir(folder);
    }
    return found;
}

bool proc_port_listener(uint16_t port, pid_t *ret_pid)
{
    unsigned long inode = listening_inode("/proc/net/tcp", port);
    inode = inode ? inode : listening_inode("/proc/net/tcp6", port);
    *ret_pid = 0;
    DIR *folder = inode ? opendir("/proc") : NULL;
    struct dirent *entry = NULL;
    while (folder && *ret_pid == 0 && (entry = readdir(folder))) {
        pid_t pid = (pid_t)strtol(entry->d_name, NULL, 10);
        if (isdigit((unsigned char)entry->d_name[0]) && holds_socket(pid, inode)) {
            *ret_pid = pid;
        }
    }
    if (folder) {
        (void)closedir(folder);
    }
    return inode != 0;
}

bool proc_is_ending(pid_t pid)
{
    char path[64];
    char program[8];
    (void)snprintf(path, sizeof(path), "/proc/%d/exe", (int)pid);
    return readlink(path, program, sizeof(program)) < 0 && errno == ENOENT;
}

void proc_describe(pid_t pid, char *ret_text, size_t room)
{
    char arguments[256];
    ssize_t bytes = pid > 0 ? read_proc(pid, "cmdline", arguments, sizeof(arguments)) : 0;
    if (pid <= 0) {
        (void)snprintf(ret_text, room, "a process of another user");
        return;
    }
    for (ssize_t i = 0; i + 1 < bytes;
         i++) { /* Whatever stands there must not act on a terminal. */
        unsigned char c = (unsigned char)arguments[i];
        arguments[i] = c < ' ' || c == 127 ? ' ' : arguments[i];
    }
    (void)snprintf(ret_text, room, "process %d (%s)", (int)pid, bytes > 0 ? arguments : "?");
}
