#include "client/cli/cli_internal.h"
#include "client/cli/cluster_internal.h"
#include "common/base/alloc.h"
#include "common/base/limits.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEMO_WORKERS         2
#define DEMO_DOCUMENTS_MAX   32
#define DEMO_QUESTIONS_MAX   64
#define DEMO_UP_TIMEOUT_MS   120000
#define DEMO_DOWN_TIMEOUT_MS 10000
#define DEMO_COLUMNS         96

struct demo_arguments {
    struct cli_common common;
    const char *examples;
    const char *model;
};

static const struct argp_option demo_options[] = {
    {.name = "examples",
     .key = CLI_LETTER_EXAMPLES,
     .arg = "DIR",
     .doc = "Documents and questions.json"},
    {.name = "model",
     .key = CLI_LETTER_MODEL,
     .arg = "FILE",
     .doc = "GGUF file; default as for `redknot up`"},
    {.name = NULL},
};

static error_t parse_demo(int key, char *arg, struct argp_state *state)
{
    struct demo_arguments *arguments = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &arguments->common;
        return 0;
    case CLI_LETTER_EXAMPLES:
        arguments->examples = arg;
        return 0;
    case CLI_LETTER_MODEL:
        arguments->model = arg;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp demo_argp = {
    .options = demo_options,
    .parser = parse_demo,
    .doc = "Start a private cluster, store the example documents through one worker, ask questions "
           "over them in other orders and through another worker, and compare the time to the "
           "first token with and without reuse. Everything is stopped at the end.",
    .children = cli_common_children};

struct question {
    size_t documents[DEMO_DOCUMENTS_MAX]; /* indices, in the order asked */
    size_t num_documents;
    const char *prompt;
    const char *about; /* what the row shows; "" if not told */
    const char *level;
    uint32_t worker;
    uint32_t max_tokens;
};

enum { SUMMARY_EXACT, SUMMARY_OTHER, SUMMARY_LEVELS };

struct summary_level {
    uint32_t questions;
    uint32_t same; /* of them, in every byte as at full */
};

struct summary {
    struct summary_level levels[SUMMARY_LEVELS];
    uint32_t reusing; /* questions that found something stored; the times are theirs */
    double ttft_cold_s;
    double ttft_reuse_s;
    uint64_t prompt_tokens;
    uint64_t tokens_reused;
};

struct demo {
    struct summary summary;
    json_t *root; /* owns the strings below */
    const char *names[DEMO_DOCUMENTS_MAX];
    char *texts[DEMO_DOCUMENTS_MAX];
    size_t num_documents;
    struct question questions[DEMO_QUESTIONS_MAX];
    size_t num_questions;
    char dir[PATH_MAX]; /* of the examples */
    char state_dir[PATH_MAX];
    struct cluster cluster;
    bool running;
    json_t *rows;
};

/* ---- The examples ---- */

static bool has_questions(const char *dir)
{
    char path[2 * PATH_MAX];
    (void)snprintf(path, sizeof(path), "%s/questions.json", dir);
    return access(path, R_OK) == 0;
}

/* Given, or beside the program (installed, then in the build tree), or below here. */
static enum rk_status find_examples(const char *given, char ret_dir[PATH_MAX],
                                    struct rk_error *error)
{
    static const char *const near[] = {"../share/redknot/examples", "../../examples",
                                       "../../../examples"};
    char bin[PATH_MAX];
    char path[PATH_MAX + 64];
    if (given) {
        (void)snprintf(ret_dir, PATH_MAX, "%s", given);
        return has_questions(given) ? RK_OK
                                    : rk_error_set(error, RK_ERR_NOT_FOUND,
                                                   "%s/questions.json: %s; check --examples", given,
                                                   strerror(errno));
    }
    ssize_t bytes = readlink("/proc/self/exe", bin, sizeof(bin) - 1);
    bin[bytes > 0 ? bytes : 0] = 0;
    char *slash = strrchr(bin, '/');
    for (size_t i = 0; slash && i < sizeof(near) / sizeof(near[0]); i++) {
        *slash = 0;
        int length = snprintf(path, sizeof(path), "%s/%s", bin, near[i]);
        if (length < PATH_MAX && has_questions(path)) {
            memcpy(ret_dir, path, (size_t)length + 1);
            return RK_OK;
        }
    }
    (void)snprintf(ret_dir, PATH_MAX, "examples");
    return has_questions(ret_dir) ? RK_OK
                                  : rk_error_set(error, RK_ERR_NOT_FOUND,
                                                 "no examples found; name their folder with "
                                                 "--examples");
}

static enum rk_status wrong(const struct demo *demo, const char *what, struct rk_error *error)
{
    return rk_error_set(error, RK_ERR_INVALID, "%s/questions.json: %s", demo->dir, what);
}

static enum rk_status load_documents(struct demo *demo, struct rk_error *error)
{
    const json_t *list = json_object_get(demo->root, "documents");
    size_t count = json_array_size(list);
    if (count == 0 || count > DEMO_DOCUMENTS_MAX) {
        return wrong(demo, "\"documents\" must name 1 to 32 files", error);
    }
    for (size_t i = 0; i < count; i++) {
        char path[PATH_MAX + NAME_MAX + 2];
        size_t bytes = 0;
        const char *name = json_string_value(json_array_get(list, i));
        if (!name || strchr(name, '/') || strlen(name) > NAME_MAX) {
            return wrong(demo, "a document is named by its file in the same folder", error);
        }
        (void)snprintf(path, sizeof(path), "%s/%s", demo->dir, name);
        enum rk_status status = cli_read_text(path, &demo->texts[i], &bytes, error);
        if (status != RK_OK) {
            return status;
        }
        demo->names[i] = name;
        demo->num_documents++;
    }
    return RK_OK;
}

static enum rk_status load_question(struct demo *demo, const json_t *from,
                                    struct question *question, struct rk_error *error)
{
    const json_t *documents = json_object_get(from, "documents");
    json_int_t worker = json_integer_value(json_object_get(from, "worker"));
    json_int_t max_tokens = json_integer_value(json_object_get(from, "max_tokens"));
    question->prompt = json_string_value(json_object_get(from, "prompt"));
    question->level = json_string_value(json_object_get(from, "level"));
    const char *about = json_string_value(json_object_get(from, "about"));
    question->about = about ? about : "";
    question->num_documents = json_array_size(documents);
    if (!question->prompt || !question->level || question->num_documents == 0 ||
        question->num_documents > DEMO_DOCUMENTS_MAX || worker < 0 || worker >= DEMO_WORKERS ||
        max_tokens < 0 || max_tokens > 4096) {
        return wrong(demo,
                     "a question has \"documents\", \"prompt\", \"level\", \"worker\" (0 or 1) and "
                     "\"max_tokens\"",
                     error);
    }
    question->worker = (uint32_t)worker;
    question->max_tokens = (uint32_t)max_tokens;
    for (size_t i = 0; i < question->num_documents; i++) {
        const char *name = json_string_value(json_array_get(documents, i));
        size_t at = 0;
        while (at < demo->num_documents && (!name || strcmp(demo->names[at], name) != 0)) {
            at++;
        }
        if (at == demo->num_documents) {
            return wrong(demo, "a question names a document that \"documents\" does not", error);
        }
        question->documents[i] = at;
    }
    return RK_OK;
}

static enum rk_status load_examples(struct demo *demo, struct rk_error *error)
{
    char path[PATH_MAX + 32];
    json_error_t why;
    (void)snprintf(path, sizeof(path), "%s/questions.json", demo->dir);
    demo->root = json_load_file(path, 0, &why);
    if (!demo->root) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: line %d: %s", path, why.line, why.text);
    }
    enum rk_status status = load_documents(demo, error);
    const json_t *list = json_object_get(demo->root, "questions");
    size_t count = json_array_size(list);
    if (status == RK_OK && (count == 0 || count > DEMO_QUESTIONS_MAX)) {
        status = wrong(demo, "\"questions\" must list 1 to 64 questions", error);
    }
    for (size_t i = 0; i < count && status == RK_OK; i++) {
        status = load_question(demo, json_array_get(list, i), &demo->questions[i], error);
        demo->num_questions += status == RK_OK;
    }
    return status;
}

