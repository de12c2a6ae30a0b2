/*
 * The other end of test_ucx.c, as a process that can be stopped and killed:
 *   ucx_peer serve            prints its port, serves the arena until its input ends
 *   ucx_peer read ADDRESS MS  reads the whole arena again and again, each time with so many
 *                             milliseconds; prints a line after the first time
 */
#include "tests/common/transport/one_get.h"
#include "tests/common/transport/ucx_arena.h"

#include "common/base/clock.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int serve(void)
{
    static struct arena arena;
    struct rk_error error = {.text = ""};
    if (arena_serve(&arena, false, &error) != RK_OK) {
        (void)fprintf(stderr, "ucx_peer: %s\n", error.text);
        return 1;
    }
    struct sigaction action;
    if (sigaction(SIGILL, NULL, &action) != 0 || action.sa_handler != SIG_DFL) {
        (void)fprintf(stderr, "ucx_peer: UCX handles our signals\n");
        return 1;
    }
    printf("%d\n", rk_ucx_server_port(arena.server));
    (void)fflush(stdout);
    (void)getchar();
    rk_ucx_server_stop(arena.server);
    rk_free(arena.pages.bytes);
    return 0;
}

static int read_on(const char *address, int timeout_ms)
{
    const struct rk_transport_endpoint endpoint = {
        .grpc_address = "", .host_id = "", .shm_socket = "", .ucx_address = address};
    const struct rk_extent all = {0, 0, 0, NUM_PAGES};
    struct rk_transport *reader = NULL;
    struct rk_error error = {.text = ""};
    if (rk_transport_connect(&endpoint, RK_PATH_UCX, timeout_ms, &reader, &error) != RK_OK) {
        (void)fprintf(stderr, "ucx_peer: %s\n", error.text);
        return 1;
    }
    for (int i = 0;; i++) {
        struct rk_pages pages = {0};
        const struct rk_get get = {
            .generation = 1, .page_bytes = PAGE_BYTES, .extents = &all, .num_extents = 1};
        if (get_one(reader, &get, timeout_ms, &pages, &error) != RK_OK) {
            break;
        }
        rk_transport_release(reader, &pages, 1);
        if (i == 0) {
            (void)puts("read");
            (void)fflush(stdout);
        }
    }
    rk_transport_destroy(reader);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "serve") == 0) {
        return serve();
    }
    if (argc == 4 && strcmp(argv[1], "read") == 0) {
        return read_on(argv[2], (int)strtol(argv[3], NULL, 10));
    }
    (void)fprintf(stderr, "usage: ucx_peer serve | read ADDRESS MS\n");
    return 2;
}
