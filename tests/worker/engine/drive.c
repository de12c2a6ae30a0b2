#include "tests/worker/engine/drive.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

void drive_rows(struct engine *engine, struct engine_sequence *sequence,
                const struct recovery_head_map *map, const int32_t *ids, const uint32_t *positions,
                uint32_t count, uint32_t chunk, uint32_t want_from, float *logits)
{
    struct engine_row rows[KERNELS_ROWS_MAX];
    struct rk_error error = {0};

    for (uint32_t begin = 0; begin < count; begin += chunk) {
        struct engine_item item = {sequence, rows, 0, map};
        size_t wanted = 0;
        for (uint32_t i = begin; i < count && i < begin + chunk; i++) {
            bool want = positions[i] >= want_from;
            rows[item.num_rows++] = (struct engine_row){ids[positions[i]], positions[i], want};
            wanted += want;
        }
        if (engine_forward(engine, &item, 1, false, logits, &error) != RK_OK) {
            fail_msg("%s", error.text);
        }
        if (wanted > 0) { /* logits may be NULL otherwise */
            logits += wanted * engine_vocab_size(engine);
        }
    }
}

void drive_range(struct engine *engine, struct engine_sequence *sequence,
                 const struct recovery_head_map *map, const int32_t *ids, uint32_t begin,
                 uint32_t end, uint32_t chunk, uint32_t want_from, float *logits)
{
    uint32_t *positions = malloc((end - begin + 1) * sizeof(*positions));
    assert_non_null(positions);
    for (uint32_t i = begin; i < end; i++) {
        positions[i - begin] = i;
    }
    drive_rows(engine, sequence, map, ids, positions, end - begin, chunk, want_from, logits);
    free(positions);
}

void drive_decode(struct engine *engine, struct engine_sequence *sequence,
                  const struct recovery_head_map *map, int32_t id, uint32_t position, float *logits)
{
    const struct engine_row row = {id, position, true};
    const struct engine_item item = {sequence, &row, 1, map};
    struct rk_error error = {0};
    if (engine_forward(engine, &item, 1, true, logits, &error) != RK_OK) {
        fail_msg("%s", error.text);
    }
}

int32_t drive_best(const float *logits, uint32_t vocab)
{
    struct engine_sampler greedy = {0, 1, 0};
    return engine_sample(&greedy, logits, vocab, NULL);
}

double drive_kl(const float *a, const float *b, uint32_t vocab)
{
    float *log_a = malloc(vocab * sizeof(*log_a));
    float *log_b = malloc(vocab * sizeof(*log_b));
    double kl = 0;

    assert_non_null(log_a);
    assert_non_null(log_b);
    engine_log_softmax(a, vocab, log_a);
    engine_log_softmax(b, vocab, log_b);
    for (uint32_t i = 0; i < vocab; i++) {
        kl += exp((double)log_a[i]) * ((double)log_a[i] - (double)log_b[i]);
    }
    free(log_a);
    free(log_b);
    return kl;
}

float drive_distance(const float *a, const float *b, size_t count)
{
    float distance = 0;
    for (size_t i = 0; i < count; i++) {
        float one = fabsf(a[i] - b[i]);
        if (!(one <= distance)) {
            distance = isnan(one) ? INFINITY : one;
        }
    }
    return distance;
}
