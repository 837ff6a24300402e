"""Patch embedding, merging, expanding and the head, in Triton.

These are matrix products that gather while they load and scatter while they store, so no map is copied into another
order. Products take 16-bit operands (the dtype of the weight) and accumulate in float32.
"""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from serpent_ir.ops.dense import dense
from serpent_ir.ops.triton.block import matrix_tile

# Positions per tile, columns computed at a time, warps.
TILE = (64, 128, 4)

INTS = ("H", "W", "height", "width", "rows", "in_channels")


@triton.jit(do_not_specialize=INTS)
def embed_kernel(
    image, matrix, bias, out, H, W, rows, in_channels,
    P: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (rows, D) from image (B, in_channels, H P, W P): matrix (D, K), K = in_channels P P, plus bias."""
    position = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = position < rows
    b = position // (H * W)
    inner = position - b * (H * W)
    i = inner // W
    corner = ((b.to(tl.int64) * in_channels * H + i) * W * P + (inner - i * W)) * P
    k = tl.arange(0, BK)
    channel, p, q = k // (P * P), k // P % P, k % P
    offset = channel.to(tl.int64) * H * W * (P * P) + p * (W * P) + q
    tile = tl.load(image + corner[:, None] + offset[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0)
    n = tl.arange(0, BN)
    total = tl.dot(tile.to(matrix.dtype.element_ty), matrix_tile(matrix, 0, 0, K, D, K, BK, BN))
    total += tl.load(bias + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
    at = out + position.to(tl.int64)[:, None] * D + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=ok[:, None] & (n < D)[None, :])


@triton.jit(do_not_specialize=INTS)
def merge_kernel(
    x, matrix, out, H, W, rows,
    c: tl.constexpr, n: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (rows, n) = the 2x2 patches of x (B, 2H, 2W, c), rows = B H W, times matrix (n, 4c)^T.

    A patch is two runs of 2c numbers, one in each of two rows of the map.
    """
    position = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = position < rows
    line = position // W  # b H + i, so that 2 * line is the patch's row when all maps are stacked
    corner = (line.to(tl.int64) * 4 * W + (position - line * W) * 2) * c
    first = tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for p in tl.static_range(2):
        for start in range(0, 2 * c, BK):
            k = start + tl.arange(0, BK)
            at = x + corner[:, None] + (p * 2 * W * c + k)[None, :]
            tile = tl.load(at, mask=ok[:, None] & (k < 2 * c)[None, :], other=0.0).to(matrix.dtype.element_ty)
            part = matrix_tile(matrix + p * 2 * c, first, start, 4 * c, n, 2 * c, BK, BN)
            total = tl.dot(tile, part, acc=total)
    columns = first + tl.arange(0, BN)
    at = out + position.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=ok[:, None] & (columns < n)[None, :])


