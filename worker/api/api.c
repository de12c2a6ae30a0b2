/* The service's state and its metrics. */
#include "worker/api/api_internal.h"

#include "common/base/alloc.h"

#include <stdio.h>

#define PLACES_AHEAD 2 /* so that the next request's pages come while others compute */

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
            metrics->restarts[i] = rk_metric_counter(
                "redknot_worker_restarts_total",
                "Requests that began again because pages were bad or lost, by reason.", labels);
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

static const struct api_kv_ops kv_ops = {
    .locate = rk_kv_locate,
    .get = rk_kv_get,
    .check = rk_kv_pages_check,
    .release = rk_kv_release,
    .put = rk_kv_put,
    .drop_copy = rk_kv_drop_copy,
};

static void scheduler_said(void *context, uint32_t *ret_stalled, uint32_t *ret_queued)
{
    const struct api *api = context;
    struct scheduler_load load;
    scheduler_load(api->options.scheduler, &load);
    *ret_stalled = load.stalled;
    *ret_queued = load.queued;
}

static void set_defaults(struct api_options *options)
{
    options->fetch_timeout_ms = options->fetch_timeout_ms ? options->fetch_timeout_ms : 2000;
    options->publish_timeout_ms = options->publish_timeout_ms ? options->publish_timeout_ms : 10000;
    options->requests_max = options->requests_max ? options->requests_max : 8;
    options->queue_max = options->queue_max ? options->queue_max : 64;
    options->holds_max = options->holds_max ? options->holds_max : 2048;
}

enum rk_status api_create(const struct api_options *options, struct api **ret_api,
                          struct rk_error *error)
{
    struct api *api = rk_alloc_zero(1, sizeof(*api));
    if (!api) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for the service");
    }
    api->options = *options;
    api->kv = options->kv_ops ? options->kv_ops : &kv_ops;
    set_defaults(&api->options);
    atomic_init(&api->stopping, false);
    atomic_init(&api->num_requests, 0);
    engine_layout(options->engine, &api->layout);
    make_metrics(&api->metrics);
    struct admission_options admission = {.places = api->options.requests_max + PLACES_AHEAD,
                                          .holds_max = api->options.holds_max,
                                          .waiting_max = api->options.queue_max,
                                          .load = scheduler_said,
                                          .context = api};
    enum rk_status status = admission_create(&admission, &api->admission, error);
    if (status != RK_OK) {
        rk_free(api);
        return status;
    }
    *ret_api = api;
    return RK_OK;
}

void api_stop(struct api *api)
{
    if (api) {
        atomic_store(&api->stopping, true);
    }
}

void api_destroy(struct api *api)
{
    if (api) {
        admission_destroy(api->admission);
        rk_free(api);
    }
}
