"""Many images: the share of each process, what is done already, and a pipeline over them; `plan` is of `inputs.py`."""

import glob
import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.inputs import Job as Job
from serpent_ir.inputs import plan as plan

R = TypeVar("R")
W = TypeVar("W")


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
