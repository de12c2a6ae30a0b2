/*
 * Operations: a bounded queue, threads that carry them out by the blocking
 * calls, and completions behind an eventfd.
 */
#include "client/values_internal.h"

#include "common/base/alloc.h"

#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum operation_kind { OPERATION_PUT, OPERATION_GET, OPERATION_EXISTS, OPERATION_DROP };

struct operation {
    uint64_t id;
    enum operation_kind kind;
    union {
        struct rk_value_put *puts;
        struct rk_value_get *gets;
        struct {
            const struct rk_value_key *keys;
            bool *flags;
        } keys;
    } what;
    size_t count;
    int timeout_ms;
    enum rk_status status;
    char text[sizeof(((struct rk_value_completion *)0)->text)];
    struct operation *next;
};

struct list {
    struct operation *head;
    struct operation **tail;
};

struct operations {
    struct rk_values *values;
    pthread_mutex_t lock; /* Leaf. */
    pthread_cond_t submitted;
    struct list waiting;
    struct list done;
    struct operation *free;
    struct operation *all; /* [operations_max] */
    uint64_t next_id;
    bool stopping;
    int event_fd;
    uint32_t num_threads;
    pthread_t threads[VALUES_THREADS_MAX];
};

static void list_init(struct list *list)
{
    list->head = NULL;
    list->tail = &list->head;
}

static void list_add(struct list *list, struct operation *operation)
{
    operation->next = NULL;
    *list->tail = operation;
    list->tail = &operation->next;
}

static struct operation *list_take(struct list *list)
{
    struct operation *operation = list->head;
    if (operation) {
        list->head = operation->next;
        if (!list->head) {
            list->tail = &list->head;
        }
    }
    return operation;
}

static void operation_run(struct rk_values *values, struct operation *operation)
{
    struct rk_error error = {.text = ""};
    switch (operation->kind) {
    case OPERATION_PUT:
        operation->status = rk_values_put(values, operation->what.puts, operation->count,
                                          operation->timeout_ms, &error);
        break;
    case OPERATION_GET:
        operation->status = rk_values_get(values, operation->what.gets, operation->count,
                                          operation->timeout_ms, &error);
        break;
    case OPERATION_EXISTS:
        operation->status =
            rk_values_exists(values, operation->what.keys.keys, operation->count,
                             operation->timeout_ms, operation->what.keys.flags, &error);
        break;
    case OPERATION_DROP:
        operation->status =
            rk_values_drop(values, operation->what.keys.keys, operation->count,
                           operation->timeout_ms, operation->what.keys.flags, &error);
        break;
    }
    size_t length = strnlen(error.text, sizeof(error.text)); /* Also of an item that failed. */
    length = length < sizeof(operation->text) ? length : sizeof(operation->text) - 1;
    memcpy(operation->text, error.text, length);
    operation->text[length] = '\0';
}

static void event_signal(struct operations *operations)
{
    static const uint64_t one = 1;
    (void)!write(operations->event_fd, &one, sizeof(one));
}

static void *thread_main(void *context)
{
    struct operations *operations = context;
    (void)pthread_mutex_lock(&operations->lock);
    while (!operations->stopping) {
        struct operation *operation = list_take(&operations->waiting);
        if (!operation) {
            (void)pthread_cond_wait(&operations->submitted, &operations->lock);
            continue;
        }
        (void)pthread_mutex_unlock(&operations->lock);
        operation_run(operations->values, operation);
        (void)pthread_mutex_lock(&operations->lock);
        list_add(&operations->done, operation);
        event_signal(operations);
    }
    (void)pthread_mutex_unlock(&operations->lock);
    return NULL;
}

int values_thread_start(pthread_t *ret_thread, void *(*body)(void *), void *context)
{
    sigset_t all;
    sigset_t before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int failure = pthread_create(ret_thread, NULL, body, context);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failure;
}

enum rk_status operations_create(struct rk_values *values, uint32_t threads,
                                 uint32_t operations_max, struct operations **ret_operations,
                                 struct rk_error *error)
{
    struct operations *operations = rk_alloc_zero(1, sizeof(*operations));
    if (!operations) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for operations");
    }
    operations->values = values;
    list_init(&operations->waiting);
    list_init(&operations->done);
    RK_ASSERT(pthread_mutex_init(&operations->lock, NULL) == 0);
    RK_ASSERT(pthread_cond_init(&operations->submitted, NULL) == 0);
    operations->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    operations->all = rk_alloc_zero(operations_max, sizeof(*operations->all));
    enum rk_status status = RK_OK;
    if (operations->event_fd < 0 || !operations->all) {
        status =
            rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %u operations", operations_max);
    }
    for (uint32_t i = 0; status == RK_OK && i < operations_max; i++) {
        operations->all[i].next = operations->free;
        operations->free = &operations->all[i];
    }
    while (status == RK_OK && operations->num_threads < threads) {
        if (values_thread_start(&operations->threads[operations->num_threads], thread_main,
                                operations) != 0) {
            status = rk_error_set(error, RK_ERR_NO_MEMORY, "cannot start a thread for operations");
        } else {
            operations->num_threads++;
        }
    }
    if (status != RK_OK) {
        operations_destroy(operations);
        return status;
    }
    *ret_operations = operations;
    return RK_OK;
}

