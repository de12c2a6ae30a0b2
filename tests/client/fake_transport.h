/*
 * A transport that does what a test says, and a clock that moves when it says so: for tests of the
 * pool and of what is built on it. One thread.
 */
#ifndef TESTS_CLIENT_FAKE_TRANSPORT_H
#define TESTS_CLIENT_FAKE_TRANSPORT_H

#include "client/kv_internal.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <string.h>

enum fake_mood {
    FAKE_ANSWERS,
    FAKE_REFUSES, /* connections, and requests on those there are */
    FAKE_SILENT,  /* until the caller's deadline; the clock moves by silent_ms */
    FAKE_LOST,    /* requests on connections there are fail, new ones work */
};

struct rk_transport {
    int generation; /* of the fake's connections */
    uint64_t pins;
    enum rk_path path;
};

static struct fake {
    enum fake_mood mood;
    const char *down_address; /* that store refuses, whatever the mood; NULL: none */
    int64_t now_ns;
    int64_t silent_ms;
    enum rk_path path;    /* of new connections */
    enum rk_path nearest; /* that there is */
    uint64_t pins_max;    /* per connection, 0: any number */
    int oldest_good;      /* FAKE_LOST: connections made before are lost */
    int connects;
    int gets;
    int puts;
    int destroyed;
    enum rk_status guard; /* of pages that are held */
    void (*on_get)(void); /* called once inside the next get */
} fake;

static int64_t fake_clock_ns(void)
{
    return fake.now_ns;
}

static void fake_pass_ms(int64_t ms)
{
    fake.now_ns += ms * 1000000;
}

static enum rk_status fake_wait(const struct rk_until *until, enum rk_status late)
{
    fake_pass_ms(fake.silent_ms);
    while (rk_until_over(until) == RK_OK) {
        rk_clock_sleep_ms(1);
    }
    return rk_until_over(until) == RK_ERR_CANCELLED ? RK_ERR_CANCELLED : late;
}

static enum rk_status fake_connect(const struct rk_transport_endpoint *endpoint, enum rk_path path,
                                   const struct rk_until *until,
                                   struct rk_transport **ret_transport, struct rk_error *error)
{
    (void)path;
    fake.connects++;
    /* Whoever answers must be the one that is looked for: the transport has to know who that is. */
    RK_ASSERT(endpoint->node_id && endpoint->node_id[0] != '\0' && endpoint->incarnation != 0);
    if (fake.mood == FAKE_SILENT) {
        return fake_wait(until, RK_ERR_UNAVAILABLE);
    }
    if (fake.mood == FAKE_REFUSES ||
        (fake.down_address && strcmp(fake.down_address, endpoint->grpc_address) == 0)) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "refused");
    }
    struct rk_transport *transport = rk_alloc_zero(1, sizeof(*transport));
    RK_ASSERT(transport);
    transport->generation = fake.connects;
    transport->path = fake.path;
    *ret_transport = transport;
    return RK_OK;
}

static enum rk_path fake_path(const struct rk_transport *transport)
{
    return transport->path;
}

static enum rk_path fake_nearest(const struct rk_transport_endpoint *endpoint)
{
    (void)endpoint;
    return fake.nearest;
}

static enum rk_status fake_mood(const struct rk_transport *transport, const struct rk_until *until)
{
    if (fake.mood == FAKE_SILENT) {
        return fake_wait(until, RK_ERR_DEADLINE);
    }
    bool lost = fake.mood == FAKE_LOST && transport->generation < fake.oldest_good;
    return lost || fake.mood == FAKE_REFUSES ? RK_ERR_UNAVAILABLE : RK_OK;
}

static enum rk_status fake_get(struct rk_transport *transport, const struct rk_get *gets,
                               size_t num_gets, const struct rk_until *until,
                               struct rk_pages *ret_pages, struct rk_error *error)
{
    (void)gets;
    (void)error;
    fake.gets++;
    void (*on_get)(void) = fake.on_get;
    fake.on_get = NULL;
    if (on_get) {
        on_get();
    }
    enum rk_status status = fake_mood(transport, until);
    for (size_t i = 0; status == RK_OK && i < num_gets; i++) {
        ret_pages[i] = (struct rk_pages){.status = RK_OK};
        if (fake.pins_max > 0 && transport->pins == fake.pins_max) {
            ret_pages[i].status = RK_ERR_FULL;
            continue;
        }
        transport->pins++;
        ret_pages[i].pages = rk_alloc_zero(1, sizeof(struct rk_page));
        ret_pages[i].num_pages = 1;
        ret_pages[i].bytes = 1;
    }
    return status;
}

static enum rk_status fake_put(struct rk_transport *transport, struct rk_put *puts, size_t num_puts,
                               const struct rk_until *until, struct rk_error *error)
{
    (void)error;
    fake.puts++;
    enum rk_status status = fake_mood(transport, until);
    for (size_t i = 0; i < num_puts; i++) {
        puts[i].status = status;
    }
    return status;
}

static void fake_release(struct rk_transport *transport, struct rk_pages *pages, size_t num_pages)
{
    for (size_t i = 0; i < num_pages; i++) {
        transport->pins -= pages[i].pages != NULL;
        rk_free(pages[i].pages);
        pages[i] = (struct rk_pages){0};
    }
}

static enum rk_status fake_check(const struct rk_transport *transport, const struct rk_pages *pages)
{
    RK_ASSERT(transport->pins > 0 && pages->pages);
    return fake.guard;
}

static void fake_destroy(struct rk_transport *transport)
{
    RK_ASSERT(transport->pins == 0);
    fake.destroyed++;
    rk_free(transport);
}

static const struct rk_kv_pool_ops fake_ops = {
    .connect = fake_connect,
    .path = fake_path,
    .nearest = fake_nearest,
    .get = fake_get,
    .put = fake_put,
    .release = fake_release,
    .check = fake_check,
    .destroy = fake_destroy,
    .clock_ns = fake_clock_ns,
};

/* A pool over a fake that answers. */
static struct rk_kv_pool *fake_pool(void)
{
    const struct rk_kv_pool_options options = {.path = RK_PATH_NONE, .ops = &fake_ops};
    struct rk_kv_pool *pool = NULL;
    fake = (struct fake){.mood = FAKE_ANSWERS,
                         .now_ns = 1000000000,
                         .silent_ms = 2000,
                         .path = RK_PATH_SHM,
                         .nearest = RK_PATH_SHM};
    RK_ASSERT(rk_kv_pool_create(&options, &pool) == RK_OK);
    return pool;
}

#endif
