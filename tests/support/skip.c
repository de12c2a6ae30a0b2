#include "tests/support/skip.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static bool any_skipped;

void test_left_out(const char *what, const char *reason)
{
    (void)printf("\nSKIPPED: %s: %s\n", what, reason); /* The form that skipped.sh looks for. */
    (void)fflush(stdout);
}

void test_skipped(const char *what, const char *reason)
{
    any_skipped = true;
    test_left_out(what, reason);
}

void test_skip(const char *what, const char *reason)
{
    test_skipped(what, reason);
    skip();
    abort(); /* skip() jumps. */
}

bool test_has_program(const char *name)
{
    const char *path = getenv("PATH");
    while (path && *path) {
        char file[4096];
        int length = (int)strcspn(path, ":");
        (void)snprintf(file, sizeof(file), "%.*s/%s", length, path, name);
        if (access(file, X_OK) == 0) {
            return true;
        }
        path += length + (path[length] == ':');
    }
    return false;
}

int test_exit_code(int failed)
{
    if (failed) {
        return 1; /* Not the count: 77 failures are no skip. */
    }
    return any_skipped ? TEST_SKIP_CODE : 0;
}
