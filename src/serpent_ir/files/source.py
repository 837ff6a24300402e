"""Makes a restored image file of an image file. A large TIFF goes by rows, so neither image has to fit in memory."""

import io
import warnings
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from serpent_ir.errors import ImageError, is_out_of_memory
from serpent_ir.image import Picture, read_image, read_image_pixels, replacing, write_image
from serpent_ir.image.decoders import MAX_PIXELS, TIFFS, decode, open_header, tiff_record
from serpent_ir.image.encoders import EXIF_OF_BIG, check_sides, fitting, left_at_size, samples_of
from serpent_ir.image.files import tell_of_left_out
from serpent_ir.image.metadata import metadata_of
from serpent_ir.image.picture import Span
from serpent_ir.image.tiff import TiffOutput, TiffRows, write_tiff
from serpent_ir.image.tiff_pages import TiffPages, copies_left
from serpent_ir.inference import Restorer
from serpent_ir.inference.samples import Samples
from serpent_ir.system.file_state import FileState

LARGE = 1 << 25
"""From this many pixels on an image is not read ahead of its turn, and a TIFF is read and written by rows."""
_SMALL = 1 << 20
"""Bytes up to which a file is read at once. Each call of the system makes threads wait for each other."""


class Source:
    """An image file that is about to be restored. `load` reads it, unless it is large.

    Attributes:
        large: it has `LARGE` pixels or more.
        pages: how many are restored: 1, but in `restore` of all of them.

    The constructor raises nothing: `picture` reports what is wrong with the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._state = FileState.of(path)
        self._picture: Picture | None = None
        self._data: bytes | None = None  # what a small file holds, from here to `load`
        self.large = False
        self.pages = 1
        self._tiff = False
        try:
            if not path.is_file():
                return
            with path.open("rb") as file:
                start = file.read(4)
                self._tiff = start in TIFFS
                if not self._tiff and self._state and self._state.size <= _SMALL:
                    self._data = start + file.read()
                else:
                    file.seek(0)
                header = open_header(file if self._data is None else self._data)
                # The size of a TIFF that Pillow does not know is unknown here, so such a TIFF is taken for a large one.
                self.large = self._tiff if header is None else header.width * header.height >= LARGE
        except Exception:  # `picture` will meet the problem again and report it
            self.large = False

    def _count(self) -> int:
        """The number of pages or frames; 1 if it cannot be determined."""
        try:
            with self.path.open("rb") as file:
                return len(TiffPages(file)) if self._tiff else getattr(open_header(file), "n_frames", 1)
        except Exception:  # `picture` reports it
            return 1

    def load(self, pages: str = "first") -> "Source":
        """Read the file now, unless it is large, or all its pages are wanted: those are read one by one."""
        data, self._data = self._data, None
        if not self.large and (pages == "first" or self._count() == 1):
            self._picture = read_image(self.path, data)
        return self

    def picture(self) -> Picture:
        """The whole image. Raises ImageError as `read_image` does."""
        if self._picture is None:
            self._picture = read_image(self.path)
        return self._picture

    @property
    def kind(self) -> Hashable:
        """What images have in common that may go through a network together; None for one that goes alone."""
        if self._picture is None or self._picture.alpha is not None:
            return None
        return self._picture.pixels.shape, self._picture.pixels.dtype, self._picture.is_grey

    @property
    def read_pixels(self) -> int:
        """How many pixels of it are in memory."""
        return 0 if self._picture is None else self._picture.pixels.shape[0] * self._picture.pixels.shape[1]

    def restore(
        self,
        restorer: Restorer,
        target: Path,
        progress: Callable[[int, int], None],
        mask: Path | None = None,
        protect: Path | None = None,
        *,
        pages: str = "first",
    ) -> "Restored":
        """Restore the image. Whatever `Restored` has not written yet is written by its `write`.

        `mask` is an image file whose light pixels are missing, for weights of `inpaint`, and `protect` one whose light
        pixels stay as they are. `pages` is "first" or "all":
        each page of a TIFF becomes one of a TIFF of the same kind, one after the other, written as it is restored.
        `progress` is called with (tiles done, tiles in all); of several pages with those of as many pages as this one.
        """
        masks = Masks(read_mask(mask), read_mask(protect))
        if pages == "all" and (count := self._count()) > 1:
            if not self._tiff:
                raise ImageError(
                    f"{self.path}: holds {count} images and is no TIFF, and --pages all is for those; leave it out to "
                    "restore the first, or use serpent video"
                )
            if target.suffix.lower() not in (".tif", ".tiff"):
                raise ImageError(f"{self.path}: holds {count} pages, which {target.suffix} does not; choose .tif by -o")
            self.pages = count
            return _restore_pages(self, target, restorer, progress, masks)
        by_rows = mask is None and self.large and self._tiff and target.suffix.lower() in (".tif", ".tiff")
        if by_rows and (done := _restore_by_rows(self, target, restorer, progress, masks)):
            return done
        picture = self._checked(restorer, target)
        self._picture = None  # the pixels are not needed after the restoration
        restored = restorer.picture(picture, **masks.asked, label=str(self.path), progress=progress)
        height, width = picture.pixels.shape[:2]
        return Restored(target, width, height, restored, self.check_unchanged, masks.left)

    def _checked(self, restorer: Restorer, target: Path) -> Picture:
        """The picture, if its restored one will fit into the target."""
        picture = self.picture()
        height, width = (restorer.scale * side for side in picture.pixels.shape[:2])
        try:
            check_sides(width, height, target.suffix.lower())
        except ImageError as error:
            raise ImageError(f"{self.path}: {error}") from None
        return picture

    @classmethod
    def restore_together(
        cls, sources: "Sequence[Source]", targets: Sequence[Path], restorer: Restorer
    ) -> "list[Restored]":
        """`restore` for several of one `kind`, which go through the network together. They keep what they have read."""
        pictures = [source._checked(restorer, target) for source, target in zip(sources, targets, strict=True)]
        height, width = pictures[0].pixels.shape[:2]
        told: list[list[float]] = [[] for _ in pictures]
        made = restorer.pictures(pictures, left=[one.append for one in told])
        return [
            Restored(target, width, height, restored, source.check_unchanged, left[0] if left else None)
            for source, target, restored, left in zip(sources, targets, made, told, strict=True)
        ]

    def check_unchanged(self) -> None:
        """Raise SourceChangedError if the file is no longer the one that this object began with."""
        if self._state is not None:
            self._state.check(self.path)


def read_mask(path: Path | None) -> np.ndarray | None:
    """A mask (H, W) in the depth of its file: the mean of its channels. None for no file."""
    if path is None:
        return None
    pixels = read_image_pixels(path)
    return pixels.mean(-1).astype(pixels.dtype)


@dataclass(frozen=True)
class Masks:
    """What is said of an image's pixels, as (H, W) in the depth of its file or None, and what `auto` says of it."""

    missing: np.ndarray | None
    protected: np.ndarray | None
    told: list[float] = field(default_factory=list)

    @property
    def asked(self) -> dict[str, Any]:
        """Arguments of `Restorer.picture` and `Restorer.strips`."""
        return {"mask": self.missing, "protect": self.protected, "left": self.told.append}

    @property
    def left(self) -> float | None:
        """The mean of what `auto` left of the image's pages, or None."""
        return sum(self.told) / len(self.told) if self.told else None


