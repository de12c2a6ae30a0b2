/*
 * decode_merge: from the states of warps to outputs, or to partial results of a
 * split list, which the last block to arrive merges.
 */
#ifndef KERNELS_CUDA_DECODE_MERGE_CUH
#define KERNELS_CUDA_DECODE_MERGE_CUH

#include "kernels/cuda/decode_attend.cuh"

/* Where a merged row goes. */
struct merge_target {
    float *slot;        /* or, if NULL, out and lse */
    __nv_bfloat16 *out; /* of row 0 of the tile */
    float *lse;         /* of row 0 of the tile, or NULL */
    uint32_t group;
    uint32_t num_q_heads;
};

template <int HEAD_DIM>
DEVICE_CALL void row_store(const struct merge_target &to, uint32_t row, uint32_t column, float m,
                           float l, float4 o)
{
    if (to.slot != NULL) {
        __stcg((float4 *)(to.slot + 2 * TILE_ROWS_DECODE + row * HEAD_DIM + column), o);
        if (column == 0) {
            __stcg(to.slot + row, m);
            __stcg(to.slot + TILE_ROWS_DECODE + row, l);
        }
    } else {
        uint32_t head = row / to.group * to.num_q_heads + row % to.group;
        float inverse = l == 0 ? 0.0f : 1.0f / l;
        uint2 packed = make_uint2(pack_bf16(o.x * inverse, o.y * inverse),
                                  pack_bf16(o.z * inverse, o.w * inverse));

        *(uint2 *)(to.out + (size_t)head * HEAD_DIM + column) = packed;
        if (column == 0 && to.lse != NULL) {
            to.lse[head] = l == 0 ? -INFINITY : (m + log2f(l)) * LN_2;
        }
    }
}

DEVICE_CALL void add_scaled(float4 &o, float4 part, float factor)
{
    o.x += part.x * factor;
    o.y += part.y * factor;
    o.z += part.z * factor;
    o.w += part.w * factor;
}

/* Parts [0, count) of the workspace from `parts` on. Many loads in flight: this is all latency. */
template <class SHAPE, int HEAD_DIM>
DEVICE_CALL void parts_merge(const float *parts, int32_t count, uint32_t num_rows,
                             const struct merge_target &to, uint32_t thread)
{
    constexpr size_t SLOT = TILE_ROWS_DECODE * (HEAD_DIM + 2);

    for (uint32_t i = thread; i < num_rows * (HEAD_DIM / 4); i += CONSUMERS) {
        uint32_t row = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
        float m_all = -INFINITY, l_all = 0;
        float4 o_all = make_float4(0, 0, 0, 0);

        for (int32_t first = 0; first < count; first += MERGE_FAN_IN) {
            const float *part = parts + (size_t)first * SLOT;
            float m[MERGE_FAN_IN], l[MERGE_FAN_IN];
            float4 o[MERGE_FAN_IN];
            float m_new = m_all, factor;

#pragma unroll
            for (int s = 0; s < MERGE_FAN_IN; s++) {
                m[s] = -INFINITY;
                l[s] = 0;
                o[s] = make_float4(0, 0, 0, 0);
                if (first + s < count) {
                    const float *from = part + s * SLOT;

                    m[s] = __ldcg(from + row);
                    l[s] = __ldcg(from + TILE_ROWS_DECODE + row);
                    o[s] = __ldcg(
                        (const float4 *)(from + 2 * TILE_ROWS_DECODE + row * HEAD_DIM + column));
                }
            }
#pragma unroll
            for (int s = 0; s < MERGE_FAN_IN; s++) {
                m_new = fmaxf(m_new, m[s]);
            }
            factor = exp2_approx(m_all - exponent_base(m_new));
            m_all = m_new;
            l_all *= factor;
            o_all =
                make_float4(o_all.x * factor, o_all.y * factor, o_all.z * factor, o_all.w * factor);
#pragma unroll
            for (int s = 0; s < MERGE_FAN_IN; s++) {
                factor = exp2_approx(m[s] - exponent_base(m_new));
                l_all += l[s] * factor;
                add_scaled(o_all, o[s], factor);
            }
        }
        row_store<HEAD_DIM>(to, row, column, m_all, l_all, o_all);
    }
}

