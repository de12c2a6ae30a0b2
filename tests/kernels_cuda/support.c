#include "tests/kernels_cuda/support.h"

#include "common/base/alloc.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>

#define FAILURES_PRINTED 5

static uint64_t random_state;

static uint64_t mixed(uint64_t x)
{
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

void random_begin(const struct fixture *fixture, const char *family, uint64_t number)
{
    random_state = mixed(fixture->seed + 1);
    for (const char *c = family; *c; c++) {
        random_state = mixed(random_state + (unsigned char)*c);
    }
    random_state = mixed(random_state + number);
}

uint32_t random_bits(void)
{
    random_state += UINT64_C(0x9e3779b97f4a7c15);
    return (uint32_t)(mixed(random_state) >> 32);
}

uint32_t random_below(uint32_t limit)
{
    return (uint32_t)((uint64_t)random_bits() * limit >> 32);
}

uint32_t random_between(uint32_t low, uint32_t high)
{
    return low + random_below(high - low + 1);
}

bool random_chance(uint32_t one_in)
{
    return random_below(one_in) == 0;
}

uint32_t random_log(uint32_t low, uint32_t high)
{
    double u = random_bits() / 4294967296.0;
    double x = low * exp(u * log((high + 1.0) / low));
    return x >= high ? high : (uint32_t)x;
}

float random_real(void)
{
    return (float)(random_bits() >> 8) / 8388608.0f - 1.0f;
}

void random_shuffle(int32_t *values, uint32_t count)
{
    for (uint32_t i = count; i > 1; i--) {
        uint32_t j = random_below(i);
        int32_t kept = values[i - 1];
        values[i - 1] = values[j];
        values[j] = kept;
    }
}

uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof(result));
    return result;
}

void must(enum rk_status status, const struct rk_error *error, const char *what)
{
    if (status != RK_OK) {
        fflush(stdout);
        fprintf(stderr, "%s: %s: %s\n", what, rk_status_name(status), error->text);
        exit(1);
    }
}

void *must_allocate(size_t bytes)
{
    void *memory = rk_alloc_aligned(64, bytes);
    if (!memory) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return memory;
}

void *must_create(const struct fixture *fixture, enum kernels_memory_kind kind, size_t bytes)
{
    struct rk_error error = {.status = RK_OK};
    void *memory = NULL;
    must(kernels_memory_create(fixture->device, kind, bytes, &memory, &error), &error,
         "kernels_memory_create");
    return memory;
}

void must_copy(const struct fixture *fixture, void *to, const void *from, size_t bytes)
{
    struct rk_error error = {.status = RK_OK};
    must(kernels_copy(fixture->device, to, from, bytes, fixture->stream, &error), &error,
         "kernels_copy");
}

void must_fill(const struct fixture *fixture, void *to, uint8_t byte, size_t bytes)
{
    struct rk_error error = {.status = RK_OK};
    must(kernels_fill(fixture->device, to, byte, bytes, fixture->stream, &error), &error,
         "kernels_fill");
}

void must_wait(const struct fixture *fixture)
{
    struct rk_error error = {.status = RK_OK};
    must(kernels_stream_wait(fixture->device, fixture->stream, &error), &error,
         "kernels_stream_wait");
}

void fail(struct family *family, const char *format, ...)
{
    family->failures++;
    if (family->failures > FAILURES_PRINTED) {
        return;
    }
    va_list arguments;
    va_start(arguments, format);
    printf("%s, case %llu: ", family->name, (unsigned long long)family->number);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
}

void l2_add(struct l2 *l2, double value, double expected)
{
    l2->difference += (value - expected) * (value - expected);
    l2->size += expected * expected;
}

double l2_error(const struct l2 *l2)
{
    return l2->difference == 0 ? 0 : sqrt(l2->difference / l2->size);
}

void l2_check(struct family *family, const struct l2 *l2, double limit, const char *what)
{
    double error = l2_error(l2);
    if (!(error <= limit)) {
        fail(family, "%s: relative L2 error %g, above %g", what, error, limit);
    }
    if (!(error <= family->worst)) {
        family->worst = isnan(error) ? INFINITY : error;
    }
}
