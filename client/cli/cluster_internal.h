/*
 * cluster_internal: the daemons that `redknot up` and `redknot demo` run on this machine.
 *
 * A cluster lives in a folder: its state (cluster.json, replaced as a whole), its logs, the
 * coordinator's database and the stores' sockets. The folder is walked to from the root, part by
 * part, so that no other user can have it lead elsewhere; what others may write is refused.
 *
 * A cluster has an id, made once and kept in its state. Its processes are given it and tell it
 * (--cluster), so that whoever answers at a port is known to be what was started, or not.
 *
 * A process is known by pid and start time, by its program, which must be one of our three, and by
 * its user; it is signalled through a pidfd opened before all of that was checked: a reused pid is
 * never hit.
 *
 * Threads: none of its own; a cluster belongs to its caller's thread.
 */
#ifndef CLIENT_CLI_CLUSTER_INTERNAL_H
#define CLIENT_CLI_CLUSTER_INTERNAL_H

#include "common/base/ports.h"
#include "common/base/service.h"
#include "common/base/status.h"

#include <jansson.h>
#include <limits.h>
#include <stdint.h>
#include <sys/types.h>

struct cli_common;

#define CLUSTER_WORKERS_MAX   RK_PORTS_OF_A_KIND
#define CLUSTER_STORES_MAX    RK_PORTS_OF_A_KIND
#define CLUSTER_PROCESSES_MAX (1 + CLUSTER_WORKERS_MAX + CLUSTER_STORES_MAX)

/* ---- Settings: what `up` was told, kept with the cluster ---- */

struct cluster_settings {
    char model[PATH_MAX];    /* not looked at without workers */
    char head_map[PATH_MAX]; /* "": none */
    char mode[8];            /* "bf16", "f32"; empty: the CPU's best */
    char path[8];            /* of the workers' reads: "auto", "shm", "ucx", "grpc" */
    char dram[32];           /* of each store, as for redknot-kvstore */
    uint32_t num_workers;    /* 0: a cache alone */
    uint32_t num_stores;
    uint32_t threads;     /* of each worker, 0: the processors shared out */
    uint32_t context;     /* tokens, 0: the model's */
    uint32_t pool_tokens; /* 0: the worker's default */
    uint32_t queue_max;   /* 0: the worker's default */
    uint32_t base_port;   /* the plan of common/base/ports.h begins here */
};

/* One line is one option of `up`, one key in the state, and how both are read. */
struct cluster_setting {
    const char *name; /* without its dashes */
    const char *argument;
    const char *doc;
    size_t offset; /* in struct cluster_settings */
    size_t room;   /* of a text; 0: it is a number */
    uint32_t min;
    uint32_t max;
    const char *words; /* the texts allowed, with a space before and behind each; NULL: any */
};
extern const struct cluster_setting cluster_setting_list[];
extern const uint32_t cluster_num_settings; /* at most 32: a mask has a bit for each */

/* Reads and checks one; the error says what is allowed. */
RK_MUST_CHECK enum rk_status cluster_setting_parse(const struct cluster_setting *setting,
                                                   const char *text,
                                                   struct cluster_settings *settings,
                                                   struct rk_error *error);
void cluster_settings_default(struct cluster_settings *ret_settings);
json_t *cluster_settings_to_json(const struct cluster_settings *settings);
RK_MUST_CHECK enum rk_status cluster_settings_from_json(const json_t *object,
                                                        struct cluster_settings *ret_settings,
                                                        struct rk_error *error);
/* The first setting of `given` (a bit each) that differs; NULL: none does. */
const struct cluster_setting *cluster_settings_differ(const struct cluster_settings *wanted,
                                                      const struct cluster_settings *running,
                                                      uint32_t given);
/* "4", "bf16", ...; into room bytes. */
void cluster_setting_text(const struct cluster_setting *setting,
                          const struct cluster_settings *settings, char *ret_text, size_t room);

/* ---- Clusters ---- */

enum cluster_role { CLUSTER_COORDINATOR, CLUSTER_STORE, CLUSTER_WORKER };

