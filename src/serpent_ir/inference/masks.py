"""Masks of an image: which pixels are missing, and which are to stay as they are."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from serpent_ir.errors import UsageError
from serpent_ir.system.transfers import converts, upload

Mask = Image.Image | np.ndarray | Tensor
"""(H, W), a number from 0 to its full scale for each pixel."""


def as_shares(mask: Mask, height: int, width: int, device: torch.device) -> Tensor:
    """A mask as (1, 1, H, W) float64 in [0, 1], on the device if samples are converted there.

    Raises UsageError for a mask of another size than the image's.
    """
    mask = mask.convert("L") if isinstance(mask, Image.Image) else mask
    array = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    if array.shape != (height, width):
        size = "x".join(map(str, reversed(array.shape)))
        raise UsageError(f"restore: the mask is {size} px and the image {width}x{height}; they must be the same")
    whole = 1 if array.is_floating_point() or array.dtype == torch.bool else torch.iinfo(array.dtype).max
    array = upload(array, device) if converts(device) else array.cpu()
    return (array.double() / whole)[None, None]


def missing_pixels(mask: Mask, height: int, width: int, device: torch.device) -> Tensor:
    """A mask as (1, 1, H, W) float32: 1 where it is over half of its full scale, and 0 elsewhere."""
    return (as_shares(mask, height, width, device) > 0.5).float()
