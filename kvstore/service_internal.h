/*
 * service: a store on the network, and its upkeep.
 *
 * service.c   the gRPC methods of redknot.v1.KvStore, and pins for the other paths
 * registrar.c the thread that keeps the coordinator informed
 * upkeep.c    the thread that collects, scrubs and publishes figures
 *
 * Objects are made and stopped by main; the store outlives them all.
 */
#ifndef RK_KVSTORE_SERVICE_INTERNAL_H
#define RK_KVSTORE_SERVICE_INTERNAL_H

#include "common/metrics/metrics.h"
#include "common/rpc/rpc.h"
#include "common/transport/transport.h"
#include "kvstore/kvstore.h"

/* ---- service.c ---- */

struct kvstore_service {
    struct kvstore *store;
    const char *node_id;
    uint64_t incarnation;
    struct rk_metric *read_bytes[RK_PATH_UCX + 1]; /* by enum rk_path */
    struct rk_metric *gets[RK_PATH_UCX + 1];
    struct rk_metric *puts[RK_PATH_UCX + 1];
    struct rk_metric *get_seconds;
    struct rk_metric *put_seconds;
};

void kvstore_service_init(struct kvstore_service *service, struct kvstore *store,
                          const char *node_id, uint64_t incarnation);
/* Before the server starts. service must live until the server is stopped. */
RK_MUST_CHECK enum rk_status kvstore_service_attach(struct kvstore_service *service,
                                                    struct rk_rpc_server *server);
/* The context is the service. */
extern const struct rk_transport_store_ops kvstore_service_store_ops;

/* ---- registrar.c ---- */

struct registrar;

/* Text is borrowed for the registrar's life. */
struct registrar_options {
    struct kvstore *store;
    const char *coordinator; /* host:port */
    const char *node_id;
    uint64_t incarnation;
    const char *grpc_address; /* as others reach it */
    const char *shm_socket;   /* "" when not served */
    const char *ucx_address;  /* as others reach it; "" when not served */
    const char *metrics_address;
};

RK_MUST_CHECK enum rk_status registrar_start(const struct registrar_options *options,
                                             struct registrar **ret_registrar,
                                             struct rk_error *error);
void registrar_stop(struct registrar *registrar); /* accepts NULL */

/* ---- upkeep.c ---- */

struct upkeep;

struct upkeep_options {
    struct kvstore *store;
    uint64_t scrub_rate; /* bytes per second, 0: no scrubbing */
    /* Signals, blocked by the caller: SIGUSR1 damages a page, SIGUSR2 gives back all pins of
     * readers over shared memory, who go on reading. */
    bool fault_injection;
    struct rk_shm_server *shm; /* NULL: not served */
};

RK_MUST_CHECK enum rk_status upkeep_start(const struct upkeep_options *options,
                                          struct upkeep **ret_upkeep, struct rk_error *error);
void upkeep_stop(struct upkeep *upkeep); /* accepts NULL */

#endif
