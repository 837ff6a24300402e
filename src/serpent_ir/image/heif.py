"""Boxes of HEIC, AVIF (ISO base media) and JPEG 2000: colours by number, light levels, images beside the first one.

They are read for `image/metadata.py`. Pillow and pillow-heif read the pixels, EXIF, XMP and ICC.
"""

import struct
from collections.abc import Iterator
from typing import Any

from serpent_ir.image.png import chunk

_DEPTH = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:depth", b"urn:mpeg:hevc:2015:auxid:2")
_ALPHA = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1", b"urn:mpeg:avc:2015:auxid:1")
_UUIDS = {
    bytes.fromhex("be7acfcb97a942e89c71999491e3afac"): "xmp",
    b"JpgTiffExif->JP2": "exif",
    bytes.fromhex("33c7a4d2b81d4723a0baf1a3e097ad38"): "iptc",
}


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each box at one level, and where its content begins and ends."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1 and start + 16 <= end:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            head = 16
        stop = end if size == 0 else start + size
        if (size and size < head) or stop > end:
            return
        yield kind, start + head, stop
        start = stop


def carried_by_heif(data: bytes, *, has_icc: bool) -> dict[str, Any]:
    """Entries of `Picture.carried` of a HEIC or AVIF file. Raises struct.error or IndexError if it is damaged."""
    carried: dict[str, Any] = {}
    top = {kind: (start, end) for kind, start, end in boxes(data)}
    if b"mpvd" in top:
        carried["lost_video"] = b""
    if b"sefd" in top:
        carried["trailer"] = b""
    if b"moov" in top and not has_icc:  # a sequence gives its colours in its track, and perhaps here too
        start, end = top[b"moov"]
        place = data.find(b"colrnclx", start, end)
        carried |= _numbers(data[place + 8 : place + 12]) if place > 0 else {}
    if b"meta" not in top:
        return carried
    meta = _children(data, top[b"meta"], 4)
    (primary,) = struct.unpack_from(">H" if data[meta[b"pitm"][0]] == 0 else ">I", data, meta[b"pitm"][0] + 4)
    properties = _children(data, meta[b"iprp"])
    owned = list(boxes(data, *properties[b"ipco"]))
    of_item = _associations(data, *properties[b"ipma"])
    own = [owned[i - 1] for i in of_item.get(primary, ()) if 0 < i <= len(owned)]
    if not any(kind == b"colr" for kind, _, _ in own):  # a grid may have it on its tiles
        own += [property_ for property_ in owned if property_[0] == b"colr"][:1]
    for kind, start, end in own:
        content = data[start:end]
        if kind == b"colr" and content[:4] == b"nclx" and not has_icc:
            carried |= _numbers(content[4:8])
        elif kind == b"mdcv" and len(content) >= 24:
            *xy, most, least = struct.unpack_from(">8H2I", content)
            order = [4, 5, 0, 1, 2, 3, 6, 7]  # green, blue, red here; red, green, blue in PNG
            body = struct.pack(">8H2I", *(xy[i] for i in order), most, least)
            carried["mastering"] = carried.get("mastering", b"") + chunk(b"mDCV", body)
        elif kind == b"clli" and len(content) >= 4:
            levels = (10000 * level for level in struct.unpack_from(">2H", content))  # PNG counts in 0.0001 cd/m2
            carried["mastering"] = carried.get("mastering", b"") + chunk(b"cLLI", struct.pack(">2I", *levels))
    if b"iref" in meta:
        for kind, sources in _references(data, *meta[b"iref"], primary):
            for source in sources if kind == b"auxl" else ():
                own = [owned[i - 1] for i in of_item.get(source, ()) if 0 < i <= len(owned)]
                types = [data[start + 4 : end].partition(b"\0")[0] for kind, start, end in own if kind == b"auxC"]
                if name := _auxiliary(types[0] if types else b""):
                    carried[name] = b""
    if b"iinf" in meta:
        for kind, start, _ in _items(data, *meta[b"iinf"]):
            if kind == b"infe" and data[start + 4 + (4 if data[start] < 3 else 6) :][:4] == b"tmap":
                carried["gain_map"] = b""
    return carried


def _numbers(content: bytes) -> dict[str, bytes]:
    """Primaries and transfer as the four numbers of a cICP chunk; empty if they say sRGB, or nothing."""
    primaries, transfer = struct.unpack(">HH", content)
    known = (primaries if primaries != 2 else 1, transfer if transfer != 2 else 13)  # 2: unspecified
    if known == (1, 13) or max(known) > 255:
        return {}
    return {"cicp": bytes([*known, 0, 1])}  # the matrix of RGB, over the full range


def carried_by_jp2(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `Picture` and entries of `Picture.carried` of a JPEG 2000 file, as far as Pillow does not give them."""
    fields: dict[str, Any] = {}
    carried: dict[str, Any] = {}
    for kind, start, end in boxes(data):
        if kind == b"jp2h":
            for inner, begin, stop in boxes(data, start, end):
                if inner == b"colr" and data[begin] in (2, 3):  # an ICC profile, restricted or any
                    fields["icc_profile"] = data[begin + 3 : stop]
        elif kind == b"uuid" and (name := _UUIDS.get(data[start : start + 16])):
            (carried if name == "iptc" else fields)[name] = data[start + 16 : end]
        elif kind in (b"xml ", b"jumb") or kind == b"uuid":
            carried["content_credentials" if kind == b"jumb" else "app_segments"] = b""
    return fields, carried


def _auxiliary(urn: bytes) -> str:
    if urn in _ALPHA:
        return ""
    if urn in _DEPTH or b":depth" in urn or b":disparity" in urn:
        return "depth_map"
    return "gain_map" if b"gainmap" in urn.lower() else "auxiliary"


def _children(data: bytes, place: tuple[int, int], skip: int = 0) -> dict[bytes, tuple[int, int]]:
    return {kind: (start, end) for kind, start, end in boxes(data, place[0] + skip, place[1])}


def _items(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    return boxes(data, start + 4 + (2 if data[start] == 0 else 4), end)


def _associations(data: bytes, start: int, end: int) -> dict[int, list[int]]:
    """The properties of each item, as numbers from 1 on."""
    version, wide = data[start], data[start + 3] & 1
    (count,) = struct.unpack_from(">I", data, start + 4)
    place, found = start + 8, {}
    for _ in range(count):
        (item,) = struct.unpack_from(">H" if version < 1 else ">I", data, place)
        place += 2 if version < 1 else 4
        number, place = data[place], place + 1
        size = 2 if wide else 1
        values = (int.from_bytes(data[place + size * i : place + size * (i + 1)], "big") for i in range(number))
        found[item] = [value & (0x7FFF if wide else 0x7F) for value in values]  # without the bit "essential"
        place += size * number
        if place > end:
            raise struct.error
    return found


def _references(data: bytes, start: int, end: int, item: int) -> Iterator[tuple[bytes, list[int]]]:
    """The kind and source of each reference to an item."""
    form, size = (">H", 2) if data[start] == 0 else (">I", 4)
    for kind, begin, _ in boxes(data, start + 4, end):
        (source,) = struct.unpack_from(form, data, begin)
        (count,) = struct.unpack_from(">H", data, begin + size)
        targets = struct.unpack_from(f">{count}{form[1]}", data, begin + size + 2)
        if item in targets:
            yield kind, [source]
