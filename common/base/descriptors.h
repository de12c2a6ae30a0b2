/*
 * descriptors: what the process may open, and who gets the last of it.
 *
 * A server that takes connections until accept(2) fails has none left for its own work: a call to
 * a store, a file of its database, the question how it fares. So all listeners leave a reserve,
 * told by the number of a fresh descriptor: the kernel hands out the lowest that is free, so with
 * number n at least n others are open.
 *
 * Threads: any.
 */
#ifndef RK_COMMON_BASE_DESCRIPTORS_H
#define RK_COMMON_BASE_DESCRIPTORS_H

#include "common/base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_DESCRIPTORS_MIN 48 /* below it a daemon has none for its clients */

/* Raises the soft limit to the hard one, up to a million. For rk_service_init(). */
void rk_descriptors_raise(void);
/* The soft limit as it is now. */
uint32_t rk_descriptors_limit(void);
/* How many of the last are the process's own: an eighth, at least 8, at most 256. */
uint32_t rk_descriptors_reserve(void);
/* Whether a connection may keep this fresh descriptor. of_reserve: also one of the first half of
 * the reserve, for the few who ask how the process fares. */
bool rk_descriptors_admit(int fd, bool of_reserve);

/*
 * Takes the next connection of a listening socket that does not block: accept4(2), non-blocking and
 * close-on-exec. *spare is a descriptor that the caller keeps for this (-1 at first; close it at
 * the end): when the process is at its limit it is given up to take the connection and end it, for
 * one that nobody takes wakes the listener for ever.
 *
 * RK_ERR_NOT_FOUND: none waits, or it went away. RK_ERR_FULL: descriptors or kernel memory are
 * short, and the connection was ended. RK_ERR_BUSY: likewise, but it still waits: ask again a
 * little later. RK_ERR_IO: the listening socket is none any more (errno says why).
 */
RK_MUST_CHECK enum rk_status rk_descriptors_accept(int listener, int *spare, int *ret_fd);

#ifdef __cplusplus
}
#endif

#endif
