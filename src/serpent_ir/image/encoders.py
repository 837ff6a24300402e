"""Makes bytes of image files from pictures: those that Pillow writes, and 16 bits, which it cannot write."""

import io
import os
import struct
import zlib
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from serpent_ir.errors import ImageError
from serpent_ir.image import jxl as image_jxl
from serpent_ir.image import xmp as image_xmp
from serpent_ir.image.carriers import CARRIERS, CONVERTED, TOLD, fate, not_kept
from serpent_ir.image.colours import icc_of_cicp, icc_of_gamma, is_hdr
from serpent_ir.image.jpeg import with_segments
from serpent_ir.image.metadata import with_resolution, with_size
from serpent_ir.image.picture import Picture
from serpent_ir.image.png import chunk, with_chunks
from serpent_ir.image.tiff import is_big, write_tiff
from serpent_ir.image.tiff_records import names_of, tags_of

_JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": {"format": "WEBP", "lossless": True, "exact": True},  # exact: keeps the colour of transparent pixels
    ".tif": {},  # not written by Pillow
    ".tiff": {},
    ".bmp": {"format": "BMP"},
}
if features.check("avif"):
    SAVE_OPTIONS[".avif"] = {"format": "AVIF", "quality": 95, "subsampling": "4:4:4"}
if image_jxl.INSTALLED:
    SAVE_OPTIONS[".jxl"] = {"format": "JXL", "lossless": True}
DEEP, _OPAQUE = (".png", ".tif", ".tiff"), (".jpg", ".jpeg", ".bmp")
_LONGEST = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383, ".avif": 65536}
# The most bytes of each that a JPEG can hold, since each must fit into one segment. (A profile is spread over several.)
_JPEG_EXIF, _JPEG_XMP = 65533, 65504
EXIF_OF_BIG = "EXIF data in a file beyond 4 GB"
_FIELDS = ("icc_profile", "exif", "xmp", "dpi")


def encode(picture: Picture, suffix: str) -> bytes:
    """The bytes of an image file in the format of a suffix from `SAVE_OPTIONS`."""
    check_sides(picture.pixels.shape[1], picture.pixels.shape[0], suffix)
    picture = fitting(picture, suffix)
    if suffix in (".tif", ".tiff"):
        buffer = io.BytesIO()
        shape, strips = samples_of(picture)
        write_tiff(buffer, picture, strips, shape, picture.pixels.dtype)
        return buffer.getvalue()
    pixels, alpha = picture.pixels, None if suffix in _OPAQUE else picture.alpha
    if pixels.dtype == np.uint16 and suffix not in DEEP:
        pixels, alpha = (None if x is None else np.rint(x / 257).astype(np.uint8) for x in (pixels, alpha))
        assert pixels is not None
    array = _samples(picture, pixels, alpha)
    array = array[..., 0] if array.shape[2] == 1 else array
    if suffix == ".png":
        data = _encode_png16(array) if array.dtype == np.uint16 else _encode_png(array)
        about = {"icc": picture.icc_profile, "exif": picture.exif, "xmp": picture.xmp, "dpi": picture.dpi}
        return with_chunks(data, is_grey=picture.is_grey, **about, **picture.carried)
    fields = {name: value for name in _FIELDS if (value := getattr(picture, name)) is not None}
    if suffix == ".jxl":
        image_jxl.register()
    image = Image.fromarray(array)
    data = _through_memory_file(image, fields) if suffix in (".jpg", ".jpeg") else b""
    if not data:
        buffer = io.BytesIO()
        image.save(buffer, **SAVE_OPTIONS[suffix], **fields)
        data = buffer.getvalue()
    if suffix == ".avif":
        return _with_numbers(data, picture.carried.get("cicp"))
    return with_segments(data, picture.carried) if suffix in (".jpg", ".jpeg") else data


def _through_memory_file(image: Image.Image, fields: dict[str, Any]) -> bytes:
    """The bytes of a JPEG, or none where a file in memory cannot hold them.

    Pillow encodes into a file of the system without keeping other threads from their work. Such a file counts against
    the bound on the size of files, and a write that stopped half-way may pass for a whole one, so the end is checked.
    """
    try:
        with os.fdopen(os.memfd_create("serpent"), "w+b") as buffer:
            image.save(buffer, **SAVE_OPTIONS[".jpg"], **fields)
            buffer.seek(0)
            data = buffer.read()
    except (AttributeError, OSError):  # not on Linux, forbidden there, or full
        return b""
    return data if data.endswith(b"\xff\xd9") else b""


