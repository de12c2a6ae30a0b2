/*
 * cluster: a real cluster of processes for the end-to-end tests: a coordinator,
 * one store or several, and some workers, each on ports of its own, on loopback or in a
 * network namespace, in a temporary folder that goes when the cluster does. A
 * failure to start aborts the test with the process's log.
 */
#ifndef TESTS_E2E_CLUSTER_H
#define TESTS_E2E_CLUSTER_H

#include "client/redknot.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define CLUSTER_WORKERS_MAX 4
#define CLUSTER_STORES_MAX  3

struct process {
    pid_t pid; /* 0: not running */
    const char *argv[40];
    char log[160];
    const char *netns; /* named network namespace; NULL: that of the test */
};

struct cluster {
    char folder[128];
    struct process coordinator;
    struct process store;                               /* store-0 */
    struct process more_stores[CLUSTER_STORES_MAX - 1]; /* store-1, store-2 */
    struct process workers[CLUSTER_WORKERS_MAX];
    uint32_t num_workers;
    uint32_t num_stores;
    char coordinator_address[32];
    char coordinator_metrics[32];
    char store_address[32];
    char store_metrics[32];
    char store_socket[160];
    char more_store_addresses[CLUSTER_STORES_MAX - 1][32];
    char more_store_metrics[CLUSTER_STORES_MAX - 1][32];
    char more_store_sockets[CLUSTER_STORES_MAX - 1][160];
    char worker_addresses[CLUSTER_WORKERS_MAX][32];
    char worker_metrics[CLUSTER_WORKERS_MAX][32];
    char data[160];
    char names[CLUSTER_WORKERS_MAX + 2 + CLUSTER_STORES_MAX][24];
};

struct cluster_options {
    uint32_t num_workers;
    uint32_t num_stores; /* 0: 1 */
    const char *mode;    /* "f32" or "bf16"; NULL: the CPU's best */
    const char *dram;    /* NULL: "1GiB" */
    const char *path;    /* worker's read path; NULL: auto */
    const char *host;    /* where all listen; NULL: "127.0.0.1" */
    const char *netns;   /* of coordinator and store; NULL: that of the test */
    bool store_faults;   /* SIGUSR1 to a store flips a byte */
    /* More options for each; the list ends with NULL. NULL: none. */
    const char *const *store_args;
    const char *const *worker_args;
    const char *const *args_of_worker[CLUSTER_WORKERS_MAX]; /* of that one only */
};

void cluster_start(struct cluster *cluster, const struct cluster_options *options);
/* SIGTERM, then asserts that each living process ended with 0 (sanitizers included). */
void cluster_stop(struct cluster *cluster);

void process_start(struct process *process);
void process_kill(struct process *process, int signal); /* and reaps it */
/* Its argument behind `option` from its next start on. `value` must outlive the cluster. */
void process_set_argument(struct process *process, const char *option, const char *value);
/* Until the coordinator says that `stores` and `workers` nodes live. */
void cluster_wait(struct cluster *cluster, uint32_t stores, uint32_t workers);

/* A client of the coordinator (worker < 0) or of one worker. */
struct rk_client *cluster_client(const struct cluster *cluster, int worker);
/* Sum over the lines of /metrics that begin with `name` (labels may follow in it). */
double cluster_metric(const char *address, const char *name);
/* Asserts that promtool has no complaint about /metrics. */
void cluster_metrics_check(const char *address);
/* Until the store holds no pin and nothing half written; fails the test after half a minute. */
void cluster_store_becomes_quiet(const struct cluster *cluster);
/* A number of /proc/PID/status, behind a field such as "VmHWM:"; 0: it is not there. */
uint64_t process_field(pid_t pid, const char *field, int base);
/* Resident bytes of a process. */
uint64_t process_resident_bytes(const struct process *process);

/* ---- Requests that the tests share ---- */

#define ANSWER_TOKENS_MAX 512
struct answer {
    enum rk_status status;
    struct rk_error error;
    int32_t tokens[ANSWER_TOKENS_MAX];
    size_t num_tokens;
    struct rk_report report; /* strings are gone after answer_clear */
};
void ask(struct rk_client *client, const struct rk_generate_request *request,
         struct answer *ret_answer);
void answer_clear(struct answer *answer);

#endif
