/*
 * A coordinator in this process on a free port and a fresh directory, two stores that are test
 * doubles, and the calls that tests make, by one byte for an id.
 */
#ifndef TESTS_COORDINATOR_COORDINATOR_FIXTURE_H
#define TESTS_COORDINATOR_COORDINATOR_FIXTURE_H

#include "common/base/id.h"
#include "common/base/origin.h"
#include "common/rpc/rpc.h"
#include "coordinator/coordinator.h"
#include "redknot/v1/coordinator.pb-c.h"
#include "tests/coordinator/fake_store.h"

#define CALL_MS 20000
#define WAIT_MS 20000

#define M(name) "/redknot.v1.Coordinator/" name

struct fixture {
    char directory[64];
    struct coordinator_options options;
    struct coordinator *coordinator;
    struct rk_rpc_channel *channel;
    struct fake_store stores[2];
    char last_error[512];
    /* Of what is placed next. */
    struct rk_origin origin;
    const char *label; /* NULL: "a label" */
    uint64_t epoch;    /* of the last registration's reply */
    uint64_t mark;
    bool with_mark; /* announce says both */
};

/* A shard as a store would tell of it; free with free(). */
struct told {
    uint8_t id[32];
    Redknot__V1__HeadRange heads;
    Redknot__V1__KvLayout layout;
    Redknot__V1__Shard shard;
    Redknot__V1__AnnounceRequest__Entry entry;
};

extern const uint8_t coordinator_fingerprint[32];

ProtobufCBinaryData bytes_of(const uint8_t *data);
void up(struct fixture *f);
void down(struct fixture *f);
int setup(void **state);
int teardown(void **state);
enum rk_status call(struct fixture *f, const char *path, const ProtobufCMessage *request,
                    const ProtobufCMessageDescriptor *type, ProtobufCMessage **ret_reply);
const char *store_name(int i);
enum rk_status try_register(struct fixture *f, int i, uint64_t incarnation);
void join(struct fixture *f, int i, uint64_t incarnation);
bool heartbeat(struct fixture *f, int i, uint64_t incarnation, Redknot__V1__Shard *removed);
enum rk_status place(struct fixture *f, uint8_t id, uint32_t num_tokens,
                     Redknot__V1__PlaceReply **ret_reply);
uint64_t place_ok(struct fixture *f, uint8_t id);
enum rk_status commit(struct fixture *f, uint8_t id, uint64_t generation);
uint64_t put(struct fixture *f, uint8_t id);
Redknot__V1__LocateReply *locate(struct fixture *f, uint8_t id, const uint8_t *model);
void expect(struct fixture *f, uint8_t id, const char *miss, bool tokens);
uint64_t generation_of(struct fixture *f, uint8_t id);
uint32_t drop(struct fixture *f, uint8_t id);
/* A request for everything that it names. */
void drop_request(struct fixture *f, const Redknot__V1__DropRequest *request, uint32_t *ret_dropped,
                  uint64_t *ret_chains);
void tell(struct told *told, uint8_t id, uint64_t generation);
enum rk_status announce(struct fixture *f, int i, uint64_t incarnation, struct told *told,
                        size_t count, uint32_t *ret_accepted, size_t *ret_dropped);

#endif
