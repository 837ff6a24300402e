// The gradients; see backward.cuh.

#include "backward.cuh"

// What a warp keeps of a tile in shared memory: first the state before the tile, dt and the slope of softplus; then
// what the tile adds to the gradients.
constexpr int VECTORS = (Q * P + 3) / 4;
constexpr int KEPT = VECTORS * 128 > T * J ? VECTORS * 128 : (T * J + 3) / 4 * 4;  // state, or gradient of proj (T, J)
constexpr int SLOT = KEPT + 2 * T * CH;  // and dt, slope (T, CH); du takes the place of dt

struct Gradient {
    const Args& a;
    const Channels my;
    const int k;
    const size_t slot;  // of the chunk
    float* slots;
    float skip[Q];
    float e[Q][P], dA[Q][P], dW[Q][RL], dbias[Q], dD[Q];

    __device__ __forceinline__ Gradient(const Args& a, int group, int k, int chunk, int image, float* slots)
        : a(a), my(group, k, a.A_log, a.dt_weight, a.dt_bias), k(k), slot(((size_t)image * 4 + k) * a.chunks + chunk),
          slots(slots) {
#pragma unroll
        for (int q = 0; q < Q; q++) {
            dbias[q] = dD[q] = 0.f;
#pragma unroll
            for (int p = 0; p < P; p++) e[q][p] = dA[q][p] = 0.f;
#pragma unroll
            for (int r = 0; r < RL; r++) dW[q][r] = 0.f;
        }
        if (a.chunks > 1) load_states(a.chunk_e + slot * N * D, my.m, my.ch, e);
        const float2 x = my.m == 0 ? load_pair_f(a.D_skip + k * D + my.ch, my.ch) : make_float2(0.f, 0.f);
        skip[0] = x.x, skip[1] = x.y;
    }

    // The place of the lane's own value number x of a tile in the (T, CH) array behind the state.
    __device__ __forceinline__ float* own_place(float* kept, int x) const {
        const int own = my.own() + x;
        return kept + KEPT + own / Q * CH + my.lane % C * Q + own % Q;
    }

    // Goes forward through a part of `count` steps. Puts the state before each tile and the step sizes into the slots;
    // also gives the state after the last step.
    __device__ __forceinline__ void keep_states(
        const io* u, const float* rows, const int* pixels, int count, size_t part, bool begins,
        float (&h)[Q][P]
    ) {
#pragma unroll
        for (int x = 0; x < Q * P; x++) h[x / P][x % P] = 0.f;
        if (!begins) load_states(a.part_h + part * N * D, my.m, my.ch, h);
        if (a.chunks > 1) {
            float before[Q][P];
            load_states(a.chunk_h + slot * N * D, my.m, my.ch, before);
            const float2 sum = begins ? make_float2(0.f, 0.f) : load_pair_f(a.part_dt + part * D + my.ch, my.ch);
#pragma unroll
            for (int q = 0; q < Q; q++)
#pragma unroll
                for (int p = 0; p < P; p++) h[q][p] = fmaf(ex2(my.A[q][p] * (q ? sum.y : sum.x)), before[q][p], h[q][p]);
        }
        const int tiles = (count + T - 1) / T;
        Raw ahead[T];
#pragma unroll
        for (int t = 0; t < T; t++) ahead[t] = load_pair(u + (size_t)pixels[t] * D, my.ch);
        for (int i = 0; i < tiles; i++) {
            float* kept = slots + i * SLOT;
            Raw raw[T];
#pragma unroll
            for (int t = 0; t < T; t++) raw[t] = ahead[t];
            if (i + 1 < tiles)
#pragma unroll
                for (int t = 0; t < T; t++) ahead[t] = load_pair(u + (size_t)pixels[(i + 1) * T + t] * D, my.ch);
            float flat[VECTORS * 4] = {};
#pragma unroll
            for (int x = 0; x < Q * P; x++) flat[x] = h[x / P][x % P];
#pragma unroll
            for (int v = 0; v < VECTORS; v++)
                reinterpret_cast<float4*>(kept)[v * 32 + my.lane] =
                    make_float4(flat[4 * v], flat[4 * v + 1], flat[4 * v + 2], flat[4 * v + 3]);
            float dt[T][Q], slope[OWN];
            step_sizes(my, rows + i * T * JP, count - i * T, dt, slope);
            if (my.m == 0)
#pragma unroll
                for (int t = 0; t < T; t++)
                    *reinterpret_cast<float2*>(kept + KEPT + t * CH + my.lane * Q) = make_float2(dt[t][0], dt[t][1]);
            if (my.owns())
#pragma unroll
                for (int x = 0; x < OWN; x++) *own_place(kept + T * CH, x) = slope[x];
#pragma unroll
            for (int t = 0; t < T; t++) {
                float s[SHARE];
                load_share(rows, i * T + t, my.m, s);
                const float2 pair_u = unpack(raw[t]);
#pragma unroll
                for (int q = 0; q < Q; q++) {
                    const float dtu = dt[t][q] * (q ? pair_u.y : pair_u.x);
#pragma unroll
                    for (int p = 0; p < P; p++)
                        h[q][p] = fmaf(ex2(dt[t][q] * my.A[q][p]), h[q][p], dtu * s[RL + p]);
                }
            }
        }
        __syncwarp();
    }

