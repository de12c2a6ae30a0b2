/*
 * spin: looking again for a moment before sleeping.
 *
 * To wake a sleeping thread costs more than a short answer takes, above all on
 * virtual machines. So whoever exchanges something looks again for SPIN_NS
 * after the last thing that happened, and gives way to other threads meanwhile;
 * then it sleeps. Nothing spins on an idle connection.
 */
#ifndef RK_COMMON_TRANSPORT_SPIN_INTERNAL_H
#define RK_COMMON_TRANSPORT_SPIN_INTERNAL_H

#include "common/base/clock.h"

#include <sched.h>
#include <stdbool.h>

#define SPIN_NS 50000

struct spin {
    int64_t until_ns;
};

/* Something happened. */
static inline void spin_begin(struct spin *spin)
{
    spin->until_ns = rk_clock_ns() + SPIN_NS;
}

/* False: sleep. */
static inline bool spin_again(const struct spin *spin)
{
    if (rk_clock_ns() >= spin->until_ns) {
        return false;
    }
    (void)sched_yield();
    return true;
}

#endif
