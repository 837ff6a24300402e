"""Conversion between a picture's samples and a network's tensors, and the filling of transparent pixels."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import DTypeLike
from torch import Tensor

from serpent_ir.errors import ImageError, UsageError
from serpent_ir.image.picture import Pixels as Pixels


def to_tensor(pixels: Pixels) -> Tensor:
    """(H, W, 3) uint8 or uint16 -> (1, 3, H, W) float32 in [0, 1]."""
    full_scale = np.iinfo(pixels.dtype).max
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(channels_first).div_(full_scale).unsqueeze(0)


def to_pixels(image: Tensor, dtype: DTypeLike) -> Pixels:
    """(1, 3, H, W) float on any device -> (H, W, 3) in `dtype` (uint8 or uint16), clamped to [0, 1] and rounded.

    Raises ImageError if a value is NaN or infinite: the network failed, and black pixels would hide it.
    """
    if image.ndim != 4 or image.shape[:2] != (1, 3):
        raise UsageError(f"expected a tensor (1, 3, H, W); got {tuple(image.shape)}")
    if not image.isfinite().all():
        raise ImageError("the image holds NaN or infinite values: the network failed on it; try float32")
    scaled = image[0].float().clamp(0, 1).mul(np.iinfo(dtype).max).round()
    return scaled.permute(1, 2, 0).cpu().numpy().astype(dtype)


def fill_transparent(x: Tensor, alpha: Tensor) -> Tensor:
    """Give invisible pixels the colours around them, so that a network does not spread what was hidden there.

    x (B, C, H, W), alpha (B, 1, H, W) in [0, 1]. Where alpha is 0, the colour becomes that of the visible pixels
    nearby, smoothly. Elsewhere nothing changes.
    """
    if bool((alpha > 0).all()):
        return x
    if max(x.shape[-2:]) == 1:
        return x
    sums = F.avg_pool2d(torch.cat([x * alpha, alpha], 1), 2, ceil_mode=True)
    coarse, weight = sums[:, :-1] / sums[:, -1:].clamp_min(1e-9), sums[:, -1:]
    coarse = fill_transparent(coarse, (weight > 0).to(x.dtype))
    return torch.where(alpha > 0, x, F.interpolate(coarse, x.shape[-2:], mode="bilinear"))
