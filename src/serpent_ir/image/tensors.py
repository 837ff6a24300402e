"""Conversion between a picture's samples and a network's tensors, and the filling of transparent pixels."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import DTypeLike
from torch import Tensor

from serpent_ir.errors import ImageError, UsageError
from serpent_ir.image.picture import Pixels as Pixels

_BAND = 1 << 20
"""Samples of a channel that are converted at a time on a CPU, so that they stay in its cache."""


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
    if not all_finite(image):
        raise ImageError("the image holds NaN or infinite values: the network failed on it; try float32")
    return as_samples(image.float().clamp(0, 1), torch_dtype(dtype))[0].cpu().numpy()


def as_floats(samples: Tensor) -> Tensor:
    """(..., H, W, C) uint8 or uint16 on any device -> (..., C, H, W) float32 in [0, 1] there, as `to_tensor` does."""
    x = samples.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(_on(samples.device, torch.iinfo(samples.dtype).max))


def as_samples(image: Tensor, dtype: torch.dtype, *, grey: bool = False) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1] -> (B, H, W, 3) in `dtype` (uint8 or uint16), rounded, on the same device.

    Grey is the mean of the channels, (B, H, W). The image's numbers are lost, since memory is short where it is large.
    """
    if grey:
        image = (image[:, :1] + image[:, 1:2]).add_(image[:, 2:]).div_(_on(image.device, 3))
    batch, channels, height, width = image.shape
    made = torch.empty(batch, height, width, channels, dtype=dtype, device=image.device)
    step = max(1, _BAND // width) if image.device.type == "cpu" else height
    for top in range(0, height, step):
        rows = image[:, :, top : top + step].mul_(torch.iinfo(dtype).max).round_()
        made[:, top : top + step] = rows.to(dtype).movedim(1, -1)
    return made[..., 0] if grey else made


@functools.cache
@torch.inference_mode(False)
def _on(device: torch.device, number: int) -> Tensor:
    """A number as a tensor. On a GPU, dividing by a plain number multiplies by its reciprocal, which rounds twice."""
    return torch.full((), number, dtype=torch.float32, device=device)


def torch_dtype(dtype: DTypeLike) -> torch.dtype:
    """PyTorch's name of a numpy dtype."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(finite(x))


def finite(x: Tensor) -> Tensor:
    """`all_finite` as a tensor, which nobody waits for. One pass over x, in a tenth of the time of `isfinite`."""
    return torch.stack(x.aminmax()).isfinite().all()


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
