"""Segments of JPEG files, and what follows the image. Read for `image/metadata.py`, and written again."""

import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_EXTENDED = b"http://ns.adobe.com/xmp/extension/\0"
_PHOTOSHOP, _IPTC = b"Photoshop 3.0\0", 0x0404
# Photoshop's resources that are dropped without a word: resolution, thumbnails, digests, the state of its windows.
_STALE_RESOURCES = (0x03ED, 0x0409, 0x040C, 0x0422, 0x0423, 0x0424, 0x0425, 0x0428, 0x03F3, 0x0414, 0x041E, 0x0421)
_STALE_RESOURCES += (0x0408, 0x040D, 0x0419, 0x041A, 0x0426, 0x043A, 0x043B, 0x0411, 0x0406)
# Segments that are read elsewhere, or that only describe how the old file was encoded.
_CODING = (b"JFIF", b"JFXX", b"AVI1", b"Adobe", b"Ducky", b"ICC_PROFILE\0", b"MPF\0", b"urn:iso:std:iso:ts:21496:-1\0")
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # in entropy-coded data: neither a stuffed zero nor a restart
_IS_MARKER = np.array([_MARKER.match(bytes([0xFF, code])) is not None for code in range(256)])
_NEAR, _FAR = 64, 1 << 20  # bytes in which a marker is looked for at a time: the next segment, and the image's own data
_EOI, _SOS = 0xD9, 0xDA
_SEGMENT = 65533  # bytes that a segment holds
_GAIN_MAP = re.compile(rb"urn:iso:std:iso:ts:21496|hdrgm:|hdrgainmap|HDRGainMap")
_DEPTH_MAP = re.compile(rb"aux:depth|aux:disparity|aux:portraiteffectsmatte|aux:semantic|depthData|GDepth:")


def segments(data: bytes) -> tuple[list[tuple[int, bytes]], int]:
    """The marker and content of each segment of a JPEG, and where the image ends, after its last marker."""
    found, place = [], 2
    while place := _after_marker(data, place):
        marker = data[place - 1]
        if marker == _EOI:
            return found, place
        if marker in (0x01, 0xD8) or place + 2 > len(data):
            continue
        length = int.from_bytes(data[place : place + 2], "big")
        found.append((marker, data[place + 2 : place + length]))
        place += max(2, length)
    return found, len(data)


def _after_marker(data: bytes, place: int) -> int:
    """Where the next marker ends; 0 if there is none."""
    if match := _MARKER.search(data, place, place + _NEAR):
        return match.end()
    codes = np.frombuffer(data, np.uint8)  # which finds it in a tenth of the time, and lets other threads go on
    for start in range(place, len(data), _FAR):
        here = codes[start : start + _FAR + 1]
        begins = np.flatnonzero(here[:-1] == 0xFF)
        markers = begins[_IS_MARKER[here[begins + 1]]]
        if len(markers):
            return start + int(markers[0]) + 2
    return 0


def carried_by_jpeg(found: list[tuple[int, bytes]]) -> dict[str, Any]:
    """Entries of `Picture.carried` from a JPEG's segments. `after_the_image` handles what follows the image."""
    carried: dict[str, Any] = {}
    extended: dict[bytes, list[tuple[int, int, bytes]]] = {}  # by GUID: total length, offset, part
    photoshop = b""
    for marker, content in found:
        if marker == 0xFE:
            comment = content.rstrip(b"\0")
            carried["comment"] = b"\n".join(filter(None, (carried.get("comment"), comment)))
        elif marker == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 12 and content[7] == 0:
            density = struct.unpack_from(">HH", content, 8)
            if all(density) and density != (1, 1):
                carried["aspect"] = density
        elif content.startswith(_EXTENDED) and len(content) >= 75:
            length, place = struct.unpack_from(">II", content, 67)
            extended.setdefault(content[35:67], []).append((length, place, content[75:]))
        elif marker == 0xED and content.startswith(_PHOTOSHOP):
            photoshop += content.removeprefix(_PHOTOSHOP)
        elif marker == 0xEB and content.startswith(b"JP"):
            carried["content_credentials"] = b""
        elif marker == 0xE1 and content.startswith(b"FLIR\0"):
            carried["thermal"] = b""
        elif 0xE0 <= marker <= 0xEF and not content.startswith((EXIF, XMP, *_CODING)) and content.strip(b"\0"):
            carried["app_segments"] = b""
        if content.startswith(b"urn:iso:std:iso:ts:21496:-1\0"):
            carried["gain_map"] = b""
    iptc, other = iptc_of(photoshop)
    carried |= {"iptc": iptc} if iptc else {}
    carried |= {"photoshop": other} if other else {}
    for guid, parts in extended.items():
        packet = b"".join(part for _, _, part in sorted(parts))
        if len(packet) == parts[0][0]:
            carried["extended_xmp"] = (guid, packet)
    return {name: content for name, content in carried.items() if name != "comment" or content}


