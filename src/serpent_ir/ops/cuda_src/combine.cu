// From what chunks do to the state (end state from zero, sum of dt) to the state that each of them starts with, in place.

#include "common.cuh"

struct CombineArgs {
    float *h, *e;  // (batch, 4, chunks, N, D): of the state, and (or null) of its adjoint, which walks the other way
    const float *dt_sum, *A_log;  // (batch, 4, chunks, D), (4, D, N)
    int chunks, first, pairs;
    int columns, parts;  // a block does so many numbers of the state; parts of a walk are first combined by themselves
};

constexpr int PARTS = 32;

extern "C" __global__ void LAUNCH_BOUNDS(1024, 1) combine(const CombineArgs a) {
    __shared__ float ends[1024], sums[1024];
    const int part = threadIdx.x / a.columns, column = threadIdx.x % a.columns;
    const int x = blockIdx.x * a.columns + column, n = x / D, ch = x % D;
    const int direction = blockIdx.y % (2 * a.pairs), k = a.first + direction % a.pairs + direction / a.pairs * 2;
    const size_t image = blockIdx.y / (2 * a.pairs), walk = (image * 4 + k) * a.chunks;
    const bool adjoint = blockIdx.z, known = n < N;
    float* states = (adjoint ? a.e : a.h) + walk * N * D + x;
    const float* dt_sum = a.dt_sum + walk * D + ch;
    const float A = known ? -LOG2E * ex2(LOG2E * a.A_log[(size_t)(k * D + ch) * N + n]) : 0.f;
    // Chunks in the order in which the state, or its adjoint, goes through them.
    const bool down = (k >= 2) != adjoint;
    const int size = (a.chunks + a.parts - 1) / a.parts;
    const int begin = part * size, end = min(begin + size, a.chunks);
    float state = 0.f, sum = 0.f;
    if (known && a.parts > 1) {
#pragma unroll 4
        for (int i = begin; i < end; i++) {
            const size_t c = down ? a.chunks - 1 - i : i;
            const bool last = i == a.chunks - 1;  // its end goes nowhere and may be unwritten
            const float dt = last ? 0.f : dt_sum[c * D];
            state = fmaf(ex2(A * dt), state, last ? 0.f : states[c * N * D]);
            sum += dt;
        }
    }
    ends[threadIdx.x] = state;
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (!known) return;
    state = 0.f;
    for (int i = column; i < part * a.columns; i += a.columns) state = fmaf(ex2(A * sums[i]), state, ends[i]);
#pragma unroll 4
    for (int i = begin; i < end; i++) {
        const size_t c = down ? a.chunks - 1 - i : i;
        const bool last = i == a.chunks - 1;
        const float from_zero = last ? 0.f : states[c * N * D], dt = last ? 0.f : dt_sum[c * D];
        states[c * N * D] = state;
        state = fmaf(ex2(A * dt), state, from_zero);
    }
}

struct SumArgs {
    const float* parts;  // (count, n)
    io* out;
    long long n;
    int count;
};

// out = the sum of the parts, in order.
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

// Sums what chunks give to the gradients of the parameters, each of PARTS warps every PARTS-th of them.
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
