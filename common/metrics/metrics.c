#include "common/metrics/metrics.h"

#include "common/base/alloc.h"
#include "common/base/log.h"
#include "common/base/text.h"
#include "common/metrics/metrics_internal.h"
#include "common/metrics/text_internal.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define BOUNDS_MAX 32

enum kind { KIND_COUNTER, KIND_GAUGE, KIND_HISTOGRAM, KIND_COUNT };

static const char *const kind_names[KIND_COUNT] = {"counter", "gauge", "histogram"};

/* All metrics of one name: HELP and TYPE stand once before them. */
struct family {
    char *name;
    char *help;
    enum kind kind;
    struct rk_metric *first;
    struct rk_metric *last;
    struct family *next;
};

/* bits is a double: the value, or the sum of a histogram. Only bits and buckets change. */
struct rk_metric {
    enum kind kind;
    char *labels; /* NULL: none */
    struct rk_metric *next;
    size_t num_bounds;
    double bounds[BOUNDS_MAX];
    _Atomic uint64_t bits;
    _Atomic uint64_t *buckets; /* [num_bounds + 1], the last is +Inf; histograms only */
};

/* Guards the lists, not the values; see docs/locking.md. A leaf: nothing is called under it. */
static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static struct family *families;
static struct family *families_last;
static size_t num_metrics;
static _Atomic uint64_t num_refused;

/* Where updates go when there is no room; never shown. */
static _Atomic uint64_t sink_bucket;
static struct rk_metric sinks[KIND_COUNT] = {
    {.kind = KIND_COUNTER},
    {.kind = KIND_GAUGE},
    {.kind = KIND_HISTOGRAM, .buckets = &sink_bucket},
};

const double rk_metric_seconds[] = {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005,
                                    0.01,   0.025,   0.05,   0.1,   0.25,   0.5,
                                    1,      2.5,     5,      10,    30,     60};
const size_t rk_metric_seconds_count = sizeof(rk_metric_seconds) / sizeof(rk_metric_seconds[0]);

static struct family *family_find(const char *name)
{
    struct family *family = families;
    while (family && strcmp(family->name, name) != 0) {
        family = family->next;
    }
    return family;
}

static struct rk_metric *metric_find(const struct family *family, const char *labels)
{
    struct rk_metric *metric = family->first;
    while (metric && strcmp(metric->labels ? metric->labels : "", labels) != 0) {
        metric = metric->next;
    }
    return metric;
}

static void family_destroy(struct family *family)
{
    if (family) {
        rk_free(family->name);
        rk_free(family->help);
        rk_free(family);
    }
}

static struct family *family_create(const char *name, const char *help, enum kind kind)
{
    struct family *family = rk_alloc_zero(1, sizeof(*family));
    if (!family) {
        return NULL;
    }
    family->kind = kind;
    family->name = rk_alloc_string(name);
    family->help = rk_alloc_string(help);
    if (!family->name || !family->help) {
        family_destroy(family);
        return NULL;
    }
    return family;
}

static void metric_destroy(struct rk_metric *metric)
{
    if (metric) {
        rk_free(metric->labels);
        rk_free(metric->buckets);
        rk_free(metric);
    }
}

static struct rk_metric *metric_create(enum kind kind, const char *labels, const double *bounds,
                                       size_t num_bounds)
{
    struct rk_metric *metric = rk_alloc_zero(1, sizeof(*metric));
    if (!metric) {
        return NULL;
    }
    metric->kind = kind;
    metric->num_bounds = num_bounds;
    for (size_t i = 0; i < num_bounds; i++) {
        metric->bounds[i] = bounds[i];
    }
    if (kind == KIND_HISTOGRAM) {
        metric->buckets = rk_alloc_zero(num_bounds + 1, sizeof(*metric->buckets));
    }
    if (*labels) {
        metric->labels = rk_alloc_string(labels);
    }
    if ((kind == KIND_HISTOGRAM && !metric->buckets) || (*labels && !metric->labels)) {
        metric_destroy(metric);
        return NULL;
    }
    return metric;
}

