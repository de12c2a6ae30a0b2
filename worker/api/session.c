/* One request's way: locate, plan, fetch, compute; and publish afterwards. */
#include "worker/api/api_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/log.h"

#include <string.h>

/* Nothing is cached without a cluster: the same path, with a miss for everything. */
static enum rk_status locate(const struct session *session, const struct rk_id *ids, size_t num_ids,
                             bool with_token_ids, struct rk_kv_location *ret_locations,
                             struct rk_error *error)
{
    const struct api *api = session->api;
    if (api->options.kv) {
        const struct rk_until until = {.deadline_ns =
                                           rk_deadline_in_ms(api->options.fetch_timeout_ms)};
        return rk_kv_locate(api->options.kv, &api->options.fingerprint, ids, num_ids,
                            with_token_ids, &until, ret_locations, error);
    }
    for (size_t i = 0; i < num_ids; i++) {
        ret_locations[i] = (struct rk_kv_location){.status = RK_MISS_ABSENT, .segment_id = ids[i]};
    }
    return RK_OK;
}

enum rk_status session_create(const struct api *api, const void *salt, size_t salt_bytes,
                              struct session **ret_session, struct rk_error *error)
{
    if (salt_bytes > API_SALT_BYTES_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "salt of %zu bytes: at most %d are allowed",
                            salt_bytes, API_SALT_BYTES_MAX);
    }
    struct session *session = rk_alloc_zero(1, sizeof(*session));
    if (!session) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for a request");
    }
    session->api = api;
    session->arrived_ns = rk_clock_ns();
    if (salt_bytes > 0) {
        memcpy(session->salt, salt, salt_bytes);
    }
    session->salt_bytes = salt_bytes;
    *ret_session = session;
    return RK_OK;
}

static void release_fetched(struct session *session)
{
    for (uint32_t i = 0; session->fetched && i < session->num_segments; i++) {
        if (session->fetched[i].hold) {
            rk_kv_release(session->api->options.kv, &session->fetched[i]);
        }
        session->fetched[i] = (struct rk_kv_pages){0};
    }
}

void session_destroy(struct session *session)
{
    if (!session) {
        return;
    }
    scheduler_job_release(session->job); /* The engine may read pages until here. */
    release_fetched(session);
    for (uint32_t i = 0; i < session->num_segments; i++) {
        struct session_segment *segment = &session->segments[i];
        rk_kv_locations_free(&segment->in_chain, 1);
        rk_kv_locations_free(&segment->alone, 1);
        rk_free(segment->token_ids);
        rk_free(segment->label);
    }
    recovery_plan_free(&session->plan);
    rk_free(session->segments);
    rk_free(session->fetched);
    rk_free(session->segment_tokens);
    rk_free(session->segment_num_tokens);
    rk_free(session->prompt);
    rk_free(session);
}

static enum rk_status check_tokens(const struct session *session, const int32_t *token_ids,
                                   size_t num_tokens, struct rk_error *error)
{
    uint32_t vocab = engine_vocab_size(session->api->options.engine);
    uint32_t context = engine_context_tokens(session->api->options.engine);
    if (num_tokens == 0) {
        return rk_error_set(error, RK_ERR_INVALID, "segment %u is empty: give it some text",
                            session->num_segments);
    }
    if (num_tokens > context) {
        return rk_error_set(error, RK_ERR_TOO_LONG,
                            "segment %u has %zu tokens, the model's context holds %u: split it",
                            session->num_segments, num_tokens, context);
    }
    for (size_t i = 0; i < num_tokens; i++) {
        if (token_ids[i] < 0 || (uint32_t)token_ids[i] >= vocab) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "segment %u: token id %d at index %zu is outside the vocabulary "
                                "of %u",
                                session->num_segments, token_ids[i], i, vocab);
        }
    }
    return RK_OK;
}

