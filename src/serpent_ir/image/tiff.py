"""TIFF files by rows: written strip by strip, and read in the same way if they are large. Used by the image modules.

tifffile does the work, because Pillow has no 16-bit colour, cannot write EXIF data into a compressed TIFF, and holds
whole images in memory.
"""

import logging
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from serpent_ir.errors import ImageError
from serpent_ir.image.metadata import (
    EXIF_IFD,
    INTEROP_IFD,
    IPTC_TAG,
    RATINGS,
    SUB_IFDS,
    XMP_TAG,
    XP,
    interop_of,
    with_size,
)
from serpent_ir.image.picture import Picture, Span
from serpent_ir.image.tiff_records import tags_of

_STRIP = 1 << 20  # bytes of a written strip before compression, about
_CLASSIC = 2**32 - 2**26  # up to this many bytes of samples, offsets of 32 bits suffice
_DEFLATE = (8, 32946)
_DESCRIPTION = 270


def write_tiff(
    file: BinaryIO, about: Picture, strips: Iterable[NDArray[Any]], shape: tuple[int, int, int], dtype: DTypeLike
) -> None:
    """Write an image of `shape` (H, W, 1 to 4 samples), 8 or 16 bits, deflated, from parts (rows, W, samples).

    Samples are grey or RGB, then alpha. The metadata is that of `about`. EXIF data is left out if it is damaged, or if
    the image is beyond 4 GB, since such files have other directories.
    """
    with TiffOutput(file, math.prod(shape) * np.dtype(dtype).itemsize) as output:
        output.write(about, strips, shape, dtype)


def is_big(nbytes: int) -> bool:
    """Whether samples of so many bytes make a BigTIFF, whose directories are others: EXIF data is not written there."""
    return nbytes > _CLASSIC


