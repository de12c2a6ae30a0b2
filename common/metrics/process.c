#include "common/metrics/metrics_internal.h"

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
/* Set once; whoever scrapes does so after rk_metrics_server_start() or not at all. */
static struct {
    struct rk_metric *_Atomic cpu; /* the last one set: others are there when it is */
    struct rk_metric *memory;
    struct rk_metric *files;
} process;

static double clock_seconds(clockid_t clock)
{
    struct timespec now = {0};
    (void)clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Clock ticks from boot to the start of this process: field 22 of /proc/self/stat. */
static bool start_ticks(unsigned long long *ret_ticks)
{
    char line[1024];
    FILE *file = fopen("/proc/self/stat", "re");
    if (!file) {
        return false;
    }
    size_t length = fread(line, 1, sizeof(line) - 1, file);
    (void)fclose(file);
    line[length] = '\0';
    /* The name in field 2 may hold anything, also spaces and brackets; the rest may not. */
    const char *p = strrchr(line, ')');
    for (int field = 2; p && field < 22; field++) {
        p = strchr(p + 1, ' ');
    }
    return p && sscanf(p, " %llu", ret_ticks) == 1; /* NOLINT(cert-err34-c): the kernel's */
}

static double start_time(void)
{
    unsigned long long ticks = 0;
    double age = 0;
    if (start_ticks(&ticks)) {
        age = clock_seconds(CLOCK_BOOTTIME) - (double)ticks / (double)sysconf(_SC_CLK_TCK);
    }
    return clock_seconds(CLOCK_REALTIME) - age;
}

static bool resident_pages(unsigned long long *ret_pages)
{
    FILE *file = fopen("/proc/self/statm", "re");
    if (!file) {
        return false;
    }
    int got = fscanf(file, "%*u %llu", ret_pages); /* NOLINT(cert-err34-c): the kernel's */
    (void)fclose(file);
    return got == 1;
}

static bool open_files(unsigned *ret_count)
{
    unsigned count = 0;
    DIR *directory = opendir("/proc/self/fd");
    if (!directory) {
        return false;
    }
    for (const struct dirent *entry = NULL; (entry = readdir(directory)) != NULL;) {
        count += entry->d_name[0] != '.';
    }
    (void)closedir(directory);
    *ret_count = count - 1; /* The directory itself was open. */
    return true;
}

static void register_all(void)
{
    char labels[64] = "";
    RK_ASSERT(rk_metric_label_put(labels, sizeof(labels), "version", REDKNOT_VERSION));
    rk_metric_set(rk_metric_gauge("redknot_build_info", "Version of RedKnot, always 1.", labels),
                  1);
    rk_metric_set(rk_metric_gauge("process_start_time_seconds",
                                  "Start time of the process since the Unix epoch.", NULL),
                  start_time());
    process.memory =
        rk_metric_gauge("process_resident_memory_bytes", "Resident memory of the process.", NULL);
    process.files = rk_metric_gauge("process_open_fds", "Open file descriptors.", NULL);
    process.cpu = rk_metric_counter("process_cpu_seconds_total",
                                    "User and system CPU time of the process.", NULL);
}

void rk_metrics_process_register(void)
{
    (void)pthread_once(&once, register_all);
}

void rk_metrics_process_refresh(void)
{
    unsigned long long pages = 0;
    unsigned files = 0;
    struct rk_metric *cpu = process.cpu;
    if (!cpu) {
        return;
    }
    rk_metric_counter_copy(cpu, clock_seconds(CLOCK_PROCESS_CPUTIME_ID));
    if (resident_pages(&pages)) {
        rk_metric_set(process.memory, (double)pages * (double)sysconf(_SC_PAGESIZE));
    }
    if (open_files(&files)) {
        rk_metric_set(process.files, files);
    }
}
