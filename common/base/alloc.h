/*
 * alloc: the one way to the heap, so that tests can fail each call in turn.
 *
 * Threads: any. The failure counter is per process, for tests only.
 */
#ifndef RK_COMMON_BASE_ALLOC_H
#define RK_COMMON_BASE_ALLOC_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* All return NULL when memory is out (or a test says so). Free with rk_free. */
void *rk_alloc(size_t bytes);
void *rk_alloc_zero(size_t count, size_t bytes_each); /* checks for overflow */
void *rk_alloc_resize(void *block, size_t count, size_t bytes_each);
char *rk_alloc_string(const char *text);
char *rk_alloc_format(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Alignment is a power of two; bytes are rounded up to it. */
void *rk_alloc_aligned(size_t alignment, size_t bytes);
void rk_free(void *block); /* accepts NULL */

/* Let `calls` more allocations through, then fail one... and all after it until reset with -1. */
void rk_alloc_fail_after(long calls);

#ifdef __cplusplus
}
#endif

#endif
