// The forward scan. A block is two warps, which do the two opposite directions over one chunk of positions.

#include "common.cuh"

struct Args {
    const io *u, *proj;
    const float *dt_weight, *dt_bias, *A_log, *D_skip;
    float *state, *dt_sum;  // (batch, 4, chunks, N, D), (batch, 4, chunks, D)
    float* total;  // (pairs, batch, H, W, D): sums so far
    io* y;
    long long part;  // elements of `total` of one pair
    int H, W, length, chunks;
    int first, pairs;  // this launch does the pairs first .. first + pairs - 1. Pair 0: by rows, 1: by columns
    int add, last;  // add: `total` holds the sums of the pair before; last: the sums go to y
    int combined;  // `state` is what chunks start with, not what they end with from zero
};

static_assert(T >= M, "a lane writes whole steps");

// The state that a chunk starts with, from the end states of the `count` chunks before it. `back`: the offset from a
// slot to the previous one of the walk.
__device__ __forceinline__ void combine_before(
    const Args& a, const Channels& my, int count, size_t slot, int back, float (&h)[Q][P]
) {
#pragma unroll 2
    for (int i = count; i > 0; i--) {
        const size_t at = slot + (long long)i * back;
        float end[Q][P];
        load_states(a.state + at * N * D, my.m, my.ch, end);
        const float2 sum = load_pair_f(a.dt_sum + at * D + my.ch, my.ch);
#pragma unroll
        for (int q = 0; q < Q; q++)
#pragma unroll
            for (int p = 0; p < P; p++) h[q][p] = fmaf(ex2(my.A[q][p] * (q ? sum.y : sum.x)), h[q][p], end[q][p]);
    }
}

