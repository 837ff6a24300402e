"""The parts of a VSS block around the scan, fused for inference, in Triton.

One kernel runs before the convolution and one after the scan. The normed input and the gate's half of `in_proj` are
never written. The second kernel reads the input anyway for the residual, and computes them again from it. Products take
16-bit operands and accumulate in float32.
"""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from serpent_ir.ops.dense import dense, even_rows, on_one_device
from serpent_ir.ops.triton.norm import channel_row, pick, put_rows, row_tile, sigmoid, standardise

# By channels c: rows per tile, columns of the inner map computed at a time, launch options. One table for the kernel
# before the convolution, one for the kernel after the scan.
IN_TILES = {
    32: (128, 64, {"num_warps": 4}),
    64: (64, 128, {"num_warps": 4}),
    128: (64, 64, {"num_warps": 4}),
    256: (64, 64, {"num_warps": 8}),
}
OUT_TILES = {
    32: (64, 64, {"num_warps": 4}),
    64: (64, 32, {"num_warps": 4}),
    128: (64, 64, {"num_warps": 8}),
    256: (64, 64, {"num_warps": 8}),
}
# Up to this many rows, products of any width are fused, with tiles small enough to give every multiprocessor work.
SMALL_ROWS = 4096
SMALL_TILE = (16, 64, {"num_warps": 4})
# In the same case after the scan: all of this many inner channels at once, so that no load waits for another one.
SMALL_INNER = {128: (128, {"num_warps": 4}), 512: (512, {"num_warps": 8})}
# Columns that a program of `gated_product` computes on small maps, by the largest number of rows that each serves.
SMALL_COLUMNS = {1024: 32, SMALL_ROWS: 64}


@triton.jit
def matrix_tile(matrix, first_row, first_column, stride, rows, columns, BK: tl.constexpr, BN: tl.constexpr):
    """(BK, BN): the transpose of matrix[first_row:, first_column:], 0 from `rows` and from `columns` on."""
    n, k = first_row + tl.arange(0, BN)[None, :], first_column + tl.arange(0, BK)[:, None]
    return tl.load(matrix + n * stride + k, mask=(n < rows) & (k < columns), other=0.0)


@triton.jit
def statistics(y, left, eps, d, BM: tl.constexpr, BD: tl.constexpr):
    """Mean and inverse standard deviation of rows of d channels, BD channels at a time (Chan's update)."""
    mean = tl.zeros((BM,), tl.float32)
    square = tl.zeros((BM,), tl.float32)
    for at in range(0, d, BD):
        count = tl.minimum(d - at, BD).to(tl.float32)
        tile = row_tile(y + at, left, d, d - at, BM, BD)
        its_mean = tl.sum(tile, axis=1) / count
        centred = tl.where((at + tl.arange(0, BD) < d)[None, :], tile - its_mean[:, None], 0.0)
        apart = its_mean - mean
        share = count / (at + count)
        mean += apart * share
        square += tl.sum(centred * centred, axis=1) + apart * apart * (at * share)
    return mean, tl.rsqrt(square / d + eps)