/* Rows 8 * h ... of a warp's state to its scratch. m and l of all warps follow their outputs. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void scratch_store(const struct warp_state<HEAD_DIM> &state, int h, float *scratch,
                               float *scratch_m, uint32_t lane)
{
    uint32_t g = lane / 4, t = lane % 4;
    float *row = scratch + g * SHAPE::SCRATCH_ROW;

#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        if (!E4M3) {
            *(float2 *)(row + 8 * n + 2 * t) =
                make_float2(state.o[n][2 * h], state.o[n][2 * h + 1]);
        } else if (n % 2 == 0) {
            /* Columns d and d + 1 stand in two blocks; see values_add(). */
            *(float4 *)(row + 8 * n + 4 * t) =
                make_float4(state.o[n][2 * h], state.o[n + 1][2 * h], state.o[n][2 * h + 1],
                            state.o[n + 1][2 * h + 1]);
        }
    }
    if (t == 0) {
        scratch_m[g] = state.m[h];
        scratch_m[PASS_ROWS + g] = state.l[h];
    }
}

/* Adds what scratch_store() of another warp left. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void scratch_add(struct warp_state<HEAD_DIM> &state, int h, const float *scratch,
                             const float *scratch_m, uint32_t lane)
{
    uint32_t g = lane / 4, t = lane % 4;
    const float *row = scratch + g * SHAPE::SCRATCH_ROW;
    float other = scratch_m[g];
    float m = fmaxf(state.m[h], other);
    float own = exp2_approx(state.m[h] - exponent_base(m));

    other = exp2_approx(other - exponent_base(m));
    state.m[h] = m;
    state.l[h] = state.l[h] * own + scratch_m[PASS_ROWS + g] * other;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++) {
        if (!E4M3) {
            float2 o = *(const float2 *)(row + 8 * n + 2 * t);

            state.o[n][2 * h] = state.o[n][2 * h] * own + o.x * other;
            state.o[n][2 * h + 1] = state.o[n][2 * h + 1] * own + o.y * other;
        } else if (n % 2 == 0) {
            float4 o = *(const float4 *)(row + 8 * n + 4 * t);

            state.o[n][2 * h] = state.o[n][2 * h] * own + o.x * other;
            state.o[n + 1][2 * h] = state.o[n + 1][2 * h] * own + o.y * other;
            state.o[n][2 * h + 1] = state.o[n][2 * h + 1] * own + o.z * other;
            state.o[n + 1][2 * h + 1] = state.o[n + 1][2 * h + 1] * own + o.w * other;
        }
    }
}

/* All warps' states to `to`. */
template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void warps_merge(struct warp_state<HEAD_DIM> &state, uint8_t *smem, uint32_t num_rows,
                             const struct merge_target &to, uint32_t thread)
{
    uint32_t warp = thread / 32, lane = thread % 32;
    uint32_t member = warp % TEAM_WARPS, team = warp / TEAM_WARPS;
    float *all = (float *)(smem + SHAPE::SCRATCH), *all_m = (float *)(smem + SHAPE::SCRATCH_M);
    float *own = all + member * SHAPE::SCRATCH_O;
    float *own_m = all_m + member * 2 * PASS_ROWS;

#pragma unroll
    for (int h = 0; h < 2; h++) {
        state.l[h] += __shfl_xor_sync(~0u, state.l[h], 1);
        state.l[h] += __shfl_xor_sync(~0u, state.l[h], 2);
    }
    if (E4M3) {
        output_scale<HEAD_DIM>(state, state.unit, state.unit);
    }
#pragma unroll
    for (int h = 0; h < TILE_ROWS_DECODE / PASS_ROWS; h++) {
        uint32_t first = h * PASS_ROWS;

        if (first >= num_rows) {
            break;
        }
        named_sync(1, CONSUMERS); /* what was in the scratch has been read */
        /* Scratch of one team is enough: later teams hand on to the one before. */
#pragma unroll
        for (uint32_t from = TEAMS - 1; from > 0; from--) {
            if (team == from) {
                scratch_store<SHAPE, HEAD_DIM, E4M3>(state, h, own, own_m, lane);
            }
            named_sync(1, CONSUMERS);
            if (team == from - 1) {
                scratch_add<SHAPE, HEAD_DIM, E4M3>(state, h, own, own_m, lane);
                __syncwarp(); /* m and l of a row are read by four lanes and written by one */
            }
        }
        if (team == 0) {
            scratch_store<SHAPE, HEAD_DIM, E4M3>(state, h, own, own_m, lane);
        }
        named_sync(1, CONSUMERS);

        uint32_t rows = min(num_rows - first, PASS_ROWS);

        for (uint32_t i = thread; i < rows * (HEAD_DIM / 4); i += CONSUMERS) {
            uint32_t row = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
            float m = -INFINITY, l = 0;
            float4 o = make_float4(0, 0, 0, 0);

#pragma unroll
            for (int w = 0; w < TEAM_WARPS; w++) {
                m = fmaxf(m, all_m[w * 2 * PASS_ROWS + row]);
            }
#pragma unroll
            for (int w = 0; w < TEAM_WARPS; w++) {
                const float *from = all_m + w * 2 * PASS_ROWS + row;
                float factor = exp2_approx(from[0] - exponent_base(m));

                l += from[PASS_ROWS] * factor;
                add_scaled(o,
                           *(const float4 *)(all + w * SHAPE::SCRATCH_O + row * SHAPE::SCRATCH_ROW +
                                             column),
                           factor);
            }
            row_store<HEAD_DIM>(to, first + row, column, m, l, o);
        }
    }
}

