"""Images at the border of the program: files, arrays, tensors, and the one place that pads.

Pillow reads and writes, but it holds colour in 8 bits: 16-bit PNG goes through OpenCV and 16-bit TIFF through tifffile.
The depth comes from the file's header, never from the pixels. Inside the program every image is RGB; what else the file
held travels along in `Picture` and is written back.
"""

import io
import logging
import math
import secrets
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import DTypeLike, NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from serpent_ir import image_encoders
from serpent_ir.errors import ImageError, UsageError
from serpent_ir.image_encoders import SUB_IFDS

MAX_PIXELS = 2**30
"""Largest image read, in pixels: 32768 x 32768. Above Pillow's own bound, since large images are a use of this package;
the bound that is left keeps a small hostile file from filling the memory."""

WRITTEN_SUFFIXES = tuple(image_encoders.SAVE_OPTIONS)
"""The endings that `write_image` takes, in either case."""

_GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B")
_PNG, _TIFFS = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What Pillow knows well: if it finds no image there the file is damaged, and OpenCV would return a part of it.
_PILLOW_SIGNATURES = (_PNG, *_TIFFS, b"\xff\xd8", b"RIFF", b"BM", b"GIF8")
# The tags of a TIFF that describe the scene (description, make, model, software, date and time, artist, copyright); the
# others describe how that one file is laid out.
_EXIF_OF_TIFF = (270, 271, 272, 305, 306, 315, 33432)
_ORIENTATION = ExifTags.Base.Orientation
_bound_lock = threading.Lock()

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and what must survive its restoration; `dataclasses.replace(picture, pixels=...)` swaps the pixels.

    Attributes:
        pixels: (H, W, 3) uint8 or uint16, RGB, upright: the EXIF orientation is applied, and taken out.
        alpha: (H, W) of the same dtype, not premultiplied; None where the image is opaque.
        mode: Pillow's name of the colours in the file ("L", "P", "RGB", "CMYK", ...) or, for 16 bits, "I;16", "LA",
            "RGB" or "RGBA". Grey modes are written back as grey.
        format: Pillow's name of the file format ("PNG", "JPEG", ...).
        icc_profile: the ICC profile of the pixels; None if there is none, or if it was for CMYK or another space left.
        exif: EXIF data as Pillow saves it.
        dpi: horizontal and vertical resolution in pixels per inch.
    """

    pixels: Pixels
    alpha: Pixels | None = None
    mode: str = "RGB"
    format: str | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None

    @property
    def is_grey(self) -> bool:
        """Whether the file had no colour."""
        return self.mode in _GREY_MODES


def read_image(path: str | Path) -> Picture:
    """Read an image file with all that `Picture` keeps; of an animation or a multi-page file the first frame.

    Reads what Pillow reads, and with OpenCV some more. 16 bits are kept in PNG, in TIFF and in what Pillow calls
    "I;16"; elsewhere they become 8. Palettes, grey, CMYK and YCbCr become RGB (the last two by Pillow's formulas).

    Raises ImageError: no such file, a folder, not readable, no image, damaged or cut short, over `MAX_PIXELS`, or
    samples that are not integers of at most 16 bits.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {_reason(error)}") from error
    if not data:
        raise ImageError(f"{path}: is empty; get the file again")
    try:
        picture, frames = _decode(data), _frames(data)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # decoders meet damaged files with any type, struct.error and SyntaxError among them
        raise ImageError(f"{path}: is damaged or cut short ({_reason(error)}); get the file again") from error
    if frames > 1:
        warnings.warn(f"{path}: holds {frames} images; the first is taken", stacklevel=2)
    return picture


def write_image(path: str | Path, picture: Picture) -> None:
    """Write a picture in the format of the suffix: PNG, JPEG (quality 95, 4:4:4), WebP (lossless), TIFF or BMP.

    Grey pictures are written as grey (luma of ITU-R BT.601 where the channels differ). 16 bits stay 16 in PNG and TIFF
    and are rounded to 8 elsewhere. What a format cannot hold (alpha in JPEG and BMP, ICC and EXIF in BMP) is left out
    with a UserWarning that names it. The file appears whole or not at all: it is written under another name in the same
    folder and then renamed.

    Raises ImageError: another suffix, a folder that is missing or not writable, an image too large for the format.
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
        raise ImageError(f"{path}: cannot be written in this format: {_reason(error)}") from error
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {_reason(error)}") from error
    if lost := image_encoders.left_out(picture, suffix):
        warnings.warn(f"{path}: {suffix} cannot hold {', '.join(lost)}; write .png to keep everything", stacklevel=2)


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
    if not image.isfinite().all():
        raise ImageError("the image holds NaN or infinite values: the network failed on it; try float32")
    scaled = image[0].float().clamp(0, 1).mul(np.iinfo(dtype).max).round()
    return scaled.permute(1, 2, 0).cpu().numpy().astype(dtype)


def pad_to_multiple(x: Tensor, multiple: int, *, least: int = 0) -> Tensor:
    """Pad (B, C, H, W) on the right and bottom so that both sides are multiples of `multiple`; crop by x[..., :H, :W].

    Reflects, but repeats the edge along a side that is not larger than its pad (reflection is undefined there). Sides
    become at least `least`, itself a multiple.
    """
    height, width = x.shape[-2:]
    for side, frame in ((height, 3), (width, 1)):
        if pad := max(least - side, -side % multiple):
            padding = [0, 0, 0, 0]
            padding[frame] = pad
            x = F.pad(x, padding, mode="reflect" if pad < side else "replicate")
    return x


def fill_transparent(x: Tensor, alpha: Tensor) -> Tensor:
    """Give pixels that cannot be seen the colours around them, so that a network does not spread what was there.

    x (B, C, H, W), alpha (B, 1, H, W) in [0, 1]. Where alpha is 0 the colour becomes that of the visible pixels
    nearby, smoothly; where it is not, nothing changes.
    """
    if bool((alpha > 0).all()):
        return x
    if max(x.shape[-2:]) == 1:
        return x
    sums = F.avg_pool2d(torch.cat([x * alpha, alpha], 1), 2, ceil_mode=True)
    coarse, weight = sums[:, :-1] / sums[:, -1:].clamp_min(1e-9), sums[:, -1:]
    coarse = fill_transparent(coarse, (weight > 0).to(x.dtype))
    return torch.where(alpha > 0, x, F.interpolate(coarse, x.shape[-2:], mode="bilinear"))


def _decode(data: bytes) -> Picture:
    image = _open(data)
    if image is not None:
        _check_size(*image.size)
    kept, orientation = _metadata(None)
    if data.startswith(_TIFFS):
        kept, orientation = _metadata(image)  # first: when Pillow loads the pixels of a TIFF it turns them upright
        if picture := _decode_tiff(data, image):
            return _upright(replace(picture, **kept), orientation)
        orientation = 1
    if image is None:
        return _decode_other(data)
    image.load()  # raises where data is missing; nothing below this line needs to look for that
    if not data.startswith(_TIFFS):
        kept, orientation = _metadata(image)
    grey16 = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")  # a PGM is scaled to 16 bits
    if data.startswith(_PNG) and data[24] == 16:  # IHDR's bit depth
        picture = _decode_png16(data, image)
    elif grey16:
        picture = _picture(np.asarray(image).astype(np.uint16), mode="I;16", format=image.format)
    elif image.mode in ("I", "F"):
        raise ImageError(f"has {image.mode!r} samples; integers of at most 16 bits are supported, convert it first")
    else:
        array = np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        picture = _picture(array, mode=image.mode, format=image.format)
    return _upright(replace(picture, **kept), orientation)


def _open(data: bytes) -> Image.Image | None:
    """Parse the header with Pillow; None if it knows no such format."""
    with _bound_lock:  # Pillow's bound is a global of its module; ours is checked by the caller
        bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            return None
        finally:
            Image.MAX_IMAGE_PIXELS = bound


def _frames(data: bytes) -> int:
    """How many images a file holds."""
    image = _open(data)
    return 1 if image is None else getattr(image, "n_frames", 1)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"is {width}x{height} px, over the bound of {MAX_PIXELS} pixels; cut it into parts first")


def _picture(array: NDArray[Any], *, mode: str, format: str | None) -> Picture:
    """Split decoded samples, (H, W) or (H, W, 1 to 4) in the order grey or RGB, then alpha."""
    array = array[..., None] if array.ndim == 2 else array
    colours = array.shape[2] - (array.shape[2] in (2, 4))
    pixels = np.ascontiguousarray(np.broadcast_to(array[..., :colours], (*array.shape[:2], 3)))
    alpha = np.ascontiguousarray(array[..., colours]) if colours < array.shape[2] else None
    return Picture(pixels, alpha, mode=mode, format=format)


def _with_opencv(data: bytes) -> NDArray[Any]:
    """Decode to RGB order. OpenCV returns the part it could read of a damaged file: check before with Pillow."""
    import cv2

    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what matters is raised below
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if array is None:
        raise ImageError("is not an image that Pillow or OpenCV reads")
    if array.ndim == 3 and array.shape[2] >= 3:
        array = array[..., [2, 1, 0, *range(3, array.shape[2])]]
    return array


def _decode_png16(data: bytes, image: Image.Image) -> Picture:
    cast(Image.Image, _open(data)).verify()  # checksums and end of file, where OpenCV would warn on stderr and go on
    if b"IEND\xaeB`\x82" not in data:
        raise ImageError("is cut short; get the file again")
    array = _with_opencv(data)
    grey, has_alpha = data[25] in (0, 4), data[25] in (4, 6)  # IHDR's colour type
    if grey and array.ndim == 3:
        array = array[..., [0, 3]]
    elif grey and "transparency" in image.info:  # OpenCV drops the transparent level of a grey PNG
        array = np.stack([array, np.where(array == image.info["transparency"], 0, 65535).astype(np.uint16)], -1)
        has_alpha = True
    return _picture(array, mode=("LA" if has_alpha else "I;16") if grey else image.mode, format="PNG")


def _decode_other(data: bytes) -> Picture:
    """A file that Pillow does not know; OpenCV reads a few more formats."""
    if data.startswith(_PILLOW_SIGNATURES):
        raise ImageError("is damaged, cut short, or of a kind that Pillow does not read; get it again or convert it")
    array = _with_opencv(data)
    _check_size(array.shape[1], array.shape[0])
    if array.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"has {array.dtype} samples; integers of at most 16 bits are supported, convert it first")
    return _picture(array, mode="L" if array.ndim == 2 else "RGB", format=None)


def _decode_tiff(data: bytes, image: Image.Image | None) -> Picture | None:
    """The first page of a TIFF whose samples Pillow would cut to 8 bits; None if Pillow keeps them."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would print arrives as an ImageError
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first.aspage()
        if page.bitspersample <= 8:
            return None
        if page.dtype != np.uint16 or page.photometric not in (0, 1, 2) or page.axes not in ("YX", "YXS", "SYX"):
            kind = f"{page.dtype} samples, {tifffile.PHOTOMETRIC(page.photometric).name}"
            raise ImageError(f"has {kind}; supported are 8- and 16-bit integers, RGB or grey: convert it first")
        _check_size(page.imagewidth, page.imagelength)
        ends = (start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=True))
        if max(ends, default=0) > len(data) or not all(page.databytecounts):
            raise ImageError("is cut short; get the file again")  # tifffile would fill in zeros
        try:
            array = page.asarray()
        except ValueError as error:
            if image is None or "imagecodecs" not in str(error):
                raise
            image.load()
            array = _with_opencv(data)  # LZW, which tifffile reads only with another package
        if page.axes == "SYX":
            array = array.transpose(1, 2, 0)
        if page.photometric == 0:  # 0 is white
            array = np.concatenate([65535 - array[..., :1], array[..., 1:]], -1) if array.ndim == 3 else 65535 - array
        samples, extra = page.samplesperpixel, page.extrasamples
        keep = samples - len(extra) + bool(extra)
        if array.ndim == 3:
            array = array[..., :keep]  # channels beyond alpha are masks of an editor
        mode = {1: "I;16", 2: "LA", 3: "RGB", 4: "RGBA"}[keep]
        picture = _picture(array, mode=mode, format="TIFF")
        if extra and extra[0] == 1 and picture.alpha is not None:  # premultiplied
            whole = np.maximum(picture.alpha, 1)[..., None]
            pixels = np.rint(np.minimum(picture.pixels / whole, 1) * 65535).astype(np.uint16)
            picture = replace(picture, pixels=pixels)
        return picture if image else replace(picture, icc_profile=page.tags.valueof(34675))