class Restored:
    """A restored image on its way to its file. `width` and `height` are those of the input.

    `left` is the share of it that `auto` left as it was (of pages the mean), or None without `auto`.
    """

    def __init__(
        self,
        target: Path,
        width: int,
        height: int,
        picture: Picture | None,
        check_source: Callable[[], None] = lambda: None,
        left: float | None = None,
    ):
        self.left = left
        self.target, self.width, self.height, self._picture = target, width, height, picture
        self._check_source = check_source

    def write(self) -> None:
        """Write what has not been written yet. Raises SourceChangedError if the source has changed meanwhile."""
        if self._picture is not None:
            self._check_source()
            write_image(self.target, self._picture)
            self._picture = None


def _restore_pages(
    source: Source, target: Path, restorer: Restorer, progress: Callable[[int, int], None], masks: Masks
) -> Restored:
    """Each page of a TIFF, in their order, of which one is in memory at a time, and of a large one some rows."""
    path = source.path
    told: set[str] = set()

    def tell(place: Path, text: str) -> None:
        if text not in told:
            told.add(text)
            warnings.warn(f"{place}: {text}", stacklevel=2)

    with path.open("rb") as file, closing(TiffPages(file)) as pages, replacing(target) as new:
        count, size = len(pages), (0, 0)
        if pages.files > 1:
            raise ImageError(f"{path}: is one of a set of OME's files, whose pages belong together; join them first")
        if pages.left:
            tell(path, copies_left(pages.left))
        with TiffOutput(new, pages.nbytes() * restorer.scale**2) as output:
            for number in range(count):
                label = f"{path}: page {number + 1}"

                def part(done: int, parts: int, number: int = number) -> None:
                    progress(number * parts + done, count * parts)

                notes: list[str] = []
                with _what_is_wrong(label):
                    data = pages.page(number)
                    rows = _rows_of(io.BytesIO(data), LARGE) if masks.missing is None else None
                    if rows:
                        picture = _about(rows, io.BytesIO(data), restorer.scale, notes, count, whole=True)
                    else:
                        picture, *more = decode(data, count, whole=True)
                        notes += [note for some in more for note in some]
                for note in notes:
                    tell(path, note)
                if rows:
                    height, width, restored = rows.height, rows.width, picture
                    shape, strips = _strips_of(rows, restorer, label, part, masks)
                else:
                    height, width = picture.pixels.shape[:2]
                    restored = restorer.picture(picture, **masks.asked, label=label, progress=part)
                    shape, strips = samples_of(restored)
                size = size if number else (width, height)
                for what in left_at_size(restored):
                    tell(target, f"without {what}")
                if restored.exif and output.big:
                    tell(target, f"without {EXIF_OF_BIG}")
                with closing(strips):
                    output.write(fitting(restored, ".tif"), strips, shape, restored.pixels.dtype, count - number)
        source.check_unchanged()
    return Restored(target, *size, None, left=masks.left)


