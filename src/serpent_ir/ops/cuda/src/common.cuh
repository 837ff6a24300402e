// What the CUDA kernels of the scan share: constants, walks over the image, step sizes, exchanges between lanes.
//
// Set on the compiler's command line: D_INNER, D_STATE, DT_RANK, DTYPE (0 float32, 1 float16, 2 bfloat16), LANES (lanes
// that share a channel's states), TILE (steps that are taken together).
//
// A warp scans 32 / M * 2 neighbouring channels of one direction. Lane = m * C + c: c selects two channels, m a share
// of their states and of the rank. A lane keeps its `h` and `A` in registers: 2 channels x P states.

#include "device.cuh"

constexpr int D = D_INNER, N = D_STATE, R = DT_RANK, M = LANES, T = TILE;
constexpr int Q = 2;  // channels per lane
constexpr int C = 32 / M;  // lanes side by side over channels
constexpr int CH = C * Q;  // channels per warp
constexpr int GROUPS = (D + CH - 1) / CH;
constexpr int P = (N + M - 1) / M;  // states per lane, for each channel
constexpr int RL = (R + M - 1) / M;  // ranks per lane
constexpr int J = R + 2 * N;

#if DTYPE == 0
typedef float io;
struct __align__(8) Raw { float x, y; };
__device__ __forceinline__ float widen(io x) { return x; }
__device__ __forceinline__ io narrow(float x) { return x; }
__device__ __forceinline__ float2 unpack(Raw r) { return make_float2(r.x, r.y); }
__device__ __forceinline__ Raw pack(float x, float y) { return {x, y}; }
#else
typedef ushort io;
typedef uint Raw;  // two neighbours
#if DTYPE == 2
__device__ __forceinline__ float widen(io x) { return __uint_as_float((uint)x << 16); }
#else
__device__ __forceinline__ float widen(io x) { return half_to_float(x); }
#endif
__device__ __forceinline__ io narrow(float x) {
#if DTYPE == 2
    return float_to_bfloat16(x);
#else
    return float_to_half(x);
#endif
}
__device__ __forceinline__ float2 unpack(Raw r) { return make_float2(widen((io)r), widen((io)(r >> 16))); }
__device__ __forceinline__ Raw pack(float x, float y) { return (uint)narrow(x) | ((uint)narrow(y) << 16); }
#endif

// Two channels at p, the address of channel `ch`; 0 past the last channel. Vector loads need an even D.
__device__ __forceinline__ Raw load_pair(const io* p, int ch) {
    if (D % 2 == 0) return (D % CH == 0 || ch < D) ? *reinterpret_cast<const Raw*>(p) : Raw{};
    return pack(ch < D ? widen(p[0]) : 0.f, ch + 1 < D ? widen(p[1]) : 0.f);
}
__device__ __forceinline__ void store_pair(io* p, int ch, float2 x) {
    if (D % 2 == 0) {
        if (D % CH == 0 || ch < D) *reinterpret_cast<Raw*>(p) = pack(x.x, x.y);
    } else {
        if (ch < D) p[0] = narrow(x.x);
        if (ch + 1 < D) p[1] = narrow(x.y);
    }
}
__device__ __forceinline__ float2 load_pair_f(const float* p, int ch) {
    if (D % 2 == 0) return (D % CH == 0 || ch < D) ? *reinterpret_cast<const float2*>(p) : make_float2(0.f, 0.f);
    return make_float2(ch < D ? p[0] : 0.f, ch + 1 < D ? p[1] : 0.f);
}
__device__ __forceinline__ void store_pair_f(float* p, int ch, float2 x) {
    if (D % 2 == 0) {
        if (D % CH == 0 || ch < D) store2(p, x.x, x.y);
    } else {
        if (ch < D) p[0] = x.x;
        if (ch + 1 < D) p[1] = x.y;
    }
}

// The pixel (row * W + column) of a position that is counted row by row or column by column.
__device__ __forceinline__ int pixel_of(int position, int H, int W, bool columns) {
    if (!columns) return position;
    const int column = position / H;
    return (position - column * H) * W + column;
}

// A walk up or down (sign) from a position. Each lane holds the pixel of one of 32 steps, because a division by every
// lane for each step would cost more than the scan.
struct Walk {
    int H, W, start, sign, lane, base, pixel;
    bool columns;

    __device__ __forceinline__ Walk(int H, int W, bool columns, int start, int sign)
        : H(H), W(W), start(start), sign(sign), lane(threadIdx.x % 32), base(-32), pixel(0), columns(columns) {}

