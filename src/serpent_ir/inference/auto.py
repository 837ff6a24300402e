"""How much of a network's change to believe, place by place: what `auto` does for weights of `photo`.

Damage that a camera did is everywhere: noise is in the flat parts too, and what removes it looks like noise. A change
that a network makes to a picture without damage has another shape. It is small; or it follows fine detail; or it stands
in one place, and the flat parts around it stay as they were. The rule looks at cells of 16x16 pixels. A logistic
function of six figures (`WEIGHTS`) says what share of the change to keep, and where next to nothing would remain
(`QUIET`), nothing is changed. It sees the picture and the network's change to it, and nothing else: no file, no name,
and of the picture no more than 80 pixels around. So whole images, tiles, bands, batches and frames are judged alike.

Where the numbers come from: they were fitted to crops of 308 training images (natural/train and free/train), each
undegraded and with noise, JPEG, blur, `real` and `photo`, 3358 pairs in all, so that the mean logarithm of the squared
error (plus 2e-5) is least. Undegraded images and those of `real` weighed three times as much. Which figures to look at
was chosen with validation images in sight. `tools/fit_auto.py` fits the numbers anew on training images alone; it has
not been run in full. `tools/photo_bars.py` reports what the rule does to images that had no part in the fit. What it
cannot tell from noise is texture that is as fine and as even: sand, gravel, the grain of a scanned photograph.
"""

from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.degradations.sensor import luma_of

CELL = 16
"""Side of a cell in pixels."""
NEAR, WIDE = 3, 9
"""Sides, in cells, of the squares around a cell whose means, and whose flattest cells, are looked at."""
REACH = WIDE // 2 + 1
"""Cells around a row of cells that decide the shares of its pixels, which are interpolated between cells."""
QUIET = 0.2 / 255
"""Root mean square of a change that counts as none: the noise of rounding to 8 bits is 0.29 / 255."""
RANK = 17
"""Of the 81 cells around one, the rank of the one that stands for the flat parts: a fifth of them are flatter."""
SPREAD = 0.6
"""How far, as a logarithm of energies, a change of colour may stand above that of the flat parts at no cost."""


@dataclass(frozen=True)
class Weights:
    """The logistic function: of logarithms (base 10) of mean squares on the [0, 1] scale, and of a correlation.

    Attributes:
        bias: its constant.
        change: of the change of luma, over `WIDE` cells.
        floor: of the change of luma in the flat cells among these. It is large where the change is everywhere.
        grain: of the fine detail of the colours in the input's flat cells. In saturated and grainy scans it is large.
        detail: of the fine detail of luma in the result. A change where much detail stays is less to be believed.
        smooth: of the correlation of the change with that of the next pixels. White noise has none, texture has.
        spread: of what the change of colour exceeds that of the flat cells by, beyond `SPREAD`. Patterns on petals do.
    """

    bias: float = 1.65
    change: float = 1.01
    floor: float = 0.68
    grain: float = -1.06
    detail: float = -0.87
    smooth: float = -4.45
    spread: float = -1.07


WEIGHTS = Weights()
_TINY = 1e-7  # mean squares below this are as good as none: 0.08 of a level of 8 bits


def moments(before: Tensor, after: Tensor) -> Tensor:
    """What the rule has to know of an image: means over its cells, (B, 5, rows of cells, columns of cells).

    `before` and `after` are (B, 3, H, W) in [0, 1], the input and the result. The last cells of rows and columns may be
    smaller. Borders are repeated.
    """
    change = after - before
    luma, luma_after = luma_of(change), luma_of(after)
    colour = before - luma_of(before)
    beside, below = _next(luma)
    maps = [
        luma.square(),
        (change - luma).square().mean(1, keepdim=True),
        luma * (beside + below) / 2,
        _detail(luma_after).square(),
        _detail(colour).square().mean(1, keepdim=True),
    ]
    return F.avg_pool2d(torch.cat(maps, 1), CELL, ceil_mode=True, count_include_pad=False)


def figures(cells: Tensor) -> Tensor:
    """What the logistic function sees of each cell, (B, 6, h, w), in the order of the fields of `Weights`."""
    near = _around(cells, NEAR).mean(2)
    change = _around(cells[:, :1], WIDE).mean(2)[:, 0]
    flat = _around(cells[:, [0, 1, 4]], WIDE).kthvalue(RANK, 2).values
    found = [
        _log(change),
        _log(flat[:, 0]),
        _log(flat[:, 2]),
        _log(near[:, 3]),
        near[:, 2] / (near[:, 0] + _TINY),
        (_log(near[:, 1]) - _log(flat[:, 1]) - SPREAD).clamp(min=0),
    ]
    return torch.stack(found, 1)


def shares(cells: Tensor, weights: Weights = WEIGHTS) -> Tensor:
    """The share of the change to keep in each cell, from 0 to 1: (B, 5, h, w) of `moments` -> (B, 1, h, w)."""
    bias, *slopes = astuple(weights)
    share = torch.sigmoid(
        sum(slope * figure for slope, figure in zip(slopes, figures(cells).unbind(1), strict=True)) + bias
    )
    near = _around(cells[:, :2], NEAR).mean(2)
    remains = share.square() * (near[:, 0] + near[:, 1])
    return torch.where(remains < QUIET**2, 0, share)[:, None]


def to_pixels(share: Tensor, height: int, width: int) -> Tensor:
    """Shares of cells (B, 1, h, w) -> of pixels (B, 1, height, width), interpolated between the cells' centres.

    Where all cells around are 0 the pixels are, too.
    """
    whole = F.interpolate(share, scale_factor=CELL, mode="bilinear", align_corners=False)
    return whole[..., :height, :width]


def _next(x: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels to the right and below."""
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return padded[..., :-1, 1:], padded[..., 1:, :-1]


def _detail(x: Tensor) -> Tensor:
    """The second difference down of the second difference across: white noise keeps its deviation in it.

    Immerkaer, "Fast noise variance estimation", 1996. Edges along rows and columns and smooth shades give nothing.
    """
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = 2 * x[..., 1:-1] - x[..., :-2] - x[..., 2:]
    return (2 * x[..., 1:-1, :] - x[..., :-2, :] - x[..., 2:, :]) / 6


def _around(cells: Tensor, side: int) -> Tensor:
    """(B, C, h, w) -> (B, C, side^2, h, w): the cells of the square around each. Those of the border are repeated."""
    batch, channels, height, width = cells.shape
    padded = F.pad(cells, [side // 2] * 4, mode="replicate")
    return F.unfold(padded, side).view(batch, channels, side * side, height, width)


def _log(x: Tensor) -> Tensor:
    return (x + _TINY).log10()
