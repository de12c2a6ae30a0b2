/*
 * eval_internal: what `redknot eval` found, as a table or as JSON.
 */
#ifndef CLIENT_CLI_EVAL_INTERNAL_H
#define CLIENT_CLI_EVAL_INTERNAL_H

#include "client/cli/score.h"

#include <jansson.h>

/* Of one request. */
struct eval_result {
    struct score_distance distance; /* means over the positions of its continuation */
    size_t positions;
    struct rk_report full;
    struct rk_report level;
};

/* {"requests": [...], "summary": {...}} */
json_t *eval_results_json(const struct eval_result *results, size_t count, const char *level);
void eval_results_print(const struct eval_result *results, size_t count, const char *level);

#endif
