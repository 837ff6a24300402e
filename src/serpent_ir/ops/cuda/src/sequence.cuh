// What the kernels of the scan of sequences share: constants, loads and stores, and rows of B and C in shared memory.
//
// Set on the compiler's command line: D_STATE, LANES (lanes that share a channel's states), TILE (positions that are
// taken together), WARPS (of a block), U_TYPE, DELTA_TYPE, Z_TYPE, B_TYPE, C_TYPE (0 float32, 1 float16, 2 bfloat16),
// VARIES_B, VARIES_C (0: one value a channel and state), GATED, SOFTPLUS, VECTORS (sequences are contiguous and aligned).
//
// A warp scans 32 / M channels of one group over a chunk of positions. Lane = c * M + m: c selects the channel, m a share
// of its states. Of a tile's T positions a lane looks after OWN neighbouring ones: it reads u, delta and z there, makes the
// step size, and writes what comes out. So sequences pass from memory to registers in whole vectors, and the lanes
// of a channel show each other their values. Rows of B and C are staged as float32 in shared memory for the whole block.
#include "device.cuh"

constexpr int N = D_STATE, M = LANES, T = TILE;
constexpr int CH = 32 / M;  // channels per warp
constexpr int P = (N + M - 1) / M;  // states per lane
constexpr int OWN = T / M;
constexpr int THREADS = 32 * WARPS;
static_assert(T % M == 0, "lanes look after whole positions");
typedef long long i64;

template <int TYPE>
struct Io {
    typedef ushort type;
    static __device__ __forceinline__ float widen(ushort x) {
        return TYPE == 2 ? __uint_as_float((uint)x << 16) : half_to_float(x);
    }
    static __device__ __forceinline__ ushort narrow(float x) {
        return TYPE == 2 ? float_to_bfloat16(x) : float_to_half(x);
    }
};
template <>
struct Io<0> {
    typedef float type;
    static __device__ __forceinline__ float widen(float x) { return x; }
    static __device__ __forceinline__ float narrow(float x) { return x; }
};

// Strides of a sequence (batch, D, L), in elements.
struct Strides {
    i64 batch, channel, position;
};

// A lane's OWN values of a sequence.
template <int TYPE>
struct __align__(OWN * sizeof(typename Io<TYPE>::type) < 16 ? OWN * sizeof(typename Io<TYPE>::type) : 16) Own {
    typename Io<TYPE>::type x[OWN];

    // Those from p on, of which `valid` exist; the others are 0.
    __device__ __forceinline__ void load(const typename Io<TYPE>::type* p, i64 stride, int valid) {
        if (VECTORS && valid >= OWN) {
            *this = *reinterpret_cast<const Own*>(p);
            return;
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = !VECTORS && i < valid ? p[i * stride] : (typename Io<TYPE>::type)0;
    }
    __device__ __forceinline__ float operator[](int i) const { return Io<TYPE>::widen(x[i]); }
};

// Writes a lane's values to a contiguous sequence.
template <int TYPE>
__device__ __forceinline__ void store_own(typename Io<TYPE>::type* p, const float* values, int valid) {
    Own<TYPE> own;
#pragma unroll
    for (int i = 0; i < OWN; i++) own.x[i] = Io<TYPE>::narrow(values[i]);
    if (VECTORS) {
        if (valid >= OWN) *reinterpret_cast<Own<TYPE>*>(p) = own;
        return;
    }
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (i < valid) p[i] = own.x[i];
}

// Which positions and channels a block and a lane work on.
struct Place {
    int lane, warp, c, m, group, chunk, channel;
    bool valid;  // whether the channel exists
    i64 image, begin;
    int count, set;

    __device__ __forceinline__ Place(int D, int groups, int sets, i64 L, int length, int chunks) {
        lane = threadIdx.x % 32, warp = WARPS > 1 ? warp_number() : 0;
        c = lane / M, m = lane % M;
        const int width = D / groups;
        set = blockIdx.x % sets;
        group = blockIdx.x / sets % groups;
        const uint row = blockIdx.x / sets / groups;
        chunk = row % chunks, image = row / chunks;
        const int within = (set * WARPS + warp) * CH + c;
        valid = within < width;
        channel = group * width + min(within, width - 1);
        begin = (i64)chunk * length;
        count = (int)min(L - begin, (i64)length);
    }
};

// Rows of B and C in shared memory, one a position: for each of the M lanes' shares P of B and P of C, where they vary,
// padded with zeros to whole vectors; and a vector more, so that neighbouring rows begin in other banks.
constexpr int VARYING = VARIES_B + VARIES_C;
constexpr int SHARE = (VARYING * P + 3) / 4 * 4;
constexpr int ROW = VARYING ? M * SHARE + 4 : 0;
constexpr int STAGE = T > 32 ? T : 32;  // positions that are staged together
static_assert(STAGE % T == 0, "whole tiles");

template <int TYPE>
__device__ __forceinline__ void stage_one(
    const typename Io<TYPE>::type* from, i64 of_state, i64 of_position, int place, int count, float* rows
) {
    // Up to 8 loads are on their way at a time. Neighbouring threads read neighbouring positions.
    constexpr int LOADS = (N * STAGE + THREADS - 1) / THREADS, AT_ONCE = LOADS < 8 ? LOADS : 8;
    for (int first = 0; first < LOADS; first += AT_ONCE) {
        typename Io<TYPE>::type x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int e = (first + i) * THREADS + threadIdx.x, n = e / STAGE, t = e % STAGE;
            x[i] = n < N && t < count ? from[n * of_state + t * of_position] : (typename Io<TYPE>::type)0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int e = (first + i) * THREADS + threadIdx.x, n = e / STAGE, t = e % STAGE;
            if (n < N) rows[t * ROW + n / P * SHARE + place + n % P] = Io<TYPE>::widen(x[i]);
        }
    }
}

