/*
 * ports: the one plan of ports, for daemons started by hand and for `redknot up`.
 *
 *                    gRPC            metrics
 *   coordinator      7100            7200
 *   stores           7101 .. 7116    7201 .. 7216
 *   workers          7120 .. 7135    7220 .. 7235
 *
 * A daemon without --listen takes the first of its kind; `redknot up` counts up from
 * there and moves the whole plan with --base-port. What is a metrics port for one is
 * never another's gRPC port, so that the two ways mix.
 */
#ifndef RK_COMMON_BASE_PORTS_H
#define RK_COMMON_BASE_PORTS_H

#include <assert.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RK_PORT_COORDINATOR 7100
#define RK_PORT_STORE       7101 /* of the first one */
#define RK_PORT_WORKER      7120
#define RK_PORTS_OF_A_KIND  16  /* as many stores, and as many workers, have a port each */
#define RK_PORTS_METRICS    100 /* from a gRPC port to its metrics port */
#define RK_PORTS_SPAN       136 /* base port + span: behind the last */

/* What the daemons listen on without options; all on loopback. */
#define RK_LISTEN_COORDINATOR  "127.0.0.1:7100"
#define RK_METRICS_COORDINATOR "127.0.0.1:7200"
#define RK_LISTEN_STORE        "127.0.0.1:7101"
#define RK_METRICS_STORE       "127.0.0.1:7201"
#define RK_LISTEN_WORKER       "127.0.0.1:7120"
#define RK_METRICS_WORKER      "127.0.0.1:7220"

static_assert(RK_PORT_STORE + RK_PORTS_OF_A_KIND <= RK_PORT_WORKER, "stores end before workers");
static_assert(RK_PORT_WORKER + RK_PORTS_OF_A_KIND <= RK_PORT_COORDINATOR + RK_PORTS_METRICS,
              "gRPC ports end before metrics ports");
static_assert(RK_PORT_WORKER + RK_PORTS_OF_A_KIND + RK_PORTS_METRICS ==
                  RK_PORT_COORDINATOR + RK_PORTS_SPAN,
              "the span is that of all ports");

#ifdef __cplusplus
}
#endif

#endif