enum rk_status session_add_segment(struct session *session, int32_t *token_ids, size_t num_tokens,
                                   const char *label, struct rk_error *error)
{
    enum rk_status status = check_tokens(session, token_ids, num_tokens, error);
    if (status == RK_OK && session->num_segments == RECOVERY_SEGMENTS_MAX) {
        status =
            rk_error_set(error, RK_ERR_TOO_LONG, "more than %d segments", RECOVERY_SEGMENTS_MAX);
    }
    if (status == RK_OK && session->num_segments == session->segments_room) {
        uint32_t room = session->segments_room ? 2 * session->segments_room : 8;
        struct session_segment *more =
            rk_alloc_resize(session->segments, room, sizeof(*session->segments));
        if (more) {
            session->segments = more;
            session->segments_room = room;
        } else {
            status = rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %u segments", room);
        }
    }
    if (status != RK_OK) {
        rk_free(token_ids);
        return status;
    }
    uint32_t index = session->num_segments++;
    struct session_segment *segment = &session->segments[index];
    *segment = (struct session_segment){.token_ids = token_ids,
                                        .num_tokens = (uint32_t)num_tokens,
                                        .label = label && label[0] ? rk_alloc_string(label) : NULL};
    segment->id = rk_id_segment(session->salt, session->salt_bytes,
                                &session->api->options.fingerprint, token_ids, num_tokens);
    segment->chain_id =
        rk_id_chain(index > 0 ? &session->segments[index - 1].chain_id : NULL, &segment->id);
    return RK_OK;
}

enum rk_status session_add_segment_id(struct session *session, const struct rk_id *id,
                                      const char *label, struct rk_error *error)
{
    char hex[RK_ID_HEX_BYTES];
    rk_id_to_hex(id, hex);
    struct rk_kv_location location = {0};
    enum rk_status status = locate(session, id, 1, true, &location, error);
    if (status != RK_OK) {
        return status;
    }
    if (!location.token_ids) {
        enum rk_status miss = location.status;
        rk_kv_locations_free(&location, 1);
        if (miss == RK_MISS_NODE_DOWN) {
            return rk_error_set(error, RK_ERR_UNAVAILABLE,
                                "segment %.16s...: the coordinator does not answer, so its tokens "
                                "are not known; give the file instead of the id",
                                hex);
        }
        return rk_error_set(error, RK_ERR_NOT_FOUND,
                            "segment %.16s...: unknown to the cluster (%s); store its file with "
                            "\"redknot put FILE\" first",
                            hex, rk_status_name(miss));
    }
    int32_t *token_ids = location.token_ids;
    uint32_t num_tokens = location.num_tokens;
    location.token_ids = NULL; /* ours now */
    /* A chain's id names the segment that it ends with. */
    struct rk_id alone = rk_origin_is_chain(&location.origin) ? location.origin.alone : *id;
    status = session_add_segment(session, token_ids, num_tokens,
                                 label && label[0] ? label : location.label, error);
    rk_kv_locations_free(&location, 1);
    if (status == RK_OK && !rk_id_equal(&session->segments[session->num_segments - 1].id, &alone)) {
        return rk_error_set(error, RK_ERR_NOT_FOUND,
                            "segment %.16s...: stored under another tenant or model; use "
                            "the id that \"redknot put\" printed",
                            hex);
    }
    return status;
}

uint32_t session_num_tokens(const struct session *session)
{
    uint64_t sum = session->num_prompt;
    for (uint32_t i = 0; i < session->num_segments; i++) {
        sum += session->segments[i].num_tokens;
    }
    return sum > UINT32_MAX ? UINT32_MAX : (uint32_t)sum;
}

bool session_segment_stored(struct session *session)
{
    struct session_segment *segment = &session->segments[0];
    rk_kv_locations_free(&segment->alone, 1);
    segment->alone = (struct rk_kv_location){0};
    return locate(session, &segment->id, 1, false, &segment->alone, NULL) == RK_OK &&
           segment->alone.status == RK_OK;
}

/* ---- Locate, plan, fetch ---- */

/* One batched question for all that this level may reuse. */
static enum rk_status locate_all(struct session *session, struct rk_error *error)
{
    uint32_t count = session->num_segments;
    bool alone = session->level->reuse_segments;
    if (count == 0 || !session->level->reuse_chain) {
        return RK_OK;
    }
    size_t total = alone ? (size_t)2 * count : count;
    struct rk_id *ids = rk_alloc_zero(total, sizeof(*ids));
    struct rk_kv_location *locations = rk_alloc_zero(total, sizeof(*locations));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (!ids || !locations) {
        rk_error_set(error, status, "no memory to locate %u segments", count);
        goto done;
    }
    for (uint32_t i = 0; i < count; i++) {
        ids[i] = session->segments[i].chain_id;
        if (alone) {
            ids[count + i] = session->segments[i].id;
        }
    }
    status = locate(session, ids, total, false, locations, error);
    for (uint32_t i = 0; status == RK_OK && i < count; i++) {
        session->segments[i].in_chain = locations[i];
        session->segments[i].miss = locations[i].status;
        if (alone) {
            session->segments[i].alone = locations[count + i];
            session->segments[i].miss = locations[count + i].status;
        }
    }
done:
    rk_free(ids);
    rk_free(locations);
    return status;
}

