"""Random holes in images: boxes and strokes, drawn from a generator. All in integers, so the same on any device."""

import functools

import torch
from torch import Tensor

from serpent_ir.degradations.randomness import Generator, ImageGenerators, rand

BOXES = 4
"""Most boxes per image, with sides from 1/16 to 1/3 of the image's."""
STROKES, CORNERS = 3, 5
"""Most strokes per image, and the most points of the straight lines that a stroke consists of."""


def draw_holes(batch: int, height: int, width: int, *, generator: Generator, device: torch.device) -> Tensor:
    """Masks (B, 1, H, W), float32 on `device`: 1 where a pixel is missing, 0 where it is known.

    An image gets boxes, strokes or both. Their number, places and sizes are drawn where the generator lives. With
    `ImageGenerators` the masks are windows of the masks of whole images.
    """
    home = generator.device

    def draw(*shape: int) -> Tensor:
        return rand(generator, batch, *shape)

    if isinstance(generator, ImageGenerators):
        size, (rows, columns) = generator.sizes[:, None], generator.coordinates(height, width)
    else:
        size = _size(height, width, home)  # coordinates are (row, column)
        rows = torch.arange(height, device=device)[None, :, None]
        columns = torch.arange(width, device=device)[None, None, :]
    kind = (draw(1) * 3).floor()  # boxes, strokes, both
    box_sides = (size * (1 / 16 + draw(BOXES, 2) * (1 / 3 - 1 / 16))).long().clamp(min=1)
    box_starts = (draw(BOXES, 2) * (size - box_sides + 1)).long()
    box_there = _up_to(draw(1), BOXES) & (kind != 1)
    # A stroke starts anywhere in the image and moves in steps of up to a quarter of the image.
    steps = (draw(STROKES, CORNERS, 2) - 0.5) * 0.5
    steps[:, :, 0] = draw(STROKES, 2)
    corners = (steps.cumsum(2) * size.unsqueeze(-2)).long()
    radii = ((1 + draw(STROKES) * 3) / 128 * size.amin(-1)).long().clamp(min=1)
    stroke_there = _up_to(draw(1), STROKES) & (kind != 0)
    moved = (x.to(device) for x in (box_starts, box_sides, box_there, corners, radii, stroke_there))
    box_starts, box_sides, box_there, corners, radii, stroke_there = moved

    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
    for start, side, there in zip(box_starts.unbind(1), box_sides.unbind(1), box_there.unbind(1), strict=True):
        (top, left), (tall, wide) = _columns(start), _columns(side)
        mask |= there[:, None, None] & (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    for points, radius, there in zip(corners.unbind(1), radii.unbind(1), stroke_there.unbind(1), strict=True):
        radius = torch.where(there, radius, -1)[:, None, None]
        for start, end in zip(points[:, :-1].unbind(1), points[:, 1:].unbind(1), strict=True):
            mask |= _near_line(rows, columns, start, end, radius)
    return mask[:, None].float()


@functools.lru_cache(maxsize=64)  # a copy to a GPU would wait for the work that it has queued
@torch.inference_mode(False)
def _size(height: int, width: int, device: torch.device) -> Tensor:
    return torch.tensor([height, width], device=device)


def _near_line(rows: Tensor, columns: Tensor, start: Tensor, end: Tensor, radius: Tensor) -> Tensor:
    """Pixels at most `radius` (B, 1, 1) from the line between two points (B, 2). None if the radius is negative."""
    (y, x), (dy, dx) = _columns(start), _columns(end - start)
    length2, reach2 = dy * dy + dx * dx, radius * radius
    down, across = rows - y, columns - x
    along = down * dy + across * dx
    aside = down * dx - across * dy
    # A line of one point has no sides: along and aside are 0 everywhere.
    beside = (length2 > 0) & (along >= 0) & (along <= length2) & (aside * aside <= reach2 * length2)
    at_ends = (down * down + across * across <= reach2) | ((down - dy) ** 2 + (across - dx) ** 2 <= reach2)
    return (radius >= 0) & (beside | at_ends)


def _up_to(chance: Tensor, most: int) -> Tensor:
    """(B, most) booleans: true for the first 1 to `most` entries, by a uniform number (B, 1)."""
    return torch.arange(most, device=chance.device) <= (chance * most).floor()


def _columns(points: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2) -> two tensors (B, 1, 1)."""
    return points[:, 0, None, None], points[:, 1, None, None]
