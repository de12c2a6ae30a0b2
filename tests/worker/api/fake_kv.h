/*
 * fake_kv: a store in memory behind the calls that a request makes of its KV
 * client, which can be silent, lose pages under a reader, and refuse.
 * Threads: any; the switches are set while nobody calls.
 */
#ifndef TESTS_WORKER_API_FAKE_KV_H
#define TESTS_WORKER_API_FAKE_KV_H

#include "worker/api/api.h"

#include <pthread.h>
#include <stdatomic.h>

#define FAKE_SEGMENTS_MAX 256

struct fake_segment {
    struct rk_id id;
    uint32_t num_tokens;
    int32_t *token_ids;
    void **pages; /* [layer][kv_head][page] */
    uint64_t *checksums;
    uint64_t num_pages;
    bool dropped;
};

struct fake_kv {
    struct rk_kv_layout layout;
    pthread_mutex_t mutex;
    struct fake_segment segments[FAKE_SEGMENTS_MAX];
    uint32_t num_segments;

    /* Switches. */
    bool locate_silent, get_silent, put_silent; /* wait as long as they may */
    int fails_at;        /* this check (1, 2, ...) finds pages lost; 0: none */
    enum rk_status lost; /* why */
    bool lost_all;       /* and all checks behind it */

    /* What was seen. */
    atomic_int locates, gets, checks, puts, drops;
    atomic_int holds, holds_max; /* out now, and at most */
    struct rk_extent dropped_page;
    _Atomic int64_t last_deadline_ns; /* of a get */
};

extern const struct api_kv_ops fake_kv_ops; /* the client is a struct fake_kv */
void fake_kv_create(struct fake_kv *kv, const struct rk_kv_layout *layout);
void fake_kv_destroy(struct fake_kv *kv); /* asserts that no hold is out */
void fake_kv_forget(struct fake_kv *kv);  /* all that is stored and seen, and the switches */
/* Changes a byte of a page of segment i. */
void fake_kv_damage(struct fake_kv *kv, uint32_t i, uint64_t page);

#endif
