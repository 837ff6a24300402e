"""Makes a packed set of folders of images."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from serpent_ir.data.files import list_images, read_pixels
from serpent_ir.data.pack import HEADER, SUFFIX, PackedImage, Record, footer_of
from serpent_ir.errors import ImageError, SerpentError, UsageError
from serpent_ir.image.decoders import reason
from serpent_ir.system.file_state import FileState
from serpent_ir.system.whole_file import whole_file

T = TypeVar("T")
R = TypeVar("R")


def write_pack(
    sources: Sequence[str | Path],
    output: Path,
    *,
    size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """Decode the images of several sources, as `list_images` takes them, into a packed set, in order.

    Args:
        sources: folders or packed sets. An image is named by its path below its source; if there are several sources,
            the source's own name comes before it.
        output: FILE.serpent. It appears whole or not at all, as with `whole_file`.
        size: the shorter side of each image is reduced to this many pixels (Lanczos). By default sizes are kept.
        progress: called with (images done, all images).

    Raises:
        UsageError: another suffix, a size under 1, or a source without images.
        ImageError: an image cannot be read, is smaller than `size`, or changed while it was read.
        SerpentError: the file cannot be written.
    """
    if output.suffix != SUFFIX:
        raise UsageError(f"{output}: the name of a packed set must end with {SUFFIX}")
    if size is not None and size < 1:
        raise UsageError(f"the size is {size}; it must be at least 1 pixel")
    images = [(image, _name(image, source, len(sources) > 1)) for source in sources for image in list_images(source)]

    def decoded(item: tuple[Path | PackedImage, str]) -> tuple[np.ndarray, Record]:
        image, name = item
        file = image.pack.path if isinstance(image, PackedImage) else image
        before = FileState.of(file)
        pixels = np.ascontiguousarray(_reduced(read_pixels(image), size, image))
        if before:
            before.check(file)
        height, width, _ = pixels.shape
        return pixels, Record(name, height, width, hashlib.sha256(pixels.data).hexdigest())

    records: list[Record] = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as file:
            file.write(HEADER)
            for pixels, record in in_threads(decoded, images):
                file.write(pixels.data)
                records.append(record)
                progress(len(records), len(images))
            file.write(footer_of(records))
        output.with_name(f"{output.name}.part").unlink(missing_ok=True)  # left by a killed call of an older version
    except OSError as error:
        raise SerpentError(f"{output}: cannot be written ({reason(error)}); make room or choose another -o") from None
    return records


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of each item, in order, on all cores, a few items ahead of what is used."""
    threads = os.cpu_count() or 1
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _name(image: Path | PackedImage, source: str | Path, several: bool) -> str:
    if isinstance(image, PackedImage):
        name, own = image.pack.records[image.index].name, image.pack.path.stem
    else:
        folder = Path(source) if Path(source).is_dir() else Path(str(source).rpartition("[")[0])
        name, own = image.relative_to(folder).as_posix(), folder.resolve().name
    return f"{own}/{name}" if several else name


def _reduced(pixels: np.ndarray, size: int | None, image: Path | PackedImage) -> np.ndarray:
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if size is None or shorter == size:
        return pixels
    if shorter < size:
        raise ImageError(
            f"{image}: is {width}x{height} px, smaller than the size {size}; remove it or choose a smaller size"
        )
    sides = (max(size, round(width * size / shorter)), max(size, round(height * size / shorter)))
    return np.asarray(Image.fromarray(pixels).resize(sides, Image.Resampling.LANCZOS))
