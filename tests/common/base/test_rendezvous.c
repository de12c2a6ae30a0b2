/*
 * Goal:   coordinator and clients give one key to one node, now and in later
 *         versions; shares follow the weights and a change moves only its part.
 * Method: fixed vectors; many random keys, seed printed, with exact checks where
 *         the method promises them and bounds of five standard deviations where
 *         it is chance.
 */
#include "common/base/clock.h"
#include "common/base/rendezvous.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define NUM_KEYS 20000

static uint64_t seed;

static struct rk_id key_of(uint64_t i)
{
    uint64_t text[2] = {seed, i};

    return rk_id_sha256(text, sizeof(text));
}

/* A placement that changes moves everybody's KV. The last bits are the math library's. */
static void scores_are_what_they_were(void **state)
{
    static const struct {
        const char *key;
        uint32_t index;
        const char *node_id;
        double weight;
        double score;
    } rows[] = {
        {"a", 0, "store-0", 1.0, 0x1.4cc76a8b0d44ap+1},
        {"a", 1, "store-0", 1.0, 0x1.d80dfa5d36169p+1},
        {"a", 0, "store-1", 1.0, 0x1.e7911336f8984p+1},
        {"b", 0, "store-0", 1.0, 0x1.b0444c5adffb3p+1},
        {"b", 0x01020304, "10.0.0.1:7201", 0x1p34, 0x1.fe3e03b951b44p+34},
        {"c", 7, "", 0.125, 0x1.a6ade1520dcfcp-2},
    };

    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct rk_id key = rk_id_sha256(rows[i].key, strlen(rows[i].key));
        double score = rk_rendezvous_score(&key, rows[i].index, rows[i].node_id, rows[i].weight);

        assert_true(fabs(score - rows[i].score) <= 1e-15 * rows[i].score);
    }
}

static void shares_follow_the_weights(void **state)
{
    static const char *const names[] = {"a", "b", "c"};
    size_t counts[3] = {0};

    (void)state;
    for (uint64_t i = 0; i < NUM_KEYS; i++) {
        struct rk_id key = key_of(i);
        int best = 0;
        double best_score = 0;

        for (int node = 0; node < 3; node++) {
            double score = rk_rendezvous_score(&key, 0, names[node], node + 1.0);

            assert_true(score > 0 && isfinite(score));
            if (score > best_score) {
                best = node;
                best_score = score;
            }
        }
        counts[best]++;
    }
    for (int node = 0; node < 3; node++) {
        double share = (node + 1) / 6.0;
        double deviation = sqrt(NUM_KEYS * share * (1 - share));

        assert_true(fabs((double)counts[node] - NUM_KEYS * share) < 5 * deviation);
    }
}

static void a_long_name_is_cut(void **state)
{
    char long_name[RK_RENDEZVOUS_NODE_ID_BYTES + 2];
    struct rk_id key = key_of(0);
    double score;

    (void)state;
    memset(long_name, 'n', sizeof(long_name));
    long_name[sizeof(long_name) - 1] = '\0';
    score = rk_rendezvous_score(&key, 0, long_name, 1.0);
    long_name[RK_RENDEZVOUS_NODE_ID_BYTES] = '\0';
    assert_true(rk_rendezvous_score(&key, 0, long_name, 1.0) == score);
    long_name[RK_RENDEZVOUS_NODE_ID_BYTES - 1] = '\0';
    assert_true(rk_rendezvous_score(&key, 0, long_name, 1.0) != score);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scores_are_what_they_were),
        cmocka_unit_test(shares_follow_the_weights),
        cmocka_unit_test(a_long_name_is_cut),
    };

    seed = (uint64_t)rk_clock_ns();
    (void)printf("seed %llu\n", (unsigned long long)seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
