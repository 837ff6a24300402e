// The forward scan of sequences (see sequence.cuh). With several chunks `scan_ends` finds what each does to the state, and
// `scan_output` scans. `scan_both` does both in one launch where a chunk is no longer than two stages: its rows of B and C
// stay in shared memory meanwhile. A block waits for blocks of lower numbers: for the chunks of its team before its own,
// whose last one tells what the team does to the state, and for the teams before.
#include "sequence.cuh"

struct Args {
    const void *u, *delta, *z;
    Strides at_u, at_delta, at_z;
    Matrix B, C;
    const float *A, *D_skip, *bias;  // D_skip and bias may be null
    float *state, *dt_sum;  // (batch, places, D, N), (batch, places, D)
    void* out;
    float* last;
    i64 L;
    int D, groups, sets, length, chunks, places;  // places: of an image in `state` and `dt_sum`
    int combined;  // `state` is what chunks start with, not what they end with from zero
    int team;  // chunks that `scan_both` composes to one, which is in a place after the chunks
    int* ready;  // (batch, groups, sets, places) flags, 0 before `scan_both`
};

// What `count` chunks from place `first` on do to the state h, one after the other, and the sum of their dt.
__device__ __forceinline__ void compose(
    const Args& a, const Place& at, const float (&A)[P], int first, int count, float (&h)[P], float& sum
) {
#pragma unroll 4
    for (int i = 0; i < count; i++) {
        const i64 slot = (at.image * a.places + first + i) * a.D + at.channel;
        const float* from = a.state + slot * N + at.m * P;
        float end[P];
        if constexpr (P % 4 == 0 && N % P == 0) {
#pragma unroll
            for (int p = 0; p < P; p += 4) {
                const float4 x = load_fresh4(from + p);
                end[p] = x.x, end[p + 1] = x.y, end[p + 2] = x.z, end[p + 3] = x.w;
            }
        } else {
#pragma unroll
            for (int p = 0; p < P; p++) end[p] = at.m * P + p < N ? load_fresh(from + p) : 0.f;
        }
        const float dt = load_fresh(a.dt_sum + slot);
#pragma unroll
        for (int p = 0; p < P; p++) h[p] = fmaf(ex2(A[p] * dt), h[p], end[p]);
        sum += dt;
    }
}

__device__ __forceinline__ void publish(
    const Args& a, const Place& at, int* ready, int place, const float (&h)[P], float sum
) {
    const i64 slot = (at.image * a.places + place) * a.D + at.channel;
    store_own_states(a.state, slot, at.m, at.valid, h);
    if (at.valid && at.m == 0) a.dt_sum[slot] = sum;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) raise_flag(ready + place);
}

__device__ __forceinline__ void await(const int* ready, int first, int count) {
    for (int i = threadIdx.x; i < count; i += THREADS)
        while (!is_up(ready + first + i)) {}
    __syncthreads();
}

// Where a lane's values of the sequences begin.
struct Pointers {
    const Io<U_TYPE>::type* u;
    const Io<DELTA_TYPE>::type* delta;
    const Io<Z_TYPE>::type* z;
    Io<U_TYPE>::type* out;

    __device__ __forceinline__ Pointers(const Args& a, const Place& at) {
        const i64 first = at.begin + at.m * OWN;
        u = (const Io<U_TYPE>::type*)a.u + at.image * a.at_u.batch + at.channel * a.at_u.channel + first * a.at_u.position;
        delta = (const Io<DELTA_TYPE>::type*)a.delta + at.image * a.at_delta.batch + at.channel * a.at_delta.channel +
            first * a.at_delta.position;
        z = (const Io<Z_TYPE>::type*)a.z;
        if (GATED) z += at.image * a.at_z.batch + at.channel * a.at_z.channel + first * a.at_z.position;
        out = (Io<U_TYPE>::type*)a.out + (at.image * a.D + at.channel) * a.L + first;
    }
};

