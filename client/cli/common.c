#include "client/cli/cli_internal.h"
#include "client/cli/cluster_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/number.h"
#include "common/base/text.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STDIN_STEP_BYTES 65536

/* ---- Options ---- */

static const struct argp_option common_options[] = {
    {.name = "coordinator",
     .key = CLI_LETTER_COORDINATOR,
     .arg = "ADDR",
     .doc = "Coordinator, default " CLI_COORDINATOR_DEFAULT " or $REDKNOT_COORDINATOR"},
    {.name = "json", .key = CLI_LETTER_JSON, .doc = "Print one JSON object on standard output"},
    {.name = NULL},
};

static error_t parse_common(int key, char *arg, struct argp_state *state)
{
    struct cli_common *common = state->input;
    switch (key) {
    case ARGP_KEY_INIT: {
        const char *address = getenv("REDKNOT_COORDINATOR");
        common->coordinator_env = address && address[0];
        common->coordinator = common->coordinator_env ? address : CLI_COORDINATOR_DEFAULT;
        return 0;
    }
    case CLI_LETTER_COORDINATOR:
        common->coordinator = arg;
        common->coordinator_given = true;
        return 0;
    case CLI_LETTER_JSON:
        common->json = true;
        cli_json_errors();
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp common_argp = {.options = common_options, .parser = parse_common};
const struct argp_child cli_common_children[] = {
    {.argp = &common_argp, .header = "Common options:", .group = 100}, {.argp = NULL}};

uint64_t cli_parse_uint(struct argp_state *state, const char *option, const char *text,
                        uint64_t min, uint64_t max)
{
    uint64_t number = 0;
    struct rk_error error;
    if (rk_number_parse(option, text, min, max, &number, &error) != RK_OK) {
        argp_error(state, "%s", error.text);
    }
    return number;
}

double cli_parse_double(struct argp_state *state, const char *option, const char *text, double min,
                        double max)
{
    char *end = NULL;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= min && value <= max)) {
        argp_error(state, "%s: \"%s\" is no number from %g to %g", option, text, min, max);
    }
    return value;
}

const char *cli_parse_level(struct argp_state *state, const char *text)
{
    if (!text[0] || strspn(text, "abcdefghijklmnopqrstuvwxyz0123456789_-") != strlen(text)) {
        argp_error(state, "level \"%s\" is no name of a level, such as full, exact or fast", text);
    }
    return text;
}

/* ---- Progress ---- */

static bool progress_shown;

void cli_progress_end(void)
{
    if (progress_shown) {
        (void)fputs("\r\033[K", stderr);
        (void)fflush(stderr);
        progress_shown = false;
    }
}

void cli_progress(const char *what, uint64_t done, uint64_t total)
{
    enum { WIDTH = 30 };
    if (!isatty(STDERR_FILENO)) {
        return;
    }
    if (done >= total) {
        cli_progress_end();
        return;
    }
    int filled = total ? (int)(done * WIDTH / total) : 0;
    (void)fprintf(stderr, "\r\033[K%.40s [%.*s%*s] %llu/%llu", what, filled,
                  "##############################", WIDTH - filled, "", (unsigned long long)done,
                  (unsigned long long)total);
    (void)fflush(stderr);
    progress_shown = true;
}

void cli_print_wrapped(FILE *file, const char *text, size_t bytes, int indent, int columns)
{
    int column = 0;
    for (size_t i = 0; i < bytes;) {
        size_t end = i;
        int width = 0;
        while (end < bytes && (unsigned char)text[end] > ' ') {
            width += ((unsigned char)text[end] & 0xC0) != 0x80; /* code points */
            end++;
        }
        if (end > i) {
            if (column > 0 && column + 1 + width > columns) {
                (void)fputc('\n', file);
                column = 0;
            }
            column += column ? fprintf(file, " ") : fprintf(file, "%*s", indent, "");
            (void)fwrite(text + i, 1, end - i, file);
            column += width;
        }
        i = end + 1;
    }
    if (column > 0) {
        (void)fputc('\n', file);
    }
}

/* ---- Clients and signals ---- */

static pthread_mutex_t current_lock = PTHREAD_MUTEX_INITIALIZER; /* Guards the two below. */
static struct rk_client *current;
static const char *rubbish; /* under the same lock */
static _Atomic int num_signals;
static _Atomic bool signals_end;

