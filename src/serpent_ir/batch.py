"""Many images: which file becomes which, the share of each process, what is done already, and a pipeline over them."""

import codecs
import glob
import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import Image

from serpent_ir.data import SUFFIXES, find_images
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.image import RAW_SUFFIXES, WRITTEN_SUFFIXES

R = TypeVar("R")
W = TypeVar("W")


@dataclass(frozen=True)
class Job:
    """An image to read and the file to write; `refused` says why it must not be written there."""

    index: int
    source: Path
    target: Path
    refused: str = ""


def plan(inputs: Sequence[Path], output: Path) -> list[Job]:
    """What is to be done for the inputs of a command.

    Args:
        inputs: image files; folders, which are mirrored under the output, subfolders too; patterns such as
            `photos/**/*.jpg`, whose part without wildcards is such a folder; `@LIST`, a file with a name a line (or
            ended by zero bytes), relative ones being mirrored; `-`, such a list from standard input.
        output: a folder; or, for one image, a file with the suffix of an image. Formats that are read but not written
            become PNG. Where it is inside of a folder or pattern (or, for a list, of the current folder), what is in
            it is no input, so that the same call goes on after an earlier one.

    Raises UsageError, before any work, for a missing path, a folder without images, or outputs that would overwrite an
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
        _tell_of_raw(path, path.rglob("*"))
        yield from ((file, file.relative_to(path)) for file in _not_written(find_images(path), path, output))
    elif path.exists():
        yield path, Path(path.name)
    elif _is_list(path):
        names = _listed(path)
        for name in names:
            if not name.exists():
                raise UsageError(f"{name}: no such file or folder (named in {path})")
        kept = _not_written(names, Path(), output) or names  # all of them inside: that is what was meant
        if left := len(names) - len(kept):
            warnings.warn(f"{path}: {left} of its names are inside of {output}, the output, and left out", stacklevel=2)
        for name in kept:
            mirrored = not name.is_absolute() and ".." not in name.parts
            for file, below in _found(name, output):
                yield file, (name if name.is_dir() else name.parent) / below if mirrored else below
    elif glob.has_magic(str(path)):
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base = Path(*parts[:first])
        matches = sorted(base.glob(str(Path(*parts[first:]))))
        _tell_of_raw(path, matches)
        files = [match for match in matches if match.is_file() and match.suffix.lower() in SUFFIXES]
        if not files:
            raise UsageError(f"{path}: no images match")
        yield from ((file, file.relative_to(base)) for file in _not_written(files, base, output))
    else:
        raise UsageError(f"{path}: no such file or folder")


def _tell_of_raw(path: Path, files: Iterable[Path]) -> None:
    """Other files are passed over in silence; these are photos to the person who gave them."""
    if raw := sorted(file.name for file in files if file.suffix.lower() in RAW_SUFFIXES):
        told = f"{path}: raw files of cameras are left out, {len(raw)} in all, {raw[0]} the first"
        warnings.warn(f"{told}; develop them first, best as TIFFs of 16 bits", stacklevel=2)


def _not_written(files: list[Path], base: Path, output: Path) -> list[Path]:
    """Without what an earlier run wrote, where the output is a folder inside of what is searched for images."""
    base, output = base.resolve(), output.resolve()
    if output == base or not output.is_relative_to(base):
        return files
    return [file for file in files if not file.resolve().is_relative_to(output)]


def _listed(path: Path) -> list[Path]:
    """The names in a list, which are bytes: a name need not be text."""
    if str(path) == "-":
        data = sys.stdin.buffer.read()
    else:
        file = Path(str(path)[1:])
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UsageError(f"{file}: cannot be read as a list of images ({error.strerror})") from None
    data = data.removeprefix(codecs.BOM_UTF8)  # which Windows' editors put before text
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [Path(os.fsdecode(name)) for name in names if name.strip()]


def _leads_out(target: Path, root: Path) -> str:
    if target.parent.resolve().is_relative_to(root):
        return ""
    return f"{target}: leads out of the output folder through a symbolic link; remove the link"


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are, as `torchrun` and others say in RANK and WORLD_SIZE; 0 of 1."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise UsageError("RANK and WORLD_SIZE in the environment must be numbers") from None
    if not 0 <= rank < world:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE {world} in the environment; a rank is below the size")
    return rank, world


def gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process of a `torchrun` has to say, in the order of ranks. Waits for the slowest of them.

    So no process ends before the others: `torchrun` stops all where one fails, and a bad image must stop none.
    """
    if rank_and_world()[1] == 1 or "MASTER_ADDR" not in os.environ:
        return [own]
    from datetime import timedelta

    import torch.distributed as dist

    everybody: list[Any] = [None] * rank_and_world()[1]
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        dist.all_gather_object(everybody, own)
    finally:
        dist.destroy_process_group()
    return everybody


