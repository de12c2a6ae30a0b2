/*
 * decode_attend: a consumer warp of the decode kernel meets 16 keys of a page.
 */
#ifndef KERNELS_CUDA_DECODE_ATTEND_CUH
#define KERNELS_CUDA_DECODE_ATTEND_CUH

#include "kernels/cuda/decode_internal.cuh"

/* Running softmax of a warp, and its queries. Lane 4 * g + t has rows g and g + 8. */
template <int HEAD_DIM> struct warp_state {
    uint32_t q[HEAD_DIM / 16][4];
    float o[HEAD_DIM / 8][4]; /* in units of `unit` */
    float m[2];               /* of scores * scale * log2(e) */
    float l[2];               /* of this lane's keys */
    float unit;               /* scale of V, only e4m3 */
};

/* The rows of an item as one lane sees them. */
struct lane_rows {
    int32_t t[2];  /* position, -1 for a row that is not there: sees nothing */
    int32_t t_min; /* of all rows */
    int32_t t_max;
    int32_t window;
    int32_t sink;
};

/* q: rows g and g + 8 of the tile. What a row that is not there holds does not matter: nothing of
 * it is stored. */
template <int HEAD_DIM, bool E4M3>
DEVICE_CALL void queries_load(struct warp_state<HEAD_DIM> &state, const __nv_bfloat16 *const q[2],
                              uint32_t lane)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const __nv_bfloat16 *row = q[h] + (lane & 3) * (E4M3 ? 4 : 2);

#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            if (E4M3) {
                /* Four bytes of K in a row serve as both pairs of a lane; so do queries here. */
                uint2 pairs = *(const uint2 *)(row + 16 * k);

                state.q[k][h] = f16_from_bf16(pairs.x);
                state.q[k][2 + h] = f16_from_bf16(pairs.y);
            } else {
                state.q[k][h] = *(const uint32_t *)(row + 16 * k);
                state.q[k][2 + h] = *(const uint32_t *)(row + 16 * k + 8);
            }
        }
    }
}

/* Of the item's first variant, from its slot. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void queries_begin(struct warp_state<HEAD_DIM> &state, const struct item_slot *slot,
                               uint32_t lane)
{
    const uint8_t *first = (const uint8_t *)(slot + 1) + lane / 4 * SHAPE::QUERY_ROW;
    const __nv_bfloat16 *const q[2] = {(const __nv_bfloat16 *)first,
                                       (const __nv_bfloat16 *)(first + 8 * SHAPE::QUERY_ROW)};

    queries_load<HEAD_DIM, E4M3>(state, q, lane);
}

/* Of another variant, which few items have. */
template <int HEAD_DIM, bool E4M3>
DEVICE_CALL void queries_change(struct warp_state<HEAD_DIM> &state, const struct decode_params *p,
                                const struct plan_item &item, int32_t variant, uint32_t lane)
{
    const __nv_bfloat16 *q[2];

#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t i = lane / 4 + 8 * h, token = min(i / p->group, (uint32_t)item.tokens - 1);
        size_t row = (size_t)variant * p->rows + item.row + token;

        q[h] = p->q + (row * p->num_q_heads + item.kv_head * p->group + i % p->group) * HEAD_DIM;
    }
    queries_load<HEAD_DIM, E4M3>(state, q, lane);
}

/* Scores of 16 keys, s[n] keys 8 * n ..., not scaled. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void scores_compute(const struct warp_state<HEAD_DIM> &state, uint32_t keys,
                                float s[2][4])
{
    float odd[2][4] = {}; /* two chains of products, for latency */