// OUTPUT false: finds the state at the end of a chunk from zero at its start, and the sum of dt. OUTPUT true: writes y.
template <bool OUTPUT>
__device__ __forceinline__ void scan(const Args& a) {
    DYNAMIC_SHARED(shared);
    const int warp = warp_number(), lane = threadIdx.x % 32;
    const int group = blockIdx.x % GROUPS, chunk = blockIdx.x / GROUPS;
    const int pair = a.first + blockIdx.y % a.pairs, k = pair + 2 * warp;
    const size_t image = blockIdx.y / a.pairs, pixels = image * a.H * a.W;
    const int begin = chunk * a.length, count = min(a.length, a.H * a.W - begin);
    if (!OUTPUT && chunk == (warp ? 0 : a.chunks - 1)) return;  // no chunk follows it

    float* rows = shared + warp * T * JP;
    float* sums = shared + 2 * T * JP;  // (length, CH): for the chunk's positions, from the direction that came first
    for (int i = lane; i < T * JP; i += 32) rows[i] = 0.f;
    const Channels my(group, k, a.A_log, a.dt_weight, a.dt_bias);
    const size_t slot = (image * 4 + k) * a.chunks + chunk;
    float h[Q][P] = {}, sum[Q] = {}, skip[Q] = {};
    if (OUTPUT) {
        if (a.combined) load_states(a.state + slot * N * D, my.m, my.ch, h);
        else if (a.chunks > 1) combine_before(a, my, warp ? a.chunks - 1 - chunk : chunk, slot, warp ? 1 : -1, h);
        if (my.m == 0) {
            float2 x = load_pair_f(a.D_skip + k * D + my.ch, my.ch);
            skip[0] = x.x, skip[1] = x.y;
        }
    }
    float* total = keep(a.total + (pair - a.first) * a.part + pixels * D + my.ch);
    io* y = keep(a.y + pixels * D + my.ch);

    // Each warp writes its half of the sums, then adds to the other's, so they never add to one place at the same time.
    const int half = OUTPUT ? min(count, (count / 2 + T - 1) / T * T) : count;
    const int split = !OUTPUT ? count : warp ? count - half : half;
    const int meet = (split + T - 1) / T, tiles = meet + (count - split + T - 1) / T;
    const Fetch fetch(a.proj + (pixels * 4 + k) * J, lane);
    const io* const maps[] = {keep(a.u + pixels * D + my.ch)};
    Walk walk(a.H, a.W, pair, warp ? begin + count - 1 : begin, warp ? -1 : 1);
    Ahead<1> ahead;
    ahead.reach(fetch, maps, walk, 0, count, my);
    ahead.load(fetch, maps, walk, 0, my);
    for (int i = 0; i < tiles; i++) {
        if (OUTPUT && i == meet) __syncthreads();
        const int first = i < meet ? i * T : split + (i - meet) * T;
        const int valid = (i < meet ? split : count) - first;
        __syncwarp();
        ahead.store_rows(fetch, rows);
        __syncwarp();
        Raw raw[T];
#pragma unroll
        for (int t = 0; t < T; t++) raw[t] = ahead.maps[0][t];
        // Of the tile's sums this lane is responsible for those of the steps `mine`, `mine` + 1, ..
        const int mine = first + my.m * (T / M);
        int at[T / M];
        float2 before[T / M];
#pragma unroll
        for (int t = 0; t < T / M && OUTPUT; t++) {
            at[t] = walk[mine + t];
            before[t] = make_float2(0.f, 0.f);
            if (i >= meet && a.add) before[t] = load_pair_f(total + (size_t)at[t] * D, my.ch);
        }
        if (i + 1 < tiles) {
            const int next = i + 1 < meet ? first + T : split + (i + 1 - meet) * T;
            ahead.reach(fetch, maps, walk, next, count, my);
            ahead.load(fetch, maps, walk, next, my);
        }
        float dt[T][Q], slope[OWN];
        step_sizes(my, rows, valid, dt, slope);
        float acc[T * Q];
#pragma unroll
        for (int t = 0; t < T; t++) {
            float s[SHARE];
            load_share(rows, t, my.m, s);
            const float2 pair_u = unpack(raw[t]);
#pragma unroll
            for (int q = 0; q < Q; q++) {
                const float u = q ? pair_u.y : pair_u.x, dtu = dt[t][q] * u;
                float out = skip[q] * u;
#pragma unroll
                for (int p = 0; p < P; p++) {
                    h[q][p] = fmaf(ex2(dt[t][q] * my.A[q][p]), h[q][p], dtu * s[RL + p]);
                    out = fmaf(s[RL + P + p], h[q][p], out);
                }
                acc[t * Q + q] = out;
                sum[q] += dt[t][q];
            }
        }
        if (OUTPUT) {
            int base = 0, held = T * Q;
            reduce_scatter<T * Q, 16, C>(acc, lane, base, held);
#pragma unroll
            for (int t = 0; t < T / M; t++) {
                if (mine + t >= first + valid) continue;
                const int position = warp ? count - 1 - mine - t : mine + t;
                float2* sum = reinterpret_cast<float2*>(sums + position * CH + lane % C * Q);
                float2 x = make_float2(acc[t * Q], acc[t * Q + 1]);
                if (i < meet) {
                    *sum = x;
                    continue;
                }
                x.x += sum->x + before[t].x, x.y += sum->y + before[t].y;
                if (a.last) store_pair(y + (size_t)at[t] * D, my.ch, x);
                else store_pair_f(total + (size_t)at[t] * D, my.ch, x);
            }
        }
    }
    if (OUTPUT && meet == tiles) __syncthreads();
    if (!OUTPUT) {
        store_states(a.state + slot * N * D, my.m, my.ch, h);
        if (my.m == 0) store_pair_f(a.dt_sum + slot * D + my.ch, my.ch, make_float2(sum[0], sum[1]));
    }
}

extern "C" __global__ void LAUNCH_BOUNDS(64, BLOCKS) scan_ends(const Args a) { scan<false>(a); }
extern "C" __global__ void LAUNCH_BOUNDS(64, BLOCKS) scan_output(const Args a) { scan<true>(a); }
