"""Small images as the benchmarks of super-resolution make them: the bicubic `imresize` of MATLAB, in 8 bits."""

import functools

import torch
from torch import Tensor

from serpent_ir.errors import UsageError


def imresize_down(x: Tensor, scale: int) -> Tensor:
    """Shrink x (B, C, H, W) in [0, 1] by an even factor, antialiased, to (B, C, H / scale, W / scale).

    Keys's kernel with a = -0.5, as wide as `scale` pixels of the small image need, and the image mirrored at its border
    with the edge twice. The result is clamped, and a multiple of 1/255, halves rounded up, as MATLAB rounds. Sums are
    in float64, where those of 8-bit images are exact, except on a device that has none.

    Raises UsageError unless both sides are multiples of `scale`.
    """
    height, width = x.shape[-2:]
    if min(height, width) < scale or height % scale or width % scale:
        raise UsageError(f"the image is {width}x{height} px; both sides must be multiples of {scale} (crop it)")
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    small = x.to(wide) * 255
    for _ in range(2):  # along rows, then along columns
        small = _line(small, scale).transpose(-1, -2)
    # A sum that is half a level must not fall below it because 255 (n / 255) is not n.
    return ((small + (0.5 + 1e-5)).floor().clamp(0, 255) / 255).to(x.dtype)


def _line(x: Tensor, scale: int) -> Tensor:
    """The same along the last axis, without rounding. Taps are added one after the other, in every window alike."""
    taps, margin = _taps(scale), 3 * scale // 2
    padded = _mirrored(x, margin)
    last = padded.shape[-1] - (len(taps) - 1)
    total = taps[0] * padded[..., :last:scale]
    for tap, weight in enumerate(taps[1:], 1):
        total += weight * padded[..., tap : last + tap : scale]
    return total


def _mirrored(x: Tensor, margin: int) -> Tensor:
    """x with `margin` pixels more on both sides of the last axis: mirrored, the edge twice, as often as it takes."""
    length = x.shape[-1]
    if margin == 0:
        return x
    if margin <= length:
        return torch.cat([x[..., :margin].flip(-1), x, x[..., length - margin :].flip(-1)], -1)
    place = torch.arange(-margin, length + margin, device=x.device) % (2 * length)
    return x[..., torch.minimum(place, 2 * length - 1 - place)]


@functools.cache
def _taps(scale: int) -> tuple[float, ...]:
    """The weights of the 4 scale pixels that make one small pixel: exact in binary where `scale` is a power of two."""
    weights = []
    for tap in range(4 * scale):
        x = abs(tap - (4 * scale - 1) / 2) / scale
        weights.append(1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * (x**3 - 5 * x**2 + 8 * x - 4))
    total = sum(weights)
    return tuple(weight / total for weight in weights)