static bool usable(const struct rk_kv_location *location, uint32_t num_tokens)
{
    return location->shards != NULL && location->status == RK_OK &&
           location->num_tokens == num_tokens;
}

static enum rk_status make_plan(struct session *session, uint32_t tokens_ahead,
                                struct rk_error *error)
{
    struct recovery_segment *segments = rk_alloc_zero(session->num_segments, sizeof(*segments));
    if (!segments) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory to plan");
    }
    for (uint32_t i = 0; i < session->num_segments; i++) {
        const struct session_segment *segment = &session->segments[i];
        segments[i] = (struct recovery_segment){
            .num_tokens = segment->num_tokens,
            .in_chain = usable(&segment->in_chain, segment->num_tokens),
            .alone = usable(&segment->alone, segment->num_tokens),
        };
    }
    recovery_plan_free(&session->plan);
    enum rk_status status = recovery_plan_make(
        session->level, session->api->options.head_map, &session->api->layout, segments,
        session->num_segments, session->num_prompt, tokens_ahead, &session->plan, error);
    rk_free(segments);
    return status;
}

/* The location that a run's source reads from. A segment alone at position 0 is a chain of one,
 * which may be known under either name. */
static struct rk_kv_location *source_of(struct session *session, uint32_t segment)
{
    struct session_segment *s = &session->segments[segment];
    if (session->plan.runs[segment].source == RECOVERY_CHAIN &&
        usable(&s->in_chain, s->num_tokens)) {
        return &s->in_chain;
    }
    return &s->alone;
}

static void count_miss(struct session *session, uint32_t segment, struct rk_kv_location *location,
                       enum rk_status miss)
{
    location->status = miss;
    session->segments[segment].miss = miss;
    rk_metric_add(session->api->metrics.misses[miss], 1);
}

/* Fetches what the plan reuses. *ret_replan: something was missing after all. */
static void fetch(struct session *session, bool *ret_replan)
{
    const struct api *api = session->api;
    int64_t begin = rk_clock_ns();
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(api->options.fetch_timeout_ms)};
    for (uint32_t i = 0; i < session->num_segments; i++) {
        const struct recovery_run *run = &session->plan.runs[i];
        if (run->source != RECOVERY_CHAIN && run->source != RECOVERY_SEGMENT) {
            continue;
        }
        struct rk_kv_location *location = source_of(session, i);
        struct rk_error why = {.text = ""};
        enum rk_status status =
            rk_kv_get(api->options.kv, &api->options.fingerprint, &api->layout, location,
                      run->extents, run->num_extents, &until, &session->fetched[i], &why);
        if (status != RK_OK) {
            session->fetched[i] = (struct rk_kv_pages){0};
            count_miss(session, i, location,
                       rk_status_is_miss(status) ? status : RK_MISS_NODE_DOWN);
            *ret_replan = true;
            continue;
        }
        session->bytes_fetched += session->fetched[i].bytes;
        rk_metric_add(api->metrics.bytes_fetched[session->fetched[i].path],
                      (double)session->fetched[i].bytes);
    }
    session->fetch_s += (double)(rk_clock_ns() - begin) * 1e-9;
}

static enum rk_status reserve_arrays(struct session *session, struct rk_error *error)
{
    uint32_t count = session->num_segments;
    session->fetched = rk_alloc_zero(count, sizeof(*session->fetched));
    session->segment_tokens = rk_alloc_zero(count, sizeof(*session->segment_tokens));
    session->segment_num_tokens = rk_alloc_zero(count, sizeof(*session->segment_num_tokens));
    if (!session->fetched || !session->segment_tokens || !session->segment_num_tokens) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %u segments", count);
    }
    for (uint32_t i = 0; i < count; i++) {
        session->segment_tokens[i] = session->segments[i].token_ids;
        session->segment_num_tokens[i] = session->segments[i].num_tokens;
    }
    return RK_OK;
}

