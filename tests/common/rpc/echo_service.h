/*
 * echo_service: a small service for the rpc tests, over redknot.v1 messages.
 *
 * TokenizeRequest.text says what a handler does; see echo_service.c.
 */
#ifndef TESTS_COMMON_RPC_ECHO_SERVICE_H
#define TESTS_COMMON_RPC_ECHO_SERVICE_H

#include "common/rpc/rpc.h"

#include <stdatomic.h>

struct echo_service {
    atomic_int running;   /* handlers inside */
    atomic_int cancelled; /* handlers that saw their call end early */
    atomic_int released;  /* parts given back */
    atomic_int go_on;     /* set by a test: handlers of Early return */
    atomic_int truncated; /* handlers of Upload that took a broken stream for a whole one */
};

extern const struct rk_rpc_method echo_methods[];
extern const size_t echo_num_methods;

#define ECHO_SERVICE  "redknot.test.Echo"
#define ECHO_UNARY    "/redknot.v1.Worker/Tokenize" /* in the descriptors, so the reply is held */
#define ECHO_PLAIN    "/redknot.test.Echo/Plain"    /* the same, but not in the descriptors */
#define ECHO_STATUS   "/redknot.test.Echo/Status"   /* fails with the status named by text */
#define ECHO_COUNT    "/redknot.test.Echo/Count"    /* sends as many replies as text says */
#define ECHO_UPLOAD   "/redknot.test.Echo/Upload"   /* replies with how many messages came */
#define ECHO_BIDI     "/redknot.test.Echo/Bidi"     /* one reply for each message */
#define ECHO_HANG     "/redknot.test.Echo/Hang"     /* until the call is cancelled */
#define ECHO_FLOOD    "/redknot.test.Echo/Flood"    /* big replies without an end */
#define ECHO_EARLY    "/redknot.test.Echo/Early"    /* one reply, its end, then until go_on */
#define ECHO_BIG      "/redknot.test.Echo/Big"      /* two parts, the second of text bytes */
#define ECHO_BIG_BYTE 0x5a

#endif
