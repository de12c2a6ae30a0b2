/*
 * Whether this store's values may be out of date without its knowledge.
 *
 * A store that was stopped for a while may have been left out of the list that clients go on with:
 * what they dropped and put since, it has not heard of. When it goes on it has requests in its
 * sockets, from before and from readers with an old list, before it can hear anything. So it
 * notices by itself that time went by, and neither gives nor takes values until the coordinator
 * answered a question that was asked after that; and for a moment, for what was in the sockets.
 */
#include "kvstore/kvstore_internal.h"

#include "common/base/clock.h"

#define TICK_MISSED_NS INT64_C(1000000000) /* below any timeout after which it is left out */
#define HOLD_NS        INT64_C(1000000000)

bool kvstore_values_doubted(struct kvstore *store)
{
    struct values_doubt *doubt = &store->doubt;
    if (!doubt->watched) {
        return false;
    }
    int64_t now_ns = rk_clock_ns();
    if (now_ns - doubt->ticked_ns > TICK_MISSED_NS) {
        doubt->doubted = true;
        doubt->since_ns = now_ns;
        doubt->count++;
        doubt->ticked_ns = now_ns;
    }
    return doubt->doubted;
}

void kvstore_values_watch(struct kvstore *store)
{
    kvstore_lock(store);
    store->doubt.watched = true;
    store->doubt.ticked_ns = rk_clock_ns();
    kvstore_unlock(store);
}

uint64_t kvstore_values_tick(struct kvstore *store, bool *ret_sure)
{
    kvstore_lock(store);
    *ret_sure = !kvstore_values_doubted(store);
    store->doubt.ticked_ns = rk_clock_ns();
    uint64_t count = store->doubt.count;
    kvstore_unlock(store);
    return count;
}

void kvstore_values_trust(struct kvstore *store, uint64_t count)
{
    kvstore_lock(store);
    struct values_doubt *doubt = &store->doubt;
    if (kvstore_values_doubted(store) && doubt->count == count &&
        rk_clock_ns() - doubt->since_ns >= HOLD_NS) {
        doubt->doubted = false;
    }
    kvstore_unlock(store);
}
