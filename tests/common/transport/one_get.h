/* A batch of one, for tests: its status is the call's. */
#ifndef TESTS_COMMON_TRANSPORT_ONE_GET_H
#define TESTS_COMMON_TRANSPORT_ONE_GET_H

#include "common/base/clock.h"
#include "common/transport/transport.h"

static inline enum rk_status get_one(struct rk_transport *transport, const struct rk_get *get,
                                     int timeout_ms, struct rk_pages *ret_pages,
                                     struct rk_error *error)
{
    enum rk_status status =
        rk_transport_get(transport, get, 1, rk_deadline_in_ms(timeout_ms), ret_pages, error);
    return status == RK_OK ? ret_pages->status : status;
}

#endif
