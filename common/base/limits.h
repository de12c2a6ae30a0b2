/*
 * limits: what this process may use, which is often less than what the machine has: its CPU
 * affinity and the quota of its control groups, their memory limits, ulimit -v.
 *
 * A limit that cannot be read counts as none. Control groups are looked at from the process's own
 * up to the root, version 2 and version 1, as they are at the call.
 *
 * Threads: any; reads files, so not for a hot path.
 */
#ifndef RK_COMMON_BASE_LIMITS_H
#define RK_COMMON_BASE_LIMITS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct rk_limits {
    uint32_t cpus;         /* at least 1: threads that may run at once, a quota rounded up */
    uint64_t memory_bytes; /* that may still be taken; UINT64_MAX: no limit is known */
    const char *memory_by; /* who limits it, for messages: "the machine", ... */
};

/* This process. */
void rk_limits_read(struct rk_limits *ret_limits);
/* The same with control groups and /proc below another root: for tests. Affinity and ulimit are
 * always those of this process. */
void rk_limits_read_at(const char *root, struct rk_limits *ret_limits);

#ifdef __cplusplus
}
#endif

#endif
