/*
 * Redis through a plain blocking socket: a batch is a pipeline, its replies are received into one
 * buffer and stay there.
 *
 *   bench_redis PORT
 */
#include "bench/agent.h"
#include "bench/peers/support.h"

#include "common/base/alloc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define COMMAND_MAX 128
#define KEY_MAX     48
#define DROP_MAX    512 /* keys of one DEL */

struct redis {
    int fd;
    uint8_t *replies;
    size_t room;
};

static int key_format(char out[KEY_MAX], uint64_t key, size_t bytes)
{
    return snprintf(out, KEY_MAX, "%zu:%016llx", bytes, (unsigned long long)key);
}

/* Room for the replies to a batch. */
static uint8_t *replies_reserve(struct redis *redis, size_t bytes)
{
    if (bytes > redis->room) {
        rk_free(redis->replies);
        redis->replies = rk_alloc(bytes);
        if (!redis->replies) {
            agent_fail("no memory for %zu bytes of replies", bytes);
        }
        memset(redis->replies, 0, bytes);
        redis->room = bytes;
    }
    return redis->replies;
}

static void receive(const struct redis *redis, uint8_t *data, size_t bytes)
{
    if (!socket_receive(redis->fd, data, bytes)) {
        agent_fail("Redis closed the connection");
    }
}

static void get(void *context, uint64_t first, size_t batch, size_t bytes, uint8_t *buffer,
                const uint8_t **ret_values)
{
    struct redis *redis = context;
    char commands[AGENT_BATCH_MAX * COMMAND_MAX];
    char key[KEY_MAX];
    char head[32];
    size_t used = 0;
    (void)buffer;
    for (size_t i = 0; i < batch; i++) {
        int key_bytes = key_format(key, first + i, bytes);
        used += (size_t)snprintf(commands + used, COMMAND_MAX, "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n",
                                 key_bytes, key);
    }
    size_t head_bytes = (size_t)snprintf(head, sizeof(head), "$%zu\r\n", bytes);
    size_t reply_bytes = head_bytes + bytes + 2;
    uint8_t *replies = replies_reserve(redis, batch * reply_bytes);
    struct iovec iov = {commands, used};
    socket_send(redis->fd, &iov, 1);
    receive(redis, replies, batch * reply_bytes);
    for (size_t i = 0; i < batch; i++) {
        if (memcmp(replies + i * reply_bytes, head, head_bytes) != 0) {
            agent_fail("Redis lacks a value of %zu bytes", bytes);
        }
        ret_values[i] = replies + i * reply_bytes + head_bytes;
    }
}

static void put(void *context, uint64_t first, size_t batch, size_t bytes, const uint8_t *data)
{
    const struct redis *redis = context;
    char heads[AGENT_BATCH_MAX][COMMAND_MAX];
    struct iovec iov[2 * AGENT_BATCH_MAX + 1];
    char replies[5 * AGENT_BATCH_MAX];
    char key[KEY_MAX];
    static char end[] = "\r\n";
    for (size_t i = 0; i < batch; i++) {
        int key_bytes = key_format(key, first + i, bytes);
        int used = snprintf(heads[i], COMMAND_MAX, "%s*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%zu\r\n",
                            i == 0 ? "" : end, key_bytes, key, bytes);
        iov[2 * i] = (struct iovec){heads[i], (size_t)used};
        iov[2 * i + 1] = (struct iovec){(void *)(uintptr_t)(data + i * bytes), bytes};
    }
    iov[2 * batch] = (struct iovec){end, 2};
    socket_send(redis->fd, iov, 2 * batch + 1);
    receive(redis, (uint8_t *)replies, 5 * batch);
    for (size_t i = 0; i < batch; i++) {
        if (memcmp(replies + 5 * i, "+OK\r\n", 5) != 0) {
            agent_fail("Redis refused a SET: %.*s", (int)(5 * batch), replies);
        }
    }
}

static void drop(void *context, uint64_t first, size_t count, size_t bytes)
{
    const struct redis *redis = context;
    static char command[(DROP_MAX + 1) * COMMAND_MAX];
    char key[KEY_MAX];
    while (count > 0) {
        size_t step = count < DROP_MAX ? count : DROP_MAX;
        int used = snprintf(command, COMMAND_MAX, "*%zu\r\n$3\r\nDEL\r\n", step + 1);
        for (size_t i = 0; i < step; i++) {
            int key_bytes = key_format(key, first + i, bytes);
            used += snprintf(command + used, COMMAND_MAX, "$%d\r\n%s\r\n", key_bytes, key);
        }
        struct iovec iov = {command, (size_t)used};
        size_t reply_bytes = (size_t)snprintf(key, sizeof(key), ":%zu\r\n", step);
        socket_send(redis->fd, &iov, 1);
        receive(redis, (uint8_t *)command, reply_bytes);
        if (memcmp(command, key, reply_bytes) != 0) {
            agent_fail("Redis did not delete %zu values", step);
        }
        first += step;
        count -= step;
    }
}

int main(int argc, char **argv)
{
    static const struct agent_peer peer = {.get = get, .put = put, .drop = drop};
    const struct timeval patience = {.tv_sec = 10}; /* A shorter reply is an error's. */
    if (argc != 2) {
        (void)fprintf(stderr, "usage: bench_redis PORT\n");
        return 2;
    }
    struct redis redis = {.fd = socket_connect((int)strtol(argv[1], NULL, 10))};
    (void)setsockopt(redis.fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    int status = agent_run(&peer, &redis);
    rk_free(redis.replies);
    (void)close(redis.fd);
    return status;
}
