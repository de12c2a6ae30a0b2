/*
 * clock: monotonic time and deadlines.
 *
 * A deadline is a point of monotonic time in nanoseconds; RK_DEADLINE_NEVER is
 * for tests only: every wait in a service has one.
 */
#ifndef RK_COMMON_BASE_CLOCK_H
#define RK_COMMON_BASE_CLOCK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_DEADLINE_NEVER INT64_MAX

int64_t rk_clock_ns(void); /* monotonic */
double rk_clock_s(void);   /* monotonic, seconds */
int64_t rk_deadline_in_ms(int64_t timeout_ms);
/* Milliseconds left, rounded up, 0 if passed, at most INT_MAX: fits poll(2). */
int rk_deadline_left_ms(int64_t deadline_ns);
void rk_clock_sleep_ms(int64_t ms);

#ifdef __cplusplus
}
#endif

#endif
