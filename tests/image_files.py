"""Drawn images and metadata for the tests of image files."""

import struct

import numpy as np
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IFDRational

from serpent_ir.image import Picture

_icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ICC = _icc[:24] + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + _icc[36:]  # not made now: every process gets the same files
LOSSLESS = (".png", ".webp", ".tif", ".bmp")


def exif(orientation: int | None = None) -> bytes:
    tags = Image.Exif()
    tags[271] = "Maker"
    tags[306] = "2024:05:01 12:00:00"
    if orientation:
        tags[0x0112] = orientation
    tags.get_ifd(0x8769)[33434] = IFDRational(1, 50)
    return tags.tobytes()


def tags_of(data: bytes | None) -> dict[int, object]:
    assert data is not None
    tags = Image.Exif()
    tags.load(data)
    return {**tags, **tags.get_ifd(0x8769), 0x8769: None}


def draw(dtype: type = np.uint8, height: int = 23, width: int = 37, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth waves with some noise, over the whole range of the dtype."""
    waves = np.sin(np.arange(height)[:, None, None] / 4 + np.arange(channels)) * np.cos(np.arange(width)[:, None] / 6)
    noise = np.random.default_rng(seed).normal(0, 0.03, waves.shape)
    return np.rint(np.clip(0.5 + 0.6 * waves + noise, 0, 1) * np.iinfo(dtype).max).astype(dtype)


def picture(mode: str, dtype: type = np.uint8) -> Picture:
    grey = mode in ("L", "LA")
    samples = draw(dtype, channels=4)
    pixels = np.repeat(samples[..., :1], 3, -1) if grey else samples[..., :3]
    alpha = np.ascontiguousarray(samples[..., 3]) if mode.endswith("A") else None
    return Picture(pixels, alpha, mode, icc_profile=ICC, exif=exif(), dpi=(300.0, 150.0))


def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and np.array_equal(a, b)