/* ---- The cluster ---- */

static enum rk_status start_cluster(struct demo *demo, const struct demo_arguments *arguments,
                                    struct rk_error *error)
{
    const char *parent = getenv("TMPDIR");
    if (!parent || strlen(parent) > 48) { /* A Unix socket's path is short. */
        parent = "/tmp";
    }
    (void)snprintf(demo->state_dir, sizeof(demo->state_dir), "%s/redknot-demo-XXXXXX", parent);
    if (!mkdtemp(demo->state_dir)) {
        enum rk_status status =
            rk_error_set(error, RK_ERR_IO, "%s: %s", demo->state_dir, strerror(errno));
        demo->state_dir[0] = 0;
        return status;
    }
    struct cluster_options options = {.dir = demo->state_dir};
    struct cluster_settings *settings = &options.settings;
    uint32_t started = 0;
    cluster_settings_default(settings);
    if (arguments->model) {
        (void)snprintf(settings->model, sizeof(settings->model), "%s", arguments->model);
    }
    settings->num_workers = DEMO_WORKERS;
    settings->base_port = cluster_free_ports(1, DEMO_WORKERS);
    /* One question runs at a time, so each worker may have all processors. */
    struct rk_limits limits;
    rk_limits_read(&limits);
    settings->threads = limits.cpus;
    if (settings->base_port == 0) {
        return rk_error_set(error, RK_ERR_IO, "no free ports on 127.0.0.1");
    }
    enum rk_status status =
        cluster_start(&options, DEMO_UP_TIMEOUT_MS, &demo->cluster, &started, error);
    demo->running = status == RK_OK;
    return status;
}

