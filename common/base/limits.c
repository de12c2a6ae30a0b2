#include "common/base/limits.h"

#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define PATH_MAX_BYTES 1024
#define CPUS_MAX       8192

/* One file's text; false: it is not there. */
static bool read_text(const char *path, char *ret_text, size_t bytes)
{
    FILE *file = fopen(path, "re");
    if (!file) {
        return false;
    }
    size_t length = fread(ret_text, 1, bytes - 1, file);
    ret_text[length] = '\0';
    (void)fclose(file);
    return length > 0;
}

/* The number behind `label` at the beginning of a line. "max" and the like are no numbers. */
static bool find_number(const char *text, const char *label, uint64_t *ret_number)
{
    size_t length = strlen(label);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, label, length) == 0) {
            char *end = NULL;
            unsigned long long number = strtoull(line + length, &end, 10);
            if (end != line + length && line[length] != '-') {
                *ret_number = number;
                return true;
            }
        }
        if (*line == '\0') {
            return false;
        }
    }
    return false;
}

static bool read_number(const char *folder, const char *name, const char *label,
                        uint64_t *ret_number)
{
    char path[PATH_MAX_BYTES + 64];
    char text[8192];
    (void)snprintf(path, sizeof(path), "%s/%s", folder, name);
    return read_text(path, text, sizeof(text)) && find_number(text, label, ret_number);
}

static void lower_memory(struct rk_limits *limits, uint64_t bytes, const char *by)
{
    if (bytes < limits->memory_bytes) {
        limits->memory_bytes = bytes;
        limits->memory_by = by;
    }
}

/* What a group may still take. Files that nobody uses now count as used, but are given back. */
static void memory_of_group(const char *folder, bool v2, struct rk_limits *limits)
{
    uint64_t max = 0;
    uint64_t used = 0;
    uint64_t files = 0;
    if (!read_number(folder, v2 ? "memory.max" : "memory.limit_in_bytes", "", &max) ||
        !read_number(folder, v2 ? "memory.current" : "memory.usage_in_bytes", "", &used)) {
        return;
    }
    (void)read_number(folder, "memory.stat", v2 ? "inactive_file " : "total_inactive_file ",
                      &files);
    used -= files < used ? files : used;
    lower_memory(limits, max > used ? max - used : 0, "the memory limit of its control group");
}

static void cpus_of_group(const char *folder, bool v2, struct rk_limits *limits)
{
    uint64_t quota = 0;
    uint64_t period = 0;
    char path[PATH_MAX_BYTES + 64];
    char text[128];
    if (v2) {
        (void)snprintf(path, sizeof(path), "%s/cpu.max", folder);
        char *end = text;
        if (!read_text(path, text, sizeof(text))) {
            return;
        }
        quota = strtoull(text, &end, 10); /* "max" gives 0 */
        period = strtoull(end, NULL, 10);
    } else if (!read_number(folder, "cpu.cfs_quota_us", "", &quota) ||
               !read_number(folder, "cpu.cfs_period_us", "", &period)) {
        return;
    }
    if (quota > 0 && period > 0) {
        uint64_t cpus = quota / period + (quota % period != 0);
        limits->cpus = cpus < limits->cpus ? (uint32_t)cpus : limits->cpus;
    }
}

/* From the group `path` below `mount` up to the mount itself, which is all that a container sees.
 */
static void walk_up(const char *mount, const char *path,
                    void (*look)(const char *folder, bool v2, struct rk_limits *limits), bool v2,
                    struct rk_limits *limits)
{
    char folder[PATH_MAX_BYTES];
    int length = snprintf(folder, sizeof(folder), "%s%s", mount, path);
    if (length < 0 || (size_t)length >= sizeof(folder)) {
        (void)snprintf(folder, sizeof(folder), "%s", mount);
    }
    size_t root = strlen(mount);
    for (;;) {
        look(folder, v2, limits);
        char *slash = strrchr(folder, '/');
        if (!slash || (size_t)(slash - folder) < root) {
            return;
        }
        *slash = '\0';
    }
}

static bool has_word(const char *list, const char *word)
{
    size_t length = strlen(word);
    for (const char *at = list; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, word, length) == 0 && (at[length] == ',' || at[length] == '\0')) {
            return true;
        }
        if (*at == '\0') {
            return false;
        }
    }
    return false;
}

/* A line of /proc/self/cgroup: "0::/path" (version 2) or "4:cpu,cpuacct:/path". */
static void look_at_line(const char *root, char *line, struct rk_limits *limits)
{
    char mount[PATH_MAX_BYTES / 2];
    char *controllers = strchr(line, ':');
    char *path = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!path) {
        return;
    }
    controllers++;
    *path++ = '\0';
    if (*controllers == '\0') {
        (void)snprintf(mount, sizeof(mount), "%s/sys/fs/cgroup", root);
        walk_up(mount, path, memory_of_group, true, limits);
        walk_up(mount, path, cpus_of_group, true, limits);
    } else if (has_word(controllers, "memory")) {
        (void)snprintf(mount, sizeof(mount), "%s/sys/fs/cgroup/memory", root);
        walk_up(mount, path, memory_of_group, false, limits);
    } else if (has_word(controllers, "cpu")) {
        (void)snprintf(mount, sizeof(mount), "%s/sys/fs/cgroup/cpu", root);
        walk_up(mount, path, cpus_of_group, false, limits);
    }
}

static uint32_t cpus_by_affinity(void)
{
    uint32_t count = 0;
    cpu_set_t *set = CPU_ALLOC(CPUS_MAX);
    if (set) {
        if (sched_getaffinity(0, CPU_ALLOC_SIZE(CPUS_MAX), set) == 0) {
            count = (uint32_t)CPU_COUNT_S(CPU_ALLOC_SIZE(CPUS_MAX), set);
        }
        CPU_FREE(set);
    }
    if (count == 0) {
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        count = online > 0 ? (uint32_t)online : 1;
    }
    return count;
}

/* What ulimit -v leaves; false: it sets no limit. */
static bool address_space_left(uint64_t *ret_bytes)
{
    struct rlimit limit;
    char text[128];
    unsigned long long pages = 0;
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
        return false;
    }
    if (read_text("/proc/self/statm", text, sizeof(text))) {
        pages = strtoull(text, NULL, 10);
    }
    uint64_t used = pages * (uint64_t)sysconf(_SC_PAGESIZE);
    *ret_bytes = limit.rlim_cur > used ? limit.rlim_cur - used : 0;
    return true;
}

void rk_limits_read_at(const char *root, struct rk_limits *ret_limits)
{
    char path[PATH_MAX_BYTES];
    char text[8192];
    char *rest = NULL;
    uint64_t number = 0;
    struct rk_limits limits = {.cpus = cpus_by_affinity(), .memory_bytes = UINT64_MAX};
    limits.memory_by = "nothing";

    (void)snprintf(path, sizeof(path), "%s/proc/meminfo", root);
    if (read_text(path, text, sizeof(text)) && find_number(text, "MemAvailable:", &number)) {
        lower_memory(&limits, number * 1024, "the machine's free memory");
    }
    (void)snprintf(path, sizeof(path), "%s/proc/self/cgroup", root);
    if (read_text(path, text, sizeof(text))) {
        for (char *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
            look_at_line(root, line, &limits);
        }
    }
    if (address_space_left(&number)) {
        lower_memory(&limits, number, "ulimit -v");
    }
    *ret_limits = limits;
}

void rk_limits_read(struct rk_limits *ret_limits)
{
    rk_limits_read_at("", ret_limits);
}
