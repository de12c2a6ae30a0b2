/*
 * Goal:   whatever is wrong outside, a program says so in one line that names the file or address
 *         and the reason, with exit code 1 (2 for wrong usage), and never hangs or dies.
 * Method: run the real programs with a table of bad models, folders, addresses and requests, the
 *         first half without a cluster, the second against one; compare exit code and stderr,
 *         from which the lines of the log up to "warn" are taken out.
 */
#include "tests/e2e/cluster.h"
#include "tests/support/golden.h"
#include "tests/support/skip.h"

#include <arpa/inet.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define CUT_BYTES      1000000
#define LONG_WORDS     9000 /* beyond the context of 8,192 tokens */
#define RUN_SECONDS    "60" /* a program that still runs then has not failed as it should */
#define OUTPUT_BYTES   16384
#define LISTENING_ROOM 8

static char dir[64] = "/tmp/redknot-bad-XXXXXX";
static char taken[32]; /* an address that somebody else listens on */
static char spare[32]; /* one where nobody does */

/* Root reads every file, unless it gives up the right to. */
static const char *wrapper = "";
#define UNPRIVILEGED "setpriv --bounding-set=-dac_override,-dac_read_search "

struct bad_case {
    const char *command; /* behind $B/, the folder of the programs; $D is the test's folder */
    int code;
    const char *contains;
};

/* Fills output with what is on stderr besides the log. */
static int run(const char *coordinator, const char *command, char output[OUTPUT_BYTES])
{
    char line[4096];
    char name[128];
    size_t used = 0;
    (void)snprintf(line, sizeof(line),
                   "unset GRPC_VERBOSITY; B=" REDKNOT_BINARY_DIR "/bin; D=%s; M='%s'; TAKEN=%s; "
                   "SPARE=%s; export REDKNOT_COORDINATOR=%s; %stimeout " RUN_SECONDS
                   " $B/%s >$D/out 2>$D/err </dev/null",
                   dir, golden_model_path(), taken, spare, coordinator, wrapper, command);
    int status = system(line);
    assert_true(WIFEXITED(status));
    (void)snprintf(name, sizeof(name), "%s/err", dir);
    FILE *file = fopen(name, "r");
    assert_non_null(file);
    output[0] = 0;
    while (fgets(line, sizeof(line), file)) {
        bool log = strstr(line, " level=info ") || strstr(line, " level=warn ");
        size_t bytes = strlen(line);
        if (!log && used + bytes < OUTPUT_BYTES) {
            memcpy(output + used, line, bytes + 1);
            used += bytes;
        }
    }
    (void)fclose(file);
    return WEXITSTATUS(status);
}

static void check(const char *coordinator, const struct bad_case *cases, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        char output[OUTPUT_BYTES];
        int code = run(coordinator, cases[i].command, output);
        const char *end = strchr(output, '\n');
        /* argp adds to wrong usage where help is. */
        bool one_line = end && (cases[i].code == 2 || end[1] == 0);
        if (code != cases[i].code || !strstr(output, cases[i].contains) || !one_line ||
            (cases[i].code == 1 && strncmp(output, "redknot", 7) != 0)) {
            fail_msg("%s: exit %d, wanted %d and one line with \"%s\", got:\n%s", cases[i].command,
                     code, cases[i].code, cases[i].contains, output);
        }
    }
}

#define CHECK(coordinator, cases) check((coordinator), (cases), sizeof(cases) / sizeof((cases)[0]))

/* ---- Files ---- */

