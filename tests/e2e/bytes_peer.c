/*
 * One process of test_wrong_bytes.c, which kills and stops it:
 *   bytes_peer BOARD_FD INDEX WRITERS COORDINATOR PATH ROLE SEED
 *
 *   read      gets and views of values; views are held for a while and compared again
 *   write     drops a value and puts its next version
 *   segments  puts, gets and holds shards
 *   hoard     more views at once than a connection may pin
 *   fork      children that use what they inherited
 *
 * Ends with 0 when the board says so; what was wrong is on the board.
 */
#include "client/kv_client.h"
#include "client/values.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/hash.h"
#include "common/base/log.h"
#include "tests/e2e/bytes_board.h"
#include "tests/e2e/value_bytes.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define TIMEOUT_MS  3000
#define VALUE_MAX   (256u << 10)
#define BATCH       4
#define HELD_MAX    8
#define HOARD       4300 /* above the 4,096 pins of a connection */
#define HOARD_BYTES 4096
#define HOARD_BATCH 100
#define SEGMENTS    64
#define SEGMENT_TAG (UINT64_C(1) << 48)
#define HOARD_TAG   (UINT64_C(2) << 48)
#define PAGES_MAX   64
#define SCRUB_MS    2000 /* the store's scrubber has looked at everything by then */

static struct board *board;
static struct board_peer *self;
static struct rk_values *values;
static struct rk_kv_client *kv;
static uint64_t random_state;
static const char *path;
static uint8_t buffer[VALUE_MAX];

static uint64_t below(uint64_t limit)
{
    return value_random(&random_state, limit);
}

/* ---- What must be ---- */

__attribute__((format(printf, 1, 2))) static void wrong(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (self->wrong[0] == '\0') {
        (void)vsnprintf(self->wrong, sizeof(self->wrong), format, arguments);
    }
    va_end(arguments);
}

static void note(const char *what, enum rk_status status, const struct rk_error *error)
{
    bool reason = status == RK_OK || rk_status_is_miss(status) || status == RK_ERR_FULL ||
                  status == RK_ERR_UNAVAILABLE || status == RK_ERR_DEADLINE ||
                  status == RK_ERR_BUSY;
    atomic_fetch_add(&self->statuses[status], 1);
    if (!reason) {
        wrong("%s over %s: %s: %.400s", what, path, rk_status_name(status), error->text);
    }
}

static uint64_t name_of(uint64_t key, uint64_t version)
{
    return key << 32 | version;
}

static uint64_t bytes_of(uint64_t key, uint64_t version)
{
    uint64_t limit = UINT64_C(64) << value_word(name_of(key, version), 1) % 12;
    return 16 + value_word(name_of(key, version), 2) % limit;
}

/* Its first words say which value it is; the rest follows from them. */
static uint64_t value_make(uint64_t key, uint64_t version)
{
    uint64_t bytes = bytes_of(key, version);
    value_fill(name_of(key, version), buffer, bytes);
    memcpy(buffer, &key, sizeof(key));
    memcpy(buffer + sizeof(key), &version, sizeof(version));
    return bytes;
}

/* "": it is a version of this key, not older than `floor`. */
static void value_judge(uint64_t key, uint64_t floor, const uint8_t *data, uint64_t bytes,
                        char ret_why[200])
{
    uint64_t said[2] = {0};
    ret_why[0] = '\0';
    if (bytes < sizeof(said)) {
        (void)snprintf(ret_why, 200, "%llu bytes", (unsigned long long)bytes);
        return;
    }
    memcpy(said, data, sizeof(said));
    if (said[0] != key) {
        (void)snprintf(ret_why, 200, "the bytes of key %llu", (unsigned long long)said[0]);
    } else if (said[1] < floor) {
        (void)snprintf(ret_why, 200, "version %llu, although %llu was put before",
                       (unsigned long long)said[1], (unsigned long long)floor);
    } else if (bytes != bytes_of(key, said[1]) ||
               value_compare_at(name_of(key, said[1]), sizeof(said), data + sizeof(said),
                                bytes - sizeof(said)) != bytes - sizeof(said)) {
        (void)snprintf(ret_why, 200, "other bytes than those of version %llu",
                       (unsigned long long)said[1]);
    }
}

static void value_check(const char *what, uint64_t key, const char *why, uint64_t bytes)
{
    atomic_fetch_add(&self->bytes, bytes);
    if (why[0] != '\0') {
        wrong("%s of key %llu over %s: %s", what, (unsigned long long)key, path, why);
    }
}

