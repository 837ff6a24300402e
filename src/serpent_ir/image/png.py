"""Chunks of PNG files: what they carry beside the pixels. Read for `image/metadata.py`, and written again."""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serpent_ir.image.jpeg import iptc_of

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP_KEYWORD = b"XML:com.adobe.xmp"
_XMP_HEAD = _XMP_KEYWORD + bytes(5)  # keyword, then: not compressed, no language, no translated keyword
_RAW_PROFILE = b"Raw profile type "  # older ImageMagick and GIMP: a block of another format, in hexadecimal digits
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MASTERING = {b"mDCV": b"mDCV", b"cLLI": b"cLLI", b"mDCv": b"mDCV", b"cLLi": b"cLLI"}  # including the draft's names
# Chunks that are read elsewhere, or that only describe how the old file was encoded.
_CODING = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"hIST", b"sPLT", b"iDOT", b"iCCP")
_CODING += (b"eXIf",)
# Texts that would turn or size the picture a second time.
_STALE_TEXTS = (b"exif:Orientation", b"tiff:Orientation", b"exif:ExifImageWidth", b"exif:ExifImageLength")
_STALE_TEXTS += (b"exif:PixelXDimension", b"exif:PixelYDimension")
_MOST = 1 << 25  # most bytes of a text after decompression


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """The kind, content and whole bytes of each chunk of a PNG, up to where the file ends or is cut."""
    place = len(SIGNATURE)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 12 + length
        if end > len(data):
            return
        yield data[place + 4 : place + 8], data[place + 8 : end - 4], data[place:end]
        place = end
        if data[end - 8 : end - 4] == b"IEND" and not length:
            return


