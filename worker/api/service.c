/* redknot.v1.Worker on the wire: requests in, events out. */
#include "worker/api/api_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/service.h"
#include "common/base/text.h"
#include "common/rpc/rpc.h"
#include "redknot/v1/worker.pb-c.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define GENERATE_TOKENS_DEFAULT 128
#define TEXT_BYTES_MAX          (32u << 20)
#define LABEL_BYTES_MAX         4096u /* as the coordinator */
#define PUBLISH_SILENT_MS       INT64_C(250)

/* ---- From the wire ---- */

static enum rk_status ids_from_wire(const Redknot__V1__SegmentInput__TokenIds *tokens,
                                    struct tokenizer_ids *ret_ids, struct rk_error *error)
{
    size_t count = tokens ? tokens->n_ids : 0;
    int32_t *data = rk_alloc_zero(count, sizeof(*data));
    if (!data) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %zu tokens", count);
    }
    for (size_t i = 0; i < count; i++) {
        /* An id above INT32_MAX becomes negative, and is refused as outside the vocabulary. */
        data[i] = (int32_t)tokens->ids[i];
    }
    *ret_ids = (struct tokenizer_ids){.data = data, .count = count};
    return RK_OK;
}

/* Text or ids; text is from outside, so special tokens in it are plain text. */
static enum rk_status input_tokens(const struct api *api, const Redknot__V1__SegmentInput *input,
                                   const char *what, struct tokenizer_ids *ret_ids,
                                   struct rk_error *error)
{
    if (input->content_case == REDKNOT__V1__SEGMENT_INPUT__CONTENT_TOKENS) {
        return ids_from_wire(input->tokens, ret_ids, error);
    }
    if (input->content_case != REDKNOT__V1__SEGMENT_INPUT__CONTENT_TEXT) {
        return rk_error_set(error, RK_ERR_INVALID, "%s: give text or token ids", what);
    }
    size_t bytes = strlen(input->text);
    if (bytes > TEXT_BYTES_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%s: %zu bytes of text, at most %u are taken",
                            what, bytes, TEXT_BYTES_MAX);
    }
    return tokenizer_encode(api->options.tokenizer, input->text, bytes, false, false, ret_ids,
                            error);
}

/* The token that the model wants this request to begin with; -1: none. Ids are taken as they are:
 * who gives them decides. */
static int32_t begin_id(const struct session *session, const Redknot__V1__SegmentInput *first)
{
    return first && first->content_case != REDKNOT__V1__SEGMENT_INPUT__CONTENT_TOKENS
               ? tokenizer_begin_id(session->api->options.tokenizer)
               : -1;
}

static enum rk_status begin_tokens(int32_t id, struct tokenizer_ids *ret_ids,
                                   struct rk_error *error)
{
    int32_t *data = rk_alloc_zero(1, sizeof(*data));
    if (!data) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a token");
    }
    data[0] = id;
    *ret_ids = (struct tokenizer_ids){.data = data, .count = 1};
    return RK_OK;
}

static bool given_by_id(const Redknot__V1__SegmentInput *input)
{
    return input->content_case == REDKNOT__V1__SEGMENT_INPUT__CONTENT_SEGMENT_ID;
}

static enum rk_status check_input(const Redknot__V1__SegmentInput *input, struct rk_error *error)
{
    if (given_by_id(input) && input->segment_id.len != RK_ID_BYTES) {
        return rk_error_set(error, RK_ERR_INVALID, "a segment id has %d bytes, not %zu",
                            RK_ID_BYTES, input->segment_id.len);
    }
    /* It comes back in reports, tables and logs. */
    return rk_text_check_name("the label", input->label, strlen(input->label), LABEL_BYTES_MAX,
                              error);
}

/* location: of one that is given by its id. */
static enum rk_status add_input(struct session *session, const Redknot__V1__SegmentInput *input,
                                struct rk_kv_location *location, struct rk_error *error)
{
    if (given_by_id(input)) {
        return session_add_located(session, location, input->label, error);
    }
    char what[32];
    (void)snprintf(what, sizeof(what), "segment %u", session->num_segments);
    struct tokenizer_ids ids = {0};
    enum rk_status status = input_tokens(session->api, input, what, &ids, error);
    return status == RK_OK ? session_add_segment(session, ids.data, ids.count, input->label, error)
                           : status;
}

