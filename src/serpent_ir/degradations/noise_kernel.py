"""Normal numbers by counting, in one kernel. `ImageGenerators.randn` of `degradations.randomness` defines them."""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from serpent_ir.ops.dense import on_one_device

BLOCK, WARPS = 256, 4


@triton.jit(do_not_specialize=["start", "height", "width"])
def normal_kernel(
    out,
    keys,
    origins,
    sizes,
    key_stride,
    place_stride,
    start,
    height,
    width,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i, b) makes pixels i * BLOCK and on of window b, all channels. 64 bits make two numbers."""
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(origins + b * place_stride) + at // width
    column = tl.load(origins + b * place_stride + 1) + at % width
    pixel = row * tl.load(sizes + b * place_stride + 1) + column
    pairs: tl.constexpr = (CHANNELS + 1) // 2
    for pair in tl.static_range(pairs):
        x = (pixel * pairs + pair) * STEP + (tl.load(keys + b * key_stride) + start)
        x = x.to(tl.uint64, bitcast=True)
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        x = x ^ (x >> 31)
        high, low = (x >> 32).to(tl.int64), (x & 0xFFFFFFFF).to(tl.int64)
        radius = tl.sqrt(tl.maximum(-2.0 * tl.log((high.to(tl.float32) + 0.5) * 2.3283064365386963e-10), 0.0))
        angle = low.to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
        place = out + (b * CHANNELS + pair) * height * width + at
        tl.store(place, radius * tl.cos(angle), mask=at < height * width)
        if pairs + pair < CHANNELS:
            tl.store(place + pairs * height * width, radius * tl.sin(angle), mask=at < height * width)


def normal(
    keys: Tensor, origins: Tensor, sizes: Tensor, start: int, step: int, channels: int, height: int, width: int
) -> Tensor:
    """(B, channels, height, width) float32, as `ImageGenerators.randn` of these keys (B,), origins and sizes (B, 2)."""
    on_one_device(keys, origins, sizes)
    if origins.stride() != sizes.stride() or origins.stride(1) != 1:
        origins, sizes = origins.contiguous(), sizes.contiguous()
    out = torch.empty((len(keys), channels, height, width), device=keys.device)
    grid = (triton.cdiv(height * width, BLOCK), len(keys))
    strides = keys.stride(0), origins.stride(0)
    with torch.cuda.device_of(out):
        normal_kernel[grid](
            out, keys, origins, sizes, *strides, start, height, width, channels, step, BLOCK, num_warps=WARPS
        )
    return out
