"""Samples of Pillow's images as arrays."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BAND = 1 << 18
"""Pixels of an image that are handed over at a time, so that they stay in the cache."""


def colours_and_alpha(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """An image of mode RGB or RGBA as (H, W, 3), and its alpha as (H, W) or None; both are of the caller's own.

    `np.array(image)` makes two more copies of the whole image on the way, and takes four times as long.
    """
    width, height = image.size
    if width * height <= _BAND:
        whole = np.array(image)
        return np.ascontiguousarray(whole[..., :3]), whole[..., 3].copy() if image.mode == "RGBA" else None
    pixels = np.empty((height, width, 3), np.uint8)
    alpha = np.empty((height, width), np.uint8) if image.mode == "RGBA" else None
    step = max(1, _BAND // max(1, width))
    for top in range(0, height, step):
        band = image.crop((0, top, width, min(height, top + step)))
        pixels[top : top + step] = np.asarray(band if alpha is None else band.convert("RGB"))
        if alpha is not None:
            alpha[top : top + step] = np.asarray(band.getchannel("A"))
    return pixels, alpha
