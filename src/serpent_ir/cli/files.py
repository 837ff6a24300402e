"""Image files in and out: which file is written for which, and what happens to one that fails."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serpent_ir.cli.shell import progress_of, say
from serpent_ir.errors import SerpentError, UsageError

if TYPE_CHECKING:
    from serpent_ir.image import Picture


def plan_files(inputs: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """(file to read, file to write) of each image. Raises UsageError where one would overwrite an input or another."""
    from PIL import Image

    from serpent_ir.data import find_images
    from serpent_ir.image import WRITTEN_SUFFIXES

    def written(path: Path) -> Path:
        return path if path.suffix.lower() in WRITTEN_SUFFIXES else path.with_suffix(".png")

    pairs = []
    if output.suffix.lower() in Image.registered_extensions() and not output.is_dir():
        if len(inputs) != 1 or inputs[0].is_dir():
            raise UsageError(f"{output}: is the name of an image; several images need a folder")
        if not inputs[0].exists():
            raise UsageError(f"{inputs[0]}: no such file or folder")
        if written(output) != output:
            raise UsageError(f"{output}: cannot write {output.suffix}; use {', '.join(WRITTEN_SUFFIXES)}")
        pairs = [(inputs[0], output)]
    else:
        for path in inputs:
            if path.is_dir():
                files = find_images(path)
                inside = output.resolve() != path.resolve() and output.resolve().is_relative_to(path.resolve())
                if inside:  # what an earlier run wrote there is no input
                    files = [file for file in files if not file.resolve().is_relative_to(output.resolve())]
                pairs += [(file, written(output / file.relative_to(path))) for file in files]
            elif path.exists():
                pairs.append((path, written(output / path.name)))
            else:
                raise UsageError(f"{path}: no such file or folder")
    if not pairs:
        raise UsageError(f"{', '.join(map(str, inputs)) or 'no input'}: no images to work on")
    sources = {_identity(source) for source, _ in pairs}
    writers: dict[Path, Path] = {}
    for source, target in pairs:
        if target.exists() and _identity(target) in sources:
            raise UsageError(f"{target}: would overwrite an input; choose another -o")
        if target in writers:
            raise UsageError(f"{target}: both {writers[target]} and {source} would be written to it; run them apart")
        writers[target] = source
    return pairs


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def convert_files(pairs: list[tuple[Path, Path]], convert: Callable[[int, "Picture"], "Picture"], done: str) -> None:
    """Read, convert and write each image; a failure is reported, the others are done, and SerpentError ends it."""
    from serpent_ir.image import read_image, write_image

    for folder in {target.parent: None for _, target in pairs}:
        _make_folder(folder)  # before any work, or each file would fail for this one reason
    failed = 0
    with progress_of(done) as progress:
        for index, (source, target) in enumerate(pairs):
            start = time.perf_counter()
            try:
                write_image(target, convert(index, read_image(source)))
            except (SerpentError, OSError) as error:
                reason = str(error) if str(error).startswith(f"{source}: ") else f"{source}: {error}"
                if len(pairs) == 1:
                    raise SerpentError(reason) from None
                failed += 1
                say(f"serpent: error: {reason}")
                line = None  # said already
            else:
                line = f"{source} -> {target} ({time.perf_counter() - start:.1f} s)"
            progress(index + 1, len(pairs), line)
    if failed:
        raise SerpentError(f"{failed} of {len(pairs)} images failed; {len(pairs) - failed} {done}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SerpentError(f"{folder}: no folder can be made there ({error.strerror}); choose another -o") from None
