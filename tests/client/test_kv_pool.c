/*
 * Goal:   the pool takes a store for down when, and only when, the store is silent or refuses; it
 *         asks nobody within a back-off; a connection that broke, or that holds as much as its
 * store bears, is replaced; what is held outlives the connection's use. Method: transports and a
 * clock of our own (fake_transport.h).
 */
#include "tests/client/fake_transport.h"

#include <setjmp.h>
#include <stdarg.h>
#include <sys/resource.h>

#include <cmocka.h>

static struct rk_kv_endpoint one = {.node_id = (char *)"store-1",
                                    .incarnation = 1,
                                    .address = (char *)"127.0.0.1:1",
                                    .host_id = (char *)"",
                                    .shm_socket = (char *)"",
                                    .ucx_address = (char *)""};

struct held {
    struct rk_pages pages[4];
    struct rk_kv_connection *connection;
};

static struct rk_until in_ms_until(int64_t ms)
{
    return (struct rk_until){.deadline_ns = rk_deadline_in_ms(ms)};
}

static enum rk_status get_many(struct rk_kv_pool *pool, size_t count, int64_t timeout_ms,
                               struct held *ret_held)
{
    static const struct rk_get gets[4];
    struct rk_until until = in_ms_until(timeout_ms);
    enum rk_path path;
    return rk_kv_pool_get(pool, &one, gets, count, &until, ret_held->pages, &path,
                          &ret_held->connection, NULL);
}

static enum rk_status get_and_release(struct rk_kv_pool *pool, int64_t timeout_ms)
{
    struct held held;
    enum rk_status status = get_many(pool, 1, timeout_ms, &held);
    if (status == RK_OK) {
        rk_kv_pool_release(pool, held.connection, held.pages, 1);
    }
    return status;
}

static void a_silent_store_costs_one_deadline(void **state)
{
    (void)state;
    struct rk_kv_pool *pool = fake_pool();
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    fake.mood = FAKE_SILENT;
    assert_int_equal(get_and_release(pool, 5), RK_ERR_DEADLINE);
    int asked = fake.gets + fake.connects;
    for (int i = 0; i < 10; i++) {
        assert_int_equal(get_and_release(pool, 1000), RK_ERR_UNAVAILABLE);
    }
    assert_int_equal(fake.gets + fake.connects, asked);
    fake_pass_ms(RK_KV_BACKOFF_MS); /* At most so long after the first failure. */
    fake.mood = FAKE_ANSWERS;
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    rk_kv_pool_destroy(pool);
}

static void each_failure_doubles_the_pause(void **state)
{
    (void)state;
    struct rk_kv_pool *pool = fake_pool();
    fake.mood = FAKE_REFUSES;
    for (int failure = 0; failure < 3; failure++) {
        int connects = fake.connects;
        assert_int_equal(get_and_release(pool, 1000), RK_ERR_UNAVAILABLE);
        assert_int_equal(fake.connects, connects + 1);
        fake_pass_ms(RK_KV_BACKOFF_MS / 2 * (1 << failure) - 1);
        assert_int_equal(get_and_release(pool, 1000), RK_ERR_UNAVAILABLE);
        assert_int_equal(fake.connects, connects + 1);
        fake_pass_ms(RK_KV_BACKOFF_MS / 2 * (1 << failure) + 1);
    }
    rk_kv_pool_destroy(pool);
}

static void a_caller_in_a_hurry_proves_nothing(void **state)
{
    (void)state;
    struct rk_kv_pool *pool = fake_pool();
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    fake.mood = FAKE_SILENT;
    fake.silent_ms = RK_KV_HURRY_MS - 1;
    assert_int_equal(get_and_release(pool, 5), RK_ERR_DEADLINE);
    assert_int_equal(get_and_release(pool, 0), RK_ERR_DEADLINE);
    fake.mood = FAKE_ANSWERS;
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    rk_kv_pool_destroy(pool);
}

static bool always(void *context)
{
    (void)context;
    return true;
}

static void a_cancelled_caller_proves_nothing(void **state)
{
    (void)state;
    static const struct rk_get get;
    struct rk_kv_pool *pool = fake_pool();
    struct held held;
    enum rk_path path;
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(60000), .cancelled = always};
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    fake.mood = FAKE_SILENT;
    assert_int_equal(
        rk_kv_pool_get(pool, &one, &get, 1, &until, held.pages, &path, &held.connection, NULL),
        RK_ERR_CANCELLED);
    fake.mood = FAKE_ANSWERS;
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    assert_int_equal(fake.connects, 1);
    rk_kv_pool_destroy(pool);
}

