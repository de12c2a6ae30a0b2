#include "client/cli/cli_internal.h"

json_t *cli_report_json(const struct rk_report *report)
{
    json_t *segments = json_array();
    for (size_t i = 0; i < report->num_segments; i++) {
        const struct rk_segment_report *segment = &report->segments[i];
        json_t *row =
            json_pack("{s:o, s:s, s:I, s:I, s:I, s:I, s:s, s:s, s:I, s:s, s:s}", "segment_id",
                      cli_json_id(&segment->segment_id), "label", segment->label, "position",
                      (json_int_t)segment->position, "num_tokens", (json_int_t)segment->num_tokens,
                      "tokens_reused", (json_int_t)segment->tokens_reused, "tokens_computed",
                      (json_int_t)segment->tokens_computed, "source", segment->source, "miss",
                      segment->miss, "bytes_fetched", (json_int_t)segment->bytes_fetched, "path",
                      segment->path, "tier", segment->tier);
        (void)json_array_append_new(segments, row);
    }
    return json_pack(
        "{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:s, s:f, s:f, s:f, s:f, s:f, s:f,"
        " s:f, s:b, s:o}",
        "level", report->level, "worker", report->worker, "finish_reason", report->finish_reason,
        "prompt_tokens", (json_int_t)report->prompt_tokens, "tokens_reused",
        (json_int_t)report->tokens_reused, "tokens_computed", (json_int_t)report->tokens_computed,
        "tokens_generated", (json_int_t)report->tokens_generated, "bytes_fetched",
        (json_int_t)report->bytes_fetched, "path", report->path, "ttft_s", report->ttft_s,
        "queue_s", report->queue_s, "fetch_s", report->fetch_s, "prefill_s", report->prefill_s,
        "total_s", report->total_s, "flops", report->flops, "flops_full", report->flops_full,
        "head_map", (int)report->head_map, "segments", segments);
}

void cli_report_print(FILE *file, const struct rk_report *report, bool verbose)
{
    char ttft[32];
    char total[32];
    char bytes[32];
    (void)fprintf(file,
                  "%s on %s: first token after %s; prompt %u tokens: %u computed, %u reused; "
                  "fetched %s over %s; %u tokens in %s (%s)\n",
                  report->level, report->worker, cli_seconds(report->ttft_s, ttft),
                  report->prompt_tokens, report->tokens_computed, report->tokens_reused,
                  cli_bytes(report->bytes_fetched, bytes), report->path, report->tokens_generated,
                  cli_seconds(report->total_s, total), report->finish_reason);
    for (size_t i = 0; verbose && i < report->num_segments; i++) {
        const struct rk_segment_report *segment = &report->segments[i];
        char hex[RK_ID_HEX_BYTES];
        rk_id_to_hex(&segment->segment_id, hex);
        (void)fprintf(file,
                      "  %.12s %s at %u: %u tokens, %u reused, %u computed; %s%s%s, %s over %s "
                      "from %s\n",
                      hex, segment->label[0] ? segment->label : "-", segment->position,
                      segment->num_tokens, segment->tokens_reused, segment->tokens_computed,
                      segment->source, segment->miss[0] ? ", " : "", segment->miss,
                      cli_bytes(segment->bytes_fetched, bytes), segment->path, segment->tier);
    }
}
