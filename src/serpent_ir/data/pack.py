"""Packed sets of images: one file of 8-bit pixels that is mapped into memory, with a manifest to check it.

A file is a line that names the format; then the pixels (H, W, 3) of one image after the other; a manifest in JSON
(name, height, width and SHA-256 of each image); and a footer: the manifest's SHA-256, its length, and a mark. The
footer comes last, so a file that was cut short has none.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from serpent_ir.errors import ImageError, SerpentError
from serpent_ir.image.decoders import reason

SUFFIX = ".serpent"
"""The suffix of a packed set's name."""
KIND = b"serpent-pack "
HEADER = KIND + b"1\n"
_FOOTER = struct.Struct("<32sQ8s")
_MARK = b"pack-end"
_AGAIN = "copy it or pack it again"


@dataclass(frozen=True)
class Record:
    """What a manifest says about an image."""

    name: str  # path below the packed folder, with slashes
    height: int
    width: int
    sha256: str  # of its pixels, in hexadecimal digits

    @property
    def size(self) -> int:
        """Bytes of its pixels."""
        return 3 * self.height * self.width


def footer_of(records: list[Record]) -> bytes:
    """What follows the pixels in a file."""
    manifest = json.dumps({"images": [vars(record) for record in records]}, separators=(",", ":")).encode()
    return manifest + _FOOTER.pack(hashlib.sha256(manifest).digest(), len(manifest), _MARK)


class Pack:
    """A packed set that is open for reading: `records`, and pixels that are read from disk when they are used.

    Raises ImageError if there is no such file, if it is another kind of file or format, if it is cut short, or if its
    manifest is damaged. Damaged pixels are found when an image is first used, or by `check`.
    """

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        try:
            with path.open("rb") as file:
                self.records = self._read_manifest(file)
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except OSError as error:
            raise ImageError(f"{path}: cannot be read: {reason(error)}") from None
        ends = np.cumsum([record.size for record in self.records]) + len(HEADER)
        self._starts = [len(HEADER), *ends.tolist()]
        self._known_whole = bytearray(len(self.records))

    def __reduce__(self) -> tuple[type["Pack"], tuple[Path]]:
        """A copy maps the file again. Pickled or copied as an array it would be as large as the file."""
        return Pack, (self.path,)

    def __len__(self) -> int:
        return len(self.records)

    def images(self) -> "list[PackedImage]":
        return [PackedImage(self, index) for index in range(len(self))]

    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 of an image, not compared with its hash.

        A part of the mapped file; must not be written to.
        """
        record = self.records[index]
        return self._bytes[self._starts[index] : self._starts[index + 1]].reshape(record.height, record.width, 3)

    def check(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compare all pixels with the manifest. `progress` is called with (images done, all images).

        Raises SerpentError, which names the first damaged image.
        """
        damaged: list[str] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, whole in enumerate(pool.map(self.is_whole, range(len(self)))):
                damaged += [] if whole else [self.records[index].name]
                progress(index + 1, len(self))
        if damaged:
            raise SerpentError(
                f"{self.path}: {len(damaged)} of {len(self)} images are damaged, {damaged[0]} the first; {_AGAIN}"
            )

    def is_whole(self, index: int) -> bool:
        """Whether the pixels of an image are those that were packed."""
        whole = hashlib.sha256(self.pixels(index).data).hexdigest() == self.records[index].sha256
        self._known_whole[index] = whole
        return whole

    def was_whole(self, index: int) -> bool:
        """The same, but an image that was once found whole is not compared again."""
        return bool(self._known_whole[index]) or self.is_whole(index)

    def _read_manifest(self, file: BinaryIO) -> list[Record]:
        size = os.fstat(file.fileno()).st_size
        header = file.read(len(HEADER))
        if not header.startswith(KIND[: len(header)]) or not header:
            raise ImageError(f"{self.path}: is no packed set of images; make one with `serpent data pack`")
        if len(header) == len(HEADER) and header != HEADER:
            raise ImageError(f"{self.path}: is of another format than this program reads (1); pack the images again")
        if size < len(HEADER) + _FOOTER.size:
            raise ImageError(f"{self.path}: is cut short; {_AGAIN}")
        file.seek(size - _FOOTER.size)
        digest, length, mark = _FOOTER.unpack(file.read(_FOOTER.size))
        if mark != _MARK:
            raise ImageError(f"{self.path}: is cut short, or its last bytes are damaged; {_AGAIN}")
        start = size - _FOOTER.size - length
        if start >= len(HEADER):
            file.seek(start)
            manifest = file.read(length)
            if hashlib.sha256(manifest).digest() == digest:
                return self._parse(manifest, start - len(HEADER))
        raise ImageError(f"{self.path}: its manifest is damaged; {_AGAIN}")

    def _parse(self, manifest: bytes, size: int) -> list[Record]:
        """The manifest's records. `size` is the number of bytes of pixels in the file."""
        try:
            records = [_record(item) for item in json.loads(manifest)["images"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ImageError(f"{self.path}: its manifest is not one of this format; pack the images again") from None
        told = sum(record.size for record in records)
        if told != size or not records:
            raise ImageError(f"{self.path}: holds {size} bytes of pixels where its manifest tells of {told}; {_AGAIN}")
        return records


def _record(item: dict[str, Any]) -> Record:
    record = Record(**item)
    sides = (record.height, record.width)
    if not all(type(side) is int and side > 0 for side in sides) or not isinstance(record.name, str):
        raise ValueError(item)
    return record


@dataclass(frozen=True)
class PackedImage:
    """An image of a packed set. As a string it is the set's path and the image's name."""

    pack: Pack
    index: int

    def __str__(self) -> str:
        return f"{self.pack.path}:{self.pack.records[self.index].name}"

    @property
    def stem(self) -> str:
        """The name without folders and suffix."""
        return PurePosixPath(self.pack.records[self.index].name).stem

    @property
    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8, which must not be written to. Compared with their hash when they are first asked for.

        Raises ImageError if they are not the pixels that were packed.
        """
        if not self.pack.was_whole(self.index):
            raise ImageError(f"{self}: is damaged; pack the images again")
        return self.pack.pixels(self.index)
