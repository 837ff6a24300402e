"""Pictures -> bytes of image files: what Pillow writes, and the 16 bits that it cannot. Used by `image.py`."""

import io
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from serpent_ir.errors import ImageError
from serpent_ir.image_metadata import with_size
from serpent_ir.picture import Picture
from serpent_ir.tiff import write_tiff

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": {"format": "WEBP", "lossless": True, "exact": True},  # exact: keeps the colour of transparent pixels
    ".tif": {},  # not by Pillow
    ".tiff": {},
    ".bmp": {"format": "BMP"},
}
if features.check("avif"):
    SAVE_OPTIONS[".avif"] = {"format": "AVIF", "quality": 95, "subsampling": "4:4:4"}
DEEP, _OPAQUE = (".png", ".tif", ".tiff"), (".jpg", ".jpeg", ".bmp")
_LONGEST = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383, ".avif": 65536}
# Bytes of each that a JPEG has room for: they stand in one segment. (A profile is spread over several.)
_JPEG_EXIF, _JPEG_XMP = 65533, 65504
_XMP_NAME = b"XML:com.adobe.xmp\0\0\0\0\0"  # keyword; not compressed, no language, no translated keyword


def encode(picture: Picture, suffix: str) -> bytes:
    """The bytes of an image file in the format of a suffix of `SAVE_OPTIONS`."""
    check_sides(picture.pixels.shape[1], picture.pixels.shape[0], suffix)
    if suffix in (".tif", ".tiff"):
        buffer = io.BytesIO()
        shape = (*picture.pixels.shape[:2], (1 if picture.is_grey else 3) + (picture.alpha is not None))
        rows = max(1, (1 << 22) // shape[1])
        parts = (slice(top, top + rows) for top in range(0, shape[0], rows))
        strips = (_samples(picture, picture.pixels[p], _part(picture.alpha, p)) for p in parts)
        write_tiff(buffer, picture, strips, shape, picture.pixels.dtype)
        return buffer.getvalue()
    picture = replace(picture, exif=with_size(picture.exif, picture.pixels.shape[1], picture.pixels.shape[0]))
    pixels, alpha = picture.pixels, None if suffix in _OPAQUE else picture.alpha
    if pixels.dtype == np.uint16 and suffix not in DEEP:
        pixels, alpha = (None if x is None else np.rint(x / 257).astype(np.uint8) for x in (pixels, alpha))
        assert pixels is not None
    array = _samples(picture, pixels, alpha)
    array = array[..., 0] if array.shape[2] == 1 else array
    if suffix == ".png":
        data = _encode_png16(array) if array.dtype == np.uint16 else _encode_png(array)
        return _with_chunks(data, picture)
    profile = None if _profile_does_not_fit(picture, suffix) else picture.icc_profile
    exif, xmp = (None if _too_long(picture, suffix, what) else getattr(picture, what) for what in ("exif", "xmp"))
    options = dict(SAVE_OPTIONS[suffix], icc_profile=profile, exif=exif, xmp=xmp, dpi=picture.dpi)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, **{name: value for name, value in options.items() if value is not None})
    return buffer.getvalue()


def check_sides(width: int, height: int, suffix: str) -> None:
    """Raise ImageError where a format cannot hold an image of this size, as is known before it is made."""
    most = _LONGEST.get(suffix, 0)
    if most and max(width, height) > most:
        raise ImageError(f"would be {width}x{height} px, and {suffix} holds {most} a side; choose .png or .tif by -o")


def left_out(picture: Picture, suffix: str) -> list[str]:
    """What of a picture the format cannot hold, in words."""
    lost = []
    if suffix in _OPAQUE and picture.alpha is not None and picture.alpha.min() < np.iinfo(picture.alpha.dtype).max:
        lost.append("transparency")
    if suffix not in DEEP and picture.pixels.dtype == np.uint16:
        lost.append("16 bits")
    if _profile_does_not_fit(picture, suffix):
        lost.append("an ICC profile for grey")
    lost += [f"{what.upper()} data of over 64 KB" for what in ("exif", "xmp") if _too_long(picture, suffix, what)]
    if suffix == ".bmp":
        lost += ["the ICC profile"] * bool(picture.icc_profile) + ["EXIF data"] * bool(picture.exif)
        lost += ["XMP data"] * bool(picture.xmp)
    return lost


def _profile_does_not_fit(picture: Picture, suffix: str) -> bool:
    """WebP has no grey, and Pillow's AVIF none either: what they write is colour."""
    return suffix in (".webp", ".avif") and (picture.icc_profile or b"")[16:20] == b"GRAY"


def _too_long(picture: Picture, suffix: str, what: str) -> bool:
    most = {"exif": _JPEG_EXIF, "xmp": _JPEG_XMP}[what]
    return suffix in (".jpg", ".jpeg") and len(getattr(picture, what) or b"") > most


def _part(alpha: NDArray[Any] | None, part: slice) -> NDArray[Any] | None:
    return None if alpha is None else alpha[part]


def _samples(picture: Picture, pixels: NDArray[Any], alpha: NDArray[Any] | None) -> NDArray[Any]:
    """(H, W, 1 to 4): grey pictures as grey (luma of ITU-R BT.601 where the channels differ), alpha last."""
    if picture.is_grey:
        pixels = np.rint(pixels @ np.array([0.299, 0.587, 0.114])).astype(pixels.dtype)
    return pixels.reshape(*pixels.shape[:2], -1) if alpha is None else np.dstack([pixels, alpha])


def _encode_png(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _encode_png16(array: NDArray[Any]) -> bytes:
    """(H, W) grey or (H, W, 2 to 4). OpenCV writes it, but for grey with alpha, which it does not know."""
    import cv2

    if array.ndim == 3 and array.shape[2] == 2:
        height, width = array.shape[:2]
        rows = array.astype(">u2").reshape(height, -1).view(np.uint8)
        rows = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1)  # each row begins with its filter, none
        header = struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)
        body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows.tobytes())) + _chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}
    return cv2.imencode(".png", array if array.ndim == 2 else array[..., order[array.shape[2]]])[1].tobytes()


def _with_chunks(data: bytes, picture: Picture) -> bytes:
    """A PNG with its metadata put in after the header."""
    chunks = []
    if picture.icc_profile:
        chunks.append(_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(picture.icc_profile)))
    if picture.dpi:
        per_metre = (min(round(value / 0.0254), 2**31 - 1) for value in picture.dpi)
        chunks.append(_chunk(b"pHYs", struct.pack(">IIB", *per_metre, 1)))
    if picture.exif:
        chunks.append(_chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
    if picture.xmp:
        chunks.append(_chunk(b"iTXt", _XMP_NAME + picture.xmp))
    end_of_header = 33  # signature and IHDR
    return b"".join([data[:end_of_header], *chunks, picture.png_texts, data[end_of_header:]])


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