// Walks a chunk from state h. OUTPUT: writes out; else adds up dt. STAGES: stages B and C (where OUTPUT) on the way.
template <bool OUTPUT, bool STAGES>
__device__ __forceinline__ void walk(
    const Args& a, const Place& at, const Rows& rows, float* shared, Pointers from, const float (&A)[P], BC& bc,
    float bias, float skip, float (&h)[P], float& sum
) {
    Own<U_TYPE> next_u;
    Own<DELTA_TYPE> next_delta;
    Own<Z_TYPE> next_z;
    next_u.load(from.u, a.at_u.position, at.valid ? at.count - at.m * OWN : 0);
    next_delta.load(from.delta, a.at_delta.position, at.count - at.m * OWN);
    if (GATED && OUTPUT) next_z.load(from.z, a.at_z.position, at.count - at.m * OWN);
    for (int stage = 0; stage < at.count; stage += STAGE) {
        float* staged = shared + stage / STAGE % 2 * (STAGE * ROW);
        if (STAGES) {
            __syncthreads();  // this stage is there, and the one before it is done
            if (stage + STAGE < at.count)
                rows.stage<OUTPUT>(
                    a.B, a.C, stage + STAGE, at.count - stage - STAGE, shared + (stage / STAGE + 1) % 2 * (STAGE * ROW)
                );
        }
        for (int tile = stage; tile < min(stage + STAGE, at.count); tile += T) {
            const int valid = at.count - tile - at.m * OWN;
            const Own<U_TYPE> raw_u = next_u;
            const Own<DELTA_TYPE> raw_delta = next_delta;
            const Own<Z_TYPE> raw_z = next_z;
            if (tile + T < at.count) {
                from.u += T * a.at_u.position, from.delta += T * a.at_delta.position;
                next_u.load(from.u, a.at_u.position, at.valid ? valid - T : 0);
                next_delta.load(from.delta, a.at_delta.position, valid - T);
                if (GATED && OUTPUT) {
                    from.z += T * a.at_z.position;
                    next_z.load(from.z, a.at_z.position, valid - T);
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
                store_own<U_TYPE>(from.out, acc, at.valid ? valid : 0);
                from.out += T;
            }
        }
    }
}

// ENDS: finds the state at the end of a chunk from zero at its start, and the sum of dt. OUTPUT: writes out.
template <bool ENDS, bool OUTPUT>
__device__ __forceinline__ void scan(const Args& a) {
    DYNAMIC_SHARED(shared);
    const Place at(a.D, a.groups, a.sets, a.L, a.length, a.chunks);
    const bool is_last = at.chunk == a.chunks - 1;
    if (!OUTPUT && is_last) return;  // no chunk follows it
    const i64 slot = (at.image * a.places + at.chunk) * a.D + at.channel;
    float A[P], h[P] = {}, sum = 0.f;
    load_own_states(a.A, at.channel, at.m, A);
#pragma unroll
    for (int p = 0; p < P; p++) A[p] *= LOG2E;
    if (!ENDS && a.combined) load_own_states(a.state, slot, at.m, h);
    else if (!ENDS && a.chunks > 1) compose(a, at, A, 0, at.chunk, h, sum);
    const float skip = a.D_skip ? a.D_skip[at.channel] : 0.f, bias = a.bias ? a.bias[at.channel] : 0.f;
    BC bc(a.B, a.C, at.channel, at.m);
    const Rows rows(a.B, a.C, at);
    const Pointers from(a, at);
    for (int i = threadIdx.x; i < 2 * STAGE * ROW; i += THREADS) shared[i] = 0.f;  // what no state fills
    __syncthreads();
    rows.stage<OUTPUT>(a.B, a.C, 0, at.count, shared);
    if (ENDS && OUTPUT) {
        if (at.count > STAGE) rows.stage<true>(a.B, a.C, STAGE, at.count - STAGE, shared + STAGE * ROW);
        __syncthreads();
        int* ready = a.ready + ((at.image * a.groups + at.group) * a.sets + at.set) * a.places;
        if (!is_last) {
            walk<false, false>(a, at, rows, shared, from, A, bc, bias, skip, h, sum);
#pragma unroll
            for (int mask = 1; mask < M; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
            publish(a, at, ready, at.chunk, h, sum);
        }
        const int team = at.chunk / a.team, begin = team * a.team, before = at.chunk - begin;
        float own[P] = {}, own_sum = 0.f;  // the chunks of the team before this one
        await(ready, begin, before);
        compose(a, at, A, begin, before, own, own_sum);
        if (before == a.team - 1 && !is_last) {
#pragma unroll
            for (int p = 0; p < P; p++) h[p] = fmaf(ex2(A[p] * sum), own[p], h[p]);
            publish(a, at, ready, a.chunks + team, h, own_sum + sum);
        }
        await(ready, a.chunks, team);
#pragma unroll
        for (int p = 0; p < P; p++) h[p] = 0.f;
        compose(a, at, A, a.chunks, team, h, sum);
#pragma unroll
        for (int p = 0; p < P; p++) h[p] = fmaf(ex2(A[p] * own_sum), h[p], own[p]);
    }
    walk<OUTPUT, !(ENDS && OUTPUT)>(a, at, rows, shared, from, A, bc, bias, skip, h, sum);
    if (OUTPUT) {
        if (is_last) store_own_states(a.last, at.image * a.D + at.channel, at.m, at.valid, h);
        return;
    }
    store_own_states(a.state, slot, at.m, at.valid, h);
#pragma unroll
    for (int mask = 1; mask < M; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (at.valid && at.m == 0) a.dt_sum[slot] = sum;
}

extern "C" __global__ void LAUNCH_BOUNDS(THREADS, BLOCKS) scan_ends(const Args a) { scan<true, false>(a); }
extern "C" __global__ void LAUNCH_BOUNDS(THREADS, BLOCKS) scan_output(const Args a) { scan<false, true>(a); }
extern "C" __global__ void LAUNCH_BOUNDS(THREADS, BLOCKS) scan_both(const Args a) { scan<true, true>(a); }