/* Under the lock. NULL when there is no room for one more. */
static struct rk_metric *find_or_add(const char *name, const char *help, enum kind kind,
                                     const char *labels, const double *bounds, size_t num_bounds)
{
    struct family *family = family_find(name);
    RK_ASSERT(!family || family->kind == kind);
    struct rk_metric *metric = family ? metric_find(family, labels) : NULL;
    if (metric) {
        return metric;
    }
    if (num_metrics >= RK_METRICS_MAX) {
        return NULL;
    }
    metric = metric_create(kind, labels, bounds, num_bounds);
    if (!metric) {
        return NULL;
    }
    if (!family) {
        family = family_create(name, help, kind);
        if (!family) {
            metric_destroy(metric);
            return NULL;
        }
        *(families ? &families_last->next : &families) = family;
        families_last = family;
    }
    *(family->first ? &family->last->next : &family->first) = metric;
    family->last = metric;
    num_metrics++;
    return metric;
}

/* A histogram's "le" is ours, and its name must not be another family's row. */
static struct rk_metric *metric_register(const char *name, const char *help, enum kind kind,
                                         const char *labels, const double *bounds,
                                         size_t num_bounds)
{
    labels = labels ? labels : "";
    RK_ASSERT(text_is_name(name, strlen(name), true));
    RK_ASSERT(!*labels || text_is_labels(labels));
    RK_ASSERT(num_bounds <= BOUNDS_MAX);
    for (size_t i = 0; i < num_bounds; i++) {
        RK_ASSERT(isfinite(bounds[i]) && (i == 0 || bounds[i - 1] < bounds[i]));
    }

    pthread_mutex_lock(&registry_lock);
    struct rk_metric *metric = find_or_add(name, help, kind, labels, bounds, num_bounds);
    pthread_mutex_unlock(&registry_lock);
    if (metric) {
        return metric;
    }
    /* Once: a caller that asks again and again must not fill the log. */
    if (atomic_fetch_add_explicit(&num_refused, 1, memory_order_relaxed) == 0) {
        RK_LOG_ERROR("metric_refused", "name=%s metrics_max=%d reason=\"no room\"", name,
                     RK_METRICS_MAX);
    }
    return &sinks[kind];
}

struct rk_metric *rk_metric_counter(const char *name, const char *help, const char *labels)
{
    return metric_register(name, help, KIND_COUNTER, labels, NULL, 0);
}

struct rk_metric *rk_metric_gauge(const char *name, const char *help, const char *labels)
{
    return metric_register(name, help, KIND_GAUGE, labels, NULL, 0);
}

struct rk_metric *rk_metric_histogram(const char *name, const char *help, const char *labels,
                                      const double *bounds, size_t num_bounds)
{
    return metric_register(name, help, KIND_HISTOGRAM, labels, bounds, num_bounds);
}

bool rk_metric_label_put(char *labels, size_t labels_bytes, const char *name, const char *value)
{
    size_t before = strlen(labels);
    size_t used = before;
    int head = snprintf(labels + used, labels_bytes - used, "%s%s=\"", before ? "," : "", name);

    RK_ASSERT(text_is_name(name, strlen(name), false));
    if (head < 0 || (size_t)head >= labels_bytes - used) {
        goto too_long;
    }
    used += (size_t)head;
    if (labels_bytes - used < 2) { /* the closing quote and the NUL */
        goto too_long;
    }
    for (const char *p = value; *p;) {
        size_t bytes = rk_utf8_character(p, 4);
        bool escaped = *p == '\\' || *p == '"' || *p == '\n';
        size_t wanted = escaped ? 2 : bytes ? bytes : 1;
        if (labels_bytes - used < wanted + 2) {
            goto too_long;
        }
        if (escaped) {
            labels[used] = '\\';
            labels[used + 1] = *p == '\n' ? 'n' : *p;
        } else if (bytes == 0) {
            labels[used] = '?';
        } else {
            memcpy(labels + used, p, bytes);
        }
        used += wanted;
        p += bytes ? bytes : 1;
    }
    labels[used++] = '"';
    labels[used] = '\0';
    return true;

too_long:
    labels[before] = '\0';
    return false;
}

