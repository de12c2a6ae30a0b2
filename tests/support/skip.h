/*
 * skip: tests that a machine cannot run are skipped, and say why.
 *
 * What is skipped never counts as passed: a program that skipped anything ends
 * with TEST_SKIP_CODE, which ctest shows as "Skipped" (cmake/Redknot.cmake), and
 * tests/support/skipped.sh lists each reason at the end of `make test`.
 *
 * Threads: that of the test.
 */
#ifndef TESTS_SUPPORT_SKIP_H
#define TESTS_SUPPORT_SKIP_H

#include <stdbool.h>

#define TEST_SKIP_CODE 77

/* Notes that `what` is not tested, for the reason given, and goes on. */
void test_skipped(const char *what, const char *reason);
/* A part that this machine cannot have, such as an instruction set: in the summary, but the rest of
 * the program has passed. */
void test_left_out(const char *what, const char *reason);
/* As test_skipped(), and leaves the cmocka test that runs, as skip() does. */
__attribute__((noreturn)) void test_skip(const char *what, const char *reason);
/* Whether a program of this name is found in PATH. */
bool test_has_program(const char *name);
/* What main() returns: failed is the result of cmocka_run_group_tests(). */
int test_exit_code(int failed);

#endif
