// The forward scan of sequences (see sequence.cuh). With several chunks `scan_ends` finds what each does to the state.
#include "sequence.cuh"

struct Args {
    const void *u, *delta, *z;
    Strides at_u, at_delta, at_z;
    Matrix B, C;
    const float *A, *D_skip, *bias;  // D_skip and bias may be null
    float *state, *dt_sum;  // (batch, chunks, D, N), (batch, chunks, D)
    void* out;
    float* last;
    i64 L;
    int D, groups, sets, length, chunks;
    int combined;  // `state` is what chunks start with, not what they end with from zero
};

// The state that a chunk starts with, from the end states of those before it.
__device__ __forceinline__ void combine_before(const Args& a, const Place& at, const float (&A)[P], float (&h)[P]) {
#pragma unroll 4
    for (int i = 0; i < at.chunk; i++) {
        const i64 slot = (at.image * a.chunks + i) * a.D + at.channel;
        float end[P];
        if constexpr (P % 4 == 0 && N % P == 0) {  // whole vectors: neighbouring lanes' states lie side by side
            const float4* from = reinterpret_cast<const float4*>(a.state + slot * N + at.m * P);
#pragma unroll
            for (int p = 0; p < P; p += 4) {
                const float4 x = from[p / 4];
                end[p] = x.x, end[p + 1] = x.y, end[p + 2] = x.z, end[p + 3] = x.w;
            }
        } else {
            load_own_states(a.state, slot, at.m, end);
        }
        const float sum = a.dt_sum[slot];
#pragma unroll
        for (int p = 0; p < P; p++) h[p] = fmaf(ex2(A[p] * sum), h[p], end[p]);
    }
}

// OUTPUT false: finds the state at the end of a chunk from zero at its start, and the sum of dt. OUTPUT true: writes out.
template <bool OUTPUT>
__device__ __forceinline__ void scan(const Args& a) {
    DYNAMIC_SHARED(shared);
    const Place at(a.D, a.groups, a.sets, a.L, a.length, a.chunks);
    if (!OUTPUT && at.chunk == a.chunks - 1) return;  // no chunk follows it
    const i64 slot = (at.image * a.chunks + at.chunk) * a.D + at.channel;
    typedef Io<U_TYPE>::type io;
    const i64 first = at.begin + at.m * OWN;
    const io* u = (const io*)a.u + at.image * a.at_u.batch + at.channel * a.at_u.channel + first * a.at_u.position;
    const Io<DELTA_TYPE>::type* delta = (const Io<DELTA_TYPE>::type*)a.delta + at.image * a.at_delta.batch +
        at.channel * a.at_delta.channel + first * a.at_delta.position;
    const Io<Z_TYPE>::type* z = (const Io<Z_TYPE>::type*)a.z;
    if (GATED) z += at.image * a.at_z.batch + at.channel * a.at_z.channel + first * a.at_z.position;
    io* out = (io*)a.out + (at.image * a.D + at.channel) * a.L + first;

    float A[P], h[P] = {}, sum = 0.f;
    load_own_states(a.A, at.channel, at.m, A);
#pragma unroll
    for (int p = 0; p < P; p++) A[p] *= LOG2E;
    if (OUTPUT && a.combined) load_own_states(a.state, slot, at.m, h);
    else if (OUTPUT && a.chunks > 1) combine_before(a, at, A, h);
    const float skip = a.D_skip ? a.D_skip[at.channel] : 0.f, bias = a.bias ? a.bias[at.channel] : 0.f;
    BC bc(a.B, a.C, at.channel, at.m);
    const Rows rows(a.B, a.C, at);
    for (int i = threadIdx.x; i < 2 * STAGE * ROW; i += THREADS) shared[i] = 0.f;  // what no state fills
    __syncthreads();
    rows.stage<OUTPUT>(a.B, a.C, 0, at.count, shared);

    Own<U_TYPE> next_u;
    Own<DELTA_TYPE> next_delta;
    Own<Z_TYPE> next_z;
    next_u.load(u, a.at_u.position, at.valid ? at.count - at.m * OWN : 0);
    next_delta.load(delta, a.at_delta.position, at.count - at.m * OWN);
    if (GATED && OUTPUT) next_z.load(z, a.at_z.position, at.count - at.m * OWN);
    for (int stage = 0; stage < at.count; stage += STAGE) {
        float* staged = shared + stage / STAGE % 2 * (STAGE * ROW);
        __syncthreads();  // this stage is there, and the one before it is done
        if (stage + STAGE < at.count)
            rows.stage<OUTPUT>(
                a.B, a.C, stage + STAGE, at.count - stage - STAGE, shared + (stage / STAGE + 1) % 2 * (STAGE * ROW)
            );
        for (int tile = stage; tile < min(stage + STAGE, at.count); tile += T) {
            const int valid = at.count - tile - at.m * OWN;
            const Own<U_TYPE> raw_u = next_u;
            const Own<DELTA_TYPE> raw_delta = next_delta;
            const Own<Z_TYPE> raw_z = next_z;
            if (tile + T < at.count) {
                u += T * a.at_u.position, delta += T * a.at_delta.position;
                next_u.load(u, a.at_u.position, at.valid ? valid - T : 0);
                next_delta.load(delta, a.at_delta.position, valid - T);
                if (GATED && OUTPUT) {
                    z += T * a.at_z.position;
                    next_z.load(z, a.at_z.position, valid - T);
                }
            }
            float dt[OWN], dtu[OWN], slope[OWN], acc[T];
            step_sizes(raw_delta, bias, valid, dt, slope);
#pragma unroll
            for (int i = 0; i < OWN; i++) dtu[i] = dt[i] * raw_u[i], sum += dt[i];
#pragma unroll
            for (int t = 0; t < T; t++) {
                const float step = shown(dt, t, at.lane), input = shown(dtu, t, at.lane);
                bc.load(staged + (tile - stage + t) * ROW, at.m);
                acc[t] = 0.f;
#pragma unroll
                for (int p = 0; p < P; p++) {
                    h[p] = fmaf(ex2(step * A[p]), h[p], input * bc.B[p]);
                    if (OUTPUT) acc[t] = fmaf(bc.C[p], h[p], acc[t]);
                }
            }
            if (OUTPUT) {
                sum_over_states(acc, at.lane);
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    acc[i] = fmaf(skip, raw_u[i], acc[i]);
                    if (GATED) acc[i] *= raw_z[i] * reciprocal(1.f + ex2(-LOG2E * raw_z[i]));
                }
                store_own<U_TYPE>(out, acc, at.valid ? valid : 0);
                out += T;
            }
        }
    }
    if (OUTPUT) {
        if (at.chunk == a.chunks - 1) store_own_states(a.last, at.image * a.D + at.channel, at.m, at.valid, h);
        return;
    }
    store_own_states(a.state, slot, at.m, at.valid, h);
#pragma unroll
    for (int mask = 1; mask < M; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (at.valid && at.m == 0) a.dt_sum[slot] = sum;
}

extern "C" __global__ void LAUNCH_BOUNDS(THREADS, BLOCKS) scan_ends(const Args a) { scan<false>(a); }
extern "C" __global__ void LAUNCH_BOUNDS(THREADS, BLOCKS) scan_output(const Args a) { scan<true>(a); }
