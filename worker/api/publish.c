/* What a job computed goes into the stores. */
#include "worker/api/api_internal.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"
#include "common/base/log.h"

/* What a chain continues. Its second segment continues the first one, under whose own name a drop
 * looks for it; its first one continues nothing but the arithmetic. */
static const struct rk_id *parent_of(const struct session *session, uint32_t segment)
{
    return segment == 0   ? &session->api->options.numeric_path
           : segment == 1 ? &session->segments[0].id
                          : &session->segments[segment - 1].chain_id;
}

enum rk_status session_store(struct session *session, uint32_t segment, const struct rk_id *id,
                             const struct rk_until *until, uint64_t *ret_bytes,
                             struct rk_error *error)
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
        .origin = {.alone = s->id,
                   .salt_tag = rk_salt_tag(session->salt, session->salt_bytes),
                   .numeric_path = api->options.numeric_path},
        .pages = pages,
        .checksums = checksums,
    };
    if (!rk_id_equal(id, &s->id)) {
        put.origin.parent = *parent_of(session, segment);
    }
    status = api->kv->put(api->options.kv, &put, until, NULL, error);
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

/* The id under which segment i may be stored; NULL: nothing of it is new and exact. *exact: what
 * came before it was computed or reused exactly. */
static const struct rk_id *storable(const struct session *session, uint32_t i, bool *exact)
{
    enum recovery_source source = session->plan.runs[i].source;
    const struct rk_id *id = NULL;
    if (source == RECOVERY_COMPUTE_ALONE) {
        id = &session->segments[i].id;
    } else if (source == RECOVERY_COMPUTE && *exact) {
        /* The first one is alone and in place at once: it takes its own id, unless KV of another
         * arithmetic has that already. */
        id = i == 0 && !session->segments[0].foreign ? &session->segments[0].id
                                                     : &session->segments[i].chain_id;
    }
    *exact = *exact && (source == RECOVERY_CHAIN || source == RECOVERY_COMPUTE);
    return id;
}

/* A segment computed alone is stored under its own id; one computed in place is exact for the
 * chain that it ends, if everything before it was computed or reused exactly. */
void session_publish(struct session *session, const struct rk_until *until)
{
    if (!session->api->options.kv || !session->job) {
        return;
    }
    bool exact = true;
    for (uint32_t i = 0; i < session->num_segments; i++) {
        uint64_t bytes = 0;
        const struct rk_id *id = storable(session, i, &exact);
        if (!id) {
            continue;
        }
        if (session->num_not_stored > 0) { /* It would most likely fail alike. */
            session->num_not_stored++;
            continue;
        }
        enum rk_status status = session_store(session, i, id, until, &bytes, &session->store_error);
        if (status == RK_OK) {
            session->num_stored++;
        } else {
            session->num_not_stored++;
            RK_LOG_WARN("publish_failed", "request=%s status=%s reason=%q", session->name,
                        rk_status_name(status), session->store_error.text);
        }
    }
}
