"""A pipeline over many images: read, worked on and written at the same time for three neighbouring ones."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from serpent_ir.errors import SerpentError, is_out_of_memory, memory_line
from serpent_ir.files.plan import Job

R = TypeVar("R")
W = TypeVar("W")


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
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> Iterator[Outcome]:
    """Read, work on and write each image, at the same time for three neighbouring ones; yield what became of each.

    Reading and writing have a thread each and at most one image waits before and after `work`, which runs in the
    caller's thread as the iteration goes on. `report` is called in the order of the jobs, as soon as each is done, by
    the thread that writes, and so earlier than the outcome is yielded. A failure is that image's alone. Where the
    caller is stopped (Ctrl-C) or stops iterating, what is being written is finished and nothing else is begun.
    """
    took: dict[int, float] = {}
    waiting = iter(jobs)
    reading: deque[tuple[Job, Future[R]]] = deque()
    writing: Future[Outcome] | None = None

    def timed(function: Callable[..., Any], job: Job, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(job, *args)
        finally:
            took[job.index] = took.get(job.index, 0) + time.perf_counter() - start

    def finish(job: Job, done: list[W], error: str) -> Outcome:
        if not error:
            try:
                timed(write, job, done.pop())  # popped: the image goes as soon as it is written
            except Exception as problem:
                error = _one_line(job, problem)
        outcome = Outcome(job, error, took.pop(job.index, 0))
        report(outcome)
        return outcome

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
                    yield writing.result()
                writing = writer.submit(finish, job, done, error)
                del done
            if writing:
                yield writing.result()
        finally:
            for _, future in reading:
                future.cancel()


def _one_line(job: Job, error: Exception) -> str:
    if is_out_of_memory(error):
        said = memory_line(error)
    elif isinstance(error, (SerpentError, OSError)):
        said = str(error)
    else:
        said = f"unexpected {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return said if said.startswith((f"{job.source}: ", f"{job.target}: ")) else f"{job.source}: {said}"