def carried_by_png(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a PNG carries: fields of `Picture` from "Raw profile" texts, and entries of `Picture.carried`."""
    fields: dict[str, Any] = {}
    carried: dict[str, Any] = {}
    palette, length = b"", len(SIGNATURE)

    def add(name: str, content: bytes) -> None:
        carried[name] = carried.get(name, b"") + content

    for kind, content, whole in chunks(data):
        length += len(whole)
        if kind == b"PLTE":
            palette = content
        elif kind == b"cICP" and len(content) == 4:
            carried["cicp"] = content
        elif kind in (b"gAMA", b"cHRM", b"sRGB"):
            add("gamma", whole)
        elif kind in _MASTERING:
            add("mastering", chunk(_MASTERING[kind], content))
        elif kind in _TEXTS:
            keyword = content.partition(b"\0")[0]
            if keyword.startswith(_RAW_PROFILE) and (profile := _raw_profile(kind, content)):
                _sort(keyword.removeprefix(_RAW_PROFILE), profile, fields, carried)
            elif keyword not in (_XMP_KEYWORD, *_STALE_TEXTS):
                add("png_texts", whole)
        elif kind == b"bKGD":
            if levels := _background(content, data[24], data[25], palette):
                carried["background"] = levels
        elif kind == b"tIME" and len(content) == 7:
            carried["time"] = content
        elif kind == b"pHYs":  # if it has a unit, it is `dpi`
            density = struct.unpack(">II", content[:8]) if len(content) == 9 and content[8] == 0 else (0, 0)
            if all(density) and density != (1, 1):
                carried["aspect"] = density
        elif kind == b"sBIT":
            if min(content, default=0) < (8 if data[25] == 3 else data[24]):
                carried["significant_bits"] = content
        elif kind in (b"gMAP", b"gDAT"):
            carried["gain_map"] = content
        elif kind == b"caBX":
            carried["content_credentials"] = content
        elif kind not in _CODING:
            add("png_chunks" if kind[3:].islower() else "app_segments", whole)  # a lowercase letter: safe to copy
    if data[length:].strip(b"\0"):
        carried["trailer"] = data[length:]
    return fields, carried


def _raw_profile(kind: bytes, content: bytes) -> bytes:
    """The bytes of a "Raw profile" text (a name, their number, hexadecimal digits); b"" if it is damaged."""
    _, _, text = content.partition(b"\0")
    try:
        if kind == b"iTXt":
            compressed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[2]
        else:
            compressed, text = kind == b"zTXt", text[1:] if kind == b"zTXt" else text
        if compressed:
            text = zlib.decompressobj().decompress(text, _MOST)
        _, length, digits = text.lstrip().split(None, 2)
        return bytes.fromhex("".join(digits.decode("ascii").split()))[: int(length)]
    except (IndexError, ValueError, zlib.error):
        return b""


def _sort(name: bytes, profile: bytes, fields: dict[str, Any], carried: dict[str, Any]) -> None:
    """Put the content of a "Raw profile" where it belongs."""
    _, is_xmp, packet = profile.partition(b"http://ns.adobe.com/xap/1.0/\0")
    if is_xmp or name == b"xmp":
        fields.setdefault("xmp", packet or profile)
    elif profile[:6] == b"Exif\0\0" or name == b"exif":
        fields.setdefault("exif", profile)
    elif name in (b"icc", b"icm"):
        fields.setdefault("icc_profile", profile)
    elif name in (b"iptc", b"8bim"):
        iptc, other = iptc_of(profile)
        carried |= {"iptc": iptc} if iptc else {}
        carried |= {"photoshop": other} if other else {}
    else:
        carried["app_segments"] = profile


def _background(content: bytes, depth: int, colour_type: int, palette: bytes) -> tuple[int, ...] | None:
    """The levels of a background colour, grey or RGB, in 8 bits, or in 16 if the file has 16."""
    if colour_type == 3:
        start = 3 * content[0] if content else len(palette)
        return tuple(palette[start : start + 3]) or None
    if len(content) not in (2, 6):
        return None
    levels = struct.unpack(f">{len(content) // 2}H", content)
    return tuple(level * 255 // (2**depth - 1) for level in levels) if depth < 8 else levels


def alpha_of_png(data: bytes, samples: NDArray[Any]) -> NDArray[Any] | None:
    """Alpha (H, W) from the transparent colour of a grey or RGB PNG of any depth; None if it has none.

    `samples` are grey (H, W) or RGB (H, W, 3), with 8 bits, or with 16 if the file has 16.
    """
    depth, colour_type = data[24], data[25]
    content = next((content for kind, content, _ in chunks(data) if kind == b"tRNS"), b"")
    if colour_type not in (0, 2) or len(content) < (2 if colour_type == 0 else 6):
        return None
    levels = np.array(struct.unpack(">H" if colour_type == 0 else ">3H", content[: 2 if colour_type == 0 else 6]))
    levels = levels & (2**depth - 1)
    if depth < 8:
        levels = levels * 255 // (2**depth - 1)
    hidden = (samples.reshape(*samples.shape[:2], -1) == levels.astype(samples.dtype)).all(-1)
    return np.where(hidden, 0, np.iinfo(samples.dtype).max).astype(samples.dtype)


def with_chunks(data: bytes, *, icc: bytes | None, exif: bytes | None, xmp: bytes | None, **about: Any) -> bytes:
    """A PNG with its metadata inserted after the header.

    `about` are the entries of `Picture.carried` that PNG keeps, `dpi`, and whether it `is_grey`.
    """
    made = [chunk(b"cICP", about["cicp"])] if "cicp" in about else []
    made += [about.get("gamma", b""), about.get("mastering", b"")]
    if icc:
        made.append(chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
    if dpi := about.get("dpi"):
        per_metre = (min(round(value / 0.0254), 2**31 - 1) for value in dpi)
        made.append(chunk(b"pHYs", struct.pack(">IIB", *per_metre, 1)))
    elif aspect := about.get("aspect"):
        made.append(chunk(b"pHYs", struct.pack(">IIB", *aspect, 0)))
    if background := about.get("background"):
        levels = background[:1] if about["is_grey"] else background if len(background) == 3 else background * 3
        made.append(chunk(b"bKGD", struct.pack(f">{len(levels)}H", *levels)))
    if "time" in about:
        made.append(chunk(b"tIME", about["time"]))
    if exif:
        made.append(chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
    if xmp:
        made.append(chunk(b"iTXt", _XMP_HEAD + xmp))
    if iptc := about.get("iptc"):
        text = b"\niptc\n%8d\n%s\n" % (len(iptc), iptc.hex().encode())
        made.append(chunk(b"zTXt", _RAW_PROFILE + b"iptc\0\0" + zlib.compress(text)))
    if comment := about.get("comment"):
        made.append(chunk(b"iTXt", b"Comment" + bytes(5) + _utf8(comment)))
    made += [about.get("png_texts", b""), about.get("png_chunks", b"")]
    end_of_header = 33  # signature and IHDR
    return b"".join([data[:end_of_header], *made, data[end_of_header:]])


def _utf8(text: bytes) -> bytes:
    """A comment as UTF-8. If it is not UTF-8 yet, it is taken for Latin-1, in which every byte is a character."""
    try:
        return text.decode().encode()
    except UnicodeDecodeError:
        return text.decode("latin-1").encode()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
