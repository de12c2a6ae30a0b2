/*
 * log: one line per event on stderr, key=value (logfmt), quoted where needed.
 *
 *   RK_LOG_WARN("store_unreachable", "node=%s address=%s reason=%q", id, address, text)
 *
 * %q is ours: a string as a quoted, escaped value, so that text from outside
 * cannot forge a line. %s is quoted as well when it is not one printable word.
 * Everything else is printf. Secrets are never logged.
 *
 * Threads: any; a line is written with one write(2).
 */
#ifndef RK_COMMON_BASE_LOG_H
#define RK_COMMON_BASE_LOG_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum rk_log_level { RK_LOG_LEVEL_DEBUG, RK_LOG_LEVEL_INFO, RK_LOG_LEVEL_WARN, RK_LOG_LEVEL_ERROR };

/* component: such as "kvstore"; kept by pointer. */
void rk_log_init(const char *component, enum rk_log_level level);
/* "debug", "info", "warn", "error"; false for another word. */
bool rk_log_level_parse(const char *word, enum rk_log_level *ret_level);
void rk_log(enum rk_log_level level, const char *event, const char *format, ...);

/*
 * For what may happen a thousand times a second, as at a limit:
 *
 *   static struct rk_log_limit limit;
 *   unsigned more = 0;
 *   if (rk_log_allowed(&limit, &more)) {
 *       RK_LOG_WARN("listener_full", "reason=%q more=%u", reason, more);
 *   }
 *
 * Zeroed is the start. True for the first, then once in ten seconds; *ret_more counts those
 * between.
 */
#define RK_LOG_LIMIT_MS 10000

struct rk_log_limit {
    _Atomic int64_t next_ns;
    atomic_uint dropped;
};

bool rk_log_allowed(struct rk_log_limit *limit, unsigned *ret_more);

#define RK_LOG_DEBUG(...) rk_log(RK_LOG_LEVEL_DEBUG, __VA_ARGS__)
#define RK_LOG_INFO(...)  rk_log(RK_LOG_LEVEL_INFO, __VA_ARGS__)
#define RK_LOG_WARN(...)  rk_log(RK_LOG_LEVEL_WARN, __VA_ARGS__)
#define RK_LOG_ERROR(...) rk_log(RK_LOG_LEVEL_ERROR, __VA_ARGS__)

#ifdef __cplusplus
}
#endif

#endif
