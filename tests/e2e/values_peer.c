/*
 * A client that test_network.c kills in the middle of what it does:
 *   values_peer COORDINATOR PATH get BYTES   puts one value, then gets it again and again
 *   values_peer COORDINATOR PATH put BYTES   puts one value after the other
 *   values_peer COORDINATOR PATH once BYTES  puts one value and gets it; 0: both worked
 */
#include "client/values.h"
#include "common/base/alloc.h"
#include "tests/e2e/value_bytes.h"

#include <stdio.h>
#include <stdlib.h>

#define TIMEOUT_MS 20000

static int put(struct rk_values *values, unsigned number, const void *data, uint64_t bytes)
{
    char key[32];
    int length = snprintf(key, sizeof(key), "peer/%u", number);
    struct rk_value_put item = {.key = {key, (size_t)length}, .data = data, .bytes = bytes};
    return rk_values_put(values, &item, 1, TIMEOUT_MS, NULL) == RK_OK && item.status == RK_OK;
}

static int get(struct rk_values *values, void *buffer, uint64_t bytes)
{
    struct rk_value_get item = {.key = {"peer/0", 6}, .buffer = buffer, .buffer_bytes = bytes};
    return rk_values_get(values, &item, 1, TIMEOUT_MS, NULL) == RK_OK && item.status == RK_OK;
}

int main(int argc, char **argv)
{
    struct rk_values *values = NULL;
    if (argc != 5) {
        (void)fprintf(stderr, "usage: values_peer COORDINATOR PATH get|put|once BYTES\n");
        return 2;
    }
    const struct rk_values_options options = {.coordinator = argv[1], .path = argv[2]};
    uint64_t bytes = strtoull(argv[4], NULL, 10);
    void *data = rk_alloc(bytes);
    if (!data || rk_values_create(&options, &values, NULL) != RK_OK) {
        return 1;
    }
    value_fill(1, data, bytes);
    int good = put(values, 0, data, bytes);
    if (strcmp(argv[3], "once") == 0) {
        good = good && get(values, data, bytes) && value_compare(1, data, bytes) == bytes;
        rk_values_destroy(values);
        rk_free(data);
        return good ? 0 : 1;
    }
    for (unsigned i = 1; good; i++) {
        good = strcmp(argv[3], "get") == 0 ? get(values, data, bytes) : put(values, i, data, bytes);
    }
    rk_values_destroy(values);
    rk_free(data);
    return 1; /* It goes on until it is killed. */
}
