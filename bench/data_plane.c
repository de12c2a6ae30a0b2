/*
 * RedKnot's agent of bench/data_plane.py: values over one path. Over shared memory they are read
 * in place, which is what that path is for; over the others into the agent's buffer.
 */
#include "bench/agent.h"
#include "client/values.h"

#include "common/base/clock.h"
#include "common/base/log.h"

#include <string.h>

#define TIMEOUT_MS 20000

struct context {
    struct rk_values *values;
    bool in_place;
    struct rk_value_views views; /* of the last get */
};

/* Each path's agent has keys of its own, for all use one store. */
static char path_letter;

struct name {
    char path;
    uint64_t bytes;
    uint64_t key;
} __attribute__((packed));

struct names {
    struct name all[AGENT_BATCH_MAX];
};

static struct rk_value_key key_of(struct names *names, size_t i, uint64_t key, size_t bytes)
{
    names->all[i] = (struct name){path_letter, bytes, key};
    return (struct rk_value_key){&names->all[i], sizeof(names->all[i])};
}

static void expect(enum rk_status call, enum rk_status item, const struct rk_error *error)
{
    if (call != RK_OK || item != RK_OK) {
        agent_fail("%s: %s", rk_status_name(call != RK_OK ? call : item), error->text);
    }
}

static void get_in_place(struct context *context, const struct rk_value_key *keys, size_t batch,
                         const uint8_t **ret_values)
{
    struct rk_error error = {.text = ""};
    rk_values_release(context->values, &context->views);
    enum rk_status status =
        rk_values_view(context->values, keys, batch, TIMEOUT_MS, &context->views, &error);
    for (size_t i = 0; i < batch; i++) {
        expect(status, context->views.views[i].status, &error);
        ret_values[i] = context->views.views[i].parts[0].data;
    }
}

static void get(void *handle, uint64_t first, size_t batch, size_t bytes, uint8_t *buffer,
                const uint8_t **ret_values)
{
    struct context *context = handle;
    struct names names;
    struct rk_value_key keys[AGENT_BATCH_MAX];
    struct rk_value_get gets[AGENT_BATCH_MAX];
    struct rk_error error = {.text = ""};
    for (size_t i = 0; i < batch; i++) {
        keys[i] = key_of(&names, i, first + i, bytes);
        gets[i] = (struct rk_value_get){
            .key = keys[i], .buffer = buffer + i * bytes, .buffer_bytes = bytes};
    }
    if (context->in_place) {
        get_in_place(context, keys, batch, ret_values);
        return;
    }
    enum rk_status status = rk_values_get(context->values, gets, batch, TIMEOUT_MS, &error);
    for (size_t i = 0; i < batch; i++) {
        expect(status, gets[i].status, &error);
    }
}

static void put(void *handle, uint64_t first, size_t batch, size_t bytes, const uint8_t *data)
{
    struct context *context = handle;
    struct names names;
    struct rk_value_put puts[AGENT_BATCH_MAX];
    struct rk_error error = {.text = ""};
    for (size_t i = 0; i < batch; i++) {
        puts[i] = (struct rk_value_put){
            .key = key_of(&names, i, first + i, bytes), .data = data + i * bytes, .bytes = bytes};
    }
    enum rk_status status = rk_values_put(context->values, puts, batch, TIMEOUT_MS, &error);
    for (size_t i = 0; i < batch; i++) {
        expect(status, puts[i].status, &error);
        if (puts[i].existed) {
            agent_fail("a fresh key was there already: nothing was written");
        }
    }
}

static void drop(void *handle, uint64_t first, size_t count, size_t bytes)
{
    struct context *context = handle;
    struct names names;
    struct rk_value_key keys[AGENT_BATCH_MAX];
    struct rk_error error = {.text = ""};
    bool dropped[AGENT_BATCH_MAX];
    for (size_t begin = 0; begin < count; begin += AGENT_BATCH_MAX) {
        size_t batch = count - begin < AGENT_BATCH_MAX ? count - begin : AGENT_BATCH_MAX;
        for (size_t i = 0; i < batch; i++) {
            keys[i] = key_of(&names, i, first + begin + i, bytes);
        }
        expect(rk_values_drop(context->values, keys, batch, TIMEOUT_MS, dropped, &error), RK_OK,
               &error);
    }
}

/* The cluster may have started a moment ago. */
static void wait_for_store(struct rk_values *values)
{
    const struct rk_value_key key = {"?", 1};
    struct rk_error error = {.text = ""};
    int64_t deadline_ns = rk_deadline_in_ms(TIMEOUT_MS);
    bool exists = false;
    while (rk_values_exists(values, &key, 1, TIMEOUT_MS, &exists, &error) != RK_OK) {
        if (rk_deadline_left_ms(deadline_ns) == 0) {
            agent_fail("%s", error.text);
        }
        rk_clock_sleep_ms(20);
    }
}

int main(int argc, char **argv)
{
    static const struct agent_peer peer = {.get = get, .put = put, .drop = drop};
    struct context context = {.in_place = false};
    struct rk_error error = {.text = ""};
    rk_log_init("bench", RK_LOG_LEVEL_ERROR);
    if (argc != 5 || strcmp(argv[1], "--coordinator") != 0 || strcmp(argv[3], "--path") != 0) {
        agent_fail("usage: bench_data_plane --coordinator HOST:PORT --path shm|ucx|grpc");
    }
    path_letter = argv[4][0];
    const struct rk_values_options options = {.coordinator = argv[2], .path = argv[4]};
    if (rk_values_create(&options, &context.values, &error) != RK_OK) {
        agent_fail("%s", error.text);
    }
    wait_for_store(context.values);
    context.in_place = path_letter == 's';
    int code = agent_run(&peer, &context);
    rk_values_release(context.values, &context.views);
    rk_values_destroy(context.values);
    return code;
}