    // Prefetches into the second-level cache what the warp will read of a part, one lane per position.
    __device__ __forceinline__ void prefetch_part(int begin, int count, int part, bool columns) const {
        const int position = begin + part * S + my.lane % S;
        if (position >= begin + count) return;
        const size_t pixel = slot / a.chunks / 4 * a.H * a.W + pixel_of(position, a.H, a.W, columns);
        const int ch = min(my.ch - my.lane % C * Q, D - 1);
        prefetch((my.lane < S ? a.u : a.dy) + pixel * D + ch);
        if (my.lane < S) prefetch(a.proj + (pixel * 4 + k) * J);
        else prefetch(a.total + pixel * D + ch);
        if (S == 32) prefetch(a.dy + pixel * D + ch);
    }

    // Loads the lane's channels of a tile's steps.
    __device__ __forceinline__ void load_maps(
        const io* u, const io* dy, const int* pixels, Raw (&raw_u)[T], Raw (&raw_dy)[T]
    ) {
#pragma unroll
        for (int t = 0; t < T; t++) {
            const size_t at = (size_t)pixels[t] * D;
            raw_u[t] = load_pair(u + at, my.ch);
            raw_dy[t] = load_pair(dy + at, my.ch);
        }
    }

    // Goes backward through the steps of one tile.
    __device__ __forceinline__ void tile(
        float* kept, const float* rows, const int* pixels, int valid, const Raw (&raw_u)[T], const Raw (&raw_dy)[T],
        const Sums& sums, float (&after)[Q][P]
    ) {
        float dt[T][Q], step[T][Q][P], before[T][Q][P];
        float flat[VECTORS * 4];
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const float4 x = reinterpret_cast<const float4*>(kept)[v * 32 + my.lane];
            flat[4 * v] = x.x, flat[4 * v + 1] = x.y, flat[4 * v + 2] = x.z, flat[4 * v + 3] = x.w;
        }
#pragma unroll
        for (int x = 0; x < Q * P; x++) before[0][x / P][x % P] = flat[x];
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float2 x = *reinterpret_cast<const float2*>(kept + KEPT + t * CH + my.lane % C * Q);
            dt[t][0] = x.x, dt[t][1] = x.y;
        }
        __syncwarp();  // what was kept is now in registers, so its slot may be overwritten
        size_t at[OWN];
        float so_far[OWN] = {};
        const int own_ch = my.ch + (OWN > 1 ? 0 : my.own() % Q);
#pragma unroll
        for (int i = 0; i < OWN; i++) at[i] = (size_t)pixels[(my.own() + i) / Q] * D;
        if (sums.more) sums.load(at, own_ch, so_far);
#pragma unroll
        for (int t = 0; t < T - 1; t++) {
            float s[SHARE];
            load_share(rows, t, my.m, s);
            const float2 u = unpack(raw_u[t]);
#pragma unroll
            for (int q = 0; q < Q; q++) {
                const float dtu = dt[t][q] * (q ? u.y : u.x);
#pragma unroll
                for (int p = 0; p < P; p++) {
                    step[t][q][p] = ex2(dt[t][q] * my.A[q][p]);
                    before[t + 1][q][p] = fmaf(step[t][q][p], before[t][q][p], dtu * s[RL + p]);
                }
            }
        }
        float ddt[T * Q], du[T * Q];
        float tile_dD[Q] = {};
