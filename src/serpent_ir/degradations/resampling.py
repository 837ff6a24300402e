"""Pictures made smaller and enlarged again, by any factor and with several kernels, each image with its own."""

import torch
from torch import Tensor

LARGEST_SCALE = 2.0
"""The greatest factor by which a picture may be made smaller."""
RESAMPLING_MARGIN = 9
"""Pixels around a pixel that decide it: two of the small picture, each depending on at most four kernel widths."""
KERNELS = ("box", "triangle", "bicubic")
_DOWN_TAPS, _UP_TAPS = 8, 4


def down_and_up(x: Tensor, scale: Tensor, kernel: Tensor, origins: Tensor, sizes: Tensor) -> Tensor:
    """Make images smaller, antialiased, and enlarge them to their old size. Borders are repeated.

    Args:
        x: (B, C, H, W), windows of images.
        scale: (B,) from 1 to 2, by which both sides are divided; the resulting size is rounded to whole pixels.
        kernel: (B,) numbers of `KERNELS`, for both ways. Box means area averaging down and nearest neighbour up.
        origins: (B, 2) row and column of the window's first pixel in its image.
        sizes: (B, 2) height and width of that image.
    """
    for axis in (0, 1):
        x = _line(x.transpose(-1, -2), scale, kernel, origins[:, axis], sizes[:, axis])
    return x.contiguous()


def _line(x: Tensor, scale: Tensor, kernel: Tensor, origin: Tensor, size: Tensor) -> Tensor:
    """The same along the last axis only."""
    # All positions refer to the whole image, in float64, so that a window has the same ones as the whole.
    length, wide = x.shape[-1], torch.float32 if x.device.type == "mps" else torch.float64
    origin, size, kernel = (each.to(x.device)[:, None] for each in (origin, size, kernel))
    small = (size.to(wide) / scale.to(x.device, wide)[:, None]).round().clamp(min=1)
    step = size.to(wide) / small
    first = ((origin.to(wide) + 0.5) / step - 0.5).floor().long() - 2
    places = first + torch.arange(length + 5, device=x.device)
    centres = (places + 0.5) * step - 0.5
    x = _gathered(x, centres, step, kernel, _DOWN_TAPS, origin, size)
    places = origin + torch.arange(length, device=x.device)
    centres = (places + 0.5) / step - 0.5
    return _gathered(x, centres, torch.ones_like(step), kernel, _UP_TAPS, first, small.long())


def _gathered(
    x: Tensor, centres: Tensor, width: Tensor, kernel: Tensor, taps: int, origin: Tensor, size: Tensor
) -> Tensor:
    """Weighted sums of x (B, C, H, L) around centres (B, K): (B, C, H, K).

    x holds the pixels from `origin` (B, 1) on of lines of `size`. Taps are added one after the other, so that the sum
    of a pixel does not depend on where in a window it lies.
    """
    nearest = centres.floor().long()
    places = [nearest + tap + 1 - taps // 2 for tap in range(taps)]
    weights = [_weight((place - centres) / width, kernel) for place in places]
    total = sum(weights)
    result = None
    for place, weight in zip(places, weights, strict=True):
        index = (place.clamp(min=0).minimum(size - 1) - origin).clamp(0, x.shape[-1] - 1)
        pixels = x.gather(-1, index[:, None, None].expand(-1, *x.shape[1:3], -1))
        part = pixels * (weight / total).to(x.dtype)[:, None, None]
        result = part if result is None else result + part
    assert result is not None
    return result


def _weight(offset: Tensor, kernel: Tensor) -> Tensor:
    """The kernels at offsets (B, K): box, triangle, and Keys's bicubic (1981) with a = -0.5."""
    x = offset.abs()
    # If two pixels lie at the ends of a box, the left one counts, however a position was rounded.
    box = ((offset >= -0.5 - 1e-9) & (offset < 0.5 - 1e-9)).to(x.dtype)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * (x**3 - 5 * x**2 + 8 * x - 4)
    bicubic = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return torch.where(kernel == 0, box, torch.where(kernel == 1, (1 - x).clamp(min=0), bicubic))
