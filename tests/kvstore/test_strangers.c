/*
 * Goal:   whatever a peer says, over UCX or gRPC, costs itself alone: the store goes on serving
 *         others, keeps nothing of it, uses a bounded amount of memory for it, and still ends as
 *         it should.
 * Method: a real store process, messages made by hand and at random (the seed is printed), and
 *         after each a good client over the same path.
 */
#include "common/transport/grpc_wire_internal.h"
#include "redknot/v1/kvstore.pb-c.h"
#include "tests/common/transport/ucx_stranger.h"
#include "tests/kvstore/shard_support.h"
#include "tests/kvstore/store_process.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"
#include "common/base/log.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#define MUTATIONS 2000
#define FLOOD     3000
#define CONNECTS  1000
#define EXTENTS   65536u /* the most in one get */
#define BYTES     5000u  /* of a value that is never put right */
/* What a stranger may make the store's memory grow by: the requests that are under way, their
 * answers, and what gRPC and UCX keep. */
#define GROWTH_MAX (UINT64_C(128) << 20)

static struct store store;
static uint64_t seed;

static int set_up(void **state)
{
    (void)state;
    store_start(&store);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    store_stop(&store);
    return 0;
}

static uint64_t random_below(uint64_t *state, uint64_t limit)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (*state >> 33) % limit;
}

static void growth_check(const char *what)
{
    uint64_t bytes = store_growth_bytes(&store);
    print_message("%s: the store's memory grew by %llu KiB\n", what,
                  (unsigned long long)bytes / 1024);
#ifndef REDKNOT_SANITIZED
    assert_true(bytes <= GROWTH_MAX);
#endif
}

/* Bytes that do not follow from anything, with their checksum. */
static const uint8_t *value_bytes(uint64_t *ret_checksum)
{
    static uint8_t bytes[BYTES];
    for (size_t i = 0; i < BYTES; i++) {
        bytes[i] = (uint8_t)(i * 11);
    }
    *ret_checksum = rk_hash_xxh3(bytes, BYTES);
    return bytes;
}

/* Sizes that make no sense, or do not fit. */
static const uint64_t strange_sizes[] = {
    0,         STORE_BYTES + 1,   (UINT64_C(1) << 30) + 1, UINT32_MAX, UINT64_C(1) << 32,
    INT64_MAX, UINT64_C(1) << 63, UINT64_MAX - 65535,      UINT64_MAX};
#define NUM_STRANGE_SIZES (sizeof(strange_sizes) / sizeof(strange_sizes[0]))

/* Of shard 1: more than there are, reversed, outside, more pages than can be. */
static const struct rk_extent strange_extents[] = {
    {0, 0, 0, UINT32_MAX}, {0, 0, 1, 0},   {0, 0, UINT32_MAX, 0}, {UINT32_MAX, 0, 0, 1},
    {0, UINT32_MAX, 0, 1}, {0, 0, 16, 17}, {0, 0, 0, 1u << 20},   {0, 0, 5, 5}};
#define NUM_STRANGE_EXTENTS (sizeof(strange_extents) / sizeof(strange_extents[0]))

/* ---- UCX ---- */

static void stranger_enter(struct stranger *stranger)
{
    static const struct ucx_hello hello = {UCX_MAGIC, UCX_VERSION};
    stranger_start(stranger, store.ucx);
    stranger_send(stranger, UCX_HELLO, &hello, sizeof(hello), NULL, 0);
}

static void ucx_request(struct stranger *stranger, unsigned id, uint32_t request_id,
                        uint32_t timeout_ms, const struct wire_buffer *body)
{
    const struct ucx_request header = {UCX_MAGIC, request_id, timeout_ms};
    assert_false(body->failed);
    stranger_send(stranger, id, &header, sizeof(header), body->data, body->bytes);
}

/* A put of one value. */
static void ucx_put(struct stranger *stranger, uint32_t request_id, uint32_t timeout_ms,
                    const char *key, uint64_t bytes)
{
    struct wire_buffer body = {.bytes = 0};
    uint8_t head[512];
    uint32_t head_bytes = (uint32_t)store_head_pack(key, bytes, head);
    wire_append_count(&body, 1);
    wire_append_count(&body, head_bytes);
    (void)wire_append(&body, head, head_bytes);
    ucx_request(stranger, UCX_PUT, request_id, timeout_ms, &body);
    rk_free(body.data);
}

struct ucx_bytes {
    uint64_t offset;
    size_t bytes;
    uint32_t sums;      /* sent */
    uint32_t sums_said; /* in the header */
    uint64_t wrong;     /* added to the checksum */
};

