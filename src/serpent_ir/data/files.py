"""Which images a folder or a packed set holds, and their pixels in 8 bits."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from serpent_ir.data.pack import SUFFIX, Pack, PackedImage
from serpent_ir.errors import UsageError
from serpent_ir.image import read_image_pixels
from serpent_ir.image.folders import PASSED_OVER, SUFFIXES, find_images
from serpent_ir.image.jxl import INSTALLED

if INSTALLED:
    SUFFIXES, PASSED_OVER = SUFFIXES | {".jxl"}, PASSED_OVER - {".jxl"}


def list_images(where: str | Path) -> list[Path] | list[PackedImage]:
    """The images of a folder, as `find_images` gives them, or of a packed set (`FILE.serpent`), in order of their
    names.

    `where[A:B]` selects those whose names are numbers from A on and below B; either may be left out. FFHQ's training
    images are `ffhq[:60000]`, of which `ffhq/00000/00000.png` is the first.

    Raises:
        UsageError: no such folder or file, no image in it, or [A:B] with names that are not numbers.
        ImageError: a damaged packed set.
    """
    part = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", str(where), re.ASCII | re.DOTALL)
    if part is None or Path(where).exists():
        return _all_images(Path(where))
    images = _all_images(Path(part[1]))
    first, end = int(part[2] or 0), int(part[3]) if part[3] else None
    picked = []
    for image in images:
        stem = image.stem
        if not (stem.isascii() and stem.isdecimal()):
            raise UsageError(f"{image}: [A:B] picks images whose names are numbers; leave it out, or this image")
        if first <= int(stem) and (end is None or int(stem) < end):
            picked.append(image)
    if not picked:
        raise UsageError(f"{where}: no image has a number from there; {part[1]} holds {len(images)} images")
    return picked


def _all_images(path: Path) -> list[Path] | list[PackedImage]:
    if path.suffix == SUFFIX and not path.is_dir():
        if not path.exists():
            raise UsageError(f"{path}: no such packed set; make it: serpent data pack FOLDER -o {path}")
        return Pack(path).images()
    return find_images(path)


def read_rgb8(image: Path | PackedImage) -> Tensor:
    """An image as (3, H, W) uint8. Files with more bits are rounded to 8; alpha is left out."""
    return torch.from_numpy(read_pixels(image).transpose(2, 0, 1).copy())


def read_pixels(image: Path | PackedImage) -> np.ndarray:
    """The same as an array (H, W, 3). For a packed set it is a part of the mapped file and must not be written to."""
    if isinstance(image, PackedImage):
        return image.pixels
    pixels = read_image_pixels(image)
    return np.rint(pixels / 257).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