/* Those that are given by id are looked up together. */
static enum rk_status add_inputs(struct session *session, Redknot__V1__SegmentInput **inputs,
                                 size_t count, struct rk_error *error)
{
    if (count > RECOVERY_SEGMENTS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%zu segments, at most %d are taken", count,
                            RECOVERY_SEGMENTS_MAX);
    }
    struct rk_id *ids = rk_alloc_zero(count, sizeof(*ids));
    struct rk_kv_location *locations = rk_alloc_zero(count, sizeof(*locations));
    enum rk_status status = RK_OK;
    size_t num_ids = 0;
    size_t num_located = 0;
    if (!ids || !locations) {
        (void)rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %zu segments", count);
        status = RK_ERR_NO_MEMORY;
        goto done;
    }
    for (size_t i = 0; status == RK_OK && i < count; i++) {
        status = check_input(inputs[i], error);
        if (status == RK_OK && given_by_id(inputs[i])) {
            memcpy(ids[num_ids++].bytes, inputs[i]->segment_id.data, RK_ID_BYTES);
        }
    }
    if (status == RK_OK && num_ids > 0) {
        status = session_locate_ids(session, ids, num_ids, locations, error);
        num_located = status == RK_OK ? num_ids : 0;
    }
    for (size_t i = 0, id = 0; status == RK_OK && i < count; i++) {
        status = add_input(session, inputs[i], &locations[id], error);
        id += given_by_id(inputs[i]);
    }
    rk_kv_locations_free(locations, num_located);

done:
    rk_free(ids);
    rk_free(locations);
    return status;
}

static enum rk_status take_prompt(struct session *session, const struct tokenizer_ids *parts,
                                  size_t num_parts, struct rk_error *error)
{
    size_t total = 0;
    for (size_t i = 0; i < num_parts; i++) {
        total += parts[i].count;
    }
    uint32_t vocab = engine_vocab_size(session->api->options.engine);
    if (total == 0) {
        return rk_error_set(error, RK_ERR_INVALID, "the prompt is empty: ask something");
    }
    if (total > RK_SEGMENT_TOKENS_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "the prompt has %zu tokens", total);
    }
    session->prompt = rk_alloc_zero(total, sizeof(*session->prompt));
    if (!session->prompt) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %zu tokens", total);
    }
    for (size_t i = 0; i < num_parts; i++) {
        for (size_t j = 0; j < parts[i].count; j++) {
            int32_t id = parts[i].data[j];
            if (id < 0 || (uint32_t)id >= vocab) {
                return rk_error_set(error, RK_ERR_INVALID,
                                    "prompt: token id %d is outside the vocabulary of %u", id,
                                    vocab);
            }
            session->prompt[session->num_prompt++] = id;
        }
    }
    return RK_OK;
}

/* Room behind the prompt, at least one token. */
static enum rk_status context_room(const struct session *session, uint32_t wanted,
                                   uint32_t *ret_room, struct rk_error *error)
{
    uint32_t context = engine_context_tokens(session->api->options.engine);
    uint32_t used = session_num_tokens(session);
    if (used >= context) {
        return rk_error_set(error, RK_ERR_TOO_LONG,
                            "the request has %u tokens, the context of %s holds %u with the "
                            "answer: leave out %u tokens or more",
                            used, session->api->options.model_name, context, used - context + 1);
    }
    *ret_room = wanted < context - used ? wanted : context - used;
    return RK_OK;
}

static enum rk_status find_level(const char *name, const struct recovery_level **ret_level,
                                 struct rk_error *error)
{
    const struct recovery_level *level = recovery_level_find(name);
    if (!level) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "unknown fidelity level \"%.32s\": use one of %s", name,
                            recovery_level_names());
    }
    *ret_level = level;
    return RK_OK;
}

/* ---- To the wire ---- */

/* Seven significant places after the start: enough for a report. */
static double seconds_between(int64_t from_ns, int64_t to_ns)
{
    return to_ns > from_ns ? (double)(to_ns - from_ns) * 1e-9 : 0;
}

static bool is_reused(const struct recovery_run *run)
{
    return run->source == RECOVERY_CHAIN || run->source == RECOVERY_SEGMENT;
}

/* Of a segment alone, behind others: it was computed without having seen them. Or in its place, by
 * another arithmetic than ours. */
static bool is_approximate(const struct session *session, uint32_t index)
{
    const struct recovery_run *run = &session->plan.runs[index];
    bool behind = run->position > 0;
    return run->source == RECOVERY_SEGMENT ? behind || session->segments[index].foreign
                                           : run->source == RECOVERY_COMPUTE_ALONE && behind;
}

