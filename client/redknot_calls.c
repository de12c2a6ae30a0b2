#include "client/redknot.h"
#include "client/redknot_internal.h"
#include "common/base/alloc.h"
#include "common/base/text.h"
#include "common/rpc/rpc.h"
#include "common/transport/transport.h"

#include <stdio.h>
#include <string.h>

#include "redknot/v1/worker.pb-c.h"

/* ---- Messages of requests and reports ---- */

struct input_message {
    Redknot__V1__SegmentInput input;
    Redknot__V1__SegmentInput__TokenIds ids;
};

static enum rk_status input_fill(const struct rk_segment_input *from, struct input_message *to,
                                 struct rk_error *error)
{
    redknot__v1__segment_input__init(&to->input);
    redknot__v1__segment_input__token_ids__init(&to->ids);
    int kinds = (from->text != NULL) + (from->token_ids != NULL) + (from->segment_id != NULL);
    if (kinds != 1) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "a segment is given as one of text, token ids and segment id, not %d",
                            kinds);
    }
    if (from->text) {
        to->input.content_case = REDKNOT__V1__SEGMENT_INPUT__CONTENT_TEXT;
        to->input.text = (char *)from->text;
    } else if (from->token_ids) {
        to->ids.n_ids = from->num_tokens;
        to->ids.ids = (uint32_t *)from->token_ids;
        to->input.content_case = REDKNOT__V1__SEGMENT_INPUT__CONTENT_TOKENS;
        to->input.tokens = &to->ids;
    } else {
        to->input.content_case = REDKNOT__V1__SEGMENT_INPUT__CONTENT_SEGMENT_ID;
        to->input.segment_id =
            (ProtobufCBinaryData){RK_ID_BYTES, (uint8_t *)from->segment_id->bytes};
    }
    if (from->label) {
        to->input.label = (char *)from->label;
    }
    return RK_OK;
}

/* The messages of several inputs, and pointers to them. */
struct inputs {
    struct input_message *messages;
    Redknot__V1__SegmentInput **pointers;
};

static void inputs_clear(struct inputs *inputs)
{
    rk_free(inputs->messages);
    rk_free(inputs->pointers);
}

static enum rk_status inputs_fill(const struct rk_segment_input *from, size_t count,
                                  struct inputs *ret_inputs, struct rk_error *error)
{
    struct inputs inputs = {.messages = rk_alloc_zero(count + 1, sizeof(*inputs.messages)),
                            .pointers = rk_alloc_zero(count + 1, sizeof(*inputs.pointers))};
    if (!inputs.messages || !inputs.pointers) {
        inputs_clear(&inputs);
        return rk_client_no_memory(error, "building a request");
    }
    enum rk_status status = RK_OK;
    for (size_t i = 0; i < count && status == RK_OK; i++) {
        status = input_fill(&from[i], &inputs.messages[i], error);
        inputs.pointers[i] = &inputs.messages[i].input;
    }
    if (status != RK_OK) {
        inputs_clear(&inputs);
        return status;
    }
    *ret_inputs = inputs;
    return RK_OK;
}

static const char *tier_name(Redknot__V1__Tier tier)
{
    switch (tier) {
    case REDKNOT__V1__TIER__TIER_DRAM:
        return "dram";
    case REDKNOT__V1__TIER__TIER_HBM:
        return "hbm";
    case REDKNOT__V1__TIER__TIER_NVME:
        return "nvme";
    default:
        return "none";
    }
}

void rk_report_clear(struct rk_report *report)
{
    rk_free(report->segments);
    rk_rpc_message_free(report->owner);
    memset(report, 0, sizeof(*report));
}

/* On RK_OK the report owns the message. */
static enum rk_segment_source source_kind(const char *name)
{
    static const char *const names[] = {[RK_SOURCE_CHAIN] = "chain",
                                        [RK_SOURCE_SEGMENT] = "segment",
                                        [RK_SOURCE_COMPUTE] = "compute",
                                        [RK_SOURCE_COMPUTE_ALONE] = "compute_alone"};
    for (size_t i = RK_SOURCE_CHAIN; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(name, names[i]) == 0) {
            return (enum rk_segment_source)i;
        }
    }
    return RK_SOURCE_OTHER;
}

