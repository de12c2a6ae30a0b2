/* A batch of one, for tests: its status is the call's. */
#ifndef TESTS_COMMON_TRANSPORT_ONE_GET_H
#define TESTS_COMMON_TRANSPORT_ONE_GET_H

#include "common/base/clock.h"
#include "common/transport/transport.h"

static inline enum rk_status get_one(struct rk_transport *transport, const struct rk_get *get,
                                     int timeout_ms, struct rk_pages *ret_pages,
                                     struct rk_error *error)
{
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(timeout_ms)};
    enum rk_status status = rk_transport_get(transport, get, 1, &until, ret_pages, error);
    return status == RK_OK ? ret_pages->status : status;
}

/* A caller who loses interest at a point of time. */
static inline bool cancelled_since(void *context)
{
    const int64_t *when_ns = context;
    return rk_clock_ns() >= *when_ns;
}

/* As get_one, for a caller who would wait for a minute and changes its mind after 50 ms. */
static inline enum rk_status get_one_cancelled(struct rk_transport *transport,
                                               const struct rk_get *get, int64_t *ret_ms)
{
    int64_t begin_ns = rk_clock_ns();
    int64_t when_ns = begin_ns + INT64_C(50000000);
    struct rk_pages pages = {0};
    const struct rk_until until = {
        .deadline_ns = rk_deadline_in_ms(60000), .cancelled = cancelled_since, .context = &when_ns};
    enum rk_status status = rk_transport_get(transport, get, 1, &until, &pages, NULL);
    *ret_ms = (rk_clock_ns() - begin_ns) / 1000000;
    return status;
}

#endif
