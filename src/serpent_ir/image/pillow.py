"""Samples of Pillow's images as arrays, and the way back."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BAND = 64
"""Rows of an image that are handed over at a time, so that they stay in the cache."""


def colours_and_alpha(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """An image of mode RGB or RGBA as (H, W, 3), and its alpha as (H, W) or None; both are of the caller's own."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    if image.mode == "RGB":
        copy_rows(image, slice(0, height), pixels)
        return pixels, None
    alpha = np.empty((height, width), np.uint8)
    for top in range(0, height, _BAND):
        rows = slice(top, top + _BAND)
        band = _rows(image, top, min(height, top + _BAND))
        for channel in range(3):  # one by one, which takes numpy a quarter of the time
            pixels[rows, :, channel] = band[..., channel]
        alpha[rows] = band[..., 3]
    return pixels, alpha


def copy_rows(image: Image.Image, rows: slice, into: NDArray[np.uint8]) -> None:
    """Write rows of an image of mode RGB or RGBA into an array (rows, W, 3 or 4).

    `np.array(image)` makes two more copies of the whole image on the way, and takes five times as long.
    """
    for top in range(rows.start, rows.stop, _BAND):
        end = min(rows.stop, top + _BAND)
        into[top - rows.start : end - rows.start] = _rows(image, top, end)


def _rows(image: Image.Image, top: int, end: int) -> NDArray[np.uint8]:
    return np.asarray(image.crop((0, top, image.width, end)))


def image_on(samples: NDArray[np.uint8], mode: str) -> Image.Image:
    """An image of mode RGB or RGBA on the memory of an array (H, W, 4). Pillow copies it where the image is changed.

    Pillow keeps RGB so, too, with a fourth number that nobody reads. Making that of three takes it several times as
    long as the copy of an image.
    """
    height, width = samples.shape[:2]
    kept = "RGBX" if mode == "RGB" else mode
    image = Image.frombuffer(kept, (width, height), samples, "raw", kept, 0, 1)
    if kept == mode:
        return image
    try:  # as Pillow's `putalpha` does; a public way there is for Arrow's arrays alone
        image.im.setmode(mode)
        image._mode = mode
        return image
    except (AttributeError, ValueError):
        return image.convert(mode)
