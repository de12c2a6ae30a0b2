/*
 * liveness: how far a store that reports is relied on.
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

struct liveness {        /* zero-initialised: warm */
    int64_t came_ns;     /* when slow start began, 0: none */
    bool unknown_before; /* slow start began because we knew nothing of it */
};

/* A new store or incarnation, or one that is back. unknown: the first that we hear of it. */
void liveness_came(struct liveness *liveness, bool unknown, int64_t now_ns);
/* It announced that it holds shards. So if it was unknown, then because we lost our database. */
void liveness_announced(struct liveness *liveness);
/* 1/8 to 1. slow_start_ns 0: always 1. */
double liveness_factor(const struct liveness *liveness, int64_t slow_start_ns, int64_t now_ns);
/* factor / factor_max, rounded to steps of 1/8, one step at least: 1/8 to 1. */
double liveness_share(double factor, double factor_max);

#endif