class Manifest:
    """A file with a line for each image that was done, so that an interrupted batch goes on where it stopped.

    An image counts as done if its line names the same settings, size and time of the source, and its output is there.
    Processes that share a batch write a file each and read those of all.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self._settings = settings
        rank, world = rank_and_world()
        self._done: dict[str, dict[str, Any]] = {}
        for file in [path, *sorted(path.parent.glob(f"{glob.escape(path.name)}.rank*"))]:
            self._read(file)
        path = path if world == 1 else path.with_name(f"{path.name}.rank{rank}")
        try:
            self._file: BinaryIO = path.open("ab")
            if self._file.tell():
                self._file.write(b"\n")  # ends a line that an interruption may have cut
        except OSError as error:
            raise UsageError(f"{path}: cannot be written as a manifest ({error.strerror})") from None

    def _read(self, file: Path) -> None:
        try:
            lines = file.read_bytes().splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UsageError(f"{file}: cannot be read as a manifest ({error.strerror})") from None
        parsed = 0
        for line in filter(None, lines):
            try:
                record = json.loads(line)
                self._done[record["target"]] = record
            except (ValueError, TypeError, KeyError):
                continue
            parsed += 1
        if not parsed and any(lines):
            raise UsageError(f"{file}: is no manifest of serpent restore; name another file")

    def has(self, job: Job) -> bool:
        """Whether this image is done."""
        return job.target.is_file() and self._done.get(_absolute(job.target)) == self._record(job)

    def add(self, job: Job) -> None:
        """Note that this image is done."""
        self._file.write(json.dumps(self._record(job)).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _record(self, job: Job) -> dict[str, Any]:
        status = job.source.stat()
        names = {"source": _absolute(job.source), "target": _absolute(job.target)}
        return {**names, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, **self._settings}


def _absolute(path: Path) -> str:
    return str(path.absolute())


@dataclass(frozen=True)
class Outcome:
    """What became of an image: `error` says in a line why it failed, and is empty where it did not."""

    job: Job
    error: str
    seconds: float


def run(
    jobs: Sequence[Job],
    read: Callable[[Job], R],
    work: Callable[[Job, R], W],
    write: Callable[[Job, W], None],
    report: Callable[[Outcome], None],
) -> None:
    """Read, work on and write each image, at the same time for three neighbouring ones.

    Reading and writing have a thread each and at most one image waits before and after `work`, which runs in the
    caller's thread. `report` is called in the order of the jobs, as soon as each is done, by the thread that writes. A
    failure is that image's alone. Where the caller is stopped (Ctrl-C), what is being written is finished and nothing
    else is begun.
    """
    took: dict[int, float] = {}
    waiting = iter(jobs)
    reading: deque[tuple[Job, Future[R]]] = deque()
    writing: Future[None] | None = None

    def timed(function: Callable[..., Any], job: Job, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(job, *args)
        finally:
            took[job.index] = took.get(job.index, 0) + time.perf_counter() - start

    def finish(job: Job, done: list[W], error: str) -> None:
        if not error:
            try:
                timed(write, job, done.pop())  # popped: the image goes as soon as it is written
            except Exception as problem:
                error = _one_line(job, problem)
        report(Outcome(job, error, took.pop(job.index, 0)))

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:

        def read_ahead() -> None:
            if (job := next(waiting, None)) is not None:
                reading.append((job, reader.submit(timed, read, job)))

        try:
            read_ahead()
            while reading:
                job, future = reading.popleft()
                read_ahead()
                done, error = [], ""
                try:
                    done.append(timed(work, job, future.result()))
                except Exception as problem:
                    error = _one_line(job, problem)
                del future  # with the image that it holds
                if writing:
                    writing.result()
                writing = writer.submit(finish, job, done, error)
                del done
            if writing:
                writing.result()
        finally:
            for _, future in reading:
                future.cancel()


def _one_line(job: Job, error: Exception) -> str:
    if isinstance(error, (SerpentError, OSError)):
        said = str(error)
    elif isinstance(error, MemoryError):
        said = "not enough memory; use a smaller image or --tile"
    else:
        said = f"unexpected {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return said if said.startswith((f"{job.source}: ", f"{job.target}: ")) else f"{job.source}: {said}"