def fitting(picture: Picture, suffix: str) -> Picture:
    """A picture with only what its format holds, in the way in which the format holds it."""
    height, width = picture.pixels.shape[:2]
    fields = {name: getattr(picture, name) for name in _FIELDS if fate(name, suffix) != TOLD}
    carried = {name: value for name, value in picture.carried.items() if fate(name, suffix) != TOLD}
    if _profile_does_not_fit(picture, suffix):
        fields["icc_profile"] = None
    if _odd_numbers(carried.get("cicp"), suffix):
        del carried["cicp"]
    if not fields.get("icc_profile"):
        fields["icc_profile"] = _made_profile(carried, suffix, grey=_as_grey(picture, suffix))
    if picture.dpi and fate("dpi", suffix) == CONVERTED:
        fields |= {"exif": _exif_with_dpi(picture), "dpi": None}
    if fields.get("exif"):
        fields["exif"] = with_size(fields["exif"], width, height)
    if xmp := picture.xmp:
        xmp, _ = image_xmp.without_claims(xmp, set(carried))
        fields["xmp"] = image_xmp.with_size(xmp, width, height)
    for name in ("exif", "xmp"):
        if _too_long(fields.get(name), suffix, name):
            fields[name] = None
    if not fields.get("xmp"):
        carried.pop("extended_xmp", None)
    return replace(picture, **{**dict.fromkeys(_FIELDS), **fields}, carried=carried)


def _odd_numbers(cicp: bytes | None, suffix: str) -> bool:
    """Whether the numbers say that samples are not full-range RGB, which only PNG can express."""
    return cicp is not None and suffix != ".png" and cicp[2:] != b"\0\1"


def _made_profile(carried: dict[str, Any], suffix: str, *, grey: bool) -> bytes | None:
    """An ICC profile of colours that are given in another way, for a format that cannot express them in that way."""
    if "cicp" in carried:
        return icc_of_cicp(carried["cicp"], grey=grey) if fate("cicp", suffix) == CONVERTED else None
    if "gamma" in carried and fate("gamma", suffix) == CONVERTED:
        return icc_of_gamma(carried["gamma"], grey=grey)
    return None


def _exif_with_dpi(picture: Picture) -> bytes | None:
    try:
        return with_resolution(picture.exif, picture.dpi or (72, 72))
    except (struct.error, KeyError):  # damaged data, which `left_out` reports
        return picture.exif


def _with_numbers(data: bytes, cicp: bytes | None) -> bytes:
    """An AVIF file that gives its primaries and transfer by numbers. Pillow always writes those of sRGB."""
    place = data.find(b"colrnclx") + 8
    return data if cicp is None or place < 8 else data[:place] + struct.pack(">HH", *cicp[:2]) + data[place + 4 :]