static void report_segment(const struct session *session, uint32_t index,
                           Redknot__V1__SegmentReport *out)
{
    struct session_segment *segment = &session->segments[index];
    const struct recovery_run *run = &session->plan.runs[index];
    const struct rk_kv_pages *fetched = &session->fetched[index];
    bool reused = is_reused(run);
    redknot__v1__segment_report__init(out);
    out->segment_id.data = segment->id.bytes;
    out->segment_id.len = sizeof(segment->id.bytes);
    out->label = segment->label ? segment->label : (char *)"";
    out->position = run->position;
    out->num_tokens = run->num_tokens;
    out->tokens_reused = reused ? run->num_tokens - run->first_tokens : 0;
    out->tokens_computed = run->num_tokens - out->tokens_reused +
                           (run->source == RECOVERY_COMPUTE_ALONE ? run->first_tokens : 0);
    out->source = (char *)recovery_source_name(run->source);
    out->miss = !reused && rk_status_is_miss(segment->miss) ? (char *)rk_status_name(segment->miss)
                                                            : (char *)"";
    out->bytes_fetched = fetched->bytes;
    out->path = (Redknot__V1__Path)fetched->path;
    out->tier = (Redknot__V1__Tier)fetched->tier;
}

static double queue_seconds(const struct session *session)
{
    double seconds = seconds_between(session->arrived_ns, session->started_ns) - session->fetch_s;
    return seconds > 0 ? seconds : 0;
}

/* Fills the report; its segments live in rows, [num_segments] each. */
static void report_fill(const struct session *session, Redknot__V1__Report *report,
                        Redknot__V1__SegmentReport *rows, Redknot__V1__SegmentReport **row_pointers)
{
    const struct api *api = session->api;
    const struct scheduler_result *result = &session->result;
    int64_t now = rk_clock_ns();
    report->level = (char *)session->level->name;
    report->prompt_tokens = session_num_tokens(session);
    report->tokens_reused = session->plan.tokens_reused;
    report->tokens_computed = session->plan.tokens_computed;
    report->tokens_generated = result->num_tokens;
    report->bytes_fetched = session->bytes_fetched;
    report->ttft_s = seconds_between(session->arrived_ns, session->first_token_ns);
    report->queue_s = queue_seconds(session);
    report->fetch_s = session->fetch_s;
    report->prefill_s = seconds_between(session->started_ns, session->first_token_ns);
    report->total_s = seconds_between(session->arrived_ns, now);
    report->flops = result->flops;
    report->flops_full = engine_flops_full(api->options.engine, session_num_tokens(session));
    report->finish_reason = (char *)(result->ended ? "stop" : "length");
    report->worker = (char *)api->options.node_id;
    report->head_map = session->plan.head_map != NULL;
    report->approximate = report->head_map;
    report->request = (char *)session->name;
    report->restarts = session->restarts;
    report->segments = row_pointers;
    report->n_segments = session->num_segments;
    for (uint32_t i = 0; i < session->num_segments; i++) {
        report_segment(session, i, &rows[i]);
        row_pointers[i] = &rows[i];
        bool approximate = is_approximate(session, i);
        report->approximate = report->approximate || approximate;
        report->tokens_reused_exact += approximate ? 0 : rows[i].tokens_reused;
        if (rows[i].path != REDKNOT__V1__PATH__PATH_UNSPECIFIED) {
            report->path = rows[i].path;
        }
    }
}

/* One line for each request, without its text. */
static void log_request(const struct session *session, enum api_call call, enum rk_status status,
                        const struct rk_error *error)
{
    static const char *const names[API_CALLS] = {
        [API_PUT] = "PutSegment", [API_GENERATE] = "Generate", [API_SCORE] = "Score"};
    RK_LOG_INFO("request",
                "id=%s call=%s level=%s status=%s reason=%q segments=%u tokens=%u reused=%u "
                "computed=%u generated=%u rows=%u restarts=%u path=%s bytes_fetched=%llu "
                "queue_s=%.4f fetch_s=%.4f ttft_s=%.4f total_s=%.4f stored=%u not_stored=%u",
                session->name, names[call], session->level ? session->level->name : "",
                rk_status_name(status), status == RK_OK ? "" : error->text, session->num_segments,
                session_num_tokens(session), session->plan.tokens_reused,
                session->plan.tokens_computed, session->num_told, session->rows_told,
                session->restarts, rk_path_name(session->path),
                (unsigned long long)session->bytes_fetched, queue_seconds(session),
                session->fetch_s, seconds_between(session->arrived_ns, session->first_token_ns),
                seconds_between(session->arrived_ns, rk_clock_ns()), session->num_stored,
                session->num_not_stored);
}

