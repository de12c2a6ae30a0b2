/*
 * support: random numbers, statuses that must be RK_OK, and one device with a
 * stream, for test_kernels_cuda. No cmocka: a machine with a GPU has no
 * packages of ours.
 */
#ifndef TESTS_KERNELS_CUDA_SUPPORT_H
#define TESTS_KERNELS_CUDA_SUPPORT_H

#include "kernels/device.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

struct fixture {
    struct kernels_device *device;
    kernels_stream stream;
    uint64_t seed;
    uint64_t cases; /* asked for; families of dear cases run fewer */
    uint64_t first; /* number of the first case, to repeat one that failed */
};

/* What a family of cases came to. */
struct family {
    const char *name;
    uint64_t cases;
    uint64_t failures;
    uint64_t number; /* of the case at work */
    double worst;    /* relative L2 error */
};

/* Seeds the numbers for one case, so that it does not depend on those before it. */
void random_begin(const struct fixture *fixture, const char *family, uint64_t number);
uint32_t random_bits(void);
uint32_t random_below(uint32_t limit);
uint32_t random_between(uint32_t low, uint32_t high); /* both included */
bool random_chance(uint32_t one_in);
/* Between low and high, small numbers as likely as large ones. low >= 1 */
uint32_t random_log(uint32_t low, uint32_t high);
float random_real(void); /* [-1, 1) */
void random_shuffle(int32_t *values, uint32_t count);

uint16_t to_bf16(float value);
float from_bf16(uint16_t value);

/* Ends the program: nothing can be tested after a failure of these. */
void must(enum rk_status status, const struct rk_error *error, const char *what);
void *must_allocate(size_t bytes);
void *must_create(const struct fixture *fixture, enum kernels_memory_kind kind, size_t bytes);
void must_copy(const struct fixture *fixture, void *to, const void *from, size_t bytes);
void must_fill(const struct fixture *fixture, void *to, uint8_t byte, size_t bytes);
void must_wait(const struct fixture *fixture);

/* Counts a failure; prints the first few of a family. */
void fail(struct family *family, const char *format, ...) RK_PRINTF(2, 3);

/* Sums for a relative L2 error. */
struct l2 {
    double difference;
    double size;
};
void l2_add(struct l2 *l2, double value, double expected);
double l2_error(const struct l2 *l2);
/* Notes the error and fails above the limit, or if it is not a number. */
void l2_check(struct family *family, const struct l2 *l2, double limit, const char *what);

/* attention_families.c */
void family_attention(const struct fixture *fixture, struct family *family);
void family_mass(const struct fixture *fixture, struct family *family);
void family_replay(const struct fixture *fixture, struct family *family);
/* page_families.c */
void family_append(const struct fixture *fixture, struct family *family);
void family_queries(const struct fixture *fixture, struct family *family);
void family_moves(const struct fixture *fixture, struct family *family);
void family_checksum(const struct fixture *fixture, struct family *family);
/* refusals.c */
void family_refusals(const struct fixture *fixture, struct family *family);

#endif