def samples_of(picture: Picture) -> tuple[tuple[int, int, int], Generator[NDArray[Any]]]:
    """The shape (H, W, samples) of a picture as a TIFF holds it, and its rows in parts."""
    shape = (*picture.pixels.shape[:2], (1 if picture.is_grey else 3) + (picture.alpha is not None))
    rows = max(1, (1 << 22) // shape[1])
    parts = (slice(top, top + rows) for top in range(0, shape[0], rows))
    return shape, (_samples(picture, picture.pixels[p], _part(picture.alpha, p)) for p in parts)


def check_sides(width: int, height: int, suffix: str) -> None:
    """Raise ImageError if a format cannot hold an image of this size. That is known before the image is made."""
    most = _LONGEST.get(suffix, 0)
    if most and max(width, height) > most:
        raise ImageError(f"would be {width}x{height} px, and {suffix} holds {most} a side; choose .png or .tif by -o")


def left_out(picture: Picture, suffix: str) -> list[str]:
    """What the format cannot hold of a picture, in words."""
    there = {name for name in _FIELDS if getattr(picture, name)} | set(picture.carried)
    there |= names_of(picture.tiff)
    if picture.alpha is not None and picture.alpha.min() < np.iinfo(picture.alpha.dtype).max:
        there.add("alpha")
    if picture.pixels.dtype == np.uint16:
        there.add("deep")
    if picture.icc_profile or ("gamma" in there and icc_of_gamma(picture.carried["gamma"]) is None):
        there.discard("gamma")  # it says nothing, or the profile says it better
    if picture.icc_profile and suffix != ".bmp":
        there.discard("cicp")
    if "aspect" in there and len(set(picture.carried["aspect"])) == 1:
        there.discard("aspect")
    lost = not_kept(there, suffix)
    if _profile_does_not_fit(picture, suffix):
        is_grey = (picture.icc_profile or b"")[16:20] == b"GRAY"
        lost.append(f"an ICC profile for {'grey' if is_grey else 'other samples'}")
    for name in ("exif", "xmp"):
        lost += [f"{name.upper()} data of over 64 KB"] * _too_long(getattr(picture, name), suffix, name)
    if suffix in (".tif", ".tiff"):
        lost += left_at_size(picture)
        samples = (1 if picture.is_grey else 3) + (picture.alpha is not None)
        if picture.exif and is_big(picture.pixels[..., 0].size * samples * picture.pixels.itemsize):
            lost.append(EXIF_OF_BIG)
    if "cicp" in there and _odd_numbers(picture.carried["cicp"], suffix) and suffix != ".bmp":
        lost.append(CARRIERS["cicp"].words)
    elif "cicp" in there and fate("cicp", suffix) == CONVERTED:
        if icc_of_cicp(picture.carried["cicp"]) is None:
            lost.append(CARRIERS["cicp"].words)
        elif is_hdr(picture.carried["cicp"]):
            lost.append("HDR but by an ICC profile, which few viewers understand")
    return lost


def advice(picture: Picture) -> str:
    """A format that holds all of a picture, to recommend if another one does not; "" if there is none."""
    return next((suffix for suffix in (".png", ".tif", ".jpg") if not left_out(picture, suffix)), "")


def left_at_size(picture: Picture) -> list[str]:
    """What only a TIFF can hold of a picture and what is not true for an image of another size."""
    height, width = picture.pixels.shape[:2]
    return tags_of(picture.tiff, (width, height), 1, 8, 1)[2] if picture.tiff else []


def _profile_does_not_fit(picture: Picture, suffix: str) -> bool:
    """Whether the profile is for grey although the samples are colour, or for neither grey nor RGB."""
    space = (picture.icc_profile or b"")[16:20]
    return suffix != ".bmp" and (space in (b"CMYK", b"Lab ") or (space == b"GRAY" and not _as_grey(picture, suffix)))


def _as_grey(picture: Picture, suffix: str) -> bool:
    """Whether samples are written as grey. WebP and Pillow's AVIF only have colour."""
    return picture.is_grey and suffix not in (".webp", ".avif")


def _too_long(value: bytes | None, suffix: str, name: str) -> bool:
    return suffix in (".jpg", ".jpeg") and len(value or b"") > {"exif": _JPEG_EXIF, "xmp": _JPEG_XMP}[name]


def _part(alpha: NDArray[Any] | None, part: slice) -> NDArray[Any] | None:
    return None if alpha is None else alpha[part]


def _samples(picture: Picture, pixels: NDArray[Any], alpha: NDArray[Any] | None) -> NDArray[Any]:
    """(H, W, 1 to 4): grey pictures as grey (luma of ITU-R BT.601 if the channels differ), alpha last."""
    if picture.is_grey:
        pixels = np.rint(pixels @ np.array([0.299, 0.587, 0.114])).astype(pixels.dtype)
    return pixels.reshape(*pixels.shape[:2], -1) if alpha is None else np.dstack([pixels, alpha])


def _encode_png(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _encode_png16(array: NDArray[Any]) -> bytes:
    """(H, W) grey or (H, W, 2 to 4). OpenCV writes all but grey with alpha, which it does not know."""
    import cv2

    if array.ndim == 3 and array.shape[2] == 2:
        height, width = array.shape[:2]
        rows = array.astype(">u2").reshape(height, -1).view(np.uint8)
        rows = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1)  # each row begins with its filter type: none
        header = struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}
    return cv2.imencode(".png", array if array.ndim == 2 else array[..., order[array.shape[2]]])[1].tobytes()
