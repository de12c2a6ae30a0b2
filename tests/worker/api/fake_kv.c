#include "tests/worker/api/fake_kv.h"

#include "client/kv_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

void fake_kv_create(struct fake_kv *kv, const struct rk_kv_layout *layout)
{
    memset(kv, 0, sizeof(*kv));
    kv->layout = *layout;
    pthread_mutex_init(&kv->mutex, NULL);
}

void fake_kv_forget(struct fake_kv *kv)
{
    struct rk_kv_layout layout = kv->layout;
    assert_int_equal(atomic_load(&kv->holds), 0);
    for (uint32_t i = 0; i < kv->num_segments; i++) {
        struct fake_segment *segment = &kv->segments[i];
        for (uint64_t p = 0; p < segment->num_pages; p++) {
            free(segment->pages[p]);
        }
        free(segment->pages);
        free(segment->checksums);
        free(segment->token_ids);
    }
    pthread_mutex_destroy(&kv->mutex);
    fake_kv_create(kv, &layout);
}

void fake_kv_destroy(struct fake_kv *kv)
{
    fake_kv_forget(kv);
    pthread_mutex_destroy(&kv->mutex);
}

void fake_kv_damage(struct fake_kv *kv, uint32_t i, uint64_t page)
{
    ((unsigned char *)kv->segments[i].pages[page])[5] ^= 1;
}

static struct fake_segment *find(struct fake_kv *kv, const struct rk_id *id)
{
    for (uint32_t i = kv->num_segments; i-- > 0;) {
        if (rk_id_equal(&kv->segments[i].id, id)) {
            return &kv->segments[i];
        }
    }
    return NULL;
}

/* As a peer that does not answer. */
static enum rk_status be_silent(const struct rk_until *until)
{
    enum rk_status status = rk_until_over(until);
    while (status == RK_OK) {
        rk_clock_sleep_ms(1);
        status = rk_until_over(until);
    }
    return status;
}

static enum rk_status fake_locate(struct rk_kv_client *client, const struct rk_id *fingerprint,
                                  const struct rk_id *ids, size_t num_ids, bool with_token_ids,
                                  const struct rk_until *until,
                                  struct rk_kv_location *ret_locations, struct rk_error *error)
{
    struct fake_kv *kv = (struct fake_kv *)(void *)client;
    (void)fingerprint;
    (void)error;
    atomic_fetch_add(&kv->locates, 1);
    bool down = kv->locate_silent;
    if (down) {
        (void)be_silent(until);
    }
    pthread_mutex_lock(&kv->mutex);
    for (size_t i = 0; i < num_ids; i++) {
        struct fake_segment *found = find(kv, &ids[i]);
        ret_locations[i] = (struct rk_kv_location){
            .segment_id = ids[i], .status = down ? RK_MISS_NODE_DOWN : RK_MISS_ABSENT};
        if (down || !found) {
            continue;
        }
        ret_locations[i].num_tokens = found->num_tokens;
        if (with_token_ids) {
            ret_locations[i].token_ids = rk_alloc_zero(found->num_tokens, sizeof(int32_t));
            memcpy(ret_locations[i].token_ids, found->token_ids,
                   found->num_tokens * sizeof(int32_t));
        }
        if (!found->dropped) {
            ret_locations[i].status = RK_OK;
            ret_locations[i].shards = rk_alloc_zero(1, sizeof(struct rk_kv_shards));
        }
    }
    pthread_mutex_unlock(&kv->mutex);
    return RK_OK;
}

