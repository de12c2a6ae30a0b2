/*
 * drive: short ways to run rows through an engine and to compare logits.
 * Failures end the test through cmocka. One thread.
 */
#ifndef TESTS_WORKER_ENGINE_DRIVE_H
#define TESTS_WORKER_ENGINE_DRIVE_H

#include "worker/engine/engine.h"
#include "worker/recovery/head_map.h"

/* Rows at positions[0..count) in calls of chunk rows; logits of positions >= want_from go to
 * logits one after another. ids: by absolute position. */
void drive_rows(struct engine *engine, struct engine_sequence *sequence,
                const struct recovery_head_map *map, const int32_t *ids, const uint32_t *positions,
                uint32_t count, uint32_t chunk, uint32_t want_from, float *logits);
/* The same for positions begin..end. */
void drive_range(struct engine *engine, struct engine_sequence *sequence,
                 const struct recovery_head_map *map, const int32_t *ids, uint32_t begin,
                 uint32_t end, uint32_t chunk, uint32_t want_from, float *logits);
/* One token, one row of logits, decode order. */
void drive_decode(struct engine *engine, struct engine_sequence *sequence,
                  const struct recovery_head_map *map, int32_t id, uint32_t position,
                  float *logits);
int32_t drive_best(const float *logits, uint32_t vocab);
/* KL(exp softmax(a) || softmax(b)) in nats. */
double drive_kl(const float *a, const float *b, uint32_t vocab);
float drive_distance(const float *a, const float *b,
                     size_t count); /* max abs; NaN counts as huge */

#endif
