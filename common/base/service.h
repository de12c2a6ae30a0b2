/*
 * service: what every daemon needs around its main().
 *
 *   rk_service_init();                 first thing, before any thread
 *   argp_parse(...);                   glibc's argp; wrong usage exits with 2
 *   ... start ...
 *   RK_LOG_INFO("stopping", "signal=%d", rk_service_wait());
 *   ... stop in reverse order ...
 *
 * Threads: rk_service_init() and rk_service_wait() belong to the main thread;
 * the rest is pure or asks the kernel, from any thread.
 */
#ifndef RK_COMMON_BASE_SERVICE_H
#define RK_COMMON_BASE_SERVICE_H

#include "common/base/status.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Blocks SIGTERM and SIGINT, so that all threads started later inherit that and
 * only rk_service_wait() takes them; ignores SIGPIPE, for a lost peer is a status
 * and no reason to die; makes argp exit with 2 when the arguments are wrong; raises the limit of
 * open files to what the process may have.
 */
void rk_service_init(void);

/*
 * For daemons, before they start anything: libraries of theirs end the process without a word, or
 * wait for ever, when they get no descriptor, thread or memory. RK_ERR_FULL, RK_ERR_NO_MEMORY: a
 * limit is lower than what it takes to start; the text says which, and how much it takes.
 * memory_bytes: of address space, with what the program itself reserves.
 */
RK_MUST_CHECK enum rk_status rk_service_check_limits(uint64_t memory_bytes, struct rk_error *error);

/*
 * Waits for SIGTERM or SIGINT and returns its number. The one wait without a
 * deadline: nothing but an operator ends a daemon. From its return on, a second
 * signal ends the process at once, so that a shutdown that hangs can be cut short.
 */
int rk_service_wait(void);

/*
 * "<prefix>-<host>-<8 hex digits>": readable, and unique among processes of one
 * host. Characters of the host's name other than letters, digits, '.' and '-'
 * become '-'. Caller frees with rk_free. NULL when out of memory.
 */
char *rk_service_node_id(const char *prefix);

/* A random number of this run of the process, never 0: tells a restart from a delay. */
uint64_t rk_service_incarnation(void);

/*
 * The cluster that this process was started for: 1 to 64 letters, digits, '-' and '_'; "" until it
 * is set. It goes along when a node registers, and status replies tell it, so that whoever started
 * a process can tell it from another one that took its port. Set once, before any thread.
 */
#define RK_CLUSTER_ID_BYTES 65
RK_MUST_CHECK enum rk_status rk_service_cluster_set(const char *cluster_id, struct rk_error *error);
const char *rk_service_cluster(void);

/*
 * "4096", "4096B", "64KB" (1000s), "512MiB", "2GiB" (1024s); K, M, G or T, in either
 * case, whole numbers. RK_ERR_INVALID says what is wrong, and that "512M" must say
 * which unit it means.
 */
RK_MUST_CHECK enum rk_status rk_size_parse(const char *text, uint64_t *ret_bytes,
                                           struct rk_error *error);

#ifdef __cplusplus
}
#endif

#endif