void operations_destroy(struct operations *operations)
{
    if (!operations) {
        return;
    }
    (void)pthread_mutex_lock(&operations->lock);
    operations->stopping = true;
    (void)pthread_cond_broadcast(&operations->submitted);
    (void)pthread_mutex_unlock(&operations->lock);
    for (uint32_t i = 0; i < operations->num_threads; i++) {
        (void)pthread_join(operations->threads[i], NULL);
    }
    if (operations->event_fd >= 0) {
        (void)close(operations->event_fd);
    }
    (void)pthread_mutex_destroy(&operations->lock);
    (void)pthread_cond_destroy(&operations->submitted);
    rk_free(operations->all);
    rk_free(operations);
}

static enum rk_status submit(struct rk_values *values, const struct operation *asked,
                             uint64_t *ret_operation, struct rk_error *error)
{
    struct operations *operations = values->operations;
    if (rk_is_copy(values->maker)) {
        return rk_copy_refuse(error);
    }
    (void)pthread_mutex_lock(&operations->lock);
    struct operation *operation = operations->free;
    if (operation) {
        operations->free = operation->next;
        *operation = *asked;
        operation->id = ++operations->next_id;
        *ret_operation = operation->id;
        list_add(&operations->waiting, operation);
        (void)pthread_cond_signal(&operations->submitted);
    }
    (void)pthread_mutex_unlock(&operations->lock);
    return operation ? RK_OK
                     : rk_error_set(error, RK_ERR_FULL,
                                    "too many operations are in flight: drain some, or raise "
                                    "operations_max");
}

enum rk_status rk_values_submit_put(struct rk_values *values, struct rk_value_put *puts,
                                    size_t num_puts, int timeout_ms, uint64_t *ret_operation,
                                    struct rk_error *error)
{
    const struct operation operation = {
        .kind = OPERATION_PUT, .what.puts = puts, .count = num_puts, .timeout_ms = timeout_ms};
    return submit(values, &operation, ret_operation, error);
}

enum rk_status rk_values_submit_get(struct rk_values *values, struct rk_value_get *gets,
                                    size_t num_gets, int timeout_ms, uint64_t *ret_operation,
                                    struct rk_error *error)
{
    const struct operation operation = {
        .kind = OPERATION_GET, .what.gets = gets, .count = num_gets, .timeout_ms = timeout_ms};
    return submit(values, &operation, ret_operation, error);
}

enum rk_status rk_values_submit_exists(struct rk_values *values, const struct rk_value_key *keys,
                                       size_t num_keys, int timeout_ms, bool *ret_exists,
                                       uint64_t *ret_operation, struct rk_error *error)
{
    const struct operation operation = {.kind = OPERATION_EXISTS,
                                        .what.keys = {keys, ret_exists},
                                        .count = num_keys,
                                        .timeout_ms = timeout_ms};
    return submit(values, &operation, ret_operation, error);
}

enum rk_status rk_values_submit_drop(struct rk_values *values, const struct rk_value_key *keys,
                                     size_t num_keys, int timeout_ms, bool *ret_dropped,
                                     uint64_t *ret_operation, struct rk_error *error)
{
    const struct operation operation = {.kind = OPERATION_DROP,
                                        .what.keys = {keys, ret_dropped},
                                        .count = num_keys,
                                        .timeout_ms = timeout_ms};
    return submit(values, &operation, ret_operation, error);
}

int rk_values_event_fd(const struct rk_values *values)
{
    return values->operations->event_fd;
}

size_t rk_values_drain(struct rk_values *values, struct rk_value_completion *ret_completions,
                       size_t completions_max)
{
    struct operations *operations = values->operations;
    uint64_t events = 0;
    size_t count = 0;
    if (rk_is_copy(values->maker)) { /* The eventfd is the parent's too. */
        return 0;
    }
    (void)pthread_mutex_lock(&operations->lock);
    (void)!read(operations->event_fd, &events, sizeof(events));
    while (count < completions_max) {
        struct operation *operation = list_take(&operations->done);
        if (!operation) {
            break;
        }
        struct rk_value_completion *completion = &ret_completions[count++];
        completion->operation = operation->id;
        completion->status = operation->status;
        memcpy(completion->text, operation->text, sizeof(completion->text));
        operation->next = operations->free;
        operations->free = operation;
    }
    if (operations->done.head) {
        event_signal(operations);
    }
    (void)pthread_mutex_unlock(&operations->lock);
    return count;
}
