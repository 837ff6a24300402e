"""Images at the border of the program: files, arrays, tensors, and the one place that pads.

Pillow reads and writes, but it holds colour in 8 bits: 16-bit PNG goes through OpenCV and 16-bit TIFF through tifffile.
The depth comes from the file's header, never from the pixels. Inside the program every image is RGB; what else the file
held travels along in `Picture` and is written back.
"""

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from serpent_ir.errors import ImageError, UsageError, is_out_of_memory
from serpent_ir.image import encoders as image_encoders
from serpent_ir.image.decoders import TIFFS, decode, reason
from serpent_ir.image.picture import Picture as Picture
from serpent_ir.image.picture import Pixels as Pixels
from serpent_ir.image.tiff_pages import TiffPages, copies_left
from serpent_ir.system.memory import host_available
from serpent_ir.system.whole_file import whole_file

WRITTEN_SUFFIXES = tuple(image_encoders.SAVE_OPTIONS)
"""The suffixes that `write_image` takes, in either case."""

RAW_SUFFIXES = frozenset(
    [
        ".3fr",
        ".arw",
        ".cr2",
        ".cr3",
        ".crw",
        ".dcr",
        ".dng",
        ".erf",
        ".fff",
        ".gpr",
        ".iiq",
        ".k25",
        ".kdc",
        ".mef",
        ".mos",
        ".mrw",
        ".nef",
        ".nrw",
        ".orf",
        ".pef",
        ".ptx",
        ".raf",
        ".raw",
        ".rw2",
        ".rwl",
        ".sr2",
        ".srf",
        ".srw",
        ".x3f",
    ]
)
"""Suffixes of camera raw files.

Many are TIFFs whose first page is a small preview, which must not pass for the photo.
"""


_LARGE = 1 << 24
"""Bytes of a file up to which nobody asks whether it fits in memory, since asking takes as long as a small image."""


def read_image(path: str | Path, data: bytes | None = None) -> Picture:
    """Read an image file with all that `Picture` keeps. Of an animation or multi-page file, read the first frame.

    `data` is what the file holds, if that was read before; not of a TIFF.

    Reads what Pillow reads, some more formats with OpenCV, and HEIC if pillow-heif is installed. 16 bits are kept in
    PNG, in TIFF and in what Pillow calls "I;16"; elsewhere they become 8. Palettes, grey, CMYK and YCbCr become RGB
    (the last two by Pillow's formulas).

    Raises:
        ImageError: no such file, a folder, not readable, not an image, a camera's raw file, damaged or cut short, over
            `MAX_PIXELS`, or samples that are not integers of at most 16 bits.
    """
    picture, lost = _read(Path(path), data)
    for note in lost:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return picture


def read_image_pixels(path: str | Path) -> Pixels:
    """`Picture.pixels` of an image file, as `read_image` reads it, but without warnings on metadata that is lost."""
    return _read(Path(path))[0].pixels


def _read(path: Path, data: bytes | None = None) -> tuple[Picture, list[str]]:
    """The picture, after warnings on its pixels were given; and the notes on its metadata."""
    planes, left = 1, 0
    try:
        if data is None:
            state = path.stat()
            if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):  # a pipe or a device may never end
                raise ImageError(f"{path}: is not a regular file; write it to one first")
            if state.st_size > _LARGE and state.st_size > host_available():
                raise ImageError(f"{path}: is larger than the memory that is free; cut it into parts first")
            data, planes, left = _first_page(path)
    except (OSError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ImageError(f"{path}: does not fit in memory; cut it into parts first") from error
        raise ImageError(f"{path}: cannot be read: {reason(error)}") from error
    if not data:
        raise ImageError(f"{path}: is empty; get the file again")
    if path.suffix.lower() in RAW_SUFFIXES:
        raise ImageError(f"{path}: is a camera's raw file; develop it first, best as a TIFF of 16 bits")
    try:
        picture, notes, lost = decode(data, planes)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # decoders raise any type for damaged files, struct.error and SyntaxError among them
        if is_out_of_memory(error):
            raise ImageError(f"{path}: does not fit in memory; cut it into parts first") from error
        raise ImageError(f"{path}: is damaged or cut short ({reason(error)}); get the file again") from error
    if planes > 1:
        notes.insert(0, f"holds {planes} pages; the first is taken; --pages all restores each")
    if left:
        lost.append(copies_left(left))
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)
    return picture, lost


def _first_page(path: Path) -> tuple[bytes, int, int]:
    """A file's bytes, or the first page of a multi-page TIFF; the number of pages; and of copies that are no pages."""
    with path.open("rb") as file:
        if file.read(4) in TIFFS:
            file.seek(0)
            try:
                pages = TiffPages(file)
                if len(pages) > 1 or pages.left or pages.is_big:
                    return pages.page(0), len(pages), pages.left
            except Exception:  # whatever is wrong, reading the file will report it
                pass
    return path.read_bytes(), 1, 0


def write_image(path: str | Path, picture: Picture) -> None:
    """Write a picture in the format of the suffix: PNG, JPEG (quality 95, 4:4:4), WebP (lossless), TIFF, BMP or AVIF.

    Grey pictures are written as grey (luma of ITU-R BT.601 if the channels differ). 16 bits stay 16 in PNG and TIFF and
    are rounded to 8 elsewhere. What a format cannot hold (alpha in JPEG and BMP, ICC and EXIF in BMP) is left out with
    a UserWarning that names it. The file appears whole or not at all: it is written under another name in the same
    folder and then renamed.

    Raises:
        ImageError: another suffix, a folder that is missing or not writable, an image too large for the format.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITTEN_SUFFIXES:
        raise ImageError(f"{path}: cannot write {suffix or 'without a suffix'}; use {', '.join(WRITTEN_SUFFIXES)}")
    pixels, alpha = picture.pixels, picture.alpha
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype not in (np.uint8, np.uint16) or not pixels.size:
        raise UsageError(f"expected pixels (H, W, 3), uint8 or uint16; got {pixels.shape}, {pixels.dtype}")
    if alpha is not None and (alpha.shape != pixels.shape[:2] or alpha.dtype != pixels.dtype):
        raise UsageError(f"expected alpha {pixels.shape[:2]}, {pixels.dtype}; got {alpha.shape}, {alpha.dtype}")
    try:
        data = image_encoders.encode(picture, suffix)
    except Exception as error:  # as above: encoders have no common type for what they refuse
        if is_out_of_memory(error):
            raise ImageError(f"{path}: not enough memory to write it; write .tif, which takes less") from error
        raise ImageError(f"{path}: cannot be written in this format: {reason(error)}") from error
    with replacing(path) as file:
        file.write(data)
    tell_of_left_out(path, picture)
    if "motion_video" in picture.carried and image_encoders.fate("motion_video", suffix) == "kept":
        warnings.warn(f"{path}: the video of the motion photo is kept as it was, not restored", stacklevel=2)


def tell_of_left_out(path: Path, picture: Picture) -> None:
    """Warn of what of a picture the file that was written of it does not hold."""
    suffix = path.suffix.lower()
    if lost := image_encoders.left_out(picture, suffix):
        other = image_encoders.advice(picture)
        remedy = f"; write {other} to keep everything" if other else ""
        warnings.warn(f"{path}: {suffix} cannot hold {', '.join(lost)}{remedy}", stacklevel=3)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """As `whole_file`, but raises ImageError if the system refuses."""
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {reason(error)}") from error
