/*
 * Goal:   the kernels of a GPU give what kernels/device.h defines.
 * Method: random cases of each entry against references that know nothing of
 *         tiles, splits or plans: attention and mass in f64, pages bit by bit
 *         against kernels/cpu/pages_reference.h and in f64 too. What a kernel may
 *         not read is NaN, what it has to write is 0xff before.
 *
 * test_kernels_cuda [--cases N] [--seed S] [--only NAME] [--first K] [--cpu]
 * --first: begin with case K, to repeat it; --cpu: the reference device instead.
 */
#include "tests/kernels_cuda/support.h"

#include <stdlib.h>
#include <time.h>

static const struct {
    const char *name;
    void (*run)(const struct fixture *fixture, struct family *family);
    uint64_t one_in; /* cases asked for to a case run */
} families[] = {
    {"attention", family_attention, 1}, {"replay", family_replay, 20},
    {"mass", family_mass, 10},          {"append", family_append, 20},
    {"queries", family_queries, 20},    {"moves", family_moves, 20},
    {"checksum", family_checksum, 20},  {"refusals", family_refusals, 0},
};

struct arguments {
    struct fixture fixture;
    const char *only;
    enum kernels_device_kind kind;
};

static double now(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static bool parse(int argc, char **argv, struct arguments *ret)
{
    *ret = (struct arguments){.fixture = {.seed = (uint64_t)time(NULL), .cases = 1000},
                              .kind = KERNELS_DEVICE_CUDA};
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--cpu") == 0) {
            ret->kind = KERNELS_DEVICE_CPU;
            continue;
        }
        if (!value) {
            return false;
        }
        if (strcmp(argv[i], "--cases") == 0) {
            ret->fixture.cases = strtoull(value, NULL, 10);
        } else if (strcmp(argv[i], "--seed") == 0) {
            ret->fixture.seed = strtoull(value, NULL, 10);
        } else if (strcmp(argv[i], "--first") == 0) {
            ret->fixture.first = strtoull(value, NULL, 10);
        } else if (strcmp(argv[i], "--only") == 0) {
            ret->only = value;
        } else {
            return false;
        }
        i++;
    }
    return true;
}

int main(int argc, char **argv)
{
    struct arguments arguments;
    if (!parse(argc, argv, &arguments)) {
        fprintf(stderr, "usage: %s [--cases N] [--seed S] [--only NAME] [--first K] [--cpu]\n",
                argv[0]);
        return 2;
    }
    struct fixture *fixture = &arguments.fixture;
    struct rk_error error = {.status = RK_OK};
    must(kernels_device_create(arguments.kind, 0, &fixture->device, &error), &error,
         "kernels_device_create");
    must(kernels_stream_create(fixture->device, &fixture->stream, &error), &error,
         "kernels_stream_create");
    printf("%s, seed %llu\n", kernels_device_name(fixture->device),
           (unsigned long long)fixture->seed);

    uint64_t failures = 0;
    uint32_t ran = 0;
    uint64_t asked = fixture->cases;
    for (size_t i = 0; i < sizeof(families) / sizeof(families[0]); i++) {
        if (arguments.only && strcmp(arguments.only, families[i].name) != 0) {
            continue;
        }
        struct family family = {.name = families[i].name};
        double started = now();
        /* A family that is asked for by its name gets all cases. */
        bool all = arguments.only || families[i].one_in == 0;
        fixture->cases = all ? asked : (asked + families[i].one_in - 1) / families[i].one_in;
        families[i].run(fixture, &family);
        printf("%-10s %7llu cases, %llu failures, worst relative L2 error %.3g, %.1f s\n",
               family.name, (unsigned long long)family.cases, (unsigned long long)family.failures,
               family.worst, now() - started);
        fflush(stdout);
        failures += family.failures;
        ran++;
    }
    kernels_stream_destroy(fixture->device, fixture->stream);
    kernels_device_destroy(fixture->device);
    if (ran == 0) {
        fprintf(stderr, "no family has that name\n");
        return 2;
    }
    return failures ? 1 : 0;
}