#pragma unroll
        for (int t = T - 1; t >= 0; t--) {
            float s[SHARE], dBC[2 * P] = {};
            load_share(rows, t, my.m, s);
            const float2 pair_u = unpack(raw_u[t]), pair_dy = unpack(raw_dy[t]);
#pragma unroll
            for (int q = 0; q < Q; q++) {
                const float u = q ? pair_u.y : pair_u.x, dy = q ? pair_dy.y : pair_dy.x, dtu = dt[t][q] * u;
                float gB = 0.f, Aw = 0.f;
#pragma unroll
                for (int p = 0; p < P; p++) {
                    const float h = t + 1 < T ? before[(t + 1) % T][q][p] : after[q][p];
                    const float g = fmaf(s[RL + P + p], dy, e[q][p]);
                    e[q][p] = (t + 1 < T ? step[t][q][p] : ex2(dt[t][q] * my.A[q][p])) * g;
                    const float w = e[q][p] * before[t][q][p];
                    dA[q][p] = fmaf(w, dt[t][q], dA[q][p]);
                    Aw = fmaf(my.A[q][p], w, Aw);
                    gB = fmaf(g, s[RL + p], gB);
                    dBC[p] = fmaf(g, dtu, dBC[p]);
                    dBC[P + p] = fmaf(h, dy, dBC[P + p]);
                }
                ddt[t * Q + q] = fmaf(LN2, Aw, u * gB);
                du[t * Q + q] = fmaf(dt[t][q], gB, skip[q] * dy);
                tile_dD[q] = fmaf(dy, u, tile_dD[q]);
            }
            int base = 0, count = 2 * P;
            reduce_scatter<2 * P, C / 2, 1>(dBC, my.lane, base, count);
#pragma unroll
            for (int i = 0; i < (2 * P + C - 1) / C; i++) {
                const int x = base + i, n = my.m * P + x % P;
                if (i < count && n < N) kept[t * J + R + x / P * N + n] = dBC[i];
            }
        }
        int base = 0, count = T * Q;
        reduce_scatter<T * Q, 16, C>(ddt, my.lane, base, count);
        base = 0, count = T * Q;
        reduce_scatter<T * Q, 16, C>(du, my.lane, base, count);
        float own[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) own[i] = ddt[i] * *own_place(kept + T * CH, i);
        if (sums.meet && my.owns()) {
#pragma unroll
            for (int i = 0; i < OWN; i++) *own_place(kept, i) = du[i];
        } else if (my.owns()) {
#pragma unroll
            for (int i = 0; i < OWN; i += 2)
                if ((my.own() + i) / Q < valid) {
                    const int next = i + 1 < OWN ? i + 1 : i;
                    sums.store(at[i], own_ch, make_float2(so_far[i] + du[i], so_far[next] + du[next]));
                }
        }
#pragma unroll
        for (int x = 0; x < Q * P; x++) after[x / P][x % P] = before[0][x / P][x % P];
        float dx[T][Q], lowrank[T * RL], tile_dW[Q][RL] = {}, tile_dbias[Q] = {};
        share_out(own, my.lane, dx);
#pragma unroll
        for (int t = 0; t < T; t++) {
#pragma unroll
            for (int q = 0; q < Q; q++) tile_dbias[q] += dx[t][q];
#pragma unroll
            for (int r = 0; r < RL; r++) {
                const float x = rows[t * JP + my.m * SHARE + r];
                tile_dW[0][r] = fmaf(dx[t][0], x, tile_dW[0][r]);
                tile_dW[1][r] = fmaf(dx[t][1], x, tile_dW[1][r]);
                lowrank[t * RL + r] = fmaf(dx[t][0], my.W[0][r], dx[t][1] * my.W[1][r]);
            }
        }
        // Sums are taken first over a tile, then over tiles, since sums of sums lose less precision.