/* ---- Values ---- */

struct text {
    char data[32];
    struct rk_value_key key;
};

static void text_set(struct text *text, const char *kind, uint64_t number)
{
    int length =
        snprintf(text->data, sizeof(text->data), "%s/%llu", kind, (unsigned long long)number);
    text->key = (struct rk_value_key){text->data, (size_t)length};
}

static void value_get(void)
{
    struct text text;
    struct rk_error error = {.text = ""};
    uint64_t key = below(BOARD_KEYS);
    uint64_t floor = atomic_load(&board->keys[key].floor);
    text_set(&text, "bytes", key);
    struct rk_value_get get = {.key = text.key, .buffer = buffer, .buffer_bytes = sizeof(buffer)};
    enum rk_status status = rk_values_get(values, &get, 1, TIMEOUT_MS, &error);
    status = status == RK_OK ? get.status : status;
    note("get", status, &error);
    if (status == RK_OK) {
        char why[200];
        value_judge(key, floor, buffer, get.bytes, why);
        value_check("get", key, why, get.bytes);
    }
}

/* Views that are out, with what was seen in them at first. */
static struct held {
    struct rk_value_views views;
    uint8_t *first[BATCH]; /* [VALUE_MAX] */
    int64_t until_ns;
} held[HELD_MAX];

static uint64_t view_copy(const struct rk_value_view *view, uint8_t *to)
{
    uint64_t done = 0;
    for (size_t part = 0; part < view->num_parts && done + view->parts[part].bytes <= VALUE_MAX;
         part++) {
        memcpy(to + done, view->parts[part].data, view->parts[part].bytes);
        done += view->parts[part].bytes;
    }
    return done;
}

/* A byte that was flipped after the library had verified it: the scrubber finds that soon. */
static bool flipped_just_now(const struct rk_value_views *views)
{
    rk_clock_sleep_ms(SCRUB_MS);
    return rk_values_view_check(values, views) != RK_OK;
}

static void held_read(struct held *slot, size_t item, uint64_t key, uint64_t floor)
{
    char why[200];
    uint64_t bytes = view_copy(&slot->views.views[item], slot->first[item]);
    value_judge(key, floor, slot->first[item], bytes, why);
    if (rk_values_view_check(values, &slot->views) != RK_OK) {
        atomic_fetch_add(&self->lost, 1);
    } else if (why[0] == '\0' || !flipped_just_now(&slot->views)) {
        value_check("view", key, why, bytes);
    }
}

static void held_take(struct held *slot)
{
    struct text texts[BATCH];
    struct rk_value_key keys[BATCH];
    uint64_t numbers[BATCH];
    uint64_t floors[BATCH];
    struct rk_error error = {.text = ""};
    for (size_t i = 0; i < BATCH; i++) {
        numbers[i] = below(BOARD_KEYS);
        floors[i] = atomic_load(&board->keys[numbers[i]].floor);
        text_set(&texts[i], "bytes", numbers[i]);
        keys[i] = texts[i].key;
    }
    enum rk_status status = rk_values_view(values, keys, BATCH, TIMEOUT_MS, &slot->views, &error);
    if (status != RK_OK) {
        slot->views = (struct rk_value_views){.views = NULL};
        note("view", status, &error);
        return;
    }
    for (size_t i = 0; i < BATCH; i++) {
        note("view", slot->views.views[i].status, &error);
        if (slot->views.views[i].status == RK_OK) {
            held_read(slot, i, numbers[i], floors[i]);
        }
    }
    slot->until_ns = rk_deadline_in_ms((int64_t)below(1500));
}

/* What is held was verified once: it is the same now, or the guard says that it is lost. */
static void held_give(struct held *slot)
{
    uint64_t different[BATCH] = {0};
    for (size_t i = 0; i < slot->views.num_views; i++) {
        if (slot->views.views[i].status == RK_OK) {
            uint64_t bytes = view_copy(&slot->views.views[i], buffer);
            for (uint64_t at = 0; at < bytes; at++) {
                different[i] += buffer[at] != slot->first[i][at];
            }
        }
    }
    bool lost = rk_values_view_check(values, &slot->views) != RK_OK;
    atomic_fetch_add(&self->lost, lost);
    for (size_t i = 0; i < slot->views.num_views && !lost; i++) {
        atomic_fetch_add(&self->flipped, different[i] == 1);
        if (different[i] > 1) {
            wrong("a held view over %s changed in %llu bytes, and the guard says it is sound", path,
                  (unsigned long long)different[i]);
        }
    }
    rk_values_release(values, &slot->views);
    slot->views = (struct rk_value_views){.views = NULL};
}

