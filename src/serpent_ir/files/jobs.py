"""Finds the inputs of a command (files, folders, patterns and lists), and says which file becomes which."""

import codecs
import fnmatch
import glob
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from serpent_ir.data import PASSED_OVER
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.image import RAW_SUFFIXES, WRITTEN_SUFFIXES
from serpent_ir.image.folders import SUFFIXES, find_images


@dataclass(frozen=True)
class Job:
    """An image to read and the file to write. `refused` is the reason why it must not be written there, if any."""

    index: int
    source: Path
    target: Path
    refused: str = ""


def find_jobs(inputs: Sequence[Path], output: Path) -> list[Job]:
    """The images that the inputs of a command stand for, each with the file that is to be written.

    Args:
        inputs: image files; folders, which are mirrored under the output with their subfolders; patterns such as
            `photos/**/*.jpg`, whose part without wildcards is such a folder; `@LIST`, a file with one name per line (or
            with names that end in zero bytes), of which relative ones are mirrored; `-`, such a list on standard input.
        output: a folder; or, for one image, a file with the suffix of an image. Formats that are read but not written
            become PNG. If it lies inside a folder or pattern (or, for a list, inside the current folder), its content
            is not an input, so that the same call can continue after an earlier one.

    Raises:
        UsageError: before any work, for a missing path, a folder without images, or outputs that would overwrite an
            input or each other.
    """
    names_an_image = output.suffix.lower() in {*Image.registered_extensions(), *SUFFIXES, *RAW_SUFFIXES, ".jxl"}
    if names_an_image and not output.is_dir():
        if len(inputs) != 1 or inputs[0].is_dir() or _is_list(inputs[0]):
            raise UsageError(f"{output}: is the name of an image; several images need a folder")
        if not inputs[0].exists():
            raise UsageError(f"{inputs[0]}: no such file or folder")
        if _written(output) != output:
            raise UsageError(f"{output}: cannot write {output.suffix}; use {', '.join(WRITTEN_SUFFIXES)}")
        pairs = [(inputs[0], output)]
    else:
        pairs = [(file, _written(output / below)) for path in inputs for file, below in _found(path, output)]
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
    root = output.resolve() if pairs[0][1] != output else output.parent.resolve()
    return [Job(index, *pair, refused=_leads_out(pair[1], root)) for index, pair in enumerate(pairs)]


def _is_list(path: Path) -> bool:
    return not path.exists() and (str(path) == "-" or str(path).startswith("@"))


def _written(path: Path) -> Path:
    return path if path.suffix.lower() in WRITTEN_SUFFIXES else path.with_suffix(".png")


def _found(path: Path, output: Path) -> Iterator[tuple[Path, Path]]:
    """The images that an input stands for, each with its path below the output folder."""
    if path.is_dir():
        _tell_of_passed_over(path, path.rglob("*"))
        yield from ((file, file.relative_to(path)) for file in _not_written(find_images(path), path, output))
    elif path.exists():
        yield path, Path(path.name)
    elif _is_list(path):
        names = _listed(path)
        kept = _not_written(names, Path(), output) or names  # if all are inside, they are what was meant
        if left := len(names) - len(kept):
            warnings.warn(f"{path}: {left} of its names are inside of {output}, the output, and left out", stacklevel=2)
        for name in kept:
            mirrored = not name.is_absolute() and ".." not in name.parts
            for file, below in _found(name, output):
                yield file, (name if name.is_dir() else name.parent) / below if mirrored else below
    elif glob.has_magic(str(path)):
        base, parts = _split(path)
        matches = sorted(set(_matches(base, parts)))
        _tell_of_passed_over(path, matches)
        files = [match for match in matches if match.suffix.lower() in SUFFIXES and not match.name.startswith("._")]
        files = [match for match in files if match.is_file()]
        if not files:
            raise UsageError(f"{path}: no images match")
        yield from ((file, file.relative_to(base)) for file in _not_written(files, base, output))
    else:
        raise UsageError(f"{path}: no such file or folder")