/* Each round that has to plan again marks at least one location as missed, so it ends. */
static enum rk_status plan_and_fetch(struct session *session, uint32_t tokens_ahead,
                                     struct rk_error *error)
{
    for (bool again = true; again;) {
        again = false;
        release_fetched(session);
        session->bytes_fetched = 0;
        enum rk_status status = make_plan(session, tokens_ahead, error);
        if (status != RK_OK) {
            return status;
        }
        fetch(session, &again);
    }
    return RK_OK;
}

/* ---- Compute ---- */

static enum rk_status follow_job(struct session *session, const struct session_run *run,
                                 struct rk_error *error)
{
    enum rk_status ended = RK_OK;
    bool cancelled = false;
    for (;;) {
        struct scheduler_event event;
        int64_t slice = rk_deadline_in_ms(50);
        enum rk_status status = scheduler_job_wait(session->job, slice, &event);
        if (!cancelled && (run->cancelled(run->context) || rk_clock_ns() > run->deadline_ns)) {
            ended = rk_clock_ns() > run->deadline_ns ? RK_ERR_DEADLINE : RK_ERR_CANCELLED;
            cancelled = true;
            scheduler_job_cancel(session->job);
        }
        if (status != RK_OK) {
            continue;
        }
        if (event.kind == SCHEDULER_DONE) {
            scheduler_job_result(session->job, &session->result);
            status = cancelled ? ended : event.status;
            return status == RK_OK ? RK_OK
                                   : rk_error_set(error, status, "%s",
                                                  session->result.text[0] ? session->result.text
                                                                          : rk_status_text(status));
        }
        if (!cancelled) {
            status = run->on_event(run->context, &event);
            if (status != RK_OK) {
                ended = status;
                cancelled = true;
                scheduler_job_cancel(session->job);
            }
        }
        if (event.kind == SCHEDULER_ROW) {
            scheduler_job_row_done(session->job);
        }
    }
}

static enum rk_status compute(struct session *session, const struct recovery_plan *plan,
                              const struct session_run *run, struct rk_error *error)
{
    struct scheduler_request request = {
        .plan = plan,
        .num_segments = session->num_segments,
        .segment_tokens = session->segment_tokens,
        .segment_num_tokens = session->segment_num_tokens,
        .fetched = session->fetched,
        .prompt = session->prompt,
        .num_prompt = session->num_prompt,
        .forced = run->forced,
        .num_forced = run->num_forced,
        .tokens_max = run->tokens_max,
        .ignore_end = run->ignore_end,
        .sampler = run->sampler,
    };
    scheduler_job_release(session->job);
    session->job = NULL;
    enum rk_status status =
        scheduler_job_submit(session->api->options.scheduler, &request, &session->job, error);
    return status == RK_OK ? follow_job(session, run, error) : status;
}

/* So that what is computed now can be stored in its place. */
static void drop_bad_copy(struct session *session, const struct rk_kv_location *location)
{
    struct rk_error error = {.text = ""};
    const struct rk_until until = {.deadline_ns =
                                       rk_deadline_in_ms(session->api->options.fetch_timeout_ms)};
    if (rk_kv_drop_copy(session->api->options.kv, location, NULL, &until, NULL, &error) != RK_OK) {
        RK_LOG_WARN("drop_failed", "reason=%q", error.text);
    }
}

enum rk_status session_run(struct session *session, const struct session_run *run,
                           struct rk_error *error)
{
    enum rk_status status = reserve_arrays(session, error);
    if (status == RK_OK) {
        status = locate_all(session, error);
    }
    for (uint32_t i = 0; status == RK_OK && i < session->num_segments; i++) {
        if (rk_status_is_miss(session->segments[i].miss)) {
            rk_metric_add(session->api->metrics.misses[session->segments[i].miss], 1);
        }
    }
    while (status == RK_OK) {
        status = plan_and_fetch(session, run->tokens_max + run->num_forced, error);
        if (status != RK_OK) {
            return status;
        }
        status = compute(session, &session->plan, run, error);
        if (status != RK_MISS_CHECKSUM) {
            return status;
        }
        /* Nothing was sent yet: every borrowed page is checked before the first token. */
        uint32_t bad = session->result.bad_segment;
        RK_ASSERT(bad < session->num_segments);
        char hex[RK_ID_HEX_BYTES];
        rk_id_to_hex(&source_of(session, bad)->segment_id, hex);
        RK_LOG_WARN("checksum_miss", "segment=%s action=recompute", hex);
        struct rk_kv_location *location = source_of(session, bad);
        count_miss(session, bad, location, RK_MISS_CHECKSUM);
        scheduler_job_release(session->job);
        session->job = NULL;
        drop_bad_copy(session, location);
        status = RK_OK;
    }
    return status;
}

