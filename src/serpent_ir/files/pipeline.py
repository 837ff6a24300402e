"""A pipeline over many images, which are read, worked on and written at the same time."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from serpent_ir.errors import SerpentError, is_out_of_memory, memory_line
from serpent_ir.files.jobs import Job

R = TypeVar("R")
W = TypeVar("W")


@dataclass(frozen=True)
class Outcome:
    """What became of an image. `error` says in one line why it failed, and is empty if it did not."""

    job: Job
    error: str
    seconds: float


@dataclass(frozen=True)
class Together(Generic[R, W]):
    """How neighbouring images are worked on together.

    Attributes:
        kind: says of what was read which kind it is, and how many of that kind may go together; None for an image that
            goes alone.
        work: works on several images of a kind. If it fails, each of them is worked on alone.
    """

    kind: Callable[[R], tuple[Hashable, int] | None]
    work: Callable[[list[Job], list[R]], list[W]]


def run(
    jobs: Sequence[Job],
    read: Callable[[Job], R],
    work: Callable[[Job, R], W],
    write: Callable[[Job, W], None],
    report: Callable[[Outcome], None] = lambda outcome: None,
    *,
    readers: int = 1,
    writers: int = 1,
    weight: Callable[[R], float] = lambda image: 1.0,
    together: Together[R, W] | None = None,
) -> Iterator[Outcome]:
    """Read, work on and write each image, several neighbours at the same time, and yield what became of each.

    `readers` threads read and `writers` threads write, and `work` runs in the caller's thread as the iteration goes on.
    At most as many images as there are readers wait before it, and at most as many as there are writers wait after it.
    More may wait only while the sum of their weights is less than 1. A thread that writes calls `report` in the order
    of the jobs, as soon as each is done, and so before the outcome is yielded. A failure does not stop the others. If
    the caller is stopped (Ctrl-C) or stops iterating, what is being written is finished and nothing else is begun.
    """
    took: dict[int, float] = {}
    in_order = _InOrder(jobs, report)

    def timed(some: Sequence[Job], function: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            for job in some:
                took[job.index] = took.get(job.index, 0) + (time.perf_counter() - start) / len(some)

    def worked_on(group: "list[_Read[R]]") -> Iterator[tuple[list[W], str]]:
        """What was made of each image, or why it failed."""
        made: list[W] = []
        if together and len(group) > 1:
            some = [one.job for one in group]
            try:
                made = timed(some, together.work, some, [one.images[0] for one in group])
            except Exception:  # each will say for itself what is wrong
                made = []
        for one in group:
            if made:
                yield [made.pop(0)], ""
            elif one.error:
                yield [], one.error
            else:
                try:
                    yield [timed([one.job], work, one.job, one.images.pop())], ""
                except Exception as problem:
                    yield [], _one_line(one.job, problem)

    def finish(job: Job, done: list[W], error: str) -> Outcome:
        if not error:
            try:
                timed([job], write, job, done.pop())  # popped: the image goes as soon as it is written
            except Exception as problem:
                error = _one_line(job, problem)
        outcome = Outcome(job, error, took.pop(job.index, 0))
        in_order(outcome)
        return outcome

    with ThreadPoolExecutor(readers) as reading, ThreadPoolExecutor(writers) as writing:
        ahead = _Ahead(jobs, lambda job: timed([job], read, job), reading, readers, weight)
        behind: deque[tuple[Future[Outcome], float]] = deque()

        def must_wait() -> bool:
            return len(behind) >= writers and sum(weight for _, weight in behind) >= 1

        try:
            while group := ahead.group(together):
                for one, (done, error) in zip(group, worked_on(group), strict=True):
                    while behind and (behind[0][0].done() or must_wait()):
                        yield behind.popleft()[0].result()
                    behind.append((writing.submit(finish, one.job, done, error), one.weight))
                    del done
            while behind:
                yield behind.popleft()[0].result()
        finally:
            ahead.close()
            for future, _ in behind:
                future.cancel()


@dataclass
class _Read(Generic[R]):
    """An image that was read, or why it failed. The image is in a list, so that it can be taken out."""

    job: Job
    images: list[R]
    error: str = ""
    weight: float = 0.0


class _Ahead(Generic[R]):
    """Reads images in threads before their turn, as many as may wait."""

    def __init__(
        self,
        jobs: Sequence[Job],
        read: Callable[[Job], R],
        threads: Executor,
        readers: int,
        weight: Callable[[R], float],
    ):
        self._jobs, self._read, self._threads = iter(jobs), read, threads
        self._readers, self._weight = readers, weight
        self._lock = threading.Lock()
        self._queue: deque[Future[_Read[R]]] = deque()
        self._running, self._waiting = 0, 0.0  # how many are being read, and the weight of those that were
        with self._lock:
            self._fill()

    def group(self, together: Together[R, Any] | None) -> list[_Read[R]]:
        """The next image, and those after it that go together with it. Empty at the end."""
        if not self._queue:
            return []
        group = [self._next()]
        kind = together.kind(group[0].images[0]) if together and not group[0].error else None
        while together and kind and len(group) < kind[1] and self._queue:
            following = self._queue[0].result()
            if following.error or together.kind(following.images[0]) != kind:
                break
            group.append(self._next())
        return group

    def close(self) -> None:
        """Begin to read no more images."""
        with self._lock:
            self._jobs = iter(())
            for future in self._queue:
                future.cancel()

    def _next(self) -> _Read[R]:
        one = self._queue[0].result()
        with self._lock:
            self._queue.popleft()
            self._waiting -= one.weight
            self._fill()
        return one

    def _fill(self) -> None:
        while len(self._queue) < self._readers or (self._running < self._readers and self._waiting < 1):
            if (job := next(self._jobs, None)) is None:
                return
            self._running += 1
            self._queue.append(self._threads.submit(self._one, job))

    def _one(self, job: Job) -> _Read[R]:
        try:
            image = self._read(job)
            one = _Read(job, [image], weight=self._weight(image))
        except Exception as problem:
            one = _Read(job, [], _one_line(job, problem))
        with self._lock:
            self._running -= 1
            self._waiting += one.weight
            self._fill()
        return one


class _InOrder:
    """Reports outcomes in the order of the jobs. Each is reported as soon as all before it are there."""

    def __init__(self, jobs: Sequence[Job], report: Callable[[Outcome], None]):
        self._jobs, self._report = deque(job.index for job in jobs), report
        self._there: dict[int, Outcome] = {}
        self._lock = threading.Lock()

    def __call__(self, outcome: Outcome) -> None:
        with self._lock:
            self._there[outcome.job.index] = outcome
            while self._jobs and (first := self._there.pop(self._jobs[0], None)):
                self._jobs.popleft()
                self._report(first)


def _one_line(job: Job, error: Exception) -> str:
    if is_out_of_memory(error):
        said = memory_line(error)
    elif isinstance(error, (SerpentError, OSError)):
        said = str(error)
    else:
        said = f"unexpected {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return said if said.startswith((f"{job.source}: ", f"{job.target}: ")) else f"{job.source}: {said}"