__attribute__((noreturn)) static void end_by_signal(int code)
{
    (void)pthread_mutex_lock(&current_lock);
    if (rubbish) {
        (void)unlink(rubbish);
    }
    _exit(code);
}

static void *signals_main(void *context)
{
    (void)context;
    sigset_t set;
    (void)sigemptyset(&set);
    (void)sigaddset(&set, SIGINT);
    (void)sigaddset(&set, SIGTERM);
    for (;;) {
        int number = 0;
        if (sigwait(&set, &number) != 0) {
            continue;
        }
        if (atomic_fetch_add(&num_signals, 1) > 0) {
            end_by_signal(128 + number); /* Asked twice: what hangs is cut short. */
        }
        if (atomic_load(&signals_end)) {
            (void)fputs("redknot: interrupted\n", stderr);
            end_by_signal(CLI_FAIL);
        }
        (void)pthread_mutex_lock(&current_lock);
        if (current) {
            rk_client_cancel(current);
        }
        (void)pthread_mutex_unlock(&current_lock);
    }
    return NULL;
}

void cli_signals_start(void)
{
    pthread_t thread; /* rk_service_init() blocked the signals for all threads. */
    RK_ASSERT(pthread_create(&thread, NULL, signals_main, NULL) == 0);
    (void)pthread_detach(thread);
}

void cli_rubbish(const char *path)
{
    (void)pthread_mutex_lock(&current_lock);
    rubbish = path;
    (void)pthread_mutex_unlock(&current_lock);
}

void cli_signals_end(void)
{
    atomic_store(&signals_end, true);
}

bool cli_interrupted(void)
{
    return atomic_load(&num_signals) > 0;
}

/* Workers of this user on this machine that were started for the coordinator: while it is down,
 * they are known all the same. */
struct local_workers {
    const char *coordinator;
    char addresses[CLUSTER_WORKERS_MAX][64];
    const char *pointers[CLUSTER_WORKERS_MAX];
    size_t count;
};

static void local_worker_visit(void *context, const struct proc_daemon *daemon)
{
    struct local_workers *workers = context;
    if (daemon->process.role == CLUSTER_WORKER && daemon->process.address[0] &&
        strcmp(daemon->coordinator, workers->coordinator) == 0 &&
        workers->count < CLUSTER_WORKERS_MAX) {
        char *address = workers->addresses[workers->count];
        memcpy(address, daemon->process.address, sizeof(workers->addresses[0]));
        workers->pointers[workers->count++] = address;
    }
}

enum rk_status cli_client_open(const struct cli_common *common, const char *worker,
                               struct rk_client **ret_client, struct rk_error *error)
{
    struct local_workers workers = {.coordinator = common->coordinator};
    if (!worker) {
        proc_each_daemon(local_worker_visit, &workers);
    }
    struct rk_client_options options = {.coordinator = common->coordinator,
                                        .worker = worker,
                                        .model = common->model,
                                        .workers_known = workers.pointers,
                                        .num_workers_known = workers.count};
    struct rk_client *client = NULL;
    enum rk_status status = rk_client_create(&options, &client, error);
    if (status != RK_OK) {
        return status;
    }
    (void)pthread_mutex_lock(&current_lock);
    current = client;
    if (cli_interrupted()) {
        rk_client_cancel(client);
    }
    (void)pthread_mutex_unlock(&current_lock);
    *ret_client = client;
    return RK_OK;
}

enum rk_status cli_client_open_one(const struct cli_common *common, const char *worker,
                                   struct rk_client **ret_client, struct rk_error *error)
{
    char *address = NULL;
    struct rk_client *client = NULL;
    enum rk_status status = cli_client_open(common, worker, &client, error);
    if (status == RK_OK) {
        status = rk_client_pick_worker(client, &address, error);
    }
    cli_client_close(client);
    if (status == RK_OK) {
        status = cli_client_open(common, address, ret_client, error);
    }
    rk_client_string_free(address);
    return status;
}

void cli_client_close(struct rk_client *client)
{
    (void)pthread_mutex_lock(&current_lock);
    if (current == client) {
        current = NULL;
    }
    (void)pthread_mutex_unlock(&current_lock);
    rk_client_destroy(client);
}

