// Finds what a chunk does to the state and to its adjoint, and the state at the start of each part; see backward.cuh.

#include "backward.cuh"

extern "C" __global__ void LAUNCH_BOUNDS(64, BLOCKS) summary(const Args a) {
    DYNAMIC_SHARED(shared);
    const int warp = warp_number(), lane = threadIdx.x % 32;
    const int group = blockIdx.x % GROUPS, chunk = blockIdx.x / GROUPS;
    const int pair = a.first + blockIdx.y % a.pairs, k = pair + 2 * warp;
    const size_t image = blockIdx.y / a.pairs, pixels = image * a.H * a.W;
    const int L = a.H * a.W, begin = chunk * a.length, count = min(a.length, L - begin);
    const int parts = (L + S - 1) / S, first_part = begin / S, here = (count + S - 1) / S;
    const bool several = a.chunks > 1;  // otherwise only the states at the starts of parts are needed

    float* rows = shared + warp * T * JP;
    for (int i = lane; i < T * JP; i += 32) rows[i] = 0.f;
    const Channels my(group, k, a.A_log, a.dt_weight, a.dt_bias);
    const size_t slot = (image * 4 + k) * a.chunks + chunk;
    float h[Q][P] = {}, e[Q][P] = {}, decay[Q][P], sum[Q] = {};
#pragma unroll
    for (int p = 0; p < P; p++) decay[0][p] = decay[1][p] = 1.f;

    // Parts are cut from the chunk's first position on, so a backward walk meets the incomplete part first.
    Walk walk(a.H, a.W, pair, warp ? begin + count - 1 : begin, warp ? -1 : 1);
    const int head = warp ? count - (here - 1) * S : min(S, count);  // steps of the first part
    const Fetch fetch(a.proj + (pixels * 4 + k) * J, lane);
    const io* const maps[] = {keep(a.u + pixels * D + my.ch), keep(a.dy + pixels * D + my.ch)};
    Ahead<2> ahead;
    ahead.reach(fetch, maps, walk, 0, count, my);
    ahead.load(fetch, maps, walk, 0, my);
    int done = 0, end = head, part = 0;  // steps done, and the step at which this part ends
    while (done < count) {
        const int valid = end - done;
        __syncwarp();
        ahead.store_rows(fetch, rows);
        __syncwarp();
        Raw raw_u[T], raw_dy[T];
#pragma unroll
        for (int t = 0; t < T; t++) raw_u[t] = ahead.maps[0][t], raw_dy[t] = t < valid ? ahead.maps[1][t] : Raw{};
        const int next = min(done + T, end), next_end = next == end ? min(end + S, count) : end;
        if (next < count) {
            ahead.reach(fetch, maps, walk, next, count, my);
            ahead.load(fetch, maps, walk, next, my);
        }
        float dt[T][Q], slope[OWN];
        step_sizes(my, rows, valid, dt, slope);
#pragma unroll
        for (int t = 0; t < T; t++) {
            float s[SHARE];
            load_share(rows, t, my.m, s);
            const float2 u = unpack(raw_u[t]), dy = unpack(raw_dy[t]);
#pragma unroll
            for (int q = 0; q < Q; q++) {
                const float dtu = dt[t][q] * (q ? u.y : u.x), dy_q = q ? dy.y : dy.x;
#pragma unroll
                for (int p = 0; p < P; p++) {
                    const float step = ex2(dt[t][q] * my.A[q][p]);
                    h[q][p] = fmaf(step, h[q][p], dtu * s[RL + p]);
                    decay[q][p] *= step;
                    e[q][p] = fmaf(decay[q][p], s[RL + P + p] * dy_q, e[q][p]);
                }
                sum[q] += dt[t][q];
            }
        }
        done = next;
        if (done == end && done < count) {
            part++;
            end = next_end;
            const size_t at = (image * 4 + k) * parts + first_part + (warp ? here - 1 - part : part);
            store_states(a.part_h + at * N * D, my.m, my.ch, h);
            if (several && my.m == 0) store_pair_f(a.part_dt + at * D + my.ch, my.ch, make_float2(sum[0], sum[1]));
            if (!several && part == here - 1) return;
        }
    }
    if (!several) return;
    store_states(a.chunk_h + slot * N * D, my.m, my.ch, h);
    store_states(a.chunk_e + slot * N * D, my.m, my.ch, e);
    if (my.m == 0) store_pair_f(a.dt_sum + slot * D + my.ch, my.ch, make_float2(sum[0], sum[1]));
}