static void ucx_put_data(struct stranger *stranger, uint32_t request_id,
                         const struct ucx_bytes *what)
{
    static uint8_t zeros[70000];
    struct wire_buffer header = {.bytes = 0};
    const struct ucx_data data = {UCX_MAGIC, request_id, what->offset, what->sums_said};
    uint64_t sum = 0;
    const uint8_t *value = value_bytes(&sum);
    sum += what->wrong;
    (void)wire_append(&header, &data, sizeof(data));
    for (uint32_t i = 0; i < what->sums; i++) {
        (void)wire_append(&header, &sum, sizeof(sum));
    }
    stranger_send(stranger, UCX_PUT_DATA, header.data, header.bytes,
                  what->bytes <= BYTES ? value : zeros, what->bytes);
    rk_free(header.data);
}

/* Its one item was refused with this status. */
static void expect_refused(struct stranger *stranger, const char *status)
{
    struct wire_reader reader = {stranger->reply, 0};
    const uint8_t *line = NULL;
    uint32_t count = 0;
    uint32_t bytes = 0;
    assert_true(stranger_wait(stranger, 1, STORE_WAIT_MS));
    assert_false(stranger->cut);
    reader.left = stranger->reply_bytes;
    assert_true(wire_take(&reader, &count, sizeof(count)));
    assert_true(wire_take_block(&reader, &line, &bytes));
    if (bytes < strlen(status) || memcmp(line, status, strlen(status)) != 0) {
        fail_msg("\"%.*s\" instead of %s", (int)bytes, (const char *)line, status);
    }
    stranger_end(stranger);
}

static void ucx_puts_of_garbage(void **state)
{
    (void)state;
    static const struct {
        uint32_t count;  /* said */
        uint32_t blocks; /* sent */
        uint32_t length; /* of each, said; its bytes are 16 */
        bool cut;
    } kinds[] = {{1, 1, 16, false},    {256, 256, 16, false},     {0, 0, 0, true},
                 {257, 257, 16, true}, {UINT32_MAX, 1, 16, true}, {2, 1, 16, true},
                 {1, 2, 16, true},     {1, 1, 17, true},          {1, 1, UINT32_MAX, true},
                 {1, 1, 15, true},     {256, 0, 0, true}};
    uint64_t random = seed;
    for (size_t kind = 0; kind < sizeof(kinds) / sizeof(kinds[0]); kind++) {
        struct stranger stranger;
        struct wire_buffer body = {.bytes = 0};
        wire_append_count(&body, kinds[kind].count);
        for (uint32_t i = 0; i < kinds[kind].blocks; i++) {
            wire_append_count(&body, kinds[kind].length);
            for (int word = 0; word < 4; word++) {
                wire_append_count(&body, (uint32_t)random_below(&random, UINT32_MAX));
            }
        }
        stranger_enter(&stranger);
        ucx_request(&stranger, UCX_PUT, 1, STORE_WAIT_MS, &body);
        rk_free(body.data);
        if (kinds[kind].cut) {
            stranger_is_cut(&stranger);
        } else {
            expect_refused(&stranger, "INVALID");
        }
    }
    store_still_good(&store, RK_PATH_UCX);
}

static void ucx_puts_of_strange_sizes(void **state)
{
    (void)state;
    for (size_t i = 0; i < NUM_STRANGE_SIZES; i++) {
        const struct ucx_bytes some = {.bytes = BYTES};
        struct stranger stranger;
        stranger_enter(&stranger);
        ucx_put(&stranger, 1, 200, "strange", strange_sizes[i]);
        if (strange_sizes[i] == 0) {
            expect_refused(&stranger, "INVALID");
            continue;
        }
        /* Its bytes would be passed over. There is no answer before they came. */
        ucx_put_data(&stranger, 1, &some);
        assert_false(stranger_wait(&stranger, 1, 300));
        stranger_end(&stranger);
    }
    store_still_good(&store, RK_PATH_UCX);
}