static void read_turn(void)
{
    struct held *slot = &held[below(HELD_MAX)];
    if (slot->views.views && rk_clock_ns() > slot->until_ns) {
        held_give(slot);
    } else if (!slot->views.views && below(2) == 0) {
        held_take(slot);
    } else {
        value_get();
    }
}

static void write_turn(uint64_t index, uint64_t num_writers)
{
    struct text text;
    struct rk_error error = {.text = ""};
    uint64_t key = below(BOARD_KEYS / num_writers) * num_writers + index % num_writers;
    uint64_t version = atomic_fetch_add(&board->keys[key].next, 1) + 1;
    bool dropped = false;
    text_set(&text, "bytes", key);
    enum rk_status status = rk_values_drop(values, &text.key, 1, TIMEOUT_MS, &dropped, &error);
    note("drop", status, &error);
    if (status != RK_OK) {
        return;
    }
    uint64_t bytes = value_make(key, version);
    struct rk_value_put put = {.key = text.key, .data = buffer, .bytes = bytes};
    error.text[0] = '\0';
    status = rk_values_put(values, &put, 1, TIMEOUT_MS, &error);
    status = status == RK_OK ? put.status : status;
    note("put", status, &error);
    if (status == RK_OK && !put.existed) {
        atomic_store(&board->keys[key].floor, version);
    }
}

/* ---- Segments ---- */

static const struct rk_kv_layout layout = {
    .num_layers = 2, .num_kv_heads = 2, .head_dim = 32, .dtype = RK_DTYPE_BF16};

static struct rk_id fingerprint_of_test(void)
{
    return rk_id_sha256("test_wrong_bytes", 16);
}

static struct rk_id segment_id(uint64_t number)
{
    uint64_t name = SEGMENT_TAG | number;
    return rk_id_sha256(&name, sizeof(name));
}

static uint32_t segment_tokens(uint64_t number)
{
    return 1 + (uint32_t)(value_word(SEGMENT_TAG | number, 0) % (RK_PAGE_TOKENS * PAGES_MAX / 4));
}

static uint64_t page_name(uint64_t number, uint64_t page)
{
    return SEGMENT_TAG | number << 16 | page;
}

static void segment_put(uint64_t number)
{
    static uint8_t pages[PAGES_MAX][RK_PAGE_TOKENS * 32 * 2 * 2];
    const void *pointers[PAGES_MAX];
    uint64_t checksums[PAGES_MAX];
    struct rk_error error = {.text = ""};
    uint64_t count = rk_kv_pages_total(&layout, segment_tokens(number));
    for (uint64_t i = 0; i < count; i++) {
        value_fill(page_name(number, i), pages[i], sizeof(pages[i]));
        pointers[i] = pages[i];
        checksums[i] = rk_hash_xxh3(pages[i], sizeof(pages[i]));
    }
    struct rk_kv_put put = {.segment_id = segment_id(number),
                            .fingerprint = fingerprint_of_test(),
                            .layout = layout,
                            .num_tokens = segment_tokens(number),
                            .pages = pointers,
                            .checksums = checksums};
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(TIMEOUT_MS)};
    note("put of a segment", rk_kv_put(kv, &put, &until, NULL, &error), &error);
}

/* Bytes that differ from what was written, over all pages. */
static uint64_t segment_compare(uint64_t number, const struct rk_extent *extents, size_t count,
                                const struct rk_kv_pages *pages)
{
    uint64_t different = 0;
    uint64_t at = 0;
    uint32_t per_head = rk_kv_pages(segment_tokens(number));
    for (size_t i = 0; i < count; i++) {
        for (uint32_t page = extents[i].page_begin; page < extents[i].page_end; page++) {
            uint64_t name = page_name(
                number,
                ((uint64_t)extents[i].layer * layout.num_kv_heads + extents[i].kv_head) * per_head +
                    page);
            const uint8_t *data = pages->pages[at++].data;
            size_t bytes = rk_kv_page_bytes(&layout);
            if (value_compare(name, data, bytes) == bytes) {
                continue;
            }
            for (size_t byte = 0; byte < bytes; byte++) {
                different += value_compare_at(name, byte, data + byte, 1) != 1;
            }
        }
    }
    return different;
}