#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[n][i] = 0;
        }
    }
    if (E4M3) {
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k += 2) {
            uint32_t b[4];

            ldmatrix_x4(b, keys ^ (k * 16));
#pragma unroll
            for (int n = 0; n < 2; n++) {
                multiply_f16(s[n], state.q[k], f16_from_e4m3(b[n]), f16_from_e4m3(b[n] >> 16));
                multiply_f16(odd[n], state.q[k + 1], f16_from_e4m3(b[2 + n]),
                             f16_from_e4m3(b[2 + n] >> 16));
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            uint32_t b[4];

            ldmatrix_x4(b, (keys ^ (k % 4 * 32)) + k / 4 * SHAPE::HALF_BYTES);
            multiply_bf16(k % 2 ? odd[0] : s[0], state.q[k], b[0], b[1]);
            multiply_bf16(k % 2 ? odd[1] : s[1], state.q[k], b[2], b[3]);
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[n][i] += odd[n][i];
        }
    }
}

/* o += p * V; bits of V that `keep` lacks count as zero. */
template <class SHAPE, int HEAD_DIM, bool E4M3, bool MASKED>
DEVICE_CALL void values_add(struct warp_state<HEAD_DIM> &state, uint32_t values,
                            const float s[2][4], const uint32_t keep[2])
{
    uint32_t a[4];

#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *pair = &s[i / 2][i % 2 * 2];

        a[i] = E4M3 ? pack_f16(pair[0], pair[1]) : pack_bf16(pair[0], pair[1]);
    }
    /* One load has 32 columns of e4m3, or 16 of bf16. */
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 16; n += E4M3 ? 2 : 1) {
        uint32_t b[4];

        if (E4M3) {
            ldmatrix_x4_trans(b, values ^ (n * 16));
        } else {
            ldmatrix_x4_trans(b, (values ^ (n % 4 * 32)) + n / 4 * SHAPE::HALF_BYTES);
        }
        if (MASKED) {
            b[0] &= keep[0];
            b[1] &= keep[1];
            b[2] &= keep[0];
            b[3] &= keep[1];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if constexpr (E4M3) {
                /* {d, d + 1} of a key, then of the next: d of both keys, then d + 1 of both. */
                uint32_t b0 = __byte_perm(b[2 * i], 0, 0x3120);
                uint32_t b1 = __byte_perm(b[2 * i + 1], 0, 0x3120);

                multiply_f16(state.o[2 * (n + i)], a, f16_from_e4m3(b0), f16_from_e4m3(b1));
                multiply_f16(state.o[2 * (n + i) + 1], a, f16_from_e4m3(b0 >> 16),
                             f16_from_e4m3(b1 >> 16));
            } else {
                multiply_bf16(state.o[2 * n + i], a, b[2 * i], b[2 * i + 1]);
            }
        }
    }
}

template <int HEAD_DIM>
DEVICE_CALL void output_scale(struct warp_state<HEAD_DIM> &state, float low, float high)
{
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        state.o[n][0] *= low;
        state.o[n][1] *= low;
        state.o[n][2] *= high;
        state.o[n][3] *= high;
    }
}

/* What is -inf stays so without a NaN: exp2(-inf - 0) = 0. */
DEVICE_CALL float exponent_base(float m)
{
    return m == -INFINITY ? 0.0f : m;
}

/* Turns scores into weights and moves m, l and o on to the new maximum. */
template <int HEAD_DIM>
DEVICE_CALL void softmax_step(struct warp_state<HEAD_DIM> &state, float s[2][4])
{
    float factor[2];
    bool moved = false;

#pragma unroll
    for (int h = 0; h < 2; h++) {
        float m = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
        float base;

        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        m = fmaxf(m, state.m[h]);
        moved |= m != state.m[h];
        base = exponent_base(m);
        factor[h] = exp2_approx(state.m[h] - base);
        state.m[h] = m;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            s[n][2 * h] = exp2_approx(s[n][2 * h] - base);
            s[n][2 * h + 1] = exp2_approx(s[n][2 * h + 1] - base);
        }
        state.l[h] = state.l[h] * factor[h] +
                     ((s[0][2 * h] + s[0][2 * h + 1]) + (s[1][2 * h] + s[1][2 * h + 1]));
    }
    if (__any_sync(~0u, moved)) {
        output_scale<HEAD_DIM>(state, factor[0], factor[1]);
    }
}

