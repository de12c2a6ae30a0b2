/*
 * Goal:   reading segments costs one deadline in all, whatever is down; a replica serves when the
 *         first store does not; what is late or down is a miss, and a cancellation is not; a silent
 *         coordinator is waited for once by all calls together.
 * Method: the pool's fake transport; a coordinator that is a socket nobody accepts at.
 */
#include "tests/client/fake_transport.h"

#include <arpa/inet.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

static const struct rk_kv_layout layout = {
    .num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .dtype = RK_DTYPE_BF16};
static const struct rk_extent first_page = {0, 0, 0, 1};
static const struct rk_id fingerprint;

/* A segment of one shard, on each of these stores. */
static struct rk_kv_location location_of(const char *const *addresses, uint32_t count)
{
    struct rk_kv_shards *shards =
        rk_alloc_zero(1, sizeof(*shards) + count * sizeof(shards->shards[0]));
    shards->count = count;
    for (uint32_t i = 0; i < count; i++) {
        shards->shards[i] =
            (struct rk_kv_shard){.generation = 1,
                                 .heads = {.layer_end = 1, .kv_head_end = 1},
                                 .layout = layout,
                                 .endpoint = {.node_id = rk_alloc_string("store"),
                                              .incarnation = 1,
                                              .address = rk_alloc_string(addresses[i]),
                                              .host_id = rk_alloc_string(""),
                                              .shm_socket = rk_alloc_string(""),
                                              .ucx_address = rk_alloc_string("")}};
    }
    return (struct rk_kv_location){.status = RK_OK, .num_tokens = 64, .shards = shards};
}

static enum rk_status read_one(struct rk_kv_client *client, const struct rk_kv_location *location,
                               const struct rk_until *until)
{
    struct rk_kv_pages pages;
    enum rk_status status =
        rk_kv_get(client, &fingerprint, &layout, location, &first_page, 1, until, &pages, NULL);
    if (status == RK_OK) {
        rk_kv_release(client, &pages);
    }
    return status;
}

static void pages_that_are_held_are_checked_where_they_are(void **state)
{
    (void)state;
    static const char *const stores[] = {"a:1"};
    static const enum rk_status guards[] = {RK_OK, RK_MISS_EVICTED, RK_OK, RK_MISS_NODE_DOWN};
    struct rk_kv_client client = {.pool = fake_pool(), .maker = getpid()};
    struct rk_kv_location location = location_of(stores, 1);
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(1000)};
    struct rk_kv_pages pages;
    assert_int_equal(
        rk_kv_get(&client, &fingerprint, &layout, &location, &first_page, 1, &until, &pages, NULL),
        RK_OK);
    for (size_t i = 0; i < sizeof(guards) / sizeof(guards[0]); i++) {
        fake.guard = guards[i];
        assert_int_equal(rk_kv_pages_check(&client, &pages), guards[i]);
    }
    rk_kv_release(&client, &pages);
    assert_int_equal(rk_kv_pages_check(&client, &pages), RK_OK); /* Nothing is held. */
    rk_kv_locations_free(&location, 1);
    rk_kv_pool_destroy(client.pool);
}

static void a_request_pays_one_deadline_for_all_its_segments(void **state)
{
    (void)state;
    static const char *const stores[] = {"a:1"};
    struct rk_kv_client client = {.pool = fake_pool(), .maker = getpid()};
    struct rk_kv_location location = location_of(stores, 1);
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(1000)};
    assert_int_equal(read_one(&client, &location, &until), RK_OK);
    int64_t begin_ns = rk_clock_ns();
    until.deadline_ns = rk_deadline_in_ms(100);
    fake.mood = FAKE_SILENT;
    int gets = fake.gets;
    assert_int_equal(read_one(&client, &location, &until), RK_MISS_DEADLINE);
    for (int i = 1; i < 30; i++) { /* No time is left: nobody is asked. */
        assert_int_equal(read_one(&client, &location, &until), RK_MISS_DEADLINE);
    }
    assert_int_equal(fake.gets, gets + 1);
    until.deadline_ns = rk_deadline_in_ms(60000);
    for (int i = 0; i < 30; i++) { /* The next request, within the back-off. */
        assert_int_equal(read_one(&client, &location, &until), RK_MISS_NODE_DOWN);
    }
    assert_true(rk_clock_ns() - begin_ns < INT64_C(1000000000));
    rk_kv_locations_free(&location, 1);
    rk_kv_pool_destroy(client.pool);
}