class TiffOutput:
    """A TIFF that is written page by page. `nbytes` is the size of all samples, about. Used as a context manager.

    Attributes:
        big: as `is_big`.
    """

    def __init__(self, file: BinaryIO, nbytes: int):
        import tifffile

        self._file, self.big = file, is_big(nbytes)
        self._writer = tifffile.TiffWriter(file, bigtiff=self.big, byteorder="<")
        self._directories: list[dict[int, dict[int, Any]]] = []  # EXIF and GPS directories of each page

    def __enter__(self) -> "TiffOutput":
        return self

    def __exit__(self, failed: Any, *_: Any) -> None:
        self._writer.close()
        if not failed and any(self._directories):
            _append_directories(self._file, self._directories)

    def write(
        self,
        about: Picture,
        strips: Iterable[NDArray[Any]],
        shape: tuple[int, int, int],
        dtype: DTypeLike,
        planes: int = 1,
    ) -> None:
        """Add a page, as `write_tiff` does. `planes` is the number of pages from this one to the last."""
        height, width, samples = shape
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        tags = _tags(with_size(about.exif, width, height) if not self.big else None)
        sub_ifds = {int(tag): ifd for tag in SUB_IFDS if (ifd := dict(tags.get_ifd(tag)))}
        if within := interop_of(tags):
            sub_ifds[int(EXIF_IFD)][int(INTEROP_IFD)] = within
        extra, options = [], {}
        if about.tiff:
            tags.pop(_DESCRIPTION, None)
            extra, options, _ = tags_of(about.tiff, (width, height), samples, np.dtype(dtype).itemsize * 8, planes)
        if about.dpi and not options:
            options = {"resolution": about.dpi, "resolutionunit": "INCH"}
        elif (aspect := about.carried.get("aspect")) and not options:
            options = {"resolution": aspect, "resolutionunit": "NONE"}
        extra += [(tag, "s", 0, value, True) for tag, value in tags.items() if isinstance(value, str)]
        extra += [(tag, "H", 1, tags[tag], True) for tag in RATINGS if isinstance(tags.get(tag), int)]
        extra += [(tag, "B", len(tags[tag]), tags[tag], True) for tag in XP if isinstance(tags.get(tag), bytes)]
        extra += [(tag - 1, "I", 1, 0, True) for tag in sub_ifds]  # a free number, since tifffile refuses the real one
        if about.xmp:
            extra.append((XMP_TAG, "B", len(about.xmp), about.xmp, True))
        if iptc := about.carried.get("iptc"):
            extra.append((IPTC_TAG, "B", len(iptc), iptc, True))
        options |= {"compression": "zlib", "predictor": True, "metadata": None, "software": False}
        options |= {"photometric": "rgb" if samples > 2 else "minisblack", "extratags": extra}
        if samples > 1:
            options |= {"planarconfig": "contig", "extrasamples": ["unassalpha"] * (samples in (2, 4))}
        rows = max(1, min(height, _STRIP // max(1, nbytes // height)))
        self._writer.write(
            _compressed(strips, rows, np.dtype(dtype)),
            shape=shape if samples > 1 else shape[:2],
            dtype=dtype,
            rowsperstrip=rows,
            iccprofile=about.icc_profile,
            **options,
        )
        self._directories.append(sub_ifds)


def _tags(exif: bytes | None) -> Image.Exif:
    tags = Image.Exif()
    try:
        tags.load(exif or b"")
        for tag in SUB_IFDS:
            tags.get_ifd(tag)
    except Exception:  # Pillow raises all kinds of exceptions for damaged data
        return Image.Exif()
    return tags


def _compressed(parts: Iterable[NDArray[Any]], rows: int, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """The strips of a TIFF, `rows` each except the last: differences along the rows, deflated by several threads."""

    def compress(strip: NDArray[Any]) -> bytes:
        strip = strip.astype(dtype.newbyteorder("<"), copy=False)
        return zlib.compress(np.diff(strip, axis=1, prepend=strip.dtype.type(0)).astype(strip.dtype).tobytes())

    with ThreadPoolExecutor(4) as pool:
        rest: NDArray[Any] | None = None
        for part in parts:
            joined = part if rest is None or not len(rest) else np.concatenate([rest, part])
            whole = len(joined) // rows * rows
            yield from pool.map(compress, (joined[top : top + rows] for top in range(0, whole, rows)))
            rest = joined[whole:].copy()
        if rest is not None and len(rest):
            yield compress(rest)


def _append_directories(file: BinaryIO, directories: list[dict[int, dict[int, Any]]]) -> None:
    """Append the EXIF and GPS directories of each page to a TIFF, and point their placeholder tags there."""
    import tifffile

    file.seek(0)
    entries = []
    with tifffile.TiffFile(file) as written:
        for index, sub_ifds in enumerate(directories):
            page = written.pages[index].aspage() if sub_ifds else None
            entries += [(tag, page.tags[tag - 1].offset, ifd) for tag, ifd in sub_ifds.items() if page is not None]
    for tag, entry, ifd in entries:
        end = file.seek(0, 2)
        start = end + end % 2
        directory = ImageFileDirectory_v2(b"II*\0\0\0\0\0", group=tag)
        directory.update(ifd)
        file.write(b"\0" * (end % 2) + directory.tobytes(start))
        file.seek(entry)
        file.write(struct.pack("<HHII", tag, 4, 1, start))


class TiffRows:
    """The first page of a TIFF, read row by row on demand. Rows that were passed are forgotten.

    Raises ImageError for a file that cannot be read in this way, because its layout, compression or samples are not
    those that are usual for large photos. Reading it whole may still work.
    """

    def __init__(self, file: BinaryIO):
        import tifffile

        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would print also arrives as an error
        self._file = file
        self._tiff = tifffile.TiffFile(file)
        page = self._page = self._tiff.pages.first.aspage()
        samples, extra = page.samplesperpixel, tuple(page.extrasamples)
        usual = page.imagewidth > 0 and page.imagelength > 0 and page.planarconfig == 1 and page.imagedepth == 1
        usual = usual and page.compression in (1, *_DEFLATE)
        usual = usual and page.predictor in (1, 2) and page.fillorder == 1
        usual = usual and page.photometric == (1 if samples <= 2 else 2) and page.bitspersample in (8, 16)
        usual = usual and page.dtype in (np.uint8, np.uint16) and (samples, extra) in _LAYOUTS
        if not usual or page.tags.valueof(274, 1) != 1 or len(self._tiff.pages) > 1:
            raise ImageError("cannot be read by rows")
        end = file.seek(0, 2)
        places = zip(page.dataoffsets, page.databytecounts, strict=True)
        if not all(count and start + count <= end for start, count in places):
            raise ImageError("is cut short; get the file again")
        assert page.dtype is not None
        self.height, self.width, self.samples, self.dtype = page.imagelength, page.imagewidth, samples, page.dtype
        self._band = page.tilelength if page.is_tiled else min(page.rowsperstrip, self.height)
        self._across = -(-self.width // page.tilewidth) if page.is_tiled else 1
        if len(page.dataoffsets) < self._across * -(-self.height // self._band):
            raise ImageError("is cut short; get the file again")
        self._bands: dict[int, NDArray[Any]] = {}

    def read(self, rows: Span) -> NDArray[Any]:
        """(rows, W, samples). Rows above the first of these are not kept."""
        first, last = rows[0] // self._band, (rows[1] - 1) // self._band
        self._bands = {index: band for index, band in self._bands.items() if index >= first}
        for index in range(first, last + 1):
            if index not in self._bands:
                self._bands[index] = self._decode(index)
        joined = [self._bands[index] for index in range(first, last + 1)]
        whole = joined[0] if len(joined) == 1 else np.concatenate(joined)
        start = rows[0] - first * self._band
        return whole[start : start + rows[1] - rows[0]]

    def _decode(self, index: int) -> NDArray[Any]:
        """Decode one row of strips or tiles."""
        page, top = self._page, index * self._band
        band = np.empty((min(self._band, self.height - top), self.width, self.samples), self.dtype)
        for segment in range(index * self._across, (index + 1) * self._across):
            self._file.seek(page.dataoffsets[segment])
            data, place, shape = page.decode(self._file.read(page.databytecounts[segment]), segment)
            left = place[3]
            wide, high = min(shape[2], self.width - left), min(shape[1], len(band))
            if data is None:
                raise ImageError("is cut short; get the file again")
            band[:high, left : left + wide] = data.reshape(data.shape[-3:])[:high, :wide]
        return band

    def close(self) -> None:
        """Forget the rows. Closing the file is up to the caller."""
        self._bands = {}
        self._tiff.close()


_LAYOUTS = {(1, ()), (2, (2,)), (3, ()), (4, (2,))}  # (samples per pixel, extra samples); 2: unassociated alpha