static void write_file(const char *name, const void *data, size_t bytes)
{
    char path[128];
    (void)snprintf(path, sizeof(path), "%s/%s", dir, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

static void write_text(const char *name, const char *text)
{
    write_file(name, text, strlen(text));
}

static void write_cut_model(void)
{
    char *data = malloc(CUT_BYTES);
    FILE *model = fopen(golden_model_path(), "rb");
    assert_non_null(data);
    assert_non_null(model);
    assert_int_equal(fread(data, 1, CUT_BYTES, model), CUT_BYTES);
    (void)fclose(model);
    write_file("cut.gguf", data, CUT_BYTES);
    free(data);
}

static void write_long_text(void)
{
    static char text[LONG_WORDS * 6];
    for (size_t i = 0; i < LONG_WORDS; i++) {
        memcpy(text + i * 6, "seven ", 6);
    }
    write_file("long.txt", text, sizeof(text));
}

/* Magic, version 3, one tensor or none, one key: general.architecture = `architecture`; then a
 * tensor of one value of a type that nobody knows. */
static void write_small_model(const char *name, const char *architecture, uint64_t tensors)
{
    uint8_t data[256];
    size_t used = 0;
    const uint32_t version = 3;
    const uint32_t string_type = 8;
    const uint64_t keys = 1;
    const char key[] = "general.architecture";
    const uint64_t key_bytes = sizeof(key) - 1;
    const uint64_t value_bytes = strlen(architecture);
    const struct {
        const void *from;
        size_t bytes;
    } head[] = {{"GGUF", 4},       {&version, 4},     {&tensors, 8},
                {&keys, 8},        {&key_bytes, 8},   {key, key_bytes},
                {&string_type, 4}, {&value_bytes, 8}, {architecture, value_bytes}};
    const uint64_t name_bytes = 1;
    const uint32_t dims = 1;
    const uint64_t size = 1;
    const uint32_t type = 250;
    const uint64_t offset = 0;
    for (size_t i = 0; i < sizeof(head) / sizeof(head[0]); i++) {
        memcpy(data + used, head[i].from, head[i].bytes);
        used += head[i].bytes;
    }
    const struct {
        const void *from;
        size_t bytes;
    } tensor[] = {{&name_bytes, 8}, {"t", 1}, {&dims, 4}, {&size, 8}, {&type, 4}, {&offset, 8}};
    for (size_t i = 0; tensors == 1 && i < sizeof(tensor) / sizeof(tensor[0]); i++) {
        memcpy(data + used, tensor[i].from, tensor[i].bytes);
        used += tensor[i].bytes;
    }
    write_file(name, data, used);
}

/* Listens and never accepts; a second socket only finds a port that is free. */
static void take_addresses(void)
{
    char *names[2] = {taken, spare};
    for (int i = 0; i < 2; i++) {
        struct sockaddr_in address = {.sin_family = AF_INET,
                                      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t length = sizeof(address);
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_true(fd >= 0);
        assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
        assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &length), 0);
        (void)snprintf(names[i], sizeof(taken), "127.0.0.1:%d", ntohs(address.sin_port));
        if (i == 0) {
            assert_int_equal(listen(fd, LISTENING_ROOM), 0); /* Kept until the test ends. */
        } else {
            close(fd);
        }
    }
}

static int make_files(void **state)
{
    (void)state;
    char path[128];
    assert_non_null(mkdtemp(dir));
    take_addresses();
    write_cut_model();
    write_long_text();
    write_small_model("xyz.gguf", "xyz", 0);
    write_small_model("type.gguf", "llama", 1);
    write_small_model("many.gguf", "llama", UINT64_MAX / 2);
    write_text("empty.txt", "");
    write_text("text.txt", "Some text.\n");
    write_text("secret.txt", "Nobody may read this.\n");
    write_text("cut.json", "{\"requests\": [");
    write_text("array.json", "[1, 2]");
    write_text("none.json", "{\"requests\": []}");
    write_text("type.json", "{\"requests\": [{\"segments\": 3}]}");
    write_text("good.json", "{\"requests\": [{\"segments\": [[5, 6, 7]], \"question\": [8], "
                            "\"continuation\": [9, 10]}]}");
    (void)snprintf(path, sizeof(path), "%s/secret.txt", dir);
    assert_int_equal(chmod(path, 0), 0);
    (void)snprintf(path, sizeof(path), "%s/folder", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    return 0;
}

static int remove_files(void **state)
{
    (void)state;
    char command[128];
    (void)snprintf(command, sizeof(command), "rm -rf %s", dir);
    return system(command);
}

/* ---- Without a cluster ---- */

#define WORKER "redknot-worker --listen $SPARE --metrics $SPARE --model "
#define STORE  "redknot-kvstore --shm-socket '' "

static void bad_models(void **state)
{
    (void)state;
    static const struct bad_case cases[] = {
        {WORKER "$D/cut.gguf", 1, "cut.gguf: byte "},
        {WORKER "$D/many.gguf", 1, "many.gguf: byte 8: more than"},
        {WORKER "$D/xyz.gguf", 1, "architecture xyz is not supported"},
        {WORKER "$D/type.gguf", 1, "type.gguf: byte "},
        {WORKER "$D/text.txt", 1, "text.txt: byte 0"},
        {WORKER "$D/empty.txt", 1, "empty.txt: byte 0: the file is empty"},
        {WORKER "$D/folder", 1, "folder: not a regular file"},
        {WORKER "$D/absent.gguf", 1, "absent.gguf: cannot open it: No such file"},
        {"redknot-worker --mode f7", 2, "--mode"},
        {"redknot-worker", 2, "--model"},
    };
    CHECK(spare, cases);
}

static void unreadable_files(void **state)
{
    (void)state;
    static const struct bad_case unreadable[] = {
        {WORKER "$D/secret.txt", 1, "secret.txt: cannot open it: Permission denied"},
        {"redknot put $D/secret.txt", 1, "secret.txt: Permission denied"},
    };
    if (geteuid() == 0 && system(UNPRIVILEGED "true >/dev/null 2>&1") != 0) {
        test_skip("files that may not be read",
                  "root reads every file, and setpriv (util-linux) cannot take that from it here");
    }
    wrapper = geteuid() == 0 ? UNPRIVILEGED : "";
    CHECK(spare, unreadable);
    wrapper = "";
}

/* A port that is cut to 16 bits is somebody else's; what others are told, they must be able to
 * call. */
static void bad_addresses(void **state)
{
    (void)state;
    static const struct bad_case cases[] = {
        {"redknot-worker --coordinator 127.0.0.1:99999", 2, "--coordinator: address"},
        {"redknot-worker --listen 127.0.0.1:65536", 2, "--listen: address"},
        {"redknot-worker --metrics 127.0.0.1:65536", 2, "--metrics: address"},
        {"redknot-worker --advertise junk", 2, "--advertise: address"},
        {"redknot-worker --advertise 127.0.0.1:0", 2, "from 1 to 65535"},
        {"redknot-worker --listen 0.0.0.0:0 --coordinator $SPARE", 2, "give --advertise"},
        {"redknot-worker --node-id \"$(printf 'a\\033b')\"", 2, "control character"},
        {"redknot-kvstore --coordinator 127.0.0.1:0", 2, "from 1 to 65535"},
        {"redknot-kvstore --advertise 127.0.0.1:99999", 2, "from 1 to 65535"},
        {"redknot-kvstore --node-id \"$(printf 'a\\033b')\"", 2, "control character"},
        {"redknot-coordinator --listen 127.0.0.1:99999", 2, "from 0 to 65535"},
    };
    static const struct bad_case by_environment[] = {
        {"redknot status", 1, "address '127.0.0.1:99999'"},
    };
    CHECK(spare, cases);
    CHECK("127.0.0.1:99999", by_environment);
}

static void taken_addresses(void **state)
{
    (void)state;
    static const struct bad_case cases[] = {
        {"redknot-coordinator --data $D/c --listen $TAKEN --metrics ''", 1, taken},
        {"redknot-coordinator --data $D/c --listen $SPARE --metrics $TAKEN", 1, taken},
        {STORE "--dram 16MiB --listen $TAKEN --metrics ''", 1, taken},
        {STORE "--dram 16MiB --listen $SPARE --metrics $TAKEN", 1, taken},
        {STORE "--dram 16MiB --listen $SPARE --metrics '' --ucx $TAKEN", 1, "already in use"},
        {"redknot-worker --model $M --listen $TAKEN --metrics $SPARE", 1, taken},
        {"redknot-worker --model $M --listen $SPARE --metrics $TAKEN", 1, taken},
    };
    CHECK(spare, cases);
    for (size_t i = 0; i < 2; i++) {
        char output[OUTPUT_BYTES];
        assert_int_equal(run(spare, cases[2 * i].command, output), 1);
        assert_non_null(strstr(output, "Address already in use"));
    }
}

static void bad_machines(void **state)
{
    (void)state;
    static const struct bad_case cases[] = {
        {"redknot-coordinator --data $D/text.txt --listen $SPARE --metrics ''", 1,
         "text.txt is no directory"},
        {"redknot-coordinator --data $D/text.txt/c --listen $SPARE --metrics ''", 1, "text.txt"},
        {STORE "--dram 1000TiB --listen $SPARE --metrics ''", 1, "ask for less"},
        {"redknot-coordinator --nonsense", 2, "nonsense"},
        {"redknot-kvstore --dram lots", 2, "lots"},
    };
    static const struct bad_case full[] = {
        {"redknot-coordinator --data $D/disk/c --listen $SPARE --metrics ''", 1, "make room"},
    };
    char path[128];
    CHECK(spare, cases);
    (void)snprintf(path, sizeof(path), "%s/disk", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    if (mount("tmpfs", path, "tmpfs", 0, "size=16k") != 0) {
        test_skipped("a full disk", "a small one cannot be mounted here (CAP_SYS_ADMIN)");
        return;
    }
    char output[OUTPUT_BYTES];
    int code = run(spare, full[0].command, output);
    assert_int_equal(umount(path), 0); /* Before an assertion can end the test. */
    assert_int_equal(code, 1);
    assert_non_null(strstr(output, "make room"));
    assert_ptr_equal(strchr(output, '\n'), output + strlen(output) - 1);
}

static void no_cluster(void **state)
{
    (void)state;
    static const struct bad_case cases[] = {
        {"redknot generate --prompt x", 1, "does not answer: Connection refused"},
        {"redknot put $D/text.txt", 1, "does not answer: Connection refused"},
        {"redknot status", 1, "does not answer: Connection refused"},
        {"redknot eval $D/good.json", 1, "does not answer: Connection refused"},
        {"redknot status --coordinator nonsense", 1, "nonsense"},
        {"redknot generate --prompt x --segment $D/absent.txt", 1, "absent.txt: no such file"},
    };
    CHECK(spare, cases);
}

/* ---- Against a cluster ---- */

static void bad_requests(void **state)
{
    (void)state;
    struct cluster cluster;
    struct cluster_options options = {.num_workers = 1};
    char path[128];
    static const struct bad_case cases[] = {
        {"redknot generate --prompt x --fidelity superb", 1, "superb"},
        {"redknot generate --prompt x --segment "
         "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
         1, "0123456789abcdef...: unknown to the cluster"},
        {"redknot generate --prompt x --segment $D/absent.txt", 1, "absent.txt: no such file"},
        {"redknot generate --prompt x --segment $D/empty.txt", 1, "empty.txt: the file is empty"},
        {"redknot generate --prompt x --segment $D/folder", 1, "folder: it is a directory"},
        {"redknot generate --prompt x --segment $D/long.txt", 1, "split it"},
        {"redknot generate --prompt ''", 2, "no --prompt given"},
        {"redknot put $D/long.txt", 1, "split it"},
        {"redknot eval $D/cut.json", 1, "cut.json"},
        {"redknot eval $D/array.json", 1, "array.json"},
        {"redknot eval $D/none.json", 1, "none.json"},
        {"redknot eval $D/type.json", 1, "type.json"},
        {"redknot eval $D/text.txt", 1, "text.txt"},
        {"redknot eval $D/good.json --dump $D/absent/x.safetensors", 1, "absent/x.safetensors"},
        {"redknot eval $D/good.json --dump $D/folder", 1, "folder"},
        {"redknot generate --nonsense", 2, "nonsense"},
    };
    cluster_start(&cluster, &options);
    CHECK(cluster.coordinator_address, cases);
    (void)snprintf(path, sizeof(path), "%s/folder", dir);
    assert_int_equal(rmdir(path), 0); /* Nothing half-written is left in it. */
    cluster_stop(&cluster);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_models),    cmocka_unit_test(unreadable_files),
        cmocka_unit_test(bad_addresses), cmocka_unit_test(taken_addresses),
        cmocka_unit_test(bad_machines),  cmocka_unit_test(no_cluster),
        cmocka_unit_test(bad_requests),
    };
    return test_exit_code(cmocka_run_group_tests(tests, make_files, remove_files));
}
