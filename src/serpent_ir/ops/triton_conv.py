"""Depthwise 3x3 convolution and SiLU of channels-last maps, forward and backward, in Triton.

A program takes a tile of TH x TW positions and BD channels; the nine shifted tiles come from the first-level cache.
Where a program holds all channels, the product that follows (`x_proj`) is taken from the same registers. Weights arrive
as taps (9, channels), rows `tap_stride` apart. For the gradients of weights a program walks down a column of tiles and
keeps a share; shares are added in a fixed order, so the same inputs give the same bits.
"""

# Triton's compile-time values have no types that a checker follows.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from serpent_ir.ops.triton_norm import pick, sigmoid

# Rows and columns of a tile, channels, launch options: of the convolution, and of its weights' gradients, there with
# the tiles that a program walks down.
CONV_TILE = (4, 16, 64, {"num_warps": 4})
BACKWARD_TILE = (1, 16, 64, 16, {"num_warps": 4})
# The convolution with the product, by channels: rows, columns, columns of the product made at a time, launch options.
# Wider maps have too large a matrix for a program to run through for each tile: the product is the library's.
PRODUCT_TILES = {64: (4, 16, 32, {"num_warps": 8}), 128: (4, 16, 64, {"num_warps": 8})}
# Strides are compile-time values: the compiler has to see that they are multiples of a wide load.
INTS = ("H", "W", "across", "down")


@triton.jit
def place(across, down):
    """Image, row of tiles and column of tiles of a program; a map has `down` rows of `across` tiles."""
    tile = tl.program_id(0)
    image = tile // (across * down)
    tile -= image * (across * down)
    return image.to(tl.int64), tile // across, tile % across


