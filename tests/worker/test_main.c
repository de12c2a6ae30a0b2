/*
 * Goal:   redknot-worker looks at its options before it reads a model: wrong ones end it at once
 * with 2 and one line that says what would be right. Method: the program itself, with a model that
 * does not exist: exit code 1 means that it got so far.
 */
#include "kernels/kernels.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include <cmocka.h>

/* Its first line on stderr and its exit code. */
static int run(const char *options, char line[512])
{
    char command[1024];
    (void)snprintf(command, sizeof(command), "%s/bin/redknot-worker %s 2>&1 >/dev/null",
                   REDKNOT_BINARY_DIR, options);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    line[0] = '\0';
    (void)fgets(line, 512, pipe);
    while (fgetc(pipe) != EOF) {
    }
    int code = pclose(pipe);
    assert_true(WIFEXITED(code));
    return WEXITSTATUS(code);
}

static void wrong_options_are_usage(void **state)
{
    static const struct {
        const char *options;
        const char *text;
    } cases[] = {
        {"", "no model: give --model FILE.gguf"},
        {"-m none.gguf --isa avx1024", "--isa avx1024: use one of auto, reference, avx2"},
        {"-m none.gguf --mode fp8", "--mode fp8: use one of f32, bf16"},
        {"-m none.gguf --path carrier", "--path carrier: use one of auto, shm, ucx, grpc"},
        {"-m none.gguf --log-level loud", "--log-level loud: use one of debug, info"},
        {"-m none.gguf --mode f32 --isa avx512_bf16", "--isa: "},
        {"-m none.gguf --threads 0", "--threads 0: a number from 1"},
        {"-m none.gguf --advertise junk", "--advertise"},
        {"-m none.gguf --listen 127.0.0.1:99999", "--listen"},
        {"-m none.gguf -c 127.0.0.1:7100 --listen 0.0.0.0:7120", "--advertise"},
        {"-m none.gguf more", "unexpected argument"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char line[512];
        int code = run(cases[i].options, line);
        if (code != 2 || !strstr(line, cases[i].text)) {
            fail_msg("\"%s\" ended with %d: %s", cases[i].options, code, line);
        }
    }
}

/* A path that this CPU lacks is named, with those that it has. */
static void paths_of_other_cpus_are_usage(void **state)
{
    char line[512];
    (void)state;
    if (kernels_isa_supported(KERNELS_ISA_AMX)) {
        assert_int_equal(run("-m none.gguf --mode bf16 --isa amx", line), 1);
        return;
    }
    assert_int_equal(run("-m none.gguf --mode bf16 --isa amx", line), 2);
    assert_non_null(strstr(line, "this CPU has no amx; it has reference"));
}

static void right_options_get_to_the_model(void **state)
{
    char line[512];
    (void)state;
    assert_int_equal(run("-m /none.gguf --metrics '' --isa reference --mode f32 --path shm", line),
                     1);
    assert_non_null(strstr(line, "/none.gguf: cannot open it"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(wrong_options_are_usage),
        cmocka_unit_test(paths_of_other_cpus_are_usage),
        cmocka_unit_test(right_options_get_to_the_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
