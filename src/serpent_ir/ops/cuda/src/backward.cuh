// The backward scan. In the order of one walk, with g the adjoint of the state h and c_t = C_t dy_t:
//
//   h_t = a_t h_{t-1} + b_t     a_t = exp(A dt_t), b_t = dt_t u_t B_t
//   g_t = c_t + e_{t+1}         e_t = a_t g_t, what flows on to the position before
//   dC_t = sum over channels of dy_t h_t          dB_t = sum over channels of g_t dt_t u_t
//   w_t = e_t h_{t-1}           dA = sum over positions of w_t dt_t
//   d(dt)_t = sum over n of A w_t + u_t g_t B_t   du_t = dt_t (sum over n of g_t B_t) + D dy_t
//
// Chunks are cut into parts of S positions, parts into tiles of T. `summary` goes through a chunk once: what the chunk
// does to h and e, and the state at the start of each part. `gradient` goes through the parts from the last to the
// first: forwards through a part, keeping the state before each tile, then tile by tile backwards.

#include "common.cuh"

constexpr int S = PART;  // positions of a part
constexpr int TILES = S / T;

struct Args {
    const io *dy, *u, *proj;
    const float *dt_weight, *dt_bias, *A_log, *D_skip;
    // At a part's start, from zero at the chunk's: the state, and the sum of dt since. (batch, 4, parts, [N,] D)
    float *part_h, *part_dt;
    float *chunk_h, *chunk_e, *dt_sum;  // (batch, 4, chunks, [N,] D)
    float* total;  // (pairs, batch, H, W, D): sums of du so far
    io* du;
    float* shares;  // (shares, batch, H, W, 4, J): what blocks of channels give to the gradient of proj
    io* dproj;
    float* dparam;  // (batch, 4, chunks, N + R + 2, D): gradients of A_log, dt_weight, dt_bias, D
    long long total_part, shares_part;
    int H, W, length, chunks;  // of a chunk, a multiple of S
    int first, pairs;
    int add, last;
    int splits, sets;  // blocks that share a chunk's channels; sets of channels that each goes through
};

// Where du goes. The two directions of a block begin at opposite ends of a chunk: the first to come to a part writes
// `total`, the second adds to it, and where both are at one part at a time they meet in shared memory.
struct Sums {
    float* total;  // with du: the image's first pixel, from the channel of the lane's first own value on
    io* du;
    bool meet, more, last;  // more: `total` holds a share; last: the sum is complete

    // What `total` holds of the lane's own values of a tile, of which `at` says the pixels' offsets, and what comes of it.
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