def _metadata(image: Image.Image | None) -> tuple[dict[str, Any], int]:
    """Picture's metadata as Pillow parsed it, for an upright image, and the EXIF orientation that leads to it."""
    if image is None:
        return {}, 1
    # A profile of a space that is left, such as CMYK, would be wrong for the RGB pixels.
    icc = None if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else image.info.get("icc_profile")
    exif, orientation, dpi = image.info.get("exif"), 1, _dpi(image)
    try:
        tags = image.getexif()
        orientation = tags.get(_ORIENTATION, 1)
        if image.format == "TIFF" or _ORIENTATION in tags:
            kept = Image.Exif()
            for tag, value in tags.items():
                if tag in SUB_IFDS:
                    kept.get_ifd(tag).update(tags.get_ifd(tag))
                elif tag != _ORIENTATION and (image.format != "TIFF" or tag in _EXIF_OF_TIFF):
                    kept[tag] = value
            exif = kept.tobytes() if len(kept) or any(kept.get_ifd(tag) for tag in SUB_IFDS) else None
    except Exception:  # damaged metadata must not cost the image; the types are any, as in read_image
        exif = None
    dpi = dpi[::-1] if dpi and orientation in (5, 6, 7, 8) else dpi
    return {"icc_profile": icc, "exif": exif, "dpi": dpi}, orientation


def _upright(picture: Picture, orientation: int) -> Picture:
    turn = _TURNS.get(orientation)
    if turn is None:
        return picture
    alpha = None if picture.alpha is None else np.ascontiguousarray(turn(picture.alpha))
    return replace(picture, pixels=np.ascontiguousarray(turn(picture.pixels)), alpha=alpha)


_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # EXIF orientation -> what makes (H, W, ...) upright
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.swapaxes(np.rot90(x, 2), 0, 1),
    8: np.rot90,
}


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if all(math.isfinite(value) and value > 0 for value in (x, y)) else None


def _reason(error: Exception) -> str:
    """One line of what an exception says."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return text.splitlines()[0]
