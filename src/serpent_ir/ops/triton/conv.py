"""Depthwise 3x3 convolution and SiLU of channels-last maps, forward and backward, in Triton.

A program walks down TH rows of TW columns and BD channels. It loads each row three times, shifted, two rows before the
row is added to the pending sums. If a program holds all channels, it takes the product that follows (`x_proj`) from the
same registers. Weights arrive as taps (9, channels), with rows `tap_stride` apart. Each program keeps its share of the
gradients of the weights. Shares are added in a fixed order, so the same inputs give the same bits.
"""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from serpent_ir.ops.dense import dense, even_rows, on_one_device
from serpent_ir.ops.triton.block import matrix_tile
from serpent_ir.ops.triton.norm import pick, processors, sigmoid, sum_shares

# Columns, channels and launch options of the convolution, and of the gradients of its weights.
CONV_TILE = (16, 64, {"num_warps": 8})
BACKWARD_TILE = (8, 64, {"num_warps": 4})
# The convolution with the product, by channels. On wider maps the matrix is too large for a program to keep, so there
# the library computes the product.
PRODUCT_TILES = {64: (16, {"num_warps": 8}), 128: (16, {"num_warps": 8})}
# Rows that a program walks: fewer if the map would not give every multiprocessor PROGRAMS programs.
ROWS = (4, 32)
PROGRAMS = 8
# Strides are compile-time values, because the compiler must see that they are multiples of a wide load.
INTS = ("H", "W", "TH", "across", "down")


@triton.jit
def place(across, down):
    """Image, row of tiles and column of tiles of a program. A map has `down` rows of `across` tiles."""
    tile = tl.program_id(0)
    image = tile // (across * down)
    tile -= image * (across * down)
    return image.to(tl.int64), tile // across, tile % across


@triton.jit
def row_of(x, row, H, W, local, stride, left, middle, right):
    """Row `row` of a walk's columns, and of the columns one to the left and one to the right; 0 outside the map.

    x points to row 0 and the walk's first column, `local` to positions and channels in a row. `row` is a 64-bit number.
    """
    rows = row + local * 0  # a constant tensor, since the interpreter takes no mask made from a scalar's
    ok = (rows >= 0) & (rows < H)
    at = x + row * W * stride + local
    return (
        tl.load(at - stride, mask=left & ok, other=0.0),
        tl.load(at, mask=middle & ok, other=0.0),
        tl.load(at + stride, mask=right & ok, other=0.0),
    )


@triton.jit
def three_taps(acc, left, middle, right, w0, w1, w2):
    return acc + left.to(tl.float32) * w0 + middle.to(tl.float32) * w1 + right.to(tl.float32) * w2


@triton.jit
def tap(taps, index: tl.constexpr, stride, channels, d):
    return tl.load(taps + index * stride + channels, mask=channels < d, other=0.0).to(tl.float32)[None, :]


@triton.jit
def nine(taps, stride, channels, d, FLIP: tl.constexpr):
    """The taps of some channels, (1, channels) each. FLIP reverses the kernel, as the transposed convolution needs."""
    return (
        tap(taps, 8 if FLIP else 0, stride, channels, d),
        tap(taps, 7 if FLIP else 1, stride, channels, d),
        tap(taps, 6 if FLIP else 2, stride, channels, d),
        tap(taps, 5 if FLIP else 3, stride, channels, d),
        tap(taps, 4, stride, channels, d),
        tap(taps, 3 if FLIP else 5, stride, channels, d),
        tap(taps, 2 if FLIP else 6, stride, channels, d),
        tap(taps, 1 if FLIP else 7, stride, channels, d),
        tap(taps, 0 if FLIP else 8, stride, channels, d),
    )


@triton.jit
def borders(column, j, W, channels, d):
    """Which of a walk's columns, and of the columns to the left and to the right of each, are on the map."""
    k, ok = (column + j)[:, None], (channels < d)[None, :]
    return (k >= 1) & (k <= W) & ok, (k < W) & ok, (k + 1 < W) & ok