static void ucx_bytes_that_lie(void **state)
{
    (void)state;
    static const struct ucx_bytes kinds[] = {
        {.bytes = BYTES + 1, .sums = 1, .sums_said = 1},          /* more than announced */
        {.bytes = BYTES, .offset = 1, .sums = 1, .sums_said = 1}, /* somewhere else */
        {.bytes = BYTES, .offset = UINT64_MAX, .sums = 1, .sums_said = 1},
        {.bytes = BYTES, .sums = 0, .sums_said = 0},     /* without its checksum */
        {.bytes = BYTES, .sums = 2, .sums_said = 2},     /* with one too many */
        {.bytes = 0, .sums = 1, .sums_said = 1},         /* a checksum of nothing */
        {.bytes = BYTES - 1, .sums = 1, .sums_said = 1}, /* of half a page */
        {.bytes = BYTES, .sums = 1, .sums_said = 2},     /* counts that disagree */
        {.bytes = BYTES, .sums = 1, .sums_said = UINT32_MAX},
        {.bytes = BYTES, .sums = 300, .sums_said = 300},
    };
    const struct ucx_bytes right = {.bytes = BYTES, .sums = 1, .sums_said = 1, .wrong = 0};
    const struct ucx_bytes corrupt = {.bytes = BYTES, .sums = 1, .sums_said = 1, .wrong = 1};
    struct stranger stranger;
    for (size_t kind = 0; kind < sizeof(kinds) / sizeof(kinds[0]); kind++) {
        stranger_enter(&stranger);
        ucx_put(&stranger, 1, STORE_WAIT_MS, "lie", BYTES);
        ucx_put_data(&stranger, 1, &kinds[kind]);
        stranger_is_cut(&stranger);
    }
    stranger_enter(&stranger); /* Checksums that do not match. */
    ucx_put(&stranger, 1, STORE_WAIT_MS, "lie", BYTES);
    ucx_put_data(&stranger, 1, &corrupt);
    expect_refused(&stranger, "CORRUPT");
    stranger_enter(&stranger); /* One put under the number of another that is under way. */
    ucx_put(&stranger, 1, STORE_WAIT_MS, "lie", BYTES);
    ucx_put(&stranger, 1, STORE_WAIT_MS, "lie again", BYTES);
    stranger_is_cut(&stranger);
    stranger_enter(&stranger); /* Bytes of no put are nothing to anybody. */
    ucx_put_data(&stranger, 7, &right);
    assert_false(stranger_wait(&stranger, 1, 100));
    stranger_end(&stranger);
    store_still_good(&store, RK_PATH_UCX);
}

static void ucx_put_is_abandoned(void **state)
{
    (void)state;
    struct stranger stranger;
    stranger_enter(&stranger);
    for (uint32_t i = 0; i < 8; i++) {
        char key[16];
        const struct ucx_bytes half = {.bytes = BYTES / 2};
        (void)snprintf(key, sizeof(key), "half %u", i);
        ucx_put(&stranger, 1 + i, 500, key, BYTES);
        ucx_put_data(&stranger, 1 + i, &half);
    }
    store_still_good(&store, RK_PATH_UCX); /* Though the connection is there. */
    assert_false(stranger_wait(&stranger, 1, 10));
    stranger_end(&stranger);
}

static void get_body(struct wire_buffer *body, uint32_t items_said, uint32_t extents_said,
                     const struct rk_extent *extents, size_t num_extents)
{
    struct kvstore_header header = shard_header(1, 1, STORE_SHARD_TOKENS);
    struct wire_get get = {.generation = 1, .page_bytes = 4096, .num_extents = extents_said};
    memcpy(get.id, header.segment_id.bytes, sizeof(get.id));
    memcpy(get.fingerprint, header.fingerprint.bytes, sizeof(get.fingerprint));
    body->bytes = 0;
    wire_append_count(body, items_said);
    (void)wire_append(body, &get, sizeof(get));
    (void)wire_append(body, extents, num_extents * sizeof(*extents));
}

static void ucx_floods(void **state)
{
    (void)state;
    struct stranger stranger;
    struct wire_buffer body = {.bytes = 0};
    const struct rk_extent all = {0, 0, 0, 16};
    stranger_enter(&stranger);
    for (uint32_t i = 0; i < FLOOD; i++) { /* Puts that never go on. */
        char key[32];
        (void)snprintf(key, sizeof(key), "flood/%u", i);
        ucx_put(&stranger, 1 + i, 60000, key, 65536);
    }
    assert_true(stranger_wait(&stranger, FLOOD - 64, STORE_WAIT_MS));
    assert_int_equal(stranger.replies, FLOOD - 64);
    expect_refused(&stranger, "FULL");
    growth_check("puts without end over ucx");
    store_still_good(&store, RK_PATH_UCX);

    stranger_enter(&stranger);
    get_body(&body, 1, 1, &all, 1);
    for (uint32_t i = 0; i < FLOOD; i++) {
        ucx_request(&stranger, UCX_GET, 1 + i, 60000, &body);
    }
    assert_true(stranger_wait(&stranger, FLOOD, STORE_WAIT_MS));
    stranger_end(&stranger);
    rk_free(body.data);
    growth_check("gets without end over ucx");
    store_still_good(&store, RK_PATH_UCX);
}

