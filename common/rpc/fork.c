/*
 * gRPC in a process that was forked.
 *
 * What gRPC has at the time of a fork is shared by both processes, its set of polled descriptors
 * too: a child that goes on with it, or connects anew, makes its parent jump to the child's
 * addresses, and its own threads are gone. gRPC 1.51 has handlers against that, which Debian does
 * not register; called by hand they still let the parent crash. So a child of a process that used
 * gRPC is refused every channel.
 */
#include "common/rpc/rpc_internal.h"

#include <pthread.h>
#include <stdatomic.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static atomic_bool forked; /* This process is a copy of one that had started gRPC. */

static void in_child(void)
{
    atomic_store(&forked, true);
}

static void handler_add(void)
{
    (void)pthread_atfork(NULL, NULL, in_child);
}

void rpc_fork_watch(void)
{
    (void)pthread_once(&once, handler_add);
}

enum rk_status rpc_fork_check(struct rk_error *error)
{
    return atomic_load(&forked)
               ? rk_error_set(error, RK_ERR_UNSUPPORTED,
                              "gRPC does not work in a process that was forked from one that used "
                              "it: make clients after the fork only, or start the child by exec")
               : RK_OK;
}
