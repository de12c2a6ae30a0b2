/*
 * Goal:   greedy takes the best and the lowest id among equals; drawing follows
 *         the distribution inside the nucleus and never leaves it; the same seed
 *         gives the same draws.
 * Method: fixed logits and many draws from fixed seeds, against exact
 *         probabilities; the bounds are over 6 standard deviations wide.
 */
#include "worker/engine/engine.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { VOCAB = 6, DRAWS = 40000 };

static void greedy_takes_the_lowest_best(void **state)
{
    struct engine_sampler sampler = {0, 1, 1};
    (void)state;
    assert_int_equal(engine_sample(&sampler, (float[]){1, 3, 2, 3}, 4, NULL), 1);
    assert_int_equal(engine_sample(&sampler, (float[]){-1, -3, -2}, 3, NULL), 0);
    assert_int_equal(engine_sample(&sampler, (float[]){NAN, -3, -2}, 3, NULL), 2);
    assert_int_equal(engine_sample(&sampler, (float[]){-INFINITY, -INFINITY}, 2, NULL), 0);
    assert_int_equal(sampler.state, 1);
}

static void count_draws(float temperature, float top_p, const float *logits, uint32_t *counts)
{
    struct engine_sampler sampler = {temperature, top_p, 12345};
    uint64_t scratch[VOCAB];
    memset(counts, 0, VOCAB * sizeof(*counts));
    for (int i = 0; i < DRAWS; i++) {
        int32_t id = engine_sample(&sampler, logits, VOCAB, scratch);
        assert_in_range(id, 0, VOCAB - 1);
        counts[id]++;
    }
}

static void check_share(uint32_t count, double expected)
{
    double sigma = sqrt(expected * (1 - expected) / DRAWS);
    assert_true(fabs((double)count / DRAWS - expected) <= 6.5 * sigma);
}

static void draws_follow_the_distribution(void **state)
{
    /* Probabilities 0.4, 0.05, 0.3, 0.15, 0.1 and none, at temperature 1. */
    static const double shares[VOCAB] = {0.4, 0.05, 0.3, 0.15, 0.1, 0};
    float logits[VOCAB];
    float colder[VOCAB];
    uint32_t counts[VOCAB];
    (void)state;

    for (int i = 0; i < VOCAB; i++) {
        logits[i] = shares[i] > 0 ? (float)log(shares[i]) + 3 : -INFINITY;
        colder[i] = logits[i] * 0.5f;
    }
    count_draws(1, 1, logits, counts);
    for (int i = 0; i < VOCAB; i++) {
        check_share(counts[i], shares[i]);
    }
    count_draws(0.5f, 1, colder, counts);
    for (int i = 0; i < VOCAB; i++) {
        check_share(counts[i], shares[i]);
    }
    /* 0.4 + 0.3 fall short of 0.75; the third one crosses it and is kept. */
    count_draws(1, 0.75f, logits, counts);
    check_share(counts[0], 0.4 / 0.85);
    check_share(counts[2], 0.3 / 0.85);
    check_share(counts[3], 0.15 / 0.85);
    assert_int_equal(counts[1] + counts[4] + counts[5], 0);
    count_draws(1, 1e-6f, logits, counts);
    assert_int_equal(counts[0], DRAWS);
}

static void equal_seeds_draw_equally(void **state)
{
    struct engine_sampler a = {1, 0.9f, 5};
    struct engine_sampler b = {1, 0.9f, 5};
    const float logits[VOCAB] = {1, 1, 1, 1, 1, 1};
    uint64_t scratch[VOCAB];
    uint32_t seen = 0;
    (void)state;

    for (int i = 0; i < 100; i++) {
        int32_t id = engine_sample(&a, logits, VOCAB, scratch);
        assert_int_equal(id, engine_sample(&b, logits, VOCAB, scratch));
        seen |= 1u << id;
    }
    assert_int_equal(seen, 0x3f);
}

static void log_softmax_adds_up(void **state)
{
    float logits[VOCAB] = {1000, 999, 998, -1000, -INFINITY, 1000};
    double sum = 0;
    (void)state;

    engine_log_softmax(logits, VOCAB, logits); /* In place. */
    for (int i = 0; i < VOCAB; i++) {
        sum += exp((double)logits[i]);
    }
    assert_true(fabs(sum - 1) < 1e-6);
    assert_true(logits[0] == logits[5] && fabsf(logits[0] - logits[1] - 1) < 1e-6f);
    assert_true(isinf(logits[4]));
}

static void what_is_no_number_is_seen(void **state)
{
    float logits[67];
    (void)state;
    for (int i = 0; i < 67; i++) {
        logits[i] = i % 2 ? 3.4e38f : -1e-40f;
    }
    assert_true(engine_logits_finite(logits, 67));
    assert_true(engine_logits_finite(logits, 0));
    for (int i = 0; i < 67; i++) {
        float kept = logits[i];
        logits[i] = i % 3 ? NAN : -INFINITY;
        assert_false(engine_logits_finite(logits, 67));
        logits[i] = kept;
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_no_number_is_seen),
        cmocka_unit_test(greedy_takes_the_lowest_best),
        cmocka_unit_test(draws_follow_the_distribution),
        cmocka_unit_test(equal_seeds_draw_equally),
        cmocka_unit_test(log_softmax_adds_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
