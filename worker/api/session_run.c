/* One request's way: its turn, fetch, compute, and again when pages turn out bad or are lost. */
#include "worker/api/api_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/log.h"

#include <string.h>

/* ---- Its turn ---- */

static enum rk_status enter(struct session *session, uint32_t holds, struct rk_error *error)
{
    enum rk_status status = admission_enter(session->api->admission, holds, &session->until, error);
    session->admitted = status == RK_OK;
    session->holds = holds;
    return status;
}

static void release_fetched(struct session *session)
{
    for (uint32_t i = 0; session->fetched && i < session->num_segments; i++) {
        if (session->fetched[i].hold) {
            session->api->kv->release(session->api->options.kv, &session->fetched[i]);
        }
        session->fetched[i] = (struct rk_kv_pages){0};
    }
}

void session_leave(struct session *session)
{
    release_fetched(session);
    if (session->admitted) {
        admission_leave(session->api->admission, session->holds);
        session->admitted = false;
    }
}

/* ---- Fetch ---- */

static void count_miss(struct session *session, uint32_t segment, struct rk_kv_location *location,
                       enum rk_status miss)
{
    struct session_segment *s = &session->segments[segment];
    struct rk_kv_location *other = location == &s->alone ? &s->in_chain : &s->alone;
    if (other->status == RK_OK && rk_id_equal(&other->segment_id, &location->segment_id)) {
        other->status = miss; /* A chain of one and the segment alone are one thing. */
    }
    location->status = miss;
    s->miss = miss;
    rk_metric_add(session->api->metrics.misses[miss], 1);
}

static enum rk_status get(struct session *session, uint32_t segment, const struct rk_until *until,
                          struct rk_error *error)
{
    const struct api *api = session->api;
    const struct recovery_run *run = &session->plan.runs[segment];
    struct rk_kv_pages *fetched = &session->fetched[segment];
    enum rk_status status = api->kv->get(api->options.kv, &api->options.fingerprint, &api->layout,
                                         session_source(session, segment), run->extents,
                                         run->num_extents, until, fetched, error);
    if (status != RK_OK) {
        *fetched = (struct rk_kv_pages){0};
        return status;
    }
    session->bytes_fetched += fetched->bytes;
    session->path = fetched->path;
    rk_metric_add(api->metrics.bytes_fetched[fetched->path], (double)fetched->bytes);
    return RK_OK;
}

/* Fetches what the plan reuses. *ret_replan: something was missing after all. The time for it is
 * one for the request: what a silent store used up, the segments behind have not got. */
static enum rk_status fetch(struct session *session, bool *ret_replan, struct rk_error *error)
{
    int64_t begin_ns = rk_clock_ns();
    struct rk_until until = session_wait(session);
    enum rk_status over = RK_OK;
    for (uint32_t i = 0; over == RK_OK && i < session->num_segments; i++) {
        enum recovery_source source = session->plan.runs[i].source;
        if (source != RECOVERY_CHAIN && source != RECOVERY_SEGMENT) {
            continue;
        }
        struct rk_error why = {.text = ""};
        enum rk_status status = get(session, i, &until, &why);
        if (status == RK_OK) {
            continue;
        }
        over = rk_until_over(&session->until); /* Of the request: nobody wants it any more. */
        if (!rk_status_is_miss(status) && over == RK_OK) {
            RK_LOG_WARN("fetch_failed", "request=%s status=%s reason=%q", session->name,
                        rk_status_name(status), why.text);
        }
        count_miss(session, i, session_source(session, i),
                   rk_status_is_miss(status) ? status : RK_MISS_NODE_DOWN);
        *ret_replan = true;
    }
    session_waited(session, begin_ns);
    return over == RK_OK
               ? RK_OK
               : rk_error_set(error, over, "while pages were fetched: %s", rk_status_text(over));
}

/* Each round that has to plan again marks at least one location as missed, so it ends. */
static enum rk_status plan_and_fetch(struct session *session, uint32_t tokens_ahead,
                                     struct rk_error *error)
{
    enum rk_status status = RK_OK;
    for (bool again = true; again && status == RK_OK;) {
        again = false;
        release_fetched(session);
        session->bytes_fetched = 0;
        session->path = RK_PATH_NONE;
        status = session_plan(session, tokens_ahead, error);
        if (status == RK_OK) {
            status = fetch(session, &again, error);
        }
    }
    return status;
}

/* By the engine's thread, while ours waits: are all borrowed pages still what they were? */
static enum rk_status pages_check(void *context, uint32_t *ret_segment)
{
    const struct session *session = context;
    const struct api *api = session->api;
    for (uint32_t i = 0; i < session->num_segments; i++) {
        if (session->fetched[i].hold) {
            enum rk_status status = api->kv->check(api->options.kv, &session->fetched[i]);
            if (status != RK_OK) {
                *ret_segment = i;
                return status;
            }
        }
    }
    return RK_OK;
}

/* ---- Compute ---- */

/* Each token and row is told once, however often the request begins again. */
static enum rk_status tell(struct session *session, const struct session_run *run,
                           const struct scheduler_event *event)
{
    if (event->kind == SCHEDULER_ROW && event->row < session->rows_told) {
        return RK_OK;
    }
    enum rk_status status = run->on_event(run->context, event);
    if (event->kind == SCHEDULER_TOKENS) {
        memcpy(session->told + session->num_told, event->tokens,
               event->num_tokens * sizeof(*session->told));
        session->num_told += event->num_tokens;
    }
    session->rows_told += event->kind == SCHEDULER_ROW;
    return status;
}

