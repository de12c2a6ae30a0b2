#include "client/cli/cli_internal.h"

#include <string.h>

static json_t *segment_json(const struct rk_segment_report *segment)
{
    json_t *row = json_pack(
        "{s:o, s:I, s:I, s:I, s:I, s:s, s:s, s:I, s:s, s:s}", "segment_id",
        cli_json_id(&segment->segment_id), "position", (json_int_t)segment->position, "num_tokens",
        (json_int_t)segment->num_tokens, "tokens_reused", (json_int_t)segment->tokens_reused,
        "tokens_computed", (json_int_t)segment->tokens_computed, "source", segment->source, "miss",
        segment->miss, "bytes_fetched", (json_int_t)segment->bytes_fetched, "path", segment->path,
        "tier", segment->tier);
    cli_json_set_string(row, "label", segment->label);
    return row;
}

json_t *cli_report_json(const struct rk_report *report)
{
    json_t *segments = json_array();
    for (size_t i = 0; i < report->num_segments; i++) {
        (void)json_array_append_new(segments, segment_json(&report->segments[i]));
    }
    json_t *object = json_pack(
        "{s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:b, s:s, s:f, s:f, s:f, s:f, s:f, s:f,"
        " s:f, s:b, s:o}",
        "level", report->level, "finish_reason", report->finish_reason, "prompt_tokens",
        (json_int_t)report->prompt_tokens, "tokens_reused", (json_int_t)report->tokens_reused,
        "tokens_reused_exact", (json_int_t)report->tokens_reused_exact, "tokens_computed",
        (json_int_t)report->tokens_computed, "tokens_generated",
        (json_int_t)report->tokens_generated, "bytes_fetched", (json_int_t)report->bytes_fetched,
        "approximate", (int)report->approximate, "path", report->path, "ttft_s", report->ttft_s,
        "queue_s", report->queue_s, "fetch_s", report->fetch_s, "prefill_s", report->prefill_s,
        "total_s", report->total_s, "flops", report->flops, "flops_full", report->flops_full,
        "head_map", (int)report->head_map, "segments", segments);
    cli_json_set_string(object, "worker", report->worker);
    cli_json_set_string(object, "request", report->request);
    (void)json_object_set_new(object, "restarts", json_integer(report->restarts));
    (void)json_object_set_new(object, "segments_stored", json_integer(report->segments_stored));
    (void)json_object_set_new(object, "segments_not_stored",
                              json_integer(report->segments_not_stored));
    cli_json_set_string(object, "store_problem", report->store_problem);
    return object;
}

/* A segment's KV is exact in a chain, and where nothing stands before it. */
uint32_t cli_report_alone(const struct rk_report *report)
{
    uint32_t count = 0;
    for (size_t i = 0; i < report->num_segments; i++) {
        const struct rk_segment_report *segment = &report->segments[i];
        bool alone = strcmp(segment->source, "segment") == 0 ||
                     strcmp(segment->source, "compute_alone") == 0;
        count += alone && segment->position > 0;
    }
    return count;
}

void cli_report_sources(const struct rk_report *report, char *ret_text, size_t room)
{
    size_t used = 0;
    ret_text[0] = '\0';
    for (size_t i = 0; i < report->num_segments && used < room;) {
        size_t end = i + 1;
        while (end < report->num_segments &&
               strcmp(report->segments[end].source, report->segments[i].source) == 0) {
            end++;
        }
        int more = snprintf(ret_text + used, room - used, "%s%zu %s", i ? ", " : "", end - i,
                            report->segments[i].source);
        used += more > 0 ? (size_t)more : 0;
        i = end;
    }
}

static void print_reused(FILE *file, const struct rk_report *report)
{
    uint32_t exact = report->tokens_reused_exact;
    (void)fprintf(file, "%u reused", report->tokens_reused);
    if (report->tokens_reused > exact) {
        (void)fprintf(file, " (%u exact from a chain, %u approximate from segments alone)", exact,
                      report->tokens_reused - exact);
    }
}

/* What a person should know before the answer is believed, and before it is asked for again. */
static void print_warnings(FILE *file, const struct rk_report *report)
{
    uint32_t alone = cli_report_alone(report);
    if (report->approximate && alone > 0) {
        (void)fprintf(file,
                      "approximate: %u of %zu segments were used as they were computed alone, "
                      "without what stands before them here; `--compare full` tells how far it "
                      "is from computing all\n",
                      alone, report->num_segments);
    }
    if (report->head_map) {
        (void)fprintf(file, "approximate: a head map limited what some heads saw\n");
    }
    if (report->segments_not_stored > 0) {
        (void)fprintf(file, "not stored: %u of the %u segments that were computed: ",
                      report->segments_not_stored,
                      report->segments_not_stored + report->segments_stored);
        (void)cli_write_text(file, report->store_problem, strlen(report->store_problem));
        (void)fputc('\n', file);
    }
}

static void print_segment(FILE *file, const struct rk_segment_report *segment)
{
    char bytes[32];
    char hex[RK_ID_HEX_BYTES];
    char label[CLI_SHOWN_BYTES];
    rk_id_to_hex(&segment->segment_id, hex);
    (void)fprintf(file,
                  "  %.12s %s at %u: %u tokens, %u reused, %u computed; %s%s%s, %s over %s "
                  "from %s\n",
                  hex, segment->label[0] ? cli_shown(segment->label, label, sizeof(label)) : "-",
                  segment->position, segment->num_tokens, segment->tokens_reused,
                  segment->tokens_computed, segment->source, segment->miss[0] ? ", " : "",
                  segment->miss, cli_bytes(segment->bytes_fetched, bytes), segment->path,
                  segment->tier);
}

void cli_report_print(FILE *file, const struct rk_report *report, bool verbose)
{
    char ttft[32];
    char total[32];
    char bytes[32];
    char worker[CLI_SHOWN_BYTES];
    (void)fprintf(file, "%s on %s: first token after %s; prompt %u tokens: %u computed, ",
                  report->level, cli_shown(report->worker, worker, sizeof(worker)),
                  cli_seconds(report->ttft_s, ttft), report->prompt_tokens,
                  report->tokens_computed);
    print_reused(file, report);
    (void)fprintf(file, "; fetched %s over %s; %u tokens in %s (%s)\n",
                  cli_bytes(report->bytes_fetched, bytes), report->path, report->tokens_generated,
                  cli_seconds(report->total_s, total), report->finish_reason);
    print_warnings(file, report);
    for (size_t i = 0; verbose && i < report->num_segments; i++) {
        print_segment(file, &report->segments[i]);
    }
}
