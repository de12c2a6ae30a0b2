/*
 * metrics: counters, gauges and histograms of a process, served as Prometheus
 * text at http://ADDRESS/metrics (and /healthz) by libmicrohttpd, its only user.
 *
 * Names follow Prometheus: redknot_<component>_<what>_<base unit>[_total].
 * Metrics live as long as the process; create them at start.
 * Threads: updates are atomic and lock-free, from any thread.
 */
#ifndef RK_COMMON_METRICS_METRICS_H
#define RK_COMMON_METRICS_METRICS_H

#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct rk_metric;
struct rk_metrics_server;

/* At most this many metrics (name and labels) in a process. */
#define RK_METRICS_MAX 2048

/* labels: ready-made `reason="MISS_EVICTED",path="shm"` or NULL. Equal name and
 * labels give the same metric. Strings are copied. Never NULL: when memory is out
 * or RK_METRICS_MAX is reached, the answer is one shared metric of that kind that
 * takes updates and is never shown; redknot_metrics_refused_total counts them.
 * A malformed name or labels, or one name of two kinds, is our own mistake and
 * aborts; text from outside goes through rk_metric_label_put(). */
struct rk_metric *rk_metric_counter(const char *name, const char *help, const char *labels);
struct rk_metric *rk_metric_gauge(const char *name, const char *help, const char *labels);
/* bounds: ascending upper bounds, num_bounds <= 32; +Inf is added. */
struct rk_metric *rk_metric_histogram(const char *name, const char *help, const char *labels,
                                      const double *bounds, size_t num_bounds);
/* Bounds for durations in seconds, 100 us to 60 s. */
extern const double rk_metric_seconds[];
extern const size_t rk_metric_seconds_count;

/*
 * Appends name="value" to labels, with a comma where needed and the value escaped,
 * so that any text can be a value; bytes that are not UTF-8 become '?'. labels
 * starts as an empty string. False, and labels as before, when it does not fit.
 * Values from outside must come from a bounded set: each one is a time series.
 */
RK_MUST_CHECK bool rk_metric_label_put(char *labels, size_t labels_bytes, const char *name,
                                       const char *value);

/* A counter takes no negative value (asserted). NaN is left out of a counter. */
void rk_metric_add(struct rk_metric *metric, double value); /* counter, gauge */
void rk_metric_set(struct rk_metric *metric, double value); /* gauge */
/* NaN counts in +Inf and is left out of the sum, so that one cannot spoil it for good. */
void rk_metric_observe(struct rk_metric *metric, double value); /* histogram */
double rk_metric_value(const struct rk_metric *metric); /* counter, gauge; histogram: its count */

/* The whole text; caller frees with rk_free. NULL when out of memory. */
char *rk_metrics_text(void);

/* Also registers process_* metrics (CPU, resident memory, open files, start time)
 * and redknot_build_info. Listens on this address only: "127.0.0.1:9101"; port 0
 * picks a free one. RK_ERR_INVALID: not host:port; RK_ERR_IO: cannot listen there. */
RK_MUST_CHECK enum rk_status rk_metrics_server_start(const char *address,
                                                     struct rk_metrics_server **ret_server,
                                                     struct rk_error *error);
int rk_metrics_server_port(const struct rk_metrics_server *server);
void rk_metrics_server_stop(struct rk_metrics_server *server); /* frees it; accepts NULL */

#endif
