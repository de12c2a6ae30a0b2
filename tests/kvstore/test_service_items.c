/*
 * Goal:   over gRPC, too, items are what is counted and what fails: reads count items, and an id
 *         that is none costs no other item its answer.
 * Method: the service in this process, behind a server of its own.
 */
#include "kvstore/service_internal.h"

#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/value.h"
#include "redknot/v1/kvstore.pb-c.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define WAIT_MS 20000

static struct kvstore *store;
static struct kvstore_service service;
static struct rk_rpc_server *server;
static char address[64];

static int set_up(void **state)
{
    const struct kvstore_options options = {.dram_bytes = 64 * 4096};
    const struct rk_rpc_server_options rpc = {.address = "127.0.0.1:0"};
    (void)state;
    assert_int_equal(kvstore_create(&options, &store, NULL), RK_OK);
    kvstore_service_init(&service, store, "store", 7);
    assert_int_equal(rk_rpc_server_create(&rpc, &server, NULL), RK_OK);
    assert_int_equal(kvstore_service_attach(&service, server), RK_OK);
    assert_int_equal(rk_rpc_server_start(server), RK_OK);
    (void)snprintf(address, sizeof(address), "127.0.0.1:%d", rk_rpc_server_port(server));
    const struct kvstore_header header = {
        .kind = KVSTORE_VALUE, .key = "key", .key_bytes = 3, .value_bytes = 5};
    struct kvstore_put *put = NULL;
    uint64_t checksum = rk_hash_xxh3("value", 5);
    assert_int_equal(kvstore_put_begin(store, &header, &put, NULL), RK_OK);
    assert_int_equal(kvstore_put_write(put, "value", 5, &checksum, 1, NULL), RK_OK);
    assert_int_equal(kvstore_put_commit(put, NULL), RK_OK);
    kvstore_put_destroy(put);
    return 0;
}

static int tear_down(void **state)
{
    struct kvstore_stats stats;
    int64_t deadline_ns = rk_deadline_in_ms(WAIT_MS);
    (void)state;
    rk_rpc_server_destroy(server);
    do { /* gRPC lets go of pages in its own time. */
        kvstore_stats_get(store, &stats);
    } while (stats.num_pins > 0 && rk_deadline_left_ms(deadline_ns) > 0);
    kvstore_destroy(store);
    return 0;
}

static void reads_count_items(void **state)
{
    const struct rk_transport_endpoint endpoint = {
        .grpc_address = address, .node_id = "store", .incarnation = 7};
    const struct rk_until until = {.deadline_ns = rk_deadline_in_ms(WAIT_MS)};
    struct rk_transport *reader = NULL;
    struct rk_get gets[5];
    struct rk_pages pages[5];
    (void)state;
    for (int i = 0; i < 5; i++) { /* The last two are not there. */
        gets[i] = (struct rk_get){.id = rk_id_value(i < 3 ? "key" : "none", i < 3 ? 3 : 4),
                                  .bytes_max = 100};
    }
    double before = rk_metric_value(service.gets[RK_PATH_GRPC]);
    assert_int_equal(rk_transport_connect(&endpoint, RK_PATH_GRPC, WAIT_MS, &reader, NULL), RK_OK);
    assert_int_equal(rk_transport_get(reader, gets, 5, &until, pages, NULL), RK_OK);
    assert_int_equal(pages[2].status, RK_OK);
    assert_int_equal(pages[3].status, RK_MISS_ABSENT);
    assert_int_equal((int)(rk_metric_value(service.gets[RK_PATH_GRPC]) - before), 5);
    rk_transport_release(reader, pages, 5);
    rk_transport_destroy(reader);
}

static void an_id_that_is_none_costs_no_other(void **state)
{
    struct rk_rpc_channel *channel = NULL;
    struct ProtobufCMessage *message = NULL;
    struct rk_id id = rk_id_value("key", 3);
    uint8_t odd[300] = {0};
    ProtobufCBinaryData ids[3] = {{sizeof(odd), odd}, {RK_ID_BYTES, id.bytes}, {0, NULL}};
    Redknot__V1__HasValuesRequest has = REDKNOT__V1__HAS_VALUES_REQUEST__INIT;
    Redknot__V1__DropValuesRequest drop = REDKNOT__V1__DROP_VALUES_REQUEST__INIT;
    (void)state;
    has.n_ids = drop.n_ids = 3;
    has.ids = drop.ids = ids;
    assert_int_equal(rk_rpc_channel_create(address, &channel, NULL), RK_OK);
    assert_int_equal(rk_rpc_unary(channel, "/redknot.v1.KvStore/HasValues", &has.base,
                                  &redknot__v1__has_values_reply__descriptor, WAIT_MS, &message,
                                  NULL),
                     RK_OK);
    const Redknot__V1__HasValuesReply *found = (const Redknot__V1__HasValuesReply *)message;
    assert_int_equal(found->n_found, 3);
    assert_true(!found->found[0] && found->found[1] && !found->found[2]);
    rk_rpc_message_free(message);
    assert_int_equal(rk_rpc_unary(channel, "/redknot.v1.KvStore/DropValues", &drop.base,
                                  &redknot__v1__drop_values_reply__descriptor, WAIT_MS, &message,
                                  NULL),
                     RK_OK);
    const Redknot__V1__DropValuesReply *dropped = (const Redknot__V1__DropValuesReply *)message;
    assert_int_equal(dropped->n_dropped, 3);
    assert_true(!dropped->dropped[0] && dropped->dropped[1] && !dropped->dropped[2]);
    rk_rpc_message_free(message);
    rk_rpc_channel_destroy(channel);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(reads_count_items),
                                       cmocka_unit_test(an_id_that_is_none_costs_no_other)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
