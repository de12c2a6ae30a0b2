/* The service's state and its metrics. */
#include "worker/api/api_internal.h"

#include "common/base/alloc.h"

#include <stdio.h>

static void make_metrics(struct api_metrics *metrics)
{
    static const char *const calls[API_CALLS] = {
        [API_PUT] = "call=\"PutSegment\"",
        [API_GENERATE] = "call=\"Generate\"",
        [API_SCORE] = "call=\"Score\"",
    };
    for (int i = 0; i < API_CALLS; i++) {
        metrics->requests[i] =
            rk_metric_counter("redknot_worker_requests_total", "Requests that ended.", calls[i]);
        metrics->failures[i] = rk_metric_counter("redknot_worker_request_failures_total",
                                                 "Requests that ended with an error.", calls[i]);
    }
    for (int i = 0; i < RK_STATUS_COUNT; i++) {
        if (rk_status_is_miss((enum rk_status)i)) {
            char labels[64];
            (void)snprintf(labels, sizeof(labels), "reason=\"%s\"",
                           rk_status_name((enum rk_status)i));
            metrics->misses[i] =
                rk_metric_counter("redknot_worker_segment_misses_total",
                                  "Segments that could not be reused, by reason.", labels);
        }
    }
    for (int i = 0; i < 4; i++) {
        char labels[64];
        (void)snprintf(labels, sizeof(labels), "path=\"%s\"", rk_path_name((enum rk_path)i));
        metrics->bytes_fetched[i] = rk_metric_counter("redknot_worker_fetched_bytes_total",
                                                      "KV bytes fetched from stores.", labels);
    }
    metrics->ttft = rk_metric_histogram("redknot_worker_ttft_seconds",
                                        "From a request's arrival to its first token.", NULL,
                                        rk_metric_seconds, rk_metric_seconds_count);
    metrics->fetch =
        rk_metric_histogram("redknot_worker_fetch_seconds", "Time a request waited for cached KV.",
                            NULL, rk_metric_seconds, rk_metric_seconds_count);
    metrics->tokens_computed = rk_metric_counter("redknot_worker_prompt_tokens_computed_total",
                                                 "Prompt tokens run through the model.", NULL);
    metrics->tokens_reused = rk_metric_counter("redknot_worker_prompt_tokens_reused_total",
                                               "Prompt tokens whose KV was reused.", NULL);
    metrics->tokens_generated =
        rk_metric_counter("redknot_worker_tokens_generated_total", "Tokens generated.", NULL);
    metrics->published = rk_metric_counter("redknot_worker_segments_published_total",
                                           "Segments stored after they were computed.", NULL);
    metrics->publish_failures = rk_metric_counter("redknot_worker_publish_failures_total",
                                                  "Segments that could not be stored.", NULL);
}

enum rk_status api_create(const struct api_options *options, struct api **ret_api,
                          struct rk_error *error)
{
    struct api *api = rk_alloc_zero(1, sizeof(*api));
    if (!api) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the service");
    }
    api->options = *options;
    if (api->options.fetch_timeout_ms == 0) {
        api->options.fetch_timeout_ms = 2000;
    }
    if (api->options.publish_timeout_ms == 0) {
        api->options.publish_timeout_ms = 10000;
    }
    engine_layout(options->engine, &api->layout);
    make_metrics(&api->metrics);
    *ret_api = api;
    return RK_OK;
}

void api_destroy(struct api *api)
{
    rk_free(api);
}