static enum rk_status report_take(const Redknot__V1__Report *from, ProtobufCMessage *owner,
                                  struct rk_report *report, struct rk_error *error)
{
    struct rk_segment_report *segments = rk_alloc_zero(from->n_segments + 1, sizeof(*segments));
    if (!segments) {
        return rk_client_no_memory(error, "reading a report");
    }
    for (size_t i = 0; i < from->n_segments; i++) {
        const Redknot__V1__SegmentReport *segment = from->segments[i];
        segments[i] =
            (struct rk_segment_report){.segment_id = rk_id_from_message(segment->segment_id),
                                       .label = segment->label,
                                       .position = segment->position,
                                       .num_tokens = segment->num_tokens,
                                       .tokens_reused = segment->tokens_reused,
                                       .tokens_computed = segment->tokens_computed,
                                       .source = segment->source,
                                       .source_kind = source_kind(segment->source),
                                       .miss = segment->miss,
                                       .bytes_fetched = segment->bytes_fetched,
                                       .path = rk_path_name((enum rk_path)segment->path),
                                       .tier = tier_name(segment->tier)};
    }
    rk_report_clear(report);
    *report = (struct rk_report){.level = from->level,
                                 .worker = from->worker,
                                 .finish_reason = from->finish_reason,
                                 .prompt_tokens = from->prompt_tokens,
                                 .tokens_reused = from->tokens_reused,
                                 .tokens_computed = from->tokens_computed,
                                 .tokens_generated = from->tokens_generated,
                                 .bytes_fetched = from->bytes_fetched,
                                 .path = rk_path_name((enum rk_path)from->path),
                                 .ttft_s = from->ttft_s,
                                 .queue_s = from->queue_s,
                                 .fetch_s = from->fetch_s,
                                 .prefill_s = from->prefill_s,
                                 .total_s = from->total_s,
                                 .flops = from->flops,
                                 .flops_full = from->flops_full,
                                 .head_map = from->head_map,
                                 .approximate = from->approximate,
                                 .tokens_reused_exact = from->tokens_reused_exact,
                                 .restarts = from->restarts,
                                 .request = from->request,
                                 .segments = segments,
                                 .num_segments = from->n_segments,
                                 .owner = owner};
    return RK_OK;
}

/* ---- Put ---- */

struct put_context {
    rk_progress_callback progress;
    void *context;
    struct rk_put_result result;
    bool done;
};

static enum rk_status put_reply(void *context, ProtobufCMessage **message, struct rk_error *error)
{
    struct put_context *put = context;
    const Redknot__V1__PutSegmentReply *reply = (const Redknot__V1__PutSegmentReply *)*message;
    if (put->progress) {
        put->progress(put->context, reply->tokens_done, reply->tokens_total);
    }
    if (!reply->done) {
        return RK_OK;
    }
    if (reply->segment_id.len != RK_ID_BYTES) {
        return rk_error_set(error, RK_ERR_INTERNAL, "the reply's segment id has %zu bytes, not %d",
                            reply->segment_id.len, RK_ID_BYTES);
    }
    put->done = true;
    put->result = (struct rk_put_result){.segment_id = rk_id_from_message(reply->segment_id),
                                         .num_tokens = reply->tokens_total,
                                         .bytes = reply->bytes,
                                         .already_stored = reply->already_stored,
                                         .seconds = reply->seconds};
    return RK_OK;
}

enum rk_status rk_client_put_segment(struct rk_client *client,
                                     const struct rk_segment_input *segment, const void *salt,
                                     size_t salt_bytes, rk_progress_callback progress,
                                     void *context, struct rk_put_result *ret_result,
                                     struct rk_error *error)
{
    Redknot__V1__PutSegmentRequest request = REDKNOT__V1__PUT_SEGMENT_REQUEST__INIT;
    struct input_message input;
    enum rk_status status = input_fill(segment, &input, error);
    if (status != RK_OK) {
        return status;
    }
    request.segment = &input.input;
    request.salt = (ProtobufCBinaryData){salt_bytes, (uint8_t *)salt};
    struct put_context put = {.progress = progress, .context = context};
    struct rk_client_call call = {.path = "/redknot.v1.Worker/PutSegment",
                                  .request = &request.base,
                                  .reply_type = &redknot__v1__put_segment_reply__descriptor,
                                  .handler = put_reply,
                                  .context = &put};
    status = rk_client_call_worker(client, &call, error);
    if (status == RK_OK && !put.done) {
        status = rk_error_set(error, RK_ERR_INTERNAL, "the worker ended the call without a result");
    }
    if (status == RK_OK) {
        *ret_result = put.result;
    }
    return status;
}