static void ucx_gets_that_lie(void **state)
{
    (void)state;
    static struct rk_extent many[EXTENTS + 1];
    struct stranger stranger;
    struct wire_buffer body = {.bytes = 0};
    const struct {
        uint32_t items_said;
        uint32_t extents_said;
        size_t extents;
    } lies[] = {{256, 1, 1},
                {UINT32_MAX, 1, 1},
                {0, 1, 1},
                {1, 2, 1},
                {1, UINT32_MAX, 1},
                {1, 1, 2},
                {1, EXTENTS + 1, EXTENTS + 1},
                {1, EXTENTS, EXTENTS - 1},
                {1, 0, 1}};
    for (size_t i = 0; i <= EXTENTS; i++) {
        many[i] = (struct rk_extent){i % 2, 0, i % 16, i % 16 + 1};
    }
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        stranger_enter(&stranger);
        get_body(&body, lies[i].items_said, lies[i].extents_said, many, lies[i].extents);
        ucx_request(&stranger, UCX_GET, 1, STORE_WAIT_MS, &body);
        stranger_is_cut(&stranger);
    }
    for (size_t i = 0; i < NUM_STRANGE_EXTENTS; i++) { /* Cut off, or refused. */
        stranger_enter(&stranger);
        get_body(&body, 1, 1, &strange_extents[i], 1);
        ucx_request(&stranger, UCX_GET, 1, STORE_WAIT_MS, &body);
        assert_true(stranger_wait(&stranger, 1, STORE_WAIT_MS));
        stranger_end(&stranger);
    }
    stranger_enter(&stranger); /* As many as can be: 256 MiB, of which it takes what it wants. */
    get_body(&body, 1, EXTENTS, many, EXTENTS);
    ucx_request(&stranger, UCX_GET, 1, STORE_WAIT_MS, &body);
    assert_true(stranger_wait(&stranger, 1, STORE_WAIT_MS));
    assert_false(stranger.cut);
    stranger_end(&stranger);
    rk_free(body.data);
    growth_check("gets of 65536 extents over ucx");
    store_still_good(&store, RK_PATH_UCX);
}

/* Some bytes become others; at times it is cut or grows. Returns its length. */
static size_t mutate(uint64_t *random, uint8_t *data, size_t bytes, size_t room)
{
    for (uint64_t i = random_below(random, 6); i > 0 && bytes > 0; i--) {
        data[random_below(random, bytes)] = (uint8_t)random_below(random, 256);
    }
    if (random_below(random, 6) == 0) {
        size_t other = (size_t)random_below(random, room + 1);
        for (size_t at = bytes; at < other; at++) {
            data[at] = (uint8_t)random_below(random, 256);
        }
        return other;
    }
    return bytes;
}

/* A good head of a value in a put's body, or a get of shard 1. */
static size_t mutation_body(uint64_t *random, bool put, uint8_t *ret_body, size_t room)
{
    struct wire_buffer body = {.bytes = 0};
    const struct rk_extent extents[] = {{0, 0, 0, 16}, {1, 1, 3, 5}};
    if (put) {
        uint8_t head[512];
        uint32_t head_bytes = (uint32_t)store_head_pack("mutant", BYTES, head);
        wire_append_count(&body, 1);
        wire_append_count(&body, head_bytes);
        (void)wire_append(&body, head, head_bytes);
    } else {
        get_body(&body, 1, 2, extents, 2);
    }
    assert_true(body.bytes <= room);
    memcpy(ret_body, body.data, body.bytes);
    size_t bytes = mutate(random, ret_body, body.bytes, room);
    rk_free(body.data);
    return bytes;
}

static void ucx_mutants(void **state)
{
    (void)state;
    uint64_t random = seed;
    uint32_t cuts = 0;
    struct stranger stranger;
    stranger_enter(&stranger);
    for (uint32_t i = 0; i < MUTATIONS; i++) {
        uint8_t header[64];
        uint8_t body[700];
        bool put = random_below(&random, 2) == 0;
        const struct ucx_request request = {UCX_MAGIC, 1 + i, 2000};
        memcpy(header, &request, sizeof(request));
        size_t header_bytes = random_below(&random, 3) == 0
                                  ? mutate(&random, header, sizeof(request), sizeof(header))
                                  : sizeof(request);
        size_t bytes = mutation_body(&random, put, body, sizeof(body));
        stranger_send(&stranger, put ? UCX_PUT : UCX_GET, header, header_bytes, body, bytes);
        if (put) { /* Never the right bytes: no mutant is stored. */
            const struct ucx_bytes wrong = {.bytes = random_below(&random, BYTES + 1),
                                            .sums = (uint32_t)random_below(&random, 3),
                                            .sums_said = (uint32_t)random_below(&random, 3),
                                            .wrong = 1 + random_below(&random, 1000)};
            ucx_put_data(&stranger, 1 + i, &wrong);
        }
        (void)stranger_wait(&stranger, UINT32_MAX, i % 8 == 0);
        if (stranger.cut) {
            cuts++;
            stranger_end(&stranger);
            stranger_enter(&stranger);
        }
    }
    print_message("%d mutants over ucx: cut off %u times\n", MUTATIONS, cuts);
    stranger_end(&stranger);
    growth_check("mutants over ucx");
    store_still_good(&store, RK_PATH_UCX);
}

/* ---- gRPC ---- */

static void message_free(void *context)
{
    rk_free(context);
}

/* A copy, for it must stay until gRPC has let go of it. */
static enum rk_status raw_send(struct rk_rpc_stream *stream, const void *data, size_t bytes)
{
    uint8_t *copy = rk_alloc(bytes + 1);
    assert_non_null(copy);
    memcpy(copy, data, bytes);
    const struct rk_rpc_part part = {copy, bytes};
    return rk_rpc_stream_send_parts(stream, &part, 1, message_free, copy);
}