// Where B and C lie: (D, N) if they do not vary, else (batch, groups, N, L) with `share` groups of channels to each of
// theirs.
struct Matrix {
    const void* data;
    i64 batch, group, state, position;
    int share, unused;
};

// How a block reads B and C.
struct Rows {
    const typename Io<B_TYPE>::type* B;
    const typename Io<C_TYPE>::type* C;

    __device__ __forceinline__ Rows(const Matrix& b, const Matrix& c, const Place& at)
        : B((const typename Io<B_TYPE>::type*)b.data), C((const typename Io<C_TYPE>::type*)c.data) {
        if (VARIES_B) B += at.image * b.batch + at.group / b.share * b.group + at.begin * b.position;
        if (VARIES_C) C += at.image * c.batch + at.group / c.share * c.group + at.begin * c.position;
    }
    // Stages `count` positions from the chunk's position `first` on; the whole block calls it.
    template <bool WITH_C>
    __device__ __forceinline__ void stage(const Matrix& b, const Matrix& c, int first, int count, float* rows) const {
        if (VARIES_B) stage_one<B_TYPE>(B + first * b.position, b.state, b.position, 0, count, rows);
        if (VARIES_C && WITH_C)
            stage_one<C_TYPE>(C + first * c.position, c.state, c.position, VARIES_B ? P : 0, count, rows);
    }
};

// A lane's states of what belongs to a channel (D, N); 0 past the last.
__device__ __forceinline__ void load_own_states(const float* from, i64 channel, int m, float (&x)[P]) {
#pragma unroll
    for (int p = 0; p < P; p++) x[p] = m * P + p < N ? from[channel * N + m * P + p] : 0.f;
}
__device__ __forceinline__ void store_own_states(float* to, i64 channel, int m, bool valid, const float (&x)[P]) {
#pragma unroll
    for (int p = 0; p < P; p++)
        if (valid && m * P + p < N) to[channel * N + m * P + p] = x[p];
}

// B and C of one position: from a row in shared memory where they vary, else the channel's.
struct BC {
    float B[P], C[P];

    template <int TYPE>
    static __device__ __forceinline__ void of_channel(const void* from, i64 channel, int m, float (&x)[P]) {
#pragma unroll
        for (int p = 0; p < P; p++)
            x[p] = m * P + p < N ? Io<TYPE>::widen(((const typename Io<TYPE>::type*)from)[channel * N + m * P + p]) : 0.f;
    }
    __device__ __forceinline__ BC(const Matrix& b, const Matrix& c, int channel, int m) {
        if (!VARIES_B) of_channel<B_TYPE>(b.data, channel, m, B);
        if (!VARIES_C) of_channel<C_TYPE>(c.data, channel, m, C);
    }
    __device__ __forceinline__ void load(const float* row, int m) {
        if (!VARYING) return;
        float s[SHARE + 1];
        const float4* from = reinterpret_cast<const float4*>(row + m * SHARE);
#pragma unroll
        for (int i = 0; i < SHARE / 4; i++) {
            float4 x = from[i];
            s[4 * i] = x.x, s[4 * i + 1] = x.y, s[4 * i + 2] = x.z, s[4 * i + 3] = x.w;
        }
#pragma unroll
        for (int p = 0; p < P; p++) {
            if (VARIES_B) B[p] = s[p];
            if (VARIES_C) C[p] = s[VARIES_B * P + p];
        }
    }
};

// The step size at a lane's own positions, 0 past the end; `slope` is its derivative by delta.
__device__ __forceinline__ void step_sizes(const Own<DELTA_TYPE>& delta, float bias, int valid, float* dt, float* slope) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const float x = delta[i] + bias;
        slope[i] = 1.f;
        dt[i] = SOFTPLUS ? softplus<true>(x, slope[i]) : x;
        if (i >= valid) dt[i] = slope[i] = 0.f;
    }
}

// The value of position t of a tile, from the lane that looks after it.
__device__ __forceinline__ float shown(const float* own, int t, int lane) {
    return M == 1 ? own[t] : __shfl_sync(~0u, own[t % OWN], lane / M * M + t / OWN);
}

// Sums a tile's values over the lanes of a channel, so that each keeps those of its own positions.
__device__ __forceinline__ void sum_over_states(float (&x)[T], int lane) {
    int base = 0, count = T;
    reduce_scatter<T, M / 2, 1>(x, lane, base, count);
}
