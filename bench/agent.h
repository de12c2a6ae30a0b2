/*
 * agent: the timed end of one peer of bench/data_plane.py.
 *
 * Reads commands from stdin, one a line, and answers each with one line of JSON:
 *
 *   get BYTES BATCH SECONDS    calls that each read BATCH values of BYTES
 *   put BYTES BATCH SECONDS    calls that each write BATCH new values of BYTES
 *   -> {"calls": n, "bytes": all, "seconds": sum of the calls, "p50_us", "p99_us", "cpu_s"}
 *
 * cpu_s is this process's. Work that does not count (loading what is read, touching the memory that
 * is written to, deleting what was written) stands between {"pause": true} and {"resume": true} or
 * the answer; the agent waits after each of the two for a line, so that the driver can look at the
 * server's CPU time.
 *
 * Values carry their key in their first 8 bytes: a get is checked by that, outside of the timing,
 * and all bytes once, when a size is loaded. Whatever goes wrong ends the process.
 */
#ifndef BENCH_AGENT_H
#define BENCH_AGENT_H

#include <stddef.h>
#include <stdint.h>

#define AGENT_FRESH     (UINT64_C(1) << 63) /* set in the keys of the op put */
#define AGENT_BATCH_MAX 64
#define AGENT_SET_BYTES_MAX                                                                        \
    (256u << 20) /* at most so much is loaded, or written and not dropped                          \
                  */

/*
 * A call is about the keys first, first + 1, ... of values of this size; the same key with another
 * size is another value. Calls block.
 */
struct agent_peer {
    /*
     * Into buffer, back to back. A peer that delivers elsewhere sets ret_values[i], which stay
     * until the next call; to NULL, if it has checked the value itself.
     */
    void (*get)(void *context, uint64_t first, size_t batch, size_t bytes, uint8_t *buffer,
                const uint8_t **ret_values);
    /* Back to back. */
    void (*put)(void *context, uint64_t first, size_t batch, size_t bytes, const uint8_t *data);
    /* Keys of one op put. NULL: the peer writes over old values by itself. */
    void (*drop)(void *context, uint64_t first, size_t count, size_t bytes);
};

/* Serves stdin until its end; returns the exit status. */
int agent_run(const struct agent_peer *peer, void *context);

_Noreturn void agent_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
