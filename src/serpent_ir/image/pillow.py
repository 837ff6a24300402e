"""Samples of Pillow's images as arrays, and the way back."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BAND = 1 << 18
"""Pixels of an image that are handed over at a time, so that they stay in the cache."""


def colours_and_alpha(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """An image of mode RGB or RGBA as (H, W, 3), and its alpha as (H, W) or None; both are of the caller's own."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    if image.mode == "RGB":
        copy_rows(image, slice(0, height), pixels)
        return pixels, None
    alpha = np.empty((height, width), np.uint8)
    for rows, band in _bands(image, slice(0, height)):
        for channel in range(3):  # one by one, which takes numpy a quarter of the time
            pixels[rows, :, channel] = band[..., channel]
        alpha[rows] = band[..., 3]
    return pixels, alpha


def copy_rows(image: Image.Image, rows: slice, into: NDArray[np.uint8]) -> None:
    """Write rows of an image of mode RGB or RGBA into an array (rows, W, 3 or 4).

    `np.array(image)` makes two more copies of the whole image on the way, and takes five times as long.
    """
    for here, band in _bands(image, rows):
        into[here.start - rows.start : here.stop - rows.start] = band


def _bands(image: Image.Image, rows: slice) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    step = max(1, _BAND // max(1, image.width))
    for top in range(rows.start, rows.stop, step):
        end = min(rows.stop, top + step)
        part = image if end - top == image.height else image.crop((0, top, image.width, end))
        yield slice(top, end), np.asarray(part)


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
