"""Cuts a large image into overlapping tiles, and puts the restored tiles together without seams.

Where tiles overlap, each pixel is a weighted mean of them. A weight falls towards the edge of its tile as a raised
cosine, and the weights of a pixel sum to one. Tiles are made in a fixed order, row by row. Rows of the image are handed
on as soon as no other tile touches them. So the result neither depends on the caller nor has to fit in memory.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from serpent_ir.errors import UsageError
from serpent_ir.image.picture import Span


@dataclass(frozen=True)
class Axis:
    """One direction of a grid of tiles: `spans` are (start, end) in pixels, in order, covering 0 to `size`."""

    size: int
    spans: tuple[Span, ...]

    def weights(self) -> list[Tensor]:
        """For each span the weights of its pixels, (end - start,) float32.

        Over all spans they sum to one everywhere.
        """
        raw = []
        for index, (start, end) in enumerate(self.spans):
            weight = torch.ones(end - start, dtype=torch.float64)
            if index:
                shared = self.spans[index - 1][1] - start
                weight[:shared] *= _rise(shared)
            if index + 1 < len(self.spans):
                shared = end - self.spans[index + 1][0]
                weight[end - start - shared :] *= _rise(shared).flip(0)
            raw.append(weight)
        total = torch.zeros(self.size, dtype=torch.float64)
        for (start, end), weight in zip(self.spans, raw, strict=True):
            total[start:end] += weight
        return [(w / total[start:end]).float() for (start, end), w in zip(self.spans, raw, strict=True)]


def _rise(count: int) -> Tensor:
    """From near 0 to near 1 in `count` steps, so that it and its mirror image sum to one."""
    return 0.5 - 0.5 * torch.cos((torch.arange(count, dtype=torch.float64) + 0.5) * (math.pi / max(1, count)))


def cut(size: int, tile: int, overlap: int, multiple: int) -> Axis:
    """Spans of at most `tile` pixels that cover `size`. Neighbours share at least `overlap` pixels.

    They start at multiples of `multiple` and are about equally long, so that no sliver is left at the end.

    Raises UsageError: `tile` is not a positive multiple of `multiple`, or `overlap` leaves too little of it.
    """
    if tile < multiple or tile % multiple:
        raise UsageError(f"a tile of {tile} px; this network needs a multiple of {multiple}")
    if overlap < 0 or 2 * overlap > tile or tile - overlap < multiple:
        most = max(0, min(tile // 2, tile - multiple))
        raise UsageError(f"an overlap of {overlap} px; with tiles of {tile} px it must be from 0 to {most}")
    if size <= tile:
        return Axis(size, ((0, size),))
    longest = (tile - overlap) // multiple * multiple
    count = -(-(size - tile) // longest) + 1
    step = _up(-(-(size - overlap) // count), multiple)
    step, length = (step, _up(step + overlap, multiple)) if step <= longest else (longest, tile)
    starts = range(0, size - overlap, step)
    spans = [(start, min(start + length, size)) for start in starts[: -(-(size - length) // step) + 1]]
    spans[-1] = (min(spans[-1][0], _up(size - length, multiple)), size)  # with as much context as the others
    return Axis(size, tuple(spans))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def blend(rows: Axis, columns: Axis, tile: Callable[[Span, Span], Tensor]) -> Iterator[Tensor]:
    """Make every tile and yield the image from top to bottom, in strips (B, C, strip's rows, W) float32 on the CPU.

    `tile(rows, columns)` returns (B, C, rows, columns) on any device. One row of tiles is in memory at a time.
    """
    row_weights, column_weights = rows.weights(), columns.weights()
    carried: Tensor | None = None  # rows begun by earlier tiles; the first one is where this row of tiles starts
    for index, (top, bottom) in enumerate(rows.spans):
        strip: Tensor | None = None
        for span, across in zip(columns.spans, column_weights, strict=True):
            piece = tile((top, bottom), span).float().cpu()
            if strip is None:
                strip = piece.new_zeros((*piece.shape[:2], bottom - top, columns.size))
            strip[..., span[0] : span[1]] += piece * across
        assert strip is not None
        strip *= row_weights[index][:, None]
        if carried is not None:
            strip[..., : carried.shape[-2], :] += carried
        done = (rows.spans[index + 1][0] if index + 1 < len(rows.spans) else bottom) - top
        carried = strip[..., done:, :].clone()
        yield strip[..., :done, :]
