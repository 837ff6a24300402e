"""What an image file says beside its pixels: EXIF, ICC profile, XMP, resolution. Read for `image/decoders.py`.

`image_carriers.CARRIERS` lists everything that is looked for. Nothing here raises for damaged metadata, because that
must not cost the image. A note says what is left out.
"""

import math
import struct
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, BinaryIO

from PIL import ExifTags, Image

from serpent_ir.image import exif_pixels
from serpent_ir.image import xmp as image_xmp
from serpent_ir.image.carriers import kept_by_none
from serpent_ir.image.exif_pixels import first_directory
from serpent_ir.image.heif import carried_by_heif, carried_by_jp2
from serpent_ir.image.jpeg import after_the_image, carried_by_jpeg, iptc_of, segments
from serpent_ir.image.jxl import xmp_of
from serpent_ir.image.png import SIGNATURE, carried_by_png
from serpent_ir.image.tiff_descriptions import kind_of

EXIF_IFD, INTEROP_IFD = ExifTags.IFD.Exif, ExifTags.IFD.Interop
SUB_IFDS = (EXIF_IFD, ExifTags.IFD.GPSInfo)
XMP_TAG = 700
_ORIENTATION = ExifTags.Base.Orientation
# The TIFF tags that describe the scene: description, make, model, software, date and time, artist, copyright, rating,
# and Windows' title, comment, author, keywords and subject. The others describe how that one file is laid out.
RATINGS, XP = (18246, 18249), tuple(range(40091, 40096))
_EXIF_OF_TIFF = (270, 271, 272, 305, 306, 315, 33432, *RATINGS, *XP)
IPTC_TAG, _PHOTOSHOP_TAGS = 33723, (34377, 37724)
_JPEG = b"\xff\xd8"
_WEBP_KNOWN = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"XMP ")


def metadata_of(
    image: Image.Image | None, file: BinaryIO, notes: list[str], lost: list[str]
) -> tuple[dict[str, Any], int]:
    """`Picture`'s metadata for an upright image, and the EXIF orientation that makes the pixels upright.

    `image` is what Pillow opened; None for a TIFF that Pillow cannot open, which is read from `file`. `lost` receives
    what the user should know about metadata that is left out, `notes` what changes how the pixels are seen.
    """
    exif, orientation, xmp, icc, dpi = None, 1, None, None, None
    fields: dict[str, Any] = {}
    carried: dict[str, Any] = {}
    file.seek(0)
    is_tiff = image is None or image.format == "TIFF"
    data = b"" if is_tiff else file.read()
    parts, end = segments(data) if data.startswith(_JPEG) else ([], 0)
    try:
        if image is None:
            tags = Image.Exif()
            tags.load_from_fp(file)
            icc, dpi = tags.get(34675), _dpi_of_tags(tags)
        else:
            fields, carried = _carried(image, data, parts)
            # The profile of a space that is converted away, such as CMYK, would be wrong for the RGB pixels.
            icc = image.info.get("icc_profile") or fields.get("icc_profile")
            icc = None if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else icc
            xmp, dpi = image.info.get("xmp") or fields.get("xmp"), _dpi(image.info.get("dpi"))
            tags = image.getexif()
        if is_tiff:
            carried |= _carried_by_tiff(tags)
            exif, xmp = _exif_of_tiff(tags), tags.get(XMP_TAG)
            dpi = dpi if ExifTags.Base.XResolution in tags else None  # Pillow makes up 1 px per inch
        elif image is not None and (exif := image.info.get("exif") or fields.get("exif")):
            tags = Image.Exif()
            tags.load(exif)
            exif = _upright_exif(exif)
        orientation = tags.get(_ORIENTATION) or image_xmp.orientation(xmp)
        if image is not None and image.format == "JXL" and not getattr(image, "jpeg", False):
            orientation = 1  # its decoder has applied the codestream's orientation; that of EXIF does not count
        exif = exif and exif_pixels.turned(exif, orientation)
    except MemoryError:
        raise
    except Exception:  # Pillow raises all kinds of exceptions for damaged tags
        notes.append("its EXIF data is damaged and left out")  # including the orientation
        exif = None
    xmp, gone = _tidy_xmp(xmp, data, end, carried, turned=orientation in range(2, 9))
    if "damaged_xmp" in gone:
        lost.append("its XMP data is damaged and left out")
    if told := kept_by_none({*carried, *gone}):
        lost.append(f"has {', '.join(told)}; left out")
    dpi = None if "aspect" in carried else dpi  # Pillow would make up a resolution
    if orientation in (5, 6, 7, 8):
        dpi = dpi and dpi[::-1]
        carried |= {"aspect": carried["aspect"][::-1]} if "aspect" in carried else {}
    carried = {name: what for name, what in carried.items() if name not in gone and not kept_by_none([name])}
    return {"icc_profile": icc or None, "exif": exif, "xmp": xmp, "dpi": dpi, "carried": carried}, orientation


