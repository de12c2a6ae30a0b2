/*
 * Goal:   published head maps are read as their classes say, odd ones included,
 *         and everything else is refused with a line naming file and key.
 * Method: a table of documents with what becomes of them; the file of
 *         tests/golden; each allocation failing in turn.
 */
#include "worker/recovery/head_map.h"

#include "common/base/alloc.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* One layer, two heads. */
static enum rk_status parse(const char *json, struct recovery_head_map **ret_map,
                            struct rk_error *error)
{
    return recovery_head_map_parse(json, strlen(json), "map.json", 1, 2, ret_map, error);
}

#define CLASSES "\"num_layers\":1,\"num_kv_heads\":2,\"kv_head_classification\":"
#define LOCAL   CLASSES "[[\"local\",\"global\"]],"

static void odd_maps_are_read(void **state)
{
    static const struct {
        const char *json;
        struct recovery_head heads[2];
    } cases[] = {
        {"{" LOCAL "\"kv_head_max_distance\":[[64,-1]],\"kv_head_sink_size\":[[16,3]]}",
         {{64, 16}, {0, 0}}},
        /* Distance 0 or 4096 of a global head, sinks from sink_size, a summary that is wrong. */
        {"{" LOCAL "\"kv_head_max_distance\":[[64,0]],\"sink_size\":4,"
         "\"summary\":{\"global\":77}}",
         {{64, 4}, {0, 0}}},
        {"{" LOCAL "\"kv_head_max_distance\":[[64,4096]],\"sink_size\":4,"
         "\"kv_head_sink_size\":null}",
         {{64, 4}, {0, 0}}},
        {"{" CLASSES "[[\"retrieval\",\"local_full\"]],\"kv_head_max_distance\":[[64,4096]]}",
         {{0, 0}, {0, 0}}},
        {"{" CLASSES "[[\"global\",\"global\"]]}", {{0, 0}, {0, 0}}},
        {"{" LOCAL "\"window\":96,\"sink_size\":0}", {{96, 0}, {0, 0}}},
        {"{" LOCAL "\"kv_head_max_distance\":[[64.0,-1.0]],\"sink_size\":4.0}", {{64, 4}, {0, 0}}},
        /* The first layers may be forced to see everything. */
        {"{" LOCAL "\"kv_head_max_distance\":[[64,-1]],\"sink_size\":4,"
         "\"dense_prefix_layers\":1}",
         {{0, 0}, {0, 0}}},
    };
    (void)state;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct recovery_head_map *map = NULL;
        struct rk_error error = {0};
        uint32_t global = 0;
        if (parse(cases[i].json, &map, &error) != RK_OK) {
            fail_msg("case %zu: %s", i, error.text);
        }
        for (uint32_t head = 0; head < 2; head++) {
            struct recovery_head read = recovery_head_map_get(map, 0, head);
            assert_int_equal(read.window, cases[i].heads[head].window);
            assert_int_equal(read.sink, cases[i].heads[head].sink);
            global += read.window == 0;
        }
        assert_int_equal(recovery_head_map_global_heads(map), global);
        recovery_head_map_destroy(map);
    }
}