static const char *worker_address(const struct demo *demo, uint32_t index)
{
    for (uint32_t i = 0; i < demo->cluster.num_processes; i++) {
        const struct cluster_process *process = &demo->cluster.processes[i];
        if (process->role == CLUSTER_WORKER && index-- == 0) {
            return process->address;
        }
    }
    RK_ASSERT(!"the demo starts as many workers as questions may name");
    return NULL;
}

/* A tree of our own making, at most three levels deep. */
static void remove_tree(const char *path, int depth)
{
    DIR *dir = depth > 0 ? opendir(path) : NULL;
    struct dirent *entry = NULL;
    while (dir && (entry = readdir(dir))) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) {
            continue;
        }
        char child[2 * PATH_MAX];
        (void)snprintf(child, sizeof(child), "%s/%s", path, entry->d_name);
        if (unlink(child) != 0) {
            remove_tree(child, depth - 1);
        }
    }
    if (dir) {
        (void)closedir(dir);
    }
    (void)rmdir(path);
}

static void demo_clear(struct demo *demo, bool keep_logs)
{
    if (demo->running) {
        (void)cluster_stop(&demo->cluster, DEMO_DOWN_TIMEOUT_MS, false);
    }
    if (demo->state_dir[0] && keep_logs) {
        (void)fprintf(stderr, "redknot: the logs are in %s/logs\n", demo->state_dir);
    } else if (demo->state_dir[0]) {
        remove_tree(demo->state_dir, 4);
    }
    for (size_t i = 0; i < DEMO_DOCUMENTS_MAX; i++) {
        rk_free(demo->texts[i]);
    }
    json_decref(demo->rows);
    json_decref(demo->root);
}

/* ---- The run ---- */

struct answer {
    char text[16384];
    size_t bytes;
};

