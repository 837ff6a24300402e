"""JPEG XL through pillow-jxl-plugin, if it is installed. This module reads what the plugin does not tell of a file.

Source: ISO/IEC 18181-1 (the codestream's header) and 18181-2 (boxes).
"""

import importlib.util
import struct
from collections.abc import Iterator

INSTALLED = importlib.util.find_spec("pillow_jxl") is not None
_BARE, _CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"


def is_jxl(start: bytes) -> bool:
    """Whether a file that begins with these bytes is JPEG XL."""
    return start.startswith((_BARE, _CONTAINER))


def register() -> None:
    """Let Pillow read and write JPEG XL. The plugin registers itself for the whole process and has no other way."""
    if INSTALLED:
        importlib.import_module("pillow_jxl")


def xmp_of(data: bytes) -> bytes | None:
    """The XMP packet of a file; None if it is compressed."""
    return next((content for kind, content in _boxes(data) if kind == b"xml "), None)


def bits_of(data: bytes) -> int:
    """Bits per sample, from the header of the codestream."""
    stream = data
    if data.startswith(_CONTAINER):
        parts = ((kind, content) for kind, content in _boxes(data) if kind in (b"jxlc", b"jxlp"))
        kind, stream = next(parts, (b"", b""))
        stream = stream[4:] if kind == b"jxlp" else stream
    number, place = int.from_bytes(stream[2:64], "little"), 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return number >> (place - count) & ((1 << count) - 1)

    def size() -> None:
        eighths = take(1)
        take(5 if eighths else (9, 13, 18, 30)[take(2)])
        if take(3) == 0:
            take(5 if eighths else (9, 13, 18, 30)[take(2)])

    size()
    if take(1):  # everything has its default
        return 8
    if take(1):  # more fields
        take(3)  # orientation
        if take(1):
            size()
        if take(2):  # a preview or an animation, whose headers are not parsed here
            return 8
    if take(1):
        return 32  # floats
    choice = take(2)
    return (8, 10, 12)[choice] if choice < 3 else 1 + take(6)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 0
    while place + 8 <= len(data) and data.startswith(_CONTAINER):
        length, kind = struct.unpack_from(">I4s", data, place)
        start = 8
        if length == 1 and place + 16 <= len(data):
            length, start = struct.unpack_from(">Q", data, place + 8)[0], 16
        end = place + length if length >= start else len(data)
        yield kind, data[place + start : end]
        place = end
