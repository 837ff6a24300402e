"""Samples of an image as it comes and goes: integers or floats, colour or grey, beside alpha."""

import numpy as np
import torch
from torch import Tensor

from serpent_ir.errors import UsageError
from serpent_ir.image import Pixels
from serpent_ir.image.tensors import as_samples, torch_dtype
from serpent_ir.system.transfers import converts, download, upload

Samples = tuple[np.ndarray, np.ndarray | None]
"""Colour (h, w, 3) or grey (h, w), and alpha (h, w) or None."""

# Noise takes a degraded image a little out of [0, 1]; values beyond these are on another scale (0 to 255, most often).
_LOWEST, _HIGHEST = -1.0, 2.0


def to_pixels(strip: Tensor, dtype: np.dtype, *, grey: bool, before: Samples | None = None) -> np.ndarray:
    """(1, 3, H, W), which is used up -> (H, W, 3), or (H, W) of their mean, as integers.

    Where the alpha of `before` is 0, its colours are kept.
    """
    samples = as_samples(strip, torch_dtype(dtype), grey=grey)[0]
    if before is not None and before[1] is not None and not before[1].all():
        shown, colours = (upload(part, samples.device) for part in (before[1] != 0, before[0]))
        signed = torch.uint8 if samples.dtype == torch.uint8 else torch.int16  # which PyTorch chooses from
        chosen = torch.where(shown if grey else shown[..., None], samples.view(signed), colours.view(signed))
        samples = chosen.view(samples.dtype)
    return download(samples).numpy() if converts(samples.device) else samples.cpu().numpy()


def grey_to_rgb(grey: Pixels | np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


def check_scale(x: Tensor) -> None:
    """Raise UsageError for floats that are on another scale."""
    low, high = (value.item() for value in x.aminmax())
    if not (low >= _LOWEST and high <= _HIGHEST):  # a NaN passes neither
        raise UsageError(f"restore: float images are in [0, 1]; this one spans {low:g} to {high:g}")