static void count_request(const struct api *api, enum api_call call, enum rk_status status,
                          const struct session *session, const struct rk_error *error)
{
    const struct api_metrics *metrics = &api->metrics;
    rk_metric_add(metrics->requests[call], 1);
    if (status != RK_OK) {
        rk_metric_add(metrics->failures[call], 1);
    } else if (call != API_PUT) {
        rk_metric_observe(metrics->ttft,
                          seconds_between(session->arrived_ns, session->first_token_ns));
        rk_metric_observe(metrics->fetch, session->fetch_s);
        rk_metric_add(metrics->tokens_computed, session->plan.tokens_computed);
        rk_metric_add(metrics->tokens_reused, session->plan.tokens_reused);
        rk_metric_add(metrics->tokens_generated, session->result.num_tokens);
    }
    if (session) {
        log_request(session, call, status, error);
    }
}

/* ---- Calls ---- */

/* What a running call needs in its callbacks. */
struct running {
    const struct api *api;
    struct rk_rpc_call *call;
    uint32_t progress_total;
    bool text;
};

static bool call_cancelled(void *context)
{
    return rk_rpc_call_cancelled(context);
}

static struct rk_until call_until(struct rk_rpc_call *call)
{
    return (struct rk_until){
        .deadline_ns = rk_rpc_call_deadline_ns(call), .cancelled = call_cancelled, .context = call};
}

static enum rk_status put_event(void *context, const struct scheduler_event *event)
{
    struct running *running = context;
    if (event->kind != SCHEDULER_PROGRESS) {
        return RK_OK;
    }
    Redknot__V1__PutSegmentReply reply = REDKNOT__V1__PUT_SEGMENT_REPLY__INIT;
    reply.tokens_done = event->rows_done;
    reply.tokens_total = event->rows_total;
    return rk_rpc_call_send(running->call, &reply.base);
}

static enum rk_status put_segment(struct api *api, struct rk_rpc_call *call,
                                  const Redknot__V1__PutSegmentRequest *request,
                                  struct session *session, struct rk_error *error)
{
    if (!request->segment) {
        return rk_error_set(error, RK_ERR_INVALID, "the request names no segment");
    }
    enum rk_status status =
        add_inputs(session, (Redknot__V1__SegmentInput *[]){request->segment}, 1, error);
    if (status != RK_OK) {
        return status;
    }
    struct session_segment *segment = &session->segments[0];
    Redknot__V1__PutSegmentReply reply = REDKNOT__V1__PUT_SEGMENT_REPLY__INIT;
    struct running running = {.api = api, .call = call};
    reply.bytes =
        rk_kv_pages_total(&api->layout, segment->num_tokens) * rk_kv_page_bytes(&api->layout);
    reply.already_stored = session_segment_stored(session);
    if (!reply.already_stored) {
        struct session_run run = {.on_event = put_event, .context = &running};
        status = session_put(session, &run, &reply.bytes, error);
    }
    if (status != RK_OK) {
        return status;
    }
    reply.done = true;
    reply.tokens_done = segment->num_tokens;
    reply.tokens_total = segment->num_tokens;
    reply.segment_id.data = segment->id.bytes;
    reply.segment_id.len = sizeof(segment->id.bytes);
    reply.seconds = seconds_between(session->arrived_ns, rk_clock_ns());
    return rk_rpc_call_send(call, &reply.base);
}

static enum rk_status generate_event(void *context, const struct scheduler_event *event)
{
    struct running *running = context;
    if (event->kind != SCHEDULER_TOKENS) {
        return RK_OK;
    }
    struct tokenizer_text text = {0};
    struct rk_error error = {.text = ""};
    enum rk_status status = tokenizer_decode(running->api->options.tokenizer, event->tokens,
                                             event->num_tokens, true, &text, &error);
    if (status != RK_OK) {
        return status;
    }
    uint32_t *ids = rk_alloc_zero(event->num_tokens, sizeof(*ids));
    if (!ids) {
        rk_free(text.data);
        return RK_ERR_NO_MEMORY;
    }
    for (uint32_t i = 0; i < event->num_tokens; i++) {
        ids[i] = (uint32_t)event->tokens[i];
    }
    Redknot__V1__GenerateReply reply = REDKNOT__V1__GENERATE_REPLY__INIT;
    reply.token_ids = ids;
    reply.n_token_ids = event->num_tokens;
    reply.text.data = (uint8_t *)text.data;
    reply.text.len = text.bytes;
    status = rk_rpc_call_send(running->call, &reply.base);
    rk_free(ids);
    rk_free(text.data);
    return status;
}

