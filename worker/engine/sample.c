#include "worker/engine/engine.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

struct candidate {
    float weight; /* exp((logit - largest) / temperature) */
    uint32_t id;
};

/* splitmix64 (Steele, Lea, Flood 2014): any state is a good seed. */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* Uniform in [0, 1). */
static double next_unit(uint64_t *state)
{
    return (double)(next_random(state) >> 11) * 0x1p-53;
}

/* Lowest id among equals; a NaN is never chosen over a number. */
static int32_t largest(const float *logits, uint32_t vocab_size)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < vocab_size; i++) {
        if (logits[i] > logits[best] || (isnan(logits[best]) && !isnan(logits[i]))) {
            best = i;
        }
    }
    return (int32_t)best;
}

/* Larger weights first, then lower ids, so that a draw does not depend on how a heap is built. */
static bool comes_before(const struct candidate *a, const struct candidate *b)
{
    return a->weight > b->weight || (a->weight == b->weight && a->id < b->id);
}

static void sift_down(struct candidate *heap, uint32_t count, uint32_t at)
{
    struct candidate moved = heap[at];

    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= count) {
            break;
        }
        if (child + 1 < count && comes_before(&heap[child + 1], &heap[child])) {
            child++;
        }
        if (!comes_before(&heap[child], &moved)) {
            break;
        }
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = moved;
}

/* Moves the nucleus, best first, to the end of the heap's array; returns its size. */
static uint32_t pop_nucleus(struct candidate *heap, uint32_t count, double mass, double *ret_sum)
{
    uint32_t left = count;
    double sum = 0;

    for (uint32_t i = count / 2; i-- > 0;) {
        sift_down(heap, count, i);
    }
    while (left > 0 && (left == count || sum < mass)) {
        struct candidate best = heap[0];
        heap[0] = heap[--left];
        sift_down(heap, left, 0);
        heap[left] = best;
        sum += best.weight;
    }
    *ret_sum = sum;
    return count - left;
}

int32_t engine_sample(struct engine_sampler *sampler, const float *logits, uint32_t vocab_size,
                      void *scratch)
{
    struct candidate *heap = scratch;
    int32_t greedy = largest(logits, vocab_size);
    float top = logits[greedy];
    double total = 0;

    if (!(sampler->temperature > 0) || !isfinite(top)) {
        return greedy;
    }
    for (uint32_t i = 0; i < vocab_size; i++) {
        float weight = expf((logits[i] - top) / sampler->temperature);
        heap[i] = (struct candidate){isnan(weight) ? 0 : weight, i};
        total += heap[i].weight;
    }
    double draw = next_unit(&sampler->state);
    if (!(sampler->top_p < 1)) {
        /* The whole distribution: in id order, no need to sort. */
        double left = draw * total;
        for (uint32_t i = 0; i < vocab_size; i++) {
            left -= heap[i].weight;
            if (left < 0) {
                return (int32_t)i;
            }
        }
        return greedy;
    }
    double sum = 0;
    uint32_t kept = pop_nucleus(heap, vocab_size, sampler->top_p * total, &sum);
    double left = draw * sum;
    for (uint32_t i = 0; i < kept; i++) {
        const struct candidate *candidate = &heap[vocab_size - 1 - i];
        left -= candidate->weight;
        if (left < 0) {
            return (int32_t)candidate->id;
        }
    }
    return greedy; /* Rounding left a rest. */
}

bool engine_logits_finite(const float *logits, size_t count)
{
    uint32_t bad = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, logits + i, sizeof(bits));
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return bad == 0;
}

void engine_log_softmax(const float *logits, uint32_t vocab_size, float *out)
{
    double top = logits[largest(logits, vocab_size)];
    double sum = 0;

    for (uint32_t i = 0; i < vocab_size; i++) {
        sum += exp((double)logits[i] - top);
    }
    double shift = top + log(sum);
    for (uint32_t i = 0; i < vocab_size; i++) {
        out[i] = (float)((double)logits[i] - shift);
    }
}
