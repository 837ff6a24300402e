"""What EXIF data say in pixels of the image: where its subject is, and pixels per length on the sensor.

When an image is turned upright or enlarged, these are rewritten in place, so that nothing else moves. Both need the
image's size in the same data (ExifImageWidth and ExifImageHeight), which cameras write.
"""

import struct
from contextlib import suppress

from PIL import ExifTags

_WIDTH, _HEIGHT = int(ExifTags.Base.ExifImageWidth), int(ExifTags.Base.ExifImageHeight)
_SUBJECTS = 0x9214, 0xA214  # SubjectArea: a point, a circle's diameter or a box's size behind it; SubjectLocation
_PER_LENGTH = int(ExifTags.Base.FocalPlaneXResolution), int(ExifTags.Base.FocalPlaneYResolution)
_SHORT, _LONG, _RATIONAL = 3, 4, 5
_SIZES = {_SHORT: "H", _LONG: "I", _RATIONAL: "II"}
ALIKE = 0.02
"""By how much two scales may differ. With more the data give the size of another image."""


def first_directory(exif: bytes) -> tuple[int, str, int]:
    """Where offsets count from, the byte order in `struct`'s notation, and the offset of the first directory."""
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    order = {b"II": "<", b"MM": ">"}[exif[start : start + 2]]
    return start, order, *struct.unpack_from(order + "I", exif, start + 4)


def turned(exif: bytes, orientation: int) -> bytes:
    """The data for the upright image. Before, they are for the image as it is stored, with this EXIF orientation."""
    found = _found(exif)
    size = _size(exif, found)
    if orientation not in range(2, 9) or not size:
        return exif
    result = bytearray(exif)
    for tag in _SUBJECTS:
        if tag in found:
            x, y, *extent = _read(exif, found[tag])
            extent = extent[::-1] if orientation > 4 else extent
            _write(result, found[tag], *_upright(x, y, *size, orientation), *extent)
    for one, other in ((_WIDTH, _HEIGHT), _PER_LENGTH) if orientation > 4 else ():
        if one in found and other in found:
            values = [_read(exif, found[tag]) for tag in (other, one)]
            for tag, value in zip((one, other), values, strict=True):
                _write(result, found[tag], *value)
    return bytes(result)


def scaled(exif: bytes, width: int, height: int) -> bytes:
    """The data for an upright image of this size."""
    found = _found(exif)
    size = _size(exif, found)
    if not size or size == (width, height):
        return exif
    scales = width / size[0], height / size[1]
    if abs(scales[0] / scales[1] - 1) > ALIKE:
        return exif
    result = bytearray(exif)
    for tag in _SUBJECTS:
        if tag in found:
            values = _read(exif, found[tag])
            larger = (min(round(value * scales[i % 2]), 2**16 - 1) for i, value in enumerate(values))
            _write(result, found[tag], *larger)
    for tag, scale in zip(_PER_LENGTH, scales, strict=True):
        if tag in found:
            above, below = _read(exif, found[tag])
            more = round(above * scale)
            value = (more, below) if more < 1 << 32 else (above, max(1, round(below / scale)))
            _write(result, found[tag], *value)
    return bytes(result)


def _found(exif: bytes) -> dict[int, tuple[str, int]]:
    """The tags that are there and whole, as `struct`'s format and where the values stand."""
    found, directories = {}, []
    with suppress(struct.error, KeyError):
        start, order, first = first_directory(exif)
        directories.append(first)
        for directory in directories:  # the loop adds the EXIF directory to this list, once
            (entries,) = struct.unpack_from(order + "H", exif, start + directory)
            for entry in range(start + directory + 2, start + directory + 2 + 12 * entries, 12):
                tag, kind, count, value = struct.unpack_from(order + "HHII", exif, entry)
                if tag == ExifTags.IFD.Exif and len(directories) == 1:
                    directories.append(value)
                single = tag in (_WIDTH, _HEIGHT) and kind in (_SHORT, _LONG) and count == 1
                single |= tag in _PER_LENGTH and kind == _RATIONAL and count == 1
                if single or (tag in _SUBJECTS and kind == _SHORT and 2 <= count <= 4):
                    form = order + _SIZES[kind] * count
                    place = entry + 8 if struct.calcsize(form) <= 4 else start + value
                    if place + struct.calcsize(form) <= len(exif):
                        found[tag] = form, place
    return found


def _read(exif: bytes, place: tuple[str, int]) -> tuple[int, ...]:
    return struct.unpack_from(place[0], exif, place[1])


def _write(exif: bytearray, place: tuple[str, int], *values: int) -> None:
    struct.pack_into(place[0], exif, place[1], *values)


def _size(exif: bytes, found: dict[int, tuple[str, int]]) -> tuple[int, int] | None:
    if _WIDTH not in found or _HEIGHT not in found:
        return None
    (width,), (height,) = (_read(exif, found[tag]) for tag in (_WIDTH, _HEIGHT))
    return (width, height) if width and height else None


def _upright(x: int, y: int, width: int, height: int, orientation: int) -> tuple[int, int]:
    """Where a pixel of the stored image is in the upright one."""
    right, below = max(0, width - 1 - x), max(0, height - 1 - y)
    return {
        2: (right, y),
        3: (right, below),
        4: (x, below),
        5: (y, x),
        6: (below, x),
        7: (below, right),
        8: (y, right),
    }[orientation]