/* A question's two answers. */
struct pair {
    struct answer full;
    struct answer level;
};

static bool pair_same(const struct pair *pair)
{
    return pair->full.bytes == pair->level.bytes &&
           memcmp(pair->full.text, pair->level.text, pair->full.bytes) == 0;
}

static bool on_token(void *context, const int32_t *token_ids, size_t num_tokens, const char *text,
                     size_t text_bytes)
{
    struct answer *answer = context;
    (void)token_ids;
    (void)num_tokens;
    size_t room = sizeof(answer->text) - answer->bytes;
    size_t bytes = text_bytes < room ? text_bytes : room;
    memcpy(answer->text + answer->bytes, text, bytes);
    answer->bytes += bytes;
    return true;
}

static enum rk_status ask(const struct demo *demo, struct rk_client *client,
                          const struct question *question, const char *level, bool no_publish,
                          struct answer *answer, struct rk_report *ret_report,
                          struct rk_error *error)
{
    struct rk_segment_input segments[DEMO_DOCUMENTS_MAX] = {{.text = NULL}};
    for (size_t i = 0; i < question->num_documents; i++) {
        segments[i].text = demo->texts[question->documents[i]];
        segments[i].label = demo->names[question->documents[i]];
    }
    struct rk_generate_request request = {.segments = segments,
                                          .num_segments = question->num_documents,
                                          .prompt = {.text = question->prompt},
                                          .level = level,
                                          .max_tokens = question->max_tokens,
                                          .no_publish = no_publish};
    answer->bytes = 0;
    return rk_client_generate(client, &request, on_token, answer, ret_report, error);
}

static void order_text(const struct demo *demo, const struct question *question, char *text,
                       size_t room)
{
    size_t used = 0;
    text[0] = 0;
    for (size_t i = 0; i < question->num_documents && used < room; i++) {
        const char *name = demo->names[question->documents[i]];
        int stem = (int)strcspn(name, ".");
        int more = snprintf(text + used, room - used, "%s%.*s", i ? ", " : "", stem, name);
        used += more > 0 ? (size_t)more : 0;
    }
}

static void print_row(const struct demo *demo, size_t index, const struct rk_report *cold,
                      const struct rk_report *warm, const struct pair *pair)
{
    const struct question *question = &demo->questions[index];
    char order[1024];
    char cold_s[32];
    char warm_s[32];
    char bytes[32];
    order_text(demo, question, order, sizeof(order));
    if (index == 0) {
        (void)printf("\nCOLD TTFT: time to the first token with everything computed (level full); "
                     "REUSE TTFT: the same\nquestion at LEVEL with what is stored by then; "
                     "COMPUTED, REUSED: tokens of the second run.\n");
        (void)printf("\n%-3s %-9s %-9s %10s %10s %7s %9s %8s %10s %-5s\n", "Q", "LEVEL", "WORKER",
                     "COLD TTFT", "REUSE TTFT", "RATIO", "COMPUTED", "REUSED", "FETCHED", "PATH");
    }
    (void)printf("%-3zu %-9s %-9s %10s %10s %6.1fx %9u %8u %10s %-5s\n", index + 1, question->level,
                 warm->worker, cli_seconds(cold->ttft_s, cold_s), cli_seconds(warm->ttft_s, warm_s),
                 warm->ttft_s > 0 ? cold->ttft_s / warm->ttft_s : 0, warm->tokens_computed,
                 warm->tokens_reused, cli_bytes(warm->bytes_fetched, bytes), warm->path);
    if (question->about[0]) {
        (void)printf("    shows:  %s\n", question->about);
    }
    (void)printf("    order:  %s\n    asked:  %s\n    answer at %s:\n", order, question->prompt,
                 question->level);
    cli_print_wrapped(stdout, pair->level.text, pair->level.bytes, 8, DEMO_COLUMNS);
    if (pair_same(pair)) {
        (void)printf("    answer at full: the same, word by word\n");
    } else {
        (void)printf("    answer at full:\n");
        cli_print_wrapped(stdout, pair->full.text, pair->full.bytes, 8, DEMO_COLUMNS);
    }
    (void)putchar('\n');
    (void)fflush(stdout);
}