struct cluster_process {
    enum cluster_role role;
    char node_id[32];
    pid_t pid;           /* 0: not running */
    uint64_t start_time; /* clock ticks after boot, from /proc */
    char program[PATH_MAX];
    char address[64];
    char metrics[64];
    char log[PATH_MAX];
};

struct cluster {
    char dir[PATH_MAX]; /* canonical */
    char id[RK_CLUSTER_ID_BYTES];
    int folder; /* dir, open, and locked by who changes the cluster; 0: not open */
    struct cluster_settings settings;
    bool has_settings;      /* a state of an older version has none */
    uint32_t num_processes; /* in the order of their start */
    struct cluster_process processes[CLUSTER_PROCESSES_MAX];
};

struct cluster_options {
    const char *dir; /* NULL: the default */
    struct cluster_settings settings;
    uint32_t given; /* settings that must hold if one runs there already: a bit each, in order */
    bool verbose;   /* a line on stderr for each step */
};

const char *cluster_role_name(enum cluster_role role);
const char *cluster_program_name(enum cluster_role role);
/* False for a program that is none of ours; a path or a name. */
bool cluster_role_of_program(const char *program, enum cluster_role *ret_role);
/* $XDG_RUNTIME_DIR/redknot/cluster, else /tmp/redknot-UID/cluster. */
void cluster_default_dir(char ret_dir[PATH_MAX]);
/* $REDKNOT_MODEL, else below ${REDKNOT_CACHE:-$HOME/.cache/redknot}/models. */
void cluster_default_model(char ret_model[PATH_MAX]);
/* A base_port that left all its ports free a moment ago; 0 when none was found. */
uint16_t cluster_free_ports(uint32_t num_stores, uint32_t num_workers);

/*
 * Starts what is missing and waits until all serve. Where nothing runs that is everything, and on
 * failure everything is stopped again; where some of it runs already, its settings count, and only
 * what this call started is stopped. The error names the process and has the end of its log.
 * RK_ERR_EXISTS when one with other settings runs in dir.
 */
RK_MUST_CHECK enum rk_status cluster_start(const struct cluster_options *options, int timeout_ms,
                                           struct cluster *ret_cluster, uint32_t *ret_started,
                                           struct rk_error *error);

/*
 * Opens the folder, locks it when `change`, and reads the state. RK_ERR_NOT_FOUND: no cluster
 * was started in dir. RK_ERR_CORRUPT: its state cannot be read; what runs of it was found by its
 * logs and is in the cluster. In both cases, as on RK_OK, the cluster is there to be closed; on
 * other errors nothing is. dir NULL: the default.
 */
RK_MUST_CHECK enum rk_status cluster_open(const char *dir, bool change, struct cluster *ret_cluster,
                                          struct rk_error *error);
void cluster_close(struct cluster *cluster); /* accepts a zeroed one; stops nothing */
/* Adds processes that run in the cluster's folder and that its state does not have. */
void cluster_find_strays(struct cluster *cluster);
/* SIGTERM, workers first; SIGKILL for what is left at the deadline. Returns how many were
 * running. Removes the state and closes. */
uint32_t cluster_stop(struct cluster *cluster, int timeout_ms, bool verbose);
/* Stops one process, if it runs, starts it again and waits until it serves. */
RK_MUST_CHECK enum rk_status cluster_restart(struct cluster *cluster,
                                             struct cluster_process *process, int timeout_ms,
                                             struct rk_error *error);
uint32_t cluster_num_running(const struct cluster *cluster);
/* NULL when there is none of this name. */
struct cluster_process *cluster_find(struct cluster *cluster, const char *node_id);
/* The folder meant: dir if it was given; else that of the cluster whose coordinator was named and
 * of which something runs, in `room`; else NULL, the default. */
const char *cluster_dir_named(const struct cli_common *common, const char *dir,
                              char room[PATH_MAX]);
/* RK_ERR_INVALID when --coordinator, or the variable and no --dir, names another cluster. */
RK_MUST_CHECK enum rk_status cluster_check_named(const struct cluster *cluster,
                                                 const struct cli_common *common, bool dir_given,
                                                 struct rk_error *error);