@triton.jit(do_not_specialize=INTS)
def conv_kernel(
    x, taps, bias, out, matrix, product, H, W, TH, across, down,
    in_stride: tl.constexpr, out_stride: tl.constexpr, tap_stride: tl.constexpr,
    d: tl.constexpr, n: tl.constexpr, TW: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    FORWARD: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """FORWARD: out = SiLU(convolution(x) + bias); with PRODUCT also product (.., n) = out . matrix^T, matrix (n, d).

    Otherwise out = the transposed convolution of x. Strides are those of a position.
    """
    image, tile_row, tile_column = place(across, down)
    top, column = tile_row * TH, tile_column * TW
    j = tl.arange(0, TW)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = nine(taps, tap_stride, channels, d, not FORWARD)
    start = tl.zeros((TW, BD), tl.float32)
    if FORWARD:
        start += tl.load(bias + channels, mask=channels < d, other=0.0).to(tl.float32)[None, :]
    columns = tl.arange(0, BN)
    if PRODUCT:
        w = matrix_tile(matrix, 0, 0, d, n, d, BD, BN)
    left, middle, right = borders(column, j, W, channels, d)
    zero = image * 0  # makes row numbers 64-bit
    corner = image * H * W + column
    x += corner * in_stride
    local = j[:, None] * in_stride + channels[None, :]
    out_local = j[:, None] * out_stride + channels[None, :]
    # The sums of two rows and the loads of two rows are pending, since memory takes longer than adding a row.
    l0, m0, r0 = row_of(x, zero + top - 1, H, W, local, in_stride, left, middle, right)
    l1, m1, r1 = row_of(x, zero + top, H, W, local, in_stride, left, middle, right)
    l2, m2, r2 = row_of(x, zero + top + 1, H, W, local, in_stride, left, middle, right)
    l3, m3, r3 = row_of(x, zero + top + 2, H, W, local, in_stride, left, middle, right)
    above = three_taps(three_taps(start, l0, m0, r0, w0, w1, w2), l1, m1, r1, w3, w4, w5)
    here = three_taps(start, l1, m1, r1, w0, w1, w2)
    for row in range(top, tl.minimum(top + TH, H)):
        l4, m4, r4 = row_of(x, zero + row + 3, H, W, local, in_stride, left, middle, right)
        acc = three_taps(above, l2, m2, r2, w6, w7, w8)
        above = three_taps(here, l2, m2, r2, w3, w4, w5)
        here = three_taps(start, l2, m2, r2, w0, w1, w2)
        l2, m2, r2, l3, m3, r3 = l3, m3, r3, l4, m4, r4
        if FORWARD:
            acc *= sigmoid(acc)
        tile = acc.to(out.dtype.element_ty)
        position = corner + (zero + row) * W
        tl.store(out + position * out_stride + out_local, tile, mask=middle)
        if PRODUCT:
            part = tl.dot(tile, w).to(product.dtype.element_ty)
            at = product + position * n + j[:, None] * n + columns[None, :]
            tl.store(at, part, mask=(column + j < W)[:, None] & (columns < n)[None, :])


@triton.jit(do_not_specialize=INTS)
def conv_backward_kernel(
    grad, x, taps, bias, grad_pre, shares, H, W, TH, across, down,
    in_stride: tl.constexpr, tap_stride: tl.constexpr,
    d: tl.constexpr, TW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """grad_pre = grad times the slope of SiLU at convolution(x) + bias, which is computed again.

    grad and grad_pre are contiguous. shares (programs, 10, d) are for the gradients of the nine taps and the bias.
    """
    image, tile_row, tile_column = place(across, down)
    top, column = tile_row * TH, tile_column * TW
    j = tl.arange(0, TW)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = nine(taps, tap_stride, channels, d, False)
    start = tl.load(bias + channels, mask=channels < d, other=0.0).to(tl.float32)[None, :]
    left, middle, right = borders(column, j, W, channels, d)
    zero = image * 0  # makes row numbers 64-bit
    corner = image * H * W + column
    x += corner * in_stride
    local = j[:, None] * in_stride + channels[None, :]
    dense = j[:, None] * d + channels[None, :]
    l0, m0, r0 = row_of(x, zero + top - 1, H, W, local, in_stride, left, middle, right)
    l1, m1, r1 = row_of(x, zero + top, H, W, local, in_stride, left, middle, right)
    l2, m2, r2 = row_of(x, zero + top + 1, H, W, local, in_stride, left, middle, right)
    g0 = tl.zeros((TW, BD), tl.float32)
    g1, g2, g3, g4, g5, g6, g7, g8, g9 = g0, g0, g0, g0, g0, g0, g0, g0, g0
    for row in range(top, tl.minimum(top + TH, H)):
        at = (corner + (zero + row) * W) * d + dense
        its_grad = tl.load(grad + at, mask=middle, other=0.0).to(tl.float32)
        l3, m3, r3 = row_of(x, zero + row + 2, H, W, local, in_stride, left, middle, right)
        acc = three_taps(start, l0, m0, r0, w0, w1, w2)
        acc = three_taps(acc, l1, m1, r1, w3, w4, w5)
        acc = three_taps(acc, l2, m2, r2, w6, w7, w8)
        s = sigmoid(acc)
        pre = its_grad * (s + acc * s * (1.0 - s))
        tl.store(grad_pre + at, pre.to(grad_pre.dtype.element_ty), mask=middle)
        g0 += pre * l0.to(tl.float32)
        g1 += pre * m0.to(tl.float32)
        g2 += pre * r0.to(tl.float32)
        g3 += pre * l1.to(tl.float32)
        g4 += pre * m1.to(tl.float32)
        g5 += pre * r1.to(tl.float32)
        g6 += pre * l2.to(tl.float32)
        g7 += pre * m2.to(tl.float32)
        g8 += pre * r2.to(tl.float32)
        g9 += pre
        l0, m0, r0, l1, m1, r1, l2, m2, r2 = l1, m1, r1, l2, m2, r2, l3, m3, r3
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
    """The weights (d, 1, 3, 3) of depthwise convolutions as taps (9, d), in two launches for all of them."""
    rows = [w.detach().reshape(-1, 9) for w in weights]
    together = (torch.cat(rows) if len(rows) > 1 else rows[0]).t().contiguous()
    return list(together.split([len(w) for w in weights], 1))


def conv_silu(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """SiLU(depthwise convolution) of x (B, H, W, d), which may be a slice of channels of a contiguous map."""
    out = x.new_empty(x.shape)
    _conv(x, taps, bias, out, CONV_TILE)
    return out


def conv_silu_product(x: Tensor, taps: Tensor, bias: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`conv_silu` and its product with a contiguous matrix (n, d): (B, H, W, n)."""
    out = x.new_empty(x.shape)
    product = x.new_empty(*x.shape[:-1], len(matrix))
    TW, options = pick(PRODUCT_TILES, x.shape[-1])
    tile = TW, max(16, triton.next_power_of_2(x.shape[-1])), options
    _conv(x, taps, bias, out, tile, product=(matrix, product))
    return out, product


def conv_transpose(grad: Tensor, taps: Tensor, grad_x: Tensor) -> None:
    """Write the gradient of the convolution's input into `grad_x`, which may be a slice of channels."""
    _conv(grad, taps, taps, grad_x, CONV_TILE, forward=False)


def _conv(
    x: Tensor, taps: Tensor, bias: Tensor, out: Tensor, tile: tuple[int, int, dict[str, int]],
    *, forward: bool = True, product: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    batch, H, W, d = x.shape
    TW, BD, options = tile
    matrix, result = product or (taps, out)
    on_one_device(x, taps, bias, out, matrix)
    x = even_rows(x)
    if forward:
        bias, matrix = dense(bias, matrix)
    if product is None:
        BD = min(BD, triton.next_power_of_2(d))
    TH, across, down = _walks(x, TW, BD)
    with torch.cuda.device_of(x):
        conv_kernel[(batch * across * down, triton.cdiv(d, BD))](
            x, taps, bias, out, matrix, result, H, W, TH, across, down,
            in_stride=x.stride(2), out_stride=out.stride(2), tap_stride=taps.stride(0),
            d=d, n=len(matrix), TW=TW, BD=BD, BN=max(16, triton.next_power_of_2(len(matrix))),
            FORWARD=forward, PRODUCT=product is not None, num_stages=1, **options,
        )  # fmt: skip


def _walks(x: Tensor, TW: int, BD: int) -> tuple[int, int, int]:
    """Rows per walk, and the number of walks across and down a map."""
    batch, H, W, d = x.shape
    across = triton.cdiv(W, TW)
    least, most = ROWS
    wanted = triton.cdiv(PROGRAMS * processors(x.device), batch * across * triton.cdiv(d, BD))
    TH = min(most, max(least, triton.cdiv(H, wanted)))
    return TH, across, triton.cdiv(H, TH)


def conv_silu_backward(grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the map before SiLU, of the weight (d, 1, 3, 3) and of the bias.

    `conv_transpose` of the first gives that of x.
    """
    on_one_device(grad, x, taps)
    (grad, bias), x = dense(grad, bias), even_rows(x)
    batch, H, W, d = x.shape
    TW, BD, options = BACKWARD_TILE
    BD = min(BD, triton.next_power_of_2(d))
    TH, across, down = _walks(x, TW, BD)
    grad_pre = grad.new_empty(grad.shape)
    shares = grad.new_empty(batch * across * down, 10, d, dtype=torch.float32)
    with torch.cuda.device_of(x):
        conv_backward_kernel[(len(shares), triton.cdiv(d, BD))](
            grad, x, taps, bias, grad_pre, shares, H, W, TH, across, down,
            in_stride=x.stride(2), tap_stride=taps.stride(0), d=d, TW=TW, BD=BD, **options,
        )  # fmt: skip
    total = sum_shares(shares)
    return grad_pre, total[:9].t().reshape(d, 1, 3, 3), total[9]
