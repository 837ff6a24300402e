// What all CUDA kernels of the scans share: single instructions, softplus, sums over lanes.
#pragma once

#ifndef EMULATED  // tests compile these files for the CPU, where a header of the tests replaces this part
#define LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]
typedef unsigned int uint;
typedef unsigned short ushort;
__device__ __forceinline__ float ex2(float x) {  // 2^x
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ void store2(float* p, float x, float y) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x), "f"(y) : "memory");
}
// The same value, but the compiler no longer knows how to compute it again, so it stays in a register.
template <typename Value>
__device__ __forceinline__ Value* keep(Value* p) {
    size_t address = __cvta_generic_to_global(p);
    asm("" : "+l"(address));
    return (Value*)__cvta_global_to_generic(address);
}
__device__ __forceinline__ int keep(int x) {
    asm("" : "+r"(x));
    return x;
}
__device__ __forceinline__ float half_to_float(ushort x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ ushort float_to_half(float x) {
    ushort y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ ushort float_to_bfloat16(float x) {
    ushort y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// log(1 + exp(x)) = max(x, 0) + log1p(e) with e = exp(-|x|). log1p(e) / e is a fit on [0, 1], to 3e-8 if EXACT, else (for
// the short types) to 2e-7. A NaN passes through e. `slope` is the derivative, 1 / (1 + exp(-x)).
template <bool EXACT>
__device__ __forceinline__ float softplus(float x, float& slope) {
    const float e = ex2(-LOG2E * fabsf(x));
    slope = (x > 0.f ? 1.f : e) * reciprocal(1.f + e);
    float p;
    if (EXACT) {
        p = 0.00536482455f;
        p = fmaf(p, e, -0.0300657917f);
        p = fmaf(p, e, 0.079204537f);
        p = fmaf(p, e, -0.137538031f);
        p = fmaf(p, e, 0.191536546f);
        p = fmaf(p, e, -0.248571634f);
        p = fmaf(p, e, 0.33321324f);
        p = fmaf(p, e, -0.499996483f);
    } else {
        p = -0.00877895579f;
        p = fmaf(p, e, 0.0449866429f);
        p = fmaf(p, e, -0.109022908f);
        p = fmaf(p, e, 0.178472087f);
        p = fmaf(p, e, -0.245368659f);
        p = fmaf(p, e, 0.332840651f);
        p = fmaf(p, e, -0.499981791f);
    }
    p = fmaf(p, e, 1.0f);
    return fmaf(e, p, fmaxf(x, 0.f));
}

// The number of this thread's warp, in a form that shows the compiler that it is the same for the whole warp.
__device__ __forceinline__ int warp_number() { return __shfl_sync(~0u, (int)threadIdx.x / 32, 0); }

// Sums v[i] over the lanes whose numbers differ in the bits of `stride`, `stride` / 2, .., LAST. At each level a lane
// keeps half of the values, so V exchanges suffice instead of V log2(lanes). Afterwards v[0 ..] of a lane holds the
// sums base, base + 1, ..; there are `count` of them.
template <int V, int STRIDE, int LAST>
__device__ __forceinline__ void reduce_scatter(float* v, int lane, int& base, int& count) {
    if constexpr (STRIDE >= LAST) {
        constexpr int HALF = (V + 1) / 2;
        bool upper = lane & STRIDE;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            float low = v[i], high = i + HALF < V ? v[i + HALF] : 0.f;
            float received = __shfl_xor_sync(~0u, upper ? low : high, STRIDE);
            v[i] = (upper ? high : low) + received;
        }
        base += upper ? HALF : 0;
        count = upper ? max(count - HALF, 0) : min(count, HALF);
        reduce_scatter<HALF, STRIDE / 2, LAST>(v, lane, base, count);
    }
}
