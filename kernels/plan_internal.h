/*
 * plan_internal: the memory of plan.c, which a plan allocates once.
 */
#ifndef KERNELS_PLAN_INTERNAL_H
#define KERNELS_PLAN_INTERNAL_H

#include "kernels/device_internal.h"

/* False when memory is out. tiles_max: (KV head, request, tile) of any batch of the options. */
RK_MUST_CHECK bool plan_scratch_create(struct kernels_plan *plan, uint32_t tiles_max);
void plan_scratch_destroy(struct kernels_plan *plan); /* accepts a plan without scratch */
/* Empties the plan; what an upload then carries has no work in it. */
void plan_clear(struct kernels_plan *plan);

#endif