static struct rk_rpc_stream *stream_open(const char *method, int timeout_ms)
{
    struct rk_rpc_stream *stream = NULL;
    char path[64];
    (void)snprintf(path, sizeof(path), "/redknot.v1.KvStore/%s", method);
    assert_int_equal(rk_rpc_stream_open(store.channel, path, timeout_ms, &stream, NULL), RK_OK);
    return stream;
}

static void piece_ignore(void *context, const void *data, size_t bytes)
{
    (void)data;
    *(uint64_t *)context += bytes;
}

/* The call's end: its status; the bytes that it brought. */
static enum rk_status stream_end(struct rk_rpc_stream *stream, uint64_t *ret_bytes)
{
    *ret_bytes = 0;
    while (rk_rpc_stream_recv_pieces(stream, piece_ignore, ret_bytes) == RK_OK) {
    }
    enum rk_status status = rk_rpc_stream_finish(stream, NULL);
    rk_rpc_stream_destroy(stream);
    return status;
}

/* PutRequest{items} of one value. */
static void grpc_items(struct wire_buffer *message, const char *key, uint64_t bytes)
{
    uint8_t head[512];
    const struct rk_put put = {.head = head, .head_bytes = store_head_pack(key, bytes, head)};
    message->bytes = 0;
    grpc_items_append(message, &put, 1);
    assert_false(message->failed);
}

/* PutRequest{chunk} of the value's first bytes. */
static void grpc_chunk(struct wire_buffer *message, size_t bytes, size_t num_sums, uint64_t wrong)
{
    static const uint8_t zeros[70000];
    uint8_t header[GRPC_CHUNK_HEADER_BYTES];
    uint64_t sums[8];
    uint64_t sum = 0;
    const uint8_t *value = value_bytes(&sum);
    for (size_t i = 0; i < 8; i++) {
        sums[i] = sum + wrong;
    }
    message->bytes = 0;
    (void)wire_append(message, header, grpc_chunk_header(sums, num_sums, bytes, header));
    (void)wire_append(message, bytes <= BYTES ? value : zeros, bytes);
    assert_false(message->failed);
}

static enum rk_status grpc_put(const struct wire_buffer *messages, size_t num_messages,
                               int timeout_ms)
{
    struct rk_rpc_stream *stream = stream_open("Put", timeout_ms);
    uint64_t bytes = 0;
    enum rk_status status = RK_OK;
    for (size_t i = 0; status == RK_OK && i < num_messages; i++) {
        status = raw_send(stream, messages[i].data, messages[i].bytes);
    }
    if (status == RK_OK) {
        (void)!rk_rpc_stream_send_done(stream);
    }
    return stream_end(stream, &bytes);
}

static void grpc_puts_of_garbage(void **state)
{
    (void)state;
    uint64_t random = seed;
    struct wire_buffer message = {.bytes = 0};
    assert_int_equal(grpc_put(NULL, 0, STORE_WAIT_MS), RK_ERR_INVALID);
    for (int i = 0; i < 200; i++) {
        uint8_t garbage[300];
        size_t bytes = (size_t)random_below(&random, sizeof(garbage));
        for (size_t at = 0; at < bytes; at++) {
            garbage[at] = (uint8_t)random_below(&random, 256);
        }
        const struct wire_buffer raw = {.data = garbage, .bytes = bytes};
        assert_int_equal(grpc_put(&raw, 1, STORE_WAIT_MS), RK_ERR_INVALID);
    }
    grpc_chunk(&message, BYTES, 1, 0); /* Data without a put. */
    assert_int_equal(grpc_put(&message, 1, STORE_WAIT_MS), RK_ERR_INVALID);
    static struct rk_put puts[257];
    uint8_t head[512];
    size_t head_bytes = store_head_pack("one of too many", BYTES, head);
    for (size_t i = 0; i < 257; i++) {
        puts[i] = (struct rk_put){.head = head, .head_bytes = head_bytes};
    }
    for (size_t count = 0; count <= 257; count += 257) {
        message.bytes = 0;
        grpc_items_append(&message, puts, count);
        assert_int_equal(grpc_put(&message, 1, STORE_WAIT_MS), RK_ERR_INVALID);
    }
    rk_free(message.data);
    store_still_good(&store, RK_PATH_GRPC);
}

