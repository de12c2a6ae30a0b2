/*
 * rpc_peer: the echo service as a process of its own, for tests that kill it
 * and for clients in other languages.
 *
 * Usage: rpc_peer ADDRESS. Prints its port. Obeys lines on stdin: "down" and
 * "up" change its health, "stop" or the end of input stops it.
 */
#include "tests/common/rpc/echo_service.h"

#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    static struct echo_service service;
    struct rk_rpc_server_options options = {.address = argc > 1 ? argv[1] : "127.0.0.1:0",
                                            .calls_max = 8};
    struct rk_rpc_server *server = NULL;
    struct rk_error error = {0};
    if (rk_rpc_server_create(&options, &server, &error) != RK_OK) {
        (void)fprintf(stderr, "rpc_peer: %s\n", error.text);
        return 1;
    }
    /* The method that the descriptors know belongs to redknot.v1.Worker. */
    if (rk_rpc_server_add_service(server, "redknot.v1.Worker", echo_methods, echo_num_methods,
                                  &service) != RK_OK ||
        rk_rpc_server_start(server) != RK_OK) {
        rk_rpc_server_destroy(server);
        return 1;
    }
    (void)printf("%d\n", rk_rpc_server_port(server));
    (void)fflush(stdout);
    char line[64];
    while (fgets(line, sizeof(line), stdin) && strcmp(line, "stop\n") != 0) {
        if (strcmp(line, "down\n") == 0 || strcmp(line, "up\n") == 0) {
            rk_rpc_server_set_serving(server, line[0] == 'u');
        }
    }
    rk_rpc_server_stop(server, 100);
    rk_rpc_server_destroy(server);
    return 0;
}
