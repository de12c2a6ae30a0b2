/*
 * cluster_internal: the daemons that `redknot up` and `redknot demo` run on this machine.
 *
 * A process is known by pid and start time (and its program), and is signalled
 * through a pidfd opened before both were checked: a reused pid is never hit.
 * State lives in DIR/cluster.json, replaced as a whole; logs in DIR/logs.
 *
 * Threads: none of its own; a cluster belongs to its caller's thread.
 */
#ifndef CLIENT_CLI_CLUSTER_INTERNAL_H
#define CLIENT_CLI_CLUSTER_INTERNAL_H

#include "common/base/ports.h"
#include "common/base/status.h"

#include <jansson.h>
#include <limits.h>
#include <stdint.h>
#include <sys/types.h>

#define CLUSTER_WORKERS_MAX   RK_PORTS_OF_A_KIND
#define CLUSTER_STORES_MAX    RK_PORTS_OF_A_KIND
#define CLUSTER_PROCESSES_MAX (1 + CLUSTER_WORKERS_MAX + CLUSTER_STORES_MAX)

struct cluster_options {
    const char *dir;
    const char *model;
    const char *mode;     /* "bf16", "f32" */
    const char *dram;     /* as for redknot-kvstore */
    const char *head_map; /* NULL: none */
    uint32_t num_workers;
    uint32_t num_stores;
    uint32_t threads;   /* of each worker, 0: the processors shared out */
    uint16_t base_port; /* the plan of common/base/ports.h begins here */
};

enum cluster_role { CLUSTER_COORDINATOR, CLUSTER_STORE, CLUSTER_WORKER };

struct cluster_process {
    enum cluster_role role;
    char node_id[32];
    pid_t pid;           /* 0: gone */
    uint64_t start_time; /* clock ticks after boot, from /proc */
    char program[PATH_MAX];
    char address[64];
    char metrics[64];
    char log[PATH_MAX];
};

struct cluster {
    char dir[PATH_MAX];
    uint32_t num_processes; /* in the order of their start */
    struct cluster_process processes[CLUSTER_PROCESSES_MAX];
};

const char *cluster_role_name(enum cluster_role role);
/* $XDG_RUNTIME_DIR/redknot/cluster, else /tmp/redknot-UID/cluster. */
void cluster_default_dir(char ret_dir[PATH_MAX]);
/* $REDKNOT_MODEL, else below ${REDKNOT_CACHE:-$HOME/.cache/redknot}/models. */
void cluster_default_model(char ret_model[PATH_MAX]);
/* A base_port that left all its ports free a moment ago; 0 when none was found. */
uint16_t cluster_free_ports(uint32_t num_stores, uint32_t num_workers);

/* Starts all and waits until each is serving. On failure everything is stopped again and the
 * error names the process and shows the end of its log. RK_ERR_EXISTS when one runs in dir. */
RK_MUST_CHECK enum rk_status cluster_start(const struct cluster_options *options, int timeout_ms,
                                           struct cluster *ret_cluster, struct rk_error *error);
/* RK_ERR_NOT_FOUND: no cluster was started in dir. */
RK_MUST_CHECK enum rk_status cluster_load(const char *dir, struct cluster *ret_cluster,
                                          struct rk_error *error);
/* SIGTERM, workers first; SIGKILL for what is left at the deadline. Returns how many were
 * running. Removes the state file. */
uint32_t cluster_stop(struct cluster *cluster, int timeout_ms);
uint32_t cluster_num_running(const struct cluster *cluster);
json_t *cluster_to_json(const struct cluster *cluster);

/* ---- process.c ---- */

/* Start time of a process in clock ticks; 0 when there is none, or only a zombie. */
uint64_t process_start_time(pid_t pid);
/* A pidfd of exactly this process, or -1 when it is gone. */
int process_open(const struct cluster_process *process);
/* True when it ended by the deadline. */
bool process_wait(int pidfd, int64_t deadline_ns);
/* argv[0] is the program's path. Output goes to the end of process->log. */
RK_MUST_CHECK enum rk_status process_spawn(struct cluster_process *process, char *const argv[],
                                           struct rk_error *error);
/* Reaps our own children that ended. */
void process_reap(void);

#endif