static double bits_to_double(uint64_t bits)
{
    double value = 0;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static uint64_t double_to_bits(double value)
{
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

/* Relaxed throughout: a metric orders nothing, and a scrape may be one update behind. */
static double value_load(const struct rk_metric *metric)
{
    return bits_to_double(atomic_load_explicit(&metric->bits, memory_order_relaxed));
}

static void value_store(struct rk_metric *metric, double value)
{
    atomic_store_explicit(&metric->bits, double_to_bits(value), memory_order_relaxed);
}

static void value_add(struct rk_metric *metric, double value)
{
    uint64_t seen = atomic_load_explicit(&metric->bits, memory_order_relaxed);
    uint64_t wanted = 0;
    do {
        wanted = double_to_bits(bits_to_double(seen) + value);
    } while (!atomic_compare_exchange_weak_explicit(&metric->bits, &seen, wanted,
                                                    memory_order_relaxed, memory_order_relaxed));
}

void rk_metric_add(struct rk_metric *metric, double value)
{
    RK_ASSERT(metric->kind != KIND_HISTOGRAM);
    if (metric->kind == KIND_COUNTER) {
        if (isnan(value)) {
            return;
        }
        RK_ASSERT(value >= 0);
    }
    value_add(metric, value);
}

void rk_metric_set(struct rk_metric *metric, double value)
{
    RK_ASSERT(metric->kind == KIND_GAUGE);
    value_store(metric, value);
}

void rk_metric_counter_copy(struct rk_metric *metric, double value)
{
    RK_ASSERT(metric->kind == KIND_COUNTER);
    value_store(metric, value);
}

void rk_metric_observe(struct rk_metric *metric, double value)
{
    size_t bucket = 0;
    RK_ASSERT(metric->kind == KIND_HISTOGRAM);
    while (bucket < metric->num_bounds && !(value <= metric->bounds[bucket])) {
        bucket++;
    }
    atomic_fetch_add_explicit(&metric->buckets[bucket], 1, memory_order_relaxed);
    if (!isnan(value)) {
        value_add(metric, value);
    }
}

double rk_metric_value(const struct rk_metric *metric)
{
    if (metric->kind != KIND_HISTOGRAM) {
        return value_load(metric);
    }
    uint64_t count = 0;
    for (size_t i = 0; i <= metric->num_bounds; i++) {
        count += atomic_load_explicit(&metric->buckets[i], memory_order_relaxed);
    }
    return (double)count;
}

/* name suffix {labels, le="bound"} value; le NULL: no such label. */
static void put_sample(struct text *text, const char *name, const char *suffix, const char *labels,
                       const double *le, double value)
{
    text_put(text, name);
    text_put(text, suffix);
    if (labels || le) {
        text_put(text, "{");
        text_put(text, labels ? labels : "");
        if (le) {
            text_put(text, labels ? ",le=\"" : "le=\"");
            text_put_number(text, *le);
            text_put(text, "\"");
        }
        text_put(text, "}");
    }
    text_put(text, " ");
    text_put_number(text, value);
    text_put(text, "\n");
}

/* The count is the last bucket's, so that they agree while others observe. */
static void put_histogram(struct text *text, const char *name, const struct rk_metric *metric)
{
    uint64_t count = 0;
    for (size_t i = 0; i <= metric->num_bounds; i++) {
        double bound = i < metric->num_bounds ? metric->bounds[i] : INFINITY;
        count += atomic_load_explicit(&metric->buckets[i], memory_order_relaxed);
        put_sample(text, name, "_bucket", metric->labels, &bound, (double)count);
    }
    put_sample(text, name, "_sum", metric->labels, NULL, value_load(metric));
    put_sample(text, name, "_count", metric->labels, NULL, (double)count);
}

static void put_head(struct text *text, const char *name, const char *help, enum kind kind)
{
    text_put(text, "# HELP ");
    text_put(text, name);
    text_put(text, " ");
    text_put_help(text, help);
    text_put(text, "\n# TYPE ");
    text_put(text, name);
    text_put(text, " ");
    text_put(text, kind_names[kind]);
    text_put(text, "\n");
}

char *rk_metrics_text(void)
{
    static const char refused[] = "redknot_metrics_refused_total";
    struct text text = {0};

    rk_metrics_process_refresh();
    pthread_mutex_lock(&registry_lock);
    for (const struct family *family = families; family; family = family->next) {
        put_head(&text, family->name, family->help, family->kind);
        for (const struct rk_metric *metric = family->first; metric; metric = metric->next) {
            if (metric->kind == KIND_HISTOGRAM) {
                put_histogram(&text, family->name, metric);
            } else {
                put_sample(&text, family->name, "", metric->labels, NULL, value_load(metric));
            }
        }
    }
    pthread_mutex_unlock(&registry_lock);
    put_head(&text, refused, "Metrics that found no room and are not shown.", KIND_COUNTER);
    put_sample(&text, refused, "", NULL, NULL,
               (double)atomic_load_explicit(&num_refused, memory_order_relaxed));
    return text_take(&text);
}
