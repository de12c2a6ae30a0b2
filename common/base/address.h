/*
 * address: host:port, the one reading of it for daemons, clients and tools.
 *
 *   127.0.0.1:7100    store-3.example:7000    [::1]:7000    [fe80::1%eth0]:7000
 *
 * Ports are 1 to 65535; 0 only where a listener may choose one. What a person, a file, the
 * environment or a peer wrote is read here before gRPC, UCX or the resolver see it: they cut a port
 * to 16 bits without a word, or take a missing one for 443.
 *
 * Threads: pure, or writes only to the caller's object.
 */
#ifndef RK_COMMON_BASE_ADDRESS_H
#define RK_COMMON_BASE_ADDRESS_H

#include "common/base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_HOST_BYTES    256                  /* with the final NUL; a DNS name has at most 253 */
#define RK_ADDRESS_BYTES (RK_HOST_BYTES + 16) /* of "[host]:port" with the final NUL */

/* Where to listen or whom to call. */
struct rk_address {
    char host[RK_HOST_BYTES]; /* name, IPv4 or IPv6 without its brackets; never empty */
    uint16_t port;            /* 0: when listening, any free one */
};

enum rk_address_use {
    RK_ADDRESS_CALL,   /* a port that somebody listens on: 1 to 65535 */
    RK_ADDRESS_LISTEN, /* also 0 */
};

/* RK_ERR_INVALID says what is wrong and how it is written right. */
RK_MUST_CHECK enum rk_status rk_address_parse(const char *text, enum rk_address_use use,
                                              struct rk_address *ret_address,
                                              struct rk_error *error);
/* Whether it can be parsed, for whoever keeps the text. */
RK_MUST_CHECK enum rk_status rk_address_check(const char *text, enum rk_address_use use,
                                              struct rk_error *error);
/* "host:port", an IPv6 host in brackets. */
void rk_address_format(const struct rk_address *address, char ret_text[RK_ADDRESS_BYTES]);
/* The host of `listen` with another port: the one that a listener was given, or 0. */
RK_MUST_CHECK enum rk_status rk_address_with_port(const char *listen, int port,
                                                  char ret_text[RK_ADDRESS_BYTES],
                                                  struct rk_error *error);
/* 0.0.0.0, [::] and the like, in any spelling: all interfaces, which others cannot call. */
bool rk_address_is_any(const struct rk_address *address);

#ifdef __cplusplus
}
#endif

#endif