@triton.jit(do_not_specialize=INTS)
def expand_kernel(
    x, matrix, skip, out, H, W, rows,
    c: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (B, 2H, 2W, c) = skip + x (rows, 2c) times matrix (4c, 2c)^T, 2x2 patches put in place; rows = B H W.

    Program axis 2 is the row within the patch, which is a run of 2c numbers. `out` may be `skip`.
    """
    position = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = position < rows
    line = position // W
    p = tl.program_id(2)
    corner = (line.to(tl.int64) * 4 * W + (position - line * W) * 2 + p * 2 * W) * c
    first = tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, 2 * c, BK):
        k = start + tl.arange(0, BK)
        at = x + position.to(tl.int64)[:, None] * (2 * c) + k[None, :]
        tile = tl.load(at, mask=ok[:, None] & (k < 2 * c)[None, :], other=0.0).to(matrix.dtype.element_ty)
        part = matrix_tile(matrix + p * 4 * c * c, first, start, 2 * c, 2 * c, 2 * c, BK, BN)
        total = tl.dot(tile, part, acc=total)
    columns = first + tl.arange(0, BN)
    mask = ok[:, None] & (columns < 2 * c)[None, :]
    at = corner[:, None] + columns[None, :]
    total += tl.load(skip + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTS)
def head_kernel(
    x, matrix, bias, image, out, H, W, height, width, rows, in_channels,
    RESIDUAL: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out (B, 3, height, width) = the P x P patches x . matrix^T + bias, with RESIDUAL added to image[:, :3].

    x (rows, D), rows = B H W; matrix (3 P P, D); image (B, in_channels, height, width). Patches may reach past it.
    """
    position = tl.program_id(0) * BM + tl.arange(0, BM)
    k, n = tl.arange(0, BK), tl.arange(0, BN)
    ok = position < rows
    mask = ok[:, None] & (k < D)[None, :]
    tile = tl.load(x + position.to(tl.int64)[:, None] * D + k[None, :], mask=mask, other=0.0).to(
        matrix.dtype.element_ty
    )
    total = tl.dot(tile, matrix_tile(matrix, 0, 0, D, 3 * P * P, D, BK, BN))
    total += tl.load(bias + n, mask=n < 3 * P * P, other=0.0).to(tl.float32)[None, :]
    b = position // (H * W)
    inner = position - b * (H * W)
    i = inner // W
    row = (i * P)[:, None] + (n // P % P)[None, :]
    column = ((inner - i * W) * P)[:, None] + (n % P)[None, :]
    plane = (n // (P * P))[None, :]
    mask = ok[:, None] & (n < 3 * P * P)[None, :] & (row < height) & (column < width)
    b = b.to(tl.int64)
    inside = row.to(tl.int64) * width + column
    if RESIDUAL:
        seen = image + ((b * in_channels)[:, None] + plane) * height * width + inside
        total += tl.load(seen, mask=mask, other=0.0).to(tl.float32)
    at = out + ((b * 3)[:, None] + plane) * height * width + inside
    tl.store(at, total.to(out.dtype.element_ty), mask=mask)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def embed(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of stride P of image (B, channels, H P, W P) by weight (D, channels, P, P).

    Returns (B, H, W, D) in the dtype of the weight.
    """
    image, weight, bias = dense(image, weight, bias)
    batch, channels, height, width = image.shape
    D, K, P = len(weight), weight[0].numel(), weight.shape[-1]
    H, W = height // P, width // P
    rows, (BM, _, warps) = batch * H * W, TILE
    out = weight.new_empty(batch, H, W, D)
    with torch.cuda.device_of(image):
        embed_kernel[(triton.cdiv(rows, BM),)](
            image, weight, bias, out, H, W, rows, channels, P=P, D=D, K=K, BM=BM, BK=_padded(K), BN=_padded(D),
            num_stages=2, num_warps=warps,
        )  # fmt: skip
    return out


def merge(x: Tensor, weight: Tensor) -> Tensor:
    """Patch merging of x (B, 2H, 2W, c) by weight (n, 4c): (B, H, W, n)."""
    x, weight = dense(x, weight)
    batch, height, width, c = x.shape
    H, W, n = height // 2, width // 2, len(weight)
    rows, (BM, BN, warps) = batch * H * W, TILE
    out = x.new_empty(batch, H, W, n)
    BN = min(BN, _padded(n))
    with torch.cuda.device_of(x):
        merge_kernel[(triton.cdiv(rows, BM), triton.cdiv(n, BN))](
            x,
            weight,
            out,
            H,
            W,
            rows,
            c=c,
            n=n,
            BM=BM,
            BK=min(64, _padded(2 * c)),
            BN=BN,
            num_stages=2,
            num_warps=warps,
        )
    return out


def expand(x: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
    """Patch expanding of x (B, H, W, 2c) by weight (4c, 2c), added into skip (B, 2H, 2W, c).

    Returns skip, or a copy if it is not contiguous.
    """
    x, weight, skip = dense(x, weight, skip)
    batch, H, W, _ = x.shape
    c = skip.shape[-1]
    rows, (BM, BN, warps) = batch * H * W, TILE
    BN = min(BN, _padded(2 * c))
    with torch.cuda.device_of(x):
        expand_kernel[(triton.cdiv(rows, BM), triton.cdiv(2 * c, BN), 2)](
            x,
            weight,
            skip,
            skip,
            H,
            W,
            rows,
            c=c,
            BM=BM,
            BK=min(64, _padded(2 * c)),
            BN=BN,
            num_stages=2,
            num_warps=warps,
        )
    return skip


def head(x: Tensor, weight: Tensor, bias: Tensor, image: Tensor, residual: bool) -> Tensor:
    """The patches that the linear layer makes of x (B, H, W, D), cropped to the size of image (B, .., h, w).

    With `residual` they are added to image[:, :3].
    """
    x, weight, bias, image = dense(x, weight, bias, image)
    batch, H, W, D = x.shape
    channels, height, width = image.shape[1:]
    P = round((len(weight) // 3) ** 0.5)
    rows, (BM, _, warps) = batch * H * W, TILE
    out = image.new_empty(batch, 3, height, width, dtype=torch.promote_types(image.dtype, x.dtype))
    with torch.cuda.device_of(x):
        head_kernel[(triton.cdiv(rows, BM),)](
            x, weight, bias, image, out, H, W, height, width, rows, channels,
            RESIDUAL=residual, P=P, D=D, BM=BM, BK=_padded(D), BN=_padded(3 * P * P), num_stages=2, num_warps=warps,
        )  # fmt: skip
    return out
