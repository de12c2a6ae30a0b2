/*
 * score: log-probabilities along a continuation, gathered and compared: for `redknot eval` and for
 * `redknot generate --compare`.
 *
 * Threads: the caller's.
 */
#ifndef CLIENT_CLI_SCORE_H
#define CLIENT_CLI_SCORE_H

#include "client/redknot.h"

/* Called as rows come. */
typedef void (*score_progress)(void *context, uint32_t rows_done, size_t rows_total);

/* Log-probabilities [positions][vocab] of one run. Zeroed is the start. */
struct score_rows {
    float *values;
    size_t positions;
    size_t vocab;
    uint32_t next;
    bool bad;
    score_progress progress; /* or NULL */
    void *context;
};

/* Replaces what rows held. On RK_OK it has all positions, and the caller clears the report. */
RK_MUST_CHECK enum rk_status score_run(struct rk_client *client,
                                       const struct rk_score_request *request,
                                       struct score_rows *rows, struct rk_report *ret_report,
                                       struct rk_error *error);
void score_rows_clear(struct score_rows *rows);

/* Means over the positions. */
struct score_distance {
    double kl;   /* KL(p || q) in nats */
    double top1; /* share of positions with the same likeliest token */
};

/* RK_ERR_INTERNAL when sizes differ, or a value is no number. */
RK_MUST_CHECK enum rk_status score_compare(const struct score_rows *p, const struct score_rows *q,
                                           struct score_distance *ret_distance,
                                           struct rk_error *error);

#endif