/* Whether this block is the last of `count` to come here; then what the others wrote is visible. */
DEVICE_CALL bool block_last(int32_t *counter, int32_t count, int32_t *flag, uint32_t thread)
{
    named_sync(1, CONSUMERS);
    if (thread == 0) {
        bool last = add_acquire_release(counter, 1) == count - 1;

        if (last) {
            *counter = 0; /* for the next launch */
        }
        *flag = last;
    }
    named_sync(1, CONSUMERS);
    return *flag != 0;
}

template <class SHAPE, int HEAD_DIM, bool E4M3>
DEVICE_CALL void item_finish(struct warp_state<HEAD_DIM> &state, const struct decode_params *p,
                             const struct plan_item &item, uint8_t *smem, uint32_t thread)
{
    constexpr size_t SLOT = TILE_ROWS_DECODE * (HEAD_DIM + 2);
    size_t head = (size_t)item.row * p->num_q_heads + (size_t)item.kv_head * p->group;
    uint32_t num_rows = item.tokens * p->group;
    int32_t *flag = (int32_t *)(smem + SHAPE::FLAG);
    struct merge_target output = {NULL, p->out + head * HEAD_DIM,
                                  p->lse == NULL ? NULL : p->lse + head, p->group, p->num_q_heads};
    struct merge_target to = output;
    float *slots = p->slots + (size_t)item.slot * SLOT;
    int32_t *counters = p->counters + item.counter;
    int32_t count = item.num_splits;

    if (count > 1) {
        to.slot = slots + (size_t)item.split * SLOT;
    }
    warps_merge<SHAPE, HEAD_DIM, E4M3>(state, smem, num_rows, to, thread);
    if (count == 1) {
        return;
    }
    if (count > MERGE_FAN_IN) {
        int32_t group = item.split / MERGE_FAN_IN, first = group * MERGE_FAN_IN;
        int32_t parts = min(count - first, MERGE_FAN_IN);

        if (!block_last(counters + 1 + group, parts, flag, thread)) {
            return;
        }
        slots += (size_t)count * SLOT;
        to.slot = slots + (size_t)group * SLOT;
        parts_merge<SHAPE, HEAD_DIM>(p->slots + (size_t)(item.slot + first) * SLOT, parts, num_rows,
                                     to, thread);
        count = (count + MERGE_FAN_IN - 1) / MERGE_FAN_IN;
    }
    if (block_last(counters, count, flag, thread)) {
        parts_merge<SHAPE, HEAD_DIM>(slots, count, num_rows, output, thread);
    }
}

#endif