@triton.jit(do_not_specialize=("rows", "span"))
def norm_product_kernel(
    x, weight, bias, matrix, out, rows, span, eps,
    c: tl.constexpr, n: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (rows, n) = LayerNorm(x) . matrix^T for x (rows, c), matrix (n, c), `span` * BN columns per program."""
    first = tl.program_id(0).to(tl.int64) * BM
    left = tl.minimum(rows - first, BM).to(tl.int32)
    hat, _ = standardise(row_tile(x + first * c, left, c, c, BM, BC), eps, c, BC)
    normed = (hat * channel_row(weight, c, BC) + channel_row(bias, c, BC)).to(matrix.dtype.element_ty)
    begin = tl.program_id(1) * span * BN  # the compiler sees a multiple of BN, so it can store in wide pieces
    for column in range(begin, tl.minimum(begin + span * BN, n), BN):
        part = tl.dot(normed, matrix_tile(matrix, column, 0, c, n, c, BC, BN))
        put_rows(out + first * n + column, part, left, n, n - column, BM, BN)


@triton.jit(do_not_specialize=("rows",))
def gate_product_kernel(
    x, y, weight, bias, z_matrix, y_weight, y_bias, out_matrix, out, rows, eps, y_eps,
    c: tl.constexpr, d: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = x + (LayerNorm(y) * SiLU(LayerNorm(x) . z_matrix^T)) . out_matrix^T, BD channels of y at a time.

    x, out (rows, c), y (rows, d), z_matrix (d, c), out_matrix (c, d); `out` may be `x`.
    """
    first = tl.program_id(0).to(tl.int64) * BM
    left = tl.minimum(rows - first, BM).to(tl.int32)
    x_tile = row_tile(x + first * c, left, c, c, BM, BC)
    hat, _ = standardise(x_tile, eps, c, BC)
    normed = (hat * channel_row(weight, c, BC) + channel_row(bias, c, BC)).to(z_matrix.dtype.element_ty)
    y += first * d
    if d <= BD:
        y_hat, _ = standardise(row_tile(y, left, d, d, BM, BD), y_eps, d, BD)
        z = tl.dot(normed, matrix_tile(z_matrix, 0, 0, c, d, c, BC, BD))
        gated = (y_hat * channel_row(y_weight, d, BD) + channel_row(y_bias, d, BD)) * (z * sigmoid(z))
        total = tl.dot(gated.to(normed.dtype), matrix_tile(out_matrix, 0, 0, d, c, d, BD, BC))
    else:
        mean, scale = statistics(y, left, y_eps, d, BM, BD)  # y is then read once more, from the cache
        total = tl.zeros((BM, BC), tl.float32)
        for at in range(0, d, BD):
            y_hat = (row_tile(y + at, left, d, d - at, BM, BD) - mean[:, None]) * scale[:, None]
            z = tl.dot(normed, matrix_tile(z_matrix, at, 0, c, d, c, BC, BD))
            y_normed = y_hat * channel_row(y_weight + at, d - at, BD) + channel_row(y_bias + at, d - at, BD)
            gated = (y_normed * (z * sigmoid(z))).to(normed.dtype)
            total = tl.dot(gated, matrix_tile(out_matrix, 0, at, d, c, d, BD, BC), acc=total)
    put_rows(out + first * c, x_tile + total, left, c, c, BM, BC)


@triton.jit(do_not_specialize=("rows",))
def gated_product_kernel(
    x, y, z, weight, bias, matrix, out, rows, eps,
    z_stride: tl.constexpr, c: tl.constexpr, d: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = x + (LayerNorm(y) * SiLU(z)) . matrix^T, with BN channels of x per program.

    x, out (rows, c), y (rows, d), rows of z `z_stride` apart, matrix (c, d).
    """
    first = tl.program_id(0).to(tl.int64) * BM
    left = tl.minimum(rows - first, BM).to(tl.int32)
    column = tl.program_id(1) * BN
    y += first * d
    z += first * z_stride
    total = row_tile(x + first * c + column, left, c, c - column, BM, BN)
    if d <= BD:
        part = matrix_tile(matrix, column, 0, d, c, d, BD, BN)
        gate = row_tile(z, left, z_stride, d, BM, BD)
        y_hat, _ = standardise(row_tile(y, left, d, d, BM, BD), eps, d, BD)
        gated = (y_hat * channel_row(weight, d, BD) + channel_row(bias, d, BD)) * (gate * sigmoid(gate))
        total = tl.dot(gated.to(matrix.dtype.element_ty), part, acc=total)
    else:
        mean, scale = statistics(y, left, eps, d, BM, BD)
        for at in range(0, d, BD):
            y_hat = (row_tile(y + at, left, d, d - at, BM, BD) - mean[:, None]) * scale[:, None]
            normed = y_hat * channel_row(weight + at, d - at, BD) + channel_row(bias + at, d - at, BD)
            gate = row_tile(z + at, left, z_stride, d - at, BM, BD)
            gated = (normed * (gate * sigmoid(gate))).to(matrix.dtype.element_ty)
            total = tl.dot(gated, matrix_tile(matrix, column, at, d, c, d, BD, BN), acc=total)
    put_rows(out + first * c + column, total, left, c, c - column, BM, BN)


def _padded(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))  # tl.dot takes no less than 16


def norm_product(x: Tensor, weight: Tensor, bias: Tensor, eps: float, matrix: Tensor) -> Tensor:
    """LayerNorm(x) . matrix^T for x (..., c) and matrix (n, c). The product is taken in the dtype of the matrix."""
    x, weight, bias, matrix = dense(x, weight, bias, matrix)
    n, c = matrix.shape
    rows = x.numel() // c
    BM, BN, options = SMALL_TILE if rows <= SMALL_ROWS else pick(IN_TILES, c)
    BN = min(BN, _padded(n))
    blocks = triton.cdiv(n, BN)
    span = 1 if rows <= SMALL_ROWS else blocks
    out = matrix.new_empty(*x.shape[:-1], n)
    with torch.cuda.device_of(x):
        norm_product_kernel[(triton.cdiv(rows, BM), triton.cdiv(blocks, span))](
            x, weight, bias, matrix, out, rows, span, eps, c=c, n=n, BM=BM, BC=_padded(c), BN=BN,
            num_stages=1, **options,
        )  # fmt: skip
    return out


def _out_tile(rows: int, c: int) -> tuple[int, int, dict[str, int]]:
    return (SMALL_TILE[0], *pick(SMALL_INNER, 2 * c)) if rows <= SMALL_ROWS else pick(OUT_TILES, c)


def gated_product(x: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float, matrix: Tensor) -> Tensor:
    """x + (LayerNorm(y) * SiLU(z)) . matrix^T. A z that is a slice of channels of a contiguous map is not copied."""
    x, y, weight, bias, matrix = dense(x, y, weight, bias, matrix)
    on_one_device(x, z)
    z = even_rows(z)
    c, d = matrix.shape
    rows = x.numel() // c
    BM, BD, options = _out_tile(rows, c)
    BN = min(pick(SMALL_COLUMNS, rows) if rows <= SMALL_ROWS else 128, _padded(c))
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        gated_product_kernel[(triton.cdiv(rows, BM), triton.cdiv(c, BN))](
            x, y, z, weight, bias, matrix, out, rows, eps, z_stride=z.stride(-2), c=c, d=d, BM=BM, BN=BN,
            BD=min(BD, _padded(d)), num_stages=1, **options,
        )  # fmt: skip
    return out


def gate_product(
    x: Tensor, y: Tensor, norm: tuple[Tensor, Tensor, float], z_matrix: Tensor,
    y_norm: tuple[Tensor, Tensor, float], out_matrix: Tensor,
) -> Tensor:  # fmt: skip
    """x + (LayerNorm(y) * SiLU(LayerNorm(x) . z_matrix^T)) . out_matrix^T. Norms are (weight, bias, eps)."""
    x, y, z_matrix, out_matrix, weight, bias, y_weight, y_bias = dense(
        x, y, z_matrix, out_matrix, *norm[:2], *y_norm[:2]
    )
    c, d = out_matrix.shape
    rows = x.numel() // c
    BM, BD, options = _out_tile(rows, c)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        gate_product_kernel[(triton.cdiv(rows, BM),)](
            x, y, weight, bias, z_matrix, y_weight, y_bias, out_matrix, out, rows, norm[2], y_norm[2],
            c=c, d=d, BM=BM, BC=_padded(c), BD=min(BD, _padded(d)), num_stages=1, **options,
        )  # fmt: skip
    return out