static void add_row(struct demo *demo, size_t index, const struct rk_report *cold,
                    const struct rk_report *warm, const struct pair *pair)
{
    const struct question *question = &demo->questions[index];
    json_t *order = json_array();
    for (size_t i = 0; i < question->num_documents; i++) {
        (void)json_array_append_new(order, json_string(demo->names[question->documents[i]]));
    }
    json_t *row =
        json_pack("{s:s, s:s, s:o, s:s, s:i, s:b, s:f, s:f, s:o, s:o}", "prompt", question->prompt,
                  "about", question->about, "documents", order, "level", question->level, "worker",
                  (int)question->worker, "same_as_full", (int)pair_same(pair), "ttft_cold_s",
                  cold->ttft_s, "ttft_reuse_s", warm->ttft_s, "cold", cli_report_json(cold),
                  "reuse", cli_report_json(warm));
    cli_json_set_text(row, "answer", pair->level.text, pair->level.bytes);
    cli_json_set_text(row, "answer_full", pair->full.text, pair->full.bytes);
    (void)json_array_append_new(demo->rows, row);
}

/* Counted as questions are answered. */
static void summary_add(struct summary *summary, const struct question *question,
                        const struct rk_report *cold, const struct rk_report *warm, bool same)
{
    struct summary_level *level =
        &summary->levels[strcmp(question->level, "exact") == 0 ? SUMMARY_EXACT : SUMMARY_OTHER];
    level->questions++;
    level->same += same;
    if (warm->tokens_reused > 0) { /* The others have nothing to be faster by. */
        summary->reusing++;
        summary->ttft_cold_s += cold->ttft_s;
        summary->ttft_reuse_s += warm->ttft_s;
    }
    summary->prompt_tokens += warm->prompt_tokens;
    summary->tokens_reused += warm->tokens_reused;
}

static void summary_print(const struct summary *summary)
{
    const struct summary_level *exact = &summary->levels[SUMMARY_EXACT];
    const struct summary_level *other = &summary->levels[SUMMARY_OTHER];
    char cold[32];
    char warm[32];
    (void)printf("SUMMARY\n");
    if (summary->reusing > 0) {
        (void)printf("  first token, mean of the %u questions that found something stored: %s "
                     "computed, %s reused (%.0fx)\n",
                     summary->reusing, cli_seconds(summary->ttft_cold_s / summary->reusing, cold),
                     cli_seconds(summary->ttft_reuse_s / summary->reusing, warm),
                     summary->ttft_cold_s / summary->ttft_reuse_s);
    }
    (void)printf("  prompt tokens reused: %.0f %%\n",
                 summary->prompt_tokens
                     ? 100.0 * summary->tokens_reused / (double)summary->prompt_tokens
                     : 0);
    (void)printf("  answers that are word by word those of full: %u of %u at exact (always), %u of "
                 "%u at fast (an approximation)\n",
                 exact->same, exact->questions, other->same, other->questions);
    (void)printf("  next: `redknot up` starts a cluster that stays; README.md, \"Use it\"\n");
}

