/*
 * spin: looking again for a moment before sleeping.
 *
 * To wake a sleeping thread costs more than a short answer takes, above all on
 * virtual machines. So whoever exchanges something looks again for up to 100 us
 * after the last thing that happened, and then sleeps. Nothing spins on an idle
 * connection.
 *
 * Who looked in vain some times in a row sleeps at once, but for a try now and
 * then, until one succeeds. In between it yields, for the other end may wait for
 * this very core. On a busy machine that gives away a slice of milliseconds,
 * while a sleeper is woken at once: then it does not yield for a second.
 */
#ifndef RK_COMMON_TRANSPORT_SPIN_INTERNAL_H
#define RK_COMMON_TRANSPORT_SPIN_INTERNAL_H

#include "common/base/clock.h"

#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

#define SPIN_NS          100000
#define SPIN_IN_VAIN     8          /* so many times in a row, and then only */
#define SPIN_TRY         16         /* each so many times */
#define SPIN_SLICE_NS    1000000    /* a yield that took so long gave away a slice */
#define SPIN_NO_YIELD_NS 1000000000 /* then none for so long */

struct spin { /* zeroed at first */
    int64_t until_ns;
    int64_t yield_ns; /* from then on it yields */
    uint32_t in_vain;
    bool looking;
};

/* Something happened. */
static inline void spin_begin(struct spin *spin)
{
    if (spin->looking) {
        spin->looking = false;
        spin->in_vain = 0;
    }
    bool worth_it = spin->in_vain < SPIN_IN_VAIN || ++spin->in_vain % SPIN_TRY == 0;
    spin->until_ns = worth_it ? rk_clock_ns() + SPIN_NS : 0;
}

/* False: sleep. */
static inline bool spin_again(struct spin *spin)
{
    int64_t now_ns = spin->until_ns > 0 ? rk_clock_ns() : 0;
    if (now_ns < spin->until_ns) {
        spin->looking = true;
        if (now_ns >= spin->yield_ns) {
            (void)sched_yield();
            int64_t then_ns = rk_clock_ns();
            spin->yield_ns = then_ns - now_ns > SPIN_SLICE_NS ? then_ns + SPIN_NO_YIELD_NS : 0;
        }
        return true;
    }
    if (spin->looking) {
        spin->looking = false;
        spin->in_vain++;
    }
    return false;
}

#endif