def _carried(image: Image.Image, data: bytes, parts: list[tuple[int, bytes]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `Picture` and entries of `Picture.carried` that Pillow does not give. A damaged part gives nothing."""
    try:
        if data.startswith(SIGNATURE):
            return carried_by_png(data)
        if data.startswith(_JPEG):
            return {}, carried_by_jpeg(parts)
        if data[4:8] == b"ftyp":
            return {}, carried_by_heif(data, has_icc=bool(image.info.get("icc_profile")))
        if image.format == "JXL":
            return {"xmp": xmp_of(data)}, {}
        if data[:4] == b"RIFF":
            return {}, _carried_by_webp(data)
        if data[4:8] == b"jP  ":
            return carried_by_jp2(data)
        if data[:2] == b"BM" and data[70:74] == b"DEBM":  # "MBED": the file embeds a profile (from version 5 on)
            place, size = struct.unpack_from("<II", data, 126)
            return {"icc_profile": data[14 + place :][:size]}, {}
    except (struct.error, IndexError, KeyError, ValueError):
        return {}, {}
    comment = image.info.get("comment")
    return {}, {"comment": comment} if isinstance(comment, bytes) and comment else {}


def _after_the_image(data: bytes, end: int, xmp: bytes | None) -> tuple[dict[str, Any], int]:
    try:
        return after_the_image(data, end, image_xmp.video_start(xmp, len(data)) if xmp else None)
    except (struct.error, IndexError):  # Samsung's directory is damaged
        return {"trailer": b""}, 0


def _carried_by_webp(data: bytes) -> dict[str, Any]:
    carried, place = {}, 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind not in _WEBP_KNOWN:
            carried["content_credentials" if kind == b"C2PA" else "app_segments"] = b""
        place += 8 + size + size % 2
    return carried


def _carried_by_tiff(tags: Image.Exif) -> dict[str, Any]:
    """Entries of `Picture.carried` from the tags of a TIFF."""
    carried: dict[str, Any] = {}
    iptc = _bytes_of(tags.get(IPTC_TAG), tags.endian)
    other, layers = (_bytes_of(tags.get(tag), tags.endian) for tag in _PHOTOSHOP_TAGS)
    within, other = iptc_of(other)
    if iptc := iptc or within:
        carried["iptc"] = iptc
    if other or layers:
        carried["photoshop"] = b""
    density = _dpi((tags.get(282), tags.get(283)))
    if tags.get(296) == 1 and density not in (None, (1, 1)):
        x, y = (Fraction(side).limit_denominator(1000) for side in density or ())
        carried["aspect"] = (x.numerator * y.denominator, y.numerator * x.denominator)
    return carried


def _bytes_of(value: Any, order: str | None) -> bytes:
    """The bytes of a tag, which some programs write as 32-bit numbers."""
    if isinstance(value, bytes):
        return value
    value = (value,) if isinstance(value, int) else value
    if not isinstance(value, tuple) or not all(isinstance(part, int) for part in value):
        return b""
    return bytes(value) if max(value) < 256 else struct.pack(f"{order or '<'}{len(value)}I", *value)


def _tidy_xmp(
    xmp: Any, data: bytes, end: int, carried: dict[str, Any], *, turned: bool
) -> tuple[bytes | None, set[str]]:
    """XMP data that says the picture is upright and claims nothing that is gone; and the carriers it claimed.

    What follows a JPEG's image is looked for here, since the XMP data says where it is. It goes into `carried`.
    """
    gone: set[str] = set()
    xmp = image_xmp.upright(xmp) if isinstance(xmp, bytes) else None
    video = gap = 0
    if data.startswith(_JPEG):
        found, start = _after_the_image(data, end, xmp)
        carried |= found
        video = len(data) - start if start else 0
        gap = len(found.get("motion_video", b"")) - video if video else 0
    if "extended_xmp" in carried:
        _, claims = image_xmp.without_claims(carried["extended_xmp"][1], ())
        if claims or xmp is None or carried["extended_xmp"][0] not in xmp:
            del carried["extended_xmp"]
            gone |= claims | {"further_xmp"}
    if xmp is None:
        return None, gone
    kept = {"motion_video", "extended_xmp"} & set(carried)
    xmp, claimed = image_xmp.without_claims(xmp, kept, video=video, gap=gap, turned=turned)
    gone |= {"lost_video" if name == "motion_video" else name for name in claimed}
    return xmp, gone


def interop_of(tags: Image.Exif) -> dict[int, Any]:
    """The directory within the EXIF directory that says Adobe RGB if no profile does; empty if there is none."""
    try:
        return dict(tags.get_ifd(INTEROP_IFD))
    except KeyError:  # what Pillow raises if the EXIF directory has none
        return {}


def _exif_of_tiff(tags: Image.Exif) -> bytes | None:
    kept = Image.Exif()
    for tag, value in tags.items():
        if tag in SUB_IFDS:
            kept.get_ifd(tag).update(tags.get_ifd(tag))
            if tag == EXIF_IFD and (within := interop_of(tags)):
                kept.get_ifd(tag)[INTEROP_IFD] = within
        elif tag in _EXIF_OF_TIFF and not (tag == 270 and kind_of(str(value).encode())):
            kept[tag] = value
    return kept.tobytes() if len(kept) or any(kept.get_ifd(tag) for tag in SUB_IFDS) else None


def _upright_exif(exif: bytes) -> bytes:
    """The same bytes with the orientation set to 1. Nothing else is touched, so nothing else, such as maker notes,
    breaks.

    A thumbnail stays in the data, but nothing points to it any more: it shows the photo as it was, and not upright.
    Raises struct.error, or what Pillow raises, if the data are damaged.
    """
    parsed = Image.Exif()
    parsed.load(exif)
    parsed.tobytes()
    for tag in SUB_IFDS:
        parsed.get_ifd(tag)
    result = bytearray(_patched(exif, {_ORIENTATION: 1}))
    start, order, directory = first_directory(exif)
    (count,) = struct.unpack_from(order + "H", exif, start + directory)
    next_directory = start + directory + 2 + 12 * count
    result[next_directory : next_directory + 4] = bytes(4)[: max(0, len(result) - next_directory)]  # no next directory
    return bytes(result)


def with_size(exif: bytes | None, width: int, height: int) -> bytes | None:
    """EXIF data with this image size, if it gives a size. An image that was turned or upsampled has another size."""
    sizes = {int(ExifTags.Base.ExifImageWidth): width, int(ExifTags.Base.ExifImageHeight): height}
    try:
        return exif and _patched(exif_pixels.scaled(exif, width, height), sizes)
    except (struct.error, KeyError):
        return exif


def with_resolution(exif: bytes | None, dpi: tuple[float, float]) -> bytes:
    """EXIF data with this resolution. The first directory is rewritten at the end; everything else stays in place.

    Raises struct.error or KeyError if the data are damaged.
    """
    exif = exif or b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6)
    start, order, directory = first_directory(exif)
    (count,) = struct.unpack_from(order + "H", exif, start + directory)
    begin = start + directory + 2
    entries = [exif[place : place + 12] for place in range(begin, begin + 12 * count, 12)]
    entries = [entry for entry in entries if struct.unpack(order + "H", entry[:2])[0] not in (282, 283, 296)]
    exif += bytes(len(exif) % 2)
    values = len(exif) - start
    for index, value in enumerate(dpi):
        exif += struct.pack(order + "II", min(round(value * 1000), 2**32 - 1), 1000)
        entries.append(struct.pack(order + "HHII", 282 + index, 5, 1, values + 8 * index))
    entries.append(struct.pack(order + "HHIHH", 296, 3, 1, 2, 0))
    entries.sort(key=lambda entry: struct.unpack(order + "H", entry[:2]))
    made = bytearray(exif)
    struct.pack_into(order + "I", made, start + 4, len(exif) - start)
    return bytes(made) + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)


def _patched(exif: bytes, values: Mapping[int, int]) -> bytes:
    """EXIF data with other integer values for tags that are present in the first directory or in EXIF's own."""
    start, order, first = first_directory(exif)
    result, directories = bytearray(exif), [first]
    for directory in directories:  # the loop adds the EXIF directory to this list, once
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


def _dpi(value: Any) -> tuple[float, float] | None:
    try:
        x, y = (float(part) for part in value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if all(math.isfinite(part) and part > 0 for part in (x, y)) else None


def _dpi_of_tags(tags: Image.Exif) -> tuple[float, float] | None:
    dpi = _dpi((tags.get(282), tags.get(283))) if tags.get(296) != 1 else None
    centimetres = tags.get(296, 2) == 3
    return (dpi[0] * 2.54, dpi[1] * 2.54) if dpi and centimetres else dpi