/* Positions of a lane's keys: 8 * n + 2 * t + i of the warp's 16, at c[n][i]. */
DEVICE_CALL void key_positions(const struct decode_params *p, const struct stage_info &info,
                               uint32_t key, uint32_t lane, int32_t c[2][2])
{
    uint32_t row = key + 2 * (lane & 3);

#pragma unroll
    for (int n = 0; n < 2; n++) {
        if (info.positions >= 0) {
            int2 pair =
                __ldg((const int2 *)(p->explicit_positions +
                                     (size_t)info.positions * RK_PAGE_TOKENS + row + 8 * n));

            c[n][0] = pair.x;
            c[n][1] = pair.y;
        } else {
            c[n][0] = info.position + (int32_t)row + 8 * n;
            c[n][1] = c[n][0] + 1;
        }
    }
}

/* 16 keys of one page, from row `key` on. keys, values: where this lane's matrix rows begin. */
template <class SHAPE, int HEAD_DIM, bool E4M3, bool MASKED>
DEVICE_CALL void keys_attend(struct warp_state<HEAD_DIM> &state, const struct decode_params *p,
                             const struct lane_rows &rows, const struct stage_info &info,
                             uint32_t keys, uint32_t values, uint32_t key, uint32_t lane)
{
    float scale = E4M3 ? p->scale_log2 * info.scale_k : p->scale_log2;
    int32_t c[2][2];
    uint32_t keep[2] = {~0u, ~0u};
    float s[2][4];

    if (MASKED) {
        key_positions(p, info, key, lane, c);
    }
    scores_compute<SHAPE, HEAD_DIM, E4M3>(state, keys, s);
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[n][i] *= scale;
        }
    }
    if (MASKED) {
        uint32_t live = (uint32_t)(info.live >> key) >> (2 * (lane & 3));

#pragma unroll
        for (int n = 0; n < 2; n++) {
            keep[n] = 0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                bool alive = live >> (8 * n + i) & 1;

                if (alive && c[n][i] <= rows.t_max) {
                    keep[n] |= 0xffffu << (16 * i);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    bool visible = alive && c[n][i] <= rows.t[h] &&
                                   (rows.window == 0 || c[n][i] > rows.t[h] - rows.window ||
                                    c[n][i] < rows.sink);

                    s[n][2 * h + i] = visible ? s[n][2 * h + i] : -INFINITY;
                }
            }
        }
    }
    softmax_step<HEAD_DIM>(state, s);
    if (E4M3) {
        /* Weights times the scale of V must fit f16: relative to `unit`, which moves rarely. */
        float ratio = __fdividef(info.scale_v, state.unit);

        if (info.scale_v > 0 && !(ratio > 1.0f / 16 && ratio < 16)) {
            float factor = state.unit / info.scale_v;

            output_scale<HEAD_DIM>(state, factor, factor);
            state.unit = info.scale_v;
            ratio = 1;
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] *= ratio;
            }
        }
    }
    values_add<SHAPE, HEAD_DIM, E4M3, MASKED>(state, values, s, keep);
}

enum page_view { PAGE_UNSEEN, PAGE_MASKED, PAGE_WHOLE };

/* What the rows see of the 16 keys from `key` on; the same for all lanes. */
DEVICE_CALL enum page_view keys_view(const struct lane_rows &rows, const struct stage_info &info,
                                     uint32_t key)
{
    uint32_t live = (uint32_t)(info.live >> key) & 0xffff;
    int32_t first = info.position + (int32_t)key;
    int32_t last = first + WARP_KEYS - 1;

    if (live == 0) {
        return PAGE_UNSEEN;
    }
    if (info.positions >= 0) {
        return PAGE_MASKED;
    }
    if (first > rows.t_max ||
        (rows.window != 0 && last <= rows.t_min - rows.window && first >= rows.sink)) {
        return PAGE_UNSEEN;
    }
    if (live == 0xffff && last <= rows.t_min &&
        (rows.window == 0 || first > rows.t_max - rows.window || last < rows.sink)) {
        return PAGE_WHOLE;
    }
    return PAGE_MASKED;
}

#endif
