/* What a request says, where its KV is, and what is to be made of it. */
#include "worker/api/api_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"

#include <stdio.h>
#include <string.h>

#define IDS_TIMEOUT_MS 2000

/* Nothing is cached without a cluster: the same path, with a miss for everything. */
static enum rk_status locate(const struct session *session, const struct rk_id *ids, size_t num_ids,
                             bool with_token_ids, const struct rk_until *until,
                             struct rk_kv_location *ret_locations, struct rk_error *error)
{
    const struct api *api = session->api;
    if (api->options.kv) {
        enum rk_status status =
            api->kv->locate(api->options.kv, &api->options.fingerprint, ids, num_ids,
                            with_token_ids, until, ret_locations, error);
        if (status == RK_OK && rk_until_over(&session->until) == RK_ERR_CANCELLED) {
            rk_kv_locations_free(ret_locations, num_ids);
            return rk_error_set(error, RK_ERR_CANCELLED, "cancelled while it was located");
        }
        return status;
    }
    for (size_t i = 0; i < num_ids; i++) {
        ret_locations[i] = (struct rk_kv_location){.status = RK_MISS_ABSENT, .segment_id = ids[i]};
    }
    return RK_OK;
}

struct rk_until session_wait(const struct session *session)
{
    return rk_until_sooner(&session->until, rk_clock_ns() + session->wait_left_ns);
}

void session_waited(struct session *session, int64_t begin_ns)
{
    int64_t waited_ns = rk_clock_ns() - begin_ns;
    session->wait_left_ns -= waited_ns < session->wait_left_ns ? waited_ns : session->wait_left_ns;
    session->fetch_s += (double)waited_ns * 1e-9;
}

enum rk_status session_create(struct api *api, const struct rk_until *until, const void *salt,
                              size_t salt_bytes, struct session **ret_session,
                              struct rk_error *error)
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
    session->until = *until;
    session->wait_left_ns = api->options.fetch_timeout_ms * INT64_C(1000000);
    session->arrived_ns = rk_clock_ns();
    (void)snprintf(session->name, sizeof(session->name), "%08x-%llu",
                   (uint32_t)(api->options.incarnation ^ api->options.incarnation >> 32),
                   (unsigned long long)atomic_fetch_add(&api->num_requests, 1) + 1);
    if (salt_bytes > 0) {
        memcpy(session->salt, salt, salt_bytes);
    }
    session->salt_bytes = salt_bytes;
    *ret_session = session;
    return RK_OK;
}

void session_destroy(struct session *session)
{
    if (!session) {
        return;
    }
    scheduler_job_release(session->job); /* The engine may read pages until here. */
    session_leave(session);
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
    rk_free(session->told);
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
    segment->chain_id = rk_id_chain(index > 0 ? &session->segments[index - 1].chain_id
                                              : &session->api->options.numeric_path,
                                    &segment->id);
    return RK_OK;
}

enum rk_status session_locate_ids(struct session *session, const struct rk_id *ids, size_t num_ids,
                                  struct rk_kv_location *ret_locations, struct rk_error *error)
{
    /* Not a wait for the cache: without the tokens there is no request. */
    struct rk_until until = rk_until_sooner(&session->until, rk_deadline_in_ms(IDS_TIMEOUT_MS));
    return locate(session, ids, num_ids, true, &until, ret_locations, error);
}

enum rk_status session_add_located(struct session *session, struct rk_kv_location *location,
                                   const char *label, struct rk_error *error)
{
    char hex[RK_ID_HEX_BYTES];
    rk_id_to_hex(&location->segment_id, hex);
    if (!location->token_ids) {
        if (location->status == RK_MISS_NODE_DOWN) {
            return rk_error_set(error, RK_ERR_UNAVAILABLE,
                                "segment %.16s...: the coordinator does not answer, so its tokens "
                                "are not known; give the file instead of the id",
                                hex);
        }
        return rk_error_set(error, RK_ERR_NOT_FOUND,
                            "segment %.16s...: unknown to the cluster (%s); store its file with "
                            "\"redknot put FILE\" first",
                            hex, rk_status_name(location->status));
    }
    int32_t *token_ids = location->token_ids;
    location->token_ids = NULL; /* the session's now */
    /* A chain's id names the segment that it ends with. */
    struct rk_id alone =
        rk_origin_is_chain(&location->origin) ? location->origin.alone : location->segment_id;
    enum rk_status status = session_add_segment(session, token_ids, location->num_tokens,
                                                label && label[0] ? label : location->label, error);
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
    struct rk_until until = session_wait(session);
    return locate(session, &segment->id, 1, false, &until, &segment->alone, NULL) == RK_OK &&
           segment->alone.status == RK_OK;
}

