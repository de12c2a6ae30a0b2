/*
 * Goal:   a process takes what it may use, not what the machine has.
 * Method: control groups as files in a folder, version 2 and version 1, nested, with limits above
 * and below; affinity and ulimit -v in a child process, for real.
 */
#include "common/base/limits.h"

#include <limits.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define MIB (UINT64_C(1) << 20)

static char root[64];

static int make_root(void **state)
{
    (void)state;
    (void)strcpy(root, "/tmp/redknot-limits-XXXXXX");
    return mkdtemp(root) ? 0 : 1;
}

static int remove_root(void **state)
{
    char command[128];
    (void)state;
    (void)snprintf(command, sizeof(command), "rm -rf '%s'", root);
    return system(command);
}

/* Writes a file and the folders above it. */
static void put(const char *path, const char *text)
{
    char whole[256];
    (void)snprintf(whole, sizeof(whole), "%s%s", root, path);
    for (char *slash = whole + strlen(root) + 1; (slash = strchr(slash, '/')) != NULL; slash++) {
        *slash = '\0';
        (void)mkdir(whole, 0700);
        *slash = '/';
    }
    FILE *file = fopen(whole, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static uint32_t affinity(void)
{
    cpu_set_t set;
    assert_int_equal(sched_getaffinity(0, sizeof(set), &set), 0);
    return (uint32_t)CPU_COUNT(&set);
}

static void without_groups_the_machine_counts(void **state)
{
    struct rk_limits limits;
    (void)state;
    rk_limits_read_at(root, &limits);
    assert_int_equal(limits.cpus, affinity());
    assert_true(limits.memory_bytes == UINT64_MAX);
    put("/proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    4096 kB\nBuffers: 1 kB\n");
    rk_limits_read_at(root, &limits);
    assert_int_equal(limits.memory_bytes, 4 * MIB);
    assert_non_null(strstr(limits.memory_by, "machine"));
}

static void version_2(void **state)
{
    struct rk_limits limits;
    (void)state;
    put("/proc/meminfo", "MemAvailable: 1048576 kB\n");
    put("/proc/self/cgroup", "0::/user/job\n");
    put("/sys/fs/cgroup/user/job/memory.max", "max\n");
    put("/sys/fs/cgroup/user/job/memory.current", "1000\n");
    put("/sys/fs/cgroup/user/job/cpu.max", "max 100000\n");
    rk_limits_read_at(root, &limits);
    assert_int_equal(limits.memory_bytes, 1024 * MIB);
    assert_int_equal(limits.cpus, affinity());
    /* The group above limits it: 200 MiB, of which 150 are used, of these 30 by idle files. */
    put("/sys/fs/cgroup/user/memory.max", "209715200\n");
    put("/sys/fs/cgroup/user/memory.current", "157286400\n");
    put("/sys/fs/cgroup/user/memory.stat", "anon 5\ninactive_file 31457280\nactive_file 7\n");
    put("/sys/fs/cgroup/user/cpu.max", "50000 100000\n");
    rk_limits_read_at(root, &limits);
    assert_int_equal(limits.memory_bytes, 80 * MIB);
    assert_non_null(strstr(limits.memory_by, "control group"));
    assert_int_equal(limits.cpus, 1);
    /* Its own group is tighter still. */
    put("/sys/fs/cgroup/user/job/memory.max", "1000\n");
    rk_limits_read_at(root, &limits);
    assert_int_equal(limits.memory_bytes, 0);
}

static void version_1(void **state)
{
    struct rk_limits limits;
    (void)state;
    put("/proc/self/cgroup", "9:name=systemd:/\n4:memory:/box/a:b\n1:cpu,cpuacct:/box\n0::/\n");
    put("/sys/fs/cgroup/memory/box/a:b/memory.limit_in_bytes", "104857600\n");
    put("/sys/fs/cgroup/memory/box/a:b/memory.usage_in_bytes", "52428800\n");
    put("/sys/fs/cgroup/memory/box/a:b/memory.stat", "total_inactive_file 10485760\n");
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    put("/sys/fs/cgroup/memory/memory.usage_in_bytes", "5\n");
    put("/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "-1\n");
    put("/sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n");
    rk_limits_read_at(root, &limits);
    assert_int_equal(limits.memory_bytes, 60 * MIB);
    assert_int_equal(limits.cpus, affinity());
    put("/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "100000\n");
    rk_limits_read_at(root, &limits);
    assert_int_equal(limits.cpus, 1);
}

/* A container whose group is named by a path that it cannot see: the mount's root is looked at. */
static void paths_that_are_not_there(void **state)
{
    struct rk_limits limits;
    char text[PATH_MAX + 16];
    (void)state;
    put("/proc/self/cgroup", "0::/docker/0123/not/here\n");
    put("/sys/fs/cgroup/memory.max", "2097152\n");
    put("/sys/fs/cgroup/memory.current", "1048576\n");
    rk_limits_read_at(root, &limits);
    assert_int_equal(limits.memory_bytes, 1 * MIB);
    memset(text, 'x', sizeof(text));
    memcpy(text, "0::/", 4);
    text[sizeof(text) - 1] = '\0';
    put("/proc/self/cgroup", text);
    rk_limits_read_at(root, &limits);
    assert_int_equal(limits.memory_bytes, 1 * MIB);
    put("/proc/self/cgroup", "nonsense\n:\n::\n\n7:memory\n");
    put("/sys/fs/cgroup/memory.max", "-5\n");
    rk_limits_read_at(root, &limits);
}

static int in_child(int (*run)(void))
{
    int code = 0;
    pid_t pid = fork();
    if (pid == 0) {
        _exit(run());
    }
    assert_true(pid > 0 && waitpid(pid, &code, 0) == pid);
    return WIFEXITED(code) ? WEXITSTATUS(code) : -1;
}

static int one_cpu(void)
{
    cpu_set_t set;
    cpu_set_t mine;
    struct rk_limits limits;
    int first = 0;
    (void)sched_getaffinity(0, sizeof(mine), &mine);
    while (!CPU_ISSET(first, &mine)) {
        first++;
    }
    CPU_ZERO(&set);
    CPU_SET(first, &set);
    if (sched_setaffinity(0, sizeof(set), &set) != 0) {
        return 1;
    }
    rk_limits_read(&limits);
    return limits.cpus == 1 ? 0 : 2;
}

static int little_address_space(void)
{
#ifdef REDKNOT_SANITIZED
    return 0; /* A sanitizer's shadow is larger than any limit. */
#else
    struct rlimit limit = {300 * MIB, 300 * MIB};
    struct rk_limits limits;
    if (setrlimit(RLIMIT_AS, &limit) != 0) {
        return 2;
    }
    rk_limits_read(&limits);
    if (limits.memory_bytes >= 300 * MIB || strcmp(limits.memory_by, "ulimit -v") != 0) {
        return 3;
    }
    return 0;
#endif
}

static void the_processes_own_limits(void **state)
{
    struct rlimit limit;
    (void)state;
    assert_int_equal(in_child(one_cpu), 0);
    assert_int_equal(getrlimit(RLIMIT_AS, &limit), 0);
    if (limit.rlim_cur == RLIM_INFINITY) {
        assert_int_equal(in_child(little_address_space), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(without_groups_the_machine_counts, make_root, remove_root),
        cmocka_unit_test_setup_teardown(version_2, make_root, remove_root),
        cmocka_unit_test_setup_teardown(version_1, make_root, remove_root),
        cmocka_unit_test_setup_teardown(paths_that_are_not_there, make_root, remove_root),
        cmocka_unit_test(the_processes_own_limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