/* The chat template around segments and prompt: its opening is the first segment, cached like
 * any other; its closing ends the prompt. */
static enum rk_status add_chat(struct session *session, const Redknot__V1__GenerateRequest *request,
                               struct rk_error *error)
{
    struct tokenizer_ids opening = {0};
    enum rk_status status =
        tokenizer_chat_open(session->api->options.tokenizer,
                            request->system[0] ? request->system : NULL, &opening, error);
    return status == RK_OK
               ? session_add_segment(session, opening.data, opening.count, "(system)", error)
               : status;
}

/* Segments without a chat template: the token to begin with is a segment of its own, for what
 * stands behind it may stand anywhere. */
static enum rk_status add_plain(struct session *session, Redknot__V1__SegmentInput **segments,
                                size_t num_segments, struct rk_error *error)
{
    struct tokenizer_ids ids = {0};
    int32_t id = num_segments > 0 ? begin_id(session, segments[0]) : -1;
    enum rk_status status = id < 0 ? RK_OK : begin_tokens(id, &ids, error);
    if (status == RK_OK && id >= 0) {
        status = session_add_segment(session, ids.data, ids.count, "(begin)", error);
    }
    return status == RK_OK ? add_inputs(session, segments, num_segments, error) : status;
}

static enum rk_status generate_prompt(struct session *session,
                                      const Redknot__V1__GenerateRequest *request, bool chat,
                                      struct rk_error *error)
{
    const struct tokenizer *tokenizer = session->api->options.tokenizer;
    struct tokenizer_ids parts[3] = {{0}};
    enum rk_status status = RK_OK;
    if (!request->prompt) {
        return rk_error_set(error, RK_ERR_INVALID, "the request has no prompt: ask something");
    }
    if (chat && request->n_segments > 0) {
        status = tokenizer_encode(tokenizer, "\n\n", 2, false, false, &parts[0], error);
    }
    if (!chat && request->n_segments == 0 && begin_id(session, request->prompt) >= 0) {
        status = begin_tokens(begin_id(session, request->prompt), &parts[0], error);
    }
    if (status == RK_OK) {
        status = input_tokens(session->api, request->prompt, "prompt", &parts[1], error);
    }
    if (status == RK_OK && parts[1].count == 0) {
        status = rk_error_set(error, RK_ERR_INVALID, "the prompt is empty: ask something");
    }
    if (status == RK_OK && chat) {
        status = tokenizer_chat_close(tokenizer, &parts[2], error);
    }
    if (status == RK_OK) {
        status = take_prompt(session, parts, 3, error);
    }
    for (int i = 0; i < 3; i++) {
        rk_free(parts[i].data);
    }
    return status;
}

static enum rk_status check_sampling(const Redknot__V1__Sampling *sampling,
                                     struct engine_sampler *ret_sampler, struct rk_error *error)
{
    *ret_sampler = (struct engine_sampler){.top_p = 1};
    if (!sampling) {
        return RK_OK;
    }
    float top_p = sampling->top_p == 0 ? 1 : sampling->top_p;
    if (!(sampling->temperature >= 0 && sampling->temperature <= 100) ||
        !(top_p > 0 && top_p <= 1)) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "temperature %g, top_p %g: temperature is 0 to 100, top_p above 0 and "
                            "at most 1",
                            sampling->temperature, sampling->top_p);
    }
    *ret_sampler = (struct engine_sampler){
        .temperature = sampling->temperature, .top_p = top_p, .state = sampling->seed};
    return RK_OK;
}

static enum rk_status send_report(struct session *session, struct rk_rpc_call *call, bool score)
{
    Redknot__V1__Report report = REDKNOT__V1__REPORT__INIT;
    Redknot__V1__SegmentReport *rows = rk_alloc_zero(session->num_segments, sizeof(*rows));
    Redknot__V1__SegmentReport **pointers = rk_alloc_zero(session->num_segments, sizeof(*pointers));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (rows && pointers) {
        report_fill(session, &report, rows, pointers);
        if (score) {
            Redknot__V1__ScoreReply reply = REDKNOT__V1__SCORE_REPLY__INIT;
            report.finish_reason = (char *)"length";
            reply.report = &report;
            status = rk_rpc_call_send(call, &reply.base);
        } else {
            Redknot__V1__GenerateReply reply = REDKNOT__V1__GENERATE_REPLY__INIT;
            reply.report = &report;
            status = rk_rpc_call_send(call, &reply.base);
        }
    }
    rk_free(rows);
    rk_free(pointers);
    return status;
}

