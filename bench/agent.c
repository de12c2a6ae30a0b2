#include "bench/agent.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <malloc.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define ALIGNMENT       4096
#define CALLS_MAX       (1u << 20)
#define CALLS_MIN       3
#define SIZES_MAX       16
#define LOAD_BYTES      (128u << 20)
#define LOAD_VALUES_MAX 1024
#define TOUCH_BYTES     (1u << 20)
#define TOUCH_BATCH     16

struct agent {
    const struct agent_peer *peer;
    void *context;
    uint8_t *source; /* what is written: one batch */
    uint8_t *buffer; /* what is read */
    size_t room;
    struct loaded {
        size_t bytes;
        size_t count; /* keys 0 .. count - 1 */
    } loaded[SIZES_MAX];
    uint64_t fresh; /* the next key of the op put */
    bool touched;
    double *latencies;
};

/* One command. */
struct task {
    bool put;
    size_t bytes;
    size_t batch;
    double seconds;
};

void agent_fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    (void)vfprintf(stderr, format, args);
    va_end(args);
    (void)fputc('\n', stderr);
    exit(1);
}

static double cpu_seconds(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* The driver looks at the server while nothing happens. */
static void tell(const char *what)
{
    char line[16];
    printf("{\"%s\": true}\n", what);
    (void)fflush(stdout);
    if (!fgets(line, sizeof(line), stdin)) {
        exit(0);
    }
}

static void buffers_reserve(struct agent *agent, size_t bytes)
{
    if (bytes <= agent->room) {
        return;
    }
    rk_free(agent->source);
    rk_free(agent->buffer);
    agent->source = rk_alloc_aligned(ALIGNMENT, bytes);
    agent->buffer = rk_alloc_aligned(ALIGNMENT, bytes);
    if (!agent->source || !agent->buffer) {
        agent_fail("no memory for a batch of %zu bytes", bytes);
    }
    agent->room = bytes;
    uint64_t state = 1;
    for (size_t i = 0; i + sizeof(state) <= bytes; i += sizeof(state)) {
        state = state * 6364136223846793005 + 1442695040888963407;
        memcpy(agent->source + i, &state, sizeof(state));
    }
    memset(agent->buffer, 0, bytes);
}

static void stamp(struct agent *agent, const struct task *task, uint64_t first)
{
    for (size_t i = 0; i < task->batch; i++, first++) {
        memcpy(agent->source + i * task->bytes, &first, sizeof(first));
    }
}

static void check(const struct agent *agent, const struct task *task, uint64_t first,
                  const uint8_t *const *values, bool whole)
{
    for (size_t i = 0; i < task->batch; i++) {
        uint64_t key = first + i;
        if (!values[i]) {
            continue;
        }
        bool good = memcmp(values[i], &key, sizeof(key)) == 0;
        if (good && whole) {
            good = memcmp(values[i] + sizeof(key), agent->source + i * task->bytes + sizeof(key),
                          task->bytes - sizeof(key)) == 0;
        }
        if (!good) {
            agent_fail("value %zu of %zu bytes is not what was put", (size_t)key, task->bytes);
        }
    }
}

/* Seconds of the call. */
static double get(struct agent *agent, const struct task *task, uint64_t first, bool whole)
{
    const uint8_t *values[AGENT_BATCH_MAX];
    for (size_t i = 0; i < task->batch; i++) {
        values[i] = agent->buffer + i * task->bytes;
    }
    double begin = rk_clock_s();
    agent->peer->get(agent->context, first, task->batch, task->bytes, agent->buffer, values);
    double seconds = rk_clock_s() - begin;
    check(agent, task, first, values, whole);
    return seconds;
}

static double put(struct agent *agent, const struct task *task, uint64_t first)
{
    stamp(agent, task, first);
    double begin = rk_clock_s();
    agent->peer->put(agent->context, first, task->batch, task->bytes, agent->source);
    return rk_clock_s() - begin;
}

/* How many values there are to read; writes them when there are too few yet. */
static size_t load(struct agent *agent, const struct task *task)
{
    size_t count = LOAD_BYTES / task->bytes;
    count = count < LOAD_VALUES_MAX ? count : LOAD_VALUES_MAX;
    count = count > 2 * task->batch ? count - count % task->batch : 2 * task->batch;
    struct loaded *entry = agent->loaded;
    while (entry->bytes != task->bytes && entry->bytes != 0) {
        if (++entry == agent->loaded + SIZES_MAX) {
            agent_fail("more than %d sizes", SIZES_MAX);
        }
    }
    if (entry->count >= count) {
        return entry->count;
    }
    tell("pause");
    for (size_t at = 0; at < count; at += task->batch) {
        if (at + task->batch > entry->count) {
            (void)put(agent, task, at);
        }
    }
    /* The body of a value depends on its place in the batch that wrote it. */
    for (size_t at = 0; at < count; at += task->batch) {
        (void)get(agent, task, at, entry->count == 0);
    }
    tell("resume");
    *entry = (struct loaded){task->bytes, count};
    return count;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

static void answer(struct agent *agent, const struct task *task, size_t calls, double seconds,
                   double cpu)
{
    qsort(agent->latencies, calls, sizeof(agent->latencies[0]), by_value);
    printf("{\"calls\": %zu, \"bytes\": %zu, \"seconds\": %.6f, \"p50_us\": %.2f, "
           "\"p99_us\": %.2f, \"cpu_s\": %.6f}\n",
           calls, calls * task->batch * task->bytes, seconds, agent->latencies[calls / 2] * 1e6,
           agent->latencies[calls * 99 / 100] * 1e6, cpu);
    (void)fflush(stdout);
}

static void measure_gets(struct agent *agent, const struct task *task)
{
    size_t count = load(agent, task);
    size_t calls = 0;
    uint64_t first = 0;
    double seconds = 0;
    double cpu = cpu_seconds();
    for (; calls < CALLS_MAX && (seconds < task->seconds || calls < CALLS_MIN); calls++) {
        first = first + task->batch <= count ? first : 0;
        agent->latencies[calls] = get(agent, task, first, false);
        seconds += agent->latencies[calls];
        first += task->batch;
    }
    answer(agent, task, calls, seconds, cpu_seconds() - cpu);
}

static void drop(const struct agent *agent, const struct task *task, uint64_t first)
{
    if (agent->peer->drop && agent->fresh != first) {
        agent->peer->drop(agent->context, first, agent->fresh - first, task->bytes);
    }
}

/* Before the first put: a peer that keeps its memory shall have it by then. */
static void touch(struct agent *agent)
{
    const struct task task = {.put = true, .bytes = TOUCH_BYTES, .batch = TOUCH_BATCH};
    uint64_t first = agent->fresh;
    tell("pause");
    buffers_reserve(agent, task.batch * task.bytes);
    while ((agent->fresh - first) * task.bytes < AGENT_SET_BYTES_MAX) {
        (void)put(agent, &task, agent->fresh);
        agent->fresh += task.batch;
    }
    drop(agent, &task, first);
    tell("resume");
    agent->touched = true;
}

static void measure_puts(struct agent *agent, const struct task *task)
{
    if (!agent->touched) {
        touch(agent);
    }
    size_t calls = 0;
    uint64_t first = agent->fresh; /* of those that are not dropped */
    double seconds = 0;
    double cpu = 0;
    double begin = cpu_seconds();
    for (; calls < CALLS_MAX && (seconds < task->seconds || calls < CALLS_MIN); calls++) {
        if ((agent->fresh - first + task->batch) * task->bytes > AGENT_SET_BYTES_MAX) {
            cpu += cpu_seconds() - begin;
            tell("pause");
            drop(agent, task, first);
            tell("resume");
            first = agent->fresh;
            begin = cpu_seconds();
        }
        agent->latencies[calls] = put(agent, task, agent->fresh);
        seconds += agent->latencies[calls];
        agent->fresh += task->batch;
    }
    cpu += cpu_seconds() - begin;
    tell("pause");
    drop(agent, task, first);
    answer(agent, task, calls, seconds, cpu);
}

static bool task_parse(const char *line, struct task *ret_task)
{
    char op[4];
    char *end = NULL;
    int used = 0;
    if (sscanf(line, "%3s %n", op, &used) != 1) {
        return false;
    }
    ret_task->put = strcmp(op, "put") == 0;
    ret_task->bytes = strtoul(line + used, &end, 10);
    ret_task->batch = strtoul(end, &end, 10);
    ret_task->seconds = strtod(end, &end);
    return (ret_task->put || strcmp(op, "get") == 0) && *end == '\n' && ret_task->bytes >= 8 &&
           ret_task->bytes <= AGENT_SET_BYTES_MAX && ret_task->batch >= 1 &&
           ret_task->batch <= AGENT_BATCH_MAX &&
           2 * ret_task->batch * ret_task->bytes <= AGENT_SET_BYTES_MAX;
}

int agent_run(const struct agent_peer *peer, void *context)
{
    /* As our programs do, and the same for every peer's client. */
    (void)mallopt(M_MMAP_THRESHOLD, 32 << 20);
    (void)mallopt(M_TRIM_THRESHOLD, 32 << 20);
    char line[128];
    struct task task;
    struct agent agent = {.peer = peer, .context = context, .fresh = AGENT_FRESH};
    agent.latencies = rk_alloc_zero(CALLS_MAX, sizeof(*agent.latencies));
    if (!agent.latencies) {
        agent_fail("no memory");
    }
    while (fgets(line, sizeof(line), stdin)) {
        if (!task_parse(line, &task)) {
            agent_fail("not a command: %s", line);
        }
        buffers_reserve(&agent, task.batch * task.bytes);
        if (task.put) {
            measure_puts(&agent, &task);
        } else {
            measure_gets(&agent, &task);
        }
    }
    rk_free(agent.source);
    rk_free(agent.buffer);
    rk_free(agent.latencies);
    return 0;
}