    // Must be called before the pixels of the T steps from `first` on are asked for. Past `end` they repeat the last
    // one. Returns whether the pixels are new; if so, a lane may prefetch what will be read at its own pixel.
    __device__ __forceinline__ bool reach(int first, int end) {
        if (first + T <= base + 32 && first >= base) return false;
        base = first;
        pixel = pixel_of(start + sign * min(first + lane, end - 1), H, W, columns);
        return true;
    }
    __device__ __forceinline__ int operator[](int step) const { return __shfl_sync(~0u, pixel, step - base); }
};

// Loads and stores a lane's states of an array (N, D); `m` as in Channels.
__device__ __forceinline__ void load_states(const float* from, int m, int ch, float (&h)[Q][P]) {
#pragma unroll
    for (int p = 0; p < P; p++) {
        const int n = m * P + p;
        const float2 x = n < N ? load_pair_f(from + n * D + ch, ch) : make_float2(0.f, 0.f);
        h[0][p] = x.x, h[1][p] = x.y;
    }
}
__device__ __forceinline__ void store_states(float* to, int m, int ch, const float (&h)[Q][P]) {
#pragma unroll
    for (int p = 0; p < P; p++)
        if (m * P + p < N) store_pair_f(to + (m * P + p) * D + ch, ch, make_float2(h[0][p], h[1][p]));
}

// Each of the M lanes is responsible for OWN of a tile's T * Q values. If there are more lanes than values, every
// SPACING-th lane is responsible for one.
constexpr int OWN = T * Q > M ? T * Q / M : 1, SPACING = M > T * Q ? M / (T * Q) : 1;
static_assert(T * Q % M == 0 || M % (T * Q) == 0, "each lane looks after as many");

// What a warp knows of its channels in one direction.
struct Channels {
    int lane, m, ch;  // ch: the first of the lane's two channels
    float A[Q][P];  // log2 e times A
    float W[Q][RL], bias[Q];

    // The first of a tile's T * Q values that this lane is responsible for, and whether there is any.
    __device__ __forceinline__ int own() const { return m * OWN / SPACING; }
    __device__ __forceinline__ bool owns() const { return m % SPACING == 0; }

    __device__ __forceinline__ Channels(
        int group, int k, const float* A_log, const float* dt_weight, const float* dt_bias
    ) {
        lane = keep((int)threadIdx.x % 32);
        m = lane / C;
        ch = keep(group * CH + lane % C * Q);
#pragma unroll
        for (int q = 0; q < Q; q++) {
            bool known = D % CH == 0 || ch + q < D;
            const float* a = A_log + (size_t)(k * D + ch + q) * N;
            const float* w = dt_weight + (size_t)(k * D + ch + q) * R;
#pragma unroll
            for (int p = 0; p < P; p++) {
                int n = m * P + p;
                A[q][p] = known && n < N ? -LOG2E * ex2(LOG2E * a[n]) : 0.f;
            }
#pragma unroll
            for (int r = 0; r < RL; r++) W[q][r] = known && m * RL + r < R ? w[m * RL + r] : 0.f;
            bias[q] = known && m == 0 ? dt_bias[k * D + ch + q] : 0.f;
        }
    }
};

// A row of proj in shared memory, in float32. It holds for each of the M lanes RL ranks, P of B and P of C, padded with
// zeros to whole vectors.
constexpr int SHARE = (RL + 2 * P + 3) / 4 * 4;
constexpr int JP = M * SHARE;

// The place of number j of a row of proj.
__device__ __forceinline__ int place(int j) {
    if (j < R) return j / RL * SHARE + j % RL;
    if (j < R + N) return (j - R) / P * SHARE + RL + (j - R) % P;
    return (j - R - N) / P * SHARE + RL + P + (j - R - N) % P;
}

// A lane's share of a row: s[r] = dt, s[RL + p] = B, s[RL + P + p] = C.
__device__ __forceinline__ void load_share(const float* rows, int t, int m, float (&s)[SHARE]) {
    const float4* from = reinterpret_cast<const float4*>(rows + t * JP + m * SHARE);
#pragma unroll
    for (int i = 0; i < SHARE / 4; i++) {
        float4 x = from[i];
        s[4 * i] = x.x, s[4 * i + 1] = x.y, s[4 * i + 2] = x.z, s[4 * i + 3] = x.w;
    }
}