static enum rk_status run_question(struct demo *demo, size_t index, bool json, struct pair *pair,
                                   struct rk_error *error)
{
    const struct question *question = &demo->questions[index];
    struct cli_common common = {.coordinator = demo->cluster.processes[0].address};
    struct rk_client *client = NULL;
    struct rk_report cold = {.owner = NULL};
    struct rk_report warm = {.owner = NULL};
    enum rk_status status =
        cli_client_open(&common, worker_address(demo, question->worker), &client, error);
    if (status == RK_OK) {
        status = ask(demo, client, question, "full", true, &pair->full, &cold, error);
    }
    if (status == RK_OK) {
        status = ask(demo, client, question, question->level, false, &pair->level, &warm, error);
    }
    cli_progress_end();
    if (status == RK_OK) {
        summary_add(&demo->summary, question, &cold, &warm, pair_same(pair));
    }
    if (status == RK_OK && json) {
        add_row(demo, index, &cold, &warm, pair);
    } else if (status == RK_OK) {
        print_row(demo, index, &cold, &warm, pair);
    }
    rk_report_clear(&cold);
    rk_report_clear(&warm);
    cli_client_close(client);
    return status;
}

static void put_progress(void *context, uint32_t done, uint32_t total)
{
    cli_progress(context, done, total);
}

static enum rk_status put_documents(struct demo *demo, bool json, struct rk_error *error)
{
    struct cli_common common = {.coordinator = demo->cluster.processes[0].address};
    struct rk_client *client = NULL;
    enum rk_status status = cli_client_open(&common, worker_address(demo, 0), &client, error);
    for (size_t i = 0; i < demo->num_documents && status == RK_OK; i++) {
        struct rk_segment_input segment = {.text = demo->texts[i], .label = demo->names[i]};
        struct rk_put_result result;
        char bytes[32];
        char seconds[32];
        status = rk_client_put_segment(client, &segment, NULL, 0, put_progress,
                                       (void *)demo->names[i], &result, error);
        cli_progress_end();
        if (status == RK_OK && !json) {
            (void)printf("stored %-20s %5u tokens %10s in %s\n", demo->names[i], result.num_tokens,
                         cli_bytes(result.bytes, bytes), cli_seconds(result.seconds, seconds));
        }
    }
    cli_client_close(client);
    return status;
}

static enum rk_status demo_run(struct demo *demo, const struct demo_arguments *arguments,
                               struct rk_error *error)
{
    bool json = arguments->common.json;
    enum rk_status status = find_examples(arguments->examples, demo->dir, error);
    if (status == RK_OK) {
        status = load_examples(demo, error);
    }
    if (status == RK_OK && !json) {
        (void)printf("starting a coordinator, a store and %d workers, which load the model ...\n",
                     DEMO_WORKERS);
        (void)fflush(stdout);
    }
    if (status == RK_OK) {
        status = start_cluster(demo, arguments, error);
    }
    if (status == RK_OK) {
        status = put_documents(demo, json, error);
    }
    struct pair *pair = rk_alloc_zero(1, sizeof(*pair));
    if (status == RK_OK && !pair) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "out of memory");
    }
    for (size_t i = 0; i < demo->num_questions && status == RK_OK; i++) {
        cli_progress("asking", i, demo->num_questions);
        status = cli_interrupted() ? rk_error_set(error, RK_ERR_CANCELLED, "interrupted")
                                   : run_question(demo, i, json, pair, error);
    }
    if (status == RK_OK && !json) {
        summary_print(&demo->summary);
    }
    rk_free(pair);
    return status;
}

int cli_demo(int argc, char **argv)
{
    struct demo_arguments arguments = {.examples = NULL};
    (void)argp_parse(&demo_argp, argc, argv, 0, NULL, &arguments);
    struct rk_error error = {.status = RK_OK};
    struct demo *demo = rk_alloc_zero(1, sizeof(*demo));
    if (!demo) {
        return cli_fail("demo: out of memory");
    }
    demo->rows = json_array();
    int code = CLI_OK;
    enum rk_status status = demo_run(demo, &arguments, &error);
    if (status != RK_OK) {
        code = cli_interrupted() ? cli_fail("demo: interrupted; everything was stopped")
                                 : cli_fail("demo: %s", error.text);
    } else if (arguments.common.json) {
        cli_print_json(json_pack("{s:O}", "questions", demo->rows));
    }
    demo_clear(demo, code != CLI_OK && !cli_interrupted());
    rk_free(demo);
    return code;
}
