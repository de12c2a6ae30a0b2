/*
 * Goal:   a coordinator that dies by SIGKILL between commits loses none that it
 *         acknowledged, and never hands out a generation again.
 * Method: the real program in a child process, killed and started again on the
 *         same directory; this process is its client and serves as the store.
 */
#include "tests/coordinator/fake_store.h"

#include "common/base/kv_layout.h"
#include "common/rpc/rpc.h"
#include "redknot/v1/coordinator.pb-c.h"

#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define CALL_MS         20000
#define ROUNDS          3
#define PUTS_EACH_ROUND 40
#define M(name)         "/redknot.v1.Coordinator/" name

struct child {
    pid_t pid;
    FILE *log;
    struct rk_rpc_channel *channel;
};

static void start(struct child *ours, char *directory)
{
    char *arguments[] = {(char *)(uintptr_t) "redknot-coordinator",
                         (char *)(uintptr_t) "--listen",
                         (char *)(uintptr_t) "127.0.0.1:0",
                         (char *)(uintptr_t) "--metrics",
                         (char *)(uintptr_t) "127.0.0.1:0",
                         (char *)(uintptr_t) "--data",
                         directory,
                         NULL};
    posix_spawn_file_actions_t actions;
    char line[1024];
    char address[32] = "";
    int pipes[2];

    assert_int_equal(pipe(pipes), 0);
    assert_int_equal(posix_spawn_file_actions_init(&actions), 0);
    assert_int_equal(posix_spawn_file_actions_adddup2(&actions, pipes[1], 2), 0);
    assert_int_equal(posix_spawn_file_actions_addclose(&actions, pipes[0]), 0);
    assert_int_equal(posix_spawn(&ours->pid, REDKNOT_BINARY_DIR "/bin/redknot-coordinator",
                                 &actions, NULL, arguments, environ),
                     0);
    (void)posix_spawn_file_actions_destroy(&actions);
    (void)close(pipes[1]);
    ours->log = fdopen(pipes[0], "r");
    while (address[0] == '\0' && fgets(line, sizeof(line), ours->log) != NULL) {
        const char *port = strstr(line, " port=");

        if (strstr(line, "event=started") != NULL && port != NULL) {
            (void)snprintf(address, sizeof(address), "127.0.0.1:%ld", strtol(port + 6, NULL, 10));
        }
    }
    assert_true(address[0] != '\0');
    assert_int_equal(rk_rpc_channel_create(address, &ours->channel, NULL), RK_OK);
}

static void crash(struct child *ours)
{
    int status = 0;

    assert_int_equal(kill(ours->pid, SIGKILL), 0);
    assert_int_equal(waitpid(ours->pid, &status, 0), ours->pid);
    ours->pid = 0;
    (void)fclose(ours->log);
    rk_rpc_channel_destroy(ours->channel);
}

static void join(struct child *ours, struct fake_store *store)
{
    Redknot__V1__NodeInfo info = REDKNOT__V1__NODE_INFO__INIT;
    Redknot__V1__RegisterRequest request = REDKNOT__V1__REGISTER_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;

    info.node_id = (char *)(uintptr_t) "store";
    info.role = REDKNOT__V1__NODE_INFO__ROLE__ROLE_STORE;
    info.incarnation = 5;
    info.grpc_address = store->address;
    request.node = &info;
    assert_int_equal(rk_rpc_unary(ours->channel, M("RegisterNode"), &request.base,
                                  &redknot__v1__register_reply__descriptor, CALL_MS, &reply, NULL),
                     RK_OK);
    rk_rpc_message_free(reply);
}

static uint64_t put(struct child *ours, uint8_t *id)
{
    static uint8_t fingerprint[32] = {7};
    Redknot__V1__KvLayout layout = REDKNOT__V1__KV_LAYOUT__INIT;
    Redknot__V1__PlaceRequest place = REDKNOT__V1__PLACE_REQUEST__INIT;
    Redknot__V1__CommitRequest commit = REDKNOT__V1__COMMIT_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;

    layout.num_layers = layout.num_kv_heads = layout.head_dim = 1;
    layout.dtype = REDKNOT__V1__KV_LAYOUT__DTYPE__DTYPE_F32;
    layout.page_tokens = RK_PAGE_TOKENS;
    place.segment_id = commit.segment_id = (ProtobufCBinaryData){32, id};
    place.fingerprint = (ProtobufCBinaryData){32, fingerprint};
    place.layout = &layout;
    place.num_tokens = 1;
    assert_int_equal(rk_rpc_unary(ours->channel, M("Place"), &place.base,
                                  &redknot__v1__place_reply__descriptor, CALL_MS, &reply, NULL),
                     RK_OK);
    commit.generation = ((Redknot__V1__PlaceReply *)reply)->shards[0]->generation;
    rk_rpc_message_free(reply);
    assert_int_equal(rk_rpc_unary(ours->channel, M("Commit"), &commit.base,
                                  &redknot__v1__commit_reply__descriptor, CALL_MS, &reply, NULL),
                     RK_OK);
    rk_rpc_message_free(reply);
    return commit.generation;
}

/* One at a time; here, so that a failed assertion leaves none running. */
static struct child child;

static int kill_child(void **state)
{
    (void)state;
    if (child.pid != 0) {
        (void)kill(child.pid, SIGKILL);
        (void)waitpid(child.pid, NULL, 0);
    }
    return 0;
}

static void acknowledged_commits_survive(void **state)
{
    static uint8_t ids[ROUNDS * PUTS_EACH_ROUND][32];
    static ProtobufCBinaryData names[ROUNDS * PUTS_EACH_ROUND];
    char directory[] = "/tmp/redknot-crash-XXXXXX";
    char command[64];
    struct fake_store store;
    uint64_t last = 0;
    size_t count = 0;

    (void)state;
    assert_non_null(mkdtemp(directory));
    fake_store_start(&store);
    for (int round = 0; round < ROUNDS; round++) {
        Redknot__V1__LocateRequest request = REDKNOT__V1__LOCATE_REQUEST__INIT;
        Redknot__V1__LocateReply *reply = NULL;

        start(&child, directory);
        join(&child, &store);
        request.n_segment_ids = count;
        request.segment_ids = names;
        assert_int_equal(rk_rpc_unary(child.channel, M("Locate"), &request.base,
                                      &redknot__v1__locate_reply__descriptor, CALL_MS,
                                      (ProtobufCMessage **)&reply, NULL),
                         RK_OK);
        for (size_t i = 0; i < count; i++) {
            assert_string_equal(reply->locations[i]->miss, "");
        }
        rk_rpc_message_free(&reply->base);
        for (int i = 0; i < PUTS_EACH_ROUND; i++, count++) {
            uint64_t generation;

            ids[count][0] = (uint8_t)count;
            names[count] = (ProtobufCBinaryData){32, ids[count]};
            generation = put(&child, ids[count]);
            assert_true(generation > last);
            last = generation;
        }
        crash(&child);
    }
    fake_store_stop(&store);
    (void)snprintf(command, sizeof(command), "rm -rf %s", directory);
    assert_int_equal(system(command), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(acknowledged_commits_survive, kill_child),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