static void a_replica_serves_when_the_first_store_is_down(void **state)
{
    (void)state;
    static const char *const stores[] = {"a:1", "b:1"};
    struct rk_kv_client client = {.pool = fake_pool(), .maker = getpid()};
    struct rk_kv_location location = location_of(stores, 2);
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(1000)};
    fake.down_address = "a:1";
    assert_int_equal(read_one(&client, &location, &until), RK_OK);
    assert_int_equal(fake.connects, 2);
    assert_int_equal(read_one(&client, &location, &until), RK_OK);
    assert_int_equal(fake.connects, 2); /* The first is not asked within its back-off. */
    fake.down_address = NULL;
    fake_pass_ms(RK_KV_BACKOFF_MS);
    assert_int_equal(read_one(&client, &location, &until), RK_OK);
    assert_int_equal(fake.connects, 3);
    rk_kv_locations_free(&location, 1);
    rk_kv_pool_destroy(client.pool);
}

static bool always(void *context)
{
    (void)context;
    return true;
}

static void a_cancellation_is_no_miss(void **state)
{
    (void)state;
    static const char *const stores[] = {"a:1", "b:1"};
    struct rk_kv_client client = {.pool = fake_pool(), .maker = getpid()};
    struct rk_kv_location location = location_of(stores, 2);
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(60000), .cancelled = always};
    fake.mood = FAKE_SILENT;
    assert_int_equal(read_one(&client, &location, &until), RK_ERR_CANCELLED);
    rk_kv_locations_free(&location, 1);
    rk_kv_pool_destroy(client.pool);
}

static void misses_are_made_here(void **state)
{
    (void)state;
    assert_int_equal(rk_kv_as_miss(RK_ERR_UNAVAILABLE), RK_MISS_NODE_DOWN);
    assert_int_equal(rk_kv_as_miss(RK_ERR_DEADLINE), RK_MISS_DEADLINE);
    assert_int_equal(rk_kv_as_miss(RK_ERR_CANCELLED), RK_ERR_CANCELLED);
    assert_int_equal(rk_kv_as_miss(RK_MISS_EVICTED), RK_MISS_EVICTED);
    assert_int_equal(rk_kv_as_miss(RK_OK), RK_OK);
}

/* Takes connections, as the kernel does for a stopped process, and never says a word. */
static int silent_socket(char *ret_address, size_t bytes)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(fd, 16), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &length), 0);
    (void)snprintf(ret_address, bytes, "127.0.0.1:%d", ntohs(address.sin_port));
    return fd;
}

static void a_silent_coordinator_is_waited_for_once(void **state)
{
    (void)state;
    char address[32];
    int fd = silent_socket(address, sizeof(address));
    const struct rk_kv_client_options options = {.coordinator = address, .timeout_ms = 400};
    struct rk_kv_client *client = NULL;
    assert_int_equal(rk_kv_client_create(&options, &client, NULL), RK_OK);
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(60000)};
    struct rk_kv_location location;
    const struct rk_id id = {{1}};
    int64_t begin_ns = rk_clock_ns();
    assert_int_equal(rk_kv_locate(client, &fingerprint, &id, 1, false, &until, &location, NULL),
                     RK_OK);
    assert_int_equal(location.status, RK_MISS_NODE_DOWN);
    assert_true(rk_clock_ns() - begin_ns >= INT64_C(300000000));
    begin_ns = rk_clock_ns();
    const struct rk_kv_put put = {.segment_id = id, .layout = layout, .num_tokens = 1};
    uint32_t dropped = 0;
    assert_int_equal(rk_kv_put(client, &put, &until, NULL, NULL), RK_ERR_UNAVAILABLE);
    assert_int_equal(rk_kv_drop(client, &id, 1, &until, &dropped, NULL), RK_ERR_UNAVAILABLE);
    assert_int_equal(rk_kv_locate(client, &fingerprint, &id, 1, false, &until, &location, NULL),
                     RK_OK);
    assert_true(rk_clock_ns() - begin_ns < INT64_C(100000000));
    rk_kv_client_destroy(client);
    (void)close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pages_that_are_held_are_checked_where_they_are),
        cmocka_unit_test(a_request_pays_one_deadline_for_all_its_segments),
        cmocka_unit_test(a_replica_serves_when_the_first_store_is_down),
        cmocka_unit_test(a_cancellation_is_no_miss),
        cmocka_unit_test(misses_are_made_here),
        cmocka_unit_test(a_silent_coordinator_is_waited_for_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
