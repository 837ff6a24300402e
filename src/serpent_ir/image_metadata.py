"""What an image file says beside its pixels: EXIF, ICC profile, XMP, resolution. Read here for `image_decoders.py`.

Nothing here raises for damaged metadata: it must not cost the image. A note says what is left out.
"""

import math
import re
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

from PIL import ExifTags, Image

SUB_IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
XMP_TAG = 700
_ORIENTATION = ExifTags.Base.Orientation
# The tags of a TIFF that describe the scene (description, make, model, software, date and time, artist, copyright,
# rating, and Windows' title, comment, author, keywords, subject); the others describe how that one file is laid out.
RATINGS, XP = (18246, 18249), tuple(range(40091, 40096))
_EXIF_OF_TIFF = (270, 271, 272, 305, 306, 315, 33432, *RATINGS, *XP)
_IPTC_TAG, _IPTC_OF_PHOTOSHOP = 33723, 0x0404  # in a TIFF; in a JPEG's APP13
_XMP_ORIENTATION = re.compile(rb"""(<(?:tiff:)?Orientation>\s*|tiff:Orientation=["'])([1-8])""")
# Chunks of a PNG that say how its samples are to be seen, and what a person wrote; XMP is among the last kind.
_PNG_KEPT = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"tEXt", b"zTXt", b"iTXt")


def metadata_of(
    image: Image.Image | None, file: BinaryIO, notes: list[str], lost: list[str]
) -> tuple[dict[str, Any], int]:
    """`Picture`'s metadata for an upright image, and the EXIF orientation that leads to it.

    `image` is what Pillow opened; None for a TIFF that it cannot, which is read from `file`. `lost` gets what a person
    should know of what is left out, `notes` of what changes how the pixels are seen.
    """
    exif, orientation, xmp, icc, dpi = None, 1, None, None, None
    try:
        if image is None:
            tags = Image.Exif()
            file.seek(0)
            tags.load_from_fp(file)
            icc, dpi = tags.get(34675), _dpi_of_tags(tags)
        else:
            tags = image.getexif()
            # A profile of a space that is left, such as CMYK, would be wrong for the RGB pixels.
            icc = None if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else image.info.get("icc_profile")
            xmp, dpi = image.info.get("xmp"), _dpi(image.info.get("dpi"))
        photoshop = image.info.get("photoshop") if image is not None else None
        if tags.get(_IPTC_TAG) or (isinstance(photoshop, dict) and photoshop.get(_IPTC_OF_PHOTOSHOP)):
            lost.append("has captions as IPTC; left out, what EXIF and XMP say of them is kept")
        orientation = tags.get(_ORIENTATION, 1)
        if image is None or image.format == "TIFF":
            exif, xmp = _exif_of_tiff(tags), tags.get(XMP_TAG)
        elif image.info.get("exif"):
            exif = _upright_exif(image.info["exif"])
    except Exception:  # Pillow raises anything for damaged tags
        notes.append("its EXIF data is damaged and left out")  # the orientation, too
        exif = None
    xmp = _XMP_ORIENTATION.sub(rb"\g<1>1", xmp) if isinstance(xmp, bytes) else None
    dpi = dpi[::-1] if dpi and orientation in (5, 6, 7, 8) else dpi
    return {"icc_profile": icc or None, "exif": exif, "xmp": xmp, "dpi": dpi}, orientation


def _exif_of_tiff(tags: Image.Exif) -> bytes | None:
    kept = Image.Exif()
    for tag, value in tags.items():
        if tag in SUB_IFDS:
            kept.get_ifd(tag).update(tags.get_ifd(tag))
        elif tag in _EXIF_OF_TIFF:
            kept[tag] = value
    return kept.tobytes() if len(kept) or any(kept.get_ifd(tag) for tag in SUB_IFDS) else None


def _upright_exif(exif: bytes) -> bytes:
    """The same bytes with the orientation set to 1: what is not touched cannot break, maker notes least of all.

    A thumbnail stays, but nothing leads to it: it shows the photo as it was, and not upright. Raises struct.error or
    what Pillow raises where the data are damaged.
    """
    parsed = Image.Exif()
    parsed.load(exif)
    parsed.tobytes()
    for tag in SUB_IFDS:
        parsed.get_ifd(tag)
    result = bytearray(_patched(exif, {_ORIENTATION: 1}))
    start, order, directory = _first_directory(exif)
    (count,) = struct.unpack_from(order + "H", exif, start + directory)
    next_directory = start + directory + 2 + 12 * count
    result[next_directory : next_directory + 4] = bytes(4)[: max(0, len(result) - next_directory)]  # there is none
    return bytes(result)


def with_size(exif: bytes | None, width: int, height: int) -> bytes | None:
    """EXIF data that gives an image's size, where it gives one: turned upright or upsampled the image has another."""
    sizes = {int(ExifTags.Base.ExifImageWidth): width, int(ExifTags.Base.ExifImageHeight): height}
    try:
        return exif and _patched(exif, sizes)
    except (struct.error, KeyError):
        return exif


def _patched(exif: bytes, values: Mapping[int, int]) -> bytes:
    """EXIF data with other values of whole numbers, in the first directory and that of EXIF, where they are there."""
    start, order, first = _first_directory(exif)
    result, directories = bytearray(exif), [first]
    for directory in directories:  # which grows by the directory of EXIF, once
        (count,) = struct.unpack_from(order + "H", exif, start + directory)
        for entry in range(start + directory + 2, start + directory + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHII", exif, entry)
            if tag == ExifTags.IFD.Exif and len(directories) == 1:
                directories.append(value)
            elif tag in values and kind == 4:
                struct.pack_into(order + "I", result, entry + 8, values[tag])
            elif tag in values and values[tag] < 1 << 16:
                struct.pack_into(order + "HIHH", result, entry + 2, 3, 1, values[tag], 0)  # one short
    return bytes(result)


def _first_directory(exif: bytes) -> tuple[int, str, int]:
    """Where offsets count from, the order of bytes as `struct` has it, and the offset of the first directory."""
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    order = {b"II": "<", b"MM": ">"}[exif[start : start + 2]]
    return start, order, *struct.unpack_from(order + "I", exif, start + 4)


def png_texts(data: bytes) -> bytes:
    """The chunks of a PNG that a restored one should have too, as they stand in the file."""
    kept, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + length
        if kind in _PNG_KEPT and end <= len(data) and b"XML:com.adobe.xmp" not in data[place + 8 : place + 32]:
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _dpi(value: Any) -> tuple[float, float] | None:
    try:
        x, y = (float(part) for part in value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if all(math.isfinite(part) and part > 0 for part in (x, y)) else None


def _dpi_of_tags(tags: Image.Exif) -> tuple[float, float] | None:
    dpi = _dpi((tags.get(282), tags.get(283)))
    centimetres = tags.get(296, 2) == 3
    return (dpi[0] * 2.54, dpi[1] * 2.54) if dpi and centimetres else dpi
