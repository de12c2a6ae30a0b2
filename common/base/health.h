/*
 * health: what a process says of itself when it is asked whether it is well.
 *
 * Whoever can stop serving while the process lives (a listener, a database) adds a check; /healthz
 * asks them all. A check is a few loads: it runs while others wait, and takes no lock that is held
 * across input or output.
 *
 * Threads: any.
 */
#ifndef RK_COMMON_BASE_HEALTH_H
#define RK_COMMON_BASE_HEALTH_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_HEALTH_REASON_BYTES 160

struct rk_health_check {
    const char *name; /* "grpc"; kept by pointer, as the rest */
    /* True: well. Else the reason, for a person. */
    bool (*well)(void *context, char ret_reason[RK_HEALTH_REASON_BYTES]);
    void *context;
    struct rk_health_check *next; /* ours, while it is added */
};

/* The caller keeps it until it has removed it. */
void rk_health_add(struct rk_health_check *check);
/* None runs any more when it returns. Does nothing for one that was not added. */
void rk_health_remove(struct rk_health_check *check);
/* True: all are well. Else "name: reason" of each that is not, a line for each, cut to the room. */
bool rk_health_ask(char *ret_text, size_t text_bytes);

#ifdef __cplusplus
}
#endif

#endif