@triton.jit
def shifted(x, dy: tl.constexpr, dx: tl.constexpr, row, column, i, j, H, W, stride, channels, d: tl.constexpr):
    """(positions, channels) of the tile at (row, column) moved by (dy, dx), float32, 0 outside of the map.

    x points to position (row, column), i and j are the positions' rows and columns within the tile.
    """
    r, k = row + i + dy, column + j + dx
    ok = (r >= 0) & (r < H) & (k >= 0) & (k < W)
    at = x + ((i + dy) * W + (j + dx))[:, None] * stride + channels[None, :]
    return tl.load(at, mask=ok[:, None] & (channels < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def convolve(
    x, taps, tap_stride, acc, row, column, i, j, H, W, stride, channels, d: tl.constexpr, FLIP: tl.constexpr
):  # fmt: skip
    """acc + the sum over nine shifts of tap times shifted tile; FLIP turns the kernel round, as its transpose needs."""
    for tap in tl.static_range(9):
        weight = tl.load(taps + (8 - tap if FLIP else tap) * tap_stride + channels, mask=channels < d, other=0.0)
        tile = shifted(x, tap // 3 - 1, tap % 3 - 1, row, column, i, j, H, W, stride, channels, d)
        acc += tile * weight.to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=INTS)
def conv_kernel(
    x, taps, bias, out, matrix, product, H, W, across, down,
    in_stride: tl.constexpr, out_stride: tl.constexpr, tap_stride: tl.constexpr,
    d: tl.constexpr, n: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    FORWARD: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """FORWARD: out = SiLU(convolution(x) + bias), and with PRODUCT product (.., n) = out . matrix^T, matrix (n, d).
    Else out = transpose of the convolution of x. Strides are those of a position."""
    image, tile_row, tile_column = place(across, down)
    row, column = tile_row * TH, tile_column * TW
    i, j = tl.arange(0, TH * TW) // TW, tl.arange(0, TH * TW) % TW
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    corner = (image * H + row) * W + column
    acc = tl.zeros((TH * TW, BD), tl.float32)
    if FORWARD:
        acc += tl.load(bias + channels, mask=channels < d, other=0.0).to(tl.float32)[None, :]
    acc = convolve(
        x + corner * in_stride, taps, tap_stride, acc, row, column, i, j, H, W, in_stride, channels, d, not FORWARD
    )  # fmt: skip
    if FORWARD:
        acc *= sigmoid(acc)
    inside = ((row + i < H) & (column + j < W))[:, None]
    local = (i * W + j)[:, None]
    tile = acc.to(out.dtype.element_ty)
    tl.store(out + corner * out_stride + local * out_stride + channels[None, :], tile, mask=inside & (channels < d))
    if PRODUCT:
        for first in range(0, n, BN):
            columns = first + tl.arange(0, BN)
            w = tl.load(
                matrix + columns[None, :] * d + channels[:, None],
                mask=(columns < n)[None, :] & (channels < d)[:, None],
                other=0.0,
            ).to(tile.dtype)
            part = tl.dot(tile, w).to(product.dtype.element_ty)
            tl.store(product + corner * n + local * n + columns[None, :], part, mask=inside & (columns < n)[None, :])


@triton.jit(do_not_specialize=INTS)
def conv_backward_kernel(
    grad, x, taps, bias, grad_pre, shares, H, W, across, down,
    in_stride: tl.constexpr, tap_stride: tl.constexpr,
    d: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BD: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """grad_pre = grad times the slope of SiLU at convolution(x) + bias, computed again. grad, grad_pre are dense.

    A program walks STEPS tiles down. shares (programs, 10, d): of the gradients of the nine taps and the bias.
    """
    image, walk, tile_column = place(across, down)
    column = tile_column * TW
    i, j = tl.arange(0, TH * TW) // TW, tl.arange(0, TH * TW) % TW
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    start = tl.load(bias + channels, mask=channels < d, other=0.0).to(tl.float32)[None, :]
    g0 = tl.zeros((TH * TW, BD), tl.float32)
    g1, g2, g3, g4, g5, g6, g7, g8, g9 = g0, g0, g0, g0, g0, g0, g0, g0, g0
    first = walk * STEPS * TH
    for row in range(first, tl.minimum(first + STEPS * TH, H), TH):
        corner = (image * H + row) * W + column
        here = x + corner * in_stride
        acc = tl.zeros((TH * TW, BD), tl.float32) + start
        acc = convolve(here, taps, tap_stride, acc, row, column, i, j, H, W, in_stride, channels, d, False)
        s = sigmoid(acc)
        inside = ((row + i < H) & (column + j < W))[:, None] & (channels < d)[None, :]
        at = (i * W + j)[:, None] * d + channels[None, :]
        pre = tl.load(grad + corner * d + at, mask=inside, other=0.0).to(tl.float32) * (s + acc * s * (1.0 - s))
        tl.store(grad_pre + corner * d + at, pre.to(grad_pre.dtype.element_ty), mask=inside)
        g0 += pre * shifted(here, -1, -1, row, column, i, j, H, W, in_stride, channels, d)
        g1 += pre * shifted(here, -1, 0, row, column, i, j, H, W, in_stride, channels, d)
        g2 += pre * shifted(here, -1, 1, row, column, i, j, H, W, in_stride, channels, d)
        g3 += pre * shifted(here, 0, -1, row, column, i, j, H, W, in_stride, channels, d)
        g4 += pre * shifted(here, 0, 0, row, column, i, j, H, W, in_stride, channels, d)
        g5 += pre * shifted(here, 0, 1, row, column, i, j, H, W, in_stride, channels, d)
        g6 += pre * shifted(here, 1, -1, row, column, i, j, H, W, in_stride, channels, d)
        g7 += pre * shifted(here, 1, 0, row, column, i, j, H, W, in_stride, channels, d)
        g8 += pre * shifted(here, 1, 1, row, column, i, j, H, W, in_stride, channels, d)
        g9 += pre
    shares += tl.program_id(0).to(tl.int64) * 10 * d + channels
    tl.store(shares, tl.sum(g0, axis=0), mask=channels < d)
    tl.store(shares + d, tl.sum(g1, axis=0), mask=channels < d)
    tl.store(shares + 2 * d, tl.sum(g2, axis=0), mask=channels < d)
    tl.store(shares + 3 * d, tl.sum(g3, axis=0), mask=channels < d)
    tl.store(shares + 4 * d, tl.sum(g4, axis=0), mask=channels < d)
    tl.store(shares + 5 * d, tl.sum(g5, axis=0), mask=channels < d)
    tl.store(shares + 6 * d, tl.sum(g6, axis=0), mask=channels < d)
    tl.store(shares + 7 * d, tl.sum(g7, axis=0), mask=channels < d)
    tl.store(shares + 8 * d, tl.sum(g8, axis=0), mask=channels < d)
    tl.store(shares + 9 * d, tl.sum(g9, axis=0), mask=channels < d)


def as_taps(weights: list[Tensor]) -> list[Tensor]:
    """The weights (d, 1, 3, 3) of depthwise convolutions as taps (9, d), by two launches for all of them."""
    rows = [w.detach().reshape(-1, 9) for w in weights]
    together = (torch.cat(rows) if len(rows) > 1 else rows[0]).t().contiguous()
    return list(together.split([len(w) for w in weights], 1))


def conv_silu(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """SiLU(depthwise convolution) of x (B, H, W, d), which may be a slice of channels of a contiguous map."""
    out = x.new_empty(x.shape)
    _conv(x, taps, bias, out, CONV_TILE)
    return out


def conv_silu_product(x: Tensor, taps: Tensor, bias: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`conv_silu`, and its product with matrix (n, d), contiguous: (B, H, W, n)."""
    out = x.new_empty(x.shape)
    product = x.new_empty(*x.shape[:-1], len(matrix))
    TH, TW, BN, options = pick(PRODUCT_TILES, x.shape[-1])
    tile = TH, TW, max(16, triton.next_power_of_2(x.shape[-1])), options
    _conv(x, taps, bias, out, tile, product=(matrix, product, BN))
    return out, product


def conv_transpose(grad: Tensor, taps: Tensor, grad_x: Tensor) -> None:
    """Write the gradient of the convolution's input into `grad_x`, which may be a slice of channels."""
    _conv(grad, taps, taps, grad_x, CONV_TILE, forward=False)


def _conv(
    x: Tensor, taps: Tensor, bias: Tensor, out: Tensor, tile: tuple[int, int, int, dict[str, int]],
    *, forward: bool = True, product: tuple[Tensor, Tensor, int] | None = None,
) -> None:  # fmt: skip
    batch, H, W, d = x.shape
    TH, TW, BD, options = tile
    across, down = triton.cdiv(W, TW), triton.cdiv(H, TH)
    matrix, result, BN = product or (taps, out, 16)
    if product is None:
        BD = min(BD, triton.next_power_of_2(d))
    with torch.cuda.device_of(x):
        conv_kernel[(batch * across * down, triton.cdiv(d, BD))](
            x, taps, bias, out, matrix, result, H, W, across, down,
            in_stride=x.stride(2), out_stride=out.stride(2), tap_stride=taps.stride(0),
            d=d, n=len(matrix), TH=TH, TW=TW, BD=BD, BN=min(BN, max(16, triton.next_power_of_2(len(matrix)))),
            FORWARD=forward, PRODUCT=product is not None, num_stages=1, **options,
        )  # fmt: skip


def conv_silu_backward(grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients before SiLU (a map; its `conv_transpose` is that of x), of the weight (d, 1, 3, 3) and of the bias."""
    batch, H, W, d = x.shape
    TH, TW, BD, steps, options = BACKWARD_TILE
    BD = min(BD, triton.next_power_of_2(d))
    across, down = triton.cdiv(W, TW), triton.cdiv(H, TH * steps)
    grad_pre = grad.new_empty(grad.shape)
    shares = grad.new_empty(batch * across * down, 10, d, dtype=torch.float32)
    with torch.cuda.device_of(x):
        conv_backward_kernel[(len(shares), triton.cdiv(d, BD))](
            grad, x, taps, bias, grad_pre, shares, H, W, across, down,
            in_stride=x.stride(2), tap_stride=taps.stride(0), d=d, TH=TH, TW=TW, BD=BD, STEPS=steps, **options,
        )  # fmt: skip
    total = shares.sum(0)
    return grad_pre, total[:9].t().reshape(d, 1, 3, 3), total[9]
