#include "client/cli/cli_internal.h"
#include "client/cli/eval_internal.h"

#include <math.h>

/* Sums over requests; kl and top1 are means over all positions of all requests. */
struct summary {
    double kl;
    double top1;
    double flops;
    double flops_full;
    double tokens_computed;
    double bytes_fetched;
    double ttft_full_s;
    double ttft_level_s;
};

static struct summary summarize(const struct eval_result *results, size_t count)
{
    struct summary summary = {.kl = 0};
    double positions = 0;
    for (size_t i = 0; i < count; i++) {
        const struct eval_result *result = &results[i];
        double weight = (double)result->positions;
        positions += weight;
        summary.kl += result->distance.kl * weight;
        summary.top1 += result->distance.top1 * weight;
        summary.flops += result->level.flops;
        summary.flops_full += result->level.flops_full;
        summary.tokens_computed += result->level.tokens_computed;
        summary.bytes_fetched += (double)result->level.bytes_fetched;
        summary.ttft_full_s += result->full.ttft_s;
        summary.ttft_level_s += result->level.ttft_s;
    }
    summary.kl /= positions;
    summary.top1 /= positions;
    summary.ttft_full_s /= (double)count; /* Of one request. */
    summary.ttft_level_s /= (double)count;
    return summary;
}

static double share(double flops, double flops_full)
{
    return flops_full > 0 ? flops / flops_full : 0;
}

/* JSON has no infinity: such a KL is null. */
static json_t *number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

json_t *eval_results_json(const struct eval_result *results, size_t count, const char *level)
{
    json_t *rows = json_array();
    for (size_t i = 0; i < count; i++) {
        const struct eval_result *result = &results[i];
        (void)json_array_append_new(
            rows, json_pack("{s:o, s:f, s:I, s:f, s:I, s:I, s:f, s:f, s:o}", "kl",
                            number(result->distance.kl), "top1", result->distance.top1, "positions",
                            (json_int_t)result->positions, "flops_share",
                            share(result->level.flops, result->level.flops_full), "tokens_computed",
                            (json_int_t)result->level.tokens_computed, "bytes_fetched",
                            (json_int_t)result->level.bytes_fetched, "ttft_full_s",
                            result->full.ttft_s, "ttft_level_s", result->level.ttft_s, "report",
                            cli_report_json(&result->level)));
    }
    struct summary summary = summarize(results, count);
    json_t *total = json_pack("{s:s, s:o, s:f, s:f, s:I, s:I, s:f, s:f}", "level", level, "kl",
                              number(summary.kl), "top1", summary.top1, "flops_share",
                              share(summary.flops, summary.flops_full), "tokens_computed",
                              (json_int_t)summary.tokens_computed, "bytes_fetched",
                              (json_int_t)summary.bytes_fetched, "ttft_full_s", summary.ttft_full_s,
                              "ttft_level_s", summary.ttft_level_s);
    return json_pack("{s:o, s:o}", "requests", rows, "summary", total);
}

void eval_results_print(const struct eval_result *results, size_t count, const char *level)
{
    char bytes[32];
    char full[32];
    char with[32];
    char sources[128];
    (void)printf("%-8s %12s %7s %12s %9s %11s %11s %11s  %s\n", "REQUEST", "KL (nats)", "TOP-1",
                 "FLOPS SHARE", "COMPUTED", "FETCHED", "TTFT FULL", "TTFT LEVEL", "SEGMENTS");
    for (size_t i = 0; i < count; i++) {
        const struct eval_result *result = &results[i];
        cli_report_sources(&result->level, sources, sizeof(sources));
        (void)printf("%-8zu %12.6g %7.4f %12.4f %9u %11s %11s %11s  %s\n", i, result->distance.kl,
                     result->distance.top1, share(result->level.flops, result->level.flops_full),
                     result->level.tokens_computed, cli_bytes(result->level.bytes_fetched, bytes),
                     cli_seconds(result->full.ttft_s, full),
                     cli_seconds(result->level.ttft_s, with), sources);
    }
    struct summary summary = summarize(results, count);
    (void)printf("%-8s %12.6g %7.4f %12.4f %9.0f %11s %11s %11s\n", level, summary.kl, summary.top1,
                 share(summary.flops, summary.flops_full), summary.tokens_computed,
                 cli_bytes((uint64_t)summary.bytes_fetched, bytes),
                 cli_seconds(summary.ttft_full_s, full), cli_seconds(summary.ttft_level_s, with));
}
