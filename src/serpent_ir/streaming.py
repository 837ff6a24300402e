"""From image file to restored image file; a large TIFF by rows, so that neither image has to fit in memory."""

import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from serpent_ir.errors import ImageError
from serpent_ir.file_state import FileState
from serpent_ir.image import Picture, read_image, read_image_pixels, replacing, write_image
from serpent_ir.image_decoders import MAX_PIXELS, TIFFS, open_header
from serpent_ir.image_encoders import check_sides
from serpent_ir.image_metadata import metadata_of
from serpent_ir.inference import Restorer, Samples
from serpent_ir.tiff import TiffRows, write_tiff
from serpent_ir.tiling import Span

LARGE = 1 << 25
"""Pixels from which an image is not read ahead of its turn, and a TIFF is read and written by rows."""


class Source:
    """An image file that is about to be restored; `load` reads it unless it is large.

    Raises nothing: what is wrong with the file is for `picture` to say.
    """

    def __init__(self, path: Path):
        self.path = path
        self._state = FileState.of(path)
        self._picture: Picture | None = None
        self.large = False
        self._tiff = False
        try:
            if not path.is_file():
                return
            with path.open("rb") as file:
                self._tiff = file.read(4) in TIFFS
                file.seek(0)
                header = open_header(file)
                # Of a TIFF that Pillow does not know nothing is known yet: by rows it goes whatever its size.
                self.large = self._tiff if header is None else header.width * header.height >= LARGE
        except Exception:  # `picture` meets it again and gives it its name
            self.large = False

    def load(self) -> "Source":
        """Read the file now, if it is not large."""
        if not self.large:
            self._picture = read_image(self.path)
        return self

    def picture(self) -> Picture:
        """The whole image. Raises ImageError as `read_image` does."""
        if self._picture is None:
            self._picture = read_image(self.path)
        return self._picture

    def restore(
        self, restorer: Restorer, target: Path, progress: Callable[[int, int], None], mask: Path | None = None
    ) -> "Restored":
        """Restore the image; what `Restored` still has to write is written by its `write`.

        `mask` is an image file whose light pixels are missing, for weights of `inpaint`.
        """
        if mask is None and self.large and self._tiff and target.suffix.lower() in (".tif", ".tiff"):
            try:
                return _restore_by_rows(self, target, restorer, progress)
            except _NotByRowsError:
                pass
        picture = self.picture()
        height, width = (restorer.scale * side for side in picture.pixels.shape[:2])
        try:
            check_sides(width, height, target.suffix.lower())
        except ImageError as error:
            raise ImageError(f"{self.path}: {error}") from None
        self._picture = None  # the pixels are not needed longer than the restoration takes
        restored = restorer.picture(picture, mask=_read_mask(mask), label=str(self.path), progress=progress)
        return Restored(target, picture.pixels.shape[1], picture.pixels.shape[0], restored, self.check_unchanged)

    def check_unchanged(self) -> None:
        """Raise SourceChangedError where the file is no longer the one that this began with."""
        if self._state is not None:
            self._state.check(self.path)


def _read_mask(path: Path | None) -> np.ndarray | None:
    """(H, W), in the depth of the file: the mean of its channels."""
    if path is None:
        return None
    pixels = read_image_pixels(path)
    return pixels.mean(-1).astype(pixels.dtype)


class Restored:
    """A restored image on its way to its file: `width` and `height` are those that came in."""

    def __init__(
        self,
        target: Path,
        width: int,
        height: int,
        picture: Picture | None,
        check_source: Callable[[], None] = lambda: None,
    ):
        self.target, self.width, self.height, self._picture = target, width, height, picture
        self._check_source = check_source

    def write(self) -> None:
        """Write what has not been written yet. Raises SourceChangedError where it is of a source that is no more."""
        if self._picture is not None:
            self._check_source()
            write_image(self.target, self._picture)
            self._picture = None


class _NotByRowsError(Exception):
    """A TIFF that has to be read whole."""


def _restore_by_rows(
    source: Source, target: Path, restorer: Restorer, progress: Callable[[int, int], None]
) -> Restored:
    path, notes = source.path, []
    with path.open("rb") as header, path.open("rb") as file:
        try:
            rows = TiffRows(file)
        except Exception as error:  # whatever is wrong, reading it whole will name it
            raise _NotByRowsError from error
        if rows.height * rows.width > MAX_PIXELS:
            raise _NotByRowsError
        kept, _ = metadata_of(open_header(header), header, notes, notes)
        for note in notes:
            warnings.warn(f"{path}: {note}", stacklevel=2)
        about = Picture(np.empty((0, 0, 3), rows.dtype), mode="L" if rows.samples <= 2 else "RGB", **kept)

        def read(span: Span, columns: Span) -> Samples:
            try:
                samples = rows.read(span)[:, slice(*columns)]
            except ImageError as error:
                raise ImageError(f"{path}: {error}") from error
            except Exception as error:  # decoders have no common type for damaged data
                raise ImageError(f"{path}: is damaged or cut short; get the file again") from error
            colours = samples[..., 0] if rows.samples <= 2 else samples[..., :3]
            return colours, samples[..., -1] if rows.samples in (2, 4) else None

        shape = (rows.height * restorer.scale, rows.width * restorer.scale, rows.samples)
        strips = restorer.strips(read, rows.height, rows.width, label=str(path), progress=progress)
        with closing(rows), closing(strips), replacing(target) as new:
            write_tiff(new, about, (np.dstack([c] if a is None else [c, a]) for c, a in strips), shape, rows.dtype)
            source.check_unchanged()
    return Restored(target, rows.width, rows.height, None)
