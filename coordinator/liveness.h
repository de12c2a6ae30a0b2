/*
 * liveness: how far a store that reports is relied on.
 *
 * Ejection: heartbeats tell that its process runs, answers to probes and calls
 * tell that it serves. Enough failures in a row eject a store: it is alive and
 * yet not used, until it passes probes again (active and passive health checks,
 * as of Envoy's outlier detection).
 *
 * Slow start: a store that has just come gets little at first, so that the keys
 * which are new to it do not all arrive at once: its weight is multiplied by a
 * factor that grows linearly from 1/8 to 1. Factors count against the highest
 * of the cluster only; stores that came together share alike from the beginning.
 *
 * Threads: none of its own; the coordinator's index lock guards every call.
 */
#ifndef RK_COORDINATOR_LIVENESS_H
#define RK_COORDINATOR_LIVENESS_H

#include <stdbool.h>
#include <stdint.h>

#define LIVENESS_STEPS 8 /* that a listed share has; the first one is where slow start begins */

#define LIVENESS_PASSES_TO_READMIT 2

struct liveness {        /* zero-initialised: warm, not ejected */
    uint32_t num_failed; /* in a row, while not ejected */
    uint32_t num_passed; /* in a row, while ejected */
    bool ejected;
    bool connected;      /* the last probe could be sent */
    int64_t came_ns;     /* when slow start began, 0: none */
    bool unknown_before; /* slow start began because we knew nothing of it */
};

/* A probe or a call failed. True: that ejected it. */
bool liveness_failed(struct liveness *liveness, uint32_t failures_max);
/* A probe was answered. True: that readmitted it. Slow start begins. */
bool liveness_passed(struct liveness *liveness, int64_t now_ns);
/* Another call was answered, which is not enough to readmit it. */
void liveness_answered(struct liveness *liveness);

/* A new store or incarnation, or one that is back. unknown: the first that we hear of it. */
void liveness_came(struct liveness *liveness, bool unknown, int64_t now_ns);
/* It announced that it holds shards. So if it was unknown, then because we lost our database. */
void liveness_announced(struct liveness *liveness);
/* 1/8 to 1. slow_start_ns 0: always 1. */
double liveness_factor(const struct liveness *liveness, int64_t slow_start_ns, int64_t now_ns);
/* factor / factor_max, rounded to steps of 1/8, one step at least: 1/8 to 1. 1 when they differ by
 * less than half a step. */
double liveness_share(double factor, double factor_max);

#endif