/* What is stored behind an answer. */
struct publishing {
    struct api *api;
    struct rk_rpc_call *call;
    const struct session *session;
    uint32_t seen; /* segments that were stored */
    int64_t progress_ns;
    bool ended; /* the call */
};

/* Asked every RK_UNTIL_SLICE_MS of a wait. The client waits for the end of the call before its next
 * request, so a store that is silent must not delay it; nor may pages of the pool be kept from
 * those who wait for them. */
static bool publishing_over(void *context)
{
    struct publishing *publishing = context;
    struct scheduler_load load;
    int64_t now = rk_clock_ns();
    if (atomic_load(&publishing->api->stopping) || rk_rpc_call_cancelled(publishing->call)) {
        return true;
    }
    if (publishing->session->num_stored != publishing->seen) {
        publishing->seen = publishing->session->num_stored;
        publishing->progress_ns = now;
    }
    if (!publishing->ended && now - publishing->progress_ns > PUBLISH_SILENT_MS * 1000000) {
        rk_rpc_call_end_early(publishing->call);
        publishing->ended = true;
    }
    scheduler_load(publishing->api->options.scheduler, &load);
    return publishing->ended && load.queued > 0;
}

/* The client has its answer already. */
static void publish(struct api *api, struct rk_rpc_call *call, struct session *session)
{
    struct publishing publishing = {
        .api = api, .call = call, .session = session, .progress_ns = rk_clock_ns()};
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(api->options.publish_timeout_ms),
                             .cancelled = publishing_over,
                             .context = &publishing};
    session_leave(session);
    session_publish(session, &until);
    if (publishing.ended || session->num_stored + session->num_not_stored == 0) {
        return;
    }
    Redknot__V1__GenerateReply reply = REDKNOT__V1__GENERATE_REPLY__INIT;
    Redknot__V1__StoreReport stored = REDKNOT__V1__STORE_REPORT__INIT;
    stored.segments_stored = session->num_stored;
    stored.segments_not_stored = session->num_not_stored;
    stored.problem = session->store_error.text;
    reply.stored = &stored;
    enum rk_status status = rk_rpc_call_send(call, &reply.base);
    (void)status; /* Who is gone has had the answer. */
}

static enum rk_status generate(struct api *api, struct rk_rpc_call *call,
                               const Redknot__V1__GenerateRequest *request, struct session *session,
                               struct rk_error *error)
{
    bool chat = !request->raw && tokenizer_has_chat(api->options.tokenizer);
    struct running running = {.api = api, .call = call};
    struct session_run run = {
        .ignore_end = request->ignore_eos, .on_event = generate_event, .context = &running};
    uint32_t wanted = request->max_tokens ? request->max_tokens : GENERATE_TOKENS_DEFAULT;
    enum rk_status status = find_level(request->level, &session->level, error);
    if (status == RK_OK) {
        status = check_sampling(request->sampling, &run.sampler, error);
    }
    if (status == RK_OK && chat) {
        status = add_chat(session, request, error);
    }
    if (status == RK_OK) {
        status =
            (chat ? add_inputs : add_plain)(session, request->segments, request->n_segments, error);
    }
    if (status == RK_OK) {
        status = generate_prompt(session, request, chat, error);
    }
    if (status == RK_OK) {
        status = context_room(session, wanted, &run.tokens_max, error);
    }
    if (status == RK_OK) {
        status = session_run(session, &run, error);
    }
    if (status == RK_OK) {
        status = send_report(session, call, false);
    }
    if (status == RK_OK && !request->no_publish) {
        publish(api, call, session);
    }
    return status;
}

static enum rk_status score_event(void *context, const struct scheduler_event *event)
{
    struct running *running = context;
    if (event->kind != SCHEDULER_ROW) {
        return RK_OK;
    }
    Redknot__V1__ScoreReply reply = REDKNOT__V1__SCORE_REPLY__INIT;
    reply.row = event->row;
    reply.logprobs.data = (uint8_t *)event->logprobs;
    reply.logprobs.len = sizeof(float) * engine_vocab_size(running->api->options.engine);
    return rk_rpc_call_send(running->call, &reply.base);
}

