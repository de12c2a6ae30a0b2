/*
 * Goal:   the allocator gives each granule once, finds room whenever there is
 *         some, and gets back to one whole extent.
 * Method: random takes and partial gives beside a plain array of flags as the
 *         model; after each step the model says what had to happen.
 */
#include "kvstore/space_internal.h"

#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define GRANULES 257
#define STEPS    60000

struct model {
    unsigned char taken[GRANULES];
};

static uint32_t model_longest(const struct model *model)
{
    uint32_t longest = 0;
    uint32_t run = 0;
    for (uint32_t g = 0; g < GRANULES; g++) {
        run = model->taken[g] ? 0 : run + 1;
        longest = run > longest ? run : longest;
    }
    return longest;
}

static uint32_t model_free(const struct model *model)
{
    uint32_t count = 0;
    for (uint32_t g = 0; g < GRANULES; g++) {
        count += !model->taken[g];
    }
    return count;
}

static void step_alloc(struct space *space, struct model *model, unsigned *random)
{
    uint32_t want = 1 + (uint32_t)rand_r(random) % (rand_r(random) % 4 ? 12 : GRANULES);
    uint32_t min = 1 + (uint32_t)rand_r(random) % want;
    uint32_t longest = model_longest(model);
    uint32_t begin = 0;
    uint32_t got = space_alloc(space, want, min, &begin);
    assert_int_equal(got, longest >= want ? want : longest >= min ? longest : 0);
    for (uint32_t g = begin; g < begin + got; g++) {
        assert_true(g < GRANULES && !model->taken[g]);
        model->taken[g] = 1;
    }
}

/* Any part of any taken run. */
static void step_free(struct space *space, struct model *model, unsigned *random)
{
    uint32_t begin = (uint32_t)rand_r(random) % GRANULES;
    uint32_t count = 0;
    uint32_t most = 1 + (uint32_t)rand_r(random) % 20;
    while (begin + count < GRANULES && count < most && model->taken[begin + count]) {
        model->taken[begin + count] = 0;
        count++;
    }
    if (count > 0) {
        space_free(space, begin, count);
    }
}

static void random_steps_agree_with_the_model(void **state)
{
    (void)state;
    unsigned seed = (unsigned)time(NULL);
    print_message("seed %u\n", seed);
    unsigned random = seed;
    struct space *space = NULL;
    struct model model = {{0}};
    assert_int_equal(space_create(GRANULES, &space), RK_OK);
    for (int i = 0; i < STEPS; i++) {
        if (rand_r(&random) % 5 < 2) {
            step_alloc(space, &model, &random);
        } else {
            step_free(space, &model, &random);
        }
        assert_int_equal(space_free_granules(space), model_free(&model));
    }
    for (uint32_t g = 0; g < GRANULES; g++) {
        if (model.taken[g]) {
            space_free(space, g, 1);
        }
    }
    uint32_t begin = 1;
    assert_int_equal(space_alloc(space, GRANULES, GRANULES, &begin), GRANULES);
    assert_int_equal(begin, 0);
    space_destroy(space);
}

static void creation_survives_each_failed_allocation(void **state)
{
    (void)state;
    struct space *space = NULL;
    enum rk_status status = RK_ERR_NO_MEMORY;
    int failures = 0;
    for (; status != RK_OK; failures++) {
        rk_alloc_fail_after(failures);
        status = space_create(16, &space);
        assert_int_equal(space != NULL, status == RK_OK);
    }
    rk_alloc_fail_after(-1);
    assert_int_equal(failures, 5);
    space_destroy(space);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_steps_agree_with_the_model),
        cmocka_unit_test(creation_survives_each_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