#pragma unroll
        for (int q = 0; q < Q; q++) {
            dD[q] += tile_dD[q];
            dbias[q] += tile_dbias[q];
#pragma unroll
            for (int r = 0; r < RL; r++) dW[q][r] += tile_dW[q][r];
        }
        base = 0, count = T * RL;
        reduce_scatter<T * RL, C / 2, 1>(lowrank, my.lane, base, count);
#pragma unroll
        for (int i = 0; i < (T * RL + C - 1) / C; i++) {
            const int x = base + i, r = my.m * RL + x % RL;
            if (i < count && r < R) kept[x / RL * J + r] = lowrank[i];
        }
    }

    __device__ __forceinline__ void store_parameters() {
        float* to = a.dparam + slot * (N + R + 2) * D;
#pragma unroll
        for (int p = 0; p < P; p++) {  // A = -exp(A_log)
            const float2 x = make_float2(LN2 * my.A[0][p] * dA[0][p], LN2 * my.A[1][p] * dA[1][p]);
            if (my.m * P + p < N) store_pair_f(to + (my.m * P + p) * D + my.ch, my.ch, x);
        }
#pragma unroll
        for (int r = 0; r < RL; r++)
            if (my.m * RL + r < R) store_pair_f(to + (N + my.m * RL + r) * D + my.ch, my.ch, make_float2(dW[0][r], dW[1][r]));
        if (my.m == 0) {
            store_pair_f(to + (N + R) * D + my.ch, my.ch, make_float2(dbias[0], dbias[1]));
            store_pair_f(to + (N + R + 1) * D + my.ch, my.ch, make_float2(dD[0], dD[1]));
        }
    }
};

constexpr int BATCH = 4;  // loads in flight at a time
constexpr int G = WARPS;  // warps per direction, side by side over channels
static_assert(GROUPS % G == 0, "whole sets of channels");

