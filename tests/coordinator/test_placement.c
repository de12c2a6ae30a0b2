/*
 * Goal:   shares follow the weights, a node that leaves moves only its own
 *         share, and layer ranges cover each layer once.
 * Method: many random segment ids, seed printed; exact checks where the method
 *         promises them, bounds of five standard deviations where it is chance.
 */
#include "common/base/clock.h"
#include "coordinator/placement.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define NUM_IDS 20000

static uint64_t seed;

static struct rk_id id_of(uint64_t i)
{
    uint64_t text[2] = {seed, i};

    return rk_id_sha256(text, sizeof(text));
}

static void a_leaving_node_moves_only_its_share(void **state)
{
    struct placement_node nodes[] = {{"a", 1.0}, {"b", 2.0}, {"c", 1.5}, {"d", 0.5}};
    size_t moved = 0;

    (void)state;
    for (uint64_t i = 0; i < NUM_IDS; i++) {
        struct rk_id id = id_of(i);
        size_t before = placement_choose(&id, i % 3, nodes, 4);
        size_t after = placement_choose(&id, i % 3, nodes, 3);

        if (before != 3) {
            assert_int_equal(before, after);
        } else {
            moved++;
        }
    }
    assert_true(moved > 0);
}

static void shares_follow_the_weights(void **state)
{
    struct placement_node nodes[] = {{"a", 1e9}, {"b", 2e9}, {"c", 3e9}, {"d", 4e9}};
    size_t counts[4] = {0};

    (void)state;
    for (uint64_t i = 0; i < NUM_IDS; i++) {
        struct rk_id id = id_of(i);

        counts[placement_choose(&id, 0, nodes, 4)]++;
    }
    for (int i = 0; i < 4; i++) {
        double share = (i + 1) / 10.0;
        double deviation = sqrt(NUM_IDS * share * (1 - share));

        assert_true(fabs((double)counts[i] - NUM_IDS * share) < 5 * deviation);
    }
}

static void order_of_nodes_is_no_matter(void **state)
{
    struct placement_node nodes[] = {{"a", 1.0}, {"b", 1.0}, {"c", 1.0}};
    struct placement_node turned[] = {{"c", 1.0}, {"a", 1.0}, {"b", 1.0}};

    (void)state;
    for (uint64_t i = 0; i < 1000; i++) {
        struct rk_id id = id_of(i);

        assert_string_equal(nodes[placement_choose(&id, 1, nodes, 3)].node_id,
                            turned[placement_choose(&id, 1, turned, 3)].node_id);
    }
}

static void weights_fall_with_use_but_never_to_nothing(void **state)
{
    (void)state;
    assert_true(placement_weight(1000, 0) > placement_weight(1000, 500));
    assert_true(placement_weight(1000, 1000) > 0);
    assert_true(placement_weight(1000, 5000) > 0); /* More used than there is: still sane. */
    assert_true(placement_weight(0, 0) > 0);
    assert_true(placement_weight(UINT64_MAX, 0) > 0);
}

static void ranges_cover_each_layer_once(void **state)
{
    (void)state;
    for (uint32_t layers = 1; layers <= 70; layers++) {
        struct rk_kv_layout layout = {layers, 3, 64, RK_DTYPE_BF16};

        for (uint32_t wanted = 1; wanted <= 80; wanted++) {
            uint32_t num_shards = placement_num_shards(&layout, wanted);
            uint32_t next = 0;

            assert_true(num_shards >= 1 && num_shards <= layers && num_shards <= wanted);
            for (uint32_t i = 0; i < num_shards; i++) {
                struct rk_head_range heads = placement_heads(&layout, i, num_shards);

                assert_int_equal(heads.layer_begin, next);
                assert_true(rk_head_range_valid(&heads, &layout));
                assert_int_equal(heads.kv_head_end - heads.kv_head_begin, 3);
                next = heads.layer_end;
            }
            assert_int_equal(next, layers);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_leaving_node_moves_only_its_share),
        cmocka_unit_test(shares_follow_the_weights),
        cmocka_unit_test(order_of_nodes_is_no_matter),
        cmocka_unit_test(weights_fall_with_use_but_never_to_nothing),
        cmocka_unit_test(ranges_cover_each_layer_once),
    };

    seed = (uint64_t)rk_clock_ns();
    (void)printf("seed %llu\n", (unsigned long long)seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