/* ---- Generate ---- */

struct generate_context {
    rk_token_callback on_token;
    void *context;
    struct rk_utf8_carry carry;
    struct rk_report report;
};

/* The text of a reply behind the bytes carried over; flush: nothing is carried on. */
static enum rk_status text_pass(struct generate_context *generate, const uint32_t *ids,
                                size_t num_ids, ProtobufCBinaryData text, bool flush,
                                struct rk_error *error)
{
    size_t total = generate->carry.count + text.len;
    uint8_t *joined = rk_alloc(total + 1);
    if (!joined) {
        return rk_client_no_memory(error, "reading text");
    }
    memcpy(joined, generate->carry.bytes, generate->carry.count);
    if (text.len > 0) {
        memcpy(joined + generate->carry.count, text.data, text.len);
    }
    size_t whole = flush ? total : rk_utf8_whole(joined, total);
    generate->carry.count = total - whole;
    memcpy(generate->carry.bytes, joined + whole, total - whole);
    bool go_on = true;
    if (num_ids > 0 || whole > 0) {
        go_on = generate->on_token(generate->context, (const int32_t *)ids, num_ids,
                                   (const char *)joined, whole);
    }
    rk_free(joined);
    return go_on ? RK_OK : rk_error_set(error, RK_ERR_CANCELLED, "cancelled by the caller");
}

static enum rk_status generate_reply(void *context, ProtobufCMessage **message,
                                     struct rk_error *error)
{
    struct generate_context *generate = context;
    Redknot__V1__GenerateReply *reply = (Redknot__V1__GenerateReply *)*message;
    const Redknot__V1__StoreReport *stored = reply->stored; /* In a reply behind the report's. */
    enum rk_status status =
        text_pass(generate, reply->token_ids, reply->n_token_ids, reply->text, false, error);
    if (status == RK_OK && reply->report) {
        status = report_take(reply->report, *message, &generate->report, error);
        if (status == RK_OK) {
            *message = NULL;
        }
    }
    if (status == RK_OK && stored) {
        struct rk_report *report = &generate->report;
        report->segments_stored = stored->segments_stored;
        report->segments_not_stored = stored->segments_not_stored;
        (void)snprintf(report->store_problem, sizeof(report->store_problem), "%s", stored->problem);
    }
    return status;
}

enum rk_status rk_client_generate(struct rk_client *client,
                                  const struct rk_generate_request *request,
                                  rk_token_callback on_token, void *context,
                                  struct rk_report *ret_report, struct rk_error *error)
{
    Redknot__V1__GenerateRequest message = REDKNOT__V1__GENERATE_REQUEST__INIT;
    Redknot__V1__Sampling sampling = REDKNOT__V1__SAMPLING__INIT;
    struct input_message prompt;
    struct inputs inputs = {.messages = NULL};
    enum rk_status status = input_fill(&request->prompt, &prompt, error);
    if (status == RK_OK) {
        status = inputs_fill(request->segments, request->num_segments, &inputs, error);
    }
    if (status != RK_OK) {
        return status;
    }
    sampling.temperature = request->temperature;
    sampling.top_p = request->top_p;
    sampling.seed = request->seed;
    message.n_segments = request->num_segments;
    message.segments = inputs.pointers;
    message.prompt = &prompt.input;
    message.level = (char *)(request->level ? request->level : "");
    message.max_tokens = request->max_tokens;
    message.sampling = &sampling;
    message.salt = (ProtobufCBinaryData){request->salt_bytes, (uint8_t *)request->salt};
    message.raw = request->raw;
    message.ignore_eos = request->ignore_eos;
    message.system = (char *)(request->system ? request->system : "");
    message.no_publish = request->no_publish;