/* As a worker does: checksums once, the bytes for a while, the guard after each use. */
static void segment_use(uint64_t number, const struct rk_kv_location *location)
{
    struct rk_extent extents[4];
    struct rk_kv_pages pages = {0};
    struct rk_error error = {.text = ""};
    size_t count = 0;
    struct rk_id fingerprint = fingerprint_of_test();
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(TIMEOUT_MS)};
    uint32_t per_head = rk_kv_pages(segment_tokens(number));
    for (uint32_t head = 0; head < 4; head++) {
        if (below(4) > 0) {
            uint32_t begin = (uint32_t)below(per_head);
            extents[count++] = (struct rk_extent){
                .layer = head / 2, .kv_head = head % 2, .page_begin = begin, .page_end = per_head};
        }
    }
    enum rk_status status =
        rk_kv_get(kv, &fingerprint, &layout, location, extents, count, &until, &pages, &error);
    note("get of a segment", status, &error);
    if (status != RK_OK) {
        return;
    }
    bool sound = true;
    for (uint64_t i = 0; i < pages.num_pages && sound; i++) {
        sound = rk_page_verify(&pages.pages[i], rk_kv_page_bytes(&layout));
    }
    for (uint64_t use = 0; sound && use < 4; use++) {
        uint64_t different = segment_compare(number, extents, count, &pages);
        if (rk_kv_pages_check(kv, &pages) != RK_OK) {
            atomic_fetch_add(&self->lost, 1);
            break;
        }
        atomic_fetch_add(&self->bytes, pages.bytes);
        if (different == 1) {
            atomic_fetch_add(&self->flipped, 1);
        } else if (different > 1) {
            wrong("segment %llu over %s: %llu bytes are others than were put",
                  (unsigned long long)number, path, (unsigned long long)different);
        }
        rk_clock_sleep_ms((int64_t)below(150));
    }
    if (pages.hold) {
        rk_kv_release(kv, &pages);
    }
}

static void segments_turn(void)
{
    uint64_t number = below(SEGMENTS);
    struct rk_id id = segment_id(number);
    struct rk_id fingerprint = fingerprint_of_test();
    struct rk_kv_location location = {0};
    struct rk_error error = {.text = ""};
    uint32_t dropped = 0;
    struct rk_until until = {.deadline_ns = rk_deadline_in_ms(TIMEOUT_MS)};
    enum rk_status status =
        rk_kv_locate(kv, &fingerprint, &id, 1, false, &until, &location, &error);
    if (status != RK_OK) {
        note("locate", status, &error);
        return;
    }
    if (location.status == RK_OK && below(8) > 0) {
        segment_use(number, &location);
    } else if (location.status == RK_OK) {
        note("drop of a segment", rk_kv_drop(kv, &id, 1, &until, &dropped, &error), &error);
    } else {
        note("locate", location.status, &error);
        segment_put(number);
    }
    rk_kv_locations_free(&location, 1);
}

/* ---- More pins than a connection may have ---- */

static void hoard_fill(void)
{
    for (uint64_t i = 0; i < HOARD && !atomic_load(&board->stopping); i += HOARD_BATCH) {
        static uint8_t data[HOARD_BATCH][HOARD_BYTES];
        struct rk_value_put puts[HOARD_BATCH];
        struct text texts[HOARD_BATCH];
        struct rk_error error = {.text = ""};
        for (uint64_t j = 0; j < HOARD_BATCH; j++) {
            value_fill(HOARD_TAG | (i + j), data[j], HOARD_BYTES);
            text_set(&texts[j], "hoard", i + j);
            puts[j] =
                (struct rk_value_put){.key = texts[j].key, .data = data[j], .bytes = HOARD_BYTES};
        }
        note("put of the hoard", rk_values_put(values, puts, HOARD_BATCH, TIMEOUT_MS, &error),
             &error);
    }
}

static void hoard_check(uint64_t number, const struct rk_value_views *views)
{
    const struct rk_value_view *view = &views->views[0];
    uint64_t name = HOARD_TAG | number;
    uint64_t different = 0;
    if (view->status != RK_OK) {
        return;
    }
    if (value_compare(name, view->parts[0].data, view->bytes) != view->bytes) {
        for (uint64_t at = 0; at < view->bytes; at++) {
            const uint8_t *byte = (const uint8_t *)view->parts[0].data + at;
            different += value_compare_at(name, at, byte, 1) != 1;
        }
    }
    if (rk_values_view_check(values, views) != RK_OK) {
        atomic_fetch_add(&self->lost, 1);
    } else if (different > 1) {
        wrong("value %llu of the hoard over %s: %llu bytes changed under a view",
              (unsigned long long)number, path, (unsigned long long)different);
    }
    atomic_fetch_add(&self->bytes, view->bytes);
}