/* Segments and prompt; with the chat template they are those of the same request to Generate. */
static enum rk_status score_inputs(struct session *session,
                                   const Redknot__V1__ScoreRequest *request, struct rk_error *error)
{
    Redknot__V1__GenerateRequest generate = REDKNOT__V1__GENERATE_REQUEST__INIT;
    bool chat = request->chat && tokenizer_has_chat(session->api->options.tokenizer);
    generate.system = request->system;
    generate.prompt = request->prompt;
    generate.n_segments = request->n_segments;
    enum rk_status status = chat ? add_chat(session, &generate, error) : RK_OK;
    if (status == RK_OK) {
        status =
            (chat ? add_inputs : add_plain)(session, request->segments, request->n_segments, error);
    }
    return status == RK_OK ? generate_prompt(session, &generate, chat, error) : status;
}

/* The last one is never fed to the model, which would refuse it. */
static enum rk_status check_forced(const struct api *api, const struct tokenizer_ids *forced,
                                   struct rk_error *error)
{
    uint32_t vocab = engine_vocab_size(api->options.engine);
    for (size_t i = 0; i < forced->count; i++) {
        if (forced->data[i] < 0 || (uint32_t)forced->data[i] >= vocab) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "continuation: token id %d is outside the vocabulary of %u",
                                forced->data[i], vocab);
        }
    }
    return RK_OK;
}

static enum rk_status score(struct api *api, struct rk_rpc_call *call,
                            const Redknot__V1__ScoreRequest *request, struct session *session,
                            struct rk_error *error)
{
    struct running running = {.api = api, .call = call};
    struct session_run run = {
        .on_event = score_event, .context = &running, .sampler = {.top_p = 1}};
    struct tokenizer_ids forced = {0};
    uint32_t room = 0;
    if (!request->prompt || !request->continuation) {
        return rk_error_set(error, RK_ERR_INVALID, "a prompt and a continuation are needed");
    }
    enum rk_status status = find_level(request->level, &session->level, error);
    if (status == RK_OK) {
        status = score_inputs(session, request, error);
    }
    if (status == RK_OK) {
        status = input_tokens(api, request->continuation, "continuation", &forced, error);
    }
    if (status == RK_OK) {
        status = check_forced(api, &forced, error);
    }
    if (status == RK_OK) {
        status = context_room(session, UINT32_MAX, &room, error);
    }
    if (status == RK_OK && (forced.count == 0 || forced.count > room)) {
        status = rk_error_set(error, forced.count ? RK_ERR_TOO_LONG : RK_ERR_INVALID,
                              "the continuation has %zu tokens; 1 to %u fit behind the request",
                              forced.count, room);
    }
    if (status == RK_OK) {
        run.forced = forced.data;
        run.num_forced = (uint32_t)forced.count;
        status = session_run(session, &run, error);
    }
    if (status == RK_OK) {
        status = send_report(session, call, true);
    }
    scheduler_job_release(session->job); /* It borrows the continuation. */
    session->job = NULL;
    rk_free(forced.data);
    return status;
}

/* ---- Handlers ---- */

static enum rk_status handle_put(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct api *api = context;
    struct ProtobufCMessage *message = NULL;
    struct session *session = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__put_segment_request__descriptor, &message);
    if (status == RK_OK) {
        const Redknot__V1__PutSegmentRequest *request = (const void *)message;
        struct rk_until until = call_until(call);
        status =
            session_create(api, &until, request->salt.data, request->salt.len, &session, error);
        if (status == RK_OK) {
            status = put_segment(api, call, request, session, error);
        }
    }
    count_request(api, API_PUT, status, session, error);
    session_destroy(session);
    rk_rpc_message_free(message);
    return status;
}

static enum rk_status handle_generate(struct rk_rpc_call *call, void *context,
                                      struct rk_error *error)
{
    struct api *api = context;
    struct ProtobufCMessage *message = NULL;
    struct session *session = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__generate_request__descriptor, &message);
    if (status == RK_OK) {
        const Redknot__V1__GenerateRequest *request = (const void *)message;
        struct rk_until until = call_until(call);
        status =
            session_create(api, &until, request->salt.data, request->salt.len, &session, error);
        if (status == RK_OK) {
            status = generate(api, call, request, session, error);
        }
    }
    count_request(api, API_GENERATE, status, session, error);
    session_destroy(session);
    rk_rpc_message_free(message);
    return status;
}

static enum rk_status handle_score(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct api *api = context;
    struct ProtobufCMessage *message = NULL;
    struct session *session = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__score_request__descriptor, &message);
    if (status == RK_OK) {
        const Redknot__V1__ScoreRequest *request = (const void *)message;
        struct rk_until until = call_until(call);
        status =
            session_create(api, &until, request->salt.data, request->salt.len, &session, error);
        if (status == RK_OK) {
            status = score(api, call, request, session, error);
        }
    }
    count_request(api, API_SCORE, status, session, error);
    session_destroy(session);
    rk_rpc_message_free(message);
    return status;
}