static void bad_maps_are_refused(void **state)
{
    static const struct {
        const char *json;
        const char *named; /* in the message, beside the file */
    } cases[] = {
        {"", "line"},
        {"[]", "object"},
        {"{", "line"},
        {"{}", "kv_head_classification"},
        {"{\"num_layers\":2}", "num_layers"},
        {"{\"num_layers\":-1}", "num_layers"},
        {"{\"num_layers\":\"1\"}", "num_layers"},
        {"{\"num_kv_heads\":3}", "num_kv_heads"},
        {"{" CLASSES "[]}", "kv_head_classification"},
        {"{" CLASSES "[[\"local\"]]}", "kv_head_classification"},
        {"{" CLASSES "[[\"local\",\"global\"],[\"local\",\"global\"]]}", "kv_head_classification"},
        {"{" CLASSES "[[\"global\",1]]}", "kv_head_classification"},
        {"{" CLASSES "[[\"global\",\"other\"]]}", "other"},
        {"{" LOCAL "\"sink_size\":4}", "kv_head_max_distance"},
        {"{" LOCAL "\"kv_head_max_distance\":[[64,-1]]}", "kv_head_sink_size"},
        {"{" LOCAL "\"kv_head_max_distance\":[[0,-1]],\"sink_size\":4}", "kv_head_max_distance"},
        {"{" LOCAL "\"kv_head_max_distance\":[[-1,-1]],\"sink_size\":4}", "kv_head_max_distance"},
        {"{" LOCAL "\"kv_head_max_distance\":[[6.5,-1]],\"sink_size\":4}", "kv_head_max_distance"},
        {"{" LOCAL "\"kv_head_max_distance\":[[1e300,-1]],\"sink_size\":4}",
         "kv_head_max_distance"},
        {"{" LOCAL "\"kv_head_max_distance\":[[99999999999,-1]],\"sink_size\":4}",
         "kv_head_max_distance"},
        {"{" LOCAL "\"kv_head_max_distance\":[[NaN,-1]],\"sink_size\":4}", "line"},
        {"{" LOCAL "\"kv_head_max_distance\":[[\"64\",-1]],\"sink_size\":4}",
         "kv_head_max_distance"},
        {"{" LOCAL "\"kv_head_max_distance\":[64],\"sink_size\":4}", "kv_head_max_distance"},
        {"{" LOCAL "\"kv_head_max_distance\":[[64,-1]],\"sink_size\":-4}", "sink_size"},
        {"{" LOCAL "\"kv_head_max_distance\":[[64,-1]],\"kv_head_sink_size\":[[-1,0]]}",
         "kv_head_sink_size"},
        {"{" LOCAL "\"dense_prefix_layers\":-1,\"window\":9,\"sink_size\":4}",
         "dense_prefix_layers"},
        {"{" LOCAL "\"window\":9,\"window\":9,\"sink_size\":4}", "line"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct recovery_head_map *map = NULL;
        struct rk_error error = {0};
        assert_int_equal(parse(cases[i].json, &map, &error), RK_ERR_INVALID);
        assert_null(map);
        if (!strstr(error.text, "map.json") || !strstr(error.text, cases[i].named) ||
            strchr(error.text, '\n')) {
            fail_msg("case %zu: %s", i, error.text);
        }
    }
}

/* Nesting without end must cost a message, not the stack. */
static void deep_json_is_refused(void **state)
{
    enum { DEPTH = 1000000 };
    struct recovery_head_map *map = NULL;
    struct rk_error error = {0};
    char *json = malloc(DEPTH + 1);
    (void)state;

    assert_non_null(json);
    memset(json, '[', DEPTH);
    json[DEPTH] = '\0';
    assert_int_equal(parse(json, &map, &error), RK_ERR_INVALID);
    free(json);
}

static void files_are_read(void **state)
{
    struct recovery_head_map *map = NULL;
    struct rk_error error = {0};
    (void)state;

    assert_int_equal(recovery_head_map_load(REDKNOT_SOURCE_DIR "/tests/golden/reuse/head_map.json",
                                            30, 3, &map, &error),
                     RK_OK);
    struct recovery_head head = recovery_head_map_get(map, 0, 0);
    assert_int_equal(head.window, 64);
    assert_int_equal(head.sink, 16);
    assert_int_equal(recovery_head_map_get(map, 0, 1).window, 0);
    recovery_head_map_destroy(map);
    map = NULL;
    assert_int_equal(recovery_head_map_load("/nowhere/map.json", 30, 3, &map, &error), RK_ERR_IO);
    assert_non_null(strstr(error.text, "/nowhere/map.json"));
    assert_int_equal(recovery_head_map_load("/", 30, 3, &map, &error), RK_ERR_IO);
    assert_null(map);
}

static void survives_failed_allocations(void **state)
{
    static const char json[] = "{" LOCAL "\"window\":9,\"sink_size\":4}";
    struct recovery_head_map *map = NULL;
    (void)state;

    rk_alloc_fail_after(0);
    assert_int_equal(parse(json, &map, NULL), RK_ERR_NO_MEMORY);
    rk_alloc_fail_after(-1);
    assert_null(map);
    assert_int_equal(parse(json, &map, NULL), RK_OK);
    recovery_head_map_destroy(map);
    recovery_head_map_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(odd_maps_are_read),           cmocka_unit_test(bad_maps_are_refused),
        cmocka_unit_test(deep_json_is_refused),        cmocka_unit_test(files_are_read),
        cmocka_unit_test(survives_failed_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
