// Casts float32 arrays to a short type, many per launch: the weights of a network, anew for each pass.

#include "common.cuh"

struct CastArgs {
    const float* from[ARRAYS];  // aligned for vector loads
    io* to[ARRAYS];
    int sizes[ARRAYS];
};

extern "C" __global__ void LAUNCH_BOUNDS(256, 1) cast(const CastArgs a) {
    const int size = a.sizes[blockIdx.y], at = (blockIdx.x * 256 + threadIdx.x) * 4;
    const float* from = a.from[blockIdx.y] + at;
    io* to = a.to[blockIdx.y] + at;
    if (at + 4 <= size) {
        const float4 x = *reinterpret_cast<const float4*>(from);
        Raw* pairs = reinterpret_cast<Raw*>(to);
        pairs[0] = pack(x.x, x.y);
        pairs[1] = pack(x.z, x.w);
    } else {
        for (int i = 0; i < size - at; i++) to[i] = narrow(from[i]);
    }
}
