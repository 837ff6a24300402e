"""A VSS block on the CPU without a tape: the map goes through in bands of rows that stay in the cache.

Otherwise whole maps would be written to memory and read again between any two operations, into pages that the system
clears first. At 2048x2048 that takes as long as the arithmetic. Only the normed input and the scan's input and output
are kept whole, which also bounds memory. The numbers are those of `VSSBlock.forward`, up to rounding.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serpent_ir.models.acceleration import as_built
from serpent_ir.models.acceleration.products import product, product_onto
from serpent_ir.models.acceleration.way import Way
from serpent_ir.ops import ss2d
from serpent_ir.ops.cpu import conv_silu, large_pages, norm_gate
from serpent_ir.ops.dense import on_one_device

if TYPE_CHECKING:
    from serpent_ir.models.serpent import VSSBlock

BAND = 1 << 18  # numbers of the inner map per band, about: 1 MB, a second-level cache


def _refuses(block: "VSSBlock", x: Tensor) -> str:
    if reason := as_built.looked_on(x) or as_built.difference(block, x):
        return reason
    dtypes = as_built.dtypes(block)
    fits = len(dtypes) == 1 and (x.dtype in dtypes or torch.is_autocast_enabled("cpu"))
    return "" if fits else as_built.products_of(block, x)


def _run(block: "VSSBlock", x: Tensor) -> Tensor:
    """block(x) for x (B, H, W, c)."""
    inner = block.ss2d
    on_one_device(x, *block.parameters())  # PyTorch's products do not check this
    x = x.contiguous()
    normed = block.norm(x)
    weight_u, weight_z = inner.in_proj.weight.chunk(2)
    images, rows = _band_size(x.shape, len(weight_u))
    u, proj = _Whole(x.shape), _Whole(x.shape)
    for first in range(0, len(x), images):
        for row, padding, piece in _with_neighbours(normed[first : first + images], rows, weight_u):
            piece = conv_silu(piece, inner.conv.weight, inner.conv.bias, padding)
            u.put(first, row, piece)
            proj.put(first, row, product(piece, inner.x_proj.weight).unflatten(-1, (4, -1)))
    y = ss2d(u.map, proj.map, inner.dt_weight, inner.dt_bias, inner.A_log, inner.D)
    del u, proj
    out = large_pages(torch.empty_like(x))
    for first in range(0, len(x), images):
        for row in range(0, x.shape[1], rows):
            here = slice(first, first + images), slice(row, row + rows)
            gated = norm_gate(
                y[here], inner.norm.weight, inner.norm.bias, inner.norm.eps, product(normed[here], weight_z)
            )
            product_onto(x[here], gated, inner.out_proj.weight, out[here])
    return out


block = Way("cpu_inference.block", "cpu", False, _refuses, _run)


def _band_size(shape: torch.Size, d_inner: int) -> tuple[int, int]:
    """Images and rows of a band: whole images if one fits, otherwise rows of one image."""
    _, height, width, _ = shape
    rows = max(1, BAND // max(1, width * d_inner))
    return (max(1, rows // max(1, height)), height) if rows >= height else (1, rows)


def _with_neighbours(x: Tensor, rows: int, weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The inner map before the convolution, in bands.

    Yields the first row, how many rows of zeros each end still needs, and the band with the rows above and below it.
    """
    height = x.shape[1]
    if rows >= height:
        yield 0, 1, product(x, weight)
        return
    edge = above = None
    for row in range(0, height, rows):
        ready = row + 1 if row else 0  # the previous band went one row further
        new = product(x[:, ready : row + rows + 1], weight)
        if edge is None or above is None:
            edge = above = torch.zeros_like(new[:, :1])
        piece = torch.cat([above, new, edge] if row + rows >= height else [above, new], 1)
        above = piece[:, -2:].clone()
        yield row, 0, piece


class _Whole:
    """A map that is put together from bands. A band that is the whole map is not copied."""

    def __init__(self, shape: torch.Size):
        self.shape = shape[:3]

    def put(self, image: int, row: int, piece: Tensor) -> None:
        if piece.shape[:3] == self.shape:
            self.map = piece
            return
        if image == row == 0:
            self.map = large_pages(piece.new_empty(*self.shape, *piece.shape[3:]))
        self.map[image : image + len(piece), row : row + piece.shape[1]] = piece
