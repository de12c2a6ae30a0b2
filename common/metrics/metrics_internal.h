/*
 * Between the registry (metrics.c) and the HTTP server (server.c).
 */
#ifndef RK_COMMON_METRICS_METRICS_INTERNAL_H
#define RK_COMMON_METRICS_METRICS_INTERNAL_H

#include "common/metrics/metrics.h"

/* Registers process_* and redknot_build_info; calls after the first do nothing. */
void rk_metrics_process_register(void);
/* Reads the process_* values anew, if registered; what cannot be read keeps its value. */
void rk_metrics_process_refresh(void);
/* A counter kept elsewhere, such as the kernel's CPU time: takes over its value. */
void rk_metric_counter_copy(struct rk_metric *metric, double value);

#endif
