// Before the gradients of sequences: the state before every tile, from zero at the chunk's start. With several chunks
// (CHUNKED) also what a chunk does to the state and, on the way back, to the adjoint of the state.
#include "sequence.cuh"

struct Args {
    const void *u, *delta, *z, *grad_out;
    Strides at_u, at_delta, at_z, at_grad_out;
    Matrix B, C;
    const float *A, *bias;  // bias may be null
    float *part_h, *part_dt;  // (batch, parts, D, N), and the sum of dt since the chunk's start (batch, parts, D)
    float *chunk_h, *chunk_e, *dt_sum;  // (batch, chunks, D, N) twice, (batch, chunks, D)
    i64 L, parts;
    int D, groups, sets, length, chunks, unused;
};

extern "C" __global__ void LAUNCH_BOUNDS(THREADS, BLOCKS) summary(const Args a) {
    DYNAMIC_SHARED(shared);
    const Place at(a.D, a.groups, a.sets, a.L, a.length, a.chunks);
    const i64 first = at.begin + at.m * OWN;
    const Io<U_TYPE>::type* u = (const Io<U_TYPE>::type*)a.u + at.image * a.at_u.batch + at.channel * a.at_u.channel +
        first * a.at_u.position;
    const Io<DELTA_TYPE>::type* delta = (const Io<DELTA_TYPE>::type*)a.delta + at.image * a.at_delta.batch +
        at.channel * a.at_delta.channel + first * a.at_delta.position;
    const Io<Z_TYPE>::type* z = (const Io<Z_TYPE>::type*)a.z;
    const Io<U_TYPE>::type* grad_out = (const Io<U_TYPE>::type*)a.grad_out;
    if (CHUNKED) {
        if (GATED) z += at.image * a.at_z.batch + at.channel * a.at_z.channel + first * a.at_z.position;
        grad_out += at.image * a.at_grad_out.batch + at.channel * a.at_grad_out.channel + first * a.at_grad_out.position;
    }
    // h, the decay since the chunk's start, and the adjoint that the chunk hands on.
    float A[P], h[P] = {}, decay[P], e[P] = {}, sum = 0.f;
    load_own_states(a.A, at.channel, at.m, A);
#pragma unroll
    for (int p = 0; p < P; p++) A[p] *= LOG2E, decay[p] = 1.f;
    const float bias = a.bias ? a.bias[at.channel] : 0.f;
    BC bc(a.B, a.C, at.channel, at.m);
    const Rows rows(a.B, a.C, at);
    for (int i = threadIdx.x; i < 2 * STAGE * ROW; i += THREADS) shared[i] = 0.f;  // what no state fills
    __syncthreads();
    rows.stage<CHUNKED>(a.B, a.C, 0, at.count, shared);

    Own<U_TYPE> next_u, next_grad;
    Own<DELTA_TYPE> next_delta;
    Own<Z_TYPE> next_z;
    auto load = [&](int valid) {
        next_u.load(u, a.at_u.position, at.valid ? valid : 0);
        next_delta.load(delta, a.at_delta.position, valid);
        if (CHUNKED) next_grad.load(grad_out, a.at_grad_out.position, valid);
        if (CHUNKED && GATED) next_z.load(z, a.at_z.position, valid);
    };
    load(at.count - at.m * OWN);
    i64 slot = (at.image * a.parts + at.begin / T) * a.D + at.channel;
    for (int stage = 0; stage < at.count; stage += STAGE) {
        float* staged = shared + stage / STAGE % 2 * (STAGE * ROW);
        __syncthreads();
        if (stage + STAGE < at.count)
            rows.stage<CHUNKED>(
                a.B, a.C, stage + STAGE, at.count - stage - STAGE, shared + (stage / STAGE + 1) % 2 * (STAGE * ROW)
            );
        for (int tile = stage; tile < min(stage + STAGE, at.count); tile += T) {
            const int valid = at.count - tile - at.m * OWN;
            const Own<U_TYPE> raw_u = next_u, raw_grad = next_grad;
            const Own<DELTA_TYPE> raw_delta = next_delta;
            const Own<Z_TYPE> raw_z = next_z;
            if (tile + T < at.count) {
                u += T * a.at_u.position, delta += T * a.at_delta.position;
                if (CHUNKED) grad_out += T * a.at_grad_out.position;
                if (CHUNKED && GATED) z += T * a.at_z.position;
                load(valid - T);
            }
            store_own_states(a.part_h, slot, at.m, at.valid, h);
            float dt[OWN], dtu[OWN], grad[OWN], slope[OWN], before = sum;
            step_sizes(raw_delta, bias, valid, dt, slope);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                dtu[i] = dt[i] * raw_u[i], sum += dt[i];
                if (!CHUNKED) continue;
                grad[i] = raw_grad[i];
                if (GATED) grad[i] *= raw_z[i] * reciprocal(1.f + ex2(-LOG2E * raw_z[i]));
            }
            if (CHUNKED) {
#pragma unroll
                for (int mask = 1; mask < M; mask *= 2) before += __shfl_xor_sync(~0u, before, mask);
                if (at.valid && at.m == 0) a.part_dt[slot] = before;
            }
            slot += a.D;
#pragma unroll
            for (int t = 0; t < T; t++) {
                const float step = shown(dt, t, at.lane), input = shown(dtu, t, at.lane);
                const float pull = CHUNKED ? shown(grad, t, at.lane) : 0.f;
                bc.load(staged + (tile - stage + t) * ROW, at.m);
#pragma unroll
                for (int p = 0; p < P; p++) {
                    const float by = ex2(step * A[p]);
                    h[p] = fmaf(by, h[p], input * bc.B[p]);
                    if (!CHUNKED) continue;
                    decay[p] *= by;
                    e[p] = fmaf(decay[p], pull * bc.C[p], e[p]);
                }
            }
        }
    }
    if (!CHUNKED) return;
    slot = (at.image * a.chunks + at.chunk) * a.D + at.channel;
    store_own_states(a.chunk_h, slot, at.m, at.valid, h);
    store_own_states(a.chunk_e, slot, at.m, at.valid, e);
#pragma unroll
    for (int mask = 1; mask < M; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (at.valid && at.m == 0) a.dt_sum[slot] = sum;
}