def iptc_of(resources: bytes) -> tuple[bytes, bytes]:
    """Captions as IPTC (IIM), and whatever else matters, from Photoshop's resources or from IIM alone."""
    resources = resources.removeprefix(_PHOTOSHOP)
    if resources[:1] == b"\x1c":
        return resources, b""
    iptc, other, place = b"", b"", 0
    while resources[place : place + 4] == b"8BIM" and place + 12 <= len(resources):
        (kind,) = struct.unpack_from(">H", resources, place + 4)
        start = place + 6 + (resources[place + 6] + 2) // 2 * 2  # after a name, which is preceded by its length
        if start + 4 > len(resources):
            break
        size = int.from_bytes(resources[start : start + 4], "big")
        content = resources[start + 4 : start + 4 + size]
        if kind == _IPTC:
            iptc += content
        elif kind not in _STALE_RESOURCES:
            other += content
        place = start + 4 + (size + 1) // 2 * 2
    return iptc, other


def after_the_image(data: bytes, end: int, video: int | None) -> tuple[dict[str, Any], int]:
    """Entries of `Picture.carried` for what follows the image, and where the video of a motion photo begins (0: none).

    `video` is where the XMP data says that the video begins. The video is kept with everything that follows it. Before
    it the blocks of Samsung's trailer are kept, because their directory counts backwards from the end of the file.
    """
    tail = _samsung_start(data, end)
    if video is None or video < end or data[video + 4 : video + 8] != b"ftyp":
        video = _video_start(data, end)
    carried: dict[str, Any] = {}
    start = len(data)
    if video:
        start = min(video, tail or video)
        carried["motion_video"] = data[start:]
    elif tail:
        start = tail
        carried["samsung_trailer"] = data[start:]
    dropped = data[end:start]
    if b"\xff\xd8\xff" in dropped:
        kinds = {"gain_map": _GAIN_MAP, "depth_map": _DEPTH_MAP}
        named = {name: b"" for name, pattern in kinds.items() if pattern.search(dropped)}
        carried |= named or {"further_images": b""}
    elif dropped.strip(b"\0\xff\r\n "):
        carried["trailer"] = b""
    return carried, video


def _video_start(data: bytes, end: int) -> int:
    """Where an MP4 begins after the image, found by its first box; 0 if there is none."""
    place = data.find(b"ftyp", end)
    while place >= 0:
        if place - 4 >= end and 16 <= int.from_bytes(data[place - 4 : place], "big") <= 256:
            return place - 4
        place = data.find(b"ftyp", place + 4)
    return 0


def _samsung_start(data: bytes, end: int) -> int:
    """Where the blocks of Samsung's trailer begin (SEFH, their directory, SEFT); 0 if there is none."""
    if data[-4:] != b"SEFT" or len(data) < 20:
        return 0
    directory = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if directory < end or data[directory : directory + 4] != b"SEFH":
        return 0
    (count,) = struct.unpack_from("<I", data, directory + 8)
    entries = range(directory + 12, min(directory + 12 + 12 * count, len(data) - 8), 12)
    farthest = max((struct.unpack_from("<I", data, entry + 4)[0] for entry in entries), default=0)
    return max(end, directory - farthest)


def with_segments(data: bytes, about: Mapping[str, Any]) -> bytes:
    """A JPEG that Pillow wrote, plus those entries of `Picture.carried` that JPEG keeps and Pillow does not write."""
    extra = []
    if iptc := about.get("iptc"):
        block = b"8BIM" + struct.pack(">HHI", _IPTC, 0, len(iptc)) + iptc + bytes(len(iptc) % 2)
        extra += [(0xED, _PHOTOSHOP + part) for part in _parts(block, _SEGMENT - len(_PHOTOSHOP))]
    if "extended_xmp" in about:
        guid, packet = about["extended_xmp"]
        place = 0
        for part in _parts(packet, 65400):
            extra.append((0xE1, _EXTENDED + guid + struct.pack(">II", len(packet), place) + part))
            place += len(part)
    extra += [(0xFE, part) for part in _parts(about.get("comment", b""), _SEGMENT)]
    made = bytearray(data)
    if (aspect := about.get("aspect")) and data[6:11] == b"JFIF\0":
        x, y = (side // math.gcd(*aspect) for side in aspect)
        shrink = max(1, -(-max(x, y) // 65535))
        struct.pack_into(">BHH", made, 13, 0, max(1, x // shrink), max(1, y // shrink))
    place = 2
    while made[place] == 0xFF and 0xE0 <= made[place + 1] <= 0xEF:  # after the segments that must come first
        place += 2 + int.from_bytes(made[place + 2 : place + 4], "big")
    made[place:place] = b"".join(struct.pack(">BBH", 0xFF, kind, len(part) + 2) + part for kind, part in extra)
    return bytes(made) + about.get("motion_video", b"") + about.get("samsung_trailer", b"")


def _parts(content: bytes, most: int) -> Iterator[bytes]:
    return (content[start : start + most] for start in range(0, len(content), most))
