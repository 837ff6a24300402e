// Turns what chunks do to the state (end state from zero, sum of dt) in place into the state that each one starts with.
// If there are many chunks this is done in segments: `fold`, `combine` of the segments, `combine` of each one's chunks.

#include "common.cuh"

struct CombineArgs {
    float *h, *e;  // (batch, 4, chunks, N, D): the state, and its adjoint (or null), which walks the other way
    const float *dt_sum, *A_log;  // (batch, 4, chunks, D), (4, D, N)
    // The same for segments of `segment` chunks: first what they do, found by `fold`, then what they start with.
    float *segment_h, *segment_e, *segment_dt;
    int chunks, first, pairs;
    int columns, parts;  // numbers of the state per block; parts of a segment, each first combined by itself
    int segment, segments;
};

constexpr int PARTS = 32;

// FOLD: finds what a segment does to the state. Otherwise writes the states that its chunks start with, in place.
template <bool FOLD>
__device__ __forceinline__ void combine_segment(const CombineArgs& a) {
    __shared__ float ends[1024], sums[1024];
    const int blocks = (N * D + a.columns - 1) / a.columns, segment = blockIdx.x / blocks;
    const int part = threadIdx.x / a.columns, column = threadIdx.x % a.columns;
    const int x = blockIdx.x % blocks * a.columns + column, n = x / D, ch = x % D;
    const int direction = blockIdx.y % (2 * a.pairs), k = a.first + direction % a.pairs + direction / a.pairs * 2;
    const size_t image = blockIdx.y / (2 * a.pairs), walk = image * 4 + k;
    const bool adjoint = blockIdx.z, known = n < N;
    // Chunks are taken in the order in which the state, or its adjoint, goes through them.
    const bool down = (k >= 2) != adjoint;
    const int low = segment * a.segment, high = min(low + a.segment, a.chunks);
    // The end state of the last segment, like that of the last chunk, goes nowhere and may not have been written.
    if (FOLD && segment == (down ? 0 : a.segments - 1)) return;
    float* states = (adjoint ? a.e : a.h) + walk * a.chunks * N * D + x;
    const float* dt_sum = a.dt_sum + walk * a.chunks * D + ch;
    float* whole = (adjoint ? a.segment_e : a.segment_h) + (walk * a.segments + segment) * N * D + x;
    const float A = known ? -LOG2E * ex2(LOG2E * a.A_log[(size_t)(k * D + ch) * N + n]) : 0.f;
    const int size = (high - low + a.parts - 1) / a.parts;
    const int from = min(part * size, high - low), to = min(from + size, high - low);
    const int last = !FOLD && (down ? low == 0 : high == a.chunks) ? high - low - 1 : a.chunks;
    float state = 0.f, sum = 0.f;
    if (known && (FOLD || a.parts > 1)) {
#pragma unroll 8
        for (int i = from; i < to; i++) {
            const size_t c = down ? high - 1 - i : low + i;
            const float dt = i == last ? 0.f : dt_sum[c * D];
            state = fmaf(ex2(A * dt), state, i == last ? 0.f : states[c * N * D]);
            sum += dt;
        }
    }
    ends[threadIdx.x] = state;
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (!known || (FOLD && part != a.parts - 1)) return;
    float before = !FOLD && a.segments > 1 ? *whole : 0.f, until = 0.f;
    for (int i = column; i < part * a.columns; i += a.columns) {
        before = fmaf(ex2(A * sums[i]), before, ends[i]);
        until += sums[i];
    }
    if (FOLD) {
        *whole = fmaf(ex2(A * sum), before, state);
        // The state writes it. For the segment that the state leaves out the adjoint does, which goes the other way.
        const bool whose = adjoint ? segment == (down ? a.segments - 1 : 0) : true;
        if (n == 0 && whose) a.segment_dt[(walk * a.segments + segment) * D + ch] = until + sum;
        return;
    }
#pragma unroll 8
    for (int i = from; i < to; i++) {
        const size_t c = down ? high - 1 - i : low + i;
        const float from_zero = i == last ? 0.f : states[c * N * D], dt = i == last ? 0.f : dt_sum[c * D];
        states[c * N * D] = before;
        before = fmaf(ex2(A * dt), before, from_zero);
    }
}

extern "C" __global__ void LAUNCH_BOUNDS(1024, 1) fold(const CombineArgs a) { combine_segment<true>(a); }
extern "C" __global__ void LAUNCH_BOUNDS(1024, 1) combine(const CombineArgs a) { combine_segment<false>(a); }

struct SumArgs {
    const float* parts;  // (count, n)
    io* out;
    long long n;
    int count;
};

// out = the sum of the parts, in their order.
extern "C" __global__ void LAUNCH_BOUNDS(256, 1) sum_parts(const SumArgs a) {
    const long long at = ((long long)blockIdx.x * 256 + threadIdx.x) * 4;
    if (a.n % 4 == 0) {
        if (at >= a.n) return;
        float4 sum = *reinterpret_cast<const float4*>(a.parts + at);
        for (int i = 1; i < a.count; i++) {
            const float4 x = *reinterpret_cast<const float4*>(a.parts + i * a.n + at);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        Raw* out = reinterpret_cast<Raw*>(a.out + at);
        out[0] = pack(sum.x, sum.y);
        out[1] = pack(sum.z, sum.w);
    } else {
        for (long long x = at; x < min(at + 4, a.n); x++) {
            float sum = a.parts[x];
            for (int i = 1; i < a.count; i++) sum += a.parts[i * a.n + x];
            a.out[x] = narrow(sum);
        }
    }
}

struct ParameterArgs {
    const float* dparam;  // (batch, 4, chunks, N + R + 2, D)
    float *dA_log, *dt_weight, *dt_bias, *dD;  // (4, D, N), (4, D, R), (4, D), (4, D)
    int batch, chunks;
};

// Sums what chunks add to the gradients of the parameters. Each of PARTS warps takes every PARTS-th chunk.
extern "C" __global__ void LAUNCH_BOUNDS(1024, 1) sum_parameters(const ParameterArgs a) {
    __shared__ float sums[PARTS][32];
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32, k = blockIdx.y;
    const int x = blockIdx.x * 32 + lane, row = x / D, ch = x % D;
    const bool known = row < N + R + 2;
    float sum = 0.f;
    if (known) {
#pragma unroll 4
        for (int i = part; i < a.batch * a.chunks; i += PARTS) {
            const size_t slot = ((size_t)(i / a.chunks) * 4 + k) * a.chunks + i % a.chunks;
            sum += a.dparam[slot * (N + R + 2) * D + x];
        }
    }
    sums[part][lane] = sum;
    __syncthreads();
    if (part || !known) return;
    for (int i = 1; i < PARTS; i++) sum += sums[i][lane];
    const size_t channel = (size_t)k * D + ch;
    if (row < N) a.dA_log[channel * N + row] = sum;
    else if (row < N + R) a.dt_weight[channel * R + row - N] = sum;
    else (row == N + R ? a.dt_bias : a.dD)[channel] = sum;
}
