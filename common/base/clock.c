#include "common/base/clock.h"

#include <errno.h>
#include <limits.h>
#include <time.h>

int64_t rk_clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

double rk_clock_s(void)
{
    return (double)rk_clock_ns() * 1e-9;
}

int64_t rk_deadline_in_ms(int64_t timeout_ms)
{
    return rk_clock_ns() + timeout_ms * 1000000;
}

int rk_deadline_left_ms(int64_t deadline_ns)
{
    if (deadline_ns == RK_DEADLINE_NEVER) {
        return INT_MAX;
    }
    int64_t left = deadline_ns - rk_clock_ns();
    if (left <= 0) {
        return 0;
    }
    int64_t ms = (left + 999999) / 1000000;
    return ms > INT_MAX ? INT_MAX : (int)ms;
}

void rk_clock_sleep_ms(int64_t ms)
{
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
}
