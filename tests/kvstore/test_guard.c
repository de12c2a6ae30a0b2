/*
 * Goal:   what a reader holds in place stays what it was, whatever the reader asks beside it; and
 * if a fault ever gave its room to another, the guard makes a miss of it. Method: a real store
 * behind a real socket, in this process, under the pressure of puts that evict. The fault is
 * injected: the server gives back all pins of readers that go on reading.
 */
#include "kvstore/kvstore.h"
#include "kvstore/service_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/log.h"
#include "common/base/value.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define VALUE_BYTES 4096u
#define LARGE_BYTES 32768u
#define PINS_MAX    4096u
#define STORE_BYTES ((uint64_t)(PINS_MAX + 512) * VALUE_BYTES)
#define WAIT_MS     20000

struct fixture {
    struct kvstore *store;
    struct kvstore_service service;
    struct rk_shm_server *server;
    char folder[64];
    char socket[96];
};

static void serve(struct fixture *fixture)
{
    const struct rk_shm_server_options options = {.socket_path = fixture->socket,
                                                  .arena_fd = kvstore_arena_fd(fixture->store),
                                                  .arena_bytes =
                                                      kvstore_arena_bytes(fixture->store),
                                                  .num_seals = kvstore_num_seals(fixture->store),
                                                  .node_id = "store",
                                                  .incarnation = 7,
                                                  .pins_max = PINS_MAX,
                                                  .ops = &kvstore_service_store_ops,
                                                  .context = &fixture->service};
    assert_int_equal(rk_shm_server_start(&options, &fixture->server, NULL), RK_OK);
}

static int set_up(void **state)
{
    struct fixture *fixture = rk_alloc_zero(1, sizeof(*fixture));
    const struct kvstore_options options = {.dram_bytes = STORE_BYTES};
    assert_non_null(fixture);
    assert_int_equal(kvstore_create(&options, &fixture->store, NULL), RK_OK);
    kvstore_service_init(&fixture->service, fixture->store, "store", 7);
    (void)snprintf(fixture->folder, sizeof(fixture->folder), "/tmp/redknot-test-XXXXXX");
    assert_non_null(mkdtemp(fixture->folder));
    (void)snprintf(fixture->socket, sizeof(fixture->socket), "%s/socket", fixture->folder);
    serve(fixture);
    *state = fixture;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *fixture = *state;
    rk_shm_server_stop(fixture->server);
    kvstore_destroy(fixture->store);
    assert_int_equal(rmdir(fixture->folder), 0);
    rk_free(fixture);
    return 0;
}

static void bytes_fill(unsigned key, uint8_t *ret_bytes, size_t bytes)
{
    uint64_t value = key * UINT64_C(0x9e3779b97f4a7c15) + 1;
    for (size_t at = 0; at < bytes; at += sizeof(value)) {
        value = value * UINT64_C(6364136223846793005) + 1442695040888963407u;
        memcpy(ret_bytes + at, &value, sizeof(value));
    }
}

static enum rk_status value_put_bytes(struct kvstore *store, unsigned key, size_t value_bytes)
{
    const struct kvstore_header header = {
        .kind = KVSTORE_VALUE, .key = &key, .key_bytes = sizeof(key), .value_bytes = value_bytes};
    uint8_t bytes[LARGE_BYTES];
    struct kvstore_put *put = NULL;
    enum rk_status status = kvstore_put_begin(store, &header, &put, NULL);
    bytes_fill(key, bytes, value_bytes);
    uint64_t checksum = rk_hash_xxh3(bytes, value_bytes);
    if (status == RK_OK) {
        status = kvstore_put_write(put, bytes, value_bytes, &checksum, 1, NULL);
    }
    if (status == RK_OK) {
        status = kvstore_put_commit(put, NULL);
    }
    kvstore_put_destroy(put);
    return status;
}

static enum rk_status value_put(struct kvstore *store, unsigned key)
{
    return value_put_bytes(store, key, VALUE_BYTES);
}

