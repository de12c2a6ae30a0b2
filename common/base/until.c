#include "common/base/until.h"

#include <stddef.h>

enum rk_status rk_until_over(const struct rk_until *until)
{
    if (until->cancelled && until->cancelled(until->context)) {
        return RK_ERR_CANCELLED;
    }
    return rk_clock_ns() >= until->deadline_ns ? RK_ERR_DEADLINE : RK_OK;
}

int64_t rk_until_slice_ns(const struct rk_until *until)
{
    int64_t slice_ns = rk_deadline_in_ms(RK_UNTIL_SLICE_MS);
    return until->cancelled && slice_ns < until->deadline_ns ? slice_ns : until->deadline_ns;
}

struct rk_until rk_until_sooner(const struct rk_until *until, int64_t deadline_ns)
{
    struct rk_until sooner = *until;
    if (deadline_ns < sooner.deadline_ns) {
        sooner.deadline_ns = deadline_ns;
    }
    return sooner;
}