extern "C" __global__ void LAUNCH_BOUNDS(64 * G, BLOCKS) gradient(const Args a) {
    DYNAMIC_SHARED(shared);
    const int warp = warp_number(), thread = threadIdx.x % (32 * G);
    const bool reverse = warp >= G;
    const int split = blockIdx.x % a.splits, chunk = blockIdx.x / a.splits;
    const int pair = a.first + blockIdx.y % a.pairs, k = pair + 2 * reverse, image = blockIdx.y / a.pairs;
    const int L = a.H * a.W, begin = chunk * a.length, count = min(a.length, L - begin);
    const int parts = (count + S - 1) / S;
    const size_t pixels = (size_t)image * L;
    const io *u = a.u + pixels * D, *dy = a.dy + pixels * D;
    float *rows = shared + reverse * S * JP, *slots = shared + 2 * S * JP;  // (2, S, JP); (2 G, TILES, SLOT)
    __shared__ int way_pixels[2][S];
    int* pixel = way_pixels[reverse];  // for the steps of this direction's part
    float* total = a.total + (pair - a.first) * a.total_part + pixels * D;
    float* share = a.shares + split * a.shares_part + pixels * 4 * J;

    for (int i = threadIdx.x; i < 2 * S * JP; i += 64 * G) shared[i] = 0.f;
    __syncthreads();
    for (int set = split * a.sets; set < (split + 1) * a.sets; set++) {
        Gradient of(a, set * G + warp % G, k, chunk, image, slots + warp * TILES * SLOT);
        // At the channel of the lane's first own value.
        const int own_ch = of.my.ch + (OWN > 1 ? 0 : of.my.own() % Q);
        float* own_total = keep(total + own_ch);
        io* own_du = keep(a.du + pixels * D + own_ch);
        const io* const maps[] = {keep(u + of.my.ch), keep(dy + of.my.ch)};
        for (int i = 0; i < parts; i++) {
            // Each direction begins where its walk ends, so the two meet in the middle of the chunk.
            const int part = reverse ? i : parts - 1 - i;
            const int part_begin = begin + part * S, steps = min(S, begin + count - part_begin);
            for (int x = thread; x < S; x += 32 * G) {
                const int step = min(x, steps - 1);
                pixel[x] = pixel_of(part_begin + (reverse ? steps - 1 - step : step), a.H, a.W, pair);
            }
            __syncthreads();
            of.prefetch_part(begin, count, i + 1 < parts ? part + (reverse ? 1 : -1) : part, pair);
#pragma unroll 1
            for (int from = thread; from < S * J; from += 32 * G * BATCH) {
                io row[BATCH];
#pragma unroll
                for (int l = 0; l < BATCH; l++) {
                    const int x = min(from + l * 32 * G, S * J - 1);
                    row[l] = a.proj[((pixels + pixel[x / J]) * 4 + k) * J + x % J];
                }
#pragma unroll
                for (int l = 0; l < BATCH; l++) {
                    const int x = min(from + l * 32 * G, S * J - 1);
                    rows[x / J * JP + place(x % J)] = widen(row[l]);
                }
            }
            __syncthreads();
            const size_t index = ((size_t)image * 4 + k) * ((L + S - 1) / S) + begin / S + part;
            float after[Q][P];
            of.keep_states(maps[0], rows, pixel, steps, index, i == parts - 1, after);
            const bool meet = parts - 1 - i == i, second = parts - 1 - i < i;
            const Sums sums = {own_total, own_du, meet, second || a.add, second && a.last};
            int n = (steps + T - 1) / T - 1;
            Raw raw_u[T], raw_dy[T];
            of.load_maps(maps[0], maps[1], pixel + n * T, raw_u, raw_dy);
            for (; n >= 0; n--) {
                Raw tile_u[T], tile_dy[T];
#pragma unroll
                for (int t = 0; t < T; t++) tile_u[t] = raw_u[t], tile_dy[t] = n * T + t < steps ? raw_dy[t] : Raw{};
                if (n) of.load_maps(maps[0], maps[1], pixel + (n - 1) * T, raw_u, raw_dy);
                const float* tile_rows = rows + n * T * JP;
                of.tile(of.slots + n * SLOT, tile_rows, pixel + n * T, steps - n * T, tile_u, tile_dy, sums, after);
            }
            __syncthreads();
            // The block's gradient of proj: the shares of its warps in fixed order, and those of the sets before.
            const bool more = set > split * a.sets, complete = a.splits == 1 && set + 1 == a.sets;
#pragma unroll 1
            for (int from = thread; from < steps * J; from += 32 * G * BATCH) {
                float sum[BATCH] = {};
                size_t at[BATCH];
#pragma unroll
                for (int l = 0; l < BATCH; l++) {
                    const int x = min(from + l * 32 * G, steps * J - 1);
                    at[l] = ((size_t)pixel[x / J] * 4 + k) * J + x % J;
                    if (more) sum[l] = share[at[l]];
                }
#pragma unroll
                for (int l = 0; l < BATCH; l++) {
                    const int x = from + l * 32 * G, t = x / J;
                    if (x >= steps * J) continue;
#pragma unroll
                    for (int w = 0; w < G; w++)
                        sum[l] += slots[((reverse * G + w) * TILES + t / T) * SLOT + t % T * J + x % J];
                    if (complete) a.dproj[pixels * 4 * J + at[l]] = narrow(sum[l]);
                    else share[at[l]] = sum[l];
                }
            }
            for (int x = meet ? threadIdx.x : steps * G * C; x < steps * G * C; x += 64 * G) {
                const int t = x / (G * C), c = x % (G * C), ch = set * G * CH + c * Q;
                const size_t at = (size_t)way_pixels[0][t] * D;
                float2 sum = a.add ? load_pair_f(total + at + ch, ch) : make_float2(0.f, 0.f);
#pragma unroll
                for (int way = 0; way < 2; way++) {
                    const int step = way ? steps - 1 - t : t;
                    const float* kept = slots + ((way * G + c / C) * TILES + step / T) * SLOT + KEPT;
                    const float2 own = *reinterpret_cast<const float2*>(kept + step % T * CH + c % C * Q);
                    sum.x += own.x, sum.y += own.y;
                }
                if (a.last) store_pair(a.du + pixels * D + at + ch, ch, sum);
                else store_pair_f(total + at + ch, ch, sum);
            }
            __syncthreads();
        }
        of.store_parameters();
    }
}