static void take_result(struct session *session)
{
    scheduler_job_result(session->job, &session->result);
    if (session->started_ns == 0) {
        session->started_ns = session->result.started_ns;
    }
    if (session->first_token_ns == 0 && (session->num_told > 0 || session->rows_told > 0)) {
        session->first_token_ns = session->result.first_token_ns;
    }
}

static enum rk_status follow_job(struct session *session, const struct session_run *run,
                                 struct rk_error *error)
{
    enum rk_status ended = RK_OK; /* as our side wants it */
    for (;;) {
        struct scheduler_event event;
        enum rk_status status =
            scheduler_job_wait(session->job, rk_deadline_in_ms(RK_UNTIL_SLICE_MS), &event);
        if (ended == RK_OK) {
            ended = rk_until_over(&session->until);
            if (ended != RK_OK) {
                scheduler_job_cancel(session->job);
            }
        }
        if (status != RK_OK) {
            continue;
        }
        if (event.kind == SCHEDULER_DONE) {
            take_result(session);
            status = ended != RK_OK ? ended : event.status;
            return status == RK_OK ? RK_OK
                                   : rk_error_set(error, status, "%s",
                                                  session->result.text[0] ? session->result.text
                                                                          : rk_status_text(status));
        }
        if (ended == RK_OK) {
            ended = tell(session, run, &event);
            if (ended != RK_OK) {
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
        .replay = session->told,
        .num_replay = session->num_told,
        .pages_check = session->api->kv->check ? pages_check : NULL,
        .pages_context = session,
    };
    scheduler_job_release(session->job);
    session->job = NULL;
    enum rk_status status =
        scheduler_job_submit(session->api->options.scheduler, &request, &session->job, error);
    return status == RK_OK ? follow_job(session, run, error) : status;
}

/* ---- Begin again ---- */

/* So that what is computed now can be stored in its place. */
static void drop_bad_copy(struct session *session, uint32_t segment)
{
    const struct api *api = session->api;
    const struct rk_kv_location *location = session_source(session, segment);
    const struct rk_extent *page = &session->result.bad_page;
    struct rk_error error = {.text = ""};
    struct rk_until until = session_wait(session);
    char hex[RK_ID_HEX_BYTES];
    rk_id_to_hex(&location->segment_id, hex);
    RK_LOG_WARN("checksum_miss",
                "request=%s segment=%s node=%q layer=%u head=%u page=%u action=recompute",
                session->name, hex, rk_kv_location_node(location, page), page->layer, page->kv_head,
                page->page_begin);
    int64_t begin_ns = rk_clock_ns();
    if (api->kv->drop_copy(api->options.kv, location, page, &until, NULL, &error) != RK_OK) {
        RK_LOG_WARN("drop_failed", "request=%s reason=%q", session->name, error.text);
    }
    session_waited(session, begin_ns);
}

/* A page was bad, or pages were lost while they were in use: nothing that was computed from them
 * was told. Their locations are misses now, so that the next round computes them; each round has
 * at least one location less. */
static void begin_again(struct session *session, enum rk_status miss)
{
    const struct api *api = session->api;
    uint32_t bad = session->result.bad_segment;
    RK_ASSERT(bad < session->num_segments);
    session->restarts++;
    rk_metric_add(api->metrics.restarts[miss], 1);
    scheduler_job_release(session->job); /* The engine may read pages until here. */
    session->job = NULL;
    if (miss == RK_MISS_CHECKSUM) {
        drop_bad_copy(session, bad);
    } else {
        RK_LOG_WARN("pages_lost",
                    "request=%s segment=%u status=%s tokens_told=%u rows_told=%u action=restart",
                    session->name, bad, rk_status_name(miss), session->num_told,
                    session->rows_told);
    }
    /* Others are lost with it, most likely: a connection holds many. */
    for (uint32_t i = 0; i < session->num_segments; i++) {
        if (i == bad || !session->fetched[i].hold || !api->kv->check) {
            continue;
        }
        enum rk_status status = api->kv->check(api->options.kv, &session->fetched[i]);
        if (status != RK_OK) {
            count_miss(session, i, session_source(session, i), status);
        }
    }
    count_miss(session, bad, session_source(session, bad), miss);
}

enum rk_status session_run(struct session *session, const struct session_run *run,
                           struct rk_error *error)
{
    enum rk_status status = session_reserve(session, run->tokens_max, error);
    if (status == RK_OK) {
        status = enter(session, session->level->reuse_chain ? session->num_segments : 0, error);
    }
    if (status == RK_OK) {
        status = session_locate_all(session, error);
    }
    for (uint32_t i = 0; status == RK_OK && i < session->num_segments; i++) {
        if (rk_status_is_miss(session->segments[i].miss)) {
            rk_metric_add(session->api->metrics.misses[session->segments[i].miss], 1);
        }
    }
    while (status == RK_OK) {
        status = plan_and_fetch(session, run->tokens_max + run->num_forced, error);
        if (status != RK_OK) {
            break;
        }
        status = compute(session, &session->plan, run, error);
        if (!rk_status_is_miss(status)) {
            break;
        }
        begin_again(session, status);
        status = RK_OK;
    }
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
    enum rk_status status = session_reserve(session, 0, error);
    if (status == RK_OK) {
        status = enter(session, 0, error);
    }
    if (status == RK_OK) {
        status = compute(session, NULL, run, error);
    }
    session_leave(session);
    if (status == RK_OK) {
        struct rk_until until = rk_until_sooner(
            &session->until, rk_deadline_in_ms(session->api->options.publish_timeout_ms));
        status = session_store(session, 0, &session->segments[0].id, &until, ret_bytes, error);
    }
    return status;
}