@contextmanager
def _what_is_wrong(label: str) -> Iterator[None]:
    """Whatever is raised while a page is read becomes an ImageError that names it."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{label}: {error}") from error
    except Exception as error:  # decoders have no common type for damaged data
        if is_out_of_memory(error):
            raise ImageError(f"{label} does not fit in memory; cut it into parts first") from error
        raise ImageError(f"{label}: is damaged or cut short; get the file again") from error


def _restore_by_rows(
    source: Source, target: Path, restorer: Restorer, progress: Callable[[int, int], None], masks: Masks
) -> Restored | None:
    """As `Source.restore` of a large TIFF; None where it has to be read whole."""
    path, notes = source.path, []
    with path.open("rb") as header, path.open("rb") as file:
        if (rows := _rows_of(file)) is None:
            return None
        about = _about(rows, header, restorer.scale, notes)
        for note in notes:
            warnings.warn(f"{path}: {note}", stacklevel=2)
        shape, strips = _strips_of(rows, restorer, str(path), progress, masks)
        with closing(rows), closing(strips), replacing(target) as new:
            write_tiff(new, fitting(about, ".tif"), strips, shape, rows.dtype)
            source.check_unchanged()
    tell_of_left_out(target, about)
    return Restored(target, rows.width, rows.height, None, left=masks.left)


def _rows_of(file: BinaryIO, least: int = 0) -> TiffRows | None:
    """The rows of a TIFF of one page and so many pixels; None for another, and where they have to be read whole."""
    try:
        if file.read(4) == b"MM\0+":  # whose metadata Pillow misreads
            return None
        file.seek(0)
        rows = TiffRows(file)
    except Exception:  # whatever is wrong, reading it whole will name it
        return None
    return rows if least <= rows.height * rows.width <= MAX_PIXELS else None


def _about(
    rows: TiffRows, header: BinaryIO, scale: int, notes: list[str], planes: int = 1, *, whole: bool = False
) -> Picture:
    """The restored picture with all but its pixels, which take no memory; `notes` gets what a person should know."""
    kept, orientation = metadata_of(open_header(header), header, notes, notes)
    kept["tiff"] = tiff_record(header, orientation, notes, planes, whole=whole)
    none = np.broadcast_to(rows.dtype.type(0), (rows.height * scale, rows.width * scale, 3))
    return Picture(none, mode="L" if rows.samples <= 2 else "RGB", **kept)


def _strips_of(
    rows: TiffRows, restorer: Restorer, label: str, progress: Callable[[int, int], None], masks: Masks
) -> tuple[tuple[int, int, int], Generator[np.ndarray]]:
    """The shape (H, W, samples) of an image that is restored by rows, and it in parts."""

    def read(span: Span, columns: Span) -> Samples:
        with _what_is_wrong(label):
            samples = rows.read(span)[:, slice(*columns)]
        colours = samples[..., 0] if rows.samples <= 2 else samples[..., :3]
        return colours, samples[..., -1] if rows.samples in (2, 4) else None

    shape = (rows.height * restorer.scale, rows.width * restorer.scale, rows.samples)

    def strips() -> Generator[np.ndarray]:
        with closing(
            restorer.strips(read, rows.height, rows.width, **masks.asked, label=label, progress=progress)
        ) as parts:
            yield from (np.dstack([c] if a is None else [c, a]) for c, a in parts)

    return shape, strips()
