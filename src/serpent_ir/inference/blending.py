"""Blends a network's result with its input: by strength, by what is protected, and by what `auto` believes.

out = input + share * strength * (1 - protection) * (restored - input). A network that makes images larger has the
bicubic enlargement in the place of the input.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.errors import UsageError
from serpent_ir.image.picture import Span
from serpent_ir.inference import auto

STRENGTHS = (0.0, 1.5)
"""Least and greatest strength."""
FEATHER = 4
"""Half the width, in pixels of the output, of the rim on which protection falls to nothing."""
BAND = 512
"""Rows that are blended at once, which bounds the memory that it takes. A multiple of a cell's side."""


@dataclass(frozen=True)
class Blend:
    """How a network's result is blended with what it was given.

    Attributes:
        strength: 0 gives the input, 1 the result, and more goes beyond it.
        judged: whether `auto` decides what of the change is believed. For networks that keep the size alone.
        protection: (1, 1, H, W) of the output's size, 1 where the input stays as it was; None: nothing is protected.
        report: called with the share of each image's cells, (B,), in which `auto` left everything as it was.
    """

    strength: float = 1.0
    judged: bool = False
    protection: Tensor | None = None
    report: Callable[[Tensor], None] | None = None

    @property
    def does_nothing(self) -> bool:
        return self.strength == 1 and not self.judged and self.protection is None


def check_strength(strength: float) -> None:
    """Raise UsageError for a strength that is not in `STRENGTHS`."""
    if not STRENGTHS[0] <= strength <= STRENGTHS[1]:
        raise UsageError(f"a strength of {strength:g}; it must be from {STRENGTHS[0]:g} to {STRENGTHS[1]:g}")


def feathered(mask: Tensor, scale: int) -> Tensor:
    """A mask (1, 1, H, W) in [0, 1] -> protection (1, 1, scale H, scale W): 1 where it is white, and a soft rim."""
    mask = F.interpolate(mask, scale_factor=scale, mode="nearest") if scale > 1 else mask
    side = 2 * FEATHER + 1
    # Where the mask is white the widest square is white, and so is every mean of it.
    wider = F.max_pool2d(mask, side, 1, FEATHER)
    return F.avg_pool2d(wider, side, 1, FEATHER, count_include_pad=False)


def blended(strips: Iterable[Tensor], before: Callable[[Span], Tensor], height: int, blend: Blend) -> Iterator[Tensor]:
    """Blend a restored image that comes in strips (B, 3, rows, W), from top to bottom, of `height` rows in all.

    `before(rows)` gives rows of what the network was given, (B, 3, rows, W), in the size of the output. What is handed
    on are strips too, changed in place and cut otherwise. Their values do not depend on how they are cut.
    """
    held: Tensor | None = None  # rows from `top` on that wait for what lies below them
    top = known = 0  # the first row that is held, and the first row of cells that is not known yet
    cells: Tensor | None = None
    left: list[Tensor] = []  # of each band, how many cells stay as they were
    for strip in strips:
        held = strip if held is None else torch.cat([held, strip], 2)
        bottom = top + held.shape[2]
        last = bottom == height
        if blend.judged:
            ready = -(-height // auto.CELL) if last else max(known, (bottom - 1) // auto.CELL)
            cells = _with_more_cells(cells, held, top, (known, ready), before, height)
            known = ready
        done = bottom if last or not blend.judged else max(top, (known - auto.REACH) * auto.CELL)
        for start in range(top, done, BAND):
            end = min(done, start + BAND)
            given = before((start, end)).to(held.device)
            amount = torch.full((), blend.strength, dtype=held.dtype, device=held.device)
            if cells is not None:
                share, of_pixels = _shares_of(cells, (start, end), held.shape[-1])
                amount = amount * of_pixels
                left.append((share == 0).sum((1, 2, 3)))
            if blend.protection is not None:
                amount = amount * (1 - blend.protection[..., start:end, :].to(held.device))
            part = held[:, :, start - top : end - top]
            part.copy_(torch.lerp(given, part, amount.expand_as(part)).clamp_(0, 1))
        if last and cells is not None and blend.report:
            blend.report(torch.stack(left).sum(0) / cells[0, 0].numel())
        if done > top:
            yield held[:, :, : done - top]
            held = held[:, :, done - top :].clone()
            top = done


def _with_more_cells(
    cells: Tensor | None, held: Tensor, top: int, more: Span, before: Callable[[Span], Tensor], height: int
) -> Tensor | None:
    """The moments of further rows of cells, appended. A cell's lines need a pixel more on each side."""
    parts = [] if cells is None else [cells]
    for first in range(more[0], more[1], BAND // auto.CELL):
        after = min(more[1], first + BAND // auto.CELL)
        rows = first * auto.CELL, min(height, after * auto.CELL)
        above = auto.CELL if rows[0] else 0  # a whole cell, so that cells stay where they are
        span = rows[0] - above, min(height, rows[1] + 1)
        given = before(span).to(held.device)
        found = auto.moments(given, held[:, :, span[0] - top : span[1] - top])
        parts.append(found[:, :, bool(above) :][:, :, : after - first])
    return torch.cat(parts, 2) if parts else None


def _shares_of(cells: Tensor, rows: Span, width: int) -> tuple[Tensor, Tensor]:
    """The shares of some rows of pixels, which begin with a row of cells: of the cells, and of the pixels."""
    first, last = rows[0] // auto.CELL, -(-rows[1] // auto.CELL)
    begin, end = max(0, first - auto.REACH), min(cells.shape[2], last + auto.REACH)
    share = auto.shares(cells[:, :, begin:end])
    of_pixels = auto.to_pixels(share, (end - begin) * auto.CELL, width)
    top = rows[0] - begin * auto.CELL
    return share[:, :, first - begin : last - begin], of_pixels[:, :, top : top + rows[1] - rows[0]]