static void hoard_turn(void)
{
    static struct rk_value_views views[HOARD];
    static uint64_t numbers[HOARD];
    uint64_t count = 0;
    hoard_fill();
    for (uint64_t i = 0; i < HOARD && !atomic_load(&board->stopping); i++) {
        struct text text;
        struct rk_error error = {.text = ""};
        text_set(&text, "hoard", i);
        enum rk_status status =
            rk_values_view(values, &text.key, 1, TIMEOUT_MS, &views[count], &error);
        note("view of the hoard", status == RK_OK ? views[count].views[0].status : status, &error);
        if (status == RK_OK) {
            numbers[count++] = i;
        }
        if (status != RK_OK && status != RK_ERR_FULL) {
            break; /* A store is down. */
        }
    }
    for (int round = 0; round < 10 && !atomic_load(&board->stopping); round++) {
        rk_clock_sleep_ms(100);
        for (uint64_t i = 0; i < count; i++) {
            hoard_check(numbers[i], &views[i]);
        }
    }
    for (uint64_t i = 0; i < count; i++) {
        rk_values_release(values, &views[i]);
    }
}

/* ---- Children ---- */

static void fork_turn(void)
{
    pid_t child = fork();
    if (child == 0) {
        struct text text;
        text_set(&text, "bytes", below(BOARD_KEYS));
        struct rk_value_get get = {
            .key = text.key, .buffer = buffer, .buffer_bytes = sizeof(buffer)};
        enum rk_status status = rk_values_get(values, &get, 1, TIMEOUT_MS, NULL);
        _exit(status == RK_OK && get.status == RK_OK ? 3 : 0);
    }
    for (int i = 0; i < 20; i++) {
        value_get();
    }
    int code = 0;
    if (child > 0 && waitpid(child, &code, 0) == child) {
        atomic_fetch_add(&self->refused, 1);
        if (WIFEXITED(code) && WEXITSTATUS(code) == 3) {
            wrong("a forked child was answered over the connections of its parent");
        }
    }
}

int main(int argc, char **argv)
{
    if (argc != 8) {
        (void)fprintf(stderr,
                      "usage: bytes_peer BOARD_FD INDEX WRITERS COORDINATOR PATH ROLE SEED\n");
        return 2;
    }
    uint64_t index = strtoull(argv[2], NULL, 10);
    uint64_t num_writers = strtoull(argv[3], NULL, 10);
    const char *role = argv[6];
    path = argv[5];
    random_state = strtoull(argv[7], NULL, 10);
    rk_log_init("peer", RK_LOG_LEVEL_ERROR);
    board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED,
                 (int)strtol(argv[1], NULL, 10), 0);
    if (board == MAP_FAILED || index >= BOARD_PEERS_MAX) {
        return 2;
    }
    self = &board->peers[index];
    const struct rk_values_options value_options = {.coordinator = argv[4], .path = path};
    const struct rk_kv_client_options kv_options = {.coordinator = argv[4],
                                                    .path = strcmp(path, "shm") == 0 ? RK_PATH_SHM
                                                            : strcmp(path, "ucx") == 0
                                                                ? RK_PATH_UCX
                                                                : RK_PATH_GRPC};
    if (rk_values_create(&value_options, &values, NULL) != RK_OK ||
        rk_kv_client_create(&kv_options, &kv, NULL) != RK_OK) {
        return 1;
    }
    for (size_t i = 0; i < HELD_MAX * BATCH; i++) {
        held[i / BATCH].first[i % BATCH] = rk_alloc(VALUE_MAX);
        if (!held[i / BATCH].first[i % BATCH]) {
            return 1;
        }
    }
    while (!atomic_load(&board->stopping)) {
        if (strcmp(role, "read") == 0) {
            read_turn();
        } else if (strcmp(role, "write") == 0) {
            write_turn(index, num_writers);
        } else if (strcmp(role, "segments") == 0) {
            segments_turn();
        } else if (strcmp(role, "hoard") == 0) {
            hoard_turn();
        } else {
            fork_turn();
        }
    }
    for (size_t i = 0; i < HELD_MAX; i++) {
        if (held[i].views.views) {
            held_give(&held[i]);
        }
        for (size_t j = 0; j < BATCH; j++) {
            rk_free(held[i].first[j]);
        }
    }
    rk_kv_client_destroy(kv);
    rk_values_destroy(values);
    return 0;
}
