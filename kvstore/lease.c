/*
 * Whether this store's values may be out of date without its knowledge.
 *
 * A store that the coordinator has not heard for a while is left out of the list that clients go on
 * with: what they drop and put from then on, it does not hear of. But readers with an older list
 * still ask it, and a store that was stopped has requests in its sockets from before. So it gives
 * and takes values on a lease: an answer of the coordinator renews it for a time that counts from
 * when the question was sent, and so long the coordinator leaves the store in its list. While
 * nobody listens at the coordinator's address nobody is left out: that extends it. A lease that
 * ended is renewed a second later at the earliest, for what was in the sockets.
 */
#include "kvstore/kvstore_internal.h"

#include "common/base/clock.h"

#define HOLD_NS INT64_C(1000000000)

bool kvstore_values_doubted(struct kvstore *store)
{
    struct values_lease *lease = &store->lease;
    if (lease->until_ns == 0 || rk_clock_ns() <= lease->until_ns) {
        return false;
    }
    if (lease->ended_ns == 0) {
        lease->ended_ns = rk_clock_ns();
    }
    return true;
}

void kvstore_values_renew(struct kvstore *store, int64_t until_ns)
{
    kvstore_lock(store);
    struct values_lease *lease = &store->lease;
    bool ended = kvstore_values_doubted(store);
    if (!ended || rk_clock_ns() - lease->ended_ns >= HOLD_NS) {
        lease->until_ns = lease->until_ns > until_ns ? lease->until_ns : until_ns;
        lease->ended_ns = rk_clock_ns() <= lease->until_ns ? 0 : lease->ended_ns;
    }
    kvstore_unlock(store);
}

void kvstore_values_extend(struct kvstore *store, int64_t until_ns)
{
    kvstore_lock(store);
    struct values_lease *lease = &store->lease;
    if (!kvstore_values_doubted(store) && lease->until_ns < until_ns) {
        lease->until_ns = until_ns;
    }
    kvstore_unlock(store);
}

bool kvstore_values_sure(struct kvstore *store)
{
    kvstore_lock(store);
    bool sure = !kvstore_values_doubted(store);
    kvstore_unlock(store);
    return sure;
}
