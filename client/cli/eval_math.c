#include "client/cli/eval.h"

#include <math.h>

static double log_sum_exp(const float *logprobs, size_t vocab)
{
    double most = -INFINITY;
    double sum = 0;
    for (size_t i = 0; i < vocab; i++) {
        if (isnan(logprobs[i])) {
            return NAN;
        }
        most = logprobs[i] > most ? logprobs[i] : most;
    }
    if (!isfinite(most)) {
        return NAN;
    }
    for (size_t i = 0; i < vocab; i++) {
        sum += exp(logprobs[i] - most);
    }
    return most + log(sum);
}

double eval_kl(const float *p, const float *q, size_t vocab)
{
    double p_sum = log_sum_exp(p, vocab);
    double q_sum = log_sum_exp(q, vocab);
    if (isnan(p_sum) || isnan(q_sum)) {
        return NAN;
    }
    double kl = 0;
    for (size_t i = 0; i < vocab; i++) {
        double log_p = p[i] - p_sum;
        if (isinf(log_p)) {
            continue; /* 0 log 0 = 0 */
        }
        kl += exp(log_p) * (log_p - (q[i] - q_sum));
    }
    return kl;
}

size_t eval_top1(const float *logprobs, size_t vocab)
{
    size_t best = 0;
    for (size_t i = 1; i < vocab; i++) {
        if (logprobs[i] > logprobs[best]) {
            best = i;
        }
    }
    return best;
}
