/*
 * network: two network namespaces joined by a veth pair that can be cut, slowed
 * and made to lose packets. One side is for the daemons, the other one for
 * their clients.
 *
 * Needs root, iproute2 and iptables. Errors abort the test, with the command
 * that failed.
 */
#ifndef TESTS_E2E_NETWORK_H
#define TESTS_E2E_NETWORK_H

#include <stdbool.h>

struct network {
    char server_side[32]; /* names of the namespaces; "": not made */
    char client_side[32];
    char server_host[16];
    char client_host[16];
};

/* NULL: networks can be made here. Else what is missing. Removes what dead processes left. */
const char *network_missing(void);
/* The last thing: takes away the mount that iproute2 makes with the first namespace, if it was not
 * there before network_missing(). */
void network_done(void);

void network_make(struct network *network);
/* Accepts what was not made, or only in part. */
void network_remove(struct network *network);

/* The calling process goes into a namespace, /sys too, where UCX looks for devices. Before it has
 * threads. False: it cannot. */
bool network_enter(const char *name);

/* ---- Faults, each until it is undone ---- */

enum network_cut {
    NETWORK_LINK_DOWN, /* the server's device is down */
    NETWORK_DROP,      /* the server's side drops what arrives over it, and says nothing */
};
void network_cut(const struct network *network, enum network_cut cut);
void network_mend(const struct network *network, enum network_cut cut);

/* Both directions: "20mbit", "32kbit". */
void network_slow(const struct network *network, const char *rate, const char *burst);
void network_speed_up(const struct network *network);

/* Of the packets that arrive at each side. For good. */
void network_lose(const struct network *network, const char *probability);

#endif
