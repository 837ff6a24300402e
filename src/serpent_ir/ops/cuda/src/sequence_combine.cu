// Turns what chunks of sequences do to the state, in place, into the states that they start with; and on the way back what
// they do to its adjoint into the adjoints that they end with.
#include "device.cuh"

typedef long long i64;
struct Args {
    float *h, *e;  // (batch, chunks, D, N)
    const float *dt_sum, *A, *grad_last;  // (batch, chunks, D), (D, N), (batch, D, N) or null
    i64 columns;  // D * N
    int N, chunks, blocks, segment;  // blocks: of an image; segment: chunks that a thread walks
};

constexpr int COLUMNS = 32, SEGMENTS = 8;

// blockIdx.y: 0 for h, 1 for e.
extern "C" __global__ void LAUNCH_BOUNDS(COLUMNS * SEGMENTS, 4) combine(const Args a) {
    DYNAMIC_SHARED(shared);  // (SEGMENTS, 2, COLUMNS): what segments do to the state, and their sums of dt
    const bool back = blockIdx.y == 1;
    const i64 image = blockIdx.x / a.blocks, wanted = (i64)(blockIdx.x % a.blocks) * COLUMNS + threadIdx.x % COLUMNS;
    const i64 column = min(wanted, a.columns - 1), D = a.columns / a.N;
    const int segment = threadIdx.x / COLUMNS, first = segment * a.segment;
    const int count = max(0, min(a.segment, a.chunks - first));
    const float A = a.A[column] * LOG2E;
    float* states = (back ? a.e : a.h) + image * a.chunks * a.columns + column;
    const float* sums = a.dt_sum + image * a.chunks * D + column / a.N;
    auto at = [&](int i) { return (i64)(back ? a.chunks - 1 - first - i : first + i); };
    float state = 0.f, sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < count; i++) {
        const float dt = sums[at(i) * D];
        state = fmaf(ex2(A * dt), state, states[at(i) * a.columns]);
        sum += dt;
    }
    float* mine = shared + segment * 2 * COLUMNS + threadIdx.x % COLUMNS;
    mine[0] = state, mine[COLUMNS] = sum;
    __syncthreads();
    state = back && a.grad_last ? a.grad_last[image * a.columns + column] : 0.f;
    for (int i = 0; i < segment; i++) {
        const float* other = shared + i * 2 * COLUMNS + threadIdx.x % COLUMNS;
        state = fmaf(ex2(A * other[COLUMNS]), state, other[0]);
    }
    if (wanted >= a.columns) return;
#pragma unroll 8
    for (int i = 0; i < count; i++) {
        const float end = states[at(i) * a.columns];
        states[at(i) * a.columns] = state;
        state = fmaf(ex2(A * sums[at(i) * D]), state, end);
    }
}