static struct rk_transport *reader_connect(const struct fixture *fixture)
{
    const struct rk_transport_endpoint endpoint = {.grpc_address = "",
                                                   .host_id = rk_host_id(),
                                                   .shm_socket = fixture->socket,
                                                   .node_id = "store",
                                                   .incarnation = 7};
    struct rk_transport *reader = NULL;
    struct rk_error error = {.text = ""};
    if (rk_transport_connect(&endpoint, RK_PATH_SHM, WAIT_MS, &reader, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
    return reader;
}

static enum rk_status view(struct rk_transport *reader, unsigned key, struct rk_pages *ret_pages)
{
    const struct rk_get get = {.id = rk_id_value(&key, sizeof(key)), .bytes_max = VALUE_BYTES};
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(WAIT_MS)};
    enum rk_status status = rk_transport_get(reader, &get, 1, &until, ret_pages, NULL);
    return status == RK_OK ? ret_pages->status : status;
}

static bool is_still(unsigned key, const struct rk_pages *pages)
{
    uint8_t bytes[VALUE_BYTES];
    bytes_fill(key, bytes, VALUE_BYTES);
    return memcmp(pages->pages[0].data, bytes, sizeof(bytes)) == 0;
}

/* PINS_MAX values, all viewed. */
static struct rk_pages *views_make(struct fixture *fixture, struct rk_transport *reader)
{
    struct rk_pages *views = rk_alloc_zero(PINS_MAX, sizeof(*views));
    assert_non_null(views);
    for (unsigned key = 0; key < PINS_MAX; key++) {
        assert_int_equal(value_put(fixture->store, key), RK_OK);
        assert_int_equal(view(reader, key, &views[key]), RK_OK);
    }
    return views;
}

/* Also with what has the room of many at once. */
static void pressure(struct fixture *fixture, unsigned first, unsigned count)
{
    for (unsigned key = first; key < first + count; key++) {
        size_t bytes = key % 2 ? LARGE_BYTES : VALUE_BYTES;
        assert_int_equal(value_put_bytes(fixture->store, key, bytes), RK_OK);
    }
}

static void more_views_than_it_may_cost_none(void **state)
{
    struct fixture *fixture = *state;
    struct rk_transport *reader = reader_connect(fixture);
    struct rk_pages *views = views_make(fixture, reader);
    struct rk_pages one_more;
    for (int i = 0; i < 70; i++) {
        assert_int_equal(view(reader, 3, &one_more), RK_ERR_FULL);
    }
    rk_clock_sleep_ms(50);
    pressure(fixture, PINS_MAX, 12000);
    for (unsigned key = 0; key < PINS_MAX; key++) {
        assert_true(is_still(key, &views[key]));
        assert_int_equal(rk_transport_check(reader, &views[key]), RK_OK);
    }
    rk_transport_release(reader, &views[9], 1);
    assert_int_equal(view(reader, 3, &one_more), RK_OK); /* It goes on serving. */
    rk_transport_release(reader, &one_more, 1);
    for (unsigned key = 0; key < PINS_MAX; key++) {
        rk_transport_release(reader, &views[key], 1);
    }
    rk_transport_destroy(reader);
    rk_free(views);
}

static void a_lost_pin_is_a_miss(void **state)
{
    struct fixture *fixture = *state;
    struct rk_transport *reader = reader_connect(fixture);
    struct rk_pages *views = views_make(fixture, reader);
    unsigned misses = 0;
    unsigned wrong = 0;
    rk_shm_server_fault_unpin(fixture->server);
    pressure(fixture, PINS_MAX, 3000);
    for (unsigned key = 0; key < PINS_MAX; key++) {
        bool still = is_still(key, &views[key]);
        enum rk_status status = rk_transport_check(reader, &views[key]);
        assert_true(status == RK_OK || status == RK_MISS_EVICTED);
        assert_true(still || status != RK_OK); /* Never wrong bytes that pass for good ones. */
        misses += status != RK_OK;
        wrong += !still;
    }
    print_message("%u of %u views lost, %u with other bytes\n", misses, PINS_MAX, wrong);
    assert_true(wrong > 1000 && misses >= wrong); /* The fault did bite. */
    for (unsigned key = 0; key < PINS_MAX; key++) {
        rk_transport_release(reader, &views[key], 1);
    }
    rk_transport_destroy(reader);
    rk_free(views);
}

struct storm {
    struct fixture *fixture;
    atomic_uint puts;
    atomic_bool over;
};

static void *storm_thread(void *context)
{
    struct storm *storm = context;
    for (unsigned key = 1000000; !atomic_load(&storm->over); key++) {
        if (key % 500 == 0) {
            rk_shm_server_fault_unpin(storm->fixture->server);
        }
        (void)value_put(storm->fixture->store, key);
        atomic_fetch_add(&storm->puts, 1);
    }
    return NULL;
}

/* Copies what is viewed again and again until so many more puts have come. A copy that the check
 * behind it lets pass must be good; a view that failed once is given up. */
static void copy_on(struct storm *storm, struct rk_transport *reader, const struct rk_pages *pages,
                    unsigned key, unsigned puts, unsigned *good, unsigned *misses)
{
    uint8_t bytes[VALUE_BYTES];
    uint8_t copy[VALUE_BYTES];
    unsigned begin = atomic_load(&storm->puts);
    bytes_fill(key, bytes, VALUE_BYTES);
    while (pages->status == RK_OK && atomic_load(&storm->puts) - begin < puts) {
        memcpy(copy, pages->pages[0].data, VALUE_BYTES);
        if (rk_transport_check(reader, pages) != RK_OK) {
            (*misses)++;
            return;
        }
        assert_memory_equal(copy, bytes, VALUE_BYTES);
        (*good)++;
    }
}

/* Bytes that are copied while others write them are caught by the check behind the copy. */
static void a_check_after_the_use_is_enough(void **state)
{
    struct fixture *fixture = *state;
    struct storm storm = {.fixture = fixture};
    struct rk_transport *reader = reader_connect(fixture);
    pthread_t thread;
    unsigned good = 0;
    unsigned misses = 0;
    assert_int_equal(pthread_create(&thread, NULL, storm_thread, &storm), 0);
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    while (misses < 20 && rk_deadline_left_ms(deadline_ns) > 0) {
        struct rk_pages pages;
        (void)value_put(fixture->store, misses);
        (void)view(reader, misses, &pages);
        copy_on(&storm, reader, &pages, misses, 3 * PINS_MAX, &good, &misses);
        rk_transport_release(reader, &pages, 1);
    }
    atomic_store(&storm.over, true);
    assert_int_equal(pthread_join(thread, NULL), 0);
    print_message("%u good, %u misses\n", good, misses);
    assert_true(good > 0 && misses > 0);
    rk_transport_destroy(reader);
}

static void a_lost_connection_is_a_miss(void **state)
{
    struct fixture *fixture = *state;
    struct rk_transport *reader = reader_connect(fixture);
    struct rk_pages pages;
    assert_int_equal(value_put(fixture->store, 1), RK_OK);
    assert_int_equal(view(reader, 1, &pages), RK_OK);
    assert_int_equal(rk_transport_check(reader, &pages), RK_OK);
    rk_shm_server_stop(fixture->server);
    assert_int_equal(rk_transport_check(reader, &pages), RK_MISS_NODE_DOWN);
    assert_true(is_still(1, &pages));
    rk_transport_release(reader, &pages, 1);
    rk_transport_destroy(reader);
    serve(fixture);
}

static void seals_end_with_the_room(void **state)
{
    struct fixture *fixture = *state;
    unsigned key = 5;
    const struct rk_id id = rk_id_value(&key, sizeof(key));
    const struct kvstore_name name = {.kind = KVSTORE_VALUE, .segment_id = id};
    const struct kvstore_shard *shard = NULL;
    const uint8_t *arena = kvstore_arena(fixture->store);
    const volatile uint64_t *seals =
        (const uint64_t *)(const void *)(arena + kvstore_arena_bytes(fixture->store));
    uint64_t index = 0;
    assert_int_equal(value_put(fixture->store, key), RK_OK);
    assert_int_equal(kvstore_pin_value(fixture->store, &id, &shard), RK_OK);
    uint64_t seal = kvstore_shard_seal(shard, &index);
    assert_true(seal != 0 && index < kvstore_num_seals(fixture->store));
    assert_int_equal(seals[index], seal);
    assert_int_equal(kvstore_drop(fixture->store, &name), RK_OK);
    assert_int_equal(seals[index], seal); /* Pinned: it may be read. */
    kvstore_unpin(fixture->store, shard);
    assert_int_equal(seals[index], 0);
    assert_int_equal(value_put(fixture->store, key), RK_OK); /* The same room. */
    assert_true(seals[index] != 0 && seals[index] != seal);
    /* What the scrubber finds to be damaged is lost to those who hold it, too. */
    struct kvstore_name damaged;
    uint64_t offset = 0;
    assert_int_equal(kvstore_pin_value(fixture->store, &id, &shard), RK_OK);
    assert_int_equal(kvstore_fault_inject(fixture->store, &damaged, &offset), RK_OK);
    (void)kvstore_scrub(fixture->store, VALUE_BYTES);
    assert_int_equal(seals[index], 0);
    kvstore_unpin(fixture->store, shard);
}

static void copies_need_no_guard(void **state)
{
    struct fixture *fixture = *state;
    struct rk_transport *reader = reader_connect(fixture);
    uint8_t bytes[VALUE_BYTES];
    unsigned key = 1;
    const struct rk_get get = {
        .id = rk_id_value(&key, sizeof(key)), .bytes_max = VALUE_BYTES, .buffer = bytes};
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(WAIT_MS)};
    struct rk_pages pages;
    assert_int_equal(value_put(fixture->store, key), RK_OK);
    assert_int_equal(rk_transport_get(reader, &get, 1, &until, &pages, NULL), RK_OK);
    assert_int_equal(pages.status, RK_OK);
    assert_false(pages.in_place);
    rk_shm_server_stop(fixture->server);
    assert_int_equal(rk_transport_check(reader, &pages), RK_OK);
    rk_transport_release(reader, &pages, 1);
    rk_transport_destroy(reader);
    serve(fixture);
}

int main(void)
{
#define SERVED(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        SERVED(more_views_than_it_may_cost_none), SERVED(a_lost_pin_is_a_miss),
        SERVED(a_check_after_the_use_is_enough),  SERVED(a_lost_connection_is_a_miss),
        SERVED(seals_end_with_the_room),          SERVED(copies_need_no_guard),
    };
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
