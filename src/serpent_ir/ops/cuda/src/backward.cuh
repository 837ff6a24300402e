// The backward scan. In the order of one walk, with g the adjoint of the state h and c_t = C_t dy_t:
//
//   h_t = a_t h_{t-1} + b_t     a_t = exp(A dt_t), b_t = dt_t u_t B_t
//   g_t = c_t + e_{t+1}         e_t = a_t g_t, which flows to the position before
//   dC_t = sum over channels of dy_t h_t          dB_t = sum over channels of g_t dt_t u_t
//   w_t = e_t h_{t-1}           dA = sum over positions of w_t dt_t
//   d(dt)_t = sum over n of A w_t + u_t g_t B_t   du_t = dt_t (sum over n of g_t B_t) + D dy_t
//
// Chunks are cut into parts of S positions, and parts into tiles of T. `summary` goes through a chunk once. It finds
// what the chunk does to h and e, and the state at the start of each part. `gradient` goes through the parts from the
// last to the first. It goes forward through a part, keeping the state before each tile, then backward tile by tile.

#include "common.cuh"

constexpr int S = PART;  // positions per part
constexpr int TILES = S / T;

struct Args {
    const io *dy, *u, *proj;
    const float *dt_weight, *dt_bias, *A_log, *D_skip;
    // At the start of a part, counted from zero at the chunk's start: the state, the sum of dt. (batch, 4, parts, [N,]
    // D)
    float *part_h, *part_dt;
    float *chunk_h, *chunk_e, *dt_sum;  // (batch, 4, chunks, [N,] D)
    float* total;  // (pairs, batch, H, W, D): sums of du so far
    io* du;
    float* shares;  // (shares, batch, H, W, 4, J): what each block of channels adds to the gradient of proj
    io* dproj;
    float* dparam;  // (batch, 4, chunks, N + R + 2, D): gradients of A_log, dt_weight, dt_bias, D
    long long total_part, shares_part;
    int H, W, length, chunks;  // length: of a chunk, a multiple of S
    int first, pairs;
    int add, last;
    int splits, sets;  // splits: blocks that share a chunk's channels; sets: sets of channels that each block handles
};

// Where du goes. The two directions of a block begin at opposite ends of a chunk. The first one to reach a part writes
// `total`, the second adds to it. If both are at the same part at a time, they meet in shared memory.
struct Sums {
    float* total;  // like du: points to the image's first pixel, at the channel of the lane's first own value
    io* du;
    bool meet, more, last;  // more: `total` holds a share; last: the sum is complete

    // Reads what `total` holds for the lane's own values of a tile. `at` holds the offsets of their pixels.
    __device__ __forceinline__ void load(const size_t (&at)[OWN], int ch, float (&x)[OWN]) const {
#pragma unroll
        for (int i = 0; i < OWN; i += 2) {
            const float2 pair = OWN > 1 ? load_pair_f(total + at[i], ch) : make_float2(ch < D ? total[at[i]] : 0.f, 0.f);
            x[i] = pair.x;
            if (i + 1 < OWN) x[i + 1] = pair.y;
        }
    }
    __device__ __forceinline__ void store(size_t at, int ch, float2 x) const {
        if (OWN > 1 && last) store_pair(du + at, ch, x);
        else if (OWN > 1) store_pair_f(total + at, ch, x);
        else if (ch < D && last) du[at] = narrow(x.x);
        else if (ch < D) total[at] = x.x;
    }
};