static void grpc_puts_that_lie(void **state)
{
    (void)state;
    static const struct {
        uint64_t announced;
        size_t bytes;
        size_t sums;
    } kinds[] = {{BYTES, BYTES - 1, 0}, {BYTES, BYTES + 1, 1}, {BYTES, BYTES, 0}, {BYTES, BYTES, 2},
                 {BYTES, 0, 1},         {BYTES, BYTES - 1, 1}, {0, BYTES, 1}};
    struct wire_buffer messages[2] = {{.bytes = 0}, {.bytes = 0}};
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        grpc_items(&messages[0], "lie", kinds[i].announced);
        grpc_chunk(&messages[1], kinds[i].bytes, kinds[i].sums, 0);
        assert_int_equal(grpc_put(messages, 2, STORE_WAIT_MS), RK_ERR_INVALID);
    }
    for (size_t i = 0; i < NUM_STRANGE_SIZES; i++) {
        grpc_items(&messages[0], "strange", strange_sizes[i]);
        grpc_chunk(&messages[1], BYTES, 0, 0);
        assert_int_equal(grpc_put(messages, 2, STORE_WAIT_MS), RK_ERR_INVALID);
    }
    /* Checksums that do not match are that item's alone: the call is good. */
    grpc_items(&messages[0], "lie", BYTES);
    grpc_chunk(&messages[1], BYTES, 1, 1);
    assert_int_equal(grpc_put(messages, 2, STORE_WAIT_MS), RK_OK);
    rk_free(messages[0].data);
    rk_free(messages[1].data);
    store_still_good(&store, RK_PATH_GRPC);
}

static void grpc_put_is_abandoned(void **state)
{
    (void)state;
    struct wire_buffer message = {.bytes = 0};
    struct rk_rpc_stream *stream = stream_open("Put", 500);
    uint64_t bytes = 0;
    grpc_items(&message, "half", BYTES);
    assert_int_equal(raw_send(stream, message.data, message.bytes), RK_OK);
    grpc_chunk(&message, BYTES / 2, 0, 0);
    assert_int_equal(raw_send(stream, message.data, message.bytes), RK_OK);
    rk_free(message.data);
    store_still_good(&store, RK_PATH_GRPC); /* Its room comes back though the stream is open. */
    assert_int_equal(stream_end(stream, &bytes), RK_ERR_DEADLINE);
}

static enum rk_status grpc_call(const char *method, const struct wire_buffer *message,
                                int timeout_ms)
{
    struct rk_rpc_stream *stream = stream_open(method, timeout_ms);
    uint64_t bytes = 0;
    (void)!raw_send(stream, message->data, message->bytes);
    return stream_end(stream, &bytes);
}

/* 64 calls are open; all others are refused at once, until the open ones end: gRPC may choose to
 * take all bytes of a get that nobody reads, into this process. */
static void grpc_flood(const char *method, const struct wire_buffer *message)
{
    struct rk_rpc_stream *open[64];
    uint32_t ends[RK_STATUS_COUNT] = {0};
    int64_t deadline_ns = rk_deadline_in_ms(STORE_WAIT_MS);
    for (size_t i = 0; i < 64; i++) {
        open[i] = stream_open(method, 60000);
        assert_int_equal(raw_send(open[i], message->data, message->bytes), RK_OK);
    }
    while (grpc_call(method, message, 300) != RK_ERR_FULL) { /* All have arrived. */
        assert_true(rk_deadline_left_ms(deadline_ns) > 0);
    }
    for (int i = 0; i < FLOOD && ends[RK_OK] == 0; i++) {
        enum rk_status status = grpc_call(method, message, STORE_WAIT_MS);
        ends[status]++;
        if (status != RK_ERR_FULL && status != RK_OK) {
            fail_msg("a call of a flood ended with %s", rk_status_name(status));
        }
    }
    print_message("%s: %u calls of a flood refused\n", method, ends[RK_ERR_FULL]);
    assert_true(ends[RK_ERR_FULL] == FLOOD || strcmp(method, "Get") == 0);
    for (size_t i = 0; i < 64; i++) {
        rk_rpc_stream_destroy(open[i]);
    }
}

/* GetRequest of the same item so many times. */
static void grpc_get_pack(struct wire_buffer *message, const struct rk_extent *extents,
                          size_t num_extents, size_t num_items)
{
    struct kvstore_header header = shard_header(1, 1, STORE_SHARD_TOKENS);
    Redknot__V1__GetRequest request = REDKNOT__V1__GET_REQUEST__INIT;
    Redknot__V1__GetItem item = REDKNOT__V1__GET_ITEM__INIT;
    Redknot__V1__GetItem **items = rk_alloc_zero(num_items, sizeof(Redknot__V1__GetItem *));
    Redknot__V1__Extent *list = rk_alloc_zero(num_extents, sizeof(*list));
    Redknot__V1__Extent **pointers = rk_alloc_zero(num_extents, sizeof(Redknot__V1__Extent *));
    assert_true(items && list && pointers);
    for (size_t i = 0; i < num_extents; i++) {
        redknot__v1__extent__init(&list[i]);
        list[i].layer = extents[i].layer;
        list[i].kv_head = extents[i].kv_head;
        list[i].page_begin = extents[i].page_begin;
        list[i].page_end = extents[i].page_end;
        pointers[i] = &list[i];
    }
    item.id = (ProtobufCBinaryData){RK_ID_BYTES, header.segment_id.bytes};
    item.fingerprint = (ProtobufCBinaryData){RK_ID_BYTES, header.fingerprint.bytes};
    item.generation = 1;
    item.page_bytes = 4096;
    item.n_extents = num_extents;
    item.extents = pointers;
    for (size_t i = 0; i < num_items; i++) {
        items[i] = &item;
    }
    request.n_items = num_items;
    request.items = items;
    message->bytes = 0;
    uint8_t *place =
        wire_append(message, NULL, redknot__v1__get_request__get_packed_size(&request));
    assert_non_null(place);
    redknot__v1__get_request__pack(&request, place);
    rk_free(items);
    rk_free(list);
    rk_free(pointers);
}