json_t *cluster_to_json(const struct cluster *cluster);
RK_MUST_CHECK enum rk_status cluster_save(const struct cluster *cluster, struct rk_error *error);

/* ---- cluster_probe.c: whether it serves, and is who it should be ---- */

/* Until the process serves, as itself; the error names what it is that answers, or the end of its
 * log. */
RK_MUST_CHECK enum rk_status cluster_wait_serving(const struct cluster *cluster,
                                                  const struct cluster_process *process,
                                                  int64_t deadline_ns, struct rk_error *error);
/* Until the coordinator counts the process as alive; `process` NULL: all that should run. */
RK_MUST_CHECK enum rk_status cluster_wait_registered(const struct cluster *cluster,
                                                     const struct cluster_process *process,
                                                     int64_t deadline_ns, struct rk_error *error);
/* The ports that the process needs are free: else the error names who has them. */
RK_MUST_CHECK enum rk_status cluster_check_ports(const struct cluster_process *process,
                                                 struct rk_error *error);

/* ---- process.c ---- */

/* A pidfd of exactly this process, or -1 when it is gone. */
int process_open(const struct cluster_process *process);
bool process_runs(const struct cluster_process *process);
/* True when it ended by the deadline. */
bool process_wait(int pidfd, int64_t deadline_ns);
/* SIGTERM, for a stopped one too. */
void process_terminate(int pidfd);
/* argv[0] is the program's path. Output goes to the end of the log file `log_fd`. */
RK_MUST_CHECK enum rk_status process_spawn(struct cluster_process *process, char *const argv[],
                                           int log_fd, struct rk_error *error);
/* Reaps our own children that ended. */
void process_reap(void);

/* ---- proc.c: what /proc tells ---- */

/* Start time of a process in clock ticks; 0 when there is none, or only a zombie. */
uint64_t process_start_time(pid_t pid);
char proc_state(pid_t pid); /* 'R', 'S', 'T', ...; 0: there is none */
bool proc_is_ours(pid_t pid);
/* The path of its program, without what a program has behind it that was replaced. */
bool proc_program(pid_t pid, char ret_program[PATH_MAX]);

struct proc_daemon {
    struct cluster_process process; /* log: what its standard output is */
    char coordinator[64];           /* as it was told; "" */
};
/* Each of our three programs that this user runs. */
void proc_each_daemon(void (*visit)(void *context, const struct proc_daemon *daemon),
                      void *context);
/* Whether somebody listens on a port of this machine; *ret_pid is 0 when it cannot be seen who. */
bool proc_port_listener(uint16_t port, pid_t *ret_pid);
/* "process 12 (redis-server *:7100)" */
void proc_describe(pid_t pid, char *ret_text, size_t room);
/* It was killed, and the kernel has not put all of it away. */
bool proc_is_ending(pid_t pid);

/* ---- folder.c ---- */

#define FOLDER_CREATE  1u /* missing parts are made, mode 0700 */
#define FOLDER_PRIVATE 2u /* it and the one above it must be for this user alone */

/*
 * Opens a folder that is ours and that nobody else can write or exchange. On RK_OK the caller
 * closes *ret_fd, and ret_path is its path without links. RK_ERR_NOT_FOUND: a part is missing;
 * RK_ERR_IO: a part is somebody else's, or may be written by others; the error says which.
 */
RK_MUST_CHECK enum rk_status folder_open(const char *path, unsigned flags, char ret_path[PATH_MAX],
                                         int *ret_fd, struct rk_error *error);
/* A folder in it, made if it is missing. */
RK_MUST_CHECK enum rk_status folder_make(int fd, const char *name, struct rk_error *error);
/* A regular file of ours, no link; NUL-terminated, freed with rk_free. RK_ERR_NOT_FOUND. */
RK_MUST_CHECK enum rk_status folder_read(int fd, const char *name, char **ret_text,
                                         struct rk_error *error);
/* Replaces it as a whole. */
RK_MUST_CHECK enum rk_status folder_write(int fd, const char *name, const char *text,
                                          struct rk_error *error);

#endif
