"""LayerNorm over channels, alone and with the gate, forward and backward, in Triton.

Maps are treated as rows: (rows, channels), with channels innermost. Statistics are float32, found in two passes over a
row held in registers. In the backward pass every program walks over tiles of rows and keeps its share of the
parameters' gradients. Shares are added in a fixed order afterwards, so the same inputs give the same bits.
"""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from serpent_ir.ops.dense import dense, even_rows, on_one_device

# Elements per tile and warps; in the backward pass also programs per multiprocessor, each with shares of gradients.
FORWARD_TILE = (2048, 4)
BACKWARD_TILE = (2048, 4, 4)
# Rows and columns that a program of `sum_shares` takes at a time.
SHARES_TILE = (128, 16)


@triton.jit
def row_tile(x, left, stride, c, BM: tl.constexpr, BC: tl.constexpr):
    """(BM, BC) in float32, from rows `stride` apart; 0 past the `left`-th row and the c-th channel."""
    rows, k = tl.arange(0, BM)[:, None], tl.arange(0, BC)[None, :]
    return tl.load(x + rows * stride + k, mask=(rows < left) & (k < c), other=0.0).to(tl.float32)


@triton.jit
def put_rows(out, tile, left, stride, c, BM: tl.constexpr, BC: tl.constexpr):
    rows, k = tl.arange(0, BM)[:, None], tl.arange(0, BC)[None, :]
    tl.store(out + rows * stride + k, tile.to(out.dtype.element_ty), mask=(rows < left) & (k < c))


@triton.jit
def standardise(tile, eps, c: tl.constexpr, BC: tl.constexpr):
    """Rows minus their mean, over their standard deviation, 0 past the c-th channel; and the inverse deviation."""
    centred = tile - tl.sum(tile, axis=1)[:, None] / c
    if c < BC:
        centred = tl.where(tl.arange(0, BC)[None, :] < c, centred, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / c + eps)
    return centred * scale[:, None], scale


