// The gradients of the scan of sequences. A block walks a chunk backwards, tile by tile: forwards through the tile from the
// state before it, keeping states and decays, then backwards. With g the gradient of the loss for h[t], including
// everything after position t:
//
//     g += C[t] gy[t]                                dC[t] = sum over channels of gy[t] h[t]
//     d(dt u)[t] = sum over states of g B[t]         dB[t] = sum over channels of g dt[t] u[t]
//     e = g a[t] h[t-1], the gradient for A dt       d(dt)[t] = sum over states of e A,  dA += e dt[t]
//     g = g a[t], handed to t - 1
//
// Sums over channels go through exchanges within a warp, then through shared memory; each block writes its share of them.
#include "sequence.cuh"

struct Args {
    const void *u, *delta, *z, *grad_out;
    Strides at_u, at_delta, at_z, at_grad_out;
    Matrix B, C;
    const float *A, *D_skip, *bias;  // the last two may be null
    const float *part_h, *part_dt;  // see sequence_summary.cu
    const float *chunk_h, *chunk_e;  // with several chunks: the state that each starts with, the adjoint that it ends with
    const float* grad_last;  // (batch, D, N) or null; not read where there are several chunks
    void *grad_u, *grad_delta, *grad_z;  // contiguous
    float* shares;  // (B and C where they vary, batch, groups, sets, N, L)
    float* params;  // (batch, chunks, D, KINDS): dA, dB and dC where they do not vary, dD, d(delta_bias)
    i64 L, parts, rows;  // rows: batch * groups * sets
    int D, groups, sets, length, chunks, unused;
};

constexpr int V = VARYING * P;
constexpr int SLOT = VARYING * N + 1;  // an odd number, so that a warp reads neighbouring positions from all banks
constexpr int KINDS = (3 - VARYING) * N + 2;

// Adds up what the block's warps found for a stage's positions, and writes it.
__device__ __forceinline__ void sum_stage(const Args& a, const Place& at, const float* slots, int stage) {
    const int count = min(STAGE, at.count - stage);
    const i64 row = (at.image * a.groups + at.group) * a.sets + at.set;
    for (int i = threadIdx.x; i < VARYING * N * STAGE; i += THREADS) {
        const int t = i % STAGE, n = i / STAGE;
        if (t >= count) continue;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += slots[(w * STAGE + t) * SLOT + n];
        a.shares[((n / N * a.rows + row) * N + n % N) * a.L + at.begin + stage + t] = sum;
    }
}

