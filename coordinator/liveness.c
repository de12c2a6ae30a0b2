#include "coordinator/liveness.h"

#define FACTOR_FIRST (1.0 / LIVENESS_STEPS)

bool liveness_failed(struct liveness *liveness, uint32_t failures_max)
{
    liveness->num_passed = 0;
    if (liveness->ejected || ++liveness->num_failed < failures_max) {
        return false;
    }
    liveness->ejected = true;
    return true;
}

bool liveness_passed(struct liveness *liveness, int64_t now_ns)
{
    liveness->num_failed = 0;
    if (!liveness->ejected || ++liveness->num_passed < LIVENESS_PASSES_TO_READMIT) {
        return false;
    }
    liveness->ejected = false;
    liveness->num_passed = 0;
    liveness_came(liveness, false, now_ns);
    return true;
}

void liveness_answered(struct liveness *liveness)
{
    liveness->num_failed = 0;
}

void liveness_came(struct liveness *liveness, bool unknown, int64_t now_ns)
{
    liveness->came_ns = now_ns;
    liveness->unknown_before = unknown;
}

void liveness_announced(struct liveness *liveness)
{
    if (liveness->unknown_before) {
        liveness->came_ns = 0;
        liveness->unknown_before = false;
    }
}

double liveness_factor(const struct liveness *liveness, int64_t slow_start_ns, int64_t now_ns)
{
    int64_t age_ns = now_ns - liveness->came_ns;

    if (liveness->came_ns == 0 || age_ns >= slow_start_ns) {
        return 1.0;
    }
    return FACTOR_FIRST + (1.0 - FACTOR_FIRST) * (double)age_ns / (double)slow_start_ns;
}

double liveness_share(double factor, double factor_max)
{
    /* Stores that came within a moment of each other are alike from the beginning. */
    if (factor_max - factor < 0.5 / LIVENESS_STEPS) {
        return 1.0;
    }
    int steps = (int)(factor / factor_max * LIVENESS_STEPS + 0.5);
    return (double)(steps < 1 ? 1 : steps) / LIVENESS_STEPS;
}
