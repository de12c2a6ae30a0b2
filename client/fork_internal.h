/*
 * fork_internal: a client belongs to the process that made it.
 *
 * A copy made by fork() shares its parent's connections: two processes that ask on one connection
 * get each other's answers. So a copy is refused whatever it asks, its releases go nowhere, and
 * destroying it touches nothing; its memory stays, since locks in it may have been held by threads
 * that the child does not have.
 */
#ifndef CLIENT_FORK_INTERNAL_H
#define CLIENT_FORK_INTERNAL_H

#include "common/base/status.h"

#include <stdbool.h>
#include <unistd.h>

static inline bool rk_is_copy(pid_t maker)
{
    return getpid() != maker;
}

static inline enum rk_status rk_copy_refuse(struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_INVALID,
                        "this client was made before fork() and serves the process that made it: "
                        "make clients after the fork only, or start the child by exec");
}

#endif