static struct rk_kv_pool *asking_pool;

static void ask_meanwhile(void)
{
    assert_int_equal(get_and_release(asking_pool, 1000), RK_ERR_UNAVAILABLE);
}

static void one_caller_asks_again_for_all(void **state)
{
    (void)state;
    asking_pool = fake_pool();
    fake.mood = FAKE_REFUSES;
    assert_int_equal(get_and_release(asking_pool, 1000), RK_ERR_UNAVAILABLE);
    fake_pass_ms(RK_KV_BACKOFF_MS);
    fake.mood = FAKE_ANSWERS;
    fake.on_get = ask_meanwhile; /* It is connected, but has not answered yet. */
    assert_int_equal(get_and_release(asking_pool, 1000), RK_OK);
    assert_int_equal(fake.gets, 1);
    assert_int_equal(get_and_release(asking_pool, 1000), RK_OK);
    rk_kv_pool_destroy(asking_pool);
}

static void a_connection_that_broke_says_nothing_of_its_store(void **state)
{
    (void)state;
    struct rk_kv_pool *pool = fake_pool();
    struct rk_put put = {.bytes = 1};
    struct rk_until until = in_ms_until(1000);
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    fake.mood = FAKE_LOST;
    fake.oldest_good = 2;
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    fake.oldest_good = 3;
    assert_int_equal(rk_kv_pool_put(pool, &one, &put, 1, &until, NULL), RK_OK);
    assert_int_equal(fake.connects, 3);
    assert_int_equal(fake.destroyed, 2);
    fake.oldest_good = 100; /* Also a fresh one: then it is the store. */
    assert_int_equal(get_and_release(pool, 1000), RK_ERR_UNAVAILABLE);
    assert_int_equal(fake.connects, 4);
    assert_int_equal(get_and_release(pool, 1000), RK_ERR_UNAVAILABLE);
    assert_int_equal(fake.connects, 4);
    rk_kv_pool_destroy(pool);
}

static void no_descriptor_left_is_no_dead_store(void **state)
{
    (void)state;
    struct rk_kv_pool *pool = fake_pool();
    struct rlimit before;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    const struct rlimit none = {.rlim_cur = 3, .rlim_max = before.rlim_max};
    fake.mood = FAKE_REFUSES; /* As a socket that cannot be made would. */
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    enum rk_status status = get_and_release(pool, 1000);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(status, RK_ERR_NO_MEMORY);
    fake.mood = FAKE_ANSWERS;
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    rk_kv_pool_destroy(pool);
}

static void over_its_maximum_of_pins_another_connection_serves(void **state)
{
    (void)state;
    enum { EACH = 6, ALL = EACH / 3 * RK_KV_CONNECTIONS_MAX };
    static struct held held[ALL];
    struct rk_kv_pool *pool = fake_pool();
    fake.pins_max = EACH + 1; /* Batches of 3: two fit, and the third only in part. */
    for (int i = 0; i < ALL; i++) {
        assert_int_equal(get_many(pool, 3, 1000, &held[i]), RK_OK);
        for (int j = 0; j < 3; j++) {
            assert_int_equal(held[i].pages[j].status, RK_OK);
        }
    }
    assert_int_equal(fake.connects, RK_KV_CONNECTIONS_MAX);
    struct held more;
    assert_int_equal(get_many(pool, 3, 1000, &more), RK_ERR_FULL);
    rk_kv_pool_release(pool, held[0].connection, held[0].pages, 3);
    assert_int_equal(get_many(pool, 3, 1000, &held[0]), RK_OK);
    for (int i = 0; i < ALL; i++) {
        rk_kv_pool_release(pool, held[i].connection, held[i].pages, 3);
    }
    int gets = fake.gets; /* No refusal is asked for twice. */
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    assert_int_equal(fake.gets, gets + 1);
    rk_kv_pool_destroy(pool);
}

static void what_one_connection_cannot_bear_at_all_is_the_answer(void **state)
{
    (void)state;
    struct rk_kv_pool *pool = fake_pool();
    struct held held;
    fake.pins_max = 2;
    assert_int_equal(get_many(pool, 3, 1000, &held), RK_OK);
    assert_int_equal(held.pages[1].status, RK_OK);
    assert_int_equal(held.pages[2].status, RK_ERR_FULL);
    assert_int_equal(fake.connects, 1);
    rk_kv_pool_release(pool, held.connection, held.pages, 3);
    rk_kv_pool_destroy(pool);
}