static void grpc_floods(void **state)
{
    (void)state;
    static struct rk_extent many[4096];
    struct wire_buffer message = {.bytes = 0};
    grpc_items(&message, "flood", 65536);
    grpc_flood("Put", &message);
    growth_check("puts without end over grpc");
    store_still_good(&store, RK_PATH_GRPC);
    for (size_t i = 0; i < 4096; i++) { /* 16 MiB, which nobody reads. */
        many[i] = (struct rk_extent){0, 0, 0, 1};
    }
    grpc_get_pack(&message, many, 4096, 1);
    grpc_flood("Get", &message);
    growth_check("gets without end over grpc");
    rk_free(message.data);
    store_still_good(&store, RK_PATH_GRPC);
}

/* The bytes that a get brings, its answer included. */
static uint64_t grpc_get(const struct wire_buffer *message, enum rk_status *ret_status)
{
    struct rk_rpc_stream *stream = stream_open("Get", STORE_WAIT_MS);
    uint64_t bytes = 0;
    if (raw_send(stream, message->data, message->bytes) == RK_OK) {
        (void)!rk_rpc_stream_send_done(stream);
    }
    *ret_status = stream_end(stream, &bytes);
    return bytes;
}

static void grpc_gets_that_lie(void **state)
{
    (void)state;
    static struct rk_extent many[EXTENTS + 1];
    struct wire_buffer message = {.bytes = 0};
    enum rk_status status = RK_OK;
    for (size_t i = 0; i <= EXTENTS; i++) {
        many[i] = (struct rk_extent){i % 2, 0, i % 16, i % 16 + 1};
    }
    for (size_t i = 0; i < NUM_STRANGE_EXTENTS; i++) { /* Refused: no bytes but the reason. */
        grpc_get_pack(&message, &strange_extents[i], 1, 1);
        assert_true(grpc_get(&message, &status) < 512);
        assert_int_equal(status, RK_OK);
    }
    grpc_get_pack(&message, many, EXTENTS + 1, 1);
    assert_true(grpc_get(&message, &status) < 512);
    grpc_get_pack(&message, many, 1, 257);
    assert_true(grpc_get(&message, &status) == 0);
    assert_int_equal(status, RK_ERR_INVALID);
    grpc_get_pack(&message, many, 1, 0);
    assert_true(grpc_get(&message, &status) == 0);
    assert_int_equal(status, RK_ERR_INVALID);
    grpc_get_pack(&message, many, EXTENTS, 1);
    assert_true(grpc_get(&message, &status) > (uint64_t)EXTENTS * 4096);
    assert_int_equal(status, RK_OK);
    rk_free(message.data);
    growth_check("gets of 65536 extents over grpc");
    store_still_good(&store, RK_PATH_GRPC);
}

/* One call that asks for as much as it can in many items; what it is told is its own affair. */
static void grpc_get_of_many_items(void **state)
{
    (void)state;
    enum { ITEMS = 64 };
    static struct rk_extent many[EXTENTS];
    struct wire_buffer message = {.bytes = 0};
    enum rk_status status = RK_OK;
    for (size_t i = 0; i < EXTENTS; i++) {
        many[i] = (struct rk_extent){0, 0, 0, 16};
    }
    grpc_get_pack(&message, many, EXTENTS, ITEMS);
    uint64_t bytes = grpc_get(&message, &status);
    print_message("one get of %d items with %u pages each: %llu KiB asked, %llu KiB came, %s\n",
                  ITEMS, EXTENTS * 16, (unsigned long long)message.bytes / 1024,
                  (unsigned long long)bytes / 1024, rk_status_name(status));
    rk_free(message.data);
    growth_check("a get of many items over grpc");
    store_still_good(&store, RK_PATH_GRPC);
}