/* ---- Files ---- */

static enum rk_status check_text(const char *path, const char *text, size_t bytes,
                                 struct rk_error *error)
{
    if (memchr(text, 0, bytes)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: it holds a NUL byte, so it is no text; give a text file", path);
    }
    if (!rk_utf8_valid(text, bytes)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: it is not UTF-8; convert it, for example with iconv", path);
    }
    return RK_OK;
}

static enum rk_status read_all(int fd, const char *path, size_t bytes, char **ret_text,
                               struct rk_error *error)
{
    char *text = rk_alloc(bytes + 1);
    if (!text) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", path);
    }
    size_t done = 0;
    while (done < bytes) {
        ssize_t got = read(fd, text + done, bytes - done);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            rk_free(text);
            return rk_error_set(error, RK_ERR_INVALID, "%s: %s; is it being written?", path,
                                got < 0 ? strerror(errno) : "it became shorter while it was read");
        }
        done += (size_t)got;
    }
    text[bytes] = 0;
    *ret_text = text;
    return RK_OK;
}

enum rk_status cli_read_text(const char *path, char **ret_text, size_t *ret_bytes,
                             struct rk_error *error)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* A FIFO must not hang us. */
    if (fd < 0) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: %s; check the path", path, strerror(errno));
    }
    enum rk_status status = RK_OK;
    struct stat info;
    char *text = NULL;
    if (fstat(fd, &info) != 0) {
        status = rk_error_set(error, RK_ERR_INVALID, "%s: %s", path, strerror(errno));
    } else if (S_ISDIR(info.st_mode)) {
        status = rk_error_set(error, RK_ERR_INVALID, "%s: it is a directory; name its files", path);
    } else if (!S_ISREG(info.st_mode)) {
        status = rk_error_set(error, RK_ERR_INVALID, "%s: it is no regular file", path);
    } else if (info.st_size == 0) {
        status = rk_error_set(error, RK_ERR_INVALID, "%s: the file is empty; give it text", path);
    } else if (info.st_size > (off_t)CLI_FILE_BYTES_MAX) {
        status = rk_error_set(error, RK_ERR_TOO_LONG, "%s: it is larger than %u MiB; split it",
                              path, CLI_FILE_BYTES_MAX >> 20);
    } else {
        status = read_all(fd, path, (size_t)info.st_size, &text, error);
    }
    (void)close(fd);
    if (status == RK_OK) {
        status = check_text(path, text, (size_t)info.st_size, error);
    }
    if (status != RK_OK) {
        rk_free(text);
        return status;
    }
    *ret_text = text;
    *ret_bytes = (size_t)info.st_size;
    return RK_OK;
}

enum rk_status cli_read_stdin(char **ret_text, size_t *ret_bytes, struct rk_error *error)
{
    static const char name[] = "standard input";
    size_t bytes = 0;
    ssize_t got = 1;
    char *text = NULL;
    enum rk_status status = RK_OK;
    while (got != 0 && status == RK_OK) {
        char *longer = rk_alloc_resize(text, bytes + STDIN_STEP_BYTES + 1, 1);
        if (!longer) {
            status = rk_error_set(error, RK_ERR_NO_MEMORY, "%s: out of memory", name);
            break;
        }
        text = longer;
        got = read(STDIN_FILENO, text + bytes, STDIN_STEP_BYTES);
        if (got < 0 && errno != EINTR) {
            status = rk_error_set(error, RK_ERR_INVALID, "%s: %s", name, strerror(errno));
        }
        bytes += got > 0 ? (size_t)got : 0;
        if (bytes > CLI_FILE_BYTES_MAX) {
            status = rk_error_set(error, RK_ERR_TOO_LONG, "%s: it is larger than %u MiB; split it",
                                  name, CLI_FILE_BYTES_MAX >> 20);
        }
    }
    if (status == RK_OK && bytes == 0) {
        status = rk_error_set(error, RK_ERR_INVALID, "%s: it is empty; give it text", name);
    }
    if (status == RK_OK) {
        text[bytes] = 0;
        status = check_text(name, text, bytes, error);
    }
    if (status != RK_OK) {
        rk_free(text);
        return status;
    }
    *ret_text = text;
    *ret_bytes = bytes;
    return RK_OK;
}
