"""What decoders share: the bound on sizes, and OpenCV. `image/decoders.py` and the TIFF modules use it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serpent_ir.errors import ImageError
from serpent_ir.system.memory import host_available

MAX_PIXELS = 2**30
"""Largest image read, in pixels: 32768 x 32768. It is above Pillow's own bound, since this package is used for large
images. It still keeps a small hostile file from filling the memory."""

_DECODING = 12  # bytes per pixel and byte of depth, about: the decoder's copy, the conversion to RGB, and our copy


def check_size(width: int, height: int, depth: int = 1) -> None:
    """Raise ImageError for an image without pixels, over the bound, or too large for the free memory."""
    if not (width > 0 and height > 0):
        raise ImageError(f"is damaged: it says that it is {width}x{height} px; get the file again")
    if width * height > MAX_PIXELS:
        raise ImageError(f"is {width}x{height} px, over the bound of {MAX_PIXELS} pixels; cut it into parts first")
    need = width * height * depth * _DECODING
    if need > 1 << 28 and need > (free := host_available()):
        raise ImageError(
            f"is {width}x{height} px: opening it takes about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "cut it into parts first"
        )


def with_opencv(data: bytes) -> NDArray[Any]:
    """Decode to RGB order. Check with Pillow first: of a damaged file OpenCV returns the part that it could read."""
    import cv2

    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # an error is raised below if it matters
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if array is None:
        raise ImageError("is not an image that Pillow or OpenCV reads")
    if array.ndim == 3 and array.shape[2] >= 3:
        array = array[..., [2, 1, 0, *range(3, array.shape[2])]]
    return array