static void grpc_mutants(void **state)
{
    (void)state;
    uint64_t random = seed;
    uint64_t ends[RK_STATUS_COUNT] = {0};
    const struct rk_extent extents[] = {{0, 0, 0, 16}, {1, 1, 3, 5}};
    struct wire_buffer messages[2] = {{.bytes = 0}, {.bytes = 0}};
    struct wire_buffer get = {.bytes = 0};
    for (int i = 0; i < MUTATIONS; i++) {
        enum rk_status status = RK_OK;
        (void)wire_append(&get, NULL, 8192); /* Room to grow into. */
        (void)wire_append(&messages[1], NULL, 8192);
        if (random_below(&random, 2) == 0) {
            grpc_get_pack(&get, extents, 2, 1);
            get.bytes = mutate(&random, get.data, get.bytes, 300);
            (void)grpc_get(&get, &status);
        } else {
            (void)wire_append(&messages[0], NULL, 8192);
            grpc_items(&messages[0], "mutant", BYTES);
            messages[0].bytes = mutate(&random, messages[0].data, messages[0].bytes, 100);
            grpc_chunk(&messages[1], (size_t)random_below(&random, BYTES + 1),
                       (size_t)random_below(&random, 3), 1 + random_below(&random, 1000));
            if (random_below(&random, 3) == 0) {
                messages[1].bytes = mutate(&random, messages[1].data, messages[1].bytes, 6000);
            }
            status = grpc_put(messages, 2, 2000);
        }
        ends[status]++;
    }
    print_message("%d mutants over grpc: %llu INVALID, %llu OK\n", MUTATIONS,
                  (unsigned long long)ends[RK_ERR_INVALID], (unsigned long long)ends[RK_OK]);
    assert_int_equal(ends[RK_ERR_INVALID] + ends[RK_OK], MUTATIONS);
    rk_free(get.data);
    rk_free(messages[0].data);
    rk_free(messages[1].data);
    growth_check("mutants over grpc");
    store_still_good(&store, RK_PATH_GRPC);
}

static void grpc_connections_come_and_go(void **state)
{
    (void)state;
    int before = store_descriptors(&store);
    for (int i = 0; i < CONNECTS; i++) {
        Redknot__V1__StoreStatusRequest request = REDKNOT__V1__STORE_STATUS_REQUEST__INIT;
        struct rk_rpc_channel *channel = NULL;
        struct ProtobufCMessage *reply = NULL;
        assert_int_equal(rk_rpc_channel_create(store.address, &channel, NULL), RK_OK);
        assert_int_equal(rk_rpc_unary(channel, "/redknot.v1.KvStore/StoreStatus", &request.base,
                                      &redknot__v1__store_status_reply__descriptor, STORE_WAIT_MS,
                                      &reply, NULL),
                         RK_OK);
        rk_rpc_message_free(reply);
        rk_rpc_channel_destroy(channel);
    }
    int64_t deadline_ns = rk_deadline_in_ms(STORE_WAIT_MS);
    while (store_descriptors(&store) > before && rk_deadline_left_ms(deadline_ns) > 0) {
        rk_clock_sleep_ms(20);
    }
    assert_int_equal(store_descriptors(&store), before);
    growth_check("connections over grpc");
    store_still_good(&store, RK_PATH_GRPC);
}

/* ---- Both ---- */

/* Peers in the middle of puts and gets do not keep it from ending; tear_down sees to the rest. */
static void it_ends_with_strangers_at_work(void **state)
{
    static struct stranger stranger;
    struct wire_buffer message = {.bytes = 0};
    (void)state;
    stranger_enter(&stranger);
    ucx_put(&stranger, 1, 60000, "open", BYTES);
    struct rk_rpc_stream *stream = stream_open("Put", 60000);
    grpc_items(&message, "open too", BYTES);
    assert_int_equal(raw_send(stream, message.data, message.bytes), RK_OK);
    rk_free(message.data);
    rk_clock_sleep_ms(100);
    assert_int_equal(kill(store.pid, SIGTERM), 0);
    store.told = true;
    stranger_is_cut(&stranger);
    uint64_t bytes = 0;
    assert_int_not_equal(stream_end(stream, &bytes), RK_OK);
}

int main(int argc, char **argv)
{
    const char *given = getenv("REDKNOT_TEST_SEED");
    seed = given ? strtoull(given, NULL, 10) : (uint64_t)rk_clock_ns();
    print_message("seed %llu (REDKNOT_TEST_SEED)\n", (unsigned long long)seed);
    rk_log_init("test", RK_LOG_LEVEL_ERROR);
#define SERVED(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        SERVED(ucx_puts_of_garbage),
        SERVED(ucx_puts_of_strange_sizes),
        SERVED(ucx_bytes_that_lie),
        SERVED(ucx_put_is_abandoned),
        SERVED(ucx_floods),
        SERVED(ucx_gets_that_lie),
        SERVED(ucx_mutants),
        SERVED(grpc_puts_of_garbage),
        SERVED(grpc_puts_that_lie),
        SERVED(grpc_put_is_abandoned),
        SERVED(grpc_floods),
        SERVED(grpc_gets_that_lie),
        SERVED(grpc_get_of_many_items),
        SERVED(grpc_mutants),
        SERVED(grpc_connections_come_and_go),
        SERVED(it_ends_with_strangers_at_work),
    };
    if (argc > 1) {
        cmocka_set_test_filter(argv[1]);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