/* ---- Locate and plan ---- */

/* Alone at position 0 is in place, so the first segment alone is exact if our own arithmetic
 * computed it. */
static void judge_first(struct session *session)
{
    struct session_segment *first = &session->segments[0];
    first->foreign =
        first->alone.status == RK_OK &&
        !rk_id_equal(&first->alone.origin.numeric_path, &session->api->options.numeric_path);
    if (!session->level->reuse_segments && first->in_chain.status != RK_OK) {
        first->miss = first->foreign ? RK_MISS_NUMERIC_PATH : first->alone.status;
    }
}

/* One batched question for all that this level may reuse. */
enum rk_status session_locate_all(struct session *session, struct rk_error *error)
{
    uint32_t count = session->num_segments;
    bool alone = session->level->reuse_segments;
    if (count == 0 || !session->level->reuse_chain) {
        return RK_OK;
    }
    uint32_t num_alone = alone ? count : 1; /* The first one may be exact. */
    size_t total = (size_t)count + num_alone;
    struct rk_id *ids = rk_alloc_zero(total, sizeof(*ids));
    struct rk_kv_location *locations = rk_alloc_zero(total, sizeof(*locations));
    enum rk_status status = RK_ERR_NO_MEMORY;
    if (!ids || !locations) {
        rk_error_set(error, status, "no memory to locate %u segments", count);
        goto done;
    }
    for (uint32_t i = 0; i < count; i++) {
        ids[i] = session->segments[i].chain_id;
        if (i < num_alone) {
            ids[count + i] = session->segments[i].id;
        }
    }
    int64_t begin_ns = rk_clock_ns();
    struct rk_until until = session_wait(session);
    status = locate(session, ids, total, false, &until, locations, error);
    session_waited(session, begin_ns);
    for (uint32_t i = 0; status == RK_OK && i < count; i++) {
        session->segments[i].in_chain = locations[i];
        session->segments[i].miss = locations[i].status;
        if (i < num_alone) {
            session->segments[i].alone = locations[count + i];
        }
        if (alone) {
            session->segments[i].miss = locations[count + i].status;
        }
    }
    if (status == RK_OK) {
        judge_first(session);
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

enum rk_status session_plan(struct session *session, uint32_t tokens_ahead, struct rk_error *error)
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
    if (session->num_segments > 0 && segments[0].alone) {
        bool foreign = session->segments[0].foreign;
        segments[0].in_chain |= !foreign;
        segments[0].alone = !foreign || session->level->reuse_segments;
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
struct rk_kv_location *session_source(struct session *session, uint32_t segment)
{
    struct session_segment *s = &session->segments[segment];
    if (session->plan.runs[segment].source == RECOVERY_CHAIN &&
        usable(&s->in_chain, s->num_tokens)) {
        return &s->in_chain;
    }
    return &s->alone;
}

enum rk_status session_reserve(struct session *session, uint32_t tokens_max, struct rk_error *error)
{
    uint32_t count = session->num_segments;
    session->fetched = rk_alloc_zero(count, sizeof(*session->fetched));
    session->segment_tokens = rk_alloc_zero(count, sizeof(*session->segment_tokens));
    session->segment_num_tokens = rk_alloc_zero(count, sizeof(*session->segment_num_tokens));
    session->told = rk_alloc_zero(tokens_max, sizeof(*session->told));
    if (!session->fetched || !session->segment_tokens || !session->segment_num_tokens ||
        !session->told) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %u segments", count);
    }
    for (uint32_t i = 0; i < count; i++) {
        session->segment_tokens[i] = session->segments[i].token_ids;
        session->segment_num_tokens[i] = session->segments[i].num_tokens;
    }
    return RK_OK;
}
