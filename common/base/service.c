#include "common/base/service.h"

#include "common/base/alloc.h"
#include "common/base/descriptors.h"

#include <argp.h>
#include <ctype.h>
#include <errno.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <unistd.h>

#define MALLOC_KEEP_BYTES (32 << 20)

static sigset_t stop_signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    return set;
}

void rk_service_init(void)
{
    /* Messages of megabytes come and go: their memory stays ours, for fresh pages must be cleared
     * by the kernel first, which costs more than to copy them. */
    (void)mallopt(M_MMAP_THRESHOLD, MALLOC_KEEP_BYTES);
    (void)mallopt(M_TRIM_THRESHOLD, MALLOC_KEEP_BYTES);
    sigset_t set = stop_signals();
    struct sigaction ignore = {.sa_handler = SIG_IGN};

    RK_ASSERT(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    RK_ASSERT(sigaction(SIGPIPE, &ignore, NULL) == 0);
    argp_err_exit_status = 2;
    rk_descriptors_raise();
}

enum rk_status rk_service_check_limits(uint64_t memory_bytes, struct rk_error *error)
{
    struct rlimit memory;
    uint32_t descriptors = rk_descriptors_limit();
    if (descriptors < RK_DESCRIPTORS_MIN) {
        return rk_error_set(
            error, RK_ERR_FULL,
            "this process may open %u files, and needs %u at least: raise the limit "
            "(ulimit -n, or LimitNOFILE= of its service)",
            descriptors, RK_DESCRIPTORS_MIN);
    }
    if (getrlimit(RLIMIT_AS, &memory) == 0 && memory.rlim_cur != RLIM_INFINITY &&
        memory.rlim_cur < memory_bytes) {
        return rk_error_set(
            error, RK_ERR_NO_MEMORY,
            "this process may map %llu MiB of memory, and needs %llu at least: raise "
            "the limit (ulimit -v, or LimitAS= of its service)",
            (unsigned long long)memory.rlim_cur >> 20, (unsigned long long)memory_bytes >> 20);
    }
    return RK_OK;
}

int rk_service_wait(void)
{
    sigset_t set = stop_signals();
    int taken = 0;

    while (sigwait(&set, &taken) != 0) {
    }
    /* A signal goes to any thread that lets it through; this one now does. */
    RK_ASSERT(pthread_sigmask(SIG_UNBLOCK, &set, NULL) == 0);
    return taken;
}

static void random_bytes(void *ret_bytes, size_t bytes)
{
    ssize_t got = 0;
    do {
        got = getrandom(ret_bytes, bytes, 0);
    } while (got < 0 && errno == EINTR);
    /* Up to 256 bytes come whole; a kernel without getrandom is not one that we run on. */
    RK_ASSERT(got == (ssize_t)bytes);
}

char *rk_service_node_id(const char *prefix)
{
    char host[65]; /* HOST_NAME_MAX of Linux, and the final NUL */
    uint32_t suffix = 0;

    if (gethostname(host, sizeof(host)) != 0 || host[0] == '\0') {
        (void)snprintf(host, sizeof(host), "localhost");
    }
    host[sizeof(host) - 1] = '\0';
    for (char *p = host; *p; p++) {
        if (!isalnum((unsigned char)*p) && *p != '.') {
            *p = '-';
        }
    }
    random_bytes(&suffix, sizeof(suffix));
    return rk_alloc_format("%s-%s-%08x", prefix, host, suffix);
}

uint64_t rk_service_incarnation(void)
{
    uint64_t number = 0;
    while (number == 0) {
        random_bytes(&number, sizeof(number));
    }
    return number;
}

static char cluster[RK_CLUSTER_ID_BYTES];

enum rk_status rk_service_cluster_set(const char *cluster_id, struct rk_error *error)
{
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_";
    size_t length = strlen(cluster_id);
    if (length == 0 || length >= sizeof(cluster) || strspn(cluster_id, allowed) != length) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "--cluster: a cluster's id has 1 to %d letters, digits, '-' and '_'",
                            RK_CLUSTER_ID_BYTES - 1);
    }
    memcpy(cluster, cluster_id, length + 1);
    return RK_OK;
}

const char *rk_service_cluster(void)
{
    return cluster;
}

static const struct {
    const char *name;
    uint64_t bytes;
} units[] = {
    {"", 1},
    {"B", 1},
    {"KB", 1000},
    {"MB", 1000 * 1000},
    {"GB", 1000 * 1000 * 1000},
    {"TB", UINT64_C(1000) * 1000 * 1000 * 1000},
    {"KiB", UINT64_C(1) << 10},
    {"MiB", UINT64_C(1) << 20},
    {"GiB", UINT64_C(1) << 30},
    {"TiB", UINT64_C(1) << 40},
};

enum rk_status rk_size_parse(const char *text, uint64_t *ret_bytes, struct rk_error *error)
{
    uint64_t number = 0;
    const char *unit = text;

    for (; isdigit((unsigned char)*unit); unit++) {
        if (__builtin_mul_overflow(number, UINT64_C(10), &number) ||
            __builtin_add_overflow(number, (uint64_t)(*unit - '0'), &number)) {
            return rk_error_set(error, RK_ERR_INVALID, "size '%s': larger than 2^64 - 1", text);
        }
    }
    if (unit == text) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "size '%s': must be a whole number and a unit, such as 512MiB", text);
    }
    for (size_t i = 0; i < sizeof(units) / sizeof(units[0]); i++) {
        if (strcasecmp(unit, units[i].name) != 0) {
            continue;
        }
        if (__builtin_mul_overflow(number, units[i].bytes, &number)) {
            return rk_error_set(error, RK_ERR_INVALID, "size '%s': larger than 2^64 - 1 bytes",
                                text);
        }
        *ret_bytes = number;
        return RK_OK;
    }
    return rk_error_set(error, RK_ERR_INVALID,
                        "size '%s': unknown unit '%s'; use B, KB, MB, GB, TB (1000s) or KiB, MiB, "
                        "GiB, TiB (1024s)",
                        text, unit);
}