/* ---- Publish ---- */

static enum rk_status store_pages(struct session *session, uint32_t segment, const struct rk_id *id,
                                  uint64_t *ret_bytes, struct rk_error *error)
{
    const struct api *api = session->api;
    const struct session_segment *s = &session->segments[segment];
    uint64_t total = rk_kv_pages_total(&api->layout, s->num_tokens);
    size_t page_bytes = rk_kv_page_bytes(&api->layout);
    const void **pages = rk_alloc_zero(total, sizeof(*pages));
    uint64_t *checksums = rk_alloc_zero(total, sizeof(*checksums));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (!pages || !checksums) {
        rk_error_set(error, status, "no memory to store %llu pages", (unsigned long long)total);
        goto done;
    }
    scheduler_job_pages(session->job, segment, pages);
    for (uint64_t i = 0; i < total; i++) {
        checksums[i] = rk_hash_xxh3(pages[i], page_bytes);
    }
    struct rk_kv_put put = {
        .segment_id = *id,
        .fingerprint = api->options.fingerprint,
        .layout = api->layout,
        .num_tokens = s->num_tokens,
        .token_ids = s->token_ids,
        .label = s->label,
        .origin = {.alone = s->id, .salt_tag = rk_salt_tag(session->salt, session->salt_bytes)},
        .pages = pages,
        .checksums = checksums,
    };
    if (segment > 0 && !rk_id_equal(id, &s->id)) {
        put.origin.parent = session->segments[segment - 1].chain_id;
    }
    const struct rk_until until = {.deadline_ns =
                                       rk_deadline_in_ms(api->options.publish_timeout_ms)};
    status = rk_kv_put(api->options.kv, &put, &until, NULL, error);
    if (status == RK_OK) {
        *ret_bytes = total * page_bytes;
        rk_metric_add(api->metrics.published, 1);
    } else {
        rk_metric_add(api->metrics.publish_failures, 1);
    }
done:
    rk_free(pages);
    rk_free(checksums);
    return status;
}

enum rk_status session_put(struct session *session, const struct session_run *run,
                           uint64_t *ret_bytes, struct rk_error *error)
{
    if (!session->api->options.kv) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE,
                            "this worker has no coordinator, so there is nowhere to store a "
                            "segment: start it with --coordinator");
    }
    enum rk_status status = reserve_arrays(session, error);
    if (status == RK_OK) {
        status = compute(session, NULL, run, error);
    }
    if (status == RK_OK) {
        status = store_pages(session, 0, &session->segments[0].id, ret_bytes, error);
    }
    return status;
}

/* A segment computed alone is stored under its own id; one computed in place is exact for the
 * chain that it ends, if everything before it was computed or reused exactly. */
void session_publish(struct session *session)
{
    if (!session->api->options.kv || !session->job) {
        return;
    }
    bool exact = true;
    for (uint32_t i = 0; i < session->num_segments; i++) {
        enum recovery_source source = session->plan.runs[i].source;
        const struct rk_id *id = NULL;
        if (source == RECOVERY_COMPUTE_ALONE) {
            id = &session->segments[i].id;
        } else if (source == RECOVERY_COMPUTE && exact) {
            id = &session->segments[i].chain_id;
        }
        exact = exact && (source == RECOVERY_CHAIN || source == RECOVERY_COMPUTE);
        if (!id) {
            continue;
        }
        uint64_t bytes = 0;
        struct rk_error error = {.text = ""};
        enum rk_status status = store_pages(session, i, id, &bytes, &error);
        if (status != RK_OK) {
            RK_LOG_WARN("publish_failed", "status=%s reason=%q", rk_status_name(status),
                        error.text);
            return; /* What follows would most likely fail alike, a deadline each. */
        }
    }
}