    struct generate_context generate = {.on_token = on_token, .context = context};
    struct rk_client_call call = {.path = "/redknot.v1.Worker/Generate",
                                  .request = &message.base,
                                  .reply_type = &redknot__v1__generate_reply__descriptor,
                                  .handler = generate_reply,
                                  .context = &generate};
    status = rk_client_call_worker(client, &call, error);
    inputs_clear(&inputs);
    if (status == RK_OK) { /* A sequence that was never completed is still text. */
        status = text_pass(&generate, NULL, 0, (ProtobufCBinaryData){0, NULL}, true, error);
    }
    if (status == RK_OK && !generate.report.owner) {
        status = rk_error_set(error, RK_ERR_INTERNAL, "the worker ended the call without a report");
    }
    if (status != RK_OK) {
        rk_report_clear(&generate.report);
        return status;
    }
    *ret_report = generate.report;
    return RK_OK;
}

/* ---- Score ---- */

struct score_context {
    rk_row_callback on_row;
    void *context;
    struct rk_report report;
};

static enum rk_status score_reply(void *context, ProtobufCMessage **message, struct rk_error *error)
{
    struct score_context *score = context;
    Redknot__V1__ScoreReply *reply = (Redknot__V1__ScoreReply *)*message;
    if (reply->logprobs.len % sizeof(float) != 0) {
        return rk_error_set(error, RK_ERR_INTERNAL, "row %u has %zu bytes, no whole floats",
                            reply->row, reply->logprobs.len);
    }
    if (reply->logprobs.len > 0) {
        size_t vocab = reply->logprobs.len / sizeof(float);
        float *row = rk_alloc(reply->logprobs.len); /* The message's bytes may not be aligned. */
        if (!row) {
            return rk_client_no_memory(error, "reading a row");
        }
        memcpy(row, reply->logprobs.data, reply->logprobs.len);
        bool go_on = score->on_row(score->context, reply->row, row, vocab);
        rk_free(row);
        if (!go_on) {
            return rk_error_set(error, RK_ERR_CANCELLED, "cancelled by the caller");
        }
    }
    if (!reply->report) {
        return RK_OK;
    }
    enum rk_status status = report_take(reply->report, *message, &score->report, error);
    if (status == RK_OK) {
        *message = NULL;
    }
    return status;
}

enum rk_status rk_client_score(struct rk_client *client, const struct rk_score_request *request,
                               rk_row_callback on_row, void *context, struct rk_report *ret_report,
                               struct rk_error *error)
{
    Redknot__V1__ScoreRequest message = REDKNOT__V1__SCORE_REQUEST__INIT;
    struct input_message prompt;
    struct input_message continuation;
    struct inputs inputs = {.messages = NULL};
    enum rk_status status = input_fill(&request->prompt, &prompt, error);
    if (status == RK_OK) {
        status = input_fill(&request->continuation, &continuation, error);
    }
    if (status == RK_OK) {
        status = inputs_fill(request->segments, request->num_segments, &inputs, error);
    }
    if (status != RK_OK) {
        return status;
    }
    message.n_segments = request->num_segments;
    message.segments = inputs.pointers;
    message.prompt = &prompt.input;
    message.continuation = &continuation.input;
    message.level = (char *)(request->level ? request->level : "");
    message.salt = (ProtobufCBinaryData){request->salt_bytes, (uint8_t *)request->salt};
    message.chat = request->chat;
    message.system = (char *)(request->system ? request->system : "");

    struct score_context score = {.on_row = on_row, .context = context};
    struct rk_client_call call = {.path = "/redknot.v1.Worker/Score",
                                  .request = &message.base,
                                  .reply_type = &redknot__v1__score_reply__descriptor,
                                  .handler = score_reply,
                                  .context = &score};
    status = rk_client_call_worker(client, &call, error);
    inputs_clear(&inputs);
    if (status == RK_OK && !score.report.owner) {
        status = rk_error_set(error, RK_ERR_INTERNAL, "the worker ended the call without a report");
    }
    if (status != RK_OK) {
        rk_report_clear(&score.report);
        return status;
    }
    *ret_report = score.report;
    return RK_OK;
}
