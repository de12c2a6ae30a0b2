/*
 * cli_internal: what the subcommands of `redknot` share.
 *
 * Exit codes: 0 it worked, 1 it failed, 2 wrong usage. An error is one line on
 * stderr: "redknot: what: why; what to do". SIGINT and SIGTERM are taken by one
 * thread, which cancels the running call; a second one ends the process.
 */
#ifndef CLIENT_CLI_CLI_INTERNAL_H
#define CLIENT_CLI_CLI_INTERNAL_H

#include "client/redknot.h"
#include "common/base/ports.h"

#include <argp.h>
#include <jansson.h>
#include <stdio.h>

#define CLI_OK    0
#define CLI_FAIL  1
#define CLI_USAGE 2

#define CLI_COORDINATOR_DEFAULT RK_LISTEN_COORDINATOR
#define CLI_FILE_BYTES_MAX      (64u << 20) /* of a document */
#define CLI_SEGMENTS_MAX        1024        /* of one request */

/*
 * ---- Letters of options: one letter means one thing in every command and daemon ----
 *
 * An option without a line here has no letter. tests/client/test_cli.c compares all helps.
 */
enum cli_letter {
    CLI_LETTER_COORDINATOR = 'c', /* also of the worker */
    CLI_LETTER_DIR = 'd',         /* of a cluster's state */
    CLI_LETTER_EXAMPLES = 'e',
    CLI_LETTER_JSON = 'j',
    CLI_LETTER_LEVEL = 'l', /* --level, also called --fidelity */
    CLI_LETTER_MODEL = 'm', /* also of the worker */
    CLI_LETTER_MAX_TOKENS = 'n',
    CLI_LETTER_PROMPT = 'p',
    CLI_LETTER_SEGMENT = 's',
    CLI_LETTER_THREADS = 't', /* also of the worker */
    CLI_LETTER_VERBOSE = 'v',
    CLI_LETTER_WORKER = 'w', /* the address of one */
};

/* ---- Options that every subcommand has; parsed by the child below ---- */

struct cli_common {
    const char *coordinator; /* never NULL after parsing */
    bool coordinator_given;  /* --coordinator */
    bool coordinator_env;    /* else: $REDKNOT_COORDINATOR */
    const char *model;       /* only workers of this one; NULL: any. Of commands that compute. */
    bool json;
};
extern const struct argp_child cli_common_children[]; /* child 0's input: struct cli_common */

#define CLI_MODEL_DOC "Of several that are served: by name, or the begin of its fingerprint"

/* Whole words from a list of limits: exits with 2 and names the option. */
uint64_t cli_parse_uint(struct argp_state *state, const char *option, const char *text,
                        uint64_t min, uint64_t max);
double cli_parse_double(struct argp_state *state, const char *option, const char *text, double min,
                        double max);
/* "full", "exact", ...: exits with 2 for what cannot be a level; which exist is the worker's to
 * say, that may be newer or older than we are. */
const char *cli_parse_level(struct argp_state *state, const char *text);

/* ---- Messages ---- */

/* Prints "redknot: ..." on stderr; returns CLI_FAIL. */
int cli_fail(const char *format, ...) RK_PRINTF(1, 2);
/* The same for an error of the library, with what to do about it. */
int cli_fail_error(const char *what, const struct rk_error *error);
/* A command's last word, in main: with --json, and unless it printed an object, the first error is
 * told as {"error": {"status", "text"}} on standard output, beside the line on stderr. */
int cli_finish(int code);
void cli_json_errors(void); /* --json was given */

/* ---- JSON and text from outside (common/base/text.h) ---- */

/* Prints and frees; what cannot be written makes the command fail. */
void cli_print_json(json_t *object);
json_t *cli_json_id(const struct rk_id *id);
json_t *cli_json_error(const struct rk_error *error); /* {"status", "text"} */
/* Never NULL, whatever the bytes: what is no UTF-8 becomes U+FFFD. */
json_t *cli_json_text(const char *text, size_t bytes);
/* object[key] = the text; where bytes had to be replaced, object[key_hex] has them all. */
void cli_json_set_text(json_t *object, const char *key, const char *text, size_t bytes);
void cli_json_set_string(json_t *object, const char *key, const char *text);
/* For a table: control characters and what is no UTF-8 escaped. ret_text is returned. */
#define CLI_SHOWN_BYTES 1024
const char *cli_shown(const char *text, char *ret_text, size_t room);
/* For running text: the same, but for newlines and tabs. */
bool cli_write_text(FILE *file, const char *text, size_t bytes);