def _split(pattern: Path) -> tuple[Path, list[str]]:
    """The folder where a pattern begins, and the parts of the pattern from there on. An existing name is no pattern."""
    base, parts = Path(), list(pattern.parts)
    while parts and (not glob.has_magic(parts[0]) or (base / parts[0]).exists()):
        base /= parts.pop(0)
    return base, parts


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """The matches of a pattern below a folder. In every folder, too, an existing name is no pattern."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            yield from _matches(below, rest or ["*"])
    elif (folder / part).exists():
        yield from _matches(folder / part, rest)
    else:
        try:
            names = fnmatch.filter((entry.name for entry in folder.iterdir()), part)
        except OSError:  # not a folder, or one that may not be read
            names = []
        for name in names:
            yield from _matches(folder / name, rest)


def _tell_of_passed_over(path: Path, files: Iterable[Path]) -> None:
    """Warn about skipped files that people take for images. Most other files are skipped silently."""
    others = [file for file in files if file.suffix.lower() in RAW_SUFFIXES | PASSED_OVER]
    others = sorted(file.name for file in others if not file.name.startswith("._"))
    if raw := [name for name in others if Path(name).suffix.lower() in RAW_SUFFIXES]:
        told = f"{path}: raw files of cameras are left out, {len(raw)} in all, {raw[0]} the first"
        warnings.warn(f"{told}; develop them first, best as TIFFs of 16 bits", stacklevel=2)
    if unread := [name for name in others if Path(name).suffix.lower() in PASSED_OVER]:
        counts = Counter(Path(name).suffix.lower() for name in unread)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
        told = f"{path}: files of formats that are not read are left out, {len(unread)} in all ({kinds})"
        extra = "; .jxl is read with: pip install 'serpent-ir[jxl]'" if ".jxl" in counts else ""
        warnings.warn(f"{told}, {unread[0]} the first; convert them to PNG or TIFF first{extra}", stacklevel=2)


def _not_written(files: list[Path], base: Path, output: Path) -> list[Path]:
    """The files without what an earlier run wrote, if the output is a folder inside the one that is searched."""
    base, output = base.resolve(), output.resolve()
    if output == base or not output.is_relative_to(base):
        return files
    return [file for file in files if not file.resolve().is_relative_to(output)]


_BOMS = {  # UTF-32 comes first, because its mark begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _listed(path: Path) -> list[Path]:
    """The names in a list, all of which must exist. They are bytes (a name need not be text), or UTF-16 from Windows.

    Raises UsageError for a list that cannot be read, and for a name that does not exist.
    """
    if str(path) == "-":
        label, data = "the list from standard input", sys.stdin.buffer.read()
    else:
        file = Path(str(path)[1:])
        label = str(path)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UsageError(f"{file}: cannot be read as a list of images ({error.strerror})") from None
    data = data.removeprefix(codecs.BOM_UTF8)  # Windows editors put it before text
    if encoding := _encoding(data):
        try:
            data = os.fsencode(data.decode(encoding))
        except UnicodeError:
            what = encoding.upper().removesuffix("-LE").removesuffix("-BE")
            raise UsageError(f"{label}: is damaged {what}; save the list as UTF-8") from None
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    found = [Path(os.fsdecode(name)) for name in names if name.strip()]
    for name in found:
        if not _is_there(name):
            is_text = _is_utf8(data)
            shown = str(name) if len(str(name)) <= 200 else f"{str(name)[:200]}..."
            raise UsageError(
                f"{shown}: no such file or folder (named in {label})"
                + ("" if is_text else "; the list is not in UTF-8, save it so")
            )
    return found


def _encoding(data: bytes) -> str | None:
    """Whether a list is in UTF-16 or UTF-32, and which; None for a list of bytes."""
    for mark, encoding in _BOMS.items():
        if data.startswith(mark):
            return encoding
    for encoding, first in (("utf-16-le", 1), ("utf-16-be", 0)):  # without a mark: plain letters, and the end of a line
        if not any(data[first::2]) and len(data) % 2 == 0 and b"\n" in data:
            return encoding
    return None


def _is_there(name: Path) -> bool:
    try:
        return name.exists()
    except (OSError, ValueError):  # an impossible name, for example one that is too long
        return False


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _leads_out(target: Path, root: Path) -> str:
    if target.parent.resolve().is_relative_to(root):
        return ""
    return f"{target}: leads out of the output folder through a symbolic link; remove the link"


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def companion(path: Path | None, job: Job, output: Path, what: str) -> Path | None:
    """The file that goes with an image: `path`; or, if that is a folder, the file in it named like the output."""
    if path is None or not path.is_dir():
        return path
    below = job.target.relative_to(output) if job.target != output else Path(output.name)
    for suffix in (job.source.suffix, below.suffix, *sorted(SUFFIXES)):
        if (path / below.with_suffix(suffix)).is_file():
            return path / below.with_suffix(suffix)
    raise SerpentError(f"{job.source}: {path} holds no {what} of that name ({below.with_suffix('')})")


def sheet_of(job: Job) -> Path:
    """The path of an image's comparison sheet."""
    return job.target.with_name(f"{job.target.stem}-compare.png")


def check_sheets(jobs: Sequence[Job]) -> None:
    """Raise UsageError if a comparison sheet would replace an input or an output."""
    taken = {path.resolve() for job in jobs for path in (job.source, job.target)}
    sheets: set[Path] = set()
    for job in jobs:
        sheet = sheet_of(job).resolve()
        if sheet in taken or sheet in sheets:
            raise UsageError(f"{sheet_of(job)}: --compare would overwrite another image; run them apart")
        sheets.add(sheet)


def make_folders(jobs: Iterable[Job]) -> None:
    """Make the folders of the outputs. Raises SerpentError if one cannot be made."""
    for folder in {job.target.parent: None for job in jobs if not job.refused}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SerpentError(f"{folder}: no folder can be made there ({error.strerror}); choose another -o") from None
