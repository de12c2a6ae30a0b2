#include "tests/e2e/documents.h"

#include "tests/support/golden.h"

#include <stdlib.h>
#include <string.h>

#define POOL_MAX 65536

static int32_t pool[POOL_MAX];
static size_t pool_count;

static void add_cases(const char *file)
{
    json_t *root = golden_json(file);
    json_t *cases = golden_member(root, "cases");
    size_t index = 0;
    json_t *one = NULL;
    json_array_foreach (cases, index, one) {
        size_t count = 0;
        int32_t *ids = golden_ids(golden_member(one, "ids"), &count);
        if (pool_count + count <= POOL_MAX) {
            memcpy(pool + pool_count, ids, count * sizeof(*ids));
            pool_count += count;
        }
        free(ids);
    }
    json_decref(root);
}

const int32_t *documents_pool(size_t *ret_count)
{
    if (pool_count == 0) {
        add_cases("smollm2/prompts.json");
        add_cases("smollm2/tokenizer_pairs.json");
    }
    *ret_count = pool_count;
    return pool;
}

uint64_t documents_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void documents_cut(uint64_t *state, size_t num_tokens, int32_t *ret_ids)
{
    size_t count = 0;
    const int32_t *ids = documents_pool(&count);
    size_t from = documents_random(state) % count;
    for (size_t i = 0; i < num_tokens; i++) {
        ret_ids[i] = ids[(from + i) % count];
    }
}