// How the lanes of a warp fetch rows of proj: ROWS rows at a time, or one row in PER_ROW loads. A lane always fetches
// the same numbers of a row; a lane without work of its own repeats a neighbour's.
struct Fetch {
    static constexpr int ROWS = J < 32 ? 32 / J : 1, PER_ROW = (J + 31) / 32;
    static constexpr int LOADS = (T + ROWS - 1) / ROWS * PER_ROW;
    int row;  // one of the ROWS
    const io *first, *last;
    int places[PER_ROW];  // where they go in shared memory

    // `proj` points to the image's first pixel, in the direction.
    __device__ __forceinline__ Fetch(const io* proj, int lane) : row(J < 32 ? min(lane / J, ROWS - 1) : 0) {
        const int j = J < 32 ? lane % J : lane;
        first = keep(proj + j);
        last = keep(proj + min(j + 32 * (PER_ROW - 1), J - 1));
#pragma unroll
        for (int i = 0; i < PER_ROW; i++) places[i] = keep(place(min(j + 32 * i, J - 1)));
    }
};

// What a warp needs from device memory for a tile: rows of proj, and the lane's channels of MAPS maps (u, dy). It is
// loaded while the previous tile is computed.
template <int MAPS>
struct Ahead {
    io rows[Fetch::LOADS];
    Raw maps[MAPS][T];

    // Must be called before `load` for the T steps from `first` on. `from`: the image's first pixel, at the lane's
    // channels.
    __device__ __forceinline__ void reach(
        const Fetch& fetch, const io* const (&from)[MAPS], Walk& walk, int first, int end, const Channels& my
    ) {
        if (!walk.reach(first, end)) return;
        prefetch(fetch.first + (size_t)walk.pixel * (4 * J));
#pragma unroll
        for (int i = 0; i < MAPS; i++) prefetch(from[i] - my.lane % C * Q + (size_t)walk.pixel * D);
    }

    __device__ __forceinline__ void load(
        const Fetch& fetch, const io* const (&from)[MAPS], const Walk& walk, int first, const Channels& my
    ) {
#pragma unroll
        for (int i = 0; i < Fetch::LOADS; i++) {
            const int t = min(i / Fetch::PER_ROW * Fetch::ROWS + fetch.row, T - 1), part = i % Fetch::PER_ROW;
            const size_t at = (size_t)walk[first + t] * (4 * J);
            rows[i] = part == Fetch::PER_ROW - 1 ? fetch.last[at] : fetch.first[at + 32 * part];
        }
#pragma unroll
        for (int t = 0; t < T; t++) {
            const size_t at = (size_t)walk[first + t] * D;
#pragma unroll
            for (int i = 0; i < MAPS; i++) maps[i][t] = load_pair(from[i] + at, my.ch);
        }
    }
    __device__ __forceinline__ void store_rows(const Fetch& fetch, float* to) const {
#pragma unroll
        for (int i = 0; i < Fetch::LOADS; i++) {
            const int t = min(i / Fetch::PER_ROW * Fetch::ROWS + fetch.row, T - 1);
            to[t * JP + fetch.places[i % Fetch::PER_ROW]] = widen(rows[i]);
        }
    }
};

// From each lane's OWN values to all values of a tile in every one of the M lanes.
__device__ __forceinline__ void share_out(const float* own, int lane, float (&all)[T][Q]) {
#pragma unroll
    for (int i = 0; i < T * Q; i++)
        all[i / Q][i % Q] = M == 1 ? own[i] : __shfl_sync(~0u, own[i % OWN], i / OWN * SPACING * C + lane % C);
}

// dt[t][q] of a tile in every lane, 0 for steps from `valid` on; `slope`: of softplus, for the lane's OWN values.
__device__ __forceinline__ void step_sizes(
    const Channels& my, const float* rows, int valid, float (&dt)[T][Q], float (&slope)[OWN]
) {
    float x[T * Q];
#pragma unroll
    for (int t = 0; t < T; t++) {
        const float* row = rows + t * JP + my.m * SHARE;
#pragma unroll
        for (int q = 0; q < Q; q++) {
            float sum = my.bias[q];
#pragma unroll
            for (int r = 0; r < RL; r++) sum = fmaf(my.W[q][r], row[r], sum);
            x[t * Q + q] = sum;
        }
    }
    int base = 0, count = T * Q;
    reduce_scatter<T * Q, 16, C>(x, my.lane, base, count);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        x[i] = softplus<DTYPE == 0>(x[i], slope[i]);
        if (my.own() / Q + i / Q >= valid) x[i] = slope[i] = 0.f;
    }
    share_out(x, my.lane, dt);
}