static enum rk_status fake_get(struct rk_kv_client *client, const struct rk_id *fingerprint,
                               const struct rk_kv_layout *layout,
                               const struct rk_kv_location *location,
                               const struct rk_extent *extents, size_t num_extents,
                               const struct rk_until *until, struct rk_kv_pages *ret_pages,
                               struct rk_error *error)
{
    struct fake_kv *kv = (struct fake_kv *)(void *)client;
    (void)fingerprint;
    (void)error;
    atomic_fetch_add(&kv->gets, 1);
    kv->last_deadline_ns = until->deadline_ns;
    if (kv->get_silent) {
        enum rk_status status = be_silent(until);
        return status == RK_ERR_DEADLINE ? RK_MISS_DEADLINE : status;
    }
    pthread_mutex_lock(&kv->mutex);
    struct fake_segment *found = find(kv, &location->segment_id);
    pthread_mutex_unlock(&kv->mutex);
    assert_non_null(found);
    uint32_t per_head = rk_kv_pages(found->num_tokens);
    struct rk_kv_pages pages = {.path = RK_PATH_SHM};
    for (size_t e = 0; e < num_extents; e++) {
        pages.num_pages += extents[e].page_end - extents[e].page_begin;
    }
    pages.pages = rk_alloc_zero(pages.num_pages, sizeof(*pages.pages));
    uint64_t at = 0;
    for (size_t e = 0; e < num_extents; e++) {
        uint64_t head = (uint64_t)extents[e].layer * layout->num_kv_heads + extents[e].kv_head;
        for (uint32_t p = extents[e].page_begin; p < extents[e].page_end; p++, at++) {
            pages.pages[at] = (struct rk_page){.data = found->pages[head * per_head + p],
                                               .checksum = found->checksums[head * per_head + p]};
        }
    }
    pages.bytes = pages.num_pages * rk_kv_page_bytes(layout);
    pages.hold = kv;
    int holds = atomic_fetch_add(&kv->holds, 1) + 1;
    int most = atomic_load(&kv->holds_max);
    while (holds > most && !atomic_compare_exchange_weak(&kv->holds_max, &most, holds)) {
    }
    *ret_pages = pages;
    return RK_OK;
}

static enum rk_status fake_check(const struct rk_kv_client *client, const struct rk_kv_pages *pages)
{
    struct fake_kv *kv = pages->hold;
    assert_ptr_equal(client, kv);
    int check = atomic_fetch_add(&kv->checks, 1) + 1;
    bool lost =
        kv->fails_at > 0 && (check == kv->fails_at || (kv->lost_all && check > kv->fails_at));
    return lost ? kv->lost : RK_OK;
}

static void fake_release(struct rk_kv_client *client, struct rk_kv_pages *pages)
{
    struct fake_kv *kv = (struct fake_kv *)(void *)client;
    atomic_fetch_sub(&kv->holds, 1);
    rk_free(pages->pages);
    memset(pages, 0, sizeof(*pages));
}

static enum rk_status fake_put(struct rk_kv_client *client, const struct rk_kv_put *put,
                               const struct rk_until *until, bool *ret_already,
                               struct rk_error *error)
{
    struct fake_kv *kv = (struct fake_kv *)(void *)client;
    (void)ret_already;
    atomic_fetch_add(&kv->puts, 1);
    if (kv->put_silent) {
        enum rk_status status = be_silent(until);
        return rk_error_set(error, status, "the store is silent");
    }
    size_t bytes = rk_kv_page_bytes(&put->layout);
    pthread_mutex_lock(&kv->mutex);
    assert_true(kv->num_segments < FAKE_SEGMENTS_MAX);
    struct fake_segment *segment = &kv->segments[kv->num_segments];
    *segment = (struct fake_segment){.id = put->segment_id,
                                     .num_tokens = put->num_tokens,
                                     .num_pages = rk_kv_pages_total(&put->layout, put->num_tokens)};
    segment->pages = calloc(segment->num_pages, sizeof(*segment->pages));
    segment->checksums = calloc(segment->num_pages, sizeof(*segment->checksums));
    segment->token_ids = calloc(put->num_tokens, sizeof(*segment->token_ids));
    memcpy(segment->token_ids, put->token_ids, put->num_tokens * sizeof(*segment->token_ids));
    for (uint64_t p = 0; p < segment->num_pages; p++) {
        segment->pages[p] = aligned_alloc(64, bytes);
        memcpy(segment->pages[p], put->pages[p], bytes);
        segment->checksums[p] = put->checksums[p];
    }
    kv->num_segments++;
    pthread_mutex_unlock(&kv->mutex);
    return RK_OK;
}

static enum rk_status fake_drop_copy(struct rk_kv_client *client,
                                     const struct rk_kv_location *location,
                                     const struct rk_extent *bad, const struct rk_until *until,
                                     bool *ret_dropped, struct rk_error *error)
{
    struct fake_kv *kv = (struct fake_kv *)(void *)client;
    (void)until;
    (void)ret_dropped;
    (void)error;
    atomic_fetch_add(&kv->drops, 1);
    kv->dropped_page = *bad;
    pthread_mutex_lock(&kv->mutex);
    find(kv, &location->segment_id)->dropped = true;
    pthread_mutex_unlock(&kv->mutex);
    return RK_OK;
}

const struct api_kv_ops fake_kv_ops = {
    .locate = fake_locate,
    .get = fake_get,
    .check = fake_check,
    .release = fake_release,
    .put = fake_put,
    .drop_copy = fake_drop_copy,
};
