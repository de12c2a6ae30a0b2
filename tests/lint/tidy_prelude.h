/*
 * Read before each source when clang-tidy runs, never when we build: tells the
 * analyzer, which sees one source at a time, that rk_error_set() returns the
 * status it was given, and so never RK_OK where an error was meant, and that
 * our allocation is the C library's: zeroed memory is zero, and can leak.
 * rk_free() stays unknown: uthash frees its table where the analyzer cannot see
 * that the table is empty, and would be called a use after free.
 */
#ifndef TIDY_PRELUDE_H
#define TIDY_PRELUDE_H

#include "common/base/alloc.h"
#include "common/base/status.h"

#include <stdlib.h>

#define rk_error_set(error, status, ...) (rk_error_set((error), (status), __VA_ARGS__), (status))
#define rk_alloc(bytes)                  malloc(bytes)
#define rk_alloc_zero(count, bytes)      calloc((count), (bytes))

#endif
