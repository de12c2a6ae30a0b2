#include "client/cli/score.h"
#include "client/cli/eval.h"
#include "common/base/alloc.h"

#include <math.h>
#include <string.h>

static bool on_row(void *context, uint32_t row, const float *logprobs, size_t vocab)
{
    struct score_rows *rows = context;
    if (!rows->values) {
        rows->vocab = vocab;
        rows->values = rk_alloc_zero(rows->positions * vocab, sizeof(float));
    }
    if (!rows->values || vocab != rows->vocab || row != rows->next || row >= rows->positions) {
        rows->bad = true;
        return false;
    }
    memcpy(rows->values + (size_t)row * vocab, logprobs, vocab * sizeof(float));
    rows->next++;
    if (rows->progress) {
        rows->progress(rows->context, rows->next, rows->positions);
    }
    return true;
}

void score_rows_clear(struct score_rows *rows)
{
    rk_free(rows->values);
    rows->values = NULL;
}

enum rk_status score_run(struct rk_client *client, const struct rk_score_request *request,
                         struct score_rows *rows, struct rk_report *ret_report,
                         struct rk_error *error)
{
    score_rows_clear(rows);
    rows->positions = request->continuation.num_tokens;
    rows->next = 0;
    rows->bad = false;
    enum rk_status status = rk_client_score(client, request, on_row, rows, ret_report, error);
    if (rows->bad || (status == RK_OK && rows->next != rows->positions)) {
        if (status == RK_OK) {
            rk_report_clear(ret_report);
        }
        status = rk_error_set(error, RK_ERR_INTERNAL,
                              "got %u rows, not the %zu of the continuation, or of another size",
                              rows->next, rows->positions);
    }
    return status;
}

enum rk_status score_compare(const struct score_rows *p, const struct score_rows *q,
                             struct score_distance *ret_distance, struct rk_error *error)
{
    struct score_distance distance = {.kl = 0};
    if (p->vocab != q->vocab || p->positions != q->positions) {
        return rk_error_set(error, RK_ERR_INTERNAL, "the vocabulary's size changed");
    }
    for (size_t i = 0; i < p->positions; i++) {
        const float *p_row = p->values + i * p->vocab;
        const float *q_row = q->values + i * p->vocab;
        double kl = eval_kl(p_row, q_row, p->vocab);
        if (isnan(kl)) {
            return rk_error_set(error, RK_ERR_INTERNAL,
                                "position %zu: log-probabilities that are no numbers", i);
        }
        distance.kl += kl;
        distance.top1 += eval_top1(p_row, p->vocab) == eval_top1(q_row, p->vocab);
    }
    distance.kl /= (double)p->positions;
    distance.top1 /= (double)p->positions;
    *ret_distance = distance;
    return RK_OK;
}
