"""Makes each page of a TIFF a TIFF of its own in memory, so that one page at a time is read like any file."""

import logging
import struct
from typing import Any, BinaryIO

from serpent_ir.errors import ImageError
from serpent_ir.image.tiff_descriptions import files_of_ome

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_CLASSIC = {16: (4, "I"), 17: (9, "i"), 18: (13, "I")}  # 64-bit types -> the same with 32 bits
_OFFSETS, _COUNTS, _DIRECTORIES = (273, 324), (279, 325), (34665, 34853)
_LEFT = (330, 288, 289)  # left out: smaller copies of the page, and pointers to free space
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_OLD_JPEG = 6

Entry = tuple[int, int, int, bytes]


def copies_left(count: int) -> str:
    """The message for `TiffPages.left`."""
    return f"holds {count} smaller {'copy or mask' if count == 1 else 'copies or masks'} of its pages; left out"


class TiffPages:
    """The pages of a TIFF, without smaller copies and masks. Also planes that ImageJ and tifffile keep in one
    directory.

    Attributes:
        left: number of smaller copies and masks, which are not pages.

    Raises whatever tifffile raises for a damaged file.
    """

    def __init__(self, file: BinaryIO):
        import tifffile

        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would print also arrives as an error
        self._file = file
        self._tiff = tifffile.TiffFile(file)
        self._big, self._order = self._tiff.is_bigtiff, self._tiff.byteorder
        count = len(self._tiff.pages)
        kept = [i for i in range(count) if count == 1 or not self._is_copy(self._page(i))]
        self.left = count - len(kept)
        self._places = [(index, 0) for index in kept or [0]]
        if count == 1:
            self._places = [(0, plane) for plane in range(self._planes_of_one())]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def is_big(self) -> bool:
        """Whether it is a BigTIFF, which has other directories."""
        return self._big

    @property
    def files(self) -> int:
        """How many files the images are in, according to OME's description."""
        return files_of_ome((self._tiff.pages.first.aspage().description or "").encode())

    def nbytes(self) -> int:
        """Bytes of all samples before compression, as far as the first page tells."""
        page = self._page(0)
        return page.imagewidth * page.imagelength * page.samplesperpixel * max(1, page.bitspersample // 8) * len(self)

    def page(self, number: int) -> bytes:
        """A page as a file. Raises ImageError if its samples are missing, or cannot be extracted."""
        index, plane = self._places[number]
        page = self._page(index)
        if page.compression == _OLD_JPEG:
            raise ImageError("has pages in an old kind of JPEG, which are not read one by one; save it anew")
        end = self._file.seek(0, 2)
        places = [(start + plane * page.nbytes, size) for start, size in self._segments(page)]
        if not all(size and start + size <= end for start, size in places):
            raise ImageError("is cut short; get the file again")
        data = [self._at(start, size) for start, size in places]
        return self._built(self._entries(page.offset), data, tiled=page.is_tiled)

    def close(self) -> None:
        """Do nothing: closing the file is up to the caller."""
        self._tiff.close()

    def _page(self, index: int) -> Any:
        return self._tiff.pages[index].aspage()

    def _is_copy(self, page: Any) -> bool:
        return bool(page.subfiletype & (_REDUCED | _MASK))

    def _planes_of_one(self) -> int:
        """How many planes one directory stands for, as in large ImageJ stacks and tifffile's truncated ones."""
        page = self._page(0)
        if not page.is_contiguous or page.compression != 1 or not (page.is_imagej or page.is_shaped):
            return 1
        series = self._tiff.series[0]
        planes = series.size // max(1, page.size)
        end = self._file.seek(0, 2)
        return planes if planes > 1 and page.dataoffsets[0] + planes * page.nbytes <= end else 1

    def _segments(self, page: Any) -> list[tuple[int, int]]:
        if len(self._places) > 1 and self._places[1][0] == 0:  # planes of one directory
            return [(page.dataoffsets[0], page.nbytes)]
        return list(zip(page.dataoffsets, page.databytecounts, strict=True))

    def _at(self, place: int, size: int) -> bytes:
        self._file.seek(place)
        return self._file.read(size)

    def _entries(self, place: int) -> list[Entry]:
        """The entries of a directory: number, type, count and bytes of each tag."""
        order, width = self._order, 20 if self._big else 12
        count_size, room = (8, 8) if self._big else (2, 4)
        (count,) = struct.unpack(order + ("Q" if self._big else "H"), self._at(place, count_size))
        table = self._at(place + count_size, count * width)
        entries = []
        for at in range(0, len(table) - width + 1, width):
            tag, kind, number = struct.unpack_from(order + ("HHQ" if self._big else "HHI"), table, at)
            inline = table[at + width - room : at + width]
            size = _SIZES.get(kind, 1) * number
            if size > room:
                inline = self._at(struct.unpack(order + ("Q" if self._big else "I"), inline)[0], size)
            entries.append((tag, kind, number, inline[:size]))
        return entries

    def _built(self, entries: list[Entry], data: list[bytes], *, tiled: bool) -> bytes:
        """A TIFF with 32-bit offsets, with only this directory and these strips or tiles."""
        order = self._order
        out = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
        starts = []
        for part in data:
            starts.append(len(out))
            out += part + bytes(len(part) % 2)
        kept = [entry for entry in entries if entry[0] not in (*_OFFSETS, *_COUNTS, *_LEFT)]
        if len(data) == 1 and not tiled:  # a plane of several contiguous strips
            kept = [entry for entry in kept if entry[0] != 278]
            kept += [(278, *entry[1:]) for entry in kept if entry[0] == 257]
        lengths = [len(part) for part in data]
        for tag, values in ((_OFFSETS[tiled], starts), (_COUNTS[tiled], lengths)):
            kept.append((tag, 4, len(values), struct.pack(f"{order}{len(values)}I", *values)))
        struct.pack_into(order + "I", out, 4, self._put(out, kept))
        return bytes(out)

    def _put(self, out: bytearray, entries: list[Entry]) -> int:
        """Append a directory and everything it points to. Returns its offset."""
        order, table = self._order, b""
        for tag, kind, count, value in sorted(entries, key=lambda entry: entry[0]):
            if tag in _DIRECTORIES:
                place = int.from_bytes(value, "little" if order == "<" else "big")
                kind, count, value = 4, 1, struct.pack(order + "I", self._put(out, self._entries(place)))
            elif kind in _CLASSIC:
                wide = struct.unpack(f"{order}{count}{'q' if kind == 17 else 'Q'}", value)
                kind, value = _CLASSIC[kind][0], struct.pack(f"{order}{count}{_CLASSIC[kind][1]}", *wide)
            if len(value) > 4:
                out += bytes(len(out) % 2)
                place, value = len(out), value
                out += value
                value = struct.pack(order + "I", place)
            table += struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
        out += bytes(len(out) % 2)
        place = len(out)
        out += struct.pack(order + "H", len(entries)) + table + bytes(4)
        return place