@triton.jit
def channel_row(x, c, BC: tl.constexpr):
    """(1, BC) of a parameter, float32, 0 past the c-th channel."""
    k = tl.arange(0, BC)
    return tl.load(x + k, mask=k < c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalise_backward(grad, hat, scale, c: tl.constexpr):
    """The gradient of the rows that `standardise` took, from that of its result `hat`.

    Zeros past the c-th channel stay zero.
    """
    mean = tl.sum(grad, axis=1) / c
    along = tl.sum(grad * hat, axis=1) / c
    return (grad - mean[:, None] - hat * along[:, None]) * scale[:, None]


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=("rows",))
def norm_kernel(x, weight, bias, out, rows, eps, c: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BM
    left = tl.minimum(rows - first, BM).to(tl.int32)
    hat, _ = standardise(row_tile(x + first * c, left, c, c, BM, BC), eps, c, BC)
    normed = hat * channel_row(weight, c, BC) + channel_row(bias, c, BC)
    put_rows(out + first * c, normed, left, c, c, BM, BC)


@triton.jit(do_not_specialize=("rows",))
def norm_backward_kernel(
    grad_normed, grad_out, x, weight, bias, grad_x, normed, shares, rows, eps,
    c: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad_x = grad_out + the gradient through LayerNorm(x). LayerNorm(x) is computed again, into `normed`.

    `normed` may be `grad_normed`. shares (programs, 2, c) are for the gradients of weight and bias.
    """
    gamma, beta = channel_row(weight, c, BC), channel_row(bias, c, BC)
    d_gamma = tl.zeros((BM, BC), tl.float32)
    d_beta = tl.zeros((BM, BC), tl.float32)
    zero = tl.program_id(0).to(tl.int64) * 0  # makes offsets 64-bit
    for tile in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        first = zero + tile * BM
        left = tl.minimum(rows - first, BM).to(tl.int32)
        hat, scale = standardise(row_tile(x + first * c, left, c, c, BM, BC), eps, c, BC)
        grad = row_tile(grad_normed + first * c, left, c, c, BM, BC)
        d_gamma += grad * hat
        d_beta += grad
        back = normalise_backward(grad * gamma, hat, scale, c)
        put_rows(grad_x + first * c, back + row_tile(grad_out + first * c, left, c, c, BM, BC), left, c, c, BM, BC)
        put_rows(normed + first * c, hat * gamma + beta, left, c, c, BM, BC)
    k = tl.arange(0, BC)
    shares += tl.program_id(0) * 2 * c + k
    tl.store(shares, tl.sum(d_gamma, axis=0), mask=k < c)
    tl.store(shares + c, tl.sum(d_beta, axis=0), mask=k < c)


@triton.jit(do_not_specialize=("rows",))
def gate_kernel(
    y, z, weight, bias, out, rows, eps,
    z_stride: tl.constexpr, d: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out (rows, d) = LayerNorm(y) * SiLU(z); rows of z lie `z_stride` apart."""
    first = tl.program_id(0).to(tl.int64) * BM
    left = tl.minimum(rows - first, BM).to(tl.int32)
    hat, _ = standardise(row_tile(y + first * d, left, d, d, BM, BD), eps, d, BD)
    gate = row_tile(z + first * z_stride, left, z_stride, d, BM, BD)
    normed = hat * channel_row(weight, d, BD) + channel_row(bias, d, BD)
    put_rows(out + first * d, normed * gate * sigmoid(gate), left, d, d, BM, BD)


@triton.jit(do_not_specialize=("rows",))
def gate_backward_kernel(
    grad, y, z, weight, bias, gated, grad_y, grad_z, shares, rows, eps,
    z_stride: tl.constexpr, d: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of `gate_kernel`; also its value again into `gated`, which may be `grad`. grad_z has z's stride."""
    gamma, beta = channel_row(weight, d, BD), channel_row(bias, d, BD)
    d_gamma = tl.zeros((BM, BD), tl.float32)
    d_beta = tl.zeros((BM, BD), tl.float32)
    zero = tl.program_id(0).to(tl.int64) * 0  # makes offsets 64-bit
    for tile in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        first = zero + tile * BM
        left = tl.minimum(rows - first, BM).to(tl.int32)
        hat, scale = standardise(row_tile(y + first * d, left, d, d, BM, BD), eps, d, BD)
        gate = row_tile(z + first * z_stride, left, z_stride, d, BM, BD)
        g = row_tile(grad + first * d, left, d, d, BM, BD)
        normed = hat * gamma + beta
        s = sigmoid(gate)
        silu = gate * s
        put_rows(grad_z + first * z_stride, g * normed * (s + silu * (1.0 - s)), left, z_stride, d, BM, BD)
        put_rows(gated + first * d, normed * silu, left, d, d, BM, BD)
        g = g * silu
        d_gamma += g * hat
        d_beta += g
        put_rows(grad_y + first * d, normalise_backward(g * gamma, hat, scale, d), left, d, d, BM, BD)
    k = tl.arange(0, BD)
    shares += tl.program_id(0) * 2 * d + k
    tl.store(shares, tl.sum(d_gamma, axis=0), mask=k < d)
    tl.store(shares + d, tl.sum(d_beta, axis=0), mask=k < d)


@triton.jit(do_not_specialize=("count",))
def sum_shares_kernel(shares, out, count, n: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """out (n) = the sum of the rows of shares (count, n)."""
    rows, columns = tl.arange(0, BM)[:, None], (tl.program_id(0) * BN + tl.arange(0, BN))[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, count, BM):
        at = shares + (first + rows) * n + columns
        total += tl.load(at, mask=(first + rows < count) & (columns < n), other=0.0)
    tl.store(out + columns, tl.sum(total, axis=0)[None, :], mask=columns < n)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def sum_shares(shares: Tensor) -> Tensor:
    """The sum over the first dimension of float32 `shares`, contiguous, always in the same order."""
    out = shares.new_empty(shares.shape[1:])
    BM, BN = SHARES_TILE
    with torch.cuda.device_of(shares):
        sum_shares_kernel[(triton.cdiv(out.numel(), BN),)](shares, out, len(shares), n=out.numel(), BM=BM, BN=BN)
    return out


def pick(tiles: dict[int, tuple[Any, ...]], channels: int) -> tuple[Any, ...]:
    """The entry for a number of channels, or for the next larger one that has an entry."""
    return tiles[min((c for c in tiles if c >= channels), default=max(tiles))]


def _forward_tile(channels: int) -> dict[str, int]:
    size, warps = FORWARD_TILE
    return {"BM": max(1, size // triton.next_power_of_2(channels)), "num_warps": warps}


def _backward_tile(x: Tensor, rows: int, channels: int) -> tuple[dict[str, int], Tensor]:
    """Compile-time arguments, and an array for each program's share of the parameters' gradients."""
    size, warps, programs = BACKWARD_TILE
    BM = max(1, size // triton.next_power_of_2(channels))
    count = min(triton.cdiv(rows, BM), programs * processors(x.device))
    return {"BM": BM, "num_warps": warps}, x.new_empty(count, 2, channels, dtype=torch.float32)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm of x (..., c) in `dtype`."""
    x, weight, bias = dense(x, weight, bias)
    c = x.shape[-1]
    rows = x.numel() // c
    out = x.new_empty(x.shape, dtype=dtype)
    meta = _forward_tile(c)
    with torch.cuda.device_of(x):
        norm_kernel[(triton.cdiv(rows, meta["BM"]),)](
            x, weight, bias, out, rows, eps, c=c, BC=triton.next_power_of_2(c), **meta
        )
    return out


def layer_norm_backward(
    grad_normed: Tensor, grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For x + f(LayerNorm(x)): gradient of x, LayerNorm(x) (over grad_normed), gradients of weight and bias."""
    grad_normed, grad_out, x, weight, bias = dense(grad_normed, grad_out, x, weight, bias)
    c = x.shape[-1]
    rows = x.numel() // c
    grad_x = torch.empty_like(x)
    meta, shares = _backward_tile(x, rows, c)
    with torch.cuda.device_of(x):
        norm_backward_kernel[(len(shares),)](
            grad_normed, grad_out, x, weight, bias, grad_x, grad_normed, shares, rows, eps,
            c=c, BC=triton.next_power_of_2(c), **meta,
        )  # fmt: skip
    d_weight, d_bias = sum_shares(shares)
    return grad_x, grad_normed, d_weight, d_bias


def gate(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(y) * SiLU(z) for y (..., d). A z that is a slice of channels of a contiguous map is not copied."""
    y, weight, bias = dense(y, weight, bias)
    on_one_device(y, z)
    z = even_rows(z)
    d = y.shape[-1]
    rows = y.numel() // d
    out, meta = torch.empty_like(y), _forward_tile(d)
    with torch.cuda.device_of(y):
        gate_kernel[(triton.cdiv(rows, meta["BM"]),)](
            y, z, weight, bias, out, rows, eps, z_stride=z.stride(-2), d=d, BD=triton.next_power_of_2(d), **meta
        )
    return out


def gate_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float, grad_z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of y; the result of `gate` again, written over grad; gradients of weight and bias.

    The gradient of z goes into `grad_z`, which has z's shape and row stride.
    """
    grad, y, weight, bias = dense(grad, y, weight, bias)
    on_one_device(y, z, grad_z)
    d = y.shape[-1]
    rows = y.numel() // d
    grad_y = torch.empty_like(y)
    meta, shares = _backward_tile(y, rows, d)
    with torch.cuda.device_of(y):
        gate_backward_kernel[(len(shares),)](
            grad, y, z, weight, bias, grad, grad_y, grad_z, shares, rows, eps,
            z_stride=z.stride(-2), d=d, BD=triton.next_power_of_2(d), **meta,
        )  # fmt: skip
    d_weight, d_bias = sum_shares(shares)
    return grad_y, grad, d_weight, d_bias
