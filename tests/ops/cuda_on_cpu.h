// Stands in for CUDA's compiler and device, so that the kernels of ops/cuda/src run on a CPU: every thread of a block is a
// fiber, which hands over at each exchange between lanes and at each barrier. Slow, exact, for small tests.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __shared__ static
#define LAUNCH_BOUNDS(threads, blocks)
#define DYNAMIC_SHARED(name) float* name = emulated::shared.data()
typedef unsigned int uint;
typedef unsigned short ushort;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx;
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline long long min(long long a, long long b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline float ex2(float x) { return exp2f(x); }
static inline float reciprocal(float x) { return 1 / x; }
static inline void prefetch(const void*) {}
static inline void store2(float* p, float x, float y) { p[0] = x, p[1] = y; }
template <typename Value>
static inline Value keep(Value x) { return x; }
static inline float __uint_as_float(uint x) { float y; memcpy(&y, &x, 4); return y; }
static inline uint bits(float x) { uint y; memcpy(&y, &x, 4); return y; }
static inline ushort float_to_bfloat16(float x) {
    if (x != x) return 0x7fff;
    uint b = bits(x);
    return (ushort)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline float half_to_float(ushort x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
static inline ushort float_to_half(float x) { _Float16 y = (_Float16)x; ushort z; memcpy(&z, &y, 2); return z; }

namespace emulated {
struct Barrier { int arrived = 0, generation = 0; };
struct Thread { ucontext_t context; bool done; };
static std::vector<float> shared;
static std::vector<Thread> threads;
static std::vector<char> stacks;
static std::vector<Barrier> warp_barriers;
static std::vector<int> alive_in_warp;
static std::vector<float> lanes;  // (warps, 2, 32): what lanes show each other, for two exchanges in turn
static Barrier block_barrier;
static int alive, current;
static ucontext_t scheduler;
static void (*kernel)(const void*);
static const void* arguments;
constexpr size_t STACK = 256 << 10;

static void yield() { swapcontext(&threads[current].context, &scheduler); }
static void wait(Barrier& barrier, const int& expected) {
    int generation = barrier.generation;
    barrier.arrived++;
    while (barrier.generation == generation) {
        if (barrier.arrived >= expected) {
            barrier.arrived = 0;
            barrier.generation++;
            return;
        }
        yield();
    }
}
template <typename Value>
static Value exchange(Value x, int from) {
    static_assert(sizeof(Value) == 4, "one register");
    int warp = current / 32;
    float* seen = &lanes[(warp * 2 + warp_barriers[warp].generation % 2) * 32];
    memcpy(&seen[current % 32], &x, 4);
    wait(warp_barriers[warp], alive_in_warp[warp]);
    memcpy(&x, &seen[from], 4);
    return x;
}
static void body() {
    kernel(arguments);
    threads[current].done = true;
    alive--;
    alive_in_warp[current / 32]--;
    yield();
}
static void run(void (*function)(const void*), const void* args, const unsigned* grid, int count, int shared_bytes) {
    kernel = function, arguments = args;
    stacks.resize(count * STACK);
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) {
                shared.assign(shared_bytes / 4, NAN);
                threads.assign(count, {});
                warp_barriers.assign(count / 32, {});
                alive_in_warp.assign(count / 32, 32);
                lanes.assign(count * 2, NAN);
                block_barrier = {};
                alive = count;
                for (int i = 0; i < count; i++) {
                    getcontext(&threads[i].context);
                    threads[i].context.uc_stack.ss_sp = &stacks[i * STACK];
                    threads[i].context.uc_stack.ss_size = STACK;
                    makecontext(&threads[i].context, body, 0);
                }
                while (alive)
                    for (int i = 0; i < count; i++)
                        if (!threads[i].done) {
                            current = i;
                            threadIdx = {(unsigned)i, 0, 0};
                            swapcontext(&scheduler, &threads[i].context);
                        }
            }
}
}  // namespace emulated

template <typename Value>
static inline Value __shfl_xor_sync(uint, Value x, int mask) { return emulated::exchange(x, (threadIdx.x % 32) ^ mask); }
template <typename Value>
static inline Value __shfl_sync(uint, Value x, int from) { return emulated::exchange(x, from % 32); }
static inline void __syncwarp() { emulated::wait(emulated::warp_barriers[emulated::current / 32], emulated::alive_in_warp[emulated::current / 32]); }
static inline void __syncthreads() { emulated::wait(emulated::block_barrier, emulated::alive); }

#define EMULATE(name, Args)                                                                                    \
    extern "C" void run_##name(const void* args, const unsigned* grid, int threads, int shared) {              \
        emulated::run([](const void* a) { name(*static_cast<const Args*>(a)); }, args, grid, threads, shared); \
    }