static enum rk_status handle_tokenize(struct rk_rpc_call *call, void *context,
                                      struct rk_error *error)
{
    struct api *api = context;
    struct ProtobufCMessage *message = NULL;
    struct tokenizer_ids ids = {0};
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__tokenize_request__descriptor, &message);
    if (status == RK_OK) {
        const Redknot__V1__TokenizeRequest *request = (const void *)message;
        status = tokenizer_encode(api->options.tokenizer, request->text, strlen(request->text),
                                  request->parse_special, false, &ids, error);
    }
    if (status == RK_OK) {
        Redknot__V1__TokenizeReply reply = REDKNOT__V1__TOKENIZE_REPLY__INIT;
        reply.token_ids = (uint32_t *)ids.data; /* Never negative: they come from the vocabulary. */
        reply.n_token_ids = ids.count;
        status = rk_rpc_call_send(call, &reply.base);
    }
    rk_free(ids.data);
    rk_rpc_message_free(message);
    return status;
}

static enum rk_status handle_status(struct rk_rpc_call *call, void *context, struct rk_error *error)
{
    struct api *api = context;
    (void)error;
    struct ProtobufCMessage *message = NULL;
    enum rk_status status =
        rk_rpc_call_recv(call, &redknot__v1__worker_status_request__descriptor, &message);
    rk_rpc_message_free(message);
    if (status != RK_OK) {
        return status;
    }
    Redknot__V1__WorkerStatusReply reply = REDKNOT__V1__WORKER_STATUS_REPLY__INIT;
    Redknot__V1__KvLayout layout = REDKNOT__V1__KV_LAYOUT__INIT;
    layout.num_layers = api->layout.num_layers;
    layout.num_kv_heads = api->layout.num_kv_heads;
    layout.head_dim = api->layout.head_dim;
    layout.dtype = (Redknot__V1__KvLayout__Dtype)api->layout.dtype;
    layout.page_tokens = RK_PAGE_TOKENS;
    const struct api_options *options = &api->options;
    reply.node_id = (char *)options->node_id;
    reply.model = (char *)options->model_name;
    reply.fingerprint.data = (uint8_t *)options->fingerprint.bytes;
    reply.fingerprint.len = sizeof(options->fingerprint.bytes);
    reply.layout = &layout;
    reply.context_tokens = engine_context_tokens(options->engine);
    reply.vocab_size = engine_vocab_size(options->engine);
    reply.mode = (char *)options->mode;
    reply.kernels = (char *)engine_isa_name(options->engine);
    reply.threads = options->threads;
    reply.pool_pages = engine_pool_pages(options->engine);
    reply.pool_pages_used = engine_pool_pages_used(options->engine);
    struct scheduler_load load;
    scheduler_load(options->scheduler, &load);
    reply.requests_active = load.active;
    reply.requests_queued = load.queued + admission_waiting(api->admission);
    reply.numeric_path = (char *)engine_numeric_path_name(options->engine);
    reply.numeric_path_id.data = (uint8_t *)options->numeric_path.bytes;
    reply.numeric_path_id.len = sizeof(options->numeric_path.bytes);
    reply.version = (char *)REDKNOT_VERSION;
    reply.cluster_id = (char *)rk_service_cluster();
    reply.pid = (uint32_t)getpid();
    return rk_rpc_call_send(call, &reply.base);
}

static const struct rk_rpc_method methods[] = {
    {.path = "/redknot.v1.Worker/PutSegment", .handler = handle_put},
    {.path = "/redknot.v1.Worker/Generate", .handler = handle_generate},
    {.path = "/redknot.v1.Worker/Score", .handler = handle_score},
    {.path = "/redknot.v1.Worker/Tokenize",
     .handler = handle_tokenize,
     .request_bytes_max = TEXT_BYTES_MAX + LABEL_BYTES_MAX},
    {.path = "/redknot.v1.Worker/WorkerStatus",
     .handler = handle_status,
     .request_bytes_max = LABEL_BYTES_MAX},
};

enum rk_status api_add_to_server(struct api *api, struct rk_rpc_server *server)
{
    return rk_rpc_server_add_service(server, "redknot.v1.Worker", methods,
                                     sizeof(methods) / sizeof(methods[0]), api);
}