extern "C" __global__ void LAUNCH_BOUNDS(THREADS, BLOCKS) gradient(const Args a) {
    DYNAMIC_SHARED(shared);
    const Place at(a.D, a.groups, a.sets, a.L, a.length, a.chunks);
    typedef Io<U_TYPE>::type io;
    const int last_tile = (at.count - 1) / T * T;
    const i64 first = at.begin + at.m * OWN + last_tile;
    const io* u = (const io*)a.u + at.image * a.at_u.batch + at.channel * a.at_u.channel + first * a.at_u.position;
    const Io<DELTA_TYPE>::type* delta = (const Io<DELTA_TYPE>::type*)a.delta + at.image * a.at_delta.batch +
        at.channel * a.at_delta.channel + first * a.at_delta.position;
    const Io<Z_TYPE>::type* z = (const Io<Z_TYPE>::type*)a.z;
    if (GATED) z += at.image * a.at_z.batch + at.channel * a.at_z.channel + first * a.at_z.position;
    const io* grad_out = (const io*)a.grad_out + at.image * a.at_grad_out.batch + at.channel * a.at_grad_out.channel +
        first * a.at_grad_out.position;
    const i64 written = (at.image * a.D + at.channel) * a.L + first;
    io* grad_u = (io*)a.grad_u + written;
    Io<DELTA_TYPE>::type* grad_delta = (Io<DELTA_TYPE>::type*)a.grad_delta + written;
    Io<Z_TYPE>::type* grad_z = (Io<Z_TYPE>::type*)a.grad_z;
    if (GATED) grad_z += written;

    float A[P], start[P] = {}, pulled[P] = {}, dA[P] = {}, dB[P] = {}, dC[P] = {}, sum_D = 0.f, sum_bias = 0.f;
    load_own_states(a.A, at.channel, at.m, A);
#pragma unroll
    for (int p = 0; p < P; p++) A[p] *= LOG2E;
    const i64 of_chunk = (at.image * a.chunks + at.chunk) * a.D + at.channel;
    if (CHUNKED) {
        load_own_states(a.chunk_h, of_chunk, at.m, start);
        load_own_states(a.chunk_e, of_chunk, at.m, pulled);
    } else if (a.grad_last) {
        load_own_states(a.grad_last, at.image * a.D + at.channel, at.m, pulled);
    }
    const float skip = a.D_skip ? a.D_skip[at.channel] : 0.f, bias = a.bias ? a.bias[at.channel] : 0.f;
    BC bc(a.B, a.C, at.channel, at.m);
    const Rows rows(a.B, a.C, at);
    float* slots = shared + 2 * STAGE * ROW;
    for (int i = threadIdx.x; i < 2 * STAGE * ROW; i += THREADS) shared[i] = 0.f;  // what no state fills
    __syncthreads();
    const int last_stage = (at.count - 1) / STAGE * STAGE;
    rows.stage<true>(a.B, a.C, last_stage, at.count - last_stage, shared + last_stage / STAGE % 2 * (STAGE * ROW));

    Own<U_TYPE> next_u, next_grad;
    Own<DELTA_TYPE> next_delta;
    Own<Z_TYPE> next_z;
    float next_h[P], next_dt = 0.f;
    i64 slot = (at.image * a.parts + (at.begin + last_tile) / T) * a.D + at.channel;
    auto load = [&](int valid) {
        next_u.load(u, a.at_u.position, at.valid ? valid : 0);
        next_delta.load(delta, a.at_delta.position, valid);
        next_grad.load(grad_out, a.at_grad_out.position, at.valid ? valid : 0);
        if (GATED) next_z.load(z, a.at_z.position, valid);
        load_own_states(a.part_h, slot, at.m, next_h);
        if (CHUNKED) next_dt = a.part_dt[slot];
    };
    load(at.count - last_tile - at.m * OWN);
    for (int stage = last_stage; stage >= 0; stage -= STAGE) {
        float* staged = shared + stage / STAGE % 2 * (STAGE * ROW);
        __syncthreads();  // this stage is there; the one before it is done, and its sums are written
        if (stage > 0)
            rows.stage<true>(a.B, a.C, stage - STAGE, STAGE, shared + (stage / STAGE + 1) % 2 * (STAGE * ROW));
        for (int tile = min(stage + STAGE - T, last_tile); tile >= stage; tile -= T) {
            const int valid = at.count - tile - at.m * OWN;
            const Own<U_TYPE> raw_u = next_u, raw_grad = next_grad;
            const Own<DELTA_TYPE> raw_delta = next_delta;
            const Own<Z_TYPE> raw_z = next_z;
            float h[P];
#pragma unroll
            for (int p = 0; p < P; p++) h[p] = CHUNKED ? fmaf(ex2(A[p] * next_dt), start[p], next_h[p]) : next_h[p];
            if (tile > 0) {
                u -= T * a.at_u.position, delta -= T * a.at_delta.position, grad_out -= T * a.at_grad_out.position;
                if (GATED) z -= T * a.at_z.position;
                slot -= a.D;
                load(valid + T);
            }
            float dt[OWN], dtu[OWN], slope[OWN], grad[OWN], silu_slope[OWN];
            step_sizes(raw_delta, bias, valid, dt, slope);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                dtu[i] = dt[i] * raw_u[i], grad[i] = raw_grad[i];
                if (!GATED) continue;
                const float s = reciprocal(1.f + ex2(-LOG2E * raw_z[i]));
                grad[i] *= raw_z[i] * s, silu_slope[i] = s * fmaf(raw_z[i], 1.f - s, 1.f);
            }
            float before[T][P], decay[T][P], acc[T];
#pragma unroll
            for (int t = 0; t < T; t++) {
                const float step = shown(dt, t, at.lane), input = shown(dtu, t, at.lane);
                bc.load(staged + (tile - stage + t) * ROW, at.m);
                acc[t] = 0.f;
#pragma unroll
                for (int p = 0; p < P; p++) {
                    before[t][p] = h[p], decay[t][p] = ex2(step * A[p]);
                    h[p] = fmaf(decay[t][p], h[p], input * bc.B[p]);
                    if (GATED) acc[t] = fmaf(bc.C[p], h[p], acc[t]);
                }
            }
            if (GATED) {
                sum_over_states(acc, at.lane);
#pragma unroll
                for (int i = 0; i < OWN; i++) acc[i] = fmaf(skip, raw_u[i], acc[i]) * raw_grad[i] * silu_slope[i];
                store_own<Z_TYPE>(grad_z, acc, at.valid ? valid : 0);
                grad_z -= T;
            }
            float to_dt[T], to_dtu[T];
#pragma unroll
            for (int t = T - 1; t >= 0; t--) {
                const float step = shown(dt, t, at.lane), input = shown(dtu, t, at.lane), pull = shown(grad, t, at.lane);
                bc.load(staged + (tile - stage + t) * ROW, at.m);
                float products[V + 1];
                to_dt[t] = to_dtu[t] = 0.f;
#pragma unroll
                for (int p = 0; p < P; p++) {
                    float g = fmaf(bc.C[p], pull, pulled[p]);
                    if (VARIES_C) products[VARIES_B * P + p] = h[p] * pull;
                    else dC[p] = fmaf(h[p], pull, dC[p]);
                    if (VARIES_B) products[p] = g * input;
                    else dB[p] = fmaf(g, input, dB[p]);
                    to_dtu[t] = fmaf(g, bc.B[p], to_dtu[t]);
                    g *= decay[t][p];
                    pulled[p] = g;
                    h[p] = before[t][p];
                    g *= h[p];
                    to_dt[t] = fmaf(g, A[p], to_dt[t]);
                    dA[p] = fmaf(g, step, dA[p]);
                }
                if (VARYING) {
                    int base = 0, held = V;
                    reduce_scatter<V, 16, M>(products, at.lane, base, held);
                    float* to = slots + (at.warp * STAGE + tile - stage + t) * SLOT;
#pragma unroll
                    for (int i = 0; i < (V + CH - 1) / CH; i++) {
                        const int of = (base + i) / P, n = at.m * P + (base + i) % P;
                        if (i < held && n < N) to[of * N + n] = products[i];
                    }
                }
            }
            sum_over_states(to_dt, at.lane);
            sum_over_states(to_dtu, at.lane);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const float to_delta = fmaf(to_dt[i], LN2, to_dtu[i] * raw_u[i]) * slope[i];
                to_dt[i] = to_delta;
                to_dtu[i] = fmaf(to_dtu[i], dt[i], skip * grad[i]);
                sum_D = fmaf(grad[i], raw_u[i], sum_D), sum_bias += to_delta;
            }
            store_own<U_TYPE>(grad_u, to_dtu, at.valid ? valid : 0);
            store_own<DELTA_TYPE>(grad_delta, to_dt, at.valid ? valid : 0);
            grad_u -= T, grad_delta -= T;
        }
        if (VARYING) {
            __syncthreads();
            sum_stage(a, at, slots, stage);
        }
    }
    float* params = a.params + of_chunk * KINDS;
#pragma unroll
    for (int p = 0; p < P; p++) {
        const int n = at.m * P + p;
        if (!at.valid || n >= N) continue;
        params[n] = dA[p];
        if (!VARIES_B) params[N + n] = dB[p];
        if (!VARIES_C) params[(2 - VARIES_B) * N + n] = dC[p];
    }
#pragma unroll
    for (int mask = 1; mask < M; mask *= 2) {
        sum_D += __shfl_xor_sync(~0u, sum_D, mask);
        sum_bias += __shfl_xor_sync(~0u, sum_bias, mask);
    }
    if (at.valid && at.m == 0) params[KINDS - 2] = sum_D, params[KINDS - 1] = sum_bias;
}
