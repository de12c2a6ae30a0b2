#include "common/base/address.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <stdio.h>
#include <string.h>

static enum rk_status port_parse(const char *text, const char *digits, enum rk_address_use use,
                                 uint16_t *ret_port, struct rk_error *error)
{
    uint32_t port = 0;
    uint32_t port_min = use == RK_ADDRESS_LISTEN ? 0 : 1;
    const char *p = digits;

    while (isdigit((unsigned char)*p) && port <= UINT16_MAX) {
        port = port * 10 + (uint32_t)(*p++ - '0');
    }
    if (p == digits || *p != '\0' || port > UINT16_MAX || port < port_min) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "address '%s': the port '%s' is not a number from %u to 65535", text,
                            digits, port_min);
    }
    *ret_port = (uint16_t)port;
    return RK_OK;
}

enum rk_status rk_address_parse(const char *text, enum rk_address_use use,
                                struct rk_address *ret_address, struct rk_error *error)
{
    struct rk_address address = {.port = 0};
    const char *host = text;
    const char *colon = strrchr(text, ':');
    enum rk_status status = RK_OK;

    if (!colon) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "address '%s': no port; write host:port, such as 127.0.0.1:7000", text);
    }
    size_t host_length = (size_t)(colon - text);
    if (host_length == 0) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "address '%s': no host; write 0.0.0.0%s for all interfaces", text,
                            text);
    }
    if (*text == '[' && host_length > 2 && text[host_length - 1] == ']') {
        host++;
        host_length -= 2;
    } else if (memchr(text, ':', host_length) || strpbrk(text, "[]")) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "address '%s': an IPv6 host stands in brackets: [::1]:7000", text);
    }
    if (host_length >= sizeof(address.host)) {
        return rk_error_set(error, RK_ERR_INVALID, "address: the host is longer than %d characters",
                            RK_HOST_BYTES - 1);
    }
    for (size_t i = 0; i < host_length; i++) {
        if (!isgraph((unsigned char)host[i]) || strchr("[]/@", host[i])) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "address '%s': a host has no spaces, brackets, '/' or '@'; write "
                                "host:port without a scheme",
                                text);
        }
    }
    status = port_parse(text, colon + 1, use, &address.port, error);
    if (status != RK_OK) {
        return status;
    }
    memcpy(address.host, host, host_length);
    *ret_address = address;
    return RK_OK;
}

enum rk_status rk_address_check(const char *text, enum rk_address_use use, struct rk_error *error)
{
    struct rk_address address;
    return rk_address_parse(text, use, &address, error);
}

void rk_address_format(const struct rk_address *address, char ret_text[RK_ADDRESS_BYTES])
{
    bool brackets = strchr(address->host, ':') != NULL;
    (void)snprintf(ret_text, RK_ADDRESS_BYTES, "%s%s%s:%u", brackets ? "[" : "", address->host,
                   brackets ? "]" : "", address->port);
}

enum rk_status rk_address_with_port(const char *listen, int port, char ret_text[RK_ADDRESS_BYTES],
                                    struct rk_error *error)
{
    struct rk_address address;
    enum rk_status status = rk_address_parse(listen, RK_ADDRESS_LISTEN, &address, error);
    if (status == RK_OK) {
        RK_ASSERT(port >= 0 && port <= UINT16_MAX); /* The kernel gave it. */
        address.port = (uint16_t)port;
        rk_address_format(&address, ret_text);
    }
    return status;
}

bool rk_address_is_any(const struct rk_address *address)
{
    struct in_addr v4;
    struct in6_addr v6;
    if (inet_aton(address->host, &v4)) { /* also "0" and "0.0" */
        return v4.s_addr == INADDR_ANY;
    }
    if (inet_pton(AF_INET6, address->host, &v6) != 1) {
        return false;
    }
    bool mapped = IN6_IS_ADDR_V4MAPPED(&v6) && memcmp(&v6.s6_addr[12], "\0\0\0", 4) == 0;
    return IN6_IS_ADDR_UNSPECIFIED(&v6) || mapped;
}