static void what_is_held_outlives_its_connection(void **state)
{
    (void)state;
    struct rk_kv_pool *pool = fake_pool();
    struct held held;
    assert_int_equal(get_many(pool, 2, 1000, &held), RK_OK);
    fake.mood = FAKE_REFUSES;
    assert_int_equal(get_and_release(pool, 1000), RK_ERR_UNAVAILABLE);
    assert_int_equal(fake.destroyed, 0);
    fake.mood = FAKE_ANSWERS;
    fake_pass_ms(RK_KV_BACKOFF_MS);
    assert_int_equal(get_and_release(pool, 1000), RK_OK); /* Not on the broken one. */
    assert_int_equal(fake.connects, 3);
    assert_int_equal(fake.destroyed, 0);
    rk_kv_pool_release(pool, held.connection, held.pages, 2);
    assert_int_equal(fake.destroyed, 1);
    rk_kv_pool_destroy(pool);
    assert_int_equal(fake.destroyed, 2);
}

static void a_farther_path_is_left_when_a_nearer_one_works(void **state)
{
    (void)state;
    struct rk_kv_pool *pool = fake_pool();
    struct held held;
    fake.path = RK_PATH_GRPC; /* The store paused while we connected. */
    assert_int_equal(get_many(pool, 1, 1000, &held), RK_OK);
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    assert_int_equal(fake.connects, 1);
    fake_pass_ms(RK_KV_NEARER_MS);
    assert_int_equal(get_and_release(pool, 1000), RK_OK); /* In vain. */
    assert_int_equal(fake.connects, 2);
    assert_int_equal(fake.destroyed, 1);
    fake.path = RK_PATH_SHM;
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    assert_int_equal(fake.connects, 2);
    fake_pass_ms(RK_KV_NEARER_MS);
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    assert_int_equal(fake.connects, 3);
    assert_int_equal(fake.destroyed, 1); /* The old one is still held. */
    rk_kv_pool_release(pool, held.connection, held.pages, 1);
    assert_int_equal(fake.destroyed, 2);
    fake_pass_ms(100 * RK_KV_NEARER_MS);
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    assert_int_equal(fake.connects, 3);
    rk_kv_pool_destroy(pool);
}

static void questions_mind_the_same_back_off(void **state)
{
    (void)state;
    struct rk_kv_pool *pool = fake_pool();
    struct rk_kv_ask ask;
    struct rk_until until = in_ms_until(1000);
    assert_int_equal(rk_kv_pool_ask_begin(pool, &one, &ask, NULL), RK_OK);
    fake_pass_ms(1000);
    assert_int_equal(rk_kv_pool_ask_end(pool, &ask, RK_ERR_DEADLINE, &until, NULL),
                     RK_ERR_DEADLINE);
    assert_int_equal(rk_kv_pool_ask_begin(pool, &one, &ask, NULL), RK_ERR_UNAVAILABLE);
    assert_int_equal(get_and_release(pool, 1000), RK_ERR_UNAVAILABLE);
    fake_pass_ms(RK_KV_BACKOFF_MS);
    assert_int_equal(rk_kv_pool_ask_begin(pool, &one, &ask, NULL), RK_OK);
    assert_int_equal(get_and_release(pool, 1000), RK_ERR_UNAVAILABLE);
    assert_int_equal(rk_kv_pool_ask_end(pool, &ask, RK_OK, &until, NULL), RK_OK);
    assert_int_equal(get_and_release(pool, 1000), RK_OK);
    rk_kv_pool_destroy(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_silent_store_costs_one_deadline),
        cmocka_unit_test(each_failure_doubles_the_pause),
        cmocka_unit_test(a_caller_in_a_hurry_proves_nothing),
        cmocka_unit_test(a_cancelled_caller_proves_nothing),
        cmocka_unit_test(one_caller_asks_again_for_all),
        cmocka_unit_test(a_connection_that_broke_says_nothing_of_its_store),
        cmocka_unit_test(no_descriptor_left_is_no_dead_store),
        cmocka_unit_test(over_its_maximum_of_pins_another_connection_serves),
        cmocka_unit_test(what_one_connection_cannot_bear_at_all_is_the_answer),
        cmocka_unit_test(what_is_held_outlives_its_connection),
        cmocka_unit_test(a_farther_path_is_left_when_a_nearer_one_works),
        cmocka_unit_test(questions_mind_the_same_back_off),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