/* ---- Figures and progress ---- */

/* "12.3 MiB" into ret_text, which is returned. */
const char *cli_bytes(uint64_t bytes, char ret_text[32]);
/* "0.123 s", "45 ms" */
const char *cli_seconds(double seconds, char ret_text[32]);
/* A bar on stderr, only on a terminal. done == total ends and wipes it. */
void cli_progress(const char *what, uint64_t done, uint64_t total);
void cli_progress_end(void);
/* Text at `columns` columns with an indentation; control characters become spaces. */
void cli_print_wrapped(FILE *file, const char *text, size_t bytes, int indent, int columns);

/* ---- Clients and signals ---- */

void cli_signals_start(void); /* first thing, before any thread */
bool cli_interrupted(void);
/* A file to remove should a signal end the process; borrowed. NULL: none any more. */
void cli_rubbish(const char *path);
/* From now on the first signal ends the process, for the calls that run cannot be cancelled. */
void cli_signals_end(void);
/* Connects nothing yet. While it lives a signal cancels its calls. */
RK_MUST_CHECK enum rk_status cli_client_open(const struct cli_common *common, const char *worker,
                                             struct rk_client **ret_client, struct rk_error *error);
/* The same for calls that must all meet one worker: it is chosen now. */
RK_MUST_CHECK enum rk_status cli_client_open_one(const struct cli_common *common,
                                                 const char *worker, struct rk_client **ret_client,
                                                 struct rk_error *error);
void cli_client_close(struct rk_client *client); /* accepts NULL */

/* ---- Files ---- */

/* A text file, NUL-terminated; freed with rk_free. The error names file and cause: missing,
 * directory, empty, too big, holds a NUL byte or no UTF-8. */
RK_MUST_CHECK enum rk_status cli_read_text(const char *path, char **ret_text, size_t *ret_bytes,
                                           struct rk_error *error);

/* A file that is written is there whole, or not at all: it gets its name at commit, and is gone
 * after an error, an abort or a signal. A device or a pipe is written to as it is. */
struct cli_file;
RK_MUST_CHECK enum rk_status cli_file_create(const char *path, struct cli_file **ret_file,
                                             struct rk_error *error);
RK_MUST_CHECK enum rk_status cli_file_write(struct cli_file *file, const void *data, size_t bytes,
                                            struct rk_error *error);
/* Frees the file, also when it fails. */
RK_MUST_CHECK enum rk_status cli_file_commit(struct cli_file *file, struct rk_error *error);
void cli_file_abort(struct cli_file *file); /* accepts NULL */

/* The same of standard input. */
RK_MUST_CHECK enum rk_status cli_read_stdin(char **ret_text, size_t *ret_bytes,
                                            struct rk_error *error);

/* ---- Reports ---- */

/* How many segments stand behind others, with KV computed without these. */
uint32_t cli_report_alone(const struct rk_report *report);
json_t *cli_report_json(const struct rk_report *report);
/* "2 chain, 1 segment": how many segments of which source, in their order. */
void cli_report_sources(const struct rk_report *report, char *ret_text, size_t room);
/* A line, one for each reason why the answer is approximate, and one for what could not be stored;
 * verbose: a line per segment, too.
 */
void cli_report_print(FILE *file, const struct rk_report *report, bool verbose);

/* ---- Subcommands: argv[0] is "redknot put" ---- */

int cli_up(int argc, char **argv);
int cli_down(int argc, char **argv);
int cli_restart(int argc, char **argv);
int cli_logs(int argc, char **argv);
int cli_put(int argc, char **argv);
int cli_generate(int argc, char **argv);
int cli_status(int argc, char **argv);
int cli_drop(int argc, char **argv);
int cli_tokenize(int argc, char **argv);
int cli_eval(int argc, char **argv);
int cli_value(int argc, char **argv);
int cli_demo(int argc, char **argv);

#endif
