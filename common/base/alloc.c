#include "common/base/alloc.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* -1: never fail. Relaxed: a test that sets it runs nothing else meanwhile. */
static atomic_long calls_left = -1;

static bool fails_now(void)
{
    long left = atomic_load_explicit(&calls_left, memory_order_relaxed);
    if (left < 0) {
        return false;
    }
    if (left == 0) {
        return true;
    }
    atomic_store_explicit(&calls_left, left - 1, memory_order_relaxed);
    return false;
}

void rk_alloc_fail_after(long calls)
{
    atomic_store_explicit(&calls_left, calls, memory_order_relaxed);
}

void *rk_alloc(size_t bytes)
{
    return fails_now() ? NULL : malloc(bytes ? bytes : 1);
}

void *rk_alloc_zero(size_t count, size_t bytes_each)
{
    return fails_now() ? NULL : calloc(count ? count : 1, bytes_each ? bytes_each : 1);
}

void *rk_alloc_resize(void *block, size_t count, size_t bytes_each)
{
    size_t bytes = 0;
    if (__builtin_mul_overflow(count, bytes_each, &bytes) || fails_now()) {
        return NULL;
    }
    return realloc(block, bytes ? bytes : 1);
}

char *rk_alloc_string(const char *text)
{
    return fails_now() ? NULL : strdup(text);
}

char *rk_alloc_format(const char *format, ...)
{
    char *text = NULL;
    va_list args;
    if (fails_now()) {
        return NULL;
    }
    va_start(args, format);
    int length = vasprintf(&text, format, args);
    va_end(args);
    return length < 0 ? NULL : text;
}

void *rk_alloc_aligned(size_t alignment, size_t bytes)
{
    if (fails_now() || bytes > SIZE_MAX - alignment) {
        return NULL;
    }
    size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    return aligned_alloc(alignment, rounded ? rounded : alignment);
}

void rk_free(void *block)
{
    free(block);
}
